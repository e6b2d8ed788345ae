"""Data whose random choices depend on seed, epoch and position, not on workers or history."""

import itertools
import math
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import utils
from utils import BadImageError, UserError, log


class SeededDataset(Dataset):
    """Makes the random choices of each sample from the key that `TrainSampler` gives its index.

    skip_at_most: how many images that cannot be read are replaced, each by the next one of the data
        set, and named on standard error; one more is an error.
    bad: a bool tensor (images,), shared with the data workers, that is True for replaced images.
    """

    def __init__(self, dataset: Dataset, skip_at_most: int = 0):
        self.dataset = dataset
        self.skip_at_most = skip_at_most
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item):
        index, key = item

        # The first image that can be read, from this one on and around the end.
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
        """Notes an image that cannot be read; raises UserError if too many cannot."""
        if not self.skip_at_most:
            raise error

        self.bad[index] = True
        count = int(self.bad.count_nonzero())
        if count > self.skip_at_most:
            raise UserError(
                f"{error}; this is one more than --skip-bad-images {self.skip_at_most} allows"
            )
        note = f"Skipping image {count} of at most {self.skip_at_most}: {error}"
        print(note, file=sys.stderr, flush=True)


class WithoutLabels(Dataset):
    """Images that all have the label 0, for a training that uses no label."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index][0], 0


class SeededStream(IterableDataset):
    """Makes the random choices of each image of a stream of timm (`IterableImageDataset`).

    They depend on seed, epoch, process, data worker, and the place among the images of that worker.
    Raises UserError for a label that is not below `num_classes`.
    """

    bad = None  # timm itself skips images that cannot be read

    def __init__(self, stream: IterableDataset, seed: int, num_classes: int):
        self.stream = stream
        self.seed = seed
        self.num_classes = num_classes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.stream.set_epoch(epoch)

    def __iter__(self):
        worker = get_worker_info().id
        images = iter(self.stream)

        for place in itertools.count():
            utils.seed_everything(utils.SAMPLE, self.seed, self.epoch, utils.rank(), worker, place)
            sample = next(images, None)
            if sample is None:
                return

            if not 0 <= sample[1] < self.num_classes:
                raise UserError(
                    f"an image has the label {sample[1]}; expected 0 to {self.num_classes - 1}, "
                    f"as --num-classes {self.num_classes} says"
                )
            yield sample


class StreamLoader:
    """Batches of a `SeededStream` for one process; used like a DataLoader with a `TrainSampler`.

    In training, the data workers of all processes divide the shards among them, and every process
    has the same number of whole batches. In evaluation, every process reads all images, and with
    `share` (rank, world size) it uses every world_size-th batch. A stream has no shortcut to a
    place in it: batches that are skipped are read nevertheless.

    Raises UserError if there are fewer shards than processes to train, fewer batches in an epoch
    than the shards announce, or no image to evaluate on.
    """

    def __init__(
        self, dataset: SeededStream, batch_size: int, num_workers: int, share=(0, 1), **options
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.share = share
        self.skipped = 0
        self.sampler = self  # for its `set_epoch`

        reader = dataset.stream.reader
        world_size = share[1]
        shards = len(reader.split_info.filenames)
        self.trains = reader.is_training
        if self.trains and shards < world_size:
            raise UserError(
                f"{shards} shards for {world_size} processes; expected at least one for each"
            )

        # With several processes, timm would read some images twice and others not at all.
        if not self.trains:
            reader.dist_rank = 0
            reader.dist_num_replicas = 1

        # Every worker needs a shard.
        shards_here = shards // world_size if self.trains else shards
        workers = max(1, min(num_workers, shards_here))
        dataset.stream.set_loader_cfg(num_workers=workers)

        steps = reader.num_samples / (batch_size * world_size)
        self.steps = int(steps) if self.trains else math.ceil(steps)

        # Workers start anew for each epoch, since they draw its order when they start.
        self.loader = DataLoader(
            dataset,
            batch_size,
            num_workers=workers,
            drop_last=self.trains,
            generator=torch.Generator(),
            **options,
        )

    def set_seed(self, seed: int) -> None:
        self.dataset.seed = seed

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Moves to an epoch, and skips its first `skip` images of this process."""
        self.skipped = min(skip // self.batch_size, self.steps)
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self.steps - self.skipped

    def __iter__(self):
        key = (utils.ORDER, self.dataset.seed, self.dataset.epoch, utils.rank())
        seed = np.random.SeedSequence(key).generate_state(1)[0]
        self.loader.generator.manual_seed(int(seed))

        return self._epoch() if self.trains else self._evaluation()

    def _epoch(self):
        """The batches of an epoch; raises UserError if there are fewer than its shards announce."""
        step = self.skipped
        for batch in itertools.islice(self.loader, self.skipped, self.steps):
            yield batch
            step += 1

        if step < self.steps:
            raise UserError(
                f"the shards ended after {step} of the {self.steps} steps that their number of "
                f"images announces; expected images named {self._names()}"
            )

    def _evaluation(self):
        """The batches of this process; raises UserError if no image can be read."""
        rank, world_size = self.share
        images = 0
        for number, batch in enumerate(self.loader):
            images += len(batch[1])
            if number % world_size == rank:
                yield batch

        announced = self.dataset.stream.reader.num_samples
        if not images:
            raise UserError(
                "no image of the shards to evaluate on can be read; expected images named "
                f"{self._names()}"
            )
        if announced and images != announced:
            log(f"The shards hold {images:,} images to evaluate on, and announce {announced:,}")

    def _names(self) -> str:
        """How the names of images in shards end."""
        return self.dataset.stream.reader.input_key.replace(";", ", ")
