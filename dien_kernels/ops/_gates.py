"""The switch between recomputing the gates in the backward and keeping them from the forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dien_kernels.ops._environment import choice as from_environment

_CHOICES = ("recompute", "keep")

KEPT_UNITS = 8
"""Kept gates are padded to this many units, whatever the instruction set: kKeptUnits in csrc/cpu/params.h."""

_choice = from_environment("DIEN_KERNELS_GATES", _CHOICES, "keep")


@contextmanager
def use_gates(choice: str) -> Iterator[None]:
    """Inside the block, ``"keep"`` the gates of the forward (4 H values a step) or ``"recompute"`` them."""
    global _choice
    if choice not in _CHOICES:
        raise ValueError(f"use_gates(choice) must be one of {_CHOICES}, got {choice!r}")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def kept_units() -> int:
    """Units to which the gates that are kept are padded; 0 where they are recomputed.

    The number is an argument of the raw ops: torch.compile keeps graphs on disk by what is written in them, and one
    made for another padding must not be taken for ours.
    """
    return KEPT_UNITS if _choice == "keep" else 0
