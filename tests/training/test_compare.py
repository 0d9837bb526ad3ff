"""The comparison: same data for every row, finished runs kept, intervals paired."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dien_kernels.training import Config, compare
from dien_kernels.training.compare import ROWS, row_config, table
from dien_kernels.training.evaluation import Predictions
from dien_kernels.training.metrics import bootstrap_difference

MakeConfig = Callable[..., Config]
MODULE = sys.modules["dien_kernels.training.compare"]  # the package shows the function under this name


def test_rows_and_seeds(config_of: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("table", "training.epochs=1", "model.options.attention=din")
    trained: list[str] = []
    real = MODULE.train

    def counted(run: Config, **options: Any) -> dict[str, Any]:
        trained.append(Path(run.output.folder).name)
        return dict(real(run, **options))

    monkeypatch.setattr(MODULE, "train", counted)
    content = compare(config, ["average", "dien"], [0, 1], samples=100)
    assert trained == ["average-seed0", "dien-seed0", "average-seed1", "dien-seed1"]
    folder = Path(config.output.folder)
    assert json.loads((folder / "comparison.json").read_text()) == content
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    assert [(r["row"], r["seed"]) for r in rows] == [
        ("average", "0"),
        ("average", "1"),
        ("dien", "0"),
        ("dien", "1"),
    ]

    aucs = [float(r["test_auc"]) for r in rows if r["row"] == "dien"]
    assert content["summary"]["dien"]["auc"]["mean"] == pytest.approx(np.mean(aucs))
    assert content["summary"]["dien"]["auc"]["std"] == pytest.approx(abs(aucs[0] - aucs[1]) / 2**0.5)

    ours, theirs = (
        [Predictions.read(folder / f"{name}-seed{seed}" / "predictions-test.parquet") for seed in (0, 1)]
        for name in ("dien", "average")
    )
    assert ours[0].group is not None
    expected = bootstrap_difference(
        ours[0].label, ours[0].group, [p.logit for p in ours], [p.logit for p in theirs], samples=100
    )
    assert tuple(content["differences"]["average"].values()) == expected

    text = table(content)
    assert "| average " in text
    assert f"{np.mean(aucs):.4f} ± " in text
    assert "over 2 seeds" in text

    # Finished pairs are not trained again, a new one is.
    trained.clear()
    again = compare(config, ["average", "dien", "gru"], [0, 1], samples=100)
    assert trained == ["gru-seed0", "gru-seed1"]
    assert again["differences"]["average"] == content["differences"]["average"]
    with pytest.raises(ValueError, match=r"another config: training\.lr was 0\.01, is 0\.02.*another output\.folder"):
        compare(config.override(["training.lr=0.02"]), ["average", "dien"], [0, 1])


def test_what_a_row_changes(config_of: MakeConfig) -> None:
    config = config_of("table", "model.options.auxiliary=mlp", "model.preset=paper")
    made = {name: row_config(config, name, 3) for name in ROWS}
    assert all(c.training.seed == 3 for c in made.values())
    assert "auxiliary" not in made["average"].model.options  # it has no such option
    assert made["dien"].model.options["auxiliary"] == "mlp"
    assert made["dien_no_auxiliary"].model.options["auxiliary"] is None
    assert made["gru_attention"].model.options["auxiliary"] is None
    assert not made["target_only"].data.history
    assert len({repr(c.training) for c in made.values()}) == 1
    assert all(c.data == config.data for name, c in made.items() if name != "target_only")


def test_bad_wishes(config_of: MakeConfig) -> None:
    with pytest.raises(ValueError, match="models must be some of target_only, average"):
        compare(config_of("table"), ["wide"])
    with pytest.raises(ValueError, match="seeds must be different"):
        compare(config_of("table"), ["dien"], [1, 1])
