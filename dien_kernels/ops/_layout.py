"""One layout rule for every shape of ragged data (docs/design.md, "One layout").

Row b's step t lies at flat row ``start[b] + t * stride`` for ``t < length[b]``. Padded batches, jagged
values, reversed directions and histories shared by many rows are all this rule. Boolean masks are
compacted to it first: a masked step changes nothing, so leaving it out changes nothing either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dien_kernels.histories import Histories, MaskIndex


def _along(index: Tensor, data: Tensor) -> Tensor:
    return index.reshape(index.shape + (1,) * (data.dim() - 2)).expand(index.shape + data.shape[2:])


def compact(data: Tensor, index: MaskIndex) -> Tensor:
    """Squeeze the holes out of ``data`` [U, T, ...]; masked steps land in a dump slot that is cut off."""
    buffer = data.new_zeros((data.shape[0], data.shape[1] + 1) + data.shape[2:])
    return buffer.scatter(1, _along(index.slot, data), data)[:, :-1]


def spread(data: Tensor, index: MaskIndex, before: Tensor | None = None) -> Tensor:
    """Undo ``compact``: masked steps become zero or, with ``before`` [U, ...], the state they carry."""
    moved = data.gather(1, _along(index.source, data))
    if before is None:
        return torch.where(_along(index.mask, data), moved, 0)
    return torch.where(_along(index.so_far > 0, data), moved, before.unsqueeze(1))


class Rows(NamedTuple):
    """The layout rule in numbers: flat row ``start[b] + t * stride`` of x and of y, for ``t < length[b]``."""

    x_start: Tensor
    x_stride: int
    y_start: Tensor
    y_stride: int
    length: Tensor
    y_rows: int
    steps: int


def rows_of(
    x: Tensor, histories: Histories, attention: Tensor | None, *, time_major: bool = False, reverse: bool = False
) -> Rows:
    """Spell the rule out in index tensors, for backends that want them (and for reading).

    Jagged batches read the longest length on the host: only backends in plain torch call this for them. Values that
    ``Histories.check_values`` would refuse, and does not see on a GPU, are clamped: no row leaves its buffer.
    """
    device = x.device
    count, steps = histories.count(x, time_major), histories.steps(x, time_major)
    row = torch.arange(count, device=device)
    if histories.history_of is not None:
        row = histories.index(count)
    if histories.offsets is not None:
        x_start = histories.offsets[:-1].clamp(0, x.shape[0])
        length = torch.minimum(histories.offsets.diff().clamp(min=0), x.shape[0] - x_start)
        if histories.history_of is not None:
            length, x_start = length[row], x_start[row]
        y_rows = x.shape[0] if attention is None else attention.shape[0]
        y_start = (length.cumsum(0) - length).clamp(max=y_rows)
        length = torch.minimum(length, y_rows - y_start)
        x_stride = y_stride = 1
        steps = int(length.max()) if length.numel() else 0
    else:
        length = torch.full_like(row, steps)  # a mask, where there is one, says which of them count
        if histories.lengths is not None:
            length = histories.lengths[row].clamp(0, steps)
        b = row.shape[0]
        out = torch.arange(b, device=device)
        x_start, x_stride = (row, count) if time_major else (row * steps, 1)
        y_start, y_stride = (out, b) if time_major else (out * steps, 1)
        y_rows = b * steps
    if reverse:
        last = (length - 1).clamp(min=0)
        x_start, x_stride = x_start + last * x_stride, -x_stride
        y_start, y_stride = y_start + last * y_stride, -y_stride
    return Rows(x_start, x_stride, y_start, y_stride, length, y_rows, steps)
