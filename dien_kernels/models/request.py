"""Requests as batches: one or several histories and the targets to be scored against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dien_kernels.batch import Batch, check_mapping, count_histories, count_ids
from dien_kernels.checks import check_tensor


def candidates(
    history: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    offsets: Tensor | None = None,
    history_of: Tensor | None = None,
    users: Mapping[str, Tensor] | None = None,
    dense: Tensor | None = None,
    behaviours: Mapping[str, Tensor] | None = None,
    behaviour_dense: Tensor | None = None,
) -> Batch:
    """A batch of B targets that read U histories, without labels.

    Args:
        history: item field to ids [N], oldest first, one history after another.
        targets: item field to ids [B].
        offsets: [U + 1]; None: all behaviours are one history, U = 1.
        history_of: [B], the history each target reads; None: the only one, or with U > 1 history b for target b.
        users: user field to ids [U], one for each history.
        dense: [B, F].
        behaviours: field of behaviours to ids [N], aligned with ``history``; None for a schema without such fields.
        behaviour_dense: float32 [N, G], aligned with ``history``; None for a schema without numbers of behaviours.

    All indices are int64. Raises ``ValueError`` where ``history_of`` is needed and missing, or out of range;
    ``TypeError`` or ``ValueError`` naming an argument of which no batch can be made. ``Batch.check``, which ``score``
    calls, looks at every value.

    >>> batch = candidates({"item": torch.tensor([3, 1, 4])}, {"item": torch.tensor([7, 8])})
    >>> batch.history_of, batch.rows_total
    (tensor([0, 0]), 6)
    """
    rows, steps = count_ids("targets", targets), count_ids("history", history)
    if offsets is None:
        offsets = torch.tensor([0, steps])
    histories = count_histories(offsets)
    rows_total = -1  # Batch counts them itself
    if history_of is None:
        if histories not in (1, rows):
            raise ValueError(f"history_of must be given for {rows} targets of {histories} histories, got None")
        if histories != rows:
            history_of, rows_total = torch.zeros(rows, dtype=torch.int64), rows * steps
    more: dict[str, Any] = {}
    if behaviours is not None:
        check_mapping("behaviours", behaviours)
        more["behaviours"] = dict(behaviours)
    if behaviour_dense is not None:
        more["behaviour_dense"] = behaviour_dense
    batch = Batch(
        dict(history), offsets, dict(targets), history_of=history_of, rows_total=rows_total, dense=dense, **more
    )
    users = {} if users is None else users
    check_mapping("users", users)
    for name, ids in users.items():
        check_tensor(f"users[{name!r}]", ids)
        if tuple(ids.shape) != (histories,):
            raise ValueError(
                f"users[{name!r}] must have an id for each of {histories} histories, got {tuple(ids.shape)}"
            )
        batch.users[name] = ids if history_of is None else ids[history_of]
    return batch


STEPS = 1 << 18  # of rows that are scored at a time; a model takes some 400 bytes for each
_OF_A_ROW = 8  # the memory of a row itself, in steps
_EVEN = 64  # blocks are multiples of so many rows, where a matrix product treats every row alike


def blocks(batch: Batch, block: int | None) -> Iterator[Batch]:
    """The rows of a checked batch in their order, some at a time, each block with the histories that it reads.

    Args:
        batch: B rows; labels, groups, weights and negatives are left out.
        block: the rows of a block; None: as many as have ``STEPS`` steps together, and at least one.

    A block is made when it is asked for; a batch that is one block is passed on as it is.
    """
    rows = batch.rows
    if rows <= (block or rows) and (block is not None or batch.rows_total + _OF_A_ROW * rows <= STEPS):
        yield batch
        return
    if block is not None:
        cuts = [*range(0, rows, block), rows]
    else:
        lengths = batch.offsets.diff()
        if batch.history_of is not None:
            lengths = lengths[batch.history_of]
        cost, cuts = (lengths + _OF_A_ROW).cumsum(0).cpu(), [0]
        while cuts[-1] < rows:
            first = cuts[-1]
            spent = int(cost[first - 1]) if first else 0
            last = max(int(torch.searchsorted(cost, spent + STEPS, right=True)), first + 1)
            cuts.append(last if last == rows or last - first < _EVEN else last - (last - first) % _EVEN)
    for first, last in zip(cuts, cuts[1:], strict=False):
        yield _rows(batch, first, last)


def _rows(batch: Batch, first: int, last: int) -> Batch:
    """Rows ``first`` to ``last`` - 1, and of the histories only those that they read."""
    history_of, offsets = batch.history_of, batch.offsets
    source: Tensor | slice = slice(None)
    if history_of is None:
        offsets = offsets[first : last + 1]
        source = slice(int(offsets[0]), int(offsets[-1]))
        offsets, rows_total = offsets - offsets[0], source.stop - source.start
    else:
        which, history_of = torch.unique(history_of[first:last], return_inverse=True)
        lengths, starts = offsets.diff()[which], offsets[which]
        rows_total = int(lengths[history_of].sum())
        if which.shape[0] < offsets.shape[0] - 1:
            offsets = torch.cat([offsets.new_zeros(1), lengths.cumsum(0)])
            shift = torch.repeat_interleave(starts - offsets[:-1], lengths)
            source = shift + torch.arange(shift.shape[0], device=shift.device)
    more: dict[str, Any] = {}
    for name in ("behaviours", "behaviour_dense"):  # only where the schema has them
        values = getattr(batch, name, None)
        if values is not None:
            more[name] = {k: v[source] for k, v in values.items()} if isinstance(values, dict) else values[source]
    return Batch(
        {name: ids[source] for name, ids in batch.history.items()},
        offsets,
        {name: ids[first:last] for name, ids in batch.target.items()},
        history_of=history_of,
        rows_total=rows_total,
        users={name: ids[first:last] for name, ids in batch.users.items()},
        dense=None if batch.dense is None else batch.dense[first:last],
        **more,
    )
