"""Compares pruners: accuracy against sparsity right after pruning and, if asked for, after finetuning.

    python sweep.py --pruners lamp glob unif unifplus erk --sparsities 0.5 0.65 0.8 0.9 --finetune-epochs 2
    python sweep.py --sensitivity --sparsities 0.5 0.8 0.95
    torchrun --nproc_per_node=8 sweep.py --finetune-epochs 30 --model deit_small_patch16_224 --data-path IMAGENET

Takes any argument of main.py beside its own. Data and dense model are loaded once. Each result is a line of sweep.csv
in `--output_dir`; started again, it computes only what is missing there. Under torchrun the processes share the work,
each on a GPU of its own.
"""

import argparse
import csv
import io
import json
import os
import shlex
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import plots
import utils
from arguments import FREE, REFUSED, get_args_parser, given, parse_args
from builders import build_loaders, build_step_options, prepare_model, steps_of_epoch
from cli import exit_status
from engine import DivergedError
from results import Results, versions
from run_folder import RunFolder
from sparsity_factory import PRUNERS, Masks, PruningError, Recipe, Sparsifier, compute_masks, prunable_weights
from state import TrainingState
from stopping import Stopped, StopSignals
from training import Evaluator, train
from utils import UserError, first_line

AUTOMATIC = [name for name in PRUNERS if name != "custom"]
DENSE, ONE_SHOT, FINETUNED, LAYER = "dense", "one-shot", "finetuned", "layer"


class Task(NamedTuple):
    """One accuracy to measure. `name` is a pruner, a YAML file (with the checksum `config`), or a layer."""

    kind: str
    name: str = ""
    sparsity: float = 0.0
    seed: int | None = None
    config: str = ""

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return self.kind + (f", {self.name} at {100 * self.sparsity:.4g} %{seed}" if self.name else "")


class Outcome(NamedTuple):
    """Top-1 accuracy in percent and the fraction of the prunable weights that was pruned; or why there is none."""

    accuracy: float | None
    pruned: float | None = None
    error: str = ""


def sweep(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    options, args = parse_sweep_args(argv)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    table = Table(options.output_dir, args)
    launcher = "python" if processes == 1 else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
    command = shlex.join([*launcher.split(), "sweep.py", *argv])
    utils.show_progress(quiet=True)  # of each training; the sweep has lines of its own
    with StopSignals() as stop:
        try:
            bench = Workbench(args, stop)
            tasks = plan(options, bench)
            table.open(first=rank == 0)
            done = table.outcomes()
            progress = Progress(tasks, table, shown=rank == 0 and not args.quiet)
            for task in tasks[rank::processes]:  # shared out whole: another process may have done some of its own
                if task not in done:
                    table.add(task, bench.outcome(task))
                    progress.show()
            while rank == 0 and not set(tasks) <= set(table.outcomes()):
                time.sleep(0.5)  # the other processes are at work
                stop.check_alone()
                progress.show()
        except Stopped as stopped:
            stopped.args = (f"stopped by {stopped.name}; the same command does what is missing in "
                            f"{options.output_dir}",)
            raise
    if rank == 0:
        progress.close()
        table.sort(tasks)
        write_results(options, args.model, table, tasks, [f"    {command}", f"- versions: {versions(bench.device)}"])
    return 0


def parse_sweep_args(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The options of the sweep, and the arguments of main.py for each of its runs. Raises UserError."""
    parser = _Parser("sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    parser.add_argument("--pruners", nargs="*", choices=AUTOMATIC,
                        help="what to compare; by default all of them, and with --sensitivity none")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.65, 0.8, 0.9], help="each in [0, 1)")
    parser.add_argument("--custom-configs", nargs="+", default=[], metavar="FILE",
                        help="YAML files that take part at the sparsity they reach")
    parser.add_argument("--finetune-epochs", type=int, default=0, help="epochs of finetuning; 0 for none")
    parser.add_argument("--seeds", nargs="+", type=int, help="finetune once with each; --seed by default")
    parser.add_argument("--sensitivity", action="store_true", help="prune one layer at a time, by magnitude")
    parser.add_argument("--output_dir", default="output/sweep", metavar="DIR", help="where the results go")
    options, others = parser.parse_known_args(argv)
    given_here = given(others)
    for action in get_args_parser()._actions:
        if getattr(action, "sweep", None) == REFUSED and action.dest in given_here:
            instead = f"; see {action.instead}" if action.instead else ""
            raise UserError(f"{action.option_strings[0]}: not with a sweep{instead}")
    args = parse_args([*others, "--output_dir", options.output_dir])
    for sparsity in options.sparsities:
        if not 0 <= sparsity < 1:
            raise UserError(f"--sparsities {sparsity}: expected numbers in [0, 1)")
    options.seeds = options.seeds or [args.seed]
    if options.finetune_epochs < 0 or min(options.seeds) < 0:
        raise UserError("--finetune-epochs and --seeds: expected numbers of at least 0")
    if options.pruners is None:
        options.pruners = [] if options.sensitivity else AUTOMATIC
    args.output_dir, args.epochs = "", options.finetune_epochs
    return options, args


def plan(options, bench: "Workbench") -> list[Task]:
    """The accuracies to measure, the dense one first. Raises PruningError for a YAML that does not fit the model."""
    sparsities = sorted(set(options.sparsities))
    allocations = [(name, sparsity, "") for name in dict.fromkeys(options.pruners) for sparsity in sparsities]
    for path in dict.fromkeys(options.custom_configs):
        masks = compute_masks(bench.model, "custom", custom_config=path)
        allocations.append((path, round(_pruned(masks), 6), f"{zlib.crc32(Path(path).read_bytes()):08x}"))
    tasks = [Task(DENSE)] + [Task(ONE_SHOT, name, sparsity, None, config) for name, sparsity, config in allocations]
    if options.finetune_epochs:
        tasks += [Task(FINETUNED, name, sparsity, seed, config) for seed in dict.fromkeys(options.seeds)
                  for name, sparsity, config in allocations]
    if options.sensitivity:
        tasks += [Task(LAYER, name, sparsity) for name in prunable_weights(bench.model) for sparsity in sparsities]
    return tasks


class Workbench:
    """The data and the dense model, with which one accuracy after another is measured."""

    def __init__(self, args, stop):
        self.args, self.stop = args, stop
        self.device = utils.choose_device(args.device)
        self.amp_dtype = utils.choose_amp(args.amp, self.device)
        utils.seed_everything(utils.INIT, args.seed)
        self.train_loader, self.val_loader, num_classes = build_loaders(args, self.device)
        checkpoint = utils.load_checkpoint(args.finetune) if args.finetune else {}
        self.model = prepare_model(args, num_classes, checkpoint, self.device)
        self.dense = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.test = Evaluator(self.val_loader, args, self.device, self.amp_dtype, stop, {})
        if args.epochs:
            self.options = build_step_options(args, num_classes, self.device, self.amp_dtype)
            self._state(args, Recipe())  # a mistake in the arguments of the optimizer shows at once

    def outcome(self, task: Task) -> Outcome:
        """Measures what the task asks for; what fails is told in the outcome, since the others may succeed."""
        self.model.load_state_dict(self.dense)
        try:
            if task.kind == DENSE:
                return Outcome(self.test(self.model)["acc1"])
            masks = self._masks(task)
            if task.kind == FINETUNED:
                accuracy = self._finetune(masks, task.seed)
            else:
                Masks(self.model, masks)
                accuracy = self.test(self.model)["acc1"]
            return Outcome(accuracy, _pruned(masks))
        except (PruningError, DivergedError, torch.OutOfMemoryError) as error:
            return Outcome(None, error=first_line(error))

    def _masks(self, task: Task) -> dict[str, torch.Tensor]:
        if task.kind == LAYER:
            level = {"default": "dense", task.name: task.sparsity}
            return compute_masks(self.model, "custom", custom_config={
                "sparsity": {"mode": "unstructured", "level": level}})
        if task.config:
            return compute_masks(self.model, "custom", custom_config=task.name)
        return compute_masks(self.model, task.name, task.sparsity)

    def _finetune(self, masks: Mapping[str, torch.Tensor], seed: int) -> float:
        args = argparse.Namespace(**{**vars(self.args), "seed": seed})
        state = self._state(args, Recipe(), masks)
        self.train_loader.sampler.set_seed(seed)
        return train(state, self.options, self.train_loader, self.test, self.stop, Results("", {}))

    def _state(self, args, recipe: Recipe, masks: Mapping[str, torch.Tensor] | None = None) -> TrainingState:
        steps = steps_of_epoch(self.train_loader, args)
        sparsifier = Sparsifier(self.model, recipe, total_steps=args.epochs * steps, epoch_steps=steps, masks=masks)
        return TrainingState(self.model, sparsifier, args, self.device, self.train_loader.dataset.bad)


class Table:
    """sweep.csv: a line for each outcome, added as it comes, by any process; and beside it what all of them share."""

    def __init__(self, folder: str, args):
        """Raises UserError when the folder holds a sweep with other arguments."""
        self.folder, self.path = folder, Path(folder, "sweep.csv")
        shared = {action.dest for action in get_args_parser()._actions if getattr(action, "sweep", FREE) != FREE}
        self._settings = json.loads(json.dumps({k: v for k, v in vars(args).items() if k in shared}))
        self._settings_path = Path(folder, "sweep.json")
        if not self.path.exists() and not self._settings_path.exists():
            return
        try:
            theirs = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            theirs = None
        if not isinstance(theirs, dict):
            raise UserError(f"--output_dir {folder}: its sweep.json cannot be read; choose another folder")
        defaults = get_args_parser()
        for name, ours in self._settings.items():
            before = theirs.get(name, defaults.get_default(name))  # arguments may have been added since
            if before != ours:
                flag = "--finetune-epochs" if name == "epochs" else f"--{name.replace('_', '-')}"
                raise UserError(f"--output_dir {folder}: holds a sweep with {flag} {before}, not {ours}; choose "
                                "another folder")

    def open(self, first: bool) -> None:
        """The first process makes and locks the folder, and writes what the sweep's lines share; the others wait."""
        if first:
            self._lock = RunFolder(self.folder)
            self.write(self._settings_path.name, json.dumps(self._settings, indent=1).encode())
        while not self._settings_path.exists():
            time.sleep(0.2)

    def outcomes(self) -> dict[Task, Outcome]:
        """What the file has; later lines win, and damaged ones are passed over."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        found = {}
        for row in csv.reader(lines):
            try:
                kind, name, sparsity, seed, config, pruned, accuracy, error = row
                task = Task(kind, name, float(sparsity), int(seed) if seed else None, config)
                found[task] = Outcome(float(accuracy) if accuracy else None, float(pruned) if pruned else None, error)
            except ValueError:  # the header, or half a line
                continue
        return found

    def add(self, task: Task, outcome: Outcome) -> None:
        """Adds a line, whole: a short write in append mode is not mixed with another process's."""
        try:
            with open(self.path, "ab", buffering=0) as file:
                file.write(b"\n" * _torn(self.path) + _csv_lines([(task, outcome)], header=file.tell() == 0))
                os.fsync(file.fileno())
        except OSError as error:
            raise utils.WriteError(f"{self.path}: cannot be written ({error.strerror})") from None

    def sort(self, tasks: Iterable[Task]) -> None:
        """Writes the file anew: the lines of the tasks in their order, then those of other starts."""
        found = self.outcomes()
        order = dict.fromkeys([*(task for task in tasks if task in found), *found])
        self.write("sweep.csv", _csv_lines([(task, found[task]) for task in order], header=True))

    def write(self, name: str, content: bytes) -> None:
        utils.write_atomically(Path(self.folder, name), lambda file: file.write(content))


class Progress:
    """Shows the outcomes of all processes as they come: as a bar on a terminal, else as lines."""

    def __init__(self, tasks: list[Task], table: Table, shown: bool):
        self.tasks, self.table, self.shown = tasks, table, shown
        self.seen = set(tasks) & set(table.outcomes())
        if shown and self.seen:
            print(f"{table.path}: {len(self.seen)} of {len(tasks)} done before", flush=True)
        self.bar = tqdm(total=len(tasks), initial=len(self.seen), unit="run", dynamic_ncols=True, file=sys.stdout,
                        disable=not (shown and sys.stdout.isatty()))

    def show(self) -> None:
        outcomes = self.table.outcomes() if self.shown else {}
        for task in self.tasks:
            if task in outcomes and task not in self.seen:
                self.seen.add(task)
                result = outcomes[task]
                text = result.error if result.accuracy is None else f"{result.accuracy:.2f} %"
                tqdm.write(f"[{len(self.seen)}/{len(self.tasks)}] {task}: {text}", file=sys.stdout)
                sys.stdout.flush()
                self.bar.update()

    def close(self) -> None:
        self.bar.close()


def write_results(options, model: str, table: Table, tasks: list[Task], facts: list[str]) -> None:
    """The pictures and sweep.md, of what this command asked for; prints the table. facts: its first and last line."""
    outcomes = {task: outcome for task, outcome in table.outcomes().items() if task in set(tasks)}
    accuracies = {task: outcome.accuracy for task, outcome in outcomes.items() if outcome.accuracy is not None}
    dense, pictures = accuracies.get(Task(DENSE)), []
    if curves := _curves(accuracies):
        epochs, seeds = options.finetune_epochs, len(options.seeds)
        finetuned = f"finetuned for {epochs} epoch{'s' * (epochs > 1)}"
        finetuned += f",\nmean and range of {seeds} seeds" if seeds > 1 else ""
        table.write("sweep.png", plots.png(plots.sweep_lines(curves, dense, model, finetuned)))
        pictures.append("![Top-1 accuracy against sparsity](sweep.png)")
    drops = {(task.name, task.sparsity): dense - value for task, value in accuracies.items() if task.kind == LAYER}
    if drops:
        title = f"{model}, one layer pruned at a time"
        table.write("sensitivity.png", plots.png(plots.sensitivity_map(drops, title)))
        pictures.append("![Accuracy lost by pruning each layer alone](sensitivity.png)")
    text = "\n".join(_table(outcomes, dense))
    parts = [f"# {model}, a sweep", facts[0], text, *pictures, facts[1]]
    table.write("sweep.md", "\n\n".join(parts).encode() + b"\n")
    print(text)
    print(f"Written to {table.folder}: " + ", ".join(sorted(
        path.name for path in Path(table.folder).iterdir() if path.name.startswith(("sweep.", "sensitivity.")))))


# ---- helpers, not exported ----


def _curves(accuracies: Mapping[Task, float]) -> dict[str, dict[str, list[tuple[float, list[float]]]]]:
    """By pruner and kind: the sparsities, each with the accuracies of all seeds."""
    curves = {}
    for task, accuracy in accuracies.items():
        if task.kind in (ONE_SHOT, FINETUNED):
            points = curves.setdefault(task.name, {}).setdefault(task.kind, {})
            points.setdefault(task.sparsity, []).append(accuracy)
    return {name: {kind: sorted(points.items()) for kind, points in kinds.items()} for name, kinds in curves.items()}


def _table(outcomes: Mapping[Task, Outcome], dense: float | None) -> list[str]:
    """Top-1 accuracy in Markdown: pruners by sparsity, then custom configurations, then what failed."""
    allocations = dict.fromkeys((task.name, task.sparsity, task.config) for task in outcomes
                                if task.kind in (ONE_SHOT, FINETUNED))

    def cell(*allocation):
        mine = [(task, outcome.accuracy) for task, outcome in outcomes.items()
                if (task.name, task.sparsity, task.config) == allocation and task.kind in (ONE_SHOT, FINETUNED)]
        one_shot = [value for task, value in mine if task.kind == ONE_SHOT and value is not None]
        tuned = [value for task, value in mine if task.kind == FINETUNED and value is not None]
        if not mine or not (one_shot or tuned):
            return "failed" if mine else ""
        parts = [f"{value:.2f}" for value in one_shot]
        if tuned:
            spread = f" ({min(tuned):.2f} to {max(tuned):.2f})" if len(tuned) > 1 else ""
            parts.append(f"{sum(tuned) / len(tuned):.2f}{spread}")
        return " → ".join(parts)

    lines = []
    sparsities = sorted({sparsity for _, sparsity, config in allocations if not config})
    if sparsities:
        lines += ["| top-1 in % | " + " | ".join(f"{100 * sparsity:g} %" for sparsity in sparsities) + " |",
                  "| --- |" + " --- |" * len(sparsities)]
        for name in dict.fromkeys(name for name, _, config in allocations if not config):
            lines.append(f"| `{name}` | " + " | ".join(cell(name, sparsity, "") for sparsity in sparsities) + " |")
        lines.append("")
    lines += [f"- `{name}`, {100 * sparsity:.2f} % pruned: {cell(name, sparsity, config)}"
              for name, sparsity, config in allocations if config]
    lines += [f"- dense: {dense:.2f}"] if dense is not None else []
    failed = {(task.name, task.sparsity): outcome.error for task, outcome in outcomes.items() if outcome.error}
    return lines + [f"- {name} at {100 * sparsity:.4g} %: {error}" for (name, sparsity), error in failed.items()]


def _csv_lines(rows: Iterable[tuple[Task, Outcome]], header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(["kind", "name", "sparsity", "seed", "config", "pruned", "accuracy", "error"])
    for task, outcome in rows:
        seed = "" if task.seed is None else task.seed
        pruned = "" if outcome.pruned is None else f"{outcome.pruned:.6f}"
        accuracy = "" if outcome.accuracy is None else f"{outcome.accuracy:.4f}"
        writer.writerow([task.kind, task.name, task.sparsity, seed, task.config, pruned, accuracy, outcome.error])
    return text.getvalue().encode()


def _torn(path: Path) -> bool:
    """Whether the last line was not written whole."""
    content = path.read_bytes() if path.exists() else b""
    return bool(content) and not content.endswith(b"\n")


def _pruned(masks: Mapping[str, torch.Tensor]) -> float:
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.count_nonzero()) for mask in masks.values()) / total


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: sweep(sys.argv[1:])))
