"""Augmentations beyond timm's, quicker forms of some of timm's, and the repair of one."""

import random

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, RandomResizedCropAndInterpolation, auto_augment
from torchvision import transforms


def three_augment(input_size: int, color_jitter: float = 0.0, simple_crop: bool = False) -> transforms.Compose:
    """3-Augment: grayscale, solarization or Gaussian blur, one at random, then colour jitter.

    Touvron et al. 2022, arXiv:2204.07118 (DeiT III). simple_crop: crop out of the image resized to `input_size` and
    padded by four mirrored pixels, instead of zooming into it.
    """
    if simple_crop:
        crop = [transforms.Resize(input_size, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(input_size, padding=4, padding_mode="reflect")]
    else:
        crop = [RandomResizedCrop(input_size, interpolation="bicubic")]
    return transforms.Compose([
        *crop,
        transforms.RandomHorizontalFlip(),
        transforms.RandomChoice([transforms.Grayscale(3), transforms.RandomSolarize(128, p=1.0), gaussian_blur]),
        *([transforms.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []),
        ToNormalizedTensor()])


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, with the same random choices, resized by torch in half the time that Pillow takes.

    Both smooth what they shrink, and round in other places: a pixel differs by two of its 256 levels at most.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        mode = self.interpolation
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)
        crop = _pixels(image.crop((left, top, left + width, top + height)))
        resized = torch.nn.functional.interpolate(crop[None], self.size, mode=mode.value, antialias=True)[0]
        return Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())


class ToNormalizedTensor:
    """torchvision's ToTensor and Normalize with ImageNet's mean and deviation, in one step."""

    def __init__(self):
        self.mean = 255 * torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
        self.std = 255 * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = _pixels(image).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.sub_(self.mean).div_(self.std)


def _pixels(image: Image.Image) -> torch.Tensor:
    """The uint8 pixels of an image in RGB, shape (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def gaussian_blur(image: Image.Image) -> Image.Image:
    """Blurs with a radius of 0.1 to 2 pixels."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


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
