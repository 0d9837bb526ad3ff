"""The order of rows by length, for the backends whose time loop takes the longest rows first.

Room card. Lives here: one raw op, opaque to torch.compile, as its fastest implementation on a GPU is a Triton kernel.
May import: torch, ``_register``, ``_triton``. Must not be here: which backend wants an order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dien_kernels import histories
from dien_kernels.ops import _triton
from dien_kernels.ops._register import define_raw, implement_raw, raw

COUNTED_ROWS = 16_384  # up to here one launch counts each row's place, B * B comparisons; above, sorting is less work


def _longest_first(lengths: Tensor) -> Tensor:
    on_device = lengths.is_cuda or _triton.INTERPRETED
    if _triton.ABSENT or not on_device or not 0 < lengths.numel() <= COUNTED_ROWS:
        return histories.longest_first(lengths)
    return counted_order(lengths.contiguous())


def counted_order(lengths: Tensor) -> Tensor:
    """The order of a stable descending sort of int64 ``lengths``, in one launch."""
    from dien_kernels.ops.recurrence.triton_kernel import length_order

    order, batch = torch.empty_like(lengths), lengths.numel()
    _triton.launch(
        length_order,
        (-(-batch // 32),),
        order,
        LENGTHS=lengths,
        ORDER=order,
        batch=batch,
        ROWS=32,
        BLOCK=128,
        **_triton.compiler_options(4),
    )
    return order


define_raw("_longest_first", "(Tensor lengths) -> Tensor", torch.empty_like)
implement_raw("_longest_first", _longest_first)
longest_first = raw("_longest_first")
"""int64 [B], the rows from the longest to the shortest, equal ones in their order."""
