"""Models without a head: evaluated by their nearest training images, and trained without labels."""

import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from conftest import write_idx

from datasets import build_dataset, build_transform, read_idx
from trainer.arguments import parse_args
from trainer.nearest_neighbours import votes

HEADLESS = ["--num-classes", "0"]
LAMP = ["--pruner", "lamp", "--sparsity", "0.9"]


def votes_of_one(feature, bank, labels, num_classes, k=20, temperature=0.07) -> list[float]:
    """The definition: the k most similar rows vote, each with exp(similarity / temperature)."""

    def cosine(row):
        dot = sum(a * b for a, b in zip(feature, row, strict=True))
        return dot / math.sqrt(sum(a * a for a in feature) * sum(b * b for b in row))

    nearest = sorted(((cosine(row), label) for row, label in zip(bank, labels, strict=True)))[-k:]
    found = [0.0] * num_classes
    for similarity, label in nearest:
        found[label] += math.exp(similarity / temperature)
    return found


def accuracies(features, targets, bank, labels) -> tuple[float, float]:
    """Top-1 and top-5 in percent, by the definition."""
    top1 = top5 = 0
    for feature, target in zip(features.tolist(), targets, strict=True):
        found = votes_of_one(feature, bank.tolist(), labels, 10)
        order = sorted(range(10), key=lambda label: -found[label])
        top1 += order[0] == target
        top5 += target in order[:5] and found[target] > 0
    return 100 * top1 / len(targets), 100 * top5 / len(targets)


def images_of(tiny, is_train):
    """The images under the transform of an evaluation, and their labels."""
    args = parse_args(tiny)
    data, _ = build_dataset(is_train, args, build_transform(False, args))
    images, labels = zip(*data, strict=True)
    return torch.stack(images), labels


def features_of(weights, images):
    model = timm.create_model("deit_sample_patch4_28", num_classes=0)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval()(images)


def dense():
    return timm.create_model("deit_sample_patch4_28", pretrained=True, num_classes=0).state_dict()


def read(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("count", [7, 20, 60])
def test_the_nearest_images_vote_by_their_similarity(count):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 6, generator=generator)
    bank = torch.randn(count, 6, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    found = votes(features, torch.nn.functional.normalize(bank, dim=1), labels, 5)
    expected = [
        votes_of_one(row, bank.tolist(), labels.tolist(), 5) for row in features.double().tolist()
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_accuracies_are_those_of_the_definition_before_and_after_pruning(run_main, tiny, tmp_path):
    printed = run_main(*tiny, *HEADLESS, *LAMP, "--reconstruct", "obs", "--epochs", "1",
                       "--calibration-images", "16", "--output_dir", "out")  # fmt: skip
    found = [
        tuple(map(float, pair)) for pair in re.findall(r"\* Acc@1 ([\d.]+) Acc@5 ([\d.]+)", printed)
    ]
    assert " loss" not in printed.partition("* Acc@1")[2].partition("\n")[0]

    (bank, labels), (images, targets) = (images_of(tiny, is_train) for is_train in (True, False))
    checkpoint = read(tmp_path / "out/checkpoint.pth")
    expected = [
        accuracies(features_of(weights, images), targets, features_of(weights, bank), labels)
        for weights in (dense(), checkpoint["model"], checkpoint["model_ema"])
    ]
    # Before pruning, after it, and after an epoch: the model and its moving average
    assert len(found) == 4 and found[1] != found[0]
    for one, other in zip([found[0], *found[2:]], expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    assert "classes" not in checkpoint
    line = json.loads((tmp_path / "out/log.txt").read_text())
    assert "test_loss" not in line and line["test_acc1"] == pytest.approx(expected[1][0])
    assert "nearest training images" in (tmp_path / "out/summary.md").read_text()


@pytest.mark.slow
def test_no_label_of_the_training_images_changes_a_weight(run_main, tiny, tiny_fashion, tmp_path):
    (tmp_path / "other").mkdir()
    for path in tiny_fashion.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    labels = read_idx(tiny_fashion, "train-labels-idx1-ubyte", ndim=1)
    write_idx(tmp_path / "other/train-labels-idx1-ubyte", (labels + 3) % 10)

    flags = [*HEADLESS, *LAMP, "--score", "wanda", "--reconstruct", "obs-mask",
             "--calibration-images", "16"]  # fmt: skip
    run_main(*tiny, *flags, "--output_dir", "one")
    run_main(*tiny, *flags, "--output_dir", "two", "--data-path", tmp_path / "other")
    one, two = (read(tmp_path / name / "checkpoint.pth")["model"] for name in ("one", "two"))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    assert any(not torch.equal(weight, dense()[name]) for name, weight in one.items())


@pytest.mark.slow
def test_training_brings_the_features_nearer_to_the_dense_ones(run_main, tiny, tmp_path):
    flags = [*HEADLESS, *LAMP, "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--aa", "none"]
    run_main(*tiny, *flags, "--epochs", "8", "--lr", "2e-3", "--unscale-lr",
             "--eval-every", "8", "--no-model-ema",
             "--output_dir", "out")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    assert lines[-1]["train_loss"] < 0.7 * lines[0]["train_loss"] < 0.7


@pytest.mark.slow
def test_a_run_without_a_head_resumes_evaluates_and_is_exported_without_the_flag(
    run_main, tiny, tmp_path, stop_at, monkeypatch
):
    from trainer import export

    monkeypatch.setattr(export, "write_programs", lambda *_: [])
    flags = [*tiny, *HEADLESS, *LAMP]
    run_main(*flags, "--output_dir", "whole")
    stop_at(2)
    run_main(*flags, "--output_dir", "parts", status=143)
    run_main(*tiny, "--resume", "auto", "--output_dir", "parts")
    one, two = (read(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for kind in ("model", "model_ema"):
        assert all(torch.equal(weight, two[kind][name]) for name, weight in one[kind].items())

    last = json.loads((tmp_path / "whole/log.txt").read_text())["test_acc1"]
    printed = run_main(*tiny, "--resume", "whole/checkpoint.pth", "--eval")
    assert f"Acc@1 {last:.3f}" in printed

    run_main("--resume", "whole/checkpoint.pth", "--export", "folder")
    shape = json.loads((tmp_path / "folder/shape.json").read_text())
    assert shape["arguments"]["num_classes"] == 0
    assert "outputs: features" in (tmp_path / "folder/README.md").read_text()


@pytest.mark.slow
def test_pruned_heads_are_taken_out_of_a_model_without_a_head(run_main, tiny, tmp_path):
    flags = [*HEADLESS, "--pruner", "glob", "--sparsity", "0.5", "--pattern", "heads+neurons"]
    run_main(*tiny, *flags, "--shrink", "--output_dir", "out")
    sizes = [weight.numel() for weight in read(tmp_path / "out/checkpoint.pth")["model"].values()]
    assert sum(sizes) < 0.6 * sum(weight.numel() for weight in dense().values())


@pytest.mark.slow
def test_a_file_without_a_head_is_evaluated_and_one_with_a_head_loses_it(run_main, tiny, tmp_path):
    whole = timm.create_model("deit_sample_patch4_28", pretrained=True).state_dict()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in dense().items()}}, "d.pth")
    torch.save({"model": whole}, "whole.pth")
    printed = [
        run_main(*tiny, "--eval", *HEADLESS, *flags)
        for flags in ([], ["--finetune", "d.pth"], ["--resume", "whole.pth"])
    ]
    assert len({re.search(r"\* Acc@1 .*", text)[0] for text in printed}) == 1
    assert "head.weight, head.bias left out" in printed[2]
    assert "made anew" not in printed[1]
    assert "--num-classes 0" in run_main(*tiny, "--eval", "--finetune", "d.pth", status=2)

    # A head for classes may be put on the backbone afterwards
    run_main(*tiny, *HEADLESS, *LAMP, "--output_dir", "out")
    printed = run_main(*tiny, "--finetune", "out/checkpoint.pth")
    assert "head.weight, head.bias made anew" in printed


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_replaced_if_that_is_allowed(tmp_path, run_main):
    from PIL import Image

    for number in range(8):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            picture = np.full((28, 28, 3), 30 * number, dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.png")
    (tmp_path / "data/train/class0/0.png").write_bytes(b"nothing")

    flags = ["--data-path", "data", "--model", "deit_sample_patch4_28", "--input-size", "28",
             "--num_workers", "0", "--batch-size", "4", "--eval", *HEADLESS]  # fmt: skip
    assert "0.png" in run_main(*flags, status=2)
    assert "Acc@1" in run_main(*flags, "--skip-bad-images", "1")
