"""What the benchmarks' report makes of rows: verdicts, shares of the machine, summaries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import report, store, summary, targets
from benchmarks.admission import draw
from benchmarks.limits import work
from benchmarks.registry import PADS, WRONG_GRADIENT, Case
from benchmarks.store import COLUMNS, Row

SPEED = {"suite": "speed", "op": "gru", "mode": "fwd", "law": "full", "B": "128", "T": "100", "I": "36", "H": "36"}


def row(provider: str, **values: str) -> Row:
    return dict.fromkeys(COLUMNS, "") | SPEED | {"dtype": "float32", "threads": "1", "provider": provider} | values


def ratio(middle: float, spread: float = 0.1) -> dict[str, str]:
    return {
        "p50_us": "1000",
        "ratio": f"{middle}",
        "ratio_p20": f"{middle - spread / 2}",
        "ratio_p80": f"{middle + spread / 2}",
        "ratio_low": f"{middle - spread}",
        "ratio_high": f"{middle + spread}",
    }


@pytest.mark.parametrize(
    "given, words",
    [
        (row("torch_gru_padded", **ratio(1.8)), "met 1.8×"),
        (row("torch_gru_padded", **ratio(1.79)), "missed 1.8×"),
        (row("torch_gru_padded"), ""),  # no number, no verdict
        (row("eager_loop", **ratio(9)), ""),  # nothing was asked
        (row("dien_kernels", p50_us="10", of_peak="0.55"), "met 55%"),
        (row("dien_kernels", p50_us="10", of_peak="0.5499"), "missed 55%"),
        (row("step_compiled", suite="step", op="dien_mlp", mode="step", **ratio(1.0)), "met at most 1×"),
        (row("step_compiled", suite="step", op="dien_mlp", mode="step", **ratio(1.01)), "missed at most 1×"),
        (row("dien_kernels", suite="latency", mode="call", p50_us="30.1"), "missed 30 µs"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["provider"],
)
def test_verdict(given: Row, words: str) -> None:
    assert targets.verdict(given) == words


def test_memory_is_compared_with_our_own_row() -> None:
    step = {"suite": "step", "op": "dien_mlp", "mode": "step"}
    ours = row("dien_kernels", **step, peak_mem_mb="10.0")
    assert targets.memory_verdict(ours, row("deepctr_dien", **step, peak_mem_mb="30.0")) == "met 3×"
    assert targets.memory_verdict(ours, row("deepctr_dien", **step, peak_mem_mb="29.9")) == "missed 3×"
    assert targets.memory_verdict(None, row("deepctr_dien", **step, peak_mem_mb="29.9")) == ""


def test_count_is_of_the_targets_asked() -> None:
    """Rows of other threads or sizes neither count nor hide that an asked one is missing."""

    def counted(*rows: Row) -> list[int]:
        return [int(word) for word in re.findall(r"\d+", targets.count(list(rows)))]

    met, missed, missing = counted(row("torch_gru_padded", **ratio(1.8)), row("torch_gru_padded", **ratio(1), H="64"))
    assert (met, missed) == (1, 0)  # (128, 100, 36, 64) is no case
    assert counted(row("torch_gru_padded", **ratio(1.79))) == [0, 1, missing]
    assert counted(row("torch_gru_padded", **ratio(9), threads="4")) == [0, 0, missing + 1]


def test_notes_stand_under_the_table() -> None:
    rows = [
        row("compiled_loop", note=f"ten steps a graph; compiled in {n} s", **ratio(n), B=f"{n}", machine="m", date="d")
        for n in (3, 4)
    ]
    text = report.markdown(rows)
    assert "- `compiled_loop`: ten steps a graph" in text
    assert "compiled in" not in text


def test_another_run_is_counted_by_the_stated_spread() -> None:
    """The first has 2 from 1.9 to 2.1, and a tenth more: up to 2.31."""
    first = [
        row("torch_gru_padded", **ratio(2.0)),
        row("torch_gru_packed", **ratio(3.0)),
        row("dien_kernels", **ratio(1)),
    ]
    again = [
        row("torch_gru_padded", **ratio(2.2)),
        row("torch_gru_packed", **ratio(3.5)),
        row("eager_loop", **ratio(5)),
    ]
    pairs = report.pairs_of(first, again)
    *moved, counted = report.reproduced(pairs).splitlines()
    assert len(moved) == 1
    assert "torch_gru_packed" in moved[0]
    assert "1 of 2 ratios within their stated spread (0 within the unwidened one)" in counted
    assert "half of them moved by at most 10.0%, nine in ten by at most 16.7%" in counted
    assert counted in report.counts(first, again)
    assert counted in summary.text(first, "page.md", "picture.svg", again)
    assert "once more" not in report.counts(first, [])


def test_the_sittings_of_two_runs_count_in_the_spread(tmp_path: Path) -> None:
    def run(name: str, **ratios: float) -> Path:
        store.append(tmp_path / name, [row(provider, **ratio(middle)) for provider, middle in ratios.items()])
        return tmp_path / name

    one = run("one.csv", higher=1.0, lower=2.0, alone=4.0)
    run("one.csv", higher=2.0)  # the newest counts
    old = row("old", **ratio(2.0)) | {"ratio_low": "", "ratio_high": ""}  # of one sitting
    store.append(one, [row("absent", note="absent"), old])
    two = run("two.csv", higher=9.0, lower=1.8, absent=3.0, old=2.5, other=5.0)
    run("two.csv", higher=2.3)

    read = {given["provider"]: given for given in store.read_runs([one, two])}
    assert read.keys() == {"higher", "lower", "alone", "absent", "old"}
    assert (read["higher"]["ratio"], read["lower"]["ratio"]) == ("2.0", "2.0")
    assert store.spread(read["higher"]) == pytest.approx((1.9 / 1.1, 2.4 * 1.1))
    assert store.spread(read["lower"]) == pytest.approx((1.7 / 1.1, 2.1 * 1.1))
    assert store.spread(read["alone"]) == pytest.approx((3.9 / 1.1, 4.1 * 1.1))
    assert read["old"] == old
    assert not read["absent"]["ratio_low"]  # without a number of the first run there is none to state


def test_a_wrong_gradient_is_named_beside_its_ratio() -> None:
    wrong = row(
        "onednn", suite="peers", op="gru", note=f"{WRONG_GRADIENT}: x is off", machine="m", date="2018", **ratio(2.5)
    )
    assert "wrong gradient" in report.one_line(wrong)
    assert "2.50× (2.18–2.86) wrong gradient, met" in report.markdown([wrong])


def test_summary_shows_the_smallest_and_the_largest_and_no_variant_of_ours() -> None:
    rows = [
        row("torch_gru_padded", **ratio(2.0), machine="m", date="2018"),
        row("torch_gru_padded", **ratio(1.2), H="64", date="2018"),
        row("gates_recompute", **ratio(1.1), date="2018"),
    ]
    text = summary.text(rows, "page.md", "picture.svg")
    assert "| `torch_gru_padded` | 1.2–2× |" in text
    assert "gates_recompute" not in text


def test_summary_marks_what_computes_more_or_otherwise_or_less_often() -> None:
    rows = [
        row("openvino", **ratio(2.0), note=f"openvino; {PADS}", machine="m", date="2018"),
        row("onednn", **ratio(1.2), note=f"{WRONG_GRADIENT}: x is off", date="2018"),
        row("onednn", **ratio(1.2), H="64", date="2018"),
    ]
    text = summary.text(rows, "page.md", "picture.svg")
    assert "| `openvino` | 2×ᵖ (1 of 2) |" in text
    assert "| `onednn` | 1.2×ʷ |" in text
    step = {"suite": "step", "op": "dien_mlp", "mode": "step"}
    rows = [row(name, **ratio(3.0), **step, machine="m", date="2018") for name in ("deepctr_dien", "fuxictr_dien")]
    text = summary.text(rows, "page.md", "picture.svg")
    assert "| `deepctr_dien` | 3× |" in text
    assert "| `fuxictr_dien` | 3×ˢ |" in text


def test_summary_stands_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    summary.write_between_marks(page, "new")
    assert page.read_text() == f"before\n{summary.BEGIN}\nnew\n{summary.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        summary.write_between_marks(page, "new")


def test_work_counts_steps_that_exist() -> None:
    full = Case("speed", "gru", "fwd", 4, 6, 5, 3, "full", "float32", ())
    least = work(full, draw(full))
    assert least is not None
    assert least.flops == 4 * 6 * 6 * 3 * (5 + 3)
    assert least.bytes == 4 * (4 * 6 * 5 + 4 * 6 * 3)
    ragged = full._replace(law="ragged", mode="fwd+bwd")
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
