"""From a batch of ids and numbers to vectors: the tables of all fields, and what stands side by side in a behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dien_kernels._options import unknown_name
from dien_kernels.batch import Batch, Schema, Sequence
from dien_kernels.checks import check_size, compute_dtype
from dien_kernels.layers.starts import Linear
from dien_kernels.models.numbers import Numbers, Statistics, check_names
from dien_kernels.models.options import DenseOptions, EmbeddingOptions
from dien_kernels.models.tables import PretrainedTable, Table, module_name, read


class Steps(NamedTuple):
    """The behaviours of one sequence after the tables. E is the width of an item, the sum over item fields; W is that
    of a behaviour, E and the sum over fields and numbers of behaviours."""

    history: Tensor  # [N, W]: the item, then the fields of the behaviour, then its numbers
    items: Tensor  # [N, E]: the item alone
    negatives: Tensor | None  # [N, K, E]


class Embedded(NamedTuple):
    """A batch after the tables; E and W as in ``Steps``."""

    history: Tensor  # [N, W]
    target: Tensor  # [B, E]
    negatives: Tensor | None  # [N, K, E]
    context: list[Tensor]  # user fields [B, .] in the schema's order, then numbers [B, .]
    squares: Tensor | None  # the sum of the squares of all numbers read, where ``l2`` asks for it
    items: Tensor  # [N, E], the item's part of ``history``
    further: tuple[Steps, ...] = ()  # the further sequences, in the schema's order


class Embeddings(nn.Module):
    """One table for each field. The tables of item fields serve histories, targets and negatives alike, and all
    sequences share all tables.

    A table is read once for a batch, so it has one sparse gradient with a row for each id that was read.

    ::

        e = [table_f(id_f) for the fields f of an item]             of a history, a target, a negative
        e_f = mean or sum of table_f(id) over the ids that are not 0    where f has several values
        b = [e, table_g(id_g) for the fields g of a behaviour, its numbers]     what a history consists of

    Args:
        schema: names and sizes of the fields.
        options: see ``EmbeddingOptions``.
        dense: see ``DenseOptions``.
        statistics: of numbers, see ``dien_kernels.models.numbers.Numbers``.

    Attributes: ``items``, ``users`` and, where the schema has any, ``behaviours``: ``nn.ModuleDict`` of
    ``nn.Embedding`` under ``module_name`` of the field, which is nearly always the field itself; ``projections``, the
    matrices behind pretrained tables; ``dense`` and ``behaviour_dense``, ``Numbers``; ``item_size``, E;
    ``history_size``, W; ``context_size``.
    """

    def __init__(
        self,
        schema: Schema,
        options: EmbeddingOptions,
        dense: DenseOptions = DenseOptions(),
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__()
        self.dropout, self.l2, self.mean = options.dropout, options.l2, options.several == "mean"
        fields = _all_fields(schema)
        size = options.size
        sizes = dict(size) if isinstance(size, Mapping) else dict.fromkeys(fields, size)
        if set(sizes) != set(fields):
            raise ValueError(f"embedding.size must name exactly the fields {sorted(fields)}, got {sorted(sizes)}")
        for name, width in sizes.items():
            check_size(f"embedding.size[{name!r}]", width)
        for name in options.pretrained:
            if name not in fields:
                raise unknown_name("field", str(name), fields, "embedding.pretrained")

        def tables(kind: Mapping[str, int]) -> nn.ModuleDict:
            return nn.ModuleDict({module_name(name): _table(name, kind[name], sizes[name], options) for name in kind})

        self.items, self.users = tables(schema.items), tables(schema.users)
        if schema.behaviours:
            self.behaviours = tables(schema.behaviours)
        projected = {}
        for name in options.pretrained:
            table = self.table(name)
            own = table.embedding_dim
            if options.project is False and own != sizes[name]:
                raise ValueError(
                    f"embedding.size[{name!r}] must be {own}, the width of its pretrained table, with "
                    f"embedding.project=False, got {sizes[name]}"
                )
            if options.project or own != sizes[name]:
                projected[module_name(name)] = Linear(own, sizes[name], bias=False)
        if projected:
            self.projections = nn.ModuleDict(projected)
        self.projected = frozenset(projected)
        self._names = {name: module_name(name) for name in fields}
        self._plain = frozenset(fields) - schema.several.keys() - {f for f in fields if self._names[f] in projected}
        self.fields, self.user_fields, self.behaviour_fields = (
            tuple(schema.items),
            tuple(schema.users),
            tuple(schema.behaviours),
        )
        self.several, self.sequences = frozenset(schema.several), tuple(schema.sequences)
        check_names(dense, [*schema.dense, *schema.behaviour_dense])
        context, behaviour = 0, 0
        if schema.dense:
            self.dense = Numbers(schema.dense, dense, statistics, options.std)
            context = self.dense.size
        if schema.behaviour_dense:
            self.behaviour_dense = Numbers(schema.behaviour_dense, dense, statistics, options.std)
            behaviour = self.behaviour_dense.size
        self.item_size = sum(sizes[name] for name in schema.items)
        self.history_size = self.item_size + sum(sizes[name] for name in schema.behaviours) + behaviour
        self.context_size = sum(sizes[name] for name in schema.users) + context
        for module in self.modules():
            if isinstance(module, Table) and not isinstance(module, PretrainedTable):
                module.reset_parameters()  # for the second time, so that a seed gives the weights it always gave

    def table(self, field: str) -> Table:
        """The table of a field."""
        name = module_name(field)
        for kind in (self.items, self.users, getattr(self, "behaviours", {})):
            if name in kind:
                return cast(Table, kind[name])
        raise KeyError(field)

    def forward(self, batch: Batch, negatives: bool = True) -> Embedded:
        """``negatives=False`` leaves those of the batch unread."""
        given = batch.negatives if negatives else None
        further = [batch.sequences[name] for name in self.sequences]
        raw: list[Tensor] | None = [] if self.l2 and self.training and (self.several or self.projected) else None
        columns = []
        for name in self.fields:
            ids = [batch.history[name], batch.target[name]]
            if given is not None:
                ids.append(given[name].flatten(0, 1))
            for each in further:
                ids.append(each.history[name])
                if negatives and each.negatives is not None:
                    ids.append(each.negatives[name].flatten(0, 1))
            columns.append(self._read(self.items, name, torch.cat(ids), raw))
        items = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
        context = [self._read(self.users, name, batch.users[name], raw) for name in self.user_fields]
        behaviours: Tensor | None = None
        if self.behaviour_fields:
            columns = []
            for name in self.behaviour_fields:
                own = batch.behaviours[name]
                ids_of_all = torch.cat([own, *(each.behaviours[name] for each in further)]) if further else own
                columns.append(self._read(self.behaviours, name, ids_of_all, raw))
            behaviours = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
        squares = None
        if self.training:
            if self.l2:
                parts = (items, *context) if behaviours is None else (items, *context, behaviours)
                parts = parts if raw is None else tuple(raw)
                squares = sum(
                    (part.to(compute_dtype(part.dtype)).square().sum() for part in parts), items.new_zeros(())
                )
            if self.dropout:
                items = nn.functional.dropout(items, self.dropout)
                context = [nn.functional.dropout(part, self.dropout) for part in context]
                if behaviours is not None:
                    behaviours = nn.functional.dropout(behaviours, self.dropout)
        if batch.dense is not None and batch.dense.shape[1]:
            context.append(self.dense(batch.dense, items.dtype))
        n, b = next(iter(batch.history.values())).shape[0], batch.histories.rows()
        if not further and behaviours is None and batch.behaviour_dense is None:
            history, target, rest = items.split([n, b, items.shape[0] - n - b])
            if given is None:
                return Embedded(history, target, None, context, squares, history)
            return Embedded(history, target, _per_step(rest, given, n), context, squares, history)
        return self._split(batch, further, negatives, items, behaviours, context, squares)

    def _split(
        self,
        batch: Batch,
        further: list[Sequence],
        negatives: bool,
        items: Tensor,
        behaviours: Tensor | None,
        context: list[Tensor],
        squares: Tensor | None,
    ) -> Embedded:
        """What was read for all sequences at once, taken apart again."""
        found: list[Steps] = []
        target = items
        at = after = 0
        for number, steps in enumerate((batch, *further)):
            n = next(iter(steps.history.values())).shape[0]
            own = items[at : at + n]
            at += n
            if number == 0:
                b = batch.histories.rows()
                target = items[at : at + b]
                at += b
            drawn = None
            if negatives and steps.negatives is not None:
                count = next(iter(steps.negatives.values())).shape[1]
                drawn = _per_step(items[at : at + n * count], steps.negatives, n)
                at += n * count
            parts = [own]
            if behaviours is not None:
                parts.append(behaviours[after : after + n])
                after += n
            if steps.behaviour_dense is not None:
                parts.append(self.behaviour_dense(steps.behaviour_dense, items.dtype))
            found.append(Steps(torch.cat(parts, 1) if len(parts) > 1 else own, own, drawn))
        first = found[0]
        return Embedded(first.history, target, first.negatives, context, squares, first.items, tuple(found[1:]))

    def _read(self, tables: nn.ModuleDict, field: str, ids: Tensor, raw: list[Tensor] | None) -> Tensor:
        """[P, width] of ids [P], or [P, M] of a field with several values. ``raw`` collects what the table gave."""
        name = self._names[field]
        if raw is None and field in self._plain:
            return read(tables[name], ids)
        several = field in self.several
        values = read(tables[name], ids.flatten() if several else ids)
        there = ids.ne(0).unsqueeze(2) if several else None
        if there is not None:  # a value that is not there is no value, whatever stands in row 0
            values = values.unflatten(0, ids.shape).masked_fill(~there, 0)
        if raw is not None:
            raw.append(values)
        if name in self.projected:
            values = self.projections[name](values).to(values.dtype)  # autocast may have other ideas
        if there is not None:
            values = values.sum(1)
            if self.mean:
                values = values / there.sum(1).clamp(min=1)
        return values


def _per_step(rows: Tensor, negatives: Mapping[str, Tensor], n: int) -> Tensor:
    """``rows`` [N * K, E] as [N, K, E], for the K of ``negatives``."""
    return rows.view(n, next(iter(negatives.values())).shape[1], rows.shape[1])


def _table(name: str, rows: int, width: int, options: EmbeddingOptions) -> Table:
    source = options.pretrained.get(name)
    if source is None:
        return Table(rows, width, std=options.std, sparse=options.sparse)
    return PretrainedTable(name, rows, source, sparse=options.sparse, frozen=options.frozen)


def _all_fields(schema: Schema) -> dict[str, int]:
    """All fields, which must have names of their own."""
    found: dict[str, str] = {}
    for words, fields in (
        ("an item field", schema.items),
        ("a user field", schema.users),
        ("a behaviour field", schema.behaviours),
    ):
        both = sorted(name for name in fields if name in found)
        if both:
            raise ValueError(f"schema must not use a name for {found[both[0]]} and {words}, got {both}")
        found |= dict.fromkeys(fields, words)
    return {**schema.items, **schema.users, **schema.behaviours}
