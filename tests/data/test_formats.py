"""The formats of public logs, on made-up files of their true forms: values, corrupt lines, what is missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dien_kernels.data import guess, open_log
from dien_kernels.data.log import Log

S = 10**6  # microseconds


def rows(log: Log) -> list[dict[str, Any]]:
    return pa.Table.from_batches(log.read()).to_pylist()


def tuples(log: Log) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in rows(log)]


META = [
    "{'asin': 'i1', 'title': \"It's\", 'categories': [['Books', 'Old'], ['Other']]}",  # a Python literal
    json.dumps({"asin": "i2", "categories": [["Books", "New"]]}),
    "{'asin': 'i3'}",
    "{'asin': 'i4', 'categories': [['Books',",
    "__import__('os').getpid()",
]


@pytest.mark.parametrize("lines", [100, 1])
def test_amazon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    monkeypatch.setattr("dien_kernels.data.formats._LINES", lines)
    reviews = [
        json.dumps({"reviewerID": "A", "asin": "i1", "unixReviewTime": 5, "helpful": [0, 1], "overall": 5.0}),
        "",
        '{"reviewerID": "B", "asin": "i2", "unixRev',
        json.dumps({"reviewerID": "B", "asin": "i3", "unixReviewTime": 6}),
        json.dumps({"reviewerID": "B", "unixReviewTime": 6}),
        json.dumps({"reviewerID": "A", "asin": "i2", "unixReviewTime": 4}),
    ]
    (tmp_path / "reviews_Books.json").write_text("\n".join(reviews))
    with gzip.open(tmp_path / "meta_Books.json.gz", "wt") as file:
        file.write("\n".join(META))
    log = open_log(tmp_path, "amazon")
    assert tuples(log) == [("A", "i1", 5 * S, "Old"), ("B", "i3", 6 * S, None), ("A", "i2", 4 * S, "New")]
    bad = sorted(line.split(": ")[0] for line in log.bad.first)
    assert bad == [
        "meta_Books.json.gz:4",
        "meta_Books.json.gz:5",
        "reviews_Books.json:3",
        "reviews_Books.json:5",
    ]
    with pytest.raises(ValueError, match="max_bad_lines=3"):
        rows(open_log(tmp_path, "amazon", max_bad_lines=3))
    with pytest.raises(FileNotFoundError, match=r"no meta_.* among \['reviews_Books.json'\]"):
        open_log(tmp_path / "reviews_Books.json", "amazon")


def test_amazon_cut_gz_says_so(tmp_path: Path) -> None:
    (tmp_path / "meta_X.json").write_text(META[0])
    whole = gzip.compress(b'{"reviewerID": "A", "asin": "i1", "unixReviewTime": 5}\n' * 500)
    (tmp_path / "reviews_X.json.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="reviews_X.json.gz is damaged"):
        rows(open_log(tmp_path, "amazon"))


def test_taobao(tmp_path: Path) -> None:
    (tmp_path / "UserBehavior.csv").write_text(
        "1,10,100,pv,1511544070\n1,11,100,buy,1511544071\n2,12,101,look,1\n2,x,101,pv,2\n3,13,101,pv,3\n"
    )
    log = open_log(tmp_path / "UserBehavior.csv", "taobao")
    assert rows(log) == [
        {"user": 1, "item": 10, "category": 100, "timestamp": 1511544070 * S},
        {"user": 3, "item": 13, "category": 101, "timestamp": 3 * S},
    ]
    assert log.bad.first == [
        "UserBehavior.csv:3: 'look' is no kind of behaviour; kinds are pv, cart, fav, buy",
        "UserBehavior.csv:4: item 'x' is no id; an id is a whole number below 2^63, or text in UTF-8",
    ]
    assert [row["item"] for row in rows(open_log(tmp_path, "taobao", behaviours=["buy"]))] == [11]
    for kinds in (["click"], [["pv"]], "pv", []):
        with pytest.raises(ValueError, match=r"behaviours must be .*'pv'.* got "):
            open_log(tmp_path, "taobao", behaviours=kinds)  # type: ignore[arg-type]


def test_movielens_csv_and_dat(tmp_path: Path) -> None:
    csv, dat = tmp_path / "csv", tmp_path / "dat"
    csv.mkdir()
    dat.mkdir()
    (csv / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,4.5,9\n1,3,x,10\n1,4,1.0,\n")
    (csv / "movies.csv").write_text(
        'movieId,title,genres\n2,"Jumanji, or: 2 (1995)",Adventure|Children\n3,Heat,(no genres listed)\n'
    )
    (dat / "ratings.dat").write_text("1::2::4::9\n1::3::4::10\n")
    (dat / "movies.dat").write_bytes("2::Am\xe9lie: 1 (2001)::Adventure|Comedy\n3::Heat\n".encode("latin-1"))
    expected = [(1, 2, 9 * S, "Adventure"), (1, 3, 10 * S, None)]
    for folder, bad in ((csv, "ratings.csv:4: timestamp is missing"), (dat, "movies.dat:2: no movie: '3::Heat'")):
        log = open_log(folder, "movielens")
        assert tuples(log) == expected
        assert log.bad.first == [bad]
    (csv / "ratings.csv").write_text("user,movie\n1,2\n")
    with pytest.raises(ValueError, match=r"ratings.csv cannot be read as CSV: .*'userId'"):
        rows(open_log(csv, "movielens"))


def test_amazon_values_that_no_column_holds(tmp_path: Path) -> None:
    """Times beyond 64 bits and halves of surrogate pairs are bad lines, and not the end of the reading."""
    good = json.dumps({"reviewerID": "A", "asin": "i1", "unixReviewTime": 5})
    reviews = [
        '{"reviewerID": "A", "asin": "i1", "unixReviewTime": ' + "9" * 30 + "}",
        '{"reviewerID": "A\\ud800", "asin": "i1", "unixReviewTime": 5}',
        good,
    ]
    latin = good.replace("A", "A\xe9").encode("latin-1")
    (tmp_path / "reviews_X.json").write_bytes("\n".join(reviews).encode() + b"\n" + latin)
    meta = ['{"asin": "i1\\ud800", "categories": [["x"]]}', '{"asin": "i1", "categories": [["x\\ud800"]]}']
    (tmp_path / "meta_X.json").write_text("\n".join(meta))
    log = open_log(tmp_path, "amazon")
    assert tuples(log) == [("A", "i1", 5 * S, None)]
    assert sorted(line.rpartition(" (")[0] for line in log.bad.first) == [
        "meta_X.json:1: no meta entry",
        "reviews_X.json:1: no review",
        "reviews_X.json:2: no review",
        "reviews_X.json:4: no review",
    ]


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path: Path) -> None:
    lines = ['{"reviewerID": "A", "asin": "i1", "unixReviewTime": 5}', "", '{"reviewerID": "B"}', ""]
    (tmp_path / "reviews_X.json").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "meta_X.json").write_text('{"asin": "i1", "categories": [["Old"]]}', encoding="utf-8-sig")
    log = open_log(tmp_path, "amazon")
    assert tuples(log) == [("A", "i1", 5 * S, "Old")]
    assert log.bad.first == ["reviews_X.json:3: item is missing"]  # blank lines are counted
    for format, name, text in (
        ("movielens", "ratings.csv", "userId,movieId,rating,timestamp\n1,2,4.5,9\n"),
        ("movielens", "movies.csv", "movieId,title,genres\n2,Heat,Crime\n"),
        ("taobao", "UserBehavior.csv", "1,2,7,pv,9\n"),
    ):
        (tmp_path / format).mkdir(exist_ok=True)
        (tmp_path / format / name).write_text(text, encoding="utf-8-sig")
    assert tuples(open_log(tmp_path / "movielens", "movielens")) == [(1, 2, 9 * S, "Crime")]
    assert [set(row.values()) for row in rows(open_log(tmp_path / "taobao", "taobao"))] == [{1, 2, 7, 9 * S}]


def test_amazon_2018(tmp_path: Path) -> None:
    """``category`` is one path, and reviews have keys of their own."""
    review = {
        "overall": 5.0,
        "verified": True,
        "vote": "2",
        "reviewTime": "04 7, 2018",
        "reviewerID": "A1",
        "asin": "B001",
        "style": {"Size:": " L"},
        "reviewerName": "Ann",
        "reviewText": "fine\nindeed",
        "unixReviewTime": 1523059200,
    }
    meta = {"category": ["Toys & Games", "Puzzles", "Jigsaws"], "title": "x", "asin": "B001", "main_cat": "Toys"}
    with gzip.open(tmp_path / "Toys_and_Games_5.json.gz", "wt") as file:
        for asin in ("B001", "B002", "B003", "B004"):
            file.write(json.dumps(review | {"asin": asin}) + "\n")
    with gzip.open(tmp_path / "meta_Toys_and_Games.json.gz", "wt") as file:
        for entry in (meta, meta | {"asin": "B002", "category": []}, {"asin": "B003", "category": []}):
            file.write(json.dumps(entry) + "\n")
    time = 1523059200 * S
    assert tuples(open_log(tmp_path, "amazon")) == [
        ("A1", "B001", time, "Jigsaws"),
        ("A1", "B002", time, "Toys"),  # no path
        ("A1", "B003", time, None),  # neither
        ("A1", "B004", time, None),  # no entry
    ]


@pytest.mark.parametrize("lines", [100, 1])
def test_amazon_2023(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    """Items are parents, times are milliseconds, and ``categories`` is one path."""
    monkeypatch.setattr("dien_kernels.data.formats._LINES", lines)
    review = {
        "rating": 5.0,
        "title": "Such a lovely scent",
        "text": "good",
        "images": [],
        "asin": "B00YQ6X8EO",
        "parent_asin": "P1",
        "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
        "timestamp": 1588687728923,
        "helpful_vote": 0,
        "verified_purchase": True,
    }
    meta = {"main_category": "All Beauty", "parent_asin": "P1", "categories": ["Beauty", "Hair"], "details": {}}
    corrupt = ['{"user_id": "B", "parent_asin": "P1", "timestamp": "x"}', '{"user_id": 5}', "{"]
    reviews = [json.dumps(review), *corrupt, json.dumps(review | {"parent_asin": "P2"})]
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "All_Beauty.jsonl").write_text("\n".join(reviews))
    (tmp_path / "meta_All_Beauty.jsonl").write_text(
        json.dumps(meta) + "\n" + json.dumps(meta | {"parent_asin": "P2", "categories": []}) + "\n"
    )
    log = open_log(tmp_path, "amazon")
    time = 1588687728923 * 1000
    assert tuples(log) == [(review["user_id"], "P1", time, "Hair"), (review["user_id"], "P2", time, "All Beauty")]
    assert log.seen["times"]["epoch ms"]["rows"] == 2
    told = sorted(log.bad.first)
    assert [line.split(" (")[0] for line in told] == [f"All_Beauty.jsonl:{line}: no review" for line in (2, 3, 4)]
    assert all(corrupt[place] in line for place, line in enumerate(told))
    assert guess(tmp_path / "meta_All_Beauty.jsonl") == {"format": "amazon"}


def test_amazon_without_any_category_says_so(tmp_path: Path) -> None:
    (tmp_path / "meta_X.json").write_text(json.dumps({"asin": "i1", "title": "x"}))
    (tmp_path / "reviews_X.json").write_text(json.dumps({"reviewerID": "A", "asin": "i1", "unixReviewTime": 5}))
    log = open_log(tmp_path, "amazon")
    assert len(rows(log)) == 1
    assert log.seen["unknown_everywhere"] == ["category"]


def test_movielens_100k(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\nx\t1\t1\t1\n1\t9\t5\t1\n")
    flags = {242: "0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0", 302: "1|0|0|0|0|0|1|0|0|0|1|0|0|1|0|0|1|0|0"}
    films = [f"{film}|L\xe9on (1997)|01-Jan-1997||http://us.imdb.com/M|{given}" for film, given in flags.items()]
    (tmp_path / "u.item").write_bytes("\n".join([*films, "9|short"]).encode("latin-1"))
    (tmp_path / "u.user").write_text("1|24|M|technician|85711\n")
    log = open_log(tmp_path, "movielens")
    assert tuples(log) == [
        (196, 242, 881250949 * S, "Comedy"),
        (186, 302, 891717742 * S, "Crime"),
        (1, 9, 1 * S, None),
    ]
    assert log.bad.first == [
        "u.item:3: no movie: '9|short'",
        "u.data:3: user 'x' is no id; an id is a whole number below 2^63, or text in UTF-8",
    ]
