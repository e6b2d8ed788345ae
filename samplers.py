"""Which sample goes to which process, in what order, and with what random seed."""

import itertools
import math
import sys

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, Sampler

import utils
from utils import BadImageError, UserError


class TrainSampler(Sampler):
    """One process's share of a shuffled epoch: yields `(index, key)`, the key being the seed of that one sample.

    Position p of the epoch goes to process `p % world_size`. The order depends on (seed, epoch) and a sample's key on
    (seed, epoch, p), so neither depends on the number of data workers.

    repeats: how often each drawn image appears, with an augmentation of its own, in neighbouring positions and so on
        different processes where possible. With 3 this is DeiT's repeated augmentation (Berman et al. 2019,
        arXiv:1902.05509): an epoch has as many samples as without it, rounded down to a multiple of 256, and shows
        about a third of the images. Fewer than 256 images are not rounded, since nothing would be left.
    """

    def __init__(self, size: int, seed: int = 0, repeats: int = 1, rank: int = 0, world_size: int = 1):
        self.size, self.seed, self.repeats, self.rank, self.world_size = size, seed, repeats, rank, world_size
        self.epoch = self.skipped = 0
        if repeats > 1:
            self.num_samples = max((size // 256 * 256 or size) // world_size, 1)
        else:
            self.num_samples = math.ceil(size / world_size)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Moves to an epoch, without the first `skip` samples of this process."""
        self.epoch, self.skipped = epoch, min(skip, self.num_samples)

    def __len__(self) -> int:
        return self.num_samples - self.skipped

    def __iter__(self):
        order = np.random.default_rng((utils.ORDER, self.seed, self.epoch)).permutation(self.size)
        for position in range(self.skipped * self.world_size + self.rank, self.num_samples * self.world_size,
                              self.world_size):
            # Without repeats the last round may pass the end; it starts again from the front, so that every
            # process has equally many samples.
            yield int(order[position // self.repeats % self.size]), (self.seed, self.epoch, position)


class SeededDataset(Dataset):
    """Gives each sample the random choices of the key that `TrainSampler` hands over beside its index.

    skip_at_most: so many images that cannot be read are replaced, each by the next one in the data set, and named on
        standard error; one more is an error.

    Attributes:
        bad: a bool tensor (images,), shared with the data workers: which ones are replaced.
    """

    def __init__(self, dataset: Dataset, skip_at_most: int = 0):
        self.dataset, self.skip_at_most = dataset, skip_at_most
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item):
        index, key = item
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            if self.bad[candidate]:
                continue
            utils.seed_everything(utils.SAMPLE, *key)
            try:
                return self.dataset[candidate]
            except BadImageError as error:
                self._skip(candidate, error)
        raise UserError("none of the training images can be read")

    def _skip(self, index: int, error: BadImageError) -> None:
        if not self.skip_at_most:
            raise error
        self.bad[index] = True
        count = int(self.bad.count_nonzero())
        if count > self.skip_at_most:
            raise UserError(f"{error}; this is one more than --skip-bad-images {self.skip_at_most} allows")
        print(f"Skipping image {count} of at most {self.skip_at_most}: {error}", file=sys.stderr, flush=True)


class EvalBatchSampler(BatchSampler):
    """Every sample once, in order; process r of w gets the whole batches r, r + w, r + 2w, ...

    Whole batches, and not samples, are shared out: each batch is then the very one that a single process sees, so
    accuracies are equal to the last image for any number of processes, also when nothing divides evenly.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self):
        for start in self._starts():
            yield list(range(start, min(start + self.batch_size, self.size)))

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.size, self.world_size * self.batch_size)
