"""``score`` in blocks of rows: what they hold, that they are the whole, and who may not have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dien_kernels.batch import Batch, Schema
from dien_kernels.models import MODELS, RankingModel, build
from dien_kernels.models import request as requests
from tests.models.common import model_of, random_batch

pytestmark = pytest.mark.usefixtures("one_thread")

HISTORY_OF = [2, 0, 2, 1, 2, 4, 4, 0, 2, 3]
LENGTHS = [3, 0, 5, 1, 2]


def shared(history_of: list[int] | None = HISTORY_OF, lengths: list[int] = LENGTHS) -> Batch:
    return replace(random_batch(lengths, history_of), negatives=None, label=None)


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    """History, target, user and number of every row, in plain values."""
    found = []
    for row in range(batch.rows):
        history = row if batch.history_of is None else int(batch.history_of[row])
        low, high = batch.offsets[history : history + 2].tolist()
        steps = tuple(tuple(ids[low:high].tolist()) for ids in batch.history.values())
        target = tuple(int(ids[row]) for ids in batch.target.values())
        assert batch.dense is not None
        found.append((steps, target, int(batch.users["user"][row]), float(batch.dense[row, 0])))
    return found


def score(model: RankingModel, batch: Batch, **more: Any) -> torch.Tensor:
    users = {}
    for name, ids in batch.users.items():  # of histories, where rows have them
        of = torch.zeros(batch.offsets.shape[0] - 1, dtype=torch.int64)
        of[torch.arange(batch.rows) if batch.history_of is None else batch.history_of] = ids
        users[name] = of
    return model.score(
        batch.history,
        batch.target,
        offsets=batch.offsets,
        history_of=batch.history_of,
        users=users,
        dense=batch.dense,
        **more,
    )


@pytest.mark.parametrize("block", [1, 3, 4, 9, 10, 11])
@pytest.mark.parametrize(
    "batch",
    [shared(), shared(None, [3, 0, 5, 1]), shared([0] * 7, [4]), shared(None, [])],
    ids=["of", "own", "one", ""],
)
def test_blocks_are_the_rows_with_the_histories_they_read(batch: Batch, block: int) -> None:
    found = list(requests.blocks(batch, block))
    assert [row for part in found for row in rows_of(part)] == rows_of(batch)
    for part in found:
        assert part.rows <= block
        assert part.offsets.shape[0] - 1 <= max(part.rows, batch.offsets.shape[0] - 1 if batch.rows <= block else 1)
        fresh = Batch(part.history, part.offsets, part.target, history_of=part.history_of)  # counts its steps itself
        assert part.rows_total == fresh.rows_total


def test_blocks_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block has more than ``STEPS`` with what a row costs, unless one row has; they end at multiples of 64."""
    monkeypatch.setattr(requests, "STEPS", 1000)
    lengths = [0, 5, 2000, 40, 3]
    rows = torch.tensor([0] * 700 + [1, 2, 2, 3, 4] * 20 + [3] * 50)
    batch = shared(rows.tolist(), lengths)
    found = list(requests.blocks(batch, None))
    assert [row for part in found for row in rows_of(part)] == rows_of(batch)
    assert all(part.rows == 1 or part.rows_total + 8 * part.rows <= 1000 for part in found)
    assert found[0].rows == 64
    assert len(found) < 100
    assert list(requests.blocks(shared(), None))[0].rows == 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block", [1, 3, 9])
def test_scores_of_blocks_are_those_of_the_whole(name: str, block: int) -> None:
    model, batch = model_of(name, {}).eval(), shared()
    torch.testing.assert_close(score(model, batch, block=block), score(model, batch), rtol=1e-12, atol=1e-14)


def test_even_blocks_are_equal_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = build("dien", Schema({"item": 500})).eval()
    history, targets = {"item": torch.randint(500, (30,))}, {"item": torch.randint(500, (640,))}
    whole = model.score(history, targets, block=640)
    for block in (64, 128, 320):
        assert torch.equal(model.score(history, targets, block=block), whole)


def test_no_block_reads_more_steps_than_agreed() -> None:
    model, seen = build("average", Schema({"item": 9}), {"head": {"units": [4]}}), []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].rows_total))
    history, targets = {"item": torch.ones(1000, dtype=torch.int64)}, {"item": torch.ones(2000, dtype=torch.int64)}
    assert model.score(history, targets).shape == (2000,)
    assert sum(seen) == 2_000_000
    assert max(seen) <= requests.STEPS
    assert model.training


@pytest.mark.parametrize(
    "options", [{"head.dice_statistics": "batch", "head.activation": "dice"}, {"head.norm": "batch"}]
)
def test_rows_that_depend_on_others_are_not_parted(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("din", options).eval(), shared()
    assert model.rows_depend_on_others
    whole = score(model, batch)
    monkeypatch.setattr(requests, "STEPS", 1)
    assert torch.equal(score(model, batch), whole)
    assert torch.equal(score(model, batch, block=10), whole)
    with pytest.raises(ValueError, match="block must be None or at least the 10 rows for a model whose .* got 9"):
        score(model, batch, block=9)
    assert not model_of("din", {}).rows_depend_on_others
    assert model_of("din", {}, "authors").rows_depend_on_others


@pytest.mark.parametrize("block, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_block_is_a_size(block: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="block must be"):
        score(model_of("average", {}), shared(), block=block)
