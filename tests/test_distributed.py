"""Two real processes under torchrun."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import torch
from conftest import ROOT, start_main

from sparsity_factory import unpack

LAMP = ["--pruner", "lamp", "--sparsity", "0.65"]
# The tiny data set has 48 training images: three steps of 16, or of 8 in each of two processes.
# Fresh weights show whether all processes start from the same ones.
# Drop path, erasing and mixing draw random numbers by batch, and so by process.
PLAIN = ["--drop-path", "0", "--reprob", "0", "--mixup", "0", "--cutmix", "0", "--no-pretrained"]


def test_all_processes_have_the_masks_of_the_first(tmp_path):
    result = start_main(tmp_path, cwd=tmp_path, processes=2, script=ROOT / "tests" / "share_masks.py")
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"masks{rank}.pth", weights_only=True) for rank in range(2))
    assert len(first) == 24
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, tiny, run_main):
    run_main(*tiny, *LAMP, *PLAIN, "--batch-size", "16", "--output_dir", "one")
    result = start_main(*tiny, *LAMP, *PLAIN, "--batch-size", "8", "--output_dir", "two", "--dist-eval", cwd=tmp_path,
                        processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Max accuracy") == 1
    one, two = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("one", "two"))
    for kind in ("model", "model_ema"):
        for name, weight in one[kind].items():
            torch.testing.assert_close(two[kind][name], weight, atol=1e-5, rtol=1e-3)
    masks_of_one, masks_of_two = unpack(one["masks"]), unpack(two["masks"])
    assert all(torch.equal(masks_of_one[name], mask) for name, mask in masks_of_two.items())


def test_shared_evaluation_counts_each_image_once(tmp_path, run_main):
    """2,000 test images in batches of 96 give 21 batches: one process has a batch more, and the last is smaller."""
    flags = ["--eval", "--dist-eval", *LAMP, "--amp", "off"]
    alone = run_main(*flags)
    shared = start_main(*flags, cwd=tmp_path, processes=2)
    assert shared.returncode == 0, shared.stderr
    assert "/21]" in alone
    assert "/11]" in shared.stdout
    counts = [re.findall(r"\* Acc@1 .*", output) for output in (alone, shared.stdout)]
    assert len(counts[0]) == 2
    assert counts[0] == counts[1]


def test_a_mistake_under_torchrun_ends_every_process_and_is_told_once(tmp_path):
    for flags in (["--pruner", "lamp"], ["--pruner", "unifplus", "--sparsity", "0.95"]):
        result = start_main(*flags, cwd=tmp_path, processes=2)
        assert result.returncode != 0
        assert result.stderr.count("error: ") == 1, result.stderr
        assert "main.py\", line" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_processes_meet_at_the_dist_url(tmp_path, tiny):
    """Without torchrun: each process is told its rank by the environment, and meets the other at a file."""
    def start(rank):
        return start_main(*tiny, "--eval", "--distributed", "--world_size", "2", "--dist_url", f"file://{tmp_path}/meet",
                          cwd=tmp_path, env={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "2 process(es)" in first.stdout
    assert second.stdout == ""


def test_two_machines_train_together(tmp_path, tiny):
    """Two agents of torchrun, here on one machine, each with one process: the batch of 16 is theirs together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"

    def start(_):
        return start_main(*tiny, *LAMP, "--batch-size", "8", "--output_dir", "out", cwd=tmp_path, processes=1,
                          nodes=("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"))

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(start, range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert sorted("2 process(es)" in result.stdout for result in results) == [False, True]
    assert torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)["step"] == 3
