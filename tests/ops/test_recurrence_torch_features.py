"""The recurrences with the features of PyTorch: gradcheck, opcheck, compile, export, autocast, func, inference mode."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import dien_kernels
from dien_kernels import augru, checks, gru, use_backend, use_gates
from dien_kernels.ops import _dispatch, _gates
from dien_kernels.ops.recurrence import op as module
from tests.cases import KINDS, LEAVES, Case, call, make, options_of, running_on, target_params

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = target_params(("reference", "torch", "cpu"))


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("reset", ["after", "before"])
@pytest.mark.parametrize(
    "kind, ragged, history",
    [
        *((kind, "lengths", kind != "gru") for kind in KINDS),
        ("aigru", "jagged", True),
        ("authors", "mask", False),
    ],
)
def test_gradcheck(kind: str, ragged: str, history: bool, reset: str, target: str) -> None:
    case = Case(kind, torch.float64, 3, 3, 2, 3, ragged, history=history, reset=reset)
    inputs = make(case)
    leaves = tuple(inputs.leaves.values())
    with running_on(target, case) as backend:
        assert torch.autograd.gradcheck(
            lambda *tensors: call(case, inputs, backend, **dict(zip(inputs.leaves, tensors, strict=True))),
            leaves,
            fast_mode=True,
        )


def raw_arguments(case: Case, keep: bool) -> tuple[tuple, tuple]:
    """The arguments of the raw forward: tensors and options."""
    inputs = make(case)
    options = options_of(case)._replace(kept_units=_gates.KEPT_UNITS if keep else 0)
    tensors = [inputs.leaf(name) for name in LEAVES]
    detached = [None if t is None else t.detach() for t in tensors]
    return (*detached, inputs.lengths, inputs.offsets, inputs.history, None), tuple(options)


@pytest.mark.slow
@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case("aigru"),
        Case("gru", torch.bfloat16, ragged="full", bias="none", h0=False),
        Case("authors", torch.float64, ragged="jagged", history=True, reset="before"),
        Case("paper", time_major=True, reverse=True, history=True),
    ],
    ids=str,
)
def test_opcheck_of_the_raw_ops(case: Case, keep: bool, target: str) -> None:
    if keep:  # kept gates are private scratch: written for real steps and units only, opcheck compares them all
        case = replace(case, H=16, ragged="jagged" if case.ragged == "jagged" else "full")
    with running_on(target, case) as backend:
        tensors, options = raw_arguments(case, keep and backend == "cpu")  # no other backend keeps gates
        forward = getattr(torch.ops.dien_kernels, f"_recurrence_{backend}_fwd").default
        torch.library.opcheck(forward, (*tensors, *options))
        y, h_n, gates = forward(*tensors, *options)
        for dy, dh_n, need_dx in ((y, h_n, True), (None, h_n, False), (y, None, True)):
            backward = getattr(torch.ops.dien_kernels, f"_recurrence_{backend}_bwd").default
            torch.library.opcheck(backward, (dy, dh_n, *tensors, y, gates, need_dx, *options))


class Counting:
    """A compiler backend that counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
        self.graphs += 1
        return graph.forward


def sizes() -> list[tuple[int, int]]:
    """(B, T), all different from one another and from the fixed sizes: equal ones would share a symbol."""
    return [(5, 7), (8, 6), (9, 3), (4, 11), (17, 10)]


def case_of(layout: str, batch: int, steps: int) -> Case:
    ragged, _, history = layout.partition("+")
    return Case("aigru", torch.float32, batch, steps, 13, 19, ragged, history=bool(history), seed=batch)


@pytest.mark.slow
@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("layout", ["full", "lengths", "mask", "jagged", "lengths+history", "jagged+history"])
@pytest.mark.parametrize("grad", [False, True])
def test_compile_has_no_break_and_no_storm(layout: str, grad: bool, target: str) -> None:
    """One graph (two while the sizes become symbols) whatever B and T are; the same numbers as eager."""
    counting = Counting()
    torch.compiler.reset()

    def step(leaf: dict[str, Tensor], index: dict[str, Tensor | None], backend: str) -> tuple[Tensor, Tensor]:
        return dien_kernels.aigru(**leaf, **index, backend=backend)

    compiled = torch.compile(step, backend=counting, fullgraph=True, dynamic=True)
    with running_on(target) as backend:
        for batch, steps in sizes():
            inputs = make(case_of(layout, batch, steps))
            leaf = {n: t if grad else t.detach() for n, t in inputs.leaves.items()}
            index = {n: getattr(inputs, n) for n in ("lengths", "offsets", "mask", "history")}
            for mine, eager in zip(compiled(leaf, index, backend), step(leaf, index, backend), strict=True):
                assert torch.equal(mine, eager)
    assert counting.graphs <= 2


@pytest.mark.slow
@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("layout", ["lengths", "jagged+history", "mask"])
def test_compiled_training_step_has_the_same_gradients(layout: str, target: str) -> None:
    """Inductor, forward and backward, with symbolic sizes."""
    torch.compiler.reset()
    with running_on(target) as backend:

        def loss(leaf: dict[str, Tensor], index: dict[str, Tensor | None]) -> Tensor:
            y, h_n = dien_kernels.aigru(**leaf, **index, backend=backend)
            return (y * y).sum() + (h_n * h_n).sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=True)
        for batch, steps in sizes()[:2]:
            inputs = make(case_of(layout, batch, steps))
            index = {n: getattr(inputs, n) for n in ("lengths", "offsets", "mask", "history")}
            leaves = tuple(inputs.leaves.values())
            eager = torch.autograd.grad(loss(inputs.leaves, index), leaves)
            mine = torch.autograd.grad(compiled(inputs.leaves, index), leaves)
            for name, a, b in zip(inputs.leaves, mine, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("target", BACKENDS)
def test_compile_follows_use_backend_and_use_gates(target: str) -> None:
    counting = Counting()
    torch.compiler.reset()
    compiled = torch.compile(gru, backend=counting, fullgraph=True)
    inputs = make(Case("gru"))
    leaf = inputs.leaves
    with running_on(target) as backend, use_backend(backend), use_gates("keep"):
        mine = compiled(**leaf, lengths=inputs.lengths)
        eager = gru(**leaf, lengths=inputs.lengths)
    assert torch.equal(mine[0], eager[0])
    with use_backend("torch" if backend == "reference" else "reference"):
        compiled(**leaf, lengths=inputs.lengths)
    assert counting.graphs == 2, "another backend is another graph"


def test_a_graph_says_how_kept_gates_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile finds graphs on disk by what is written in them: another padding must be another text, or a graph
    of an older library asks ours for strides that it does not make."""
    texts = []
    for units in (_gates.KEPT_UNITS, 2 * _gates.KEPT_UNITS):
        monkeypatch.setattr(_gates, "KEPT_UNITS", units)
        leaf = make(Case("gru")).leaves
        with running_on("cpu"), use_gates("keep"):
            graph = make_fx(lambda leaf: gru(**leaf, backend="cpu"), tracing_mode="fake")(leaf)
        assert "_recurrence_cpu_fwd" in graph.code
        texts.append(graph.code)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("target", target_params(("cpu",)))
def test_another_padding_than_the_librarys_is_refused(target: str) -> None:
    with running_on(target):
        tensors, options = raw_arguments(Case("gru"), keep=True)
        with pytest.raises(ValueError, match=r"kept_units must be 0 or 8, got 3"):
            torch.ops.dien_kernels._recurrence_cpu_fwd(*tensors, *options[:-1], 3)


@pytest.mark.parametrize("target", target_params(("cpu",)))
def test_a_backward_refuses_what_no_forward_returned(target: str) -> None:
    """It walks over y and gates as they lie."""
    with running_on(target):
        tensors, options = raw_arguments(Case("gru"), keep=True)
        y, h_n, gates = torch.ops.dien_kernels._recurrence_cpu_fwd(*tensors, *options)

        def backward(y: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
            return torch.ops.dien_kernels._recurrence_cpu_bwd(None, h_n, *tensors, y, gates, True, *options)

        assert backward(y, gates)[0].isfinite().all()
        with pytest.raises(ValueError, match=r"y must be contiguous with \d+ values.*got a non-contiguous tensor"):
            backward(y.transpose(0, 1), gates)
        with pytest.raises(ValueError, match=r"kept must be contiguous with \d+ values.*got a non-contiguous tensor"):
            backward(y, gates.transpose(0, 1))
        with pytest.raises(ValueError, match=rf"kept must be contiguous with {gates.numel()} values.*got \d+"):
            backward(y, gates[..., :-4].contiguous())


@pytest.mark.parametrize("target", BACKENDS)
def test_compile_takes_one_tensor_in_two_places(target: str) -> None:
    w, b = make(Case("gru", I=4, H=4)).leaves["w_hh"], torch.randn(12, requires_grad=True)
    x = torch.randn(2, 3, 4, requires_grad=True)
    torch.compiler.reset()
    with running_on(target) as backend:

        def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return gru(x, w, w, b, b, backend=backend)[0].square().sum()

        eager = torch.autograd.grad(loss(x, w, b), (x, w, b))
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        mine = torch.autograd.grad(compiled(x, w, b), (x, w, b))
    for a, b in zip(mine, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("target", BACKENDS)
def test_export_with_dynamic_sizes(target: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self, backend: str) -> None:
            super().__init__()
            inputs = make(Case("aigru"))
            self.backend = backend
            self.w_ih, self.w_hh, self.b_ih, self.b_hh = (
                torch.nn.Parameter(inputs.leaves[n].detach()) for n in ("w_ih", "w_hh", "b_ih", "b_hh")
            )

        def forward(self, x: Tensor, attention: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            w = (self.w_ih, self.w_hh, self.b_ih, self.b_hh)
            return augru(x, attention, *w, lengths=lengths, backend=self.backend)

    def arguments(batch: int, steps: int) -> tuple[Tensor, ...]:
        inputs = make(Case("aigru", torch.float32, batch, steps))
        return inputs.leaves["x"].detach(), inputs.leaves["attention"].detach(), inputs.lengths

    with running_on(target) as backend, torch.no_grad():
        model = Model(backend)
        b, t = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
        program = torch.export.export(
            model, arguments(5, 4), dynamic_shapes=({0: b, 1: t}, {0: b, 1: t}, {0: b}), strict=True
        )
        for size in ((5, 4), (7, 9)):
            for mine, eager in zip(program.module()(*arguments(*size)), model(*arguments(*size)), strict=True):
                assert torch.equal(mine, eager)
        x, attention, lengths = arguments(5, 4)
        with pytest.raises(ValueError, match="lengths must lie between"):
            program.module()(x, attention, lengths + 4)


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("kind", ["gru", "aigru"])
def test_autocast_casts_x_and_the_weight_matrices_only(kind: str, target: str) -> None:
    case = Case(kind)
    inputs = make(case)
    low = {n: t.detach().bfloat16() for n, t in inputs.leaves.items() if n in ("x", "w_ih", "w_hh")}
    with running_on(target) as backend:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = call(case, inputs, backend)
        by_hand = call(case, inputs, backend, **low)
        assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
        for mine, expected in zip(outputs, by_hand, strict=True):
            assert torch.equal(mine, expected)
        grads = torch.autograd.grad(
            outputs, tuple(inputs.leaves.values()), (inputs.dy.bfloat16(), inputs.dh_n.bfloat16())
        )
        assert all(g.dtype == torch.float32 for g in grads), "gradients have the dtype of the parameters"
        with torch.autocast("cpu", torch.bfloat16):
            double = call(Case(kind, torch.float64), make(Case(kind, torch.float64)), backend)
        assert double[0].dtype == torch.float64


@pytest.mark.parametrize("target", BACKENDS)
def test_func_grad_and_functional_call(target: str) -> None:
    case = Case("authors")
    inputs = make(case)
    leaves = {n: t.detach() for n, t in inputs.leaves.items()}
    with running_on(target) as backend:

        def loss(leaf: dict[str, Tensor]) -> Tensor:
            y, h_n = call(case, inputs, backend, **leaf)
            return (y * inputs.dy).sum() + (h_n * inputs.dh_n).sum()

        mine = torch.func.grad(loss)(leaves)
        _, pullback = torch.func.vjp(loss, leaves)
        expected = torch.autograd.grad(loss(inputs.leaves), tuple(inputs.leaves.values()))
    for name, grad in zip(inputs.leaves, expected, strict=True):
        assert torch.equal(mine[name], grad), name
        assert torch.equal(pullback(torch.ones(()))[0][name], grad), name


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_grad_mode(mode: Callable, target: str) -> None:
    case = Case("authors")
    inputs = make(case)
    with running_on(target) as backend:
        expected = call(case, inputs, backend)
        with mode():
            outputs = call(case, inputs, backend)
    for mine, other in zip(outputs, expected, strict=True):
        assert not mine.requires_grad
        assert torch.equal(mine, other)


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("wanted", LEAVES)
def test_one_gradient_at_a_time(wanted: str, target: str) -> None:
    """Whichever input alone wants a gradient, it gets the same one."""
    case = Case("aigru")
    inputs = make(case)
    with running_on(target) as backend:
        outputs = call(case, inputs, backend)
        everything = torch.autograd.grad(
            outputs, tuple(inputs.leaves.values()), (inputs.dy, inputs.dh_n), retain_graph=True
        )
        alone = {n: t.detach().requires_grad_(n == wanted) for n, t in inputs.leaves.items()}
        outputs = call(case, inputs, backend, **alone)
        (grad,) = torch.autograd.grad(outputs, alone[wanted], (inputs.dy, inputs.dh_n))
    assert torch.equal(grad, everything[list(inputs.leaves).index(wanted)])


@pytest.mark.parametrize("target", BACKENDS)
def test_saved_tensors_are_guarded_against_changes_in_place(target: str) -> None:
    case = Case("gru")
    inputs = make(case)
    with running_on(target) as backend:
        y, _ = call(case, inputs, backend)
        with torch.no_grad():
            inputs.leaves["w_hh"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("target", BACKENDS)
def test_outputs_do_not_alias_inputs(target: str) -> None:
    """Rows of length 0 end in h0: a copy of it, not h0 itself."""
    case = Case("gru", ragged="empty")
    inputs = make(case)
    with running_on(target) as backend, torch.no_grad():
        _, h_n = call(case, inputs, backend)
    assert h_n.data_ptr() != inputs.leaves["h0"].data_ptr()


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that run from now on."""
    ran: list[str] = []
    for name, function in dict(module._FWD).items():

        def listen(*args: object, name: str = name, function: Callable = function) -> object:
            ran.append(name)
            return function(*args)

        monkeypatch.setitem(module._FWD, name, listen)
    return ran


@pytest.mark.native
def test_use_backend_and_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ran = Case("gru"), spy(monkeypatch)
    inputs = make(case)
    with running_on("cpu"):
        call(case, inputs)
        with use_backend("reference"):
            call(case, inputs)
            call(case, inputs, "cpu")
            with use_backend("cpu"):
                call(case, inputs)
        call(case, inputs)
    assert ran == ["cpu", "reference", "cpu", "cpu", "cpu"]


def test_use_backend_is_undone_by_an_error() -> None:
    before = _dispatch._forced.word()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert _dispatch._forced.word() == before
    with (
        pytest.raises(ValueError, match=r"use_backend\(name\) must be one of .*got 'fast'"),
        use_backend("fast"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"use_gates\(choice\) must be one of .*got 'some'"),
        use_gates("some"),
    ):
        pass


@pytest.mark.native
def test_float16_is_refused_by_name_and_moved_on_by_auto() -> None:
    x, w, v = torch.randn(2, 3, 4).half(), torch.randn(15, 4).half(), torch.randn(15, 5).half()
    with running_on("cpu"):
        with pytest.raises(RuntimeError, match="backend 'cpu' refuses this call: float16 is not among"):
            gru(x, w, v, backend="cpu")
        y, _ = gru(x, w, v)
        assert y.dtype == torch.float16


@pytest.mark.slow
def test_environment_chooses_the_backend() -> None:
    code = "from dien_kernels.ops import _dispatch, _gates; print(_dispatch._forced.word(), _gates.kept_units())"

    def run(**variables: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DIEN_KERNELS_")}
        return subprocess.run(
            [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True, timeout=120
        )

    assert run().stdout.split()[0] == "auto"
    for choice, kept in (("keep", str(_gates.KEPT_UNITS)), ("recompute", "0")):
        good = run(DIEN_KERNELS_BACKEND="reference", DIEN_KERNELS_GATES=choice)
        assert good.stdout.split() == ["reference", kept]
    assert "environment variable DIEN_KERNELS_BACKEND must be one of" in run(DIEN_KERNELS_BACKEND="gpu").stderr
    assert "environment variable DIEN_KERNELS_GATES must be one of" in run(DIEN_KERNELS_GATES="all").stderr


@pytest.mark.slow
@pytest.mark.native
def test_environment_chooses_the_instruction_set() -> None:
    code = """
import torch, dien_kernels
from dien_kernels import _native
try:
    y, _ = dien_kernels.gru(torch.ones(1, 2, 3), torch.ones(12, 3), torch.ones(12, 4), backend="cpu")
    print(_native.cpu_isa())
except Exception as error:
    print(type(error).__name__, error)
"""

    def run(isa: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"DIEN_KERNELS_ISA": isa}, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    with running_on("cpu"):
        assert run("portable") == "portable"
        answer = run("sse9")
        assert answer.startswith("ValueError")
        assert "DIEN_KERNELS_ISA must be one of portable, avx2, avx2x2, avx512, got 'sse9'" in answer


@pytest.mark.parametrize("name", ["gru", "augru", "agru", "aigru"])
def test_help_is_whole_and_its_examples_run(name: str) -> None:
    function = getattr(dien_kernels, name)
    words = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", words), parameter
    assert words.count("Returns:") == words.count("Raises:") == 1
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(function, name, module=False, globs={})
    assert example.examples
    assert runner.run(example).failed == 0


def test_autocast_of_devices_that_torch_does_not_count_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch._C._is_any_autocast_enabled`` leaves out MPS, so that it may not decide for a tensor there."""

    class OnMPS:
        device, dtype, is_cpu, is_cuda = torch.device("mps"), torch.float32, False, False

    assert checks.autocast_dtype(OnMPS()) is None  # type: ignore[arg-type]
    torch.set_autocast_enabled("mps", True)
    try:
        assert checks.autocast_dtype(OnMPS()) == torch.get_autocast_dtype("mps")  # type: ignore[arg-type]
        assert checks.autocast_dtype(torch.zeros(1)) is None
    finally:
        torch.set_autocast_enabled("mps", False)
