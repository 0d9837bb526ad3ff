"""Files of requests and scores: Parquet or JSON lines in, the same out, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dien_kernels.serving._columns import CANDIDATES, SCORES, check_names

LINES, PARQUET = ".jsonl", ".parquet"
PART = ".dien-score-", ".part"  # the name of a file that is being written, around a number
_ROWS = 1 << 16  # candidates that are read at a time
_REQUESTS = 1024


@dataclass
class Batch:
    """Some requests: the columns that are scored, and the whole lines as Python values where they were JSON."""

    table: pa.Table
    lines: list[dict[str, Any]] | None = None


class ParquetRequests:
    """A Parquet file of requests."""

    kind = PARQUET

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
        self.path, self.schema = path, self._file.schema_arrow
        if SCORES in self.schema.names:
            raise ValueError(f"the requests have a column {SCORES!r} already")
        check_names(self.schema.names, names)

    def __enter__(self) -> ParquetRequests:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def batches(self) -> Iterator[Batch]:
        """The requests in their order, so many at a time as have about 2^16 candidates, at most 1024."""
        for group in range(self._file.metadata.num_row_groups):
            size = max(1, min(_REQUESTS, _ROWS // max(1, self._most(group))))
            try:
                for batch in self._file.iter_batches(size, row_groups=[group]):
                    yield Batch(pa.Table.from_batches([batch]))
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{self.path} is damaged: {error}") from error

    def _most(self, group: int) -> int:
        """Candidates of a request of a row group, on average."""
        found = self._file.metadata.row_group(group)
        columns = [found.column(i) for i in range(found.num_columns)]
        values = sum(c.num_values for c in columns if c.path_in_schema.split(".")[0] == CANDIDATES)
        return int(values) // max(1, int(found.num_rows))


class LineRequests:
    """A file of JSON lines: every line that is not blank is an object, one request."""

    kind = LINES

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        self.path, self._names = path, names

    def __enter__(self) -> LineRequests:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self) -> Iterator[Batch]:
        """As ``ParquetRequests.batches``."""
        for lines, where in self._parsed():
            yield Batch(table_of(lines, list(self._names), where), lines)

    def arrow_schema(self) -> pa.Schema:
        """The types that hold the values of all lines; the file is read for it."""
        schemas: list[pa.Schema] = []
        for lines, where in self._parsed():
            names = list(dict.fromkeys(name for line in lines for name in line))
            schemas.append(table_of(lines, names, where).schema)
            try:
                schemas = [pa.unify_schemas(schemas, promote_options="permissive")]
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise ValueError(
                    f"{self.path} cannot be written as Parquet: {where} have other types than the lines before "
                    f"({error}); write JSON lines"
                ) from error
        return schemas[0] if schemas else pa.schema([])

    def _parsed(self) -> Iterator[tuple[list[dict[str, Any]], str]]:
        """Some lines, and where they are in words."""
        lines: list[dict[str, Any]] = []
        rows, first, number = 0, 1, 0
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                line = self._parse(text, number)
                count = len(line[CANDIDATES]) if isinstance(line[CANDIDATES], list) else 0
                if lines and (rows + count > _ROWS or len(lines) >= _REQUESTS):
                    yield lines, f"lines {first} to {number - 1} of {self.path}"
                    lines, rows, first = [], 0, number
                lines.append(line)
                rows += count
        if lines:
            yield lines, f"lines {first} to {number} of {self.path}"

    def _parse(self, text: bytes, number: int) -> dict[str, Any]:
        where = f"line {number} of {self.path}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{where} must be an object with {', '.join(self._names)}, got a {type(line).__name__}")
        if SCORES in line:
            raise ValueError(f"{where} has a column {SCORES!r} already")
        check_names(line, self._names, f"{where} has")
        return line


def open_requests(path: Path, names: Mapping[str, str]) -> ParquetRequests | LineRequests:
    """The requests of a file, by its ending. Raises ``ValueError`` where it cannot be read or a column is missing."""
    return (LineRequests if path.suffix.lower() == LINES else ParquetRequests)(path, names)


def table_of(lines: Sequence[Mapping[str, Any]], names: Sequence[str], where: str) -> pa.Table:
    """Columns of Python values. Raises ``ValueError`` naming the column in which types are mixed."""
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([line.get(name) for line in lines])
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise ValueError(f"the column {name!r} of {where} must have values of one type: {error}") from error
    return pa.table(columns)


def check_out(out: Path, requests: Path) -> None:
    """Raise ``ValueError`` or ``FileNotFoundError`` for an output that cannot be written."""
    if out.is_dir():
        raise ValueError(f"out must be a file to write, got the folder {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} for {out.name}")
    if out.exists():
        if os.path.samefile(out, requests):
            raise ValueError(f"out must be another file than the requests, got {out}")
        mode = out.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            raise ValueError(f"out must be a file, a FIFO or a character device, got {out}, which is none of them")


class Output:
    """What the scores are written to; as a context it is complete at the end, or not there after an error."""

    def __init__(self, out: Path, source: ParquetRequests | LineRequests) -> None:
        ending = out.suffix.lower()
        self._kind = ending if ending in (LINES, PARQUET) else source.kind
        self._out, self._source = out, source
        self._part: Path | None = None
        self._file: _Counted | None = None
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None

    def __enter__(self) -> Output:
        if self._kind == PARQUET:
            source = self._source
            self._schema = source.schema if isinstance(source, ParquetRequests) else source.arrow_schema()
        self._file = _Counted(self._open())
        if self._schema is not None:
            whole = self._schema.append(pa.field(SCORES, pa.large_list(pa.float32())))
            try:
                self._writer = pq.ParquetWriter(pa.PythonFile(self._file, "w"), whole)
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        return self

    def _open(self) -> IO[bytes]:
        if self._out.exists() and not self._out.is_file():
            return self._out.open("wb")  # nothing can be put in its place
        self._out = Path(os.path.realpath(self._out))  # what a link points to, not the link, is replaced
        remove_parts(self._out.parent)
        self._part, file = _open_part(self._out.parent)
        return file

    def write(self, batch: Batch, sizes: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """The requests with their ``scores``, of which request i has ``sizes[i]``."""
        ends = np.cumsum(sizes)
        if self._writer is not None:
            table = batch.table
            if batch.lines is not None:
                fields = [pa.array([line.get(f.name) for line in batch.lines], f.type) for f in self._schema or ()]
                table = pa.table(fields, schema=self._schema)
            offsets = pa.array(np.concatenate([[0], ends]), pa.int64())
            lists = pa.LargeListArray.from_arrays(offsets, pa.array(scores))
            self._writer.write_table(table.append_column(self._writer.schema.field(SCORES), lists))
            return
        file = cast(_Counted, self._file)  # a context has been entered
        lines = batch.table.to_pylist() if batch.lines is None else batch.lines
        for line, size, end in zip(lines, sizes.tolist(), ends.tolist(), strict=True):
            # The shortest digits that are the same float32.
            written = [float(str(score)) for score in scores[end - size : end]]
            text = json.dumps(line | {SCORES: written}, default=str, ensure_ascii=False)
            file.write(text.encode() + b"\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        file = cast(_Counted, self._file)
        try:
            file.broken = kind is not None  # what comes now is no part of a whole file
            if self._writer is not None:
                self._writer.close()
            if kind is None:
                file.flush()
                if self._part is not None:
                    os.fsync(file.file.fileno())
                    os.replace(self._part, self._out)
                    self._part = None
        finally:
            if self._part is not None:
                self._part.unlink(missing_ok=True)
            with suppress(BrokenPipeError):  # said already
                file.file.close()


class _Counted:
    """A file that is only written to, and knows how many bytes: Parquet asks, and a FIFO cannot tell."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self._written, self.closed, self.broken = file, 0, False, False

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._written += size
        return size if self.broken else self.file.write(data)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True  # the owner closes the file itself

    def writable(self) -> bool:
        return True


def _open_part(folder: Path) -> tuple[Path, IO[bytes]]:
    """A new file to write, locked as long as it is open: so others see that its process lives."""
    number = os.getpid()
    while True:
        path = folder / f"{PART[0]}{number}{PART[1]}"
        try:
            file = path.open("xb")
        except FileExistsError:
            number += 1 << 22  # above every process's number
            continue
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return path, file
        except FileNotFoundError:
            pass  # another run took it for one that was left behind, before it was locked
        file.close()


def remove_parts(folder: Path) -> None:
    """Remove the files that killed runs have left in a folder: those of our naming that no process has locked."""
    for path in folder.glob(f"{PART[0]}[0-9]*{PART[1]}"):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # gone already, or not ours
        with suppress(OSError), os.fdopen(file) as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its process lives
            if stat.S_ISREG(os.fstat(file).st_mode):
                path.unlink()
