"""`--data-set timm:NAME`: folders, tar files, torchvision's data sets and web shards, as timm reads
them.
"""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import start_main
from PIL import Image

from benchmarks.torture import differences
from datasets import SAMPLE_PATH, build_dataset, read_idx
from trainer.arguments import parse_args
from trainer.seeded_data import SeededStream, StreamLoader

pytestmark = pytest.mark.slow

RUN = [
    "--model",
    "deit_sample_patch4_28",
    "--input-size",
    "28",
    "--epochs",
    "1",
    "--warmup-epochs",
    "0",
    "--batch-size",
    "8",
    "--num_workers",
    "2",
    "--no-pretrained",
    "--amp",
    "off",
    "--no-repeated-aug",
    "--data-path",
    "data",
]
WDS = [*RUN, "--data-set", "timm:wds/fashion", "--num-classes", "10"]


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def pictures():
    """The first images of the sample, encoded, with their labels."""
    images, labels = (
        read_idx(SAMPLE_PATH, f"train-{kind}-ubyte", ndim)[:48]
        for kind, ndim in (("images-idx3", 3), ("labels-idx1", 1))
    )
    return [(png(image), int(label)) for image, label in zip(images, labels, strict=True)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def by_class(folder):
    for split in ("train", "validation"):
        for number, name in enumerate("abc"):
            (folder / split / name).mkdir(parents=True)
            for image in range(8):
                (folder / split / name / f"{image}.png").write_bytes(
                    png(np.full((28, 28), 80 * number, np.uint8))
                )
    return folder


@pytest.fixture
def shards(folder, pictures):
    """Four shards of twelve images for training and, without an even number, five for validation."""
    splits = {}
    for split, count, size in (("train", 4, 12), ("validation", 5, 7)):
        names = [f"{split}-{shard:02}.tar" for shard in range(count)]
        for shard, name in enumerate(names):
            write_tar(
                folder / name,
                {
                    file: content
                    for number, (image, label) in enumerate(
                        pictures[shard * size : (shard + 1) * size]
                    )
                    for file, content in (
                        (f"{shard}-{number}.png", image),
                        (f"{shard}-{number}.cls", b"%d" % label),
                    )
                },
            )
        splits[split] = {
            "name": split,
            "num_samples": count * size,
            "filenames": names,
            "shard_lengths": [size] * count,
        }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def data_of(*flags, is_train=True):
    return build_dataset(is_train, parse_args([*RUN, *flags]))


def test_folders_are_read_with_a_class_each(by_class):
    data, num_classes = data_of("--data-set", "timm:folder", "--reprob", "0", is_train=False)
    assert (len(data), num_classes, data.class_to_idx) == (24, 3, {"a": 0, "b": 1, "c": 2})
    image, label = data[23]
    assert (label, image.shape) == (2, (3, 28, 28))


def test_an_image_in_a_folder_that_cannot_be_read_is_named(by_class, run_main):
    (by_class / "train/b/3.png").write_bytes(b"no image")
    assert "data/train/b/3.png: cannot be read" in run_main(
        *RUN, "--data-set", "timm:folder", status=2
    )


def test_tar_files_are_read_with_a_folder_for_each_class(folder, run_main):
    for split in ("train", "val"):
        write_tar(
            folder / f"{split}.tar",
            {
                f"{name}/{number}.png": png(np.full((28, 28), number, np.uint8))
                for name in "ab"
                for number in range(8)
            },
        )
    flags = ["--data-set", "timm:", "--train-split", "train.tar", "--val-split", "val.tar"]
    assert data_of(*flags)[1] == 2
    assert "Max accuracy" in run_main(*RUN, *flags)


def test_torchvisions_data_sets_are_read(folder):
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            packed = SAMPLE_PATH / f"{prefix}-{kind}-ubyte.gz"
            (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    data, num_classes = data_of("--data-set", "timm:torch/fashion_mnist", is_train=False)
    assert (len(data), num_classes) == (2000, 10)


def test_a_run_on_shards_is_the_same_twice_and_when_it_is_stopped_and_resumed(
    shards, run_main, tmp_path, stop_at
):
    recipe = [*WDS, "--pruner", "lamp", "--sparsity", "0.5", "--epochs", "2"]
    output = run_main(*recipe, "--output_dir", "whole")
    assert "[5/6]" in output
    stop_at(9)
    run_main(*recipe, "--output_dir", "parts", status=143)
    run_main(*recipe, "--output_dir", "parts", "--resume", "auto")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def stream_loader(is_train, *flags, **options):
    data, num_classes = data_of(
        "--data-set", "timm:wds/fashion", "--num-classes", "10", *flags, is_train=is_train
    )
    return StreamLoader(SeededStream(data, 0, num_classes), 8, **{"num_workers": 2, **options})


def test_an_epoch_of_shards_has_whole_batches_in_an_order_of_its_own(shards):
    loader, epochs = stream_loader(True), []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(list(loader))
        assert [len(images) for images, _ in epochs[-1]] == [8] * 6
    first, second, again = ([labels.tolist() for _, labels in epoch] for epoch in epochs)
    assert first != second
    assert first == again
    assert all(torch.equal(one[0], two[0]) for one, two in zip(epochs[0], epochs[2], strict=True))
    loader.sampler.set_epoch(0, skip=16)
    assert [labels.tolist() for _, labels in loader] == first[2:]


@pytest.mark.parametrize("workers", [0, 2, 9])
def test_the_evaluation_of_shards_sees_every_image_once_also_when_it_is_shared(
    shards, pictures, workers
):
    labels = sorted(label for _, label in pictures[:35])
    whole = [
        label for _, batch in stream_loader(False, num_workers=workers) for label in batch.tolist()
    ]
    shared = [
        label
        for rank in range(2)
        for _, batch in stream_loader(False, num_workers=workers, share=(rank, 2))
        for label in batch.tolist()
    ]
    assert sorted(whole) == sorted(shared) == labels


def test_two_processes_train_on_their_own_shards(shards, tmp_path):
    result = start_main(*WDS, "--output_dir", "out", "--dist-eval", cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert torch.load("out/checkpoint.pth", weights_only=True)["step"] == 3


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (["timm:hfds/mnist"], "datasets.py hides"),
        (["timm:imagenet"], "expected timm:folder, timm:torch/NAME or timm:wds/NAME"),
        (["timm:torch/nothing"], "Unknown torchvision dataset"),
        (["timm:torch/cifar10"], "not found"),
        (["timm:folder", "--val-split", "test"], "has no test in it"),
        (["timm:wds/x"], "--num-classes"),
        (["timm:wds/x", "--num-classes", "10", "--train-split", "tests"], "split tests not found"),
        (["timm:wds/x", "--num-classes", "3"], "--num-classes 3"),
        (["timm:folder", "--num-classes", "2"], "has 3 classes"),
        (["timm:folder", "--train-split", "train.tar"], "has no train.tar in it"),
        (["timm:wds/x", "--num-classes", "10", "--batch-size", "64"], "--batch-size 64"),
        (["IMAGENET"], "expected one of IMNET"),
        (["IMNET", "--num-classes", "3"], "timm:NAME only"),
    ],
)
def test_what_timm_cannot_read_is_refused_in_one_line(by_class, shards, run_main, flags, culprit):
    error = run_main(*RUN, "--data-set", *flags, status=2)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert culprit in error


def rename_images(folder, split, extension):
    """Rewrites the shards of a split with images of other names."""
    for path in folder.glob(f"{split}-*.tar"):
        with tarfile.open(path) as archive:
            files = {
                member.name: archive.extractfile(member).read() for member in archive.getmembers()
            }
        renamed = {name.replace(".png", extension): content for name, content in files.items()}
        write_tar(path, renamed)


@pytest.mark.parametrize("extension", [".JPEG", ".bmp", ".tiff"])
def test_images_in_shards_may_have_the_name_of_every_format(shards, extension):
    rename_images(shards, "validation", extension)
    assert sum(len(labels) for _, labels in stream_loader(False)) == 35


def test_an_evaluation_of_no_image_is_an_error(shards, run_main):
    rename_images(shards, "validation", ".xyz")
    error = run_main(*WDS, "--eval", status=2)
    assert "no image of the shards to evaluate on can be read" in error


def test_an_epoch_of_fewer_steps_than_announced_is_an_error(shards, run_main):
    rename_images(shards, "train", ".xyz")
    assert "ended after 0 of the 6 steps" in run_main(*WDS, status=2)


def test_fewer_images_to_evaluate_than_announced_are_said(shards, run_main):
    info = json.loads((shards / "_info.json").read_text())
    info["splits"]["validation"]["num_samples"] = 40
    (shards / "_info.json").write_text(json.dumps(info))
    output = run_main(*WDS, "--eval")
    assert "The shards hold 35 images to evaluate on, and announce 40" in output
