"""What Triton's compiler and ptxas make of every shipped configuration: ``make gpu-report``. Needs no GPU.

    python -m benchmarks.gpu_report                        # all, into results/gpu_triton.csv
    python -m benchmarks.gpu_report --archs 80 90 --hidden 64

Rows of the same Triton version and key are replaced. Instructions and barriers are those of a time step in the main
loop, for each warp; loops over chunks of W_hh inside it count once.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
import triton

from tests.cases import Case, actual
from tests.triton_launches import SHARED_MEMORY, Launched, compile_for, launching

RESULTS = Path(__file__).parent / "results" / "gpu_triton.csv"
KEY = ("triton", "arch", "kernel", "kind", "reset", "dtype", "hidden")
LAUNCH = ("rows", "chunk", "stages", "unroll", "warps")
FIGURES = ("registers", "spills", "shared", "instructions", "barriers")
HIDDEN = (16, 32, 64, 128, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMS = (("authors", "after"), ("aigru", "before"))


def rows_of(case: Case, arch: int) -> Iterator[dict[str, object]]:
    """Both kernels of a case; nothing runs, so its results are what was in memory."""
    launches: list[Launched] = []
    with launching(launches.append, arch):
        actual(case, "triton")
    for launched in launches:
        code = compile_for(launched, arch)
        constants = launched.constants
        yield {
            "triton": triton.__version__,
            "arch": f"sm_{arch}",
            "kernel": launched.kernel.__name__,
            "kind": case.kind,
            "reset": case.reset,
            "dtype": str(case.dtype).removeprefix("torch."),
            "hidden": case.H,
            **{name: constants[name.upper()] for name in LAUNCH[:-1]},
            "warps": launched.options["num_warps"],
            **code._asdict(),
        }


def read() -> dict[tuple[str, ...], dict[str, object]]:
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {tuple(row[name] for name in KEY): dict(row) for row in csv.DictReader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=list(SHARED_MEMORY), choices=list(SHARED_MEMORY))
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN))
    chosen = parser.parse_args()
    rows = read()
    for arch, hidden, dtype, (kind, reset) in product(chosen.archs, chosen.hidden, DTYPES.values(), FORMS):
        for row in rows_of(Case(kind, dtype, 16, 2, hidden, hidden, reset=reset), arch):
            rows[tuple(str(row[name]) for name in KEY)] = row
            print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        write(rows)  # after each case, so that an interrupted run keeps what it has


def write(rows: dict[tuple[str, ...], dict[str, object]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*KEY, *LAUNCH, *FIGURES), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
