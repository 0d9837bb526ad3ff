"""attention_scores against a transcription of its formulas that does build the concatenation."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from dien_kernels.ops.attention import attention_scores, op
from dien_kernels.ops.attention import reference as cell
from tests.cases import running_on, target_params
from tests.ops.conftest import UNIT_TARGETS, takes, unit_on
from tests.tolerances import assert_close_to

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("sigmoid", "relu", "prelu", None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes here are small: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(x: Tensor, case: dict) -> Tensor:
    for i, w in enumerate(case["weights"]):
        bias = case["biases"][i] if case["biases"] else None
        x = linear(x, w, None if bias is None else bias.to(x.dtype))
        if i < len(case["weights"]) - 1:
            if case["activation"] == "prelu":
                x = torch.where(x > 0, x, case["slopes"][i].to(x.dtype) * x)
            elif case["activation"] is not None:
                x = getattr(torch, case["activation"])(x)
    return x.squeeze(-1)


def expected(case: dict, valid: Tensor, history: Tensor) -> Tensor:
    """Row by row, valid steps only; [B, T] with zeros elsewhere."""
    out = case["states"].new_zeros(len(history), valid.shape[1])
    for b, u in enumerate(history.tolist()):
        k, q = case["states"][u][valid[u]], case["target"][b]
        if not len(k):
            continue
        if case["kind"] == "din":
            q = q.expand_as(k)
            e = mlp(torch.cat((q, k, q - k, q * k), 1), case)
        else:
            e = k @ (q if case["weights"] is None else case["weights"] @ q)
        e = e * case["scale"]
        e = torch.softmax(e, 0) if case["normalize"] == "softmax" else e
        out = out.index_put((torch.tensor(b), valid[u].nonzero().squeeze(1)), e)
    return out


def make(
    kind="din", batch=4, steps=5, hidden=3, dtype=torch.float64, activation="sigmoid", sizes=(6, 4),
    histories=None, size=None, bias="all", normalize="softmax", scale=0.7, slope="channel", seed=0,
) -> dict:  # fmt: skip
    torch.manual_seed(seed)
    u = batch if histories is None else histories
    size = hidden if kind == "din" or size is None else size
    case = {
        "kind": kind,
        "activation": activation,
        "normalize": normalize,
        "scale": scale,
        "biases": (),
        "slopes": (),
    }
    case["target"] = torch.randn(batch, size)
    case["states"] = torch.randn(u, steps, hidden)
    if kind == "din":
        widths = (4 * hidden, *sizes, 1)
        pairs = list(zip(widths[1:], widths, strict=False))
        case["weights"] = [torch.randn(o, i) / math.sqrt(i) for o, i in pairs]
        if bias != "none":
            keep = lambda i: bias == "all" or i % 2 == 1  # noqa: E731
            case["biases"] = [torch.randn(o) if keep(i) else None for i, (o, _) in enumerate(pairs)]
        if activation == "prelu":
            case["slopes"] = [torch.rand(() if slope == "scalar" else 1 if slope == "one" else o) for o in sizes]
    else:
        case["weights"] = torch.randn(hidden, size) / math.sqrt(size)
    return cast(case, dtype)


def cast(case: dict, dtype: torch.dtype, keep_small: bool = False) -> dict:
    """Every tensor to ``dtype``; with ``keep_small`` biases and slopes stay float32 beside 16-bit storage."""

    def to(value, name):
        if isinstance(value, Tensor):
            small = name in ("biases", "slopes") and keep_small and dtype in (torch.bfloat16, torch.float16)
            return value.detach().to(torch.float32 if small else dtype).requires_grad_()
        if isinstance(value, (list, tuple)) and not isinstance(value, str):
            return [to(v, name) for v in value]
        return value

    return {name: to(value, name) for name, value in case.items()}


def leaves(case: dict) -> list[Tensor]:
    found = []
    for name in ("target", "states", "weights", "biases", "slopes"):
        value = case[name]
        found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
    return found


def call(case: dict, **layout) -> Tensor:
    """The op; with ``device`` in the case, everything is sent there and the scores come back."""
    values = {**case, **layout}
    device = values.pop("device", None)
    if device is None:
        return attention_scores(**values)

    def send(value):
        if isinstance(value, (list, tuple)):
            return [send(v) for v in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return attention_scores(**{name: send(value) for name, value in values.items()}).cpu()


def raggedness(layout: str, u: int, steps: int) -> Tensor:
    """valid [U, T] with lengths 0, 1 and T among others, or holes."""
    if layout == "full":
        return torch.ones(u, steps, dtype=torch.bool)
    if layout == "mask":
        valid = torch.rand(u, steps) < 0.5
        valid[:1] = False
        return valid
    lengths = torch.randint(0, steps + 1, (u,))
    lengths[: min(3, u)] = torch.tensor([0, 1, steps])[: min(3, u)].clamp(max=steps)
    return torch.arange(steps) < lengths.unsqueeze(1)


def run(case: dict, layout: str, valid: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op on any layout; its scores as [B, T], and the output as it came."""
    of_row = torch.arange(len(valid)) if history is None else history
    if layout != "jagged":
        extra = {"lengths": valid.sum(1)} if layout == "lengths" else {"mask": valid} if layout == "mask" else {}
        out = call(case, history=history, **extra)
        return out, out
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), valid.sum(1).cumsum(0)))
    extra = {} if history is None else {"history": history, "rows_total": int(valid[of_row].sum())}
    out = call({**case, "states": case["states"][valid]}, offsets=offsets, **extra)
    at = valid[of_row].nonzero(as_tuple=True)
    return out.new_zeros(len(of_row), valid.shape[1]).index_put(at, out), out


def close(actual: Tensor, exact: Tensor, plain: Tensor, name: str) -> None:
    """The tolerance rule; float64 has no better reference than plain torch, so there a fixed bound."""
    if plain.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-13, msg=lambda text: f"{name}: {text}")
    elif exact.numel() and exact.abs().max() < 1e-12:  # exactly 0 but for rounding: the last bias under a softmax
        assert actual.abs().max() < 1e-6, name
    else:
        assert_close_to(actual, exact, plain, name)


def pooled(exact: list[Tensor], plain: list[Tensor]) -> list[Tensor]:
    """Plain results that are all twice as wrong as the worst of them.

    Under a softmax the upstream gradients of a row sum to zero, so what is summed over its steps cancels, and the error
    left is a draw of noise: on average ours is plain torch's (measured), but one draw says little about another.
    """
    sizes = [float(e.abs().max()) if e.numel() else 0.0 for e in exact]
    errors = [float((p.double() - e).abs().max()) / s for e, p, s in zip(exact, plain, sizes, strict=True) if s > 1e-12]
    worst = 2 * max(errors, default=0.0)
    return [(e + worst * s).to(p.dtype) for e, p, s in zip(exact, plain, sizes, strict=True)]


def compare(case: dict, layout: str, valid: Tensor, history: Tensor | None, dtype: torch.dtype, name: str) -> None:
    """Scores and every gradient; those of a named backend, which sums in its own order, as ``pooled`` says."""
    of_row = torch.arange(len(valid)) if history is None else history
    stored = cast(case, dtype)
    exact, plain = cast(stored, torch.float64), cast(stored, dtype)
    ours = cast(stored, dtype, keep_small=True)
    actual, raw_out = run(ours, layout, valid, history)
    assert raw_out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want, rough = expected(exact, valid, of_row), expected(plain, valid, of_row)
    close(actual.detach(), want.detach(), rough.detach(), name)
    assert not actual[~valid[of_row]].any()
    cotangent = torch.randn_like(want)
    pairs = []
    for out, values in ((actual, ours), (want, exact), (rough, plain)):
        if not out.requires_grad:  # no row has a step
            return
        pairs.append(torch.autograd.grad(out, leaves(values), cotangent.to(out.dtype), allow_unused=True))
    actuals, exacts, plains = (
        [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves(values), strict=True)]
        for grads, values in zip(pairs, (ours, exact, plain), strict=True)
    )
    if case.get("backend") is not None and dtype != torch.float64:
        plains = pooled(exacts, plains)
    for i, (a, e, p) in enumerate(zip(actuals, exacts, plains, strict=True)):
        assert a.dtype == leaves(ours)[i].dtype
        close(a, e, p, f"{name}: gradient {i}")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "history"])
@pytest.mark.parametrize("layout", ["full", "lengths", "mask", "jagged"])
@pytest.mark.parametrize("normalize", ["softmax", None])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_layouts(kind: str, normalize: str | None, layout: str, shared: bool) -> None:
    for steps in (5, 19):  # both forms of the first layer
        case = make(kind, batch=5, steps=steps, histories=4 if shared else None, normalize=normalize, size=2)
        history = torch.tensor([3, 0, 2, 2, 1]) if shared else None
        valid = raggedness(layout, len(case["states"]), steps)
        compare(case, layout, valid, history, torch.float64, f"{kind} {layout} T={steps}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bilinear", "din"])
@pytest.mark.parametrize("name", target_params(UNIT_TARGETS))
def test_dtypes(name: str, kind: str, dtype: torch.dtype, record_cell: Callable[..., None]) -> None:
    record_cell("attention_scores", name, kind, dtype)
    takes(name, dtype)
    with unit_on(name, cell):
        for layout in ("lengths", "jagged"):
            case = make(kind, batch=12, steps=20, hidden=8, sizes=(16, 8), scale=1 / math.sqrt(8))
            compare(case, layout, raggedness("lengths", 12, 20), None, dtype, f"{kind} {layout} {dtype}")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_more_steps_than_a_chunk_of_the_compiled_kernels(kind: str) -> None:
    for layout in ("lengths", "mask", "jagged"):
        case = make(kind, batch=3, steps=300, histories=2, scale=0.1)
        history = torch.tensor([1, 0, 1])
        compare(case, layout, raggedness("full", 2, 300), history, torch.float64, f"{kind} {layout} full")
        valid = torch.arange(300) < torch.tensor([[131], [290]])
        compare(case, layout, valid, history, torch.float64, f"{kind} {layout}")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", ["all", "some", "none"])
@pytest.mark.parametrize("sizes", [(), (5,), (6, 4), (5, 4, 3)], ids=str)
def test_layers(sizes: tuple[int, ...], bias: str, activation: str | None) -> None:
    for slope in ("channel", "one", "scalar") if activation == "prelu" else ("channel",):
        case = make(sizes=sizes, bias=bias, activation=activation, slope=slope)
        for layout in ("lengths", "jagged"):
            compare(case, layout, raggedness("lengths", 4, 5), None, torch.float64, f"{sizes} {bias} {activation}")


@pytest.mark.usefixtures("target")
def test_inner_product_and_one_matrix_in_a_list() -> None:
    case = make("bilinear", scale=None)
    target, states, w = case["target"], case["states"], case["weights"]
    plain = attention_scores(target, states, normalize=None)
    torch.testing.assert_close(plain, torch.einsum("bth,bh->bt", states, target))
    assert torch.equal(attention_scores(target, states, [w]), attention_scores(target, states, w))
    grads = torch.autograd.grad(plain.sum(), (target, states))
    torch.testing.assert_close(grads[0], states.sum(1))
    torch.testing.assert_close(grads[1], target.unsqueeze(1).expand_as(states))


def test_other_orders_of_the_concatenation_are_shuffles_of_the_weight() -> None:
    case = make(scale=None, normalize=None)
    q, k = case["target"].unsqueeze(1).expand_as(case["states"]), case["states"]
    want = mlp(torch.cat((k, q, k - q, k * q), 2), case)
    a, b, c, d = case["weights"][0].chunk(4, 1)
    case["weights"][0] = torch.cat((b, a, -c, d), 1)
    torch.testing.assert_close(call(case), want)


@pytest.mark.usefixtures("target")
def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "TILE", {"cpu": 64, "cuda": 64})
    for kind in ("bilinear", "din"):
        for layout in ("full", "lengths", "mask", "jagged"):
            for steps in (4, 17):
                case = make(kind, batch=11, steps=steps, histories=7)
                history = torch.randint(0, 7, (11,))
                valid = raggedness(layout, 7, steps)
                compare(case, layout, valid, history, torch.float64, f"{kind} {layout} tiles")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["bilinear", "din"]),
    layout=st.sampled_from(["full", "lengths", "mask", "jagged"]),
    batch=st.integers(0, 6),
    steps=st.integers(0, 24),
    hidden=st.integers(1, 9),
    size=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 7), max_size=3),
    histories=st.integers(1, 4) | st.none(),
    target=st.sampled_from([t for t in UNIT_TARGETS if t != "cpu-avx512"]),
    seed=st.integers(0, 99),
)
def test_any_shape(kind, layout, batch, steps, hidden, size, sizes, histories, target, seed) -> None:
    case = make(kind, batch, steps, hidden, sizes=tuple(sizes), histories=histories, size=size, seed=seed)
    history = None if histories is None else torch.randint(0, histories, (batch,))
    valid = raggedness(layout, len(case["states"]), steps)
    with unit_on(target, cell):
        compare(case, layout, valid, history, torch.float64, "hypothesis")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("steps", [5, 19])
@pytest.mark.parametrize("normalize", ["softmax", None])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
@pytest.mark.parametrize("layout", ["lengths", "mask"])
def test_nan_in_padding_changes_nothing(layout: str, kind: str, normalize: str | None, steps: int) -> None:
    for histories in (None, 4):
        case = make(kind, steps=steps, normalize=normalize, histories=histories)
        history = None if histories is None else torch.tensor([2, 0, 3, 3])
        valid = raggedness(layout, 4, steps)
        clean, dirty = cast(case, torch.float64), cast(case, torch.float64)
        with torch.no_grad():
            dirty["states"][~valid] = math.nan
            if history is None:
                dirty["target"][~valid.any(1)] = math.nan  # the target of a row without a step
            else:
                dirty["states"][1] = math.nan  # a history that no row names
        a, b = run(clean, layout, valid, history)[0], run(dirty, layout, valid, history)[0]
        assert torch.equal(a, b)
        g = torch.randn_like(a)
        dirty_g = torch.where(valid if history is None else valid[history], g, math.nan)
        for x, y in zip(
            torch.autograd.grad(a, leaves(clean), g),
            torch.autograd.grad(b, leaves(dirty), dirty_g),
            strict=True,
        ):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("target")
def test_nan_in_a_history_no_row_names_jagged() -> None:
    case = make(histories=4, steps=5)
    valid = raggedness("full", 4, 5)
    history = torch.tensor([2, 0, 3, 3])
    with torch.no_grad():
        case["states"][1] = math.nan
    out = run(case, "jagged", valid, history)[0]
    for g in torch.autograd.grad(out.sin().sum(), leaves(case)):
        assert g.isfinite().all()


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["lengths", "mask", "jagged"])
@pytest.mark.parametrize("normalize", ["softmax", None])
def test_nan_in_a_valid_step_reaches_its_row_and_every_weight(normalize, layout, activation) -> None:
    for kind in ("din", "bilinear"):
        case = make(kind, steps=5, activation=activation, normalize=normalize)
        valid = raggedness("lengths", 4, 5)
        with torch.no_grad():
            case["states"][2, 3, 0] = math.nan
        out = run(case, layout, valid, None)[0]
        assert out[2].isnan().sum() == (5 if normalize == "softmax" else 1)
        assert out[[0, 1, 3]].isfinite().all()
        grads = torch.autograd.grad(out.sum(), leaves(case))
        first = 2 if kind == "din" else 2
        weights = grads[first : first + (3 if kind == "din" else 1)]
        if normalize is None:  # the last layer's product is where a NaN activation always lands
            assert weights[-1].isnan().any()
            weights = weights[:-1] if activation in ("relu", None, "prelu") else weights
            if kind == "din" and activation is not None:
                assert all(w.isnan().any() for w in weights)
        else:
            assert all(w.isnan().any() for w in weights)
        assert grads[1][[0, 1, 3]].isfinite().all()


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("layout", ["lengths", "mask"])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_nan_in_a_target_leaves_the_gradient_of_padding_zero(kind: str, layout: str) -> None:
    for steps in (5, 19):
        case = make(kind, steps=steps)
        valid = raggedness(layout, 4, steps)
        with torch.no_grad():
            case["target"][3] = math.nan
        valid[3, 0], valid[3, -1] = True, False
        out = run(case, layout, valid, None)[0]
        assert out[3][valid[3]].isnan().all()
        (g,) = torch.autograd.grad(out.sum(), case["states"])
        assert g[3][valid[3]].isnan().all()
        assert not g[~valid].any()


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("units", [4, 7, 8, 16])  # whole vectors and padded ones, for every instruction set
def test_what_overflows_stays_in_its_own_unit(units: int) -> None:
    weights = [torch.full((units, 16), 1e30), torch.full((units, units), -1e30), torch.ones(1, units)]
    biases = [torch.zeros(units), torch.zeros(units), torch.tensor([0.5])]
    out = attention_scores(
        torch.ones(1, 4), torch.full((1, 1, 4), 1e10), weights, biases, kind="din", activation="relu", normalize=None
    )
    assert out.item() == 0.5  # the second layer is minus infinity, and so 0


@pytest.mark.usefixtures("target")
def test_nan_in_a_valid_step_leaves_invalid_scores_zero() -> None:
    states = torch.ones(2, 3, 2)
    states[1, 0, 0] = math.nan
    out = attention_scores(torch.ones(2, 2), states, lengths=torch.tensor([3, 1]))
    assert out[1, 0].isnan()
    assert not out[1, 1:].any()


@pytest.mark.native
@pytest.mark.parametrize("size", [2**60, 2**61, 2**62])
def test_a_size_beyond_any_memory_is_refused(size: int) -> None:
    with running_on("cpu"), pytest.raises(MemoryError):
        attention_scores(torch.zeros(1, 1).expand(1, size), torch.zeros(1, 1, 1).expand(1, 1, size), backend="cpu")


@pytest.mark.usefixtures("target")
def test_softmax_of_large_scores_and_of_rows_without_a_step() -> None:
    states = torch.full((2, 3, 2), 1e18, dtype=torch.float32).requires_grad_()
    target = torch.full((2, 2), 1e18, dtype=torch.float32).requires_grad_()
    for lengths in ([3, 0], [0, 0]):
        out = attention_scores(target, states, lengths=torch.tensor(lengths))
        third = torch.full((3,), 1 / 3)
        torch.testing.assert_close(out[0], third if lengths[0] else torch.zeros(3))
        assert not out[1].any()
        for g in torch.autograd.grad(out.sum(), (target, states)):
            assert g.isfinite().all()


@pytest.mark.usefixtures("target")
def test_gradcheck_and_no_second_derivative() -> None:
    for kind in ("bilinear", "din"):
        case = make(kind, batch=3, steps=3, hidden=2, sizes=(3,), activation="prelu" if kind == "din" else "sigmoid")
        valid = raggedness("lengths", 3, 3)
        inputs = leaves(case)

        def f(*tensors, case=case, valid=valid):
            target, states, *rest = tensors
            if case["kind"] == "bilinear":
                args = {**case, "weights": rest[0]}
            else:
                args = {**case, "weights": rest[:2], "biases": rest[2:4], "slopes": rest[4:]}
            return call({**args, "target": target, "states": states}, lengths=valid.sum(1))

        assert torch.autograd.gradcheck(f, inputs)
        (g,) = torch.autograd.grad(f(*inputs).sin().sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once, not twice"):
            g.sum().backward()


@pytest.mark.usefixtures("target")
def test_frozen_inputs_and_inference() -> None:
    case = make()
    with torch.inference_mode():
        still = call(case)
    assert torch.equal(still, call(case).detach())
    case["states"] = case["states"].detach()
    (g,) = torch.autograd.grad(call(case).sin().sum(), case["target"])
    assert g.any()


@pytest.mark.usefixtures("target")
def test_noncontiguous_inputs_and_int32() -> None:
    case = make(steps=6)
    want = call(case, lengths=torch.tensor([6, 0, 2, 5]))
    case["states"] = case["states"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    case["weights"][0] = case["weights"][0].detach().t().contiguous().t().requires_grad_()
    got = call(case, lengths=torch.tensor([6, 0, 2, 5], dtype=torch.int32))
    assert torch.equal(got, want)
    assert torch.autograd.grad(got.sin().sum(), case["states"])[0].any()


@pytest.mark.usefixtures("target")
def test_the_same_bits_again_and_on_two_threads() -> None:
    case = make(batch=40, steps=30, hidden=8, histories=5, dtype=torch.float32)
    history, lengths = torch.randint(0, 5, (40,)), torch.randint(0, 31, (5,))

    def once() -> list[Tensor]:
        out = call(case, history=history, lengths=lengths)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves(case))]

    first = once()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for a, b in zip(first, once(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("target")
def test_autocast_casts_the_big_operands_only() -> None:
    case = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(case)
    half = {**case, **{n: case[n].bfloat16() for n in ("target", "states")}}
    half["weights"] = [w.bfloat16() for w in case["weights"]]
    assert torch.equal(got, call(half))
    assert got.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(got.sin().sum(), leaves(case)))


# Bad input: (change, exception, words of the message)
def _bad() -> list:
    t = torch
    din, bil = make, lambda: make("bilinear")
    return [
        (din, {"kind": "dot"}, ValueError, "kind must be one of"),
        (din, {"activation": "dice"}, ValueError, "activation must be one of"),
        (din, {"normalize": "sum"}, ValueError, "normalize must be one of"),
        (din, {"scale": "1"}, TypeError, "scale must be a number"),
        (din, {"backend": "tpu"}, ValueError, "backend must be one of"),
        (din, {"backend": "cuda"}, RuntimeError, "no cuda implementation"),
        (din, {"target": [1.0]}, TypeError, "target must be a torch.Tensor"),
        (din, {"states": None}, TypeError, "states must be a torch.Tensor"),
        (din, {"states": t.zeros(4, 5, 3, dtype=t.int64)}, TypeError, "states must have dtype"),
        (din, {"states": t.zeros(5, 3).double()}, ValueError, "states must be"),
        (din, {"states": t.zeros(4, 5, 0).double()}, ValueError, "states must have at least"),
        (bil, {"states": t.zeros(4, 5, 0).double()}, ValueError, "states must have at least one feature"),
        (din, {"target": t.zeros(3, 3).double()}, ValueError, r"target must have shape \[B, D\]"),
        (din, {"target": t.zeros(4).double()}, ValueError, r"target must have shape \[B, D\]"),
        (din, {"target": t.zeros(4, 3)}, TypeError, "target must have the dtype of states"),
        (din, {"target": t.zeros(4, 2).double()}, ValueError, "target must have H = 3 features"),
        (din, {"weights": t.zeros(1, 12).double()}, TypeError, "weights must be a list or tuple"),
        (din, {"weights": None}, TypeError, "weights must be a list or tuple"),
        (din, {"weights": []}, ValueError, "weights must hold at least one layer"),
        (
            din,
            {"weights": [t.zeros(1, 11).double()], "biases": ()},
            ValueError,
            r"weights\[0\] must have shape",
        ),
        (din, {"weights": [t.zeros(2, 12).double()], "biases": ()}, ValueError, "must have 1 outputs"),
        (din, {"weights": [t.zeros(1, 12)], "biases": ()}, TypeError, r"weights\[0\] must have the dtype"),
        (din, {"biases": [None]}, ValueError, "biases must be empty or hold 3"),
        (din, {"biases": [t.zeros(2).double(), None, None]}, ValueError, r"biases\[0\] must have shape"),
        (din, {"slopes": [t.zeros(1).double()]}, ValueError, "slopes must hold one slope"),
        (din, {"activation": "prelu"}, ValueError, "slopes must hold"),
        (lambda: make(activation="prelu"), {"slopes": [t.zeros(9).double()] * 2}, ValueError, r"slopes\[0\]"),
        (bil, {"weights": 3.0}, TypeError, "weights must be a torch.Tensor"),
        (bil, {"weights": t.zeros(2, 2).double()}, ValueError, "weights must have shape"),
        (bil, {"weights": [t.zeros(3, 3).double()] * 2}, ValueError, "weights must be one matrix"),
        (lambda: make("bilinear", size=2), {"weights": None}, ValueError, "weights must be given"),
        (bil, {"biases": [t.zeros(1)]}, ValueError, "biases and slopes must be empty"),
        (din, {"lengths": t.tensor([1, 2, 3, 6])}, ValueError, "lengths must lie between 0 and T = 5"),
        (din, {"lengths": t.tensor([1, 2, 3, -1])}, ValueError, "lengths must lie between"),
        (din, {"lengths": t.tensor([1, 2, 3])}, ValueError, "lengths must have shape"),
        (din, {"lengths": t.tensor([1.0, 2, 3, 3])}, TypeError, "lengths must have dtype"),
        (din, {"mask": t.ones(4, 5)}, TypeError, "mask must have dtype bool"),
        (din, {"mask": t.ones(4, 4, dtype=t.bool)}, ValueError, "mask must have shape"),
        (din, {"lengths": t.ones(4).long(), "mask": t.ones(4, 5).bool()}, ValueError, "at most one of"),
        (din, {"offsets": t.tensor([0, 5])}, ValueError, r"states must be \[N, features\]"),
        (din, {"history": t.tensor([0, 1, 2, 4])}, ValueError, "history must lie between"),
        (din, {"history": t.tensor([0, 1])}, ValueError, "target must have shape"),
        (din, {"rows_total": 3}, ValueError, "rows_total must be None"),
    ]


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("build,change,error,words", _bad())
def test_bad_input(build, change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call(build(), **change)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"offsets": torch.tensor([0, 3, 2, 5, 6])}, ValueError, "offsets must be ascending"),
        ({"offsets": torch.tensor([0, 1, 2, 5, 7])}, ValueError, "offsets must end with N = 6"),
        ({"offsets": torch.tensor([1, 1, 2, 5, 6])}, ValueError, "offsets must start with 0"),
        ({"history": torch.tensor([0, 0, 1, 3])}, ValueError, "rows_total must be given"),
        ({"history": torch.tensor([0, 0, 1, 3]), "rows_total": 7}, ValueError, "rows_total must be 4"),
        ({"history": torch.tensor([0, 0, 1, 3]), "rows_total": 2**50}, ValueError, "rows_total must be 4"),
        (
            {"history": torch.tensor([0, 0, 1, 3]), "rows_total": -7},
            ValueError,
            "rows_total must be at least 0",
        ),
        ({"history": torch.tensor([0, 0, 1, 3]), "rows_total": 7.0}, TypeError, "rows_total must be an int"),
    ],
)
def test_bad_jagged_input(change: dict, error: type, words: str) -> None:
    case = make()
    case["states"] = torch.zeros(6, 3, dtype=torch.float64)
    with pytest.raises(error, match=words):
        call(case, **{"offsets": torch.tensor([0, 1, 2, 5, 6]), **change})


# PyTorch citizenship


def _layouts(case: dict) -> list[dict]:
    valid = raggedness("lengths", len(case["states"]), case["states"].shape[1])
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), valid.sum(1).cumsum(0)))
    history = torch.tensor([2, 0, 2, 1])
    total = int(valid[history].sum())
    flat = case["states"].detach()[valid].requires_grad_()
    return [
        {},
        {"lengths": valid.sum(1)},
        {"mask": valid.flip(1), "history": history},
        {"states": flat, "offsets": offsets},
        {"states": flat, "offsets": offsets, "history": history, "rows_total": total},
    ]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.native)])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_opcheck(kind: str, backend: str) -> None:
    with running_on(backend):
        forward, backward = op._FWD[backend], op._BWD[backend]
    case = make(kind, bias="some")
    w = [case["weights"]] if kind == "bilinear" else case["weights"]
    b = [torch.zeros(0).double() if v is None else v for v in case["biases"]]
    for layout in _layouts(case):
        states, total = layout.get("states", case["states"]), layout.get("rows_total", -1)
        index = [layout.get(n) for n in ("lengths", "offsets", "mask", "history")]
        options = (total, kind == "bilinear", 0, 0.5, True)
        args = [t.detach() for t in (case["target"], states)]
        args += [[v.detach() for v in vs] for vs in (w, b, [])] + index
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(forward, (*args, *options), test_utils=tests)
        out = forward(*args, *options)
        torch.library.opcheck(
            backward,
            (torch.randn_like(out), *args, out, *options),
            test_utils=tests,
        )


def test_compile_without_a_break() -> None:
    for kind in ("bilinear", "din"):
        case = make(kind)
        for layout in _layouts(case):
            values = {**case, **layout}
            inputs = leaves(values)

            def f(values: dict) -> Tensor:
                return attention_scores(**values).sin().sum()

            torch._dynamo.reset()
            compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
            want = [f(values), *torch.autograd.grad(f(values), inputs)]
            got = [compiled(values), *torch.autograd.grad(compiled(values), inputs)]
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)


def test_export_with_dynamic_sizes() -> None:
    case = {k: v for k, v in make().items() if k not in ("target", "states")}

    class Scores(torch.nn.Module):
        def forward(self, target: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
            return attention_scores(target, states, lengths=lengths, **case)

    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    first = make(batch=4, steps=5)
    args = (first["target"].detach(), first["states"].detach(), torch.tensor([5, 0, 1, 3]))
    shapes = ({0: batch}, {0: batch, 1: steps}, {0: batch})
    program = torch.export.export(Scores(), args, dynamic_shapes=shapes)
    other = make(batch=7, steps=9)
    args = (other["target"].detach(), other["states"].detach(), torch.arange(7))
    torch.testing.assert_close(program.module()(*args), Scores()(*args))


def test_func_grad() -> None:
    case = make()
    lengths = torch.tensor([5, 0, 1, 3])

    def f(states: Tensor) -> Tensor:
        return call({**case, "states": states}, lengths=lengths).sin().sum()

    states = case["states"].detach()
    want = torch.autograd.grad(f(case["states"]), case["states"])[0]
    torch.testing.assert_close(torch.func.grad(f)(states), want)


def test_docstring() -> None:
    import doctest

    module = sys.modules["dien_kernels.ops.attention.op"]
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner()
    for test in finder.find(module.attention_scores, globs={"torch": torch, "attention_scores": attention_scores}):
        assert runner.run(test).failed == 0
