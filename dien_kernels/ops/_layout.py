"""One layout rule for every shape of ragged data (docs/design.md, "One layout").

Row b's step t lies at flat row ``start[b] + t * stride`` for ``t < length[b]``. Padded batches, jagged
values, reversed directions and histories shared by many rows are all this rule. Boolean masks are
compacted to it first: a masked step changes nothing, so leaving it out changes nothing either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dien_kernels.ops._checks import check_index, check_tensor


class Ragged(NamedTuple):
    """The checked description of a ragged batch; index tensors are int64 on the data's device.

    ``lengths [U]`` or ``offsets [U+1]`` or neither (all rows full); ``history [B]`` maps rows to histories.
    """

    lengths: Tensor | None
    offsets: Tensor | None
    history: Tensor | None


class MaskIndex(NamedTuple):
    """Where the steps of a boolean mask go when its holes are squeezed out; made once, used for every tensor."""

    slot: Tensor  # [U, T] compact step of each valid step, T (a dump slot) for the others
    source: Tensor  # [U, T] compact step whose state stands at each step: the last valid one so far, at least 0
    so_far: Tensor  # [U, T] number of valid steps up to and including this one
    mask: Tensor


def check_ragged(
    data: Tensor,
    data_name: str,
    lengths: Tensor | None,
    offsets: Tensor | None,
    mask: Tensor | None,
    history: Tensor | None = None,
) -> tuple[Ragged, MaskIndex | None]:
    """Check the three descriptions of raggedness against ``data`` [U,T,.] or [N,.]; at most one may be given."""
    if (lengths is not None) + (offsets is not None) + (mask is not None) > 1:
        given = [n for n, v in (("lengths", lengths), ("offsets", offsets), ("mask", mask)) if v is not None]
        raise ValueError(f"at most one of lengths, offsets and mask may be given, got {' and '.join(given)}")
    index = None
    if offsets is not None:
        if data.dim() != 2:
            raise ValueError(f"{data_name} must be [N, features] with offsets, got shape {tuple(data.shape)}")
        offsets = check_index("offsets", offsets, (None,), "[U + 1]", data, data_name)
        if offsets.shape[0] < 1:
            raise ValueError("offsets must have shape [U + 1] with at least one entry, got (0,)")
    elif data.dim() != 3:
        raise ValueError(
            f"{data_name} must be [B, T, features], or [N, features] with offsets, got shape {tuple(data.shape)}"
        )
    elif lengths is not None:
        lengths = check_index("lengths", lengths, (data.shape[0],), "[U]", data, data_name)
    elif mask is not None:
        index = mask_index(mask, data, data_name)
        lengths = mask.sum(1)
    if history is not None:
        history = check_index("history", history, (None,), "[B]", data, data_name)
        histories = data.shape[0] if offsets is None else offsets.shape[0] - 1
        if histories == 0 and history.shape[0] > 0:  # a matter of shapes: where values are not read, too
            raise ValueError(
                f"history must be empty where {data_name} has no history (U = 0), got {history.shape[0]} rows"
            )
    return Ragged(lengths, offsets, history), index


def check_rows_total(rows_total: Any, ragged: Ragged) -> Any:
    """The steps of all rows, which only offsets with a history ask for: there the number, elsewhere -1."""
    if ragged.offsets is None or ragged.history is None:
        if rows_total is not None:
            raise ValueError(f"rows_total must be None unless offsets and history are given, got {rows_total}")
        return -1
    if rows_total is None:
        raise ValueError("rows_total must be given with offsets and history: the steps of all rows, got None")
    if isinstance(rows_total, bool) or not isinstance(rows_total, (int, torch.SymInt)):
        raise TypeError(f"rows_total must be an int, got {type(rows_total).__name__}")
    if rows_total < 0:
        raise ValueError(f"rows_total must be at least 0, got {rows_total}")
    return rows_total


def mask_index(mask: Tensor, data: Tensor, data_name: str) -> MaskIndex:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must have dtype bool, got {mask.dtype}")
    if mask.shape != data.shape[:2]:
        raise ValueError(f"mask must have shape [B, T] = {tuple(data.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != data.device:
        raise ValueError(f"mask must be on the device of {data_name}, {data.device}, got {mask.device}")
    count = mask.cumsum(1)
    source = (count - 1).clamp(min=0)
    return MaskIndex(torch.where(mask, source, mask.shape[1]), source, count, mask)


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
    x: Tensor, ragged: Ragged, attention: Tensor | None, *, time_major: bool = False, reverse: bool = False
) -> Rows:
    """Spell the rule out in index tensors, for backends that want them (and for reading).

    Jagged batches read the longest length on the host: only the backends in plain torch call this for them. Values that
    ``check_values`` would refuse, and does not see on a GPU, are clamped: no row leaves its buffer.
    """
    lengths, offsets, history = ragged
    device = x.device
    if history is not None:
        u = x.shape[1] if time_major else x.shape[0] if offsets is None else offsets.shape[0] - 1
        history = history.clamp(0, max(u - 1, 0))
    if offsets is not None:
        x_start = offsets[:-1].clamp(0, x.shape[0])
        length = torch.minimum(offsets.diff().clamp(min=0), x.shape[0] - x_start)
        if history is not None:
            length, x_start = length[history], x_start[history]
        y_rows = x.shape[0] if attention is None else attention.shape[0]
        y_start = (length.cumsum(0) - length).clamp(max=y_rows)
        length = torch.minimum(length, y_rows - y_start)
        x_stride = y_stride = 1
        steps = int(length.max()) if length.numel() else 0
    else:
        (steps, u) = x.shape[:2] if time_major else (x.shape[1], x.shape[0])
        length = (
            torch.full((u,), steps, dtype=torch.int64, device=device) if lengths is None else lengths.clamp(0, steps)
        )
        row = torch.arange(u, device=device)
        if history is not None:
            length, row = length[history], history
        b = row.shape[0]
        out = torch.arange(b, device=device)
        x_start, x_stride = (row, u) if time_major else (row * steps, 1)
        y_start, y_stride = (out, b) if time_major else (out * steps, 1)
        y_rows = b * steps
    if reverse:
        last = (length - 1).clamp(min=0)
        x_start, x_stride = x_start + last * x_stride, -x_stride
        y_start, y_stride = y_start + last * y_stride, -y_stride
    return Rows(x_start, x_stride, y_start, y_stride, length, y_rows, steps)


class Readers(NamedTuple):
    """The rows of each history in row order: ``rows[first[u] : first[u + 1]]``."""

    rows: Tensor
    first: Tensor


def readers_of(history: Tensor, histories: int) -> Readers:
    by_history, rows = history.sort(stable=True)
    return Readers(rows, torch.searchsorted(by_history, torch.arange(histories + 1, device=history.device)))


def check_values(ragged: Ragged, steps: int | None, rows: int | None, y_rows: int | None) -> None:
    """Values of index tensors, read where that costs no synchronisation: on the CPU. Native code repeats this.

    ``steps``: the padded length; ``rows``: N of a jagged batch; ``y_rows``: rows of a jagged attention.
    """
    lengths, offsets, history = ragged
    for tensor in ragged:
        if tensor is not None and tensor.device.type != "cpu":
            return
    if lengths is not None and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > (steps or 0):
            raise ValueError(f"lengths must lie between 0 and T = {steps}, got values from {low} to {high}")
    if offsets is not None:
        if int(offsets[0]) != 0:
            raise ValueError(f"offsets must start with 0, got {int(offsets[0])}")
        if bool((offsets.diff() < 0).any()):
            raise ValueError("offsets must be ascending, got a decreasing pair")
        if int(offsets[-1]) != rows:
            raise ValueError(f"offsets must end with N = {rows}, the rows of the jagged input, got {int(offsets[-1])}")
    if history is not None and history.numel():
        histories = len(lengths) if lengths is not None else len(offsets) - 1 if offsets is not None else rows
        low, high = int(history.min()), int(history.max())
        if low < 0 or high >= (histories or 0):
            raise ValueError(
                f"history must lie between 0 and U - 1 = {(histories or 0) - 1}, got values from {low} to {high}"
            )
    if offsets is not None and history is not None and y_rows is not None:
        total = int(offsets.diff()[history].sum())
        if total != y_rows:
            raise ValueError(
                f"attention must have one value for each of the {total} steps of the histories named, got {y_rows}"
            )
