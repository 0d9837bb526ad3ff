"""What the ops' ``autograd.Function``s share: the refusal of a second derivative.

Room card. Lives here: ``differentiable_once``. May import: torch. Must not be here: any op's own derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    """The identity, with an error for a derivative."""

    @staticmethod
    def forward(anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "dien_kernels' ops can be differentiated once, not twice: their backward passes are kernels without "
            "a derivative of their own"
        )


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """For ``backward`` methods: gradients that refuse to be differentiated.

    ``torch.autograd.function.once_differentiable`` does so only where the incoming gradient wants a derivative
    itself; with a constant one (``y.sum()``) the terms that a second derivative lacks would go unnoticed.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *arriving: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *arriving)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        there = [g for g in gradients if g is not None]
        refusing = iter(_Refuse.apply(torch.empty(0, requires_grad=True), *there))
        return tuple(None if g is None else next(refusing) for g in gradients)

    return wrapped
