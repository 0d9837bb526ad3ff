"""What passes between the attention op and its backends: groups of tensors with names, and options.

Room card. Lives here: ``Inputs``, ``Gradients``, ``Options``, ``check_index_values``. May import: torch,
``histories``, ``_mlp``. Every backend may import this file. Must not be here: mathematics, what one backend alone
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from dien_kernels.histories import Histories
from dien_kernels.ops._mlp import Layers, split_layers

Kind = Literal["bilinear", "din"]
KINDS: tuple[str, ...] = get_args(Kind)


class Inputs(NamedTuple):
    """The tensors that have a gradient."""

    target: Tensor  # [B, D]
    states: Tensor  # [U, T, H] or jagged [N, H]
    layers: Layers  # bilinear: no weight, or one [H, D]

    def tensors(self) -> list[Tensor]:
        """All of them, one after another."""
        return [self.target, self.states, *self.layers.tensors()]


class Gradients(NamedTuple):
    """The gradients of ``Inputs``, each in the dtype of its input."""

    target: Tensor
    states: Tensor
    layers: Layers

    @classmethod
    def of(cls, inputs: Inputs, gradients: Sequence[Tensor]) -> Gradients:
        """From gradients in the order of ``Inputs.tensors``, in any dtype."""
        target, states, *rest = (g.to(t.dtype) for g, t in zip(gradients, inputs.tensors(), strict=True))
        return cls(target, states, split_layers(inputs.layers.counts(), rest))

    @classmethod
    def like(cls, inputs: Inputs, make: Callable[[Tensor], Tensor]) -> Gradients:
        """``make`` of every input."""
        return cls.of(inputs, [make(t) for t in inputs.tensors()])

    def tensors(self) -> list[Tensor]:
        """What the raw op returns: all gradients, in the order of ``Inputs.tensors``."""
        return [self.target, self.states, *self.layers.tensors()]


class Options(NamedTuple):
    """What a raw attention op is told beside its tensors, in the order of its schema."""

    rows_total: int  # the number of scores of a jagged batch with shared histories, else -1
    bilinear: bool
    activation: int  # an index into ACTIVATIONS of ``ops/_mlp.py``
    scale: float
    softmax: bool


def check_index_values(states: Tensor, histories: Histories, rows_total: int) -> None:
    """Check the values of lengths, offsets and history, and that ``rows_total`` is the steps of the histories named.

    Only index tensors on the CPU are read. Raises ``ValueError`` naming the argument.
    """
    if histories.jagged:
        histories.check_values(total=states.shape[0])
        histories.check_steps_of_rows(rows_total)
    else:
        histories.check_values(histories=states.shape[0], steps=states.shape[1])
