"""The rows of a shard in order, and the users that they become: flat arrays, offsets, and row groups of a file.

Room card. Lives here: ``SortedRows``, ``UserLists``, ``in_history``. May import: numpy, pyarrow, ``folder``,
``_tails``. Must not be here: which rows are samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array
from dien_kernels.data._tails import Tails, spread
from dien_kernels.data.folder import GROUP_BEHAVIOURS, GROUP_USERS, PARQUET


@dataclass
class SortedRows:
    """The rows of a shard in order: users one after another, each by time.

    ``values`` and ``split`` are of the users; ``user``, ``item`` and ``time`` of the rows. ``order`` is where each row
    stands in ``columns``.
    """

    values: pa.Array
    split: Array
    user: Array
    item: Array
    time: Array
    order: Array
    columns: Mapping[str, pa.ChunkedArray]

    def taken(self, name: str) -> pa.Array:
        """A further column in the order of the rows."""
        return self.columns[name].combine_chunks().take(pa.array(self.order))

    def without(self, copies: Array) -> SortedRows:
        """The rows but for these. Users keep their places, as each keeps a row; those left with one behaviour give no
        sample."""
        kept = np.ones(self.user.size, bool)
        kept[copies] = False
        return SortedRows(
            self.values, self.split, self.user[kept], self.item[kept], self.time[kept], self.order[kept], self.columns
        )  # fmt: skip


class UserLists:
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

    def prepend(self, tails: Tails | None) -> Array:
        """Put what is known of the users in front of their lists; returns the number of behaviours, int64 [users]."""
        if tails is None:
            return np.zeros(self.count, np.int64)
        places = tails.places(self.values)
        for name, values in self.lists.items():
            length, old = tails.of(name, places, values)
            fresh = np.diff(self.offsets[name])
            ends = np.concatenate([[0], np.cumsum(length + fresh)])
            merged = np.empty(int(ends[-1]), values.dtype)
            merged[spread(ends[:-1], length)] = old
            merged[spread(ends[:-1] + length, fresh)] = values
            self.lists[name], self.offsets[name] = merged, ends
        return tails.of("item", places, self.lists["item"])[0]

    def write(self, path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
        """Write the file; returns the counts of its row groups."""
        groups: list[dict[str, Any]] = []
        with pq.ParquetWriter(path, schema, use_dictionary=False, **PARQUET) as writer:
            for first, last in self._groups():
                writer.write_table(self._table(first, last, schema), row_group_size=last - first)
                behaviours = int(self.offsets["item"][last] - self.offsets["item"][first])
                samples = {name: int(count[first:last].sum()) for name, count in self.samples.items()}
                groups.append({"users": last - first, "behaviours": behaviours, "samples": samples})
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


def in_history(owned: Array, offsets: Array, user: Array, item: Array, end: Array, size: int) -> Array:
    """bool [n]: whether ``item`` [n] is one of the first ``end`` behaviours of its ``user``; "unknown" is none.

    ``owned`` are the behaviours of all users, ``offsets`` where each one's lie, ``size`` is the number of item ids.
    """
    owner = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    keys, first = np.unique(owner * size + owned, return_index=True)
    if not keys.size:
        return np.zeros(user.size, bool)
    wanted = user.astype(np.int64) * size + item
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    inside: Array = (keys[place] == wanted) & (first[place] - offsets[user] < end) & (item > 0)
    return inside
