"""Columns beside the four: fields of a behaviour, item fields of several values, sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from dien_kernels.data import Columns, open_log
from dien_kernels.data._kinds import ACCEPTED
from dien_kernels.data.log import Log


def rows(log: Log) -> list[dict[str, Any]]:
    return [row for batch in log.read() for row in batch.to_pylist()]


def column(log: Log, name: str) -> list[Any]:
    return [row[name] for row in rows(log)]


def table(**columns: Any) -> pa.Table:
    length = len(next(iter(columns.values())))
    return pa.table({"user": ["u"] * length, "item": range(length), "timestamp": range(length)} | columns)


def test_fields_of_a_behaviour(tmp_path: Path) -> None:
    given = table(page=["home", None, "cart"], dwell=[1.5, None, float("inf")], age=[30.0, None, 31.0])
    columns = {"behaviour_fields": {"where": "page"}, "behaviour_dense": ["dwell"], "dense": ["age"]}
    pq.write_table(given, tmp_path / "log.parquet")
    pa.csv.write_csv(given, tmp_path / "log.csv")
    for source in (given, tmp_path / "log.parquet", tmp_path / "log.csv"):
        log = open_log(source, columns=columns)
        assert (log.behaviour_fields, log.behaviour_dense) == (("where",), ("dwell",))
        found = rows(log)
        assert [row["where"] for row in found] == ["home", None, "cart"]
        assert found[0]["dwell"] == 1.5
        assert all(row["dwell"] != row["dwell"] for row in found[1:])  # NaN, as a behaviour's 0 is a value
        assert [row["age"] for row in found] == pytest.approx([30, float("nan"), 31], nan_ok=True)
        assert log.seen["unknown"]["where"] == 1
    plain = open_log(given)
    assert (plain.behaviour_fields, plain.behaviour_dense, plain.several, plain.sequences) == ((), (), (), ())
    assert set(rows(plain)[0]) == {"user", "item", "timestamp"}


LISTS = [["a", "b"], [], None, ["c", None, "a", ""]]
WANTED = [["a", "b"], None, None, ["c", "a"]]


@pytest.mark.parametrize(
    "given, expected",
    [
        (pa.array(LISTS), WANTED),
        (pa.array(LISTS, pa.large_list(pa.large_string())), WANTED),
        (pa.array(LISTS, pa.list_(pa.string_view())), WANTED),
        (pa.array(LISTS, pa.list_view(pa.string())), WANTED),
        (pa.array([["a", "b"], ["c", None]], pa.list_(pa.string(), 2)), [["a", "b"], ["c"]]),
        (pa.array([[1, 2], None, [3]]), [[1, 2], None, [3]]),
        (pa.array([[1.0, float("nan")], [3.0]]), [[1], [3]]),
        (pa.array([["a", "b"], ["a"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))), [["a", "b"], ["a"]]),
        (pa.array([["a"], LISTS[3], ["b"]]).slice(1), [["c", "a"], ["b"]]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_lists_are_item_fields_of_several_values(tmp_path: Path, given: pa.Array, expected: list[Any]) -> None:
    sources: list[Any] = [table(tags=given)]
    if "view" not in str(given.type):
        pq.write_table(sources[0], tmp_path / "log.parquet")
        sources.append(tmp_path / "log.parquet")
    for source in sources:
        for chunk_rows in (1, 1000):
            log = open_log(source, columns={"item_fields": ["tags"]}, chunk_rows=chunk_rows)
            assert log.several == ("tags",)
            assert column(log, "tags") == expected


def test_delimited_text_is_several_values(tmp_path: Path) -> None:
    given = table(genres=["Crime|Drama", "Drama", "", " War | ||None", None], year=["7|8", "9", "", "7", None])
    columns = {"item_fields": ["genres", "year"], "delimiters": {"genres": "|"}}
    pq.write_table(given, tmp_path / "log.parquet")
    pa.csv.write_csv(given, tmp_path / "log.csv")
    for source in (given, tmp_path / "log.parquet", tmp_path / "log.csv"):
        log = open_log(source, columns=columns)
        assert log.several == ("genres",)
        found = rows(log)
        assert [row["genres"] for row in found] == [["Crime", "Drama"], ["Drama"], None, ["War", "None"], None]
        assert [row["year"] for row in found] == ["7|8", "9", None, "7", None]
        assert log.seen["unknown"] == {"genres": 2, "year": 2}
    several = {**columns, "delimiters": {"genres": "||"}}
    assert column(open_log(table(genres=["a||b"], year=["1"]), columns=several), "genres") == [["a", "b"]]


def test_files_with_lists_and_with_single_values(tmp_path: Path) -> None:
    pq.write_table(table(tags=[["a", "b"]]), tmp_path / "a.parquet")
    pq.write_table(table(tags=["c"]), tmp_path / "b.parquet")
    assert column(open_log(tmp_path, columns={"item_fields": ["tags"]}), "tags") == [["a", "b"], ["c"]]
    pq.write_table(table(tags=[[5]]), tmp_path / "b.parquet")  # one file with text makes text of all
    assert column(open_log(tmp_path, columns={"item_fields": ["tags"]}), "tags") == [["a", "b"], ["5"]]


def test_a_list_with_a_value_that_is_no_id_is_a_bad_line() -> None:
    log = open_log(table(tags=[[1.0], [1.0, 2.5], [3.0]]), columns={"item_fields": ["tags"]})
    assert column(log, "tags") == [[1], [3]]
    assert log.bad.first == [f"table:2: tags [1.0, 2.5] is no id; {ACCEPTED['id']}"]
    with pytest.raises(ValueError, match=r"column 'tags' must hold integers or text, got list"):
        rows(open_log(table(tags=[[[1]]]), columns={"item_fields": ["tags"]}))
    with pytest.raises(ValueError, match=r"column 'tags' must hold integers or text, got list"):
        rows(open_log(table(tags=[[1]]), columns={"user_fields": ["tags"]}))  # only items have several values


SEQUENCES = {"sequence": "action", "sequences": {"clicks": "pv", "bought": ["buy", "cart"]}}


@pytest.mark.parametrize("dictionary", [False, True])
def test_rows_are_told_apart_by_sequence(tmp_path: Path, dictionary: bool) -> None:
    actions = pa.array(["pv", "buy", "fav", None, "cart", "pv"])
    given = table(action=actions.dictionary_encode() if dictionary else actions)
    pq.write_table(given, tmp_path / "log.parquet")
    pa.csv.write_csv(given.set_column(3, "action", actions), tmp_path / "log.csv")
    for source in (given, tmp_path / "log.parquet", tmp_path / "log.csv"):
        log = open_log(source, columns=SEQUENCES)
        assert log.sequences == ("clicks", "bought")
        batches = list(log.read())
        assert batches[0].schema.field("sequence").type == pa.int8()
        found = [(row["timestamp"], row["sequence"]) for batch in batches for row in batch.to_pylist()]
        assert found == [(0, 0), (1, 1), (4, 1), (5, 0)]
        assert (log.left_out, log.seen["left_out"], log.bad.count) == (2, 2, 0)


def test_sequences_by_numbers_and_the_rows_of_bad_lines() -> None:
    given = table(action=[9, 1, 2, 1], item=[None, 5, 6, None])
    columns = {"sequence": "action", "sequences": {"clicks": 1, "bought": [2, 3]}, "behaviour_fields": ["action"]}
    log = open_log(given, columns=columns)
    assert [(row["item"], row["sequence"], row["action"]) for row in rows(log)] == [(5, 0, 1), (6, 1, 2)]
    assert log.bad.first == ["table:4: item is missing"]  # the row that is left out needs no item


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"sequence": "action"}, r"sequence \(a column\) and sequences .* belong together, got 'action' and {}"),
        ({"sequences": {"clicks": "pv"}}, "belong together, got None"),
        ({"sequence": "action", "sequences": {"a/b": "pv"}}, "a sequence must have a name without .*'a/b'"),
        ({"sequence": "action", "sequences": {"a": []}}, r"sequences\['a'\] must be a value of column 'action'"),
        ({"sequence": "action", "sequences": {"a": "pv", "b": ["pv"]}}, "'pv' can name one sequence, got 'a' and 'b'"),
        ({"sequence": "kind", "sequences": {"a": "pv"}}, "has no column 'kind'"),
        ({"delimiters": {"genres": "|"}}, r"delimiters must name item fields of \[\], got 'genres'"),
        ({"item_fields": ["action"], "delimiters": {"action": ""}}, r"delimiters\['action'\] must be the text between"),
        ({"behaviour_fields": ["action"], "user_fields": ["action"]}, "field 'action' is named twice"),
        ({"behaviour_fields": {"sequence": "action"}}, "field 'sequence' is named twice, or like one of"),
        ({"behaviour_dense": ["price"]}, "has no column 'price'"),
        ({"behaviour_fields": "action"}, "fields must be a list of columns or a mapping"),
    ],
)
def test_columns_that_mean_nothing_are_refused(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_log(table(action=["pv"]), columns=columns)
    assert Columns.of(Columns(item="x")).item == "x"
