"""The training loop: every number it makes is a function of the config, the data and the place in the run."""

from __future__ import annotations

import functools
import importlib
import json
import math
import shlex
import signal
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dien_kernels.batch import Batch
from dien_kernels.data import Prepared
from dien_kernels.ops import use_backend
from dien_kernels.training import checkpoint, setup
from dien_kernels.training.config import VERSION, Config, differences, dump
from dien_kernels.training.evaluation import (
    BEST,
    CONFIG,
    PREDICTIONS,
    RESULT,
    check_fingerprint,
    predict,
)
from dien_kernels.training.logs import WORDS, Log
from dien_kernels.training.metrics import HIGHER_IS_BETTER, measure
from dien_kernels.training.optimizer import make_optimizer
from dien_kernels.training.report import write_report
from dien_kernels.training.schedule import make_schedule, step_schedule
from dien_kernels.training.start import start
from dien_kernels.training.step import training_step
from dien_kernels.training.upgrade import upgrade_checkpoint


class Interrupted(Exception):  # noqa: N818, a stop that the user asked for is no error
    """SIGINT came; the state is saved in the run's ``folder``, and ``command`` goes on from there."""

    def __init__(self, folder: Path) -> None:
        self.command = f"dien-kernels train --resume {shlex.quote(str(folder))}"
        super().__init__(f"interrupted; a checkpoint is saved. Go on with:\n    {self.command}")


class _Stop(Exception):  # noqa: N818
    """Leaves the innermost loop once SIGINT has been seen."""


class _Interrupt:
    """Turns the first SIGINT inside the block into a flag; the second ends the process at once."""

    def __init__(self) -> None:
        self.seen = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.seen = True

    def check(self) -> None:
        if self.seen:
            raise _Stop

    def __enter__(self) -> _Interrupt:
        # Only the main thread may set handlers; elsewhere SIGINT stays the caller's business.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)


@dataclass
class State:
    """The place in a run and what has to be remembered there.

    Attributes:
        epoch, step: the epoch and the number of its steps done; ``total`` over all epochs.
        validated: ``total`` at the last validation.
        best, best_total: the best value of ``training.metric`` so far (None: there is none), and ``total`` there.
        worse: validations since then.
        stopped: early stopping has ended the training.
        seconds, rows: spent and seen in training steps.
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    validated: int = 0
    best: float | None = None
    best_total: int = 0
    worse: int = 0
    stopped: bool = False
    seconds: float = 0.0
    rows: int = 0


def train(config: Config, *, resume: bool = False, prepared: Prepared | None = None) -> dict[str, Any]:
    """Train a model, evaluate its best checkpoint on the test split, and leave all of it in
    ``output.folder``.

    Each epoch ends with a validation, then a checkpoint; ``validate_every`` and ``checkpoint_every`` add more
    inside it. The folder holds config.yaml, log.jsonl, checkpoints/ (the last two and best.pt), result.json,
    predictions-test.parquet, report.html and tensorboard/.

    ``prepared`` is the data where it is already open; None: what ``config.data`` names.

    With ``resume`` the newest readable checkpoint goes on, with the losses of a run never interrupted, bit
    for bit, on the same machine and number of threads. A disk that refuses a periodic checkpoint is reported
    and training goes on with the previous one in place; one that refuses best.pt stops the run, as its result
    would be lost otherwise.

    Returns the content of result.json. Raises ``Interrupted`` after SIGINT, ``FileExistsError`` if the folder
    holds a run and ``resume`` is off, ``ValueError`` if config or data differ from those of the run to
    resume, ``FloatingPointError`` for a loss that is not finite, ``CheckpointError`` as above.
    """
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    if config.output.report:
        importlib.import_module("matplotlib")  # its absence should not come to light after the training
    folder = Path(config.output.folder)
    if not resume and checkpoint.steps(folder / setup.CHECKPOINTS):
        raise FileExistsError(f"{folder} holds a run already: resume it or choose another output.folder")
    found = checkpoint.load_latest(folder / setup.CHECKPOINTS) if resume else None
    content = None if found is None else upgrade_checkpoint(*found)
    if content is not None:
        changed = differences(Config.from_dict(content["config"]).to_dict(), config.to_dict())
        if changed:
            raise ValueError(f"cannot resume {folder} with another config: {'; '.join(changed)}")
    if prepared is None:
        prepared = setup.open_data(config, reuse=resume)
    if content is not None:
        check_fingerprint(content, prepared)
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic(folder / CONFIG) as file:
        file.write(dump(config).encode())
    (folder / RESULT).unlink(missing_ok=True)  # of a run that now goes on for more epochs
    for place in (folder, folder / setup.CHECKPOINTS):
        checkpoint.remove_leftovers(place)
    with use_backend(config.training.backend), _Interrupt() as interrupt:
        trainer = _Trainer(config, prepared, interrupt, content)
        with trainer.log:
            try:
                result = trainer.run()
            except _Stop:
                if not trainer.finishing:  # then all is saved, and the model holds its best weights, not its last
                    trainer.save(required=True)
                raise Interrupted(folder) from None
    if config.output.report:
        write_report(folder, prepared=prepared)
    return result


class _Trainer:
    def __init__(
        self, config: Config, prepared: Prepared, interrupt: _Interrupt, content: dict[str, Any] | None
    ) -> None:
        self.config, self.prepared, self.interrupt = config, prepared, interrupt
        self.folder = Path(config.output.folder)
        self.device = setup.device_of(config)
        self.model: Any = setup.model_for(config, prepared)
        options, chosen = config.training, config.optimizer
        self.optimizer = make_optimizer(
            self.model, chosen.name, lr=chosen.lr, table_lr=chosen.table_lr, **chosen.options
        )
        if content is None and options.start_from is not None:
            start(config, prepared, self.model, self.optimizer)
        self.higher_is_better = HIGHER_IS_BETTER[options.metric]
        self.schedule: Any = None
        if config.schedule.name is not None:
            self.schedule = make_schedule(
                self.optimizer,
                config.schedule.name,
                config.schedule.options,
                higher_is_better=self.higher_is_better,
            )
        self.every = "validation" if isinstance(self.schedule, ReduceLROnPlateau) else config.schedule.every
        self.scaler = setup.make_scaler(config)
        splits = {"train": "train", "valid": config.data.validate_on, "test": "test"}
        self.loaders = {name: setup.open_loader(config, prepared, split) for name, split in splits.items()}
        for split, loader in self.loaders.items():
            if loader.steps(0) == 0:
                remedy = " (data.validate_on=test validates on the test split)" if split == "valid" else ""
                raise ValueError(
                    f"the {split} split is empty: there are too few users or rows in {config.data.path}{remedy}"
                )
        self.state = State()
        if content is not None:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(content["schedule"])
            self.scaler.load_state_dict(content["scaler"])
            self.state = State(**content["state"])
            self._look_for_best()
        expected = sum(-(-self.loaders["train"].steps(e) // options.accumulate) for e in range(options.epochs))
        self._check_length_of_schedule(expected if self.every == "step" else options.epochs)
        output = config.output
        self.log = Log(
            self.folder,
            total=self.state.total,
            expected=expected,
            tensorboard=output.tensorboard,
            progress=output.progress,
        )
        self.finishing = False
        self.autocast = functools.partial(setup.autocast, config)
        self._clear()

    def _check_length_of_schedule(self, steps: int) -> None:
        """``OneCycleLR`` refuses further steps at its end: better said before the training than after most of it."""
        last = getattr(self.schedule, "total_steps", steps)
        if last < steps:
            raise ValueError(
                f"schedule.options must let {self.config.schedule.name} make {steps} steps with schedule.every="
                f"{self.every} and training.epochs={self.config.training.epochs}, got total_steps = {last}"
            )

    def _look_for_best(self) -> None:
        """Without the best model so far, what comes counts: at the least the weights that the run goes on from."""
        if not self.state.best_total:
            return
        try:
            checkpoint.load(self.folder / setup.CHECKPOINTS / BEST)
        except checkpoint.CheckpointError as error:
            warnings.warn(f"{error}; the best model from here on counts as the best", stacklevel=2)
            self.state.best, self.state.validated = None, -1

    def run(self) -> dict[str, Any]:
        state, options = self.state, self.config.training
        while state.epoch < options.epochs and not state.stopped:
            self._epoch()
        if state.validated != state.total:  # the best model was lost after the training
            self._validate()
        return self._finish()

    def _epoch(self) -> None:
        state, options = self.state, self.config.training
        self._validate_if_due()  # the interruption may have come between a step and its validation
        if state.stopped:
            return self.save()
        start = state.step * options.accumulate
        batches = setup.batches(self.config, self.loaders["train"], state.epoch, start)
        while group := list(islice(batches, options.accumulate)):
            self.interrupt.check()
            started = time.perf_counter()
            self._step(group)
            state.seconds += time.perf_counter() - started
            state.rows += sum(batch.rows for batch in group)
            state.step += 1
            state.total += 1
            self.log.step()
            if state.step % options.log_every == 0:
                self._write_window()
            self._validate_if_due()
            if state.stopped:
                return self.save()
            if options.checkpoint_every and state.step % options.checkpoint_every == 0:
                self.save()
        self.interrupt.check()
        self._write_window()
        if state.validated != state.total:
            self._validate()
        if self.schedule is not None and self.every == "epoch":
            step_schedule(self.schedule)
        state.epoch += 1
        state.step = 0
        self.save()

    def _step(self, batches: list[Batch]) -> None:
        options, state = self.config.training, self.state
        setup.seed_step(options.seed, state.epoch, state.step)
        self.model.train()
        result = training_step(
            self.model,
            batches,
            self.optimizer,
            device=self.device,
            scaler=self.scaler,
            clip_norm=options.clip_norm,
            autocast=self.autocast,
        )
        if self.schedule is not None and self.every == "step":
            step_schedule(self.schedule)
        auxiliary = result.auxiliary
        values = (result.total, result.click, result.click.new_zeros(()) if auxiliary is None else auxiliary)
        self._losses.append(torch.stack([v.double() for v in values]))
        self._rows.append(torch.stack([result.label, result.logits.float()]))

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._since = time.perf_counter()

    def _write_window(self) -> None:
        """Log the steps since the last line. Reads the device: not at every step."""
        if not self._losses:
            return
        state = self.state
        loss, click, auxiliary = torch.stack(self._losses).mean(0).tolist()
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        label, logit = torch.cat(self._rows, 1).cpu().numpy()
        auc = measure(label, logit).auc
        speed = label.shape[0] / max(time.perf_counter() - self._since, 1e-9)
        values = {"loss": loss, "click": click, "auxiliary": auxiliary}
        values |= {"auc": None if math.isnan(auc) else auc, "samples_per_second": speed}
        self.log.train(state.total, state.epoch, values)
        self._clear()

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} near step {self.state.total} (epoch {self.state.epoch + 1}): lower optimizer.lr or "
            f"training.clip_norm; the checkpoints in {self.folder / setup.CHECKPOINTS} are from before"
        )

    def _check_weights(self) -> None:
        """The loss of a step is that of the weights before it; these are to be kept or to be measured."""
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
            raise self._diverged("the weights are not finite")

    def _validate_if_due(self) -> None:
        every, state = self.config.training.validate_every, self.state
        if every and state.step and state.step % every == 0 and state.validated != state.total:
            self._write_window()
            self._validate()

    def _validate(self) -> None:
        state, options = self.state, self.config.training
        self._check_weights()
        predictions = predict(self.model, self.loaders["valid"], self.config, self.interrupt.check)
        if not np.isfinite(predictions.logit).all():
            raise self._diverged("the logits of the validation are not finite")
        metrics, name = predictions.measure(), options.metric
        value: float = getattr(metrics, name)
        self.log.valid(state.total, state.epoch, metrics.to_dict(), name)
        state.validated = state.total
        if name in metrics.reasons:
            why = metrics.reasons[name]
            self.log.warn(f"no validation {WORDS[name]}, {why}: the newest model counts as the best")
        if self.every == "validation" and not math.isnan(value):
            step_schedule(self.schedule, value)
        if self._is_better(value):
            state.best = None if math.isnan(value) else value
            state.best_total, state.worse = state.total, 0
            content = {
                "version": VERSION,
                "model": self.model.state_dict(),
                "config": self.config.to_dict(),
                "fingerprint": self.prepared.fingerprint,
                "total": state.total,
                "valid": metrics.to_dict(),
            }
            checkpoint.save(self.folder / setup.CHECKPOINTS / BEST, content)
        else:
            state.worse += 1
            if options.patience and state.worse >= options.patience:
                state.stopped = True
                self.log.say(f"stopped early: {state.worse} validations without a better {WORDS[name]}")
        self._since = time.perf_counter()

    def _is_better(self, value: float) -> bool:
        best = self.state.best
        if math.isnan(value) or best is None:
            return True
        return value > best if self.higher_is_better else value < best

    def save(self, *, required: bool = False) -> None:
        """Write a step checkpoint; a disk that refuses is reported, and an error only where it is
        required."""
        self._write_window()
        self._check_weights()
        content = {
            "version": VERSION,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "state": asdict(self.state),
            "config": self.config.to_dict(),
            "fingerprint": self.prepared.fingerprint,
        }
        try:
            checkpoint.save_step(self.folder / setup.CHECKPOINTS, self.state.total, content)
        except checkpoint.CheckpointError as error:
            if required:
                raise
            self.log.warn(f"{error}; the previous one is kept and training goes on")
        self._since = time.perf_counter()

    def _finish(self) -> dict[str, Any]:
        """The test evaluation of the best checkpoint, and result.json."""
        self.finishing, state = True, self.state
        best = checkpoint.load(self.folder / setup.CHECKPOINTS / BEST)
        self.model.load_state_dict(best["model"])
        predictions = predict(self.model, self.loaders["test"], self.config, self.interrupt.check)
        predictions.save(self.folder / PREDICTIONS)
        result = {
            "model": self.config.model.name,
            "seed": self.config.training.seed,
            "best_step": best["total"],
            "steps": state.total,
            "epochs": state.epoch,
            "stopped_early": state.stopped,
            "valid": best["valid"],
            "test": predictions.measure().to_dict(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "training_seconds": state.seconds,
            "samples_per_second": state.rows / max(state.seconds, 1e-9),
        }
        with checkpoint.atomic(self.folder / RESULT) as file:
            file.write(json.dumps(result, indent=1).encode())
        return result
