"""Times of every form: what they become, which of them are refused, and what is said about it."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dien_kernels.data import open_log
from dien_kernels.data._times import FIRST, FORMS, LAST, PER_SECOND
from dien_kernels.data.log import Log

S = 10**6
NEW_YEAR = 1_672_531_200  # 2023-01-01 00:00:00 UTC


def table(times: Any, dtype: pa.DataType | None = None) -> pa.Table:
    column = times if isinstance(times, pa.Array) else pa.array(times, dtype)
    return pa.table({"user": range(len(column)), "item": range(len(column)), "timestamp": column})


def read(log: Log) -> list[Any]:
    return [time for batch in log.read() for time in batch.column("timestamp").to_pylist()]


def csv(path: Path, times: list[str]) -> Path:
    path.write_text("user,item,timestamp\n" + "".join(f"{row},1,{time}\n" for row, time in enumerate(times)))
    return path


@pytest.mark.parametrize(
    "text, micros",
    [
        ("2023-01-01", 0),
        ("2023-1-1", 0),
        ("2023/01/01 01:00", 3600 * S),
        ("2023-01-01 00:00:05 UTC", 5 * S),
        ("2023-01-01 00:00:05 GMT", 5 * S),
        ("2023-01-01 00:00:05.123456+00", 5_123_456),
        ("2023-01-01 00:00:05.123456789", 5_123_456),
        ("2023-01-01T00:00:05Z", 5 * S),
        ("2023-01-01t00:00:05.5z", 5_500_000),
        ("2023-01-01T00:00:05,5", 5_500_000),
        ("2023-01-01T05:30:00+05:30", 0),
        ("2022-12-31 19:00:00-0500", 0),
        ("2022-12-31 19:00:00 -05", 0),
        ("  2023-01-01 00:00:01  ", S),
    ],
)
def test_text_as_iso_8601_and_as_warehouses_print_it(tmp_path: Path, text: str, micros: int) -> None:
    for others in ([], ["2023-01-01 00:00:00"], [str(NEW_YEAR)]):  # alone, and among plainer ones
        times = [text, *others]
        expected = [NEW_YEAR * S + micros, *[NEW_YEAR * S] * len(others)]
        for source in (table(times), table(pa.array(times).dictionary_encode()), table([t.encode() for t in times])):
            log = open_log(source)
            assert read(log) == expected
            assert (log.time_unit, log.bad.count) == ("us", 0)
        quoted = csv(tmp_path / "log.csv", [f'"{time}"' for time in times])
        assert read(open_log(quoted)) == expected


@pytest.mark.parametrize(
    "times, expected",
    [
        ([date(2023, 1, 1)], [NEW_YEAR * S]),
        ([datetime(2023, 1, 1, tzinfo=timezone(timedelta(hours=1)))], [(NEW_YEAR - 3600) * S]),
        (pa.array([NEW_YEAR], pa.timestamp("s")), [NEW_YEAR * S]),
        (pa.array([NEW_YEAR * 10**9 + 1999], pa.timestamp("ns", "Europe/Berlin")), [NEW_YEAR * S + 1]),
        ([NEW_YEAR], [NEW_YEAR * S]),
        ([NEW_YEAR * 1000 + 7], [NEW_YEAR * S + 7000]),
        ([NEW_YEAR * S + 7], [NEW_YEAR * S + 7]),
        ([NEW_YEAR * 10**9 + 7999], [NEW_YEAR * S + 7]),
        ([NEW_YEAR + 0.25, None, float("nan")], [NEW_YEAR * S + 250_000]),
        ([NEW_YEAR * 1000 + 0.5], [NEW_YEAR * S + 500]),
        ([Decimal(f"{NEW_YEAR}.123456")], [NEW_YEAR * S + 123_456]),
        (pa.array([Decimal(NEW_YEAR)], pa.decimal128(38, 0)), [NEW_YEAR * S]),
        ([str(NEW_YEAR), f"{NEW_YEAR}.5", "1.6725312e9"], [NEW_YEAR * S, NEW_YEAR * S + 500_000, NEW_YEAR * S]),
        (pa.array([NEW_YEAR], pa.uint32()), [NEW_YEAR * S]),
    ],
)
def test_calendar_times_become_microseconds(times: Any, expected: list[int]) -> None:
    log = open_log(table(times))
    assert read(log) == expected
    assert log.time_unit == "us"


@pytest.mark.parametrize(
    "times, expected",
    [
        ([0, 1, 2], [0, 1, 2]),
        ([3.0, 4.0], [3, 4]),
        (["5", "6", "-7"], [5, 6, -7]),
        ([0.5, 2.0], [0.5, 2.0]),
        (["0.5", "2"], [0.5, 2.0]),
        ([20230101, 20230102], [20230101, 20230102]),
    ],
)
def test_plain_numbers_stay_numbers(times: Any, expected: list[Any]) -> None:
    log = open_log(table(times))
    found = read(log)
    assert found == expected
    assert [type(time) for time in found] == [type(time) for time in expected]
    assert log.time_unit == "number"


@pytest.mark.parametrize("unit", PER_SECOND)
def test_the_ranges_of_the_units_are_1990_to_2100(unit: str) -> None:
    per = PER_SECOND[unit]
    for number, known in ((FIRST * per - 1, False), (FIRST * per, True), (LAST * per - 1, True), (LAST * per, False)):
        log = open_log(table([number]))
        assert read(log) == ([number * 10**6 // per] if known else [number])
        assert log.time_unit == ("us" if known else "number")
    log = open_log(table([NEW_YEAR * per] * 3 + [5]))
    assert read(log) == [NEW_YEAR * S] * 3
    assert log.bad.first == [f"table:4: timestamp 5 is no time; {FORMS}"]
    assert read(open_log(table([5, -5]), time_unit=unit)) == [5 * 10**6 // per, -5 * 10**6 // per]


DAY = 86_400


@pytest.mark.parametrize("second", ["s", "ms", "us", "ns", "float", "iso", "date", "timestamp"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_files_of_several_units_are_in_the_right_order(tmp_path: Path, second: str, ending: str) -> None:
    def write(name: str, kind: str, days: range) -> Path:
        times = [NEW_YEAR + DAY * day for day in days]
        dates = np.array(times, "datetime64[s]")
        column = {
            "float": lambda: pa.array([time + 0.0 for time in times]),
            "iso": lambda: pa.array(dates.astype(str)),
            "date": lambda: pa.array(dates.astype("datetime64[D]")),
            "timestamp": lambda: pa.array(dates),
        }.get(kind, lambda: pa.array([time * PER_SECOND[kind] for time in times]))()
        if ending == "csv":
            return csv(tmp_path / f"{name}.csv", [str(value) for value in column.to_pylist()])
        pq.write_table(table(column), tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    for first in ("iso", "s"):
        paths = [write("a", first, range(3)), write("b", second, range(3, 6))]
        log = open_log(paths)
        assert read(log) == [(NEW_YEAR + DAY * day) * S for day in range(6)]
        assert sum(entry["rows"] for entry in log.seen["times"].values()) == 6


def test_what_was_seen_is_told(tmp_path: Path) -> None:
    first, second = csv(tmp_path / "a.csv", ["2023-01-02", "2023-01-01"]), csv(tmp_path / "b.csv", [f"{NEW_YEAR}000"])
    log = open_log([first, second])
    read(log)
    entry = {"files": 1, "rows": 2, "first": "a.csv", "low": "2023-01-01 00:00:00", "high": "2023-01-02 00:00:00"}
    assert log.seen["times"]["text"] == entry
    assert log.seen["times"]["epoch ms"]["first"] == "b.csv"


@pytest.mark.parametrize("first, second", [("2023-01-01", "7"), ("7", "2023-01-01"), (str(NEW_YEAR), "7")])
def test_plain_numbers_beside_calendar_times_are_refused(tmp_path: Path, first: str, second: str) -> None:
    paths = [csv(tmp_path / "a.csv", [first]), csv(tmp_path / "b.csv", [second])]
    words = (
        r"b\.csv has (plain numbers|calendar times) as times .*a\.csv has (plain numbers|calendar times): .*time_unit="
    )
    with pytest.raises(ValueError, match=words):
        read(open_log(paths))


@pytest.mark.parametrize("text", ["09/02/2023", "9/2/23 10:00", "31.12.2023", "02-09-2023 10:00:00"])
def test_day_and_month_are_never_guessed(tmp_path: Path, text: str) -> None:
    words = rf"log\.csv:2: timestamp '{text}' may have the day first or the month: .*time_format= \(--time-format\)"
    with pytest.raises(ValueError, match=words):
        read(open_log(csv(tmp_path / "log.csv", [text, text, "2023-01-01"])))
    log = open_log(csv(tmp_path / "log.csv", ["2023-01-01", "2023-01-02", text]))  # a stray one is a bad line
    assert read(log) == [NEW_YEAR * S, (NEW_YEAR + DAY) * S]
    assert log.bad.first == [f"log.csv:4: timestamp {text!r} is no time; {FORMS}"]


def test_a_format_that_is_named(tmp_path: Path) -> None:
    path = csv(tmp_path / "log.csv", ["01/09/2023 10:00", "02/01/2023 10:00", "13/13/2023 10:00", "soon"])
    for format, months in (("%m/%d/%Y %H:%M", (1, 2)), ("%d/%m/%Y %H:%M", (9, 1))):
        log = open_log(path, time_format=format)
        found = [datetime.fromtimestamp(time / S, timezone.utc) for time in read(log)]
        assert [time.month for time in found] == list(months)
        assert [line.partition(" is")[0] for line in log.bad.first] == [
            "log.csv:4: timestamp '13/13/2023 10:00'",
            "log.csv:5: timestamp 'soon'",
        ]
    for times, format in ((["20230101"], "%Y%m%d"), ([20230101], "%Y%m%d"), (["1 Jan 2023"], "%d %b %Y")):
        assert read(open_log(table(times), time_format=format)) == [NEW_YEAR * S]
    fraction = table(["2023-01-01 00.00.01.5 +0000"])
    assert read(open_log(fraction, time_format="%Y-%m-%d %H.%M.%S.%f %z")) == [NEW_YEAR * S + 1_500_000]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"time_unit": "hours"}, "time_unit must be one of .*'ms'.*, got 'hours'"),
        ({"time_format": "dd.mm.yyyy"}, "time_format must be a format of strptime, .* got 'dd.mm.yyyy'"),
        ({"time_format": 5}, "time_format must be a format of strptime, .* got 5"),
        ({"time_format": "%Y", "time_unit": "s"}, "only one of time_format and time_unit"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_log(table([1]), **options)


@pytest.mark.parametrize(
    "times, wrong",
    [
        (["2023-01-01", "2023-02-30"], "'2023-02-30'"),
        (["2023-01-01", "2023-01-01 25:00:00"], "'2023-01-01 25:00:00'"),
        (["2023-01-01", "tomorrow"], "'tomorrow'"),
        ([str(NEW_YEAR), "inf"], "'inf'"),
        ([1.0, float("inf")], "inf"),
        ([NEW_YEAR, 2**62], str(2**62)),
        (pa.array([1, 2**64 - 1], pa.uint64()), str(2**64 - 1)),
        ([1.0, 1e300], "1e+300"),
        (pa.array([0, 2**60], pa.timestamp("s")), None),
    ],
)
def test_a_time_that_is_none_is_a_bad_line(times: Any, wrong: str | None) -> None:
    log = open_log(table(times))
    assert len(read(log)) == 1
    assert log.bad.count == 1
    if wrong is not None:
        assert log.bad.first == [f"table:2: timestamp {wrong} is no time; {FORMS}"]


def test_fractions_behind_whole_numbers(tmp_path: Path) -> None:
    """Whole numbers were handed on as integers when the fraction comes, so the user must say so."""
    paths = [csv(tmp_path / "a.csv", ["1", "2"]), csv(tmp_path / "b.csv", ["3", "3.5"])]
    with pytest.raises(ValueError, match=r"b\.csv:3: timestamp 3\.5 has a fraction, .*time_unit='float'"):
        read(open_log(paths))
    log = open_log(paths, time_unit="float")
    assert {batch.column("timestamp").type for batch in log.read()} == {pa.float64()}


def test_batches_of_one_log_have_one_type_of_times() -> None:
    log = open_log(table([1.5, 2.0, 3.0, None]), chunk_rows=1)
    assert {batch.column("timestamp").type for batch in log.read()} == {pa.float64()}
    log = open_log(table([None, NEW_YEAR, None, NEW_YEAR + 0.5]), chunk_rows=1)
    assert {batch.column("timestamp").type for batch in log.read()} == {pa.int64()}


def test_lists_and_durations_are_no_times() -> None:
    for dtype, value in ((pa.duration("s"), 5), (pa.bool_(), True)):
        with pytest.raises(
            ValueError, match=f"table: column 'timestamp' must hold times or numbers, got {dtype}".replace("[", r"\[")
        ):
            read(open_log(table([value], dtype)))
