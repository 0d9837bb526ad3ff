"""What every reader returns: a log as a stream of record batches with standard columns, and its bad lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dien_kernels.data import _kinds
from dien_kernels.data._arrow import Array
from dien_kernels.data._kinds import Checked
from dien_kernels.data._times import FORMS, Times, words
from dien_kernels.data.columns import ALIASES, RESERVED, Columns, Roles

__all__ = ["ALIASES", "RESERVED", "BadLines", "Columns", "Log", "Roles", "Words"]


class BadLines:
    """Counts lines that cannot be used, remembers the first ones, and stops the reading at a limit."""

    def __init__(self, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"max_bad_lines must be an integer and not be negative, got {limit!r}")
        self.limit, self.count = limit, 0
        self.first: list[str] = []

    @property
    def told(self) -> bool:
        """Whether a further bad line is only counted: then nobody needs to find its line."""
        return len(self.first) >= 10

    def add(self, path: Path | str, line: int, reason: str) -> None:
        """Count a line (from 1). Raises ``ValueError`` with the first ones when they exceed the limit."""
        self.count += 1
        if len(self.first) < 10:
            self.first.append(f"{_short_path(path)}:{line}: {reason}")
        if self.count > self.limit:
            raise ValueError(
                f"more than max_bad_lines={self.limit} lines cannot be read; the first ones:\n  "
                + "\n  ".join(self.first)
            )


def _short_path(path: Path | str) -> str:
    """The name of a file, with the partitions of Hive that it lies in: all of their files may have the same name."""
    *folders, name = Path(path).parts
    kept = len(folders)
    while kept and "=" in folders[kept - 1]:
        kept -= 1
    return "/".join([*folders[kept:], name])


class Words:
    """The words for "missing": ``keys`` in users, items, times, labels and numbers, ``fields`` in fields."""

    def __init__(self, missing: Sequence[str] | None = None) -> None:
        self.keys, self.fields = _kinds.check_words(missing)


@dataclass
class Log:
    """A log that can be read once, from start to end.

    Attributes:
        item_fields, user_fields, dense: names of the columns beside user, item and timestamp.
        labelled: whether there is a column ``label`` (0 or 1).
        read: the stream: record batches with user, item (int64 or string), timestamp (int64 or float64),
            label (int8), the fields (int64 or string, null where not known; lists of them for ``several``), dense
            columns and ``behaviour_dense`` (float32, NaN where missing), ``sequence`` (int8, a place in ``sequences``),
            all else not null.
        total: amount of input, in bytes (rows for a table, 0 where nobody knows), for progress bars.
        advance: set by who shows progress; readers call it with the amount read since the last call.
        behaviour_fields, behaviour_dense: names of the columns of a behaviour itself.
        several: the item fields that are lists.
        sequences: the names of the sequences, the main one first; none: there is one sequence, without a column.
        times: reads the times of all files alike.
        words: what counts as missing in text.
        as_text: of each column of ids, whether it is text in the whole log; a reader that knows all of its files sets
            it, else the first batch decides.
        known: of each field and number, rows that have a value.
        infinite: of each number, rows with an infinity or a value too large for float32, which count as missing.
        rows, left_out: usable rows, and rows of no sequence.
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
    times: Times = field(default_factory=Times)
    words: Words = field(default_factory=Words)
    as_text: dict[str, bool] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    infinite: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    left_out: int = 0
    roles: Roles = field(default_factory=Roles)

    @classmethod
    def of(
        cls,
        roles: Roles,
        read: Callable[[], Iterator[pa.RecordBatch]],
        total: int,
        bad: BadLines,
        times: Times | None = None,
        words: Words | None = None,
    ) -> Log:
        """A log of these roles; times and words are the usual ones where a format does not know better."""
        names = tuple(roles.item_fields), tuple(roles.user_fields), tuple(roles.dense)
        return cls(
            *names,
            roles.label is not None,
            read,
            total,
            bad,
            behaviour_fields=tuple(roles.behaviour_fields),
            behaviour_dense=tuple(roles.behaviour_dense),
            several=tuple(name for name in roles.item_fields if name in (*roles.several, *roles.delimiters)),
            sequences=tuple(roles.sequences),
            times=times or Times(),
            words=words or Words(),
            roles=roles,
        )

    @property
    def time_unit(self) -> str:
        """``"us"`` (calendar times) or ``"number"``; known once the log has been read."""
        return self.times.unit or "number"

    @property
    def seen(self) -> dict[str, Any]:
        """What the reading has found, as plain data for a report.

        ``rows``; ``times``: of each kind of time its files, rows, first file, lowest and highest; ``unknown``: of
        each field or number the rows without a value; ``unknown_everywhere``: those without a value in any row;
        ``infinite``: of each number with infinite values, how many; ``left_out``: rows of no sequence.
        """
        times = {kind: dict(entry) for kind, entry in self.times.seen.items()}
        for kind, entry in times.items():
            if kind != "numbers":
                entry["low"], entry["high"] = words(entry["low"]), words(entry["high"])
        return {
            "rows": self.rows,
            "times": times,
            "unknown": {name: self.rows - known for name, known in self.known.items()},
            "unknown_everywhere": [name for name, known in self.known.items() if self.rows and not known],
            "infinite": dict(self.infinite),
            "left_out": self.left_out,
        }

    def standardise(
        self, columns: Mapping[str, pa.Array], path: Path | str, line_of: Callable[[int], int]
    ) -> pa.RecordBatch:
        """A record batch from columns by standard name; rows that cannot be used are counted and dropped.

        Args:
            columns: Arrow arrays of one length by the names in the log's ``Roles``, of any type that ``_kinds.py`` and
                ``_times.py`` take: text, numbers, dictionaries, times, with null where a value is missing.
            path: the file, for messages.
            line_of: gives the line (or row, from 1) in the file of a row of the columns.

        Raises:
            ValueError: the names are not those of the roles, a column is no Arrow array or of another type, or too
                many lines are bad.
        """
        self._check_columns(columns, path)
        if self.sequences:
            columns, line_of = self._of_a_sequence(columns, line_of)
        checked = {name: self._checked(name, column, path, line_of) for name, column in columns.items()}
        wrong = np.zeros(len(columns["user"]), bool)
        for role in RESERVED:
            if role in checked and checked[role].values.null_count:
                wrong |= np.asarray(checked[role].values.is_null())
        for found in checked.values():
            if found.wrong is not None:
                wrong |= found.wrong
        batch = pa.record_batch([found.values for found in checked.values()], names=list(checked))
        if wrong.any():
            for place in np.flatnonzero(wrong).tolist():
                self._tell(place, checked, columns, path, line_of)
            batch = batch.filter(pa.array(~wrong))
        self.rows += batch.num_rows
        for name in (*self.item_fields, *self.user_fields, *self.behaviour_fields):
            column = batch.column(name)
            self.known[name] = self.known.get(name, 0) + len(column) - column.null_count
        for name in (*self.dense, *self.behaviour_dense):
            values: Array = batch.column(name).to_numpy(zero_copy_only=False)
            self.known[name] = self.known.get(name, 0) + int(np.isfinite(values).sum())
            infinite = checked[name].infinite
            if infinite is not None:
                self.infinite[name] += int((infinite & ~wrong).sum())
        return batch

    def _checked(self, name: str, column: pa.Array, path: Path | str, line_of: Callable[[int], int]) -> Checked:
        keys, fields = self.words.keys, self.words.fields
        try:
            if name == "timestamp":
                return self.times.read(column, path, line_of)
            if name == "label":
                return _kinds.labels(column, keys)
            if name == "sequence":
                return Checked(column)
            if name in self.dense or name in self.behaviour_dense:
                return _kinds.numbers(column, keys)
            if name in self.several:
                delimiter = self.roles.delimiters.get(name)
                as_text = self.as_text.setdefault(name, _kinds.ids_are_text([column.type]))
                return _kinds.lists(column, as_text, fields, delimiter)
            as_text = self.as_text.setdefault(name, _kinds.ids_are_text([column.type]))
            return _kinds.ids(column, as_text, keys if name in ("user", "item") else fields)
        except TypeError as error:
            raise ValueError(f"{path}: column {name!r} must hold {error}") from None

    def _of_a_sequence(
        self, columns: Mapping[str, pa.Array], line_of: Callable[[int], int]
    ) -> tuple[dict[str, pa.Array], Callable[[int], int]]:
        """The rows that belong to a sequence, with its place in ``sequences`` in the column ``sequence``."""
        place = {value: at for at, values in enumerate(self.roles.sequences.values()) for value in values}
        given = _kinds.ids(columns["sequence"], True, self.words.fields).values
        found = pc.index_in(given, value_set=pa.array(list(place)), skip_nulls=True)
        columns = {**columns, "sequence": pa.array(list(place.values()), pa.int8()).take(found)}
        rows = np.flatnonzero(np.asarray(found.is_valid()))
        self.left_out += len(given) - len(rows)
        if len(rows) == len(given):
            return columns, line_of
        taken = pa.array(rows)
        return {name: _kinds.plain(column).take(taken) for name, column in columns.items()}, lambda row: line_of(
            int(rows[row])
        )

    def _tell(
        self,
        row: int,
        checked: Mapping[str, Checked],
        given: Mapping[str, pa.Array],
        path: Path | str,
        line_of: Callable[[int], int],
    ) -> None:
        """Count a row that cannot be used, and say which value is the reason."""
        if self.bad.told:
            self.bad.add(path, 0, "")
            return
        for name, found in checked.items():
            if found.wrong is not None and found.wrong[row]:
                reason = f"{self._named(name)} {_short(given[name][row])} {self._accepted(name)}"
                self.bad.add(path, line_of(row), reason)
                return
        missing = next(name for name, found in checked.items() if not found.values[row].is_valid)
        self.bad.add(path, line_of(row), f"{self._named(missing)} is missing")

    def _named(self, name: str) -> str:
        """A role or field in messages, with its column where that has another name."""
        column = self.roles.standard().get(name, name)
        return name if column == name else f"{name} (column {column!r})"

    def _accepted(self, name: str) -> str:
        if name == "timestamp":
            return f"is no time; {FORMS}"
        if name == "label":
            return f"is no label; {_kinds.ACCEPTED['label']}"
        if name in self.dense or name in self.behaviour_dense:
            return f"is no number; {_kinds.ACCEPTED['number']}"
        return f"is no id; {_kinds.ACCEPTED['id']}"

    def _check_columns(self, columns: Mapping[str, pa.Array], path: Path | str) -> None:
        wanted = ["user", "item", "timestamp", *["label"] * self.labelled, *["sequence"] * bool(self.sequences)]
        wanted += [*self.item_fields, *self.user_fields, *self.dense, *self.behaviour_fields, *self.behaviour_dense]
        if columns.keys() != set(wanted):
            raise ValueError(f"{path}: the reader gives the columns {list(columns)}, but its Roles name {wanted}")
        for name, column in columns.items():
            if not isinstance(column, pa.Array):
                raise ValueError(
                    f"{path}: column {name!r} must be an Arrow array (pa.array), got {type(column).__name__}"
                )


def _short(value: pa.Scalar) -> str:
    """A value of a file in messages."""
    try:
        found = value.as_py()
    except UnicodeDecodeError:
        found = value.cast(pa.binary()).as_py()
    except (OverflowError, ValueError):  # a time that Python's calendar does not reach
        found = value.cast(pa.int64()).as_py()
    text = repr(found) if isinstance(found, (str, bytes, list)) else str(found)
    return text if len(text) <= 80 else f"{text[:80]}..."
