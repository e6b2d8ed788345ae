"""The two loops: `train_one_epoch` and `evaluate`."""

import contextlib
import math

import torch
from torch.nn.parallel import DistributedDataParallel

import utils
from utils import MetricLogger, SmoothedValue


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number."""


def train_one_epoch(model, criterion, loader, optimizer, device, epoch, *, seed=0, amp_dtype=None, scaler=None,
                    clip_grad=None, ema=None, batch_transform=None, masks=None, train_mode=True, cosub=False,
                    accum_iter=1, first_step=0, logger=None, after_step=None, print_freq=10):
    """Trains for one pass over `loader` and returns the mean of each metric over all processes.

    model: maps images (batch, 3, height, width) to logits (batch, classes), or to a pair of them; may be in DDP.
    criterion: called with the images, what the model gave for them, and the targets.
    batch_transform: called with images and targets on the device, returns what the model is trained on.
    cosub: the model is given every image twice, for `losses.CosubLoss`.
    amp_dtype: torch.bfloat16 or torch.float16 to run the forward pass under autocast, None for float32.
    masks: has `apply_to_grads()` and `apply()` and keeps pruned weights at zero; None trains dense.
    ema: has `update(model)` and is given the model without its DDP wrapper.
    accum_iter: an optimizer step takes the mean gradient of so many batches; the last one of an epoch may have fewer.
    first_step: the number of the first optimizer step, where a resumed epoch had earlier ones.
    logger: a `utils.MetricLogger` with the metrics of those earlier steps.
    after_step: called after each optimizer step with the number of them done in the epoch.
    print_freq: batches between two lines of the log.
    Raises DivergedError when the loss is not finite; looked at only where a line is logged, since looking waits
    for the device.
    """
    model.train(train_mode)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    plain_model = model.module if isinstance(model, DistributedDataParallel) else model
    second_order = getattr(optimizer, "is_second_order", False)
    logger = training_logger() if logger is None else logger
    first_batch = first_step * accum_iter
    num_batches = first_batch + len(loader)
    batches = logger.log_every(loader, print_freq, f"Epoch: [{epoch}]", first_batch)
    for batch, (images, targets) in enumerate(batches, first_batch):
        step, place = divmod(batch, accum_iter)
        group = min(accum_iter, num_batches - step * accum_iter)  # batches of this step
        completes_step = place == group - 1
        if batch % print_freq == 1 % print_freq:  # just after a log line, which has waited for the device anyway
            check_finite(logger, epoch, step)
        utils.seed_everything(utils.STEP, seed, epoch, batch, utils.rank())
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        if batch_transform is not None:
            images, targets = batch_transform(images, targets)
        if place == 0:
            optimizer.zero_grad()
        # Processes exchange their gradients once a step.
        with model.no_sync() if model is not plain_model and not completes_step else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                outputs = model(torch.cat([images, images]) if cosub else images)
                loss = criterion(images, outputs, targets)
            scaler.scale(loss / group).backward(create_graph=second_order)
        logger.update(loss=loss.detach().float(), lr=optimizer.param_groups[0]["lr"])
        if not completes_step:
            continue
        if masks is not None:
            masks.apply_to_grads()
        if clip_grad is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if masks is not None:
            masks.apply()
        if ema is not None:
            ema.update(plain_model)
        if after_step is not None:
            after_step(step + 1)
    check_finite(logger, epoch, math.ceil(num_batches / accum_iter), plain_model)
    logger.synchronize()
    utils.log(f"Averaged stats: {logger}", only=utils.LINES)
    return logger.averages()


def training_logger() -> MetricLogger:
    """What `train_one_epoch` gathers its metrics in."""
    logger = MetricLogger()
    logger.add_meter("lr", SmoothedValue(window=1, fmt="{value:.6f}"))
    return logger


@torch.no_grad()
def evaluate(loader, model, device, *, amp_dtype=None, shared=False, after_batch=None, print_freq=10):
    """Evaluates `model` on the images of `loader`, each counted once.

    shared: each process has a part of the images, and the counts of all are added up.
    after_batch: called after each batch.
    Returns `acc1` and `acc5` in percent (`acc5` over as many classes as there are, where there are fewer than five)
    and the mean cross-entropy `loss`.
    """
    model.eval()
    logger = MetricLogger()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # right at first, right among five, loss, images
    for images, targets in logger.log_every(loader, print_freq, "Test:"):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        batch = torch.stack([hits[:, 0].sum(), hits.sum(), loss * len(images), loss.new_full((), len(images))]).double()
        totals += batch
        logger.update(loss=loss, acc1=100 * batch[0] / len(images), acc5=100 * batch[1] / len(images), n=len(images))
        if after_batch is not None:
            after_batch()
    totals = totals.tolist()
    top1, top5, loss, count = utils.sum_over_processes(totals) if shared else totals
    stats = {"acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "loss": loss / count}
    utils.log(f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}", only=utils.LINES)
    return stats


@torch.no_grad()
def check_finite(logger, epoch, step, model=None) -> None:
    """Raises DivergedError on every process when the loss of any, or a weight of `model`, is not finite."""
    total = float(logger.meters["loss"].total)
    if model is not None:
        total += float(torch.stack([(0 * weight).sum() for weight in model.parameters()]).sum())
    if not math.isfinite(utils.sum_over_processes([total])[0]):
        raise DivergedError(f"the loss is not finite in epoch {epoch}, at or before step {step}; "
                            "try --amp bfloat16 or off, a lower --lr, or --clip-grad 1")
