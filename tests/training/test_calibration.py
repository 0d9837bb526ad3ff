"""When a score is a probability: corrections of logits, and how far off they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dien_kernels import cli
from dien_kernels.data import Prepared
from dien_kernels.serving import Scorer
from dien_kernels.training import calibrate, measure, open_run, read_calibration
from dien_kernels.training.calibration import CALIBRATION, fit_platt, prior_correction, weights_for
from dien_kernels.training.metrics import calibration_error


def population(rows: int = 200_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label, true logit, feature) of rare clicks."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=rows)
    logit = -3.5 + 1.5 * x
    return (draw.random(rows) < 1 / (1 + np.exp(-logit))).astype(float), logit, x


def test_prior_correction_restores_the_probabilities_of_the_population() -> None:
    label, logit, x = population()
    clicks, others = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    kept = np.concatenate([clicks, np.random.default_rng(1).choice(others, 3 * clicks.size, replace=False)])
    fitted = LogisticRegression(C=1e6).fit(x[kept, None], label[kept])
    learnt = fitted.decision_function(x[:, None])
    corrected = learnt + prior_correction(3, label.mean())
    assert np.abs(corrected - logit).mean() < 0.1
    assert calibration_error(label, corrected)[0] < 0.003 < 0.1 < calibration_error(label, learnt)[0]


def test_platt_is_the_logistic_regression_of_the_logits() -> None:
    label, logit, _ = population(20_000)
    wrong = logit / 2 + 1
    a, b = fit_platt(label, wrong)
    fitted = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(wrong[:, None], label)
    np.testing.assert_allclose([a, b], [fitted.coef_[0, 0], fitted.intercept_[0]], atol=0.05)
    assert calibration_error(label, a * wrong + b)[0] < 0.005 < calibration_error(label, wrong)[0]


def test_platt_stays_finite_where_a_threshold_tells_the_classes_apart() -> None:
    a, b = fit_platt(np.array([0.0, 0, 1, 1]), np.array([-1e3, -2.0, 2.0, 1e3]))
    assert np.isfinite([a, b]).all()
    assert a > 0
    with pytest.raises(ValueError, match="both 0 and 1"):
        fit_platt(np.ones(3), np.zeros(3))


def test_calibration_error_by_hand() -> None:
    label = np.array([0.0, 1, 1, 1])
    logit = np.log(np.array([0.25, 0.25, 0.5, 0.5]) / np.array([0.75, 0.75, 0.5, 0.5]))
    np.testing.assert_allclose(calibration_error(label, logit, bins=2), (0.375, 0.375, 0.75))
    np.testing.assert_allclose(calibration_error(label, logit, np.array([3.0, 1, 1, 1]), bins=2)[0], 1 / 6)
    assert np.isnan(calibration_error(np.empty(0), np.empty(0))).all()
    metrics = measure(label, logit)
    assert (metrics.mean_prediction, metrics.base_rate) == (pytest.approx(0.375), 0.75)


def test_weights_give_the_share() -> None:
    label = np.array([1.0, 0, 0, 0, 0])
    weight = weights_for(label, 0.02)
    assert weight is not None
    assert np.average(label, weights=weight) == pytest.approx(0.02)
    assert weights_for(label, None) is None


@pytest.fixture
def run(whole: str) -> Path:
    (Path(whole) / CALIBRATION).unlink(missing_ok=True)
    return Path(whole)


def test_calibrate_stores_what_the_scorer_applies(run: Path, prepared: Prepared, tmp_path: Path) -> None:
    found = calibrate(run, "sampling", base_rate=0.02)
    assert found.offset == pytest.approx(np.log(0.02 / 0.98))
    assert found.after["base_rate"] == pytest.approx(0.02)
    assert found.after["calibration_error"] < found.before["calibration_error"]
    assert found.after["mean_prediction"] < 0.1 < 0.3 < found.before["mean_prediction"]
    assert read_calibration(run) == found
    _, data, model = open_run(run)
    items = [data.item_name(number) for number in range(1, 6)]
    plain = Scorer(model, data).score(items[:2], items)
    wanted = 1 / (1 + np.exp(-(np.log(plain / (1 - plain)) + found.offset)))
    scores = Scorer(model, data, calibration=read_calibration(run)).score(items[:2], items)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    pq.write_table(pa.table({"history": [items[:2]], "candidates": [items]}), tmp_path / "requests.parquet")
    words = ["score", str(run), str(tmp_path / "requests.parquet"), str(tmp_path / "scores.parquet"), "--calibrated"]
    assert cli.main(words) == 0
    np.testing.assert_allclose(pq.read_table(tmp_path / "scores.parquet")["scores"][0].as_py(), wanted, rtol=1e-5)


def test_scores_of_one_stay_below_one_and_in_order(prepared: Prepared) -> None:
    class Sure:
        def score(self, **arguments: object) -> torch.Tensor:
            return torch.tensor([1.0, 0.5, 0.0])

    items = [prepared.item_name(number) for number in (1, 2, 3)]
    scores = Scorer(Sure(), prepared, calibration=lambda x: x - 3).score(items, items)
    assert np.isfinite(scores).all()
    assert scores[0] > scores[1] > scores[2] >= 0


def test_validation_fits_on_the_validation_split(run: Path) -> None:
    found = calibrate(run, "validation")
    assert found.base_rate is None
    assert found.before["base_rate"] == 0.5
    rare = calibrate(run, "validation", base_rate=0.01)
    assert (rare.slope, rare.offset) == (found.slope, pytest.approx(found.offset - np.log(99)))
    assert abs(rare.after["mean_prediction"] - 0.01) < 0.01


def test_none_removes_it(run: Path, tmp_path: Path) -> None:
    calibrate(run, "validation")
    found = calibrate(run, "none")
    assert (found.slope, found.offset) == (1.0, 0.0)
    assert found.before == found.after
    with pytest.raises(FileNotFoundError, match="dien-kernels calibrate"):
        read_calibration(run)


def test_what_is_refused(run: Path) -> None:
    for method, rate, words in (
        ("sampled", None, "method must be one of"),
        ("sampling", None, "base_rate must be given for method 'sampling'"),
        ("sampling", 1.0, "base_rate must lie between 0 and 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(run, method, base_rate=rate)
    calibrate(run, "validation")
    stored = json.loads((run / CALIBRATION).read_text())
    (run / CALIBRATION).write_text(json.dumps({**stored, "best_step": -1}))
    with pytest.raises(ValueError, match="calibrate the run again"):
        read_calibration(run)
    (run / CALIBRATION).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_calibration(run)


def test_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", str(run), "--method", "sampling", "--base-rate", "0.02"]) == 0
    out = capsys.readouterr().out
    assert "sampling: logits become 1.0000 x + -3.8918" in out
    assert "before: calibration error" in out
