"""Packed sequences in AUGRU, AGRU and AIGRU: what lengths give, in the order before packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dien_kernels.layers import AGRU, AIGRU, AUGRU

LENGTHS = {
    "unsorted": torch.tensor([2, 5, 1, 3]),
    "sorted": torch.tensor([5, 3, 3, 1]),
    "equal": torch.tensor([5, 5, 5, 5]),
}
LAYERS = {"augru": AUGRU, "agru": AGRU, "aigru": AIGRU}


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = (4, 5, 3), (4, 5), (4, 6)
    x, attention, h0 = (torch.randn(size, generator=g, dtype=torch.float64).requires_grad_() for size in sizes)
    return x, attention, h0


def pack(values: Tensor, kind: str) -> PackedSequence:
    return pack_padded_sequence(values, LENGTHS[kind], batch_first=True, enforce_sorted=kind != "unsorted")


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("kind", list(LENGTHS))
@pytest.mark.parametrize("name", list(LAYERS))
def test_packed_is_what_lengths_give(name: str, kind: str, start: bool) -> None:
    torch.manual_seed(0)
    layer: Any = LAYERS[name](3, 6, dtype=torch.float64)
    x, attention, h0 = tensors()
    given = h0 if start else None
    y, h_n = layer(x, attention, lengths=LENGTHS[kind], h0=given)
    packed, packed_h_n = layer(pack(x, kind), pack(attention, kind), h0=given)
    sequence = pack(x, kind)
    assert torch.equal(packed.batch_sizes, sequence.batch_sizes)
    assert packed.sorted_indices is None or torch.equal(packed.sorted_indices, sequence.sorted_indices)  # type: ignore[arg-type]
    found, _ = pad_packed_sequence(packed, batch_first=True, total_length=5)
    # A jagged batch may be cut into other blocks of rows than a padded one.
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(packed_h_n, h_n, rtol=1e-12, atol=1e-14)
    leaves = [x, attention, *layer.parameters(), *([h0] if start else [])]
    wanted = torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), leaves)
    gradients = torch.autograd.grad(found.sin().sum() + packed_h_n.cos().sum(), leaves)
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_attention_may_have_a_dimension_of_one() -> None:
    layer = AUGRU(3, 6, dtype=torch.float64)
    x, attention, _ = tensors()
    flat, _ = layer(pack(x, "unsorted"), pack(attention, "unsorted"))
    column, _ = layer(pack(x, "unsorted"), pack(attention.unsqueeze(2), "unsorted"))
    assert torch.equal(flat.data, column.data)


def test_bad_packed_input_is_named() -> None:
    layer: Any = AUGRU(3, 6, dtype=torch.float64)
    x, attention, h0 = tensors()
    good, scores = pack(x, "unsorted"), pack(attention, "unsorted")
    with pytest.raises(TypeError, match="^attention must be a PackedSequence, as x is, got Tensor$"):
        layer(good, attention)
    with pytest.raises(TypeError, match=r"^attention must be a torch\.Tensor, got PackedSequence$"):
        layer(x, scores)
    with pytest.raises(ValueError, match="^attention must be packed as x is, with batch_sizes"):
        layer(good, pack(attention, "sorted"))
    with pytest.raises(ValueError, match="^lengths must be None for a PackedSequence, got a Tensor$"):
        layer(good, scores, lengths=LENGTHS["unsorted"])
    with pytest.raises(ValueError, match=r"^h0 must have shape \[B, H\]"):
        layer(good, scores, h0=h0[:2])
    with pytest.raises(ValueError, match="^x must have input_size = 3 features"):
        layer(pack(x[:, :, :2], "unsorted"), scores)
    with pytest.raises(ValueError, match=r"^x\.batch_sizes must hold at least one size"):
        layer(PackedSequence(good.data[:-1], good.batch_sizes), scores)
