"""What the ops' ``autograd.Function``s share: when they are needed, and the refusal of every further derivative.

Room card. Lives here: ``function_of``, which makes an op's ``autograd.Function``, and its parts. May import: torch.
Must not be here: any op's own derivative.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_autograd(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call must go through its Function: a raw op alone has no derivative, and would silently give zero.

    A dual tensor of forward mode does not require a gradient; inside a level of it, the Function, which has no ``jvp``,
    is there to refuse.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors; under ``torch.compile``, which refuses one of them in two places of a Function, the second time a
    view."""
    if not torch.compiler.is_compiling():
        return tuple(tensors)
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.view_as(t) if t is not None and any(t is before for before in found) else t)
    return tuple(found)


class _Bound(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


class _Signature(inspect.Signature):
    def __init__(self, parameters: Sequence[inspect.Parameter] | None = None, **rest: Any) -> None:
        super().__init__(parameters, **rest)
        self._fixed = sum(p.kind is not p.VAR_POSITIONAL for p in self.parameters.values())
        self._open = self._fixed < len(self.parameters)

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        more = len(args) - self._fixed
        if kwargs or more < 0 or (more and not self._open):
            return super().bind(*args, **kwargs)  # says what is wrong
        return _Bound(args, kwargs)


def by_position(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For ``forward`` methods whose arguments are all given, by position.

    ``Function.apply`` asks in every call for the signature of ``forward`` and binds the arguments to it, in case some
    are left to their defaults: a third of a call at B = T = 1. This signature is there already and binds at once.
    """
    forward.__signature__ = _Signature(list(inspect.signature(forward).parameters.values()))  # type: ignore[attr-defined]
    return forward


class _Refuse(torch.autograd.Function):
    """The identity on the tensors behind the first ``count``, with an error for a derivative by any of them."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(
            "dien_kernels' ops can be differentiated once, not twice: their backward passes are kernels without a "
            "derivative of their own"
        )


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """For ``backward`` methods: gradients that refuse to be differentiated.

    ``torch.autograd.function.once_differentiable`` does so only where the incoming gradient wants a derivative
    itself; with a constant one (``y.sum()``) the terms that a second derivative lacks would go unnoticed. So the
    gradients are made to hang on everything that they are functions of: what arrives, and what was saved.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *arriving: Tensor | None) -> tuple[Any, ...]:
        compiling = torch.compiler.is_compiling()
        if not compiling and not torch.is_grad_enabled():
            return backward(ctx, *arriving)
        saved = () if compiling else ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, *arriving)
        causes = [t for t in (*arriving, *saved) if t is not None and t.requires_grad]
        if not causes or not saved:
            return gradients
        there = [g for g in gradients if g is not None]
        refusing = iter(_Refuse.apply(len(causes), *causes, *there))
        return tuple(None if g is None else next(refusing) for g in gradients)

    return wrapped


def function_of(
    forward: Callable[..., Any],
    kept: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    backward: Callable[..., Sequence[Tensor | None]],
    *,
    outputs: int,
) -> Any:
    """The ``autograd.Function`` of an op, to be applied to ``(backend, groups, options, *tensors)``.

    Args:
        forward: ``forward(backend, groups, options, tensors)`` returns a tensor or a tuple of tensors.
        kept: of these, the ones that the backward needs, beside the inputs.
        backward: ``backward(ctx, gradients, saved)`` returns a gradient or None for each of the tensors. ``saved`` are
            the ``ctx.count`` tensors, then what was kept; ``ctx.backend``, ``ctx.groups`` and ``ctx.options`` are those
            of the call, and a gradient that does not arrive is None.
        outputs: how many of the outputs, from the first on, have a derivative.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        @by_position
        def forward(backend, groups, options, *tensors):  # type: ignore[no-untyped-def]
            return forward(backend, groups, options, tensors)

        @staticmethod
        def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
            ctx.backend, ctx.groups, ctx.options = inputs[:3]
            ctx.count = len(inputs) - 3
            results = output if isinstance(output, tuple) else (output,)
            ctx.set_materialize_grads(False)
            if len(results) > outputs:  # Dynamo takes the empty call only where there are several results
                ctx.mark_non_differentiable(*results[outputs:])
            ctx.save_for_backward(*inputs[3:], *kept(results))

        @staticmethod
        @differentiable_once
        def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
            gradients = gradients[:outputs]
            for gradient in gradients:
                if gradient is not None:
                    return (None, None, None, *backward(ctx, gradients, ctx.saved_tensors))
            return (None,) * (3 + ctx.count)

    return Function
