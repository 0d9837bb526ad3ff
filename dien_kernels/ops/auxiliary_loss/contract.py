"""What passes between the auxiliary loss and its backends: groups of tensors with names, and options.

Room card. Lives here: ``Inputs``, ``LossAndGradients``, ``Options``, ``NORMALIZERS``, ``CLAMP``,
``check_index_values``. May import: torch, ``histories``, ``_mlp``. Every backend may import this file. Must not be
here: mathematics, what one backend alone needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from dien_kernels.histories import Histories
from dien_kernels.ops._mlp import Layers, split_layers

Kind = Literal["inner", "mlp"]
KINDS: tuple[str, ...] = get_args(Kind)
Normalizer = Literal["joint", "separate", "padded", "row"]
NORMALIZERS: tuple[str, ...] = get_args(Normalizer)
CLAMP = 100.0  # torch's binary cross entropy clamps the logarithm at -100


class Inputs(NamedTuple):
    """The tensors that have a gradient."""

    states: Tensor  # [B, T, H] or jagged [N, H]
    positive: Tensor  # [B, T, D] or [N, D]
    negative: Tensor  # [B, T, K, D] or [N, K, D]
    layers: Layers

    def tensors(self) -> list[Tensor]:
        """All of them, one after another."""
        return [self.states, self.positive, self.negative, *self.layers.tensors()]


class LossAndGradients(NamedTuple):
    """The loss and its derivative by each of ``Inputs``, all in the compute dtype."""

    loss: Tensor
    states: Tensor
    positive: Tensor
    negative: Tensor
    layers: Layers

    @classmethod
    def of(cls, inputs: Inputs, loss: Tensor, gradients: Sequence[Tensor]) -> LossAndGradients:
        """From the loss and gradients in the order of ``Inputs.tensors``."""
        states, positive, negative, *rest = gradients
        return cls(loss, states, positive, negative, split_layers(inputs.layers.counts(), rest))

    def tensors(self) -> list[Tensor]:
        """What the raw op returns: the loss, then the gradients in the order of ``Inputs.tensors``."""
        return [self.loss, self.states, self.positive, self.negative, *self.layers.tensors()]


class Options(NamedTuple):
    """What a raw auxiliary-loss op is told beside its tensors, in the order of its schema."""

    inner: bool
    activation: int  # an index into ACTIVATIONS of ``ops/_mlp.py``
    normalizer: int  # an index into NORMALIZERS
    eps: float  # a negative number stands for the clamp
    ahead: int  # 1: state t is paired with behaviour t + 1; 0: with behaviour t


def check_index_values(states: Tensor, histories: Histories) -> None:
    """Check the values of lengths and offsets; only index tensors on the CPU are read.

    Raises ``ValueError`` naming the argument.
    """
    if histories.jagged:
        histories.check_values(total=states.shape[0])
    else:
        histories.check_values(histories=states.shape[0], steps=states.shape[1])
