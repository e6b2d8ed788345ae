"""Which training images calibrate scores and pruners, and how they are loaded."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, Subset

import utils
from datasets import build_dataset, build_transform
from samplers import EvalBatchSampler
from sparsity_factory import Statistics, collect_statistics
from stopping import ignore_signals
from utils import UserError, log

BATCH_SIZE = 32  # whatever --batch-size is, since the gradient of a batch depends on its images


class Calibration:
    """Called with what is needed, returns the `Statistics` of the model over calibration images.

    These are `--calibration-images` training images under the evaluation transform, drawn by the seed. Every process
    calls it: whole batches are shared out, and what they give is added up.

    Raises UserError for more images than there are, and for a stream of images, out of which none can be drawn.
    """

    def __init__(self, args, model: torch.nn.Module, device: torch.device, amp_dtype: torch.dtype | None):
        self.model, self.device, self.images = model, device, args.calibration_images
        # The gradients of a loss that is not scaled vanish in float16.
        self.amp_dtype = amp_dtype if amp_dtype != torch.float16 else None
        data, _ = build_dataset(True, args, build_transform(False, args))
        if isinstance(data, IterableDataset):
            raise UserError(f"--data-set {args.data_set}: calibration images cannot be drawn out of a stream")
        if self.images > len(data):
            raise UserError(f"--calibration-images {self.images}: there are {len(data)} training images")
        drawn = np.random.default_rng((utils.CALIBRATION, args.seed)).permutation(len(data))[:self.images]
        batches = EvalBatchSampler(self.images, BATCH_SIZE, utils.rank(), utils.world_size())
        self.loader = DataLoader(Subset(data, drawn.tolist()), batch_sampler=batches, num_workers=args.num_workers,
                                 worker_init_fn=ignore_signals)

    def __call__(self, needs: set[str], loss: Callable = torch.nn.functional.cross_entropy) -> Statistics:
        log(f"Calibrating on {self.images:,} training images: {', '.join(sorted(needs))}")
        shares = {"share": utils.rank(), "add_up": dist.all_reduce} if utils.world_size() > 1 else {}
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return collect_statistics(self.model, self.loader, loss, needs, **shares)
