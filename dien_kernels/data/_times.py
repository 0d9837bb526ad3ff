"""Times of every form as int64 microseconds since 1970 (UTC), or as plain numbers; the unit is part of the type.

Epoch numbers are told apart by their size: the years 1990 to 2100 are other numbers in seconds, milliseconds,
microseconds and nanoseconds. Numbers outside all four ranges (0, 1, 2, ...) are plain numbers, which have an order
and no unit. Day and month are never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from dien_kernels.data import _kinds
from dien_kernels.data._arrow import Array
from dien_kernels.data._kinds import Checked

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
UNITS = (*PER_SECOND, "number", "float")
FIRST, LAST = 631_152_000, 4_102_444_800  # 1990-01-01 and 2100-01-01 in seconds
FORMS = "times are dates as in 2023-01-31 12:00:00, epoch numbers of 1990 to 2100, or what time_format= says"
_LIMIT = 2**63 - 1
_ISO = re.compile(r"\s*\d{4}[-/]\d")
_DAY_OR_MONTH = r"^\d{1,2}[/.\-]\d{1,2}[/.\-]\d{2,4}\b"
_PARTS = (
    r"^(\d{4})[-/](\d{1,2})[-/](\d{1,2})"  # date
    r"(?:[Tt ]\s*(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9})\d*)?)?)?"  # time
    r"\s*(?:([Zz]|UTC|GMT)|([+-])(\d{2}):?(\d{2})?)?$"  # zone
)


class Times:
    """Reads the times of all files of a log; it keeps what has been decided about each file and about the log.

    Attributes:
        unit: ``"us"`` or ``"number"``, None before the first time was read.
        seen: for the report: of each kind of time how many files and rows, the first file, lowest and highest.
    """

    def __init__(self, format: str | None = None, unit: str | None = None, words: Sequence[str] = _kinds.MISSING):
        if unit is not None and unit not in UNITS:
            raise ValueError(f"time_unit must be one of {UNITS}, got {unit!r}")
        if format is not None and (not isinstance(format, str) or "%" not in format):
            raise ValueError(f"time_format must be a format of strptime, such as '%m/%d/%Y %H:%M', got {format!r}")
        if format is not None and unit is not None:
            raise ValueError("only one of time_format and time_unit can be given: the one is for text, got both")
        self.format, self.given, self.words = format, unit, words
        self.unit: str | None = None
        self.seen: dict[str, dict[str, Any]] = {}
        self._float = unit == "float"  # whether plain numbers have fractions
        self._first: str | None = None  # the file that decided about the unit
        self._numbers: dict[str, str | None] = {}  # of each file, the unit of its numbers
        self._files: set[tuple[str, str]] = set()

    def read(self, column: pa.Array, path: Path | str, line_of: Callable[[int], int] = lambda row: row + 1) -> Checked:
        """Times as int64 (or float64, plain numbers with fractions), null where they are missing.

        Raises:
            TypeError: a type that holds no times.
            ValueError: plain numbers in a log with calendar times, dates whose day and month cannot be told apart,
                fractions behind whole numbers.
        """
        column, wrong = _kinds.plain(column), None
        dtype = column.type
        if pa.types.is_timestamp(dtype) or pa.types.is_date(dtype):
            values, wrong = _calendar(column)
            return self._done(values, wrong, path, "dates" if pa.types.is_date(dtype) else "timestamps")
        if pa.types.is_null(dtype):
            return Checked(pa.nulls(len(column), self._type()))
        if self.format is not None and pa.types.is_integer(dtype):
            column = column.cast(pa.string())
        if _kinds.is_text(column.type):
            found = _kinds.text(column, self.words, trim=True)
            values, kind = self._text(found, path, line_of)
            return values if kind is None else self._done(values.values, values.wrong, path, kind)
        if pa.types.is_integer(dtype):
            found = _kinds.whole(column)
        elif pa.types.is_floating(dtype) or pa.types.is_decimal(dtype):
            given = column.cast(pa.float64(), safe=False)
            found = Checked(pc.if_else(pc.is_nan(given), pa.scalar(None, pa.float64()), given))
        else:
            raise TypeError(f"times or numbers, got {dtype}")
        return self._epoch(found, path, line_of)

    def _type(self) -> pa.DataType:
        return pa.float64() if self._float and self.unit != "us" else pa.int64()

    def _text(self, found: Checked, path: Path | str, line_of: Callable[[int], int]) -> tuple[Checked, str | None]:
        """Times that are text; the kind is None where the numbers among them have been told already."""
        column = found.values
        present = column.drop_null()
        if not len(present):
            return Checked(pa.nulls(len(column), self._type()), found.wrong), None
        if self.format is not None:
            values = _by_format(column, self.format)
            return Checked(values, _kinds.either(found.wrong, _kinds.lost(column, values))), f"text, {self.format}"
        values = pa.nulls(len(column), pa.int64())
        if _ISO.match(present[0].as_py()):
            values = _iso(column)
        rest = column if values.null_count == len(column) else pc.if_else(values.is_valid(), None, column)
        numbers = Checked(pa.nulls(len(column), pa.int64()))
        if rest.null_count < len(rest):
            whole = _kinds.as_number(rest, pl.Int64())
            numbers = Checked(whole)
            if _kinds.lost(rest, whole) is not None:
                real = _kinds.as_number(rest, pl.Float64())
                numbers = Checked(real) if real.null_count < whole.null_count else numbers
            left = pc.if_else(numbers.values.is_valid(), None, rest)
            if left.null_count < len(left) and values.null_count == len(column):
                values = _iso(left)
        dates = len(values) - values.null_count
        told = len(numbers.values) - numbers.values.null_count
        lost = np.asarray(column.is_valid()) & np.asarray(values.is_null()) & np.asarray(numbers.values.is_null())
        self._refuse_day_or_month(column, lost, path, line_of)
        wrong = _kinds.either(found.wrong, lost if lost.any() else None)
        if not told:
            return Checked(values, wrong), "text"
        if not dates:
            read = self._epoch(numbers, path, line_of)
            return Checked(read.values, _kinds.either(wrong, read.wrong)), None
        # Dates and numbers in one column: the more frequent kind is the kind of the file.
        unit = self._unit_of(numbers.values, path)
        if unit in PER_SECOND or dates >= told:
            self._done(values, None, path, "text")
            unit = self._numbers[str(path)] = unit if unit in PER_SECOND else None
            ours = numbers.values
            read = self._epoch(numbers, path, line_of) if unit else Checked(pa.nulls(len(ours), pa.int64()))
            wrong = _kinds.either(wrong, _kinds.lost(ours, read.values))
            return Checked(pc.coalesce(values, read.values), wrong), None
        read = self._epoch(numbers, path, line_of)
        return Checked(
            read.values, _kinds.either(_kinds.either(wrong, read.wrong), np.asarray(values.is_valid()))
        ), None

    def _refuse_day_or_month(
        self, column: pa.Array, lost: Array, path: Path | str, line_of: Callable[[int], int]
    ) -> None:
        """An error where most times are such as 09/02/2023; a few are bad lines."""
        if 2 * lost.sum() <= len(column) - column.null_count:
            return
        shaped = lost & np.asarray(pc.fill_null(pc.match_substring_regex(column, _DAY_OR_MONTH), False))
        if 2 * shaped.sum() > lost.sum():
            row = int(np.flatnonzero(shaped)[0])
            raise ValueError(
                f"{path}:{line_of(row)}: timestamp {column[row].as_py()!r} may have the day first or the month: "
                "name the form with time_format= (--time-format), as in '%d/%m/%Y' or '%m/%d/%Y %H:%M'"
            )

    def _unit_of(self, values: pa.Array, path: Path | str) -> str | None:
        """The unit of a file's numbers: the one in whose range most of the first values lie."""
        if self.given is not None:
            return "number" if self.given == "float" else self.given
        key = str(path)
        if self._numbers.get(key) is None and values.null_count < len(values):
            given = values.drop_null().to_numpy(zero_copy_only=False)
            inside = {
                unit: int(((given >= FIRST * per) & (given < LAST * per)).sum()) for unit, per in PER_SECOND.items()
            }
            inside["number"] = len(given) - sum(inside.values())
            self._numbers[key] = max(inside, key=inside.__getitem__)
        return self._numbers.get(key)

    def _epoch(self, found: Checked, path: Path | str, line_of: Callable[[int], int]) -> Checked:
        unit, values = self._unit_of(found.values, path), found.values
        if unit is None:
            return Checked(pa.nulls(len(values), self._type()), found.wrong)
        if unit == "number":
            return self._plain(found, path, line_of)
        per = PER_SECOND[unit]
        low, high = (FIRST * per, LAST * per) if self.given is None else (-_LIMIT // 10**6 * per, _LIMIT // 10**6 * per)
        low, high = max(low, -_LIMIT), min(high, _LIMIT)
        bounds = pc.min_max(values).as_py()
        wrong = None
        if bounds["min"] is not None and not (bounds["min"] >= low and bounds["max"] <= high):
            inside = pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))
            kept = pc.if_else(inside, values, pa.scalar(None, values.type))
            wrong, values = _kinds.lost(values, kept), kept
        numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
        if pa.types.is_floating(values.type):
            micros = np.rint(numbers * (10**6 / per)).astype(np.int64)
        else:
            micros = numbers * (10**6 // per) if per <= 10**6 else numbers // (per // 10**6)
        mask = np.asarray(values.is_null()) if values.null_count else None
        return self._done(pa.array(micros, mask=mask), _kinds.either(found.wrong, wrong), path, f"epoch {unit}")

    def _plain(self, found: Checked, path: Path | str, line_of: Callable[[int], int]) -> Checked:
        values, wrong = found.values, found.wrong
        if pa.types.is_floating(values.type):
            finite = pc.if_else(pc.is_finite(values), values, pa.scalar(None, pa.float64()))
            wrong, values = _kinds.either(wrong, _kinds.lost(values, finite)), finite
            broken = pc.fill_null(pc.not_equal(pc.floor(values), values), False)
            if not self._float and broken.true_count:
                if self.unit is not None:
                    row = int(np.flatnonzero(np.asarray(broken))[0])
                    raise ValueError(
                        f"{path}:{line_of(row)}: timestamp {values[row].as_py()!r} has a fraction, and the numbers "
                        "before it have none: say time_unit='float' (--time-unit float)"
                    )
                self._float = True
            if not self._float:
                wide = values
                values = _kinds.whole(values).values
                wrong = _kinds.either(wrong, _kinds.lost(wide, values))
        if self._float:
            values = values.cast(pa.float64(), safe=False)
        return self._done(values, wrong, path, "numbers")

    def _done(self, values: pa.Array, wrong: Array | None, path: Path | str, kind: str) -> Checked:
        """Note what was read, and refuse plain numbers beside calendar times."""
        known = len(values) - values.null_count
        if not known:
            return Checked(values.cast(self._type()), wrong)
        unit, key = "number" if kind == "numbers" else "us", str(path)
        if self.unit is None:
            self.unit, self._first = unit, key
        elif self.unit != unit:
            words = {"number": "plain numbers", "us": "calendar times"}
            raise ValueError(
                f"{path} has {words[unit]} as times ({values.drop_null()[0].as_py()}, {kind}), and {self._first} has "
                f"{words[self.unit]}: they have no common order; say what they are with time_unit= (--time-unit) or "
                "time_format= (--time-format)"
            )
        entry = self.seen.setdefault(kind, {"files": 0, "rows": 0, "first": Path(path).name, "low": None, "high": None})
        entry["files"] += (kind, key) not in self._files
        self._files.add((kind, key))
        entry["rows"] += known
        bounds = pc.min_max(values).as_py()
        entry["low"] = bounds["min"] if entry["low"] is None else min(entry["low"], bounds["min"])
        entry["high"] = bounds["max"] if entry["high"] is None else max(entry["high"], bounds["max"])
        return Checked(values, wrong)


def words(micros: int) -> str:
    """A calendar time in words; the number itself where no calendar reaches."""
    try:
        return datetime.fromtimestamp(micros // 10**6, timezone.utc).isoformat(" ").removesuffix("+00:00")
    except (ValueError, OverflowError, OSError):
        return str(micros)


def _calendar(column: pa.Array) -> tuple[pa.Array, Array | None]:
    """Arrow dates and times as microseconds; those beyond 64 bits are wrong."""
    fine = pa.types.is_timestamp(column.type) and column.type.unit == "ns"
    try:
        return column.cast(pa.timestamp("us"), safe=not fine).cast(pa.int64()), None
    except pa.ArrowInvalid:
        pass
    zone = column.type.tz if pa.types.is_timestamp(column.type) else None
    values: list[int | None] = []
    for value in column:
        try:
            values.append(value.cast(pa.timestamp("us", zone)).cast(pa.int64()).as_py() if value.is_valid else None)
        except pa.ArrowInvalid:
            values.append(None)
    result = pa.array(values, pa.int64())
    return result, _kinds.lost(column, result)


def _by_format(column: pa.Array, format: str) -> pa.Array:
    series = pl.Series(column).cast(pl.String)
    try:
        read = series.str.strptime(pl.Datetime("us"), format.replace(".%f", "%.f"), strict=False)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"time_format {format!r} is no format of times: {' '.join(str(error).split())}") from None
    return _kinds.to_arrow(read.dt.epoch("us"))


def _iso(column: pa.Array) -> pa.Array:
    """Year, month, day, and where it is said hour, minute, second, fraction and zone; null for other text."""
    series = pl.Series(column).cast(pl.String)
    between = "T" if column.drop_null()[0].as_py()[10:11] == "T" else " "
    plain = series.str.strptime(pl.Datetime("us"), f"%Y-%m-%d{between}%H:%M:%S", strict=False).dt.epoch("us")
    rest = (series.is_not_null() & plain.is_null()).arg_true()
    return _kinds.to_arrow(plain.scatter(rest, _by_parts(series.gather(rest))) if len(rest) else plain)


def _by_parts(series: pl.Series) -> pl.Series:
    parts = series.str.extract_groups(_PARTS).struct.unnest()
    year, month, day, hour, minute, second, fraction, _, sign, off_hour, off_minute = (
        parts[name] for name in parts.columns
    )
    date = year + "-" + month.str.zfill(2) + "-" + day.str.zfill(2)
    clock = hour.fill_null("0").str.zfill(2) + ":" + minute.fill_null("00") + ":" + second.fill_null("00")
    time = (date + " " + clock).str.strptime(pl.Datetime("us"), "%Y-%m-%d %H:%M:%S", strict=False).dt.epoch("us")
    micros = fraction.fill_null("0").str.pad_end(6, "0").str.slice(0, 6).cast(pl.Int64)
    shift = (off_hour.cast(pl.Int64).fill_null(0) * 60 + off_minute.cast(pl.Int64).fill_null(0)) * 60_000_000
    behind = (sign.fill_null("+") == "-").cast(pl.Int64) * 2 - 1  # +01:00 is an hour earlier in UTC
    total: pl.Series = time + micros + behind * shift
    return total
