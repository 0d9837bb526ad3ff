"""Numbers as models read them: scaled by statistics of the training split, with a place for those that are missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from dien_kernels._options import unknown_name
from dien_kernels.checks import compute_dtype
from dien_kernels.models.options import DenseOptions
from dien_kernels.models.tables import Table, module_name, read

Statistics = Mapping[str, Mapping[str, Any]]


class Numbers(nn.Module):
    """Features [P, F] of F named numbers to inputs [P, ``size``] of a model.

    ::

        v_f = sign(x_f) log(1 + |x_f|)     scaling "log", and "standard" where the statistics say ``log``; else x_f
        z_f = (v_f - mean_f) / std_f       scaling "standard"; else v_f
        z_f = 0                            where x_f is missing: NaN or infinite
        m_f = 1 where x_f is missing, else 0
        i_f = row k of a table, k the number of quantiles of f that are at most x_f; its last row where x_f is missing

    The result has the z of all numbers but those with scaling "quantiles", in the schema's order, behind them the m of
    the numbers with an indicator, and then the i of the numbers with "quantiles".

    Args:
        names: of the F numbers, in the order of the columns.
        options: ``DenseOptions``.
        statistics: name to mean, std, missing (the share), log and quantiles; mean and std are those of log(1 + x)
            where ``log`` is true. Numbers that it does not name are unknown; None: all are.
        std: with which the tables of "quantiles" start.

    Buffers: ``mean``, ``std`` [F'], float32 whatever the dtype of the model; ``log`` [F'], bool, for the F' numbers
    without "quantiles", where there are statistics or logarithms of them; ``quantiles.NAME.bounds`` for the others.
    They are in the ``state_dict``. ``reset_parameters`` restores those that the module was made with.

    Raises ``ValueError`` naming what is missing or wrong in ``statistics`` or ``options``.
    """

    mean: Tensor
    std: Tensor
    log: Tensor

    def __init__(
        self, names: Sequence[str], options: DenseOptions, statistics: Statistics | None = None, std: float = 0.05
    ) -> None:
        super().__init__()
        known = {name: _checked(name, statistics[name]) for name in names if statistics and name in statistics}
        words = {name: _word(options, name) for name in names}
        self.columns = [i for i, name in enumerate(names) if words[name] != "quantiles"]
        self.bucketed = [(i, name) for i, name in enumerate(names) if words[name] == "quantiles"]
        plain = [names[i] for i in self.columns]
        self._start = [_affine(words[name], known.get(name)) for name in plain]
        self.scaled = any(name in known or words[name] == "log" for name in plain)
        if self.scaled:
            self.register_buffer("mean", torch.empty(len(plain), dtype=torch.float32))
            self.register_buffer("std", torch.empty(len(plain), dtype=torch.float32))
            self.register_buffer("log", torch.empty(len(plain), dtype=torch.bool))
        ask = options.indicator
        self.indicators = [i for i, name in enumerate(plain) if (_missing(known, name) if ask is None else ask)]
        self.quantiles = nn.ModuleDict()
        for _, name in self.bucketed:
            if name not in known:
                raise ValueError(f"statistics[{name!r}] must be given for dense.scaling='quantiles', got none")
            self.quantiles[module_name(name)] = _Intervals(known[name]["quantiles"], options.size, std)
        self.size = len(plain) + len(self.indicators) + options.size * len(self.bucketed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The statistics that the module was made with."""
        if self.scaled:
            for i, buffer in enumerate((self.mean, self.std, self.log)):
                with torch.no_grad():
                    buffer.copy_(torch.tensor([start[i] for start in self._start], dtype=buffer.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Numbers:
        """As ``nn.Module`` has it, but statistics keep float32: a mean of 48.3 years is not 48.25 in 16 bits."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        _keep_dtypes(self, kept)
        return self

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """``values`` float [P, F] to [P, ``size``] of ``dtype``."""
        values = values.to(torch.promote_types(values.dtype, compute_dtype(dtype)))
        missing = ~values.isfinite()
        x, gone = _columns(values, self.columns), _columns(missing, self.columns)
        x = x.masked_fill(gone, 0)
        if self.scaled:
            x = torch.where(self.log, x.sign() * x.abs().log1p(), x)
            x = ((x - self.mean) / self.std).masked_fill(gone, 0)
        found = [x.to(dtype)]
        if self.indicators:
            found.append(_columns(gone, self.indicators).to(dtype))
        for i, name in self.bucketed:
            found.append(self.quantiles[module_name(name)](values[:, i], missing[:, i]).to(dtype))
        return torch.cat(found, 1) if len(found) > 1 else found[0]


def _columns(values: Tensor, columns: Sequence[int]) -> Tensor:
    """``values`` [P, F] of some columns, without an index that would be copied to a device."""
    if len(columns) == values.shape[1]:
        return values
    return torch.stack([values[:, i] for i in columns], 1) if columns else values[:, :0]


class _Intervals(nn.Module):
    """A table of the intervals between ``bounds``, with a last row for values that are missing."""

    bounds: Tensor

    def __init__(self, bounds: Sequence[float], size: int, std: float) -> None:
        super().__init__()
        self._start = [float(bound) for bound in bounds]
        self.register_buffer("bounds", torch.empty(len(bounds), dtype=torch.float32))
        self.table = Table(len(bounds) + 2, size, std=std, sparse=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The bounds that the module was made with; the table has its own start."""
        with torch.no_grad():
            self.bounds.copy_(torch.tensor(self._start, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Intervals:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        _keep_dtypes(self, kept)
        return self

    def forward(self, values: Tensor, missing: Tensor) -> Tensor:
        interval = torch.bucketize(values.contiguous(), self.bounds.to(values.dtype), right=True)
        return read(self.table, interval.masked_fill(missing, self.table.num_embeddings - 1))


def _keep_dtypes(module: nn.Module, kept: Mapping[str, Tensor | None]) -> None:
    for name, before in kept.items():
        after = module._buffers[name]
        if before is not None and after is not None and after.dtype != before.dtype:
            module._buffers[name] = before.to(after.device)


def _word(options: DenseOptions, name: str) -> str:
    return options.scaling if isinstance(options.scaling, str) else options.scaling.get(name, "standard")


def _missing(known: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return name in known and known[name].get("missing", 0) > 0


def _affine(word: str, entry: Mapping[str, Any] | None) -> tuple[float, float, bool]:
    """Mean, std and whether of the logarithm, as the buffers have them."""
    if word != "standard" or entry is None:
        return 0.0, 1.0, word == "log"
    return entry["mean"], entry["std"] if entry["std"] > 0 else 1.0, bool(entry.get("log", False))


def _checked(name: str, entry: Any) -> Mapping[str, Any]:
    """Raise ``ValueError`` naming what a number's statistics lack."""
    where = f"statistics[{name!r}]"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a mapping with mean, std, missing, log and quantiles, got {entry!r}")
    for key in ("mean", "std"):
        value = entry.get(key)
        if not isinstance(value, (int, float)) or not isfinite(value) or (key == "std" and value < 0):
            least = " of at least 0" if key == "std" else ""
            raise ValueError(f"{where}[{key!r}] must be a finite number{least}, got {value!r}")
    bounds = list(entry.get("quantiles", ()))
    if any(not isfinite(bound) for bound in bounds) or bounds != sorted(bounds):
        raise ValueError(f"{where}['quantiles'] must be finite and ascending, got {bounds!r}")
    return {**entry, "quantiles": bounds}


def check_names(options: DenseOptions, names: Sequence[str]) -> None:
    """Raise ``ValueError`` for a number that ``dense.scaling`` names and that is not one of ``names``."""
    if isinstance(options.scaling, Mapping):
        for name in options.scaling:
            if name not in names:
                raise unknown_name("number", name, names, "dense.scaling")
