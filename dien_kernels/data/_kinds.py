"""What a column is: ids, numbers and labels of any Arrow type in the one form that the rest of the package reads.

Each function takes an Arrow array as a file has it and returns ``Checked``: the values, null where the file says
nothing, and a mask of the rows that hold something else than what is accepted. Times are in ``_times.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from dien_kernels.data._arrow import Array

# Words for "missing" that no user, item, time, label or number has as its name.
MISSING = (
    ("", "NULL", "null", "NaN", "nan", "-nan", "<NA>", "\\N", "#N/A", "#NA", "#N/A N/A", "NaT")
    + ("NA", "N/A", "n/a", "None", "none", "NONE", "nil", "Null", "Nan", "NAN")
)  # fmt: skip
# A brand or a country may be called "None" or "NA": in fields, only the words that nothing is called are missing.
MISSING_FIELD = ("", "NULL", "null", "NaN", "nan", "-nan", "<NA>", "\\N", "#N/A", "#NA", "#N/A N/A", "NaT")
ACCEPTED = {
    "id": "an id is a whole number below 2^63, or text in UTF-8",
    "number": "numbers are written as 12.5 or 1e-3",
    "label": "labels are 0 and 1, true and false, or t and f",
}
_LABELS = {"f": 0, "t": 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


class Checked(NamedTuple):
    """Values with null for what is missing; ``wrong`` marks rows with a value that is not accepted (None: no row);
    ``infinite`` marks numbers that are infinite or too large for float32 (None: no row)."""

    values: pa.Array
    wrong: Array | None = None
    infinite: Array | None = None


def check_words(words: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words for "missing" in users, items, times, labels and numbers, and those in fields."""
    if words is None:
        return MISSING, MISSING_FIELD
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"missing must be a list of words, got {words!r}")
    return ("", *words), ("", *words)


def is_text(dtype: pa.DataType) -> bool:
    """Whether a type holds text: strings of any kind, bytes, and dictionaries of them."""
    if pa.types.is_dictionary(dtype):
        return is_text(dtype.value_type)
    return bool(
        pa.types.is_string(dtype)
        or pa.types.is_large_string(dtype)
        or pa.types.is_string_view(dtype)
        or pa.types.is_binary(dtype)
        or pa.types.is_large_binary(dtype)
        or pa.types.is_binary_view(dtype)
        or pa.types.is_fixed_size_binary(dtype)
    )


def is_several(dtype: pa.DataType) -> bool:
    """Whether a type holds lists."""
    return bool(
        pa.types.is_list(dtype)
        or pa.types.is_large_list(dtype)
        or pa.types.is_fixed_size_list(dtype)
        or pa.types.is_list_view(dtype)
        or pa.types.is_large_list_view(dtype)
    )


def ids_are_text(types: Sequence[pa.DataType]) -> bool:
    """Whether ids of a column become text: where one of the files (of these types) has text. Else they are int64."""
    return any(is_text(dtype.value_type if is_several(dtype) else dtype) for dtype in types)


def plain(column: pa.Array) -> pa.Array:
    """The array without its dictionary or extension type, and text not as views, which few functions take."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        return plain(column.dictionary).take(column.indices)
    if pa.types.is_string_view(column.type):
        return column.cast(pa.string())
    return column.cast(pa.binary()) if pa.types.is_binary_view(column.type) else column


def text(column: pa.Array, words: Sequence[str], trim: bool = False) -> Checked:
    """Text as Arrow strings; the words for "missing" are null, with blanks around them or not.

    ``trim`` takes blanks around every value away.
    """
    dtype, wrong = column.type, None
    if pa.types.is_fixed_size_binary(dtype):
        column = column.cast(pa.binary())
    if "binary" in str(dtype):
        try:
            column = column.cast(pa.string())
        except pa.ArrowInvalid:
            column, wrong = _decoded(column)
    elif not pa.types.is_string(dtype):
        column = column.cast(pa.string())
    try:
        bare = pc.utf8_trim_whitespace(column)
    except pa.ArrowInvalid:  # a file may say of any bytes that they are text
        column, wrong = _decoded(column.cast(pa.binary()))
        bare = pc.utf8_trim_whitespace(column)
    column = bare if trim else column
    missing = pc.is_in(bare, value_set=pa.array(words, pa.string()))
    if missing.true_count:
        column = pc.if_else(missing, pa.scalar(None, pa.string()), column)
    return Checked(column, wrong)


def _decoded(column: pa.Array) -> tuple[pa.Array, Array]:
    values: list[str | None] = []
    wrong = np.zeros(len(column), bool)
    for row, value in enumerate(column.to_pylist()):
        try:
            values.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            values.append(None)
            wrong[row] = True
    return pa.array(values, pa.string()), wrong


def ids(column: pa.Array, as_text: bool, words: Sequence[str]) -> Checked:
    """Ids as int64, or as text where ``as_text`` says that the log has text in this column.

    Raises ``TypeError`` for a type that holds no ids.
    """
    column = plain(column)
    if is_text(column.type):
        found = text(column, words)
        if as_text:
            return found
        numbers = as_number(found.values, pl.Int64())
        return Checked(numbers, either(found.wrong, lost(found.values, numbers)))
    found = whole(column)
    return Checked(found.values.cast(pa.string()), found.wrong) if as_text else found


def lists(column: pa.Array, as_text: bool, words: Sequence[str], delimiter: str | None = None) -> Checked:
    """Several ids a row: lists without missing values, null where a row has none. Text is cut at ``delimiter``."""
    column, wrong = plain(column), None
    kind = pa.string() if as_text else pa.int64()
    if not is_several(column.type):
        if delimiter is None or not is_text(column.type):
            found = ids(column, as_text, words)  # one id a row, in a column that has lists in other files
            one = pa.ListArray.from_arrays(np.arange(len(column) + 1, dtype=np.int32), found.values)
            column, wrong = one, found.wrong
        else:
            found = text(column, words, trim=True)
            column, wrong = pc.split_pattern(found.values, delimiter), found.wrong
    parent = np.asarray(pc.list_parent_indices(column)).astype(np.int64)
    flat = plain(pc.list_flatten(column))
    found = text(flat, words, trim=delimiter is not None) if is_text(flat.type) else Checked(flat)
    inner = Checked(found.values, found.wrong) if as_text and is_text(flat.type) else ids(found.values, as_text, words)
    bad = either(found.wrong, inner.wrong)
    if bad is not None:
        rows = np.zeros(len(column), bool)
        rows[parent[bad]] = True
        wrong = either(wrong, rows)
    kept = np.asarray(inner.values.is_valid())
    counts = np.bincount(parent[kept], minlength=len(column))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32(), mask=np.append(counts == 0, False))
    return Checked(pa.ListArray.from_arrays(offsets, inner.values.filter(pa.array(kept)).cast(kind)), wrong)


def whole(column: pa.Array) -> Checked:
    """Whole numbers as int64; what has a fraction or more than 64 bits is wrong, and NaN is missing."""
    dtype = column.type
    if pa.types.is_int64(dtype):
        return Checked(column)
    if pa.types.is_null(dtype):
        return Checked(pa.nulls(len(column), pa.int64()))
    if not (_is_number(dtype) or pa.types.is_boolean(dtype)):
        raise TypeError(f"integers or text, got {dtype}")
    try:
        return Checked(column.cast(pa.int64()))
    except pa.ArrowInvalid:
        pass
    given = column
    if pa.types.is_floating(dtype):
        given = pc.if_else(pc.is_nan(column), pa.scalar(None, dtype), column)
        numbers = given.cast(pa.float64())
        inside = pc.and_(pc.less(pc.abs(numbers), 2.0**63), pc.equal(pc.floor(numbers), numbers))
    elif pa.types.is_decimal(dtype):
        inside = pc.and_(pc.less(pc.abs(given.cast(pa.float64())), 2.0**63), pc.equal(pc.floor(given), given))
    else:
        inside = pc.less(given, pa.scalar(2**63, pa.uint64()))
    kept = pc.if_else(inside, given, pa.scalar(None, dtype))
    values = kept.cast(pa.int64(), safe=False)
    return Checked(values, lost(given, values))


def numbers(column: pa.Array, words: Sequence[str]) -> Checked:
    """Numbers as float32, NaN where they are missing or not finite. Integers above 2^24 lose digits, as in the model.

    Raises ``TypeError`` for a type that holds no numbers.
    """
    column, wrong = plain(column), None
    if is_text(column.type):
        found = text(column, words, trim=True)
        column = as_number(found.values, pl.Float64())
        wrong = either(found.wrong, lost(found.values, column))
    elif not (_is_number(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise TypeError(f"numbers, got {column.type}")
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values = np.array(column.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False), np.float32)
    infinite = np.isinf(values)
    values[infinite] = np.nan
    return Checked(pa.array(values), wrong, infinite if infinite.any() else None)


def labels(column: pa.Array, words: Sequence[str]) -> Checked:
    """Labels as int8, 0 or 1. Raises ``TypeError`` for a type that holds none."""
    column, wrong = plain(column), None
    if is_text(column.type):
        found = text(column, words, trim=True)
        column, wrong = pc.utf8_lower(found.values), found.wrong
        place = pc.index_in(column, value_set=pa.array(list(_LABELS)), skip_nulls=True)
        values = pa.array(list(_LABELS.values()), pa.int8()).take(place)
    elif _is_number(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        given = column.cast(pa.float64(), safe=False)
        column = pc.if_else(pc.is_nan(given), pa.scalar(None, pa.float64()), given)
        valid = pc.is_in(column, value_set=pa.array([0.0, 1.0]), skip_nulls=True)
        values = pc.if_else(valid, column, pa.scalar(None, pa.float64())).cast(pa.int8())
    else:
        raise TypeError(f"0 and 1, got {column.type}")
    return Checked(values, either(wrong, lost(column, values)))


def as_number(column: pa.Array, dtype: pl.DataType) -> pa.Array:
    """Convert strings to numbers; a string that is no number becomes null."""
    series = pl.Series(column).cast(pl.String).str.strip_chars()
    return to_arrow(series.cast(dtype, strict=False))


def to_arrow(series: pl.Series) -> pa.Array:
    """A polars series as one Arrow array."""
    array = series.to_arrow()
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _is_number(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype))


def lost(before: pa.Array, after: pa.Array) -> Array | None:
    """Where a value was, and is null now."""
    if after.null_count == before.null_count:
        return None
    return np.asarray(pc.and_(pc.is_valid(before), pc.is_null(after)))


def either(first: Array | None, second: Array | None) -> Array | None:
    """The rows that one of two masks marks."""
    if first is None or second is None:
        return second if first is None else first
    return first | second
