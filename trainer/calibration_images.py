"""Which training images calibrate scores, pruners and reconstruction, and how they are loaded."""

from collections.abc import Callable, Generator
from contextlib import closing

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

import utils
from datasets import build_dataset, build_transform, with_transform
from models import without_checkpointing
from samplers import EvalBatchSampler
from sparsity_factory import Inputs, Statistics, collect_statistics, prunable_weights, walk_layers
from utils import Compute, UserError, log

from .stop_signals import ignore_signals
from .tokens import all_tokens

# Independent of --batch-size, because the gradient of a batch depends on its images
BATCH_SIZE = 32


def as_evaluated(args, training_images: Callable[[], Dataset] | None = None) -> Dataset:
    """The training images under the evaluation transform.

    training_images: returns them; by default they are listed as the arguments say.
    """
    images = training_images() if training_images else build_dataset(True, args)[0]
    return with_transform(images, build_transform(False, args))


class Calibration:
    """The calibration images: `--calibration-images` training images, drawn by the seed.

    They come under the evaluation transform, and the model merges none of their tokens. Called with
    the names of statistics, it returns the `Statistics` of the model over them; `walk` walks over
    the layers. Every process calls it: whole batches are shared out, and the sums of all processes
    are added up.

    known: if runs share a dense model, its latest statistics, by seed and needs. The first call,
        when the model is still dense, takes them from there or leaves its own.
    training_images: returns the images of the training, so that they are not listed again.

    Raises UserError for more images than there are or less than one for each process, and for a
    stream of images, out of which none can be drawn.
    """

    def __init__(
        self,
        args,
        model: torch.nn.Module,
        compute: Compute,
        known: dict | None = None,
        training_images: Callable[[], Dataset] | None = None,
    ):
        self.model = model
        self.images = args.calibration_images
        self._seed = args.seed
        self._known = known
        # In float16 the gradients of an unscaled loss vanish
        self.compute = Compute(compute.device) if compute.dtype == torch.float16 else compute

        data = as_evaluated(args, training_images)
        if isinstance(data, IterableDataset):
            raise UserError(
                f"--data-set {args.data_set}: calibration images cannot be drawn out of a stream"
            )
        if not utils.world_size() <= self.images <= len(data):
            raise UserError(
                f"--calibration-images {self.images}: there are {len(data)} training images, for "
                f"{utils.world_size()} process(es)"
            )

        order = np.random.default_rng((utils.CALIBRATION, args.seed)).permutation(len(data))
        first, self._left = np.split(order, [self.images])

        def loader(batch_size, drawn=first):
            batches = EvalBatchSampler(len(drawn), batch_size, utils.rank(), utils.world_size())
            return DataLoader(
                Subset(data, drawn.tolist()),
                batch_sampler=batches,
                num_workers=args.num_workers,
                worker_init_fn=ignore_signals,
            )

        self.loader = loader(BATCH_SIZE)
        self._loader = loader
        # A walk needs a batch on each process
        self._loader_for_all = loader(min(BATCH_SIZE, self.images // utils.world_size()))

    def __call__(
        self, needs: set[str], loss: Callable = torch.nn.functional.cross_entropy
    ) -> Statistics:
        known = self._known
        self._known = None
        key = (self._seed, frozenset(needs))
        if known and key in known:
            return known[key]

        log(f"Calibrating on {self.images:,} training images: {', '.join(sorted(needs))}")
        shares = {}
        if utils.world_size() > 1:
            shares = {"share": utils.rank(), "add_up": dist.all_reduce}
        full_precision = utils.full_precision()
        without = without_checkpointing(self.model)
        with self.compute.autocast(), full_precision, without, all_tokens(self.model):
            statistics = collect_statistics(self.model, self.loader, loss, needs, **shares)

        # Only the latest are kept, because they are large
        if known is not None:
            known.clear()
            known[key] = statistics
        return statistics

    def others(self, count: int) -> DataLoader:
        """Batches of further training images, which no statistics see; `loader` if none is left."""
        return self._loader(BATCH_SIZE, self._left[:count]) if len(self._left) else self.loader

    def walk(self, dense: torch.nn.Module | None = None) -> Generator[tuple[str, Inputs]]:
        """Walks over the layers as `walk_layers` does, with a line in the log for every twelfth.

        dense: another model that sees the same images.
        """
        layers = prunable_weights(self.model)
        widest = max(weight[0].numel() for weight in layers.values())
        log(f"Reconstructing {len(layers)} layers on {self.images:,} training images")
        if self.images < widest:
            log(f"--calibration-images {self.images}: fewer than the {widest} inputs of a layer")

        add_up = dist.all_reduce if utils.world_size() > 1 else None
        with self.compute.autocast():
            walk = walk_layers(self.model, self._loader_for_all, other=dense, add_up=add_up)

        # With tokens merged, those of the two models would not correspond
        models = [self.model] if dense is None else [self.model, dense]
        logger = iter(utils.MetricLogger().log_every(list(layers), 12, "Layer:"))
        without = without_checkpointing(self.model)
        with utils.full_precision(), without, all_tokens(*models), closing(walk):
            for layer in walk:
                next(logger)
                yield layer
        next(logger, None)
