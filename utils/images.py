"""Image files, opened as the formats that are meant, and their pixels in 8 bits."""

import contextlib
import os
import stat
from functools import partial
from io import BytesIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import io

from .errors import BadImageError, UserError, first_line

#: The formats of images, by Pillow's names. Others are refused whatever a file is called: an EPS
#: file would be run by Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
LARGEST = 2**30  # bytes of a file that is read at once

# Deprecated since torchvision 0.29; if it is gone, Pillow decodes
decode_jpeg = getattr(io, "decode_jpeg", None)

TIFF_BITS = 258  # the tag of the bits in a sample


def forget_other_formats() -> None:
    """Makes Pillow unable to open any other format, in this process, whoever asks for it.

    torchvision's data sets and timm's web shards call Pillow themselves.
    """
    Image.init()
    for name in [name for name in Image.ID if name not in FORMATS]:
        Image.ID.remove(name)
        Image.OPEN.pop(name, None)


def open_image(content: bytes) -> Image.Image:
    """The image in the bytes of a file; reads no more than its header."""
    known = [name for name in FORMATS if name in Image.OPEN]
    return Image.open(BytesIO(content), formats=known)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB. Pixels of 16 or 32 bits, or floats, are scaled to 8 bits.

    Pillow itself would clip them, and make most of them white. 16 bits, and fewer in a TIFF file,
    are scaled by their range. 32 bits and floats do not tell theirs: up to 1 (for floats), 255 or
    65,535 it is that, and beyond, or with negative numbers, that of the image.

    Raises ValueError for numbers that are not finite.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_in_8_bits(image))
    return image.convert("RGB")


def read_file(path, largest: int = LARGEST) -> bytes:
    """The content of a file. Raises UserError for pipes and devices, and for more bytes."""
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: a pipe or a device; expected a file")
        if status.st_size > largest:
            raise UserError(f"{path}: has {status.st_size:,} bytes; expected at most {largest:,}")
        return file.read(status.st_size)


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


def loader_for(transform):
    """`load_image`, giving images in the form that the first step of `transform` takes."""
    first = getattr(transform, "transforms", [None])[0]
    return partial(load_image, as_pixels=getattr(first, "takes_pixels", False))


# ---- helpers, not exported ----


def _read_and_close(file) -> bytes:
    with file:
        return file.read()


def _in_8_bits(image: Image.Image) -> np.ndarray:
    """The grey pixels of an image as uint8."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("has pixels that are not finite")

    low, high = _range(image, values)
    scaled = (values - low) * (255 / max(high - low, 1e-300))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """The numbers that are black and white."""
    if image.mode.startswith("I;"):
        bits = getattr(image, "tag_v2", {}).get(TIFF_BITS, (16,))[0]
        return 0, 2 ** min(bits, 16) - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 0, 2**16 - 1  # Pillow's form of their 16 bits

    low = values.min()
    high = values.max()
    if low < 0:
        return low, high
    ranges = [255, 2**16 - 1] if image.mode == "I" else [1, 255, 2**16 - 1]
    return 0, next((top for top in ranges if high <= top), high)


def _open_at_once(path, flags: int) -> int:
    """Opens a file; a pipe without waiting for somebody to write into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
