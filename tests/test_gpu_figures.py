"""The compiled Triton kernels and their stored figures (``make gpu-report``): nothing spills, nothing grows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_report
from tests.triton_launches import compiled

PINNED = "3.9.0"  # the version whose figures are gated; the Makefile's
STORED = {key: row for key, row in gpu_report.read().items() if row["triton"] == PINNED}


def test_makefile_pins_the_version_whose_figures_are_gated() -> None:
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    assert f"triton=={PINNED}" in makefile


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", gpu_report.DTYPES)
def test_figures_of_the_gated_size_are_stored(dtype: str, arch: str) -> None:
    kernels = {"recurrence_forward", "recurrence_backward"}
    kernels |= {"bilinear_forward", "bilinear_backward", "din_forward", "din_backward"}
    kernels |= {"operands"} if dtype == "float32" else set()
    rows = [row for row in STORED.values() if (row["arch"], row["dtype"], row["hidden"]) == (arch, dtype, "64")]
    assert {row["kernel"] for row in rows} == kernels


def test_nothing_stored_spills() -> None:
    spilling = [key for key, row in STORED.items() if int(str(row["spills"])) > 0]
    assert not spilling


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_forward_s_step_is_short(arch: str) -> None:
    for variant in ("", "fused"):
        row = STORED[(PINNED, arch, "recurrence_forward", variant, "authors", "after", "bfloat16", "64")]
        assert float(str(row["instructions"])) <= 165, row
        assert float(str(row["barriers"])) <= 4, row


# A cheap part of the report, compiled again: H = 64 on two architectures.
AGAIN: list[tuple[str, str, str, Callable[..., None]]] = [
    ("authors", "after", "bfloat16", gpu_report.recurrence),
    ("authors", "after", "float32", gpu_report.recurrence),
    ("din", "", "bfloat16", gpu_report.attention),
    ("bilinear", "", "float32", gpu_report.attention),
]


@compiled
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind, reset, dtype, run", AGAIN, ids=lambda value: value if isinstance(value, str) else "")
def test_compiled_code_does_not_spill_or_grow(
    kind: str, reset: str, dtype: str, run: Callable[..., None], arch: int
) -> None:
    """By 2 % at most; of another version of Triton than the pinned one no figures are known, and only spills count."""
    words = (kind, reset) if reset else (kind,)
    key = {"kind": kind, "reset": reset, "dtype": dtype, "hidden": 64}
    rows = list(gpu_report.rows_of(partial(run, *words, getattr(torch, dtype), 64), arch, **key))
    assert len(rows) >= 2
    for row in rows:
        assert row["spills"] == 0, row
        stored = STORED.get(tuple(str(row[name]) for name in gpu_report.KEY))
        assert stored is not None or row["triton"] != PINNED, f"make gpu-report has not stored {row}"
        if stored is not None:
            assert float(str(row["instructions"])) <= 1.02 * float(str(stored["instructions"])), (row, stored)
