"""The reference against strangers: torch.nn.GRU, a case worked by hand, autograd of its own forward."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dien_kernels import agru, aigru, augru, gru
from dien_kernels.histories import Histories
from dien_kernels.ops.recurrence import reference, torch_backend
from dien_kernels.ops.recurrence.contract import Inputs
from dien_kernels.ops.recurrence.forms import form_of
from dien_kernels.ops.recurrence.op import recurrence
from tests.cases import KINDS, LEAVES, Case, make, options_of, oracle, result_of
from tests.forms_by_hand import BY_HAND

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, I, H = 5, 6, 3, 4  # noqa: E741
LENGTHS = torch.tensor([2, 6, 1, 4, 3])


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def torch_gru(**options: object) -> torch.nn.GRU:
    torch.manual_seed(0)
    return torch.nn.GRU(I, H, batch_first=True, dtype=torch.float64, **options)


def weights(model: torch.nn.GRU, suffix: str = "l0") -> tuple[Tensor, ...]:
    return tuple(getattr(model, f"{name}_{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))


def compare_with_gradients(model: torch.nn.GRU, ours: tuple, theirs: tuple, inputs: tuple[Tensor, ...]) -> None:
    """Both outputs, and the gradients of inputs and parameters under one random upstream gradient."""
    leaves = (*inputs, *model.parameters())
    upstream = tuple(torch.randn_like(out) for out in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)
    grads = [
        torch.autograd.grad(out, leaves, upstream, materialize_grads=True, retain_graph=True) for out in (ours, theirs)
    ]
    for mine, other in zip(*grads, strict=True):
        same(mine, other)


def leaves() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(B, T, I, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(1, B, H, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_gru_full(bias: bool) -> None:
    model, (x, h0) = torch_gru(bias=bias), leaves()
    w = weights(model) if bias else (model.weight_ih_l0, model.weight_hh_l0)
    y, h_n = gru(x, *w, h0=h0[0], backend="reference")
    compare_with_gradients(model, (y, h_n.unsqueeze(0)), model(x, h0), (x, h0))


def test_equals_torch_gru_packed() -> None:
    model, (x, h0) = torch_gru(), leaves()
    packed, h_theirs = model(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False), h0)
    y_theirs, _ = pad_packed_sequence(packed, batch_first=True)
    y, h_n = gru(x, *weights(model), lengths=LENGTHS, h0=h0[0], backend="reference")
    compare_with_gradients(model, (y, h_n.unsqueeze(0)), (y_theirs, h_theirs), (x, h0))


@pytest.mark.parametrize("packed", [False, True])
def test_equals_torch_gru_time_major(packed: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.GRU(I, H, dtype=torch.float64)
    x, h0 = leaves()
    x = x.detach().transpose(0, 1).contiguous().requires_grad_()
    lengths = LENGTHS if packed else None
    y, h_n = recurrence(
        "gru",
        Inputs(x, None, *weights(model), h0[0]),
        Histories(lengths),
        backend="reference",
        time_major=True,
    )
    if packed:
        theirs, h_theirs = model(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), h0)
        y_theirs, _ = pad_packed_sequence(theirs)
    else:
        y_theirs, h_theirs = model(x, h0)
    compare_with_gradients(model, (y, h_n.unsqueeze(0)), (y_theirs, h_theirs), (x, h0))


@pytest.mark.parametrize("packed", [False, True])
def test_equals_torch_gru_bidirectional_in_two_layers(packed: bool) -> None:
    model = torch_gru(num_layers=2, bidirectional=True)
    x, _ = leaves()
    h0 = torch.randn(4, B, H, dtype=torch.float64, requires_grad=True)
    lengths = LENGTHS if packed else None
    y, states = x, []
    for layer in range(2):
        sides = []
        for side, suffix in enumerate((f"l{layer}", f"l{layer}_reverse")):
            start = h0[2 * layer + side]
            inputs = Inputs(y, None, *weights(model, suffix), start)
            out = recurrence("gru", inputs, Histories(lengths), backend="reference", reverse=side == 1)
            sides.append(out[0])
            states.append(out[1])
        y = torch.cat(sides, 2)
    if packed:
        theirs, h_theirs = model(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False), h0)
        y_theirs, _ = pad_packed_sequence(theirs, batch_first=True)
    else:
        y_theirs, h_theirs = model(x, h0)
    compare_with_gradients(model, (y, torch.stack(states)), (y_theirs, h_theirs), (x, h0))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("reset", ["after", "before"])
@pytest.mark.parametrize("update", ["keep", "candidate"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_by_hand(kind: str, update: str, reset: str) -> None:
    """I = H = 1, every number written down; the formulas are docs/math.md's table, not the package's."""
    (wr, wu, wn), (vr, vu, vn) = (0.3, -0.7, 1.1), (0.5, 0.9, -0.4)
    (br, bu, bn), (cr, cu, cn) = (0.1, -0.2, 0.3), (0.05, 0.15, -0.25)
    h, states = 0.6, []
    for x, a in ((0.8, 0.25), (-1.3, 0.9)):
        scaled = a * x if kind == "aigru" else x
        r = sigmoid(wr * scaled + br + vr * h + cr)
        z = sigmoid(wu * scaled + bu + vu * h + cu)  # the gate as stored
        u = 1 - z if update == "keep" else z  # the step towards the candidate
        inner = r * (vn * h + cn) if reset == "after" else vn * (r * h) + cn
        n = math.tanh(wn * scaled + bn + inner)
        g = BY_HAND[kind].g(a, u)
        h = (1 - g) * h + g * n
        states.append(h)
    column = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    x, attention = column(0.8, -1.3).view(1, 2, 1), column(0.25, 0.9).view(1, 2)
    tensors = (
        column(wr, wu, wn).view(3, 1),
        column(vr, vu, vn).view(3, 1),
        column(br, bu, bn),
        column(cr, cu, cn),
    )
    options = {"h0": column(0.6).view(1, 1), "update": update, "reset": reset, "backend": "reference"}
    if kind == "gru":
        y, h_n = gru(x, *tensors, **options)
    elif kind in ("agru", "aigru"):
        y, h_n = {"agru": agru, "aigru": aigru}[kind](x, attention, *tensors, **options)
    else:
        y, h_n = augru(x, attention, *tensors, form=kind, **options)
    same(y.flatten(), column(*states))
    same(h_n.flatten(), column(states[-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_default_update_side(kind: str) -> None:
    side = BY_HAND[kind].update
    assert form_of(kind).update == side
    case = Case(kind, torch.float64)
    inputs = make(case)
    with torch.no_grad():
        default = oracle(case, inputs, inputs.leaves)
        named = oracle(Case(kind, torch.float64, update=side), inputs, inputs.leaves)
    assert torch.equal(default[0], named[0])


@pytest.mark.parametrize("kind", KINDS)
def test_update_sides_differ_by_the_sign_of_the_update_rows(kind: str) -> None:
    case = Case(kind, torch.float64, update="keep")
    inputs = make(case)
    negated = dict(inputs.leaves)
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        sign = torch.ones(3 * case.H, dtype=torch.float64)
        sign[case.H : 2 * case.H] = -1
        negated[name] = inputs.leaves[name] * (sign if name[0] == "b" else sign.unsqueeze(1))
    y, _ = oracle(case, inputs, inputs.leaves)
    other, _ = oracle(Case(kind, torch.float64, update="candidate"), inputs, negated)
    same(y, other)


def test_simple_identities() -> None:
    """Attention 1 makes AIGRU and the paper's AUGRU a GRU; attention 0 makes AGRU stand still."""
    inputs = make(Case("aigru", torch.float64, ragged="full"))
    leaf = inputs.leaves
    w = [leaf[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    options = {"h0": leaf["h0"], "backend": "reference"}
    ones, zeros = torch.ones_like(leaf["attention"]), torch.zeros_like(leaf["attention"])
    base, _ = gru(leaf["x"], *w, **options)
    same(aigru(leaf["x"], ones, *w, **options)[0], base)
    same(augru(leaf["x"], ones, *w, update="keep", **options)[0], base)
    same(augru(leaf["x"], zeros, *w, form="authors", **options)[0], base)
    same(augru(leaf["x"], ones, *w, form="prediction_flow", **options)[0], base)
    for still in (agru(leaf["x"], zeros, *w, **options), augru(leaf["x"], zeros, *w, **options)):
        same(still[1], leaf["h0"])


@pytest.mark.parametrize(
    "kind, reset, update, ragged, history, reverse",
    [
        (kind, reset, update, *layout)
        for (kind, reset, update), layout in product(
            product(KINDS, ("after", "before"), ("keep", "candidate")),
            (("lengths", False, False), ("jagged", False, True), ("lengths", True, False)),
        )
        if not (kind == "gru" and layout[1])
    ],
)
def test_backward_by_hand_equals_autograd(
    kind: str, reset: str, update: str, ragged: str, history: bool, reverse: bool
) -> None:
    """Equations (10) to (22) against autograd of equations (1) to (9)."""
    case = Case(kind, torch.float64, ragged=ragged, history=history, reverse=reverse, reset=reset, update=update)
    inputs = make(case)
    options = options_of(case)
    tensors = Inputs(*(inputs.leaf(name) for name in LEAVES))
    filled = [inputs.dy.new_zeros(inputs.dy.shape[:-1]) if t is None else t for t in tensors]  # attention of gru
    layout = Histories(inputs.lengths, inputs.offsets, inputs.history)
    autograd = result_of(reference.recurrence(*filled, layout, options), inputs, inputs.leaves)
    with torch.no_grad():
        by_hand = torch_backend.backward(inputs.dy, inputs.dh_n, tensors, layout, options)._asdict()
    for name in inputs.leaves:
        same(by_hand[name], autograd.tensors[f"d_{name}"])
    if kind == "agru":
        rows = slice(case.H, 2 * case.H)
        assert not any(by_hand[name][rows].any() for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
