"""DeepCTR-Torch's DIEN, original and patched: outputs, gradients, training, guards. ``make test-integrations`` runs it,
with the library in an environment of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepctr_torch.layers import sequence
from deepctr_torch.models import dien
from torch import Tensor, nn

from dien_kernels.integrations import active, patch

KINDS = ("GRU", "AIGRU", "AGRU", "AUGRU")
ROWS = {
    "full": [6, 6, 6, 6],
    "ragged": [6, 1, 3, 2],
    "empty": [4, 0, 6, 0],
    "single": [1, 1, 1, 1],
}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    assert active() == []


def batch(rows: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    query, keys, others = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
                           for s in ((4, 5), (4, 6, 5), (4, 6, 5)))  # fmt: skip
    return query, keys, others, torch.tensor(ROWS[rows])


def compare(run: Any, leaves: list[Tensor], dtype: torch.dtype, names: set[str]) -> None:
    """Outputs and gradients of ``run()`` with and without the patch; ``names`` are the methods that must have run."""
    found = []
    for fast in (False, True):
        if fast:
            with patch("deepctr_torch") as report:
                outputs = run()
            assert {name.rsplit(".", 2)[1] for name in report.calls} == names
            assert (report.fallbacks, report.withdrawn, report.skipped) == ({}, {}, {})
        else:
            outputs = run()
        acting = [o for o in outputs if o.requires_grad]
        loss = sum((o.sin() * torch.linspace(0.5, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in acting)
        found.append([*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    largest = max(float(g.abs().max()) for g in found[0] if g is not None)
    for mine, other in zip(found[1], found[0], strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            assert mine.dtype == other.dtype
            # Relative to the tensor, and to a thousandth of the largest one where its own true value is 0.
            assert float((mine - other).abs().max()) <= bound * max(float(other.abs().max()), 1e-3 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", list(ROWS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_evolving(kind: str, rows: str, dtype: torch.dtype, normalize: bool) -> None:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # its zeros have the default dtype
    try:
        module = dien.InterestEvolving(5, gru_type=kind, att_weight_normalization=normalize, init_std=0.5)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.25)
        query, keys, _, lengths = batch(rows, dtype)
        there = keys[lengths > 0].detach().requires_grad_()
        leaves = [query, there, *module.parameters()]
        compare(lambda: [module(query, there, lengths)], leaves, dtype, {"InterestEvolving"})
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("rows", list(ROWS))
@pytest.mark.parametrize("negatives", [False, True])
def test_extractor(rows: str, negatives: bool) -> None:
    torch.manual_seed(0)
    module = dien.InterestExtractor(5, use_neg=negatives, init_std=0.5)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.25)
    _, keys, others, lengths = batch(rows, torch.float32)
    leaves = [keys, others, *module.parameters()]
    arguments = (keys, lengths, others) if negatives else (keys, lengths)
    compare(lambda: list(module(*arguments)), leaves, torch.float32, {"InterestExtractor"})


@pytest.mark.parametrize("kind", ["AGRU", "AUGRU"])
def test_dynamic_gru(kind: str) -> None:
    torch.manual_seed(0)
    module = sequence.DynamicGRU(5, 5, gru_type=kind).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.25)
    _, keys, _, lengths = batch("ragged", torch.float64)
    scores = torch.rand(4, 6, dtype=torch.float64).requires_grad_()

    def run() -> list[Tensor]:
        packed = [nn.utils.rnn.pack_padded_sequence(t, lengths, batch_first=True, enforce_sorted=False)
                  for t in (keys, scores)]  # fmt: skip
        return [module(*packed).data]

    compare(run, [keys, scores, *module.parameters()], torch.float64, {"DynamicGRU"})


def test_a_batch_without_histories_is_left_to_the_original() -> None:
    module = dien.InterestEvolving(5, gru_type="AUGRU")
    with patch("deepctr_torch") as report:
        assert not module(torch.randn(2, 5), torch.randn(0, 6, 5), torch.tensor([0, 0])).any()
        extracted = dien.InterestExtractor(5)(torch.randn(2, 6, 5), torch.tensor([0, 0]))
    assert len(extracted) == 1  # as the original gives it
    assert {why for _, why in report.fallbacks} == {"Fallback: a batch without histories"}


def train(model: Any, steps: int) -> list[float]:
    """Losses of a DIEN's parts in a row, under Adam."""
    g = torch.Generator().manual_seed(1)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        keys, others, query = (torch.randn(*s, generator=g) for s in ((16, 10, 5), (16, 10, 5), (16, 5)))
        lengths = torch.randint(1, 11, (16,), generator=g)
        label = torch.randint(0, 2, (16,), generator=g).float()
        states, auxiliary = model["extractor"](keys, lengths, others)
        logits = model["out"](model["evolving"](query, states, lengths)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, label) + auxiliary.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_200_steps_stay_as_near_as_a_unit_in_the_last_place(kind: str) -> None:
    """The patched run is no farther from the original than three times the original with weights moved by one ulp."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "extractor": dien.InterestExtractor(5, use_neg=True, init_std=0.3),
            "evolving": dien.InterestEvolving(5, gru_type=kind, att_weight_normalization=True, init_std=0.3),
            "out": nn.Linear(5, 1),
        }
    )
    twins, patched = [copy.deepcopy(model) for _ in range(2)], copy.deepcopy(model)
    with torch.no_grad():
        for twin, direction in zip(twins, (1, -1), strict=True):
            for parameter in twin.parameters():
                parameter.copy_(torch.nextafter(parameter, parameter + direction))
    original = train(model, 200)
    apart = max(abs(a - b) for twin in twins for a, b in zip(original, train(twin, 200), strict=True))
    with patch("deepctr_torch") as report:
        ours = train(patched, 200)
    assert set(report.calls.values()) == {200}
    assert apart > 0
    assert max(abs(a - b) for a, b in zip(original, ours, strict=True)) <= 3 * apart


@pytest.mark.parametrize("kind", ["AGRU", "AUGRU"])
def test_a_wrong_form_is_withdrawn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dien_kernels.integrations import deepctr_torch as host

    op = host._OPS[f"{kind}Cell"]
    monkeypatch.setitem(host._OPS, f"{kind}Cell", lambda x, a, *w, **k: op(x, 1 - a, *w, **k))
    torch.manual_seed(0)
    module = dien.InterestEvolving(5, gru_type=kind, att_weight_normalization=True, init_std=0.5)
    query, keys, _, lengths = batch("ragged", torch.float32)
    wanted = module(query, keys, lengths)
    with patch("deepctr_torch") as report:
        assert torch.equal(module(query, keys, lengths), wanted)
        assert torch.equal(module(query, keys, lengths), wanted)
    # The original that takes over calls the cell's own loop, whose replacement is wrong, too.
    assert {name.rsplit(".", 2)[1] for name in report.withdrawn} == {"InterestEvolving", "DynamicGRU"}
    assert report.calls == {}
