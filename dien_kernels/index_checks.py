"""Checks of the index tensors that say how histories lie in memory: their types, and their values.

Room card. Lives here: what ``Histories`` asks of single tensors. The values are checked in the same words by native
code (csrc/cpu/layout.cpp). May import: torch, ``checks``. Must not be here: when values may be read without waiting for
a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dien_kernels.checks import bounds, check_index, check_tensor

_FEW = 64  # numbers that are read faster as a list than by operations


def check_layout(
    lengths: Tensor | None, offsets: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """lengths and offsets as int64, after types, dtypes and ranks of all three were checked.

    At most one of the three may be given.
    """
    if (lengths is not None) + (offsets is not None) + (mask is not None) > 1:
        given = [n for n, v in (("lengths", lengths), ("offsets", offsets), ("mask", mask)) if v is not None]
        raise ValueError(f"at most one of lengths, offsets and mask may be given, got {' and '.join(given)}")
    if lengths is not None:
        lengths = check_index("lengths", lengths, "[U]")
    if offsets is not None:
        offsets = check_index("offsets", offsets, "[U + 1]")
        if offsets.shape[0] < 1:
            raise ValueError("offsets must have shape [U + 1] with at least one entry, got (0,)")
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must have dtype bool, got {mask.dtype}")
        if mask.dim() != 2:
            raise ValueError(f"mask must have shape [B, T], got {tuple(mask.shape)}")
    return lengths, offsets


def check_rows_total_type(rows_total: Any) -> None:
    """A number of steps: an int, or what stands for one in a graph."""
    if isinstance(rows_total, bool) or not isinstance(rows_total, (int, torch.SymInt)):
        raise TypeError(f"rows_total must be an int, got {type(rows_total).__name__}")
    if rows_total < 0:
        raise ValueError(f"rows_total must be at least 0, got {rows_total}")


def check_lengths(lengths: Tensor, steps: int | None) -> None:
    """Lengths lie between 0 and the padded number of steps, where that is known."""
    if not lengths.numel():
        return
    low, high = bounds(lengths)
    if low < 0 or (steps is not None and high > steps):
        allowed = "be at least 0" if steps is None else f"lie between 0 and T = {steps}"
        raise ValueError(f"lengths must {allowed}, got values from {low} to {high}")


def check_offsets(offsets: Tensor, total: int | None) -> None:
    """Offsets ascend from 0 to the rows of the jagged data, where their number is known."""
    values = offsets.tolist() if offsets.shape[0] <= _FEW else None
    first, last = (values[0], values[-1]) if values else (int(offsets[0]), int(offsets[-1]))
    if first != 0:
        raise ValueError(f"offsets must start with 0, got {first}")
    if sorted(values) != values if values else bool((offsets.diff() < 0).any()):
        u = int((offsets.diff() < 0).nonzero()[0])
        raise ValueError(f"offsets must be ascending, got {int(offsets[u])} before {int(offsets[u + 1])}")
    if total is not None and last != total:
        raise ValueError(f"offsets must end with N = {total}, the rows of the jagged input, got {last}")


def check_history_of(history_of: Tensor, histories: int | None, name: str) -> None:
    """Rows read histories that there are; ``histories`` is their number, where it is known."""
    if not history_of.numel():
        return
    low, high = bounds(history_of)
    if low < 0 or (histories is not None and high >= histories):
        allowed = "be at least 0" if histories is None else f"lie between 0 and U - 1 = {histories - 1}"
        raise ValueError(f"{name} must {allowed}, got values from {low} to {high}")


def assert_in_graph(
    offsets: Tensor | None, history_of: Tensor | None, histories: int | None, total: int | None, name: str
) -> None:
    """The checks of values in a graph that torch.compile makes: a wrong one is a ``RuntimeError`` when the graph runs.

    The words must not name sizes, or there would be a graph for each of them.
    """
    if offsets is not None and total is not None:
        # No views: torch.compile refuses some of them in inference mode.
        ascending = (offsets.min() == 0) & (offsets.max() == total) & (offsets.diff() >= 0).all()
        torch._assert_async(ascending, "offsets must ascend from 0 to N, the rows of the jagged input")
    if history_of is not None and history_of.numel() and histories is not None:
        inside = (history_of.min() >= 0) & (history_of.max() < histories)
        torch._assert_async(inside, f"{name} has a value below 0 or above the last there is")
