"""One seed, two backends, one loss curve: rounding must not grow into another run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dien_kernels import use_backend
from dien_kernels.models import build
from dien_kernels.training.optimizer import clip_grad_norm, make_optimizer
from tests.models.common import SCHEMA, SMALL_OF, random_batch

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 200
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-3}


def curve(backend: str, preset: str, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(3)
    model = build("dien", SCHEMA, SMALL_OF["dien"], preset).to(dtype)
    optimizer = make_optimizer(model, lr=1e-2)
    batches = [random_batch([3, 0, 5, 1], [0, 1, 2, 2, 3, 0], seed=seed) for seed in range(10)]
    losses = []
    with use_backend(backend):
        for step in range(STEPS):
            batch = batches[step % len(batches)]
            optimizer.zero_grad()
            loss = model.loss(model(batch), batch.label).total
            loss.backward()
            clip_grad_norm(model.parameters(), 5.0)
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).double()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_fused_and_reference_backends_give_one_loss_curve(
    preset: str, dtype: torch.dtype, record_property: Callable[[str, Any], None]
) -> None:
    fused, reference = curve("auto", preset, dtype), curve("reference", preset, dtype)
    difference = ((fused - reference).abs() / reference.abs()).cummax(0).values
    for step in (1, 10, 50, 100, 200):
        record_property(f"largest relative difference up to step {step}", float(difference[step - 1]))
    assert float(difference[-1]) <= LIMIT[dtype]
    assert float(reference[-20:].mean()) < 0.9 * float(reference[:20].mean()), "nothing was learned"
