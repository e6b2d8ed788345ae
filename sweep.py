"""Compares recipes: accuracy against sparsity right after pruning and, if asked for, after
finetuning.

    python sweep.py --pruners lamp glob unif unifplus erk --sparsities 0.5 0.65 0.8 0.9
    --finetune-epochs 2 python sweep.py --pruners lamp erk --scores magnitude taylor --schedules
    one-shot gradual --finetune-epochs 2 python sweep.py --sensitivity --sparsities 0.5 0.8 0.95
    torchrun --nproc_per_node=8 sweep.py --finetune-epochs 30 --model deit_small_patch16_224
    --data-path IMAGENET

Takes any argument of main.py beside its own, and crosses pruners, scores, patterns, schedules,
reconstructions, sparsities and seeds.
Data and dense model are loaded once. Each result is a line of sweep.csv in `--output_dir`; started
again, it computes only what is missing there. Each finetuning is a run with a folder of its own
under runs/, as main.py makes it: started again, it goes on from its last checkpoint. The folder
stays, with log.txt, checkpoint.pth, best_checkpoint.pth, tables and pictures. Under torchrun the
processes share the combinations, each on a GPU of its own; with `--processes-per-run all` they
share the images of one run after another.
"""

import argparse
import os
import shlex
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from engine import steps_of_epoch
from sparsity_factory import (
    PRUNERS,
    RECONSTRUCTIONS,
    SCHEDULES,
    SCORES,
    Masks,
    PruningError,
    Recipe,
    Sparsifier,
    compute_masks,
    needs_of,
    parse_pattern,
    prunable_weights,
    sparsity_rows,
)
from sparsity_factory.recipe import timed_fields
from trainer import plots
from trainer.arguments import REFUSED as REFUSED_FLAG
from trainer.arguments import get_args_parser, given, parse_args, recipe_of
from trainer.builders import (
    build_dense_teacher,
    build_loaders,
    build_sparsifier,
    build_state,
    build_step_options,
    load_start,
    prepare_model,
)
from trainer.calibration_images import Calibration
from trainer.epochs import Evaluator, train
from trainer.exit_status import exit_status
from trainer.results import open_results
from trainer.stop_signals import Stopped, StopSignals
from trainer.sweep_table import (
    DENSE,
    FINETUNED,
    LAYER,
    ONE_SHOT,
    REFUSED,
    Combination,
    Outcome,
    Table,
    Task,
    labels,
    mean_and_range,
)
from trainer.weights import load_weights
from utils import Compute, DivergedError, UserError, first_line

AUTOMATIC = [name for name in PRUNERS if name != "custom"]


def sweep(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    options, args = parse_sweep_args(argv)
    utils.show_progress(quiet=True)  # of each training; the sweep has lines of its own
    compute = Compute.choose(args.device, args.amp)
    if options.processes_per_run == "all":
        utils.init_process_group(
            compute.device.type, args.dist_url, args.distributed, args.world_size, args.dist_timeout
        )
        rank = utils.rank()
        processes = utils.world_size()
        mine = slice(None)
    else:  # no process group: each process is one of its own
        rank = int(os.environ.get("RANK", 0))
        processes = int(os.environ.get("WORLD_SIZE", 1))
        mine = slice(rank, None, processes)
    launcher = (
        "python"
        if processes == 1
        else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
    )
    args.command = shlex.join(["sweep.py", *argv])
    table = Table(options.output_dir, args, utils.world_size())
    with StopSignals() as stop:
        try:
            bench = Workbench(args, compute, stop)
            tasks = plan(options, bench)
            bench.check(tasks)
            utils.on_first_process(lambda: table.open(first=rank == 0))
            done = utils.on_first_process(table.outcomes)
            progress = Progress(tasks, table, shown=rank == 0 and not args.quiet)
            # Shared out whole: another process may have done some of its own
            for task in tasks[mine]:
                if task not in done:
                    outcome = bench.outcome(task)
                    utils.on_first_process(
                        lambda task=task, outcome=outcome: table.add(task, outcome)
                    )
                    progress.show()
            while rank == 0 and not set(tasks) <= set(table.outcomes()):
                time.sleep(0.5)  # the other processes are at work
                stop.check_alone()
                progress.show()
        except Stopped as stopped:
            stopped.args = (
                f"stopped by {stopped.name}; the same command does what is missing in "
                f"{options.output_dir}",
            )
            raise
    if rank == 0:
        progress.close()
        table.sort(tasks)
        facts = [f"    {launcher} {args.command}", f"- versions: {utils.versions(compute.device)}"]
        write_results(options, args.model, table, tasks, facts)
    return 0


def parse_sweep_args(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The sweep's options, and main.py's arguments that its runs share. Raises UserError."""
    parser = _Parser(
        "sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--pruners",
        nargs="*",
        choices=AUTOMATIC,
        help="what to compare; by default all of them, and with --sensitivity none",
    )
    parser.add_argument("--scores", nargs="+", choices=list(SCORES), help="magnitude by default")
    parser.add_argument(
        "--patterns",
        nargs="+",
        help="unstructured by default; one such as 2:4, which has a sparsity "
        "of its own, is crossed with neither pruners nor sparsities",
    )
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=list(SCHEDULES),
        help="one-shot by default; only that is also measured right after pruning",
    )
    parser.add_argument(
        "--reconstructions", nargs="+", choices=list(RECONSTRUCTIONS), help="none by default"
    )
    parser.add_argument(
        "--sparsities", nargs="+", type=float, default=[0.5, 0.65, 0.8, 0.9], help="each in [0, 1)"
    )
    parser.add_argument(
        "--custom-configs",
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files that take part at the sparsity they reach, with each score and schedule",
    )
    parser.add_argument(
        "--finetune-epochs", type=int, default=0, help="epochs of finetuning; 0 for none"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="finetune once with each; --seed by default"
    )
    parser.add_argument(
        "--sensitivity", action="store_true", help="prune one layer at a time, by magnitude"
    )
    parser.add_argument(
        "--processes-per-run",
        choices=["1", "all"],
        default="1",
        help="under torchrun: each process does combinations of its own, or all do each together",
    )
    parser.add_argument(
        "--output_dir", default="output/sweep", metavar="DIR", help="where the results go"
    )
    options, others = parser.parse_known_args(argv)
    given_here = given(others)
    for action in get_args_parser()._actions:
        if getattr(action, "sweep", None) == REFUSED_FLAG and action.dest in given_here:
            instead = f"; see {action.instead}" if action.instead else ""
            raise UserError(f"{action.option_strings[0]}: not with a sweep{instead}")
    args = parse_args([*others, "--output_dir", options.output_dir], one_recipe=False)
    left = [
        action.option_strings[0]
        for action in get_args_parser()._actions
        if getattr(action, "sweep", None) == REFUSED_FLAG and action.dest in args.given
    ]
    if left and os.environ.get("RANK", "0") == "0":
        print(
            f"--config {args.config}: the sweep has flags of its own for {', '.join(left)}",
            flush=True,
        )
    options.seeds = options.seeds or [args.seed]
    options.scores = options.scores or [args.score]
    options.patterns = options.patterns or [args.pattern]
    options.schedules = options.schedules or [args.prune_schedule]
    options.reconstructions = options.reconstructions or [args.reconstruct]
    if options.pruners is None:
        options.pruners = [] if options.sensitivity else AUTOMATIC
    args.epochs = options.finetune_epochs
    check_options(options, args)
    return options, args


def check_options(options, args) -> None:
    """Raises UserError for options that no sweep can have, PruningError for a pattern that there is
    not.
    """
    for sparsity in options.sparsities:
        if not 0 <= sparsity < 1:
            raise UserError(f"--sparsities {sparsity}: expected numbers in [0, 1)")
    if options.finetune_epochs < 0 or min(options.seeds) < 0:
        raise UserError("--finetune-epochs and --seeds: expected numbers of at least 0")
    for pattern in options.patterns:
        parse_pattern(pattern)
    schedules = " ".join(options.schedules)
    if set(options.schedules) != {"one-shot"} and not options.finetune_epochs:
        raise UserError(
            f"--schedules {schedules}: expected --finetune-epochs of at least 1 beside it"
        )
    used = {name for schedule in options.schedules for name in SCHEDULES[schedule].uses}
    for name in sorted(timed_fields() - used):
        if name in args.given:
            raise UserError(
                f"--{name.replace('_', '-')}: not with --schedules {schedules}, which do not use it"
            )


def plan(options, bench: "Workbench") -> list[Task]:
    """The accuracies to measure, the dense one first. Raises PruningError for a YAML that does not
    fit the model.
    """
    pruners, scores, patterns, schedules, reconstructions, seeds = map(
        dict.fromkeys,
        (
            options.pruners,
            options.scores,
            options.patterns,
            options.schedules,
            options.reconstructions,
            options.seeds,
        ),
    )
    sparsities = sorted(set(options.sparsities))
    own = {pattern: parse_pattern(pattern).sparsity for pattern in patterns}
    places = [
        (Combination(*choices), sparsity)
        for *choices, sparsity in product(
            pruners, scores, patterns, schedules, reconstructions, sparsities
        )
        if own[choices[2]] is None
    ]
    places += [
        (Combination("unif", *choices), round(own[choices[1]], 6))
        for choices in product(scores, patterns, schedules, reconstructions)
        if own[choices[1]] is not None
    ]
    for path in dict.fromkeys(options.custom_configs):
        masks = compute_masks(bench.model, "custom", custom_config=path)
        config = f"{zlib.crc32(Path(path).read_bytes()):08x}"
        sparsity = round(_pruned(masks), 6)
        places += [
            (
                Combination(path, score, schedule=schedule, reconstruct=reconstruct, config=config),
                sparsity,
            )
            for score, schedule, reconstruct in product(scores, schedules, reconstructions)
        ]

    def task(kind, combination, sparsity, seed=None):
        return Task(kind, sparsity=sparsity, seed=seed, **combination._asdict())

    tasks = [Task(DENSE)] + [
        task(ONE_SHOT, *place) for place in places if place[0].schedule == "one-shot"
    ]
    if options.finetune_epochs:
        tasks += [task(FINETUNED, *place, seed) for seed in seeds for place in places]
    if options.sensitivity:
        tasks += [
            Task(LAYER, name, sparsity)
            for name in prunable_weights(bench.model)
            for sparsity in sparsities
        ]
    return tasks


class Workbench:
    """The data and the dense model, with which one accuracy after another is measured."""

    def __init__(self, args, compute: Compute, stop: StopSignals):
        self.args = args
        self.compute = compute
        self.stop = stop
        utils.seed_everything(utils.INIT, args.seed)
        self.train_loader, self.val_loader, num_classes = build_loaders(args, compute.device)
        args, checkpoint = load_start(args)
        self.model = prepare_model(args, num_classes, checkpoint, compute.device)
        self.dense = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.statistics = {}  # of the dense model
        self.test = Evaluator(self.val_loader, args, compute, stop, {})
        self.epoch_steps = steps_of_epoch(self.train_loader, args.accum_iter)
        if args.epochs:
            self.teacher = build_dense_teacher(
                args, num_classes, self.model, checkpoint, compute.device
            )
            self.options = build_step_options(args, num_classes, compute, self.teacher)
            sparsifier = Sparsifier(self.model, Recipe(), total_steps=1, epoch_steps=1)
            # A mistake of the optimizer shows at once
            build_state(args, self.model, sparsifier, {}, compute, None)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises PruningError where every recipe is refused, UserError where calibration images
        cannot be had.
        """
        runs = [self.arguments(task) for task in tasks if task.kind in (ONE_SHOT, FINETUNED)]
        reasons = [
            _refusal(lambda run=run: recipe_of(run).check(run.epochs or None)) for run in runs
        ]
        if runs and all(reasons):
            raise PruningError(reasons[0])
        runs = [run for run, reason in zip(runs, reasons, strict=True) if not reason]
        looking = [run for run in runs if recipe_of(run).looks_at_data]
        if looking:
            Calibration(looking[0], self.model, self.compute)

    def outcome(self, task: Task) -> Outcome:
        """Measures what the task asks for; what fails is told in the outcome, since the others may
        succeed.
        """
        self.model.load_state_dict(self.dense)
        self.model.zero_grad()
        # Where one process of several has no memory left, the others wait for it, and nothing can
        # be told.
        failures = (PruningError, DivergedError) + (
            () if utils.world_size() > 1 else (torch.OutOfMemoryError,)
        )
        try:
            if task.kind == DENSE:
                return Outcome(self.test(self.model)["acc1"])
            if task.kind == LAYER:
                level = {"default": "dense", task.name: task.sparsity}
                masks = Masks(
                    self.model,
                    compute_masks(
                        self.model,
                        "custom",
                        custom_config={"sparsity": {"mode": "unstructured", "level": level}},
                    ),
                )
                return Outcome(self.test(self.model)["acc1"], masks.sparsity())
            args = self.arguments(task)
            if reason := _refusal(lambda: self._try(args)):
                return Outcome(None, error=REFUSED + reason)
            if task.kind == FINETUNED:
                return self._finetune(args)
            sparsifier = self.sparsifier(args, {})
            sparsifier.start()
            return Outcome(self.test(self.model)["acc1"], sparsifier.masks.sparsity())
        except failures as error:
            return Outcome(None, error=first_line(error))

    def arguments(self, task: Task) -> argparse.Namespace:
        """The arguments of a run; what its schedule does not use is at its default."""
        seed = self.args.seed if task.seed is None else task.seed
        folder = Path(self.args.output_dir, "runs", task.run)
        values = {
            **vars(self.args),
            **task.choices,
            "seed": seed,
            "output_dir": str(folder),
            "resume": "auto",
            "finetune": "",
            "use_ema": False,
        }  # the dense weights are here already
        recipe = recipe_of(argparse.Namespace(**values)).with_schedule(task.schedule)
        return argparse.Namespace(
            **{**values, **{name: getattr(recipe, name) for name in timed_fields()}}
        )

    def sparsifier(self, args, checkpoint: dict) -> Sparsifier:
        """What prunes the model in such a run, or goes on from the checkpoint."""
        return build_sparsifier(
            args, self.model, checkpoint, self.epoch_steps, self.compute, self.statistics
        )

    def _try(self, args) -> None:
        """Raises PruningError for what recipe or model refuse, whatever the scores: none is
        computed from images.
        """
        recipe = recipe_of(args)
        recipe.check(args.epochs or None)
        pruner = "unif" if needs_of(recipe.pruner) else recipe.pruner
        Sparsifier(
            self.model,
            replace(recipe, score="magnitude", pruner=pruner, permute=False),
            epoch_steps=self.epoch_steps,
            total_steps=max(args.epochs, 1) * self.epoch_steps,
        ).first_masks()

    def _finetune(self, args) -> Outcome:
        """A run as main.py makes it, from the dense weights or, with a checkpoint in its folder,
        from there.
        """
        args, checkpoint = load_start(args)
        if checkpoint:
            load_weights(self.model, checkpoint["model"], args.resume)
        sparsifier = self.sparsifier(args, checkpoint)
        first_masks = {} if sparsifier.masks else sparsifier.first_masks()
        state = build_state(
            args,
            self.model,
            sparsifier,
            checkpoint,
            self.compute,
            self.train_loader.dataset.bad,
            self.teacher,
        )
        results = open_results(
            args,
            sparsifier.recipe,
            state.progress.epoch,
            self.train_loader,
            self.val_loader,
            self.compute,
        )
        if first_masks:
            sparsifier.start(first_masks)
        image = torch.zeros(1, 3, args.input_size, args.input_size, device=self.compute.device)
        results.start(self.model, sparsity_rows(self.model, sparsifier.masks), {}, image)
        self.train_loader.sampler.set_seed(args.seed)
        accuracy = train(state, self.options, self.train_loader, self.test, self.stop, results)
        results.finish({"finetuned": accuracy}, sparsity_rows(self.model, sparsifier.masks))
        return Outcome(accuracy, sparsifier.masks.sparsity())


class Progress:
    """Shows the outcomes of all processes as they come: as a bar on a terminal, else as lines."""

    def __init__(self, tasks: list[Task], table: Table, shown: bool):
        self.tasks = tasks
        self.table = table
        self.shown = shown
        self.seen = set(tasks) & set(table.outcomes())
        if shown and self.seen:
            print(f"{table.path}: {len(self.seen)} of {len(tasks)} done before", flush=True)
        self.bar = tqdm(
            total=len(tasks),
            initial=len(self.seen),
            unit="run",
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not (shown and sys.stdout.isatty()),
        )

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
    """The pictures and sweep.md, of what this command asked for; prints the table. facts: its first
    and last line.
    """
    outcomes = {task: outcome for task, outcome in table.outcomes().items() if task in set(tasks)}
    accuracies = {
        task: outcome.accuracy for task, outcome in outcomes.items() if outcome.accuracy is not None
    }
    dense, pictures = accuracies.get(Task(DENSE)), []
    names = labels(
        task.combination for kind in (FINETUNED, ONE_SHOT) for task in tasks if task.kind == kind
    )
    if curves := _curves(accuracies, names):
        epochs, seeds = options.finetune_epochs, len(options.seeds)
        finetuned = f"finetuned for {epochs} epoch{'s' * (epochs > 1)}"
        finetuned += f",\nmean and range of {seeds} seeds" if seeds > 1 else ""
        table.write("sweep.png", plots.png(plots.sweep_lines(curves, dense, model, finetuned)))
        pictures.append("![Top-1 accuracy against sparsity](sweep.png)")
    drops = {
        (task.name, task.sparsity): dense - value
        for task, value in accuracies.items()
        if task.kind == LAYER
    }
    if drops:
        title = f"{model}, one layer pruned at a time"
        table.write("sensitivity.png", plots.png(plots.sensitivity_map(drops, title)))
        pictures.append("![Accuracy lost by pruning each layer alone](sensitivity.png)")
    text = "\n".join(_table(outcomes, names, dense))
    parts = [f"# {model}, a sweep", facts[0], text, *pictures, facts[1]]
    table.write("sweep.md", "\n\n".join(parts).encode() + b"\n")
    print(text)
    print(
        f"Written to {table.folder}: "
        + ", ".join(
            sorted(
                path.name
                for path in Path(table.folder).iterdir()
                if path.name.startswith(("sweep.", "sensitivity."))
            )
        )
    )


# ---- helpers, not exported ----


def _curves(
    accuracies: Mapping[Task, float], names: Mapping[Combination, str]
) -> dict[str, dict[str, list]]:
    """Per combination and kind: the sparsities, each with the accuracies of all seeds."""
    curves = {name: {} for name in names.values()}
    for task, accuracy in accuracies.items():
        if task.kind in (ONE_SHOT, FINETUNED):
            points = curves[names[task.combination]].setdefault(task.kind, {})
            points.setdefault(task.sparsity, []).append(accuracy)
    return {
        name: {kind: sorted(points.items()) for kind, points in kinds.items()}
        for name, kinds in curves.items()
        if kinds
    }


def _table(
    outcomes: Mapping[Task, Outcome], names: Mapping[Combination, str], dense: float | None
) -> list[str]:
    """Top-1 accuracy in Markdown: combinations by sparsity, then those of one sparsity, then what
    failed.
    """

    def cell(combination, sparsity):
        mine = {
            task: outcome
            for task, outcome in outcomes.items()
            if (task.combination, task.sparsity) == (combination, sparsity) and task.kind != LAYER
        }
        one_shot, tuned = (
            [
                outcome.accuracy
                for task, outcome in mine.items()
                if task.kind == kind and outcome.accuracy is not None
            ]
            for kind in (ONE_SHOT, FINETUNED)
        )
        if not one_shot and not tuned:
            refused = any(outcome.error.startswith(REFUSED) for outcome in mine.values())
            return "refused" if refused else "failed" if mine else ""
        parts = [f"{value:.2f}" for value in one_shot]
        return " → ".join(filter(None, [*parts, mean_and_range(tuned)]))

    places = {(task.combination, task.sparsity) for task in outcomes if task.combination in names}
    rows = [combination for combination in names if not combination.sets_sparsity]
    sparsities = sorted({sparsity for combination, sparsity in places if combination in rows})
    lines = []
    if rows:
        lines += [
            "| top-1 in % | "
            + " | ".join(f"{100 * sparsity:g} %" for sparsity in sparsities)
            + " |",
            "| --- |" + " --- |" * len(sparsities),
        ]
        lines += [
            f"| `{names[combination]}` | "
            + " | ".join(cell(combination, sparsity) for sparsity in sparsities)
            + " |"
            for combination in rows
        ]
        lines.append("")
    lines += [
        f"- `{names[combination]}`, {100 * sparsity:.2f} % pruned: {cell(combination, sparsity)}"
        for combination in names
        if combination not in rows
        for place, sparsity in places
        if place == combination
    ]
    lines += [f"- dense: {dense:.2f}"] if dense is not None else []
    failed = {}  # one line for the sparsities that share a reason
    for task, outcome in outcomes.items():
        if outcome.error:
            name = names.get(task.combination, task.name)
            failed.setdefault((name, outcome.error), {})[f"{100 * task.sparsity:.4g}"] = None
    return lines + [
        f"- {name} at {', '.join(levels)} %: {error}" for (name, error), levels in failed.items()
    ]


def _refusal(check) -> str:
    """Why `check()` refuses, in a line, or nothing."""
    try:
        check()
    except PruningError as error:
        return first_line(error)
    return ""


def _pruned(masks: Mapping[str, torch.Tensor]) -> float:
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.count_nonzero()) for mask in masks.values()) / total


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: sweep(sys.argv[1:])))
