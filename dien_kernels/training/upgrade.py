"""Runs of the first version of configs, whose options had no groups, as they are now.

Such runs were written up to November 2026. What a user writes is not converted: there an old name is an error that says
the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dien_kernels.models.options import from_flat
from dien_kernels.training.config import VERSION, Config, from_file, read


def load_saved(path: str | Path) -> Config:
    """The config that a run of this or of the first version has written. Raises as ``load`` does."""
    given = read(path)
    return from_file(path, given if "version" in given else upgrade_config(given))


def upgrade_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the first version as plain data of this one."""
    model, training = dict(plain.get("model") or {}), dict(plain.get("training") or {})
    if model.get("options"):
        model["options"] = from_flat(model.get("name", "dien"), model["options"])
    optimizer: dict[str, Any] = {}
    for old, new in (("lr", "lr"), ("embedding_lr", "table_lr")):
        if old in training:
            optimizer[new] = training.pop(old)
    decay, factor = training.pop("weight_decay", 0.0), training.pop("lr_decay", 1.0)
    if decay:
        optimizer["options"] = {"weight_decay": decay}
    schedule = {} if factor == 1 else {"name": "ExponentialLR", "every": "epoch", "options": {"gamma": factor}}
    return {**plain, "model": model, "optimizer": optimizer, "schedule": schedule, "training": training}


def upgrade_checkpoint(content: Mapping[str, Any]) -> dict[str, Any]:
    """A step checkpoint of this or of the first version, as one of this version.

    The step sizes of the first version were lr * lr_decay^epoch, set when an epoch began. Here a schedule changes them,
    when an epoch ends; its state is what it would be in this epoch.
    """
    if content.get("version") == VERSION:
        return dict(content)
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
