"""What ``python -m benchmarks`` says to bad input: one line, before anything is measured or written."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measurement, repeats, store
from benchmarks.__main__ import main
from benchmarks.clock import Step
from benchmarks.registry import OURS, Case

ROW = dict.fromkeys(store.COLUMNS, "") | {
    "suite": "speed",
    "op": "gru",
    "mode": "fwd",
    "length_distribution": "full",
    "B": "128",
    "T": "100",
    "I": "36",
    "H": "36",
    "dtype": "float32",
    "threads": "1",
    "provider": "torch_gru_padded",
    "p50_us": "5",
    "ratio": "2",
    "ratio_p20": "1.9",
    "ratio_p80": "2.1",
    "ratio_low": "1.8",
    "ratio_high": "2.2",
    "allocator": "keep",
    "machine": "one",
    "date": "2026-01-01",
}


HEADER = ",".join(store.COLUMNS) + "\n"


def line_of(**values: str) -> str:
    return ",".join((ROW | values).values()) + "\n"


CUT = HEADER + line_of()[:-3]  # within the last column, so that no value is missing


def file_of(path: Path, *rows: dict[str, str]) -> str:
    store.append(path, rows)
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    text = str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.fixture
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after bad input fails, and does not take hours."""
    monkeypatch.setattr("benchmarks.__main__._measure", lambda *_: pytest.fail("it went on to measure"))


@pytest.mark.usefixtures("_nothing_measured")
@pytest.mark.parametrize(
    "words, named",
    [
        (("--threads", "0"), "--threads: must be a whole number from 1 to 1024, got '0'"),
        (("--threads", "two"), "--threads: must be a whole number from 1 to 1024, got 'two'"),
        (("--threads", "99999999999"), "--threads: must be a whole number from 1 to 1024, got '99999999999'"),
        (("--budget", "-1"), "--budget: must be a number of seconds, 0 or more, got '-1'"),
        (("--budget", "nan"), "--budget: must be a number of seconds, 0 or more, got 'nan'"),
        (("--suite", "sped"), "--suite: invalid choice: 'sped'"),
        (("--suite", "speed", "--op", "loader_0"), "no case has all of the --suite, --op, --mode, --length-"),
        (
            ("--suite", "speed", "--length-distribution", "log"),
            "no case has all of the --suite, --op, --mode, --length-",
        ),
        (("--batch", "0"), "--batch: must be a whole number from 1 to 2147483647, got '0'"),
        pytest.param(("--batch", "9" * 5000), "--batch: must be a whole number from 1 to", id="--batch 99..."),
        (("--tiny",), "--tiny needs another --out"),
        (("--tiny", "--out", str(repeats.PATHS[0])), "--tiny needs another --out"),
    ],
    ids=" ".join,
)
def test_run(words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in said(capsys, "run", *words)


@pytest.mark.usefixtures("_nothing_measured")
@pytest.mark.parametrize(
    "content, named",
    [
        ("a,b\n1,2\n", "other columns than this version's: a, b"),
        (HEADER + "speed,gru\n", f"line 2: 2 values for {len(store.COLUMNS)} columns"),
        (HEADER + line_of(ratio="fast"), "line 2: ratio must be a number or empty, got 'fast'"),
        (HEADER + line_of(H="1.5"), "line 2: H must be a whole number, got '1.5'"),
        (HEADER + line_of(p50_us="0"), "line 2: p50_us must be above 0, got '0'"),
        (HEADER + line_of(ratio="0"), "line 2: ratio must be above 0, got '0'"),
        (HEADER + line_of(ratio="2.3"), "line 2: ratio must lie between ratio_low and ratio_high, got '2.3'"),
        (HEADER + line_of(ratio_high=""), "line 2: ratio_high must be above 0, got ''"),
        (HEADER + line_of(ratio_low="", ratio_p20=""), "line 2: ratio_p20 must be above 0, got ''"),
        (CUT, "bad.csv does not end with a newline: its last row is cut"),
        (HEADER + line_of() + line_of(allocator='"keep') + line_of(), "bad.csv, line 3: unexpected end of data"),
        (HEADER + line_of(note="x" * 200_000), "bad.csv, line 2: field larger than field limit"),
    ],
    ids=[
        "columns",
        "short",
        "word",
        "fraction",
        "no time",
        "no ratio",
        "outside",
        "open",
        "unspread",
        "cut",
        "quote",
        "long",
    ],
)
def test_a_file_that_holds_no_results(
    content: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    for words in (("run", "--out"), ("report", "--results"), ("check", "--results")):
        assert named in said(capsys, *words, str(path))
    assert path.read_text() == content


def test_no_row_is_glued_to_one_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "cut.csv"
    path.write_text(CUT)
    with pytest.raises(store.BadFile, match="cut.csv does not end with a newline"):
        store.append(path, [ROW])
    assert path.read_text() == CUT


@pytest.mark.usefixtures("_nothing_measured")
@pytest.mark.parametrize(
    "name, reason",
    [("file/x.csv", errno.ENOTDIR), ("file/folder/x.csv", errno.ENOTDIR), ("x" * 300, errno.ENAMETOOLONG)],
    ids=["under a file", "in a folder under a file", "long name"],
)
def test_out_is_tried_before_anything_is_measured(
    name: str, reason: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / name
    text = said(capsys, "run", "--tiny", "--out", str(out))
    assert text == f"--out: {out} cannot be appended to: {os.strerror(reason)}"


def test_trying_out_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("benchmarks.__main__._measure", lambda work, options, before: given.append(before))
    new, old = tmp_path / "folder" / "new.csv", Path(file_of(tmp_path / "old.csv", ROW))
    content = old.read_text()
    for out in (new, old):
        main(["run", "--tiny", "--out", str(out)])
    assert given == [[], [ROW]]
    assert not new.exists()
    assert old.read_text() == content


@pytest.mark.usefixtures("_nothing_measured")
def test_the_own_results_are_known_by_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The repository's file is not overwritten with tiny rows, and its pages have the intervals of its repeats."""
    written = []
    monkeypatch.setattr("benchmarks.__main__._write", lambda rows, words: written.append((rows, words)))
    monkeypatch.setattr(store, "DEFAULT", Path(file_of(tmp_path / "own.csv", ROW)))
    second = ROW | {"ratio": "2.2", "ratio_high": "2.5"}
    monkeypatch.setattr(repeats, "PATHS", (Path(file_of(tmp_path / "own_second.csv", second)),))
    monkeypatch.chdir(tmp_path)
    for path in ("own.csv", f"../{tmp_path.name}/own.csv"):
        assert "--tiny needs another --out" in said(capsys, "run", "--tiny", "--out", path)
        main(["report", "--write", "--results", path])
    words = "In one repeat run, half of the ratios changed by at most 10% and nine in ten by at most 10%."
    assert written == [([ROW | {"ratio_low": "1.8", "ratio_high": "2.5"}], words)] * 2


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "none.csv")
    for command in ("report", "check"):
        assert said(capsys, command, "--results", nowhere) == f"--results: there is no file {nowhere}"
        assert "is a folder" in said(capsys, command, "--results", str(tmp_path))


def test_the_check_shows_figures_and_fails_above_the_allowed_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(tmp_path / "one.csv", ROW)
    assert said(capsys, "check", "--results", path).endswith("are missed or not measured, and --allow is 0")
    lines = capsys.readouterr().out.splitlines()
    failed = len(lines) - 2  # a line for each target, one of which is met, and the count
    assert lines[-2].startswith("met ")
    assert lines[-2].endswith("torch_gru_padded      at least 1.80x: 2.00x")
    assert lines[-1] == f"1 targets met, 0 missed, {failed} not measured"
    main(["check", "--results", path, "--allow", str(failed)])
    assert said(capsys, "check", "--results", path, "--allow", str(failed - 1)).startswith(f"{failed} targets")


@pytest.mark.parametrize("command", ["report", "check"])
def test_a_reader_that_closes_its_end_early_gets_no_traceback(command: str) -> None:
    """As ``python -m benchmarks report | head -1`` does."""
    words = [sys.executable, "-m", "benchmarks", command]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_rows_are_written_even_if_nobody_reads_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m benchmarks run | head``: printing the first case fails, but the rows of all cases are stored."""

    def closed(text: str, **_: object) -> None:
        if text.startswith("    "):
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(measurement, "validated_steps", lambda case: ({}, dict.fromkeys(case.providers, "a note")))
    out = tmp_path / "out.csv"
    words = ["run", "--suite", "latency", "--op", "gru", "--mode", "call", "fwd", "--threads", "1", "--budget", "0"]
    with pytest.raises(SystemExit):
        main([*words, "--no-memory", "--tiny", "--out", str(out)])
    assert {row["mode"] for row in store.read(out)} == {"call", "fwd"}


def test_pages_are_made_of_the_own_results_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path / "one.csv", ROW)
    assert "leave --results out" in said(capsys, "report", "--write", "--results", path)


def test_report_is_of_the_machine_and_setting_last_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        ROW,
        ROW | {"machine": "other", "date": "2026-01-02"},
        ROW | {"allocator": "keep, otherwise", "date": "2026-01-03"},
        ROW | {"date": "2026-01-04", "ratio": "2.1"},
    ]
    main(["report", "--results", file_of(tmp_path / "all.csv", *rows)])
    text = capsys.readouterr().out
    assert "2.1× (1.80–2.2)" in text
    assert "\n\none, " in text


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = Path(file_of(tmp_path / "one.csv", ROW, ROW | {"note": 'said "so", twice'}))
    assert store.read(path) == [ROW, ROW | {"note": 'said "so", twice'}]
    with path.open() as file:
        assert next(csv.reader(file)) == list(store.COLUMNS)


def test_a_run_writes_what_cannot_be_timed_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the cases have nobody who could take part. The run is interrupted within the fifth session of ten."""

    class Interrupted(measurement.Measurement):
        def run_session(self, budget_s: float) -> None:
            if self.turns.sessions_done == 4:
                raise KeyboardInterrupt
            super().run_session(budget_s)

    def one(case: Case) -> tuple[dict[str, Step], dict[str, str]]:
        steps = {OURS: Step(lambda: None)} if case.mode == "call" else {}
        return steps, {name: "a note" for name in case.providers}

    monkeypatch.setattr(measurement, "validated_steps", one)
    out = tmp_path / "out.csv"
    words = ["run", "--suite", "latency", "--op", "gru", "--mode", "call", "fwd+bwd", "--threads", "1", "--budget", "0"]
    words += ["--no-memory", "--resume", "--tiny", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(measurement, "Measurement", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(words)
    rows = store.read(out)
    assert {row["sessions"] for row in rows if row["p50_us"]} == {"4"}
    assert {row["mode"] for row in rows if not row["p50_us"]} == {"call", "fwd+bwd"}
    assert all(row["note"] == "a note" for row in rows)
    main(words)
    again = store.read(out)[len(rows) :]
    assert {row["mode"] for row in again} == {"call"}, "what had nothing to time is done"
    assert {row["sessions"] for row in again if row["p50_us"]} == {"10"}
