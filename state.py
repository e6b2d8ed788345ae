"""`TrainingState`: everything that a checkpoint holds and a resumed run needs."""

import argparse
import math

import torch
from timm.optim import create_optimizer
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3

import utils
from engine import training_logger
from utils import UserError, first_line

DROPPED_OPTIMIZERS = ("nvnovograd", "fusedmomentum")  # in timm 0.3.2, which DeiT used, and in no current release

#: Optimizers that torch computes in one pass: AdamW takes a quarter of the time on CPUs, and on GPUs the float16 loss
#: scaler need not wait for them.
FUSED = ("adam", "adamw", "sgd", "nesterov", "momentum")


class TrainingState:
    """Model, masks, moving average, optimizer, schedule and loss scaler, and how far the training has come.

    Made in two steps, since a mistake in the arguments of the optimizer should show before the model is evaluated and
    pruned: `start` takes what pruning gave.

    masks: a `sparsity_factory.Masks`, or None for a dense run; `pruner` says what made them.
    epoch: the epoch to train next, or in training. epoch_step: its steps so far, and logger: their metrics.
    step: optimizer steps taken in all. max_accuracy: the best top-1 so far, in percent, and best: whose it is, `model`
    or `model_ema`. bad_images: a bool tensor (images,), the training images that could not be read, or None.
    accuracy: top-1 in percent by its name (dense, pruned).
    """

    def __init__(self, model, args, device, bad_images=None):
        self.model, self.args = model, args
        self.masks = self.pruner = self.ema = None
        self.epoch, self.epoch_step, self.logger = args.start_epoch, 0, training_logger()
        self.step, self.max_accuracy, self.best = 0, -1.0, "model"
        self.accuracy, self.bad_images = {}, bad_images
        lr = args.lr if args.unscale_lr else args.lr * self._images_per_step() / 512
        fused = {"fused": True} if args.opt in FUSED else None
        settings = argparse.Namespace(**{**vars(args), "lr": lr, "opt_args": fused})
        try:
            self.optimizer = create_optimizer(settings, model)
            self.lr_scheduler, _ = create_scheduler(settings, self.optimizer)
        except Exception as error:  # every optimizer has its own way to refuse
            dropped = args.opt.rpartition("_")[2] in DROPPED_OPTIMIZERS
            reason = "timm no longer has this optimizer" if dropped else first_line(error)
            raise UserError(f"--opt {args.opt} --sched {args.sched}: {reason}") from None
        if self.lr_scheduler and self.epoch:
            self.lr_scheduler.step(self.epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=utils.choose_amp(args.amp, device) == torch.float16)

    def start(self, masks, pruner) -> None:
        """Begins with the model as it is now: pruned by `masks`, if any."""
        self.masks, self.pruner = masks, pruner
        if self.args.model_ema:
            device = "cpu" if self.args.model_ema_force_cpu else None
            self.ema = ModelEmaV3(self.model, self.args.model_ema_decay, device=device)

    def end_step(self) -> None:
        self.epoch_step, self.step = self.epoch_step + 1, self.step + 1

    def share_bad_images(self) -> list[int]:
        """The images that any process could not read; from here on, all leave them out. Every process calls it.

        Raises UserError when they are more than `--skip-bad-images` allows.
        """
        if self.bad_images is None:
            return []
        found = utils.gather_objects(self.bad_images.nonzero().flatten().tolist())
        bad = sorted(set().union(*found))
        self.bad_images[bad] = True
        if len(bad) > self.args.skip_bad_images:
            raise UserError(f"{len(bad)} training images cannot be read, named above; expected at most "
                            f"--skip-bad-images {self.args.skip_bad_images}")
        return bad

    def end_epoch(self, accuracies: list[float]) -> bool:
        """Moves on to the next epoch; true when one of the accuracies is the best so far.

        accuracies: top-1 in percent of the model and, where there is one, of its moving average.
        """
        self.epoch, self.epoch_step, self.logger = self.epoch + 1, 0, training_logger()
        if self.lr_scheduler:
            self.lr_scheduler.step(self.epoch, accuracies[0])
        improved = max(accuracies) > self.max_accuracy
        if improved:
            self.max_accuracy = max(accuracies)
            self.best = ("model", "model_ema")[accuracies.index(self.max_accuracy)]
        return improved

    def state_dict(self) -> dict:
        """DeiT's keys and this project's, in tensors, numbers, strings and plain containers only.

        Every process has to call it, since each has its own part of the metrics.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self._scheduler_state(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,  # the last whole one, as in DeiT
            "step": self.step,
            "images": self.epoch_step * self._images_per_step(),  # seen in the epoch that is not whole
            "metrics": utils.gather_objects(self.logger.state_dict()) if self.epoch_step else [],
            "bad_images": self.share_bad_images(),
            "max_accuracy": self.max_accuracy,
            "best": self.best,
            "accuracy": self.accuracy,
            "args": vars(self.args),
        }
        if self.ema:
            state["model_ema"] = self.ema.module.state_dict()
        if self.masks:
            state |= {"masks": self.masks.state_dict(), "pruner": self.pruner}
        return state

    def resume(self, checkpoint: dict, source: str) -> None:
        """Continues where the checkpoint was written. Model and masks are loaded already.

        Within an epoch, a run with other processes or batches goes on after the images that were seen.
        Raises UserError naming `source` when its training state is not of this run's kind.
        """
        saved = checkpoint.get("args")  # DeiT's own checkpoints have a Namespace
        saved = saved if isinstance(saved, dict) else getattr(saved, "__dict__", {})
        for name in ("opt", "sched"):
            theirs, ours = saved.get(name), getattr(self.args, name)
            if theirs not in (None, ours):
                raise UserError(f"--{name} {ours}: {source} is of a run with --{name} {theirs}")
        try:
            self._load_optimizer(checkpoint["optimizer"])
            if self.lr_scheduler:
                self._load_scheduler(checkpoint["lr_scheduler"])
            if self.ema:
                self.ema.module.load_state_dict(checkpoint.get("model_ema", checkpoint["model"]))
            if checkpoint.get("scaler"):
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.epoch, self.step = int(checkpoint["epoch"]) + 1, int(checkpoint.get("step", 0))
            self.epoch_step = math.ceil(int(checkpoint.get("images", 0)) / self._images_per_step())
            if min(self.epoch, self.step, self.epoch_step) < 0:
                raise ValueError("a negative epoch or step")
            metrics = checkpoint.get("metrics", [])
            if len(metrics) == utils.world_size():
                self.logger.load_state_dict(metrics[utils.rank()])
            self.max_accuracy = float(checkpoint.get("max_accuracy", -1.0))
            self.best = str(checkpoint.get("best", "model"))
            self.accuracy = {str(name): float(value) for name, value in checkpoint.get("accuracy", {}).items()}
            if self.bad_images is not None:
                self.bad_images[[int(index) for index in checkpoint.get("bad_images", [])]] = True
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, OverflowError) as error:
            raise UserError(f"{source}: its training state does not fit this run ({first_line(error)})") from None

    def _images_per_step(self) -> int:
        return self.args.batch_size * self.args.accum_iter * utils.world_size()

    def _load_optimizer(self, state: dict) -> None:
        """Loads the optimizer's state; torch itself looks at the number of parameters only."""
        _check_alike(state["param_groups"], self.optimizer.state_dict()["param_groups"], "param_groups")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, values in state["state"].items():
            shape = parameters[index].shape
            for name, value in values.items():
                # One value for each weight, or fewer: a count of steps, Adafactor's row and column means.
                if isinstance(value, torch.Tensor) and value.shape != shape and value.dim() >= max(len(shape), 1):
                    raise ValueError(f"{name} of parameter {index} is {tuple(value.shape)}, expected {tuple(shape)}")
        self.optimizer.load_state_dict(state)

    def _scheduler_state(self) -> dict | None:
        if not self.lr_scheduler:
            return None
        state = self.lr_scheduler.state_dict()
        if plateau := getattr(self.lr_scheduler, "lr_scheduler", None):  # timm leaves out what it has counted
            counted = {name: value for name, value in plateau.state_dict().items() if isinstance(value, int | float)}
            state = {**state, "plateau": counted}
        return state

    def _load_scheduler(self, state: dict) -> None:
        ours = self._scheduler_state()
        _check_alike(state, ours, "lr_scheduler")
        state = {**ours, **{name: value for name, value in state.items() if name in ours}}
        if plateau := getattr(self.lr_scheduler, "lr_scheduler", None):
            plateau.load_state_dict(state.pop("plateau"))
        self.lr_scheduler.load_state_dict(state)


def _check_alike(theirs, ours, where: str) -> None:
    """Raises ValueError where the types or lengths in `theirs` are not those of `ours`; all numbers are of one type.

    Entries that only one of them has are let pass: releases of torch and timm add and remove some.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours.keys() & theirs.keys():
            _check_alike(theirs[key], ours[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            raise ValueError(f"{where} has {len(theirs)} entries, expected {len(ours)}")
        for number, pair in enumerate(zip(theirs, ours, strict=True)):
            _check_alike(*pair, f"{where}[{number}]")
    elif type(ours) is not type(theirs) and not all(
            value is None or isinstance(value, int | float) for value in (ours, theirs)):
        raise ValueError(f"{where} is of type {type(theirs).__name__}, expected {type(ours).__name__}")
