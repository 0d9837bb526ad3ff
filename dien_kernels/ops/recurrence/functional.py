"""The public recurrence ops: ``gru``, ``augru``, ``agru`` and ``aigru``.

Their docstrings say the same of the arguments that they share; ``tests/test_docstrings.py`` compares them.
"""

from __future__ import annotations

from torch import Tensor

from dien_kernels.checks import check_option
from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import BackendName
from dien_kernels.ops.recurrence.contract import Inputs
from dien_kernels.ops.recurrence.forms import FORMS, AUGRUForm, Padded, Reset, Update
from dien_kernels.ops.recurrence.op import run


def gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    histories: Histories | None = None,
    h0: Tensor | None = None,
    reset: Reset = "after",
    update: Update | None = None,
    padded: Padded = "zero",
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """A gated recurrent unit over ragged sequences: with default options the function of ``torch.nn.GRU``.

    With z the stored update gate and h the state before the step::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iu x + b_iu + W_hu h + b_hu)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     or, reset="before", ... + W_hn (r * h) + b_hn
        h' = z * h + (1 - z) * n                          or, update="candidate", (1 - z) * h + z * n

    ``update=None`` means ``"keep"``. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    U is the number of histories in ``x``, B the number of rows that are run (the same, unless rows share
    histories), T the padded number of steps, N the number of steps of a jagged batch, I and H the sizes of
    input and state. "Storage" is the dtype of ``x``: float32, float64, bfloat16 or float16; "compute" is
    float64 for float64 and float32 for the others.

    Args:
        x: inputs, [U, T, I] or, with ``offsets``, [N, I]. Storage.
        w_ih: [3 * H, I], storage; rows [r | u | n] as in ``torch.nn.GRU``.
        w_hh: [3 * H, H], storage; the same rows.
        b_ih, b_hh: [3 * H] or None (zero); compute or storage dtype.
        lengths: int64 or int32 [U], in steps, each from 0 to T; None: all T steps.
        offsets: int64 or int32 [U + 1], from 0 to N and ascending: history i is rows
            offsets[i] to offsets[i + 1] - 1 of x.
        mask: bool [U, T], True for real steps; holes and left padding are welcome. At most one of lengths,
            offsets and mask may be given; none has a gradient.
        histories: a ``dien_kernels.Histories`` without ``history_of``, which says what lengths, offsets and mask
            say and is checked once for all ops that read a batch; the three must then be None.
        h0: state before the first step, [B, H] or None (zero); compute or storage dtype.
        reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
        update: the side on which the weights store the update gate: ``"keep"`` (it multiplies h, as in
            ``torch.nn.GRU``) or ``"candidate"`` (it multiplies n); None: the side that is named above.
        padded: what stands in y past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
            state the row is in. Nothing in such a step of x or attention, NaN included, changes any output or
            gradient.
        backend: ``"auto"`` or a backend's name (``python -m dien_kernels info`` lists them); one that is named
            runs or raises.

    Returns:
        y, the state after each step, [B, T, H] or in jagged form [steps of all rows, H] (rows one after
        another), and h_n, the last state of each row, [B, H] (h0 for rows of length 0); both in the storage
        dtype. x, weights, biases and h0 have gradients, of every order.

    Raises:
        ValueError: a wrong shape, device or option, more than one of lengths, offsets and mask; on the CPU also
            index values out of range.
        TypeError: no tensor, or a tensor of a wrong dtype.
        RuntimeError: a backend that was named refuses the call; the message gives its reason.

    Under autocast x, w_ih and w_hh are cast, nothing else. Equations: docs/math.md.

    >>> import torch
    >>> from dien_kernels import gru
    >>> x, w_ih, w_hh = torch.randn(2, 5, 3), torch.randn(12, 3), torch.randn(12, 4)
    >>> y, h_n = gru(x, w_ih, w_hh, lengths=torch.tensor([5, 2]))
    >>> y.shape, h_n.shape, y[1, 2:].any().item(), torch.equal(y[1, 1], h_n[1])
    (torch.Size([2, 5, 4]), torch.Size([2, 4]), False, True)
    """
    layout = {"lengths": lengths, "offsets": offsets, "mask": mask, "histories": histories}
    inputs = Inputs(x, None, w_ih, w_hh, b_ih, b_hh, h0)
    return run("gru", inputs, layout, reset=reset, update=update, padded=padded, backend=backend)


def augru(
    x: Tensor,
    attention: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    histories: Histories | None = None,
    h0: Tensor | None = None,
    form: AUGRUForm = "paper",
    reset: Reset = "after",
    update: Update | None = None,
    padded: Padded = "zero",
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """A GRU whose update gate is scaled by attention (AUGRU); ``form`` says how; each form is another function.

    r and n are those of ``gru``; u is the gate as a step towards the candidate (the stored gate z if
    ``update`` is ``"candidate"``, 1 - z if it is ``"keep"``); a is the attention of the row and step::

        h' = (1 - g) * h + g * n
        form="paper"            g = a * u              update=None means "candidate"
        form="authors"          g = a + (1 - a) * u    update=None means "keep": (1 - a) * z of h is kept
        form="prediction_flow"  g = (1 - a) + a * u    update=None means "keep": a * z of h is kept

    Sources: equations (11) and (12) of https://arxiv.org/abs/1809.03672 (paper);
    https://github.com/mouna99/dien (authors, with ``reset="before"``).

    U is the number of histories in ``x``, B the number of rows that are run (the same, unless rows share
    histories), T the padded number of steps, N the number of steps of a jagged batch, I and H the sizes of
    input and state. "Storage" is the dtype of ``x``: float32, float64, bfloat16 or float16; "compute" is
    float64 for float64 and float32 for the others.

    Args:
        x: inputs, [U, T, I] or, with ``offsets``, [N, I]. Storage.
        attention: one number for each row and step, [B, T], or in jagged form one for each step of each row
            (rows one after another); compute or storage dtype. It is not clamped, and has a gradient.
        w_ih: [3 * H, I], storage; rows [r | u | n] as in ``torch.nn.GRU``.
        w_hh: [3 * H, H], storage; the same rows.
        b_ih, b_hh: [3 * H] or None (zero); compute or storage dtype.
        lengths: int64 or int32 [U], in steps, each from 0 to T; None: all T steps.
        offsets: int64 or int32 [U + 1], from 0 to N and ascending: history i is rows
            offsets[i] to offsets[i + 1] - 1 of x.
        mask: bool [U, T], True for real steps; holes and left padding are welcome. At most one of lengths,
            offsets and mask may be given; none has a gradient.
        history: int64 or int32 [B], from 0 to U - 1, in any order: row b runs over history ``history[b]``, so
            that many candidates share one history and its input projection. x, lengths, offsets and mask then
            describe the U histories; attention, h0, y and h_n the B rows. None: each history is one row. No
            gradient.
        histories: a ``dien_kernels.Histories``, which says what lengths, offsets, mask and history say and is
            checked once for all ops that read a batch; the four must then be None.
        h0: state before the first step, [B, H] or None (zero); compute or storage dtype.
        form: the name of g, as above.
        reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
        update: the side on which the weights store the update gate: ``"keep"`` (it multiplies h, as in
            ``torch.nn.GRU``) or ``"candidate"`` (it multiplies n); None: the side that is named above.
        padded: what stands in y past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
            state the row is in. Nothing in such a step of x or attention, NaN included, changes any output or
            gradient.
        backend: ``"auto"`` or a backend's name (``python -m dien_kernels info`` lists them); one that is named
            runs or raises.

    Returns:
        y, the state after each step, [B, T, H] or in jagged form [steps of all rows, H] (rows one after
        another), and h_n, the last state of each row, [B, H] (h0 for rows of length 0); both in the storage
        dtype. x, attention, weights, biases and h0 have gradients, of every order.

    Raises:
        ValueError: a wrong shape, device or option, more than one of lengths, offsets and mask; on the CPU also
            index values out of range.
        TypeError: no tensor, or a tensor of a wrong dtype.
        RuntimeError: a backend that was named refuses the call; the message gives its reason.

    Under autocast x, w_ih and w_hh are cast, nothing else. Equations: docs/math.md.

    >>> import torch
    >>> from dien_kernels import augru
    >>> x, w_ih, w_hh = torch.randn(2, 5, 3), torch.randn(12, 3), torch.randn(12, 4)
    >>> candidates = torch.tensor([1, 0, 0])  # three candidates on two histories
    >>> y, h_n = augru(x, torch.rand(3, 5), w_ih, w_hh, history=candidates)
    >>> y.shape, h_n.shape
    (torch.Size([3, 5, 4]), torch.Size([3, 4]))
    """
    check_option("form", form, FORMS)
    layout = {"lengths": lengths, "offsets": offsets, "mask": mask, "history": history, "histories": histories}
    inputs = Inputs(x, attention, w_ih, w_hh, b_ih, b_hh, h0)
    return run(form, inputs, layout, reset=reset, update=update, padded=padded, backend=backend)


def agru(
    x: Tensor,
    attention: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    histories: Histories | None = None,
    h0: Tensor | None = None,
    reset: Reset = "after",
    update: Update | None = None,
    padded: Padded = "zero",
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """A GRU whose update gate is replaced by attention (AGRU).

    r and n are those of ``gru``; a is the attention of the row and step::

        h' = (1 - a) * h + a * n

    The update rows of weights and biases are accepted, unused, and get zero gradient; ``update`` changes
    nothing. Source: equation (10) of https://arxiv.org/abs/1809.03672.

    U is the number of histories in ``x``, B the number of rows that are run (the same, unless rows share
    histories), T the padded number of steps, N the number of steps of a jagged batch, I and H the sizes of
    input and state. "Storage" is the dtype of ``x``: float32, float64, bfloat16 or float16; "compute" is
    float64 for float64 and float32 for the others.

    Args:
        x: inputs, [U, T, I] or, with ``offsets``, [N, I]. Storage.
        attention: one number for each row and step, [B, T], or in jagged form one for each step of each row
            (rows one after another); compute or storage dtype. It is not clamped, and has a gradient.
        w_ih: [3 * H, I], storage; rows [r | u | n] as in ``torch.nn.GRU``.
        w_hh: [3 * H, H], storage; the same rows.
        b_ih, b_hh: [3 * H] or None (zero); compute or storage dtype.
        lengths: int64 or int32 [U], in steps, each from 0 to T; None: all T steps.
        offsets: int64 or int32 [U + 1], from 0 to N and ascending: history i is rows
            offsets[i] to offsets[i + 1] - 1 of x.
        mask: bool [U, T], True for real steps; holes and left padding are welcome. At most one of lengths,
            offsets and mask may be given; none has a gradient.
        history: int64 or int32 [B], from 0 to U - 1, in any order: row b runs over history ``history[b]``, so
            that many candidates share one history and its input projection. x, lengths, offsets and mask then
            describe the U histories; attention, h0, y and h_n the B rows. None: each history is one row. No
            gradient.
        histories: a ``dien_kernels.Histories``, which says what lengths, offsets, mask and history say and is
            checked once for all ops that read a batch; the four must then be None.
        h0: state before the first step, [B, H] or None (zero); compute or storage dtype.
        reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
        update: the side on which the weights store the update gate: ``"keep"`` (it multiplies h, as in
            ``torch.nn.GRU``) or ``"candidate"`` (it multiplies n); None: the side that is named above.
        padded: what stands in y past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
            state the row is in. Nothing in such a step of x or attention, NaN included, changes any output or
            gradient.
        backend: ``"auto"`` or a backend's name (``python -m dien_kernels info`` lists them); one that is named
            runs or raises.

    Returns:
        y, the state after each step, [B, T, H] or in jagged form [steps of all rows, H] (rows one after
        another), and h_n, the last state of each row, [B, H] (h0 for rows of length 0); both in the storage
        dtype. x, attention, weights, biases and h0 have gradients, of every order.

    Raises:
        ValueError: a wrong shape, device or option, more than one of lengths, offsets and mask; on the CPU also
            index values out of range.
        TypeError: no tensor, or a tensor of a wrong dtype.
        RuntimeError: a backend that was named refuses the call; the message gives its reason.

    Under autocast x, w_ih and w_hh are cast, nothing else. Equations: docs/math.md.

    >>> import torch
    >>> from dien_kernels import agru
    >>> x, w_ih, w_hh = torch.randn(2, 5, 3), torch.randn(12, 3), torch.randn(12, 4)
    >>> y, h_n = agru(x, torch.zeros(2, 5), w_ih, w_hh, h0=torch.ones(2, 4))
    >>> torch.equal(h_n, torch.ones(2, 4))  # attention 0 leaves the state alone
    True
    """
    layout = {"lengths": lengths, "offsets": offsets, "mask": mask, "history": history, "histories": histories}
    inputs = Inputs(x, attention, w_ih, w_hh, b_ih, b_hh, h0)
    return run("agru", inputs, layout, reset=reset, update=update, padded=padded, backend=backend)


def aigru(
    x: Tensor,
    attention: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    histories: Histories | None = None,
    h0: Tensor | None = None,
    reset: Reset = "after",
    update: Update | None = None,
    padded: Padded = "zero",
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """A GRU that reads inputs scaled by attention (AIGRU): ``gru`` of a * x.

    The product W_ih x is made once for each history and scaled afterwards::

        r = sigmoid(a * (W_ir x) + b_ir + W_hr h + b_hr)      and u, n, h' likewise as in ``gru``

    ``update=None`` means ``"keep"``. Source: equation (9) of https://arxiv.org/abs/1809.03672.

    U is the number of histories in ``x``, B the number of rows that are run (the same, unless rows share
    histories), T the padded number of steps, N the number of steps of a jagged batch, I and H the sizes of
    input and state. "Storage" is the dtype of ``x``: float32, float64, bfloat16 or float16; "compute" is
    float64 for float64 and float32 for the others.

    Args:
        x: inputs, [U, T, I] or, with ``offsets``, [N, I]. Storage.
        attention: one number for each row and step, [B, T], or in jagged form one for each step of each row
            (rows one after another); compute or storage dtype. It is not clamped, and has a gradient.
        w_ih: [3 * H, I], storage; rows [r | u | n] as in ``torch.nn.GRU``.
        w_hh: [3 * H, H], storage; the same rows.
        b_ih, b_hh: [3 * H] or None (zero); compute or storage dtype.
        lengths: int64 or int32 [U], in steps, each from 0 to T; None: all T steps.
        offsets: int64 or int32 [U + 1], from 0 to N and ascending: history i is rows
            offsets[i] to offsets[i + 1] - 1 of x.
        mask: bool [U, T], True for real steps; holes and left padding are welcome. At most one of lengths,
            offsets and mask may be given; none has a gradient.
        history: int64 or int32 [B], from 0 to U - 1, in any order: row b runs over history ``history[b]``, so
            that many candidates share one history and its input projection. x, lengths, offsets and mask then
            describe the U histories; attention, h0, y and h_n the B rows. None: each history is one row. No
            gradient.
        histories: a ``dien_kernels.Histories``, which says what lengths, offsets, mask and history say and is
            checked once for all ops that read a batch; the four must then be None.
        h0: state before the first step, [B, H] or None (zero); compute or storage dtype.
        reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
        update: the side on which the weights store the update gate: ``"keep"`` (it multiplies h, as in
            ``torch.nn.GRU``) or ``"candidate"`` (it multiplies n); None: the side that is named above.
        padded: what stands in y past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
            state the row is in. Nothing in such a step of x or attention, NaN included, changes any output or
            gradient.
        backend: ``"auto"`` or a backend's name (``python -m dien_kernels info`` lists them); one that is named
            runs or raises.

    Returns:
        y, the state after each step, [B, T, H] or in jagged form [steps of all rows, H] (rows one after
        another), and h_n, the last state of each row, [B, H] (h0 for rows of length 0); both in the storage
        dtype. x, attention, weights, biases and h0 have gradients, of every order.

    Raises:
        ValueError: a wrong shape, device or option, more than one of lengths, offsets and mask; on the CPU also
            index values out of range.
        TypeError: no tensor, or a tensor of a wrong dtype.
        RuntimeError: a backend that was named refuses the call; the message gives its reason.

    Under autocast x, w_ih and w_hh are cast, nothing else. Equations: docs/math.md.

    >>> import torch
    >>> from dien_kernels import aigru, gru
    >>> x, a = torch.randn(2, 5, 3), torch.rand(2, 5)
    >>> w_ih, w_hh = torch.randn(12, 3), torch.randn(12, 4)
    >>> y, _ = aigru(x, a, w_ih, w_hh)
    >>> torch.allclose(y, gru(a.unsqueeze(2) * x, w_ih, w_hh)[0], atol=1e-5)
    True
    """
    layout = {"lengths": lengths, "offsets": offsets, "mask": mask, "history": history, "histories": histories}
    inputs = Inputs(x, attention, w_ih, w_hh, b_ih, b_hh, h0)
    return run("aigru", inputs, layout, reset=reset, update=update, padded=padded, backend=backend)
