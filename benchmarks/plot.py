"""The ratios as a picture; the only file that needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import target
from benchmarks.store import Row


def draw(rows: list[Row], path: Path) -> None:
    """One line a problem and peer of the suite ``speed``: ratio, its spread, and the target as a tick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    chosen = [row for row in rows if row["suite"] == "speed" and row["ratio"] and row["provider"] != "dien_kernels"]
    names = {row_name(row): row for row in chosen}
    heights = {name: -i for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(names)), layout="constrained")
    for threads in sorted({row["threads"] for row in chosen}):
        own = [row for row in chosen if row["threads"] == threads]
        middle = [float(row["ratio"]) for row in own]
        spread = [
            [m - float(row["ratio_p20"]) for m, row in zip(middle, own, strict=True)],
            [float(row["ratio_p80"]) - m for m, row in zip(middle, own, strict=True)],
        ]
        y = [heights[row_name(row)] + (0.12 if threads == "1" else -0.12) for row in own]
        axes.errorbar(middle, y, xerr=spread, fmt="o", markersize=4, label=f"{threads} thread{'s' * (threads != '1')}")
    held = {name: target(row) for name, row in names.items()}
    ticks = [(value, heights[name]) for name, value in held.items() if value is not None]
    axes.plot([v for v, _ in ticks], [h for _, h in ticks], "k|", markersize=9, label="target")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as long as dien_kernels takes")
    axes.set_yticks(list(heights.values()), list(heights), fontsize=7)
    axes.xaxis.set_major_locator(ticker.FixedLocator([0.5, 1, 2, 3, 5, 10, 20, 30]))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path)


def row_name(row: Row) -> str:
    size = ",".join(row[name] for name in "BTIH")
    return f"{row['op']} {row['mode']} {row['law']} {size} / {row['provider']}"
