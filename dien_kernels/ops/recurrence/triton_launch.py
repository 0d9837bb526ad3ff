"""The Triton backend's host side: what it refuses, launch configurations, and the products around the time loop.

W_ih x is one product for all steps, once for each history; the loop leaves gate gradients, and dx, dW_ih and dW_hh are
products over them. Nothing here waits for the device or depends on the values of an index tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._layout import Ragged, check_values

MAX_HIDDEN = 256
COUNTED_ROWS = 16_384  # their order is counted in one launch, B * B comparisons; above, sorting is less work
STEP_PROGRAMS = 8  # of ``operands`` for each tile of rows


def refuses(call: Call) -> str | None:
    return _triton.refuses(call, MAX_HIDDEN)


class Launch(NamedTuple):
    """How a kernel is compiled and launched for one size."""

    chunk: int  # rows of W_hh read at a time, 0: all are kept on chip
    stages: int  # 2: the next step's inputs are on their way during this one
    unroll: int  # steps that share one read of the weights from shared memory to registers
    warps: int
    registers: int | None = None  # for each thread at most; told only where ptxas would take fewer and spill
    rows: int = 16  # of the batch in a program: the least that a matrix instruction takes
    made: bool = False  # backward: the gates' products are made over all steps before the loop
    inputs: int = 0  # forward: W_ih x is made in the loop up to this padded input size
    block: int = 0  # backward: units at a time where a tile of all would leave no registers; then ``made`` holds


# By padded hidden size and bits of storage: chosen by compiled instructions, spills and barriers, not yet by time
# (benchmarks/results/gpu_triton.csv). The number is the shared memory a launch takes; the next serves smaller devices.
_FORWARD_16 = {
    16: ((0, Launch(0, 2, 4, 2, 168, inputs=64)),),
    32: ((0, Launch(0, 2, 4, 4, 168, inputs=64)),),
    64: ((0, Launch(0, 2, 4, 8, 168, inputs=64)),),
    128: ((127_040, Launch(0, 2, 1, 8)), (0, Launch(32, 1, 1, 8, 192))),
    256: ((0, Launch(32, 1, 1, 8)),),
}
_FORWARD_32 = {
    16: ((0, Launch(0, 2, 4, 2, 224)),),
    32: ((0, Launch(0, 2, 4, 4)),),
    64: ((131_200, Launch(0, 2, 2, 8)), (0, Launch(16, 1, 1, 8))),  # TF32x3 keeps each weight in two parts
    128: ((0, Launch(16, 1, 1, 8)),),
    256: ((0, Launch(16, 1, 1, 8)),),
}
_BACKWARD_16 = {
    16: ((0, Launch(0, 2, 1, 2, 224)),),
    32: ((0, Launch(0, 2, 1, 4, 168)),),
    64: ((0, Launch(0, 2, 1, 8, 168)),),
    128: ((159_872, Launch(0, 2, 1, 8, made=True)), (0, Launch(32, 1, 1, 8, made=True, block=128))),
    256: ((0, Launch(32, 1, 1, 8, made=True, block=128)),),
}
_BACKWARD_32 = {
    16: ((0, Launch(0, 2, 1, 2)),),
    32: ((0, Launch(0, 2, 1, 4)),),
    64: ((151_616, Launch(0, 2, 1, 8, made=True)), (0, Launch(32, 1, 1, 4, made=True, block=64))),
    128: ((0, Launch(32, 1, 1, 8, made=True, block=128)),),
    256: ((0, Launch(32, 1, 1, 8, made=True, block=128)),),
}


def configuration(hidden: int, itemsize: int, backward: bool, shared_memory: int) -> Launch:
    """The launch for a hidden size, bytes of an element and bytes of shared memory that a program may have."""
    narrow, wide = (_BACKWARD_16, _BACKWARD_32) if backward else (_FORWARD_16, _FORWARD_32)
    rows = (narrow if itemsize == 2 else wide)[_triton.padded_size(hidden)]
    return next(launch for needed, launch in rows if needed <= shared_memory)


class Gates(NamedTuple):
    """Columns of a step's gate gradients: dgx and dgh share what they have in common (16)."""

    width: int
    dgx: int  # r, u, n from here on, times gamma
    dgh_r: int
    dgh_u: int
    dgh_n: int


def _gates(hidden: int, scale_input: bool, reset_before: bool) -> Gates:
    if scale_input:
        return Gates(6 * hidden, 3 * hidden, 0, hidden, 2 * hidden)
    if reset_before:
        return Gates(3 * hidden, 0, 0, hidden, 2 * hidden)
    return Gates(4 * hidden, hidden, hidden, 2 * hidden, 0)


class _Job:
    """A call's tensors and numbers in the form the kernels want."""

    def __init__(
        self, x: Tensor, attention: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
        h0: Tensor | None, ragged: Ragged, options: tuple[Any, ...],
    ) -> None:  # fmt: skip
        *coefficients, scale_input, keep_side, reset_before, reverse, time_major, _ = options
        self.scale_input, self.reset_before, self.time_major = scale_input, reset_before, time_major
        self.hidden, self.input = w_hh.shape[1], x.shape[-1]
        self.jagged = ragged.offsets is not None
        if self.jagged:
            check_values(ragged, None, x.shape[0], None if attention is None else attention.shape[0])
            assert ragged.offsets is not None
            self.steps, self.histories = 0, ragged.offsets.shape[0] - 1
        else:
            self.steps, self.histories = x.shape[:2] if time_major else (x.shape[1], x.shape[0])
            check_values(ragged, self.steps, self.histories, None)
        self.shared = ragged.history is not None
        self.batch = self.histories if ragged.history is None else ragged.history.shape[0]
        self.x_rows = x.numel() // self.input
        self.y_rows = self.batch * self.steps
        self.y_shape: tuple[int, ...] = (self.batch, self.steps, self.hidden)
        if time_major:
            self.y_shape = (self.steps, self.batch, self.hidden)
        if self.jagged:
            self.y_rows = self.x_rows if attention is None else attention.shape[0]
            self.y_shape = (self.y_rows, self.hidden)
        # Where rows may end early, what lies past them is zeros that the kernels do not write.
        self.all_written = ragged.lengths is None and not self.jagged
        self.lengths, self.offsets, self.history = (None if t is None else t.contiguous() for t in ragged)
        self.row_lengths, self.y_start = self._row_lengths()
        self.x, self.w_ih, self.w_hh = x.reshape(-1, self.input), w_ih, w_hh.contiguous()
        self.attention, self.b_ih, self.b_hh, self.h0 = (
            None if t is None else t.contiguous() for t in (attention, b_ih, b_hh, h0)
        )
        self.sizes = (self.batch, self.histories, self.steps, self.x_rows, self.y_rows)
        self.options = dict(
            zip(("ALPHA0", "ALPHA1", "BETA0", "BETA1"), coefficients, strict=True),
            SCALE_INPUT=scale_input, KEEP_SIDE=keep_side, RESET_BEFORE=reset_before, REVERSE=reverse,
            TIME_MAJOR=time_major, H=self.hidden, PADDED=_triton.padded_size(self.hidden),
            PRECISION=_triton.precision(x),
        )  # fmt: skip

    def _row_lengths(self) -> tuple[Tensor | None, Tensor | None]:
        """Each row's length where rows differ, and its start in y where that is not its start in x."""
        length = self.lengths
        if self.offsets is not None:
            length = self.offsets.diff()
        if length is None or self.history is None or self.histories == 0:
            return length, None
        length = length[self.history.clamp(0, self.histories - 1)]
        return length, length.cumsum(0) - length if self.jagged else None

    @property
    def nothing(self) -> bool:
        """No step at all; the kernels would have nothing to point at."""
        return self.batch == 0 or self.x_rows == 0

    def order(self) -> Tensor:
        """Rows from the longest to the shortest, so that those of a program end together; empty: as they are."""
        if self.row_lengths is None or self.nothing:
            return self.w_hh.new_empty((0,), dtype=torch.int64)
        if self.batch > COUNTED_ROWS:
            return self.row_lengths.argsort(descending=True, stable=True)
        from dien_kernels.ops.recurrence.triton_kernel import length_order

        order = torch.empty_like(self.row_lengths)
        _triton.launch(
            length_order, (-(-self.batch // 32),), order, self.row_lengths, order, self.batch,
            ROWS=32, BLOCK=128, **_triton.compiler_options(4),
        )  # fmt: skip
        return order

    def rows(self, order: Tensor) -> tuple[Tensor | None, ...]:
        """The tensors that say where a row's steps lie, in the kernels' order."""
        return order if order.numel() else None, self.lengths, self.offsets, self.history, self.y_start

    def new(self, *shape: int) -> Tensor:
        """One row for each step of y, zeros where the kernels write only the steps that exist."""
        return self.w_hh.new_empty(shape) if self.all_written else self.w_hh.new_zeros(shape)

    def configuration(self, backward: bool) -> Launch:
        return configuration(self.hidden, self.x.itemsize, backward, _triton.shared_memory_of(self.x))

    def projection(self) -> Tensor:
        """W_ih x in float32, as all sums: rounded to 16 bits it would be the attention gradient's largest error."""
        return _triton.float32_product(self.x, self.w_ih)

    def real_x(self) -> Tensor:
        """x with zeros in steps that no row takes: NaN there would reach dW_ih, as 0 times NaN."""
        if self.lengths is None and self.history is None:
            return self.x
        device = self.x.device
        read = torch.ones(self.histories, dtype=torch.bool, device=device)
        if self.history is not None:
            read = torch.zeros_like(read).index_fill(0, self.history.clamp(0, self.histories - 1), True)
        if self.offsets is not None:
            step = torch.arange(self.x_rows, device=device)
            valid = read[torch.searchsorted(self.offsets[1:], step, right=True).clamp(max=self.histories - 1)]
        else:
            lengths = read * self.steps if self.lengths is None else self.lengths * read
            valid = torch.arange(self.steps, device=device) < lengths.unsqueeze(1)
            valid = valid.t() if self.time_major else valid
        return torch.where(valid.reshape(-1, 1), self.x, 0)


def _compiled(launch: Launch) -> dict[str, Any]:
    return {
        "ROWS": launch.rows, "CHUNK": launch.chunk, "STAGES": launch.stages, "UNROLL": launch.unroll,
        **_triton.compiler_options(launch.warps, launch.registers),
    }  # fmt: skip


def fwd(x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, *options):  # type: ignore[no-untyped-def]
    job = _Job(x, attention, w_ih, w_hh, b_ih, b_hh, h0, Ragged(lengths, offsets, history), options)
    y = job.new(*job.y_shape)
    order = job.order()
    if job.nothing:
        h_n = w_hh.new_zeros(job.batch, job.hidden) if h0 is None else h0.to(x.dtype, copy=True).contiguous()
        return y.zero_(), h_n, order
    from dien_kernels.ops.recurrence.triton_kernel import recurrence_forward

    launch = job.configuration(backward=False)
    h_n = x.new_empty(job.batch, job.hidden)
    inputs = _triton.padded_size(job.input)
    fused = inputs <= launch.inputs and not job.shared
    _triton.launch(
        recurrence_forward, (-(-job.batch // launch.rows),), x,
        job.x.contiguous() if fused else job.projection(), job.attention, job.w_ih.contiguous() if fused else None,
        job.w_hh, job.b_ih, job.b_hh, job.h0, *job.rows(order), y, h_n,
        x.new_empty(job.batch, 2 * job.hidden) if launch.chunk else None,
        *job.sizes, job.hidden, **job.options, **_compiled(launch),
        INPUT=job.input if fused else 1, I_PADDED=inputs if fused else 16,
    )  # fmt: skip
    return y, h_n, order


def bwd(dy, dh_n, x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, y, order, need_dx, *options):  # type: ignore[no-untyped-def]
    job = _Job(x, attention, w_ih, w_hh, b_ih, b_hh, h0, Ragged(lengths, offsets, history), options)
    hidden = job.hidden
    small = {"dtype": torch.float32, "device": x.device}
    d_attention = None if attention is None else torch.zeros(attention.shape, **small)
    if job.nothing:
        dh0 = torch.zeros(job.batch, hidden, **small)
        if dh_n is not None:
            dh0.copy_(dh_n)
        d_bias = torch.zeros(2, 3 * hidden, **small)
        dx = x.new_zeros(x.shape if need_dx else (0,))
        dw_ih, dw_hh = w_ih.new_zeros(w_ih.shape), w_hh.new_zeros(w_hh.shape)
        return dx, _or_empty(d_attention, x), dw_ih, dw_hh, d_bias[0].clone(), d_bias[1].clone(), dh0
    launch = job.configuration(backward=True)
    programs = -(-job.batch // launch.rows)
    columns = _gates(hidden, job.scale_input, job.reset_before)
    gates = job.new(job.y_rows, columns.width)
    states = job.new(job.y_rows, (1 + job.reset_before) * hidden)
    d_bias = torch.zeros(programs, 4, hidden, **small)
    dh0 = torch.empty(job.batch, hidden, **small)
    projection = job.projection()
    made = _made(job, projection, order, y, states) if launch.made else (None, None)
    before = (
        projection, job.attention, job.w_hh, job.b_ih, job.b_hh, job.h0, *job.rows(order), y,
        None if dy is None else dy.contiguous(), None if dh_n is None else dh_n.contiguous(), *made, gates,
    )  # fmt: skip
    how: dict[str, Any] = _compiled(launch) | {
        "GATE_WIDTH": columns.width, "DGX": columns.dgx, "DGH_R": columns.dgh_r, "DGH_U": columns.dgh_u,
        "DGH_N": columns.dgh_n,
    }  # fmt: skip
    if launch.block:
        from dien_kernels.ops.recurrence.triton_kernel_wide import recurrence_backward_wide

        for name in ("STAGES", "UNROLL"):
            del how[name]
        whole = {name: value for name, value in job.options.items() if name != "PADDED"}
        _triton.launch(
            recurrence_backward_wide, (programs,), x, *before, d_attention, d_bias, dh0, *job.sizes, hidden,
            **whole, **how, BLOCK=launch.block,
        )  # fmt: skip
    else:
        from dien_kernels.ops.recurrence.triton_kernel_backward import recurrence_backward

        del how["CHUNK"]
        _triton.launch(
            recurrence_backward, (programs,), x, *before, states, d_attention, d_bias, dh0, *job.sizes,
            **job.options, **how,
        )  # fmt: skip
    db_r, db_u, db_n, db_hn = d_bias.sum(0)
    dgx = gates[:, columns.dgx : columns.dgx + 3 * hidden]
    if job.shared:
        by_row, dgx = dgx, w_hh.new_zeros(job.x_rows, 3 * hidden)
        assert job.history is not None
        ragged = (job.lengths, job.offsets, job.y_start)
        _triton.sum_readers(
            by_row, dgx, job.history, job.histories, ragged, job.sizes,
            parts=3, hidden=hidden, time_major=job.time_major,
        )  # fmt: skip
    dx = (dgx @ w_ih).view(x.shape) if need_dx else x.new_empty(0)
    return (
        dx,
        _or_empty(d_attention, x),
        dgx.t() @ job.real_x(),
        _dw_hh(job, gates, states, columns),
        torch.cat((db_r, db_u, db_n)),
        torch.cat((db_r, db_u, db_n if job.reset_before else db_hn)),
        dh0,
    )


def _made(job: _Job, projection: Tensor, order: Tensor, y: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The gates' products with W_hh over all steps, of r with u and of n; ``states`` is filled on the way."""
    from dien_kernels.ops.recurrence.triton_kernel_backward import operands

    hidden, rows = job.hidden, 16
    names = ("SCALE_INPUT", "REVERSE", "TIME_MAJOR", "H", "PADDED")
    options = {name: job.options[name] for name in names}

    def fill(made_ru: Tensor | None) -> None:
        _triton.launch(
            operands, (-(-job.batch // rows), STEP_PROGRAMS), y,
            projection, job.attention, job.b_ih, job.b_hh, job.h0, *job.rows(order), y, made_ru, states, *job.sizes,
            **options, ROWS=rows, STATE_WIDTH=states.stride(0),
            **_triton.compiler_options(8 if hidden > 128 else 4, 128),
        )  # fmt: skip

    fill(None)
    if not job.reset_before:
        made = _triton.float32_product(states, job.w_hh)
        return made, made
    made_ru = _triton.float32_product(states[:, :hidden], job.w_hh[: 2 * hidden])
    fill(made_ru)
    return made_ru, _triton.float32_product(states[:, hidden:], job.w_hh[2 * hidden :])


def _or_empty(gradient: Tensor | None, x: Tensor) -> Tensor:
    """A raw op returns tensors only."""
    return x.new_empty(0) if gradient is None else gradient


def _dw_hh(job: _Job, gates: Tensor, states: Tensor, columns: Gates) -> Tensor:
    """(18): W_n has read h, or q with the reset before the product."""
    hidden = job.hidden
    dgh = gates[:, : 3 * hidden].t()
    if job.reset_before:
        dru = dgh[: 2 * hidden] @ states[:, :hidden]
        return torch.cat((dru, dgh[2 * hidden :] @ states[:, hidden:]))
    return (dgh @ states).roll(-hidden if columns.dgh_n == 0 else 0, 0)
