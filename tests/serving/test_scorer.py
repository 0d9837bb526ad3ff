"""Scoring requests in raw ids, against the model's own scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dien_kernels.batch import Schema
from dien_kernels.data import Prepared, prepare, synthetic
from dien_kernels.models import RankingModel, build
from dien_kernels.serving import Scorer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    table = synthetic(users=60, items=40, categories=5, events=600)
    return prepare(table, tmp_path_factory.mktemp("data") / "prepared", progress=False)


@pytest.fixture(scope="module")
def model(prepared: Prepared) -> RankingModel:
    torch.manual_seed(0)
    return build("dien", prepared.schema, {"embedding": {"size": 4}, "head": {"units": [8]}}).eval()


def requests(prepared: Prepared) -> pa.Table:
    items = [prepared.item_name(i) for i in range(1, 12)]
    return pa.table(
        {
            "request": ["a", "b", "c", "d"],
            "history": [items[:5], [], items[3:4], items[2:11]],
            "candidates": [items[5:8], items[:2], [], [-7, items[0]]],
        }
    )


def expected(model: RankingModel, prepared: Prepared, history: list[int], candidates: list[int]) -> np.ndarray:
    def fields(raw: list[int]) -> dict[str, torch.Tensor]:
        ids = prepared.encode_items(pa.array(raw, pa.int64()))
        return {
            "item": torch.tensor(ids),
            "category": torch.from_numpy(prepared.item_fields["category"][ids]),
        }

    return model.score(fields(history), fields(candidates)).numpy()


def test_scores_are_the_models(prepared: Prepared, model: RankingModel) -> None:
    table = requests(prepared)
    scorer = Scorer(model, prepared)
    found = scorer.score_table(table)
    assert found.drop_columns("scores") == table
    for row in found.to_pylist():
        wanted = expected(model, prepared, row["history"], row["candidates"]) if row["candidates"] else []
        np.testing.assert_allclose(row["scores"], wanted, rtol=1e-5)
    counts = scorer.counts
    assert (counts.requests, counts.candidates, counts.behaviours) == (4, 7, 15)
    assert (counts.unknown_candidates, counts.unknown_behaviours) == (1, 0)
    one = Scorer(model, prepared).score(table["history"][0].as_py(), table["candidates"][0].as_py())
    np.testing.assert_allclose(one, found["scores"][0].as_py(), rtol=1e-5)


def test_files_and_chunks(prepared: Prepared, model: RankingModel, tmp_path: Path) -> None:
    table = requests(prepared)
    pq.write_table(table, tmp_path / "in.parquet")
    for chunk in (1, 3, 100):
        counts = Scorer(model, prepared).score_file(tmp_path / "in.parquet", tmp_path / "out.parquet", chunk=chunk)
        assert counts.unknown_candidates == 1
        found = pq.read_table(tmp_path / "out.parquet")
        wanted = Scorer(model, prepared).score_table(table)
        for a, b in zip(found["scores"].to_pylist(), wanted["scores"].to_pylist(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_only_the_newest_behaviours_are_read(prepared: Prepared, model: RankingModel) -> None:
    table = requests(prepared)
    found = Scorer(model, prepared, max_length=2).score_table(table)
    for row in found.to_pylist():
        if row["candidates"]:
            wanted = expected(model, prepared, row["history"][-2:], row["candidates"])
            np.testing.assert_allclose(row["scores"], wanted, rtol=1e-5)


def test_a_model_that_saw_no_history_reads_none(prepared: Prepared, model: RankingModel) -> None:
    table = requests(prepared)
    found = Scorer(model, prepared, read_history=False).score_table(table)
    for row in found.to_pylist():
        if row["candidates"]:
            np.testing.assert_allclose(row["scores"], expected(model, prepared, [], row["candidates"]), rtol=1e-5)
    assert found["history"] == table["history"]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.string())])
def test_kinds_of_lists(prepared: Prepared, model: RankingModel, kind: pa.DataType) -> None:
    table = requests(prepared)
    columns = {
        name: pa.array(
            [list(map(str, v)) if kind == pa.list_(pa.string()) else v for v in table[name].to_pylist()], kind
        )
        for name in ("history", "candidates")
    }
    found = Scorer(model, prepared).score_table(pa.table(columns))
    wanted = Scorer(model, prepared).score_table(table)
    assert found["scores"].to_pylist() == wanted["scores"].to_pylist()


def test_null_lists_and_slices(prepared: Prepared, model: RankingModel) -> None:
    table = requests(prepared)
    found = Scorer(model, prepared).score_table(table.slice(1, 3))
    wanted = Scorer(model, prepared).score_table(table)
    for a, b in zip(found["scores"].to_pylist(), wanted["scores"].to_pylist()[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    nulls = pa.table({"history": pa.array([None, [1]], pa.list_(pa.int64())), "candidates": [[1, 2], [3]]})
    assert [len(s) for s in Scorer(model, prepared).score_table(nulls)["scores"].to_pylist()] == [2, 1]


def test_ids_that_nothing_can_hold_are_unknown(prepared: Prepared, model: RankingModel) -> None:
    huge = pa.array([[2**64 - 1, 1]], pa.list_(pa.uint64()))
    scorer = Scorer(model, prepared)
    assert len(scorer.score_table(pa.table({"history": huge, "candidates": huge}))["scores"][0]) == 2
    assert (scorer.counts.unknown_behaviours, scorer.counts.unknown_candidates) == (1, 1)


def test_bad_requests(prepared: Prepared, model: RankingModel, tmp_path: Path) -> None:
    scorer = Scorer(model, prepared)
    with pytest.raises(ValueError, match="no column 'candidates', only history"):
        scorer.score_table(pa.table({"history": [[1]]}))
    with pytest.raises(ValueError, match="'history' must hold lists of item ids, got int64"):
        scorer.score_table(pa.table({"history": [1], "candidates": [[1]]}))
    with pytest.raises(ValueError, match="'history' must hold lists of item ids, got list<"):
        scorer.score_table(pa.table({"history": [[[1]]], "candidates": [[1]]}))
    with pytest.raises(ValueError, match="'scores' already"):
        scorer.score_table(pa.table({"history": [[1]], "candidates": [[1]], "scores": [1]}))
    with pytest.raises(FileNotFoundError, match="no file"):
        scorer.score_file(tmp_path / "none.parquet", tmp_path / "out.parquet")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        scorer.score_file(tmp_path / "bad.parquet", tmp_path / "out.parquet")
    pq.write_table(requests(prepared), tmp_path / "bad.parquet")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none for out\.parquet"):
        scorer.score_file(tmp_path / "bad.parquet", tmp_path / "none" / "out.parquet")
    for folder in (tmp_path, Path(".")):
        with pytest.raises(ValueError, match=f"out must be a file to write, got the folder {re.escape(str(folder))}$"):
            scorer.score_file(tmp_path / "bad.parquet", folder)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.parquet"]
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"chunk must be at least 1, got {chunk}"):
            scorer.score_file(tmp_path / "bad.parquet", tmp_path / "out.parquet", chunk=chunk)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        Scorer(model, prepared, max_length=0)


def test_features_that_requests_cannot_carry(prepared: Prepared, model: RankingModel) -> None:
    class Other:
        def __init__(self, **schema: Any) -> None:
            self.schema = Schema(prepared.schema.items, **schema)

    with pytest.raises(ValueError, match="further sequences of the model: bought"):
        Scorer(model, Other(sequences=("bought",)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be named as the columns of requests are, got history"):
        Scorer(model, Other(users={"history": 3}))  # type: ignore[arg-type]
