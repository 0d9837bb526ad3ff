"""The Triton backend's host side: what it refuses, launch configurations, launches; ``gpu_problem`` has the rest."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from dien_kernels.histories import Histories
from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops.recurrence import gpu_problem
from dien_kernels.ops.recurrence.contract import Forward, Inputs
from dien_kernels.ops.recurrence.forms import Options
from dien_kernels.ops.recurrence.gpu_problem import BackwardBuffers, Problem, float32_product

MAX_HIDDEN = 256
STEP_PROGRAMS = 8  # of ``operands`` for each tile of rows


def refuses(call: Call) -> str | None:
    return _triton.refuses(call, MAX_HIDDEN)


class Launch(NamedTuple):
    """How a kernel is compiled and launched for one size."""

    chunk: int  # how much of the summed index of W_hh is read at a time, 0: all of it is kept on chip
    stages: int  # 2: the next step's inputs are on their way during this one
    unroll: int  # steps that share one read of the weights from shared memory to registers
    warps: int
    registers: int | None = None  # for each thread at most; told only where ptxas would take fewer and spill
    rows: int = 16  # of the batch in a program: the least that a matrix instruction takes
    precomputed: bool = False  # backward: the gates' products are made over all steps before the loop
    inputs: int = 0  # forward: W_ih x is made in the loop up to this padded input size
    block: int = 0  # backward: units at a time where a tile of all would leave no registers; then ``precomputed`` holds


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
    128: ((159_872, Launch(0, 2, 1, 8, precomputed=True)), (0, Launch(32, 1, 1, 8, precomputed=True, block=128))),
    256: ((0, Launch(32, 1, 1, 8, precomputed=True, block=128)),),
}
_BACKWARD_32 = {
    16: ((0, Launch(0, 2, 1, 2)),),
    32: ((0, Launch(0, 2, 1, 4)),),
    64: ((151_616, Launch(0, 2, 1, 8, precomputed=True)), (0, Launch(32, 1, 1, 4, 224, precomputed=True, block=64))),
    128: ((0, Launch(32, 1, 1, 8, precomputed=True, block=128)),),
    256: ((0, Launch(32, 1, 1, 8, precomputed=True, block=128)),),
}
# The backward of a size that does not fill its padding, by bytes of an element and padded size, where the weights stay
# on chip: masks take registers, and with the launch above it would spill.
_ODD = {
    (2, 128): Launch(32, 1, 1, 8, precomputed=True, block=128),
    (4, 64): Launch(0, 1, 1, 8, precomputed=True),
}


def configuration(hidden: int, itemsize: int, backward: bool, shared_memory: int) -> Launch:
    """The launch for a hidden size, bytes of an element and bytes of shared memory that a program may have."""
    narrow, wide = (_BACKWARD_16, _BACKWARD_32) if backward else (_FORWARD_16, _FORWARD_32)
    padded = _triton.padded_size(hidden)
    launch = next(launch for needed, launch in (narrow if itemsize == 2 else wide)[padded] if needed <= shared_memory)
    if backward and hidden != padded and not launch.block:
        return _ODD.get((itemsize, padded), launch)
    return launch


class _Problem(Problem):
    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        o = self.options
        return dict(
            ALPHA0=o.alpha0, ALPHA1=o.alpha1, BETA0=o.beta0, BETA1=o.beta1, SCALE_INPUT=o.scale_input,
            KEEP_SIDE=o.keep_side, RESET_BEFORE=o.reset_before, REVERSE=o.reverse, TIME_MAJOR=o.time_major,
            H=self.hidden, PADDED=_triton.padded_size(self.hidden), PRECISION=_triton.precision(self.x),
        )  # fmt: skip

    @property
    def rows(self) -> dict[str, Tensor | None]:
        """The tensors that say where a row's steps lie."""
        layout = self.layout
        return dict(
            ORDER=self.order, LENGTHS=layout.lengths, OFFSETS=layout.offsets, HISTORY=layout.history_of,
            Y_START=self.y_start,
        )  # fmt: skip

    @property
    def recurrent(self) -> dict[str, Tensor | None]:
        """The tensors that every loop reads beside its input."""
        return dict(ATTENTION=self.attention, W_HH=self.w_hh, B_IH=self.b_ih, B_HH=self.b_hh, H0=self.h0)

    def configuration(self, backward: bool) -> Launch:
        return configuration(self.hidden, self.x.itemsize, backward, _triton.shared_memory_of(self.x))

    def projection(self) -> Tensor:
        """W_ih x in float32, as all sums: rounded to 16 bits it would be the attention gradient's largest error."""
        return float32_product(self.x, self.w_ih)


def _compiled(launch: Launch) -> dict[str, Any]:
    return {
        "ROWS": launch.rows, "CHUNK": launch.chunk, "STAGES": launch.stages, "UNROLL": launch.unroll,
        **_triton.compiler_options(launch.warps, launch.registers),
    }  # fmt: skip


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Forward:
    problem = _Problem(inputs, histories, options)
    if problem.empty:
        return gpu_problem.empty_forward(problem)
    from dien_kernels.ops.recurrence.triton_kernel import recurrence_forward

    x, launch = inputs.x, problem.configuration(backward=False)
    y, h_n = problem.new(*problem.y_shape), x.new_empty(problem.batch, problem.hidden)
    padded_input = _triton.padded_size(problem.input)
    fused = padded_input <= launch.inputs and not problem.shared
    _triton.launch(
        recurrence_forward,
        (-(-problem.batch // launch.rows),),
        x,
        X=problem.x.contiguous() if fused else problem.projection(),
        W_IH=problem.w_ih.contiguous() if fused else None,
        Y=y,
        H_N=h_n,
        SCRATCH=x.new_empty(problem.batch, 2 * problem.hidden) if launch.chunk else None,
        hidden=problem.hidden,
        INPUT=problem.input if fused else 1,
        I_PADDED=padded_input if fused else 16,
        **problem.recurrent,
        **problem.rows,
        **problem.sizes,
        **problem.constants,
        **_compiled(launch),
    )
    return Forward(y, h_n, gpu_problem.nothing_kept(problem))


def bwd(dy, dh_n, inputs, histories, y, kept, need_dx, options):  # type: ignore[no-untyped-def]
    problem = _Problem(inputs, histories, options)
    if problem.empty:
        return gpu_problem.empty_backward(problem, dh_n, need_dx)
    launch = problem.configuration(backward=True)
    programs = -(-problem.batch // launch.rows)
    buffers = BackwardBuffers.allocate(problem, programs, problem.hidden)
    columns, projection = buffers.columns, problem.projection()
    products: tuple[Tensor | None, Tensor | None] = (None, None)
    if launch.precomputed:
        products = _precomputed_products(problem, projection, y, buffers.states)
    arguments: dict[str, Any] = dict(
        PROJECTION=projection, Y=y, DY=None if dy is None else dy.contiguous(),
        DH_N=None if dh_n is None else dh_n.contiguous(), PRODUCTS_RU=products[0], PRODUCTS_N=products[1],
        GATES=buffers.gates, D_ATTENTION=buffers.d_attention, D_BIAS=buffers.d_bias, DH0=buffers.dh0,
        GATE_WIDTH=columns.width, DGX=columns.dgx, DGH_R=columns.dgh_r, DGH_U=columns.dgh_u, DGH_N=columns.dgh_n,
        **problem.recurrent, **problem.rows, **problem.sizes,
    )  # fmt: skip
    constants, compiled = problem.constants, _compiled(launch)
    unused: tuple[str, ...] = ("CHUNK",)
    if launch.block:
        from dien_kernels.ops.recurrence.triton_kernel_wide import recurrence_backward_wide

        kernel, unused = recurrence_backward_wide, ("STAGES", "UNROLL", "PADDED")
        arguments |= dict(hidden=problem.hidden, BLOCK=launch.block)
    else:
        from dien_kernels.ops.recurrence.triton_kernel_backward import recurrence_backward

        kernel = recurrence_backward
        arguments |= dict(STATES=buffers.states)
    arguments |= {name: value for name, value in (constants | compiled).items() if name not in unused}
    _triton.launch(kernel, (programs,), inputs.x, **arguments)
    return gpu_problem.gradients(problem, buffers, need_dx, lambda by_row: _sum_rows(problem, by_row))


def _sum_rows(problem: _Problem, by_row: Tensor) -> Tensor:
    total = problem.w_hh.new_zeros(problem.x_rows, 3 * problem.hidden)
    _triton.sum_rows_of_history(
        by_row, total, problem.layout, problem.y_start, problem.sizes,
        parts=3, hidden=problem.hidden, time_major=problem.options.time_major,
    )  # fmt: skip
    return total


def _precomputed_products(problem: _Problem, projection: Tensor, y: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The gates' products with W_hh over all steps, of r with u and of n; ``states`` is filled on the way."""
    from dien_kernels.ops.recurrence.triton_kernel_backward import operands

    hidden, rows = problem.hidden, 16
    names = ("SCALE_INPUT", "REVERSE", "TIME_MAJOR", "H", "PADDED")
    constants = {name: problem.constants[name] for name in names}
    recurrent = {name: value for name, value in problem.recurrent.items() if name != "W_HH"}

    def fill(products_ru: Tensor | None) -> None:
        _triton.launch(
            operands,
            (-(-problem.batch // rows), STEP_PROGRAMS),
            y,
            PROJECTION=projection,
            Y=y,
            PRODUCTS_RU=products_ru,
            STATES=states,
            ROWS=rows,
            STATE_WIDTH=states.stride(0),
            **recurrent,
            **problem.rows,
            **problem.sizes,
            **constants,
            **_triton.compiler_options(8 if hidden > 128 else 4, 128),
        )

    fill(None)
    if not problem.options.reset_before:
        products = float32_product(states, problem.w_hh)
        return products, products
    products_ru = float32_product(states[:, :hidden], problem.w_hh[: 2 * hidden])
    fill(products_ru)
    return products_ru, float32_product(states[:, hidden:], problem.w_hh[2 * hidden :])
