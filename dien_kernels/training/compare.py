"""The rows of the DIEN paper's table, trained with the same data, split, negatives and seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dien_kernels.data import Prepared
from dien_kernels.models import MODELS
from dien_kernels.training import checkpoint, setup
from dien_kernels.training.config import Config, differences
from dien_kernels.training.evaluation import (
    BEST,
    CONFIG,
    PREDICTIONS,
    RESULT,
    Predictions,
    check_fingerprint,
)
from dien_kernels.training.loop import train
from dien_kernels.training.metrics import bootstrap_difference
from dien_kernels.training.upgrade import load_saved


class Row(NamedTuple):
    """One row of the table: a model, options on top of the config's, and whether it sees histories."""

    model: str
    options: dict[str, Any]
    history: bool = True


ROWS = {
    "target_only": Row("average", {}, history=False),
    "average": Row("average", {}),
    "din": Row("din", {}),
    "gru_attention": Row("gru_attention", {"auxiliary": None}),
    "gru": Row("gru", {}),
    "dien_no_auxiliary": Row("dien", {"auxiliary": None}),
    "dien": Row("dien", {}),
}
MAIN_ROW = "dien"  # the differences are this row's AUC minus that of each other row
JSON, CSV = "comparison.json", "comparison.csv"
METRICS = ("auc", "user_auc", "log_loss")


def compare(
    config: Config,
    rows: Sequence[str] = tuple(ROWS),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    samples: int = 1000,
) -> dict[str, Any]:
    """Train every row with every seed and compare them on the test split.

    ``config`` holds for all rows; of ``model.options`` and ``model.preset`` a row takes what its model has.
    Rows are those of ``ROWS``: the paper's, and "target_only", the base model with empty histories, the
    floor. Every row of a seed reads the same batches with the same negatives.

    Each pair of row and seed is a run of its own in ``<output.folder>/<row>-seed<seed>``: finished ones are
    not trained again, an interrupted one is resumed, and so are those of fewer epochs. comparison.json and
    comparison.csv are written beside them; test predictions are in the runs.

    Returns the content of comparison.json: "runs", a result for each pair; "summary", mean and sample
    standard deviation of each metric over seeds; "differences", DIEN's AUC minus each row's with the paired
    bootstrap interval of ``metrics.bootstrap_difference`` over ``samples`` draws of test users.

    Raises ``ValueError`` for unknown rows, no seeds, or runs of another config in the folder, and what
    ``train`` raises.
    """
    unknown = [name for name in rows if name not in ROWS]
    if unknown or not rows:
        raise ValueError(f"models must be some of {', '.join(ROWS)}, got {', '.join(unknown) or 'none'}")
    if len(set(rows)) < len(rows):
        raise ValueError(f"models must be different, got {', '.join(rows)}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different integers, got {list(seeds)}")
    folder = Path(config.output.folder)
    prepared = setup.open_data(config)
    config = config.with_("data", path=str(prepared.path), prepare={})  # so that each run can be opened by itself
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for seed in seeds:  # seed by seed, so that an early look compares like with like
        for name in rows:
            run = row_config(config, name, seed)
            runs[name].append({"row": name, **_result(run, prepared)})
    content: dict[str, Any] = {
        "data": prepared.fingerprint,
        "seeds": list(seeds),
        "config": config.to_dict(),
        "runs": [result for results in runs.values() for result in results],
        "summary": {name: _summary(results) for name, results in runs.items()},
        "differences": _differences(folder, rows, seeds, samples),
    }
    with checkpoint.atomic(folder / JSON) as file:
        file.write(json.dumps(content, indent=1).encode())
    with checkpoint.atomic(folder / CSV) as file:
        file.write(_csv(content["runs"]).encode())
    return content


def row_config(config: Config, name: str, seed: int) -> Config:
    """The config of one run: what the row's model does not know of ``model`` is left out."""
    row = ROWS[name]
    kind = MODELS[row.model]
    known = kind.options()
    shared = {key: value for key, value in config.model.options.items() if key in known}
    options = kind.without_fixed(shared) | row.options
    preset = config.model.preset if config.model.preset in kind.PRESETS else None
    folder = Path(config.output.folder) / f"{name}-seed{seed}"
    return (
        config.with_("model", name=row.model, preset=preset, options=options)
        .with_("data", history=row.history and config.data.history)
        .with_("training", seed=seed)
        .with_("output", folder=str(folder), report=False)
    )


def _result(config: Config, prepared: Prepared) -> dict[str, Any]:
    folder = Path(config.output.folder)
    if not checkpoint.steps(folder / setup.CHECKPOINTS):
        return train(config, prepared=prepared)
    before = load_saved(folder / CONFIG)
    changed = differences(before.to_dict(), config.to_dict())
    if before.training.epochs > config.training.epochs:  # more are the same run, longer
        changed.append(f"training.epochs was {before.training.epochs}, is {config.training.epochs}")
    if changed:
        raise ValueError(f"{folder} holds a run of another config: {'; '.join(changed)}; choose another output.folder")
    if before.training.epochs < config.training.epochs or not (folder / RESULT).exists():
        return train(config, resume=True, prepared=prepared)
    check_fingerprint(checkpoint.load(folder / setup.CHECKPOINTS / BEST), prepared)
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return result


def _summary(results: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    summary = {}
    for metric in METRICS:
        values = [r["test"][metric] for r in results if r["test"][metric] is not None]
        mean = float(np.mean(values)) if values else None
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary[metric] = {"mean": mean, "std": std}
    speeds = [r["samples_per_second"] for r in results]
    return summary | {"samples_per_second": {"mean": float(np.mean(speeds)), "std": None}}


def _differences(folder: Path, rows: Sequence[str], seeds: Sequence[int], samples: int) -> dict[str, dict[str, float]]:
    if MAIN_ROW not in rows:
        return {}

    def of(name: str) -> list[Predictions]:
        return [Predictions.read(folder / f"{name}-seed{seed}" / PREDICTIONS) for seed in seeds]

    main = of(MAIN_ROW)
    label = main[0].label
    group = main[0].group if main[0].group is not None else np.arange(len(label))
    if label.min() == label.max():
        return {}
    found = {}
    for name in rows:
        if name == MAIN_ROW:
            continue
        other = of(name)
        if any(_rows_of(p) != _rows_of(main[0]) for p in (*main, *other)):
            raise ValueError(f"the test rows of {name} are not those of {MAIN_ROW}: the runs read different data")
        mean, low, high = bootstrap_difference(
            label, group, [p.logit for p in main], [p.logit for p in other], samples=samples
        )
        found[name] = {"difference": mean, "low": low, "high": high}
    return found


def _rows_of(predictions: Predictions) -> tuple[bytes, bytes | None]:
    """Which rows these are: labels alone are often 1 0 1 0 ... whoever the users are."""
    return predictions.label.tobytes(), None if predictions.group is None else predictions.group.tobytes()


def _csv(runs: Iterable[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "row",
            "seed",
            "best_step",
            "steps",
            "valid_auc",
            *(f"test_{m}" for m in METRICS),
            "samples_per_second",
        ]
    )
    for r in runs:
        test = [r["test"][m] for m in METRICS]
        valid = r["valid"]["auc"]
        writer.writerow([r["row"], r["seed"], r["best_step"], r["steps"], valid, *test, r["samples_per_second"]])
    return buffer.getvalue()


def table(content: dict[str, Any]) -> str:
    """The comparison as Markdown for the terminal and README."""
    seeds = len(content["seeds"])
    head = ["model", "test AUC", "per-user AUC", "log loss", f"{MAIN_ROW} minus it, 95 % interval"]
    lines = [head]
    for name, summary in content["summary"].items():
        difference = content["differences"].get(name)
        words = "–"
        if difference is not None:
            words = "{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**difference)
        lines.append([name, *(_plus_minus(summary[m]) for m in METRICS), words])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    of_seeds = f"{seeds} seed{'s' if seeds > 1 else ''}"
    note = f"Mean ± standard deviation over {of_seeds}; intervals: paired bootstrap over test users."
    return "\n".join([*text, "", note])


def _plus_minus(value: dict[str, float | None]) -> str:
    if value["mean"] is None or math.isnan(value["mean"]):
        return "not defined"
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")
