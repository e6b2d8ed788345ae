"""The epochs of a run: train, evaluate, log, write checkpoints."""

import copy
import datetime
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import utils
from engine import StepOptions, check_finite, evaluate, steps_of_epoch, train_one_epoch
from sparsity_factory import sparse_kernels
from utils import Compute, log

from .results import Results
from .stop_signals import Stopped, StopSignals
from .training_state import TrainingState


class Evaluator:
    """Evaluates a model on the validation images of a run: called with it, returns what
    `engine.evaluate` does.

    accuracy: takes what `measure` measures, top-1 in percent by name.
    """

    def __init__(
        self, loader, args, compute: Compute, stop: StopSignals, accuracy: dict[str, float]
    ):
        self.loader = loader
        self.compute = compute
        self.stop = stop
        self.shared = args.dist_eval
        self.print_freq = args.print_freq
        self.sparse_kernels = args.sparse_kernels
        self.accuracy = accuracy

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        # An average in the CPU's memory
        if next(model.parameters()).device != self.compute.device:
            model = copy.deepcopy(model).to(self.compute.device)
        return evaluate(
            self.loader,
            model,
            self.compute,
            shared=self.shared,
            after_batch=self.stop.checks(self._common_batches()),
            print_freq=self.print_freq,
        )

    def measure(self, name: str, model: torch.nn.Module) -> None:
        log(f"Accuracy: {name}", only=utils.LINES)
        self.accuracy[name] = self(model)["acc1"]
        log(f"{name}: {self.accuracy[name]:.2f} %", only=utils.BARS)

    def quickest(self, model: torch.nn.Module) -> torch.nn.Module:
        """With `--sparse-kernels` the model with the kernels that are quicker for its batches, else
        the model itself.

        Every process measures for itself, where it will compute.
        """
        images = next((images for images, _ in self.loader), None) if self.sparse_kernels else None
        if images is None:  # not asked for, or none of the images are this process's
            return model
        with self.compute.autocast():
            model, report = sparse_kernels(model.eval(), images.to(self.compute.device))
        log(report.table())
        return model

    def _common_batches(self) -> int:
        """How many batches every process evaluates: with `--dist-eval` some have one more."""
        sampler = getattr(self.loader, "batch_sampler", None)
        # How many a stream has shows when it ends
        return sampler.common_length() if sampler else 0


def train(
    state: TrainingState,
    options: StepOptions,
    loader,
    test: Evaluator,
    stop: StopSignals,
    results: Results,
) -> float:
    """Trains to the last epoch, evaluating and writing checkpoints after each; returns the last
    top-1 accuracy.
    """
    args = state.args
    learner = state.learner
    progress = state.progress
    if utils.world_size() > 1:
        learner.network = distribute(learner.model, options, args.input_size, args.batch_size)
    loader.sampler.set_epoch(progress.epoch)
    steps = steps_of_epoch(loader, args.accum_iter)
    log(
        f"Training epochs {progress.epoch} to {args.epochs - 1}, {steps} steps each"
        + (
            f"; going on after step {progress.epoch_step} of epoch {progress.epoch}"
            if progress.epoch_step
            else ""
        )
    )
    last = (
        learner.sparsifier.step + (args.epochs - progress.epoch) * steps - progress.epoch_step - 1
    )
    if not learner.sparsifier.final and last < learner.sparsifier.steps.end:
        log(
            "The target sparsity is not reached: it is due at step "
            f"{learner.sparsifier.steps.end}, and the last one "
            f"here is {last}; more --epochs would reach it"
        )
    start, test_stats = time.time(), {}

    def after_step():
        stop.check()
        if (
            args.checkpoint_every
            and progress.epoch_step % args.checkpoint_every == 0
            and progress.epoch_step < steps
        ):
            save(state, results)

    try:
        while progress.epoch < args.epochs:
            loader.sampler.set_epoch(progress.epoch, skip=progress.images // utils.world_size())
            began = time.time()
            images = len(loader) * args.batch_size * utils.world_size()
            train_stats = train_one_epoch(
                learner,
                options,
                loader,
                progress,
                after_step=after_step,
                print_freq=args.print_freq,
            )
            speed = images / (time.time() - began)
            test_stats = {"test": test(learner.model)}
            if learner.ema:
                log("Moving average of the weights", only=utils.LINES)
                test_stats["test_ema"] = test(learner.ema.module)
            state.share_bad_images()
            improved = state.end_epoch([stats["acc1"] for stats in test_stats.values()])
            line = epoch_metrics(state, {"train": train_stats, **test_stats})
            log(f"Max accuracy: {state.max_accuracy:.2f}% ({state.best})", only=utils.LINES)
            log(epoch_in_words(line, speed), only=utils.BARS)
            results.log_epoch(line, speed)
            save(state, results, improved)
    except Stopped as stopped:
        save(state, results)
        stopped.add_place(progress.epoch, progress.epoch_step, args.output_dir)
        raise
    log(f"Training time {datetime.timedelta(seconds=int(time.time() - start))}")
    state.check_masks()
    return test_stats["test"]["acc1"] if test_stats else test(learner.model)["acc1"]


def distribute(
    model: torch.nn.Module, options: StepOptions, input_size: int, batch_size: int
) -> DistributedDataParallel:
    """The model in DDP, which averages gradients over the processes.

    DDP arranges its buckets anew after the first backward pass, and with them the order of its
    sums. That pass is made here, so that the first step of a resumed run sums as the same step of
    an undisturbed one does. It leaves no trace: what batch normalization counts is put back. The
    batch has its real size, as a compiled model is compiled for it.
    """
    devices = [options.compute.device.index] if options.compute.device.type == "cuda" else None
    network = DistributedDataParallel(model, device_ids=devices)
    buffers = [buffer.clone() for buffer in model.buffers()]
    network.train(options.train_mode)
    images = torch.zeros(
        batch_size * (1 + options.cosub), 3, input_size, input_size, device=options.compute.device
    )
    with options.compute.autocast():
        outputs = network(images)
    sum(
        output.float().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))
    ).backward()
    model.zero_grad()
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return network


def save(state: TrainingState, results: Results, best: bool = False) -> None:
    """Writes the checkpoint, if the run has an output folder. Every process calls it; the first one
    writes.
    """
    if state.args.output_dir:
        check_finite(state.progress, state.learner.model)
        content = state.state_dict()
        utils.on_first_process(lambda: results.folder.save(content, best))


def epoch_metrics(state: TrainingState, metrics: dict[str, dict[str, float]]) -> dict:
    """The line of log.txt for the epoch that has just ended."""
    line = {
        f"{kind}_{name}": value for kind, stats in metrics.items() for name, value in stats.items()
    }
    if masks := state.learner.sparsifier.masks:
        line["sparsity"] = masks.sparsity()
    return {
        **line,
        "epoch": state.progress.epoch - 1,
        "n_parameters": sum(p.numel() for p in state.learner.model.parameters() if p.requires_grad),
    }


def epoch_in_words(line: dict[str, float], speed: float) -> str:
    """An epoch as a terminal shows it; `speed` in images a second."""
    average = f", moving average {line['test_ema_acc1']:.2f} %" if "test_ema_acc1" in line else ""
    return (
        f"epoch {line['epoch']}: training loss {line['train_loss']:.4f}, validation loss "
        f"{line['test_loss']:.4f}, "
        f"top-1 {line['test_acc1']:.2f} %{average}, learning rate {line['train_lr']:.2g}, "
        f"{speed:,.0f} images/s"
    )
