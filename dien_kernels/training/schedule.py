"""Schedules of step sizes: every class of ``torch.optim.lr_scheduler`` whose options a config can hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR

from dien_kernels._options import unknown_name

SCHEDULES: dict[str, type[LRScheduler]] = {
    name: kind
    for name, kind in vars(lr_scheduler).items()
    if isinstance(kind, type) and issubclass(kind, LRScheduler) and kind is not LRScheduler and name[0] != "_"
}
_INNER = "schedulers"  # the option of SequentialLR and ChainedScheduler that holds further schedules


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

    Raises ``ValueError`` for an unknown name or option, and for values that torch refuses.
    """
    options = dict(options or {})
    check_schedule(name, options)
    kind: Any = SCHEDULES[name]
    if issubclass(kind, ReduceLROnPlateau):
        options.setdefault("mode", "max" if higher_is_better else "min")
    try:
        if issubclass(kind, (SequentialLR, ChainedScheduler)):
            inner = [make_schedule(optimizer, one["name"], one.get("options")) for one in options.pop(_INNER)]
            found = kind(inner, **options) if kind is ChainedScheduler else kind(optimizer, inner, **options)
        else:
            found = kind(optimizer, **options)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"the schedule {name} refuses its options: {error}") from error
    schedule: LRScheduler = found
    return schedule
