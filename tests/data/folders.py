"""A prepared folder as its documentation describes it, read with pyarrow alone: what other programs see of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

SPLITS = ("train", "valid", "test")


def meta_of(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return meta


def names_of(folder: Path, field: str) -> list[Any]:
    """The raw values of a field by id; None for id 0."""
    return [None, *pq.read_table(folder / f"vocabulary-{field}.parquet")["value"].to_pylist()]


def users_of(folder: Path) -> dict[Any, dict[str, Any]]:
    """The columns of every user, by raw user; items are raw items."""
    names, users = names_of(folder, "item"), {}
    for shard in meta_of(folder)["shards"]:
        for row in pq.read_table(folder / shard["file"]).to_pylist():
            for column, values in row.items():
                if column.split(".")[-1] in ("item", "target"):
                    row[column] = [names[number] for number in values]
            assert row["user"] not in users  # a user is in one shard only
            users[row["user"]] = row
    return users


def samples_of(folder: Path, split: str) -> list[tuple[Any, ...]]:
    """(user, end of the history, raw target) and, of impressions, the label: of every sample of a split."""
    found = []
    for user, row in users_of(folder).items():
        if "target" in row:
            impressions = zip(row["end"], row["target"], row["label"], row["target_split"], strict=True)
            found += [(user, end, item, label) for end, item, label, of in impressions if SPLITS[of] == split]
            continue
        items = row["item"]
        if split == "train":
            found += [(user, end, items[end]) for end in range(row["train_from"], row["train_to"])]
        elif SPLITS[row["held"]] == split:
            found.append((user, len(items) - 1, items[-1]))
    return sorted(found, key=str)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The contents of every file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
