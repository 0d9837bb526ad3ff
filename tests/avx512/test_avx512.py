"""The AVX-512 kernels on a processor without AVX-512: the object code of ``_C.so`` in an emulated one.

``emulator.py`` runs functions of this very process on the processor of Bochs; ``kernels.py`` makes the library take its
AVX-512 kernels through it. Here are random calls of every op, forward and backward, by the rule of tests/tolerances.py.
Recurrence and auxiliary loss take the portable kernels for the "plain" result of that rule: in a random case of few
numbers plain torch is at times exact by luck, and the portable kernels add in the order of the others.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dien_kernels import use_backend, use_gates
from tests.attention_cases import Shape, shapes
from tests.attention_cases import compare as compare_attention
from tests.attention_cases import make as make_attention
from tests.avx512.kernels import EmulatedKernels
from tests.cases import Case, actual, assert_matches, exact, forced_isa
from tests.ops import test_auxiliary_loss as auxiliary
from tests.ops.test_recurrence_determinism import cases
from tests.targets import missing
from tests.tolerances import assert_close_to
from tests.unit_cases import raggedness

pytestmark = [pytest.mark.avx512, pytest.mark.native]
# bfloat16 is stored, and computed by the kernels of float32; here it has fixed sizes, in the last test.
COMPUTED = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(scope="module")
def kernels() -> EmulatedKernels:
    return EmulatedKernels()


@pytest.fixture(scope="module")
def searching(request: pytest.FixtureRequest) -> settings:
    """As many random cases as the command line asks for, always the same ones."""
    count = request.config.getoption("--avx512-cases")
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def test_recurrence(kernels: EmulatedKernels, searching: settings) -> None:
    @searching
    @given(cases(largest=72), st.booleans())
    def check(case: Case, keep: bool) -> None:
        with use_gates("keep" if keep else "recompute"):
            with kernels.in_force():
                emulated = actual(case, "cpu")
            with forced_isa("portable"):
                portable = actual(case, "cpu")
        for name, tensor in emulated:
            assert_close_to(tensor, exact(case).tensors[name], portable.tensors[name], name)

    check()


def test_attention_scores(kernels: EmulatedKernels, searching: settings) -> None:
    @searching
    @given(shapes(layers=3, widest=40, steps=40), COMPUTED)
    def check(shape: Shape, dtype: torch.dtype) -> None:
        with kernels.in_force(), use_backend("cpu"):
            compare_attention(*shape, dtype, "emulated")

    check()


def test_auxiliary_loss(kernels: EmulatedKernels, searching: settings) -> None:
    @searching
    @given(st.data(), COMPUTED)
    def check(data: st.DataObject, dtype: torch.dtype) -> None:
        batch, steps, hidden, size = (data.draw(st.integers(*bounds)) for bounds in ((0, 9), (0, 12), (1, 40), (1, 20)))
        layout = data.draw(st.sampled_from(["full", "lengths", "mask", "jagged"]))
        normalizers = [name for name in auxiliary.NORMALIZERS if (layout, name) != ("jagged", "padded")]
        case = auxiliary.make(
            data.draw(st.sampled_from(["inner", "mlp"])),
            batch,
            steps,
            hidden,
            size,
            several=data.draw(st.integers(1, 4)),
            sizes=tuple(data.draw(st.lists(st.integers(1, 40), max_size=3))),
            outputs=data.draw(st.integers(1, 2)),
            shift=data.draw(st.booleans()),
            normalizer=data.draw(st.sampled_from(normalizers)),
            seed=data.draw(st.integers(0, 999)),
        )
        valid = auxiliary.raggedness(layout, batch, steps)
        stored = auxiliary.cast(case, dtype)
        with use_backend("cpu"):
            with kernels.in_force():
                emulated = loss_and_gradients(stored, layout, valid)
            with forced_isa("portable"):
                portable = loss_and_gradients(stored, layout, valid)
                wide = loss_and_gradients(auxiliary.cast(stored, torch.float64), layout, valid)
        inputs = ("loss", "states", "positive", "negative")
        for i, (tensor, want, rough) in enumerate(zip(emulated, wide, portable, strict=True)):
            name = inputs[i] if i < len(inputs) else f"parameter {i - len(inputs)}"
            # A parameter's gradient is a mean over pairs, whose terms are about as large as 1 and have both signs.
            assert_close_to(tensor, want, rough, name, summed=0.0 if name in inputs else 1.0)

    check()


def loss_and_gradients(case: dict, layout: str, valid: Tensor) -> list[Tensor]:
    loss = auxiliary.run(case, layout, valid)
    return [loss.detach(), *torch.autograd.grad(loss, auxiliary.leaves(case))]


def test_every_function_of_the_table(kernels: EmulatedKernels) -> None:
    """Fixed cases of all ops in all dtypes reach every function of the AVX-512 table.

    Their bits are not those of the portable kernels, so it is not the portable kernels that ran. A processor that has
    AVX-512 gives the same bits as the emulated one.
    """
    differ = False
    for dtype, hidden in product((torch.float32, torch.float64, torch.bfloat16), (8, 16, 36)):
        for case in (
            Case("authors", dtype, B=17, T=6, I=20, H=hidden, history=True),
            Case("aigru", dtype, B=9, T=5, I=7, H=hidden, ragged="jagged", reset="before"),
        ):
            with kernels.in_force():
                emulated = actual(case, "cpu")
            assert_matches(case, emulated)
            with forced_isa("portable"):
                portable = actual(case, "cpu")
            differ |= any(not torch.equal(tensor, portable.tensors[name]) for name, tensor in emulated)
            if missing("cpu-avx512") is None:
                with forced_isa("avx512"):
                    real = actual(case, "cpu")
                for name, tensor in emulated:
                    assert torch.equal(tensor, real.tensors[name]), f"{name} of {case}"
        with kernels.in_force(), use_backend("cpu"):
            for kind in ("bilinear", "din"):
                scores = make_attention(kind, batch=12, steps=20, hidden=hidden, sizes=(16, 8), scale=hidden**-0.5)
                compare_attention(scores, "lengths", raggedness("lengths", 12, 20), None, dtype, f"{kind} {hidden}")
            for kind in ("inner", "mlp"):
                loss = auxiliary.make(kind, batch=6, steps=6, hidden=hidden, size=8, several=2, sizes=(hidden, 16))
                auxiliary.compare(loss, "lengths", auxiliary.raggedness("lengths", 6, 6), dtype, f"{kind} {hidden}")
    assert differ, "the results have the bits of the portable kernels"
    # Attention and auxiliary loss have no use for half the lanes: two functions of each are in the table for nothing.
    assert len(kernels.not_called) <= 4
