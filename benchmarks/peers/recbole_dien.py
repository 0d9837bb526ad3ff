"""RecBole's DIEN (AUGRU) on the padded batch, with the inputs' weights.

As shipped its three networks share one list of widths, its auxiliary network has no activation, its MLP Dice after a
batch norm. Here they are what the other models' are, made of its own layers, and its loss is a sum: so it computes the
same function. It reads an item's other fields from a table with a row for each item; here each behaviour of the batch
has its row, as the batch pairs items and categories freely.

Importing its models switches autograd's anomaly detection on for the whole process (``sine.py`` does). It is switched
off again: with it, a step takes several times as long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import BCEWithLogitsLoss

from benchmarks.dien_model import copy_weights, padded_ids, widths
from benchmarks.inputs import Inputs, Program, Tensors
from benchmarks.peers import missing
from benchmarks.registry import AUXILIARY_WIDTHS, DIN_WIDTHS, ITEM_FIELDS, MLP_WIDTHS, USER_FIELDS, Case
from dien_kernels.batch import Batch

VERSION = "1.2.1"
NEEDS = ("recbole", "pandas", "scipy", "sklearn", "tqdm", "yaml", "colorlog", "colorama", "tensorboard", "texttable")


def absent() -> str | None:
    return missing(NEEDS, f"recbole {VERSION}")


def module() -> Any:
    anomaly = torch.is_anomaly_enabled()
    from recbole.model.sequential_recommender import dien

    torch.autograd.set_detect_anomaly(anomaly)
    return dien


class _Dataset(NamedTuple):
    """What the model asks of its dataset."""

    users: Any
    items: Any
    field2type: dict[str, Any]
    config: dict[str, Any]

    def get_user_feature(self) -> Any:
        return self.users

    def get_item_feature(self) -> Any:
        return self.items

    def num(self, field: str) -> int:
        return (USER_FIELDS | ITEM_FIELDS)[field]


def _rows(case: Case, batch: Batch) -> tuple[Tensors, Tensors]:
    """The table of the batch's pairs of item and category, row 0 for padding; and the batch as indices into it."""
    histories, negatives, _ = padded_ids(case, batch)
    parts = (histories, negatives, {name: ids.unsqueeze(1) for name, ids in batch.target.items()})
    ids = {name: torch.cat([part[name] for part in parts], 1) for name in ITEM_FIELDS}
    pairs = torch.stack([i.flatten() for i in ids.values()], 1)
    table, index = torch.unique(torch.cat((torch.zeros_like(pairs[:1]), pairs)), dim=0, return_inverse=True)
    index = index[1:].view(next(iter(ids.values())).shape)
    history, negative, target = index.split((case.steps, case.steps, 1), 1)
    columns = {name: table[:, i].contiguous() for i, name in enumerate(ids)}
    rows = {"item_list": history, "neg_item_list": negative, "item": target.squeeze(1)}
    return columns, {name: index.contiguous() for name, index in rows.items()}


def model_of(case: Case, batch: Batch) -> tuple[Any, Tensors]:
    """The model and its batch."""
    dien = module()
    from recbole.data.interaction import Interaction
    from recbole.model.layers import MLPLayers
    from recbole.utils import FeatureType

    columns, rows = _rows(case, batch)
    interaction = rows | {name: ids.contiguous() for name, ids in batch.users.items()}
    interaction |= {"length": padded_ids(case, batch)[2], "label": batch.label}
    config = {
        "USER_ID_FIELD": "user",
        "ITEM_ID_FIELD": "item",
        "LABEL_FIELD": "label",
        "LIST_SUFFIX": "_list",
        "NEG_PREFIX": "neg_",
        "ITEM_LIST_LENGTH_FIELD": "length",
        "MAX_ITEM_LIST_LENGTH": case.steps,
        "device": torch.device("cpu"),
        "alpha": 1.0,
        "gru_type": "AUGRU",
        "pooling_mode": "mean",
        "dropout_prob": 0.0,
        "embedding_size": widths(case)["item"],
        "mlp_hidden_size": list(DIN_WIDTHS),
        "numerical_features": [],
    }
    users = Interaction({name: torch.arange(rows) for name, rows in USER_FIELDS.items()})
    types = dict.fromkeys((*USER_FIELDS, *ITEM_FIELDS), FeatureType.TOKEN)
    model = dien.DIEN(config, _Dataset(users, Interaction(columns), types, config))
    auxiliary = [case.inputs + case.hidden, *AUXILIARY_WIDTHS, 1]
    model.interset_extractor.auxiliary_net = MLPLayers(auxiliary, activation="sigmoid", last_activation=False)
    model.dnn_mlp_layers = MLPLayers([model.dnn_mlp_list[0], *MLP_WIDTHS], activation="relu")
    model.dnn_predict_layer = torch.nn.Linear(MLP_WIDTHS[-1], 1)
    model.loss = BCEWithLogitsLoss(reduction="sum")
    return model, interaction


def leaves_of(model: Any) -> Tensors:
    """Its parameters under our names; the tables of items, which are one, and the cell's biases under its own."""
    own = dict(model.named_parameters())
    tables, cell = "embedding_layer.token_embedding_table.", "interest_evolution.dynamic_rnn.rnn."
    unit, auxiliary = "interest_evolution.attention_layer.", "interset_extractor.auxiliary_net.mlp_layers."
    names = {
        "items": f"{tables}item.embedding.weight",
        "embeddings.users.user.weight": f"{tables}user.embedding.weight",
    }
    names |= {
        f"extractor.{n}_l0": f"interset_extractor.gru.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    names |= {f"evolution.{n}": cell + n for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    for kind in ("weight", "bias"):  # a dropout, a linear layer and an activation each
        for i in range(len(DIN_WIDTHS)):
            names[f"attention.scores.linears.{i}.{kind}"] = f"{unit}att_mlp_layers.mlp_layers.{3 * i + 1}.{kind}"
        names[f"attention.scores.linears.{len(DIN_WIDTHS)}.{kind}"] = f"{unit}dense.{kind}"
        for i in range(len(AUXILIARY_WIDTHS) + 1):
            names[f"auxiliary.linears.{i}.{kind}"] = f"{auxiliary}{3 * i + 1}.{kind}"
        for i in range(len(MLP_WIDTHS)):
            names[f"mlp.linears.{i}.{kind}"] = f"dnn_mlp_layers.mlp_layers.{3 * i + 1}.{kind}"
        names[f"mlp.last.{kind}"] = f"dnn_predict_layer.{kind}"
    assert set(own) == set(names.values()), "every parameter has a name of ours"
    return {ours: own[theirs] for ours, theirs in names.items()}


FIRST, LAST_OF_UNIT, BIASES = "mlp.linears.0.weight", f"attention.scores.linears.{len(DIN_WIDTHS)}.", "evolution.bias_"


def build(case: Case, inputs: Inputs) -> Program:
    model, batch = model_of(case, inputs.data)
    leaves, scale = leaves_of(model), case.inputs**0.5  # its attention divides the scores by it
    cuts = [sum(widths(case)[name] for name in USER_FIELDS), case.inputs, case.hidden]
    given = dict(inputs.leaves)
    given["items"] = torch.cat([inputs.leaves[f"embeddings.items.{name}.weight"] for name in ITEM_FIELDS])
    given[FIRST] = torch.cat(given[FIRST].split(cuts, 1)[::-1], 1)
    given |= {f"{LAST_OF_UNIT}{kind}": inputs.leaves[f"{LAST_OF_UNIT}{kind}"] * scale for kind in ("weight", "bias")}
    given[f"{BIASES}hh"] = given[f"{BIASES}ih"]
    copy_weights(given, leaves)
    note = f"recbole {VERSION}, anomaly detection off, its networks as the other models'"
    if case.mode == "request":
        model.eval()
        # As shipped its ``predict`` makes the auxiliary loss too, which nobody needs of a score.
        model.interset_extractor.auxiliary_loss = lambda *states: 0.0
        note += "; auxiliary loss left out; repeats the history for every candidate"
        return Program(lambda: model.predict(batch), {}, note)

    def as_inputs(gradients: Tensors) -> Tensors:
        ours = dict(gradients)
        tables = ours.pop("items").split(list(ITEM_FIELDS.values()))
        ours |= {f"embeddings.items.{name}.weight": t for name, t in zip(ITEM_FIELDS, tables, strict=True)}
        ours[FIRST] = torch.cat(ours[FIRST].split(cuts[::-1], 1)[::-1], 1)
        ours |= {f"{LAST_OF_UNIT}{kind}": ours[f"{LAST_OF_UNIT}{kind}"] * scale for kind in ("weight", "bias")}
        ours[f"{BIASES}ih"] = ours[f"{BIASES}ih"] + ours.pop(f"{BIASES}hh")
        return ours

    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    return Program(
        lambda: model.calculate_loss(batch),
        leaves,
        f"{note}, two biases in its cell, fused Adam",
        as_inputs=as_inputs,
        optimise=optimizer.step,
    )
