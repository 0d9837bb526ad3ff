"""A log small enough to be prepared by hand, and slow readings of what prepare and the loader should give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from dien_kernels.batch import Batch
from dien_kernels.data import Prepared, prepare

# Out of order, a tie at time 3, a user with one event.
TINY = pa.table(
    {
        "user": ["u2", "u1", "u1", "u1", "u2", "u3", "u1"],
        "item": ["x", "y", "x", "z", "y", "v", "w"],
        "category": ["A", "B", "A", "B", "B", "A", "C"],
        "timestamp": [5, 1, 3, 2, 6, 9, 3],
    }
)
ALL_TRAIN = (1.0, 0.0, 0.0)


def made(table: pa.Table, out: Path, **options: Any) -> Prepared:
    return prepare(table, out, **{"progress": False, "fractions": ALL_TRAIN, **options})


def rows_of(prepared: Prepared, batch: Batch) -> Iterator[tuple[str, tuple[Any, ...], Any, float]]:
    """User, history, target and label of every row of a batch, in raw values."""
    items = prepared.schema.items
    assert batch.label is not None
    assert batch.group is not None
    for row in range(batch.rows):
        history = row if batch.history_of is None else int(batch.history_of[row])
        low, high = int(batch.offsets[history]), int(batch.offsets[history + 1])
        for field in list(items)[1:]:  # every field is the one of the item
            for ids in ("history", "target", "negatives"):
                values = getattr(batch, ids)
                if values is not None:
                    table = prepared.item_fields[field]
                    assert values[field].tolist() == table[values["item"].numpy()].tolist()
        yield (
            prepared.user_names[int(batch.group[row])].as_py(),
            tuple(prepared.item_name(number) for number in batch.history["item"][low:high].tolist()),
            prepared.item_name(int(batch.target["item"][row])),
            float(batch.label[row]),
        )


def slow_samples(
    log: list[tuple[Any, ...]], *, every: bool, given: bool, max_length: int
) -> list[tuple[Any, tuple[Any, ...], Any, float]]:
    """The samples of a log of (user, item, time, label), all of them for training, by the definition."""
    found = []
    for user in {row[0] for row in log}:
        mine = sorted((row for row in log if row[0] == user), key=lambda row: row[2])
        for place, (_, item, time, label) in enumerate(mine):
            if given:
                past = [row[1] for row in mine if row[3] == 1 and row[2] < time]
                found.append((user, tuple(past[-max_length:]), item, float(label)))
            elif place > 0 and (every or place == len(mine) - 1):
                past = [row[1] for row in mine[:place]]
                found.append((user, tuple(past[-max_length:]), item, 1.0))
    return found
