"""Which behaviours are the targets of samples, and which split each sample belongs to.

Room card. Lives here: ``Rule``, and the passes over the users that find its thresholds. May import: numpy, pyarrow,
``_deal``, ``_hash``. Must not be here: ids, files of the prepared folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from dien_kernels.data._arrow import Array, GrowingArray
from dien_kernels.data._deal import Dealt, read_shards
from dien_kernels.data._hash import hash64

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Rule:
    """The rule by which behaviours and impressions become samples.

    Attributes:
        every: for labels "next", whether every position of a training user is a target, or only the last one.
        thresholds: of a split by user: a user whose ``draw_of`` is below the first is of valid, below the second of
            test, else of train. None where the split is by time.
        cuts: of a split by time: the first time of valid and the first time of test.
        seed: of the split by user.
    """

    every: bool
    thresholds: tuple[int, int] | None
    cuts: tuple[float, float]
    seed: int

    def of_users(self, hashes: Array) -> Array:
        """The split of users by their hashes, int8 [n]."""
        drawn = draw_of(hashes, self.seed)
        first, second = map(np.uint64, cast(tuple[int, int], self.thresholds))
        return np.where(drawn < first, 1, np.where(drawn < second, 2, 0)).astype(np.int8)

    def of_times(self, times: Array) -> Array:
        """The split of samples by the times of their targets, int8 [n]."""
        return ((times >= self.cuts[0]).astype(np.int8) + (times >= self.cuts[1])).astype(np.int8)


def draw_of(hashes: Array, seed: int) -> Array:
    """A number for each user, uint64 [n], that depends on the user's hash and the seed alone: equal users are of one
    split in every log, whoever else is in it."""
    mixed = hashes ^ np.uint64(seed * _GOLDEN % 2**64)
    return hash64(pa.array(mixed.view(np.int64)))


def thresholds_of(drawn: Array, fractions: tuple[float, float, float]) -> tuple[int, int]:
    """The thresholds that give valid and test their shares of the users with these draws.

    Every split with a positive share gets at least one user where there are three users or more.
    """
    sizes = [round(fraction * drawn.size) for fraction in fractions[1:]]
    if drawn.size >= 3:
        sizes = [max(size, int(share > 0)) for size, share in zip(sizes, fractions[1:], strict=True)]
    ascending = np.sort(drawn)
    ends = (sizes[0], sum(sizes))
    first, second = (int(ascending[end]) if end < drawn.size else 2**64 - 1 for end in ends)
    first = first if fractions[1] else 0  # a split without a share gets no later user, either
    return first, second if fractions[2] else first


def cut_times(times: Array, fractions: tuple[float, float, float]) -> tuple[float, float]:
    """The first times of valid and test, which are quantiles of the targets' times. Reorders ``times``."""
    ranks = [round(share * times.size) for share in (fractions[0], fractions[0] + fractions[1])]
    inside = sorted({rank for rank in ranks if rank < times.size})
    if inside:
        times.partition(inside)
    first, second = (times[rank].item() if rank < times.size else np.inf for rank in ranks)
    return first, second


@dataclass
class Users:
    """The users of some rows.

    Attributes:
        values: their raw values, in the order in which they first appear.
        codes: int32 [rows], the user of each row.
        hashes: uint64 [users].
    """

    values: pa.Array
    codes: Array
    hashes: Array

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Users:
        encoded = column.combine_chunks().dictionary_encode()
        values = encoded.dictionary
        return cls(values, encoded.indices.to_numpy(), hash64(values))


def make_rule(
    dealt: Dealt,
    work: Path,
    *,
    given: bool,
    every: bool,
    by_user: bool,
    fractions: tuple[float, float, float],
    seed: int,
    shards: int,
) -> tuple[Rule, int]:
    """The rule, and the number of users who can give samples.

    These are the users with two behaviours or more, or with impressions where labels are given.
    """
    several = dealt.schema is not None and "sequence" in dealt.schema.names
    columns = ["user", *["timestamp"] * (not by_user), *["sequence"] * several]
    kept: list[Array] = []
    eligible = 0
    is_float = dealt.schema is not None and pa.types.is_floating(dealt.schema.field("timestamp").type)
    times = GrowingArray(work / "times.bin", "f8" if is_float else "i8")
    for rows in _tables(dealt, shards, columns):
        users = Users.of(rows["user"])
        main = rows["sequence"].to_numpy() == 0 if several else slice(None)
        counts = np.bincount(users.codes[main], minlength=len(users.values))
        enough = counts >= (1 if given else 2)
        eligible += int(enough.sum())
        if by_user:
            kept.append(users.hashes[enough])
        elif given:
            times.append(rows["timestamp"].to_numpy()[main])
        else:
            times.append(last_times(users, rows["timestamp"].to_numpy(), main)[enough])
    thresholds, cuts = None, (np.inf, np.inf)
    if by_user:
        drawn = draw_of(np.concatenate(kept) if kept else np.zeros(0, np.uint64), seed)
        thresholds = thresholds_of(drawn, fractions)
    mapped = times.close()
    if not by_user:
        cuts = cut_times(mapped, fractions)
    return Rule(every, thresholds, cuts, seed), eligible


def last_times(users: Users, times: Array, main: Array | slice) -> Array:
    """The latest time of each user's rows ``main``; the lowest number there is for users without one."""
    lowest = np.iinfo(np.int64).min if times.dtype == np.int64 else -np.inf
    last = np.full(len(users.values), lowest, times.dtype)
    np.maximum.at(last, users.codes[main], times[main])
    return last


def _tables(dealt: Dealt, shards: int, columns: list[str]) -> Iterator[pa.Table]:
    return (table for table in read_shards(dealt, shards, columns) if table is not None)
