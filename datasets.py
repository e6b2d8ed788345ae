"""The data sets of `--data-set`, and the built-in sample.

The name is DeiT's. It hides the package `datasets` of the Hugging Face hub from all other code of
the process, timm's reader `hfds/` among it.
"""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

# Names that are imported as themselves are for others, who find them here
from augment import build_transform as build_transform
from augment import normalization as normalization
from utils import (
    EXTENSIONS,
    UserError,
    first_line,
    forget_other_formats,
    images_by_class,
    loader_for,
    read_file,
    read_idx,
    to_rgb,
)
from utils import load_image as load_image
from utils import number_classes as number_classes
from utils import write_idx as write_idx

# Other names that timm accepts for a split
SYNONYMS = {"train": ("training",), "validation": ("val", "valid", "eval", "evaluation")}
TIMM = "timm:"  # what --data-set begins with for timm's readers
LARGEST_JSON = 2**31  # bytes of a file of annotations
SAMPLE_PATH = Path(__file__).resolve().parent / "sample"

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
        data, count = images_by_class(
            path, is_train, transform, roots, classes, args.num_classes, skip_empty=True
        )
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
        return json.loads(read_file(path, LARGEST_JSON))
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
    return images_by_class(path, is_train, transform, roots, classes, args.num_classes)


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
