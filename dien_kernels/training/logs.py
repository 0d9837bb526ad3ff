"""What a run says while it runs: one JSON line a window, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from dien_kernels.training.checkpoint import atomic

FILE = "log.jsonl"
WORDS = {"auc": "AUC", "user_auc": "per-user AUC", "log_loss": "log loss"}  # the names of metrics in messages


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Log:
    """The log of one run: ``log.jsonl`` and, if wanted, TensorBoard files and a progress bar.

    Args:
        folder: of the run.
        total: steps done so far: lines after them, of a run that was killed later, are removed.
        expected: the number of steps of the training, for the progress bar.
    """

    def __init__(self, folder: Path, *, total: int, expected: int, tensorboard: bool, progress: bool) -> None:
        self._path = folder / FILE
        kept = [row for row in read(self._path) if row["total"] <= total]
        with atomic(self._path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = open(self._path, "a")  # noqa: SIM115, closed by close()
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=total + 1 if total else None)
        self._bar: Any = None
        if progress:
            from tqdm import tqdm

            self._bar = tqdm(total=expected, initial=total, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, open_file in ((self._path, self._file), ("TensorBoard's files", self._writer)):
            try:
                if open_file is not None:
                    open_file.close()
            except OSError as problem:
                self.warn(f"cannot write to {name}: {problem}")
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        """One more step for the bar."""
        if self._bar is not None:
            self._bar.update()

    def train(self, total: int, epoch: int, values: dict[str, float | None]) -> None:
        """A window of training steps that ends after ``total`` steps."""
        self._write({"kind": "train", "total": total, "epoch": epoch, **values})
        if self._bar is not None:
            names = {"loss": "loss", "auc": "auc", "samples_per_second": "samples/s"}
            shown = {word: values[key] for key, word in names.items() if values.get(key) is not None}
            self._bar.set_postfix({k: f"{v:.0f}" if k == "samples/s" else f"{v:.4f}" for k, v in shown.items()})

    def valid(self, total: int, epoch: int, values: dict[str, Any], metric: str = "auc") -> None:
        """A validation after ``total`` steps; the message shows the value of ``metric``."""
        self._write({"kind": "valid", "total": total, "epoch": epoch, **values})
        value = values[metric]
        words = "nan" if value is None else f"{value:.4f}"
        self.say(f"epoch {epoch + 1}, step {total}: validation {WORDS[metric]} {words}")

    def say(self, text: str) -> None:
        """Print a line above the progress bar; nothing without a bar."""
        if self._bar is not None:
            self._bar.write(text)

    def warn(self, text: str) -> None:
        """Issue a warning, with and without a progress bar."""
        warnings.warn(text, stacklevel=3)

    def _write(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk costs a line, not the run
            self.warn(f"cannot write to {self._path}: {error}")
        if self._writer is None:
            return
        try:
            for key, value in row.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{row['kind']}/{key}", value, row["total"])
        except OSError as error:  # the writer's thread has died of it: there is no use in going on with it
            self._writer = None
            self.warn(f"cannot write TensorBoard's files, and writes none from here on: {error}")
