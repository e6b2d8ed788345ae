"""The data sets of `--data-set`, the built-in sample, and their image transforms.

The name is DeiT's. It hides the package `datasets` of the Hugging Face hub from all other code of
the process, timm's reader `hfds/` among it.
"""

import contextlib
import gzip
import json
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageNetInfo,
    create_dataset,
    create_transform,
)
from torch.utils.data import Dataset
from torchvision import io, transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from augment import RandomResizedCrop, repair_posterize, three_augment
from utils import BadImageError, UserError, first_line

# Other names that timm accepts for a split
SYNONYMS = {"train": ("training",), "validation": ("val", "valid", "eval", "evaluation")}
TIMM = "timm:"  # what --data-set begins with for timm's readers
# Deprecated since torchvision 0.29; if it is gone, Pillow decodes
decode_jpeg = getattr(io, "decode_jpeg", None)
SAMPLE_PATH = Path(__file__).resolve().parent / "sample"
SMALL = 32  # images of up to this size are not zoomed into, as in DeiT
BICUBIC = transforms.InterpolationMode.BICUBIC


def build_dataset(is_train: bool, args, transform=None) -> tuple[Dataset, int]:
    """The training or validation images that the arguments ask for, and the number of classes.

    Without `--data-path` the images are the built-in sample.

    transform: maps an image to the model's input; by default DeiT's transform.
    Raises UserError if files are missing or damaged.
    """
    if args.data_path:
        name, path = args.data_set, Path(args.data_path)
    else:
        name, path = "FASHION", SAMPLE_PATH
    if not path.is_dir():
        raise UserError(f"--data-path {path}: no such folder")
    build = _timm if name.startswith(TIMM) else DATA_SETS[name]
    return build(path, is_train, transform or build_transform(is_train, args), args)


def build_transform(is_train: bool, args):
    """DeiT's transform of one image; training images become uint8 pixels for `BatchTransform`.

    Training images of up to 32 x 32 are cropped out of a padded image instead of zoomed into.
    """
    if not is_train:
        return _evaluation_transform(args)
    if args.ThreeAugment:
        return three_augment(args.input_size, args.color_jitter, args.src)

    repair_posterize()
    try:
        crop, augment, _ = create_transform(
            separate=True,
            input_size=args.input_size,
            is_training=True,
            color_jitter=args.color_jitter or None,
            auto_augment=args.aa if args.aa != "none" else None,
            interpolation=args.train_interpolation,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"--aa {args.aa}: not a policy that timm knows ({first_line(error)})"
        ) from None

    if args.input_size <= SMALL:
        resize = transforms.Resize(args.input_size, interpolation=BICUBIC)
        pad = transforms.RandomCrop(args.input_size, padding=args.crop_padding)
        zoom = transforms.Compose([resize, pad])
    else:
        zoom = RandomResizedCrop(args.input_size, interpolation=args.train_interpolation)

    # Our crop takes the place of timm's, which is the first step
    return transforms.Compose([zoom, *crop.transforms[1:], augment, transforms.PILToTensor()])


def _evaluation_transform(args):
    if args.input_size <= SMALL:
        resized = args.input_size
    else:
        resized = int(args.input_size / args.eval_crop_ratio)
    return transforms.Compose(
        [
            transforms.Resize(resized, interpolation=BICUBIC),
            transforms.CenterCrop(args.input_size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


class FashionMNIST(Dataset):
    """Images and labels in MNIST's idx files, gzipped or not; the grey images are given as RGB.

    Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) has 60,000 training and 10,000 test images of
    28 x 28, in ten classes; any idx pair of that layout will do.
    """

    num_classes = 10

    def __init__(self, root: Path, is_train: bool, transform=None):
        prefix = "train" if is_train else "t10k"
        self.images = read_idx(root, f"{prefix}-images-idx3-ubyte", ndim=3)
        self.labels = read_idx(root, f"{prefix}-labels-idx1-ubyte", ndim=1)
        if len(self.images) != len(self.labels):
            raise UserError(
                f"{root}: {len(self.images)} {prefix} images but {len(self.labels)} labels"
            )
        if self.labels.max(initial=0) >= self.num_classes:
            raise UserError(
                f"{root}: {prefix} label {self.labels.max()}, expected 0 to {self.num_classes - 1}"
            )
        self.transform = transform or (lambda image: image)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image), int(self.labels[index])


def read_idx(root: Path, name: str, ndim: int) -> np.ndarray:
    """The uint8 array of `ndim` dimensions in the idx file `root/name` or `root/name.gz`.

    Raises UserError if the file is missing, damaged or of another kind.
    """
    plain = root / name
    packed = root / f"{name}.gz"
    try:
        content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{plain}: no such file, with or without .gz") from None
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"{packed}: damaged ({error})") from None

    # The header: two zero bytes, 8 for uint8, the number of dimensions, then each size as a
    # big-endian uint32.
    header = 4 + 4 * ndim
    shape = np.frombuffer(content[4:header], ">u4").tolist() if len(content) >= header else []
    right_kind = content[:4] == bytes([0, 0, 8, ndim])
    complete = len(content) - header == np.prod(shape, dtype=object) and 0 not in shape
    if not right_kind or not complete:
        raise UserError(f"{plain}: not an idx file of {ndim} dimensions in uint8, or not all of it")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes a uint8 array as a gzipped idx file; the same array gives the same bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019, labelled by one rank of the taxonomy.

    root: has `train{year}.json` and `val{year}.json` (COCO's form: images, annotations),
        `categories.json` (for each category id, in order, its name in every rank) and the images at
        `train_val{year}/{category id}/{file}`.
    category: kingdom, phylum, class, order, supercategory, family, genus or name; classes are
        numbered as they first appear among the training annotations, as in DeiT.
    """

    def __init__(
        self, root: Path, year: int, is_train: bool, category: str = "name", transform=None
    ):
        self.transform = transform or (lambda image: image)
        self.loader = loader_for(transform)
        split = "train" if is_train else "val"
        try:
            # The name of each category in the rank that was asked for
            categories = _read_json(root / "categories.json")
            ranks = dict(enumerate(entry[category] for entry in categories))

            # The training annotations number the classes, for validation as well
            annotations = _read_json(root / f"train{year}.json")["annotations"]
            classes = dict.fromkeys(ranks[int(entry["category_id"])] for entry in annotations)
            labels = {name: label for label, name in enumerate(classes)}

            self.samples = []
            for entry in _read_json(root / f"{split}{year}.json")["images"]:
                top, _, number, file = entry["file_name"].split("/")
                self.samples.append((root / top / number / file, labels[ranks[int(number)]]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"--data-path {root}: its annotations are not iNaturalist {year}'s "
                f"({type(error).__name__}: {first_line(error)})"
            ) from None

        self.num_classes = len(labels)
        if not self.samples:
            raise UserError(
                f"--data-path {root}: no images in the annotations of iNaturalist {year}"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return self.transform(self.loader(path)), label


def load_image(path, as_pixels: bool = False, file=None) -> Image.Image | torch.Tensor:
    """The image of a file in RGB.

    as_pixels: decode a JPEG in colour with torchvision, which gives the same pixels in two thirds
        of Pillow's time, to a uint8 tensor (3, height, width).
    file: the open file, if it is open already.
    Raises BadImageError, which names the file, if it cannot be read.
    """
    try:
        with file or open(path, "rb") as source:
            content = source.read()
        image = Image.open(BytesIO(content))  # reads no more than the header
        if as_pixels and decode_jpeg and (image.format, image.mode) == ("JPEG", "RGB"):
            # If torchvision fails, Pillow decodes it or says what is wrong
            with contextlib.suppress(RuntimeError):
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return image.convert("RGB")
    except Exception as error:  # damaged files raise errors of any kind
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "in no known format" if unknown else first_line(error)
        raise BadImageError(f"{path}: cannot be read as an image ({reason})") from None


def loader_for(transform):
    """`load_image`, giving images in the form that the first step of `transform` takes."""
    first = getattr(transform, "transforms", [None])[0]
    return partial(load_image, as_pixels=isinstance(first, RandomResizedCrop))


class ReaderImages(Dataset):
    """The images of a timm reader: a folder or tar file with a folder per class."""

    def __init__(self, reader, transform):
        self.reader = reader
        self.transform = transform
        self.loader = loader_for(transform)
        self.class_to_idx = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int):
        file, label = self.reader[index]
        image = self.loader(self.reader.filename(index, absolute=True), file=file)
        return self.transform(image), label


def _timm(path, is_train, transform, args):
    """The data set that timm makes for `--data-set timm:NAME`, and its number of classes."""
    name = args.data_set.removeprefix(TIMM)
    split = args.train_split if is_train else args.val_split
    kind = name.partition("/")[0]
    folders = (split, *SYNONYMS.get(split, ()))
    if kind in ("", "folder") and not any((path / folder).exists() for folder in folders):
        raise UserError(
            f"--data-path {path}: has no {split} in it; expected --train-split and --val-split to "
            "name folders or tar files there"
        )

    try:
        data = create_dataset(
            name,
            str(path),
            split,
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.seed,
            transform=transform,
        )
    except ImportError as error:
        raise UserError(f"--data-set {args.data_set}: {first_line(error)}") from None
    except Exception as error:  # each reader has its own way to refuse
        hint = "; pip install webdataset" if "install webdataset" in str(error) else ""
        raise UserError(
            f"--data-set {args.data_set} --data-path {path}, split {split}: "
            f"{first_line(error)}{hint}"
        ) from None

    classes = args.num_classes
    if kind == "wds":
        if not classes:
            raise UserError(
                f"--data-set {args.data_set} needs --num-classes as well: expected the number of "
                "classes, as shards do not tell it"
            )
        return data, classes

    if kind == "torch":
        names = getattr(data, "all_categories", None)
        if names is None:
            names = getattr(data, "classes", [])
        if hasattr(data, "loader"):
            data.loader = loader_for(transform)  # its errors name the file
    else:
        # timm's own class skips files that cannot be read
        data = ReaderImages(data.reader, transform)
        names = data.class_to_idx

    if classes and classes < len(names):
        raise UserError(f"--num-classes {classes}: {path} has {len(names)} classes")
    return data, classes or len(names)


def _read_json(path: Path):
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from None


def _image_folder(path, is_train, transform, args):
    root = path / ("train" if is_train else "val")
    if not root.is_dir():
        raise UserError(
            f"--data-path {path}: has no folder {root.name}/ with one folder of images per class"
        )
    try:
        data = ImageFolder(root, transform=transform, loader=loader_for(transform))
    except FileNotFoundError as error:
        raise UserError(f"--data-path {path}: {' '.join(str(error).split())}") from None

    # A part of ImageNet keeps ImageNet's labels, so that the head of a pretrained model fits it
    synsets = {name: label for label, name in enumerate(ImageNetInfo().label_names())}
    if not set(data.classes) <= set(synsets):
        return data, len(data.classes)
    data.class_to_idx = {name: synsets[name] for name in data.classes}
    samples = [(file, synsets[data.classes[label]]) for file, label in data.samples]
    data.samples = samples
    data.imgs = samples
    data.targets = [label for _, label in samples]
    return data, len(synsets)


def _cifar(kind, num_classes):
    def build(path, is_train, transform, args):
        try:
            return kind(path, train=is_train, transform=transform), num_classes
        except RuntimeError:
            raise UserError(
                f"--data-path {path}: has no intact {kind.base_folder}/ in it"
            ) from None

    return build


def _fashion(path, is_train, transform, args):
    return FashionMNIST(path, is_train, transform), FashionMNIST.num_classes


def _inaturalist(year):
    def build(path, is_train, transform, args):
        data = INaturalist(path, year, is_train, args.inat_category, transform)
        return data, data.num_classes

    return build


DATA_SETS = {
    "IMNET": _image_folder,
    "CIFAR": _cifar(CIFAR100, 100),
    "CIFAR10": _cifar(CIFAR10, 10),
    "FASHION": _fashion,
    "INAT": _inaturalist(2018),
    "INAT19": _inaturalist(2019),
}
