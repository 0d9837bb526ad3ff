"""The report says what would mislead, and the warnings name the option that mends it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from folders import meta_of, samples_of, users_of
from small_logs import made

from dien_kernels.data import append, verify
from dien_kernels.data._numbers import Numbers

USERS, STEPS = 200, 12


def a_log(items: int = 3000, **further: Any) -> pa.Table:
    random = np.random.default_rng(0)
    columns = {
        "user": np.repeat(np.arange(USERS), STEPS),
        "item": random.integers(0, items, USERS * STEPS),
        "timestamp": np.tile(np.arange(STEPS), USERS) * 60 + 1_700_000_000,
    }
    return pa.table(columns | further)


def warnings(table: pa.Table, folder: Path, **options: Any) -> str:
    made(table, folder, **options)
    return "\n".join(meta_of(folder)["warnings"])


def test_a_clean_log_has_no_warning(tmp_path: Path) -> None:
    assert warnings(a_log(), tmp_path / "p", targets="every") == ""
    report = meta_of(tmp_path / "p")["report"]
    assert report["positives"] == USERS * (STEPS - 1)
    assert report["longest_user"] == STEPS
    assert report.get("duplicate_rows", 0) == 0


def test_rows_that_are_there_twice_are_counted_and_can_be_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twice = pa.concat_tables([a_log(), a_log()])
    with caplog.at_level(logging.WARNING):
        told = warnings(twice, tmp_path / "p", targets="every")
    assert "2,400 of 4,800 rows (50.0%) are duplicates of an earlier row" in told
    assert "duplicates='drop' (--duplicates drop)" in told
    assert "of the positive targets repeat an item of their own history" in told
    assert told in "\n".join(caplog.messages)  # the terminal says it, too
    assert warnings(twice, tmp_path / "q", targets="every", duplicates="drop") == ""
    made(a_log(), tmp_path / "once", targets="every")
    assert samples_of(tmp_path / "q", "train") == samples_of(tmp_path / "once", "train")
    assert meta_of(tmp_path / "q")["report"]["duplicate_rows"] == 2400


def test_an_item_twice_at_one_time_is_a_duplicate_and_at_two_times_a_repeat(tmp_path: Path) -> None:
    table = pa.table({"user": [1] * 4 + [2] * 2, "item": [5, 6, 5, 5, 5, 7], "timestamp": [1, 1, 1, 2, 1, 2]})
    made(table, tmp_path / "p", targets="every")
    report = meta_of(tmp_path / "p")["report"]
    assert (report["duplicate_rows"], report["repeated_behaviours"]) == (1, 2)
    made(table, tmp_path / "q", targets="every", duplicates="drop")
    assert users_of(tmp_path / "q")[1]["item"] == [5, 6, 5]
    assert users_of(tmp_path / "q")[1]["time"] == [1, 1, 2]


def test_impressions_of_one_time_with_two_labels_are_no_duplicates(tmp_path: Path) -> None:
    table = pa.table({"user": [1, 1, 1], "item": [5, 5, 5], "timestamp": [1, 1, 1], "label": [0, 1, 1]})
    made(table, tmp_path / "p", labels="given", duplicates="drop")
    assert [row[3] for row in samples_of(tmp_path / "p", "train")] == [0, 1]


@pytest.mark.parametrize("labels", ["next", "given"])
def test_items_are_counted_without_the_duplicates_that_were_dropped(tmp_path: Path, labels: str) -> None:
    label, action = np.arange(USERS * STEPS) % 2, np.where(np.arange(USERS * STEPS) % 5 == 0, "buy", "pv")
    columns = {"sequence": "action", "sequences": {"clicks": "pv", "bought": "buy"}}
    log = a_log(items=300, label=label, action=action)
    twice = pa.concat_tables([log, log.slice(0, 700)])
    prepared = made(twice, tmp_path / "p", labels=labels, columns=columns, duplicates="drop")
    assert verify(prepared) == []
    once = made(log, tmp_path / "q", labels=labels, columns=columns)
    assert sorted(prepared.item_counts.tolist()) == sorted(once.item_counts.tolist())
    later = log.set_column(2, "timestamp", pa.array(log["timestamp"].to_numpy() + 10**6))
    grown = append(pa.concat_tables([later, later]), tmp_path / "p", columns=columns, progress=False)
    assert verify(grown) == []
    assert sum(grown.item_counts) == 2 * sum(once.item_counts)


def test_repeated_consumption_is_told_with_the_auc_of_the_rule(tmp_path: Path) -> None:
    random, items = np.random.default_rng(1), a_log()["item"].to_numpy().reshape(USERS, STEPS).copy()
    for step in range(1, STEPS):
        again = random.random(USERS) < 0.4
        items[again, step] = items[np.arange(USERS), random.integers(0, step, USERS)][again]
    told = warnings(a_log(item=items.ravel()), tmp_path / "p")
    report = meta_of(tmp_path / "p")["report"]
    share = report["positives_in_history"] / report["positives"]
    last = sum(row["item"][-1] in row["item"][:-1] for row in users_of(tmp_path / "p").values()) / USERS
    assert share == last
    assert f"alone has an AUC of {0.5 + share / 2:.2f}" in told
    assert "repeats='drop'" in told
    assert "exclude='none'" in told


def test_clicks_on_what_was_clicked_before_are_told_for_impressions(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    label = random.integers(0, 2, USERS * STEPS)
    item = np.where(label == 1, np.repeat(np.arange(USERS), STEPS), random.integers(1000, 9000, USERS * STEPS))
    told = warnings(a_log(item=item, label=label), tmp_path / "p", labels="given")
    assert "repeats='drop'" in told
    assert "exclude=" not in told  # negatives are given, so that no other ones are drawn
    assert "0% of the negatives do" in told


def test_a_field_that_is_unknown_everywhere_is_told(tmp_path: Path) -> None:
    empty = pa.nulls(USERS * STEPS, pa.string())
    price, dwell = pa.nulls(USERS * STEPS, pa.float32()), np.full(USERS * STEPS, np.inf)
    columns = {"user_fields": ["device"], "dense": ["price"], "behaviour_dense": ["dwell"]}
    log = a_log(category=empty, device=empty, price=price, dwell=dwell)
    told = warnings(log, tmp_path / "p", columns=columns)
    assert "the field 'price' is unknown in every row" in told
    assert "the field 'dwell' is unknown in every row" in told
    assert "the field 'category' is unknown in every row" in told
    assert "the field 'device' is unknown in every row" in told


def test_a_field_that_is_none_of_the_item_is_told(tmp_path: Path) -> None:
    told = warnings(a_log(items=50, category=np.arange(USERS * STEPS) % 7), tmp_path / "p")
    assert "another value of 'category' than its first row" in told
    assert "behaviour_fields" in told


def test_one_user_with_the_rows_of_all_strangers_is_told(tmp_path: Path) -> None:
    users = np.where(np.arange(USERS * STEPS) % 3 == 0, 0, np.repeat(np.arange(USERS), STEPS))
    told = warnings(a_log(user=users), tmp_path / "p", targets="every")
    assert "one user has" in told
    assert "missing=" in told


def test_histories_of_one_behaviour_and_times_in_disorder_are_told(tmp_path: Path) -> None:
    lonely = np.where(np.arange(USERS * STEPS) < 200 * 6, np.repeat(np.arange(USERS), STEPS), 10_000 + np.arange(2400))
    assert "have one behaviour only and give no sample" in warnings(a_log(user=lonely), tmp_path / "p")
    shuffled = a_log().take(pa.array(np.random.default_rng(0).permutation(USERS * STEPS)))
    assert "look whether the times were read as they are meant" in warnings(shuffled, tmp_path / "q")


def test_statistics_of_numbers_are_those_of_training(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    age = random.integers(18, 80, USERS * STEPS).astype(np.float64)
    pay = np.exp(random.normal(8, 1.5, USERS * STEPS))
    age[::10] = np.nan
    table = a_log(age=age, pay=pay)
    made(table, tmp_path / "p", targets="every", fractions=(0.8, 0.1, 0.1), columns={"dense": ["age", "pay"]})
    training = {(row[0], row[1]) for row in samples_of(tmp_path / "p", "train")}
    rows = [user * STEPS + end for user, end in training]
    dense = meta_of(tmp_path / "p")["dense"]
    known = age[rows][~np.isnan(age[rows])].astype(np.float32).astype(np.float64)
    assert dense["age"]["log"] is False
    assert dense["age"]["mean"] == pytest.approx(known.mean(), rel=1e-12)
    assert dense["age"]["std"] == pytest.approx(known.std(), rel=1e-9)
    assert (dense["age"]["min"], dense["age"]["max"]) == (known.min(), known.max())
    assert dense["age"]["missing"] == pytest.approx(1 - known.size / len(rows))
    logs = np.log1p(pay[rows].astype(np.float32).astype(np.float64))
    assert dense["pay"]["log"] is True
    assert dense["pay"]["mean"] == pytest.approx(logs.mean(), rel=1e-12)
    assert dense["pay"]["std"] == pytest.approx(logs.std(), rel=1e-9)


@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_numbers_do_not_depend_on_the_pieces(pieces: int) -> None:
    values = np.random.default_rng(0).normal(2e9, 3.0, 300_000)  # far from 0, as times are
    numbers = Numbers()
    for piece in np.array_split(values, pieces):
        numbers.add(piece)
    plain = numbers.to_dict()
    assert plain["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert plain["std"] == pytest.approx(values.std(), rel=1e-6)
    quantiles = np.array(plain["quantiles"])
    # 2^16 of the values or more stand for all: the standard error of a median is 1.25 * 3 / 2^8, or 0.015.
    wanted = np.quantile(values, np.arange(1, 64) / 64)
    assert np.abs(quantiles - wanted).max() < 0.15


def test_numbers_of_nothing_and_of_one_value() -> None:
    empty = Numbers()
    empty.add(np.array([np.nan, np.inf]))
    assert empty.to_dict() == {
        "mean": 0.0, "std": 1.0, "min": 0.0, "max": 0.0, "missing": 1.0, "log": False, "quantiles": [],
    }  # fmt: skip
    constant = Numbers()
    constant.add(np.full(10, 4.0))
    plain = constant.to_dict()
    assert (plain["mean"], plain["std"], plain["missing"], plain["quantiles"]) == (4.0, 1.0, 0.0, [4.0])
