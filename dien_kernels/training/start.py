"""A run that begins with the weights of an earlier one, whose vocabularies may have been smaller."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dien_kernels._options import user_path
from dien_kernels.data import Prepared
from dien_kernels.models import MODELS
from dien_kernels.training import checkpoint, setup
from dien_kernels.training.config import Config, differences
from dien_kernels.training.evaluation import BEST, check_descent

# Options of models that only steer the training, so that a later run may have others.
FREE = tuple(f"model.options.embedding.{name}" for name in ("dropout", "l2", "sparse", "frozen", "pretrained"))


def growing_tables(model: nn.Module) -> set[str]:
    """The names, in the ``state_dict``, of the tables with a row for each id of a vocabulary."""
    embeddings: Any = model.embeddings
    kinds = (getattr(embeddings, kind, {}) for kind in ("items", "users", "behaviours"))
    tables = {id(table) for kind in kinds for table in kind.values()}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in tables}


def widened(old: Mapping[str, Tensor], fresh: Mapping[str, Tensor], growing: Collection[str]) -> dict[str, Tensor]:
    """The ``state_dict`` of a new model that begins where an earlier one ended.

    ::

        new[name] = old[name]                                     for all that do not grow, buffers included
        new[name] = [old[name]; fresh[name][R_old:]]              [R_new, D] of old [R_old, D], for those that do

    Old rows are kept bit for bit, as ids of a folder that has grown keep their meaning. Buffers are those of the
    earlier model, so that the scaling of numbers does not jump.

    Args:
        old: of the earlier model.
        fresh: of the new one, with its starting values; dtypes and devices are those of these tensors.
        growing: the names of tables that may have more rows now.

    Raises ``ValueError`` naming a parameter that does not fit, with what was got and what is wanted.
    """
    for name in (*fresh, *old):
        if name not in old or name not in fresh:
            there = ("nothing", "one") if name not in old else ("one", "nothing")
            raise ValueError(f"parameter {name}: got {there[0]} in the earlier run, wanted {there[1]}")
    found = {}
    for name, wanted in fresh.items():
        got = old[name]
        grows = name in growing and got.dim() == wanted.dim() and got.shape[0] <= wanted.shape[0]
        fits = got.shape[1:] == wanted.shape[1:] if grows else got.shape == wanted.shape
        if not fits or got.dtype != wanted.dtype:
            more = " (at most so many rows)" if name in growing else ""
            raise ValueError(
                f"parameter {name}: got {got.dtype} {tuple(got.shape)} in the earlier run, wanted "
                f"{wanted.dtype} {tuple(wanted.shape)}{more}"
            )
        value = wanted.detach().clone()
        if grows:
            value[: got.shape[0]] = got
        else:
            value.copy_(got)
        found[name] = value
    return found


def widened_moments(old: Mapping[str, Any], fresh: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The ``state_dict`` of an optimizer of torch with what an earlier one knew of the parameters.

    What the earlier one has for each row of a table, [R_old, D], gets rows of zeros, [R_new, D]; everything else must
    fit. Step sizes and other options of the groups are those of ``fresh``.

    Args:
        old: of the earlier optimizer.
        fresh: of the new one, before its first step.
        parameters: those of the new one, in the order of its groups.

    Raises ``ValueError`` where the two have other groups, and for a state that does not fit its parameter.
    """
    shares = [[len(group["params"]) for group in state["param_groups"]] for state in (old, fresh)]
    if shares[0] != shares[1]:
        raise ValueError(
            f"training.start_moments needs groups of {shares[1]} parameters, as the optimizer has, got {shares[0]}"
        )
    # The earlier numbers of the parameters and the new ones, in the order of the groups.
    numbers = [[n for group in state["param_groups"] for n in group["params"]] for state in (old, fresh)]
    state = {}
    for before, now, parameter in zip(*numbers, parameters, strict=True):
        if before in old["state"]:
            entries = old["state"][before]
            state[now] = {name: _padded(name, now, value, parameter) for name, value in entries.items()}
    return {**fresh, "state": state}


def _padded(name: str, number: int, value: Any, parameter: Tensor) -> Any:
    """A moment with rows of zeros behind its own; a count of steps as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape:
        return value
    if value.shape[1:] != parameter.shape[1:] or value.shape[0] > parameter.shape[0]:
        raise ValueError(
            f"{name} of parameter {number} of the optimizer: got {tuple(value.shape)} in the earlier run, wanted "
            f"{tuple(parameter.shape)} (at most so many rows)"
        )
    rows = value.new_zeros((parameter.shape[0] - value.shape[0], *value.shape[1:]))
    return torch.cat([value, rows])


def start(config: Config, prepared: Prepared, model: nn.Module, optimizer: Optimizer) -> Path:
    """Give a new run's model the weights of the run ``training.start_from``: the best ones, or those of the last
    checkpoint where there are no best ones. With ``training.start_moments`` they are those of the last checkpoint,
    which has the moments that belong to them.

    Returns the file. Raises ``FileNotFoundError`` where there is no run, ``CheckpointError`` for damaged checkpoints
    and ``ValueError`` for data that do not descend from those of the earlier run, another model or another optimizer.
    """
    folder = user_path(config.training.start_from or "")
    content, path = _content(folder, config.training.start_moments)
    check_descent(content["fingerprint"], prepared, f"training.start_from={folder}")
    earlier = Config.from_dict(content["config"])
    changed = _changed(earlier, config)
    if changed:
        raise ValueError(f"the model must be that of {folder} (training.start_from): {'; '.join(changed)}")
    try:
        model.load_state_dict(widened(content["model"], model.state_dict(), growing_tables(model)))
        if config.training.start_moments:
            _move_moments(earlier, config, content["optimizer"], optimizer)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this run: {error}") from None
    return path


def _content(folder: Path, moments: bool) -> tuple[dict[str, Any], Path]:
    places = folder / setup.CHECKPOINTS
    best = places / BEST
    if best.exists() and not moments:
        return checkpoint.load(best), best
    found = checkpoint.load_latest(places) if places.is_dir() else None
    if found is None:
        what = "no checkpoint of a step" if best.exists() else "no checkpoint"
        raise FileNotFoundError(f"{folder} (training.start_from) holds no run to start from: there is {what}")
    return found


def _changed(earlier: Config, config: Config) -> list[str]:
    """What differs between the models of two configs and is not in ``FREE``; values that are not given are those of the
    model."""
    plain = []
    for model in (earlier.model, config.model):
        known = MODELS[model.name].options() if model.name in MODELS and model.preset is None else {}
        options = {key: _merged(known.get(key), model.options.get(key, known.get(key))) for key in
                   {**known, **model.options}}  # fmt: skip
        plain.append({"model": {"name": model.name, "preset": model.preset, "options": options}})
    lines = differences(*plain)
    return [line for line in lines if not any(line.startswith((f"{free} ", f"{free}.")) for free in FREE)]


def _merged(known: Any, given: Any) -> Any:
    """The options of a group: those given, the others as the model has them."""
    return {**known, **given} if isinstance(known, Mapping) and isinstance(given, Mapping) else given


def _move_moments(earlier: Config, config: Config, old: dict[str, Any], optimizer: Optimizer) -> None:
    names = earlier.optimizer.name, config.optimizer.name
    if names[0] != names[1]:
        raise ValueError(f"training.start_moments needs optimizer.name={names[0]}, that of the earlier run, got "
                         f"{names[1]}")  # fmt: skip
    fresh = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if set(fresh) == {"dense", "tables"}:  # LazyAdam has two optimizers of torch
        found: dict[str, Any] = {}
        for part in ("dense", "tables"):
            if (old[part] is None) != (fresh[part] is None):
                raise ValueError(f"training.start_moments needs {part} parameters in both runs or in none")
            if fresh[part] is None:
                found[part] = None
                continue
            size = sum(len(group["params"]) for group in fresh[part]["param_groups"])
            found[part] = widened_moments(old[part], fresh[part], parameters[:size])
            parameters = parameters[size:]
    else:
        found = widened_moments(old, fresh, parameters)
    optimizer.load_state_dict(found)
