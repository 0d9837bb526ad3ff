"""The Triton backend's host side: what it refuses, launch configurations, and the products that are one a row.

v = W q, r of (A5) and the gradients that come from theirs are small products of torch's; the steps are the kernels'.
Equation numbers are those of docs/math-attention.md. Nothing here waits for the device or depends on the values of an
index tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._layout import Ragged, check_values
from dien_kernels.ops._mlp import ACTIVATIONS

MAX_HIDDEN = 256
MAX_DIN = 128  # of a network with hidden layers: above, its backward spills on some devices
MAX_SECOND = 128  # units of the second hidden layer


def refuses(call: Call) -> str | None:
    reason = _triton.refuses(call, MAX_HIDDEN)
    if reason is None and call.widths and call.hidden_size > MAX_DIN:
        reason = f"hidden={call.hidden_size} is above the {MAX_DIN} of the Triton kernels for hidden layers"
    if reason is None and len(call.widths) > 2:
        reason = f"{len(call.widths)} hidden layers are above the 2 of the Triton kernels"
    if reason is None and len(call.widths) == 2 and call.widths[1] > MAX_SECOND:
        reason = f"a second hidden layer of {call.widths[1]} units is above the {MAX_SECOND} of the Triton kernels"
    return reason


class Launch(NamedTuple):
    """How a kernel is compiled and launched for one size."""

    steps: int  # of a row at a time
    block: int  # units of the first layer at a time
    warps: int
    registers: int | None = None  # for each thread at most; told where ptxas would take fewer and spill


# By padded hidden size: chosen by compiled instructions and spills, not yet by time
# (benchmarks/results/gpu_triton.csv). A block of steps is a warp's: with more, copies of a sum were stored by many.
_BILINEAR = {
    16: Launch(32, 0, 4),
    32: Launch(32, 0, 4),
    64: Launch(32, 0, 4),
    128: Launch(32, 0, 4),
    256: Launch(16, 0, 4),
}
_DIN = {
    16: Launch(16, 16, 4, 224),
    32: Launch(16, 16, 4, 224),
    64: Launch(16, 16, 4, 224),
    128: Launch(16, 16, 8, 255),
}


def configuration(hidden: int, bilinear: bool) -> Launch:
    return (_BILINEAR if bilinear else _DIN)[_triton.padded_size(hidden)]


class _Job:
    """A call's tensors and numbers in the form the kernels want."""

    def __init__(
        self, target: Tensor, states: Tensor, weights: list[Tensor], biases: list[Tensor], slopes: list[Tensor],
        lengths: Tensor | None, offsets: Tensor | None, mask: Tensor | None, history: Tensor | None,
        options: tuple[Any, ...],
    ) -> None:  # fmt: skip
        rows_total, self.bilinear, activation, scale, self.softmax = options
        ragged = Ragged(lengths, offsets, history)
        self.batch, self.hidden = target.shape[0], states.shape[-1]
        if offsets is None:
            self.histories, self.steps = states.shape[:2]
            check_values(ragged, self.steps, self.histories, None)
            self.y_rows = self.batch * self.steps
            self.shape: tuple[int, ...] = (self.batch, self.steps)
        else:
            self.histories, self.steps = offsets.shape[0] - 1, 0
            check_values(ragged, None, states.shape[0], None)
            if history is not None and history.device.type == "cpu":
                total = int(offsets.diff()[history].sum())
                if total != rows_total:
                    raise ValueError(
                        f"rows_total must be {total}, the steps of the histories named, got {rows_total}"
                    )  # fmt: skip
            self.y_rows = states.shape[0] if history is None else rows_total
            self.shape = (self.y_rows,)
        self.lengths, self.offsets, self.history = (None if t is None else t.contiguous() for t in ragged)
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.all_written = lengths is None and offsets is None and mask is None
        self.states = states.contiguous()
        self.x_rows = states.numel() // self.hidden
        row_lengths, self.y_start = self._row_lengths()
        self.q = target.float()
        if row_lengths is not None:  # rows without a step act on nothing
            self.q = torch.where((row_lengths > 0).unsqueeze(1), self.q, 0)
        self.layers = _Layers(self.q, weights, biases, slopes, self.bilinear)
        self.sizes = (self.batch, self.histories, self.steps, self.x_rows, self.y_rows)
        self.where = (self.lengths, self.offsets, self.mask, self.history, self.y_start)
        self.launch = configuration(self.hidden, self.layers.v is not None)
        self.options = dict(
            SCALE=scale, SOFTMAX=self.softmax, H=self.hidden,
            STEPS=self.launch.steps, **_triton.compiler_options(self.launch.warps, self.launch.registers),
        )  # fmt: skip
        if self.layers.v is not None:
            self.options["PADDED"] = _triton.padded_size(self.hidden)
        else:
            second = self.layers.second
            self.options |= dict(
                ACTIVATION=ACTIVATIONS[activation] or "none", M2=second, PADDED_2=_triton.padded_size(max(second, 1)),
                BLOCK=self.launch.block, PRECISION=_triton.precision(states),
            )  # fmt: skip

    def _row_lengths(self) -> tuple[Tensor | None, Tensor | None]:
        """Each row's number of valid steps where rows differ, and its start in y where that is not its start in x."""
        length = self.lengths
        if self.histories == 0:
            return None, None
        if self.offsets is not None:
            length = self.offsets.diff()
        elif self.mask is not None:
            length = self.mask.sum(1)
        if length is None or self.history is None:
            return length, None
        length = length[self.history.clamp(0, self.histories - 1)]
        # Offsets that fall, which nobody has read, would let rows start before the scores.
        return length, (length.cumsum(0) - length).clamp(0, self.y_rows) if self.offsets is not None else None

    @property
    def nothing(self) -> bool:
        """No step at all; the kernels would have nothing to point at."""
        return self.batch == 0 or self.x_rows == 0 or self.y_rows == 0

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """One row for each step of y, zeros where the kernels write only the steps that exist."""
        make = self.states.new_empty if self.all_written else self.states.new_zeros
        return make(shape, dtype=dtype)


class _Layers:
    """What the kernels read of the weights: v and an offset where no unit is hidden, else r and the layers."""

    def __init__(
        self, q: Tensor, weights: list[Tensor], biases: list[Tensor], slopes: list[Tensor], bilinear: bool
    ) -> None:
        self.v = self.offset = self.r = None
        self.second = 0
        if bilinear:
            self.v = linear(q, weights[0].float()) if weights else q
            return
        self.given = bool(biases)
        self.biases = [b.contiguous() if b.numel() else None for b in biases] or [None] * len(weights)
        w_q, w_k, w_d, self.w_p = (w.contiguous() for w in weights[0].float().chunk(4, 1))
        self.w_row, self.w_step = w_q + w_d, w_k - w_d
        self.width = self.w_p.shape[0]
        r = linear(q, self.w_row, self.biases[0])
        if len(weights) == 1:  # (A5) of one unit is the vector v, and r an offset
            self.v, self.offset = torch.addcmul(self.w_step, self.w_p, q), r.squeeze(1)
            return
        self.r, self.last = r, weights[-1].contiguous()
        if len(weights) == 3:
            self.second = weights[1].shape[0]
        self.w_2 = weights[1].contiguous() if self.second else None
        self.b_2 = self.biases[1] if self.second else None
        self.b_last = self.biases[-1]
        each = [s.expand(w.shape[0]).contiguous() for s, w in zip(slopes, weights, strict=False)]
        self.slope_1, self.slope_2 = (*each, None, None)[:2]

    def of_steps(self) -> tuple[Tensor | None, ...]:
        return self.r, self.w_step, self.w_p, self.slope_1, self.w_2, self.b_2, self.slope_2, self.last


def fwd(target, states, weights, biases, slopes, lengths, offsets, mask, history, *options):  # type: ignore[no-untyped-def]
    job = _Job(target, states, weights, biases, slopes, lengths, offsets, mask, history, options)
    scores = job.new(*job.shape)
    if job.nothing:
        return scores.zero_()
    from dien_kernels.ops.attention import triton_kernel

    layers = job.layers
    if layers.v is not None:
        _triton.launch(
            triton_kernel.bilinear_forward, (job.batch,), states,
            job.states, layers.v, layers.offset, *job.where, scores, *job.sizes, **job.options,
        )  # fmt: skip
    else:
        _triton.launch(
            triton_kernel.din_forward, (job.batch,), states,
            job.states, job.q, *layers.of_steps(), layers.b_last, *job.where, scores, *job.sizes,
            layers.width, job.hidden, **job.options,
        )  # fmt: skip
    return scores


def bwd(dscores, target, states, weights, biases, slopes, lengths, offsets, mask, history, scores, *options):  # type: ignore[no-untyped-def]
    job = _Job(target, states, weights, biases, slopes, lengths, offsets, mask, history, options)
    inputs = (target, states, *weights, *biases, *slopes)
    if job.nothing:
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
    from dien_kernels.ops.attention import triton_kernel

    layers, shared = job.layers, job.history is not None
    by_row = job.new(job.y_rows, job.hidden, dtype=torch.float32 if shared else states.dtype)
    where = (*job.where, scores, dscores.contiguous(), by_row)
    if layers.v is not None:
        dv = torch.zeros_like(layers.v)
        d_offset = None if layers.offset is None else torch.empty_like(layers.offset)
        _triton.launch(
            triton_kernel.bilinear_backward, (job.batch,), states,
            job.states, layers.v, *where, dv, d_offset, *job.sizes, **job.options,
        )  # fmt: skip
        gradients = _of_vectors(job, weights, dv, d_offset)
    else:
        programs = min(job.batch, 2 * _triton.processors_of(states))
        sums = _Sums(job, programs)
        dq, dr = torch.zeros_like(job.q), sums.rows
        _triton.launch(
            triton_kernel.din_backward, (programs,), states,
            job.states, job.q, *layers.of_steps(), *where, dq, dr, *sums.buffers, *job.sizes, layers.width,
            job.hidden, layers.second, programs, **job.options, PADDED=_triton.padded_size(job.hidden),
        )  # fmt: skip
        gradients = _of_layers(job, sums, dq, dr, biases, slopes)
    d_states = by_row
    if shared:
        d_states = torch.zeros_like(job.states)
        ragged = (job.lengths, job.offsets, job.y_start)
        _triton.sum_readers(
            by_row, d_states, cast(Tensor, job.history), job.histories, ragged, job.sizes,
            parts=1, hidden=job.hidden, time_major=False,
        )  # fmt: skip
    dq, *rest = gradients
    return [g.to(t.dtype) for g, t in zip((dq, d_states.view(states.shape), *rest), inputs, strict=True)]


def _of_vectors(job: _Job, weights: list[Tensor], dv: Tensor, d_offset: Tensor | None) -> list[Tensor]:
    """From v's gradient, and the offset's, those of what they are made of: q, the weights, the bias."""
    layers = job.layers
    if d_offset is None:  # bilinear attention has no offset
        return [dv @ weights[0].float(), dv.t() @ job.q] if weights else [dv]  # (A6)
    d_row = d_offset.unsqueeze(1)
    dq = dv * layers.w_p + d_row @ layers.w_row
    return [dq, _first_weights(job, d_row, dv.sum(0, True), (dv * job.q).sum(0, True)), *_bias_gradients(job, [d_row])]


def _first_weights(job: _Job, d_row: Tensor, d_step: Tensor, d_p: Tensor) -> Tensor:
    dw_row = d_row.t() @ job.q
    return torch.cat((dw_row, d_step, dw_row - d_step, d_p), 1)  # (A9)


class _Sums:
    """The partial sums of ``din_backward``'s programs: how many each layer has, and their totals."""

    def __init__(self, job: _Job, programs: int) -> None:
        width, second = job.layers.width, job.layers.second

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=job.states.device)

        self.step = zeros(programs, width, job.hidden)
        self.p = zeros(programs, width, job.hidden)
        self.w_2 = zeros(programs, max(second, 1), width)
        self.first = zeros(programs, 2, width)
        self.second = zeros(programs, 3, max(second, 1))
        self.last_bias = zeros(programs)
        self.rows = zeros(job.batch, width)  # r's gradient, which belongs to rows
        dz_2 = job.states.new_empty(programs, job.launch.steps, max(second, 1))
        self.buffers = (dz_2, self.step, self.p, self.w_2, self.first, self.second, self.last_bias)


def _of_layers(
    job: _Job, sums: _Sums, dq: Tensor, dr: Tensor, biases: list[Tensor], slopes: list[Tensor]
) -> list[Tensor]:
    layers = job.layers
    ds_1, dw_last = sums.first.sum(0)
    db_2, ds_2, dw_last_2 = sums.second.sum(0)
    weights = [_first_weights(job, dr, sums.step.sum(0), sums.p.sum(0))]
    if layers.second:
        weights.append(sums.w_2.sum(0))
        dw_last = dw_last_2
    weights.append(dw_last.unsqueeze(0))
    d_bias = [dr, db_2.unsqueeze(0)] if layers.second else [dr]
    d_slopes = [d.sum(0, True) if s.numel() == 1 else d for d, s in zip((ds_1, ds_2), slopes, strict=False)]
    d_biases = _bias_gradients(job, [*d_bias, sums.last_bias.unsqueeze(1)])
    return [dq + dr @ layers.w_row, *weights, *d_biases, *d_slopes]


def _bias_gradients(job: _Job, by_part: list[Tensor]) -> list[Tensor]:
    """One for each layer's bias, empty where it has none; nothing where no layer has."""
    if not job.layers.given:
        return []
    return [
        part.new_empty(0) if bias is None else part.sum(0)
        for part, bias in zip(by_part, job.layers.biases, strict=True)
    ]  # fmt: skip
