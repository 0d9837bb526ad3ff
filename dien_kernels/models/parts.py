"""The parts every model is made of: embedding tables, the normalisation and activations of MLPs, MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dien_kernels.batch import Batch, Schema
from dien_kernels.checks import check_option, check_size, compute_dtype
from dien_kernels.layers import Dice
from dien_kernels.layers.starts import Linear, WeightInit
from dien_kernels.models.options import Activation, EmbeddingOptions, HeadOptions


class Embedded(NamedTuple):
    """A batch after the tables; E is the width of an item, the sum over item fields."""

    history: Tensor  # [N, E]
    target: Tensor  # [B, E]
    negatives: Tensor | None  # [N, K, E]
    context: list[Tensor]  # user fields [B, .] in the schema's order, then dense features [B, F]
    squares: Tensor | None = None  # the sum of the squares of all numbers read, where ``l2`` asks for it


_TAKEN = frozenset(dir(nn.ModuleDict()))


def module_name(field: str) -> str:
    """``field`` as ``nn.ModuleDict`` takes it, which wants no dots and no names of its own ("type", "items", ...)."""
    name = field.replace("%", "%25").replace(".", "%2E")
    return f"%{name}" if not name or name in _TAKEN else name


class Table(nn.Embedding):
    """``torch.nn.Embedding`` that starts as N(0, std^2), or by Glorot's rule with ``weight_init="glorot"``."""

    weight_init: WeightInit = "torch"

    def __init__(self, rows: int, width: int, *, std: float, sparse: bool) -> None:
        self.std = std  # before the constructor of torch, which draws the values
        super().__init__(rows, width, sparse=sparse)

    def reset_parameters(self) -> None:
        """The starting values, by ``weight_init`` and ``std``."""
        if self.weight_init == "glorot":
            nn.init.xavier_uniform_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)


class Embeddings(nn.Module):
    """One table for each field; the tables of item fields serve histories, targets and negatives alike.

    A table is read once for a batch, so it has one sparse gradient with a row for each id that was read.

    Args:
        schema: names and sizes of the fields.
        options: see ``EmbeddingOptions``.

    Attributes: ``items`` and ``users``, ``nn.ModuleDict`` of ``nn.Embedding`` under ``module_name`` of the field, which
        is nearly always the field itself; ``item_size``, ``context_size``.
    """

    def __init__(self, schema: Schema, options: EmbeddingOptions) -> None:
        super().__init__()
        size, std, sparse = options.size, options.std, options.sparse
        self.dropout, self.l2 = options.dropout, options.l2
        fields = {**schema.items, **schema.users}
        if len(fields) < len(schema.items) + len(schema.users):
            both = sorted(set(schema.items) & set(schema.users))
            raise ValueError(f"schema must not use a name for an item field and a user field, got {both}")
        sizes = dict(size) if isinstance(size, Mapping) else dict.fromkeys(fields, size)
        if set(sizes) != set(fields):
            raise ValueError(f"embedding.size must name exactly the fields {sorted(fields)}, got {sorted(sizes)}")
        for name, width in sizes.items():
            check_size(f"embedding.size[{name!r}]", width)
        self.items = nn.ModuleDict(
            {module_name(name): Table(rows, sizes[name], std=std, sparse=sparse) for name, rows in schema.items.items()}
        )
        self.users = nn.ModuleDict(
            {module_name(name): Table(rows, sizes[name], std=std, sparse=sparse) for name, rows in schema.users.items()}
        )
        self.fields, self.user_fields = tuple(schema.items), tuple(schema.users)
        self.item_size = sum(sizes[name] for name in schema.items)
        self.context_size = sum(sizes[name] for name in schema.users) + len(schema.dense)
        for table in self.modules():
            if isinstance(table, Table):
                table.reset_parameters()  # for the second time, so that a seed gives the weights that it always gave

    def forward(self, batch: Batch, negatives: bool = True) -> Embedded:
        """``negatives=False`` leaves those of the batch unread."""
        given = batch.negatives if negatives else None
        n, b = next(iter(batch.history.values())).shape[0], batch.histories.rows()
        columns = []
        for name in self.fields:
            table = self.items[module_name(name)]
            ids = [batch.history[name], batch.target[name]]
            if given is not None:
                ids.append(given[name].flatten())
            columns.append(_read(table, torch.cat(ids)))
        items = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
        context = [_read(self.users[module_name(name)], batch.users[name]) for name in self.user_fields]
        squares = None
        if self.training:
            if self.l2:
                parts = (items, *context)
                squares = sum(
                    (part.to(compute_dtype(part.dtype)).square().sum() for part in parts), items.new_zeros(())
                )
            if self.dropout:
                items = nn.functional.dropout(items, self.dropout)
                context = [nn.functional.dropout(part, self.dropout) for part in context]
        if batch.dense is not None and batch.dense.shape[1]:
            context.append(batch.dense.to(items.dtype))
        history, target, rest = items.split([n, b, items.shape[0] - n - b])
        if given is None:
            return Embedded(history, target, None, context, squares)
        count = next(iter(given.values())).shape[1]
        return Embedded(history, target, rest.view(n, count, self.item_size), context, squares)


def _read(module: nn.Module, ids: Tensor) -> Tensor:
    """``module(ids)``. On the CPU a dense gradient comes by ``index_add_``, in a third of the time of embedding's own
    backward; on a GPU ``index_add_`` would add in any order."""
    table = cast(nn.Embedding, module)
    if table.sparse and torch.compiler.is_compiling() and torch.is_grad_enabled() and table.weight.requires_grad:
        # Only fullgraph=True sees it: else the graph breaks, and the tables are read outside of it.
        raise RuntimeError(
            "torch.compile has no sparse gradients: make the model with sparse=False to train it in one graph, got "
            "sparse=True"
        )
    # Without a gradient there is nothing sparse, and reading the rows at once spares a request the module's call.
    if ids.device.type != "cpu" or (table.sparse and torch.is_grad_enabled()):
        rows: Tensor = table(ids)
        return rows
    return table.weight.index_select(0, ids)


class Norm(nn.Module):
    """gamma * (x - mean) / sqrt(var + eps) + beta over the last dimension; ``statistics`` says of what.

    ``"fixed"``: mean 0 and variance 1 for ever, so that it is a map of each feature by itself: what the
    authors' code does, whose batch norm stays in inference mode. ``"moving"``: the batch in training, moving
    averages in evaluation, ``torch.nn.BatchNorm1d``. ``"batch"``: the batch in both, as xdl does. A batch of
    fewer than two rows has no variance: the moving averages are used, in training too.

    eps: 1e-3 for "fixed", else 1e-5 unless given.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int, statistics: str = "moving", eps: float | None = None) -> None:
        super().__init__()
        check_option("statistics", statistics, ("fixed", "moving", "batch"))
        self.statistics = statistics
        self.eps = eps if eps is not None else 1e-3 if statistics == "fixed" else 1e-5
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        if statistics != "fixed":
            self.register_buffer("running_mean", torch.empty(size))
            self.register_buffer("running_var", torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma 1, beta 0; the moving averages are those of no batch, mean 0 and variance 1."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.statistics != "fixed":
            nn.init.zeros_(self.running_mean)
            nn.init.ones_(self.running_var)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, statistics={self.statistics!r}, eps={self.eps}"

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) of the fixed map."""
        return self.weight * (1 + self.eps) ** -0.5, self.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics == "fixed":
            scale, shift = self.affine()
            return x * scale + shift
        several = x.shape[0] > 1
        return nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=several and (self.training or self.statistics == "batch"),
            momentum=0.1 if self.training else 0.0,
            eps=self.eps,
        )


class BatchDice(nn.Module):
    """The Dice of the authors' code: statistics are the batch's own, in training and in evaluation.

    ::

        f(s) = p * s + (1 - p) * alpha * s,   p = sigmoid((s - E[s]) / (sqrt(E[(s - E[s])^2 + eps]) + eps))

    So the value of a row depends on its companions; ``dien_kernels.layers.Dice`` keeps moving averages. Input
    and result [P, M]; ``alpha`` [M] starts at 0. For one row p is 1/2.
    """

    def __init__(self, size: int, eps: float = 1e-9) -> None:
        super().__init__()
        self.eps = eps
        self.alpha = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``alpha`` is 0."""
        nn.init.zeros_(self.alpha)

    def forward(self, s: Tensor) -> Tensor:
        away = s - s.mean(0)
        deviation = (away.square() + self.eps).mean(0).sqrt()
        p = torch.sigmoid(away / (deviation + self.eps))
        return (p + (1 - p) * self.alpha) * s


def activation_of(
    name: Activation, size: int, *, dice_statistics: str = "moving", prelu_init: float = 0.25
) -> nn.Module:
    """The module of an activation on [P, size]; PReLU has a slope for each channel."""
    if name == "dice":
        return Dice(size) if dice_statistics == "moving" else BatchDice(size)
    if name == "prelu":
        return nn.PReLU(size, init=prelu_init)
    return nn.ReLU() if name == "relu" else nn.Sigmoid()


class MLP(nn.Module):
    """[P, inputs] to one logit a row, [P].

    ::

        z_0 = Norm(x) or x,   z_i = dropout(act(W_i z_{i-1} + b_i)),   o = W_L z_{L-1} + b_L
        logit = o             outputs=1
        logit = o_0 - o_1     outputs=2: softmax over two classes, the first of them the click

    Args:
        inputs: features of x.
        options: see ``HeadOptions``.
        prelu_init: the start of every slope of PReLU.
    """

    def __init__(self, inputs: int, options: HeadOptions, prelu_init: float = 0.25) -> None:
        super().__init__()
        self.norm = None if options.norm is None else Norm(inputs, options.norm)
        self.dropout = options.dropout
        sizes = (inputs, *options.units)
        self.linears = nn.ModuleList(Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        self.activations = nn.ModuleList(
            activation_of(options.activation, unit, dice_statistics=options.dice_statistics, prelu_init=prelu_init)
            for unit in options.units
        )
        self.last = Linear(sizes[-1], options.outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        for linear, act in zip(self.linears, self.activations, strict=True):
            x = act(linear(x))
            if self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
        out: Tensor = self.last(x)
        return out[:, 0] if out.shape[1] == 1 else out[:, 0] - out[:, 1]
