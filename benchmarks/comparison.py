"""What `compare.py` compares, and its results as tables and pictures."""

import csv
import io
from collections.abc import Mapping
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
UNPRUNED, TUNING = "0", "tuning"

#: By model the arguments of main.py for its shape; the second has DeiT-Tiny's depth and heads.
MODELS = {"sample": (), "tiny": ("--model-kwargs", "depth=12", "patch_size=7")}


class Method(NamedTuple):
    """A row of the tables.

    family: in whose picture it is. choices: of a sweep's task. arguments: of main.py.
    """

    family: str
    choices: Mapping[str, str]
    levels: tuple[str, ...] = LEVELS
    arguments: tuple[str, ...] = ()


class Tuning(NamedTuple):
    """How levels get the learning rate that they share: the best of `rates` at the first of `tried`
    that there is.
    """

    levels: tuple[str, ...]
    tried: tuple[str, ...]
    rates: tuple[float, ...]


class World(NamedTuple):
    """Where the training starts, and what is alike for all methods.

    models: those of MODELS that take part. images: to train on, of those that are not held out:
    `sample`, or `quarter`.
    """

    arguments: tuple[str, ...]
    models: tuple[str, ...]
    images: str
    epochs: int
    tunings: tuple[Tuning, ...]
    methods: Mapping[str, Method]

    def trials(self, method: str) -> dict[str, list[tuple[str, float]]]:
        """By level of a method the trials that its rate is the best of: a level and a rate."""
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


OFTEN, AT_TIMES = ("--prune-every", "10"), ("--prune-every", "25")
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

#: By family the method that it is drawn beside, and what that is called there.
BASELINES = {
    "score": ("erk", "magnitude"),
    "reconstruction": ("erk", "none"),
    "schedule": ("lamp", "one-shot"),
}


class Task(NamedTuple):
    """One accuracy to measure: of a trial (`kind` is TUNING), or as a sweep has it. rate: of a
    trial.
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
        """The same as a sweep has it."""
        if self.kind == DENSE:
            return Run(DENSE)
        choices = {
            "sparsity": float(self.level) if self.level not in GROUPS else 0.0,
            **WORLDS[self.world].methods[self.method].choices,
        }
        if self.level in GROUPS:
            choices |= {"name": "unif", "pattern": self.level}
        return (
            Run(ONE_SHOT, **choices)
            if self.kind == ONE_SHOT
            else Run(FINETUNED, seed=self.seed, **choices)
        )

    def __str__(self) -> str:
        rate = f", rate {self.rate:g}" if self.rate else ""
        return (
            ", ".join(filter(None, (self.kind, self.world, self.model, self.method, self.level)))
            + f", seed {self.seed}{rate}"
        )


class Result(NamedTuple):
    """Top-1 in percent, the seconds that the work took, and the learning rate that was used."""

    accuracy: float
    seconds: float
    rate: float | None = None


def all_tasks() -> list[Task]:
    """Every accuracy, in the order in which they are measured: one model after another, one seed
    after another.
    """
    tasks = []
    for place in [(name, model) for name, world in WORLDS.items() for model in world.models]:
        world = WORLDS[place[0]]
        for name, method in world.methods.items():
            tasks += [
                Task(TUNING, *place, name, level, rate=rate)
                for level, rate in dict.fromkeys(sum(world.trials(name).values(), []))
            ]
            if (
                place[0] == "finetuned"
                and "schedule" not in method.choices
                and not method.arguments
            ):
                tasks += [Task(ONE_SHOT, *place, name, level) for level in method.levels]
        tasks += [Task(DENSE, *place)] * (place[0] == "finetuned")
        tasks += [
            Task(FINETUNED, *place, name, level, seed)
            for seed in SEEDS
            for name, method in world.methods.items()
            for level in method.levels
        ]
    return tasks


def rate_of(task: Task, results: Mapping[Task, Result]) -> float | None:
    """The learning rate of a finetuning: the best of its trials on the held-out images; None where
    trials lack.
    """
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
    """Top-1 in Markdown by world, model and kind (one-shot or finetuned): methods by level, mean
    and range.
    """
    found = {}
    for world, setting in WORLDS.items():
        levels = [
            level
            for level in (UNPRUNED, *LEVELS)
            if any(level in method.levels for method in setting.methods.values())
        ]
        for model in setting.models:
            for kind in (ONE_SHOT, FINETUNED):
                rows = []
                for name, method in setting.methods.items():
                    cells = {
                        level: values_of(results, kind, world, model, name, level)
                        for level in method.levels
                    }
                    if any(cells.values()):
                        texts = [mean_and_range(cells.get(level, [])) for level in levels]
                        rows.append(f"| `{name}` | " + " | ".join(texts) + " |")
                if rows:
                    head = "| top-1 in % | " + " | ".join(map(level_name, levels)) + " |"
                    found[world, model, kind] = "\n".join(
                        [head, "| --- |" + " ---: |" * len(levels), *rows]
                    )
    return found


def pictures(results: Mapping[Task, Result]) -> dict[str, bytes]:
    """By file name: accuracy against sparsity, the methods of a family in each."""
    found = {}
    for world, setting in WORLDS.items():
        families = dict.fromkeys(
            method.family for method in setting.methods.values() if method.family
        )
        for model, family in ((model, family) for model in setting.models for family in families):
            curves = {}
            baseline, called = BASELINES.get(family, ("", ""))
            for name, method in setting.methods.items():
                if method.family != family and name != baseline:
                    continue
                kinds = {
                    kind: [
                        (float(level), values)
                        for level in SPARSITIES
                        if (values := values_of(results, kind, world, model, name, level))
                    ]
                    for kind in (ONE_SHOT, FINETUNED)
                }
                if kinds := {kind: points for kind, points in kinds.items() if points}:
                    curves[called if name == baseline else name] = kinds
            if curves:
                dense = [
                    result.accuracy
                    for task, result in results.items()
                    if task.kind != TUNING
                    and (task.world, task.model) == (world, model)
                    and DENSE in (task.kind, task.method)
                ]
                seeds = max(
                    len(values)
                    for kinds in curves.values()
                    for _, values in sum(kinds.values(), [])
                )
                length = "an epoch" if setting.epochs == 1 else f"{setting.epochs} epochs"
                title = f"{'finetuned' if world == 'finetuned' else 'trained'} for {length},\n"
                title += f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
                figure = sweep_lines(
                    curves, mean(dense) if dense else None, f"{model}, by {family}", title
                )
                found[f"compare_{model}_{family.replace(' ', '_')}.png"] = png(figure)
    return found


def values_of(results: Mapping[Task, Result], *place) -> list[float]:
    """The accuracies of all seeds. place: kind, world, model, method, level."""
    return [results[task].accuracy for seed in SEEDS if (task := Task(*place, seed)) in results]


def level_name(level: str) -> str:
    return level if level in GROUPS else f"{float(level):.0%}".replace("%", " %")
