"""What pruning changed in the predictions of a model: as text, tables and a page of the summary."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset

from sparsity_factory import Changes, Predictions, compare_predictions

MOST_SHOWN = 10  # of the classes that lost accuracy


class Reference(NamedTuple):
    """The predictions that a run compares its final ones with, and the name of their model."""

    name: str
    predictions: Predictions

    def state_dict(self) -> dict:
        return {"name": self.name, **self.predictions._asdict()}

    @classmethod
    def of(cls, state: dict) -> "Reference":
        """From an untrusted state dict. Raises KeyError, TypeError or ValueError."""
        found = [state[name] for name in Predictions._fields]
        if not all(isinstance(column, Tensor) and column.dim() == 1 for column in found):
            raise TypeError("predictions are not one number for each image")
        targets, classes, confidences = found
        if not len(targets) == len(classes) == len(confidences):
            raise ValueError("predictions of different numbers of images")
        return cls(
            str(state["name"]), Predictions(targets.long(), classes.long(), confidences.float())
        )


class ClassRow(NamedTuple):
    """A class: its images, and how many of them each of two models predicts right."""

    number: int
    name: str
    images: int
    right_before: int
    right_after: int

    @property
    def accuracies(self) -> tuple[float, float]:
        """Before and after, in percent."""
        return 100 * self.right_before / self.images, 100 * self.right_after / self.images

    @property
    def change(self) -> float:
        """In points; less than 0 for a loss."""
        return 100 * (self.right_after - self.right_before) / self.images

    @property
    def title(self) -> str:
        """The number, and the name, or a word for ImageNet's synset."""
        return f"{self.number} {synset_words().get(self.name, self.name)}".strip()


@dataclass(frozen=True)
class Comparison:
    """The predictions of two models for the validation images.

    names: those of the models, such as `dense` and `finetuned`.
    images: the data set, for the names of its images and classes.
    """

    names: tuple[str, str]
    before: Predictions
    after: Predictions
    images: Dataset

    @cached_property
    def changes(self) -> Changes:
        return compare_predictions(self.before, self.after)

    @cached_property
    def classes(self) -> list[ClassRow]:
        """The classes that have images, first the one whose accuracy fell most."""
        changes = self.changes
        labels = getattr(self.images, "class_to_idx", {})
        names = {number: str(name) for name, number in labels.items()}
        counts = torch.stack([changes.images, changes.right_before, changes.right_after], dim=1)
        rows = [
            ClassRow(number, names.get(number, ""), *row)
            for number, row in enumerate(counts.tolist())
            if row[0]
        ]
        return sorted(rows, key=lambda row: row.change)

    def in_words(self) -> list[str]:
        """Two lines for the log."""
        changes = self.changes
        before, after = (f"{100 * error:.2f} %" for error in changes.calibration_errors)
        return [
            f"Compared with {self.names[0]}, {100 * changes.agreement:.2f} % of the predictions "
            f"are the same; right, now wrong: {changes.lost.sum()}; wrong, now right: "
            f"{changes.gained.sum()}; wrong, now another wrong class: {changes.moved.sum()}",
            f"Expected calibration error: {before} ({self.names[0]}), {after} ({self.names[1]})",
        ]

    def summary(self) -> list[str]:
        """The lines of a part of the summary, in Markdown."""
        changes = self.changes
        before, after = self.names
        total = len(changes.lost)
        images = {
            "the same prediction": total - int(changes.flipped.sum()),
            "right, now wrong": int(changes.lost.sum()),
            "wrong, now right": int(changes.gained.sum()),
            "wrong, now another wrong class": int(changes.moved.sum()),
        }
        figures = {
            "top-1 accuracy": changes.accuracies,
            "expected calibration error": changes.calibration_errors,
        }

        lines = [f"## What changed from {before} to {after}", ""]
        lines += table(["images", "", "share"], (
            (name, f"{count:,}", f"{count / total:.2%}") for name, count in images.items()
        ))  # fmt: skip
        lines += table(["", before, after], (
            (name, *(f"{100 * value:.2f} %" for value in pair)) for name, pair in figures.items()
        ))  # fmt: skip

        lost = [row for row in self.classes if row.change < 0]
        lines += [f"Classes that lost accuracy: {len(lost):,} of {len(self.classes):,}.", ""]
        if lost:
            lines += table(["class", "images", before, after, "points"], (
                (row.title, f"{row.images:,}", *(f"{value:.2f} %" for value in row.accuracies),
                 f"{row.change:+.2f}")
                for row in lost[:MOST_SHOWN]
            ))  # fmt: skip
        return lines[:-1]

    def classes_csv(self) -> str:
        """A row for each class that has images, in order of their numbers."""
        header = ["class", "name", "images"]
        header += [f"{name}_{what}" for what in ("right", "accuracy") for name in self.names]
        rows = (
            (*row, *(f"{value:.2f}" for value in row.accuracies)) for row in sorted(self.classes)
        )
        return csv_text(header, rows)

    def predictions_csv(self) -> str:
        """A row for each image: its file or place in the data, both predictions, what changed."""
        changes = self.changes
        kinds = torch.stack([changes.lost, changes.gained, changes.moved]).int()
        kind = (kinds * torch.tensor([[1], [2], [3]])).sum(0).tolist()

        header = ["image", "class"]
        header += [f"{name}_{what}" for what in ("prediction", "confidence") for name in self.names]
        rows = zip(
            image_names(self.images, len(kind)),
            self.before.targets.tolist(),
            self.before.classes.tolist(),
            self.after.classes.tolist(),
            (f"{value:.4f}" for value in self.before.confidences.tolist()),
            (f"{value:.4f}" for value in self.after.confidences.tolist()),
            (("", "lost", "gained", "moved")[number] for number in kind),
            strict=True,
        )
        return csv_text([*header, "change"], rows)


def image_names(images: Dataset, count: int) -> Sequence[str | int]:
    """The files of the images, as far as they are files; otherwise their places, from 0 on."""
    samples = getattr(images, "samples", None)
    if samples is None:
        return range(count)
    tar = getattr(images, "tar", None)
    return [tar.filename(name, absolute=True) if tar else str(name) for name, _ in samples]


# ---- helpers, not exported ----


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, with numbers to the right of its first column, and an empty line."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


@cache
def synset_words() -> dict[str, str]:
    """The first word or words for each synset of ImageNet."""
    described = ImageNetInfo().label_descriptions(as_dict=True)
    return {name: text.partition(",")[0] for name, text in described.items()}


def csv_text(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
