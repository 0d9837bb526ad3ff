"""Starting values of parameters: each module restores its own when ``reset_parameters`` is called.

``weight_init`` says by which rule a module's parameters start:

- ``"torch"``: as ``torch.nn.Linear``, ``torch.nn.Embedding`` and ``torch.nn.GRU`` do.
- ``"glorot"``: as TensorFlow 1 does. Every matrix is drawn from U(-sqrt(6 / (in + out)), sqrt(6 / (in + out))), every
  bias is 0. A recurrence there has two kernels on [x, h]: that of the gates with 2 H outputs, and that of the candidate
  with H outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dien_kernels.checks import check_number, check_option

WeightInit = Literal["torch", "glorot"]
WEIGHT_INITS = ("torch", "glorot")


class Linear(nn.Linear):
    """``torch.nn.Linear`` that starts by the rule ``weight_init``."""

    weight_init: WeightInit = "torch"

    def reset_parameters(self) -> None:
        """The starting values of ``weight`` and ``bias``, by ``weight_init``."""
        if self.weight_init == "torch":
            super().reset_parameters()
            return
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def set_weight_init(model: nn.Module, weight_init: WeightInit) -> None:
    """Give every module of ``model`` that knows ``weight_init`` this rule, and draw its parameters by it.

    Modules are visited in the order of ``model.modules()``, so that a seed gives the same parameters each time.
    """
    check_option("weight_init", weight_init, WEIGHT_INITS)
    for module in model.modules():
        if hasattr(module, "weight_init"):
            reset: Any = module
            reset.weight_init = weight_init
            reset.reset_parameters()


def check_gate_bias(gate_bias: Any, bias: bool | str) -> None:
    """Raise ``TypeError`` for what is no number, ``ValueError`` where the recurrence has no bias to set."""
    if gate_bias is None:
        return
    check_number("gate_bias", gate_bias, "a number or None")
    if bias is False:
        raise ValueError(f"gate_bias must be None for a recurrence without biases, got {gate_bias}")


@torch.no_grad()
def reset_recurrence(
    parameters: Iterable[Tensor],
    weights: Sequence[Sequence[Tensor | None]],
    *,
    hidden_size: int,
    weight_init: WeightInit,
    gate_bias: float | None,
    side: str,
) -> None:
    """The starting values of recurrences.

    Args:
        parameters: all of the layer's parameters. With ``weight_init="torch"`` each is drawn from
            U(-1/sqrt(H), 1/sqrt(H)), in this order.
        weights: w_ih [3H, I], w_hh [3H, H], b_ih and b_hh [3H] or None, of each layer and direction.
        hidden_size: H.
        weight_init: see the top of this file.
        gate_bias: None, or the bias with which both gates start, seen from the side of the state that is kept: a
            positive one remembers. Where the layer stores the update gate of the candidate's side, that gate gets
            -gate_bias.
        side: "keep" or "candidate", the side which the stored update gate multiplies.
    """
    if weight_init == "torch":
        bound = 1 / math.sqrt(hidden_size)
        for parameter in parameters:
            nn.init.uniform_(parameter, -bound, bound)
    gates = 2 * hidden_size
    for w_ih, w_hh, b_ih, b_hh in weights:
        if weight_init == "glorot":
            matrices = cast(Tensor, w_ih), cast(Tensor, w_hh)
            inputs = matrices[0].shape[1] + hidden_size
            for weight in matrices:
                for rows, outputs in ((weight[:gates], gates), (weight[gates:], hidden_size)):
                    bound = math.sqrt(6 / (inputs + outputs))
                    rows.uniform_(-bound, bound)
            for bias in (b_ih, b_hh):
                if bias is not None:
                    bias.zero_()
        if gate_bias is not None and b_ih is not None:
            if b_hh is not None:
                b_hh[:gates] = 0
            value = gate_bias / 2 if b_hh is b_ih else gate_bias  # a tied vector is added twice
            b_ih[:hidden_size] = value
            b_ih[hidden_size:gates] = -value if side == "candidate" else value
