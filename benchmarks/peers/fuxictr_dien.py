"""FuxiCTR's DIEN (AUGRU, from its model zoo) on the padded batch, with the inputs' weights, without auxiliary loss.

It has none that runs: so it does less than the others, and is compared with the model without one. DIN attention with
sigmoid units, no batch norm; its mean of the cross entropy is multiplied by the batch size. Nothing is clipped.

Importing it imports its preprocessing, which imports Ray: the module that does is replaced by an empty one.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.dien_model import copy_weights, padded_ids, widths
from benchmarks.inputs import Inputs, Program, Tensors
from benchmarks.peers import missing, stub_module
from benchmarks.registry import DIN_WIDTHS, ITEM_FIELDS, MLP_WIDTHS, USER_FIELDS, Case
from dien_kernels.batch import Batch

VERSION = "2.3.10"
NEEDS = ("fuxictr", "model_zoo", "pandas", "sklearn", "tqdm", "yaml", "polars", "pyarrow", "h5py")


def absent() -> str | None:
    return missing(NEEDS, f"fuxictr {VERSION}")


def module() -> Any:
    stub_module("fuxictr.preprocess.build_dataset")
    return importlib.import_module("model_zoo.LongCTR.DIEN.DIEN")  # the package has a class of this name


def swapped(rows: Tensor) -> Tensor:
    """The gates r, u, n as u, r, n; and back."""
    first, second, n = rows.chunk(3)
    return torch.cat((second, first, n))


def model_of(case: Case) -> Any:
    dien = module()
    from fuxictr.features import FeatureMap

    size = widths(case)
    features = FeatureMap("benchmark", ".")
    for source, fields in (("user", USER_FIELDS), ("item", ITEM_FIELDS)):
        for name, rows in fields.items():
            one = {"type": "categorical", "source": source, "vocab_size": rows, "embedding_dim": size[name]}
            features.features[name] = one
    features.labels = ["label"]
    return dien.DIEN(
        features,
        dnn_hidden_units=list(MLP_WIDTHS),
        batch_norm=False,
        attention_type="din_attention",
        attention_hidden_units=list(DIN_WIDTHS),
        attention_activation="Sigmoid",
        optimizer="adam",
        loss="binary_crossentropy",
        verbose=0,
        model_root=".",
        metrics=["AUC"],
    )


def leaves_of(model: Any) -> Tensors:
    """Its parameters under our names; the cell's biases under its own."""
    own = dict(model.named_parameters())
    cell, unit = "evolving_modules.0.gru_cell.", "attention_modules.0.attn_mlp.mlp."
    names = {}
    for kind, fields in (("items", ITEM_FIELDS), ("users", USER_FIELDS)):
        for name in fields:
            table = f"embedding_layer.embedding_layer.embedding_layers.{name}.weight"
            names[f"embeddings.{kind}.{name}.weight"] = table
    for kind in ("weight", "bias"):
        for side, linear in (("ih", "x2h"), ("hh", "h2h")):
            names[f"extractor.{kind}_{side}_l0"] = f"extraction_modules.0.{kind}_{side}_l0"
            names[f"evolution.{kind}_{side}"] = f"{cell}{linear}.{kind}"
        for i in range(len(DIN_WIDTHS) + 1):  # a linear layer and an activation each
            names[f"attention.scores.linears.{i}.{kind}"] = f"{unit}{2 * i}.{kind}"
        for i in range(len(MLP_WIDTHS)):
            names[f"mlp.linears.{i}.{kind}"] = f"dnn.mlp.{2 * i}.{kind}"
        names[f"mlp.last.{kind}"] = f"dnn.mlp.{2 * len(MLP_WIDTHS)}.{kind}"
    assert set(own) == set(names.values()), "every parameter has a name of ours"
    return {ours: own[theirs] for ours, theirs in names.items()}


def _batch(case: Case, batch: Batch) -> tuple[Tensors, Tensors, Tensor]:
    """What its loader gives: fields of the row, fields of its items (the target last) in one row, and the mask."""
    history, _, lengths = padded_ids(case, batch)
    items = {name: torch.cat((history[name], batch.target[name].unsqueeze(1)), 1).flatten() for name in ITEM_FIELDS}
    row = {name: ids.contiguous() for name, ids in batch.users.items()} | {"label": batch.label}
    return row, items, torch.arange(case.steps) < lengths.unsqueeze(1)


def build(case: Case, inputs: Inputs) -> Program:
    if case.batch == 1:
        raise LookupError(f"fuxictr {VERSION} loses the batch's dimension when it has one row")
    model, batch = model_of(case), _batch(case, inputs.data)
    leaves, cell = (
        leaves_of(model),
        [f"evolution.{kind}_{side}" for kind in ("weight", "bias") for side in ("ih", "hh")],
    )
    given = inputs.leaves | {"evolution.bias_hh": inputs.leaves["evolution.bias_ih"]}
    copy_weights(given | {name: swapped(given[name]) for name in cell}, leaves)
    note = f"fuxictr {VERSION}, without auxiliary loss"
    if case.mode == "request":
        model.eval()
        note = f"fuxictr {VERSION}; repeats the history for every candidate"
        return Program(lambda: model(batch)["y_pred"].squeeze(1), {}, note)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def forward() -> Tensor:
        loss: Tensor = model.compute_loss(model(batch), model.get_labels(batch)) * case.batch
        return loss

    def as_inputs(gradients: Tensors) -> Tensors:
        ours = gradients | {name: swapped(gradients[name]) for name in cell}
        ours["evolution.bias_ih"] = ours["evolution.bias_ih"] + ours.pop("evolution.bias_hh")
        return ours

    note += ", two biases in its cell, fused Adam"
    return Program(forward, leaves, note, as_inputs=as_inputs, optimise=optimizer.step, variant="no_auxiliary")
