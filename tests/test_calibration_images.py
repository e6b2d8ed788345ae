"""Which training images calibrate."""

import pytest
import torch

from models import build_model
from trainer import calibration_images
from trainer.arguments import parse_args
from trainer.calibration_images import Calibration
from utils import Compute, UserError

CPU = Compute(torch.device("cpu"))


def calibrate(tiny, *flags):
    args = parse_args([*tiny, "--calibration-images", "40", *flags])
    torch.manual_seed(0)
    return Calibration(args, build_model(args.model, 10, 28), CPU)


def images(found):
    return torch.cat([images for images, _ in found.loader])


def test_they_are_drawn_by_the_seed_from_the_training_images_under_the_evaluation_transform(tiny):
    first = images(calibrate(tiny, "--aa", "rand-m9-mstd0.5-inc1"))
    assert first.shape == (40, 3, 28, 28)
    assert torch.equal(first, images(calibrate(tiny)))
    assert not torch.equal(first, images(calibrate(tiny, "--seed", "1")))
    every = images(calibrate(tiny, "--calibration-images", "48"))
    assert len({image.numpy().tobytes() for image in every}) == 48
    assert {image.numpy().tobytes() for image in first} < {
        image.numpy().tobytes() for image in every
    }


def test_further_images_are_none_of_them_until_all_are_used(tiny):
    found = calibrate(tiny)
    others = torch.cat([images for images, _ in found.others(5)])
    seen = {image.numpy().tobytes() for image in images(found)}
    assert len(others) == 5 and not seen & {image.numpy().tobytes() for image in others}
    every = calibrate(tiny, "--calibration-images", "48")
    assert every.others(5) is every.loader


def test_the_batch_size_of_the_training_changes_nothing(tiny):
    one, two = (calibrate(tiny, "--batch-size", size)({"squared_gradient"}) for size in ("4", "16"))
    assert all(
        torch.equal(total, two.state_dict()[name]) for name, total in one.state_dict().items()
    )


@pytest.mark.parametrize(
    "needs", [{"input_norms", "gradient"}, {"squared_gradient", "first_gradient"}]
)
def test_two_processes_add_up_to_what_one_finds(tiny, monkeypatch, needs):
    monkeypatch.setattr(calibration_images, "BATCH_SIZE", 16)  # three batches
    whole, parts = calibrate(tiny)(needs), []
    monkeypatch.setattr(calibration_images.utils, "world_size", lambda: 2)
    for rank in (1, 0):  # the second call adds the first one's share, as an all-reduce does
        monkeypatch.setattr(calibration_images.utils, "rank", lambda rank=rank: rank)
        others = iter(parts)
        monkeypatch.setattr(
            calibration_images.dist,
            "all_reduce",
            lambda total, others=others: total.add_(next(others, torch.zeros_like(total))),
        )
        monkeypatch.setattr(calibration_images.Statistics, "check", lambda statistics: None)
        found = calibrate(tiny)(needs)
        parts = [total.clone() for total in found.state_dict().values()]
    for name, total in whole.state_dict().items():
        torch.testing.assert_close(total, found.state_dict()[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("images", ["2", "40", "48"])
def test_each_of_two_processes_has_a_batch_for_the_walk_and_statistics_have_the_batches_of_one(
    tiny, monkeypatch, images
):
    flags = ["--calibration-images", images]
    whole = [len(targets) for _, targets in calibrate(tiny, *flags).loader]
    monkeypatch.setattr(calibration_images.utils, "world_size", lambda: 2)
    drawn, statistics = [], []

    def read(model, loader, **options):
        drawn.append([len(targets) for _, targets in loader])
        yield from ()

    monkeypatch.setattr(calibration_images, "walk_layers", read)
    for rank in range(2):
        monkeypatch.setattr(calibration_images.utils, "rank", lambda rank=rank: rank)
        found = calibrate(tiny, *flags)
        statistics += [len(targets) for _, targets in found.loader]
        list(found.walk())
    assert sum(map(sum, drawn)) == int(images) and all(drawn)
    assert sorted(statistics) == sorted(whole)


def test_fewer_images_than_inputs_are_told(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(calibration_images, "log", told.append)
    monkeypatch.setattr(calibration_images, "walk_layers", lambda *_, **__: (layer for layer in ()))
    list(calibrate(tiny).walk())
    assert "--calibration-images 40: fewer than the 384 inputs of a layer" in told


def test_fewer_images_than_processes_are_an_error(tiny, monkeypatch):
    monkeypatch.setattr(calibration_images.utils, "world_size", lambda: 3)
    with pytest.raises(
        UserError, match="--calibration-images 2: there are 48 training images, for 3 process"
    ):
        calibrate(tiny, "--calibration-images", "2")


def test_more_images_than_there_are_is_an_error(tiny):
    with pytest.raises(UserError, match="--calibration-images 49: there are 48 training images"):
        calibrate(tiny, "--calibration-images", "49")
