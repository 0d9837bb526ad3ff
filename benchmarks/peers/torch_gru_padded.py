"""``torch.nn.GRU`` on the padded batch. It runs through the padding too: that is what people do with it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Program
from benchmarks.registry import COMPUTES_PADDING, Case


def absent() -> str | None:
    return None


def layer_of(case: Case, inputs: Inputs) -> tuple[torch.nn.GRU, dict[str, Tensor]]:
    """The layer with the weights of the inputs, and the leaves under their names."""
    x = inputs.leaves["x"]
    layer = torch.nn.GRU(case.inputs, case.hidden, batch_first=True, dtype=x.dtype, device=x.device)
    weights = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), layer.parameters(), strict=True))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(inputs.leaves[name])
    return layer, {"x": x} | weights


def build(case: Case, inputs: Inputs) -> Program:
    layer, leaves = layer_of(case, inputs)
    x = leaves["x"]
    note = "" if inputs.lengths is None else COMPUTES_PADDING
    return Program(lambda: layer(x)[0], leaves, note)
