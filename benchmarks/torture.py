"""Kills a training run again and again, and compares what it leaves with an undisturbed run.

    python benchmarks/torture.py --kills 100

The run is resumed after each kill. It uses all that is random in training: RandAugment, random
erasing, mixup, cutmix, drop path and repeated augmentation; and also a moving average, two data
workers, and masks that change every fifth step. Every other kill comes while a checkpoint is being
written, the others at random moments. Prints the differences in the end: nothing, if all is well.
"""

import argparse
import os
import random
import re
import shlex
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
RECIPE = shlex.split("""
    --model deit_sample_patch4_28
    --pruner lamp --sparsity 0.65 --prune-schedule rigl --prune-every 5
    --batch-size 16 --num_workers 2 --warmup-epochs 1 --clip-grad 1 --repeated-aug
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --drop-path 0.1
    --model-ema --model-ema-decay 0.9 --checkpoint-every 2 --resume auto
""")

#: What is compared in the end: parts of the checkpoint, and other files of a run.
STATES = ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "masks", "pruning")
PARTS = (*STATES, "epoch", "step", "best", "accuracy")
FILES = (
    "log.txt",
    "sparsity.csv",
    "sparsity.yaml",
    "sparsity.png",
    "training.png",
    "classes.csv",
    "predictions.csv",
)


def start(folder: Path, recipe: list[str], launcher=()) -> subprocess.Popen:
    """Starts the run in its own process, with its output in `folder/run.out`."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [*launcher, str(ROOT / "main.py")]
    command = [sys.executable, *script, *recipe, "--output_dir", str(folder)]
    with open(folder / "run.out", "ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=folder)


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Waits for the end of a run. Raises RuntimeError if it failed."""
    if process.wait() != 0:
        output = (folder / "run.out").read_text()[-2000:]
        raise RuntimeError(f"the run ended with status {process.returncode}:\n{output}")


def wait_until(condition, process: subprocess.Popen) -> None:
    """Waits until `condition()` is true, or until the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.0002)


def trains_again(folder: Path) -> Callable[[], bool]:
    """A condition: training in `folder` has begun once more often than now."""

    def count():
        return (folder / "run.out").read_bytes().count(b"Training epochs")

    before = count() if (folder / "run.out").exists() else 0
    return lambda: count() > before


def kill(folder: Path, recipe: list[str], writing: bool, moments: random.Random) -> bool:
    """Starts the run, and kills it after a few checkpoints.

    writing: kill it while it writes the next checkpoint, and not between two.
    Returns False if the run ended before that.
    """
    checkpoint = folder / "checkpoint.pth"
    temporary = [folder / f".{name}.tmp" for name in ("checkpoint.pth", "best_checkpoint.pth")]

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    training = trains_again(folder)
    process = start(folder, recipe)
    wait_until(training, process)

    # Let it write up to three checkpoints.
    for _ in range(moments.randrange(4)):
        old = written()
        wait_until(lambda old=old: written() not in (0, old), process)

    if writing:
        wait_until(lambda: any(path.exists() for path in temporary), process)
    else:
        time.sleep(moments.uniform(0, 0.3))

    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def differences(first: Path, second: Path) -> list[str]:
    """The parts of the checkpoints and the files in which two runs differ."""
    one = torch.load(first / "checkpoint.pth", weights_only=True)
    two = torch.load(second / "checkpoint.pth", weights_only=True)
    different = [part for part in PARTS if not equal(one.get(part), two.get(part))]
    different += [name for name in FILES if content(first / name) != content(second / name)]
    return different


def content(path: Path) -> bytes:
    """The bytes of a file, without the speeds and the id of the run; none if there is no file."""
    found = path.read_bytes() if path.exists() else b""
    return re.sub(rb', "images_per_second": [\d.]+, "run": "\w+"', b"", found)


def equal(one, two) -> bool:
    """Whether two structures of containers, numbers and tensors have equal values and dtypes."""
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
        whole = Path(folder, "whole")
        parts = Path(folder, "parts")

        began = time.time()
        finish(start(whole, recipe), whole)
        print(f"undisturbed: {time.time() - began:.0f} s", flush=True)

        done = 0
        for number in tqdm(range(args.kills), unit="kill"):
            done += kill(parts, recipe, number % 2 == 0, moments)
        finish(start(parts, recipe), parts)

        different = differences(whole, parts)
        epochs = len((parts / "log.txt").read_text().splitlines())

    found = ", ".join(different) or "nothing"
    print(f"{done} kills, {epochs} epochs in log.txt, different in the end: {found}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
