"""What a run, and `--compare`, tell of the change in predictions."""

import csv
import re

import pytest
import timm
import torch
from PIL import Image
from test_folders import pictures, write_tar

from datasets import build_dataset, build_transform
from sparsity_factory import Predictions, compare_predictions
from trainer.arguments import parse_args
from trainer.changes import Comparison, Reference
from trainer.results import CLASSES_CSV, CLASSES_PNG, PREDICTIONS_CSV, SUMMARY

LAMP = ["--pruner", "lamp", "--sparsity", "0.9"]


class Images:
    """A data set with names, of which nothing else is read."""

    def __init__(self, names=(), samples=None):
        self.class_to_idx = {name: number for number, name in enumerate(names)}
        if samples is not None:
            self.samples = samples


def comparison(targets, before, after, images=None) -> Comparison:
    targets, *classes = (torch.tensor(column) for column in (targets, before, after))
    one, two = (Predictions(targets, column, torch.ones(len(targets))) for column in classes)
    return Comparison(("dense", "pruned"), one, two, images or Images())


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_classes_are_ordered_by_what_they_lost_and_those_without_images_are_left_out():
    found = comparison([0, 0, 1, 1, 3, 3, 4], [0, 0, 1, 0, 3, 3, 0], [0, 1, 1, 1, 0, 0, 0])
    assert [(row.number, row.images, row.change) for row in found.classes] == [
        (3, 2, -100.0), (0, 2, -50.0), (4, 1, 0.0), (1, 2, 50.0),
    ]  # fmt: skip
    assert "Classes that lost accuracy: 2 of 4." in found.summary()
    assert [row["class"] for row in rows(found.classes_csv())] == ["0", "1", "3", "4"]


def test_at_most_ten_classes_are_listed_and_an_unchanged_model_has_none():
    numbers = list(range(12))
    text = "\n".join(comparison(numbers, numbers, [(n + 1) % 12 for n in numbers]).summary())
    assert "Classes that lost accuracy: 12 of 12." in text
    assert text.count("| 100.00 % | 0.00 % | -100.00 |") == 10
    same = comparison(numbers, numbers, numbers)
    assert "Classes that lost accuracy: 0 of 12." in same.summary()[-1]
    assert "100.00 % of the predictions are the same" in same.in_words()[0]


def test_a_synset_of_imagenet_is_shown_in_a_word_and_kept_in_the_table():
    found = comparison([0, 1], [0, 1], [1, 1], Images(["n01440764", "other"]))
    assert [row.title for row in found.classes] == ["0 tench", "1 other"]
    assert [row["name"] for row in rows(found.classes_csv())] == ["n01440764", "other"]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_each_image_is_named_by_its_file(tmp_path, packed):
    names = ["a/1.png", "a/2.png", "b/1.png"]
    pictures(tmp_path, *(f"{split}/{name}" for split in ("train", "val") for name in names))
    flags = []
    if packed:
        for split in ("train", "val"):
            (tmp_path / split).rename(tmp_path / f"{split}_folder")
        write_tar(tmp_path / "train.tar", names)
        write_tar(tmp_path / "val.tar", names)
        flags = [
            "--data-set",
            "timm:folder",
            "--train-split",
            "train.tar",
            "--val-split",
            "val.tar",
        ]
    args = parse_args(["--data-path", str(tmp_path), "--input-size", "28", *flags])
    images, _ = build_dataset(False, args, build_transform(False, args))
    found = comparison([0, 0, 1], [0, 1, 1], [0, 0, 0], images)
    table = rows(found.predictions_csv())
    assert [row["image"][-7:] for row in table] == names
    assert [row["change"] for row in table] == ["", "gained", "lost"]
    assert packed or all(Image.open(row["image"]) for row in table)


@pytest.mark.parametrize(
    "damage",
    [
        {"targets": [1, 2]},
        {"classes": torch.zeros(3, 1)},
        {"confidences": torch.zeros(2)},
        {"targets": torch.zeros(4)},
    ],
)
def test_damaged_predictions_of_a_checkpoint_are_refused(damage):
    predictions = Predictions(*(torch.zeros(3) for _ in range(3)))
    state = Reference("dense", predictions).state_dict()
    assert Reference.of(state).name == "dense"
    with pytest.raises((KeyError, TypeError, ValueError)):
        Reference.of({**state, **damage})
    with pytest.raises(KeyError):
        Reference.of({"name": "dense"})


# ---- runs ----


def predictions_of(tiny, weights) -> Predictions:
    """Those of the sample's model with these weights, image by image."""
    args = parse_args(tiny)
    data, _ = build_dataset(False, args, build_transform(False, args))
    model = timm.create_model("deit_sample_patch4_28", pretrained=weights is None)
    if weights:
        model.load_state_dict(weights)
    with torch.no_grad():
        parts = [
            Predictions.of(model.eval()(image[None]), torch.tensor([label]))
            for image, label in data
        ]
    return Predictions.joined(parts)


def model_in(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def files(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CLASSES_CSV, PREDICTIONS_CSV)}


@pytest.mark.slow
def test_a_run_tells_what_changed_from_the_dense_model_to_the_finetuned_one(
    run_main, tiny, tmp_path
):
    printed = run_main(*tiny, *LAMP, "--output_dir", "out")
    after = predictions_of(tiny, model_in(tmp_path / "out/checkpoint.pth"))
    changes = compare_predictions(predictions_of(tiny, None), after)
    expected = {name: int(getattr(changes, name).sum()) for name in ("lost", "gained", "moved")}
    assert expected["lost"] > 5

    table = rows((tmp_path / "out" / PREDICTIONS_CSV).read_text())
    kinds = [row["change"] for row in table]
    assert {name: kinds.count(name) for name in expected} == expected
    assert [int(row["finetuned_prediction"]) for row in table] == after.classes.tolist()
    assert [row["image"] for row in table] == [str(number) for number in range(61)]

    summary = (tmp_path / "out" / SUMMARY).read_text()
    share = f"{expected['lost'] / 61:.2%}"
    assert f"| right, now wrong | {expected['lost']} | {share} |" in summary
    errors = [f"{100 * error:.2f} %" for error in changes.calibration_errors]
    assert f"| expected calibration error | {errors[0]} | {errors[1]} |" in summary
    assert f"Expected calibration error: {errors[0]} (dense), {errors[1]} (finetuned)" in printed
    assert f"| top-1 accuracy | {100 * changes.accuracies[0]:.2f} % |" in summary
    assert f"({CLASSES_PNG})" in summary
    assert Image.open(tmp_path / "out" / CLASSES_PNG).size[0] == 960

    # The same without the run
    compare = ["--eval", "--resume", "out/checkpoint.pth", "--compare", "timm"]
    printed = run_main(*tiny, *compare)
    part = summary.partition("## What changed")[2].partition("![")[0].strip()
    assert part.replace("finetuned", "pruned").replace("dense", "reference") in printed


@pytest.mark.slow
def test_a_dense_run_tells_nothing_and_leaves_no_files_of_an_earlier_run(run_main, tiny, tmp_path):
    run_main(*tiny, *LAMP, "--eval", "--output_dir", "out")
    assert (tmp_path / "out" / CLASSES_CSV).exists()
    printed = run_main(*tiny, "--output_dir", "out")
    assert "Compared with" not in printed and "Expected calibration" not in printed
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {CLASSES_CSV, CLASSES_PNG, PREDICTIONS_CSV} & left


@pytest.mark.slow
def test_a_backbone_is_compared_by_the_votes_of_its_neighbours(run_main, tiny, tmp_path):
    run_main(*tiny, *LAMP, "--eval", "--num-classes", "0", "--output_dir", "out")
    table = rows((tmp_path / "out" / PREDICTIONS_CSV).read_text())
    shares = [float(row["dense_confidence"]) for row in table]
    assert 0.1 < min(shares) < max(shares) <= 1
    right = sum(row["dense_prediction"] == row["class"] for row in table)
    summary = (tmp_path / "out" / SUMMARY).read_text()
    assert f"| top-1 accuracy | {100 * right / 61:.2f} % |" in summary


@pytest.mark.slow
def test_a_run_that_is_resumed_with_other_images_says_that_nothing_is_compared(
    run_main, tiny, tmp_path
):
    run_main(*tiny, *LAMP, "--output_dir", "out")
    path = tmp_path / "out/checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["reference"]["targets"] += 1
    torch.save(checkpoint, path)
    printed = run_main(*tiny, "--resume", path, "--output_dir", "out")
    assert "The predictions of dense are of other validation images" in printed
    assert not (tmp_path / "out" / CLASSES_CSV).exists()


@pytest.mark.slow
def test_compared_checkpoints_may_be_pruned_and_smaller_and_have_to_fit(run_main, tiny, tmp_path):
    units = ["--pruner", "glob", "--sparsity", "0.5", "--pattern", "heads+neurons", "--shrink"]
    run_main(*tiny, *units, "--output_dir", "small")
    run_main(*tiny, *LAMP, "--output_dir", "out")
    paths = [str(tmp_path / name / "checkpoint.pth") for name in ("small", "out")]
    accuracies, accuracies_as_reference = {}, {}
    for one, other in (paths, paths[::-1]):
        printed = run_main(*tiny, "--eval", "--resume", one, "--compare", other)
        found = re.search(r"Top-1 accuracy: reference ([\d.]+) %, \w+ ([\d.]+) %", printed)
        accuracies[one], accuracies_as_reference[other] = float(found[2]), float(found[1])
        assert "## What changed from reference to" in printed
    assert accuracies == accuracies_as_reference

    torch.save({"model": {"cls_token": torch.zeros(1, 1, 96)}}, tmp_path / "other.pth")
    error = run_main(*tiny, "--eval", "--resume", paths[1], "--compare", "other.pth", status=2)
    assert error.startswith("error: other.pth: does not fit the model")
