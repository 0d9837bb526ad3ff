"""dien_kernels: fused recurrences of the Deep Interest Evolution Network (arXiv 1809.03672) for PyTorch."""

from dien_kernels.histories import Histories
from dien_kernels.ops import (
    agru,
    aigru,
    attention_scores,
    augru,
    auxiliary_loss,
    gru,
    use_backend,
    use_gates,
)

__version__ = "0.1.0"
__all__ = [
    "Histories",
    "agru",
    "aigru",
    "attention_scores",
    "augru",
    "auxiliary_loss",
    "gru",
    "use_backend",
    "use_gates",
]
