"""Wrong values of index tensors get the same words from Python (``Histories``) and from the CPU library.

The CPU library checks lengths, offsets and history itself (csrc/cpu/layout.cpp), so that a call of its kernels reads
the values once. Its messages are written a second time there; these tests keep the two from drifting apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dien_kernels import Histories, _native, attention_scores, augru, auxiliary_loss

LENGTHS = torch.tensor([3, 0, 5, 2])
OFFSETS = torch.tensor([0, 3, 3, 8, 10])
ROWS = torch.tensor([2, 0, 2, 1, 3])
TOTAL = 15  # the steps of the histories of ROWS
PADDED, JAGGED = (4, 5), (10,)
CHECKS = ("check_values", "check_attention_rows", "check_steps_of_rows")

# Keywords of a call, and the shape of its steps.
OF_HISTORIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "negative length": ({"lengths": LENGTHS - 1}, PADDED),
    "length above T": ({"lengths": LENGTHS + 1}, PADDED),
    "first offset": ({"offsets": OFFSETS + 1}, JAGGED),
    "descending offsets": ({"offsets": torch.tensor([0, 3, 2, 8, 10])}, JAGGED),
    "descending last offset": ({"offsets": torch.tensor([0, 3, 3, 11, 10])}, JAGGED),
    "offsets end below N": ({"offsets": OFFSETS}, (11,)),
    "offsets end above N": ({"offsets": OFFSETS}, (9,)),
}
OF_ROWS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "negative history": ({"history": ROWS - 1}, PADDED),
    "history above U - 1": ({"history": ROWS + 1}, PADDED),
    "negative history with lengths": ({"lengths": LENGTHS, "history": ROWS - 1}, PADDED),
    "negative history with offsets": ({"offsets": OFFSETS, "history": ROWS - 1}, JAGGED),
    "history above U - 1 with offsets": ({"offsets": OFFSETS, "history": ROWS + 1}, JAGGED),
    "another number of steps": ({"offsets": OFFSETS, "history": ROWS + (ROWS == 0)}, JAGGED),
}


def recurrence(steps: tuple[int, ...], keywords: dict[str, Any], backend: str) -> Tensor:
    rows = len(keywords.get("history", LENGTHS))
    attention = torch.zeros((rows, *steps[1:]) if len(steps) > 1 else (TOTAL if "history" in keywords else steps[0],))
    return augru(torch.zeros(*steps, 2), attention, torch.zeros(9, 2), torch.zeros(9, 3), **keywords, backend=backend)[
        0
    ]


def attention(steps: tuple[int, ...], keywords: dict[str, Any], backend: str) -> Tensor:
    rows = len(keywords.get("history", LENGTHS))
    total = TOTAL if "history" in keywords and "offsets" in keywords else None
    return attention_scores(
        torch.zeros(rows, 3), torch.zeros(*steps, 3), torch.zeros(3, 3), **keywords, rows_total=total, backend=backend
    )


def loss(steps: tuple[int, ...], keywords: dict[str, Any], backend: str) -> Tensor:
    states, behaviours = torch.zeros(*steps, 3), torch.zeros(*steps, 3)
    return auxiliary_loss(states, behaviours, behaviours, **keywords, backend=backend)


Call = Callable[[tuple[int, ...], dict[str, Any], str], Tensor]
CASES = [(call, name) for call in (recurrence, attention, loss) for name in OF_HISTORIES] + [
    (call, name) for call in (recurrence, attention) for name in OF_ROWS
]


@pytest.mark.skipif(not _native.available(), reason=f"native code is absent: {_native.reason()}")
@pytest.mark.parametrize("call, name", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_the_library_uses_the_words_of_python(call: Call, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords, steps = (OF_HISTORIES | OF_ROWS)[name]
    with pytest.raises(ValueError, match=" must ") as python:
        call(steps, keywords, "torch")
    for check in CHECKS:  # so that the library has to find the fault
        monkeypatch.setattr(Histories, check, lambda *_, **__: None)
    with pytest.raises(ValueError, match=" must ") as library:
        call(steps, keywords, "cpu")
    assert str(library.value) == str(python.value)
