"""Files written whole or not at all, and checkpoints read without running any code in them."""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import pickle
import re
import urllib.parse
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .errors import UserError, WriteError, first_line
from .processes import is_main_process

#: Where a file may have its weights, the first found first; DINO's teacher is the better model.
MODEL = ("model", "state_dict", "model_state_dict", "teacher", "student", "module")
#: Where it may have their moving average.
AVERAGE = ("model_ema", "state_dict_ema", "ema")

#: What DistributedDataParallel, timm's averages and torch.compile put before names, and amid them.
WRAPPER = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")

#: Keys that every checkpoint of this project has; its names are those of the model itself.
OURS = {"version", "max_accuracy"}

#: Classes without any effect, as they are pickled; a Windows path can be made on Windows only.
HARMLESS: list = [
    argparse.Namespace,
    *(
        (getattr(pathlib, f"Pure{system}Path"), f"{module}.{pure}{system}Path")
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "Windows")
        for pure in ("", "Pure")
    ),
]

#: Masks of torch.nn.utils.prune, of its successor, and of apex: their names, those of the weights
#: before they are masked, and after.
MASKED = (
    (r"(.*)_mask", r"\1_orig", r"\1"),
    (r"(.*)parametrizations\.(\w+)\.0\.mask", r"\1parametrizations.\2.original", r"\1\2"),
    (r"(.*)__(\w+)_mma_mask", r"\1\2", r"\1\2"),
)

#: Bytes that tensors may have beyond those of their storage: some expand a buffer, few a lot.
MOST_EXPANDED = 2**24


def save_checkpoint(content: dict, path) -> None:
    """Writes a checkpoint, whole or not at all. Raises WriteError."""
    write_atomically(Path(path), lambda file: torch.save(content, file))


def write_atomically(path: Path, write) -> None:
    """Replaces the file with the bytes that `write(file)` writes, whole or not at all.

    A temporary file in the same folder is synced, then renamed. A folder has one writer (see
    `run_folder.RunFolder`), so the temporary file of a killed one is simply overwritten.

    Raises WriteError, for example if the disk is full; the old file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

        # torch.save wraps the error of the file.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise WriteError(
                f"{path}: cannot be written ({cause.strerror or first_line(cause)}); what it held "
                "before is whole"
            ) from None
        raise


def load_checkpoint(source: str) -> dict:
    """Reads a `.pth` or a `.safetensors`, a file or a URL, without running any code in it.

    Returns a dict with at least `model`, a state dict of tensors, and `model_ema` if the file has a
    moving average. Both are found under the names that DeiT, timm and DINO give them (see `MODEL`
    and `AVERAGE`), or at the top. The wrappers of DataParallel and torch.compile are taken off
    their names. Weights that torch.nn.utils.prune and its like keep apart from their masks become
    zero where they are masked; the masks are in `foreign_masks`, bool tensors by weight.

    Raises UserError if the file is missing or damaged, or holds anything but tensors and plain
    containers.
    """
    content = _read(source)
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, expected a dict of weights")
    _check_memory(content, source)

    model = next((key for key in MODEL if isinstance(content.get(key), dict)), None)
    average = next((key for key in AVERAGE if isinstance(content.get(key), dict)), None)
    if model:
        found = {**content, "model": content[model]}
    elif average:
        found = {**content, "model": content[average]}
    else:
        found = {"model": content}
    if average:
        found["model_ema"] = content[average]

    for key in ("model", "model_ema"):
        if key in found and not _is_state_dict(found[key]):
            raise UserError(
                f"{source}: has no state dict of tensors, neither at its top nor under `{key}`"
            )
        if key in found:
            weights = found[key]
            if not found.keys() >= OURS:
                weights = {WRAPPER.sub(r"\1", name): value for name, value in weights.items()}
            found[key], masks = _apply_masks(weights)
            if masks and key == "model":
                found["foreign_masks"] = masks
    return found


# ---- helpers, not exported ----


def _sync_folder(path: Path) -> None:
    """Makes the names of the files in a folder survive a power failure."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(folder)


def _read(source: str):
    """The content of a checkpoint file, of whatever type. Raises UserError."""
    try:
        # DeiT's own training checkpoints hold their arguments as a Namespace, paths among them,
        # which is as harmless as a dict. Warnings are left out, since a bad file leads to an error
        # anyway.
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _load(source)
    except FileNotFoundError:
        raise UserError(f"{source}: no such checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"{source}: is a folder; give a checkpoint file in it") from None
    except pickle.UnpicklingError as error:
        if code := re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error)):
            raise UserError(
                f"{source}: refused, it holds {code[1]}; only tensors and plain containers are read"
            ) from None
        raise UserError(f"{source}: not a checkpoint") from None
    except Exception as error:
        # A damaged file may raise any error.
        raise UserError(f"{source}: cannot be read as a checkpoint ({first_line(error)})") from None


def _load(source: str):
    if source.startswith(("https://", "http://")):
        return _load_url(source)
    if source.endswith(".safetensors"):
        return load_file(source)

    _check_archive(source)
    return torch.load(source, map_location="cpu", weights_only=True)


def _load_url(url: str):
    """The content of a URL, from torch.hub's cache if it is there and whole.

    The cache knows the whole address: many files are called checkpoint.pth. While one process
    downloads, the others wait.
    """
    name = Path(urllib.parse.urlparse(url).path).name
    digest = re.search(r"-([0-9a-f]{8,})\.", name)  # of the content, as torch.hub has it
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"

    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            with contextlib.suppress(Exception):  # a damaged file may raise any error
                return _load(str(path))
        torch.hub.download_url_to_file(
            url, str(path), digest[1] if digest else None, progress=is_main_process()
        )
        return _load(str(path))


def _is_state_dict(weights: dict) -> bool:
    """Whether all values are dense tensors with data, each with a name; and there is one."""
    return bool(weights) and all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and not value.is_meta
        and value.layout == torch.strided
        for name, value in weights.items()
    )


def _apply_masks(weights: dict) -> tuple[dict, dict]:
    """The weights with zeros where masks of `MASKED` have them, and the masks by weight."""
    plain = dict(weights)
    masks = {}
    for key, mask in weights.items():
        for pattern, before, after in MASKED:
            found = re.fullmatch(pattern, key)
            weight = weights.get(found.expand(before)) if found else None
            if found is None or weight is None or weight.shape != mask.shape:
                continue
            if not weight.is_floating_point() or weight.element_size() < 2:
                continue

            # The mask and its weight, under their own names, become one weight
            del plain[key]
            plain.pop(found.expand(before), None)
            name = found.expand(after)
            masks[name] = mask.float() != 0
            plain[name] = weight.where(masks[name], 0)
            plain.pop(key.replace("_mma_mask", "_mma_pruned_p"), None)
            break
    return plain, masks


def _check_memory(content, source: str) -> None:
    """Raises UserError for tensors much larger than their storage: a small file, much memory."""
    expanded = 0
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            size = value.numel() * value.element_size()
            expanded += max(size - value.untyped_storage().nbytes(), 0)

    if expanded > MOST_EXPANDED:
        raise UserError(
            f"{source}: refused, its tensors are {expanded} bytes larger than what is stored"
        )


def _check_archive(source: str) -> None:
    """Raises ValueError if a file in torch's zip format is damaged anywhere.

    torch.load itself checks no checksums.
    """
    if not zipfile.is_zipfile(source):
        return

    with zipfile.ZipFile(source) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("compressed, which torch.save never does")
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")
