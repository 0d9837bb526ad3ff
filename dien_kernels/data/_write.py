"""The passes of ``prepare`` after the first: vocabularies, sorted histories, samples, negatives, meta."""

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
from dien_kernels.data._arrow import Array, Growing, digest, write_columns
from dien_kernels.data._samples import SPLITS, Rule, cut_times, given_samples, next_samples, split_users
from dien_kernels.data._scan import Rows, Scan, Spill
from dien_kernels.data.log import Log
from dien_kernels.data.negatives import SAMPLING, Negatives, stream
from dien_kernels.data.prepared import FORMAT, META, VERSION, fingerprint_of
from dien_kernels.data.vocabulary import Vocabulary

_NEGATIVE_ROWS = 1 << 16  # samples whose fixed negatives share a stream of random numbers
_PARTITIONS = 512  # files that are open at a time


@dataclass(frozen=True)
class Options:
    """The options of ``prepare`` that change what is prepared, checked."""

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
        if not (min(shares) >= 0 and shares[0] > 0 and abs(sum(shares) - 1) <= 1e-9):  # so written for NaN
            raise ValueError(f"fractions must be three shares (train > 0) with the sum 1, got {list(shares)}")


def check_integer(name: str, number: object, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")


class Writer:
    """The passes after the first one, and what they share."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        log: Log,
        found: Scan,
        options: Options,
        progress: bool,
        partition_rows: int,
    ) -> None:
        self.folder, self.work, self.log, self.found, self.options = folder, work, log, found, options
        self.progress = progress
        self.partition_rows = max(partition_rows, found.rows // _PARTITIONS + 1)
        self.given = options.labels == "given"
        self.report: Counter[str] = Counter(found.report)
        self.sizes: dict[str, int] = {}

    def write(self) -> None:
        found = self.found
        self._vocabularies()
        self.rank = self._rank_users()
        counts = (found.user_clicks if self.given else found.user_rows)[self.by_rank]
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        if self.offsets[-1] == 0:
            raise ValueError("no row has the label 1, so that there are no behaviours to learn from")
        self.rule = self._rule()
        self._sort()
        write_columns(self.folder / "users.arrow", {"offset": self.offsets})
        self._meta()

    def _vocabularies(self) -> None:
        """Ids by frequency, written; ``self.ids``: by field, the id of each code."""
        found, minimum = self.found, self.options.min_count
        self.ids: dict[str, Array] = {}
        self.vocabularies: dict[str, Vocabulary] = {}
        for name, coder in found.coders.items():
            if name == "user":
                continue
            unknown = 0
            if name == "item":
                counts = found.item_counts
            elif name in found.item_field_of:
                of = found.item_field_of[name]
                known = of >= 0
                weights = found.item_counts[known].astype(np.float64)
                counts = np.bincount(of[known], weights, minlength=len(coder)).astype(np.int64)
                unknown = int(found.item_counts[~known].sum())
            else:
                counts = found.user_field_counts[name]
                unknown = self.report[f"missing:{name}"]
            self.vocabularies[name], self.ids[name] = coder.vocabulary(counts, minimum[name], unknown)
            self.vocabularies[name].write(self.folder / f"vocabulary-{name}.parquet")
        self.size = self.vocabularies["item"].size
        self.rare = len(found.coders["item"]) - (self.size - 1)
        self.report["rare_items"] = self.rare
        tables = {}
        for name, of in found.item_field_of.items():
            table = np.zeros(self.size, np.int32)
            table[self.ids["item"][:-1]] = self.ids[name][of]
            table[0] = 0
            tables[name] = table
        write_columns(self.folder / "items.arrow", tables or {"none": np.zeros(self.size, np.int32)})

    def _rank_users(self) -> Array:
        """int32 by code: users are numbered by raw value, so that numbers do not depend on partitions."""
        values = self.found.coders["user"].values()
        order = pc.array_sort_indices(values)
        pq.write_table(pa.table({"value": values.take(order)}), self.folder / "users.parquet")
        self.by_rank = order.to_numpy()
        rank = np.empty(len(values), np.int32)
        rank[self.by_rank] = np.arange(len(values), dtype=np.int32)
        return rank

    def _rule(self) -> Rule:
        options, found = self.options, self.found
        able = found.user_rows[self.by_rank] >= (1 if self.given else 2)
        if not self.given:
            self.report["one_event_users"] = int((~able).sum())
        every = options.targets == "every"
        if options.split == "user":
            split = split_users(able, options.fractions, options.seed)
            return Rule(options.labels, every, split, (0, 0))
        if self.given:
            # All impressions count, and there may be many: their times are put in order in a mapped file.
            times = Growing(self.work / "times.bin", found.user_last.dtype.str)
            for chunk in found.spill.chunks():
                times.append(chunk["timestamp"])
            cuts = cut_times(times.close(), options.fractions)
        else:
            cuts = cut_times(found.user_last[self.by_rank][able], options.fractions)
        return Rule(options.labels, every, None, cuts)

    def _partitions(self) -> Iterator[Rows]:
        """The rows with users' ranks and ids, one range of users after another, in the log's order."""
        total = np.cumsum(self.found.user_rows[self.by_rank])
        part_of = (total - 1) // self.partition_rows
        _, part_of = np.unique(part_of, return_inverse=True)
        count = int(part_of[-1]) + 1
        spills = [Spill(self.work / f"part-{part}.arrow") for part in range(count)]
        for chunk in self.found.spill.chunks():
            chunk["user"] = self.rank[chunk["user"]]
            for name, ids in self.ids.items():
                if name in chunk:
                    chunk[name] = ids[chunk[name]]
            part = part_of[chunk["user"]]
            order = np.argsort(part, kind="stable")
            ends = np.searchsorted(part[order], np.arange(count + 1))
            for p in np.flatnonzero(np.diff(ends)).tolist():
                rows = order[ends[p] : ends[p + 1]]
                spills[p].append({name: column[rows] for name, column in chunk.items()})
        self.found.spill.path.unlink()
        for spill in spills:
            spill.close()
        for spill in spills:
            yield spill.whole()
            spill.path.unlink()

    def _in_order(self, rows: Rows) -> Rows:
        """Rows by user and time; equal times stay in the log's order."""
        user, time = rows["user"], rows["timestamp"]
        order = np.argsort(user, kind="stable")
        sorted_user, sorted_time = user[order], time[order]
        back = (sorted_user[1:] == sorted_user[:-1]) & (sorted_time[1:] < sorted_time[:-1])
        self.report["out_of_order"] += int(back.sum())
        if back.any():
            order = np.lexsort((time, user))
        return {name: column[order] for name, column in rows.items()}

    def _sort(self) -> None:
        """One partition after another: histories, owned items, samples."""
        work, extra = self.work, {}
        if self.given:
            extra["label"] = "i1"
        extra |= dict.fromkeys(self.log.user_fields, "i4") | dict.fromkeys(self.log.dense, "f4")
        kinds = {
            "user": "i4",
            "end": "i8",
            "target": "i4",
            "timestamp": self.found.user_last.dtype.str,
            **extra,
        }
        growing = {
            split: {name: Growing(work / f"{split}-{name}.bin", kind) for name, kind in kinds.items()}
            for split in SPLITS
        }
        behaviours, owned = Growing(work / "items.bin", "i4"), Growing(work / "owned.bin", "i8")
        base = 0
        everything = self.size - 1 + (self.rare > 0)
        with tqdm(
            total=self.found.rows,
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
                owned.append(keys)
                if self.given:
                    samples = given_samples(rows, self.rule, base)
                    self.report["empty_histories"] += int((samples.end == self.offsets[user]).sum())
                else:
                    holders, held = np.unique(keys // self.size, return_counts=True)
                    full = holders[held == everything]
                    self.report["users_owning_every_item"] += full.size
                    samples = next_samples(rows, self.rule, base, np.isin(user, full))
                base += int(clicked.sum())
                for number, split in enumerate(SPLITS):
                    row = samples.row[samples.split == number]
                    columns = {**rows, "target": rows["item"]}
                    for name, file in growing[split].items():
                        file.append(samples.end[samples.split == number] if name == "end" else columns[name][row])
                bar.update(user.size)
        flat, keys = behaviours.close(), owned.close()
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
        able = int((self.found.user_rows > (0 if self.given else 1)).sum())
        owners = self.report["users_owning_every_item"]
        raise ValueError(
            f"split {split!r} got no sample: {able} of {self.rank.size} users have "
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
        drawn = Growing(self.work / f"negatives-{number}.bin", "i4", count)
        for start in range(0, user.size, _NEGATIVE_ROWS):
            rows = np.repeat(user[start : start + _NEGATIVE_ROWS].astype(np.int64), count)
            drawn.append(sampler.draw(rows, stream(seed, 0, start // _NEGATIVE_ROWS, number)))
        return drawn.close()

    def _meta(self) -> None:
        """Written last, and at once: a folder with this file is whole."""
        log, sizes = self.log, {name: vocabulary.size for name, vocabulary in self.vocabularies.items()}
        schema = Schema(
            {"item": sizes["item"], **{name: sizes[name] for name in log.item_fields}},
            {name: sizes[name] for name in log.user_fields},
            log.dense,
        )
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".arrow", ".parquet"))
        report = {"rows": self.found.rows, "bad_lines": log.bad.count, "missing_dense": log.missing_dense}
        report.update(self.report)
        meta: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "schema": schema.to_dict(),
            "options": asdict(self.options),
            "counts": {"users": self.rank.size, "behaviours": int(self.offsets[-1]), "samples": self.sizes},
            "raw_items": len(self.found.coders["item"]),
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
