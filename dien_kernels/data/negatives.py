"""Negatives: items that a user has never had, drawn afresh from keyed streams of random numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dien_kernels.data._arrow import Array

SAMPLING = ("popularity", "uniform")
_ROUNDS = 16  # of redrawing; what is still the user's own afterwards is drawn exactly


def stream(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one batch and purpose, from a counter-based generator: any starts at once.

    Philox is keyed by the seed and its counter starts at (purpose, index, epoch) in the high words: streams
    of different batches never meet (2^64 blocks lie between two).
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, index, epoch]))


class Negatives:
    """Draws items for users, never one that the user's log contains.

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

    A user who owns every item gets id 0.
    """

    def __init__(self, behaviours: Array, owned: Array, size: int, rare: int, sampling: str) -> None:
        if sampling not in SAMPLING:
            raise ValueError(f"negative_sampling must be one of {SAMPLING}, got {sampling!r}")
        self.behaviours, self.owned, self.size, self.rare = behaviours, owned, size, rare
        self.sampling = sampling
        self._weight: Array | None = None

    def draw(self, users: Array, generator: np.random.Generator) -> Array:
        """One item for each of ``users``, int64 [n] both. Fastest where equal users are neighbours."""
        if not users.size:
            return np.empty(0, np.int64)
        base = users * self.size
        owns = self._test_for(users)
        items = self._propose(users.size, generator)
        left = np.flatnonzero(owns(base + items))
        for _ in range(_ROUNDS):
            if not left.size:
                return items
            items[left] = self._propose(left.size, generator)
            left = left[owns(base[left] + items[left])]
        if left.size:
            self._draw_exactly(users, items, left, generator)
        return items

    def owns(self, key: Array) -> Array:
        """bool [n]: whether user * size + item is a pair of the log."""
        place = np.searchsorted(self.owned, key)
        return np.asarray(self.owned.take(place, mode="clip") == key)

    def _test_for(self, users: Array) -> Callable[[Array], Array]:
        """``owns``, but faster for the keys of these users, if there are many for what the users own.

        A binary search in the whole log misses the cache at every step. So the users' keys are marked in a
        small table by a hash first, and only the few keys that meet a mark are searched for.
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
            place = generator.integers(0, self.behaviours.size, count, dtype=np.int64)
            return self.behaviours.take(place).astype(np.int64)
        # Ids go by frequency, so the rare items are those past the last id.
        items = generator.integers(1, self.size + self.rare, count, dtype=np.int64)
        return np.where(items < self.size, items, 0)

    def _draw_exactly(self, users: Array, items: Array, left: Array, generator: np.random.Generator) -> None:
        """For the few users who own nearly everything: from the list of what they do not own."""
        if self._weight is None:
            if self.sampling == "popularity":
                weight = np.bincount(self.behaviours, minlength=self.size).astype(np.float64)
            else:
                weight = np.ones(self.size)
                weight[0] = self.rare
            self._weight = weight
        for user in np.unique(users[left]):
            rows = left[users[left] == user]
            weight = self._weight.copy()
            weight[self.items_of(int(user))] = 0
            total = np.cumsum(weight)
            if total[-1] == 0:
                items[rows] = 0
                continue
            place = generator.random(rows.size) * total[-1]
            items[rows] = np.searchsorted(total, place, side="right")


def _hash(keys: Array, shift: np.uint64) -> Array:
    """The highest bits of the keys times 2^64 / golden ratio, as int64."""
    mixed: Array = keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((mixed >> shift).view(np.int64))
