"""A tiny prepared folder and the config of a tiny run on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dien_kernels.data import Prepared, prepare, synthetic
from dien_kernels.training import Config

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    table = synthetic(folder / "logs.parquet", users=120, items=60, categories=6, events=1200)
    return prepare(table, folder / "prepared", targets="every", progress=False)


@pytest.fixture
def config_of(tmp_path: Path, prepared: Prepared, one_thread: None) -> MakeConfig:
    """Makes configs of quiet runs: ``config_of("folder", "section.key=value", ...)``."""
    base = {
        "data": {"path": str(prepared.path), "batch_size": 128},
        "model": {"options": {"embedding_size": 4, "mlp": [8]}},
        "training": {"threads": 1, "log_every": 1, "lr": 0.01, "epochs": 2},
        "output": {"tensorboard": False, "report": False, "progress": False},
    }

    def make(folder: str = "run", *overrides: str) -> Config:
        plain = Config.from_dict(base).override(overrides)
        return plain.with_("output", folder=str(tmp_path / folder))

    return make
