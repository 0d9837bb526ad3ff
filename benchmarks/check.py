"""The speed and memory that this project asks of itself, checked against the stored results: ``make bench-check``.

Targets are for those who work on the kernels; users read docs/benchmarks.md. ``registry.py`` has the cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

# The columns that say which row a target is about; all rows are of one machine and allocator setting.
ABOUT = tuple(name for name in KEY if name not in ("machine", "allocator"))
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


class Kind(NamedTuple):
    """How a target is judged: by a column of the row, which must be at least or at most its bound."""

    column: str
    at_least: bool
    show: str  # the format of a bound and of a figure


KINDS = {
    "ratio": Kind("ratio", True, "{:.2f}x"),
    "ceiling": Kind("ratio", False, "{:.2f}x"),
    "share": Kind("of_peak", True, "{:.1%} of sgemm"),
    "time": Kind("p50_us", False, "{:.1f} us"),
    "memory": Kind("peak_mem_mb", True, "{:.2f}x our peak memory"),
}


class Target(NamedTuple):
    kind: str
    bound: float
    row: Row  # the columns ``ABOUT`` of the row it is asked of


def targets() -> Iterator[Target]:
    """Every target of every case and number of threads in the registry."""
    for case, threads in product(cases("all"), map(str, THREADS)):
        suite, op, mode, lengths = kind = case.suite, case.op, case.mode, case.length_distribution
        sizes = zip(("B", "T", "I", "H"), map(str, case.size), strict=True)
        about = dict(zip(("suite", "op", "mode", "length_distribution"), kind, strict=True)) | dict(sizes)
        has_ratio = case.batch in RATIO_BATCHES.get((suite, lengths), (case.batch,))
        for provider in case.providers:
            bounds = {
                "ratio": RATIOS.get((*kind, provider), {}).get(case.hidden) if has_ratio else None,
                "ceiling": CEILINGS.get((suite, provider)),
                "share": SHARES.get(kind, {}).get(case.hidden) if provider in BASES else None,
                "time": LIMITS_US.get((suite, op, mode)) if provider in BASES else None,
                "memory": MEMORY.get((suite, op, provider)),
            }
            row = about | {"dtype": case.dtype, "threads": threads, "provider": provider}
            yield from (Target(name, bound, row) for name, bound in bounds.items() if bound is not None)


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ABOUT)


def figure(target: Target, rows: Mapping[tuple[str, ...], Row]) -> float | None:
    """What the row of the target has, among ``rows`` by their ``key``; None if it was not measured."""
    column = KINDS[target.kind].column
    value = rows.get(key(target.row), {}).get(column)
    if value and target.kind == "memory":
        ours = rows.get(key(target.row | {"provider": OURS}), {}).get(column)
        return float(value) / float(ours) if ours else None
    return float(value) if value else None


def is_met(target: Target, found: float) -> bool:
    return found >= target.bound if KINDS[target.kind].at_least else found <= target.bound


def report(rows: Sequence[Row]) -> tuple[str, int]:
    """A line for each target, the missed ones first, and their count; and how many targets are not met."""
    known = {key(row): row for row in rows}
    words: dict[str, list[str]] = {"MISSED": [], "not measured": [], "met": []}
    for target in targets():
        found, kind, row = figure(target, known), KINDS[target.kind], target.row
        word = "not measured" if found is None else "met" if is_met(target, found) else "MISSED"
        size = ",".join(row[name] for name in "BTIH")
        case = f"{row['suite']} {row['op']} {row['mode']} {row['length_distribution']} {size}, threads={row['threads']}"
        asked = f"at {'least' if kind.at_least else 'most'} {kind.show.format(target.bound)}"
        shown = "no figure" if found is None else kind.show.format(found).partition(" ")[0]
        words[word].append(f"{word:<12}  {case:<58}  {row['provider']:<20}  {asked}: {shown}")
    met, missed, absent = (len(words[word]) for word in ("met", "MISSED", "not measured"))
    count = f"{met} targets met, {missed} missed, {absent} not measured"
    return "\n".join([*(line for lines in words.values() for line in lines), count]), missed + absent
