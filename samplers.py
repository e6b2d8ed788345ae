"""Which sample goes to which process, and in what order."""

import math

import numpy as np
from torch.utils.data import BatchSampler, Sampler

import utils


class TrainSampler(Sampler):
    """One process's share of a shuffled epoch: yields `(index, key)` for each sample.

    The key is the seed of that sample. Position p of the epoch belongs to process `p % world_size`.
    The order depends on (seed, epoch) and a sample's key on (seed, epoch, p), so neither depends on
    the number of data workers.

    repeats: how often each drawn image appears, with an augmentation of its own, in neighbouring
        positions and so on different processes where possible. With 3 this is DeiT's repeated
        augmentation (Berman et al. 2019, arXiv:1902.05509): an epoch has as many samples as without
        it, rounded down to a multiple of 256, and shows about a third of the images. Fewer than 256
        images are not rounded, since nothing would be left.
    """

    def __init__(
        self, size: int, seed: int = 0, repeats: int = 1, rank: int = 0, world_size: int = 1
    ):
        self.size = size
        self.seed = seed
        self.repeats = repeats
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skipped = 0
        if repeats > 1:
            self.num_samples = max((size // 256 * 256 or size) // world_size, 1)
        else:
            self.num_samples = math.ceil(size / world_size)

    def set_seed(self, seed: int) -> None:
        self.seed = seed

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Moves to an epoch, without the first `skip` samples of this process."""
        self.epoch = epoch
        self.skipped = min(skip, self.num_samples)

    def __len__(self) -> int:
        return self.num_samples - self.skipped

    def __iter__(self):
        order = np.random.default_rng((utils.ORDER, self.seed, self.epoch)).permutation(self.size)
        start = self.skipped * self.world_size + self.rank
        end = self.num_samples * self.world_size
        for position in range(start, end, self.world_size):
            # Without repeats the last round may pass the end. It then starts again from the front,
            # so that every process has equally many samples.
            index = int(order[position // self.repeats % self.size])
            yield index, (self.seed, self.epoch, position)


class EvalBatchSampler(BatchSampler):
    """Every sample once, in order; process r of w gets the whole batches r, r + w, r + 2w, ...

    Whole batches, and not samples, are shared out: each batch is then the very one that a single
    process sees, so accuracies are equal to the last image for any number of processes, also when
    nothing divides evenly.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.size = size
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self._starts())

    def common_length(self) -> int:
        """The number of batches that every process has at least."""
        return math.ceil(self.size / self.batch_size) // self.world_size

    def __iter__(self):
        for start in self._starts():
            yield list(range(start, min(start + self.batch_size, self.size)))

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.size, self.world_size * self.batch_size)
