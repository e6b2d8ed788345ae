import numpy as np
from PIL import Image
from timm.data import auto_augment

from augment import posterize, repair_posterize


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
