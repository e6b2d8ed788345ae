"""Which method, at which sparsity: all on the same models, images and budget. Takes hours.

    python benchmarks/compare.py FASHION_MNIST                               # the folder of the
    four official files torchrun --standalone --nproc_per_node=2 benchmarks/compare.py FASHION_MNIST
    # as `make compare`

Two worlds: a dense model is pruned and finetuned for an epoch on the 6,000 images of the sample; or
a random one is trained for four epochs on a quarter of the training images that are not held out.
Each method's learning rate is the best of three or four on 5,000 held-out training images, and the
figures are of the 10,000 test images. `comparison.py` has the methods.

Every accuracy is a line of `results.csv` in `output/compare`, with the seconds that it took. Any
number of processes share the work, also those that are started later; killed and started again,
they go on, a training from its last checkpoint. At the end, or with `--tables FILE` at once, tables
and pictures are made of the lines that are there.
"""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from comparison import (
    MODELS,
    TUNING,
    WORLDS,
    Result,
    Results,
    Task,
    all_tasks,
    pictures,
    rate_of,
    tables,
)
from measure import ROOT, peak_above, seconds

import utils
from datasets import FashionMNIST, read_idx, write_idx
from sweep import Workbench, parse_sweep_args
from trainer.exit_status import exit_status
from trainer.run_folder import RunFolder
from trainer.stop_signals import Stopped, StopSignals
from trainer.sweep_table import FINETUNED, ONE_SHOT
from utils import Compute, UserError

OUTPUT, DONE = ROOT / "output" / "compare", "done"
# Images of a class: of the sample, its first ones, and of those held out, the next
SAMPLE, HELD_OUT = 600, 500
COSTED = "0.9"  # the sparsity at which it is measured what pruning takes
#: What torchrun tells its processes.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def compare(official: Path) -> None:
    """Does what is missing in results.csv, one piece after another, until nothing is."""
    results, tasks = Results(OUTPUT / "results.csv"), all_tasks()
    utils.show_progress(quiet=True)  # of each training; a line for each accuracy is enough
    with StopSignals() as stop:
        bench = Bench(stop)
        try:
            while not set(tasks) <= (found := results.read()).keys():
                left = (task for task in tasks if task not in found)
                if not any(attempt(task, official, bench, results, found) for task in left):
                    time.sleep(2)  # other processes are at what is left
                stop.check_alone()
        except Stopped as stopped:
            stopped.args = (f"stopped by {stopped.name}; the same command goes on",)
            raise


def attempt(
    task: Task, official: Path, bench: "Bench", results: Results, found: dict[Task, Result]
) -> bool:
    """Does the task, or what it needs first; False where another process is at it, or at what it
    needs.

    found: what `results` had a moment ago.
    """
    if not (OUTPUT / "images" / DONE).exists():
        return claimed("images", lambda: make_images(official))
    if (
        task.world == "finetuned"
        and not (OUTPUT / task.model / DONE).exists()
        and MODELS[task.model]
    ):
        return claimed(task.model, lambda: train_dense(task.model))
    rate = rate_of(task, found) if task.kind == FINETUNED else task.rate
    if task.kind == FINETUNED and not rate:
        return False

    def do():
        if task not in results.read():  # else another process has just done it
            result = bench.measure(task, rate)
            results.add(task, result)
            found, tasks = results.read(), all_tasks()
            print(
                f"[{sum(task in found for task in tasks)}/{len(tasks)}] {task}: "
                f"{result.accuracy:.2f} %, "
                f"{result.seconds:.0f} s",
                flush=True,
            )

    return claimed(str(task), do)


def claimed(name: str, work) -> bool:
    """Calls `work` under a lock of that name, which ends with the process; False where another
    process has it.
    """
    folder = OUTPUT / "claims" / name
    try:
        lock = RunFolder(str(folder))
    except UserError:
        return False
    work()
    shutil.rmtree(folder, ignore_errors=True)
    del lock
    return True


class Bench:
    """Measures one accuracy after another; data and dense model stay for as long as the arguments
    do.
    """

    def __init__(self, stop: StopSignals):
        self.stop = stop
        self.arguments = None
        self.bench = None

    def measure(self, task: Task, rate: float | None) -> Result:
        start = time.perf_counter()
        self.prepare(arguments_of(task))
        folder = OUTPUT / "runs" / str(task)
        self.bench.args.output_dir = str(folder)
        self.bench.args.lr = rate
        outcome = self.bench.outcome(task.run)
        if outcome.accuracy is None:
            raise UserError(f"{task}: {outcome.error}")
        shutil.rmtree(folder, ignore_errors=True)
        return Result(outcome.accuracy, time.perf_counter() - start, rate)

    def prepare(self, arguments: list[str]) -> None:
        if arguments != self.arguments:
            self.bench = None  # frees its memory
            # It says which flags a sweep has of its own
            with contextlib.redirect_stdout(io.StringIO()):
                _, args = parse_sweep_args(arguments)
            self.bench = Workbench(args, Compute.choose(args.device, args.amp), self.stop)
            self.arguments = arguments

    def cost(self, task: Task) -> tuple[float, int]:
        """The seconds and the bytes above the model that it takes to prune once."""
        self.prepare(arguments_of(task))
        args, taken = self.bench.arguments(task.run), []

        def prune():
            self.bench.model.load_state_dict(self.bench.dense)
            self.bench.statistics.clear()
            taken.append(seconds(self.bench.sparsifier(args, {}).start, 1))

        needed = peak_above(prune)
        prune()
        return min(taken), needed


def costs() -> str:
    """What it takes to prune the sample's model once, in Markdown, where nothing else runs."""
    utils.show_progress(quiet=True)
    lines = ["| | seconds | MB above the model |", "| --- | ---: | ---: |"]
    with StopSignals() as stop:
        bench = Bench(stop)
        for name, method in WORLDS["finetuned"].methods.items():
            if "schedule" not in method.choices and not method.arguments:
                taken, needed = bench.cost(Task(ONE_SHOT, "finetuned", "sample", name, COSTED))
                lines.append(f"| `{name}` | {taken:.2g} | {needed / 1e6:.0f} |")
    return "\n".join(lines)


def arguments_of(task: Task) -> list[str]:
    """The arguments of a sweep, without the learning rate and the choices of the task."""
    world = WORLDS[task.world]
    data = "held-out" if task.kind == TUNING else "test"
    arguments = [
        *world.arguments,
        *MODELS[task.model],
        "--data-set",
        "FASHION",
        "--data-path",
        str(OUTPUT / "images" / f"{world.images}-{data}"),
        "--finetune-epochs",
        str(world.epochs),
        "--seed",
        str(task.seed),
        "--num_workers",
        "0",
        "--quiet",
    ]
    if task.world == "finetuned" and MODELS[task.model]:
        arguments += ["--finetune", str(OUTPUT / task.model / "checkpoint.pth")]
    if method := world.methods.get(task.method):
        arguments += method.arguments
        if "schedule" in method.choices:
            arguments += ["--schedules", method.choices["schedule"]]
    return arguments


def make_images(official: Path) -> None:
    """Writes folders of images to train on (the sample, all not held out, a quarter of these) and
    to test on.
    """
    parts = {
        part: [
            read_idx(official, f"{part}-images-idx3-ubyte", ndim=3),
            read_idx(official, f"{part}-labels-idx1-ubyte", ndim=1),
        ]
        for part in ("train", "t10k")
    }
    labels = parts["train"][1]
    classes = [np.flatnonzero(labels == label) for label in range(FashionMNIST.num_classes)]
    sample, held_out = (
        np.sort(np.concatenate([images[chosen] for images in classes]))
        for chosen in (slice(SAMPLE), slice(SAMPLE, SAMPLE + HELD_OUT))
    )
    rest = np.setdiff1d(np.arange(len(labels)), held_out)
    train = {
        name: [array[chosen] for array in parts["train"]]
        for name, chosen in {"sample": sample, "all": rest, "quarter": rest[::4]}.items()
    }
    test = {"held-out": [array[held_out] for array in parts["train"]], "test": parts["t10k"]}
    for name, trained in train.items():
        for other, tested in test.items():
            folder = OUTPUT / "images" / f"{name}-{other}"
            folder.mkdir(parents=True, exist_ok=True)
            for part, (images, labels) in (("train", trained), ("t10k", tested)):
                write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
                write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    (OUTPUT / "images" / DONE).touch()


def train_dense(model: str) -> None:
    """Trains a dense model as that of the sample was, on all images that are not held out; goes on
    where it was.
    """
    folder = OUTPUT / model
    command = [
        sys.executable,
        "main.py",
        "--config",
        "configs/run/sample_dense.yaml",
        *MODELS[model],
        "--num_workers",
        "0",
        "--data-path",
        str(OUTPUT / "images" / "all-test"),
        "--output_dir",
        str(folder),
        "--resume",
        "auto",
    ]
    alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    if subprocess.run(command, cwd=ROOT, env=alone).returncode:
        raise UserError(f"the training of {model} has ended early; the same command goes on")
    (folder / DONE).touch()


def write_results(results: Results, folder: Path) -> None:
    """The pictures, and a page with all tables."""
    found = results.read()
    parts = [
        f"## {model}, {world}, {kind}\n\n{table}"
        for (world, model, kind), table in tables(found).items()
    ]
    for name, content in pictures(found).items():
        (folder / name).write_bytes(content)
        parts.append(f"![{name}]({name})")
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"Written to {folder}: tables.md and the pictures")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("official", type=Path, nargs="?", metavar="FASHION_MNIST")
    parser.add_argument(
        "--tables", type=Path, metavar="FILE", help="a results.csv of which to make tables, no more"
    )
    parser.add_argument(
        "--costs", action="store_true", help="print what it takes to prune by each method, no more"
    )
    args = parser.parse_args(argv)
    if not args.official and not args.tables:
        parser.error("expected FASHION_MNIST, the folder of the four official files")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if args.costs:
        make_images(args.official)
        print(costs())
        return 0
    if not args.tables:
        compare(args.official)
    if os.environ.get("RANK", "0") == "0":
        write_results(Results(args.tables or OUTPUT / "results.csv"), OUTPUT)
    return 0


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: main(sys.argv[1:])))
