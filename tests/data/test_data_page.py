"""docs/data.md says what the code says: formats, roles, words for missing, columns of a shard, options."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pyarrow as pa

from dien_kernels.batch import Schema
from dien_kernels.data import FORMATS, Columns, Loader, append, folder, prepare
from dien_kernels.data._ids import MOST_VALUES
from dien_kernels.data._kinds import MISSING, MISSING_FIELD

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()


def part(start: str, end: str) -> str:
    """The text of the page from one phrase to another."""
    return PAGE[PAGE.index(start) : PAGE.index(end, PAGE.index(start))]


def names(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_it_is_short() -> None:
    assert PAGE.count("\n") <= 250


def test_formats_and_their_endings() -> None:
    for name, entry in FORMATS.items():
        (row,) = re.findall(rf"^\| `{name}` \|([^|]*)\|", PAGE, re.M)
        assert names(row) == {ending for ending in entry.endings if not ending.endswith((".gz", ".zst"))}


def test_every_role_of_a_column_is_named() -> None:
    table = part("| role | columns |", "**Ids**")
    assert {field.name for field in fields(Columns)} <= names(table) | {"delimiters"}


def test_the_words_for_missing() -> None:
    text = part("**Missing.**", "`missing` gives another list")
    first, second = text.split("In fields,")
    assert names(first) | {""} == set(MISSING)
    assert names(second) == set(MISSING) - set(MISSING_FIELD)


def test_the_columns_of_a_shard() -> None:
    table = names(part("| column | holds |", "Within a shard"))
    schema = Schema({"item": 2}, {"NAME": 2}, ("NAME",), {}, {"NAME": 2}, (), ("S",))
    for labels in ("next", "given"):
        missing = set(folder.shard_schema(schema, labels, pa.string(), pa.int64()).names) - table
        assert not missing
    assert f"at most {folder.GROUP_USERS} users" in PAGE
    assert folder.GROUP_BEHAVIOURS == 1 << 20
    assert f"its first {MOST_VALUES}" in PAGE


def test_options_that_are_named_exist() -> None:
    known = {name for what in (prepare, append, Loader.__init__) for name in inspect.signature(what).parameters}
    known |= {field.name for field in fields(Columns)}
    for name in re.findall(r"`(\w+)=\"", PAGE):
        assert name in known, name
    for option in ("duplicates", "tail", "since", "exclude", "repeats", "time_gap", "rank", "world", "min_count"):
        assert option in known
        assert re.search(rf"`[^`]*\b{option}\b[^`]*`", PAGE), option
    assert inspect.signature(append).parameters["tail"].default == 200
    assert "`tail` (200)" in PAGE
