"""From a config to the things of a run: data, loaders, device, model."""

from __future__ import annotations

import contextlib
import glob
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from dien_kernels._options import unknown_name
from dien_kernels.batch import Batch, Schema, Sequence
from dien_kernels.data import Loader, Prepared, guess, prepare
from dien_kernels.data.loader import batch_schema
from dien_kernels.models import build
from dien_kernels.models.numbers import Statistics
from dien_kernels.training.checkpoint import atomic
from dien_kernels.training.config import Config

Steps = TypeVar("Steps", Batch, Sequence)
PREPARED, CHECKPOINTS = "prepared", "checkpoints"  # folders of a run


def open_data(config: Config, *, reuse: bool = False) -> Prepared:
    """The prepared data of a run: ``data.path`` itself, or made of the raw logs there.

    Raw logs are prepared into ``<output.folder>/prepared`` unless that was made of the same files with the
    same options; ``reuse`` takes it as it is (a resumed run compares fingerprints). Data that a run in the
    folder was trained on are never replaced. Raises ``ValueError`` for that and without a path,
    ``FileNotFoundError`` where nothing is there, and what ``prepare`` raises.
    """
    if config.data.path is None:
        raise ValueError("data.path is not set: name a prepared folder or raw logs")
    source = Path(config.data.path)
    if (source / "meta.json").exists():
        if config.data.prepare:
            raise ValueError(f"data.prepare is for raw logs, but {source} is prepared already: set data.prepare={{}}")
        return Prepared.open(source)
    folder = Path(config.output.folder) / PREPARED
    made_of = folder.with_suffix(".json")
    made = made_of.exists() and folder.is_dir()
    if reuse and made:
        return Prepared.open(folder)
    if not source.exists() and not (glob.has_magic(str(source)) and glob.glob(str(source), recursive=True)):
        raise FileNotFoundError(f"there is no file or folder {source} (data.path)")
    options = prepare_options(config.data.prepare, source)
    stamp = {"files": _stamp(source), "options": options}
    if made and json.loads(made_of.read_text()) == json.loads(json.dumps(stamp)):
        return Prepared.open(folder)
    if made and any(any(folder.parent.glob(f"{run}{CHECKPOINTS}/*.pt")) for run in ("", "*/")):
        raise ValueError(
            f"{folder} was made of other files or with other options, and the runs in {folder.parent} need it: "
            "choose another output.folder"
        )
    made_of.unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepared = prepare(source, folder, progress=config.output.progress, overwrite=True, **options)
    with atomic(made_of) as file:
        file.write(json.dumps(stamp, indent=1).encode())
    return prepared


def prepare_options(given: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Arguments of ``prepare``, with the format told by the file's name where none is given.

    Raises ``ValueError`` for a name that ``prepare`` does not have.
    """
    set_here = ("sources", "out", "progress", "overwrite")
    known = [name for name in inspect.signature(prepare).parameters if name not in set_here]
    for name in given:
        if name not in known:
            raise unknown_name("key", name, known, "data.prepare")
    return {**({} if "format" in given else guess(source)), **given}


def _stamp(source: Path) -> list[list[Any]]:
    named = [source] if source.exists() else sorted(map(Path, glob.glob(str(source), recursive=True)))
    files = [file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [file for file in files if file.is_file()]
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def open_loader(config: Config, prepared: Prepared, split: str) -> Loader:
    """The loader of one split: shuffled with negatives of the auxiliary loss for training, plain for the
    others."""
    data, train = config.data, split == "train"
    fixed = prepared.meta["options"]["negatives"]
    each = 1 + (0 if prepared.labels == "given" else data.negatives if train else fixed)
    size = "batch_size" if train else "eval_batch_size"
    if getattr(data, size) < each:
        raise ValueError(
            f"data.{size} counts rows and must be at least {each}, a positive with its negatives, "
            f"got {getattr(data, size)}"
        )
    return Loader(
        prepared,
        split,
        batch_size=getattr(data, size),
        max_length=data.max_length,
        negatives=data.negatives,
        auxiliary_negatives=data.auxiliary_negatives if train else 0,
        exclude=data.exclude,
        repeats=data.repeats,
        since=data.since if train else 0,
        time_gap=data.time_gap,
        shuffle=train,
        seed=config.training.seed,
        workers=data.workers,
        bucket=data.bucket,
        pin_memory=device_of(config).type == "cuda",
    )


def schema_of(config: Config, prepared: Prepared) -> Schema:
    """The schema of the loaders' batches: that of the data, with ``time_gap`` where ``data.time_gap`` is on."""
    return batch_schema(prepared.schema, config.data.time_gap)


def batches(config: Config, loader: Loader, epoch: int, start: int = 0) -> Iterator[Batch]:
    """The loader's batches, with empty histories where ``data.history`` is off."""
    for batch in loader.epoch(epoch, start=start):
        yield batch if config.data.history else without_history(batch)


def without_history(batch: Batch) -> Batch:
    """The batch with every history empty, those of further sequences included."""

    def none_of(fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: ids[:0] for name, ids in fields.items()}

    def emptied(steps: Steps) -> Steps:
        return replace(
            steps,
            history=none_of(steps.history),
            offsets=torch.zeros_like(steps.offsets),
            negatives=None if steps.negatives is None else none_of(steps.negatives),
            behaviours=none_of(steps.behaviours),
            behaviour_dense=None if steps.behaviour_dense is None else steps.behaviour_dense[:0],
            rows_total=0,
        )

    return replace(emptied(batch), sequences={name: emptied(each) for name, each in batch.sequences.items()})


def model_for(config: Config, prepared: Prepared) -> nn.Module:
    """The model of a config for prepared data: ``make_model`` with their features and statistics."""
    return make_model(config, schema_of(config, prepared), prepared.meta["dense"])


def make_model(config: Config, schema: Schema, statistics: Statistics | None = None) -> nn.Module:
    """The model of a config with weights drawn from its seed, on its device; raises what ``build`` raises.

    ``statistics`` are those of the numbers in the training split, as ``build`` takes them: the ``dense`` of a prepared
    folder's ``meta``. A model that is made for stored weights must be given those of the run.
    """
    torch.manual_seed(config.training.seed)
    chosen = config.model
    model = build(chosen.name, schema, chosen.options, preset=chosen.preset, statistics=statistics)
    return model.to(device_of(config))


def device_of(config: Config) -> torch.device:
    """The device of a config. Raises ``ValueError`` for a name torch does not know or CUDA where there is
    none."""
    name = config.training.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"training.device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"training.device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"training.device is {name!r}, but torch sees no CUDA device here")
    return device


def autocast(config: Config) -> contextlib.AbstractContextManager[Any]:
    """The autocast of ``training.amp``; nothing without it. Raises ``ValueError`` for AMP off CUDA."""
    amp = config.training.amp
    if amp is None:
        return contextlib.nullcontext()
    if device_of(config).type != "cuda":
        raise ValueError(f"training.amp is {amp!r}, but AMP is for CUDA and the device is {device_of(config)}")
    return torch.autocast("cuda", dtype=getattr(torch, amp))


def make_scaler(config: Config) -> torch.amp.GradScaler:
    """The scaler of losses that float16 needs; it does nothing otherwise."""
    enabled = config.training.amp == "float16" and device_of(config).type == "cuda"
    return torch.amp.GradScaler("cuda", enabled=enabled)


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seed torch for one step, from nothing but its place in the run: a resumed run draws the same
    dropout."""
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, step)).generate_state(1, np.uint64)[0]))
