"""Files and text: finds the files of a source, opens gz, reads CSV with line numbers, parses numbers and times."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv

from dien_kernels.data._arrow import Array
from dien_kernels.data.log import Log

_BLOCK = 4 << 20  # bytes of a text file that are parsed at a time
DAMAGED = (OSError, EOFError, zlib.error)  # what reading a file raises that is cut or corrupt


def find(sources: str | Path | Sequence[str | Path], endings: tuple[str, ...], remedy: str) -> list[Path]:
    """The files that sources stand for; each exists and is not empty.

    Capitals in a name do not matter to its ending. ``remedy`` ends the error for a folder that has no such file.
    """
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not given:
        raise ValueError("sources must name at least one file, got none")
    paths: list[Path] = []
    for source in map(Path, given):
        if source.is_dir():
            inside = sorted(path for path in source.iterdir() if path.name.lower().endswith(endings))
            if not inside:
                names = sorted(path.name for path in source.iterdir())[:10]
                wanted = " or ".join(endings)
                raise FileNotFoundError(f"{source} has no file ending in {wanted}; it has {names}; {remedy}")
            paths += inside
        elif source.is_file():
            paths.append(source)
        else:
            names = sorted(path.name for path in source.parent.iterdir())[:10] if source.parent.is_dir() else []
            raise FileNotFoundError(f"{source} does not exist; {source.parent} has {names}")
    for path in paths:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
    return paths


def size_of(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


class Opened:
    """A file opened for reading, gz or not. It counts how many bytes were read since ``progress`` was last asked."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("rb")
        self._seen = 0
        zipped = path.name.lower().endswith(".gz")
        self.stream: IO[bytes] = io.BufferedReader(gzip.GzipFile(fileobj=self._raw)) if zipped else self._raw

    def progress(self) -> int:
        position = self._raw.tell()
        step, self._seen = position - self._seen, position
        return step

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self._raw.close()


class LineNumbers:
    """Gives the line number in the file of a row of a batch.

    Lines that the parser skipped are counted, blank lines are not. ``rows`` are the indices of the parsed rows that
    the batch was made of by taking some of them; None means that it has all of them.
    """

    def __init__(self, first: int, skipped: list[int], rows: Array | None = None) -> None:
        self.first, self.skipped, self.rows = first, skipped, rows

    def __call__(self, row: int) -> int:
        line = self.first + (row if self.rows is None else int(self.rows[row]))
        for left_out in sorted(self.skipped):
            if left_out <= line:
                line += 1
        return line

    def take(self, rows: Array) -> LineNumbers:
        """The line numbers of a batch that holds only these ``rows`` of this one."""
        return LineNumbers(self.first, self.skipped, rows if self.rows is None else self.rows[rows])


def csv_header(path: Path, delimiter: str) -> list[str]:
    """The names of the columns, as the file has them. Raises ``ValueError`` for a file that has no such line."""
    with Opened(path) as file:
        try:
            line = file.stream.readline().decode("utf-8-sig").strip("\r\n")
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be text in UTF-8: its first line is not ({error})") from error
    if not line:
        raise ValueError(f"{path} is empty" if path.stat().st_size == 0 else f"{path} must start with a header line")
    return next(csv.reader([line], delimiter=delimiter))


def csv_batches(
    log: Log, path: Path, wanted: list[str], delimiter: str = ",", names: list[str] | None = None
) -> Iterator[tuple[pa.RecordBatch, LineNumbers]]:
    """Yield batches of string columns of one file, with the line numbers of their rows.

    ``names`` are the names of the columns of a file that has no header line.

    Everything is read as bytes and decoded here. If Arrow guessed types from the first block, or decoded the text
    itself, one wrong line would make it refuse the whole file; here it is one bad line.
    """
    skipped: list[int] = []

    def on_bad_row(row: pa.csv.InvalidRow) -> str:
        try:
            log.bad.add(path, row.number, f"{row.actual_columns} columns instead of {row.expected_columns}")
        except ValueError as error:  # Arrow swallows what its callbacks raise
            stopped.append(error)
            return "error"
        skipped.append(row.number)
        return "skip"

    stopped: list[ValueError] = []
    options = {
        # Arrow knows the numbers of invalid rows only when it reads in one thread.
        "read_options": pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK, column_names=names),
        "parse_options": pa.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=on_bad_row),
        "convert_options": pa.csv.ConvertOptions(
            include_columns=wanted,
            column_types={name: pa.binary() for name in wanted},
            strings_can_be_null=True,
            null_values=["", "NULL", "null", "NaN", "nan", "\\N"],
        ),
    }
    with Opened(path) as file:
        line = 1 if names else 2
        try:
            for batch in pa.csv.open_csv(file.stream, **options):
                yield _as_text(log, path, batch, LineNumbers(line, skipped))
                line += batch.num_rows
                log.advance(file.progress())
        except (pa.ArrowException, *DAMAGED) as error:
            raise (stopped or [ValueError(f"{path} cannot be read as CSV: {error}")])[0] from error


def _as_text(log: Log, path: Path, batch: pa.RecordBatch, line_of: LineNumbers) -> tuple[pa.RecordBatch, LineNumbers]:
    """Decode columns of bytes as UTF-8. Rows that cannot be decoded are counted as bad lines and left out."""

    def text(raw: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([column.cast(pa.string()) for column in raw.columns], names=raw.schema.names)

    try:
        return text(batch), line_of
    except pa.ArrowInvalid:
        pass
    good = []
    for row, values in enumerate(zip(*(column.to_pylist() for column in batch.columns), strict=True)):
        try:
            for value in values:
                if value is not None:
                    value.decode()
        except UnicodeDecodeError:
            log.bad.add(path, line_of(row), "no text in UTF-8")
        else:
            good.append(row)
    rows = np.array(good, np.int64)
    return text(batch.take(pa.array(rows))), line_of.take(rows)


def as_number(column: pa.Array, dtype: pl.DataType) -> pa.Array:
    """Convert strings to numbers; a string that is no number becomes null."""
    series = pl.Series(column).cast(pl.String).str.strip_chars()
    return _arrow(series.cast(dtype, strict=False))


def time_dtype(column: pa.Array) -> pl.DataType:
    """Guess from the first values of a column of strings whether its times are integers, floats or ISO 8601 text."""
    head = pl.Series(column.slice(0, 1000)).cast(pl.String).drop_nulls().str.strip_chars()
    for dtype in (pl.Int64(), pl.Float64()):
        if len(head) == 0 or head.cast(dtype, strict=False).is_not_null().mean() >= 0.5:
            return dtype
    return pl.Datetime("us")


def parse_times(column: pa.Array, dtype: pl.DataType) -> pa.Array:
    """Convert strings to int64 or float64, and dates to microseconds; what cannot be converted becomes null."""
    if dtype == pl.Datetime("us"):
        series = pl.Series(column).cast(pl.String).str.strip_chars()
        try:
            return _arrow(series.str.to_datetime(time_unit="us", strict=False).dt.epoch("us"))
        except pl.exceptions.ComputeError:  # none of the strings looks like a date
            return pa.nulls(len(series), pa.int64())
    return as_number(column, dtype)


def _arrow(series: pl.Series) -> pa.Array:
    array = series.to_arrow()
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
