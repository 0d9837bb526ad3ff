"""Layers: ``nn.Module``s that hold the weights of the ops.

Room card. Lives here: modules with parameters, loaders for other systems' weights, activations that need
state. May import: torch, ``ops``. Must not be here: kernels, mathematics of a recurrence, models, data.
"""

from dien_kernels.layers.activations import Dice
from dien_kernels.layers.attention import BilinearAttention, DINAttention
from dien_kernels.layers.augru import AGRU, AIGRU, AUGRU
from dien_kernels.layers.convert import (
    Weights,
    from_deepctr_torch,
    from_fuxictr,
    from_graphcore,
    from_keras,
    from_onednn,
    from_openvino,
    from_rechub,
    from_rows,
    from_tf,
)
from dien_kernels.layers.gru import GRU

__all__ = [
    "AGRU",
    "AIGRU",
    "AUGRU",
    "GRU",
    "BilinearAttention",
    "DINAttention",
    "Dice",
    "Weights",
    "from_deepctr_torch",
    "from_fuxictr",
    "from_graphcore",
    "from_keras",
    "from_onednn",
    "from_openvino",
    "from_rechub",
    "from_rows",
    "from_tf",
]
