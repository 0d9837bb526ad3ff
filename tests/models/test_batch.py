"""``Batch``: what does not fit is said by name, when a batch is made and when it is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dien_kernels.batch import Batch
from tests.models.common import SCHEMA, random_batch

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = random_batch([3, 0, 2], [2, 0, 0, 1])  # rows_total = 8
ITEMS, OFFSETS, TARGET = GOOD.history, GOOD.offsets, GOOD.target
FOUR = torch.arange(4)
INDEX = "must be torch.int64 of shape"

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"history": {}}, ValueError, "history must have at least one field, got none"),
    ({"history": [1]}, TypeError, "history must be a mapping of fields to tensors, got list"),
    ({"history": {**ITEMS, "cat": [1]}}, TypeError, r"history\['cat'\] must be a torch.Tensor, got list"),
    (
        {"history": {"item": ITEMS["item"]}},
        ValueError,
        r"history must have the fields \['cat', 'item'\], got \['item'\]",
    ),
    ({"history": {**ITEMS, "cat": ITEMS["cat"][:4]}}, ValueError, rf"history\['cat'\] {INDEX} \(5,\), got .* \(4,\)"),
    ({"target": {}}, ValueError, r"target must have the fields \['cat', 'item'\], got \[\]"),
    ({"users": [1]}, TypeError, "users must be a mapping of fields to tensors, got list"),
    ({"users": {"user": FOUR.int()}}, ValueError, rf"users\['user'\] {INDEX} \(4,\), got torch.int32 \(4,\)"),
    ({"offsets": OFFSETS.float()}, ValueError, rf"offsets {INDEX} \[U \+ 1\], got torch.float32 \(4,\)"),
    ({"offsets": OFFSETS[None]}, ValueError, rf"offsets {INDEX} \[U \+ 1\], got torch.int64 \(1, 4\)"),
    ({"offsets": OFFSETS[0]}, ValueError, rf"offsets {INDEX} \[U \+ 1\], got torch.int64 \(\)"),
    ({"offsets": [0, 3, 3, 5]}, TypeError, "offsets must be a torch.Tensor, got list"),
    ({"offsets": OFFSETS[:0]}, ValueError, r"offsets must ascend from 0 to the number of behaviours, got \[\]"),
    (
        {"offsets": torch.tensor([0, 3, 2, 5])},
        ValueError,
        r"offsets must be ascending, got 3 before 2",
    ),
    ({"history_of": FOUR.int()}, ValueError, rf"history_of {INDEX} \[B\], got torch.int32 \(4,\)"),
    ({"history_of": FOUR[None]}, ValueError, rf"history_of {INDEX} \[B\], got torch.int64 \(1, 4\)"),
    ({"history_of": FOUR}, ValueError, "history_of must lie between 0 and U - 1 = 2, got values from 0 to 3"),
    ({"rows_total": 7}, ValueError, "rows_total must be 8, the steps of the histories named, got 7"),
    ({"label": FOUR[:3].float()}, ValueError, r"label must be torch.float32 of shape \(4,\), got torch.float32 \(3,\)"),
    ({"label": FOUR}, ValueError, r"label must be torch.float32 of shape \(4,\), got torch.int64 \(4,\)"),
    ({"label": [1.0] * 4}, TypeError, "label must be a torch.Tensor, got list"),
    ({"group": FOUR[:3]}, ValueError, rf"group {INDEX} \(4,\), got torch.int64 \(3,\)"),
    ({"group": FOUR.int()}, ValueError, rf"group {INDEX} \(4,\), got torch.int32 \(4,\)"),
    ({"negatives": {}}, ValueError, "negatives must have at least one field, got none"),
    ({"negatives": ITEMS}, ValueError, rf"negatives\['item'\] {INDEX} \(5, 1\), got torch.int64 \(5,\)"),
    (
        {"negatives": {name: ids[:, None][:, :0] for name, ids in ITEMS.items()}},
        ValueError,
        "negatives must be None or K >= 1 beside each behaviour, got K = 0",
    ),
    ({"dense": None}, ValueError, r"dense must have shape \(4, 1\), got None"),
    ({"dense": torch.zeros(4)}, ValueError, r"dense must have shape \(4, 1\), got \(4,\)"),
    ({"dense": [0.0] * 4}, TypeError, "dense must be a torch.Tensor, got list"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_check_names_what_does_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(GOOD, **changes).check(SCHEMA)


def test_check_takes_what_fits() -> None:
    own, none = random_batch([3, 0, 2]), random_batch([])
    for batch in (GOOD, replace(GOOD, group=FOUR), replace(GOOD, label=None, negatives=None), own, none):
        batch.check(SCHEMA)
    with pytest.raises(ValueError, match="rows_total must be 5, the steps of every row's history, got 4"):
        replace(own, rows_total=4).check(SCHEMA)


BAD_MADE: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Batch({}, OFFSETS, TARGET), ValueError, "history must have at least one field, got none"),
    (lambda: Batch({"item": [1]}, OFFSETS, TARGET), TypeError, r"history\['item'\] must be a torch.Tensor, got list"),  # type: ignore[dict-item]
    (
        lambda: reading(torch.tensor([0, 5])),
        ValueError,
        "history_of must lie between 0 and U - 1 = 2, got values from 0 to 5",
    ),
    (
        lambda: reading(torch.tensor([-1, 0])),
        ValueError,
        "history_of must lie between 0 and U - 1 = 2, got values from -1 to 0",
    ),
    (lambda: reading(FOUR.float()), ValueError, rf"history_of {INDEX} \[B\], got torch.float32 \(4,\)"),
    (lambda: reading([0, 1]), TypeError, "history_of must be a torch.Tensor, got list"),
    (lambda: reading(FOUR[:2], OFFSETS[0]), ValueError, rf"offsets {INDEX} \[U \+ 1\], got torch.int64 \(\)"),
    (lambda: Batch(ITEMS, OFFSETS, {}).rows, ValueError, "target must have at least one field, got none"),
    (lambda: reading(FOUR[:2], [0, 5]), TypeError, "offsets must be a torch.Tensor, got list"),
]


def reading(history_of: Any, offsets: Any = OFFSETS) -> Batch:
    return Batch(ITEMS, offsets, TARGET, history_of=history_of)


@pytest.mark.parametrize("make, error, message", BAD_MADE, ids=lambda v: v if isinstance(v, str) else "")
def test_a_batch_that_cannot_be_made(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_rows_total_is_counted_where_it_is_not_given() -> None:
    assert GOOD.rows_total == 8
    assert random_batch([3, 0, 2]).rows_total == 5
    assert reading(FOUR[:0]).rows_total == 0


@pytest.mark.slow
def test_check_is_one_graph_for_all_sizes() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def checked(batch: Batch) -> Tensor:
        batch.check(SCHEMA)
        return batch.offsets.diff()

    # Sizes that differ from one another and from those of the vocabularies, or a graph would take them for equal.
    for lengths, history_of in (([4, 0, 5], [2, 0, 0, 1, 2, 1]), ([4, 1, 6, 0], [3, 0, 0, 1, 2, 1, 2, 2])):
        batch = random_batch(lengths, history_of)
        batch = replace(batch, group=torch.arange(len(history_of)))
        assert checked(batch).tolist() == lengths
        with pytest.raises(RuntimeError, match="history_of has a value below 0 or above the last there is"):
            checked(replace(batch, history_of=torch.full_like(batch.history_of, 9)))
    assert len(graphs) == 1
