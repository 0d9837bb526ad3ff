"""Maps raw values to ids and back. While a log is read, values are numbered as they first appear (``Coder``); once
all are counted, ids go by frequency (``Vocabulary``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array


class Vocabulary:
    """The values of one field: id 0 is "unknown", id 1 the most frequent value, and so on.

    Attributes:
        values: Arrow array of the raw values (int64 or string) of ids 1 to size - 1.
        counts: int64 [size], how often each was seen; counts[0] are the rows of values that were too rare, or
            absent.
    """

    def __init__(self, values: pa.Array, counts: Array) -> None:
        self.values, self.counts = values, counts

    @property
    def size(self) -> int:
        """Number of ids, "unknown" included."""
        return len(self.values) + 1

    def encode(self, raw: Sequence[object] | Array | pa.Array | pa.ChunkedArray) -> Array:
        """Raw values to ids, int64 [n]; what is not in the vocabulary is 0.

        Integers are found in a vocabulary of strings by their decimal digits, and the other way round.
        """
        array = raw if isinstance(raw, (pa.Array, pa.ChunkedArray)) else pa.array(raw)
        wanted = self.values.type
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        if array.type != wanted:
            if pa.types.is_uint64(array.type) and pa.types.is_integer(wanted):  # no vocabulary has values beyond int64
                array = pc.if_else(pc.less(array, pa.scalar(1 << 63, pa.uint64())), array, pa.scalar(None, pa.uint64()))
            if pa.types.is_string(wanted) or pa.types.is_integer(array.type) or len(array) == array.null_count:
                array = array.cast(wanted)
            else:
                digits = array.cast(pa.string())
                is_integer = pc.match_substring_regex(digits, r"^-?[0-9]{1,18}$")
                array = pc.if_else(is_integer, digits, pa.scalar(None, pa.string())).cast(wanted)
        found = pc.index_in(array, value_set=self.values, skip_nulls=True)
        ids = pc.add(found.cast(pa.int64()), 1).fill_null(0)
        return np.asarray(ids.to_numpy() if isinstance(ids, pa.ChunkedArray) else ids.to_numpy(zero_copy_only=False))

    def name(self, number: int) -> Any:
        """The raw value of an id, None for 0. ``IndexError`` for an id that is none."""
        if not 0 <= number < self.size:
            raise IndexError(f"id must lie between 0 and {self.size - 1}, got {number}")
        return self.values[number - 1].as_py() if number else None

    def write(self, path: Path) -> None:
        table = pa.table({"value": self.values, "count": self.counts[1:]})
        pq.write_table(table.replace_schema_metadata({"unknown": str(int(self.counts[0]))}), path)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        table = pq.read_table(path)
        unknown = int(table.schema.metadata[b"unknown"])
        counts = np.concatenate([[unknown], table["count"].to_numpy()])
        return cls(table["value"].combine_chunks(), counts)


class Coder:
    """Numbers raw values in the order of their first appearance, because frequencies are known only at the end.

    Memory grows with the number of distinct values. Null has the code -1.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._codes: dict[Any, int] = {}
        self._dtype: pa.DataType | None = None

    def __len__(self) -> int:
        return len(self._codes)

    def codes(self, array: pa.Array) -> Array:
        """int64 [n]: the codes of a column's values."""
        array = _as_key(self.name, array)
        if self._dtype is None:
            self._dtype = array.type
        elif self._dtype != array.type:
            raise ValueError(
                f"column {self.name!r} must be all integers or all strings, got {self._dtype} and {array.type}"
            )
        encoded = array.dictionary_encode()
        known = self._codes
        try:
            values = encoded.dictionary.to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"column {self.name!r} must hold text in UTF-8: {error}") from error
        table = np.fromiter((known.setdefault(value, len(known)) for value in values), np.int64, len(values))
        codes = np.full(len(array), -1, np.int64)
        valid = np.asarray(encoded.is_valid())
        codes[valid] = table[encoded.indices.drop_null().to_numpy()]
        return codes

    def values(self) -> pa.Array:
        """The raw values in the order of their codes."""
        return pa.array(list(self._codes), type=self._dtype or pa.string())

    def vocabulary(self, counts: Array, minimum: int, unknown: int = 0) -> tuple[Vocabulary, Array]:
        """The vocabulary by frequency, and the id of every code, int32 [codes + 1].

        The last entry is 0, so that the code -1 of null indexes "unknown". Equal counts go by raw value.

        Args:
            counts: int64 [codes].
            minimum: values seen less often have no id of their own.
            unknown: rows without a value, counted with those.
        """
        values = self.values()
        table = pa.table({"count": counts, "value": values})
        order = pc.sort_indices(table, [("count", "descending"), ("value", "ascending")]).to_numpy()
        kept = order[counts[order] >= minimum]
        ids = np.zeros(len(values) + 1, np.int32)
        ids[kept] = np.arange(1, len(kept) + 1)
        left_out = int(counts.sum() - counts[kept].sum()) + unknown
        return Vocabulary(values.take(pa.array(kept)), np.concatenate([[left_out], counts[kept]])), ids


def _as_key(name: str, array: pa.Array) -> pa.Array:
    """Convert a column of users, items or field values to int64 or string."""
    dtype = array.type
    if pa.types.is_dictionary(dtype):
        array = array.cast(dtype.value_type)
        dtype = array.type
    if pa.types.is_integer(dtype) or pa.types.is_boolean(dtype):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"column {name!r} must hold integers below 2^63, or strings: {error}") from error
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype):
        return array.cast(pa.string())
    if pa.types.is_floating(dtype):  # integers with missing values often come as floats
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid:
            pass
    raise ValueError(f"column {name!r} must hold integers or strings, got {dtype}")
