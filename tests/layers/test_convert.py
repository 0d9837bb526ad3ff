"""Every loader against a cell written from the equations of its source, in that source's own layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, sigmoid, tanh

import dien_kernels
from dien_kernels.layers import (
    AGRU,
    AIGRU,
    AUGRU,
    GRU,
    Weights,
    from_deepctr_torch,
    from_fuxictr,
    from_graphcore,
    from_keras,
    from_onednn,
    from_openvino,
    from_rechub,
    from_rows,
    from_tf,
)
from tests.layers.support import H, I, randn
from tests.tolerances import assert_close_to

pytestmark = pytest.mark.usefixtures("one_thread")
B, T = 4, 5
LENGTHS = torch.tensor([3, 0, 5, 1])
P = dict[str, Tensor]


def paper(u: Tensor, n: Tensor, h: Tensor, a: Tensor | None) -> Tensor:
    """u' = a u on the candidate's side."""
    assert a is not None
    return (1 - a * u) * h + a * u * n


def keep(u: Tensor, n: Tensor, h: Tensor, a: Tensor | None) -> Tensor:
    """u' = (1 - a) u on the state's side, or u itself in a GRU."""
    u = u if a is None else (1 - a) * u
    return u * h + (1 - u) * n


def flow(u: Tensor, n: Tensor, h: Tensor, a: Tensor | None) -> Tensor:
    """u' = a u on the state's side."""
    return a * u * h + (1 - a * u) * n


def replaced(u: Tensor, n: Tensor, h: Tensor, a: Tensor | None) -> Tensor:
    """An AGRU's step: attention instead of the gate."""
    return (1 - a) * h + a * n


Mix = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def bias(p: P, name: str) -> Any:
    return p.get(name, 0)


def torch_cell(p: P, x: Tensor, h: Tensor, a: Tensor | None, mix: Mix) -> Tensor:
    """Rows [r|u|n], two biases: torch.nn.GRU, RecBole, prediction-flow, MindSpore; DeepCTR-Torch's AUGRU with one."""
    gx = x @ p["weight_ih"].t() + bias(p, "bias_ih")
    gh = h @ p["weight_hh"].t() + bias(p, "bias_hh" if "bias_hh" in p else "bias_ih")
    (x_r, x_u, x_n), (h_r, h_u, h_n) = gx.chunk(3, 1), gh.chunk(3, 1)
    n = tanh(x_n + sigmoid(x_r + h_r) * h_n)
    return mix(sigmoid(x_u + h_u), n, h, a)


def fuxi_cell(p: P, x: Tensor, h: Tensor, a: Tensor | None, mix: Mix) -> Tensor:
    x_u, x_r, x_n = (x @ p["x2h_weight"].t() + bias(p, "x2h_bias")).chunk(3, 1)
    h_u, h_r, h_n = (h @ p["h2h_weight"].t() + bias(p, "h2h_bias")).chunk(3, 1)
    return mix(sigmoid(x_u + h_u), tanh(x_n + sigmoid(x_r + h_r) * h_n), h, a)


def tf_cell(p: P, x: Tensor, h: Tensor, a: Tensor | None, mix: Mix) -> Tensor:
    r, u = sigmoid(torch.cat((x, h), 1) @ p["gates_kernel"] + bias(p, "gates_bias")).split(H, 1)
    n = tanh(torch.cat((x, r * h), 1) @ p["candidate_kernel"] + bias(p, "candidate_bias"))
    return mix(u, n, h, a)


def graphcore_cell(p: P, x: Tensor, h: Tensor, a: Tensor | None, mix: Mix) -> Tensor:
    """popnn with resetAfter: both products carry a bias, shaped [gate, input or recurrent, unit]."""
    kernel = p["kernel"].view(I + H, 3, H)
    w_u, w_r, w_n = kernel[:I].unbind(1)
    v_u, v_r, v_n = kernel[I:].unbind(1)
    b = p["bias"].view(3, -1, H) if "bias" in p else torch.zeros(3, 1, H, dtype=x.dtype)
    if p["after"]:
        b = b.expand(3, 2, H)
        u = sigmoid(x @ w_u + b[0, 0] + h @ v_u + b[0, 1])
        r = sigmoid(x @ w_r + b[1, 0] + h @ v_r + b[1, 1])
        n = tanh(x @ w_n + b[2, 0] + r * (h @ v_n + b[2, 1]))
    else:
        u, r = sigmoid(x @ w_u + h @ v_u + b[0]), sigmoid(x @ w_r + h @ v_r + b[1])
        n = tanh(x @ w_n + (r * h) @ v_n + b[2])
    return mix(u, n, h, a)


def keras_cell(p: P, x: Tensor, h: Tensor, a: Tensor | None, mix: Mix) -> Tensor:
    kernel, recurrent = p["kernel"], p["recurrent_kernel"]
    if p["after"]:
        x_z, x_r, x_h = (x @ kernel + (p["bias"][0] if "bias" in p else 0)).split(H, 1)
        h_z, h_r, h_h = (h @ recurrent + (p["bias"][1] if "bias" in p else 0)).split(H, 1)
        return mix(sigmoid(x_z + h_z), tanh(x_h + sigmoid(x_r + h_r) * h_h), h, a)
    x_z, x_r, x_h = (x @ kernel + bias(p, "bias")).split(H, 1)
    z, r = sigmoid(x_z + h @ recurrent[:, :H]), sigmoid(x_r + h @ recurrent[:, H : 2 * H])
    return mix(z, tanh(x_h + (r * h) @ recurrent[:, 2 * H :]), h, a)


def rechub_cell(p: P, x: Tensor, h: Tensor, a: Tensor | None, mix: Mix) -> Tensor:
    u = sigmoid(x @ p["Wu"] + h @ p["Uu"] + p["bu"])
    r = sigmoid(x @ p["Wr"] + h @ p["Ur"] + p["br"])
    return mix(u, tanh(x @ p["Wh"] + r * (h @ p["Uh"]) + p["bh"]), h, a)


def onednn_cell(p: P, x: Tensor, h: Tensor, a: Tensor | None, mix: Mix) -> Tensor:
    """ldigo: dimensions layer, direction, input, gate, output; gates u, r, o and with lbr a bias u'."""
    w, v = p["weights_layer"].view(I, 3, H), p["weights_iter"].view(H, 3, H)
    b = p["bias"].view(-1, H) if "bias" in p else torch.zeros(4, H, dtype=x.dtype)
    u = sigmoid(x @ w[:, 0] + h @ v[:, 0] + b[0])
    r = sigmoid(x @ w[:, 1] + h @ v[:, 1] + b[1])
    if p["after"]:
        return mix(u, tanh(x @ w[:, 2] + r * (h @ v[:, 2] + b[3]) + b[2]), h, a)
    return mix(u, tanh(x @ w[:, 2] + (r * h) @ v[:, 2] + b[2]), h, a)


def openvino_cell(p: P, x: Tensor, h: Tensor, a: Tensor | None, mix: Mix) -> Tensor:
    w, v = p["w"].view(3, H, I), p["r"].view(3, H, H)
    b = p["b"].view(-1, H) if "b" in p else torch.zeros(4, H, dtype=x.dtype)
    z, r = sigmoid(x @ w[0].t() + h @ v[0].t() + b[0]), sigmoid(x @ w[1].t() + h @ v[1].t() + b[1])
    if p["after"]:
        return mix(z, tanh(x @ w[2].t() + r * (h @ v[2].t() + b[3]) + b[2]), h, a)
    return mix(z, tanh(x @ w[2].t() + (r * h) @ v[2].t() + b[2]), h, a)


class Source(NamedTuple):
    load: Callable[..., Weights]
    shapes: dict[str, tuple[int, ...]]
    cell: Callable[..., Tensor]
    mix: Mix
    options: dict[str, Any] = {}
    after: bool = True
    layers: tuple[type, ...] = (AUGRU,)


ROWS = {"weight_ih": (3 * H, I), "weight_hh": (3 * H, H)}
TWO = {"bias_ih": (3 * H,), "bias_hh": (3 * H,)}
FUXI = {"x2h_weight": (3 * H, I), "h2h_weight": (3 * H, H)}
TF = {"gates_kernel": (I + H, 2 * H), "candidate_kernel": (I + H, H)}
TF_BIAS = {"gates_bias": (2 * H,), "candidate_bias": (H,)}
KERAS = {"kernel": (I, 3 * H), "recurrent_kernel": (H, 3 * H)}
KERNEL = {"kernel": (I + H, 3 * H)}
RECHUB = {f"{m}{g}": {"W": (I, H), "U": (H, H), "b": (1, H)}[m] for g in "urh" for m in "WUb"}
DNN = {"weights_layer": (I, 3, H), "weights_iter": (H, 3, H)}
VINO = {"w": (3 * H, I), "r": (3 * H, H)}
BEFORE, AFTER, LBR = {"reset": "before"}, {"reset": "after"}, {"linear_before_reset": True}

SOURCES = {
    "torch": Source(from_rows, ROWS | TWO, torch_cell, keep, layers=(GRU, AIGRU)),
    "torch-no-bias": Source(from_rows, ROWS, torch_cell, keep, layers=(GRU, AIGRU)),
    "recbole": Source(from_rows, ROWS | TWO, torch_cell, paper, {"update": "candidate", "form": "paper"}),
    "recbole-agru": Source(
        from_rows, ROWS | TWO, torch_cell, replaced, {"update": "candidate", "form": "paper"}, layers=(AGRU,)
    ),
    "prediction-flow": Source(from_rows, ROWS | TWO, torch_cell, flow, {"form": "prediction_flow"}),
    "mindspore": Source(from_rows, ROWS | TWO, torch_cell, keep, {"form": "authors"}),
    "deepctr-torch": Source(from_deepctr_torch, ROWS | {"bias_ih": (3 * H,)}, torch_cell, paper),
    "deepctr-torch-agru": Source(from_deepctr_torch, ROWS | TWO, torch_cell, replaced, layers=(AGRU,)),
    "deepctr-torch-no-bias": Source(from_deepctr_torch, ROWS, torch_cell, paper),
    "fuxictr": Source(from_fuxictr, FUXI | {"x2h_bias": (3 * H,), "h2h_bias": (3 * H,)}, fuxi_cell, paper),
    "fuxictr-agru": Source(
        from_fuxictr,
        FUXI | {"x2h_bias": (3 * H,), "h2h_bias": (3 * H,)},
        fuxi_cell,
        replaced,
        layers=(AGRU,),
    ),
    "fuxictr-no-bias": Source(from_fuxictr, FUXI, fuxi_cell, paper),
    "tf": Source(from_tf, TF | TF_BIAS, tf_cell, keep, after=False, layers=(AUGRU, GRU)),
    "tf-agru": Source(from_tf, TF | TF_BIAS, tf_cell, replaced, after=False, layers=(AGRU,)),
    "tf-no-bias": Source(from_tf, TF, tf_cell, keep, after=False, layers=(AUGRU, GRU)),
    "keras": Source(from_keras, KERAS | {"bias": (2, 3 * H)}, keras_cell, keep, layers=(GRU,)),
    "keras-before": Source(from_keras, KERAS | {"bias": (3 * H,)}, keras_cell, keep, BEFORE, False, layers=(GRU,)),
    "keras-no-bias": Source(from_keras, KERAS, keras_cell, keep, layers=(GRU, AIGRU)),
    "rechub": Source(from_rechub, RECHUB, rechub_cell, paper),
    "rechub-flat": Source(from_rechub, RECHUB | {f"b{g}": (H,) for g in "urh"}, rechub_cell, paper),
    "graphcore": Source(from_graphcore, KERNEL | {"bias": (3 * H,)}, graphcore_cell, keep, after=False),
    "graphcore-gates": Source(from_graphcore, KERNEL | {"bias": (3, H)}, graphcore_cell, keep, after=False),
    "graphcore-no-bias": Source(from_graphcore, KERNEL, graphcore_cell, keep, after=False),
    "graphcore-after": Source(from_graphcore, KERNEL | {"bias": (3, H)}, graphcore_cell, keep, AFTER),
    "graphcore-after-two": Source(
        from_graphcore, KERNEL | {"bias": (3, 2, H)}, graphcore_cell, keep, AFTER, layers=(AUGRU, GRU)
    ),
    "onednn": Source(from_onednn, DNN | {"bias": (3, H)}, onednn_cell, keep, after=False, layers=(AUGRU, GRU)),
    "onednn-lbr": Source(from_onednn, DNN | {"bias": (4, H)}, onednn_cell, keep, {"lbr": True}, layers=(AUGRU, GRU)),
    "onednn-ldigo": Source(
        from_onednn,
        {"weights_layer": (1, 1, I, 3, H), "weights_iter": (1, 1, H, 3, H), "bias": (1, 1, 3, H)},
        onednn_cell,
        keep,
        after=False,
    ),
    "onednn-flat": Source(
        from_onednn,
        {"weights_layer": (1, 1, I, 3 * H), "weights_iter": (H, 3 * H), "bias": (4 * H,)},
        onednn_cell,
        keep,
        {"lbr": True},
    ),
    "onednn-no-bias": Source(from_onednn, DNN, onednn_cell, keep, {"lbr": True}),
    "openvino": Source(from_openvino, VINO | {"b": (3 * H,)}, openvino_cell, keep, after=False, layers=(AUGRU, GRU)),
    "openvino-directions": Source(
        from_openvino,
        {"w": (1, 3 * H, I), "r": (1, 3 * H, H), "b": (1, 3 * H)},
        openvino_cell,
        keep,
        after=False,
    ),
    "openvino-linear": Source(from_openvino, VINO | {"b": (4 * H,)}, openvino_cell, keep, LBR, layers=(GRU,)),
    "openvino-no-bias": Source(from_openvino, VINO, openvino_cell, keep, LBR, layers=(GRU,)),
}
CASES = [pytest.param(s, layer, id=f"{n}-{layer.__name__}") for n, s in SOURCES.items() for layer in s.layers]


def leaves(source: Source) -> P:
    sizes = sorted(source.shapes.items())
    return {n: (0.6 * randn(*s, seed=i, dtype=torch.float64)).requires_grad_() for i, (n, s) in enumerate(sizes)}


def model(source: Source, layer: type, p: P, x: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The source's own loop: zeros past a row's length, the state carried there."""
    told: dict[str, Any] = p | {"after": source.after}
    ys = []
    for t in range(T):
        x_t, a_t = x[:, t], a[:, t : t + 1]
        if layer is AIGRU:
            x_t = a_t * x_t
        new = source.cell(told, x_t, h, a_t if layer in (AUGRU, AGRU) else None, source.mix)
        valid = (t < LENGTHS).unsqueeze(1)
        h = torch.where(valid, new, h)
        ys.append(torch.where(valid, new, 0))
    return torch.stack(ys, 1), h


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, a, h = randn(B, T, I, seed=20), 0.5 + 0.4 * randn(B, T, seed=21), randn(B, H, seed=22)
    return x.double().requires_grad_(), a.double().requires_grad_(), h.double().requires_grad_()


def run_op(layer: type, w: Weights, x: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"lengths": LENGTHS, "h0": h, "reset": w.reset, "update": w.update}
    if layer is GRU:
        return dien_kernels.gru(x, *w.tensors, **options)
    if layer is AUGRU:
        options["form"] = w.form
    op = {AUGRU: dien_kernels.augru, AGRU: dien_kernels.agru, AIGRU: dien_kernels.aigru}[layer]
    return op(x, a, *w.tensors, **options)


def run_layer(layer: type, w: Weights, x: Tensor, a: Tensor, h: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    if layer is GRU:
        y, h_n = GRU.from_weights(w, batch_first=True, **options)(x, h.unsqueeze(0), lengths=LENGTHS)
        return y, h_n.squeeze(0)
    return layer.from_weights(w, **options)(x, a, lengths=LENGTHS, h0=h)


@pytest.mark.parametrize("source, layer", CASES)
def test_a_loader_reproduces_its_source(source: Source, layer: type) -> None:
    """Outputs, last state, and the gradient of every tensor of the source, of x, of attention and of h0."""
    p, (x, a, h) = leaves(source), inputs()
    w = source.load(**p, **source.options)
    exact, mine = model(source, layer, p, x, a, h), run_op(layer, w, x, a, h)
    wanted = p | {"x": x, "a": a, "h0": h}
    upstream = [randn(*t.shape, seed=30 + i, dtype=torch.float64) for i, t in enumerate(exact)]
    grads = [torch.autograd.grad(o, tuple(wanted.values()), upstream, materialize_grads=True) for o in (mine, exact)]
    for name, one, two in zip(("y", "h_n", *wanted), (*mine, *grads[0]), (*exact, *grads[1]), strict=True):
        assert_close_to(one, two, two, name)

    for update in (None, "keep", "candidate"):  # and the layer, with its gate stored on either side
        for one, two in zip(run_layer(layer, w, x, a, h, update=update), exact, strict=True):
            assert_close_to(one, two, two, f"update={update}")
    assert w.reset == ("after" if source.after else "before")
    if layer is AUGRU:
        assert AUGRU.from_weights(w).form == w.form


@pytest.mark.parametrize("name", SOURCES)
def test_the_other_side_is_the_same_function_there_and_back(name: str) -> None:
    w = SOURCES[name].load(**leaves(SOURCES[name]), **SOURCES[name].options)
    other = "keep" if w.update == "candidate" else "candidate"
    turned = w.as_update(other)
    assert w.as_update(w.update) is w
    assert (turned.update, turned.reset, turned.form) == (other, w.reset, w.form)
    assert (turned.tied, turned.bias) == (w.tied, w.bias)
    for one, two in zip(turned.as_update(w.update).tensors, w.tensors, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)
    assert torch.equal(turned.w_hh[H : 2 * H], -w.w_hh[H : 2 * H])
    assert torch.equal(turned.w_hh[:H], w.w_hh[:H])


def test_which_bias_a_source_has() -> None:
    modes = {n: s.load(**leaves(s), **s.options).bias for n, s in SOURCES.items()}
    assert {n for n, m in modes.items() if m == "tied"} == {
        "deepctr-torch",
        "graphcore-after",
    }
    assert {n for n, m in modes.items() if m is False} == {n for n in SOURCES if n.endswith("no-bias")}
    single = ("tf", "tf-agru", "keras-before", "rechub", "rechub-flat", "graphcore", "graphcore-gates")
    single += ("onednn", "onednn-ldigo", "openvino", "openvino-directions")
    assert {n for n, m in modes.items() if m == "single"} == set(single)


def test_a_gru_trains_as_its_source_does() -> None:
    """One bias a gate: the second vector is a frozen zero. Tied ones do not fit."""
    p = {n: t.detach() for n, t in leaves(SOURCES["tf"]).items()}
    layer = GRU.from_weights(from_tf(**p))
    assert not layer.bias_hh_l0.requires_grad
    assert not layer.bias_hh_l0.any()
    assert layer.bias_ih_l0.requires_grad
    assert layer.reset == "before"
    plain = torch.nn.GRU(I, H, dtype=torch.float64)
    copy = GRU.from_weights(from_rows(*plain.parameters()))
    assert all(
        q.requires_grad and torch.equal(p, q) for p, q in zip(plain.parameters(), copy.parameters(), strict=True)
    )
    assert not GRU.from_weights(from_rows(plain.weight_ih_l0, plain.weight_hh_l0)).bias
    with pytest.raises(ValueError, match="weights must not have tied biases"):
        GRU.from_weights(from_deepctr_torch(*list(plain.parameters())[:3]))


def test_the_graphcore_vector_by_hand() -> None:
    """The inputs of Graphcore's own test (ones, attention 0.5, lengths 1, 3, 2), its constant kernel by units
    that are all alike, so that one number a step says everything."""
    kernel, b = torch.full((2 + 2, 3 * 2), 0.1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    y, h_n = AUGRU.from_weights(from_graphcore(kernel, b))(
        torch.ones(3, 3, 2), torch.full((3, 3), 0.5), lengths=torch.tensor([1, 3, 2])
    )
    h, states = 0.0, []
    for _ in range(3):
        gate = 1 / (1 + math.exp(-(0.2 + 0.2 * h + 1)))  # u and r alike
        n = math.tanh(0.2 + 0.2 * gate * h)
        u = gate - 0.5 * gate
        h = n + u * (h - n)
        states.append(h)
    expected = torch.tensor([[states[0], 0, 0], states, [states[0], states[1], 0]])
    torch.testing.assert_close(y, expected.unsqueeze(2).expand(3, 3, 2))
    torch.testing.assert_close(h_n[:, 0], torch.tensor([states[0], states[2], states[1]]))
