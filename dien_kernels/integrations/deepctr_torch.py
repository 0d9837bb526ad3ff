"""DeepCTR-Torch's DIEN: extractor, auxiliary loss, attention and evolution, told the lengths of the rows.

Rows without a history are left out of all results but those of ``InterestEvolving``, which gives them zeros; a batch
without any history is left to the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dien_kernels.histories import Histories
from dien_kernels.integrations._target import Fallback, Target
from dien_kernels.integrations.torch_gru import no_autocast
from dien_kernels.layers._packed import check_packed, packed_index
from dien_kernels.ops.attention.op import attention_scores
from dien_kernels.ops.auxiliary_loss.op import auxiliary_loss
from dien_kernels.ops.recurrence.functional import agru, aigru, augru, gru

_OPS = {"AGRUCell": agru, "AUGRUCell": augru}


def _cell(cell: Any) -> tuple[Any, list[Tensor | None]]:
    """The op of a cell, and its weights, which are read where they lie. Its AUGRU has one bias in two places."""
    op = _OPS.get(type(cell).__name__)
    if op is None:
        raise Fallback(f"a cell of the class {type(cell).__name__}")
    _on_the_cpu(cell.weight_ih)
    return op, [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]


def _on_the_cpu(weight: Any) -> None:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        raise Fallback(f"parameters of {weight.dtype} on {weight.device.type}")


def _gru(module: nn.GRU) -> list[Tensor | None]:
    """The weights of a recurrence of one layer and direction without projection."""
    if module.num_layers != 1 or module.bidirectional or module.proj_size or not module.batch_first:
        raise Fallback("another GRU than DIEN's")
    _on_the_cpu(module.weight_ih_l0)
    weights: list[Tensor | None] = list(module.all_weights[0])
    return [*weights, None, None][:4]


def dynamic_gru(self: Any, inputs: Any, att_scores: Any = None, hx: Tensor | None = None) -> PackedSequence:
    """``DynamicGRU.forward``: AGRU or AUGRU of a packed sequence."""
    if not isinstance(inputs, PackedSequence) or not isinstance(att_scores, PackedSequence):
        raise Fallback("what is not packed")
    op, (w_ih, w_hh, b_ih, b_hh) = _cell(self.rnn)
    data, sizes, sorted_indices, unsorted_indices = inputs
    index = packed_index(sizes, check_packed("inputs", inputs), data)
    with no_autocast(data):
        y, _ = op(
            data.index_select(0, index.gather),
            att_scores.data.reshape(-1).index_select(0, index.gather),
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            offsets=index.offsets,
            h0=hx,
        )
    return PackedSequence(y.index_select(0, index.scatter), sizes, sorted_indices, unsorted_indices)


def extractor(self: Any, keys: Tensor, keys_length: Tensor, neg_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``InterestExtractor.forward``: the states of the rows with a history, and the auxiliary loss."""
    weights = _gru(self.gru)
    mask = keys_length > 0
    lengths = keys_length[mask]
    if not lengths.shape[0]:
        raise Fallback("a batch without histories")
    every = lengths.shape[0] == keys_length.shape[0]
    keys, loss = keys if every else keys[mask], torch.zeros((1,), device=keys.device)
    histories = Histories.of(lengths=lengths.long())
    with no_autocast(keys):
        states, _ = gru(keys, *weights, histories=histories)  # type: ignore[arg-type]
        if self.use_neg and neg_keys is not None and int(lengths.max()) > 1:
            loss = _auxiliary(self.auxiliary_net, states, keys, neg_keys if every else neg_keys[mask], histories)
    return states, loss


def _auxiliary(net: Any, states: Tensor, keys: Tensor, negatives: Tensor, histories: Histories) -> Tensor:
    linears = list(net.linears)
    sigmoid = all(isinstance(activation, nn.Sigmoid) for activation in net.activation_layers)
    if not sigmoid or net.use_bn or (net.dropout_rate and net.training) or linears[-1].out_features != 1:
        raise Fallback("another auxiliary network than DIEN's")
    if states.dtype != torch.float32:
        raise Fallback(f"an auxiliary loss in {states.dtype}, which the original computes in float32")
    return auxiliary_loss(
        states,
        keys,
        negatives,
        [linear.weight for linear in linears],
        [linear.bias for linear in linears],
        histories=histories,
        kind="mlp",
        normalizer="joint",
        eps="clamp",
    )


def _scores(layer: Any, query: Tensor, keys: Tensor, histories: Histories) -> Tensor:
    """[b, T]: the scores of ``AttentionSequencePoolingLayer``."""
    net = layer.local_att.dnn
    kinds = {nn.Sigmoid: "sigmoid", nn.ReLU: "relu", nn.PReLU: "prelu"}
    activations = {kinds.get(type(activation)) for activation in net.activation_layers}
    if len(activations) != 1 or None in activations or layer.supports_masking or net.use_bn:
        raise Fallback("another attention than a network with sigmoid, ReLU or PReLU")
    if net.dropout_rate and net.training:
        raise Fallback("dropout in the attention")
    (activation,) = activations
    linears = [*net.linears, layer.local_att.dense]
    return attention_scores(
        query,
        keys,
        [linear.weight for linear in linears],
        [linear.bias for linear in linears],
        slopes=[each.weight for each in net.activation_layers] if activation == "prelu" else (),
        histories=histories,
        kind="din",
        activation=activation,  # type: ignore[arg-type]
        normalize="softmax" if layer.weight_normalization else None,
    )


def evolving(self: Any, query: Tensor, keys: Tensor, keys_length: Tensor, mask: Tensor | None = None) -> Tensor:
    """``InterestEvolving.forward``: the last state of each row, zeros where there is no history."""
    inner = self.interest_evolution
    op: Any
    op, weights = (gru, _gru(inner)) if isinstance(inner, nn.GRU) else _cell(inner.rnn)
    if self.gru_type == "AIGRU":
        op = aigru
    there = keys_length > 0
    lengths = keys_length[there]
    if not lengths.shape[0]:
        raise Fallback("a batch without histories")
    every = lengths.shape[0] == keys_length.shape[0]
    if keys.shape[0] != lengths.shape[0]:
        raise Fallback("other keys than those of the rows with a history")
    histories = Histories.of(lengths=lengths.long())
    target = query if every else query[there]
    with no_autocast(keys):
        if self.gru_type == "GRU":
            states, _ = op(keys, *weights, histories=histories)
            found = torch.matmul(_scores(self.attention, target, states, histories).unsqueeze(1), states).squeeze(1)
        else:
            scores = _scores(self.attention, target, keys, histories)
            _, found = op(keys, scores, *weights, histories=histories)
    outputs = torch.zeros(query.shape[0], query.shape[1], device=query.device)
    outputs[there] = found
    return outputs


_DIEN, _SEQUENCE, _CORE = "deepctr_torch.models.dien", "deepctr_torch.layers.sequence", "deepctr_torch.layers.core"
_CELLS = ((_SEQUENCE, "AGRUCell", "forward"), (_SEQUENCE, "AUGRUCell", "forward"))
_NET = (_CORE, "DNN", "forward")
TARGETS = [
    Target("deepctr_torch", _SEQUENCE, "DynamicGRU", "forward", dynamic_gru, {"00d7bc73a100ed9c": "0.3.0"}, _CELLS),
    Target(
        "deepctr_torch",
        _DIEN,
        "InterestExtractor",
        "forward",
        extractor,
        {"2fb4f2e78d35513d": "0.3.0"},
        ((_DIEN, "InterestExtractor", "_cal_auxiliary_loss"), _NET),
    ),
    Target(
        "deepctr_torch",
        _DIEN,
        "InterestEvolving",
        "forward",
        evolving,
        {"94bcd7fe62bd7c56": "0.3.0"},
        (
            (_DIEN, "InterestEvolving", "_get_last_state"),
            (_SEQUENCE, "AttentionSequencePoolingLayer", "forward"),
            (_CORE, "LocalActivationUnit", "forward"),
            _NET,
            (_SEQUENCE, "DynamicGRU", "forward"),
            *_CELLS,
        ),
    ),
]
