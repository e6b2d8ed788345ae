"""The epochs of a run: train, evaluate, log, write checkpoints."""

import copy
import datetime
import itertools
import time
from collections.abc import Callable

import torch
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import utils
from engine import (
    Learner,
    StepOptions,
    check_finite,
    evaluate_together,
    steps_of_epoch,
    train_one_epoch,
)
from sparsity_factory import Predictions, sparse_kernels
from utils import Compute, log

from .builders import evaluation_batch_size
from .changes import Comparison, Reference
from .nearest_neighbours import Neighbourhood
from .results import Results
from .stop_signals import Stopped, StopSignals
from .training_state import TrainingState


class Evaluator:
    """Evaluates models on the validation images of a run.

    Called with a model, it returns what `engine.evaluate` does, and `together` that of several. A
    backbone without a head is evaluated by its nearest training images.

    accuracy: takes what `measure` measures, top-1 in percent by name.
    reference: the predictions that later ones are compared with, if there are any.
    training_images: returns the images of the training, so that they are not listed again.
    """

    def __init__(
        self,
        loader,
        args,
        compute: Compute,
        stop: StopSignals,
        accuracy: dict[str, float],
        training_images: Callable[[], Dataset] | None = None,
    ):
        self.loader = loader
        self.compute = compute
        self.stop = stop
        self.accuracy = accuracy
        self.reference: Reference | None = None
        self._batches: list[Predictions] = []  # of the first model that was evaluated last
        self.shared = args.dist_eval
        self.print_freq = args.print_freq
        self.sparse_kernels = args.sparse_kernels
        self.neighbourhood = None
        if args.num_classes == 0:
            self.neighbourhood = Neighbourhood(
                args, evaluation_batch_size(args), compute, training_images
            )

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        return self.together({"": model})[""]

    def together(self, models: dict[str, torch.nn.Module]) -> dict[str, dict[str, float]]:
        """The figures of several models, for which the images are decoded once."""
        models = {name: self._here(model) for name, model in models.items()}
        criterion = torch.nn.functional.cross_entropy
        if self.neighbourhood:
            models = {name: self.neighbourhood(model, self.stop) for name, model in models.items()}
            criterion = None  # votes are no logits
        check = self.stop.checks(self._common_batches())
        self._batches = []

        def after_batch(outputs, targets):
            first = outputs[0]
            probabilities = None if criterion else first / first.sum(dim=1, keepdim=True)
            self._batches.append(Predictions.of(first, targets, probabilities))
            check()

        return evaluate_together(
            self.loader,
            models,
            self.compute,
            shared=self.shared,
            after_batch=after_batch,
            print_freq=self.print_freq,
            criterion=criterion,
        )

    def _here(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model on the device; a moving average may live in the CPU's memory."""
        if next(model.parameters()).device == self.compute.device:
            return model
        return copy.deepcopy(model).to(self.compute.device)

    def predictions(self) -> Predictions:
        """Those of the model that was evaluated last, on the CPU; every process calls it.

        Of several models that were evaluated together it is the first.
        """
        sizes = [len(batch.targets) for batch in self._batches]
        columns = Predictions.joined(self._batches) if sizes else ()  # one process may have none
        mine = sizes, [column.cpu() for column in columns]
        if not self.shared:
            return Predictions(*utils.on_first_process(lambda: mine[1]))

        # Process r of w has the batches r, r + w, r + 2 w, ...
        parts = [
            zip(*(column.split(sizes) for column in columns), strict=True)
            for sizes, columns in utils.gather_objects(mine)
        ]
        rounds = itertools.zip_longest(*parts)
        return Predictions.joined([batch for batches in rounds for batch in batches if batch])

    def compared(self, name: str) -> Comparison | None:
        """The reference and the model that was evaluated last, which `name` names.

        Every process calls it. None if there is no reference, or it is of other images.
        """
        if not self.reference:
            return None
        before, after = self.reference.predictions, self.predictions()
        if not torch.equal(before.targets, after.targets):
            log(
                f"The predictions of {self.reference.name} are of other validation images: what "
                "changed is not written"
            )
            return None
        return Comparison((self.reference.name, name), before, after, self.loader.dataset)

    def measure(self, name: str, model: torch.nn.Module) -> None:
        log(f"Accuracy: {name}", only=utils.LINES)
        self.accuracy[name] = self(model)["acc1"]
        log(f"{name}: {self.accuracy[name]:.2f} %", only=utils.BARS)

    def quickest(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with the sparse kernels that are quicker for its batches, if asked for.

        Every process measures for itself, where it will compute.
        """
        if not self.sparse_kernels:
            return model
        images = next((images for images, _ in self.loader), None)
        if images is None:  # this process has none of the images
            return model

        with self.compute.autocast():
            model, report = sparse_kernels(model.eval(), images.to(self.compute.device))
        log(report.table())
        return model

    def _common_batches(self) -> int:
        """How many batches every process evaluates: with `--dist-eval` some have one more."""
        sampler = getattr(self.loader, "batch_sampler", None)
        return sampler.common_length() if sampler else 0  # only its end tells a stream's length


def train(
    state: TrainingState,
    options: StepOptions,
    loader,
    test: Evaluator,
    stop: StopSignals,
    results: Results,
) -> float:
    """Trains to the last epoch, evaluating and writing checkpoints after each.

    Returns the last top-1 accuracy in percent.
    """
    args = state.args
    learner = state.learner
    progress = state.progress
    if utils.world_size() > 1:
        learner.network = distribute(
            learner.model, options, args.input_size, args.batch_size, args.static_graph
        )

    loader.sampler.set_epoch(progress.epoch)
    steps = steps_of_epoch(loader, args.accum_iter)
    announce(state, steps)

    def after_step():
        state.follow_schedule()
        stop.check()
        if results.folder and utils.world_size() == 1:
            results.folder.check()
        every = args.checkpoint_every
        if every and progress.epoch_step % every == 0 and progress.epoch_step < steps:
            save(state, results)

    start = time.time()
    test_stats = {}
    try:
        while progress.epoch < args.epochs:
            # Train on the rest of the epoch; a resumed one skips the images it has seen.
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

            share_norm_statistics(learner, args.dist_bn)

            # Evaluate.
            test_stats = {}
            if is_due(progress.epoch, args.eval_every, args.epochs):
                models = {"": learner.model}
                if learner.ema:
                    models["ema"] = learner.ema.module
                found = test.together(models)
                test_stats = {f"test_{name}".rstrip("_"): found[name] for name in found}

            # Log, and write a checkpoint.
            state.share_bad_images()
            improved = state.end_epoch([stats["acc1"] for stats in test_stats.values()])
            line = epoch_metrics(state, {"train": train_stats, **test_stats})
            line["images_per_second"] = round(speed, 1)
            line["run"] = state.run
            if test_stats:
                log(f"Max accuracy: {state.max_accuracy:.2f}% ({state.best})", only=utils.LINES)
            log(epoch_in_words(line), only=utils.BARS)
            results.log_epoch(line)
            if improved or is_due(progress.epoch - 1, args.save_every, args.epochs):
                save(state, results, improved)
    except Stopped as stopped:
        save(state, results)
        results.wait()
        stopped.add_place(progress.epoch, progress.epoch_step, args.output_dir, args.overwrite)
        raise

    results.wait()
    log(f"Training time {datetime.timedelta(seconds=int(time.time() - start))}")
    state.check_masks()
    return test_stats["test"]["acc1"] if test_stats else test(learner.model)["acc1"]


def share_norm_statistics(learner: Learner, how: str) -> None:
    """Gives all processes the same statistics of batch norm: `reduce` or `broadcast`, or `none`.

    Those of the moving average are always the first process's, because that is what a checkpoint
    holds.
    """
    processes = utils.world_size()
    if how == "none" or processes == 1:
        return
    distribute_bn(learner.model, processes, reduce=how == "reduce")
    if learner.ema:
        distribute_bn(learner.ema.module, processes, reduce=False)


def is_due(epoch: int, every: int, epochs: int) -> bool:
    """Whether what is done every so many epochs is done after this one; the last one counts too."""
    return (epoch + 1) % every == 0 or epoch == epochs - 1


def announce(state: TrainingState, steps: int) -> None:
    """Says which epochs follow, of `steps` steps each, and what they are too few for."""
    epochs = state.args.epochs
    progress = state.progress
    sparsifier = state.learner.sparsifier

    text = f"Training epochs {progress.epoch} to {epochs - 1}, {steps} steps each"
    if progress.epoch_step:
        text += f"; resuming after step {progress.epoch_step} of epoch {progress.epoch}"
    log(text)

    warmup = state.args.warmup_epochs
    if state.lr_scheduler and 2 * warmup >= epochs:
        reached = ", and never reaches its highest value" if warmup >= epochs else ""
        log(
            f"--warmup-epochs {warmup}: the learning rate rises in {min(warmup, epochs)} of "
            f"{epochs} epochs{reached}"
        )

    due = sparsifier.steps.end
    last = sparsifier.step + (epochs - progress.epoch) * steps - progress.epoch_step - 1
    if not sparsifier.final and last < due:
        log(
            f"The target sparsity is not reached: it is due at step {due}, and the last one here "
            f"is {last}; more --epochs would reach it"
        )


def distribute(
    model: torch.nn.Module,
    options: StepOptions,
    input_size: int,
    batch_size: int,
    static_graph: bool = True,
) -> DistributedDataParallel:
    """The model in DDP, which averages gradients over the processes.

    DDP rearranges its buckets after the first backward pass, and with them the order of its sums.
    That pass is made here, so that the first step of a resumed run sums in the same order as that
    step of an undisturbed run. The pass leaves no trace.

    static_graph: DDP may rely on it that every step uses the same weights. That holds for all
        schedules, since masks change weights and not the graph; but accumulated batches do not
        exchange gradients, which DDP takes for another graph.
    """
    device = options.compute.device
    network = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=static_graph and options.accum_iter == 1,
    )
    buffers = [buffer.clone() for buffer in model.buffers()]

    # A batch of the real size, as a compiled model is compiled for that.
    network.train(options.train_mode)
    images = batch_size * (2 if options.cosub else 1)
    with options.compute.autocast():
        outputs = network(torch.zeros(images, 3, input_size, input_size, device=device))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.float().sum() for output in outputs).backward()

    # Undo what the pass did to gradients and to the statistics of batch normalization.
    model.zero_grad()
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return network


def save(state: TrainingState, results: Results, best: bool = False) -> None:
    """Writes the checkpoint, if the run has an output folder.

    Every process calls it, and the first one writes; with `--async-save`, in a thread. An error of
    that thread is raised after the next step if there is one process, or else at the next
    checkpoint.
    """
    if state.args.output_dir:
        check_finite(state.progress, state.learner.model)
        content = state.state_dict()

        def write():
            if state.args.async_save:
                results.folder.save_later(content, best)
            else:
                results.folder.save(content, best)

        utils.on_first_process(write)


def epoch_metrics(state: TrainingState, metrics: dict[str, dict[str, float]]) -> dict:
    """The line of log.txt for the epoch that has just ended."""
    line = {
        f"{kind}_{name}": value for kind, stats in metrics.items() for name, value in stats.items()
    }
    learner = state.learner
    if learner.sparsifier.masks:
        line["sparsity"] = learner.sparsifier.masks.sparsity()
    line["epoch"] = state.progress.epoch - 1
    line["n_parameters"] = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    return line


def epoch_in_words(line: dict[str, float]) -> str:
    """An epoch as a terminal shows it."""
    parts = [f"epoch {line['epoch']}: training loss {line['train_loss']:.4f}"]
    if "test_loss" in line:
        parts.append(f"validation loss {line['test_loss']:.4f}")
    if "test_acc1" in line:
        parts.append(f"top-1 {line['test_acc1']:.2f} %")
    if "test_ema_acc1" in line:
        parts.append(f"moving average {line['test_ema_acc1']:.2f} %")
    parts.append(f"learning rate {line['train_lr']:.2g}")
    parts.append(f"{line['images_per_second']:,.0f} images/s")
    return ", ".join(parts)
