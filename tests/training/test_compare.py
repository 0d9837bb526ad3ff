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

from dien_kernels.data import Prepared
from dien_kernels.training import Config, compare, evaluate
from dien_kernels.training.compare import ROWS, row_config, table
from dien_kernels.training.evaluation import Predictions
from dien_kernels.training.metrics import bootstrap_difference

MakeConfig = Callable[..., Config]
MODULE = sys.modules["dien_kernels.training.compare"]  # the package shows the function under this name


@pytest.mark.slow
def test_rows_and_seeds(config_of: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("table", "training.epochs=1", "model.options.attention.kind=din")
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
    with pytest.raises(ValueError, match=r"another config: optimizer\.lr was 0\.01, is 0\.02.*another output\.folder"):
        compare(config.override(["optimizer.lr=0.02"]), ["average", "dien"], [0, 1])


def test_what_a_row_changes(config_of: MakeConfig) -> None:
    config = config_of(
        "table", "model.options.auxiliary.kind=mlp", "model.options.evolution.kind=agru", "model.preset=paper"
    )
    made = {name: row_config(config, name, 3) for name in ROWS}
    assert all(c.training.seed == 3 for c in made.values())
    assert "auxiliary" not in made["average"].model.options  # it has no such option
    assert made["dien"].model.options["auxiliary"] == {"kind": "mlp"}
    assert made["dien"].model.options["evolution"] == {"kind": "agru"}
    assert made["gru_attention"].model.options["evolution"] == {}  # that model decides it
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


def test_data_of_earlier_runs_are_not_replaced(config_of: MakeConfig, prepared: Prepared) -> None:
    """The same folder with other options would leave the runs in it without the data they were trained on."""
    raw = prepared.path.parent / "logs.parquet"
    config = config_of("table", f"data.path={raw}", "training.epochs=1")
    first = compare(config, ["average"], [0])
    for change in ("data.prepare.targets=every", "data.prepare.seed=1"):
        with pytest.raises(ValueError, match="other options, and the runs in .* need it: choose another output.folder"):
            compare(config.override([change]), ["average"], [0])
    assert evaluate(Path(config.output.folder) / "average-seed0").to_dict() == first["runs"][0]["test"]
    assert compare(config, ["average"], [0])["runs"] == first["runs"]


def test_runs_of_fewer_epochs_go_on_and_of_more_are_refused(config_of: MakeConfig) -> None:
    """The number of epochs is free on resumption, but a table must not mix them."""
    short, long = (config_of(f, f"training.epochs={n}") for f, n in (("table", 1), ("long", 2)))
    one = compare(short, ["average"], [0])["runs"][0]
    two = compare(long, ["average"], [0])["runs"][0]
    again = compare(short.override(["training.epochs=2"]), ["average"], [0])["runs"][0]
    timed = ("training_seconds", "samples_per_second")
    assert one["steps"] < again["steps"]
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}
    with pytest.raises(ValueError, match=r"another config: training\.epochs was 2, is 1; choose another"):
        compare(short, ["average"], [0])


def test_differences_need_the_same_test_rows(config_of: MakeConfig) -> None:
    config = config_of("table", "training.epochs=1")
    compare(config, ["average", "dien"], [0], samples=10)
    path = Path(config.output.folder) / "average-seed0" / "predictions-test.parquet"
    found = Predictions.read(path)
    assert found.group is not None
    found._replace(group=found.group[::-1].copy()).save(path)  # labels alone, 1 0 1 0 ..., would not tell
    with pytest.raises(ValueError, match="the test rows of average are not those of dien"):
        compare(config, ["average", "dien"], [0], samples=10)
