"""From scores to probabilities: corrections of logits that are stored beside a run."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dien_kernels._options import user_path
from dien_kernels.data import Prepared
from dien_kernels.ops import use_backend
from dien_kernels.training import checkpoint, setup
from dien_kernels.training.evaluation import BEST, Predictions, open_run, predict
from dien_kernels.training.metrics import calibration_error

CALIBRATION = "calibration.json"
METHODS = ("none", "sampling", "validation")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A correction of logits: x becomes ``slope`` x + ``offset``; call it with a tensor of logits.

    Attributes:
        method: ``"none"``, ``"sampling"`` or ``"validation"``.
        slope, offset: of the correction.
        base_rate: the share of clicks that the probabilities are for; None: that of the log.
        best_step: of the weights that it was made for.
        before, after: ``calibration_error``, ``mean_prediction`` and ``base_rate`` on the test split.
    """

    method: str
    slope: float
    offset: float
    base_rate: float | None
    best_step: int
    before: dict[str, float]
    after: dict[str, float]

    def __call__(self, logits: Tensor) -> Tensor:
        return logits * self.slope + self.offset


def prior_correction(negatives: int, base_rate: float) -> float:
    """What is added to logits that were learnt from one positive and K sampled ``negatives``::

        offset = log(t / (1 - t)) + log(K)            t = base_rate

    By Bayes' rule the odds of a click are p(x | 1) / p(x | 0) times t / (1 - t), and in the sample, where negatives are
    thinned out without a look at x, p(x | 1) / p(x | 0) is the same and the prior odds are 1 / K. So::

        logit = logit_sample - log(1 / K) + log(t / (1 - t)) = logit_sample + log(rate),    rate = K t / (1 - t)

    where ``rate`` is the share of the true negatives that are kept. In statistics this is the prior correction for
    case-control samples: King and Zeng, 2001, "Logistic regression in rare events data", Political Analysis 9(2),
    section 4.1. It holds for negatives that are drawn as the candidates are that will be scored.

    >>> round(prior_correction(4, 0.2), 6)
    0.0
    """
    if negatives < 1:
        raise ValueError(f"negatives must be at least 1, got {negatives}")
    _check_rate(base_rate)
    return math.log(base_rate / (1 - base_rate)) + math.log(negatives)


def fit_platt(label: Floats, logit: Floats) -> tuple[float, float]:
    """(a, b) that minimise the log loss of sigmoid(a x + b), by Newton's method with halved steps.

    ::

        L(a, b) = -mean_i (t_i log p_i + (1 - t_i) log(1 - p_i)),    p_i = sigmoid(a x_i + b)
        t_i = (P + 1) / (P + 2) for a click, 1 / (N + 2) for none       of P clicks and N rows without

    The targets t are those of Platt, 1999, "Probabilistic outputs for support vector machines": they keep a and b
    finite where a threshold tells the classes apart.

    Args:
        label, logit: [B]; both classes must be there.

    Raises ``ValueError`` where a class has no row.
    """
    label, x = np.asarray(label, np.float64), np.asarray(logit, np.float64)
    clicks = float(label.sum())
    others = len(label) - clicks
    if not clicks or not others:
        raise ValueError(f"label must have both 0 and 1 to fit a calibration, got {len(label)} rows of one class")
    t = np.where(label == 1, (clicks + 1) / (clicks + 2), 1 / (others + 2))
    share = float(t.mean())
    theta = np.array([0.0, math.log(share / (1 - share))])

    def loss(at: Floats) -> float:
        z = at[0] * x + at[1]
        return float((np.logaddexp(0, z) - t * z).mean())

    now = loss(theta)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(theta[0] * x + theta[1], -700, 700)))
        g, h = (p - t) / len(t), p * (1 - p) / len(t)
        gradient = np.array([(g * x).sum(), g.sum()])
        hessian = np.array([[(h * x * x).sum(), (h * x).sum()], [(h * x).sum(), h.sum()]]) + 1e-12 * np.eye(2)
        if np.abs(gradient).max() < 1e-10:
            break
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10 and loss(theta - size * step) > now:
            size /= 2
        theta = theta - size * step
        now = loss(theta)
    return float(theta[0]), float(theta[1])


def weights_for(label: Floats, base_rate: float | None) -> Floats | None:
    """Weights [B] with which the share of clicks is ``base_rate``: 1 for clicks; None for None."""
    if base_rate is None:
        return None
    clicks = float(label.sum())
    each = (1 - base_rate) / base_rate * clicks / max(len(label) - clicks, 1.0)
    return np.where(label == 1, 1.0, each)


def calibrate(
    folder: str | Path, method: str, *, base_rate: float | None = None, overrides: list[str] | None = None
) -> Calibration:
    """Make the correction of a run's scores, measure it on the test split, and store it beside the run.

    Args:
        folder: of the run.
        method: ``"sampling"``: for sampled negatives, ``prior_correction`` with the run's ``data.negatives``.
            ``"validation"``: ``fit_platt`` on the validation split. ``"none"``: removes a stored correction.
        base_rate: for sampled negatives, the share of clicks among the candidates that will be scored. With
            ``"sampling"`` and uniform negatives None is 1 of all items: the next item is one of them. With
            ``"validation"`` ``prior_correction`` follows the fit; None: probabilities are those among the sampled
            negatives.
        overrides: as in ``open_run``.

    With given labels ``"sampling"`` is refused, as nothing was sampled, and so is ``base_rate``, which the log tells.
    Raises ``ValueError`` for these and unknown methods, and what ``open_run`` raises.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if base_rate is not None:
        _check_rate(base_rate)
    config, prepared, model = open_run(folder, overrides)
    folder = user_path(folder, "folder")
    base_rate = _rate(prepared, method, base_rate)
    with use_backend(config.training.backend):
        test = predict(model, setup.open_loader(config, prepared, "test"), config)
        slope, offset = 1.0, 0.0
        if method == "sampling" and base_rate is not None:  # ``_rate`` has refused "sampling" without one
            offset = prior_correction(config.data.negatives, base_rate)
        elif method == "validation":
            if not prepared.split_size("valid"):
                raise ValueError(f"method must be 'sampling': {prepared.path} has no valid split, got {method!r}")
            valid = predict(model, setup.open_loader(config, prepared, "valid"), config)
            slope, offset = fit_platt(valid.label, valid.logit)
            if base_rate is not None:  # what was fitted holds for the validation split's own negatives
                offset += prior_correction(prepared.meta["options"]["negatives"], base_rate)
    best = checkpoint.load(folder / setup.CHECKPOINTS / BEST)["total"]
    before, after = (_measured(test, *line, base_rate) for line in ((1.0, 0.0), (slope, offset)))
    found = Calibration(method, slope, offset, base_rate, best, before, after)
    if method == "none":
        (folder / CALIBRATION).unlink(missing_ok=True)
        return found
    with checkpoint.atomic(folder / CALIBRATION) as file:
        file.write(json.dumps(asdict(found), indent=1).encode())
    return found


def read_calibration(folder: str | Path) -> Calibration:
    """The correction that ``calibrate`` stored beside the run in ``folder``.

    Raises ``FileNotFoundError`` where there is none, and ``ValueError`` for a file that cannot be read and for one of
    other weights than the run's best ones.
    """
    folder = user_path(folder, "folder")
    path = folder / CALIBRATION
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {CALIBRATION}: make it with dien-kernels calibrate {folder}")
    try:
        found = Calibration(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); calibrate the run again") from None
    best: Any = checkpoint.load(folder / setup.CHECKPOINTS / BEST)["total"]
    if found.best_step != best:
        raise ValueError(f"{path} is for the weights of step {found.best_step}, the best are now of {best}: "
                         "calibrate the run again")  # fmt: skip
    return found


def _check_rate(base_rate: float) -> None:
    if not 0 < base_rate < 1:
        raise ValueError(f"base_rate must lie between 0 and 1, got {base_rate}")


def _rate(prepared: Prepared, method: str, base_rate: float | None) -> float | None:
    """The share of clicks that is meant, where it is not that of the log."""
    if prepared.labels == "given":
        if base_rate is not None:
            raise ValueError(f"base_rate must be left out with given labels, whose log tells it, got {base_rate}")
        if method == "sampling":
            raise ValueError("method must be 'validation' or 'none' with given labels, of which none are sampled, got "
                             "'sampling'")  # fmt: skip
        return None
    if method != "sampling" or base_rate is not None:
        return base_rate
    sampling = prepared.meta["options"]["negative_sampling"]
    if sampling != "uniform":
        raise ValueError(
            "base_rate must be given for method 'sampling' where negatives are drawn by popularity: the share of "
            "clicks among candidates as popular as these, above 0 and below 1, got None"
        )
    return float(1 / max(prepared.meta["raw_items"], 2))


def _measured(test: Predictions, slope: float, offset: float, base_rate: float | None) -> dict[str, float]:
    weight = weights_for(test.label, base_rate)
    names = ("calibration_error", "mean_prediction", "base_rate")
    return dict(zip(names, calibration_error(test.label, slope * test.logit + offset, weight), strict=True))
