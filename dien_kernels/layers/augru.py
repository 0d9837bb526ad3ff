"""The recurrences that attention steers, as layers: AUGRU, AGRU and AIGRU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dien_kernels.checks import (
    check_compute_like,
    check_dtype,
    check_features,
    check_like,
    check_option,
    check_size,
    check_tensor,
)
from dien_kernels.histories import Histories
from dien_kernels.layers._checks import check_backend
from dien_kernels.layers._packed import check_packed, packed_index
from dien_kernels.layers.convert import Weights, check_source
from dien_kernels.layers.starts import WEIGHT_INITS, WeightInit, check_gate_bias, reset_recurrence
from dien_kernels.ops._dispatch import BackendName
from dien_kernels.ops.recurrence.forms import FORMS, AUGRUForm, Padded, Reset, Update, form_of
from dien_kernels.ops.recurrence.functional import agru, aigru, augru

_Layer = TypeVar("_Layer", bound="_AttentionGRU")
Bias = bool | Literal["single", "tied"]
_BIASES = (True, False, "single", "tied")


class _AttentionGRU(nn.Module):
    """Weights, checks and conversion; a subclass names its op and the member of the family that it is."""

    _op: Callable[..., tuple[Tensor, Tensor]]
    _kind: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: Bias = True,
        *,
        reset: Reset = "after",
        update: Update | None = None,
        padded: Padded = "zero",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_init: WeightInit = "torch",
        gate_bias: float | None = None,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("hidden_size", hidden_size)
        if not isinstance(bias, (bool, str)):
            raise TypeError(f"bias must be one of {_BIASES}, got {type(bias).__name__}")
        check_option("bias", bias, _BIASES)
        check_option("reset", reset, ("after", "before"))
        check_option("update", update, (None, "keep", "candidate"))
        check_option("padded", padded, ("zero", "carry"))
        check_backend(backend)
        check_dtype(dtype)
        check_option("weight_init", weight_init, WEIGHT_INITS)
        check_gate_bias(gate_bias, bias)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.reset = reset
        self.update = update
        self.padded = padded
        self.backend = backend
        self.weight_init = weight_init
        self.gate_bias = gate_bias

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        rows = 3 * hidden_size
        self.weight_ih = parameter(rows, input_size)
        self.weight_hh = parameter(rows, hidden_size)
        self.bias_ih = parameter(rows) if bias else None
        self.bias_hh = parameter(rows) if bias is True else self.bias_ih if bias == "tied" else None
        self.reset_parameters()

    @classmethod
    def from_weights(cls: type[_Layer], weights: Weights, **options: Any) -> _Layer:
        """A layer with a copy of ``weights`` and their conventions (see ``dien_kernels.layers.convert``).

        ``options`` are the constructor's; ``update`` converts the weights to that side. Raises ``ValueError``
        for a ``reset`` other than that of the weights (no conversion exists) and for a ``bias`` without room
        for theirs.
        """
        check_source(weights)
        weights, options = weights.settle(options)
        w_ih, w_hh = weights.w_ih, weights.w_hh
        options = {"bias": weights.bias, "device": w_ih.device, "dtype": w_ih.dtype, **options}
        layer = cls(w_ih.shape[1], w_hh.shape[1], **options)
        with torch.no_grad():
            for name, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights.tensors, strict=True):
                parameter = getattr(layer, name)
                if parameter is not None:
                    parameter.copy_(0 if value is None else value)
        return layer

    def reset_parameters(self) -> None:
        """The starting values, by ``weight_init`` and ``gate_bias``."""
        reset_recurrence(
            self.parameters(),
            [[self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]],
            hidden_size=self.hidden_size,
            weight_init=self.weight_init,
            gate_bias=self.gate_bias,
            side=self.update or form_of(self._kind).update,
        )

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        super()._apply(fn, recurse)
        self._tie()  # a move that makes new parameters (from the meta device) makes two
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.bias == "tied":
            one, two = (state_dict.get(prefix + name) for name in ("bias_ih", "bias_hh"))
            if one is not None and two is not None and not (one.is_meta or two.is_meta or torch.equal(one, two)):
                *_, error_msgs = rest
                error_msgs.append(
                    f"{prefix}bias_ih and {prefix}bias_hh must be equal for bias='tied', got unequal ones"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._tie()  # load_state_dict(..., assign=True) makes two

    def _tie(self) -> None:
        """One parameter under both names of a tied bias, unless a parametrization has taken a name away."""
        if self.bias == "tied" and {"bias_ih", "bias_hh"} <= self._parameters.keys():
            self.bias_hh = self.bias_ih

    def extra_repr(self) -> str:
        """The sizes, and the options that differ from their defaults, for ``repr``."""
        words = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in (
            ("bias", True),
            ("form", "paper"),
            ("reset", "after"),
            ("update", None),
            ("padded", "zero"),
            ("backend", "auto"),
            ("weight_init", "torch"),
            ("gate_bias", None),
        ):
            if (value := getattr(self, name, default)) != default:
                words.append(f"{name}={value}")
        return ", ".join(words)

    @overload
    def forward(
        self, x: PackedSequence, attention: PackedSequence, *, h0: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        x: Tensor,
        attention: Tensor,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        history: Tensor | None = None,
        h0: Tensor | None = None,
        histories: Histories | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor | PackedSequence,
        attention: Tensor | PackedSequence,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        history: Tensor | None = None,
        h0: Tensor | None = None,
        histories: Histories | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """``(y, h_n)`` of a batch; the class says what the arguments are."""
        layout = {"lengths": lengths, "offsets": offsets, "mask": mask, "history": history, "histories": histories}
        if isinstance(x, PackedSequence):
            for name, value in layout.items():
                if value is not None:
                    raise ValueError(f"{name} must be None for a PackedSequence, got a {type(value).__name__}")
            return self._packed(x, attention, h0)
        return self._run(x, cast(Tensor, attention), h0=h0, **layout)  # the op refuses what is no tensor

    def _packed(self, x: PackedSequence, attention: Any, h0: Tensor | None) -> tuple[PackedSequence, Tensor]:
        if not isinstance(attention, PackedSequence):
            raise TypeError(f"attention must be a PackedSequence, as x is, got {type(attention).__name__}")
        data, batch_sizes, sorted_indices, unsorted_indices = x
        batch = check_packed("x", x)
        check_tensor("attention.data", attention.data)
        if not torch.equal(attention.batch_sizes, batch_sizes):
            raise ValueError(
                f"attention must be packed as x is, with batch_sizes {batch_sizes.tolist()}, got "
                f"{attention.batch_sizes.tolist()}"
            )
        scores = attention.data.reshape(-1) if attention.data.dim() == 2 else attention.data  # [N] or [N, 1]
        if h0 is not None and sorted_indices is not None:
            check_compute_like("h0", h0, (batch, self.hidden_size), "[B, H]", data, "x.data")
            h0 = h0.index_select(0, sorted_indices)
        index = packed_index(batch_sizes, batch, data)
        y, h_n = self._run(
            data.index_select(0, index.gather), scores.index_select(0, index.gather), offsets=index.offsets, h0=h0
        )
        y = y.index_select(0, index.scatter)
        if unsorted_indices is not None:
            h_n = h_n.index_select(0, unsorted_indices)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), h_n

    def _run(self, x: Tensor, attention: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih = self.weight_ih, self.weight_hh, self.bias_ih
        b_hh = b_ih if self.bias == "tied" else self.bias_hh  # a parametrization may stand on the former alone
        try:
            return type(self)._op(
                x,
                attention,
                w_ih,
                w_hh,
                b_ih,
                b_hh,
                reset=self.reset,
                update=self.update,
                padded=self.padded,
                backend=self.backend,
                **options,
            )
        except (TypeError, ValueError):  # the layer's own words, where it has some
            check_features("x", x, self.input_size, "input_size", w_ih)
            self._check_parameters()
            raise

    def _check_parameters(self) -> None:
        """A parameter that was replaced or cast by itself, under its own name: to the op it is an argument."""
        rows, like = 3 * self.hidden_size, (self.weight_ih, "weight_ih")
        check_like("weight_ih", self.weight_ih, (rows, self.input_size), "[3H, I]", *like)
        check_like("weight_hh", self.weight_hh, (rows, self.hidden_size), "[3H, H]", *like)
        for name, bias in (("bias_ih", self.bias_ih), ("bias_hh", self.bias_hh)):
            if bias is not None:
                check_compute_like(name, bias, (rows,), "[3H]", *like)


class AUGRU(_AttentionGRU):
    """The GRU whose update gate attention scales: ``dien_kernels.augru`` with its weights.

    With r and n as in ``dien_kernels.layers.GRU``, a the attention of the row and step, and u the update gate
    seen from the candidate's side (1 - the stored gate where ``update="keep"``)::

        g = a * u                form="paper", arXiv 1809.03672, equations 11 and 12
        g = a + (1 - a) * u      form="authors", the code its authors released (also oneDNN, OpenVINO)
        g = (1 - a) + a * u      form="prediction_flow"
        h = (1 - g) * h + g * n

    ``update=None`` is ``"candidate"`` for the paper's form and ``"keep"`` for the others, as their users
    store it.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: True for two vectors ``bias_ih`` and ``bias_hh``; False for none; ``"single"`` for ``bias_ih``
            alone (torch-rechub, and every source whose reset comes before the product); ``"tied"`` for one
            vector under both names, whose gradient is the sum of both (DeepCTR-Torch's AUGRU).
        form: a name of ``AUGRUForm``, as above.
        reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
        update: ``"keep"`` or ``"candidate"``: the stored update gate multiplies h or n; None: the side that is named
            above.
        padded: what ``y`` holds past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
            state that the row is in.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``; one that is named
            runs or raises.
        device, dtype: of the parameters; None for the defaults of torch.
        weight_init: ``"torch"``, U(-1/sqrt(H), 1/sqrt(H)) for every parameter, as ``torch.nn.GRU`` (the
            paper gives no rule); or ``"glorot"``, the rule of TensorFlow 1 (``dien_kernels.layers.starts``).
        gate_bias: None, or the bias of both gates at the start, seen from the side of the state that is kept.

    Parameters: ``weight_ih`` [3H, I], ``weight_hh`` [3H, H], ``bias_ih`` and ``bias_hh`` [3H], rows [r|u|n].
    ``reset_parameters`` draws them anew.

    Inputs ``(x, attention, *, lengths=None, offsets=None, mask=None, history=None, h0=None, histories=None)``,
    with U histories in x, B rows that are run, T padded steps and N steps of a jagged batch:
        x: [U, T, I], or [N, I] with ``offsets``, in the dtype of the parameters (float32, float64, bfloat16,
            float16). U = B unless ``history`` is given.
        attention: [B, T], or in jagged form one value for each step of each row (rows one after another); any values,
            they are not clamped. In the dtype of x or the compute dtype (float64 for float64, else float32).
        lengths: [U] int64 or int32, in steps, between 0 and T; None: all T steps.
        offsets: [U + 1] int64 or int32, ascending from 0 to N.
        mask: [U, T] bool, True at valid steps; left padding and holes are welcome. At most one of
            lengths, offsets and mask may be given.
        history: [B] int64 or int32, which of the U histories each row reads; the input is projected once for each
            history, however many rows read it. None: each history is one row.
        h0: the state before the first step, [B, H], zeros if None; dtypes as ``attention``.
        histories: a ``dien_kernels.Histories``, which says what lengths, offsets, mask and history say and is checked
            once for all ops and layers that read a batch; the four must then be None.

    Or x [N, I] and attention, [N] or [N, 1], are two ``PackedSequence``s that are packed alike: then y is one, too, and
    h0 and h_n have the rows in the order before packing.

    Returns ``(y, h_n)``: y [B, T, H], or [N, H] ([steps of all rows, H] with ``history``) for a jagged batch,
    with zeros (or the state: ``padded``) past a row's length and at masked steps; h_n [B, H], the state after
    each row's last valid step, ``h0`` where there is none.

    NaN past a row's length or at a masked step changes no output and no gradient. Differentiable in x,
    attention, h0 and every parameter. Under autocast x and the matrices are cast; all else stays float32.

    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, dtype, rank, size, device,
    value or option, and ``RuntimeError`` with the reason where a backend that was named refuses the call.

    >>> layer = AUGRU(3, 4)
    >>> y, h_n = layer(torch.randn(2, 5, 3), torch.rand(2, 5), lengths=torch.tensor([5, 0]))
    >>> y.shape, h_n.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 4]))
    """

    _op = staticmethod(augru)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: Bias = True,
        *,
        form: AUGRUForm = "paper",
        reset: Reset = "after",
        update: Update | None = None,
        padded: Padded = "zero",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_init: WeightInit = "torch",
        gate_bias: float | None = None,
    ) -> None:
        check_option("form", form, FORMS)
        self.form = self._kind = form  # before the parameters start, as the side of the gate's bias depends on it
        super().__init__(
            input_size,
            hidden_size,
            bias,
            reset=reset,
            update=update,
            padded=padded,
            backend=backend,
            device=device,
            dtype=dtype,
            weight_init=weight_init,
            gate_bias=gate_bias,
        )

    @classmethod
    def from_weights(cls: type[_Layer], weights: Weights, **options: Any) -> _Layer:
        """As in AGRU and AIGRU; ``form`` is needed in ``options`` where the source of the weights has
        none."""
        check_source(weights)
        form = options.pop("form", weights.form)
        if form is None:
            raise ValueError("form must be given: a source without attention does not say it, got None")
        return super().from_weights(weights, form=form, **options)

    def _run(self, x: Tensor, attention: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return super()._run(x, attention, form=self.form, **options)


class AGRU(_AttentionGRU):
    """The GRU whose update gate attention replaces: ``dien_kernels.agru`` with its weights.

    With r and n as in ``dien_kernels.layers.GRU`` and a the attention of the row and step (arXiv 1809.03672,
    equation 10)::

        h = (1 - a) * h + a * n

    The update rows of the weights are kept, as every implementation keeps them; their gradient is zero.
    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: True for two vectors ``bias_ih`` and ``bias_hh``; False for none; ``"single"`` for ``bias_ih``
            alone (torch-rechub, and every source whose reset comes before the product); ``"tied"`` for one
            vector under both names, whose gradient is the sum of both (DeepCTR-Torch's AUGRU).
        reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
        update: ``"keep"`` or ``"candidate"``: the stored update gate multiplies h or n; None: the side that is named
            above.
        padded: what ``y`` holds past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
            state that the row is in.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``; one that is named
            runs or raises.
        device, dtype: of the parameters; None for the defaults of torch.
        weight_init: ``"torch"``, U(-1/sqrt(H), 1/sqrt(H)) for every parameter, as ``torch.nn.GRU`` (the
            paper gives no rule); or ``"glorot"``, the rule of TensorFlow 1 (``dien_kernels.layers.starts``).
        gate_bias: None, or the bias of both gates at the start, seen from the side of the state that is kept.

    Parameters: ``weight_ih`` [3H, I], ``weight_hh`` [3H, H], ``bias_ih`` and ``bias_hh`` [3H], rows [r|u|n].
    ``reset_parameters`` draws them anew.

    Inputs ``(x, attention, *, lengths=None, offsets=None, mask=None, history=None, h0=None, histories=None)``,
    with U histories in x, B rows that are run, T padded steps and N steps of a jagged batch:
        x: [U, T, I], or [N, I] with ``offsets``, in the dtype of the parameters (float32, float64, bfloat16,
            float16). U = B unless ``history`` is given.
        attention: [B, T], or in jagged form one value for each step of each row (rows one after another); any values,
            they are not clamped. In the dtype of x or the compute dtype (float64 for float64, else float32).
        lengths: [U] int64 or int32, in steps, between 0 and T; None: all T steps.
        offsets: [U + 1] int64 or int32, ascending from 0 to N.
        mask: [U, T] bool, True at valid steps; left padding and holes are welcome. At most one of
            lengths, offsets and mask may be given.
        history: [B] int64 or int32, which of the U histories each row reads; the input is projected once for each
            history, however many rows read it. None: each history is one row.
        h0: the state before the first step, [B, H], zeros if None; dtypes as ``attention``.
        histories: a ``dien_kernels.Histories``, which says what lengths, offsets, mask and history say and is checked
            once for all ops and layers that read a batch; the four must then be None.

    Returns ``(y, h_n)``: y [B, T, H], or [N, H] ([steps of all rows, H] with ``history``) for a jagged batch,
    with zeros (or the state: ``padded``) past a row's length and at masked steps; h_n [B, H], the state after
    each row's last valid step, ``h0`` where there is none.

    NaN past a row's length or at a masked step changes no output and no gradient. Differentiable in x,
    attention, h0 and every parameter. Under autocast x and the matrices are cast; all else stays float32.

    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, dtype, rank, size, device,
    value or option, and ``RuntimeError`` with the reason where a backend that was named refuses the call.
    """

    _op = staticmethod(agru)
    _kind = "agru"


class AIGRU(_AttentionGRU):
    """The GRU whose input attention scales: ``dien_kernels.aigru`` with its weights.

    The GRU of ``dien_kernels.layers.GRU`` on a * x, with a the attention of the row and step (arXiv
    1809.03672, equation 9). ``update=None`` is ``"keep"``.
    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: True for two vectors ``bias_ih`` and ``bias_hh``; False for none; ``"single"`` for ``bias_ih``
            alone (torch-rechub, and every source whose reset comes before the product); ``"tied"`` for one
            vector under both names, whose gradient is the sum of both (DeepCTR-Torch's AUGRU).
        reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
        update: ``"keep"`` or ``"candidate"``: the stored update gate multiplies h or n; None: the side that is named
            above.
        padded: what ``y`` holds past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
            state that the row is in.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``; one that is named
            runs or raises.
        device, dtype: of the parameters; None for the defaults of torch.
        weight_init: ``"torch"``, U(-1/sqrt(H), 1/sqrt(H)) for every parameter, as ``torch.nn.GRU`` (the
            paper gives no rule); or ``"glorot"``, the rule of TensorFlow 1 (``dien_kernels.layers.starts``).
        gate_bias: None, or the bias of both gates at the start, seen from the side of the state that is kept.

    Parameters: ``weight_ih`` [3H, I], ``weight_hh`` [3H, H], ``bias_ih`` and ``bias_hh`` [3H], rows [r|u|n].
    ``reset_parameters`` draws them anew.

    Inputs ``(x, attention, *, lengths=None, offsets=None, mask=None, history=None, h0=None, histories=None)``,
    with U histories in x, B rows that are run, T padded steps and N steps of a jagged batch:
        x: [U, T, I], or [N, I] with ``offsets``, in the dtype of the parameters (float32, float64, bfloat16,
            float16). U = B unless ``history`` is given.
        attention: [B, T], or in jagged form one value for each step of each row (rows one after another); any values,
            they are not clamped. In the dtype of x or the compute dtype (float64 for float64, else float32).
        lengths: [U] int64 or int32, in steps, between 0 and T; None: all T steps.
        offsets: [U + 1] int64 or int32, ascending from 0 to N.
        mask: [U, T] bool, True at valid steps; left padding and holes are welcome. At most one of
            lengths, offsets and mask may be given.
        history: [B] int64 or int32, which of the U histories each row reads; the input is projected once for each
            history, however many rows read it. None: each history is one row.
        h0: the state before the first step, [B, H], zeros if None; dtypes as ``attention``.
        histories: a ``dien_kernels.Histories``, which says what lengths, offsets, mask and history say and is checked
            once for all ops and layers that read a batch; the four must then be None.

    Returns ``(y, h_n)``: y [B, T, H], or [N, H] ([steps of all rows, H] with ``history``) for a jagged batch,
    with zeros (or the state: ``padded``) past a row's length and at masked steps; h_n [B, H], the state after
    each row's last valid step, ``h0`` where there is none.

    NaN past a row's length or at a masked step changes no output and no gradient. Differentiable in x,
    attention, h0 and every parameter. Under autocast x and the matrices are cast; all else stays float32.

    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, dtype, rank, size, device,
    value or option, and ``RuntimeError`` with the reason where a backend that was named refuses the call.
    """

    _op = staticmethod(aigru)
    _kind = "aigru"
