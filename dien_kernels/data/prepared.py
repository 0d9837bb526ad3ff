"""``Prepared``: a prepared folder, checked, whose shards are read unit by unit."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dien_kernels._options import user_path
from dien_kernels.batch import Schema
from dien_kernels.data._arrow import Array, digest
from dien_kernels.data._lookup import as_column, as_values
from dien_kernels.data._parquet import Damaged, lists_of, numbers_of, read_all, read_group, reading
from dien_kernels.data._summary import summary_of
from dien_kernels.data._unit import Unit, UnitInfo
from dien_kernels.data.folder import (
    FORMAT,
    ITEMS,
    LABELS,
    META,
    META_NAMES,
    SPLITS,
    UNFINISHED,
    VERSION,
    WORK,
    digest_of,
    fingerprint_of,
    items_schema,
    vocabulary_file,
)
from dien_kernels.data.negatives import Negatives
from dien_kernels.data.vocabulary import Vocabulary

SMALL = 16 << 20  # bytes; the digests of smaller files are compared when a folder is opened
_KEPT = 2  # units
# What prepare takes where nothing is said, for the command that makes a folder again.
_OPTIONS = {"labels": "next", "targets": "last", "split": "user", "negatives": 1, "negative_sampling": "popularity"}


class Prepared:
    """A prepared folder; open one with ``Prepared.open(path)``.

    Users are numbered by shard, and then by row in the shard. A unit is one row group of a shard, the part that is
    read at a time. Nothing here grows with the number of behaviours; ``user_names`` grows with that of the users.

    Attributes:
        path: the folder.
        meta: the contents of ``meta.json``, plain data; ``meta["report"]`` counts the irregularities of the log.
        schema: the features.
        fingerprint: a hash of contents and options, which is stored with a model.
        labels: ``"next"`` or ``"given"``.
        units: what ``meta.json`` says of each unit, a list of ``UnitInfo``.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self.schema = Schema.from_dict(meta["schema"])
        self.fingerprint: str = meta["fingerprint"]
        self.labels: str = meta["options"]["labels"]
        self.units: list[UnitInfo] = []
        first = 0
        for shard in meta["shards"]:
            for group, counts in enumerate(shard["groups"]):
                info = UnitInfo(
                    shard["file"],
                    group,
                    first,
                    counts["users"],
                    counts["behaviours"],
                    dict(counts["samples"]),
                    counts.get("digest"),
                    shard.get("generation", 0),
                )
                self.units.append(info)
                first += info.users
        self._kept: OrderedDict[int, Unit] = OrderedDict()
        self._lock = threading.Lock()
        self._vocabularies: dict[str, Vocabulary] = {}

    @classmethod
    def open(cls, path: str | Path) -> Prepared:
        """Check the folder and open it: its ``meta.json``, that all files are there in their sizes, and the digests of
        those of up to 16 MiB. Damage of a larger one is found when it is read, by the digests of its row groups.

        Raises ``FileNotFoundError`` or ``ValueError`` saying what is wrong: no such folder, a prepare that was
        interrupted, another format or version, a file that is absent, cut, or has another content.
        """
        return cls._open(user_path(path, "path"), digests=True)

    @classmethod
    def _open(cls, path: Path, digests: bool) -> Prepared:
        if not path.is_dir():
            raise FileNotFoundError(f"there is no prepared folder {path}")
        meta = cls.read_meta(path)
        with reading(path, META):
            prepared = cls(path, meta)
            prepared._check_counts()
        for name in meta["files"]:
            prepared._check_file(name, digests)
        return prepared

    @staticmethod
    def read_meta(path: Path, *, any_version: bool = False) -> dict[str, Any]:
        """Read ``meta.json``. Raises ``ValueError`` for a folder that was not prepared, or by another version.

        ``any_version``: take one of another version as well; its contents are not checked then.
        """
        file = path / META
        if not file.is_file():
            if (path / UNFINISHED).exists() or (path / WORK).exists():  # the mark comes after the folder of its work
                raise ValueError(f"the prepare or append of {path} was interrupted; run it again")
            names = sorted(inside.name for inside in path.iterdir())[:10]
            raise ValueError(f"{path} is no prepared folder: it has no {META}, only {names}")
        try:
            meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}); prepare the folder again") from error
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ValueError(f"{path} is no prepared folder: its {META} is of another program")
        if any_version:
            return meta
        if meta.get("version") != VERSION:
            raise ValueError(
                f"{path} was prepared with format version {meta.get('version')}, this is version {VERSION}; "
                f"prepare it again: {_command(path, meta)}"
            )
        missing = [name for name in (*META_NAMES, "fingerprint", "digest") if name not in meta]
        if missing:
            raise Damaged(path, f"{META} has no {missing[0]!r}")
        if digest_of(meta) != meta["digest"] or fingerprint_of(meta) != meta["fingerprint"]:
            raise Damaged(path, f"{META} does not fit its own fingerprint")
        return meta

    def _check_counts(self) -> None:
        """``meta.json`` agrees with itself: other programs write it, too."""
        counts, options = self.meta["counts"], self.meta["options"]
        if self.labels not in LABELS:
            raise ValueError(f"options.labels must be one of {LABELS}, got {self.labels!r}")
        for name in ("negatives", "negative_sampling", "seed"):
            if name not in options:
                raise ValueError(f"options must have {name!r}")
        if self.meta["time_unit"] not in ("us", "number"):
            raise ValueError(f"time_unit must be 'us' or 'number', got {self.meta['time_unit']!r}")
        samples = {split: sum(unit.samples[split] for unit in self.units) for split in SPLITS}
        summed = {
            "users": sum(unit.users for unit in self.units),
            "behaviours": sum(unit.behaviours for unit in self.units),
            "samples": samples,
        }
        if summed != counts:
            raise ValueError(f"it counts {counts}, its shards {summed}")
        fields = [*self.schema.items, *self.schema.users, *self.schema.behaviours]
        wanted = {ITEMS, *map(vocabulary_file, fields), *(shard["file"] for shard in self.meta["shards"])}
        if wanted != set(self.meta["files"]):
            raise ValueError(f"files must be {sorted(wanted)}, got {sorted(self.meta['files'])}")

    def _check_file(self, name: str, digests: bool) -> None:
        file, recorded = self.path / name, self.meta["files"][name]
        if not file.is_file():
            raise self._not_as_opened(f"{name} is missing")
        size = file.stat().st_size
        if size != recorded["bytes"]:
            raise self._not_as_opened(f"{name} has {size} bytes instead of {recorded['bytes']}")
        if digests and size <= SMALL:
            self._check_digest(name)

    def _check_digest(self, name: str) -> None:
        with reading(self.path, name):
            found = digest(self.path / name)
        if found != self.meta["files"][name]["sha256"]:
            raise self._not_as_opened(f"{name} has another SHA-256 than {META} says")

    def _not_as_opened(self, trouble: str) -> ValueError:
        """The error for a file that is damaged, or that another prepare or append has replaced since."""
        try:
            now = self.read_meta(self.path)["fingerprint"]
        except (ValueError, OSError):
            now = self.fingerprint
        return Damaged(self.path, trouble) if now == self.fingerprint else _changed(self.path, self.fingerprint)

    def __reduce__(self) -> tuple[Callable[[str, str], Prepared], tuple[str, str]]:
        """Pickle the path only: a worker process reads the same files."""
        return _reopen, (str(self.path), self.fingerprint)

    def unabridged(self) -> Prepared:
        """The folder with all of its ids, where this is a view of it with fewer (``earlier.Earlier``)."""
        return self

    def unit(self, number: int) -> Unit:
        """Unit ``number``, with all its columns; the last two are kept."""
        if not 0 <= number < len(self.units):
            raise ValueError(f"unit must lie between 0 and {len(self.units) - 1}, got {number}")
        with self._lock:
            if number not in self._kept:
                self._kept[number] = self.read_unit(number)
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(number)
            return self._kept[number]

    def read_unit(self, number: int, times: bool = True) -> Unit:
        """Read unit ``number`` afresh, without its times where ``times`` is False.

        Raises ``ValueError`` naming a file that is lost, damaged or not what the format says.
        """
        info = self.units[number]
        self._check_file(info.shard, digests=False)
        return Unit(self.path, info, self.schema, self.labels, times)

    def split_size(self, name: str) -> int:
        """The number of samples of ``"train"``, ``"valid"`` or ``"test"``: targets, without their negatives."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {name!r}")
        return int(self.meta["counts"]["samples"][name])

    def history(self, user: int) -> Array:
        """int32: the item ids of a user's behaviours, oldest first."""
        users = self.meta["counts"]["users"]
        if not 0 <= user < users:
            raise IndexError(f"user must lie between 0 and {users - 1}, got {user}")
        unit = self.unit(int(np.searchsorted(self._first_users, user, side="right")) - 1)
        place = user - unit.info.first_user
        return np.asarray(unit.item[unit.offsets[place] : unit.offsets[place + 1]])

    @cached_property
    def _first_users(self) -> Array:
        return np.array([unit.first_user for unit in self.units], np.int64)

    def negatives(self, sampling: str | None = None) -> Negatives:
        """A sampler of items; ``sampling`` None is the one that ``prepare`` used."""
        rare = self.meta["raw_items"] - (self.schema.items["item"] - 1)
        return Negatives(self.item_counts, rare, sampling or self.meta["options"]["negative_sampling"])

    @cached_property
    def _items(self) -> dict[str, Array]:
        """The columns of ``items.parquet``, checked; lists of several values as int64 [items, M]."""
        self._check_digest(ITEMS)  # it is read once and whole
        with reading(self.path, ITEMS):
            table, size = read_all(self.path / ITEMS), next(iter(self.schema.items.values()))
            wanted = items_schema(self.schema)
            if table.num_rows != size or sorted(table.column_names) != sorted(wanted.names):
                raise ValueError(
                    f"it must have {size} rows and the columns {wanted.names}, got {table.num_rows} and "
                    f"{table.column_names}"
                )
            columns = {"count": numbers_of(table, "count", pa.int64())}
            for name in wanted.names[1:]:
                if name in self.schema.several:
                    columns[name] = _padded(name, *lists_of(table, name, pa.int32()), self.schema.several[name])
                else:
                    columns[name] = numbers_of(table, name, pa.int32()).astype(np.int64)
                if columns[name].min() < 0 or columns[name].max() >= self.schema.items[name]:
                    raise ValueError(f"column {name!r} must lie between 0 and {self.schema.items[name] - 1}")
        return columns

    @property
    def item_counts(self) -> Array:
        """int64 [items]: the number of behaviours of each item id."""
        return self._items["count"]

    @cached_property
    def item_fields(self) -> dict[str, Array]:
        """Every item field but the first: the value's id of each item id, int64 [items]. Fields of several values are
        int64 [items, M], with 0 where an item has fewer."""
        return {name: self._items[name] for name in list(self.schema.items)[1:]}

    def vocabulary(self, field: str) -> Vocabulary:
        """Raw values and ids of an item, user or behaviour field. ``ValueError`` for one that is not in the schema."""
        sizes = {**self.schema.items, **self.schema.users, **self.schema.behaviours}
        if field not in sizes:
            raise ValueError(f"field must be one of {list(sizes)}, got {field!r}")
        if field not in self._vocabularies:
            name = vocabulary_file(field)
            self._check_digest(name)  # it is read once and whole
            with reading(self.path, name):
                found = Vocabulary.read(self.path / name)
                if found.size != sizes[field]:
                    raise ValueError(f"it must have {sizes[field] - 1} values, got {found.size - 1}")
            self._vocabularies[field] = found
        return self._vocabularies[field]

    def encode_items(self, raw: Sequence[object] | Array | pa.Array) -> Array:
        """Raw items to ids, int64; items that are not known are 0."""
        return self.vocabulary("item").encode(raw)

    def item_name(self, number: int) -> Any:
        """The raw item of an id, None for 0."""
        return self.vocabulary("item").name(number)

    @cached_property
    def user_names(self) -> pa.ChunkedArray:
        """The raw users, by number. All of them are read at the first use."""
        chunks: list[pa.Array] = []
        for info in self.units:
            self._check_file(info.shard, digests=False)
            with reading(self.path, info.shard):
                users = read_group(self.path / info.shard, info.group, ["user"], info.digest)["user"]
                if len(users) != info.users or (chunks and users.type != chunks[0].type):
                    raise ValueError(f"column 'user' must have {info.users} values of one type, got {len(users)}")
                chunks += users.chunks
        return pa.chunked_array(chunks)

    def encode_users(self, raw: Sequence[object] | Array | pa.Array) -> Array:
        """Raw users to numbers, int64: of the newest generation that has them; -1 for users that are not in the log."""
        column = raw if isinstance(raw, (pa.Array, pa.ChunkedArray)) else as_column(raw)
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        names = self.user_names
        newest = names.combine_chunks()[::-1]  # a user has a row in each generation with events of theirs
        found = pc.index_in(as_values(column, names.type), value_set=newest, skip_nulls=True)
        place = np.asarray(found.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False))
        return np.where(place >= 0, len(newest) - 1 - place, -1)

    def summary(self) -> str:
        """The counts of the prepared data, the irregularities of the log and the warnings, in a few lines of text."""
        return summary_of(self.meta)


def _reopen(path: str, fingerprint: str) -> Prepared:
    """Open a folder in another process; its digests were compared in the first one."""
    prepared = Prepared._open(Path(path), digests=False)
    if prepared.fingerprint != fingerprint:
        raise _changed(path, fingerprint)
    return prepared


def _changed(path: str | Path, fingerprint: str) -> ValueError:
    return ValueError(
        f"{path} was prepared anew or has grown while it was in use (its fingerprint was {fingerprint}): open it again"
    )


def _padded(name: str, offsets: Array, values: Array, width: int) -> Array:
    """Lists as int64 [rows, width], filled up with zeros."""
    length = np.diff(offsets)
    if length.size and length.max() > width:
        raise ValueError(f"column {name!r} must have at most {width} values an item, got {length.max()}")
    if values.size and values.min() < 1:
        raise ValueError(f"column {name!r} must have no id below 1, got {values.min()}")
    padded = np.zeros((length.size, width), np.int64)
    row = np.repeat(np.arange(length.size), length)
    padded[row, np.arange(values.size) - offsets[row]] = values
    return padded


def _command(path: Path, meta: Mapping[str, Any]) -> str:
    """The command that makes a folder again, with the options it was made with; the logs are not known here."""
    words = ["dien-kernels prepare LOGS --out", str(path)]
    options = meta.get("options")
    options = options if isinstance(options, dict) else {}
    for name, usual in _OPTIONS.items():
        if isinstance(options.get(name), type(usual)) and options[name] != usual:
            words.append(f"--{name.replace('_', '-')} {options[name]}")
    if options.get("fractions") not in (None, [0.8, 0.1, 0.1]) and isinstance(options["fractions"], list):
        words.append("--fractions " + " ".join(map(str, options["fractions"])))
    if isinstance(options.get("seed"), int) and options["seed"]:
        words.append(f"--data-seed {options['seed']}")
    return " ".join([*words, "--overwrite"])
