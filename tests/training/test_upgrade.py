"""Runs that were written before options stood in groups: they are opened, evaluated and resumed.

The batches of the stored run are stored with it, as its order of samples and its negatives were those of that version.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dien_kernels.batch import Batch, Schema
from dien_kernels.models import MODELS, build
from dien_kernels.models.options import RENAMED, from_flat
from dien_kernels.training import Config, evaluation, load, logs, open_run, setup, train
from dien_kernels.training import checkpoint as ck
from dien_kernels.training.upgrade import load_saved, upgrade_checkpoint, upgrade_config
from tests.models.common import SCHEMA

HERE = Path(__file__).parent
STORED = json.loads((HERE / "run_of_version_1.json").read_text())
BATCHES = json.loads((HERE / "batches_of_version_1.json").read_text())
# The stored numbers are float32 of another machine, whose kernels may add in another order: a few hundred roundings.
RTOL = 1e-4


def decoded(value: Any) -> Any:
    """Tensors (raw bytes in base64), dicts and lists from JSON."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        raw = np.frombuffer(base64.b64decode(value["tensor"]), value["dtype"])
        return torch.from_numpy(raw.copy()).reshape(value["shape"])
    if "dict" in value:
        return {decoded(key): decoded(inner) for key, inner in value["dict"]}
    return [decoded(inner) for inner in value["list"]]


def batch_of(stored: dict[str, list[Any]]) -> Batch:
    """A batch of the stored run, with the fields of its items and the labels as the model takes them."""

    def fields(name: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor(stored[name])
        others = {key: torch.tensor(table)[ids] for key, table in BATCHES["item_fields"].items()}
        return {"item": ids, **others}

    return Batch(
        fields("history"),
        torch.tensor(stored["offsets"]),
        fields("target"),
        torch.tensor(stored["label"], dtype=torch.float32),
        torch.tensor(stored["history_of"]),
        negatives=fields("negatives") if "negatives" in stored else None,
        group=torch.tensor(stored["group"]),
    )


class StoredLoader:
    """The loader of one split, with the batches that the first version made."""

    def __init__(self, split: str) -> None:
        self.epochs = [[batch_of(stored) for stored in epoch] for epoch in BATCHES[split]]

    def steps(self, epoch: int) -> int:
        return len(self.epochs[epoch])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return iter(self.epochs[epoch][start:])


def stored_loader(config: Config, prepared: Any, split: str) -> StoredLoader:
    """In the place of ``setup.open_loader``. The options of the config are those that the batches were made with."""
    data = config.data
    assert (data.batch_size, data.max_length, data.negatives, data.auxiliary_negatives) == (64, 100, 1, 1)
    assert (config.training.seed, data.history) == (0, True)
    return StoredLoader(split)


@pytest.fixture
def run(tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """The folder of the stored run, stopped in its second epoch, and what a run asks of its prepared data."""
    path, schema = tmp_path / "prepared", Schema.from_dict(BATCHES["schema"])
    prepared = SimpleNamespace(path=path, schema=schema, fingerprint="of the stored run", meta={"dense": {}})
    monkeypatch.setattr(setup, "open_data", lambda config, reuse=False: prepared)
    monkeypatch.setattr(setup, "open_loader", stored_loader)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(STORED["config.yaml"].replace("FOLDER", str(tmp_path)))
    content, best = (decoded(STORED[name]) | {"fingerprint": prepared.fingerprint} for name in ("checkpoint", "best"))
    for part in (content, best):
        part["config"]["data"]["path"] = str(path)
    ck.save_step(folder / "checkpoints", content["state"]["total"], content)
    ck.save(folder / "checkpoints" / "best.pt", best)
    rows = [
        {"kind": "train", "total": total, "epoch": 0, "loss": loss, "click": click, "auxiliary": auxiliary}
        for total, loss, click, auxiliary in STORED["losses"][: content["state"]["total"]]
    ]
    (folder / logs.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, prepared


def test_the_config_is_what_it_was(run: tuple[Path, Any]) -> None:
    config = load_saved(run[0] / "config.yaml")
    assert config.model.options == {
        "embedding": {"size": 2},
        "head": {"units": [4]},
        "attention": {"units": [3], "query": "prelu"},
        "auxiliary": {"units": [3], "weight": 0.5},
        "extractor": {"gate_bias": 0.5},
        "evolution": {"gate_bias": 0.5},
    }
    assert (config.optimizer.lr, config.optimizer.table_lr) == (0.01, 0.02)
    assert config.optimizer.options == {"weight_decay": 0.001}
    assert (config.schedule.name, config.schedule.options) == ("ExponentialLR", {"gamma": 0.5})
    with pytest.raises(ValueError, match="the key training.lr is now optimizer.lr"):
        load(run[0] / "config.yaml")  # what a user writes is not converted


def test_a_seed_gives_the_weights_it_gave(run: tuple[Path, Any]) -> None:
    folder, prepared = run
    state = setup.make_model(load_saved(folder / "config.yaml"), prepared.schema).state_dict()
    for key, value in decoded(STORED["start"]).items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=0)
    assert state.keys() == decoded(STORED["checkpoint"])["model"].keys()


def test_a_new_run_has_the_losses_of_the_old_one(run: tuple[Path, Any]) -> None:
    folder = run[0].parent / "again"
    train(load_saved(run[0] / "config.yaml").with_("output", folder=str(folder)))
    rows = [r for r in logs.read(folder / logs.FILE) if r["kind"] == "train"]
    found = [[row[name] for name in ("total", "loss", "click", "auxiliary")] for row in rows]
    np.testing.assert_allclose(found, STORED["losses"], rtol=RTOL)


def test_the_best_model_is_opened(run: tuple[Path, Any]) -> None:
    folder, prepared = run
    config, _, model = open_run(folder)
    best = decoded(STORED["best"])
    for key, value in model.state_dict().items():
        assert torch.equal(value, best["model"][key]), key
    found = evaluation.predict(model, setup.open_loader(config, prepared, "valid"), config).measure()
    assert found.log_loss == pytest.approx(best["valid"]["log_loss"], rel=RTOL)


def test_the_run_goes_on(run: tuple[Path, Any]) -> None:
    """With the losses of the version that began it: weights, moments, step sizes and places are all there."""
    folder, _ = run
    result = train(load_saved(folder / "config.yaml"), resume=True)
    rows = [r for r in logs.read(folder / logs.FILE) if r["kind"] == "train"]
    assert len(rows) == len(STORED["losses"]) == 14
    done = decoded(STORED["checkpoint"])["state"]["total"]
    assert done < 13
    for row, (total, *losses) in zip(rows[done:], STORED["losses"][done:], strict=True):
        assert row["total"] == total
        np.testing.assert_allclose([row["loss"], row["click"], row["auxiliary"]], losses, rtol=RTOL)
    assert result["best_step"] == STORED["result"]["best_step"]
    assert result["test"]["log_loss"] == pytest.approx(STORED["result"]["test"]["log_loss"], rel=RTOL)
    assert (folder / "config.yaml").read_text().startswith("version: 2")
    newest = ck.load(ck.steps(folder / "checkpoints")[0])
    assert upgrade_checkpoint(newest) == newest  # it is of this version, and nothing is converted twice
    assert [group["lr"] for group in newest["optimizer"]["dense"]["param_groups"]] == [0.01 * 0.25]


def test_a_checkpoint_at_the_end_of_an_epoch_gets_the_step_size_of_the_next() -> None:
    """The first version set it when the next epoch began, so that in the checkpoint it is still the old one."""
    content = decoded(STORED["checkpoint"])
    content["state"] |= {"epoch": 3, "step": 0}
    upgraded = upgrade_checkpoint(content)
    assert [g["lr"] for g in upgraded["optimizer"]["dense"]["param_groups"]] == [0.01 * 0.125]
    assert [g["lr"] for g in upgraded["optimizer"]["tables"]["param_groups"]] == [0.02 * 0.125]
    assert upgraded["schedule"]["last_epoch"] == 3
    assert upgraded["state"]["best"] == content["state"]["best_auc"]


def test_defaults_of_the_first_version_are_defaults() -> None:
    plain = {"training": {"lr": 1e-3, "embedding_lr": None, "lr_decay": 1.0, "weight_decay": 0.0}, "model": {}}
    upgraded = upgrade_config(plain)
    assert upgraded["schedule"] == {}
    assert upgraded["optimizer"] == {"lr": 1e-3, "table_lr": None}


@pytest.mark.parametrize("name", MODELS)
def test_every_old_option_has_a_new_place(name: str) -> None:
    """Old names that the model had are options of the model now: it is built with every one of them."""
    values = {
        "embedding_size": 3,
        "mlp": [4],
        "embedding_std": 0.1,
        "sparse": False,
        "activation": "relu",
        "dice_statistics": "batch",
        "norm": "fixed",
        "outputs": 2,
        "click_weight": 0.5,
        "click_reduction": "sum",
        "click_eps": 1e-8,
        "pooling": "mean",
        "init": "glorot",
        "prelu_init": 0.1,
    }
    gru = {f"extractor_{k}": v for k, v in (("reset", "before"), ("update", "candidate"), ("bias", "single"))}
    gru |= {"gate_bias": 1.0}
    attention = {"attention": "din", "attention_units": [3], "attention_activation": "relu", "attention_scale": 0.5}
    attention |= {"attention_normalize": "sigmoid", "query": "prelu"}
    second = {"evolution_reset": "before", "evolution_update": "keep", "evolution_bias": "single"}
    second |= {"gru_readout": "attention"}
    auxiliary = {"auxiliary": "mlp", "auxiliary_weight": 0.5, "auxiliary_units": [3], "auxiliary_activation": "relu"}
    auxiliary |= {
        "auxiliary_outputs": 2,
        "auxiliary_norm": "fixed",
        "auxiliary_normalizer": "row",
        "auxiliary_eps": 0.1,
    }
    if name in ("dien", "gru_attention", "gru"):
        values |= gru | {"hidden_size": 5}
    if name in ("dien", "gru_attention", "din"):
        values |= attention
    if name in ("dien", "gru_attention"):
        values |= second | auxiliary
    if name == "dien":
        values |= {"evolution": "augru", "form": "authors"}
        assert set(values) >= set(RENAMED)
    model = build(name, SCHEMA, from_flat(name, values))
    assert model.click.reduction == "sum"
    assert model.mlp.last.out_features == 2
    if name == "dien":
        assert model.evolution.form == "authors"
        assert model.extractor.hidden_size == 5
        assert (model.auxiliary.normalizer, model.auxiliary.eps, model.auxiliary_weight) == ("row", 0.1, 0.5)


def test_an_auxiliary_loss_that_was_off_stays_off() -> None:
    assert from_flat("dien", {"auxiliary": None, "auxiliary_weight": 0.5}) == {"auxiliary": None}
    assert from_flat("gru_attention", {"auxiliary_units": [3]}) == {}
    assert from_flat("dien", {"auxiliary_units": [3]}) == {"auxiliary": {"units": [3]}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 3}, "checkpoint here.pt must be of version 2 or older, got version 3"),
        ({"version": "two"}, "must be of version 2 or older, got version 'two'"),
        ({"config": None}, "checkpoint here.pt is none of a training step: it has no config$"),
        ({"state": {"epoch": 1}}, "checkpoint here.pt is none of a training step: it has no state.best_auc$"),
        ({"state": 3}, "it has no state.best_auc, state.epoch"),
        ({"version": 2}, "it has no schedule$"),
        ({"config": {"model": "dien"}}, "here.pt of the first version cannot be converted: model must be a mapping"),
    ],
)
def test_checkpoints_that_cannot_be_read_are_named(change: dict[str, Any], message: str) -> None:
    content = {**decoded(STORED["checkpoint"]), **change}
    content = {name: part for name, part in content.items() if part is not None}
    with pytest.raises(ck.CheckpointError, match=message):
        upgrade_checkpoint(content, "here.pt")


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {options: [1]}", r"model.options must be a mapping from names to values, got \[1\]"),
        ("model: {options: {1: 2}}", "model.options must be a mapping from names to values, got {1: 2}"),
        ("model: {options: {head: 3, mlp: [4]}}", "the option head must be a mapping from names to values, got 3"),
        ("model: dien", "model must be a mapping from names to values, got 'dien'"),
        ("training: [1]", r"training must be a mapping from names to values, got \[1\]"),
        ("optimizer: {name: SGD}", "version must be 2 in a config with the section optimizer, got none: add the line"),
        ("schedule: {name: ConstantLR}", "version must be 2 in a config with the section schedule"),
    ],
)
def test_saved_configs_that_cannot_be_read_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"config.yaml: {message}"):
        load_saved(path)
