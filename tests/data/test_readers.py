"""What all readers share, on small files written here: names of columns, formats told by names, what is missing."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from dien_kernels.data import FORMATS, Columns, _csv, open_log
from dien_kernels.data._times import FORMS
from dien_kernels.data.log import BadLines, Log, Roles

S = 10**6  # microseconds
REMEDY = rf"if it is of another format, name that with format= \(--format\): {', '.join(FORMATS)}$"


def rows(log: Log) -> list[dict[str, Any]]:
    return pa.Table.from_batches(log.read()).to_pylist()


def tuples(log: Log) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in rows(log)]


def test_parquet_with_usual_names_and_mapped_ones(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": [1, 2],
            "item_id": ["a", "b"],
            "ts": [3, 4],
            "category_id": [5, None],
            "price": [1.5, None],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    log = open_log(tmp_path, columns={"user_fields": {"who": "user_id"}, "dense": ["price"]})
    assert rows(log) == [
        {"user": 1, "item": "a", "timestamp": 3, "category": 5, "who": 1, "price": 1.5},
        {
            "user": 2,
            "item": "b",
            "timestamp": 4,
            "category": None,
            "who": 2,
            "price": pytest.approx(float("nan"), nan_ok=True),
        },
    ]
    assert log.seen["unknown"] == {"category": 1, "who": 0, "price": 1}
    named = Columns("item_id", "user_id", "ts", item_fields={"kind": "category_id"})
    assert tuples(open_log(tmp_path / "log.parquet", columns=named)) == [("a", 1, 3, 5), ("b", 2, 4, None)]


def test_null_rows_are_bad_lines_with_their_row(tmp_path: Path) -> None:
    table = pa.table({"user": [1, None, 3, 4], "item": [1, 2, None, 4], "timestamp": [1.0, 2.0, 3.0, float("nan")]})
    log = open_log(table, chunk_rows=2)
    assert tuples(log) == [(1, 1, 1.0)]
    assert log.bad.first == [
        "table:2: user is missing",
        "table:3: item is missing",
        "table:4: timestamp is missing",
    ]


@pytest.mark.parametrize("block", [1 << 20, 40])
@pytest.mark.parametrize("zipped", [False, True])
def test_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, zipped: bool) -> None:
    monkeypatch.setattr(_csv, "_BLOCK", block)
    text = "user,item,timestamp,label,category\nu1,1,10,1,c\nu1,2\nu2,a b,soon,0,c\nu3,3,30,2,c\nu4,4, 40 ,0,\n"
    path = tmp_path / ("log.csv.gz" if zipped else "log.csv")
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    log = open_log(path, "csv", labelled=True)
    assert tuples(log) == [("u1", "1", 10, 1, "c"), ("u4", "4", 40, 0, None)]
    assert sorted(log.bad.first) == [
        f"{path.name}:3: 2 columns instead of 5",
        f"{path.name}:4: timestamp 'soon' is no time; {FORMS}",
        f"{path.name}:5: label '2' is no label; labels are 0 and 1, true and false, or t and f",
    ]
    with pytest.raises(ValueError, match=r"more than max_bad_lines=0 .*\n  log.csv[.gz]*:[34]: "):
        rows(open_log(path, "csv", labelled=True, max_bad_lines=0))


def test_csv_times(tmp_path: Path) -> None:
    for number, (first, expected) in enumerate(
        [("1.5", 1.5), ("1700000000000000001", 1700000000000000), ("1970-01-01 00:00:01", 1000000)]
    ):
        path = tmp_path / f"{number}.tsv"
        path.write_text(f"user\titem\ttime\n1\t2\t{first}\n")
        assert tuples(open_log(path, "csv", delimiter="\t")) == [("1", "2", expected)]


@pytest.mark.parametrize("name, between", [("log.csv", ","), ("LOG.TSV", "\t"), ("log.csv.gz", ",")])
def test_the_name_of_a_file_tells_its_format(tmp_path: Path, name: str, between: str) -> None:
    path, text = tmp_path / name, f"user{between}item{between}time\n1{between}2{between}3\n".encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert tuples(open_log(path)) == tuples(open_log([str(path)])) == [("1", "2", 3)]
    with pytest.raises(ValueError, match="cannot be read as Parquet"):  # a format that is named is not guessed
        open_log(path, "parquet")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": [1], "thing": [2], "timestamp": [3]}), path)
    with pytest.raises(ValueError, match=r"a.parquet has no item column .*it has \['user', 'thing', 'timestamp'\]"):
        open_log(path)
    with pytest.raises(ValueError, match=r"has no column 'brand'; it has"):
        open_log(path, columns={"item": "thing", "item_fields": ["brand"]})
    with pytest.raises(ValueError, match="'label' is named twice, or like"):
        open_log(path, columns={"item": "thing", "user_fields": ["label"]})
    with pytest.raises(ValueError, match="columns must be given for .*'users'"):
        open_log(path, columns={"users": "user"})
    with pytest.raises(FileNotFoundError, match=r"b.parquet does not exist; .* has \['a.parquet'\]"):
        open_log(tmp_path / "b.parquet")
    with pytest.raises(FileNotFoundError, match=rf"no file ending in .csv .*it has \['a.parquet'\]; {REMEDY}"):
        open_log(tmp_path, "csv")
    with pytest.raises(ValueError, match="format must be one of .*'excel'; prepare reads samples, too: authors, "):
        open_log(path, "excel")
    with pytest.raises(ValueError, match="labels='given' needs format 'parquet' or 'csv'"):
        open_log(path, "taobao", labelled=True)
    for name, content, words in (
        ("e.csv", b"", "is empty"),
        ("c.parquet", b"PAR1 no", f"cannot be read as Parquet: .*; {REMEDY}"),
        ("f.csv", b"user,item\n1,2\n", "has no timestamp column"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            open_log(tmp_path / name, name.rpartition(".")[2])


@pytest.mark.parametrize(
    "values", [["5", "soon", "7"], ["soon", "later", "never"], ["2020-01-02", "soon", "2020-01-03T00:00:01"]]
)
def test_times_that_are_text(tmp_path: Path, values: list[str]) -> None:
    """In Parquet and tables as in CSV."""
    table = pa.table({"user": [1, 2, 3], "item": [1, 2, 3], "timestamp": values})
    pq.write_table(table, tmp_path / "log.parquet")
    pa.csv.write_csv(table, tmp_path / "log.csv")
    times = [[row["timestamp"] for row in rows(open_log(log, kind))] for log, kind in (
        (table, "parquet"),
        (table.set_column(2, "timestamp", table["timestamp"].dictionary_encode()), "parquet"),
        (tmp_path / "log.parquet", "parquet"),
        (tmp_path / "log.csv", "csv"),
    )]  # fmt: skip
    assert times[0] == times[1] == times[2] == times[3]
    assert times[0] in ([5, 7], [], [1577923200000000, 1578009601000000])


def test_csv_headers(tmp_path: Path) -> None:
    """Quotes, a delimiter inside quotes, spaces around names, a byte order mark."""
    for number, header in enumerate(
        ['"user","item","timestamp","a,b"', "user, item, timestamp, rest", "\ufeffuser,item,timestamp,rest"]
    ):
        path = tmp_path / f"{number}.csv"
        path.write_text(f"{header}\n1,2,3,x\n")
        assert tuples(open_log(path, "csv")) == [("1", "2", 3)]


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"user,item,timestamp,rest\n1,a,1,caf\xe9\n2,1,2\n3,caf\xe9,3,c\n4,d,x,d\n5,e,5,e\n")
    log = open_log(path, "csv")
    assert tuples(log) == [("1", "a", 1), ("5", "e", 5)]  # nobody reads the column "rest"
    assert sorted(log.bad.first) == [
        "log.csv:3: 3 columns instead of 4",
        "log.csv:4: no text in UTF-8",
        f"log.csv:5: timestamp 'x' is no time; {FORMS}",
    ]
    for text, encoding in (("us\xe9r,item\n", "latin-1"), ("user,item\n", "utf-16")):
        path.write_text(text, encoding=encoding)
        with pytest.raises(ValueError, match=r"log\.csv must be text in UTF-8: its first line is not"):
            open_log(path, "csv")


@pytest.mark.parametrize("where", ["header", "body"])
def test_damaged_gz_is_named(tmp_path: Path, where: str) -> None:
    """gzip has three exceptions of no common kind for what is no gz file, cut, or corrupt."""
    body = "".join(f"{i % 7},{i * 7919 % 1000},{i}\n" for i in range(60_000)).encode()
    whole = gzip.compress(b"user,item,timestamp\n" + body)
    stored = (b"user,item,timestamp\n" + body)[:60_000]
    size = struct.pack("<HH", len(stored), 0xFFFF - len(stored))
    corrupt = (
        whole[:10] + b"\x00" + size + stored + b"\x07" * 60
    )  # a stored block, and one of a kind that does not exist
    with pytest.raises(zlib.error):
        gzip.decompress(corrupt)
    damage = {"header": [b"user,item,timestamp\n1,2,3\n", whole[:12]], "body": [whole[:-2000], corrupt]}
    for data in damage[where]:
        for name, kind in (("log.csv.gz", "csv"), ("meta_X.json.gz", "amazon")):
            (tmp_path / name).write_bytes(data)
            (tmp_path / "reviews_X.json").write_text("\n")
            sources = tmp_path / name if kind == "csv" else [tmp_path / name, tmp_path / "reviews_X.json"]
            with pytest.raises(ValueError, match=rf"{name} (is damaged|cannot be read as CSV)"):
                rows(open_log(sources, kind, max_bad_lines=10**6))


def test_columns_that_do_not_fit_are_named(tmp_path: Path) -> None:
    plain = pa.table({"user": [1, 2], "item": [1, 2], "timestamp": [1, 2]})

    def refused(table: pa.Table, words: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=words):
            rows(open_log(table, **options))

    twice = pa.Table.from_arrays([*plain.columns, plain["item"]], names=[*plain.column_names, "item"])
    refused(twice, r"the table has several columns 'item'; it has \['user', 'item', 'timestamp', 'item'\]")
    (tmp_path / "twice.csv").write_text("user,item,timestamp,item\n1,2,3,4\n")
    with pytest.raises(ValueError, match="twice.csv has several columns 'item'"):
        open_log(tmp_path / "twice.csv", "csv")
    refused(
        plain.append_column("label", pa.array([[1], [0]])), "table: column 'label' must hold 0 and 1", labelled=True
    )
    for role, words in (("user", "integers or text"), ("item", "integers or text"), ("timestamp", "times or numbers")):
        lists = plain.set_column(plain.column_names.index(role), role, pa.array([[1], [2]]))
        refused(lists, rf"table: column '{role}' must hold {words}, got list<item: int64>")
    refused(plain, "field 'a/b' must have a name that a file can have", columns={"item_fields": {"a/b": "item"}})
    refused(
        plain, "user, item and timestamp must be three columns of the table, got 'item', ", columns={"user": "item"}
    )
    for fields in (5, [5], "category"):
        refused(plain, "fields must be a list of columns or a mapping", columns={"user_fields": fields})
    for delimiter in ("", "::", 5):
        with pytest.raises(ValueError, match=f"delimiter must be one character, got {delimiter!r}"):
            open_log(tmp_path / "twice.csv", "csv", delimiter=delimiter)


def test_all_files_of_a_log_have_the_same_fields(tmp_path: Path) -> None:
    plain = pa.table({"user": [1, 2], "item": [1, 2], "timestamp": [1, 2]})
    pq.write_table(plain.append_column("category", pa.array([1, 1])), tmp_path / "a.parquet")
    pq.write_table(plain, tmp_path / "b.parquet")
    for names in ("ab", "ba"):
        with pytest.raises(ValueError, match=r"only one of .*parquet and .*parquet has category: leave the field out"):
            open_log([tmp_path / f"{name}.parquet" for name in names])
    assert len(rows(open_log(tmp_path, columns={"item_fields": []}))) == 4


def test_dense_integers_may_be_large(tmp_path: Path) -> None:
    table = pa.table({"user": [1, 2], "item": [1, 2], "timestamp": [1, 2], "price": [20_000_001, 2**60 + 1]})
    log = open_log(table, columns={"dense": ["price"]})
    assert [row["price"] for row in rows(log)] == [20_000_000.0, float(2**60)]
    assert log.seen["unknown"] == {"price": 0}


def test_capitals_in_endings(tmp_path: Path) -> None:
    """In a folder as in the name of a file: gz is unpacked, and .dat is told from .csv."""
    for name, text in (
        ("CSV/LOG.CSV", "user,item,timestamp\n1,2,3\n"),
        ("GZ/LOG.CSV.GZ", "user,item,timestamp\n1,2,3\n"),
        ("DAT/ratings.DAT", "1::2::4::3\n"),
        ("DAT/movies.DAT", "2::Heat::Crime\n"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".GZ") else text.encode())
    for folder in ("CSV", "GZ"):
        assert tuples(open_log(tmp_path / folder, "csv")) == [("1", "2", 3)]
    assert tuples(open_log(tmp_path / "GZ" / "LOG.CSV.GZ")) == [("1", "2", 3)]
    assert tuples(open_log(tmp_path / "DAT", "movielens")) == [(1, 2, 3 * S, "Crime")]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "parquet", "delimiter": ","}, "delimiter is for format 'csv', got format 'parquet'"),
        ({"format": "taobao", "delimiter": "\t"}, "delimiter is for format 'csv', got format 'taobao'"),
        ({"format": "csv", "behaviours": ["pv"]}, "behaviours is for format 'taobao', got format 'csv'"),
        ({"behaviours": ["buy"]}, "behaviours is for format 'taobao', got format 'amazon'"),  # as the name tells
    ],
)
def test_options_that_a_format_does_not_take_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    (tmp_path / "log.json").write_text("{}")
    with pytest.raises(ValueError, match=words):
        open_log(tmp_path / "log.json", **options)
    with pytest.raises(ValueError, match="delimiter is for format 'csv', got a table"):
        open_log(pa.table({"user": [1], "item": [1], "timestamp": [1]}), delimiter=",")


def test_a_reader_whose_columns_are_not_those_of_its_roles(tmp_path: Path) -> None:
    """Otherwise a category that the roles do not name would be lost without a word."""
    plain = {"user": pa.array([1]), "item": pa.array([2]), "timestamp": pa.array([3])}
    named = Roles(item_fields={"category": "category"}, user_fields={"age": "years"}, dense={"price": "price"})
    fields = {"category": pa.array([4]), "age": pa.array(["old"]), "price": pa.array([0.5])}

    def standard(roles: Roles, columns: dict[str, Any]) -> list[dict[str, Any]]:
        log = Log.of(roles, lambda: iter(()), 0, BadLines(0))
        return log.standardise(columns, "a.log", lambda row: row + 1).to_pylist()

    assert standard(named, plain | fields)[0]["age"] == "old"
    for roles, columns in (
        (Roles(), plain | {"category": pa.array([4])}),
        (named, plain),
        (Roles(), {"user": plain["user"], "item": plain["item"]}),
        (Roles(label="label"), plain),
        (Roles(), plain | {"label": pa.array([1])}),
        (Roles(), plain | {"\xa0user": pa.array([1])}),
    ):
        with pytest.raises(
            ValueError, match=r"a\.log: the reader gives the columns .*, but its Roles name .*'timestamp'"
        ):
            standard(roles, columns)
    with pytest.raises(ValueError, match=r"a\.log: column 'item' must be an Arrow array \(pa\.array\), got list"):
        standard(Roles(), plain | {"item": [2]})
