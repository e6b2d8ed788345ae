"""Evaluates a backbone without a head: the nearest training images vote on the class of an image.

The protocol is that of DINO (Caron et al. 2021, arXiv:2104.14294). Labels decide the vote alone.
"""

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import utils
from samplers import EvalBatchSampler
from utils import Compute, UserError, log

from .calibration_images import as_evaluated
from .seeded_data import SeededDataset
from .stop_signals import StopSignals, ignore_signals

NEIGHBOURS = 20
TEMPERATURE = 0.07


def votes(features: Tensor, bank: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The votes for each class of images with these features, shape (images, num_classes).

    The nearest rows of `bank` by cosine similarity vote for their labels. The weight of a vote is
    exp(similarity / temperature).

    features: (images, dim). bank: (training images, dim), each row of length 1. labels: int64
    (training images,).
    """
    similarity = F.normalize(features.float(), dim=1) @ bank.T
    nearest, rows = similarity.topk(min(NEIGHBOURS, len(bank)))
    weights = (nearest / TEMPERATURE).exp()
    return weights.new_zeros(len(features), num_classes).scatter_add_(1, labels[rows], weights)


class NearestNeighbours(nn.Module):
    """Maps images (batch, 3, height, width) to the votes of a backbone's nearest training images.

    backbone: maps images to features (batch, dim). bank, labels: those of the training images.
    """

    def __init__(self, backbone: nn.Module, bank: Tensor, labels: Tensor):
        super().__init__()
        self.backbone = backbone
        self.bank = bank
        self.labels = labels
        self.num_classes = int(labels.max()) + 1

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        # Similarities that were rounded would be of other neighbours
        with torch.autocast(images.device.type, enabled=False), utils.full_precision():
            return votes(features, self.bank, self.labels, self.num_classes)


class TrainingImages(Dataset):
    """The training images as evaluation transforms them, and their labels.

    Up to `--skip-bad-images` images that cannot be read are replaced, each by the next one.
    """

    def __init__(
        self, args: argparse.Namespace, training_images: Callable[[], Dataset] | None = None
    ):
        images = as_evaluated(args, training_images)
        self.images = SeededDataset(images, args.skip_bad_images)
        self.seed = args.seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index, (self.seed, 0, index)]


class Neighbourhood:
    """Called with a backbone, returns the `NearestNeighbours` of its features.

    Every process calls it, computes its share of the features, and has those of all in the end.

    batch_size: images for which features are computed at once.
    training_images: returns the images of the training, so that they are not listed again.
    Raises UserError for fewer training images than processes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        batch_size: int,
        compute: Compute,
        training_images: Callable[[], Dataset] | None = None,
    ):
        images = TrainingImages(args, training_images)
        processes = utils.world_size()
        if len(images) < processes:
            raise UserError(
                f"--num-classes 0: {len(images)} training images for {processes} processes"
            )
        self.compute = compute
        self.print_freq = args.print_freq

        # Every process has a batch
        batch_size = min(batch_size, len(images) // processes)
        self.batches = EvalBatchSampler(len(images), batch_size, utils.rank(), processes)
        self.loader = DataLoader(
            images,
            batch_sampler=self.batches,
            num_workers=args.num_workers,
            pin_memory=args.pin_mem and compute.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )
        log(
            f"Without a head: accuracies are those of the {NEIGHBOURS} nearest of {len(images):,} "
            "training images, weighted"
        )

    @torch.no_grad()
    def __call__(self, backbone: nn.Module, stop: StopSignals) -> NearestNeighbours:
        backbone.eval()
        size = self.batches.size
        device = self.compute.device
        bank = None
        labels = torch.zeros(size, dtype=torch.int64, device=device)

        check = stop.checks(self.batches.common_length())
        batches = utils.MetricLogger().log_every(
            utils.OnDevice(self.loader, device),
            self.print_freq,
            "Features:",
            processes=utils.world_size(),
        )
        for rows, (images, targets) in zip(self.batches, batches, strict=True):
            with self.compute.autocast():
                features = backbone(images)
            if bank is None:
                bank = torch.zeros(size, features.shape[1], device=device)
            bank[rows[0] : rows[-1] + 1] = F.normalize(features.float(), dim=1)
            labels[rows[0] : rows[-1] + 1] = targets
            check()

        # The rows of other processes are zero, so that the sums are the features of all
        if utils.world_size() > 1:
            for tensor in (bank, labels):
                dist.all_reduce(tensor)
        return NearestNeighbours(backbone, bank, labels)
