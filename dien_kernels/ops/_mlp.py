"""A small multilayer perceptron with one output: its layers, their checks, and its definition.

Room card. Lives here: what the networks of attention scores and of the auxiliary loss have in common. May import:
torch, ``checks``. Must not be here: what one op or one backend alone needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear, prelu

from dien_kernels.checks import (
    check_compute_like,
    check_like,
    check_option,
    check_tensor,
    compute_dtype,
)

Activation = Literal["sigmoid", "relu", "prelu"]
ACTIVATIONS: tuple[str | None, ...] = (*get_args(Activation), None)


class Layers(NamedTuple):
    """The checked layers of a network; M_0 is its number of inputs.

    ``weights[i]`` is [M_{i+1}, M_i] in the storage dtype. ``biases`` is empty or has a tensor [M_{i+1}] for each layer,
    of size 0 where the layer has no bias. ``slopes`` has a tensor [1] or [M_{i+1}] for each hidden layer if the
    activation is "prelu", and is empty otherwise. Biases and slopes have the compute dtype.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    slopes: list[Tensor]

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases, *self.slopes)

    def counts(self) -> tuple[int, int, int]:
        """The numbers of weights, biases and slopes, as ``split_layers`` takes them."""
        return len(self.weights), len(self.biases), len(self.slopes)

    def bias(self, i: int) -> Tensor | None:
        """The bias of layer ``i``, or None where it has none."""
        return self.biases[i] if self.biases and self.biases[i].numel() else None


def split_layers(counts: tuple[int, int, int], tensors: Sequence[Tensor]) -> Layers:
    """The inverse of ``Layers.tensors``, with the numbers of weights, biases and slopes."""
    w, b, _ = counts
    return Layers(list(tensors[:w]), list(tensors[w : w + b]), list(tensors[w + b :]))


def _check_list(name: str, value: Any, allowed: str) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")


def check_layers(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[Tensor],
    activation: str | None,
    inputs: int,
    meaning: str,
    outputs: tuple[int, ...],
    like: Tensor,
    like_name: str,
) -> Layers:
    """Check the layers of a network and return them, with biases and slopes cast to the compute dtype.

    The first layer takes ``inputs`` features, called ``meaning`` in error messages; the last layer may have any number
    of outputs that is in ``outputs``. Dtypes and devices are compared with those of ``like``, called ``like_name`` in
    error messages. Raises ``TypeError`` or ``ValueError`` naming the argument.
    """
    check_option("activation", activation, ACTIVATIONS)
    _check_list("weights", weights, "a list or tuple of tensors, one a layer")
    _check_list("biases", biases, "a list or tuple with a tensor or None for each layer, or empty")
    _check_list("slopes", slopes, "a list or tuple of tensors, one a hidden layer")
    if not weights:
        raise ValueError("weights must hold at least one layer, got none")
    if biases and len(biases) != len(weights):
        raise ValueError(f"biases must be empty or hold {len(weights)} entries as weights does, got {len(biases)}")
    want = len(weights) - 1 if activation == "prelu" else 0
    if len(slopes) != want:
        rule = "one slope a hidden layer with activation='prelu', and none otherwise"
        raise ValueError(f"slopes must hold {rule}: {want} here, got {len(slopes)}")
    width = inputs
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        check_tensor(name, weight)
        if weight.dim() != 2 or weight.shape[0] < 1:
            raise ValueError(f"{name} must have shape [out, in] with out >= 1, got {tuple(weight.shape)}")
        if i == len(weights) - 1 and weight.shape[0] not in outputs:
            allowed = " or ".join(str(n) for n in outputs)
            raise ValueError(f"{name}, the last layer, must have {allowed} outputs, got shape {tuple(weight.shape)}")
        what = f"[M1, {meaning}]" if i == 0 else f"[M{i + 1}, M{i}]"
        check_like(name, weight, (weight.shape[0], width), what, like, like_name)
        width = weight.shape[0]
    empty = like.new_empty(0, dtype=compute_dtype(like.dtype))
    checked_biases, checked_slopes = [], []
    for i, bias in enumerate(biases):
        size = weights[i].shape[0]
        checked_biases.append(
            empty if bias is None else check_compute_like(f"biases[{i}]", bias, (size,), f"[M{i + 1}]", like, like_name)
        )
    for i, slope in enumerate(slopes):
        name, size = f"slopes[{i}]", weights[i].shape[0]
        check_tensor(name, slope)
        if slope.dim() == 0:
            slope = slope.reshape(1)
        shape = (1,) if tuple(slope.shape) == (1,) else (size,)
        checked_slopes.append(check_compute_like(name, slope, shape, f"[1] or [M{i + 1}]", like, like_name))
    return Layers(list(weights), checked_biases, checked_slopes)


def mlp(inputs: Tensor, layers: Layers, activation: str | None) -> Tensor:
    """The output z_L [P] of the network on ``inputs`` [P, in]: equation (M1) of docs/math-attention.md.

    ::

        z_1 = W_1 inputs + b_1,   a_i = act(z_i),   z_{i+1} = W_{i+1} a_i + b_{i+1}

    All tensors have one dtype. This is the definition, and autograd differentiates it.
    """
    z = linear(inputs, layers.weights[0], layers.bias(0))
    for i, weight in enumerate(layers.weights[1:], 1):
        if activation == "prelu":
            a = prelu(z, layers.slopes[i - 1])
        else:
            a = z if activation is None else {"sigmoid": torch.sigmoid, "relu": torch.relu}[activation](z)
        z = linear(a, weight, layers.bias(i))
    return z.squeeze(1)
