"""The columns of requests: what a model reads from them, and lists as flat values and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dien_kernels.batch import Schema

HISTORY, CANDIDATES, SCORES = "history", "candidates", "scores"
OF_BEHAVIOURS = "behaviour."  # before the name of a field of behaviours that is the name of another feature, too


@dataclass
class Lists:
    """A column of lists: ``values``, one list after another, and the ``lengths`` of the lists, int64 [requests]."""

    values: pa.Array
    lengths: NDArray[np.int64]


@dataclass
class Columns:
    """R requests with N behaviours and B candidates in all, in raw values.

    Attributes:
        history, candidates: raw item ids, [N] and [B].
        users: user field to a raw value for each request, [R].
        dense: name to float32 [B], NaN where it is missing.
        behaviours: field of behaviours to raw values [N].
        behaviour_dense: name to float32 [N], NaN where it is missing.
    """

    history: Lists
    candidates: Lists
    users: dict[str, pa.Array] = field(default_factory=dict)
    dense: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    behaviours: dict[str, pa.Array] = field(default_factory=dict)
    behaviour_dense: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def names_of(schema: Schema) -> dict[str, str]:
    """Every column that requests must have, with what it holds in words.

    Raises ``ValueError`` for a schema whose features cannot be columns of requests.
    """
    if schema.sequences:
        raise ValueError(f"requests cannot carry the further sequences of the model: {', '.join(schema.sequences)}")
    names = {HISTORY: "lists of item ids", CANDIDATES: "lists of item ids"}
    names |= {name: "one value a request" for name in schema.users}
    names |= {name: f"one number a request, or lists of numbers as long as {CANDIDATES!r}" for name in schema.dense}
    for kind, fields in (("values", schema.behaviours), ("numbers", schema.behaviour_dense)):
        names |= {behaviour_name(schema, name): f"lists of {kind} as long as {HISTORY!r}" for name in fields}
    taken = [name for name in (*schema.users, *schema.dense) if name in (HISTORY, CANDIDATES, SCORES)]
    if taken:
        raise ValueError(f"features must not be named as the columns of requests are, got {', '.join(taken)}")
    return names


def behaviour_name(schema: Schema, name: str) -> str:
    """The column of a field of behaviours: its name, but "behaviour.NAME" where other columns are so named, too."""
    taken = name in schema.users or name in schema.dense or name in (HISTORY, CANDIDATES, SCORES)
    return OF_BEHAVIOURS + name if taken else name


def check_names(there: Iterable[str], names: Mapping[str, str], what: str = "the requests have") -> None:
    """Raise ``ValueError`` for the first of ``names`` that is not ``there``."""
    there = list(there)
    for name, words in names.items():
        if name not in there:
            raise ValueError(
                f"{what} no column {name!r}, only {', '.join(there) or 'none'}; "
                f"needed are {', '.join(names)} ({name!r}: {words})"
            )


def columns_of(table: pa.Table, schema: Schema) -> Columns:
    """The columns that ``schema`` reads. Raises ``ValueError`` for one that is missing or holds something else."""
    check_names(table.column_names, names_of(schema))
    history, candidates = _lists(table, HISTORY), _lists(table, CANDIDATES)
    columns = Columns(history, candidates)
    for name in schema.users:
        column = table[name]
        if pa.types.is_nested(column.type):
            raise ValueError(f"the column {name!r} must hold one value a request, got {column.type}")
        columns.users[name] = _one(column)
    for name in schema.dense:
        column = _one(table[name])
        if _is_list(column.type):
            numbers = _numbers(name, _aligned(name, column, candidates.lengths, CANDIDATES))
        else:
            numbers = np.repeat(_numbers(name, column), candidates.lengths)
        columns.dense[name] = numbers
    for name in (*schema.behaviours, *schema.behaviour_dense):
        column_name = behaviour_name(schema, name)
        column = _one(table[column_name])
        if not _is_list(column.type) and not pa.types.is_null(column.type):
            raise ValueError(f"the column {column_name!r} must hold lists as long as {HISTORY!r}, got {column.type}")
        values = _aligned(column_name, column, history.lengths, HISTORY)
        if name in schema.behaviours:
            columns.behaviours[name] = values
        else:
            columns.behaviour_dense[name] = _numbers(column_name, values)
    return columns


def newest(columns: Columns, most: int) -> Columns:
    """The columns with only the last ``most`` behaviours of each history."""
    lengths = columns.history.lengths
    if not len(lengths) or lengths.max() <= most:
        return columns
    kept = np.minimum(lengths, most)
    at = np.arange(kept.sum()) + np.repeat(np.cumsum(lengths) - kept - (np.cumsum(kept) - kept), kept)
    taken = pa.array(at)
    return Columns(
        Lists(columns.history.values.take(taken), kept),
        columns.candidates,
        columns.users,
        columns.dense,
        {name: values.take(taken) for name, values in columns.behaviours.items()},
        {name: values[at] for name, values in columns.behaviour_dense.items()},
    )


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _is_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and not pa.types.is_nested(kind.value_type)


def _lists(table: pa.Table, name: str) -> Lists:
    """A column of lists; a null list is empty."""
    column = _one(table[name])
    if pa.types.is_null(column.type):
        return Lists(pa.nulls(0), np.zeros(len(column), np.int64))
    if not _is_list(column.type):
        raise ValueError(f"the column {name!r} must hold lists of item ids, got {column.type}")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    return Lists(pc.list_flatten(column), lengths)


def _aligned(name: str, column: pa.Array, wanted: NDArray[np.int64], beside: str) -> pa.Array:
    """The values of lists that are as long as those ``beside`` them; those of a null list are null."""
    if pa.types.is_null(column.type):
        return pa.nulls(int(wanted.sum()))
    lengths = pc.list_value_length(column)
    given = pc.is_valid(column).to_numpy(zero_copy_only=False)
    real = np.where(given, pc.fill_null(lengths, 0).to_numpy(), wanted)
    wrong = np.flatnonzero(real != wanted)
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"the column {name!r} must have lists as long as those of {beside!r}, got {int(real[row])} values beside "
            f"{int(wanted[row])} in request {row + 1} of {len(wanted)}"
        )
    values = pc.list_flatten(column)
    if given.all():
        return values
    missing = np.repeat(~given, wanted)
    return values.take(pa.array(np.cumsum(~missing) - 1, mask=missing))


def _numbers(name: str, column: pa.Array) -> NDArray[np.float32]:
    """Numbers as float32, NaN for null."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    elif not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
    ):
        raise ValueError(f"the column {name!r} must hold numbers, or lists of numbers, got {kind}")
    numbers: NDArray[Any] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
