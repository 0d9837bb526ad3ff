"""Every recurrence once more, by hand: the table of docs/math.md. Nothing here comes from the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class ByHand(NamedTuple):
    """A recurrence as its users know it.

    Attributes:
        update: the side on which they store the update gate, ``"keep"`` or ``"candidate"``.
        g: how far a step goes towards the candidate, from the attention a and the update gate u as a step towards the
            candidate.
    """

    update: str
    g: Callable[[Any, Any], Any]


BY_HAND = {
    "gru": ByHand("keep", lambda a, u: u),
    "aigru": ByHand("keep", lambda a, u: u),
    "agru": ByHand("keep", lambda a, u: a),
    "paper": ByHand("candidate", lambda a, u: a * u),
    "authors": ByHand("keep", lambda a, u: a + (1 - a) * u),
    "prediction_flow": ByHand("keep", lambda a, u: (1 - a) + a * u),
}
