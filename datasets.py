"""The data sets of `--data-set`, the built-in sample, and their image transforms.

The name is DeiT's. It hides the package `datasets` of the Hugging Face hub from all other code of
the process, timm's reader `hfds/` among it.
"""

import contextlib
import copy
import gzip
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
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
    set_img_extensions,
)
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision import io, transforms
from torchvision.datasets import CIFAR10, CIFAR100

import utils
from augment import RandomResizedCrop, repair_posterize, three_augment
from utils import (
    EXTENSIONS,
    BadImageError,
    ClassFolders,
    UserError,
    class_names,
    differently_ordered,
    first_line,
    forget_other_formats,
    is_hidden,
    is_image,
    open_image,
    read_class_folders,
    read_file,
    to_rgb,
)

# Other names that timm accepts for a split
SYNONYMS = {"train": ("training",), "validation": ("val", "valid", "eval", "evaluation")}
TIMM = "timm:"  # what --data-set begins with for timm's readers
# Deprecated since torchvision 0.29; if it is gone, Pillow decodes
decode_jpeg = getattr(io, "decode_jpeg", None)
SAMPLE_PATH = Path(__file__).resolve().parent / "sample"
SMALL = 32  # images of up to this size are not zoomed into, as in DeiT
IDX_LARGEST = 2**31  # bytes of an idx file, unpacked; the largest one of EMNIST has a quarter
BICUBIC = transforms.InterpolationMode.BICUBIC

# Also in data workers, which import this module
forget_other_formats()


def build_dataset(
    is_train: bool, args, transform=None, classes: Iterable[str] | None = None
) -> tuple[Dataset, int]:
    """The training or validation images that the arguments ask for, and the number of classes.

    Without `--data-path` the images are the built-in sample. A data set with a folder for each
    class has `notes`, lines about what is unusual in it.

    transform: maps an image to the model's input; by default DeiT's transform.
    classes: the names of the training classes, which number those of the validation images; by
        default they are read from the training folder, which is not listed whole for that. If
        there is none, the validation images number the classes, and a note says so.
    With several processes, each calls it; the first lists folders and tar files for all.
    Raises UserError if files are missing or damaged.
    """
    if args.data_path:
        name, path = args.data_set, Path(args.data_path)
    else:
        name, path = "FASHION", SAMPLE_PATH
    if not path.is_dir():
        raise UserError(f"--data-path {path}: no such folder")
    build = _timm if name.startswith(TIMM) else DATA_SETS[name]
    return build(path, is_train, transform or build_transform(is_train, args), args, classes)


def with_transform(data: Dataset, transform) -> Dataset:
    """The same images under another transform; nothing is listed or read again."""
    same = copy.copy(data)
    same.transform = transform
    if hasattr(data, "loader"):
        same.loader = loader_for(transform)
    return same


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


def normalization(args) -> tuple[list[float], list[float]]:
    """The mean and the deviation of the arguments, three numbers each; ImageNet's by default."""
    mean = getattr(args, "mean", None) or IMAGENET_DEFAULT_MEAN
    std = getattr(args, "std", None) or IMAGENET_DEFAULT_STD
    return list(mean), list(std)


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
            transforms.Normalize(*normalization(args)),
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
        content = read_file(plain, IDX_LARGEST) if plain.exists() else _unpack(packed)
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


def _unpack(path: Path) -> bytes:
    """The content of a gzipped file. Raises UserError for a bomb."""
    with gzip.open(BytesIO(read_file(path))) as file:
        parts = []
        size = 0
        while part := file.read(2**24):
            parts.append(part)
            size += len(part)
            if size > IDX_LARGEST:
                raise UserError(f"{path}: unpacks to more than {IDX_LARGEST:,} bytes")
    return b"".join(parts)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes a uint8 array as a gzipped idx file; the same array gives the same bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019, labelled by one rank of the taxonomy.

    root: has `train{year}.json` and `val{year}.json` (COCO's form: images, annotations),
        `categories.json` (for each category id, in order, its name in every rank) and the images at
        `train_val{year}/{category id}/{file}`.
    category: kingdom, phylum, class, order, supercategory, family, genus or name.
    classes: the names of the classes in the order of their numbers; by default the one in which
        they first appear among the training annotations, as in DeiT.
    """

    def __init__(
        self,
        root: Path,
        year: int,
        is_train: bool,
        category: str = "name",
        transform=None,
        classes: Iterable[str] | None = None,
    ):
        self.transform = transform or (lambda image: image)
        self.loader = loader_for(transform)
        try:
            # The name of each category in the rank that was asked for
            categories = _read_json(root / "categories.json")
            ranks = dict(enumerate(entry[category] for entry in categories))

            # The training annotations number the classes, for validation as well
            train = {}
            if is_train or classes is None:
                train = _read_json(root / f"train{year}.json")
                classes = dict.fromkeys(
                    ranks[int(entry["category_id"])] for entry in train["annotations"]
                )
            labels = {name: label for label, name in enumerate(classes)}

            self.samples = []
            split = train if is_train else _read_json(root / f"val{year}.json")
            for entry in split["images"]:
                top, _, number, file = entry["file_name"].split("/")
                self.samples.append((root / top / number / file, labels[ranks[int(number)]]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"--data-path {root}: its annotations are not iNaturalist {year}'s "
                f"({type(error).__name__}: {first_line(error)})"
            ) from None

        self.class_to_idx = labels
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
        content = read_file(path) if file is None else _read_and_close(file)
        image = open_image(content)
        if as_pixels and decode_jpeg and (image.format, image.mode) == ("JPEG", "RGB"):
            # If torchvision fails, Pillow decodes it or says what is wrong
            with contextlib.suppress(RuntimeError):
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return to_rgb(image)
    except UserError as error:
        raise BadImageError(str(error)) from None
    except Exception as error:  # damaged files raise errors of any kind
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "in no known format" if unknown else first_line(error)
        raise BadImageError(f"{path}: cannot be read as an image ({reason})") from None


def _read_and_close(file) -> bytes:
    with file:
        return file.read()


def loader_for(transform):
    """`load_image`, giving images in the form that the first step of `transform` takes."""
    first = getattr(transform, "transforms", [None])[0]
    return partial(load_image, as_pixels=isinstance(first, RandomResizedCrop))


class ClassImages(Dataset):
    """The images of a split with a folder, or a folder in a tar file, for each class.

    samples: for each image its path, or its number in the tar file, and its label.
    tar: timm's reader of the tar file, or None.
    notes: lines about what is unusual in the split.
    """

    def __init__(
        self,
        samples: list,
        numbering: "Numbering",
        transform,
        tar: ReaderImageInTar | None,
        notes: list[str],
    ):
        self.samples = samples
        self.class_to_idx = numbering.labels
        self.classes = list(numbering.labels)
        self.transform = transform
        self.loader = loader_for(transform)
        self.tar = tar
        self.notes = notes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        sample, label = self.samples[index]
        if self.tar is None:
            image = self.loader(sample)
        else:
            file, _ = self.tar[sample]
            image = self.loader(self.tar.filename(sample, absolute=True), file=file)
        return self.transform(image), label


@dataclass(frozen=True)
class Numbering:
    """The label of each class by its name, the number of classes, and lines about the order."""

    labels: dict[str, int]
    count: int
    notes: list[str]


def number_classes(names: Iterable[str], num_classes: int | None = None) -> Numbering:
    """The labels of classes that are named by folders; the same for every reader.

    ImageNet's synsets, or a part of them, and 1000 folders that are named 0 to 999 have ImageNet's
    labels, so that the head of a pretrained model fits them. Other names are numbered in the order
    of their text, as by torchvision and DeiT.

    num_classes: the number of classes that is asked for, which may exclude ImageNet's labels.
    """
    names = sorted(names)
    synsets = {name: label for label, name in enumerate(ImageNetInfo().label_names())}
    if names and set(names) <= set(synsets) and (num_classes or 1000) >= 1000:
        notes = []
        if len(names) < len(synsets):
            notes = [f"{len(names)} synsets of ImageNet, which keep its labels of 1000 classes"]
        return Numbering({name: synsets[name] for name in names}, len(synsets), notes)

    # Folders that are numbers
    decimal = all(name.isascii() and name.isdigit() for name in names)
    if decimal and sorted(map(int, names)) == list(range(1000)):
        note = "folders 0 to 999 are the classes of ImageNet by number"
        return Numbering({name: int(name) for name in names}, 1000, [note])

    labels = {name: label for label, name in enumerate(names)}
    notes = []
    if moved := differently_ordered(names, natural_key):
        kind = "folders that are named by numbers" if decimal else "classes"
        notes = [
            f"{kind} are numbered in the order of their names as text, as by torchvision: "
            f"{moved} is class {labels[moved]}"
        ]
    return Numbering(labels, len(labels), notes)


def _class_images(
    path: Path,
    is_train: bool,
    args,
    transform,
    roots: tuple[Path, Path],
    classes: Iterable[str] | None,
    skip_empty: bool = False,
) -> tuple[ClassImages, int]:
    """A split with a folder of images for each class, and the number of classes.

    roots: the folders (or tar files) of the training and of the validation images.
    skip_empty: a training folder without images is no class; otherwise it is an error.
    """
    train, val = roots
    root = train if is_train else val
    numbers_itself = is_train or classes is None

    def listed() -> tuple[ClassFolders, ReaderImageInTar | None, list[str] | None]:
        """What is in the split, and the names of the training classes if they are there."""
        names = classes
        if names is None and not is_train:
            names = _training_classes(train)
        annotations = root / "val_annotations.txt"
        if root.is_file():
            return *_in_tar(root, names), names
        if not is_train and annotations.is_file():
            return _tiny_imagenet(root, annotations), None, names
        return read_class_folders(root), None, names

    found, tar, classes = utils.on_first_process(listed)

    empty = [name for name, images in found.images.items() if not images]
    _check_folders(path, root, found, [] if skip_empty or not is_train else empty)
    filled = {name: images for name, images in found.images.items() if images}

    # The training folder numbers the classes of both splits
    numbering = number_classes(filled if classes is None else classes, args.num_classes)
    labels = numbering.labels
    for name in filled:
        if name not in labels:
            raise UserError(
                f"--data-path {path}: class {name} of {val.name}/ is missing in {train.name}/; "
                f"expected a folder in {train.name}/ for each one in {val.name}/"
            )

    samples = [(image, labels[name]) for name in sorted(filled) for image in filled[name]]
    notes = [*_notes(root, found, empty, labels, is_train)]
    if numbers_itself:
        notes += numbering.notes
    if classes is None and not is_train:
        notes.append(f"has no {train.name}/, so {val.name}/ numbers the classes")
    notes = [f"--data-path {path}: {note}" for note in notes]
    return ClassImages(samples, numbering, transform, tar, notes), numbering.count


def _training_classes(train: Path) -> list[str] | None:
    """The classes of the training folder or tar file; None if there is no such thing."""
    if train.is_dir():
        return class_names(train)
    return list(_in_tar(train)[0].images) if train.exists() else None


def _check_folders(path: Path, root: Path, found: ClassFolders, empty: list[str]) -> None:
    """Raises UserError for a split without classes, or with folders of classes that are empty."""
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UserError(
            f"--data-path {path}: {root.name}/ has no image of class {empty[0]}{more}; expected "
            "files such as .jpg or .png in the folder of each class"
        )
    if any(found.images.values()):
        return

    if found.loose:
        ilsvrc = any(name.startswith("ILSVRC2012_val") for name in found.loose)
        hint = "; the script valprep.sh sorts those of ImageNet" if ilsvrc else ""
        raise UserError(
            f"--data-path {path}: {root.name}/ holds {len(found.loose):,} images and no folder of "
            f"a class; expected one folder of images per class{hint}"
        )
    raise UserError(
        f"--data-path {path}: {root.name}/ has no images in it; expected one folder of images per "
        "class"
    )


def _notes(root: Path, found: ClassFolders, empty: list[str], labels: dict, is_train: bool):
    """Lines about what is unusual in a split."""
    name = root.name
    filled = [label for label, images in found.images.items() if images]
    if found.hidden:
        yield f"{name}/: hidden, so neither classes nor images: {_shown(found.hidden)}"
    if found.loose:
        yield f"{name}/: {len(found.loose):,} images have no folder, so no class, and are left out"
    if is_train and empty:
        yield f"{name}/: folders without images are no classes: {_shown(empty)}"
    if is_train and len(filled) == 1:
        yield (
            f"{name}/ has one class alone, {filled[0]}: every model is right on it; is this the "
            "folder with the classes?"
        )

    missing = [label for label in labels if label not in filled]
    if missing:
        yield f"{name}/ has no image of {len(missing)} of {len(labels)} classes: {_shown(missing)}"


def _shown(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, for a line of the log."""
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _tiny_imagenet(root: Path, annotations: Path) -> ClassFolders:
    """The validation images of Tiny-ImageNet as downloaded, in images/, with their classes."""
    found = ClassFolders()
    try:
        lines = read_file(annotations).decode().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{annotations}: cannot be read ({first_line(error)})") from None

    for number, line in enumerate(lines, start=1):
        file, _, rest = line.partition("\t")
        name = rest.partition("\t")[0].strip()
        if not file or not name or Path(file).name != file:
            raise UserError(f"{annotations}: line {number}: expected a file, a tab and its class")
        found.images.setdefault(name, []).append(str(root / "images" / file))
    return found


def _in_tar(
    root: Path, classes: Iterable[str] | None = None
) -> tuple[ClassFolders, ReaderImageInTar]:
    """The images of a tar file by class, as their numbers in timm's reader, and the reader.

    A class is the first folder in the archive, or the name of a tar file in it. An archive of one
    folder, which holds all others, has its classes in that.
    """
    set_img_extensions(EXTENSIONS)
    reader = ReaderImageInTar(str(root))
    members = []
    hidden = set()
    for number, (member, _, archive) in enumerate(reader.samples):
        inner = os.path.splitext(archive.name)[0] if archive is not None else ""
        parts = [part for part in Path(inner, member.name).parts if part not in ("/", "..")]
        if found := [part for part in parts if is_hidden(part)]:
            hidden.update(found)
        elif is_image(parts[-1]):
            members.append((number, parts))

    # The folder that was packed
    first = {parts[0] for _, parts in members}
    holds_all = len(first) == 1 and all(len(parts) > 2 for _, parts in members)
    if holds_all and first.isdisjoint(classes or ()):
        members = [(number, parts[1:]) for number, parts in members]

    found = ClassFolders(hidden=hidden)
    for number, parts in members:
        if len(parts) == 1:
            found.loose.append(parts[0])
        else:
            found.images.setdefault(parts[0], []).append(number)
    return found, reader


def _timm(path, is_train, transform, args, classes=None):
    """The data set that timm makes for `--data-set timm:NAME`, and its number of classes."""
    name = args.data_set.removeprefix(TIMM)
    kind = name.partition("/")[0]
    if name in ("", "folder", "torch/folder", "torch/image_folder"):
        return _timm_folder(path, is_train, transform, args, classes)

    split = args.train_split if is_train else args.val_split
    options = {"transform": transform}
    if kind == "wds":
        # timm would look for three kinds of images alone, and clip those of 16 bits
        options["transform"] = transforms.Compose([to_rgb, transform])
        options["input_img_mode"] = ""
        options["input_key"] = ";".join(extension[1:] for extension in EXTENSIONS)
    try:
        data = create_dataset(
            name,
            str(path),
            split,
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.seed,
            **options,
        )
    except ImportError as error:
        raise UserError(f"--data-set {args.data_set}: {first_line(error)}") from None
    except Exception as error:  # each reader has its own way to refuse
        raise _refused(args, path, split, error) from None

    if kind == "wds":
        if not args.num_classes:
            raise UserError(
                f"--data-set {args.data_set} needs --num-classes as well: expected the number of "
                "classes, as shards do not tell it"
            )
        return data, args.num_classes

    names = getattr(data, "all_categories", None)
    if names is None:
        names = getattr(data, "classes", [])
    if hasattr(data, "loader"):
        data.loader = loader_for(transform)  # its errors name the file
    return data, _count(args, path, len(names))


def _timm_folder(path, is_train, transform, args, classes):
    """The folder or tar file of a split, in timm's order, and its number of classes."""
    roots = _split_root(path, args.train_split), _split_root(path, args.val_split)
    split = args.train_split if is_train else args.val_split
    root = roots[0] if is_train else roots[1]
    if not root.exists():
        raise UserError(
            f"--data-path {path}: has no {split} in it; expected --train-split and --val-split to "
            "name folders or tar files there"
        )

    try:
        data, count = _class_images(path, is_train, args, transform, roots, classes, True)
    except UserError:
        raise
    except Exception as error:  # the reader of tar files
        raise _refused(args, path, split, error) from None

    if root.is_dir():
        data.samples.sort(key=_natural_path)
    else:
        data.samples.sort()  # numbers of timm's reader, which has sorted the files
    return data, _count(args, path, count)


def _natural_path(sample: tuple[str, int]) -> list:
    return natural_key(sample[0])


def _split_root(path: Path, split: str) -> Path:
    """The folder or tar file of a split, by its name or another one that timm accepts."""
    names = (split, *SYNONYMS.get(split, ()))
    return next((path / name for name in names if (path / name).exists()), path / split)


def _refused(args, path: Path, split: str, error: Exception) -> UserError:
    hint = "; pip install webdataset" if "install webdataset" in str(error) else ""
    return UserError(
        f"--data-set {args.data_set} --data-path {path}, split {split}: {first_line(error)}{hint}"
    )


def _count(args, path: Path, found: int) -> int:
    """The number of classes, `--num-classes` or those that were found; fewer are an error."""
    if args.num_classes and args.num_classes < found:
        raise UserError(f"--num-classes {args.num_classes}: {path} has {found} classes")
    return args.num_classes or found


def _read_json(path: Path):
    try:
        return json.loads(read_file(path, IDX_LARGEST))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from None


def _image_folder(path, is_train, transform, args, classes=None):
    roots = path / "train", path / "val"
    root = roots[0] if is_train else roots[1]
    if not root.is_dir():
        raise UserError(
            f"--data-path {path}: has no folder {root.name}/ with one folder of images per class"
        )
    return _class_images(path, is_train, args, transform, roots, classes)


def _cifar(kind, num_classes):
    def build(path, is_train, transform, args, classes=None):
        try:
            return kind(path, train=is_train, transform=transform), num_classes
        except RuntimeError:
            raise UserError(
                f"--data-path {path}: has no intact {kind.base_folder}/ in it"
            ) from None

    return build


def _fashion(path, is_train, transform, args, classes=None):
    return FashionMNIST(path, is_train, transform), FashionMNIST.num_classes


def _inaturalist(year):
    def build(path, is_train, transform, args, classes=None):
        data = INaturalist(path, year, is_train, args.inat_category, transform, classes)
        return data, len(data.class_to_idx)

    return build


DATA_SETS = {
    "IMNET": _image_folder,
    "CIFAR": _cifar(CIFAR100, 100),
    "CIFAR10": _cifar(CIFAR10, 10),
    "FASHION": _fashion,
    "INAT": _inaturalist(2018),
    "INAT19": _inaturalist(2019),
}
