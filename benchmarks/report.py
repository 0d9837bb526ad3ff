"""From the stored rows to docs/benchmarks.md and to the README's section on speed: ``python -m benchmarks report``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from benchmarks.registry import (
    BASES,
    CANDIDATES,
    DIENS,
    LENGTH_DISTRIBUTIONS,
    LIBRARIES,
    LOOPS,
    MODELS,
    OURS,
    OWN,
    STEP_BATCHES,
    TITLES,
    WRONG_GRADIENT,
)
from benchmarks.store import Row, interval

TEMPLATES = Path(__file__).resolve().parent / "templates"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
NEAREST = 12  # rows of the table of the peers that come nearest
OPS = {
    "gru": "GRU",
    "augru": "AUGRU",
    "attention_bilinear": "bilinear attention scores",
    "attention_din": "DIN attention scores",
    "auxiliary_inner": "auxiliary loss, inner product",
    "auxiliary_mlp": "auxiliary loss, MLP",
    **dict.fromkeys(MODELS, "DIEN"),
}
MODES = {
    "fwd": "forward",
    "fwd+bwd": "forward + backward",
    "call": "forward",
    "step": "training step",
    "request": "request",
}
# Peers that are much alike share a line in the tables of recurrences.
ALIKE = {name: "DeepCTR-Torch, RecBole, FuxiCTR" for name in ("deepctr_augru", "recbole_augru", "fuxictr_augru")}
RECURRENT = ("torch_gru_padded", "torch_gru_packed", "eager_loop", "compiled_loop", *LIBRARIES, *LOOPS)


def title(provider: str) -> str:
    return TITLES.get(provider, provider)


def one_line(row: Row) -> str:
    """A row as a run prints it."""
    if not row.get("p50_us"):
        return f"{row['provider']}: {row['note']}"
    ratio = f", {_exact(row)}" if row.get("ratio") and row["provider"] not in BASES else ""
    memory = f", peak {row['peak_mem_mb']} MB" if row.get("peak_mem_mb") else ""
    wrong = ", wrong gradient" if row["note"].startswith(WRONG_GRADIENT) else ""
    return f"{row['provider']}: {duration(float(row['p50_us']))}{ratio}{memory}{wrong}"


def duration(us: float) -> str:
    return f"{us:.1f} µs" if us < 1e3 else f"{us / 1e3:.1f} ms" if us < 1e4 else f"{us / 1e3:.0f} ms"


def times(ratio: float) -> str:
    """Three digits at most: 0.51×, 5.7×, 12×."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def _exact(row: Row) -> str:
    low, high = interval(row)
    return f"{times(float(row['ratio']))} ({times(low)[:-1]}–{times(high)[:-1]})"


def _range(rows: Iterable[Row]) -> str:
    """The lowest and the highest ratio."""
    ratios = sorted(float(row["ratio"]) for row in rows if row["ratio"])
    if not ratios:
        return "–"
    low, high = times(ratios[0]), times(ratios[-1])
    return low if low == high else f"{low[:-1]}–{high}"


def select(rows: Iterable[Row], **columns: object) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == str(value) for name, value in columns.items())]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def environment(rows: Sequence[Row]) -> str:
    """Machine, versions and commits of the rows, in a line."""

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))

    threads = " and ".join(_threads(rows))
    threads += f" thread{'s' * (threads != '1')}"
    return (
        f"{values('machine')}, {values('cores')} cores, {values('isa')}, {threads}, {values('dtype')}; "
        f"torch {values('torch')}, Python {values('python')}; dien_kernels at {values('git_sha')}."
    )


def page(rows: Sequence[Row], repeats: str = "") -> str:
    """docs/benchmarks.md; ``repeats`` is a sentence on repeat runs. Tables of suites without rows are empty."""
    ratios = [float(row["ratio"]) for row in _compared(rows)]
    return (TEMPLATES / "benchmarks.md").read_text().format(
        repeats=repeats,
        environment=environment(rows),
        steps=_steps(rows),
        requests=_requests(rows),
        training=_recurrences(rows, "fwd+bwd"),
        inference=_recurrences(rows, "fwd"),
        units=_units(rows),
        comparisons=len(ratios),
        faster=sum(ratio < 1 for ratio in ratios),
        close=sum(1 <= ratio < 1.25 for ratio in ratios),
        nearest=_nearest(rows),
    )  # fmt: skip


def _threads(rows: Iterable[Row]) -> list[str]:
    return sorted({row["threads"] for row in rows}, key=int)


def _compare(
    rows: Sequence[Row], cases: Iterable[dict[str, str]], providers: Sequence[str], own: Sequence[str] = ("p50_us",)
) -> list[list[str]]:
    """A line for each case and number of threads: our times in the columns ``own``, and the ratio of each provider."""
    lines = []
    for case, threads in product(cases, _threads(rows)):
        found = {row["provider"]: row for row in select(rows, threads=threads, **case) if row["p50_us"]}
        if OURS in found:
            ours = [duration(float(found[OURS][name])) if found[OURS][name] else "–" for name in own]
            ratios = [_exact(found[name]) if name in found else "–" for name in providers]
            lines.append([*case.values(), threads, *ours, *ratios])
    return lines


def _steps(rows: Sequence[Row]) -> str:
    cases = [{"B": str(b), "length_distribution": d} for b, d in product(STEP_BATCHES, reversed(LENGTH_DISTRIBUTIONS))]
    lines = _compare(select(rows, suite="step", op="dien_mlp"), cases, (*DIENS, "step_compiled"))
    return table(["batch", "histories", "threads", OURS, *map(title, DIENS), "ours, compiled"], lines)


def _requests(rows: Sequence[Row]) -> str:
    rows = select(rows, suite="score")
    peers = [name for name in DIENS if select(rows, provider=name)]
    cases = [{"B": str(count)} for count in CANDIDATES]
    lines = _compare(rows, cases, (*peers, "score_compiled"), ("p50_us", "p99_us"))
    return table(["candidates", "threads", OURS, "its 99th percentile", *map(title, peers), "ours, compiled"], lines)


def _recurrences(rows: Sequence[Row], mode: str) -> str:
    rows = [row for row in select(rows, mode=mode) if row["suite"] in ("speed", "peers") and row["ratio"]]
    sizes = list(dict.fromkeys(tuple(row[name] for name in "BTIH") for row in rows))
    groups: dict[tuple[str, str], list[Row]] = {}
    for op, name in product(("gru", "augru"), RECURRENT):
        groups.setdefault((OPS[op], ALIKE.get(name, title(name))), []).extend(select(rows, op=op, provider=name))
    lines = []
    for names, own in groups.items():
        full, ragged = (select(own, length_distribution=lengths) for lengths in LENGTH_DISTRIBUTIONS)
        cells = [_range(row for row in full if tuple(row[n] for n in "BTIH") == size) for size in sizes]
        if own:
            lines.append([*names, *cells, _range(ragged)])
    return table(
        ["op", "compared with", *(f"full: B {b}, T {t}, H {h}" for b, t, _, h in sizes), "ragged, all sizes"], lines
    )


def _units(rows: Sequence[Row]) -> str:
    rows = [row for row in select(rows, suite="units") if row["ratio"] and row["provider"] != OURS]
    kinds = list(dict.fromkeys((row["length_distribution"], *(row[name] for name in "BTH")) for row in rows))
    head = ["op", "", *(f"{kind[0]}: B {kind[1]}, T {kind[2]}, H {kind[3]}" for kind in kinds)]
    lines = []
    for op, mode in dict.fromkeys((row["op"], row["mode"]) for row in rows):
        own = select(rows, op=op, mode=mode)
        cells = [_range(row for row in own if (row["length_distribution"], row["B"]) == kind[:2]) for kind in kinds]
        lines.append([OPS[op], MODES[mode], *cells])
    return table(head, lines)


def _compared(rows: Iterable[Row]) -> list[Row]:
    """The ratios to software that is not ours."""
    return [row for row in rows if row["ratio"] and row["provider"] not in OWN]


def _nearest(rows: Sequence[Row]) -> str:
    nearest: dict[tuple[str, ...], Row] = {}
    for row in sorted(_compared(rows), key=lambda row: float(row["ratio"])):
        nearest.setdefault(tuple(row[name] for name in ("suite", "op", "mode", "provider")), row)
    lines = []
    for row in list(nearest.values())[:NEAREST]:
        case = ", ".join(f"{name} {row[name]}" for name in ("B", "T", "H")) + f", {row['length_distribution']}"
        peer = title(row["provider"]) + " (wrong gradient)" * row["note"].startswith(WRONG_GRADIENT)
        lines.append([OPS[row["op"]], MODES[row["mode"]], case, row["threads"], peer, _exact(row)])
    return table(["op", "", "case", "threads", "compared with", "ratio"], lines)


# The section in README.md

# The lines of its table: words, and what chooses the rows of one thread: suites, op, mode, B, T, length distribution.
README_CASES = (
    ("DIEN training step, batch 128, ragged", ("step",), "dien_mlp", "step", 128, 100, "ragged"),
    ("DIEN training step, batch 128, full", ("step",), "dien_mlp", "step", 128, 100, "full"),
    ("DIEN training step, batch 1,024, ragged", ("step",), "dien_mlp", "step", 1024, 100, "ragged"),
    ("scoring 100 candidates for one user", ("score",), "dien_mlp", "request", 100, 100, "full"),
    ("GRU forward + backward, H = 64, ragged", ("speed", "peers"), "gru", "fwd+bwd", 1024, 50, "ragged"),
    ("GRU forward + backward, H = 64, full", ("speed", "peers"), "gru", "fwd+bwd", 1024, 50, "full"),
)


def readme(rows: Sequence[Row], repeats: str = "") -> str:
    """The section between its two marks."""
    lines, used = [], []
    for words, suites, *values in README_CASES:
        columns = dict(zip(("op", "mode", "B", "T", "length_distribution"), values, strict=True))
        case = [row for row in select(rows, threads=1, **columns) if row["suite"] in suites]
        peers = sorted(_compared(case), key=lambda row: float(row["ratio"]))
        ours = select(case, provider=OURS)
        if peers and ours:
            ends = (f"{title(row['provider'])}: {times(float(row['ratio']))}" for row in (peers[0], peers[-1]))
            lines.append([words, duration(float(ours[0]["p50_us"])), *ends])
            used += [*ours, *peers]
    steps = [float(row["ratio"]) for row in _compared(select(rows, suite="step", op="dien_mlp"))] or [1.0]
    return (TEMPLATES / "readme.md").read_text().format(
        least=int(min(steps)),
        most=int(max(steps)),
        table=table(("one thread", OURS, "fastest other", "slowest other"), lines),
        repeats=repeats,
        environment=environment(used),
    )  # fmt: skip


def write_between_marks(page: Path, words: str) -> None:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{words}{END}{after}")
