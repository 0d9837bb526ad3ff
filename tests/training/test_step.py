"""A training step: accumulation equals one large batch, weights, penalties and dropout are their formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dien_kernels.batch import Batch
from dien_kernels.data import Prepared
from dien_kernels.models import RankingModel, build
from dien_kernels.training import Config, profile, training_step
from dien_kernels.training.optimizer import make_optimizer
from tests.models.common import SCHEMA, SMALL_OF, nested, random_batch

pytestmark = pytest.mark.usefixtures("one_thread")
# Without Dice and without a norm of the batch's statistics.
PLAIN = {"head.activation": "prelu"}


def model_of(options: dict[str, Any], name: str = "dien", preset: str | None = None) -> RankingModel:
    torch.manual_seed(3)
    return build(name, SCHEMA, nested({**SMALL_OF[name], **PLAIN, **options}), preset).double()


def part_of(batch: Batch, histories: range) -> Batch:
    """The rows of some histories of a batch in which each row has its own."""
    bounds = batch.offsets
    span = slice(int(bounds[histories.start]), int(bounds[histories.stop]))
    rows = slice(histories.start, histories.stop)

    def cut(fields: dict[str, Tensor], which: slice) -> dict[str, Tensor]:
        return {name: ids[which] for name, ids in fields.items()}

    def selected(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows]

    return Batch(
        history=cut(batch.history, span),
        offsets=bounds[histories.start : histories.stop + 1] - bounds[histories.start],
        target=cut(batch.target, rows),
        label=selected(batch.label),
        negatives=None if batch.negatives is None else cut(batch.negatives, span),
        users=cut(batch.users, rows),
        dense=selected(batch.dense),
        weight=selected(batch.weight),
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}


def weighted(batch: Batch) -> Batch:
    return replace(batch, weight=torch.linspace(0.1, 3.0, batch.rows))


ACCUMULATED: list[dict[str, Any]] = [
    *({"auxiliary.normalizer": n} for n in ("separate", "joint", "row", "padded", "history")),
    {"auxiliary.kind": "mlp", "auxiliary.normalizer": "padded", "auxiliary.weight": 0.3},
    {"auxiliary": None, "embedding.l2": 0.1},
    {"click.reduction": "sum", "click.eps": 1e-8},
    {"embedding.l2": 0.5, "click.weight": 0.5},
]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("options", ACCUMULATED, ids=str)
def test_several_batches_are_one_large_batch(options: dict[str, Any], weights: bool) -> None:
    """Of unequal sizes, one without any pair of behaviours, in float64: the order of sums is all that differs."""
    batch = random_batch([3, 0, 5, 1, 4, 1, 0, 2], seed=4)
    batch = weighted(batch) if weights else batch
    parts = [part_of(batch, r) for r in (range(0, 3), range(3, 4), range(4, 8))]
    one, many = model_of(options), model_of(options)
    large = training_step(one, [batch], torch.optim.SGD(one.parameters(), 0.1))
    small = training_step(many, parts, torch.optim.SGD(many.parameters(), 0.1))
    for a, b in zip(large, small, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    expected = gradients(one)
    assert expected.keys() == gradients(many).keys()
    for name, gradient in gradients(many).items():
        assert float((gradient - expected[name]).abs().max()) < 1e-12 + 1e-9 * float(expected[name].abs().max()), name
    for name, value in many.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_shares_of_equal_batches_without_shares_would_differ() -> None:
    """The mean of the means of unequal batches is another gradient: the test above can fail."""
    batch = random_batch([3, 0, 5, 1], seed=4)
    model = model_of({})
    whole = model.loss(model(batch), batch.label).total
    means = [model.loss(model(p), p.label).total for p in (part_of(batch, range(0, 1)), part_of(batch, range(1, 4)))]
    assert float((whole - torch.stack(means).mean()).detach().abs()) > 1e-3


def test_a_step_is_written_out_by_hand() -> None:
    mine, other = model_of({}), model_of({})
    batch = random_batch([3, 0, 5, 1])
    result = training_step(mine, [batch], make_optimizer(mine, lr=0.1), clip_norm=0.05)
    optimizer = make_optimizer(other, lr=0.1)
    losses = other.loss(other(batch), batch.label)
    losses.total.backward()
    dense = [p for p in other.parameters() if p.grad is not None]
    for p in dense:
        p.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
    norm = float(torch.cat([p.grad.flatten() for p in dense]).norm())
    assert norm > 0.05
    for p in dense:
        p.grad = p.grad * (0.05 / (norm + 1e-6))
    for table in other.embeddings.parameters():
        table.grad = table.grad.to_sparse(1)
    optimizer.step()
    assert result.total == losses.total.detach()
    assert not result.logits.requires_grad
    for name, value in other.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_no_batches() -> None:
    model = model_of({})
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        training_step(model, [], make_optimizer(model))


def test_one_batch_needs_no_list() -> None:
    batch = random_batch([3, 2])
    one, other = model_of({}), model_of({})
    first = training_step(one, batch, make_optimizer(one))
    assert first.total == training_step(other, [batch], make_optimizer(other)).total
    with pytest.raises(TypeError, match=r"batches must be a Batch or a list of them, got NoneType as batches\[1\]"):
        training_step(one, [batch, None], make_optimizer(one))  # type: ignore[list-item]


EMPTY: list[dict[str, Any]] = [
    {},
    {"embedding.l2": 0.1, "click.eps": 1e-8},
    {"click.reduction": "sum"},
    {"head.activation": "dice"},
]


@pytest.mark.parametrize("options", EMPTY, ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_an_empty_batch_among_several_counts_for_nothing(options: dict[str, Any], weights: bool) -> None:
    batch = random_batch([3, 0, 5, 1])
    batch = weighted(batch) if weights else batch
    empty = part_of(batch, range(2, 2))
    assert empty.rows == 0
    with_it, without = model_of(options), model_of(options)
    found = training_step(with_it, [empty, batch, empty], torch.optim.SGD(with_it.parameters(), 0.1))
    expected = training_step(without, [batch], torch.optim.SGD(without.parameters(), 0.1))
    assert bool(found.total.isfinite())
    for a, b in zip(found, expected, strict=True):
        assert a is None if b is None else torch.equal(a, b)
    for name, value in with_it.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name
    with pytest.raises(ValueError, match="batches must have at least one row, got none"):
        training_step(with_it, [empty], torch.optim.SGD(with_it.parameters(), 0.1))


@pytest.mark.parametrize("options", EMPTY[:3], ids=str)
def test_losses_of_an_empty_batch_with_its_share_are_zero(options: dict[str, Any]) -> None:
    batch = random_batch([3, 0, 5, 1])
    empty = part_of(batch, range(2, 2))
    model = model_of(options)
    _, share = model.shares([batch, empty])
    losses = model.loss(model(empty), empty.label, share=share)
    for loss in losses:
        assert loss is None or float(loss.detach()) == 0
    losses.total.backward()
    assert all(float(gradient.abs().sum()) == 0 for gradient in gradients(model).values())


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_a_step_refuses_wrong_weights_and_moves_nothing(value: float) -> None:
    model = model_of({}, "average")
    batch = random_batch([3, 2])
    wrong = replace(batch, weight=torch.tensor([1.0, value]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"batches\[1\].weight must be finite and at least 0"):
        training_step(model, [batch, wrong], torch.optim.SGD(model.parameters(), 0.1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_rows(reduction: str, eps: float) -> None:
    model = model_of({"click.reduction": reduction, "click.eps": eps}, "average")
    batch = random_batch([3, 2, 1, 0])
    output = model(batch)
    w = torch.tensor([0.0, 2.0, 0.5, 1.0])
    p = 1 / (1 + torch.exp(-output.logits))
    y = batch.label.double()
    terms = -(y * torch.log(p + eps) + (1 - y) * torch.log(1 - p + eps))
    expected = (w * terms).sum() / (w.sum() if reduction == "mean" else 1)
    torch.testing.assert_close(model.loss(output, batch.label, weight=w).click, expected)
    plain = model.loss(output, batch.label).click
    torch.testing.assert_close(model.loss(output, batch.label, weight=torch.ones(4)).click, plain)
    assert float(model.loss(output, batch.label, weight=torch.zeros(4)).click.detach()) == 0
    with pytest.raises(ValueError, match=r"weight must have shape \[B\] = \(4,\), got \(3,\)"):
        model.loss(output, batch.label, weight=w[:3])


def test_a_row_without_weight_moves_nothing() -> None:
    """Its history has rows of tables that no other row reads: they stay."""
    model = model_of({}, "average")
    batch = random_batch([3, 2])
    batch.history["item"], batch.target["item"] = torch.tensor([1, 2, 3, 8, 9]), torch.tensor([4, 5])
    batch = replace(batch, weight=torch.tensor([1.0, 0.0]))
    before = model.embeddings.items["item"].weight.detach().clone()
    training_step(model, [batch], torch.optim.SGD(model.parameters(), 0.1))
    moved = (model.embeddings.items["item"].weight.detach() != before).any(1).nonzero().squeeze(1).tolist()
    assert moved == [1, 2, 3, 4]


def test_weights_are_checked() -> None:
    batch = random_batch([3, 2])
    for wrong, message in (
        (torch.ones(3), r"weight must be torch.float32 of shape \(2,\), got torch.float32 \(3,\)"),
        (torch.ones(2).double(), "weight must be torch.float32"),
        (torch.tensor([1.0, -1.0]), "weight must be finite and at least 0"),
        (torch.tensor([1.0, torch.nan]), "weight must be finite and at least 0"),
        (torch.tensor([1.0, torch.inf]), "weight must be finite and at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(batch, weight=wrong).check(SCHEMA)
    replace(batch, weight=torch.tensor([1.0, 0.0])).check(SCHEMA)


def test_l2_of_the_rows_that_are_read() -> None:
    """The formula of the docstring, and its gradient 2 l2 n e / B for a row that was read n times."""
    batch = random_batch([3, 0, 2])
    l2 = 0.25
    with_it, without = model_of({"embedding.l2": l2}), model_of({})
    losses = with_it.loss(with_it(batch), batch.label)
    plain = without.loss(without(batch), batch.label)
    squares = torch.zeros((), dtype=torch.float64)
    counts: dict[str, Tensor] = {}
    assert batch.negatives is not None
    for field, table in with_it.embeddings.items.items():
        ids = torch.cat([batch.history[field], batch.target[field], batch.negatives[field].flatten()])
        counts[f"items.{field}"] = torch.bincount(ids, minlength=table.num_embeddings)
        for i in ids.tolist():
            squares = squares + sum(x * x for x in table.weight[i])
    ids = batch.users["user"]
    counts["users.user"] = torch.bincount(ids, minlength=7)
    for i in ids.tolist():
        squares = squares + sum(x * x for x in with_it.embeddings.users["user"].weight[i])
    torch.testing.assert_close(losses.squares, squares.detach() / 3)
    torch.testing.assert_close(losses.total, plain.total + l2 * squares / 3)
    losses.total.backward()
    plain.total.backward()
    for name, count in counts.items():
        table = with_it.get_parameter(f"embeddings.{name}.weight")
        difference = table.grad.to_dense() - without.get_parameter(f"embeddings.{name}.weight").grad.to_dense()
        torch.testing.assert_close(
            difference, 2 * l2 / 3 * count.double().unsqueeze(1) * table.detach(), rtol=1e-9, atol=1e-12
        )
    assert with_it.eval()(batch).squares is None


def test_dropout_of_the_head() -> None:
    """In training each number is 0 or divided by 1 - p; about a share p is 0; in evaluation nothing happens."""
    p = 0.3
    model = model_of({"head.dropout": p, "head.units": (2000,), "head.activation": "relu"}, "average")
    seen: list[Tensor] = []
    model.mlp.last.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batch = random_batch([3, 2, 4])
    model.eval()(batch)
    model.train()(batch)
    plain, dropped = seen
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / (1 - p))
    alive = int((plain != 0).sum())
    assert alive > 1000
    share = 1 - int(kept.sum()) / alive
    assert abs(share - p) < 4 * (p * (1 - p) / alive) ** 0.5  # four deviations of a binomial share
    expected = model_of({"head.units": (2000,), "head.activation": "relu"}, "average").eval()(batch).logits
    assert torch.equal(model.eval()(batch).logits, expected)


def test_dropout_of_embeddings() -> None:
    p = 0.4
    model = model_of({"embedding.dropout": p, "embedding.size": 300, "embedding.l2": 0.1})
    batch = random_batch([3, 0, 4])
    plain = model.embeddings.eval()(batch)
    dropped = model.embeddings.train()(batch)
    for before, after in (
        (plain.history, dropped.history),
        (plain.target, dropped.target),
        (plain.negatives, dropped.negatives),
        (plain.context[0], dropped.context[0]),
    ):
        assert before is not None
        assert after is not None
        kept = after != 0
        torch.testing.assert_close(after[kept], before[kept] / (1 - p))
        n = before.numel()
        assert abs(1 - float(kept.double().mean()) - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(plain.context[1], dropped.context[1])  # dense features are no embeddings
    # The penalty is of what is in the tables, whatever is dropped.
    read = (plain.history, plain.target, plain.negatives, plain.context[0])
    expected = sum(float(part.detach().square().sum()) for part in read if part is not None)
    assert dropped.squares is not None
    assert float(dropped.squares.detach()) == pytest.approx(expected, rel=1e-9)


def test_profile_takes_the_steps_of_training(
    config_of: Callable[..., Config], prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = profile.training_step

    def counted(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(profile, "training_step", counted)
    times = profile.time_parts(config_of("run", "training.accumulate=2"), prepared, steps=2, warm=1)
    assert len(seen) == 3
    assert all(options["scaler"] is not None and options["clip_norm"] == 5.0 for options in seen)
    assert {"mlp", "loss", "optimiser"} <= set(times["forward"])
    assert {"mlp", "evolution", "loss"} <= set(times["backward"])
