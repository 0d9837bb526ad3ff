"""Readers of files with named columns (Parquet, CSV) and of tables; ``FORMATS`` names every reader of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data import _kinds, _tables, formats
from dien_kernels.data._csv import csv_batches, csv_header
from dien_kernels.data._files import find, named, packed, partition, size_of
from dien_kernels.data._times import Times
from dien_kernels.data.columns import Columns, Roles
from dien_kernels.data.log import BadLines, Log, Words
from dien_kernels.data.samples import SAMPLE_FORMATS

Sources: TypeAlias = "str | Path | Sequence[str | Path] | pa.Table | Any"
"""Files, or a table: a ``pyarrow.Table``, a LazyFrame of polars, or what has ``__arrow_c_stream__``."""
_NAMED = ("time_format", "time_unit", "missing")  # options of what has named columns


class Reading(NamedTuple):
    """What a reader is told beside its files. ``delimiter`` and ``behaviours`` are for formats that take them."""

    bad: BadLines
    columns: Columns
    labelled: bool = False
    chunk_rows: int = 1 << 18
    delimiter: str = ","
    behaviours: Sequence[str] = ("pv",)
    time_format: str | None = None
    time_unit: str | None = None
    missing: Sequence[str] | None = None

    def log(self, roles: Roles, read: Callable[[], Iterator[pa.RecordBatch]], total: int) -> Log:
        """A log of these roles, whose times and missing words are as the user says."""
        words = Words(self.missing)
        return Log.of(roles, read, total, self.bad, Times(self.time_format, self.time_unit, words.keys), words)


class Format(NamedTuple):
    """A kind of log.

    Attributes:
        endings: how the names of its files end; the files of a folder with these endings are read.
        read: from the files and ``Reading`` to a log. Nothing but headers is read before the log's stream is.
        named_columns: whether the files' columns have names that users choose: then ``columns`` and labels are allowed.
        takes: which of ``delimiter``, ``behaviours``, ``time_format``, ``time_unit`` and ``missing`` are options of the
            format; others refuse them.
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
    tab = format == "csv" and name.endswith(packed(".tsv"))
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
    time_format: str | None = None,
    time_unit: str | None = None,
    missing: Sequence[str] | None = None,
) -> Log:
    """A log over files, folders, or a table; nothing but headers is read before the stream is.

    Args:
        sources: one path or several, read in the order given. A folder stands for the files of the format in it and
            below it, by path; ``*`` and ``**`` make a pattern; ``~`` is the home folder. Or a table in memory: a
            ``pyarrow.Table``, a LazyFrame of polars, or any object with ``__arrow_c_stream__`` (a DataFrame of polars
            or pandas, a relation of DuckDB).
        format: a key of ``FORMATS``; None: as the name of the first source tells, and "parquet" where it tells
            nothing, as for a folder.
        columns: roles of the columns, for Parquet, CSV and tables.
        labelled: whether the rows' labels are wanted.
        max_bad_lines: how many lines may be unusable before the reading stops with an error.
        chunk_rows: rows of a Parquet file or table that are held at a time.
        delimiter: of CSV files; None: a comma, or a tab where the format is guessed from a name that ends in ".tsv".
        behaviours: Taobao: which kinds of behaviour count, of ``pv`` (clicks), ``cart``, ``fav`` and ``buy``; None:
            clicks.
        time_format: how times that are text are written, in the words of strptime: ``"%m/%d/%Y %H:%M"``. None: as in
            ISO 8601, or numbers.
        time_unit: what numbers mean as times: ``s``, ``ms``, ``us`` or ``ns`` since 1970, ``number`` (whole numbers
            that give an order only) or ``float`` (such numbers with fractions). None: as their size tells.
        missing: the words that mean "missing" in text; None: the usual ones (docs/data.md).

    Raises:
        FileNotFoundError: a source is absent, or a folder has no file of the format.
        ValueError: an unknown format, an option that the format does not take, a missing column (the message lists
            what is there), an empty file.
    """
    options = {
        "delimiter": delimiter,
        "behaviours": behaviours,
        "time_format": time_format,
        "time_unit": time_unit,
        "missing": missing,
    }
    table = _tables.is_table(sources)
    if format is None and not table:
        guessed = guess(next(iter(named(sources)), ""))
        format = guessed.get("format")
        delimiter = guessed.get("delimiter") if delimiter is None else delimiter
    format = "parquet" if format is None else format
    if format not in FORMATS:
        samples = f"; prepare reads samples, too: {', '.join(SAMPLE_FORMATS)}"
        raise ValueError(f"format must be one of {tuple(FORMATS)}, got {format!r}{samples}")
    entry = FORMATS[format]
    for name, value in options.items():
        if value is not None and name not in (_NAMED if table else entry.takes):
            takers = " or ".join(repr(other) for other, what in FORMATS.items() if name in what.takes)
            got = "a table" if table else f"format {format!r}"
            raise ValueError(f"{name} is for format {takers}, got {got}")
    delimiter = "," if delimiter is None else delimiter
    if format == "csv" and not table and (not isinstance(delimiter, str) or len(delimiter.encode()) != 1):
        raise ValueError(f"delimiter must be one character, got {delimiter!r}")
    if not entry.named_columns and (labelled or columns is not None):
        what = "labels='given' needs" if labelled else "columns are for"
        allowed = " or ".join(repr(name) for name, other in FORMATS.items() if other.named_columns)
        raise ValueError(f"{what} format {allowed}, got format {format!r}")
    kinds = ("pv",) if behaviours is None else behaviours
    bad, roles = BadLines(max_bad_lines), Columns.of(columns)
    how = Reading(bad, roles, labelled, chunk_rows, delimiter, kinds, time_format, time_unit, missing)
    how.log(Roles(), lambda: iter(()), 0)  # options that no log can have are errors before any file is opened
    if table:
        return _table(_tables.opened(sources, chunk_rows), how)
    return entry.read(find(sources, entry.endings, _remedy()), how)


def _remedy() -> str:
    """The end of errors that a wrong format is a likely cause of."""
    return f"if it is of another format, name that with format= (--format): {', '.join(FORMATS)}"


def _roles(paths: list[Path], headers: list[list[str]], how: Reading) -> list[Roles]:
    """The roles of every file's columns; all files have the same."""
    every = [
        how.columns.resolve(names, how.labelled, str(path), list(partition(path)))
        for path, names in zip(paths, headers, strict=True)
    ]
    for path, found in zip(paths, every, strict=True):
        odd = every[0].standard().keys() ^ found.standard().keys()
        if odd:  # category columns that were found, and not asked for
            raise ValueError(
                f"all files must have the same fields, but only one of {paths[0]} and {path} has {', '.join(odd)}: "
                "leave the field out (item_fields=[]) or give every file the column"
            )
    return every


def _given(batch: pa.RecordBatch, wanted: Mapping[str, str], path: Path) -> dict[str, pa.Array]:
    """The columns of a batch by standard name; those that the file's folders give are the same in every row."""
    folders, names = partition(path), set(batch.schema.names)
    return {
        name: batch.column(column)
        if column in names
        else pa.array([folders[column]], pa.string()).take(pa.array([0] * batch.num_rows, pa.int64()))
        for name, column in wanted.items()
    }


def _decide(log: Log, roles: list[Roles], types: list[Mapping[str, pa.DataType]]) -> None:
    """Decide for the whole log which columns of ids are text, and which item fields are lists."""
    for name in ("user", "item", *log.item_fields, *log.user_fields, *log.behaviour_fields):
        kinds = [
            given.get(found.standard()[name], pa.string())  # the columns that folders give are text
            for found, given in zip(roles, types, strict=True)
        ]
        log.as_text[name] = _kinds.ids_are_text(kinds)
        if name in log.item_fields and any(map(_kinds.is_several, kinds)) and name not in log.several:
            log.several += (name,)


def _table(table: _tables.Opened, how: Reading) -> Log:
    roles = how.columns.resolve(table.schema.names, how.labelled, "the table")
    wanted = roles.standard()

    def read() -> Iterator[pa.RecordBatch]:
        first = 1
        for batch in table.batches():
            given = {name: batch.column(column) for name, column in wanted.items()}
            yield log.standardise(given, "table", first.__add__)
            first += batch.num_rows
            log.advance(batch.num_rows)

    log = how.log(roles, read, table.rows)
    _decide(log, [roles], [dict(zip(table.schema.names, table.schema.types, strict=True))])
    return log


def _parquet(paths: list[Path], how: Reading) -> Log:
    def opened(path: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}; {_remedy()}") from error

    headers, filled = [], []
    for path in paths:
        with opened(path) as file:
            headers.append(file.schema_arrow)
            filled.append(file.metadata.num_rows > 0)
    every = _roles(paths, [schema.names for schema in headers], how)

    def read() -> Iterator[pa.RecordBatch]:
        for path, found in zip(paths, every, strict=True):
            wanted, row, size, done = found.standard(), 0, path.stat().st_size, 0
            with opened(path) as file:
                rows, names = file.metadata.num_rows, file.schema_arrow.names
                columns = sorted(set(wanted.values()) & set(names))
                for batch in file.iter_batches(how.chunk_rows, columns=columns):
                    yield log.standardise(_given(batch, wanted, path), path, (row + 1).__add__)
                    row += batch.num_rows
                    log.advance(size * row // rows - done)
                    done = size * row // rows

    log = how.log(every[0], read, size_of(paths))
    types = [dict(zip(schema.names, schema.types, strict=True)) for schema in headers]
    some = [place for place, rows in enumerate(filled) if rows]  # parts without rows may have any types
    _decide(log, [every[place] for place in some], [types[place] for place in some])
    return log


def _csv(paths: list[Path], how: Reading) -> Log:
    headers = [csv_header(path, how.delimiter) for path in paths]
    every = _roles(paths, [[name.strip() for name in names] for names in headers], how)

    def read() -> Iterator[pa.RecordBatch]:
        for path, found, header in zip(paths, every, headers, strict=True):
            written = {name.strip(): name for name in header}
            wanted = {name: written.get(column, column) for name, column in found.standard().items()}
            columns = sorted(set(wanted.values()) & set(header))
            for batch, line_of in csv_batches(log, path, columns, how.delimiter):
                yield log.standardise(_given(batch, wanted, path), path, line_of)

    log = how.log(every[0], read, size_of(paths))
    return log


FORMATS: dict[str, Format] = {
    "parquet": Format((".parquet", ".pq"), _parquet, named_columns=True, takes=_NAMED),
    "csv": Format(packed(".csv", ".tsv"), _csv, named_columns=True, takes=("delimiter", *_NAMED)),
    "amazon": Format(packed(".json", ".jsonl"), lambda paths, how: formats.amazon(paths, how.bad)),
    "taobao": Format(
        packed(".csv"), lambda paths, how: formats.taobao(paths, how.behaviours, how.bad), takes=("behaviours",)
    ),
    "movielens": Format(packed(".csv", ".dat", ".data", ".item"), lambda paths, how: formats.movielens(paths, how.bad)),
}
"""Every log format by its name: docs/add-a-log-format.md. Where two have an ending, the first is guessed from it."""
