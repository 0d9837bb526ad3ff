"""What all models share: the frame of the forward pass, the losses, scoring, sums over ragged histories."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from typing import Any, ClassVar, NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dien_kernels._options import plain
from dien_kernels.batch import Batch, Schema
from dien_kernels.checks import check_flag, check_number, check_option, check_size, compute_dtype
from dien_kernels.histories import Histories
from dien_kernels.layers.starts import WEIGHT_INITS, WeightInit, set_weight_init
from dien_kernels.models.embeddings import Embedded, Embeddings
from dien_kernels.models.numbers import Statistics
from dien_kernels.models.options import (
    Click,
    ClickOptions,
    Dense,
    DenseOptions,
    Embedding,
    EmbeddingOptions,
    Head,
    HeadOptions,
    Pooling,
    group_of,
    refuse,
)
from dien_kernels.models.parts import MLP
from dien_kernels.models.request import blocks, candidates


class Output(NamedTuple):
    """What a model says about a batch.

    Attributes:
        logits: [B], of a click; float64 for float64 models, else float32.
        auxiliary: scalar, the auxiliary loss, summed over sequences; None without negatives or auxiliary network.
        attention: [rows_total], the scores of row 0, then of row 1, and so on; None without attention. Those of further
            sequences are not here.
        squares: scalar, in training only: the squares of all numbers read from tables, summed, divided by the rows;
            None without ``embedding.l2``.
        auxiliaries: of a schema with further sequences, the auxiliary loss of the history and of each of them, scalars
            whose sum is ``auxiliary``; None otherwise.
    """

    logits: Tensor
    auxiliary: Tensor | None
    attention: Tensor | None
    squares: Tensor | None = None
    auxiliaries: tuple[Tensor, ...] | None = None


class Losses(NamedTuple):
    """The losses of a batch, each a scalar::

        total = click.weight * click + auxiliary.weight * auxiliary + embedding.l2 * squares

    Attributes:
        total: what training minimises.
        click: the loss of the clicks.
        auxiliary, squares: as in ``Output``.
    """

    total: Tensor
    click: Tensor
    auxiliary: Tensor | None
    squares: Tensor | None = None


class Share(NamedTuple):
    """What the losses of one of several batches count in the losses of one batch with all of their rows.

    Each number is a factor: ``click`` of the loss of the clicks, ``auxiliary`` of the auxiliary loss, and ``rows``, the
    batch's part of all rows, of what is divided by the number of rows; ``further`` of the auxiliary loss of each
    further sequence.
    """

    click: float
    auxiliary: float
    rows: float
    further: tuple[float, ...] = ()


class Common(TypedDict, total=False):
    """The options that every model hands on to ``RankingModel``."""

    embedding: Embedding
    dense: Dense
    statistics: Statistics | None
    head: Head
    click: Click
    product: bool
    init: WeightInit
    prelu_init: float


class Interest(NamedTuple):
    """What a model reads out of the histories."""

    features: list[Tensor]  # [B, .] each, behind the other inputs of the MLP
    auxiliary: Tensor | None = None
    attention: Tensor | None = None
    auxiliaries: tuple[Tensor, ...] | None = None


def _parts_of_one(amounts: Sequence[float]) -> list[float]:
    total = sum(amounts)
    return [amount / total if total else 0.0 for amount in amounts]


def _sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """out[r] = the sum of ``values`` [P, H] whose ``row`` is r, added in order on every device."""
    out = values.new_zeros(rows, values.shape[1])
    if values.device.type == "cpu":
        return out.index_add(0, row, values)
    return out.index_put((row,), values, accumulate=True)  # sorts, where index_add would use atomics


def pool(values: Tensor, histories: Histories) -> Tensor:
    """[U, H]: the sum of each history of ``values`` [N, H]; 0 for an empty one."""
    each = histories.each_once()
    return _sum(values, each.row_of_step(values.shape[0]), each.count(values))


def attend(values: Tensor, scores: Tensor, histories: Histories) -> Tensor:
    """[B, H]: the sum of each row's history of ``values`` [N, H], weighted by its ``scores`` [rows_total]."""
    total = scores.shape[0]
    source = histories.source_of_step(total, values.shape[0])
    if source is not None:
        values = values[source]
    return _sum(values * scores.to(values.dtype).unsqueeze(1), histories.row_of_step(total), histories.rows(values))


def of_rows(values: Tensor, histories: Histories) -> Tensor:
    """``values`` [U, ...] of the histories, for the rows that read them: [B, ...]."""
    return values if histories.history_of is None else values[histories.history_of]


def check_rich(batch: Batch, schema: Schema, rows: int) -> None:
    """Raise ``ValueError`` naming what of ``batch`` does not fit the fields with several values, the behaviours' own
    fields and numbers, and the further sequences of ``schema``; as ``RankingModel.forward``, without reading ids."""
    if batch.sequences.keys() != set(schema.sequences):
        raise ValueError(
            f"batch.sequences must have the names {sorted(schema.sequences)}, got {sorted(batch.sequences)}"
        )
    parts = {"batch": batch} | {f"batch.sequences[{name!r}]": each for name, each in batch.sequences.items()}
    for where, steps in parts.items():
        n = next(iter(steps.history.values())).shape[0]
        kinds = [("history", steps.history, schema.items), ("behaviours", steps.behaviours, schema.behaviours)]
        if steps.negatives is not None:
            kinds.append(("negatives", steps.negatives, schema.items))
        if steps is batch:
            kinds.append(("target", batch.target, schema.items))
        for kind, given, wanted in kinds:
            if given.keys() != wanted.keys():
                raise ValueError(f"{where}.{kind} must have the fields {sorted(wanted)}, got {sorted(given)}")
            for name, ids in given.items():
                dimensions = 1 + (kind == "negatives") + (name in schema.several)
                if ids.dim() != dimensions or ids.shape[0] != (rows if kind == "target" else n):
                    words = f"{dimensions} dimensions, the first {rows if kind == 'target' else n}"
                    raise ValueError(f"{where}.{kind}[{name!r}] must have {words}, got {tuple(ids.shape)}")
        numbers, width = steps.behaviour_dense, len(schema.behaviour_dense)
        if (width > 0) if numbers is None else tuple(numbers.shape) != (n, width):
            got = None if numbers is None else tuple(numbers.shape)
            raise ValueError(f"{where}.behaviour_dense must have shape {(n, width)}, got {got}")
        if steps.histories.rows() != rows:
            raise ValueError(f"{where} must have the {rows} rows of the targets, got {steps.histories.rows()}")


class RankingModel(nn.Module):
    """The frame of every model. With e the embedding of an item (its fields side by side), and b = [e, c] that of a
    behaviour, where c are the fields and numbers of the behaviour itself::

        x = [users, dense, e_target, s, e_target * s_e, interest],  s = [s_e, s_c] = sum or mean of the b of the history
        logit = MLP(x)

    s and the product are there where ``pooling`` and ``product`` ask for them, once for each sequence; ``interest`` is
    the model's own.

    Args:
        schema: the features; a model has a table for each field.
        embedding: ``EmbeddingOptions`` of the tables.
        dense: ``DenseOptions`` of the numbers.
        statistics: name of a number to its statistics in the training split, as ``dien_kernels.models.numbers.Numbers``
            takes them; they become buffers. None: numbers are read as they are.
        head: ``HeadOptions`` of the MLP.
        click: ``ClickOptions`` of the cross entropy.
        pooling: None, "sum" or "mean" of the history's embeddings as an input of the MLP.
        product: its product with the target's embedding as a further one.
        init: "torch", or "glorot": Glorot's uniform for every matrix, tables included, and 0 for biases.
        prelu_init: start of every PReLU slope in the model (one for each channel).

    Groups of options (``dien_kernels.models.options``) may be mappings. Raises ``ValueError`` or ``TypeError`` naming
    an unknown option (with what comes close) or a wrong value.

    ``part`` is called with the name of each stage of a forward pass and returns a context manager around it;
    it does nothing unless replaced. Stages, where a model has them: "embedding", "extractor", "auxiliary",
    "attention", "evolution", "mlp".
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    FIXED: ClassVar[frozenset[str]] = frozenset()  # options of a base class that a subclass decides
    auxiliary_weight: float = 0.0

    def __init__(
        self,
        schema: Schema,
        *,
        embedding: Embedding = EmbeddingOptions(),
        dense: Dense = DenseOptions(),
        statistics: Statistics | None = None,
        head: Head = HeadOptions(),
        click: Click = ClickOptions(),
        pooling: Pooling | None = None,
        product: bool = False,
        init: WeightInit = "torch",
        prelu_init: float = 0.25,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise refuse(name, list(self.options()))
        check_option("pooling", pooling, (None, "sum", "mean"))
        check_option("init", init, WEIGHT_INITS)
        check_flag("product", product)
        check_number("prelu_init", prelu_init)
        if product and pooling is None:
            raise ValueError("product must be False with pooling=None: there is no sum to multiply, got True")
        self.schema = schema
        self._rich = bool(schema.several or schema.behaviours or schema.behaviour_dense or schema.sequences)
        self.pooling = pooling
        self.product = product
        self.init = init
        self.prelu_init = prelu_init
        self.click = group_of(ClickOptions, click, ClickOptions())
        self.part: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.embeddings = Embeddings(
            schema,
            group_of(EmbeddingOptions, embedding, EmbeddingOptions()),
            group_of(DenseOptions, dense, DenseOptions()),
            statistics,
        )
        self._head = group_of(HeadOptions, head, HeadOptions())

    def _finish(self, interest_size: int) -> None:
        """For the end of a subclass's constructor: the MLP, and the values of all parameters. ``interest_size`` is the
        width of what the model reads out of one sequence."""
        item, sequences = self.embeddings.item_size, 1 + len(self.schema.sequences)
        pooled = 0 if self.pooling is None else self.embeddings.history_size + item * self.product
        inputs = self.embeddings.context_size + item + sequences * (pooled + interest_size)
        self.mlp = MLP(inputs, self._head, self.prelu_init)
        if self.init != "torch":
            set_weight_init(
                self, "glorot"
            )  # after all parameters have been drawn: seeds give the weights they always gave

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Every option of the constructor with its default, groups as mappings; None for a group that is left out."""
        found: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, RankingModel) and "__init__" in vars(base):
                for name, parameter in inspect.signature(base.__init__).parameters.items():
                    if parameter.kind is parameter.KEYWORD_ONLY and name != "statistics":
                        found[name] = parameter.default
        return cls.without_fixed({name: plain(v) if is_dataclass(v) else v for name, v in found.items()})

    @classmethod
    def without_fixed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` of models without those that this class decides itself."""
        found = {}
        for group, value in options.items():
            if isinstance(value, Mapping):
                value = {name: inner for name, inner in value.items() if f"{group}.{name}" not in cls.FIXED}
            found[group] = value
        return found

    @property
    def reads_negatives(self) -> bool:
        """Whether the model has a use for ``batch.negatives``."""
        return False

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        """The model's own part of the forward pass, from a ``batch`` and what its ids have ``embedded`` to."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Output:
        """Logits, auxiliary loss and attention of a batch whose tensors are on the model's device.

        Raises ``ValueError`` naming what does not fit the schema; ids are not read (``Batch.check`` does).
        """
        self._check(batch)
        with self.part("embedding"):
            embedded = self.embeddings(batch, negatives=self.reads_negatives)
        interest = self.interest(batch, embedded)
        with self.part("mlp"):
            inputs = [*embedded.context, embedded.target]
            if self.pooling is not None:
                self._pool(inputs, embedded.history, batch.histories, embedded.target)
                for name, steps in zip(self.schema.sequences, embedded.further, strict=True):
                    self._pool(inputs, steps.history, batch.sequences[name].histories, embedded.target)
            logits = self.mlp(torch.cat([*inputs, *interest.features], 1))
        return Output(
            logits.to(compute_dtype(logits.dtype)),
            interest.auxiliary,
            interest.attention,
            embedded.squares,
            interest.auxiliaries,
        )

    def _pool(self, inputs: list[Tensor], history: Tensor, histories: Histories, target: Tensor) -> None:
        """Add to ``inputs`` what ``pooling`` and ``product`` ask for, of one sequence [N, W]."""
        pooled = pool(history, histories)
        if self.pooling == "mean":
            pooled = pooled / cast(Tensor, histories.history_lengths()).clamp(min=1).unsqueeze(1)
        pooled = of_rows(pooled, histories)
        inputs.append(pooled)
        if self.product:
            item = target.shape[1]
            inputs.append(target * (pooled if pooled.shape[1] == item else pooled[:, :item]))

    def _check(self, batch: Batch) -> None:
        schema = self.schema
        for name, given, wanted in (
            ("history", batch.history, schema.items),
            ("target", batch.target, schema.items),
            ("users", batch.users, schema.users),
            ("negatives", batch.negatives, schema.items),
        ):
            if given is not None and given.keys() != wanted.keys():
                raise ValueError(f"batch.{name} must have the fields {sorted(wanted)}, got {sorted(given)}")
        targets, rows = (
            batch.rows,
            (
                batch.histories.rows(),
                *(ids.shape[0] for ids in batch.users.values()),
                *(() if batch.dense is None else (batch.dense.shape[0],)),
            ),
        )
        if any([count != targets for count in rows]):
            raise ValueError(
                f"batch.target must have as many rows as histories, users and dense: {rows}, got {targets}"
            )
        width = 0 if batch.dense is None else batch.dense.shape[1]
        if width != len(schema.dense):
            raise ValueError(f"batch.dense must have {len(schema.dense)} columns, got {width}")
        if self.training and self.reads_negatives and batch.negatives is None:
            raise ValueError(
                "batch.negatives must be given to train the auxiliary loss, got None: let the loader draw "
                "them, or build the model with auxiliary=None"
            )
        if self._rich or batch.behaviours or batch.behaviour_dense is not None or batch.sequences:
            check_rich(batch, schema, targets)

    def loss(
        self, output: Output, label: Tensor | None, *, weight: Tensor | None = None, share: Share | None = None
    ) -> Losses:
        """The losses of a batch. With x the logits, y the labels, s the sigmoid, e = ``click.eps`` and w the weights::

            l_b   = -(y_b log(s(x_b) + e) + (1 - y_b) log(s(-x_b) + e))
            click = sum_b w_b l_b / sum_b w_b         reduction="mean"
            click = sum_b w_b l_b                     reduction="sum"
            total = click.weight * click + auxiliary.weight * auxiliary + embedding.l2 * squares

        Terms that the output does not have are left out.

        Args:
            output: of the forward pass.
            label: y, float [B], 1 for a click.
            weight: w, float [B], finite and at least 0; None: all are 1. Where all are 0, so is the mean. The values
                are not read here (that would wait for a device), and others give losses without a meaning:
                ``Batch.check`` refuses them, and ``training_step`` where they lie on the CPU.
            share: of this batch among several whose gradients are added up (``shares``): each loss is multiplied by its
                share, and is 0 where its share is 0. None: the batch stands alone.

        Raises ``ValueError`` without labels of shape [B], and for weights of another shape.
        """
        x = output.logits
        if label is None or label.shape != x.shape:
            got = None if label is None else tuple(label.shape)
            raise ValueError(f"label must have shape [B] = {tuple(x.shape)}, got {got}")
        y, eps, reduction = label.to(x.dtype), self.click.eps, self.click.reduction
        if eps > 0:
            yes, no = torch.log(x.sigmoid() + eps), torch.log((-x).sigmoid() + eps)
            terms = -(y * yes + (1 - y) * no)
        elif weight is not None:
            terms = binary_cross_entropy_with_logits(x, y, reduction="none")
        if weight is not None:
            if weight.shape != x.shape:
                raise ValueError(f"weight must have shape [B] = {tuple(x.shape)}, got {tuple(weight.shape)}")
            weight = weight.to(x.dtype)
            click = (weight * terms).sum()
            if reduction == "mean":
                click = click / weight.sum().clamp(min=torch.finfo(x.dtype).tiny)
        elif eps > 0:
            click = terms.mean() if reduction == "mean" else terms.sum()
        else:
            click = binary_cross_entropy_with_logits(x, y, reduction=reduction)
        auxiliary, squares = output.auxiliary, output.squares
        if squares is not None and (share is None or share.rows):
            squares = squares / x.shape[0]
        if share is not None:
            # The mean over a batch without rows is NaN, and so is 0 * NaN.
            click = click * share.click if share.click else x[:0].sum()
            if output.auxiliaries is not None:
                factors = (share.auxiliary, *share.further)
                auxiliary = sum((a * f for a, f in zip(output.auxiliaries, factors, strict=True)), x.new_zeros(()))
            elif auxiliary is not None:
                auxiliary = auxiliary * share.auxiliary
            squares = None if squares is None else squares * share.rows
        total = self.click.weight * click
        if auxiliary is not None:
            total = total + self.auxiliary_weight * auxiliary
        if squares is not None:
            total = total + self.embeddings.l2 * squares
        return Losses(total, click, auxiliary, squares)

    def shares(self, batches: Sequence[Batch]) -> list[Share]:
        """What the losses of each batch count in the loss of one batch with all of their rows.

        Values of the batches are read: on the host, before they are moved to a device, nothing waits.
        """
        rows = [float(batch.rows) for batch in batches]
        if self.click.reduction == "sum":
            click = [1.0] * len(batches)
        else:
            weights = [batch.weight for batch in batches]
            click = [n if w is None else float(w.double().sum()) for n, w in zip(rows, weights, strict=True)]
            click = _parts_of_one(click)
        auxiliary = self.auxiliary_shares([batch.offsets for batch in batches])
        found = [Share(*share) for share in zip(click, auxiliary, _parts_of_one(rows), strict=True)]
        if not self.schema.sequences:
            return found
        sequences = self.schema.sequences
        further = [self.auxiliary_shares([batch.sequences[name].offsets for batch in batches]) for name in sequences]
        return [share._replace(further=own) for share, own in zip(found, zip(*further, strict=True), strict=True)]

    def auxiliary_shares(self, offsets: Sequence[Tensor]) -> list[float]:
        """``shares`` of the auxiliary loss, by the offsets of each batch's histories."""
        return [0.0] * len(offsets)

    @torch.inference_mode()
    def score(
        self,
        history: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        *,
        offsets: Tensor | None = None,
        history_of: Tensor | None = None,
        users: Mapping[str, Tensor] | None = None,
        dense: Tensor | None = None,
        behaviours: Mapping[str, Tensor] | None = None,
        behaviour_dense: Tensor | None = None,
        block: int | None = None,
    ) -> Tensor:
        """Probabilities of a click [B], in evaluation mode: the sigmoid of the forward's logits.

        The arguments history, targets, offsets, history_of, users, dense, behaviours and behaviour_dense are those of
        ``dien_kernels.models.candidates``; ids are checked, and tensors moved to the model's device.

        Rows are scored in blocks, so that memory does not grow with their number times that of the behaviours. What
        depends on a history alone runs once for each history in a block, however many targets read it. Blocks change
        scores by rounding at most: a matrix product may add up the last rows of a block in another order. A model
        whose scores depend on the rows beside them (``rows_depend_on_others``) is never given blocks. Nor are graphs
        of ``torch.compile`` and ``torch.export``.

        Args:
            block: rows of a block; None: as many as read 2^18 behaviours together.

        Raises ``TypeError`` or ``ValueError`` naming the argument that does not fit the schema or the others, and
        ``ValueError`` for a ``block`` below 1, or below B for a model whose rows depend on others.
        """
        batch = candidates(
            history,
            targets,
            offsets=offsets,
            history_of=history_of,
            users=users,
            dense=dense,
            behaviours=behaviours,
            behaviour_dense=behaviour_dense,
        )
        batch.check(self.schema)
        if torch.compiler.is_compiling():
            return self._scores([batch])
        if block is not None:
            check_size("block", block)
            if block < batch.rows and self.rows_depend_on_others:
                raise ValueError(
                    f"block must be None or at least the {batch.rows} rows for a model whose statistics are those of "
                    f"its batch (dice_statistics or norm 'batch'), got {block}"
                )
        parts = iter([batch]) if block is None and self.rows_depend_on_others else blocks(batch, block)
        return self._scores(parts)

    @property
    def rows_depend_on_others(self) -> bool:
        """Whether the score of a row depends on the rows beside it in evaluation, too: with ``head.dice_statistics`` or
        ``head.norm`` "batch", as in the preset "authors"."""
        head = self._head
        return head.norm == "batch" or (head.activation == "dice" and head.dice_statistics == "batch")

    def _scores(self, batches: Iterable[Batch]) -> Tensor:
        device, was = self.mlp.last.weight.device, self.training
        if was:
            self.eval()
        try:
            scores = [self(batch.to(device)).logits.sigmoid() for batch in batches]
            return scores[0] if len(scores) == 1 else torch.cat(scores)
        finally:
            if was:
                self.train()
