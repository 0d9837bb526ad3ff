"""layers.GRU in the place of torch.nn.GRU: constructor, parameters, padded and unbatched input, dropout."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dien_kernels.layers import GRU
from tests.layers.support import DTYPES, H, I, assert_equal_bits, assert_twins_agree, data_of, randn, twins

pytestmark = pytest.mark.usefixtures("one_thread")
T, B = 4, 3
STACKS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    {"num_layers": 3, "bidirectional": True},
    {"bidirectional": True, "bias": False},
]


def ident(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "plain"


def run(layer: torch.nn.Module, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return layer(input, hx)


def state(options: dict[str, Any], batch: int | None = B) -> Tensor:
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    return randn(layers, *([] if batch is None else [batch]), H, seed=9)


def test_the_constructor_takes_the_same_arguments_in_the_same_order() -> None:
    # The last overload of torch's stub: num_layers, bias, batch_first, dropout, bidirectional, device, dtype.
    ours = [p for p in inspect.signature(GRU).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = inspect.signature(torch.nn.RNNBase).parameters
    names = [name for name in theirs if name not in ("mode", "proj_size")]
    assert [p.name for p in ours] == names
    for p in ours[2:]:
        assert p.default == theirs[p.name].default, p.name
    layer = GRU(3, 5, 2, False, True, 0.25, True, None, torch.float64)
    twin = torch.nn.GRU(3, 5, 2, False, True, 0.25, True, dtype=torch.float64)
    for name in (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    ):
        assert getattr(layer, name) == getattr(twin, name), name
    assert layer.weight_ih_l0.dtype == torch.float64
    assert repr(layer) == repr(twin)
    assert repr(GRU(3, 5, reset="before", padded="carry")) == "GRU(3, 5, reset=before, padded=carry)"


@pytest.mark.parametrize("options", STACKS, ids=ident)
def test_same_seed_same_numbers_and_the_state_dict_goes_both_ways(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    mine = GRU(I, H, **options)
    torch.manual_seed(3)
    twin = torch.nn.GRU(I, H, **options)
    ours, theirs = mine.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert [len(names) for names in mine.all_weights] == [len(names) for names in twin.all_weights]
    for one, two in zip(sum(mine.all_weights, []), sum(twin.all_weights, []), strict=True):
        assert torch.equal(one, two)
    mine.flatten_parameters()

    other = {name: torch.rand_like(value) for name, value in theirs.items()}
    twin.load_state_dict(other, strict=True)
    mine.load_state_dict(twin.state_dict(), strict=True)
    fresh = torch.nn.GRU(I, H, **options)
    fresh.load_state_dict(mine.state_dict(), strict=True)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, other[name]), name
    with pytest.raises(RuntimeError, match="Missing key"):
        mine.load_state_dict({})

    torch.manual_seed(4)
    mine.reset_parameters()
    torch.manual_seed(4)
    twin.reset_parameters()
    assert torch.equal(mine.weight_hh_l0, twin.weight_hh_l0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", STACKS, ids=ident)
def test_time_major_with_and_without_a_first_state(options: dict[str, Any], dtype: torch.dtype) -> None:
    twin = twins(dtype, **options)
    assert_twins_agree(twin, run, input=randn(T, B, I))
    assert_twins_agree(twin, run, input=randn(T, B, I), hx=state(options))


@pytest.mark.parametrize("options", STACKS, ids=ident)
def test_batch_first_and_unbatched(options: dict[str, Any]) -> None:
    twin = twins(batch_first=True, **options)
    assert_twins_agree(twin, run, input=randn(B, T, I), hx=state(options))
    assert_twins_agree(twin, run, input=randn(T, I), hx=state(options, batch=None))
    assert_twins_agree(twin, run, input=randn(T, I))
    time_major = twins(**options)
    assert_twins_agree(time_major, run, input=randn(T, I), hx=state(options, batch=None))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_sizes_of_one_and_strided_inputs(backend: str) -> None:
    for t, b in ((1, 1), (1, 4), (5, 1)):
        twin = twins(num_layers=2, bidirectional=True, backend=backend)
        assert_twins_agree(twin, run, input=randn(t, b, I), hx=randn(4, b, H, seed=1))

    def strided(layer: torch.nn.Module, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        return layer(input[..., ::2].transpose(0, 1), hx.transpose(1, 2))

    twin = twins(bidirectional=True, backend=backend)
    assert_twins_agree(twin, strided, input=randn(B, T, 2 * I), hx=randn(2, H, B, seed=1))


def test_layouts_and_shapes_of_the_outputs_are_torchs() -> None:
    options = {"num_layers": 2, "bidirectional": True}
    for batch_first in (False, True):
        mine, plain, _ = twins(torch.float32, batch_first=batch_first, **options)
        for shape in ((T, B, I), (T, I)):
            for one, two in zip(mine(randn(*shape)), plain(randn(*shape)), strict=True):
                assert one.shape == two.shape


def test_an_empty_batch_has_empty_outputs() -> None:
    mine, plain, _ = twins(torch.float32)
    for one, two in zip(mine(torch.empty(T, 0, I)), plain(torch.empty(T, 0, I)), strict=True):
        assert one.shape == two.shape


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_between_layers_drops_the_very_numbers_torch_drops(bidirectional: bool) -> None:
    """Time-major the layers' outputs lie as torch's do, so one seed draws one mask."""
    options = {"num_layers": 3, "bidirectional": bidirectional, "dropout": 0.5}

    def seeded(layer: torch.nn.Module, input: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(11)
        return layer(input)

    twin = twins(**options)
    x = randn(T, B, I, dtype=torch.float64)
    assert_twins_agree(twin, seeded, input=x)
    y, _ = seeded(twin[0], x)
    for layer in twin:
        layer.eval()
    assert_twins_agree(twin, run, input=x)
    assert not torch.equal(y, twin[0](x)[0])


@pytest.mark.parametrize("form", ["batch_first", "lengths", "mask", "packed", "unbatched"])
def test_dropout_reaches_every_layout(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dropout that halves, torch's layers composed by hand; the last layer's outputs stay whole."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, *rest: x * p)
    torch.manual_seed(0)
    layer = GRU(I, H, 2, batch_first=True, dropout=0.5)
    first, second = torch.nn.GRU(I, H, batch_first=True), torch.nn.GRU(H, H, batch_first=True)
    for number, twin in enumerate((first, second)):
        own = {n.replace(f"_l{number}", "_l0"): v for n, v in layer.state_dict().items() if f"_l{number}" in n}
        twin.load_state_dict(own)
    x = randn(B, T, I)
    lengths = torch.full((B,), T)
    if form == "packed":
        x_in: Any = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    else:
        x_in = x[0] if form == "unbatched" else x
    extra = {"lengths": {"lengths": lengths}, "mask": {"mask": torch.ones(B, T, dtype=torch.bool)}}.get(form, {})
    y, h_n = layer(x_in, **extra)
    middle, h_first = first(x)
    expected, h_second = second(middle * 0.5)
    if form == "packed":
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
    torch.testing.assert_close(y, expected[0] if form == "unbatched" else expected)
    h_expected = torch.cat((h_first, h_second))
    torch.testing.assert_close(h_n, h_expected[:, 0] if form == "unbatched" else h_expected)


def test_dropout_has_its_probability_and_keeps_the_mean() -> None:
    """The second layer copies the tiny inputs it reads, so zeros and scale can be counted."""
    p, small = 0.3, 1e-3
    layer = GRU(1, 1, 2, dropout=p, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor([[0.0], [-50.0], [small]]))  # u = 0: h = n = tanh(small)
        layer.weight_hh_l0.zero_()
        layer.weight_ih_l1.copy_(torch.tensor([[0.0], [-1e6], [1.0]]))
        layer.weight_hh_l1.zero_()
    n = 20000
    torch.manual_seed(0)
    y = layer(torch.ones(1, n, 1, dtype=torch.float64))[0].flatten()
    dropped = float((y == 0).double().mean())
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, small / (1 - p)), rtol=1e-4, atol=0)


def test_dropout_of_one_layer_warns_as_torch_does_and_does_nothing() -> None:
    with pytest.warns(UserWarning, match="num_layers"):
        torch.nn.GRU(I, H, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout=0.5 .* num_layers=1"):
        layer = GRU(I, H, dropout=0.5)
    assert_equal_bits(layer(randn(T, B, I)), layer.eval()(randn(T, B, I)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRU(I, H, 2, dropout=1.0)


def test_reset_and_update_reach_every_layer_and_direction() -> None:
    """update="candidate" is keep with its update rows negated; reset="before" by its own formula."""
    options = {"num_layers": 2, "bidirectional": True}
    mine, _, _ = twins(torch.float64, **options)
    other = GRU(I, H, dtype=torch.float64, update="candidate", **options)
    turned = {n: torch.cat((v[:H], -v[H : 2 * H], v[2 * H :])) for n, v in mine.state_dict().items()}
    other.load_state_dict(turned)
    x = randn(T, B, I, dtype=torch.float64)
    for one, two in zip(other(x), mine(x), strict=True):
        torch.testing.assert_close(one, two)

    before = GRU(I, H, dtype=torch.float64, reset="before")
    w, u, b, c = before.state_dict().values()
    h, ys = torch.zeros(B, H, dtype=torch.float64), []
    for x_t in x:
        r, z = ((x_t @ w[: 2 * H].t() + b[: 2 * H]) + (h @ u[: 2 * H].t() + c[: 2 * H])).sigmoid().chunk(2, 1)
        n = torch.tanh(x_t @ w[2 * H :].t() + b[2 * H :] + (r * h) @ u[2 * H :].t() + c[2 * H :])
        h = z * h + (1 - z) * n
        ys.append(h)
    torch.testing.assert_close(data_of(before(x)[0]), torch.stack(ys))
