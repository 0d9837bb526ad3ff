"""The grid on a GPU, with every backend that does not refuse: ``make test-gpu``. Left out of a plain run.

Cases are made on the CPU, where the exact results are computed, and sent to the device.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dien_kernels import gru
from dien_kernels.ops._dispatch import Call, refusal
from tests.attention_cases import compare
from tests.attention_cases import make as make_attention
from tests.cases import KINDS, Case, Inputs, assert_matches, call, make, result_of
from tests.unit_cases import raggedness

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16)
DEVICE = "cuda"  # tests/test_gpu_rehearsal.py puts the CPU here
WIDTHS = (80, 40)


def takers(op: str, dtype: torch.dtype, hidden: int, *facts: object) -> list[str]:
    """The GPU backends that take such a call: of the others there is nothing to test."""
    call = Call(op, "cuda", dtype, hidden, hidden, *facts, backward=True)  # type: ignore[arg-type,misc]
    return [backend for backend in ("cuda", "triton") if refusal(call, backend) is None]


def on_device(inputs: Inputs) -> Inputs:
    names = ("lengths", "offsets", "mask", "history", "dy", "dh_n")
    moved = {name: None if value is None else value.to(DEVICE) for name in names for value in (getattr(inputs, name),)}
    # Sliced and expanded leaves keep their strides: what is sent is the storage.
    leaves = {name: _send(leaf).requires_grad_() for name, leaf in inputs.leaves.items()}
    return replace(inputs, leaves=leaves, **moved)


def _send(leaf: Tensor) -> Tensor:
    whole = torch.empty(0, dtype=leaf.dtype).set_(leaf.detach().untyped_storage()).to(DEVICE)
    return whole.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())


CASES = [
    *(
        Case(kind, dtype, reset=reset, update=update)
        for kind, dtype, reset, update in product(KINDS, DTYPES, ("after", "before"), ("keep", "candidate"))
    ),
    *(
        Case(kind, dtype, 33, 9, 5, 20, ragged, history=history, reset=reset)
        for (kind, reset), dtype, ragged, history in product(
            (("gru", "after"), ("aigru", "before"), ("authors", "after")),
            DTYPES,
            ("full", "lengths", "mask", "left", "jagged", "empty"),
            (False, True),
        )
        if not (kind == "gru" and history)
    ),
    *(
        Case("authors", dtype, 19, 7, 6, 12, ragged, reverse=reverse, time_major=time_major)
        for dtype, ragged, reverse, time_major in product(DTYPES, ("full", "lengths"), (False, True), (False, True))
    ),
    *(
        Case(kind, dtype, batch, steps, size, hidden, reset=reset)
        for (kind, reset), dtype, (batch, steps, size, hidden) in product(
            (("authors", "after"), ("aigru", "before")),
            DTYPES,
            (
                (1, 1, 1, 1), (1, 1, 3, 3), (17, 3, 3, 3), (40, 20, 36, 36), (40, 20, 64, 64), (18, 9, 100, 100),
                (18, 9, 8, 108), (18, 9, 128, 128), (18, 9, 300, 130), (18, 9, 256, 256), (3000, 50, 64, 64),
            ),
        )
    ),
    *(
        Case("aigru", dtype, H=9, bias=bias, h0=h0, strides=strides, scalars=scalars)
        for dtype, strides in product(DTYPES, ("contiguous", "sliced", "offset", "transposed", "expanded"))
        for bias, h0, scalars in (("none", False, "compute"), ("ih", True, "storage"), ("hh", False, "storage"))
    ),
    *(Case(kind, torch.float16, reset=reset) for kind, reset in product(KINDS, ("after", "before"))),
]  # fmt: skip


def test_cuda_is_among_the_backends() -> None:
    """Where nvcc is there to build it: refused, its combinations would be missing from the grid without a word."""
    if shutil.which("nvcc") is not None:
        assert refusal(Call("recurrence", "cuda", torch.float32, 64, 64, backward=True), "cuda") is None


@pytest.mark.parametrize(
    "case, backend", [(c, b) for c in CASES for b in takers("recurrence", c.dtype, c.H, c.reset)], ids=str
)
def test_recurrence(case: Case, backend: str, record_combination: Callable[..., None]) -> None:
    record_combination("recurrence", backend, case.kind, case.dtype)
    inputs = on_device(make(case))
    result = result_of(call(case, inputs, backend), inputs, inputs.leaves)
    assert_matches(case, type(result)({name: tensor.cpu() for name, tensor in result}))


# kind, H, layout, shared histories, normalize
ATTENTION = [
    *product(("bilinear", "din"), (20,), ("full", "lengths", "mask", "jagged"), (False, True), ("softmax", None)),
    *product(("bilinear", "din"), (1, 3, 36, 64, 100, 128), ("lengths",), (False,), ("softmax",)),
]


@pytest.mark.parametrize(
    "dtype, combination, backend",
    [
        (dtype, combination, backend)
        for dtype, combination in product((*DTYPES, torch.float16), ATTENTION)
        for backend in takers(
            "attention_scores", dtype, combination[1], combination[0], WIDTHS if combination[0] == "din" else ()
        )
    ],
    ids=str,
)
def test_attention(
    dtype: torch.dtype, combination: tuple, backend: str, record_combination: Callable[..., None]
) -> None:
    kind, hidden, layout, shared, normalize = combination
    record_combination("attention_scores", backend, kind, dtype)
    histories = 4 if shared else None
    case = make_attention(
        kind, 6, 70, hidden, sizes=WIDTHS, histories=histories, normalize=normalize, scale=hidden**-0.5
    )  # fmt: skip
    history = torch.tensor([3, 0, 2, 2, 1, 0]) if shared else None
    valid = raggedness(layout, len(case["states"]), 70)
    compare(case | {"backend": backend, "device": DEVICE}, layout, valid, history, dtype, f"{kind} {dtype}")


@pytest.mark.parametrize("backend", takers("recurrence", torch.float32, 64))
def test_repeats_itself(backend: str) -> None:
    case = Case("aigru", torch.float32, 400, 40, 64, 64, history=True)
    results = []
    for _ in range(2):
        inputs = on_device(make(case))
        results.append(result_of(call(case, inputs, backend), inputs, inputs.leaves))
    for name, tensor in results[0]:
        assert torch.equal(tensor, results[1].tensors[name]), name


@pytest.mark.parametrize("backend", takers("recurrence", torch.float32, 36))
def test_graph_replays_with_other_lengths(backend: str) -> None:
    """Nothing waits for the device or depends on values: a captured call follows its inputs."""
    inputs = on_device(make(Case("gru", B=50, T=12, I=36, H=36)))
    weights = [inputs.leaves[name].detach() for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    x, lengths = inputs.leaves["x"].detach(), inputs.lengths
    assert lengths is not None

    def run() -> Tensor:
        return gru(x, *weights, lengths=lengths, backend=backend)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    lengths.copy_(lengths.flip(0))
    x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, run())
