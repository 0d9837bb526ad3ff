"""CSV files as batches of text columns, with the line of every row."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from dien_kernels.data._arrow import Array
from dien_kernels.data._files import DAMAGED, Opened
from dien_kernels.data.log import Log

_BLOCK = 4 << 20  # bytes of a text file that are parsed at a time
_NOT_UTF8 = "\uffff"  # stands for bytes that are not UTF-8; it is no character of any language


class LineNumbers:
    """Gives the line in the file of a row of a batch: a row may span several lines, and blank lines are no rows.

    Rows that the parser skipped are counted. ``rows`` are the indices of the parsed rows that the batch was made of by
    taking some of them; None means that it has all of them.
    """

    def __init__(self, finder: Finder, first: int, skipped: list[int], rows: Array | None = None) -> None:
        self.finder, self.first, self.skipped, self.rows = finder, first, skipped, rows

    def __call__(self, row: int) -> int:
        record = self.first + (row if self.rows is None else int(self.rows[row]))
        for left_out in sorted(self.skipped):
            if left_out <= record:
                record += 1
        return self.finder.line(record)

    def take(self, rows: Array) -> LineNumbers:
        """The line numbers of a batch that holds only these ``rows`` of this one."""
        return LineNumbers(self.finder, self.first, self.skipped, rows if self.rows is None else self.rows[rows])


class Finder:
    """Finds the line on which a record of a CSV file begins, by reading the file again up to there."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self._path, self._delimiter = path, delimiter
        self._known: list[tuple[int, int]] = []
        self._walk: Iterator[int] = iter(())
        self._at = self._line = 0

    def line(self, record: int) -> int:
        """The line (from 1) of a record (from 1, the header among them). A pipe cannot be read again: the record."""
        if not self._path.is_file():
            return record
        if record < self._at or self._at == 0:
            self._walk, self._at = self._lines(), 0
        while self._at < record:
            self._line, self._at = next(self._walk, self._line + 1), self._at + 1
        return self._line

    def _lines(self) -> Iterator[int]:
        with Opened(self._path) as file:
            for line, _ in records(file.stream, self._delimiter):
                yield line


def records(stream: IO[bytes], delimiter: str) -> Iterator[tuple[int, bytes]]:
    """The records of a CSV file with the lines they begin on; lines end with CR, LF or both, blank ones are skipped."""
    between, line, begin, held = delimiter.encode(), 0, 0, b""
    for piece in _lines(stream):
        line += 1
        if not held and not piece.strip(b"\r\n"):
            continue
        begin = begin if held else line
        held += piece
        if not _open_quote(held, between):
            yield begin, held
            held = b""
        elif len(held) > _BLOCK:  # a quote that is never closed
            break
    if held:
        yield begin, held


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 18):
        pieces = (rest + block).splitlines(keepends=True)
        # A CR at the end of a block may be the first half of a line's end.
        rest = pieces.pop() if not pieces[-1].endswith(b"\n") else b""
        yield from pieces
    if rest:
        yield rest


def _open_quote(record: bytes, delimiter: bytes) -> bool:
    """Whether a record ends inside quotes. Only a quote at the start of a field opens, and ``""`` inside is a quote."""
    at = 0
    while b'"' in record:
        if record.startswith(b'"', at):
            at = _behind_quotes(record, at + 1)
            if not at:
                return True
        at = record.find(delimiter, at) + 1
        if not at:
            break
    return False


def _behind_quotes(record: bytes, at: int) -> int:
    """The place behind the quote that closes; 0 where there is none."""
    while True:
        at = record.find(b'"', at) + 1
        if not at or not record.startswith(b'"', at):
            return at
        at += 1


class _Utf8(io.RawIOBase):
    """A stream in which ``_NOT_UTF8`` stands for bytes that are not UTF-8, and that is never cut between CR and LF.

    Arrow ends with a traceback where such bytes stand in a line of a wrong number of columns, and loses an LF that
    begins a block behind a CR, inside quotes, too.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._held = b""
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")("dien_kernels.not_utf8")
        self.replaced = False

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        size = -1 if size is None else size
        block, held = self._stream.read(size - len(self._held) if size > 0 else size), self._held
        self._held = b"\r" if block.endswith(b"\r") and size > 1 else b""
        block = held + (block[:-1] if self._held else block)
        if self._held and not block:
            return self.read(size)
        if not self._decoder.getstate()[0] and (not block or block.isascii()):
            return block
        text = self._decoder.decode(block, final=not block)
        self.replaced = self.replaced or _NOT_UTF8 in text
        return text.encode() or (self.read(size) if block else b"")


codecs.register_error("dien_kernels.not_utf8", lambda error: (_NOT_UTF8, error.end))  # type: ignore[attr-defined]


def csv_header(path: Path, delimiter: str) -> list[str]:
    """The names of the columns, as the file has them. Raises ``ValueError`` for a file that has no such line."""
    with Opened(path) as file:
        try:
            _, line = next(records(file.stream, delimiter), (0, b""))
            text = line.decode("utf-8-sig").strip("\r\n")
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be text in UTF-8: its first line is not ({error})") from error
    if not text:
        raise ValueError(f"{path} is empty" if path.stat().st_size == 0 else f"{path} must start with a header line")
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path} must start with a line of column names: {error}") from error


def csv_batches(
    log: Log, path: Path, wanted: list[str], delimiter: str = ",", names: list[str] | None = None
) -> Iterator[tuple[pa.RecordBatch, LineNumbers]]:
    """Yield batches of string columns of one file, with the line numbers of their rows.

    ``names`` are the names of the columns of a file that has no header line. Values are read as they stand; words for
    "missing" are found later. If Arrow guessed types from the first block, one wrong line would make it refuse the
    whole file; here it is one bad line.
    """
    skipped: list[int] = []
    stopped: list[ValueError] = []
    finder = Finder(path, delimiter)

    def on_bad_row(row: pa.csv.InvalidRow) -> str:
        try:
            line = 0 if log.bad.told else finder.line(row.number)
            log.bad.add(path, line, f"{row.actual_columns} columns instead of {row.expected_columns}")
        except ValueError as error:  # Arrow swallows what its callbacks raise
            stopped.append(error)
            return "error"
        skipped.append(row.number)
        return "skip"

    with Opened(path) as file:
        text = _Utf8(file.stream)
        first = 1 if names else 2
        try:
            reader = pa.csv.open_csv(
                text,
                # Arrow knows the numbers of invalid rows only when it reads in one thread.
                read_options=pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK, column_names=names),
                parse_options=pa.csv.ParseOptions(
                    delimiter=delimiter, invalid_row_handler=on_bad_row, newlines_in_values=True
                ),
                convert_options=pa.csv.ConvertOptions(
                    include_columns=wanted, column_types={name: pa.string() for name in wanted}
                ),
            )
            for batch in reader:
                lines = LineNumbers(finder, first, skipped)
                yield _decodable(log, path, batch, lines) if text.replaced else (batch, lines)
                first += batch.num_rows
                log.advance(file.progress())
        except (pa.ArrowException, *DAMAGED) as error:
            why = str(error)
            if "straddl" in why:
                why = f"a record is longer than {_BLOCK >> 20} MiB: is there a quote that is never closed?"
            raise (stopped or [ValueError(f"{path} cannot be read as CSV: {why}")])[0] from error


def _decodable(log: Log, path: Path, batch: pa.RecordBatch, line_of: LineNumbers) -> tuple[pa.RecordBatch, LineNumbers]:
    """The rows that are UTF-8; others are counted as bad lines and left out."""
    wrong = np.zeros(batch.num_rows, bool)
    for column in batch.columns:
        wrong |= np.asarray(pc.fill_null(pc.match_substring(column, _NOT_UTF8), False))
    if not wrong.any():
        return batch, line_of
    for row in np.flatnonzero(wrong).tolist():
        log.bad.add(path, 0 if log.bad.told else line_of(row), "no text in UTF-8")
    rows = np.flatnonzero(~wrong)
    return batch.take(pa.array(rows)), line_of.take(rows)
