"""One training step: forward, loss, backward, clipping, and the move of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from dien_kernels.batch import Batch
from dien_kernels.models import RankingModel
from dien_kernels.training.optimizer import clip_grad_norm

Watch = Callable[[str, "Tensor | None"], None]


class StepResult(NamedTuple):
    """What a step says about its batches; no tensor of it has a gradient."""

    total: Tensor  # scalar, the loss whose gradient moved the parameters
    click: Tensor  # scalar
    auxiliary: Tensor | None  # scalar; None where the model has no auxiliary loss
    logits: Tensor  # [B], of all batches
    label: Tensor  # [B]


def training_step(
    model: RankingModel,
    batches: Sequence[Batch] | Batch,
    optimizer: Optimizer,
    *,
    device: torch.device | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    watch: Watch | None = None,
) -> StepResult:
    """Move the parameters of ``model`` by the gradient of its loss on ``batches``.

    The gradient of several batches is that of one batch with all of their rows, as the loss of each gets the share that
    it has in the loss of that batch (``RankingModel.shares``). This is exact, except that Dice and norms of a batch use
    that batch's statistics.

    Args:
        model: in training mode.
        batches: at least one, with at least one row among them; they need as much memory as the largest of them. A
            batch without rows counts for nothing and does not run.
        optimizer: of the model's parameters.
        device: to which batches are moved; None: they are there.
        scaler: of the loss, for float16.
        clip_norm: the largest norm of all gradients together; None does not clip.
        autocast: makes the context of forward and loss.
        watch: called with ``"forward"``, ``"loss"``, ``"backward"`` and ``"optimizer"`` when this part begins, and with
            the loss where there is one; ``"end"`` at last.

    The gradients stay in the parameters until the next step. Nothing is read from the device. Raises ``TypeError`` for
    what is no batch, ``ValueError`` for no batches, no rows, and weights of rows that are not finite or negative where
    they lie on the CPU (on a device they are not read), and what model and optimizer raise.
    """
    batches = _with_rows(batches)
    several = len(batches) > 1
    shares = model.shares(batches) if several else [None]
    if watch is not None:
        watch("optimizer", None)
    optimizer.zero_grad(set_to_none=True)
    parts = []
    for batch, share in zip(batches, shares, strict=True):
        if watch is not None:
            watch("forward", None)
        if device is not None:
            batch = batch.to(device, non_blocking=True)
        with autocast():
            output = model(batch)
            if watch is not None:
                watch("loss", None)
            losses = model.loss(output, batch.label, weight=batch.weight, share=share)
        if watch is not None:
            watch("backward", losses.total)
        (losses.total if scaler is None else scaler.scale(losses.total)).backward()
        auxiliary = losses.auxiliary
        parts.append(
            StepResult(
                losses.total.detach(),
                losses.click.detach(),
                None if auxiliary is None else auxiliary.detach(),
                output.logits.detach(),
                cast(Tensor, batch.label),  # ``loss`` has refused a batch without labels
            )
        )
    if watch is not None:
        watch("optimizer", None)
    if clip_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        clip_grad_norm(model.parameters(), clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if watch is not None:
        watch("end", None)
    return _joined(parts) if several else parts[0]


def _with_rows(batches: Sequence[Batch] | Batch) -> list[Batch]:
    """The batches that have rows, checked as ``training_step`` says."""
    batches = [batches] if isinstance(batches, Batch) else list(batches)
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    for i, batch in enumerate(batches):
        if not isinstance(batch, Batch):
            raise TypeError(f"batches must be a Batch or a list of them, got {type(batch).__name__} as batches[{i}]")
    found = [batch for batch in batches if batch.rows]
    if not found:
        raise ValueError("batches must have at least one row, got none")
    for i, batch in enumerate(batches):
        weight = batch.weight
        if weight is not None and weight.device.type == "cpu" and weight.numel():
            low, high = torch.aminmax(weight)  # NaN if one is
            if not (low >= 0 and high < float("inf")):
                raise ValueError(
                    f"batches[{i}].weight must be finite and at least 0, got values from {float(low)} to {float(high)}"
                )
    return found


def _joined(parts: list[StepResult]) -> StepResult:
    """The sums of losses, each of which is its batch's share already."""
    auxiliary = [part.auxiliary for part in parts if part.auxiliary is not None]
    return StepResult(
        torch.stack([part.total for part in parts]).sum(),
        torch.stack([part.click for part in parts]).sum(),
        torch.stack(auxiliary).sum() if auxiliary else None,
        torch.cat([part.logits for part in parts]),
        torch.cat([part.label for part in parts]),
    )
