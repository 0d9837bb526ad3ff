"""The result file: one CSV, to which a run only appends."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.registry import BASES

FOLDER = Path(__file__).resolve().parent / "results"
DEFAULT = FOLDER / "cpu.csv"
REPORTED = (DEFAULT, FOLDER / "cpu_second.csv")  # two runs of the same cases: the first's numbers, the spread of both
AGAIN = FOLDER / "cpu_third.csv"  # another run, which the spreads are held to
# Neighbours on the machine change by the hour, and a run's sittings of one case span ten minutes: what the sittings
# gave is divided and multiplied by this. Chosen before AGAIN was measured, by the second run, of whose 890 ratios 878
# are so within the spread of the first run alone (696 of them were there when it was chosen, 693 within).
ALLOWANCE = 1.1
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
    """A file with other columns, or cut within its last row, is refused: rows are never rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        _checked(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def _checked(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The records below the header, if that is ours and the last of them is whole."""
    records = _records(path)
    _, header = next(records)
    if tuple(header) != COLUMNS:
        raise BadFile(f"{path} has other columns than this version's: {', '.join(header)[:80]}")
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":  # a row cut in its last column looks whole, and the next would be glued to it
            raise BadFile(f"{path} does not end with a newline: its last row is cut")
    return records


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each with the number of the line it begins on."""
    line = 1
    with path.open(newline="", errors="replace") as file:
        reader = csv.reader(file, strict=True)  # otherwise a quote left open would take in all that follows
        try:
            for values in reader:
                yield line, values
                line = reader.line_num + 1
        except csv.Error as reason:
            raise BadFile(f"{path}, line {line}: {reason}") from reason


def read(path: Path) -> list[Row]:
    """All rows; none if there is no such file. ``BadFile`` names the first line that is not a row of results."""
    if path.is_dir():
        raise BadFile(f"{path} is a folder, not a file of results")
    if not path.exists() or path.stat().st_size == 0:
        return []
    return [_row(path, line, values) for line, values in _checked(path) if values]


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
    _check_ratio(f"{path}, line {line}", row)
    return row


def _check_ratio(at: str, row: Row) -> None:
    """A time and a ratio are above 0, and a ratio has its spread: what divides by them or draws them need not ask."""
    names = ("p50_us",) if row["p50_us"] else ()
    has_spread = row["ratio"] and row["provider"] not in BASES
    for name in (*names, "ratio", *_ends(row)) if has_spread else names:
        if float(row[name] or 0) <= 0:
            raise BadFile(f"{at}: {name} must be above 0, got {row[name]!r}")
    if has_spread:
        low, high = sat(row)
        if not low <= float(row["ratio"]) <= high:
            raise BadFile(f"{at}: ratio must lie between {' and '.join(_ends(row))}, got {row['ratio']!r}")


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def spread(row: Row) -> tuple[float, float]:
    """What is stated beside a ratio: ``sat`` and ``ALLOWANCE`` on either side."""
    low, high = sat(row)
    return low / ALLOWANCE, high * ALLOWANCE


def sat(row: Row) -> tuple[float, float]:
    """Of a ratio: lowest and highest median of a sitting; of older rows, of one sitting, 20th to 80th percentile."""
    low, high = _ends(row)
    return float(row[low]), float(row[high])


def _ends(row: Row) -> tuple[str, str]:
    return ("ratio_low", "ratio_high") if row["ratio_low"] else ("ratio_p20", "ratio_p80")


def read_runs(paths: Sequence[Path]) -> list[Row]:
    """The newest row of each key of the first file; the sittings of the other files count in its spread."""
    first, *others = ({key(row): row for row in read(path)} for path in paths)
    for other in others:
        for name in first.keys() & other.keys():
            if all(row["ratio"] and row["ratio_low"] for row in (first[name], other[name])):
                (low, high), (other_low, other_high) = sat(first[name]), sat(other[name])
                sides = {"ratio_low": str(min(low, other_low)), "ratio_high": str(max(high, other_high))}
                first[name] = first[name] | sides
    return list(first.values())
