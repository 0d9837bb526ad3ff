"""The Triton kernels without a GPU: in Triton's interpreter, in ptxsim, and as compiled code.

The interpreter must be switched on before Triton is imported, so the grid runs in a process of its own.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dien_kernels.ops._dispatch import Call
from dien_kernels.ops.recurrence import op, triton_launch
from dien_kernels.ops.recurrence.reference import form_of
from tests.cases import KINDS, Case, actual, assert_matches, call, make, result_of, running_on
from tests.triton_launches import Launched, compile_for, launching

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that has TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels cannot be compiled")


def facts(**other: object) -> Call:
    return Call("recurrence", "cuda", torch.float32, 64, 64)._replace(**other)  # type: ignore[arg-type]


@compiled
def test_refuses() -> None:
    pytest.importorskip("triton")
    assert triton_launch.refuses(facts()) is None
    assert triton_launch.refuses(facts(hidden_size=256, input_size=1000, dtype=torch.float16)) is None
    assert "hidden=257 is above the 256" in str(triton_launch.refuses(facts(hidden_size=257)))
    assert "float64" in str(triton_launch.refuses(facts(dtype=torch.float64)))
    assert "the tensors are on cpu" in str(triton_launch.refuses(facts(device="cpu")))


@compiled
def test_refuses_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_ABSENT", True)
    assert "triton is not installed" in str(triton_launch.refuses(facts()))


@pytest.mark.parametrize("shared_memory", [0, 101_376, 166_912, 232_448])
@pytest.mark.parametrize("hidden", [1, 16, 17, 36, 64, 65, 128, 129, 256])
def test_every_size_has_a_configuration(hidden: int, shared_memory: int) -> None:
    for itemsize in (2, 4):
        for backward in (False, True):
            launch = triton_launch.configuration(hidden, itemsize, backward, shared_memory)
            assert triton_launch.padded_size(hidden) >= max(16, hidden, launch.chunk)


# The grid's layouts and forms, less what says nothing new about these kernels and what they refuse.
GRID = (
    "triton and not f64 and not dtype1 and not test_interpreter"
    " and not every_size and not inference and not kept and not strides_and_without and not sweep"
    " and not (layouts and test_matches and (agru or paper or gru-bf16))"
)


@compiled
def test_grid_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    files = [f"tests/ops/{name}" for name in ("test_recurrence.py", "test_recurrence_layouts.py", Path(__file__).name)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", GRID, *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.findall(r"(\d+) passed", done.stdout)  # the table of cells comes before the last line
    assert int(passed[-1]) > 200, done.stdout[-2000:]


# What the grid does not hold: float16, and the sizes around those at which the kernels change.
INTERPRETED_CASES = [
    *(Case(kind, torch.float16, reset=reset) for kind, reset in zip(KINDS, ("after", "before") * 3, strict=True)),
    Case("authors", torch.float16, 6, 4, 3, 9, "jagged", history=True, scalars="storage"),
    Case("gru", B=1, T=1, I=1, H=1),
    Case("paper", B=17, T=3, I=3, H=3, ragged="jagged"),
    Case("prediction_flow", B=33, T=2, I=5, H=17, ragged="mask"),
    Case("authors", torch.bfloat16, B=3, T=3, I=36, H=36),
    Case("aigru", B=2, T=3, I=40, H=64, reset="before"),
    Case("aigru", B=2, T=3, I=100, H=100, reset="before"),
    Case("aigru", torch.bfloat16, B=18, T=3, I=8, H=108, ragged="jagged"),
    Case("authors", B=2, T=3, I=300, H=108, history=True, reverse=True),
    Case("agru", torch.bfloat16, B=2, T=2, I=3, H=130, reset="before", h0=False),
    Case("gru", B=2, T=2, I=3, H=256, bias="none", time_major=True),
    Case("aigru", B=4, H=9, bias="hh", strides="sliced", scalars="storage"),
    Case("aigru", torch.bfloat16, B=4, H=9, bias="ih", h0=False, strides="transposed"),
    Case("paper", B=4, H=9, bias="none", strides="expanded", reset="before"),
    Case("authors", B=4, H=9, strides="offset", reset="before"),
]


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
@pytest.mark.parametrize("case", INTERPRETED_CASES, ids=str)
def test_matches_reference(case: Case, target: str, record_cell: Callable[..., None]) -> None:
    record_cell("recurrence", target, case.kind, case.dtype)
    with running_on(target, case) as backend:
        assert_matches(case, actual(case, backend))


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
def test_repeats_itself(target: str) -> None:
    case = Case("aigru", torch.float32, 40, 4, 5, 9, history=True)
    first, second = actual(case, target), actual(case, target)
    for name, tensor in first:
        assert torch.equal(tensor, second.tensors[name]), name


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
@pytest.mark.parametrize("ragged", ["full", "lengths", "jagged"])
def test_nan_in_a_history_that_nobody_reads_changes_nothing(ragged: str, target: str) -> None:
    case = Case("authors", B=12, T=4, H=5, ragged=ragged, history=True, seed=1)
    inputs = make(case)
    unread = next(u for u in range(case.histories) if u not in inputs.rows and inputs.steps[u])
    poisoned = inputs.leaves["x"].detach().clone()
    if inputs.offsets is None:
        poisoned[unread] = float("nan")
    else:
        poisoned[inputs.offsets[unread] : inputs.offsets[unread + 1]] = float("nan")
    expected = actual(case, target)
    leaves = inputs.leaves | {"x": poisoned.requires_grad_()}
    for name, tensor in result_of(call(case, inputs, target, **leaves), inputs, leaves):
        assert torch.equal(tensor, expected.tensors[name]), name


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
@pytest.mark.parametrize("ragged", ["full", "lengths", "jagged"])
@pytest.mark.parametrize("kind", ["gru", "aigru"])
def test_raw_ops_pass_opcheck(kind: str, ragged: str, target: str) -> None:
    """What they return has the shapes and dtypes that their fakes promise, with either upstream gradient alone."""
    utils = ("test_schema", "test_faketensor")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(Case(kind, dtype, ragged=ragged, history=kind != "gru", bias="ih", h0=False))
        weights = (inputs.leaf("w_ih"), inputs.leaf("w_hh"), inputs.leaf("b_ih"), None, None)
        tensors = [inputs.leaf("x"), inputs.leaf("attention"), *weights, inputs.lengths, inputs.offsets, inputs.history]
        tensors = [None if t is None else t.detach() for t in tensors]
        options = (*form_of(kind)[:5], True, False, False, False, True)
        torch.library.opcheck(op._FWD[target], (*tensors, *options), test_utils=utils)
        y, h_n, order = op._FWD[target](*tensors, *options)
        for dy, dh_n, need_dx in ((inputs.dy, None, True), (None, inputs.dh_n, False)):
            arguments = (dy, dh_n, *tensors, y, order, need_dx, *options)
            torch.library.opcheck(op._BWD[target], arguments, test_utils=utils)


@pytest.fixture(scope="module")
def ptxsim() -> ModuleType:
    """The PTX simulator beside the repository, or where the environment variable PTXSIM says."""
    pytest.importorskip("triton")
    folder = Path(os.environ.get("PTXSIM", ROOT.parent / "shared" / "ptxsim"))
    if not (folder / "__init__.py").exists():
        pytest.skip("ptxsim is not there: set PTXSIM to its folder")
    sys.path.insert(0, str(folder.parent))
    try:
        return __import__(folder.name)
    finally:
        sys.path.remove(str(folder.parent))


@compiled
@pytest.mark.parametrize(
    "case",
    [
        Case("authors", torch.float32, B=17, T=6, I=8, H=16, history=True, ragged="jagged"),
        Case("aigru", torch.bfloat16, B=18, T=5, I=8, H=36, reset="before"),
        Case("paper", torch.bfloat16, B=5, T=3, I=8, H=100),
    ],
    ids=str,
)
def test_simulated_code_matches_reference(case: Case, ptxsim: ModuleType) -> None:
    """What Triton compiles for sm_80, with races on shared memory looked for, TF32x3 products and chunks included."""

    def simulate(launched: Launched) -> None:
        options = dict(launched.options)
        kernel = ptxsim.load_triton(
            launched.kernel,
            signature=launched.signature,
            constexprs=launched.constants,
            arch="sm_80",
            num_warps=options.pop("num_warps"),
            options=options,
            race=True,
        )
        kernel(launched.grid, {name: launched.values[name] for name in launched.signature})

    with launching(simulate, 80):
        assert_matches(case, actual(case, "triton"))


def stored(dtype: torch.dtype, architecture: int, hidden: int) -> dict[str, float]:
    """Instructions of a step by kernel, as ``make gpu-report`` has stored them for this version of Triton."""
    import triton

    with (ROOT / "benchmarks" / "results" / "gpu_triton.csv").open(newline="") as file:
        return {
            row["kernel"]: float(row["instructions"])
            for row in csv.DictReader(file)
            if (row["triton"], row["arch"], row["kind"], row["reset"], row["dtype"], row["hidden"])
            == (triton.__version__, f"sm_{architecture}", "authors", "after", str(dtype)[6:], str(hidden))
        }


@compiled
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_code_does_not_spill_or_grow(dtype: torch.dtype, architecture: int) -> None:
    pytest.importorskip("triton")
    codes = {}

    def compile_it(launched: Launched) -> None:
        codes[launched.kernel.__name__] = compile_for(launched, architecture)

    with launching(compile_it, architecture):
        actual(Case("authors", dtype, 16, 2, 64, 64, ragged="lengths"), "triton")
    assert set(codes) == {"recurrence_forward", "recurrence_backward"}
    for name, code in codes.items():
        assert code.spills == 0, f"{name}: {code}"
        before = stored(dtype, architecture, 64).get(name, code.instructions)
        assert code.instructions <= 1.02 * before, f"{name}: {code}, stored {before}"
    if dtype == torch.bfloat16:
        forward = codes["recurrence_forward"]
        assert forward.instructions <= 165, forward
        assert forward.barriers <= 4, forward
