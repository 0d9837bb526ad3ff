"""Optimizers for dense parameters and for embedding tables with sparse gradients; clipping by their common norm."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, SparseAdam

from dien_kernels._options import unknown_name


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
        dense: parameters with dense gradients, or groups of them, as ``torch.optim.Adam`` takes them; may be empty.
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
        dense: Iterable[Tensor] | Iterable[dict[str, Any]],
        tables: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        table_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        dense, tables = list(dense), list(tables)  # type: ignore[assignment]
        every: list[Tensor] = []
        for one in dense:
            every += one["params"] if isinstance(one, dict) else [one]
        if not dense and not tables:
            raise ValueError("dense and tables must hold at least one parameter, got none")
        self._dense: Adam | None = None
        self._tables: _RowAdam | None = None
        if dense:
            self._dense = Adam(dense, lr, betas, eps, weight_decay, fused=_can_fuse(every))
        if tables:
            self._tables = _RowAdam(tables, lr if table_lr is None else table_lr, betas, eps)
        super().__init__([*every, *tables], {"lr": lr, "betas": betas, "eps": eps})
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


def _tables_of(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    return [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(dense, tables): the trainable parameters of ``model`` with dense gradients, and the tables with sparse ones."""
    tables = {id(module.weight) for module in _tables_of(model) if module.sparse}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trained if id(p) not in tables], [p for p in trained if id(p) in tables]


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "LazyAdam": LazyAdam,
    **{
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    },
}
_CPU = torch.device("cpu")
# What torch makes of options that it cannot use.
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError)
_GIVEN = ("params", "dense", "tables", "lr", "table_lr")  # arguments that are no options of their own


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a name that is no optimizer, or options that are not the optimizer's, with what comes
    close."""
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    known = [option for option in inspect.signature(OPTIMIZERS[name]).parameters if option not in _GIVEN]
    for option in options:
        if option not in known:
            raise unknown_name("option", str(option), known, "optimizer.options")


def make_optimizer(
    model: nn.Module,
    name: str = "LazyAdam",
    *,
    lr: float = 1e-3,
    table_lr: float | None = None,
    **options: Any,
) -> Optimizer:
    """The optimizer of a model with sparse embedding tables, dense ones or none.

    Args:
        model: the module whose trainable parameters are to be moved.
        name: "LazyAdam", or a class of ``torch.optim``.
        lr: the step size.
        table_lr: the step size of the embedding tables, sparse and dense ones (None: the same).
        **options: the class's own. ``weight_decay`` acts on parameters with dense gradients alone: on a sparse table it
            would touch every row in every step.

    Raises ``ValueError`` for an unknown name or option, for a value that torch refuses, for a model without trainable
    parameters, and for an optimizer that cannot take the gradients of the model, with what to do.
    """
    check_optimizer(name, options)
    kind: Any = OPTIMIZERS[name]
    dense, tables = split_parameters(model)
    if not dense and not tables:
        raise ValueError("model must have trainable parameters, got none")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    groups: list[dict[str, Any]] = [{"params": dense}]
    if table_lr is not None:  # dense tables are parameters like others, but for their step size
        own = {id(table.weight) for table in _tables_of(model)}
        groups = [{"params": [p for p in dense if id(p) not in own]}]
        groups += [{"params": [p for p in dense if id(p) in own], "lr": table_lr}]
    groups = [group for group in groups if group["params"]]
    try:
        if kind is LazyAdam:
            first = dense if table_lr is None else groups
            found = LazyAdam(first, tables, lr, table_lr=table_lr, **options)
            if (
                reason := _refuses(functools.partial(LazyAdam, tables=[]), lr, options, _CPU, sparse=False)
            ) is not None:
                raise ValueError(reason)
            return found
        if tables:
            group = {"params": tables, "lr": lr if table_lr is None else table_lr}
            if "weight_decay" in inspect.signature(kind).parameters:
                group["weight_decay"] = 0.0
            groups.append(group)
        optimizer: Optimizer = kind(groups, lr=lr, **options)
    except _REFUSALS as error:
        words = f"the optimizer {name} refuses its options or the model: {error}"
        raise ValueError(f"{words}{_refused_options(kind, lr, options)}") from error
    if tables and (reason := _refuses(kind, lr, options, tables[0].device, sparse=True)) is not None:
        raise ValueError(
            f"the optimizer {name} cannot take the sparse gradients of the embedding tables ({reason}): make the model "
            "with sparse=False (model.options.embedding.sparse=false), or take LazyAdam"
        )
    if dense and (reason := _refuses(kind, lr, options, dense[0].device, sparse=False)) is not None:
        raise ValueError(
            f"the optimizer {name} cannot move parameters with dense gradients ({reason})"
            f"{_refused_options(kind, lr, options)}"
        )
    return optimizer


def _refused_options(kind: Any, lr: float, options: Mapping[str, Any]) -> str:
    """For the end of a message: the options without which the optimizer would do, or all where it is not one alone."""
    if kind is LazyAdam:
        kind = functools.partial(LazyAdam, tables=[])

    def fits(some: Mapping[str, Any]) -> bool:
        return _refuses(kind, lr, some, _CPU, sparse=False) is None

    if not fits({}):
        return ""  # it is not the options
    wrong = [o for o in options if fits({other: v for other, v in options.items() if other != o})] or list(options)
    return f" (from {', '.join(f'optimizer.options.{o} = {options[o]!r}' for o in wrong)})"


def _refuses(kind: Any, lr: float, options: Mapping[str, Any], device: torch.device, *, sparse: bool) -> str | None:
    """Why an optimizer does not move a parameter by a gradient of this kind, tried in two steps; None if it does.

    torch has no list of the optimizers that take sparse gradients, and it depends on their options, too.
    """
    parameter = nn.Parameter(torch.zeros(3, 2, device=device))
    if sparse and "weight_decay" in options:
        options = {**options, "weight_decay": 0.0}
    try:
        optimizer = kind([parameter], lr=lr, **options)
        for _ in range(2):
            gradient = torch.ones(3, 2, device=device)
            if sparse:
                row = torch.tensor([[1]], device=device)
                gradient = torch.sparse_coo_tensor(row, gradient[:1], (3, 2), check_invariants=False)
            parameter.grad = gradient
            optimizer.step()
    except _REFUSALS as error:
        return str(error).splitlines()[0]
    return None


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)); returns their norm before, on their device.

    ``torch.nn.utils.clip_grad_norm_`` for gradients of which some are sparse, where it raises. A sparse
    gradient is coalesced first: rows that were read twice count by the sum of their parts, as in the dense
    gradient. Nothing is read on the host. Raises ``ValueError`` for a negative ``max_norm``.
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
