"""OpenVINO's GRUSequence and AUGRUSequence on the padded batch, in inference.

No function of its Python API makes an AUGRUSequence, an internal operation, but its model format names it: so the model
is written as text, and the CPU plugin is loaded as an extension, which lets the reader know the name. Its AUGRU is that
of the authors' code, reset before the product, with one bias: it is compared with that. Its fast path takes no lengths
but T for every row: ragged rows are computed to the end. The batch goes in and out without being copied.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Program
from benchmarks.peers import missing, onednn
from benchmarks.registry import COMPUTES_PADDING, Case

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


def _port(number: int, name: str, shape: tuple[int, ...]) -> str:
    kind = "I32" if name == "lengths" else "FP32"
    return f'<port id="{number}" precision="{kind}">{"".join(f"<dim>{n}</dim>" for n in shape)}</port>'


def _model(case: Case, weights: dict[str, numpy.ndarray]) -> str:
    """The model: inputs x and, with AUGRU, attention; then constants, the operation, and its states."""
    attentive = case.op == "augru"
    batch, steps, size, hidden = case.size
    given = {"x": (batch, steps, size)}
    if attentive:
        given["attention"] = (batch, steps, 1)
    order = ["x", "state", "lengths", "w", "r", "b", *(["attention"] if attentive else [])]
    shapes = given | {name: value.shape for name, value in weights.items()}
    layers, offset = [], 0
    for number, (name, shape) in enumerate(shapes.items()):
        data, what = (
            f'element_type="{"i32" if name == "lengths" else "f32"}" shape="{",".join(map(str, shape))}"',
            "Parameter",
        )
        if name in weights:
            data, what = f'{data} offset="{offset}" size="{weights[name].nbytes}"', "Const"
            offset += weights[name].nbytes
        port = f"<output>{_port(0, name, shape)}</output>"
        layers.append(f'<layer id="{number}" name="{name}" type="{what}" version="opset1"><data {data}/>{port}</layer>')
    op, last, ends = len(shapes), len(order), len(shapes) + 1
    kind, version = ("AUGRUSequence", "ie_internal_opset") if attentive else ("GRUSequence", "opset5")
    ports = "".join(_port(i, name, shapes[name]) for i, name in enumerate(order))
    states = (batch, 1, steps, hidden)
    out = _port(last, "y", states) + _port(last + 1, "h_n", (batch, 1, hidden))
    data = (
        f'<data direction="forward" linear_before_reset="{str(not attentive).lower()}" hidden_size="{hidden}" '
        'activations="sigmoid, tanh" activations_alpha="" activations_beta="" clip="0"/>'
    )
    layers += [
        f'<layer id="{op}" name="rnn" type="{kind}" version="{version}">{data}<input>{ports}</input>'
        f"<output>{out}</output></layer>",
        f'<layer id="{ends}" name="y" type="Result" version="opset1"><input>{_port(0, "y", states)}</input></layer>',
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
    found["lengths"] = torch.full((case.batch,), case.steps, dtype=torch.int32)
    return {name: numpy.ascontiguousarray(value.numpy()) for name, value in found.items()}


def build(case: Case, inputs: Inputs) -> Program:
    if case.trains:
        raise LookupError("inference only")
    openvino, weights = _package(), _weights(case, inputs)
    if onednn.absent() is None:
        onednn.set_threads(torch.get_num_threads())  # both have one TBB
    core = openvino.Core()
    core.add_extension(str(Path(openvino.__file__).parent / "libs" / "libopenvino_intel_cpu_plugin.so"))
    blob = b"".join(value.tobytes() for value in weights.values())
    model = core.read_model(_model(case, weights).encode(), blob)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    batch = [inputs.leaves["x"].detach()]
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
    if inputs.lengths is not None:
        note += f"; {COMPUTES_PADDING}"
    variant = "authors_before" if case.op == "augru" else ""
    return Program(forward, inputs.leaves, note, padded=lambda result: result.squeeze(1), variant=variant)
