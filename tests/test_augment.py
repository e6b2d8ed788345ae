import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    RandomResizedCropAndInterpolation,
    auto_augment,
)
from torchvision import transforms

import utils
from augment import BatchTransform, RandomResizedCrop, posterize, repair_posterize, three_augment

CPU = torch.device("cpu")


def test_posterize_to_zero_bits_is_black_and_to_more_is_timms():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8))
    assert not np.asarray(posterize(image, 0)).any()
    for bits in (1, 4, 8):
        assert np.array_equal(posterize(image, bits), auto_augment.posterize(image, bits))


def test_deits_policy_never_fails_on_posterize():
    repair_posterize()
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    operation = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert not np.asarray(operation(image)).any()


def test_three_augment_picks_grayscale_solarization_or_blur():
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)
    utils.seed_everything(utils.SAMPLE, 0)
    gray, solarized, blurred = 0, 0, 0
    transform = three_augment(16, simple_crop=True)
    chosen = transform.transforms[3]
    for _ in range(60):
        result = np.asarray(chosen(Image.fromarray(pixels))).astype(int)
        if (result == result[:, :, :1]).all():
            gray += 1
        elif np.array_equal(result, np.where(pixels < 128, pixels, 255 - pixels)):
            solarized += 1
        elif result.std() < pixels.std():
            blurred += 1
    assert gray + solarized + blurred == 60
    assert min(gray, solarized, blurred) > 5


@pytest.mark.parametrize("simple_crop", [False, True])
def test_three_augment_gives_images_of_the_input_size_and_zooms_unless_told_otherwise(simple_crop):
    image = Image.new("RGB", (100, 80))
    image.paste((110, 110, 110), (0, 0, 100, 40))  # the upper half is grey
    utils.seed_everything(utils.SAMPLE, 0)
    results = [
        three_augment(32, color_jitter=0.3, simple_crop=simple_crop)(image) for _ in range(60)
    ]
    assert all(result.shape == (3, 32, 32) for result in results)
    one_colour = sum(int(result.float().std(dim=(1, 2)).max() < 3) for result in results)
    assert (one_colour > 0) != simple_crop


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("size", [(500, 375), (40, 90)])
def test_random_crops_are_timms_but_for_the_rounding(interpolation, size):
    noise = np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for seed in range(20):
        crops = []
        for crop in (RandomResizedCrop, RandomResizedCropAndInterpolation):
            utils.seed_everything(utils.SAMPLE, seed)
            crops.append(np.asarray(crop(96, interpolation=interpolation)(image)).astype(int))
        assert np.abs(crops[0] - crops[1]).max() <= 2
        utils.seed_everything(utils.SAMPLE, seed)
        of_pixels = RandomResizedCrop(96, interpolation=interpolation)(
            torch.from_numpy(noise).permute(2, 0, 1)
        )
        assert np.array_equal(of_pixels, crops[0])


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)])
def test_a_batch_is_normalized_as_its_images_would_be(device):
    pixels = np.random.RandomState(0).randint(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    one_by_one = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    )
    expected = torch.stack([one_by_one(image) for image in pixels]).to(device)
    labels = torch.arange(4, device=device)
    images, targets = BatchTransform(device)(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device), labels
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert targets is labels


def test_a_batch_is_erased_before_it_is_mixed():
    order = []
    transform = BatchTransform(
        CPU,
        lambda images: order.append("erase") or images,
        lambda images, targets: order.append("mix") or (images, targets),
    )
    transform(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2))
    assert order == ["erase", "mix"]
