"""The parts of the head of every model: the normalisation and activations of MLPs, MLPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dien_kernels.checks import check_option
from dien_kernels.layers import Dice
from dien_kernels.layers.starts import Linear
from dien_kernels.models.options import Activation, HeadOptions


class Norm(nn.Module):
    """gamma * (x - mean) / sqrt(var + eps) + beta over the last dimension; ``statistics`` says of what.

    ``"fixed"``: mean 0 and variance 1 for ever, so that it is a map of each feature by itself: what the
    authors' code does, whose batch norm stays in inference mode. ``"moving"``: the batch in training, moving
    averages in evaluation, ``torch.nn.BatchNorm1d``. ``"batch"``: the batch in both, as xdl does. A batch of
    fewer than two rows has no variance: the moving averages are used, in training too.

    eps: 1e-3 for "fixed", else 1e-5 unless given.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int, statistics: str = "moving", eps: float | None = None) -> None:
        super().__init__()
        check_option("statistics", statistics, ("fixed", "moving", "batch"))
        self.statistics = statistics
        self.eps = eps if eps is not None else 1e-3 if statistics == "fixed" else 1e-5
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        if statistics != "fixed":
            self.register_buffer("running_mean", torch.empty(size))
            self.register_buffer("running_var", torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma 1, beta 0; the moving averages are those of no batch, mean 0 and variance 1."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.statistics != "fixed":
            nn.init.zeros_(self.running_mean)
            nn.init.ones_(self.running_var)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, statistics={self.statistics!r}, eps={self.eps}"

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) of the fixed map."""
        return self.weight * (1 + self.eps) ** -0.5, self.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics == "fixed":
            scale, shift = self.affine()
            return x * scale + shift
        several = x.shape[0] > 1
        return nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=several and (self.training or self.statistics == "batch"),
            momentum=0.1 if self.training else 0.0,
            eps=self.eps,
        )


class BatchDice(nn.Module):
    """The Dice of the authors' code: statistics are the batch's own, in training and in evaluation.

    ::

        f(s) = p * s + (1 - p) * alpha * s,   p = sigmoid((s - E[s]) / (sqrt(E[(s - E[s])^2 + eps]) + eps))

    So the value of a row depends on its companions; ``dien_kernels.layers.Dice`` keeps moving averages. Input
    and result [P, M]; ``alpha`` [M] starts at 0. For one row p is 1/2.
    """

    def __init__(self, size: int, eps: float = 1e-9) -> None:
        super().__init__()
        self.eps = eps
        self.alpha = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``alpha`` is 0."""
        nn.init.zeros_(self.alpha)

    def forward(self, s: Tensor) -> Tensor:
        away = s - s.mean(0)
        deviation = (away.square() + self.eps).mean(0).sqrt()
        p = torch.sigmoid(away / (deviation + self.eps))
        return (p + (1 - p) * self.alpha) * s


def activation_of(
    name: Activation, size: int, *, dice_statistics: str = "moving", prelu_init: float = 0.25
) -> nn.Module:
    """The module of an activation on [P, size]; PReLU has a slope for each channel."""
    if name == "dice":
        return Dice(size) if dice_statistics == "moving" else BatchDice(size)
    if name == "prelu":
        return nn.PReLU(size, init=prelu_init)
    return nn.ReLU() if name == "relu" else nn.Sigmoid()


class MLP(nn.Module):
    """[P, inputs] to one logit a row, [P].

    ::

        z_0 = Norm(x) or x,   z_i = dropout(act(W_i z_{i-1} + b_i)),   o = W_L z_{L-1} + b_L
        logit = o             outputs=1
        logit = o_0 - o_1     outputs=2: softmax over two classes, the first of them the click

    Args:
        inputs: features of x.
        options: see ``HeadOptions``.
        prelu_init: the start of every slope of PReLU.
    """

    def __init__(self, inputs: int, options: HeadOptions, prelu_init: float = 0.25) -> None:
        super().__init__()
        self.norm = None if options.norm is None else Norm(inputs, options.norm)
        self.dropout = options.dropout
        sizes = (inputs, *options.units)
        self.linears = nn.ModuleList(Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        self.activations = nn.ModuleList(
            activation_of(options.activation, unit, dice_statistics=options.dice_statistics, prelu_init=prelu_init)
            for unit in options.units
        )
        self.last = Linear(sizes[-1], options.outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        for linear, act in zip(self.linears, self.activations, strict=True):
            x = act(linear(x))
            if self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
        out: Tensor = self.last(x)
        return out[:, 0] if out.shape[1] == 1 else out[:, 0] - out[:, 1]
