"""Reads the Parquet files of a prepared folder into flat arrays; whatever is wrong with a file is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array
from dien_kernels.data.folder import CHECKED, META, group_digest


class Damaged(ValueError):
    """A file of a prepared folder is not what was written."""

    def __init__(self, folder: Path, trouble: str) -> None:
        super().__init__(f"{folder} is damaged: {trouble}; prepare it again")
        self.folder, self.trouble = folder, trouble

    def __reduce__(self) -> tuple[type[Damaged], tuple[Path, str]]:
        return type(self), (self.folder, self.trouble)


@contextmanager
def reading(folder: Path, name: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into ``Damaged``, which names the file.

    There is no list of what a library raises for a file in which bits were changed, so this takes every exception.
    """
    try:
        yield
    except Damaged:
        raise
    except FileNotFoundError as error:
        raise Damaged(folder, f"{name} is missing") from error
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise Damaged(folder, f"{name} cannot be read ({why})") from error


def read_group(path: Path, group: int, columns: Sequence[str], digest: Sequence[Any] | None = None) -> pa.Table:
    """The columns of one row group. One thread reads: a loader may run in a forked process.

    ``ValueError`` where the row group has another ``digest`` (of ``group_digests``) than is given, or where there is
    no such column.
    """
    if digest is not None and group_digest(path, digest[0], digest[1]) != digest[2]:
        raise ValueError(f"its bytes have another SHA-256 than {META} says")
    with pq.ParquetFile(path, **CHECKED) as file:
        known = file.schema_arrow.names
        for name in columns:
            if name not in known:
                raise ValueError(f"column {name!r} is missing, there are {known}")
        if not 0 <= group < file.num_row_groups:
            raise ValueError(f"there is no row group {group}, the file has {file.num_row_groups}")
        return file.read_row_group(group, columns=list(columns), use_threads=False)


def read_all(path: Path) -> pa.Table:
    """All rows and columns of a file."""
    with pq.ParquetFile(path, **CHECKED) as file:
        return file.read(use_threads=False)


def numbers_of(table: pa.Table, name: str, wanted: pa.DataType) -> Array:
    """A column of numbers as a flat array. ``ValueError`` for another type and for nulls."""
    column = table[name]
    if column.type != wanted:
        raise ValueError(f"column {name!r} must be {wanted}, got {column.type}")
    return _flat(name, _whole(column))


def lists_of(table: pa.Table, name: str, wanted: pa.DataType) -> tuple[Array, Array]:
    """A column of lists as int64 offsets [rows + 1], from 0 on, and a flat array.

    ``wanted`` is the type of the values. ``ValueError`` for another type and for nulls.
    """
    column = table[name]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.type.value_type != wanted:
        raise ValueError(f"column {name!r} must be lists of {wanted}, got {column.type}")
    lists = _whole(column)
    if lists.null_count:
        raise ValueError(f"column {name!r} must have no nulls, got {lists.null_count}")
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], _flat(name, lists.flatten())


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _flat(name: str, array: pa.Array) -> Array:
    if array.null_count:
        raise ValueError(f"column {name!r} must have no nulls, got {array.null_count}")
    values: Array = array.to_numpy(zero_copy_only=True)
    return values
