"""The passes of ``prepare`` after the first one: they write vocabularies, sorted histories, samples, negatives and
the meta file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from dien_kernels.batch import Schema
from dien_kernels.data._arrow import Array, GrowingArray, digest, write_columns
from dien_kernels.data._samples import SPLITS, Rule, cut_times, given_samples, next_samples, split_users
from dien_kernels.data._scan import Rows, Scan, Spill
from dien_kernels.data.log import Log
from dien_kernels.data.negatives import SAMPLING, Negatives, stream
from dien_kernels.data.prepared import FORMAT, META, VERSION, fingerprint_of
from dien_kernels.data.vocabulary import Vocabulary

_NEGATIVE_ROWS = 1 << 16  # so many samples draw their fixed negatives from one stream of random numbers
_PARTITIONS = 512  # the largest number of partition files that are open at the same time


@dataclass(frozen=True)
class Options:
    """The options of ``prepare`` that change what is written. They are checked when the object is made."""

    labels: str
    targets: str
    split: str
    fractions: tuple[float, float, float]
    negatives: int
    negative_sampling: str
    min_count: dict[str, int]
    seed: int

    def __post_init__(self) -> None:
        for name, allowed in (
            ("labels", ("next", "given")),
            ("targets", ("last", "every")),
            ("split", ("user", "time")),
            ("negative_sampling", SAMPLING),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_integer("negatives", self.negatives, 1)
        check_integer("seed", self.seed, 0)
        for name, number in self.min_count.items():
            check_integer(f"min_count of {name!r}", number, 1)
        shares = self.fractions
        if not (min(shares) >= 0 and shares[0] > 0 and abs(sum(shares) - 1) <= 1e-9):  # refuses NaN, too
            raise ValueError(f"fractions must be three shares (train > 0) with the sum 1, got {list(shares)}")


def check_integer(name: str, number: object, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")


class Writer:
    """Runs the passes after the first one and holds the tables that they share."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        log: Log,
        scanned: Scan,
        options: Options,
        progress: bool,
        partition_rows: int,
    ) -> None:
        self.folder, self.work, self.log, self.scanned, self.options = folder, work, log, scanned, options
        self.progress = progress
        self.partition_rows = max(partition_rows, scanned.rows // _PARTITIONS + 1)
        self.given = options.labels == "given"
        self.report: Counter[str] = Counter(scanned.report)
        self.sizes: dict[str, int] = {}

    def write(self) -> None:
        scanned = self.scanned
        self._vocabularies()
        self.rank = self._rank_users()
        counts = (scanned.user_clicks if self.given else scanned.user_rows)[self.by_rank]
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        if self.offsets[-1] == 0:
            raise ValueError("no row has the label 1, so that there are no behaviours to learn from")
        self.rule = self._rule()
        self._sort()
        write_columns(self.folder / "users.arrow", {"offset": self.offsets})
        self._meta()

    def _vocabularies(self) -> None:
        """Give ids by frequency and write the vocabularies; ``self.ids`` maps each field to the id of each code."""
        scanned, minimum = self.scanned, self.options.min_count
        self.ids: dict[str, Array] = {}
        self.vocabularies: dict[str, Vocabulary] = {}
        for name, coder in scanned.coders.items():
            if name == "user":
                continue
            unknown = 0
            if name == "item":
                counts = scanned.item_counts
            elif name in scanned.item_field_codes:
                field_codes = scanned.item_field_codes[name]
                known = field_codes >= 0
                weights = scanned.item_counts[known].astype(np.float64)
                counts = np.bincount(field_codes[known], weights, minlength=len(coder)).astype(np.int64)
                unknown = int(scanned.item_counts[~known].sum())
            else:
                counts = scanned.user_field_counts[name]
                unknown = self.report[f"missing:{name}"]
            self.vocabularies[name], self.ids[name] = coder.vocabulary(counts, minimum[name], unknown)
            self.vocabularies[name].write(self.folder / f"vocabulary-{name}.parquet")
        self.size = self.vocabularies["item"].size
        self.rare = len(scanned.coders["item"]) - (self.size - 1)
        self.report["rare_items"] = self.rare
        tables = {}
        for name, field_codes in scanned.item_field_codes.items():
            table = np.zeros(self.size, np.int32)
            table[self.ids["item"][:-1]] = self.ids[name][field_codes]
            table[0] = 0
            tables[name] = table
        write_columns(self.folder / "items.arrow", tables or {"none": np.zeros(self.size, np.int32)})

    def _rank_users(self) -> Array:
        """The number of each user, int32 by code.

        Users are numbered in the order of their raw values, so that the numbers do not depend on the partitions.
        """
        values = self.scanned.coders["user"].values()
        order = pc.array_sort_indices(values)
        pq.write_table(pa.table({"value": values.take(order)}), self.folder / "users.parquet")
        self.by_rank = order.to_numpy()
        rank = np.empty(len(values), np.int32)
        rank[self.by_rank] = np.arange(len(values), dtype=np.int32)
        return rank

    def _rule(self) -> Rule:
        options, scanned = self.options, self.scanned
        eligible = scanned.user_rows[self.by_rank] >= (1 if self.given else 2)
        if not self.given:
            self.report["one_event_users"] = int((~eligible).sum())
        every = options.targets == "every"
        if options.split == "user":
            split = split_users(eligible, options.fractions, options.seed)
            return Rule(options.labels, every, split, (0, 0))
        if self.given:
            # The quantiles are over all impressions, which may not fit into memory: their times go to a mapped file.
            times = GrowingArray(self.work / "times.bin", scanned.user_last.dtype.str)
            for chunk in scanned.spill.chunks():
                times.append(chunk["timestamp"])
            cuts = cut_times(times.close(), options.fractions)
        else:
            cuts = cut_times(scanned.user_last[self.by_rank][eligible], options.fractions)
        return Rule(options.labels, every, None, cuts)

    def _partitions(self) -> Iterator[Rows]:
        """Yield the rows of one range of users after another, with user numbers and ids, in the order of the log."""
        total = np.cumsum(self.scanned.user_rows[self.by_rank])
        partition_of = (total - 1) // self.partition_rows
        _, partition_of = np.unique(partition_of, return_inverse=True)
        count = int(partition_of[-1]) + 1
        spills = [Spill(self.work / f"part-{part}.arrow") for part in range(count)]
        for chunk in self.scanned.spill.chunks():
            chunk["user"] = self.rank[chunk["user"]]
            for name, ids in self.ids.items():
                if name in chunk:
                    chunk[name] = ids[chunk[name]]
            part = partition_of[chunk["user"]]
            order = np.argsort(part, kind="stable")
            ends = np.searchsorted(part[order], np.arange(count + 1))
            for p in np.flatnonzero(np.diff(ends)).tolist():
                rows = order[ends[p] : ends[p + 1]]
                spills[p].append({name: column[rows] for name, column in chunk.items()})
        self.scanned.spill.path.unlink()
        for spill in spills:
            spill.close()
        for spill in spills:
            yield spill.read_all()
            spill.path.unlink()

    def _in_order(self, rows: Rows) -> Rows:
        """Sort rows by user and then by time; rows with equal times stay in the order of the log."""
        user, time = rows["user"], rows["timestamp"]
        order = np.argsort(user, kind="stable")
        sorted_user, sorted_time = user[order], time[order]
        back = (sorted_user[1:] == sorted_user[:-1]) & (sorted_time[1:] < sorted_time[:-1])
        self.report["out_of_order"] += int(back.sum())
        if back.any():
            order = np.lexsort((time, user))
        return {name: column[order] for name, column in rows.items()}

    def _sort(self) -> None:
        """Sort one partition after another and write its histories, the items of its users, and its samples."""
        work, extra = self.work, {}
        if self.given:
            extra["label"] = "i1"
        extra |= dict.fromkeys(self.log.user_fields, "i4") | dict.fromkeys(self.log.dense, "f4")
        dtypes = {
            "user": "i4",
            "end": "i8",
            "target": "i4",
            "timestamp": self.scanned.user_last.dtype.str,
            **extra,
        }
        growing = {
            split: {name: GrowingArray(work / f"{split}-{name}.bin", dtype) for name, dtype in dtypes.items()}
            for split in SPLITS
        }
        behaviours, user_items = GrowingArray(work / "items.bin", "i4"), GrowingArray(work / "owned.bin", "i8")
        base = 0
        all_items = self.size - 1 + (self.rare > 0)
        with tqdm(
            total=self.scanned.rows,
            unit=" rows",
            unit_scale=True,
            desc="sort",
            disable=None if self.progress else True,
        ) as bar:
            for raw in self._partitions():
                rows = self._in_order(raw)
                user = rows["user"].astype(np.int64)
                clicked = rows["label"] == 1 if self.given else np.ones(user.size, bool)
                behaviours.append(rows["item"][clicked])
                keys = np.unique(user[clicked] * self.size + rows["item"][clicked])
                user_items.append(keys)
                if self.given:
                    samples = given_samples(rows, self.rule, base)
                    self.report["empty_histories"] += int((samples.end == self.offsets[user]).sum())
                else:
                    owners_seen, items_owned = np.unique(keys // self.size, return_counts=True)
                    full = owners_seen[items_owned == all_items]
                    self.report["users_owning_every_item"] += full.size
                    samples = next_samples(rows, self.rule, base, np.isin(user, full))
                base += int(clicked.sum())
                for number, split in enumerate(SPLITS):
                    row = samples.row[samples.split == number]
                    columns = {**rows, "target": rows["item"]}
                    for name, file in growing[split].items():
                        file.append(samples.end[samples.split == number] if name == "end" else columns[name][row])
                bar.update(user.size)
        flat, keys = behaviours.close(), user_items.close()
        write_columns(self.folder / "behaviours.arrow", {"item": flat})
        write_columns(self.folder / "owned.arrow", {"key": keys})
        sampler = Negatives(flat, keys, self.size, self.rare, self.options.negative_sampling)
        for number, split in enumerate(SPLITS):
            arrays = {name: file.close() for name, file in growing[split].items()}
            self.sizes[split] = arrays["user"].size
            self._require(split)
            if split != "train" and not self.given:
                arrays["negatives"] = self._fixed_negatives(sampler, arrays["user"], number)
            write_columns(self.folder / f"{split}.arrow", arrays)

    def _require(self, split: str) -> None:
        options = self.options
        if self.sizes[split] or not options.fractions[SPLITS.index(split)]:
            return
        eligible = int((self.scanned.user_rows > (0 if self.given else 1)).sum())
        owners = self.report["users_owning_every_item"]
        raise ValueError(
            f"split {split!r} got no sample: {eligible} of {self.rank.size} users have "
            + ("an impression" if self.given else "two behaviours or more")
            + (f" and {owners} users have had every item, so that there is no negative for them" if owners else "")
            + f"; fractions={options.fractions}, split={options.split!r}"
            + (
                f", valid begins at time {self.rule.cuts[0]} and test at {self.rule.cuts[1]}"
                if options.split == "time"
                else ""
            )
        )

    def _fixed_negatives(self, sampler: Negatives, user: Array, number: int) -> Array:
        count, seed = self.options.negatives, self.options.seed
        drawn = GrowingArray(self.work / f"negatives-{number}.bin", "i4", count)
        for start in range(0, user.size, _NEGATIVE_ROWS):
            rows = np.repeat(user[start : start + _NEGATIVE_ROWS].astype(np.int64), count)
            drawn.append(sampler.draw(rows, stream(seed, 0, start // _NEGATIVE_ROWS, number)))
        return drawn.close()

    def _meta(self) -> None:
        """Write the meta file, as the last one and in one step: a folder that has this file is complete."""
        log, sizes = self.log, {name: vocabulary.size for name, vocabulary in self.vocabularies.items()}
        schema = Schema(
            {"item": sizes["item"], **{name: sizes[name] for name in log.item_fields}},
            {name: sizes[name] for name in log.user_fields},
            log.dense,
        )
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".arrow", ".parquet"))
        report = {"rows": self.scanned.rows, "bad_lines": log.bad.count, "missing_dense": log.missing_dense}
        report.update(self.report)
        meta: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "schema": schema.to_dict(),
            "options": asdict(self.options),
            "counts": {"users": self.rank.size, "behaviours": int(self.offsets[-1]), "samples": self.sizes},
            "raw_items": len(self.scanned.coders["item"]),
            "report": {name: int(number) for name, number in sorted(report.items())},
            "first_bad_lines": log.bad.first,
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files},
        }
        meta["fingerprint"] = fingerprint_of(meta)
        temporary = self.folder / (META + ".tmp")
        with temporary.open("w") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / META)
