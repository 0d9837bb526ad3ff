"""``verify``: reads a whole prepared folder and compares everything that the format promises."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array
from dien_kernels.data._hash import hash64
from dien_kernels.data._options import check_integer
from dien_kernels.data._parquet import Damaged, read_group
from dien_kernels.data.folder import ITEMS, vocabulary_file
from dien_kernels.data.prepared import Prepared


def verify(prepared: Prepared, limit: int = 100) -> list[str]:
    """Read the whole folder and compare everything that its format promises, for folders that other programs wrote.

    Returns a line for each thing that is wrong, naming file, row group, column and what was expected; at most
    ``limit``. It takes 8 bytes of memory a user. Raises ``TypeError`` for what is no ``Prepared``, ``ValueError`` for a
    ``limit`` below 1.
    """
    if not isinstance(prepared, Prepared):
        raise TypeError(f"prepared must be a Prepared, as Prepared.open(folder) is, got {type(prepared).__name__}")
    limit = check_integer("limit", limit, 1)
    return list(islice(_faults_of(prepared), limit))


def _faults_of(prepared: Prepared) -> Iterator[str]:
    """Yield a line for each thing that is wrong."""
    broken = set()
    for name in prepared.meta["files"]:
        try:
            prepared._check_file(name, digests=False)
            prepared._check_digest(name)
        except Damaged as error:
            broken.add(name)
            yield error.trouble
    yield from _faults_of_tables(prepared, broken)
    seen: dict[int, list[Array]] = {}
    counts = np.zeros(next(iter(prepared.schema.items.values())), np.int64)
    whole = True
    for number, info in enumerate(prepared.units):
        if info.shard in broken:
            whole = False
            continue
        try:
            unit = prepared.read_unit(number)
            users = read_group(prepared.path / info.shard, info.group, ["user"])["user"]
        except Damaged as error:
            whole = False
            yield error.trouble
            continue
        for line in (*unit.faults_of_times(), *_faults_of_users(users)):
            yield f"{info.shard}, row group {info.group}: {line}"
        if not users.null_count and users.type in (pa.int64(), pa.string(), pa.large_string()):
            seen.setdefault(info.generation, []).append(hash64(users))
        if info.generation == 0:  # the rows of later ones begin with behaviours of the past
            np.add.at(counts, unit.item, 1)
    yield from _faults_of_shards(prepared, broken)
    for generation, hashes in seen.items():
        yield from _repeated_users(prepared, generation, hashes)
    if whole and ITEMS not in broken:
        grown = any(info.generation for info in prepared.units)
        wrong = np.flatnonzero(counts > prepared.item_counts if grown else counts != prepared.item_counts)
        if wrong.size:
            item = int(wrong[0])
            yield (
                f"{ITEMS}: column 'count' must be {counts[item]} for id {item}, the behaviours in the shards, "
                f"got {prepared.item_counts[item]}"
            )


def _faults_of_tables(prepared: Prepared, broken: set[str]) -> Iterator[str]:
    """Items and vocabularies."""
    schema = prepared.schema
    if ITEMS not in broken:
        try:
            if prepared.item_counts.min() < 0:
                yield f"{ITEMS}: column 'count' must be at least 0, got {prepared.item_counts.min()}"
        except Damaged as error:
            yield error.trouble
    for field in (*schema.items, *schema.users, *schema.behaviours):
        name = vocabulary_file(field)
        if name in broken:
            continue
        try:
            vocabulary = prepared.vocabulary(field)
        except Damaged as error:
            yield error.trouble
            continue
        if vocabulary.values.null_count or vocabulary.values.type not in (pa.int64(), pa.string()):
            yield f"{name}: column 'value' must be int64 or string without nulls, got {vocabulary.values.type}"
        elif len(vocabulary.values.unique()) != len(vocabulary.values):
            yield f"{name}: column 'value' must have no value twice"
        if len(vocabulary.counts) and vocabulary.counts.min() < 0:
            yield f"{name}: column 'count' must be at least 0, got {vocabulary.counts.min()}"


def _faults_of_users(users: pa.ChunkedArray) -> Iterator[str]:
    if users.type not in (pa.int64(), pa.string(), pa.large_string()):
        yield f"column 'user' must be int64 or string, got {users.type}"
    if users.null_count:
        yield f"column 'user' must have no nulls, got {users.null_count}"


def _faults_of_shards(prepared: Prepared, broken: set[str]) -> Iterator[str]:
    """Row groups that ``meta.json`` does not know of."""
    for shard in prepared.meta["shards"]:
        if shard["file"] in broken:
            continue
        try:
            groups = pq.read_metadata(prepared.path / shard["file"]).num_row_groups
        except (pa.ArrowException, OSError) as error:
            yield f"{shard['file']} cannot be read ({error})"
            continue
        if groups != len(shard["groups"]):
            yield f"{shard['file']} must have {len(shard['groups'])} row groups, got {groups}"


def _repeated_users(prepared: Prepared, generation: int, seen: list[Array]) -> Iterator[str]:
    """Users with two rows in one generation. Equal hashes name the suspects, whose raw values are then read."""
    hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *seen]))
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not suspects.size:
        return
    places: dict[object, str] = {}
    for info in prepared.units:
        if info.generation != generation:
            continue
        try:
            users = read_group(prepared.path / info.shard, info.group, ["user"])["user"]
        except (pa.ArrowException, ValueError, OSError):
            continue  # named already
        if users.null_count:
            continue
        for row in np.flatnonzero(np.isin(hash64(users), suspects)).tolist():
            user = users[row].as_py()
            if user in places:
                where = f"{info.shard}, row group {info.group}"
                yield f"{where}: column 'user' must not have {user!r}, as {places[user]} has"
            places.setdefault(user, f"{info.shard}, row group {info.group},")
