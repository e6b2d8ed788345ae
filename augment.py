"""DeiT's transforms of images: augmentations beyond timm's, and quicker forms of some of timm's.

The transforms of a training image end in uint8 pixels, (3, height, width); `BatchTransform` does
the rest.
"""

import contextlib
import random

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    RandomResizedCropAndInterpolation,
    auto_augment,
    create_transform,
)
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from utils import UserError, first_line

SMALL = 32  # images of up to this size are not zoomed into, as in DeiT
BICUBIC = transforms.InterpolationMode.BICUBIC


def build_transform(is_train: bool, args):
    """DeiT's transform of one image; training images become uint8 pixels for `BatchTransform`.

    Training images of up to 32 x 32 are cropped out of a padded image instead of zoomed into.
    """
    if not is_train:
        return _evaluation_transform(args)
    if args.ThreeAugment:
        return three_augment(args.input_size, args.color_jitter, args.src)

    repair_posterize()
    try:
        crop, augment, _ = create_transform(
            separate=True,
            input_size=args.input_size,
            is_training=True,
            color_jitter=args.color_jitter or None,
            auto_augment=args.aa if args.aa != "none" else None,
            interpolation=args.train_interpolation,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"--aa {args.aa}: not a policy that timm knows ({first_line(error)})"
        ) from None

    if args.input_size <= SMALL:
        resize = transforms.Resize(args.input_size, interpolation=BICUBIC)
        pad = transforms.RandomCrop(args.input_size, padding=args.crop_padding)
        zoom = transforms.Compose([resize, pad])
    else:
        zoom = RandomResizedCrop(args.input_size, interpolation=args.train_interpolation)

    # Our crop takes the place of timm's, which is the first step
    return transforms.Compose([zoom, *crop.transforms[1:], augment, transforms.PILToTensor()])


def normalization(args) -> tuple[list[float], list[float]]:
    """The mean and the deviation of the arguments, three numbers each; ImageNet's by default."""
    mean = getattr(args, "mean", None) or IMAGENET_DEFAULT_MEAN
    std = getattr(args, "std", None) or IMAGENET_DEFAULT_STD
    return list(mean), list(std)


def three_augment(
    input_size: int, color_jitter: float = 0.0, simple_crop: bool = False
) -> transforms.Compose:
    """3-Augment: grayscale, solarization or Gaussian blur, one at random, then colour jitter.

    Touvron et al. 2022, arXiv:2204.07118 (DeiT III). simple_crop: crop out of the image resized to
    `input_size` and padded by four mirrored pixels, instead of zooming into it.
    """
    if simple_crop:
        crop = [
            transforms.Resize(input_size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(input_size, padding=4, padding_mode="reflect"),
        ]
    else:
        crop = [RandomResizedCrop(input_size, interpolation="bicubic")]

    one_of_three = [transforms.Grayscale(3), transforms.RandomSolarize(128, p=1.0), gaussian_blur]
    steps = [*crop, transforms.RandomHorizontalFlip(), transforms.RandomChoice(one_of_three)]
    if color_jitter:
        steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
    return transforms.Compose([*steps, transforms.PILToTensor()])


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, with the same random choices, resized by torch instead of Pillow.

    torch takes a quarter of Pillow's time. Both smooth when they shrink, but they round in
    different places, so a pixel may differ by up to two of its 256 levels. It takes an image, or
    uint8 pixels (3, height, width).
    """

    takes_pixels = True

    def __call__(self, image: Image.Image | torch.Tensor) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        mode = self.interpolation
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)

        if isinstance(image, torch.Tensor):
            crop = image[:, top : top + height, left : left + width]
        else:
            crop = pil_to_tensor(image.crop((left, top, left + width, top + height)))

        batch = crop[None].contiguous(memory_format=torch.channels_last)
        resized = torch.nn.functional.interpolate(batch, self.size, mode=mode.value, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())


class BatchTransform:
    """Normalizes, randomly erases and mixes a whole training batch, on the model's device.

    This is done in the training process, as in timm's loader, so that data workers hand over one
    byte per value instead of four.

    erase: maps normalized images to images, or None; see `timm.data.random_erasing.RandomErasing`.
    mixup: maps images and labels to images and soft targets, or None; see `timm.data.Mixup`.
    mean, std: three numbers each, of pixels in [0, 1].
    """

    def __init__(
        self,
        device: torch.device,
        erase=None,
        mixup=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    ):
        self.erase = erase
        self.mixup = mixup
        self.mean = (255 * torch.tensor(mean)).view(3, 1, 1).to(device)
        self.std = (255 * torch.tensor(std)).view(3, 1, 1).to(device)

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """images: uint8 (batch, 3, height, width); targets: the labels (batch,).

        Returns float32 images, and the labels or, with mixup, a target for each class (batch,
        classes).
        """
        with one_thread():
            # numpy allocates large pages, which takes less time than torch's memory does
            if images.device.type == "cpu":
                images = torch.from_numpy(np.empty(images.shape, np.float32)).copy_(images)
            images = images.float().sub_(self.mean).div_(self.std)
            if self.erase is not None:
                images = self.erase(images)
            return self.mixup(images, targets) if self.mixup is not None else (images, targets)


@contextlib.contextmanager
def one_thread():
    """Limits torch to one thread on the CPU.

    Several threads would wait for each other while data workers hold the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gaussian_blur(image: Image.Image) -> Image.Image:
    """Blurs with a radius of 0.1 to 2 pixels."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    """timm's posterize, except that 0 bits give a black image, as before Pillow 13.

    Later versions of Pillow raise an error, and DeiT's default policy, rand-m9-mstd0.5-inc1, asks
    for 0 bits now and then.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def repair_posterize() -> None:
    """Makes timm's AutoAugment and RandAugment policies use `posterize` from here."""
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize


# ---- helpers, not exported ----


def _evaluation_transform(args):
    if args.input_size <= SMALL:
        resized = args.input_size
    else:
        resized = int(args.input_size / args.eval_crop_ratio)
    return transforms.Compose(
        [
            transforms.Resize(resized, interpolation=BICUBIC),
            transforms.CenterCrop(args.input_size),
            transforms.ToTensor(),
            transforms.Normalize(*normalization(args)),
        ]
    )
