"""docs/from-your-warehouse.md is followed: its programs are saved and its commands run, in the order of the page.

A block of Python belongs to the file that the line above it names (`` `unload.py`: ``); a block of shell is run. Blocks
of SQL are for warehouses that are not here, and are read only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from dien_kernels.data import Loader, Prepared, verify

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "from-your-warehouse.md"
BLOCK = re.compile(r"(?:^[^\n]*`(?P<file>\w+\.py)`[^\n]*:\n\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
pytestmark = pytest.mark.slow  # processes, and a training


def blocks() -> list[tuple[str, str, str]]:
    """(kind, file, code) of every block."""
    return [(found["kind"], found["file"] or "", found["code"]) for found in BLOCK.finditer(PAGE.read_text())]


def follow(folder: Path) -> str:
    """Follow the page in a folder; what its commands printed."""
    tools = folder / "tools"
    tools.mkdir()
    for name, what in (("python", ""), ("dien-kernels", "-m dien_kernels")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {what} "$@"\n')
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = ""
    for kind, file, code in blocks():
        if kind == "python":
            (folder / file).write_text(code)
        elif kind == "sh":
            done = subprocess.run(["sh", "-e", "-c", code], cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
    return printed


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("warehouse")
    return folder, follow(folder)


def events(folder: Path, days: str = "*") -> pl.DataFrame:
    return pl.read_parquet(folder / "unloaded" / f"day={days}" / "*.parquet", hive_partitioning=False)


def test_every_block_is_followed_or_sql() -> None:
    assert {kind for kind, _, _ in blocks()} == {"python", "sh", "sql"}
    assert all(file for kind, file, _ in blocks() if kind == "python")
    assert len(re.findall(r"^```", PAGE.read_text(), re.M)) == 2 * len(blocks())


def test_the_table_has_the_usual_troubles(followed: tuple[Path, str]) -> None:
    table = events(followed[0])
    assert table.schema["product"] == pl.Decimal(38, 0)
    assert table.schema["happened"] == pl.Datetime("us", "UTC")
    assert table.height > table.unique().height
    assert (table["visitor"] == "guest").any()
    assert table["tags"].str.contains(",").all()


def test_the_prepared_folder_is_that_of_the_table(followed: tuple[Path, str]) -> None:
    folder, printed = followed
    prepared = Prepared.open(folder / "prepared")
    table = events(folder, "2024-01-0[1-4]")
    signed_in = table.filter(pl.col("visitor") != "guest")
    assert prepared.meta["counts"]["behaviours"] == signed_in.unique().height
    assert prepared.meta["report"]["bad_lines"] == table.height - signed_in.height
    assert set(prepared.user_names.to_pylist()) == set(signed_in["visitor"])
    user = prepared.user_names[0].as_py()
    mine = signed_in.unique().filter(pl.col("visitor") == user).sort("happened")
    assert [prepared.item_name(item) for item in prepared.history(0)] == mine["product"].cast(pl.Int64).to_list()
    assert set(prepared.vocabulary("tags").values.to_pylist()) == {f"c{number}" for number in range(12)} | {"all"}
    assert prepared.schema.several == {"tags": 2}
    assert "from 2024-01-01 00:00:50 to 2024-01-04" in printed.replace("00:00:00", "00:00:50")
    assert "duplicates: " in printed


def test_requests_are_scored(followed: tuple[Path, str]) -> None:
    scores = pl.read_parquet(followed[0] / "scores.parquet")
    assert scores.height == 20
    assert scores["scores"].list.len().to_list() == scores["candidates"].list.len().to_list() == [50] * 20
    assert scores["scores"].explode().is_between(0, 1).all()
    assert "(0 unknown)" in followed[1]


def test_the_new_day_is_appended(followed: tuple[Path, str]) -> None:
    folder, printed = followed
    grown, before = Prepared.open(folder / "grown"), Prepared.open(folder / "prepared")
    day = events(folder, "2024-01-05").filter(pl.col("visitor") != "guest")
    (appended,) = grown.meta["appended"]
    assert (appended["rows"], appended["late_rows"]) == (day.height, 0)
    assert grown.meta["ancestors"] == [before.fingerprint]
    assert len(Loader(grown, "train", since=1)) > 0
    assert "appended 1 time" in printed


def test_the_folder_written_by_hand_is_read(followed: tuple[Path, str]) -> None:
    folder, _ = followed
    prepared = Prepared.open(folder / "own")
    assert verify(prepared) == []
    table = events(folder).filter(pl.col("visitor") != "guest").unique()
    assert prepared.meta["counts"]["behaviours"] == table.height
    assert len(prepared.meta["shards"]) == 2
    for split in ("train", "valid", "test"):
        loader = Loader(prepared, split, batch_size=64)
        rows = sum(batch.rows for batch in loader.epoch(0))
        assert rows == 2 * prepared.split_size(split) > 0
    first = table.filter(pl.col("visitor") == prepared.user_names[0].as_py()).sort("happened")
    assert [prepared.item_name(item) for item in prepared.history(0)] == first["product"].cast(pl.Int64).to_list()
