"""The tasks of a sweep, and sweep.csv, which holds their outcomes."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from sparsity_factory import Recipe, parse_pattern

from .job_folder import JobFolder

DENSE = "dense"
ONE_SHOT = "one-shot"
FINETUNED = "finetuned"
LAYER = "layer"
#: Begins the error of a combination that the recipe or the model refuses.
REFUSED = "refused: "
DEFAULTS = (Recipe.score, Recipe.pattern, Recipe.prune_schedule, Recipe.reconstruct)
CHOICES = ("score", "pattern", "schedule", "reconstruct")
COLUMNS = ("kind", "name", *CHOICES, "sparsity", "seed", "config", "pruned", "accuracy", "error")


class Combination(NamedTuple):
    """The choices of a recipe that a sweep crosses.

    name: a pruner, or a YAML file, whose checksum is `config`.
    """

    name: str
    score: str = DEFAULTS[0]
    pattern: str = DEFAULTS[1]
    schedule: str = DEFAULTS[2]
    reconstruct: str = DEFAULTS[3]
    config: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """Score, pattern, schedule and reconstruction; no pattern if a YAML file has its own."""
        return self.score, "" if self.config else self.pattern, self.schedule, self.reconstruct

    @property
    def sets_sparsity(self) -> bool:
        """Whether its YAML file, or its pattern such as 2:4, leaves it one sparsity only."""
        return bool(self.config) or parse_pattern(self.pattern).sparsity is not None

    def __str__(self) -> str:
        """The name, and the choices that are not the defaults."""
        pairs = zip(self.choices, DEFAULTS, strict=True)
        others = [choice for choice, default in pairs if choice and choice != default]
        return ", ".join([self.name, *others])


def labels(combinations: Iterable[Combination]) -> dict[Combination, str]:
    """A name for each that tells it from the others: its own, and the choices that differ."""
    combinations = list(dict.fromkeys(combinations))
    columns = zip(*(combination.choices for combination in combinations), strict=True)
    differ = [len(set(column) - {""}) > 1 for column in columns]

    def label(combination):
        choices = zip(combination.choices, differ, strict=True)
        telling = [choice for choice, differs in choices if differs and choice]
        return ", ".join([combination.name, *telling])

    return {combination: label(combination) for combination in combinations}


class Task(NamedTuple):
    """One accuracy to measure: of a combination at a sparsity, of the dense model, or of one layer.

    name: of the pruner, or of the layer that is pruned alone. seed: of a finetuning.
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
        """The recipe, as arguments of main.py by their names."""
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
        if not self.name:
            return self.kind
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.kind}, {self.combination} at {100 * self.sparsity:.4g} %{seed}"


class Outcome(NamedTuple):
    """Top-1 accuracy in percent, and the fraction of the prunable weights that was pruned.

    error: why there is no accuracy.
    """

    accuracy: float | None
    pruned: float | None = None
    error: str = ""


class Table:
    """The outcomes of a sweep, in sweep.csv: any process adds a line for each as it comes."""

    def __init__(self, folder: str, args, processes_per_run: int):
        """Raises UserError when the folder holds a sweep with other arguments.

        processes_per_run: how many share the images of a step.
        """
        self.folder = JobFolder(folder, "sweep.csv", job="sweep", header=_csv_line(COLUMNS))
        self.folder.agree(
            args,
            {"processes_per_run": processes_per_run},
            defaults={"processes_per_run": 1},
            flags={"epochs": "--finetune-epochs"},
        )

    def outcomes(self) -> dict[Task, Outcome]:
        """The outcomes in the file; of two of one task, the later line counts."""
        return dict(self.folder.read(_parse))

    def add(self, task: Task, outcome: Outcome) -> None:
        self.folder.add(_csv_line(_cells(task, outcome)))

    def sort(self, tasks: Iterable[Task]) -> None:
        """Rewrites the file: these tasks in their order, then those of other starts."""
        found = self.outcomes()
        order = dict.fromkeys([*(task for task in tasks if task in found), *found])
        lines = [_csv_line(COLUMNS), *(_csv_line(_cells(task, found[task])) for task in order)]
        self.folder.write("sweep.csv", "".join(f"{line}\n" for line in lines).encode())


def mean_and_range(values: list[float]) -> str:
    """Accuracies in words: their mean, and the range of several; nothing of none."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# ---- helpers, not exported ----


def _cells(task: Task, outcome: Outcome) -> list:
    """A line of sweep.csv; `_parse` is the opposite."""
    choices = [""] * len(DEFAULTS) if task.kind == DENSE else task.combination.choices
    seed = "" if task.seed is None else task.seed
    pruned = "" if outcome.pruned is None else f"{outcome.pruned:.6f}"
    accuracy = "" if outcome.accuracy is None else f"{outcome.accuracy:.4f}"
    place = [task.kind, task.name, *choices, task.sparsity, seed, task.config]
    return [*place, pruned, accuracy, outcome.error]


def _parse(line: str) -> tuple[Task, Outcome]:
    """Raises ValueError for the header, and for a line that was not written whole."""
    row = next(csv.reader([line]), [])

    # Files from before sweeps crossed scores, patterns and schedules, or reconstructions
    if missing := {8: 4, 11: 1}.get(len(row)):
        row = [*row[: 6 - missing], *[""] * missing, *row[6 - missing :]]

    kind, name, *choices, sparsity, seed, config, pruned, accuracy, error = row
    choices = [choice or default for choice, default in zip(choices, DEFAULTS, strict=True)]
    task = Task(kind, name, float(sparsity), int(seed) if seed else None, config, *choices)
    outcome = Outcome(
        float(accuracy) if accuracy else None, float(pruned) if pruned else None, error
    )
    return task, outcome


def _csv_line(cells: Iterable) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
