"""What a column is, for every reader: ids, labels, numbers and words for "missing", in Parquet, tables and CSV."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from dien_kernels.data import open_log
from dien_kernels.data._kinds import ACCEPTED, MISSING, MISSING_FIELD
from dien_kernels.data.log import Log


def table(**columns: Any) -> pa.Table:
    rows = len(next(iter(columns.values())))
    usual = {"user": [f"u{row}" for row in range(rows)], "item": list(range(rows)), "timestamp": list(range(rows))}
    return pa.table(usual | columns)


def column(log: Log, name: str) -> list[Any]:
    return [value for batch in log.read() for value in batch.column(name).to_pylist()]


def stored(folder: Path, given: pa.Table) -> list[pa.Table | Path]:
    """The table, and Parquet of it."""
    pq.write_table(given, folder / "log.parquet")
    return [given, folder / "log.parquet"]


@pytest.mark.parametrize(
    "given, expected",
    [
        (pa.array([7, 8], pa.int8()), [7, 8]),
        (pa.array([7, 8], pa.uint64()), [7, 8]),
        (pa.array([Decimal(7), Decimal(8)], pa.decimal128(38, 0)), [7, 8]),
        (pa.array([Decimal("7.00"), Decimal(8)], pa.decimal128(9, 2)), [7, 8]),
        (pa.array([Decimal(7)], pa.decimal256(50, 0)), [7]),
        (pa.array([7.0, 8.0]), [7, 8]),
        (pa.array([True, False]), [1, 0]),
        (pa.array(["7", "x"]), ["7", "x"]),
        (pa.array(["7", "x"], pa.large_string()), ["7", "x"]),
        (pa.array(["7", "x"], pa.string_view()), ["7", "x"]),
        (pa.array([b"7", b"\xc3\xa9"]), ["7", "é"]),
        (pa.array([b"7", b"x"], pa.large_binary()), ["7", "x"]),
        (pa.array([b"7", b"x"], pa.binary_view()), ["7", "x"]),
        (pa.array([b"7", b"x"], pa.binary(1)), ["7", "x"]),
        (pa.array(["7", "x"]).dictionary_encode(), ["7", "x"]),
        (pa.array([7, 8]).dictionary_encode(), [7, 8]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_ids_of_every_type(tmp_path: Path, given: pa.Array, expected: list[Any]) -> None:
    for role in ("user", "item", "category"):
        for source in stored(tmp_path, table(**{role: given})):
            log = open_log(source)
            assert column(log, role) == expected
            assert log.bad.count == 0


@pytest.mark.parametrize(
    "given, wrong",
    [
        (pa.array([1.0, float("nan"), 2.5]), "2.5"),
        (pa.array([1.0, None, float("inf")]), "inf"),
        (pa.array([1.0, None, 1e30]), "1e+30"),
        (pa.array([1, None, 2**63], pa.uint64()), str(2**63)),
        (pa.array([Decimal(1), None, Decimal("2.5")]), "2.5"),
        (pa.array([Decimal(1), None, Decimal(10**20)]), str(10**20)),
        (pa.array([b"a", None, b"caf\xe9"]), r"b'caf\xe9'"),
        (pa.array([b"a", None, b"caf\xe9"]).view(pa.string()), r"b'caf\xe9'"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_what_is_no_id_is_a_bad_line_with_its_value(tmp_path: Path, given: pa.Array, wrong: str) -> None:
    for source in stored(tmp_path, table(item=given)):
        log = open_log(source)
        assert len(column(log, "item")) == 1
        name = "table" if isinstance(source, pa.Table) else "log.parquet"
        assert log.bad.first == [f"{name}:2: item is missing", f"{name}:3: item {wrong} is no id; {ACCEPTED['id']}"]


def test_the_column_is_named_where_it_has_another_name() -> None:
    given = table(item=[1.0, 2.5]).rename_columns(["user", "movie", "timestamp"])
    log = open_log(given, columns={"item": "movie"})
    column(log, "item")
    assert log.bad.first == [f"table:2: item (column 'movie') 2.5 is no id; {ACCEPTED['id']}"]


@pytest.mark.parametrize("other", [["x", "9"], [b"x", b"9"]])
@pytest.mark.parametrize("first", [[1, 2], [1.0, 2.0], [Decimal(1), Decimal(2)], [None, None]])
def test_one_file_with_text_makes_ids_text_in_the_whole_log(tmp_path: Path, first: list[Any], other: list[Any]) -> None:
    for name, values in (("a", first), ("b", other)):
        pq.write_table(table(item=values), tmp_path / f"{name}.parquet")
    for paths in (["a", "b"], ["b", "a"]):
        log = open_log([tmp_path / f"{name}.parquet" for name in paths])
        types = {batch.column("item").type for batch in log.read()}
        assert types == {pa.string()}
    pq.write_table(table(item=["x"]).slice(0, 0), tmp_path / "b.parquet")  # a part without rows has no say
    log = open_log(tmp_path)
    assert {batch.column("item").type for batch in log.read()} == {pa.int64()}


@pytest.mark.parametrize("word", [*MISSING, " NA ", "\t"])
def test_words_for_missing_in_users_items_times_labels_and_numbers(tmp_path: Path, word: str) -> None:
    for role in ("user", "item", "timestamp", "label", "price"):
        values = {
            "user": ["a", "b"],
            "item": ["a", "b"],
            "timestamp": ["1", "2"],
            "label": ["0", "1"],
            "price": ["1", "2"],
        }
        values[role][1] = word
        given = pa.table(values)
        pa.csv.write_csv(given, tmp_path / "log.csv")
        for source in (*stored(tmp_path, given), tmp_path / "log.csv"):
            log = open_log(source, columns={"dense": ["price"]}, labelled=True)
            rows = len(column(log, "user"))
            if role == "price":
                assert (rows, log.seen["unknown"], log.bad.count) == (2, {"price": 1}, 0)
            else:
                name = "table" if source is given else source.name
                assert log.bad.first == [f"{name}:{2 + name.endswith('csv')}: {role} is missing"]


def test_fields_may_be_called_none(tmp_path: Path) -> None:
    words = [*dict.fromkeys((*MISSING, *MISSING_FIELD))]
    given = table(category=words)
    pa.csv.write_csv(given, tmp_path / "log.csv")
    expected = [None if word in MISSING_FIELD else word for word in words]
    assert "None" in expected
    assert "NA" in expected
    for source in (*stored(tmp_path, given), tmp_path / "log.csv"):
        log = open_log(source)
        assert column(log, "category") == expected
        assert log.seen["unknown"] == {"category": len(MISSING_FIELD)}


def test_words_for_missing_that_are_given(tmp_path: Path) -> None:
    given = table(item=["NA", "-", "", "x"], category=["NA", "-", "", "None"])
    for source in stored(tmp_path, given):
        log = open_log(source, missing=["-"])
        assert column(log, "item") == ["NA", "x"]
        assert column(open_log(source, missing=["-", "None"], max_bad_lines=2), "category") == ["NA", None]
    for words in ("NA", [5]):
        with pytest.raises(ValueError, match="missing must be a list of words, got "):
            open_log(given, missing=words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given, expected",
    [
        ([1, 0], [1, 0]),
        ([1.0, 0.0], [1, 0]),
        ([True, False], [1, 0]),
        ([Decimal(1), Decimal(0)], [1, 0]),
        (["1", " 0 "], [1, 0]),
        (["1.0", "0.0"], [1, 0]),
        (["True", "FALSE"], [1, 0]),
        (pa.array(["1", "0"]).dictionary_encode(), [1, 0]),
        ([b"1", b"0"], [1, 0]),
    ],
)
def test_labels_of_every_type(given: Any, expected: list[int]) -> None:
    log = open_log(table(label=given), labelled=True)
    assert column(log, "label") == expected
    assert log.bad.count == 0


@pytest.mark.parametrize("given, wrong", [([1, 2], "2"), ([1.0, 0.5], "0.5"), (["1", "yes"], "'yes'"), ([1, -1], "-1")])
def test_labels_that_are_none(given: list[Any], wrong: str) -> None:
    log = open_log(table(label=given), labelled=True)
    assert column(log, "label") == [1]
    assert log.bad.first == [f"table:2: label {wrong} is no label; {ACCEPTED['label']}"]


def test_numbers(tmp_path: Path) -> None:
    for given in (
        [1.5, None, float("inf"), float("nan"), -2.0],
        [Decimal("1.5"), None, None, None, Decimal(-2)],
        ["1.5", "NA", "inf", "", " -2e0 "],
        [b"1.5", b"NA", b"inf", b"", b"-2"],
    ):
        log = open_log(table(price=given), columns={"dense": ["price"]})
        assert column(log, "price") == pytest.approx([1.5, *[float("nan")] * 3, -2], nan_ok=True)
        assert (log.seen["unknown"], log.bad.count) == ({"price": 3}, 0)
        infinite = sum(str(value).strip("b'") == "inf" for value in given)
        assert log.seen["infinite"] == ({"price": infinite} if infinite else {})
    log = open_log(table(price=[1e300, -1e39, 1.0]), columns={"behaviour_dense": ["price"]})
    assert column(log, "price") == pytest.approx([float("nan"), float("nan"), 1], nan_ok=True)
    assert (log.seen["unknown"], log.seen["infinite"]) == ({"price": 2}, {"price": 2})
    log = open_log(table(price=["1.5", "12,5"]), columns={"dense": ["price"]})
    assert column(log, "price") == [1.5]
    assert log.bad.first == [f"table:2: price '12,5' is no number; {ACCEPTED['number']}"]
    with pytest.raises(ValueError, match=r"column 'price' must hold numbers, got list"):
        column(open_log(table(price=[[1.0]]), columns={"dense": ["price"]}), "price")


def test_a_long_value_is_cut_in_messages() -> None:
    log = open_log(table(timestamp=["1", "x" * 1000]))
    column(log, "user")
    assert f"timestamp '{'x' * 79}... is no time" in log.bad.first[0]


def test_a_field_that_is_unknown_everywhere_is_told() -> None:
    log = open_log(table(category=pa.nulls(3), brand=["a", None, "b"]), columns={"item_fields": ["category", "brand"]})
    column(log, "user")
    assert log.seen["unknown_everywhere"] == ["category"]
    assert log.seen["unknown"] == {"category": 3, "brand": 1}
