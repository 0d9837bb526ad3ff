"""What stands around a time loop that is one launch: the rows' order, and the products before and after the loop.

Shared by the backends whose loop runs on a GPU. W_ih x is one product for all steps, once for each history; the
backward loop leaves gate gradients, and dx, dW_ih and dW_hh are products over them. Nothing here waits for the device
or depends on the values of an index tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dien_kernels.ops._layout import Ragged, check_values

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Gates(NamedTuple):
    """Columns of a step's gate gradients: dgx and dgh share what they have in common (16)."""

    width: int
    dgx: int  # r, u, n from here on, times gamma
    dgh_r: int
    dgh_u: int
    dgh_n: int


def gates_of(hidden: int, scale_input: bool, reset_before: bool) -> Gates:
    if scale_input:
        return Gates(6 * hidden, 3 * hidden, 0, hidden, 2 * hidden)
    if reset_before:
        return Gates(3 * hidden, 0, 0, hidden, 2 * hidden)
    return Gates(4 * hidden, hidden, hidden, 2 * hidden, 0)


class Job:
    """A call's tensors and numbers in the form the kernels want."""

    def __init__(
        self, x: Tensor, attention: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
        h0: Tensor | None, ragged: Ragged, options: tuple[Any, ...],
    ) -> None:  # fmt: skip
        *coefficients, self.scale_input, self.keep_side, self.reset_before, self.reverse, self.time_major, _ = options
        self.alpha0, self.alpha1, self.beta0, self.beta1 = coefficients
        self.hidden, self.input = w_hh.shape[1], x.shape[-1]
        self.jagged = ragged.offsets is not None
        if ragged.offsets is not None:
            check_values(ragged, None, x.shape[0], None if attention is None else attention.shape[0])
            self.steps, self.histories = 0, ragged.offsets.shape[0] - 1
        else:
            self.steps, self.histories = x.shape[:2] if self.time_major else (x.shape[1], x.shape[0])
            check_values(ragged, self.steps, self.histories, None)
        self.shared = ragged.history is not None
        self.batch = self.histories if ragged.history is None else ragged.history.shape[0]
        self.x_rows = x.numel() // self.input
        self.y_rows = self.batch * self.steps
        self.y_shape: tuple[int, ...] = (self.batch, self.steps, self.hidden)
        if self.time_major:
            self.y_shape = (self.steps, self.batch, self.hidden)
        if self.jagged:
            self.y_rows = self.x_rows if attention is None else attention.shape[0]
            self.y_shape = (self.y_rows, self.hidden)
        # Where rows may end early, what lies past them is zeros that the kernels do not write.
        self.all_written = ragged.lengths is None and not self.jagged
        self.lengths, self.offsets, self.history = (None if t is None else t.contiguous() for t in ragged)
        self.row_lengths, self.y_start = self._row_lengths()
        self.x, self.w_ih, self.w_hh = x.reshape(-1, self.input), w_ih, w_hh.contiguous()
        self.x_shape = x.shape
        self.attention, self.b_ih, self.b_hh, self.h0 = (
            None if t is None else t.contiguous() for t in (attention, b_ih, b_hh, h0)
        )
        self.sizes = (self.batch, self.histories, self.steps, self.x_rows, self.y_rows)

    def _row_lengths(self) -> tuple[Tensor | None, Tensor | None]:
        """Each row's length where rows differ, and its start in y where that is not its start in x."""
        length = self.lengths
        if self.offsets is not None:
            length = self.offsets.diff()
        if length is None or self.history is None or self.histories == 0:
            return length, None
        length = length[self.history.clamp(0, self.histories - 1)]
        # Offsets that fall, which nobody has read, would let rows start before y.
        return length, (length.cumsum(0) - length).clamp(0, self.y_rows) if self.jagged else None

    @property
    def nothing(self) -> bool:
        """No step at all; the kernels would have nothing to point at."""
        return self.batch == 0 or self.x_rows == 0

    def order(self) -> Tensor:
        """Rows from the longest to the shortest, so that those of a program end together; empty: as they are."""
        if self.row_lengths is None:
            return self.w_hh.new_empty((0,), dtype=torch.int64)
        return self.row_lengths.argsort(descending=True, stable=True)

    def rows(self, order: Tensor) -> tuple[Tensor | None, ...]:
        """The tensors that say where a row's steps lie, in the kernels' order."""
        return order if order.numel() else None, self.lengths, self.offsets, self.history, self.y_start

    def new(self, *shape: int) -> Tensor:
        """One row for each step of y, zeros where the kernels write only the steps that exist."""
        return self.w_hh.new_empty(shape) if self.all_written else self.w_hh.new_zeros(shape)

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


def forward_of_nothing(job: Job, y: Tensor) -> tuple[Tensor, Tensor]:
    """No step at all: zeros, and the last states are the first."""
    if job.h0 is None:
        return y.zero_(), y.new_zeros(job.batch, job.hidden)
    return y.zero_(), job.h0.to(y.dtype, copy=True)


def backward_of_nothing(job: Job, dh_n: Tensor | None, need_dx: bool) -> Gradients:
    small = job.x.new_empty(0, dtype=torch.float32)
    dh0 = small.new_zeros(job.batch, job.hidden)
    if dh_n is not None:
        dh0.copy_(dh_n)
    d_bias = small.new_zeros(2, 3 * job.hidden)
    return (
        job.x.new_zeros(job.x_shape if need_dx else (0,)),
        job.x.new_empty(0) if job.attention is None else small.new_zeros(job.attention.shape),
        job.w_ih.new_zeros(job.w_ih.shape),
        job.w_hh.new_zeros(job.w_hh.shape),
        d_bias[0].clone(),
        d_bias[1].clone(),
        dh0,
    )


class Left(NamedTuple):
    """What a backward loop leaves."""

    size: int  # of a gate's part of a row: H, or more, with zeros behind it
    columns: Gates
    gates: Tensor  # [y_rows, columns.width], storage dtype; zeros at steps that do not exist
    states: Tensor  # [y_rows, size or, with the reset before the product, 2 * size]: h before each step, and q
    d_attention: Tensor | None  # compute dtype, like attention
    d_bias: Tensor  # [programs, 4, size]: of r, u, n and, with the reset after the product, gh_n; to be summed
    dh0: Tensor


def left(job: Job, programs: int, size: int) -> Left:
    """Room for what a loop of so many programs leaves."""
    columns, small = gates_of(size, job.scale_input, job.reset_before), job.x.new_empty(0, dtype=torch.float32)
    return Left(
        size,
        columns,
        job.new(job.y_rows, columns.width),
        job.new(job.y_rows, (1 + job.reset_before) * size),
        None if job.attention is None else small.new_zeros(job.attention.shape),
        small.new_zeros(programs, 4, size),
        small.new_empty(job.batch, job.hidden),
    )


def gradients(job: Job, left: Left, need_dx: bool, sum_readers: Callable[[Tensor], Tensor]) -> Gradients:
    """The products over what the loop left. ``sum_readers``: [y_rows, 3 * size] to [x_rows, ..], over readers."""
    hidden, size, columns = job.hidden, left.size, left.columns
    db_r, db_u, db_n, db_hn = left.d_bias.sum(0)[:, :hidden]
    dgx = left.gates[:, columns.dgx : columns.dgx + 3 * size]
    if job.shared:
        dgx = sum_readers(dgx)
    dw_hh = _dw_hh(job, left)[:, :hidden]
    return (
        (dgx @ padded(job.w_ih, hidden, size)).view(job.x_shape) if need_dx else job.x.new_empty(0),
        job.x.new_empty(0) if left.d_attention is None else left.d_attention,  # a raw op returns tensors only
        unpadded(dgx.t() @ job.real_x(), hidden, size),
        unpadded(dw_hh, hidden, size),
        torch.cat((db_r, db_u, db_n)),
        torch.cat((db_r, db_u, db_n if job.reset_before else db_hn)),
        left.dh0,
    )


def _dw_hh(job: Job, left: Left) -> Tensor:
    """(18): W_n has read h, or q with the reset before the product."""
    dgh, states, size = left.gates[:, : 3 * left.size].t(), left.states, left.size
    if job.reset_before:
        dru = dgh[: 2 * size] @ states[:, :size]
        return torch.cat((dru, dgh[2 * size :] @ states[:, size:]))
    return (dgh @ states).roll(-size if left.columns.dgh_n == 0 else 0, 0)
