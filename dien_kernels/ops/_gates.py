"""The switch between recomputing the gates in the backward and keeping them from the forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dien_kernels.ops._environment import choice as from_environment

_CHOICES = ("recompute", "keep")


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


def kept() -> bool:
    return _choice == "keep"
