"""``patch`` and ``accelerate``, on ``torch.nn.GRU`` and on hosts that are made up here."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from dien_kernels import cli
from dien_kernels.integrations import _patch, accelerate, active, patch
from dien_kernels.integrations._target import Fallback, Target, fingerprint

ORIGINAL = nn.GRU.forward
NAME = "torch.nn.modules.rnn.GRU.forward"


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    assert nn.GRU.forward is ORIGINAL
    assert active() == []


HOST = '''
import torch

class Double(torch.nn.Module):
    """Twice its input, and a weight."""
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, fail=False):
        """As it says."""
        if fail:
            raise KeyError("the host's own words")
        return 2 * x * self.weight  # a comment

class Other(Double):
    pass
'''


def ours(self: Any, x: Tensor, fail: bool = False) -> Tensor:
    if fail:
        raise ValueError("words of ours")
    if x.dim() == 1:
        raise Fallback("one dimension")
    return x * (self.weight + self.weight)


def wrong(self: Any, x: Tensor, fail: bool = False) -> Tensor:
    return -ours(self, x)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host library that is not imported yet, known to ``patch`` as "made_up"."""
    name = "made_up_host"
    (tmp_path / f"{name}.py").write_text(HOST)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = ModuleType("dien_kernels.integrations.made_up")
    known.TARGETS = [Target("made_up", name, "Double", "forward", ours, prints=None)]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, known.__name__, known)
    monkeypatch.setitem(_patch.HOSTS, "made_up", "made_up")
    yield name
    sys.modules.pop(name, None)


def targets(replacement: Any, prints: dict[str, str] | None) -> None:
    """Let the made-up host have another replacement, or be known by its text."""
    target = Target("made_up", "made_up_host", "Double", "forward", replacement, prints=prints)
    sys.modules["dien_kernels.integrations.made_up"].TARGETS = [target]  # type: ignore[attr-defined]


def test_a_gru_gives_what_it_gave() -> None:
    torch.manual_seed(0)
    for options in ({}, {"batch_first": True, "num_layers": 2}, {"bidirectional": True, "bias": False}):
        layer = nn.GRU(3, 4, dtype=torch.float64, **options)  # type: ignore[arg-type]
        x = torch.randn(5, 2, 3, dtype=torch.float64).requires_grad_()
        leaves = [x, *layer.parameters()]
        found = []
        for fast in (False, True):
            if fast:
                with patch("torch") as report:
                    y, h_n = layer(x)
                assert (report.calls[NAME], report.withdrawn, report.fallbacks) == (1, {}, {})
            else:
                y, h_n = layer(x)
            found.append([y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), leaves)])
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_what_is_not_taken_is_the_originals() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    with patch("torch", verify=False) as report:
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
            layer(x[:, :, :2])
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            layer(x[:0])
        half = nn.GRU(3, 4, num_layers=2, dropout=0.5)
        torch.manual_seed(1)
        drawn = half(x)[0]
        assert torch.func.jvp(lambda x: layer(x)[1], (x,), (x,))[0].shape == (1, 2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x)[0].dtype == torch.float32
        packed = pack_padded_sequence(x, torch.tensor([5, 2]))
        layer(packed)
    torch.manual_seed(1)
    assert torch.equal(half(x)[0], drawn)
    reasons = {why.split(",")[0].split(":")[0] for _, why in report.fallbacks}
    assert {"input without elements", "dropout between layers", "inside torch.func"} <= reasons
    assert report.calls[NAME] == 2


def test_parameters_hooks_and_pickles_stay() -> None:
    layer = nn.GRU(3, 4)
    before, keys = [id(p) for p in layer.parameters()], list(layer.state_dict())
    with patch("torch"):
        seen: list[int] = []
        layer.register_forward_hook(lambda *_: seen.append(1))
        layer(torch.randn(5, 2, 3))
        assert [id(p) for p in layer.parameters()] == before
        assert list(layer.state_dict()) == keys
        assert seen == [1]
        layer._forward_hooks.clear()
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        assert b"dien_kernels" not in buffer.getvalue()
        assert type(layer) is nn.GRU
        assert type(copy.deepcopy(layer)) is nn.GRU


def test_a_wrong_replacement_is_withdrawn(host: str) -> None:
    targets(wrong, None)
    with patch("made_up") as report:
        module = importlib.import_module(host).Double()
        x = torch.arange(6.0).view(2, 3)
        state = torch.get_rng_state()
        assert torch.equal(module(x), 2 * x)
        assert torch.equal(module(x), 2 * x)
        assert torch.equal(torch.get_rng_state(), state)
        assert module.weight.grad is None
    name = f"{host}.Double.forward"
    assert report.calls == {}
    assert report.withdrawn[name].startswith("on the first call output is off by 20")
    assert report.fallbacks == {(name, "it was withdrawn"): 2}
    assert "withdrawn: made_up_host.Double.forward: on the first call output is off by" in str(report)
    with patch("made_up", verify=False) as unguarded:
        assert torch.equal(module(x), -2 * x)
    assert unguarded.calls == {name: 1}


def test_a_host_may_be_imported_later_and_its_errors_are_its_own(host: str) -> None:
    report = patch("made_up")
    assert report.patched == []
    made = importlib.import_module(host)
    name, original = f"{host}.Double.forward", made.Double.forward.__wrapped__
    assert report.patched == [name]
    x = torch.ones(2, 3)
    assert torch.equal(made.Double()(x), 2 * x)
    assert torch.equal(made.Other()(x), 2 * x)  # a subclass that inherits the method
    with pytest.raises(KeyError, match="the host's own words"):
        made.Double()(x, fail=True)
    assert torch.equal(made.Double()(x[0]), 2 * x[0])
    assert report.calls == {name: 2}
    assert report.fallbacks == {(name, "ValueError: words of ours"): 1, (name, "one dimension"): 1}
    again = patch("made_up")
    assert again.skipped == {name: "it runs our code already"}
    again.undo()
    assert active() == [report]
    report.undo()
    assert vars(made.Double)["forward"] is original
    report.undo()  # nothing is left to do


def test_undo_leaves_what_somebody_else_has_put_there(host: str) -> None:
    made = importlib.import_module(host)
    report = patch("made_up", "torch")
    made.Double.forward = lambda self, x: x
    with pytest.raises(
        RuntimeError, match="^made_up_host.Double.forward was replaced by somebody else after our patch"
    ):
        report.undo()
    assert made.Double()(3) == 3
    assert nn.GRU.forward is ORIGINAL


def test_texts_that_are_not_known(host: str) -> None:
    made = importlib.import_module(host)
    name, found = f"{host}.Double.forward", fingerprint(made.Double.forward)
    print_of_it = _patch.print_of(Target("made_up", host, "Double", "forward", ours), made.Double.forward)
    targets(ours, {"0" * 16: "1.0"})
    with patch("made_up") as report:
        assert report.skipped[name].startswith(
            "its text is of no release that is known (1.0); unknown='verify' tries it"
        )
        assert print_of_it in report.skipped[name]
    with patch("made_up", unknown="verify", verify=False) as report:
        assert report.patched == [name]
        made.Double()(torch.ones(2, 3))
        assert report.calls == {name: 1}
    targets(wrong, {"0" * 16: "1.0"})
    with patch("made_up", unknown="verify", verify=False) as report:  # what is not known is compared whatever is said
        made.Double()(torch.ones(2, 3))
        assert list(report.withdrawn) == [name]
    targets(ours, {print_of_it: "2.0"})
    with patch("made_up") as report:
        assert report.patched == [name]
    bare: dict[str, Any] = {}
    source = HOST.replace('"""As it says."""', "").replace("  # a comment", "").replace("return 2", "return (2)")
    Path(made.__file__).with_name("other_host.py").write_text(source)  # type: ignore[arg-type]
    assert fingerprint(importlib.import_module("other_host").Double.forward) == found
    exec(textwrap.dedent("def forward(self, x): return x"), bare)
    assert fingerprint(bare["forward"]) == ""


def test_accelerate_changes_one_model_and_no_class(host: str) -> None:
    made = importlib.import_module(host)
    model = nn.ModuleDict({"gru": nn.GRU(3, 4), "own": nn.Sequential(made.Double()), "sub": made.Other()})
    x = torch.randn(5, 2, 3)
    wanted = model["gru"](x)[0]
    with pytest.raises(TypeError, match="^model must be a torch.nn.Module, got list$"):
        accelerate([model])  # type: ignore[arg-type]
    report = accelerate(model)
    assert sorted(report.patched) == [f"gru ({NAME})", f"own.0 ({host}.Double.forward)"]  # a subclass may do more
    assert nn.GRU.forward is ORIGINAL
    torch.testing.assert_close(model["gru"](x)[0], wanted)
    assert report.calls == {f"gru ({NAME})": 1}
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict())
    stored = pickle.dumps(model)
    assert b"dien_kernels" not in stored
    for other in (pickle.loads(stored), copy.deepcopy(model)):
        assert torch.equal(other["gru"](x)[0], wanted)
        assert report.calls == {f"gru ({NAME})": 1}
    assert accelerate(model).skipped == {
        f"gru ({NAME})": "it runs our code already",
        f"own.0 ({host}.Double.forward)": "it runs our code already",
    }
    report.undo()
    assert "forward" not in vars(model["gru"])
    assert torch.equal(model["gru"](x)[0], wanted)


def test_threads_share_a_patch() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    with patch("torch") as report:
        threads = [threading.Thread(target=lambda: [layer(x) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert report.calls == {NAME: 200}


@pytest.mark.slow
def test_a_compiled_model_has_no_break_at_its_gru() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    wanted = layer(x)[0]
    with patch("torch", verify=False):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=True):
            compiled = torch.compile(lambda x: layer(x)[0] * 2, fullgraph=True)
            torch.testing.assert_close(compiled(x), 2 * wanted)
    torch._dynamo.reset()


def test_names_and_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^names must be of \['torch', 'deepctr_torch'\], got 'tensorflow'$"):
        patch("tensorflow")
    with pytest.raises(ValueError, match=r"^unknown must be one of \('skip', 'verify'\), got 'try'$"):
        patch("torch", unknown="try")  # type: ignore[arg-type]


def test_a_script_runs_unchanged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, beside\n"
        "torch.nn.GRU(3, 4)(torch.randn(5, 2, 3))\n"
        "print(__name__, beside.WORD, *sys.argv[1:])\n"
        "if '--fail' in sys.argv: raise ValueError('of the script')\n"
        "sys.exit(3)\n"
    )
    before = list(sys.argv), list(sys.path)
    assert cli.main(["run", "--patch", "torch", str(script), "--model", "DIEN"]) == 3
    out, err = capfd.readouterr()
    assert out == "__main__ beside --model DIEN\n"
    assert f"patched: {NAME}, 1 calls" in err
    assert cli.main(["run", "--patch", "torch", str(script), "--fail"]) == 1
    assert "ValueError: of the script" in capfd.readouterr().err
    assert (list(sys.argv), list(sys.path)) == before
    assert cli.main(["run", "--patch", "torch", str(tmp_path / "none.py")]) == 2
    assert f"there is no script {tmp_path / 'none.py'}" in capfd.readouterr().err
    assert cli.main(["run", "--patch", "keras", str(script)]) == 2
    assert "names must be of ['torch', 'deepctr_torch'], got 'keras'" in capfd.readouterr().err
