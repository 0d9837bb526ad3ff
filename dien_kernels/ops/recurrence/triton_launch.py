"""The Triton backend's host side: what it refuses, launch configurations, launches; ``loop_job`` has the rest."""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._layout import Ragged
from dien_kernels.ops.recurrence import loop_job
from dien_kernels.ops.recurrence.loop_job import Job

MAX_HIDDEN = 256
# Facts of the process, read once: Dynamo traces ``refuses``. Found, not imported: importing Triton looks for drivers.
_ABSENT = importlib.util.find_spec("triton") is None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuses(call: Call) -> str | None:
    if _ABSENT:
        return "triton is not installed (pip install 'dien_kernels[triton]')"
    if call.device != "cuda" and not (_INTERPRETED and call.device == "cpu"):
        return f"the tensors are on {call.device}; Triton needs cuda, or TRITON_INTERPRET=1 for its interpreter"
    if call.dtype == torch.float64:
        return "float64 is not among the Triton kernels' dtypes (float32, bfloat16, float16)"
    if call.hidden_size > MAX_HIDDEN:
        return f"hidden={call.hidden_size} is above the {MAX_HIDDEN} of the Triton kernels"
    return None


class Launch(NamedTuple):
    """How a kernel is compiled and launched for one size."""

    chunk: int  # rows of W_hh read at a time, 0: all are kept on chip
    stages: int  # 2: the next step's inputs are on their way during this one
    unroll: int  # steps that share one read of the weights from shared memory to registers
    warps: int
    registers: int | None = None  # for each thread at most; told only where ptxas would take fewer and spill
    rows: int = 16  # of the batch in a program: the least that a matrix instruction takes


# By padded hidden size and bits of storage: chosen by compiled instructions, spills and barriers, not yet by time
# (benchmarks/results/gpu_triton.csv). The number is the shared memory a launch takes; the next serves smaller devices.
_FORWARD_16 = {
    16: ((0, Launch(0, 2, 4, 2, 168)),),
    32: ((0, Launch(0, 2, 4, 4, 168)),),
    64: ((0, Launch(0, 2, 4, 8, 168)),),
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
    128: ((0, Launch(32, 1, 1, 8)),),
    256: ((0, Launch(16, 1, 1, 8)),),
}
_BACKWARD_32 = {
    16: ((0, Launch(0, 2, 1, 2)),),
    32: ((0, Launch(0, 2, 1, 4)),),
    64: ((204_800, Launch(0, 1, 1, 8)), (0, Launch(16, 1, 1, 8))),
    128: ((0, Launch(16, 1, 1, 8)),),
    256: ((0, Launch(8, 1, 1, 8)),),
}


def configuration(hidden: int, itemsize: int, backward: bool, shared_memory: int) -> Launch:
    """The launch for a hidden size, bytes of an element and bytes of shared memory that a program may have."""
    narrow, wide = (_BACKWARD_16, _BACKWARD_32) if backward else (_FORWARD_16, _FORWARD_32)
    rows = (narrow if itemsize == 2 else wide)[padded_size(hidden)]
    return next(launch for needed, launch in rows if needed <= shared_memory)


def shared_memory_of(x: Tensor) -> int:
    """Bytes of shared memory that one program may have; none is promised to the interpreter's."""
    if not x.is_cuda:
        return 0
    device = torch.cuda.get_device_properties(x.device)
    return int(getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block))


def padded_size(hidden: int) -> int:
    """Triton's sizes are powers of two, and its matrix products want 16 of everything."""
    return max(16, 1 << (hidden - 1).bit_length())


def _options(job: Job) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return dict(
        ALPHA0=job.alpha0, ALPHA1=job.alpha1, BETA0=job.beta0, BETA1=job.beta1, SCALE_INPUT=job.scale_input,
        KEEP_SIDE=job.keep_side, RESET_BEFORE=job.reset_before, REVERSE=job.reverse, TIME_MAJOR=job.time_major,
        H=job.hidden, PADDED=padded_size(job.hidden), PRECISION=_precision(job.x),
    )  # fmt: skip


def _precision(x: Tensor) -> str:
    """How products of float32 are made: to float32's accuracy, unless the user has allowed TF32."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **options: Any) -> None:
    """Every launch goes through here; a test that compiles or simulates the kernels takes its place."""
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[grid](*arguments, **options)


def _compiled(launch: Launch) -> dict[str, Any]:
    options = {
        "ROWS": launch.rows, "CHUNK": launch.chunk, "STAGES": launch.stages, "UNROLL": launch.unroll,
        "num_warps": launch.warps, "enable_fp_fusion": True,
    }  # fmt: skip
    if launch.registers is not None and torch.version.hip is None:
        options["maxnreg"] = launch.registers
    return options


def fwd(x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, *options):  # type: ignore[no-untyped-def]
    job = Job(x, attention, w_ih, w_hh, b_ih, b_hh, h0, Ragged(lengths, offsets, history), options)
    y = job.new(*job.y_shape)
    order = job.order()
    if job.nothing:
        return *loop_job.forward_of_nothing(job, y), order
    from dien_kernels.ops.recurrence.triton_kernel import recurrence_forward

    launch = configuration(job.hidden, x.itemsize, backward=False, shared_memory=shared_memory_of(x))
    h_n = x.new_empty(job.batch, job.hidden)
    _launch(
        recurrence_forward, (-(-job.batch // launch.rows),), x,
        loop_job.projection(job, job.w_ih), job.attention, job.w_hh, job.b_ih, job.b_hh, job.h0,
        *job.rows(order), y, h_n,
        x.new_empty(job.batch, 2 * job.hidden) if launch.chunk else None,
        *job.sizes, job.hidden, **_options(job), **_compiled(launch),
    )  # fmt: skip
    return y, h_n, order


def bwd(dy, dh_n, x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, y, order, need_dx, *options):  # type: ignore[no-untyped-def]
    job = Job(x, attention, w_ih, w_hh, b_ih, b_hh, h0, Ragged(lengths, offsets, history), options)
    if job.nothing:
        return loop_job.backward_of_nothing(job, dh_n, need_dx)
    from dien_kernels.ops.recurrence.triton_kernel_backward import recurrence_backward

    launch = configuration(job.hidden, x.itemsize, backward=True, shared_memory=shared_memory_of(x))
    programs = -(-job.batch // launch.rows)
    left = loop_job.left(job, programs, job.hidden)
    columns = left.columns
    _launch(
        recurrence_backward, (programs,), x,
        loop_job.projection(job, job.w_ih), job.attention, job.w_hh, job.b_ih, job.b_hh, job.h0, *job.rows(order), y,
        None if dy is None else dy.contiguous(), None if dh_n is None else dh_n.contiguous(),
        left.gates, left.states, left.d_attention, left.d_bias, left.dh0,
        *job.sizes, job.hidden, **_options(job), **_compiled(launch),
        GATE_WIDTH=columns.width, DGX=columns.dgx, DGH_R=columns.dgh_r, DGH_U=columns.dgh_u, DGH_N=columns.dgh_n,
    )  # fmt: skip
    return loop_job.gradients(job, left, need_dx, lambda dgx: _sum_readers(job, dgx))


def _sum_readers(job: Job, dgx_rows: Tensor) -> Tensor:
    from dien_kernels.ops.recurrence.triton_kernel_backward import sum_readers

    readers = loop_job.readers_of(job)
    dgx = job.w_hh.new_zeros(job.x_rows, 3 * job.hidden)
    _launch(
        sum_readers, (job.histories, 3), dgx,
        dgx_rows, dgx, *readers, job.lengths, job.offsets, job.y_start, *job.sizes,
        TIME_MAJOR=job.time_major, H=job.hidden, PADDED=padded_size(job.hidden), GATE_WIDTH=dgx_rows.stride(0),
        STEPS=16, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return dgx
