"""Loaders: the weights of other systems' cells, in the rows [r|u|n] of this package.

Each ``from_*`` returns ``Weights``: four tensors and the conventions they were trained under. Hand it to a
layer (``AUGRU.from_weights(from_tf(...))``) or to an op::

    w = from_tf(gates_kernel, candidate_kernel, gates_bias, candidate_bias)
    y, h_n = augru(x, attention, *w.tensors, form=w.form, reset=w.reset, update=w.update)

Loaders reorder, transpose and concatenate in plain torch: gradients flow back to the tensors given. The
formulas that the names stand for (x the input, h the state, a the attention, * elementwise):

==================  ================================  =============================  =======================
``form``            ``reset="before"``                ``reset="after"``              stored update gate u
==================  ================================  =============================  =======================
None (GRU)          n = tanh(W x + U (r * h) + b)     n = tanh(W x + b + r * U' h)   keep: u h + (1 - u) n
"authors"           the same                          the same                       keep, u' = (1 - a) u
"paper"             the same                          the same                       candidate, u' = a u
"prediction_flow"   the same                          the same                       keep, u' = a u
==================  ================================  =============================  =======================
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dien_kernels.checks import check_option, check_storage
from dien_kernels.ops.recurrence.forms import FORMS, AUGRUForm, Reset, Update

_SIDES = ("keep", "candidate")


class Weights(NamedTuple):
    """Weights in rows [r|u|n], and what they mean.

    Attributes:
        w_ih: [3H, I], of the input.
        w_hh: [3H, H], of the state.
        b_ih: [3H], or None where the source has no bias.
        b_hh: [3H]; None where the source has a single bias outside the reset gate, and the very tensor ``b_ih`` where
            the source ties both.
        reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
        update: ``"keep"`` or ``"candidate"``: the stored update gate multiplies h or n.
        form: of an AUGRU, a name of ``AUGRUForm``; None where the source is a GRU.
    """

    w_ih: Tensor  # [3H, I]
    w_hh: Tensor  # [3H, H]
    b_ih: Tensor | None  # [3H]
    b_hh: Tensor | None  # [3H]
    reset: Reset
    update: Update
    form: AUGRUForm | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The four tensors, in the order the ops take them."""
        return self.w_ih, self.w_hh, self.b_ih, self.b_hh

    @property
    def tied(self) -> bool:
        """One bias vector in both places."""
        return self.b_ih is not None and self.b_hh is self.b_ih

    def as_update(self, side: Update) -> Weights:
        """The same function with the update gate stored on the other side: sigmoid(-z) = 1 - sigmoid(z).

        Negates the update rows of both matrices and both biases; returns itself if ``side`` is its own. Raises
        ``ValueError`` for a ``side`` other than ``"keep"`` and ``"candidate"``.
        """
        check_option("side", side, _SIDES)
        if side == self.update:
            return self
        b_ih, b_hh = (None if b is None else _negate_update(b) for b in (self.b_ih, self.b_hh))
        w_ih, w_hh = _negate_update(self.w_ih), _negate_update(self.w_hh)
        return Weights(w_ih, w_hh, b_ih, b_ih if self.tied else b_hh, self.reset, side, self.form)

    @property
    def bias(self) -> bool | str:
        """The ``bias`` of a layer that holds these weights and no more."""
        if self.tied:
            return "tied"
        return True if self.b_hh is not None else "single" if self.b_ih is not None else False

    def settle(self, options: dict[str, Any]) -> tuple[Weights, dict[str, Any]]:
        """Weights and a layer's options brought into agreement.

        Of the ``options``, ``update`` converts, ``reset`` must agree, and ``bias`` must have room for every bias there
        is. Raises ``ValueError`` naming the option that does not fit.
        """
        reset, update = options.get("reset", self.reset), options.get("update") or self.update
        if reset != self.reset:
            raise ValueError(
                f"reset must be {self.reset!r}, as the weights were trained (the two are not convertible), "
                f"got {reset!r}"
            )
        check_option("update", update, _SIDES)
        if self.bias:
            check_option("bias", options.get("bias", self.bias), (self.bias, True)[: 1 + (self.bias is not True)])
        return self.as_update(update), {**options, "reset": reset, "update": update}


def check_source(weights: Any) -> None:
    """For ``from_weights``: what a loader of this module gives, and nothing else."""
    if not isinstance(weights, Weights):
        raise TypeError(
            "weights must be what a loader of dien_kernels.layers.convert gives (from_rows, from_tf, ...), "
            f"got {type(weights).__name__}"
        )


def _negate_update(rows: Tensor) -> Tensor:
    r, u, n = rows.chunk(3)
    return torch.cat((r, -u, n))


def _check(name: str, value: Any, shape: tuple[int, ...], meaning: str) -> None:
    check_storage(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(value.shape)}")


def _check_matrix(name: str, value: Any, meaning: str) -> None:
    check_storage(name, value)
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{name} must have shape {meaning}, each size at least 1, got {tuple(value.shape)}")


def _check_alike(matrices: dict[str, Tensor], biases: dict[str, Tensor | None]) -> None:
    """All on one device; matrices of one dtype, and biases of one."""
    first, one = next(iter(matrices.items()))
    for group in (matrices, {name: bias for name, bias in biases.items() if bias is not None}):
        for name, value in group.items():
            if value.device != one.device:
                raise ValueError(f"{name} must be on the device of {first}, {one.device}, got {value.device}")
            head, like = next(iter(group.items()))
            if value.dtype != like.dtype:
                raise TypeError(f"{name} must have the dtype of {head}, {like.dtype}, got {value.dtype}")


def _reorder(rows: Tensor, order: str) -> Tensor:
    """Blocks of rows in ``order`` (a word of r, u and n) to r, u, n."""
    blocks = dict(zip(order, rows.chunk(3), strict=True))
    return torch.cat([blocks[gate] for gate in "run"])


def _hidden(w_hh: Tensor, name: str, meaning: str) -> int:
    if w_hh.shape[0] != 3 * w_hh.shape[1]:
        raise ValueError(f"{name} must have shape {meaning}, got {tuple(w_hh.shape)}")
    return int(w_hh.shape[1])


def from_rows(
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    update: Update = "keep",
    form: AUGRUForm | None = None,
    reset: Reset = "after",
) -> Weights:
    """Rows [r|u|n] with two biases: ``torch.nn.GRU`` and all that copied it; nothing is moved.

    ============================  ==============  =====================
    source                        ``update``      ``form``
    ============================  ==============  =====================
    torch.nn.GRU                  "keep"          None
    RecBole AUGRU, AGRU           "candidate"     "paper"
    prediction-flow               "keep"          "prediction_flow"
    MindSpore                     "keep"          "authors"
    ============================  ==============  =====================

    Args: ``weight_ih`` [3H, I], ``weight_hh`` [3H, H], ``bias_ih`` and ``bias_hh`` [3H] or None, b_hn inside
    r; ``reset``: "after" or "before" the product with W_hn.
    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, shape or option.
    """
    check_option("update", update, _SIDES)
    check_option("form", form, (None, *FORMS))
    check_option("reset", reset, ("after", "before"))
    _check_matrix("weight_hh", weight_hh, "[3H, H]")
    hidden = _hidden(weight_hh, "weight_hh", "[3H, H]")
    _check_matrix("weight_ih", weight_ih, "[3H, I]")
    _check("weight_ih", weight_ih, (3 * hidden, weight_ih.shape[1]), "[3H, I]")
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            _check(name, bias, (3 * hidden,), "[3H]")
    _check_alike({"weight_ih": weight_ih, "weight_hh": weight_hh}, {"bias_ih": bias_ih, "bias_hh": bias_hh})
    return Weights(weight_ih, weight_hh, bias_ih, bias_hh, reset, update, form)


def from_deepctr_torch(
    weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None = None, bias_hh: Tensor | None = None
) -> Weights:
    """DeepCTR-Torch's AUGRU and AGRU cells: rows [r|u|n], the paper's form.

    Its AGRU cell has two biases. Its AUGRU cell registers one tensor as ``bias_ih`` and as ``bias_hh``, so r sees
    2 b_r, u sees 2 b_u and n = tanh(W x + b_n + r * (U h + b_n)), and the gradient of b is the sum over both places:
    give the one bias, or the same tensor twice. Then ``b_hh is b_ih`` here, and the layers keep that as
    ``bias="tied"``. Its extractor is a ``torch.nn.GRU``: use ``from_rows`` for it.

    Args: ``weight_ih`` [3H, I], ``weight_hh`` [3H, H], ``bias_ih`` and ``bias_hh`` [3H]; a ``bias_hh`` that is None is
    ``bias_ih``, and both None are no biases.
    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type or shape.
    """
    if bias_ih is None and bias_hh is not None:
        raise ValueError("bias_ih must be given where bias_hh is, got None")
    _check_matrix("weight_hh", weight_hh, "[3H, H]")
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            _check(name, bias, (3 * _hidden(weight_hh, "weight_hh", "[3H, H]"),), "[3H]")
    _check_alike({"weight_hh": weight_hh}, {"bias_ih": bias_ih, "bias_hh": bias_hh})
    bias_hh = bias_ih if bias_hh is None else bias_hh
    return from_rows(weight_ih, weight_hh, bias_ih, bias_hh, update="candidate", form="paper")


def from_fuxictr(
    x2h_weight: Tensor, h2h_weight: Tensor, x2h_bias: Tensor | None = None, h2h_bias: Tensor | None = None
) -> Weights:
    """FuxiCTR's and ReChorus' AUGRU and AGRU cells: rows [u|r|n], the paper's form, two biases, b_hn inside
    r.

    Args: ``x2h_weight`` [3H, I], ``h2h_weight`` [3H, H], ``x2h_bias`` and ``h2h_bias`` [3H] or None.
    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type or shape.
    """
    _check_matrix("h2h_weight", h2h_weight, "[3H, H]")
    hidden = _hidden(h2h_weight, "h2h_weight", "[3H, H]")
    _check_matrix("x2h_weight", x2h_weight, "[3H, I]")
    _check("x2h_weight", x2h_weight, (3 * hidden, x2h_weight.shape[1]), "[3H, I]")
    biases = []
    for name, bias in (("x2h_bias", x2h_bias), ("h2h_bias", h2h_bias)):
        if bias is not None:
            _check(name, bias, (3 * hidden,), "[3H]")
        biases.append(None if bias is None else _reorder(bias, "urn"))
    matrices = {"x2h_weight": x2h_weight, "h2h_weight": h2h_weight}
    _check_alike(matrices, {"x2h_bias": x2h_bias, "h2h_bias": h2h_bias})
    b_ih, b_hh = biases
    w_ih, w_hh = _reorder(x2h_weight, "urn"), _reorder(h2h_weight, "urn")
    return Weights(w_ih, w_hh, b_ih, b_hh, "after", "candidate", "paper")


def from_tf(
    gates_kernel: Tensor,
    candidate_kernel: Tensor,
    gates_bias: Tensor | None = None,
    candidate_bias: Tensor | None = None,
) -> Weights:
    """TensorFlow 1's GRUCell and the authors' VecAttGRUCell (also DeepCTR, xdl, DeepRec, NVIDIA SIM, ITEX).

    Columns [r|u] and n on the concatenation [x, h], one bias a gate, reset before the product, keep side::

        [r, u] = sigmoid([x, h] G + b_G),  n = tanh([x, r * h] C + b_C),  h = u' * h + (1 - u') * n

    with u' = (1 - a) u in the AUGRU (form "authors").

    Args: ``gates_kernel`` [I + H, 2H], ``candidate_kernel`` [I + H, H], ``gates_bias`` [2H],
    ``candidate_bias`` [H], biases both or none. Raises ``TypeError`` or ``ValueError`` naming the argument
    for a wrong type or shape.
    """
    _check_matrix("candidate_kernel", candidate_kernel, "[I + H, H]")
    both, hidden = candidate_kernel.shape
    if both <= hidden:
        raise ValueError(f"candidate_kernel must have shape [I + H, H] with I >= 1, got {(both, hidden)}")
    _check("gates_kernel", gates_kernel, (both, 2 * hidden), "[I + H, 2H]")
    if (gates_bias is None) != (candidate_bias is None):
        missing = "gates_bias" if gates_bias is None else "candidate_bias"
        raise ValueError(f"{missing} must be given where the other bias is, got None")
    bias = None
    if gates_bias is not None and candidate_bias is not None:
        _check("gates_bias", gates_bias, (2 * hidden,), "[2H]")
        _check("candidate_bias", candidate_bias, (hidden,), "[H]")
    matrices = {"gates_kernel": gates_kernel, "candidate_kernel": candidate_kernel}
    _check_alike(matrices, {"gates_bias": gates_bias, "candidate_bias": candidate_bias})
    if gates_bias is not None and candidate_bias is not None:
        bias = torch.cat((gates_bias, candidate_bias))
    rows = torch.cat((gates_kernel, candidate_kernel), 1).t()
    size = both - hidden
    return Weights(rows[:, :size], rows[:, size:], bias, None, "before", "keep", "authors")


def from_graphcore(kernel: Tensor, bias: Tensor | None = None, *, reset: Reset = "before") -> Weights:
    """Graphcore's PopnnAUGRU and its GRUs: columns [u|r|n] on the concatenation [x, h], form "authors".

    ``reset`` is its ``reset_after`` (False: "before"). With "before" there is one bias a gate. With "after"
    there are two, n = tanh(W x + b_n + r * (U h + b_n')): PopnnGRU trains both; PopnnAUGRU feeds
    one vector to both places, which is what a single vector means here (tied, as in DeepCTR-Torch).

    Args: ``kernel`` [I + H, 3H]; ``bias`` [3H] or [3, H], with "after" also [3, 2, H] (input, recurrent), or
    None. PopnnAUGRU's is ``cat((bias_r_u, bias_c))``: whatever the name says, row 0 is u and row 1 is r.
    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, shape or option.
    """
    check_option("reset", reset, ("after", "before"))
    _check_matrix("kernel", kernel, "[I + H, 3H]")
    both, hidden = kernel.shape[0], kernel.shape[1] // 3
    if kernel.shape[1] % 3 or both <= hidden or not hidden:
        raise ValueError(f"kernel must have shape [I + H, 3H] with I >= 1, got {tuple(kernel.shape)}")
    b_ih = b_hh = None
    if bias is not None:
        check_storage("bias", bias)
        shapes: list[tuple[int, ...]] = [(3 * hidden,), (3, hidden)]
        shapes += [(3, 2, hidden)] if reset == "after" else []
        if tuple(bias.shape) not in shapes:
            meaning = "[3H], [3, H] or [3, 2, H]" if reset == "after" else "[3H] or [3, H]"
            raise ValueError(f"bias must have shape {meaning}, H = {hidden}, got {tuple(bias.shape)}")
        if bias.dim() == 3:
            b_ih, b_hh = (_reorder(bias[:, i].flatten(), "urn") for i in (0, 1))
        else:
            b_ih = _reorder(bias.flatten(), "urn")
            b_hh = b_ih if reset == "after" else None
    _check_alike({"kernel": kernel}, {"bias": bias})
    rows = _reorder(kernel.t(), "urn")
    return Weights(rows[:, : both - hidden], rows[:, both - hidden :], b_ih, b_hh, reset, "keep", "authors")


def from_keras(
    kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor | None = None, *, reset: Reset = "after"
) -> Weights:
    """``keras.layers.GRU``: columns [z|r|h], keep side; ``reset_after=True`` (its default) has two biases.

    Args: ``kernel`` [I, 3H], ``recurrent_kernel`` [H, 3H], ``bias`` [2, 3H] (input, recurrent: the latter
    inside r) with ``reset="after"`` or [3H] with ``reset="before"``, or None.
    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, shape or option.
    """
    check_option("reset", reset, ("after", "before"))
    _check_matrix("recurrent_kernel", recurrent_kernel, "[H, 3H]")
    hidden = recurrent_kernel.shape[0]
    _check("recurrent_kernel", recurrent_kernel, (hidden, 3 * hidden), "[H, 3H]")
    _check_matrix("kernel", kernel, "[I, 3H]")
    _check("kernel", kernel, (kernel.shape[0], 3 * hidden), "[I, 3H]")
    b_ih = b_hh = None
    if bias is not None and reset == "after":
        _check("bias", bias, (2, 3 * hidden), "[2, 3H]")
        b_ih, b_hh = _reorder(bias[0], "urn"), _reorder(bias[1], "urn")
    elif bias is not None:
        _check("bias", bias, (3 * hidden,), "[3H]")
        b_ih = _reorder(bias, "urn")
    _check_alike({"kernel": kernel, "recurrent_kernel": recurrent_kernel}, {"bias": bias})
    return Weights(_reorder(kernel.t(), "urn"), _reorder(recurrent_kernel.t(), "urn"), b_ih, b_hh, reset, "keep", None)


def from_rechub(
    Wu: Tensor,
    Uu: Tensor,
    bu: Tensor,
    Wr: Tensor,
    Ur: Tensor,
    br: Tensor,
    Wh: Tensor,
    Uh: Tensor,
    bh: Tensor,
) -> Weights:
    """torch-rechub's AUGRU (0.8.0 and newer): nine separate tensors, the paper's form.

    ``u = sigmoid(x Wu + h Uu + bu)``, r alike, ``n = tanh(x Wh + r * (h Uh) + bh)``: one bias a gate, b_h
    outside r.

    Args: ``Wu``, ``Wr`` and ``Wh`` [I, H], ``Uu``, ``Ur`` and ``Uh`` [H, H], stored [in, out]; ``bu``, ``br`` and
    ``bh`` [1, H] or [H]. The names are those of torch-rechub.
    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type or shape.
    """
    _check_matrix("Wr", Wr, "[I, H]")
    size, hidden = Wr.shape
    biases = []
    for name, value in (("Wr", Wr), ("Wu", Wu), ("Wh", Wh)):
        _check(name, value, (size, hidden), "[I, H]")
    for name, value in (("Ur", Ur), ("Uu", Uu), ("Uh", Uh)):
        _check(name, value, (hidden, hidden), "[H, H]")
    for name, value in (("br", br), ("bu", bu), ("bh", bh)):
        check_storage(name, value)
        if tuple(value.shape) not in ((1, hidden), (hidden,)):
            raise ValueError(f"{name} must have shape [1, H] or [H], H = {hidden}, got {tuple(value.shape)}")
        biases.append(value.reshape(-1))
    _check_alike(
        {"Wr": Wr, "Wu": Wu, "Wh": Wh, "Ur": Ur, "Uu": Uu, "Uh": Uh},
        {"br": br, "bu": bu, "bh": bh},
    )
    w_ih, w_hh = torch.cat((Wr, Wu, Wh), 1).t(), torch.cat((Ur, Uu, Uh), 1).t()
    return Weights(w_ih, w_hh, torch.cat(biases), None, "after", "candidate", "paper")


def _plain(value: Tensor, ones: int) -> Tensor:
    """Without ``ones`` leading dimensions of size 1 (layers, directions)."""
    for _ in range(ones):
        if value.dim() > 1 and value.shape[0] == 1:
            value = value.squeeze(0)
    return value


def from_onednn(
    weights_layer: Tensor, weights_iter: Tensor, bias: Tensor | None = None, *, lbr: bool = False
) -> Weights:
    """oneDNN's ``gru``, ``augru`` (``lbr=False``: reset before) and ``lbr_gru``, ``lbr_augru`` (reset after).

    Layout ldigo, gates [u|r|o], keep side, form "authors" (its AUGRU before July 2022 was another function).
    With ``lbr`` there are four biases [u, r, o, u'], the last inside r: o = tanh(W x + r * (U h + b_u') +
    b_o); u and r have one bias each here too, which lands in ``b_ih``, with zeros in ``b_hh``.

    Args: ``weights_layer`` [I, 3, H] and ``weights_iter`` [H, 3, H], the last two dimensions also as one,
    with or without the leading [1, 1] of layers and directions; ``bias`` [3, H] or, with ``lbr``, [4, H], or
    None. Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type or shape.
    """
    columns = []
    for name, value in (("weights_layer", weights_layer), ("weights_iter", weights_iter)):
        check_storage(name, value)
        value = _plain(value, 2) if value.dim() in (4, 5) else value
        columns.append(value.flatten(1) if value.dim() == 3 else value)
    layer, iteration = columns
    _check_matrix("weights_iter", iteration, "[H, 3, H]")
    hidden = iteration.shape[0]
    _check("weights_iter", iteration, (hidden, 3 * hidden), "[H, 3 H]")
    _check_matrix("weights_layer", layer, "[I, 3, H]")
    _check("weights_layer", layer, (layer.shape[0], 3 * hidden), "[I, 3 H]")
    b_ih, b_hh = _four_biases(bias, hidden, lbr, "urn")
    _check_alike({"weights_layer": layer, "weights_iter": iteration}, {"bias": bias})
    reset: Reset = "after" if lbr else "before"
    return Weights(_reorder(layer.t(), "urn"), _reorder(iteration.t(), "urn"), b_ih, b_hh, reset, "keep", "authors")


def from_openvino(w: Tensor, r: Tensor, b: Tensor | None = None, *, linear_before_reset: bool = False) -> Weights:
    """OpenVINO's AUGRUSequence and AUGRUCell, and its GRUSequence: rows [z|r|h], keep side, form "authors".

    The AUGRU's reset comes before the product and it has one bias. The GRU with ``linear_before_reset`` has
    four: [z, r, h's input side, h's recurrent side]; the last lands inside r.

    Args: ``w`` [3H, I], ``r`` [3H, H], ``b`` [3H] or [4H] or None, with or without a leading 1 (directions).
    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type or shape.
    """
    for name, value in (("w", w), ("r", r)):
        check_storage(name, value)
    w, r = (_plain(t, 1) if t.dim() == 3 else t for t in (w, r))
    _check_matrix("r", r, "[3H, H]")
    hidden = _hidden(r, "r", "[3H, H]")
    _check_matrix("w", w, "[3H, I]")
    _check("w", w, (3 * hidden, w.shape[1]), "[3H, I]")
    b_ih, b_hh = _four_biases(b, hidden, linear_before_reset, "urn", "b")
    _check_alike({"w": w, "r": r}, {"b": b})
    reset: Reset = "after" if linear_before_reset else "before"
    return Weights(_reorder(w, "urn"), _reorder(r, "urn"), b_ih, b_hh, reset, "keep", "authors")


def _four_biases(
    bias: Tensor | None, hidden: int, four: bool, order: str, name: str = "bias"
) -> tuple[Tensor | None, Tensor | None]:
    """[3H], or [4H] with the recurrent bias of n last: that one to b_hh, all else to b_ih."""
    if bias is None:
        return None, None
    check_storage(name, bias)
    count = 4 if four else 3
    shape = tuple(size for size in bias.shape if size != 1)  # layers and directions are 1
    if shape not in ((count * hidden,), tuple(size for size in (count, hidden) if size != 1)):
        raise ValueError(
            f"{name} must have shape [{count}, H] = {(count, hidden)} or [{count} * H], got {tuple(bias.shape)}"
        )
    flat = bias.flatten()
    if not four:
        return _reorder(flat, order), None
    return _reorder(flat[: 3 * hidden], order), torch.cat((flat.new_zeros(2 * hidden), flat[3 * hidden :]))
