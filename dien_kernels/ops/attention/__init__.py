"""Attention scores: how much each step of a history matters to a target.

Room card. Lives here: ``op.py`` (public op, checks, autograd), ``reference.py`` (the definition), one
file a backend. May import: ``ops/_*.py``. Must not be here: modules with parameters, the recurrence that uses them.
"""

from dien_kernels.ops.attention.op import attention_scores

__all__ = ["attention_scores"]
