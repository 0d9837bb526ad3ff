"""The training loop: what it leaves behind, and that an interrupted run goes on as if nothing had been."""

from __future__ import annotations

import errno
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dien_kernels import cli
from dien_kernels.data import Loader, Prepared, prepare
from dien_kernels.training import (
    CheckpointError,
    Config,
    dump,
    evaluate,
    evaluation,
    logs,
    loop,
    open_run,
    setup,
    train,
)
from dien_kernels.training import checkpoint as ck

MakeConfig = Callable[..., Config]


def losses(folder: str) -> list[tuple[int, float, float, float]]:
    rows = logs.read(Path(folder) / logs.FILE)
    return [(r["total"], r["loss"], r["click"], r["auxiliary"]) for r in rows if r["kind"] == "train"]


def validations(folder: str) -> list[tuple[int, float]]:
    rows = logs.read(Path(folder) / logs.FILE)
    return [(r["total"], r["log_loss"]) for r in rows if r["kind"] == "valid"]


def same_weights(a: str, b: str) -> bool:
    first, second = (ck.load(ck.steps(Path(f) / "checkpoints")[0]) for f in (a, b))
    keys = first["model"].keys()
    return (
        all(torch.equal(first["model"][k], second["model"][k]) for k in keys)
        and first["state"].keys() == second["state"].keys()
    )


# Runs a config and does something to itself in step number AT.
_SCRIPT = """
import os, signal, sys, warnings
from dien_kernels import cli
from dien_kernels.training import loop
step = loop._Trainer._step
def hit(self, batch):
    if self.state.total == {at}:
        {what}
    step(self, batch)
loop._Trainer._step = hit
sys.exit(cli.main(["train", sys.argv[1]]))
"""


def run_and(what: str, at: int, config: Config, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    script = _SCRIPT.format(at=at, what=what)
    return subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)


def test_what_a_run_leaves_behind(config_of: MakeConfig, prepared: Prepared) -> None:
    config = config_of("run", "output.tensorboard=true", "training.log_every=4")
    result = train(config)
    folder = Path(config.output.folder)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml",
        "log.jsonl",
        "checkpoints",
        "result.json",
        "predictions-test.parquet",
        "tensorboard",
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} >= {"best.pt"}
    rows = logs.read(folder / logs.FILE)
    valid = [r for r in rows if r["kind"] == "valid"]
    best = max(valid, key=lambda r: r["auc"])
    assert result["best_step"] == best["total"]
    assert result["valid"]["auc"] == best["auc"]
    steps = setup.open_loader(config, prepared, "train").steps(0)
    assert steps > 7
    at = [*range(7, steps, 7), steps]  # of an epoch: every seven steps, and its end
    assert [r["total"] for r in valid] == [epoch * steps + step for epoch in range(2) for step in at]
    # The test metrics are those of the best model, whose predictions are kept.
    predictions = evaluation.Predictions.read(folder / "predictions-test.parquet")
    assert result["test"]["auc"] == pytest.approx(roc_auc_score(predictions.label, predictions.logit), abs=1e-12)
    assert predictions.group is not None
    assert len(np.unique(predictions.group)) == prepared.split_size("test")
    assert evaluate(folder).to_dict() == result["test"]
    assert evaluate(folder, "valid").auc == result["valid"]["auc"]
    assert list((folder / "tensorboard").glob("events*"))


def test_a_model_learns(config_of: MakeConfig) -> None:
    config = config_of("run", "training.epochs=6", "optimizer.lr=0.03", "training.validate_every=0")
    train(config)
    click = [row[2] for row in losses(config.output.folder)]
    assert np.mean(click[-10:]) < np.mean(click[:10]) - 0.02


def test_losses_are_a_function_of_the_seed(config_of: MakeConfig, whole: str) -> None:
    same, other = config_of("same"), config_of("other", "training.seed=1")
    torch.rand(3)  # whatever was drawn before must not matter
    for config in (same, other):
        train(config)
    assert losses(same.output.folder) == losses(whole)
    assert losses(other.output.folder) != losses(whole)
    assert same_weights(same.output.folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_in_mid_epoch_goes_on_with_equal_bits(
    config_of: MakeConfig, whole: str, tmp_path: Path, workers: int
) -> None:
    killed = config_of("killed", f"data.workers={workers}")
    steps = len(losses(whole)) // 2
    at = steps + 5  # in the second epoch, two steps after a checkpoint
    run = run_and("os.kill(os.getpid(), signal.SIGKILL)", at, killed, tmp_path)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (Path(killed.output.folder) / "result.json").exists()
    newest = ck.steps(Path(killed.output.folder) / "checkpoints")[0]
    assert newest.name == f"step-{steps + 3:09d}.pt"
    assert losses(killed.output.folder)[-1][0] == at
    half = Path(killed.output.folder) / "checkpoints" / ".step-000000001.pt.1.part"  # killed while it wrote
    half.write_text("half")
    result = train(killed, resume=True)
    assert not half.exists()
    assert losses(killed.output.folder) == losses(whole)
    assert validations(killed.output.folder) == validations(whole)
    assert same_weights(killed.output.folder, whole)
    assert result["test"] == evaluate(whole).to_dict()


@pytest.mark.slow
def test_sigint_saves_and_says_how_to_go_on(config_of: MakeConfig, whole: str, tmp_path: Path) -> None:
    stopped = config_of("it's stopped")
    run = run_and("signal.raise_signal(signal.SIGINT)", 4, stopped, tmp_path)
    assert run.returncode == 130
    assert "Traceback" not in run.stderr
    command = shlex.split(next(line for line in run.stderr.splitlines() if "--resume" in line))
    assert command == ["dien-kernels", "train", "--resume", stopped.output.folder]
    checkpoints = ck.steps(Path(stopped.output.folder) / "checkpoints")
    assert [p.name for p in checkpoints] == ["step-000000005.pt", "step-000000003.pt"]
    assert cli.main(command[1:]) == 0
    assert losses(stopped.output.folder) == losses(whole)


def test_a_finished_run_that_goes_on_has_no_result_of_before(config_of: MakeConfig, tmp_path: Path) -> None:
    config = config_of("run", "training.epochs=1")
    train(config)
    more = config.override(["training.epochs=2"])
    stop = functools.partial(signal.raise_signal, signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "_step", lambda self, batch: stop())
        with pytest.raises(loop.Interrupted):
            train(more, resume=True)
    assert not (Path(config.output.folder) / "result.json").exists()


@pytest.mark.slow
def test_second_sigint_exits_at_once(config_of: MakeConfig, tmp_path: Path) -> None:
    config = config_of("stopped")
    what = "signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)"
    run = run_and(what, 4, config, tmp_path)
    assert run.returncode == -signal.SIGINT
    assert [p.name for p in ck.steps(Path(config.output.folder) / "checkpoints")] == ["step-000000003.pt"]


def test_sigint_during_validation(config_of: MakeConfig, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = config_of("stopped")
    handler = signal.getsignal(signal.SIGINT)
    real = loop.predict

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "predict", interrupted)
        with pytest.raises(loop.Interrupted):
            train(stopped)
    assert validations(stopped.output.folder) == []
    train(stopped, resume=True)
    assert validations(stopped.output.folder) == validations(whole)
    assert losses(stopped.output.folder) == losses(whole)
    assert signal.getsignal(signal.SIGINT) is handler


def test_damaged_checkpoint_is_named_and_training_goes_on_from_the_one_before(
    whole: str, tmp_path: Path, config_of: MakeConfig
) -> None:
    cut = config_of("cut")
    shutil.copytree(whole, cut.output.folder)
    last, _ = ck.steps(Path(cut.output.folder) / "checkpoints")
    os.truncate(last, last.stat().st_size // 2)
    with pytest.warns(UserWarning, match=f"{last.name} is damaged"):
        train(cut, resume=True)
    assert losses(cut.output.folder) == losses(whole)
    assert same_weights(cut.output.folder, whole)


def test_another_config_or_other_data_are_refused(
    config_of: MakeConfig, prepared: Prepared, whole: str, tmp_path: Path
) -> None:
    config = config_of("run", "training.epochs=1")
    train(config)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config)
    with pytest.raises(ValueError, match=r"another config: optimizer\.lr was 0\.01, is 0\.5"):
        train(config_of("run", "optimizer.lr=0.5"), resume=True)
    logs_file = prepared.path.parent / "logs.parquet"
    other = prepare(logs_file, tmp_path / "other", targets="every", seed=1, progress=False)
    with pytest.raises(ValueError, match="fingerprint was"):
        train(config.with_("data", path=str(other.path)), resume=True)
    # More epochs and other workers are no other run.
    more = config_of("run", "training.epochs=2", "data.workers=1")
    train(more, resume=True)
    assert losses(more.output.folder) == losses(whole)


def test_early_stopping(config_of: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("run", "training.epochs=50", "training.patience=2", "training.validate_every=0")
    aucs = iter([0.6, 0.7, 0.65, 0.7, 0.9])  # the fourth is the second in a row that is not better than the best
    real = evaluation.Predictions.measure

    def scripted(self: evaluation.Predictions) -> Any:
        return real(self)._replace(auc=next(aucs))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Predictions, "measure", scripted)
        result = train(config)
    assert result["stopped_early"]
    assert result["epochs"] == 4
    assert result["valid"]["auc"] == 0.7
    assert result["best_step"] == result["steps"] // 2
    # A stopped run stays stopped.
    assert train(config, resume=True)["steps"] == result["steps"]


def test_early_stopping_on_a_metric_that_is_better_when_lower(
    config_of: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("training.epochs=50", "training.patience=2", "training.validate_every=0", "training.metric=log_loss")
    config = config_of("run", *words)
    values = iter([0.7, 0.6, 0.61, 0.6, 0.1])
    real = evaluation.Predictions.measure

    def scripted(self: evaluation.Predictions) -> Any:
        return real(self)._replace(log_loss=next(values))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Predictions, "measure", scripted)
        result = train(config)
    assert (result["stopped_early"], result["epochs"]) == (True, 4)
    assert result["valid"]["log_loss"] == 0.6
    assert result["best_step"] == result["steps"] // 2


SCHEDULES = {
    "epoch": ["schedule.name=ExponentialLR", "schedule.options.gamma=0.5"],
    "step": ["schedule.name=OneCycleLR", "schedule.every=step", "schedule.options={max_lr: 0.1, total_steps: 99}"],
    "validation": ["schedule.name=ReduceLROnPlateau", "schedule.options.patience=0", "training.metric=log_loss"],
    "optimizer": ["optimizer.name=SGD", "optimizer.options={momentum: 0.9, nesterov: true}", "optimizer.table_lr=0.1"],
    "accumulate": ["training.accumulate=2", "training.validate_every=2", "model.options.head.dropout=0.2"],
}


@pytest.mark.parametrize("words", SCHEDULES.values(), ids=SCHEDULES)
def test_optimizer_schedule_and_accumulation_are_resumed_bit_for_bit(config_of: MakeConfig, words: list[str]) -> None:
    whole = config_of("whole", *words)
    train(whole)
    stopped = config_of("stopped", *words)
    real, calls = loop._Trainer._step, []

    def step(self: Any, batches: Any) -> None:
        calls.append(self.state.total)
        real(self, batches)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "_step", step)
        with pytest.raises(loop.Interrupted):
            train(stopped)
    train(stopped, resume=True)
    assert losses(stopped.output.folder) == losses(whole.output.folder)
    assert validations(stopped.output.folder) == validations(whole.output.folder)
    assert same_weights(stopped.output.folder, whole.output.folder)
    first, second = (ck.load(ck.steps(Path(c.output.folder) / "checkpoints")[0]) for c in (stopped, whole))
    assert first["schedule"] == second["schedule"]
    if "ExponentialLR" in words[0]:
        assert [g["lr"] for g in first["optimizer"]["dense"]["param_groups"]] == [0.01 * 0.25]


def test_accumulated_batches_are_a_step(config_of: MakeConfig, whole: str) -> None:
    """Two batches of a step: half of the steps, all of the rows; an odd one is a step of its own."""
    config = config_of("run", "training.accumulate=2")
    result = train(config)
    batches = len(losses(whole)) // 2
    assert result["steps"] == 2 * -(-batches // 2)
    rows = [json.loads((Path(f) / "result.json").read_text()) for f in (config.output.folder, whole)]
    assert rows[0]["epochs"] == rows[1]["epochs"]


def test_an_optimizer_that_cannot_take_sparse_gradients_says_what_to_do(config_of: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"model\.options\.embedding\.sparse=false"):
        train(config_of("run", "optimizer.name=AdamW"))
    train(config_of("dense", "optimizer.name=AdamW", "model.options.embedding.sparse=false", "training.epochs=1"))


def test_interrupted_in_the_validation_that_stops_early(config_of: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step may follow that validation, whether it ran at once or after the resumption."""
    config = config_of("run", "training.patience=1")
    real, predict = evaluation.Predictions.measure, loop.predict
    aucs, calls = iter([0.6, 0.5, 0.5]), []

    def scripted(self: evaluation.Predictions) -> Any:
        return real(self)._replace(auc=next(aucs))

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return predict(*arguments)

    monkeypatch.setattr(evaluation.Predictions, "measure", scripted)
    monkeypatch.setattr(loop, "predict", interrupted)
    config = config.override(["training.validate_every=4"])
    with pytest.raises(loop.Interrupted):
        train(config)
    result = train(config, resume=True)
    assert result["stopped_early"]
    assert result["steps"] == 8
    assert [row[0] for row in losses(config.output.folder)] == list(range(1, 9))


def test_disk_full_costs_a_periodic_checkpoint_only(
    config_of: MakeConfig, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = config_of("full")
    real, seen = os.fsync, []

    def fsync(file: int) -> None:
        name = os.readlink(f"/proc/self/fd/{file}")
        if "step-" in name and len(seen) < 1:
            seen.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(UserWarning, match="No space left on device; the previous one is kept and training goes on"):
        train(full)
    assert seen
    assert losses(full.output.folder) == losses(whole)
    assert same_weights(full.output.folder, whole)


def test_disk_full_for_tensorboard_costs_its_files_only(
    config_of: MakeConfig, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer's thread keeps an error of the disk and raises it out of every later call."""
    from torch.utils.tensorboard import SummaryWriter

    def full(self: SummaryWriter, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = config_of("full", "output.tensorboard=true")
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", full)
        with pytest.warns(UserWarning, match=r"cannot write TensorBoard's files.*No space left") as warned:
            train(config)
    assert len([w for w in warned if "TensorBoard" in str(w.message)]) == 1
    assert losses(config.output.folder) == losses(whole)
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "close", full)
        with pytest.warns(UserWarning, match="No space left"):
            train(config_of("closing", "output.tensorboard=true"))
    assert (Path(config.output.folder).parent / "closing" / "result.json").exists()


def test_disk_full_for_the_best_model_stops_and_nothing_is_lost(
    config_of: MakeConfig, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = config_of("full")
    real = ck.save

    def save(path: Path, content: dict[str, Any]) -> None:
        if path.name == "best.pt":
            raise CheckpointError(f"cannot write the checkpoint {path}: No space left on device")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(ck, "save", save)
        with pytest.raises(CheckpointError, match=r"best\.pt: No space left"):
            train(full)
    train(full, resume=True)
    assert losses(full.output.folder) == losses(whole)
    assert same_weights(full.output.folder, whole)


def test_a_loss_that_is_not_finite_stops_the_run(config_of: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("run")
    real = loop._Trainer._step

    def poisoned(self: Any, batches: Any) -> None:
        if self.state.total == 4:
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)
        real(self, batches)

    monkeypatch.setattr(loop._Trainer, "_step", poisoned)
    with pytest.raises(FloatingPointError, match="the loss is nan near step 5"):
        train(config)
    newest = ck.load(ck.steps(Path(config.output.folder) / "checkpoints")[0])
    assert all(torch.isfinite(t).all() for t in newest["model"].values())


@pytest.mark.parametrize("every", [1, 0])
def test_weights_that_are_not_finite_are_never_kept(config_of: MakeConfig, every: int) -> None:
    """A step's loss is finite before its weights are not; both kinds of checkpoint come before the next loss."""
    words = ("optimizer.lr=1e30", "training.clip_norm=null", f"training.checkpoint_every={every}")
    config = config_of("run", *words, "training.validate_every=1")
    with pytest.raises(FloatingPointError, match=r"near step \d .*lower optimizer.lr"):
        train(config)
    for path in (Path(config.output.folder) / "checkpoints").glob("*.pt"):
        assert all(torch.isfinite(t).all() for t in ck.load(path)["model"].values())


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_lost_best_model_is_named_and_replaced_by_what_comes(whole: str, config_of: MakeConfig, damage: str) -> None:
    config = config_of("run")
    shutil.copytree(whole, config.output.folder)
    best = Path(config.output.folder) / "checkpoints" / "best.pt"
    if damage == "cut":
        os.truncate(best, best.stat().st_size // 2)
    else:
        best.unlink()
    with pytest.warns(UserWarning, match=r"best\.pt.*the best model from here on counts as the best"):
        result = train(config, resume=True)
    assert result["best_step"] == result["steps"] == len(losses(whole))
    assert evaluate(config.output.folder).to_dict() == result["test"]


def test_lost_prepared_data_are_made_again(config_of: MakeConfig, prepared: Prepared) -> None:
    raw = prepared.path.parent / "logs.parquet"
    config = config_of("run", f"data.path={raw}", "data.prepare.targets=every", "training.epochs=1")
    result = train(config)
    shutil.rmtree(Path(config.output.folder) / "prepared")
    assert evaluate(config.output.folder).to_dict() == result["test"]


@pytest.mark.parametrize(
    "word, message",
    [
        ("training.device=tpu", "training.device must be auto, cpu, cuda"),
        ("training.amp=float16", "AMP is for CUDA"),
        ("model.name=dein", "dien"),
        ("model.options.embeding.size=3", "did you mean embedding"),
        ("model.options.embedding.siz=3", "unknown option embedding.siz: did you mean size"),
        ("data.eval_batch_size=1", "data.eval_batch_size counts rows and must be at least 2"),
        ("data.negatives=200", "data.batch_size counts rows and must be at least 201"),
        ("data.path=/no/such/file.parquet", "/no/such/file"),
        ("data.prepare.labels=next", "is prepared already"),
    ],
)
def test_wrong_configs_name_what_is_wrong(config_of: MakeConfig, word: str, message: str) -> None:
    device = [] if "device" in word else ["training.device=cpu"]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(config_of("run", word, *device))
    assert message in str(error.value)


def test_raw_logs_are_prepared_once(config_of: MakeConfig, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], setup.prepare

    @functools.wraps(real)
    def counted(*arguments: Any, **options: Any) -> Prepared:
        calls.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(setup, "prepare", counted)
    raw = prepared.path.parent / "logs.parquet"
    config = config_of("run", f"data.path={raw}", "data.prepare.targets=every", "training.epochs=1")
    train(config)
    train(config, resume=True)
    assert len(calls) == 1
    assert calls[0]["targets"] == "every"
    assert setup.open_data(config).fingerprint == prepared.fingerprint
    assert len(calls) == 1
    seed = config.override(["data.prepare.seed=3"])
    with pytest.raises(ValueError, match="need it"):
        setup.open_data(seed)
    shutil.rmtree(Path(config.output.folder) / "checkpoints")  # nothing was trained on it
    setup.open_data(seed)
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"unknown key data\.prepare\.target: did you mean targets"):
        setup.open_data(config.override(["data.prepare.target=every"]))


def test_target_only_sees_no_history(config_of: MakeConfig, prepared: Prepared) -> None:
    config = config_of("run", "model.name=average", "data.history=false", "training.epochs=1")
    batch = next(setup.batches(config, setup.open_loader(config, prepared, "train"), 0))
    batch.check(prepared.schema)
    full = next(iter(Loader(prepared, "train", batch_size=128).epoch(0)))
    assert batch.rows_total == 0
    assert torch.equal(batch.target["item"], full.target["item"])
    train(config)


def test_open_run_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        open_run(tmp_path)


def test_a_schedule_that_is_too_short_is_refused_before_the_training(config_of: MakeConfig) -> None:
    words = ["schedule.name=OneCycleLR", "schedule.every=step", "schedule.options={max_lr: 0.1, total_steps: 3}"]
    config = config_of("run", *words)
    with pytest.raises(ValueError, match=r"schedule.options must let OneCycleLR make \d+ steps .* got total_steps = 3"):
        train(config)
    assert not ck.steps(Path(config.output.folder) / "checkpoints")


def test_a_schedule_that_fails_in_the_training_is_named(config_of: MakeConfig) -> None:
    words = ["schedule.name=MultiStepLR", "schedule.every=step", "schedule.options={milestones: [4], gamma: -1}"]
    with pytest.raises(ValueError, match="the schedule MultiStepLR cannot go on: step sizes must be finite and at"):
        train(config_of("run", *words))
