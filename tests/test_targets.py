"""What a process cannot run: no tests are made of it, and the table at the end of a run says why."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from dien_kernels import _native
from tests import conftest
from tests.cases import TARGETS, Case, target_params
from tests.targets import impossible, missing, refuses


def test_a_target_has_tests_or_a_reason() -> None:
    made = {parameter.values[0] for parameter in target_params()}
    assert made == {target for target in TARGETS if missing(target) is None}
    assert "reference" in made


def test_the_instruction_set_in_force_stays_as_it_was() -> None:
    """Asking is trying, and must not leave the library on what was tried last."""
    if not _native.available():
        pytest.skip(f"native code is absent: {_native.reason()}")
    before = torch.ops.dien_kernels._cpu_isa()
    missing.cache_clear()
    for target in TARGETS:
        missing(target)
    assert torch.ops.dien_kernels._cpu_isa() == before


def item(marks: tuple[pytest.Mark, ...] = (), **parameters: object) -> SimpleNamespace:
    """As much of a test as ``impossible`` looks at."""
    return SimpleNamespace(
        callspec=SimpleNamespace(params=parameters),
        iter_markers=lambda name: [mark for mark in marks if mark.name == name],
    )


def test_refused_dtypes_and_marked_targets_are_impossible() -> None:
    without = (pytest.mark.without("triton").mark,)
    assert impossible(item(without, target="triton"))
    assert not impossible(item(without, target="cpu-portable"))
    assert not impossible(item(target="reference", dtype=torch.float16))
    assert not impossible(item(target="cpu-portable", case=Case(dtype=torch.bfloat16)))
    assert not impossible(item(case=Case(dtype=torch.float16)))
    if refuses("cpu-portable", torch.float16) is not None:  # the library is there
        assert impossible(item(target="cpu-portable", case=Case(dtype=torch.float16)))
        assert impossible(item(name="cpu-avx2", dtype=torch.float16))


def test_the_table_gives_the_reason_of_what_did_not_run() -> None:
    lines = conftest.absent({("recurrence", "reference", "-"), ("recurrence", "cpu", "portable")})
    named = {line.partition(":")[0] for line in lines}
    assert named >= {f"recurrence  cpu  {isa}" for isa in ("avx2", "avx2x2", "avx512")}
    assert named >= {"recurrence  cuda  -", "recurrence  triton  -"}
    assert not named & {"recurrence  cpu  portable", "recurrence  reference  -"}
    for line in lines:
        assert "not run here, because " in line
    rows = {
        ("recurrence", "cpu", "portable", "gru", "float32"): Counter(passed=2),
        ("recurrence", "reference", "-", "gru", "float16"): Counter(passed=1),
    }
    table, notes = conftest.table(rows, {})
    if refuses("cpu-portable", torch.float16) is not None:
        assert "not run (1)" in table[1]
        assert notes == ["(1) float16 is not among the CPU kernels' dtypes (float32, float64, bfloat16)"]
