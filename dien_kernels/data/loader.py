"""``Loader``: the samples of a prepared folder as jagged batches. Each batch is a pure function of its number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dien_kernels.batch import Batch, Schema
from dien_kernels.checks import check_flag
from dien_kernels.data._arrow import Array
from dien_kernels.data._options import check_integer
from dien_kernels.data._plan import ORDER, Cut, EpochPlan, blocks_of, order_of
from dien_kernels.data._rows import Drawn, Rows
from dien_kernels.data._unit import Unit, joined
from dien_kernels.data.folder import SPLITS
from dien_kernels.data.negatives import Negatives, Owned, stream
from dien_kernels.data.prepared import Prepared

EXCLUDE = ("own", "history", "none")
REPEATS = ("keep", "drop")
_KEPT = 2  # blocks


class Loader:
    """Batches of one split.

    With next-behaviour labels a sample is 1 + K rows that share a history: the positive, then its K
    negatives. Training draws its negatives afresh in each epoch; valid and test have fixed ones, which depend on the
    folder alone. With given labels a sample is one row. No history is longer than ``max_length``: the newest
    behaviours are kept.

    A block of units (row groups of the folder) is read at a time, and two are held: memory does not grow with the log.
    For training, the blocks come in an order that is drawn for each epoch, and the samples of a block are shuffled.

    Args:
        prepared: the folder.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        batch_size: rows in a batch, at most (the last one of a block may be smaller): samples * (1 + K).
        max_length: behaviours of a history, at most; None: all. It is that of further sequences, too.
        negatives: K of training with next-behaviour labels.
        auxiliary_negatives: negatives beside each behaviour, for the auxiliary loss; training only, 0 for
            none.
        exclude: what negatives of training never are: ``"own"``, items that the user has anywhere in the log;
            ``"history"``, items of this sample's whole history, nor its target: it may be one that the user gets
            later; ``"none"``: anything may be drawn.
        repeats: ``"keep"``, or ``"drop"``: leave out samples whose target the history has already. All units are
            read once for that when the loader is made.
        since: 0: all samples; n: only those of events that came with the n-th ``append`` and later ones; ``"latest"``:
            those of the last ``append`` (all where there was none).
        time_gap: whether ``"time_gap"`` is appended to the numbers of the behaviours (``schema.behaviour_dense``):
            log(1 + seconds since the user's previous behaviour), 0 for the first one of a user.
        shuffle: whether the order changes from epoch to epoch; None: in training only.
        seed: with the epoch and the number of the batch, all that random choices depend on.
        workers: processes that make batches; 0: the caller's. They change nothing but speed.
        start_method: of the workers: ``"fork"``, ``"spawn"``, ``"forkserver"``, or None for that of the platform.
        bucket: whether histories of similar length come into one batch: shuffled samples are sorted by length
            in windows of 64 batches, and the batches shuffled again; without shuffling those of a block are sorted.
        block: behaviours of a block, at most (but one unit at least): the larger, the more is shuffled together, and
            the more memory is needed, some 30 bytes a behaviour of two blocks.
        share_histories: False: every row has a history of its own (``history_of`` is None); the same rows
            otherwise.
        pin_memory: whether batches are in page-locked memory, for copies to a GPU.
        rank, world: this process's number, and how many there are. Batches are dealt out in groups of ``world``
            neighbours, which have similar lengths. All ranks have equally many. A rank may get a batch without rows at
            the end of a block that has fewer samples left than there are ranks.

    Attributes:
        schema: that of the batches: the folder's, and ``"time_gap"``.

    ``epoch`` and ``batch`` give what ``Batch`` describes; ``group`` is the user's number. Raises
    ``ValueError`` naming a bad option.

    >>> import tempfile
    >>> from dien_kernels.data import Loader, prepare, synthetic
    >>> prepared = prepare(synthetic(users=50, items=40, categories=4, events=500), tempfile.mkdtemp())
    >>> loader = Loader(prepared, "train", batch_size=32)
    >>> loader.steps(0), loader.batch(0, 0).rows <= 32
    (3, True)
    """

    def __init__(
        self,
        prepared: Prepared,
        split: str = "train",
        *,
        batch_size: int = 128,
        max_length: int | None = 100,
        negatives: int = 1,
        auxiliary_negatives: int = 1,
        exclude: str = "own",
        repeats: str = "keep",
        since: int | str = 0,
        time_gap: bool = False,
        shuffle: bool | None = None,
        seed: int = 0,
        workers: int = 0,
        start_method: str | None = None,
        bucket: bool = True,
        block: int = 1 << 21,
        share_histories: bool = True,
        pin_memory: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not isinstance(prepared, Prepared):
            raise TypeError(f"prepared must be a Prepared, as Prepared.open(folder) is, got {type(prepared).__name__}")
        last = max((unit.generation for unit in prepared.units), default=0)
        since = last if isinstance(since, str) and since == "latest" else since
        numbers = {}
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("max_length", 1 if max_length is None else max_length, 1),
            ("negatives", negatives, 0),
            ("auxiliary_negatives", auxiliary_negatives, 0),
            ("seed", seed, 0),
            ("since", since, 0),
            ("workers", workers, 0),
            ("block", block, 1),
            ("rank", rank, 0),
            ("world", world, 1),
        ):
            numbers[name] = check_integer(name, number, least, 2**64 - 1 if name == "seed" else 2**31 - 1)
        batch_size, negatives, auxiliary_negatives = (
            numbers[name] for name in ("batch_size", "negatives", "auxiliary_negatives")
        )
        seed, since, workers, block, rank, world = (
            numbers[name] for name in ("seed", "since", "workers", "block", "rank", "world")
        )
        max_length = None if max_length is None else numbers["max_length"]
        for name, flag in (
            ("time_gap", time_gap),
            ("shuffle", split == "train" if shuffle is None else shuffle),
            ("bucket", bucket),
            ("share_histories", share_histories),
            ("pin_memory", pin_memory),
        ):
            check_flag(name, flag)
        if int(since) > last:
            raise ValueError(f"since must be at most {last}, the appends of {prepared.path}, got {since}")
        if rank >= world:
            raise ValueError(f"rank must lie between 0 and {world - 1}, below world={world}, got {rank}")
        methods = (None, *torch.multiprocessing.get_all_start_methods())
        for name, value, allowed in (
            ("split", split, SPLITS),
            ("exclude", exclude, EXCLUDE),
            ("repeats", repeats, REPEATS),
            ("start_method", start_method, methods),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        self.prepared, self.split = prepared, split
        self.training = split == "train"
        self.max_length, self.seed, self.workers, self.start_method = max_length, seed, workers, start_method
        self.exclude, self.repeats, self.time_gap, self.since = exclude, repeats, time_gap, int(since)
        self.shuffle = self.training if shuffle is None else shuffle
        self.bucket, self.block = bucket, block
        self.share_histories, self.pin_memory = share_histories, pin_memory
        self.rank, self.world = rank, world
        self.negatives = _negatives(prepared, split, negatives)
        self.auxiliary_negatives = auxiliary_negatives if self.training else 0
        self.batch_samples = batch_size // (1 + self.negatives)
        if self.batch_samples < 1:
            raise ValueError(
                f"batch_size counts rows and must be at least {1 + self.negatives}, a positive with its "
                f"{self.negatives} negatives; got {batch_size}"
            )
        self.schema: Schema = batch_schema(prepared.schema, self.time_gap)
        self._cut = Cut(self.batch_samples, world)
        self._kept: OrderedDict[int, _Held] = OrderedDict()
        self._plan: tuple[int | None, EpochPlan] | None = None
        self._next = (0, 0)
        self._blocks, self._samples = self._in_blocks()
        if repeats == "drop":
            self._samples = np.array([sum(map(self._count, block)) for block in self._blocks], np.int64)

    def _in_blocks(self) -> tuple[list[list[int]], Array]:
        """The units of each block, and its samples, int64; none of a generation before ``since``."""
        units = self.prepared.units
        samples = np.array([unit.samples[self.split] * (unit.generation >= self.since) for unit in units], np.int64)
        blocks = blocks_of(np.array([unit.behaviours for unit in units], np.int64), samples, self.block)
        return blocks, np.array([samples[block].sum() for block in blocks], np.int64)

    def _count(self, number: int) -> int:
        """The samples of a unit that are no repetitions."""
        unit = self.prepared.read_unit(number, times=False)
        return int((~unit.repeated(unit.samples(self.split))).sum())

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets: the path of the folder and the options, but nothing that was read."""
        state = self.__dict__ | {"_kept": OrderedDict(), "_plan": None}
        state.pop("_sampler", None)
        if self.repeats == "keep":
            state["_samples"] = state["_blocks"] = None  # the folder says it
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._samples is None:
            self._blocks, self._samples = self._in_blocks()

    def __len__(self) -> int:
        """The number of batches of an epoch, for this rank."""
        return int(self._cut.groups(self._samples).sum())

    def steps(self, epoch: int) -> int:
        """The number of batches of an epoch: the same for all epochs and ranks."""
        return len(self)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on, in order.

        Raises ``ValueError`` naming a file that is lost or damaged, when its turn comes.
        """
        epoch = check_integer("epoch", epoch, 0, 2**63 - 1)
        if isinstance(start, bool) or not isinstance(start, Integral) or not 0 <= start <= len(self):
            raise ValueError(f"start must lie between 0 and {len(self)}, got {start!r}")
        start = int(start)
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        self._next = (epoch, start)
        if self.workers and len(self) > start and self._draws:
            _ = self._sampler  # before the workers start, so that forked ones inherit it
        batches = DataLoader(
            _Batches(self, epoch),
            batch_size=None,
            sampler=range(start, len(self)),
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            multiprocessing_context=self.start_method if self.workers else None,
        )
        for number, batch in enumerate(batches, start=start + 1):
            if isinstance(batch, ValueError):
                raise batch
            self._next = (epoch, number)
            yield batch

    @property
    def options(self) -> dict[str, Any]:
        """All that decides which batches there are, beside epoch and index: plain data. ``workers`` is not of it."""
        names = (
            "split", "batch_samples", "max_length", "negatives", "auxiliary_negatives", "exclude", "repeats",
            "since", "time_gap", "shuffle", "seed", "bucket", "block", "share_histories", "rank", "world",
        )  # fmt: skip
        return {"fingerprint": self.prepared.fingerprint} | {name: getattr(self, name) for name in names}

    @property
    def state(self) -> dict[str, Any]:
        """Where the latest iteration stands: ``epoch`` and ``index`` of the batch that comes next, and ``options``."""
        return {"epoch": self._next[0], "index": self._next[1], "options": self.options}

    def resume(self, state: Mapping[str, Any]) -> Iterator[Batch]:
        """The batches of the epoch from where ``state`` stands on.

        Raises ``ValueError`` naming an option that was another one.
        """
        options = self.options
        given = state.get("options") if isinstance(state, Mapping) else None
        if not isinstance(given, Mapping) or not {"epoch", "index"} <= state.keys():
            raise ValueError(f"state must be what Loader.state gives, with epoch, index and options, got {state!r}")
        for name in dict.fromkeys([*given, *options]):
            if name not in options or name not in given or options[name] != given[name]:
                was = repr(given[name]) if name in given else "in the state"
                raise ValueError(f"{name} must be {was}, as it was in the state, got {options.get(name)!r}")
        return self.epoch(state["epoch"], start=state["index"])

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch ``index`` of an epoch: a function of the folder, the options and these two numbers."""
        epoch = check_integer("epoch", epoch, 0, 2**63 - 1)
        index = check_integer("index", index, 0)
        if index >= len(self):
            raise ValueError(f"index must lie between 0 and {len(self) - 1}, got {index}")
        number, place = self._plan_of(epoch).find(index)
        held = self._hold(number)
        order, groups = held.order(self, epoch if self.shuffle else None)
        cut = int(groups[place]) * self.world + self.rank
        first, end = self._cut.batch(order.size, cut)
        drawn = Drawn(self.seed, epoch, (number << 32) | cut)
        return held.rows.batch(order[first:end], drawn)

    def _plan_of(self, epoch: int) -> EpochPlan:
        """The order of the blocks of an epoch. The last epoch's plan is kept."""
        key = epoch if self.shuffle else None
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, EpochPlan(self._samples, self._cut, self.seed, key))
        return self._plan[1]

    def _hold(self, number: int) -> _Held:
        """Block ``number`` and what is made of it; the last two are kept."""
        if number not in self._kept:
            while len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)
            self._kept[number] = _Held(self, number)
        self._kept.move_to_end(number)
        return self._kept[number]

    @property
    def _draws(self) -> bool:
        """Whether any negative is drawn."""
        return bool(self.negatives or self.auxiliary_negatives)

    @cached_property
    def _sampler(self) -> Negatives:
        return self.prepared.negatives()


class _Held:
    """A block, its samples of the loader's split, and their order in the last epoch that was asked for."""

    def __init__(self, loader: Loader, number: int) -> None:
        prepared = loader.prepared
        times = loader.time_gap or bool(prepared.schema.sequences)
        units = [prepared.read_unit(each, times=times) for each in loader._blocks[number]]
        fixed = None
        if not loader.training and loader.negatives:
            of_units = zip(loader._blocks[number], units, strict=True)
            fixed = np.concatenate([_fixed(loader, each, unit) for each, unit in of_units])
        unit = joined(units)
        samples = unit.samples(loader.split)
        owned = Owned(unit.offsets, unit.item, next(iter(prepared.schema.items.values())))
        if loader.repeats == "drop":
            kept = np.flatnonzero(~unit.repeated(samples))
            samples = type(samples)(*(column[kept] for column in samples))
            fixed = None if fixed is None else fixed[kept]
        self.number = number
        self.rows = Rows(
            unit,
            samples,
            fixed,
            owned,
            loader._sampler if loader._draws else None,
            item_fields=prepared.item_fields,
            max_length=loader.max_length,
            negatives=loader.negatives,
            auxiliary_negatives=loader.auxiliary_negatives,
            exclude=loader.exclude,
            share=loader.share_histories,
            time_gap=1e-6 if prepared.meta["time_unit"] == "us" else 1.0,
            with_time_gap=loader.time_gap,
            keep_missing=frozenset(prepared.meta["dense"]),
            grouped_by=loader.prepared.meta.get("grouped_by"),
        )
        self._order: tuple[int | None, Array, Array] | None = None

    def order(self, loader: Loader, epoch: int | None) -> tuple[Array, Array]:
        """The order of the samples, and of the groups of batches that it is cut into; ``epoch`` None: unshuffled."""
        if self._order is None or self._order[0] != epoch:
            generator = None if epoch is None else stream(loader.seed, epoch, self.number, ORDER)
            self._order = (epoch, *order_of(self.rows.lengths, loader._cut, loader.bucket, generator))
        return self._order[1:]


def _fixed(loader: Loader, number: int, unit: Unit) -> Array:
    """int32 [S, K]: the fixed negatives of the samples of a unit.

    Keyed by the folder's seed, the unit and the split: whatever the loader's options, the rows are the same.
    """
    prepared, users = loader.prepared, np.repeat(unit.samples(loader.split).user.astype(np.int64), loader.negatives)
    owned = Owned(unit.offsets, unit.item, next(iter(prepared.schema.items.values())))
    generator = stream(prepared.meta["options"]["seed"], 0, number, SPLITS.index(loader.split))
    return loader._sampler.draw(users, owned, generator).astype(np.int32).reshape(-1, loader.negatives)


def batch_schema(schema: Schema, time_gap: bool) -> Schema:
    """The schema of a loader's batches: that of the folder, and the number ``"time_gap"`` where that is asked for.

    Raises ``ValueError`` where the folder has a number of that name.
    """
    if not time_gap:
        return schema
    if "time_gap" in schema.behaviour_dense:
        raise ValueError("time_gap must be False where the log has a number time_gap of its own, got True")
    return replace(schema, behaviour_dense=(*schema.behaviour_dense, "time_gap"))


def _negatives(prepared: Prepared, split: str, negatives: int) -> int:
    """K: none with given labels, those of training, or those that the folder fixes for valid and test."""
    if prepared.labels == "given":
        return 0
    return negatives if split == "train" else int(prepared.meta["options"]["negatives"])


class _Batches(Dataset[Any]):
    """The batches of an epoch by number, for ``DataLoader``. What is wrong with the folder is returned, not raised: a
    worker would raise it again with its traceback for words."""

    def __init__(self, loader: Loader, epoch: int) -> None:
        self.loader, self.number = loader, epoch

    def __getitem__(self, index: int) -> Batch | ValueError:
        try:
            return self.loader.batch(self.number, index)
        except ValueError as error:
            return error
