"""``Histories``: what it accepts, what follows from it, and that it travels through torch as a value."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dien_kernels import Histories, attention_scores, augru, auxiliary_loss, gru
from dien_kernels.batch import Batch
from dien_kernels.layers import AUGRU, GRU, BilinearAttention, DINAttention

LENGTHS = torch.tensor([3, 0, 5, 2])
OFFSETS = torch.tensor([0, 3, 3, 8, 10])
ROWS = torch.tensor([2, 0, 2, 1, 3])
MASK = torch.arange(5) < LENGTHS.unsqueeze(1)


def layouts() -> dict[str, tuple[dict[str, Any], Tensor]]:
    """Every layout of the same four histories, as keywords of ``of``, with data that has two features."""
    torch.manual_seed(0)
    values, padded = torch.randn(10, 2), torch.zeros(4, 5, 2)
    padded[MASK] = values
    return {
        "lengths": ({"lengths": LENGTHS}, padded),
        "mask": ({"mask": MASK}, padded),
        "offsets": ({"offsets": OFFSETS}, values),
    }


@pytest.mark.parametrize("name", layouts())
def test_what_follows_is_the_same_for_every_layout(name: str) -> None:
    keywords, data = layouts()[name]
    own, shared = Histories.of(**keywords), Histories.of(**keywords, history_of=ROWS)
    assert (own.count(data), own.rows(data), shared.count(data), shared.rows(data)) == (4, 4, 4, 5)
    assert own.history_lengths().tolist() == own.row_lengths().tolist() == [3, 0, 5, 2]
    assert shared.row_lengths().tolist() == [5, 3, 5, 0, 2]
    assert own.order().tolist() == [2, 0, 3, 1]
    assert shared.order().tolist() == [0, 2, 1, 4, 3]
    assert shared.each_once().row_lengths().tolist() == [3, 0, 5, 2]
    rows, first = shared.rows_of_history(4)
    assert [rows[first[u] : first[u + 1]].tolist() for u in range(4)] == [[1], [3], [0, 2], [4]]
    assert own.steps(data) == (0 if name == "offsets" else 5)


def test_full_histories_ask_the_data() -> None:
    data = torch.zeros(4, 5, 2)
    full = Histories()
    assert (full.count(data), full.rows(data), full.steps(data)) == (4, 4, 5)
    assert (full.count(data, True), full.steps(data, True)) == (5, 4)
    assert full.row_lengths() is None
    assert full.order() is None
    with pytest.raises(ValueError, match="data must be given where every history is full"):
        full.count()


def test_steps_of_jagged_rows() -> None:
    own, shared = Histories.of(offsets=OFFSETS), Histories.of(offsets=OFFSETS, history_of=ROWS)
    assert own.row_of_step(10).tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 3, 3]
    assert own.source_of_step(10, 10) is None
    assert shared.rows_total == 15
    assert shared.row_of_step(15).tolist() == [0] * 5 + [1] * 3 + [2] * 5 + [4] * 2
    assert shared.source_of_step(15, 10).tolist() == [3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert shared.row_starts(15).tolist() == [0, 5, 8, 13, 13]


def test_two_recurrences_on_one_batch_sort_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is computed by the first of them and read by the second, and by both backward passes."""
    sorts = []
    original = Tensor.argsort

    def counted(self: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        sorts.append(self.shape)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(Tensor, "argsort", counted)
    histories = Histories.of(offsets=OFFSETS, history_of=ROWS)
    first = histories.order()
    assert histories.order() is first
    assert len(sorts) == 1
    assert histories.each_once().order() is histories.each_once().order()
    assert len(sorts) == 2  # the histories themselves are other rows


def other(**keywords: Any) -> Any:
    return lambda: Histories.of(**keywords)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "two layouts": (
        other(lengths=LENGTHS, offsets=OFFSETS),
        ValueError,
        "at most one of lengths, offsets and mask may be given, got lengths and offsets",
    ),
    "list": (other(lengths=[1, 2]), TypeError, r"lengths must be a torch.Tensor, got list"),
    "float": (other(offsets=OFFSETS.float()), TypeError, "offsets must have dtype int64 or int32, got torch.float32"),
    "rank": (other(lengths=LENGTHS.view(2, 2)), ValueError, r"lengths must have shape \[U\], got \(2, 2\)"),
    "no offset": (other(offsets=OFFSETS[:0]), ValueError, r"offsets must have shape \[U \+ 1\] with at least one"),
    "negative length": (other(lengths=-LENGTHS), ValueError, "lengths must be at least 0, got values from -5 to 0"),
    "offsets start": (other(offsets=OFFSETS + 1), ValueError, "offsets must start with 0, got 1"),
    "offsets fall": (other(offsets=OFFSETS.flip(0) - 10), ValueError, "offsets must"),
    "offsets descend": (
        other(offsets=torch.tensor([0, 3, 2])),
        ValueError,
        "offsets must be ascending, got 3 before 2",
    ),
    "history above": (
        other(lengths=LENGTHS, history_of=ROWS + 1),
        ValueError,
        "history_of must lie between 0 and U - 1 = 3, got values from 1 to 4",
    ),
    "history below": (other(history_of=ROWS - 1), ValueError, "history_of must be at least 0, got values from -1 to 2"),
    "history float": (other(history_of=ROWS.float()), TypeError, "history_of must have dtype int64 or int32"),
    "mask dtype": (other(mask=MASK.long()), TypeError, "mask must have dtype bool, got torch.int64"),
    "mask rank": (other(mask=MASK[0]), ValueError, r"mask must have shape \[B, T\], got \(5,\)"),
    "wrong total": (
        other(offsets=OFFSETS, history_of=ROWS, rows_total=14),
        ValueError,
        "rows_total must be 15, the steps of the histories named, got 14",
    ),
    "total without offsets": (
        other(lengths=LENGTHS, rows_total=3),
        ValueError,
        "rows_total must be None unless offsets and history are given, got 3",
    ),
    "total of a bool": (
        other(offsets=OFFSETS, history_of=ROWS, rows_total=True),
        TypeError,
        "rows_total must be an int, got bool",
    ),
    "devices": (
        other(lengths=LENGTHS, history_of=ROWS.to("meta")),
        ValueError,
        "history_of must be on the device of lengths, cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


MISFITS: dict[str, tuple[Histories, tuple[int, ...], str]] = {
    "another U": (Histories.of(lengths=LENGTHS), (3, 5, 2), r"lengths must have shape \[U\] = \(3,\), got \(4,\)"),
    "another mask": (Histories.of(mask=MASK), (4, 6, 2), r"mask must have shape \[B, T\] = \(4, 6\), got \(4, 5\)"),
    "padded data": (Histories.of(offsets=OFFSETS), (4, 5, 2), r"x must be \[N, features\] with offsets"),
    "jagged data": (Histories.of(lengths=LENGTHS), (10, 2), r"x must be \[B, T, features\], or \[N, features\]"),
    "another N": (Histories.of(offsets=OFFSETS), (11, 2), "offsets must end with N = 11"),
    "too long": (Histories.of(lengths=LENGTHS), (4, 4, 2), "lengths must lie between 0 and T = 4"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_data_that_does_not_fit_is_refused(name: str) -> None:
    histories, shape, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        gru(torch.zeros(shape), torch.zeros(9, 2), torch.zeros(9, 3), histories=histories)


def test_ops_refuse_two_words_for_one_layout() -> None:
    x, w_ih, w_hh = torch.zeros(4, 5, 2), torch.zeros(9, 2), torch.zeros(9, 3)
    with pytest.raises(ValueError, match="lengths must be None where histories is given, got a Tensor"):
        gru(x, w_ih, w_hh, lengths=LENGTHS, histories=Histories.of(lengths=LENGTHS))
    with pytest.raises(TypeError, match="histories must be a dien_kernels.Histories, got Tensor"):
        gru(x, w_ih, w_hh, histories=LENGTHS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="histories must not have history_of"):
        gru(x, w_ih, w_hh, histories=Histories.of(lengths=LENGTHS, history_of=ROWS))
    with pytest.raises(ValueError, match="histories must not have history_of"):
        auxiliary_loss(x, x, x, histories=Histories.of(lengths=LENGTHS, history_of=ROWS))


@pytest.mark.parametrize("name", layouts())
def test_the_value_and_its_sugar_give_the_same(name: str) -> None:
    keywords, x = layouts()[name]
    torch.manual_seed(1)
    layer, evolution = GRU(2, 3, batch_first=True), AUGRU(3, 3)
    units = (BilinearAttention(3, 3), DINAttention(3), DINAttention(3, activation="dice").eval())
    target = torch.randn(5, 3)
    once, histories = Histories.of(**keywords), Histories.of(**keywords, history_of=ROWS)
    states, _ = layer(x, histories=once)
    assert torch.equal(states, layer(x, **keywords)[0])
    total = histories.rows_total if histories.jagged else None
    for unit in units:
        scores = unit(target, states, histories=histories)
        assert torch.equal(scores, unit(target, states, **keywords, history=ROWS, rows_total=total))
    y, last = evolution(states, scores, histories=histories)
    expected = evolution(states, scores, **keywords, history=ROWS)
    assert torch.equal(y, expected[0])
    assert torch.equal(last, expected[1])
    loss = auxiliary_loss(states, states, states.flip(-1), histories=once)
    assert torch.equal(loss, auxiliary_loss(states, states, states.flip(-1), **keywords))


@pytest.mark.parametrize("name", layouts())
def test_pickle_and_devices(name: str) -> None:
    keywords, _ = layouts()[name]
    histories = Histories.of(**keywords, history_of=ROWS)
    histories.order()  # what was computed before is not pickled and is computed again
    for other in (pickle.loads(pickle.dumps(histories)), histories.to("cpu"), histories.map(Tensor.clone)):
        assert repr(other) == repr(histories)
        assert other.rows_total == histories.rows_total
        assert other.order().tolist() == histories.order().tolist()
    meta = histories.to("meta")
    assert meta.device() == torch.device("meta")
    assert meta.row_lengths().device == torch.device("meta")


def scored(layer: AUGRU, attention: BilinearAttention, target: Tensor, x: Tensor, histories: Histories) -> Tensor:
    scores = attention(target, x, histories=histories)
    return layer(x, scores, histories=histories)[1]


def jagged(lengths: list[int], rows: list[int]) -> tuple[Tensor, Tensor, Histories]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    histories = Histories.of(offsets=offsets, history_of=torch.tensor(rows))
    return torch.randn(len(rows), 3), torch.randn(sum(lengths), 3), histories


def test_compiles_to_one_graph_for_all_sizes() -> None:
    torch.manual_seed(0)
    layer, attention, graphs = AUGRU(3, 4), BilinearAttention(3, 3), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(scored, backend=backend, fullgraph=True, dynamic=True)
    # Sizes that differ from one another, or a graph would take them for equal.
    cases = [jagged([3, 0, 5, 2], [2, 0, 2, 1, 3, 3, 0]), jagged([4, 7, 0], [1, 1, 2, 0, 0, 1, 2, 2])]
    cases[1][2].order()  # one that has been used before makes no other graph
    for target, x, histories in cases:
        expected = scored(layer, attention, target, x, histories)
        assert torch.equal(compiled(layer, attention, target, x, histories), expected)
    assert len(graphs) == 1


class Scored(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.attention = AUGRU(3, 4), BilinearAttention(3, 3)

    def forward(self, target: Tensor, x: Tensor, histories: Histories) -> Tensor:
        return scored(self.layer, self.attention, target, x, histories)


def test_exports_with_all_sizes_dynamic() -> None:
    torch.manual_seed(0)
    model, auto = Scored().eval(), torch.export.Dim.AUTO
    example = jagged([3, 0, 5, 2], [2, 0, 2, 1, 3])
    shapes = {"target": {0: auto}, "x": {0: auto}, "histories": [None, {0: auto}, {0: auto}, None, auto]}
    with torch.no_grad():
        exported = torch.export.export(model, example, dynamic_shapes=shapes).module()
        for case in (example, jagged([4, 6, 0], [1, 1, 2, 0, 0, 1, 2])):
            assert torch.equal(exported(*case), model(*case))


class Jagged:
    """What TorchRec's ``JaggedTensor`` offers, without TorchRec."""

    def __init__(self, values: Tensor, offsets: Tensor) -> None:
        self._values, self._offsets = values, offsets

    def values(self) -> Tensor:
        return self._values

    def offsets(self) -> Tensor:
        return self._offsets


def test_jagged_tensors_come_and_go_without_a_copy() -> None:
    values = torch.randn(10, 3)
    for given in (Jagged(values, OFFSETS), torch.nested.nested_tensor_from_jagged(values, OFFSETS)):
        found, histories = Histories.from_jagged(given)
        assert found.data_ptr() == values.data_ptr()
        assert histories.offsets.data_ptr() == OFFSETS.data_ptr()
        back = torch.nested.nested_tensor_from_jagged(found, histories.offsets)
        assert back.values().data_ptr() == values.data_ptr()
    _, narrow = Histories.from_jagged(Jagged(values, OFFSETS.int()))
    assert torch.equal(narrow.offsets, OFFSETS)
    for wrong, message in ((values, "jagged must be a jagged tensor"), (3, r"methods values\(\) and offsets\(\)")):
        with pytest.raises(TypeError, match=message):
            Histories.from_jagged(wrong)
    with pytest.raises(ValueError, match="offsets must end with N = 9"):
        Histories.from_jagged(Jagged(values[:9], OFFSETS))


def test_what_inference_mode_has_computed_serves_a_later_training() -> None:
    """Tensors that are made in inference mode cannot be saved for a backward: none of them may be kept."""
    histories = Histories.of(offsets=OFFSETS, history_of=ROWS)
    values = torch.randn(10, 2, requires_grad=True)
    with torch.inference_mode():
        source, row = histories.source_of_step(15, 10), histories.row_of_step(15)
        assert histories.order().tolist() == [0, 2, 1, 4, 3]
    assert not source.is_inference()
    sums = torch.zeros(5, 2).index_add(0, row, values[histories.source_of_step(15, 10)].square())
    sums.sum().backward()
    assert values.grad.shape == (10, 2)
    with torch.inference_mode():  # a value of inference mode's own tensors stays there
        own = Histories.of(offsets=OFFSETS.clone(), history_of=ROWS.clone())
        assert own.row_of_step(15).tolist() == row.tolist()


def test_a_batch_makes_its_layout_once_and_anew_where_it_changes() -> None:
    ids = {"item": torch.zeros(10, dtype=torch.int64)}
    batch = Batch(ids, OFFSETS, {"item": ROWS}, history_of=ROWS)
    assert batch.histories is batch.histories
    assert batch.histories.rows_total == batch.rows_total == 15
    first = batch.histories
    batch.history_of, batch.rows_total = ROWS.flip(0), -1
    assert batch.histories is not first
    assert batch.histories.history_of is batch.history_of
    assert replace(batch, label=None)._histories is None


def test_values_are_not_read_on_other_devices() -> None:
    """Wild values on a device that nobody waits for: whatever follows from them stays inside of the data."""
    wild = Histories(offsets=torch.tensor([0, 7, 3, 99]), history_of=torch.tensor([9, -4, 1]))
    assert wild.index(3).tolist() == [2, 0, 1]
    meta = Histories.of(offsets=OFFSETS.to("meta"), history_of=ROWS.to("meta"))
    assert meta.rows_total == -1
    with pytest.raises(ValueError, match="rows_total must be given with offsets and history"):
        attention_scores(torch.empty(5, 2, device="meta"), torch.empty(10, 2, device="meta"), histories=meta)


def narrow(values: list[int]) -> Tensor:
    """int32 in the middle of a larger tensor, whose neighbours a kernel of int64 would read."""
    whole = torch.full((4 * len(values),), 7, dtype=torch.int32)
    part = whole[: len(values)]
    part.copy_(torch.tensor(values))
    return part


UNCHECKED: dict[str, tuple[Histories, type[Exception], str]] = {
    "int32 lengths": (
        Histories(narrow([3, 0, 5, 2])),
        TypeError,
        "histories.lengths must have dtype int64, got .*int32",
    ),
    "int32 rows": (
        Histories(LENGTHS, None, narrow([2, 0, 2, 1, 3])),
        TypeError,
        "histories.history_of must have dtype",
    ),
    "float": (Histories(LENGTHS.float()), TypeError, "lengths must have dtype int64 or int32, got torch.float32"),
    "rank": (Histories(LENGTHS.view(2, 2)), ValueError, r"lengths must have shape \[U\], got \(2, 2\)"),
    "two layouts": (Histories(LENGTHS, mask=MASK), ValueError, "at most one of lengths, offsets and mask"),
    "mask of int": (Histories(mask=MASK.long()), TypeError, "mask must have dtype bool"),
    "list": (Histories([3, 0, 5, 2]), TypeError, "lengths must be a torch.Tensor, got list"),  # type: ignore[arg-type]
    "total": (Histories(LENGTHS, rows_total=-3), ValueError, "rows_total must be at least 0, or -1"),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", UNCHECKED)
def test_what_the_bare_constructor_was_given_is_checked_by_the_ops(name: str, backend: Any) -> None:
    """The kernels read int64: another dtype would be other numbers, and memory behind the tensor."""
    histories, error, message = UNCHECKED[name]
    x = torch.zeros(4, 5, 2)
    with pytest.raises(error, match=message):
        augru(x, torch.zeros(5, 5), torch.zeros(9, 2), torch.zeros(9, 3), histories=histories, backend=backend)


@pytest.mark.native
def test_the_library_itself_refuses_other_index_tensors() -> None:
    """Whatever Python has checked: a raw op that reads int32 as int64 would read foreign memory."""
    x, w_ih, w_hh = torch.zeros(4, 5, 2), torch.zeros(9, 2), torch.zeros(9, 3)
    for wrong in (narrow([3, 0, 5, 2]), LENGTHS.view(4, 1)):
        with pytest.raises(ValueError, match="index tensors must have dtype int64 and one dimension"):
            torch.ops.dien_kernels._recurrence_cpu_fwd(
                x, None, w_ih, w_hh, None, None, None, wrong, *[None] * 3, 0, 0, 1, 0, *[False] * 5, 0
            )


def test_a_batch_widens_int32() -> None:
    ids = {"item": torch.zeros(10, dtype=torch.int64)}
    batch = Batch(ids, narrow(OFFSETS.tolist()), {"item": ROWS}, history_of=narrow(ROWS.tolist()), rows_total=15)
    assert batch.histories is batch.histories
    assert torch.equal(batch.histories.offsets, OFFSETS)
    assert torch.equal(batch.histories.history_of, ROWS)


def test_jagged_tensors_that_are_not_one_row_behind_another_are_refused() -> None:
    holes = torch.nested.nested_tensor_from_jagged(torch.randn(6, 2), torch.tensor([0, 3, 6]), torch.tensor([2, 3]))
    with pytest.raises(TypeError, match="jagged must be without holes"):
        Histories.from_jagged(holes)

    class Keyed(Jagged):
        def keys(self) -> list[str]:
            return ["item", "category"]

    with pytest.raises(TypeError, match="jagged must be a jagged tensor of one feature, got a Keyed with keys"):
        Histories.from_jagged(Keyed(torch.randn(10, 2), OFFSETS))


def test_tensors_of_a_tracer_are_not_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    histories = Histories.of(mask=MASK)
    with FakeTensorMode(allow_non_fake_inputs=True):
        histories.mask_index()
    assert not isinstance(histories.mask_index().slot, FakeTensor)


def test_calls_without_keywords_share_a_value_that_stays_as_it_was() -> None:
    """Ops of several sizes, with gradients and in inference mode, and a graph: none of them leaves anything in it."""
    shared = Histories.given(torch.randn(2, 3, 4), "x")
    compiled = torch.compile(lambda x, w, v: gru(x, w, v)[0], backend="eager", fullgraph=True)
    for rows, steps in ((2, 3), (5, 1), (0, 4), (1, 0)):
        x, w, v = torch.randn(rows, steps, 4, requires_grad=True), torch.randn(9, 4), torch.randn(9, 3)
        gru(x, w, v)[0].sum().backward()
        compiled(x, w, v)
        with torch.inference_mode():
            gru(x.detach(), w, v)
        assert Histories.given(x, "x") is shared
        shared.order()
        assert (shared.full, shared.history_of, shared.rows_total, shared._kept) == (True, None, -1, {})


def test_the_layout_is_named_before_the_history_where_both_are_wrong() -> None:
    wrong = torch.rand(2)
    with pytest.raises(TypeError, match="lengths must have dtype int64 or int32"):
        Histories.given(torch.randn(2, 3, 4), "x", lengths=wrong, history=wrong)
