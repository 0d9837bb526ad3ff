"""Files of requests and scores: kinds, outputs that are no files, runs that were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dien_kernels.data import prepare, synthetic
from dien_kernels.models import build
from dien_kernels.serving import Scorer, _files


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    table = synthetic(users=60, items=40, categories=5, events=600)
    prepared = prepare(table, tmp_path_factory.mktemp("data") / "prepared", progress=False)
    torch.manual_seed(0)
    return Scorer(build("average", prepared.schema, {"head": {"units": [8]}}).eval(), prepared)


LINES: list[dict[str, Any]] = [
    {"history": [1, 2, 3], "candidates": [4, 5], "id": 2**60 + 1, "more": {"a": [1, None]}},
    {"history": [], "candidates": [], "id": 3, "more": {"a": []}},
    {"history": None, "candidates": [7, 99_999, None], "id": None, "more": None},
]


def write_lines(path: Path, lines: list[dict[str, Any]] = LINES) -> Path:
    path.write_text("\n\n".join(map(json.dumps, lines)))
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(LINES), path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


@pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("out, kind", [("out.jsonl", ".jsonl"), ("out.parquet", ".parquet"), ("out", None)])
def test_kinds(scorer: Scorer, tmp_path: Path, source: str, out: str, kind: str | None) -> None:
    given = tmp_path / source
    (write_lines if given.suffix == ".jsonl" else write_parquet)(given)
    scorer.score_file(given, tmp_path / out)
    if kind is None:
        (tmp_path / out).rename(tmp_path / f"named{given.suffix}")
        out = f"named{given.suffix}"
    found = read(tmp_path / out)
    scores = [np.float32(row.pop("scores")) for row in found]
    assert found == LINES
    assert [len(s) for s in scores] == [2, 0, 3]
    np.testing.assert_array_equal(scores[0], scorer.score([1, 2, 3], [4, 5]))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source, out])


def test_many_lines_and_row_groups(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_ROWS", 4)
    lines = [{"history": [1] * (i % 3), "candidates": [2] * (i % 5), "i": i if i > 20 else None} for i in range(40)]
    write_lines(tmp_path / "in.jsonl", lines)
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "in.parquet", row_group_size=7)
    for source in ("in.jsonl", "in.parquet"):
        for out in ("out.jsonl", "out.parquet"):
            scorer.score_file(tmp_path / source, tmp_path / out, chunk=3)
            found = read(tmp_path / out)
            assert [len(row.pop("scores")) for row in found] == [i % 5 for i in range(40)]
            assert found == lines


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"history": [1], "candidates": [2]}\n{"history": [1]', "line 2 of .*in.jsonl is no JSON"),
        ('\n[1]', "line 2 of .*in.jsonl must be an object with history, candidates, got a list"),
        ('{"history": [1], "candidate": [2]}', "line 1 of .* has no column 'candidates', only history, candidate"),
        ('{"history": [1], "candidates": [2], "scores": []}', "line 1 of .* has a column 'scores' already"),
        ('{"history": [1, "a"], "candidates": [2]}', "column 'history' of lines 1 to 1 of .* values of one type"),
        ('{"history": 1, "candidates": [2]}', "'history' must hold lists of item ids, got int64"),
    ],
)  # fmt: skip
def test_bad_lines(scorer: Scorer, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        scorer.score_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_fifo_is_written_to(scorer: Scorer, tmp_path: Path, ending: str) -> None:
    source, fifo = write_lines(tmp_path / "in.jsonl"), tmp_path / f"fifo{ending}"
    os.mkfifo(fifo)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    scorer.score_file(source, fifo)
    reader.join()
    assert fifo.is_fifo()
    (tmp_path / f"copy{ending}").write_bytes(got[0])
    assert [len(row["scores"]) for row in read(tmp_path / f"copy{ending}")] == [2, 0, 3]


def test_a_device_stays_one(scorer: Scorer, tmp_path: Path) -> None:
    for source in (write_lines(tmp_path / "in.jsonl"), write_parquet(tmp_path / "in.parquet")):
        scorer.score_file(source, "/dev/null")
        assert Path("/dev/null").is_char_device()


def test_the_requests_are_not_overwritten(scorer: Scorer, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet")
    (tmp_path / "link.parquet").symlink_to(source)
    os.link(source, tmp_path / "hard.parquet")
    before = source.read_bytes()
    for name in ("in.parquet", "link.parquet", "hard.parquet"):
        with pytest.raises(ValueError, match=f"out must be another file than the requests, got .*{name}"):
            scorer.score_file(source, tmp_path / name)
    assert source.read_bytes() == before


def test_what_a_link_points_to_is_replaced(scorer: Scorer, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet")
    (tmp_path / "far").mkdir()
    (tmp_path / "out.parquet").symlink_to(tmp_path / "far" / "real.parquet")
    scorer.score_file(source, tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").is_symlink()
    assert len(read(tmp_path / "far" / "real.parquet")) == 3


def test_an_error_leaves_the_old_output(scorer: Scorer, tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "in.jsonl", [*LINES, {"history": 1, "candidates": [2]}])
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(ValueError, match="history"):
        scorer.score_file(bad, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_run_is_cleaned_up_by_the_next_and_a_living_one_is_not(scorer: Scorer, tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from dien_kernels.serving._files import _open_part\n"
    code += "kept = _open_part(Path(sys.argv[1])); print(kept[0].name, flush=True); time.sleep(600)"
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)]
    names = [run.stdout.readline().decode().strip() for run in runs if run.stdout]
    runs[0].kill()
    runs[0].wait()
    (tmp_path / ".dien-score-notes.part").write_text("not ours")
    source = write_lines(tmp_path / "in.jsonl")
    scorer.score_file(source, tmp_path / "out.jsonl")
    left = {p.name for p in tmp_path.iterdir()}
    runs[1].kill()
    runs[1].wait()
    assert left == {names[1], ".dien-score-notes.part", "in.jsonl", "out.jsonl"}


def test_a_damaged_file_of_requests(scorer: Scorer, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet")
    data = bytearray(source.read_bytes())
    data[4:60] = b"\xff" * 56
    source.write_bytes(data)
    with pytest.raises(ValueError, match=r"in\.parquet is damaged"):
        scorer.score_file(source, tmp_path / "out.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]
