"""Reports a run to TensorBoard and Weights & Biases if it is asked to; both are optional."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from utils import UserError, first_line


class Tracker(Protocol):
    """What every tracker can do."""

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Reports numbers by name; `train/loss` is in the group `train`."""

    def finish(self, pictures: Mapping[str, Path]) -> None:
        """Reports the pictures of the whole run, and closes."""


class TensorBoard:
    """Event files in `tensorboard/` of the output folder.

    A resumed run replaces the events of epochs that it repeats.
    """

    def __init__(self, folder: Path, epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=epoch or None)
        self._epoch = epoch

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()
        self._epoch = epoch

    def finish(self, pictures: Mapping[str, Path]) -> None:
        for name, path in pictures.items():
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self._writer.add_image(
                name.removesuffix(".png"), pixels, self._epoch, dataformats="HWC"
            )
        self._writer.close()


class WandB:
    """A run of Weights & Biases in the project that WANDB_PROJECT names.

    Each start of a resumed run is a run of one group.
    """

    def __init__(self, folder: str, settings: Mapping):
        import wandb

        self._wandb = wandb
        self._epoch = 0
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sparsify-deit"),
                group=folder or None,
                dir=folder or None,
                config=dict(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(f"--wandb: {first_line(error)}") from None

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._run.log(dict(values), step=epoch)
        self._epoch = epoch

    def finish(self, pictures: Mapping[str, Path]) -> None:
        images = {
            name.removesuffix(".png"): self._wandb.Image(str(path))
            for name, path in pictures.items()
        }
        if images:
            self._run.log(images, step=self._epoch)
        self._run.finish()


def require(package: str) -> None:
    """Raises UserError if a package that the flag of the same name needs is not installed."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"--{package}: the package {package} is not installed; pip install {package}"
        ) from None


def build_trackers(args, epoch: int) -> list[Tracker]:
    """The trackers that the arguments ask for. `epoch`: the one that the run starts with."""
    trackers = []
    if args.tensorboard:
        trackers.append(TensorBoard(Path(args.output_dir), epoch))
    if args.wandb:
        trackers.append(WandB(args.output_dir, vars(args)))
    return trackers
