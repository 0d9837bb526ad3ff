"""The second pass of ``prepare``: sorts the rows of one shard after another and writes its users.

Room card. Lives here: ``ShardWriter`` and what it counts on the way. May import: numpy, pyarrow, polars, ``_deal``,
``_ids``, ``_samples``, ``_numbers``, ``folder``. Must not be here: the reading of logs, the meta file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array
from dien_kernels.data._ids import Ids
from dien_kernels.data._numbers import Numbers
from dien_kernels.data._samples import Rule, Users, last_times
from dien_kernels.data.folder import (
    GROUP_BEHAVIOURS,
    GROUP_USERS,
    PARQUET,
    SHARDS,
    SPLITS,
    behaviour_column,
    dense_column,
    shard_file,
    user_column,
)
from dien_kernels.data.log import Log

DUPLICATES = ("keep", "drop")


@dataclass
class Written:
    """What the second pass has counted.

    Attributes:
        shards: for ``meta["shards"]``.
        report: irregularities of the log.
        numbers: statistics of the training split, for each column of numbers.
        users, behaviours, samples: of all shards.
        longest: the most behaviours of a user.
    """

    numbers: dict[str, Numbers]
    shards: list[dict[str, Any]] = field(default_factory=list)
    report: Counter[str] = field(default_factory=Counter)
    users: int = 0
    behaviours: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    longest: int = 0


class ShardWriter:
    """Writes shards; the arguments are those of all shards.

    Args:
        folder: the folder that gets ``shards``.
        columns: the columns of a shard.
        log: which columns there are.
        ids: what the ids of the values are.
        rule: which behaviours are targets.
        duplicates: ``"drop"``: rows that say the same as an earlier one, user, item, time (and label), are left out.
    """

    def __init__(self, folder: Path, columns: pa.Schema, log: Log, ids: Ids, rule: Rule, *, duplicates: str) -> None:
        self.folder, self.columns, self.log, self.ids, self.rule = folder, columns, log, ids, rule
        self.given, self.duplicates = log.labelled, duplicates
        self.written = Written({name: Numbers() for name in (*log.dense, *log.behaviour_dense)})
        self.all_items = ids.vocabularies["item"].size - 1 + (ids.rare > 0)
        (folder / SHARDS).mkdir()

    def write(self, rows: pa.Table | None) -> None:
        """Sort the rows of the next shard and write it. A shard without users has no file and is not counted."""
        if rows is None:
            return
        sorted_rows = self._sort(rows)
        if sorted_rows.split.size == 0:
            return
        name = shard_file(len(self.written.shards))
        groups = self._columns(sorted_rows).write(self.folder / name, self.columns)
        for group in groups:
            self.written.users += group["users"]
            self.written.behaviours += group["behaviours"]
            self.written.samples.update(group["samples"])
        self.written.shards.append({"file": name, "groups": groups})

    def _sort(self, table: pa.Table) -> _Sorted:
        """Order the users by split and hash, and the rows of a user by time; rows of equal times stay as they are."""
        report = self.written.report
        users, time = Users.of(table["user"]), table["timestamp"].to_numpy()
        label = table["label"].to_numpy() if self.given else None
        sequence = table["sequence"].to_numpy() if self.log.sequences else None
        main: Array | slice = slice(None) if sequence is None else sequence == 0
        clicks = main if label is None else (label == 1) if sequence is None else (label == 1) & (sequence == 0)
        behaviours = np.bincount(users.codes[clicks], minlength=len(users.values))
        split = self._split_of_users(users, time, main)
        order_of_users = np.lexsort((users.hashes, np.maximum(split, 0)))
        place = np.empty(len(users.values), np.int32)
        place[order_of_users] = np.arange(place.size, dtype=np.int32)
        user = place[users.codes]
        order = np.argsort(user, kind="stable")
        back = (np.diff(user[order]) == 0) & (np.diff(time[order]) < 0)
        report["out_of_order"] += int(back.sum())
        if back.any():
            order = np.lexsort((time, user))
        item = self.ids.vocabularies["item"].encode(table["item"])[order].astype(np.int32)
        columns = {name: table[name] for name in table.column_names if name not in ("user", "item", "timestamp")}
        result = _Sorted(
            users.values.take(pa.array(order_of_users)), split[order_of_users], behaviours[order_of_users],
            user[order], item, time[order], order, columns,
        )  # fmt: skip
        self.written.longest = max(self.written.longest, int(behaviours.max(initial=0)))
        return self._without_duplicates(result)

    def _split_of_users(self, users: Users, time: Array, main: Array | slice) -> Array:
        """The split of each user's last behaviour, or of all the impressions of a split by user; -1: of none."""
        rows = np.bincount(users.codes[main], minlength=len(users.values))
        if self.rule.thresholds is not None:
            split = self.rule.of_users(users.hashes)
        elif self.given:
            return np.zeros(rows.size, np.int8)  # every impression by its own time
        else:
            split = self.rule.of_times(last_times(users, time, main))
        enough = rows >= (1 if self.given else 2)
        if not self.given:
            self.written.report["one_event_users"] += int((~enough).sum())
        return np.where(enough, split, -1).astype(np.int8)

    def _without_duplicates(self, rows: _Sorted) -> _Sorted:
        """Count rows that say the same as an earlier one, and leave them out where that is asked for."""
        same = (np.diff(rows.user) == 0) & (np.diff(rows.time) == 0)
        near = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
        if not near.size:
            return rows
        keys = {"user": rows.user[near], "time": rows.time[near], "item": rows.item[near]}
        for name in ("label", "sequence"):
            if name in rows.columns:
                keys[name] = rows.taken(name).to_numpy()[near]
        first = pl.DataFrame(keys).select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
        copies = near[~first & (rows.item[near] > 0)]
        self.written.report["duplicate_rows"] += copies.size
        if self.duplicates == "keep" or not copies.size:
            return rows
        return rows.without(copies, self.given)

    def _columns(self, rows: _Sorted) -> _Users:
        """The columns of the users of a shard, as flat arrays and offsets."""
        sequence = rows.taken("sequence").to_numpy() if self.log.sequences else None
        label = rows.taken("label").to_numpy() if self.given else None
        main = np.ones(rows.user.size, bool) if sequence is None else sequence == 0
        clicked = main if label is None else main & (label == 1)
        users = _Users(rows.values, rows.split.size)
        self._add_behaviours(users, None, rows, clicked)
        for number, name in enumerate(self.log.sequences[1:], start=1):
            assert sequence is not None
            self._add_behaviours(users, name, rows, sequence == number)
        user, item, offsets = rows.user[clicked], rows.item[clicked], users.offsets["item"]
        owns_all = self._owners_of_all(user, item, offsets)
        if label is None:
            upto = self._add_next(users, rows, clicked, owns_all)
        else:
            upto = self._add_given(users, rows, main, label[main])
        position = np.arange(user.size) - offsets[user]
        for name in self.log.behaviour_dense:
            self.written.numbers[name].add(users.lists[behaviour_column(name)][position < upto[user]])
        return users

    def _add_behaviours(self, users: _Users, sequence: str | None, rows: _Sorted, taken: Array) -> None:
        before = "" if sequence is None else f"{sequence}."
        users.add_list(f"{before}item", rows.user[taken], rows.item[taken])
        users.add_list(f"{before}time", rows.user[taken], rows.time[taken])
        fields = {behaviour_column(name, sequence): name for name in self.log.behaviour_fields}
        numbers = {behaviour_column(name, sequence): name for name in self.log.behaviour_dense}
        self._add_columns(users, fields, numbers, rows, taken)

    def _add_rows(self, users: _Users, rows: _Sorted, taken: Array) -> None:
        fields = {user_column(name): name for name in self.log.user_fields}
        self._add_columns(users, fields, {dense_column(name): name for name in self.log.dense}, rows, taken)

    def _add_columns(
        self, users: _Users, fields: Mapping[str, str], numbers: Mapping[str, str], rows: _Sorted, taken: Array
    ) -> None:
        """Lists of ids and of numbers; the mappings are from the columns of a shard to those of the log."""
        for column, name in fields.items():
            ids = self.ids.vocabularies[name].encode(rows.taken(name)).astype(np.int32)
            users.add_list(column, rows.user[taken], ids[taken])
        for column, name in numbers.items():
            values = rows.taken(name).to_numpy(zero_copy_only=False)
            users.add_list(column, rows.user[taken], values[taken])

    def _owners_of_all(self, user: Array, item: Array, offsets: Array) -> Array:
        """bool [users]: whether a user has every item, so that there is no negative for them."""
        owns = np.zeros(offsets.size - 1, bool)
        for number in np.flatnonzero(np.diff(offsets) >= self.all_items).tolist():
            owns[number] = np.unique(item[offsets[number] : offsets[number + 1]]).size >= self.all_items
        return owns

    def _add_next(self, users: _Users, rows: _Sorted, clicked: Array, owns_all: Array) -> Array:
        """The samples of next-behaviour prediction; returns the end of each user's training positions."""
        report, offsets, split = self.written.report, users.offsets["item"], rows.split
        count = np.diff(offsets)
        report["users_owning_every_item"] += int((owns_all & (split >= 0)).sum())
        usable = (split >= 0) & ~owns_all & (count >= 2)
        end = np.where(usable & (split == 0), count, 0)
        first = np.where(end > 0, 1 if self.rule.every else end - 1, 0)
        if self.rule.thresholds is None and self.rule.every:  # every behaviour before the time at which valid begins
            early = np.concatenate([[0], np.cumsum(rows.time[clicked] < self.rule.cuts[0])])
            end = np.where(split == 0, count, early[offsets[1:]] - early[offsets[:-1]])
            end = np.where(usable & (end > 1), end, 0)
            first = np.minimum(end, 1)
        held = np.where(usable & (split > 0), split, 0).astype(np.int8)
        users.add("train_from", first.astype(np.int32))
        users.add("train_to", end.astype(np.int32))
        users.add("held", held)
        users.samples = {
            "train": end - first,
            "valid": (held == 1).astype(np.int64),
            "test": (held == 2).astype(np.int64),
        }
        self._add_rows(users, rows, clicked)
        user, item = rows.user[clicked], rows.item[clicked]
        position = np.arange(user.size) - offsets[user]
        training = (position >= first[user]) & (position < end[user])
        target = training | ((held[user] > 0) & (position == count[user] - 1))
        key = user.astype(np.int64) * self.ids.vocabularies["item"].size + item
        repeated = ~pl.Series(key).is_first_distinct().to_numpy() & (item > 0)
        report["repeated_behaviours"] += int(repeated.sum())
        report["positives"] += int(target.sum())
        report["positives_in_history"] += int((target & repeated).sum())
        self._count_dense(users, training)
        return end

    def _add_given(self, users: _Users, rows: _Sorted, main: Array, label: Array) -> Array:
        """The samples of labelled impressions; returns how many behaviours of each user training reads."""
        report = self.written.report
        user, time, item = rows.user[main], rows.time[main], rows.item[main]
        clicks = np.cumsum(label, dtype=np.int64)
        starts = np.ones(user.size, bool)
        starts[1:] = (np.diff(user) != 0) | (np.diff(time) != 0)
        first = np.flatnonzero(starts)[np.cumsum(starts) - 1]  # of the rows of the same user and time
        before = clicks[first] - label[first]
        end = before - users.offsets["item"][user]
        split = rows.split[user] if self.rule.thresholds is not None else self.rule.of_times(time)
        users.add_list("target", user, item)
        users.add_list("target_time", user, time)
        users.add_list("label", user, label)
        users.add_list("end", user, end.astype(np.int32))
        users.add_list("target_split", user, split.astype(np.int8))
        self._add_rows(users, rows, main)
        count = users.offsets["item"].size - 1
        users.samples = {name: np.bincount(user[split == n], minlength=count) for n, name in enumerate(SPLITS)}
        report["empty_histories"] += int((end == 0).sum())
        inside = self._in_history(user, item, end, user[label == 1], item[label == 1], users.offsets["item"])
        for name, rows_of in (("positives", label == 1), ("negatives", label == 0)):
            report[name] += int(rows_of.sum())
            report[f"{name}_in_history"] += int((inside & rows_of).sum())
        self._count_dense(users, split == 0)
        upto = np.zeros(count, np.int64)
        np.maximum.at(upto, user[split == 0], end[split == 0])
        return upto

    def _in_history(self, user: Array, item: Array, end: Array, owner: Array, owned: Array, offsets: Array) -> Array:
        """Whether the item of an impression is one of the first ``end`` behaviours of its user."""
        size = self.ids.vocabularies["item"].size
        keys, first = np.unique(owner.astype(np.int64) * size + owned, return_index=True)
        if not keys.size:
            return np.zeros(user.size, bool)
        wanted = user.astype(np.int64) * size + item
        place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
        inside: Array = (keys[place] == wanted) & (first[place] - offsets[user] < end) & (item > 0)
        return inside

    def _count_dense(self, users: _Users, rows: Array) -> None:
        for name in self.log.dense:
            self.written.numbers[name].add(users.lists[dense_column(name)][rows])


@dataclass
class _Sorted:
    """The rows of a shard in order: users one after another, each by time.

    ``values`` and ``split`` are of the users; ``user``, ``item`` and ``time`` of the rows. ``order`` is where each row
    stands in ``columns``.
    """

    values: pa.Array
    split: Array
    behaviours: Array
    user: Array
    item: Array
    time: Array
    order: Array
    columns: Mapping[str, pa.ChunkedArray]

    def taken(self, name: str) -> pa.Array:
        """A further column in the order of the rows."""
        return self.columns[name].combine_chunks().take(pa.array(self.order))

    def without(self, copies: Array, given: bool) -> _Sorted:
        """The rows but for these. Users keep their places, as each keeps a row; those left with one behaviour give no
        sample."""
        kept = np.ones(self.user.size, bool)
        kept[copies] = False
        return _Sorted(
            self.values, self.split, self.behaviours, self.user[kept], self.item[kept], self.time[kept],
            self.order[kept], self.columns,
        )  # fmt: skip


class _Users:
    """The columns of the users of a shard, and how they become row groups."""

    def __init__(self, values: pa.Array, count: int) -> None:
        self.count = count
        self.values = values
        self.flat: dict[str, Array] = {}
        self.lists: dict[str, Array] = {}
        self.offsets: dict[str, Array] = {}
        self.samples: dict[str, Array] = {}

    def add(self, name: str, values: Array) -> None:
        """A column with a number for each user."""
        self.flat[name] = values

    def add_list(self, name: str, user: Array, values: Array) -> None:
        """A column with a list for each user; ``user`` ascends."""
        self.lists[name] = values
        self.offsets[name] = np.searchsorted(user, np.arange(self.count + 1))

    def write(self, path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
        """Write the file; returns the counts of its row groups."""
        groups: list[dict[str, Any]] = []
        writer: pq.ParquetWriter | None = None
        for first, last in self._groups():
            table = self._table(first, last, schema)
            if writer is None:
                writer = pq.ParquetWriter(path, schema, use_dictionary=False, **PARQUET)
            writer.write_table(table, row_group_size=last - first)
            behaviours = int(self.offsets["item"][last] - self.offsets["item"][first])
            samples = {name: int(count[first:last].sum()) for name, count in self.samples.items()}
            groups.append({"users": last - first, "behaviours": behaviours, "samples": samples})
        assert writer is not None
        writer.close()
        return groups

    def _groups(self) -> list[tuple[int, int]]:
        """Runs of users with at most ``GROUP_USERS`` users and, if they are several, ``GROUP_BEHAVIOURS`` rows."""
        longest = "target" if "target" in self.offsets else "item"
        ends, cuts = self.offsets[longest], [0]
        while cuts[-1] < self.count:
            full = int(np.searchsorted(ends, ends[cuts[-1]] + GROUP_BEHAVIOURS, side="right")) - 1
            cuts.append(min(self.count, cuts[-1] + GROUP_USERS, max(full, cuts[-1] + 1)))
        return list(zip(cuts, cuts[1:], strict=False))

    def _table(self, first: int, last: int, schema: pa.Schema) -> pa.Table:
        columns: dict[str, pa.Array] = {}
        columns["user"] = self.values.slice(first, last - first)
        for name, values in self.flat.items():
            columns[name] = pa.array(values[first:last])
        for name, flat in self.lists.items():
            offsets = self.offsets[name][first : last + 1]
            part = pa.array(flat[offsets[0] : offsets[-1]])
            columns[name] = pa.ListArray.from_arrays(pa.array((offsets - offsets[0]).astype(np.int32)), part)
        return pa.table([columns[name] for name in schema.names], schema=schema)
