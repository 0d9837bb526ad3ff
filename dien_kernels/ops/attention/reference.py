"""The definition of attention scores: docs/math-attention.md, whose equation numbers stand beside the lines.

Row after row, in plain torch, with the concatenation built as the equation writes it. Every backend is checked against
this file, and autograd differentiates it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from dien_kernels.histories import Histories
from dien_kernels.ops._layout import rows_of
from dien_kernels.ops._mlp import ACTIVATIONS, Layers, mlp
from dien_kernels.ops.attention.contract import Options


def scores_of_row(q: Tensor, k: Tensor, layers: Layers, options: Options) -> Tensor:
    """The scores a [L] of one row: its target q [D] against the states k [L, H] of its valid steps, at least one."""
    if options.bilinear:
        e = k @ (layers.weights[0] @ q if layers.weights else q)  # (A1)
    else:
        q = q.expand_as(k)
        e = mlp(torch.cat((q, k, q - k, q * k), 1), layers, ACTIVATIONS[options.activation])  # (A2), (M1)
    e = options.scale * e
    return torch.softmax(e, 0) if options.softmax else e  # (A3)


def attention_scores(target: Tensor, states: Tensor, layers: Layers, histories: Histories, options: Options) -> Tensor:
    """The scores of all rows, and zeros at steps that do not exist.

    target is [B, D]; states [U, T, H] or jagged [N, H]. The
    scores are [B, T], jagged [N] or, with shared histories, [rows_total]. All have one dtype. Only valid steps are
    read, so that NaN at others reaches no result and no gradient.
    """
    shared = histories.jagged and histories.history_of is not None
    rows = rows_of(states, histories, target.new_zeros(options.rows_total) if shared else None)
    t = torch.arange(rows.steps, device=states.device)
    real = t < rows.length.unsqueeze(1)  # [B, T]: the steps that exist
    if histories.mask is not None:
        real = real & histories.mask.flatten()[rows.x_start.unsqueeze(1) + t]
    in_states, in_scores = ((start.unsqueeze(1) + t)[real] for start in (rows.x_start, rows.y_start))
    keys = embedding(in_states, states.reshape(-1, states.shape[-1])).split(real.sum(1).tolist())
    of_rows = [scores_of_row(q, k, layers, options) for q, k in zip(target, keys, strict=True) if len(k)]
    scores = target.new_zeros(rows.y_rows)
    if of_rows:
        scores = scores.index_put((in_scores,), torch.cat(of_rows))
    return scores if histories.jagged else scores.view(real.shape)
