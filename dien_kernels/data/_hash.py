"""``hash64``: 64-bit hashes of raw values that are the same on every machine and in every version."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

Hashes = np.ndarray[Any, np.dtype[np.uint64]]

_FNV_START, _FNV_PRIME, _ALL_BITS = 0xCBF29CE484222325, 0x100000001B3, (1 << 64) - 1
_BLOCK = 1 << 16  # rows of text hashed at a time, so that their bytes stay in the cache
_FEW = 16  # so few texts that are still going on are finished one by one


def hash64(column: pa.Array | pa.ChunkedArray) -> Hashes:
    """The hash of every value of a column, uint64 [n]; all arithmetic is modulo 2^64.

    Two values of one type have the same hash exactly where they are equal, but for collisions of text (integers have
    none). With ``>>`` as a shift of unsigned numbers::

        mix(z) = c ^ (c >> 31)  with  a = z ^ (z >> 30),  b = a * 0xBF58476D1CE4E5B9,
                                      b' = b ^ (b >> 27),  c = b' * 0x94D049BB133111EB      (splitmix64's finaliser)
        hash of an integer v  = mix(v as 64 bits in two's complement)
        hash of text          = mix(h after all of its UTF-8 bytes), h = 0xCBF29CE484222325,
                                h = (h ^ byte) * 0x100000001B3 for each byte in turn       (FNV-1a)

    Args:
        column: integers of any width, text or bytes (string, large_string, string_view, binary, ...), or a dictionary
            of those, of any number of chunks.

    Raises ``ValueError`` for another type of values and for a column with nulls.

    >>> hash64(pa.array([1])).tolist(), hash64(pa.array(["a"])).tolist()
    ([6238072747940578789], [198367012849983736])
    """
    if column.null_count:
        raise ValueError(f"column must have no nulls to be hashed, got {column.null_count} of {len(column)} values")
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    hashes = [_of_chunk(chunk) for chunk in chunks]
    return hashes[0] if len(hashes) == 1 else np.concatenate([np.empty(0, np.uint64), *hashes])


def mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64, ``mix`` in ``hash64``: a one-to-one map of uint64 onto itself, any shape."""
    mixed: Hashes = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _of_chunk(array: pa.Array) -> Hashes:
    kind = array.type
    if pa.types.is_dictionary(kind):
        if array.dictionary.null_count or len(array.dictionary) > len(array):
            return _of_chunk(array.dictionary_decode())
        hashed: Hashes = _of_chunk(array.dictionary)[array.indices.to_numpy()]
        return hashed
    if pa.types.is_uint64(kind):
        return mix(array.to_numpy())
    if pa.types.is_integer(kind):
        return mix(array.cast(pa.int64()).to_numpy().view(np.uint64))
    if pa.types.is_string_view(kind):
        array = array.cast(pa.large_string())
    elif pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        array = array.cast(pa.large_binary())
    elif not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    ):
        raise ValueError(f"column must hold integers or text to be hashed, got {kind}")
    return _of_text(array)


def text_buffers(array: pa.Array) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The parts of a string or binary array without nulls, large or not: offsets, [n + 1], and bytes, uint8.

    Value i is the bytes offsets[i] to offsets[i + 1] - 1; a slice of an array shares the bytes of the whole.
    """
    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, places, contents = array.buffers()
    if places is None or not len(array):
        return np.zeros(len(array) + 1, np.int64), np.empty(0, np.uint8)
    width = np.int64 if large else np.int32
    offsets = np.frombuffer(places, width, len(array) + 1, array.offset * np.dtype(width).itemsize)
    return offsets, np.empty(0, np.uint8) if contents is None else np.frombuffer(contents, np.uint8)


def _of_text(array: pa.Array) -> Hashes:
    offsets, data = text_buffers(array)
    hashes = np.empty(len(array), np.uint64)
    for first in range(0, len(array), _BLOCK):
        places = offsets[first : first + _BLOCK + 1].astype(np.int64)
        hashes[first : first + _BLOCK] = _fnv(places[:-1], np.diff(places), data)
    return mix(hashes)


def _fnv(starts: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], data: np.ndarray[Any, Any]) -> Hashes:
    """FNV-1a of the texts ``data[starts[i] : starts[i] + lengths[i]]``: one step for a byte position, over all texts
    that are so long. These are the first ones, since the longest stand in front; the work is that of the bytes."""
    order = np.argsort(-lengths, kind="stable")
    position, running = starts[order], np.full(len(starts), _FNV_START, np.uint64)
    longer = len(lengths) - np.cumsum(np.bincount(lengths))  # [longest + 1]: texts of more than so many bytes
    prime, byte = np.uint64(_FNV_PRIME), 0
    while byte < len(longer) and longer[byte] > _FEW:
        part = running[: longer[byte]]
        part ^= data[position[: longer[byte]]]
        part *= prime
        position += 1
        byte += 1
    for row in range(int(longer[byte]) if byte < len(longer) else 0):
        one = int(running[row])
        start = int(starts[order[row]])
        for value in data[start + byte : start + int(lengths[order[row]])].tobytes():
            one = ((one ^ value) * _FNV_PRIME) & _ALL_BITS
        running[row] = one
    hashes = np.empty_like(running)
    hashes[order] = running
    return hashes
