"""The files of a run for people to look at: tables, pictures and a summary."""

import functools
import re
import time
from collections.abc import Mapping

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
from .changes import Comparison
from .nearest_neighbours import NEIGHBOURS
from .run_folder import RunFolder, holds_run, read_log
from .tokens import all_tokens, merging_blocks
from .trackers import Tracker, build_trackers
from .training_state import TrainingState

SPARSITY_CSV = "sparsity.csv"
SPARSITY_YAML = "sparsity.yaml"
SPARSITY_PNG = "sparsity.png"
TRAINING_PNG = "training.png"
CLASSES_CSV = "classes.csv"
CLASSES_PNG = "classes.png"
PREDICTIONS_CSV = "predictions.csv"
SUMMARY = "summary.md"
#: All of them, which a new run replaces.
FILES = (
    SPARSITY_CSV,
    SPARSITY_YAML,
    SPARSITY_PNG,
    TRAINING_PNG,
    CLASSES_CSV,
    CLASSES_PNG,
    PREDICTIONS_CSV,
    SUMMARY,
)
#: Seconds between two pictures of the training: a short run draws it only at its end.
REDRAW_AFTER = 60


def open_results(
    args, recipe: Recipe, state: TrainingState | None, train_loader, val_loader, compute: Compute
) -> "Results":
    """The results of a run: its folder, locked, and its trackers, both on the first process only.

    state: of the training, resumed if it is; None for an evaluation. train_loader: None in an
        evaluation.
    Raises UserError if the folder cannot be written to, or another run uses it.
    """
    processes = utils.world_size()
    images = f"{images_in(val_loader):,} validation images"
    if train_loader is not None:
        images = f"{images_in(train_loader):,} training and {images}"
    facts = {
        "command": f"{utils.launcher(processes)} {args.command}",
        "model": f"{args.model}, {args.input_size} x {args.input_size}",
        "data": f"{args.data_path or 'the built-in sample'}, {images}",
        "computed": f"on {compute.in_words()}, by {processes} process{'es' * (processes > 1)}",
        "versions": utils.versions(compute.device),
    }

    if recipe.pruner:
        facts["recipe"] = recipe.in_words()
    if args.tokens:
        facts["tokens"] = f"{args.tokens} merged in each block"
    if args.num_classes == 0:
        facts["accuracy"] = f"that of the {NEIGHBOURS} nearest training images, weighted"

    target = recipe.sparsity
    title = f"{args.model}, {recipe.pruner or 'dense'}"
    if target is not None:
        title += f" at {100 * target:g} %"
    epoch = state.progress.epoch if state else 0
    results = Results(title, facts, target, epoch)

    def open_both():
        if args.output_dir and args.eval and holds_run(args.output_dir):
            utils.log(
                f"{args.output_dir} holds a training run: the results of this evaluation are not "
                "written"
            )
        elif args.output_dir:
            results.folder = RunFolder(args.output_dir)
            if state and (args.overwrite or not state.resumed):
                results.folder.begin(args.overwrite)
        results.trackers = build_trackers(args, epoch)

    utils.on_first_process(open_both)
    return results


def images_in(loader) -> int:
    stream = getattr(loader.dataset, "stream", None)
    return stream.reader.num_samples if stream else len(loader.dataset)


def tell_emptied(kept: Kept) -> None:
    """Logs the layers that keep no weight at all."""
    names = [row.name for row in kept.layers if row.total and not row.kept]
    if names:
        utils.log(f"No weight is kept of {', '.join(names)}: nothing passes through")


def first_process_only(method):
    """Makes the first process alone run a method that all call; its errors are raised on all."""

    @functools.wraps(method)
    def call(*args):
        utils.on_first_process(lambda: method(*args))

    return call


class Results:
    """Writes the files of a run and reports to its trackers.

    Every process calls the methods, and only the first has a folder. Everything is made from the
    model, its masks, log.txt and the accuracies in a checkpoint, so that an interrupted run leaves
    the same files as an undisturbed one, except for the images per second.

    title: the heading of pictures and summary.
    facts: by name, for the summary.
    target: the sparsity that was asked for, if any.
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
        """Writes what is kept of each layer, before the training.

        kept: from `sparsity_rows`, also of a dense model.
        accuracy: top-1 in percent by name.
        image: one input of the model, shape (1, 3, height, width), to count its multiply-adds.
        """
        self.kept = kept
        self.accuracy = accuracy
        pruned = kept.prunable.kept < kept.prunable.total
        tell_emptied(kept)

        if self.folder:
            self.computed = self.multiply_adds = multiply_adds(model, image)
            if merging_blocks(model):
                with all_tokens(model):
                    self.multiply_adds = multiply_adds(model, image)
            # Files of an earlier run would tell of another model.
            for name in FILES:
                (self.folder.path / name).unlink(missing_ok=True)
            if pruned:
                self._write_sparsity()

        values = {f"accuracy/{name}": value for name, value in accuracy.items()}
        if pruned:
            rows = (*kept.layers, kept.prunable)
            values |= {f"sparsity/{row.name}": row.sparsity for row in rows}
        self._track(values, self.epoch)

    @first_process_only
    def log_epoch(self, line: dict) -> None:
        """Adds an epoch to log.txt, and reports it to the trackers."""
        values = {
            re.sub("^(train|test|test_ema)_(?!ema_)", r"\1/", name): value
            for name, value in line.items()
            if name != "run"
        }
        self._track(values, values.pop("epoch"))
        if self.folder:
            self.folder.log_epoch(line)
            if time.monotonic() - self._drawn > REDRAW_AFTER:
                self._draw_training()

    @first_process_only
    def wait(self) -> None:
        """Returns when the last checkpoint is written; raises its error."""
        if self.folder:
            self.folder.wait()

    @first_process_only
    def finish(
        self, accuracy: dict[str, float], kept: Kept, comparison: Comparison | None = None
    ) -> None:
        """Writes the picture of the training, the summary, and what is now kept of each layer.

        accuracy: all that was measured.
        comparison: of the final predictions with earlier ones. Without a folder it is logged whole.
        """
        changed = kept != self.kept
        self.kept = kept
        if changed:
            tell_emptied(kept)

        captions = {
            SPARSITY_PNG: "Sparsity of each layer",
            TRAINING_PNG: "Loss, accuracy and learning rate by epoch",
        }
        pictures = []
        if comparison:
            lines = comparison.in_words() if self.folder else comparison.summary()
            utils.log("\n".join(lines))
        if self.folder:
            if changed:
                self._write_sparsity()
            self._draw_training()
            pictures = [name for name in captions if (self.folder.path / name).exists()]
            summary = self._summary(accuracy, {name: captions[name] for name in pictures})
            if comparison:
                self._write_comparison(comparison)
                pictures.append(CLASSES_PNG)
                summary += "\n" + "\n".join(comparison.summary())
                summary += f"\n\n![Accuracy of each class]({CLASSES_PNG})\n"
            self._write(SUMMARY, summary.encode())

            files = sorted(path.name for path in self.folder.path.iterdir() if path.is_file())
            shown = ", ".join(name for name in files if not name.startswith("."))
            utils.log(f"Written to {self.folder.path}: {shown}")

        for tracker in self.trackers:
            tracker.finish({name: self.folder.path / name for name in pictures})

    def _write_sparsity(self) -> None:
        comment = (
            f"{self.title}: the fraction of each layer that is pruned, or n:m as [n, m].\n"
            "With --pruner custom --custom-config and this file, each layer keeps as many weights "
            "again."
        )
        text = sparsity_csv(self.kept, self.multiply_adds, self.computed)
        self._write(SPARSITY_CSV, text.encode())
        self._write(SPARSITY_YAML, sparsity_yaml(self.kept, comment).encode())

        line = self.kept.prunable.sparsity if self.target is None else self.target
        label = f"{'all layers' if self.target is None else 'target'}, {100 * line:.4g} %"
        layers = {row.name: row.sparsity for row in self.kept.layers}
        self._write(SPARSITY_PNG, plots.png(plots.sparsity_bars(layers, line, label, self.title)))

    def _draw_training(self) -> None:
        if lines := read_log(self.folder.path):
            curves = plots.training_curves(lines, self.accuracy, self.title)
            self._write(TRAINING_PNG, plots.png(curves))
            self._drawn = time.monotonic()

    def _write_comparison(self, comparison: Comparison) -> None:
        self._write(CLASSES_CSV, comparison.classes_csv().encode())
        self._write(PREDICTIONS_CSV, comparison.predictions_csv().encode())
        classes = {row.title: row.accuracies for row in comparison.classes}
        picture = plots.class_accuracies(classes, comparison.names, self.title)
        self._write(CLASSES_PNG, plots.png(picture))

    def _summary(self, accuracy: dict[str, float], pictures: dict[str, str]) -> str:
        _, prunable, whole = self.kept
        sparse = sparse_multiply_adds(self.kept, self.computed)
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

        facts = {name: value for name, value in self.facts.items() if name != "command"}
        speeds = [line.get("images_per_second") for line in read_log(self.folder.path)]
        speeds = sorted(filter(None, speeds))
        if speeds:
            facts["speed"] = f"{speeds[len(speeds) // 2]:,.0f} images/s in training"
        lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
        return "\n".join(lines) + "\n"

    def _track(self, values: dict[str, float], epoch: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, epoch)

    def _write(self, name: str, content: bytes) -> None:
        utils.write_atomically(self.folder.path / name, lambda file: file.write(content))
