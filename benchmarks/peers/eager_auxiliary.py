"""The auxiliary loss in plain torch on the padded batch: inner product or MLP, mean over the valid pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from benchmarks.inputs import Inputs, Program, layers_of
from benchmarks.registry import Case


def absent() -> str | None:
    return None


def build(case: Case, inputs: Inputs) -> Program:
    leaves, lengths = inputs.leaves, inputs.lengths
    weights, biases = layers_of(leaves)

    def logits(h: Tensor, e: Tensor) -> Tensor:
        if case.op == "auxiliary_inner":
            return (h * e).sum(2)
        z = torch.cat((h, e), 2)
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            z = torch.sigmoid(linear(z, w, b))
        return linear(z, weights[-1], biases[-1]).squeeze(2)

    def forward() -> Tensor:
        h = leaves["states"][:, :-1]
        loss = softplus(-logits(h, leaves["positive"][:, 1:])) + softplus(logits(h, leaves["negative"][:, 1:]))
        if lengths is None:
            return loss.mean() / 2
        loss = torch.where(torch.arange(1, case.steps) < lengths[:, None], loss, 0)
        return loss.sum() / (2 * (lengths - 1).sum())

    return Program(forward, leaves)
