"""What passes between the recurrence op and its backends: groups of tensors with names.

Room card. Lives here: named tuples for the inputs, the results and the gradients of a raw recurrence op. May import:
torch. Every backend and every layer may import this file. Must not be here: checks, mathematics, what one backend
alone needs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors that have a gradient. Those that are None are not there: no attention (``gru``), zero biases, zero
    h0."""

    x: Tensor  # [U, T, I], with ``time_major`` [T, U, I], or jagged [N, I]; storage dtype
    attention: Tensor | None  # [B, T], or a number for each step of all rows; compute dtype
    w_ih: Tensor  # [3 * H, I], rows [r | u | n]; storage dtype
    w_hh: Tensor  # [3 * H, H]; storage dtype
    b_ih: Tensor | None  # [3 * H]; compute dtype
    b_hh: Tensor | None  # [3 * H]; compute dtype
    h0: Tensor | None  # [B, H]; compute dtype


class Forward(NamedTuple):
    """The results of a forward."""

    y: Tensor  # [B, T, H], [T, B, H] or [steps of all rows, H]; storage dtype
    h_n: Tensor  # [B, H]; storage dtype
    kept: Tensor  # what this backend's backward wants beside y; empty where it wants nothing


class Gradients(NamedTuple):
    """The gradients of ``Inputs``. All are tensors, as a raw op returns nothing else: of what is not there, any
    tensor."""

    x: Tensor  # storage dtype; empty where it was not asked for
    attention: Tensor  # compute dtype
    w_ih: Tensor  # storage dtype
    w_hh: Tensor  # storage dtype
    b_ih: Tensor  # [3 * H]; compute dtype
    b_hh: Tensor  # [3 * H]; compute dtype
    h0: Tensor  # [B, H]; compute dtype
