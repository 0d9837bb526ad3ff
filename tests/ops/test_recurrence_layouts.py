"""Every layout on every backend: what belongs to a row is found, what lies past it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from dien_kernels import use_gates
from dien_kernels.histories import Histories
from dien_kernels.ops._layout import rows_of
from dien_kernels.ops.recurrence import gpu_problem
from dien_kernels.ops.recurrence.contract import Inputs as Tensors
from tests.cases import (
    Case,
    actual,
    assert_matches,
    call,
    exact,
    make,
    options_of,
    result_of,
    running_on,
    target_params,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")


def layouts(kind: str, dtype: torch.dtype, **other: object) -> list[Case]:
    """Every layout the ops (and the core, for time-major and reverse) know."""
    shape = (kind, dtype, 6, 5, 4, 9)
    shared = (False,) if kind == "gru" else (False, True)
    cases = [
        Case(*shape, ragged=ragged, history=history, **other)
        for ragged, history in product(("full", "lengths", "empty", "mask", "left", "jagged"), shared)
    ]
    for ragged, history in product(("full", "lengths", "jagged"), shared):
        cases.append(Case(*shape, ragged=ragged, history=history, reverse=True, **other))
        if ragged != "jagged":
            for reverse in (False, True):
                cases.append(Case(*shape, ragged=ragged, history=history, reverse=reverse, time_major=True, **other))
    return cases


LAYOUTS = [
    case
    for kind, dtype, other in (
        ("gru", torch.float32, {}),
        ("gru", torch.bfloat16, {"reset": "before", "h0": False}),
        ("aigru", torch.float32, {"reset": "before"}),
        ("authors", torch.float32, {}),
        ("authors", torch.float64, {"strides": "sliced"}),
        ("paper", torch.bfloat16, {}),
        ("agru", torch.float32, {"h0": False, "strides": "expanded"}),
    )
    for case in layouts(kind, dtype, **other)
]


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_matches_reference(case: Case, target: str, record_combination: Callable[..., None]) -> None:
    record_combination("recurrence", target, case.kind, case.dtype)
    with running_on(target, case) as backend:
        assert_matches(case, actual(case, backend))


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize(
    "case",
    [
        Case(kind, dtype, 6, 5, 3, 4, ragged, history=history, h0=h0, padded="carry")
        for ragged, (kind, dtype, history, h0) in product(
            ("full", "lengths", "empty", "mask", "left"),
            (
                ("gru", torch.float32, False, True),
                ("gru", torch.float64, False, False),
                ("paper", torch.float32, True, True),
                ("aigru", torch.bfloat16, True, False),
            ),
        )
    ],
    ids=str,
)
def test_carry(case: Case, target: str, record_combination: Callable[..., None]) -> None:
    """Past a row's length, and in a mask's holes, the state is repeated; gradients flow back through it."""
    record_combination("recurrence", target, case.kind, case.dtype)
    with running_on(target, case) as backend:
        assert_matches(case, actual(case, backend))


PADDED = [
    Case(kind, dtype, 7, 6, 3, h, ragged, history=history, reset=reset, h0=h0)
    for kind, dtype, h, ragged, history, reset, h0 in (
        ("gru", torch.float32, 5, "lengths", False, "after", True),
        ("gru", torch.float32, 5, "empty", False, "before", False),
        ("aigru", torch.float32, 17, "mask", False, "before", True),
        ("aigru", torch.bfloat16, 17, "lengths", True, "after", False),
        ("authors", torch.float64, 4, "left", True, "after", True),
        ("authors", torch.float32, 5, "lengths", True, "before", True),
    )
]


def valid_steps(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Which steps of x [U, T] and of the rows [B, T] exist."""
    inputs = make(case)
    valid = torch.zeros(case.histories, case.T, dtype=torch.bool)
    for u, steps in enumerate(inputs.steps):
        valid[u, steps] = True
    return valid, valid[torch.tensor(inputs.rows)]


def gradients(case: Case, backend: str, **overrides: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = make(case)
    leaves = {n: overrides.get(n, leaf).detach().requires_grad_() for n, leaf in inputs.leaves.items()}
    y, h_n = call(case, inputs, backend, **leaves)
    grads = torch.autograd.grad((y, h_n), tuple(leaves.values()), (inputs.dy, inputs.dh_n))
    return {"y": y.detach(), "h_n": h_n.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("case", PADDED, ids=str)
@pytest.mark.parametrize("padded", ["zero", "carry"])
def test_nan_in_padding_changes_nothing(case: Case, padded: str, target: str) -> None:
    case = Case(**{**vars(case), "padded": padded})
    of_x, of_rows = valid_steps(case)
    inputs = make(case)
    poison = {"x": torch.where(of_x.unsqueeze(2), inputs.leaves["x"], NAN)}
    if case.kind != "gru":
        poison["attention"] = torch.where(of_rows, inputs.leaves["attention"], NAN)
    with running_on(target, case) as backend:
        clean, poisoned = gradients(case, backend), gradients(case, backend, **poison)
    for name, tensor in clean.items():
        assert torch.equal(poisoned[name], tensor), name
    assert not poisoned["x"][~of_x].any(), "padding has no gradient"


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("reset", ["after", "before"])
def test_nan_in_a_state_that_no_step_reads(reset: str, target: str) -> None:
    """h0 of a row without steps goes to its h_n, and nowhere else."""
    case = Case("paper", torch.float32, 7, 6, 3, 5, "lengths", reset=reset, h0=True)
    _, of_rows = valid_steps(case)
    idle = ~of_rows.any(1)
    assert idle.any()
    assert not idle.all()
    poison = torch.where(idle.unsqueeze(1), NAN, make(case).leaves["h0"])
    with running_on(target, case) as backend:
        clean, poisoned = gradients(case, backend), gradients(case, backend, h0=poison)
    assert poisoned["h_n"][idle].isnan().all()
    for results in (clean, poisoned):
        results["h_n"] = results["h_n"][~idle]
    for name, tensor in clean.items():
        assert torch.equal(poisoned[name], tensor), name


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("case", PADDED, ids=str)
def test_upstream_gradient_of_padded_outputs_is_ignored(case: Case, target: str) -> None:
    """A loss that forgets its mask, or NaN in it, reaches no gradient through outputs that do not exist."""
    _, of_rows = valid_steps(case)
    inputs = make(case)
    dirty = torch.where(of_rows.unsqueeze(2), inputs.dy, NAN)
    with running_on(target, case) as backend:
        results = []
        for dy in (inputs.dy, dirty):
            leaves = {n: leaf.detach().requires_grad_() for n, leaf in inputs.leaves.items()}
            outputs = call(case, inputs, backend, **leaves)
            results.append(torch.autograd.grad(outputs, tuple(leaves.values()), (dy, inputs.dh_n)))
    for name, clean, other in zip(inputs.leaves, *results, strict=True):
        assert torch.equal(clean, other), name


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("case", PADDED, ids=str)
def test_outputs_past_the_length_are_zero(case: Case, target: str) -> None:
    _, of_rows = valid_steps(case)
    inputs = make(case)
    with running_on(target, case) as backend:
        y, h_n = call(case, inputs, backend)
    assert not y[~of_rows].any()
    empty = ~of_rows.any(1)
    before = inputs.leaf("h0")
    expected = torch.zeros_like(h_n) if before is None else before.to(h_n.dtype)
    assert torch.equal(h_n[empty], expected[empty]), "a row of length 0 ends where it began"


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("where", ["x", "attention", "h0"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("reset", ["after", "before"])
def test_nan_in_a_valid_step_reaches_its_row_and_every_weight(
    where: str, value: float, reset: str, target: str
) -> None:
    case = Case("aigru", torch.float32, 5, 4, 3, 6, ragged="full", reset=reset)
    leaf = make(case).leaves[where].detach().clone()
    leaf[(2, 1, 0)[: leaf.dim()]] = value
    if where == "x" and value == float("inf"):
        leaf[2, 1] = torch.tensor([value, -value, value])  # inf - inf somewhere in every product
    with running_on(target, case) as backend:
        clean, poisoned = gradients(case, backend), gradients(case, backend, **{where: leaf})
    first = 0 if where == "h0" else 1
    assert torch.equal(poisoned["y"][2, :first], clean["y"][2, :first])
    others = [0, 1, 3, 4]
    for name in ("y", "h_n", "x", "attention", "h0"):
        assert torch.equal(poisoned[name][others], clean[name][others]), name
    if value == float("inf"):
        return  # sigmoid and tanh may swallow an infinity; only that it stays in its row is certain
    assert poisoned["y"][2, first:].isnan().all()
    assert poisoned["h_n"][2].isnan().all()
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        assert poisoned[name].isnan().any(1 if poisoned[name].dim() == 2 else 0).all(), name


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("history", [False, True])
def test_unused_memory_is_overwritten(history: bool, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors full of NaN, where torch makes them: nothing of it may be left in any result."""
    case = Case("authors", torch.float32, 7, 6, 3, 5, history=history)
    with running_on(target, case) as backend:
        expected = gradients(case, backend)
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            for name, tensor in gradients(case, backend).items():
                assert torch.equal(tensor, expected[name]), name
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("ragged", ["lengths", "jagged"])
def test_unused_histories_have_zero_gradient(ragged: str, target: str) -> None:
    case = Case("aigru", torch.float32, 6, 5, 3, 4, ragged, history=True)
    inputs = make(case)
    assert max(inputs.rows) < case.histories - 1
    with running_on(target, case) as backend:
        dx = actual(case, backend).tensors["d_x"]
    unused = dx[int(inputs.offsets[-2]) :] if inputs.offsets is not None else dx[-1]
    assert not unused.any()


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("gates", ["keep", "recompute"])
@pytest.mark.parametrize("kind", ["aigru", "authors"])
@pytest.mark.parametrize("ragged", ["full", "lengths", "jagged"])
def test_nan_in_an_unused_history_changes_nothing(ragged: str, kind: str, gates: str, target: str) -> None:
    case = Case(kind, torch.float32, 6, 5, 3, 4, ragged, history=True)
    inputs = make(case)
    leaves = {name: leaf.detach().clone() for name, leaf in inputs.leaves.items()}
    unused = slice(int(inputs.offsets[-2]), None) if inputs.offsets is not None else slice(-1, None)
    leaves["x"][unused] = torch.nan
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    with running_on(target, case) as backend, use_gates(gates):
        expected = actual(case, backend)
        result = result_of(call(case, inputs, backend, **leaves), inputs, leaves)
    for name, tensor in result:
        assert torch.equal(tensor, expected.tensors[name]), name


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("batch, histories", [(0, 0), (0, 3)])
@pytest.mark.parametrize("layout", ["full", "lengths", "jagged", "mask"])
def test_no_rows_at_all(batch: int, histories: int, layout: str, target: str) -> None:
    """B = 0, with and without histories that nobody reads."""
    from dien_kernels import augru

    x = torch.randn(histories, 4, 3, requires_grad=True)
    lengths = torch.full((histories,), 4)
    options: dict[str, torch.Tensor] = {"history": torch.zeros(batch, dtype=torch.int64)} if histories else {}
    attention = torch.rand(batch, 4)
    if layout == "lengths":
        options["lengths"] = lengths
    if layout == "mask":
        options["mask"] = torch.ones(histories, 4, dtype=torch.bool)
    if layout == "jagged":
        options["offsets"] = torch.arange(histories + 1) * 4
        attention = torch.rand(0)
    w_ih, w_hh = torch.randn(15, 3, requires_grad=True), torch.randn(15, 5, requires_grad=True)
    with running_on(target) as backend:
        data = x.flatten(0, 1) if layout == "jagged" else x
        y, h_n = augru(data, attention, w_ih, w_hh, backend=backend, **options)
        assert y.shape == ((0, 5) if layout == "jagged" else (batch, 4, 5))
        assert h_n.shape == (batch, 5)
        grads = torch.autograd.grad((y, h_n), (x, w_ih, w_hh), (torch.ones_like(y), torch.ones_like(h_n)))
    for grad in grads:
        assert not grad.any()


@pytest.mark.parametrize("target", target_params())
@pytest.mark.parametrize("upstream", ["y", "h_n", "expanded", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_gradient_on_some_outputs_and_on_any_strides(upstream: str, dtype: torch.dtype, target: str) -> None:
    case = Case("authors", dtype, 5, 4, 3, 6)
    inputs = make(case)
    leaves = tuple(inputs.leaves.values())
    with running_on(target, case) as backend:
        y, h_n = call(case, inputs, backend)
        everything = torch.autograd.grad((y, h_n), leaves, (inputs.dy, inputs.dh_n), retain_graph=True)
        if upstream in ("y", "h_n"):
            parts = []
            for out, grad in ((y, inputs.dy), (h_n, inputs.dh_n)):
                zeros = (torch.zeros_like(y), torch.zeros_like(h_n))
                both = (grad, zeros[1]) if out is y else (zeros[0], grad)
                alone = torch.autograd.grad(out, leaves, grad, retain_graph=True)
                explicit = torch.autograd.grad((y, h_n), leaves, both, retain_graph=True)
                parts.append((alone, explicit))
            for name, alone, explicit in zip(inputs.leaves, *parts[upstream == "h_n"], strict=True):
                assert torch.equal(alone, explicit), name
            return
        if upstream == "expanded":
            odd, dense = torch.ones((), dtype=dtype).expand_as(y), torch.ones_like(y)
        else:
            odd = torch.empty(y.shape[-1], y.shape[0], 2 * y.shape[1], dtype=dtype)[..., ::2].permute(1, 2, 0)
            odd, dense = odd.copy_(inputs.dy), inputs.dy
            assert not odd.is_contiguous()
        strange = torch.autograd.grad((y, h_n), leaves, (odd, inputs.dh_n), retain_graph=True)
        expected = torch.autograd.grad((y, h_n), leaves, (dense, inputs.dh_n), retain_graph=True)
    assert len(everything) == len(strange)
    for name, a, b in zip(inputs.leaves, strange, expected, strict=True):
        assert torch.equal(a, b), name


def test_oracle_positions_are_right() -> None:
    """The oracle's own bookkeeping: a full case equals its jagged, masked and time-major twins."""
    base = exact(Case("aigru", torch.float64, 4, 3, 2, 3, ragged="full")).tensors
    twin = exact(Case("aigru", torch.float64, 4, 3, 2, 3, ragged="full", strides="transposed")).tensors
    assert base["y"].shape == twin["y"].shape
    major = Case("aigru", torch.float64, 4, 3, 2, 3, ragged="full", time_major=True)
    assert exact(major).tensors["y"].shape == (3, 4, 3)


WILD = torch.tensor([-7, 3, 2**62, 0, 1, -1, 9])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["lengths", "time_major", "jagged"])
def test_values_that_nobody_checked_stay_inside_the_buffers(layout: str, reverse: bool, shared: bool) -> None:
    """On a GPU index values are not read on the host: whatever they are, no row may leave its tensor."""
    history = WILD.flip(0) if shared else None
    if layout == "jagged":
        x, attention, histories = torch.zeros(10, 2), torch.zeros(11), Histories(None, WILD, history)
    else:
        shape = (5, 7) if layout == "time_major" else (7, 5)
        x, attention, histories = torch.zeros(*shape, 2), None, Histories(WILD, None, history)
    rows = rows_of(x, histories, attention, time_major=layout == "time_major", reverse=reverse)
    x_rows = x.numel() // 2
    for start, stride, size in ((rows.x_start, rows.x_stride, x_rows), (rows.y_start, rows.y_stride, rows.y_rows)):
        for first, length in zip(start.tolist(), rows.length.tolist(), strict=True):
            assert 0 <= length <= rows.steps
            if length:
                assert 0 <= first < size
                assert 0 <= first + (length - 1) * stride < size


def test_starts_that_nobody_checked_stay_inside_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what the GPU backends' kernels are told: rows' starts in y are sums of unread lengths."""
    monkeypatch.setattr(gpu_problem, "check_index_values", lambda *_, **__: None)
    x, attention = torch.zeros(10, 2), torch.zeros(11)
    inputs = Tensors(x, attention, torch.zeros(9, 2), torch.zeros(9, 3), None, None, None)
    histories = Histories(None, WILD, WILD.flip(0))
    problem = gpu_problem.Problem(inputs, histories, options_of(Case("authors")))
    assert problem.y_start is not None
    assert ((problem.y_start >= 0) & (problem.y_start <= len(attention))).all()
