"""The first call of a replaced method: the original and our code on the user's own batch, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

TOLERANCE = 1e-3  # of the largest number of each tensor: far above rounding, far below another formula


def difference(
    original: Callable[..., Any],
    ours: Callable[..., Any],
    module: nn.Module,
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
) -> str | None:
    """What our code gives otherwise than the original, in words; None: nothing.

    Both run on copies of the arguments, with the parameters of ``module``; the state of the random numbers, the
    gradients of the parameters and the arguments stay as they were. ``Fallback`` and other errors of ``ours`` pass
    through.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        found = []
        for run in (original, ours):
            torch.set_rng_state(state)
            leaves: list[Tensor] = []
            args = _copied(tuple(arguments), leaves)
            kwargs = _copied(dict(keywords), leaves)
            outputs = _tensors(run(module, *args, **kwargs))
            sources = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
            acting = [o for o in outputs if o.requires_grad]
            gradients: Sequence[Tensor | None] = [None] * len(sources)
            if acting and sources:
                slopes = [
                    torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in acting
                ]
                gradients = torch.autograd.grad(acting, sources, slopes, allow_unused=True)
            found.append((outputs, gradients))
    (wanted, wanted_gradients), (got, gradients) = found
    if len(wanted) != len(got):
        return f"{len(got)} outputs instead of {len(wanted)}"
    largest = max((float(g.abs().max()) for g in wanted_gradients if g is not None and g.numel()), default=0.0)
    pairs = [("output", a, b, 0.0) for a, b in zip(wanted, got, strict=True)]
    pairs += [("gradient", a, b, largest) for a, b in zip(wanted_gradients, gradients, strict=True)]  # type: ignore[misc]
    for kind, a, b, scale in pairs:
        trouble = _compare(a, b, scale)
        if trouble is not None:
            return f"{kind} {trouble}"
    return None


def _compare(a: Tensor | None, b: Tensor | None, scale: float) -> str | None:
    if a is None or b is None:
        other = a if b is None else b
        return None if other is None or not other.any() else "is missing on one side"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
    if not a.numel():
        return None
    if not a.is_floating_point():
        return None if torch.equal(a, b) else "has other integers"
    # Beside large gradients a tensor whose true gradient is 0 has rounding of theirs.
    bound = TOLERANCE * max(float(a.detach().abs().nan_to_num().max()), 1e-3 * scale)
    off = (a.detach() - b.detach()).abs()
    same = a.isnan() & b.isnan() | (a == b)
    worst = float(torch.where(same, 0, off).nan_to_num(nan=float("inf")).max())
    return None if worst <= bound else f"is off by {worst:.3g}, of numbers up to {bound / TOLERANCE:.3g}"


def _copied(value: Any, leaves: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        if copy.is_floating_point():
            leaves.append(copy.requires_grad_())
        return copy
    if isinstance(value, PackedSequence):
        return value._replace(data=_copied(value.data, leaves))
    if isinstance(value, (list, tuple)):
        copies = [_copied(each, leaves) for each in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    if isinstance(value, dict):
        return {name: _copied(each, leaves) for name, each in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _tensors(each)]
    if isinstance(value, dict):
        return [t for each in value.values() for t in _tensors(each)]
    return []
