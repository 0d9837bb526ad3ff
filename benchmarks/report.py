"""From the CSV alone to tables, each row that has a target marked met or missed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from benchmarks.registry import WRONG_GRADIENT
from benchmarks.store import ALLOWANCE, Row, key, sat, spread
from benchmarks.targets import bases, count, is_base, memory_verdict, problem, verdict

_TITLES = {
    "speed": "Recurrences",
    "peers": "Recurrences, against what must be installed or compiled",
    "short": "Short sequences",
    "latency": "One row: one call at T = 1, and a whole history",
    "gates": "Gates recomputed in the backward instead of kept (ratio: recomputed to kept)",
    "units": "Attention scores and auxiliary loss",
    "shared": "One history for B rows of attention",
    "step": "A training step of the whole DIEN (I = 18 + 18, samples/s in brackets)",
    "loader": "The next batch of the loader, against a training step on the same batches (samples/s in brackets)",
    "score": "Scores of B candidates for one history",
}
_PER_SECOND = ("step", "loader")
_WIDER = f"{ALLOWANCE - 1:.0%} wider"


def one_line(row: Row) -> str:
    if not row.get("p50_us"):
        return f"{row['provider']}: {row['note']}"
    ratio = f", {_ratio(row)}" if row.get("ratio") and not is_base(row) else ""
    memory = f", peak {row['peak_mem_mb']} MB" if row.get("peak_mem_mb") else ""
    return f"{row['provider']}: {_time(row)}{ratio}{memory} {_mark(row)}{verdict(row)}".rstrip()


def _time(row: Row) -> str:
    text = _duration(float(row["p50_us"]))
    if row.get("p99_us"):
        text += f", p99 {_duration(float(row['p99_us']))}"
    if row["suite"] in _PER_SECOND:
        text += f" ({1e6 * int(row['B']) / float(row['p50_us']):,.0f})"
    if row.get("of_peak") and is_base(row):
        text += f", {float(row['of_peak']):.0%} of sgemm"
    return text


def _duration(us: float) -> str:
    return f"{us:.1f} µs" if us < 1e3 else f"{us / 1e3:.2f} ms" if us < 1e5 else f"{us / 1e3:.0f} ms"


def _ratio(row: Row) -> str:
    low, high = spread(row)
    return f"{float(row['ratio']):.2f}× ({low:.2f}–{high:.2f})"


def _mark(row: Row) -> str:
    """What must not be overlooked: the peer is timed, but what it computes is not the gradient."""
    return "wrong gradient, " if row["note"].startswith(WRONG_GRADIENT) else ""


def _strong(text: str) -> str:
    return f"**{text}**" if text.startswith("missed") else text


def markdown(rows: list[Row], root: str = "", again: Sequence[Row] = ()) -> str:
    """All tables, after a paragraph on the machine and the counts of targets and of what one more run, ``again``,
    reproduced. ``root``: the way to the repository's."""
    parts = [about(rows, root), counts(rows, again)]
    for suite, title in _TITLES.items():
        chosen = [row for row in rows if row["suite"] == suite]
        if chosen:
            is_open = " open" if suite == "speed" else ""
            parts.append(f"<details{is_open}><summary>{title}</summary>")
            parts += [_table(chosen), *_notes(chosen)]
            parts.append("</details>")
    return "\n\n".join(parts)


def counts(rows: list[Row], again: Sequence[Row]) -> str:
    """Of targets, and of what one more run reproduced."""
    pairs = pairs_of(rows, again)
    return f"{count(rows)} {counted(pairs)}" if pairs else count(rows)


def about(rows: list[Row], root: str = "") -> str:
    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))

    dates = sorted(row["date"][:10] for row in rows)
    older = "" if all(row["ratio_low"] for row in rows if row["ratio"]) else "; of older rows 20th–80th percentile"
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{values('machine')}, {values('cores')} cores, {values('isa')}; "
        f"dien_kernels {values('dien_kernels')} at {values('git_sha')}, torch {values('torch')}, "
        f"MKL {values('mkl')}, Python {values('python')}; "
        f"allocator: {values('allocator')} ([what that means]({root}benchmarks/README.md)); "
        f"{values('dtype')}; {days}. "
        "Times are medians; × is how many times as long the other one takes, median over interleaved rounds "
        f"(its spread: lowest–highest median of a sitting of every run{older}, {_WIDER} on either side). "
        'Ragged lengths have mean T/4. "% of sgemm": useful operations a second, against '
        f"an sgemm of MKL in the same rounds{_limits(rows)}."
    )


def _limits(rows: list[Row]) -> str:
    """What the machine itself did meanwhile."""
    texts = []
    for n in sorted({row["threads"] for row in rows}):
        ranges = []
        for name, unit in (("peak_gflops", "GFLOP/s"), ("bandwidth_gbs", "GB/s copied")):
            values = sorted(float(row[name]) for row in rows if row["threads"] == n and row[name])
            if values:
                ranges.append(f"{values[0]:.0f} to {values[-1]:.0f} {unit}")
        if ranges:
            texts.append(f"{n} thread{'s' * (n != '1')}: {', '.join(ranges)}")
    return f" ({'; '.join(texts)})" if texts else ""


def _table(rows: list[Row]) -> str:
    threads = sorted({int(row["threads"]) for row in rows})
    has_memory = any(row["peak_mem_mb"] for row in rows)
    heads = ["op", "mode", "lengths", "B, T, I, H", "against"]
    for n in threads:
        at = f"{n} thread{'s' * (n > 1)}"
        heads += [f"{at}: ours", "theirs", "×", *(["peak MB, ours / theirs"] if has_memory else [])]
    found = {(problem(row), row["provider"], int(row["threads"])): row for row in rows}
    lines = [heads, ["---"] * len(heads)]
    own = bases(rows)
    for about, provider in dict.fromkeys((problem(row), row["provider"]) for row in rows if not is_base(row)):
        first = [about[1], about[2], about[3], ", ".join(about[4:8]), f"`{provider}`"]
        for n in threads:
            first += _cells(own.get((about, str(n))), found.get((about, provider, n)), has_memory)
        lines.append(first)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _notes(rows: list[Row]) -> list[str]:
    """What the rows say of themselves beside their numbers, a line for each provider."""
    said: dict[str, dict[str, None]] = {}
    for row in rows:
        if not row["p50_us"] or row["note"].startswith(("absent", "wrong:", "failed")):
            continue
        at = (
            f"B = {row['B']}, {row['threads']} thread{'s' * (row['threads'] != '1')}: "
            if row["suite"] == "score" and is_base(row)
            else ""
        )
        for words in re.sub(r"[;,] compiled in \d+ s", "", row["note"]).split("; "):
            if words and not words.startswith(WRONG_GRADIENT):
                said.setdefault(row["provider"], {})[at + words] = None
    lines = [f"- `{provider}`: {'; '.join(words)}" for provider, words in said.items()]
    return ["\n".join(lines)] if lines else []


def _cells(base: Row | None, row: Row | None, has_memory: bool) -> list[str]:
    def cell(of: Row | None, show: Callable[[Row], str]) -> str:
        if of is None:
            return "not run"
        return f"{show(of)} {_strong(verdict(of))}".rstrip() if of["p50_us"] else of["note"]

    ratio = "" if row is None or not row["ratio"] else f"{_ratio(row)} {_mark(row)}{_strong(verdict(row))}".rstrip()
    theirs = "not run" if row is None else _time(row) if row["p50_us"] else row["note"]
    cells = [cell(base, _time), theirs, ratio]
    if has_memory:
        both = " / ".join(of["peak_mem_mb"] if of else "" for of in (base, row)).strip(" /")
        cells.append(f"{both} {_strong(memory_verdict(base, row))}".rstrip())
    return cells


Pairs = list[tuple[Row, Row]]


def pairs_of(first: Sequence[Row], again: Sequence[Row]) -> Pairs:
    """The rows with a ratio that both have."""
    then = {key(row): row for row in first if row["ratio"] and not is_base(row)}
    return [(then[key(row)], row) for row in again if row["ratio"] and key(row) in then]


def _is_within(pair: tuple[Row, Row], stated: Callable[[Row], tuple[float, float]] = spread) -> bool:
    (low, high), again = stated(pair[0]), float(pair[1]["ratio"])
    return low <= again <= high


def counted(pairs: Pairs) -> str:
    """How many of the last run's ratios lie within the stated spread, how many within what the sittings gave, and how
    far they moved."""
    narrow = sum(_is_within(pair, sat) for pair in pairs)
    moved = sorted(abs(float(b["ratio"]) / float(a["ratio"]) - 1) for a, b in pairs)
    half, most = moved[(len(moved) - 1) // 2], moved[(len(moved) * 9 - 1) // 10]
    return (
        f"Measured once more: {sum(map(_is_within, pairs))} of {len(pairs)} ratios within their stated spread "
        f"({narrow} within the unwidened one); half of them moved by at most {half:.1%}, nine in ten by at "
        f"most {most:.1%}."
    )


def reproduced(pairs: Pairs) -> str:
    """A line for each ratio outside of its spread, and the count."""
    lines = [
        f"{' '.join(problem(a)[:8])}, threads={a['threads']}, {a['provider']}: "
        f"{_ratio(a)}, then {float(b['ratio']):.2f}×"
        for a, b in pairs
        if not _is_within((a, b))
    ]
    return "\n".join([*lines, counted(pairs)])
