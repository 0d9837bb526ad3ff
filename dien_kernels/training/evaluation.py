"""Predictions of a model over a split, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dien_kernels._options import user_path
from dien_kernels.data import Loader, Prepared
from dien_kernels.ops import use_backend
from dien_kernels.training import checkpoint, setup
from dien_kernels.training.config import Config
from dien_kernels.training.metrics import Metrics, measure
from dien_kernels.training.upgrade import load_saved

BEST, CONFIG = "best.pt", "config.yaml"
RESULT, PREDICTIONS = "result.json", "predictions-test.parquet"


class Predictions(NamedTuple):
    """Rows of a split in the loader's order: labels and logits float64 [B], users int64 [B] or None."""

    label: NDArray[np.float64]
    logit: NDArray[np.float64]
    group: NDArray[np.int64] | None

    def measure(self) -> Metrics:
        return measure(self.label, self.logit, self.group)

    def save(self, path: Path) -> None:
        """Parquet with columns label, logit, group; written atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        group = self.group if self.group is not None else pa.nulls(len(self.label), pa.int64())
        with checkpoint.atomic(path) as file:
            pq.write_table(pa.table({"label": self.label, "logit": self.logit, "group": group}), file)

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """The inverse of ``save``."""
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        group = table["group"]
        known = group.null_count == 0
        return cls(table["label"].to_numpy(), table["logit"].to_numpy(), group.to_numpy() if known else None)


def predict(model: nn.Module, loader: Loader, config: Config, stop: Callable[[], None] = lambda: None) -> Predictions:
    """The model's logits over all rows of a loader, in evaluation mode; ``stop`` is called before each
    batch."""
    device = setup.device_of(config)
    labels, logits, groups = [], [], []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in setup.batches(config, loader, 0):
                stop()
                with setup.autocast(config):
                    output = model(batch.to(device, non_blocking=True))
                if batch.label is None:
                    raise ValueError("rows without labels cannot be evaluated")
                labels.append(batch.label)
                logits.append(output.logits.float().cpu())
                groups.append(batch.group)
    finally:
        model.train(was_training)
    if not labels:
        return Predictions(np.empty(0), np.empty(0), None)
    known = [g for g in groups if g is not None]
    group = torch.cat(known).numpy() if len(known) == len(groups) else None
    return Predictions(torch.cat(labels).double().numpy(), torch.cat(logits).double().numpy(), group)


def open_run(
    folder: str | Path, overrides: list[str] | None = None, *, prepared: Prepared | None = None
) -> tuple[Config, Prepared, nn.Module]:
    """The config, data and best model of a run's ``folder``.

    ``overrides`` of the form ``section.key=value`` change the config of the run; ``prepared`` is the data where it is
    already open.

    Raises ``FileNotFoundError`` where there is no run, ``CheckpointError`` for a missing or damaged best
    checkpoint and ``ValueError`` where the data's fingerprint is not that of the training data.
    """
    folder = user_path(folder)
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {CONFIG}")
    config = load_saved(folder / CONFIG).with_("output", folder=str(folder)).override(overrides or [])
    if prepared is None:
        prepared = setup.open_data(config, reuse=True)
    content = checkpoint.load(folder / setup.CHECKPOINTS / BEST)
    check_fingerprint(content, prepared)
    model = setup.model_for(config, prepared)
    model.load_state_dict(content["model"])
    model.eval()
    return config, prepared, model


def check_fingerprint(content: dict[str, Any], prepared: Prepared) -> None:
    """Raise ``ValueError`` unless a checkpoint was trained on these very data."""
    if content["fingerprint"] != prepared.fingerprint:
        raise ValueError(
            f"the data are not those of the run: their fingerprint was {content['fingerprint']}, "
            f"is {prepared.fingerprint}"
        )


def evaluate(folder: str | Path, split: str = "test", overrides: list[str] | None = None) -> Metrics:
    """The metrics of the best model of the run in ``folder`` on a ``split`` of its data.

    ``overrides`` and what is raised are those of ``open_run``.
    """
    config, prepared, model = open_run(folder, overrides)
    with use_backend(config.training.backend):
        return predict(model, setup.open_loader(config, prepared, split), config).measure()
