"""The layers as nn.Modules: copies, files, moves, compile, export, autocast, func, parametrizations."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dien_kernels.layers
from dien_kernels.layers import AGRU, AIGRU, AUGRU, GRU, BilinearAttention, DINAttention
from tests.layers.support import H, I, assert_equal_bits, randn

pytestmark = pytest.mark.usefixtures("one_thread")
B, T = 4, 5
LENGTHS = torch.tensor([3, 0, 5, 1])
MASK = torch.arange(T) < LENGTHS.unsqueeze(1)
MAKERS: dict[str, Callable[..., nn.Module]] = {
    "gru": lambda **options: GRU(I, H, 2, batch_first=True, bidirectional=True, padded="carry", **options),
    "augru": lambda **options: AUGRU(I, H, form="authors", reset="before", **options),
    "augru-tied": lambda **options: AUGRU(I, H, "tied", **options),
    "agru": lambda **options: AGRU(I, H, "single", **options),
    "aigru": lambda **options: AIGRU(I, H, False, **options),
    "bilinear": lambda **options: BilinearAttention(2, I, scale=0.5, **options),
    "din": lambda **options: DINAttention(I, (6, 4), activation="prelu", normalize=None, **options),
    "dice": lambda **options: DINAttention(I, (6, 4), activation="dice", **options),
}
RECURRENT = ("gru", "augru", "augru-tied", "agru", "aigru")
NAMES = tuple(MAKERS)


def inputs(name: str, batch: int = B, steps: int = T, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x = randn(batch, steps, I, dtype=dtype)
    if name == "gru":
        return (x,)
    if name in ("bilinear", "din", "dice"):
        return randn(batch, 2 if name == "bilinear" else I, seed=1, dtype=dtype), x
    return x, torch.rand(batch, steps, generator=torch.Generator().manual_seed(2)).to(dtype)


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(5)
    return MAKERS[name](**options)


def outputs(layer: nn.Module, name: str, **extra: Any) -> tuple[Tensor, ...]:
    dtype = next(layer.parameters()).dtype
    found = layer(*inputs(name, dtype=dtype), **({"lengths": LENGTHS} | extra))
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_pickle_and_files(name: str) -> None:
    layer = make(name).eval()
    expected = outputs(layer, name)
    whole, state = io.BytesIO(), io.BytesIO()
    torch.save(layer, whole)
    torch.save(layer.state_dict(), state)
    whole.seek(0)
    state.seek(0)
    fresh = MAKERS[name]().eval()
    fresh.load_state_dict(torch.load(state, weights_only=True), strict=True)
    for copied in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(whole, weights_only=False),
        fresh,
    ):
        assert_equal_bits(outputs(copied, name), expected)
        assert repr(copied) == repr(layer)
        assert len(list(copied.parameters())) == len(list(layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_move_to_another_dtype(name: str, dtype: torch.dtype) -> None:
    layer = make(name).to(dtype).eval()
    built = MAKERS[name](dtype=dtype).eval()
    assert {n: p.dtype for n, p in built.named_parameters()} == {n: dtype for n, _ in layer.named_parameters()}
    built.load_state_dict(layer.state_dict())
    found = outputs(layer, name)
    assert_equal_bits(found, outputs(built, name))
    if name in RECURRENT:
        assert found[0].dtype == dtype
    else:
        assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_meta_device(name: str) -> None:
    """Built without memory, then filled: by to_empty and a copy, or by assigning a state_dict."""
    layer = make(name).eval()
    for assign in (False, True):
        empty = MAKERS[name](device="meta").eval()
        assert all(p.is_meta for p in empty.parameters())
        filled = empty if assign else empty.to_empty(device="cpu")
        filled.load_state_dict(layer.state_dict(), assign=assign)
        assert_equal_bits(outputs(filled, name), outputs(layer, name))
        assert len(list(filled.parameters())) == len(list(layer.parameters()))


def test_shapes_on_the_meta_device() -> None:
    """A GRU says its shapes without computing."""
    x = torch.empty(B, T, I, device="meta")
    for y, h_n in (
        GRU(I, H, 2, batch_first=True, bidirectional=True, device="meta")(x),
        torch.nn.GRU(I, H, 2, batch_first=True, bidirectional=True, device="meta")(x),
    ):
        assert (y.shape, h_n.shape) == ((B, T, 2 * H), (4, B, H))


class Counting:
    """A compiler backend that counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
        self.graphs += 1
        return graph.forward


def compiled_and_eager(name: str, layout: str, **options: Any) -> int:
    """Compile a layer, run it and its backward on two sizes, compare with eager; the number of graphs."""
    counting = Counting()
    torch.compiler.reset()
    layer = make(name)
    if name == "gru":  # two recurrences in a graph say as much as four, in half the time
        layer = GRU(I, H, batch_first=True, bidirectional=True, padded="carry")
    compiled = torch.compile(layer, backend=counting, fullgraph=True, **options)
    for batch, steps in ((4, 6), (7, 9)):  # unlike one another and the fixed sizes: equal ones share a symbol
        valid = torch.arange(steps) < torch.arange(batch).clamp(max=steps).unsqueeze(1)
        extra = {"full": {}, "lengths": {"lengths": valid.sum(1)}, "mask": {"mask": valid}}[layout]
        found = [f(*inputs(name, batch, steps), **extra) for f in (compiled, layer)]
        mine, eager = (t if isinstance(t, tuple) else (t,) for t in found)
        assert_equal_bits(mine, eager)
        grads = [torch.autograd.grad(sum(t.sum() for t in o), list(layer.parameters())) for o in (mine, eager)]
        assert_equal_bits(*grads)
    return counting.graphs


@pytest.mark.slow
@pytest.mark.parametrize("name, layout", [("gru", "lengths"), ("gru", "mask"), ("augru-tied", "full")])
def test_compile_has_no_break(name: str, layout: str) -> None:
    assert compiled_and_eager(name, layout) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, layout",
    [
        ("gru", "full"),
        ("augru", "lengths"),
        ("augru", "mask"),
        ("augru-tied", "full"),
        ("agru", "full"),
        ("aigru", "full"),
        ("bilinear", "lengths"),
        ("bilinear", "mask"),
        ("din", "full"),
    ],
)
def test_compile_with_dynamic_sizes_is_one_graph(name: str, layout: str) -> None:
    assert compiled_and_eager(name, layout, dynamic=True) == 1


def test_compile_of_jagged_layers() -> None:
    torch.compiler.reset()
    offsets, history = torch.tensor([0, 2, 2, 7]), torch.tensor([2, 0])
    gru, augru, dice = GRU(I, H), AUGRU(I, H), DINAttention(I, (4,), activation="dice")
    x = randn(7, I)

    def model(x: Tensor) -> tuple[Tensor, ...]:
        states, _ = gru(x, offsets=offsets)
        a = dice(x[:2], x, offsets=offsets, history=history, rows_total=7)
        return *augru(x, a, offsets=offsets, history=history), states

    assert_equal_bits(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_dice_checks_offsets(compiler: str) -> None:
    torch.compiler.reset()
    dice, x = DINAttention(I, (4,), activation="dice").eval(), randn(7, I)
    compiled = torch.compile(dice, backend=compiler, fullgraph=True)
    with torch.no_grad():
        assert compiled(x[:2], x, offsets=torch.tensor([0, 3, 7])).shape == (7,)
        for offsets in ([0, 3, 6], [0, 9, 7], [1, 3, 7]):
            with pytest.raises(RuntimeError, match="offsets must ascend from 0 to N"):
                compiled(x[:2], x, offsets=torch.tensor(offsets))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n != "dice"])
def test_export(name: str) -> None:
    layer = make(name).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, arguments: tuple[Tensor, ...], lengths: Tensor) -> Any:
            return self.layer(*arguments, lengths=lengths)

    b, t = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    dims = tuple({0: b} if i.shape[1:] == i.shape[1:2] and i.shape[1] != T else {0: b, 1: t} for i in inputs(name))
    program = torch.export.export(Model(), (inputs(name), LENGTHS), dynamic_shapes=(dims, {0: b}))
    longer = torch.tensor([9, 0, 3, 1, 2, 7, 8])
    for arguments, lengths in ((inputs(name), LENGTHS), (inputs(name, 7, 9), longer)):
        mine, eager = program.module()(arguments, lengths), layer(*arguments, lengths=lengths)
        mine, eager = (o if isinstance(o, tuple) else (o,) for o in (mine, eager))
        assert_equal_bits(mine, eager)


@pytest.mark.parametrize("name", RECURRENT)
def test_autocast_casts_inputs_and_matrices_only(name: str) -> None:
    layer = make(name)
    low = {n: p.detach().bfloat16() if "weight" in n else p.detach() for n, p in layer.named_parameters()}
    x = inputs(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(layer, name)
    options = {"lengths": LENGTHS}
    low_inputs = (x[0].bfloat16(), *x[1:])
    by_hand = torch.func.functional_call(layer, low, low_inputs, options)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert_equal_bits(found, by_hand)
    grads = torch.autograd.grad(sum(t.float().sum() for t in found), list(layer.parameters()))
    assert {g.dtype for g in grads} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert outputs(layer.double(), name)[0].dtype == torch.float64


@pytest.mark.parametrize("name", ["bilinear", "din", "dice"])
def test_autocast_of_attention_units(name: str) -> None:
    layer = make(name)
    exact = outputs(layer, name)[0]
    with torch.autocast("cpu", torch.bfloat16):
        (scores,) = outputs(layer, name)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(scores, exact)
    grads = torch.autograd.grad(scores.square().sum(), list(layer.parameters()))
    assert {g.dtype for g in grads} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_and_grad(name: str) -> None:
    layer = make(name).eval()
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found = torch.func.functional_call(layer, parameters, inputs(name), {"lengths": LENGTHS})
        return sum(t.square().sum() for t in (found if isinstance(found, tuple) else (found,)))

    grads = torch.func.grad(loss)(parameters)
    own = torch.autograd.grad(sum(t.square().sum() for t in outputs(layer, name)), list(layer.parameters()))
    for (n, grad), expected in zip(grads.items(), own, strict=True):
        assert torch.equal(grad, expected), n
    zeros = {n: torch.zeros_like(p) for n, p in parameters.items()}
    found = torch.func.functional_call(layer, zeros, inputs(name), {"lengths": LENGTHS})
    if name in RECURRENT:
        assert not found[0].any()


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


@pytest.mark.parametrize("name", NAMES)
def test_parametrizations_and_replaced_parameters(name: str) -> None:
    """Whatever stands under a parameter's name is what runs, and what gets the gradient."""
    layer, twin = make(name).eval(), make(name).eval()
    where, leaf = {"gru": ("", "weight_hh_l1_reverse"), "bilinear": ("", "weight")}.get(name, ("", "weight_hh"))
    if name in ("din", "dice"):
        where, leaf = "linears.1", "weight"
    target, other = layer.get_submodule(where), twin.get_submodule(where)
    nn.utils.parametrize.register_parametrization(target, leaf, Double())
    setattr(other, leaf, nn.Parameter(2 * getattr(other, leaf).detach()))
    found, expected = outputs(layer, name), outputs(twin, name)
    assert_equal_bits(found, expected)
    original = target.parametrizations[leaf].original
    (grad,) = torch.autograd.grad(sum(t.square().sum() for t in found), original)
    (half,) = torch.autograd.grad(sum(t.square().sum() for t in expected), getattr(other, leaf))
    assert torch.equal(grad, 2 * half)
    layer.double()
    assert outputs(layer, name)[0].dtype == torch.float64


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", NAMES)
def test_without_grad_mode(name: str, mode: Callable) -> None:
    layer = make(name).eval()
    expected = outputs(layer, name)
    with mode():
        found = outputs(layer, name)
    assert_equal_bits(found, expected)
    assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "dice"])
def test_the_backend_is_passed_on(name: str, backend: str) -> None:
    layer = make(name, backend=backend)
    if backend == "torch":
        for one, two in zip(outputs(layer, name), outputs(make(name), name), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        return
    with pytest.raises(RuntimeError, match="backend 'cuda' refuses this call"):
        outputs(layer, name)


def test_examples_in_the_docstrings_run() -> None:
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    ran = 0
    for name in dien_kernels.layers.__all__:
        cls = getattr(dien_kernels.layers, name)
        globs = vars(dien_kernels.layers) | {"torch": torch}
        for example in finder.find(cls, name, module=False, globs=globs):
            result = runner.run(example)
            assert result.failed == 0, name
            ran += result.attempted
    assert ran >= 6
