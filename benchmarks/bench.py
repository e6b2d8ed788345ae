"""Measures a comparison, one accuracy after another, in any number of processes.

Every accuracy is a line of `results.csv` in the comparison's folder, with the seconds that it took.
Any number of processes share the work, and more may be started later. Killed and started again,
they do what is missing, and a training resumes from its last checkpoint.
"""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from comparison import FINETUNED, Comparison, Result, Results, Task
from measure import ROOT

import utils
from sweep import Workbench, parse_sweep_args
from trainer.builders import choose_compute
from trainer.run_folder import RunFolder
from trainer.stop_signals import Stopped, StopSignals
from utils import UserError

DONE = "done"  # a file in folders that are complete
#: The environment variables that torchrun sets.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def measure_all(comparison: Comparison) -> None:
    """Measures what is missing in results.csv, one accuracy after another, until nothing is."""
    comparison.folder.mkdir(parents=True, exist_ok=True)
    results = Results(comparison.folder / "results.csv")
    tasks = comparison.tasks()
    utils.show_progress(quiet=True)  # of each training; a line for each accuracy is enough
    with StopSignals() as stop:
        bench = Bench(comparison, stop)

        try:
            while not set(tasks) <= (found := results.read()).keys():
                left = (task for task in tasks if task not in found)
                if not any(_attempt(task, bench, results, found) for task in left):
                    time.sleep(2)  # other processes measure what is left
                stop.check_alone()
        except Stopped as stopped:
            stopped.args = (f"stopped by {stopped.name}; the same command resumes",)
            raise


def _attempt(task: Task, bench: "Bench", results: Results, found: dict[Task, Result]) -> bool:
    """Measures the task, or makes what it needs first; False if another process is doing that.

    found: what `results` had a moment ago.
    """
    comparison = bench.comparison
    for name, make in comparison.needs(task).items():
        if not (comparison.folder / name / DONE).exists():
            return claimed(comparison.folder, name, partial(_make, comparison.folder / name, make))

    rate = comparison.rate(task, found) if task.kind == FINETUNED else task.rate
    if task.kind == FINETUNED and not rate:
        return False

    def do():
        if task in results.read():  # another process has just measured it
            return
        result = bench.measure(task, rate)
        results.add(task, result)

        found = results.read()
        tasks = comparison.tasks()
        done = sum(task in found for task in tasks)
        text = f"{result.accuracy:.2f} %, {result.seconds:.0f} s"
        print(f"[{done}/{len(tasks)}] {task}: {text}", flush=True)

    return claimed(comparison.folder, str(task), do)


def _make(folder: Path, make: Callable[[], None]) -> None:
    """Calls `make`, unless another process has just done it."""
    if not (folder / DONE).exists():
        make()
        (folder / DONE).touch()


def claimed(output: Path, name: str, work: Callable[[], None]) -> bool:
    """Calls `work` under a lock of that name; False if another process holds the lock.

    The lock ends with the process.
    """
    folder = output / "claims" / name
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

    def __init__(self, comparison: Comparison, stop: StopSignals):
        self.comparison = comparison
        self.stop = stop
        self.arguments = None
        self.bench = None

    def measure(self, task: Task, rate: float | None) -> Result:
        """The accuracy of a task at a learning rate. Raises UserError if it has none."""
        start = time.perf_counter()
        self.prepare(task)
        folder = self.comparison.folder / "runs" / str(task)
        self.bench.args.output_dir = str(folder)
        self.bench.args.lr = rate

        outcome = self.bench.outcome(self.comparison.run(task))
        if outcome.accuracy is None:
            raise UserError(f"{task}: {outcome.error}")
        shutil.rmtree(folder, ignore_errors=True)
        return Result(outcome.accuracy, time.perf_counter() - start, rate)

    def prepare(self, task: Task) -> None:
        """Loads the data and the dense model for the arguments of a task."""
        arguments = self.comparison.arguments(task)
        if arguments == self.arguments:
            return
        self.bench = None  # frees its memory

        # The presets have flags that a sweep ignores; its message about them is of no interest here
        with contextlib.redirect_stdout(io.StringIO()):
            _, args = parse_sweep_args(arguments)
        self.bench = Workbench(args, choose_compute(args), self.stop)
        self.arguments = arguments


def train_dense(arguments: list[str], folder: Path) -> None:
    """Trains a model by main.py in a folder; resumes. Raises UserError if it ends early."""
    command = [sys.executable, "main.py", *arguments, "--output_dir", str(folder)]
    command += ["--resume", "auto"]

    # As one process, also if torchrun started this one
    alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    if subprocess.run(command, cwd=ROOT, env=alone).returncode:
        raise UserError(f"the training in {folder} has ended early; the same command resumes it")


def write_results(comparison: Comparison, results: Results) -> None:
    """The pictures, and a page with all tables, in the comparison's folder."""
    found = results.read()
    parts = [
        f"## {model}, {world}, {kind}\n\n{table}"
        for (world, model, kind), table in comparison.tables(found).items()
    ]
    for name, content in comparison.pictures(found).items():
        (comparison.folder / name).write_bytes(content)
        parts.append(f"![{name}]({name})")
    page = comparison.folder / "tables.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"Written to {comparison.folder}: tables.md and the pictures")


def add_tables_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tables", type=Path, metavar="FILE", help="only make the tables of this results.csv"
    )


def finish(comparison: Comparison, tables: Path | None) -> None:
    """Measures what is missing, unless tables are to be made of a file; then writes the results."""
    comparison.folder.mkdir(parents=True, exist_ok=True)
    if not tables:
        measure_all(comparison)
    if os.environ.get("RANK", "0") == "0":
        write_results(comparison, Results(tables or comparison.folder / "results.csv"))
