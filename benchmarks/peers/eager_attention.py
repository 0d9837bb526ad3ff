"""Attention scores in plain torch on the padded batch: bilinear, or the DIN unit with its concatenation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.inputs import Inputs, Program, layers_of
from benchmarks.registry import Case


def absent() -> str | None:
    return None


def build(case: Case, inputs: Inputs) -> Program:
    leaves, lengths = inputs.leaves, inputs.lengths
    target, states = leaves["target"], leaves["states"]
    weights, biases = layers_of(leaves)

    def logits() -> Tensor:
        if case.op == "attention_bilinear":
            return (states @ linear(target, weights[0]).unsqueeze(2)).squeeze(2)
        q = target.unsqueeze(1).expand_as(states)
        z = torch.cat((q, states, q - states, q * states), 2)
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            z = torch.sigmoid(linear(z, w, b))
        return linear(z, weights[-1], biases[-1]).squeeze(2)

    def forward() -> Tensor:
        e = logits()
        if lengths is not None:
            e = e.masked_fill(torch.arange(e.shape[1]) >= lengths[:, None], -torch.inf)
        return torch.softmax(e, 1)

    return Program(forward, leaves)
