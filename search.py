"""Finds the levels of all layers that lose least under a budget, and writes them as a custom YAML.

    python search.py --budget 0.5 --budget-of macs --levels 1:4 2:4 4:4
    python search.py --budget 0.5 --levels dense 0.5 2:4 0.8 --data-path IMAGENET
    python search.py --budget 0.4 --space configs/space.yaml
    python search.py --budget 0.5 --budget-of latency --space heads neurons block:4x1 unstructured

Takes the arguments of main.py for the model and the data as well as its own. The budget is the
share that is kept.

Each layer is pruned at each of its levels, by Optimal Brain Surgeon on calibration images or, with
`--reconstruct none`, by its scores alone, and the loss of that is measured. The choice of least
total loss is found exactly. Then pairs of layers exchange a level if the predictions of the whole
model come closer to the dense ones. Measurements stay in `--output_dir`: killed and started again,
the search measures only what is missing.

A budget of time is that of the whole model for a batch of `--batch-size` in the precision of
`--amp`. The time of each attention and each MLP is measured at each choice for it before anything
else, and that of the whole pruned model in the end.
"""

import argparse
import os
import shlex
import sys

import torch

import utils
from sparsity_factory import (
    RECONSTRUCTIONS,
    Recipe,
    choose_layers,
    compute_masks,
    prunable_weights,
    shrink,
)
from sparsity_factory.levels import MEASURES, exchanges
from sparsity_factory.method import check_method_options, options_of
from sparsity_factory.time_table import (
    TimeTable,
    find_parts,
    time_by_dtype,
    time_of_whole,
    time_table,
)
from trainer.arguments import given, method_options, parse_args, refused_flags
from trainer.builders import build_loaders, choose_compute, load_start, prepare_model
from trainer.calibration_images import Calibration
from trainer.exit_status import exit_status
from trainer.parser import Parser
from trainer.search_bench import Bench, Record
from trainer.search_results import Found, command_to_use, write_results
from trainer.search_space import (
    Prices,
    Problem,
    Space,
    patterns_of,
    prices_in_numbers,
    prices_in_seconds,
)
from trainer.stop_signals import Stopped, StopSignals
from utils import Compute, UserError, log

BUDGETS = ("weights", "macs", "latency")
#: How far the time of the whole model may be from the sum of its parts on an idle machine.
CLOSE = 0.1


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

            clock = Clock(args, model, compute) if options.budget_of == "latency" else None
            space = Space.of(options, model, clock.parts if clock else None)
            record = Record(options, args, space)
            calibration = Calibration(args, model, compute, training_images=loaders.training_images)
            table = clock.table(space, record, stop) if clock else None
            prices = price(options, args, space, model, table)
            record.open()
            if table and not record.table:
                record.add(table=table)

            bench = Bench(options, space, model, calibration, record, stop)
            solver = solve_in_time if table else solve
            found = Found(space, solver(options, bench, prices), prices, bench, table)
            if clock:
                found = found._replace(timed=clock.in_words(found))
        except Stopped as stopped:
            stopped.args = (
                f"stopped by {stopped.name}; the same command resumes in {options.output_dir}",
            )
            raise

    write_results(options, args.model, found, compute)
    record.finish()
    if found.timed:
        print(found.timed)
    print(f"To use it: {command_to_use(options, found)}")
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
    if options.levels and options.space and not patterns_of(options):
        raise UserError("--space: not together with --levels")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("search.py: expected one process, without torchrun")

    args = parse_args([*options.others, "--output_dir", options.output_dir], one_recipe=False)
    if args.num_classes == 0:
        raise UserError("--num-classes 0: not with a search, which compares predictions of classes")
    numbers = method_options(args.method_options) or {}
    known = options_of(RECONSTRUCTIONS, options.reconstruct)
    check_method_options(numbers, known, flags=True)
    options.method_options = numbers
    of_obs = options.reconstruct == "obs"
    options.of_obs = {known[name].parameter: numbers[name] for name in numbers if of_obs}
    return options, args


# fmt: off


def search_parser() -> Parser:
    parser = Parser("search.py", __doc__, allow_abbrev=False)
    add = parser.add_argument

    # The budget, and the choices
    add("--budget", type=float, required=True, metavar="SHARE", help="what is kept, in (0, 1]")
    add("--budget-of", choices=BUDGETS, default="weights",
        help="of the prunable weights; of their multiply-adds and the attention products'; or of "
             "the time of the whole model, as measured here with sparse kernels")
    add("--levels", nargs="+", metavar="LEVEL",
        help="what each layer chooses from: n:m, sparsities in [0, 1), dense; by default 1:4 2:4 "
             "4:4. With patterns in --space their sparsities, by default 0.5 0.6 0.7 0.8 0.9 0.95")
    add("--space", nargs="+", metavar="PATTERN or FILE",
        help="with --budget-of latency, patterns from which each block takes one: heads, neurons, "
             "unstructured, block:RxC, n:m. Or a YAML file with choices for each weight, in place "
             "of --levels")

    # How choices are compared
    add("--measure", choices=list(MEASURES), default="kfac", help="the loss of a layer")
    add("--reconstruct", choices=["obs", "least-squares", "none"], default="obs",
        help="how the other weights of a layer compensate for the pruned ones in the run; the "
             "search measures losses by obs, and for none without compensation")
    add("--exchanges", type=int, default=20, metavar="N",
        help="how many exchanges of levels between two layers are measured; with a budget of time "
             "how many choices are tried on the whole model; 0 for none")

    add("--output_dir", default="output/search", metavar="DIR", help="folder for the results")
    return parser


# fmt: on


def price(options, args, space: Space, model, table: TimeTable | None) -> Prices:
    """What each choice for each part costs.

    Raises UserError if no choice meets the budget, or none is quicker than dense.
    """
    if table:
        prices = prices_in_seconds(options, space, table)
    else:
        device = next(model.parameters()).device
        prices = prices_in_numbers(options, args, space, model, device)

    least, most = prices.bounds()
    asked = f"--budget {options.budget:g} of the {options.budget_of}"
    if options.budget < least - 1e-9:
        raise UserError(
            f"{asked}: the levels reach {least:.4f} to {most:.4f}; expected at least {least:.4f}"
        )
    if options.budget > most:
        log(f"{asked}: the levels reach {most:.4f} at most")
    return prices


def solve(options, bench: Bench, prices: Prices) -> dict[str, str]:
    """The level of each layer: the choice of least total loss, then improved by exchanges."""
    problem = Problem.of(prices, bench.losses)
    first = problem.solve()
    if not options.exchanges:
        return problem.named(first)

    def divergence(places) -> float:
        return bench.divergence(problem.named(places))

    log(f"Measuring up to {options.exchanges} exchanges between two layers")
    budget = max(problem.budget, sum(map(min, problem.costs)))
    best = exchanges(first, problem.costs, problem.losses, budget, divergence, options.exchanges)
    log(
        f"Divergence from the dense predictions: {divergence(first):.5f} nats as solved, "
        f"{divergence(best):.5f} after the exchanges"
    )
    return problem.named(best)


def solve_in_time(options, bench: Bench, prices: Prices) -> dict[str, str]:
    """The choice for each part: of several that meet the budget, the best once the model is pruned.

    They are the choices of least total loss in the whole space and with each pattern alone. The
    losses of levels and of heads and neurons are estimates of two kinds, so that several factors
    between them are tried.
    """
    solved = []
    for losses in [*bench.weighed(), *bench.alone()]:
        problem = Problem.of(prices, losses)
        if problem.is_soluble and (chosen := problem.named(problem.solve())) not in solved:
            solved.append(chosen)
    if not options.exchanges:
        return solved[0]

    tried = solved[: options.exchanges]
    log(f"Pruning the model with each of {len(tried)} choices")
    for chosen in tried:
        log(f"Divergence from the dense predictions: {bench.trial(chosen):.5f} nats")
    return min(tried, key=bench.trial)


class Clock:
    """Times a model for the batch and the precision of the command line.

    parts: of the model, those that can be timed by themselves.
    """

    def __init__(self, args, model: torch.nn.Module, compute: Compute):
        self._model = model
        self._compute = compute
        shape = (args.batch_size, 3, args.input_size, args.input_size)
        self._images = torch.randn(shape, device=compute.device)
        with compute.autocast():
            self.parts = find_parts(model, self._images)

        timed = {name for part in self.parts for name in part.weights}
        if others := [name for name in prunable_weights(model) if name not in timed]:
            more = f" (as {len(others) - 1} more)" if len(others) > 1 else ""
            log(f"{others[0]}{more} cannot be timed by itself, and stays dense")

    def table(self, space: Space, record: Record, stop: StopSignals) -> TimeTable:
        """The time of each part at each choice, measured unless the record has it."""
        if record.table:
            return record.table

        def note(line: str) -> None:
            stop.check_alone()
            log(line)

        with self._compute.autocast():
            return time_table(self._model, self._images, self.parts, space.choices, log=note)

    def in_words(self, found: Found) -> str:
        """The time of the whole model: dense, as predicted for the pruned one, and as measured."""
        pruned = self._pruned(found)
        with self._compute.autocast():
            dense, seconds = time_of_whole(self._model, pruned, self._images)
        predicted = dense * found.prices.reached(found.chosen)
        apart = seconds / predicted - 1
        if abs(apart) > CLOSE:
            log("The time of the whole model is far from that of its parts: is the machine idle?")

        by_dtype = time_by_dtype(self._model, self._images)
        quickest = min(by_dtype, key=lambda dtype: by_dtype[dtype])
        own = _name(self._compute.dtype)
        others = ", ".join(
            f"{1000 * taken:.1f} ms in {_name(dt)}" for dt, taken in by_dtype.items()
        )
        return (
            f"A batch of {len(self._images)} in {own}: dense {1000 * dense:.1f} ms, pruned "
            f"{1000 * predicted:.1f} ms as predicted and {1000 * seconds:.1f} ms as measured "
            f"({apart:+.1%}), {dense / seconds:.2f} times as fast. The dense model takes {others}: "
            f"its quickest is {_name(quickest)}"
        )

    def _pruned(self, found: Found) -> torch.nn.Module:
        """The model with zeros as the search has chosen them, and without pruned units."""
        config = found.space.config(found.chosen)
        masks = compute_masks(
            self._model,
            "custom",
            custom_config=config,
            score=found.bench.score,
            statistics=found.bench.statistics,
        )
        return shrink(self._model, masks, Recipe("custom", custom_config=config).shrinks)


# ---- helpers, not exported ----


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: search(sys.argv[1:])))
