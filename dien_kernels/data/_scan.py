"""The first pass of ``prepare``: reads the log once, gives every value a number, counts the values, and stores the
rows as numbers in a temporary file."""

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
    """Rows in a temporary file, written and read in chunks."""

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

    def read_all(self) -> Rows:
        chunks = list(self.chunks())
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]} if chunks else {}


def grown(array: Array, size: int, fill: int) -> Array:
    """The array with at least ``size`` entries. Its size is at least doubled, so that repeated calls cost little."""
    if size <= array.size:
        return array
    longer = np.full(max(size, 2 * array.size), fill, array.dtype)
    longer[: array.size] = array
    return longer


@dataclass
class Scan:
    """What the first pass has found. Arrays are indexed by a value's code: values are numbered as they first appear.

    Attributes:
        spill: the rows: user, item, timestamp, label, user fields (codes, int32), dense columns.
        coders: for ``user``, ``item``, every item field and every user field.
        user_rows: int64, the number of rows of each user; ``user_clicks`` counts only rows with the label 1, or all
            rows where there are no labels.
        user_last: the latest timestamp of each user.
        item_counts: int64, rows of each item.
        user_field_counts: for each field, the number of rows of each value; rows without a value are counted in
            ``report``.
        item_field_codes: for each field, int64: the code of each item's value, -1 where the log gives none.
    """

    spill: Spill
    coders: dict[str, Coder]
    user_rows: Array
    user_clicks: Array
    user_last: Array
    item_counts: Array
    user_field_counts: dict[str, Array]
    item_field_codes: dict[str, Array]
    rows: int = 0
    report: Counter[str] = field(default_factory=Counter)


def scan(log: Log, folder: Path, chunk_rows: int) -> Scan:
    """Read the log once. Memory holds one chunk, and a few numbers for each user, each item and each field value."""
    names = ("user", "item", *log.item_fields, *log.user_fields)
    empty = np.zeros(0, np.int64)
    scanned = Scan(
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
            _add(scanned, log, batch.slice(start, chunk_rows))
    scanned.spill.close()
    users, items = len(scanned.coders["user"]), len(scanned.coders["item"])
    for name in ("user_rows", "user_clicks", "user_last"):
        setattr(scanned, name, getattr(scanned, name)[:users])
    scanned.item_counts = scanned.item_counts[:items]
    for name in log.item_fields:
        scanned.item_field_codes[name] = scanned.item_field_codes[name][:items]
    for name in log.user_fields:
        scanned.user_field_counts[name] = scanned.user_field_counts[name][: len(scanned.coders[name])]
    return scanned


def _add(scanned: Scan, log: Log, batch: pa.RecordBatch) -> None:
    codes = {name: coder.codes(batch.column(name)) for name, coder in scanned.coders.items()}
    user, item = codes["user"], codes["item"]
    time = batch.column("timestamp").to_numpy(zero_copy_only=False)
    users, items = len(scanned.coders["user"]), len(scanned.coders["item"])
    rows: Rows = {"user": user.astype(np.int32), "item": item.astype(np.int32), "timestamp": time}
    clicked = np.ones(len(user), bool)
    if log.labelled:
        rows["label"] = batch.column("label").to_numpy(zero_copy_only=False)
        clicked = rows["label"] == 1

    if scanned.user_last.dtype != time.dtype:
        if scanned.rows:
            raise ValueError("the timestamps of all sources must be integers (or dates), or all floats; got both")
        scanned.user_last = scanned.user_last.astype(time.dtype)
    scanned.user_rows = _count(scanned.user_rows, user, users)
    scanned.user_clicks = _count(scanned.user_clicks, user[clicked], users)
    lowest = np.iinfo(np.int64).min if time.dtype == np.int64 else -np.inf
    scanned.user_last = grown(scanned.user_last, users, lowest)  # type: ignore[arg-type]
    np.maximum.at(scanned.user_last, user, time)
    scanned.item_counts = _count(scanned.item_counts, item, items)

    for name in log.item_fields:
        code = codes[name]
        given = np.flatnonzero(code >= 0)
        table = scanned.item_field_codes[name] = grown(scanned.item_field_codes[name], items, -1)
        first_items, first = np.unique(item[given], return_index=True)
        new = table[first_items] < 0
        table[first_items[new]] = code[given][first][new]
        scanned.report[f"conflicts:{name}"] += int((table[item[given]] != code[given]).sum())
    for name in log.user_fields:
        code = codes[name]
        rows[name] = code.astype(np.int32)
        counts = _count(scanned.user_field_counts[name], code[code >= 0], len(scanned.coders[name]))
        scanned.user_field_counts[name] = counts
        scanned.report[f"missing:{name}"] += int((code < 0).sum())
    for name in log.dense:
        rows[name] = batch.column(name).to_numpy(zero_copy_only=False)
    scanned.spill.append(rows)
    scanned.rows += batch.num_rows


def _count(counts: Array, codes: Array, size: int) -> Array:
    counts = grown(counts, size, 0)
    fresh = np.bincount(codes)
    counts[: fresh.size] += fresh
    return counts
