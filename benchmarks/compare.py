"""Which method, at which sparsity: all on the same models, images and budget. Takes hours.

    python benchmarks/compare.py FASHION_MNIST       # the folder of the four official files
    torchrun --standalone --nproc_per_node=2 benchmarks/compare.py FASHION_MNIST  # make compare

Two worlds: a dense model is pruned and finetuned for an epoch on the 6,000 images of the sample; or
a random one is trained for four epochs on a quarter of the training images that are not held out.
Each method's learning rate is the best of three or four on 5,000 held-out training images, and the
accuracies are those on the 10,000 test images. `comparison.py` defines the methods.

Every accuracy is a line of `results.csv` in `output/compare`, with the seconds that it took. Any
number of processes share the work, and more may be started later. Killed and started again, they
do what is missing, and a training resumes from its last checkpoint. At the end, or at once with
`--tables FILE`, tables and pictures are made of the lines that are there.
"""

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
from trainer.builders import choose_compute
from trainer.exit_status import exit_status
from trainer.parser import Parser
from trainer.run_folder import RunFolder
from trainer.stop_signals import Stopped, StopSignals
from trainer.sweep_table import FINETUNED, ONE_SHOT
from utils import UserError

OUTPUT = ROOT / "output" / "compare"
DONE = "done"  # a file in folders that are complete
#: Images of each class: the first ones are in the sample, the next ones are held out.
SAMPLE = 600
HELD_OUT = 500
COSTED = "0.9"  # the sparsity at which the cost of pruning is measured
#: The environment variables that torchrun sets.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def compare(official: Path) -> None:
    """Measures what is missing in results.csv, one accuracy after another, until nothing is."""
    results = Results(OUTPUT / "results.csv")
    tasks = all_tasks()
    utils.show_progress(quiet=True)  # of each training; a line for each accuracy is enough
    with StopSignals() as stop:
        bench = Bench(stop)
        try:
            while not set(tasks) <= (found := results.read()).keys():
                left = (task for task in tasks if task not in found)
                if not any(attempt(task, official, bench, results, found) for task in left):
                    time.sleep(2)  # other processes measure what is left
                stop.check_alone()
        except Stopped as stopped:
            stopped.args = (f"stopped by {stopped.name}; the same command resumes",)
            raise


def attempt(
    task: Task, official: Path, bench: "Bench", results: Results, found: dict[Task, Result]
) -> bool:
    """Measures the task, or makes what it needs first; False if another process is doing that.

    found: what `results` had a moment ago.
    """
    # What it needs
    if not (OUTPUT / "images" / DONE).exists():
        return claimed("images", lambda: make_images(official))
    if needs_dense(task) and not (OUTPUT / task.model / DONE).exists():
        return claimed(task.model, lambda: train_dense(task.model))
    rate = rate_of(task, found) if task.kind == FINETUNED else task.rate
    if task.kind == FINETUNED and not rate:
        return False

    def do():
        if task in results.read():  # another process has just measured it
            return
        result = bench.measure(task, rate)
        results.add(task, result)

        found = results.read()
        tasks = all_tasks()
        done = sum(task in found for task in tasks)
        text = f"{result.accuracy:.2f} %, {result.seconds:.0f} s"
        print(f"[{done}/{len(tasks)}] {task}: {text}", flush=True)

    return claimed(str(task), do)


def needs_dense(task: Task) -> bool:
    """Whether its dense model has to be trained first; the sample's comes with the project."""
    return task.world == "finetuned" and bool(MODELS[task.model])


def claimed(name: str, work) -> bool:
    """Calls `work` under a lock of that name; False if another process holds the lock.

    The lock ends with the process.
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
    """Measures accuracies; tasks of the same arguments share the data and the dense model."""

    def __init__(self, stop: StopSignals):
        self.stop = stop
        self.arguments = None
        self.bench = None

    def measure(self, task: Task, rate: float | None) -> Result:
        """The accuracy of a task at a learning rate. Raises UserError if it has none."""
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
        """Loads the data and the dense model for these arguments of a sweep."""
        if arguments == self.arguments:
            return
        self.bench = None  # frees its memory

        # The presets have flags that a sweep ignores; its message about them is of no interest here
        with contextlib.redirect_stdout(io.StringIO()):
            _, args = parse_sweep_args(arguments)
        self.bench = Workbench(args, choose_compute(args), self.stop)
        self.arguments = arguments

    def cost(self, task: Task) -> tuple[float, int]:
        """The seconds that pruning takes, and the bytes that it needs besides the model."""
        self.prepare(arguments_of(task))
        args = self.bench.arguments(task.run)
        taken = []

        def prune():
            self.bench.model.load_state_dict(self.bench.dense)
            self.bench.statistics.clear()
            taken.append(seconds(self.bench.sparsifier(args, {}).start, 1))

        needed = peak_above(prune)
        prune()
        return min(taken), needed


def costs() -> str:
    """A Markdown table of what pruning the sample's model costs; nothing else should run."""
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
    images = OUTPUT / "images" / f"{world.images}-{data}"
    arguments = [*world.arguments, *MODELS[task.model]]
    arguments += ["--data-set", "FASHION", "--data-path", str(images)]
    arguments += ["--finetune-epochs", str(world.epochs), "--seed", str(task.seed)]
    arguments += ["--num_workers", "0", "--quiet"]

    if needs_dense(task):
        arguments += ["--finetune", str(OUTPUT / task.model / "checkpoint.pth")]
    if method := world.methods.get(task.method):
        arguments += method.arguments
        if "schedule" in method.choices:
            arguments += ["--schedules", method.choices["schedule"]]
    return arguments


def make_images(official: Path) -> None:
    """Writes a data set for each pair of images to train on and images to test on.

    To train on: the sample, all that are not held out, or a quarter of these. To test on: the
    held-out or the official test images.
    """
    parts = {
        part: [
            read_idx(official, f"{part}-images-idx3-ubyte", ndim=3),
            read_idx(official, f"{part}-labels-idx1-ubyte", ndim=1),
        ]
        for part in ("train", "t10k")
    }

    # Indices of training images
    labels = parts["train"][1]
    classes = [np.flatnonzero(labels == label) for label in range(FashionMNIST.num_classes)]
    sample = np.sort(np.concatenate([images[:SAMPLE] for images in classes]))
    held_out = np.sort(np.concatenate([images[SAMPLE : SAMPLE + HELD_OUT] for images in classes]))
    rest = np.setdiff1d(np.arange(len(labels)), held_out)

    # Images and labels
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
    """Trains a dense model as the sample's was, on all images that are not held out; resumes."""
    folder = OUTPUT / model
    data = OUTPUT / "images" / "all-test"
    command = [sys.executable, "main.py", "--config", "configs/run/sample_dense.yaml"]
    command += [*MODELS[model], "--num_workers", "0", "--data-path", str(data)]
    command += ["--output_dir", str(folder), "--resume", "auto"]

    # As one process, also if torchrun started this one
    alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    if subprocess.run(command, cwd=ROOT, env=alone).returncode:
        raise UserError(f"the training of {model} has ended early; the same command resumes it")
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
    parser = Parser("compare.py", __doc__)
    parser.add_argument("official", type=Path, nargs="?", metavar="FASHION_MNIST")
    parser.add_argument(
        "--tables", type=Path, metavar="FILE", help="only make the tables of this results.csv"
    )
    parser.add_argument(
        "--costs", action="store_true", help="only print what pruning by each method costs"
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
