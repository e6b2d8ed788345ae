"""What a comparison of methods consists of, and its results as tables and pictures.

`compare.py` and `real_size.py` define one each, and `bench.py` measures them.
"""

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

UNPRUNED = "0"
TUNING = "tuning"
RANGES = "finetuned, with ranges"

#: By family the method that its picture shows for comparison, and the name of that method there.
BASELINES = {
    "score": ("erk", "magnitude"),
    "reconstruction": ("erk", "none"),
    "schedule": ("lamp", "one-shot"),
}


class Level(NamedTuple):
    """How much is pruned, of what: `0.9`, `2:4`, or `block:4x1 0.5`.

    pattern: empty for the method's own. sparsity: None if the pattern has one itself.
    """

    pattern: str
    sparsity: float | None

    @classmethod
    def read(cls, text: str) -> "Level":
        pattern, _, sparsity = text.rpartition(" ")
        if not pattern and ":" in text:
            return cls(text, None)
        return cls(pattern, float(sparsity))

    def __str__(self) -> str:
        percent = "" if self.sparsity is None else f"{100 * self.sparsity:.0f} %"
        return " ".join(filter(None, [self.pattern, percent]))


class Method(NamedTuple):
    """A row of the tables.

    family: the picture in which it is drawn. choices: of a sweep's task. arguments: of main.py, for
    the training.
    """

    family: str
    choices: Mapping[str, str]
    levels: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    @property
    def only_trains(self) -> bool:
        """Whether it is another method right after pruning, and differs in the training alone."""
        return "schedule" in self.choices or bool(self.arguments)


class Tuning(NamedTuple):
    """Levels share a learning rate: the best of `rates` at the first level of `tried` that exists.

    A level exists if the method has it.
    """

    levels: tuple[str, ...]
    tried: tuple[str, ...]
    rates: tuple[float, ...]


class World(NamedTuple):
    """The start of the training, and what all methods share.

    models: by name the arguments of main.py for its shape. images: a name of those to train on.
    kinds: of accuracies; without that of a dense model, methods start from random weights.
    """

    arguments: tuple[str, ...]
    models: Mapping[str, tuple[str, ...]]
    images: str
    epochs: int
    tunings: tuple[Tuning, ...]
    methods: Mapping[str, Method]
    kinds: tuple[str, ...] = (DENSE, ONE_SHOT, FINETUNED)

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

    def __str__(self) -> str:
        parts = [self.kind, self.world, self.model, self.method, self.level]
        rate = f", rate {self.rate:g}" if self.rate else ""
        return ", ".join(filter(None, parts)) + f", seed {self.seed}{rate}"


class Result(NamedTuple):
    """Top-1 in percent, the seconds that the work took, and the learning rate that was used."""

    accuracy: float
    seconds: float
    rate: float | None = None


class Comparison:
    """Methods that are compared in one or several worlds.

    A subclass says where the results are, what is compared, and how models and images are made.
    """

    folder: Path
    worlds: Mapping[str, World]
    seeds: tuple[int, ...]
    levels: tuple[str, ...]  # in the order of the tables

    def needs(self, task: Task) -> dict[str, Callable[[], None]]:
        """By the name of a folder, what makes it: models and images, in this order."""
        raise NotImplementedError

    def arguments(self, task: Task) -> list[str]:
        """The arguments of a sweep, without the learning rate and the choices of the task."""
        raise NotImplementedError

    def method(self, task: Task) -> Method | None:
        return self.worlds[task.world].methods.get(task.method)

    def run(self, task: Task) -> Run:
        """The same as a task of a sweep."""
        if task.kind == DENSE:
            return Run(DENSE)

        level = Level.read(task.level)
        choices = {"sparsity": level.sparsity or 0.0, **self.method(task).choices}
        if level.pattern:
            choices["pattern"] = level.pattern
        if level.sparsity is None:
            choices["name"] = "unif"
        if task.kind == ONE_SHOT:
            return Run(ONE_SHOT, **choices)
        return Run(FINETUNED, seed=task.seed, **choices)

    def tasks(self) -> list[Task]:
        """Every accuracy, in the order in which they are measured: by model, then by seed."""
        return [
            task
            for name, world in self.worlds.items()
            for model in world.models
            for task in self._tasks_of(name, world, model)
        ]

    def _tasks_of(self, name: str, world: World, model: str) -> list[Task]:
        places = [
            (method, setting, level)
            for method, setting in world.methods.items()
            for level in setting.levels
        ]
        tasks = []
        if DENSE in world.kinds:
            tasks.append(Task(DENSE, name, model))
        if ONE_SHOT in world.kinds:
            tasks += [
                Task(ONE_SHOT, name, model, method, level)
                for method, setting, level in places
                if not setting.only_trains
            ]
        if FINETUNED not in world.kinds:
            return tasks

        # The trials of learning rates, then what they are for
        for method in world.methods:
            trials = dict.fromkeys(sum(world.trials(method).values(), []))
            tasks += [Task(TUNING, name, model, method, level, rate=rate) for level, rate in trials]
        for seed in self.seeds:
            tasks += [
                Task(FINETUNED, name, model, method, level, seed) for method, _, level in places
            ]
        return tasks

    def rate(self, task: Task, results: Mapping[Task, Result]) -> float | None:
        """The learning rate of a finetuning: the best of its trials; None if a trial is missing."""
        trials = [
            task._replace(kind=TUNING, level=level, seed=0, rate=rate)
            for level, rate in self.worlds[task.world].trials(task.method)[task.level]
        ]
        if not all(trial in results for trial in trials):
            return None
        return max(trials, key=lambda trial: results[trial].accuracy).rate

    def tables(self, results: Mapping[Task, Result]) -> dict[tuple[str, str, str], str]:
        """Markdown by world, model and kind (one-shot, finetuned, or RANGES): methods by level.

        A cell is the mean top-1 accuracy of all seeds, under RANGES that of finetuning with its
        range.
        """
        found = {}
        for world, setting in self.worlds.items():
            for model in setting.models:
                for kind in (ONE_SHOT, FINETUNED):
                    if table := self._table(results, kind, world, model, _mean):
                        found[world, model, kind] = table
                if table := self._table(results, FINETUNED, world, model, mean_and_range):
                    found[world, model, RANGES] = table
        return found

    def _table(
        self,
        results: Mapping[Task, Result],
        kind: str,
        world: str,
        model: str,
        cell: Callable[[list[float]], str],
    ) -> str:
        methods = self.worlds[world].methods
        used = {level for method in methods.values() for level in method.levels}
        levels = [level for level in self.levels if level in used]

        rows = []
        for name, method in methods.items():
            cells = {
                level: self.values(results, kind, world, model, name, level)
                for level in method.levels
            }
            if any(cells.values()):
                texts = [cell(cells.get(level, [])) for level in levels]
                rows.append(f"| `{name}` | " + " | ".join(texts) + " |")
        if not rows:
            return ""

        head = "| top-1 in % | " + " | ".join(str(Level.read(level)) for level in levels) + " |"
        return "\n".join([head, "| --- |" + " ---: |" * len(levels), *rows])

    def pictures(self, results: Mapping[Task, Result]) -> dict[str, bytes]:
        """By file name: accuracy against sparsity, the methods of a family in each."""
        found = {}
        for world, setting in self.worlds.items():
            families = dict.fromkeys(
                method.family for method in setting.methods.values() if method.family
            )
            for model in setting.models:
                for family in families:
                    if picture := self._picture(results, world, model, family):
                        found[f"compare_{model}_{family.replace(' ', '_')}.png"] = picture
        return found

    def _picture(
        self, results: Mapping[Task, Result], world: str, model: str, family: str
    ) -> bytes:
        setting = self.worlds[world]
        curves = self._curves(results, world, model, family)
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
        done = "finetuned" if DENSE in setting.kinds else "trained"
        length = "an epoch" if setting.epochs == 1 else f"{setting.epochs} epochs"
        shown = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
        finetuned = f"{done} for {length},\n{shown}"

        title = f"{model}, by {family}"
        return png(sweep_lines(curves, mean(dense) if dense else None, title, finetuned))

    def _curves(
        self, results: Mapping[Task, Result], world: str, model: str, family: str
    ) -> dict[str, dict[str, list]]:
        """By method of a family, and by kind: sparsities, each with the accuracies of all seeds."""
        curves = {}
        baseline, called = BASELINES.get(family, ("", ""))
        read = {level: Level.read(level) for level in self.levels if level != UNPRUNED}
        sparsities = {level: place.sparsity for level, place in read.items() if not place.pattern}
        for name, method in self.worlds[world].methods.items():
            if method.family != family and name != baseline:
                continue

            kinds = {}
            for kind in (ONE_SHOT, FINETUNED):
                for level, sparsity in sparsities.items():
                    if values := self.values(results, kind, world, model, name, level):
                        kinds.setdefault(kind, []).append((sparsity, values))
            if kinds:
                curves[called if name == baseline else name] = kinds
        return curves

    def values(self, results: Mapping[Task, Result], *place) -> list[float]:
        """The accuracies of all seeds. place: kind, world, model, method, level."""
        tasks = [Task(*place, seed) for seed in self.seeds]
        return [results[task].accuracy for task in tasks if task in results]


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


def _mean(values: list[float]) -> str:
    return f"{mean(values):.2f}" if values else ""
