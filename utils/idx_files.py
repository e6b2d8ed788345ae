"""Arrays of uint8 in MNIST's idx files, gzipped or not."""

import gzip
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np

from .errors import UserError
from .images import read_file

LARGEST = 2**31  # bytes of an idx file, unpacked; the largest one of EMNIST has a quarter


def read_idx(root: Path, name: str, ndim: int) -> np.ndarray:
    """The uint8 array of `ndim` dimensions in the idx file `root/name` or `root/name.gz`.

    Raises UserError if the file is missing, damaged or of another kind.
    """
    plain = root / name
    packed = root / f"{name}.gz"
    try:
        content = read_file(plain, LARGEST) if plain.exists() else _unpack(packed)
    except FileNotFoundError:
        raise UserError(f"{plain}: no such file, with or without .gz") from None
    except (OSError, EOFError, zlib.error) as error:
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


# ---- helpers, not exported ----


def _unpack(path: Path) -> bytes:
    """The content of a gzipped file. Raises UserError for a bomb."""
    with gzip.open(BytesIO(read_file(path))) as file:
        parts = []
        size = 0
        while part := file.read(2**24):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                raise UserError(f"{path}: unpacks to more than {LARGEST:,} bytes")
    return b"".join(parts)
