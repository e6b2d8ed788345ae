"""Folders of images, one for each class: what in them is a class and what is an image."""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .errors import UserError, first_line

#: How the names of image files end, in capitals or not.
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".jp2",
    ".avif",
)
#: Names that systems leave in folders and archives, as well as all that begin with a dot.
LITTER = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"}


@dataclass
class ClassFolders:
    """What the folder of a split holds.

    images: the paths of each class, which is a folder directly in it, in torchvision's order;
        images deeper in such a folder are of its class. In a tar file they have numbers.
    loose: the names of images directly in it, which belong to no class.
    hidden: the names that were left out.
    """

    images: dict[str, list] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is neither a class nor an image."""
    return name.startswith(".") or name in LITTER


def is_image(name: str) -> bool:
    """Whether a file of that name is an image, by how it ends."""
    return name.lower().endswith(EXTENSIONS)


def read_class_folders(root) -> ClassFolders:
    """What a folder of classes holds. Raises UserError for pipes, devices and endless folders."""
    found = ClassFolders()
    for entry in sorted(_entries(root, found.hidden), key=lambda entry: entry.name):
        if entry.is_dir():
            found.images[entry.name] = _images_below(entry.path, found.hidden)
        elif is_image(entry.name):
            found.loose.append(entry.name)
    return found


def class_names(root) -> list[str]:
    """The folders of classes that hold an image, by name; each is read up to its first image."""
    hidden: set[str] = set()
    folders = [entry for entry in _entries(root, hidden) if entry.is_dir()]
    return sorted(folder.name for folder in folders if next(_walk(folder.path, hidden), None))


def differently_ordered(names: Iterable[str], key) -> str:
    """The first of the sorted names that would have another place if sorted by `key`, or ""."""
    as_text = sorted(names)
    pairs = zip(as_text, sorted(as_text, key=key), strict=True)
    return next((ours for ours, theirs in pairs if ours != theirs), "")


# ---- helpers, not exported ----


def _images_below(folder: str, hidden: set[str]) -> list[str]:
    """The images in a folder and below it, as torchvision orders them: by folder, then by name."""
    return [path for _, path in sorted(_walk(folder, hidden))]


def _walk(folder: str, hidden: set[str], above: tuple[str, ...] = ()):
    """The images in a folder and below it, each as the path of its folder and its own."""
    for entry in _entries(folder, hidden):
        if entry.is_dir():
            real = above
            if entry.is_symlink():
                real = (*above, os.path.realpath(folder))
                target = os.path.realpath(entry.path)
                if any(f"{place}{os.sep}".startswith(f"{target}{os.sep}") for place in real):
                    raise UserError(f"{entry.path}: leads back to a folder that it is in")
            yield from _walk(entry.path, hidden, real)
        elif is_image(entry.name):
            _check_kind(entry)
            yield folder, entry.path


def _entries(folder, hidden: set[str]) -> Iterator[os.DirEntry]:
    """What is in a folder, in any order, without hidden names, which are added to `hidden`."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    hidden.add(entry.name)
                else:
                    yield entry
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read ({first_line(error.strerror or error)})"
        ) from None


def _check_kind(entry: os.DirEntry) -> None:
    """Raises UserError for a pipe or a device, which could be read for ever.

    A link that leads nowhere passes: it is a file that cannot be read, as others are.
    """
    if entry.is_file():
        return
    try:
        kind = os.stat(entry.path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(kind):
        raise UserError(f"{entry.path}: a pipe or a device; expected an image file")
