"""The result file: one CSV, only ever appended to."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results"
DEFAULT = FOLDER / "cpu.csv"
SECOND = FOLDER / "cpu_second.csv"  # another run of the same cases, to see which ratios come again
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
        "ratio_low",
        "ratio_high",
        "sittings",
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
SIZES = ("B", "T", "I", "H", "threads")
NUMBERS = COLUMNS[COLUMNS.index("p20_us") : COLUMNS.index("note")]
Row = dict[str, str]


class BadFile(ValueError):
    """A file that is not one of results; the text names it and its line."""


def append(path: Path, rows: Iterable[Row]) -> None:
    """A file with other columns is refused: rows are never rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="") as file:
            _check_header(path, next(csv.reader(file)))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def _check_header(path: Path, header: list[str]) -> None:
    if tuple(header) != COLUMNS:
        raise BadFile(f"{path} has other columns than this version's: {', '.join(header)[:80]}")


def read(path: Path) -> list[Row]:
    """All rows; none if there is no such file. ``BadFile`` names the first line that is not a row of results."""
    if path.is_dir():
        raise BadFile(f"{path} is a folder, not a file of results")
    if not path.exists() or path.stat().st_size == 0:
        return []
    with path.open(newline="", errors="replace") as file:
        reader = csv.reader(file)
        _check_header(path, next(reader))
        return [_row(path, reader.line_num, values) for values in reader if values]


def _row(path: Path, line: int, values: list[str]) -> Row:
    if len(values) != len(COLUMNS):
        raise BadFile(f"{path}, line {line}: {len(values)} values for {len(COLUMNS)} columns")
    row = dict(zip(COLUMNS, values, strict=True))
    for name in SIZES:
        if not row[name].isdecimal():
            raise BadFile(f"{path}, line {line}: {name} must be a whole number, got {row[name]!r}")
    for name in NUMBERS:
        try:
            finite = math.isfinite(float(row[name] or "0"))
        except ValueError:
            finite = False
        if not finite:
            raise BadFile(f"{path}, line {line}: {name} must be a number or empty, got {row[name]!r}")
    return row


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def spread(row: Row) -> tuple[float, float]:
    """Of a ratio: lowest and highest median of a sitting; of older rows, of one sitting, 20th to 80th percentile."""
    low, high = ("ratio_low", "ratio_high") if row["ratio_low"] else ("ratio_p20", "ratio_p80")
    return float(row[low]), float(row[high])


def newest(rows: list[Row]) -> list[Row]:
    """The last row of each key, in the order in which the keys first came."""
    return list({key(row): row for row in rows}.values())
