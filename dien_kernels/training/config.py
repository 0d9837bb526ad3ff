"""What a run is told: one dataclass for each section, read from YAML and ``section.key=value`` overrides."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

# Changing these cannot change a number of the steps to come, so a resumed run may change them.
FREE_ON_RESUME = (
    "data.path",  # the fingerprint of the data decides, not where it lies
    "data.workers",
    "training.epochs",
    "training.checkpoint_every",
    "output",
)


@dataclass(frozen=True)
class DataConfig:
    """Where behaviours come from and how they become batches.

    Attributes:
        path: a prepared folder, or raw logs, which are prepared into ``<output.folder>/prepared`` first.
        prepare: arguments of ``dien_kernels.data.prepare`` for raw logs (format, column names, labels,
            targets, split, ...); columns with standard names are found without them.
        batch_size: rows of a training batch: positives and their negatives, or labelled rows.
        eval_batch_size: the same in evaluation.
        max_length: the newest behaviours of a history that are read.
        negatives: sampled target negatives for each positive in training, drawn afresh each epoch.
        auxiliary_negatives: sampled negatives beside each behaviour, for the auxiliary loss.
        bucket: batches of histories of similar length.
        workers: processes that make batches; 0 makes them in the main process. The batches are the same.
        history: False empties every history: what the target alone can tell, the floor of a comparison.
    """

    path: str | None = None
    prepare: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 256
    eval_batch_size: int = 1024
    max_length: int = 100
    negatives: int = 1
    auxiliary_negatives: int = 1
    bucket: bool = True
    workers: int = 0
    history: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """Which model: arguments of ``dien_kernels.models.build``.

    Attributes:
        name: a key of ``dien_kernels.models.MODELS``.
        preset: ``"paper"``, ``"authors"`` or None, where the model has presets.
        options: the model's own options, checked by the model.
    """

    name: str = "dien"
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        epochs: at most so many passes over the training split.
        lr: Adam's step size; ``embedding_lr`` that of embedding tables (None: the same).
        lr_decay: factor on both after each epoch.
        weight_decay: L2 on the dense parameters.
        clip_norm: the largest norm of all gradients together; None does not clip.
        seed: of the weights, the batches and dropout.
        threads: of torch; None leaves torch's choice.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        backend: of the ops: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"``, ``"reference"``.
        amp: ``"float16"`` or ``"bfloat16"`` autocast, on CUDA only; None computes in float32.
        validate_every: steps between validations inside an epoch; 0: only at its end.
        patience: stop after so many validations without a better AUC; 0 never stops early.
        checkpoint_every: steps between checkpoints; 0: only at an epoch's end.
        log_every: steps that one line of the log averages over.
    """

    epochs: int = 2
    lr: float = 1e-3
    embedding_lr: float | None = None
    lr_decay: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float | None = 5.0
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    backend: Literal["auto", "cpu", "cuda", "triton", "torch", "reference"] = "auto"
    amp: Literal["float16", "bfloat16"] | None = None
    validate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 1000
    log_every: int = 20


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind.

    Attributes:
        folder: of the run: config, log, checkpoints, result, report.
        tensorboard: write event files into ``<folder>/tensorboard``.
        report: write ``<folder>/report.html`` at the end.
        progress: show a progress bar.
    """

    folder: str = "runs/dien"
    tensorboard: bool = True
    report: bool = True
    progress: bool = True


_AT_LEAST = {
    "data.batch_size": 1,
    "data.eval_batch_size": 1,
    "data.max_length": 1,
    "data.negatives": 1,
    "data.auxiliary_negatives": 0,
    "data.workers": 0,
    "training.epochs": 1,
    "training.weight_decay": 0,
    "training.seed": 0,
    "training.threads": 1,
    "training.validate_every": 0,
    "training.patience": 0,
    "training.checkpoint_every": 0,
    "training.log_every": 1,
}


@dataclass(frozen=True)
class Config:
    """All of a run. Built by ``load`` or in Python; either way wrong types and values raise ``ValueError``.

    >>> Config(training=TrainingConfig(epochs=3)).override(["training.lr=1e-4"]).training
    TrainingConfig(epochs=3, lr=0.0001, ...)
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        for f in fields(self):
            part = getattr(self, f.name)
            object.__setattr__(self, f.name, _section(SECTIONS[f.name], vars(part), f.name))
        for where, least in _AT_LEAST.items():
            section, key = where.split(".")
            value = getattr(getattr(self, section), key)
            if value is not None and not value >= least:
                raise ValueError(f"{where} must be at least {least}, got {value}")
        if self.training.seed >= 1 << 64:
            raise ValueError(f"training.seed must be below 2^64, got {self.training.seed}")
        for key in ("lr", "embedding_lr", "lr_decay", "clip_norm"):
            value = getattr(self.training, key)
            if value is not None and not value > 0:
                raise ValueError(f"training.{key} must be above 0, got {value}")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data, section to key to value, for YAML and checkpoints."""
        return {section: dict(vars(getattr(self, section))) for section in SECTIONS}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Config:
        """The inverse of ``to_dict``; sections and keys may be left out.

        Raises ``ValueError`` naming an unknown section or key with the nearest known ones, or a value of the
        wrong type with the allowed one.
        """
        for key in plain:
            if key not in SECTIONS:
                raise unknown_name("section", str(key), SECTIONS)
        return cls(**{name: _section(SECTIONS[name], value, name) for name, value in plain.items()})

    def override(self, words: Iterable[str]) -> Config:
        """The config with ``section.key=value`` words applied; values are YAML (``null``, ``true``, ``[1,
        2]``).

        A key of a free section goes deeper: ``model.options.embedding_dim=16``.
        """
        plain = self.to_dict()
        for word in words:
            where, equals, text = word.partition("=")
            path = where.split(".")
            if not equals or len(path) < 2 or not all(path):
                raise ValueError(f"an override must look like section.key=value, got {word!r}")
            # Whole names are checked by from_dict; here only the way to the value is made.
            inner: dict[str, Any] = plain
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
        return Config.from_dict(plain)

    def with_(self, section: str, **changes: Any) -> Config:
        """The config with keys of one section replaced."""
        return replace(self, **{section: replace(getattr(self, section), **changes)})


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "output": OutputConfig,
}


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The config in a YAML file (None: the defaults), with ``section.key=value`` overrides.

    Raises ``FileNotFoundError`` without the file and ``ValueError`` for what is wrong in it, naming the file.
    """
    if path is None:
        return Config().override(overrides)
    try:
        plain = _from_yaml(Path(path).read_text()) or {}
    except (_yaml().YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{path} must hold sections, {', '.join(SECTIONS)}, got {type(plain).__name__}")
    try:
        config = Config.from_dict(plain)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config.override(overrides)


def dump(config: Config) -> str:
    """The config as YAML text that ``load`` reads back."""
    text: str = _yaml().safe_dump(config.to_dict(), sort_keys=False)
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


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> ValueError:
    """The error for a misspelt name, with the nearest ones or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    return ValueError(f"unknown {kind} {where}{'.' if where else ''}{name}: {hint}")


def _section(kind: type, values: object, where: str) -> Any:
    """``kind`` made of ``values``, a mapping, each checked against the field's type."""
    hints = typing.get_type_hints(kind)
    if values is None:  # an empty section of a YAML file
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a section with keys, {', '.join(hints)}, got {values!r}")
    given = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_name("key", str(key), hints, where)
        given[key] = _value(hints[key], value, f"{where}.{key}")
    return kind(**given)


def _value(hint: Any, value: Any, where: str) -> Any:
    unions = (typing.Union, types.UnionType)
    options = typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,)
    for option in options:
        fits, result = _fit(option, value)
        if fits:
            return result
    allowed = " or ".join(_words(option) for option in options)
    raise ValueError(f"{where} must be {allowed}, got {value!r}")


def _fit(option: Any, value: Any) -> tuple[bool, Any]:
    """Whether ``value`` is of one plain type, a Literal or a mapping, and the value to keep."""
    origin = typing.get_origin(option)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(option), value
    if option is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return fits, float(value) if fits else None
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is dict:
        fits = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return fits, dict(value) if fits else None
    return isinstance(value, option), value


def _words(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(option))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(option, "a mapping from names to values")
