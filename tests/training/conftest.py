"""A tiny prepared folder and the config of a tiny run on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dien_kernels.data import Prepared, prepare, synthetic
from dien_kernels.training import Config, train

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    table = synthetic(folder / "logs.parquet", users=120, items=60, categories=6, events=1200)
    return prepare(table, folder / "prepared", targets="every", progress=False)


def tiny_config(prepared: Prepared, folder: Path, *overrides: str) -> Config:
    """A quiet run of two short epochs, with checkpoints and validations inside them."""
    base = {
        "data": {"path": str(prepared.path), "batch_size": 128},
        "model": {"options": {"embedding": {"size": 4}, "head": {"units": [8]}}},
        "optimizer": {"lr": 0.01},
        "training": {
            "threads": 1,
            "log_every": 1,
            "epochs": 2,
            "validate_every": 7,
            "checkpoint_every": 3,
        },
        "output": {"folder": str(folder), "tensorboard": False, "report": False, "progress": False},
    }
    return Config.from_dict(base).override(overrides)


@pytest.fixture
def config_of(tmp_path: Path, prepared: Prepared, one_thread: None) -> MakeConfig:
    """Makes configs of tiny runs: ``config_of("folder", "section.key=value", ...)``."""
    return lambda folder="run", *overrides: tiny_config(prepared, tmp_path / folder, *overrides)


@pytest.fixture(scope="session")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run that nothing interrupted, with the config of ``config_of()``."""
    before = torch.get_num_threads()
    config = tiny_config(prepared, tmp_path_factory.mktemp("whole") / "run")
    train(config)
    torch.set_num_threads(before)
    return config.output.folder
