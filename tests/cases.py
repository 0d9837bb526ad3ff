"""The grid of recurrence cases: seeded inputs, the float64 result, and the result of plain torch.

A *leaf* is a floating tensor of a case of which the tests ask the gradient (autograd's leaf tensor). A *target* is a
backend together with what it is run on, such as an instruction set.

The exact result trusts nothing but the reference's loop over padded rows with lengths: every other layout
(masks, jagged, shared histories, reversed, time-major) is spelled out here as a list of positions per row,
once more and differently from the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from dien_kernels import agru, aigru, augru, gru
from dien_kernels.checks import compute_dtype
from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call, refusal
from dien_kernels.ops.recurrence import contract, forms, reference
from dien_kernels.ops.recurrence.forms import Options
from dien_kernels.ops.recurrence.op import recurrence
from tests.targets import missing
from tests.tolerances import assert_close_to, relative_error

KINDS = forms.KINDS
ISAS = ("portable", "avx2", "avx2x2", "avx512")
TARGETS = ("reference", "torch", *(f"cpu-{isa}" for isa in ISAS), "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
LEAVES = ("x", "attention", "w_ih", "w_hh", "b_ih", "b_hh", "h0")


@dataclass(frozen=True)
class Case:
    """One combination of the grid; ``U`` histories stand behind the ``B`` rows where ``history`` is set."""

    kind: str = "gru"
    dtype: torch.dtype = torch.float32
    B: int = 5
    T: int = 4
    I: int = 3  # noqa: E741
    H: int = 5
    ragged: str = "lengths"  # full, lengths, empty, mask (holes), left (padding), jagged
    history: bool = False
    reverse: bool = False
    time_major: bool = False
    reset: str = "after"
    update: str | None = None
    padded: str = "zero"
    bias: str = "both"  # both, none, ih, hh
    h0: bool = True
    strides: str = "contiguous"  # contiguous, sliced, offset, transposed, expanded
    scalars: str = "compute"  # dtype of attention, biases and h0: compute (float32 beside bfloat16) or storage
    seed: int = 0

    def __str__(self) -> str:
        words = [self.kind, SHORT[self.dtype], f"{self.B}x{self.T}x{self.I}x{self.H}", self.ragged]
        for field in fields(self)[7:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(field.name if value is True else f"{field.name}={value}")
        return "-".join(words)

    @property
    def histories(self) -> int:
        return max(1, (self.B + 1) // 2) if self.history else self.B

    @property
    def internal(self) -> bool:
        """Whether only the core (not the public ops) can be asked for this layout."""
        return self.reverse or self.time_major


@dataclass
class Inputs:
    """The tensors of a case: ``leaves`` want gradients, index tensors do not."""

    leaves: dict[str, Tensor]
    lengths: Tensor | None
    offsets: Tensor | None
    mask: Tensor | None
    history: Tensor | None
    steps: list[list[int]]  # the valid steps of every history, in time order
    rows: list[int]  # the history of every row
    dy: Tensor
    dh_n: Tensor

    def leaf(self, name: str) -> Tensor | None:
        return self.leaves.get(name)


def _steps(case: Case, g: torch.Generator) -> list[list[int]]:
    u, t = case.histories, case.T
    if case.ragged == "full":
        return [list(range(t))] * u
    if case.ragged == "empty":
        return [[] for _ in range(u)]
    if case.ragged == "mask":
        keep = torch.rand(u, t, generator=g) < 0.6
        if u > 1:
            keep[0] = False
            keep[1] = True
            keep[1, : t // 2] = False
        return [row.nonzero().flatten().tolist() for row in keep]
    lengths = [(0, 1, t)[i] if i < 3 else int(torch.randint(0, t + 1, (), generator=g)) for i in range(u)]
    if u == 1:
        lengths = [t]
    lengths = [lengths[i] for i in torch.randperm(u, generator=g).tolist()]
    return [list(range(t - n, t)) if case.ragged == "left" else list(range(n)) for n in lengths]


def _tensor(shape: tuple[int, ...], case: Case, dtype: torch.dtype, g: torch.Generator, scale: float) -> Tensor:
    """Random values on the strides the case asks for."""

    def values(*size: int) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * scale).to(dtype)

    if case.strides == "sliced":
        return values(*shape[:-1], 2 * shape[-1])[..., ::2]
    if case.strides == "offset":
        return (
            values(shape[0] + 2, *shape[1:-1], shape[-1] + 3)[1:-1, ..., 2:-1]
            if len(shape) > 1
            else values(shape[0] + 3)[2:-1]
        )
    if case.strides == "transposed" and len(shape) > 1:
        return values(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    if case.strides == "expanded":
        return values(1, *shape[1:]).expand(shape)
    return values(*shape)


def make(case: Case) -> Inputs:
    """The inputs of a case, always the same ones."""
    g = torch.Generator().manual_seed(1000 + case.seed)
    u, b, t, i, h = case.histories, case.B, case.T, case.I, case.H
    steps = _steps(case, g)
    rows = torch.randint(0, max(1, u - 1), (b,), generator=g).tolist() if case.history else list(range(b))
    counts = torch.tensor([len(s) for s in steps], dtype=torch.int64)
    jagged = case.ragged == "jagged"
    y_total = int(sum(len(steps[r]) for r in rows))
    small = torch.float32 if case.dtype == torch.bfloat16 and case.scalars == "compute" else case.dtype
    x_shape = (int(counts.sum()), i) if jagged else (t, u, i) if case.time_major else (u, t, i)
    leaves = {"x": _tensor(x_shape, case, case.dtype, g, 1.0)}
    if case.kind != "gru":  # mostly in [0, 1], and outside it too: the ops must not clamp
        leaves["attention"] = 0.5 + _tensor((y_total,) if jagged else (b, t), case, small, g, 0.35)
    leaves["w_ih"] = _tensor((3 * h, i), case, case.dtype, g, i**-0.5)
    leaves["w_hh"] = _tensor((3 * h, h), case, case.dtype, g, h**-0.5)
    for name in ("b_ih", "b_hh"):
        if case.bias in ("both", name[2:]):
            leaves[name] = _tensor((3 * h,), case, small, g, 0.3)
    if case.h0:
        leaves["h0"] = _tensor((b, h), case, small, g, 0.5)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    mask = None
    if case.ragged in ("mask", "left"):
        mask = torch.zeros(u, t, dtype=torch.bool)
        for row, valid in enumerate(steps):
            mask[row, valid] = True
    y_shape = (y_total, h) if jagged else (t, b, h) if case.time_major else (b, t, h)
    return Inputs(
        leaves,
        counts if case.ragged in ("lengths", "empty") else None,
        torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))) if jagged else None,
        mask,
        torch.tensor(rows, dtype=torch.int64) if case.history else None,
        steps,
        rows,
        torch.randn(y_shape, generator=g, dtype=torch.float64).to(case.dtype),
        torch.randn(b, h, generator=g, dtype=torch.float64).to(case.dtype),
    )


def call(case: Case, inputs: Inputs, backend: str = "auto", **overrides: Tensor) -> tuple[Tensor, Tensor]:
    """The op under test; ``overrides`` replace leaves."""
    leaf = {name: overrides.get(name, inputs.leaf(name)) for name in LEAVES}
    weights = [leaf[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    if case.internal:
        histories = Histories(inputs.lengths, inputs.offsets, inputs.history)
        assert inputs.mask is None
        small = compute_dtype(case.dtype)  # the core takes its arguments as the public ops hand them on
        leaf |= {n: t.to(small) for n, t in leaf.items() if t is not None and n not in ("x", "w_ih", "w_hh")}
        weights = [leaf[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        return recurrence(
            case.kind, contract.Inputs(leaf["x"], leaf["attention"], *weights, leaf["h0"]), histories, reset=case.reset,
            update=case.update, backend=backend, reverse=case.reverse, time_major=case.time_major,
        )  # fmt: skip
    options = {
        "lengths": inputs.lengths, "offsets": inputs.offsets, "mask": inputs.mask, "h0": leaf["h0"],
        "reset": case.reset, "update": case.update, "padded": case.padded, "backend": backend,
    }  # fmt: skip
    if case.kind == "gru":
        return gru(leaf["x"], *weights, **options)
    options["history"] = inputs.history
    if case.kind in ("agru", "aigru"):
        return {"agru": agru, "aigru": aigru}[case.kind](leaf["x"], leaf["attention"], *weights, **options)
    return augru(leaf["x"], leaf["attention"], *weights, form=case.kind, **options)


def options_of(case: Case) -> Options:
    """What a raw op is told of the case; gates are not kept."""
    form = forms.form_of(case.kind)
    return Options(
        alpha0=form.alpha0,
        alpha1=form.alpha1,
        beta0=form.beta0,
        beta1=form.beta1,
        scale_input=form.scale_input,
        keep_side=(case.update or form.update) == "keep",
        reset_before=case.reset == "before",
        reverse=case.reverse,
        time_major=case.time_major,
        kept_units=0,
    )


def oracle(case: Case, inputs: Inputs, leaf: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The case on padded rows with lengths, by the reference's loop; differentiable, in the leaves' dtype."""
    h = case.H
    x, a, h0 = leaf["x"], leaf.get("attention"), leaf.get("h0")
    x_flat = x.reshape(-1, case.I)
    starts = [0]
    for s in inputs.steps:
        starts.append(starts[-1] + len(s))
    lengths = torch.tensor([len(inputs.steps[r]) for r in inputs.rows], dtype=torch.int64)
    longest = max(1, int(lengths.max()))
    x_index, a_index, y_index = (torch.zeros(case.B, longest, dtype=torch.int64) for _ in range(3))
    y_start = 0
    for b, r in enumerate(inputs.rows):
        order = list(enumerate(inputs.steps[r]))
        for step, (i, t) in enumerate(reversed(order) if case.reverse else order):
            if case.ragged == "jagged":
                x_index[b, step], a_index[b, step], y_index[b, step] = starts[r] + i, y_start + i, y_start + i
            elif case.time_major:
                x_index[b, step], a_index[b, step], y_index[b, step] = (
                    t * case.histories + r,
                    b * case.T + t,
                    t * case.B + b,
                )
            else:
                x_index[b, step], a_index[b, step], y_index[b, step] = r * case.T + t, b * case.T + t, b * case.T + t
        y_start += len(order)
    valid = torch.arange(longest) < lengths.unsqueeze(1)
    options = options_of(case)._replace(reverse=False, time_major=False)
    weights = [leaf["w_ih"], leaf["w_hh"], *(leaf.get(name, x.new_zeros(3 * h)) for name in ("b_ih", "b_hh"))]
    # An empty jagged batch has no row to gather; one row of zeros stands in and is never valid.
    x_rows = x_flat if len(x_flat) else x.new_zeros(1, case.I)
    a_rows = None if a is None else a.reshape(-1) if a.numel() else a.new_zeros(1)
    y_rows, h_n = reference.recurrence(
        x_rows[x_index],
        x.new_zeros(case.B, longest) if a_rows is None else a_rows[a_index],
        *weights,
        x.new_zeros(case.B, h) if h0 is None else h0,
        Histories(lengths),
        options,
    )
    if case.padded == "carry":
        assert case.ragged != "jagged"
        first = y_rows.new_zeros(case.B, 1, h) if h0 is None else h0.unsqueeze(1)
        states = torch.cat((first, y_rows), 1)
        count = torch.zeros(case.B, case.T, dtype=torch.int64)
        for b, r in enumerate(inputs.rows):
            for t in range(case.T):
                count[b, t] = sum(s <= t for s in inputs.steps[r])
        return states[torch.arange(case.B).unsqueeze(1), count], h_n
    y = y_rows.new_zeros(inputs.dy.numel() // h, h).index_put((y_index[valid],), y_rows[valid])
    return y.view(inputs.dy.shape), h_n


@dataclass(frozen=True)
class Result:
    """y, h_n and the gradient of every leaf, by name."""

    tensors: dict[str, Tensor]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


def result_of(outputs: tuple[Tensor, Tensor], inputs: Inputs, leaves: dict[str, Tensor]) -> Result:
    """Differentiate both outputs with the case's upstream gradients."""
    y, h_n = outputs
    upstream = (inputs.dy.to(y.dtype), inputs.dh_n.to(h_n.dtype))
    grads = torch.autograd.grad((y, h_n), tuple(leaves.values()), upstream, materialize_grads=True)
    tensors = {"y": y.detach(), "h_n": h_n.detach()}
    return Result(tensors | {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)})


def actual(case: Case, backend: str) -> Result:
    inputs = make(case)
    return result_of(call(case, inputs, backend), inputs, inputs.leaves)


@lru_cache(maxsize=256)
def exact(case: Case) -> Result:
    """The same stored inputs in float64."""
    inputs = make(case)
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves.items()}
    return result_of(oracle(case, inputs, leaves), inputs, leaves)


@lru_cache(maxsize=256)
def plain(case: Case) -> Result:
    """Plain torch in the dtype under test: with bfloat16 operands of products, but a float32 state."""
    inputs = make(case)
    if case.dtype != torch.bfloat16:
        return result_of(oracle(case, inputs, inputs.leaves), inputs, inputs.leaves)
    # Without the cast cache each step's weight gradient is rounded once and then summed in float32.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        y, h_n = oracle(case, inputs, {name: leaf.float() for name, leaf in inputs.leaves.items()})
    return result_of((y.bfloat16(), h_n.bfloat16()), inputs, inputs.leaves)


def assert_matches(case: Case, result: Result) -> None:
    """Forward and every gradient within the tolerance rule."""
    expected, ordinary = exact(case), plain(case)
    assert list(result.tensors) == list(expected.tensors)
    for name, tensor in result:
        assert tensor.dtype == ordinary.tensors[name].dtype, f"{name}: {tensor.dtype}"
        assert_close_to(tensor, expected.tensors[name], ordinary.tensors[name], name)


def assert_matches_by_chance(case: Case, result: Result) -> None:
    """``assert_matches`` for cases that are drawn at random.

    Of a tensor with few numbers plain torch may be nearly exact by luck, and a search over many small cases finds
    such luck. Where a case breaks the rule, plain torch's error is therefore the largest of this case and of seven
    others that differ from it in their random numbers alone.
    """
    try:
        assert_matches(case, result)
    except AssertionError:
        expected, ordinary = exact(case), plain(case)
        others = [replace(case, seed=case.seed + 1001 + i) for i in range(7)]  # seeds that no search draws
        for name, tensor in result:
            errors = (relative_error(plain(other).tensors[name], exact(other).tensors[name]) for other in others)
            assert_close_to(tensor, expected.tensors[name], ordinary.tensors[name], name, plain_error=max(errors))


def target_params(targets: tuple[str, ...] = TARGETS) -> list:
    """Those of the targets that this process can run, as parameters.

    Targets of the compiled library carry the marker ``native``, Triton's interpreter carries ``interpreter``.
    """
    marks = {"cpu": (pytest.mark.native,), "triton": (pytest.mark.interpreter,)}
    return [pytest.param(t, marks=marks.get(t.partition("-")[0], ())) for t in targets if missing(t) is None]


@contextmanager
def running_on(target: str, case: Case | None = None) -> Iterator[str]:
    """Force the target's instruction set and give its backend's name; skip with the reason it cannot run."""
    backend, _, isa = target.partition("-")
    case = case or Case()
    reason = refusal(Call("recurrence", "cpu", case.dtype, case.I, case.H), backend)
    if reason is not None:
        pytest.skip(reason)
    with forced_isa(isa) if isa else nullcontext():
        yield backend


@contextmanager
def forced_isa(isa: str) -> Iterator[None]:
    """Run the CPU kernels on one instruction set, or skip with the library's reason."""
    before = torch.ops.dien_kernels._cpu_isa()
    try:
        torch.ops.dien_kernels._set_cpu_isa(isa)
    except (ValueError, RuntimeError) as error:
        pytest.skip(str(error).partition("\n")[0])
    try:
        yield
    finally:
        torch.ops.dien_kernels._set_cpu_isa(before)
