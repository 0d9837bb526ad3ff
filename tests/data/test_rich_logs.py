"""Logs whose behaviours carry fields and numbers, whose items have several values, and whose users several sequences:
from the log to the folder, to batches, and through a training step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from folders import meta_of, names_of, users_of
from small_logs import made

from dien_kernels.data import Loader, Prepared, synthetic, verify
from dien_kernels.data.append import append
from dien_kernels.data.earlier import Earlier
from dien_kernels.models import build

TINY = pa.table(
    {
        "user": [1, 1, 1, 1, 2, 2, 1, 2],
        "item": ["a", "b", "c", "a", "b", "c", "b", "a"],
        "timestamp": [1, 2, 3, 4, 1, 2, 5, 3],
        "genres": ["x|y", "y", None, "x|y", "y", None, "y", "x|y"],
        "device": ["phone", "web", "web", None, "tv", "web", "web", "phone"],
        "dwell": [1.0, 2.0, None, 4.0, 5.0, 6.0, 7.0, 8.0],
        "action": ["pv", "pv", "buy", "pv", "pv", "pv", "pv", "other"],
    }
)
COLUMNS: dict[str, Any] = {
    "item_fields": ["genres"],
    "delimiters": {"genres": "|"},
    "behaviour_fields": ["device"],
    "behaviour_dense": ["dwell"],
    "sequence": "action",
    "sequences": {"views": ["pv"], "purchases": ["buy"]},
}


def test_the_folder_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    made(TINY, folder, targets="every", columns=COLUMNS)
    meta, users = meta_of(folder), users_of(folder)
    assert meta["schema"]["several"] == {"genres": 2}
    assert meta["schema"]["behaviours"] == {"device": 4}
    assert meta["schema"]["behaviour_dense"] == ["dwell"]
    assert meta["schema"]["sequences"] == ["purchases"]
    devices, items = names_of(folder, "device"), names_of(folder, "item")
    assert users[1]["item"] == ["a", "b", "a", "b"]
    assert users[1]["purchases.item"] == ["c"]
    assert users[1]["purchases.time"] == [3]
    assert [devices[number] for number in users[1]["behaviour.device"]] == ["phone", "web", None, "web"]
    assert users[1]["behaviour.dwell"] == [1, 2, 4, 7]
    assert [devices[number] for number in users[1]["purchases.behaviour.device"]] == ["web"]
    assert math.isnan(users[1]["purchases.behaviour.dwell"][0])
    assert users[2]["item"] == ["b", "c"]  # the action "other" is of no sequence
    assert users[2]["purchases.item"] == []
    lists = pq.read_table(folder / "items.parquet")["genres"].to_pylist()
    genres = names_of(folder, "genres")
    assert {items[n]: {genres[g] for g in found} for n, found in enumerate(lists)} == {
        None: set(), "a": {"x", "y"}, "b": {"y"}, "c": set(),
    }  # fmt: skip
    # Views alone are behaviours that negatives are drawn by.
    counts = pq.read_table(folder / "items.parquet")["count"].to_pylist()
    assert dict(zip(items, counts, strict=True)) == {None: 0, "a": 2, "b": 3, "c": 1}


def test_batches_by_hand(tmp_path: Path) -> None:
    prepared = made(TINY, tmp_path / "p", targets="every", columns=COLUMNS)
    loader = Loader(prepared, "train", batch_size=64, shuffle=False, bucket=False, time_gap=True)
    batch = loader.batch(0, 0)
    assert batch.history["genres"].shape[1] == 2
    items = [prepared.item_name(n) for n in batch.history["item"].tolist()]
    users, group = users_of(tmp_path / "p"), batch.group
    assert group is not None
    assert batch.behaviour_dense is not None
    for row in range(0, batch.rows, 2):  # the positives
        user = users[prepared.user_names[int(group[row])].as_py()]
        assert batch.history_of is not None
        history = int(batch.history_of[row])
        low, high = int(batch.offsets[history]), int(batch.offsets[history + 1])
        length = high - low
        assert items[low:high] == user["item"][:length]
        assert batch.behaviours["device"][low:high].tolist() == user["behaviour.device"][:length]
        np.testing.assert_array_equal(batch.behaviour_dense[low:high, 0].numpy(), user["behaviour.dwell"][:length])
        gaps = [0.0, *np.log1p(np.diff(user["time"][:length])).tolist()]
        np.testing.assert_allclose(batch.behaviour_dense[low:high, 1].numpy(), gaps, rtol=1e-6)
        bought = batch.sequences["purchases"]
        which = row if bought.history_of is None else int(bought.history_of[row])
        first, last = int(bought.offsets[which]), int(bought.offsets[which + 1])
        before = [item for item, time in zip(user["purchases.item"], user["purchases.time"], strict=True)
                  if time < user["time"][length]]  # fmt: skip
        assert [prepared.item_name(n) for n in bought.history["item"][first:last].tolist()] == before


def a_log(users: int = 80) -> pa.Table:
    random = np.random.default_rng(0)
    log = synthetic(users=users, items=60, categories=5, events=10 * users)
    rows = log.num_rows
    lists = [[f"g{g}" for g in range(item % 4)] for item in log["item"].to_pylist()]
    columns = {
        "genres": pa.array(lists),
        "device": pa.array(random.choice(["phone", "web", "tv"], rows)),
        "dwell": pa.array(np.exp(random.normal(3, 2, rows))),
        "action": pa.array(random.choice(["pv", "buy", "fav"], rows, p=[0.7, 0.2, 0.1])),
        "age": pa.array(random.integers(18, 80, rows).astype(float)),
        "country": pa.array(random.choice(["de", "fr"], rows)),
    }
    for name, column in columns.items():
        log = log.append_column(name, column)
    return log


RICH: dict[str, Any] = COLUMNS | {"item_fields": ["category", "genres"], "user_fields": ["country"], "dense": ["age"]}
RICH = {name: value for name, value in RICH.items() if name != "delimiters"}


@pytest.mark.parametrize("name", ["dien", "din", "average"])
def test_models_train_on_all_of_it(tmp_path: Path, name: str) -> None:
    prepared = made(a_log(), tmp_path / "p", targets="every", columns=RICH, fractions=(0.8, 0.1, 0.1))
    assert verify(prepared) == []
    loader = Loader(prepared, "train", batch_size=128, time_gap=True)
    model = build(name, loader.schema, statistics=prepared.meta["dense"])
    batch = loader.batch(0, 0)
    batch.check(loader.schema)
    model.train()
    loss = model.loss(model(batch), batch.label).total
    loss.backward()
    assert torch.isfinite(loss)
    without = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []


def test_rich_folders_grow(tmp_path: Path) -> None:
    log = a_log()
    log = log.take(pa.array(np.argsort(log["timestamp"].to_numpy(), kind="stable")))
    cut = int(0.7 * log.num_rows)
    made(log.slice(0, cut), tmp_path / "p", targets="every", columns=RICH, fractions=(0.8, 0.1, 0.1))
    append(log.slice(cut), tmp_path / "p", columns=RICH, tail=1000, progress=False)
    made(log, tmp_path / "all", targets="every", columns=RICH, fractions=(0.8, 0.1, 0.1))
    assert verify(Prepared.open(tmp_path / "p")) == []

    def last_rows(folder: Path) -> dict[int, Any]:
        items, devices, countries = (names_of(folder, field) for field in ("item", "device", "country"))
        found = {}
        for shard in meta_of(folder)["shards"]:
            for row in pq.read_table(folder / shard["file"]).to_pylist():
                found[row["user"]] = {
                    "items": [items[n] for n in row["item"]],
                    "devices": [devices[n] for n in row["behaviour.device"]],
                    "dwell": row["behaviour.dwell"],
                    "bought": [items[n] for n in row["purchases.item"]],
                    "countries": [countries[n] for n in row["user.country"]],
                    "ages": row["dense.age"],
                }
        return found

    assert last_rows(tmp_path / "p") == last_rows(tmp_path / "all")
    old, new = ({items: sorted(genres) for items, genres in pairs(f)} for f in (tmp_path / "all", tmp_path / "p"))
    assert old == new


def pairs(folder: Path) -> list[tuple[Any, list[Any]]]:
    """Every item with its genres."""
    items, genres = names_of(folder, "item"), names_of(folder, "genres")
    lists = pq.read_table(folder / "items.parquet")["genres"].to_pylist()
    return [(items[n], [genres[g] for g in found]) for n, found in enumerate(lists)]


def test_sequences_that_match_nothing_are_told(tmp_path: Path) -> None:
    none = COLUMNS | {"sequences": {"views": ["view"], "purchases": ["purchase"]}}
    with pytest.raises(
        ValueError, match=r"no usable row .*8 rows are of none of the sequences \['views', 'purchases'\]"
    ):
        made(TINY, tmp_path / "p", columns=none)
    with pytest.raises(ValueError, match="no row is of the sequence 'views'"):
        made(TINY, tmp_path / "p", columns=COLUMNS | {"sequences": {"views": ["view"], "purchases": ["buy"]}})


def test_an_earlier_model_sees_only_the_ids_that_it_knows(tmp_path: Path) -> None:
    whole = made(a_log(), tmp_path / "p", targets="every", columns=RICH, fractions=(0.8, 0.1, 0.1))
    sizes = {"item": 20, "category": 4, "genres": 3, "device": 2, "country": 2}
    view = Earlier(whole, sizes)
    model = build("dien", view.schema, {"embedding": {"size": 4}})
    options: dict[str, Any] = {"batch_size": 64, "exclude": "none", "shuffle": False}
    for full, seen in zip(Loader(whole, **options).epoch(0), Loader(view, **options).epoch(0), strict=True):
        parts = [(full, seen), *((full.sequences[name], seen.sequences[name]) for name in full.sequences)]
        for before, after in parts:
            for name, ids in {**before.history, **before.behaviours}.items():
                known = {**after.history, **after.behaviours}[name]
                own = before.history["item"] < sizes["item"]  # an item that is not known has no fields
                kept = own if name in before.history else torch.ones_like(own)
                expected = torch.where((ids < sizes[name]) & (kept if ids.dim() == 1 else kept[:, None]), ids, 0)
                assert torch.equal(known, expected), name
        assert {name: int(ids.max()) < sizes[name] for name, ids in seen.users.items()} == {"country": True}
        assert torch.isfinite(model.loss(model(seen), seen.label).total)
    assert next(Loader(view, **options).epoch(0)).target["item"].max() < sizes["item"]
