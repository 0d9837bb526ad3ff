"""What nvcc makes of every instance of the CUDA kernels: part of ``make gpu-report``. Needs no GPU.

    python -m benchmarks.gpu_report_cuda                        # all, into results/gpu_cuda.csv
    python -m benchmarks.gpu_report_cuda --archs 80 90 --padded 64

Rows of the same nvcc version and key are replaced. Instructions and barriers are those of one time step, for each warp,
in the disassembled loop: the reset after or before the product, and with the input scaled by the attention (AIGRU).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from dien_kernels.ops.recurrence import cuda_launch
from tests.cuda_code import Loop, compile_file, version

RESULTS = Path(__file__).parent / "results" / "gpu_cuda.csv"
ARCHS = (80, 86, 89, 90, 100, 120)
KEY = ("nvcc", "arch", "kernel", "dtype", "padded")
FILES = {
    "forward_bf16": cuda_launch.FORWARD_NARROW,
    "forward_f16": cuda_launch.FORWARD_NARROW,
    "forward_f32": cuda_launch.FORWARD_WIDE,
    "backward_bf16": cuda_launch.BACKWARD,
    "backward_f16": cuda_launch.BACKWARD,
    "backward_f32": cuda_launch.BACKWARD,
}


def rows_of(file: str, padded: int, arch: int) -> Iterator[dict[str, object]]:
    for code in compile_file(file, padded, arch):
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
    chosen = parser.parse_args()
    rows = read()
    for file, sizes in FILES.items():
        for padded in (size for size in sizes if size in chosen.padded):
            for arch in chosen.archs:
                for row in rows_of(file, padded, arch):
                    rows[tuple(str(row[name]) for name in KEY)] = row
                    print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            write(rows)  # after each size, so that an interrupted run keeps what it has


if __name__ == "__main__":
    main()
