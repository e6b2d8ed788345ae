"""Folders of images as they are found: what is a class, what is an image, how both are numbered."""

import io
import os
import shutil
import tarfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sweep
from datasets import build_dataset, number_classes, with_transform
from utils import UserError, class_names

SMALL = "--model deit_sample_patch4_28 --model-kwargs depth=1 embed_dim=16 num_heads=2"
SHORT = "--input-size 28 --no-pretrained --num_workers 0 --no-repeated-aug --batch-size 4"
TINY = [*SMALL.split(), *SHORT.split(), "--amp", "off"]
IMAGES = ["--calibration-images", "4"]
BY_IMAGES = ["--pruner", "unif", "--sparsity", "0.5", "--score", "wanda", *IMAGES]
EVAL_BY_IMAGES = [*BY_IMAGES, "--eval"]
READERS = ["IMNET", "timm:folder", "timm:torch/image_folder"]


def options(path, data_set="IMNET", **changes):
    defaults = dict(
        data_path=str(path),
        data_set=data_set,
        input_size=16,
        eval_crop_ratio=0.875,
        train_split="train",
        val_split="val",
        num_classes=None,
        batch_size=1,
        seed=0,
    )
    return Namespace(**{**defaults, **changes})


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, 0, 0)).save(path, "PNG")


def pictures(root, *names):
    for number, name in enumerate(names):
        picture(root / name, number)


def both(path, data_set="IMNET", **changes):
    """Training and validation images, and the number of classes."""
    args = options(path, data_set, **changes)

    def keep(image):
        return image

    train, count = build_dataset(True, args, keep)
    val, _ = build_dataset(False, args, keep, classes=train.class_to_idx)
    return train, val, count


def refusal(path, data_set="IMNET", **changes) -> str:
    with pytest.raises(UserError) as error:
        both(path, data_set, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def labels(data) -> list[int]:
    return [data[index][1] for index in range(len(data))]


@pytest.mark.parametrize("data_set", READERS)
def test_a_class_is_the_first_folder_below_the_split(tmp_path, data_set):
    deep = [f"{split}/{name}/{year}/x.png" for split in ("train", "val") for name in "ab"
            for year in (2020, 2021)]  # fmt: skip
    pictures(tmp_path, *deep)
    train, val, count = both(tmp_path, data_set)
    assert (train.class_to_idx, count) == ({"a": 0, "b": 1}, 2)
    assert labels(train) == labels(val) == [0, 0, 1, 1]


@pytest.mark.parametrize("data_set", READERS)
def test_hidden_names_are_neither_classes_nor_images(tmp_path, data_set):
    hidden = ["train/.ipynb_checkpoints/a.png", "train/__MACOSX/a.png", "train/cat/._a.png"]
    pictures(tmp_path, "train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/dog/a.png")
    pictures(tmp_path, *hidden, "val/.ipynb_checkpoints/a.png", "train/dog/.thumbs/a.png")
    train, val, count = both(tmp_path, data_set)
    assert (len(train), len(val), count) == (2, 2, 2)
    assert any(".ipynb_checkpoints, .thumbs, __MACOSX" in note for note in train.notes)


@pytest.mark.parametrize("data_set", READERS)
def test_val_is_numbered_by_train_and_may_lack_classes(tmp_path, data_set):
    pictures(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/b/1.png")
    (tmp_path / "val/c").mkdir()
    train, val, _ = both(tmp_path, data_set)
    assert labels(val) == [1]
    assert val.class_to_idx == train.class_to_idx
    assert any("val/ has no image of 2 of 3 classes: a, c" in note for note in val.notes)

    # The same without a training set at hand
    alone, count = build_dataset(False, options(tmp_path, data_set))
    assert (labels(alone), count) == ([1], 3)


@pytest.mark.parametrize("data_set", READERS)
def test_a_class_that_train_lacks_is_an_error(tmp_path, data_set):
    pictures(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png")
    assert "class c of val/ is missing in train/" in refusal(tmp_path, data_set)


def test_folders_0_to_999_are_imagenets_numbers():
    names = [str(number) for number in range(1000)]
    numbering = number_classes(names)
    assert all(numbering.labels[name] == int(name) for name in names)
    assert "classes of ImageNet by number" in numbering.notes[0]


@pytest.mark.parametrize("data_set", READERS)
def test_other_numbers_are_read_as_text_which_is_said(tmp_path, data_set):
    names = [str(number) for number in range(12)]
    pictures(tmp_path, *(f"{split}/{name}/a.png" for split in ("train", "val") for name in names))
    train, val, _ = both(tmp_path, data_set)
    assert train.class_to_idx == val.class_to_idx == {n: i for i, n in enumerate(sorted(names))}
    assert any("as text, as by torchvision: 10 is class 2" in note for note in train.notes)


def test_names_in_the_same_order_as_numbers_and_as_text_need_no_line():
    assert number_classes(["cat", "dog", "a1", "a2"]).notes == []


@pytest.mark.parametrize("data_set", READERS)
def test_part_of_imagenet_has_its_labels_in_every_reader(tmp_path, data_set):
    pictures(tmp_path, "train/n01440764/a.png", "train/n03888257/a.png", "val/n03888257/a.png")
    _, val, count = both(tmp_path, data_set)
    assert (labels(val), count) == ([701], 1000)


def test_num_classes_makes_a_part_of_imagenet_a_data_set_of_its_own(tmp_path):
    pictures(tmp_path, "train/n01440764/a.png", "train/n03888257/a.png", "val/n03888257/a.png")
    _, val, count = both(tmp_path, "timm:folder", num_classes=2)
    assert (labels(val), count) == ([1], 2)


@pytest.mark.parametrize("data_set", READERS)
def test_one_class_alone_and_images_without_a_class_are_said(tmp_path, data_set):
    pictures(tmp_path, "train/data/a.png", "train/loose.png", "val/data/a.png")
    train, _, _ = both(tmp_path, data_set)
    assert len(train) == 1
    assert any("one class alone, data" in note for note in train.notes)
    assert any("1 images have no folder" in note for note in train.notes)


@pytest.mark.parametrize("data_set", READERS)
def test_a_flat_split_is_named_as_such(tmp_path, data_set):
    pictures(tmp_path, "train/a/1.png", "val/ILSVRC2012_val_00000001.JPEG")
    line = refusal(tmp_path, data_set)
    assert "val/ holds 1 images and no folder of a class" in line
    assert "valprep.sh" in line


@pytest.mark.parametrize("data_set", READERS)
def test_tiny_imagenet_is_read_as_downloaded(tmp_path, data_set):
    pictures(tmp_path, "train/n2/images/n2_0.JPEG", "train/n1/images/n1_0.JPEG")
    pictures(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG")
    lines = "val_0.JPEG\tn2\t0\t32\t44\t62\nval_1.JPEG\tn1\t52\t55\t57\t59\n"
    (tmp_path / "val/val_annotations.txt").write_text(lines)
    _, val, count = both(tmp_path, data_set)
    assert (count, sorted((os.path.basename(file), label) for file, label in val.samples)) == (
        2,
        [("val_0.JPEG", 1), ("val_1.JPEG", 0)],
    )


@pytest.mark.parametrize("line", ["val_0.JPEG", "val_0.JPEG\t", "../x.png\tn1"])
def test_annotations_that_are_not_tiny_imagenets_are_refused(tmp_path, line):
    pictures(tmp_path, "train/n1/images/a.png", "val/images/val_0.JPEG")
    (tmp_path / "val/val_annotations.txt").write_text(line)
    assert "line 1" in refusal(tmp_path)


def test_empty_training_folders_are_an_error_and_for_timm_no_class(tmp_path):
    pictures(tmp_path, "train/a/1.png", "val/a/1.png")
    (tmp_path / "train/b").mkdir()
    assert "no image of class b" in refusal(tmp_path)
    train, _, count = both(tmp_path, "timm:folder")
    assert count == 1
    assert any("no classes: b" in note for note in train.notes)


@pytest.mark.parametrize("data_set", READERS)
def test_pipes_devices_and_endless_folders_are_refused(tmp_path, data_set):
    pictures(tmp_path, "train/a/1.png", "val/a/1.png")
    os.mkfifo(tmp_path / "train/a/2.png")
    assert "2.png: a pipe or a device" in refusal(tmp_path, data_set)
    (tmp_path / "train/a/2.png").unlink()
    (tmp_path / "train/a/2.png").symlink_to("/dev/zero")
    assert "2.png: a pipe or a device" in refusal(tmp_path, data_set)
    (tmp_path / "train/a/2.png").unlink()
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train")
    assert "loop: leads back" in refusal(tmp_path, data_set)


def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path):
    pictures(tmp_path, "store/a/1.png", "store/b.png", "val/a/1.png")
    (tmp_path / "train/b").mkdir(parents=True)
    (tmp_path / "train/a").symlink_to(tmp_path / "store/a")
    (tmp_path / "train/b/1.png").symlink_to(tmp_path / "store/b.png")
    train, _, count = both(tmp_path)
    assert (len(train), count) == (2, 2)


def write_tar(path, names):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    with tarfile.open(path, "w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(buffer.getvalue())
            archive.addfile(entry, io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("before", ["", "./", "train/", "./train/"])
def test_tar_files_follow_the_same_rules(tmp_path, before):
    names = ["a/2021/x.png", "a/x.webp", "b/x.png", "10/x.png", "9/x.png", "a/._x.png"]
    write_tar(tmp_path / "train.tar", [before + name for name in [*names, "__MACOSX/a/x.png"]])
    write_tar(tmp_path / "val.tar", [before + "b/x.png"])
    splits = {"train_split": "train.tar", "val_split": "val.tar"}
    train, val, count = both(tmp_path, "timm:folder", **splits)
    assert (train.class_to_idx, count) == ({"10": 0, "9": 1, "a": 2, "b": 3}, 4)
    assert sorted(labels(train)) == [0, 1, 2, 2, 3]
    assert labels(val) == [3]
    small = with_transform(train, lambda image: image.resize((1, 1)))
    assert small[0][0].size == (1, 1) and train[0][0].size == (8, 8)

    # The same without the training images, whose archive has the names of the classes
    alone, count = build_dataset(False, options(tmp_path, "timm:folder", **splits))
    assert (labels(alone), count) == ([3], 4)


def test_what_is_unusual_is_a_line_of_the_log(tmp_path, run_main):
    data = tmp_path / "data"
    pictures(data, *(f"train/{name}/{i}.png" for name in ("a", "b", ".git") for i in range(4)))
    pictures(data, "val/b/1.png")
    output = run_main("--data-path", data, *TINY, *EVAL_BY_IMAGES)
    assert "train/: hidden, so neither classes nor images: .git" in output
    assert "val/ has no image of 1 of 2 classes: a" in output


# ---- how often folders are listed ----


@pytest.fixture
def listed(monkeypatch) -> Counter:
    """How often each folder below data/ was listed, by its path there."""
    found = Counter()
    scandir = os.scandir

    def counting(path):
        parts = Path(path).parts if isinstance(path, str | Path) else ()
        if "data" in parts:
            found["/".join(parts[parts.index("data") + 1 :])] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    return found


@pytest.fixture
def data(tmp_path):
    """A folder of two classes, eight images to train on and two to validate on."""
    train = [f"train/{name}/{number}.png" for name in "ab" for number in range(4)]
    pictures(tmp_path / "data", *train, "val/a/1.png", "val/b/1.png")
    return tmp_path / "data"


ONCE = dict.fromkeys(("train", "train/a", "train/b", "val", "val/a", "val/b"), 1)


@pytest.mark.parametrize("data_set", READERS)
def test_a_run_lists_each_folder_once_for_training_validation_and_calibration(
    data, data_set, run_main, listed
):
    run_main("--data-path", data, "--data-set", data_set, *TINY, *BY_IMAGES, "--epochs", "1")
    assert listed == ONCE


@pytest.mark.slow
def test_a_sweep_lists_each_folder_once_for_all_of_its_runs(data, listed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--pruners unif lamp --scores wanda taylor --sparsities 0.5 --finetune-epochs 1"
    assert sweep.sweep(["--data-path", str(data), *TINY, *IMAGES, *flags.split()]) == 0
    assert listed == ONCE


def test_an_evaluation_reads_only_the_names_of_the_training_classes(data, run_main, listed):
    """And those up to their first image."""
    pictures(data, "train/a/deep/1.png")
    run_main("--data-path", data, *TINY, "--eval")
    assert listed == ONCE
    listed.clear()
    assert class_names(data / "train") == ["a", "b"]
    assert listed.total() == 3


def test_an_evaluation_lists_training_images_once_however_many_look_at_them(data, run_main, listed):
    """Nearest neighbours vote, and a score is computed from images."""
    run_main("--data-path", data, *TINY, *EVAL_BY_IMAGES, "--num-classes", "0")
    names = ("train", "train/a", "train/b")  # once for the names of the classes
    assert listed == {**ONCE, **dict.fromkeys(names, 2)}


def test_an_evaluation_needs_training_images_only_if_they_calibrate(data, run_main, listed):
    with_them = run_main("--data-path", data, *TINY, "--eval").splitlines()
    shutil.rmtree(data / "train")
    without = run_main("--data-path", data, *TINY, "--eval").splitlines()
    assert without[-1] == with_them[-1]
    assert f"--data-path {data}: has no train/, so val/ numbers the classes" in without
    line = run_main("--data-path", data, *TINY, *EVAL_BY_IMAGES, status=2)
    assert "has no folder train/" in line


def test_a_training_needs_training_images(data, run_main):
    shutil.rmtree(data / "train")
    assert "has no folder train/" in run_main("--data-path", data, *TINY, status=2)


@pytest.mark.parametrize("data_set", READERS)
def test_another_transform_shows_the_same_images(data, data_set):
    args = options(data, data_set)
    train, _ = build_dataset(True, args, lambda image: image)
    small = with_transform(train, lambda image: image.resize((1, 1)))
    assert [image.size for image, _ in small] == [(1, 1)] * 8
    assert [image.size for image, _ in train] == [(16, 16)] * 8
    assert small.samples is train.samples
