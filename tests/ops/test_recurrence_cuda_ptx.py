"""The CUDA kernels without a GPU: what nvcc compiles for sm_80, run in ptxsim against the float64 reference.

Values, races on shared memory, accesses past a tensor's end, reads of what nobody wrote; in three orders of threads and
blocks. A few instances here, every one of them in ``make test-ptx``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.memory_cuda import counters
from dien_kernels import ops
from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops.recurrence import cuda_launch
from dien_kernels.ops.recurrence.contract import Inputs
from dien_kernels.ops.recurrence.cuda_launch import Tiles
from dien_kernels.ops.recurrence.gpu_problem import Problem
from tests.cases import SHORT, Case, Result, actual, assert_matches, call, exact, make, options_of, plain, result_of
from tests.cuda_launches import SEEDS, Simulator, missing, module_of, simulating
from tests.tolerances import assert_close_to

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The hidden size that each padded size is tried at: odd ones, ones that are padded, and whole ones.
HIDDEN = {8: 7, 16: 16, 32: 30, 40: 36, 64: 64, 112: 100, 128: 128}


def cases(dtype: torch.dtype, hidden: int) -> list[Case]:
    """Both resets with and without a scaled input, all forms and layouts, and rows of length 0.

    Enough rows that plain torch is not exact by luck: a sum over units cancels most of what it adds up.
    """
    base = Case("authors", dtype, B=21, T=5, I=8, H=hidden)
    return [
        base,
        replace(base, kind="aigru", B=19, ragged="jagged", history=True, reset="before"),
        replace(base, kind="aigru", time_major=True, reverse=True),
        replace(base, kind="paper", B=17, reset="before", reverse=True, bias="ih"),
        replace(base, kind="gru", B=33, T=3, ragged="full", bias="none", h0=False),
        replace(base, kind="agru", ragged="left", history=True, bias="hh"),
        replace(base, kind="prediction_flow", B=9, ragged="empty"),
        replace(base, kind="gru", B=1, T=1, ragged="full", reset="before", update="candidate"),
    ]


class Mode(NamedTuple):
    """How a forward runs: on tiles of 16 rows two of the blocks may take the longest 8 rows each."""

    tiles: Tiles
    fused: bool = False  # W_ih x in the loop


MODES = {
    "sixteens": Mode(Tiles(16, 0)),
    "mixed": Mode(Tiles(16, 2)),
    "eights": Mode(Tiles(8, 0)),
    "fused": Mode(Tiles(16, 0), fused=True),
    "fused_mixed": Mode(Tiles(16, 2), fused=True),
}


def modes_of(dtype: torch.dtype, padded: int) -> list[str]:
    if dtype == torch.float32:
        return ["sixteens", "mixed"]
    return ["sixteens", "eights"] if padded > cuda_launch.LARGE else list(MODES)


def fused_cases(dtype: torch.dtype, hidden: int) -> list[Case]:
    """Those of the above whose W_ih x the loop makes, and two with as many inputs as it takes."""
    base = Case("agru", dtype, B=21, T=6, I=hidden // 4 * 4, H=hidden)
    return [
        replace(base, time_major=True, reverse=True),
        replace(base, kind="paper", B=35, ragged="jagged", reverse=True),
        *(c for c in cases(dtype, hidden) if c.kind != "aigru" and c.reset == "after" and not c.history),
    ]


def simulated(case: Case, simulator: Simulator, backward: bool = True) -> Result:
    """Outputs and, with the backward, all gradients."""
    with simulating(simulator):
        if backward:
            return actual(case, "cuda")
        with torch.no_grad():
            y, h_n = call(case, make(case), "cuda")
        return Result({"y": y, "h_n": h_n})


def check(case: Case, simulator: Simulator, backward: bool = True) -> Result:
    result = simulated(case, simulator, backward)
    if backward:
        assert_matches(case, result)
    else:
        expected, ordinary = exact(case), plain(case)
        for name, tensor in result:
            assert_close_to(tensor, expected.tensors[name], ordinary.tensors[name], name)
    return result


def check_instance(dtype: torch.dtype, padded: int, name: str, hidden: int | None = None) -> None:
    """Every case in every order of threads; the bits do not depend on the order.

    The backward reads what any forward has written in the same place: it runs with the simplest of them.
    """
    mode = MODES[name]
    for case in (fused_cases if mode.fused else cases)(dtype, hidden or HIDDEN[padded]):
        results = []
        for seed in SEEDS:
            simulator = Simulator(seed, tiles=mode.tiles, fused=mode.fused)
            results.append(check(case, simulator, backward=name == "sixteens"))
            # An odd hidden size gets one more unit; a batch without a step launches nothing.
            assert all(size in (padded, 0) for _, size, _ in simulator.launches)
            if case.ragged != "empty":
                assert simulator.launches[0] == ("forward", padded, mode.tiles.rows)
                assert simulator.fusions == mode.fused
        for other in results[1:]:
            for what, tensor in results[0]:
                assert torch.equal(tensor, other.tensors[what]), f"{case}: {what}"


@pytest.fixture
def simulator() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize(
    ("dtype", "padded", "mode"),
    [(torch.bfloat16, 40, "sixteens"), (torch.bfloat16, 40, "mixed"), (torch.bfloat16, 40, "eights"),
     (torch.bfloat16, 40, "fused_mixed"), (torch.float32, 8, "sixteens"), (torch.float32, 8, "mixed")],
)  # fmt: skip
def test_small_instances(dtype: torch.dtype, padded: int, mode: str, record_combination: Callable[..., None]) -> None:
    record_combination("recurrence", "cuda-ptxsim", "all", dtype)
    check_instance(dtype, padded, mode)


def instances() -> list[tuple[torch.dtype, int, str]]:
    return [
        (dtype, padded, mode) for dtype in DTYPES for padded in cuda_launch.SIZES for mode in modes_of(dtype, padded)
    ]


@pytest.mark.ptx
@pytest.mark.parametrize(("dtype", "padded", "mode"), instances(), ids=lambda v: SHORT.get(v, str(v)))
def test_every_instance(dtype: torch.dtype, padded: int, mode: str, record_combination: Callable[..., None]) -> None:
    record_combination("recurrence", "cuda-ptxsim", "all", dtype)
    assert missing() is None, missing()
    check_instance(dtype, padded, mode)


@pytest.mark.ptx
@pytest.mark.parametrize("hidden", [size for size, other in HIDDEN.items() if size != other and size <= 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_sizes_without_padding(dtype: torch.dtype, hidden: int, record_combination: Callable[..., None]) -> None:
    record_combination("recurrence", "cuda-ptxsim", "all", dtype)
    assert missing() is None, missing()
    check_instance(dtype, hidden, "sixteens", hidden)


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("kind", ["authors", "agru"])
def test_nan_where_no_step_is(kind: str) -> None:
    """NaN in padding, in a history that nobody reads, and in AGRU's unused weights changes nothing."""
    case = Case(kind, torch.bfloat16, B=12, T=4, I=8, H=36, history=True, seed=1)
    inputs = make(case)
    x, w_ih, w_hh = (inputs.leaves[name].detach().clone() for name in ("x", "w_ih", "w_hh"))
    for u, steps in enumerate(inputs.steps):
        x[u, len(steps) if u in inputs.rows else 0 :] = float("nan")
    if kind == "agru":
        w_ih[case.H : 2 * case.H] = float("nan")
        w_hh[case.H : 2 * case.H] = float("nan")
    expected = simulated(case, Simulator())
    poisoned: dict[str, Tensor] = {"x": x} if kind != "agru" else {"x": x, "w_ih": w_ih, "w_hh": w_hh}
    leaves = inputs.leaves | {name: t.requires_grad_() for name, t in poisoned.items()}
    with simulating(Simulator()):
        result = result_of(call(case, inputs, "cuda", **leaves), inputs, leaves)
    for name, tensor in result:
        if kind == "agru" and name == "d_x":
            continue  # the product of zero gate gradients and NaN weights
        assert torch.equal(tensor, expected.tensors[name]), name


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("reset", ["after", "before"])
def test_nan_in_a_state_that_no_step_reads(reset: str) -> None:
    """h0 of a row without steps goes to its h_n, and nowhere else."""
    case = Case("paper", torch.bfloat16, B=12, T=4, I=8, H=36, ragged="lengths", reset=reset, h0=True)
    inputs = make(case)
    idle = torch.tensor([not len(inputs.steps[row]) for row in inputs.rows])
    assert idle.any()
    assert not idle.all()
    expected = simulated(case, Simulator())
    h0 = torch.where(idle.unsqueeze(1), torch.nan, inputs.leaves["h0"].detach()).requires_grad_()
    leaves = inputs.leaves | {"h0": h0}
    with simulating(Simulator()):
        result = result_of(call(case, inputs, "cuda", **leaves), inputs, leaves)
    assert result.tensors["h_n"][idle].isnan().all()
    for name, tensor in result:
        kept = ~idle if name == "h_n" else slice(None)
        assert torch.equal(tensor[kept], expected.tensors[name][kept]), name


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("kernel", "padded"),
    [
        *product(("forward16", "forward16, fused", "forward8"), (40, 64)),
        *product(("backward16",), (40, 64, 112, 128)),
    ],
)
def test_no_bank_conflicts_in_16_bits(kernel: str, padded: int) -> None:
    """Float32's, and all at 64, are in ``benchmarks/results/gpu_cuda_memory.csv``.

    But for copies of x, whose rows are spaced for what reads them: at 40 they may take twice the passes.
    """
    assert missing() is None, missing()
    case = Case("gru", torch.bfloat16, B=16, T=6, I=padded, H=padded, ragged="full")
    counts = counters(kernel, case)
    assert counts["shared", "read", "taken"] == counts["shared", "read", "least"] > 0
    most = 2 if (kernel, padded) == ("forward16, fused", 40) else 1
    assert 0 < counts["shared", "write", "taken"] <= most * counts["shared", "write", "least"]


def activations_of(lengths: list[int], eights: int) -> float:
    """Of a thread, in all tiles of a bfloat16 forward: exponentials that were executed, by 32 threads at P = 8."""
    module = module_of("forward_bf16", 8, False, prof=True)

    def executed() -> int:
        return sum(c.count for c in module.counts() if "ex2" in c.instruction)

    x, w_ih, w_hh = torch.zeros(len(lengths), 12, 4), torch.zeros(24, 4), torch.zeros(24, 8)
    before = executed()
    with simulating(Simulator(tiles=Tiles(16, eights), race=False, prof=True)), torch.no_grad():
        ops.gru(
            x.bfloat16(), w_ih.bfloat16(), w_hh.bfloat16(), lengths=torch.tensor(lengths), backend="cuda"
        )  # fmt: skip
    return (executed() - before) / 32


@pytest.mark.ptx
def test_the_device_decides_which_rows_run_by_eights() -> None:
    """A step of 16 rows has 12 exponentials a thread, one of 8 rows has 6; a tile ends with its longest row."""
    assert missing() is None, missing()
    one_long = [1] * 20 + [12] + [1] * 27
    assert activations_of(one_long, eights=0) == 12 * (12 + 1 + 1)
    # The sixteen longest rows, which are one of 12 steps and fifteen of 1, in two tiles of eight.
    assert activations_of(one_long, eights=2) == 6 * (12 + 1) + 12 * (1 + 1)
    two_thirds = [12] + [8] * 15 + [8] * 32
    assert activations_of(two_thirds, eights=2) == 6 * (12 + 8) + 12 * (8 + 8)
    many_long = [12] * 17 + [9] * 31  # more long rows than two tiles of eight hold: by sixteens
    assert activations_of(many_long, eights=2) == 12 * (12 + 12 + 9)
    assert activations_of(many_long, eights=6) == 6 * (12 + 12 + 12 + 9 + 9 + 9)  # room for every row by eights
    assert activations_of([0] * 40, eights=2) == 0


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("tiles", [Tiles(16, 0), Tiles(16, 2), Tiles(8, 0)])
def test_last_states_alone(tiles: Tiles) -> None:
    """Without a place for the outputs the last states are the same bits, rows of no step included."""
    case = Case("authors", torch.bfloat16, B=21, T=5, I=8, H=36)
    inputs = make(case)
    given = (
        inputs.leaves["x"].detach(),
        torch.rand(case.B, case.T),
        *(inputs.leaves[name].detach() for name in ("w_ih", "w_hh")),
    )
    lengths = torch.tensor([n % (case.T + 1) for n in range(case.B)])
    given_inputs = Inputs(*given, None, None, torch.rand(case.B, case.H))
    problem = Problem(given_inputs, Histories(lengths), options_of(case))
    y = problem.new(*problem.y_shape)
    for fused in (True, False)[tiles.rows == 8 :]:
        with simulating(Simulator(tiles=tiles, fused=fused)):
            with_outputs = cuda_launch.run_forward(problem, y)
            alone = cuda_launch.run_forward(problem, None)
        assert torch.equal(alone, with_outputs)
        row = int(lengths.argmax())
        assert torch.equal(alone[row], y[row, int(lengths[row]) - 1])


def test_table_of_instances() -> None:
    """The host's sizes are the table's, and the table is no longer than it may be."""
    text = (ROOT / "csrc" / "cuda" / "instances.h").read_text().partition("#else")[2]
    (line,) = re.findall(r"#define DIEN_SIZES\(X\) (.*)", text)
    sizes = tuple(int(n) for n in re.findall(r"X\((\d+)\)", line))
    assert sizes == cuda_launch.SIZES
    kernels = (4 + 1) + 3  # forwards in 16 bits and in float32, and a backward for each dtype
    assert kernels * len(sizes) + len(DTYPES) <= 60
    assert set(sizes) == set(HIDDEN)


def test_the_numbers_of_a_launch_are_those_that_the_library_reads() -> None:
    text = (ROOT / "csrc" / "torch" / "recurrence_cuda.cpp").read_text()
    struct = text.partition("struct Numbers {")[2].partition("explicit")[0]
    declared = re.findall(r"int64_t ([\w, ]+);", struct)
    assert tuple(", ".join(declared).split(", ")) == cuda_launch.Numbers._fields


def a_call(**other: object) -> Call:
    return Call("recurrence", "cuda", torch.float32, 64, 64)._replace(**other)  # type: ignore[arg-type]


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dien_kernels._native.available", lambda: True)
    monkeypatch.setattr("dien_kernels._native.build_info", lambda: {"cuda_archs": ["80"]})
    refuses = cuda_launch.refuses
    assert refuses(a_call()) is None
    assert refuses(a_call(dtype=torch.bfloat16, hidden_size=128)) is None
    assert refuses(a_call(dtype=torch.float16, hidden_size=64, backward=True)) is None
    assert "float64" in str(refuses(a_call(dtype=torch.float64)))
    assert "the tensors are on cpu" in str(refuses(a_call(device="cpu")))
    assert refuses(a_call(hidden_size=128, backward=True)) is None
    assert "hidden=129 is above the 128 that the kernels" in str(refuses(a_call(hidden_size=129)))


def test_refuses_devices_that_are_too_old_or_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dien_kernels._native.available", lambda: True)
    monkeypatch.setattr("dien_kernels._native.build_info", lambda: {"cuda_archs": ["90", "80", "100"]})
    device = cuda_launch.Device("Some GPU", 75, 65_536)
    monkeypatch.setattr(cuda_launch, "visible_devices", lambda: (device,))
    assert cuda_launch.refuses(a_call()) == "Some GPU is sm_75, and the native library was built for sm_80 and newer"
    device = cuda_launch.Device("Other GPU", 86, 101_376)
    for dtype, hidden in ((torch.bfloat16, 112), (torch.float32, 128), (torch.float32, 64)):
        assert cuda_launch.refuses(a_call(dtype=dtype, hidden_size=hidden, backward=True)) is None
    assert cuda_launch.refuses(a_call(dtype=torch.float16, hidden_size=128)) is None
    reason = str(cuda_launch.refuses(a_call(dtype=torch.float16, hidden_size=113, backward=True)))
    assert (
        reason == "the backward of hidden=113 takes 129344 bytes of shared memory for a block, and Other GPU has 101376"
    )


@pytest.mark.slow
def test_devices_are_looked_at_in_a_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dien_kernels._native.available", lambda: True)
    monkeypatch.setattr("dien_kernels._native.build_info", lambda: {"cuda_archs": ["80"]})
    looked = []
    monkeypatch.setattr(cuda_launch, "_look_at_devices", lambda: looked.append(1) or ())

    @torch.compile(backend="eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return x + (cuda_launch.visible_devices() == ())

    assert run(torch.zeros(1)).item() == 1
    assert run(torch.ones(1)).item() == 2
    assert looked == [1]


def test_refuses_without_cuda_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dien_kernels._native.available", lambda: True)
    monkeypatch.setattr("dien_kernels._native.build_info", dict)
    assert "built without CUDA" in str(cuda_launch.refuses(a_call()))


def test_refuses_a_driver_older_than_the_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dien_kernels._native.available", lambda: True)
    monkeypatch.setattr("dien_kernels._native.build_info", lambda: {"cuda_archs": ["80"]})
    versions = {"_cuda_driver_version": 12080, "_cuda_runtime_version": 13000}
    monkeypatch.setattr(cuda_launch, "raw", lambda name: lambda: versions[name])
    monkeypatch.setattr(cuda_launch, "_older_driver", None)
    cuda_launch.look_at_driver()
    reason = str(cuda_launch.refuses(a_call()))
    assert "13.0" in reason
    assert "12.8" in reason


def test_every_size_has_an_instance() -> None:
    for hidden in range(1, cuda_launch.SIZES[-1] + 1):
        padded = cuda_launch.padded_size(hidden + hidden % 2)
        assert hidden <= padded
        assert padded in cuda_launch.SIZES


def test_tiles() -> None:
    def tiles(batch: int, narrow: bool = True, size: int = 64, fused: bool = False, ragged: bool = True) -> Tiles:
        return cuda_launch.tiles_of(batch, narrow, size, fused, ragged, multiprocessors=132)

    assert tiles(1056) == (8, 0)
    assert tiles(1056, fused=True, ragged=False) == (16, 132)
    assert tiles(8, narrow=False, ragged=False) == (16, 132)
    assert tiles(1057) == (16, 132)
    assert tiles(1057, fused=True, ragged=False) == (16, 0)
    assert tiles(1057, size=128) == (16, 0)
    assert tiles(1057, size=128, narrow=False) == (16, 132)
