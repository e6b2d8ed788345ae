"""How often a run evaluates and writes checkpoints, and how it tells its speed."""

import re

import pytest
import torch

from trainer.epochs import is_due
from trainer.run_folder import RunFolder, read_log


@pytest.fixture
def five(tiny):
    """Five epochs, which change no weight, so that no epoch after the first is the best."""
    return [*tiny, "--epochs", "5", "--lr", "0", "--min-lr", "0", "--output_dir", "out"]


def test_what_is_due_every_third_epoch_is_due_after_the_last_as_well():
    assert [epoch for epoch in range(8) if is_due(epoch, 3, 8)] == [2, 5, 7]
    assert [epoch for epoch in range(6) if is_due(epoch, 3, 6)] == [2, 5]
    assert all(is_due(epoch, 1, 6) for epoch in range(6))


def test_evaluations_can_be_rarer_and_change_no_weight(run_main, tiny, tmp_path):
    recipe = [*tiny, "--epochs", "5", "--drop-path", "0.2"]
    run_main(*recipe, "--output_dir", "often")
    output = run_main(*recipe, "--output_dir", "rarely", "--eval-every", "3")
    lines = read_log(tmp_path / "rarely")
    assert [line["epoch"] for line in lines if "test_acc1" in line] == [2, 4]
    assert [line["epoch"] for line in lines if "test_ema_acc1" in line] == [2, 4]
    assert len(lines) == 5
    assert output.count("Max accuracy") == 2

    often, rarely = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("often", "rarely")
    )
    for name, weight in often["model"].items():
        assert weight.equal(rarely["model"][name]), name


def test_checkpoints_can_be_rarer_but_never_miss_the_best_epoch(run_main, five, monkeypatch):
    written = []
    save = RunFolder.save

    def noting(folder, content, best=False):
        written.append((content["epoch"], best))
        save(folder, content, best)

    monkeypatch.setattr(RunFolder, "save", noting)
    run_main(*five, "--save-every", "3")
    assert written == [(0, True), (2, False), (4, False)]


def test_a_run_tells_how_many_images_it_trains_on_in_a_second(run_main, five, tmp_path):
    output = run_main(*five, "--print-freq", "1")
    assert len(re.findall(r"Epoch: .* data: [\d.]+  images/s: \d+", output)) == 15
    assert re.search(r"Test: .* images/s: \d+", output)
    speeds = [line["images_per_second"] for line in read_log(tmp_path / "out")]
    assert len(speeds) == 5 and min(speeds) > 0
    median = sorted(speeds)[2]
    assert (
        f"- speed: {median:,.0f} images/s in training" in (tmp_path / "out/summary.md").read_text()
    )
