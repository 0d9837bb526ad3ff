"""Decides which rows of a sorted log are samples, which history each sample has, and which split it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dien_kernels.data._arrow import Array
from dien_kernels.data._scan import Rows

SPLITS = ("train", "valid", "test")


@dataclass
class Rule:
    """The rule by which rows become samples.

    Attributes:
        labels: ``"next"``: a row is the target of the behaviours before it; ``"given"``: a row is an
            impression, its history the clicks strictly before it.
        every: for ``"next"`` labels, whether every position of a training user is a target, or only the last one.
        split_of_user: int8, the split (index into ``SPLITS``) of each user; None where the split is by time.
        cuts: for a split by time, the first timestamp of valid and the first timestamp of test.
    """

    labels: str
    every: bool
    split_of_user: Array | None
    cuts: tuple[float, float]

    def splits(self, user: Array, time: Array) -> Array:
        """The split of each row, int8 [n], by its user or by its time."""
        if self.split_of_user is not None:
            return self.split_of_user[user]
        return ((time >= self.cuts[0]).astype(np.int8) + (time >= self.cuts[1])).astype(np.int8)


def split_users(eligible: Array, fractions: tuple[float, float, float], seed: int) -> Array:
    """A random split of the users who can give samples (``eligible``, bool [U]): int8 [U], -1 for all other users.

    Every split with a positive fraction gets at least one user where there are three eligible users or more.
    """
    users = np.flatnonzero(eligible)
    sizes = [round(fraction * users.size) for fraction in fractions[1:]]
    if users.size >= 3:
        sizes = [max(size, int(f > 0)) for size, f in zip(sizes, fractions[1:], strict=True)]
    shuffled = np.random.Generator(np.random.Philox(key=seed)).permutation(users)
    split = np.full(eligible.size, -1, np.int8)
    split[users] = 0
    split[shuffled[: sizes[0]]] = 1
    split[shuffled[sizes[0] : sum(sizes)]] = 2
    return split


def cut_times(times: Array, fractions: tuple[float, float, float]) -> tuple[float, float]:
    """The first timestamps of valid and test, which are quantiles of the targets' times. Reorders ``times``."""
    ranks = [round(share * times.size) for share in (fractions[0], fractions[0] + fractions[1])]
    inside = sorted({rank for rank in ranks if rank < times.size})
    if inside:
        times.partition(inside)
    first, second = (times[rank].item() if rank < times.size else np.inf for rank in ranks)
    return first, second


@dataclass
class Samples:
    """Samples: the index of each one's row, where its history ends in the flat behaviours, and its split."""

    row: Array
    end: Array
    split: Array


def next_samples(rows: Rows, rule: Rule, base: int, excluded: Array) -> Samples:
    """Samples of next-behaviour prediction.

    Args:
        rows: sorted by user and time.
        base: the number of behaviours that were written before those of these rows.
        excluded: bool [n], the rows of users who give no samples.
    """
    user, time = rows["user"], rows["timestamp"]
    starts = np.ones(user.size, bool)
    starts[1:] = user[1:] != user[:-1]
    last = np.ones(user.size, bool)
    last[:-1] = starts[1:]
    eligible = ~starts & ~excluded
    split = rule.splits(user, time)
    # Valid and test have one target for each user, whatever training has: metrics stay comparable.
    picked = eligible & (split >= 0) & (last | (split == 0 if rule.every else False))
    row = np.flatnonzero(picked)
    return Samples(row, base + row, split[row])


def given_samples(rows: Rows, rule: Rule, base: int) -> Samples:
    """Samples of labelled impressions: every row, with the clicks strictly before its timestamp."""
    user, time = rows["user"], rows["timestamp"]
    clicks = np.cumsum(rows["label"], dtype=np.int64)
    starts = np.ones(user.size, bool)
    starts[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    first = np.flatnonzero(starts)[np.cumsum(starts) - 1]  # of the rows of the same user and time
    row = np.arange(user.size)
    return Samples(row, base + clicks[first] - rows["label"][first], rule.splits(user, time))
