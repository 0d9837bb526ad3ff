"""What nvcc makes of every instance of the CUDA kernels: part of ``make gpu-report``. Needs no GPU.

    python -m benchmarks.gpu.compiled_cuda                        # all, into results/gpu_cuda.csv
    python -m benchmarks.gpu.compiled_cuda --archs 80 90 --padded 64
    python -m benchmarks.gpu.compiled_cuda --missing

Rows of the same nvcc version and key are replaced. Instructions and barriers are those of one time step, for each warp,
in the disassembled loop: the reset after or before the product, with the input scaled by the attention (AIGRU), with
W_ih x in the loop ("fused"), and of tiles with eight rows ("eights").
Shared memory is what a block has, that which the launch asks for included.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator

from benchmarks.store import FOLDER
from dien_kernels.ops.recurrence import cuda_launch
from tests.cuda_code import ARCHS, LOOPS, Code, Compiled, Loop, missing, version
from tests.cuda_launches import STORE

RESULTS = FOLDER / "gpu_cuda.csv"
KEY = ("nvcc", "arch", "kernel", "dtype", "padded")
FILES = tuple(f"{direction}_{name}" for direction in ("forward", "backward") for name in ("bf16", "f16", "f32"))
DTYPES = {name: dtype for dtype, name in STORE.items()}


def kernels_of(file: str) -> tuple[str, ...]:
    if file.startswith("backward"):
        return ("backward16",)
    return ("forward16",) if file == "forward_f32" else ("forward16", "forward8")


def keys_of(file: str, padded: int, arch: int) -> list[tuple[str, ...]]:
    """What tells the rows apart that come from one file for one size, but for the version of nvcc."""
    return [(f"sm_{arch}", kernel, file.partition("_")[2], str(padded)) for kernel in kernels_of(file)]


def dynamic(code: Code, file: str, padded: int) -> int:
    """Shared memory that the launch asks for: ptxas knows of none."""
    dtype = DTYPES[file.partition("_")[2]]
    return cuda_launch.backward_dynamic(dtype, padded) if code.kernel == "backward16" else 0


def rows_of(compiled: Compiled, arch: int) -> Iterator[dict[str, object]]:
    file, padded = compiled.file, compiled.padded
    for code in compiled.codes(arch):
        code = code._replace(shared=code.shared + dynamic(code, file, padded))
        figures: dict[str, object] = {
            "nvcc": version(),
            "arch": f"sm_{arch}",
            "kernel": code.kernel,
            "dtype": file.partition("_")[2],
            "padded": padded,
            "threads": ((padded + 15) // 16 if code.kernel == "forward8" else padded // 8) * 32,
        }
        figures |= {name: value for name, value in code._asdict().items() if name not in ("kernel", "loops")}
        for name in LOOPS:
            loop = code.loops.get(name)
            figures |= {f"{name}_{what}": "" if loop is None else getattr(loop, what) for what in Loop._fields}
        yield figures


def read() -> dict[tuple[str, ...], dict[str, object]]:
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {tuple(row[name] for name in KEY): dict(row) for row in csv.DictReader(file)}


def write(rows: dict[tuple[str, ...], dict[str, object]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(rows.values()))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--padded", type=int, nargs="+", default=list(cuda_launch.SIZES))
    parser.add_argument("--files", nargs="+", default=list(FILES), choices=FILES)
    parser.add_argument("--missing", action="store_true", help="leave out what has a row for this version of nvcc")
    chosen = parser.parse_args()
    reason = missing()
    if reason is not None:
        raise SystemExit(f"benchmarks.gpu.compiled_cuda: {reason}")
    rows = read()
    for file in chosen.files:
        for padded in (size for size in cuda_launch.SIZES if size in chosen.padded):
            archs = [
                arch
                for arch in chosen.archs
                if not (chosen.missing and all((version(), *key) in rows for key in keys_of(file, padded, arch)))
            ]
            compiled = Compiled(file, padded) if archs else None
            for arch in archs if compiled else ():
                for row in rows_of(compiled, arch):
                    rows[tuple(str(row[name]) for name in KEY)] = row
                    print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            write(rows)  # after each size, so that an interrupted run keeps what it has


if __name__ == "__main__":
    main()
