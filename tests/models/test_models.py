"""Models: shared histories, scoring, compilation, copies, stages, starting values, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dien_kernels.batch import Batch, Schema
from dien_kernels.models import MODELS, build, candidates
from tests.models.common import SCHEMA, SMALL_OF, model_of, nested, random_batch, unshared

pytestmark = pytest.mark.usefixtures("one_thread")

PRESETS = [None, "paper", "authors"]
EACH = pytest.mark.parametrize("name", MODELS)
EACH_PRESET = pytest.mark.parametrize("preset", PRESETS)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad.to_dense() if p.grad.is_sparse else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@EACH_PRESET
@EACH
def test_rows_of_shared_histories_are_rows_with_copies(name: str, preset: str | None) -> None:
    """Each history is read twice, as the auxiliary loss counts histories and not rows."""
    shared = random_batch([3, 0, 5, 1], [2, 0, 3, 1, 2, 1, 0, 3])
    one, two = model_of(name, {}, preset), model_of(name, {}, preset)
    outputs = []
    for model, batch in ((one, shared), (two, unshared(shared))):
        outputs.append(model(batch))
        model.loss(outputs[-1], batch.label).total.backward()
    for mine, other in zip(*outputs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    for key, gradient in gradients(two).items():
        torch.testing.assert_close(gradients(one)[key], gradient, rtol=1e-9, atol=1e-12)


@EACH_PRESET
@EACH
def test_score_is_the_forward_pass(name: str, preset: str | None) -> None:
    """Bit for bit that of training code in evaluation mode, and close to that of rows with copies."""
    model = model_of(name, {}, preset)
    for seed in range(2):
        model(random_batch([4, 2, 3], seed=seed))  # moves the moving averages
    batch = random_batch([3, 0, 5], [2, 0, 2, 1, 2])
    users = {"user": torch.tensor([4, 1, 6])}
    batch = replace(batch, users={"user": users["user"][batch.history_of]})
    scores = model.score(
        batch.history,
        batch.target,
        offsets=batch.offsets,
        history_of=batch.history_of,
        users=users,
        dense=batch.dense,
    )
    assert model.training
    model.eval()
    logits = model(replace(batch, negatives=None)).logits
    assert logits.requires_grad
    assert torch.equal(scores, logits.detach().sigmoid())
    torch.testing.assert_close(scores, model(unshared(batch)).logits.detach().sigmoid(), rtol=1e-10, atol=1e-12)


def test_candidates_of_one_history_run_its_extractor_once() -> None:
    model = model_of("dien", {})
    seen = []
    model.extractor.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    history = {"item": torch.tensor([1, 2, 3]), "cat": torch.tensor([0, 1, 2])}
    targets = {"item": torch.arange(6), "cat": torch.arange(6) % 5}
    dense = torch.zeros(6, 1, dtype=torch.float64)
    scores = model.score(history, targets, users={"user": torch.tensor([2])}, dense=dense)
    assert scores.shape == (6,)
    assert seen == [(3, 5)]
    assert bool(((scores > 0) & (scores < 1)).all())


def test_candidates() -> None:
    history, targets = {"item": torch.tensor([3, 1, 4])}, {"item": torch.tensor([7, 8])}
    one = candidates(history, targets, users={"user": torch.tensor([5])})
    assert one.history_of is not None
    assert one.history_of.tolist() == [0, 0]
    assert one.users["user"].tolist() == [5, 5]
    assert one.rows_total == 6
    own = candidates(history, targets, offsets=torch.tensor([0, 1, 3]))
    assert own.history_of is None
    assert own.rows_total == 3
    with pytest.raises(ValueError, match="history_of must be given for 2 targets of 3 histories"):
        candidates(history, targets, offsets=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="history_of must lie between 0 and U - 1 = 0"):
        candidates(history, targets, history_of=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"users\['user'\] must have an id for each of 1 histories"):
        candidates(history, targets, users={"user": torch.tensor([5, 5])})


def test_score_checks_ids() -> None:
    model = build("average", Schema(items={"item": 5}))
    with pytest.raises(ValueError, match=r"target\['item'\] must lie between 0 and 4"):
        model.score({"item": torch.tensor([1])}, {"item": torch.tensor([5])})
    assert model.training


@pytest.mark.slow
@pytest.mark.parametrize("name, preset", [("dien", "paper"), ("gru_attention", "authors")])
def test_compiled_forward(name: str, preset: str) -> None:
    model = model_of(name, {}, preset).eval()
    batch = random_batch([3, 0, 5], [2, 0, 1, 2])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch).logits, model(batch).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [True, False])
def test_compiled_training(sparse: bool) -> None:
    """By inductor: sparse tables are read outside of the graph, dense ones in it."""
    model = model_of("dien", {"embedding.sparse": sparse})
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=not sparse)
    for seed in (0, 1):
        batch = random_batch([3, 0, 5], [2, 0, 1, 2][: 3 + seed])
        found = []
        for forward in (model, compiled):
            model.zero_grad()
            model.loss(forward(batch), batch.label).total.backward()
            found.append(gradients(model))
            assert all(p.grad.is_sparse == sparse for p in model.embeddings.parameters() if p.grad is not None)
        for name, grad in found[0].items():
            torch.testing.assert_close(
                found[1][name], grad, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )
    if sparse:
        torch.compiler.reset()
        with pytest.raises(Exception, match=r"sparse=False"):
            torch.compile(model, fullgraph=True)(batch)


def request(given: str, behaviours: int = 3, rows: int = 2) -> dict[str, Any]:
    """Arguments of ``score``; "one history" without offsets, else two of them."""
    ids = torch.arange(behaviours) % 5, torch.arange(rows) % 5
    found: dict[str, Any] = {
        "history": {"item": ids[0] + 1, "cat": ids[0]},
        "targets": {"item": ids[1] + 8, "cat": 4 - ids[1]},
        "users": {"user": torch.tensor([5, 6][: 1 + (given != "one history")])},
        "dense": torch.zeros(rows, 1).double(),
    }
    if given != "one history":
        found["offsets"] = torch.tensor([0, 1, behaviours])
    if given == "history_of":
        found["history_of"] = torch.ones(rows, dtype=torch.int64)
    return found


TWO = torch.ones(2, dtype=torch.int64)
# What is wrong with a request of two targets of the second of two histories.
BAD_REQUESTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"history": {}}, ValueError, "history must have at least one field, got none"),
    ({"targets": {}}, ValueError, "targets must have at least one field, got none"),
    ({"history": [1, 2, 3]}, TypeError, "history must be a mapping of fields to tensors, got list"),
    ({"history": {"item": [1, 2, 3]}}, TypeError, r"history\['item'\] must be a torch.Tensor, got list"),
    ({"targets": {"item": 3, "cat": 1}}, TypeError, r"targets\['item'\] must be a torch.Tensor, got int"),
    ({"targets": {"item": TWO[0]}}, ValueError, r"targets\['item'\] must have at least one dimension, got a scalar"),
    ({"targets": {"item": TWO, "cat": TWO[0]}}, ValueError, r"target\['cat'\] must be torch.int64 of shape \(2,\)"),
    ({"targets": {"item": TWO, "cat": [1, 1]}}, TypeError, r"target\['cat'\] must be a torch.Tensor, got list"),
    ({"offsets": [0, 1, 3]}, TypeError, "offsets must be a torch.Tensor, got list"),
    ({"offsets": torch.tensor(3)}, ValueError, r"offsets must be torch.int64 of shape \[U \+ 1\], got .* \(\)"),
    (
        {"offsets": torch.tensor([0.0, 1.0, 3.0])},
        ValueError,
        r"offsets must be torch.int64 .* got torch.float32 \(3,\)",
    ),
    ({"offsets": TWO[:0]}, ValueError, r"offsets must ascend from 0 to the number of behaviours, got \[\]"),
    ({"history_of": [1, 1]}, TypeError, "history_of must be a torch.Tensor, got list"),
    ({"history_of": TWO.float()}, ValueError, r"history_of must be torch.int64 of shape \[B\], got torch.float32"),
    ({"history_of": TWO.bool()}, ValueError, r"history_of must be torch.int64 of shape \[B\], got torch.bool"),
    ({"history_of": TWO[0]}, ValueError, r"history_of must be torch.int64 of shape \[B\], got torch.int64 \(\)"),
    ({"history_of": 2 * TWO}, ValueError, "history_of must lie between 0 and U - 1 = 1, got values from 2 to 2"),
    ({"users": [5, 6]}, TypeError, "users must be a mapping of fields to tensors, got list"),
    ({"users": {"user": [5, 6]}}, TypeError, r"users\['user'\] must be a torch.Tensor, got list"),
    ({"dense": [[0.0], [0.0]]}, TypeError, "dense must be a torch.Tensor, got list"),
    ({"dense": torch.tensor(0.0)}, ValueError, r"dense must have shape \(2, 1\), got \(\)"),
]


@pytest.mark.parametrize("changes, error, message", BAD_REQUESTS, ids=lambda v: v if isinstance(v, str) else "")
def test_score_names_what_is_wrong(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = request("history_of")
    model = model_of("dien", {})
    assert model.score(**good).shape == (2,)
    with pytest.raises(error, match=message):
        model.score(**(good | changes))


def test_score_needs_a_history_for_one_target() -> None:
    """Without ``history_of``, where a history that is missing would be as many as the targets."""
    with pytest.raises(ValueError, match="history must have at least one field, got none"):
        model_of("dien", {}).score(**(request("one history", rows=1) | {"history": {}}))


@EACH
@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, 500, 5], [0, 3, 9]], ids=str)
def test_histories_that_are_not_the_behaviours_are_refused(offsets: list[int], name: str) -> None:
    """By the forward alone, without ``Batch.check``: it must not write where no tensor is."""
    batch = replace(random_batch([3, 2]), offsets=torch.tensor(offsets))
    with pytest.raises(ValueError, match="offsets"):
        model_of(name, {}).eval()(batch)


@EACH_PRESET
@EACH
def test_a_batch_without_rows_has_no_logits(name: str, preset: str | None) -> None:
    model, batch = model_of(name, {}, preset), random_batch([])
    for training in (True, False):
        output = model.train(training)(batch)
        assert output.logits.shape == (0,)
        assert output.auxiliary is None or float(output.auxiliary) == 0


@pytest.mark.slow
@pytest.mark.parametrize("given", ["one history", "offsets", "history_of"])
def test_compiled_score_checks_values(given: str) -> None:
    """What is wrong is said by the graph: one, but where the steps of the histories named must be counted."""
    model = model_of("dien", {}, None).eval()
    compiled = torch.compile(model.score, backend="aot_eager", fullgraph=given != "history_of")
    good = request(given)
    torch.testing.assert_close(compiled(**good), model.score(**good), rtol=1e-12, atol=1e-12)
    for name, field, wrong in (("targets", "item", 13), ("targets", "cat", -1), ("history", "cat", 5)):
        bad = good | {name: good[name] | {field: torch.full_like(good[name][field], wrong)}}
        attribute = rf"{name.removesuffix('s')}\['{field}'\]"
        words = rf"{attribute} must lie between 0 and {SCHEMA.items[field] - 1}, got values from {wrong} to {wrong}"
        with pytest.raises(ValueError, match=words):
            model.score(**bad)
        with pytest.raises(RuntimeError, match=rf"{attribute} has a value below 0 or above the last there is"):
            compiled(**bad)
    if given == "one history":
        return
    for wrong, words in (
        ([1, 1, 3], "start with 0, got 1"),
        ([0, 1, 2], "end with N = 3, .*got 2"),
        ([0, 4, 3], "be ascending, got 4 before 3"),
    ):
        bad = good | {"offsets": torch.tensor(wrong)}
        with pytest.raises(ValueError, match=f"offsets must {words}"):
            model.score(**bad)
        with pytest.raises((RuntimeError, ValueError), match="offsets must"):
            compiled(**bad)


@pytest.mark.slow
def test_compiled_score_is_one_graph_for_all_sizes() -> None:
    model = model_of("dien", {}, None).eval()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.score, backend=backend, fullgraph=True, dynamic=True)
    for behaviours, rows in ((3, 2), (7, 4), (11, 9), (40, 5)):
        given = request("one history", behaviours, rows)
        torch.testing.assert_close(compiled(**given), model.score(**given), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_score_survives_bad_ids() -> None:
    """Large enough for more than one thread: an exception must not leave a parallel region of inductor's code."""
    torch.set_num_threads(2)  # until one_thread, which every test of this file uses, puts back what was before it
    model = model_of("dien", {}, None).eval()
    compiled = torch.compile(model.score)
    good = request("one history", 5000, 9000)
    torch.testing.assert_close(compiled(**good), model.score(**good), rtol=1e-9, atol=1e-12)
    for name, field in (("targets", "item"), ("targets", "cat"), ("history", "item"), ("users", "user")):
        bad = good | {name: good[name] | {field: good[name][field].clone()}}
        bad[name][field][-1] = 10_000
        with pytest.raises((RuntimeError, IndexError)):
            compiled(**bad)


@EACH_PRESET
@EACH
def test_copies_and_state(name: str, preset: str | None) -> None:
    batch = random_batch([3, 0, 2])
    model = model_of(name, {}, preset)
    model(batch)
    model.eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = build(name, SCHEMA, nested(SMALL_OF[name]), preset).double().eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(batch).logits, model(batch).logits)


STAGES = {
    "dien": ["embedding", "extractor", "auxiliary", "attention", "evolution", "mlp"],
    "gru_attention": ["embedding", "extractor", "evolution", "attention", "mlp"],
    "din": ["embedding", "attention", "mlp"],
    "average": ["embedding", "mlp"],
    "gru": ["embedding", "extractor", "mlp"],
}


@EACH
def test_part_is_told_of_every_stage(name: str) -> None:
    seen = []

    @contextmanager
    def part(stage: str) -> Iterator[None]:
        seen.append(stage)
        yield
        seen.append(f"end of {stage}")

    model = model_of(name, {})
    plain = model(random_batch([3, 2])).logits
    model.part = part
    assert torch.equal(model(random_batch([3, 2])).logits, plain)
    assert seen == [word for stage in STAGES[name] for word in (stage, f"end of {stage}")]


def test_every_row_of_tables_that_was_not_read_has_no_gradient() -> None:
    model = model_of("dien", {})
    batch = random_batch([3, 2])
    model.loss(model(batch), batch.label).total.backward()
    gradient = model.embeddings.items["item"].weight.grad.coalesce()
    assert batch.negatives is not None
    read = torch.cat([batch.history["item"], batch.target["item"], batch.negatives["item"].flatten()])
    assert gradient.indices()[0].tolist() == read.unique().tolist()


def test_dense_tables_take_torch_adam() -> None:
    model = model_of("dien", {"embedding.sparse": False})
    batch = random_batch([3, 2])
    model.loss(model(batch), batch.label).total.backward()
    torch.optim.Adam(model.parameters()).step()


def test_starting_values_of_the_authors() -> None:
    """Gates start with bias 1, all other biases with 0, PReLU with 0.1, matrices within Glorot's bounds."""
    model = build("dien", SCHEMA, preset="authors")
    for layer, suffix in ((model.extractor, "_l0"), (model.evolution, "")):
        bias, weight = getattr(layer, f"bias_ih{suffix}"), getattr(layer, f"weight_ih{suffix}")
        assert bias.tolist() == [1.0] * 72 + [0.0] * 36
        gates, candidate = weight[:72].abs().max(), weight[72:].abs().max()
        assert 0.15 < gates <= (6 / (36 + 36 + 72)) ** 0.5 < 0.21 < candidate <= (6 / (36 + 36 + 36)) ** 0.5
    assert model.extractor.bias_hh_l0.abs().max() == 0
    assert not model.extractor.bias_hh_l0.requires_grad
    assert model.evolution.bias_hh is None
    assert bool((model.attention.query[1].weight == 0.1).all())
    assert all(bool((linear.bias == 0).all()) for linear in model.modules() if isinstance(linear, nn.Linear))
    table = model.embeddings.items["item"].weight
    assert 0.4 < float(table.detach().abs().max()) <= (6 / (13 + 18)) ** 0.5


@pytest.mark.parametrize(
    "options, r, u",
    [
        ({"evolution.form": "authors"}, 2.0, 2.0),
        ({}, 2.0, -2.0),
        ({"evolution.update": "keep"}, 2.0, 2.0),
        ({"evolution.bias": "tied"}, 1.0, -1.0),
        ({"evolution.kind": "agru"}, 2.0, 2.0),
    ],
    ids=str,
)
def test_gate_bias_is_seen_from_what_is_kept(options: dict[str, Any], r: float, u: float) -> None:
    evolution = build("dien", SCHEMA, nested({**options, "evolution.gate_bias": 2.0, "embedding.size": 2})).evolution
    assert evolution.bias_ih[:8].tolist() == [r] * 4 + [u] * 4
    if "evolution.bias" not in options:
        assert evolution.bias_hh[:8].abs().max() == 0


def test_fields_may_have_any_name() -> None:
    """Dots, and the names that nn.ModuleDict has itself, would otherwise be a KeyError of torch."""
    names = ("type", "items", "a.b", "a%2Eb", "%type", "float", "training", "")
    schema = Schema(items={"item": 5, **dict.fromkeys(names[:4], 3)}, users=dict.fromkeys(names[4:], 3))
    model = build("average", schema, {"embedding": {"size": 2}})

    def ids(fields: Any, rows: int) -> dict[str, Tensor]:
        return {name: torch.ones(rows, dtype=torch.int64) for name in fields}

    batch = Batch(ids(schema.items, 3), torch.tensor([0, 2, 3]), ids(schema.items, 2), users=ids(schema.users, 2))
    assert model(batch).logits.shape == (2,)
    assert len({id(table) for table in model.embeddings.modules() if isinstance(table, nn.Embedding)}) == 9
    build("average", schema, {"embedding": {"size": 2}}).load_state_dict(model.state_dict())


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="unknown model dein: did you mean din or dien"):
        build("dein", SCHEMA)
    with pytest.raises(ValueError, match="unknown preset author: did you mean authors"):
        build("dien", SCHEMA, preset="author")
    with pytest.raises(ValueError, match=r"a name for an item field and a user field, got \['id'\]"):
        build("din", Schema(items={"id": 3}, users={"id": 3}))


def bad_batches() -> Iterator[tuple[Batch, str]]:
    good = random_batch([3, 2])
    yield replace(good, history={"item": good.history["item"]}), "batch.history must have the fields"
    yield (
        replace(good, target={**good.target, "brand": good.target["cat"]}),
        "batch.target must have the fields",
    )
    yield replace(good, users={}), "batch.users must have the fields"
    yield replace(good, negatives={"item": good.history["item"]}), "batch.negatives must have the fields"
    yield replace(good, dense=None), "batch.dense must have 1 columns, got 0"
    yield replace(good, dense=torch.zeros(3, 1)), "batch.target must have as many rows"
    yield replace(good, offsets=torch.tensor([0, 5])), "batch.target must have as many rows"
    yield replace(good, negatives=None), "batch.negatives must be given to train the auxiliary loss"


@pytest.mark.parametrize("batch, message", list(bad_batches()), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_batches(batch: Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of("dien", {})(batch)


def test_bad_labels() -> None:
    model = model_of("average", {})
    output = model(random_batch([3, 2]))
    for label, got in ((None, "None"), (torch.zeros(3), r"\(3,\)")):
        with pytest.raises(ValueError, match=rf"label must have shape \[B\] = \(2,\), got {got}"):
            model.loss(output, label)


def test_evaluation_needs_no_negatives() -> None:
    model = model_of("dien", {}).eval()
    batch = random_batch([3, 2], negatives=0)
    output = model(batch)
    assert output.auxiliary is None
    losses = model.loss(output, batch.label)
    assert torch.equal(losses.total, losses.click)


def test_sixteen_bit_models_give_float32_logits() -> None:
    batch = random_batch([3, 0, 2])
    model = model_of("dien", {"attention.query": "prelu", "head.dice_statistics": "moving"}, "authors", torch.bfloat16)
    output = model(batch)
    assert output.logits.dtype == torch.float32
    model.loss(output, batch.label).total.backward()
    exact = copy.deepcopy(model).double()(batch)
    torch.testing.assert_close(output.logits.double(), exact.logits, rtol=0.05, atol=0.05)


def test_autocast() -> None:
    """Products run in 16 bits; state, losses and parameters stay float32."""
    batch = random_batch([3, 0, 2])
    for preset in ("paper", "authors"):
        model = model_of("dien", {}, preset, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch)
            losses = model.loss(output, batch.label)
        losses.total.backward()
        assert output.logits.dtype == losses.total.dtype == torch.float32
        torch.testing.assert_close(output.logits, model(batch).logits, rtol=0.1, atol=0.1)
        for key, gradient in gradients(model).items():
            assert gradient.dtype == torch.float32, key
            assert bool(gradient.isfinite().all()), key
