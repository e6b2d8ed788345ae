"""Compares recipes: accuracy against sparsity, right after pruning and after finetuning.

    python sweep.py --pruners lamp glob unif unifplus erk --sparsities 0.5 0.65 0.8 0.9
    python sweep.py --pruners lamp erk --scores magnitude taylor --finetune-epochs 2
    python sweep.py --schedules one-shot gradual --finetune-epochs 2
    python sweep.py --sensitivity --sparsities 0.5 0.8 0.95
    torchrun --nproc_per_node=8 sweep.py --finetune-epochs 30 --data-path IMAGENET

Takes the arguments of main.py as well as its own. It crosses pruners, scores, patterns, schedules,
reconstructions, sparsities and seeds. Data and dense model are loaded once.

Each result is a line of sweep.csv in `--output_dir`; started again, the sweep computes only what is
missing there. Each finetuning is a run with a folder of its own under runs/, as main.py makes it,
and resumes from its last checkpoint. The folder stays, with log.txt, checkpoints, tables and
pictures. Under torchrun the processes share the combinations, each on its own GPU; with
`--processes-per-run all` they share the images of one run after another.
"""

import argparse
import os
import shlex
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from sparsity_factory import (
    PRUNERS,
    RECONSTRUCTIONS,
    SCHEDULES,
    SCORES,
    Masks,
    PruningError,
    Recipe,
    Sparsifier,
    choose_layers,
    compute_masks,
    needs_of,
    parse_pattern,
    prunable_weights,
    sparsity_rows,
)
from sparsity_factory.method import check_method_options, options_of
from sparsity_factory.recipe import timed_fields
from trainer import plots
from trainer.arguments import (
    check_recipe,
    given,
    method_options,
    parse_args,
    recipe_of,
    refused_flags,
)
from trainer.builders import (
    build_dense_teacher,
    build_loaders,
    build_sparsifier,
    build_state,
    build_step_options,
    check_class_labels,
    choose_compute,
    load_start,
    prepare_model,
)
from trainer.calibration_images import Calibration
from trainer.epochs import Evaluator, train
from trainer.exit_status import exit_status
from trainer.parser import Parser
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
    args.command = shlex.join(["sweep.py", *argv])
    utils.show_progress(quiet=True)  # of each training; the sweep has lines of its own
    compute = choose_compute(args)

    if options.processes_per_run == "all":
        utils.init_process_group(
            compute.device, args.dist_url, args.distributed, args.world_size, args.dist_timeout
        )
        rank = utils.rank()
        processes = utils.world_size()
        mine = slice(None)
    else:  # no process group: each process measures tasks of its own
        rank = int(os.environ.get("RANK", 0))
        processes = int(os.environ.get("WORLD_SIZE", 1))
        mine = slice(rank, None, processes)

    table = Table(options.output_dir, args, utils.world_size())
    with StopSignals() as stop:
        try:
            bench = Workbench(args, compute, stop)
            tasks = plan(options, bench)
            bench.check(tasks)
            utils.on_first_process(lambda: table.folder.open(first=rank == 0))
            progress = Progress(tasks, table, shown=rank == 0 and not args.quiet)
            measured = measure(tasks, mine, bench, table, progress)
            if rank == 0 or options.processes_per_run == "1":
                wait_for_all(tasks, measured, table, progress, stop)
        except Stopped as stopped:
            stopped.args = (
                f"stopped by {stopped.name}; the same command does what is missing in "
                f"{options.output_dir}",
            )
            raise

    if rank == 0:
        progress.close()
        table.sort(tasks)
        command = f"{_launcher(processes)} {args.command}"
        write_results(options, bench.args, table, tasks, command, utils.versions(compute.device))
    return 0


def parse_sweep_args(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The sweep's options, and main.py's arguments that its runs share. Raises UserError."""
    options, others = sweep_parser().parse_known_args(argv)
    if flags := refused_flags(given(others)):
        instead = f"; see {flags[0].instead}" if flags[0].instead else ""
        raise UserError(f"{flags[0]}: not with a sweep{instead}")
    args = parse_args([*others, "--output_dir", options.output_dir], one_recipe=False)

    # A preset may have values for a run of main.py, which the sweep ignores
    ignored = refused_flags(args.given)
    if ignored and os.environ.get("RANK", "0") == "0":
        names = ", ".join(map(str, ignored))
        print(f"--config {args.config}: the sweep has flags of its own for {names}", flush=True)

    # By default what main.py's arguments say, of all pruners
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


# fmt: off


def sweep_parser() -> Parser:
    parser = Parser("sweep.py", __doc__, allow_abbrev=False)
    add = parser.add_argument

    # What is crossed
    add("--pruners", nargs="*", choices=AUTOMATIC,
        help="what to compare; by default all of them, and with --sensitivity none")
    add("--scores", nargs="+", choices=list(SCORES), help="magnitude by default")
    add("--patterns", nargs="+",
        help="unstructured by default; a pattern with a sparsity of its own, such as 2:4, is "
             "crossed with neither pruners nor sparsities")
    add("--schedules", nargs="+", choices=list(SCHEDULES),
        help="one-shot by default; only that is also measured right after pruning")
    add("--reconstructions", nargs="+", choices=list(RECONSTRUCTIONS), help="none by default")
    add("--sparsities", nargs="+", type=float, default=[0.5, 0.65, 0.8, 0.9], help="each in [0, 1)")
    add("--custom-configs", nargs="+", default=[], metavar="FILE",
        help="YAML files, each measured at the sparsity it reaches, with each score and schedule")
    add("--seeds", nargs="+", type=int, help="finetune once with each; --seed by default")

    # What is measured
    add("--finetune-epochs", type=int, default=0, help="epochs of finetuning; 0 for none")
    add("--sensitivity", action="store_true", help="prune one layer at a time, by magnitude")

    # Who does it, and where the results go
    add("--processes-per-run", choices=["1", "all"], default="1",
        help="under torchrun: each process takes combinations of its own, or all work on one")
    add("--output_dir", default="output/sweep", metavar="DIR", help="folder for the results")
    return parser


# fmt: on


def check_options(options, args) -> None:
    """Raises UserError for options that no sweep can have, PruningError for an unknown pattern."""
    for sparsity in options.sparsities:
        if not 0 <= sparsity < 1:
            raise UserError(f"--sparsities {sparsity}: expected numbers in [0, 1)")
    if options.finetune_epochs < 0 or min(options.seeds) < 0:
        raise UserError("--finetune-epochs and --seeds: expected numbers of at least 0")
    for pattern in options.patterns:
        parse_pattern(pattern)

    # Options of one method are for the combinations with it
    known = {}
    crossed = (options.pruners, options.scores, options.schedules, options.reconstructions)
    for registry, names in zip((PRUNERS, SCORES, SCHEDULES, RECONSTRUCTIONS), crossed, strict=True):
        for name in names:
            known |= options_of(registry, name)
    check_method_options(method_options(args.method_options), known, flags=True)

    schedules = " ".join(options.schedules)
    if set(options.schedules) != {"one-shot"} and not options.finetune_epochs:
        raise UserError(f"--schedules {schedules} needs --finetune-epochs of at least 1 as well")
    used = {name for schedule in options.schedules for name in SCHEDULES[schedule].uses}
    for name in sorted(timed_fields() - used):
        if name in args.given:
            raise UserError(
                f"--{name.replace('_', '-')}: not with --schedules {schedules}, which do not use it"
            )


def plan(options, bench: "Workbench") -> list[Task]:
    """The accuracies to measure, the dense one first.

    Raises PruningError for a YAML file that does not fit the model.
    """
    sparsities = sorted(set(options.sparsities))
    places = [*crossed(options, sparsities), *of_custom_configs(options, bench.model)]

    def task(kind, combination, sparsity, seed=None):
        return Task(kind, sparsity=sparsity, seed=seed, **combination._asdict())

    tasks = [Task(DENSE)]
    tasks += [task(ONE_SHOT, *place) for place in places if place[0].schedule == "one-shot"]
    if options.finetune_epochs:
        seeds = dict.fromkeys(options.seeds)
        tasks += [task(FINETUNED, *place, seed) for seed in seeds for place in places]
    if options.sensitivity:
        names = prunable_weights(bench.model)
        tasks += [Task(LAYER, name, sparsity) for name in names for sparsity in sparsities]
    return tasks


def crossed(options, sparsities: list[float]) -> list[tuple[Combination, float]]:
    """Every combination of the options, at each sparsity or at the one of its pattern."""
    pruners = dict.fromkeys(options.pruners)
    scores = dict.fromkeys(options.scores)
    schedules = dict.fromkeys(options.schedules)
    reconstructions = dict.fromkeys(options.reconstructions)
    own = {pattern: parse_pattern(pattern).sparsity for pattern in options.patterns}
    free = [pattern for pattern in own if own[pattern] is None]
    fixed = [pattern for pattern in own if own[pattern] is not None]

    places = [
        (Combination(*choices), sparsity)
        for *choices, sparsity in product(
            pruners, scores, free, schedules, reconstructions, sparsities
        )
    ]
    places += [
        (Combination("unif", *choices), round(own[choices[1]], 6))
        for choices in product(scores, fixed, schedules, reconstructions)
    ]
    return places


def of_custom_configs(options, model: torch.nn.Module) -> list[tuple[Combination, float]]:
    """Every combination of the YAML files, each at the sparsity that it reaches on the model."""
    scores = dict.fromkeys(options.scores)
    schedules = dict.fromkeys(options.schedules)
    reconstructions = dict.fromkeys(options.reconstructions)
    places = []
    for path in dict.fromkeys(options.custom_configs):
        masks = compute_masks(model, "custom", custom_config=path)
        sparsity = round(_pruned(masks), 6)
        checksum = f"{zlib.crc32(Path(path).read_bytes()):08x}"

        file = Combination(path, config=checksum)
        places += [
            (file._replace(score=score, schedule=schedule, reconstruct=reconstruct), sparsity)
            for score, schedule, reconstruct in product(scores, schedules, reconstructions)
        ]
    return places


def measure(
    tasks: list[Task], mine: slice, bench: "Workbench", table: Table, progress: "Progress"
) -> dict[Task, Outcome]:
    """Measures the tasks of this process, `tasks[mine]`, that the table lacks; returns these."""
    # What is done is left out only here: processes see it at different times, and must share alike
    done = utils.on_first_process(table.outcomes)
    measured = {}
    for task in tasks[mine]:
        if task in done:
            continue
        outcome = bench.outcome(task)
        measured[task] = outcome
        utils.on_first_process(lambda task=task, outcome=outcome: table.add(task, outcome))
        progress.show()
    return measured


def wait_for_all(
    tasks: list[Task],
    measured: dict[Task, Outcome],
    table: Table,
    progress: "Progress",
    stop: StopSignals,
) -> None:
    """Returns when the table has all tasks; the other processes may still be at work.

    A line that is lost, as may happen on NFS without locks, is written again by its process, the
    only one that knows it.
    """
    while missing := set(tasks) - set(table.outcomes()):
        for task in missing & measured.keys():
            table.add(task, measured[task])
        time.sleep(0.5)
        stop.check_alone()
        progress.show()


class Workbench:
    """The data and the dense model, with which one accuracy after another is measured."""

    def __init__(self, args, compute: Compute, stop: StopSignals):
        args, checkpoint = load_start(args)
        self.args = args
        self.compute = compute
        self.stop = stop

        # The data, and the dense model
        utils.seed_everything(utils.INIT, args.seed)
        self.loaders = build_loaders(args, compute.device)
        num_classes = self.loaders.num_classes
        check_class_labels(args, checkpoint, self.loaders.classes)
        self.model = prepare_model(args, num_classes, checkpoint, compute.device)
        if args.layers:
            choose_layers(self.model, args.layers)
        self.dense = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.statistics = {}  # of the dense model
        self.test = Evaluator(
            self.loaders.val, args, compute, stop, {}, self.loaders.training_images
        )
        self.epoch_steps = self.loaders.steps_of_epoch(args.accum_iter)
        if not args.epochs:
            return

        # What a finetuning needs
        self.teacher = build_dense_teacher(
            args, num_classes, self.model, checkpoint, compute.device
        )
        self.options = build_step_options(args, num_classes, compute, self.teacher)

        # A mistake in the optimizer's arguments shows here, before anything is measured
        sparsifier = Sparsifier(self.model, Recipe(), total_steps=1, epoch_steps=1)
        build_state(args, self.model, sparsifier, {}, compute, None)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises PruningError if every recipe is refused, UserError without calibration images."""
        runs = [self.arguments(task) for task in tasks if task.kind in (ONE_SHOT, FINETUNED)]
        reasons = [_why_not(lambda run=run: check_recipe(run)) for run in runs]
        if runs and all(reasons):
            raise PruningError(reasons[0])

        # Drawing the images for one of the recipes shows whether there are enough
        allowed = [run for run, reason in zip(runs, reasons, strict=True) if not reason]
        looking = [run for run in allowed if recipe_of(run).looks_at_data]
        if looking:
            Calibration(
                looking[0], self.model, self.compute, training_images=self.loaders.training_images
            )

    def outcome(self, task: Task) -> Outcome:
        """Measures the accuracy of a task; an error becomes its outcome, as others may succeed."""
        self.model.load_state_dict(self.dense)
        self.model.zero_grad()

        failures = (PruningError, DivergedError)
        # If one process of several had no memory left, the others would wait for it
        if utils.world_size() == 1:
            failures += (torch.OutOfMemoryError,)
        try:
            return self._measure(task)
        except failures as error:
            return Outcome(None, error=first_line(error))

    def _measure(self, task: Task) -> Outcome:
        if task.kind == DENSE:
            return Outcome(self.test(self.model)["acc1"])

        if task.kind == LAYER:
            level = {"default": "dense", task.name: task.sparsity}
            config = {"sparsity": {"mode": "unstructured", "level": level}}
            masks = Masks(self.model, compute_masks(self.model, "custom", custom_config=config))
            return Outcome(self.test(self.model)["acc1"], masks.sparsity())

        args = self.arguments(task)
        if reason := _why_not(lambda: self._try(args)):
            return Outcome(None, error=REFUSED + reason)
        if task.kind == FINETUNED:
            return self._finetune(args)
        sparsifier = self.sparsifier(args, {})
        sparsifier.start()
        return Outcome(self.test(self.model)["acc1"], sparsifier.masks.sparsity())

    def arguments(self, task: Task) -> argparse.Namespace:
        """The arguments of a run, with the defaults of those that its methods do not use."""
        folder = Path(self.args.output_dir, "runs", task.run)
        values = {
            **vars(self.args),
            **task.choices,
            "seed": self.args.seed if task.seed is None else task.seed,
            "output_dir": str(folder),
            "resume": "auto",
            "finetune": "",  # the dense weights are here already
            "use_ema": False,
        }

        recipe = recipe_of(argparse.Namespace(**values)).with_schedule(task.schedule)
        timed = {name: getattr(recipe, name) for name in timed_fields()}
        given = recipe.method_options or {}
        timed["method_options"] = [f"{name}={value}" for name, value in given.items()]
        return argparse.Namespace(**{**values, **timed})

    def sparsifier(self, args, checkpoint: dict) -> Sparsifier:
        """Prunes the model in a run with these arguments, which may resume from a checkpoint."""
        return build_sparsifier(
            args,
            self.model,
            checkpoint,
            self.epoch_steps,
            self.compute,
            self.statistics,
            self.loaders.training_images,
        )

    def _try(self, args) -> None:
        """Raises PruningError for what recipe or model refuse.

        Scores decide nothing here, so none is computed from images.
        """
        check_recipe(args)
        recipe = recipe_of(args)
        pruner = "unif" if needs_of(recipe.pruner) else recipe.pruner
        Sparsifier(
            self.model,
            recipe.replaced(score="magnitude", pruner=pruner, permute=False),
            epoch_steps=self.epoch_steps,
            total_steps=max(args.epochs, 1) * self.epoch_steps,
        ).first_masks()

    def _finetune(self, args) -> Outcome:
        """A run as main.py makes it, from the dense weights or the checkpoint in its folder."""
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
            self.loaders.train.dataset.bad,
            self.teacher,
            self.loaders.classes,
        )
        results = open_results(
            args, sparsifier.recipe, state, self.loaders.train, self.loaders.val, self.compute
        )

        # Weights change only after all that may be refused was refused
        if first_masks:
            sparsifier.start(first_masks)
        image = torch.zeros(1, 3, args.input_size, args.input_size, device=self.compute.device)
        results.start(self.model, sparsity_rows(self.model, sparsifier.masks), {}, image)

        self.loaders.train.sampler.set_seed(args.seed)
        accuracy = train(state, self.options, self.loaders.train, self.test, self.stop, results)
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
            path = table.folder.results
            print(f"{path}: {len(self.seen)} of {len(tasks)} done before", flush=True)
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
            if task in self.seen or task not in outcomes:
                continue
            self.seen.add(task)
            outcome = outcomes[task]
            text = outcome.error if outcome.accuracy is None else f"{outcome.accuracy:.2f} %"
            tqdm.write(f"[{len(self.seen)}/{len(self.tasks)}] {task}: {text}", file=sys.stdout)
            sys.stdout.flush()
            self.bar.update()

    def close(self) -> None:
        self.bar.close()


def write_results(
    options, args, table: Table, tasks: list[Task], command: str, versions: str
) -> None:
    """Writes the pictures and sweep.md of the outcomes of `tasks`; prints the table."""
    wanted = set(tasks)
    outcomes = {task: outcome for task, outcome in table.outcomes().items() if task in wanted}
    accuracies = {
        task: outcome.accuracy for task, outcome in outcomes.items() if outcome.accuracy is not None
    }
    dense = accuracies.get(Task(DENSE))
    names = labels(
        task.combination for kind in (FINETUNED, ONE_SHOT) for task in tasks if task.kind == kind
    )
    model = args.model
    pictures = []

    if curves := _curves(accuracies, names):
        epochs = options.finetune_epochs
        finetuned = f"finetuned for {epochs} epoch{'s' * (epochs > 1)}"
        if len(options.seeds) > 1:
            finetuned += f",\nmean and range of {len(options.seeds)} seeds"
        picture = plots.sweep_lines(curves, dense, model, finetuned)
        table.folder.write("sweep.png", plots.png(picture))
        pictures.append("![Top-1 accuracy against sparsity](sweep.png)")

    drops = {
        (task.name, task.sparsity): dense - value
        for task, value in accuracies.items()
        if task.kind == LAYER
    }
    if drops:
        picture = plots.sensitivity_map(drops, f"{model}, one layer pruned at a time")
        table.folder.write("sensitivity.png", plots.png(picture))
        pictures.append("![Accuracy lost by pruning each layer alone](sensitivity.png)")

    text = "\n".join(_table(outcomes, names, dense))
    facts = [f"- versions: {versions}"]
    if args.method_options:
        facts.append(f"- method options: {' '.join(args.method_options)}")
    parts = [f"# {model}, a sweep", f"    {command}", text, *pictures, "\n".join(facts)]
    table.folder.write("sweep.md", "\n\n".join(parts).encode() + b"\n")

    print(text)
    written = [path.name for path in table.folder.path.iterdir()]
    written = [name for name in sorted(written) if name.startswith(("sweep.", "sensitivity."))]
    print(f"Written to {options.output_dir}: {', '.join(written)}")


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
    """The lines of a Markdown table of accuracies, and of lists for what does not fit into it."""
    places = {(task.combination, task.sparsity) for task in outcomes if task.combination in names}
    rows = [combination for combination in names if not combination.sets_sparsity]
    sparsities = sorted({sparsity for combination, sparsity in places if combination in rows})
    lines = []

    # Combinations by sparsity
    if rows:
        head = " | ".join(f"{100 * sparsity:g} %" for sparsity in sparsities)
        lines.append(f"| top-1 in % | {head} |")
        lines.append("| --- |" + " --- |" * len(sparsities))
        for combination in rows:
            cells = [_cell(outcomes, combination, sparsity) for sparsity in sparsities]
            lines.append(f"| `{names[combination]}` | " + " | ".join(cells) + " |")
        lines.append("")

    # Combinations that have one sparsity only
    for combination in names:
        for place, sparsity in places:
            if place == combination and combination not in rows:
                cell = _cell(outcomes, combination, sparsity)
                lines.append(f"- `{names[combination]}`, {100 * sparsity:.2f} % pruned: {cell}")

    if dense is not None:
        lines.append(f"- dense: {dense:.2f}")

    # Failures; sparsities that share a reason share a line
    failed = {}
    for task, outcome in outcomes.items():
        if outcome.error:
            name = names.get(task.combination, task.name)
            failed.setdefault((name, outcome.error), {})[f"{100 * task.sparsity:.4g}"] = None
    for (name, error), levels in failed.items():
        lines.append(f"- {name} at {', '.join(levels)} %: {error}")
    return lines


def _cell(outcomes: Mapping[Task, Outcome], combination: Combination, sparsity: float) -> str:
    """The accuracy right after pruning, then those after finetuning; or `refused` or `failed`."""
    mine = {
        task: outcome
        for task, outcome in outcomes.items()
        if (task.combination, task.sparsity) == (combination, sparsity) and task.kind != LAYER
    }
    found = {ONE_SHOT: [], FINETUNED: []}
    for task, outcome in mine.items():
        if outcome.accuracy is not None:
            found[task.kind].append(outcome.accuracy)

    if any(found.values()):
        parts = [f"{value:.2f}" for value in found[ONE_SHOT]]
        return " → ".join(filter(None, [*parts, mean_and_range(found[FINETUNED])]))
    if not mine:
        return ""
    refused = any(outcome.error.startswith(REFUSED) for outcome in mine.values())
    return "refused" if refused else "failed"


def _why_not(check) -> str:
    """The first line of the PruningError that `check()` raises; empty if it raises none."""
    try:
        check()
    except PruningError as error:
        return first_line(error)
    return ""


def _pruned(masks: Mapping[str, torch.Tensor]) -> float:
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.count_nonzero()) for mask in masks.values()) / total


def _launcher(processes: int) -> str:
    """The command that starts so many processes on machines like this one."""
    if processes == 1:
        return "python"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: sweep(sys.argv[1:])))
