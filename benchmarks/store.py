"""The result file: one CSV, only ever appended to."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent / "results" / "cpu.csv"
# What a row is about: of rows that agree in these, the newest counts.
KEY = (
    "suite",
    "op",
    "mode",
    "B",
    "T",
    "I",
    "H",
    "law",
    "dtype",
    "threads",
    "provider",
    "machine",
    "allocator",
)
COLUMNS = (
    *("suite", "op", "provider", "mode", "B", "T", "I", "H", "dtype", "law", "threads"),
    *(
        "p20_us",
        "p50_us",
        "p80_us",
        "p99_us",
        "ratio",
        "ratio_p20",
        "ratio_p80",
        "rounds",
        "calls",
        "peak_mem_mb",
        "gflops",
        "of_peak",
        "peak_gflops",
        "of_bandwidth",
        "bandwidth_gbs",
        "note",
    ),
    *("isa", "machine", "cores", "python", "torch", "mkl", "dien_kernels", "git_sha", "date", "allocator"),
)
Row = dict[str, str]


def append(path: Path, rows: Iterable[Row]) -> None:
    """A file with other columns is refused: rows are never rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if tuple(header) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes; choose another --out")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def newest(rows: list[Row]) -> list[Row]:
    """The last row of each key, in the order in which the keys first came."""
    return list({key(row): row for row in rows}.values())
