"""``Lookup``: finds the places of raw values in a column that does not change, by an index that is made once."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dien_kernels.data._arrow import Array
from dien_kernels.data._hash import Hashes, mix, text_buffers

_BLOCK = 1 << 15  # values looked up at a time: what stands between them and their places stays in the cache
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # of the first bytes of a word
_LONG = 256  # bytes; what a text has beyond them is hashed one text after another
_DENSE = 4  # a table with a slot for each integer may have so many slots a value


class Lookup:
    """The places, from 0, of n distinct values, which are int64 or text without nulls.

    Integers that lie close together have a table with a slot for every integer from the least to the greatest. All
    others are sorted by a hash h of 64 bits, ``mix`` of an integer and ``text_keys`` of text. ``first[b]`` is where the
    hashes with the leading bits b begin, of which there are about as many as values, so that a search goes over the few
    hashes of one bucket and not over all. Hashes of integers are one-to-one. Text with the same hash is compared, so a
    collision never gives a wrong place.

    Memory: at most 16 bytes a value beside the values; 12 to 20 bytes where they are sorted by a hash.
    """

    def __init__(self, values: pa.Array) -> None:
        self._values, self._table = values, None
        self._is_text = not pa.types.is_integer(values.type)
        size = len(values)
        if not self._is_text and size:
            numbers = values.to_numpy()
            low, high = int(numbers.min()), int(numbers.max())
            if high - low < _DENSE * size + 1024:
                self._low, self._span = np.uint64(low & (1 << 64) - 1), np.uint64(high - low + 1)
                self._table = np.full(high - low + 2, -1, np.int32)  # the last slot is that of all other integers
                self._table[numbers - low] = np.arange(size, dtype=np.int32)
                return
        hashes = text_keys(values) if self._is_text else mix(values.to_numpy().view(np.uint64))
        order = np.argsort(hashes, kind="stable")
        bits = max(size - 1, 1).bit_length()
        self._shift = np.uint64(64 - bits)
        counts = np.bincount((hashes >> self._shift).astype(np.int64), minlength=1 << bits)
        self._first = np.zeros(len(counts), np.int32)
        np.cumsum(counts[:-1], out=self._first[1:])
        self._steps = int(counts.max(initial=0)).bit_length()
        behind = 1 << self._steps  # hashes of no value, where a search may look
        self._hashes = np.concatenate([hashes[order], np.full(behind, (1 << 64) - 1, np.uint64)])
        self._places = np.concatenate([order.astype(np.int32), np.full(behind, -1, np.int32)])
        self._views = [(1 << k, self._hashes[(1 << k) - 1 :]) for k in reversed(range(self._steps))]

    def places(self, wanted: pa.Array) -> Array:
        """The place of every one of ``wanted``, int64 [m], which has the values' type and no nulls; -1: it has none."""
        found = np.empty(len(wanted), np.int64)
        for start in range(0, len(wanted), _BLOCK):
            block = wanted.slice(start, _BLOCK)
            if self._table is not None:
                away = block.to_numpy().view(np.uint64) - self._low  # modulo 2^64: what lies below becomes huge
                found[start : start + _BLOCK] = self._table[np.minimum(away, self._span).view(np.int64)]
            elif self._is_text:
                found[start : start + _BLOCK] = self._of_text(block)
            else:
                hashes = mix(block.to_numpy().view(np.uint64))
                slot = self._slots(hashes)
                found[start : start + _BLOCK] = np.where(self._hashes[slot] == hashes, self._places[slot], -1)
        return found

    def _slots(self, hashes: Hashes) -> Array:
        """int64: the first slot whose hash is not below, of all slots."""
        low: Array = self._first.take((hashes >> self._shift).view(np.int64)).astype(np.int64)
        for step, ahead in self._views:  # no bucket has more hashes than all the steps together
            low += (ahead.take(low) < hashes) * step
        return low

    def _of_text(self, wanted: pa.Array) -> Array:
        hashes = text_keys(wanted)
        slot = self._slots(hashes)
        found = np.full(len(wanted), -1, np.int64)
        rows = np.flatnonzero(self._hashes[slot] == hashes)
        while rows.size:
            place = self._places[slot[rows]]
            text = wanted if len(rows) == len(wanted) else wanted.take(pa.array(rows))
            same = pc.equal(text, self._values.take(pa.array(np.maximum(place, 0)))).to_numpy(zero_copy_only=False)
            same &= place >= 0
            found[rows[same]] = place[same]
            if same.all():
                break
            rows = rows[~same]  # other text of the same hash may follow
            slot[rows] += 1
            rows = rows[slot[rows] < len(self._hashes)]
            rows = rows[self._hashes[slot[rows]] == hashes[rows]]
        return found


def text_keys(array: pa.Array) -> Hashes:
    """64 bits for every text of a string or binary array without nulls, uint64 [n]; equal texts have equal ones.

    They are stored nowhere, so they need not be those of ``hash64``: they take eight bytes of a text at a time and are
    faster.
    """
    offsets, data = text_buffers(array)
    keys = np.empty(len(array), np.uint64)
    for first in range(0, len(array), _BLOCK):
        places = offsets[first : first + _BLOCK + 1].astype(np.int64)
        own = np.concatenate([data[places[0] : places[-1]], np.zeros(8, np.uint8)])
        keys[first : first + _BLOCK] = _keys(places[:-1] - places[0], np.diff(places), own)
    return keys


def _keys(starts: Array, lengths: Array, data: Array) -> Hashes:
    """``text_keys`` of the texts data[starts[i] : starts[i] + lengths[i]]; 8 bytes follow the last one in ``data``."""
    alike = lengths.min() == lengths.max()
    order = np.arange(lengths.size) if alike else np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    keys, words = lengths.astype(np.uint64), np.ndarray((data.size - 7,), np.uint64, data, 0, (1,))
    done, going = 0, int((lengths > 0).sum())  # the longest texts stand in front
    while going and done < _LONG:
        word = words[starts[:going] + done]
        word &= _MASKS[np.minimum(lengths[:going] - done, 8)]
        part = keys[:going]
        part ^= word
        part *= _ODD
        part ^= part >> np.uint64(32)
        done += 8
        going = going if alike and lengths[0] > done else int((lengths[:going] > done).sum())
    for row in range(going):
        rest = data[starts[row] + done : starts[row] + lengths[row]].tobytes()
        keys[row] ^= np.uint64(int.from_bytes(hashlib.blake2b(rest, digest_size=8).digest(), "little"))
    found = np.empty_like(keys)
    found[order] = mix(keys)
    return found


def as_values(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Raw values as an array of ``wanted``, int64 or string, in which null stands for what can be equal to none.

    Integers become the digits of text, and text that is an integer in digits (leading zeros are passed over) becomes
    it. Whole floats and decimals count as integers. A float so large that it may have been rounded to a whole number
    is null, as are NaN, uint64 beyond int64 and, for int64, all other numbers and texts. Bytes count as text in UTF-8.
    Of a dictionary the values are read.

    Raises ``ValueError`` for values of other types.
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return as_values(column.storage, wanted)
    if pa.types.is_dictionary(kind):
        return as_values(column.dictionary, wanted).take(column.indices)
    if kind == wanted:
        return column
    if pa.types.is_null(kind):
        return pa.nulls(len(column), wanted)
    if pa.types.is_boolean(kind) and pa.types.is_integer(wanted):
        return column.cast(wanted)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _of_numbers(column, wanted)
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        column = column.cast(pa.large_binary())
    text = (
        pa.types.is_binary(column.type)
        or pa.types.is_large_binary(column.type)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_boolean(kind)
    )
    if not text:
        raise ValueError(f"raw values must be integers or text, got {kind}")
    if pa.types.is_integer(wanted):
        return _of_digits(_cast_text(column, pa.large_string()), wanted)
    return _cast_text(column, wanted)


def as_column(raw: Any) -> pa.Array | pa.ChunkedArray:
    """A sequence or a NumPy array as an Arrow column. ``ValueError`` for what is none, and where integers and text are
    mixed."""
    if isinstance(raw, (str, bytes)) or not hasattr(raw, "__len__"):
        raise ValueError(f"raw values must be a sequence, got {type(raw).__name__}")
    try:
        return pa.array(raw)
    except OverflowError:  # an integer that no int64 holds is equal to none
        least, most = -(1 << 63), (1 << 63) - 1
        return pa.array([None if isinstance(v, int) and not least <= v <= most else v for v in raw])
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"raw values must be all integers or all text, got {list(raw)[:5]!r} ...: {error}") from error


def _cast_text(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Bytes that are no UTF-8 stay as they are, and are equal to no text."""
    return pc.cast(column, options=pc.CastOptions(wanted, allow_invalid_utf8=True))


def _of_numbers(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    kind = column.type
    if pa.types.is_uint64(kind):
        column = _where(pc.less(column, pa.scalar(1 << 63, kind)), column)
    elif pa.types.is_decimal(kind):
        whole = pc.equal(pc.round(column), column)
        text = pc.utf8_rtrim(pc.utf8_rtrim(_where(whole, column).cast(pa.string()), "0"), ".")
        text = pc.if_else(pc.match_substring(column.cast(pa.string()), "."), text, column.cast(pa.string()))
        column = _of_digits(_where(whole, text), pa.int64())
    elif pa.types.is_floating(kind):
        exact = {16: 1 << 11, 32: 1 << 24, 64: 1 << 53}[kind.bit_width]  # from there on not every integer is a float
        numbers = column.cast(pa.float64())
        whole = pc.and_(pc.equal(pc.floor(numbers), numbers), pc.less(pc.abs(numbers), pa.scalar(float(exact))))
        whole = pc.fill_null(whole, False)
        integers = _where(whole, numbers).cast(pa.int64())
        if pa.types.is_integer(wanted):
            return integers
        is_text = pc.and_(pc.is_finite(numbers), pc.invert(whole))
        return pc.coalesce(integers.cast(wanted), _where(is_text, column).cast(wanted))
    return column.cast(pa.int64()).cast(wanted)


def _of_digits(text: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Text in digits to integers; others, and integers beyond int64, become null."""
    digits = _where(pc.match_substring_regex(text, r"^-?0*[0-9]{1,19}$"), text)
    negative = pc.starts_with(digits, "-")
    size = pc.utf8_ltrim(pc.utf8_ltrim(digits, "-"), "0")
    amount = pc.if_else(pc.equal(size, ""), "0", size).cast(pa.uint64())  # 19 digits always fit
    amount = _where(pc.less(amount, pa.scalar(1 << 63, pa.uint64())), amount).cast(pa.int64())
    return pc.if_else(negative, pc.negate(amount), amount).cast(wanted)


def _where(mask: pa.Array, values: pa.Array) -> pa.Array:
    """The values where ``mask`` is true, else null."""
    return pc.if_else(mask, values, pa.scalar(None, values.type))
