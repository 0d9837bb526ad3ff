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

from dien_kernels.histories import Histories
from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._mlp import ACTIVATIONS
from dien_kernels.ops.attention.contract import Gradients, Inputs, Options, check_index_values

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


class _Problem:
    """The tensors and numbers of one call in the form that the kernels take."""

    def __init__(self, inputs: Inputs, histories: Histories, options: Options) -> None:
        target, states, (weights, biases, slopes) = inputs
        check_index_values(states, histories, options.rows_total)
        self.bilinear = options.bilinear
        self.batch, self.hidden = target.shape[0], states.shape[-1]
        self.histories, self.steps = histories.count(states), histories.steps(states)
        self.y_rows = self.batch * self.steps
        self.shape: tuple[int, ...] = (self.batch, self.steps)
        if histories.jagged:
            self.y_rows = states.shape[0] if histories.history_of is None else options.rows_total
            self.shape = (self.y_rows,)
        self.layout = histories.map(Tensor.contiguous)
        self.all_written = histories.full
        self.states = states.contiguous()
        self.x_rows = states.numel() // self.hidden
        row_lengths = histories.row_lengths() if self.histories else None
        # Offsets that descend, which nobody has read, would let rows start before the scores: ``row_starts`` clamps
        # them.
        shared = histories.jagged and histories.history_of is not None and row_lengths is not None
        self.y_start = histories.row_starts(self.y_rows) if shared else None
        self.q = target.float()
        if row_lengths is not None:  # rows without a step act on nothing
            self.q = torch.where((row_lengths > 0).unsqueeze(1), self.q, 0)
        self.layers = _Layers(self.q, weights, biases, slopes, self.bilinear)
        self.launch = configuration(self.hidden, self.layers.v is not None)
        self.constants = dict(
            SCALE=options.scale, SOFTMAX=options.softmax, H=self.hidden,
            STEPS=self.launch.steps, **_triton.compiler_options(self.launch.warps, self.launch.registers),
        )  # fmt: skip
        if self.layers.v is not None:
            self.constants["PADDED"] = _triton.padded_size(self.hidden)
        else:
            second = self.layers.second
            self.constants |= dict(
                ACTIVATION=ACTIVATIONS[options.activation] or "none", M2=second,
                PADDED_2=_triton.padded_size(max(second, 1)), BLOCK=self.launch.block,
                PRECISION=_triton.precision(states),
            )  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers that say how large the tensors are, by the names of the kernels' parameters."""
        return dict(
            batch=self.batch, histories=self.histories, steps=self.steps, x_rows=self.x_rows, y_rows=self.y_rows
        )  # fmt: skip

    @property
    def rows(self) -> dict[str, Tensor | None]:
        """The tensors that say where a row's steps lie."""
        layout = self.layout
        return dict(
            LENGTHS=layout.lengths, OFFSETS=layout.offsets,
            MASK=None if layout.mask is None else layout.mask.view(torch.uint8),
            HISTORY=layout.history_of, Y_START=self.y_start,
        )  # fmt: skip

    @property
    def empty(self) -> bool:
        """Whether there is no step at all; the kernels would have nothing to point at."""
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

    @property
    def of_steps(self) -> dict[str, Tensor | None]:
        """What the kernels of a network with hidden layers read at every step."""
        return dict(
            R=self.r, W_STEP=self.w_step, W_P=self.w_p, SLOPE_1=self.slope_1, W_2=self.w_2, B_2=self.b_2,
            SLOPE_2=self.slope_2, W_LAST=self.last,
        )  # fmt: skip


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Tensor:
    problem = _Problem(inputs, histories, options)
    scores = problem.new(*problem.shape)
    if problem.empty:
        return scores.zero_()
    from dien_kernels.ops.attention import triton_kernel

    layers = problem.layers
    arguments: dict[str, Any] = {"STATES": problem.states, "SCORES": scores, **problem.rows, **problem.sizes}
    arguments |= problem.constants
    if layers.v is not None:
        kernel = triton_kernel.bilinear_forward
        arguments |= dict(V=layers.v, OFFSET=layers.offset)
    else:
        kernel = triton_kernel.din_forward
        arguments |= dict(Q=problem.q, B_LAST=layers.b_last, width=layers.width, hidden=problem.hidden)
        arguments |= layers.of_steps
    _triton.launch(kernel, (problem.batch,), inputs.states, **arguments)
    return scores


def bwd(dscores: Tensor, inputs: Inputs, histories: Histories, scores: Tensor, options: Options) -> Gradients:
    problem = _Problem(inputs, histories, options)
    if problem.empty:
        return Gradients.like(inputs, lambda t: torch.zeros_like(t, memory_format=torch.contiguous_format))
    from dien_kernels.ops.attention import triton_kernel

    layers, shared = problem.layers, histories.history_of is not None
    by_row = problem.new(problem.y_rows, problem.hidden, dtype=torch.float32 if shared else inputs.states.dtype)
    arguments: dict[str, Any] = {
        "STATES": problem.states, "SCORES": scores, "DSCORES": dscores.contiguous(), "DSTATES": by_row,
        **problem.rows, **problem.sizes, **problem.constants,
    }  # fmt: skip
    if layers.v is not None:
        dv = torch.zeros_like(layers.v)
        d_offset = None if layers.offset is None else torch.empty_like(layers.offset)
        arguments |= dict(V=layers.v, DV=dv, D_OFFSET=d_offset)
        _triton.launch(triton_kernel.bilinear_backward, (problem.batch,), inputs.states, **arguments)
        gradients = _of_vectors(problem, inputs.layers.weights, dv, d_offset)
    else:
        programs = min(problem.batch, 2 * _triton.processors_of(inputs.states))
        sums = _Sums(problem, programs)
        dq = torch.zeros_like(problem.q)
        arguments |= dict(
            Q=problem.q, DQ=dq, DR=sums.rows, width=layers.width, hidden=problem.hidden, second_width=layers.second,
            programs=programs, PADDED=_triton.padded_size(problem.hidden), **layers.of_steps, **sums.buffers,
        )  # fmt: skip
        _triton.launch(triton_kernel.din_backward, (programs,), inputs.states, **arguments)
        gradients = _of_layers(problem, sums, dq, sums.rows, inputs.layers.biases, inputs.layers.slopes)
    d_states = by_row
    if shared:
        d_states = torch.zeros_like(problem.states)
        _triton.sum_rows_of_history(
            by_row, d_states, problem.layout, problem.y_start, problem.sizes,
            parts=1, hidden=problem.hidden, time_major=False,
        )  # fmt: skip
    dq, *rest = gradients
    return Gradients.of(inputs, [dq, d_states.view(inputs.states.shape), *rest])


def _of_vectors(problem: _Problem, weights: list[Tensor], dv: Tensor, d_offset: Tensor | None) -> list[Tensor]:
    """From v's gradient, and the offset's, those of what they are made of: q, the weights, the bias."""
    layers = problem.layers
    if problem.bilinear:
        return [dv @ weights[0].float(), dv.t() @ problem.q] if weights else [dv]  # (A6)
    d_row = cast(Tensor, d_offset).unsqueeze(1)
    dq = dv * layers.w_p + d_row @ layers.w_row
    return [
        dq,
        _first_weights(problem, d_row, dv.sum(0, True), (dv * problem.q).sum(0, True)),
        *_bias_gradients(problem, [d_row]),
    ]


def _first_weights(problem: _Problem, d_row: Tensor, d_step: Tensor, d_p: Tensor) -> Tensor:
    dw_row = d_row.t() @ problem.q
    return torch.cat((dw_row, d_step, dw_row - d_step, d_p), 1)  # (A9)


class _Sums:
    """The partial sums of ``din_backward``'s programs: how many each layer has, and their totals."""

    def __init__(self, problem: _Problem, programs: int) -> None:
        width, second = problem.layers.width, problem.layers.second

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=problem.states.device)

        self.step = zeros(programs, width, problem.hidden)
        self.p = zeros(programs, width, problem.hidden)
        self.w_2 = zeros(programs, max(second, 1), width)
        self.first = zeros(programs, 2, width)
        self.second = zeros(programs, 3, max(second, 1))
        self.last_bias = zeros(programs)
        self.rows = zeros(problem.batch, width)  # r's gradient, which belongs to rows
        dz_2 = problem.states.new_empty(programs, problem.launch.steps, max(second, 1))
        self.buffers = dict(
            DZ_2=dz_2, D_STEP=self.step, D_P=self.p, D_W2=self.w_2, D_FIRST=self.first, D_SECOND=self.second,
            D_LAST_BIAS=self.last_bias,
        )  # fmt: skip


def _of_layers(
    problem: _Problem, sums: _Sums, dq: Tensor, dr: Tensor, biases: list[Tensor], slopes: list[Tensor]
) -> list[Tensor]:
    layers = problem.layers
    ds_1, dw_last = sums.first.sum(0)
    db_2, ds_2, dw_last_2 = sums.second.sum(0)
    weights = [_first_weights(problem, dr, sums.step.sum(0), sums.p.sum(0))]
    if layers.second:
        weights.append(sums.w_2.sum(0))
        dw_last = dw_last_2
    weights.append(dw_last.unsqueeze(0))
    d_bias = [dr, db_2.unsqueeze(0)] if layers.second else [dr]
    d_slopes = [d.sum(0, True) if s.numel() == 1 else d for d, s in zip((ds_1, ds_2), slopes, strict=False)]
    d_biases = _bias_gradients(problem, [*d_bias, sums.last_bias.unsqueeze(1)])
    return [dq + dr @ layers.w_row, *weights, *d_biases, *d_slopes]


def _bias_gradients(problem: _Problem, by_part: list[Tensor]) -> list[Tensor]:
    """One for each layer's bias, empty where it has none; nothing where no layer has."""
    if not problem.layers.given:
        return []
    return [
        part.new_empty(0) if bias is None else part.sum(0)
        for part, bias in zip(by_part, problem.layers.biases, strict=True)
    ]  # fmt: skip
