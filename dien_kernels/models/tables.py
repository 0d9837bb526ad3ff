"""Embedding tables: how they start, those that start from given vectors, and how they are read."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from dien_kernels.layers.starts import WeightInit

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


class PretrainedTable(Table):
    """A table that starts from vectors which somebody else has trained.

    Args:
        name: of the field, for errors.
        rows: the vocabulary's size.
        source: a float tensor [rows, width], or the path of a file that ``torch.save`` wrote such a tensor to. It is
            kept for ``reset_parameters``: a path is read again, a tensor must not be changed.
        sparse: as in ``EmbeddingOptions``.
        frozen: the table is not trained.

    Row 0, the id of what the vocabulary does not know, starts as 0. Raises ``TypeError`` or ``ValueError`` naming the
    field for what is no such tensor, and ``FileNotFoundError``.
    """

    def __init__(self, name: str, rows: int, source: Any, *, sparse: bool, frozen: bool) -> None:
        self.field = name  # before the constructor of torch, which draws the values
        self.source = source.detach() if isinstance(source, Tensor) else source
        self._loaded: Tensor | None = _vectors(name, rows, source)
        super().__init__(rows, self._loaded.shape[1], std=0.0, sparse=sparse and not frozen)
        self.weight.requires_grad_(not frozen)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The vectors of ``source``, and 0 for id 0; ``weight_init`` has no say."""
        vectors = _vectors(self.field, self.num_embeddings, self.source) if self._loaded is None else self._loaded
        self._loaded = None
        self.weight.copy_(vectors)
        self.weight[0].zero_()


def _vectors(name: str, rows: int, source: Any) -> Tensor:
    """``source`` as a tensor, checked."""
    where = f"embedding.pretrained[{name!r}]"
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"there is no file {os.fspath(source)} ({where})")
        try:
            vectors = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file that is none makes of itself
            raise ValueError(f"{where} must be a file of torch.save, {os.fspath(source)} is none: {error}") from None
    else:
        vectors = source
    if not isinstance(vectors, Tensor):
        raise TypeError(f"{where} must be a tensor or the path of one, got {type(vectors).__name__}")
    if not vectors.is_floating_point() or vectors.dim() != 2 or vectors.shape[0] != rows or vectors.shape[1] < 1:
        raise ValueError(
            f"{where} must be a float tensor with a row for each of the {rows} ids, [{rows}, width], "
            f"got {vectors.dtype} {tuple(vectors.shape)}"
        )
    if not bool(vectors.isfinite().all()):
        raise ValueError(f"{where} must be finite, got NaN or infinite values")
    return vectors.detach()


def read(module: nn.Module, ids: Tensor) -> Tensor:
    """``module(ids)`` for ids [P]. On the CPU a dense gradient comes by ``index_add_``, in a third of the time of
    embedding's own backward; on a GPU ``index_add_`` would add in any order."""
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
