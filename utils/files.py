"""Files that are written whole or not at all, and checkpoints that are read without running code in
them.
"""

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
    """Replaces `path` by what `write(file)` writes: a temporary file beside it is synced, then
    renamed.

    There is one writer to a folder (see `run_folder.RunFolder`), so what a killed one left is
    simply overwritten. Raises WriteError when there is no room, leaving the old file as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, has to survive a power failure
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # Torch.save wraps what the file raised
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise WriteError(
                f"{path}: cannot be written ({cause.strerror or first_line(cause)}); what it held "
                "before is whole"
            ) from None
        raise


def load_checkpoint(source: str) -> dict:
    """Reads a checkpoint (`.pth`, `.safetensors`, or the URL of a `.pth`) without running any code
    in it.

    Returns a dict with at least `model`, a state dict of tensors; bare state dicts and those under
    `state_dict` are wrapped. Raises UserError when the file is missing, damaged, or holds anything
    but tensors and plain containers.
    """
    try:
        # DeiT's own training checkpoints carry their arguments as a Namespace, which is as harmless
        # as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says it all
            if source.startswith(("https://", "http://")):
                content = torch.hub.load_state_dict_from_url(
                    source,
                    map_location="cpu",
                    check_hash=True,
                    weights_only=True,
                    progress=is_main_process(),
                )
            elif source.endswith(".safetensors"):
                content = load_file(source)
            else:
                _check_archive(source)
                content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{source}: no such checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"{source}: is a folder; give a checkpoint file in it") from None
    except pickle.UnpicklingError as error:
        if code := re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error)):
            raise UserError(
                f"{source}: refused, it holds {code[1]} where only tensors and plain containers "
                "are read"
            ) from None
        raise UserError(f"{source}: not a checkpoint") from None
    except Exception as error:
        # Damaged files raise whatever the byte that is wrong leads to
        raise UserError(f"{source}: cannot be read as a checkpoint ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, expected a dict of weights")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = {**content, "model": content[key]}
            break
    else:
        content = {"model": content}
    weights = content["model"]
    if not weights or not all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and not value.is_meta
        and value.layout == torch.strided
        for name, value in weights.items()
    ):
        raise UserError(
            f"{source}: has no state dict of tensors, neither at its top nor under `model`"
        )
    return content


def _check_archive(source: str) -> None:
    """Raises ValueError when a checkpoint in torch's zip format is damaged anywhere; torch.load
    checks no checksums.
    """
    if not zipfile.is_zipfile(source):
        return
    with zipfile.ZipFile(source) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("compressed, which torch.save never does")
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")
