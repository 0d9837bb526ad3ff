"""Metrics of predicted clicks: numpy in, numbers out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

# The metrics that a validation can be judged by.
HIGHER_IS_BETTER = {"auc": True, "user_auc": True, "log_loss": False}


class Metrics(NamedTuple):
    """What a set of predictions is worth.

    Attributes:
        auc: the area under the ROC curve over all rows, 0 to 1; nan where a class has no row.
        user_auc: the same within each user, averaged over users as the function ``user_auc`` says; or nan.
        log_loss: the mean of -log of the probability of the label, in nats.
        rows: the number of predictions.
        users: the number of users that ``user_auc`` counts.
        reasons: why a metric is nan, for each that is.
        calibration_error: see the function of this name; nan without rows.
        mean_prediction: the mean of the predicted probabilities; nan without rows.
        base_rate: the share of clicks; nan without rows. Probabilities that are right on the whole have this mean.
        unknown: rows whose target item the model does not know (id 0).
    """

    auc: float
    user_auc: float
    log_loss: float
    rows: int
    users: int
    reasons: dict[str, str]
    calibration_error: float = math.nan
    mean_prediction: float = math.nan
    base_rate: float = math.nan
    unknown: int = 0

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, with None for nan."""
        plain = self._asdict()
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in plain.items()}


def measure(label: Array, logit: Array, group: Array | None = None) -> Metrics:
    """All metrics of one set of predictions.

    Args:
        label: [B], 1 for a click and 0 for none.
        logit: [B], the log odds of a click.
        group: [B], a number for each user, or None where it is not known.

    ``auc`` is the chance that a clicked row scores above one that was not, ties counting half; nan where all
    labels are alike. ``user_auc``: see ``user_auc``. ``log_loss`` is the mean of -log p(label), in nats.
    Raises ``ValueError`` for lengths that differ, labels other than 0 and 1, and logits that are not finite.
    """
    from sklearn.metrics import log_loss, roc_auc_score

    label, logit = _checked(label, logit)
    reasons: dict[str, str] = {}
    auc, loss = math.nan, math.nan
    if len(label) == 0:
        reasons["auc"] = reasons["log_loss"] = "there are no rows"
    else:
        # In the form max(x, 0) - x y + log(1 + exp(-|x|)), as sigmoid rounds to 0 and 1 long before the loss
        # is huge; sklearn's takes probabilities, which float64 holds well up to |x| = 36.
        probability = 1 / (1 + np.exp(-np.clip(logit, -36, 36)))
        loss = float(log_loss(label, probability, labels=[0, 1]))
        if label.min() == label.max():
            reasons["auc"] = f"every label is {int(label[0])}"
        else:
            auc = float(roc_auc_score(label, logit))
    per_user, users = math.nan, 0
    if group is None:
        reasons["user_auc"] = "the rows' users are not known"
    else:
        per_user, users = user_auc(label, logit, group)
        if users == 0:
            reasons["user_auc"] = "no user has both a click and none"
    error, mean, share = calibration_error(label, logit)
    return Metrics(auc, per_user, loss, len(label), users, reasons, error, mean, share)


def calibration_error(
    label: Array, logit: Array, weight: Array | None = None, *, bins: int = 15
) -> tuple[float, float, float]:
    """(the expected calibration error, the mean probability, the share of clicks); nan without rows.

    ::

        error = sum_b W_b / W |y_b - p_b|

    with W_b the weight of the rows in bin b, y_b their share of clicks and p_b the mean of their probabilities
    p = sigmoid(logit). Bins hold about equal weights, in the order of p, and rows of equal p are in one bin: clicks are
    rare, and bins of equal width would put nearly all rows into the first (Nguyen and O'Connor, 2015, "Posterior
    calibration and exploratory analysis for natural language processing models").

    Args:
        label, logit: [B].
        weight: [B], above 0; None: 1.
        bins: the number of bins, at most.
    """
    label, logit = _checked(label, logit)
    if len(label) == 0:
        return math.nan, math.nan, math.nan
    p = 1 / (1 + np.exp(-np.clip(logit, -700, 700)))
    w = np.ones(len(p)) if weight is None else np.asarray(weight, dtype=np.float64)
    place = np.unique(p, return_inverse=True)[1].ravel()
    of_value = np.bincount(place, w)
    middle = np.cumsum(of_value) - of_value / 2
    b = np.minimum((bins * middle / w.sum()).astype(np.int64), bins - 1)[place]
    gap = np.bincount(b, w * (label - p))
    mean, share = float(np.average(p, weights=w)), float(np.average(label, weights=w))
    return float(np.abs(gap).sum() / w.sum()), mean, share


def user_auc(label: Array, logit: Array, group: Array) -> tuple[float, int]:
    """The mean of the users' own AUCs, weighted by their rows (impressions), over users that have both classes::

        sum_u n_u AUC_u / sum_u n_u
        AUC_u = (sum of the ranks of u's clicks - P(P + 1) / 2) / (P (n_u - P))

    with ranks inside the user's rows, ties sharing their mean rank, and P the user's clicks (the GAUC of the
    DIN paper, arXiv 1706.06978, section 6.2). Returns it (nan without any such user) and the number of users
    counted.
    """
    label, logit = _checked(label, logit)
    if len(group) != len(label):
        raise ValueError(f"group must have one value for each of the {len(label)} rows, got {len(group)}")
    if len(label) == 0:
        return math.nan, 0
    user = np.unique(group, return_inverse=True)[1].ravel()
    order = np.lexsort((logit, user))
    user, logit, label = user[order], logit[order], label[order]
    position = np.arange(len(user))
    new_user = np.r_[True, user[1:] != user[:-1]]
    new_score = new_user | np.r_[True, logit[1:] != logit[:-1]]
    first = np.flatnonzero(new_score)
    last = np.r_[first[1:], len(user)] - 1
    tie = np.cumsum(new_score) - 1
    start = position[new_user][user]
    rank = (first + last)[tie] / 2 - start + 1
    rows = np.bincount(user)
    clicks = np.bincount(user, weights=label)
    ranks = np.bincount(user, weights=label * rank)
    both = (clicks > 0) & (clicks < rows)
    if not both.any():
        return math.nan, 0
    rows, clicks, ranks = rows[both], clicks[both], ranks[both]
    auc = (ranks - clicks * (clicks + 1) / 2) / (clicks * (rows - clicks))
    return float(np.average(auc, weights=rows)), int(both.sum())


def weighted_auc(label: Array, logit: Array, weights: Array) -> NDArray[np.float64]:
    """The AUC under each of R weightings of the rows, ties counting half: [R], nan where one class has no
    weight.

    ``weights`` is [R, B], not negative. One sort serves all weightings; memory is a few times that of
    ``weights``.
    """
    label, logit = _checked(label, logit)
    order = np.argsort(logit, kind="stable")
    sorted_logit = logit[order]
    starts = np.flatnonzero(np.r_[True, sorted_logit[1:] != sorted_logit[:-1]])
    weight = np.asarray(weights, dtype=np.float64)[:, order]
    positive = np.add.reduceat(weight * label[order], starts, axis=1)
    negative = np.add.reduceat(weight * (1 - label[order]), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(pairs > 0, (positive * below).sum(1) / pairs, np.nan))


def bootstrap_difference(
    label: Array,
    group: Array,
    first: list[Array],
    second: list[Array],
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """The difference of two models' AUCs on the same rows and its paired bootstrap interval: (mean, low,
    high).

    Users are drawn with replacement, each with all of its rows, since a positive and its negatives belong
    together. Every draw gives both models of every seed the same rows; the difference of a draw is the mean
    over seeds, and the interval holds the middle ``level`` of the draws. It covers the choice of test users,
    not that of training seeds.

    Args:
        label, group: [B].
        first, second: logits [B], one array a seed, paired in order.
        samples: draws.
        seed: of the draws.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"first and second must hold one array a seed, got {len(first)} and {len(second)}")
    user = np.unique(group, return_inverse=True)[1].ravel()
    users = int(user.max()) + 1
    generator = np.random.default_rng(seed)
    differences = np.empty(samples)
    chunk = max(1, 4_000_000 // len(user))  # bounds memory to some hundred MB
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        counts = generator.multinomial(users, np.full(users, 1 / users), size=size)
        rows = counts[:, user]
        differences[start : start + size] = np.mean(
            [weighted_auc(label, a, rows) - weighted_auc(label, b, rows) for a, b in zip(first, second, strict=True)],
            axis=0,
        )
    every = np.ones((1, len(user)))
    mean = np.mean(
        [weighted_auc(label, a, every) - weighted_auc(label, b, every) for a, b in zip(first, second, strict=True)]
    )
    low, high = np.nanquantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(mean), float(low), float(high)


def _checked(label: Array, logit: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y: NDArray[np.float64] = np.asarray(label, dtype=np.float64)
    x: NDArray[np.float64] = np.asarray(logit, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"label and logit must be vectors of one length, got {y.shape} and {x.shape}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("label must be 0 or 1 everywhere")
    if not np.isfinite(x).all():
        raise ValueError(f"logit must be finite, got {int((~np.isfinite(x)).sum())} values that are not")
    return y, x
