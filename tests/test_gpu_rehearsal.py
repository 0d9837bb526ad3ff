"""What ``make test-gpu`` and ``make bench-gpu`` run, on the CPU: their code is right before a GPU sees it.

In Triton's interpreter (the second run of ``make test``) its kernels stand in for those of a device.
"""

from __future__ import annotations

import csv
import io
from itertools import product

import pytest
import torch

from benchmarks import inputs
from benchmarks.gpu import timings
from benchmarks.registry import Case
from tests.cases import target_params
from tests.ops import test_gpu
from tests.triton_launches import INTERPRETED

pytestmark = pytest.mark.usefixtures("one_thread")
BACKEND = "triton" if INTERPRETED else "torch"
on_backend = pytest.mark.parametrize("backend", target_params((BACKEND,)))
SMALL = [case for case in test_gpu.CASES if case.B <= 33 and case.H <= 100][:: 20 if INTERPRETED else 3]
ATTENTION = list(product(test_gpu.DTYPES, test_gpu.ATTENTION))[:: 31 if INTERPRETED else 5]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(test_gpu, "WIDTHS", (18, 9))  # the interpreter is slow
    for module in (timings, inputs):
        monkeypatch.setattr(module, "DIN_WIDTHS", (6, 4))


@on_backend
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_recurrence(case: test_gpu.Case, backend: str) -> None:
    test_gpu.test_recurrence(case, backend, lambda *combination: None)


@on_backend
@pytest.mark.parametrize("dtype, combination", ATTENTION, ids=str)
def test_attention(dtype: torch.dtype, combination: tuple, backend: str) -> None:
    test_gpu.test_attention(dtype, combination, backend, lambda *combination: None)


@on_backend
def test_repetition(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = test_gpu.Case("aigru", torch.float32, 5, 4, 6, 6, history=True)
    monkeypatch.setattr(test_gpu, "Case", lambda *_, **__: small)
    test_gpu.test_repeats_itself(backend)


def test_cases_of_the_benchmark() -> None:
    """Every size and op, in both modes; attention at the two sizes of its models."""
    every = list(timings.cases([size[3] for size in timings.SIZES]))
    assert len(every) == len(set(every)) == 2**4 * len(timings.SIZES) + 2**3 * 2
    assert {case.size for case in every} == set(timings.SIZES)


@on_backend
@pytest.mark.parametrize("op", ["gru", "augru", "attention_bilinear", "attention_din"])
def test_rows_of_the_benchmark(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every provider is built, is right in both modes, and gets its numbers."""
    options = list(product(("fwd", "fwd+bwd"), ("full", "ragged"), timings.DTYPES))[:: 3 if INTERPRETED else 1]
    every = [Case("gpu", op, mode, 4, 5, 6, 6, law, dtype, ()) for mode, law, dtype in options]
    monkeypatch.setattr(timings, "ORDERED", (70,))
    file = io.StringIO()
    timings.record(every, "cpu", {"device": "none"}, file, budget_s=0.0)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    orders = [row for row in rows if row["op"] == "order"]
    assert [row["provider"] for row in orders] == (["argsort", "triton"] if INTERPRETED else ["argsort"])
    assert all(row["p50_us"] and not row["note"] for row in orders)
    rows = rows[len(orders) :]
    expected = {backend, "torch"}
    expected |= {"torch_gru_padded", "torch_gru_packed"} if op == "gru" else {"eager_loop"} if op == "augru" else set()
    assert {row["provider"] for row in rows} == expected
    assert len(rows) == len(every) * len(expected)
    for row in rows:
        assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]), row
        assert not row["note"].startswith(("failed", "wrong")), row
        assert (row["ratio"] != "") == INTERPRETED


def test_a_wrong_provider_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "WRONG", dict.fromkeys(timings.WRONG, -1.0))
    rows = list(timings.measure(Case("gpu", "gru", "fwd+bwd", 4, 5, 6, 6, "full", "float32", ()), "cpu", 0.0))
    assert rows
    assert all(row["note"].startswith("wrong: result is off by") and "p50_us" not in row for row in rows)
