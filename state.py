"""`TrainingState`: everything that a checkpoint holds and a resumed run needs."""

import argparse

import torch
from timm.optim import create_optimizer
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3

import utils
from utils import UserError, first_line


class TrainingState:
    """Model, masks, moving average, optimizer, schedule and loss scaler, and how far the training has come.

    Made in two steps, since a mistake in the arguments of the optimizer should show before the model is evaluated and
    pruned: `start` takes what pruning gave.

    masks: a `sparsity_factory.Masks`, or None for a dense run; `pruner` says what made them.
    epoch: the next epoch to train. step: optimizer steps taken. max_accuracy: the best top-1 so far, in percent, and
    best: whose it is, `model` or `model_ema`.
    """

    def __init__(self, model, args, device):
        self.model, self.args = model, args
        self.masks = self.pruner = self.ema = None
        self.epoch, self.step, self.max_accuracy, self.best = args.start_epoch, 0, -1.0, "model"
        lr = args.lr if args.unscale_lr else args.lr * args.batch_size * utils.world_size() / 512
        settings = argparse.Namespace(**{**vars(args), "lr": lr})
        try:
            self.optimizer = create_optimizer(settings, model)
            self.lr_scheduler, _ = create_scheduler(settings, self.optimizer)
        except Exception as error:  # every optimizer has its own way to refuse
            raise UserError(f"--opt {args.opt} --sched {args.sched}: {first_line(error)}") from None
        if self.lr_scheduler and self.epoch:
            self.lr_scheduler.step(self.epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=utils.choose_amp(args.amp, device) == torch.float16)

    def start(self, masks, pruner) -> None:
        """Begins with the model as it is now: pruned by `masks`, if any."""
        self.masks, self.pruner = masks, pruner
        if self.args.model_ema:
            device = "cpu" if self.args.model_ema_force_cpu else None
            self.ema = ModelEmaV3(self.model, self.args.model_ema_decay, device=device)

    def end_epoch(self, steps: int, accuracies: list[float]) -> bool:
        """Moves on to the next epoch; true when one of the accuracies is the best so far.

        accuracies: top-1 in percent of the model and, where there is one, of its moving average.
        """
        self.epoch, self.step = self.epoch + 1, self.step + steps
        if self.lr_scheduler:
            self.lr_scheduler.step(self.epoch, accuracies[0])
        improved = max(accuracies) > self.max_accuracy
        if improved:
            self.max_accuracy = max(accuracies)
            self.best = ("model", "model_ema")[accuracies.index(self.max_accuracy)]
        return improved

    def state_dict(self) -> dict:
        """DeiT's keys and this project's, in tensors, numbers, strings and plain containers only."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler else None,
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.step,
            "max_accuracy": self.max_accuracy,
            "best": self.best,
            "args": vars(self.args),
        }
        if self.ema:
            state["model_ema"] = self.ema.module.state_dict()
        if self.masks:
            state |= {"masks": self.masks.state_dict(), "pruner": self.pruner}
        return state

    def resume(self, checkpoint: dict, source: str) -> None:
        """Continues after the epoch at whose end the checkpoint was written. Model and masks are loaded already.

        Raises UserError naming `source` when its training state is not of this run's kind.
        """
        saved = checkpoint.get("args")  # DeiT's own checkpoints have a Namespace
        saved = saved if isinstance(saved, dict) else getattr(saved, "__dict__", {})
        for name in ("opt", "sched"):
            theirs, ours = saved.get(name), getattr(self.args, name)
            if theirs not in (None, ours):
                raise UserError(f"--{name} {ours}: {source} is of a run with --{name} {theirs}")
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if self.lr_scheduler:
                self.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
            if self.ema:
                self.ema.module.load_state_dict(checkpoint.get("model_ema", checkpoint["model"]))
            if checkpoint.get("scaler"):
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.epoch = int(checkpoint["epoch"]) + 1
            self.step = int(checkpoint.get("step", 0))
            self.max_accuracy = float(checkpoint.get("max_accuracy", -1.0))
            self.best = str(checkpoint.get("best", "model"))
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"{source}: its training state does not fit this run ({first_line(error)})") from None
