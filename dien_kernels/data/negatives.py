"""Negatives: items that a user has never interacted with, drawn from streams of random numbers that have a key."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

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


class AliasTable:
    """Draws numbers in proportion to weights at the cost of one random number and one look into a table each.

    The method of Walker and Vose: each of the n columns of the table holds its own number with a probability, and
    another number, its alias, with the rest. Both are packed into one int64, the alias in the higher half.

    Args:
        weight: int64 or float64 [n], at least 0, not all 0; n is below 2^31.
    """

    def __init__(self, weight: Array) -> None:
        share, alias = _alias(weight.astype(np.float64))
        kept = np.rint(share * 2.0**32).clip(0, 2.0**32 - 1).astype(np.int64)
        own = np.arange(weight.size)
        alias = np.where(share >= 1, own, alias)  # a full column is right whatever its alias is drawn for
        self._packed = (alias << 32) | kept

    def draw(self, count: int, generator: np.random.Generator) -> Array:
        """int64 [count]."""
        place = generator.random(count)
        place *= self._packed.size
        column = np.minimum(place.astype(np.int64), self._packed.size - 1)
        place -= column
        place *= 2.0**32
        packed = self._packed.take(column)
        return np.where(place < (packed & 0xFFFFFFFF), column, packed >> 32)


def _alias(weight: Array) -> tuple[Array, Array]:
    """The share that each column keeps, float64 [n], and its alias, int64 [n], without a loop over the columns.

    With the mean weight as 1, the light columns (below 1) are filled up in turn by the heavy ones in turn. Let D be
    the running sum of what the light ones lack and X that of what the heavy ones have to give. A light column takes
    from the first heavy one whose X reaches the D before it. A heavy column is used up by the first light one whose
    D exceeds its X; what it then lacks itself, D - X, comes from the next heavy one.
    """
    scaled = weight * (weight.size / weight.sum())
    share, alias = np.ones(weight.size), np.arange(weight.size)
    light, heavy = np.flatnonzero(scaled < 1), np.flatnonzero(scaled >= 1)
    if not light.size or not heavy.size:  # all are alike but for rounding
        return share, alias
    lack, give = np.cumsum(1 - scaled[light]), np.cumsum(scaled[heavy] - 1)
    before = np.concatenate([[0.0], lack[:-1]])
    share[light] = scaled[light]
    alias[light] = heavy[np.minimum(np.searchsorted(give, before), heavy.size - 1)]
    ended = np.searchsorted(lack, give, side="right")
    used = np.flatnonzero((ended < light.size) & (np.arange(heavy.size) < heavy.size - 1))
    share[heavy[used]] = np.clip(1 - (lack[ended[used]] - give[used]), 0, 1)
    alias[heavy[used]] = heavy[used + 1]
    return share, alias


class Owned:
    """The items of each of U users, which are not drawn for them.

    Args:
        offsets: int64 [U + 1]: user u has items[offsets[u]] to items[offsets[u + 1] - 1], the oldest first.
        items: int32 [E], item ids.
        size: the number of item ids.
    """

    def __init__(self, offsets: Array, items: Array, size: int) -> None:
        self.offsets, self.items, self.size = offsets, items, size

    @cached_property
    def _keys(self) -> Array:
        """int64 [E] ascending: user * size + item. So those of a user stand where the user's items do."""
        keys = np.repeat(np.arange(self.offsets.size - 1) * self.size, np.diff(self.offsets))
        keys += self.items
        keys.sort()
        return keys

    @cached_property
    def _place(self) -> Array:
        """int32 [E]: the place in ``items`` of each of ``_keys``; the first is the lowest of equal keys."""
        keys = np.repeat(np.arange(self.offsets.size - 1) * self.size, np.diff(self.offsets))
        return np.argsort(keys + self.items, kind="stable").astype(np.int32)

    def of(self, user: int, until: int | None = None) -> Array:
        """The distinct items of a user, ascending; those before the place ``until`` of ``items``, where it is given."""
        return np.unique(self.items[self.offsets[user] : self.offsets[user + 1] if until is None else until])

    def has(self, users: Array, items: Array, until: Array | None = None) -> Array:
        """bool [n]: whether each of ``users`` has the item, before the place ``until`` [n] where that is given."""
        key = users * self.size + items
        place = np.searchsorted(self._keys, key)
        place = np.minimum(place, self._keys.size - 1)
        if not self._keys.size:
            return np.zeros(users.size, bool)
        answer: Array = self._keys.take(place) == key
        if until is not None:
            answer &= self._place.take(place) < until
        return answer

    def test_for(self, users: Array) -> Callable[[Array, Array, Array | None], Array]:
        """A faster ``has`` for these users, where many are asked for and they have few items.

        A binary search in the keys of all users misses the cache at every step. So the keys of these users are
        first marked in a small hash table, and only the few that hit a mark are searched for.
        """
        runs = users[np.concatenate([[True], users[1:] != users[:-1]])]
        low, length = self.offsets[runs], self.offsets[runs + 1] - self.offsets[runs]
        total = int(length.sum())
        if total > 2 * users.size:
            return self.has
        keys = self._keys.take(np.arange(total) + np.repeat(low - (np.cumsum(length) - length), length))
        shift = np.uint64(64 - max((16 * total).bit_length(), 6))
        marks = np.zeros(1 << int(64 - shift), bool)
        marks[high_bits(keys, shift)] = True

        def has(users: Array, items: Array, until: Array | None = None) -> Array:
            answer: Array = marks.take(high_bits(users * self.size + items, shift))
            maybe = np.flatnonzero(answer)
            answer[maybe] = self.has(users[maybe], items[maybe], None if until is None else until[maybe])
            return answer

        return has


class Negatives:
    """Draws items for users, and never an item that the user has.

    With p the weight of an item (``"popularity"``: its number of behaviours; ``"uniform"``: 1 for each raw
    item, so that id 0 stands for all items too rare for an id) and O_u the items of user u::

        P(i | u) = p_i / sum_{j not in O_u} p_j    for i not in O_u

    Args:
        counts: int64 [items], the number of behaviours of each item id.
        rare: the number of raw items that share id 0.
        sampling: ``"popularity"`` or ``"uniform"``.

    A user who has every item gets id 0. Raises ``ValueError`` for another ``sampling`` and for counts of 0 alone.
    """

    def __init__(self, counts: Array, rare: int, sampling: str) -> None:
        if sampling not in SAMPLING:
            raise ValueError(f"negative_sampling must be one of {SAMPLING}, got {sampling!r}")
        self.size, self.rare, self.sampling = int(counts.size), rare, sampling
        if sampling == "popularity":
            if not counts.any():
                raise ValueError("counts must not all be 0")
            self._weight, self._table = counts, AliasTable(counts)
        else:
            self._weight = np.ones(self.size, np.int64)
            self._weight[0] = rare

    def draw(
        self, users: Array, owned: Owned | None, generator: np.random.Generator, until: Array | None = None
    ) -> Array:
        """Draw an item for each of ``users``, int64 [n]; it is fastest where equal users are neighbours.

        ``owned`` has the items that are left out, None: nothing is. With ``until``, int64 [n], only those that the
        user has before this place of ``owned.items`` are. Returns int64 [n].
        """
        items = self._propose(users.size, generator)
        if owned is None or not users.size:
            return items
        has = owned.test_for(users)

        def refused(rows: Array) -> Array:
            return rows[has(users[rows], items[rows], None if until is None else until[rows])]

        redraw = np.flatnonzero(has(users, items, until))
        for _ in range(_ROUNDS):
            if not redraw.size:
                return items
            items[redraw] = self._propose(redraw.size, generator)
            redraw = refused(redraw)
        ends = users[redraw] if until is None else until[redraw]
        for user, end in np.unique(np.stack([users[redraw], ends]), axis=1).T.tolist():
            rows = redraw[(users[redraw] == user) & (ends == end)]
            left_out = owned.of(user, None if until is None else end)
            items[rows] = self._draw_exactly(left_out, rows.size, generator)
        return items

    def _propose(self, count: int, generator: np.random.Generator) -> Array:
        if self.sampling == "popularity":
            return self._table.draw(count, generator)
        # The rare items have no id of their own: they are the numbers from ``size`` on, and become id 0.
        if self.size + self.rare == 1:
            return np.zeros(count, np.int64)
        items = generator.integers(1, self.size + self.rare, count, dtype=np.int64)
        return np.where(items < self.size, items, 0)

    @cached_property
    def _sums(self) -> Array:
        return np.cumsum(self._weight)

    def _draw_exactly(self, owned: Array, count: int, generator: np.random.Generator) -> Array:
        """Draw for one of the few users who have nearly every item, in place of the items that are left to them.

        The weights of all items lie one behind another on a line. A place is drawn among those that the owned
        items do not cover, and shifted by the owned weights before it.
        """
        weight = self._weight[owned]
        covered = np.concatenate([[0], np.cumsum(weight)])
        left = int(self._sums[-1] - covered[-1])
        if left == 0:
            return np.zeros(count, np.int64)
        free_before = self._sums[owned] - covered[1:]
        place = generator.integers(0, left, count)
        place += covered[np.searchsorted(free_before, place, side="right")]
        return np.searchsorted(self._sums, place, side="right")


def high_bits(keys: Array, shift: np.uint64) -> Array:
    """The highest bits of the keys times 2^64 / golden ratio, as int64."""
    mixed: Array = keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((mixed >> shift).view(np.int64))
