"""Statistics of columns of numbers, gathered piece by piece.

Room card. Lives here: ``Numbers``. May import: numpy. Must not be here: what a model makes of the statistics.
"""

from __future__ import annotations

import math

import numpy as np

from dien_kernels.data._arrow import Array

_SAMPLE = 1 << 16  # so many values are kept for the quantiles
_QUANTILES = 64
_SKEWED = 3.0  # the skewness of a log-normal distribution with sigma 0.7 is about 2.9


class Numbers:
    """Mean, standard deviation, range, share missing and quantiles of one column of numbers.

    Moments are of the numbers and of log(1 + x), as the latter describe skewed columns. The quantiles are those of an
    evenly spaced sample, whose spacing doubles whenever the sample is full.
    """

    def __init__(self) -> None:
        self.count = self.missing = 0
        self.least, self.most = math.inf, -math.inf
        self.sums = np.zeros(3)  # of x, x^2 and x^3, around the mean of the first piece
        self.logs = np.zeros(2)  # of log(1 + x) and its square
        self._shift = 0.0
        self._sample: list[Array] = []
        self._stride = 1
        self._skip = 0

    def add(self, values: Array) -> None:
        """``values`` is float [n]; NaN and infinities are missing."""
        known = values[np.isfinite(values)].astype(np.float64)
        self.missing += values.size - known.size
        if not known.size:
            return
        if not self.count:  # so that moments of numbers far from 0, such as years, lose no digits
            self._shift = float(known.mean())
        self.count += known.size
        self.least, self.most = min(self.least, float(known.min())), max(self.most, float(known.max()))
        away = known - self._shift
        self.sums += [away.sum(), (away**2).sum(), (away**3).sum()]
        logs = np.log1p(np.maximum(known, 0))
        self.logs += [logs.sum(), (logs**2).sum()]
        self._sample.append(known[self._skip :: self._stride])
        self._skip = (self._skip - known.size) % self._stride
        if sum(part.size for part in self._sample) > 2 * _SAMPLE:
            together = np.concatenate(self._sample)
            self._sample, self._stride = [together[::2]], 2 * self._stride

    def to_dict(self) -> dict[str, object]:
        """Plain data. ``log``: the column is skewed and never negative, and mean and std are of log(1 + x)."""
        total = self.count + self.missing
        if not self.count:
            return {"mean": 0.0, "std": 1.0, "min": 0.0, "max": 0.0, "missing": 1.0, "log": False, "quantiles": []}
        first, second, third = (float(s) / self.count for s in self.sums)
        variance = max(second - first**2, 0.0)
        skewness = (third - 3 * first * second + 2 * first**3) / variance**1.5 if variance > 0 else 0.0
        log = self.least >= 0 and skewness > _SKEWED
        mean, deviation = self._shift + first, math.sqrt(variance)
        if log:
            mean = float(self.logs[0]) / self.count
            deviation = math.sqrt(max(float(self.logs[1]) / self.count - mean**2, 0.0))
        quantiles = np.quantile(np.concatenate(self._sample), np.arange(1, _QUANTILES) / _QUANTILES)
        return {
            "mean": mean,
            "std": deviation if deviation > 0 else 1.0,
            "min": self.least,
            "max": self.most,
            "missing": self.missing / total,
            "log": log,
            "quantiles": np.unique(quantiles).tolist(),
        }
