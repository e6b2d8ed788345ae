"""Images with a folder for each class, in a folder or a tar file: what is found, and its labels."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from .class_folders import (
    EXTENSIONS,
    ClassFolders,
    class_names,
    differently_ordered,
    is_hidden,
    is_image,
    read_class_folders,
)
from .errors import UserError, first_line
from .images import loader_for, read_file
from .processes import on_first_process


@dataclass(frozen=True)
class Numbering:
    """The label of each class by its name, the number of classes, and lines about the order."""

    labels: dict[str, int]
    count: int
    notes: list[str]


class ClassImages(Dataset):
    """The images of a split with a folder, or a folder in a tar file, for each class.

    samples: for each image its path, or its number in the tar file, and its label.
    tar: timm's reader of the tar file, or None.
    notes: lines about what is unusual in the split.
    """

    def __init__(
        self,
        samples: list,
        numbering: Numbering,
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


def images_by_class(
    path: Path,
    is_train: bool,
    transform,
    roots: tuple[Path, Path],
    classes: Iterable[str] | None,
    num_classes: int | None,
    skip_empty: bool = False,
) -> tuple[ClassImages, int]:
    """A split with a folder of images for each class, and the number of classes.

    path: of the data, for messages.
    roots: the folders (or tar files) of the training and of the validation images.
    classes, num_classes: as for `datasets.build_dataset` and `number_classes`.
    skip_empty: a training folder without images is no class; otherwise it is an error.
    """
    train, val = roots
    root = train if is_train else val
    numbers_itself = is_train or classes is None

    def listed() -> tuple[ClassFolders, ReaderImageInTar | None, Iterable[str] | None]:
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

    found, tar, classes = on_first_process(listed)

    empty = [name for name, images in found.images.items() if not images]
    _check_folders(path, root, found, [] if skip_empty or not is_train else empty)
    filled = {name: images for name, images in found.images.items() if images}

    # The training folder numbers the classes of both splits
    numbering = number_classes(filled if classes is None else classes, num_classes)
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


# ---- helpers, not exported ----


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
        if out_of_sight := [part for part in parts if is_hidden(part)]:
            hidden.update(out_of_sight)
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
