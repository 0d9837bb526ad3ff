"""Maps raw values to ids and back: ids go by frequency."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array
from dien_kernels.data._hash import hash64
from dien_kernels.data._lookup import Lookup, as_column, as_values


class Vocabulary:
    """The values of one field: id 0 is "unknown", id 1 the most frequent value, and so on.

    Attributes:
        values: Arrow array of the raw values (int64 or string) of ids 1 to size - 1.
        counts: int64 [size], how often each was seen; counts[0] are the rows of values that were too rare, or
            absent.
        buckets: 0, or the number of buckets that raw values fall into by their hash (``bucket_of``). ``values`` are
            then the buckets of ids 1 to size - 1, and a value that was never seen has the id of its bucket, which it
            shares with others.
        text: whether the raw values of buckets are text.
    """

    def __init__(self, values: pa.Array, counts: Array, buckets: int = 0, text: bool = False) -> None:
        self.values, self.counts, self.buckets, self.text = values, counts, buckets, text
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
            taken: Array = ids.take(column.indices.cast(pa.int64()).fill_null(-1).to_numpy())
            return taken
        if self.buckets:
            return self.encode_values(bucket_of(column, self.buckets, self.text))
        return self.encode_values(as_values(column, self.values.type))

    def encode_values(self, values: pa.Array | pa.ChunkedArray) -> Array:
        """Ids of values of the type of ``values``, int64 [n]: of buckets where there are buckets; 0 for null."""
        if isinstance(values, pa.ChunkedArray):
            return np.concatenate([np.empty(0, np.int64), *(self.encode_values(chunk) for chunk in values.chunks)])
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
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
        return type(self), (self.values, self.counts, self.buckets, self.text)

    def name(self, number: int) -> Any:
        """The raw value of an id, None for 0. ``IndexError`` for an id that is none."""
        if not 0 <= number < self.size:
            raise IndexError(f"id must lie between 0 and {self.size - 1}, got {number}")
        return self.values[number - 1].as_py() if number else None

    def write(self, path: Path) -> None:
        table = pa.table({"value": self.values, "count": self.counts[1:]})
        facts = {"unknown": str(int(self.counts[0]))}
        if self.buckets:
            facts |= {"buckets": str(self.buckets), "text": str(int(self.text))}
        pq.write_table(table.replace_schema_metadata(facts), path, write_page_checksum=True)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        table = pq.read_table(path, page_checksum_verification=True)
        unknown = int(table.schema.metadata[b"unknown"])
        counts = np.concatenate([[unknown], table["count"].to_numpy()])
        buckets, text = (int(table.schema.metadata.get(name, b"0")) for name in (b"buckets", b"text"))
        return cls(table["value"].combine_chunks(), counts, buckets, bool(text))


def bucket_of(column: pa.Array | pa.ChunkedArray, buckets: int, text: bool) -> pa.Array:
    """int64 [n]: the bucket of each raw value, from 0 to ``buckets`` - 1, null for null: ``hash64(value) % buckets``.

    ``text`` says whether raw values are text; integers are then their decimal digits, as in ``Vocabulary.encode``.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values = as_values(column, pa.string() if text else pa.int64())
    known = values.is_valid().to_numpy(zero_copy_only=False)
    found = np.zeros(len(values), np.int64)
    found[known] = (hash64(values.drop_null()) % np.uint64(buckets)).astype(np.int64)
    return pa.array(found, mask=~known)
