"""What a sweep measures, and sweep.csv, which has what was measured."""

import csv
import io
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import utils
from sparsity_factory import Recipe, parse_pattern
from utils import UserError

from .arguments import FREE, get_args_parser
from .run_folder import RunFolder

DENSE = "dense"
ONE_SHOT = "one-shot"
FINETUNED = "finetuned"
LAYER = "layer"
# What the error of a combination begins with that recipe or model refuse
REFUSED = "refused: "
DEFAULTS = (Recipe.score, Recipe.pattern, Recipe.prune_schedule, Recipe.reconstruct)
COLUMNS = (
    "kind",
    "name",
    "score",
    "pattern",
    "schedule",
    "reconstruct",
    "sparsity",
    "seed",
    "config",
    "pruned",
    "accuracy",
    "error",
)


class Combination(NamedTuple):
    """The choices of a recipe that a sweep crosses. `name` is a pruner, or a YAML file with the
    checksum `config`.
    """

    name: str
    score: str = DEFAULTS[0]
    pattern: str = DEFAULTS[1]
    schedule: str = DEFAULTS[2]
    reconstruct: str = DEFAULTS[3]
    config: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """Score, pattern, schedule and reconstruction; no pattern where the YAML has its own."""
        return self.score, "" if self.config else self.pattern, self.schedule, self.reconstruct

    @property
    def sets_sparsity(self) -> bool:
        """Whether it has one sparsity only: that of a YAML file or a pattern such as 2:4."""
        return bool(self.config) or parse_pattern(self.pattern).sparsity is not None

    def __str__(self) -> str:
        """The name, and the choices that are not the defaults."""
        others = zip(self.choices, DEFAULTS, strict=True)
        return ", ".join(
            [self.name, *(choice for choice, default in others if choice and choice != default)]
        )


def labels(combinations: Iterable[Combination]) -> dict[Combination, str]:
    """What tells each from the others: its name, and those of the other choices that differ among
    them.
    """
    combinations = list(dict.fromkeys(combinations))
    values = list(zip(*(combination.choices for combination in combinations), strict=True))
    differ = [len(set(column) - {""}) > 1 for column in values]
    return {
        combination: ", ".join(
            [
                combination.name,
                *(
                    choice
                    for choice, differs in zip(combination.choices, differ, strict=True)
                    if differs and choice
                ),
            ]
        )
        for combination in combinations
    }


class Task(NamedTuple):
    """One accuracy to measure: of a combination at a sparsity, or of the dense model, or with a
    layer pruned alone.

    A layer's name stands in the place of the pruner's. seed: of a finetuning.
    """

    kind: str
    name: str = ""
    sparsity: float = 0.0
    seed: int | None = None
    config: str = ""
    score: str = DEFAULTS[0]
    pattern: str = DEFAULTS[1]
    schedule: str = DEFAULTS[2]
    reconstruct: str = DEFAULTS[3]

    @property
    def combination(self) -> Combination:
        return Combination(
            self.name, self.score, self.pattern, self.schedule, self.reconstruct, self.config
        )

    @property
    def choices(self) -> dict:
        """What main.py is given for the recipe: by the names of its arguments."""
        return {
            "pruner": "custom" if self.config else self.name,
            "sparsity": None if self.combination.sets_sparsity else self.sparsity,
            "custom_config": self.name if self.config else None,
            "score": self.score,
            "pattern": self.pattern,
            "prune_schedule": self.schedule,
            "reconstruct": self.reconstruct,
        }

    @property
    def run(self) -> str:
        """The name of the folder of its finetuning."""
        name = f"{Path(self.name).stem}-{self.config}" if self.config else self.name
        parts = [
            *str(self.combination._replace(name=name)).split(", "),
            str(self.sparsity),
            f"seed{self.seed}",
        ]
        return "_".join(parts).replace(":", "-")

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return self.kind + (
            f", {self.combination} at {100 * self.sparsity:.4g} %{seed}" if self.name else ""
        )


class Outcome(NamedTuple):
    """Top-1 accuracy in percent and the fraction of the prunable weights that was pruned; or why
    there is none.
    """

    accuracy: float | None
    pruned: float | None = None
    error: str = ""


class Table:
    """sweep.csv: a line for each outcome, added as it comes, by any process; and beside it what all
    of them share.
    """

    def __init__(self, folder: str, args, processes_per_run: int):
        """Raises UserError when the folder holds a sweep with other arguments."""
        self.folder = folder
        self.path = Path(folder, "sweep.csv")
        shared = {
            action.dest
            for action in get_args_parser()._actions
            if getattr(action, "sweep", FREE) != FREE
        }
        self._settings = json.loads(
            json.dumps({k: v for k, v in vars(args).items() if k in shared})
        )
        # Which share the images of a step
        self._settings["processes_per_run"] = processes_per_run
        self._settings_path = Path(folder, "sweep.json")
        if not self.path.exists() and not self._settings_path.exists():
            return
        try:
            theirs = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            theirs = None
        if not isinstance(theirs, dict):
            raise UserError(
                f"--output_dir {folder}: its sweep.json cannot be read; choose another folder"
            )
        parser = get_args_parser()
        for name, ours in self._settings.items():
            default = 1 if name == "processes_per_run" else parser.get_default(name)
            before = theirs.get(name, default)  # arguments may have been added since
            if before != ours:
                flag = "--finetune-epochs" if name == "epochs" else f"--{name.replace('_', '-')}"
                raise UserError(
                    f"--output_dir {folder}: holds a sweep with {flag} {before}, not {ours}; "
                    "choose "
                    "another folder"
                )

    def open(self, first: bool) -> None:
        """The first process makes and locks the folder, and writes what the sweep's lines share;
        the others wait.
        """
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
                # Made before sweeps crossed scores, patterns and schedules, or reconstructions:
                if missing := {8: 4, 11: 1}.get(len(row)):
                    row = [*row[: 6 - missing], *[""] * missing, *row[6 - missing :]]
                kind, name, *choices, sparsity, seed, config, pruned, accuracy, error = row
                choices = [
                    choice or default for choice, default in zip(choices, DEFAULTS, strict=True)
                ]
                task = Task(
                    kind, name, float(sparsity), int(seed) if seed else None, config, *choices
                )
                found[task] = Outcome(
                    float(accuracy) if accuracy else None, float(pruned) if pruned else None, error
                )
            except ValueError:  # the header, or half a line
                continue
        return found

    def add(self, task: Task, outcome: Outcome) -> None:
        """Adds a line, whole: a short write in append mode is not mixed with another process's."""
        try:
            with open(self.path, "ab", buffering=0) as file:
                file.write(
                    b"\n" * _torn(self.path)
                    + _csv_lines([(task, outcome)], header=file.tell() == 0)
                )
                os.fsync(file.fileno())
        except OSError as error:
            raise utils.WriteError(f"{self.path}: cannot be written ({error.strerror})") from None

    def sort(self, tasks: Iterable[Task]) -> None:
        """Rewrites the file: the tasks' lines in their order, then those of other starts."""
        found = self.outcomes()
        order = dict.fromkeys([*(task for task in tasks if task in found), *found])
        self.write("sweep.csv", _csv_lines([(task, found[task]) for task in order], header=True))

    def write(self, name: str, content: bytes) -> None:
        utils.write_atomically(Path(self.folder, name), lambda file: file.write(content))


def mean_and_range(values: list[float]) -> str:
    """Accuracies in words: their mean, and the range of several; nothing of none."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (
        f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    )


# ---- helpers, not exported ----


def _csv_lines(rows: Iterable[tuple[Task, Outcome]], header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    for task, outcome in rows:
        seed = "" if task.seed is None else task.seed
        pruned = "" if outcome.pruned is None else f"{outcome.pruned:.6f}"
        accuracy = "" if outcome.accuracy is None else f"{outcome.accuracy:.4f}"
        choices = [""] * len(DEFAULTS) if task.kind == DENSE else task.combination.choices
        writer.writerow(
            [
                task.kind,
                task.name,
                *choices,
                task.sparsity,
                seed,
                task.config,
                pruned,
                accuracy,
                outcome.error,
            ]
        )
    return text.getvalue().encode()


def _torn(path: Path) -> bool:
    """Whether the last line was not written whole."""
    content = path.read_bytes() if path.exists() else b""
    return bool(content) and not content.endswith(b"\n")
