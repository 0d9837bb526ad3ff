"""OpenVINO's GRUSequence and AUGRUSequence on the padded batch with its lengths, in inference.

No function of its Python API makes an AUGRUSequence, an internal operation, but its model format names it: so the model
is written as text, which its reader takes. Its AUGRU is that of the authors' code, reset before the product, with one
bias: it is compared with that. Results past a row's length are compared nowhere. The batch goes in and out without
being copied.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Program
from benchmarks.peers import missing, onednn
from benchmarks.registry import Case

VERSION = "2026.4.1"


def absent() -> str | None:
    return missing(("openvino", "numpy"), f"openvino {VERSION}")


@lru_cache
def _package() -> Any:
    # Both bring a TBB, and the first that is loaded serves both: oneDNN wants its own, the newer one.
    if importlib.util.find_spec("openvino") is not None and onednn.absent() is None:
        ctypes.CDLL(str(onednn.library_file("tbb", "libtbb.so.12")))
    import openvino

    return openvino


def _port(number: int, shape: tuple[int, ...], kind: str = "FP32") -> str:
    return f'<port id="{number}" precision="{kind}">{"".join(f"<dim>{n}</dim>" for n in shape)}</port>'


def _model(case: Case, weights: dict[str, numpy.ndarray]) -> str:
    """The model: inputs x, lengths and, with AUGRU, attention; then constants, the operation, and its states."""
    attentive = case.op == "augru"
    batch, steps, size, hidden = case.size
    given = {"x": ((batch, steps, size), "FP32"), "lengths": ((batch,), "I32")}
    if attentive:
        given["attention"] = ((batch, steps, 1), "FP32")
    order = ["x", "state", "lengths", "w", "r", "b", *(["attention"] if attentive else [])]
    shapes = given | {name: (value.shape, "FP32") for name, value in weights.items()}
    layers, offset = [], 0
    for number, (name, (shape, kind)) in enumerate(shapes.items()):
        text, element = ",".join(map(str, shape)), "f32" if kind == "FP32" else "i32"
        if name in given:
            data, what = f'<data shape="{text}" element_type="{element}"/>', "Parameter"
        else:
            count = 4 * prod(shape)
            data, what = f'<data element_type="f32" shape="{text}" offset="{offset}" size="{count}"/>', "Const"
            offset += count
        port = f"<output>{_port(0, shape, kind)}</output>"
        layers.append(f'<layer id="{number}" name="{name}" type="{what}" version="opset1">{data}{port}</layer>')
    op, last, ends = len(shapes), len(order), len(shapes) + 1
    kind, version = ("AUGRUSequence", "ie_internal_opset") if attentive else ("GRUSequence", "opset5")
    ports = "".join(_port(i, *shapes[name]) for i, name in enumerate(order))
    states = (batch, 1, steps, hidden)
    out = _port(last, states) + _port(last + 1, (batch, 1, hidden))
    data = (
        f'<data direction="forward" linear_before_reset="{str(not attentive).lower()}" hidden_size="{hidden}" '
        'activations="sigmoid, tanh" activations_alpha="" activations_beta="" clip="0"/>'
    )
    layers += [
        f'<layer id="{op}" name="rnn" type="{kind}" version="{version}">{data}<input>{ports}</input>'
        f"<output>{out}</output></layer>",
        f'<layer id="{ends}" name="y" type="Result" version="opset1"><input>{_port(0, states)}</input></layer>',
    ]
    edges = [
        f'<edge from-layer="{list(shapes).index(name)}" from-port="0" to-layer="{op}" to-port="{i}"/>'
        for i, name in enumerate(order)
    ]
    edges.append(f'<edge from-layer="{op}" from-port="{last}" to-layer="{ends}" to-port="0"/>')
    return (
        f'<?xml version="1.0"?><net name="rnn" version="11"><layers>{"".join(layers)}</layers>'
        f"<edges>{''.join(edges)}</edges></net>"
    )


def _weights(case: Case, inputs: Inputs) -> dict[str, numpy.ndarray]:
    """Gates in the order z, r, n; a fourth bias only where the reset comes after the product."""

    def zrn(rows: Tensor) -> Tensor:
        r, z, n = rows.detach().chunk(3)
        return torch.cat((z, r, n))

    own = {name: zrn(inputs.leaves[name]) for name in ("w_ih", "w_hh", "b_ih", "b_hh")}
    h = case.hidden
    bias = own["b_ih"] + own["b_hh"]
    if case.op == "gru":
        bias = torch.cat((bias[: 2 * h], own["b_ih"][2 * h :], own["b_hh"][2 * h :]))
    found = {"state": torch.zeros(case.batch, 1, h), "w": own["w_ih"][None], "r": own["w_hh"][None], "b": bias[None]}
    return {name: numpy.ascontiguousarray(value.numpy()) for name, value in found.items()}


def build(case: Case, inputs: Inputs) -> Program:
    if case.trains:
        raise LookupError("inference only")
    openvino, weights = _package(), _weights(case, inputs)
    core, blob = openvino.Core(), numpy.concatenate([w.ravel() for w in weights.values()]).tobytes()
    model = core.read_model(_model(case, weights).encode(), blob)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    lengths = torch.full((case.batch,), case.steps) if inputs.lengths is None else inputs.lengths
    batch = [inputs.leaves["x"].detach(), lengths.to(torch.int32)]
    if case.op == "augru":
        batch.append(inputs.leaves["attention"].detach().unsqueeze(2))
    arrays = [tensor.contiguous().numpy() for tensor in batch]
    for number, array in enumerate(arrays):
        request.set_input_tensor(number, openvino.Tensor(array, shared_memory=True))
    y = torch.empty(case.batch, 1, case.steps, case.hidden)
    request.set_output_tensor(0, openvino.Tensor(y.numpy(), shared_memory=True))

    owned = model, blob, arrays  # the request reads all of these where they are

    def forward(owned: Any = owned) -> Tensor:
        request.infer()
        return y

    note = f"openvino {VERSION}; weights reordered beforehand"
    variant = "authors_before" if case.op == "augru" else ""
    return Program(forward, inputs.leaves, note, padded=lambda result: result.squeeze(1), variant=variant)
