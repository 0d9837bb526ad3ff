"""BilinearAttention, DINAttention and Dice against padded computations written out from their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dien_kernels.layers import BilinearAttention, Dice, DINAttention
from tests.layers.support import randn
from tests.tolerances import assert_close_to

pytestmark = pytest.mark.usefixtures("one_thread")
U, B, T, H, D = 4, 6, 5, 3, 2
LENGTHS = torch.tensor([3, 0, 5, 1])
BY_LENGTH = torch.arange(T) < LENGTHS.unsqueeze(1)
VALID = {
    "full": torch.ones(U, T, dtype=torch.bool),
    "lengths": BY_LENGTH,
    "jagged": BY_LENGTH,
    "holes": torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool(),
    "empty": torch.zeros(U, T, dtype=torch.bool),
}
HISTORY = torch.tensor([2, 0, 2, 1, 3, 0])
ACTIVATIONS = ("sigmoid", "relu", "prelu", "dice", None)


def dice_by_hand(
    s: Tensor, alpha: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-8
) -> Tensor:  # arXiv 1706.06978, equation 3
    p = 1 / (1 + torch.exp(-(s - mean) / torch.sqrt(var + eps)))
    return p * s + (1 - p) * alpha * s


def act(layer: DINAttention, i: int, z: Tensor, valid: Tensor) -> Tensor:
    """The i-th activation of padded values z [B, T, M]; Dice's statistics over the valid ones."""
    if layer.activation in (None, "sigmoid", "relu"):
        return z if layer.activation is None else getattr(torch, layer.activation)(z)
    unit = layer.activations[i]
    if layer.activation == "prelu":
        return torch.where(z > 0, z, unit.weight * z)
    mean, var = unit.bn.running_mean, unit.bn.running_var
    count = valid.sum().to(z.dtype)
    if layer.training and count > 1:
        weight = valid.unsqueeze(2) / count
        mean = (z * weight).sum((0, 1))
        var = ((z - mean).square() * weight).sum((0, 1))
    return dice_by_hand(z, unit.alpha, mean, var)


def by_hand(layer: nn.Module, target: Tensor, states: Tensor, valid: Tensor) -> Tensor:
    """Scores [B, T]; states [B, T, H] and valid [B, T] already stand once for each row."""
    if isinstance(layer, BilinearAttention):
        e = torch.einsum("bth,hd,bd->bt", states, layer.weight, target)
    else:
        q = target.unsqueeze(1).expand_as(states)
        z = torch.cat((q, states, q - states, q * states), 2)
        for i, linear in enumerate(layer.linears):
            z = z @ linear.weight.t()
            z = z if linear.bias is None else z + linear.bias
            z = act(layer, i, z, valid) if i < len(layer.linears) - 1 else z
        e = z.squeeze(2)
    e = e * (1 if layer.scale is None else layer.scale)
    if layer.normalize is None:
        return torch.where(valid, e, 0)
    weight = torch.where(valid, torch.exp(e), 0)
    total = weight.sum(1, keepdim=True)
    return weight / torch.where(total > 0, total, 1)


def make(kind: str | None, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    options = {"dtype": torch.float64, "scale": 0.7} | options
    if kind == "bilinear":
        return BilinearAttention(D, H, **options)
    layer = DINAttention(H, (6, 4), activation=kind, **options)
    with torch.no_grad():
        for unit in layer.activations:  # away from the values they start with
            if isinstance(unit, Dice):
                unit.alpha.copy_(randn(*unit.alpha.shape, seed=5))
                unit.bn.running_mean.copy_(randn(*unit.alpha.shape, seed=6) / 4)
                unit.bn.running_var.copy_(randn(*unit.alpha.shape, seed=7).square() + 0.1)
    return layer


def check(layer: nn.Module, layout: str, shared: bool) -> None:
    """Scores and every gradient, on one layout, with or without shared histories."""
    valid = VALID[layout]
    of_row = HISTORY if shared else torch.arange(U)
    size = D if isinstance(layer, BilinearAttention) else H
    target = randn(len(of_row), size, dtype=torch.float64).requires_grad_()
    states = randn(U, T, H, seed=1, dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"history": HISTORY} if shared else {}
    options |= {"lengths": {"lengths": LENGTHS}, "holes": {"mask": valid}, "empty": {"mask": valid}}.get(layout, {})
    given = states
    if layout == "jagged":
        given = states[valid]
        options["offsets"] = torch.tensor([0, *LENGTHS.tolist()]).cumsum(0)
        if shared:
            options["rows_total"] = int(LENGTHS[HISTORY].sum())
    expected = by_hand(layer, target, states[of_row], valid[of_row])
    scores = layer(target, given, **options)
    if layout == "jagged":
        scores = expected.new_zeros(expected.shape).index_put(valid[of_row].nonzero(as_tuple=True), scores)
    assert not scores[~valid[of_row]].any(), "scores of padding are exactly 0"
    wanted = (target, states, *layer.parameters())
    upstream = randn(*expected.shape, seed=9, dtype=torch.float64)
    found = [(s, *torch.autograd.grad(s, wanted, upstream, materialize_grads=True)) for s in (scores, expected)]
    names = ("scores", "d_target", "d_states", *(f"d_{n}" for n, _ in layer.named_parameters()))
    # Softmax does not see a shift, so some gradients are differences that vanish: the largest sets the scale.
    scale = max(float(t.detach().abs().max()) for t in found[1] if t.numel())
    for name, mine, exact in zip(names, *found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-13 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", VALID)
@pytest.mark.parametrize("kind", ["bilinear", "sigmoid", "dice"])
def test_every_layout(kind: str, layout: str, shared: bool) -> None:
    check(make(kind), layout, shared)


@pytest.mark.parametrize("kind", ["bilinear", *ACTIVATIONS])
def test_every_activation_with_and_without_softmax_bias_and_scale(kind: str | None) -> None:
    for options in ({"normalize": None}, {"scale": None}, {"backend": "torch"}):
        check(make(kind, **options), "holes", False)
    if kind != "bilinear":
        check(make(kind, bias=False), "lengths", True)


def test_the_number_of_layers_is_free() -> None:
    for units in ((), (4,), (5, 4, 3)):
        check(DINAttention(H, units, activation="relu", dtype=torch.float64), "lengths", False)


def test_parameters_and_how_they_start() -> None:
    bilinear = BilinearAttention(16, 3)
    assert [(n, tuple(p.shape)) for n, p in bilinear.named_parameters()] == [("weight", (3, 16))]
    assert 0.5 * 16**-0.5 < bilinear.weight.abs().max() <= 16**-0.5
    torch.manual_seed(0)
    din = DINAttention(3, activation="prelu")
    torch.manual_seed(0)
    plain = [nn.Linear(12, 80), nn.Linear(80, 40), nn.Linear(40, 1)]
    for mine, other in zip(din.linears, plain, strict=True):
        assert torch.equal(mine.weight, other.weight)
        assert torch.equal(mine.bias, other.bias)
    assert [a.weight.tolist() for a in din.activations] == [[0.25] * 80, [0.25] * 40]
    assert len(DINAttention(3).activations) == 0
    assert repr(DINAttention(3, ())).startswith("DINAttention(\n  3, activation='sigmoid', scale=None, norm")
    assert repr(bilinear) == "BilinearAttention(16, 3, scale=None, normalize='softmax')"


@pytest.mark.parametrize("kind", ["bilinear", "sigmoid", "dice"])
def test_nan_in_padding_reaches_nothing(kind: str) -> None:
    """Not even Dice's statistics."""
    target, found = randn(U, D if kind == "bilinear" else H, dtype=torch.float64), []
    for filler in (0.0, float("nan")):
        layer = make(kind)
        states = randn(U, T, H, seed=1, dtype=torch.float64).masked_fill(~VALID["holes"].unsqueeze(2), filler)
        states.requires_grad_()
        scores = layer(target, states, mask=VALID["holes"])
        grads = torch.autograd.grad(scores.square().sum(), (states, *layer.parameters()))
        found.append((scores, *grads, *layer.buffers()))
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("kind", ["bilinear", "relu", "dice"])
def test_scores_too_large_for_exp_are_a_softmax_still(kind: str) -> None:
    layer, raw = make(kind, scale=1e4), make(kind, scale=1e4, normalize=None)
    target = randn(U, D if kind == "bilinear" else H, dtype=torch.float64)
    states = randn(U, T, H, seed=1, dtype=torch.float64)
    scores, e = layer(target, states, lengths=LENGTHS), raw(target, states, lengths=LENGTHS)
    assert e.abs().max() > 800
    exact = torch.softmax(e.masked_fill(~BY_LENGTH, -torch.inf), 1).nan_to_num(0)
    torch.testing.assert_close(scores, exact)


def test_dice_in_training_and_evaluation_by_hand() -> None:
    s = randn(50, 3, dtype=torch.float64).requires_grad_() * 2 + 1
    dice = Dice(3, eps=0.01, momentum=0.2, dtype=torch.float64)
    assert (dice.alpha.tolist(), dice.bn.running_mean.tolist()) == ([0.0] * 3, [0.0] * 3)
    with torch.no_grad():
        dice.alpha.copy_(torch.tensor([0.1, -0.5, 0.7]))
    mean, var = s.mean(0), s.var(0, unbiased=False)
    exact = dice_by_hand(s, dice.alpha, mean, var, 0.01)
    assert_close_to(dice(s), exact, exact, "training")
    torch.testing.assert_close(dice.bn.running_mean, 0.2 * mean.detach())
    torch.testing.assert_close(dice.bn.running_var, 0.8 + 0.2 * s.detach().var(0))
    grads = torch.autograd.grad(exact.square().sum(), dice.alpha)
    torch.testing.assert_close(torch.autograd.grad(dice(s).square().sum(), dice.alpha), grads)
    dice.eval()
    moving = (dice.bn.running_mean.clone(), dice.bn.running_var.clone())
    exact = dice_by_hand(s, dice.alpha, *moving, 0.01)
    assert_close_to(dice(s), exact, exact, "evaluation")
    assert torch.equal(dice.bn.running_mean, moving[0])


@pytest.mark.parametrize("rows", [0, 1])
def test_dice_of_too_few_rows_uses_the_moving_averages_and_leaves_them_alone(rows: int) -> None:
    dice, s = Dice(3), randn(rows, 3)
    before = {name: value.clone() for name, value in dice.state_dict().items()}
    torch.testing.assert_close(dice(s), dice_by_hand(s, dice.alpha, torch.zeros(3), torch.ones(3)))
    for name, value in dice.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_dice_sees_every_valid_step_of_every_row_once() -> None:
    """Statistics of the first layer: of pairs, so a history named twice counts twice."""
    layer = make("dice")
    before = layer.activations[0].bn.running_mean.clone()
    target, states = randn(B, H, dtype=torch.float64), randn(U, T, H, seed=1, dtype=torch.float64)
    layer(target, states, lengths=LENGTHS, history=HISTORY)
    pairs = [
        torch.cat((q, k, q - k, q * k)) for q, u in zip(target, HISTORY, strict=True) for k in states[u, : LENGTHS[u]]
    ]
    z = layer.linears[0](torch.stack(pairs))
    torch.testing.assert_close(layer.activations[0].bn.running_mean, 0.9 * before + 0.1 * z.mean(0))
    assert int(layer.activations[0].bn.num_batches_tracked) == 1


def test_scores_of_16_bit_states_are_float32() -> None:
    for kind in ("bilinear", "sigmoid", "dice"):
        layer = make(kind, dtype=torch.bfloat16).eval()
        twin = make(kind).eval()
        twin.load_state_dict(layer.state_dict())
        target = randn(U, D if kind == "bilinear" else H, dtype=torch.bfloat16)
        states = randn(U, T, H, seed=1, dtype=torch.bfloat16)
        scores = layer(target, states, lengths=LENGTHS)
        assert scores.dtype == torch.float32
        exact = twin(target.double(), states.double(), lengths=LENGTHS)
        torch.testing.assert_close(scores.double(), exact, rtol=0.03, atol=0.01)
