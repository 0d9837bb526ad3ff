"""What nvcc makes of every instance of the CUDA kernels: part of ``make gpu-report``. Needs no GPU.

    python -m benchmarks.gpu_report_cuda                        # all, into results/gpu_cuda.csv
    python -m benchmarks.gpu_report_cuda --archs 80 90 --padded 64
    python -m benchmarks.gpu_report_cuda --missing

Rows of the same nvcc version and key are replaced. Instructions and barriers are those of one time step, for each warp,
in the disassembled loop: the reset after or before the product, and with the input scaled by the attention (AIGRU).
Shared memory is what a block has, that which the launch asks for included.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from dien_kernels.ops.recurrence import cuda_launch
from tests.cuda_code import ARCHS, Code, Compiled, Loop, version
from tests.cuda_launches import STORE

RESULTS = Path(__file__).parent / "results" / "gpu_cuda.csv"
KEY = ("nvcc", "arch", "kernel", "dtype", "padded")
FILES = {
    "forward_bf16": cuda_launch.FORWARD_NARROW,
    "forward_f16": cuda_launch.FORWARD_NARROW,
    "forward_f32": cuda_launch.FORWARD_WIDE,
    "backward_bf16": cuda_launch.BACKWARD,
    "backward_f16": cuda_launch.BACKWARD,
    "backward_f32": cuda_launch.BACKWARD,
}


DTYPES = {name: dtype for dtype, name in STORE.items()}


def kernels_of(file: str) -> tuple[str, ...]:
    if file.startswith("backward"):
        return ("backward16",)
    return ("forward16",) if file == "forward_f32" else ("forward16", "forward8")


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
        for name, value in code._asdict().items():
            if isinstance(value, Loop):
                figures |= {f"{name}_{what}": number for what, number in value._asdict().items()}
            elif name != "kernel":
                figures[name] = value
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
    parser.add_argument("--padded", type=int, nargs="+", default=list(cuda_launch.FORWARD_NARROW))
    parser.add_argument("--files", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--missing", action="store_true", help="leave out what has a row for this version of nvcc")
    chosen = parser.parse_args()
    rows = read()
    for file in chosen.files:
        for padded in (size for size in FILES[file] if size in chosen.padded):
            keys = [
                (arch, [row_key(arch, kernel, file, padded) for kernel in kernels_of(file)]) for arch in chosen.archs
            ]
            archs = [arch for arch, row_keys in keys if not (chosen.missing and all(key in rows for key in row_keys))]
            compiled = Compiled(file, padded) if archs else None
            for arch in archs if compiled else ():
                for row in rows_of(compiled, arch):
                    rows[tuple(str(row[name]) for name in KEY)] = row
                    print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            write(rows)  # after each size, so that an interrupted run keeps what it has


def row_key(arch: int, kernel: str, file: str, padded: int) -> tuple[str, ...]:
    return version(), f"sm_{arch}", kernel, file.partition("_")[2], str(padded)


if __name__ == "__main__":
    main()
