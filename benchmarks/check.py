"""The speed and memory that this project asks of itself, checked against the stored results: ``make bench-check``.

Targets are for those who work on the kernels; users read docs/benchmarks.md. ``registry.py`` has the cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from benchmarks.registry import (
    BASES,
    LENGTH_DISTRIBUTIONS,
    LIBRARIES,
    LOADERS,
    LOOPS,
    OURS,
    RECURRENT_PEERS,
    SERVE_WIDTHS,
    SHORT_WIDTHS,
    THREADS,
    cases,
)
from benchmarks.store import KEY, Row

# What says which row a target is about; a file has one machine and allocator setting when it comes here.
ABOUT = frozenset(KEY) - {"machine", "allocator"}

# The batch sizes for which a suite has ratio targets, where that is not all of them.
RATIO_BATCHES: dict[tuple[str, str], tuple[int, ...]] = {("step", "full"): (128,)}
# The least ratio (the provider's time by ours) by width H. What is not here has no target.
# (suite, op, mode, length distribution, provider) -> {H: ratio}
RATIOS: dict[tuple[str, str, str, str, str], dict[int, float]] = (
    {
        ("speed", "gru", "fwd", "full", "torch_gru_padded"): {36: 1.8, 64: 1.4, 128: 1.4},
        ("speed", "gru", "fwd", "ragged", "torch_gru_padded"): {36: 6.0, 64: 5.0, 128: 4.0},
        ("speed", "gru", "fwd", "ragged", "torch_gru_packed"): {36: 3.0, 64: 2.0, 128: 1.4},
        ("speed", "gru", "fwd+bwd", "full", "torch_gru_padded"): {36: 2.0, 64: 1.6, 128: 1.2},
        ("speed", "gru", "fwd+bwd", "full", "torch_gru_packed"): {36: 3.0, 64: 3.0, 128: 3.0},
        ("speed", "gru", "fwd+bwd", "ragged", "torch_gru_packed"): {36: 4.0, 64: 4.0, 128: 4.0},
        ("speed", "augru", "fwd+bwd", "full", "eager_loop"): {36: 2.5, 64: 1.6, 128: 1.1},
        ("speed", "augru", "fwd+bwd", "ragged", "eager_loop"): {36: 5.0, 64: 4.0, 128: 3.0},
    }
    | {
        ("peers", op, mode, lengths, "onednn"): ratios
        for op in ("gru", "augru")
        for (mode, lengths), ratios in {
            ("fwd", "full"): {36: 2.0, 64: 1.4, 128: 1.2},
            ("fwd+bwd", "full"): {36: 1.4, 64: 1.1, 128: 1.0},
            ("fwd", "ragged"): {36: 3.5, 64: 3.5, 128: 3.5},
            ("fwd+bwd", "ragged"): {36: 3.5, 64: 3.5, 128: 3.5},
        }.items()
    }
    # Short sequences: not slower than anything that Python can call.
    | {
        ("short", op, mode, lengths, peer): dict.fromkeys(SHORT_WIDTHS, 1.0)
        for op, own in {"gru": RECURRENT_PEERS["gru"], "augru": ("eager_loop", *LOOPS)}.items()
        for mode, lengths, peer in product(
            ("fwd", "fwd+bwd"), LENGTH_DISTRIBUTIONS, (*own, "openvino", "compiled_loop")
        )
    }
    # One row: not slower over a whole history; a single step with gradients costs no more than torch.nn.GRU's.
    | {
        ("latency", op, "fwd", "full", peer): dict.fromkeys(SERVE_WIDTHS, 1.0)
        for op in ("gru", "augru")
        for peer in (RECURRENT_PEERS[op][0], *LIBRARIES)
    }
    | {("latency", "gru", "fwd+bwd", "full", "torch_gru_padded"): {36: 1.0, 64: 1.0, 128: 1.0}}
    # One history, many candidates: at most 1.3 times the time of the same steps without the input's projection.
    | {("shared", "augru_shared", "fwd", "full", "no_projection"): {36: 1 / 1.3}}
    | {("step", "dien_mlp", "step", "full", "deepctr_dien"): {36: 4.0}}
    # 6 times against the libraries that compute our function, and 4 times against torch-rechub's smaller model; more
    # with the inner product, which costs us less. FuxiCTR trains without an auxiliary loss and has no target.
    | {
        ("step", op, "step", "ragged", peer): {36: ratio}
        for op, ratios in {"dien_mlp": (6.0, 6.0, 4.0), "dien_inner": (8.0, 8.0, 5.0)}.items()
        for peer, ratio in zip(("deepctr_dien", "recbole_dien", "rechub_dien"), ratios, strict=True)
    }
    # The faster of the two training steps is the harder one to keep fed.
    | {("loader", op, "load", "log", "step_inner"): {36: 5.0} for op in LOADERS}
)
# The largest ratio: our model under torch.compile must not be slower than without.
CEILINGS: dict[tuple[str, str], float] = {("step", "step_compiled"): 1.0, ("score", "score_compiled"): 1.0}
# The least share of the machine's sgemm in our own row: (suite, op, mode, length distribution) -> {H: share}.
SHARES: dict[tuple[str, str, str, str], dict[int, float]] = {
    ("speed", op, mode, lengths): share
    for op in ("gru", "augru")
    for (mode, lengths), share in {
        ("fwd", "full"): {36: 0.55, 64: 0.75, 128: 0.85},
        ("fwd", "ragged"): {36: 0.50, 64: 0.65, 128: 0.75},
        ("fwd+bwd", "full"): {36: 0.45, 64: 0.60, 128: 0.65},
    }.items()
}
# The least quotient of another's peak memory by ours: (suite, op, provider) -> ratio.
MEMORY: dict[tuple[str, str, str], float] = {("step", "dien_mlp", "deepctr_dien"): 3.0}
# The longest time of one call of ours, in microseconds: (suite, op, mode) -> limit.
LIMITS_US: dict[tuple[str, str, str], float] = {
    ("latency", "gru", "call"): 30.0,
    ("latency", "augru", "call"): 30.0,
}


class Target(NamedTuple):
    """One number asked of one row."""

    row: Row  # the columns of ``registry.Case``, threads and provider
    kind: str  # "ratio", "ceiling", "share of sgemm", "time" or "memory"
    bound: float


def targets() -> Iterator[Target]:
    """Every target of every case and number of threads in the registry."""
    for case, threads in product(cases("all"), map(str, THREADS)):
        sizes = dict(zip("BTIH", map(str, case.size), strict=True))
        lengths, width = case.length_distribution, case.hidden
        about = {"suite": case.suite, "op": case.op, "mode": case.mode, "length_distribution": lengths}
        about |= sizes | {"dtype": case.dtype, "threads": threads}
        for provider in case.providers:
            is_base = provider in BASES
            bounds = {
                "ratio": RATIOS.get((case.suite, case.op, case.mode, lengths, provider), {}).get(width),
                "ceiling": CEILINGS.get((case.suite, provider)),
                "time": LIMITS_US.get((case.suite, case.op, case.mode)) if is_base else None,
                "share of sgemm": SHARES.get((case.suite, case.op, case.mode, lengths), {}).get(width)
                if is_base
                else None,
                "memory": MEMORY.get((case.suite, case.op, provider)),
            }
            if case.batch not in RATIO_BATCHES.get((case.suite, lengths), (case.batch,)):
                bounds["ratio"] = None
            for kind, bound in bounds.items():
                if bound is not None:
                    yield Target(about | {"provider": provider}, kind, bound)


class Result(NamedTuple):
    met: bool | None  # None: not measured
    asked: str
    found: str


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY if name in ABOUT)


def judge(target: Target, rows: dict[tuple[str, ...], Row]) -> Result:
    """Whether the row of the target, among ``rows`` by their ``ABOUT`` columns, has the number asked for."""
    row, bound = rows.get(_key(target.row), {}), target.bound
    if target.kind in ("ratio", "ceiling"):
        value = row.get("ratio")
        is_met = value and (float(value) >= bound if target.kind == "ratio" else float(value) <= bound)
        asked = f"{'at least' if target.kind == 'ratio' else 'at most'} {bound:.3g}x"
        found = f"{float(value):.2f}x" if value else ""
    elif target.kind == "share of sgemm":
        value = row.get("of_peak")
        is_met = value and float(value) >= bound
        asked, found = f"at least {bound:.0%} of sgemm", f"{float(value):.1%}" if value else ""
    elif target.kind == "time":
        value = row.get("p50_us")
        is_met = value and float(value) <= bound
        asked, found = f"at most {bound:g} us", f"{float(value):.1f} us" if value else ""
    else:
        base = rows.get(_key(target.row | {"provider": OURS}), {})
        value = row.get("peak_mem_mb") and base.get("peak_mem_mb")
        times = float(row["peak_mem_mb"]) / float(base["peak_mem_mb"]) if value else 0.0
        is_met = value and times >= bound
        asked, found = f"at least {bound:g}x our peak memory", f"{times:.2f}x" if value else ""
    return Result(bool(is_met) if value else None, asked, found)


def report(rows: Sequence[Row]) -> tuple[str, int]:
    """A line for each target, the missed ones first, a count; and how many targets are not met."""
    known = {_key(row): row for row in rows}
    judged = [(target, judge(target, known)) for target in targets()]
    judged.sort(key=lambda pair: {False: 0, None: 1, True: 2}[pair[1].met])
    lines = []
    for target, result in judged:
        word = {True: "met", False: "MISSED", None: "not measured"}[result.met]
        row = target.row
        case = f"{row['suite']} {row['op']} {row['mode']} {row['length_distribution']} "
        case += f"{','.join(row[n] for n in 'BTIH')}, {row['threads']} thread{'s' * (row['threads'] != '1')}"
        lines.append(f"{word:<12}  {case:<58}  {row['provider']:<20}  {result.asked}: {result.found or 'no figure'}")
    count = Counter(result.met for _, result in judged)
    lines.append(f"{count[True]} targets met, {count[False]} missed, {count[None]} not measured")
    return "\n".join(lines), count[False] + count[None]
