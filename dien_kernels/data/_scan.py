"""The first pass of ``prepare``: read the log once, number and count values, spill rows as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from dien_kernels.data._arrow import Array
from dien_kernels.data.log import Log
from dien_kernels.data.vocabulary import Coder

Rows = dict[str, Array]  # columns of one chunk
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


class Spill:
    """Rows on disk, written and read in chunks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: pa.RecordBatchStreamWriter | None = None

    def append(self, rows: Mapping[str, Array]) -> None:
        batch = pa.record_batch([pa.array(column) for column in rows.values()], names=list(rows))
        if self._writer is None:
            self._file = pa.OSFile(str(self.path), "wb")
            self._writer = pa.ipc.new_stream(self._file, batch.schema, options=_OPTIONS)
        self._writer.write_batch(batch)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer = None

    def chunks(self) -> Iterator[Rows]:
        if not self.path.exists():
            return
        with pa.OSFile(str(self.path), "rb") as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield {
                    name: column.to_numpy(zero_copy_only=False)
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }

    def whole(self) -> Rows:
        chunks = list(self.chunks())
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]} if chunks else {}


def grown(array: Array, size: int, fill: int) -> Array:
    """The array with at least ``size`` entries, in steps that double so that growing costs little."""
    if size <= array.size:
        return array
    longer = np.full(max(size, 2 * array.size), fill, array.dtype)
    longer[: array.size] = array
    return longer


@dataclass
class Scan:
    """What the first pass knows. Arrays are by code, the number of a value by first appearance.

    Attributes:
        spill: the rows: user, item, timestamp, label, user fields (codes, int32), dense columns.
        coders: for ``user``, ``item``, every item field and every user field.
        user_rows: int64, rows of each user; ``user_clicks`` only those labelled 1 (the same without labels).
        user_last: the latest timestamp of each user.
        item_counts: int64, rows of each item.
        user_field_counts: by field, the rows of each value; nulls are counted in ``report``.
        item_field_of: by field, int64: the code of each item's value, -1 where none was given.
    """

    spill: Spill
    coders: dict[str, Coder]
    user_rows: Array
    user_clicks: Array
    user_last: Array
    item_counts: Array
    user_field_counts: dict[str, Array]
    item_field_of: dict[str, Array]
    rows: int = 0
    report: Counter[str] = field(default_factory=Counter)


def scan(log: Log, folder: Path, chunk_rows: int) -> Scan:
    """Read the log once. Memory: a chunk, and what is said of every user, item and value of a field."""
    names = ("user", "item", *log.item_fields, *log.user_fields)
    empty = np.zeros(0, np.int64)
    found = Scan(
        Spill(folder / "rows.arrow"),
        {name: Coder(name) for name in names},
        empty,
        empty,
        empty,
        empty,
        dict.fromkeys(log.user_fields, empty),
        dict.fromkeys(log.item_fields, empty),
    )
    for batch in log.read():
        for start in range(0, batch.num_rows, chunk_rows):
            _add(found, log, batch.slice(start, chunk_rows))
    found.spill.close()
    users, items = len(found.coders["user"]), len(found.coders["item"])
    for name in ("user_rows", "user_clicks", "user_last"):
        setattr(found, name, getattr(found, name)[:users])
    found.item_counts = found.item_counts[:items]
    for name in log.item_fields:
        found.item_field_of[name] = found.item_field_of[name][:items]
    for name in log.user_fields:
        found.user_field_counts[name] = found.user_field_counts[name][: len(found.coders[name])]
    return found


def _add(found: Scan, log: Log, batch: pa.RecordBatch) -> None:
    codes = {name: coder.codes(batch.column(name)) for name, coder in found.coders.items()}
    user, item = codes["user"], codes["item"]
    time = batch.column("timestamp").to_numpy(zero_copy_only=False)
    users, items = len(found.coders["user"]), len(found.coders["item"])
    rows: Rows = {"user": user.astype(np.int32), "item": item.astype(np.int32), "timestamp": time}
    clicked = np.ones(len(user), bool)
    if log.labelled:
        rows["label"] = batch.column("label").to_numpy(zero_copy_only=False)
        clicked = rows["label"] == 1

    if found.user_last.dtype != time.dtype:
        if found.rows:
            raise ValueError("the timestamps of all sources must be integers (or dates), or all floats; got both")
        found.user_last = found.user_last.astype(time.dtype)
    found.user_rows = _count(found.user_rows, user, users)
    found.user_clicks = _count(found.user_clicks, user[clicked], users)
    lowest = np.iinfo(np.int64).min if time.dtype == np.int64 else -np.inf
    found.user_last = grown(found.user_last, users, lowest)  # type: ignore[arg-type]
    np.maximum.at(found.user_last, user, time)
    found.item_counts = _count(found.item_counts, item, items)

    for name in log.item_fields:
        code = codes[name]
        given = np.flatnonzero(code >= 0)
        table = found.item_field_of[name] = grown(found.item_field_of[name], items, -1)
        first_items, first = np.unique(item[given], return_index=True)
        new = table[first_items] < 0
        table[first_items[new]] = code[given][first][new]
        found.report[f"conflicts:{name}"] += int((table[item[given]] != code[given]).sum())
    for name in log.user_fields:
        code = codes[name]
        rows[name] = code.astype(np.int32)
        counts = _count(found.user_field_counts[name], code[code >= 0], len(found.coders[name]))
        found.user_field_counts[name] = counts
        found.report[f"missing:{name}"] += int((code < 0).sum())
    for name in log.dense:
        rows[name] = batch.column(name).to_numpy(zero_copy_only=False)
    found.spill.append(rows)
    found.rows += batch.num_rows


def _count(counts: Array, codes: Array, size: int) -> Array:
    counts = grown(counts, size, 0)
    fresh = np.bincount(codes)
    counts[: fresh.size] += fresh
    return counts
