"""What the ops' ``autograd.Function``s share: when a call needs one, and errors in place of derivatives that it lacks.

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
    """Whether a call must go through its ``autograd.Function``, because a raw op alone has no derivative.

    A dual tensor of forward-mode differentiation need not require a gradient. So every call inside a forward-mode level
    takes the Function, which has no ``jvp`` and therefore raises an error instead of giving a wrong derivative.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors, under ``torch.compile`` with a view in place of each repeated one.

    ``torch.compile`` refuses a Function that gets the same tensor in two places.
    """
    if not torch.compiler.is_compiling():
        return tuple(tensors)
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.view_as(t) if t is not None and any(t is before for before in found) else t)
    return tuple(found)


class _Bound(NamedTuple):
    """What ``Function.apply`` uses of an ``inspect.BoundArguments``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """Do nothing, because every argument is given."""


class _Signature(inspect.Signature):
    """A signature that binds positional arguments without looking at each of them."""

    def __init__(self, parameters: Sequence[inspect.Parameter] | None = None, **rest: Any) -> None:
        super().__init__(parameters, **rest)
        self._fixed = sum(p.kind is not p.VAR_POSITIONAL for p in self.parameters.values())
        self._open = self._fixed < len(self.parameters)

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        more = len(args) - self._fixed
        if kwargs or more < 0 or (more and not self._open):
            return super().bind(*args, **kwargs)  # raises the error that says what is wrong
        return _Bound(args, kwargs)


def by_position(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for ``forward`` methods that are always given all their arguments by position.

    In every call, ``Function.apply`` computes the signature of ``forward`` and binds the arguments to it, to fill in
    defaults. At B = T = 1 that takes a third of the time of a call. The signature stored here is computed once and
    binds faster.
    """
    forward.__signature__ = _Signature(list(inspect.signature(forward).parameters.values()))  # type: ignore[attr-defined]
    return forward


class _Refuse(torch.autograd.Function):
    """The identity on all tensors after the first ``count``; taking a derivative by any of the tensors is an error."""

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
    """Decorator for ``backward`` methods that makes it an error to differentiate the gradients again.

    ``torch.autograd.function.once_differentiable`` raises an error only where an incoming gradient requires a gradient
    itself. Where it is constant, as for ``y.sum()``, a second derivative would lack terms without an error. Here the
    gradients depend, through ``_Refuse``, on all they are functions of: the incoming gradients and the saved tensors.
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
    """Make the ``autograd.Function`` of an op, which is applied to ``(backend, groups, options, *tensors)``.

    ``groups`` tells ``forward`` and ``backward`` how to regroup the flat list of tensors; its type is up to the op.

    Args:
        forward: ``forward(backend, groups, options, tensors)`` returns a tensor or a tuple of tensors.
        kept: takes these results as a tuple and returns the ones that the backward needs beside the inputs.
        backward: ``backward(ctx, gradients, saved)`` returns a gradient or None for each of the tensors. ``saved``
            holds the ``ctx.count`` tensors of the call, then those that ``kept`` returned; ``ctx.backend``,
            ``ctx.groups`` and ``ctx.options`` are those of the call. An output that the loss does not depend on has
            None in ``gradients``.
        outputs: the number of outputs that have a derivative; they come first.
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
            if len(results) > outputs:  # Dynamo refuses a call without arguments for a single result
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
