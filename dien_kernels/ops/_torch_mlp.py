"""All layers but the first of a small multilayer perceptron, with a hand-written derivative, in fast plain torch.

The ``torch`` backends of attention scores and of the auxiliary loss share this file. Equation numbers are those of
docs/math-attention.md.

Room card. Lives here: (M1) from z_1 on, (M2), how much of z_1 is held at a time. May import: torch, ``_mlp``. Must not
be here: the first layer, which every op splits in its own way so that its input is never concatenated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from dien_kernels.ops._mlp import Layers

TILE = {"cpu": 1 << 18, "cuda": 1 << 24}  # how many values of z_1, about, are held at a time


def reads_are_free(device: torch.device) -> bool:
    """Whether the host can read index tensors, so that sizes depend on them, without waiting for the device."""
    return device.type == "cpu"


class Tail:
    """Equation (M1) from z_1 on, computed in the dtype ``compute``, and its derivative.

    ``backward`` adds the gradients of layers 2 to L and of the slopes to ``dw``, ``db`` and ``ds``.
    """

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
        """a_{i+1} = act(z_{i+1}); overwrites ``z`` where the derivative needs only the activation."""
        if self.activation == "sigmoid":
            return z.sigmoid_()
        if self.activation == "relu":
            return z.relu_()
        if self.activation == "prelu":
            return torch.where(z > 0, z, self.slopes[i] * z)
        return z

    def forward(self, z: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return z_L [P, 1] for z_1 [P, M1], which may be overwritten, and the pairs (z_i, a_i) for ``backward``."""
        kept = []
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            a = self._act(z, i)
            kept.append((z, a))
            z = linear(a, w, b)
        return z, kept

    def backward(self, d: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return dz_1 [P, M1] for dz_L [P, 1], and add the gradients of the layers: equation (M2)."""
        for i in range(len(kept) - 1, -1, -1):
            z, a = kept[i]
            self.dw[i].addmm_(d.t(), a)
            self.db[i] += d.sum(0)
            d = d @ self.weights[i]
            if self.activation == "sigmoid":
                d = torch.ops.aten.sigmoid_backward.grad_input(d, a, grad_input=d)
            elif self.activation == "relu":
                d = torch.where(a <= 0, 0, d)  # a NaN in a lets the gradient pass, as in torch
            elif self.activation == "prelu":
                part = torch.where(z > 0, 0, z * d).sum(0)
                self.ds[i] += part.sum(0, True) if self.ds[i].numel() == 1 else part
                d = torch.where(z > 0, d, self.slopes[i] * d)
        return d
