"""The synthetic log: seeded, ragged, skewed, and its order tells more than the bag of its items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dien_kernels.data import synthetic


def test_same_seed_same_log(tmp_path: Path) -> None:
    sizes = {"users": 100, "items": 80, "categories": 5, "events": 1500}
    log = synthetic(tmp_path / "log.parquet", **sizes)
    assert log.equals(synthetic(**sizes))
    assert log.equals(pq.read_table(tmp_path / "log.parquet"))
    assert not log.equals(synthetic(**sizes, seed=1))


def test_sizes_and_shape() -> None:
    log = synthetic()
    assert abs(log.num_rows - 150_000) < 5_000
    lengths = np.bincount(log["user"].to_numpy())
    assert lengths.size == 6000
    assert lengths.min() >= 2
    assert lengths.max() > 100
    assert 5 < np.median(lengths) < lengths.mean()
    items, categories = log["item"].to_numpy(), log["category"].to_numpy()
    pairs = np.unique(np.stack([items, categories]), axis=1)
    assert pairs.shape[1] == np.unique(items).size <= 3000  # an item has one category
    counts = np.sort(np.bincount(items))[::-1]
    assert counts[:300].sum() > 0.25 * counts.sum()  # a tenth of the items, far more than a tenth of the behaviours
    assert (np.diff(log["timestamp"].to_numpy()) >= 0).all()


def test_order_says_what_comes_next() -> None:
    """With a fixed rule on the last two categories the next one is found; on those of the bag it is not."""
    log = synthetic(users=3000, items=600, categories=20, events=60_000, noise=0.0, stay=0.5).sort_by(
        [("user", "ascending"), ("timestamp", "ascending")]
    )
    user, category = log["user"].to_numpy(), log["category"].to_numpy()
    steps = np.flatnonzero((user[1:] == user[:-1]) & (category[1:] != category[:-1]))
    moves = np.stack([category[steps], category[steps + 1], user[steps]])
    follows = (moves[2, 1:] == moves[2, :-1]) & (moves[1, :-1] == moves[0, 1:])
    before, here, after = moves[0, :-1][follows], moves[0, 1:][follows], moves[1, 1:][follows]
    # Each category has two neighbours; whoever came from one goes on to the other nearly always.
    assert all(len(set(after[here == c])) == 2 for c in range(20))
    assert np.mean(after != before) > 0.85
    # Without the order, both neighbours are equally likely.
    forward = np.array([after[here == c].min() for c in range(20)])
    assert abs(np.mean(after == forward[here]) - 0.5) < 0.05


@pytest.mark.parametrize(
    "options, words",
    [
        ({"users": 0}, "users must be at least 1, got 0"),
        ({"items": 5}, "items must be at least 30, got 5"),
        ({"events": 10}, "events must be at least 2 for each of the 6000 users"),
        ({"stay": 1.5}, "stay must be a probability"),
        ({"skew": 1}, "skew must be from 0 to below 1"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_arguments(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        synthetic(**options)  # type: ignore[arg-type]
