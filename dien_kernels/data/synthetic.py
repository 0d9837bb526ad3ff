"""A synthetic log of users whose interests drift, which the demo uses by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array


def synthetic(
    out: str | Path | None = None,
    *,
    users: int = 6000,
    items: int = 3000,
    categories: int = 30,
    events: int = 150_000,
    seed: int = 0,
    stay: float = 0.6,
    turn: float = 0.05,
    noise: float = 0.1,
    skew: float = 0.6,
) -> pa.Table:
    """A log of behaviours whose order matters: a table user, item, category, timestamp, in the order of time.

    The categories lie on a ring (in an order that their numbers do not show). A user has an interest z and a
    direction d = +1 or -1, and at every behaviour, with probabilities::

        turn:      d <- -d
        1 - stay:  z <- the neighbour of z in direction d
        1 - noise: the item is of category z, else of any category

    Items of a category are drawn with weights about rank^-skew. So the last behaviours say where on the ring
    a user is, and only their order says which neighbour comes next: both are lost in a bag of all past items.

    Args:
        out: a Parquet file to write the table to; None: none.
        users, items, categories: how many; every category has an item at least.
        events: about how many behaviours; histories have log-normal lengths, from 2 to 15 times their mean.
        seed: of everything.
        stay, turn, noise: probabilities, as above.
        skew: 0 (uniform) to below 1.

    Raises ``ValueError`` naming an argument out of range.

    >>> from dien_kernels.data import synthetic
    >>> synthetic(users=10, items=20, categories=4, events=100).column_names
    ['user', 'item', 'category', 'timestamp']
    """
    for name, number, least in (
        ("users", users, 1),
        ("categories", categories, 2),
        ("items", items, categories),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if events < 2 * users:
        raise ValueError(f"events must be at least 2 for each of the {users} users, got {events}")
    for name, share in (("stay", stay), ("turn", turn), ("noise", noise)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a probability, got {share}")
    if not 0 <= skew < 1:
        raise ValueError(f"skew must be from 0 to below 1, got {skew}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")

    random = np.random.Generator(np.random.Philox(key=seed))
    lengths = _lengths(random, users, events / users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    user = np.repeat(np.arange(users), lengths)
    starts = offsets[:-1]

    # Within a user, direction and position on the ring are running sums, so that no loop over steps is needed.
    turns = np.cumsum(random.random(total) < turn)
    direction = np.where(turns % 2, -1, 1) * np.repeat(random.choice([-1, 1], users), lengths)
    moves = np.cumsum((random.random(total) >= stay) * direction)
    position = moves - np.repeat(moves[starts], lengths) + np.repeat(random.integers(0, categories, users), lengths)
    category = random.permutation(categories)[position % categories]
    is_noise = random.random(total) < noise
    category[is_noise] = random.integers(0, categories, int(is_noise.sum()))

    # Category c has the items first[c] to first[c + 1] - 1 of a shuffled list.
    first = np.arange(categories + 1) * items // categories
    rank = (np.diff(first)[category] * random.random(total) ** (1 / (1 - skew))).astype(np.int64)
    item = random.permutation(items)[first[category] + rank]

    gaps = np.cumsum(random.integers(60, 86_400, total))
    begin = random.integers(0, 30 * 86_400, users)
    time = 1_500_000_000 + gaps - np.repeat(gaps[starts] - begin, lengths)
    order = np.argsort(time, kind="stable")
    columns = {"user": user, "item": item, "category": category}
    table = pa.table(
        {name: column[order].astype(np.int32) for name, column in columns.items()} | {"timestamp": time[order]}
    )
    if out is not None:
        pq.write_table(table, out)
    return table


def _lengths(random: np.random.Generator, users: int, mean: float) -> Array:
    """Log-normal lengths (sigma 0.7) with about this mean."""
    spread = 0.7
    drawn = np.exp(random.normal(0, spread, users) - spread * spread / 2) * mean
    return np.clip(np.rint(drawn), 2, max(2, int(15 * mean))).astype(np.int64)
