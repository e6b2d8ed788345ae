"""Kills a training run again and again, resumes it each time, and compares the outcome with an
undisturbed run.

    python benchmarks/torture.py --kills 100

The run has everything random that training has: RandAugment, random erasing, mixup, cutmix, drop
path, repeated augmentation, a moving average, two data workers; its masks change every fifth step.
Every other kill comes while a checkpoint is being written, the others at random moments. Prints
what differs in the end: nothing, if all is well.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RECIPE = [
    "--model",
    "deit_sample_patch4_28",
    "--pruner",
    "lamp",
    "--sparsity",
    "0.65",
    "--batch-size",
    "16",
    "--num_workers",
    "2",
    "--warmup-epochs",
    "1",
    "--aa",
    "rand-m9-mstd0.5-inc1",
    "--reprob",
    "0.25",
    "--mixup",
    "0.8",
    "--cutmix",
    "1.0",
    "--drop-path",
    "0.1",
    "--repeated-aug",
    "--model-ema",
    "--model-ema-decay",
    "0.9",
    "--clip-grad",
    "1",
    "--checkpoint-every",
    "2",
    "--resume",
    "auto",
    "--prune-schedule",
    "rigl",
    "--prune-every",
    "5",
]


def start(folder: Path, recipe: list[str], launcher=()) -> subprocess.Popen:
    """The run in a process of its own, with its output in `folder/run.out`."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "main.py"),
        *recipe,
        "--output_dir",
        str(folder),
    ]
    with open(folder / "run.out", "ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=folder)


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Waits for the end of a run."""
    if process.wait() != 0:
        output = (folder / "run.out").read_text()[-2000:]
        raise RuntimeError(f"the run ended with status {process.returncode}:\n{output}")


def wait_until(condition, process: subprocess.Popen) -> None:
    """Waits for something that happens while the process runs, or for the end of the process."""
    while not condition() and process.poll() is None:
        time.sleep(0.0002)


def trains_again(folder: Path) -> Callable[[], bool]:
    """A condition: the run in `folder` has come to its training once more than now."""

    def count():
        return (folder / "run.out").read_bytes().count(b"Training epochs")

    before = count() if (folder / "run.out").exists() else 0
    return lambda: count() > before


def kill(folder: Path, recipe: list[str], writing: bool, moments: random.Random) -> bool:
    """Starts the run and kills it once it has written a few checkpoints: in the next write, or
    between two.

    False if the run ended before that.
    """
    training = trains_again(folder)
    checkpoint = folder / "checkpoint.pth"
    temporary = [folder / f".{name}.tmp" for name in ("checkpoint.pth", "best_checkpoint.pth")]
    process = start(folder, recipe)
    wait_until(training, process)
    for _ in range(moments.randrange(4)):
        old = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        wait_until(
            lambda old=old: checkpoint.exists() and checkpoint.stat().st_mtime_ns != old, process
        )
    if writing:
        wait_until(lambda: any(path.exists() for path in temporary), process)
    else:
        time.sleep(moments.uniform(0, 0.3))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def differences(first: Path, second: Path) -> list[str]:
    """What differs between the outcomes of two runs: parts of the checkpoints, log.txt, tables and
    pictures.
    """
    one, two = (
        torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (first, second)
    )
    parts = [
        "model",
        "model_ema",
        "optimizer",
        "lr_scheduler",
        "scaler",
        "masks",
        "pruning",
        "epoch",
        "step",
        "best",
        "accuracy",
    ]
    different = [part for part in parts if not equal(one.get(part), two.get(part))]
    for name in ("log.txt", "sparsity.csv", "sparsity.yaml", "sparsity.png", "training.png"):
        contents = [
            path.read_bytes() if path.exists() else b"" for path in (first / name, second / name)
        ]
        if contents[0] != contents[1]:
            different.append(name)
    return different


def equal(one, two) -> bool:
    """Whether two structures of containers, numbers and tensors have the same values and types of
    tensors.
    """
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return (
            isinstance(two, dict)
            and one.keys() == two.keys()
            and all(equal(one[key], two[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3, help="of 375 steps each")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    args = parser.parse_args()
    recipe = [*RECIPE, "--epochs", str(args.epochs)]
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        began = time.time()
        finish(start(whole, recipe), whole)
        print(f"undisturbed: {time.time() - began:.0f} s", flush=True)
        done = sum(
            kill(parts, recipe, number % 2 == 0, moments)
            for number in tqdm(range(args.kills), unit="kill")
        )
        finish(start(parts, recipe), parts)
        different = differences(whole, parts)
        epochs = [
            json.loads(line)["epoch"] for line in (parts / "log.txt").read_text().splitlines()
        ]
    print(
        f"{done} kills, {len(epochs)} epochs in log.txt, different in the end: "
        f"{', '.join(different) or 'nothing'}"
    )
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
