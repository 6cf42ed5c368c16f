"""Which sample stands at which position: a pure function of (seed, epoch, position).

Every process may ask for any position at any time, so the order does not depend on ranks or workers, and the only
state of a reader is how many positions are done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Order:
    """The sample at each position of an endless pass over ``size`` samples, reshuffled every epoch.

    Args:
        size: Number of samples in an epoch.
        seed: Seed of the shuffles, 0 <= seed < 2**64.
        shuffle: False reads the samples as stored, every epoch alike.

    Raises:
        ValueError: If ``size`` or ``seed`` is out of range.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        if size < 1:
            raise ValueError(f"data: size is {size}, an order needs at least one sample; check the data path")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, it must lie in 0 .. 2**64 - 1")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}

    def index(self, position: int) -> int:
        """Index (0 .. size - 1) of the sample at ``position`` (0, 1, 2, ... over all epochs)."""
        assert position >= 0, position
        epoch, step = divmod(position, self.size)
        return int(self.permutation(epoch)[step]) if self.shuffle else step

    def permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """Order of one epoch, int64 [size]; cached, do not write to it."""
        if not self.shuffle:
            return np.arange(self.size, dtype=np.int64)
        if epoch not in self._epochs:
            # Two epochs are kept, since the workers of one batch may stand on both sides of an epoch's end.
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            # Sorting raw bits instead of Generator.permutation: NumPy promises never to change the bit stream,
            # but may change what a Generator makes of it, which would break resuming after an upgrade.
            bits = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.size)
            self._epochs[epoch] = np.argsort(bits, kind="stable").astype(np.int64, copy=False)
        return self._epochs[epoch]

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker recomputes its permutation: cheaper than sending it.
        return {**self.__dict__, "_epochs": {}}


def batch_positions(start: int, global_batch: int, end: int) -> range:
    """Positions of the global batch that begins at ``start``; the last one before ``end`` may be shorter.

    Args:
        start: First position of the batch.
        global_batch: Samples of a batch over all ranks and accumulation steps.
        end: Position at which the run stops.
    """
    return range(start, max(start, min(start + global_batch, end)))


def rank_slice(start: int, count: int, rank: int, world: int) -> range:
    """The part of positions ``start .. start + count - 1`` that ``rank`` of ``world`` ranks works on.

    Contiguous blocks in rank order, the first ``count % world`` ranks take one more; so the joined slices of all
    ranks are the global batch in order, whatever the number of ranks.
    """
    assert 0 <= rank < world, (rank, world)
    share, extra = divmod(count, world)
    first = start + rank * share + min(rank, extra)
    return range(first, first + share + (rank < extra))
