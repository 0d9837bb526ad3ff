"""``Loader``: the samples of a prepared folder as jagged batches. Each batch is a pure function of its number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dien_kernels.batch import Batch
from dien_kernels.data._arrow import Array
from dien_kernels.data.negatives import stream
from dien_kernels.data.prepared import Prepared

_WINDOW = 64  # so many batches' worth of samples are sorted by length together
# The purposes of streams of random numbers.
_ORDER, _TARGETS, _AUXILIARY = range(3)


class Loader:
    """Batches of one split.

    With next-behaviour labels a sample is 1 + K rows that share a history: the positive, then its K
    negatives. Training draws its negatives afresh in each epoch; valid and test have those that ``prepare``
    fixed. With given labels a sample is one row. No history is longer than ``max_length``: the newest
    behaviours are kept.

    Args:
        prepared: the folder.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        batch_size: rows in a batch, at most (the last one of an epoch may be smaller): samples * (1 + K).
        max_length: behaviours of a history, at most; None: all.
        negatives: K of training with next-behaviour labels.
        auxiliary_negatives: negatives beside each behaviour, for the auxiliary loss; training only, 0 for
            none.
        shuffle: whether the order changes from epoch to epoch; None: in training only.
        seed: with the epoch and the number of the batch, all that random choices depend on.
        workers: processes that make batches; 0: the caller's. They change nothing but speed.
        bucket: whether histories of similar length come into one batch: shuffled samples are sorted by length
            in windows of 64 batches, and the batches shuffled again; without shuffling all are sorted.
        share_histories: False: every row has a history of its own (``history_of`` is None); the same rows
            otherwise.
        pin_memory: whether batches are in page-locked memory, for copies to a GPU.

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
        shuffle: bool | None = None,
        seed: int = 0,
        workers: int = 0,
        bucket: bool = True,
        share_histories: bool = True,
        pin_memory: bool = False,
    ) -> None:
        samples = prepared.split(split)
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 1),
            ("negatives", negatives, 0),
            ("auxiliary_negatives", auxiliary_negatives, 0),
            ("seed", seed, 0),
            ("workers", workers, 0),
        ):
            if name == "max_length" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
        self.prepared, self.split = prepared, split
        self.training = split == "train"
        self.max_length, self.seed, self.workers = max_length, seed, workers
        self.shuffle = self.training if shuffle is None else shuffle
        self.bucket, self.share_histories, self.pin_memory = bucket, share_histories, pin_memory
        if prepared.labels == "given":
            self.negatives = 0
        else:
            self.negatives = negatives if samples.negatives is None else samples.negatives.shape[1]
        self.auxiliary_negatives = auxiliary_negatives if self.training else 0
        self.batch_samples = batch_size // (1 + self.negatives)
        if self.batch_samples < 1:
            raise ValueError(
                f"batch_size counts rows and must be at least {1 + self.negatives}, a positive with its "
                f"{self.negatives} negatives; got {batch_size}"
            )
        self._sampler = prepared.negatives()
        self._samples = samples
        self._lengths = (samples.end - prepared.offsets[samples.user]).astype(np.int32)
        if max_length is not None:
            np.minimum(self._lengths, max_length, out=self._lengths)
        self._planned: tuple[int, Array, Array] | None = None

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return -(-self._samples.user.size // self.batch_samples)

    def steps(self, epoch: int) -> int:
        """The number of batches of an epoch: the same for all."""
        return len(self)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on, in order."""
        if not 0 <= start <= len(self):
            raise ValueError(f"start must lie between 0 and {len(self)}, got {start}")
        self._plan(epoch)  # before the workers start, so that forked ones inherit the plan
        batches = DataLoader(
            _Batches(self, epoch),
            batch_size=None,
            sampler=range(start, len(self)),
            num_workers=self.workers,
            pin_memory=self.pin_memory,
        )
        return iter(batches)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch ``index`` of an epoch: a function of the folder, the options and these two numbers."""
        if not 0 <= index < len(self):
            raise ValueError(f"index must lie between 0 and {len(self) - 1}, got {index}")
        order, batches = self._plan(epoch)
        first = int(batches[index]) * self.batch_samples
        number = order[first : first + self.batch_samples]
        samples, rows_per_sample = self._samples, 1 + self.negatives
        user, end, length = (
            samples.user[number].astype(np.int64),
            samples.end[number],
            self._lengths[number].astype(np.int64),
        )

        # The histories of the batch, and which of them each sample reads.
        history_index = np.arange(number.size)
        history_user = user
        if self.prepared.labels == "given" and self.share_histories:
            # All impressions of a user between two clicks have the same history.
            key = user * (self.prepared.behaviours.size + 1) + end
            _, first_row, history_index = np.unique(key, return_index=True, return_inverse=True)
            history_user, end, length = user[first_row], end[first_row], length[first_row]
        offsets = np.concatenate([[0], np.cumsum(length)])
        steps = np.arange(offsets[-1]) + np.repeat(end - length - offsets[:-1], length)
        history = self.prepared.behaviours[steps].astype(np.int64)
        auxiliary = self._draw_auxiliary(np.repeat(history_user, length), epoch, index)

        # The rows: each sample is a positive and its negatives, which share a history.
        target, label = self._targets(number, user, epoch, index)
        history_index = np.repeat(history_index, rows_per_sample)
        rows_total = int(length[history_index].sum())
        history_of: Array | None = history_index
        if not self.share_histories:
            length = length[history_index]
            copied = np.concatenate([[0], np.cumsum(length)])
            steps = np.arange(copied[-1]) + np.repeat(offsets[history_index] - copied[:-1], length)
            history, auxiliary, offsets, history_of = history[steps], auxiliary[steps], copied, None
        elif rows_per_sample == 1 and history_index.size == length.size and self.prepared.labels == "next":
            history_of = None
        dense = [samples.dense[name][number] for name in self.prepared.schema.dense]
        return Batch(
            history=self._fields(history),
            offsets=torch.from_numpy(offsets),
            target=self._fields(target),
            label=torch.from_numpy(label),
            history_of=None if history_of is None else torch.from_numpy(history_of),
            rows_total=rows_total,
            negatives=self._fields(auxiliary) if self.auxiliary_negatives else None,
            users={
                name: torch.from_numpy(np.repeat(ids[number].astype(np.int64), rows_per_sample))
                for name, ids in samples.users.items()
            },
            dense=torch.from_numpy(np.repeat(np.stack(dense, axis=1), rows_per_sample, axis=0)) if dense else None,
            group=torch.from_numpy(np.repeat(user, rows_per_sample)),
        )

    def _plan(self, epoch: int) -> tuple[Array, Array]:
        """The order of the samples, and the order of the batches that it is cut into. The last epoch's plan is kept."""
        key = epoch if self.shuffle else 0
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, *self._make_plan(key))
        return self._planned[1:]

    def _make_plan(self, epoch: int) -> tuple[Array, Array]:
        lengths, size = self._lengths, self._lengths.size
        batches = np.arange(len(self))
        if not self.shuffle:
            return np.argsort(lengths, kind="stable") if self.bucket else np.arange(size), batches
        generator = stream(self.seed, epoch, 0, _ORDER)
        order = generator.permutation(size)
        if self.bucket:
            window = _WINDOW * self.batch_samples
            for start in range(0, size, window):
                part = order[start : start + window]
                order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
            generator.shuffle(batches)
        return order, batches

    def _targets(self, number: Array, user: Array, epoch: int, index: int) -> tuple[Array, Array]:
        """Item and label of every row."""
        samples = self._samples
        positive = samples.target[number].astype(np.int64)
        if samples.label is not None:
            return positive, samples.label[number].astype(np.float32)
        if samples.negatives is not None:
            negative = samples.negatives[number].astype(np.int64)
        else:
            generator = stream(self.seed, epoch, index, _TARGETS)
            negative = self._sampler.draw(np.repeat(user, self.negatives), generator).reshape(-1, self.negatives)
        rows = np.concatenate([positive[:, None], negative], axis=1)
        label = np.zeros(rows.shape, np.float32)
        label[:, 0] = 1
        return rows.reshape(-1), label.reshape(-1)

    def _draw_auxiliary(self, user: Array, epoch: int, index: int) -> Array:
        """Negatives for the auxiliary loss: K for each behaviour of ``user`` [N], int64 [N, K]."""
        count = self.auxiliary_negatives
        if not count:
            return np.empty((user.size, 0), np.int64)
        drawn = self._sampler.draw(np.repeat(user, count), stream(self.seed, epoch, index, _AUXILIARY))
        return drawn.reshape(-1, count)

    def _fields(self, items: Array) -> dict[str, Tensor]:
        """Tensors of items and of all their other fields."""
        name = next(iter(self.prepared.schema.items))
        ids = {name: items} | {key: table[items] for key, table in self.prepared.item_fields.items()}
        return {key: torch.from_numpy(value) for key, value in ids.items()}


class _Batches(Dataset[Batch]):
    """The batches of an epoch by number, for ``DataLoader``."""

    def __init__(self, loader: Loader, epoch: int) -> None:
        self.loader, self.number = loader, epoch

    def __getitem__(self, index: int) -> Batch:
        return self.loader.batch(self.number, index)
