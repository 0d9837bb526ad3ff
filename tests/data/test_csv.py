"""CSV files: quotes and line breaks at any size, ends of lines, bytes that are not UTF-8, and the lines of messages."""

from __future__ import annotations

import csv
import gzip
import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dien_kernels.data import _csv, open_log
from dien_kernels.data.log import Log

TEXTS = [
    "fine",
    "good, cheap",
    'he said "no"',
    "two\nlines",
    "three\r\nlines\r\nhere",
    "a\rb",
    "ends\n",
    "",
    '"',
    '""',
    "ü",
]


def rows(log: Log) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for batch in log.read() for row in batch.to_pylist()]


def written(texts: list[str], end: str, delimiter: str = ",", quoting: int = csv.QUOTE_NONNUMERIC) -> str:
    file = io.StringIO()
    out = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)  # type: ignore[call-overload]
    out.writerow(["user", "review", "item", "timestamp"])
    out.writerows([row, text, row % 7, row] for row, text in enumerate(texts))
    return file.getvalue()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_text_that_nobody_asks_for_may_be_any_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, delimiter: str
) -> None:
    generator = random.Random(0)
    texts = [generator.choice(TEXTS) * generator.randrange(1, 4) for _ in range(400)]
    path = tmp_path / "log.csv"
    for block in (200, 1000, 4 << 20):
        monkeypatch.setattr(_csv, "_BLOCK", block)
        for quoting in (csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL):
            path.write_bytes(written(texts, end, delimiter, quoting).encode())
            log = open_log(path, delimiter=delimiter)
            assert rows(log) == [(str(row), str(row % 7), row) for row in range(400)]
            assert log.bad.count == 0


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
@pytest.mark.parametrize("block", [300, 4 << 20])
def test_lines_of_messages_are_those_of_an_editor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, name: str, block: int
) -> None:
    """Also behind quoted line breaks, blank lines, and other bad lines."""
    monkeypatch.setattr(_csv, "_BLOCK", block)
    generator = random.Random(1)
    pieces, wrong = ["user,item,timestamp,review"], []
    line = 2
    for row in range(300):
        text = generator.choice(["", '"a""b"', '"two' + end + 'lines"', 'un"quoted', f'"{end}{end}"'])
        piece = f"{row},1,{row},{text}"
        kind = generator.randrange(40)
        if kind == 0:
            piece = f"{row},1,{text}"
        elif kind == 1:
            piece = f"{row},1,soon,{text}"
        elif kind == 2:
            piece = f",1,{row},{text}"
        elif kind == 3:
            pieces.append("")
            line += 1
        if kind in (0, 1, 2):
            wrong.append(line)
        pieces.append(piece)
        line += 1 + piece.count(end)
    raw = end.join([*pieces, ""]).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    log = open_log(tmp_path / name)
    rows(log)
    assert log.bad.count == len(wrong) > 10
    told = [int(text.split(":")[1]) for text in log.bad.first]
    assert len(told) == 10
    assert set(told) <= set(wrong)
    if block == 300:  # in one large block, all of a wrong number of columns come first
        assert set(told) <= set(wrong[:14])


BOTH = b"3,caf\xe9\n"


@pytest.mark.parametrize(
    "line, reason",
    [
        (BOTH, "2 columns instead of 3"),
        (b"\xff\xfe,1,2,3\n", "4 columns instead of 3"),
        (b'"\xe9,1,2"\n', "1 columns instead of 3"),
        (b"3,caf\xe9,3\n", "no text in UTF-8"),
        (b"\xe9,1,3\n", "no text in UTF-8"),
        (b"3,1,\xe93\n", "no text in UTF-8"),
        (b"3,\xe2\x82,3\n", "no text in UTF-8"),  # the beginning of a character
        (b"3,\xed\xa0\x80,3\n", "no text in UTF-8"),  # half a surrogate pair
    ],
)
@pytest.mark.parametrize("block", [40, 4 << 20])
def test_bytes_that_are_not_utf8_are_one_bad_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, reason: str, block: int
) -> None:
    monkeypatch.setattr(_csv, "_BLOCK", block)
    good = "1,ü€😀,5\n".encode() * 9
    (tmp_path / "log.csv").write_bytes(b"user,item,timestamp\n" + good + line + good)
    log = open_log(tmp_path / "log.csv")
    assert rows(log) == [("1", "ü€😀", 5)] * 18
    assert log.bad.first == [f"log.csv:11: {reason}"]


def test_many_bad_lines_stop_the_reading_with_the_first_ones(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"user,item,timestamp\n" + BOTH * 5)
    with pytest.raises(ValueError, match=r"more than max_bad_lines=4 .*\n  log\.csv:2: 2 columns(.*\n)*.*log\.csv:6: "):
        rows(open_log(tmp_path / "log.csv", max_bad_lines=4))


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_csv, "_BLOCK", 1 << 20)
    text = "user,item,timestamp\n1,2,3\n" + '4,"5,6\n' + "7,8,9\n" * 500_000
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=r"log\.csv cannot be read as CSV: .*a quote that is never closed"):
        rows(open_log(tmp_path / "log.csv"))


@pytest.mark.parametrize(
    "header, words",
    [
        (b"user,item\n", "log.csv has no timestamp column"),
        (b'user,"item\n', r"log.csv has no timestamp column .*it has \['user', 'item'\]"),
        (b"\n\n", "log.csv must start with a header line"),
        (b"user,it\xe9m,time\n", "must be text in UTF-8"),
        (b"user,item,time\x00\n" + b"x" * 200_000, "no timestamp column"),
        (b"x" * 200_000 + b"\n", "must start with a line of column names: field larger"),
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: bytes, words: str) -> None:
    (tmp_path / "log.csv").write_bytes(header)
    with pytest.raises(ValueError, match=words):
        open_log(tmp_path / "log.csv")


def test_headers_over_several_lines_and_behind_blank_ones(tmp_path: Path) -> None:
    for text in ("\n\nuser,item,timestamp\n1,2,3\nx\n", '"user","a\nb",item,timestamp\n1,-,2,3\nx\n'):
        (tmp_path / "log.csv").write_text(text)
        log = open_log(tmp_path / "log.csv")
        assert rows(log) == [("1", "2", 3)]
        assert log.bad.first[0].startswith(f"log.csv:{text[: text.index('x')].count(chr(10)) + 1}: 1 columns")


@pytest.mark.parametrize("block", range(30, 60))
def test_ends_of_lines_inside_of_values_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Wherever a block ends."""
    monkeypatch.setattr(_csv, "_BLOCK", block)
    users = ["a\r\n", "\r\r\nb", "x\n\r", "c\r\nd\u20ac", "\ne"] * 3
    body = "".join(f'"{user}",1,{time}\r\n' for time, user in enumerate(users))
    (tmp_path / "log.csv").write_bytes(b"user,item,timestamp\r\n" + body.encode())
    assert rows(open_log(tmp_path / "log.csv")) == [(user, "1", time) for time, user in enumerate(users)]


def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """Of 30 MB with quoted line breaks only a few blocks are held at a time."""
    (tmp_path / "log.csv").write_text("user,review,item,timestamp\n" + '1,"two\nlines of text here",2,3\n' * 1_000_000)
    log = open_log(tmp_path / "log.csv")
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for batch in log.read():
        most = max(most, pa.total_allocated_bytes() - before)
        count += batch.num_rows
    assert count == 1_000_000
    assert most < 6 * _csv._BLOCK
