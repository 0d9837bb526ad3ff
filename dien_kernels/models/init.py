"""Starting values that differ from torch's own: Glorot's uniform and the bias of gates."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from dien_kernels.checks import check_number
from dien_kernels.layers import AGRU, AIGRU, AUGRU, GRU, BilinearAttention
from dien_kernels.ops.recurrence import forms

Recurrence = GRU | AUGRU | AGRU | AIGRU


def weights_of(layer: Recurrence) -> list[Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh of a recurrence with one layer and direction."""
    suffix = "_l0" if isinstance(layer, GRU) else ""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [getattr(layer, name + suffix, None) for name in names]


@torch.no_grad()
def glorot_(model: nn.Module) -> None:
    """Every matrix as U(-sqrt(6 / (in + out)), +), tables included, every bias as 0: the defaults of
    TensorFlow 1.

    A recurrence there has two kernels on [x, h]: the gates' with 2 H outputs and the candidate's with H.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Embedding, BilinearAttention)):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, Recurrence):
            w_ih, w_hh, b_ih, b_hh = weights_of(module)
            w_ih, w_hh = cast(Tensor, w_ih), cast(Tensor, w_hh)
            hidden, inputs = w_hh.shape[1], w_ih.shape[1] + w_hh.shape[1]
            for weight in (w_ih, w_hh):
                for rows, outputs in ((weight[: 2 * hidden], 2 * hidden), (weight[2 * hidden :], hidden)):
                    bound = math.sqrt(6 / (inputs + outputs))
                    rows.uniform_(-bound, bound)
            for bias in (b_ih, b_hh):
                if bias is not None:
                    bias.zero_()


def kind_of(layer: Recurrence) -> str:
    """The name under which ``forms.form_of`` knows the layer's function."""
    if isinstance(layer, AUGRU):
        return layer.form
    if isinstance(layer, GRU):
        return "gru"
    return "agru" if isinstance(layer, AGRU) else "aigru"


@torch.no_grad()
def gate_bias_(layer: Recurrence, value: float) -> None:
    """Both gates start with the bias ``value``, seen from the side of what is kept, and so remember.

    The authors' code, which stores that side, starts with 1. Where the layer stores the candidate's side the
    update gate gets -``value``.
    """
    check_number("gate_bias", value, "a number or None")
    _, w_hh, b_ih, b_hh = weights_of(layer)
    if b_ih is None or w_hh is None:
        raise ValueError(f"gate_bias must be None for a recurrence without biases, got {value}")
    hidden, tied = w_hh.shape[1], b_hh is b_ih
    side = layer.update or forms.form_of(kind_of(layer)).update
    if b_hh is not None:
        b_hh[: 2 * hidden] = 0
    own = value / 2 if tied else value  # a tied vector is added twice
    b_ih[:hidden] = own
    b_ih[hidden : 2 * hidden] = -own if side == "candidate" else own
