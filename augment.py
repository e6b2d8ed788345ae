"""Augmentations beyond timm's, and the repair of one of timm's."""

from PIL import Image
from timm.data import auto_augment


def posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    """timm's posterize, except that 0 bits give a black image, as before Pillow 13, and not an error.

    DeiT's default policy, rand-m9-mstd0.5-inc1, asks for 0 bits now and then.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def repair_posterize() -> None:
    """Makes timm's AutoAugment and RandAugment policies use `posterize` from here."""
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize
