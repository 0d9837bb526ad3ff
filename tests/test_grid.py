"""Nothing is missing from a row of the grid: every op has its files, fakes, pages, tests and benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dien_kernels.ops  # noqa: F401  defines the raw ops
from dien_kernels.ops import _dispatch

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(path.parent.name for path in (ROOT / "dien_kernels" / "ops").glob("*/__init__.py"))


def raw_ops() -> list[str]:
    """Every raw op of ours, without its namespace."""
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return sorted({name.removeprefix("dien_kernels::") for name in names if name.startswith("dien_kernels::")})


def test_there_are_ops() -> None:
    assert "recurrence" in OPS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("file", ["__init__.py", "op.py", "reference.py", "reference_backend.py", "torch_backend.py"])
def test_files(op: str, file: str) -> None:
    text = (ROOT / "dien_kernels" / "ops" / op / file).read_text()
    assert text.startswith('"""'), "a file opens with what lives in it"


@pytest.mark.parametrize("op", OPS)
def test_room_card(op: str) -> None:
    card = (ROOT / "dien_kernels" / "ops" / op / "__init__.py").read_text()
    assert "Lives here" in card
    assert "Must not be here" in card


@pytest.mark.parametrize("op", OPS)
def test_test_file(op: str) -> None:
    assert list((ROOT / "tests" / "ops").glob(f"test_{op}*.py"))


@pytest.mark.parametrize("op", OPS)
def test_section_of_the_mathematics(op: str) -> None:
    """A page of its own, or a section of the common one; the common page points to it either way."""
    common = (ROOT / "docs" / "math.md").read_text()
    page = f"math-{op.replace('_', '-')}.md"
    if (ROOT / "docs" / page).exists():
        assert page in common
    else:
        assert f"\n## The {op.replace('_', ' ')}\n" in common


@pytest.mark.parametrize("op", OPS)
def test_benchmark_entry(op: str) -> None:
    registry = (ROOT / "benchmarks" / "registry.py").read_text()
    assert re.search(rf"\b{op}\b", registry)


@pytest.mark.parametrize("op", sorted(_dispatch._refusals))
def test_dispatched_ops_run_in_plain_torch_and_have_a_definition(op: str) -> None:
    """On every device and in every dtype: nothing that these two refuse could be checked, or run at all."""
    for backend in ("torch", "reference"):
        for device, dtype in (("cpu", torch.float16), ("cuda", torch.float64), ("xpu", torch.bfloat16)):
            assert _dispatch.refusal(_dispatch.Call(op, device, dtype, 7, 1000), backend) is None


def test_raw_ops_are_private_and_have_fakes() -> None:
    """An op without a fake cannot be traced; its words about itself have no tensors to fake."""
    names = raw_ops()
    assert names
    for name in names:
        assert name.startswith("_"), f"raw op {name} must be private"
        if name in ("_cpu_isa", "_set_cpu_isa", "_cuda_driver_version", "_cuda_runtime_version"):
            continue
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dien_kernels::{name}", "Meta") or has_fake(name), name


def has_fake(name: str) -> bool:
    entry = torch._library.simple_registry.singleton.find(f"dien_kernels::{name}")
    return entry.fake_impl.kernel is not None


def test_equations_are_numbered_once_and_cited_ones_exist() -> None:
    text = (ROOT / "docs" / "math.md").read_text()
    numbers = re.findall(r" \((\d+[ab]?)\)$", text, re.MULTILINE)
    whole = [int(n.rstrip("ab")) for n in numbers]
    assert len(numbers) == len(set(numbers))
    assert sorted(set(whole)) == list(range(1, max(whole) + 1))
    forward = re.findall(r" \((\d+)\)$", text.partition("### Backward")[0], re.MULTILINE)
    assert cited("reference.py") == {int(n) for n in forward}, "the definition cites every equation of the forward"
    assert cited("torch_backend.py") == set(whole), "the derivative by hand cites every equation, and no other"


def cited(file: str) -> set[int]:
    text = (ROOT / "dien_kernels" / "ops" / "recurrence" / file).read_text()
    return {int(n) for n in re.findall(r"\s\((\d+)[ab]?\)", text)}


@pytest.mark.parametrize("op, page", [("attention", "math-attention"), ("auxiliary_loss", "math-auxiliary-loss")])
def test_definitions_cite_the_equations_of_their_forward(op: str, page: str) -> None:
    forward = (ROOT / "docs" / f"{page}.md").read_text().partition("## Backward")[0]
    numbers = set(re.findall(r"^ +\(([ALM]\d+)\)", forward, re.MULTILINE)) - {"A4", "A5"}  # other ways to (A2)
    if op == "auxiliary_loss":
        numbers |= {"M1"}
    text = (ROOT / "dien_kernels" / "ops" / op / "reference.py").read_text()
    assert set(re.findall(r"\(([ALM]\d+)\)", text)) == numbers
