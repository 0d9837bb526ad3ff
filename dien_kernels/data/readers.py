"""Readers of files with named columns (Parquet, CSV) and of tables; ``FORMATS`` names every reader of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

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

Sources: TypeAlias = "str | Path | Sequence[str | Path] | pa.Table"


class Reading(NamedTuple):
    """What a reader is told beside its files. ``delimiter`` and ``behaviours`` are for formats that take them."""

    bad: BadLines
    columns: Columns
    labelled: bool = False
    chunk_rows: int = 1 << 18
    delimiter: str = ","
    behaviours: Sequence[str] = ("pv",)


class Format(NamedTuple):
    """A kind of log.

    Attributes:
        endings: how the names of its files end; the files of a folder with these endings are read.
        read: from the files and ``Reading`` to a log. Nothing but headers is read before the log's stream is.
        named_columns: whether the files' columns have names that users choose: then ``columns`` and labels are allowed.
        takes: which of ``delimiter`` and ``behaviours`` are options of the format; others refuse them.
    """

    endings: tuple[str, ...]
    read: Callable[[list[Path], Reading], Log]
    named_columns: bool = False
    takes: tuple[str, ...] = ()


def guess(source: str | Path) -> dict[str, str]:
    """The format that the name of a file or folder tells, and the delimiter where it is a tab: arguments of
    ``prepare``.

    It is the first entry of ``FORMATS`` with the name's ending; nothing for Parquet, which is the default.
    """
    name = Path(source).name.lower()
    format = next((format for format, entry in FORMATS.items() if name.endswith(entry.endings)), "parquet")
    if format == "parquet":
        return {}
    tab = format == "csv" and name.endswith((".tsv", ".tsv.gz"))
    return {"format": format, **({"delimiter": "\t"} if tab else {})}


def open_log(
    sources: Sources,
    format: str | None = None,
    columns: Columns | Mapping[str, object] | None = None,
    *,
    labelled: bool = False,
    max_bad_lines: int = 100,
    chunk_rows: int = 1 << 18,
    delimiter: str | None = None,
    behaviours: Sequence[str] | None = None,
) -> Log:
    """A log over files, a folder, or a ``pyarrow.Table``; nothing but headers is read before the stream is.

    Args:
        sources: one path or several (read in the order given; a folder stands for its files of the format, by
            name), or a table in memory.
        format: a key of ``FORMATS``; None: as the name of the first source tells, and "parquet" where it tells
            nothing, as for a folder.
        columns: roles of the columns, for Parquet, CSV and tables.
        labelled: whether the rows' labels are wanted.
        max_bad_lines: how many lines may be unusable before the reading stops with an error.
        chunk_rows: rows of a Parquet file or table that are held at a time.
        delimiter: of CSV files; None: a comma, or a tab where the format is guessed from a name that ends in ".tsv".
        behaviours: Taobao: which kinds of behaviour count, of ``pv`` (clicks), ``cart``, ``fav`` and ``buy``; None:
            clicks.

    Raises:
        FileNotFoundError: a source is absent, or a folder has no file of the format.
        ValueError: an unknown format, an option that the format does not take, a missing column (the message lists
            what is there), an empty file.
    """
    options = {"delimiter": delimiter, "behaviours": behaviours}
    if format is None and not isinstance(sources, pa.Table):
        guessed = guess(sources if isinstance(sources, (str, Path)) else next(iter(sources), ""))
        format = guessed.get("format")
        delimiter = guessed.get("delimiter") if delimiter is None else delimiter
    format = "parquet" if format is None else format
    if format not in FORMATS:
        raise ValueError(f"format must be one of {tuple(FORMATS)}, got {format!r}")
    entry = FORMATS[format]
    for name, value in options.items():
        if value is not None and (isinstance(sources, pa.Table) or name not in entry.takes):
            takers = " or ".join(repr(other) for other, what in FORMATS.items() if name in what.takes)
            got = "a table" if isinstance(sources, pa.Table) else f"format {format!r}"
            raise ValueError(f"{name} is for format {takers}, got {got}")
    delimiter = "," if delimiter is None else delimiter
    bad, roles = BadLines(max_bad_lines), Columns.of(columns)
    if isinstance(sources, pa.Table):
        return _table(sources, roles, labelled, bad, chunk_rows)
    if format == "csv" and (not isinstance(delimiter, str) or len(delimiter) != 1):
        raise ValueError(f"delimiter must be one character, got {delimiter!r}")
    if not entry.named_columns and (labelled or columns is not None):
        what = "labels='given' needs" if labelled else "columns are for"
        allowed = " or ".join(repr(name) for name, other in FORMATS.items() if other.named_columns)
        raise ValueError(f"{what} format {allowed}, got format {format!r}")
    kinds = ("pv",) if behaviours is None else behaviours
    return entry.read(
        find(sources, entry.endings, _remedy()), Reading(bad, roles, labelled, chunk_rows, delimiter, kinds)
    )


def _remedy() -> str:
    """The end of errors that a wrong format is a likely cause of."""
    return f"if it is of another format, name that with format= (--format): {', '.join(FORMATS)}"


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


def _parquet(paths: list[Path], how: Reading) -> Log:
    def opened(path: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}; {_remedy()}") from error

    headers = []
    for path in paths:
        with opened(path) as file:
            headers.append(file.schema_arrow.names)
    every = _roles(paths, headers, how.columns, how.labelled)

    def read() -> Iterator[pa.RecordBatch]:
        for path, found in zip(paths, every, strict=True):
            wanted, row, size, done = found.standard(), 0, path.stat().st_size, 0
            dtype: pl.DataType | None = None
            with opened(path) as file:
                rows = file.metadata.num_rows
                for batch in file.iter_batches(how.chunk_rows, columns=sorted(set(wanted.values()))):
                    first = row + 1
                    given = {name: batch.column(column) for name, column in wanted.items()}
                    given["timestamp"], dtype = _times(given["timestamp"], dtype)
                    yield log.standardise(given, path, LineNumbers(first, []))
                    row += batch.num_rows
                    log.advance(size * row // rows - done)
                    done = size * row // rows

    log = Log.of(every[0], read, size_of(paths), how.bad)
    return log


def _csv(paths: list[Path], how: Reading) -> Log:
    headers = [csv_header(path, how.delimiter) for path in paths]
    every = _roles(paths, [[name.strip() for name in names] for names in headers], how.columns, how.labelled)

    def read() -> Iterator[pa.RecordBatch]:
        for path, found, header in zip(paths, every, headers, strict=True):
            written = {name.strip(): name for name in header}
            wanted = {name: written[column] for name, column in found.standard().items()}
            dtype: pl.DataType | None = None
            for batch, line_of in csv_batches(log, path, sorted(set(wanted.values())), how.delimiter):
                given = {name: batch.column(column) for name, column in wanted.items()}
                given["timestamp"], dtype = _times(given["timestamp"], dtype)
                for name in ("label",) * log.labelled + log.dense:
                    given[name] = as_number(given[name], pl.Float64())
                yield log.standardise(given, path, line_of)

    log = Log.of(every[0], read, size_of(paths), how.bad)
    return log


FORMATS: dict[str, Format] = {
    "parquet": Format((".parquet", ".pq"), _parquet, named_columns=True),
    "csv": Format((".csv", ".tsv", ".csv.gz", ".tsv.gz"), _csv, named_columns=True, takes=("delimiter",)),
    "amazon": Format((".json", ".json.gz"), lambda paths, how: formats.amazon(paths, how.bad)),
    "taobao": Format(
        (".csv", ".csv.gz"), lambda paths, how: formats.taobao(paths, how.behaviours, how.bad), takes=("behaviours",)
    ),
    "movielens": Format((".csv", ".csv.gz", ".dat", ".dat.gz"), lambda paths, how: formats.movielens(paths, how.bad)),
}
"""Every log format by its name: docs/add-a-log-format.md. Where two have an ending, the first is guessed from it."""
