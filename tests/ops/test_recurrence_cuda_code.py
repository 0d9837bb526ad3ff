"""What nvcc makes of the CUDA kernels: the stored figures, and that they are still true of a few instances.

What memory is asked for is counted in the simulator (``benchmarks/gpu/memory_cuda.py``).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest

from benchmarks.gpu.compiled_cuda import FILES, KEY, RESULTS, keys_of, rows_of
from dien_kernels.ops.recurrence.cuda_launch import SIZES
from tests.cuda_code import ARCHS, LOOPS, Compiled, missing, version

# Instructions of a step and warp at H = 64 in bfloat16, and how much more other variants may take.
TARGETS = {"forward16": 177, "forward8": 188}
VARIANTS = 1.15


@lru_cache
def stored() -> dict[tuple[str, ...], dict[str, float]]:
    """Of the newest nvcc in the file."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max((row["nvcc"] for row in rows), key=lambda text: [int(n) for n in text.split(".")])
    return {
        tuple(row[name] for name in KEY[1:]): {name: float(v) for name, v in row.items() if name not in KEY and v}
        for row in rows
        if row["nvcc"] == newest
    }


def test_stored_rows_are_the_instances() -> None:
    expected = {key for arch, file, size in product(ARCHS, FILES, SIZES) for key in keys_of(file, size, arch)}
    assert set(stored()) == expected


def test_architectures_are_those_that_are_built() -> None:
    text = (Path(__file__).resolve().parents[2] / "setup.py").read_text()
    default = re.search(r'"DIEN_KERNELS_CUDA_ARCHS"\) or "([\d ]+)"', text)
    assert default is not None
    assert tuple(map(int, default[1].split())) == ARCHS


def test_nothing_spills_and_barriers_are_few() -> None:
    for key, row in stored().items():
        assert row["spills"] == row["stack"] == 0, key
        forward = key[1].startswith("forward")
        for loop in loops_of(row):
            barriers = 2 if loop.startswith("before") or not forward else 1
            assert row[f"{loop}_barriers"] <= barriers, (key, loop)


def loops_of(row: Mapping[str, object]) -> list[str]:
    return [loop for loop in LOOPS if row.get(f"{loop}_instructions")]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_forward_is_as_short_as_promised(arch: int, dtype: str) -> None:
    for kernel, target in TARGETS.items():
        row = stored()[f"sm_{arch}", kernel, dtype, "64"]
        assert row["after_instructions"] <= target, kernel
        for loop in loops_of(row):
            assert row[f"{loop}_instructions"] <= VARIANTS * target, (kernel, loop)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "padded", "arch"), [("forward_bf16", 64, 90), ("backward_bf16", 40, 90)])
def test_compiled_code_is_what_is_stored(file: str, padded: int, arch: int) -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    for row in rows_of(Compiled(file, padded), arch):
        before = stored()[tuple(str(row[name]) for name in KEY[1:])]
        assert row["spills"] == row["stack"] == 0, row
        assert loops_of(row) == loops_of(before)
        for loop in loops_of(row):
            now, then = row[f"{loop}_instructions"], before[f"{loop}_instructions"]
            assert isinstance(now, float)
            assert now <= 1.02 * then, f"{row['kernel']} {loop}: {now}, stored {then}, nvcc {version()}"
            assert row[f"{loop}_barriers"] <= before[f"{loop}_barriers"], row  # type: ignore[operator]
