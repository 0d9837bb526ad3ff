"""What an older generation of a prepared folder knows of the users of new rows: their latest behaviours.

Room card. Lives here: ``Tails``. May import: numpy, polars, pyarrow, ``folder``, ``_parquet``, ``_hash``. Must not be
here: new rows, samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from dien_kernels.data._arrow import Array
from dien_kernels.data._hash import hash64
from dien_kernels.data._parquet import read_group, reading


class Tails:
    """The newest behaviours of some users, as lists.

    Attributes:
        users: raw values.
        lists: for each column of the shards that holds lists of behaviours: int64 offsets [users + 1] and a flat array.
        latest: for further columns the same, with only the rows of the last time in their list: all of these, however
            many there are.
    """

    def __init__(
        self,
        users: pa.Array,
        lists: dict[str, tuple[Array, Array]],
        latest: dict[str, tuple[Array, Array]] | None = None,
    ) -> None:
        self.users, self.lists, self.latest = users, lists, latest or {}

    @classmethod
    def read(
        cls,
        folder: Path,
        meta: Mapping[str, Any],
        users: pa.Array,
        columns: Sequence[str],
        longest: int,
        latest: Mapping[str, Sequence[str]],
    ) -> Tails:
        """The last ``longest`` values of ``columns`` of every one of ``users`` that the folder has, and what lists of
        times have at their last time: ``latest`` maps such a list to the columns of ``Tails.latest``.

        A user has a row in each generation with events of theirs; the newest one counts, as it has the others' tail.
        ``users`` are distinct.
        """
        hashes = np.sort(hash64(users))
        groups, rows, found = [], [np.zeros(0, np.int64)], [users.slice(0, 0)]
        for name, group in _groups(meta):
            with reading(folder, name):
                names = read_group(folder / name, group, ["user"])["user"].combine_chunks().cast(users.type)
            own = hash64(names)
            place = np.minimum(np.searchsorted(hashes, own), hashes.size - 1)
            groups.append((name, group))
            rows.append(np.flatnonzero(hashes[place] == own))
            found.append(names.take(pa.array(rows[-1])))
        every = pa.concat_arrays(found)
        asked = pc.index_in(every, value_set=users).fill_null(-1).to_numpy(zero_copy_only=False)
        newest = np.full(len(users) + 1, -1, np.int64)  # the last place is that of other users with the same hash
        newest[asked] = np.arange(len(every))
        chosen = np.sort(newest[:-1][newest[:-1] >= 0])
        ends = np.cumsum([len(part) for part in rows[1:]])
        flat_rows = np.concatenate(rows)
        wanted = list(dict.fromkeys([*columns, *latest, *(name for names in latest.values() for name in names)]))
        lists, last_rows = _Pieces(), _Pieces()
        for number, first, last in _runs(np.searchsorted(chosen, ends)):
            name, group = groups[number]
            with reading(folder, name):
                table = read_group(folder / name, group, wanted)
            picked = flat_rows[chosen[first:last]]
            for column in columns:
                offsets, _ = flat = _flat(table[column])
                lists.add(column, flat, picked, np.minimum(offsets[picked + 1] - offsets[picked], longest))
            for times, names in latest.items():
                ties = _ties(*_flat(table[times]), picked)
                for column in names:
                    last_rows.add(column, _flat(table[column]), picked, ties)
        return cls(every.take(pa.array(chosen)), lists.joined(), last_rows.joined())

    def places(self, users: pa.Array) -> Array:
        """int64: where each of ``users`` stands here; -1 for one who does not."""
        found = pc.index_in(users, value_set=self.users)
        return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False)).astype(np.int64)

    def of(self, column: str, places: Array, like: Array) -> tuple[Array, Array]:
        """Lengths and flat values of the lists of ``places``; an empty list for -1."""
        if column not in self.lists:
            return np.zeros(places.size, np.int64), like[:0]
        offsets, flat = self.lists[column]
        known = np.maximum(places, 0)
        if not self.users or offsets.size < 2:
            return np.zeros(places.size, np.int64), like[:0]
        length = np.where(places >= 0, offsets[known + 1] - offsets[known], 0)
        return length, flat[spread(offsets[known], length)]

    def has(self, users: pa.Array, values: Mapping[str, Array]) -> Array:
        """bool [n]: whether each of ``users`` has a row of these values, by column of ``latest``, at its last time."""
        found = np.zeros(len(users), bool)
        if not len(self.users) or not values.keys() <= self.latest.keys():
            return found
        places = self.places(users)
        known = np.unique(places[places >= 0])
        offsets = self.latest[next(iter(values))][0]
        length = offsets[known + 1] - offsets[known]
        steps = spread(offsets[known], length)
        had = {"user": np.repeat(known, length)} | {name: self.latest[name][1][steps] for name in values}
        asked = {"user": places} | {name: array.astype(had[name].dtype) for name, array in values.items()}
        joined = pl.DataFrame(asked).with_row_index().join(pl.DataFrame(had), on=list(had), how="semi")
        found[joined["index"].to_numpy()] = True
        return found

    def last_times(self, users: pa.Array) -> Array | None:
        """The time of the last row of each of ``users`` that ``latest`` knows, the lowest there is for others."""
        if not len(self.users):
            return None
        places, last = self.places(users), None
        for column, (offsets, flat) in self.latest.items():
            if column.rpartition(".")[2] not in ("time", "target_time"):
                continue
            if last is None:
                lowest = -np.inf if flat.dtype == np.float64 else np.iinfo(np.int64).min
                last = np.full(places.size, lowest, flat.dtype)
            has = (places >= 0) & (offsets[places + 1] > offsets[np.maximum(places, 0)])
            last[has] = np.maximum(last[has], flat[offsets[places[has] + 1] - 1])
        return last


def _groups(meta: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for shard in meta["shards"]:
        for group in range(len(shard["groups"])):
            yield shard["file"], group


def _runs(ends: Array) -> Iterator[tuple[int, int, int]]:
    """Number, first and end of the parts that are not empty, where ``ends`` says where each part ends."""
    first = 0
    for number, end in enumerate(ends.tolist()):
        if end > first:
            yield number, first, end
        first = end


class _Pieces:
    """Lists of several columns that are put together from pieces."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[list[Array], list[Array]]] = {}

    def add(self, column: str, flat: tuple[Array, Array], rows: Array, length: Array) -> None:
        """The last ``length`` values of the lists ``rows`` of a column."""
        lengths, values = self._parts.setdefault(column, ([], []))
        lengths.append(length)
        values.append(flat[1][spread(flat[0][rows + 1] - length, length)])

    def joined(self) -> dict[str, tuple[Array, Array]]:
        return {
            name: (np.concatenate([[0], np.cumsum(np.concatenate(lengths))]), np.concatenate(values))
            for name, (lengths, values) in self._parts.items()
        }


def _flat(column: pa.ChunkedArray) -> tuple[Array, Array]:
    """int64 offsets and the flat values of a column of lists."""
    lists = column.combine_chunks()
    return lists.offsets.to_numpy().astype(np.int64), lists.values.to_numpy(zero_copy_only=False)


def _ties(offsets: Array, times: Array, rows: Array) -> Array:
    """int64: how many values of each of the lists ``rows``, which ascend, are as late as its last one."""
    length = offsets[rows + 1] - offsets[rows]
    last = times[np.maximum(offsets[rows + 1] - 1, 0)] if times.size else np.zeros(rows.size, times.dtype)
    same = times[spread(offsets[rows], length)] == np.repeat(last, length)
    ends = np.concatenate([[0], np.cumsum(same)])
    places = np.concatenate([[0], np.cumsum(length)])
    return np.asarray(ends[places[1:]] - ends[places[:-1]])


def spread(first: Array, length: Array) -> Array:
    """int64: first[0], first[0] + 1, ... (length[0] of them), then from first[1] on, and so forth."""
    ends = np.cumsum(length)
    places: Array = np.arange(int(length.sum())) + np.repeat(first - (ends - length), length)
    return places
