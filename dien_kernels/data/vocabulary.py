"""Maps raw values to ids and back. While a log is read, values are numbered as they first appear (``Coder``); once
all are counted, ids go by frequency (``Vocabulary``)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array
from dien_kernels.data._lookup import Lookup, as_column, as_values


class Vocabulary:
    """The values of one field: id 0 is "unknown", id 1 the most frequent value, and so on.

    Attributes:
        values: Arrow array of the raw values (int64 or string) of ids 1 to size - 1.
        counts: int64 [size], how often each was seen; counts[0] are the rows of values that were too rare, or
            absent.
    """

    def __init__(self, values: pa.Array, counts: Array) -> None:
        self.values, self.counts = values, counts
        self._index: Lookup | None = None
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Number of ids, "unknown" included."""
        return len(self.values) + 1

    def encode(self, raw: Sequence[object] | Array | pa.Array | pa.ChunkedArray) -> Array:
        """Raw values to ids, int64 [n]; what is not in the vocabulary, and null, is 0.

        Integers are found in a vocabulary of strings by their decimal digits, and the other way round; so are whole
        floats and decimals. NaN, an integer beyond int64 and a float beyond the integers that it can hold exactly are
        in no vocabulary. ``as_values`` has all rules.

        The first call makes an index of the values, which is kept; from then on the time is that of the n values and
        not of the vocabulary. Threads may call this at once. Of a dictionary the values are looked up, not the rows.

        Args:
            raw: integers, text, bytes, floats or decimals: an Arrow column, a NumPy array or a sequence.

        Raises ``ValueError`` for values of other types, and for sequences in which integers and text are mixed.

        >>> Vocabulary(pa.array(["17", "x"]), np.array([0, 2, 1])).encode([17, None, 4, 17.0])
        array([1, 0, 0, 1])
        """
        column = raw if isinstance(raw, (pa.Array, pa.ChunkedArray)) else as_column(raw)
        if isinstance(column, pa.ChunkedArray):
            return np.concatenate([np.empty(0, np.int64), *(self.encode(chunk) for chunk in column.chunks)])
        if pa.types.is_dictionary(column.type) and len(column.dictionary) <= len(column):
            ids: Array = np.append(self.encode(column.dictionary), 0)
            found: Array = ids.take(column.indices.cast(pa.int64()).fill_null(-1).to_numpy())
            return found
        values = as_values(column, self.values.type)
        if not values.null_count:
            return self._lookup().places(values) + 1
        found = np.zeros(len(values), np.int64)
        found[values.is_valid().to_numpy(zero_copy_only=False)] = self._lookup().places(values.drop_null()) + 1
        return found

    def _lookup(self) -> Lookup:
        if self._index is None:
            with self._lock:
                if self._index is None:
                    self._index = Lookup(self.values)
        return self._index

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle has no index: the other process makes its own."""
        return type(self), (self.values, self.counts)

    def name(self, number: int) -> Any:
        """The raw value of an id, None for 0. ``IndexError`` for an id that is none."""
        if not 0 <= number < self.size:
            raise IndexError(f"id must lie between 0 and {self.size - 1}, got {number}")
        return self.values[number - 1].as_py() if number else None

    def write(self, path: Path) -> None:
        table = pa.table({"value": self.values, "count": self.counts[1:]})
        stored = table.replace_schema_metadata({"unknown": str(int(self.counts[0]))})
        pq.write_table(stored, path, write_page_checksum=True)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        table = pq.read_table(path, page_checksum_verification=True)
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
