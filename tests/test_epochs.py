"""How often a run evaluates and writes checkpoints, and how it tells its speed."""

import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import utils
from benchmarks.torture import differences
from engine import Progress
from trainer.builders import with_synchronized_norm
from trainer.epochs import is_due, share_norm_statistics
from trainer.run_folder import RunFolder, copy_on_cpu, read_log

pytestmark = pytest.mark.slow


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


@pytest.fixture
def slow_disk(monkeypatch):
    """Checkpoints wait on the disk until the event is set. Returns it and what was begun."""
    free = threading.Event()
    begun = []
    write = utils.save_checkpoint

    def waiting(content, path):
        begun.append(content["step"])
        assert free.wait(60)
        write(content, path)

    monkeypatch.setattr(utils, "save_checkpoint", waiting)
    return free, begun


def test_the_training_continues_while_a_checkpoint_is_written_and_does_not_change_it(
    run_main, tiny, tmp_path, slow_disk, monkeypatch
):
    free, begun = slow_disk
    steps = []
    end_step = Progress.end_step

    def count(progress, images):
        end_step(progress, images)
        steps.append(list(begun))
        if progress.step == 3:
            free.set()

    monkeypatch.setattr(Progress, "end_step", count)
    run_main(*tiny, "--output_dir", "whole", "--checkpoint-every", "2")
    assert steps == [[], [], [2]]  # the third step was made before the second one was written
    assert begun == [2, 3]

    run_main(*tiny, "--output_dir", "waits", "--no-async-save")
    assert differences(tmp_path / "whole", tmp_path / "waits") == []


def test_an_error_of_the_thread_ends_the_run_after_the_next_step(
    run_main, tiny, tmp_path, monkeypatch
):
    reached = []
    end_step = Progress.end_step

    def note(progress, images):
        end_step(progress, images)
        reached.append(progress.step)
        time.sleep(0.5)  # for the thread

    def fail(content, path):
        raise utils.WriteError(f"{path}: no room")

    monkeypatch.setattr(Progress, "end_step", note)
    monkeypatch.setattr(utils, "save_checkpoint", fail)
    error = run_main(*tiny, "--output_dir", "out", "--checkpoint-every", "1", status=1)
    assert error == "error: out/checkpoint.pth: no room\n"
    assert reached == [1, 2]
    error = run_main(*tiny, "--output_dir", "late", status=1)
    assert error.endswith("no room\n")


def test_a_signal_waits_for_the_checkpoint(run_main, tiny, tmp_path, stop_at, slow_disk):
    free, _ = slow_disk
    stop_at(2)
    threading.Timer(1, free.set).start()
    run_main(*tiny, "--output_dir", "out", status=143)
    checkpoint = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    assert checkpoint["step"] == 2


def test_the_copy_of_a_checkpoint_shares_nothing_with_the_training():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    content = {"model": model.state_dict(), "args": {"epochs": 1}, "betas": [(0.9, 0.99)]}
    copied = copy_on_cpu(content)
    content["args"]["epochs"] = 2
    content["betas"].append(3)
    with torch.no_grad():
        model[0].weight.fill_(7)
    assert copied["args"] == {"epochs": 1} and copied["betas"] == [(0.9, 0.99)]
    assert not (copied["model"]["0.weight"] == 7).any()
    assert copied["model"]._metadata == content["model"]._metadata


class WithNorm(torch.nn.Module):
    """A model whose running mean is the number that it is given."""

    def __init__(self, mean):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.norm.running_mean.fill_(mean)


@pytest.mark.parametrize("how, model, average", [("reduce", 2, 7), ("broadcast", 5, 7)])
def test_processes_share_the_statistics_of_batch_norm(monkeypatch, how, model, average):
    """Of two processes: the other one has a running mean of 3, and the first one of 5 and of 7."""
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda own, op: own.add_(3))
    first = iter([5, 5, 7, 7] if how == "broadcast" else [7, 7])
    monkeypatch.setattr(torch.distributed, "broadcast", lambda own, src: own.fill_(next(first)))

    learner = SimpleNamespace(model=WithNorm(1.0), ema=SimpleNamespace(module=WithNorm(2.0)))
    share_norm_statistics(learner, how)
    assert learner.model.norm.running_mean.item() == model
    assert learner.ema.module.norm.running_mean.item() == average


def test_processes_may_keep_statistics_of_their_own():
    learner = SimpleNamespace(model=WithNorm(1.0), ema=None)
    share_norm_statistics(learner, "none")
    share_norm_statistics(learner, "reduce")  # the only process
    assert learner.model.norm.running_mean.item() == 1


def test_batch_norm_is_synchronized_on_gpus_of_several_processes(monkeypatch):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    gpu = torch.device("cuda")
    assert with_synchronized_norm(model, "net", gpu) is model
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    assert isinstance(with_synchronized_norm(model, "net", gpu)[0], torch.nn.SyncBatchNorm)
    with pytest.raises(utils.UserError, match="on GPUs only"):
        with_synchronized_norm(model, "net", torch.device("cpu"))
