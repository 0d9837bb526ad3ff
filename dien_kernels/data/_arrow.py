"""Flat arrays on disk: written piece by piece, stored as one Arrow record batch, and read back as memory maps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, np.dtype[Any]]


class GrowingArray:
    """A flat array of unknown length in a file of its own, appended to and then mapped.

    An Arrow file holds record batches, and a column that is spread over several batches is not a single array. So
    the pieces are first collected as raw bytes. This file is then mapped while the one batch is written, so that
    the array never has to fit into memory.
    """

    def __init__(self, path: Path, dtype: str, width: int = 0) -> None:
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self._file = path.open("wb")

    def append(self, values: Array) -> None:
        np.ascontiguousarray(values, dtype=self.dtype).tofile(self._file)

    def close(self) -> Array:
        """Close the file and return the mapped array: [n], or [n, width] where a width was given."""
        self._file.close()
        if self.path.stat().st_size == 0:
            return np.empty((0, self.width) if self.width else 0, self.dtype)
        values = np.memmap(self.path, self.dtype, mode="r+")
        return values.reshape(-1, self.width) if self.width else values


def write_columns(path: Path, columns: Mapping[str, Array]) -> None:
    """Write arrays [n] or [n, width] as one record batch; they may be mapped files larger than memory."""
    arrays = []
    for values in columns.values():
        dtype = pa.from_numpy_dtype(values.dtype)
        flat = np.ascontiguousarray(values).reshape(-1)
        array = pa.Array.from_buffers(dtype, flat.size, [None, pa.py_buffer(flat)])
        if values.ndim == 2:
            array = pa.FixedSizeListArray.from_arrays(array, values.shape[1])
        arrays.append(array)
    batch = pa.record_batch(arrays, names=list(columns))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def map_columns(path: Path) -> dict[str, Array]:
    """The inverse of ``write_columns``: read-only arrays that are memory-mapped from the file."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_fixed_size_list(column.type):
            flat = column.flatten().to_numpy(zero_copy_only=True)
            columns[name] = flat.reshape(-1, column.type.list_size)
        else:
            columns[name] = column.to_numpy(zero_copy_only=True)
    return columns


def digest(path: Path) -> str:
    """The SHA-256 of a file, which is read block by block."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
