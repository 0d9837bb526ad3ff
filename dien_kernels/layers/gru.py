"""A drop-in for ``torch.nn.GRU`` on the project's recurrence."""

from __future__ import annotations

import warnings
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dien_kernels.checks import (
    autocast_dtype,
    check_compute_like,
    check_dtype,
    check_features,
    check_flag,
    check_number,
    check_option,
    check_size,
    check_tensor,
)
from dien_kernels.histories import Histories, MaskIndex
from dien_kernels.layers._checks import check_backend
from dien_kernels.layers._packed import check_packed, packed_index
from dien_kernels.layers.convert import Weights, check_source
from dien_kernels.layers.starts import WEIGHT_INITS, WeightInit, check_gate_bias, reset_recurrence
from dien_kernels.ops._dispatch import BackendName
from dien_kernels.ops._layout import compact, spread
from dien_kernels.ops.recurrence.contract import Inputs
from dien_kernels.ops.recurrence.forms import Padded, Reset, Update, form_of
from dien_kernels.ops.recurrence.op import check_weights, recurrence


class GRU(nn.Module):
    """The GRU of ``torch.nn.GRU``: same constructor, parameters, ``state_dict``, inputs and outputs.

    One step of each layer and direction, weights in rows [r|u|n]::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        u = sigmoid(W_iu x + b_iu + W_hu h + b_hu)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))       reset="after", torch.nn.GRU
        n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)       reset="before"
        h = u * h + (1 - u) * n                             update="keep" (also None), torch.nn.GRU
        h = (1 - u) * h + u * n                             update="candidate"

    It is no subclass of ``torch.nn.GRU``: ``torch.compile`` refuses every instance of that class, and its
    base keeps a second, flat list of the weights that every way of replacing a parameter must keep true. So
    ``isinstance(layer, torch.nn.GRU)`` is False; the ``state_dict`` goes both ways.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        num_layers: stacked layers, each reading the outputs of the one below.
        bias: False leaves out ``bias_ih_l*`` and ``bias_hh_l*``. ``"single"`` keeps both names, but ``bias_hh_l*`` is
            0 and frozen: with one trained bias vector b_n stays outside of the reset gate.
        batch_first: a 3-D input and output are [B, T, .], not [T, B, .]; ``hx``, ``h_n``, ``lengths`` and
            ``mask`` are the same either way.
        dropout: probability of zeroing an output of every layer but the last, in training mode.
        bidirectional: a second set of weights (``*_reverse``) runs from the last valid step to the first; the
            outputs of both directions are concatenated, so D = 2 below, else 1.
        device, dtype: of the parameters.
        reset: ``"after"`` or ``"before"`` the product with W_hn.
        update: ``"keep"`` or ``"candidate"``, the side the stored update gate multiplies; None is ``"keep"``.
        padded: what outputs hold past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
            state that stands there (in the reverse direction the one from the right).
        backend: as in ``dien_kernels.gru``.
        weight_init: ``"torch"``, U(-1/sqrt(H), 1/sqrt(H)) for every parameter; or ``"glorot"``, the rule of
            TensorFlow 1 (``dien_kernels.layers.starts``).
        gate_bias: None, or the bias of both gates at the start, seen from the side of the state that is kept.

    Inputs ``(input, hx=None, *, lengths=None, mask=None, offsets=None, histories=None)``:
        input: [T, B, I] or, with ``batch_first``, [B, T, I]; [T, I] for one history; [N, I] with ``offsets``;
            or a ``PackedSequence``. The dtype of the parameters: float32, float64, bfloat16 or float16. A
            time-major input is used as it lies.
        hx: [D * num_layers, B, H], or [D * num_layers, H] for a [T, I] input; zeros if None. The dtype of the
            input or its compute dtype (float64 for float64, else float32).
        lengths: [B] int64 or int32 between 0 and T.
        mask: [B, T] bool, True at valid steps, in either layout; left padding and holes are welcome. A masked
            step leaves the state alone in both directions.
        offsets: [B + 1] int64 or int32, ascending from 0 to N: history b owns rows offsets[b]:offsets[b + 1].
        histories: one of the three as a ``dien_kernels.Histories`` without ``history_of``, made once for all
            that reads the batch. At most one of the four, and only for a tensor input.

    Returns ``(output, h_n)``:
        output: as ``input`` with D * H features; a ``PackedSequence`` gives one with the same ``batch_sizes``
            and indices. Past a row's length and at masked steps: see ``padded``.
        h_n: [D * num_layers, B, H], or [D * num_layers, H] for a [T, I] input: the state after each row's
            last valid step (reverse: first); ``hx`` where there is none.

    NaN past a row's length or at a masked step changes no output and no gradient. Differentiable in
    ``input``, ``hx`` and every parameter. Under autocast the input and the matrices are cast; biases, ``hx``,
    state and sums stay float32.

    A ``PackedSequence`` is gathered into history order once and scattered back once, for all layers; with
    equal lengths not at all. Its ``batch_sizes`` live on the host, so ``torch.compile(fullgraph=True)`` is
    for tensors.

    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, dtype, rank, size, device,
    value or option. By default weights start as U(-1/sqrt(H), 1/sqrt(H)), the same numbers as ``torch.nn.GRU`` for
    the same seed; ``reset_parameters`` draws them anew.

    >>> layer = GRU(3, 4, batch_first=True)
    >>> output, h_n = layer(torch.randn(2, 5, 3), lengths=torch.tensor([5, 0]))
    >>> output.shape, h_n.shape
    (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool | Literal["single"] = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset: Reset = "after",
        update: Update | None = None,
        padded: Padded = "zero",
        backend: BackendName = "auto",
        weight_init: WeightInit = "torch",
        gate_bias: float | None = None,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("hidden_size", hidden_size)
        check_size("num_layers", num_layers)
        if not isinstance(bias, bool) and bias != "single":
            got = repr(bias) if isinstance(bias, str) else type(bias).__name__
            raise TypeError(f"bias must be a bool or 'single', got {got}")
        for name, flag in (("batch_first", batch_first), ("bidirectional", bidirectional)):
            check_flag(name, flag)
        check_number("dropout", dropout, "a number between 0 and 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {dropout}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(f"dropout={dropout} acts between layers, so it does nothing with num_layers=1", stacklevel=2)
        check_option("reset", reset, ("after", "before"))
        check_option("update", update, (None, "keep", "candidate"))
        check_option("padded", padded, ("zero", "carry"))
        check_backend(backend)
        check_dtype(dtype)
        check_option("weight_init", weight_init, WEIGHT_INITS)
        check_gate_bias(gate_bias, bias)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.reset = reset
        self.update = update
        self.padded = padded
        self.backend = backend
        self.weight_init = weight_init
        self.gate_bias = gate_bias
        self._zeros: tuple[str, ...] = ()  # the names of biases that are frozen at zero
        self._names: list[tuple[str, ...]] = []  # of each layer and direction, in the order of h_n
        suffixes = ("", "_reverse") if bidirectional else ("",)
        for layer in range(num_layers):
            for suffix in suffixes:
                size = input_size if layer == 0 else hidden_size * len(suffixes)
                shapes: dict[str, tuple[int, ...]]
                shapes = {"weight_ih": (3 * hidden_size, size), "weight_hh": (3 * hidden_size, hidden_size)}
                if bias:
                    shapes |= {"bias_ih": (3 * hidden_size,), "bias_hh": (3 * hidden_size,)}
                names = tuple(f"{name}_l{layer}{suffix}" for name in shapes)
                for name, shape in zip(names, shapes.values(), strict=True):
                    setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._names.append(names)
        if bias == "single":
            self._freeze_at_zero(*(names[3] for names in self._names))
        self.reset_parameters()

    def _freeze_at_zero(self, *names: str) -> None:
        self._zeros += names
        for name in names:
            getattr(self, name).requires_grad_(False)

    @classmethod
    def from_weights(cls, weights: Weights, **options: Any) -> GRU:
        """A layer with a copy of ``weights`` (see ``dien_kernels.layers.convert``); ``options``: the
        constructor's.

        Where the source has one bias vector, ``bias_hh_l0`` is a frozen zero, so that training moves as
        there. Raises ``ValueError`` for tied biases, which a GRU cannot keep, for ``bias=False`` where the
        source has some, and for several layers.
        """
        check_source(weights)
        if weights.tied:
            raise ValueError("weights must not have tied biases, which a GRU cannot keep: use AUGRU, AGRU or AIGRU")
        for name in ("num_layers", "bidirectional"):
            if options.get(name, 1) > 1 or options.get(name) is True:
                raise ValueError(f"{name} must be left alone, weights describe one layer, got {options[name]}")
        weights, options = weights.settle(options)
        w_ih, w_hh, b_ih, b_hh = weights.tensors
        biased = b_ih is not None or b_hh is not None
        layer = cls(
            w_ih.shape[1],
            w_hh.shape[1],
            **{"bias": biased, "device": w_ih.device, "dtype": w_ih.dtype, **options},
        )
        for name, value in zip(layer._names[0], weights.tensors, strict=False):
            with torch.no_grad():
                getattr(layer, name).copy_(0 if value is None else value)
            if value is None and name not in layer._zeros:
                layer._freeze_at_zero(name)
        return layer

    def reset_parameters(self) -> None:
        """The starting values, by ``weight_init`` and ``gate_bias``; a bias that is frozen at zero is zero again."""
        reset_recurrence(
            self.parameters(),
            [[*weights, None, None][:4] for weights in self.all_weights],
            hidden_size=self.hidden_size,
            weight_init=self.weight_init,
            gate_bias=self.gate_bias,
            side=self.update or form_of("gru").update,
        )
        for name in self._zeros:
            nn.init.zeros_(getattr(self, name))

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels read each weight where it lies."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction, as ``torch.nn.GRU`` gives them."""
        return [[getattr(self, name) for name in names] for names in self._names]

    def extra_repr(self) -> str:
        words = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in (
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0),
            ("bidirectional", False),
            ("reset", "after"),
            ("update", None),
            ("padded", "zero"),
            ("backend", "auto"),
            ("weight_init", "torch"),
            ("gate_bias", None),
        ):
            if (value := getattr(self, name)) != default:
                words.append(f"{name}={value}")
        return ", ".join(words)

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        histories: Histories | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        histories: Histories | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        layout = {"lengths": lengths, "mask": mask, "offsets": offsets, "histories": histories}
        if hx is not None:
            check_tensor("hx", hx)
        if isinstance(input, PackedSequence):
            self._forbid("a PackedSequence, which has its own lengths", layout)
            return self._packed(input, hx)
        self._check_input("input", input)
        input = _cast(input)
        jagged = offsets is not None or (isinstance(histories, Histories) and histories.jagged)
        if jagged or input.dim() == 3:
            time_major = not (self.batch_first or jagged)
            given = Histories.given(input, "input", **layout, time_major=time_major)  # type: ignore[arg-type]
            if given.history_of is not None:
                raise ValueError("histories must not have history_of: a GRU runs each history once, got one that has")
            return self._batched(input, hx, given, time_major)
        if input.dim() != 2:
            raise ValueError(f"input must be [T, I] or have 3 dimensions, got shape {tuple(input.shape)}")
        self._forbid("a 2-D input, which is one history", layout)
        if hx is not None:
            hx = self._check_hx(hx, None, input).unsqueeze(1)
        y, h_n = self._stack(input.unsqueeze(0), hx, Histories(), False)
        return y.squeeze(0), h_n.squeeze(1)

    def _check_input(self, name: str, value: Any) -> None:
        check_features(name, value, self.input_size, "input_size", getattr(self, self._names[0][0]))

    @staticmethod
    def _forbid(what: str, layout: dict[str, Any]) -> None:
        for name, value in layout.items():
            if value is not None:
                raise ValueError(f"{name} must be None for {what}, got a {type(value).__name__}")

    def _batched(self, x: Tensor, hx: Tensor | None, histories: Histories, time_major: bool) -> tuple[Tensor, Tensor]:
        index = histories.mask_index()
        if index is None:
            return self._stack(x, hx, histories, time_major)
        by_row = x.transpose(0, 1) if time_major else x
        y, h_n = self._stack(compact(by_row, index), hx, histories.compacted(), False, index)
        return y.transpose(0, 1) if time_major else y, h_n

    def _packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        self._check_input("input.data", data)
        if data.dim() != 2:
            raise ValueError(f"input.data must be [N, I], got shape {tuple(data.shape)}")
        batch, data = check_packed("input", packed), _cast(data)
        if hx is not None and sorted_indices is not None:
            self._check_hx(hx, batch, data)
            hx = hx.index_select(1, sorted_indices)
        if data.shape[0] == batch * batch_sizes.shape[0]:  # equal lengths: packed is time-major
            y, h_n = self._stack(data.view(-1, batch, self.input_size), hx, Histories(), True)
            y = y.flatten(0, 1)
        else:
            index = packed_index(batch_sizes, batch, data)
            y, h_n = self._stack(data.index_select(0, index.gather), hx, Histories(offsets=index.offsets), False)
            y = y.index_select(0, index.scatter)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), h_n

    def _check_hx(self, hx: Tensor, batch: int | None, x: Tensor) -> Tensor:
        layers = len(self._names)
        shape: tuple[int, ...] = (layers, self.hidden_size)
        meaning = "[directions * num_layers, H]"
        if batch is not None:
            shape, meaning = (layers, batch, self.hidden_size), "[directions * num_layers, B, H]"
        return check_compute_like("hx", hx, shape, meaning, x, "input")

    def _stack(
        self,
        x: Tensor,
        hx: Tensor | None,
        histories: Histories,
        time_major: bool,
        index: MaskIndex | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All layers and directions over one layout; with ``index``, x is compact and y is spread out
        again."""
        cast = autocast_dtype(x) is not None
        if hx is not None:
            hx = self._check_hx(hx, histories.count(x, time_major), x)
        directions = 2 if self.bidirectional else 1
        last = len(self._names) - directions
        states: list[Tensor] = []
        for layer in range(0, len(self._names), directions):
            outputs = []
            for i in range(layer, layer + directions):
                w_ih, w_hh, *biases = (getattr(self, name) for name in self._names[i])
                if cast:
                    w_ih, w_hh = w_ih.to(x.dtype), w_hh.to(x.dtype)
                b_ih, b_hh = biases or (None, None)
                b_ih, b_hh = check_weights(x, w_ih, w_hh, b_ih, b_hh, self._names[i], "input")
                h0 = None if hx is None else hx[i]
                reverse = i > layer
                y, h = recurrence(
                    "gru",
                    Inputs(x, None, w_ih, w_hh, b_ih, b_hh, h0),
                    histories,
                    reset=self.reset,
                    update=self.update,
                    backend=self.backend,
                    reverse=reverse,
                    time_major=time_major,
                )
                if layer == last and index is not None:
                    y = self._spread(y, h0, index, reverse)
                elif layer == last and self.padded == "carry" and histories.lengths is not None:
                    y = _fill(y, _start(h0, h) if reverse else h, histories.lengths, time_major)
                outputs.append(y)
                states.append(h)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if layer != last and self.training and self.dropout > 0:
                x = nn.functional.dropout(x, self.dropout)
        return x, states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)

    def _spread(self, y: Tensor, h0: Tensor | None, index: MaskIndex, reverse: bool) -> Tensor:
        if self.padded == "zero":
            return spread(y, index)
        if reverse:  # the step that comes before a masked one in this direction is the next valid one
            following = index.so_far - index.mask.long()
            total = index.mask.sum(1, keepdim=True)
            index = index._replace(source=following, so_far=total - following)
        return spread(y, index, _start(h0, y[:, :0].sum(1)))


def _cast(x: Tensor) -> Tensor:
    """The input in autocast's dtype where that is on."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _start(h0: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if h0 is None else h0.to(like.dtype)


def _fill(y: Tensor, state: Tensor, lengths: Tensor, time_major: bool) -> Tensor:
    """Past each row's length: the state [B, H]."""
    step = torch.arange(y.shape[0 if time_major else 1], device=y.device)
    if time_major:
        return torch.where((step.unsqueeze(1) < lengths).unsqueeze(2), y, state)
    return torch.where((step < lengths.unsqueeze(1)).unsqueeze(2), y, state.unsqueeze(1))
