"""Other libraries' recurrences and DIENs on our ops, without a change of their users' code.

Room card. Lives here: ``patch`` and ``accelerate``, what they tell, and one file for each host library. May import:
everything below. Must not be here: mathematics, files, training.

A host is imported only by whoever uses it: nothing here imports one. docs/integrations.md says what each host gains.
"""

from dien_kernels.integrations._patch import accelerate, active, patch
from dien_kernels.integrations._report import Report

__all__ = ["Report", "accelerate", "active", "patch"]
