"""The loader: exactly the samples of the definition, and batches that are pure functions of their number."""

from __future__ import annotations

import pickle
import shutil
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
from small_folders import User, given_user, next_user, write_folder
from small_logs import rows_of, slow_samples

from dien_kernels import batch as batch_room
from dien_kernels.batch import Batch, Schema
from dien_kernels.data import Loader, Prepared, verify

SCHEMA = Schema({"item": 201, "category": 7}, {"device": 4}, ("price",))
CATEGORY = [0, *(1 + n % 6 for n in range(200))]


def same(a: object, b: object) -> bool:
    if isinstance(a, Batch) and isinstance(b, Batch):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch) if f.compare)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is None and b is None or (isinstance(a, int) and a == b)


def random_users(count: int) -> list[User]:
    random = np.random.default_rng(0)
    users = []
    for name in range(count):
        size = int(random.geometric(0.07))
        values = {
            "user__device": random.integers(0, 4, size).tolist(),
            "dense__price": random.random(size).astype(np.float32).tolist(),
        }
        items = random.integers(1, 201, size).tolist()
        users.append(
            next_user(name, items, list(range(size)), ["train", "train", "train", "valid"][name % 4], **values)
        )
    return users


def cut(users: list[Any], *sizes: int) -> list[list[Any]]:
    """Row groups of these sizes."""
    ends = np.cumsum([0, *sizes])
    return [users[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    users = random_users(240)
    shards = [cut(users[:130], 60, 70), cut(users[130:], 3, 47, 60)]
    return write_folder(
        tmp_path_factory.mktemp("data") / "p", shards, SCHEMA, item_fields={"category": CATEGORY}, raw_items=200
    )


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    row = st.tuples(st.sampled_from("abcde"), st.integers(1, 12), st.integers(0, 9), st.integers(0, 1))
    # Users p and q with items of their own keep anybody from owning everything.
    return [*draw(st.lists(row, min_size=1, max_size=40)), ("p", 13, 1, 1), ("p", 14, 2, 1), ("q", 15, 1, 0)]


def folder_of(log: list[tuple[Any, ...]], path: Path, *, every: bool, labelled: bool, large: bool) -> Prepared:
    """The folder of a log of (user, item, time, label), in two shards, all for training."""
    users = []
    for name in sorted({row[0] for row in log}):
        mine = sorted((row for row in log if row[0] == name), key=lambda row: row[2])
        if labelled:
            users.append(given_user(name, [row[1:] for row in mine]))
        else:
            users.append(next_user(name, [row[1] for row in mine], [row[2] for row in mine]))
            if not every and len(mine) > 1:
                users[-1].columns["train_from"] = len(mine) - 1
    category = [0, *(1 + item % 3 for item in range(1, 16))]
    schema = Schema({"item": 16, "category": 4})
    shards = [[users[:1]], [users[1:2], users[2:]]]
    return write_folder(path, shards, schema, labels="given" if labelled else "next",
                        item_fields={"category": category}, large=large)  # fmt: skip


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
    drop=st.booleans(),
    large=st.booleans(),
    world=st.integers(1, 3),
    block=st.sampled_from([1, 6, 1 << 21]),
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
    drop: bool,
    large: bool,
    world: int,
    block: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepared = folder_of(log, Path(folder) / "p", every=every, labelled=labelled, large=large)
        assert verify(prepared) == []
        found: Counter[Any] = Counter()
        own = {row[0]: {f"item{other[1]}" for other in log if other[0] == row[0]} for row in log}
        for rank in range(world):
            loader = Loader(
                prepared,
                batch_size=batch_size,
                max_length=max_length,
                negatives=2,
                shuffle=shuffle,
                bucket=bucket,
                block=block,
                share_histories=share,
                seed=3,
                repeats="drop" if drop else "keep",
                rank=rank,
                world=world,
            )
            batches = list(loader.epoch(1))
            assert len(batches) == len(loader)
            for batch in batches:
                batch.check(prepared.schema)
                assert batch.rows <= batch_size
                assert batch.rows or world > 1
                lengths = batch.offsets.diff()
                total = int((lengths if batch.history_of is None else lengths[batch.history_of]).sum())
                assert batch.rows_total == total
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
    named = [(row[0], f"item{row[1]}", *row[2:]) for row in log]
    whole = slow_samples(named, every=every, given=labelled, max_length=1000)
    kept = [row for row in whole if not (drop and row[2] in row[1])]
    assert found == Counter((user, past[-(max_length or 1000) :], item, label) for user, past, item, label in kept)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_sample_once_and_bit_equal_when_resumed(prepared: Prepared, split: str, world: int, workers: int) -> None:
    """Ranks and workers together have each sample once; any batch can be made again, and the stream resumed there."""
    found: Counter[Any] = Counter()
    steps = set()
    for rank in range(world):
        options = {"batch_size": 48, "seed": 7, "rank": rank, "world": world, "block": 1}
        loader = Loader(prepared, split, workers=workers, **options)  # type: ignore[arg-type]
        alone = list(loader.epoch(2))
        steps.add(len(alone))
        assert len(alone) == loader.steps(2) == len(loader) > 3
        for batch in alone:
            assert batch.group is not None
            assert batch.label is not None
            positive = batch.label == 1
            lengths = batch.offsets.diff() if batch.history_of is None else batch.offsets.diff()[batch.history_of]
            found.update(zip(batch.group[positive].tolist(), lengths[positive].tolist(), strict=True))
        fresh = Loader(Prepared.open(prepared.path), split, **options)  # type: ignore[arg-type]
        fresh.batch(0, 0)
        for number in reversed(range(len(alone))):  # without the batches before it
            assert same(fresh.batch(2, number), alone[number])
        for start in {1, len(alone) // 2, len(alone) - 1}:
            again = list(loader.epoch(2, start))
            assert all(same(a, b) for a, b in zip(alone[start:], again, strict=True))
        assert list(loader.epoch(2, start=len(alone))) == []
    assert len(steps) == 1
    expected: Counter[Any] = Counter()
    for user in range(prepared.meta["counts"]["users"]):
        size = prepared.history(user).size
        if user % 4 == 3 and split == "valid" and size > 1:
            expected[user, min(size - 1, 100)] += 1
        elif user % 4 != 3 and split == "train":
            expected.update((user, min(place, 100)) for place in range(1, size))
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", torch.multiprocessing.get_all_start_methods())
def test_workers_of_every_start_method(prepared: Prepared, method: str) -> None:
    loader = Loader(prepared, batch_size=512, workers=2, start_method=method)
    plain = Loader(prepared, batch_size=512)
    assert all(same(a, b) for a, b in zip(loader.epoch(1), plain.epoch(1), strict=True))


@pytest.mark.parametrize("repeats", ["keep", "drop"])
def test_a_worker_gets_a_path(prepared: Prepared, repeats: str) -> None:
    loader = Loader(prepared, batch_size=32, repeats=repeats, workers=2)
    batches = list(loader.epoch(0))
    loader.batch(0, 0)
    pickled = pickle.dumps(loader)
    assert len(pickled) < 10_000
    again = pickle.loads(pickled)
    assert len(again) == len(loader)
    assert same(again.batch(0, 3), batches[3])


def test_held_arrays_are_those_of_two_units(prepared: Prepared) -> None:
    """Nothing that is held has an entry for each sample of the folder."""
    loader = Loader(prepared, batch_size=32, block=1)
    list(loader.epoch(0))
    assert len(loader._kept) == 2
    largest = max(unit.behaviours for unit in prepared.units) + 1
    assert largest < 0.5 * prepared.split_size("train")
    held = [value for kept in loader._kept.values() for part in (kept.rows.unit, kept.rows, kept.rows.owned)
            for value in vars(part).values()]  # fmt: skip
    arrays = [value for value in held if isinstance(value, np.ndarray)]
    assert len(arrays) > 10
    assert max(array.size for array in arrays) <= largest
    assert not [v for v in vars(prepared).values() if isinstance(v, np.ndarray) and v.size > 201]


def test_state_says_where_to_go_on(prepared: Prepared) -> None:
    loader = Loader(prepared, batch_size=32, workers=2)
    whole = list(loader.epoch(1))
    running = loader.epoch(1)
    assert [same(next(running), batch) for batch in whole[:4]] == [True] * 4
    state = pickle.loads(pickle.dumps(loader.state))
    assert (state["epoch"], state["index"]) == (1, 4)
    other = Loader(Prepared.open(prepared.path), batch_size=32)
    assert all(same(a, b) for a, b in zip(other.resume(state), whole[4:], strict=True))
    for options, words in (({"seed": 1}, "seed must be 0, as it was"), ({"max_length": 9}, "max_length must be 100")):
        with pytest.raises(ValueError, match=words):
            Loader(prepared, batch_size=32, **options).resume(state)  # type: ignore[arg-type]


def test_lost_and_damaged_shards_are_named_in_the_middle_of_an_epoch(prepared: Prepared, tmp_path: Path) -> None:
    for workers in (0, 2):
        path = tmp_path / f"p{workers}"
        shutil.copytree(prepared.path, path)
        running = Loader(Prepared.open(path), batch_size=32, workers=workers, shuffle=False, block=1).epoch(0)
        next(running)
        file = path / "shards" / "part-00001.parquet"
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(
            ValueError, match=r"^[^\n]* is damaged: shards/part-00001.parquet is missing; prepare it again$"
        ):
            list(running)
        file.write_bytes(whole[:200] + bytes(200) + whole[400:])
        with pytest.raises(ValueError, match=r"is damaged: shards/part-00001.parquet"):
            list(Loader(Prepared._open(path, digests=False), batch_size=32, shuffle=False).epoch(0))


def test_a_folder_prepared_anew_is_noticed_by_workers(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "p"
    shutil.copytree(prepared.path, path)
    pickled = pickle.dumps(Loader(Prepared.open(path), batch_size=32))
    shutil.rmtree(path)
    write_folder(path, [[random_users(5)]], SCHEMA, item_fields={"category": CATEGORY})
    with pytest.raises(ValueError, match="was prepared anew or has grown while it was in use"):
        pickle.loads(pickled)


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


def test_the_samples_of_a_block_are_shuffled_together(prepared: Prepared) -> None:
    """Blocks of one unit keep the users of different units apart, one large block mixes them; the rows are the same."""
    ends = np.cumsum([unit.users for unit in prepared.units])
    for split, fixed in (("train", False), ("valid", True)):
        found = []
        for block in (1, 1 << 21):
            loader = Loader(prepared, split, batch_size=64, block=block, bucket=False, auxiliary_negatives=0)
            batches = list(loader.epoch(0))
            units = [len(np.unique(np.searchsorted(ends, batch.group.numpy(), side="right"))) for batch in batches]  # type: ignore[union-attr]
            assert max(units) == 1 if block == 1 else max(units) > 2
            rows = Counter(row for batch in batches for row in rows_of(prepared, batch))
            found.append(rows if fixed else Counter({row: n for row, n in rows.items() if row[3] == 1}))
        assert found[0] == found[1]  # the fixed negatives are those of the folder
    with pytest.raises(ValueError, match="block must be 1, as it was in the state, got 2097152"):
        Loader(prepared).resume(Loader(prepared, block=1).state)


def test_epochs_and_seeds_differ_in_order_and_negatives(prepared: Prepared) -> None:
    loader = Loader(prepared, batch_size=32, block=1)
    first, second = loader.batch(0, 0), loader.batch(1, 0)
    assert not same(first.target, second.target)
    assert not same(first.target, Loader(prepared, batch_size=32, seed=1, block=1).batch(0, 0).target)
    blocks = {tuple(loader._plan_of(epoch).blocks.tolist()) for epoch in range(9)}
    assert len(blocks) > 5
    still = Loader(prepared, batch_size=32, shuffle=False)
    one, two = still.batch(0, 0), still.batch(1, 0)
    positive = one.label == 1
    assert same(one.history, two.history)
    assert torch.equal(one.target["item"][positive], two.target["item"][positive])
    assert not torch.equal(one.target["item"], two.target["item"])
    assert not same(one.negatives, two.negatives)


def test_histories_of_a_batch_are_of_similar_length(prepared: Prepared) -> None:
    def spread(bucket: bool) -> float:
        loader = Loader(prepared, batch_size=32, bucket=bucket)
        return float(np.mean([batch.offsets.diff().float().std(correction=0) for batch in loader.epoch(0)]))

    assert spread(True) < 0.2 * spread(False)
    lengths = [float(b.offsets.diff().float().mean()) for b in Loader(prepared, batch_size=32).epoch(0)]
    assert lengths != sorted(lengths)  # but the batches come in any order


def test_ranks_have_batches_of_similar_length_at_a_time(prepared: Prepared) -> None:
    ranks = [list(Loader(prepared, batch_size=32, rank=rank, world=3).epoch(0)) for rank in range(3)]
    means = np.array([[float(b.offsets.diff().float().mean()) for b in batches] for batches in ranks])
    assert np.isfinite(means).all()
    assert np.abs(means - means.mean(0)).mean() < 0.1 * means.std()


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
    rows = [(1, 1, 1), (2, 2, 0), (3, 2, 1), (4, 2, 0), (5, 3, 0), (6, 3, 0)]
    prepared = write_folder(tmp_path / "p", [[[given_user(1, rows)]]], Schema({"item": 7}), labels="given")
    batch = Loader(prepared, batch_size=6, shuffle=False).batch(0, 0)
    assert batch.history_of is not None
    assert batch.offsets.tolist() == [0, 0, 1, 3]
    assert batch.history_of.tolist() == [0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("split, first", [("train", 0), ("valid", 3)])
def test_fields_of_a_row_come_from_the_target_s_event(prepared: Prepared, split: str, first: int) -> None:
    batch = Loader(prepared, split, batch_size=1000, shuffle=False, bucket=False, negatives=2).batch(0, 0)
    batch.check(prepared.schema)
    columns = next(user for user in random_users(240)[first:] if len(user.columns["item"]) > 1).columns
    places = range(1, len(columns["item"])) if split == "train" else [len(columns["item"]) - 1]
    rows = [place for place in places for _ in range(3)]
    assert batch.dense is not None
    assert batch.users["device"].tolist()[: len(rows)] == [columns["user.device"][place] for place in rows]
    assert batch.dense[: len(rows), 0].tolist() == [columns["dense.price"][place] for place in rows]


def test_missing_numbers_are_handed_on_where_the_folder_knows_their_mean(tmp_path: Path) -> None:
    nan = float("nan")
    users = [next_user(1, [1, 2, 3], [1, 2, 3], dense__a=[0.0, nan, 7.0], dense__b=[0.0, nan, 8.0])]
    known = {"b": {"mean": 1.0, "std": 1.0, "min": 0.0, "max": 1.0, "missing": 0.5, "log": False, "quantiles": []}}
    prepared = write_folder(tmp_path / "p", [[users]], Schema({"item": 9}, dense=("a", "b")), dense=known)
    dense = Loader(prepared, batch_size=4, bucket=False, shuffle=False).batch(0, 0).dense
    assert dense is not None
    assert dense[::2].nan_to_num(-1).tolist() == [[0, -1], [7, 8]]


def test_items_with_several_values(tmp_path: Path) -> None:
    genres = [[], [1], [2, 3], [], [3, 1]]
    schema = Schema({"item": 5, "genre": 4}, several={"genre": 2})
    users = [next_user(1, [1, 2, 3], [1, 2, 3])]
    prepared = write_folder(tmp_path / "p", [[users]], schema, item_fields={"genre": genres})
    assert prepared.item_fields["genre"].tolist() == [[0, 0], [1, 0], [2, 3], [0, 0], [3, 1]]
    batch = Loader(prepared, batch_size=4, bucket=False, shuffle=False).batch(0, 0)
    assert batch.history["genre"].tolist() == [[1, 0], [1, 0], [2, 3]]
    assert batch.target["genre"][::2].tolist() == [[2, 3], [0, 0]]
    assert batch.negatives is not None
    assert tuple(batch.negatives["genre"].shape) == (3, 1, 2)


richer = pytest.mark.skipif(not hasattr(batch_room, "Sequence"), reason="Batch has no behaviour fields yet")


@richer
def test_fields_and_numbers_of_behaviours(tmp_path: Path) -> None:
    schema = Schema({"item": 9}, behaviours={"action": 3}, behaviour_dense=("dwell",))
    second = 1_000_000
    users = [
        next_user(1, [1, 2, 3, 4], [0, 3 * second, 3 * second, 10 * second],
                  behaviour__action=[1, 2, 0, 1], behaviour__dwell=[0.5, float("nan"), 2.0, 3.0]),
        next_user(2, [5, 6], [second, 8 * second], behaviour__action=[2, 2], behaviour__dwell=[4.0, 5.0]),
    ]  # fmt: skip
    prepared = write_folder(tmp_path / "p", [[users]], schema)
    loader = Loader(prepared, batch_size=8, max_length=2, bucket=False, shuffle=False, time_gap=True)
    assert loader.schema.behaviour_dense == ("dwell", "time_gap")
    batch = loader.batch(0, 0)
    batch.check(loader.schema)
    assert batch.history["item"].tolist() == [1, 1, 2, 2, 3, 5]
    assert batch.behaviours["action"].tolist() == [1, 1, 2, 2, 0, 2]
    assert batch.behaviour_dense is not None
    assert batch.behaviour_dense[:, 0].tolist() == [0.5, 0.5, 0, 0, 2, 4]
    gaps = np.log1p([0, 0, 3, 3, 0, 0])
    np.testing.assert_allclose(batch.behaviour_dense[:, 1].numpy(), gaps, rtol=1e-6)
    plain = Loader(prepared, batch_size=8, max_length=2, bucket=False, shuffle=False).batch(0, 0)
    assert plain.behaviour_dense is not None
    assert torch.equal(plain.behaviour_dense, batch.behaviour_dense[:, :1])


@richer
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_further_sequences_end_before_the_target(tmp_path: Path, share: bool, labelled: bool) -> None:
    random = np.random.default_rng(1)
    schema = Schema({"item": 30}, behaviours={"action": 3}, sequences=("buy",))
    users, bought = [], []
    for name in range(20):
        size, more = random.integers(1, 9, 2)
        times = np.sort(random.integers(0, 12, size)).tolist()
        items = random.integers(1, 15, size).tolist()
        buys = np.sort(random.integers(0, 12, more)).tolist()
        bought.append(list(zip(random.integers(15, 30, more).tolist(), buys, strict=True)))
        columns = {"buy__item": [item for item, _ in bought[-1]], "buy__time": buys,
                   "buy__behaviour__action": random.integers(0, 3, more).tolist()}  # fmt: skip
        if labelled:
            labels = random.integers(0, 2, size).tolist()
            user = given_user(name, list(zip(items, times, labels, strict=True)), **columns)
        else:
            user = next_user(name, items, times, **columns)
        user.columns["behaviour.action"] = [1] * len(user.columns["item"])
        users.append(user)
    labels_of = "given" if labelled else "next"
    prepared = write_folder(tmp_path / "p", [[users[:12]], [users[12:]]], schema, labels=labels_of)
    assert verify(prepared) == []
    loader = Loader(prepared, batch_size=20, max_length=4, share_histories=share)
    found: Counter[Any] = Counter()
    for batch in loader.epoch(0):
        batch.check(loader.schema)
        sequence = batch.sequences["buy"]
        assert batch.group is not None
        assert batch.label is not None
        assert sequence.negatives is not None
        for row in range(0, batch.rows, 1 + loader.negatives):
            history = row if sequence.history_of is None else int(sequence.history_of[row])
            low, high = sequence.offsets[history : history + 2].tolist()
            user = int(batch.group[row])
            found[user, int(batch.target["item"][row]), tuple(sequence.history["item"][low:high].tolist())] += 1
            owned = {item for item, _ in bought[user]}
            assert not owned & {*sequence.negatives["item"][low:high].flatten().tolist()}
    expected: Counter[Any] = Counter()
    for number, user in enumerate(users):
        target, times = ("target", "target_time") if labelled else ("item", "time")
        places = range(0 if labelled else 1, len(user.columns[target]))
        for place in places:
            past = [item for item, time in bought[number] if time < user.columns[times][place]]
            expected[number, user.columns[target][place], tuple(past[-4:])] += 1
    assert found == expected


def test_times_of_numbers_and_floats(tmp_path: Path) -> None:
    users = [next_user("a", [1, 2, 3], [0.0, 0.5, 2.5])]
    prepared = write_folder(tmp_path / "p", [[users]], Schema({"item": 9}), time_type=pa.float64(), time_unit="number")
    assert prepared.unit(0).time.tolist() == [0, 0.5, 2.5]
    rows = prepared.unit(0)
    assert rows.row_time[rows.samples("train").row].tolist() == [0.5, 2.5]


def test_bad_arguments(prepared: Prepared) -> None:
    for options, words in (
        ({"batch_size": 2, "negatives": 2}, "batch_size counts rows and must be at least 3"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"max_length": 0}, "max_length must be an integer of at least 1"),
        ({"auxiliary_negatives": -1}, "auxiliary_negatives must be"),
        ({"seed": True}, "seed must be an integer"),
        ({"workers": 1.5}, "workers must be an integer"),
        ({"split": "dev"}, "split must be one of"),
        ({"exclude": "all"}, r"exclude must be one of \('own', 'history', 'none'\), got 'all'"),
        ({"repeats": "no"}, "repeats must be one of"),
        ({"start_method": "thread"}, "start_method must be one of"),
        ({"world": 0}, "world must be an integer of at least 1"),
        ({"rank": 2, "world": 2}, "rank must lie between 0 and 1, below world=2, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            Loader(prepared, **options)  # type: ignore[arg-type]
    loader = Loader(prepared, batch_size=32)
    with pytest.raises(ValueError, match="index must lie between 0 and"):
        loader.batch(0, len(loader))
    with pytest.raises(ValueError, match="start must lie between 0 and"):
        loader.epoch(0, start=-1)
    with pytest.raises(ValueError, match="unit must lie between 0 and 4, got 5"):
        prepared.unit(5)
    with pytest.raises(IndexError, match="user must lie between 0 and 239, got 240"):
        prepared.history(240)


def test_arguments_of_another_type_are_named(prepared: Prepared) -> None:
    for name in ("time_gap", "shuffle", "bucket", "share_histories", "pin_memory"):
        for value in (1, "yes", [True]):
            with pytest.raises(TypeError, match=rf"^{name} must be a bool, got {type(value).__name__}$"):
                Loader(prepared, **{name: value})  # type: ignore[arg-type]
    for name in ("batch_size", "max_length", "negatives", "auxiliary_negatives", "workers", "world"):
        with pytest.raises(ValueError, match=rf"^{name} must be at most {2**31 - 1}, got {2**70}$"):
            Loader(prepared, **{name: 2**70})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^prepared must be a Prepared, as Prepared.open\(folder\) is, got str$"):
        Loader("folder")  # type: ignore[arg-type]
    loader = Loader(prepared, "train")
    for wrong in (None, "a", 1.0, -1):
        for call in (lambda wrong=wrong: loader.batch(wrong, 0), lambda wrong=wrong: loader.epoch(wrong)):
            with pytest.raises(ValueError, match=f"^epoch must be an integer of at least 0, got {wrong!r}$"):
                call()
        with pytest.raises(ValueError, match=f"^index must be an integer of at least 0, got {wrong!r}$"):
            loader.batch(0, wrong)  # type: ignore[arg-type]
    assert same(loader.batch(np.int64(1), np.int32(0)), loader.batch(1, 0))  # type: ignore[arg-type]
    assert same(next(loader.epoch(np.int64(1), np.int64(1))), loader.batch(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start must lie between 0 and .*, got True"):
        loader.epoch(0, True)
    other = {**loader.state, "options": {}}
    with pytest.raises(ValueError, match="fingerprint must be in the state, as it was in the state, got "):
        loader.resume(other)
    for state in (None, {}, {"epoch": 0, "index": 0}, {"epoch": 0, "index": 0, "options": None}):
        with pytest.raises(ValueError, match=r"^state must be what Loader.state gives, with epoch, index and options"):
            loader.resume(state)  # type: ignore[arg-type]
    for raw in (5, None, "u1", b"u1"):
        for encode in (prepared.encode_items, prepared.encode_users):
            with pytest.raises(ValueError, match=f"^raw values must be a sequence, got {type(raw).__name__}$"):
                encode(raw)  # type: ignore[arg-type]
    for users in ([5, None, 240], ["5", "u5", "0240"], [5.0, 17.5, 240.0]):  # as Vocabulary.encode takes them
        assert prepared.encode_users(users).tolist() == [5, -1, -1]
