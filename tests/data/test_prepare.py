"""The prepared folder of a log that is worked out by hand, and that bounds of memory change nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_logs import TINY, made

from dien_kernels.data import Prepared, prepare, synthetic


def samples(prepared: Prepared, split: str) -> list[tuple[int, ...]]:
    part = prepared.split(split)
    columns = [part.user, part.end, part.target] + ([] if part.label is None else [part.label])
    return [tuple(int(value) for value in row) for row in zip(*columns, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_vocabularies_and_histories_by_hand(tmp_path: Path) -> None:
    prepared = made(TINY, tmp_path / "p")
    items, categories = prepared.vocabulary("item"), prepared.vocabulary("category")
    # x and y twice, v, w and z once: ties go by name; categories A and B 3 times, C once.
    assert items.values.to_pylist() == ["x", "y", "v", "w", "z"]
    assert items.counts.tolist() == [0, 2, 2, 1, 1, 1]
    assert categories.values.to_pylist() == ["A", "B", "C"]
    assert prepared.schema.to_dict() == {"items": {"item": 6, "category": 4}, "users": {}, "dense": []}
    assert prepared.item_fields["category"].tolist() == [0, 1, 2, 1, 3, 2]
    assert prepared.user_names.to_pylist() == ["u1", "u2", "u3"]
    assert prepared.offsets.tolist() == [0, 4, 6, 7]
    # u1: y at 1, z at 2, then x before w at 3 as in the log.
    assert prepared.behaviours.tolist() == [2, 5, 1, 4, 1, 2, 3]
    assert prepared.history(1).tolist() == [1, 2]
    assert samples(prepared, "train") == [(0, 3, 4), (1, 5, 2)]
    assert prepared.encode_items(["z", "nothing", None, "x"]).tolist() == [5, 0, 0, 1]
    assert [prepared.item_name(number) for number in range(6)] == [None, "x", "y", "v", "w", "z"]
    assert prepared.encode_users(["u3", "u9"]).tolist() == [2, -1]
    report = prepared.meta["report"]
    assert (report["out_of_order"], report["one_event_users"], report["rows"]) == (1, 1, 7)
    assert "one_event_users 1" in prepared.summary()


def test_every_position_is_a_target_in_training_only(tmp_path: Path) -> None:
    every = made(TINY, tmp_path / "every", targets="every")
    assert samples(every, "train") == [(0, 1, 5), (0, 2, 1), (0, 3, 4), (1, 5, 2)]
    by_time = made(TINY, tmp_path / "time", targets="every", split="time", fractions=(0.5, 0, 0.5))
    # Last targets at 3 (u1) and 6 (u2): test begins at 6. u1's are training, u2's is test.
    assert samples(by_time, "train") == [(0, 1, 5), (0, 2, 1), (0, 3, 4)]
    assert samples(by_time, "valid") == []
    assert samples(by_time, "test") == [(1, 5, 2)]
    # u2 has x and y, so that its negative is v, w or z.
    assert by_time.split("test").negatives.tolist() in ([[3]], [[4]], [[5]])  # type: ignore[union-attr]
    last = made(TINY, tmp_path / "last", split="time", fractions=(0.5, 0, 0.5))
    assert samples(last, "train") == [(0, 3, 4)]
    assert samples(last, "test") == [(1, 5, 2)]


GIVEN = pa.table(
    {
        "user": [7, 7, 7, 7, 7, 8, 8],
        "item": [1, 2, 3, 4, 1, 1, 5],
        "timestamp": [1, 2, 2, 3, 4, 1, 2],
        "label": [1, 0, 1, 1, 0, 0, 0],
        "age": ["old", "old", "old", "old", "old", None, "new"],
        "price": [0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    }
)
FIELDS = {"user_fields": ["age"], "dense": ["price"]}


def test_given_labels_by_hand(tmp_path: Path) -> None:
    prepared = made(GIVEN, tmp_path / "p", labels="given", columns=FIELDS)
    # All rows count for the vocabulary (1 three times), clicks alone are behaviours.
    assert prepared.vocabulary("item").values.to_pylist() == [1, 2, 3, 4, 5]
    assert prepared.behaviours.tolist() == [1, 3, 4]
    assert prepared.offsets.tolist() == [0, 3, 3]
    # The impressions at time 2 do not see the click at time 2.
    assert samples(prepared, "train") == [
        (0, 0, 1, 1),
        (0, 1, 2, 0),
        (0, 1, 3, 1),
        (0, 2, 4, 1),
        (0, 3, 1, 0),
        (1, 3, 1, 0),
        (1, 3, 5, 0),
    ]
    train = prepared.split("train")
    assert prepared.vocabulary("age").values.to_pylist() == ["old", "new"]
    assert train.users["age"].tolist() == [1, 1, 1, 1, 1, 0, 2]
    assert train.dense["price"].tolist() == [0.5, 1, 2, 3, 4, 5, 6]
    assert prepared.meta["report"]["empty_histories"] == 3
    assert prepared.split("valid").negatives is None


def test_given_labels_by_time_and_by_user(tmp_path: Path) -> None:
    by_time = made(GIVEN, tmp_path / "t", labels="given", split="time", fractions=(0.6, 0.2, 0.2), columns=FIELDS)
    # Times 1 1 2 2 2 3 4: valid begins at the fifth, 2, and test at the last, 4.
    assert {split: [row[2] for row in samples(by_time, split)] for split in ("train", "valid", "test")} == {
        "train": [1, 1],
        "valid": [2, 3, 4, 5],
        "test": [1],
    }
    by_user = made(GIVEN, tmp_path / "u", labels="given", fractions=(0.5, 0.5, 0), columns=FIELDS)
    users = [{row[0] for row in samples(by_user, split)} for split in ("train", "valid")]
    assert sorted(users, key=str) == [{0}, {1}]


def test_min_count_and_conflicts(tmp_path: Path) -> None:
    table = TINY.set_column(2, "category", pa.array(["A", "B", "D", None, "B", "A", "C"]))
    prepared = made(table, tmp_path / "p", min_count={"item": 2})
    assert prepared.vocabulary("item").values.to_pylist() == ["x", "y"]
    assert prepared.vocabulary("item").counts.tolist() == [3, 2, 2]
    assert prepared.behaviours.tolist() == [2, 0, 1, 0, 1, 2, 0]
    report = prepared.meta["report"]
    assert (report["rare_items"], report["conflicts:category"]) == (3, 1)  # x stays A, its first category
    assert prepared.vocabulary("category").name(int(prepared.item_fields["category"][1])) == "A"


def test_splits_by_user_are_shares_of_the_users_with_samples(tmp_path: Path) -> None:
    log = synthetic(users=203, items=50, categories=5, events=1200)
    parts = {}
    for seed in (0, 1):
        prepared = made(log, tmp_path / str(seed), fractions=(0.8, 0.1, 0.1), seed=seed, negatives=3)
        users = {split: prepared.split(split).user.tolist() for split in ("train", "valid", "test")}
        assert {split: len(set(found)) for split, found in users.items()} == {
            "train": 163,
            "valid": 20,
            "test": 20,
        }
        assert sorted(sum(users.values(), [])) == list(range(203))
        assert prepared.split("valid").negatives.shape == (20, 3)  # type: ignore[union-attr]
        parts[seed] = users["test"]
    assert parts[0] != parts[1]


@pytest.mark.parametrize("options", [{"targets": "every"}, {"split": "time"}, {"labels": "given"}])
def test_chunks_and_partitions_change_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    """The same bytes, however little is held in memory at a time."""
    log = synthetic(users=60, items=50, categories=5, events=600)
    log = log.append_column("label", pa.array(np.arange(log.num_rows) % 2))
    log = log.append_column("device", pa.array(np.arange(log.num_rows) % 3))
    pq.write_table(log, tmp_path / "log.parquet")
    common = dict(options, columns={"user_fields": ["device"]}, fractions=(0.8, 0.1, 0.1))
    made(log, tmp_path / "whole", **common)
    for name, chunk, part in (("a", 7, 40), ("b", 100, 1), ("c", 1000, 333)):
        prepare(
            tmp_path / "log.parquet",
            tmp_path / name,
            progress=False,
            chunk_rows=chunk,
            partition_rows=part,
            **common,
        )
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_order_of_the_log_matters_only_for_equal_times(tmp_path: Path) -> None:
    log = synthetic(users=40, items=30, categories=3, events=400)
    shuffled = log.take(pa.array(np.random.default_rng(0).permutation(log.num_rows)))
    first = made(log, tmp_path / "a", fractions=(0.8, 0.1, 0.1))
    second = made(shuffled, tmp_path / "b", fractions=(0.8, 0.1, 0.1))
    assert first.fingerprint == second.fingerprint
    assert first.meta["report"]["out_of_order"] == 0
    assert second.meta["report"]["out_of_order"] > 0


def test_users_who_own_everything_give_no_samples(tmp_path: Path) -> None:
    table = pa.table({"user": [1, 1, 1, 2, 2, 3, 3], "item": [1, 2, 3, 1, 2, 2, 3], "timestamp": [1, 2, 3, 4, 5, 6, 7]})
    prepared = made(table, tmp_path / "p", split="time", fractions=(0.7, 0, 0.3), negatives=4)
    assert prepared.meta["report"]["users_owning_every_item"] == 1
    assert [row[0] for row in samples(prepared, "train")] == [1]
    # Item 1 is all that is left to user 3.
    only = prepared.encode_items([1] * 4).tolist()
    assert prepared.split("test").negatives.tolist() == [only]  # type: ignore[union-attr]


def test_real_log_if_it_is_there(tmp_path: Path) -> None:
    """The layout of amazon-toys.parquet (int32, position as time); the file itself where it is there."""
    path = Path(__file__).parents[3] / "shared" / "data" / "amazon-toys.parquet"
    if not path.exists():
        path = tmp_path / "log.parquet"
        log = synthetic(users=100, items=50, categories=5, events=1000).to_pydict()
        names = {"user_id": "user", "item_id": "item", "category_id": "category", "timestamp": "timestamp"}
        pq.write_table(pa.table({new: pa.array(log[old], pa.int32()) for new, old in names.items()}), path)
    raw = pq.read_table(path)
    prepared = prepare(path, tmp_path / "p", progress=False)
    assert prepared.behaviours.size == raw.num_rows
    assert prepared.schema.items["category"] == len(raw["category_id"].unique()) + 1
    users = raw["user_id"].to_numpy()
    first = raw.filter(pa.array(users == users[0])).sort_by("timestamp")["item_id"]
    number = int(prepared.encode_users([int(users[0])])[0])
    assert [prepared.item_name(i) for i in prepared.history(number).tolist()] == first.to_pylist()


BAD = [
    ({"labels": "both"}, "labels must be one of .*'both'"),
    ({"targets": "first"}, "targets must be one of"),
    ({"split": "item"}, "split must be one of"),
    ({"negative_sampling": "hard"}, "negative_sampling must be one of"),
    ({"fractions": (0.5, 0.5)}, "fractions must be three shares"),
    ({"fractions": (0.8, 0.3, -0.1)}, "fractions must be three shares"),
    ({"negatives": 0}, "negatives must be an integer of at least 1, got 0"),
    ({"min_count": {"colour": 2}}, "min_count must name fields of .*'colour'"),
    ({"min_count": 0}, "min_count of 'item' must be an integer of at least 1, got 0"),
    ({"max_bad_lines": -1}, "max_bad_lines must be an integer and not be negative, got -1"),
    ({"max_bad_lines": "many"}, "max_bad_lines must be an integer and not be negative, got 'many'"),
    ({"fractions": 0.8}, "fractions must be three shares with the sum 1, got 0.8"),
    ({"fractions": ("a", "b", "c")}, "fractions must be three shares with the sum 1, got"),
    ({"fractions": (float("nan"), 0, 0)}, "fractions must be three shares"),
    ({"chunk_rows": 0}, "chunk_rows must be an integer of at least 1"),
    ({"labels": "given"}, "the table has no label column"),
    ({"fractions": (0.4, 0.3, 0.3)}, "split 'train' got no sample: 2 of 3 users have two behaviours or more"),
    ({"split": "time", "fractions": (0.1, 0.5, 0.4)}, "split 'train' got no sample.*valid begins at time 3"),
]


@pytest.mark.parametrize("options, words", BAD, ids=lambda value: str(value)[:30])
def test_bad_options_say_what_is_allowed_and_leave_nothing(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(TINY, tmp_path / "p", **options)
    assert not (tmp_path / "p").exists()


def test_logs_without_usable_rows(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\n,b,1\na\n")
    with pytest.raises(
        ValueError, match=r"no usable row in .*log\.csv; bad lines: 2, the first: log\.csv:\d: "
    ) as found:
        prepare(tmp_path / "log.csv", tmp_path / "p", progress=False)
    assert re.search(r"log\.csv:(2: user is missing|3: 1 columns instead of 3)$", str(found.value))
    with pytest.raises(ValueError, match="no usable row in the table$"):
        made(TINY.slice(0, 0), tmp_path / "p")
    with pytest.raises(ValueError, match="split 'train' got no sample: 0 of 3 users"):
        made(TINY.take(pa.array([0, 1, 5])), tmp_path / "p")
    one = TINY.set_column(1, "item", pa.array(["x"] * 7))
    with pytest.raises(ValueError, match="2 of 3 users have two behaviours or more and 3 users have had every item"):
        made(one, tmp_path / "p")
    huge = TINY.set_column(1, "item", pa.array([2**64 - 1] * 7, pa.uint64()))
    with pytest.raises(ValueError, match=r"item 18446744073709551615 is no id; an id is a whole number below 2\^63"):
        made(huge, tmp_path / "p")
    with pytest.raises(ValueError, match="no row has the label 1"):
        made(TINY.append_column("label", pa.array([0] * 7)), tmp_path / "p", labels="given")
    plain = TINY.select(["user", "item"])
    for number, time in enumerate([[1] * 7, [1.5] * 7]):
        pq.write_table(plain.append_column("timestamp", pa.array(time)), tmp_path / f"{number}.parquet")
    with pytest.raises(ValueError, match="timestamp 1.5 has a fraction, and the numbers before it have none"):
        prepare(tmp_path, tmp_path / "p", progress=False)
    with pytest.raises(
        ValueError, match="no usable row in the table; bad lines: 7, the first: table:1: item 0.5 is no id"
    ):
        made(TINY.set_column(1, "item", pa.array([0.5] * 7)), tmp_path / "p")


def test_folders_that_are_taken(tmp_path: Path) -> None:
    made(TINY, tmp_path / "p")
    with pytest.raises(FileExistsError, match="prepared already; overwrite=True"):
        made(TINY, tmp_path / "p")
    assert made(TINY, tmp_path / "p", overwrite=True, targets="every").split_size("train") == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files .thesis.txt."):
        made(TINY, tmp_path / "other", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        made(TINY, tmp_path / "other" / "thesis.txt")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "meta.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match="of another program"):
        made(TINY, tmp_path / "meta", overwrite=True)


def test_a_failure_leaves_what_was_to_be_replaced(tmp_path: Path) -> None:
    """A log that turns out to be useless half way must not cost the data that are there."""
    made(TINY, tmp_path / "p")
    before = contents(tmp_path / "p")
    for useless in (TINY.slice(0, 0), TINY.take(pa.array([0, 1, 5]))):
        with pytest.raises(ValueError):
            made(useless, tmp_path / "p", overwrite=True)
        assert contents(tmp_path / "p") == before
    (tmp_path / "p" / ".new").mkdir()  # of a prepare that was killed
    (tmp_path / "p" / ".new" / "train.arrow").write_text("half")
    fresh = made(TINY, tmp_path / "p", overwrite=True, targets="every")
    made(TINY, tmp_path / "q", targets="every")
    assert contents(tmp_path / "p") == contents(tmp_path / "q")
    assert fresh.split_size("train") == 4


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    bytes_of = pa.array([b"caf\xe9"] * 7).view(pa.string())
    with pytest.raises(ValueError, match=r"item b'caf\\xe9' is no id; an id is .* text in UTF-8"):
        made(TINY.set_column(1, "item", bytes_of), tmp_path / "p")
