"""Numbers: scaled by statistics, with a place for what is missing; what that is worth to a model."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dien_kernels.batch import Batch, Schema
from dien_kernels.models import build
from dien_kernels.models.numbers import Numbers
from dien_kernels.models.options import DenseOptions
from dien_kernels.training.metrics import measure
from dien_kernels.training.optimizer import make_optimizer
from dien_kernels.training.step import training_step

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = float("nan"), float("inf")
AGE = {"mean": 40.0, "std": 10.0, "missing": 0.0, "log": False, "quantiles": [30.0, 50.0]}
PRICE = {"mean": 2.0, "std": 0.5, "missing": 0.1, "log": True, "quantiles": [1.0, 1.0, 10.0]}
BOTH = {"age": AGE, "price": PRICE}
VALUES = torch.tensor([[50.0, 9.0], [NAN, NAN], [INF, -INF], [40.0, 0.0], [-40.0, -9.0]])


def numbers(scaling: Any = "standard", statistics: Any = BOTH, **options: Any) -> Numbers:
    torch.manual_seed(0)
    return Numbers(("age", "price"), DenseOptions(scaling, **options), statistics)


def log(x: float) -> float:
    return (math.log1p(x) - 2) / 0.5


def close(module: Numbers, rows: list[list[float]]) -> None:
    assert module.size == len(rows[0])
    torch.testing.assert_close(
        module(VALUES, torch.float32).detach(), torch.tensor(rows, dtype=torch.float32), rtol=1e-6, atol=1e-6
    )


def test_standard() -> None:
    """Age: nothing is missing in training, so that no input says so; price is skewed and sometimes missing."""
    minus = (-math.log1p(9) - 2) / 0.5
    close(numbers(), [[1, log(9), 0], [0, 0, 1], [0, 0, 1], [0, log(0), 0], [-8, minus, 0]])


def test_indicators_may_be_asked_for_and_refused() -> None:
    rows = [[1, log(9), 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, log(0), 0, 0], [-8, (-math.log1p(9) - 2) / 0.5, 0, 0]]
    close(numbers(indicator=True), rows)
    close(numbers(indicator=False), [row[:2] for row in rows])


def test_log_and_none() -> None:
    close(
        numbers({"age": "none", "price": "log"}, indicator=False),
        [[50, math.log(10)], [0, 0], [0, 0], [40, 0], [-40, -math.log(10)]],
    )
    close(
        numbers({"price": "log", "age": "none"}, None),
        [[50, math.log(10)], [0, 0], [0, 0], [40, 0], [-40, -math.log(10)]],
    )


def test_without_statistics_numbers_are_as_they_are() -> None:
    module = numbers(statistics=None)
    assert not module.state_dict()
    close(module, [[50, 9], [0, 0], [0, 0], [40, 0], [-40, -9]])
    close(
        numbers(statistics=None, indicator=True),
        [[50, 9, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [40, 0, 0, 0], [-40, -9, 0, 0]],
    )
    close(numbers(statistics={"age": AGE}), [[1, 9], [0, 0], [0, 0], [0, 0], [-8, -9]])


def test_quantiles_are_intervals_and_missing_is_one_of_its_own() -> None:
    module = numbers({"age": "quantiles", "price": "standard"}, size=2)
    table = module.quantiles["age"].table.weight
    assert tuple(table.shape) == (4, 2)
    out = module(torch.tensor([[29.9, 0.0], [30.0, 0], [49.0, 0], [50.0, 0], [1e9, 0], [NAN, 0]]), torch.float32)
    assert torch.equal(out[:, 2:], table[[0, 1, 1, 2, 2, 3]])
    out.sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [1, 2, 2, 1]


def test_buffers_keep_float32_whatever_the_model_is() -> None:
    module = numbers(
        {"age": "standard", "price": "quantiles"}, statistics={"age": {**AGE, "mean": 48.3}, "price": PRICE}
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = copy.deepcopy(module).to(dtype)
        assert other.mean.dtype == other.std.dtype == torch.float32
        assert torch.equal(other.mean, module.mean)
        assert other.quantiles["price"].bounds.dtype == torch.float32
        assert other.quantiles["price"].table.weight.dtype == dtype
        found = other(torch.tensor([[48.5, 3.0]]), dtype)
        assert found.dtype == dtype
        assert float(found[0, 0].detach()) == pytest.approx(0.02, rel=0.01)


def test_stored_statistics_are_those_of_the_weights() -> None:
    """A model of another day's statistics that loads weights scales as they were trained."""
    trained, other = numbers(), numbers(statistics={"age": {**AGE, "mean": 30.0}, "price": PRICE})
    assert not torch.equal(trained.mean, other.mean)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(VALUES, torch.float32), trained(VALUES, torch.float32))


def test_a_constant_number_is_zero() -> None:
    module = numbers(statistics={"age": {**AGE, "std": 0.0}, "price": PRICE})
    assert module(torch.tensor([[40.0, 1.0]]), torch.float32)[0, 0] == 0


BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"scaling": "standart"}, BOTH, "dense.scaling must be one of 'standard', 'log', 'quantiles', 'none' or a mapping"),
    ({"scaling": {"age": "standart"}}, BOTH, r"unknown scaling dense.scaling\['age'\].standart: did you mean standard"),
    ({"scaling": {"aeg": "log"}}, BOTH, "unknown number dense.scaling.aeg: did you mean age"),
    (
        {"scaling": "quantiles"},
        {"age": AGE},
        r"statistics\['price'\] must be given for dense.scaling='quantiles', got none",
    ),
    ({"size": 0}, BOTH, "dense.size must be finite and at least 1, got 0"),
    ({"sise": 4}, BOTH, "unknown option dense.sise: did you mean size"),
    ({}, {"age": 3}, r"statistics\['age'\] must be a mapping with mean, std, .* got 3"),
    ({}, {"age": {**AGE, "mean": NAN}}, r"statistics\['age'\]\['mean'\] must be a finite number, got nan"),
    (
        {},
        {"age": {**AGE, "std": -1.0}},
        r"statistics\['age'\]\['std'\] must be a finite number of at least 0, got -1.0",
    ),
    ({}, {"age": {**AGE, "quantiles": [3.0, 1.0]}}, r"statistics\['age'\]\['quantiles'\] must be finite and ascending"),
]


@pytest.mark.parametrize("options, statistics, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(options: dict[str, Any], statistics: Any, message: str) -> None:
    schema = Schema({"item": 3}, dense=("age", "price"))
    with pytest.raises(ValueError, match=message):
        build("average", schema, {"dense": options}, statistics=statistics)


def log_of(rows: int, seed: int) -> tuple[Batch, Tensor]:
    """Clicks that the kinds of two items tell and nothing else, beside an age and a price of the row."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, 200, (rows,), generator=generator)
    taste = torch.randint(1, 200, (rows,), generator=generator)
    logit = 2.0 * (items % 3 - 1) + 1.0 * (taste % 3 - 1)
    label = (torch.rand(rows, generator=generator) < logit.sigmoid()).float()
    age = torch.randint(18, 80, (rows,), generator=generator).float()
    price = torch.exp(3 * torch.randn(rows, generator=generator) + 4)
    batch = Batch(
        {"item": taste, "kind": taste % 3},
        torch.arange(rows + 1),
        {"item": items, "kind": items % 3},
        label=label,
        dense=torch.stack([age, price], 1),
    )
    return batch, label


@pytest.mark.slow
def test_ages_and_prices_do_not_drown_the_items() -> None:
    """Columns that tell nothing cost the model little when they are scaled, and much when they are not."""
    train, _ = log_of(12_800, 1)
    test, label = log_of(8_000, 2)
    assert train.dense is not None
    values = train.dense.double()
    logs = values[:, 1].log1p()
    statistics = {
        "age": {"mean": float(values[:, 0].mean()), "std": float(values[:, 0].std()), "missing": 0.0, "log": False},
        "price": {"mean": float(logs.mean()), "std": float(logs.std()), "missing": 0.0, "log": True},
    }

    def auc_of(dense: tuple[str, ...], scaled: bool) -> float:
        torch.manual_seed(0)
        schema = Schema({"item": 200, "kind": 3}, dense=dense)
        model = build("din", schema, {"embedding": {"size": 4}}, statistics=statistics if scaled else None)
        optimizer = make_optimizer(model, lr=3e-3)
        for start in range(0, 12_800, 128):
            training_step(model, part(train, start, 128, bool(dense)), optimizer, clip_norm=5.0)
        model.eval()
        with torch.no_grad():
            logits = model(part(test, 0, 8_000, bool(dense))).logits
        return float(measure(label.numpy().astype(np.int64), logits.numpy()).auc)

    without, raw, scaled = auc_of((), True), auc_of(("age", "price"), False), auc_of(("age", "price"), True)
    # Seeds 0, 1 and 2 gave 0.871, 0.870, 0.870 without numbers, 0.870, 0.870, 0.870 with scaled ones, and 0.609, 0.553,
    # 0.655 with raw ones.
    assert without > 0.86
    assert scaled > without - 0.01
    assert raw < scaled - 0.05, f"AUC {raw:.4f} with raw numbers: this log does not show what scaling is for"


def part(batch: Batch, start: int, rows: int, dense: bool) -> Batch:
    def cut(ids: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[start : start + rows] for name, values in ids.items()}

    assert batch.label is not None
    assert batch.dense is not None
    return Batch(
        cut(batch.history),
        torch.arange(rows + 1),
        cut(batch.target),
        label=batch.label[start : start + rows],
        dense=batch.dense[start : start + rows] if dense else None,
    )
