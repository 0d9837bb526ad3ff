"""What Triton's compiler and ptxas make of every shipped configuration: ``make gpu-report``. Needs no GPU.

    python -m benchmarks.gpu_report                        # all, into results/gpu_triton.csv
    python -m benchmarks.gpu_report --archs 80 90 --hidden 64

Rows of the same Triton version and key are replaced. Instructions and barriers are those of a time step in the main
loop, for each warp (of attention: of a block of ``rows`` steps); loops over chunks of a weight inside it count once.
``remainder``: a step in the loop after an unrolled one. ``variant``: "fused", W_ih x is made in the loop; "made", the
gates' products come in; else neither.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
import triton

from tests.cases import Case, actual
from tests.ops.test_attention import call, leaves, make
from tests.triton_launches import SHARED_MEMORY, Launched, compile_for, launching

RESULTS = Path(__file__).parent / "results" / "gpu_triton.csv"
KEY = ("triton", "arch", "kernel", "variant", "kind", "reset", "dtype", "hidden")
LAUNCH = {"rows": ("ROWS", "STEPS"), "chunk": ("CHUNK", "BLOCK"), "stages": ("STAGES",), "unroll": ("UNROLL",)}
FIGURES = ("registers", "spills", "shared", "instructions", "barriers", "remainder")
HIDDEN = (16, 32, 64, 128, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMS = (("authors", "after"), ("aigru", "before"))


# Attention's configurations do not depend on the device: of two architectures with the same code, one.
ATTENTION_ARCHS = (80, 90, 100, 120)


def recurrence(kind: str, reset: str, dtype: torch.dtype, hidden: int) -> None:
    actual(Case(kind, dtype, 16, 2, hidden, hidden, reset=reset), "triton")
    if (kind, reset) == FORMS[0]:  # a shared history's product is made outside
        actual(Case(kind, dtype, 16, 2, hidden, hidden, reset=reset, history=True), "triton")


def attention(kind: str, dtype: torch.dtype, hidden: int) -> None:
    case = make("din" if kind.startswith("din") else kind, 2, 2, hidden, dtype, sizes=(80, 40)[: 1 + (kind == "din")])
    out = call(case | {"backend": "triton"})
    torch.autograd.grad(out, leaves(case), torch.zeros_like(out))


def rows_of(run: Callable[[], None], arch: int, **key: object) -> Iterator[dict[str, object]]:
    """Every kernel that ``run`` launches; nothing runs, so its results are what was in memory."""
    launches: list[Launched] = []
    with launching(launches.append, arch):
        run()
    seen = set()
    for launched in launches:
        constants = launched.constants
        variant = "fused" if "W_IH" in launched.signature else "made" if "MADE_RU" in launched.signature else ""
        if "H" not in constants or (launched.kernel, variant) in seen:
            continue  # the order of rows is counted in the same way for all sizes
        seen.add((launched.kernel, variant))
        code = compile_for(launched, arch)
        yield {
            "triton": triton.__version__,
            "arch": f"sm_{arch}",
            "kernel": launched.kernel.__name__,
            "variant": variant,
            **key,
            **{name: next((constants[c] for c in words if c in constants), "") for name, words in LAUNCH.items()},
            "warps": launched.options["num_warps"],
            **code._asdict(),
        }


def jobs(archs: list[int], hidden: list[int]) -> Iterator[tuple[int, Callable[[], None], dict[str, object]]]:
    for arch, size, (name, dtype) in product(archs, hidden, DTYPES.items()):
        for kind, reset in FORMS:
            run = partial(recurrence, kind, reset, dtype, size)
            yield arch, run, {"kind": kind, "reset": reset, "dtype": name, "hidden": size}
        for kind in ("bilinear", "din", "din1") if arch in ATTENTION_ARCHS else ():
            run = partial(attention, kind, dtype, size)
            yield arch, run, {"kind": kind, "reset": "", "dtype": name, "hidden": size}


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
    for arch, run, key in jobs(chosen.archs, chosen.hidden):
        for row in rows_of(run, arch, **key):
            rows[tuple(str(row[name]) for name in KEY)] = row
            print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        write(rows)  # after each case, so that an interrupted run keeps what it has


def write(rows: dict[tuple[str, ...], dict[str, object]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*KEY, *LAUNCH, "warps", *FIGURES), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
