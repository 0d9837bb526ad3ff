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
# The columns that say what a row is about. Of rows that agree in all of them, the last one in the file counts.
KEY = (
    *("suite", "op", "mode", "B", "T", "I", "H", "length_distribution", "dtype", "threads", "provider"),
    *("machine", "allocator"),
)
COLUMNS = (
    *("suite", "op", "provider", "mode", "B", "T", "I", "H", "dtype", "length_distribution", "threads"),
    *("p20_us", "p50_us", "p80_us", "p99_us", "ratio", "ratio_p20", "ratio_p80", "ratio_low", "ratio_high"),
    *("sessions", "rounds", "calls", "peak_mem_mb"),
    *("gflops", "of_peak", "peak_gflops", "of_bandwidth", "bandwidth_gbs", "note"),
    *("isa", "machine", "cores", "python", "torch", "mkl", "dien_kernels", "git_sha", "date", "allocator"),
)
SIZES = ("B", "T", "I", "H", "threads")
NUMBERS = COLUMNS[COLUMNS.index("p20_us") : COLUMNS.index("note")]
Row = dict[str, str]


class BadFile(ValueError):
    """A file that does not hold benchmark results; the message names the file and the line."""


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows at the end. ``BadFile`` if the file has other columns, or ends within a row."""
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
    """The records below the header. ``BadFile`` if the header is another one, or the last record is cut."""
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
    """The records of the file, each with the number of its first line."""
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
    """Times and ratios are positive, and a ratio lies in its interval, so that readers can rely on that."""
    names = ("p50_us",) if row["p50_us"] else ()
    has_interval = row["ratio"] and row["provider"] not in BASES
    for name in (*names, "ratio", *_ends(row)) if has_interval else names:
        if float(row[name] or 0) <= 0:
            raise BadFile(f"{at}: {name} must be above 0, got {row[name]!r}")
    if has_interval:
        low, high = interval(row)
        if not low <= float(row["ratio"]) <= high:
            raise BadFile(f"{at}: ratio must lie between {' and '.join(_ends(row))}, got {row['ratio']!r}")


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def interval(row: Row) -> tuple[float, float]:
    """The lowest and highest median that the ratio has in one session.

    Old rows have a single session: for those, the 20th and 80th percentile of its rounds.
    """
    low, high = _ends(row)
    return float(row[low]), float(row[high])


def _ends(row: Row) -> tuple[str, str]:
    return ("ratio_low", "ratio_high") if row["ratio_low"] else ("ratio_p20", "ratio_p80")


def newest(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """The last row of each key."""
    return {key(row): row for row in rows}


def of_one_machine(rows: Sequence[Row]) -> list[Row]:
    """The newest rows, of the machine and allocator setting that were used last."""
    last = max(rows, key=lambda row: row["date"])
    return [row for row in newest(rows).values() if all(row[name] == last[name] for name in ("machine", "allocator"))]
