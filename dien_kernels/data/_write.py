"""The second pass of ``prepare``: sorts the rows of one shard after another and writes its users.

Room card. Lives here: ``ShardWriter`` and what it counts on the way. May import: numpy, pyarrow, polars, ``_deal``,
``_ids``, ``_samples``, ``_numbers``, ``negatives``, ``folder``. Must not be here: the reading of logs, the meta file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa

from dien_kernels.data._arrow import Array, count_before
from dien_kernels.data._ids import Ids
from dien_kernels.data._numbers import Numbers
from dien_kernels.data._samples import Rule, Users, last_times
from dien_kernels.data._tails import Tails, spread
from dien_kernels.data._user_lists import SortedRows, UserLists, in_history
from dien_kernels.data.folder import (
    SHARDS,
    SPLITS,
    behaviour_column,
    dense_column,
    group_digests,
    shard_file,
    user_column,
)
from dien_kernels.data.log import Log
from dien_kernels.data.negatives import high_bits

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
        dropped: int64 [items], the behaviours of each item that were left out as duplicates or late; None: none were.
    """

    numbers: dict[str, Numbers]
    shards: list[dict[str, Any]] = field(default_factory=list)
    report: Counter[str] = field(default_factory=Counter)
    users: int = 0
    behaviours: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    dropped: Array | None = None


class ShardWriter:
    """Writes shards; the arguments are those of all shards.

    Args:
        folder: the folder that gets ``shards``.
        columns: the columns of a shard.
        log: which columns there are.
        ids: what the ids of the values are.
        rule: which behaviours are targets.
        duplicates: ``"drop"``: rows that say the same as an earlier one, user, item, time (and label), are left out.
        tails: what the folder knows of the users already; their latest behaviours come in front of the new ones.
        first_shard: the number of the first shard.
    """

    def __init__(
        self,
        folder: Path,
        columns: pa.Schema,
        log: Log,
        ids: Ids,
        rule: Rule,
        *,
        duplicates: str,
        tails: Tails | None = None,
        first_shard: int = 0,
    ) -> None:
        self.folder, self.columns, self.log, self.ids, self.rule = folder, columns, log, ids, rule
        self.given, self.duplicates = log.labelled, duplicates
        self.tails, self.first_shard = tails, first_shard
        self.written = Written({name: Numbers() for name in (*log.dense, *log.behaviour_dense)})
        self.all_items = ids.vocabularies["item"].size - 1 + (ids.rare > 0)
        (folder / SHARDS).mkdir()

    def write(self, rows: pa.Table | None) -> None:
        """Sort the rows of the next shard and write it. A shard without users has no file and is not counted."""
        rows = None if rows is None else self._without_known(rows)
        if rows is None or not rows.num_rows:
            return
        sorted_rows = self._sort(rows)
        if sorted_rows.split.size == 0:
            return
        name = shard_file(self.first_shard + len(self.written.shards))
        groups = self._columns(sorted_rows).write(self.folder / name, self.columns)
        for group, digest in zip(groups, group_digests(self.folder / name), strict=True):
            group["digest"] = digest
        for group in groups:
            self.written.users += group["users"]
            self.written.behaviours += group["behaviours"]
            self.written.samples.update(group["samples"])
        self.written.shards.append({"file": name, "groups": groups})

    def _without_known(self, table: pa.Table) -> pa.Table:
        """The rows but for those before the last one that the folder knows of their user, and with
        ``duplicates="drop"`` those that say what it says."""
        if self.tails is None:
            return table
        users, time = Users.of(table["user"]), table["timestamp"].to_numpy()
        last = self.tails.last_times(users.values)
        if last is None:
            return table
        late = time < last[users.codes]
        known = self._known_already(table, np.flatnonzero(time == last[users.codes]))
        self.written.report["late_rows"] += int(late.sum())
        left_out = late.copy()
        if self.duplicates == "drop":
            left_out[known] = True
            self.written.report["duplicate_rows"] += known.size
        else:  # the second of two equal rows is counted with those of the new rows
            self.written.report["duplicate_rows"] += self._distinct(table, known)
        if not left_out.any():
            return table
        item = self.ids.vocabularies["item"].encode_values(table["item"])
        behaves = left_out & (table["label"].to_numpy() == 1) if self.given else left_out
        if self.log.sequences:
            behaves = behaves & (table["sequence"].to_numpy() == 0)
        self._take_out(item[behaves])
        return table.filter(pa.array(~left_out))

    def _same(self) -> list[str]:
        """The columns of rows that say the same."""
        return ["user", "item", "timestamp", *["label"] * self.given, *["sequence"] * bool(self.log.sequences)]

    def _distinct(self, table: pa.Table, rows: Array) -> int:
        """How many of ``rows`` say something else than the ones before."""
        return int(pl.DataFrame(table.select(self._same()).take(pa.array(rows))).n_unique()) if rows.size else 0

    def _known_already(self, table: pa.Table, rows: Array) -> Array:
        """Those of ``rows``, which are of the last time of their user, that the folder has: the same user, item, time,
        label and sequence. Items that are too rare for an id cannot be told apart."""
        if not rows.size or self.ids.vocabularies["item"].buckets:
            return rows[:0]
        taken = table.take(pa.array(rows))
        item = self.ids.vocabularies["item"].encode_values(taken["item"])
        known = np.zeros(rows.size, bool)
        sequence = taken["sequence"].to_numpy() if self.log.sequences else np.zeros(rows.size, np.int8)
        for number, name in enumerate((None, *self.log.sequences[1:])):
            own = np.flatnonzero((sequence == number) & (item > 0))
            time, before = taken["timestamp"].to_numpy()[own], "" if name is None else f"{name}."
            values = {f"{before}item": item[own], f"{before}time": time}
            if self.given and name is None:
                values = {"target": item[own], "target_time": time, "label": taken["label"].to_numpy()[own]}
            user = taken["user"].take(pa.array(own)).combine_chunks()
            known[own] = cast(Tails, self.tails).has(user, values)
        return rows[known]

    def _sort(self, table: pa.Table) -> SortedRows:
        """Order the users by split and hash, and the rows of a user by time; rows of equal times stay as they are."""
        report = self.written.report
        users, time = Users.of(table["user"]), table["timestamp"].to_numpy()
        label = table["label"].to_numpy() if self.given else None
        sequence = table["sequence"].to_numpy() if self.log.sequences else None
        main: Array | slice = slice(None) if sequence is None else sequence == 0
        clicks = main if label is None else (label == 1) if sequence is None else (label == 1) & (sequence == 0)
        behaviours = np.bincount(users.codes[clicks], minlength=len(users.values))
        split = self._split_of_users(users, time, main)
        if self.tails is not None:
            behaviours = behaviours + self.tails.of("item", self.tails.places(users.values), behaviours)[0]
        order_of_users = np.lexsort((users.hashes, np.maximum(split, 0)))
        place = np.empty(len(users.values), np.int32)
        place[order_of_users] = np.arange(place.size, dtype=np.int32)
        user = place[users.codes]
        order = np.argsort(user, kind="stable")
        back = (np.diff(user[order]) == 0) & (np.diff(time[order]) < 0)
        report["out_of_order"] += int(back.sum())
        if back.any():
            order = np.lexsort((time, user))
        item = self.ids.vocabularies["item"].encode_values(table["item"])[order].astype(np.int32)
        columns = {name: table[name] for name in table.column_names if name not in ("user", "timestamp")}
        result = SortedRows(
            users.values.take(pa.array(order_of_users)), split[order_of_users],
            user[order], item, time[order], order, columns,
        )  # fmt: skip
        self.written.longest = max(self.written.longest, int(behaviours.max(initial=0)))
        return self._without_duplicates(result)

    def _split_of_users(self, users: Users, time: Array, main: Array | slice) -> Array:
        """The split of each user's last behaviour, or of all the impressions of a split by user; -1: of none."""
        rows = np.bincount(users.codes[main], minlength=len(users.values))
        if self.tails is not None and not self.given:
            known = self.tails.of("item", self.tails.places(users.values), rows)[0]
            rows = np.where(rows > 0, rows + known, 0)
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

    def _without_duplicates(self, rows: SortedRows) -> SortedRows:
        """Count rows that say the same as an earlier one, and leave them out where that is asked for."""
        if self.ids.vocabularies["item"].buckets:
            return rows  # the raw items are not known here
        same = (np.diff(rows.user) == 0) & (np.diff(rows.time) == 0)
        near = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
        if not near.size:
            return rows
        raw = rows.columns["item"].combine_chunks().take(pa.array(rows.order[near]))  # rare items share an id
        keys = {"user": rows.user[near], "time": rows.time[near], "item": pl.Series(raw)}
        for name in ("label", "sequence"):
            if name in rows.columns:
                keys[name] = rows.taken(name).to_numpy()[near]
        first = pl.DataFrame(keys).select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
        copies = near[~first]
        self.written.report["duplicate_rows"] += copies.size
        if self.duplicates == "keep" or not copies.size:
            return rows
        behaves = np.ones(copies.size, bool)
        if self.given:
            behaves &= rows.taken("label").to_numpy()[copies] == 1
        if self.log.sequences:
            behaves &= rows.taken("sequence").to_numpy()[copies] == 0
        self._take_out(rows.item[copies[behaves]])
        return rows.without(copies)

    def _take_out(self, item: Array) -> None:
        """Behaviours of these items were counted while the log was read, and are in no shard."""
        dropped = np.bincount(item, minlength=self.ids.vocabularies["item"].size)
        self.written.dropped = dropped if self.written.dropped is None else self.written.dropped + dropped

    def _columns(self, rows: SortedRows) -> UserLists:
        """The columns of the users of a shard, as flat arrays and offsets."""
        sequence = rows.taken("sequence").to_numpy() if self.log.sequences else np.zeros(rows.user.size, np.int8)
        label = rows.taken("label").to_numpy() if self.given else None
        main = sequence == 0
        clicked = main if label is None else main & (label == 1)
        users = UserLists(rows.values, rows.split.size)
        self._add_behaviours(users, None, rows, clicked)
        for number, name in enumerate(self.log.sequences[1:], start=1):
            self._add_behaviours(users, name, rows, sequence == number)
        if label is None:
            self._add_rows(users, rows, clicked)
        before = users.prepend(self.tails)
        offsets = users.offsets["item"]
        user = np.repeat(np.arange(users.count), np.diff(offsets))
        if label is None:
            upto = self._add_next(users, rows.split, before)
        else:
            upto = self._add_given(users, rows, main, label[main])
        position = np.arange(user.size) - offsets[user]
        for name in self.log.behaviour_dense:
            self.written.numbers[name].add(users.lists[behaviour_column(name)][position < upto[user]])
        return users

    def _add_behaviours(self, users: UserLists, sequence: str | None, rows: SortedRows, taken: Array) -> None:
        before = "" if sequence is None else f"{sequence}."
        users.add_list(f"{before}item", rows.user[taken], rows.item[taken])
        users.add_list(f"{before}time", rows.user[taken], rows.time[taken])
        fields = {behaviour_column(name, sequence): name for name in self.log.behaviour_fields}
        numbers = {behaviour_column(name, sequence): name for name in self.log.behaviour_dense}
        self._add_columns(users, fields, numbers, rows, taken)

    def _add_rows(self, users: UserLists, rows: SortedRows, taken: Array) -> None:
        fields = {user_column(name): name for name in self.log.user_fields}
        self._add_columns(users, fields, {dense_column(name): name for name in self.log.dense}, rows, taken)

    def _add_columns(
        self, users: UserLists, fields: Mapping[str, str], numbers: Mapping[str, str], rows: SortedRows, taken: Array
    ) -> None:
        """Lists of ids and of numbers; the mappings are from the columns of a shard to those of the log."""
        for column, name in fields.items():
            ids = self.ids.vocabularies[name].encode_values(rows.taken(name)).astype(np.int32)
            users.add_list(column, rows.user[taken], ids[taken])
        for column, name in numbers.items():
            values = rows.taken(name).to_numpy(zero_copy_only=False)
            users.add_list(column, rows.user[taken], values[taken])

    def _owners_of_all(self, item: Array, offsets: Array) -> Array:
        """bool [users]: whether a user has every item, so that there is no negative for them."""
        owns = np.zeros(offsets.size - 1, bool)
        for number in np.flatnonzero(np.diff(offsets) >= self.all_items).tolist():
            owns[number] = np.unique(item[offsets[number] : offsets[number + 1]]).size >= self.all_items
        return owns

    def _add_next(self, users: UserLists, split: Array, before: Array) -> Array:
        """The samples of next-behaviour prediction; returns the end of each user's training positions.

        ``before`` is the number of behaviours of each user that were in the folder already and are no targets now.
        """
        report, item, offsets = self.written.report, users.lists["item"], users.offsets["item"]
        count = np.diff(offsets)
        owns_all = self._owners_of_all(item, offsets)
        report["users_owning_every_item"] += int((owns_all & (split >= 0)).sum())
        usable = (split >= 0) & ~owns_all & (count >= 2) & (count > before)
        first, end = np.maximum(before, 1), np.where(usable & (split == 0), count, 0)
        if not self.rule.every:
            first = np.where(end > 0, end - 1, 0)
        elif self.rule.thresholds is None:  # every behaviour before the time at which valid begins
            early = np.concatenate([[0], np.cumsum(users.lists["time"] < self.rule.cuts[0])])
            end = np.where(usable & (split > 0), early[offsets[1:]] - early[offsets[:-1]], end)
        end = np.where(end > first, end, 0) if self.rule.every else end
        first = np.where(end > 0, first, 0)
        held = np.where(usable & (split > 0), split, 0).astype(np.int8)
        users.add("train_from", first.astype(np.int32))
        users.add("train_to", end.astype(np.int32))
        users.add("held", held)
        users.samples = {
            "train": end - first,
            "valid": (held == 1).astype(np.int64),
            "test": (held == 2).astype(np.int64),
        }
        fresh = count - before
        user, step = np.repeat(np.arange(users.count), fresh), spread(offsets[:-1] + before, fresh)
        position = step - offsets[user]
        training = (position >= first[user]) & (position < end[user])
        target = training | ((held[user] > 0) & (position == count[user] - 1))
        repeated = self._repeated(item, count, step)
        report["repeated_behaviours"] += int(repeated.sum())
        report["positives"] += int(target.sum())
        report["positives_in_history"] += int((target & repeated).sum())
        self._count_dense(users, step[training])
        return end

    def _repeated(self, item: Array, count: Array, step: Array) -> Array:
        """bool, for each place in ``step``: whether its user, who has ``count`` behaviours, has its item before it."""
        key = np.repeat(np.arange(count.size), count) * self.ids.vocabularies["item"].size + item
        if step.size == key.size:
            return ~pl.Series(key).is_first_distinct().to_numpy() & (item > 0)
        # Few of the behaviours are asked for: a table of bits leaves out nearly all keys that none of them has.
        shift = np.uint64(64 - max(int(16 * step.size).bit_length(), 6))
        hashes = high_bits(key, shift)
        asked = np.zeros(1 << int(64 - shift), bool)
        asked[hashes[step]] = True
        maybe = np.flatnonzero(asked[hashes])
        again = np.zeros(key.size, bool)
        again[maybe] = ~pl.Series(key[maybe]).is_first_distinct().to_numpy()
        found: Array = again[step] & (item[step] > 0)
        return found

    def _add_given(self, users: UserLists, rows: SortedRows, main: Array, label: Array) -> Array:
        """The samples of labelled impressions; returns how many behaviours of each user training reads."""
        report = self.written.report
        user, time, item = rows.user[main], rows.time[main], rows.item[main]
        offsets = users.offsets["item"]
        end = count_before(offsets, users.lists["time"], user, time) - offsets[user]
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
        size = self.ids.vocabularies["item"].size
        inside = in_history(users.lists["item"], offsets, user, item, end, size)
        for name, rows_of in (("positives", label == 1), ("negatives", label == 0)):
            report[name] += int(rows_of.sum())
            report[f"{name}_in_history"] += int((inside & rows_of).sum())
        self._count_dense(users, split == 0)
        upto = np.zeros(count, np.int64)
        np.maximum.at(upto, user[split == 0], end[split == 0])
        return upto

    def _count_dense(self, users: UserLists, rows: Array) -> None:
        for name in self.log.dense:
            self.written.numbers[name].add(users.lists[dense_column(name)][rows])
