"""What a run leaves in its folder for people to look at: tables, pictures and a summary, beside its
checkpoints.
"""

import functools
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import utils
from sparsity_factory import (
    Kept,
    Recipe,
    multiply_adds,
    sparse_multiply_adds,
    sparsity_csv,
    sparsity_yaml,
)
from sparsity_factory.multiply_adds import ATTENTION
from utils import Compute

from . import plots
from .run_folder import CHECKPOINT, RunFolder, read_log
from .trackers import Tracker, build_trackers

SPARSITY_CSV = "sparsity.csv"
SPARSITY_YAML = "sparsity.yaml"
SPARSITY_PNG = "sparsity.png"
TRAINING_PNG, SUMMARY = "training.png", "summary.md"
# seconds: the picture of the training follows a long run, and a short one draws it once
REDRAW_AFTER = 60


def open_results(
    args, recipe: Recipe, epoch: int, train_loader, val_loader, compute: Compute
) -> "Results":
    """The results of a run: its folder, locked, and its trackers, both on the first process only.

    epoch: the one that the run starts with.
    Raises UserError when the folder cannot be had.
    """
    processes, target = utils.world_size(), recipe.sparsity
    title = f"{args.model}, {recipe.pruner or 'dense'}" + (
        "" if target is None else f" at {100 * target:g} %"
    )
    launcher = (
        "python"
        if processes == 1
        else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
    )
    facts = {
        "command": f"{launcher} {args.command}",
        "model": f"{args.model}, {args.input_size} x {args.input_size}",
        "data": f"{args.data_path or 'the built-in sample'}, {images_in(train_loader):,} training "
        f"and {images_in(val_loader):,} validation images",
        "computed": f"on {compute.in_words()}, by {processes} process{'es' * (processes > 1)}",
        "versions": utils.versions(compute.device),
    }
    results = Results(title, facts, target, epoch)

    def open_both():
        if args.output_dir and args.eval and Path(args.output_dir, CHECKPOINT).exists():
            utils.log(
                f"{args.output_dir} holds a training run: the results of this evaluation are not "
                "written"
            )
        elif args.output_dir:
            results.folder = RunFolder(args.output_dir)
        results.trackers = build_trackers(args, epoch)

    utils.on_first_process(open_both)
    return results


def images_in(loader) -> int:
    stream = getattr(loader.dataset, "stream", None)
    return stream.reader.num_samples if stream else len(loader.dataset)


def first_process_only(method):
    """Decorates a method that every process calls and the first one runs; its errors are raised on
    all.
    """

    @functools.wraps(method)
    def call(*args):
        utils.on_first_process(lambda: method(*args))

    return call


class Results:
    """Writes the files and reports to the trackers. Every process calls the methods; only the first
    has a folder.

    Everything is made from the model, its masks, log.txt and the accuracies that a checkpoint
    holds: a run that was interrupted leaves the same as one that was not.

    title: heads the pictures. facts: for the summary, by name. target: the sparsity that was asked
    for, if any.
    epoch: the one that the run starts with.
    """

    def __init__(
        self, title: str, facts: Mapping[str, str], target: float | None = None, epoch: int = 0
    ):
        self.title = title
        self.facts = facts
        self.target = target
        self.epoch = epoch
        self.folder: RunFolder | None = None
        self.trackers: list[Tracker] = []
        self._drawn = time.monotonic()

    @first_process_only
    def start(self, model, kept: Kept, accuracy: dict[str, float], image: torch.Tensor) -> None:
        """Takes what is known before the training, and writes what is kept of each layer.

        kept: from `sparsity_rows`, also of a dense model. accuracy: top-1 in percent by name.
        image: one such as the model takes, for which multiply-adds are counted.
        """
        self.kept = kept
        self.accuracy = accuracy
        pruned = kept.prunable.kept < kept.prunable.total
        if self.folder:
            self.multiply_adds = multiply_adds(model, image)
            # Of an earlier run
            for name in (SPARSITY_CSV, SPARSITY_YAML, SPARSITY_PNG, TRAINING_PNG, SUMMARY):
                (self.folder.path / name).unlink(missing_ok=True)
            if pruned:
                self._write_sparsity()
        values = {f"accuracy/{name}": value for name, value in accuracy.items()}
        values |= {
            f"sparsity/{row.name}": row.sparsity for row in (*kept.layers, kept.prunable) if pruned
        }
        self._track(values, self.epoch)

    @first_process_only
    def log_epoch(self, line: dict[str, float], images_per_second: float) -> None:
        """Adds an epoch to log.txt, and reports it to the trackers."""
        values = {
            re.sub("^(train|test|test_ema)_(?!ema_)", r"\1/", name): value
            for name, value in line.items()
        }
        self._track({**values, "images_per_second": images_per_second}, values.pop("epoch"))
        if self.folder:
            self.folder.log_epoch(line)
            if time.monotonic() - self._drawn > REDRAW_AFTER:
                self._draw_training()

    @first_process_only
    def finish(self, accuracy: dict[str, float], kept: Kept) -> None:
        """Writes the picture of the training, the summary, and what is kept of each layer, where
        that has changed.

        accuracy: all that was measured. kept: of the model as it is now.
        """
        changed = kept != self.kept
        self.kept = kept
        captions = {
            SPARSITY_PNG: "Sparsity of each layer",
            TRAINING_PNG: "Loss, accuracy and learning rate by epoch",
        }
        pictures = []
        if self.folder:
            if changed:
                self._write_sparsity()
            self._draw_training()
            pictures = [name for name in captions if (self.folder.path / name).exists()]
            self._write(
                SUMMARY,
                self._summary(accuracy, {name: captions[name] for name in pictures}).encode(),
            )
            names = sorted(path.name for path in self.folder.path.iterdir() if path.is_file())
            utils.log(
                f"Written to {self.folder.path}: "
                f"{', '.join(name for name in names if name[0] != '.')}"
            )
        for tracker in self.trackers:
            tracker.finish({name: self.folder.path / name for name in pictures})

    def _write_sparsity(self) -> None:
        overall, target = self.kept.prunable.sparsity, self.target
        layers = {row.name: row.sparsity for row in self.kept.layers}
        label = (
            f"all layers, {100 * overall:.4g} %"
            if target is None
            else f"target, {100 * target:.4g} %"
        )
        comment = (
            f"{self.title}: the fraction of each layer that is pruned, or n:m as [n, m].\n"
            "With --pruner custom --custom-config and this file, each layer keeps as many weights "
            "again."
        )
        self._write(SPARSITY_CSV, sparsity_csv(self.kept, self.multiply_adds).encode())
        self._write(SPARSITY_YAML, sparsity_yaml(self.kept, comment).encode())
        self._write(
            SPARSITY_PNG,
            plots.png(
                plots.sparsity_bars(
                    layers, overall if target is None else target, label, self.title
                )
            ),
        )

    def _draw_training(self) -> None:
        if lines := read_log(self.folder.path):
            self._write(
                TRAINING_PNG, plots.png(plots.training_curves(lines, self.accuracy, self.title))
            )
            self._drawn = time.monotonic()

    def _summary(self, accuracy: dict[str, float], pictures: dict[str, str]) -> str:
        _, prunable, whole = self.kept
        sparse = sparse_multiply_adds(self.kept, self.multiply_adds)
        counts = [
            ("parameters", whole.total, whole.kept),
            ("of these prunable", prunable.total, prunable.kept),
            ("multiply-adds of an image", sum(self.multiply_adds.values()), sum(sparse.values())),
            (f"of these {ATTENTION}", self.multiply_adds[ATTENTION], sparse[ATTENTION]),
        ]
        lines = [f"# {self.title}", "", f"    {self.facts['command']}", ""]
        lines += ["| | top-1 accuracy |", "| --- | ---: |"]
        lines += [f"| {name} | {value:.2f} % |" for name, value in accuracy.items()]
        lines += ["", "| | dense | pruned | left |", "| --- | ---: | ---: | ---: |"]
        lines += [
            f"| {name} | {before:,} | {after:,} | {after / max(before, 1):.1%} |"
            for name, before, after in counts
        ]
        for name, caption in pictures.items():
            lines += ["", f"![{caption}]({name})"]
        lines += [
            "",
            *(f"- {name}: {value}" for name, value in self.facts.items() if name != "command"),
        ]
        return "\n".join(lines) + "\n"

    def _track(self, values: dict[str, float], epoch: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, epoch)

    def _write(self, name: str, content: bytes) -> None:
        utils.write_atomically(self.folder.path / name, lambda file: file.write(content))
