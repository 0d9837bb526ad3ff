"""The report, and the clock behind its time by part."""

from __future__ import annotations

import base64
import html
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dien_kernels.data import Prepared
from dien_kernels.training import Config, profile, train, write_report

MakeConfig = Callable[..., Config]


@pytest.mark.slow
def test_report_is_one_file_with_everything(config_of: MakeConfig, prepared: Prepared) -> None:
    config = config_of("a <run>", "training.epochs=1", "output.report=true")
    result = train(config)
    text = (Path(config.output.folder) / "report.html").read_text()
    assert not re.search(r"""(src|href)=['"](?!data:)""", text)  # nothing from elsewhere
    assert "<title>dien: a &lt;run&gt;" in text
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert len(images) == 2
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert f"{result['test']['auc']:.4f}" in text
    for part in ("data", "embedding", "extractor", "auxiliary", "attention", "evolution", "mlp", "optimiser"):
        assert f"<td>{part}</td>" in text
    # The attention sums to 1 over a history of real items.
    rows = re.findall(r"<tr><td>(\d+)</td><td>(0\.\d{4}|1\.0000)</td><td><span", text)
    assert len(rows) > 1
    assert sum(float(score) for _, score in rows) == pytest.approx(1, abs=1e-3)
    assert (prepared.encode_items([int(item) for item, _ in rows]) > 0).all()
    assert html.escape("size: 4") in text


def test_models_without_attention_say_so(config_of: MakeConfig) -> None:
    config = config_of("run", "training.epochs=1", "model.name=average")
    train(config)
    assert "average has no attention" in write_report(config.output.folder, steps=1).read_text()
    (Path(config.output.folder) / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a finished run"):
        write_report(config.output.folder)


class _Slow(torch.autograd.Function):
    """Takes ``forward`` seconds forwards and ``backward`` seconds backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        time.sleep(forward)
        ctx.seconds = backward
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradient, None, None


def test_each_part_gets_its_own_forward_and_backward(
    config_of: MakeConfig, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known waits are put into two parts; the clock must find them there and nowhere else."""
    from dien_kernels.models.embeddings import Embeddings
    from dien_kernels.models.parts import MLP

    mlp, embeddings = MLP.forward, Embeddings.forward

    def slow_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp(self, _Slow.apply(x, 0.02, 0.06))

    def slow_embeddings(self: Any, *arguments: Any, **options: Any) -> Any:
        found = embeddings(self, *arguments, **options)
        return found._replace(target=_Slow.apply(found.target, 0.04, 0.03))

    monkeypatch.setattr(MLP, "forward", slow_mlp)
    monkeypatch.setattr(Embeddings, "forward", slow_embeddings)
    times = profile.time_parts(config_of("run", "model.name=average"), prepared, steps=3, warm=1)
    assert times["forward"]["mlp"] >= 20
    assert times["forward"]["embedding"] >= 40
    assert times["backward"]["mlp"] >= 60
    assert times["backward"]["embedding"] >= 30
    assert set(times["forward"]) == {"data", "embedding", "mlp", "loss", "optimiser", "other"}
    assert set(times["backward"]) <= {"embedding", "mlp", "loss"}


def test_the_sum_of_the_parts_is_the_whole(config_of: MakeConfig, prepared: Prepared) -> None:
    config = config_of("run")
    started = time.perf_counter()
    times = profile.time_parts(config, prepared, steps=5, warm=0)
    whole = 1e3 * (time.perf_counter() - started)
    found = 5 * sum(sum(side.values()) for side in times.values())
    assert found <= whole
    json.dumps(times)
