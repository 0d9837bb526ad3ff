"""``Rows``: samples of one unit become a ``Batch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dien_kernels.batch import Batch, Sequence
from dien_kernels.data._arrow import Array, count_before
from dien_kernels.data._plan import AUXILIARY, SEQUENCES, TARGETS
from dien_kernels.data._unit import Behaviours, Samples, Unit
from dien_kernels.data.negatives import Negatives, Owned, stream


@dataclass(frozen=True)
class Drawn:
    """The keys of the random numbers of one batch."""

    seed: int
    epoch: int
    index: int

    def stream(self, purpose: int) -> np.random.Generator:
        return stream(self.seed, self.epoch, self.index, purpose)


class Rows:
    """The samples of one unit, and how they become rows.

    Args:
        unit, samples: where they are.
        fixed: int32 [S, K], the negatives of valid and test; None: drawn for each batch, or none.
        owned: the items of the users of the unit.
        sampler: draws negatives; None where none are drawn.
        item_fields: of ``Prepared``.
        max_length, negatives, auxiliary_negatives, exclude, share, with_time_gap: options of ``Loader``.
        time_gap: seconds in a unit of time.
        keep_missing: names of numbers whose missing values stay NaN: the model knows their mean. Others become 0.
        grouped_by: the user field that is ``Batch.group``; None: the user's number.

    ``lengths`` are those of the histories that are read, int32 [S].
    """

    def __init__(
        self,
        unit: Unit,
        samples: Samples,
        fixed: Array | None,
        owned: Owned,
        sampler: Negatives | None,
        *,
        item_fields: dict[str, Array],
        max_length: int | None,
        negatives: int,
        auxiliary_negatives: int,
        exclude: str,
        share: bool,
        time_gap: float,
        with_time_gap: bool,
        keep_missing: frozenset[str],
        grouped_by: str | None = None,
    ) -> None:
        self.grouped_by = grouped_by
        self.unit, self.samples, self.fixed, self.owned, self.sampler = unit, samples, fixed, owned, sampler
        self.schema, self.item_fields, self.max_length = unit.schema, item_fields, max_length
        self.negatives, self.auxiliary_negatives = negatives, auxiliary_negatives
        self.exclude, self.share = exclude, share
        self.time_gap, self.with_time_gap, self.keep_missing = time_gap, with_time_gap, keep_missing
        self.given = unit.labels == "given"
        self.lengths = (samples.end - unit.offsets[samples.user]).astype(np.int32)
        if max_length is not None:
            np.minimum(self.lengths, max_length, out=self.lengths)
        self._owned_of = {name: Owned(s.offsets, s.item, owned.size) for name, s in unit.sequences.items()}

    def _group(self, user: Array, row: Array) -> Array:
        """The users that metrics group by: a user with several histories is several rows of a shard."""
        if self.grouped_by is not None:
            return self.unit.row_users[self.grouped_by][row].astype(np.int64)
        return self.unit.user_numbers[user]

    def batch(self, number: Array, drawn: Drawn) -> Batch:
        """The rows of the samples ``number``, int32 [S], as one batch."""
        unit, samples, each = self.unit, self.samples, 1 + self.negatives
        user, end, row = (column[number].astype(np.int64) for column in samples)
        target, label = self._targets(number, user, end, row, drawn)
        main = self._histories(unit.behaviours, user, end, self.owned, drawn.stream(AUXILIARY))
        dense = [self._numbers(name, unit.row_dense[name][row]) for name in self.schema.dense]
        return Batch(
            **main,
            target=self._fields(target),
            label=torch.from_numpy(label),
            users={
                name: torch.from_numpy(np.repeat(ids[row].astype(np.int64), each))
                for name, ids in unit.row_users.items()
            },
            dense=torch.from_numpy(np.repeat(np.stack(dense, axis=1), each, axis=0)) if dense else None,
            group=torch.from_numpy(np.repeat(self._group(user, row), each)),
            **self._sequences(user, row, drawn),
        )

    def _sequences(self, user: Array, row: Array, drawn: Drawn) -> dict[str, Any]:
        """The further sequences of the samples, up to the time of each target."""
        if not self.unit.sequences:
            return {}
        found: dict[str, Any] = {}
        generator = drawn.stream(SEQUENCES)
        for name, sequence in self.unit.sequences.items():
            end = count_before(sequence.offsets, sequence.time, user, self.unit.row_time[row])
            found[name] = Sequence(**self._histories(sequence, user, end, self._owned_of[name], generator))
        return {"sequences": found}

    def _histories(
        self, part: Behaviours, user: Array, end: Array, owned: Owned, generator: np.random.Generator
    ) -> dict[str, Any]:
        """The newest behaviours of ``user`` [S] before the places ``end`` [S], and which row reads which of them."""
        each = 1 + self.negatives
        history_index = np.arange(user.size)
        if self.given and self.share:
            # All impressions of a user between two clicks have the same history.
            _, first, history_index = np.unique(
                user * (part.item.size + 1) + end, return_index=True, return_inverse=True
            )
            user, end = user[first], end[first]
        length = end - part.offsets[user]
        if self.max_length is not None:
            length = np.minimum(length, self.max_length)
        offsets = np.concatenate([[0], np.cumsum(length)])
        steps = np.arange(offsets[-1]) + np.repeat(end - length - offsets[:-1], length)
        auxiliary = self._draw_auxiliary(np.repeat(user, length), np.repeat(end, length), owned, generator)
        history_of: Array | None = np.repeat(history_index, each)
        rows_total = int(length[history_of].sum())
        if not self.share:
            length = length[history_of]
            copied = np.concatenate([[0], np.cumsum(length)])
            taken = np.arange(copied[-1]) + np.repeat(offsets[history_of] - copied[:-1], length)
            steps, auxiliary, offsets, history_of = steps[taken], auxiliary[taken], copied, None
        elif each == 1 and not self.given:
            history_of = None
        found: dict[str, Any] = {
            "history": self._fields(part.item[steps].astype(np.int64)),
            "offsets": torch.from_numpy(offsets),
            "history_of": None if history_of is None else torch.from_numpy(history_of),
            "rows_total": rows_total,
            "negatives": self._fields(auxiliary) if self.auxiliary_negatives else None,
        }
        if part.fields:
            found["behaviours"] = {
                name: torch.from_numpy(ids[steps].astype(np.int64)) for name, ids in part.fields.items()
            }
        numbers = [self._numbers(name, values[steps]) for name, values in part.numbers.items()]
        if self.with_time_gap:
            numbers.append(self._gaps(part, steps))
        if numbers:
            found["behaviour_dense"] = torch.from_numpy(np.stack(numbers, axis=1))
        return found

    def _gaps(self, part: Behaviours, steps: Array) -> Array:
        """float32 [N]: log(1 + seconds since the behaviour before), 0 for the first of a user."""
        before = np.maximum(steps - 1, 0)
        seconds = (part.time[steps] - part.time[before]) * self.time_gap
        first = np.zeros(part.item.size + 1, bool)
        first[part.offsets] = True
        seconds[first[steps]] = 0
        gaps: Array = np.log1p(seconds).astype(np.float32)
        return gaps

    def _numbers(self, name: str, values: Array) -> Array:
        """float32 [n]: missing values stay NaN where the model knows what stands for them, and are 0 otherwise."""
        if name in self.keep_missing:
            return values
        known: Array = np.where(np.isnan(values), np.float32(0), values)
        return known

    def _targets(self, number: Array, user: Array, end: Array, row: Array, drawn: Drawn) -> tuple[Array, Array]:
        """Item and label of every row."""
        positive = self.unit.row_item[row].astype(np.int64)
        if self.unit.row_label is not None:
            return positive, self.unit.row_label[row].astype(np.float32)
        if self.fixed is not None:
            negative = self.fixed[number].astype(np.int64)
        else:
            repeated = np.repeat(user, self.negatives)
            negative = self._draw(repeated, np.repeat(end, self.negatives), self.owned, drawn.stream(TARGETS))
            negative = negative.reshape(-1, self.negatives)
        rows = np.concatenate([positive[:, None], negative], axis=1)
        label = np.zeros(rows.shape, np.float32)
        label[:, 0] = 1
        return rows.reshape(-1), label.reshape(-1)

    def _draw_auxiliary(self, user: Array, end: Array, owned: Owned, generator: np.random.Generator) -> Array:
        """Negatives for the auxiliary loss: K for each of N behaviours, int64 [N, K]."""
        count = self.auxiliary_negatives
        if not count:
            return np.empty((user.size, 0), np.int64)
        return self._draw(np.repeat(user, count), np.repeat(end, count), owned, generator).reshape(-1, count)

    def _draw(self, user: Array, end: Array, owned: Owned, generator: np.random.Generator) -> Array:
        """int64 [n]: a negative for each of ``user``, whose sample's history ends at ``end``."""
        if self.exclude == "history" and not self.given and owned is self.owned:
            end = end + 1  # the target is the behaviour that follows
        return cast(Negatives, self.sampler).draw(
            user,
            None if self.exclude == "none" else owned,
            generator,
            end if self.exclude == "history" else None,
        )

    def _fields(self, items: Array) -> dict[str, Tensor]:
        """Tensors of items and of all their other fields."""
        name = next(iter(self.schema.items))
        ids = {name: items} | {key: table[items] for key, table in self.item_fields.items()}
        return {key: torch.from_numpy(value) for key, value in ids.items()}
