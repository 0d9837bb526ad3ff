"""Timings on a GPU, into results/gpu.csv: ``make bench-gpu``. Under eight minutes.

    python -m benchmarks.gpu.timings                      # everything
    python -m benchmarks.gpu.timings --hidden 64 --ops gru --dtypes bfloat16 --out try.csv

Each provider's result is compared with the float32 (or wider) reference on the device first; a wrong one gets no
number. Times are medians of CUDA events around single calls, after a warm-up, the providers taking turns. Forwards run
without autograd. The device, its clocks' limits, driver and versions stand in each row.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.dien_model import PLAIN_TORCH
from benchmarks.environment import environment
from benchmarks.inputs import SEED, Inputs, Program, draw, draw_lengths
from benchmarks.measurement import failure, mismatch
from benchmarks.peers import eager_loop, torch_gru_packed, torch_gru_padded
from benchmarks.provider_dien_kernels import build as build_own
from benchmarks.registry import DIN_WIDTHS, Case
from benchmarks.store import FOLDER
from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call, refusal
from dien_kernels.ops.recurrence.order import counted_order

RESULTS = FOLDER / "gpu.csv"
# (B, T, I, H): those of the cost model in docs/gpu.md.
SIZES = ((1024, 100, 36, 36), (4096, 100, 64, 64), (1024, 200, 128, 128), (256, 200, 256, 256))
DTYPES = ("bfloat16", "float32")
ORDERED = (4096, 16_384)  # rows whose order is counted, beside a sort of them
BUDGET_S = 1.5  # for each case, when every provider has been compiled
LIMIT_S = 400.0  # then the rest is left out, and said so
# Larger than in benchmarks/measurement.py: cuDNN computes float32 products in TF32 unless it is told otherwise.
WRONG = {"float32": 5e-3, "bfloat16": 1e-1}
COLUMNS = (
    *("op", "mode", "B", "T", "I", "H", "length_distribution", "dtype", "provider"),
    *("p20_us", "p50_us", "p80_us", "calls", "ratio"),
    *("note", "device", "capability", "shared_memory", "processors", "driver", "torch", "cuda", "cudnn", "triton"),
    *("git_sha", "date"),
)


OPS = ("gru", "augru", "attention_bilinear", "attention_din")


def cases(hidden: Collection[int], ops: Collection[str] = OPS, dtypes: Collection[str] = DTYPES) -> Iterator[Case]:
    modes = ("fwd", "fwd+bwd")
    every = [
        *product(SIZES, DTYPES, ("full", "ragged"), OPS[:2], modes),
        *product(SIZES[:2], DTYPES, ("ragged",), OPS[2:], modes),
    ]
    for size, dtype, lengths, op, mode in every:
        if size[3] in hidden and op in ops and dtype in dtypes:
            yield Case("gpu", op, mode, *size, lengths, dtype, ())


def sent(inputs: Inputs, device: str) -> Inputs:
    leaves = {name: leaf.detach().to(device).requires_grad_() for name, leaf in inputs.leaves.items()}
    lengths, valid = (None if t is None else t.to(device) for t in (inputs.lengths, inputs.valid))
    return inputs._replace(leaves=leaves, lengths=lengths, dresult=inputs.dresult.to(device), valid=valid)


def providers(case: Case, inputs: Inputs) -> Iterator[tuple[str, Callable[[], Program]]]:
    device, dtype = inputs.dresult.device.type, getattr(torch, case.dtype)
    if case.op in ("gru", "augru"):
        call = Call("recurrence", device, dtype, case.inputs, case.hidden, "after", (), case.trains)
    else:
        kind = case.op.removeprefix("attention_")
        widths = DIN_WIDTHS if kind == "din" else ()
        call = Call("attention_scores", device, dtype, case.inputs, case.hidden, kind, widths, case.trains)
    for backend in ("triton", "cuda"):
        if refusal(call, backend) is None:
            yield backend, lambda backend=backend: build_own(case, inputs, backend=backend)  # type: ignore[misc]
    yield PLAIN_TORCH, lambda: build_own(case, inputs, backend=PLAIN_TORCH)
    if case.op == "gru":
        yield "torch_gru_padded", lambda: torch_gru_padded.build(case, inputs)
        yield "torch_gru_packed", lambda: torch_gru_packed.build(case, inputs)
    if case.op == "augru":
        yield "eager_loop", lambda: eager_loop.build(case, inputs)
        if case.hidden == SIZES[0][3] and case.length_distribution == "full":  # every size would be compiled anew
            yield "compiled_loop", lambda: eager_loop.build(case, inputs, together=1)


def wrong_result(program: Program, case: Case, inputs: Inputs, exact: tuple[Tensor, dict[str, Tensor]]) -> str | None:
    result = program.padded(program.step(case, inputs)().detach())
    found = {name: leaf.grad for name, leaf in program.leaves.items() if leaf.grad is not None}
    wrong = mismatch({"result": result}, {"result": exact[0]}, WRONG[case.dtype], inputs.valid)
    return wrong or mismatch(found, exact[1], WRONG[case.dtype])


def exact_result(case: Case, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    wide = inputs.to(torch.float64)
    program = build_own(case, wide, backend="reference")
    result = program.step(case, wide)().detach()
    return result, {name: leaf.grad for name, leaf in program.leaves.items() if leaf.grad is not None}


def call_us(step: Callable[[], object], device: str) -> float:
    if device == "cpu":  # a rehearsal: tests/test_gpu_rehearsal.py
        started = time.perf_counter()
        step()
        return 1e6 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def measure(case: Case, device: str, budget_s: float = BUDGET_S) -> Iterator[dict[str, Any]]:
    inputs = sent(draw(case), device)
    exact = exact_result(case, inputs)
    steps: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for name, build in providers(case, inputs):
        try:
            program = build()
            with torch.set_grad_enabled(case.trains):
                wrong = wrong_result(program, case, inputs, exact)
            notes[name] = program.note if wrong is None else f"wrong: {wrong}"
            if wrong is None:
                steps[name] = program.step(case, inputs)
        except Exception as error:  # whatever a provider raises is a result, too
            notes[name] = failure(error)
    del exact
    with torch.set_grad_enabled(case.trains):
        yield from timed(steps, notes, device, budget_s)


def timed(
    steps: Mapping[str, Callable[[], object]], notes: dict[str, str], device: str, budget_s: float
) -> Iterator[dict[str, Any]]:
    """A row for each provider of ``notes``, with numbers for those of ``steps``, which take turns."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    started = time.perf_counter()
    while steps and (len(next(iter(samples.values()))) < 5 or time.perf_counter() - started < budget_s):
        for name, step in steps.items():
            samples[name].append(call_us(step, device))
    base = statistics.median(samples["triton"]) if samples.get("triton") else None
    for name, note in notes.items():
        row: dict[str, Any] = {"provider": name, "note": note}
        if name in samples:
            tenths = statistics.quantiles(samples[name], n=10, method="inclusive")
            row |= {f"p{10 * (i + 1)}_us": f"{tenths[i]:.1f}" for i in (1, 4, 7)} | {"calls": len(samples[name])}
            if base is not None:
                row["ratio"] = f"{tenths[4] / base:.2f}"
        yield row


def orders(rows: int, device: str, budget_s: float) -> Iterator[dict[str, Any]]:
    """Rows longest first, as every recurrence wants them: counted, and by torch's sort."""
    lengths = draw_lengths(rows, 100, torch.Generator().manual_seed(SEED)).to(device)
    wanted = lengths.argsort(descending=True, stable=True)
    steps: dict[str, Callable[[], Tensor]] = {"argsort": lambda: lengths.argsort(descending=True, stable=True)}
    if device == "cuda" or _triton.INTERPRETED:
        steps["triton"] = lambda: counted_order(lengths)
    notes: dict[str, str] = {}
    for name, step in steps.items():
        try:
            notes[name] = "" if torch.equal(step(), wanted) else "wrong"
        except Exception as error:  # whatever a provider raises is a result, too
            notes[name] = failure(error)
    yield from timed({name: step for name, step in steps.items() if not notes[name]}, notes, device, budget_s)


def machine() -> dict[str, str]:
    import triton

    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "shared_memory": str(getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)),
        "processors": str(device.multi_processor_count),
        "driver": str(torch._C._cuda_getDriverVersion()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
        "git_sha": environment("")["git_sha"],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=sorted({size[3] for size in SIZES}))
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu.timings: this needs a GPU, and torch sees none")
    with chosen.out.open("w", newline="") as file:
        record(cases(chosen.hidden, chosen.ops, chosen.dtypes), "cuda", machine(), file)


def record(every: Iterable[Case], device: str, about: dict[str, str], file: TextIO, budget_s: float = BUDGET_S) -> None:
    """A row for each case and provider, as long as there is time."""
    started = time.perf_counter()
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for rows in ORDERED:
        for row in orders(rows, device, budget_s):
            writer.writerow({"op": "order", "B": rows} | row | about)
    for case in every:
        if time.perf_counter() - started > LIMIT_S:
            print(f"left out for want of time: {case} and what follows", file=sys.stderr)
            break
        key = {"op": case.op, "mode": case.mode, **dict(zip(("B", "T", "I", "H"), case.size, strict=True))}
        for row in measure(case, device, budget_s):
            writer.writerow(key | {"length_distribution": case.length_distribution, "dtype": case.dtype} | row | about)
            print(case, row, flush=True)
        file.flush()


if __name__ == "__main__":
    main()
