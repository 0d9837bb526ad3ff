"""Runs of the first version of configs, whose options had no groups, as they are now.

Such runs were written up to November 2026. What a user writes is not converted: there an old name is an error that says
the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dien_kernels.models.options import from_flat
from dien_kernels.training.checkpoint import CheckpointError
from dien_kernels.training.config import VERSION, Config, from_file, read


def load_saved(path: str | Path) -> Config:
    """The config that a run of this or of the first version has written. Raises as ``load`` does."""
    given = read(path)
    if "version" not in given:
        try:
            given = upgrade_config(given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return from_file(path, given)


def upgrade_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the first version as plain data of this one.

    Raises ``ValueError`` for sections that are no mappings, and for those that the first version did not have.
    """
    for section in ("optimizer", "schedule"):
        if section in plain:
            raise ValueError(
                f"version must be {VERSION} in a config with the section {section}, got none: add the line "
                f"'version: {VERSION}'"
            )
    model, training = (_mapping(plain.get(section), section) for section in ("model", "training"))
    if model.get("options"):
        model["options"] = from_flat(model.get("name", "dien"), _mapping(model["options"], "model.options"))
    optimizer: dict[str, Any] = {}
    for old, new in (("lr", "lr"), ("embedding_lr", "table_lr")):
        if old in training:
            optimizer[new] = training.pop(old)
    decay, factor = training.pop("weight_decay", 0.0), training.pop("lr_decay", 1.0)
    if decay:
        optimizer["options"] = {"weight_decay": decay}
    schedule = {} if factor == 1 else {"name": "ExponentialLR", "every": "epoch", "options": {"gamma": factor}}
    return {**plain, "model": model, "optimizer": optimizer, "schedule": schedule, "training": training}


def _mapping(values: Any, where: str) -> dict[str, Any]:
    """A copy; of None (an empty section of a YAML file) a mapping without keys."""
    if values is None:
        return {}
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} must be a mapping from names to values, got {values!r}")
    return dict(values)


_PARTS = ("model", "optimizer", "scaler", "state", "config", "fingerprint")  # of a step checkpoint of every version


def upgrade_checkpoint(content: Mapping[str, Any], path: str | Path = "of a step") -> dict[str, Any]:
    """A step checkpoint of this or of the first version, as one of this version; ``path`` is for error messages.

    The step sizes of the first version were lr * lr_decay^epoch, set when an epoch began. Here a schedule changes them,
    when an epoch ends; its state is what it would be in this epoch.

    Raises ``CheckpointError`` naming ``path`` for another version, for parts that are missing, and for a config that
    cannot be converted.
    """
    version = content.get("version", 1)  # the first version wrote none
    if version not in (1, VERSION):
        raise CheckpointError(f"checkpoint {path} must be of version {VERSION} or older, got version {version!r}")
    _require(content, (*_PARTS, "schedule") if version == VERSION else _PARTS, path, "")
    _require(content["state"], ("best" if version == VERSION else "best_auc", "epoch"), path, "state.")
    if version == VERSION:
        return dict(content)
    try:
        return _upgraded(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} of the first version cannot be converted: {error}") from error


def _require(content: Any, names: Sequence[str], path: str | Path, where: str) -> None:
    missing = [where + name for name in names if not isinstance(content, Mapping) or name not in content]
    if missing:
        raise CheckpointError(f"checkpoint {path} is none of a training step: it has no {', '.join(missing)}")


def _upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    config = Config.from_dict(upgrade_config(content["config"]))
    state = dict(content["state"])
    state["best"] = state.pop("best_auc")
    upgraded = {**content, "version": VERSION, "config": config.to_dict(), "state": state, "schedule": None}
    if config.schedule.name is not None:
        optimizer, factor = config.optimizer, config.schedule.options["gamma"] ** state["epoch"]
        first = {"dense": optimizer.lr, "tables": optimizer.lr if optimizer.table_lr is None else optimizer.table_lr}
        bases = [first[name] for name in ("dense", "tables") if content["optimizer"][name] is not None]
        rates = [base * factor for base in bases]
        upgraded["schedule"] = {"last_epoch": state["epoch"], "base_lrs": bases, "_last_lr": rates}
        parts = {}
        for name, part in content["optimizer"].items():
            if part is not None:
                rate = {"lr": first[name] * factor, "initial_lr": first[name]}
                groups = [{**group, **rate} for group in part["param_groups"]]
                part = {**part, "param_groups": groups}
            parts[name] = part
        upgraded["optimizer"] = parts
    return upgraded
