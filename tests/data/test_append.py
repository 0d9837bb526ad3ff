"""New days join a prepared folder: old ids and old files stay, and only new events are targets."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import bytes_of, meta_of, names_of
from small_logs import TINY, made

from dien_kernels.data import Loader, Prepared, synthetic, verify
from dien_kernels.data.append import append

SHARES = (0.8, 0.1, 0.1)


def days(users: int = 60, **further: Any) -> tuple[pa.Table, pa.Table]:
    """A log, divided by time; the second part has users and items that the first has not."""
    log = synthetic(users=users, items=80, categories=5, events=12 * users)
    for name, make in further.items():
        log = log.append_column(name, pa.array(make(log.num_rows)))
    log = log.take(pa.array(np.argsort(log["timestamp"].to_numpy(), kind="stable")))
    cut = int(0.7 * log.num_rows)
    return log.slice(0, cut), log.slice(cut)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of all shards with their generation; items are raw items."""
    names, found = names_of(folder, "item"), []
    for shard in meta_of(folder)["shards"]:
        for row in pq.read_table(folder / shard["file"]).to_pylist():
            row["item"] = [names[number] for number in row["item"]]
            found.append(row | {"generation": shard.get("generation", 0)})
    return found


def training(folder: Path) -> list[tuple[Any, ...]]:
    """(user, history, target) of every training sample, in raw values."""
    return sorted(
        (row["user"], tuple(row["item"][:end]), row["item"][end])
        for row in rows_of(folder)
        for end in range(row["train_from"], row["train_to"])
    )


@pytest.mark.parametrize("split", ["user", "time"])
def test_training_samples_are_those_of_the_whole_log(tmp_path: Path, split: str) -> None:
    first, second = days()
    options: dict[str, Any] = {"targets": "every"}
    options |= {"fractions": SHARES} if split == "user" else {"split": "time", "fractions": (1.0, 0.0, 0.0)}
    made(first, tmp_path / "p", **options)
    append(second, tmp_path / "p", progress=False, tail=1000)
    made(pa.concat_tables([first, second]), tmp_path / "all", **options)
    whole = training(tmp_path / "all")
    if split == "user":  # the thresholds are those of the first days
        kept = {row["user"] for row in rows_of(tmp_path / "p") if row["train_to"] > 0}
        both = kept & {row["user"] for row in rows_of(tmp_path / "all") if row["train_to"] > 0}
        assert len(both) > 40
        assert [s for s in training(tmp_path / "p") if s[0] in both] == [s for s in whole if s[0] in both]
    else:
        assert training(tmp_path / "p") == whole


def test_only_new_events_are_targets_of_the_new_generation(tmp_path: Path) -> None:
    first, second = days()
    made(first, tmp_path / "p", targets="every", fractions=SHARES)
    old = {row["user"]: row for row in rows_of(tmp_path / "p")}
    append(second, tmp_path / "p", progress=False, tail=3)
    fresh: dict[int, int] = {}
    for user in second["user"].to_pylist():
        fresh[user] = fresh.get(user, 0) + 1
    new = [row for row in rows_of(tmp_path / "p") if row["generation"] == 1]
    assert {row["user"] for row in new} == set(fresh)
    for row in new:
        tail = old[row["user"]]["item"][-3:] if row["user"] in old else []
        assert row["item"][: len(tail)] == tail
        assert len(row["item"]) == len(tail) + fresh[row["user"]]
        assert row["time"] == sorted(row["time"])
        if row["train_to"]:
            assert (row["train_from"], row["train_to"]) == (max(len(tail), 1), len(row["item"]))
            assert row["held"] == 0
    meta = meta_of(tmp_path / "p")
    assert meta["appended"][0]["rows"] == second.num_rows
    assert meta["counts"]["samples"]["train"] == len(training(tmp_path / "p"))


@pytest.mark.parametrize("tail", [1, 200])
def test_a_known_row_is_found_however_short_the_tail_is(tmp_path: Path, tail: int) -> None:
    """Dates as times: many behaviours of a user have the last time."""
    columns: dict[str, Any] = {"item_fields": [], "sequence": "kind", "sequences": {"views": ["v"], "buys": ["b"]}}
    first = {"user": [1] * 4, "item": [1, 2, 3, 9], "timestamp": [1, 5, 5, 5], "kind": ["v", "v", "v", "b"]}
    for labels in ("next", "given"):
        table = {**first, "label": [1, 1, 0, 0]} if labels == "given" else first
        folder = tmp_path / labels
        options: dict[str, Any] = {"labels": labels, "duplicates": "drop", "columns": columns}
        made(pa.table(table), folder, fractions=(1.0, 0.0, 0.0), **options)
        again = pa.table({name: values[1:] for name, values in table.items()})
        append(again, folder, columns=columns, progress=False, tail=tail)
        entry = meta_of(folder)["appended"][0]
        assert (entry["duplicate_rows"], entry["late_rows"], entry["users"]) == (3, 0, 0)
        other = {**{name: values[2:3] for name, values in table.items()}, "item": [4]}
        append(pa.table(other), folder, columns=columns, progress=False, tail=tail)
        assert meta_of(folder)["appended"][1]["duplicate_rows"] == 0


def test_a_duplicate_is_counted_once(tmp_path: Path) -> None:
    first = pa.table({"user": [1, 1, 2], "item": [1, 2, 9], "timestamp": [1, 5, 1]})
    again = pa.table({"user": [1, 1, 1], "item": [2, 2, 3], "timestamp": [5, 5, 5]})
    for duplicates in ("keep", "drop"):
        made(first, tmp_path / duplicates, duplicates=duplicates)
        append(again, tmp_path / duplicates, progress=False)
        assert meta_of(tmp_path / duplicates)["appended"][0]["duplicate_rows"] == 2


def test_impressions_of_a_known_day_are_left_out(tmp_path: Path) -> None:
    """Those without a click, too: of a user who never clicked no behaviour is known."""
    first = {"user": [1, 1, 2], "item": [1, 2, 9], "timestamp": [1, 2, 1], "label": [1, 1, 1]}
    day = {"user": [1, 1, 3, 3], "item": [3, 4, 5, 6], "timestamp": [5, 6, 5, 6], "label": [1, 0, 0, 0]}
    made(pa.table(first), tmp_path / "p", labels="given", duplicates="drop", fractions=(1.0, 0.0, 0.0))
    once = append(pa.table(day), tmp_path / "p", progress=False).meta["counts"]
    twice = append(pa.table(day), tmp_path / "p", progress=False).meta["counts"]
    entry = meta_of(tmp_path / "p")["appended"][1]
    assert (entry["late_rows"], entry["duplicate_rows"]) == (2, 2)
    assert twice == once


def test_users_of_later_days_are_in_no_split_without_a_share(tmp_path: Path) -> None:
    for number, fractions in enumerate([(1.0, 0.0, 0.0), (0.7, 0.0, 0.3), (0.7, 0.3, 0.0)]):
        users = range(5)
        first = pa.table({"user": [u for u in users for _ in "ab"], "item": [*range(10)], "timestamp": [1, 2] * 5})
        more = range(100, 300)
        day = {"user": [u for u in more for _ in "ab"], "item": [*range(10)] * 40, "timestamp": [5, 6] * 200}
        made(first, tmp_path / str(number), fractions=fractions)
        grown = append(pa.table(day), tmp_path / str(number), progress=False)
        for split, share in zip(("train", "valid", "test"), fractions, strict=True):
            assert (grown.split_size(split) > 0) == (share > 0)


def test_what_an_append_left_out_or_repeats_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    users, steps = 60, 4
    user = np.repeat(np.arange(users), steps)
    first = {"user": user, "item": np.arange(users * steps) % 97, "timestamp": np.tile(np.arange(steps), users)}
    made(pa.table(first), tmp_path / "p", targets="every")
    (tmp_path / "day=2").mkdir()
    lines = ["user,item,timestamp", "1,2,x"] + [f"{u},{300 + u},{9 + k}" for u in range(users) for k in (0, 1)]
    (tmp_path / "day=2" / "part-0.csv").write_text("\n".join(lines))
    caplog.clear()
    said = append(tmp_path / "day=2" / "part-0.csv", tmp_path / "p", progress=False).summary()
    line = "day=2/part-0.csv:2: timestamp 'x' is no time"
    assert f"1 lines were skipped, the first: {line}" in caplog.text
    assert f"bad line: {line}" in said
    assert meta_of(tmp_path / "p")["appended"][0]["first_bad_lines"][0].startswith(line)
    assert "in the user's own history already: 50.0% of the positive targets of the last day" in said
    caplog.clear()
    again = append(tmp_path / "day=2" / "part-0.csv", tmp_path / "p", progress=False).summary()
    assert "60 of 120 rows of the last day (50.0%) say the same as one that is known, and were kept" in again
    assert "are duplicates" in caplog.text
    assert "warning: 60 of 120 rows (50.0%) are duplicates" in again


def test_a_folder_that_grows_while_it_is_open(tmp_path: Path) -> None:
    """What was opened before the append is told to open the folder again, and not to prepare it again."""
    first, second = days()
    before = made(first, tmp_path / "p", fractions=SHARES)
    append(second, tmp_path / "p", progress=False)
    words = "was prepared anew or has grown while it was in use .*: open it again$"
    for read in (lambda: before.vocabulary("item"), lambda: Loader(before).batch(0, 0)):
        with pytest.raises(ValueError, match=words):
            read()
    assert before.read_unit(0).item.size  # a shard is never replaced
    (tmp_path / "p" / "items.parquet").unlink()
    with pytest.raises(ValueError, match="is damaged: items.parquet is missing; prepare it again"):
        Prepared.open(tmp_path / "p")


def test_old_ids_and_files_stay(tmp_path: Path) -> None:
    first, second = days()
    before = made(first, tmp_path / "p", fractions=SHARES)
    files, old = bytes_of(tmp_path / "p"), meta_of(tmp_path / "p")
    names = {field: names_of(tmp_path / "p", field) for field in ("item", "category")}
    fields = {item: before.item_fields["category"][number] for number, item in enumerate(names["item"])}
    after = append(second, tmp_path / "p", progress=False)
    now = bytes_of(tmp_path / "p")
    assert all(now[name] == content for name, content in files.items() if name.startswith("shards/"))
    for field, values in names.items():
        assert names_of(tmp_path / "p", field)[: len(values)] == values
    added = names_of(tmp_path / "p", "item")[len(names["item"]) :]
    assert set(added) == set(second["item"].to_pylist()) - set(first["item"].to_pylist())
    assert added
    items = names_of(tmp_path / "p", "item")
    for number, item in enumerate(items):
        if item in fields:
            assert after.item_fields["category"][number] == fields[item]
    counts = np.bincount(
        after.encode_items(pa.concat_arrays([*first["item"].chunks, *second["item"].chunks])), minlength=len(items)
    )
    assert after.item_counts.tolist() == counts.tolist()
    assert meta_of(tmp_path / "p")["ancestors"] == [old["fingerprint"]]
    assert after.fingerprint != old["fingerprint"]
    assert verify(after) == []


def test_days_one_after_another_and_users_that_pause(tmp_path: Path) -> None:
    one = pa.table({"user": [1, 1, 2, 2, 4], "item": [1, 2, 3, 4, 50], "timestamp": [1, 2, 1, 2, 1]})
    two = pa.table({"user": [1, 3, 3], "item": [5, 6, 7], "timestamp": [3, 3, 4]})
    three = pa.table({"user": [2, 1, 3], "item": [8, 9, 1], "timestamp": [5, 6, 7]})
    made(one, tmp_path / "p", targets="every")
    append(two, tmp_path / "p", progress=False)
    append(three, tmp_path / "p", progress=False, tail=2)
    last = {row["user"]: row for row in rows_of(tmp_path / "p") if row["generation"] == 2}
    assert {user: row["item"] for user, row in last.items()} == {1: [2, 5, 9], 2: [3, 4, 8], 3: [6, 7, 1]}
    assert {user: (row["train_from"], row["train_to"]) for user, row in last.items()} == {u: (2, 3) for u in (1, 2, 3)}
    assert len(meta_of(tmp_path / "p")["ancestors"]) == 2
    assert verify(Prepared.open(tmp_path / "p")) == []


@pytest.mark.parametrize("labels", ["next", "given"])
def test_a_day_that_is_appended_twice(tmp_path: Path, labels: str) -> None:
    first = pa.table({"user": [1, 1, 2], "item": ["a", "b", "c"], "timestamp": [1, 2, 2], "label": [1, 1, 1]})
    day = pa.table(
        {"user": [1, 1, 2, 3, 3], "item": ["c", "d", "a", "e", "f"], "timestamp": [5, 6, 6, 5, 6], "label": [1] * 5}
    )
    for duplicates in ("drop", "keep"):
        folder = tmp_path / duplicates
        made(first, folder, labels=labels, duplicates=duplicates, fractions=(1.0, 0.0, 0.0))
        once = append(day, folder, progress=False).item_counts.tolist()
        before = {row["user"]: row["item"] for row in rows_of(folder) if row["generation"] == 1}
        grown = append(day, folder, progress=False)
        entry = meta_of(folder)["appended"][1]
        assert (entry["late_rows"], entry["duplicate_rows"]) == (2, 3)
        after = {row["user"]: row["item"] for row in rows_of(folder) if row["generation"] == 2}
        if duplicates == "drop":
            assert after == {}
            assert grown.item_counts.tolist() == once
        else:
            assert after == {user: [*items, items[-1]] for user, items in before.items()}
        assert verify(grown) == []


def test_events_from_before_the_last_one_known_are_left_out_and_counted(tmp_path: Path) -> None:
    made(pa.table({"user": [1, 1, 2], "item": [1, 2, 9], "timestamp": [10, 20, 0]}), tmp_path / "p")
    late = pa.table({"user": [1, 1, 1, 2], "item": [3, 4, 5, 3], "timestamp": [19, 20, 21, 1]})
    append(late, tmp_path / "p", progress=False)
    row = next(row for row in rows_of(tmp_path / "p") if row["generation"] == 1 and row["user"] == 1)
    assert (row["item"], row["time"]) == ([1, 2, 4, 5], [10, 20, 20, 21])
    assert meta_of(tmp_path / "p")["appended"][0]["late_rows"] == 1


def test_impressions_with_labels_and_user_fields(tmp_path: Path) -> None:
    first, second = days(
        label=lambda n: np.arange(n) % 2, device=lambda n: np.arange(n) % 3, price=lambda n: np.arange(n) * 0.5
    )
    options: dict[str, Any] = {
        "labels": "given",
        "split": "time",
        "columns": {"user_fields": ["device"], "dense": ["price"]},
    }
    made(first, tmp_path / "p", **options)
    append(second, tmp_path / "p", progress=False, tail=1000, columns=options["columns"])
    made(pa.concat_tables([first, second]), tmp_path / "all", **options)

    def impressions(folder: Path) -> list[tuple[Any, ...]]:
        items, devices = names_of(folder, "item"), names_of(folder, "device")
        return sorted(
            (row["user"], tuple(row["item"][:end]), items[target], label, devices[device], price)
            for row in rows_of(folder)
            for end, target, label, device, price in zip(
                row["end"], row["target"], row["label"], row["user.device"], row["dense.price"], strict=True
            )
        )

    assert impressions(tmp_path / "p") == impressions(tmp_path / "all")
    assert verify(Prepared.open(tmp_path / "p")) == []


def test_the_loader_reads_all_generations(tmp_path: Path) -> None:
    first, second = days()
    made(first, tmp_path / "p", targets="every", fractions=SHARES)
    grown = append(second, tmp_path / "p", progress=False)
    loader = Loader(grown, "train", batch_size=64)
    positives = sum(int(loader.batch(0, number).label.sum()) for number in range(len(loader)))  # type: ignore[union-attr]
    assert positives == grown.split_size("train") == len(training(tmp_path / "p"))


def test_wrong_logs_and_folders_are_refused_and_change_nothing(tmp_path: Path) -> None:
    made(TINY, tmp_path / "p")
    before = bytes_of(tmp_path / "p")
    with pytest.raises(ValueError, match=r"item_fields must be \['item', 'category'\], as in .*, got \['item'\]"):
        append(TINY, tmp_path / "p", columns={"item_fields": []}, progress=False)
    real = TINY.set_column(TINY.column_names.index("timestamp"), "timestamp", pa.array(np.arange(TINY.num_rows) + 9.5))
    with pytest.raises(ValueError, match="timestamp must be int64, as in .*, got double: store the column so"):
        append(real, tmp_path / "p", progress=False)
    with pytest.raises(ValueError, match="no usable row"):
        append(TINY.slice(0, 0), tmp_path / "p", progress=False)
    with pytest.raises(ValueError, match="tail must be an integer of at least 1, got 0"):
        append(TINY, tmp_path / "p", tail=0, progress=False)
    with pytest.raises(FileNotFoundError, match="no prepared folder"):
        append(TINY, tmp_path / "q", progress=False)
    assert bytes_of(tmp_path / "p") == before


def test_an_impression_at_the_time_of_the_last_click_known_does_not_see_it(tmp_path: Path) -> None:
    first = {"user": [1, 1, 2], "item": [1, 2, 9], "timestamp": [10, 20, 1], "label": [1, 1, 1]}
    made(pa.table(first), tmp_path / "p", labels="given")
    day = {"user": [1, 1], "item": [2, 3], "timestamp": [20, 21], "label": [0, 1]}
    grown = append(pa.table(day), tmp_path / "p", progress=False)
    row = next(row for row in rows_of(tmp_path / "p") if row["generation"] == 1)
    assert (row["item"], row["end"]) == ([1, 2, 3], [1, 2])
    assert verify(grown) == []


def test_late_events_of_any_sequence_are_left_out_of_all_counts(tmp_path: Path) -> None:
    columns = {"item_fields": [], "sequence": "kind", "sequences": {"views": "v", "buys": "b"}}
    first = {"user": [1, 1, 1, 2], "item": [1, 2, 3, 9], "timestamp": [10, 20, 90, 1], "kind": ["v", "v", "b", "v"]}
    made(pa.table(first), tmp_path / "p", targets="every", columns=columns)
    day = {"user": [1, 1, 1, 1], "item": [4, 4, 5, 5], "timestamp": [40, 95, 80, 99], "kind": ["v", "v", "b", "b"]}
    grown = append(pa.table(day), tmp_path / "p", columns=columns, progress=False)
    row = next(row for row in rows_of(tmp_path / "p") if row["generation"] == 1)
    assert (row["time"], row["buys.time"]) == ([10, 20, 95], [90, 99])
    assert meta_of(tmp_path / "p")["appended"][0]["late_rows"] == 2
    assert grown.item_counts[grown.encode_items([4, 5])].tolist() == [1, 0]
    assert verify(grown) == []


def test_integers_join_a_folder_of_text_by_their_digits_and_text_none_of_integers(tmp_path: Path) -> None:
    text = pa.table({"user": ["a", "a", "b"], "item": ["1", "2", "3"], "timestamp": [1, 2, 1]})
    made(text, tmp_path / "p")
    grown = append(pa.table({"user": ["a"], "item": [2], "timestamp": [3]}), tmp_path / "p", progress=False)
    row = next(row for row in rows_of(tmp_path / "p") if row["generation"] == 1)
    assert row["item"] == ["1", "2", "2"]
    assert grown.schema.items == {"item": 4}
    made(pa.table({"user": ["a", "a", "b"], "item": [1, 2, 3], "timestamp": [1, 2, 1]}), tmp_path / "q")
    with pytest.raises(ValueError, match="'item' must hold integers, as in .*, got text"):
        append(pa.table({"user": ["a"], "item": ["x"], "timestamp": [3]}), tmp_path / "q", progress=False)


def test_raw_items_and_conflicts_over_days(tmp_path: Path) -> None:
    first = {"user": [1, 1, 2], "item": [1, 2, 3], "timestamp": [1, 2, 1], "category": ["a", "a", "b"]}
    made(pa.table(first), tmp_path / "p", min_count={"item": 1})
    raw = meta_of(tmp_path / "p")["raw_items"]
    for day in range(3):
        table = {"user": [1, 1], "item": [1, 2], "timestamp": [10 + day] * 2, "category": ["a", "c"]}
        append(pa.table(table), tmp_path / "p", progress=False)
    meta = meta_of(tmp_path / "p")
    assert meta["raw_items"] == raw
    assert [entry["conflicts:category"] for entry in meta["appended"]] == [1, 1, 1]
    prepared = Prepared.open(tmp_path / "p")
    newest = int(prepared.encode_users([1])[0])
    assert prepared.history(newest).size == 2 + 6


@pytest.mark.slow
@pytest.mark.parametrize("moves", [0, 1, 3])
def test_an_append_killed_while_files_are_moved_is_finished_and_told(tmp_path: Path, moves: int) -> None:
    first, second = days()
    made(first, tmp_path / "p", targets="every", fractions=SHARES)
    made(first, tmp_path / "q", targets="every", fractions=SHARES)
    pq.write_table(second, tmp_path / "day.parquet")
    script = f"""
import os, signal, sys
import dien_kernels.data._place as place
from dien_kernels.data import append
real, left = os.replace, [{moves} + 1]  # the first one puts the mark in its place
def replace(source, target):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(source, target)
place.os.replace = replace
append(sys.argv[1], sys.argv[2], progress=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "day.parquet"), str(tmp_path / "p")], check=False
    )
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(FileExistsError, match="that was interrupted in .* is complete now, and nothing else was done"):
        append(second, tmp_path / "p", progress=False)
    append(second, tmp_path / "q", progress=False)
    assert {name: content for name, content in bytes_of(tmp_path / "p").items() if name != "meta.json"} == {
        name: content for name, content in bytes_of(tmp_path / "q").items() if name != "meta.json"
    }
    assert verify(Prepared.open(tmp_path / "p")) == []


def test_two_appends_one_after_another_keep_both_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is opened under the lock: what another append has done in between is seen."""
    module = sys.modules["dien_kernels.data.append"]

    first, second = days()
    made(first, tmp_path / "p", targets="every", fractions=SHARES)
    real, other = module.locked, [True]

    @contextmanager
    def after_another(out: Path) -> Iterator[bool]:
        if other and other.pop():
            append(second.slice(0, 100), tmp_path / "p", progress=False)
        with real(out) as finished:
            yield finished

    monkeypatch.setattr(module, "locked", after_another)
    append(second.slice(100), tmp_path / "p", progress=False)
    assert [entry["rows"] for entry in meta_of(tmp_path / "p")["appended"]] == [100, second.num_rows - 100]
    assert verify(Prepared.open(tmp_path / "p")) == []
