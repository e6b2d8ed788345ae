"""Finds the levels of all layers that lose least under a budget, and writes them as a custom YAML.

    python search.py --budget 0.5 --budget-of macs --levels 1:4 2:4 4:4
    python search.py --budget 0.5 --levels dense 0.5 2:4 0.8 --model deit_small_patch16_224
    --data-path IMAGENET python search.py --budget 0.4 --space configs/space.yaml

Takes any argument of main.py for the model and the data beside its own. The budget is the share
that is kept. Each layer is pruned at each of its levels, by Optimal Brain Surgeon on calibration
images or, with `--reconstruct none`, by magnitude alone; what that loses is measured; the choice of
least total loss is found exactly; and pairs of layers exchange a level where the whole model's
predictions then come closer to the dense ones. What is measured stays in `--output_dir`: killed and
started again, it goes on.
"""

import argparse
import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path

import torch

import utils
from sparsity_factory import (
    Kept,
    LayerSparsity,
    Masks,
    Statistics,
    compute_masks,
    multiply_adds,
    prunable_weights,
    sparse_kernels,
    sparsity_yaml,
)
from sparsity_factory.custom_yaml import resolve_choices
from sparsity_factory.knapsack import cheapest
from sparsity_factory.levels import MEASURES, Divergence, Pruned, at_levels, exchanges
from sparsity_factory.multiply_adds import ATTENTION
from sparsity_factory.pruners import mask_at
from sparsity_factory.scores import Layer, Scores
from trainer import plots
from trainer.arguments import FREE, REFUSED, get_args_parser, given, parse_args
from trainer.builders import build_loaders, load_start, prepare_model
from trainer.calibration_images import Calibration
from trainer.exit_status import exit_status
from trainer.run_folder import RunFolder
from trainer.stop_signals import Stopped, StopSignals
from utils import Compute, UserError, log

BUDGETS = ("weights", "macs", "latency")
# Of the calibration images, on which predictions are compared with the dense ones
TRIAL_IMAGES = 256


def search(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    options, args = parse_search_args(argv)
    utils.show_progress(args.quiet)
    compute = Compute.choose(args.device, args.amp)
    utils.seed_everything(utils.INIT, args.seed)
    with StopSignals() as stop:
        try:
            *_, num_classes = build_loaders(args, compute.device)
            args, checkpoint = load_start(args)
            model = prepare_model(args, num_classes, checkpoint, compute.device).eval()
            space = Space.of(options, model)
            record = Record(options, args, space)
            calibration = Calibration(args, model, compute)
            costs, budget, reached = price(options, args, space, model, calibration, record)
            record.open()
            bench = Bench(options, space, model, calibration, record, stop)
            chosen = solve(options, bench, costs, budget)
        except Stopped as stopped:
            stopped.args = (
                f"stopped by {stopped.name}; the same command goes on in {options.output_dir}",
            )
            raise
    kept = space.rows(chosen)
    command = shlex.join(
        [
            "python",
            "main.py",
            *options.others,
            "--pruner",
            "custom",
            "--custom-config",
            str(Path(options.output_dir, "search.yaml")),
            "--reconstruct",
            options.reconstruct,
        ]
    )
    write_results(
        options, args, chosen, kept, bench, reached(chosen), command, utils.versions(compute.device)
    )
    record.finish()
    print(f"To use it: {command}")
    return 0


def parse_search_args(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The search's options, and main.py's arguments for model and data. Raises UserError."""
    parser = _Parser(
        "search.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--budget", type=float, required=True, metavar="SHARE", help="what is kept, in (0, 1]"
    )
    parser.add_argument(
        "--budget-of",
        choices=BUDGETS,
        default="weights",
        help="of the prunable weights; of their multiply-adds and the attention products'; or of "
        "the "
        "time of the layers, as measured with sparse kernels",
    )
    parser.add_argument(
        "--levels",
        nargs="+",
        metavar="LEVEL",
        help="among which each layer chooses: n:m, sparsities in [0, 1), dense; by default 1:4 2:4 "
        "4:4",
    )
    parser.add_argument(
        "--space",
        metavar="FILE",
        help="YAML file with choices for each weight, in place of --levels",
    )
    parser.add_argument(
        "--measure", choices=list(MEASURES), default="kfac", help="what a layer loses"
    )
    parser.add_argument(
        "--reconstruct",
        choices=["obs", "none"],
        default="obs",
        help="whether a layer's other weights make up for what goes; the run must do the same",
    )
    parser.add_argument(
        "--exchanges",
        type=int,
        default=20,
        metavar="N",
        help="how many exchanges of levels between two layers are measured; 0 for none",
    )
    parser.add_argument(
        "--output_dir", default="output/search", metavar="DIR", help="where the results go"
    )
    options, options.others = parser.parse_known_args(argv)
    options.command = shlex.join(["python", "search.py", *argv])
    given_here = given(options.others)
    for action in get_args_parser()._actions:
        if getattr(action, "sweep", None) == REFUSED and action.dest in given_here:
            raise UserError(f"{action.option_strings[0]}: not with a search")
    if not 0 < options.budget <= 1:
        raise UserError(f"--budget {options.budget}: expected the share that is kept, in (0, 1]")
    if options.exchanges < 0:
        raise UserError(f"--exchanges {options.exchanges}: expected a number of at least 0")
    if options.levels and options.space:
        raise UserError("--space: not together with --levels")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("search.py: expected one process, without torchrun")
    return options, parse_args(
        [*options.others, "--output_dir", options.output_dir], one_recipe=False
    )


@dataclass(frozen=True)
class Space:
    """Among which levels each layer chooses: by weight and text of a level what is kept, a number
    or (n, m).
    """

    shapes: Mapping[str, tuple[int, int]]
    levels: Mapping[str, Mapping[str, int | tuple[int, int]]]

    @classmethod
    def of(cls, options, model: torch.nn.Module) -> "Space":
        """Raises PruningError for levels that there are not, or that do not fit the model."""
        shapes = {name: tuple(weight.shape) for name, weight in prunable_weights(model).items()}
        if options.space:
            return cls(shapes, resolve_choices(options.space, shapes))
        levels = [_number(text) for text in options.levels or ("1:4", "2:4", "4:4")]
        config = {"sparsity": {"mode": "nxm", "choices": {"default": levels}}}
        return cls(shapes, resolve_choices(config, shapes, "--levels"))

    @property
    def texts(self) -> list[str]:
        """All levels, in the order in which they were given."""
        return list(dict.fromkeys(text for levels in self.levels.values() for text in levels))

    def kept(self, name: str, level: str) -> int:
        """How many weights a layer keeps at a level."""
        amount = self.levels[name][level]
        total = prod(self.shapes[name])
        return total * amount[0] // amount[1] if isinstance(amount, tuple) else amount

    def rows(self, chosen: Mapping[str, str]) -> Kept:
        """What a choice of levels keeps of the prunable weights."""

        def pattern(name, level):
            return level if ":" in level or level == "dense" else "unstructured"

        layers = [
            LayerSparsity(
                name,
                self.shapes[name],
                self.kept(name, level),
                prod(self.shapes[name]),
                pattern(name, level),
            )
            for name, level in chosen.items()
        ]
        total = LayerSparsity(
            "prunable weights",
            (),
            sum(row.kept for row in layers),
            sum(row.total for row in layers),
        )
        return Kept(layers, prunable=total, whole=total)


def price(options, args, space: Space, model, calibration: Calibration, record: "Record"):
    """What each level of each layer costs, in whole numbers; the budget in them; and the share that
    a choice reaches.

    Raises UserError for a budget that no choice meets, and where no time can be measured.
    """
    fixed, unit = 0.0, 1.0
    if options.budget_of == "latency":
        record.open()  # what is measured is kept
        seconds = measure_times(args, space, model, calibration, record)
        whole = sum(max(times.values()) for times in seconds.values())
        unit = 1e9
        costs = seconds
    else:
        dense = {name: prod(shape) for name, shape in space.shapes.items()}
        if options.budget_of == "macs":
            size = args.input_size
            dense = multiply_adds(
                model, torch.zeros(1, 3, size, size, device=calibration.compute.device)
            )
            fixed = dense[ATTENTION]
        costs = {
            name: {
                level: dense[name] * space.kept(name, level) / prod(space.shapes[name])
                for level in levels
            }
            for name, levels in space.levels.items()
        }
        whole = fixed + sum(dense[name] for name in space.shapes)
    least, most = (
        (fixed + sum(pick(levels.values()) for levels in costs.values())) / whole
        for pick in (min, max)
    )
    if options.budget < least - 1e-9:
        raise UserError(
            f"--budget {options.budget:g} of the {options.budget_of}: the levels reach {least:.4f} "
            "to "
            f"{most:.4f}; expected at least {least:.4f}"
        )
    if options.budget > most:
        log(
            f"--budget {options.budget:g} of the {options.budget_of}: the levels reach {most:.4f} "
            "at most"
        )

    def reached(chosen: Mapping[str, str]) -> float:
        return (fixed + sum(costs[name][level] for name, level in chosen.items())) / whole

    whole_costs = [[round(unit * cost) for cost in levels.values()] for levels in costs.values()]
    budget = int(unit * (options.budget * whole - fixed) + 1e-6)
    return whole_costs, max(budget, sum(map(min, whole_costs))), reached


def measure_times(
    args, space: Space, model, calibration: Calibration, record: "Record"
) -> dict[str, dict[str, float]]:
    """The seconds of each layer at each level on a batch, with the kernel that is quickest, or
    dense.

    Raises UserError where no layer is quicker at any level.
    """
    images = torch.randn(
        args.batch_size, 3, args.input_size, args.input_size, device=calibration.compute.device
    )
    ratios, dense = {}, {}
    for level in (text for text in space.texts if text != "dense"):
        if level not in record.times:
            log(f"Measuring the layers at {level}")
            own = {name: _number(level) for name, levels in space.levels.items() if level in levels}
            config = {"sparsity": {"mode": "nxm", "level": {"default": "dense", **own}}}
            state = {name: value.clone() for name, value in model.state_dict().items()}
            Masks(model, compute_masks(model, "custom", custom_config=config))
            with calibration.compute.autocast():
                _, report = sparse_kernels(model, images)
            model.load_state_dict(state)
            record.add(
                times={
                    level: {
                        layer.name: [layer.seconds["dense"], layer.seconds[layer.kernel]]
                        for layer in report.layers
                        if layer.seconds
                    }
                }
            )
        for name, (before, after) in record.times[level].items():
            dense[name] = min(before, dense.get(name, before))
            ratios[name, level] = after / before
    if not any(ratio < 1 for ratio in ratios.values()):
        raise UserError(
            "--budget-of latency: no layer is quicker at any of the levels with a kernel that runs "
            "here; "
            "expected --budget-of macs or weights"
        )
    return {
        name: {level: dense.get(name, 0.0) * ratios.get((name, level), 1.0) for level in levels}
        for name, levels in space.levels.items()
    }


class Bench:
    """What layers lose at their levels, measured where it is not known already.

    options: of the command line, with the measure and whether the other weights of a layer make up.

    losses: by weight and level.
    """

    def __init__(
        self,
        options,
        space: Space,
        model,
        calibration: Calibration,
        record: "Record",
        stop: StopSignals,
    ):
        self.space = space
        self.record = record
        self.stop = stop
        self._weights = prunable_weights(model)
        self._measure = MEASURES[options.measure]
        self._pruned = {}
        self._magnitudes = Scores(self._weights) if options.reconstruct == "none" else None
        batches = list(
            islice(
                calibration.loader, -(-TRIAL_IMAGES // calibration.loader.batch_sampler.batch_size)
            )
        )
        self._divergence = Divergence(model, batches, calibration.compute.autocast())
        self._statistics = self._collect(model, calibration)
        logger = utils.MetricLogger()
        for name in logger.log_every(list(space.levels), 12, "Layer:"):
            for level in space.levels[name]:
                if level not in record.losses.get(name, {}):
                    record.add(loss=[name, level, self._measure(self.pruned(name, level))])
                stop.check_alone()
        self.losses = {
            name: {level: record.losses[name][level] for level in levels}
            for name, levels in space.levels.items()
        }

    def pruned(self, name: str, level: str) -> Pruned:
        """A layer at a level."""
        if (name, level) not in self._pruned:
            layer = Layer(name, statistics=self._statistics, device=self._weights[name].device)
            mask_of = partial(mask_at, self._magnitudes, name) if self._magnitudes else None
            (self._pruned[name, level],) = at_levels(
                self._weights[name].detach(),
                layer,
                [self.space.levels[name][level]],
                divergence=self._divergence,
                mask_of=mask_of,
            )
        return self._pruned[name, level]

    def divergence(self, chosen: Mapping[str, str]) -> float:
        """How far the predictions of the model with these levels are from the dense ones, in nats
        an image.
        """
        key = " ".join(chosen.values())
        if key not in self.record.divergences:
            self.stop.check_alone()
            new = {
                name: self.pruned(name, level).new
                for name, level in chosen.items()
                if level != "dense"
            }
            self.record.add(divergence=[key, self._divergence(new)])
        return self.record.divergences[key]

    def _collect(self, model, calibration: Calibration) -> Statistics:
        if self.record.statistics.exists():
            statistics = Statistics(self._weights, self._measure.needs)
            statistics.load_state_dict(torch.load(self.record.statistics, weights_only=True))
            return statistics
        statistics = calibration(self._measure.needs)
        utils.write_atomically(
            self.record.statistics, lambda file: torch.save(statistics.state_dict(), file)
        )
        return statistics


def solve(options, bench: Bench, costs: list[list[int]], budget: int) -> dict[str, str]:
    """The level of each layer: the choice of least total loss, then better by exchanges that are
    measured.
    """
    losses = [list(levels.values()) for levels in bench.losses.values()]
    levels = [list(found) for found in bench.losses.values()]

    def named(chosen) -> dict[str, str]:
        return {
            name: found[option]
            for name, found, option in zip(bench.losses, levels, chosen, strict=True)
        }

    chosen = cheapest(costs, losses, budget)
    if options.exchanges:
        first = chosen
        log(f"Measuring up to {options.exchanges} exchanges between two layers")
        chosen = exchanges(
            first,
            costs,
            losses,
            budget,
            lambda choice: bench.divergence(named(choice)),
            options.exchanges,
        )
        log(
            f"Divergence from the dense predictions: {bench.divergence(named(first)):.5f} nats as "
            "solved, "
            f"{bench.divergence(named(chosen)):.5f} after the exchanges"
        )
    return named(chosen)


class Record:
    """The folder of a search: its arguments, and what is measured as it comes.

    losses, times, divergences: what was measured. statistics: a file that is there until the search
    is done.
    """

    def __init__(self, options, args, space: Space):
        """Raises UserError when the folder holds a search with other arguments."""
        self.folder = Path(options.output_dir)
        self._lock = None
        self._settings_path = self.folder / "search.json"
        self._path = self.folder / "measured.jsonl"
        self.statistics = self.folder / "statistics.pth"
        self.losses = {}
        self.times = {}
        self.divergences = {}
        shared = {
            action.dest
            for action in get_args_parser()._actions
            if getattr(action, "sweep", FREE) != FREE
        }
        own = {
            name: getattr(options, name)
            for name in ("budget", "budget_of", "measure", "reconstruct", "exchanges")
        }
        settings = {
            **{name: value for name, value in vars(args).items() if name in shared},
            **own,
            "levels": space.levels,
        }
        self._settings = json.loads(json.dumps(settings))
        if not self._settings_path.exists():
            return
        try:
            theirs = json.loads(self._settings_path.read_text(encoding="utf-8"))
            lines = (
                self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            )
        except (OSError, ValueError):
            raise UserError(
                f"--output_dir {self.folder}: its search.json cannot be read; choose another folder"
            ) from None
        for name, ours in self._settings.items():
            if theirs.get(name, get_args_parser().get_default(name)) != ours:
                told = f"--{name.replace('_', '-')} {theirs.get(name)}, not {ours}"
                told = "other levels" if name == "levels" else told
                raise UserError(
                    f"--output_dir {self.folder}: holds a search with {told}; choose another folder"
                )
        for line in lines:
            try:
                self._take(**json.loads(line))
            except (TypeError, ValueError):  # half a line
                continue

    def open(self) -> None:
        """Makes and locks the folder."""
        if not self._lock:
            self._lock = RunFolder(str(self.folder))
            content = json.dumps(self._settings, indent=1).encode()
            utils.write_atomically(self._settings_path, lambda file: file.write(content))

    def add(self, **measured) -> None:
        self._take(**measured)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(measured)}\n")  # after half a line, too
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise utils.WriteError(f"{self._path}: cannot be written ({error.strerror})") from None

    def finish(self) -> None:
        self.statistics.unlink(missing_ok=True)

    def _take(self, loss=None, times=None, divergence=None) -> None:
        if loss:
            self.losses.setdefault(loss[0], {})[loss[1]] = loss[2]
        if divergence:
            self.divergences[divergence[0]] = divergence[1]
        self.times |= times or {}


def write_results(
    options,
    args,
    chosen: Mapping[str, str],
    kept: Kept,
    bench: Bench,
    reached: float,
    command: str,
    facts: str,
) -> None:
    """search.yaml, search.csv, search.png, and search.md with all of it; prints what was found."""
    of = {"macs": "the multiply-adds", "latency": "the time"}.get(options.budget_of)
    text = (
        f"{reached:.2%} of {of} and " if of else ""
    ) + f"{1 - kept.prunable.sparsity:.2%} of the weights kept"
    write = {"search.yaml": sparsity_yaml(kept, f"{options.command}\n{text}").encode()}
    table, texts = io.StringIO(), bench.space.texts
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(
        ["layer", "shape", "level", "kept", "total", *(f"loss at {level}" for level in texts)]
    )
    lines = [
        "| layer | level | kept | " + " | ".join(f"loss at {level}" for level in texts) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(texts),
    ]
    for row, level in zip(kept.layers, chosen.values(), strict=True):
        losses = [bench.losses[row.name].get(text) for text in texts]
        writer.writerow(
            [
                row.name,
                "x".join(map(str, row.shape)),
                level,
                row.kept,
                row.total,
                *("" if loss is None else f"{loss:.6g}" for loss in losses),
            ]
        )
        lines.append(
            f"| `{row.name}` | {level} | {1 - row.sparsity:.2%} | "
            + " | ".join("" if loss is None else f"{loss:.3g}" for loss in losses)
            + " |"
        )
    write["search.csv"] = table.getvalue().encode()
    shares = {
        row.name: (level, 1 - row.sparsity)
        for row, level in zip(kept.layers, chosen.values(), strict=True)
    }
    write["search.png"] = plots.png(plots.level_map(shares, f"{args.model}, {text}"))
    write["search.md"] = "\n\n".join(
        [
            f"# {args.model}, levels under a budget",
            f"    {options.command}",
            f"{text}, by `{options.measure}`.",
            f"    {command}",
            "\n".join(lines),
            "![The level of each layer](search.png)",
            f"- versions: {facts}",
        ]
    ).encode()
    for name, content in write.items():
        utils.write_atomically(
            Path(options.output_dir, name), lambda file, content=content: file.write(content)
        )
    print(f"{text}: written to {options.output_dir}: {', '.join(sorted(write))}")


# ---- helpers, not exported ----


def _number(text: str) -> float | str:
    """A level of the command line as a YAML file has it."""
    try:
        return float(text)
    except ValueError:
        return text


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: search(sys.argv[1:])))
