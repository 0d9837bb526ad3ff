"""One seed, two backends, one loss curve: rounding must not grow into another run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dien_kernels import use_backend
from dien_kernels.models import build
from dien_kernels.training.optimizer import make_optimizer
from dien_kernels.training.step import training_step
from tests.models.common import SCHEMA, SMALL_OF, nested, random_batch

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 200
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-3}


def curve(backend: str, preset: str, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(3)
    model = build("dien", SCHEMA, nested(SMALL_OF["dien"]), preset).to(dtype)
    optimizer = make_optimizer(model, lr=1e-2)
    batches = [random_batch([3, 0, 5, 1], [0, 1, 2, 2, 3, 0], seed=seed) for seed in range(10)]
    losses = []
    with use_backend(backend):
        for step in range(STEPS):
            result = training_step(model, [batches[step % len(batches)]], optimizer, clip_norm=5.0)
            losses.append(result.total)
    return torch.stack(losses).double()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_fused_ops_and_plain_torch_give_one_loss_curve(
    preset: str, dtype: torch.dtype, record_property: Callable[[str, Any], None]
) -> None:
    fused, plain = curve("auto", preset, dtype), curve("torch", preset, dtype)
    difference = ((fused - plain).abs() / plain.abs()).cummax(0).values
    for step in (1, 10, 50, 100, 200):
        record_property(f"largest relative difference up to step {step}", float(difference[step - 1]))
    assert float(difference[-1]) <= LIMIT[dtype]
    assert float(plain[-20:].mean()) < 0.9 * float(plain[:20].mean()), "nothing was learned"
