"""Requests as batches: one or several histories and the targets to be scored against them."""

from __future__ import annotations

from collections.abc import Mapping

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
) -> Batch:
    """A batch of B targets that read U histories, without labels.

    Args:
        history: item field to ids [N], oldest first, one history after another.
        targets: item field to ids [B].
        offsets: [U + 1]; None: all behaviours are one history, U = 1.
        history_of: [B], the history each target reads; None: the only one, or with U > 1 history b for target b.
        users: user field to ids [U], one for each history.
        dense: [B, F].

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
    batch = Batch(dict(history), offsets, dict(targets), history_of=history_of, rows_total=rows_total, dense=dense)
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
