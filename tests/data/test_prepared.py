"""Opening a prepared folder: what is damaged, foreign or unfinished is named; raw values and ids."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_folders import User, given_user, next_user, write_folder, write_meta
from small_logs import TINY, made

from dien_kernels.batch import Schema
from dien_kernels.cli import main
from dien_kernels.data import Loader, Prepared, Vocabulary, prepare, verify
from dien_kernels.data.folder import group_digests, seal, shard_schema

SCHEMA = Schema({"item": 12, "kind": 4}, {"device": 3}, ("price",))
KINDS = [0, *(1 + n % 3 for n in range(11))]


def users_of(names: range) -> list[User]:
    users = []
    for name in names:
        size = 2 + name % 4
        more = {"user__device": [name % 3] * size, "dense__price": [name / 7] * size}
        items, times = [1 + (name * place) % 11 for place in range(1, size + 1)], [10 * n + name for n in range(size)]
        users.append(next_user(f"u{name}", items, times, ["train", "train", "valid", "test"][name % 4], **more))
    return users


def small(path: Path, **options: Any) -> Prepared:
    """18 users in two shards and three units."""
    shards = [[users_of(range(6)), users_of(range(6, 12))], [users_of(range(12, 18))]]
    return write_folder(path, shards, SCHEMA, item_fields={"kind": KINDS}, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small(tmp_path / "p").path


def test_open_gives_what_was_written(folder: Path) -> None:
    prepared = Prepared.open(folder)
    assert pickle.loads(pickle.dumps(prepared)).fingerprint == prepared.fingerprint
    assert len(pickle.dumps(prepared)) < 300
    users = users_of(range(18))
    assert prepared.user_names.to_pylist() == [user.name for user in users]
    assert prepared.encode_users(["u17", "nobody", "u3"]).tolist() == [17, -1, 3]
    assert [prepared.history(n).tolist() for n in range(18)] == [user.columns["item"] for user in users]
    assert [(info.shard[-13:], info.group, info.first_user) for info in prepared.units] == [
        ("00000.parquet", 0, 0),
        ("00000.parquet", 1, 6),
        ("00001.parquet", 0, 12),
    ]
    assert prepared.item_fields["kind"].tolist() == KINDS
    assert prepared.item_counts.sum() == prepared.meta["counts"]["behaviours"]
    assert prepared.encode_items(["item3", "item99"]).tolist() == [3, 0]
    assert [prepared.split_size(split) for split in ("train", "valid", "test")] == [
        sum(len(user.columns["item"]) - 1 for n, user in enumerate(users) if n % 4 < 2), 4, 4
    ]  # fmt: skip
    assert "18 users, " in prepared.summary()
    assert verify(prepared) == []
    with pytest.raises(ValueError, match="split must be one of .*'dev'"):
        prepared.split_size("dev")
    with pytest.raises(ValueError, match="field must be one of .*'colour'"):
        prepared.vocabulary("colour")
    with pytest.raises(IndexError, match="id must lie between 0 and 11, got 12"):
        prepared.item_name(12)


def test_equal_folders_have_equal_fingerprints(folder: Path, tmp_path: Path) -> None:
    first = Prepared.open(folder).fingerprint
    assert small(tmp_path / "again").fingerprint == first
    assert small(tmp_path / "elsewhere", first_bad_lines=["/x:3: no number"]).fingerprint == first
    assert small(tmp_path / "seed", options={"seed": 1}).fingerprint != first


def test_absent_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no prepared folder"):
        Prepared.open(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no prepared folder: it has no meta.json, only \['thesis.txt'\]"):
        Prepared.open(tmp_path)
    (tmp_path / "unfinished").write_text("")
    with pytest.raises(ValueError, match="was interrupted; run it again"):
        Prepared.open(tmp_path)


NAMES = ["shards/part-00001.parquet", "items.parquet", "vocabulary-item.parquet", "vocabulary-device.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_cut_and_missing_files(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"damaged: {name} has {len(whole) - 8} bytes instead of {len(whole)}"):
        Prepared.open(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"damaged: {name} is missing; prepare it again"):
        Prepared.open(folder)


@pytest.mark.parametrize("name", NAMES)
def test_zeroed_file_of_the_right_size(folder: Path, name: str) -> None:
    """What a file system may leave after a crash."""
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    with pytest.raises(ValueError, match=f"damaged: {name} has another SHA-256 than meta.json says; prepare it again"):
        Prepared.open(folder)


def test_an_older_folder_is_refused_with_the_command(folder: Path) -> None:
    meta = {"format": "dien_kernels prepared logs", "version": 1, "options": {"targets": "every", "labels": "next",
            "fractions": [0.6, 0.2, 0.2], "seed": 4}}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError) as error:
        Prepared.open(folder)
    assert str(error.value) == (
        f"{folder} was prepared with format version 1, this is version 2; prepare it again: dien-kernels prepare LOGS "
        f"--out {folder} --targets every --fractions 0.6 0.2 0.2 --data-seed 4 --overwrite"
    )
    assert Prepared.read_meta(folder, any_version=True) == meta


def test_meta_of_another_version_or_edited(folder: Path) -> None:
    file = folder / "meta.json"
    meta = json.loads(file.read_text())
    without = {name: value for name, value in meta.items() if name != "shards"}
    for content, words in (
        (meta | {"version": 99}, "format version 99, this is version 2"),
        (meta | {"counts": {**meta["counts"], "users": 4}}, "does not fit its own fingerprint"),
        (meta | {"report": {"rows": 1}}, "does not fit its own fingerprint"),
        (meta | {"format": "x"}, "of another program"),
        ([], "of another program"),
        (without, "meta.json has no 'shards'"),
        (seal(meta | {"counts": {**meta["counts"], "users": 4}}), "meta.json cannot be read .it counts .* its shards"),
        (seal(meta | {"time_unit": "days"}), "time_unit must be 'us' or 'number', got 'days'"),
        (seal(meta | {"shards": [{"file": "x"}]}), r"meta.json cannot be read \('groups'\)"),
        (seal(meta | {"files": {}}), "files must be"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            Prepared.open(folder)
    file.write_text(json.dumps(meta)[:-20])
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        Prepared.open(folder)


def corruptions(random: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    """One of: bits flipped, cut, emptied, zeroed, replaced by another file, by foreign JSON, bytes exchanged."""
    kind = random.integers(0, 9)
    changed = bytearray(content)
    if kind < 4:
        for _ in range(int(random.integers(1, 4))):
            changed[random.integers(0, len(content))] ^= 1 << int(random.integers(0, 8))
    elif kind == 4:
        del changed[int(random.integers(0, len(content))) :]
    elif kind == 5:
        changed[:] = [b"", bytes(len(content))][int(random.integers(0, 2))]
    elif kind == 6:
        changed[:] = others[int(random.integers(0, len(others)))]
    elif kind == 7:
        changed[:] = [b"{}", b"[1]", b'{"format": "dien_kernels prepared logs", "version": 2}', b"null"][
            int(random.integers(0, 4))
        ]
    else:
        a, b = sorted(random.integers(0, len(content), 2).tolist())
        changed[:] = content[b:] + content[a:b] + content[:a]
    return bytes(changed)


def read_everything(prepared: Prepared) -> list[Any]:
    """All that a folder gives, as plain data."""
    found: list[Any] = [prepared.user_names.to_pylist(), prepared.item_counts.tolist(), prepared.meta]
    found += [values.tolist() for values in prepared.item_fields.values()]
    found += [prepared.vocabulary(field).values.to_pylist() for field in ("item", "kind", "device")]
    for number in range(len(prepared.units)):
        unit = prepared.read_unit(number)
        rows = [unit.row_users["device"], unit.row_dense["price"]]
        found += [values.tolist() for values in (unit.offsets, unit.item, unit.time, *rows)]
        found += [values.tolist() for split in ("train", "valid", "test") for values in unit.samples(split)]
    return found


def is_refused(name: Path, open_: Callable[[], Prepared], reference: list[Any]) -> bool:
    """Whether a folder is refused, in one line that names the file; if it is not, it must give what it gave."""
    try:
        found = read_everything(open_())
    except ValueError as error:
        text = str(error)
    else:
        assert found == reference
        return False
    assert name.as_posix() in text
    assert "\n" not in text
    return True


def test_no_corruption_gives_other_data_or_a_foreign_exception(folder: Path) -> None:
    """400 random corruptions of any file; those that change nothing (a blank of the JSON, say) may be opened."""
    random = np.random.default_rng(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    reference = read_everything(Prepared.open(folder))
    refused = 0
    for _ in range(400):
        path = files[int(random.integers(0, len(files)))]
        path.write_bytes(corruptions(random, contents[path], list(contents.values())))
        if path.read_bytes() != contents[path]:
            refused += is_refused(path.relative_to(folder), lambda: Prepared.open(folder), reference)
        path.write_bytes(contents[path])
    assert refused > 350


def test_no_corruption_of_an_open_folder_goes_unnoticed(folder: Path) -> None:
    """As above, with files that change after the folder was opened, as large ones are found: without digests."""
    random = np.random.default_rng(1)
    files = sorted(folder.rglob("*.parquet"))
    contents = {path: path.read_bytes() for path in files}
    reference = read_everything(Prepared.open(folder))
    refused = 0
    for _ in range(400):
        path = files[int(random.integers(0, len(files)))]
        prepared = Prepared.open(folder)
        path.write_bytes(corruptions(random, contents[path], list(contents.values())))
        refused += is_refused(path.relative_to(folder), lambda: prepared, reference)  # noqa: B023
        path.write_bytes(contents[path])
    assert refused > 300


def changed(shard: int, group: int, user: int, **columns: Any) -> Callable[[list[list[list[User]]]], None]:
    """A change of the columns of one user."""

    def change(shards: list[list[list[User]]]) -> None:
        shards[shard][group][user].columns.update({name.replace("__", "."): v for name, v in columns.items()})

    return change


def renamed(shards: list[list[list[User]]]) -> None:
    shards[1][0][2].name = "u3"


@pytest.mark.parametrize(
    "change, line",
    [
        (renamed, "shards/part-00001.parquet, row group 0: column 'user' must not have 'u3', as "
                  "shards/part-00000.parquet, row group 0, has"),
        (changed(0, 1, 0, time=[6, 26, 16, 36]), "shards/part-00000.parquet, row group 1: column 'time' must ascend in "
                                                 "row 0, got 26 before 16"),
        (changed(0, 1, 1, time=[7, 17]), "shards/part-00000.parquet, row group 1: column 'time' must have 5 values for "
                                         "row 1, got 2"),
        (changed(1, 0, 0, item=[1, 12]), "shards/part-00001.parquet, row group 0: column 'item' must lie between 0 and "
                                         "11, got values from 1 to 12"),
        (changed(1, 0, 1, user__device=[-1, 0, 0]), "shards/part-00001.parquet, row group 0: column 'user.device' must "
                                                    "lie between 0 and 2, got values from -1 to 2"),
        (changed(1, 0, 1, train_from=0), "shards/part-00001.parquet, row group 0: columns 'train_from' and 'train_to' "
                                         "must lie between 1 and the 3 behaviours of row 1, got 0 and 3"),
        (changed(1, 0, 1, train_to=4), "shards/part-00001.parquet, row group 0: columns 'train_from' and 'train_to' "
                                       "must lie between 1 and the 3 behaviours of row 1, got 1 and 4"),
        (changed(0, 0, 2, held=3), "shards/part-00000.parquet, row group 0: column 'held' must lie between 0 and 2, "
                                   "got values from 0 to 3"),
        (changed(0, 0, 2, dense__price=[None, 0, 0, 0]), "shards/part-00000.parquet, row group 0: column 'dense.price' "
                                                         "must have no nulls, got 1"),
    ],
)  # fmt: skip
def test_check_names_what_another_program_did_wrong(
    tmp_path: Path, change: Callable[[Any], None], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """``meta.json`` fits the files; the files do not fit the format."""
    good = [[users_of(range(6)), users_of(range(6, 12))], [users_of(range(12, 18))]]
    path = write_folder(tmp_path / "p", good, SCHEMA, item_fields={"kind": KINDS}).path
    bad = [[users_of(range(6)), users_of(range(6, 12))], [users_of(range(12, 18))]]
    change(bad)
    write_shards(path, bad)
    prepared = Prepared.open(path)
    assert line in verify(prepared)
    assert main(["check", str(path)]) == 2
    out = capsys.readouterr()
    assert line in out.out.splitlines()
    assert "is not as the format says: " in out.err
    if "'time'" not in line and "'user'" not in line:  # what training does not read
        loader = Loader(prepared, "test" if "held" in line else "train", shuffle=False, batch_size=4)
        with pytest.raises(ValueError) as error:
            list(loader.epoch(0))
        assert line in str(error.value)


def write_shards(path: Path, shards: list[list[list[User]]], drop: str | None = None) -> None:
    """Write the shards of a folder anew, and the digests of ``meta.json``, but not its counts."""
    columns = shard_schema(SCHEMA, "next", pa.string(), pa.int64())
    columns = pa.schema([field.with_nullable(True) for field in columns if field.name != drop])
    for number, shard in enumerate(shards):
        with pq.ParquetWriter(path / f"shards/part-{number:05d}.parquet", columns, write_page_checksum=True) as writer:
            for group in shard:
                values = {name: [user.columns.get(name, user.name) for user in group] for name in columns.names}
                writer.write_table(pa.table(values, schema=columns))
    meta = json.loads((path / "meta.json").read_text())
    for shard in meta["shards"]:
        for counts, digest in zip(shard["groups"], group_digests(path / shard["file"]), strict=False):
            counts["digest"] = digest
    write_meta(path, meta)


def test_check_compares_digests_counts_columns_and_groups(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder)]) == 0
    assert "18 users" in capsys.readouterr().out
    prepared = Prepared.open(folder)
    file = folder / "vocabulary-kind.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    assert verify(prepared) == ["vocabulary-kind.parquet has another SHA-256 than meta.json says"]
    file.write_bytes(whole)
    good = [[users_of(range(6)), users_of(range(6, 12))], [users_of(range(12, 18))]]
    write_shards(folder, good, drop="held")
    lines = verify(Prepared.open(folder))
    assert len(lines) == 3
    assert lines[0].startswith("shards/part-00000.parquet, row group 0: column 'held' is missing, there are ['user', ")
    write_shards(folder, [[*good[0], good[1][0]], good[1]])
    lines = verify(Prepared.open(folder))
    assert "shards/part-00000.parquet must have 2 row groups, got 3" in lines
    write_shards(folder, [[good[0][1], good[0][0]], [good[1][0][1:]]])
    for limit in (0, -1, None, 1.5):
        with pytest.raises(ValueError, match="^limit must be an integer of at least 1"):
            verify(Prepared.open(folder), limit=limit)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^prepared must be a Prepared"):
        verify(folder)  # type: ignore[arg-type]
    lines = verify(Prepared.open(folder), limit=1)
    assert len(lines) == 1
    assert lines[0].startswith("shards/part-00000.parquet, row group 0: column 'item' must have ")


def test_check_of_impressions(tmp_path: Path) -> None:
    rows = [(1, 1, 1), (2, 2, 0), (3, 2, 1), (1, 3, 0)]
    users = [given_user("a", rows, ["train", "train", "valid", "test"]), given_user("b", rows[:1])]
    prepared = write_folder(tmp_path / "p", [[users]], Schema({"item": 4}), labels="given")
    assert verify(prepared) == []
    users[0].columns["end"] = [0, 1, 2, 2]
    shutil.rmtree(tmp_path / "p")
    prepared = write_folder(tmp_path / "p", [[users]], Schema({"item": 4}), labels="given")
    assert verify(prepared) == [
        "shards/part-00000.parquet, row group 0: column 'end' must be 1 for target 2 of row 0, the behaviours before "
        "its time, got 2"
    ]


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


def test_failure_while_replacing_leaves_what_was_there(tmp_path: Path) -> None:
    folder = made(TINY, tmp_path / "made").path
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
    unit = prepared.unit(0)
    assert sorted(unit.row_time[unit.samples("train").row].tolist()) == [3_000_000, 4_000_000]
