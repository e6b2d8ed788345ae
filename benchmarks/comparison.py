"""The methods and settings that `compare.py` compares, and its results as tables and pictures."""

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import measure  # noqa: F401, it finds the modules of the project

from trainer.job_folder import JobFolder
from trainer.plots import png, sweep_lines
from trainer.sweep_table import DENSE, FINETUNED, ONE_SHOT, mean_and_range
from trainer.sweep_table import Task as Run

SEEDS = (0, 1, 2)
SPARSITIES = ("0.5", "0.8", "0.9", "0.95", "0.98")
GROUPS = ("2:4", "1:4")
LEVELS = (*SPARSITIES, *GROUPS)
UNPRUNED = "0"
TUNING = "tuning"
RANGES = "finetuned, with ranges"

#: By model the arguments of main.py for its shape; the second has DeiT-Tiny's depth and heads.
MODELS = {"sample": (), "tiny": ("--model-kwargs", "depth=12", "patch_size=7")}


class Method(NamedTuple):
    """A row of the tables.

    family: the picture in which it is drawn. choices: of a sweep's task. arguments: of main.py.
    """

    family: str
    choices: Mapping[str, str]
    levels: tuple[str, ...] = LEVELS
    arguments: tuple[str, ...] = ()


class Tuning(NamedTuple):
    """Levels share a learning rate: the best of `rates` at the first level of `tried` that exists.

    A level exists if the method has it.
    """

    levels: tuple[str, ...]
    tried: tuple[str, ...]
    rates: tuple[float, ...]


class World(NamedTuple):
    """The start of the training, and what all methods share.

    models: names in MODELS. images: those to train on, `sample` or `quarter`.
    """

    arguments: tuple[str, ...]
    models: tuple[str, ...]
    images: str
    epochs: int
    tunings: tuple[Tuning, ...]
    methods: Mapping[str, Method]

    def trials(self, method: str) -> dict[str, list[tuple[str, float]]]:
        """By level of a method the trials that choose its learning rate: a level and a rate."""
        levels = self.methods[method].levels
        tried = {
            tuning: next((level for level in tuning.tried if level in levels), None)
            for tuning in self.tunings
        }
        return {
            level: [(tried[tuning], rate) for rate in tuning.rates]
            for tuning in self.tunings
            for level in tuning.levels
            if level in levels
        }


OFTEN = ("--prune-every", "10")
AT_TIMES = ("--prune-every", "25")
ERK = {"name": "erk"}
LAMP = {"name": "lamp"}
RANDOM = {"name": "erk", "score": "random"}
WORLDS = {
    "finetuned": World(
        ("--config", "configs/run/sample.yaml"),
        ("sample", "tiny"),
        "sample",
        1,
        (
            Tuning(("0.5", "2:4"), ("2:4", "0.5"), (2e-4, 6e-4, 2e-3)),
            Tuning(("0.8",), ("0.8",), (2e-4, 6e-4, 2e-3)),
            Tuning(("0.9", "1:4"), ("0.9", "1:4"), (6e-4, 2e-3, 6e-3)),
            Tuning(("0.95", "0.98"), ("0.95",), (6e-4, 2e-3, 6e-3)),
        ),
        {
            "unif": Method("allocation", {"name": "unif"}),
            "erk": Method("allocation", ERK, SPARSITIES),
            "lamp": Method("allocation", LAMP, SPARSITIES),
            "glob": Method("allocation", {"name": "glob"}, SPARSITIES),
            "wanda": Method("score", {**ERK, "score": "wanda"}),
            "taylor": Method("score", {**ERK, "score": "taylor"}),
            "fisher": Method("score", {**ERK, "score": "fisher"}),
            "cap": Method("score", {"name": "cap", "score": "cap"}, SPARSITIES),
            "obs": Method("reconstruction", {**ERK, "reconstruct": "obs"}),
            "least-squares": Method("reconstruction", {**ERK, "reconstruct": "least-squares"}),
            "least-squares, teacher": Method(
                "reconstruction",
                {**ERK, "reconstruct": "least-squares"},
                arguments=("--dense-teacher", "1"),
            ),
            "gradual": Method("schedule", {**LAMP, "schedule": "gradual"}, arguments=OFTEN),
            "ste": Method("schedule", {**LAMP, "schedule": "ste"}, arguments=OFTEN),
            "rigl": Method("schedule", {**ERK, "schedule": "rigl"}, SPARSITIES, OFTEN),
            "sr-ste": Method("schedule", {"name": "unif", "schedule": "sr-ste"}, GROUPS, OFTEN),
            "maskllm": Method("schedule", {"name": "unif", "schedule": "maskllm"}, GROUPS),
        },
    ),
    "from scratch": World(
        ("--config", "configs/run/sample_dense.yaml"),
        ("tiny",),
        "quarter",
        4,
        (
            Tuning((UNPRUNED, "0.5", "0.8", "2:4"), (UNPRUNED, "0.8", "2:4"), (2.5e-3, 5e-3, 1e-2)),
            Tuning(("0.9", "0.95", "0.98", "1:4"), ("0.95", "1:4"), (5e-3, 1e-2, 2e-2, 4e-2)),
        ),
        {
            DENSE: Method("", {"name": "unif"}, (UNPRUNED,)),
            "static": Method("sparse training", RANDOM),
            "set": Method("sparse training", {**RANDOM, "schedule": "set"}, SPARSITIES, AT_TIMES),
            "rigl": Method("sparse training", {**RANDOM, "schedule": "rigl"}, SPARSITIES, AT_TIMES),
            "gmp": Method("sparse training", {**ERK, "schedule": "gradual"}, arguments=AT_TIMES),
            "ste": Method("sparse training", {**ERK, "schedule": "ste"}, arguments=OFTEN),
            "sr-ste": Method(
                "sparse training", {"name": "unif", "schedule": "sr-ste"}, GROUPS, OFTEN
            ),
        },
    ),
}

#: By family the method that its picture shows for comparison, and the name of that method there.
BASELINES = {
    "score": ("erk", "magnitude"),
    "reconstruction": ("erk", "none"),
    "schedule": ("lamp", "one-shot"),
}


class Task(NamedTuple):
    """One accuracy to measure: of a trial of a learning rate, or of a task of a sweep.

    kind: TUNING or a sweep's. rate: of a trial.
    """

    kind: str
    world: str
    model: str
    method: str = ""
    level: str = ""
    seed: int = 0
    rate: float | None = None

    @property
    def run(self) -> Run:
        """The same as a task of a sweep."""
        if self.kind == DENSE:
            return Run(DENSE)
        choices = {"sparsity": 0.0, **WORLDS[self.world].methods[self.method].choices}
        if self.level in GROUPS:
            choices |= {"name": "unif", "pattern": self.level}
        else:
            choices["sparsity"] = float(self.level)
        if self.kind == ONE_SHOT:
            return Run(ONE_SHOT, **choices)
        return Run(FINETUNED, seed=self.seed, **choices)

    def __str__(self) -> str:
        parts = [self.kind, self.world, self.model, self.method, self.level]
        rate = f", rate {self.rate:g}" if self.rate else ""
        return ", ".join(filter(None, parts)) + f", seed {self.seed}{rate}"


class Result(NamedTuple):
    """Top-1 in percent, the seconds that the work took, and the learning rate that was used."""

    accuracy: float
    seconds: float
    rate: float | None = None


def all_tasks() -> list[Task]:
    """Every accuracy, in the order in which they are measured: by model, then by seed."""
    tasks = []
    for name, world in WORLDS.items():
        for model in world.models:
            tasks += _tasks_of(name, model)
    return tasks


def _tasks_of(name: str, model: str) -> list[Task]:
    world = WORLDS[name]
    pruned = name == "finetuned"  # from a dense model
    tasks = []

    # The trials of learning rates, and accuracies right after pruning
    for method, setting in world.methods.items():
        trials = dict.fromkeys(sum(world.trials(method).values(), []))
        tasks += [Task(TUNING, name, model, method, level, rate=rate) for level, rate in trials]
        if pruned and "schedule" not in setting.choices and not setting.arguments:
            tasks += [Task(ONE_SHOT, name, model, method, level) for level in setting.levels]

    if pruned:
        tasks.append(Task(DENSE, name, model))
    for seed in SEEDS:
        for method, setting in world.methods.items():
            tasks += [Task(FINETUNED, name, model, method, level, seed) for level in setting.levels]
    return tasks


def rate_of(task: Task, results: Mapping[Task, Result]) -> float | None:
    """The learning rate of a finetuning: the best of its trials; None if a trial is missing."""
    trials = [
        task._replace(kind=TUNING, level=level, seed=0, rate=rate)
        for level, rate in WORLDS[task.world].trials(task.method)[task.level]
    ]
    if not all(trial in results for trial in trials):
        return None
    return max(trials, key=lambda trial: results[trial].accuracy).rate


class Results:
    """A CSV file with a line for each accuracy, which any process adds as it comes."""

    columns = (*Task._fields, "accuracy", "seconds")

    def __init__(self, path: Path):
        self.path = path
        self._folder = JobFolder(path.parent, path.name, header=",".join(self.columns))

    def read(self) -> dict[Task, Result]:
        return dict(self._folder.read(_parse))

    def add(self, task: Task, result: Result) -> None:
        text = io.StringIO()
        numbers = [result.rate or "", f"{result.accuracy:.2f}", f"{result.seconds:.0f}"]
        csv.writer(text, lineterminator="").writerow([*task[:-1], *numbers])
        self._folder.add(text.getvalue())


def _parse(line: str) -> tuple[Task, Result]:
    """Raises ValueError for the header, and for a line that was not written whole."""
    kind, world, model, method, level, seed, rate, accuracy, seconds = next(csv.reader([line]), [])
    rate = float(rate) if rate else None
    result = Result(float(accuracy), float(seconds), rate)
    of_trial = rate if kind == TUNING else None
    return Task(kind, world, model, method, level, int(seed), of_trial), result


def tables(results: Mapping[Task, Result]) -> dict[tuple[str, str, str], str]:
    """Markdown by world, model and kind (one-shot, finetuned, or RANGES): methods by level.

    A cell is the mean top-1 accuracy of all seeds, under RANGES that of finetuning with its range.
    """
    found = {}
    for world, setting in WORLDS.items():
        for model in setting.models:
            for kind in (ONE_SHOT, FINETUNED):
                if table := _table(results, kind, world, model, _mean):
                    found[world, model, kind] = table
            if table := _table(results, FINETUNED, world, model, mean_and_range):
                found[world, model, RANGES] = table
    return found


def _mean(values: list[float]) -> str:
    return f"{mean(values):.2f}" if values else ""


def _table(
    results: Mapping[Task, Result],
    kind: str,
    world: str,
    model: str,
    cell: Callable[[list[float]], str],
) -> str:
    methods = WORLDS[world].methods
    used = {level for method in methods.values() for level in method.levels}
    levels = [level for level in (UNPRUNED, *LEVELS) if level in used]

    rows = []
    for name, method in methods.items():
        cells = {
            level: values_of(results, kind, world, model, name, level) for level in method.levels
        }
        if any(cells.values()):
            texts = [cell(cells.get(level, [])) for level in levels]
            rows.append(f"| `{name}` | " + " | ".join(texts) + " |")
    if not rows:
        return ""

    head = "| top-1 in % | " + " | ".join(map(level_name, levels)) + " |"
    return "\n".join([head, "| --- |" + " ---: |" * len(levels), *rows])


def pictures(results: Mapping[Task, Result]) -> dict[str, bytes]:
    """By file name: accuracy against sparsity, the methods of a family in each."""
    found = {}
    for world, setting in WORLDS.items():
        families = dict.fromkeys(
            method.family for method in setting.methods.values() if method.family
        )
        for model in setting.models:
            for family in families:
                if picture := _picture(results, world, model, family):
                    found[f"compare_{model}_{family.replace(' ', '_')}.png"] = picture
    return found


def _picture(results: Mapping[Task, Result], world: str, model: str, family: str) -> bytes:
    setting = WORLDS[world]
    curves = _curves(results, world, model, family)
    if not curves:
        return b""

    # The line of the dense model
    dense = [
        result.accuracy
        for task, result in results.items()
        if task.kind != TUNING
        and (task.world, task.model) == (world, model)
        and DENSE in (task.kind, task.method)
    ]

    # How long, and how often
    lines = [points for kinds in curves.values() for points in kinds.values()]
    seeds = max(len(values) for points in lines for _, values in points)
    done = "finetuned" if world == "finetuned" else "trained"
    length = "an epoch" if setting.epochs == 1 else f"{setting.epochs} epochs"
    shown = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    finetuned = f"{done} for {length},\n{shown}"

    title = f"{model}, by {family}"
    return png(sweep_lines(curves, mean(dense) if dense else None, title, finetuned))


def _curves(
    results: Mapping[Task, Result], world: str, model: str, family: str
) -> dict[str, dict[str, list]]:
    """By method of a family, and by kind: the sparsities, each with the accuracies of all seeds."""
    curves = {}
    baseline, called = BASELINES.get(family, ("", ""))
    for name, method in WORLDS[world].methods.items():
        if method.family != family and name != baseline:
            continue

        kinds = {}
        for kind in (ONE_SHOT, FINETUNED):
            for level in SPARSITIES:
                if values := values_of(results, kind, world, model, name, level):
                    kinds.setdefault(kind, []).append((float(level), values))
        if kinds:
            curves[called if name == baseline else name] = kinds
    return curves


def values_of(results: Mapping[Task, Result], *place) -> list[float]:
    """The accuracies of all seeds. place: kind, world, model, method, level."""
    return [results[task].accuracy for seed in SEEDS if (task := Task(*place, seed)) in results]


def level_name(level: str) -> str:
    return level if level in GROUPS else f"{float(level):.0%}".replace("%", " %")
