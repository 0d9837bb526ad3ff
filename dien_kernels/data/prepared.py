"""``Prepared``: a prepared folder, checked and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dien_kernels.batch import Schema
from dien_kernels.data._arrow import Array, map_columns
from dien_kernels.data._samples import SPLITS
from dien_kernels.data.negatives import Negatives
from dien_kernels.data.vocabulary import Vocabulary

META = "meta.json"
UNFINISHED = "unfinished"  # a file that exists while prepare runs
FORMAT = "dien_kernels prepared logs"
VERSION = 1


def fingerprint_of(meta: Mapping[str, object]) -> str:
    """A hash of the contents: folders with equal data and options have the same one, wherever they were made."""
    parts = {name: meta[name] for name in ("version", "schema", "options", "counts", "files")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class Split:
    """The S samples of a split. The arrays are memory-mapped files, which must not be written to.

    Attributes:
        user: int32 [S], the user's number.
        end: int64 [S]; the history is behaviours offsets[user] to end - 1.
        target: int32 [S], item id.
        timestamp: int64 or float64 [S], of the target.
        label: int8 [S], or None for next-behaviour labels, where every target is a click.
        negatives: int32 [S, K], item ids fixed at prepare (valid and test of next-behaviour labels), or None.
        users: user field to int32 [S].
        dense: dense column to float32 [S].
    """

    user: Array
    end: Array
    target: Array
    timestamp: Array
    label: Array | None = None
    negatives: Array | None = None
    users: dict[str, Array] = field(default_factory=dict)
    dense: dict[str, Array] = field(default_factory=dict)


class Prepared:
    """A prepared folder; open one with ``Prepared.open(path)``.

    Attributes:
        path: the folder.
        meta: the contents of ``meta.json``, plain data; ``meta["report"]`` counts the irregularities of the log.
        schema: the features.
        fingerprint: a hash of contents and options, which is stored with a model.
        labels: ``"next"`` or ``"given"``.
        behaviours: int32 [E], item ids of all histories, oldest first, one user after another.
        offsets: int64 [U + 1]: user u's behaviours are offsets[u] to offsets[u + 1] - 1.
        item_fields: every item field but the first to int64 [items]: the value's id of each item id.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self.schema = Schema.from_dict(meta["schema"])
        self.fingerprint: str = meta["fingerprint"]
        self.labels: str = meta["options"]["labels"]
        self.offsets = map_columns(path / "users.arrow")["offset"]
        self.behaviours = map_columns(path / "behaviours.arrow")["item"]
        self._user_items = map_columns(path / "owned.arrow")["key"]
        tables = map_columns(path / "items.arrow")
        self.item_fields = {name: tables[name].astype(np.int64) for name in list(self.schema.items)[1:]}
        self._splits: dict[str, Split] = {}
        self._vocabularies: dict[str, Vocabulary] = {}

    @classmethod
    def open(cls, path: str | Path) -> Prepared:
        """Check the folder (version, files and their sizes, numbers of rows) and map it.

        Raises ``FileNotFoundError`` or ``ValueError`` saying what is wrong: no such folder, a prepare that
        was interrupted, another format or version, a file that is absent, cut or of another size.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"there is no prepared folder {path}")
        meta = cls.read_meta(path)
        for name, recorded in meta["files"].items():
            file = path / name
            if not file.is_file():
                raise ValueError(f"{path} is damaged: {name} is missing; prepare it again")
            if file.stat().st_size != recorded["bytes"]:
                raise ValueError(
                    f"{path} is damaged: {name} has {file.stat().st_size} bytes instead of {recorded['bytes']}; "
                    "prepare it again"
                )
        if fingerprint_of(meta) != meta["fingerprint"]:
            raise ValueError(f"{path} is damaged: {META} does not fit its own fingerprint; prepare it again")
        try:
            prepared = cls(path, meta)
            counts = meta["counts"]
            real = {split: prepared.split(split).user.size for split in SPLITS}
            expected = [*counts["samples"].values(), counts["users"], counts["behaviours"]]
            got = [
                *(real[split] for split in counts["samples"]),
                prepared.offsets.size - 1,
                prepared.behaviours.size,
            ]
        except (pa.ArrowException, KeyError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}; prepare it again") from error
        if expected != got:
            raise ValueError(f"{path} is damaged: {META} counts {expected}, the files {got}; prepare it again")
        return prepared

    @staticmethod
    def read_meta(path: Path) -> dict[str, Any]:
        """Read ``meta.json``. Raises ``ValueError`` for a folder that was not prepared, or by another version."""
        file = path / META
        if not file.is_file():
            if (path / UNFINISHED).exists():
                raise ValueError(f"the prepare of {path} was interrupted; run it again")
            names = sorted(inside.name for inside in path.iterdir())[:10]
            raise ValueError(f"{path} is no prepared folder: it has no {META}, only {names}")
        try:
            meta: dict[str, Any] = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); prepare the folder again") from error
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ValueError(f"{path} is no prepared folder: its {META} is of another program")
        if meta.get("version") != VERSION:
            raise ValueError(
                f"{path} was prepared with format version {meta.get('version')}, this is version {VERSION}; "
                "prepare it again"
            )
        return meta

    def __reduce__(self) -> tuple[Callable[[str], Prepared], tuple[str]]:
        """Pickle the path only: a worker process maps the same files."""
        return Prepared.open, (str(self.path),)

    def split(self, name: str) -> Split:
        """The samples of ``"train"``, ``"valid"`` or ``"test"``."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {name!r}")
        if name not in self._splits:
            columns = map_columns(self.path / f"{name}.arrow")
            fields = {key: columns[key] for key in self.schema.users}
            dense = {key: columns[key] for key in self.schema.dense}
            self._splits[name] = Split(
                columns["user"],
                columns["end"],
                columns["target"],
                columns["timestamp"],
                columns.get("label"),
                columns.get("negatives"),
                fields,
                dense,
            )
        return self._splits[name]

    def split_size(self, name: str) -> int:
        """The number of samples of a split: targets, without their negatives."""
        return int(self.split(name).user.size)

    def history(self, user: int) -> Array:
        """int32: the item ids of a user's behaviours, oldest first."""
        return self.behaviours[self.offsets[user] : self.offsets[user + 1]]

    def negatives(self, sampling: str | None = None) -> Negatives:
        """A sampler of items that users never had; ``sampling`` None is the one that ``prepare`` used."""
        rare = self.meta["raw_items"] - (self.schema.items["item"] - 1)
        size = self.schema.items["item"]
        return Negatives(
            self.behaviours, self._user_items, size, rare, sampling or self.meta["options"]["negative_sampling"]
        )

    def vocabulary(self, field: str) -> Vocabulary:
        """Raw values and ids of an item or user field. ``ValueError`` for one that is not in the schema."""
        fields = [*self.schema.items, *self.schema.users]
        if field not in fields:
            raise ValueError(f"field must be one of {fields}, got {field!r}")
        if field not in self._vocabularies:
            self._vocabularies[field] = Vocabulary.read(self.path / f"vocabulary-{field}.parquet")
        return self._vocabularies[field]

    def encode_items(self, raw: Sequence[object] | Array | pa.Array) -> Array:
        """Raw items to ids, int64; items that are not known are 0."""
        return self.vocabulary("item").encode(raw)

    def item_name(self, number: int) -> Any:
        """The raw item of an id, None for 0."""
        return self.vocabulary("item").name(number)

    @cached_property
    def user_names(self) -> pa.Array:
        """The raw users, by number."""
        return pq.read_table(self.path / "users.parquet")["value"].combine_chunks()

    def encode_users(self, raw: Sequence[object] | Array | pa.Array) -> Array:
        """Raw users to numbers, int64; -1 for users that are not in the log."""
        array = raw if isinstance(raw, pa.Array) else pa.array(raw)
        found = pc.index_in(array.cast(self.user_names.type), value_set=self.user_names, skip_nulls=True)
        return np.asarray(found.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False))

    def summary(self) -> str:
        """The counts of the prepared data and of the irregularities of the log, in a few lines of text."""
        counts, report = self.meta["counts"], self.meta["report"]
        samples = ", ".join(f"{name} {size:,}" for name, size in counts["samples"].items())
        fields = ", ".join(f"{name} {size:,}" for name, size in {**self.schema.items, **self.schema.users}.items())
        lines = [
            f"{counts['users']:,} users, {counts['behaviours']:,} behaviours; vocabularies: {fields}",
            f"samples: {samples} ({self.meta['options']['labels']}, {self.meta['options']['targets']}, "
            f"split by {self.meta['options']['split']})",
        ]
        odd = [f"{name} {number:,}" for name, number in report.items() if number and name != "rows"]
        if odd:
            lines.append("of note: " + ", ".join(odd))
        lines += [f"  bad line {line}" for line in self.meta["first_bad_lines"]]
        return "\n".join(lines)
