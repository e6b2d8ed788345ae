"""The two loops: `train_one_epoch` and `evaluate`."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from sparsity_factory import Recipe, Sparsifier
from utils import Compute, DivergedError, MetricLogger, SmoothedValue


def training_logger() -> MetricLogger:
    """An empty logger for the metrics of `train_one_epoch`."""
    logger = MetricLogger()
    logger.add_meter("lr", SmoothedValue(window=1, fmt="{value:.6f}"))
    return logger


@dataclass
class Learner:
    """What is trained.

    network: maps images (batch, 3, height, width) to logits (batch, classes), or to a pair of them;
    may be in DDP.
    sparsifier: keeps pruned weights at zero and changes the masks; None trains dense.
    ema: the moving average of the weights, or None.
    scaler: the loss scaler of float16; by default the loss is not scaled.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    sparsifier: Sparsifier | None = None
    ema: ModelEmaV3 | None = None
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False)
    )

    def __post_init__(self):
        self.sparsifier = self.sparsifier or Sparsifier(
            self.model, Recipe(), total_steps=1, epoch_steps=1
        )

    @property
    def model(self) -> nn.Module:
        """The network without its DDP wrapper."""
        return (
            self.network.module
            if isinstance(self.network, DistributedDataParallel)
            else self.network
        )


@dataclass(frozen=True)
class StepOptions:
    """How a training step is made.

    criterion: called with the images, the outputs of the network for them, and the targets; returns
    the loss.
    batch_transform: called with images and targets on the device, returns those that the network is
    trained on.
    clip_grad: the largest norm of the gradients, None to leave them as they are.
    accum_iter: an optimizer step takes the mean gradient of so many batches; the last one of an
    epoch may have fewer.
    train_mode: drop path and dropout are on.
    cosub: the network is given every image twice, for `losses.CosubLoss`.
    """

    criterion: Callable
    compute: Compute
    batch_transform: Callable | None = None
    clip_grad: float | None = None
    accum_iter: int = 1
    train_mode: bool = True
    cosub: bool = False


@dataclass
class Progress:
    """Where a run stands.

    epoch: the epoch to train next, or in training. epoch_step, images: the optimizer steps and the
    images (of all processes) of that epoch so far, and logger their metrics. step: optimizer steps
    in all.
    """

    seed: int = 0
    epoch: int = 0
    epoch_step: int = 0
    images: int = 0
    step: int = 0
    logger: MetricLogger = field(default_factory=training_logger)

    def end_step(self, images: int) -> None:
        self.epoch_step = self.epoch_step + 1
        self.images = self.images + images
        self.step = self.step + 1

    def end_epoch(self) -> None:
        self.epoch = self.epoch + 1
        self.epoch_step = 0
        self.images = 0
        self.logger = training_logger()


def steps_of_epoch(loader, accum_iter: int) -> int:
    """Optimizer steps of a whole epoch of the training loader; the last may have fewer batches."""
    return math.ceil(len(loader) / accum_iter)


def train_one_epoch(
    learner: Learner,
    options: StepOptions,
    loader,
    progress: Progress,
    *,
    after_step=None,
    print_freq: int = 10,
) -> dict[str, float]:
    """Trains on the batches of `loader`, the rest of an epoch, and returns the mean of each metric
    over all processes.

    after_step: called after each optimizer step.
    print_freq: batches between two lines of the log.
    Raises DivergedError when the loss is not finite; looked at only where a line is logged, since
    looking waits for the device.
    """
    network = learner.network
    model = learner.model
    optimizer = learner.optimizer
    scaler = learner.scaler
    sparsifier = learner.sparsifier
    logger = progress.logger
    device = options.compute.device
    accum_iter = options.accum_iter
    network.train(options.train_mode)
    second_order = getattr(optimizer, "is_second_order", False)
    first_batch = progress.epoch_step * accum_iter
    seen = 0
    one = torch.ones((), device=device)
    num_batches = first_batch + len(loader)
    batches = logger.log_every(loader, print_freq, f"Epoch: [{progress.epoch}]", first_batch)
    for batch, (images, targets) in enumerate(batches, first_batch):
        step, place = divmod(batch, accum_iter)
        group = min(accum_iter, num_batches - step * accum_iter)  # batches of this step
        completes_step = place == group - 1
        # Just after a log line, which has waited for the device anyway
        if batch % print_freq == 1 % print_freq:
            check_finite(progress)
        utils.seed_everything(utils.STEP, progress.seed, progress.epoch, batch, utils.rank())
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        seen += len(images) * utils.world_size()
        if options.batch_transform is not None:
            images, targets = options.batch_transform(images, targets)
        if place == 0:
            optimizer.zero_grad()
            sparsifier.begin_step()
        # Processes exchange their gradients once a step.
        with (
            network.no_sync()
            if network is not model and not completes_step
            else contextlib.nullcontext()
        ):
            with options.compute.autocast():
                outputs = network(torch.cat([images, images]) if options.cosub else images)
                loss = options.criterion(images, outputs, targets)
            scaler.scale(loss / group).backward(create_graph=second_order)
        logger.update(loss=loss.detach().float(), lr=optimizer.param_groups[0]["lr"])
        if not completes_step:
            continue
        sparsifier.end_backward(scaler.scale(one))
        if options.clip_grad is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        sparsifier.end_step()
        if learner.ema is not None:
            learner.ema.update(model)
        progress.end_step(seen)
        seen = 0
        if after_step is not None:
            after_step()
    check_finite(progress, model)
    logger.synchronize()
    utils.log(f"Averaged stats: {logger}", only=utils.LINES)
    return logger.averages()


@torch.no_grad()
def evaluate(loader, model, compute: Compute, *, shared=False, after_batch=None, print_freq=10):
    """Evaluates `model` on the images of `loader`, each counted once.

    shared: each process has a part of the images, and the counts of all are added up. Otherwise
        each process has all images, and the figures are those of the first: rounding may differ,
        and what follows from them must not.
    after_batch: called after each batch.
    Returns `acc1` and `acc5` in percent (`acc5` over as many classes as there are, where there are
    fewer than five) and the mean cross-entropy `loss`, the same on every process.
    """
    model.eval()
    logger = MetricLogger()
    # Right at first, right among five, loss, images
    totals = torch.zeros(4, dtype=torch.float64, device=compute.device)
    for images, targets in logger.log_every(loader, print_freq, "Test:"):
        images = images.to(compute.device, non_blocking=True)
        targets = targets.to(compute.device, non_blocking=True)
        with compute.autocast():
            logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        batch = torch.stack(
            [hits[:, 0].sum(), hits.sum(), loss * len(images), loss.new_full((), len(images))]
        ).double()
        totals += batch
        logger.update(
            loss=loss,
            acc1=100 * batch[0] / len(images),
            acc5=100 * batch[1] / len(images),
            n=len(images),
        )
        if after_batch is not None:
            after_batch()
    totals = totals.tolist()
    counts = shared or utils.is_main_process()
    top1, top5, loss, count = utils.sum_over_processes(totals if counts else [0.0] * 4)
    stats = {"acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "loss": loss / count}
    utils.log(
        f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}",
        only=utils.LINES,
    )
    return stats


@torch.no_grad()
def check_finite(progress: Progress, model: nn.Module | None = None) -> None:
    """Raises DivergedError on every process when the loss of any, or a weight of `model`, is not
    finite.
    """
    total = float(progress.logger.meters["loss"].total)
    if model is not None:
        total += float(torch.stack([(0 * weight).sum() for weight in model.parameters()]).sum())
    if not math.isfinite(utils.sum_over_processes([total])[0]):
        raise DivergedError(
            f"the loss is not finite in epoch {progress.epoch}, at or before step "
            f"{progress.epoch_step}; try --amp bfloat16 or off, a lower --lr, or --clip-grad 1"
        )
