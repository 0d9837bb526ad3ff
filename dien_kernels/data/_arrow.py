"""Flat arrays: on disk, written piece by piece; searches in lists that lie one after another; digests of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

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


def count_before(offsets: Array, times: Array, user: Array, time: Array) -> Array:
    """int64 [n]: where the behaviours of ``user`` [n] that are strictly before ``time`` [n] end in the flat arrays.

    User u's behaviours are offsets[u] to offsets[u + 1] - 1 of ``times``, and ascend there.
    """
    low, high = offsets[user], offsets[user + 1]
    while (open_ := low < high).any():
        middle = (low + high) // 2
        before = open_.copy()
        before[open_] = times[middle[open_]] < time[open_]
        low = np.where(before, middle + 1, low)
        high = np.where(open_ & ~before, middle, high)
    return np.asarray(low)


def digest(path: Path) -> str:
    """The SHA-256 of a file, which is read block by block."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
