"""DIEN against average pooling on logs whose order matters: trained, compared, timed, in a few minutes.

``make demo``, or ``make demo DATA=path`` with logs of your own.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import dien_kernels
from dien_kernels import _native
from dien_kernels.data import Prepared, synthetic
from dien_kernels.ops import use_backend
from dien_kernels.training import Config, DataConfig, OutputConfig, TrainingConfig, setup, train, training_step
from dien_kernels.training.optimizer import make_optimizer

STEPS = 7  # timed steps of each backend


def config_of(folder: Path, data: Path, epochs: int) -> Config:
    return Config(
        data=DataConfig(path=str(data), prepare={} if (data / "meta.json").exists() else {"targets": "every"}),
        training=TrainingConfig(epochs=epochs, seed=0),
        output=OutputConfig(folder=str(folder)),
    )


def step_times(config: Config, prepared: Prepared) -> dict[str, float]:
    """Samples/s of training steps at batch 1024 with fused ops and with plain torch, in turns."""
    config = config.with_("data", batch_size=1024)
    model: Any = setup.model_for(config, prepared)
    optimizer = make_optimizer(model, lr=config.optimizer.lr)
    loader = setup.open_loader(config, prepared, "train")
    all_batches = [loader.batch(0, i) for i in range(min(STEPS, loader.steps(0)))]
    seconds: dict[str, list[float]] = {"auto": [], "torch": []}
    for batch in [all_batches[0], *all_batches]:
        for backend, times in seconds.items():
            with use_backend(backend):
                started = time.perf_counter()
                training_step(model, [batch], optimizer, clip_norm=config.training.clip_norm)
                times.append((time.perf_counter() - started) / batch.rows)
    return {backend: 1 / statistics.median(times[1:]) for backend, times in seconds.items()}  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a prepared folder, or Parquet or CSV with the usual column names")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="its folders average and dien are replaced")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    isa = _native.cpu_isa() if _native.available() else f"absent, {_native.reason()}"
    threads = torch.get_num_threads()
    print(f"dien_kernels {dien_kernels.__version__}, torch {torch.__version__}, {threads} threads")
    print(f"native code: {isa}\n")
    for run in (options.out / "average", options.out / "dien"):  # of an earlier demo; nothing else is touched
        if run.exists() and not (run / "config.yaml").exists():
            parser.error(f"{run} is there and no run of dien-kernels: choose another --out")
        shutil.rmtree(run, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.data
    if data is None:
        data = options.out / "synthetic.parquet"
        synthetic(data, users=3000, items=1000, categories=20, events=60_000)
        print("Synthetic logs: interests wander along a ring of categories; only their order says which way.")
    base = config_of(options.out, data, options.epochs)
    prepared = setup.open_data(base)
    print(prepared.summary() + "\n")

    aucs = {}
    for name, words in (("average", "average pooling, the base model"), ("dien", "DIEN")):
        print(f"Training {words}")
        config = base.with_("model", name=name).with_("output", folder=str(options.out / name))
        config = config.with_("data", path=str(prepared.path), prepare={})
        result = train(config, prepared=prepared)
        aucs[name] = result["test"]["auc"]

    speed = step_times(base, prepared)
    print("\nTest AUC, same data, split, negatives and seed:")
    print(f"  average pooling {aucs['average']:.4f}\n  DIEN            {aucs['dien']:.4f}\n")
    print("DIEN's training steps (forward, auxiliary loss, backward, optimiser), batch 1024:")
    ratio = speed["auto"] / speed["torch"]
    print(f"  fused ops       {speed['auto']:>9,.0f} samples/s, {ratio:.1f} times plain torch")
    print(f"  plain torch     {speed['torch']:>9,.0f} samples/s\n")
    print(f"Report: {options.out / 'dien' / 'report.html'}")


if __name__ == "__main__":
    main()
