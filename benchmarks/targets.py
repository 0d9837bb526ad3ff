"""What the measurements are held to, and whether a row meets it. ``registry.py`` has the cases."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from benchmarks.registry import (
    BASES,
    LAWS,
    LIBRARIES,
    LOADERS,
    LOOPS,
    RECURRENT_PEERS,
    SERVE_WIDTHS,
    SHORT_WIDTHS,
    THREADS,
    cases,
)
from benchmarks.store import Row

# Batch sizes that a suite's targets speak of, where not of all.
TARGET_BATCHES: dict[tuple[str, str], tuple[int, ...]] = {("step", "full"): (128,)}
# How many times faster than a provider ours must at least be, by width H:
# (suite, op, mode, law, provider) -> {H: ratio}. What is not here has no target.
TARGETS: dict[tuple[str, str, str, str, str], dict[int, float]] = (
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
        ("peers", op, mode, law, "onednn"): ratios
        for op in ("gru", "augru")
        for (mode, law), ratios in {
            ("fwd", "full"): {36: 2.0, 64: 1.4, 128: 1.2},
            ("fwd+bwd", "full"): {36: 1.4, 64: 1.1, 128: 1.0},
            ("fwd", "ragged"): {36: 3.5, 64: 3.5, 128: 3.5},
            ("fwd+bwd", "ragged"): {36: 3.5, 64: 3.5, 128: 3.5},
        }.items()
    }
    # Short sequences: not slower than anything that Python can call.
    | {
        ("short", op, mode, law, peer): dict.fromkeys(SHORT_WIDTHS, 1.0)
        for op, own in {"gru": RECURRENT_PEERS["gru"], "augru": ("eager_loop", *LOOPS)}.items()
        for mode, law, peer in product(("fwd", "fwd+bwd"), LAWS, (*own, "openvino", "compiled_loop"))
    }
    # One row: not slower over a whole history; a single step with gradients costs no more than torch.nn.GRU's.
    | {
        ("latency", op, "fwd", "full", peer): dict.fromkeys(SERVE_WIDTHS, 1.0)
        for op in ("gru", "augru")
        for peer in (RECURRENT_PEERS[op][0], *LIBRARIES)
    }
    | {("latency", "gru", "fwd+bwd", "full", "torch_gru_padded"): {36: 1.0, 64: 1.0, 128: 1.0}}
    # One history, many candidates: at most 1.3 times the cost of the same steps without the input's projection.
    | {("shared", "augru_shared", "fwd", "full", "no_projection"): {36: 1 / 1.3}}
    | {("step", "dien_mlp", "step", "full", "deepctr_dien"): {36: 4.0}}
    # Against whoever has our function 6 times, and 4 times the fastest that has its auxiliary loss on; more with the
    # inner product, which costs us less. FuxiCTR stands beside, without its auxiliary loss.
    | {
        ("step", op, "step", "ragged", peer): {36: ratio}
        for op, ratio_of in {"dien_mlp": (6.0, 6.0, 4.0), "dien_inner": (8.0, 8.0, 5.0)}.items()
        for peer, ratio in zip(("deepctr_dien", "recbole_dien", "rechub_dien"), ratio_of, strict=True)
    }
    # The faster of the two training steps is the harder one to keep fed.
    | {("loader", op, "load", "log", "step_inner"): {36: 5.0} for op in LOADERS}
)
# Of these the ratio may be at most so large: what torch.compile makes of a model is to be no slower.
CEILINGS: dict[tuple[str, str], float] = {("step", "step_compiled"): 1.0, ("score", "score_compiled"): 1.0}
# How large a share of the machine's sgemm our own row must at least reach: (suite, op, mode, law) -> {H: share}.
PEAKS: dict[tuple[str, str, str, str], dict[int, float]] = {
    ("speed", op, mode, law): share
    for op in ("gru", "augru")
    for (mode, law), share in {
        ("fwd", "full"): {36: 0.55, 64: 0.75, 128: 0.85},
        ("fwd", "ragged"): {36: 0.50, 64: 0.65, 128: 0.75},
        ("fwd+bwd", "full"): {36: 0.45, 64: 0.60, 128: 0.65},
    }.items()
}
# How many times our peak memory another's must at least be: (suite, op, provider) -> ratio.
MEMORY: dict[tuple[str, str, str], float] = {("step", "dien_mlp", "deepctr_dien"): 3.0}
# How long one call of ours may last, in microseconds: (suite, op, mode) -> limit.
LIMITS_US: dict[tuple[str, str, str], float] = {
    ("latency", "gru", "call"): 30.0,
    ("latency", "augru", "call"): 30.0,
}

Problem = tuple[str, ...]


def problem(row: Row) -> Problem:
    """What providers take turns at; with the threads it says which rows belong together."""
    return tuple(row[name] for name in ("suite", "op", "mode", "law", "B", "T", "I", "H", "dtype"))


def is_base(row: Row) -> bool:
    """Whether ratios are relative to this row."""
    return row["provider"] in BASES


def bases(rows: list[Row]) -> dict[tuple[Problem, str], Row]:
    return {(problem(row), row["threads"]): row for row in rows if is_base(row)}


def target(row: Row) -> float | None:
    """The least ratio asked for against this provider."""
    batches = TARGET_BATCHES.get((row["suite"], row["law"]))
    if batches is not None and int(row["B"]) not in batches:
        return None
    widths = TARGETS.get((row["suite"], row["op"], row["mode"], row["law"], row["provider"]), {})
    return widths.get(int(row["H"]))


def ceiling(row: Row) -> float | None:
    """The largest ratio allowed to this provider."""
    return CEILINGS.get((row["suite"], row["provider"]))


def limit(row: Row) -> float | None:
    """The most microseconds allowed to our own row."""
    return LIMITS_US.get((row["suite"], row["op"], row["mode"])) if is_base(row) else None


def peak(row: Row) -> float | None:
    """The least share of the machine's sgemm asked of our own row."""
    shares = PEAKS.get((row["suite"], row["op"], row["mode"], row["law"]), {})
    return shares.get(int(row["H"])) if is_base(row) else None


def memory_target(row: Row) -> float | None:
    """How many times our peak memory this provider's must at least be."""
    return MEMORY.get((row["suite"], row["op"], row["provider"]))


def verdict(row: Row) -> str:
    """``"met 1.8×"``, ``"missed 30 µs"``, ``"met 55 %"``, or nothing without a target or a number."""
    least, most, highest, share = target(row), limit(row), ceiling(row), peak(row)
    if least is not None and row.get("ratio"):
        return f"{'met' if float(row['ratio']) >= least else 'missed'} {least:.3g}×"
    if highest is not None and row.get("ratio"):
        return f"{'met' if float(row['ratio']) <= highest else 'missed'} at most {highest:g}×"
    if most is not None and row.get("p50_us"):
        return f"{'met' if float(row['p50_us']) <= most else 'missed'} {most:g} µs"
    if share is not None and row.get("of_peak"):
        return f"{'met' if float(row['of_peak']) >= share else 'missed'} {share:.0%}"
    return ""


def memory_verdict(base: Row | None, row: Row | None) -> str:
    """``"met 3×"`` or ``"missed 3×"``, or nothing without a target or a number."""
    least = None if row is None else memory_target(row)
    if least is None or base is None or row is None or not (base["peak_mem_mb"] and row["peak_mem_mb"]):
        return ""
    return f"{'met' if float(row['peak_mem_mb']) >= least * float(base['peak_mem_mb']) else 'missed'} {least:g}×"


def _asked() -> Iterator[tuple[Problem, str, str, str]]:
    """Every target of every case: what it is about, the threads, the provider, and whether of "speed" or "memory"."""
    for case, threads in product(cases("all"), map(str, THREADS)):
        sizes = dict(zip("BTIH", map(str, case.size), strict=True))
        about = {"suite": case.suite, "op": case.op, "mode": case.mode, "law": case.law, "dtype": case.dtype} | sizes
        for provider in case.providers:
            row = about | {"provider": provider}
            if any(kind(row) is not None for kind in (target, ceiling, limit, peak)):
                yield problem(row), threads, provider, "speed"
            if memory_target(row) is not None:
                yield problem(row), threads, provider, "memory"


def count(rows: list[Row]) -> str:
    """How many of the registry's targets are met, missed, and without a number."""
    own, found = bases(rows), {}
    for row in rows:
        about, threads, provider = problem(row), row["threads"], row["provider"]
        found[about, threads, provider, "speed"] = verdict(row)
        found[about, threads, provider, "memory"] = memory_verdict(own.get((about, threads)), row)
    words = [found.get(asked, "").partition(" ")[0] for asked in _asked()]
    text = f"**{words.count('met')} targets met, {words.count('missed')} missed**"
    return text + (f", {words.count('')} not measured." if "" in words else ".")
