"""What a raw auxiliary-loss op is told beside its tensors, and the check of its index values; shared by the backends.

Room card. Lives here: ``Options``, ``NORMALIZERS``, ``CLAMP``, ``check_index_values``. May import: torch, ``_layout``.
Must not be here: mathematics, anything that one backend alone needs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dien_kernels.ops._layout import Ragged, check_values

NORMALIZERS = ("joint", "separate", "padded", "row")
CLAMP = 100.0  # torch's binary cross entropy clamps the logarithm at -100


class Options(NamedTuple):
    """What a raw auxiliary-loss op is told beside its tensors, in the order of its schema."""

    inner: bool
    activation: int  # an index into ACTIVATIONS of ``ops/_mlp.py``
    normalizer: int  # an index into NORMALIZERS
    eps: float  # a negative number stands for the clamp
    ahead: int  # 1: state t is paired with behaviour t + 1; 0: with behaviour t


def check_index_values(states: Tensor, ragged: Ragged) -> None:
    """Check the values of lengths and offsets; only index tensors on the CPU are read.

    Raises ``ValueError`` naming the argument.
    """
    check_values(ragged, None if ragged.offsets is not None else states.shape[1], states.shape[0], None)
