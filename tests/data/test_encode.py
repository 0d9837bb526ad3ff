"""Logs with the ids of another folder: of its kinds, by its buckets, and without what it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from folders import users_of
from small_logs import made

from dien_kernels.data import synthetic, verify
from dien_kernels.data.encode import encode


def test_integers_are_found_among_text_and_text_is_refused_among_integers(tmp_path: Path) -> None:
    table = pa.table({"user": ["a", "a", "b"], "item": ["1", "2", "3"], "timestamp": [1, 2, 1]})
    text = made(table, tmp_path / "text")
    day = pa.table({"user": ["c", "c"], "item": [2, 3], "timestamp": [5, 6]})
    encode(day, tmp_path / "new", text)
    assert users_of(tmp_path / "new")["c"]["item"] == ["2", "3"]
    numbers = made(table.set_column(1, "item", pa.array([1, 2, 3])), tmp_path / "numbers")
    with pytest.raises(ValueError, match="'item' must hold integers, as in .*, got text"):
        encode(day.set_column(1, "item", pa.array(["x", "y"])), tmp_path / "bad", numbers)


def test_values_fall_into_the_buckets_of_the_folder(tmp_path: Path) -> None:
    log = synthetic(users=40, items=200, categories=5, events=600)
    prepared = made(log, tmp_path / "p", targets="every", buckets={"item": 30})
    new = encode(log, tmp_path / "new", prepared)
    assert new.encode_items(np.arange(200)).tolist() == prepared.encode_items(np.arange(200)).tolist()
    assert new.item_counts.tolist() == prepared.item_counts.tolist()
    assert verify(new) == []


def test_duplicates_that_the_folder_drops_are_in_no_count(tmp_path: Path) -> None:
    log = synthetic(users=40, items=50, categories=5, events=400)
    prepared = made(log, tmp_path / "p", targets="every", duplicates="drop")
    new = encode(pa.concat_tables([log, log]), tmp_path / "new", prepared)
    assert new.item_counts.tolist() == prepared.item_counts.tolist()
    assert verify(new) == []
