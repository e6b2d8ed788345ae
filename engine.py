"""The two loops: `train_one_epoch` and `evaluate`."""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from sparsity_factory import Recipe, Sparsifier
from utils import Compute, DivergedError, MetricLogger, OnDevice, SmoothedValue


def training_logger() -> MetricLogger:
    """An empty logger for the metrics of `train_one_epoch`."""
    logger = MetricLogger()
    logger.add_meter("lr", SmoothedValue(window=1, fmt="{value:.6f}"))
    return logger


@dataclass
class Learner:
    """What is trained.

    network: maps images (batch, 3, height, width) to logits (batch, classes), or to a pair of them;
        may be wrapped in DDP.
    sparsifier: keeps pruned weights at zero and changes the masks; None trains dense.
    ema: the moving average of the weights, or None.
    scaler: the loss scaler of float16; by default the loss is not scaled.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    sparsifier: Sparsifier | None = None
    ema: ModelEmaV3 | None = None
    scaler: torch.amp.GradScaler | None = None

    def __post_init__(self):
        if self.sparsifier is None:
            self.sparsifier = Sparsifier(self.model, Recipe(), total_steps=1, epoch_steps=1)
        if self.scaler is None:
            self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    @property
    def model(self) -> nn.Module:
        """The network without its DDP wrapper."""
        wrapped = isinstance(self.network, DistributedDataParallel)
        return self.network.module if wrapped else self.network


@dataclass(frozen=True)
class StepOptions:
    """How a training step is made.

    criterion: called with the images, the network's outputs for them and the targets; returns the
        loss.
    compute: device and precision of the forward pass.
    batch_transform: called with images and targets on the device; returns those to train on.
    clip_grad: the largest norm of the gradients, or None to leave them as they are.
    accum_iter: batches whose mean gradient makes an optimizer step; the last step of an epoch may
        have fewer.
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

    epoch: the epoch that is trained now or next.
    epoch_step, images, logger: the optimizer steps of that epoch so far, their images (of all
        processes) and their metrics.
    step: optimizer steps in all.
    """

    seed: int = 0
    epoch: int = 0
    epoch_step: int = 0
    images: int = 0
    step: int = 0
    logger: MetricLogger = field(default_factory=training_logger)

    def end_step(self, images: int) -> None:
        self.epoch_step += 1
        self.images += images
        self.step += 1

    def end_epoch(self) -> None:
        self.epoch += 1
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
    print_freq: int = 50,
) -> dict[str, float]:
    """Trains on the batches of `loader`, which are the rest of an epoch.

    after_step: called after each optimizer step.
    print_freq: batches between two lines of the log.
    Returns the mean of each metric over all processes.
    Raises DivergedError if the loss is not finite. That is checked only next to a log line, because
    checking waits for the device.
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
    one = torch.ones((), device=device)  # scaled, it tells the sparsifier the scale of the loss
    seen = 0

    # A resumed epoch starts in its middle.
    first_batch = progress.epoch_step * accum_iter
    num_batches = first_batch + len(loader)
    header = f"Epoch: [{progress.epoch}]"
    processes = utils.world_size()
    batches = logger.log_every(OnDevice(loader, device), print_freq, header, first_batch, processes)

    for batch, (images, targets) in enumerate(batches, first_batch):
        step, place = divmod(batch, accum_iter)
        batches_of_step = min(accum_iter, num_batches - step * accum_iter)
        completes_step = place == batches_of_step - 1

        # The log line before this batch has read the losses, so that this does not wait again.
        if batch % print_freq == 1 % print_freq:
            check_finite(progress)

        # Drop path, dropout and mixup depend on the place in the training alone.
        utils.seed_everything(utils.STEP, progress.seed, progress.epoch, batch, utils.rank())

        seen += len(images) * utils.world_size()
        if options.batch_transform is not None:
            images, targets = options.batch_transform(images, targets)

        if place == 0:
            optimizer.zero_grad()
            sparsifier.begin_step()

        # DDP exchanges gradients once a step, in the backward pass of its last batch.
        waits = network is not model and not completes_step
        with network.no_sync() if waits else contextlib.nullcontext():
            with options.compute.autocast():
                outputs = network(torch.cat([images, images]) if options.cosub else images)
                loss = options.criterion(images, outputs, targets)
            scaler.scale(loss / batches_of_step).backward(create_graph=second_order)

        logger.update(loss=loss.detach().float(), lr=learning_rate(optimizer))
        if not completes_step:
            continue

        # Gradients are still dense here. After this call the pruned weights have none, so that
        # clipping sees the norm of the sparse network.
        sparsifier.end_backward(scaler.scale(one))
        if options.clip_grad is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip_grad)

        scaler.step(optimizer)
        scaler.update()

        # Pruned weights are zero again before the average sees them.
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


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest rate of the parameter groups; with `--layer-decay` it is that of the head."""
    return max(group["lr"] for group in optimizer.param_groups)


def evaluate(loader, model: nn.Module, compute: Compute, **options) -> dict[str, float]:
    """Evaluates one model; its options and figures are those of `evaluate_together`."""
    return evaluate_together(loader, {"": model}, compute, **options)[""]


@torch.no_grad()
def evaluate_together(
    loader,
    models: Mapping[str, nn.Module],
    compute: Compute,
    *,
    shared: bool = False,
    after_batch: Callable | None = None,
    print_freq: int = 50,
    criterion: Callable | None = torch.nn.functional.cross_entropy,
) -> dict[str, dict[str, float]]:
    """Evaluates models on the images of `loader`, which are read once, and each counted once.

    models: by name, which log lines show with the figures; "" is not shown.
    shared: each process has a part of the images, and the counts of all are added up. Otherwise
        each process has all images, and the figures are those of the first process, so that
        rounding cannot make processes decide differently.
    after_batch: called after each batch with the outputs of each model and the targets.
    criterion: called with logits and targets; returns their mean loss. None if what the models
        return are no logits.
    Returns for each model `acc1` and `acc5` in percent (`acc5` over all classes if there are fewer
    than five) and, with a criterion, the mean `loss`; the same on every process.
    """
    for model in models.values():
        model.eval()
    logger = MetricLogger()

    # For each model the sum over images of each figure, and the images. They stay on the device
    # until the end: reading one of them would wait for it.
    figures = ["loss", "acc1", "acc5"] if criterion else ["acc1", "acc5"]
    shown = [f"{name}_{figure}".lstrip("_") for name in models for figure in figures]
    totals = torch.zeros(len(models), len(figures) + 1, dtype=torch.float64, device=compute.device)

    processes = utils.world_size() if shared else 1
    batches = OnDevice(loader, compute.device)
    for images, targets in logger.log_every(batches, print_freq, "Test:", processes=processes):
        with compute.autocast():
            outputs = [model(images).float() for model in models.values()]

        sums = torch.stack([_sums(logits, targets, criterion) for logits in outputs])
        totals += sums
        means = (sums[:, :-1] / len(images)).flatten()
        logger.update(n=len(images), **dict(zip(shown, means, strict=True)))
        if after_batch is not None:
            after_batch(outputs, targets)

    counted = totals if shared or utils.is_main_process() else torch.zeros_like(totals)
    numbers = iter(utils.sum_over_processes(counted.flatten().tolist()))
    found = {}
    for name in models:
        *totals_here, count = itertools.islice(numbers, len(figures) + 1)
        stats = {figure: total / count for figure, total in zip(figures, totals_here, strict=True)}
        loss = f" loss {stats['loss']:.3f}" if criterion else ""
        line = f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f}{loss}"
        utils.log(f"{line} ({name})" if name else line, only=utils.LINES)
        found[name] = stats
    return found


def _sums(logits: torch.Tensor, targets: torch.Tensor, criterion: Callable | None) -> torch.Tensor:
    """Over a batch, the sums of the loss, if there is a criterion, of both accuracies and of 1."""
    count = len(targets)
    hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    sums = [100 * hits[:, 0].sum(), 100 * hits.sum(), logits.new_full((), count)]
    if criterion:
        sums = [criterion(logits, targets) * count, *sums]
    return torch.stack(sums).double()


@torch.no_grad()
def check_finite(progress: Progress, model: nn.Module | None = None) -> None:
    """Raises DivergedError on all processes if a loss, or a weight of `model`, is not finite.

    It waits for the device, unless no model is given and the losses have just been read.
    """
    total = progress.logger.meters["loss"].total
    if model is not None:
        # 0 * w is 0 for every finite w, and NaN otherwise.
        total = total + torch.stack([(0 * weight).sum() for weight in model.parameters()]).sum()

    if not math.isfinite(utils.sum_over_processes([float(total)])[0]):
        raise DivergedError(
            f"the loss is not finite in epoch {progress.epoch}, at or before step "
            f"{progress.epoch_step}; try --amp bfloat16 or off, a lower --lr, or --clip-grad 1"
        )
