"""The backend ``torch``: attention scores and their hand-written derivative, tuned within plain torch.

It runs where no kernel does. Equation numbers are those of docs/math-attention.md. For row b with target q and history
steps k_t:

    bilinear   v = W q,  e_t = c * <k_t, v>                                                       (A1)
    din        z_1 = W_1 [q, k_t, q - k_t, q o k_t] + b_1,  e_t = c * MLP tail (M1) of z_1         (A2)
    softmax    a_t = exp(e_t - max e) / sum over the row's valid steps, 0 at all others           (A3)

The concatenation of (A2) is never built. With W_1 = [Wq | Wk | Wd | Wp]

    z_1 = (Wq + Wd) q + b_1  +  (Wk - Wd) k  +  Wp (q o k)                                        (A4)
        = (Wq + Wd) q + b_1  +  ((Wk - Wd) + Wp diag(q)) k                                        (A5)

(A5) needs one product for each step instead of four, but one matrix for each row. It is used for padded batches, one
tile of rows at a time. (A4) is used for jagged batches, where a batched product would need sizes on the host, and for
very short rows. For jagged batches with shared histories its middle term is computed once for each history.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from dien_kernels.checks import compute_dtype
from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._mlp import ACTIVATIONS, Layers
from dien_kernels.ops._torch_mlp import TILE, Tail, reads_are_free
from dien_kernels.ops.attention.contract import Gradients, Inputs, Options, check_index_values


def refuses(call: Call) -> str | None:
    return None


def matrix_a_row(steps: int, hidden: int) -> bool:
    """Whether (A5) is faster than (A4).

    Its matrix for each row costs as much as half of (A4)'s products for one step, and three times as much in the
    backward. On one AVX2 core both were equally fast at 13, 20 and 28 steps for H = 36, 64 and 128.
    """
    return steps >= max(16, hidden // 4)


class _Bilinear:
    """(A1) and its derivative (A6): dv = c sum_t de_t k_t, dk_t = c de_t v, dW = dv q^T, dq = W^T dv."""

    def __init__(self, q: Tensor, layers: Layers, options: Options, compute: torch.dtype) -> None:
        self.q, self.scale = q, options.scale
        self.w = layers.weights[0].to(compute) if layers.weights else None
        self.v = q if self.w is None else linear(q, self.w)
        self.width = self.v.shape[1]

    def zero_grads(self) -> None:
        self.dv = torch.zeros_like(self.v)

    def tile_scores(self, rows: Tensor | slice, k: Tensor) -> Tensor:
        return torch.bmm(k, self.v[rows].unsqueeze(2)).squeeze(2) * self.scale

    def tile_scores_backward(self, rows: Tensor | slice, k: Tensor, de: Tensor) -> Tensor:
        de = de * self.scale
        self.dv[rows] = torch.bmm(de.unsqueeze(1), k).squeeze(1)
        return de.unsqueeze(2) * self.v[rows].unsqueeze(1)

    def project_states(self, states: Tensor) -> None: ...

    def pair_scores(self, row: Tensor, source: Tensor | None, k: Tensor) -> Tensor:
        return (k * self.v.index_select(0, row)).sum(1) * self.scale

    def pair_scores_backward(self, row: Tensor, source: Tensor | None, k: Tensor, de: Tensor) -> Tensor:
        de = (de * self.scale).unsqueeze(1)
        add_rows(self.dv, row, de * k)
        return de * self.v.index_select(0, row)

    def project_states_backward(self, states: Tensor, dstates: Tensor) -> None: ...

    def grads(self) -> tuple[Tensor, list[Tensor]]:
        if self.w is None:
            return self.dv, []
        return self.dv @ self.w, [self.dv.t() @ self.q]


class _Din:
    """(A2) by (A5) or (A4), and its derivative (A7) to (A12)."""

    def __init__(self, q: Tensor, layers: Layers, options: Options, compute: torch.dtype) -> None:
        self.q, self.scale, self.layers = q, options.scale, layers
        self.tail = Tail(layers, ACTIVATIONS[options.activation], compute)
        self.w_q, self.w_k, self.w_d, self.w_p = layers.weights[0].to(compute).chunk(4, 1)
        self.w_row, self.w_step = self.w_q + self.w_d, self.w_k - self.w_d
        bias = layers.biases[0] if layers.biases and layers.biases[0].numel() else None
        self.r = linear(q, self.w_row, bias)
        self.width = self.r.shape[1]
        self.projected: Tensor | None = None

    def zero_grads(self) -> None:
        self.tail.zero_grads()
        self.dr, self.dq = torch.zeros_like(self.r), torch.zeros_like(self.q)
        self.dw_step, self.dw_p = torch.zeros_like(self.w_step), torch.zeros_like(self.w_p)
        self.d_projected = None if self.projected is None else torch.zeros_like(self.projected)

    def _matrices(self, rows: Tensor | slice) -> Tensor:
        return torch.addcmul(self.w_step, self.w_p, self.q[rows].unsqueeze(1))

    def _z(self, rows: Tensor | slice, k: Tensor) -> tuple[Tensor, Tensor | None]:
        r = self.r[rows].unsqueeze(1)
        if matrix_a_row(k.shape[1], k.shape[2]):  # (A5)
            matrices = self._matrices(rows)
            return torch.baddbmm(r, k, matrices.transpose(1, 2)), matrices
        z = linear(k, self.w_step).add_(linear(k * self.q[rows].unsqueeze(1), self.w_p))  # (A4)
        return z.add_(r), None

    def tile_scores(self, rows: Tensor | slice, k: Tensor) -> Tensor:
        z, _ = self._z(rows, k)
        e, _ = self.tail.forward(z.flatten(0, 1))
        return e.view(k.shape[:2]) * self.scale

    def tile_scores_backward(self, rows: Tensor | slice, k: Tensor, de: Tensor) -> Tensor:
        z, matrices = self._z(rows, k)
        _, kept = self.tail.forward(z.flatten(0, 1))
        dz = self.tail.backward((de * self.scale).reshape(-1, 1), kept).view(*k.shape[:2], -1)  # (A7)
        q = self.q[rows]
        self.dr[rows] = dz.sum(1)  # (A8)
        if matrices is None:
            k_rows = k.flatten(0, 1)
            dz_rows, p = dz.flatten(0, 1), (k * q.unsqueeze(1)).flatten(0, 1)
            self.dw_step.addmm_(dz_rows.t(), k_rows)
            self.dw_p.addmm_(dz_rows.t(), p)  # (A9)
            dp = dz @ self.w_p
            self.dq[rows] = (dp * k).sum(1)  # (A10)
            return torch.addcmul(dz @ self.w_step, dp, q.unsqueeze(1))  # (A11)
        d_matrices = torch.bmm(dz.transpose(1, 2), k)  # (A12)
        self.dw_step += d_matrices.sum(0)
        self.dw_p += (d_matrices * q.unsqueeze(1)).sum(0)
        self.dq[rows] = (d_matrices * self.w_p).sum(1)
        return torch.bmm(dz, matrices)

    def project_states(self, states: Tensor) -> None:
        """Compute the step term of (A4) once for each history."""
        self.projected = linear(states, self.w_step)

    def _z_of_pairs(self, row: Tensor, source: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor]:
        p = k * self.q.index_select(0, row)
        z = torch.addmm(self.r.index_select(0, row), p, self.w_p.t())
        if self.projected is None:
            return z.addmm_(k, self.w_step.t()), p
        return z.add_(self.projected.index_select(0, cast(Tensor, source))), p

    def pair_scores(self, row: Tensor, source: Tensor | None, k: Tensor) -> Tensor:
        e, _ = self.tail.forward(self._z_of_pairs(row, source, k)[0])
        return e.squeeze(1) * self.scale

    def pair_scores_backward(self, row: Tensor, source: Tensor | None, k: Tensor, de: Tensor) -> Tensor:
        z, p = self._z_of_pairs(row, source, k)
        _, kept = self.tail.forward(z)
        dz = self.tail.backward((de * self.scale).unsqueeze(1), kept)
        add_rows(self.dr, row, dz)  # (A8)
        self.dw_p.addmm_(dz.t(), p)  # (A9)
        dp = dz @ self.w_p
        add_rows(self.dq, row, dp * k)  # (A10)
        dk = dp.mul_(self.q.index_select(0, row))  # (A11), with the step term here or in share_backward
        if self.d_projected is None:
            self.dw_step.addmm_(dz.t(), k)
            return dk.addmm_(dz, self.w_step)
        add_rows(self.d_projected, cast(Tensor, source), dz)
        return dk

    def project_states_backward(self, states: Tensor, dstates: Tensor) -> None:
        if self.d_projected is not None:
            self.dw_step += self.d_projected.t() @ states
            dstates.addmm_(self.d_projected, self.w_step)

    def grads(self) -> tuple[Tensor, list[Tensor]]:
        dw_row = self.dr.t() @ self.q
        dw_1 = torch.cat((dw_row, self.dw_step, dw_row - self.dw_step, self.dw_p), 1)  # (A9)
        biases: list[Tensor] = []
        if self.layers.biases:
            all_biases = (self.dr.sum(0), *self.tail.db)
            biases = [d if b.numel() else b.clone() for d, b in zip(all_biases, self.layers.biases, strict=True)]
        dq = self.dq + self.dr @ self.w_row
        return dq, [dw_1, *self.tail.dw, *biases, *self.tail.ds]


def add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] += values, summed in the order of ``index`` on every device."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:  # sorts, where index_add_ would use atomics
        out.index_put_((index,), values, accumulate=True)


def _make_scorer(target: Tensor, length: Tensor, layers: Layers, options: Options) -> _Bilinear | _Din:
    compute = compute_dtype(target.dtype)
    # The target of a row without a step has no effect, even if it is NaN.
    q = torch.where((length > 0).unsqueeze(1), target.to(compute), 0)
    return (_Bilinear if options.bilinear else _Din)(q, layers, options, compute)


# Padded batches: tiles of rows x steps.


class Padded(NamedTuple):
    """Rows of a padded batch: ``length[b]`` bounds the valid steps; ``mask`` [B, T] says which they are."""

    history: Tensor | None
    length: Tensor
    mask: Tensor | None
    full: bool  # whether it is known that no step is invalid


def _padded(states: Tensor, histories: Histories) -> Padded:
    u, steps = states.shape[:2]
    history = None if histories.history_of is None else histories.index(u)
    mask, lengths = histories.mask, histories.lengths
    if mask is not None:
        length = (mask * torch.arange(1, steps + 1, device=states.device)).amax(1) if steps else mask.sum(1)
        mask = mask if history is None else mask[history]
    elif lengths is not None:
        length = lengths.clamp(0, steps)
    else:
        batch = histories.rows(states)
        return Padded(history, torch.full((batch,), steps, device=states.device), None, True)
    return Padded(history, length if history is None else length[history], mask, False)


class Tile(NamedTuple):
    rows: Tensor | slice
    steps: int
    valid: Tensor | None  # [rows, steps], None where all are


def _tiles(padded: Padded, steps: int, width: int, device: torch.device) -> Iterator[Tile]:
    """Cut the rows into tiles of about ``TILE`` values.

    On the CPU the longest rows come first, and each tile has as many steps as its longest row.
    """
    history, length, mask, full = padded
    batch, budget = length.shape[0], TILE.get(device.type, TILE["cuda"])
    if not steps:
        return
    if full or not reads_are_free(device):
        size = max(1, budget // (steps * width))
        step = torch.arange(steps, device=length.device)
        for start in range(0, batch, size):
            rows = slice(start, min(start + size, batch))
            if full:
                yield Tile(rows, steps, None)
            else:
                yield Tile(rows, steps, step < length[rows].unsqueeze(1) if mask is None else mask[rows])
        return
    order = length.argsort(descending=True, stable=True)
    sizes = length[order].tolist()
    start = 0
    while start < batch and sizes[start] > 0:
        cut = sizes[start]
        stop = min(batch, start + max(1, budget // (cut * width)))
        while sizes[stop - 1] == 0:
            stop -= 1
        chosen = order[start:stop]
        if mask is not None:
            yield Tile(chosen, cut, mask[chosen, :cut])
        elif sizes[stop - 1] == cut:
            yield Tile(chosen, cut, None)
        else:
            yield Tile(chosen, cut, torch.arange(cut) < length[chosen].unsqueeze(1))
        start = stop


def _steps(states: Tensor, padded: Padded, tile: Tile, compute: torch.dtype) -> Tensor:
    """The states of a tile, with zeros at invalid steps, where a NaN would otherwise reach the sums."""
    index = tile.rows if padded.history is None else padded.history[tile.rows]
    k = states[:, : tile.steps]
    k = (k[index] if isinstance(index, slice) else k.index_select(0, index)).to(compute)
    return k if tile.valid is None else torch.where(tile.valid.unsqueeze(2), k, 0)


def _softmax(e: Tensor, valid: Tensor | None) -> Tensor:
    """(A3) along the last dimension."""
    if valid is None:
        return torch.softmax(e, 1)
    top = torch.where(valid, e, -torch.inf).amax(1, True)
    top = torch.where(valid.any(1, True), top, 0)
    p = torch.where(valid, (e - top).exp_(), 0)
    total = p.sum(1, True)
    return torch.where(valid, p / torch.where(total == 0, 1, total), 0)


def _forward_padded(target: Tensor, states: Tensor, layers: Layers, padded: Padded, options: Options) -> Tensor:
    scorer = _make_scorer(target, padded.length, layers, options)
    steps = states.shape[1]
    out = target.new_zeros((target.shape[0], steps), dtype=scorer.q.dtype)
    for tile in _tiles(padded, steps, scorer.width, states.device):
        e = scorer.tile_scores(tile.rows, _steps(states, padded, tile, scorer.q.dtype))
        if options.softmax:
            e = _softmax(e, tile.valid)
        elif tile.valid is not None:
            e = torch.where(tile.valid, e, 0)
        out[tile.rows, : tile.steps] = e
    return out


def _backward_padded(
    da: Tensor, out: Tensor, target: Tensor, states: Tensor, layers: Layers, padded: Padded, options: Options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    scorer = _make_scorer(target, padded.length, layers, options)
    scorer.zero_grads()
    dstates = torch.zeros_like(states, dtype=scorer.q.dtype, memory_format=torch.contiguous_format)
    for tile in _tiles(padded, states.shape[1], scorer.width, states.device):
        rows, steps, valid = tile
        k = _steps(states, padded, tile, scorer.q.dtype)
        de = da[rows, :steps]
        if valid is not None:
            de = torch.where(valid, de, 0)
        if options.softmax:
            a = out[rows, :steps]
            de = a * (de - (a * de).sum(1, True))  # (A13)
            de = de if valid is None else torch.where(valid, de, 0)
        dk = scorer.tile_scores_backward(rows, k, de)
        if valid is not None:
            dk = torch.where(valid.unsqueeze(2), dk, 0)
        if padded.history is None:
            dstates[rows, :steps] = dk
        else:
            add_rows(dstates[:, :steps], padded.history[rows], dk)
    dq, grads = scorer.grads()
    return dq, dstates, grads


# Jagged batches: a flat list of (row, state) pairs, sizes known without reading any tensor.


class Pairs(NamedTuple):
    row: Tensor  # [P] the row of each pair
    source: Tensor | None  # [P] the flat row of its state; None where pair p reads state p
    valid: Tensor | None  # [P]; None on the CPU, where the offsets were checked, so that all pairs are valid
    length: Tensor  # [B]


def _pairs(states: Tensor, histories: Histories, options: Options) -> Pairs:
    total = states.shape[0] if histories.history_of is None else options.rows_total
    length = cast(Tensor, histories.row_lengths())
    valid = None
    if not reads_are_free(states.device):
        valid = torch.arange(total, device=states.device) < length.sum()
    source = histories.source_of_step(total, states.shape[0])
    return Pairs(histories.row_of_step(total), source, valid, length)


def _chunks(pairs: Pairs, width: int, device: torch.device) -> Iterator[slice]:
    size = max(1, TILE.get(device.type, TILE["cuda"]) // width)
    total = pairs.row.shape[0] if pairs.length.shape[0] else 0
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _pair_steps(states: Tensor, pairs: Pairs, chunk: slice, compute: torch.dtype) -> Tensor:
    k = (states[chunk] if pairs.source is None else states.index_select(0, pairs.source[chunk])).to(compute)
    return k if pairs.valid is None else torch.where(pairs.valid[chunk].unsqueeze(1), k, 0)


def _zero_unused(states: Tensor, pairs: Pairs) -> Tensor:
    """Replace the states of histories that no row reads by zeros, so that a NaN there does not reach the weights."""
    used = torch.zeros(states.shape[0], dtype=torch.bool, device=states.device)
    used[cast(Tensor, pairs.source)] = True
    return torch.where(used.unsqueeze(1), states, 0)


def _forward_jagged(target: Tensor, states: Tensor, layers: Layers, pairs: Pairs, options: Options) -> Tensor:
    scorer = _make_scorer(target, pairs.length, layers, options)
    compute = scorer.q.dtype
    if pairs.source is not None:
        scorer.project_states(states.to(compute))
    e = target.new_zeros(pairs.row.shape[0], dtype=compute)
    for chunk in _chunks(pairs, scorer.width, states.device):
        source = None if pairs.source is None else pairs.source[chunk]
        e[chunk] = scorer.pair_scores(pairs.row[chunk], source, _pair_steps(states, pairs, chunk, compute))
    if pairs.valid is not None:
        e = torch.where(pairs.valid, e, -torch.inf if options.softmax else 0)
    if not options.softmax or not target.shape[0]:
        return e
    batch = target.shape[0]
    top = e.new_full((batch,), -torch.inf).scatter_reduce_(0, pairs.row, e, "amax")
    p = (e - top[pairs.row]).exp_()
    if pairs.valid is not None:
        p = torch.where(pairs.valid, p, 0)
    total = e.new_zeros(batch)
    add_rows(total, pairs.row, p)
    p /= total[pairs.row]
    return p if pairs.valid is None else torch.where(pairs.valid, p, 0)


def _backward_jagged(
    da: Tensor, out: Tensor, target: Tensor, states: Tensor, layers: Layers, pairs: Pairs, options: Options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    scorer = _make_scorer(target, pairs.length, layers, options)
    compute = scorer.q.dtype
    if pairs.source is not None:
        used_states = _zero_unused(states.to(compute), pairs)
        scorer.project_states(used_states)
    scorer.zero_grads()
    de = da if pairs.valid is None else torch.where(pairs.valid, da, 0)
    if options.softmax and target.shape[0]:
        dot = de.new_zeros(target.shape[0])
        add_rows(dot, pairs.row, out * de)
        de = out * (de - dot[pairs.row])  # (A13)
        de = de if pairs.valid is None else torch.where(pairs.valid, de, 0)
    dstates = torch.zeros_like(states, dtype=compute, memory_format=torch.contiguous_format)
    for chunk in _chunks(pairs, scorer.width, states.device):
        source = None if pairs.source is None else pairs.source[chunk]
        k = _pair_steps(states, pairs, chunk, compute)
        dk = scorer.pair_scores_backward(pairs.row[chunk], source, k, de[chunk])
        if pairs.valid is not None:
            dk = torch.where(pairs.valid[chunk].unsqueeze(1), dk, 0)
        if source is None:
            dstates[chunk] = dk
        else:
            add_rows(dstates, source, dk)
    if pairs.source is not None:
        scorer.project_states_backward(used_states, dstates)
    dq, grads = scorer.grads()
    return dq, dstates, grads


def _as_padded(states: Tensor, histories: Histories) -> tuple[Tensor, Padded] | None:
    """A jagged batch whose histories all have the same length, as a padded batch; None for any other.

    None also where the lengths may not be read, and for shared histories for which (A4) is faster than (A5).
    """
    count, history = histories.count(), histories.history_of
    if not count or not states.shape[0] or not reads_are_free(states.device):
        return None
    length = cast(Tensor, histories.history_lengths())
    steps, hidden = states.shape[0] // count, states.shape[1]
    if not bool((length == steps).all()) or not (history is None or matrix_a_row(steps, hidden)):
        return None
    length = length if history is None else length[history]
    return states.reshape(count, steps, hidden), Padded(history, length, None, True)


# The backend: the same functions for every layout.


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Tensor:
    target, states, layers = inputs
    check_index_values(states, histories, options.rows_total)
    if histories.jagged:
        same_length = _as_padded(states, histories)
        if same_length is None:
            return _forward_jagged(target, states, layers, _pairs(states, histories, options), options)
        return _forward_padded(target, same_length[0], layers, same_length[1], options).flatten()
    return _forward_padded(target, states, layers, _padded(states, histories), options)


def bwd(dscores: Tensor, inputs: Inputs, histories: Histories, scores: Tensor, options: Options) -> Gradients:
    target, states, layers = inputs
    same_length = _as_padded(states, histories) if histories.jagged else None
    if same_length is not None:
        da, out = (t.reshape(target.shape[0], same_length[0].shape[1]) for t in (dscores, scores))
        dq, dstates, grads = _backward_padded(da, out, target, same_length[0], layers, same_length[1], options)
        dstates = dstates.view(states.shape)
    elif histories.jagged:
        pairs = _pairs(states, histories, options)
        dq, dstates, grads = _backward_jagged(dscores, scores, target, states, layers, pairs, options)
    else:
        padded = _padded(states, histories)
        dq, dstates, grads = _backward_padded(dscores, scores, target, states, layers, padded, options)
    return Gradients.of(inputs, [dq, dstates, *grads])
