"""What a model predicts of labelled images, and what differs between two models.

Two models of equal accuracy may err on different images and classes, and be sure of it or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15  # of the calibration error, as in its source


class Predictions(NamedTuple):
    """The predictions of a model for images in some order, on any device.

    targets: int64 (images,), the true classes.
    classes: int64 (images,), the predicted ones.
    confidences: float32 (images,), the probability that the model gives its prediction, in [0, 1].
    """

    targets: Tensor
    classes: Tensor
    confidences: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, targets: Tensor, probabilities: Tensor | None = None
    ) -> "Predictions":
        """The predictions of a batch. It does not wait for the device.

        logits: (images, classes); the largest is the prediction, of equal ones the first of
            `topk`, as accuracies are counted. probabilities: by default their softmax.
        """
        if probabilities is None:
            probabilities = logits.softmax(dim=1)
        best = logits.topk(min(5, logits.shape[1])).indices[:, :1]
        return cls(targets, best[:, 0], probabilities.gather(1, best)[:, 0].float())

    @classmethod
    def joined(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Those of several batches, one after the other."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    @property
    def right(self) -> Tensor:
        """bool (images,): where the prediction is the target."""
        return self.classes == self.targets

    @property
    def accuracy(self) -> float:
        """Top-1 as a fraction."""
        return self.right.double().mean().item()

    def calibration_error(self, bins: int = BINS) -> float:
        """The expected calibration error (Guo et al. 2017, arXiv:1706.04599), in [0, 1].

        Bin m of M has the images with a confidence in ((m - 1) / M, m / M]. The error is the mean
        over all images of |accuracy - mean confidence| of their bins.
        """
        edges = torch.arange(1, bins, dtype=torch.float64, device=self.classes.device) / bins
        confidences = self.confidences.double()
        places = torch.bucketize(confidences, edges)
        gaps = torch.bincount(places, self.right.double() - confidences, minlength=bins)
        return gaps.abs().sum().item() / len(places)


@dataclass(frozen=True)
class Changes:
    """What differs between the predictions of two models for the same images.

    lost, gained, moved: bool (images,): right before and wrong after; wrong and right; wrong in
        both, with another class.
    accuracies, calibration_errors: before and after, as fractions.
    images: int64 (classes,), the images of each class. right_before, right_after: int64 (classes,),
        how many of them are predicted right.
    """

    lost: Tensor
    gained: Tensor
    moved: Tensor
    accuracies: tuple[float, float]
    calibration_errors: tuple[float, float]
    images: Tensor
    right_before: Tensor
    right_after: Tensor

    @property
    def flipped(self) -> Tensor:
        """bool (images,): where the prediction is another one."""
        return self.lost | self.gained | self.moved

    @property
    def agreement(self) -> float:
        """The fraction of the images with the same prediction."""
        return 1 - self.flipped.double().mean().item()


def compare_predictions(before: Predictions, after: Predictions) -> Changes:
    """What changed from the predictions of one model to those of another.

    Raises ValueError if there are no images, or the targets differ, so that these are not the same
    images in the same order.
    """
    if not len(before.targets) or not torch.equal(before.targets, after.targets):
        raise ValueError("the predictions are not of the same images in the same order")
    count = int(before.targets.max()) + 1

    def by_class(chosen: Tensor) -> Tensor:
        return torch.bincount(before.targets[chosen], minlength=count)

    return Changes(
        lost=before.right & ~after.right,
        gained=~before.right & after.right,
        moved=~before.right & ~after.right & (before.classes != after.classes),
        accuracies=(before.accuracy, after.accuracy),
        calibration_errors=(before.calibration_error(), after.calibration_error()),
        images=by_class(torch.ones_like(before.right)),
        right_before=by_class(before.right),
        right_after=by_class(after.right),
    )
