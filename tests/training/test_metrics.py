"""Metrics against sums by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from dien_kernels.training import measure
from dien_kernels.training.metrics import bootstrap_difference, user_auc, weighted_auc


def random_rows(seed: int, rows: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logit = np.round(generator.normal(size=rows), 1)  # rounded, so that there are ties
    label = (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)
    return label, logit, generator.integers(0, 60, rows) * 1000


def test_by_hand() -> None:
    # User 7: pairs (2 over 1) and (0 over 1): one of two right. User 9: a tie. User 3 has no click.
    label = np.array([1, 0, 1, 0, 1, 0, 0.0])
    logit = np.array([2, 1, 0, 0.5, 0.5, 4, 5.0])
    group = np.array([7, 7, 7, 9, 9, 3, 3])
    found = measure(label, logit, group)
    assert found.user_auc == pytest.approx((3 * 0.5 + 2 * 0.5) / 5)
    assert found.users == 2
    # Clicks 2, 0, 0.5 against 1, 0.5, 4, 5: 2 + 0 + 0.5 of 12 pairs.
    assert found.auc == pytest.approx(2.5 / 12)
    by_hand = np.mean([math.log1p(math.exp(x * (1 - 2 * y))) for x, y in zip(logit, label, strict=True)])
    assert found.log_loss == pytest.approx(by_hand)


@pytest.mark.parametrize("seed", range(5))
def test_against_sklearn(seed: int) -> None:
    label, logit, group = random_rows(seed)
    found = measure(label, logit, group)
    assert found.auc == pytest.approx(roc_auc_score(label, logit), abs=1e-12)
    assert found.log_loss == pytest.approx(log_loss(label, 1 / (1 + np.exp(-logit))), abs=1e-12)
    total, weight = 0.0, 0
    for user in np.unique(group):
        mine = group == user
        if 0 < label[mine].sum() < mine.sum():
            total += mine.sum() * roc_auc_score(label[mine], logit[mine])
            weight += int(mine.sum())
    assert found.user_auc == pytest.approx(total / weight, abs=1e-12)


def test_one_class_and_no_rows_have_reasons() -> None:
    found = measure(np.ones(3), np.arange(3.0), np.array([1, 1, 2]))
    assert math.isnan(found.auc)
    assert math.isnan(found.user_auc)
    assert math.isfinite(found.log_loss)
    assert found.reasons == {"auc": "every label is 1", "user_auc": "no user has both a click and none"}
    assert found.to_dict()["auc"] is None
    empty = measure(np.zeros(0), np.zeros(0), np.zeros(0))
    assert empty.reasons["auc"] == "there are no rows"
    assert measure(np.array([0, 1]), np.zeros(2)).reasons == {"user_auc": "the rows' users are not known"}


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="finite, got 1 values"):
        measure(np.array([0, 1]), np.array([0, np.nan]))
    with pytest.raises(ValueError, match="0 or 1"):
        measure(np.array([0, 2]), np.zeros(2))
    with pytest.raises(ValueError, match="one length"):
        measure(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="group"):
        user_auc(np.zeros(2), np.zeros(2), np.zeros(3))


def test_weighted_auc_is_that_of_repeated_rows() -> None:
    label, logit, _ = random_rows(0, 80)
    weights = np.random.default_rng(1).integers(0, 4, (6, 80))
    found = weighted_auc(label, logit, weights)
    for value, weight in zip(found, weights, strict=True):
        expected = roc_auc_score(np.repeat(label, weight), np.repeat(logit, weight))
        assert value == pytest.approx(expected, abs=1e-12)
    assert np.isnan(weighted_auc(label, logit, label[None])).all()


def test_bootstrap_is_paired_and_seeded() -> None:
    label, logit, group = random_rows(2, 2000)
    noise = np.random.default_rng(3).normal(size=2000)
    same = bootstrap_difference(label, group, [logit], [logit], samples=50)
    assert same == (0, 0, 0)  # unpaired draws would spread
    mean, low, high = bootstrap_difference(label, group, [logit] * 2, [logit + noise] * 2, samples=300)
    assert (mean, low, high) == bootstrap_difference(label, group, [logit] * 2, [logit + noise] * 2, samples=300)
    assert mean == pytest.approx(roc_auc_score(label, logit) - roc_auc_score(label, logit + noise))
    assert 0 < low < mean < high


def test_bootstrap_interval_has_the_width_of_plain_resampling() -> None:
    label, logit, group = random_rows(4, 300)
    logit = logit + 1e-3 * np.arange(300) / 300  # no ties
    other = logit + np.random.default_rng(5).normal(size=300)
    _, low, high = bootstrap_difference(label, group, [logit], [other], samples=2000)
    generator = np.random.default_rng(6)
    rows_of = [np.flatnonzero(group == user) for user in np.unique(group)]

    def plain_auc(score: np.ndarray, clicked: np.ndarray) -> float:
        return float((score[clicked > 0][:, None] > score[clicked == 0]).mean())

    draws = []
    for _ in range(1000):
        rows = np.concatenate([rows_of[i] for i in generator.integers(0, len(rows_of), len(rows_of))])
        draws.append(plain_auc(logit[rows], label[rows]) - plain_auc(other[rows], label[rows]))
    expected = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
    assert high - low == pytest.approx(expected, rel=0.2)
