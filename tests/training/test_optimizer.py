"""The optimiser of sparse tables against torch's own on dense gradients; what lazy moments leave alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from dien_kernels.training.optimizer import OPTIMIZERS, LazyAdam, clip_grad_norm, make_optimizer, split_parameters


class Toy(nn.Module):
    """A table of 30 rows, read several times a step and by ids that repeat, under a linear map."""

    def __init__(self, sparse: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 4, sparse=sparse, dtype=dtype)
        self.linear = nn.Linear(4, 3, dtype=dtype)

    def loss(self, ids: Tensor) -> Tensor:
        return (self.linear(self.table(ids)).square().sum(1) + self.table(ids.flip(0)).sum(1).tanh()).mean()


def ids_of(step: int, rows: int = 8, below: int = 10) -> Tensor:
    return torch.randint(below, (rows,), generator=torch.Generator().manual_seed(step))


def train(model: Toy, optimizer: torch.optim.Optimizer, steps: range, clip: float | None = None) -> list[Tensor]:
    norms = []
    for step in steps:
        optimizer.zero_grad()
        model.loss(ids_of(step)).backward()
        if clip is not None:
            norms.append(clip_grad_norm(model.parameters(), clip))
        optimizer.step()
    return norms


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("clip", [None, 1e9, 0.05])
def test_sgd_on_sparse_gradients_is_dense_sgd(clip: float | None, dtype: torch.dtype, rtol: float) -> None:
    sparse, dense = Toy(True, dtype), Toy(False, dtype)
    first = {name: value.clone() for name, value in sparse.state_dict().items()}
    norms = train(sparse, make_optimizer(sparse, "SGD", lr=0.3), range(20), clip)
    optimizer = torch.optim.SGD(dense.parameters(), 0.3)
    for step in range(20):
        optimizer.zero_grad()
        dense.loss(ids_of(step)).backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(dense.parameters(), clip)
            torch.testing.assert_close(norms[step], norm, rtol=rtol, atol=0)
        optimizer.step()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], value, rtol=rtol, atol=rtol)
        assert not torch.equal(first[name], value)


def test_rows_read_in_every_step_move_as_in_dense_adam() -> None:
    """Then lazy moments are Adam's; eps, which SparseAdam adds elsewhere, is made negligible."""
    sparse, dense = Toy(True), Toy(False)
    mine = LazyAdam([*sparse.linear.parameters()], [sparse.table.weight], 1e-2, eps=1e-30)
    adam = torch.optim.Adam(dense.parameters(), 1e-2, eps=1e-30)
    every = torch.arange(30)
    for step in range(10):
        ids = every[torch.randperm(30, generator=torch.Generator().manual_seed(step))]
        for model, optimizer in ((sparse, mine), (dense, adam)):
            optimizer.zero_grad()
            model.loss(ids).backward()
            optimizer.step()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], value, rtol=1e-10, atol=1e-12)


def test_rows_that_were_not_read_keep_values_and_moments() -> None:
    model = Toy(True)
    optimizer = make_optimizer(model, lr=0.1)
    assert isinstance(optimizer, LazyAdam)
    train(model, optimizer, range(5))
    before = model.table.weight.detach().clone()

    def moments() -> dict[str, Tensor]:
        state = optimizer.state_dict()["tables"]["state"][0]
        return {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}

    memory = moments()
    optimizer.zero_grad()
    model.loss(torch.tensor([3, 4, 4])).backward()
    optimizer.step()
    moved = (model.table.weight.detach() != before).any(1).nonzero().squeeze(1).tolist()
    assert moved == [3, 4]
    for key, old in memory.items():
        new = moments()[key]
        assert (new != old).any(1).nonzero().squeeze(1).tolist() == [3, 4], key
    assert memory["exp_avg"][5].abs().sum() > 0  # a row with a past that a dense Adam would have moved


def test_clipping_counts_coalesced_rows() -> None:
    """A row read twice counts by the sum of its two gradients: sqrt(2^2 * 4) = 4, not sqrt(8) = 2.83."""
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    norm = clip_grad_norm(table.weight, 2.0)
    assert norm.item() == pytest.approx(4.0)
    assert table.weight.grad is not None
    torch.testing.assert_close(table.weight.grad.to_dense()[1], torch.ones(4), rtol=1e-6, atol=0)


def test_clipping_without_gradients_and_bad_norms() -> None:
    assert clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0).item() == 0
    with pytest.raises(ValueError, match="max_norm must be at least 0, got -1"):
        clip_grad_norm([], -1)
    with pytest.raises(ValueError, match="max_norm must be at least 0, got nan"):
        clip_grad_norm([], float("nan"))


@pytest.mark.parametrize("sparse", [True, False])
def test_resumed_training_is_bit_equal(sparse: bool) -> None:
    """State through ``torch.save`` and ``weights_only=True``, as checkpoints have it."""
    straight = Toy(sparse)
    optimizer = make_optimizer(straight, lr=0.05, weight_decay=0.01)
    train(straight, optimizer, range(6))
    buffer = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(straight, optimizer, range(6, 12))

    buffer.seek(0)
    content = torch.load(buffer, weights_only=True)
    resumed = Toy(sparse)
    again = make_optimizer(resumed, lr=0.5)
    resumed.load_state_dict(content["model"])
    again.load_state_dict(content["optimizer"])
    train(resumed, again, range(6, 12))
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_schedulers_and_groups_reach_both_halves() -> None:
    model = Toy(True)
    optimizer = make_optimizer(model, lr=0.1, table_lr=0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, range(1))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.2]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(1, 3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_split_leaves_out_what_is_frozen() -> None:
    model = Toy(True)
    model.linear.bias.requires_grad_(False)
    dense, tables = split_parameters(model)
    assert [id(p) for p in dense] == [id(model.linear.weight)]
    assert [id(p) for p in tables] == [id(model.table.weight)]
    dense, tables = split_parameters(Toy(False))
    assert len(dense) == 3
    assert tables == []


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        LazyAdam([], [])
    with pytest.raises(ValueError, match="unknown optimizer Adagard: did you mean Adagrad"):
        make_optimizer(Toy(True), "Adagard")
    with pytest.raises(ValueError, match=r"unknown option optimizer.options.momentun: did you mean momentum"):
        make_optimizer(Toy(True), "SGD", momentun=0.9)
    with pytest.raises(ValueError, match="the optimizer Adam refuses its options or the model: Invalid beta"):
        make_optimizer(Toy(False), "Adam", betas=[2.0, 0.9])
    with pytest.raises(ValueError, match="model must have trainable parameters"):
        make_optimizer(nn.ReLU())
    optimizer = make_optimizer(Toy(True))
    with pytest.raises(ValueError, match="must have the keys"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    other = make_optimizer(Toy(False)).state_dict()
    with pytest.raises(ValueError, match=r"state_dict\['tables'\] must be given"):
        optimizer.load_state_dict(other)
    with pytest.raises(ValueError, match="cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


TAKE_SPARSE = {"LazyAdam", "SGD", "Adagrad"}
NEVER = {"SparseAdam": "dense gradients", "LBFGS": "(closure|parameter groups)", "Muon": "2D"}


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_trains_or_says_why_not(name: str, sparse: bool) -> None:
    model = Toy(sparse)
    if name in NEVER:
        with pytest.raises(ValueError, match=rf"the optimizer {name} .*{NEVER[name]}"):
            make_optimizer(model, name)
        return
    if sparse and name not in TAKE_SPARSE:
        with pytest.raises(ValueError, match=r"cannot take the sparse gradients .*make the model with sparse=False"):
            make_optimizer(model, name)
        return
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, name, lr=0.01, table_lr=0.02)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.01, 0.02]
    train(model, optimizer, range(3), clip=5.0)
    for key, value in model.state_dict().items():
        assert not torch.equal(value, before[key]), key


def test_options_reach_the_optimizer_and_weight_decay_spares_sparse_tables() -> None:
    model = Toy(True)
    optimizer = make_optimizer(model, "SGD", lr=0.1, momentum=0.9, weight_decay=0.5)
    assert [(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.9, 0.5), (0.9, 0.0)]
    dense = make_optimizer(Toy(False), "AdamW", weight_decay=0.5, betas=[0.5, 0.6])
    assert [(g["betas"], g["weight_decay"]) for g in dense.param_groups] == [((0.5, 0.6), 0.5)]


def test_closure_is_called_with_gradients() -> None:
    model = Toy(True)
    optimizer = make_optimizer(model)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model.loss(ids_of(0))
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == pytest.approx(float(model.loss(ids_of(0)).detach()), rel=0.1)


@pytest.mark.parametrize(
    "name, options, wrong",
    [
        ("LazyAdam", {"betas": "x"}, ["betas"]),
        ("LazyAdam", {"betas": [0.9]}, ["betas"]),
        ("LazyAdam", {"betas": [0.9, 0.99, 0.999]}, ["betas"]),
        ("LazyAdam", {"eps": 1e-8, "weight_decay": "x"}, ["weight_decay"]),
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": "x"}, ["weight_decay"]),
        ("Adam", {"betas": "x", "eps": -1}, ["betas", "eps"]),
        ("AdamW", {"betas": [0.9]}, ["betas"]),
    ],
)
def test_a_refused_option_is_named(name: str, options: dict[str, Any], wrong: list[str]) -> None:
    with pytest.raises(ValueError, match=f"the optimizer {name} ") as error:
        make_optimizer(Toy(sparse=False), name, **options)
    named = [word.partition(" = ")[0] for word in str(error.value).split("optimizer.options.")[1:]]
    assert named == wrong
