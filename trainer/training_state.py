"""`TrainingState`: everything that a checkpoint holds and a resumed run needs."""

import argparse
import functools
import math
import uuid

import timm
import torch
from timm.optim import create_optimizer, muon
from timm.scheduler import create_scheduler

import utils
from engine import Learner, Progress
from models import compile_model
from sparsity_factory import Sparsifier, __version__, check_masks, unit_counts
from sparsity_factory.masks import dense_shapes
from utils import Compute, UserError, first_line, log

from .changes import Reference
from .moving_average import MovingAverage

#: Optimizers of timm 0.3.2, which DeiT used, that no current release has.
DROPPED_OPTIMIZERS = ("nvnovograd", "fusedmomentum")

#: Optimizers that torch computes in one pass: AdamW takes a quarter of the time on CPUs, and on
#: GPUs the float16 loss scaler need not wait for them.
FUSED = ("adam", "adamw", "sgd", "nesterov", "momentum")

#: Entries of an optimizer's parameter groups that the arguments decide, also of a resumed run.
SETTINGS = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum")

#: What the plateau schedule counts, by ReduceLROnPlateau's names.
COUNTED = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")

#: What a damaged or foreign training state raises while it is loaded.
DAMAGED = (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, OverflowError)

#: The iterations of Muon and its kin, in bfloat16 unless told otherwise.
NEWTON_SCHULZ = muon.zeropower_via_newtonschulz


class TrainingState:
    """What is trained, where the training stands, and the learning-rate schedule.

    learner, progress: see `engine`.
    run: the id of the run, which stays the same when it is resumed; the first process writes its
        own.
    resumed: whether the state is that of a checkpoint.
    max_accuracy, best: the best top-1 so far in percent, and the weights that had it: `model` or
        `model_ema`.
    accuracy: top-1 in percent by name (dense, pruned).
    bad_images: a bool tensor (images,) that is True for training images that cannot be read, or
        None.
    dense_teacher: the `origin` of the dense teacher, or None.
    classes: the labels of the classes by name, if the data have names.
    reference: the predictions that those of the trained model are compared with, or None.

    Raises UserError for an optimizer or a schedule that timm refuses.
    """

    def __init__(self, model, sparsifier: Sparsifier, args, compute: Compute, bad_images=None):
        self.args = args
        self.bad_images = bad_images
        self.run = uuid.uuid4().hex[:8]
        self.resumed = False
        self.progress = Progress(args.seed, args.start_epoch)
        self.max_accuracy = -1.0
        self.best = "model"
        self.accuracy = {}
        self.dense_teacher: dict | None = None
        self.classes: dict[str, int] | None = None
        self.reference: Reference | None = None
        self._rate_of: int | None = None  # the epoch whose learning rate a run with a rewind has

        choose_muon_dtype(compute.device)
        optimizer = self._build_optimizer(model)
        if self.lr_scheduler and self.progress.epoch:
            self.lr_scheduler.step(self.progress.epoch)

        ema = None
        if args.model_ema:
            device = "cpu" if args.model_ema_force_cpu else None
            ema = MovingAverage(model, args.model_ema_decay, device=device)
            if args.compile:
                compile_model(ema.module, args.compile_mode)

        scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype == torch.float16)
        sparsifier.attach(optimizer, [ema.module] if ema else [])
        self.learner = Learner(model, optimizer, sparsifier, ema, scaler)

    def _build_optimizer(self, model) -> torch.optim.Optimizer:
        """timm's optimizer for `--opt`. Sets `lr_scheduler` too; None is a constant rate."""
        args = self.args
        lr = args.lr if args.unscale_lr else args.lr * self._images_per_step() / 512
        fused = {"fused": True} if args.opt in FUSED else None
        layer_decay = args.layer_decay if args.layer_decay < 1 else None
        own = {"lr": lr, "layer_decay": layer_decay, "opt_args": fused}
        settings = argparse.Namespace(**{**vars(args), **own})
        try:
            optimizer = create_optimizer(settings, model)
            self.lr_scheduler, _ = create_scheduler(settings, optimizer)
        except Exception as error:  # every optimizer refuses in its own way
            dropped = args.opt.rpartition("_")[2] in DROPPED_OPTIMIZERS
            reason = "timm no longer has this optimizer" if dropped else first_line(error)
            raise UserError(f"--opt {args.opt} --sched {args.sched}: {reason}") from None

        # Older releases of timm take an unknown name for a constant rate
        if self.lr_scheduler is None and args.sched != "none":
            raise UserError(f"--sched {args.sched}: timm {timm.__version__} has no such schedule")
        return optimizer

    def share_bad_images(self) -> list[int]:
        """The images that any process could not read. From here on, all processes leave them out.

        Every process calls it. Raises UserError for more than `--skip-bad-images` allows.
        """
        if self.bad_images is None:
            return []
        found = utils.gather_objects(self.bad_images.nonzero().flatten().tolist())
        bad = sorted(set().union(*found))
        self.bad_images[bad] = True
        if len(bad) > self.args.skip_bad_images:
            raise UserError(
                f"{len(bad)} training images cannot be read, named above; expected at most "
                f"--skip-bad-images {self.args.skip_bad_images}"
            )
        return bad

    def end_epoch(self, accuracies: list[float]) -> bool:
        """Moves on to the next epoch; returns whether an accuracy is the best so far.

        Only epochs at the final sparsity count.

        accuracies: top-1 in percent of the model and, if there is one, of its moving average; none
            if the epoch was not evaluated.
        """
        self.progress.end_epoch()
        if self.lr_scheduler and self._rewinds:
            self.follow_schedule()
        elif self.lr_scheduler:
            self.lr_scheduler.step(self.progress.epoch, accuracies[0] if accuracies else None)
        final = self.learner.sparsifier.final
        improved = final and max(accuracies, default=-1.0) > self.max_accuracy
        if improved:
            self.max_accuracy = max(accuracies)
            self.best = ("model", "model_ema")[accuracies.index(self.max_accuracy)]
        return improved

    def follow_schedule(self) -> None:
        """Sets the learning rate of the next step, if a rewind may have changed its place."""
        if self.lr_scheduler and self._rewinds and self.rate_epoch() != self._rate_of:
            self._rate_of = self.rate_epoch()
            self.lr_scheduler.step(self._rate_of)

    def rate_epoch(self) -> int:
        """The epoch of the learning-rate schedule: that of the training, unless a run rewinds."""
        if not self._rewinds:
            return self.progress.epoch
        sparsifier = self.learner.sparsifier
        return self.args.start_epoch + sparsifier.schedule_step // sparsifier.steps.epoch

    @property
    def _rewinds(self) -> bool:
        return self.learner.sparsifier.recipe.rewind is not None

    def weights(self) -> dict[str, dict]:
        """The state dicts of the model and its moving average, by their keys in checkpoints."""
        weights = {"model": self.learner.model.state_dict()}
        if self.learner.ema:
            weights["model_ema"] = self.learner.ema.module.state_dict()
        return weights

    def check_masks(self) -> None:
        """Raises PruningError if a pruned weight is not zero, or if masks are not of their pattern.

        Masks that miss the budget are logged.
        """
        sparsifier = self.learner.sparsifier
        for weights in self.weights().values():
            check_masks(weights, sparsifier.masks)
        if sparsifier.final:
            check_masks({}, sparsifier.masks, sparsifier.recipe, strict=False)

    def state_dict(self) -> dict:
        """DeiT's keys and this project's, in tensors, numbers, strings and plain containers only.

        Every process has to call it, since each has its own part of the metrics.
        """
        learner = self.learner
        progress = self.progress
        metrics = utils.gather_objects(progress.logger.state_dict()) if progress.epoch_step else []
        state = {
            "version": __version__,
            "run": self.run,
            **self.weights(),
            "optimizer": learner.optimizer.state_dict(),
            "lr_scheduler": self._scheduler_state(),
            "scaler": learner.scaler.state_dict(),
            "epoch": progress.epoch - 1,  # the last whole one, as in DeiT
            "step": progress.step,
            "images": progress.images,  # seen in the epoch that is not whole
            "metrics": metrics,
            "bad_images": self.share_bad_images(),
            "max_accuracy": self.max_accuracy,
            "best": self.best,
            "accuracy": self.accuracy,
            "args": vars(self.args),
        }

        if self.dense_teacher:
            state["dense_teacher"] = self.dense_teacher
        if self.classes:
            state["classes"] = self.classes
        if self.reference:
            state["reference"] = self.reference.state_dict()
        if dense_shapes(learner.model):
            state["shape"] = unit_counts(learner.model)

        sparsifier = learner.sparsifier
        if sparsifier.masks:
            recipe = sparsifier.recipe
            made_by = {
                "name": recipe.pruner,
                "sparsity": recipe.sparsity,
                "custom_config": recipe.custom_config,
            }
            state |= {
                "masks": sparsifier.masks.state_dict(),
                "pruner": made_by,
                "pruning": sparsifier.state_dict(),
            }
        return state

    def resume(self, checkpoint: dict, source: str) -> None:
        """Continues where the checkpoint was written. Model and masks are loaded already.

        Within an epoch, a run with other processes or batches continues after the images that were
        seen. Raises UserError, naming `source`, if its training state does not fit this run.
        """
        try:
            self._load_optimizer(checkpoint["optimizer"])
            self._load_progress(checkpoint)
            self._load_rest(checkpoint)
            self.run = str(checkpoint.get("run", self.run))
            self.resumed = True
        except DAMAGED as error:
            raise UserError(
                f"{source}: its training state does not fit this run ({first_line(error)})"
            ) from None

    def _load_progress(self, checkpoint: dict) -> None:
        """Sets the place in the training, and the learning rate there."""
        progress = self.progress
        progress.epoch = int(checkpoint["epoch"]) + 1
        progress.step = int(checkpoint.get("step", 0))
        progress.images = int(checkpoint.get("images", 0))
        progress.epoch_step = math.ceil(progress.images / self._images_per_step())
        if min(progress.epoch, progress.step, progress.images) < 0:
            raise ValueError("a negative epoch or step")

        progress.logger.load_state_dict(own_metrics(checkpoint.get("metrics", [])))
        if self.lr_scheduler:
            groups = checkpoint["optimizer"]["param_groups"]
            self._load_scheduler(checkpoint["lr_scheduler"], groups)

    def _load_rest(self, checkpoint: dict) -> None:
        """Loads the moving average, the scaler, the accuracies and the images to leave out."""
        learner = self.learner
        if learner.ema:
            learner.ema.module.load_state_dict(checkpoint.get("model_ema", checkpoint["model"]))
        if checkpoint.get("scaler"):
            learner.scaler.load_state_dict(checkpoint["scaler"])

        self.max_accuracy = float(checkpoint.get("max_accuracy", -1.0))
        self.best = str(checkpoint.get("best", "model"))
        accuracy = checkpoint.get("accuracy", {})
        self.accuracy = {str(name): float(value) for name, value in accuracy.items()}
        if "reference" in checkpoint:
            self.reference = Reference.of(checkpoint["reference"])

        if self.bad_images is not None:
            self.bad_images[[int(index) for index in checkpoint.get("bad_images", [])]] = True

    def _images_per_step(self) -> int:
        return self.args.batch_size * self.args.accum_iter * utils.world_size()

    def _load_optimizer(self, state: dict) -> None:
        """Loads the optimizer's state, except for what the arguments decide."""
        optimizer = self.learner.optimizer
        own = optimizer.state_dict()["param_groups"]
        _check_alike(state["param_groups"], own, "param_groups")
        self._check_shapes(state["state"])

        groups = []
        for saved, ours in zip(state["param_groups"], own, strict=True):
            decided = {name: ours[name] for name in SETTINGS if name in ours}
            groups.append({**saved, **decided})

        before = state["param_groups"][0].get("initial_lr")
        after = own[0].get("initial_lr")
        if before is not None and before != after:
            log(
                f"The learning rate is {after:.6g} instead of {before:.6g}, for "
                f"{self._images_per_step()} images a step"
            )
        optimizer.load_state_dict({**state, "param_groups": groups})

    def _check_shapes(self, state: dict[int, dict]) -> None:
        """Raises ValueError for a value of the optimizer that does not fit its parameter.

        torch itself only counts the parameters. A value has one number for each weight, or fewer
        dimensions: a count of steps, or Adafactor's row and column means.
        """
        groups = self.learner.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        for index, values in state.items():
            shape = parameters[index].shape
            for name, value in values.items():
                if not isinstance(value, torch.Tensor) or value.shape == shape:
                    continue
                if value.dim() >= max(len(shape), 1):
                    raise ValueError(
                        f"{name} of parameter {index} is {tuple(value.shape)}, expected "
                        f"{tuple(shape)}"
                    )

    def _scheduler_state(self) -> dict | None:
        if not self.lr_scheduler:
            return None
        state = self.lr_scheduler.state_dict()

        # timm leaves out most of what the plateau schedule has counted.
        if plateau := getattr(self.lr_scheduler, "lr_scheduler", None):
            counts = plateau.state_dict()
            state["plateau"] = {name: value for name, value in counts.items() if name in COUNTED}
            state["restore_lr"] = self.lr_scheduler.restore_lr
        return state

    def _load_scheduler(self, state: dict, groups: list[dict]) -> None:
        """Sets the learning rate of the epoch; for `plateau` also what it has counted.

        groups: the parameter groups of the saved optimizer.
        """
        _check_alike(state, self._scheduler_state(), "lr_scheduler")
        epoch = self.rate_epoch()
        plateau = getattr(self.lr_scheduler, "lr_scheduler", None)
        if plateau:
            plateau.load_state_dict({name: state["plateau"][name] for name in COUNTED})

        # The rate follows from the epoch and the arguments.
        if not plateau or epoch <= self.lr_scheduler.warmup_t:
            if epoch:
                self.lr_scheduler.step(epoch)
            return

        # The rate of `plateau` is the saved one, scaled if the arguments now say another base rate.
        own = self.learner.optimizer.param_groups
        scales = [
            base_rate(ours) / base_rate(saved) for ours, saved in zip(own, groups, strict=True)
        ]
        for group, saved, scale in zip(own, groups, scales, strict=True):
            group["lr"] = saved["lr"] * scale
        if state.get("restore_lr"):
            pairs = zip(state["restore_lr"], scales, strict=True)
            self.lr_scheduler.restore_lr = [rate * scale for rate, scale in pairs]


def base_rate(group: dict) -> float:
    """The learning rate of a parameter group before a schedule changes it."""
    return group["initial_lr"] * group.get("lr_scale", 1.0)


def choose_muon_dtype(device: torch.device) -> None:
    """Makes timm's Muon orthogonalize in float32 if the device has no bfloat16 in hardware.

    A CPU with AVX2 alone takes thirteen times as long in bfloat16. timm's optimizers have no
    argument for it.
    """
    native = utils.choose_amp("auto", device) == torch.bfloat16
    in_float32 = functools.partial(NEWTON_SCHULZ, dtype=torch.float32)
    muon.zeropower_via_newtonschulz = NEWTON_SCHULZ if native else in_float32


def own_metrics(parts: list[dict]) -> dict:
    """The metrics with which this process resumes, from those of all processes.

    They are its own; or, if there were other processes then, the sum on the first one and nothing
    on the others.
    """
    if len(parts) == utils.world_size():
        return parts[utils.rank()]
    if not utils.is_main_process():
        return {}

    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: [sum(part[name][place] for part in parts if name in part) for place in (0, 1)]
        for name in names
    }


def _check_alike(theirs, ours, where: str) -> None:
    """Raises ValueError if a type or length in `theirs` is not that of `ours`.

    All numbers count as one type. Entries that only one of them has are let pass: releases of torch
    and timm add and remove some.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours.keys() & theirs.keys():
            _check_alike(theirs[key], ours[key], f"{where}.{key}")
        return

    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            raise ValueError(f"{where} has {len(theirs)} entries, expected {len(ours)}")
        for number, pair in enumerate(zip(theirs, ours, strict=True)):
            _check_alike(*pair, f"{where}[{number}]")
        return

    numbers = all(value is None or isinstance(value, int | float) for value in (ours, theirs))
    if type(ours) is not type(theirs) and not numbers:
        raise ValueError(
            f"{where} is of type {type(theirs).__name__}, expected {type(ours).__name__}"
        )
