"""attention_scores with the features of PyTorch (derivatives, tracing, autocast, determinism), and its errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from dien_kernels.ops.attention import (
    attention_scores,
    op,
    torch_backend,  # noqa: F401  the fixture "target" asks the module for it
)
from tests.attention_cases import call, cast, layouts, leaves, make
from tests.cases import running_on, target_params
from tests.unit_cases import assert_compiles, raggedness

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("target")
def test_gradcheck() -> None:
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


def test_frozen_inputs_and_inference(target_dtype: torch.dtype) -> None:
    case = make(dtype=target_dtype)
    with torch.inference_mode():
        still = call(case)
    assert torch.equal(still, call(case).detach())
    case["states"] = case["states"].detach()
    (g,) = torch.autograd.grad(call(case).sin().sum(), case["target"])
    assert g.any()


def test_noncontiguous_inputs_and_int32(target_dtype: torch.dtype) -> None:
    case = make(steps=6, dtype=target_dtype)
    want = call(case, lengths=torch.tensor([6, 0, 2, 5]))
    case["states"] = case["states"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    case["weights"][0] = case["weights"][0].detach().t().contiguous().t().requires_grad_()
    got = call(case, lengths=torch.tensor([6, 0, 2, 5], dtype=torch.int32))
    assert torch.equal(got, want)
    assert torch.autograd.grad(got.sin().sum(), case["states"])[0].any()


def test_the_same_bits_again_and_on_two_threads(target_dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """The definition's products are BLAS's, whose sums may depend on the number of threads: there, only again."""
    anew = request.node.callspec.params["target_dtype"] == "reference"
    batch = 12 if target_dtype == torch.float32 else 40  # Triton's interpreter has no threads, and little speed
    case = make(batch=batch, steps=30, hidden=8, histories=5, dtype=torch.float32)
    history, lengths = torch.randint(0, 5, (batch,)), torch.randint(0, 31, (5,))

    def once() -> list[Tensor]:
        out = call(case, history=history, lengths=lengths)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves(case))]

    first = once()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = once() if anew else first
        for a, b in zip(first, once(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("target_dtype")
def test_autocast_casts_the_big_operands_only() -> None:
    case = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(case)
    half = {**case, **{n: case[n].bfloat16() for n in ("target", "states")}}
    half["weights"] = [w.bfloat16() for w in case["weights"]]
    assert torch.equal(got, call(half))
    assert got.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(got.sin().sum(), leaves(case)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", target_params(("reference", "torch", "cpu", "triton")))
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_opcheck(kind: str, backend: str) -> None:
    with running_on(backend):
        forward, backward = op._FWD[backend], op._BWD[backend]
    triton = backend == "triton"  # which also tells 16-bit storage from float32 results
    case = cast(make(kind, bias="some"), torch.bfloat16 if triton else torch.float64, keep_small=True)
    w = [case["weights"]] if kind == "bilinear" else case["weights"]
    b = [torch.zeros(0, dtype=torch.float32 if triton else torch.float64) if v is None else v for v in case["biases"]]
    for layout in layouts(case):
        states, total = layout.get("states", case["states"]), layout.get("rows_total", -1)
        index = [layout.get(n) for n in ("lengths", "offsets", "mask", "history")]
        options = (total, kind == "bilinear", 0, 0.5, True)
        args = [t.detach() for t in (case["target"], states)]
        args += [[v.detach() for v in vs] for vs in (w, b, [])] + index
        tests = ("test_schema", "test_faketensor", *(() if triton else ("test_aot_dispatch_dynamic",)))
        torch.library.opcheck(forward, (*args, *options), test_utils=tests)
        out = forward(*args, *options)
        torch.library.opcheck(
            backward,
            (torch.randn_like(out), *args, out, *options),
            test_utils=tests,
        )


@pytest.mark.slow
def test_compile_without_a_break() -> None:
    for kind in ("bilinear", "din"):
        case = make(kind)
        for layout in layouts(case):
            values = {**case, **layout}
            assert_compiles(lambda values: attention_scores(**values).sin().sum(), values, leaves(values))


@pytest.mark.slow
def test_compile_takes_one_tensor_in_two_places() -> None:
    case = make("din", hidden=2, sizes=(8, 8))
    square, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((8, 8), (8,)))
    values = {**case, "weights": [square, square, case["weights"][2]], "biases": [bias, bias, case["biases"][2]]}
    assert_compiles(lambda values: attention_scores(**values).sin().sum(), values, [square, bias])


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
