"""Training images that cannot be read end a run in one line, or are skipped up to a number, the
same in every part.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import start_main
from PIL import Image

import utils
from samplers import TrainSampler

pytestmark = pytest.mark.slow


@pytest.fixture
def folder_with(tmp_path):
    """A data set of 16 PNG images a class, of which some cannot be read."""

    def make(broken):
        generator = np.random.default_rng(0)
        for split in ("train", "val"):
            for label in "ab":
                (tmp_path / "data" / split / label).mkdir(parents=True)
                for number in range(16):
                    path = tmp_path / "data" / split / label / f"{number:02}.png"
                    Image.fromarray(generator.integers(0, 256, (28, 28, 3), np.uint8)).save(path)
                    if split == "train" and f"{label}{number}" in broken:
                        path.write_bytes(path.read_bytes()[:60])
        return [
            "--data-path",
            "data",
            "--model",
            "deit_sample_patch4_28",
            "--input-size",
            "28",
            "--batch-size",
            "8",
            "--epochs",
            "2",
            "--warmup-epochs",
            "0",
            "--no-repeated-aug",
            "--amp",
            "off",
            "--output_dir",
            "out",
        ]

    return make


def test_an_error_in_a_data_worker_ends_the_process(folder_with, tmp_path):
    result = start_main(*folder_with(["a3", "b7"]), "--num_workers", "2", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_skipped_up_to_a_number(
    run_main, folder_with, capfd, workers
):
    recipe = [*folder_with(["a3", "b7"]), "--num_workers", workers, "--skip-bad-images"]
    assert "data/train/" in run_main(*recipe[:-1], status=2)
    error = run_main(*recipe, "1", status=2)
    assert "one more than --skip-bad-images 1" in error.splitlines()[-1]
    run_main(*recipe, "2")
    assert torch.load("out/checkpoint.pth", weights_only=True)["bad_images"] == [3, 23]


def test_an_error_of_one_process_is_told_once_and_ends_the_others(folder_with, tmp_path):
    index, _ = next(iter(TrainSampler(32, rank=1, world_size=2)))
    recipe = [*folder_with([f"{'ab'[index // 16]}{index % 16}"]), "--num_workers", "1"]
    result = start_main(*recipe, cwd=tmp_path, processes=2)
    assert result.returncode != 0
    assert result.stderr.count("error: data/train/") == 1
    assert 'main.py", line' not in result.stderr


def test_the_images_that_processes_skip_are_counted_together(run_main, folder_with, monkeypatch):
    recipe = [*folder_with(["a3"]), "--num_workers", "0", "--skip-bad-images"]
    # Another process, too, has one that it cannot read.
    monkeypatch.setattr(
        utils, "gather_objects", lambda value: [value, [23]] if value == [3] else [value]
    )
    error = run_main(*recipe, "1", status=2)
    assert "2 training images cannot be read" in error.splitlines()[-1]
    run_main(*recipe, "2")
    assert torch.load("out/checkpoint.pth", weights_only=True)["bad_images"] == [3, 23]


def test_a_resumed_run_skips_the_same_images_and_counts_on(
    run_main, folder_with, tmp_path, stop_at
):
    recipe = [*folder_with(["a3", "b7"]), "--num_workers", "0", "--skip-bad-images", "2"]
    run_main(*recipe)
    whole = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)["model"]
    stop_at(4)
    run_main(*recipe, "--overwrite", status=143)
    good = Path("data/train/a/04.png").read_bytes()
    Path("data/train/a/03.png").write_bytes(good)  # readable by now, and still left out
    run_main(*recipe, "--resume", "auto")
    resumed = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    assert resumed["bad_images"] == [3, 23]
    assert all(torch.equal(whole[name], resumed["model"][name]) for name in whole)
