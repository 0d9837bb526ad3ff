"""``Vocabulary.encode`` against a plain dictionary, over every kind of raw value."""

from __future__ import annotations

import datetime
import pickle
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dien_kernels.data import _lookup
from dien_kernels.data.vocabulary import Vocabulary


def vocabulary(values: Any, kind: pa.DataType | None = None) -> Vocabulary:
    array = pa.array(values, kind)
    return Vocabulary(array, np.zeros(len(array) + 1, np.int64))


DENSE = [5, -3, 0, 7, 1]
SPARSE = [5, -(2**63), 2**63 - 1, 0, -1, 10**15]
TEXT = ["17", "x", "", "dž €", "x" * 100, "-4", "1.5", "007"]


@pytest.mark.parametrize("values", [DENSE, SPARSE, TEXT, [], [9]], ids=["dense", "sparse", "text", "none", "one"])
def test_every_value_has_its_id(values: list[Any]) -> None:
    found = vocabulary(values, None if values else pa.int64()).encode(pa.array(values))
    assert found.dtype == np.int64
    assert found.tolist() == list(range(1, len(values) + 1))


@pytest.mark.parametrize("dense", [True, False])
def test_many_integers(dense: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.permutation(50_000) - 20_000 if dense else np.unique(rng.integers(-(2**62), 2**62, 50_000))
    vocab, known = vocabulary(values), {int(v): i + 1 for i, v in enumerate(values)}
    asked = np.concatenate([rng.choice(values, 70_000), rng.integers(-60_000, 60_000, 1000), [-(2**63), 2**63 - 1]])
    assert vocab.encode(asked).tolist() == [known.get(int(v), 0) for v in asked]


def test_much_text() -> None:
    rng = np.random.default_rng(0)
    values = [f"B{i:0{int(w)}d}" for i, w in enumerate(rng.integers(1, 30, 20_000))]
    vocab, known = vocabulary(values), {v: i + 1 for i, v in enumerate(values)}
    asked = [values[i] for i in rng.integers(0, len(values), 70_000)] + ["", "B", "B0" * 20, "unknown"]
    wanted = [known.get(v, 0) for v in asked]
    assert vocab.encode(asked).tolist() == wanted
    assert vocab.encode(pa.chunked_array([asked[:10], asked[10:]])).tolist() == wanted
    assert vocab.encode(pa.array(asked).dictionary_encode()).tolist() == wanted
    assert vocab.encode(pa.array(asked).slice(3)).tolist() == wanted[3:]


@pytest.mark.parametrize(
    "raw, wanted",
    [
        ([5, None, 8], [1, 0, 0]),
        (["5", "-3", "+5", "5.0", " 5", "", None, "99999999999999999999", "x"], [1, 2, 0, 0, 0, 0, 0, 0, 0]),
        ([5.0, 1.5, float("nan"), None, float("inf"), -3.0, 0.0, 1e300], [1, 0, 0, 0, 0, 2, 3, 0]),
        ([Decimal("5.00"), Decimal("5.01"), None, Decimal("-3"), Decimal(10**25), Decimal(0)], [1, 0, 0, 2, 0, 3]),
        ([True, False, None], [5, 3, 0]),
        ([b"5", b"\xff", None], [1, 0, 0]),
        ([2**64 - 3, 5], [0, 1]),
        ([2**70, 5, -(2**70)], [0, 1, 0]),
        ([None, None], [0, 0]),
        ([], []),
        (pa.array([5, 8, -3], pa.int8()), [1, 0, 2]),
        (pa.array([5, 2**64 - 3], pa.uint64()), [1, 0]),
        (pa.array(["5", "7"], pa.string_view()), [1, 4]),
        (pa.array(["5", "7"], pa.large_string()), [1, 4]),
        (pa.array([5, 7, 1.5], pa.float32()), [1, 4, 0]),
        (pa.array([5, None, 8, 5]).dictionary_encode(), [1, 0, 0, 1]),
        (pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0]), pa.array([5, None])), [1, 0, 0, 1]),
        (pa.DictionaryArray.from_arrays(pa.array([2]), pa.array(["5", "7", "-3"])), [2]),
        (np.array([5, 7]), [1, 4]),
        (np.array(["5", "8"]), [1, 0]),
    ],
)
def test_what_integers_are_found_by(raw: Any, wanted: list[int]) -> None:
    assert vocabulary(DENSE).encode(raw).tolist() == wanted


@pytest.mark.parametrize(
    "raw, wanted",
    [
        ([17, -4, 4, None], [1, 6, 0, 0]),
        ([17.0, -4.0, 1.5, float("nan"), float("inf"), None], [1, 6, 7, 0, 0, 0]),
        ([Decimal("17.0"), Decimal("1.5"), None], [1, 0, 0]),
        ([b"17", b"x", b"\xff", "dž €".encode(), None], [1, 2, 0, 4, 0]),
        (pa.array(["17", "", None], pa.string_view()), [1, 3, 0]),
        (pa.array([b"17", b"", None], pa.binary_view()), [1, 3, 0]),
        (pa.array([17, 2**64 - 1], pa.uint64()), [1, 0]),
        (pa.array([7]), [0]),  # not by other digits than its own
    ],
)
def test_what_text_is_found_by(raw: Any, wanted: list[int]) -> None:
    assert vocabulary(TEXT).encode(raw).tolist() == wanted


def test_digits_of_the_greatest_integers() -> None:
    asked = [str(v) for v in (*SPARSE, 2**63, 2**64)] + ["0" * 30 + "5"]
    assert vocabulary(SPARSE).encode(asked).tolist() == [1, 0, 3, 4, 5, 6, 0, 0, 1]


def test_a_float_that_may_have_been_rounded_is_unknown() -> None:
    """2^53 + 1 has no float: as one it is 2^53, another item."""
    vocab = vocabulary([2**53, 2**53 - 1, 2**24 - 1, 2**24])
    assert vocab.encode([float(2**53 + 1), float(2**53 - 1)]).tolist() == [0, 2]
    assert vocab.encode(pa.array([2.0**24, 2.0**24 - 1], pa.float32())).tolist() == [0, 3]


def test_text_with_the_same_hash_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(column: pa.Array) -> np.ndarray[Any, Any]:
        return np.array([len(text) % 3 - 1 for text in column.to_pylist()]).astype(np.uint64)

    monkeypatch.setattr(_lookup, "text_keys", poor)
    values = [f"{i:0{i % 9}d}x" for i in range(300)]
    vocab, known = vocabulary(values), {v: i + 1 for i, v in enumerate(values)}
    asked = [*values, "no", "n", "none", *values[::7]]
    assert vocab.encode(asked).tolist() == [known.get(v, 0) for v in asked]


def test_the_key_of_a_text_is_its_own() -> None:
    alphabet = np.random.default_rng(3).integers(97, 123, 4000, dtype=np.uint8).tobytes().decode()
    texts = [
        "",
        "é",
        *(alphabet[start : start + size] for size in (*range(1, 40), 255, 256, 257, 900) for start in (0, 7)),
    ]
    texts += [texts[-1][:-1] + "#", "#" + texts[-1][1:], texts[-1] + "\0", "\0", "\0\0"]  # alike but for one byte
    together = _lookup.text_keys(pa.array(texts)).tolist()
    assert len(set(together)) == len(texts)
    assert [int(_lookup.text_keys(pa.array([text]))[0]) for text in texts] == together
    sliced = pa.array(["in front", *texts, "behind"], pa.large_string()).slice(1, len(texts))
    assert _lookup.text_keys(sliced).tolist() == together


def test_values_that_are_neither_integers_nor_text() -> None:
    for raw in ([[1]], [datetime.date(2026, 1, 1)], [{"a": 1}]):
        with pytest.raises(ValueError, match="raw values must be integers or text, got (list|date|struct)"):
            vocabulary(DENSE).encode(raw)
    with pytest.raises(ValueError, match=r"raw values must be all integers or all text, got \[1, 'a'\]"):
        vocabulary(DENSE).encode([1, "a"])


def test_a_pickle_has_no_index() -> None:
    vocab = vocabulary([f"B{i:09d}" for i in range(10_000)])
    before = len(pickle.dumps(vocab))
    assert vocab.encode(["B000000003"]).tolist() == [4]
    assert len(pickle.dumps(vocab)) == before
    assert pickle.loads(pickle.dumps(vocab)).encode(["B000000003", "C"]).tolist() == [4, 0]


def test_threads_share_one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(_lookup.Lookup):
        def __init__(self, values: pa.Array) -> None:
            made.append(1)
            time.sleep(0.05)
            super().__init__(values)

    monkeypatch.setattr("dien_kernels.data.vocabulary.Lookup", Counted)
    vocab = vocabulary(SPARSE)
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(vocab.encode(SPARSE).tolist())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1, 2, 3, 4, 5, 6]] * 6
    assert len(made) == 1


def test_a_call_costs_its_values_and_not_the_vocabulary() -> None:
    values = np.unique(np.random.default_rng(0).integers(-(2**62), 2**62, 1_000_000))
    vocab, asked = vocabulary(values), values[::5000]
    vocab.encode(asked)
    seconds = []
    for _ in range(20):
        started = time.process_time()
        vocab.encode(asked)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.002  # 0.1 ms; one search of all values takes 100 ms


def test_files(tmp_path: Path) -> None:
    written = Vocabulary(pa.array(TEXT), np.arange(len(TEXT) + 1))
    written.write(tmp_path / "v.parquet")
    read = Vocabulary.read(tmp_path / "v.parquet")
    assert read.values == written.values
    assert read.counts.tolist() == written.counts.tolist()
    assert read.encode(TEXT).tolist() == list(range(1, len(TEXT) + 1))
