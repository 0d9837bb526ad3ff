"""What Triton's compiler and ptxas make of every shipped configuration: ``make gpu-report``. Needs no GPU.

    python -m benchmarks.gpu.compiled_triton                        # all, into results/gpu_triton.csv
    python -m benchmarks.gpu.compiled_triton --archs 80 90 --hidden 64 --kinds din --dtypes float16
    python -m benchmarks.gpu.compiled_triton --missing              # what has no row of this Triton and this launch

Rows of the same Triton version and key are replaced. Instructions and barriers are those of a time step in the main
loop, for each warp (of attention: of a block of ``rows`` steps); loops over chunks of a weight inside it count once.
``remainder``: a step in the loop after an unrolled one. ``limit``: the registers that ptxas may take, where it is told.
``variant``: "fused", W_ih x is made in the loop; "made", the gates' products come in; else neither.
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

from benchmarks.store import FOLDER
from dien_kernels.ops.attention.triton_launch import MAX_DIN
from tests.attention_cases import call, leaves, make
from tests.cases import Case, actual
from tests.triton_launches import SHARED_MEMORY, Launched, compile_for, launching

RESULTS = FOLDER / "gpu_triton.csv"
KEY = ("triton", "arch", "kernel", "variant", "kind", "reset", "dtype", "hidden")
CONSTANTS = {"rows": ("ROWS", "STEPS"), "chunk": ("CHUNK", "BLOCK"), "stages": ("STAGES",), "unroll": ("UNROLL",)}
LAUNCH = (*CONSTANTS, "warps", "limit")
FIGURES = ("registers", "spills", "shared", "instructions", "barriers", "remainder")
HIDDEN = (16, 32, 64, 128, 256)  # the sizes of the launch tables
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# float16's code is bfloat16's but for the type of its products and the rounding of a store: looked at here and there.
FLOAT16 = ((80, 90), (64, 128))
FORMS = (("authors", "after"), ("aigru", "before"))
ATTENTION = ("bilinear", "din", "din1")  # din1: with one hidden layer
SMALL = ("length_order", "sum_rows_of_history")  # kernels without a loop over products, which no size strains
Row = dict[str, object]
Run = Callable[[], None]


def recurrence(kind: str, reset: str, dtype: torch.dtype, hidden: int) -> None:
    actual(Case(kind, dtype, 16, 2, hidden, hidden, reset=reset), "triton")
    if (kind, reset) == FORMS[0]:  # a shared history's product is made outside
        actual(Case(kind, dtype, 16, 2, hidden, hidden, reset=reset, history=True), "triton")


def attention(kind: str, dtype: torch.dtype, hidden: int) -> None:
    case = make("din" if kind.startswith("din") else kind, 2, 2, hidden, dtype, sizes=(80, 40)[: 1 + (kind == "din")])
    out = call(case | {"backend": "triton"})
    torch.autograd.grad(out, leaves(case), torch.zeros_like(out))


def launches_of(run: Run, arch: int, **key: object) -> Iterator[tuple[Launched, Row]]:
    """Every kernel that ``run`` launches, and its row without figures; nothing is compiled.

    Nothing runs either: the results of ``run`` are what was in memory.
    """
    launches: list[Launched] = []
    with launching(launches.append, arch):
        run()
    seen = set()
    for launched in launches:
        constants, options = launched.constants, launched.options
        variant = "fused" if "W_IH" in launched.signature else "made" if "PRODUCTS_RU" in launched.signature else ""
        if launched.kernel.__name__ in SMALL or (launched.kernel, variant) in seen:
            continue
        seen.add((launched.kernel, variant))
        row = {"triton": triton.__version__, "arch": f"sm_{arch}", "kernel": launched.kernel.__name__}
        chosen = {name: next((constants[c] for c in words if c in constants), "") for name, words in CONSTANTS.items()}
        limits = {"warps": options["num_warps"], "limit": options.get("maxnreg", "")}
        yield launched, {**row, "variant": variant, **key, **chosen, **limits}


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def launch_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in LAUNCH)


def jobs(archs: list[int], hidden: list[int]) -> Iterator[tuple[int, Run, Row]]:
    for arch, size, (name, dtype) in product(archs, hidden, DTYPES.items()):
        if dtype == torch.float16 and not (arch in FLOAT16[0] and size in FLOAT16[1]):
            continue
        for kind, reset in FORMS:
            run = partial(recurrence, kind, reset, dtype, size)
            yield arch, run, {"kind": kind, "reset": reset, "dtype": name, "hidden": size}
        for kind in ATTENTION if size <= MAX_DIN else ATTENTION[:1]:
            run = partial(attention, kind, dtype, size)
            yield arch, run, {"kind": kind, "reset": "", "dtype": name, "hidden": size}


def read(results: Path = RESULTS) -> dict[tuple[str, ...], Row]:
    if not results.exists():
        return {}
    with results.open(newline="") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    return {key_of(row): row for row in rows}


def main() -> None:
    kinds = [*(kind for kind, _ in FORMS), *ATTENTION]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=list(SHARED_MEMORY), choices=list(SHARED_MEMORY))
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN))
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--missing", action="store_true", help="leave out what has a row of this Triton and launch")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    rows = read(chosen.out)
    for arch, run, key in jobs(chosen.archs, chosen.hidden):
        if key["kind"] not in chosen.kinds or key["dtype"] not in chosen.dtypes:
            continue
        for launched, row in launches_of(run, arch, **key):
            stored = rows.get(key_of(row))
            if chosen.missing and stored is not None and launch_of(stored) == launch_of(row):
                continue
            row |= compile_for(launched, arch)._asdict()
            rows[key_of(row)] = row
            print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            write(rows, chosen.out)  # after each, so that an interrupted run keeps what it has


def write(rows: dict[tuple[str, ...], Row], results: Path) -> None:
    results.parent.mkdir(exist_ok=True)
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*KEY, *LAUNCH, *FIGURES), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
