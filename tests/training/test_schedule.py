"""Schedules of torch by name: built from plain options, saved and restored bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dien_kernels.training.optimizer import LazyAdam
from dien_kernels.training.schedule import SCHEDULES, make_schedule, step_schedule

OPTIONS: dict[str, dict[str, Any]] = {
    "ChainedScheduler": {"schedulers": [{"name": "ConstantLR"}, {"name": "ExponentialLR", "options": {"gamma": 0.5}}]},
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "CosineAnnealingLR": {"T_max": 7},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "ExponentialLR": {"gamma": 0.5},
    "LinearLR": {"start_factor": 0.1},
    "MultiStepLR": {"milestones": [2, 5]},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
    "PolynomialLR": {"total_iters": 9},
    "ReduceLROnPlateau": {"patience": 0},
    "SequentialLR": {
        "schedulers": [
            {"name": "LinearLR", "options": {"total_iters": 4}},
            {"name": "CosineAnnealingLR", "options": {"T_max": 6}},
        ],
        "milestones": [4],
    },
    "StepLR": {"step_size": 2},
}


def optimizer() -> LazyAdam:
    torch.manual_seed(0)
    table, linear = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1)
    return LazyAdam(list(linear.parameters()), [table.weight], 0.1, table_lr=0.3)


def rates(found: LazyAdam, schedule: Any, steps: int) -> list[list[float]]:
    rows = []
    for number in range(steps):
        found.step()
        schedule.step(*([0.5 + number % 3] if isinstance(schedule, ReduceLROnPlateau) else []))
        rows.append([group["lr"] for group in found.param_groups])
    return rows


def test_every_schedule_of_torch_is_there() -> None:
    functions = {"LambdaLR", "MultiplicativeLR"}
    assert set(OPTIONS) | functions == set(SCHEDULES)
    for name in functions:
        with pytest.raises(ValueError, match="a schedule without functions, which no config can hold"):
            make_schedule(optimizer(), name)


@pytest.mark.parametrize("name", OPTIONS)
def test_step_sizes_change_and_are_restored(name: str) -> None:
    """Through ``torch.save`` and ``weights_only=True``, as checkpoints have them."""
    straight = optimizer()
    schedule = make_schedule(straight, name, OPTIONS[name])
    first = rates(straight, schedule, 5)
    assert len({tuple(row) for row in first}) > 1, "the step sizes never changed"
    buffer = io.BytesIO()
    torch.save({"optimizer": straight.state_dict(), "schedule": schedule.state_dict()}, buffer)
    expected = rates(straight, schedule, 6)
    resumed = optimizer()
    again = make_schedule(resumed, name, copy.deepcopy(OPTIONS[name]))
    buffer.seek(0)
    content = torch.load(buffer, weights_only=True)
    resumed.load_state_dict(content["optimizer"])
    again.load_state_dict(content["schedule"])
    assert rates(resumed, again, 6) == expected


def test_exponential_is_the_power_of_gamma() -> None:
    found = optimizer()
    schedule = make_schedule(found, "ExponentialLR", {"gamma": 0.7})
    for number, (dense, table) in enumerate(rates(found, schedule, 4), 1):
        assert dense == pytest.approx(0.1 * 0.7**number, rel=1e-12)
        assert table == pytest.approx(0.3 * 0.7**number, rel=1e-12)


@pytest.mark.parametrize("higher", [True, False])
def test_plateau_knows_the_direction_of_the_metric(higher: bool) -> None:
    found = optimizer()
    schedule: Any = make_schedule(found, "ReduceLROnPlateau", {"patience": 0}, higher_is_better=higher)
    for value in (0.5, 0.6):  # better, or worse
        schedule.step(value)
    assert found.param_groups[0]["lr"] == (0.1 if higher else pytest.approx(0.01))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("StepLR", {"step_size": 1, "gama": 0.5}, "unknown option schedule.options.gama: did you mean gamma"),
        ("StepLR", {}, "schedule.options must have 'step_size' for StepLR"),
        ("Step", {}, "unknown schedule Step: did you mean StepLR"),
        ("StepLR", {"step_size": 0}, "the schedule StepLR refuses its options .schedule.options.: .*zero"),
        ("ExponentialLR", {"gamma": "x"}, "the schedule ExponentialLR refuses its options"),
        ("ExponentialLR", {"gamma": -1}, "step sizes must be finite and at least 0, but it makes one of -0.1"),
        ("ExponentialLR", {"gamma": float("nan")}, "step sizes must be finite and at least 0, but it makes one of nan"),
        ("CyclicLR", {"base_lr": -1.0, "max_lr": 1.0}, "step sizes must be finite and at least 0"),
        ("CosineAnnealingLR", {"T_max": 0}, "the schedule CosineAnnealingLR refuses its options"),
        (
            "SequentialLR",
            {
                "schedulers": [{"name": "ConstantLR"}, {"name": "StepLR", "options": {"step_size": 0}}],
                "milestones": [9],
            },
            "the schedule StepLR refuses its options",
        ),
        ("CosineAnnealingWarmRestarts", {"T_0": 0}, "the schedule CosineAnnealingWarmRestarts refuses its options"),
        ("SequentialLR", {"schedulers": ["StepLR"], "milestones": []}, "must be a list of schedules, each with name"),
        (
            "ChainedScheduler",
            {"schedulers": [{"name": "StepLr"}]},
            "unknown schedule StepLr: did you mean StepLR",
        ),
        (
            "ChainedScheduler",
            {"schedulers": [{"name": "StepLR"}]},
            r"schedule.options.schedulers\[0\].options must have 'step_size'",
        ),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(optimizer(), name, options)


def test_a_schedule_is_tried_on_another_optimizer() -> None:
    found = optimizer()
    make_schedule(found, "ExponentialLR", {"gamma": 0.5})
    assert [group["lr"] for group in found.param_groups] == [0.1, 0.3]
    assert make_schedule(optimizer(), "OneCycleLR", {"max_lr": 0.1, "total_steps": 1}).last_epoch == 0


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 3}, "the schedule OneCycleLR cannot go on: Tried to step"),
        ("MultiStepLR", {"milestones": [4], "gamma": -1}, "the schedule MultiStepLR cannot go on: step sizes must be"),
    ],
)
def test_a_later_step_that_is_refused_names_the_schedule(name: str, options: dict[str, Any], message: str) -> None:
    found = optimizer()
    schedule = make_schedule(found, name, options)
    for _ in range(3):
        found.step()
        step_schedule(schedule)
    with pytest.raises(ValueError, match=message) as error:
        step_schedule(schedule)
    assert "Change schedule.options, schedule.every or training.epochs" in str(error.value)
