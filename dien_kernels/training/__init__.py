"""Training: from a config to a trained model, its metrics and its report.

Room card. Lives here: configs, the loop and its step, optimizers, schedules, checkpoints, metrics, comparisons,
reports. May
import: ``data``, ``models``, ``batch``, ``ops``, and the packages of the extra ``train``. Must not be here:
parsing of logs, layers, command lines.
"""

from dien_kernels.training.calibration import Calibration, calibrate, read_calibration
from dien_kernels.training.checkpoint import CheckpointError
from dien_kernels.training.compare import compare
from dien_kernels.training.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainingConfig,
    dump,
    load,
)
from dien_kernels.training.evaluation import evaluate, open_run
from dien_kernels.training.loop import Interrupted, train
from dien_kernels.training.metrics import Metrics, measure
from dien_kernels.training.report import write_report
from dien_kernels.training.step import training_step

__all__ = [
    "Calibration",
    "CheckpointError",
    "Config",
    "DataConfig",
    "Interrupted",
    "Metrics",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "calibrate",
    "compare",
    "dump",
    "evaluate",
    "load",
    "measure",
    "open_run",
    "read_calibration",
    "train",
    "training_step",
    "write_report",
]
