"""What the ops' ``autograd.Function``s share: when a call needs one, and errors in place of derivatives that it lacks.

Room card. Lives here: ``function_of``, which makes an op's ``autograd.Function``, and its parts. May import: torch.
Must not be here: any op's own derivative.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_autograd(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call must go through its ``autograd.Function``, because a raw op alone has no derivative.

    A dual tensor of forward-mode differentiation need not require a gradient. So every call inside a forward-mode level
    takes the Function, which has no ``jvp`` and therefore raises an error instead of giving a wrong derivative. Nor do
    the tensors that ``torch.func.vmap`` shows say whether those behind them require one.
    """
    if forward_ad._current_level >= 0:
        return True
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return torch.is_grad_enabled()
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


Evaluate = Callable[[Any, Any, Sequence[Any]], Sequence[Tensor]]


class _Call:
    """A call whose gradients are asked for, as ``backward`` of ``function_of`` takes it.

    ``places`` says which of the call's tensors have a gradient, once it is known.
    """

    def __init__(self, ctx: Any) -> None:
        self.backend, self.groups, self.options, self.count = ctx.backend, ctx.groups, ctx.options, ctx.count
        self.needs_input_grad = tuple(ctx.needs_input_grad)
        self.places: tuple[int, ...] = ()


class _Gradients(torch.autograd.Function):
    """The gradients that a kernel computes, as functions of all that they depend on.

    The tensors are ``arriving`` gradients from above, the tensors of the op's call, and what its forward has kept. The
    derivative is that of the op's definition in plain torch, evaluated anew: it has every order, and only those who ask
    for it pay.
    """

    @staticmethod
    def forward(
        backward: Callable[..., Any], evaluate: Evaluate, call: _Call, arriving: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        gradients = backward(call, tensors[:arriving], tensors[arriving:])
        call.places = tuple(place for place, g in enumerate(gradients) if g is not None)
        # New tensors: a gradient may be the very one that came from above.
        return tuple(g.view_as(g) for g in gradients if g is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.evaluate, ctx.call, ctx.arriving = inputs[:4]
        ctx.kept = len(inputs) - 4 - ctx.arriving - ctx.call.count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[4 : 4 + ctx.arriving + ctx.call.count])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return one_by_one(info, in_dims[4:], lambda *own: _Gradients.apply(*arguments[:4], *own), arguments[4:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        call, graph = ctx.call, torch.is_grad_enabled()
        with torch.enable_grad():
            causes = [_leaf(t, graph) for t in ctx.saved_tensors]
            arriving, inputs = causes[: ctx.arriving], causes[ctx.arriving :]
            outputs = ctx.evaluate(call.groups, call.options, inputs)
            acting = [(o, g) for o, g in zip(outputs, arriving, strict=True) if g is not None and o.requires_grad]
            asked = [(inputs[place], u) for place, u in zip(call.places, upstream, strict=True) if u is not None]
            asked = [(t, u) for t, u in asked if t is not None and t.requires_grad]
            sources = [t for t in causes if t is not None and t.requires_grad]
            second: Sequence[Tensor | None] = [None] * len(sources)
            if acting and asked:
                first = torch.autograd.grad(
                    [o for o, _ in acting],
                    [t for t, _ in asked],
                    [g for _, g in acting],
                    create_graph=True,
                    materialize_grads=True,
                )
                wanted = [(f, u) for f, (_, u) in zip(first, asked, strict=True) if f.requires_grad]
                if wanted:
                    results, factors = zip(*wanted, strict=True)
                    second = torch.autograd.grad(results, sources, factors, create_graph=graph, allow_unused=True)
        found = iter(second)
        own = [next(found) if t is not None and t.requires_grad else None for t in causes]
        return (None, None, None, None, *own, *(None,) * ctx.kept)


def _leaf(t: Tensor | None, graph: bool) -> Tensor | None:
    """A tensor to differentiate by, distinct from all others; with ``graph`` it stays a function of ``t``."""
    if t is None or not t.requires_grad:
        return t
    return t.view_as(t) if graph else t.detach().requires_grad_()


def one_by_one(
    info: Any, in_dims: Sequence[int | None], call: Callable[..., Any], tensors: Sequence[Tensor | None]
) -> tuple[Any, Any]:
    """The ``vmap`` of a Function: one ``call`` after another, as a kernel has no further dimension to run over."""
    calls = []
    for number in range(info.batch_size):
        calls.append(call(*(t if d is None else t.select(d, number) for t, d in zip(tensors, in_dims, strict=True))))  # type: ignore[union-attr]
    if not isinstance(calls[0], tuple):
        return torch.stack(calls), 0
    stacked = tuple(torch.stack(of) for of in zip(*calls, strict=True))
    return stacked, (0,) * len(stacked)


def function_of(
    forward: Callable[..., Any],
    kept: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    backward: Callable[..., Sequence[Tensor | None]],
    evaluate: Evaluate,
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
        evaluate: ``evaluate(groups, options, tensors)`` returns the first ``outputs`` results by the op's definition in
            plain torch, for derivatives of higher order.
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
        def vmap(info, in_dims, backend, groups, options, *tensors):  # type: ignore[no-untyped-def]
            return one_by_one(info, in_dims[3:], lambda *own: Function.apply(backend, groups, options, *own), tensors)

        @staticmethod
        def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
            gradients = gradients[:outputs]
            for gradient in gradients:
                if gradient is not None:
                    break
            else:
                return (None,) * (3 + ctx.count)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # compiled graphs refuse the second one
                return (None, None, None, *backward(ctx, gradients, ctx.saved_tensors))
            call = _Call(ctx)
            found = _Gradients.apply(backward, evaluate, call, outputs, *gradients, *ctx.saved_tensors)
            by_place = dict(zip(call.places, found, strict=True))
            return (None, None, None, *(by_place.get(place) for place in range(ctx.count)))

    return Function
