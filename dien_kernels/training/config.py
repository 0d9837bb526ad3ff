"""The config of a run: one dataclass for each section, read from YAML and ``section.key=value`` overrides."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from dien_kernels._options import check_fields, from_mapping, plain, unknown_name, user_path
from dien_kernels.ops._dispatch import BackendName
from dien_kernels.training.metrics import HIGHER_IS_BETTER
from dien_kernels.training.optimizer import check_optimizer
from dien_kernels.training.schedule import check_schedule

VERSION = 2  # of the keys; a run's config.yaml without a version is of the first (dien_kernels.training.upgrade)

# Changing these cannot change a number of the steps to come, so a resumed run may change them.
FREE_ON_RESUME = (
    "data.path",  # the fingerprint of the data decides, not where it lies
    "data.workers",
    "training.epochs",
    "training.checkpoint_every",
    "output",
)


@dataclass(frozen=True)
class _Section:
    """A section of a config. It is checked once, when it is made: types, then ``AT_LEAST``, then ``_check``."""

    NAME: ClassVar[str]
    AT_LEAST: ClassVar[dict[str, int]] = {}

    def __post_init__(self) -> None:
        check_fields(self, self.NAME)
        for key, least in self.AT_LEAST.items():
            value = getattr(self, key)
            if isinstance(value, (int, float)) and not value >= least:
                raise ValueError(f"{self.NAME}.{key} must be at least {least}, got {value}")
        self._check()

    def _check(self) -> None:
        """Raise ``ValueError`` for what types and ``AT_LEAST`` do not tell."""

    def _expand(self, key: str) -> None:
        """Let the path ``key`` begin in the home folder where it begins with ``~``."""
        value = getattr(self, key)
        if value is not None and value.startswith("~"):
            object.__setattr__(self, key, str(user_path(value)))  # the section is frozen for everybody else

    def _above_zero(self, *keys: str) -> None:
        for key in keys:
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"{self.NAME}.{key} must be above 0, got {value}")


@dataclass(frozen=True)
class DataConfig(_Section):
    """Where behaviours come from and how they become batches.

    Attributes:
        path: a prepared folder, or raw logs, which are prepared into ``<output.folder>/prepared`` first.
        prepare: arguments of ``dien_kernels.data.prepare`` for raw logs (format, column names, labels,
            targets, split, ...); columns with standard names are found without them.
        batch_size: rows of a training batch: positives and their negatives, or labelled rows.
        eval_batch_size: the same in evaluation.
        max_length: the newest behaviours of a history that are read.
        negatives: sampled target negatives for each positive in training, drawn afresh each epoch.
        auxiliary_negatives: sampled negatives for each behaviour, for the auxiliary loss.
        exclude: what negatives of training never are: ``"own"``, items the user has anywhere in the log;
            ``"history"``, those of the sample's history and its target; ``"none"``: anything may be drawn.
        repeats: ``"keep"``, or ``"drop"``: leave out samples, of every split, whose target stands in their history.
        since: 0 trains on all samples; n on those that came with the n-th ``append`` and later; ``"latest"`` on those
            of the last one.
        time_gap: whether each behaviour has log(1 + seconds since the one before) as a further number.
        validate_on: ``"valid"``; or ``"test"``, for data without a validation split, whose published numbers choose the
            best epoch on the test split. The test metrics that this gives are optimistic.
        bucket: batches of histories of similar length.
        workers: processes that make batches; 0 makes them in the main process. The batches are the same.
        history: False empties every history: what the target alone can tell, the floor of a comparison.
    """

    NAME: ClassVar[str] = "data"
    AT_LEAST: ClassVar[dict[str, int]] = {
        "batch_size": 1,
        "eval_batch_size": 1,
        "max_length": 1,
        "negatives": 1,
        "auxiliary_negatives": 0,
        "since": 0,
        "workers": 0,
    }
    path: str | None = None
    prepare: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 256
    eval_batch_size: int = 1024
    max_length: int = 100
    negatives: int = 1
    auxiliary_negatives: int = 1
    exclude: Literal["own", "history", "none"] = "own"
    repeats: Literal["keep", "drop"] = "keep"
    since: int | Literal["latest"] = 0
    time_gap: bool = False
    validate_on: Literal["valid", "test"] = "valid"
    bucket: bool = True
    workers: int = 0
    history: bool = True

    def _check(self) -> None:
        self._expand("path")


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Which model: arguments of ``dien_kernels.models.build``.

    Attributes:
        name: a key of ``dien_kernels.models.MODELS``.
        preset: ``"paper"``, ``"authors"`` or None, where the model has presets.
        options: the model's own options in groups (``dien_kernels.models.options``), checked by the model.
    """

    NAME: ClassVar[str] = "model"
    name: str = "dien"
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerConfig(_Section):
    """What moves the parameters: arguments of ``dien_kernels.training.optimizer.make_optimizer``.

    Attributes:
        name: ``"LazyAdam"``, or the name of a class of ``torch.optim``.
        lr: the step size.
        table_lr: the step size of the embedding tables; None: ``lr``.
        options: the class's own keyword options, for instance ``{weight_decay: 0.01}``.
    """

    NAME: ClassVar[str] = "optimizer"
    name: str = "LazyAdam"
    lr: float = 1e-3
    table_lr: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def _check(self) -> None:
        self._above_zero("lr", "table_lr")
        check_optimizer(self.name, self.options)


@dataclass(frozen=True)
class ScheduleConfig(_Section):
    """How step sizes change: arguments of ``dien_kernels.training.schedule.make_schedule``.

    Attributes:
        name: the name of a class of ``torch.optim.lr_scheduler``; None keeps the step sizes.
        every: ``"epoch"`` or ``"step"``: when the schedule moves on. ``ReduceLROnPlateau`` moves on after each
            validation, by ``training.metric``.
        options: the class's own keyword options, for instance ``{gamma: 0.7}``.
    """

    NAME: ClassVar[str] = "schedule"
    name: str | None = None
    every: Literal["epoch", "step"] = "epoch"
    options: dict[str, Any] = field(default_factory=dict)

    def _check(self) -> None:
        if self.name is not None:
            check_schedule(self.name, self.options)
        elif self.options or self.every != "epoch":
            key = "options" if self.options else "every"
            raise ValueError(f"schedule.name must be set where schedule.{key} is, got null: there is no schedule")


@dataclass(frozen=True)
class TrainingConfig(_Section):
    """How a model is trained.

    Attributes:
        epochs: at most so many passes over the training split.
        accumulate: batches whose gradients are added up before the optimizer moves: a step is that of one batch of
            ``accumulate * data.batch_size`` rows, exactly, but for statistics of Dice and norms.
        clip_norm: the largest norm of all gradients together; None does not clip.
        seed: of the weights, the batches and dropout.
        threads: of torch; None leaves torch's choice.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        backend: of the ops: ``"auto"`` or a name in ``dien_kernels.ops._dispatch.BACKENDS``.
        amp: ``"float16"`` or ``"bfloat16"`` autocast, on CUDA only; None computes in float32.
        validate_every: steps between validations inside an epoch; 0: only at its end.
        metric: what a validation is judged by: ``"auc"``, ``"user_auc"`` (higher is better) or ``"log_loss"`` (lower is
            better). best.pt holds the weights with its best value.
        patience: stop after so many validations without a better value of ``metric``; 0 never stops early.
        checkpoint_every: steps between checkpoints; 0: only at an epoch's end.
        log_every: steps that one line of the log averages over.
        start_from: the folder of an earlier run with the same model, whose weights this one begins with; its data must
            be these or an earlier state of them. Ids that are new start as in a fresh model.
        start_moments: whether the moments of its optimizer are carried over, too; they are 0 for new ids.
    """

    NAME: ClassVar[str] = "training"
    AT_LEAST: ClassVar[dict[str, int]] = {
        "epochs": 1,
        "accumulate": 1,
        "seed": 0,
        "threads": 1,
        "validate_every": 0,
        "patience": 0,
        "checkpoint_every": 0,
        "log_every": 1,
    }
    epochs: int = 2
    accumulate: int = 1
    clip_norm: float | None = 5.0
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    backend: BackendName = "auto"
    amp: Literal["float16", "bfloat16"] | None = None
    validate_every: int = 0
    metric: str = "auc"
    patience: int = 0
    checkpoint_every: int = 1000
    log_every: int = 20
    start_from: str | None = None
    start_moments: bool = False

    def _check(self) -> None:
        self._expand("start_from")
        self._above_zero("clip_norm")
        if self.start_moments and self.start_from is None:
            raise ValueError("training.start_from must be set where training.start_moments is true, got null")
        if self.seed >= 1 << 64:
            raise ValueError(f"training.seed must be below 2^64, got {self.seed}")
        if self.metric not in HIGHER_IS_BETTER:
            raise unknown_name("metric", self.metric, HIGHER_IS_BETTER)


@dataclass(frozen=True)
class OutputConfig(_Section):
    """What a run leaves behind.

    Attributes:
        folder: of the run: config, log, checkpoints, result, report.
        tensorboard: write event files into ``<folder>/tensorboard``.
        report: write ``<folder>/report.html`` at the end.
        progress: show a progress bar.
    """

    NAME: ClassVar[str] = "output"
    folder: str = "runs/dien"
    tensorboard: bool = True
    report: bool = True
    progress: bool = True

    def _check(self) -> None:
        self._expand("folder")


# What keys were called in the first version.
RENAMED = {
    "training.lr": "optimizer.lr",
    "training.embedding_lr": "optimizer.table_lr",
    "training.weight_decay": "optimizer.options.weight_decay",
    "training.lr_decay": "schedule, as in {name: ExponentialLR, options: {gamma: 0.7}}",
}


@dataclass(frozen=True)
class Config:
    """All of a run. Built by ``load`` or in Python; either way wrong types and values raise ``ValueError``.

    Its sections are data, model, optimizer, schedule, training and output, each of the class of its name.

    >>> Config(training=TrainingConfig(epochs=3)).override(["optimizer.lr=1e-4"]).optimizer
    OptimizerConfig(name='LazyAdam', lr=0.0001, ...)
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        for f in fields(self):
            if not isinstance(getattr(self, f.name), SECTIONS[f.name]):
                kind = SECTIONS[f.name].__name__
                raise ValueError(f"{f.name} must be a {kind}, got {type(getattr(self, f.name)).__name__}")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data, section to key to value, for YAML and checkpoints."""
        return {section: plain(getattr(self, section)) for section in SECTIONS}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Config:
        """The inverse of ``to_dict``; sections and keys may be left out of ``given``.

        Raises ``ValueError`` naming an unknown section or key with the nearest known ones, or a value of the
        wrong type with the allowed one.
        """
        for key in given:
            if key not in SECTIONS:
                raise unknown_name("section", str(key), SECTIONS)
        return cls(**{name: _section(SECTIONS[name], values) for name, values in given.items()})

    def override(self, words: Iterable[str]) -> Config:
        """The config with ``section.key=value`` words applied; values are YAML (``null``, ``true``, ``[1,
        2]``).

        A key that holds a mapping goes deeper: ``model.options.embedding.size=16``.
        """
        changed: dict[str, Any] = dict(self.to_dict())
        for word in words:
            where, equals, text = word.partition("=")
            path = where.split(".")
            if not equals or len(path) < 2 or not all(path):
                raise ValueError(f"an override must look like section.key=value, got {word!r}")
            # from_dict checks the names; here the mappings on the way to the value are copied or created.
            inner = changed
            for step, key in enumerate(path[:-1]):
                below = inner.get(key)
                if not isinstance(below, dict):
                    if step == 0:
                        raise unknown_name("section", key, inner)
                    if below is not None:
                        raise ValueError(f"{'.'.join(path[: step + 1])} is a single value, it has no keys")
                    below = {}
                inner[key] = dict(below)
                inner = inner[key]
            try:
                inner[path[-1]] = _from_yaml(text)
            except _yaml().YAMLError as error:
                raise ValueError(f"the value in {word!r} is not YAML: {' '.join(str(error).split())}") from None
        return Config.from_dict(changed)

    def with_(self, section: str, **changes: Any) -> Config:
        """The config with keys of one ``section`` replaced by ``changes``; raises ``ValueError`` as the class does."""
        return replace(self, **{section: replace(getattr(self, section), **changes)})


SECTIONS: dict[str, type[_Section]] = {
    kind.NAME: kind for kind in (DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig, OutputConfig)
}


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The config in the YAML file ``path`` (None: the defaults), with ``overrides`` of the form ``section.key=value``.

    Raises ``FileNotFoundError`` without the file and ``ValueError`` for what is wrong in it, naming the file.
    """
    path = None if path is None else user_path(path)
    return (Config() if path is None else from_file(path, read(path))).override(overrides)


def read(path: str | Path) -> dict[str, Any]:
    """What a YAML file of sections holds, unchecked. Raises ``ValueError`` naming a file that is none."""
    try:
        given = _from_yaml(user_path(path).read_text()) or {}
    except (_yaml().YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold sections, {', '.join(SECTIONS)}, got {type(given).__name__}")
    return given


def from_file(path: str | Path, given: Mapping[str, Any]) -> Config:
    """The config of what a file holds. Raises ``ValueError`` naming the file for what is wrong in it."""
    try:
        if given.get("version", VERSION) != VERSION:
            raise ValueError(f"version must be {VERSION}, got {given['version']!r}")
        return Config.from_dict({name: values for name, values in given.items() if name != "version"})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def dump(config: Config) -> str:
    """The config as YAML text that ``load`` reads back."""
    text: str = _yaml().safe_dump({"version": VERSION, **config.to_dict()}, sort_keys=False)
    return text


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``section.key was x, is y`` for everything that differs between two plain configs and is not free on
    resume."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    ]


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _yaml() -> types.ModuleType:
    import yaml

    module: types.ModuleType = yaml
    return module


def _from_yaml(text: str) -> Any:
    """``yaml.safe_load``, but ``1e-3`` is a number without a dot too, as in JSON and in YAML 1.2."""
    yaml = _yaml()

    class Reader(yaml.SafeLoader):  # type: ignore[name-defined]
        pass

    Reader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), "-+0123456789")
    return yaml.load(text, Reader)


def _section(kind: type[_Section], values: object) -> Any:
    """The section made of a mapping; of none (an empty section of a YAML file) that of the defaults."""
    if isinstance(values, Mapping):
        for key in values:
            if (new := RENAMED.get(f"{kind.NAME}.{key}")) is not None:
                raise ValueError(f"the key {kind.NAME}.{key} is now {new}")
    return from_mapping(kind, {} if values is None else values, kind.NAME)
