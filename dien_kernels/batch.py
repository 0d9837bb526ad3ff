"""The one type that data and models share: a batch of ranking samples over jagged behaviour histories.

Room card. Lives here: ``Schema`` (which features there are) and ``Batch`` (their values). May import: torch.
Must not be here: files, sampling, parameters.

A row is one (history, target) pair. Rows that stand for one positive and its negatives, or for the candidates of one
request, read the same history through ``history_of``: models run everything that depends on the history alone once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schema:
    """The features of a data set: names and vocabulary sizes. Id 0 of every vocabulary stands for "unknown".

    Attributes:
        items: item-side fields, name to vocabulary size (ids 0 to size - 1). The first one identifies the item, the
            others (category, brand, ...) are attributes of it. Histories, targets and negatives have all of them.
        users: user-side fields of a row, name to vocabulary size.
        dense: names of float features of a row, in the order of ``Batch.dense``'s columns.
    """

    items: Mapping[str, int]
    users: Mapping[str, int] = field(default_factory=dict)
    dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("items must name at least one field, got none")
        for kind, fields in (("items", self.items), ("users", self.users)):
            for name, size in fields.items():
                if not isinstance(size, int) or size < 1:
                    raise ValueError(f"{kind}[{name!r}] must be a vocabulary size of at least 1, got {size!r}")

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON and checkpoints."""
        return {"items": dict(self.items), "users": dict(self.users), "dense": list(self.dense)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, object]) -> Schema:
        """The inverse of ``to_dict``."""
        items, users, dense = plain["items"], plain.get("users", {}), plain.get("dense", ())
        return cls(dict(items), dict(users), tuple(dense))  # type: ignore[call-overload, arg-type]


@dataclass
class Batch:
    """B rows over U histories with N behaviours in all (oldest first, one history after another).

    Attributes:
        history: item field to ids, int64 [N].
        offsets: int64 [U + 1]: history u is behaviours offsets[u] to offsets[u + 1] - 1. Empty histories are legal.
        target: item field to ids, int64 [B].
        label: float32 [B], 1 for a click; None at serving.
        history_of: int64 [B], the history each row reads; None: U = B and row b reads history b.
        rows_total: the number of (row, step) pairs, sum of the lengths of every row's history; N where ``history_of``
            is None. On the host, so that no model has to wait for a device to learn it.
        negatives: item field to ids, int64 [N, K]: K sampled negatives beside each behaviour, for the auxiliary loss;
            None where there is none (evaluation).
        users: user field to ids, int64 [B].
        dense: float32 [B, F], or None.
        group: int64 [B], a number for each user, for per-user metrics; None where it is not known.
    """

    history: dict[str, Tensor]
    offsets: Tensor
    target: dict[str, Tensor]
    label: Tensor | None = None
    history_of: Tensor | None = None
    rows_total: int = -1
    negatives: dict[str, Tensor] | None = None
    users: dict[str, Tensor] = field(default_factory=dict)
    dense: Tensor | None = None
    group: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows_total < 0:
            if self.history_of is None:
                self.rows_total = next(iter(self.history.values())).shape[0]
            else:
                self.rows_total = int(self.offsets.diff()[self.history_of].sum())

    @property
    def rows(self) -> int:
        """B."""
        return next(iter(self.target.values())).shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``function`` applied to every tensor."""

        def over(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            return {k: function(v) for k, v in value.items()} if isinstance(value, dict) else value

        return replace(self, **{name: over(value) for name, value in vars(self).items()})  # type: ignore[arg-type]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self.map(Tensor.pin_memory)

    def check(self, schema: Schema) -> None:
        """Raise ``ValueError`` naming the attribute that does not fit ``schema`` or the other attributes.

        Ids are read on the host: for entry points (serving, tests), not for the training loop. Under ``torch.compile``
        the graph asks for the values when it runs: a wrong one is a ``RuntimeError`` there, and on a CUDA device an
        assertion of the device, after which the process cannot use it.
        """
        n = next(iter(self.history.values())).shape[0] if self.history else 0
        u = self.offsets.shape[0] - 1
        rows = u if self.history_of is None else self.history_of.shape[0]
        shapes: list[tuple[str, Mapping[str, Tensor], Mapping[str, int], tuple[int, ...]]] = [
            ("history", self.history, schema.items, (n,)),
            ("target", self.target, schema.items, (rows,)),
            ("users", self.users, schema.users, (rows,)),
        ]
        if self.negatives is not None:
            k = next(iter(self.negatives.values())).shape[-1] if self.negatives else 0
            shapes.append(("negatives", self.negatives, schema.items, (n, k)))
        for name, given, wanted, shape in shapes:
            if set(given) != set(wanted):
                raise ValueError(f"{name} must have the fields {sorted(wanted)}, got {sorted(given)}")
            for key, ids in given.items():
                if ids.dtype != torch.int64 or tuple(ids.shape) != shape:
                    raise ValueError(
                        f"{name}[{key!r}] must be int64 of shape {shape}, got {ids.dtype} {tuple(ids.shape)}"
                    )
                check_range(f"{name}[{key!r}]", ids, wanted[key])
        width = 0 if self.dense is None else self.dense.shape[-1]
        if width != len(schema.dense) or (self.dense is not None and tuple(self.dense.shape) != (rows, width)):
            got = None if self.dense is None else tuple(self.dense.shape)
            raise ValueError(f"dense must have shape {(rows, len(schema.dense))}, got {got}")
        if u < 0:
            raise ValueError(f"offsets must ascend from 0 to the {n} behaviours, got []")
        # No views: torch.compile refuses some of them in inference mode.
        ascending = (self.offsets.min() == 0) & (self.offsets.max() == n) & (self.offsets.diff() >= 0).all()
        _require(
            ascending,
            "offsets must ascend from 0 to the number of behaviours",
            lambda: f"offsets must ascend from 0 to the {n} behaviours, got {self.offsets.tolist()[:8]} ...",
        )
        if self.history_of is not None:
            check_range("history_of", self.history_of, u)


def check_range(name: str, ids: Tensor, size: int) -> None:
    """Raise ``ValueError`` naming ids that are not between 0 and ``size`` - 1; see ``Batch.check``."""
    if ids.numel():
        _require(
            (ids.min() >= 0) & (ids.max() < size),
            f"{name} has a value below 0 or above the last there is",
            lambda: f"{name} must lie between 0 and {size - 1}, got values from {int(ids.min())} to {int(ids.max())}",
        )


def _require(condition: Tensor, in_a_graph: str, message: Callable[[], str]) -> None:
    """``in_a_graph`` must not name sizes, or there would be a graph for each of them."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, in_a_graph.replace('"', ""))  # inductor puts the words between such marks
    elif not bool(condition):
        raise ValueError(message())
