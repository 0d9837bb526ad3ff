"""Models are the functions that docs/models.md writes down: values, losses and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dien_kernels.batch import Batch, Schema
from dien_kernels.models import MODELS
from dien_kernels.ops.recurrence.forms import FORMS
from tests.models.common import SCHEMA, SMALL_OF, STATISTICS, model_of, plain, random_batch, resolved
from tests.models.transcription import Answer, transcribe

pytestmark = pytest.mark.usefixtures("one_thread")

# Float64 is compared with float64: two orders of the same sums. Float32 is compared with float64 of the same
# stored weights: a recurrence of five steps and an MLP round a few dozen times, at 6e-8 each.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

# Lengths 0 and 1, and histories with no, one and three rows.
RAGGED = random_batch([3, 0, 5, 1, 4], [2, 0, 2, 1, 3, 2, 0])
BATCHES = {
    "own": random_batch([4, 0, 5, 1]),
    "shared": RAGGED,
    "one row": random_batch([4]),
    "all empty": random_batch([0, 0, 0]),
    "no pair": random_batch([1, 0, 1]),
}


def check_against_transcription(
    name: str,
    options: dict[str, Any],
    batch: Batch,
    preset: str | None = None,
    dtype: torch.dtype = torch.float64,
    schema: Schema = SCHEMA,
) -> Answer:
    """Fails unless the model and the transcription agree; returns what the transcription says."""
    model = model_of(name, options, preset, dtype, schema)
    state = {key: value.double() for key, value in model.state_dict().items() if value.is_floating_point()}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {key: value.clone().requires_grad_(key in trained) for key, value in state.items()}
    chosen = resolved(name, {**SMALL_OF[name], **options}, preset)

    output = model(batch)
    losses = model.loss(output, batch.label)
    losses.total.backward()
    answer = transcribe(
        name,
        weights,
        chosen,
        plain(batch),
        dense=schema.dense,
        behaviour_dense=schema.behaviour_dense,
        statistics=None if schema is SCHEMA else STATISTICS,
    )
    answer.total.backward()

    def close(what: str, actual: torch.Tensor, exact: torch.Tensor) -> None:
        error = float((actual.detach().double() - exact.detach()).abs().max())
        limit = TOLERANCE[dtype] * max(float(exact.detach().abs().max()), 1e-3)
        assert error <= limit, f"{what}: {error:.3g} away, {limit:.3g} allowed"

    close("logits", output.logits, answer.logits)
    close("click loss", losses.click, answer.click)
    close("total loss", losses.total, answer.total)
    assert (output.auxiliary is None) == (answer.auxiliary is None)
    if output.auxiliary is not None and answer.auxiliary is not None:
        close("auxiliary loss", output.auxiliary, answer.auxiliary)
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        sequence = key.removeprefix("further.").split(".auxiliary.")[0]
        if sequence in batch.sequences and batch.sequences[sequence].negatives is None:
            assert gradient is None, f"{key} has a gradient, but its sequence has no negatives"
            continue
        assert gradient is not None, f"{key} has no gradient"
        if "embeddings" in key and ".quantiles." not in key and ".projections." not in key:
            assert gradient.is_sparse, f"{key} has a dense gradient"
            gradient = gradient.to_dense()
        exact = weights[key].grad
        close(f"gradient of {key}", gradient, torch.zeros_like(weights[key]) if exact is None else exact)
    return answer


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("preset", ["paper", "authors"])
@pytest.mark.parametrize("name", MODELS)
def test_presets(name: str, preset: str, dtype: torch.dtype) -> None:
    check_against_transcription(name, {}, RAGGED, preset, dtype)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("preset", ["paper", "authors", None])
def test_batches(preset: str | None, batch: Batch) -> None:
    check_against_transcription("dien", {}, batch, preset)


DIN_ATTENTION = {"attention.kind": "din"}
AUX_MLP = {"auxiliary.kind": "mlp"}
# Model, the options that others are compared with, and the options under test.
OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dien", {}, {"evolution.kind": "agru"}),
    ("dien", {}, {"evolution.kind": "aigru"}),
    ("dien", {}, {"evolution.kind": "gru"}),
    *(("dien", {}, {"evolution.form": form}) for form in FORMS if form != "paper"),
    ("dien", {"evolution.kind": "gru"}, {"evolution.readout": "last"}),
    ("dien", {}, {"extractor.reset": "before"}),
    ("dien", {}, {"extractor.update": "candidate"}),
    ("dien", {}, {"extractor.bias": False}),
    ("dien", {}, {"extractor.bias": "single"}),
    ("dien", {}, {"evolution.reset": "before"}),
    ("dien", {}, {"evolution.update": "keep"}),
    ("dien", {"evolution.form": "authors"}, {"evolution.update": "candidate"}),
    ("dien", {"evolution.kind": "aigru"}, {"evolution.update": "candidate"}),
    ("dien", {"evolution.kind": "agru"}, {"evolution.reset": "before"}),
    ("dien", {}, {"evolution.bias": False}),
    ("dien", {}, {"evolution.bias": "single"}),
    ("dien", {}, {"evolution.bias": "tied"}),
    ("dien", {}, {"extractor.hidden_size": 6, "auxiliary.kind": "mlp"}),
    ("dien", {}, DIN_ATTENTION),
    ("dien", DIN_ATTENTION, {"attention.activation": "relu"}),
    ("dien", DIN_ATTENTION, {"attention.activation": "prelu"}),
    ("dien", DIN_ATTENTION, {"attention.activation": None}),
    ("dien", DIN_ATTENTION, {"attention.units": (5,)}),
    ("dien", {}, {"attention.scale": 0.3}),
    ("dien", {}, {"attention.normalize": None}),
    ("dien", {}, {"attention.normalize": "sigmoid"}),
    ("dien", {}, {"attention.query": "prelu"}),
    ("dien", {**DIN_ATTENTION, **AUX_MLP, "attention.query": "prelu"}, {"extractor.hidden_size": 6}),
    ("dien", {}, {"auxiliary": None}),
    ("dien", {}, {"auxiliary.weight": 0.2}),
    ("dien", {}, AUX_MLP),
    ("dien", AUX_MLP, {"auxiliary.activation": "relu"}),
    ("dien", AUX_MLP, {"auxiliary.activation": "prelu"}),
    ("dien", AUX_MLP, {"auxiliary.activation": None}),
    ("dien", AUX_MLP, {"auxiliary.outputs": 2}),
    ("dien", AUX_MLP, {"auxiliary.norm": "fixed"}),
    ("dien", AUX_MLP, {"auxiliary.units": (5,)}),
    ("dien", {}, {"auxiliary.normalizer": "joint"}),
    ("dien", {}, {"auxiliary.normalizer": "row"}),
    ("dien", {}, {"auxiliary.normalizer": "padded"}),
    ("dien", {}, {"auxiliary.normalizer": "history"}),
    ("dien", {}, {"auxiliary.eps": 0.1}),
    ("dien", {}, {"auxiliary.eps": "clamp"}),
    ("average", {}, {"pooling": "sum"}),
    ("average", {}, {"product": True}),
    ("average", {}, {"head.activation": "prelu"}),
    ("average", {}, {"head.activation": "relu"}),
    ("average", {}, {"head.activation": "sigmoid"}),
    ("average", {}, {"head.dice_statistics": "batch"}),
    ("average", {}, {"head.norm": "fixed"}),
    ("average", {}, {"head.norm": "moving"}),
    ("average", {}, {"head.norm": "batch"}),
    ("average", {}, {"head.outputs": 2}),
    ("average", {}, {"head.units": (5,)}),
    ("average", {}, {"click.weight": 0.5}),
    ("average", {}, {"click.reduction": "sum"}),
    ("average", {}, {"click.eps": 0.1}),
    ("dien", {}, {"pooling": "mean", "product": True}),
    ("din", {}, {"attention.kind": "bilinear"}),
    ("din", {}, {"attention.query": "prelu"}),
    ("din", {}, {"attention.normalize": None}),
    ("gru", {}, {"extractor.hidden_size": 6}),
    ("gru", {}, {"pooling": None}),
    ("gru", {}, {"extractor.reset": "before"}),
    ("gru_attention", {}, {"evolution.readout": "last"}),
    ("gru_attention", {}, {"auxiliary.kind": "inner"}),
]
# The same function of the same weights: one bias is two of which one is 0, or the same; the two kinds of Dice
# differ in evaluation, the clamp for logits above 100 (tests below); a width is read off the weights.
SAME = ("extractor.bias", "evolution.bias", "auxiliary.eps", "head.dice_statistics", "extractor.hidden_size")


@pytest.mark.parametrize("name, base, changed", OPTIONS, ids=lambda v: v if isinstance(v, str) else str(v or ""))
def test_options(name: str, base: dict[str, Any], changed: dict[str, Any]) -> None:
    """Each option is the function that is documented for it, and another one than without it."""
    mine = check_against_transcription(name, {**base, **changed}, RAGGED)
    if set(changed) & set(SAME) and changed != {"auxiliary.eps": 0.1}:
        return
    weights = model_of(name, {**base, **changed}).state_dict()
    try:
        other = transcribe(name, dict(weights), resolved(name, {**SMALL_OF[name], **base}), plain(RAGGED))
    except (KeyError, RuntimeError):
        return  # other weights altogether
    one, two = torch.cat([mine.logits, mine.total.view(1)]), torch.cat([other.logits, other.total.view(1)])
    assert float((one - two).detach().abs().max()) > 1e-6


@pytest.mark.parametrize(
    "options",
    [{}, {"head.norm": "moving"}, {"head.norm": "batch"}, {"head.dice_statistics": "batch"}, {"head.norm": "fixed"}],
    ids=str,
)
def test_evaluation_mode(options: dict[str, Any]) -> None:
    """After some training the moving averages are what a batch is compared with, where the options say so."""
    model = model_of("average", options)
    for seed in range(3):
        model(random_batch([3, 2, 4], seed=seed))
    model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(RAGGED).logits
    chosen = resolved("average", {**SMALL_OF["average"], **options})
    torch.testing.assert_close(logits, transcribe("average", state, chosen, plain(RAGGED), False).logits)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"evaluation changed {key}"


def test_clamp_holds_the_loss_of_a_hopeless_pair() -> None:
    """What sets ``auxiliary_eps="clamp"`` apart: a term is never above 100."""
    batch = random_batch([4, 3])
    values = {}
    for eps in (0.0, "clamp"):
        model = model_of("dien", {"auxiliary.eps": eps})
        with torch.no_grad():
            for table in model.embeddings.items.values():
                table.weight.mul_(1000)
        values[eps] = float(model(batch).auxiliary.detach())
    assert values["clamp"] <= 200 < values[0.0]
