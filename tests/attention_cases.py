"""Attention cases: inputs, layouts, and comparisons with the definition."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dien_kernels.histories import Histories
from dien_kernels.ops._mlp import ACTIVATIONS, Layers
from dien_kernels.ops.attention import attention_scores, reference
from dien_kernels.ops.attention.contract import Options
from tests.tolerances import assert_close_to
from tests.unit_cases import raggedness

Shape = tuple[dict, str, Tensor, Tensor | None]  # what ``compare`` takes before a dtype


def layers_of(case: dict) -> Layers:
    """The layers as the definition takes them."""
    weights = case["weights"]
    weights = list(weights) if isinstance(weights, (list, tuple)) else [] if weights is None else [weights]
    biases = [case["target"].new_empty(0) if bias is None else bias for bias in case["biases"]]
    return Layers(weights, biases, [slope.reshape(-1) for slope in case["slopes"]])


def expected(case: dict, valid: Tensor, history: Tensor) -> Tensor:
    """The definition on padded states with a mask, whatever the layout under test; differentiable, [B, T]."""
    options = Options(
        rows_total=-1,
        bilinear=case["kind"] == "bilinear",
        activation=ACTIVATIONS.index(case["activation"]),
        scale=case["scale"],
        softmax=case["normalize"] == "softmax",
    )
    histories = Histories(history_of=history, mask=valid)
    return reference.attention_scores(case["target"], case["states"], layers_of(case), histories, options)


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


def run(case: dict, layout: str, valid: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op on any layout; its scores as [B, T], and the output as it came."""
    row_history = torch.arange(len(valid)) if history is None else history
    if layout != "jagged":
        extra = {"lengths": valid.sum(1)} if layout == "lengths" else {"mask": valid} if layout == "mask" else {}
        out = call(case, history=history, **extra)
        return out, out
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), valid.sum(1).cumsum(0)))
    extra = {} if history is None else {"history": history, "rows_total": int(valid[row_history].sum())}
    out = call({**case, "states": case["states"][valid]}, offsets=offsets, **extra)
    step = valid[row_history].nonzero(as_tuple=True)
    return out.new_zeros(len(row_history), valid.shape[1]).index_put(step, out), out


def close(actual: Tensor, exact: Tensor, plain: Tensor, name: str, summed: float = 0.0) -> None:
    """The tolerance rule; float64 has no better reference than plain torch, so there a fixed bound."""
    if plain.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-13, msg=lambda text: f"{name}: {text}")
    else:
        assert_close_to(actual, exact, plain, name, summed)


def compare(case: dict, layout: str, valid: Tensor, history: Tensor | None, dtype: torch.dtype, name: str) -> None:
    """Scores and every gradient.

    Under a softmax the gradients of a row's scores sum to zero, so what a weight's gradient sums over them cancels:
    the floor of the tolerance is relative to what is summed.
    """
    row_history = torch.arange(len(valid)) if history is None else history
    stored = cast(case, dtype)
    exact, plain = cast(stored, torch.float64), cast(stored, dtype)
    op_case = cast(stored, dtype, keep_small=True)
    actual, raw_out = run(op_case, layout, valid, history)
    assert raw_out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not actual[~valid[row_history]].any()
    want, rough = expected(exact, valid, row_history), expected(plain, valid, row_history)
    close(actual.detach(), want.detach(), rough.detach(), name)
    cotangent = torch.randn_like(want)
    outs = ((actual, op_case), (want, exact), (rough, plain))
    pairs = [gradients(out, values, cotangent) for out, values in outs]
    summed = [0.0] * len(pairs[0])
    if case["normalize"] == "softmax":
        scores = expected(exact | {"normalize": None}, valid, row_history)
        terms = gradients(scores, exact, want.detach() * cotangent.abs())
        summed = [float(t.abs().max()) if t.numel() else 0.0 for t in terms]
    for i, (a, e, p) in enumerate(zip(*pairs, strict=True)):
        assert a.dtype == leaves(op_case)[i].dtype
        close(a, e, p, f"{name}: gradient {i}", summed[i])


def gradients(out: Tensor, case: dict, upstream: Tensor) -> list[Tensor]:
    """Those of all leaves; zeros where no row has a step."""
    inputs = leaves(case)
    if not out.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    grads = torch.autograd.grad(out, inputs, upstream.to(out.dtype), allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, inputs, strict=True)]


def layouts(case: dict) -> list[dict]:
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


@st.composite
def shapes(draw: st.DrawFn, layers: int, widest: int = 9, steps: int = 24) -> Shape:
    """Any small call, empty ones among them."""
    histories = draw(st.integers(1, 4) | st.none())
    batch = draw(st.integers(0, 6))
    case = make(
        draw(st.sampled_from(["bilinear", "din"])),
        batch,
        draw(st.integers(0, steps)),
        draw(st.integers(1, widest)),
        sizes=tuple(draw(st.lists(st.integers(1, widest), max_size=layers))),
        histories=histories,
        size=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 99)),
    )
    layout = draw(st.sampled_from(["full", "lengths", "mask", "jagged"]))
    history = None if histories is None else torch.randint(0, histories, (batch,))
    return case, layout, raggedness(layout, *case["states"].shape[:2]), history
