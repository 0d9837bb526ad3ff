"""AUGRU, AGRU and AIGRU: the op of the same name with the layer's weights; bias modes; ties."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dien_kernels
from dien_kernels.layers import AGRU, AIGRU, AUGRU, GRU, from_deepctr_torch, from_rows
from dien_kernels.ops.recurrence import forms
from tests.layers.support import H, I, assert_equal_bits, randn

pytestmark = pytest.mark.usefixtures("one_thread")
U, B, T = 3, 4, 5
LAYERS = {"augru": AUGRU, "agru": AGRU, "aigru": AIGRU}
BIASES = (True, False, "single", "tied")
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
LENGTHS, OFFSETS = torch.tensor([2, 0, 5]), torch.tensor([0, 2, 2, 7])
MASK = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
HISTORY = torch.tensor([2, 0, 2, 1])


def make(kind: str, bias: bool | str = True, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    return LAYERS[kind](I, H, bias, **options)


def inputs(layout: str, history: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rows = B if history else U
    found: dict[str, Any] = {"x": randn(U, T, I, dtype=dtype), "h0": randn(rows, H, seed=3, dtype=dtype)}
    steps: tuple[int, ...] = (rows, T)
    if layout == "jagged":
        found |= {"x": randn(7, I, dtype=dtype), "offsets": OFFSETS}
        steps = (12 if history else 7,)
    found |= {"lengths": {"lengths": LENGTHS}, "mask": {"mask": MASK}}.get(layout, {})
    if history:
        found["history"] = HISTORY
    return found | {"attention": 0.5 + 0.4 * randn(*steps, seed=4, dtype=dtype)}


def split(found: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    rest = dict(found)
    return rest.pop("x"), rest.pop("attention"), rest


def gradients(outputs: tuple[Tensor, Tensor], wanted: list[Tensor]) -> list[Tensor]:
    upstream = [randn(*t.shape, seed=8 + i).to(t.dtype) for i, t in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True))


def weights(layer: nn.Module) -> list[Tensor | None]:
    return [getattr(layer, name) for name in NAMES]


@pytest.mark.parametrize("layout", ["full", "lengths", "mask", "jagged"])
@pytest.mark.parametrize(
    "kind, history",
    [(kind, history) for kind in LAYERS for history in (False, True)],
)
def test_the_layer_is_its_op(kind: str, history: bool, layout: str) -> None:
    layer = make(kind)
    x, attention, rest = split(inputs(layout, history))
    wanted = [t.requires_grad_() for t in (x, attention, rest["h0"])] + list(layer.parameters())
    mine = layer(x, attention, **rest)
    expected = getattr(dien_kernels, kind)(x, attention, *weights(layer), **rest)
    assert_equal_bits(mine, expected)
    assert_equal_bits(gradients(mine, wanted), gradients(expected, wanted))


FORMS = [("augru", {"form": form}) for form in forms.FORMS]


@pytest.mark.parametrize("kind, form", [*FORMS, ("agru", {}), ("aigru", {})], ids=[*forms.FORMS, "agru", "aigru"])
def test_every_option_reaches_the_op(kind: str, form: dict[str, str]) -> None:
    x, attention, rest = split(inputs("lengths", True))
    found: list[Tensor] = []
    for reset, update, padded in itertools.product(("after", "before"), (None, "keep", "candidate"), ("zero", "carry")):
        options = {"reset": reset, "update": update, "padded": padded, **form}
        layer = make(kind, **options)
        mine = layer(x, attention, **rest)
        assert_equal_bits(mine, getattr(dien_kernels, kind)(x, attention, *weights(layer), **rest, **options))
        if not any(torch.allclose(mine[0], other, atol=1e-5) for other in found):
            found.append(mine[0])
    # Two resets, two sides (none for agru) and two paddings are so many different functions.
    assert len(found) == (4 if kind == "agru" else 8)


def test_the_forms_are_different_functions_and_paper_is_the_default() -> None:
    x, attention, rest = split(inputs("full", False))
    by_form = [make("augru", update="keep", **form)(x, attention, **rest)[0] for _, form in FORMS]
    for one, two in itertools.combinations(by_form, 2):
        assert (one - two).abs().max() > 1e-3
    assert torch.equal(make("augru", update="keep")(x, attention, **rest)[0], by_form[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """In 16 bits attention and h0 may be float32."""
    layer = make(kind, dtype=dtype)
    x, attention, rest = split(inputs("lengths", False, dtype))
    y, h_n = layer(x, attention, **rest)
    assert y.dtype == h_n.dtype == dtype
    if dtype != torch.float64:
        rest["h0"] = rest["h0"].float()
        assert_equal_bits(layer(x, attention.float(), **rest), (y, h_n))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", LAYERS)
def test_bias_modes_have_their_parameters(kind: str, bias: bool | str) -> None:
    layer = make(kind, bias)
    b_ih, b_hh = layer.bias_ih, layer.bias_hh
    assert (b_ih is None) == (bias is False)
    assert (b_hh is None) == (bias in (False, "single"))
    assert (b_ih is b_hh) == (bias in (False, "tied"))
    names = ["bias_ih", "bias_hh"][: {True: 2, False: 0, "single": 1, "tied": 2}[bias]]
    assert list(layer.state_dict()) == ["weight_ih", "weight_hh", *names]
    assert len(list(layer.parameters())) == 2 + {True: 2, False: 0, "single": 1, "tied": 1}[bias]
    for p in layer.parameters():
        assert p.abs().max() <= H**-0.5
        assert p.std() > 0.3 * H**-0.5
    other = make(kind, bias)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert repr(layer).count("bias") == (bias is not True)

    x, attention, rest = split(inputs("lengths", False))
    expected = getattr(dien_kernels, kind)(x, attention, *weights(layer), **rest)
    assert_equal_bits(layer(x, attention, **rest), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_of_a_tied_bias_is_the_sum_of_both_places(kind: str) -> None:
    layer = make(kind, "tied", dtype=torch.float64)
    x, attention, rest = split(inputs("lengths", False, torch.float64))
    (mine,) = gradients(layer(x, attention, **rest), [layer.bias_ih])
    apart = [layer.bias_ih.detach().clone().requires_grad_() for _ in range(2)]
    op = getattr(dien_kernels, kind)
    both = gradients(op(x, attention, layer.weight_ih, layer.weight_hh, *apart, **rest), apart)
    torch.testing.assert_close(mine, both[0] + both[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(both[0], both[1])  # in the rows of n, where r stands between
    assert all(b.abs().max() > 1e-3 for b in both)


def assert_tied(layer: nn.Module) -> None:
    assert layer.bias_ih is layer.bias_hh
    assert isinstance(layer.bias_ih, nn.Parameter)
    assert len(list(layer.parameters())) == 3


def saved(layer: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(layer: nn.Module, assign: bool, device: str = "cpu") -> nn.Module:
    other = AUGRU(I, H, "tied", device=device)
    other.load_state_dict(saved(layer), strict=True, assign=assign)
    return other


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: loaded(layer, False),
        lambda layer: loaded(layer, True),
        lambda layer: loaded(layer, True, "meta"),
        lambda layer: layer.double().float(),
        lambda layer: nn.ModuleList([copy.deepcopy(layer)]).to(torch.float64).float()[0],
    ],
    ids=["deepcopy", "pickle", "state_dict", "assign", "assign-meta", "dtype", "inside"],
)
def test_ties_survive(through: Callable[[nn.Module], nn.Module]) -> None:
    layer = make("augru", "tied")
    before = layer.bias_ih.detach().clone()
    other = through(layer)
    assert_tied(other)
    assert torch.equal(other.bias_hh, before)


def test_ties_survive_to_empty_and_training() -> None:
    layer = AUGRU(I, H, "tied", device="meta").to_empty(device="cpu")
    assert_tied(layer)
    layer.reset_parameters()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x, attention, rest = split(inputs("full", False))
    before = layer.bias_ih.detach().clone()
    layer(x, attention, **rest)[0].sum().backward()
    optimizer.step()
    assert_tied(layer)
    torch.testing.assert_close(layer.bias_hh, before - 0.1 * layer.bias_ih.grad)


def test_a_tied_layer_refuses_two_different_biases() -> None:
    """Rather than keep the last one read."""
    apart = AUGRU(I, H).state_dict()
    layer = AUGRU(I, H, "tied")
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh must be equal for bias='tied'"):
        layer.load_state_dict(apart)
    AUGRU(I, H).load_state_dict(layer.state_dict(), strict=True)


def test_a_parametrization_on_a_tied_bias_acts_in_both_places() -> None:
    class Zero(nn.Module):
        def forward(self, b: Tensor) -> Tensor:
            return 0 * b

    layer = make("augru", "tied")
    nn.utils.parametrize.register_parametrization(layer, "bias_ih", Zero())
    x, attention, rest = split(inputs("full", False))
    expected = dien_kernels.augru(x, attention, layer.weight_ih, layer.weight_hh, **rest)
    for one, two in zip(layer(x, attention, **rest), expected, strict=True):
        torch.testing.assert_close(one, two)
    layer.to(torch.float64)  # and moving it raises nothing


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", LAYERS)
def test_from_weights_is_a_copy_with_their_conventions(kind: str, bias: bool | str) -> None:
    source = make(kind, bias, reset="before", update="keep")
    rows = from_rows(*weights(source), reset="before", update="keep", form="authors")
    layer = LAYERS[kind].from_weights(rows, padded="carry")
    assert (layer.bias, layer.reset, layer.update, layer.padded) == (bias, "before", "keep", "carry")
    for name in source.state_dict():
        one, two = getattr(layer, name), getattr(source, name)
        assert torch.equal(one, two)
        assert one.data_ptr() != two.data_ptr()
        assert one.requires_grad
    other = LAYERS[kind].from_weights(rows, update="candidate")
    x, attention, rest = split(inputs("mask", False))
    assert other.update == "candidate"
    for one, two in zip(
        other(x, attention, **rest), LAYERS[kind].from_weights(rows)(x, attention, **rest), strict=True
    ):
        torch.testing.assert_close(one, two)
    if kind == "augru":
        assert layer.form == "authors"
        assert AUGRU.from_weights(rows, form="prediction_flow").form == "prediction_flow"
    assert LAYERS[kind].from_weights(rows, dtype=torch.float64).weight_hh.dtype == torch.float64


def test_from_weights_drops_no_bias() -> None:
    """A layer with room for fewer biases, or with one vector for two, would be another function."""
    w, u, b, c = randn(3 * H, I), randn(3 * H, H), randn(3 * H, seed=1), randn(3 * H, seed=2)
    room = {"tied": ("tied", True), True: (True,), "single": ("single", True), False: BIASES}
    sources = {
        "tied": from_deepctr_torch(w, u, b),
        True: from_rows(w, u, b, c, form="paper"),
        "single": from_rows(w, u, b, form="paper"),
        False: from_rows(w, u, form="paper"),
    }
    x, attention, rest = split(inputs("full", False))
    for mode, source in sources.items():
        expected = dien_kernels.augru(x, attention, *source.tensors, update=source.update)
        for bias in BIASES:
            if bias in room[mode]:
                layer = AUGRU.from_weights(source, bias=bias)
                for one, two in zip(layer(x, attention), expected, strict=True):
                    torch.testing.assert_close(one, two)
                continue
            with pytest.raises(ValueError, match=rf"bias must be one of .*True.*, got {bias!r}"):
                AUGRU.from_weights(source, bias=bias)
    with pytest.raises(ValueError, match="bias must be one of .*, got False"):
        GRU.from_weights(sources[True], bias=False)
