"""Samples with histories of their own become a prepared folder: dealt to buckets by user, then one shard at a time.

Room card. Lives here: the counts of samples, and the merging of histories. May import: numpy, polars, pyarrow,
``_deal``, ``_ids``, ``_user_lists``. Must not be here: the reading of files, the meta file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from dien_kernels.data._arrow import Array
from dien_kernels.data._deal import BUCKET_BITS, Buckets, Dealt, Tally, tallies_of
from dien_kernels.data._hash import hash64
from dien_kernels.data._ids import Ids
from dien_kernels.data._numbers import Numbers
from dien_kernels.data._user_lists import UserLists, in_history
from dien_kernels.data._write import Written
from dien_kernels.data.folder import SHARDS, SPLITS, group_digests, shard_file
from dien_kernels.data.log import Log

_NEAR = 256  # chains


def deal_samples(log: Log, folder: Path, chunk_rows: int) -> Dealt:
    """Deal the samples to files by the hash of their user, and count every value of targets and histories."""
    dealt = Dealt(
        Buckets(folder),
        Tally(["item", *log.item_fields], ["rows", "behaviours"], ["first"], folder / "items"),
        {},
        tallies_of(log, folder),
    )
    try:
        for batch in log.read():
            for start in range(0, batch.num_rows, chunk_rows):
                part = batch.slice(start, chunk_rows)
                dealt.schema = part.schema
                bits = np.uint64(64 - BUCKET_BITS)
                dealt.buckets.append(part, (hash64(part.column("user")) >> bits).astype(np.uint8))
                _count(dealt, log, pl.DataFrame(part))
    finally:
        dealt.close()
    return dealt


def _count(dealt: Dealt, log: Log, frame: pl.DataFrame) -> None:
    fields = list(log.item_fields)
    frame = frame.with_row_index("first", dealt.rows).with_columns(pl.col("first").cast(pl.Int64))
    parts = [frame.select("first", item="target", **{name: f"target.{name}" for name in fields})]
    parts.append(
        frame.select("first", item="history", **{name: f"history.{name}" for name in fields})
        .explode("item", *fields)
        .drop_nulls("item")
    )
    if log.sequences:
        nothing = {name: pl.lit(None, pl.String) for name in fields}
        parts.append(frame.select("first", item="further").explode("item").drop_nulls().with_columns(**nothing))
    counts = [pl.len().cast(pl.Int64).alias("rows"), pl.lit(0, pl.Int64).alias("behaviours"), pl.col("first").min()]
    dealt.items.add(pl.concat(parts).group_by("item", *fields).agg(*counts))
    for name, tally in dealt.fields.items():
        of_user = name in log.user_fields
        values = frame[f"user.{name}"] if of_user else frame[f"behaviour.{name}"].explode().drop_nulls()
        dealt.missing[name] += values.null_count()
        tally.add(values.drop_nulls().alias(name).to_frame().group_by(name).agg(pl.len().cast(pl.Int64).alias("rows")))
    dealt.rows += frame.height
    dealt.behaviours += int(frame["history"].list.len().sum())


@dataclass
class _Chain:
    """Histories of a user that are prefixes of one another: the longest, and the rows that read them."""

    main: bytes = b""
    further: bytes = b""
    rows: list[int] = field(default_factory=list)


def chains(rows: list[int], main: list[bytes], further: list[bytes]) -> list[_Chain]:
    """The rows of a user in chains: each history is a prefix of the longest one of its chain, in every sequence.

    A row looks for its chain among the ``_NEAR`` latest ones, so that a user with many rows costs no more for each.
    """
    found: list[_Chain] = []
    for row in sorted(rows, key=lambda row: (len(main[row]), len(further[row]))):
        past, other = main[row], further[row]
        for chain in found[-_NEAR:]:
            if past.startswith(chain.main) and other.startswith(chain.further):
                break
        else:
            chain = _Chain()
            found.append(chain)
        chain.main, chain.further = past, other
        chain.rows.append(row)
    return found


class SampleWriter:
    """Writes the shards of samples; ``count`` are the behaviours of each item that were written."""

    def __init__(self, folder: Path, columns: pa.Schema, log: Log, ids: Ids) -> None:
        self.folder, self.columns, self.log, self.ids = folder, columns, log, ids
        self.written = Written({name: Numbers() for name in log.dense})
        self.count = np.zeros(ids.vocabularies["item"].size, np.int64)
        (folder / SHARDS).mkdir()

    def write(self, rows: pa.Table | None) -> None:
        """Merge the samples of the next shard and write it."""
        if rows is None or not rows.num_rows:
            return
        users = self._lists(rows.combine_chunks())
        name = shard_file(len(self.written.shards))
        groups = users.write(self.folder / name, self.columns)
        for group, digest in zip(groups, group_digests(self.folder / name), strict=True):
            group["digest"] = digest
            self.written.users += group["users"]
            self.written.behaviours += group["behaviours"]
            self.written.samples.update(group["samples"])
        self.written.shards.append({"file": name, "groups": groups})

    def _ids(self, name: str, values: Any) -> Array:
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        ids: Array = self.ids.vocabularies[name].encode_values(values).astype(np.int32)
        return ids

    def _histories(self, rows: pa.Table, columns: Mapping[str, str]) -> list[bytes]:
        """Of each row the ids of its behaviours, int32 [length, columns], as bytes."""
        lists = {name: rows[column].combine_chunks() for column, name in columns.items()}
        offsets = next(iter(lists.values())).offsets.to_numpy()
        flat = np.stack([self._ids(name, found.flatten()) for name, found in lists.items()], 1)
        offsets = offsets - offsets[0]
        return [flat[low:high].tobytes() for low, high in zip(offsets[:-1], offsets[1:], strict=True)]

    def _lists(self, rows: pa.Table) -> UserLists:
        fields = self.log.behaviour_fields
        main = self._histories(rows, {"history": "item", **{f"behaviour.{name}": name for name in fields}})
        further = self._histories(rows, {"further": "item"}) if self.log.sequences else [b""] * rows.num_rows
        of_user: dict[Any, list[int]] = {}
        for row, raw in enumerate(rows["user"].to_pylist()):
            of_user.setdefault(raw, []).append(row)
        found: list[_Chain] = []
        names: list[str] = []
        for raw, mine in of_user.items():
            for number, chain in enumerate(chains(mine, main, further)):
                found.append(chain)
                names.append(raw if number == 0 else f"{raw}\x1f{number + 1}")
        self.written.report["further_histories"] += len(found) - len(of_user)
        users = UserLists(pa.array(names, rows["user"].type), len(found))
        width = 1 + len(fields)
        past = np.frombuffer(b"".join(chain.main for chain in found), np.int32).reshape(-1, width)
        length = np.array([len(chain.main) // (4 * width) for chain in found])
        self._add_sequence(users, "", past, length)
        self.count += np.bincount(past[:, 0], minlength=self.count.size)
        if self.log.sequences:
            other = np.frombuffer(b"".join(chain.further for chain in found), np.int32).reshape(-1, 1)
            lengths = np.array([len(chain.further) // 4 for chain in found])
            self._add_sequence(users, f"{self.log.sequences[1]}.", other, lengths)
        ends = [len(past) // (4 * width) for past in main]
        self._add_targets(users, rows, found, ends, [len(past) // 4 for past in further])
        self.written.longest = max(self.written.longest, int(length.max(initial=0)))
        return users

    def _add_sequence(self, users: UserLists, before: str, past: Array, length: Array) -> None:
        user = np.repeat(np.arange(length.size), length)
        position = np.arange(user.size) - (np.cumsum(length) - length)[user]
        users.add_list(f"{before}item", user, past[:, 0])
        users.add_list(f"{before}time", user, position.astype(np.int64))
        for place, name in enumerate(self.log.behaviour_fields, start=1):
            users.add_list(f"{before}behaviour.{name}", user, past[:, place])

    def _add_targets(
        self, users: UserLists, rows: pa.Table, found: list[_Chain], end: list[int], further: list[int]
    ) -> None:
        order = np.array([row for chain in found for row in chain.rows])
        user = np.repeat(np.arange(len(found)), [len(chain.rows) for chain in found])
        label, split = (rows[name].to_numpy()[order] for name in ("label", "split"))
        ends = np.array(end, np.int32)[order]
        users.add_list("target", user, self._ids("item", rows["target"])[order])
        # A sample reads what stands before its time in the further sequence, so that the time is the length of it.
        time = np.array(further if self.log.sequences else end, np.int64)[order]
        users.add_list("target_time", user, time)
        users.add_list("label", user, label)
        users.add_list("end", user, ends)
        users.add_list("target_split", user, split)
        for name in self.log.user_fields:
            users.add_list(f"user.{name}", user, self._ids(name, rows[f"user.{name}"])[order])
        for name in self.log.dense:
            values = rows[f"dense.{name}"].to_numpy()[order]
            users.add_list(f"dense.{name}", user, values)
            self.written.numbers[name].add(values[split == 0])
        users.samples = {name: np.bincount(user[split == n], minlength=len(found)) for n, name in enumerate(SPLITS)}
        report = self.written.report
        report["empty_histories"] += int((ends == 0).sum())
        item, offsets = users.lists["item"], users.offsets["item"]
        inside = in_history(item, offsets, user, users.lists["target"], ends, self.count.size)
        for name, rows_of in (("positives", label == 1), ("negatives", label == 0)):
            report[name] += int(rows_of.sum())
            report[f"{name}_in_history"] += int((inside & rows_of).sum())
