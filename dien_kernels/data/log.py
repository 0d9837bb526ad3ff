"""What every reader returns: a log as a stream of record batches with standard columns, and its bad lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

RESERVED = ("user", "item", "timestamp", "label")
# The usual column names, which are tried in this order where the caller names no column.
ALIASES = {
    "user": ("user", "user_id", "userId", "uid"),
    "item": ("item", "item_id", "itemId", "iid"),
    "timestamp": ("timestamp", "time", "ts"),
    "label": ("label", "click"),
    "category": ("category", "category_id", "categoryId", "cate_id"),
}


@dataclass(frozen=True)
class Columns:
    """Which column of a Parquet or CSV file plays which role; None: the first usual name that is there.

    Attributes:
        user, item, timestamp: column names; usual names are ``user``, ``user_id``, ... (``ALIASES``).
        label: 0/1 column, read for labels "given" only.
        item_fields: further item-side fields, names of columns or a mapping of field name to column. None:
            ``category`` where a column of that kind is there.
        user_fields: user-side fields of a row, likewise; None: none. They are categorical.
        dense: float columns of a row, likewise. Missing values become 0.
    """

    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    label: str | None = None
    item_fields: Sequence[str] | Mapping[str, str] | None = None
    user_fields: Sequence[str] | Mapping[str, str] = ()
    dense: Sequence[str] | Mapping[str, str] = ()

    @classmethod
    def of(cls, given: Columns | Mapping[str, object] | None) -> Columns:
        """Columns from a mapping, such as a part of a configuration file."""
        if given is None or isinstance(given, Columns):
            return given or cls()
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"columns must be given for {known}, got {name!r}")
        return cls(**given)  # type: ignore[arg-type]

    def resolve(self, names: Sequence[str], labelled: bool, where: str) -> Roles:
        """The roles of the columns ``names`` of ``where``. Raises ``ValueError`` naming what is missing."""

        def one(role: str, given: str | None) -> str:
            if given is not None:
                return given
            for alias in ALIASES[role]:
                if alias in names:
                    return alias
            raise ValueError(f"{where} has no {role} column (one of {ALIASES[role]}); it has {list(names)}")

        roles = Roles(one("user", self.user), one("item", self.item), one("timestamp", self.timestamp))
        if len({roles.user, roles.item, roles.timestamp}) < 3:
            given = f"{roles.user!r}, {roles.item!r} and {roles.timestamp!r}"
            raise ValueError(f"user, item and timestamp must be three columns of {where}, got {given}")
        if labelled:
            roles.label = one("label", self.label)
        if self.item_fields is None:
            found = [("category", alias) for alias in ALIASES["category"] if alias in names]
            roles.item_fields = dict(found[:1])
        else:
            roles.item_fields = _named(self.item_fields)
        roles.user_fields, roles.dense = _named(self.user_fields), _named(self.dense)
        taken = list(RESERVED)
        for name in (*roles.item_fields, *roles.user_fields, *roles.dense):
            if name in taken:
                raise ValueError(f"field {name!r} is named twice, or like one of {RESERVED}: map it to another name")
            if not name or "/" in name or "\0" in name:
                raise ValueError(f"field {name!r} must have a name that a file can have: map it to another name")
            taken.append(name)
        missing = [column for column in roles.standard().values() if column not in names]
        if missing:
            raise ValueError(f"{where} has no column {', '.join(map(repr, missing))}; it has {list(names)}")
        for column in roles.standard().values():
            if list(names).count(column) > 1:
                raise ValueError(f"{where} has several columns {column!r}; it has {list(names)}")
        return roles


def _named(given: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(given, str):
        raise ValueError(f"fields must be a list of columns or a mapping of names to columns, got {given!r}")
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"fields must be a list of columns or a mapping of names to columns, got {given!r}")
    return {name: name for name in given}


@dataclass
class Roles:
    """Which column of a file plays which role: maps roles and field names to column names."""

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    label: str | None = None
    item_fields: dict[str, str] = field(default_factory=dict)
    user_fields: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)

    def standard(self) -> dict[str, str]:
        """All roles and fields in one mapping of standard name to column name."""
        base = {"user": self.user, "item": self.item, "timestamp": self.timestamp}
        if self.label is not None:
            base["label"] = self.label
        return base | self.item_fields | self.user_fields | self.dense


class BadLines:
    """Counts lines that cannot be used, remembers the first ones, and stops the reading at a limit."""

    def __init__(self, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"max_bad_lines must be an integer and not be negative, got {limit!r}")
        self.limit, self.count = limit, 0
        self.first: list[str] = []

    def add(self, path: Path | str, line: int, reason: str) -> None:
        """Count a line (from 1). Raises ``ValueError`` with the first ones when they exceed the limit."""
        self.count += 1
        if len(self.first) < 10:
            self.first.append(f"{Path(path).name}:{line}: {reason}")
        if self.count > self.limit:
            raise ValueError(
                f"more than max_bad_lines={self.limit} lines cannot be read; the first ones:\n  "
                + "\n  ".join(self.first)
            )


@dataclass
class Log:
    """A log that can be read once, from start to end.

    Attributes:
        item_fields, user_fields, dense: names of the columns beside user, item and timestamp.
        labelled: whether there is a column ``label`` (0 or 1).
        read: the stream: record batches with user, item (int64 or string), timestamp (int64 or float64),
            label (int8), the fields (int64 or string, null where not known) and dense columns (float32), all
            else not null.
        total: amount of input, in bytes (rows for a table), for progress bars.
        advance: set by who shows progress; readers call it with the amount read since the last call.
    """

    item_fields: tuple[str, ...]
    user_fields: tuple[str, ...]
    dense: tuple[str, ...]
    labelled: bool
    read: Callable[[], Iterator[pa.RecordBatch]]
    total: int
    bad: BadLines
    advance: Callable[[int], object] = lambda _: None
    behaviour_fields: tuple[str, ...] = ()
    behaviour_dense: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()
    time_unit: str = "number"
    seen: dict[str, object] = field(default_factory=dict)
    missing_dense: int = 0

    @classmethod
    def of(cls, roles: Roles, read: Callable[[], Iterator[pa.RecordBatch]], total: int, bad: BadLines) -> Log:
        names = tuple(roles.item_fields), tuple(roles.user_fields), tuple(roles.dense)
        return cls(*names, roles.label is not None, read, total, bad)

    def standardise(
        self, columns: Mapping[str, pa.Array], path: Path | str, line_of: Callable[[int], int]
    ) -> pa.RecordBatch:
        """A record batch from columns by standard name; rows that cannot be used are counted and dropped.

        Args:
            columns: Arrow arrays of one length by the names in the log's ``Roles``, with null where a value is
                missing: user, item and fields are int64 or string; timestamp is integers, floats or Arrow times;
                label (only of a log that has labels) and dense columns are numbers.
            path: the file, for messages.
            line_of: gives the line (or row, from 1) in the file of a row of the columns.

        Raises:
            ValueError: the names are not those of the roles, a column is no Arrow array or of another type, or too
                many lines are bad.
        """
        self._check_columns(columns, path)
        columns = dict(columns)
        columns["timestamp"] = _timestamps(columns["timestamp"], path)
        reasons = {name: columns[name].is_null() for name in ("user", "item", "timestamp")}
        if self.labelled:
            columns["label"], reasons["label"] = _labels(columns["label"], path)
        for name in self.dense:
            columns[name] = self._dense(name, columns[name], path)
        wrong = np.zeros(len(columns["user"]), bool)
        for mask in reasons.values():
            wrong |= np.asarray(mask)
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        if not wrong.any():
            return batch
        for row in np.flatnonzero(wrong).tolist():
            name = next(name for name, mask in reasons.items() if mask[row].as_py())
            self.bad.add(path, line_of(row), f"no valid {name}")
        return batch.filter(pa.array(~wrong))

    def _check_columns(self, columns: Mapping[str, pa.Array], path: Path | str) -> None:
        wanted = ["user", "item", "timestamp", *["label"] * self.labelled]
        wanted += [*self.item_fields, *self.user_fields, *self.dense]
        if columns.keys() != set(wanted):
            raise ValueError(f"{path}: the reader gives the columns {list(columns)}, but its Roles name {wanted}")
        for name, column in columns.items():
            if not isinstance(column, pa.Array):
                raise ValueError(
                    f"{path}: column {name!r} must be an Arrow array (pa.array), got {type(column).__name__}"
                )

    def _dense(self, name: str, column: pa.Array, path: Path | str) -> pa.Array:
        try:
            # Unsafe: integers above 2^24 lose digits in float32, as they will in the model.
            values = np.array(column.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ValueError(f"{path}: dense column {name!r} must hold numbers, got {column.type}") from None
        missing = ~np.isfinite(values)
        self.missing_dense += int(missing.sum())
        values[missing] = np.nan
        return pa.array(values)


def _timestamps(column: pa.Array, path: Path | str) -> pa.Array:
    """Times as int64 (dates and times in microseconds) or float64; NaN becomes null."""
    dtype = column.type
    if pa.types.is_integer(dtype):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: the timestamp column must hold numbers below 2^63: {error}") from error
    if pa.types.is_floating(dtype):
        column = column.cast(pa.float64())
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64()))
    if pa.types.is_timestamp(dtype) or pa.types.is_date(dtype):
        return column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    raise ValueError(f"{path}: the timestamp column must hold numbers or times, got {dtype}")


def _labels(column: pa.Array, path: Path | str) -> tuple[pa.Array, pa.Array]:
    """Labels as int8, and which of them are not 0 or 1."""
    try:
        numbers = column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: the label column must hold 0 and 1, got {column.type}: {error}") from error
    valid = pc.fill_null(pc.is_in(numbers, value_set=pa.array([0.0, 1.0])), False)
    return pc.if_else(valid, numbers, 0.0).cast(pa.int8()), pc.invert(valid)
