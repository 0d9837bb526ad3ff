"""What a raw attention op is told beside its tensors, and the check of its index values; shared by the backends.

Room card. Lives here: ``Options``, ``check_index_values``. May import: torch, ``_layout``. Must not be here:
mathematics, anything that one backend alone needs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dien_kernels.ops._layout import Ragged, check_values


class Options(NamedTuple):
    """What a raw attention op is told beside its tensors, in the order of its schema."""

    rows_total: int  # the number of scores of a jagged batch with shared histories, else -1
    bilinear: bool
    activation: int  # an index into ACTIVATIONS of ``ops/_mlp.py``
    scale: float
    softmax: bool


def check_index_values(states: Tensor, ragged: Ragged, rows_total: int) -> None:
    """Check the values of lengths, offsets and history, and that ``rows_total`` is the steps of the histories named.

    As with ``check_values``, only index tensors on the CPU are read. Raises ``ValueError`` naming the argument.
    """
    _, offsets, history = ragged
    if offsets is None:
        check_values(ragged, states.shape[1], states.shape[0], None)
        return
    check_values(ragged, None, states.shape[0], None)
    if history is not None and history.device.type == "cpu":
        total = int(offsets.diff()[history].sum())
        if total != rows_total:
            raise ValueError(f"rows_total must be {total}, the steps of the histories named, got {rows_total}")
