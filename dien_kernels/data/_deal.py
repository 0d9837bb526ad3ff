"""The first pass of ``prepare``: reads the log once, deals its rows to buckets by the hash of the user, and counts.

Room card. Lives here: the temporary files of the rows, and the counts of items and field values. May import: numpy,
pyarrow, polars, ``log``, ``_hash``, ``vocabulary``. Must not be here: ids, samples, the prepared folder.

Nothing that is held in memory grows with the number of rows: a chunk of the log, and a number or two for each distinct
item and field value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from dien_kernels.data._arrow import Array
from dien_kernels.data._hash import hash64
from dien_kernels.data.log import Log
from dien_kernels.data.vocabulary import bucket_of

BUCKET_BITS = 6
BUCKETS = 1 << BUCKET_BITS
_LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")
_MERGE = 1 << 20  # so many partial counts are held in memory


class Buckets:
    """Rows in temporary files, one for each bucket of users; each file keeps the order of the log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[int, tuple[pa.OSFile, pa.RecordBatchStreamWriter]] = {}

    def append(self, batch: pa.RecordBatch, bucket: Array) -> None:
        """Deal the rows of a batch; ``bucket`` is uint8 [n]."""
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(BUCKETS + 1))
        dealt = batch.take(pa.array(order))
        for number in np.flatnonzero(np.diff(ends)).tolist():
            if number not in self._writers:
                file = pa.OSFile(str(self._path(number)), "wb")
                self._writers[number] = file, pa.ipc.new_stream(file, batch.schema, options=_LZ4)
            self._writers[number][1].write_batch(dealt.slice(ends[number], ends[number + 1] - ends[number]))

    def close(self) -> None:
        for file, writer in self._writers.values():
            writer.close()
            file.close()
        self._writers = {}

    def read(self, numbers: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table | None:
        """The rows of some buckets, one bucket after another; None where there is none."""
        tables = [self._read(number, columns) for number in numbers if self._path(number).exists()]
        return pa.concat_tables(tables) if tables else None

    def _read(self, number: int, columns: Sequence[str] | None) -> pa.Table:
        with pa.OSFile(str(self._path(number)), "rb") as file, pa.ipc.open_stream(file) as stream:
            wanted = stream.schema.names if columns is None else columns
            return pa.Table.from_batches([batch.select(wanted) for batch in stream])

    def remove(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"bucket-{number:02d}.arrow"


class Tally:
    """Counts of distinct keys, added up from the counts of one chunk after another.

    Many counts go to temporary files by the hash of the first key, so that they can be added up file by file.

    Args:
        keys: the columns that together are the key.
        sums: columns that are added up.
        least: columns of which the least value is kept.
        folder: where the files are; it is made when it is needed, and removed with them by ``total``.
    """

    def __init__(self, keys: Sequence[str], sums: Sequence[str], least: Sequence[str], folder: Path) -> None:
        self.keys, self.sums, self.least, self.folder = list(keys), list(sums), list(least), folder
        self._parts: list[pl.DataFrame] = []
        self._files: Buckets | None = None

    def add(self, part: pl.DataFrame) -> None:
        """``part`` has the columns of keys, sums and least; the first key has no nulls."""
        if self._files is not None:
            self._store(self._files, part)
            return
        self._parts.append(part)
        if sum(part.height for part in self._parts) >= _MERGE:
            self.folder.mkdir()
            self._files = Buckets(self.folder)
            for stored in self._parts:
                self._store(self._files, stored)
            self._parts = []

    @staticmethod
    def _store(files: Buckets, part: pl.DataFrame) -> None:
        for batch in part.to_arrow(compat_level=pl.CompatLevel.oldest()).to_batches():
            files.append(batch, (hash64(batch.column(0)) >> np.uint64(64 - BUCKET_BITS)).astype(np.uint8))

    def close(self) -> None:
        """Close the files; nothing can be added any more."""
        if self._files is not None:
            self._files.close()

    def total(self) -> pl.DataFrame | None:
        """One row for each distinct key; None where nothing was added."""
        if self._files is not None:
            self.close()
            for number in range(BUCKETS):
                table = self._files.read([number])
                if table is not None:
                    self._parts.append(self._sum(pl.DataFrame(table)))
                self._files.remove([number])
            self.folder.rmdir()
            self._files, self._parts = None, [pl.concat(self._parts)]
        elif len(self._parts) > 1:
            self._parts = [self._sum(pl.concat(self._parts))]
        return self._parts[0] if self._parts else None

    def _sum(self, counts: pl.DataFrame) -> pl.DataFrame:
        sums = [pl.col(name).sum() for name in self.sums]
        least = [pl.col(name).min() for name in self.least]
        return counts.group_by(self.keys).agg(*sums, *least)


@dataclass
class Dealt:
    """What the first pass has found.

    Attributes:
        buckets: the rows: user, item, timestamp, label, user fields, behaviour fields, numbers, sequence.
        items: one row for each item and combination of its item fields: ``rows`` and ``behaviours`` (those with the
            label 1, or all) of it, and ``first``, the number of its first row in the log.
        lists: for each item field with several values, the lists by item and first row.
        fields: for each user field and behaviour field, the rows of each of its values.
        missing: rows without a value, by field.
        rows, behaviours: of the whole log.
        schema: of the log's batches.
        text: for each field whose values fall into buckets, whether the raw ones are text.
    """

    buckets: Buckets
    items: Tally
    lists: dict[str, list[pl.DataFrame]]
    fields: dict[str, Tally]
    missing: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    behaviours: int = 0
    schema: pa.Schema | None = None
    text: dict[str, bool] = field(default_factory=dict)

    def close(self) -> None:
        """Close all files that are written to."""
        self.buckets.close()
        for tally in (self.items, *self.fields.values()):
            tally.close()


def row_columns(log: Log) -> list[str]:
    """The columns of a log that the rows in the buckets have; item fields are a property of the item."""
    names = ["user", "item", "timestamp", *["label"] * log.labelled, *log.user_fields, *log.dense]
    names += [*log.behaviour_fields, *log.behaviour_dense, *["sequence"] * bool(log.sequences)]
    return names


def deal(log: Log, folder: Path, chunk_rows: int, buckets: Mapping[str, int] | None = None) -> Dealt:
    """Read the log once and deal its rows to files in ``folder``.

    ``buckets``: fields whose values are replaced by the bucket that they fall into, of so many.
    """
    scalar = [name for name in log.item_fields if name not in log.several]
    dealt = Dealt(
        Buckets(folder),
        Tally(["item", *scalar], ["rows", "behaviours"], ["first"], folder / "items"),
        {name: [] for name in log.item_fields if name in log.several},
        tallies_of(log, folder),
    )
    try:
        for batch in log.read():
            for start in range(0, batch.num_rows, chunk_rows):
                part = _in_buckets(dealt, batch.slice(start, chunk_rows), buckets or {})
                _add(dealt, log, part, scalar)
    finally:
        dealt.close()
    return dealt


def tallies_of(log: Log, folder: Path) -> dict[str, Tally]:
    """The counts of the user fields and behaviour fields of a log."""
    names = (*log.user_fields, *log.behaviour_fields)
    return {name: Tally([name], ["rows"], [], folder / f"field-{number}") for number, name in enumerate(names)}


def _add(dealt: Dealt, log: Log, batch: pa.RecordBatch, scalar: list[str]) -> None:
    _same_types(dealt, batch)
    rows = batch.select(row_columns(log))
    dealt.buckets.append(rows, (hash64(batch.column("user")) >> np.uint64(64 - BUCKET_BITS)).astype(np.uint8))

    frame = pl.DataFrame(batch)
    clicked = pl.col("label") == 1 if log.labelled else pl.lit(True)
    if log.sequences:
        clicked &= pl.col("sequence") == 0
    frame = frame.with_row_index("first", dealt.rows).with_columns(clicked.alias("behaviours"))
    counts = [pl.len().cast(pl.Int64).alias("rows"), pl.col("behaviours").sum().cast(pl.Int64)]
    dealt.items.add(frame.group_by("item", *scalar).agg(*counts, pl.col("first").min().cast(pl.Int64)))
    for name, parts in dealt.lists.items():
        known = frame.filter(pl.col(name).list.len() > 0).select("item", "first", name)
        parts.append(known.unique("item", keep="first", maintain_order=True))
        if sum(part.height for part in parts) > max(_MERGE, 2 * parts[0].height):
            parts[:] = [pl.concat(parts).unique("item", keep="first", maintain_order=True)]
    for name, tally in dealt.fields.items():
        dealt.missing[name] += int(frame[name].null_count())
        known = frame.select(name).drop_nulls()
        tally.add(known.group_by(name).agg(pl.len().cast(pl.Int64).alias("rows")))
    dealt.rows += batch.num_rows
    dealt.behaviours += int(frame["behaviours"].sum())


def _in_buckets(dealt: Dealt, batch: pa.RecordBatch, buckets: Mapping[str, int]) -> pa.RecordBatch:
    """The batch with the buckets of the values of some fields; what the raw values are is kept in ``dealt.text``."""
    for name, count in buckets.items():
        column = batch.column(name)
        text = dealt.text.setdefault(name, not pa.types.is_integer(column.type))
        if text == pa.types.is_integer(column.type):
            raise ValueError(f"column {name!r} must have one type in all sources, got {column.type} later")
        batch = batch.set_column(batch.schema.get_field_index(name), name, bucket_of(column, count, text))
    return batch


def _same_types(dealt: Dealt, batch: pa.RecordBatch) -> None:
    """All batches have the types of the first one. Raises ``ValueError`` naming a column that changes its type."""
    if dealt.schema is None:
        dealt.schema = batch.schema
    for column in batch.schema:
        first = dealt.schema.field(column.name).type
        if column.type != first:
            raise ValueError(
                f"column {column.name!r} must have one type in all sources, got {first} first and {column.type} later"
            )


def read_shards(dealt: Dealt, shards: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table | None]:
    """The rows of one shard after another: a shard is a run of neighbouring buckets; their number is a power of two."""
    each = BUCKETS // shards
    for shard in range(shards):
        yield dealt.buckets.read(range(shard * each, (shard + 1) * each), columns)
