"""The format of a prepared folder, version 2: names, the columns of a shard, the layout of ``meta.json``.

What writes a folder and what reads it share this file and nothing else. A folder holds::

    meta.json                    written last, in one step; the mapping below
    vocabulary-FIELD.parquet     value, count of the ids 1, 2, ... of each item, user and behaviour field
    items.parquet                one row an item id: count, and the further fields of the item
    shards/part-00000.parquet    one row a user; a user is in one shard only

``meta.json`` holds the names of ``META_NAMES``::

    format, version  FORMAT and VERSION
    schema           Schema.to_dict()
    options          labels, targets, split, fractions, negatives, negative_sampling, min_count, seed, shards, ...
    counts           {"users", "behaviours", "samples": {"train", "valid", "test"}}
    raw_items        number of distinct raw items, those included that share id 0
    time_unit        "us" (microseconds since 1970) or "number"
    dense            name to {"mean", "std", "min", "max", "missing", "log", "quantiles"} of the training split
    shards           [{"file": "shards/part-00000.parquet",
                       "groups": [{"users", "behaviours", "samples", "digest"}, ...]}, ...]
                     digest, of ``group_digests``, may be left out; then a change of a few bits in the headers of the
                     pages of a file above 16 MiB may go unnoticed until dien-kernels check
    files            name relative to the folder, with "/", to {"bytes", "sha256"}: every file but meta.json
    report, warnings, first_bad_lines   what was irregular in the log
    fingerprint      fingerprint_of(meta)
    digest           digest_of(meta); ``seal`` sets both, after everything else
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.batch import Schema

FORMAT = "dien_kernels prepared logs"
VERSION = 2

META = "meta.json"
UNFINISHED = "unfinished"  # a file that exists while prepare runs
LOCK = ".lock"
WORK = ".work"  # a folder of temporary files while prepare runs
SHARDS = "shards"  # the folder of the shards
ITEMS = "items.parquet"

GROUP_USERS = 8192  # users in a row group, at most
GROUP_BEHAVIOURS = 1 << 20  # behaviours in a row group, about: a user is never divided
PARQUET = {"write_page_checksum": True}  # with this every Parquet file of a folder is written
CHECKED = {"page_checksum_verification": True}  # and with this read

SPLITS = ("train", "valid", "test")
LABELS = ("next", "given")
META_NAMES = (
    "format",
    "version",
    "schema",
    "options",
    "counts",
    "raw_items",
    "time_unit",
    "dense",
    "shards",
    "files",
    "report",
    "warnings",
    "first_bad_lines",
)


def vocabulary_file(field: str) -> str:
    """The file of the vocabulary of a field."""
    return f"vocabulary-{field}.parquet"


def shard_file(number: int) -> str:
    """The file of a shard, relative to the folder."""
    return f"{SHARDS}/part-{number:05d}.parquet"


def behaviour_column(name: str, sequence: str | None = None) -> str:
    """The column of a field or number of the behaviours, of the items or of a further sequence."""
    return f"behaviour.{name}" if sequence is None else f"{sequence}.behaviour.{name}"


def user_column(name: str) -> str:
    """The column of a user field."""
    return f"user.{name}"


def dense_column(name: str) -> str:
    """The column of a number of a row."""
    return f"dense.{name}"


def shard_schema(schema: Schema, labels: str, user_type: pa.DataType, time_type: pa.DataType) -> pa.Schema:
    """The columns of a shard, in their order.

    A writer may take ``large_list`` for ``list`` and leave the columns nullable, as long as there is no null.

    Args:
        schema: the features.
        labels: ``"next"`` or ``"given"``.
        user_type: int64 or string, of the raw users.
        time_type: int64 or float64.
    """
    ids, times, numbers = pa.list_(pa.int32()), pa.list_(time_type), pa.list_(pa.float32())
    columns: list[tuple[str, pa.DataType]] = [("user", user_type)]
    for sequence in (None, *schema.sequences):
        before = "" if sequence is None else f"{sequence}."
        columns += [(before + "item", ids), (before + "time", times)]
        columns += [(behaviour_column(name, sequence), ids) for name in schema.behaviours]
        columns += [(behaviour_column(name, sequence), numbers) for name in schema.behaviour_dense]
    if labels == "next":
        columns += [("train_from", pa.int32()), ("train_to", pa.int32()), ("held", pa.int8())]
    else:
        columns += [("target", ids), ("target_time", times), ("label", pa.list_(pa.int8()))]
        columns += [("end", ids), ("target_split", pa.list_(pa.int8()))]
    columns += [(user_column(name), ids) for name in schema.users]
    columns += [(dense_column(name), numbers) for name in schema.dense]
    return pa.schema([pa.field(name, dtype, nullable=False) for name, dtype in columns])


def items_schema(schema: Schema) -> pa.Schema:
    """The columns of ``items.parquet``, in their order."""
    fields = [pa.field("count", pa.int64(), nullable=False)]
    for name in list(schema.items)[1:]:
        dtype = pa.list_(pa.int32()) if name in schema.several else pa.int32()
        fields.append(pa.field(name, dtype, nullable=False))
    return pa.schema(fields)


def group_digests(path: Path) -> list[list[Any]]:
    """For each row group of a Parquet file: its first byte, the byte behind its last one, and ``group_digest``."""
    metadata, found = pq.read_metadata(path), []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
        first = min(starts)
        last = max(start + column.total_compressed_size for start, column in zip(starts, columns, strict=True))
        found.append([first, last, group_digest(path, first, last)])
    return found


def group_digest(path: Path, first: int, last: int) -> str:
    """The SHA-256 of the bytes ``first`` to ``last`` - 1 of a Parquet file, followed by those of its footer.

    The footer is not parsed for that: one in which bits were changed can end the process.
    """
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(first)
        hashed.update(file.read(last - first))
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        footer = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(size - footer, 0))
        hashed.update(file.read())
    return hashed.hexdigest()


def fingerprint_of(meta: Mapping[str, object]) -> str:
    """A hash of the contents: folders with equal data and options have the same one, wherever they were made."""
    names = ("version", "schema", "options", "counts", "raw_items", "time_unit", "dense", "shards", "files")
    return _hash({name: meta[name] for name in names})[:32]


def digest_of(meta: Mapping[str, object]) -> str:
    """A hash of all that ``meta.json`` holds but the digest itself, so that no change of it goes unnoticed."""
    return _hash({name: value for name, value in meta.items() if name != "digest"})


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``meta.json``: what is given, with ``fingerprint`` and ``digest``."""
    sealed = {name: value for name, value in meta.items() if name not in ("fingerprint", "digest")}
    sealed["fingerprint"] = fingerprint_of(sealed)
    sealed["digest"] = digest_of(sealed)
    return sealed


def _hash(parts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
