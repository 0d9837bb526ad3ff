"""The switch between recomputing the gates in the backward and keeping them from the forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from dien_kernels.ops._environment import choice as from_environment
from dien_kernels.ops._setting import Setting

Gates = Literal["recompute", "keep"]
_CHOICES: tuple[str, ...] = get_args(Gates)

KEPT_UNITS = 8
"""Kept gates are padded to this many units, whatever the instruction set: kKeptUnits in csrc/cpu/params.h."""

_choice = Setting("gates", from_environment("DIEN_KERNELS_GATES", _CHOICES, "keep"))


@contextmanager
def use_gates(choice: Gates) -> Iterator[None]:
    """Choose what the backward pass of the recurrence does about the gates of its forward pass inside the block.

    With ``choice="keep"`` the forward keeps them, which takes memory for 4 H more values a step; with
    ``choice="recompute"`` the backward computes them again from the states. As with ``use_backend``, the block holds
    for the thread or asyncio task that enters it, and for no other. Raises ``ValueError`` for another word.
    """
    if choice not in _CHOICES:
        raise ValueError(f"use_gates(choice) must be one of {_CHOICES}, got {choice!r}")
    with _choice.block(choice):
        yield


def kept_units() -> int:
    """Units to which the gates that are kept are padded; 0 where they are recomputed.

    The number is an argument of the raw ops: torch.compile keeps graphs on disk by what is written in them, and one
    made for another padding must not be taken for ours.
    """
    return KEPT_UNITS if _choice.word() == "keep" else 0
