"""What a source may be: partitioned folders, patterns, packed files, the home folder, and tables of any library."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dien_kernels.data import guess, open_log, prepare, synthetic
from dien_kernels.data.log import Log

CSV = "user,item,timestamp\n1,2,3\n"


def rows(log: Log) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for batch in log.read() for row in batch.to_pylist()]


def part(path: Path, user: int, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"user": [user], "item": [1], "timestamp": [user], **columns})
    pq.write_table(table, path)


@pytest.fixture
def warehouse(tmp_path: Path) -> Path:
    """A log as Spark or Hive writes it."""
    root = tmp_path / "events"
    for number, day in enumerate(("2024-01-01", "2024-01-02", "2024-01-03")):
        for hour in (0, 1):
            part(root / f"day={day}" / f"hour={hour}" / "part-0.snappy.parquet", 2 * number + hour)
            pq.write_table(
                pa.table({"user": pa.array([], pa.int64()), "item": pa.array([], pa.int64()), "timestamp": []}),
                root / f"day={day}" / f"hour={hour}" / "part-1.snappy.parquet",
            )
    for name in (
        "_SUCCESS",
        ".part.crc",
        "_temporary/0/part-9.parquet",
        ".hidden/part-9.parquet",
        "day=2024-01-01/_a.pq",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("nothing that could be read")
    return root


def test_partitioned_folders(warehouse: Path) -> None:
    log = open_log(warehouse)
    assert rows(log) == [(user, 1, user) for user in range(6)]
    assert rows(open_log([warehouse / "day=2024-01-02", warehouse / "day=2024-01-01"])) == [
        (user, 1, user) for user in (2, 3, 0, 1)
    ]


def test_partition_keys_are_columns_when_they_are_asked_for(warehouse: Path) -> None:
    log = open_log(warehouse, columns={"timestamp": "day", "user_fields": ["hour"]})
    first = 1_704_067_200 * 10**6
    found = rows(log)
    assert [time for _, _, time, _ in found] == [first + day * 86_400 * 10**6 for day in (0, 0, 1, 1, 2, 2)]
    assert [hour for *_, hour in found] == ["0", "1"] * 3
    with pytest.raises(ValueError, match=r"has no column 'week'; it has .*'timestamp', 'day', 'hour'\]"):
        open_log(warehouse, columns={"user_fields": ["week"]})


def test_partition_values_are_unquoted_and_may_be_missing(tmp_path: Path) -> None:
    part(tmp_path / "site=a%2Fb c" / "x.parquet", 1)
    part(tmp_path / "site=__HIVE_DEFAULT_PARTITION__" / "x.parquet", 2)
    (tmp_path / "site=x=y").mkdir()
    (tmp_path / "site=x=y" / "x.csv").write_text(CSV)
    log = open_log(tmp_path, columns={"user_fields": ["site"]})
    assert [site for *_, site in rows(log)] == [None, "a/b c"]
    assert rows(open_log(tmp_path, "csv", columns={"user_fields": ["site"]})) == [("1", "2", 3, "x=y")]
    part(tmp_path / "site=z" / "x.parquet", 3, site=["inside"])  # a column of the file goes before
    assert [site for *_, site in rows(open_log(tmp_path / "site=z", columns={"user_fields": ["site"]}))] == ["inside"]


def test_patterns(warehouse: Path) -> None:
    for pattern, users in (
        ("day=2024-01-0[12]", range(4)),
        ("day=*/hour=1", (1, 3, 5)),
        ("day=*/hour=1/part-0*", (1, 3, 5)),
        ("**/part-0.snappy.parquet", range(6)),
    ):
        assert [user for user, *_ in rows(open_log(warehouse / pattern))] == list(users)
        assert [user for user, *_ in rows(open_log([str(warehouse / pattern)]))] == list(users)
    with pytest.raises(FileNotFoundError, match=r"no file matches the pattern .*day=2025\*; .*events has \['\.hidden'"):
        open_log(warehouse / "day=2025*")
    part(warehouse / "a[1].parquet", 7)  # a file of that very name
    assert rows(open_log(warehouse / "a[1].parquet")) == [(7, 1, 7)]


def test_empty_files(tmp_path: Path) -> None:
    """In a folder they are parts without rows; named one by one, they are mistakes."""
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.csv").touch()
    assert rows(open_log(tmp_path, "csv")) == [("1", "2", 3)]
    with pytest.raises(ValueError, match=r"b\.csv is empty"):
        open_log(tmp_path / "b.csv")
    (tmp_path / "a.csv").unlink()
    with pytest.raises(ValueError, match=r"has only empty files: .*b\.csv is empty"):
        open_log(tmp_path, "csv")


def zst(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, "zstd", asbytes=True)
    return packed


@pytest.mark.parametrize("ending, pack", [(".gz", gzip.compress), (".zst", zst), (".GZ", gzip.compress), (".ZST", zst)])
def test_packed_files(tmp_path: Path, ending: str, pack: Any) -> None:
    for name, text in (("log.csv", CSV), ("log.tsv", CSV.replace(",", "\t"))):
        path = tmp_path / (name + ending)
        path.write_bytes(pack(text.encode()) + pack(b"4,5,6\n".replace(b",", b"\t" if "tsv" in name else b",")))
        log = open_log(path)
        assert rows(log) == [("1", "2", 3), ("4", "5", 6)]
        assert guess(path)["format"] == "csv"
        whole = pack((text + text.splitlines()[1] * 9999).encode())
        path.write_bytes(whole[:-9])
        with pytest.raises(ValueError, match=rf"{name}{ending} (is damaged|cannot be read as CSV)"):
            rows(open_log(path, max_bad_lines=10**6))


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    part(home / "logs" / "a.parquet", 1)
    for source in ("~/logs", "~/logs/a.parquet", Path("~/logs/a.parquet"), "~/logs/*.parquet", ["~/logs/a.parquet"]):
        assert rows(open_log(source)) == [(1, 1, 1)]
    with pytest.raises(ValueError, match="~nobodyhere/x: "):
        open_log("~nobodyhere/x")
    table = pa.table({"user": [1, 1, 2, 2], "item": [1, 2, 1, 3], "timestamp": [1, 2, 3, 4]})
    prepare(table, "~/prepared", progress=False, fractions=(1, 0, 0))
    assert (home / "prepared" / "meta.json").exists()
    assert list(here.iterdir()) == []


class Stream:
    """A table of a library that this package knows nothing of."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


TABLE = pa.table(
    {
        "user": ["a", "b", None, "c"],
        "item": [1, 2, 3, 4],
        "timestamp": ["2023-01-01"] * 4,
        "category": ["x", None, "y", "z"],
    }
)


def tables() -> Iterator[tuple[str, Any]]:
    yield "table", TABLE
    yield "record batch", TABLE.to_batches()[0]
    yield "reader", pa.RecordBatchReader.from_batches(TABLE.schema, TABLE.to_batches(max_chunksize=1))
    yield "stream", Stream(TABLE)
    frame = pl.DataFrame(TABLE)
    yield "frame", frame
    yield "categories", frame.with_columns(pl.col("category").cast(pl.Categorical), pl.col("timestamp").str.to_date())
    yield "lazy frame", frame.lazy().filter(pl.col("item") > 0)


@pytest.mark.parametrize("name, table", list(tables()), ids=[name for name, _ in tables()])
@pytest.mark.parametrize("chunk_rows", [1, 1 << 18])
def test_tables_of_any_library(name: str, table: Any, chunk_rows: int) -> None:
    if name == "reader":  # can be read once
        table = pa.RecordBatchReader.from_batches(TABLE.schema, TABLE.to_batches(max_chunksize=1))
    log = open_log(table, chunk_rows=chunk_rows)
    time = 1_672_531_200 * 10**6
    assert rows(log) == [("a", 1, time, "x"), ("b", 2, time, None), ("c", 4, time, "z")]
    assert log.bad.first == ["table:3: user is missing"]


@pytest.mark.parametrize("wrong", [None, 5, 1.5, True, b"log.csv", {"a": 1}, iter(["log.csv"])])
def test_sources_of_another_type(tmp_path: Path, wrong: Any) -> None:
    words = f"^sources must be a path, a list of paths or a table, got {type(wrong).__name__}$"
    for call in (lambda: open_log(wrong), lambda: prepare(wrong, tmp_path / "p")):
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(TypeError, match="^sources must be a path, text or a pathlib.Path, got int$"):
        open_log([1])  # type: ignore[list-item]
    for out in (None, 5, b"p", ["p"]):
        with pytest.raises(TypeError, match=f"^out must be a path, text or a pathlib.Path, got {type(out).__name__}$"):
            prepare(synthetic(users=5, items=9, categories=2, events=50), out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^out must be a path without the character NUL, got 'a.x00b'$"):
        prepare(synthetic(users=5, items=9, categories=2, events=50), "a\0b")
    with pytest.raises(TypeError, match="^columns must be Columns or a mapping of roles to columns, got int$"):
        open_log(synthetic(users=5, items=9, categories=2, events=50), columns=3)  # type: ignore[arg-type]
    for name in ("overwrite", "progress"):
        with pytest.raises(TypeError, match=f"^{name} must be a bool, got str$"):
            prepare(synthetic(users=5, items=9, categories=2, events=50), tmp_path / "p", **{name: "no"})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_tables_are_prepared() -> None:
    for table in (pl.DataFrame(TABLE).clear(), pl.LazyFrame({"user": [], "item": [], "timestamp": []})):
        with pytest.raises(ValueError, match="there is no usable row in the table"):
            prepare(table, "nowhere", progress=False)
    with pytest.raises(ValueError, match="delimiter is for format 'csv', got a table"):
        open_log(pl.DataFrame(TABLE), delimiter=";")
    with pytest.raises(ValueError, match="a table must have named columns, got Series"):
        open_log(pl.Series([1, 2]))


def test_a_lazy_frame_is_not_collected_as_a_whole() -> None:
    asked: list[int] = []

    def watched(frame: pl.DataFrame) -> pl.DataFrame:
        asked.append(frame.height)
        return frame

    frame = pl.LazyFrame({"user": range(50), "item": range(50), "timestamp": range(50)})
    log = open_log(frame.map_batches(watched), chunk_rows=5)
    assert asked == []
    assert len(rows(log)) == 50


def test_prepared_folders_are_no_logs(tmp_path: Path) -> None:
    """prepare logs/ --out logs/prepared, twice: the shards of the first time are not read."""
    logs, out = tmp_path / "logs", tmp_path / "logs" / "prepared"
    part(logs / "day=1" / "a.parquet", 1_600_000_000)
    pq.write_table(synthetic(users=40, items=30, categories=3, events=300), logs / "b.parquet")
    (logs / "other").mkdir()
    (logs / "other" / "meta.json").write_text('{"format": "of another program"}')
    part(logs / "other" / "c.parquet", 1_600_000_001)
    for sources in (logs, str(logs / "**" / "*.parquet"), str(logs / "*"), [logs / "day=1", logs]):
        first = prepare(
            sources, out, columns={"item_fields": []}, duplicates="drop", progress=False, overwrite=out.exists()
        )
        rows = pq.read_metadata(logs / "b.parquet").num_rows + 2
        assert first.meta["report"]["rows"] == rows + isinstance(sources, list)
    (logs / "other" / "meta.json").unlink()  # a pattern takes every file that it matches, but each of them once
    assert prepare(str(logs / "**"), out, columns={"item_fields": []}, overwrite=True).meta["report"]["rows"] == rows
    interrupted = logs / "half"
    (interrupted / ".work").mkdir(parents=True)
    (interrupted / "unfinished").write_text("{}")
    (interrupted / "shards").mkdir()
    part(interrupted / "shards" / "d.parquet", 3)
    inside = sum(path.stat().st_size for path in (logs / "b.parquet", *logs.glob("*/[ac].parquet")))
    for sources in (logs, str(logs / "**" / "*.parquet")):
        assert open_log(sources, columns={"item_fields": []}).total == inside
    with pytest.raises(ValueError, match="must name logs, got .*prepared, which is a prepared folder"):
        prepare(out, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no file outside of prepared folders matches"):
        open_log(str(out / "**" / "*.parquet"))


def test_the_folder_that_a_pattern_reads_is_not_written_to(tmp_path: Path) -> None:
    part(tmp_path / "logs" / "day=1" / "a.parquet", 1)
    for pattern in ("logs/day=*/*.parquet", "logs/*/a.parquet", "logs/**"):
        with pytest.raises(FileExistsError, match="which is to be read"):
            prepare(tmp_path / pattern, tmp_path / "logs", progress=False)
