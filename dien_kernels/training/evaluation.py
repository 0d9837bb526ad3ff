"""Predictions of a model over a split, and what they are worth."""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dien_kernels._options import user_path
from dien_kernels.batch import Schema
from dien_kernels.data import FORMATS, Loader, Prepared
from dien_kernels.data.earlier import Earlier, descends, is_prepared
from dien_kernels.data.encode import encode
from dien_kernels.models.tables import module_name
from dien_kernels.ops import use_backend
from dien_kernels.training import checkpoint, setup
from dien_kernels.training.config import Config
from dien_kernels.training.metrics import Metrics, measure
from dien_kernels.training.upgrade import load_saved

BEST, CONFIG = "best.pt", "config.yaml"
RESULT, PREDICTIONS = "result.json", "predictions-test.parquet"
_log = logging.getLogger(__name__)


class Predictions(NamedTuple):
    """Rows of a split in the loader's order: labels and logits float64 [B], users int64 [B] or None; ``unknown`` is the
    number of rows whose target item has id 0."""

    label: NDArray[np.float64]
    logit: NDArray[np.float64]
    group: NDArray[np.int64] | None
    unknown: int = 0

    def measure(self) -> Metrics:
        return measure(self.label, self.logit, self.group)._replace(unknown=self.unknown)

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
    labels, logits, groups, unknown = [], [], [], 0
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
                unknown += int((next(iter(batch.target.values())) == 0).sum())
    finally:
        model.train(was_training)
    if not labels:
        return Predictions(np.empty(0), np.empty(0), None)
    known = [g for g in groups if g is not None]
    group = torch.cat(known).numpy() if len(known) == len(groups) else None
    return Predictions(torch.cat(labels).double().numpy(), torch.cat(logits).double().numpy(), group, unknown)


def open_run(
    folder: str | Path, overrides: list[str] | None = None, *, prepared: Prepared | None = None
) -> tuple[Config, Prepared, nn.Module]:
    """The config, data and best model of a run's ``folder``.

    ``overrides`` of the form ``section.key=value`` change the config of the run; ``prepared`` is the data where it is
    already open. Data that have grown since the training come as ``Earlier``: the ids that the model does not know are
    0, "unknown".

    Raises ``FileNotFoundError`` where there is no run, ``CheckpointError`` for a missing or damaged best
    checkpoint and ``ValueError`` where the data are not those of the training, and have not grown from them.
    """
    folder = user_path(folder, "folder")
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {CONFIG}")
    config = load_saved(folder / CONFIG).with_("output", folder=str(folder)).override(overrides or [])
    if prepared is None:
        prepared = setup.open_data(config, reuse=True)
    content = checkpoint.load(folder / setup.CHECKPOINTS / BEST)
    prepared = as_trained(content, prepared)
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


def check_descent(fingerprint: str, prepared: Prepared, who: str) -> None:
    """Raise ``ValueError`` unless data have this fingerprint or have grown from those that have; ``who`` was trained on
    them."""
    if not descends(prepared, fingerprint):
        raise ValueError(
            f"{prepared.path} has not grown from the data of {who}, so that ids would mean other things: the "
            f"fingerprint {fingerprint} must be its own or in its ancestors, got {prepared.fingerprint} and "
            f"{prepared.meta.get('ancestors', [])}"
        )


def as_trained(content: Mapping[str, Any], prepared: Prepared) -> Prepared:
    """Data as the model of a checkpoint knows them: themselves, or those ids of grown ones that its tables have.

    Raises ``ValueError`` for other data.
    """
    if content["fingerprint"] == prepared.fingerprint:
        return prepared
    if not descends(prepared, content["fingerprint"]):
        check_fingerprint(dict(content), prepared)
    return Earlier(prepared, _sizes(content["model"], prepared.schema))


def _sizes(weights: Mapping[str, torch.Tensor], schema: Schema) -> dict[str, int]:
    """The number of ids of each field, by the tables of a model."""
    kinds = (("items", schema.items), ("users", schema.users), ("behaviours", schema.behaviours))
    return {
        name: weights[f"embeddings.{kind}.{module_name(name)}.weight"].shape[0]
        for kind, names in kinds
        for name in names
    }


def evaluate(
    folder: str | Path,
    split: str | None = None,
    overrides: list[str] | None = None,
    *,
    data: Any = None,
    log: Mapping[str, Any] | None = None,
) -> Metrics:
    """The metrics of the best model of the run in ``folder``.

    Args:
        folder: of the run.
        split: of a prepared folder; None: ``"test"``. Raw logs have none.
        overrides: as in ``open_run``.
        data: None: the run's own data. A prepared folder that has grown from these. Or raw logs, as ``prepare`` takes
            them: they are read with the run's ids, and every behaviour with one before it, or every impression with
            given labels, is a target. What the model does not know has id 0; ``Metrics.unknown`` counts the rows with
            such a target.
        log: how raw logs are to be read, arguments of ``dien_kernels.data.encode``; what is not given is as in the
            run's ``data.prepare``.

    Raises what ``open_run`` and ``encode`` raise, and ``ValueError`` for a folder that has not grown from the run's
    data, a ``split`` with raw logs and ``log`` without them.
    """
    raw = data is not None and not isinstance(data, Prepared) and not is_prepared(data)
    if log and not raw:
        raise ValueError(f"log must be left out where data is not raw logs, got {dict(log)}")
    if raw and split is not None:
        raise ValueError(f"split must be left out for raw logs, which have none, got {split!r}")
    if data is not None and not raw:
        opened = data if isinstance(data, Prepared) else Prepared.open(user_path(data, "data"))
        content = checkpoint.load(user_path(folder) / setup.CHECKPOINTS / BEST)
        check_descent(content["fingerprint"], opened, f"the run {folder}")
        config, prepared, model = open_run(folder, overrides, prepared=opened)
    else:
        config, prepared, model = open_run(folder, overrides)
    with use_backend(config.training.backend):
        if not raw:
            return predict(model, setup.open_loader(config, prepared, split or "test"), config).measure()
        with tempfile.TemporaryDirectory() as place:
            encoded = encode(data, Path(place) / "data", prepared, **_log_options(config, prepared, data, log or {}))
            unknown = {n: k for n, k in encoded.meta["report"].items() if n.startswith("unknown:") and k}
            for name, rows in unknown.items():
                _log.warning("%d rows have no %s that the run knows: id 0", rows, name.partition(":")[2])
            if isinstance(prepared, Earlier):
                encoded = Earlier(encoded, prepared.sizes)
            return predict(model, _loader_of_all(config, encoded), config).measure()


def _log_options(config: Config, prepared: Prepared, data: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """How to read raw logs: as given, else as the run did, else by their names; the fields are those of the model."""
    known = [name for name in inspect.signature(encode).parameters if name not in ("sources", "out", "prepared")]
    for name in given:
        if name not in known:
            raise ValueError(f"log must have keys of {known}, got {name!r}")
    options = {name: value for name, value in config.data.prepare.items() if name in known} | dict(given)
    if "format" not in options and isinstance(data, (str, Path)):
        options = setup.prepare_options(options, Path(data))
    chosen = options.get("format")
    if chosen is not None and (chosen not in FORMATS or not FORMATS[chosen].named_columns):
        return options
    schema, columns = prepared.schema, options.get("columns") or {}
    if isinstance(columns, Mapping):
        fields = {
            "item_fields": list(schema.items)[1:],
            "user_fields": list(schema.users),
            "dense": list(schema.dense),
            "behaviour_fields": list(schema.behaviours),
            "behaviour_dense": list(schema.behaviour_dense),
        }
        options["columns"] = fields | dict(columns)
    return options


def _loader_of_all(config: Config, encoded: Prepared) -> Loader:
    """The loader of every sample that ``encode`` found, with as many negatives as valid and test have."""
    options, data = encoded.meta["options"], config.data
    return Loader(
        encoded,
        "train",
        batch_size=data.eval_batch_size,
        max_length=data.max_length,
        negatives=options["negatives"],
        auxiliary_negatives=0,
        repeats=data.repeats,
        time_gap=data.time_gap,
        shuffle=False,
        seed=options["seed"],
        workers=data.workers,
        bucket=data.bucket,
        pin_memory=setup.device_of(config).type == "cuda",
    )
