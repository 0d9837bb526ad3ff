"""auxiliary_loss on every backend against its definition, and against torch's own losses."""

from __future__ import annotations

import doctest
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from dien_kernels.histories import Histories
from dien_kernels.ops._mlp import ACTIVATIONS, Layers
from dien_kernels.ops.auxiliary_loss import auxiliary_loss, op, reference, torch_backend
from dien_kernels.ops.auxiliary_loss.contract import NORMALIZERS, Options
from tests.cases import running_on, target_params
from tests.ops.conftest import UNIT_TARGETS, takes, unit_on
from tests.tolerances import assert_close_to
from tests.unit_cases import assert_compiles
from tests.unit_cases import raggedness as any_raggedness

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPSILONS = (0.0, 1e-8, 1e-6, "clamp")
TENSORS = ("states", "positive", "negative", "weights", "biases", "slopes", "affine")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes here are small: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expected(case: dict, valid: Tensor) -> Tensor:
    """The definition on padded rows with lengths, whatever the layout under test; valid [B, T].

    What the op folds into the weights before any backend sees them stands where the equations have it: the affine map
    on the inputs, and of a softmax over two outputs the difference.
    """
    row, first = torch.arange(len(valid)).unsqueeze(1), (~valid).int().argsort(dim=1, stable=True)  # valid steps first
    h, e, n = (case[name][row, first] for name in ("states", "positive", "negative"))
    if case["affine"] is not None:
        (scale_h, scale_e), (shift_h, shift_e) = (t.tensor_split([h.shape[-1]]) for t in case["affine"])
        h, e, n = h * scale_h + shift_h, e * scale_e + shift_e, n * scale_e + shift_e
    weights, biases = list(case["weights"]), [h.new_empty(0) if b is None else b for b in case["biases"]]
    for values in (weights, biases):
        if values and len(values[-1]) == 2:
            values[-1] = values[-1][:1] - values[-1][1:]
    options = Options(
        inner=case["kind"] == "inner",
        activation=ACTIVATIONS.index(case["activation"]),
        normalizer=NORMALIZERS.index(case["normalizer"]),
        eps=-1.0 if case["eps"] == "clamp" else case["eps"],
        ahead=int(case["shift"]),
    )
    layers = Layers(weights, biases, list(case["slopes"]))
    return reference.auxiliary_loss(h, e, n, layers, Histories(valid.sum(1)), options)


def make(
    kind="mlp", batch=4, steps=5, hidden=3, size=2, several=1, activation="sigmoid", sizes=(6, 4), outputs=1,
    bias="all", affine=False, normalizer="joint", eps=0.0, shift=True, dtype=torch.float64, seed=0,
) -> dict:  # fmt: skip
    torch.manual_seed(seed)
    size = hidden if kind == "inner" else size
    case = {"kind": kind, "activation": activation, "normalizer": normalizer, "eps": eps, "shift": shift}
    case |= {"weights": (), "biases": (), "slopes": (), "affine": None}
    case["states"], case["positive"] = torch.randn(batch, steps, hidden), torch.randn(batch, steps, size)
    case["negative"] = torch.randn(batch, steps, several, size)
    if kind == "mlp":
        widths = (hidden + size, *sizes, outputs)
        pairs = list(zip(widths[1:], widths, strict=False))
        case["weights"] = [torch.randn(o, i) / math.sqrt(i) for o, i in pairs]
        if bias != "none":
            case["biases"] = [torch.randn(o) if bias == "all" or i % 2 == 1 else None for i, (o, _) in enumerate(pairs)]
        if activation == "prelu":
            case["slopes"] = [torch.rand(o) for o in sizes]
        if affine:
            case["affine"] = (torch.rand(widths[0]), torch.randn(widths[0]))
    return cast(case, dtype)


def cast(case: dict, dtype: torch.dtype, keep_small: bool = False) -> dict:
    """Every tensor to ``dtype``; with ``keep_small`` the small ones stay float32 beside 16-bit storage."""

    def to(value, name):
        if isinstance(value, Tensor):
            small = name in ("biases", "slopes", "affine") and keep_small and dtype.itemsize == 2
            return value.detach().to(torch.float32 if small else dtype).requires_grad_()
        if isinstance(value, (list, tuple)):
            return [to(v, name) for v in value]
        return value

    return {name: to(value, name) for name, value in case.items()}


def leaves(case: dict) -> list[Tensor]:
    found = []
    for name in TENSORS:
        value = case[name]
        found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
    return found


def call(case: dict, **layout) -> Tensor:
    return auxiliary_loss(**{**case, **layout})


raggedness = partial(any_raggedness, kept=0.6)


def run(case: dict, layout: str, valid: Tensor) -> Tensor:
    if layout == "jagged":
        offsets = torch.cat((torch.zeros(1, dtype=torch.long), valid.sum(1).cumsum(0)))
        flat = {name: case[name][valid] for name in ("states", "positive", "negative")}
        return call({**case, **flat}, offsets=offsets)
    extra = {"lengths": valid.sum(1)} if layout == "lengths" else {"mask": valid} if layout == "mask" else {}
    return call(case, **extra)


def close(actual: Tensor, exact: Tensor, plain: Tensor, name: str) -> None:
    """The tolerance rule; float64 has no better reference than plain torch, so there a fixed bound."""
    if plain.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-13, msg=lambda text: f"{name}: {text}")
    else:
        assert_close_to(actual, exact, plain, name)


def compare(case: dict, layout: str, valid: Tensor, dtype: torch.dtype, name: str) -> None:
    stored = cast(case, dtype)
    exact, plain, ours = (
        cast(stored, torch.float64),
        cast(stored, dtype),
        cast(stored, dtype, keep_small=True),
    )
    actual, want, rough = run(ours, layout, valid), expected(exact, valid), expected(plain, valid)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.shape == ()
    close(actual.detach(), want.detach(), rough.detach(), name)
    pairs = [torch.autograd.grad(o, leaves(c)) for o, c in ((actual, ours), (want, exact), (rough, plain))]
    for i, (a, e, p) in enumerate(zip(*pairs, strict=True)):
        assert a.dtype == leaves(ours)[i].dtype
        close(a, e, p, f"{name}: gradient {i}")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("layout", ["full", "lengths", "mask", "jagged"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", ["inner", "mlp"])
def test_normalizers_and_layouts(kind: str, normalizer: str, layout: str) -> None:
    if layout == "jagged" and normalizer == "padded":
        with pytest.raises(ValueError, match="normalizer must not be 'padded'"):
            run(make(normalizer="padded"), layout, raggedness(layout, 4, 5))
        return
    for several in (1, 3):
        for shift in (True, False):
            case = make(kind, normalizer=normalizer, several=several, shift=shift, batch=5)
            valid = raggedness(layout, 5, 5)
            compare(case, layout, valid, torch.float64, f"{kind} {normalizer} {layout} K={several}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["inner", "mlp"])
@pytest.mark.parametrize("name", target_params(UNIT_TARGETS))
def test_epsilons_and_dtypes(name: str, kind: str, dtype: torch.dtype, record_combination: Callable[..., None]) -> None:
    record_combination("auxiliary_loss", name, kind, dtype)
    takes(name, dtype)
    with unit_on(name, torch_backend):
        epsilons_in(kind, dtype)


def epsilons_in(kind: str, dtype: torch.dtype) -> None:
    for eps in EPSILONS:
        if dtype == torch.float16 and eps not in (0.0, "clamp"):
            continue  # plain torch rounds the epsilon away there
        case = make(kind, batch=6, steps=6, hidden=8, size=8, several=2, eps=eps)
        with torch.no_grad():
            case["states"] *= 0.5  # plain torch's log(1 - sigmoid) is only good at moderate logits
        for layout in ("lengths", "jagged"):
            compare(case, layout, raggedness("lengths", 6, 6), dtype, f"{kind} {eps} {layout} {dtype}")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "prelu", None])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("affine", [False, True])
def test_layers(affine: bool, outputs: int, activation: str | None) -> None:
    for bias in ("all", "some", "none"):
        for sizes in ((), (5,), (6, 4)):
            case = make(sizes=sizes, bias=bias, activation=activation, outputs=outputs, affine=affine, eps=1e-8)
            compare(case, "lengths", raggedness("lengths", 4, 5), torch.float64, f"{sizes} {bias}")


@pytest.mark.usefixtures("target")
def test_clamp_is_torchs_binary_cross_entropy() -> None:
    x = torch.tensor([-120.0, -60, -3, 0, 3, 30], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(6, 1, 1, dtype=torch.float64)
    h = torch.ones(6, 1, 1, dtype=torch.float64)
    got = auxiliary_loss(h, x.view(6, 1, 1), zero, eps="clamp", shift=False) * 2 - math.log(2)
    want = binary_cross_entropy(torch.sigmoid(x), torch.ones_like(x))
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got, x)
    assert grad[0] == 0  # past the clamp
    torch.testing.assert_close(grad[2:], torch.autograd.grad(want, x)[0][2:])


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("units", [4, 7, 8, 16])  # whole vectors and padded ones, for every instruction set
def test_finite_with_an_infinite_state_behind_a_sigmoid(units: int) -> None:
    states, behaviours = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    states[0, 0, 0] = math.inf
    weights = [torch.ones(units, 8), torch.ones(1, units)]
    loss = auxiliary_loss(states, behaviours, behaviours, weights, kind="mlp")  # every unit is 1, x = units
    x = torch.tensor(float(units))
    torch.testing.assert_close(loss, -(torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)) / 2)


@pytest.mark.native
@pytest.mark.parametrize("several", [2**60 - 1, 2**59 - 1])
@pytest.mark.parametrize("size", [4, 7, 8])
@pytest.mark.parametrize("shift", [True, False])
def test_a_size_beyond_any_memory_is_refused(shift: bool, size: int, several: int) -> None:
    h = torch.zeros(1, 1, size)
    negative = torch.zeros(1, 1, 1, size).expand(1, 1, several, size)
    with running_on("cpu"), pytest.raises(MemoryError):
        auxiliary_loss(h, h, negative, shift=shift, backend="cpu")


@pytest.mark.usefixtures("target")
def test_negative_without_its_dimension() -> None:
    case = make(several=1)
    flat = {**case, "negative": case["negative"].squeeze(2)}
    assert torch.equal(call(case), call(flat))
    valid = raggedness("lengths", 4, 5)
    assert torch.equal(run(case, "jagged", valid), run(flat, "jagged", valid))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", ["inner", "mlp"])
def test_no_pair_is_no_loss(kind: str, normalizer: str) -> None:
    for batch, steps, lengths in (
        (3, 4, [0, 1, 0]),
        (3, 1, None),
        (3, 0, None),
        (0, 4, None),
        (2, 1, [0, 1]),
    ):
        for eps in EPSILONS:
            case = make(kind, batch=batch, steps=steps, normalizer=normalizer, eps=eps, affine=kind == "mlp")
            loss = call(case, lengths=None if lengths is None else torch.tensor(lengths))
            assert loss == 0
            for g in torch.autograd.grad(loss, leaves(case)):
                assert not g.any()
                assert g.isfinite().all()
    if normalizer != "padded":
        case = make(kind, batch=3, normalizer=normalizer)
        empty = {name: case[name][0, :1] for name in ("states", "positive", "negative")}
        assert call({**case, **empty}, offsets=torch.tensor([0, 0, 1, 1])) == 0
        empty = {name: case[name][0, :0] for name in ("states", "positive", "negative")}
        assert call({**case, **empty}, offsets=torch.tensor([0, 0])) == 0
        assert call({**case, **empty}, offsets=torch.tensor([0])) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", EPSILONS)
def test_finite_at_extreme_logits(eps: float | str, dtype: torch.dtype, target: str) -> None:
    takes(target, dtype)
    for sign in (1, -1):
        h = torch.full((1, 3, 2), 100.0, dtype=dtype).requires_grad_()
        e = torch.full((1, 3, 2), 100.0 * sign, dtype=dtype).requires_grad_()
        loss = auxiliary_loss(h, e, e, eps=eps)
        assert loss.isfinite()
        for g in torch.autograd.grad(loss, (h, e)):
            assert g.isfinite().all()
        if eps == 0:
            assert loss == 10000
        elif eps == "clamp":
            assert loss == 50
        else:
            torch.testing.assert_close(loss.double(), torch.tensor(-math.log(eps) / 2).double(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("layout", ["lengths", "mask"])
@pytest.mark.parametrize("kind", ["inner", "mlp"])
def test_nan_in_padding_changes_nothing(kind: str, layout: str) -> None:
    for normalizer in NORMALIZERS:
        case = make(kind, several=2, normalizer=normalizer, batch=5)
        valid = raggedness(layout, 5, 5)
        clean, dirty = cast(case, torch.float64), cast(case, torch.float64)
        with torch.no_grad():
            for name in ("states", "positive", "negative"):
                dirty[name][~valid] = math.nan
            if layout == "lengths":
                for b, length in enumerate(valid.sum(1).tolist()):
                    if length:  # the last state and the first behaviour are in no pair
                        dirty["states"][b, length - 1] = math.nan
                        dirty["positive"][b, 0] = dirty["negative"][b, 0] = math.nan
        a, b = run(clean, layout, valid), run(dirty, layout, valid)
        assert torch.equal(a, b)
        for x, y in zip(torch.autograd.grad(a, leaves(clean)), torch.autograd.grad(b, leaves(dirty)), strict=True):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("name", ["states", "positive", "negative"])
@pytest.mark.parametrize("layout", ["lengths", "jagged", "mask"])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "prelu", None])
def test_nan_in_a_pair_reaches_the_loss_and_every_weight(activation, layout, name) -> None:
    for eps in EPSILONS:
        case = make(activation=activation, eps=eps)
        with torch.no_grad():
            case[name][2, 2] = math.nan
        loss = run(case, layout, raggedness("lengths", 4, 5))
        assert loss.isnan()
        for g in torch.autograd.grad(loss, [*case["weights"], *case["biases"], *case["slopes"]]):
            assert g.isnan().any()
        inner = make("inner", eps=eps)
        with torch.no_grad():
            inner[name][2, 2] = math.nan
        assert run(inner, layout, raggedness("lengths", 4, 5)).isnan()


@pytest.mark.usefixtures("target")
def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "TILE", {"cpu": 40, "cuda": 40})
    for kind in ("inner", "mlp"):
        for layout in ("full", "lengths", "jagged"):
            case = make(kind, batch=7, steps=6, several=2, normalizer="row")
            compare(case, layout, raggedness(layout, 7, 6), torch.float64, f"{kind} {layout} tiles")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("kind", ["inner", "mlp"])
def test_more_pairs_than_a_chunk_of_the_compiled_kernels(kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        case = make(kind, batch=9, steps=60, several=2, dtype=dtype)
        compare(case, "lengths", raggedness("lengths", 9, 60), dtype, f"{kind} {dtype}")


@pytest.mark.parametrize("kind", ["inner", "mlp"])
def test_the_same_bits_again_and_on_two_threads(kind: str, target: str) -> None:
    """The definition's products are BLAS's, whose sums may depend on the number of threads: there, only again."""
    case = make(kind, batch=30, steps=40, hidden=8, several=2, dtype=torch.float32)

    def once() -> list[Tensor]:
        loss = call(case)
        return [loss, *torch.autograd.grad(loss, leaves(case))]

    first = once()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = once() if target == "reference" else first
        for a, b in zip(first, once(), strict=True):
            assert torch.equal(a, b)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["inner", "mlp"]),
    layout=st.sampled_from(["full", "lengths", "mask", "jagged"]),
    normalizer=st.sampled_from(NORMALIZERS),
    batch=st.integers(0, 6),
    steps=st.integers(0, 8),
    hidden=st.integers(1, 9),
    size=st.integers(1, 5),
    several=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 7), max_size=3),
    outputs=st.integers(1, 2),
    shift=st.booleans(),
    target=st.sampled_from([t for t in UNIT_TARGETS if t != "cpu-avx512"]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    kind, layout, normalizer, batch, steps, hidden, size, several, sizes, outputs, shift, target, seed
) -> None:
    normalizer = "joint" if layout == "jagged" and normalizer == "padded" else normalizer
    case = make(
        kind, batch, steps, hidden, size, several, sizes=tuple(sizes), outputs=outputs, shift=shift,
        normalizer=normalizer, seed=seed,
    )  # fmt: skip
    valid = raggedness(layout, batch, steps)
    with unit_on(target, torch_backend):
        compare(case, layout, valid, torch.float64, "hypothesis")


@pytest.mark.usefixtures("target")
def test_gradcheck_and_no_second_derivative() -> None:
    for kind in ("inner", "mlp"):
        case = make(kind, batch=2, steps=3, hidden=2, size=2, sizes=(3,), activation="prelu", several=2, outputs=2)
        names = [n for n in TENSORS if isinstance(case[n], Tensor)]
        inputs = leaves(case)

        def f(*tensors, case=case, names=names):
            args = {**case, **dict(zip(names, tensors, strict=False))}
            if case["kind"] == "mlp":
                rest = tensors[3:]
                args |= {"weights": rest[:2], "biases": rest[2:4], "slopes": rest[4:]}
            return call(args, lengths=torch.tensor([3, 2]))

        assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.usefixtures("target")
def test_autocast_casts_the_big_operands_only() -> None:
    case = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(case)
    half = {**case, **{n: case[n].bfloat16() for n in ("states", "positive", "negative")}}
    half["weights"] = [w.bfloat16() for w in case["weights"]]
    assert torch.equal(got, call(half))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(got, leaves(case)))


@pytest.mark.usefixtures("target")
def test_noncontiguous_inputs_int32_and_inference() -> None:
    case = make(several=2)
    lengths = torch.tensor([5, 0, 1, 4])
    want = call(case, lengths=lengths)
    for name in ("states", "positive", "negative"):
        case[name] = case[name].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert torch.equal(call(case, lengths=lengths.int()), want)
    with torch.inference_mode():
        assert torch.equal(call(case, lengths=lengths), want.detach())


def _bad() -> list:
    t = torch
    inner = lambda: make("inner")  # noqa: E731
    zeros = lambda *s: t.zeros(*s, dtype=t.float64)  # noqa: E731
    return [
        (make, {"kind": "dot"}, ValueError, "kind must be one of"),
        (make, {"activation": "dice"}, ValueError, "activation must be one of"),
        (make, {"normalizer": "mean"}, ValueError, "normalizer must be one of"),
        (make, {"eps": -1.0}, ValueError, "eps must be 0, .clamp. or a number"),
        (make, {"eps": math.nan}, ValueError, "eps must be 0, .clamp. or a number"),
        (make, {"eps": "none"}, ValueError, "eps must be one of"),
        (make, {"eps": None}, TypeError, "eps must be a number or 'clamp'"),
        (make, {"shift": 1}, TypeError, "shift must be a bool"),
        (make, {"backend": "tpu"}, ValueError, "backend must be one of"),
        (make, {"backend": "cuda"}, RuntimeError, "no cuda implementation"),
        (make, {"states": 1.0}, TypeError, "states must be a torch.Tensor"),
        (make, {"states": zeros(4, 5)}, ValueError, "states must be"),
        (make, {"states": zeros(4, 5, 0)}, ValueError, "states must have at least one feature"),
        (make, {"states": t.zeros(4, 5, 3, dtype=t.int32)}, TypeError, "states must have dtype"),
        (make, {"positive": None}, TypeError, "positive must be a torch.Tensor"),
        (make, {"positive": zeros(4, 4, 2)}, ValueError, "positive must have shape"),
        (make, {"positive": zeros(4, 5)}, ValueError, "positive must have shape"),
        (make, {"positive": t.zeros(4, 5, 2)}, TypeError, "positive must have the dtype of states"),
        (inner, {"positive": zeros(4, 5, 2)}, ValueError, "positive must have H = 3"),
        (make, {"negative": None}, TypeError, "negative must be a torch.Tensor"),
        (make, {"negative": zeros(4, 5, 3)}, ValueError, "negative must have shape"),
        (make, {"negative": zeros(4, 5, 0, 2)}, ValueError, "negative must have shape .* with K >= 1"),
        (make, {"negative": zeros(4, 5, 1, 3)}, ValueError, "negative must have shape"),
        (inner, {"weights": [zeros(1, 6)]}, ValueError, "weights, biases, slopes and affine must be empty"),
        (make, {"weights": []}, ValueError, "weights must hold at least one layer"),
        (make, {"weights": zeros(1, 5)}, TypeError, "weights must be a list or tuple"),
        (make, {"weights": [zeros(3, 5)], "biases": ()}, ValueError, "must have 1 or 2 outputs"),
        (make, {"weights": [zeros(1, 6)], "biases": ()}, ValueError, r"weights\[0\] must have shape"),
        (make, {"biases": [None]}, ValueError, "biases must be empty or hold 3"),
        (make, {"slopes": [zeros(1)]}, ValueError, "slopes must hold"),
        (make, {"affine": zeros(5)}, TypeError, "affine must be a pair"),
        (make, {"affine": (zeros(5), zeros(4))}, ValueError, r"affine\[1\] must have shape"),
        (make, {"lengths": t.tensor([1, 2, 3, 6])}, ValueError, "lengths must lie between 0 and T = 5"),
        (make, {"lengths": t.tensor([1, 2])}, ValueError, "lengths must have shape"),
        (make, {"mask": t.ones(4, 5)}, TypeError, "mask must have dtype bool"),
        (make, {"lengths": t.ones(4).long(), "mask": t.ones(4, 5).bool()}, ValueError, "at most one of"),
        (make, {"offsets": t.tensor([0, 5])}, ValueError, r"states must be \[N, features\]"),
    ]


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("build,change,error,words", _bad())
def test_bad_input(build, change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call(build(), **change)


def _layouts(case: dict) -> list[dict]:
    valid = raggedness("lengths", len(case["states"]), case["states"].shape[1])
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), valid.sum(1).cumsum(0)))
    flat = {n: case[n].detach()[valid].requires_grad_() for n in ("states", "positive", "negative")}
    return [{}, {"lengths": valid.sum(1)}, {"mask": valid.flip(1)}, {**flat, "offsets": offsets}]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=pytest.mark.native)])
@pytest.mark.parametrize("kind", ["inner", "mlp"])
def test_opcheck(kind: str, backend: str) -> None:
    with running_on(backend):
        forward, both = op._FWD[backend], op._FWD_BWD[backend]
    case = make(kind, bias="some")
    b = [torch.zeros(0).double() if v is None else v.detach() for v in case["biases"]]
    for layout in _layouts(case):
        if "mask" in layout:
            continue
        values = {**case, **layout}
        args = [values[n].detach() for n in ("states", "positive", "negative")]
        args += [[w.detach() for w in case["weights"]], b, [], values.get("lengths"), values.get("offsets")]
        options = (kind == "inner", 0, 0, 0.0, 1)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(forward, (*args, *options), test_utils=tests)
        torch.library.opcheck(both, (*args, *options), test_utils=tests)


@pytest.mark.slow
def test_compile_without_a_break() -> None:
    for kind in ("inner", "mlp"):
        case = make(kind, affine=kind == "mlp", outputs=2)
        for layout in _layouts(case):
            values = {**case, **layout}
            assert_compiles(lambda values: auxiliary_loss(**values), values, leaves(values))


@pytest.mark.slow
def test_compile_takes_one_tensor_in_two_places() -> None:
    states, negative = (torch.randn(3, 4, 2, requires_grad=True) for _ in range(2))
    values = {"states": states, "positive": states, "negative": negative}
    assert_compiles(lambda values: auxiliary_loss(**values), values, [states, negative])


def test_export_with_dynamic_sizes() -> None:
    case = make()
    rest = {k: v for k, v in case.items() if k not in ("states", "positive", "negative")}
    rest["weights"] = [w.detach() for w in rest["weights"]]
    rest["biases"] = [b.detach() for b in rest["biases"]]

    class Loss(torch.nn.Module):
        def forward(self, states: Tensor, positive: Tensor, negative: Tensor, lengths: Tensor) -> Tensor:
            return auxiliary_loss(states, positive, negative, lengths=lengths, **rest)

    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    names = ("states", "positive", "negative")
    args = (*(case[n].detach() for n in names), torch.tensor([5, 0, 1, 3]))
    shapes = (*({0: batch, 1: steps},) * 3, {0: batch})
    program = torch.export.export(Loss(), args, dynamic_shapes=shapes)
    other = make(batch=7, steps=9)
    args = (*(other[n].detach() for n in names), torch.arange(7))
    torch.testing.assert_close(program.module()(*args), Loss()(*args))


def test_func_grad() -> None:
    case = make()
    lengths = torch.tensor([5, 0, 1, 3])
    got = torch.func.grad(lambda states: call({**case, "states": states}, lengths=lengths))(case["states"].detach())
    torch.testing.assert_close(got, torch.autograd.grad(call(case, lengths=lengths), case["states"])[0])


def test_docstring() -> None:
    op = sys.modules["dien_kernels.ops.auxiliary_loss.op"]
    runner = doctest.DocTestRunner()
    names = {"torch": torch, "auxiliary_loss": auxiliary_loss}
    for test in doctest.DocTestFinder().find(op.auxiliary_loss, globs=names):
        assert runner.run(test).failed == 0
