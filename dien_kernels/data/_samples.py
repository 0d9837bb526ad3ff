"""Which rows of a sorted log are samples, what history each has, and which split it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dien_kernels.data._arrow import Array
from dien_kernels.data._scan import Rows

SPLITS = ("train", "valid", "test")


@dataclass
class Rule:
    """How samples are made of rows.

    Attributes:
        labels: ``"next"``: a row is the target of the behaviours before it; ``"given"``: a row is an
            impression, its history the clicks strictly before it.
        every: ``"next"``: all positions of training are targets, not only the last.
        split_of_user: int8, the split (index into ``SPLITS``) of each user; None: by time.
        cuts: by time: the first timestamps of valid and test.
    """

    labels: str
    every: bool
    split_of_user: Array | None
    cuts: tuple[float, float]

    def splits(self, user: Array, time: Array) -> Array:
        """int8 [n]: the split of rows by user or by time."""
        if self.split_of_user is not None:
            return self.split_of_user[user]
        return ((time >= self.cuts[0]).astype(np.int8) + (time >= self.cuts[1])).astype(np.int8)


def split_users(able: Array, fractions: tuple[float, float, float], seed: int) -> Array:
    """int8 [U]: a random split of the users who are able to give samples (bool [U]); -1 for the others.

    Every split with a positive fraction gets a user, as long as there are enough.
    """
    users = np.flatnonzero(able)
    sizes = [round(fraction * users.size) for fraction in fractions[1:]]
    if users.size >= 3:
        sizes = [max(size, int(f > 0)) for size, f in zip(sizes, fractions[1:], strict=True)]
    shuffled = np.random.Generator(np.random.Philox(key=seed)).permutation(users)
    split = np.full(able.size, -1, np.int8)
    split[users] = 0
    split[shuffled[: sizes[0]]] = 1
    split[shuffled[sizes[0] : sum(sizes)]] = 2
    return split


def cut_times(times: Array, fractions: tuple[float, float, float]) -> tuple[float, float]:
    """The first timestamps of valid and test, quantiles of the targets' times; ``times`` is reordered."""
    ranks = [round(share * times.size) for share in (fractions[0], fractions[0] + fractions[1])]
    inside = sorted({rank for rank in ranks if rank < times.size})
    if inside:
        times.partition(inside)
    first, second = (times[rank].item() if rank < times.size else np.inf for rank in ranks)
    return first, second


@dataclass
class Samples:
    """Samples: ``row`` is the index into the rows, ``end`` where its history ends in the flat behaviours."""

    row: Array
    end: Array
    split: Array


def next_samples(rows: Rows, rule: Rule, base: int, silent: Array) -> Samples:
    """Samples of next-behaviour prediction.

    Args:
        rows: sorted by user and time.
        base: the number of behaviours before these rows.
        silent: bool [n], rows of users that give no samples.
    """
    user, time = rows["user"], rows["timestamp"]
    starts = np.ones(user.size, bool)
    starts[1:] = user[1:] != user[:-1]
    last = np.ones(user.size, bool)
    last[:-1] = starts[1:]
    able = ~starts & ~silent
    split = rule.splits(user, time)
    # Valid and test have one target for each user, whatever training has: metrics stay comparable.
    picked = able & (split >= 0) & (last | (split == 0 if rule.every else False))
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
