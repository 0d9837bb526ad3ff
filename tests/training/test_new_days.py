"""New days: a run that begins where an earlier one ended, trained on new events, judged on days it has not seen."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from dien_kernels import cli
from dien_kernels.batch import Schema
from dien_kernels.data import Loader, Prepared, prepare, verify
from dien_kernels.data.append import append
from dien_kernels.data.earlier import Earlier
from dien_kernels.data.encode import encode
from dien_kernels.models import build
from dien_kernels.training import Config, evaluate, open_run, setup, train
from dien_kernels.training import checkpoint as ck
from dien_kernels.training.evaluation import predict
from dien_kernels.training.optimizer import make_optimizer
from dien_kernels.training.start import growing_tables, widened, widened_moments
from dien_kernels.training.step import training_step

OLD, NEW = Schema({"item": 6, "cat": 3}, {"age": 3}), Schema({"item": 9, "cat": 3}, {"age": 5})
SMALL: dict[str, Any] = {"embedding": {"size": 4}, "head": {"units": [4]}}


def day(first_block: int, time: int, users: int = 150, events: int = 6) -> pa.Table:
    """Everybody likes the ten items of one block, of five from ``first_block`` on."""
    draw = np.random.default_rng(first_block)
    user = np.repeat(np.arange(users), events)
    item = 10 * (first_block + user % 5) + draw.integers(0, 10, user.size)
    times = time + np.tile(np.arange(events), users)
    return pa.table({"user": user, "item": item, "timestamp": times, "category": item // 10})


def config_for(data: Path, folder: Path, *overrides: str) -> Config:
    base = {
        "data": {"path": str(data), "batch_size": 64},
        "model": {"name": "average", "options": {"embedding": {"size": 4}, "head": {"units": [8]}}},
        "optimizer": {"lr": 0.02},
        "training": {"threads": 1, "epochs": 4, "log_every": 1},
        "output": {"folder": str(folder), "tensorboard": False, "report": False, "progress": False},
    }
    return Config.from_dict(base).override(overrides)


@pytest.fixture
def grown(tmp_path: Path, one_thread: None) -> tuple[Path, Path]:
    """A folder that has grown by a day, and the run that was trained before."""
    prepare(day(0, 0), tmp_path / "p", targets="every", fractions=(0.6, 0.2, 0.2), progress=False)
    train(config_for(tmp_path / "p", tmp_path / "run"))
    append(day(5, 1000), tmp_path / "p", progress=False)
    return tmp_path / "p", tmp_path / "run"


def test_widened_keeps_old_rows_and_draws_new_ones() -> None:
    torch.manual_seed(0)
    old = build("average", OLD, SMALL)
    torch.manual_seed(1)
    new = build("average", NEW, SMALL)
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    found = widened(old.state_dict(), fresh, growing_tables(new))
    assert growing_tables(new) == {f"embeddings.{name}.weight" for name in ("items.item", "items.cat", "users.age")}
    for name, value in old.state_dict().items():
        rows = value.shape[0] if value.dim() else None
        assert torch.equal(found[name][:rows] if rows else found[name], value), name
    assert torch.equal(found["embeddings.items.item.weight"][6:], fresh["embeddings.items.item.weight"][6:])
    assert torch.equal(found["embeddings.users.age.weight"][3:], fresh["embeddings.users.age.weight"][3:])
    assert found["embeddings.items.item.weight"].data_ptr() != fresh["embeddings.items.item.weight"].data_ptr()


def test_widened_keeps_the_scaling_of_numbers_and_pretrained_rows() -> None:
    def model(rows: int, mean: float) -> nn.Module:
        schema = Schema({"item": rows}, {}, ("price", "age"))
        numbers = {"mean": mean, "std": 2.0, "missing": 0.1, "log": False, "quantiles": [mean, mean + 1]}
        options = {
            "embedding": {"size": 4, "pretrained": {"item": torch.full((rows, 4), mean)}},
            "dense": {"scaling": {"age": "quantiles"}},
            "head": {"units": [4]},
        }
        return build("average", schema, options, statistics={"price": numbers, "age": numbers})

    old, new = model(5, 1.0), model(8, 3.0)
    found = widened(old.state_dict(), new.state_dict(), growing_tables(new))
    new.load_state_dict(found)
    assert found["embeddings.dense.mean"].tolist() == [1.0]
    assert found["embeddings.dense.quantiles.age.bounds"].tolist() == [1.0, 2.0]
    assert found["embeddings.items.item.weight"][:, 0].tolist() == [0.0, 1, 1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("schema", "options", "words"),
    [
        (Schema({"item": 5, "cat": 3}, {"age": 3}), SMALL, r"items\.item\.weight: got .*\(6, 4\).*wanted .*\(5, 4\)"),
        (NEW, {**SMALL, "embedding": {"size": 5}}, r"items\.item\.weight: got .*\(6, 4\).*wanted .*\(9, 5\)"),
        (NEW, {**SMALL, "head": {"units": [6]}}, r"mlp.*got .*wanted"),
        (Schema({"item": 6}, {"age": 3}), SMALL, r"items\.cat\.weight: got one in the earlier run, wanted nothing"),
    ],
)
def test_widened_refuses_what_does_not_fit(schema: Schema, options: dict[str, Any], words: str) -> None:
    old, new = build("average", OLD, SMALL), build("average", schema, options)
    with pytest.raises(ValueError, match=words):
        widened(old.state_dict(), new.state_dict(), growing_tables(new))


@pytest.mark.parametrize("optimizer", ["LazyAdam", "Adam"])
def test_moments_come_along_with_zeros_for_new_rows(grown: tuple[Path, Path], optimizer: str) -> None:
    data, _ = grown
    words = [f"optimizer.name={optimizer}", f"model.options.embedding.sparse={str(optimizer == 'LazyAdam').lower()}"]
    small = Earlier(Prepared.open(data), {"item": 51, "category": 6})
    config = config_for(data, data.parent / "m", *words)
    models, optimizers = [], []
    for prepared in (small, Prepared.open(data)):
        models.append(setup.model_for(config, prepared))
        optimizers.append(make_optimizer(models[-1], optimizer, lr=0.01))
    loader = setup.open_loader(config, small, "train")
    for batch in loader.epoch(0):
        training_step(models[0], batch, optimizers[0])
    old, fresh = (each.state_dict() for each in optimizers)
    pairs = [(old, fresh)] if optimizer == "Adam" else [(old[part], fresh[part]) for part in ("dense", "tables")]
    parameters = [p for group in optimizers[1].param_groups for p in group["params"]]
    widest = 0
    for before, now in pairs:
        count = sum(len(group["params"]) for group in now["param_groups"])
        found = widened_moments(before, now, parameters[:count])
        for number, entries in before["state"].items():
            for name, value in entries.items():
                moved = found["state"][number][name]
                if isinstance(value, torch.Tensor) and value.dim():
                    rows = value.shape[0]
                    assert torch.equal(moved[:rows], value)
                    assert not moved[rows:].any()
                    assert moved.shape == parameters[number].shape
                    widest = max(widest, moved.shape[0] - rows)
                else:
                    assert moved == value
        assert found["param_groups"] == now["param_groups"]
        parameters = parameters[count:]
    assert widest > 0


@pytest.mark.parametrize("moments", ["false", "true"])
def test_second_day(grown: tuple[Path, Path], moments: str, tmp_path: Path) -> None:
    data, run = grown
    later = [f"training.start_from={run}", "data.since=latest", f"training.start_moments={moments}"]
    config = config_for(data, tmp_path / "later", *later)
    prepared = Prepared.open(data)
    loader = setup.open_loader(config, prepared, "train")
    assert 0 < len(loader) < len(Loader(prepared, "train", batch_size=64))
    names = prepared.vocabulary("item")
    targets = torch.cat([batch.target["item"][batch.label == 1] for batch in loader.epoch(0)])
    assert min(names.name(int(target)) for target in targets) >= 50  # items of the second day alone
    held = Loader(prepared, "test", batch_size=256, since="latest")
    assert held.since == 1
    train(config)
    later_model = open_run(tmp_path / "later")[2]
    untrained = setup.model_for(config, prepared)
    old = ck.load(run / "checkpoints" / "best.pt")["model"]
    untrained.load_state_dict(widened(old, untrained.state_dict(), growing_tables(untrained)))
    before, after = (predict(model, held, config).measure() for model in (untrained, later_model))
    assert after.log_loss < before.log_loss - 0.03
    assert after.auc > before.auc
    assert evaluate(tmp_path / "later").rows == prepared.split_size("test") * 2


def test_old_ids_keep_their_rows_at_the_start(grown: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = grown
    config = config_for(data, tmp_path / "later", f"training.start_from={run}", "optimizer.lr=1e-30")
    train(config)
    _, earlier, old = open_run(run)
    _, now, new = open_run(tmp_path / "later")
    assert isinstance(earlier, Earlier)
    raw = pa.array([3, 17, 42])
    assert (earlier.encode_items(raw) == now.encode_items(raw)).all()
    tables = [model.embeddings.items["item"].weight for model in (old, new)]
    assert torch.equal(tables[0], tables[1][: tables[0].shape[0]])
    assert tables[1].shape[0] > tables[0].shape[0]
    assert earlier.encode_items(pa.array([73])) == 0 < now.encode_items(pa.array([73]))


def test_a_resumed_run_does_not_start_again(grown: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = grown
    config = config_for(data, tmp_path / "later", f"training.start_from={run}", "training.epochs=1")
    train(config)
    (run / "checkpoints").rename(tmp_path / "gone")
    assert train(config.override(["training.epochs=2"]), resume=True)["epochs"] == 2


def test_other_data_models_and_optimizers_are_refused(grown: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = grown
    other = prepare(day(1, 0), tmp_path / "other", progress=False).path
    refused: list[tuple[Path, list[str], str]] = [
        (other, [], "has not grown from the data of training.start_from=.* ancestors, got"),
        (data, ["model.options.head.units=[9]"], r"model.options.head.units was \[8\], is \[9\]"),
        (data, ["model.name=din"], "model.name was 'average', is 'din'"),
        (data, ["training.start_moments=true", "optimizer.name=SGD"], "optimizer.name=LazyAdam.*got SGD"),
        (data, ["training.start_from=" + str(tmp_path / "nothing")], "holds no run to start from"),
    ]
    for path, words, message in refused:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            train(config_for(path, tmp_path / "later", f"training.start_from={run}", *words))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"training\.start_from must be set"):
        Config.from_dict({"training": {"start_moments": True}})
    with pytest.raises(ValueError, match=r"data\.since must be an integer or 'latest', got 'newest'"):
        Config.from_dict({"data": {"since": "newest"}})
    with pytest.raises(ValueError, match="since must be at most 1, the appends of .*, got 2"):
        Loader(Prepared.open(data), "train", since=2)


def test_options_that_only_steer_the_training_may_differ(grown: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = grown
    words = [f"training.start_from={run}", "model.options.embedding.l2=0.001", "training.epochs=1"]
    assert train(config_for(data, tmp_path / "later", *words, "model.options.embedding.std=0.05"))["steps"] > 0


def test_evaluate_on_the_grown_folder_knows_old_ids_alone(grown: tuple[Path, Path]) -> None:
    data, run = grown
    prepared = Prepared.open(data)
    own, named = evaluate(run), evaluate(run, data=data)
    assert own == named
    assert named.rows == 2 * prepared.split_size("test")
    assert 0 < named.unknown < named.rows
    assert evaluate(run, data=data, split="valid").rows == 2 * prepared.split_size("valid")


def test_earlier_is_the_folder_with_fewer_ids(grown: tuple[Path, Path]) -> None:
    whole = Prepared.open(grown[0])
    view = Earlier(whole, {"item": 7, "category": 3})
    for number in range(len(whole.units)):
        ids = whole.read_unit(number).item
        assert (view.read_unit(number).item == np.where(ids < 7, ids, 0)).all()
    assert view.item_counts.sum() == whole.item_counts.sum()
    assert view.vocabulary("item").size == 7
    again = pickle.loads(pickle.dumps(view))
    batches = [next(iter(Loader(each, "train", batch_size=64).epoch(0))) for each in (view, again)]
    assert torch.equal(batches[0].history["item"], batches[1].history["item"])
    assert max(int(batches[0].target[name].max()) for name in ("item",)) < 7
    for sizes, words in (({"item": 7}, "must name the fields"), ({"item": 1000, "category": 3}, "between 1 and")):
        with pytest.raises(ValueError, match=words):
            Earlier(whole, sizes)


@pytest.mark.parametrize("labels", ["next", "given"])
def test_raw_logs_are_read_with_the_ids_of_the_run(
    tmp_path: Path, one_thread: None, labels: str, caplog: pytest.LogCaptureFixture
) -> None:
    draw = np.random.default_rng(0)

    def labelled(table: pa.Table) -> pa.Table:
        clicks = draw.integers(0, 2, table.num_rows)
        return table.append_column("label", pa.array(clicks)) if labels == "given" else table

    first, second = labelled(day(0, 0)), labelled(day(3, 1000, users=40))
    prepared = prepare(first, tmp_path / "p", labels=labels, fractions=(0.6, 0.2, 0.2), progress=False)
    train(config_for(tmp_path / "p", tmp_path / "run", "training.epochs=1"))
    pq.write_table(second, tmp_path / "day.parquet")
    metrics = evaluate(tmp_path / "run", data=tmp_path / "day.parquet")
    assert metrics.rows == (2 * 40 * 5 if labels == "next" else second.num_rows)
    unknown = [item not in set(first["item"].to_pylist()) for item in second["item"].to_pylist()]
    assert f"{sum(unknown)} rows have no item that the run knows" in caplog.text
    if labels == "given":
        assert metrics.unknown == sum(unknown)
    encoded = encode(second, tmp_path / "e", prepared)
    assert verify(encoded) == []
    assert encoded.schema == prepared.schema
    assert encoded.meta["report"]["unknown:item"] == sum(unknown)
    assert encoded.vocabulary("item").values.equals(prepared.vocabulary("item").values)
    assert metrics == evaluate(tmp_path / "run", data=second)


def test_evaluate_refuses_other_data(grown: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = grown
    other = prepare(day(1, 0), tmp_path / "other", progress=False)
    pq.write_table(day(0, 0), tmp_path / "day.parquet")
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: evaluate(run, data=other.path), "has not grown from the data of the run"),
        (lambda: evaluate(run, "test", data=tmp_path / "day.parquet"), "split must be left out for raw logs"),
        (lambda: evaluate(run, data=data, log={"format": "csv"}), "log must be left out"),
        (lambda: evaluate(run, data=tmp_path / "day.parquet", log={"labels": "next"}), "log must have keys of"),
        (lambda: evaluate(run, data=day(0, 0, events=1)), "there is nothing to evaluate"),
    ]
    for call, words in refused:
        with pytest.raises(ValueError, match=words):
            call()


def test_commands(grown: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = grown
    pq.write_table(day(5, 1000).rename_columns(["who", "item", "timestamp", "category"]), tmp_path / "day.parquet")
    assert cli.main(["evaluate", str(run), "--data", str(tmp_path / "day.parquet"), "--user", "who"]) == 0
    assert "items that the model does not know" in capsys.readouterr().out
    assert cli.main(["train", "--from", str(run), "--data", str(data)]) == 2
    assert "--out must name a folder for the new run" in capsys.readouterr().err
    assert cli.main(["train", "--from", str(run), "--out", str(tmp_path / "later"), "data.since=latest"]) == 0
    config = open_run(tmp_path / "later")[0]
    assert (config.training.start_from, config.model.name, config.data.since) == (str(run), "average", "latest")
