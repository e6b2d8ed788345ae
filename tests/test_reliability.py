"""What happens to a run costs no more than the work since its last checkpoint, and changes nothing
in the outcome.
"""

import copy
import csv
import itertools
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start_main
from torch.utils.data import DataLoader

import utils
from benchmarks.torture import RECIPE, differences, finish, kill, start, trains_again, wait_until
from sparsity_factory import SCHEDULES, unpack
from trainer.run_folder import RunFolder, newest_checkpoint, read_log
from trainer.seeded_data import SeededDataset
from trainer.stop_signals import ignore_signals
from trainer.training_state import own_metrics

pytestmark = pytest.mark.slow

LAMP = ["--pruner", "lamp", "--sparsity", "0.65"]
# 48 training images: six steps of eight an epoch, with everything that is random.
SHORT = [*RECIPE, "--epochs", "4", "--batch-size", "8", "--num_workers", "1"]


@pytest.fixture
def short(tiny_fashion):
    return [*SHORT, "--data-set", "FASHION", "--data-path", str(tiny_fashion), "--input-size", "28"]


def read(path):
    return torch.load(path, weights_only=True)


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_never_stopped(tmp_path, short):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    short = [*short, "--epochs", "8"]  # long enough for all kills
    finish(start(whole, short), whole)

    def images():  # of an epoch that is not whole, in the checkpoint
        return (
            read(parts / "checkpoint.pth")["images"] if (parts / "checkpoint.pth").exists() else 0
        )

    # The first kill is surely within an epoch, the others come whenever they do
    for _ in range(5):
        process = start(parts, short)
        wait_until(images, process)
        process.kill()
        process.wait()
        if images():
            break
    moments = random.Random()
    killed = [kill(parts, short, writing, moments) for writing in (False, True, False, True, True)]
    assert sum(killed) >= 4, "the run was too short to be killed so often"
    finish(start(parts, short), parts)
    assert differences(whole, parts) == []
    assert "resuming after step" in (parts / "run.out").read_text()


#: The flags of each schedule for twelve steps, six an epoch, in which the masks change a few times.
SCHEDULE_FLAGS = {
    "one-shot": [],
    "gradual": ["--prune-every", "2"],
    "iterative": ["--prune-rounds", "3", "--prune-start", "0.25", "--rewind", "0"],
    "set": ["--prune-every", "2"],
    "rigl": ["--prune-every", "2"],
    "ac-dc": ["--prune-rounds", "2"],
    "ste": ["--prune-every", "3"],
    "sr-ste": ["--prune-every", "3", "--sr-decay", "0.1"],
    "maskllm": ["--pattern", "x:4", "--mask-lr", "0.1"],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_goes_on_to_the_bit_after_any_step(
    run_main, tiny, tmp_path, stop_at, schedule
):
    """Weights, hidden dense weights, masks, optimizer, moving average, log.txt and tables."""
    recipe = [
        *tiny,
        *LAMP,
        "--prune-schedule",
        schedule,
        *SCHEDULE_FLAGS[schedule],
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--model-ema-decay",
        "0.9",
        "--clip-grad",
        "1",
        "--drop-path",
        "0.1",
        "--resume",
        "auto",
    ]
    run_main(*recipe, "--output_dir", "whole")
    steps = sorted(random.sample(range(1, 13), 2))
    for step in steps:
        stop_at(step)
        run_main(*recipe, "--output_dir", "parts", status=143)
    run_main(*recipe, "--output_dir", "parts")
    assert differences(tmp_path / "whole", tmp_path / "parts") == [], steps
    checkpoint = read(tmp_path / "parts/checkpoint.pth")
    assert len(checkpoint["pruning"]["hidden"]) == (24 if schedule in ("ste", "sr-ste") else 0)
    missing = 232243 - sum(int(mask.sum()) for mask in unpack(checkpoint["masks"]).values())
    # Whole groups of it do not meet the budget
    assert 0 <= missing < (10_000 if schedule == "maskllm" else 1)
    assert len(read_log(tmp_path / "parts")) == 2


def test_a_run_that_reconstructs_goes_on_to_the_bit(run_main, tiny, tmp_path, stop_at):
    recipe = [
        *tiny,
        *LAMP,
        "--prune-schedule",
        "iterative",
        "--prune-rounds",
        "2",
        "--epochs",
        "2",
        "--resume",
        "auto",
        "--model-ema-decay",
        "0.9",
        "--reconstruct",
        "obs",
        "--calibration-images",
        "32",
    ]
    printed = run_main(*recipe, "--output_dir", "whole")
    assert printed.count("Reconstructing 24 layers on 32 training images") == 2
    for step in (2, 4):
        stop_at(step)
        run_main(*recipe, "--output_dir", "parts", status=143)
    run_main(*recipe, "--output_dir", "parts")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    best = read(tmp_path / "parts/best_checkpoint.pth")
    assert sum(int(mask.sum()) for mask in unpack(best["masks"]).values()) == 232243
    assert all(
        not best["model_ema"][name][~mask].any() for name, mask in unpack(best["masks"]).items()
    )


@pytest.fixture
def saved(monkeypatch):
    """The contents of all checkpoints that this process writes at the end of an epoch, and whether
    each is the best.
    """
    contents, save = [], RunFolder.save

    def saving(folder, content, best):
        contents.append((copy.deepcopy(content), best))
        save(folder, content, best)

    monkeypatch.setattr(RunFolder, "save", saving)
    return contents


def test_the_best_checkpoint_has_the_sparsity_that_was_asked_for_and_log_and_tables_follow_the_masks(
    run_main, tiny, tmp_path, saved
):
    run_main(
        *tiny,
        "--pruner",
        "lamp",
        "--sparsity",
        "0.95",
        "--prune-schedule",
        "gradual",
        "--prune-every",
        "2",
        "--epochs",
        "5",
        "--output_dir",
        "out",
    )
    masks = [unpack(content["masks"]) for content, _ in saved]
    sparsities = [1 - sum(int(mask.sum()) for mask in of.values()) / 663552 for of in masks]
    assert sparsities == sorted(sparsities)
    assert 0.05 < sparsities[0] < sparsities[1] < 0.95 - 1e-3
    assert sparsities[-1] == pytest.approx(0.95, abs=1e-5)
    lines = read_log(tmp_path / "out")
    assert [line["sparsity"] for line in lines] == pytest.approx(sparsities)
    best = read(tmp_path / "out/best_checkpoint.pth")
    # A dense one was better
    assert max(lines[0]["test_acc1"], lines[0]["test_ema_acc1"]) > best["max_accuracy"]
    assert sum(int(mask.sum()) for mask in unpack(best["masks"]).values()) == round(0.05 * 663552)
    with open(tmp_path / "out/sparsity.csv", encoding="utf-8") as file:
        table = {row["layer"]: int(row["kept"]) for row in csv.DictReader(file)}
    assert {name: table[name] for name in masks[-1]} == {
        name: int(mask.sum()) for name, mask in masks[-1].items()
    }
    run_main(*tiny, "--eval", "--pruner", "custom", "--custom-config", "out/sparsity.yaml")
    assert (tmp_path / "out/sparsity.png").exists()


def test_every_group_of_four_keeps_two_at_the_end_of_every_epoch_of_sr_ste(run_main, tiny, saved):
    run_main(
        *tiny,
        "--pattern",
        "2:4",
        "--prune-schedule",
        "sr-ste",
        "--prune-every",
        "1",
        "--epochs",
        "4",
        "--opt",
        "sgd",
        "--lr",
        "0.1",
        "--unscale-lr",
        "--output_dir",
        "out",
    )
    assert len(saved) == 4
    first, *_, last = (unpack(content["masks"]) for content, _ in saved)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    for content, _ in saved:
        for name, mask in unpack(content["masks"]).items():
            assert (mask.reshape(-1, 4).sum(1) == 2).all(), name
            for kind in ("model", "model_ema"):
                assert not content[kind][name][~mask].any(), name


def test_processes_under_torchrun_stop_together_restart_together_and_end_as_if_undisturbed(
    tmp_path, short
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
    ]
    recipe = [*short, "--batch-size", "4", "--num_workers", "0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(whole, recipe, torchrun), whole)

    training = trains_again(parts)
    process = start(parts, recipe, torchrun)
    wait_until(training, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    assert (parts / "run.out").read_text().count("stopped by SIGTERM in epoch 0 after step") == 1

    training = trains_again(parts)
    process = start(parts, recipe, torchrun)
    wait_until(training, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    finish(process, parts)
    assert differences(whole, parts) == []


def test_processes_under_torchrun_stop_together_during_an_evaluation(tmp_path):
    process = start(
        tmp_path,
        ["--eval", "--num_workers", "1"],
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    )
    wait_until(lambda: (tmp_path / "run.out").read_bytes().count(b"Test:"), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    output = (tmp_path / "run.out").read_text()
    assert output.count("stopped by SIGTERM") == 1
    assert "Acc@1" not in output


@pytest.mark.parametrize(
    "signum, status",
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)],
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    run_main, tiny, tmp_path, stop_at, signum, status
):
    recipe = [*tiny, *LAMP, "--epochs", "2"]
    run_main(*recipe, "--output_dir", "whole")
    stop_at(4, signum)
    message = run_main(*recipe, "--output_dir", "parts", status=status)
    assert message.startswith(f"stopped by {signum.name} in epoch 1 after step 1; resume with")
    assert message.count("\n") == 1
    assert read(tmp_path / "parts/checkpoint.pth")["step"] == 4
    output = run_main(*recipe, "--output_dir", "parts", "--resume", "auto")
    assert re.search(r"Epoch: \[1\]  \[2/3\]", output)
    assert "Epoch: [1]  [0/3]" not in output
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_a_signal_during_the_evaluation_keeps_the_whole_epoch(run_main, tiny, tmp_path, stop_at):
    run_main(*tiny, *LAMP, "--output_dir", "whole")
    stop_at(3)
    run_main(*tiny, *LAMP, "--output_dir", "parts", status=143)
    assert read_log(tmp_path / "parts") == []
    run_main(*tiny, *LAMP, "--output_dir", "parts", "--resume", "auto")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_a_second_signal_ends_the_process_at_once():
    program = "from trainer.stop_signals import *\nwith StopSignals() as stop:\n print(1, flush=True)\n time.sleep(600)\n print(2)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == -signal.SIGINT


def test_a_data_worker_obeys_the_signals_of_its_own_process_only():
    batches = iter(DataLoader(range(99), num_workers=1, worker_init_fn=ignore_signals))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(itertools.islice(batches, 90))) == 90
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_workers_change_nothing(run_main, tiny, tmp_path):
    for workers in (0, 1, 4):
        run_main(*tiny, *LAMP, "--num_workers", workers, "--output_dir", f"out{workers}")
        assert differences(tmp_path / "out0", tmp_path / f"out{workers}") == []


def test_a_resumed_epoch_loads_no_image_that_it_skips(
    run_main, tiny, tmp_path, stop_at, monkeypatch
):
    recipe = [*tiny, "--output_dir", "out", "--resume", "auto", "--no-model-ema"]
    stop_at(2)
    run_main(*recipe, status=143)
    loaded = []
    get = SeededDataset.__getitem__
    monkeypatch.setattr(
        SeededDataset,
        "__getitem__",
        lambda self, item: loaded.append(item[1][2]) or get(self, item),
    )
    run_main(*recipe)
    assert loaded == list(range(32, 48))


@pytest.mark.parametrize("size, step", [(8, 4), (12, 3)])
def test_a_run_goes_on_with_other_batches_where_the_images_seen_end(
    run_main, tiny, stop_at, monkeypatch, size, step
):
    stop_at(2)
    run_main(*tiny, *LAMP, "--output_dir", "out", status=143)
    loaded, get = [], SeededDataset.__getitem__
    monkeypatch.setattr(
        SeededDataset,
        "__getitem__",
        lambda self, item: loaded.append(item[1][2]) or get(self, item),
    )
    output = run_main(*tiny, "--output_dir", "out", "--resume", "auto", "--batch-size", size)
    assert f"resuming after step {step} of epoch 0" in output
    assert loaded == list(range(32, 32 + 16 // size * size))


def test_other_processes_go_on_with_the_metrics_of_the_first_part(monkeypatch):
    parts = [{"loss": [3.0, 2], "lr": [1.0, 2]}, {"loss": [5.0, 2], "lr": [1.0, 2]}]
    monkeypatch.setattr(utils, "world_size", lambda: 4)
    assert own_metrics(parts) == {"loss": [8.0, 4], "lr": [2.0, 4]}
    monkeypatch.setattr(utils, "is_main_process", lambda: False)
    assert own_metrics(parts) == {}
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    monkeypatch.setattr(utils, "rank", lambda: 1)
    assert own_metrics(parts) == parts[1]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_with_accumulated_gradients_goes_on_after_any_step(
    run_main, tiny, tmp_path, stop_at, step
):
    # Steps of four and two batches
    recipe = [*tiny, *LAMP, "--epochs", "2", "--batch-size", "8", "--accum-iter", "4"]
    run_main(*recipe, "--output_dir", "whole")
    stop_at(step)
    run_main(*recipe, "--output_dir", "parts", status=143)
    run_main(*recipe, "--output_dir", "parts", "--resume", "auto")
    assert read(tmp_path / "parts/checkpoint.pth")["step"] == 4
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_resume_auto_takes_the_newest_checkpoint_that_is_whole(run_main, tiny, tmp_path):
    recipe = [*tiny, *LAMP, "--output_dir", "out", "--resume", "auto"]
    assert "starts from the beginning" in run_main(*recipe)
    checkpoint, best = tmp_path / "out/checkpoint.pth", tmp_path / "out/best_checkpoint.pth"
    assert newest_checkpoint("out") == "out/checkpoint.pth"
    whole = checkpoint.read_bytes()
    checkpoint.unlink()
    checkpoint.write_bytes(whole[:-1000])
    output = run_main(*recipe)
    assert "passing over out/checkpoint.pth" in output
    assert "--resume auto: out/best_checkpoint.pth" in output
    best.write_bytes(b"")
    assert "starts from the beginning" in run_main(*recipe)


def test_resume_auto_goes_by_what_checkpoints_reached_and_not_by_their_times(
    run_main, tiny, tmp_path
):
    run_main(*tiny, "--output_dir", "out")
    checkpoint, best = tmp_path / "out/checkpoint.pth", tmp_path / "out/best_checkpoint.pth"
    state = read(checkpoint)
    checkpoint.unlink()
    torch.save({**state, "epoch": 1}, checkpoint)
    os.utime(best)
    assert newest_checkpoint(tmp_path / "out") == str(checkpoint)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on_later(
    run_main, tiny, tmp_path, stop_at
):
    recipe = [*tiny, *LAMP, "--output_dir", "out", "--resume", "auto", "--checkpoint-every", "1"]
    run_main(*tiny, *LAMP, "--output_dir", "whole")
    stop_at(1)
    run_main(*recipe, status=143)
    before = (tmp_path / "out/checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A checkpoint has eleven times as much
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        error = run_main(*recipe, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.fullmatch(
        r"error: out/checkpoint.pth: cannot be written \(File too large\).*\n", error
    )
    assert (tmp_path / "out/checkpoint.pth").read_bytes() == before
    assert not (tmp_path / "out/.checkpoint.pth.tmp").exists()
    run_main(*recipe)
    assert differences(tmp_path / "out", tmp_path / "whole") == []


def test_a_worker_that_is_killed_ends_the_run_in_one_line(tmp_path, short):
    process = start(tmp_path / "out", [*short, "--epochs", "99", "--checkpoint-every", "0"])
    wait_until(trains_again(tmp_path / "out"), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text().split(), process)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert process.wait(timeout=300) == 1
    output = (tmp_path / "out/run.out").read_text()
    # Torch has both
    assert re.search(r"^error: DataLoader worker .*(killed|exited unexpectedly).*\n$", output, re.M)


def test_two_processes_go_on_where_one_was_and_stop_together_when_the_loss_is_not_finite(
    run_main, tiny, tmp_path, stop_at
):
    stop_at(2)
    run_main(*tiny, "--output_dir", "out", status=143)
    checkpoint = read(tmp_path / "out/checkpoint.pth")
    checkpoint["model"]["head.bias"][0] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.pth")
    result = start_main(
        *tiny, "--batch-size", "8", "--resume", "nan.pth", cwd=tmp_path, processes=2
    )
    assert result.returncode != 0
    assert "resuming after step 2 of epoch 0" in result.stdout
    assert result.stderr.count("error: the loss is not finite in epoch 0") == 1
    assert 'main.py", line' not in result.stderr


def test_weights_that_are_not_finite_are_never_written(run_main, tiny, tmp_path):
    error = run_main(
        *tiny,
        *LAMP,
        "--opt",
        "sgd",
        "--lr",
        "1e30",
        "--output_dir",
        "out",
        "--checkpoint-every",
        "1",
        status=1,
    )
    assert re.fullmatch(
        r"error: the loss is not finite in epoch 0, at or before step \d; try .*--lr.*\n", error
    )
    for path in (tmp_path / "out").glob("*.pth"):
        assert all(weight.isfinite().all() for weight in read(path)["model"].values())


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_leaves_no_lock(
    run_main, tiny, tmp_path
):
    program = (
        "import time\n"
        "from trainer.run_folder import RunFolder\n"
        f"held = RunFolder({str(tmp_path / 'out')!r})\n"
        "print(1, flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    error = run_main(*tiny, *LAMP, "--output_dir", "out", status=2)
    assert error.startswith(f"error: --output_dir out: in use by process {process.pid} on ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    process.kill()
    process.wait()
    run_main(*tiny, *LAMP, "--output_dir", "out")


def test_log_txt_has_each_epoch_once_whatever_was_in_it(tmp_path):
    folder = RunFolder(str(tmp_path))
    (tmp_path / "log.txt").write_text(
        '{"epoch": 0, "a": 1}\n{"epoch": 1, "a": 2}\n{"epoch": 2}\n{"epo'
    )
    folder.log_epoch({"epoch": 1, "a": 3})
    assert read_log(tmp_path) == [{"epoch": 0, "a": 1}, {"epoch": 1, "a": 3}]


def test_every_promise_names_a_test_that_there_is():
    named = re.findall(r"`((?:\w+\.py::)?test_\w+)`", (ROOT / "docs/reliability.md").read_text())
    assert len(named) > 20
    for test in named:
        file, _, name = test.rpartition("::")
        assert f"def {name}(" in (ROOT / "tests" / (file or Path(__file__).name)).read_text(), test
