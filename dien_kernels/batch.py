"""The one type that data and models share: a batch of ranking samples over jagged behaviour histories.

Room card. Lives here: ``Schema`` (which features there are), ``Batch`` and ``Sequence`` (their values). May import:
torch, ``histories``. Must not be here: files, sampling, parameters.

A row is one (history, target) pair. Rows that stand for one positive and its negatives, or for the candidates of one
request, read the same history through ``history_of``: models run everything that depends on the history alone once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from dien_kernels.checks import bounds, check_index, check_tensor
from dien_kernels.histories import Histories


@dataclass(frozen=True)
class Schema:
    """The features of a data set: names and vocabulary sizes. Id 0 of every vocabulary stands for "unknown".

    Attributes:
        items: item-side fields, name to vocabulary size (ids 0 to size - 1). The first one identifies the item, the
            others (category, brand, ...) are attributes of it. Histories, targets and negatives have all of them.
        users: user-side fields of a row, name to vocabulary size.
        dense: names of float features of a row, in the order of ``Batch.dense``'s columns.
        several: item fields that have several values (the genres of a film), name to the largest number of values of
            an item; every name is one of ``items`` and not its first. Ids of such a field have one dimension more, of
            this size; 0 stands where an item has fewer values.
        behaviours: categorical fields of a behaviour itself and not of its item (action, page, device), name to
            vocabulary size. Histories alone have them; targets and negatives have not happened yet.
        behaviour_dense: names of numbers of a behaviour (dwell time, rating), in the order of the columns of
            ``Batch.behaviour_dense``.
        sequences: names of further sequences of a user (purchases beside clicks). Each has all fields of the items and
            of the behaviours.
    """

    items: Mapping[str, int]
    users: Mapping[str, int] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    several: Mapping[str, int] = field(default_factory=dict)
    behaviours: Mapping[str, int] = field(default_factory=dict)
    behaviour_dense: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("items must name at least one field, got none")
        for name in self.several:
            if name not in list(self.items)[1:]:
                raise ValueError(f"several must name fields of items after the first, got {name!r}")
        for kind, sizes in (
            ("items", self.items),
            ("users", self.users),
            ("several", self.several),
            ("behaviours", self.behaviours),
        ):
            for name, size in sizes.items():
                if not isinstance(size, int) or size < 1:
                    raise ValueError(f"{kind}[{name!r}] must be a size of at least 1, got {size!r}")

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON and checkpoints."""
        plain: dict[str, object] = {"items": dict(self.items), "users": dict(self.users), "dense": list(self.dense)}
        further = {
            "several": dict(self.several),
            "behaviours": dict(self.behaviours),
            "behaviour_dense": list(self.behaviour_dense),
            "sequences": list(self.sequences),
        }
        return plain | {name: value for name, value in further.items() if value}

    @classmethod
    def from_dict(cls, plain: Mapping[str, object]) -> Schema:
        """The inverse of ``to_dict``."""
        given: dict[str, Any] = {"items": dict(plain["items"])}  # type: ignore[call-overload]
        given |= {name: dict(plain.get(name, {})) for name in ("users", "several", "behaviours")}  # type: ignore[call-overload]
        given |= {name: tuple(plain.get(name, ())) for name in ("dense", "behaviour_dense", "sequences")}  # type: ignore[arg-type]
        return cls(**given)


_Made = tuple[Tensor, "Tensor | None", int, Histories]


class _Steps:
    """Behaviours of U histories, which the rows of a batch read: what ``Batch`` and ``Sequence`` have in common."""

    history: dict[str, Tensor]
    offsets: Tensor
    history_of: Tensor | None
    rows_total: int
    negatives: dict[str, Tensor] | None
    behaviours: dict[str, Tensor]
    behaviour_dense: Tensor | None
    _histories: _Made | None

    def __post_init__(self) -> None:
        if self.rows_total < 0:
            if self.history_of is None:
                self.rows_total = count_ids("history", self.history)
            else:
                self._check_layout()
                self.rows_total = self.histories.count_rows_total(name="history_of")
                self._histories = None  # it did not know the number

    @property
    def histories(self) -> Histories:
        """The layout of the behaviours, made once (in a graph that torch.compile makes, at every use).

        Index tensors of int32 are widened. Raises ``TypeError`` or ``ValueError`` naming ``offsets`` or ``history_of``
        where one of them is no index tensor; values are not read.
        """
        if torch.compiler.is_compiling():
            return self._make_histories()
        source = (self.offsets, self.history_of, self.rows_total)
        made = self._histories
        if made is None or made[0] is not source[0] or made[1] is not source[1] or made[2] != source[2]:
            made = self._histories = (*source, self._make_histories())
        return made[3]

    def _make_histories(self) -> Histories:
        offsets = check_index("offsets", self.offsets, "[U + 1]")
        history_of = None if self.history_of is None else check_index("history_of", self.history_of, "[B]")
        return Histories(None, offsets, history_of, None, self.rows_total).trusted()

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The value with ``function`` applied to every tensor, those of further sequences included."""

        def over(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, dict):
                return {k: v.map(function) if isinstance(v, Sequence) else function(v) for k, v in value.items()}
            return value

        changed = {f.name: over(getattr(self, f.name)) for f in fields(self) if f.init}  # type: ignore[arg-type]
        return replace(self, **changed)  # type: ignore[type-var]

    def _is_on(self, device: torch.device) -> bool:
        for ids in (self.history, self.negatives or {}, self.behaviours):
            for tensor in ids.values():
                if tensor.device != device:
                    return False
        others = (self.offsets, self.history_of, self.behaviour_dense)
        return all([tensor is None or tensor.device == device for tensor in others])

    def _check_layout(self) -> None:
        """Types, dtypes and ranks of the tensors that ``histories`` is made of."""
        count_histories(self.offsets)
        if self.history_of is not None:
            check_int64("history_of", self.history_of, "[B]")

    def _check_steps(self, schema: Schema, n: int) -> None:
        """Raise where fields and numbers of the N = ``n`` behaviours, or their negatives, do not fit ``schema``."""
        _check_ids("history", self.history, schema.items, (n,), schema.several)
        if self.behaviours or schema.behaviours:
            _check_ids("behaviours", self.behaviours, schema.behaviours, (n,))
        if self.behaviour_dense is not None or schema.behaviour_dense:
            _check_numbers("behaviour_dense", self.behaviour_dense, (n, len(schema.behaviour_dense)))
        if self.negatives is not None:
            count_ids("negatives", self.negatives)
            first = next(iter(self.negatives.values()))
            k = first.shape[1] if first.dim() > 1 else 1
            if k < 1:  # the auxiliary loss refuses it, too
                raise ValueError("negatives must be None or K >= 1 beside each behaviour, got K = 0")
            _check_ids("negatives", self.negatives, schema.items, (n, k), schema.several)

    def _check_histories(self, n: int) -> None:
        """Raise where the values of ``offsets``, ``history_of`` and ``rows_total`` do not fit N = ``n`` behaviours."""
        histories = self.histories
        histories.check_values(total=n, name="history_of")
        if self.history_of is not None:
            histories.check_steps_of_rows(self.rows_total)
        elif not torch.compiler.is_compiling() and self.rows_total != n:  # in a graph N would become a constant
            raise ValueError(f"rows_total must be {n}, the steps of every row's history, got {self.rows_total}")


@dataclass
class Sequence(_Steps):
    """A further sequence of behaviours that the rows of a ``Batch`` read, beside its ``history``: purchases, say.

    Attributes are those of ``Batch`` with the same names, for the behaviours of this sequence: ``history``, the item
    fields, int64 [N]; ``offsets``, int64 [U + 1]; ``history_of``, int64 [B], or None where U = B; ``rows_total``;
    ``negatives``, int64 [N, K], or None where this sequence adds nothing to the auxiliary loss; ``behaviours``, int64
    [N]; ``behaviour_dense``, float32 [N, D]. N, U and K are this sequence's own, B is that of the batch. So is the
    layout ``histories``.
    """

    history: dict[str, Tensor]
    offsets: Tensor
    history_of: Tensor | None = None
    rows_total: int = -1
    negatives: dict[str, Tensor] | None = None
    behaviours: dict[str, Tensor] = field(default_factory=dict)
    behaviour_dense: Tensor | None = None
    _histories: _Made | None = field(default=None, init=False, repr=False, compare=False)

    def check(self, schema: Schema, rows: int) -> None:
        """Raise as ``Batch.check`` does, for a batch of B = ``rows`` rows."""
        n = count_ids("history", self.history)
        self._check_layout()
        if self.histories.rows() != rows:
            name = "offsets" if self.history_of is None else "history_of"
            raise ValueError(f"{name} must be of {rows} rows, those of the batch, got {self.histories.rows()}")
        self._check_steps(schema, n)
        self._check_histories(n)


@dataclass
class Batch(_Steps):
    """B rows over U histories with N behaviours in all (oldest first, one history after another).

    Attributes:
        history: item field to ids, int64 [N]; [N, M] for a field with up to M values (``Schema.several``), 0 where an
            item has fewer.
        offsets: int64 [U + 1]: history u is behaviours offsets[u] to offsets[u + 1] - 1. Empty histories are legal.
        target: item field to ids, int64 [B], or [B, M].
        label: float32 [B], 1 for a click; None at serving.
        history_of: int64 [B], the history each row reads; None: U = B and row b reads history b.
        rows_total: the number of (row, step) pairs, sum of the lengths of every row's history; N where ``history_of``
            is None. On the host, so that no model has to wait for a device to learn it.
        negatives: item field to ids, int64 [N, K], or [N, K, M]: K >= 1 sampled negatives beside each behaviour, for
            the auxiliary loss; None where there is none (evaluation).
        users: user field to ids, int64 [B].
        dense: float32 [B, F], or None. NaN stands for a value that is missing.
        group: int64 [B], a number for each user, for per-user metrics; None where it is not known.
        weight: float32 [B], finite and at least 0: how much each row counts in the training loss; None: all alike.
        behaviours: field of a behaviour itself (``Schema.behaviours``) to ids, int64 [N].
        behaviour_dense: float32 [N, D], the numbers of a behaviour (``Schema.behaviour_dense``), or None. NaN stands
            for a value that is missing.
        sequences: name to ``Sequence``, the further sequences of the same rows (``Schema.sequences``).

    ``histories`` is the layout of the behaviours as one value: ``offsets``, ``history_of`` and ``rows_total``. It is
    made at the first use and serves every op that reads the batch. The tensors must not be changed afterwards.

    Raises ``TypeError`` or ``ValueError`` naming an attribute from which ``rows_total`` cannot be made, where that is
    not given; ``check`` looks at all of them.
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
    weight: Tensor | None = None
    behaviours: dict[str, Tensor] = field(default_factory=dict)
    behaviour_dense: Tensor | None = None
    sequences: dict[str, Sequence] = field(default_factory=dict)
    _histories: _Made | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """B."""
        return count_ids("target", self.target)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device: the batch itself where it is there already."""
        if self._is_on(torch.device(device)):
            return self
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def _is_on(self, device: torch.device) -> bool:
        for ids in (self.target, self.users):
            for tensor in ids.values():
                if tensor.device != device:
                    return False
        others = (self.label, self.dense, self.group, self.weight)
        on = super()._is_on(device) and all([tensor is None or tensor.device == device for tensor in others])
        return on and (not self.sequences or all([each._is_on(device) for each in self.sequences.values()]))

    def pin_memory(self) -> Batch:
        return self.map(Tensor.pin_memory)

    def check(self, schema: Schema) -> None:
        """Raise ``ValueError`` naming the attribute that does not fit ``schema`` or the other attributes, ``TypeError``
        for one of another type.

        Ids are read on the host: for entry points (serving, tests), not for the training loop. Under ``torch.compile``
        the graph asks for the values when it runs: a wrong one is a ``RuntimeError`` there, and on a CUDA device an
        assertion of the device, after which the process cannot use it. ``rows_total`` is not compared in a graph.
        """
        n = count_ids("history", self.history)
        self._check_layout()
        rows = self.histories.rows()
        self._check_steps(schema, n)
        _check_ids("target", self.target, schema.items, (rows,), schema.several)
        _check_ids("users", self.users, schema.users, (rows,))
        if self.label is not None:
            _check_values("label", self.label, torch.float32, (rows,))
        if self.group is not None:
            _check_values("group", self.group, torch.int64, (rows,))
        if self.weight is not None:
            _check_values("weight", self.weight, torch.float32, (rows,))
            fits = ((self.weight >= 0) & (self.weight < float("inf"))).all()
            if torch.compiler.is_compiling():
                torch._assert_async(fits, "weight must be finite and at least 0")
            elif not bool(fits):
                raise ValueError(f"weight must be finite and at least 0, got {self.weight.tolist()[:8]} ...")
        if self.dense is not None or schema.dense:
            _check_numbers("dense", self.dense, (rows, len(schema.dense)))
        self._check_histories(n)
        if self.sequences or schema.sequences:
            self._check_sequences(schema, rows)

    def _check_sequences(self, schema: Schema, rows: int) -> None:
        if not isinstance(self.sequences, Mapping):
            raise TypeError(f"sequences must be a mapping of names to Sequence, got {type(self.sequences).__name__}")
        if set(self.sequences) != set(schema.sequences):
            raise ValueError(f"sequences must have the names {sorted(schema.sequences)}, got {sorted(self.sequences)}")
        for name, sequence in self.sequences.items():
            if not isinstance(sequence, Sequence):
                raise TypeError(f"sequences[{name!r}] must be a Sequence, got {type(sequence).__name__}")
            if torch.compiler.is_compiling():
                sequence.check(schema, rows)
                continue
            try:
                sequence.check(schema, rows)
            except (TypeError, ValueError) as error:
                raise type(error)(f"sequences[{name!r}].{error}") from None


def check_mapping(name: str, fields: Any) -> None:
    """Raise ``TypeError`` naming what is not a mapping."""
    if type(fields) is not dict and not isinstance(fields, Mapping):  # the second question is slow
        raise TypeError(f"{name} must be a mapping of fields to tensors, got {type(fields).__name__}")


def check_int64(name: str, ids: Any, shape: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` naming what is not a one-dimensional tensor of int64.

    Sizes are put into words only after a check has failed: before, that would freeze them in compiled graphs.
    """
    check_tensor(name, ids)
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"{name} must be {torch.int64} of shape {shape}, got {ids.dtype} {tuple(ids.shape)}")


def count_histories(offsets: Tensor) -> int:
    """U, by the shape of ``offsets``; raises as ``check_int64`` does."""
    check_int64("offsets", offsets, "[U + 1]")
    if offsets.shape[0] < 1:
        raise ValueError("offsets must ascend from 0 to the number of behaviours, got []")
    return offsets.shape[0] - 1


def count_ids(name: str, fields: Mapping[str, Tensor]) -> int:
    """The length of the first of ``fields``; raises ``TypeError`` or ``ValueError`` where there is none."""
    check_mapping(name, fields)
    if not fields:
        raise ValueError(f"{name} must have at least one field, got none")
    key, ids = next(iter(fields.items()))
    check_tensor(f"{name}[{key!r}]", ids)
    if ids.dim() < 1:
        raise ValueError(f"{name}[{key!r}] must have at least one dimension, got a scalar")
    return ids.shape[0]


def _check_ids(
    name: str,
    given: Any,
    wanted: Mapping[str, int],
    shape: tuple[int, ...],
    several: Mapping[str, int] | None = None,
) -> None:
    """Raise where ids do not have the fields ``wanted`` (to vocabulary sizes), ``shape``, or values in range."""
    check_mapping(name, given)
    if given.keys() != wanted.keys():
        raise ValueError(f"{name} must have the fields {sorted(wanted)}, got {sorted(given)}")
    for key, ids in given.items():
        values = several.get(key) if several else None
        where = f"{name}[{key!r}]"
        _check_values(where, ids, torch.int64, shape if values is None else (*shape, values))
        check_range(where, ids, wanted[key])


def _check_numbers(name: str, numbers: Any, shape: tuple[int, int]) -> None:
    """Raise where ``numbers`` are not of ``shape``; None is right for no columns."""
    if numbers is not None:
        check_tensor(name, numbers)
    if (shape[1] > 0) if numbers is None else tuple(numbers.shape) != shape:
        got = None if numbers is None else tuple(numbers.shape)
        raise ValueError(f"{name} must have shape {shape}, got {got}")
    if numbers is not None and not numbers.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype, as {torch.float32}, got {numbers.dtype}")


def _check_values(name: str, values: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_tensor(name, values)
    if values.dtype != dtype or tuple(values.shape) != shape:
        raise ValueError(f"{name} must be {dtype} of shape {shape}, got {values.dtype} {tuple(values.shape)}")


def check_range(name: str, ids: Tensor, size: int) -> None:
    """Raise ``ValueError`` naming ids that are not between 0 and ``size`` - 1; see ``Batch.check``."""
    if not ids.numel():
        return
    if torch.compiler.is_compiling():
        words = f"{name} has a value below 0 or above the last there is"  # no sizes, or each would have its graph
        # Inductor puts the words between quotation marks.
        torch._assert_async((ids.min() >= 0) & (ids.max() < size), words.replace('"', ""))
        return
    low, high = bounds(ids)
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie between 0 and {size - 1}, got values from {low} to {high}")
