"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import torch

from dien_kernels._options import user_path
from dien_kernels.batch import Batch
from dien_kernels.data import Prepared
from dien_kernels.ops import use_backend
from dien_kernels.training import checkpoint, logs, setup
from dien_kernels.training.config import dump
from dien_kernels.training.evaluation import RESULT, open_run
from dien_kernels.training.profile import PARTS, time_parts

FILE = "report.html"
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
pre { background: #f5f5f5; padding: 1rem }
.bar { background: #4c72b0; height: .8rem; display: block }"""


def write_report(folder: str | Path, *, prepared: Prepared | None = None, steps: int = 20) -> Path:
    """Write ``<folder>/report.html`` for a finished run; returns its path.

    It shows the metrics, the curves of loss and AUC, the time of a training step by part (measured now over
    ``steps`` steps), the attention over one test user's history with item names, and the config.
    ``prepared`` is the data where it is already open. Raises as ``open_run`` does, and ``FileNotFoundError`` if the
    run is not finished.
    """
    folder = user_path(folder, "folder")
    if not (folder / RESULT).exists():
        raise FileNotFoundError(f"{folder} is not a finished run: there is no {RESULT}")
    result = json.loads((folder / RESULT).read_text())
    config, prepared, model = open_run(folder, prepared=prepared)
    times = time_parts(config, prepared, steps=steps)
    sections = [
        f"<h1>{html.escape(config.model.name)}, seed {config.training.seed}</h1>",
        _metrics(result, on_test=config.data.validate_on == "test"),
        "<h2>Loss and AUC</h2>",
        _image(_curves(logs.read(folder / logs.FILE)), "loss and AUC over the training steps"),
        "<h2>Time of a training step by part</h2>",
        _image(_time_chart(times), "time by part"),
        _time_table(times, steps),
        "<h2>Attention over one user's history</h2>",
        _attention(config, prepared, model),
        f"<h2>Config</h2><pre>{html.escape(dump(config))}</pre>",
    ]
    title = html.escape(f"{config.model.name}: {folder.name}")
    head = f"<meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(sections)}</body></html>"
    path = folder / FILE
    with checkpoint.atomic(path) as file:
        file.write(page.encode())
    return path


def _table(header: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _metrics(result: dict[str, Any], on_test: bool) -> str:
    looked = "so its metrics are optimistic" if on_test else "the test split was looked at once, with it"
    rows = [
        [
            split,
            _number(m["auc"]),
            _number(m["user_auc"]),
            _number(m["log_loss"]),
            f"{m['rows']:,}",
            f"{m['users']:,}",
        ]
        for split, m in (
            ("test, as validation" if on_test else "validation", result["valid"]),
            ("test", result["test"]),
        )
    ]
    reasons = "".join(
        f"<p>{split}: {name} is not defined, {html.escape(why)}.</p>"
        for split in ("valid", "test")
        for name, why in result[split]["reasons"].items()
    )
    text = (
        f"<p>The best of {result['steps']:,} steps on the {'test' if on_test else 'validation'} split is step "
        f"{result['best_step']:,}; {looked}. {result['samples_per_second']:,.0f} samples/s in "
        f"{result['training_seconds']:.0f} s of training steps; {result['parameters']:,} parameters.</p>"
    )
    header = ["split", "AUC", "per-user AUC", "log loss", "rows", "users with both classes"]
    return _table(header, rows) + reasons + text


def _figure(columns: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _image(figure: Any, words: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return f"<img alt='{words}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _curves(rows: list[dict[str, Any]]) -> Any:
    figure, (loss, auc) = _figure(2, 3.6)
    train = [r for r in rows if r["kind"] == "train"]
    valid = [r for r in rows if r["kind"] == "valid"]
    for key, words in (("loss", "total"), ("click", "click"), ("auxiliary", "auxiliary")):
        if any(r[key] for r in train):
            loss.plot([r["total"] for r in train], [r[key] for r in train], label=f"training, {words}", linewidth=1)
    loss.plot([r["total"] for r in valid], [r["log_loss"] for r in valid], "o-", label="validation, log loss")
    known = [r for r in train if r["auc"] is not None]
    auc.plot([r["total"] for r in known], [r["auc"] for r in known], label="training, each window", linewidth=1)
    known = [r for r in valid if r["auc"] is not None]
    auc.plot([r["total"] for r in known], [r["auc"] for r in known], "o-", label="validation")
    for axes, name in ((loss, "loss"), (auc, "AUC")):
        axes.set(xlabel="step", ylabel=name)
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def _time_chart(times: dict[str, dict[str, float]]) -> Any:
    figure, (axes,) = _figure(1, 3)
    names = [p for p in PARTS if any(p in times[side] for side in times)]
    forward, backward = ([times[side].get(p, 0.0) for p in names] for side in ("forward", "backward"))
    axes.barh(names, forward, label="forward (data, optimiser: all of it)")
    axes.barh(names, backward, left=forward, label="backward of the part's autograd nodes")
    axes.invert_yaxis()
    axes.set(xlabel="ms a step")
    axes.legend()
    return figure


def _time_table(times: dict[str, dict[str, float]], steps: int) -> str:
    total = sum(sum(side.values()) for side in times.values())
    rows = []
    for part in PARTS:
        forward, backward = times["forward"].get(part, 0.0), times["backward"].get(part, 0.0)
        if forward or backward:
            share = 100 * (forward + backward) / total
            rows.append([part, f"{forward:.2f}", f"{backward:.2f}", f"{share:.0f} %"])
    note = (
        f"<p>Means of {steps} steps with {torch.get_num_threads()} thread(s); {total:.1f} ms a step with the "
        "clock running. Backward: each autograd node counts for the part whose forward created it. Data: the "
        "wait for a batch. Loss: what follows the last part. Other: what no part claims.</p>"
    )
    return _table(["part", "forward, ms", "backward, ms", "share"], rows) + note


def _attention(config: Any, prepared: Prepared, model: Any) -> str:
    """The attention of one clicked test row, over a history long enough to tell and short enough to read."""
    with use_backend(config.training.backend), torch.no_grad():
        batch = next(setup.batches(config, setup.open_loader(config, prepared, "test"), 0))
        row, history, lengths = _row_to_show(batch)
        output = model(batch.to(setup.device_of(config)))
    if output.attention is None:
        return f"<p>{html.escape(config.model.name)} has no attention.</p>"
    start = int(lengths[:row].sum())
    scores = output.attention[start : start + int(lengths[row])].float().cpu().tolist()
    items = next(iter(batch.history.values()))[int(batch.offsets[history]) : int(batch.offsets[history + 1])].tolist()
    largest = max([abs(s) for s in scores] + [1e-12])
    rows = [
        [
            html.escape(str(prepared.item_name(item))),
            f"{score:.4f}",
            f"<span class='bar' style='width:{12 * abs(score) / largest:.2f}rem'></span>",
        ]
        for item, score in zip(items, scores, strict=True)
    ]
    target = html.escape(str(prepared.item_name(int(next(iter(batch.target.values()))[row]))))
    probability = float(output.logits[row].float().sigmoid())
    text = f"<p>Target: <b>{target}</b>, clicked; predicted probability {probability:.3f}. Oldest first.</p>"
    return text + _table(["item", "attention", ""], rows)


def _row_to_show(batch: Batch) -> tuple[int, int, torch.Tensor]:
    """A clicked row, its history's number, and all rows' history lengths."""
    each = batch.offsets.diff()
    of = torch.arange(batch.rows) if batch.history_of is None else batch.history_of
    lengths = each[of]
    if batch.label is None:
        raise ValueError("the test split has no labels")
    # The clicked row whose history is nearest to a dozen behaviours.
    distance = (lengths - 12).abs() + 10**6 * (batch.label < 0.5)
    row = int(distance.argmin())
    return row, int(of[row]), lengths
