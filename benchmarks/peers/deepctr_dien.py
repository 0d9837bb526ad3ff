"""DeepCTR-Torch's DIEN (form "paper", AUGRU) on the padded batch, with the inputs' weights.

Its input is one float matrix with a column for each id, made beforehand. A step is what its ``fit`` does between two
batches: model, sum of the cross entropy, its (empty) regularisation, auxiliary loss, backward, Adam; without ``fit``'s
metrics and progress bar. Its L2 on the tables, on by default, is off.

Importing the package asks PyPI for its newest version, in a thread: the module that would is replaced by an empty one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from benchmarks.dien_model import copy_weights, padded_ids, widths
from benchmarks.inputs import Inputs, Program, Tensors
from benchmarks.peers import missing, stub_module
from benchmarks.registry import AUXILIARY_WIDTHS, DIN_WIDTHS, ITEM_FIELDS, MLP_WIDTHS, USER_FIELDS, Case
from dien_kernels.batch import Batch

VERSION = "0.3.0"


def absent() -> str | None:
    return missing(("deepctr_torch", "sklearn", "tqdm"), f"deepctr-torch {VERSION}")


def package() -> tuple[Any, Any, Any]:
    stub_module("deepctr_torch.utils", check_version=lambda version: None)
    from deepctr_torch import inputs, layers, models

    return inputs, layers, models


def model_of(case: Case) -> Any:
    inputs, _, models = package()
    size = widths(case)
    columns = [inputs.SparseFeat(n, rows, size[n]) for n, rows in (USER_FIELDS | ITEM_FIELDS).items()]
    for name, rows in ITEM_FIELDS.items():
        for prefix in ("hist_", "neg_hist_") if case.trains else ("hist_",):
            one = inputs.SparseFeat(prefix + name, rows, size[name], embedding_name=name)
            columns.append(inputs.VarLenSparseFeat(one, case.steps, length_name="length"))
    return models.DIEN(
        columns,
        list(ITEM_FIELDS),
        gru_type="AUGRU",
        use_negsampling=case.trains,  # with it, its forward makes the auxiliary loss when it scores too
        dnn_hidden_units=MLP_WIDTHS,
        att_hidden_units=DIN_WIDTHS,
        att_activation="sigmoid",
        l2_reg_embedding=0,
    )


def leaves_of(model: Any) -> dict[str, Tensor]:
    """Its parameters under our names. ``mlp.linears.0.weight`` has its columns in another order."""
    own = dict(model.named_parameters())
    gru, cell = "interest_extractor.gru.", "interest_evolution.interest_evolution.rnn."
    unit, auxiliary = "interest_evolution.attention.local_att.", "interest_extractor.auxiliary_net."
    names = {f"embeddings.items.{name}.weight": f"embedding_dict.{name}.weight" for name in ITEM_FIELDS}
    names |= {f"embeddings.users.{name}.weight": f"embedding_dict.{name}.weight" for name in USER_FIELDS}
    names |= {f"extractor.{n}_l0": f"{gru}{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    names |= {f"evolution.{n}": f"{cell}{n}" for n in ("weight_ih", "weight_hh", "bias_ih")}
    for kind in ("weight", "bias"):
        for i in range(len(DIN_WIDTHS)):
            names[f"attention.scores.linears.{i}.{kind}"] = f"{unit}dnn.linears.{i}.{kind}"
        names[f"attention.scores.linears.{len(DIN_WIDTHS)}.{kind}"] = f"{unit}dense.{kind}"
        if model.use_negsampling:
            for i in range(len(AUXILIARY_WIDTHS) + 1):
                names[f"auxiliary.linears.{i}.{kind}"] = f"{auxiliary}linears.{i}.{kind}"
        names |= {f"mlp.linears.{i}.{kind}": f"dnn.linears.{i}.{kind}" for i in range(len(MLP_WIDTHS))}
    names |= {"mlp.last.weight": "linear.weight", "mlp.last.bias": "out.bias"}
    assert set(own) - {cell + "bias_hh"} == set(names.values()), "every parameter has a name of ours"
    return {ours: own[theirs] for ours, theirs in names.items()}


def matrix(case: Case, batch: Batch, model: Any) -> Tensor:
    """The batch as its float matrix; a model that only scores asks for no negatives."""
    history, negatives, lengths = padded_ids(case, batch)
    columns = {**{n: i.unsqueeze(1) for n, i in (batch.users | batch.target).items()}}
    columns |= {f"hist_{name}": ids for name, ids in history.items()}
    columns |= {f"neg_hist_{name}": ids for name, ids in negatives.items()}
    columns["length"] = lengths.unsqueeze(1)
    return torch.cat([columns[name] for name in model.feature_index], 1).float()


def build(case: Case, inputs: Inputs) -> Program:
    model, hidden = model_of(case), case.hidden
    leaves, x, y = leaves_of(model), matrix(case, inputs.data, model), inputs.data.label
    first = "mlp.linears.0.weight"
    copy_weights(inputs.leaves | {first: inputs.leaves[first].roll(hidden, 1)}, leaves)
    if case.mode == "request":
        model.eval()
        return Program(lambda: model(x).squeeze(1), {}, "repeats the history for every candidate")
    model.compile("adam", "binary_crossentropy")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)  # compile made one ten times as slow

    def forward() -> Tensor:
        loss = binary_cross_entropy(model(x).squeeze(1), y, reduction="sum")
        total: Tensor = loss + model.get_regularization_loss() + model.aux_loss
        return total.squeeze()

    def as_inputs(gradients: Tensors) -> Tensors:
        return gradients | {first: gradients[first].roll(-hidden, 1)}

    note = f"deepctr-torch {VERSION}, fused Adam, no L2"
    return Program(forward, leaves, note, as_inputs=as_inputs, optimise=optimizer.step)
