"""layers.GRU on a PackedSequence, against torch.nn.GRU on the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from dien_kernels.layers import GRU
from tests.layers.support import DTYPES, H, I, assert_equal_bits, assert_twins_agree, randn, twins

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = {
    "sorted": [5, 4, 2, 1],
    "unsorted": [2, 5, 1, 4],
    "ties": [3, 5, 3, 5],
    "equal": [4, 4, 4, 4],
    "equal-unsorted-flag": [4, 4, 4, 4],
    "one-row": [3],
    "one-step": [1, 1, 1],
}
STACKS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False},
]


def packed(input: Tensor, kind: str) -> PackedSequence:
    lengths = LENGTHS[kind]
    sort = kind in ("sorted", "equal", "one-row", "one-step")
    return pack_padded_sequence(input, torch.tensor(lengths), batch_first=True, enforce_sorted=sort)


def padded(kind: str, *more: int) -> Tensor:
    lengths = LENGTHS[kind]
    return randn(len(lengths), max(lengths), I, *more)


@pytest.mark.parametrize("options", STACKS, ids=["one", "two-both-ways", "three-no-bias"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_outputs_last_states_and_gradients(kind: str, options: dict[str, Any]) -> None:
    def run(layer: torch.nn.Module, input: Tensor, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]:
        return layer(packed(input, kind), hx)

    twin = twins(**options)
    rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    assert_twins_agree(twin, run, input=padded(kind))
    assert_twins_agree(twin, run, input=padded(kind), hx=randn(rows, len(LENGTHS[kind]), H, seed=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    def run(layer: torch.nn.Module, input: Tensor, hx: Tensor) -> tuple[PackedSequence, Tensor]:
        return layer(packed(input, "unsorted"), hx)

    twin = twins(dtype, bidirectional=True)
    assert_twins_agree(twin, run, input=padded("unsorted"), hx=randn(2, 4, H, seed=2))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LENGTHS)
def test_the_structure_is_passed_on(kind: str, batch_first: bool) -> None:
    """Sizes and indices of the output are the input's, so that pad_packed_sequence undoes the sorting."""
    mine, plain, _ = twins(torch.float32, batch_first=batch_first)
    sequence = packed(padded(kind), kind)
    y, _ = mine(sequence)
    other, _ = plain(sequence)
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.batch_sizes, other.batch_sizes)
    for one, two in ((y.sorted_indices, other.sorted_indices), (y.unsorted_indices, other.unsorted_indices)):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)
    mine_padded, lengths = pad_packed_sequence(y, batch_first=True)
    assert lengths.tolist() == LENGTHS[kind]
    torch.testing.assert_close(mine_padded, pad_packed_sequence(other, batch_first=True)[0])
    # Packed or padded with lengths: one function.
    by_row = GRU(I, H, batch_first=True)
    by_row.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine_padded, by_row(padded(kind), lengths=lengths)[0])


def test_pack_sequence_of_a_list_and_a_second_layer_on_its_output() -> None:
    histories = [randn(n, I, seed=n) for n in (2, 4, 1)]
    mine, plain, _ = twins(torch.float32)
    sequence = pack_sequence(histories, enforce_sorted=False)
    y, h_n = mine(sequence)
    second = GRU(H, 2)
    z, _ = second(y, None)
    for i, history in enumerate(histories):
        alone, h_alone = plain(history)
        torch.testing.assert_close(h_n[:, i], h_alone)
        own, _ = pad_packed_sequence(z, batch_first=True)
        torch.testing.assert_close(own[i, : len(history)], second(alone)[0])


def test_autocast_takes_a_first_state_in_its_own_dtype() -> None:
    """h_n of one layer under autocast is bfloat16, and the next layer's hx; sorted or not."""
    layer = GRU(I, H)
    for kind in ("sorted", "unsorted", "equal-unsorted-flag"):
        with torch.autocast("cpu", torch.bfloat16):
            y, h_n = layer(packed(padded(kind), kind))
            assert y.data.dtype == h_n.dtype == torch.bfloat16
            again, _ = layer(packed(padded(kind), kind), h_n)
        low = GRU(I, H, dtype=torch.bfloat16)
        low.load_state_dict(layer.state_dict())
        with torch.no_grad():  # biases stay float32 under autocast
            low.bias_ih_l0.data, low.bias_hh_l0.data = layer.bias_ih_l0.data, layer.bias_hh_l0.data
        assert_equal_bits((again,), (low(packed(padded(kind).bfloat16(), kind), h_n)[0],))


def test_gradients_stop_where_nothing_wants_them() -> None:
    mine, _, _ = twins(torch.float32)
    sequence = packed(padded("unsorted"), "unsorted")
    with torch.inference_mode():
        y, h_n = mine(sequence)
    assert not y.data.requires_grad
    assert not h_n.requires_grad
    for parameter in mine.parameters():
        parameter.requires_grad_(False)
    assert not mine(sequence)[0].data.requires_grad


BROKEN = {
    "empty": [],
    "rising": [2, 3],
    "zero": [5, 0],
    "short": [2, 2],
    "long": [3, 3],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_packed_sequence_is_named(kind: str) -> None:
    sequence = PackedSequence(torch.zeros(5, I), torch.tensor(BROKEN[kind], dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input\.batch_sizes must hold .* 5 rows of input\.data, got \["):
        GRU(I, H)(sequence)


def test_other_bad_packed_input() -> None:
    layer = GRU(I, H)
    sequence = packed(padded("unsorted"), "unsorted")
    with pytest.raises(ValueError, match=r"input\.data must have input_size = 3 features last, got .*12, 4"):
        layer(PackedSequence(torch.zeros(12, 4), sequence.batch_sizes))
    with pytest.raises(ValueError, match=r"input\.data must be \[N, I\], got shape \(3, 4, 3\)"):
        layer(PackedSequence(torch.zeros(3, 4, I), torch.tensor([3])))
    with pytest.raises(TypeError, match=r"input\.data must have the dtype of the weights, torch\.float32"):
        layer(packed(padded("unsorted").double(), "unsorted"))
    for shape in ((1, 3, H), (2, 4, H), (4, H)):
        with pytest.raises(ValueError, match=r"hx must have shape .* = \(1, 4, 5\), got"):
            layer(sequence, torch.zeros(shape))
        with pytest.raises(ValueError, match=r"hx must have shape .* = \(1, 4, 5\), got"):
            layer(packed(padded("sorted"), "sorted"), torch.zeros(shape))
    for name, value in (
        ("lengths", torch.ones(4).long()),
        ("mask", torch.ones(4, 5).bool()),
        ("offsets", torch.zeros(5).long()),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be None for a PackedSequence.* got a Tensor"):
            layer(sequence, **{name: value})
