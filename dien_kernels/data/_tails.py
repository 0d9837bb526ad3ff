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
    """

    def __init__(self, users: pa.Array, lists: dict[str, tuple[Array, Array]]) -> None:
        self.users, self.lists = users, lists

    @classmethod
    def read(
        cls, folder: Path, meta: Mapping[str, Any], users: pa.Array, columns: Sequence[str], longest: int
    ) -> Tails:
        """The last ``longest`` values of ``columns`` of every one of ``users`` that the folder has.

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
        lists: dict[str, tuple[list[Array], list[Array]]] = {}
        for number, first, last in _runs(np.searchsorted(chosen, ends)):
            name, group = groups[number]
            with reading(folder, name):
                table = read_group(folder / name, group, [*columns])
            for column in columns:
                lengths, values = lists.setdefault(column, ([], []))
                length, part = _last(table[column], flat_rows[chosen[first:last]], longest)
                lengths.append(length)
                values.append(part)
        merged = {name: (_offsets(lengths), np.concatenate(values)) for name, (lengths, values) in lists.items()}
        return cls(every.take(pa.array(chosen)), merged)

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

    def has(self, users: pa.Array, items: Array, times: Array, sequence: str | None) -> Array:
        """bool [n]: whether each of ``users`` has a behaviour with the item and the time in a sequence, None: the main
        one."""
        before = "" if sequence is None else f"{sequence}."
        found = np.zeros(len(users), bool)
        if not len(self.users) or f"{before}item" not in self.lists:
            return found
        places = self.places(users)
        known = np.unique(places[places >= 0])
        owner = np.repeat(known, np.diff(self.lists[f"{before}item"][0])[known])
        item, time = (self.of(f"{before}{name}", known, like)[1] for name, like in (("item", items), ("time", times)))
        had = pl.DataFrame({"user": owner, "item": item.astype(np.int64), "time": time})
        asked = pl.DataFrame({"user": places, "item": items, "time": times}).with_row_index()
        found[asked.join(had, on=["user", "item", "time"], how="semi")["index"].to_numpy()] = True
        return found

    def last_times(self, users: pa.Array, sequences: Sequence[str]) -> Array | None:
        """The time of the last behaviour of each of ``users`` in any sequence, the lowest there is for others.

        ``sequences`` are the names of the further ones.
        """
        if not len(self.users):
            return None
        places, last = self.places(users), None
        for column in ("time", *(f"{sequence}.time" for sequence in sequences)):
            if column not in self.lists:
                continue
            offsets, flat = self.lists[column]
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


def _offsets(lengths: list[Array]) -> Array:
    return np.asarray(np.concatenate([[0], np.cumsum(np.concatenate(lengths))]))


def _last(column: pa.ChunkedArray, rows: Array, longest: int) -> tuple[Array, Array]:
    """The last ``longest`` values of the lists ``rows``: their number in each, and all of them in a flat array."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    flat = lists.values.to_numpy(zero_copy_only=False)
    ends = offsets[rows + 1]
    length = np.minimum(ends - offsets[rows], longest)
    return length, flat[spread(ends - length, length)]


def spread(first: Array, length: Array) -> Array:
    """int64: first[0], first[0] + 1, ... (length[0] of them), then from first[1] on, and so forth."""
    ends = np.cumsum(length)
    places: Array = np.arange(int(length.sum())) + np.repeat(first - (ends - length), length)
    return places
