"""One optimiser for dense parameters and embedding tables with sparse gradients; clipping by their common
norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, SparseAdam


class _RowAdam(SparseAdam):
    """``SparseAdam``, state and numbers, which reads and writes the rows by index: sparse arithmetic costs twice as
    much."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._move(table, table.grad, group)

    def _move(self, table: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if not gradient.is_sparse:
            raise RuntimeError("tables must have sparse gradients, got a dense one: give such parameters as dense")
        state, (b1, b2) = self.state[table], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table)}
        state["step"] += 1
        gradient = gradient.coalesce()
        row, g = gradient._indices()[0], gradient._values()
        m = state["exp_avg"].index_select(0, row).lerp_(g, 1 - b1)
        v = state["exp_avg_sq"].index_select(0, row).mul_(b2).addcmul_(g, g, value=1 - b2)
        state["exp_avg"].index_copy_(0, row, m)
        state["exp_avg_sq"].index_copy_(0, row, v)
        size = group["lr"] * (1 - b2 ** state["step"]) ** 0.5 / (1 - b1 ** state["step"])
        moved = table.index_select(0, row).sub_(m.mul_(size).div_(v.sqrt_().add_(group["eps"])))
        table.index_copy_(0, row, moved)


def _can_fuse(parameters: Iterable[Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


class LazyAdam(Optimizer):
    """Adam whose cost does not grow with the size of embedding tables.

    Dense parameters are moved by ``torch.optim.Adam`` (fused). Tables are moved as ``torch.optim.SparseAdam``
    moves them, with lazy moments. With g the gradient of a table's row in step t::

        rows read by the batch    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
                                  row -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)
        all other rows            row, m and v stay as they are

    So a row's moments do not decay while it is not read, and it does not go on moving by old momentum, as it
    would in dense Adam; t counts steps of the optimiser, not readings of the row. While every row is read in
    each step tables move as dense Adam moves them, but for eps, which SparseAdam adds before the correction
    of v.

    Args:
        dense: parameters with dense gradients; may be empty.
        tables: parameters with sparse gradients; may be empty.
        lr: step size.
        table_lr: that of the tables; None: ``lr``.
        betas, eps: of both.
        weight_decay: L2 on the dense parameters alone: on tables it would touch every row.

    ``param_groups`` holds the dense group, then the tables', as far as they have parameters. ``state_dict``
    is ``{"dense": ..., "tables": ...}``, each a torch optimiser's own or None. Raises ``ValueError`` without
    parameters, and in ``load_state_dict`` for a state of other parameters.
    """

    def __init__(
        self,
        dense: Iterable[Tensor],
        tables: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        table_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        dense, tables = list(dense), list(tables)
        if not dense and not tables:
            raise ValueError("dense and tables must hold at least one parameter, got none")
        self._dense: Adam | None = None
        self._tables: _RowAdam | None = None
        if dense:
            self._dense = Adam(dense, lr, betas, eps, weight_decay, fused=_can_fuse(dense))
        if tables:
            self._tables = _RowAdam(tables, lr if table_lr is None else table_lr, betas, eps)
        super().__init__([*dense, *tables], {"lr": lr, "betas": betas, "eps": eps})
        self._share()

    def _parts(self) -> list[Optimizer]:
        return [part for part in (self._dense, self._tables) if part is not None]

    def _share(self) -> None:
        """The groups of the two are the groups of the one, so that schedulers and scalers reach them."""
        self.param_groups = [group for part in self._parts() for group in part.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("param_group cannot be added to a LazyAdam: build it with all parameters")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; ``closure`` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts():
            part.step()
        return loss

    def moments(self, parameter: Tensor) -> dict[str, Any]:
        """The optimiser's memory of ``parameter``: "step", "exp_avg", "exp_avg_sq"; empty before the first
        step."""
        for part in self._parts():
            if parameter in part.state:
                return dict(part.state[parameter])
        return {}

    def state_dict(self) -> dict[str, Any]:
        parts = {"dense": self._dense, "tables": self._tables}
        return {name: None if part is None else part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if set(state_dict) != {"dense", "tables"}:
            raise ValueError(f"state_dict must have the keys 'dense' and 'tables', got {sorted(state_dict)}")
        parts = {"dense": self._dense, "tables": self._tables}
        for name, part in parts.items():
            if (state_dict[name] is None) != (part is None):
                allowed = "None" if part is None else "given"
                raise ValueError(f"state_dict[{name!r}] must be {allowed} for these parameters")
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state_dict[name])
        self._share()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(dense, tables): the trainable parameters of ``model``, and of them those with sparse gradients."""
    tables = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trained if id(p) not in tables], [p for p in trained if id(p) in tables]


def make_optimizer(
    model: nn.Module,
    kind: str = "adam",
    *,
    lr: float = 1e-3,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
) -> Optimizer:
    """The optimiser of a model with sparse tables, dense ones or none.

    Args:
        model: the module whose trainable parameters are to be moved.
        kind: "adam", ``LazyAdam``; or "sgd", ``torch.optim.SGD`` without momentum, for which sparse and dense
            gradients are one and the same step.
        lr, embedding_lr: step sizes of dense parameters and of sparse tables (None: the same).
        weight_decay: L2 on dense parameters.

    Raises ``ValueError`` for another kind, and for a model without trainable parameters.
    """
    dense, tables = split_parameters(model)
    if kind == "adam":
        return LazyAdam(dense, tables, lr, table_lr=embedding_lr, weight_decay=weight_decay)
    if kind != "sgd":
        raise ValueError(f"kind must be 'adam' or 'sgd', got {kind!r}")
    groups = [
        {"params": dense, "lr": lr, "weight_decay": weight_decay},
        {"params": tables, "lr": lr if embedding_lr is None else embedding_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model must have trainable parameters, got none")
    return SGD(groups, lr)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)); returns their norm before, on their device.

    ``torch.nn.utils.clip_grad_norm_`` for gradients of which some are sparse, where it raises. A sparse
    gradient is coalesced first: rows that were read twice count by the sum of their parts, as in the dense
        gradient. Nothing is
    read on the host. Raises ``ValueError`` for a negative ``max_norm``.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    values = []
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        else:
            values.append(parameter.grad)
    norm = nn.utils.get_total_norm(values)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale.to(value.device))
    return norm
