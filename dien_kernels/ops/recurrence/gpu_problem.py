"""Host code that the GPU backends share: what is done before and after a kernel that runs the whole time loop.

Before the kernel, index values are checked, and W_ih x is computed as one product for all steps of each history, unless
the kernel computes it. The backward kernel writes the gradients of the gates; dx, dW_ih and dW_hh are products of
these. Nothing here waits for the device or depends on the values of an index tensor. Equation numbers are those of
docs/math.md.

Room card. Lives here: ``Problem`` and ``BackwardBuffers``. May import: torch, ``histories``, ``contract``, ``forms``.
Must not be here: launches, and what one backend alone needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dien_kernels.histories import Histories
from dien_kernels.ops.recurrence.contract import Forward, Gradients, Inputs
from dien_kernels.ops.recurrence.forms import Options, check_index_values


class Gates(NamedTuple):
    """The columns of a step's gate gradients, in one buffer: dgx and dgh share what they have in common (16)."""

    width: int
    dgx: int  # r, u and n from this column on, times gamma
    dgh_r: int
    dgh_u: int
    dgh_n: int


def gates_of(hidden: int, scale_input: bool, reset_before: bool) -> Gates:
    if scale_input:
        return Gates(6 * hidden, 3 * hidden, 0, hidden, 2 * hidden)
    if reset_before:
        return Gates(3 * hidden, 0, 0, hidden, 2 * hidden)
    return Gates(4 * hidden, hidden, hidden, 2 * hidden, 0)


class Problem:
    """The tensors and numbers of one call in the form that the kernels take."""

    def __init__(self, inputs: Inputs, histories: Histories, options: Options) -> None:
        x, attention, w_ih, w_hh, b_ih, b_hh, h0 = inputs
        check_index_values(x, attention, histories, time_major=options.time_major)
        self.options = options
        self.hidden, self.input = w_hh.shape[1], x.shape[-1]
        self.jagged, self.shared = histories.jagged, histories.history_of is not None
        self.steps = histories.steps(x, options.time_major)
        self.histories, self.batch = histories.count(x, options.time_major), histories.rows(x, options.time_major)
        self.x_rows = x.numel() // self.input
        self.y_rows = self.batch * self.steps
        self.y_shape: tuple[int, ...] = (self.batch, self.steps, self.hidden)
        if options.time_major:
            self.y_shape = (self.steps, self.batch, self.hidden)
        if self.jagged:
            self.y_rows = self.x_rows if attention is None else attention.shape[0]
            self.y_shape = (self.y_rows, self.hidden)
        # Where rows may end early, the kernels do not write past their ends: those steps have to be zeros before.
        self.all_written = histories.full
        self.layout = histories.map(Tensor.contiguous)
        self.order = histories.order()
        self.row_lengths = histories.row_lengths()
        # Descending offsets, which are not checked on a GPU, would let rows start before y: ``row_starts`` clamps them.
        self.y_start = histories.row_starts(self.y_rows) if self.jagged and self.shared else None
        self.x, self.w_ih, self.w_hh = x.reshape(-1, self.input), w_ih, w_hh.contiguous()
        self.x_shape = x.shape
        self.attention, self.b_ih, self.b_hh, self.h0 = (
            None if t is None else t.contiguous() for t in (attention, b_ih, b_hh, h0)
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers that say how large the tensors are, by the names of the kernels' parameters."""
        return dict(
            batch=self.batch, histories=self.histories, steps=self.steps, x_rows=self.x_rows, y_rows=self.y_rows
        )  # fmt: skip

    @property
    def empty(self) -> bool:
        """Whether there is no step at all, so that no kernel is launched."""
        return self.batch == 0 or self.x_rows == 0

    def new(self, *shape: int) -> Tensor:
        """A tensor with one row for each step of y; zeros where the kernels write only the steps that exist."""
        return self.w_hh.new_empty(shape) if self.all_written else self.w_hh.new_zeros(shape)

    def real_x(self) -> Tensor:
        """x with zeros in steps that no row takes: NaN there would reach dW_ih, as 0 times NaN."""
        lengths, offsets, history_of = self.layout.lengths, self.layout.offsets, self.layout.history_of
        if lengths is None and history_of is None:
            return self.x
        device = self.x.device
        read = torch.ones(self.histories, dtype=torch.bool, device=device)
        if history_of is not None:
            read = torch.zeros_like(read).index_fill(0, self.layout.index(self.histories), True)
        if offsets is not None:
            step = torch.arange(self.x_rows, device=device)
            valid = read[torch.searchsorted(offsets[1:], step, right=True).clamp(max=self.histories - 1)]
        else:
            lengths = read * self.steps if lengths is None else lengths * read
            valid = torch.arange(self.steps, device=device) < lengths.unsqueeze(1)
            valid = valid.t() if self.options.time_major else valid
        return torch.where(valid.reshape(-1, 1), self.x, 0)


def float32_product(a: Tensor, w: Tensor) -> Tensor:
    """a w^T with the sums of 16-bit operands kept in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, w.t())
    if a.is_cuda:
        return torch.mm(a, w.t(), out_dtype=torch.float32)
    return torch.mm(a.float(), w.float().t())


def padded(rows: Tensor, hidden: int, size: int) -> Tensor:
    """[3 * hidden, ...], rows [r | u | n], as [3 * size, ...] with zeros behind each gate's."""
    if size == hidden:
        return rows
    result = rows.new_zeros(3, size, *rows.shape[1:])
    result[:, :hidden] = rows.unflatten(0, (3, hidden))
    return result.flatten(0, 1)


def unpadded(rows: Tensor, hidden: int, size: int) -> Tensor:
    return rows if size == hidden else rows.unflatten(0, (3, size))[:, :hidden].flatten(0, 1)


def empty_forward(problem: Problem) -> Forward:
    """The result where there is no step at all: the last states are the initial ones."""
    y = problem.new(*problem.y_shape).zero_()
    h0 = problem.h0
    h_n = y.new_zeros(problem.batch, problem.hidden) if h0 is None else h0.to(y.dtype, copy=True)
    return Forward(y, h_n, nothing_kept(problem))


def nothing_kept(problem: Problem) -> Tensor:
    """``Forward.kept`` of the GPU backends, which compute the gates again."""
    return problem.x.new_empty((0,), dtype=torch.float32)


def empty_backward(problem: Problem, dh_n: Tensor | None, need_dx: bool) -> Gradients:
    """The gradients where there is no step at all."""
    small = problem.x.new_empty(0, dtype=torch.float32)
    dh0 = small.new_zeros(problem.batch, problem.hidden)
    if dh_n is not None:
        dh0.copy_(dh_n)
    return Gradients(
        x=problem.x.new_zeros(problem.x_shape if need_dx else (0,)),
        attention=small if problem.attention is None else small.new_zeros(problem.attention.shape),
        w_ih=problem.w_ih.new_zeros(problem.w_ih.shape),
        w_hh=problem.w_hh.new_zeros(problem.w_hh.shape),
        b_ih=small.new_zeros(3 * problem.hidden),
        b_hh=small.new_zeros(3 * problem.hidden),
        h0=dh0,
    )


class BackwardBuffers(NamedTuple):
    """What the backward kernel fills."""

    size: int  # of a gate's part of a row: H, or more, with zeros behind it
    columns: Gates
    gates: Tensor  # [y_rows, columns.width], storage dtype; zeros at steps that do not exist
    states: Tensor  # [y_rows, size or, with the reset before the product, 2 * size]: h before each step, and q
    d_attention: Tensor | None  # compute dtype, like attention
    d_bias: Tensor  # [programs, 4, size]: of r, u, n and, with the reset after the product, gh_n; to be summed
    dh0: Tensor

    @classmethod
    def allocate(cls, problem: Problem, programs: int, size: int) -> BackwardBuffers:
        """The buffers of a launch of so many programs."""
        options, small = problem.options, problem.x.new_empty(0, dtype=torch.float32)
        columns = gates_of(size, options.scale_input, options.reset_before)
        return cls(
            size=size,
            columns=columns,
            gates=problem.new(problem.y_rows, columns.width),
            states=problem.new(problem.y_rows, (1 + options.reset_before) * size),
            d_attention=None if problem.attention is None else small.new_zeros(problem.attention.shape),
            d_bias=small.new_zeros(programs, 4, size),
            dh0=small.new_empty(problem.batch, problem.hidden),
        )


def gradients(
    problem: Problem, buffers: BackwardBuffers, need_dx: bool, sum_rows: Callable[[Tensor], Tensor]
) -> Gradients:
    """The gradients as products of what the kernel wrote.

    ``sum_rows`` takes [y_rows, 3 * size] to [x_rows, 3 * size]: the sum over the rows that read a history.
    """
    hidden, size, columns = problem.hidden, buffers.size, buffers.columns
    db_r, db_u, db_n, db_hn = buffers.d_bias.sum(0)[:, :hidden]
    dgx = buffers.gates[:, columns.dgx : columns.dgx + 3 * size]
    if problem.shared:
        dgx = sum_rows(dgx)
    nothing = problem.x.new_empty(0)  # a raw op returns tensors only
    return Gradients(
        x=(dgx @ padded(problem.w_ih, hidden, size)).view(problem.x_shape) if need_dx else nothing,
        attention=nothing if buffers.d_attention is None else buffers.d_attention,
        w_ih=unpadded(dgx.t() @ problem.real_x(), hidden, size),
        w_hh=unpadded(_dw_hh(problem, buffers)[:, :hidden], hidden, size),
        b_ih=torch.cat((db_r, db_u, db_n)),
        b_hh=torch.cat((db_r, db_u, db_n if problem.options.reset_before else db_hn)),
        h0=buffers.dh0,
    )


def _dw_hh(problem: Problem, buffers: BackwardBuffers) -> Tensor:
    """(18): W_n has read h, or q with the reset before the product."""
    dgh, states, size = buffers.gates[:, : 3 * buffers.size].t(), buffers.states, buffers.size
    if problem.options.reset_before:
        dru = dgh[: 2 * size] @ states[:, :size]
        return torch.cat((dru, dgh[2 * size :] @ states[:, size:]))
    return (dgh @ states).roll(-size if buffers.columns.dgh_n == 0 else 0, 0)
