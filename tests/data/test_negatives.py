"""Negatives: never the user's own, in the right proportions, the same for the same key; draws always end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_folders import next_user, write_folder

from dien_kernels.batch import Schema
from dien_kernels.data import Loader, Negatives, Prepared, negatives
from dien_kernels.data.negatives import AliasTable, Owned, stream

# User 0 has items 1 and 2 (1 twice), user 1 has 1, user 2 has all of 0 (a rare one) to 4.
COUNTS = np.array([3, 40, 30, 20, 7])
ITEMS = np.array([2, 1, 1, 1, 4, 3, 2, 1, 0], np.int32)
OWNED = Owned(np.array([0, 3, 4, 9]), ITEMS, 5)
RARE = 2  # raw items behind id 0
# The chi-square that is exceeded once in 1,000 seeds, by degrees of freedom.
CRITICAL = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 7: 24.3, 9: 27.9, 49: 85.4, 999: 1143.9}


def chi_square(drawn: np.ndarray, weight: np.ndarray) -> tuple[float, int]:
    """The statistic and the degrees of freedom of draws against weights; what has none must not be drawn."""
    seen = np.bincount(drawn, minlength=weight.size)
    expected = weight * (drawn.size / weight.sum())
    some = expected > 0
    assert seen[~some].sum() == 0
    return float(((seen - expected)[some] ** 2 / expected[some]).sum()), int(some.sum()) - 1


WEIGHTS = {
    "one": np.array([7]),
    "two": np.array([1, 3]),
    "alike": np.full(8, 5),
    "zeros": np.array([0, 4, 0, 0, 1, 5, 0]),
    "one heavy": np.concatenate([[10_000], np.full(49, 10)]),
    "heavy last": np.concatenate([np.arange(1, 10), [1000]]),
    "zipf": 1e6 / np.arange(1, 1001) ** 0.9,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_alias_table_is_exact(name: str) -> None:
    """The chances that the table stands for are the weights, to the precision of 32 bits."""
    weight = WEIGHTS[name]
    packed = AliasTable(weight)._packed
    kept = (packed & 0xFFFFFFFF) / 2.0**32
    chance = kept + np.bincount(packed >> 32, 1 - kept, weight.size)
    np.testing.assert_allclose(chance / weight.size, weight / weight.sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["two", "zeros", "one heavy", "heavy last", "zipf"])
def test_alias_table_draws_in_proportion(name: str) -> None:
    drawn = AliasTable(WEIGHTS[name]).draw(200_000, stream(1, 2, 3, 4))
    found, freedom = chi_square(drawn, WEIGHTS[name])
    assert found < CRITICAL[freedom]


@pytest.mark.parametrize("rounds", [16, 0])  # 0: everything the user owns is drawn again exactly
@pytest.mark.parametrize("sampling, weight", [("popularity", COUNTS), ("uniform", [RARE, 1, 1, 1, 1])])
@pytest.mark.parametrize("user, until, own", [(0, None, [1, 2]), (1, None, [1]), (0, 1, [2]), (0, 0, [])])
def test_proportions(
    monkeypatch: pytest.MonkeyPatch,
    sampling: str,
    weight: Any,
    rounds: int,
    user: int,
    until: int | None,
    own: list[int],
) -> None:
    """Chi-square of 20,000 draws against the weights without the user's items; the seed is fixed."""
    monkeypatch.setattr(negatives, "_ROUNDS", rounds)
    users = np.full(20_000, user)
    ends = None if until is None else np.full(20_000, until)
    drawn = Negatives(COUNTS, RARE, sampling).draw(users, OWNED, stream(0, 1, 2, 3), ends)
    expected = np.array(weight, float)
    expected[own] = 0
    found, freedom = chi_square(drawn, expected)
    assert found < CRITICAL[freedom]


@pytest.mark.parametrize("sampling", ["popularity", "uniform"])
def test_user_who_owns_everything_gets_unknown_and_does_not_hang(sampling: str) -> None:
    users = np.repeat([0, 2, 1], [5, 3, 5])
    drawn = Negatives(COUNTS, RARE, sampling).draw(users, OWNED, stream(0, 0, 0, 0))
    assert drawn[users == 2].tolist() == [0, 0, 0]
    assert not OWNED.has(users[users != 2], drawn[users != 2]).any()


def test_user_who_owns_nearly_everything_gets_the_rest() -> None:
    size = 5000
    owned = np.delete(np.arange(size, dtype=np.int32), [17, 4321])
    counts = np.full(size, 3_000_000)
    counts[[17, 4321]] = 1, 3
    draws = Negatives(counts, 1, "popularity")
    drawn = draws.draw(np.zeros(4000, np.int64), Owned(np.array([0, owned.size]), owned, size), stream(0, 0, 0, 0))
    assert chi_square(np.searchsorted([17, 4321], drawn), np.array([1, 3]))[0] < CRITICAL[1]
    assert set(drawn.tolist()) == {17, 4321}


def test_nothing_is_left_out_where_nothing_is_asked_for() -> None:
    drawn = Negatives(COUNTS, RARE, "popularity").draw(np.full(20_000, 2), None, stream(0, 0, 0, 0))
    assert chi_square(drawn, COUNTS)[0] < CRITICAL[4]


@pytest.mark.parametrize("few", [True, False])  # few items: marked by a hash first; many: searched for
@pytest.mark.parametrize("limited", [True, False])
def test_owned_items_are_found(few: bool, limited: bool) -> None:
    random = np.random.default_rng(0)
    length = random.integers(0, 8 if few else 400, 40)
    offsets = np.concatenate([[0], np.cumsum(length)])
    items = random.integers(0, 60, offsets[-1]).astype(np.int32)
    owned = Owned(offsets, items, 60)
    users = np.sort(random.integers(0, 40, 2000))
    asked = random.integers(0, 60, 2000)
    until = offsets[users] + (random.random(2000) * (length[users] + 1)).astype(np.int64) if limited else None
    ends = offsets[users + 1] if until is None else until
    expected = [a in items[offsets[u] : e] for u, a, e in zip(users, asked, ends, strict=True)]
    assert owned.has(users, asked, until).tolist() == expected
    assert owned.test_for(users)(users, asked, until).tolist() == expected
    assert any(expected)
    assert not all(expected)


def test_streams_are_keyed() -> None:
    def first(*key: int) -> list[int]:
        return stream(*key).integers(0, 1 << 62, 4).tolist()

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({tuple(first(*key)) for key in keys}) == len(keys)
    assert first(*keys[0]) == first(*keys[0])


def test_unknown_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="negative_sampling must be one of .* got 'hard'"):
        Negatives(COUNTS, RARE, "hard")


def folder(path: Path, sampling: str = "popularity") -> Prepared:
    """120 users with up to 20 of 40 items; two units a shard, two shards."""
    random = np.random.default_rng(0)

    def user(name: int) -> Any:
        items = random.integers(0, 40, random.integers(1, 21)).tolist()
        return next_user(name, items, list(range(len(items))), ["train", "train", "valid", "test"][name % 4])

    users = [user(name) for name in range(120)]
    shards = [[users[0:30], users[30:60]], [users[60:90], users[90:120]]]
    return write_folder(path, shards, Schema({"item": 40}), raw_items=43, options={"negative_sampling": sampling})


@pytest.mark.parametrize("sampling", ["popularity", "uniform"])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("exclude", ["own", "history", "none"])
def test_what_negatives_of_a_folder_never_are(tmp_path: Path, sampling: str, split: str, exclude: str) -> None:
    prepared = folder(tmp_path / "p", sampling)
    own = [prepared.history(user).tolist() for user in range(120)]
    loader = Loader(
        prepared, split, batch_size=60, negatives=3, auxiliary_negatives=2, exclude=exclude, max_length=None
    )
    each = 1 + loader.negatives
    later = seen = 0
    for batch in loader.epoch(0):
        assert batch.group is not None
        rows = batch.target["item"].reshape(-1, each)
        for sample, user in enumerate(batch.group[::each].tolist()):
            low, high = batch.offsets[sample : sample + 2].tolist()
            past = {*batch.history["item"][low:high].tolist(), int(rows[sample, 0])}
            drawn = {*rows[sample, 1:].tolist()}
            if batch.negatives is not None:
                drawn |= {*batch.negatives["item"][low:high].flatten().tolist()}
            seen += len(drawn & past)
            later += len(drawn & (set(own[user]) - past))
            if exclude == "own" or split != "train":
                assert not drawn & set(own[user])
            elif exclude == "history":
                assert not drawn & past
    if split == "train":
        assert (later > 0) == (exclude != "own")
        assert (seen > 0) == (exclude == "none")


def test_negatives_of_training_follow_popularity(tmp_path: Path) -> None:
    """Items that nobody of the asking users owns are drawn as often as they were bought."""
    buyers = [next_user(n, [1 + int(n >= 15) + int(n >= 25)] * 2, [1, 2]) for n in range(30)]
    askers = [next_user(n, [4, 5], [1, 2]) for n in range(1000, 1400)]
    prepared = write_folder(tmp_path / "p", [[askers], [buyers]], Schema({"item": 6}))
    loader = Loader(prepared, batch_size=4000, negatives=9, auxiliary_negatives=0, shuffle=False)
    batch = loader.batch(0, 0)
    assert batch.label is not None
    drawn = batch.target["item"][batch.label == 0].numpy()
    assert drawn.size == 3600
    assert chi_square(drawn, np.array([0, 30, 20, 10, 0, 0]))[0] < CRITICAL[2]


def test_fixed_negatives_depend_on_the_folder_alone(tmp_path: Path) -> None:
    prepared = folder(tmp_path / "p")

    def rows(**options: Any) -> list[Any]:
        found = []
        for batch in Loader(prepared, "valid", **options).epoch(3):
            assert batch.group is not None
            found += list(zip(batch.group[::3].tolist(), batch.target["item"].reshape(-1, 3).tolist(), strict=True))
        return sorted(found)

    reference = rows(batch_size=30)
    assert len(reference) == prepared.split_size("valid") > 20
    assert reference == rows(batch_size=7, seed=5, bucket=False, negatives=1, exclude="none", shuffle=True)
