"""Requests with user fields and numbers, from training to scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dien_kernels import cli
from dien_kernels.data import Prepared, prepare, synthetic
from dien_kernels.models import RankingModel, build
from dien_kernels.serving import Scorer
from dien_kernels.training import open_run


def log() -> pa.Table:
    table = synthetic(users=60, items=40, categories=5, events=600)
    users = np.array(table["user"].to_pylist())
    numbers = np.unique(users, return_inverse=True)[1]
    table = table.append_column("country", pa.array([f"c{n % 4}" for n in numbers]))
    table = table.append_column("age_group", pa.array((numbers % 3 + 20).tolist()))
    return table.append_column("price", pa.array((numbers % 7) / 7)).append_column("hour", pa.array(numbers % 24))


COLUMNS = {"user_fields": ["country", "age_group"], "dense": ["price", "hour"]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(log(), tmp_path_factory.mktemp("data") / "prepared", progress=False, columns=COLUMNS)


def model_of(prepared: Prepared, preset: str | None = None) -> RankingModel:
    torch.manual_seed(0)
    return build("din", prepared.schema, {"embedding": {"size": 4}, "head": {"units": [8]}}, preset=preset).eval()


def requests(prepared: Prepared, **changes: Any) -> pa.Table:
    items = [prepared.item_name(i) for i in range(1, 12)]
    columns = {
        "history": [items[:5], [], items[3:4], items[2:11]],
        "candidates": [items[5:8], items[:2], [], [-7, items[0]]],
        "country": ["c1", None, "c0", "nowhere"],
        "age_group": [20, 21, None, 22],
        "price": [[0.1, 0.2, 0.3], [0.4, 0.5], [], [0.6, 0.7]],
        "hour": [3, 4, 5, 6],
    }
    return pa.table(columns | changes)


def by_hand(model: RankingModel, prepared: Prepared, row: dict[str, Any]) -> list[float]:
    def fields(raw: list[int]) -> dict[str, torch.Tensor]:
        ids = prepared.encode_items(pa.array(raw, pa.int64()))
        return {"item": torch.tensor(ids), "category": torch.from_numpy(prepared.item_fields["category"][ids])}

    users = {}
    for name in prepared.schema.users:
        values = prepared.vocabulary(name).values.to_pylist()
        users[name] = torch.tensor([values.index(row[name]) + 1 if row[name] in values else 0])
    size, columns = len(row["candidates"]), []
    for name in prepared.schema.dense:
        given = row[name] if isinstance(row[name], list) else [row[name]] * size
        columns.append([0.0 if value is None or value != value else value for value in given])
    dense = torch.tensor(columns).T.contiguous()
    return model.score(fields(row["history"]), fields(row["candidates"]), users=users, dense=dense).tolist()


CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "one number a request": {"price": [0.1, 0.2, 0.3, 0.4]},
    "missing numbers": {"price": [[None, 0.2, float("nan")], None, None, [0.6, 0.7]], "hour": [3, None, 5, 6]},
    "lists of both": {"hour": [[1, 2, 3], [4, 5], [], [6, None]]},
    "text for integers": {"age_group": ["20", "x", None, "22"]},
    "floats": {"age_group": [20.0, 21.5, None, 22.0]},
    "nothing known": {"country": pa.nulls(4), "price": pa.nulls(4)},
    "categories": {"country": pa.array(["c1", "c1", None, "c3"]).dictionary_encode()},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_scores_are_the_models(prepared: Prepared, changes: dict[str, Any], chunk: int | None) -> None:
    model, table = model_of(prepared), requests(prepared, **changes)
    for row in Scorer(model, prepared).score_table(table, chunk=chunk).to_pylist():
        wanted = by_hand(model, prepared, row) if row["candidates"] else []
        if "age_group" in changes and row["candidates"]:
            known = {"20": 20, "22": 22, 20.0: 20, 22.0: 22}
            wanted = by_hand(model, prepared, row | {"age_group": known.get(row["age_group"])})
        np.testing.assert_allclose(row["scores"], wanted, rtol=1e-5)


def test_features_matter(prepared: Prepared) -> None:
    scorer = Scorer(model_of(prepared), prepared)
    base = scorer.score_table(requests(prepared))["scores"][0].as_py()
    for name, other in (("country", ["c2"] * 4), ("age_group", [22] * 4), ("price", [9.0] * 4), ("hour", [23] * 4)):
        assert scorer.score_table(requests(prepared, **{name: other}))["scores"][0].as_py() != base


def test_score_of_one_request(prepared: Prepared) -> None:
    scorer, table = Scorer(model_of(prepared), prepared), requests(prepared)
    row = table.to_pylist()[0]
    users, dense = {k: row[k] for k in ("country", "age_group")}, {"price": np.array(row["price"]), "hour": 3}
    found = scorer.score(row["history"], row["candidates"], users=users, dense=dense)
    np.testing.assert_allclose(found, scorer.score_table(table)["scores"][0].as_py(), rtol=1e-5)
    unknown = scorer.score([], row["candidates"], users={"country": None, "age_group": None}, dense=dense)
    assert unknown.shape == (3,)
    with pytest.raises(ValueError, match=r"users must have the fields \['age_group', 'country'\], got \['country'\]"):
        scorer.score([], [1], users={"country": "c1"}, dense=dense)
    with pytest.raises(ValueError, match=r"dense must have the fields \['hour', 'price'\], got \[\]"):
        scorer.score([], [1], users=users)
    with pytest.raises(ValueError, match=r"behaviours must have the fields \[\], got \['page'\]"):
        scorer.score([], [1], users=users, dense=dense, behaviours={"page": []})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"price": [[0.1, 0.2], [0.4], [], [0.6]]}, "'price' must have lists .* got 2 values beside 3 in request 1"),
        ({"price": ["a", "b", "c", "d"]}, "the column 'price' must hold numbers, or lists of numbers, got string"),
        ({"country": [["c1"], [], [], []]}, "the column 'country' must hold one value a request, got list"),
    ],
)  # fmt: skip
def test_columns_of_other_values(prepared: Prepared, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(model_of(prepared), prepared).score_table(requests(prepared, **changes))


@pytest.mark.parametrize("name", ["history", "candidates", "country", "hour"])
def test_a_missing_column_is_named_with_those_there_and_those_needed(prepared: Prepared, name: str) -> None:
    table = requests(prepared).drop_columns(name)
    needed = "history, candidates, country, age_group, price, hour"
    words = f"no column '{name}', only {', '.join(table.column_names)}; needed are {needed}"
    with pytest.raises(ValueError, match=words):
        Scorer(model_of(prepared), prepared).score_table(table)


def test_a_model_whose_rows_depend_on_others_scores_each_request_alone(prepared: Prepared) -> None:
    model, table = model_of(prepared, "authors"), requests(prepared)
    assert model.rows_depend_on_others
    for chunk in (None, 1):
        found = Scorer(model, prepared).score_table(table, chunk=chunk).to_pylist()
        for row in found:
            wanted = by_hand(model, prepared, row) if row["candidates"] else []
            np.testing.assert_allclose(row["scores"], wanted, rtol=1e-5)


@pytest.mark.slow
def test_from_training_to_scores(tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(log(), tmp_path / "log.parquet")
    words = ["train", "--data", str(tmp_path / "log.parquet"), "--out", str(tmp_path / "run"), "--quiet"]
    words += ["--user-fields", "country", "age_group", "--dense", "price", "hour", "--targets", "every"]
    small = ["model.options.embedding.size=4", "model.options.head.units=[8]", "output.report=false"]
    assert cli.main([*words, *small, "training.epochs=1", "training.threads=1"]) == 0
    _, prepared, model = open_run(tmp_path / "run")
    table = requests(prepared)
    pq.write_table(table, tmp_path / "requests.parquet")
    assert cli.main(["score", *(str(tmp_path / name) for name in ("run", "requests.parquet", "out.jsonl"))]) == 0
    assert "4 requests" in capsys.readouterr().out
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        row = json.loads(line)
        wanted = by_hand(model, prepared, row) if row["candidates"] else []
        np.testing.assert_allclose(row["scores"], wanted, rtol=1e-5)
