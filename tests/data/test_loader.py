"""The loader: exactly the samples of the definition, and batches that are pure functions of their number."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_logs import TINY, made, rows_of, slow_samples

from dien_kernels.batch import Batch
from dien_kernels.data import Loader, Prepared, synthetic


def same(a: object, b: object) -> bool:
    if isinstance(a, Batch) and isinstance(b, Batch):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is None and b is None or (isinstance(a, int) and a == b)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    log = synthetic(users=150, items=200, categories=6, events=2000)
    log = log.append_column("device", pa.array(np.arange(log.num_rows) % 3))
    log = log.append_column("price", pa.array(np.arange(log.num_rows) / 7))
    columns = {"user_fields": ["device"], "dense": ["price"]}
    options = {"targets": "every", "fractions": (0.6, 0.2, 0.2), "negatives": 2, "columns": columns}
    return made(log, tmp_path_factory.mktemp("data") / "p", **options)


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    row = st.tuples(st.sampled_from("abcde"), st.integers(1, 12), st.integers(0, 9), st.integers(0, 1))
    # Users c and d with an item of their own each keep anybody from owning everything.
    return [
        *draw(st.lists(row, min_size=1, max_size=40)),
        ("p", 100, 1, 1),
        ("p", 101, 2, 1),
        ("q", 102, 1, 0),
    ]


@settings(max_examples=60, deadline=None)
@given(
    log=logs(),
    every=st.booleans(),
    labelled=st.booleans(),
    max_length=st.sampled_from([1, 2, 5, 100, None]),
    batch_size=st.integers(3, 9),
    shuffle=st.booleans(),
    bucket=st.booleans(),
    share=st.booleans(),
)
def test_batches_decode_to_the_samples_of_the_definition(
    log: list[tuple[Any, ...]],
    every: bool,
    labelled: bool,
    max_length: int | None,
    batch_size: int,
    shuffle: bool,
    bucket: bool,
    share: bool,
) -> None:
    users, items, times, labels = zip(*log, strict=True)
    category = [f"c{item % 3}" for item in items]
    table = pa.table({"user": users, "item": items, "timestamp": times, "label": labels, "category": category})
    with tempfile.TemporaryDirectory() as folder:
        options = {"targets": "every" if every else "last", "labels": "given" if labelled else "next"}
        prepared = made(table, Path(folder) / "p", **options)
        loader = Loader(
            prepared,
            batch_size=batch_size,
            max_length=max_length,
            negatives=2,
            shuffle=shuffle,
            bucket=bucket,
            share_histories=share,
            seed=3,
        )
        found: Counter[Any] = Counter()
        own = {user: {row[1] for row in log if row[0] == user} for user in users}
        for batch in loader.epoch(1):
            batch.check(prepared.schema)
            assert 1 <= batch.rows <= batch_size
            lengths = batch.offsets.diff()
            assert batch.rows_total == int((lengths if batch.history_of is None else lengths[batch.history_of]).sum())
            rows = list(rows_of(prepared, batch))
            if labelled:
                found.update(rows)
                continue
            for start in range(0, len(rows), 3):  # a positive and its negatives
                user, history, _, label = rows[start]
                assert label == 1
                found[rows[start]] += 1
                for other in rows[start + 1 : start + 3]:
                    assert other[:2] == (user, history)
                    assert other[3] == 0
                    assert other[2] not in own[user]
    expected = slow_samples(log, every=every, given=labelled, max_length=max_length or 1000)
    assert found == Counter(expected)


def test_newest_behaviours_are_kept_oldest_first(tmp_path: Path) -> None:
    prepared = made(TINY, tmp_path / "p")
    loader = Loader(prepared, batch_size=2, max_length=2, shuffle=False, bucket=False)
    rows = [row for batch in loader.epoch(0) for row in rows_of(prepared, batch) if row[3] == 1]
    assert rows == [("u1", ("z", "x"), "w", 1.0), ("u2", ("x",), "y", 1.0)]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_stream_is_the_same_with_workers_and_when_resumed(prepared: Prepared, split: str) -> None:
    loader = Loader(prepared, split, batch_size=24, seed=7)
    alone = list(loader.epoch(2))
    assert len(alone) == loader.steps(2) == len(loader) > 3
    with_workers = Loader(prepared, split, batch_size=24, seed=7, workers=2)
    for start in (0, 2):
        again = list(with_workers.epoch(2, start))
        assert all(same(a, b) for a, b in zip(alone[start:], again, strict=True))
    fresh = Loader(Prepared.open(prepared.path), split, batch_size=24, seed=7)
    last = len(alone) - 1
    assert same(fresh.batch(2, last), alone[last])  # without the batches before it
    fresh.batch(0, 0)
    assert same(fresh.batch(2, 1), alone[1])
    assert list(loader.epoch(2, start=len(alone))) == []


def test_random_state_of_the_process_is_neither_read_nor_changed(prepared: Prepared) -> None:
    loader = Loader(prepared, batch_size=32)
    torch.manual_seed(0)
    np.random.seed(0)
    first, before = loader.batch(0, 0), torch.get_rng_state()
    torch.manual_seed(1)
    np.random.seed(1)
    assert same(loader.batch(0, 0), first)
    torch.manual_seed(0)
    loader.batch(0, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_and_seeds_differ_in_order_and_negatives(prepared: Prepared) -> None:
    loader = Loader(prepared, batch_size=32)
    first, second = loader.batch(0, 0), loader.batch(1, 0)
    assert not same(first.target, second.target)
    assert not same(first.target, Loader(prepared, batch_size=32, seed=1).batch(0, 0).target)
    still = Loader(prepared, batch_size=32, shuffle=False)
    one, two = still.batch(0, 0), still.batch(1, 0)
    positive = one.label == 1
    assert same(one.history, two.history)
    assert torch.equal(one.target["item"][positive], two.target["item"][positive])
    assert not torch.equal(one.target["item"], two.target["item"])
    assert not same(one.negatives, two.negatives)


def test_evaluation_has_fixed_rows_in_any_arrangement(prepared: Prepared) -> None:
    def rows(**options: Any) -> Counter[Any]:
        loader = Loader(prepared, "test", **options)
        return Counter(row for batch in loader.epoch(0) for row in rows_of(prepared, batch))

    reference = rows(batch_size=30)
    assert sum(reference.values()) == 3 * prepared.split_size("test")  # negatives=2 of prepare, not of the loader
    assert reference == rows(batch_size=7, seed=5, bucket=False, negatives=1) == rows(batch_size=300, shuffle=True)
    batch = Loader(prepared, "test", batch_size=30).batch(4, 0)
    assert batch.negatives is None
    assert same(batch, Loader(prepared, "test", batch_size=30, seed=9).batch(0, 0))


def test_histories_of_a_batch_are_of_similar_length(prepared: Prepared) -> None:
    def spread(bucket: bool) -> float:
        loader = Loader(prepared, batch_size=32, bucket=bucket)
        return float(np.mean([batch.offsets.diff().float().std() for batch in loader.epoch(0)]))

    assert spread(True) < 0.2 * spread(False)
    lengths = [float(b.offsets.diff().float().mean()) for b in Loader(prepared, batch_size=32).epoch(0)]
    assert lengths != sorted(lengths)  # but the batches come in any order


def test_shared_and_copied_histories_are_the_same_rows(prepared: Prepared) -> None:
    shared = Loader(prepared, batch_size=30, negatives=2).batch(0, 3)
    copied = Loader(prepared, batch_size=30, negatives=2, share_histories=False).batch(0, 3)
    assert (shared.offsets.numel() - 1, copied.offsets.numel() - 1) == (10, 30)
    assert copied.history_of is None
    assert copied.rows_total == shared.rows_total
    assert list(rows_of(prepared, shared)) == list(rows_of(prepared, copied))
    assert shared.negatives is not None
    assert copied.negatives is not None
    for row in (0, 1, 29):
        a, b = (int(shared.offsets[row // 3 + i]) for i in (0, 1))
        c, d = (int(copied.offsets[row + i]) for i in (0, 1))
        assert torch.equal(shared.negatives["item"][a:b], copied.negatives["item"][c:d])


def test_impressions_between_two_clicks_share_a_history(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user": [1] * 6,
            "item": [1, 2, 3, 4, 5, 6],
            "timestamp": [1, 2, 2, 2, 3, 3],
            "label": [1, 0, 1, 0, 0, 0],
        }
    )
    prepared = made(table, tmp_path / "p", labels="given")
    batch = Loader(prepared, batch_size=6, shuffle=False).batch(0, 0)
    assert batch.history_of is not None
    assert batch.offsets.tolist() == [0, 0, 1, 3]
    assert batch.history_of.tolist() == [0, 1, 1, 1, 2, 2]


def test_fields_of_a_row_come_from_the_target_s_event(prepared: Prepared) -> None:
    batch = Loader(prepared, "valid", batch_size=30, shuffle=False, bucket=False).batch(0, 0)
    batch.check(prepared.schema)
    part = prepared.split("valid")
    assert batch.users["device"].tolist() == np.repeat(part.users["device"][:10], 3).tolist()
    assert batch.dense is not None
    assert batch.dense[:, 0].tolist() == np.repeat(part.dense["price"][:10], 3).tolist()


def test_bad_arguments(prepared: Prepared) -> None:
    for options, words in (
        ({"batch_size": 2, "negatives": 2}, "batch_size counts rows and must be at least 3"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"max_length": 0}, "max_length must be an integer of at least 1"),
        ({"auxiliary_negatives": -1}, "auxiliary_negatives must be"),
        ({"seed": True}, "seed must be an integer"),
        ({"workers": 1.5}, "workers must be an integer"),
        ({"split": "dev"}, "split must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            Loader(prepared, **options)  # type: ignore[arg-type]
    loader = Loader(prepared, batch_size=32)
    with pytest.raises(ValueError, match="index must lie between 0 and"):
        loader.batch(0, len(loader))
    with pytest.raises(ValueError, match="start must lie between 0 and"):
        loader.epoch(0, start=-1)
