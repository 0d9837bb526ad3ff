"""One writer at a time, a folder that is whole or says that it is not, and nobody's files deleted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import bytes_of, meta_of, samples_of
from small_logs import TINY, made

from dien_kernels.data import Prepared, prepare, synthetic

USELESS = TINY.take(pa.array([0, 1, 5]))  # no user has two behaviours


def test_folders_that_are_taken(tmp_path: Path) -> None:
    made(TINY, tmp_path / "p")
    with pytest.raises(FileExistsError, match="prepared already; overwrite=True"):
        made(TINY, tmp_path / "p")
    made(TINY, tmp_path / "p", overwrite=True, targets="every")
    assert len(samples_of(tmp_path / "p", "train")) == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files .thesis.txt."):
        made(TINY, tmp_path / "other", overwrite=True)
    assert os.listdir(tmp_path / "other") == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        made(TINY, tmp_path / "other" / "thesis.txt")
    for number, words in enumerate((json.dumps({"format": "another"}), "no JSON", "[]")):
        folder = tmp_path / f"meta{number}"
        folder.mkdir()
        (folder / "meta.json").write_text(words)
        with pytest.raises(FileExistsError, match="of another program|cannot be read"):
            made(TINY, folder, overwrite=True)
        assert (folder / "meta.json").read_text() == words


def test_a_failure_leaves_what_was_to_be_replaced(tmp_path: Path) -> None:
    """A log that turns out to be useless half way must not cost the data that are there."""
    made(TINY, tmp_path / "p")
    before = bytes_of(tmp_path / "p")
    for useless in (TINY.slice(0, 0), USELESS):
        with pytest.raises(ValueError):
            made(useless, tmp_path / "p", overwrite=True)
        assert bytes_of(tmp_path / "p") == before
    (tmp_path / "p" / ".work").mkdir()  # of a prepare that was killed
    (tmp_path / "p" / ".work" / "items.parquet").write_text("half")
    made(TINY, tmp_path / "p", overwrite=True, targets="every")
    made(TINY, tmp_path / "q", targets="every")
    assert bytes_of(tmp_path / "p") == bytes_of(tmp_path / "q")


def test_files_of_others_survive_an_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    made(TINY, folder)
    pq.write_table(TINY, folder / "mine.parquet")
    (folder / "shards" / "mine.parquet").write_text("mine, too")
    made(TINY, folder, overwrite=True, targets="every")
    assert pq.read_table(folder / "mine.parquet") == TINY
    assert (folder / "shards" / "mine.parquet").read_text() == "mine, too"
    assert len(samples_of(folder, "train")) == 4


@pytest.mark.parametrize("mark", ["", "{}", '{"files": 3}', '{"files": ["log.parquet", "../outside", "/etc/passwd"]}'])
def test_a_stale_mark_never_costs_the_source(tmp_path: Path, mark: str) -> None:
    """A killed prepare left its mark, and then logs were put into that folder."""
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "unfinished").write_text(mark)
    (tmp_path / "outside").write_text("kept")
    pq.write_table(TINY, folder / "log.parquet")
    for source in (folder / "log.parquet", folder):
        with pytest.raises(FileExistsError, match="choose another folder"):
            prepare(source, folder, overwrite=True, progress=False)
    if "log.parquet" not in mark:
        with pytest.raises(FileExistsError, match="holds other files .log.parquet."):
            made(TINY, folder)
    assert pq.read_table(folder / "log.parquet") == TINY
    assert (tmp_path / "outside").read_text() == "kept"


def test_a_source_in_the_folder_that_would_be_replaced_is_refused(tmp_path: Path) -> None:
    made(TINY, tmp_path / "p")
    pq.write_table(TINY, tmp_path / "p" / "log.parquet")
    with pytest.raises(FileExistsError, match=r"holds .*log\.parquet, which is to be read"):
        prepare(tmp_path / "p" / "log.parquet", tmp_path / "p", overwrite=True, progress=False)
    assert pq.read_table(tmp_path / "p" / "log.parquet") == TINY


SLOW = """
    import sys, time
    import pyarrow as pa
    import dien_kernels.data._deal as deal
    from dien_kernels.data import prepare, synthetic
    stop, out = sys.argv[1:3]
    real = getattr(__import__(stop.rsplit(".", 1)[0], fromlist=["x"]), stop.rsplit(".", 1)[1])
    def slow(*args, **kwargs):
        print("here", flush=True)
        time.sleep(60)
        return real(*args, **kwargs)
    setattr(__import__(stop.rsplit(".", 1)[0], fromlist=["x"]), stop.rsplit(".", 1)[1], slow)
    prepare(synthetic(users=50, items=40, categories=4, events=500), out, progress=False, overwrite=True)
"""
MOMENTS = ["dien_kernels.data.prepare.deal", "dien_kernels.data.prepare.write_meta", "os.replace", "shutil.rmtree"]


def paused(moment: str, out: Path) -> subprocess.Popen[str]:
    """A prepare in a process of its own that sleeps where it comes to ``moment``."""
    script = (
        textwrap.dedent(SLOW)
        .replace("__import__(stop", "__import__('importlib').import_module(stop")
        .replace(', fromlist=["x"])', ")")
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, moment, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n", process.communicate()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_moment(tmp_path: Path, moment: str, replaces: bool) -> None:
    """The old folder is whole, or the folder says that it is unfinished; a second run finishes the work."""
    folder = tmp_path / "p"
    if replaces:
        made(TINY, folder)
    before = bytes_of(folder) if replaces else {}
    process = paused(moment, folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (folder / "meta.json").exists():
        after = bytes_of(folder)
        assert {name: after.get(name) for name in before} == before
    else:
        with pytest.raises(ValueError, match="interrupted|is no prepared folder"):
            Prepared.open(folder)
    log = synthetic(users=50, items=40, categories=4, events=500)
    with suppress(FileExistsError):  # all had been written: the first one does what is left, and says so
        made(log, folder, overwrite=True, fractions=(0.8, 0.1, 0.1))
    made(log, folder, overwrite=True, fractions=(0.8, 0.1, 0.1))
    made(log, tmp_path / "q", fractions=(0.8, 0.1, 0.1))
    assert bytes_of(folder) == bytes_of(tmp_path / "q")


@pytest.mark.slow
def test_a_second_prepare_into_one_folder_is_refused(tmp_path: Path) -> None:
    process = paused("dien_kernels.data.prepare.deal", tmp_path / "p")
    try:
        with pytest.raises(FileExistsError, match=f"another prepare is writing into .* \\(process {process.pid}\\)"):
            made(TINY, tmp_path / "p", overwrite=True)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    made(TINY, tmp_path / "p")  # the lock went with its process
    assert meta_of(tmp_path / "p")["counts"]["users"] == 3
    assert not (tmp_path / "p" / ".lock").exists()


@pytest.mark.slow
def test_many_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from dien_kernels.data import prepare, synthetic\n"
        "prepare(synthetic(users=50, items=40, categories=4, events=500), sys.argv[1], progress=False)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "p")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    outcomes = [(process.communicate()[1], process.returncode) for process in started]
    assert [code for _, code in outcomes].count(0) == 1
    assert all("another prepare" in words or "prepared already" in words for words, code in outcomes if code)
    log = synthetic(users=50, items=40, categories=4, events=500)
    made(log, tmp_path / "q", fractions=(0.8, 0.1, 0.1))
    assert bytes_of(tmp_path / "p") == bytes_of(tmp_path / "q")


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dien_kernels.data._write as write

    made(TINY, tmp_path / "p")
    before = bytes_of(tmp_path / "p")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.ShardWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        made(TINY, tmp_path / "p", overwrite=True)
    assert bytes_of(tmp_path / "p") == before
    with pytest.raises(OSError, match="No space left"):
        made(TINY, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_lock_is_not_taken_for_a_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".lock").write_text("1\n")  # of a process that was killed
    made(TINY, tmp_path / "p")
    assert meta_of(tmp_path / "p")["counts"]["users"] == 3
