"""The Triton backend's host side: what it refuses, launch configurations, launches; ``loop_job`` has the rest."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._layout import Ragged
from dien_kernels.ops.recurrence import loop_job

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
    32: ((0, Launch(0, 2, 4, 4, 224)),),
    64: ((131_200, Launch(0, 2, 2, 8)), (0, Launch(16, 1, 1, 8))),  # TF32x3 keeps each weight in two parts
    128: ((0, Launch(16, 1, 1, 8, 224)),),
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
    64: ((151_616, Launch(0, 2, 1, 8, made=True)), (0, Launch(32, 1, 1, 4, 224, made=True, block=64))),
    128: ((0, Launch(32, 1, 1, 8, made=True, block=128)),),
    256: ((0, Launch(32, 1, 1, 8, made=True, block=128)),),
}
# The backward of a size that does not fill its padding, by bytes of an element and padded size, where the weights stay
# on chip: masks take registers, and with the launch above it would spill.
_ODD = {
    (2, 128): Launch(32, 1, 1, 8, made=True, block=128),
    (4, 64): Launch(0, 1, 1, 8, made=True),
}


def configuration(hidden: int, itemsize: int, backward: bool, shared_memory: int) -> Launch:
    """The launch for a hidden size, bytes of an element and bytes of shared memory that a program may have."""
    narrow, wide = (_BACKWARD_16, _BACKWARD_32) if backward else (_FORWARD_16, _FORWARD_32)
    padded = _triton.padded_size(hidden)
    launch = next(launch for needed, launch in (narrow if itemsize == 2 else wide)[padded] if needed <= shared_memory)
    if backward and hidden != padded and not launch.block:
        return _ODD.get((itemsize, padded), launch)
    return launch


def counted_order(lengths: Tensor) -> Tensor:
    """The order of a stable descending sort of int64 ``lengths``, in one launch."""
    from dien_kernels.ops.recurrence.triton_kernel import length_order

    order, batch = torch.empty_like(lengths), lengths.numel()
    _triton.launch(
        length_order, (-(-batch // 32),), order, lengths, order, batch, ROWS=32, BLOCK=128,
        **_triton.compiler_options(4),
    )  # fmt: skip
    return order


class _Job(loop_job.Job):
    @property
    def options(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return dict(
            ALPHA0=self.alpha0, ALPHA1=self.alpha1, BETA0=self.beta0, BETA1=self.beta1, SCALE_INPUT=self.scale_input,
            KEEP_SIDE=self.keep_side, RESET_BEFORE=self.reset_before, REVERSE=self.reverse, TIME_MAJOR=self.time_major,
            H=self.hidden, PADDED=_triton.padded_size(self.hidden), PRECISION=_triton.precision(self.x),
        )  # fmt: skip

    def order(self) -> Tensor:
        """Rows from the longest to the shortest, so that those of a program end together; empty: as they are."""
        if self.row_lengths is None or self.nothing or self.batch > COUNTED_ROWS:
            return super().order()
        return counted_order(self.row_lengths)

    def configuration(self, backward: bool) -> Launch:
        return configuration(self.hidden, self.x.itemsize, backward, _triton.shared_memory_of(self.x))

    def projection(self) -> Tensor:
        """W_ih x in float32, as all sums: rounded to 16 bits it would be the attention gradient's largest error."""
        return loop_job.float32_product(self.x, self.w_ih)


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
        return *loop_job.forward_of_nothing(job, y), order
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
    if job.nothing:
        return loop_job.backward_of_nothing(job, dh_n, need_dx)
    launch = job.configuration(backward=True)
    programs = -(-job.batch // launch.rows)
    left = loop_job.left(job, programs, job.hidden)
    columns = left.columns
    projection = job.projection()
    made = _made(job, projection, order, y, left.states) if launch.made else (None, None)
    before = (
        projection, job.attention, job.w_hh, job.b_ih, job.b_hh, job.h0, *job.rows(order), y,
        None if dy is None else dy.contiguous(), None if dh_n is None else dh_n.contiguous(), *made, left.gates,
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
            recurrence_backward_wide, (programs,), x, *before, left.d_attention, left.d_bias, left.dh0, *job.sizes,
            job.hidden,
            **whole, **how, BLOCK=launch.block,
        )  # fmt: skip
    else:
        from dien_kernels.ops.recurrence.triton_kernel_backward import recurrence_backward

        del how["CHUNK"]
        _triton.launch(
            recurrence_backward, (programs,), x, *before, left.states, left.d_attention, left.d_bias, left.dh0,
            *job.sizes, **job.options, **how,
        )  # fmt: skip
    return loop_job.gradients(job, left, need_dx, lambda by_row: _sum_readers(job, by_row))


def _sum_readers(job: _Job, by_row: Tensor) -> Tensor:
    """Of a job with shared histories: each history's sum over the rows that read it."""
    total = job.w_hh.new_zeros(job.x_rows, 3 * job.hidden)
    ragged = (job.lengths, job.offsets, job.y_start)
    _triton.sum_readers(
        by_row, total, cast(Tensor, job.history), job.histories, ragged, job.sizes,
        parts=3, hidden=job.hidden, time_major=job.time_major,
    )  # fmt: skip
    return total


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
        made = loop_job.float32_product(states, job.w_hh)
        return made, made
    made_ru = loop_job.float32_product(states[:, :hidden], job.w_hh[: 2 * hidden])
    fill(made_ru)
    return made_ru, loop_job.float32_product(states[:, hidden:], job.w_hh[2 * hidden :])
