"""What the ``reference`` backends of all ops share: a definition in plain torch becomes a forward and a backward.

A definition is a function of tensors of one dtype, in plain torch, and autograd differentiates it. A raw op takes
tensors in the storage dtype and has a backward of its own; here that backward evaluates the definition once more and
asks autograd.

Room card. Lives here: dtypes, detached copies, the call of autograd. May import: torch, ``checks``. Must not be here:
any op's mathematics or schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dien_kernels.checks import compute_dtype

Definition = Callable[..., "tuple[Tensor, ...]"]


def evaluated(definition: Definition, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the definition makes of ``inputs``, evaluated in the compute dtype; autograd may differentiate it."""
    return definition(*(_computed(t) for t in inputs))


def outputs_of(definition: Definition, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the definition makes of ``inputs``, evaluated in the compute dtype and without a graph.

    The results are new tensors: a raw op must not return its input.
    """
    with torch.no_grad():
        return _new(evaluated(definition, inputs))


def outputs_and_gradients_of(
    definition: Definition, inputs: Sequence[Tensor], upstream: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the derivative by each input of the sum of <upstream, output> over the outputs.

    Both are in the compute dtype. An output whose ``upstream`` is None does not act; without ``upstream``, which is for
    scalars, every output acts with the factor 1. An input that acts on nothing has the gradient 0.
    """
    # Graphs of torch.compile run below autograd, where enable_grad alone would record nothing; inference_mode(False) is
    # torch's way back above it.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_computed(t.detach()).requires_grad_() for t in inputs]
        if not leaves[0].sum().requires_grad:  # rather an error than zeros
            raise RuntimeError("the backend 'reference' needs autograd, which is switched off around this call")
        outputs = definition(*leaves)
        factors = [torch.ones_like(o) for o in outputs] if upstream is None else upstream
        pairs = zip(outputs, factors, strict=True)
        acting = [(o, factor.to(o.dtype)) for o, factor in pairs if factor is not None and o.requires_grad]
        gradients: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
        if acting:
            results, weights = zip(*acting, strict=True)
            gradients = torch.autograd.grad(results, leaves, weights, materialize_grads=True)
    with torch.no_grad():
        return _new(outputs), _new(gradients)


def _computed(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t.dtype))


def _new(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies: a gradient may be the very tensor that came from above, or that another input has."""
    return [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
