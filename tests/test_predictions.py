"""What changed between the predictions of two models, against the plain definitions."""

import math

import pytest
import torch

from sparsity_factory import Predictions, compare_predictions


def some_predictions(seed: int, images=200, classes=7, sharpness=3.0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(0))
    logits = sharpness * torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), targets] += 2
    return Predictions.of(logits, targets)


def slow_calibration_error(right, confidences, bins: int) -> float:
    """Guo et al. 2017, equation 3: the sum over bins of |B| / n |acc(B) - conf(B)|."""
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, p in enumerate(confidences) if (m - 1) / bins < p <= m / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            error += len(inside) / len(right) * abs(accuracy - confidence)
    return error


def test_a_prediction_is_the_largest_logit_with_its_probability():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -1.0]])
    predictions = Predictions.of(logits, torch.tensor([1, 2]))
    assert predictions.classes.tolist() == [1, 0]
    expected = [math.exp(3) / sum(map(math.exp, (1, 3, 2))), 1 / (1 + 2 / math.e)]
    assert predictions.confidences.tolist() == pytest.approx(expected)
    assert predictions.right.tolist() == [True, False]

    votes = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.3, 0.3]])
    assert Predictions.of(votes, torch.tensor([1, 2]), votes).confidences.tolist() == (
        pytest.approx([0.7, 0.4])
    )


@pytest.mark.parametrize("bins", [15, 4, 1])
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_the_calibration_error_is_its_definition(bins, sharpness):
    predictions = some_predictions(1, sharpness=sharpness)
    expected = slow_calibration_error(
        predictions.right.tolist(), predictions.confidences.tolist(), bins
    )
    assert predictions.calibration_error(bins) == pytest.approx(expected, abs=1e-12)


def test_a_confidence_on_an_edge_is_in_the_bin_below_it():
    """In one bin, the error of 0.5, which is right, would make up for part of that of 0.75."""
    targets, classes = torch.tensor([0, 0]), torch.tensor([0, 1])
    predictions = Predictions(targets, classes, torch.tensor([0.5, 0.75]))
    assert predictions.calibration_error(2) == pytest.approx(0.5 * 0.5 + 0.5 * 0.75)


def test_changes_are_counted_image_by_image():
    before, after = some_predictions(1), some_predictions(2)
    changes = compare_predictions(before, after)
    counts = {"lost": 0, "gained": 0, "moved": 0, "same": 0}
    by_class = {label: [0, 0, 0] for label in range(7)}
    columns = (before.targets, before.classes, after.classes)
    for target, one, two in zip(*map(torch.Tensor.tolist, columns), strict=True):
        kind = "moved"
        if one == two:
            kind = "same"
        elif one == target:
            kind = "lost"
        elif two == target:
            kind = "gained"
        counts[kind] += 1
        for place, number in enumerate((1, one == target, two == target)):
            by_class[target][place] += number

    assert min(counts.values()) > 10
    found = {name: int(getattr(changes, name).sum()) for name in ("lost", "gained", "moved")}
    assert {**found, "same": 200 - int(changes.flipped.sum())} == counts
    assert changes.agreement == pytest.approx(counts["same"] / 200)
    assert changes.accuracies == (before.accuracy, after.accuracy)
    assert changes.calibration_errors == (before.calibration_error(), after.calibration_error())
    table = torch.stack([changes.images, changes.right_before, changes.right_after], dim=1)
    assert table.tolist() == list(by_class.values())


def test_predictions_of_other_images_are_not_compared():
    before = some_predictions(1)
    other = before._replace(targets=before.targets.flip(0))
    fewer = Predictions(*(column[:5] for column in before))
    none = Predictions(*(column[:0] for column in before))
    for pair in ((before, other), (before, fewer), (none, none)):
        with pytest.raises(ValueError, match="not of the same images"):
            compare_predictions(*pair)


def test_batches_are_joined_in_order():
    whole = some_predictions(3)
    parts = [Predictions(*columns) for columns in zip(*(c.split(64) for c in whole), strict=True)]
    joined = Predictions.joined(parts)
    assert all(torch.equal(*pair) for pair in zip(joined, whole, strict=True))
