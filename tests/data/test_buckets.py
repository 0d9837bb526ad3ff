"""Fields whose values fall into buckets: as many ids as buckets at most, the same ones everywhere and for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from folders import meta_of, users_of
from small_logs import TINY, made

from dien_kernels.data import Prepared, synthetic, verify
from dien_kernels.data._hash import hash64
from dien_kernels.data.append import append


@pytest.mark.parametrize("text", [False, True])
def test_ids_are_those_of_buckets(tmp_path: Path, text: bool) -> None:
    log = synthetic(users=60, items=300, categories=5, events=900)
    items = log["item"].to_pylist()
    column = pa.array([f"i{item}" for item in items] if text else items)
    prepared = made(log.set_column(1, "item", column), tmp_path / "p", targets="every", buckets={"item": 40})
    assert prepared.schema.items["item"] <= 41
    vocabulary = prepared.vocabulary("item")
    raw = column.unique()
    buckets = (hash64(raw) % np.uint64(40)).astype(int).tolist()
    ids = prepared.encode_items(raw).tolist()
    assert len(set(zip(buckets, ids, strict=True))) == len(set(buckets)) == len(set(ids))
    assert 0 not in ids
    rows = np.bincount(prepared.encode_items(column), minlength=vocabulary.size)
    assert vocabulary.counts.tolist() == rows.tolist()
    assert rows[1:].tolist() == sorted(rows[1:].tolist(), reverse=True)
    assert verify(prepared) == []
    # A value that was never seen has the id of its bucket; integers and their digits are one value.
    unseen = ["zzz", "17"] if text else [10**9, "17"]
    bucket = hash64(pa.array(unseen if text else [10**9, 17])) % np.uint64(40)
    known = dict(zip(buckets, ids, strict=True))
    assert prepared.encode_items(pa.array([str(u) for u in unseen])).tolist() == [known.get(int(b), 0) for b in bucket]
    again = Prepared.open(tmp_path / "p")
    assert again.encode_items(raw).tolist() == ids


def test_users_fields_hash_too_and_stay_after_an_append(tmp_path: Path) -> None:
    log = synthetic(users=60, items=50, categories=5, events=900)
    city = pa.array([f"c{number % 97}" for number in range(log.num_rows)])
    log = log.append_column("city", city).take(pa.array(np.argsort(log["timestamp"].to_numpy(), kind="stable")))
    options = {"columns": {"user_fields": ["city"]}, "targets": "every", "buckets": {"city": 8, "item": 30}}
    before = made(log.slice(0, 600), tmp_path / "p", **options)
    cities, items = [f"c{n}" for n in range(97)], list(range(50))
    old = before.vocabulary("city").encode(cities), before.encode_items(items)
    after = append(log.slice(600), tmp_path / "p", columns=options["columns"], progress=False)
    new = after.vocabulary("city").encode(cities), after.encode_items(items)
    for was, now in zip(old, new, strict=True):
        assert (now[was > 0] == was[was > 0]).all()
    assert after.schema.users["city"] <= 9
    assert verify(after) == []


def test_wrong_buckets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"buckets must name fields of \['item', 'category'\], got 'colour'"):
        made(TINY, tmp_path / "p", buckets={"colour": 5})
    with pytest.raises(ValueError, match="buckets of 'item' must be an integer of at least 2, got 1"):
        made(TINY, tmp_path / "p", buckets={"item": 1})
    made(TINY, tmp_path / "p", buckets={"category": 2})
    assert meta_of(tmp_path / "p")["options"]["buckets"] == {"category": 2}
    assert users_of(tmp_path / "p")["u1"]["item"] == ["y", "z", "x", "w"]
