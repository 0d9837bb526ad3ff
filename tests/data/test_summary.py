"""The summary of a prepared folder: what was in the log and what became of it, in words, on one screen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_folders import next_user, write_folder
from small_logs import made

from dien_kernels import cli
from dien_kernels.batch import Schema
from dien_kernels.data import append, prepare

USERS, STEPS = 100, 10


def a_log(**further: Any) -> pa.Table:
    random = np.random.default_rng(0)
    columns = {
        "user": np.repeat(np.arange(USERS), STEPS),
        "item": random.integers(0, 2000, USERS * STEPS),
        "timestamp": np.tile(np.arange(STEPS), USERS) * 60 + 1_700_000_000,
    }
    return pa.table(columns | further)


def test_a_clean_log(tmp_path: Path) -> None:
    assert made(a_log(), tmp_path / "p", targets="every").summary().splitlines() == [
        "100 users, 1,000 behaviours, from 2023-11-14 22:13:20 to 2023-11-14 22:22:20 UTC (times are epoch s)",
        'ids: item 782 (id 0, "unknown", included)',
        "samples: train 900, valid 0, test 0 (labels next, targets every, split by user)",
        "rows: 1,000 read, none left out",
        "in the user's own history already: 0.0% of the positive targets",
        "users: the longest has 10 behaviours (1.0% of all)",
    ]


def test_an_irregular_log(tmp_path: Path) -> None:
    """Everything that can be told at once fits on a screen."""
    log = a_log(
        category=pa.array(np.arange(1000) % 7, mask=np.arange(1000) % 10 == 0),
        brand=pa.nulls(1000, pa.string()),
        price=np.where(np.arange(1000) % 100 == 3, np.inf, 2.5),
        action=np.where(np.arange(1000) % 50 == 1, "ad", "pv"),
    )
    twice = pa.concat_tables([log, log.slice(0, 200)])
    broken = log.slice(0, 5).set_column(1, "item", pa.nulls(5, pa.int64()))
    alone = log.slice(2, 1).set_column(0, "user", pa.array([10**6]))
    columns = {
        "item_fields": ["category", "brand"],
        "dense": ["price"],
        "sequence": "action",
        "sequences": {"clicks": ["pv"]},
    }
    prepared = made(pa.concat_tables([twice, broken, alone]), tmp_path / "p", columns=columns)
    said = prepared.summary()
    for words in (
        "rows: 1,206 read; left out: 4 unreadable, 25 of no sequence",
        "duplicates: 196 rows (16.7%) say the same as an earlier one, and were kept",
        "order: ",
        "unknown: category in ",
        ", price in ",
        "price: 12 values are infinite or too large for float32, and count as missing",
        "unknown in every row: brand",
        "category: ",
        "users: 1 with one behaviour, which give no sample, the longest has 20 behaviours (1.7% of all)",
        "warning: 196 of 1,177 rows (16.7%) are duplicates",
        "warning: the field 'brand' is unknown in every row",
        "bad line: table:1201: item is missing",
        "more of them: first_bad_lines in meta.json",
    ):
        assert words in said, words
    assert len(said.splitlines()) <= 20
    dropped = made(twice, tmp_path / "q", columns=columns, duplicates="drop").summary()
    assert "say the same as an earlier one, and were left out" in dropped


def test_labels_and_plain_numbers(tmp_path: Path) -> None:
    time = np.tile(np.arange(STEPS), USERS)
    log = a_log(timestamp=time, label=(np.arange(1000) % 2).astype(np.int8))
    said = made(log, tmp_path / "p", labels="given").summary()
    assert "from 0 to 9 (times are numbers)" in said
    assert "(labels given, split by user)" in said
    assert "of the positive targets and " in said
    assert "histories: " in said


def test_new_days(tmp_path: Path) -> None:
    made(a_log(), tmp_path / "p")
    new = a_log(timestamp=np.tile(np.arange(STEPS), USERS) * 60 + 1_700_090_000, item=np.arange(1000) + 5000)
    late = a_log().slice(0, 3)
    prepared = append(pa.concat_tables([new, late]), tmp_path / "p", progress=False)
    said = prepared.summary()
    assert "to 2023-11-15 23:22:20 UTC" in said
    assert "rows: 1,000 read by the first prepare, none left out" in said
    assert "behaviours), at last 1,003 rows of 100 users, 1,000 new items; left out: 3 from before the last" in said


def test_a_folder_of_another_program_says_what_is_known(tmp_path: Path) -> None:
    users = [next_user("u", [1, 2], [1, 2])]
    said = write_folder(tmp_path / "p", [[users]], Schema({"item": 3}), report={}).summary()
    assert said.splitlines()[0] == "1 users, 2 behaviours"
    assert len(said.splitlines()) == 3


def test_the_terminal_shows_a_warning_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.concat_tables([a_log(), a_log()]), tmp_path / "log.parquet")
    assert cli.main(["prepare", str(tmp_path / "log.parquet"), "--out", str(tmp_path / "p")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("are duplicates of an earlier row") == 1
    assert "duplicates" not in printed.err
    with caplog.at_level(logging.WARNING):  # of the library, it is a line of the log
        prepare(tmp_path / "log.parquet", tmp_path / "q", progress=False)
    assert "are duplicates of an earlier row" in caplog.text
