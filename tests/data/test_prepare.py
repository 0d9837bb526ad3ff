"""The prepared folder of logs that are worked out by hand, and of random ones against a slow definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import bytes_of, meta_of, names_of, samples_of, users_of
from small_logs import TINY, made, slow_samples

from dien_kernels.data import _deal, append, prepare, synthetic
from dien_kernels.data._deal import Tally


def test_vocabularies_and_histories_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    made(TINY, folder)
    # x and y twice, v, w and z once: ties go by name; categories A and B 3 times, C once.
    assert names_of(folder, "item") == [None, "x", "y", "v", "w", "z"]
    assert pq.read_table(folder / "vocabulary-item.parquet")["count"].to_pylist() == [2, 2, 1, 1, 1]
    assert names_of(folder, "category") == [None, "A", "B", "C"]
    meta, items = meta_of(folder), pq.read_table(folder / "items.parquet")
    assert meta["schema"] == {"items": {"item": 6, "category": 4}, "users": {}, "dense": []}
    assert items["category"].to_pylist() == [0, 1, 2, 1, 3, 2]
    assert items["count"].to_pylist() == [0, 2, 2, 1, 1, 1]
    # u1: y at 1, z at 2, then x before w at 3 as in the log.
    users = users_of(folder)
    assert {user: row["item"] for user, row in users.items()} == {
        "u1": ["y", "z", "x", "w"],
        "u2": ["x", "y"],
        "u3": ["v"],
    }
    assert users["u1"]["time"] == [1, 2, 3, 3]
    assert samples_of(folder, "train") == [("u1", 3, "w"), ("u2", 1, "y")]
    assert (meta["report"]["out_of_order"], meta["report"]["one_event_users"], meta["report"]["rows"]) == (1, 1, 7)
    assert meta["counts"] == {"users": 3, "behaviours": 7, "samples": {"train": 2, "valid": 0, "test": 0}}


def test_every_position_is_a_target_in_training_only(tmp_path: Path) -> None:
    made(TINY, tmp_path / "every", targets="every")
    assert samples_of(tmp_path / "every", "train") == [("u1", 1, "z"), ("u1", 2, "x"), ("u1", 3, "w"), ("u2", 1, "y")]
    made(TINY, tmp_path / "time", targets="every", split="time", fractions=(0.5, 0, 0.5))
    # Last targets at 3 (u1) and 6 (u2): test begins at 6. u1's are training, u2's is test.
    assert samples_of(tmp_path / "time", "train") == [("u1", 1, "z"), ("u1", 2, "x"), ("u1", 3, "w")]
    assert samples_of(tmp_path / "time", "valid") == []
    assert samples_of(tmp_path / "time", "test") == [("u2", 1, "y")]
    made(TINY, tmp_path / "last", split="time", fractions=(0.5, 0, 0.5))
    assert samples_of(tmp_path / "last", "train") == [("u1", 3, "w")]
    assert samples_of(tmp_path / "last", "test") == [("u2", 1, "y")]


GIVEN = pa.table(
    {
        "user": [7, 7, 7, 7, 7, 8, 8],
        "item": [1, 2, 3, 4, 1, 1, 5],
        "timestamp": [1, 2, 2, 3, 4, 1, 2],
        "label": [1, 0, 1, 1, 0, 0, 0],
        "age": ["old", "old", "old", "old", "old", None, "new"],
        "price": [0.5, 1.0, 2.0, 3.0, 4.0, 5.0, None],
    }
)
FIELDS = {"user_fields": ["age"], "dense": ["price"]}


def test_given_labels_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    made(GIVEN, folder, labels="given", columns=FIELDS)
    # All rows count for the vocabulary (1 three times), clicks alone are behaviours.
    assert names_of(folder, "item") == [None, 1, 2, 3, 4, 5]
    assert pq.read_table(folder / "items.parquet")["count"].to_pylist() == [0, 1, 0, 1, 1, 0]
    users = users_of(folder)
    assert (users[7]["item"], users[8]["item"]) == ([1, 3, 4], [])
    # The impressions at time 2 do not see the click at time 2.
    seven, eight = samples_of(folder, "train")[:5], samples_of(folder, "train")[5:]
    assert seven == [(7, 0, 1, 1), (7, 1, 2, 0), (7, 1, 3, 1), (7, 2, 4, 1), (7, 3, 1, 0)]
    assert eight == [(8, 0, 1, 0), (8, 0, 5, 0)]
    assert names_of(folder, "age") == [None, "old", "new"]
    assert (users[7]["user.age"], users[8]["user.age"]) == ([1, 1, 1, 1, 1], [0, 2])
    assert users[7]["dense.price"] == [0.5, 1, 2, 3, 4]
    assert users[8]["dense.price"][0] == 5
    assert math.isnan(users[8]["dense.price"][1])
    report = meta_of(folder)["report"]
    assert report["empty_histories"] == 3
    # Of four negatives, one repeats an item of its history (1 at time 4); of three positives none does.
    assert (report["negatives"], report["negatives_in_history"]) == (4, 1)
    assert (report["positives"], report["positives_in_history"]) == (3, 0)


def test_given_labels_by_time_and_by_user(tmp_path: Path) -> None:
    made(GIVEN, tmp_path / "t", labels="given", split="time", fractions=(0.6, 0.2, 0.2), columns=FIELDS)
    # Times 1 1 2 2 2 3 4: valid begins at the fifth, 2, and test at the last, 4.
    assert {split: sorted(row[2] for row in samples_of(tmp_path / "t", split)) for split in ("train", "valid")} == {
        "train": [1, 1],
        "valid": [2, 3, 4, 5],
    }
    assert samples_of(tmp_path / "t", "test") == [(7, 3, 1, 0)]
    made(GIVEN, tmp_path / "u", labels="given", fractions=(0.5, 0.5, 0), columns=FIELDS)
    users = [{row[0] for row in samples_of(tmp_path / "u", split)} for split in ("train", "valid")]
    assert sorted(users, key=str) == [{7}, {8}]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_random_logs_have_the_samples_of_the_definition(tmp_path: Path, given: bool, every: bool) -> None:
    random = np.random.default_rng(3)
    users, items = random.integers(0, 25, 400), random.integers(0, 30, 400)
    times, labels = random.integers(0, 40, 400), random.integers(0, 2, 400)
    table = pa.table({"user": users, "item": items, "timestamp": times, "label": labels})
    made(table, tmp_path / "p", labels="given" if given else "next", targets="every" if every else "last")
    log = list(zip(users.tolist(), items.tolist(), times.tolist(), labels.tolist(), strict=True))
    wanted = slow_samples(log, every=every, given=given, max_length=1000)
    histories = {user: row["item"] for user, row in users_of(tmp_path / "p").items()}
    found = [
        (row[0], tuple(histories[row[0]][: row[1]]), row[2], float(row[3]) if given else 1.0)
        for row in samples_of(tmp_path / "p", "train")
    ]
    assert sorted(found, key=str) == sorted(wanted, key=str)


def test_min_count_and_conflicts(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    table = TINY.set_column(2, "category", pa.array(["A", "B", "D", None, "B", "A", "C"]))
    made(table, folder, min_count={"item": 2})
    vocabulary = pq.read_table(folder / "vocabulary-item.parquet")
    assert vocabulary["value"].to_pylist() == ["x", "y"]
    assert vocabulary.schema.metadata[b"unknown"] == b"3"
    assert pq.read_table(folder / "items.parquet")["count"].to_pylist() == [3, 2, 2]
    assert users_of(folder)["u1"]["item"] == ["y", None, "x", None]
    report = meta_of(folder)["report"]
    assert (report["rare_items"], report["conflicts:category"]) == (3, 1)  # x stays A, its first category
    first = pq.read_table(folder / "items.parquet")["category"][1].as_py()
    assert names_of(folder, "category")[first] == "A"


def test_splits_by_user_are_shares_of_the_users_with_samples(tmp_path: Path) -> None:
    log = synthetic(users=203, items=50, categories=5, events=1200)
    parts = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        made(log, folder, fractions=(0.8, 0.1, 0.1), seed=seed)
        users = {split: [row[0] for row in samples_of(folder, split)] for split in ("train", "valid", "test")}
        assert {split: len(found) for split, found in users.items()} == {"train": 163, "valid": 20, "test": 20}
        assert sorted(sum(users.values(), [])) == list(range(203))
        parts[seed] = users["test"]
    assert parts[0] != parts[1]


def test_a_user_keeps_its_split_when_others_come(tmp_path: Path) -> None:
    """The draw of a user depends on the user and the seed alone; only the thresholds follow the shares."""
    log = synthetic(users=300, items=50, categories=5, events=2000)
    made(log, tmp_path / "all", fractions=(0.5, 0.25, 0.25))
    made(log.filter(pa.array(log["user"].to_numpy() < 200)), tmp_path / "some", fractions=(0.5, 0.25, 0.25))
    of = [
        {row[0]: split for split in ("train", "valid", "test") for row in samples_of(tmp_path / name, split)}
        for name in ("all", "some")
    ]
    same = sum(of[0][user] == split for user, split in of[1].items())
    assert same > 0.9 * len(of[1])


@pytest.mark.parametrize("options", [{"targets": "every"}, {"split": "time"}, {"labels": "given"}])
def test_chunks_change_nothing_and_shards_only_the_files(tmp_path: Path, options: dict[str, Any]) -> None:
    log = synthetic(users=60, items=50, categories=5, events=600)
    log = log.append_column("label", pa.array(np.arange(log.num_rows) % 2))
    log = log.append_column("device", pa.array(np.arange(log.num_rows) % 3))
    pq.write_table(log, tmp_path / "log.parquet")
    common = dict(options, columns={"user_fields": ["device"]}, fractions=(0.8, 0.1, 0.1))
    made(log, tmp_path / "whole", **common)
    for name, chunk in (("a", 7), ("b", 100)):
        prepare(tmp_path / "log.parquet", tmp_path / name, progress=False, chunk_rows=chunk, **common)
        files, whole = bytes_of(tmp_path / name), bytes_of(tmp_path / "whole")
        files.pop("meta.json"), whole.pop("meta.json")  # what was seen of each source is in it
        assert files == whole
    prepare(tmp_path / "log.parquet", tmp_path / "many", progress=False, shard_rows=40, **common)
    assert len(meta_of(tmp_path / "many")["shards"]) > 8
    for split in ("train", "valid", "test"):
        assert samples_of(tmp_path / "many", split) == samples_of(tmp_path / "whole", split)
    assert meta_of(tmp_path / "many")["report"] == meta_of(tmp_path / "whole")["report"]


def test_row_groups_hold_no_more_users_and_behaviours_than_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dien_kernels.data._user_lists as lists

    monkeypatch.setattr(lists, "GROUP_USERS", 16)
    monkeypatch.setattr(lists, "GROUP_BEHAVIOURS", 100)
    log = synthetic(users=60, items=50, categories=5, events=600)
    made(log, tmp_path / "p", targets="every", fractions=(0.8, 0.1, 0.1))
    meta = meta_of(tmp_path / "p")
    groups = meta["shards"][0]["groups"]
    file = pq.ParquetFile(tmp_path / "p" / meta["shards"][0]["file"])
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [g["users"] for g in groups]
    assert all(g["users"] <= 16 and (g["behaviours"] <= 100 or g["users"] == 1) for g in groups)
    assert sum(g["samples"]["train"] for g in groups) == meta["counts"]["samples"]["train"]
    # Users of valid and test stand together, so that most groups have samples of one split only.
    assert sum(g["samples"]["valid"] > 0 for g in groups) <= 2


def test_order_of_the_log_matters_only_for_equal_times(tmp_path: Path) -> None:
    log = synthetic(users=40, items=30, categories=3, events=400)
    shuffled = log.take(pa.array(np.random.default_rng(0).permutation(log.num_rows)))
    made(log, tmp_path / "a", fractions=(0.8, 0.1, 0.1))
    made(shuffled, tmp_path / "b", fractions=(0.8, 0.1, 0.1))
    first, second = meta_of(tmp_path / "a"), meta_of(tmp_path / "b")
    assert first["fingerprint"] == second["fingerprint"]
    assert first["report"].get("out_of_order", 0) == 0
    assert second["report"]["out_of_order"] > 0


def test_users_who_own_everything_give_no_samples(tmp_path: Path) -> None:
    table = pa.table({"user": [1, 1, 1, 2, 2, 3, 3], "item": [1, 2, 3, 1, 2, 2, 3], "timestamp": [1, 2, 3, 4, 5, 6, 7]})
    made(table, tmp_path / "p", split="time", fractions=(0.7, 0, 0.3))
    assert meta_of(tmp_path / "p")["report"]["users_owning_every_item"] == 1
    assert samples_of(tmp_path / "p", "train") == [(2, 1, 2)]
    assert samples_of(tmp_path / "p", "test") == [(3, 1, 3)]


def test_real_log_if_it_is_there(tmp_path: Path) -> None:
    """The layout of amazon-toys.parquet (int32, position as time); the file itself where it is there."""
    path = Path(__file__).parents[3] / "shared" / "data" / "amazon-toys.parquet"
    if not path.exists():
        path = tmp_path / "log.parquet"
        log = synthetic(users=100, items=50, categories=5, events=1000).to_pydict()
        names = {"user_id": "user", "item_id": "item", "category_id": "category", "timestamp": "timestamp"}
        pq.write_table(pa.table({new: pa.array(log[old], pa.int32()) for new, old in names.items()}), path)
    raw = pq.read_table(path)
    prepare(path, tmp_path / "p", progress=False)
    meta = meta_of(tmp_path / "p")
    assert meta["counts"]["behaviours"] == raw.num_rows
    assert meta["schema"]["items"]["category"] == len(raw["category_id"].unique()) + 1
    users = raw["user_id"].to_numpy()
    first = raw.filter(pa.array(users == users[0])).sort_by("timestamp")["item_id"]
    assert users_of(tmp_path / "p")[int(users[0])]["item"] == first.to_pylist()


BAD = [
    ({"labels": "both"}, "labels must be one of .*'both'"),
    ({"targets": "first"}, "targets must be one of"),
    ({"split": "item"}, "split must be one of"),
    ({"negative_sampling": "hard"}, "negative_sampling must be one of"),
    ({"duplicates": "merge"}, "duplicates must be one of .*'merge'"),
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
    ({"shard_rows": 0}, "shard_rows must be an integer of at least 1"),
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
    with pytest.raises(ValueError, match=r"no usable row in .*log\.csv; bad lines: 2, the first: log\.csv:\d: "):
        prepare(tmp_path / "log.csv", tmp_path / "p", progress=False)
    with pytest.raises(ValueError, match="no usable row in the table$"):
        made(TINY.slice(0, 0), tmp_path / "p")
    with pytest.raises(ValueError, match="split 'train' got no sample: 0 of 3 users"):
        made(TINY.take(pa.array([0, 1, 5])), tmp_path / "p")
    one = TINY.set_column(1, "item", pa.array(["x"] * 7))
    with pytest.raises(ValueError, match="2 of 3 users have two behaviours or more and 2 users have had every item"):
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


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    bytes_of = pa.array([b"caf\xe9"] * 7).view(pa.string())
    with pytest.raises(ValueError, match=r"item b'caf\\xe9' is no id; an id is .* text in UTF-8"):
        made(TINY.set_column(1, "item", bytes_of), tmp_path / "p")


def test_counts_in_files_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of many distinct values go to temporary files, which are gone afterwards."""
    log = synthetic(users=60, items=200, categories=9, events=1500)
    log = log.append_column("page", pa.array([f"p{n % 300}" for n in range(log.num_rows)]))
    options: dict[str, Any] = {"columns": {"behaviour_fields": ["page"]}, "chunk_rows": 100, "min_count": 2}
    plain = made(log, tmp_path / "memory", **options)
    before, stored = Tally._store, []

    def counted(files: Any, part: Any) -> None:
        stored.append(part.columns)
        before(files, part)

    monkeypatch.setattr(_deal, "_MERGE", 150)
    monkeypatch.setattr(Tally, "_store", staticmethod(counted))
    again = made(log, tmp_path / "files", **options)
    assert {tuple(columns) for columns in stored} == {
        ("item", "category", "rows", "behaviours", "first"),
        ("page", "rows"),
    }
    assert again.fingerprint == plain.fingerprint
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == sorted(p.name for p in plain.path.iterdir())
    day = log.set_column(
        log.column_names.index("timestamp"), "timestamp", pa.array(np.arange(log.num_rows) + 1_900_000_000)
    )
    grown = append(day, tmp_path / "files", columns=options["columns"], chunk_rows=100, progress=False)
    assert grown.fingerprint == append(day, plain.path, columns=options["columns"], progress=False).fingerprint
