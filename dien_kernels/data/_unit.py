"""``Unit``: one row group of a shard as flat arrays, with the samples of its users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dien_kernels.batch import Schema
from dien_kernels.data._arrow import Array, count_before
from dien_kernels.data._parquet import Damaged, lists_of, numbers_of, read_group, reading
from dien_kernels.data.folder import SPLITS, behaviour_column, dense_column, shard_schema, user_column


class UnitInfo(NamedTuple):
    """What ``meta.json`` says of a unit: its file and row group, what is in it, and with which ``append`` it came.

    Generation 0 came with ``prepare``.
    """

    shard: str
    group: int
    first_user: int
    users: int
    behaviours: int
    samples: dict[str, int]
    digest: Sequence[Any] | None = None
    generation: int = 0


@dataclass
class Behaviours:
    """One sequence of each of the U users of a unit, E behaviours in all, the oldest of a user first.

    Attributes:
        offsets: int64 [U + 1]: user u's behaviours are offsets[u] to offsets[u + 1] - 1.
        item: int32 [E], item ids.
        time: int64 or float64 [E].
        fields: name to int32 [E].
        numbers: name to float32 [E]; NaN: missing.
    """

    offsets: Array
    item: Array
    time: Array
    fields: dict[str, Array] = field(default_factory=dict)
    numbers: dict[str, Array] = field(default_factory=dict)


class Samples(NamedTuple):
    """The S samples of a split in a unit.

    Attributes:
        user: int32 [S], the user's place in the unit.
        end: int32 [S]: the history is the unit's behaviours offsets[user] to end - 1.
        row: int32 [S]: the place in ``Unit.row_item`` and the other arrays of rows.
    """

    user: Array
    end: Array
    row: Array


class Unit:
    """One row group: U users with E behaviours and R rows that may be targets.

    With next-behaviour labels the rows are the behaviours; with given labels they are the impressions.

    Attributes:
        info: what ``meta.json`` says of it.
        user_numbers: int64 [U], the numbers of its users.
        behaviours: the behaviours, ``Behaviours``; ``offsets``, ``item`` and ``time`` are its arrays.
        sequences: the further sequences, name to ``Behaviours``.
        row_item: int32 [R]. row_time: int64 or float64 [R].
        row_label: int8 [R], or None for next-behaviour labels.
        row_users: user field to int32 [R]. row_dense: name to float32 [R]; NaN: missing.

    Raises ``ValueError`` naming file, row group and column where something is not as the format says.
    """

    def __init__(self, folder: Path, info: UnitInfo, schema: Schema, labels: str, times: bool = True) -> None:
        self.folder, self.info, self.schema, self.labels = folder, info, schema, labels
        self.user_numbers = np.arange(info.first_user, info.first_user + info.users)
        with reading(folder, info.shard):
            columns = [name for name in shard_schema(schema, labels, pa.int64(), pa.int64()).names if name != "user"]
            if not times:
                columns = [name for name in columns if name not in _times_of(schema)]
            try:
                table = read_group(folder / info.shard, info.group, columns, info.digest)
                self._take(table)
            except Damaged:
                raise
            except ValueError as error:
                raise Damaged(folder, f"{info.shard}, row group {info.group}: {error}") from error
            trouble = next(self.faults(), None)
        if trouble is not None:
            raise Damaged(folder, f"{info.shard}, row group {info.group}: {trouble}")

    def _take(self, table: pa.Table) -> None:
        if table.num_rows != self.info.users:
            raise ValueError(f"there must be {self.info.users} users, got {table.num_rows}")
        self._table, self._time_type = table, _time_type(table)
        self.behaviours = self._behaviours(None)
        self.sequences = {name: self._behaviours(name) for name in self.schema.sequences}
        offsets, item, time = self.behaviours.offsets, self.behaviours.item, self.behaviours.time
        self.offsets, self.item, self.time = offsets, item, time
        self.row_offsets, self.row_item, self.row_time, self.row_label = offsets, item, time, None
        if self.labels == "next":
            self._from, self._to = (numbers_of(table, name, pa.int32()) for name in ("train_from", "train_to"))
            self._held = numbers_of(table, "held", pa.int8())
        else:
            self.row_offsets, self.row_item = lists_of(table, "target", pa.int32())
            has_times = "target_time" in table.column_names
            self.row_time = self._aligned("target_time", self._time_type) if has_times else self.row_item[:0]
            self.row_label = self._aligned("label", pa.int8())
            self._end, self._split = self._aligned("end", pa.int32()), self._aligned("target_split", pa.int8())
        self.row_users = {name: self._aligned(user_column(name), pa.int32()) for name in self.schema.users}
        self.row_dense = {name: self._aligned(dense_column(name), pa.float32()) for name in self.schema.dense}
        del self._table

    def _behaviours(self, sequence: str | None) -> Behaviours:
        before = "" if sequence is None else f"{sequence}."
        offsets, item = lists_of(self._table, before + "item", pa.int32())

        def aligned(name: str, dtype: pa.DataType) -> Array:
            return self._aligned(name, dtype, offsets)

        time = aligned(before + "time", self._time_type) if before + "time" in self._table.column_names else item[:0]
        fields = {name: aligned(behaviour_column(name, sequence), pa.int32()) for name in self.schema.behaviours}
        numbers = {
            name: aligned(behaviour_column(name, sequence), pa.float32()) for name in self.schema.behaviour_dense
        }
        return Behaviours(offsets, item, time, fields, numbers)

    def _aligned(self, name: str, dtype: pa.DataType, offsets: Array | None = None) -> Array:
        """A column whose lists are as long as those of the rows, or as ``offsets`` says."""
        found, values = lists_of(self._table, name, dtype)
        wanted = self.row_offsets if offsets is None else offsets
        if not np.array_equal(found, wanted):
            user = int(np.flatnonzero(np.diff(found) != np.diff(wanted))[0])
            raise ValueError(
                f"column {name!r} must have {wanted[user + 1] - wanted[user]} values for row {user}, "
                f"got {found[user + 1] - found[user]}"
            )
        return values

    def faults(self) -> Iterator[str]:
        """What is not as the format and ``meta.json`` say: one line each, naming the column."""
        if self.item.size != self.info.behaviours:
            yield f"column 'item' must have {self.info.behaviours} behaviours, got {self.item.size}"
        for name, sequence in (("", self.behaviours), *((f"{key}.", value) for key, value in self.sequences.items())):
            yield from _outside(f"{name}item", sequence.item, next(iter(self.schema.items.values())))
            for key, ids in sequence.fields.items():
                yield from _outside(f"{name}behaviour.{key}", ids, self.schema.behaviours[key])
        for key, ids in self.row_users.items():
            yield from _outside(user_column(key), ids, self.schema.users[key])
        wrong = False
        for text in self._wrong_rows():
            wrong = True
            yield text
        if wrong:
            return  # the samples cannot be counted
        for split in SPLITS:
            counted = self.count(split)
            if counted != self.info.samples[split]:
                yield f"there must be {self.info.samples[split]} samples of {split!r}, got {counted}"

    def _wrong_rows(self) -> Iterator[str]:
        length = np.diff(self.offsets)
        if self.labels == "next":
            bad = (
                (self._from < 0) | (self._from > self._to) | (self._to > length) | ((self._from == 0) & (self._to > 0))
            )
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                yield (
                    f"columns 'train_from' and 'train_to' must lie between 1 and the {length[row]} behaviours of row "
                    f"{row}, got {self._from[row]} and {self._to[row]}"
                )
            yield from _outside("held", self._held, 3)
            if ((self._held > 0) & (length < 2)).any():
                row = int(np.flatnonzero((self._held > 0) & (length < 2))[0])
                yield f"column 'held' must be 0 in row {row}, which has {length[row]} behaviours, got {self._held[row]}"
            return
        yield from _outside("target", self.row_item, next(iter(self.schema.items.values())))
        yield from _outside("label", self.row_label if self.row_label is not None else length[:0], 2)
        yield from _outside("target_split", self._split, 3)
        most = np.repeat(length, np.diff(self.row_offsets))
        bad = (self._end < 0) | (self._end > most)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            yield f"column 'end' must lie between 0 and {most[row]}, the behaviours of the user, got {self._end[row]}"

    def faults_of_times(self) -> Iterator[str]:
        """What is wrong with the times: a line for each column whose lists do not ascend or do not fit the others."""
        columns = {"time": (self.offsets, self.time)}
        columns |= {f"{key}.time": (value.offsets, value.time) for key, value in self.sequences.items()}
        if self.labels == "given":
            columns["target_time"] = (self.row_offsets, self.row_time)
        for name, (offsets, time) in columns.items():
            if time.dtype.kind == "f" and not np.isfinite(time).all():
                yield f"column {name!r} must be finite"
                continue
            back = time[1:] < time[:-1]
            back[offsets[(offsets > 0) & (offsets < time.size)] - 1] = False
            if back.any():
                place = int(np.flatnonzero(back)[0])
                row = int(np.searchsorted(offsets, place, side="right")) - 1
                yield f"column {name!r} must ascend in row {row}, got {time[place]} before {time[place + 1]}"
                return
        if self.labels == "given":
            user = np.repeat(np.arange(self.info.users), np.diff(self.row_offsets))
            wanted = count_before(self.offsets, self.time, user, self.row_time) - self.offsets[user]
            if not np.array_equal(wanted, self._end):
                row = int(np.flatnonzero(wanted != self._end)[0])
                yield (
                    f"column 'end' must be {wanted[row]} for target {row - self.row_offsets[user[row]]} of row "
                    f"{user[row]}, the behaviours before its time, got {self._end[row]}"
                )

    def count(self, split: str) -> int:
        """The number of samples of a split."""
        if self.labels == "given":
            return int((self._split == SPLITS.index(split)).sum())
        if split == "train":
            return int((self._to.astype(np.int64) - self._from).sum())
        return int((self._held == SPLITS.index(split)).sum())

    def samples(self, split: str) -> Samples:
        """The samples of a split, by user and place."""
        number = SPLITS.index(split)
        if self.labels == "given":
            row = np.flatnonzero(self._split == number).astype(np.int32)
            user = np.repeat(np.arange(self.info.users, dtype=np.int32), np.diff(self.row_offsets))[row]
            return Samples(user, (self.offsets[user] + self._end[row]).astype(np.int32), row)
        if number:
            user = np.flatnonzero(self._held == number).astype(np.int32)
            end = (self.offsets[user + 1] - 1).astype(np.int32)
            return Samples(user, end, end)
        count = self._to - self._from
        user = np.repeat(np.arange(count.size, dtype=np.int32), count)
        skipped = self.offsets[:-1] + self._to - np.cumsum(count)
        end = (np.arange(user.size) + skipped[user]).astype(np.int32)
        return Samples(user, end, end)

    def repeated(self, samples: Samples) -> Array:
        """bool [S]: whether the history of a sample has its target already; "unknown" is no repetition."""
        size = next(iter(self.schema.items.values()))
        keys = np.repeat(np.arange(self.info.users) * size, np.diff(self.offsets)) + self.item
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        target = self.row_item[samples.row]
        place = np.searchsorted(ordered, samples.user.astype(np.int64) * size + target)
        place = np.minimum(place, max(keys.size - 1, 0))
        if not keys.size:
            return np.zeros(target.size, bool)
        found = ordered[place] == samples.user.astype(np.int64) * size + target
        answer: Array = found & (order[place] < samples.end) & (target > 0)
        return answer


def joined(units: Sequence[Unit]) -> Unit:
    """The users of several units, one unit after another, as one unit; its ``info`` is that of the first but for the
    counts."""
    if len(units) == 1:
        return units[0]
    whole, first = object.__new__(Unit), units[0]
    samples = {split: sum(unit.info.samples[split] for unit in units) for split in SPLITS}
    users, behaviours = sum(unit.info.users for unit in units), sum(unit.info.behaviours for unit in units)
    whole.info = first.info._replace(users=users, behaviours=behaviours, samples=samples)
    whole.folder, whole.schema, whole.labels = first.folder, first.schema, first.labels
    whole.user_numbers = np.concatenate([unit.user_numbers for unit in units])
    whole.behaviours = _joined_behaviours([unit.behaviours for unit in units])
    whole.sequences = {name: _joined_behaviours([unit.sequences[name] for unit in units]) for name in first.sequences}
    whole.offsets, whole.item, whole.time = whole.behaviours.offsets, whole.behaviours.item, whole.behaviours.time
    if first.labels == "next":
        whole.row_offsets, whole.row_item, whole.row_time = whole.offsets, whole.item, whole.time
        names: tuple[str, ...] = ("_from", "_to", "_held")
        whole.row_label = None
    else:
        whole.row_offsets = _joined_offsets([unit.row_offsets for unit in units])
        names = ("row_item", "row_time", "row_label", "_end", "_split")
    for name in names:
        setattr(whole, name, np.concatenate([getattr(unit, name) for unit in units]))
    whole.row_users = _joined_values([unit.row_users for unit in units])
    whole.row_dense = _joined_values([unit.row_dense for unit in units])
    return whole


def _joined_offsets(offsets: Sequence[Array]) -> Array:
    ends = np.cumsum([0, *(each[-1] for each in offsets)])
    return np.concatenate([offsets[0], *(each[1:] + end for each, end in zip(offsets[1:], ends[1:], strict=False))])


def _joined_values(values: Sequence[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([each[name] for each in values]) for name in values[0]}


def _joined_behaviours(parts: Sequence[Behaviours]) -> Behaviours:
    return Behaviours(
        _joined_offsets([part.offsets for part in parts]),
        np.concatenate([part.item for part in parts]),
        np.concatenate([part.time for part in parts]),
        _joined_values([part.fields for part in parts]),
        _joined_values([part.numbers for part in parts]),
    )


def _time_type(table: pa.Table) -> pa.DataType:
    """int64 or float64, whichever the times of the behaviours are."""
    dtype = table["time"].type if "time" in table.column_names else pa.list_(pa.int64())
    if getattr(dtype, "value_type", None) not in (pa.int64(), pa.float64()):
        raise ValueError(f"column 'time' must be lists of int64 or double, got {dtype}")
    return dtype.value_type


def _outside(name: str, ids: Array, size: int) -> Iterator[str]:
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        yield f"column {name!r} must lie between 0 and {size - 1}, got values from {ids.min()} to {ids.max()}"


def _times_of(schema: Schema) -> set[str]:
    """The columns of a shard that hold times."""
    return {"time", "target_time", *(f"{sequence}.time" for sequence in schema.sequences)}
