"""Files written whole or not at all, and checkpoints read without running any code in them."""

import argparse
import contextlib
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .errors import UserError, WriteError, first_line
from .processes import is_main_process


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
    """Reads a `.pth`, a `.safetensors`, or the URL of a `.pth`, without running any code in it.

    Returns a dict with at least `model`, a state dict of tensors. A bare state dict, or one under
    `state_dict`, becomes `model`.

    Raises UserError if the file is missing or damaged, or holds anything but tensors and plain
    containers.
    """
    content = _read(source)
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, expected a dict of weights")

    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = {**content, "model": content[key]}
            break
    else:
        content = {"model": content}

    if not _is_state_dict(content["model"]):
        raise UserError(
            f"{source}: has no state dict of tensors, neither at its top nor under `model`"
        )
    return content


# ---- helpers, not exported ----


def _sync_folder(path: Path) -> None:
    """Makes the names of the files in a folder survive a power failure."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(source: str):
    """The content of a checkpoint file, of whatever type. Raises UserError."""
    try:
        # DeiT's own training checkpoints hold their arguments as a Namespace, which is as harmless
        # as a dict. Warnings are left out, since a bad file leads to an error anyway.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
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
        return torch.hub.load_state_dict_from_url(
            source,
            map_location="cpu",
            check_hash=True,
            weights_only=True,
            progress=is_main_process(),
        )
    if source.endswith(".safetensors"):
        return load_file(source)

    _check_archive(source)
    return torch.load(source, map_location="cpu", weights_only=True)


def _is_state_dict(weights: dict) -> bool:
    """Whether all values are dense tensors with data, each with a name; and there is one."""
    return bool(weights) and all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and not value.is_meta
        and value.layout == torch.strided
        for name, value in weights.items()
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
