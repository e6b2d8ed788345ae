"""Finds the levels of all layers that lose least under a budget, and writes them as a custom YAML.

    python search.py --budget 0.5 --budget-of macs --levels 1:4 2:4 4:4
    python search.py --budget 0.5 --levels dense 0.5 2:4 0.8 --data-path IMAGENET
    python search.py --budget 0.4 --space configs/space.yaml

Takes the arguments of main.py for the model and the data as well as its own. The budget is the
share that is kept.

Each layer is pruned at each of its levels, by Optimal Brain Surgeon on calibration images or, with
`--reconstruct none`, by magnitude alone, and the loss of that is measured. The choice of least
total loss is found exactly. Then pairs of layers exchange a level if the predictions of the whole
model come closer to the dense ones. Measurements stay in `--output_dir`: killed and started again,
the search measures only what is missing.
"""

import argparse
import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path

import torch

import utils
from sparsity_factory import (
    RECONSTRUCTIONS,
    Kept,
    LayerSparsity,
    Masks,
    Statistics,
    choose_layers,
    compute_masks,
    multiply_adds,
    prunable_weights,
    sparse_kernels,
    sparsity_yaml,
)
from sparsity_factory.custom_yaml import resolve_choices
from sparsity_factory.knapsack import cheapest
from sparsity_factory.levels import MEASURES, Divergence, Pruned, at_levels, exchanges
from sparsity_factory.method import check_method_options, options_of
from sparsity_factory.multiply_adds import ATTENTION
from sparsity_factory.pruners import mask_at
from sparsity_factory.scores import Layer, Scores
from trainer import plots
from trainer.arguments import given, method_options, parse_args, refused_flags
from trainer.builders import build_loaders, choose_compute, load_start, prepare_model
from trainer.calibration_images import Calibration
from trainer.exit_status import exit_status
from trainer.job_folder import JobFolder
from trainer.parser import Parser
from trainer.stop_signals import Stopped, StopSignals
from utils import Compute, UserError, log

BUDGETS = ("weights", "macs", "latency")
#: Calibration images on which predictions are compared with the dense ones.
TRIAL_IMAGES = 256


def search(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    options, args = parse_search_args(argv)
    utils.show_progress(args.quiet)
    compute = choose_compute(args)
    utils.seed_everything(utils.INIT, args.seed)

    with StopSignals() as stop:
        try:
            args, checkpoint = load_start(args)
            loaders = build_loaders(args, compute.device)
            model = prepare_model(args, loaders.num_classes, checkpoint, compute.device).eval()
            if args.layers:
                choose_layers(model, args.layers)
            if any(weight.dim() != 2 for weight in prunable_weights(model).values()):
                raise UserError("--layers: expected linear layers alone, without convolutions")

            space = Space.of(options, model)
            record = Record(options, args, space)
            calibration = Calibration(args, model, compute, training_images=loaders.training_images)
            prices = price(options, args, space, model, calibration, record)
            record.open()
            bench = Bench(options, space, model, calibration, record, stop)
            chosen = solve(options, bench, prices)
        except Stopped as stopped:
            stopped.args = (
                f"stopped by {stopped.name}; the same command resumes in {options.output_dir}",
            )
            raise

    write_results(options, args.model, chosen, prices, bench, record, compute)
    record.finish()
    print(f"To use it: {command_to_use(options)}")
    return 0


def parse_search_args(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The search's options, and main.py's arguments for model and data. Raises UserError."""
    options, options.others = search_parser().parse_known_args(argv)
    options.command = shlex.join(["python", "search.py", *argv])
    if flags := refused_flags(given(options.others)):
        raise UserError(f"{flags[0]}: not with a search")

    if not 0 < options.budget <= 1:
        raise UserError(f"--budget {options.budget}: expected the share that is kept, in (0, 1]")
    if options.exchanges < 0:
        raise UserError(f"--exchanges {options.exchanges}: expected a number of at least 0")
    if options.levels and options.space:
        raise UserError("--space: not together with --levels")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("search.py: expected one process, without torchrun")

    args = parse_args([*options.others, "--output_dir", options.output_dir], one_recipe=False)
    if args.num_classes == 0:
        raise UserError("--num-classes 0: not with a search, which compares predictions of classes")
    numbers = method_options(args.method_options) or {}
    known = options_of(RECONSTRUCTIONS, options.reconstruct)
    check_method_options(numbers, known, flags=True)
    options.of_obs = {known[name].parameter: value for name, value in numbers.items()}
    return options, args


# fmt: off


def search_parser() -> Parser:
    parser = Parser("search.py", __doc__, allow_abbrev=False)
    add = parser.add_argument

    # The budget, and the choices
    add("--budget", type=float, required=True, metavar="SHARE", help="what is kept, in (0, 1]")
    add("--budget-of", choices=BUDGETS, default="weights",
        help="of the prunable weights; of their multiply-adds and the attention products'; or of "
             "the time of the layers, as measured with sparse kernels")
    add("--levels", nargs="+", metavar="LEVEL",
        help="what each layer chooses from: n:m, sparsities in [0, 1), dense; by default 1:4 2:4 "
             "4:4")
    add("--space", metavar="FILE",
        help="YAML file with choices for each weight, in place of --levels")

    # How choices are compared
    add("--measure", choices=list(MEASURES), default="kfac", help="the loss of a layer")
    add("--reconstruct", choices=["obs", "none"], default="obs",
        help="how the other weights of a layer make up for the pruned ones; the run must do the "
             "same")
    add("--exchanges", type=int, default=20, metavar="N",
        help="how many exchanges of levels between two layers are measured; 0 for none")

    add("--output_dir", default="output/search", metavar="DIR", help="folder for the results")
    return parser


# fmt: on


@dataclass(frozen=True)
class Space:
    """The levels that each layer chooses from.

    shapes: of each weight. levels: by weight, then by text of a level, what it keeps: how many
    weights, or (n, m).
    """

    shapes: Mapping[str, tuple[int, int]]
    levels: Mapping[str, Mapping[str, int | tuple[int, int]]]

    @classmethod
    def of(cls, options, model: torch.nn.Module) -> "Space":
        """Raises PruningError for levels that do not exist, or do not fit the model."""
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

        layers = []
        for name, level in chosen.items():
            shape = self.shapes[name]
            pattern = level if ":" in level or level == "dense" else "unstructured"
            kept = self.kept(name, level)
            layers.append(LayerSparsity(name, shape, kept, prod(shape), pattern))

        kept = sum(row.kept for row in layers)
        total = LayerSparsity("prunable weights", (), kept, sum(row.total for row in layers))
        return Kept(layers, prunable=total, whole=total)


@dataclass(frozen=True)
class Prices:
    """What the levels cost, in one unit: multiply-adds, seconds or weights.

    costs: of each level, by layer. fixed: of what no choice changes. whole: of the dense model.
    budget: the share of `whole` that may be spent. unit: how many whole numbers are one cost.
    """

    costs: Mapping[str, Mapping[str, float]]
    whole: float
    budget: float
    fixed: float = 0.0
    unit: float = 1.0

    def reached(self, chosen: Mapping[str, str]) -> float:
        """The share that a choice of levels spends."""
        spent = sum(self.costs[name][level] for name, level in chosen.items())
        return (self.fixed + spent) / self.whole

    def bounds(self) -> tuple[float, float]:
        """The least and the greatest share that a choice can spend."""
        least = sum(min(levels.values()) for levels in self.costs.values())
        most = sum(max(levels.values()) for levels in self.costs.values())
        return (self.fixed + least) / self.whole, (self.fixed + most) / self.whole

    def in_whole_numbers(self) -> tuple[list[list[int]], int]:
        """The costs and the budget for `cheapest`, which rounding never makes unreachable."""
        costs = [
            [round(self.unit * cost) for cost in levels.values()] for levels in self.costs.values()
        ]
        budget = int(self.unit * (self.budget * self.whole - self.fixed) + 1e-6)
        return costs, max(budget, sum(map(min, costs)))


def price(options, args, space: Space, model, calibration: Calibration, record: "Record") -> Prices:
    """What each level of each layer costs.

    Raises UserError if no choice meets the budget, and if no time can be measured.
    """
    if options.budget_of == "latency":
        record.open()  # measurements are kept
        prices = price_in_seconds(options, args, space, model, calibration, record)
    else:
        prices = price_in_numbers(options, args, space, model, calibration.compute.device)

    least, most = prices.bounds()
    asked = f"--budget {options.budget:g} of the {options.budget_of}"
    if options.budget < least - 1e-9:
        raise UserError(
            f"{asked}: the levels reach {least:.4f} to {most:.4f}; expected at least {least:.4f}"
        )
    if options.budget > most:
        log(f"{asked}: the levels reach {most:.4f} at most")
    return prices


def price_in_seconds(
    options, args, space: Space, model, calibration: Calibration, record: "Record"
) -> Prices:
    """Prices in the time of the layers."""
    seconds = measure_times(args, space, model, calibration, record)
    whole = sum(max(times.values()) for times in seconds.values())
    return Prices(seconds, whole, options.budget, unit=1e9)


def price_in_numbers(options, args, space: Space, model, device: torch.device) -> Prices:
    """Prices in weights or multiply-adds, which a layer has in proportion to what it keeps."""
    totals = {name: prod(shape) for name, shape in space.shapes.items()}
    dense = totals
    fixed = 0.0
    if options.budget_of == "macs":
        image = torch.zeros(1, 3, args.input_size, args.input_size, device=device)
        dense = multiply_adds(model, image)
        fixed = dense[ATTENTION]

    costs = {
        name: {level: dense[name] * space.kept(name, level) / totals[name] for level in levels}
        for name, levels in space.levels.items()
    }
    whole = fixed + sum(dense[name] for name in totals)
    return Prices(costs, whole, options.budget, fixed)


def measure_times(
    args, space: Space, model, calibration: Calibration, record: "Record"
) -> dict[str, dict[str, float]]:
    """The seconds of each layer at each level on a batch, with its quickest kernel or dense.

    Raises UserError if no layer is quicker at any level.
    """
    size = args.input_size
    images = torch.randn(args.batch_size, 3, size, size, device=calibration.compute.device)
    ratios = {}
    dense = {}
    for level in (text for text in space.texts if text != "dense"):
        if level not in record.times:
            log(f"Measuring the layers at {level}")
            times = measure_level(level, space, model, images, calibration.compute)
            record.add(times={level: times})

        # The dense layer was measured at each level; its least time counts
        for name, (before, after) in record.times[level].items():
            dense[name] = min(before, dense.get(name, before))
            ratios[name, level] = after / before

    if not any(ratio < 1 for ratio in ratios.values()):
        raise UserError(
            "--budget-of latency: no layer is quicker at any of the levels with a kernel that runs "
            "here; expected --budget-of macs or weights"
        )
    return {
        name: {level: dense.get(name, 0.0) * ratios.get((name, level), 1.0) for level in levels}
        for name, levels in space.levels.items()
    }


def measure_level(
    level: str, space: Space, model, images: torch.Tensor, compute: Compute
) -> dict[str, list[float]]:
    """The seconds of each layer that has this level: dense, and with its quickest kernel."""
    own = {name: _number(level) for name, levels in space.levels.items() if level in levels}
    config = {"sparsity": {"mode": "nxm", "level": {"default": "dense", **own}}}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    Masks(model, compute_masks(model, "custom", custom_config=config))
    with compute.autocast():
        _, report = sparse_kernels(model, images)
    model.load_state_dict(state)

    return {
        layer.name: [layer.seconds["dense"], layer.seconds[layer.kernel]]
        for layer in report.layers
        if layer.seconds
    }


class Bench:
    """The loss of each layer at each of its levels, measured unless the record has it.

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
        self._of_obs = options.of_obs
        self._pruned = {}
        self._magnitudes = Scores(self._weights) if options.reconstruct == "none" else None

        loader = calibration.loader
        batches = list(islice(loader, -(-TRIAL_IMAGES // loader.batch_sampler.batch_size)))
        self._divergence = Divergence(model, batches, calibration.compute.autocast())
        self._statistics = self._collect(model, calibration)

        logger = utils.MetricLogger()
        for name in logger.log_every(list(space.levels), 12, "Layer:"):
            known = record.losses.get(name, {})
            missing = [level for level in space.levels[name] if level not in known]
            for level, pruned in zip(missing, self._at(name, missing), strict=True):
                self._pruned[name, level] = pruned
                record.add(loss=[name, level, self._measure(pruned)])
                stop.check_alone()
        self.losses = {
            name: {level: record.losses[name][level] for level in levels}
            for name, levels in space.levels.items()
        }

    def pruned(self, name: str, level: str) -> Pruned:
        """A layer at a level."""
        if (name, level) not in self._pruned:
            (self._pruned[name, level],) = self._at(name, [level])
        return self._pruned[name, level]

    def divergence(self, chosen: Mapping[str, str]) -> float:
        """How far predictions at these levels are from the dense ones, in nats per image."""
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

    def _at(self, name: str, levels: Sequence[str]) -> Iterator[Pruned]:
        """A layer at some levels."""
        found = at_levels(
            self._weights[name].detach(),
            Layer(name, statistics=self._statistics, device=self._weights[name].device),
            [self.space.levels[name][level] for level in levels],
            divergence=self._divergence,
            mask_of=partial(mask_at, self._magnitudes, name) if self._magnitudes else None,
            **self._of_obs,
        )
        for pruned in found:
            if self._magnitudes:
                self._magnitudes.check()
            yield pruned

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


def solve(options, bench: Bench, prices: Prices) -> dict[str, str]:
    """The level of each layer: the choice of least total loss, then improved by exchanges."""
    costs, budget = prices.in_whole_numbers()
    losses = [list(levels.values()) for levels in bench.losses.values()]
    texts = [list(levels) for levels in bench.losses.values()]

    def named(chosen) -> dict[str, str]:
        triples = zip(bench.losses, texts, chosen, strict=True)
        return {name: levels[option] for name, levels, option in triples}

    def divergence(chosen) -> float:
        return bench.divergence(named(chosen))

    first = cheapest(costs, losses, budget)
    if not options.exchanges:
        return named(first)

    log(f"Measuring up to {options.exchanges} exchanges between two layers")
    best = exchanges(first, costs, losses, budget, divergence, options.exchanges)
    log(
        f"Divergence from the dense predictions: {divergence(first):.5f} nats as solved, "
        f"{divergence(best):.5f} after the exchanges"
    )
    return named(best)


class Record:
    """The folder of a search: its settings, and its measurements as they come.

    losses: by weight and level. times: by level and weight, seconds dense and pruned.
    divergences: by the levels of all layers. statistics: a file, until the search is done.
    """

    def __init__(self, options, args, space: Space):
        """Raises UserError when the folder holds a search with other arguments."""
        self.losses = {}
        self.times = {}
        self.divergences = {}
        self.folder = JobFolder(options.output_dir, "measured.jsonl", job="search")
        self.statistics = self.folder.path / "statistics.pth"

        names = ("budget", "budget_of", "measure", "reconstruct", "exchanges")
        own = {name: getattr(options, name) for name in names}
        self.folder.agree(args, {**own, "levels": space.levels})
        for measured in self.folder.read(_measured):
            self._take(**measured)

    def open(self) -> None:
        """Makes and locks the folder."""
        self.folder.open()

    def add(self, **measured) -> None:
        """Keeps a measurement, as one of the arguments of `_take`."""
        self._take(**measured)
        self.folder.add(json.dumps(measured))

    def finish(self) -> None:
        self.statistics.unlink(missing_ok=True)

    def _take(self, loss=None, times=None, divergence=None) -> None:
        if loss:
            name, level, value = loss
            self.losses.setdefault(name, {})[level] = value
        if divergence:
            levels, value = divergence
            self.divergences[levels] = value
        self.times |= times or {}


# ---- the results ----


def write_results(
    options,
    model: str,
    chosen: Mapping[str, str],
    prices: Prices,
    bench: Bench,
    record: Record,
    compute: Compute,
) -> None:
    """search.yaml, search.csv, search.png, and search.md with all of it; prints what was found."""
    space = bench.space
    kept = space.rows(chosen)
    text = in_words(options, kept, prices.reached(chosen))
    page = [
        f"# {model}, levels under a budget",
        f"    {options.command}",
        f"{text}, by `{options.measure}`.",
        f"    {command_to_use(options)}",
        search_table(chosen, space, bench),
        "![The level of each layer](search.png)",
        f"- versions: {utils.versions(compute.device)}",
    ]
    files = {
        "search.yaml": sparsity_yaml(kept, f"{options.command}\n{text}").encode(),
        "search.csv": search_csv(chosen, space, bench).encode(),
        "search.png": picture(chosen, space, f"{model}, {text}"),
        "search.md": "\n\n".join(page).encode(),
    }

    for name, content in files.items():
        record.folder.write(name, content)
    print(f"{text}: written to {options.output_dir}: {', '.join(sorted(files))}")


def command_to_use(options) -> str:
    """The command that prunes with the levels that were found."""
    path = str(Path(options.output_dir, "search.yaml"))
    pruning = ["--pruner", "custom", "--custom-config", path, "--reconstruct", options.reconstruct]
    return shlex.join(["python", "main.py", *options.others, *pruning])


def in_words(options, kept: Kept, reached: float) -> str:
    """What the levels that were found keep."""
    weights = f"{1 - kept.prunable.sparsity:.2%} of the weights kept"
    if options.budget_of == "weights":
        return weights
    of = {"macs": "the multiply-adds", "latency": "the time"}[options.budget_of]
    return f"{reached:.2%} of {of} and {weights}"


def search_csv(chosen: Mapping[str, str], space: Space, bench: Bench) -> str:
    """A line for each layer: its level, what it keeps, and its loss at every level."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    losses = [f"loss at {level}" for level in space.texts]
    writer.writerow(["layer", "shape", "level", "kept", "total", *losses])
    for row, level in zip(space.rows(chosen).layers, chosen.values(), strict=True):
        shape = "x".join(map(str, row.shape))
        losses = _losses(bench, row.name, "{:.6g}")
        writer.writerow([row.name, shape, level, row.kept, row.total, *losses])
    return table.getvalue()


def search_table(chosen: Mapping[str, str], space: Space, bench: Bench) -> str:
    """The same in Markdown."""
    losses = " | ".join(f"loss at {level}" for level in space.texts)
    lines = [
        f"| layer | level | kept | {losses} |",
        "| --- | --- | ---: |" + " ---: |" * len(space.texts),
    ]
    for row, level in zip(space.rows(chosen).layers, chosen.values(), strict=True):
        losses = " | ".join(_losses(bench, row.name, "{:.3g}"))
        lines.append(f"| `{row.name}` | {level} | {1 - row.sparsity:.2%} | {losses} |")
    return "\n".join(lines)


def picture(chosen: Mapping[str, str], space: Space, title: str) -> bytes:
    """The level of each layer and the share that it keeps, as a PNG."""
    rows = zip(space.rows(chosen).layers, chosen.values(), strict=True)
    shares = {row.name: (level, 1 - row.sparsity) for row, level in rows}
    return plots.png(plots.level_map(shares, title))


# ---- helpers, not exported ----


def _number(text: str) -> float | str:
    """A level of the command line as a YAML file has it."""
    try:
        return float(text)
    except ValueError:
        return text


def _losses(bench: Bench, name: str, form: str) -> list[str]:
    """The loss of a layer at every level of the search; empty if it does not have that level."""
    losses = [bench.losses[name].get(level) for level in bench.space.texts]
    return ["" if loss is None else form.format(loss) for loss in losses]


def _measured(line: str) -> dict:
    """A line of measured.jsonl. Raises ValueError if it was not written whole."""
    measured = json.loads(line)
    if not isinstance(measured, dict):
        raise ValueError(line)
    return measured


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: search(sys.argv[1:])))
