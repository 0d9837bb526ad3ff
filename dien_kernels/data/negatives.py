"""Negatives: items that a user has never interacted with, drawn from streams of random numbers that have a key."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dien_kernels.data._arrow import Array

SAMPLING = ("popularity", "uniform")
_ROUNDS = 16  # of redrawing items that the user has; afterwards ``_draw_exactly`` replaces those that remain


def stream(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one batch and one purpose, from a counter-based generator, which can start at any batch.

    The seed is the key of Philox, and the high words of its counter start at (purpose, index, epoch). Between the
    starts of two streams lie 2^64 blocks, so that the streams of different batches never overlap.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, index, epoch]))


class Negatives:
    """Draws items for users, and never an item that the user has in the log.

    With p the weight of an item (``"popularity"``: its number of behaviours; ``"uniform"``: 1 for each raw
    item, so that id 0 stands for all items too rare for an id) and O_u the items of user u::

        P(i | u) = p_i / sum_{j not in O_u} p_j    for i not in O_u

    Args:
        behaviours: int32 [E], the item of every behaviour of the log: drawing one of them is drawing by
            popularity.
        owned: int64 [O] ascending and distinct, user * size + item for every pair that occurs.
        size: the number of item ids.
        rare: the number of raw items that share id 0.
        sampling: ``"popularity"`` or ``"uniform"``.

    A user who has every item gets id 0.
    """

    def __init__(self, behaviours: Array, owned: Array, size: int, rare: int, sampling: str) -> None:
        if sampling not in SAMPLING:
            raise ValueError(f"negative_sampling must be one of {SAMPLING}, got {sampling!r}")
        self.behaviours, self.owned, self.size, self.rare = behaviours, owned, size, rare
        self.sampling = sampling
        self._weight: Array | None = None

    def draw(self, users: Array, generator: np.random.Generator) -> Array:
        """Draw one item for each of ``users``; both are int64 [n]. It is fastest where equal users are neighbours."""
        if not users.size:
            return np.empty(0, np.int64)
        base = users * self.size
        owns = self._test_for(users)
        items = self._propose(users.size, generator)
        redraw = np.flatnonzero(owns(base + items))
        for _ in range(_ROUNDS):
            if not redraw.size:
                return items
            items[redraw] = self._propose(redraw.size, generator)
            redraw = redraw[owns(base[redraw] + items[redraw])]
        if redraw.size:
            self._draw_exactly(users, items, redraw, generator)
        return items

    def owns(self, key: Array) -> Array:
        """bool [n]: whether user * size + item is a pair of the log."""
        position = np.searchsorted(self.owned, key)
        return np.asarray(self.owned.take(position, mode="clip") == key)

    def _test_for(self, users: Array) -> Callable[[Array], Array]:
        """A faster ``owns`` for the keys of these users, where many keys are asked for and the users have few items.

        A binary search in the keys of the whole log misses the cache at every step. So the keys of these users are
        first marked in a small hash table, and only the few keys that hit a mark are searched for.
        """
        starts = np.concatenate([[0], np.flatnonzero(users[1:] != users[:-1]) + 1])
        first = users[starts] * self.size
        low, high = np.searchsorted(self.owned, [first, first + self.size])
        length = high - low
        total = int(length.sum())
        if total > 2 * users.size:
            return self.owns
        ends = np.cumsum(length)
        keys = self.owned.take(np.arange(total) + np.repeat(high - ends, length))
        shift = np.uint64(64 - max((16 * total).bit_length(), 6))
        marks = np.zeros(1 << int(64 - shift), bool)
        marks[_hash(keys, shift)] = True

        def owns(key: Array) -> Array:
            answer = marks.take(_hash(key, shift))
            maybe = np.flatnonzero(answer)
            answer[maybe] = self.owns(key[maybe])
            return answer

        return owns

    def items_of(self, user: int) -> Array:
        """int64, ascending: the distinct items of a user."""
        low, high = np.searchsorted(self.owned, [user * self.size, (user + 1) * self.size])
        return np.asarray(self.owned[low:high]) - user * self.size

    def _propose(self, count: int, generator: np.random.Generator) -> Array:
        if self.sampling == "popularity":
            position = generator.integers(0, self.behaviours.size, count, dtype=np.int64)
            return self.behaviours.take(position).astype(np.int64)
        # The rare items have no id of their own: they are the numbers from ``size`` on, and become id 0.
        items = generator.integers(1, self.size + self.rare, count, dtype=np.int64)
        return np.where(items < self.size, items, 0)

    def _draw_exactly(self, users: Array, items: Array, redraw: Array, generator: np.random.Generator) -> None:
        """Draw for the few users who have nearly every item: from the list of the items that they do not have."""
        if self._weight is None:
            if self.sampling == "popularity":
                weight = np.bincount(self.behaviours, minlength=self.size).astype(np.float64)
            else:
                weight = np.ones(self.size)
                weight[0] = self.rare
            self._weight = weight
        for user in np.unique(users[redraw]):
            rows = redraw[users[redraw] == user]
            weight = self._weight.copy()
            weight[self.items_of(int(user))] = 0
            total = np.cumsum(weight)
            if total[-1] == 0:
                items[rows] = 0
                continue
            position = generator.random(rows.size) * total[-1]
            items[rows] = np.searchsorted(total, position, side="right")


def _hash(keys: Array, shift: np.uint64) -> Array:
    """The highest bits of the keys times 2^64 / golden ratio, as int64."""
    mixed: Array = keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((mixed >> shift).view(np.int64))
