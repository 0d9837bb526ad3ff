"""Packed sequences of torch, laid out one history after another.

Room card. Lives here: the check of a packed sequence, and the permutation between its rows and a jagged batch. May
import: torch, ``checks``. Must not be here: any layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dien_kernels.checks import check_tensor


class Packed(NamedTuple):
    """How the rows of a packed sequence lie when they are laid out one history after another."""

    offsets: Tensor  # [B + 1] of the jagged batch, longest history first
    gather: Tensor  # [N] packed row of each jagged row
    scatter: Tensor  # [N] jagged row of each packed row


def check_packed(name: str, packed: PackedSequence) -> int:
    """Check the own sizes of the packed sequence ``name``; they live on the host, so nothing waits. Returns B."""
    check_tensor(f"{name}.data", packed.data)
    check_tensor(f"{name}.batch_sizes", packed.batch_sizes)
    sizes, rows = packed.batch_sizes, packed.data.shape[0]
    if sizes.dtype != torch.int64 or sizes.dim() != 1:
        raise TypeError(f"{name}.batch_sizes must be int64 of shape [T], got {sizes.dtype} {tuple(sizes.shape)}")
    if sizes.numel() == 0 or int(sizes[-1]) < 1 or bool((sizes.diff() > 0).any()) or int(sizes.sum()) != rows:
        raise ValueError(
            f"{name}.batch_sizes must hold at least one size, descending, each at least 1, that sum to the "
            f"{rows} rows of {name}.data, got {sizes.tolist()}"
        )
    return int(sizes[0])


def packed_index(batch_sizes: Tensor, batch: int, data: Tensor) -> Packed:
    """Packed row ``start[t] + b`` holds step t of history b; no loop over steps, no synchronisation."""
    rows, device = data.shape[0], data.device
    sizes = batch_sizes.to(device, non_blocking=True)
    history = torch.arange(batch, device=device)
    lengths = sizes.shape[0] - torch.searchsorted(sizes.flip(0), history, right=True)
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    row = torch.arange(rows, device=device)
    of_row = torch.repeat_interleave(history, lengths, output_size=rows)
    gather = (sizes.cumsum(0) - sizes)[row - offsets[of_row]] + of_row
    return Packed(offsets, gather, torch.empty_like(gather).scatter_(0, gather, row))
