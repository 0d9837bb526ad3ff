"""The switch between recomputing the gates in the backward and keeping them from the forward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_CHOICES = ("recompute", "keep")


def _checked(choice: str, where: str) -> str:
    if choice not in _CHOICES:
        raise ValueError(f"{where} must be one of {_CHOICES}, got {choice!r}")
    return choice


_choice = _checked(os.environ.get("DIEN_KERNELS_GATES", "keep"), "environment variable DIEN_KERNELS_GATES")


@contextmanager
def use_gates(choice: str) -> Iterator[None]:
    """Inside the block, ``"keep"`` the gates of the forward (4 H values a step) or ``"recompute"`` them."""
    global _choice
    before, _choice = _choice, _checked(choice, "use_gates(choice)")
    try:
        yield
    finally:
        _choice = before


def kept() -> bool:
    return _choice == "keep"
