"""The backend ``torch``: the auxiliary loss and its hand-written derivative, tuned within plain torch.

It runs where no kernel does. Equation numbers are those of docs/math-auxiliary-loss.md. A pair i is a state h with the
behaviour e+ that follows it and K negatives e-_k. With x the logit of a state and a behaviour:

    inner     x = <h, e>                                                                  (L1)
    mlp       z_1 = W_h h + b_1 + W_e e,  x = MLP tail (M1) of z_1;  W_h h + b_1 is        (L2)
              computed once for the positive and all negatives
    f(z)      = -log(sigmoid(z) + eps), or min(-log sigmoid(z), 100) for eps = "clamp"     (L3)
    loss      = sum_i w+_i f(x+_i) + sum_{i,k} w-_i f(-x-_{ik})                            (L4)

The weights w+ and w- of a pair express the normaliser (L5); they depend on the lengths only. Rows and batches without a
pair have the weight 0, and nothing is ever divided by zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from dien_kernels.checks import compute_dtype
from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._mlp import ACTIVATIONS, Layers
from dien_kernels.ops._torch_mlp import TILE, Tail, reads_are_free
from dien_kernels.ops.auxiliary_loss.contract import (
    CLAMP,
    NORMALIZERS,
    Inputs,
    LossAndGradients,
    Options,
    check_index_values,
)


def refuses(call: Call) -> str | None:
    return None


class Pairs(NamedTuple):
    """Pairs as flat rows of states and of behaviours; ``w_pos`` and ``w_neg`` [P], 0 at invalid pairs."""

    state: Tensor | slice
    behaviour: Tensor | slice
    valid: Tensor | None  # [P], None where all are known to be valid
    w_pos: Tensor
    w_neg: Tensor


def _pairs(inputs: Inputs, histories: Histories, options: Options) -> Pairs:
    """Find the pairs, and their weights by (L5)."""
    states, negatives = inputs.states, inputs.negative.shape[-2]
    lengths, offsets = histories.lengths, histories.offsets
    device, compute, ahead = states.device, compute_dtype(states.dtype), options.ahead
    if offsets is not None:
        total, batch = states.shape[0], histories.count()
        row = torch.searchsorted(offsets[1:], torch.arange(total, device=device), right=True)
        known = row < batch  # false for rows past the last offset, which only other devices than the CPU let pass
        row = row.clamp(max=max(batch - 1, 0))
        count = (offsets.diff() - ahead).clamp(min=0)
        valid = known & (torch.arange(total, device=device) + ahead < offsets[1:][row]) if batch else known
        slots = 0
    else:
        batch, steps = states.shape[:2]
        slots = batch * max(steps - ahead, 0)
        count = torch.full((batch,), steps, device=device) if lengths is None else lengths.clamp(0, steps)
        count = (count - ahead).clamp(min=0)
        valid = (torch.arange(steps, device=device) < count.unsqueeze(1)).flatten()
        row = torch.arange(batch, device=device).repeat_interleave(steps, output_size=batch * steps)
    pairs = count.sum().clamp(min=1).to(compute)
    normalizer, one = NORMALIZERS[options.normalizer], torch.ones((), dtype=compute, device=device)
    if normalizer == "row":
        row_weight = 1 / (count.clamp(min=1).to(compute) * max(batch, 1) * (1 + negatives))
        w_pos = w_neg = row_weight[row] if batch else row_weight.new_zeros(row.shape)
    else:
        if normalizer == "joint":
            pos = neg = one / (pairs * (1 + negatives))
        elif normalizer == "separate":
            pos, neg = one / pairs, one / (pairs * max(negatives, 1))
        else:
            pos = neg = one / max(slots, 1)
        w_pos, w_neg = pos.expand(row.shape), neg.expand(row.shape)
    if reads_are_free(device):  # sizes may depend on data here, so that padding can be left out
        index = valid.nonzero().squeeze(1)
        return Pairs(index, index + ahead, None, w_pos[index], w_neg[index])
    last = max(valid.shape[0] - ahead, 0)
    valid = valid[:last]
    w_pos, w_neg = torch.where(valid, w_pos[:last], 0), torch.where(valid, w_neg[:last], 0)
    return Pairs(slice(0, last), slice(ahead, ahead + last), valid, w_pos, w_neg)


def _chunks(pairs: Pairs, width: int, device: str) -> Iterator[Pairs]:
    size, total = max(1, TILE.get(device, TILE["cuda"]) // max(width, 1)), pairs.w_pos.shape[0]
    for start in range(0, total, size):
        index = slice(start, min(start + size, total))
        state, behaviour, valid = pairs.state, pairs.behaviour, pairs.valid
        if isinstance(state, slice) or isinstance(behaviour, slice):
            ahead = behaviour.start - state.start  # type: ignore[union-attr]
            yield Pairs(
                index,
                slice(index.start + ahead, index.stop + ahead),
                None if valid is None else valid[index],
                pairs.w_pos[index],
                pairs.w_neg[index],
            )
        else:
            yield Pairs(state[index], behaviour[index], None, pairs.w_pos[index], pairs.w_neg[index])


def _take(flat: Tensor, index: Tensor | slice, valid: Tensor | None, compute: torch.dtype) -> Tensor:
    """Rows in the compute dtype, with zeros where they are invalid: a NaN there would otherwise reach the sums."""
    rows = (flat[index] if isinstance(index, slice) else flat.index_select(0, index)).to(compute)
    return rows if valid is None else torch.where(valid.reshape((-1,) + (1,) * (rows.dim() - 1)), rows, 0)


def _put(out: Tensor, index: Tensor | slice, rows: Tensor) -> None:
    """The inverse of ``_take``. No row occurs twice in ``index``."""
    if isinstance(index, slice):
        out[index] = rows
    else:
        out.index_copy_(0, index, rows)


def _f(z: Tensor, eps: float) -> Tensor:
    """(L3)"""
    if eps > 0:
        return -torch.log(torch.sigmoid(z) + eps)
    value = -logsigmoid(z)
    return value if eps == 0 else value.clamp(max=CLAMP)


def _df(z: Tensor, eps: float) -> Tensor:
    """(L6): f'(z) = -s (1 - s) / (s + eps), which is s - 1 for eps = 0, and 0 where the clamp holds."""
    complement = torch.sigmoid(-z)  # 1 - s, without its rounding
    if eps > 0:
        s = torch.sigmoid(z)
        return -s * complement / (s + eps)
    return -complement if eps == 0 else torch.where(-logsigmoid(z) >= CLAMP, 0, -complement)


class _Scorer:
    """(L1) or (L2) for a chunk of pairs, and their derivative: logits x [p (1 + K)], first those of the positives.

    e [p (1 + K), D] are the behaviours in the same order: p positives, then K negatives of each pair.
    """

    def __init__(self, layers: Layers, options: Options, compute: torch.dtype, hidden: int) -> None:
        self.inner, self.layers = options.inner, layers
        if not self.inner:
            self.tail = Tail(layers, ACTIVATIONS[options.activation], compute)
            first = layers.weights[0].to(compute)
            self.w_h, self.w_e = first[:, :hidden], first[:, hidden:]
            self.bias = layers.biases[0] if layers.biases and layers.biases[0].numel() else None
            self.dw_h, self.dw_e = torch.zeros_like(self.w_h), torch.zeros_like(self.w_e)
            self.db = first.new_zeros(first.shape[0])
            self.tail.zero_grads()

    def forward(self, h: Tensor, e: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        if self.inner:
            return torch.cat([(part * h.unsqueeze(1)).sum(2).flatten() for part in _split_pairs(e, h.shape[0])]), []
        z, r = linear(e, self.w_e), linear(h, self.w_h, self.bias).unsqueeze(1)
        for part in _split_pairs(z, h.shape[0]):
            part.add_(r)
        x, kept = self.tail.forward(z)
        return x.squeeze(1), kept

    def backward(self, dx: Tensor, h: Tensor, e: Tensor, kept: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """dh [p, H] and de"""
        pairs = h.shape[0]
        if self.inner:  # (L7)
            de = torch.cat([(part * h.unsqueeze(1)).flatten(0, 1) for part in _split_pairs(dx.unsqueeze(1), pairs)])
            return _sum_pairs(dx.unsqueeze(1) * e, pairs), de
        dz = self.tail.backward(dx.unsqueeze(1), kept)  # (L8)
        self.dw_e.addmm_(dz.t(), e)
        dr = _sum_pairs(dz, pairs)
        self.dw_h.addmm_(dr.t(), h)
        self.db += dr.sum(0)
        return dr @ self.w_h, dz @ self.w_e

    def grads(self) -> list[Tensor]:
        if self.inner:
            return []
        biases: list[Tensor] = []
        if self.layers.biases:
            all_biases = (self.db, *self.tail.db)
            biases = [d if b.numel() else b.clone() for d, b in zip(all_biases, self.layers.biases, strict=True)]
        return [torch.cat((self.dw_h, self.dw_e), 1), *self.tail.dw, *biases, *self.tail.ds]


def _split_pairs(rows: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Views of the rows of the positives [p, 1, .] and of those of the negatives [p, K, .]."""
    return rows[:pairs].unsqueeze(1), rows[pairs:].view(pairs, -1, *rows.shape[1:])


def _sum_pairs(rows: Tensor, pairs: int) -> Tensor:
    """The sum over the positive and the negatives of each pair: [p, .]."""
    positive, negatives = _split_pairs(rows, pairs)
    return positive[:, 0] + (negatives[:, 0] if negatives.shape[1] == 1 else negatives.sum(1))


class FlatInputs(NamedTuple):
    """Every layout as rows: states [N, H], positive [N, D], negative [N, K, D]."""

    states: Tensor
    positive: Tensor
    negative: Tensor


def _flatten_inputs(inputs: Inputs) -> FlatInputs:
    states, positive, negative, _ = inputs
    size, width, count = states.shape[-1], positive.shape[-1], negative.shape[-2]
    rows = states.shape[:-1].numel()
    return FlatInputs(states.reshape(rows, size), positive.reshape(rows, width), negative.reshape(rows, count, width))


def _behaviours(flat: FlatInputs, chunk: Pairs, compute: torch.dtype) -> Tensor:
    """[p (1 + K), D], as ``_Scorer`` wants them."""
    positive = _take(flat.positive, chunk.behaviour, chunk.valid, compute)
    return torch.cat((positive, _take(flat.negative, chunk.behaviour, chunk.valid, compute).flatten(0, 1)))


def _width(flat: FlatInputs, layers: Layers, options: Options) -> int:
    one = flat.positive.shape[1] if options.inner else layers.weights[0].shape[0]
    return one * (1 + flat.negative.shape[1])


def _terms(x: Tensor, chunk: Pairs, options: Options) -> Tensor:
    """(L3), (L4) of a chunk from its logits: a scalar."""
    positive, negatives = _split_pairs(x, chunk.w_pos.shape[0])
    value = _f(positive[:, 0], options.eps) * chunk.w_pos + _f(-negatives, options.eps).sum(1) * chunk.w_neg
    return (value if chunk.valid is None else torch.where(chunk.valid, value, 0)).sum()


def _dterms(x: Tensor, chunk: Pairs, options: Options) -> Tensor:
    """(L6): the derivative by the logits."""
    positive, negatives = _split_pairs(x, chunk.w_pos.shape[0])
    dx_pos = _df(positive[:, 0], options.eps) * chunk.w_pos
    dx_neg = -_df(-negatives, options.eps) * chunk.w_neg.unsqueeze(1)
    if chunk.valid is not None:
        dx_pos = torch.where(chunk.valid, dx_pos, 0)
        dx_neg = torch.where(chunk.valid.unsqueeze(1), dx_neg, 0)
    return torch.cat((dx_pos, dx_neg.flatten()))


def forward(flat: FlatInputs, layers: Layers, pairs: Pairs, options: Options) -> Tensor:
    """(L1) to (L5)"""
    compute = compute_dtype(flat.states.dtype)
    scorer = _Scorer(layers, options, compute, flat.states.shape[1])
    loss = flat.states.new_zeros((), dtype=compute)
    for chunk in _chunks(pairs, _width(flat, layers, options), flat.states.device.type):
        h = _take(flat.states, chunk.state, chunk.valid, compute)
        x, _ = scorer.forward(h, _behaviours(flat, chunk, compute))
        loss += _terms(x, chunk, options)
    return loss


def forward_backward(
    flat: FlatInputs, layers: Layers, pairs: Pairs, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(L1) to (L8) in one pass: the loss and its derivatives, in the compute dtype."""
    compute = compute_dtype(flat.states.dtype)
    scorer = _Scorer(layers, options, compute, flat.states.shape[1])
    loss = flat.states.new_zeros((), dtype=compute)
    dstates, dpos, dneg = (torch.zeros_like(t, dtype=compute, memory_format=torch.contiguous_format) for t in flat)
    for chunk in _chunks(pairs, _width(flat, layers, options), flat.states.device.type):
        h = _take(flat.states, chunk.state, chunk.valid, compute)
        e = _behaviours(flat, chunk, compute)
        x, kept = scorer.forward(h, e)
        loss += _terms(x, chunk, options)
        dh, de = scorer.backward(_dterms(x, chunk, options), h, e, kept)
        de_pos, de_neg = _split_pairs(de, h.shape[0])
        _put(dstates, chunk.state, dh)
        _put(dpos, chunk.behaviour, de_pos[:, 0])
        _put(dneg, chunk.behaviour, de_neg)
    return loss, dstates, dpos, dneg, scorer.grads()


# The backend: the same functions for every layout.


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Tensor:
    check_index_values(inputs.states, histories)
    return forward(_flatten_inputs(inputs), inputs.layers, _pairs(inputs, histories, options), options)


def fwd_bwd(inputs: Inputs, histories: Histories, options: Options) -> LossAndGradients:
    check_index_values(inputs.states, histories)
    pairs = _pairs(inputs, histories, options)
    loss, *flat, dlayers = forward_backward(_flatten_inputs(inputs), inputs.layers, pairs, options)
    data = [g.view(t.shape) for g, t in zip(flat, inputs[:3], strict=True)]
    return LossAndGradients.of(inputs, loss, [*data, *dlayers])
