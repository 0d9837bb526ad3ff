"""The README's few lines: for each peer the range of its ratios, smallest first, with a picture and a link to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.registry import OTHER_WORK, OWN, PADS, WRONG_GRADIENT
from benchmarks.report import about, counts
from benchmarks.store import Row
from benchmarks.targets import problem

MARKS = {"ᵖ": PADS, "ʷ": WRONG_GRADIENT}
LEGEND = (
    "ᵖ computes the padding of ragged rows too. ʷ timed although its gradients are wrong. ˢ a smaller model, or one "
    "without auxiliary loss. "
    "(n of m): at so many of the sizes and threads; at the others it was not asked, or has a note instead of a number."
)
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


def text(rows: list[Row], page: str, picture: str, again: Sequence[Row] = ()) -> str:
    recurrences = [row for row in rows if row["suite"] in ("speed", "peers")]
    steps = [row for row in rows if row["suite"] == "step" and row["op"] == "dien_mlp"]
    requests = [row for row in rows if row["suite"] == "score"]
    return "\n\n".join((
        f"How many times as long others take, least to most over the sizes and threads of [the full tables]({page}):",
        f"![Ratios of every peer at every size]({picture})",
        _ranges(recurrences, "recurrence", lambda row: f"{row['op']} {row['mode']}, {row['law']}"),
        _ranges(steps, "a training step", lambda row: f"batch {row['B']}, {row['law']}"),
        _ranges(requests, "a scoring request", lambda row: f"{int(row['B']):,} candidate{'s' * (row['B'] != '1')}"),
        LEGEND,
        f"{counts(rows, again)} {about(rows)}",
    ))  # fmt: skip


def _ranges(rows: list[Row], title: str, column: Callable[[Row], str]) -> str:
    """A line for each peer, a column for each kind of case; threads and sizes are within the range."""
    there = [row for row in rows if row["ratio"] and row["provider"] not in OWN]
    columns = list(dict.fromkeys(column(row) for row in there))
    lines = [[title, *columns], ["---"] * (1 + len(columns))]
    for provider in dict.fromkeys(row["provider"] for row in there):
        line = [f"`{provider}`"]
        for name in columns:
            among = [row for row in there if column(row) == name]
            line.append(_range([row for row in among if row["provider"] == provider], among))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _range(rows: list[Row], among: list[Row]) -> str:
    """The ratios of ``rows``, marked; with their number where others of ``among`` have more cases."""
    if not rows:
        return ""
    ratios = [float(row["ratio"]) for row in rows]
    low, high = (f"{value:.3g}" for value in (min(ratios), max(ratios)))
    text = f"{low}×" if low == high else f"{low}–{high}×"
    text += "".join(mark for mark, words in MARKS.items() if any(words in row["note"] for row in rows))
    text += "ˢ" * any(row["suite"] == "step" and row["provider"] in OTHER_WORK for row in rows)
    every = len({(problem(row)[1:], row["threads"]) for row in among})
    return text if len(rows) == every else f"{text} ({len(rows)} of {every})"


def write_between_marks(page: Path, words: str) -> None:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{words}\n{END}{after}")
