"""Writes prepared folders of version 2 from lists of users in plain Python, as another program would: what the format
promises, without the code of ``prepare``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.batch import Schema
from dien_kernels.data import Prepared
from dien_kernels.data.folder import FORMAT, VERSION, group_digests, items_schema, seal, shard_schema, vocabulary_file

SPLITS = ("train", "valid", "test")


@dataclass
class User:
    """A row of a shard: ``columns`` are its values, by the names of the format; ``item`` has ids."""

    name: Any
    columns: dict[str, Any] = field(default_factory=dict)


def next_user(name: Any, items: list[int], times: list[float], split: str = "train", **more: Any) -> User:
    """A user with next-behaviour labels: every position is a target of training, or the last one of another split."""
    last = len(items) if split == "train" and len(items) > 1 else 0
    columns = {"item": items, "time": times, "train_from": min(last, 1), "train_to": last}
    columns["held"] = SPLITS.index(split) if len(items) > 1 else 0
    return User(name, columns | {key.replace("__", "."): value for key, value in more.items()})


def given_user(name: Any, rows: list[tuple[int, float, int]], splits: list[str] | None = None, **more: Any) -> User:
    """A user with impressions of (item, time, label), ordered by time."""
    splits = splits or ["train"] * len(rows)
    clicks = [(item, time) for item, time, label in rows if label]
    columns: dict[str, Any] = {"item": [item for item, _ in clicks], "time": [time for _, time in clicks]}
    columns["target"] = [item for item, _, _ in rows]
    columns["target_time"] = [time for _, time, _ in rows]
    columns["label"] = [label for _, _, label in rows]
    columns["end"] = [sum(then < time for _, then in clicks) for _, time, _ in rows]
    columns["target_split"] = [SPLITS.index(split) for split in splits]
    return User(name, columns | {key.replace("__", "."): value for key, value in more.items()})


def counts_of(users: list[User], labels: str) -> dict[str, Any]:
    """Of a row group, for ``meta.json``."""
    samples = dict.fromkeys(SPLITS, 0)
    for user in users:
        if labels == "given":
            for split in user.columns["target_split"]:
                samples[SPLITS[split]] += 1
        else:
            samples["train"] += user.columns["train_to"] - user.columns["train_from"]
            if user.columns["held"]:
                samples[SPLITS[user.columns["held"]]] += 1
    behaviours = sum(len(user.columns["item"]) for user in users)
    return {"users": len(users), "behaviours": behaviours, "samples": samples}


def write_folder(
    path: Path,
    shards: list[list[list[User]]],
    schema: Schema,
    *,
    labels: str = "next",
    item_fields: dict[str, list[Any]] | None = None,
    raw_items: int | None = None,
    time_type: pa.DataType | None = None,
    large: bool = False,
    **meta: Any,
) -> Prepared:
    """Write and open a folder. ``shards`` are lists of row groups, which are lists of users; ``item_fields`` name to a
    value (or a list of them) for each item id. ``large``: with Arrow's large lists and nullable columns."""
    (path / "shards").mkdir(parents=True)
    groups = [group for shard in shards for group in shard]
    users = [user for group in groups for user in group]
    names = [user.name for user in users]
    columns = shard_schema(schema, labels, pa.array(names).type, time_type or pa.int64())
    if large:
        columns = pa.schema(
            [
                pa.field(f.name, pa.large_list(f.type.value_type) if pa.types.is_list(f.type) else f.type)
                for f in columns
            ]
        )
    listed = []
    for number, shard in enumerate(shards):
        name = f"shards/part-{number:05d}.parquet"
        with pq.ParquetWriter(path / name, columns, write_page_checksum=True) as writer:
            for group in shard:
                values = {column: [user.columns.get(column, user.name) for user in group] for column in columns.names}
                writer.write_table(pa.table(values, schema=columns), row_group_size=max(len(group), 1))
        digests = group_digests(path / name)
        counted = [counts_of(group, labels) | {"digest": digest} for group, digest in zip(shard, digests, strict=True)]
        listed.append({"file": name, "groups": counted})

    size = next(iter(schema.items.values()))
    seen = Counter(item for user in users for item in user.columns["item"])
    table = {"count": [seen[item] for item in range(size)], **(item_fields or {})}
    pq.write_table(pa.table(table, schema=items_schema(schema)), path / "items.parquet", write_page_checksum=True)
    for name, count in {**schema.items, **schema.users, **schema.behaviours}.items():
        values = [f"{name}{number}" for number in range(1, count)]
        vocabulary = pa.table(
            {"value": pa.array(values, pa.string()), "count": pa.array([1] * len(values), pa.int64())}
        )
        pq.write_table(
            vocabulary.replace_schema_metadata({"unknown": "0"}), path / vocabulary_file(name), write_page_checksum=True
        )

    counted = [counts_of(group, labels) for group in groups]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "schema": schema.to_dict(),
        "options": {
            "labels": labels, "targets": "every", "split": "user", "fractions": [0.8, 0.1, 0.1], "negatives": 2,
            "negative_sampling": "popularity", "seed": 5,
        },
        "counts": {
            "users": len(users),
            "behaviours": sum(c["behaviours"] for c in counted),
            "samples": {split: sum(c["samples"][split] for c in counted) for split in SPLITS},
        },
        "raw_items": size - 1 if raw_items is None else raw_items,
        "time_unit": "us",
        "dense": {},
        "shards": listed,
        "report": {"rows": 0},
        "warnings": [],
        "first_bad_lines": [],
    }  # fmt: skip
    content["options"] |= meta.pop("options", {})
    write_meta(path, content | meta)
    return Prepared.open(path)


def write_meta(path: Path, content: dict[str, Any]) -> None:
    """Write ``meta.json`` with the sizes and digests of the files that are there."""
    files = sorted(file for file in path.rglob("*.parquet"))
    content["files"] = {
        file.relative_to(path).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    (path / "meta.json").write_text(json.dumps(seal(content), indent=1))
