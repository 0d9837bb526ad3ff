"""What the benchmarks make of stored rows: pages, the picture, the check of targets, shares of the machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check, plot, repeats, report, store
from benchmarks.check import Target
from benchmarks.programs import draw
from benchmarks.registry import DIENS, OURS, OWN, TITLES, WRONG_GRADIENT, Case, cases
from benchmarks.roofline import work
from benchmarks.store import COLUMNS, Row

SPEED = {"suite": "speed", "op": "gru", "mode": "fwd", "length_distribution": "full"}
SPEED |= {"B": "128", "T": "100", "I": "36", "H": "36"}
STEP = {"suite": "step", "op": "dien_mlp", "mode": "step"}


def row(provider: str, **values: str) -> Row:
    about = {"dtype": "float32", "threads": "1", "machine": "m", "date": "2018", "provider": provider}
    return dict.fromkeys(COLUMNS, "") | SPEED | about | values


def ratio(middle: float, spread: float = 0.1) -> dict[str, str]:
    return {
        "p50_us": "1000",
        "ratio": f"{middle}",
        "ratio_p20": f"{middle - spread / 2}",
        "ratio_p80": f"{middle + spread / 2}",
        "ratio_low": f"{middle - spread}",
        "ratio_high": f"{middle + spread}",
    }


def stored() -> list[Row]:
    return store.of_one_machine(store.read(store.DEFAULT))


# The check of targets.


@pytest.mark.parametrize(
    "kind, bound, given, met",
    [
        ("ratio", 1.8, row("torch_gru_padded", **ratio(1.8)), True),
        ("ratio", 1.8, row("torch_gru_padded", **ratio(1.79)), False),
        ("ratio", 1.8, row("torch_gru_padded"), None),
        ("share", 0.55, row(OURS, of_peak="0.55"), True),
        ("share", 0.55, row(OURS, of_peak="0.5499"), False),
        ("ceiling", 1.0, row("step_compiled", **STEP, **ratio(1.0)), True),
        ("ceiling", 1.0, row("step_compiled", **STEP, **ratio(1.01)), False),
        ("time", 30.0, row(OURS, p50_us="30"), True),
        ("time", 30.0, row(OURS, p50_us="30.1"), False),
        ("memory", 3.0, row("deepctr_dien", **STEP, peak_mem_mb="30.0"), True),
        ("memory", 3.0, row("deepctr_dien", **STEP, peak_mem_mb="29.9"), False),
        ("memory", 3.0, row("deepctr_dien", **STEP), None),
    ],
)
def test_a_target_is_met_at_its_bound(kind: str, bound: float, given: Row, met: bool | None) -> None:
    ours = row(OURS, **STEP, peak_mem_mb="10.0")
    rows = {check.key(own): own for own in (ours, given)}
    target = Target(kind, bound, given)
    found = check.figure(target, rows)
    assert (None if found is None else check.is_met(target, found)) is met
    assert check.figure(target, {}) is None


def test_every_kind_of_target_is_asked_of_rows_that_exist() -> None:
    """A misspelt name in a table of targets would ask for nothing."""
    targets = list(check.targets())
    assert {target.kind for target in targets} == check.KINDS.keys()
    kinds = {(case.suite, case.op, case.mode, case.length_distribution) for case in cases("all")}
    providers = {(case.suite, name) for case in cases("all") for name in case.providers}
    assert {key[:4] for key in check.RATIOS} <= kinds
    assert {(key[0], key[-1]) for key in (*check.RATIOS, *check.CEILINGS, *check.MEMORY)} <= providers
    assert check.SHARES.keys() <= kinds
    assert check.LIMITS_US.keys() <= {kind[:3] for kind in kinds}


def test_the_count_is_of_the_targets_asked() -> None:
    """Rows of other threads or sizes neither count nor hide that an asked one is missing."""

    def counted(*rows: Row) -> list[int]:
        last = check.report(rows)[0].splitlines()[-1]
        return [int(word) for word in re.findall(r"\d+", last)]

    met, missed, missing = counted(row("torch_gru_padded", **ratio(1.8)), row("torch_gru_padded", **ratio(1), H="64"))
    assert (met, missed) == (1, 0)  # (128, 100, 36, 64) is no case
    assert counted(row("torch_gru_padded", **ratio(1.79))) == [0, 1, missing]
    assert counted(row("torch_gru_padded", **ratio(9), threads="4")) == [0, 0, missing + 1]


def test_missed_targets_are_listed_first_with_their_figures() -> None:
    text, failed = check.report(
        [row("torch_gru_padded", **ratio(1.7)), row("torch_gru_padded", **ratio(9), threads="2")]
    )
    first, *_, last_target, count = text.splitlines()
    assert first.startswith("MISSED ")
    assert first.endswith("at least 1.80x: 1.70x")
    assert last_target.startswith("met ")
    assert f"1 targets met, 1 missed, {failed - 1} not measured" == count


# Repeat runs.


def test_intervals_hold_the_sessions_of_all_runs(tmp_path: Path) -> None:
    def run(name: str, **ratios: float) -> Path:
        store.append(tmp_path / name, [row(provider, **ratio(middle)) for provider, middle in ratios.items()])
        return tmp_path / name

    one = run("one.csv", higher=1.0, lower=2.0, alone=4.0)
    run("one.csv", higher=2.0)  # the newest counts
    store.append(one, [row("absent", note="absent")])
    two = run("two.csv", higher=9.0, lower=1.8, absent=3.0, other=5.0)
    run("two.csv", higher=2.3)

    rows = list(store.newest(store.read(one)).values())
    wide = {given["provider"]: given for given in repeats.with_common_intervals(rows, [two])}
    assert wide.keys() == {"higher", "lower", "alone", "absent"}
    assert (wide["higher"]["ratio"], wide["lower"]["ratio"]) == ("2.0", "2.0")
    assert store.interval(wide["higher"]) == pytest.approx((1.9, 2.4))
    assert store.interval(wide["lower"]) == pytest.approx((1.7, 2.1))
    assert store.interval(wide["alone"]) == pytest.approx((3.9, 4.1))
    assert not wide["absent"]["ratio_low"]  # without a ratio there is no interval to state
    assert "half of the ratios changed by at most 10% and nine in ten by at most 15%" in repeats.sentence(rows, [two])
    assert repeats.sentence(rows, []) == ""


def test_a_row_of_one_session_has_the_interval_of_its_rounds() -> None:
    old = row("old", **ratio(2.0)) | {"ratio_low": "", "ratio_high": ""}
    assert store.interval(old) == pytest.approx((1.95, 2.05))


# Pages.


def test_a_wrong_gradient_is_named_beside_its_ratio() -> None:
    values = {"suite": "peers", "op": "augru", "note": f"{WRONG_GRADIENT}: x is off"}
    wrong = row("onednn", **values, **ratio(2.5))
    assert "2.5× (2.4–2.6), wrong gradient" in report.one_line(wrong)
    assert "| oneDNN (wrong gradient) | 2.5× (2.4–2.6) |" in report.page([wrong])


def test_tables_show_the_smallest_and_the_largest_and_no_variant_of_ours() -> None:
    rows = [
        row("torch_gru_padded", **ratio(2.0)),
        row("torch_gru_padded", **ratio(1.2), threads="2"),
        row("torch_gru_padded", **ratio(6.0), length_distribution="ragged"),
        row("gates_recompute", **ratio(1.1)),
    ]
    text = report.page(rows)
    assert "| GRU | torch.nn.GRU, padded | 1.20–2.0× | 6.0× |" in text
    assert "gates_recompute" not in text


def test_a_provider_without_a_number_has_a_dash() -> None:
    rows = [row(OURS, **STEP, p50_us="42000"), row("recbole_dien", **STEP, **ratio(3.0))]
    rows.append(row("fuxictr_dien", **STEP, note="absent: no module"))
    assert "| 128 | full | 1 | 42 ms | – | 3.0× (2.9–3.1) | – | – | – |" in report.page(rows)


def test_peers_that_are_faster_are_counted_and_listed_first() -> None:
    rows = [
        row("torch_gru_padded", **ratio(0.9)),
        row("torch_gru_packed", **ratio(1.2)),
        row("openvino", **ratio(1.3), suite="peers"),
        row("openvino", **ratio(1.25), suite="peers", threads="2"),
        row("gates_recompute", **ratio(0.5)),
    ]
    words = report.page(rows).partition("## Where others come nearest")[2]
    assert "has 4 comparisons with other software. In 1 of them the other one is faster, and in 1 it" in words
    lines = [line for line in words.splitlines() if line.startswith("| GRU")]
    assert [line.split(" | ")[4] for line in lines] == ["torch.nn.GRU, padded", "torch.nn.GRU, packed", "OpenVINO"]
    assert "1.25×" in lines[-1]


def test_the_page_can_be_read_in_two_minutes() -> None:
    """At most six tables of at most 12 rows, and no line of the prose is wider than a screen."""
    text = report.page(stored())
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert 5 <= len(tables) <= 6
    assert all(3 <= len(table.strip().splitlines()) <= 2 + 12 for table in tables)
    assert "None" not in text
    assert "nan" not in text


def test_stored_pages_are_those_of_the_stored_rows() -> None:
    rows = stored()
    words, wide = repeats.sentence(rows), repeats.with_common_intervals(rows)
    root = Path(report.__file__).resolve().parents[1]
    assert (root / "docs" / "benchmarks.md").read_text() == report.page(wide, words)
    assert f"{report.BEGIN}\n{report.readme(wide, words)}{report.END}" in (root / "README.md").read_text()


def test_the_readme_names_the_fastest_and_the_slowest_other() -> None:
    rows = [row(OURS, **STEP, p50_us="42000")]
    rows += [row(name, **STEP, **ratio(n)) for name, n in zip(DIENS, (4.0, 3.6, 9.6, 5.0), strict=True)]
    text = report.readme([*rows, row("step_compiled", **STEP, **ratio(0.8))])
    assert "| DIEN training step, batch 128, full | 42 ms | RecBole: 3.6× | torch-rechub: 9.6× |" in text
    assert "takes 3 to 9 times as long" in text


def test_the_section_stands_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_between_marks(page, "new\n")
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        report.write_between_marks(page, "new")


def test_every_peer_has_a_title() -> None:
    peers = {name for case in cases("all") for name in case.providers} - set(OWN)
    assert peers <= TITLES.keys()


# The picture.


@pytest.fixture
def picture() -> Any:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (pip install '.[bench]')")
    return plot.figure(stored())


def test_no_two_series_look_alike(picture: Any) -> None:
    """Series are told apart by their colour, and a bar has no colour that the legend does not explain."""
    (legend,) = picture.legends
    colors = [handle.get_facecolor() for handle in legend.legend_handles]
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(set(labels)) == len(labels) == 1 + len(plot.SERIES)
    assert len(set(colors)) == len(labels)
    assert {bar.get_facecolor() for axes in picture.axes for bar in axes.patches} == set(colors)


def test_every_provider_is_drawn_once_in_each_series(picture: Any) -> None:
    for axes, panel in zip(picture.axes, plot.PANELS, strict=True):
        names = [label.get_text().partition("\n")[0] for label in axes.get_yticklabels()]
        assert names == [OURS, *(TITLES[name] for name in panel.providers)]
        assert len(set(names)) == len(names)
        assert len(axes.patches) == 1 + len(plot.SERIES) * len(panel.providers)


def test_bars_are_as_long_as_the_stored_ratios(picture: Any) -> None:
    axes, panel = picture.axes[0], plot.PANELS[0]
    found = report.select(stored(), provider=panel.providers[0], length_distribution="full", **panel.columns)
    assert axes.patches[1].get_width() == float(found[0]["ratio"])


def test_the_same_rows_make_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (pip install '.[bench]')")
    rows = stored()
    for name in ("one.svg", "two.svg"):
        plot.draw(rows, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


# Shares of the machine.


def test_work_counts_steps_that_exist() -> None:
    full = Case("speed", "gru", "fwd", 4, 6, 5, 3, "full", "float32", ())
    least = work(full, draw(full))
    assert least is not None
    assert least.flops == 4 * 6 * 6 * 3 * (5 + 3)
    assert least.bytes == 4 * (4 * 6 * 5 + 4 * 6 * 3)
    ragged = full._replace(length_distribution="ragged", mode="fwd+bwd")
    inputs = draw(ragged)
    assert inputs.lengths is not None
    steps = int(inputs.lengths.sum())
    least = work(ragged, inputs)
    assert steps < 4 * 6
    assert least is not None
    assert least.flops == 3 * steps * 6 * 3 * (5 + 3)
    assert work(full._replace(suite="latency"), draw(full)) is None


def test_work_counts_no_product_twice() -> None:
    """What rows, steps or pairs share is made once: a history's projection, a target's matrix, a state's product."""
    batch, steps, size = 4, 6, 3
    case = Case("shared", "augru_shared", "fwd", batch, steps, size, size, "full", "float32", ())
    least = work(case, draw(case))
    assert least is not None
    assert least.flops == 2 * 3 * size * size * (steps + batch * steps)
    case = case._replace(suite="units", op="attention_din")
    least = work(case, draw(case))
    first, rest = size * 80, 80 * 40 + 40
    assert least is not None
    assert least.flops == 2 * (batch * steps * (first + rest) + batch * first)
    case = case._replace(op="auxiliary_mlp")
    least = work(case, draw(case))
    state, behaviour, rest = size * 100, size * 100, 100 * 50 + 50
    assert least is not None
    assert least.flops == 2 * batch * (steps - 1) * (state + 2 * behaviour + 2 * rest)
    case = case._replace(op="auxiliary_inner")
    least = work(case, draw(case))
    assert least is not None
    assert least.flops == 2 * batch * (steps - 1) * 2 * size


def test_work_of_a_whole_model() -> None:
    """Every matrix with what it meets; a request has one history, and evolves it anew for each candidate."""
    batch, length, size = 4, 6, 6
    case = Case("step", "dien_mlp", "step", batch, length, size, size, "full", "float32", ())
    steps, pairs = batch * length, batch * (length - 1)
    gates, attention = 3 * size * size, size * 80 + 80 * 40 + 40
    mlp = batch * ((3 + size + size) * 200 + 200 * 80 + 80)
    auxiliary = pairs * (3 * size * 100 + 2 * (100 * 50 + 50))
    least = work(case, draw(case))
    assert least is not None
    assert least.flops == 3 * 2 * (4 * steps * gates + steps * attention + batch * size * 80 + auxiliary + mlp)
    inner = case._replace(op="dien_inner")
    least = work(inner, draw(inner))
    assert least is not None
    assert least.flops == 3 * 2 * (4 * steps * gates + steps * attention + batch * size * 80 + 2 * pairs * size + mlp)
    request = case._replace(suite="score", mode="request")
    least = work(request, draw(request))
    assert least is not None
    assert least.flops == 2 * (3 * length * gates + steps * gates + steps * attention + batch * size * 80 + mlp)
