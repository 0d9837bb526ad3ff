"""The picture of the README: how long other software takes for the same work. The only file that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.registry import OURS, TITLES
from benchmarks.report import duration, select, times
from benchmarks.store import Row


class Panel(NamedTuple):
    title: str
    subtitle: str
    columns: dict[str, object]  # the rows that it is about
    providers: tuple[str, ...]


CASE = {"B": 128, "T": 100, "H": 36, "threads": 1}
PANELS = (
    Panel(
        "Training step of DIEN",
        "batch 128, histories of up to 100 behaviours",
        CASE | {"suite": "step", "op": "dien_mlp"},
        ("fuxictr_dien", "rechub_dien", "recbole_dien", "deepctr_dien"),
    ),
    Panel(
        "GRU alone, forward + backward",
        "batch 128, T = 100, H = 36",
        CASE | {"op": "gru", "mode": "fwd+bwd"},
        ("onednn", "compiled_loop", "torch_gru_padded", "torch_gru_packed"),
    ),
)
# The series: a bar of each for every provider, whose name stands beside them.
SERIES = {
    "full": {"label": "full: all histories have 100 behaviours", "color": "#9bb4d0"},
    "ragged": {"label": "ragged: 1 to 100 behaviours, 25 on average", "color": "#2f5d8c"},
}
OWN_COLOR, TEXT, LIGHT = "#d1495b", "#222222", "#777777"
REMARKS = {"rechub_dien": "smaller model", "fuxictr_dien": "no auxiliary loss"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes the picture; its format is that of the file's name. The same rows make the same SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "dien_kernels", "font.size": 9, "text.color": TEXT}):
        figure(rows).savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def figure(rows: Sequence[Row]) -> Any:
    """Horizontal bars, a panel for each kind of work: every provider's ratio on full and on ragged histories."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["suite"] in ("step", "speed", "peers") and row["ratio"]]
    drawn = Figure(figsize=(9.6, 3.7), layout="constrained", facecolor="white")
    panels = drawn.subplots(1, len(PANELS), gridspec_kw={"wspace": 0.06})
    for axes, panel in zip(panels, PANELS, strict=True):
        _draw_panel(axes, panel, select(rows, **panel.columns))
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    drawn.suptitle("Time relative to dien_kernels on one CPU thread: shorter is faster", fontweight="bold", fontsize=11)
    return drawn


def _draw_panel(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:
    names, height = [OURS], 0.38
    axes.barh(0, 1, 2 * height, color=OWN_COLOR, label=OURS)
    own = [f"{duration(float(row['p50_us']))} {kind}" for kind in SERIES for row in _of(rows, OURS, kind)[:1]]
    axes.text(1, 0, f"  1× = {', '.join(own)}", va="center", color=OWN_COLOR, fontweight="bold")
    for provider in panel.providers:
        place = len(names)
        names.append(TITLES[provider] + (f"\n({REMARKS[provider]})" if provider in REMARKS else ""))
        for kind, shift in zip(SERIES, (-height / 2, height / 2), strict=True):
            for row in _of(rows, provider, kind):
                ratio = float(row["ratio"])
                style = SERIES[kind] | ({} if place == 1 else {"label": None})
                axes.barh(place + shift, ratio, height, **style)
                axes.text(ratio, place + shift, f" {times(ratio)}", va="center", fontsize=8)
    axes.axvline(1, color=OWN_COLOR, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.get_yticklabels()[0].set(color=OWN_COLOR, fontweight="bold")
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_title(panel.title, fontsize=10, fontweight="bold", loc="left", pad=18)
    axes.text(0, 1.02, panel.subtitle, transform=axes.transAxes, color=LIGHT, fontsize=8.5, va="bottom")
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _of(rows: Sequence[Row], provider: str, lengths: str) -> list[Row]:
    return select(rows, provider=provider, length_distribution=lengths)
