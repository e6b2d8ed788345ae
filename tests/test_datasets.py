import gzip
import io
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import write_idx
from PIL import Image
from torchvision.io import decode_jpeg

from datasets import SAMPLE_PATH, FashionMNIST, build_dataset, build_transform, load_image
from utils import BadImageError, UserError


def options(**changes):
    defaults = dict(
        data_set="IMNET",
        data_path="",
        input_size=28,
        color_jitter=0.3,
        aa="rand-m9-mstd0.5-inc1",
        train_interpolation="bicubic",
        reprob=0.25,
        remode="pixel",
        recount=1,
        eval_crop_ratio=0.875,
        ThreeAugment=False,
        src=False,
        crop_padding=4,
        inat_category="name",
        train_split="train",
        val_split="val",
        num_classes=None,
        batch_size=1,
        seed=0,
    )
    return Namespace(**{**defaults, **changes})


def save_images(root, classes, size=(40, 30)):
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", size, (number, 0, 0)).save(folder / "a.png")


def test_the_built_in_sample_is_balanced_and_of_the_promised_size():
    for is_train, count in ((True, 600), (False, 200)):
        data, num_classes = build_dataset(is_train, options())
        assert num_classes == 10
        assert np.bincount(data.labels).tolist() == [count] * 10


def test_idx_files_are_read_plain_and_gzipped(tmp_path):
    images, labels = (
        np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3),
        np.array([3, 1], np.uint8),
    )
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "plain", labels)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress((tmp_path / "plain").read_bytes())
    )
    data = FashionMNIST(tmp_path, is_train=True)
    image, label = data[1]
    assert label == 1
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image)[:, :, 0], images[1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: b"\1" + content[1:],
        lambda content: content[:4] + b"\xff" * 4 + content[8:],
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, damage):
    for name, array in (
        ("images-idx3", np.zeros((2, 4, 3), np.uint8)),
        ("labels-idx1", np.zeros(2, np.uint8)),
    ):
        write_idx(tmp_path / f"train-{name}-ubyte", array)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="train-images"):
        FashionMNIST(tmp_path, is_train=True)


def test_a_truncated_gzip_file_is_refused(tmp_path):
    packed = (SAMPLE_PATH / "train-labels-idx1-ubyte.gz").read_bytes()
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(packed[:1000])
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 4, 3), np.uint8))
    with pytest.raises(UserError, match="damaged"):
        FashionMNIST(tmp_path, is_train=True)


def test_the_number_of_classes_comes_from_the_folder(tmp_path):
    save_images(tmp_path, ["cat", "dog", "eel"])
    data, num_classes = build_dataset(False, options(data_path=str(tmp_path)))
    assert num_classes == 3
    assert [data[i][1] for i in range(3)] == [0, 1, 2]


def test_part_of_imagenet_keeps_the_labels_of_imagenet(tmp_path):
    # Tench, English springer, parachute
    save_images(tmp_path, ["n01440764", "n02102040", "n03888257"])
    data, num_classes = build_dataset(False, options(data_path=str(tmp_path)))
    assert num_classes == 1000
    assert [data[i][1] for i in range(3)] == [0, 217, 701]


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (45, 61, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "content",
    [
        jpeg(NOISE),
        jpeg(NOISE, quality=20, subsampling=0),
        jpeg(NOISE, progressive=True, subsampling=1),
        jpeg(NOISE.convert("L")),
        jpeg(NOISE.convert("CMYK")),
    ],
    ids=["jpeg", "coarse", "progressive", "grey", "cmyk"],
)
def test_pixels_are_those_of_pillow(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    pixels, image = load_image(tmp_path / "a.jpg", as_pixels=True), load_image(tmp_path / "a.jpg")
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(image, expected)
    if isinstance(pixels, Image.Image):  # what is not in colour is left to Pillow
        assert np.array_equal(pixels, expected)
    else:
        assert np.array_equal(pixels.permute(1, 2, 0), expected)


def test_pillow_decodes_where_torchvision_no_longer_does(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.images.decode_jpeg", None)
    (tmp_path / "a.jpg").write_bytes(jpeg(NOISE))
    assert isinstance(load_image(tmp_path / "a.jpg", as_pixels=True), Image.Image)


@pytest.mark.parametrize("as_pixels", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-200],
        lambda content: content[:20],
        lambda content: content.replace(b"\0\x2d\0\x3d", b"\xff\xff\xff\xff"),
    ],
    ids=["empty", "cut", "header", "bomb"],
)
def test_a_damaged_jpeg_is_named(tmp_path, damage, as_pixels):
    (tmp_path / "a.jpg").write_bytes(damage(jpeg(NOISE)))
    with pytest.raises(BadImageError, match="a.jpg: cannot be read as an image") as error:
        load_image(tmp_path / "a.jpg", as_pixels)
    assert "BytesIO" not in str(error.value)


def test_a_file_that_cannot_be_read_to_its_end_is_named():
    packed = gzip.compress(jpeg(NOISE))[:-20]
    with pytest.raises(BadImageError, match="a.jpg: cannot be read as an image"):
        load_image("a.jpg", file=gzip.GzipFile(fileobj=io.BytesIO(packed)))


@pytest.mark.parametrize("data_set", ["IMNET", "timm:folder"])
def test_training_images_are_decoded_to_pixels_where_the_first_step_crops(
    tmp_path, monkeypatch, data_set
):
    decoded = []
    monkeypatch.setattr(
        "utils.images.decode_jpeg", lambda content: decoded.append(1) or decode_jpeg(content)
    )
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        (tmp_path / split / "one/a.jpg").write_bytes(jpeg(NOISE))
    for is_train, size, count in ((True, 48, 1), (True, 28, 0), (False, 48, 0)):
        data, _ = build_dataset(
            is_train, options(data_path=str(tmp_path), data_set=data_set, input_size=size)
        )
        decoded.clear()
        image, _ = data[0]
        assert image.shape == (3, size, size)
        assert image.dtype == (torch.uint8 if is_train else torch.float32)
        assert len(decoded) == count


def save_inaturalist(root, year):
    """Three species of two kingdoms; as in the real files, the images lie two folders deeper than
    they are said to.
    """
    ranks = [
        {"id": 0, "name": "oak", "kingdom": "Plantae"},
        {"id": 1, "name": "fox", "kingdom": "Animalia"},
        {"id": 2, "name": "owl", "kingdom": "Animalia"},
    ]
    (root / "categories.json").write_text(json.dumps(ranks))
    for split, order in (("train", [2, 0, 1]), ("val", [1, 2])):
        images, annotations = [], []
        for number in order:
            file = f"train_val{year}/{ranks[number]['kingdom']}/{number}/{split}.png"
            path = root / f"train_val{year}" / str(number) / f"{split}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
            images.append({"id": number, "file_name": file})
            annotations.append({"image_id": number, "category_id": number})
        (root / f"{split}{year}.json").write_text(
            json.dumps({"images": images, "annotations": annotations})
        )


@pytest.mark.parametrize("data_set, year", [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_is_labelled_by_the_chosen_rank_in_the_order_of_the_training_annotations(
    tmp_path, data_set, year
):
    save_inaturalist(tmp_path, year)
    common = dict(data_set=data_set, data_path=str(tmp_path))
    species, num_species = build_dataset(False, options(**common))
    kingdoms, num_kingdoms = build_dataset(False, options(**common, inat_category="kingdom"))
    assert (num_species, num_kingdoms) == (3, 2)
    # Fox, owl; the training annotations begin owl, oak, fox
    assert [species[i][1] for i in range(2)] == [2, 0]
    assert [kingdoms[i][1] for i in range(2)] == [0, 0]
    assert len(build_dataset(True, options(**common))[0]) == 3


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"annotations": []}',
        '{"annotations": [{}], "images": []}',
        "[" * 100_000,
        '{"annotations": [{"category_id": -1}], "images": []}',
        '{"annotations": [{"category_id": Infinity}], "images": []}',
        '{"annotations": [{"category_id": 0}], "images": [{"file_name": null}]}',
    ],
)
def test_annotations_that_are_not_inaturalists_are_refused(tmp_path, damage):
    save_inaturalist(tmp_path, 2018)
    (tmp_path / "train2018.json").write_text(damage)
    with pytest.raises(UserError, match=str(tmp_path)):
        build_dataset(True, options(data_set="INAT", data_path=str(tmp_path)))


@pytest.mark.parametrize("size", [28, 32, 64])
def test_transforms_give_images_of_the_input_size(size):
    image = Image.new("RGB", (50, 40))
    for is_train in (True, False):
        assert build_transform(is_train, options(input_size=size))(image).shape == (3, size, size)


def test_evaluation_of_a_small_image_of_the_right_size_changes_nothing_but_the_scale():
    pixels = np.random.RandomState(0).randint(0, 256, (28, 28, 3), dtype=np.uint8)
    tensor = build_transform(False, options())(Image.fromarray(pixels))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    restored = (tensor.permute(1, 2, 0) * std + mean) * 255
    assert np.allclose(restored.numpy(), pixels, atol=1e-3)
