"""Ops: a grid of one folder an op and one file a backend.

Room card. Lives here: contracts, mathematics, backends. May import: torch, ``_native``. Must not be here:
``nn.Module``s, models, data. Importing this package defines the raw ops and then loads native code for them.
"""

from dien_kernels import _native
from dien_kernels.ops._dispatch import use_backend
from dien_kernels.ops._gates import use_gates
from dien_kernels.ops._register import define_raw
from dien_kernels.ops.attention.op import attention_scores
from dien_kernels.ops.auxiliary_loss.op import auxiliary_loss
from dien_kernels.ops.recurrence import cuda_launch
from dien_kernels.ops.recurrence.functional import agru, aigru, augru, gru

# The library's words about itself; "" as the argument asks for the best instruction set the machine has.
define_raw("_cpu_isa", "() -> str")
define_raw("_set_cpu_isa", "(str name) -> str")
define_raw("_cuda_driver_version", "() -> int")
define_raw("_cuda_runtime_version", "() -> int")
_native.load()
cuda_launch.look_at_driver()

__all__ = ["agru", "aigru", "attention_scores", "augru", "auxiliary_loss", "gru", "use_backend", "use_gates"]
