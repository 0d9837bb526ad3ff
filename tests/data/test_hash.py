"""``hash64`` against known answers and a transcription of its definition in plain Python."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from dien_kernels.data._hash import hash64

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def fnv(data: bytes) -> int:
    running = 0xCBF29CE484222325
    for byte in data:
        running = ((running ^ byte) * 0x100000001B3) & MASK
    return running


def slow(value: int | str | bytes) -> int:
    if isinstance(value, int):
        return mix(value & MASK)
    return mix(fnv(value.encode() if isinstance(value, str) else value))


INTEGERS = [0, 1, -1, 2**31, -(2**63), 2**63 - 1, 12345678901234567]
TEXTS = ["", "a", "foobar", "dž €", "🙂", "x" * 300, "B0001", "", "a\0b", "ab"]


def test_known_answers() -> None:
    """Published test vectors: FNV-1a of its authors; splitmix64 from seed 0, whose first state is the increment."""
    assert [fnv(b""), fnv(b"a"), fnv(b"foobar")] == [0xCBF29CE484222325, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden, (2 * golden) & MASK, (3 * golden) & MASK], np.uint64)
    assert hash64(pa.array(states)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash64(pa.array([0, 1, -1])).tolist() == [0, 6238072747940578789, 13029008266876403067]
    assert hash64(pa.array(["", "a"])).tolist() == [slow(""), 198367012849983736]


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.int8(), pa.uint8(), pa.uint32(), pa.uint64()])
def test_integers(kind: pa.DataType) -> None:
    values = [v for v in (*INTEGERS, 2**64 - 1) if _fits(v, kind)]
    assert len(values) > 1
    found = hash64(pa.array(values, kind))
    assert found.dtype == np.uint64
    assert found.tolist() == [slow(v) for v in values]


def _fits(value: int, kind: pa.DataType) -> bool:
    signed = pa.types.is_signed_integer(kind)
    low, high = (-(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1) if signed else (0, 2**kind.bit_width - 1)
    return low <= value <= high


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()])
def test_text(kind: pa.DataType) -> None:
    array = pa.array([t.encode() for t in TEXTS], pa.binary()).cast(kind)
    wanted = [slow(t) for t in TEXTS]
    assert hash64(array).tolist() == wanted
    assert hash64(array.slice(2, 5)).tolist() == wanted[2:7]
    chunked = pa.chunked_array([array.slice(0, 3), array.slice(3, 0), array.slice(3)])
    assert hash64(chunked).tolist() == wanted
    many = pa.concat_arrays([array] * 20)  # enough for the steps over all texts, not only one by one
    assert hash64(many).tolist() == wanted * 20


@pytest.mark.parametrize("values", [TEXTS, INTEGERS])
def test_dictionaries(values: list[int | str]) -> None:
    wanted = [slow(v) for v in values]
    array = pa.array(values).dictionary_encode()
    assert hash64(array).tolist() == wanted
    assert hash64(array.slice(1, 3)).tolist() == wanted[1:4]
    assert hash64(pa.chunked_array([array, array])).tolist() == wanted * 2
    unused = pa.DictionaryArray.from_arrays(pa.array([1, 1, 3]), pa.array([None, "a", "b", "foobar"]))
    assert hash64(unused).tolist() == [slow("a"), slow("a"), slow("foobar")]


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_nothing(kind: pa.DataType) -> None:
    for column in (pa.array([], kind), pa.chunked_array([], kind)):
        found = hash64(column)
        assert found.shape == (0,)
        assert found.dtype == np.uint64


def test_empty_strings_alone() -> None:
    assert hash64(pa.array(["", ""])).tolist() == [slow("")] * 2
    assert hash64(pa.array([""] * 1000)).tolist() == [slow("")] * 1000


def test_many_texts_of_many_lengths() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(32, 1000, n))) for n in rng.integers(0, 40, 2000)]
    assert hash64(pa.array(texts)).tolist() == [slow(t) for t in texts]
    blocks = pa.array([str(i) for i in range(70_000)])  # more than one block
    assert hash64(blocks)[::997].tolist() == [slow(str(i)) for i in range(0, 70_000, 997)]


def test_one_long_text_among_short_ones_costs_its_bytes_only() -> None:
    texts = pa.array(["a", "bc"] * 10_000 + ["x" * 1_000_000])
    tracemalloc.start()
    started = time.process_time()
    found = hash64(texts)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[-1] == slow("x" * 1_000_000)
    assert peak < 64 << 20, peak  # a matrix of texts and byte positions would have 20 GB
    assert seconds < 30


def test_what_cannot_be_hashed() -> None:
    with pytest.raises(ValueError, match="column must have no nulls to be hashed, got 1 of 2 values"):
        hash64(pa.array([1, None]))
    for column in (pa.array([1.5]), pa.array([True]), pa.array([[1]])):
        with pytest.raises(ValueError, match=f"must hold integers or text to be hashed, got {column.type}"):
            hash64(column)
