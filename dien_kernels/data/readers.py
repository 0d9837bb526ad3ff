"""Readers of files with named columns (Parquet, CSV) and of tables; ``open_log`` finds the right reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data import formats
from dien_kernels.data._files import (
    LineNumbers,
    as_number,
    csv_batches,
    csv_header,
    find,
    parse_times,
    size_of,
    time_dtype,
)
from dien_kernels.data.log import BadLines, Columns, Log, Roles

FORMATS = ("parquet", "csv", "amazon", "taobao", "movielens")
Sources: TypeAlias = "str | Path | Sequence[str | Path] | pa.Table"


def open_log(
    sources: Sources,
    format: str = "parquet",
    columns: Columns | Mapping[str, object] | None = None,
    *,
    labelled: bool = False,
    max_bad_lines: int = 100,
    chunk_rows: int = 1 << 18,
    delimiter: str = ",",
    behaviours: Sequence[str] = ("pv",),
) -> Log:
    """A log over files, a folder, or a ``pyarrow.Table``; nothing but headers is read before the stream is.

    Args:
        sources: one path or several (read in the order given; a folder stands for its files of the format, by
            name), or a table in memory.
        format: one of ``FORMATS``.
        columns: roles of the columns, for Parquet, CSV and tables.
        labelled: whether the rows' labels are wanted.
        max_bad_lines: how many lines may be unusable before the reading stops with an error.
        chunk_rows: rows of a Parquet file or table that are held at a time.
        delimiter: of CSV files.
        behaviours: Taobao: which kinds of behaviour count, of ``pv`` (clicks), ``cart``, ``fav`` and ``buy``.

    Raises:
        FileNotFoundError: a source is absent, or a folder has no file of the format.
        ValueError: an unknown format, a missing column (the message lists what is there), an empty file.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    bad, roles = BadLines(max_bad_lines), Columns.of(columns)
    if isinstance(sources, pa.Table):
        return _table(sources, roles, labelled, bad, chunk_rows)
    if format == "csv" and (not isinstance(delimiter, str) or len(delimiter) != 1):
        raise ValueError(f"delimiter must be one character, got {delimiter!r}")
    if format in ("parquet", "csv"):
        endings = (".parquet", ".pq") if format == "parquet" else (".csv", ".tsv", ".csv.gz", ".tsv.gz")
        paths = find(sources, endings)
        if format == "parquet":
            return _parquet(paths, roles, labelled, bad, chunk_rows)
        return _csv(paths, roles, labelled, bad, delimiter)
    if labelled or columns is not None:
        what = "labels='given' needs" if labelled else "columns are for"
        raise ValueError(f"{what} format 'parquet' or 'csv', got format {format!r}")
    if format == "amazon":
        return formats.amazon(find(sources, (".json", ".json.gz")), bad)
    if format == "taobao":
        return formats.taobao(find(sources, (".csv", ".csv.gz")), behaviours, bad)
    return formats.movielens(find(sources, (".csv", ".csv.gz", ".dat", ".dat.gz")), bad)


def _roles(paths: list[Path], headers: list[list[str]], columns: Columns, labelled: bool) -> list[Roles]:
    """The roles of every file's columns; all files have the same."""
    every = [columns.resolve(names, labelled, str(path)) for path, names in zip(paths, headers, strict=True)]
    for path, found in zip(paths, every, strict=True):
        odd = every[0].standard().keys() ^ found.standard().keys()
        if odd:  # category columns that were found, and not asked for
            raise ValueError(
                f"all files must have the same fields, but only one of {paths[0]} and {path} has {', '.join(odd)}: "
                "leave the field out (item_fields=[]) or give every file the column"
            )
    return every


def _times(column: pa.Array, dtype: pl.DataType | None) -> tuple[pa.Array, pl.DataType | None]:
    """Times that are text as numbers, and what kind of text they are: that of the first batch (None: not known)."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column, dtype
    dtype = time_dtype(column) if dtype is None else dtype
    return parse_times(column, dtype), dtype


def _table(table: pa.Table, columns: Columns, labelled: bool, bad: BadLines, chunk_rows: int) -> Log:
    roles = columns.resolve(table.column_names, labelled, "the table")
    wanted = roles.standard()

    def read() -> Iterator[pa.RecordBatch]:
        row, dtype = 0, None
        for batch in table.to_batches(max_chunksize=chunk_rows):
            first = row + 1
            given = {name: batch.column(column) for name, column in wanted.items()}
            given["timestamp"], dtype = _times(given["timestamp"], dtype)
            yield log.standardise(given, "table", LineNumbers(first, []))
            row += batch.num_rows
            log.advance(batch.num_rows)

    log = Log.of(roles, read, table.num_rows, bad)
    return log


def _parquet(paths: list[Path], columns: Columns, labelled: bool, bad: BadLines, chunk_rows: int) -> Log:
    def opened(path: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}") from error

    headers = []
    for path in paths:
        with opened(path) as file:
            headers.append(file.schema_arrow.names)
    every = _roles(paths, headers, columns, labelled)

    def read() -> Iterator[pa.RecordBatch]:
        for path, found in zip(paths, every, strict=True):
            wanted, row, size, done = found.standard(), 0, path.stat().st_size, 0
            dtype: pl.DataType | None = None
            with opened(path) as file:
                rows = file.metadata.num_rows
                for batch in file.iter_batches(chunk_rows, columns=sorted(set(wanted.values()))):
                    first = row + 1
                    given = {name: batch.column(column) for name, column in wanted.items()}
                    given["timestamp"], dtype = _times(given["timestamp"], dtype)
                    yield log.standardise(given, path, LineNumbers(first, []))
                    row += batch.num_rows
                    log.advance(size * row // rows - done)
                    done = size * row // rows

    log = Log.of(every[0], read, size_of(paths), bad)
    return log


def _csv(paths: list[Path], columns: Columns, labelled: bool, bad: BadLines, delimiter: str) -> Log:
    headers = [csv_header(path, delimiter) for path in paths]
    every = _roles(paths, [[name.strip() for name in names] for names in headers], columns, labelled)

    def read() -> Iterator[pa.RecordBatch]:
        for path, found, header in zip(paths, every, headers, strict=True):
            written = {name.strip(): name for name in header}
            wanted = {name: written[column] for name, column in found.standard().items()}
            dtype: pl.DataType | None = None
            for batch, line_of in csv_batches(log, path, sorted(set(wanted.values())), delimiter):
                given = {name: batch.column(column) for name, column in wanted.items()}
                given["timestamp"], dtype = _times(given["timestamp"], dtype)
                for name in ("label",) * log.labelled + log.dense:
                    given[name] = as_number(given[name], pl.Float64())
                yield log.standardise(given, path, line_of)

    log = Log.of(every[0], read, size_of(paths), bad)
    return log
