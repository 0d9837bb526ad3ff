"""``Histories``: how the steps of a batch of histories lie in memory, as one value.

Room card. Lives here: the type that every op, layer, model, loader and backend reads the layout of a batch from, its
checks, and the tensors that follow from it. May import: torch, ``checks``, ``index_checks``. Must not be here: the data
that is laid out, and mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree

from dien_kernels.checks import check_index, check_tensor
from dien_kernels.index_checks import (
    assert_in_graph,
    check_history_of,
    check_layout,
    check_lengths,
    check_offsets,
    check_rows_total_type,
)

_T = TypeVar("_T")


class MaskIndex(NamedTuple):
    """Where the steps of a boolean mask go when its holes are squeezed out; made once, used for every tensor."""

    slot: Tensor  # [U, T] compact step of each valid step, T (a slot that is cut off) for the others
    source: Tensor  # [U, T] compact step whose state stands at each step: the last valid one so far, at least 0
    so_far: Tensor  # [U, T] number of valid steps up to and including this one
    mask: Tensor


class RowsOfHistory(NamedTuple):
    """The rows that read each history, in ascending order: ``rows[first[u] : first[u + 1]]`` read history u."""

    rows: Tensor
    first: Tensor


class Histories:
    """How U histories of different lengths lie in memory, and which of them each of B rows reads.

    The data itself, for example inputs or states, is a tensor beside this value. One of four layouts:

    - ``Histories()``: data [U, T, ...], every history has all T steps;
    - ``lengths``, int64 [U]: data [U, T, ...], history u is steps 0 to ``lengths[u]`` - 1, and what follows is padding;
    - ``mask``, bool [U, T]: data [U, T, ...], the steps of a history are those where the mask is True;
    - ``offsets``, int64 [U + 1], from 0 to N and ascending: data [N, ...], history u is ``offsets[u]`` to ``offsets[u
      + 1]`` - 1.

    ``history_of``, int64 [B], names the history that each row reads; None means that U = B and that row b reads
    history b. ``rows_total`` is the number of steps of all rows together, which a jagged result with shared histories
    has; it is -1 where no ``history_of`` or no ``offsets`` is given, or where it is not known.

    The attributes must not be changed after construction: tensors that follow from them (the order of the rows by
    length, the row of each step, ...) are computed at first use and kept, so that two recurrences on one batch sort
    it once. Under ``torch.compile`` they are not kept, as the compiler merges equal computations itself.

    A value can be passed to functions that are compiled with ``torch.compile(fullgraph=True, dynamic=True)`` or
    exported with ``torch.export``, as it is a pytree of its attributes; it can be pickled, and ``to`` moves it to
    another device. No attribute has a gradient.

    The constructor takes what it is given; users should call ``of``, which checks it.
    """

    __slots__ = ("_checked", "_kept", "history_of", "lengths", "mask", "offsets", "rows_total")

    def __init__(
        self,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        history_of: Tensor | None = None,
        mask: Tensor | None = None,
        rows_total: int = -1,
    ) -> None:
        self.lengths = lengths
        self.offsets = offsets
        self.history_of = history_of
        self.mask = mask
        self.rows_total = rows_total
        self._kept: dict[Hashable, Any] = {}
        self._checked = False  # whether types, dtypes and ranks are known to be right

    @classmethod
    def of(
        cls,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        history_of: Tensor | None = None,
        rows_total: int | None = None,
        name: str = "history_of",
    ) -> Histories:
        """A checked value from at most one of ``lengths``, ``offsets`` and ``mask``, and from ``history_of``.

        Args:
            lengths: int64 or int32 [U], in steps, each at least 0.
            offsets: int64 or int32 [U + 1], ascending from 0 to N.
            mask: bool [U, T], True for the steps that count.
            history_of: int64 or int32 [B], from 0 to U - 1.
            rows_total: the steps of all rows together. It is counted where it is not given and reading ``offsets`` does
                not wait for a device.
            name: what errors call ``history_of``.

        Values of index tensors are read where this does not wait for a device: on the CPU, outside of compiled
        graphs. That lengths fit into the padded steps, and that offsets end with N, is checked when data is at hand.

        Raises ``TypeError`` or ``ValueError`` naming the argument that is wrong, what was given and what is allowed.

        >>> histories = Histories.of(offsets=torch.tensor([0, 2, 2, 5]), history_of=torch.tensor([2, 0, 2]))
        >>> histories.rows_total, histories.row_lengths()
        (8, tensor([3, 2, 3]))
        """
        histories = cls(
            *check_layout(lengths, offsets, mask),
            None if history_of is None else check_index(name, history_of, "[B]"),
            mask,
        )
        histories._check_devices(name)
        histories.rows_total = histories._steps_of_rows(rows_total)
        histories.trusted()
        if not torch.compiler.is_compiling():
            histories.check_values(name=name)
        return histories

    @classmethod
    def given(
        cls,
        data: Tensor,
        data_name: str,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        history: Tensor | None = None,
        histories: Histories | None = None,
        time_major: bool = False,
    ) -> Histories:
        """What the keywords of the ops say of ``data``: ``histories`` itself, or a value made of the others.

        lengths, offsets, mask and history are those of the ops, ``data_name`` is what errors call the data, and
        ``time_major`` as in ``count``. Only types, dtypes, shapes and devices are checked, as the ops read the values.
        Errors call ``history_of`` "history", as the ops do.
        """
        if histories is None:
            if lengths is offsets is mask is history is None:
                histories = _FULL  # one value, which all such calls share
            else:
                layout = check_layout(lengths, offsets, mask)
                histories = cls(*layout, None if history is None else check_index("history", history, "[B]"), mask)
        else:
            if not isinstance(histories, Histories):
                raise TypeError(f"histories must be a dien_kernels.Histories, got {type(histories).__name__}")
            for other, value in (("lengths", lengths), ("offsets", offsets), ("mask", mask), ("history", history)):
                if value is not None:
                    raise ValueError(f"{other} must be None where histories is given, got a {type(value).__name__}")
            histories._check_types()
        histories.check_data(data, data_name, time_major)
        return histories

    @classmethod
    def from_jagged(cls, jagged: Any) -> tuple[Tensor, Histories]:
        """The values [N, ...] and the layout of a jagged tensor, neither of them copied.

        Args:
            jagged: an object with methods ``values()`` and ``offsets()``: a ``JaggedTensor`` of TorchRec, or a nested
                tensor of torch with ``layout=torch.jagged``.

        Offsets of int32 are widened to int64. The way back needs no method: ``JaggedTensor(values,
        offsets=h.offsets)`` or ``torch.nested.nested_tensor_from_jagged(values, h.offsets)``. Raises ``TypeError``
        for anything else, and as ``of``.

        >>> nested = torch.nested.nested_tensor_from_jagged(torch.randn(5, 3), torch.tensor([0, 2, 5]))
        >>> values, histories = Histories.from_jagged(nested)
        >>> values.shape, histories.offsets
        (torch.Size([5, 3]), tensor([0, 2, 5]))
        """
        if isinstance(jagged, Tensor) and jagged.layout is not torch.jagged:
            raise TypeError(f"jagged must be a jagged tensor, got a torch.Tensor with layout {jagged.layout}")
        if isinstance(jagged, Tensor) and cast(Any, jagged).lengths() is not None:
            raise TypeError("jagged must be without holes: one row behind another, got a nested tensor with lengths")
        if callable(getattr(jagged, "keys", None)):
            raise TypeError(f"jagged must be a jagged tensor of one feature, got a {type(jagged).__name__} with keys")
        if not (callable(getattr(jagged, "values", None)) and callable(getattr(jagged, "offsets", None))):
            raise TypeError(f"jagged must have methods values() and offsets(), got {type(jagged).__name__}")
        values, offsets = jagged.values(), jagged.offsets()
        check_tensor("jagged.values()", values)
        histories = cls.of(offsets=offsets)
        histories.check_values(total=values.shape[0])
        return values, histories

    @property
    def jagged(self) -> bool:
        """Whether the data is [N, ...]."""
        return self.offsets is not None

    @property
    def full(self) -> bool:
        """Whether every history is known to have all steps of its padded data."""
        return self.lengths is None and self.offsets is None and self.mask is None

    def count(self, data: Tensor | None = None, time_major: bool = False) -> int:
        """U, the number of histories; only where all of them are full is ``data`` asked, [U, T, ...], or
        [T, U, ...] with ``time_major``."""
        if self.offsets is not None:
            return self.offsets.shape[0] - 1
        known = self.lengths if self.lengths is not None else self.mask
        if known is not None:
            return known.shape[0]
        if data is None:
            raise ValueError("data must be given where every history is full, to say how many there are, got None")
        return data.shape[1 if time_major else 0]

    def rows(self, data: Tensor | None = None, time_major: bool = False) -> int:
        """B, the number of rows; ``data`` and ``time_major`` as in ``count``."""
        return self.count(data, time_major) if self.history_of is None else self.history_of.shape[0]

    def steps(self, data: Tensor, time_major: bool = False) -> int:
        """T, the padded number of steps of ``data`` (``time_major`` as in ``count``); 0 for jagged data, whose longest
        history only reading the offsets would tell."""
        return 0 if self.offsets is not None else data.shape[0 if time_major else 1]

    def device(self) -> torch.device | None:
        """Where the tensors are; None where there is none."""
        return next((t.device for t in self._tensors() if t is not None), None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Histories:
        """The value with ``function`` applied to every tensor."""
        lengths, offsets, history_of, mask = (None if t is None else function(t) for t in self._tensors())
        return Histories(lengths, offsets, history_of, mask, self.rows_total)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Histories:
        """The value on another device; ``non_blocking`` as in ``torch.Tensor.to``."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def each_once(self) -> Histories:
        """The histories themselves, without ``history_of``: the layout of what runs once for each history."""
        return self if self.history_of is None else self._keep("each_once", self._each_once)

    def _each_once(self) -> Histories:
        return Histories(self.lengths, self.offsets, None, self.mask).trusted(self._checked)

    def compacted(self) -> Histories:
        """The layout after ``compact``: the steps of a mask, moved to the front of their histories, have lengths."""
        return self if self.mask is None else self._keep("compacted", self._compacted)

    def _compacted(self) -> Histories:
        return Histories(cast(Tensor, self.mask).sum(1), None, self.history_of)

    # Tensors that follow.

    def history_lengths(self) -> Tensor | None:
        """int64 [U], the number of steps of each history; None where all have T."""
        if self.offsets is not None:
            return self._keep("history_lengths", self.offsets.diff)
        if self.mask is not None:
            return self.compacted().lengths
        return self.lengths

    def row_lengths(self) -> Tensor | None:
        """int64 [B], the number of steps of each row; None where all have T."""
        if self.history_of is None:
            return self.history_lengths()
        return None if self.full else self._keep("row_lengths", self._row_lengths)

    def _row_lengths(self) -> Tensor:
        length = cast(Tensor, self.history_lengths())
        return length[self.index(length.shape[0])]

    def index(self, histories: int) -> Tensor:
        """int64 [B], the history of each row, from 0 to U - 1 even if nobody has read the values; U = ``histories``."""
        return cast(Tensor, self.history_of).clamp(0, max(histories - 1, 0))

    def order(self, sort: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """int64 [B], the rows from the longest to the shortest, equal ones as they are; None where all have T steps.

        ``sort`` computes this order from the lengths, faster than ``argsort`` where the caller knows how.
        """
        length = self.row_lengths()
        if length is None:
            return None
        return self._keep("order", lambda: longest_first(length) if sort is None else sort(length))

    def with_order(self, order: Tensor | None) -> Histories:
        """This value, with an order that ``order`` has computed before."""
        if order is not None:
            self._kept["order"] = order
        return self

    def row_starts(self, total: int) -> Tensor:
        """int64 [B], where each row starts in a jagged result of ``total`` steps: the sum of the lengths before it."""
        if self.history_of is None:
            return cast(Tensor, self.offsets)[:-1]
        return self._keep("row_starts", self._row_starts).clamp(0, total)

    def _row_starts(self) -> Tensor:
        length = cast(Tensor, self.row_lengths())
        return length.cumsum(0) - length

    def row_of_step(self, total: int) -> Tensor:
        """int64 [``total``], the row of each step of all rows, one row after another; for jagged data.

        ``total`` is N, or ``rows_total`` with shared histories. Steps that no row has, where ``total`` is wrong and
        nobody has read the values, are given to the last row.
        """
        return self._keep(("row_of_step", total), lambda: self._row_of_step(total))

    def _row_of_step(self, total: int) -> Tensor:
        length = cast(Tensor, self.row_lengths())
        rows = torch.arange(length.shape[0], device=length.device)
        if length.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_values(total=total if self.history_of is None else None)
            self.check_steps_of_rows(total)  # repeat_interleave would write past its result before it complains
            return torch.repeat_interleave(rows, length, output_size=total)
        step = torch.arange(total, device=length.device)
        return torch.searchsorted(length.cumsum(0), step, right=True).clamp(max=max(length.shape[0] - 1, 0))

    def source_of_step(self, total: int, data_rows: int) -> Tensor | None:
        """int64 [``total``], the row of jagged data [``data_rows``, ...] that each step of all rows reads; None: its
        own."""
        if self.history_of is None:
            return None
        return self._keep(("source_of_step", total, data_rows), lambda: self._source_of_step(total, data_rows))

    def _source_of_step(self, total: int, data_rows: int) -> Tensor:
        first = cast(Tensor, self.offsets)[:-1]
        shift = first[self.index(first.shape[0])] - self._keep("row_starts", self._row_starts)
        source = shift[self.row_of_step(total)] + torch.arange(total, device=first.device)
        return source.clamp(0, max(data_rows - 1, 0))

    def rows_of_history(self, histories: int) -> RowsOfHistory:
        """The rows that read each of U = ``histories`` histories."""
        return self._keep(("rows_of_history", histories), lambda: self._rows_of_history(histories))

    def _rows_of_history(self, histories: int) -> RowsOfHistory:
        by_history, rows = cast(Tensor, self.history_of).sort(stable=True)
        first = torch.searchsorted(by_history, torch.arange(histories + 1, device=rows.device))
        return RowsOfHistory(rows, first)

    def mask_index(self) -> MaskIndex | None:
        """How the steps of ``mask`` are squeezed together and spread out again; None without a mask."""
        return None if self.mask is None else self._keep("mask_index", self._mask_index)

    def _mask_index(self) -> MaskIndex:
        mask = cast(Tensor, self.mask)
        count = mask.cumsum(1)
        source = (count - 1).clamp(min=0)
        return MaskIndex(torch.where(mask, source, mask.shape[1]), source, count, mask)

    def row_mask_index(self) -> MaskIndex | None:
        """``mask_index`` of each row instead of each history."""
        if self.mask is None or self.history_of is None:
            return self.mask_index()
        return self._keep("row_mask_index", self._row_mask_index)

    def _row_mask_index(self) -> MaskIndex:
        index = cast(MaskIndex, self.mask_index())
        row = self.index(index.mask.shape[0])
        return MaskIndex(*(t[row] for t in index))

    # Checks.

    def check_data(self, data: Tensor, name: str, time_major: bool = False) -> None:
        """Raise ``ValueError`` where ``data``, [U, T, ...] ([T, U, ...] with ``time_major``) or [N, ...], has another
        layout; ``name`` is what the error calls it.

        Shapes and devices alone are compared; sizes are put into words only after a check has failed, as before they
        would become constants of compiled graphs.
        """
        if self.offsets is not None:
            if data.dim() != 2:
                raise ValueError(f"{name} must be [N, features] with offsets, got shape {tuple(data.shape)}")
        elif data.dim() != 3:
            given = tuple(data.shape)
            raise ValueError(f"{name} must be [B, T, features], or [N, features] with offsets, got shape {given}")
        elif self.lengths is None and self.mask is None and self.history_of is None:
            return
        else:
            u, t = (data.shape[1], data.shape[0]) if time_major else (data.shape[0], data.shape[1])
            if self.lengths is not None and self.lengths.shape[0] != u:
                raise ValueError(f"lengths must have shape [U] = {(u,)}, got {tuple(self.lengths.shape)}")
            if self.mask is not None and self.mask.shape != (u, t):
                raise ValueError(f"mask must have shape [B, T] = {(u, t)}, got {tuple(self.mask.shape)}")
        for field, tensor in self._named_tensors():
            if tensor is not None and tensor.device != data.device:
                raise ValueError(f"{field} must be on the device of {name}, {data.device}, got {tensor.device}")
        if self.history_of is not None and self.history_of.shape[0] > 0 and self.count(data, time_major) == 0:
            rows = self.history_of.shape[0]
            raise ValueError(f"history must be empty where {name} has no history (U = 0), got {rows} rows")

    def _check_types(self) -> None:
        """What ``of`` checks, for a value that was made without it; index tensors of int32 are refused, not widened."""
        if not torch.compiler.is_compiling() and self._checked:
            return
        check_layout(self.lengths, self.offsets, self.mask)
        if self.history_of is not None:
            check_index("history_of", self.history_of, "[B]")
        for name, tensor in (("lengths", self.lengths), ("offsets", self.offsets), ("history_of", self.history_of)):
            if tensor is not None and tensor.dtype != torch.int64:
                raise TypeError(
                    f"histories.{name} must have dtype int64, got {tensor.dtype}: Histories.of takes int32, too, and "
                    "widens it"
                )
        if self._knows_total():
            check_rows_total_type(self.rows_total)
        elif self.rows_total != -1:
            raise ValueError(f"rows_total must be at least 0, or -1 where it is not known, got {self.rows_total}")
        self.trusted()

    def trusted(self, checked: bool = True) -> Histories:
        """This value, after its maker has checked types, dtypes and ranks as ``of`` does."""
        if not torch.compiler.is_compiling():
            self._checked = checked
        return self

    def check_values(
        self,
        *,
        histories: int | None = None,
        steps: int | None = None,
        total: int | None = None,
        name: str = "history",
    ) -> None:
        """Raise ``ValueError`` for values of index tensors that leave the data; on the CPU, where reading does not
        wait.

        ``histories`` is U where no tensor says it, ``steps`` the padded length and ``total`` N of jagged data; what is
        None is not compared. Errors call ``history_of`` by ``name``. Under ``torch.compile`` the graph asks when it
        runs: a wrong value is a ``RuntimeError`` there, and on a CUDA device an assertion of the device. Native code
        repeats these checks (csrc/cpu/layout.cpp), in the same words.
        """
        if torch.compiler.is_compiling():
            assert_in_graph(self.offsets, self.history_of, None if self.full else self.count(), total, name)
            return
        device = self.device()
        if device is None or device.type != "cpu":
            return
        self._keep(("checked", histories, steps, total), lambda: self._check_values(histories, steps, total, name))

    def _check_values(self, histories: int | None, steps: int | None, total: int | None, name: str) -> None:
        if self.lengths is not None:
            check_lengths(self.lengths, steps)
        if self.offsets is not None:
            check_offsets(self.offsets, total)
        if self.history_of is not None:
            check_history_of(self.history_of, histories if self.full else self.count(), name)

    def check_attention_rows(self, attention_rows: int) -> None:
        """Raise ``ValueError`` where jagged attention has ``attention_rows`` values and the rows other than so many
        steps; with shared histories."""
        total = self._counted_rows_total()
        if total is not None and total != attention_rows:
            raise ValueError(
                f"attention must have one value for each of the {total} steps of the histories named, "
                f"got {attention_rows}"
            )

    def check_steps_of_rows(self, rows_total: int) -> None:
        """Raise ``ValueError`` where ``rows_total`` is not the steps of all rows; as ``check_values``."""
        if torch.compiler.is_compiling():
            length = self.row_lengths()
            if self.jagged and self.history_of is not None and length is not None:
                torch._assert_async(length.sum() == rows_total, "rows_total must be the steps of the histories named")
            return
        total = self._counted_rows_total()
        if total is not None and total != rows_total:
            raise ValueError(f"rows_total must be {total}, the steps of the histories named, got {rows_total}")

    def check_rows_total(self, rows_total: Any = None) -> Any:
        """The steps of all rows, which jagged data with shared histories asks for: there the number, elsewhere -1.

        ``rows_total`` is what the caller was given beside this value.
        """
        if self.offsets is None or self.history_of is None:
            if rows_total is not None:
                raise ValueError(f"rows_total must be None unless offsets and history are given, got {rows_total}")
            return -1
        if rows_total is None:
            if self._knows_total():
                return self.rows_total
            raise ValueError("rows_total must be given with offsets and history: the steps of all rows, got None")
        check_rows_total_type(rows_total)
        return rows_total

    def _knows_total(self) -> bool:
        return not isinstance(self.rows_total, int) or self.rows_total >= 0

    def count_rows_total(self, name: str = "history") -> int:
        """The steps of all rows by their values, which are checked first (``name`` as in ``check_values``); this waits
        for a device."""
        self.check_values(name=name)
        counted = self._counted_rows_total()
        if counted is None:
            length = self.row_lengths()
            counted = -1 if length is None else int(length.sum())
        return counted

    def _steps_of_rows(self, rows_total: Any) -> Any:
        """``rows_total`` for ``of``: as given, or counted where counting does not wait."""
        if self.offsets is None or self.history_of is None:
            return self.check_rows_total(rows_total)
        if torch.compiler.is_compiling() or self.offsets.device.type != "cpu":
            return -1 if rows_total is None else rows_total
        self.check_values(name="history_of")
        if rows_total is None:
            return self.count_rows_total("history_of")
        check_rows_total_type(rows_total)
        self.check_steps_of_rows(rows_total)
        return rows_total

    def _counted_rows_total(self) -> int | None:
        """The steps of all rows by their values; None where there is nothing to count, or counting would wait."""
        offsets, history_of = self.offsets, self.history_of
        if offsets is None or history_of is None or offsets.device.type != "cpu":
            return None
        if offsets.shape[0] == 2:  # one history, as in most requests
            return history_of.shape[0] * int(offsets[1])
        return self._keep("counted", lambda: int(offsets.diff()[history_of].sum()))

    def _check_devices(self, name: str) -> None:
        first = None
        for field, tensor in self._named_tensors():
            if tensor is None:
                continue
            if first is None:
                first = field, tensor
            elif tensor.device != first[1].device:
                field = name if field == "history" else field
                raise ValueError(f"{field} must be on the device of {first[0]}, {first[1].device}, got {tensor.device}")

    def _keep(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What ``make`` returns, from the second call on as it was kept; traced code computes it anew.

        A tensor that is made in inference mode could not serve a later call with gradients. So it is made outside of
        it, unless the tensors that it follows from belong to inference mode themselves.
        """
        if torch.compiler.is_compiling():
            return make()
        if key not in self._kept:
            if torch.is_inference_mode_enabled() and not self._in_inference():
                with torch.inference_mode(False):
                    made = make()
            else:
                made = make()
            # Tensors of a tracer, or of a dispatch mode such as FakeTensorMode, are not those of the next call.
            if torch.jit._trace.is_tracing() or torch._C._len_torch_dispatch_stack():
                return made
            self._kept[key] = made
        kept: _T = self._kept[key]
        return kept

    def _in_inference(self) -> bool:
        return any([tensor is not None and tensor.is_inference() for tensor in self._tensors()])

    def _tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return self.lengths, self.offsets, self.history_of, self.mask

    def _named_tensors(self) -> tuple[tuple[str, Tensor | None], ...]:
        return ("lengths", self.lengths), ("offsets", self.offsets), ("mask", self.mask), ("history", self.history_of)

    def __reduce__(self) -> tuple[Any, ...]:
        return Histories, (*self._tensors(), self.rows_total)

    def __repr__(self) -> str:
        words = [f"{name}={list(t.shape)}" for name, t in self._named_tensors() if t is not None]
        words += [f"rows_total={self.rows_total}"] if self._knows_total() else []
        return f"Histories({', '.join(words) or 'full'})"


def longest_first(lengths: Tensor) -> Tensor:
    """The order of a stable descending sort."""
    return lengths.argsort(descending=True, stable=True)


_FULL = Histories()  # what ``given`` returns where no keyword is given
_FIELDS = ("lengths", "offsets", "history_of", "mask", "rows_total")


def _flatten(histories: Histories) -> tuple[list[Any], None]:
    return [getattr(histories, field) for field in _FIELDS], None


def _flatten_with_keys(histories: Histories) -> tuple[list[tuple[Any, Any]], None]:
    return [(_pytree.GetAttrKey(field), getattr(histories, field)) for field in _FIELDS], None


_pytree.register_pytree_node(
    Histories,
    _flatten,
    lambda values, _: Histories(*values),
    serialized_type_name="dien_kernels.Histories",
    flatten_with_keys_fn=_flatten_with_keys,
)
