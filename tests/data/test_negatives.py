"""Negatives: never the user's own, in the right proportions, the same for the same key; draws always end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_logs import made

from dien_kernels.data import Loader, Negatives, Prepared, negatives, synthetic
from dien_kernels.data.negatives import stream

# User 0 has items 1 and 2, user 1 has 1, user 2 has all of 0 (a rare one) to 4.
COUNTS = np.array([3, 40, 30, 20, 7])
BEHAVIOURS = np.repeat(np.arange(5), COUNTS).astype(np.int32)
OWNED = np.array([1, 2, 5 + 1, 10 + 0, 10 + 1, 10 + 2, 10 + 3, 10 + 4])
RARE = 2  # raw items behind id 0


def sampler(sampling: str) -> Negatives:
    return Negatives(BEHAVIOURS, OWNED, 5, RARE, sampling)


@pytest.mark.parametrize("rounds", [16, 0])  # 0: everything the user owns is drawn again exactly
@pytest.mark.parametrize("sampling, weight", [("popularity", COUNTS), ("uniform", [RARE, 1, 1, 1, 1])])
@pytest.mark.parametrize("user, own", [(0, [1, 2]), (1, [1])])
def test_proportions(
    monkeypatch: pytest.MonkeyPatch, sampling: str, weight: list[int], rounds: int, user: int, own: list[int]
) -> None:
    """Chi-square of 20,000 draws against the weights without the user's items; the seed is fixed."""
    monkeypatch.setattr(negatives, "_ROUNDS", rounds)
    drawn = sampler(sampling).draw(np.full(20_000, user), stream(0, 1, 2, 3))
    seen = np.bincount(drawn, minlength=5)
    expected = np.array(weight, float)
    expected[own] = 0
    expected *= drawn.size / expected.sum()
    assert seen[own].tolist() == [0] * len(own)
    some = expected > 0
    chi_square = ((seen - expected)[some] ** 2 / expected[some]).sum()
    assert chi_square < {2: 13.8, 3: 16.3}[int(some.sum()) - 1]  # exceeded once in 1,000 seeds


@pytest.mark.parametrize("sampling", ["popularity", "uniform"])
def test_user_who_owns_everything_gets_unknown_and_does_not_hang(sampling: str) -> None:
    users = np.repeat([0, 2, 1], [5, 3, 5])
    drawn = sampler(sampling).draw(users, stream(0, 0, 0, 0))
    assert drawn[users == 2].tolist() == [0, 0, 0]
    assert not sampler(sampling).owns(users[users != 2] * 5 + drawn[users != 2]).any()


def test_user_who_owns_nearly_everything_gets_the_rest() -> None:
    size = 5000
    owned = np.delete(np.arange(size), [17, 4321])
    behaviours = np.concatenate([np.repeat(owned, 3), [17, 4321]]).astype(np.int32)
    drawn = Negatives(behaviours, owned, size, 1, "popularity").draw(np.zeros(50, np.int64), stream(0, 0, 0, 0))
    assert set(drawn.tolist()) == {17, 4321}


@pytest.mark.parametrize("count", [3, 3000])  # few draws: searched in the whole log; many: marked by a hash first
def test_both_ways_to_reject_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    prepared = made(synthetic(users=40, items=60, categories=3, events=1500), tmp_path / "p")
    draws = prepared.negatives()
    users = np.repeat(np.random.default_rng(0).permutation(40), count)
    drawn = draws.draw(users, stream(5, 0, 0, 0))
    for user in range(40):
        assert not set(drawn[users == user].tolist()) & set(prepared.history(user).tolist())
    monkeypatch.setattr(Negatives, "_test_for", lambda self, users: self.owns)
    assert draws.draw(users, stream(5, 0, 0, 0)).tolist() == drawn.tolist()


def test_streams_are_keyed() -> None:
    def first(*key: int) -> list[int]:
        return stream(*key).integers(0, 1 << 62, 4).tolist()

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({tuple(first(*key)) for key in keys}) == len(keys)
    assert first(*keys[0]) == first(*keys[0])


def test_unknown_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="negative_sampling must be one of .* got 'hard'"):
        sampler("hard")


def owners(prepared: Prepared) -> list[set[int]]:
    return [set(prepared.history(user).tolist()) for user in range(prepared.offsets.size - 1)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative_sampling": "uniform", "min_count": 3},
        {"targets": "every", "negatives": 5},
        {"split": "time"},
    ],
)
def test_no_negative_of_a_prepared_folder_is_owned(tmp_path: Path, options: dict[str, Any]) -> None:
    log = synthetic(users=120, items=40, categories=4, events=1500)
    prepared = made(log, tmp_path / "p", fractions=(0.6, 0.2, 0.2), **options)
    own = owners(prepared)
    for split in ("valid", "test"):
        part = prepared.split(split)
        assert part.negatives is not None
        for user, drawn in zip(part.user.tolist(), part.negatives.tolist(), strict=True):
            assert not own[user] & set(drawn)
    loader = Loader(prepared, batch_size=60, negatives=3, auxiliary_negatives=2)
    for batch in loader.epoch(0):
        assert batch.group is not None
        assert batch.label is not None
        assert batch.negatives is not None
        rows = zip(batch.group.tolist(), batch.target["item"].tolist(), batch.label.tolist(), strict=True)
        assert all((item in own[user]) == (label == 1) for user, item, label in rows)
        users = batch.group[::4].repeat_interleave(batch.offsets.diff())
        for user, drawn in zip(users.tolist(), batch.negatives["item"].tolist(), strict=True):
            assert not own[user] & set(drawn)


def test_negatives_of_training_follow_popularity(tmp_path: Path) -> None:
    """Items that nobody of the asking users owns are drawn as often as they were bought."""
    buyers = pa.table({"user": np.arange(60) % 30, "item": np.repeat([100, 101, 102], [30, 20, 10])})
    askers = pa.table({"user": np.repeat(np.arange(1000, 1400), 2), "item": np.tile([7, 8], 400)})
    log = pa.concat_tables([buyers, askers]).append_column("timestamp", pa.array(np.arange(860)))
    prepared = made(log, tmp_path / "p")
    loader = Loader(prepared, batch_size=4300, negatives=9, auxiliary_negatives=0)
    batch = loader.batch(0, 0)
    assert batch.group is not None
    assert batch.label is not None
    asking = (batch.group >= 30) & (batch.label == 0)
    drawn = batch.target["item"][asking].numpy()
    seen = np.bincount(drawn, minlength=prepared.schema.items["item"])[prepared.encode_items([100, 101, 102])]
    expected = np.array([30, 20, 10]) / 60 * drawn.size
    assert seen.sum() == drawn.size > 3000
    assert ((seen - expected) ** 2 / expected).sum() < 13.8
