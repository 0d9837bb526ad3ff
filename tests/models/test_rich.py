"""What a behaviour and an item may carry beside an id: fields, numbers, several values, further sequences."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dien_kernels.batch import Batch, Schema, Sequence
from dien_kernels.models import MODELS, build
from dien_kernels.training.optimizer import make_optimizer
from dien_kernels.training.setup import without_history
from dien_kernels.training.step import training_step
from tests.models.common import RICH, STATISTICS, model_of, rich_batch, rich_steps, unshared
from tests.models.test_transcription import check_against_transcription

pytestmark = pytest.mark.usefixtures("one_thread")

# Own histories and shared ones, empty ones in each sequence, U below, at and above B, with and without negatives.
BATCH = rich_batch([3, 0, 5, 1, 4], [2, 0, 2, 1, 3, 2, 0])
BATCHES = {
    "shared": BATCH,
    "own": rich_batch([4, 0, 2]),
    "more histories than rows": rich_batch(
        [2, 1, 3, 0], [2, 1], {"buys": ([0, 3, 1], [1, 1], 2), "saved": ([1], [0, 0], 1)}
    ),
    "all empty": rich_batch([0, 0, 0], None, {"buys": ([0] * 3, None, 1), "saved": ([0], [0] * 3, 0)}),
}
EACH = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@EACH
def test_models_are_what_the_page_says(name: str, batch: Batch) -> None:
    batch.check(RICH)
    check_against_transcription(name, {}, batch, schema=RICH)


OPTIONS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("dien", "paper", {}),
    ("dien", "authors", {}),
    ("dien", None, {"embedding.several": "sum", "pooling": "mean", "product": True}),
    ("dien", None, {"extractor.hidden_size": 6, "auxiliary.kind": "mlp"}),
    ("dien", None, {"attention.kind": "din"}),
    ("dien", None, {"evolution.kind": "gru", "evolution.readout": "last"}),
    ("dien", None, {"auxiliary": None}),
    ("dien", None, {"dense.scaling": "quantiles", "dense.size": 3}),
    ("dien", None, {"dense.scaling": {"age": "quantiles", "dwell": "log", "rating": "none"}, "dense.size": 2}),
    ("din", None, {"attention.kind": "bilinear"}),
    ("din", None, {"attention.query": "prelu"}),
    ("din", "authors", {"dense.indicator": True}),
    ("average", "authors", {"dense.scaling": "none", "dense.indicator": False}),
    ("average", None, {"dense.scaling": "log"}),
    ("gru_attention", "authors", {"auxiliary.kind": "inner"}),
    ("gru", None, {"extractor.hidden_size": 5, "pooling": None}),
]


@pytest.mark.parametrize("name, preset, options", OPTIONS, ids=str)
def test_options(name: str, preset: str | None, options: dict[str, Any]) -> None:
    check_against_transcription(name, options, BATCH, preset, schema=RICH)


def test_float32() -> None:
    check_against_transcription("dien", {}, BATCH, "paper", torch.float32, schema=RICH)


def loss_and_gradients(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(batch)
    total = model.loss(output, batch.label).total
    total.backward()
    grads = {key: p.grad.to_dense() for key, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), total.detach(), grads


def every_value_counts(make: Callable[[Batch], Batch], batch: Batch, name: str = "dien") -> bool:
    model = model_of(name, {}, schema=RICH).eval()
    return not torch.allclose(model(make(batch)).logits, model(batch).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["dien", "din", "average", "gru"])
@pytest.mark.parametrize("sequence", [None, "buys", "saved"])
def test_each_kind_of_feature_is_read(name: str, sequence: str | None) -> None:
    """A change of any of them changes a score: nothing that a batch carries is left unread."""

    def changed(batch: Batch, **values: Any) -> Batch:
        if sequence is None:
            return replace(batch, **values)
        return replace(batch, sequences=batch.sequences | {sequence: replace(batch.sequences[sequence], **values)})

    steps: Any = BATCH if sequence is None else BATCH.sequences[sequence]
    for field, size in RICH.items.items():
        values = steps.history | {field: (steps.history[field] + 1) % size}
        assert every_value_counts(lambda b, v=values: changed(b, history=v), BATCH, name), field
    for field, size in RICH.behaviours.items():
        values = steps.behaviours | {field: (steps.behaviours[field] + 1) % size}
        assert every_value_counts(lambda b, v=values: changed(b, behaviours=v), BATCH, name), field
    for column in range(2):
        numbers = steps.behaviour_dense.clone()
        numbers[:, column] += 1
        assert every_value_counts(lambda b, v=numbers: changed(b, behaviour_dense=v), BATCH, name), column


def test_gradients_reach_every_table() -> None:
    model = model_of("dien", {}, schema=RICH)
    _, _, grads = loss_and_gradients(model, BATCH)
    for key, parameter in model.named_parameters():
        assert key in grads, key
        assert bool(grads[key].isfinite().all()), key
        if "further.saved.auxiliary" not in key and "bias" not in key and parameter.numel() > 1:
            assert bool(grads[key].any()), key


def test_no_value_is_no_value() -> None:
    """The zeros of a field with several values, their number and what stands in row 0 change nothing."""
    model = model_of("dien", {}, schema=RICH)
    before = loss_and_gradients(model, BATCH)
    wider = BATCH.map(lambda t: t)
    for steps in (wider, *wider.sequences.values()):
        for ids in (steps.history, steps.negatives, getattr(steps, "target", None)):
            if ids is not None:
                tag = ids["tag"].flip(-1)  # the order of the values does not count, either
                ids["tag"] = torch.cat([torch.zeros_like(tag[..., :1]), tag, torch.zeros_like(tag)], -1)
    with torch.no_grad():
        model.embeddings.items["tag"].weight[0] = float("nan")
    after = loss_and_gradients(model, wider)
    assert not bool(before[2]["embeddings.items.tag.weight"][0].any())
    for one, two in zip(before[:2], after[:2], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
    for key, grad in before[2].items():
        torch.testing.assert_close(after[2][key], grad, rtol=1e-10, atol=1e-12, msg=key)


def test_rows_and_histories_may_be_permuted() -> None:
    """Rows in another order, and each sequence's histories in another order with ``history_of`` to match."""
    model = model_of("dien", {}, schema=RICH)
    logits, total, grads = loss_and_gradients(model, BATCH)
    order = torch.randperm(BATCH.rows, generator=torch.Generator().manual_seed(3))

    def reordered(steps: Any, seed: int) -> Any:
        u = steps.offsets.numel() - 1
        histories = torch.randperm(u, generator=torch.Generator().manual_seed(seed))
        bounds = steps.offsets.tolist()
        index = torch.cat([torch.arange(bounds[h], bounds[h + 1]) for h in histories.tolist()])
        row_of = torch.arange(u) if steps.history_of is None else steps.history_of
        return replace(
            steps,
            history={name: ids[index] for name, ids in steps.history.items()},
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), steps.offsets.diff()[histories].cumsum(0)]),
            history_of=histories.argsort()[row_of][order],
            rows_total=-1,
            negatives=None if steps.negatives is None else {k: v[index] for k, v in steps.negatives.items()},
            behaviours={name: ids[index] for name, ids in steps.behaviours.items()},
            behaviour_dense=steps.behaviour_dense[index],
        )

    other = replace(
        reordered(BATCH, 4),
        target={name: ids[order] for name, ids in BATCH.target.items()},
        users={name: ids[order] for name, ids in BATCH.users.items()},
        label=BATCH.label[order],
        dense=BATCH.dense[order],
        sequences={name: reordered(each, 5 + i) for i, (name, each) in enumerate(BATCH.sequences.items())},
    )
    other.check(RICH)
    found = loss_and_gradients(model, other)
    torch.testing.assert_close(found[0], logits[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], total, rtol=1e-10, atol=1e-12)
    for key, grad in grads.items():
        torch.testing.assert_close(found[2][key], grad, rtol=1e-9, atol=1e-12, msg=key)


@EACH
def test_rows_of_shared_histories_are_rows_with_copies(name: str) -> None:
    """Without auxiliary loss, which counts histories and not rows."""
    options = {"auxiliary": None} if "auxiliary" in MODELS[name].options() else {}
    model = model_of(name, options, schema=RICH)
    own = unshared(BATCH)
    assert own.history_of is None
    assert own.sequences["buys"].history_of is None
    one, two = loss_and_gradients(model, BATCH), loss_and_gradients(model, own)
    torch.testing.assert_close(one[0], two[0], rtol=1e-10, atol=1e-12)
    for key, grad in one[2].items():
        torch.testing.assert_close(two[2][key], grad, rtol=1e-9, atol=1e-12, msg=key)


def test_several_batches_are_one() -> None:
    """Gradients of two batches with their shares are those of the batch with all of their rows, in each sequence."""
    parts = [rich_batch([3, 0, 2], seed=1), rich_batch([1, 4, 0], seed=2)]

    def joined(one: Any, two: Any) -> Any:
        def both(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.cat([a[name], b[name]]) for name in a}

        rows = [torch.arange(s.offsets.numel() - 1) if s.history_of is None else s.history_of for s in (one, two)]
        return {
            "history": both(one.history, two.history),
            "offsets": torch.cat([one.offsets, one.offsets[-1] + two.offsets[1:]]),
            "history_of": torch.cat([rows[0], one.offsets.numel() - 1 + rows[1]]),
            "negatives": None if one.negatives is None else both(one.negatives, two.negatives),
            "behaviours": both(one.behaviours, two.behaviours),
            "behaviour_dense": torch.cat([one.behaviour_dense, two.behaviour_dense]),
        }

    one, two = parts
    whole = Batch(
        **joined(one, two),
        target={name: torch.cat([one.target[name], two.target[name]]) for name in one.target},
        label=torch.cat([one.label, two.label]),
        users={"user": torch.cat([one.users["user"], two.users["user"]])},
        dense=torch.cat([one.dense, two.dense]),
        sequences={name: Sequence(**joined(one.sequences[name], two.sequences[name])) for name in one.sequences},
    )
    whole.check(RICH)
    found = []
    for batches in (parts, [whole]):
        model = model_of("dien", {"head.activation": "prelu", "embedding.l2": 0.1}, schema=RICH)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        result = training_step(model, batches, optimizer)
        grads = {key: p.grad.to_dense() for key, p in model.named_parameters() if p.grad is not None}
        found.append((result.total, result.auxiliary, grads))
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for key, grad in found[0][2].items():
        torch.testing.assert_close(found[1][2][key], grad, rtol=1e-9, atol=1e-12, msg=key)


def test_l2_counts_values_that_are_there() -> None:
    model = model_of("average", {"embedding.l2": 0.5}, schema=RICH)
    output = model(BATCH)
    p = dict(model.embeddings.named_parameters())
    exact = torch.zeros((), dtype=torch.float64)
    for steps in (BATCH, *BATCH.sequences.values()):
        for ids in (steps.history, getattr(steps, "target", {})):
            for name, values in ids.items():
                values = values[values != 0] if name == "tag" else values
                exact = exact + p[f"items.{name}.weight"][values.flatten()].square().sum()
        for name, values in steps.behaviours.items():
            exact = exact + p[f"behaviours.{name}.weight"][values].square().sum()
    exact = exact + p["users.user.weight"][BATCH.users["user"]].square().sum()
    torch.testing.assert_close(output.squares, exact, rtol=1e-12, atol=0)


def test_a_training_step_moves_every_table_and_learns() -> None:
    torch.manual_seed(0)
    model = model_of("dien", {"embedding.dropout": 0.1}, "authors", torch.float32, RICH)
    optimizer = make_optimizer(model, lr=1e-2)
    before = {key: p.detach().clone() for key, p in model.embeddings.named_parameters()}
    losses = [float(training_step(model, [BATCH], optimizer, clip_norm=5.0).click) for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    for key, parameter in model.embeddings.named_parameters():
        assert not torch.equal(parameter, before[key]), key


def test_a_batch_keeps_everything_when_it_moves() -> None:
    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict):
            return [t for each in value.values() for t in tensors(each)]
        if isinstance(value, (Batch, Sequence)):
            return [t for name, each in vars(value).items() if name != "_histories" for t in tensors(each)]
        return []

    assert len(tensors(BATCH)) == 35
    for other in (pickle.loads(pickle.dumps(BATCH)), copy.deepcopy(BATCH), BATCH.map(lambda t: t.clone())):
        for mine, theirs in zip(tensors(BATCH), tensors(other), strict=True):
            assert mine is not theirs
            torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=0, atol=0)
        assert other.sequences["buys"].rows_total == BATCH.sequences["buys"].rows_total
    assert BATCH.to("cpu") is BATCH
    assert all(t.device.type == "meta" for t in tensors(BATCH.to("meta")))
    moved = replace(BATCH, sequences={name: each.map(lambda t: t.to("meta")) for name, each in BATCH.sequences.items()})
    assert not moved._is_on(torch.device("cpu"))
    assert BATCH.sequences["buys"].histories is BATCH.sequences["buys"].histories


def test_histories_may_be_left_out() -> None:
    bare = without_history(BATCH)
    bare.check(RICH)
    logits = model_of("dien", {}, schema=RICH).eval()(bare).logits
    assert bool(logits.isfinite().all())


def test_starting_over_restores_statistics() -> None:
    from tests.models.test_reset import scramble, start_over, tensors

    def fresh(device: str = "cpu") -> Any:
        with torch.device(device):
            return build("dien", RICH, {"dense": {"scaling": {"age": "quantiles"}}}, statistics=STATISTICS)

    new, used, made = fresh(), fresh(), fresh("meta").to_empty(device="cpu")
    for model in (used, made):
        scramble(model)
        start_over(model, "modules")
    start_over(new, "modules")
    state = tensors(new)
    assert state["embeddings.dense.mean"].tolist() == [3.5]
    assert state["embeddings.dense.quantiles.age.bounds"].tolist() == [20, 40, 60]
    assert state["embeddings.behaviour_dense.std"].tolist() == pytest.approx([1.25, 0.75])
    assert {"embeddings.dense.mean", "embeddings.dense.log"} <= set(new.state_dict())
    for model in (used, made):
        for key, value in tensors(model).items():
            assert torch.equal(value, state[key]), key


@pytest.mark.slow
def test_compiled() -> None:
    model = model_of("dien", {"embedding.sparse": False}, schema=RICH)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for forward in (model, compiled):
        model.zero_grad()
        model.loss(forward(BATCH), BATCH.label).total.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-9, atol=1e-12, msg=key)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def checked(batch: Batch) -> Tensor:
        batch.check(RICH)
        return batch.offsets.diff()

    assert checked(BATCH).tolist() == [3, 0, 5, 1, 4]
    with pytest.raises(RuntimeError, match="has a value below 0 or above the last there is"):
        checked(replace(BATCH, behaviours=BATCH.behaviours | {"action": BATCH.behaviours["action"] + 9}))


def wrong_steps(name: str, value: Any) -> Batch:
    return replace(BATCH, sequences=BATCH.sequences | {"buys": replace(BATCH.sequences["buys"], **{name: value})})


BUYS = BATCH.sequences["buys"]
TAG = BATCH.history["tag"]
BAD: list[tuple[Batch, str]] = [
    (replace(BATCH, behaviours={}), r"behaviours must have the fields \['action', 'page'\], got \[\]"),
    (
        replace(BATCH, behaviours=BATCH.behaviours | {"page": BATCH.behaviours["page"] + 9}),
        r"behaviours\['page'\] must lie between 0 and 5, got values from",
    ),
    (replace(BATCH, behaviour_dense=None), r"behaviour_dense must have shape \(13, 2\), got None"),
    (replace(BATCH, behaviour_dense=torch.zeros(13, 2).int()), "behaviour_dense must have a floating dtype"),
    (
        replace(BATCH, history=BATCH.history | {"tag": TAG[:, 0]}),
        r"history\['tag'\] must be .* \(13, 3\), got .* \(13,\)",
    ),
    (replace(BATCH, sequences={}), r"sequences must have the names \['buys', 'saved'\], got \[\]"),
    (
        wrong_steps("history", BUYS.history | {"item": BUYS.history["item"] + 13}),
        r"sequences\['buys'\].history\['item'\] must lie between 0 and 12",
    ),
    (wrong_steps("behaviours", {}), r"sequences\['buys'\].behaviours must have the fields"),
    (wrong_steps("rows_total", 99), r"sequences\['buys'\].rows_total must be \d+, .* got 99"),
    (wrong_steps("offsets", torch.tensor([0, 2, 1, 3])), r"sequences\['buys'\].offsets must be ascending"),
    (wrong_steps("history_of", torch.zeros(3, dtype=torch.int64)), r"sequences\['buys'\].history_of must be of 7 rows"),
]


@pytest.mark.parametrize("batch, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_check_names_what_does_not_fit(batch: Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch.check(RICH)


def test_check_asks_for_sequences_as_such() -> None:
    with pytest.raises(TypeError, match=r"sequences\['buys'\] must be a Sequence, got Batch"):
        replace(BATCH, sequences={"buys": BATCH, "saved": BATCH}).check(RICH)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="sequences must be a mapping of names to Sequence, got list"):
        replace(BATCH, sequences=[BUYS]).check(RICH)  # type: ignore[arg-type]


BAD_FOR_MODELS: list[tuple[Batch, str]] = [
    (replace(BATCH, behaviours={}), r"batch.behaviours must have the fields \['action', 'page'\], got \[\]"),
    (replace(BATCH, behaviour_dense=None), r"batch.behaviour_dense must have shape \(13, 2\), got None"),
    (replace(BATCH, history=BATCH.history | {"tag": TAG[:, 0]}), r"batch.history\['tag'\] must have 2 dimensions"),
    (
        replace(BATCH, sequences={"buys": BUYS}),
        r"batch.sequences must have the names \['buys', 'saved'\], got \['buys'\]",
    ),
    (wrong_steps("behaviour_dense", None), r"batch.sequences\['buys'\].behaviour_dense must have shape"),
    (wrong_steps("history", {"item": BUYS.history["item"]}), r"batch.sequences\['buys'\].history must have the fields"),
    (wrong_steps("history_of", torch.zeros(3, dtype=torch.int64)), r"batch.sequences\['buys'\] must have the 7 rows"),
]


@pytest.mark.parametrize("batch, message", BAD_FOR_MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_models_name_what_does_not_fit(batch: Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of("dien", {}, schema=RICH)(batch)


def test_a_plain_model_takes_nothing_more() -> None:
    """A batch with more than a model reads is no batch of its schema."""
    plain = Schema(RICH.items, RICH.users, RICH.dense, RICH.several)
    model = build("dien", plain, {"embedding": {"size": 2}}).eval()
    bare = replace(BATCH, behaviours={}, behaviour_dense=None, sequences={})
    assert model(bare).logits.shape == (7,)
    for name in ("behaviours", "behaviour_dense", "sequences"):
        with pytest.raises(ValueError, match=f"batch.{name} must have"):
            model(replace(bare, **{name: getattr(BATCH, name)}))


def test_names_are_of_one_kind() -> None:
    with pytest.raises(ValueError, match=r"a name for an item field and a behaviour field, got \['item'\]"):
        build("din", Schema(items={"item": 3}, behaviours={"item": 3}))
    with pytest.raises(ValueError, match=r"embedding.size must name exactly the fields \['action', 'item'\]"):
        build("din", Schema(items={"item": 3}, behaviours={"action": 3}), {"embedding": {"size": {"item": 3}}})


def test_a_sequence_counts_its_steps() -> None:
    steps = rich_steps([2, 0, 3], [2, 2, 0], 0, 1)
    assert steps.rows_total == 8
    assert steps.histories.rows() == 3
