"""The dispatcher looks at a ``Call`` only, so that invented calls test it without a GPU, a library or tensors."""

from __future__ import annotations

import pytest
import torch

from dien_kernels.ops import _dispatch
from dien_kernels.ops._dispatch import Call, refusal, register_backend, select, use_backend


def call(device: str = "cpu", hidden: int = 8, dtype: torch.dtype = torch.float32) -> Call:
    return Call("invented", device, dtype, 4, hidden)


@pytest.fixture(autouse=True)
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op whose backends refuse by size and device."""
    monkeypatch.setattr(_dispatch, "_refusals", {})
    monkeypatch.setattr(_dispatch._forced, "default", "auto")
    register_backend("invented", "cpu", lambda c: "not on the cpu" if c.device != "cpu" else None)
    register_backend(
        "invented",
        "cuda",
        lambda c: f"hidden={c.hidden_size} is above the 256 kept" if c.hidden_size > 256 else None,
    )
    register_backend("invented", "triton", lambda c: "float64" if c.dtype == torch.float64 else None)
    register_backend("invented", "torch", lambda c: None)
    register_backend("invented", "reference", lambda c: None)


@pytest.mark.parametrize(
    "given, expected",
    [
        (call(), "cpu"),
        (call("cuda"), "cuda"),
        (call("cuda", 512), "triton"),
        (call("cuda", 512, torch.float64), "torch"),
        (call("xpu"), "torch"),
    ],
)
def test_auto_takes_the_first_that_does_not_refuse(given: Call, expected: str) -> None:
    assert select(given, "auto") == expected


def test_auto_without_any_other_cell_is_plain_torch() -> None:
    register_backend("lonely", "torch", lambda c: None)
    assert select(call()._replace(op="lonely"), "auto") == "torch"


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton", "torch", "reference"])
def test_named_backend_runs(backend: str) -> None:
    assert select(call(), backend) == backend


def test_named_backend_never_moves_on() -> None:
    with pytest.raises(RuntimeError, match="invented: backend 'cuda' refuses this call: hidden=300 is above the 256"):
        select(call("cuda", 300), "cuda")
    register_backend("lonely", "reference", lambda c: None)
    with pytest.raises(RuntimeError, match="backend 'triton' refuses this call: there is no triton"):
        select(call()._replace(op="lonely"), "triton")


def test_block_and_argument() -> None:
    with use_backend("reference"):
        assert select(call(), "auto") == "reference"
        assert select(call(), "cpu") == "cpu", "the call's own word wins"
        with use_backend("auto"):
            assert select(call(), "auto") == "cpu"
        assert select(call(), "auto") == "reference"
    with use_backend("cuda"), pytest.raises(RuntimeError, match="above the 256"):
        select(call("cuda", 300), "auto")


@pytest.mark.parametrize("word", ["Cuda", "gpu", "", "native"])
def test_unknown_names(word: str) -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        select(call(), word)


def test_reasons_and_table() -> None:
    assert refusal(call(), "cpu") is None
    assert refusal(call("cuda"), "cpu") == "not on the cpu"
    table = {(op, backend): reason for op, backend, reason in _dispatch.table()}
    assert set(table) == {("invented", backend) for backend in _dispatch.BACKENDS}
    assert table["invented", "cpu"] is None


@pytest.mark.parametrize("there", [False, True])
def test_table_is_honest_about_devices(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    register_backend("lonely", "triton", lambda c: None if c.device == "cuda" else "the tensors are on the cpu")
    table = {(op, backend): reason for op, backend, reason in _dispatch.table()}
    assert table["lonely", "triton"] == (None if there else "needs a CUDA device, and torch sees none")
    assert table["invented", "triton"] is None, "takes the CPU too, as in Triton's interpreter"
    assert str(table["lonely", "cuda"]).startswith("there is no cuda implementation")


def test_every_backend_but_the_definition_is_tried_somewhere() -> None:
    orders = set().union(*_dispatch.AUTO_ORDER.values())
    assert orders == set(_dispatch.BACKENDS) - {"reference"}
    assert all(order[-1] == "torch" for order in _dispatch.AUTO_ORDER.values())
