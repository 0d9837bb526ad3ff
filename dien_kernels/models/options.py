"""The options of models, in groups: one frozen dataclass for each part of a model.

A group may be given as such or as a mapping, which is how YAML files and checkpoints give it: ``attention={"kind":
"din"}`` keeps the model's defaults of all other options of attention. Unknown names and wrong values raise
``ValueError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Literal, TypeVar, get_args

from dien_kernels._options import check_fields, from_mapping, unknown_name
from dien_kernels.ops.recurrence.forms import AUGRUForm, Reset, Update

Activation = Literal["dice", "prelu", "relu", "sigmoid"]
Pooling = Literal["sum", "mean"]
Scaling = Literal["standard", "log", "quantiles", "none"]


@dataclass(frozen=True)
class _Group:
    """A group of options, checked when it is made."""

    NAME: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self, self.NAME)
        self._check()

    def _check(self) -> None:
        """Raise ``ValueError`` for values outside of their range."""

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not least <= value < inf:
                raise ValueError(f"{self.NAME}.{name} must be finite and at least {least}, got {value}")

    def _is_probability(self, name: str) -> None:
        if not 0 <= getattr(self, name) < 1:
            raise ValueError(f"{self.NAME}.{name} must be at least 0 and below 1, got {getattr(self, name)}")

    def _are_widths(self, name: str) -> None:
        for i, width in enumerate(getattr(self, name)):
            if width < 1:
                raise ValueError(f"{self.NAME}.{name}[{i}] must be at least 1, got {width}")


@dataclass(frozen=True)
class EmbeddingOptions(_Group):
    """The tables of the fields of items, users and behaviours.

    Attributes:
        size: width of every table, or a mapping of field names to widths, which must then name every field.
        std: tables start as N(0, std^2) (with ``init="torch"``).
        sparse: sparse gradients, so that the cost of a step does not grow with the tables. ``LazyAdam``, SGD, Adagrad
            and SparseAdam take them; other optimizers of ``torch.optim`` need False.
        dropout: probability with which each number that is read from a table is set to 0 in training; the others are
            divided by 1 - dropout.
        l2: the factor of a penalty in the training loss: (1 / B) times the sum of the squares of all numbers that a
            batch of B rows reads from the tables, for histories, targets, negatives and users. A row of a table counts
            as often as it is read, and not at all where it is not read.
        several: how the values of a field with several values (the genres of a film) become one vector: "mean" or
            "sum" of the embeddings of the values that are there; 0 where there is none.
        pretrained: field to its table at the start, a float tensor [ids, width] with a row for each id of the
            vocabulary, or the path of a file that ``torch.save`` wrote it to. The row of id 0, "unknown", starts as 0.
        frozen: pretrained tables are not trained.
        project: a pretrained table keeps its own width, and a matrix without bias maps what is read from it to
            ``size``; None: only where its width is not ``size``.
    """

    NAME: ClassVar[str] = "embedding"
    size: int | Mapping[str, int] = 18
    std: float = 0.05
    sparse: bool = True
    dropout: float = 0.0
    l2: float = 0.0
    several: Literal["mean", "sum"] = "mean"
    pretrained: Mapping[str, Any] = field(default_factory=dict)
    frozen: bool = False
    project: bool | None = None

    def _check(self) -> None:
        self._at_least(0, "std", "l2")
        self._is_probability("dropout")


@dataclass(frozen=True)
class DenseOptions(_Group):
    """How a model reads numbers: those of a row, ``Batch.dense``, and those of a behaviour, ``Batch.behaviour_dense``.

    ``statistics`` of the training split, which the model is built with, say how each number is distributed.

    Attributes:
        scaling: "standard", (x - mean) / std, of log(1 + x) where the statistics say that the number is skewed
            (``log``); "log", sign(x) log(1 + |x|); "quantiles", an embedding of the interval between two quantiles that
            x lies in; "none", x itself. A mapping gives one of these words to each number that it names, and "standard"
            to the others. Where there are no statistics of a number, "standard" is "none".
        indicator: a number that is missing is read as 0 after scaling. True: a further input beside it is 1 where it is
            missing, else 0; None: only for numbers of which some are missing in the statistics; False: there is none.
            Numbers with "quantiles" need none, as "missing" is an interval of its own.
        size: the width of the embeddings of "quantiles".
    """

    NAME: ClassVar[str] = "dense"
    scaling: Scaling | Mapping[str, str] = "standard"
    indicator: bool | None = None
    size: int = 8

    def _check(self) -> None:
        self._at_least(1, "size")
        if isinstance(self.scaling, Mapping):
            for name, word in self.scaling.items():
                if word not in get_args(Scaling):
                    raise unknown_name("scaling", str(word), get_args(Scaling), f"dense.scaling[{name!r}]")


@dataclass(frozen=True)
class GRUOptions(_Group):
    """The interest extractor, a GRU over the embeddings of a history.

    Attributes:
        hidden_size: H, of the extractor and of the evolution; None: the width of an item.
        reset: the reset gate acts "after" or "before" the product with W_hn.
        update: "keep" or "candidate", the side which the stored update gate multiplies; None is "keep". This changes
            what the weights mean, not which functions can be learned.
        bias: True: two vectors, b_ih and b_hh; "single": b_ih alone, so that b_n stays outside of the reset gate;
            False: none.
        gate_bias: the bias of both gates at the start, seen from the side of the state that is kept; None: as the layer
            starts it.
    """

    NAME: ClassVar[str] = "extractor"
    hidden_size: int | None = None
    reset: Reset = "after"
    update: Update | None = None
    bias: bool | Literal["single"] = True
    gate_bias: float | None = None

    def _check(self) -> None:
        self._at_least(1, "hidden_size")


@dataclass(frozen=True)
class EvolutionOptions(_Group):
    """The interest evolution, the second recurrence.

    Attributes:
        kind: "augru", "agru", "aigru", or "gru": a second GRU that attention does not enter.
        form: of "augru", as in ``dien_kernels.augru``.
        reset, gate_bias: as in ``GRUOptions``.
        update: as in ``GRUOptions``; None is "candidate" for the paper's AUGRU, else "keep".
        bias: as in ``GRUOptions``, or "tied": one vector under both names (not with kind="gru").
        readout: with kind="gru": "attention", the sum of its states weighted by their attention; or "last", its last
            state, and the model has no attention.
    """

    NAME: ClassVar[str] = "evolution"
    kind: Literal["augru", "agru", "aigru", "gru"] = "augru"
    form: AUGRUForm = "paper"
    reset: Reset = "after"
    update: Update | None = None
    bias: bool | Literal["single", "tied"] = True
    gate_bias: float | None = None
    readout: Literal["attention", "last"] = "attention"

    def _check(self) -> None:
        if self.kind == "gru" and self.bias == "tied":
            raise ValueError("evolution.bias must be true, false or 'single' with evolution.kind='gru', got 'tied'")


@dataclass(frozen=True)
class AttentionOptions(_Group):
    """The attention of a target over a history.

    Attributes:
        kind: "bilinear" or "din".
        units, activation: the hidden layers of "din".
        scale: factor of the scores, None for 1.
        normalize: "softmax" over a row's steps, "sigmoid", or None.
        query: "raw", the target's embedding; or "prelu", PReLU(W e_target + b) with H features.
    """

    NAME: ClassVar[str] = "attention"
    kind: Literal["bilinear", "din"] = "bilinear"
    units: Sequence[int] = (80, 40)
    activation: Literal["sigmoid", "relu", "prelu", "dice"] | None = "sigmoid"
    scale: float | None = None
    normalize: Literal["softmax", "sigmoid"] | None = "softmax"
    query: Literal["raw", "prelu"] = "raw"

    def _check(self) -> None:
        self._are_widths("units")


@dataclass(frozen=True)
class AuxiliaryOptions(_Group):
    """The auxiliary loss of the extractor's states.

    Attributes:
        kind: "inner", the inner product (then H is the width of an item), or "mlp", a network.
        weight: of the auxiliary loss in the total loss.
        units, activation, outputs: of the network of "mlp"; two outputs are a softmax.
        norm: None or "fixed", a map of each of the network's inputs (the authors' batch norm).
        normalizer: "separate": mean(p) + mean(n); "joint": mean over all terms; "row": mean of each history's mean;
            "padded": the authors' mean, which counts padding; "history": sum over steps, mean over histories.
        eps: added to the probabilities inside the logarithms, or "clamp".
    """

    NAME: ClassVar[str] = "auxiliary"
    kind: Literal["inner", "mlp"] = "inner"
    weight: float = 1.0
    units: Sequence[int] = (100, 50)
    activation: Literal["sigmoid", "relu", "prelu"] | None = "sigmoid"
    outputs: int = 1
    norm: Literal["fixed"] | None = None
    normalizer: Literal["joint", "separate", "padded", "row", "history"] = "separate"
    eps: float | Literal["clamp"] = 0.0

    def _check(self) -> None:
        self._at_least(0, "weight")
        self._are_widths("units")
        if self.outputs not in (1, 2):
            raise ValueError(f"auxiliary.outputs must be 1 or 2, got {self.outputs}")
        tiny = 2.0**-126  # the smallest normal number of float32
        if not (isinstance(self.eps, str) or self.eps == 0 or tiny <= self.eps <= 1):
            raise ValueError(f"auxiliary.eps must be 0, 'clamp' or a number up to 1, got {self.eps}")


@dataclass(frozen=True)
class HeadOptions(_Group):
    """The MLP from all inputs to the logit.

    Attributes:
        units: widths of the hidden layers.
        activation: "dice", "prelu" (a slope for each channel), "relu" or "sigmoid".
        dice_statistics: "moving": batch statistics in training, moving averages in evaluation; "batch": batch
            statistics in both, as the authors' code; a score then depends on the rows it is computed with.
        norm: of the MLP's input: None; "fixed", a map of each feature (the authors' batch norm, which never leaves
            inference mode); "moving", ``torch.nn.BatchNorm1d``; "batch", batch statistics in evaluation too.
        outputs: 1, or 2 for a softmax over (click, no click); the same family of functions.
        dropout: probability with which each output of a hidden layer is set to 0 in training; the others are divided by
            1 - dropout.
    """

    NAME: ClassVar[str] = "head"
    units: Sequence[int] = (200, 80)
    activation: Activation = "dice"
    dice_statistics: Literal["moving", "batch"] = "moving"
    norm: Literal["fixed", "moving", "batch"] | None = None
    outputs: int = 1
    dropout: float = 0.0

    def _check(self) -> None:
        self._are_widths("units")
        self._is_probability("dropout")
        if self.outputs not in (1, 2):
            raise ValueError(f"head.outputs must be 1 or 2, got {self.outputs}")


@dataclass(frozen=True)
class ClickOptions(_Group):
    """The cross entropy of clicks.

    Attributes:
        weight: of the cross entropy in the total loss.
        reduction: "mean" or "sum" over rows.
        eps: added to the probabilities inside the logarithms.
    """

    NAME: ClassVar[str] = "click"
    weight: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    eps: float = 0.0

    def _check(self) -> None:
        self._at_least(0, "weight", "eps")


Embedding = EmbeddingOptions | Mapping[str, Any]
Dense = DenseOptions | Mapping[str, Any]
Extractor = GRUOptions | Mapping[str, Any]
Evolution = EvolutionOptions | Mapping[str, Any]
Attend = AttentionOptions | Mapping[str, Any]
Auxiliary = AuxiliaryOptions | Mapping[str, Any]
Head = HeadOptions | Mapping[str, Any]
Click = ClickOptions | Mapping[str, Any]

# What options were called before they stood in groups.
RENAMED = {
    "embedding_size": "embedding.size",
    "embedding_std": "embedding.std",
    "sparse": "embedding.sparse",
    "mlp": "head.units",
    "activation": "head.activation",
    "dice_statistics": "head.dice_statistics",
    "norm": "head.norm",
    "outputs": "head.outputs",
    "click_weight": "click.weight",
    "click_reduction": "click.reduction",
    "click_eps": "click.eps",
    "hidden_size": "extractor.hidden_size",
    "extractor_reset": "extractor.reset",
    "extractor_update": "extractor.update",
    "extractor_bias": "extractor.bias",
    "gate_bias": "extractor.gate_bias and evolution.gate_bias",
    "attention": "attention.kind",
    "attention_units": "attention.units",
    "attention_activation": "attention.activation",
    "attention_scale": "attention.scale",
    "attention_normalize": "attention.normalize",
    "query": "attention.query",
    "evolution": "evolution.kind",
    "form": "evolution.form",
    "evolution_reset": "evolution.reset",
    "evolution_update": "evolution.update",
    "evolution_bias": "evolution.bias",
    "gru_readout": "evolution.readout",
    "auxiliary": "auxiliary.kind",
    "auxiliary_weight": "auxiliary.weight",
    "auxiliary_units": "auxiliary.units",
    "auxiliary_activation": "auxiliary.activation",
    "auxiliary_outputs": "auxiliary.outputs",
    "auxiliary_norm": "auxiliary.norm",
    "auxiliary_normalizer": "auxiliary.normalizer",
    "auxiliary_eps": "auxiliary.eps",
}

_Kind = TypeVar("_Kind", bound=_Group)


def group_of(kind: type[_Kind], value: _Kind | Mapping[str, Any], default: _Kind) -> _Kind:
    """The group that is given, or ``default`` with the options of a mapping in it."""
    if isinstance(value, kind):
        return value
    name = kind.NAME
    if isinstance(value, str) and RENAMED.get(name) == f"{name}.kind":
        raise ValueError(f"the option {name}={value!r} is now {name}.kind={value!r}")
    return from_mapping(kind, value, name, default, "option")


def refuse(name: str, known: Sequence[str]) -> ValueError:
    """The error for an option that a model does not have: the new name of an old one, or what comes close."""
    if name in RENAMED and RENAMED[name].split(".")[0] in known:
        return ValueError(f"the option {name} is now {RENAMED[name]}")
    return unknown_name("option", name, known)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Options ``above`` over those ``below``: where both give a mapping for a group, option by option."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            value = {**merged[name], **value}
        merged[name] = value
    return merged


def from_flat(model: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the first format, which had no groups, as the same model takes them now.

    ``model`` is a key of ``MODELS``. Runs of dien_kernels 0.1 up to November 2026 hold such options.
    Raises ``ValueError`` where a group is no mapping.
    """
    nested: dict[str, Any] = {}

    def put(path: str, value: Any) -> None:
        group, _, name = path.partition(".")
        if not isinstance(nested.get(group, {}), dict):
            raise ValueError(f"the option {group} must be a mapping from names to values, got {nested[group]!r}")
        nested.setdefault(group, {})[name] = value

    without_auxiliary = flat.get("auxiliary", "" if model != "gru_attention" else None) is None
    for name, value in flat.items():
        if name.startswith("auxiliary") and without_auxiliary:
            continue
        if name == "gate_bias":
            put("extractor.gate_bias", value)
            if model != "gru":
                put("evolution.gate_bias", value)
        elif name in RENAMED:
            put(RENAMED[name], value)
        else:
            nested[name] = dict(value) if isinstance(value, Mapping) else value
    if "auxiliary" in flat and without_auxiliary:
        nested["auxiliary"] = None
    return nested
