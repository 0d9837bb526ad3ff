"""Opening a prepared folder: what is damaged, foreign or unfinished is named; raw values and ids."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_logs import TINY, made

from dien_kernels.data import Prepared, Vocabulary, prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(TINY, tmp_path / "p").path


def test_open_gives_what_prepare_gave(folder: Path) -> None:
    prepared = Prepared.open(folder)
    assert pickle.loads(pickle.dumps(prepared)).fingerprint == prepared.fingerprint
    assert not prepared.behaviours.flags.writeable  # pages of a file, not a copy
    assert not prepared.behaviours.flags.owndata
    assert prepared.meta["options"]["labels"] == prepared.labels == "next"
    with pytest.raises(ValueError, match="split must be one of .*'dev'"):
        prepared.split_size("dev")
    with pytest.raises(ValueError, match="field must be one of .*'colour'"):
        prepared.vocabulary("colour")
    with pytest.raises(IndexError, match="id must lie between 0 and 5, got 6"):
        prepared.item_name(6)


def test_equal_folders_have_equal_fingerprints(folder: Path, tmp_path: Path) -> None:
    first = Prepared.open(folder).fingerprint
    assert made(TINY, tmp_path / "again").fingerprint == first
    assert made(TINY, tmp_path / "seed", seed=1).fingerprint != first


def test_absent_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no prepared folder"):
        Prepared.open(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no prepared folder: it has no meta.json, only \['thesis.txt'\]"):
        Prepared.open(tmp_path)


@pytest.mark.parametrize("name", ["behaviours.arrow", "owned.arrow", "train.arrow", "vocabulary-item.parquet"])
def test_cut_and_missing_files(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"damaged: {name} has {len(whole) - 8} bytes instead of {len(whole)}"):
        Prepared.open(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"damaged: {name} is missing; prepare it again"):
        Prepared.open(folder)


def test_zeroed_file_of_the_right_size(folder: Path) -> None:
    """What a file system may leave after a crash."""
    file = folder / "train.arrow"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match="damaged: .*prepare it again"):
        Prepared.open(folder)


def test_meta_of_another_version_or_edited(folder: Path) -> None:
    file = folder / "meta.json"
    meta = json.loads(file.read_text())
    for change, words in (
        ({"version": 99}, "format version 99, this is version 1"),
        ({"counts": {**meta["counts"], "users": 4}}, "does not fit its own fingerprint"),
        ({"format": "x"}, "of another program"),
    ):
        file.write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=words):
            Prepared.open(folder)
    file.write_text(json.dumps(meta)[:-20])
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        Prepared.open(folder)


@pytest.mark.slow
def test_killed_prepare_is_recognised_and_can_be_run_again(tmp_path: Path) -> None:
    """A reader that never ends stands for a long log: the process is killed while it reads."""
    out = tmp_path / "p"
    code = f"""
import sys, time
import pyarrow as pa
from dien_kernels.data import prepare
from dien_kernels.data.log import Log
def slow(self, *arguments):
    time.sleep(600)
Log.standardise = slow
table = pa.table({{"user": [1, 1], "item": [1, 2], "timestamp": [1, 2]}})
prepare(table, {str(out)!r}, progress=False)
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not (out / ".work").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with pytest.raises(ValueError, match="was interrupted; run it again"):
        Prepared.open(out)
    assert made(TINY, out).split_size("train") == 2
    assert not (out / ".work").exists()


def test_failure_while_replacing_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    before = Prepared.open(folder).fingerprint
    broken = tmp_path / "log.csv"
    broken.write_text("user,item,timestamp\n" + "1,2,x\n" * 5 + "1,2,3\n" * 20)
    with pytest.raises(ValueError, match="max_bad_lines=2"):
        prepare(broken, folder, format="csv", overwrite=True, max_bad_lines=2, progress=False)
    assert Prepared.open(folder).fingerprint == before
    assert made(TINY, folder, overwrite=True, targets="every").fingerprint != before


def test_strings_and_integers_find_each_other(tmp_path: Path) -> None:
    numbers = Vocabulary(pa.array([30, 7]), np.array([0, 2, 1]))
    strings = Vocabulary(pa.array(["30", "x"]), np.array([0, 2, 1]))
    assert numbers.encode(["7", "x", None, "30", "7.5", "99999999999999999999"]).tolist() == [
        2,
        0,
        0,
        1,
        0,
        0,
    ]
    assert numbers.encode(np.array([30, 8], np.int32)).tolist() == [1, 0]
    assert strings.encode([30, 31, None]).tolist() == [1, 0, 0]
    assert strings.encode(pa.array(["x", "30"]).dictionary_encode()).tolist() == [2, 1]
    assert strings.encode(pa.chunked_array([["x"], ["30"]])).tolist() == [2, 1]
    assert strings.encode([]).tolist() == []
    numbers.write(tmp_path / "v.parquet")
    again = Vocabulary.read(tmp_path / "v.parquet")
    assert (again.size, again.values.to_pylist(), again.counts.tolist()) == (3, [30, 7], [0, 2, 1])


def test_values_from_several_kinds_of_columns(tmp_path: Path) -> None:
    """Dictionary columns and integers with missing values that came as floats."""
    table = pa.table(
        {
            "user": pa.array(["b", "a", "a", "b"]).dictionary_encode(),
            "item": pa.array([4.0, 5.0, 4.0, 6.0]),
            "timestamp": pa.array([1, 2, 3, 4], pa.timestamp("s")),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    prepared = prepare(tmp_path / "log.parquet", tmp_path / "p", fractions=(1, 0, 0), progress=False)
    assert prepared.vocabulary("item").values.to_pylist() == [4, 5, 6]
    assert prepared.split("train").timestamp.tolist() == [3_000_000, 4_000_000]
