"""From the CSV alone to the README's tables, each row that has a target marked met or missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.registry import LIMITS_US, TARGET_BATCHES, TARGETS, THREADS, cases
from benchmarks.store import Row

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
_TITLES = {
    "speed": "Recurrences",
    "short": "Short sequences",
    "latency": "One call at B = T = 1, inference",
    "gates": "Gates recomputed in the backward instead of kept (ratio: recomputed to kept)",
    "units": "Attention scores and auxiliary loss",
    "step": "A training step of the whole DIEN (I = 18 + 18, samples/s in brackets)",
    "loader": "The next batch of the loader, against a training step on the same batches (samples/s in brackets)",
    "score": "Scores of B candidates for one history",
}
_PER_SECOND = ("step", "loader")
_PROBLEM = ("suite", "op", "mode", "law", "B", "T", "I", "H", "dtype")
Problem = tuple[str, ...]


def target(row: Row) -> float | None:
    """The least ratio asked for against this provider."""
    batches = TARGET_BATCHES.get(row["suite"])
    if batches is not None and int(row["B"]) not in batches:
        return None
    widths = TARGETS.get((row["suite"], row["op"], row["mode"], row["law"], row["provider"]), {})
    return widths.get(int(row["H"]))


def limit(row: Row) -> float | None:
    """The most microseconds allowed to our own row."""
    return LIMITS_US.get((row["suite"], row["op"], row["mode"])) if _is_base(row) else None


def verdict(row: Row) -> str:
    """``"met 1.8×"``, ``"missed 30 µs"``, or nothing without a target or a number."""
    least, most = target(row), limit(row)
    if least is not None and row.get("ratio"):
        return f"{'met' if float(row['ratio']) >= least else 'missed'} {least:g}×"
    if most is not None and row.get("p50_us"):
        return f"{'met' if float(row['p50_us']) <= most else 'missed'} {most:g} µs"
    return ""


def one_line(row: Row) -> str:
    if not row.get("p50_us"):
        return f"{row['provider']}: {row['note']}"
    ratio = f", {_ratio(row)}" if row.get("ratio") and not _is_base(row) else ""
    memory = f", peak {row['peak_mem_mb']} MB" if row.get("peak_mem_mb") else ""
    return f"{row['provider']}: {_time(row)}{ratio}{memory} {verdict(row)}".rstrip()


def _is_base(row: Row) -> bool:
    return row["provider"] in ("dien_kernels", "gates_keep")


def _time(row: Row) -> str:
    text = _duration(float(row["p50_us"]))
    if row.get("p99_us"):
        text += f", p99 {_duration(float(row['p99_us']))}"
    if row["suite"] in _PER_SECOND:
        text += f" ({1e6 * int(row['B']) / float(row['p50_us']):,.0f})"
    return text


def _duration(us: float) -> str:
    return f"{us:.1f} µs" if us < 1e3 else f"{us / 1e3:.2f} ms" if us < 1e5 else f"{us / 1e3:.0f} ms"


def _ratio(row: Row) -> str:
    middle, low, high = (float(row[name]) for name in ("ratio", "ratio_p20", "ratio_p80"))
    return f"{middle:.2f}× ({low:.2f}–{high:.2f})"


def _strong(text: str) -> str:
    return f"**{text}**" if text.startswith("missed") else text


def markdown(rows: list[Row]) -> str:
    """All tables, after a paragraph on the machine and the count of targets."""
    parts = [_about(rows), _count(rows)]
    for suite, title in _TITLES.items():
        chosen = [row for row in rows if row["suite"] == suite]
        if chosen:
            is_open = " open" if suite == "speed" else ""
            parts.append(f"<details{is_open}><summary>{title}</summary>")
            parts.append(_table(chosen))
            parts.append("</details>")
    return "\n\n".join(parts)


def _about(rows: list[Row]) -> str:
    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))

    dates = sorted(row["date"][:10] for row in rows)
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{values('machine')}, {values('cores')} cores, {values('isa')}; "
        f"dien_kernels {values('dien_kernels')} at {values('git_sha')}, torch {values('torch')}, "
        f"MKL {values('mkl')}, Python {values('python')}; "
        f"allocator: {values('allocator')} ([what that means](benchmarks/README.md)); "
        f"{values('dtype')}; {days}. "
        "Times are medians; × is how many times as long the other one takes, median over interleaved rounds "
        "(20th–80th percentile). Ragged lengths have mean T/4."
    )


def _count(rows: list[Row]) -> str:
    words = [verdict(row).split()[0] for row in rows if verdict(row)]
    asked = 0
    for case in cases("all"):
        shared = {
            "suite": case.suite,
            "op": case.op,
            "mode": case.mode,
            "law": case.law,
            "B": str(case.batch),
            "H": str(case.hidden),
        }
        held = [shared | {"provider": provider} for provider in case.providers]
        asked += len(THREADS) * sum(target(row) is not None or limit(row) is not None for row in held)
    missing = max(0, asked - len(words))
    text = f"**{words.count('met')} targets met, {words.count('missed')} missed**"
    return text + (f", {missing} not measured." if missing else ".")


def _table(rows: list[Row]) -> str:
    threads = sorted({int(row["threads"]) for row in rows})
    has_memory = any(row["peak_mem_mb"] for row in rows)
    heads = ["op", "mode", "lengths", "B, T, I, H", "against"]
    for n in threads:
        at = f"{n} thread{'s' * (n > 1)}"
        heads += [f"{at}: ours", "theirs", "×", *(["peak MB, ours / theirs"] if has_memory else [])]
    found = {(_problem(row), row["provider"], int(row["threads"])): row for row in rows}
    lines = [heads, ["---"] * len(heads)]
    for problem, provider in dict.fromkeys((_problem(row), row["provider"]) for row in rows if not _is_base(row)):
        first = [problem[1], problem[2], problem[3], ", ".join(problem[4:8]), f"`{provider}`"]
        for n in threads:
            base = next(
                (found[problem, p, n] for p in ("dien_kernels", "gates_keep") if (problem, p, n) in found),
                None,
            )
            first += _cells(base, found.get((problem, provider, n)), has_memory)
        lines.append(first)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _problem(row: Row) -> Problem:
    return tuple(row[name] for name in _PROBLEM)


def _cells(base: Row | None, row: Row | None, has_memory: bool) -> list[str]:
    def cell(of: Row | None, show: Callable[[Row], str]) -> str:
        if of is None:
            return "not run"
        return f"{show(of)} {_strong(verdict(of))}".rstrip() if of["p50_us"] else of["note"]

    ratio = "" if row is None or not row["ratio"] else f"{_ratio(row)} {_strong(verdict(row))}".rstrip()
    theirs = "not run" if row is None else _time(row) if row["p50_us"] else row["note"]
    cells = [cell(base, _time), theirs, ratio]
    if has_memory:
        cells.append(" / ".join(of["peak_mem_mb"] if of else "" for of in (base, row)).strip(" /"))
    return cells


def write_between_marks(page: Path, text: str) -> None:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
