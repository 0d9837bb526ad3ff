"""torch-rechub's DIEN on the padded batch: a smaller model, which stands beside the others.

Each field of an item has a recurrence of its own, half as wide; attention is bilinear, the auxiliary loss an inner
product, the MLP has Dice after a batch norm. So it is compared not with our model but with its own function, put
together from our reference ops on its weights. Its mean of the cross entropy is kept. A step is what its trainer does
between two batches, without ``.item()`` and progress bar.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from benchmarks.dien_model import copy_weights, padded_ids, widths
from benchmarks.inputs import Inputs, Program, Tensors
from benchmarks.measurement import mismatch
from benchmarks.peers import missing
from benchmarks.registry import ITEM_FIELDS, MLP_WIDTHS, USER_FIELDS, Case
from dien_kernels import attention_scores, augru, auxiliary_loss, gru
from dien_kernels.batch import Batch

VERSION = "0.9.0"
TOLERANCE = 1e-3  # of the largest value of a tensor, as for the other models


def absent() -> str | None:
    return missing(("torch_rechub", "sklearn", "pandas", "tqdm"), f"torch-rechub {VERSION}")


def module() -> Any:
    from torch_rechub.models.ranking import dien

    return dien


def model_of(case: Case) -> Any:
    dien = module()
    from torch_rechub.basic.features import SequenceFeature, SparseFeature

    size = widths(case)

    def sequences(prefix: str) -> list[Any]:
        return [
            SequenceFeature(prefix + n, rows, size[n], pooling="concat", shared_with=n, padding_idx=0)
            for n, rows in ITEM_FIELDS.items()
        ]

    with torch.random.fork_rng():
        torch.manual_seed(2018)
        return dien.DIEN(
            [SparseFeature(n, rows, size[n]) for n, rows in USER_FIELDS.items()],
            sequences("hist_"),
            sequences("neg_hist_"),
            [SparseFeature(n, rows, size[n], padding_idx=0) for n, rows in ITEM_FIELDS.items()],
            {"dims": list(MLP_WIDTHS)},
            alpha=1.0,
        )


def _batch(case: Case, batch: Batch) -> Tensors:
    history, negatives, _ = padded_ids(case, batch)
    columns = {name: ids.contiguous() for name, ids in (batch.users | batch.target).items()}
    columns |= {f"hist_{name}": ids for name, ids in history.items()}
    return columns | {f"neg_hist_{name}": ids for name, ids in negatives.items()}


def _reference(model: Any, x: Tensors, label: Tensor, lengths: Tensor) -> Tensor:
    """Its loss as we understand it."""
    last, auxiliary, targets = [], label.new_zeros(()), []
    for i, name in enumerate(ITEM_FIELDS):
        table = model.embedding.embed_dict[name].weight
        target, history, negative = table[x[name]], table[x[f"hist_{name}"]], table[x[f"neg_hist_{name}"]]
        states = gru(history, *model.interest_extractor_layers[i].parameters(), lengths=lengths, backend="reference")[0]
        both = auxiliary_loss(states, history, negative, lengths=lengths, kind="inner", backend="reference")
        auxiliary = auxiliary + 2 * both  # a mean each for positives and negatives
        layer = model.interest_evolving_layers[i]
        scores = attention_scores(target, states, [layer.Wa], lengths=lengths, kind="bilinear", backend="reference")
        own = dict(layer.augru_cell.named_parameters())
        w_ih, w_hh, bias = (torch.cat([own[kind + gate].t() for gate in "ruh"]) for kind in "WUb")
        last.append(augru(states, scores, w_ih, w_hh, bias.squeeze(1), lengths=lengths, backend="reference")[1])
        targets.append(target)
    users = [model.embedding.embed_dict[name].weight[x[name]] for name in USER_FIELDS]
    return (
        binary_cross_entropy(model.mlp(torch.cat((*last, *targets, *users), 1)).squeeze(1).sigmoid(), label) + auxiliary
    )


def _validate(case: Case, model: Any, x: Tensors, batch: Batch) -> str | None:
    """What differs from ``_reference``, its loss or a gradient; None if nothing does."""
    tried, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    click, auxiliary = tried(x)
    loss = binary_cross_entropy(click, batch.label) + auxiliary
    wanted = _reference(exact, x, batch.label.double(), padded_ids(case, batch)[2])
    loss.backward()
    wanted.backward()
    for name, own in (*tried.named_parameters(), *exact.named_parameters()):
        if own.grad is None:
            return f"{name} has no gradient"
    gradients, right = ({name: own.grad for name, own in m.named_parameters()} for m in (tried, exact))
    wrong = mismatch({"result": loss.detach()}, {"result": wanted.detach()}, TOLERANCE)
    return wrong or mismatch(gradients, right, TOLERANCE)


def build(case: Case, inputs: Inputs) -> Program:
    model, batch = model_of(case), inputs.data
    own = dict(model.named_parameters())
    tables = {f"embeddings.items.{name}.weight": own[f"embedding.embed_dict.{name}.weight"] for name in ITEM_FIELDS}
    tables |= {f"embeddings.users.{name}.weight": own[f"embedding.embed_dict.{name}.weight"] for name in USER_FIELDS}
    copy_weights(inputs.leaves, tables)
    x = _batch(case, batch)
    note = f"torch-rechub {VERSION}, a smaller model: a recurrence half as wide for each field of an item"
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def forward() -> Tensor:
        click, auxiliary = model(x)
        loss: Tensor = binary_cross_entropy(click, batch.label) + auxiliary
        return loss

    return Program(
        forward,
        own,
        f"{note}; fused Adam",
        optimise=optimizer.step,
        check=lambda: _validate(case, model, x, batch),
    )
