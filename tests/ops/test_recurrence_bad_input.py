"""Bad input raises before any kernel runs, eagerly and compiled: the argument, what came, what is allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dien_kernels import agru, aigru, augru, gru
from tests.cases import running_on, target_params

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = target_params(("reference", "torch", "cpu"))
# Three histories of four steps with two features, state of five; six rows where a history is shared.
U, T, I, H = 3, 4, 2, 5  # noqa: E741


def arguments(**changes: object) -> dict[str, object]:
    """Good arguments of augru with ``changes``; a change to ... takes the argument away."""
    torch.manual_seed(0)
    good: dict[str, object] = {
        "x": torch.randn(U, T, I),
        "attention": torch.rand(U, T),
        "w_ih": torch.randn(3 * H, I),
        "w_hh": torch.randn(3 * H, H),
        "b_ih": torch.randn(3 * H),
        "b_hh": torch.randn(3 * H),
        "h0": torch.randn(U, H),
    }
    return {name: value for name, value in (good | changes).items() if value is not ...}


def jagged(**changes: object) -> dict[str, object]:
    """The same as five steps in jagged form."""
    base = {"x": torch.randn(5, I), "attention": torch.rand(5), "offsets": torch.tensor([0, 2, 2, 5])}
    return arguments(**(base | changes))


def index(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# Values of index tensors: read inside the op, so they must be caught in compiled graphs as well.
VALUES = {
    "length negative": (
        arguments(lengths=index(1, -1, 4)),
        r"lengths must lie between 0 and T = 4, .*-1 to 4",
    ),
    "length above T": (arguments(lengths=index(1, 5, 4)), r"lengths must lie between 0 and T = 4, .*1 to 5"),
    "int32 length above T": (
        arguments(lengths=index(1, 5, 4, dtype=torch.int32)),
        r"lengths must lie between 0 and T = 4",
    ),
    "huge length": (arguments(lengths=index(1, 2**62, 4)), r"lengths must lie between 0 and T = 4"),
    "offsets do not start at 0": (jagged(offsets=index(1, 2, 2, 5)), r"offsets must start with 0, got 1"),
    "offsets not ascending": (jagged(offsets=index(0, 3, 2, 5)), r"offsets must be ascending, got"),
    "offsets end early": (jagged(offsets=index(0, 2, 2, 4)), r"offsets must end with N = 5, .*got 4"),
    "offsets end late": (jagged(offsets=index(0, 2, 2, 9)), r"offsets must end with N = 5, .*got 9"),
    "history negative": (
        arguments(history=index(0, -1, 2)),
        r"history must lie between 0 and U - 1 = 2, .*-1 to 2",
    ),
    "history above U": (
        arguments(history=index(0, 3, 2)),
        r"history must lie between 0 and U - 1 = 2, .*0 to 3",
    ),
    "history above U with lengths": (
        arguments(history=index(0, 3, 2), lengths=index(1, 2, 3)),
        r"history must lie between 0 and U - 1 = 2",
    ),
    "history above U with a mask": (
        arguments(history=index(0, 3, 2), mask=torch.ones(U, T, dtype=torch.bool)),
        r"history must lie between 0 and U - 1 = 2",
    ),
    "history negative with a mask": (
        arguments(history=index(0, -1, 2), mask=torch.ones(U, T, dtype=torch.bool)),
        r"history must lie between 0 and U - 1 = 2",
    ),
    "jagged history above U": (jagged(history=index(0, 3, 2)), r"history must lie between 0 and U - 1 = 2"),
    "jagged attention of another total": (
        jagged(history=index(2, 2, 0)),
        r"attention must have .* 8 steps .*got 5",
    ),
}

# Everything else is known from the arguments alone.
SHAPES = {
    "x of rank 2": (ValueError, arguments(x=torch.randn(U, I)), r"x must be \[B, T, features\].*\(3, 2\)"),
    "x of rank 4": (ValueError, arguments(x=torch.randn(1, U, T, I)), r"x must be \[B, T, features\]"),
    "jagged x of rank 3": (
        ValueError,
        jagged(x=torch.randn(1, 5, I)),
        r"x must be \[N, features\] .*offsets",
    ),
    "x without features": (
        ValueError,
        arguments(x=torch.randn(U, T, 0), w_ih=torch.randn(3 * H, 0)),
        r"x must have at least one feature",
    ),
    "x not a tensor": (TypeError, arguments(x=[[1.0]]), r"x must be a torch.Tensor, got list"),
    "x of int64": (
        TypeError,
        arguments(x=torch.ones(U, T, I, dtype=torch.int64)),
        r"x must have dtype .*int64",
    ),
    "attention too short": (
        ValueError,
        arguments(attention=torch.rand(U, T - 1)),
        r"attention must have shape .*\(3, 4\), got \(3, 3\)",
    ),
    "attention of the histories": (
        ValueError,
        arguments(history=index(0, 0, 1, 2), h0=...),
        r"attention must have shape .*\(4, 4\), got \(3, 4\)",
    ),
    "x sparse": (TypeError, arguments(x=torch.ones(U, T, I).to_sparse()), r"x must be a dense .*sparse_coo"),
    "w_hh sparse": (TypeError, arguments(w_hh=torch.ones(3 * H, H).to_sparse()), r"w_hh must be a dense .*sparse"),
    "history of no history, with a mask": (
        ValueError,
        arguments(
            x=torch.randn(0, T, I), attention=torch.rand(2, T), h0=..., history=index(0, 0), mask=torch.ones(0, T) > 0
        ),
        r"history must be empty where x has no history",
    ),
    "history of no history, padded": (
        ValueError,
        arguments(x=torch.randn(0, T, I), attention=torch.rand(2, T), h0=..., history=index(0, 0)),
        r"history must be empty where x has no history \(U = 0\), got 2 rows",
    ),
    "history of no history, jagged": (
        ValueError,
        jagged(attention=torch.rand(0), h0=..., offsets=index(0), history=index(0, 0)),
        r"history must be empty where x has no history \(U = 0\), got 2 rows",
    ),
    "option of another type": (ValueError, arguments(padded=[1]), r"padded must be one of"),
    "attention with a feature": (
        ValueError,
        arguments(attention=torch.rand(U, T, 1)),
        r"attention must have shape",
    ),
    "jagged attention too short": (ValueError, jagged(attention=torch.rand(4)), r"attention must have shape"),
    "jagged attention of rank 2": (
        ValueError,
        jagged(attention=torch.rand(3, 4)),
        r"attention must have one dimension",
    ),
    "attention of int64": (
        TypeError,
        arguments(attention=torch.ones(U, T, dtype=torch.int64)),
        r"attention must have dtype .*got torch.int64",
    ),
    "attention of float64": (
        TypeError,
        arguments(attention=torch.ones(U, T, dtype=torch.float64)),
        r"attention must have dtype .*got torch.float64",
    ),
    "attention missing": (
        TypeError,
        arguments(attention=None),
        r"attention must be a torch.Tensor, got NoneType",
    ),
    "w_ih of another size": (
        ValueError,
        arguments(w_ih=torch.randn(3 * H, I + 1)),
        r"w_ih must have shape .*\(15, 2\), got \(15, 3\)",
    ),
    "w_ih of other rows": (
        ValueError,
        arguments(w_ih=torch.randn(3, I)),
        r"w_ih must have shape .*\(15, 2\)",
    ),
    "w_hh not three squares": (
        ValueError,
        arguments(w_hh=torch.randn(3 * H + 1, H)),
        r"w_hh must have shape \[3 \* H, H\].*\(16, 5\)",
    ),
    "w_hh empty": (ValueError, arguments(w_hh=torch.randn(0, 0)), r"w_hh must have shape .*H >= 1"),
    "w_ih of another dtype": (
        TypeError,
        arguments(w_ih=torch.randn(3 * H, I, dtype=torch.float64)),
        r"w_ih must have the dtype of x, torch.float32, got torch.float64",
    ),
    "w_hh of another dtype": (
        TypeError,
        arguments(w_hh=torch.randn(3 * H, H).bfloat16()),
        r"w_hh must have the dtype of x, torch.float32, got torch.bfloat16",
    ),
    "w_ih missing": (TypeError, arguments(w_ih=None), r"w_ih must be a torch.Tensor, got NoneType"),
    "b_ih too long": (
        ValueError,
        arguments(b_ih=torch.randn(16)),
        r"b_ih must have shape .*\(15,\), got \(16,\)",
    ),
    "b_hh of rank 2": (ValueError, arguments(b_hh=torch.randn(1, 15)), r"b_hh must have shape .*\(15,\)"),
    "b_hh of int64": (TypeError, arguments(b_hh=torch.ones(15, dtype=torch.int64)), r"b_hh must have dtype"),
    "h0 of other rows": (ValueError, arguments(h0=torch.randn(U + 1, H)), r"h0 must have shape .*\(3, 5\)"),
    "h0 with a layer": (ValueError, arguments(h0=torch.randn(1, U, H)), r"h0 must have shape .*\(3, 5\)"),
    "h0 of the histories": (
        ValueError,
        arguments(history=index(0, 0), attention=torch.rand(2, T)),
        r"h0 must have shape .*\(2, 5\), got \(3, 5\)",
    ),
    "lengths of another size": (
        ValueError,
        arguments(lengths=index(1, 2)),
        r"lengths must have shape .*got \(2,\)",
    ),
    "lengths of float": (
        TypeError,
        arguments(lengths=torch.ones(U)),
        r"lengths must have dtype int64 or int32",
    ),
    "lengths a list": (TypeError, arguments(lengths=[1, 2, 3]), r"lengths must be a torch.Tensor, got list"),
    "offsets of rank 2": (ValueError, jagged(offsets=index(0, 5).view(1, 2)), r"offsets must have shape"),
    "offsets empty": (ValueError, jagged(offsets=index()), r"offsets must have shape .*at least one"),
    "offsets with a padded x": (
        ValueError,
        arguments(offsets=index(0, 1, 2, 3)),
        r"x must be \[N, features\]",
    ),
    "mask of int64": (TypeError, arguments(mask=index(1)), r"mask must have dtype bool, got torch.int64"),
    "mask of another shape": (
        ValueError,
        arguments(mask=torch.ones(U, T + 1, dtype=torch.bool)),
        r"mask must have shape .*\(3, 4\), got \(3, 5\)",
    ),
    "history of rank 2": (
        ValueError,
        arguments(history=index(0).view(1, 1)),
        r"history must have shape \[B\]",
    ),
    "history of float": (
        TypeError,
        arguments(history=torch.zeros(U)),
        r"history must have dtype int64 or int32",
    ),
    "lengths and mask": (
        ValueError,
        arguments(lengths=index(1, 2, 3), mask=torch.ones(U, T, dtype=torch.bool)),
        r"at most one of lengths, offsets and mask may be given, got lengths and mask",
    ),
    "lengths and offsets": (
        ValueError,
        jagged(lengths=index(1, 2, 3)),
        r"at most one of .*lengths and offsets",
    ),
    "unknown form": (ValueError, arguments(form="din"), r"form must be one of .*paper.*authors.*got 'din'"),
    "unknown reset": (ValueError, arguments(reset="never"), r"reset must be one of .*got 'never'"),
    "unknown update": (ValueError, arguments(update="new"), r"update must be one of .*got 'new'"),
    "unknown padded": (ValueError, arguments(padded="nan"), r"padded must be one of .*got 'nan'"),
    "unknown backend": (ValueError, arguments(backend="tpu"), r"backend must be one of .*got 'tpu'"),
    "absent backend": (RuntimeError, arguments(backend="triton"), r"recurrence: backend 'triton' refuses"),
}
SHAPES |= {
    f"{name} on another device": (
        ValueError,
        arguments(**{name: value.to("meta")}),
        rf"{name} must be on the device of x, cpu, got meta",
    )
    for name, value in (
        *((n, v) for n, v in arguments().items() if n != "x" and isinstance(v, Tensor)),
        ("lengths", index(1, 2, 3)),
        ("history", index(0, 1, 2)),
        ("mask", torch.ones(U, T, dtype=torch.bool)),
    )
}


@pytest.fixture(params=["eager", "compiled"])
def run(request: pytest.FixtureRequest) -> Callable[..., object]:
    """The public op, as it is and inside a compiled graph."""

    def op(**options: object) -> object:
        if request.param == "eager":
            return augru(**options)
        torch.compiler.reset()
        return torch.compile(lambda: augru(**options), backend="eager", fullgraph=True)()

    return op


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("name", VALUES)
def test_values(name: str, target: str, run: Callable[..., object]) -> None:
    options, message = VALUES[name]
    with running_on(target) as backend, pytest.raises(ValueError, match=message):
        run(**options, backend=backend)


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("name", VALUES)
def test_values_where_a_gradient_is_wanted(name: str, target: str) -> None:
    options, message = VALUES[name]
    options = options | {"x": options["x"].clone().requires_grad_()}
    with running_on(target) as backend, pytest.raises(ValueError, match=message):
        augru(**options, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["length above T", "history negative", "offsets not ascending"])
def test_values_in_a_graph_made_by_inductor(name: str) -> None:
    """The check stands inside the op, so code generation cannot lose it."""
    options, message = VALUES[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda **kw: augru(**kw), fullgraph=True, dynamic=True)
    with pytest.raises(ValueError, match=message):
        compiled(**options)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_dtypes_devices_and_options(name: str) -> None:
    kind, options, message = SHAPES[name]
    with pytest.raises(kind, match=message):
        augru(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_dtypes_devices_and_options_compiled(name: str) -> None:
    """Dynamo hands on the error it meets while tracing: its own class, our words."""
    _, options, message = SHAPES[name]
    torch.compiler.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(lambda: augru(**options), backend="eager")()


@pytest.mark.parametrize("op", [agru, aigru, augru])
def test_every_op_with_attention_checks_it(op: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="attention must have shape"):
        op(**arguments(attention=torch.rand(U, T + 1)))
    with pytest.raises(ValueError, match="lengths must lie between"):
        op(**arguments(lengths=index(9, 0, 0)))


def test_gru_checks_the_same() -> None:
    good = arguments(attention=...)
    with pytest.raises(ValueError, match="lengths must lie between"):
        gru(**good, lengths=index(9, 0, 0))
    with pytest.raises(ValueError, match="w_hh must have shape"):
        gru(**{**good, "w_hh": torch.randn(15, 4)})
    with pytest.raises(TypeError, match="history"):
        gru(**good, history=index(0, 1, 2))


@pytest.mark.parametrize("target", BACKENDS)
def test_bad_values_write_nothing_and_the_next_call_works(target: str) -> None:
    with running_on(target) as backend:
        for options, message in VALUES.values():
            with pytest.raises(ValueError, match=message):
                augru(**options, backend=backend)
        y, _ = augru(**arguments(), backend=backend)
    assert y.isfinite().all()
