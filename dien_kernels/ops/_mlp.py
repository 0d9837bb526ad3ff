"""A small multilayer perceptron with one output, and its derivative by hand; shared by two references.

Room card. Lives here: the hidden layers after the first product, their checks, how much of z_1 is held at a
time. May import: torch, ``_checks``. Must not be here: the first layer, whose input is never concatenated and
which every op splits its own way.

    a_1 = act(z_1),  z_{i+1} = W_{i+1} a_i + b_{i+1},  output z_L, of width 1          (M1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from dien_kernels.checks import (
    check_compute_like,
    check_like,
    check_option,
    check_tensor,
    compute_dtype,
)

Activation = Literal["sigmoid", "relu", "prelu"]
ACTIVATIONS: tuple[str | None, ...] = (*get_args(Activation), None)
TILE = {"cpu": 1 << 18, "cuda": 1 << 24}  # values of z_1 alive at a time


class Layers(NamedTuple):
    """Checked layers: ``biases`` is empty or has one tensor a layer, of size 0 where a layer has none."""

    weights: list[Tensor]
    biases: list[Tensor]
    slopes: list[Tensor]

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases, *self.slopes)


def split_layers(counts: tuple[int, int, int], tensors: Sequence[Tensor]) -> Layers:
    """The inverse of ``Layers.tensors``, with the numbers of weights, biases and slopes."""
    w, b, _ = counts
    return Layers(list(tensors[:w]), list(tensors[w : w + b]), list(tensors[w + b :]))


def reads_are_free(device: torch.device) -> bool:
    """Whether index tensors may be read, and sizes depend on them, without a synchronisation."""
    return device.type == "cpu"


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
    """Check the layers of an MLP on ``inputs`` features against ``like``; biases and slopes upcast."""
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


class Tail:
    """Equation (M1) after z_1 and its derivative; sums the gradients of layers 2 .. L and of the slopes."""

    def __init__(self, layers: Layers, activation: str | None, compute: torch.dtype) -> None:
        self.weights = [w.to(compute) for w in layers.weights[1:]]
        self.biases = [b if b.numel() else None for b in layers.biases[1:]] or [None] * len(self.weights)
        self.slopes = layers.slopes
        self.activation = activation

    def zero_grads(self) -> None:
        self.dw = [torch.zeros_like(w) for w in self.weights]
        self.db = [w.new_zeros(w.shape[0]) for w in self.weights]
        self.ds = [torch.zeros_like(s) for s in self.slopes]

    def _act(self, z: Tensor, i: int) -> Tensor:
        """In place where the derivative needs only the activation itself."""
        if self.activation == "sigmoid":
            return z.sigmoid_()
        if self.activation == "relu":
            return z.relu_()
        if self.activation == "prelu":
            return torch.where(z > 0, z, self.slopes[i] * z)
        return z

    def forward(self, z: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """z_1 [P, M1], which it may overwrite, to z_L [P, 1] and what the backward wants."""
        kept = []
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            a = self._act(z, i)
            kept.append((z, a))
            z = linear(a, w, b)
        return z, kept

    def backward(self, d: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        """dz_L [P, 1] to dz_1 [P, M1]   (M2)"""
        for i in range(len(kept) - 1, -1, -1):
            z, a = kept[i]
            self.dw[i].addmm_(d.t(), a)
            self.db[i] += d.sum(0)
            d = d @ self.weights[i]
            if self.activation == "sigmoid":
                d = torch.ops.aten.sigmoid_backward.grad_input(d, a, grad_input=d)
            elif self.activation == "relu":
                d = torch.where(a <= 0, 0, d)  # so written, NaN in a lets the gradient through, as in torch
            elif self.activation == "prelu":
                part = torch.where(z > 0, 0, z * d).sum(0)
                self.ds[i] += part.sum(0, True) if self.ds[i].numel() == 1 else part
                d = torch.where(z > 0, d, self.slopes[i] * d)
        return d
