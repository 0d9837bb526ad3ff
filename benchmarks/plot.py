"""The ratios as a picture; the only file that needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from benchmarks.registry import OWN
from benchmarks.store import Row, spread
from benchmarks.targets import target


def draw(rows: list[Row], path: Path) -> None:
    """Recurrences, a panel for each number of threads and a line for each case: every peer's ratio with its spread."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "dien_kernels", "font.size": 8}  # the same rows, the same file
    from matplotlib import pyplot, ticker

    chosen = [row for row in rows if row["suite"] in ("speed", "peers") and row["ratio"] and row["provider"] not in OWN]
    heights = {name: -i for i, name in enumerate(dict.fromkeys(case_name(row) for row in chosen))}
    providers = list(dict.fromkeys(row["provider"] for row in chosen))
    threads = sorted({row["threads"] for row in chosen})
    figure, panels = pyplot.subplots(
        1, len(threads), figsize=(11, 1.2 + 0.21 * len(heights)), sharey=True, squeeze=False, layout="constrained"
    )
    for n, axes in zip(threads, panels[0], strict=True):
        for i, provider in enumerate(providers):
            own = [row for row in chosen if row["threads"] == n and row["provider"] == provider]
            middle = [float(row["ratio"]) for row in own]
            below = [m - spread(row)[0] for m, row in zip(middle, own, strict=True)]
            above = [spread(row)[1] - m for m, row in zip(middle, own, strict=True)]
            style = {"fmt": "osD^vP*X<>"[i % 10], "markersize": 4, "color": f"C{i % 10}", "elinewidth": 0.8}
            y = [heights[case_name(row)] for row in own]
            axes.errorbar(middle, y, xerr=[below, above], label=provider if n == threads[0] else None, **style)
            asked = [(target(row), heights[case_name(row)]) for row in own if target(row) is not None]
            axes.scatter([a for a, _ in asked], [b for _, b in asked], marker="|", s=60, color=f"C{i % 10}")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(f"{n} thread{'s' * (n != '1')}")
        axes.set_xlabel("times as long as dien_kernels takes (bar: target)")
        axes.grid(axis="both", linewidth=0.3)
        axes.xaxis.set_major_locator(ticker.FixedLocator([0.5, 1, 2, 3, 5, 10, 20, 50]))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    panels[0][0].set_yticks(list(heights.values()), list(heights))
    figure.legend(loc="outside lower center", ncols=6)
    figure.savefig(path, metadata={"Date": None})


def case_name(row: Row) -> str:
    size = ", ".join(row[name] for name in "BTIH")
    return f"{row['op']} {row['mode']} {row['law']}  {size}"
