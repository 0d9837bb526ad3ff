"""The order of the samples of an epoch: which block a batch is of, and which samples of the block it has."""

from __future__ import annotations

import numpy as np

from dien_kernels.data._arrow import Array
from dien_kernels.data.negatives import stream

WINDOW = 64  # so many batches' worth of samples are sorted by length together
# The purposes of streams of random numbers.
BLOCKS, ORDER, TARGETS, AUXILIARY, SEQUENCES = range(5)


def blocks_of(behaviours: Array, samples: Array, most: int) -> list[list[int]]:
    """The units with ``samples``, in order, in blocks of at most ``most`` behaviours, and of one unit at least."""
    blocks: list[list[int]] = []
    held = 0
    for unit in np.flatnonzero(samples).tolist():
        if not blocks or held + behaviours[unit] > most:
            blocks.append([])
            held = 0
        blocks[-1].append(unit)
        held += int(behaviours[unit])
    return blocks


class Cut:
    """How the samples of a block are cut into batches.

    W neighbouring batches, one for each rank, are a group. All batches have ``size`` samples but those of the last
    group, which share what is left. So every rank has equally many batches; a rank has one without samples only if
    the last group has fewer than W.

    Args:
        size: samples of a batch. world: W.
    """

    def __init__(self, size: int, world: int) -> None:
        self.size, self.world = size, world

    def groups(self, samples: Array) -> Array:
        """The number of groups of blocks with so many samples."""
        return -(-samples // (self.size * self.world))

    def batch(self, samples: int, number: int) -> tuple[int, int]:
        """The first sample of a batch of a block with so many ``samples``, and the first one behind it."""
        group, rank = divmod(number, self.world)
        first = group * self.size * self.world
        left = samples - first
        if left >= self.size * self.world:
            return first + rank * self.size, first + (rank + 1) * self.size
        each, more = divmod(left, self.world)
        begin = first + rank * each + min(rank, more)
        return begin, begin + each + (rank < more)


class EpochPlan:
    """The blocks of an epoch in their order, and the number of groups of batches up to each: all that is held of an
    epoch, whatever the number of samples.

    Args:
        samples: int64 [blocks], the samples of each block; those without any are left out.
        cut: how they become batches.
        seed, epoch: the keys of the order; None for ``epoch``: in order.
    """

    def __init__(self, samples: Array, cut: Cut, seed: int, epoch: int | None) -> None:
        blocks = np.flatnonzero(samples)
        if epoch is not None:
            blocks = stream(seed, epoch, 0, BLOCKS).permutation(blocks)
        self.blocks = blocks
        self.ends = np.cumsum(cut.groups(samples[blocks]))

    def __len__(self) -> int:
        """The number of groups, which is the number of batches of each rank."""
        return int(self.ends[-1]) if self.ends.size else 0

    def find(self, index: int) -> tuple[int, int]:
        """The block of group ``index`` of the epoch, and the place of the group among those of the block."""
        place = int(np.searchsorted(self.ends, index, side="right"))
        return int(self.blocks[place]), index - (int(self.ends[place - 1]) if place else 0)


def order_of(lengths: Array, cut: Cut, bucket: bool, generator: np.random.Generator | None) -> tuple[Array, Array]:
    """The order of the samples of a block, int32 [S], and the order of its groups of batches, int64 [G].

    Args:
        lengths: [S], of the histories that are read.
        bucket: whether samples of similar length come into one batch: shuffled ones are sorted by length in windows
            of 64 batches, and the groups are shuffled again; without shuffling all are sorted.
        generator: None: no shuffling.
    """
    groups = np.arange(int(cut.groups(np.array(lengths.size))))
    if generator is None:
        order = np.argsort(lengths, kind="stable") if bucket else np.arange(lengths.size)
        return order.astype(np.int32), groups
    order = generator.permutation(lengths.size).astype(np.int32)
    if bucket:
        window = max(WINDOW // cut.world, 1) * cut.world * cut.size
        for start in range(0, lengths.size, window):
            part = order[start : start + window]
            order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
        generator.shuffle(groups)
    return order, groups
