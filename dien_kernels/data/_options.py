"""The options of ``prepare`` that change what is written, and checks of numbers.

Room card. Lives here: ``Options``, ``check_integer``. May import: ``negatives``, ``_write``. Must not be here: what is
done with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from dien_kernels.data._write import DUPLICATES
from dien_kernels.data.negatives import SAMPLING


@dataclass(frozen=True)
class Options:
    """The options of ``prepare`` that change what is written. They are checked when the object is made."""

    labels: str
    targets: str
    split: str
    fractions: tuple[float, float, float]
    negatives: int
    negative_sampling: str
    min_count: dict[str, int]
    duplicates: str
    buckets: dict[str, int]
    seed: int

    def __post_init__(self) -> None:
        for name, allowed in (
            ("labels", ("next", "given")),
            ("targets", ("last", "every")),
            ("split", ("user", "time")),
            ("negative_sampling", SAMPLING),
            ("duplicates", DUPLICATES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_integer("negatives", self.negatives, 1)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        for kind, numbers, least in (("min_count", self.min_count, 1), ("buckets", self.buckets, 2)):
            for name, number in numbers.items():
                check_integer(f"{kind} of {name!r}", number, least, 2**31 - 1)
        if self.duplicates == "drop" and "item" in self.buckets:
            raise ValueError("duplicates must be 'keep' with buckets of 'item', whose items cannot be told apart")
        shares = self.fractions
        if not (min(shares) >= 0 and shares[0] > 0 and abs(sum(shares) - 1) <= 1e-9):  # refuses NaN, too
            raise ValueError(f"fractions must be three shares (train > 0) with the sum 1, got {list(shares)}")


def check_integer(name: str, number: object, least: int, most: int | None = None) -> int:
    """The number as an ``int``; NumPy's integers are welcome."""
    if isinstance(number, bool) or not isinstance(number, Integral) or int(number) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    if most is not None and int(number) > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return int(number)
