"""Serving: requests of a history and many candidates to scores.

Room card. Lives here: scoring of raw items with a trained model and the vocabularies it was trained with. May
import: ``models``, ``data``, ``batch``. Must not be here: training, checkpoints, command lines.
"""

from dien_kernels.serving.scorer import Counts, Scorer

__all__ = ["Counts", "Scorer"]
