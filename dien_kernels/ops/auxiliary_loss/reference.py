"""The definition of the auxiliary loss: docs/math-auxiliary-loss.md, whose equation numbers stand beside the lines.

In plain torch, with the concatenation built. Every backend is checked against this file, and autograd differentiates
it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid

from dien_kernels.histories import Histories
from dien_kernels.ops._layout import rows_of
from dien_kernels.ops._mlp import ACTIVATIONS, Layers, mlp
from dien_kernels.ops.auxiliary_loss.contract import CLAMP, NORMALIZERS, Options


def logits(h: Tensor, e: Tensor, layers: Layers, options: Options) -> Tensor:
    """The logits x [P] of states h [P, H] and behaviours e [P, D]."""
    if options.inner:
        return (h * e).sum(1)  # (L1)
    return mlp(torch.cat((h, e), 1), layers, ACTIVATIONS[options.activation])  # (L2), (M1)


def f(z: Tensor, eps: float) -> Tensor:
    """What one logit adds to the loss, (L3)."""
    if eps > 0:
        return -torch.log(torch.sigmoid(z) + eps)
    return -logsigmoid(z) if eps == 0 else (-logsigmoid(z)).clamp(max=CLAMP)


def weights_of(normalizer: str, pairs: Tensor, slots: int, negatives: int) -> tuple[Tensor, Tensor]:
    """The weights w+ [B] and w- [B] of the pairs of each row, (L5).

    ``pairs`` [B] are the V_b, the pairs of each row; ``slots`` is T - s, the pairs of a row without padding;
    ``negatives`` is K.
    """
    batch, total = len(pairs), pairs.sum().expand_as(pairs)
    if normalizer == "separate":
        return 1 / total, 1 / (total * negatives)
    both = {
        "joint": 1 / (total * (1 + negatives)),
        "padded": 1 / torch.full_like(pairs, batch * slots),
        "row": 1 / (batch * pairs * (1 + negatives)),
    }[normalizer]
    return both, both


def auxiliary_loss(
    states: Tensor, positive: Tensor, negative: Tensor, layers: Layers, histories: Histories, options: Options
) -> Tensor:
    """The loss, a scalar; 0 without a pair.

    states are [B, T, H] or jagged [N, H], positive [B, T, D] or [N, D], negative [B, T, K, D] or [N, K, D]. All have
    one dtype. Only the states and behaviours of pairs are read, so that NaN elsewhere reaches no result and no
    gradient.
    """
    rows, ahead, negatives = rows_of(states, histories, None), options.ahead, negative.shape[-2]
    pairs = (rows.length - ahead).clamp(min=0)  # V_b
    t = torch.arange(rows.steps, device=states.device)
    real = t < pairs.unsqueeze(1)  # [B, T]: the steps whose state is in a pair
    in_states = (rows.x_start.unsqueeze(1) + t)[real]
    in_behaviours = in_states + ahead
    h = embedding(in_states, states.reshape(-1, states.shape[-1]))  # [P, H]
    e = embedding(in_behaviours, positive.reshape(-1, positive.shape[-1]))  # [P, D]
    e_k = embedding(in_behaviours, negative.reshape(-1, negatives * negative.shape[-1])).chunk(negatives, 1)
    both = weights_of(NORMALIZERS[options.normalizer], pairs.to(states.dtype), rows.steps - ahead, negatives)
    w_positive, w_negative = (w.unsqueeze(1).expand(real.shape)[real] for w in both)  # [P]
    loss = (w_positive * f(logits(h, e, layers, options), options.eps)).sum()  # (L4)
    for e_i in e_k:
        loss = loss + (w_negative * f(-logits(h, e_i, layers, options), options.eps)).sum()
    return loss
