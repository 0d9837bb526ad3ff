"""What the CUDA kernels ask of memory in a step, counted in a simulator: part of ``make gpu-report``. Needs no GPU.

    PTXSIM=path/to/ptxsim python -m benchmarks.gpu.memory_cuda          # into results/gpu_cuda_memory.csv

Of one tile and time step, all warps together (the difference between calls of eight and of four steps): requests of a
warp; of shared memory the passes they take, of global memory the sectors of 32 bytes they touch; and the fewest that
would do for the same bytes. Passes above that are bank conflicts.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterator
from itertools import product

import torch

from benchmarks.store import FOLDER
from dien_kernels.ops.recurrence.cuda_launch import Tiles
from tests.cases import Case, actual, call, make
from tests.cuda_launches import STORE, Simulator, missing, module_of, simulating

RESULTS = FOLDER / "gpu_cuda_memory.csv"
KEY = ("kernel", "dtype", "padded", "kind", "reset", "space", "access")
FORMS = (("authors", "after"), ("aigru", "before"))
FIGURES = ("requests", "taken", "least")
STEPS = (4, 8)
TILES = {name: Tiles(8 if name == "forward8" else 16, 0) for name in ("forward16", "forward16, fused", "forward8")}

Counts = dict[tuple[str, str, str], int]


def counters(kernel: str, case: Case) -> Counts:
    """Of one call: requests, and what they took and would take at least, by (space, read or write, which of these)."""
    direction = "backward" if kernel == "backward16" else "forward"
    module = module_of(f"{direction}_{STORE[case.dtype]}", case.H, False, prof=True)

    def read() -> Counts:
        total: Counter[tuple[str, str, str]] = Counter()
        for m in module.memstats():
            access = (m.space, "write" if m.store else "read")
            total.update({(*access, "requests"): m.accesses, (*access, "taken"): m.actual, (*access, "least"): m.ideal})
        return dict(total)

    before = read()
    simulator = Simulator(tiles=TILES.get(kernel, Tiles(16, 0)), fused="fused" in kernel, race=False, prof=True)
    with simulating(simulator):
        if direction == "backward":
            actual(case, "cuda")
        else:
            with torch.no_grad():
                call(case, make(case), "cuda")
    return {name: number - before.get(name, 0) for name, number in read().items()}


def rows_of(kernel: str, dtype: str, padded: int) -> Iterator[dict[str, object]]:
    storage = next(d for d, name in STORE.items() if name == dtype)
    rows = TILES[kernel].rows if kernel in TILES else 16
    for kind, reset in FORMS[:1] if "fused" in kernel else FORMS:
        short, long = (
            counters(kernel, Case(kind, storage, B=rows, T=t, I=8, H=padded, ragged="full", reset=reset)) for t in STEPS
        )
        for space, access in sorted({name[:2] for name in long}):
            figures = {
                what: (long[space, access, what] - short[space, access, what]) / (STEPS[1] - STEPS[0])
                for what in FIGURES
            }
            yield dict(zip(KEY, (kernel, dtype, padded, kind, reset, space, access), strict=True)) | figures


def kernels() -> Iterator[tuple[str, str]]:
    yield from ((kernel, "bf16") for kernel in (*TILES, "backward16"))
    yield from ((kernel, "f32") for kernel in ("backward16", "forward16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--padded", type=int, nargs="+", default=[64])
    chosen = parser.parse_args()
    reason = missing()
    if reason is not None:
        raise SystemExit(f"benchmarks.gpu.memory_cuda: {reason}")
    rows: dict[tuple[str, ...], dict[str, object]] = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = {tuple(row[name] for name in KEY): dict(row) for row in csv.DictReader(file)}
    for padded, (kernel, dtype) in product(chosen.padded, kernels()):
        for row in rows_of(kernel, dtype, padded):
            rows[tuple(str(row[name]) for name in KEY)] = row
        with RESULTS.open("w", newline="") as file:  # after each, so that an interrupted run keeps what it has
            writer = csv.DictWriter(file, (*KEY, *FIGURES), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
