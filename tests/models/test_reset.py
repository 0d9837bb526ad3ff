"""Every module restores its own start: models that are started over, or that come from the meta device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dien_kernels.layers import AGRU, AIGRU, AUGRU, GRU, DINAttention, from_rows
from dien_kernels.models import MODELS, RankingModel, build
from tests.models.common import SCHEMA, nested

# Next to the two presets, what they do not contain: moving averages, glorot without gate biases, PReLU in all places.
CASES: list[tuple[str, str | None, dict[str, Any]]] = [
    *((name, preset, {}) for name in MODELS for preset in (None, "paper", "authors")),
    ("dien", None, {"head.norm": "moving", "init": "glorot", "embedding.std": 0.3}),
    (
        "dien",
        None,
        {"attention.kind": "din", "attention.activation": "prelu", "head.activation": "prelu", "prelu_init": 0.1},
    ),
    ("dien", None, {"auxiliary.kind": "mlp", "auxiliary.activation": "prelu", "auxiliary.norm": "fixed"}),
    (
        "dien",
        None,
        {"evolution.kind": "gru", "evolution.bias": "single", "evolution.gate_bias": -1.5},
    ),
    ("dien", None, {"evolution.kind": "agru", "evolution.bias": "tied", "evolution.gate_bias": 2.0}),
]


def fresh(name: str, preset: str | None, options: dict[str, Any], seed: int = 5) -> RankingModel:
    torch.manual_seed(seed)
    return build(name, SCHEMA, nested(options), preset)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every buffer, whether it is saved or not."""
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def scramble(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(123)


def start_over(model: nn.Module, order: str, seed: int = 11) -> None:
    """As ``model.apply`` does it, children first, or in the order of ``model.modules()``."""
    torch.manual_seed(seed)

    def reset(module: nn.Module) -> None:
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()

    if order == "apply":
        model.apply(reset)
        return
    for module in model.modules():
        reset(module)


@pytest.mark.parametrize("order", ["apply", "modules"])
@pytest.mark.parametrize("name, preset, options", CASES, ids=lambda v: str(v))
def test_a_model_that_is_started_over_is_as_a_fresh_one(
    name: str, preset: str | None, options: dict[str, Any], order: str
) -> None:
    new, used = fresh(name, preset, options), fresh(name, preset, options)
    start, other = tensors(new), tensors(fresh(name, preset, options, seed=6))
    scramble(used)
    start_over(used, order)
    trained = {key: p.requires_grad for key, p in new.named_parameters()}
    assert {key: p.requires_grad for key, p in used.named_parameters()} == trained
    for key, value in tensors(used).items():
        first = start[key]
        if torch.equal(first, other[key]):  # no draw of the generator is in it
            assert torch.equal(value, first), f"{key} starts with {first.unique().tolist()}"
            continue
        assert not torch.equal(value, first), f"{key} was not drawn anew"
        if value.numel() >= 36:  # the deviation of 36 values is known to about 1 / sqrt(72) = 12 %, twice; 3 times that
            assert abs(math.log(float(value.std() / first.std()))) < 3 * 0.12 * math.sqrt(2), key
    # Nothing of what the model was before is left in what is drawn: a fresh one gives the same numbers for the seed.
    start_over(new, order)
    for key, value in tensors(new).items():
        assert torch.equal(value, tensors(used)[key]), key


@pytest.mark.parametrize("name, preset, options", CASES, ids=lambda v: str(v))
def test_a_model_of_the_meta_device_is_a_fresh_one(name: str, preset: str | None, options: dict[str, Any]) -> None:
    """The way of FSDP and of torchtune: made without memory, given memory, started by each module itself."""
    new = fresh(name, preset, options)
    with torch.device("meta"):
        made = build(name, SCHEMA, nested(options), preset)
    made.to_empty(device="cpu")
    scramble(made)  # what uninitialised memory may hold
    start_over(made, "modules")
    start_over(new, "modules")
    frozen = {key for key, p in new.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, p in made.named_parameters() if not p.requires_grad}
    for key, value in tensors(new).items():
        assert torch.equal(tensors(made)[key], value), key


def test_every_module_with_parameters_or_buffers_can_start_over() -> None:
    for name, preset, options in CASES:
        for module in fresh(name, preset, options).modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            assert not own or callable(getattr(module, "reset_parameters", None)), type(module)


def test_embeddings_and_matrices_start_as_documented() -> None:
    """Against the formulas, on tensors large enough to tell: 0.05 and Glorot's bound."""
    schema = type(SCHEMA)(items={"item": 4000})
    table = build("average", schema).embeddings.items["item"].weight
    assert float(table.detach().std()) == pytest.approx(0.05, rel=0.02)  # of 72,000 values: 0.3 % is one deviation
    model = build("gru", schema, {"init": "glorot"})
    bound = math.sqrt(6 / (4000 + 18))
    assert 0.999 * bound < float(model.embeddings.items["item"].weight.detach().abs().max()) <= bound
    layer = model.extractor
    gates, candidate = layer.weight_ih_l0[:36].detach().abs().max(), layer.weight_ih_l0[36:].detach().abs().max()
    assert 0.97 * math.sqrt(6 / 72) < float(gates) <= math.sqrt(6 / 72)
    assert 0.97 * math.sqrt(6 / 54) < float(candidate) <= math.sqrt(6 / 54)
    assert not layer.bias_ih_l0.any()


@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
def test_a_single_bias_of_the_drop_in_gru_stays_zero(layers: int, bidirectional: bool) -> None:
    layer = GRU(3, 4, layers, bias="single", bidirectional=bidirectional)
    twin = torch.nn.GRU(3, 4, layers, bidirectional=bidirectional)
    assert list(layer.state_dict()) == list(twin.state_dict())
    scramble(layer)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad == (not name.startswith("bias_hh"))
        assert bool(parameter.any()) == parameter.requires_grad
    assert "bias=single" in repr(layer)


@pytest.mark.parametrize("zero", ["bias_ih", "bias_hh"])
def test_a_bias_that_the_source_does_not_have_stays_zero(zero: str) -> None:
    weights = {"weight_ih": torch.randn(12, 3), "weight_hh": torch.randn(12, 4)}
    biases = {"bias_ih": torch.randn(12), "bias_hh": torch.randn(12)}
    layer = GRU.from_weights(from_rows(**weights, **{name: b for name, b in biases.items() if name != zero}))
    frozen = getattr(layer, f"{zero}_l0")
    assert not frozen.requires_grad
    layer.reset_parameters()
    assert not frozen.any()
    assert all(bool(p.any()) for p in layer.parameters() if p is not frozen)


@pytest.mark.parametrize(
    "layer, r, u",
    [
        (GRU(2, 4, gate_bias=2.0), 2.0, 2.0),
        (GRU(2, 4, gate_bias=2.0, update="candidate"), 2.0, -2.0),
        (AUGRU(2, 4, gate_bias=2.0), 2.0, -2.0),
        (AUGRU(2, 4, gate_bias=2.0, form="authors"), 2.0, 2.0),
        (AUGRU(2, 4, "tied", gate_bias=2.0), 1.0, -1.0),
        (AIGRU(2, 4, "single", gate_bias=2.0), 2.0, 2.0),
        (AGRU(2, 4, gate_bias=2.0, weight_init="glorot"), 2.0, 2.0),
    ],
    ids=repr,
)
def test_gate_bias_of_layers(layer: nn.Module, r: float, u: float) -> None:
    scramble(layer)
    layer.reset_parameters()
    bias = next(p for name, p in layer.named_parameters() if name.startswith("bias_ih"))
    assert bias[:8].tolist() == [r] * 4 + [u] * 4


def test_slopes_of_attention_start_where_they_are_told() -> None:
    layer = DINAttention(4, activation="prelu", prelu_init=0.1)
    scramble(layer)
    start_over(layer, "modules")
    slopes = [p for m in layer.modules() if isinstance(m, nn.PReLU) for p in m.parameters()]
    assert len(slopes) == 2
    assert all(bool((slope == 0.1).all()) for slope in slopes)
