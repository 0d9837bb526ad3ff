"""How well the ratios repeat: ``results/cpu.csv`` beside the later runs of the same cases, ``results/cpu_*.csv``.

python -m benchmarks.repeats           # the sentence that the pages state, and the ratios that changed most
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.registry import BASES
from benchmarks.store import DEFAULT, FOLDER, Row, interval, key, newest, of_one_machine, read

PATHS = tuple(sorted(FOLDER.glob("cpu_*.csv")))


def pairs(rows: Sequence[Row], paths: Sequence[Path] = PATHS) -> list[tuple[Row, Row]]:
    """Each row that has a ratio, with the same row of each repeat."""
    first = {key(row): row for row in rows if row["ratio"] and row["provider"] not in BASES}
    repeats = [row for path in paths for row in newest(read(path)).values() if row["ratio"]]
    return [(first[key(row)], row) for row in repeats if key(row) in first]


def with_common_intervals(rows: Sequence[Row], paths: Sequence[Path] = PATHS) -> list[Row]:
    """The rows, their intervals widened to hold those of the repeats; medians and all else stay as they are."""
    found = {key(row): row for row in rows}
    for first, again in pairs(rows, paths):
        ends = [*interval(found[key(first)]), *interval(again)]
        found[key(first)] = found[key(first)] | {"ratio_low": str(min(ends)), "ratio_high": str(max(ends))}
    return list(found.values())


def change(pair: tuple[Row, Row]) -> float:
    """By which fraction a ratio changed."""
    return abs(float(pair[1]["ratio"]) / float(pair[0]["ratio"]) - 1)


def sentence(rows: Sequence[Row], paths: Sequence[Path] = PATHS) -> str:
    """How far the ratios of the repeats are from those of ``rows``; empty without repeats."""
    changes = sorted(map(change, pairs(rows, paths)))
    if not changes:
        return ""
    half, most = changes[(len(changes) - 1) // 2], changes[(len(changes) * 9 - 1) // 10]
    times = {1: "one repeat run", 2: "two repeat runs"}.get(len(paths), f"{len(paths)} repeat runs")
    return f"In {times}, half of the ratios changed by at most {half:.0%} and nine in ten by at most {most:.0%}."


def main() -> None:
    rows = of_one_machine(read(DEFAULT))
    print(sentence(rows) or "There is no repeat run of these rows.")
    for first, again in sorted(pairs(rows), key=change, reverse=True)[:10]:
        print(f"{first['ratio']} then {again['ratio']}: {', '.join(key(first)[:11])}")


if __name__ == "__main__":
    main()
