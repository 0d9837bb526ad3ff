"""Data: behaviour logs become a prepared folder, and its samples become ``Batch``es.

Room card. Lives here: readers of logs, ``prepare``, vocabularies, negatives, the loader, synthetic logs. May
import: numpy, pyarrow, polars, torch, ``batch``. Must not be here: models, parameters, training loops,
metrics.
"""

from dien_kernels.data.append import append
from dien_kernels.data.loader import Loader
from dien_kernels.data.log import Columns
from dien_kernels.data.negatives import Negatives
from dien_kernels.data.prepare import prepare
from dien_kernels.data.prepared import Prepared
from dien_kernels.data.readers import FORMATS, guess, open_log
from dien_kernels.data.synthetic import synthetic
from dien_kernels.data.verify import verify
from dien_kernels.data.vocabulary import Vocabulary

__all__ = [
    "FORMATS",
    "Columns",
    "Loader",
    "Negatives",
    "Prepared",
    "Vocabulary",
    "append",
    "guess",
    "open_log",
    "prepare",
    "synthetic",
    "verify",
]
