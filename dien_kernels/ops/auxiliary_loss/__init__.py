"""The auxiliary loss: each interest state must tell the next behaviour from negatives.

Room card. Lives here: ``op.py`` (public op, checks, autograd), ``reference.py`` (the definition), one
file a backend. May import: ``ops/_*.py``. Must not be here: modules with parameters, the sampler of negatives.
"""

from dien_kernels.ops.auxiliary_loss.op import auxiliary_loss

__all__ = ["auxiliary_loss"]
