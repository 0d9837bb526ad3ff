"""Schedules of step sizes: every class of ``torch.optim.lr_scheduler`` whose options a config can hold."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau

from dien_kernels._options import unknown_name

SCHEDULES: dict[str, type[LRScheduler]] = {
    name: kind
    for name, kind in vars(lr_scheduler).items()
    if isinstance(kind, type) and issubclass(kind, LRScheduler) and kind is not LRScheduler and name[0] != "_"
}
_INNER = "schedulers"  # the option of SequentialLR and ChainedScheduler that holds further schedules
# What torch makes of options that it cannot use; it looks at few of them before the first step.
_REFUSALS = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError)


def _options_of(name: str) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(SCHEDULES[name]).parameters)
    for given_by_us in ("optimizer", "last_epoch"):
        parameters.pop(given_by_us, None)
    return parameters


def check_schedule(name: str, options: Mapping[str, Any], where: str = "schedule") -> None:
    """Raise ``ValueError`` for a name that is no schedule, and for options that the schedule does not have."""
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    known = _options_of(name)
    if "lr_lambda" in known:
        raise ValueError(f"{where}.name must be a schedule without functions, which no config can hold, got {name}")
    for option in options:
        if option not in known:
            raise unknown_name("option", str(option), known, f"{where}.options")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"{where}.options must have {option!r} for {name}")
    if _INNER in known:
        for i, inner in enumerate(_inner_of(options, where)):
            check_schedule(inner["name"], inner.get("options") or {}, f"{where}.options.{_INNER}[{i}]")


def _inner_of(options: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    inner = options[_INNER]
    right = isinstance(inner, (list, tuple)) and all(
        isinstance(one, Mapping)
        and "name" in one
        and set(one) <= {"name", "options"}
        and isinstance(one.get("options") or {}, Mapping)
        for one in inner
    )
    if not right:
        allowed = "a list of schedules, each with name and options"
        raise ValueError(f"{where}.options.{_INNER} must be {allowed}, got {inner!r}")
    return list(inner)


def make_schedule(
    optimizer: Optimizer, name: str, options: Mapping[str, Any] | None = None, *, higher_is_better: bool = True
) -> LRScheduler:
    """The schedule ``name`` of ``torch.optim.lr_scheduler`` on ``optimizer``.

    Args:
        optimizer: whose step sizes are to be changed.
        name: of the class.
        options: its keyword options. ``SequentialLR`` and ``ChainedScheduler`` take further schedules in
            ``schedulers``, each a mapping with ``name`` and ``options``.
        higher_is_better: the direction of the metric that ``ReduceLROnPlateau`` is given, unless ``mode`` says it.

    The schedule is tried in two steps on an optimizer of its own first. Raises ``ValueError`` for an unknown name or
    option, for values that torch refuses, and for step sizes that are not finite or negative.
    """
    options = dict(options or {})
    check_schedule(name, options)
    kind: Any = SCHEDULES[name]
    if issubclass(kind, ReduceLROnPlateau):
        options.setdefault("mode", "max" if higher_is_better else "min")
    try:
        trial = _Still(optimizer)
        tried = _made(trial, kind, options)
        _check_step_sizes(tried)
        for _ in range(min(2, getattr(tried, "total_steps", 2))):
            trial.step()
            _move(tried, *([0.5] if isinstance(tried, ReduceLROnPlateau) else []))
        return _made(optimizer, kind, options)
    except _REFUSALS as error:
        raise ValueError(f"the schedule {name} refuses its options (schedule.options): {error}") from error


def step_schedule(schedule: LRScheduler, *metric: float) -> None:
    """Let ``schedule`` move the step sizes on; ``metric`` is the value that ``ReduceLROnPlateau`` is given.

    Raises ``ValueError`` naming the schedule where torch refuses the step, as ``OneCycleLR`` does after its last, and
    for step sizes that are not finite or negative.
    """
    try:
        _move(schedule, *metric)
    except _REFUSALS as error:
        raise ValueError(
            f"the schedule {type(schedule).__name__} cannot go on: {error}. Change schedule.options, schedule.every or "
            "training.epochs"
        ) from error


class _Still(Optimizer):
    """The step sizes and options of another optimizer on parameters of its own, which it never moves."""

    def __init__(self, other: Optimizer) -> None:
        groups = [{name: value for name, value in group.items() if name != "params"} for group in other.param_groups]
        super().__init__(
            [{**copy.deepcopy(group), "params": [torch.zeros(1)]} for group in groups], copy.deepcopy(other.defaults)
        )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def _made(optimizer: Optimizer, kind: Any, options: Mapping[str, Any]) -> LRScheduler:
    options = dict(options)
    first: list[Any] = [optimizer]
    if _INNER in _options_of(kind.__name__):
        inner = [make_schedule(optimizer, one["name"], one.get("options")) for one in options.pop(_INNER)]
        first = [inner] if kind is ChainedScheduler else [optimizer, inner]
    schedule: LRScheduler = kind(*first, **options)
    return schedule


def _move(schedule: Any, *metric: float) -> None:
    schedule.step(*metric)
    _check_step_sizes(schedule)


def _check_step_sizes(schedule: LRScheduler) -> None:
    for group in schedule.optimizer.param_groups:
        if not (math.isfinite(group["lr"]) and group["lr"] >= 0):
            raise ValueError(f"step sizes must be finite and at least 0, but it makes one of {group['lr']}")
