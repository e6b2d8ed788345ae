"""The command line: DeiT's arguments, the pruning ones, and YAML files of defaults."""

import argparse
import contextlib
import shlex
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import timm

from datasets import DATA_SETS
from models import PARAMETER_KINDS, timm_name
from sparsity_factory import (
    PRUNERS,
    RECONSTRUCTIONS,
    SCHEDULES,
    SCORES,
    PruningError,
    Recipe,
    parse_pattern,
    read_yaml,
)
from sparsity_factory.custom_yaml import level_section
from sparsity_factory.errors import short
from sparsity_factory.statistics import OF_GRADIENTS
from utils import TIMEOUT, UserError, available_cores, log, processes_here

from .argument_checks import check_args, check_headless
from .parser import FREE, REFUSED, Extend, Flag, Group, Help, Parser

SAMPLE_PRESET = Path(__file__).resolve().parent.parent / "configs" / "run" / "sample.yaml"


def parse_args(argv: list[str], one_recipe: bool = True) -> argparse.Namespace:
    """The arguments of `argv`, with defaults from `--config` and, without a data set, the sample's.

    `given` in the result lists the arguments that `argv` or `--config` set, `command` is the
    command line, and `default_folder` is whether `argv` leaves the output folder open.
    one_recipe: the pruning arguments belong to one run. A sweep makes many recipes of them, and
    checks each itself. Raises UserError for any mistake that shows before a file of the data set
    or a model is read.
    """
    args = get_args_parser().parse_args(argv)
    config = read_preset(args.config) if args.config else {}
    args = get_args_parser(config).parse_args(argv)

    if not args.data_path:
        sample = read_preset(SAMPLE_PRESET)
        args = get_args_parser({**sample, **config}).parse_args(argv)
        if args.model != sample["model"]:  # another model has DeiT's own input size
            del sample["input_size"]
            args = get_args_parser({**sample, **config}).parse_args(argv)

    check_args(args)
    if one_recipe:
        check_recipe(args)

    args.command = shlex.join(["main.py", *argv])
    typed = given(argv)
    args.given = sorted(typed | config.keys())
    args.default_folder = "output_dir" not in typed
    if "num_workers" not in args.given:
        args.num_workers = fitting_workers(args.num_workers)
    return args


def fitting_workers(wanted: int) -> int:
    """How many data workers a process has: those that are wanted, or one for each of its cores."""
    return min(wanted, max(1, available_cores() // processes_here()))


def continued_args(args: argparse.Namespace, saved, source: str) -> argparse.Namespace:
    """The arguments of a run that resumes from the checkpoint `source`, written with `saved`.

    All that changes results comes from the checkpoint. Arguments that are given replace it, and a
    message says what changed. Raises UserError for another optimizer or schedule, for other
    `--train-only`, and for saved values that no run can have.
    """
    saved = dict(_as_dict(saved))
    if not timm.is_model(timm_name(str(saved.get("model")))):
        saved.pop("model", None)

    continued = dict(vars(args))
    if saved.get("data_path") and not args.data_path:
        continued |= _without_sample(args)
    changed = []
    for flag in get_args_parser().flags:
        name = flag.name
        if not flag.continues or name not in saved:
            continue

        value = flag.read(saved[name], f"{source}: {name}")
        if name not in args.given:
            continued[name] = value
        elif value != continued[name]:
            if name in ("opt", "sched", "train_only"):
                raise UserError(
                    f"{flag} {continued[name]}: {source} is of a run with {flag} {value}"
                )
            changed.append(f"{flag} {continued[name]} instead of {value}")

    if changed:
        log(f"The run resumes with {', '.join(changed)}")
    result = argparse.Namespace(**continued)
    check_args(result)
    check_recipe(result)
    return result


def with_model_of(args: argparse.Namespace, checkpoint: dict, source: str) -> argparse.Namespace:
    """The arguments with the model and input size of a checkpoint, unless they are given.

    Raises UserError if neither the arguments nor the checkpoint name the model.
    """
    saved = _as_dict(checkpoint.get("args"))
    if "model" not in args.given and "model" not in saved:
        raise UserError(
            f"{source}: does not say of which model it is; such a file needs --model and "
            "--input-size as well"
        )
    wanted = {"model", "model_kwargs", "input_size"} & (saved.keys() - args.given)
    own = {
        flag.name: flag.read(saved[flag.name], f"{source}: {flag.name}")
        for flag in get_args_parser().flags
        if flag.name in wanted
    }
    return argparse.Namespace(**{**vars(args), **own})


def with_saved_model(args: argparse.Namespace, checkpoint: dict, source: str) -> argparse.Namespace:
    """As `with_model_of`, unless the checkpoint names no model of timm: then nothing changes."""
    name = str(_as_dict(checkpoint.get("args")).get("model"))
    if "model" in args.given or not timm.is_model(timm_name(name)):
        return args
    own = with_model_of(args, checkpoint, source)
    if (own.model, own.input_size) != (args.model, args.input_size):
        log(f"{source}: of {own.model}, for images of {own.input_size} pixels")
    own.given = sorted({*args.given, "model", "model_kwargs", "input_size"})
    return own


def without_head(args: argparse.Namespace, checkpoint: dict) -> argparse.Namespace:
    """The arguments with `--num-classes 0` if the checkpoint is of a run with that.

    Raises UserError or PruningError for arguments that no such run can have.
    """
    saved = _as_dict(checkpoint.get("args"))
    if "num_classes" in args.given or saved.get("num_classes") != 0:
        return args
    args = argparse.Namespace(**{**vars(args), "num_classes": 0})
    check_headless(args)
    check_recipe(args)
    return args


def with_saved_tokens(
    args: argparse.Namespace, checkpoint: dict, source: str
) -> argparse.Namespace:
    """The arguments with `--tokens` as the run of a checkpoint had it, unless it is given."""
    saved = _as_dict(checkpoint.get("args"))
    if "tokens" in args.given or "tokens" not in saved:
        return args
    flag = next(flag for flag in get_args_parser().flags if flag.name == "tokens")
    tokens = flag.read(saved["tokens"], f"{source}: tokens")
    if tokens:
        log(f"{source}: of a run with --tokens {tokens}")
    return argparse.Namespace(**{**vars(args), "tokens": tokens})


def get_args_parser(defaults: dict | None = None) -> Parser:
    """DeiT's arguments and those of pruning; `defaults` replaces some of theirs, by name."""
    parser = Parser(
        "main.py",
        "Prunes a vision transformer and finetunes it, with DeiT's recipe.",
        formatter_class=Help,
    )
    _add_run(Group(parser, "run"))
    # A resumed run has the recipe in its checkpoint, and others are refused
    _add_pruning(Group(parser, "pruning", continues=False))
    _add_model(Group(parser, "model"))
    _add_optimizer(Group(parser, "optimizer and schedule"))
    _add_distillation(Group(parser, "distillation"))
    _add_data(Group(parser, "data and augmentation"))
    parser.set_defaults(**(defaults or {}))
    return parser


def given(argv: list[str]) -> set[str]:
    """The names of the arguments that a command line sets."""
    parser = get_args_parser()
    unset = object()
    names = [flag.name for flag in parser.flags]
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name in names if getattr(args, name) is not unset}


def shared_flags() -> list[Flag]:
    """The flags on which all starts of a sweep or of a search must agree."""
    return [flag for flag in get_args_parser().flags if flag.sweep != FREE]


def refused_flags(names: Collection[str]) -> list[Flag]:
    """The flags of these arguments that sweeps and searches refuse."""
    flags = get_args_parser().flags
    return [flag for flag in flags if flag.sweep == REFUSED and flag.name in names]


def read_preset(path) -> dict:
    """A YAML file of defaults: `batch_size: 64` or `batch-size: 64`. Raises UserError."""
    try:
        content = read_yaml(path)
    except PruningError as error:
        raise UserError(str(error)) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of arguments to values")

    flags = {flag.name: flag for flag in get_args_parser().flags if flag.name != "config"}
    preset = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in flags:
            raise UserError(f"{path}: {key}: no such argument")
        preset[name] = flags[name].read(value, f"{path}: {key}")
    return preset


def recipe_of(args) -> Recipe:
    """The recipe that the arguments ask for. Raises PruningError if its YAML file is wrong."""
    choices = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    if args.custom_config:
        choices["custom_config"] = read_yaml(args.custom_config)
        # An error names the file if it is no configuration
        level_section(choices["custom_config"], args.custom_config)
    choices["method_options"] = method_options(args.method_options)
    if args.pruner is None and parse_pattern(args.pattern).sparsity is not None:
        choices["pruner"] = "unif"  # n:m says how much every layer keeps
    return Recipe(**choices)


def method_options(texts: list[str] | None) -> dict[str, float] | None:
    """The options of `--method-options` by name; of one that is given twice, the later value.

    Raises UserError for a text that is not NAME=VALUE.
    """
    found = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(
                f"--method-options {short(text)}: expected NAME=VALUE with a number, such as "
                "owl.lambda=0.1"
            ) from None
        with contextlib.suppress(ValueError):
            found[name] = int(value)
    return found or None


def check_recipe(args) -> None:
    """Raises PruningError or UserError for pruning arguments that make no sense."""
    with naming_the_config(args.custom_config):
        recipe = recipe_of(args)
        recipe.check(args.epochs or None)

    if args.num_classes == 0 and recipe.needs & OF_GRADIENTS:
        raise PruningError(
            f"{recipe.in_words()}: needs the gradient of a loss, so labels, and --num-classes 0 "
            "uses none"
        )
    if args.compare and recipe.pruner:
        raise UserError(
            "--compare: not together with --pruner or --pattern, which compare with the model "
            "before pruning"
        )
    if args.keep_zeros and recipe.pruner:
        raise UserError("--keep-zeros: not together with --pruner or --pattern, which choose anew")
    if not args.shrink:
        return
    if not recipe.structured:
        raise UserError(
            "--shrink needs --pattern heads, neurons or heads+neurons as well, or units in the "
            "custom YAML"
        )
    if recipe.prune_schedule != "one-shot":
        raise UserError(f"--shrink needs --prune-schedule one-shot, not {recipe.prune_schedule}")


@contextlib.contextmanager
def naming_the_config(path: str | None):
    """An error in a custom configuration names the file that it was read from."""
    try:
        yield
    except PruningError as error:
        if path and str(error).startswith("custom_config"):
            raise PruningError(path + str(error).removeprefix("custom_config")) from None
        raise


# ---- helpers, not exported ----


def _without_sample(args: argparse.Namespace) -> dict:
    """The defaults of the arguments that are not given, for data that are not the sample's."""
    defaults = vars(get_args_parser().parse_args([]))
    defaults["num_workers"] = fitting_workers(defaults["num_workers"])
    return {name: value for name, value in defaults.items() if name not in args.given}


def _as_dict(saved) -> dict:
    """The arguments of a checkpoint; DeiT's own checkpoints hold a Namespace."""
    return saved if isinstance(saved, dict) else getattr(saved, "__dict__", {})


# The tables of arguments: name, type, default, what sweeps make of it, help.
# fmt: off


def _add_run(group: Group) -> None:
    add, switch = group.add, group.switch
    add("--config", str, None, metavar="FILE", sweep=FREE,
        help="YAML file of defaults for any of these arguments; flags win")

    # How much is trained
    add("--batch-size", int, 64, help="images per batch, in each process")
    add("--accum-iter", int, 1, metavar="N",
        help="optimizer steps take the mean gradient of N batches; the scaling of --lr counts "
             "their images")
    add("--epochs", int, 300, continues=True, sweep=REFUSED, instead="--finetune-epochs",
        help="passes over the training images")
    add("--start_epoch", int, 0, help="first epoch; --resume sets it")
    add("--seed", int, 0, help="decides every random choice")

    # What is written and shown
    add("--output_dir", str, "", metavar="DIR", sweep=FREE,
        help="folder for checkpoints, log.txt, tables and pictures; empty writes nothing")
    add("--checkpoint-every", int, 0, metavar="STEPS", sweep=FREE,
        help="steps between checkpoints within an epoch; 0 writes one after each epoch only")
    add("--save-every", int, 1, metavar="EPOCHS", sweep=FREE,
        help="epochs between checkpoints; the last epoch and one that is the best so far are "
             "always written")
    switch("async-save", True, sweep=FREE,
           help="write checkpoints in a thread, from a copy in the CPU's memory, while the "
                "training continues")
    add("--eval-every", int, 1, metavar="EPOCHS",
        help="epochs between evaluations; the last epoch is always evaluated")
    add("--print-freq", int, 50, metavar="STEPS", sweep=FREE,
        help="steps between two lines of the log; a terminal shows a bar instead")
    add("--quiet", bool, False, sweep=FREE,
        help="print nothing but the accuracies at the end, and errors")
    add("--tensorboard", bool, False, sweep=REFUSED,
        help="log to tensorboard/ in --output_dir as well; needs its package")
    add("--wandb", bool, False, sweep=REFUSED,
        help="log to Weights & Biases as well; needs its package")

    add("--overwrite", bool, False, sweep=REFUSED,
        help="replace the run that --output_dir holds; without it, a new run there is refused")

    # What is done with a checkpoint
    add("--resume", str, "", metavar="FILE", sweep=REFUSED,
        help="checkpoint (file or URL) of a run to continue or evaluate; auto takes the newest "
             "in --output_dir, if any")
    add("--eval", bool, False, sweep=REFUSED,
        help="only evaluate, after pruning if a pruner is given")
    add("--compare", str, "", metavar="FILE", sweep=REFUSED,
        help="with --eval: say what differs from the predictions of another checkpoint of the "
             "model, such as the dense one, or of timm's weights (timm)")
    add("--audit", str, "", metavar="FILE", sweep=REFUSED,
        help="only print what a file keeps of each layer and which patterns that obeys; check "
             "its masks, if it has any")
    add("--expect", str, None, nargs="+", action=Extend, metavar="PATTERN", sweep=REFUSED,
        help="with --audit: exit with 1 if the layers with zeros do not obey a pattern such as "
             "2:4, or if the sparsity is not a number such as 0.8")
    add("--export", str, "", metavar="DIR", sweep=REFUSED,
        help="only write the model of --resume to a new folder, for use without this project: "
             "state dict, torch.export program, ONNX")
    add("--sparse-kernels", bool, False, sweep=REFUSED,
        help="with --eval or --export: skip the zeros of each layer that measurably runs faster "
             "without them")

    # Where and how it is computed
    add("--device", str, "auto", sweep=FREE,
        help="cuda, cpu, or auto, which is cuda if there is a GPU")
    add("--amp", str, "auto", choices=["auto", "bfloat16", "float16", "off"],
        help="precision of the forward pass; auto takes the fastest one that the device has in "
             "hardware")
    switch("tf32", True,
           help="on a GPU, round the factors of float32 products to TensorFloat-32, except where "
                "weights are scored or reconstructed")
    switch("cudnn-benchmark", True, sweep=FREE,
           help="on a GPU, time the algorithms of convolutions and take the fastest")
    add("--compile", bool, False,
        help="torch.compile the model: takes minutes at first, needs a C++ compiler")
    add("--compile-mode", str, "default",
        help="mode of torch.compile, such as reduce-overhead or max-autotune")

    # Several processes
    switch("dist-eval", True, sweep=FREE,
           help="share the evaluation among the processes; its figures do not depend on it")
    add("--dist-bn", str, "reduce", choices=["reduce", "broadcast", "none"],
        help="statistics of batch norm after each epoch: the mean of all processes, those of the "
             "first, or of each its own")
    add("--sync-bn", bool, False,
        help="batch norm over the images of all processes, on GPUs")
    switch("static-graph", True, sweep=FREE,
           help="let several processes rely on it that each step uses the same weights")
    add("--dist-timeout", float, TIMEOUT, metavar="SECONDS", sweep=FREE,
        help="how long processes wait for each other, for example for one that writes a "
             "checkpoint, before the run fails")
    add("--dist_url", str, "env://", sweep=FREE, help="how the processes find each other")
    add("--distributed", bool, False, sweep=FREE,
        help="insist on more than one process, as torchrun or SLURM starts them")
    add("--world_size", int, 1, sweep=FREE,
        help="insist on this many processes, if it is more than one")


def _add_pruning(group: Group) -> None:
    add = group.add
    add("--list-methods", bool, False, sweep=REFUSED,
        help="only print what each method does, and which combinations are refused")

    # Which weights
    add("--pruner", str, None, choices=list(PRUNERS), sweep=REFUSED, instead="--pruners",
        help="how the sparsity is shared among layers; without it nothing is pruned")
    add("--score", str, Recipe.score, choices=list(SCORES), sweep=REFUSED, instead="--scores",
        help="how much a weight matters; all but magnitude and random look at training images")
    add("--pattern", str, Recipe.pattern, sweep=REFUSED, instead="--patterns",
        help="what is pruned together: unstructured, row, 2:4 (any n:m; without --sparsity), "
             "2:4t (along the outputs too), x:4 (n by layer), block:16x16, heads, neurons, "
             "heads+neurons")
    add("--permute", bool, False,
        help="with n:m, n:mt, x:m: first reorder the inputs of layers, and what feeds them, so "
             "that groups keep more")
    add("--shrink", bool, False, sweep=REFUSED,
        help="with heads and neurons: take what is pruned out of the model before it is "
             "finetuned, which is faster")

    # How many
    add("--sparsity", float, None, metavar="FRACTION", sweep=REFUSED, instead="--sparsities",
        help="fraction of the prunable weights to remove, in [0, 1)")
    add("--budget", str, Recipe.budget, choices=["weights", "macs"],
        help="what --sparsity is a fraction of, with heads and neurons: weights, or "
             "multiply-adds of an image")
    add("--custom-config", str, None, metavar="FILE", sweep=REFUSED, instead="--custom-configs",
        help="YAML file with the sparsity of each layer, for --pruner custom")

    # Of which layers
    add("--layers", str, None, nargs="+", action=Extend, metavar="PATTERN",
        help="prunable layers, such as 'blocks.*' '!blocks.0.*'; by default all linear layers but "
             "the classifier")

    # When
    add("--prune-schedule", str, Recipe.prune_schedule, choices=list(SCHEDULES),
        sweep=REFUSED, instead="--schedules", help="when masks are chosen and changed")
    add("--prune-start", float, Recipe.prune_start, metavar="FRACTION",
        help="when a schedule begins, as a fraction of the training")
    add("--prune-end", float, Recipe.prune_end, metavar="FRACTION",
        help="when it makes its last change, as a fraction of the training")
    add("--prune-every", int, Recipe.prune_every, metavar="STEPS",
        help="steps between changes, for gradual, set, rigl, ste and sr-ste")
    add("--prune-rounds", int, Recipe.prune_rounds, metavar="N",
        help="how often iterative prunes, and how many sparse phases ac-dc has")
    add("--rewind", int, None, metavar="EPOCH",
        help="epoch whose weights iterative restores after each round")
    add("--drop-fraction", float, Recipe.drop_fraction, metavar="FRACTION",
        help="share of the kept weights that set and rigl replace at first")
    add("--sr-decay", float, Recipe.sr_decay, metavar="DECAY",
        help="sr-ste adds this many times the pruned weights to their gradients")
    add("--mask-lr", float, Recipe.mask_lr, metavar="RATE",
        help="learning rate of the logits from which maskllm takes its masks")

    # How the rest makes up for them
    add("--reconstruct", str, Recipe.reconstruct, choices=list(RECONSTRUCTIONS),
        sweep=REFUSED, instead="--reconstructions",
        help="how the kept weights of a layer make up for the pruned ones")
    add("--calibration-images", int, Recipe.calibration_images, metavar="N",
        help="training images for the scores, pruners and reconstructions that look at images")
    add("--method-options", str, None, nargs="+", action=Extend, metavar="NAME=VALUE",
        help="numbers of the chosen methods, such as owl.lambda=0.1 obs.columns=128; "
             "--list-methods lists them")


def _add_model(group: Group) -> None:
    add, switch = group.add, group.switch
    add("--model", str, "deit_base_patch16_224", help="any vision transformer of timm")
    add("--model-kwargs", str, None, nargs="+", metavar="KEY=VALUE",
        help="arguments of the architecture, as timm has them, such as depth=6 embed_dim=192")
    add("--input-size", int, 224, help="side of the images, in pixels")
    add("--tokens", int, 0, metavar="R",
        help="merge R pairs of similar tokens in each block, so that fewer are computed")
    add("--drop", float, 0.0, help="dropout rate")
    add("--drop-path", float, 0.1, help="drop path rate")

    # Which weights it starts from, and which are trained
    add("--finetune", str, "", metavar="FILE", continues=False,
        help="checkpoint (file or URL) to take the weights from")
    add("--keep-zeros", bool, False, sweep=REFUSED,
        help="weights that are zero in the file of --finetune or --resume stay zero")
    switch("pretrained", True, continues=False,
           help="start from timm's weights, unless --finetune or --resume gives some")
    add("--attn-only", bool, False, help="train only attention, position embedding and head")
    add("--train-only", str, None, metavar="KINDS",
        help=f"train only these parameters, such as norms,biases,head; known are "
             f"{', '.join(PARAMETER_KINDS)}")
    switch("train-mode", True, help="train with drop path and dropout on")
    add("--grad-checkpointing", bool, False,
        help="keep few activations, and compute the others again in the backward pass: less "
             "memory, more time")

    # The moving average
    switch("model-ema", True, help="keep a moving average of the weights")
    add("--use-ema", bool, False, continues=False,
        help="with --finetune, or with --resume and --eval or --export: take the moving average "
             "of the checkpoint")
    add("--model-ema-decay", float, 0.99996, help="decay of the moving average")
    add("--model-ema-force-cpu", bool, False, help="keep the moving average in the CPU's memory")


def _add_optimizer(group: Group) -> None:
    add = group.add
    add("--opt", str, "adamw", help="any optimizer of timm")
    add("--opt-eps", float, 1e-8, help="epsilon of the optimizer")
    add("--opt-betas", float, None, nargs="+", help="betas of the optimizer; its own by default")
    add("--clip-grad", float, None,
        help="clip the norm of the gradients to this; by default it is not clipped")
    add("--momentum", float, 0.9, help="momentum of SGD")
    add("--weight-decay", float, 0.05, help="weight decay")
    add("--layer-decay", float, 1.0, metavar="FACTOR",
        help="factor in (0, 1] of the learning rate from each layer to the one below it; 1 gives "
             "all layers the same rate")

    # The learning rate
    add("--sched", str, "cosine", help="any learning-rate schedule of timm")
    add("--lr", float, 5e-4, help="learning rate for 512 images a step")
    add("--unscale-lr", bool, False, help="take --lr as it is, for any number of images a step")
    add("--lr-noise", float, None, nargs="+",
        help="fractions of the epochs between which noise is added to the rate")
    add("--lr-noise-pct", float, 0.67, help="limit of the noise")
    add("--lr-noise-std", float, 1.0, help="standard deviation of the noise")
    add("--warmup-lr", float, 1e-6, help="rate at the start of the warm-up")
    add("--min-lr", float, 1e-5, help="rate at the end of the schedule")
    add("--decay-epochs", float, 30, help="interval of the step schedule")
    add("--warmup-epochs", int, 5, help="epochs of linear warm-up")
    add("--cooldown-epochs", int, 10, help="epochs at the lowest rate after the schedule")
    add("--patience-epochs", int, 10, help="patience of the plateau schedule")
    add("--decay-rate", float, 0.1, also="--dr", help="factor of the step and plateau schedules")

    # The loss
    add("--smoothing", float, 0.1, help="label smoothing")
    add("--bce-loss", bool, False, help="binary cross-entropy for each class")


def _add_distillation(group: Group) -> None:
    add, switch = group.add, group.switch
    add("--distillation-type", str, "none", choices=["none", "soft", "hard"],
        help="what the second head of a distilled model learns: the teacher's logits, or its top "
             "class")
    add("--teacher-model", str, "regnety_160", help="any model of timm")
    add("--teacher-path", str, "", metavar="FILE", help="checkpoint (file or URL) of the teacher")
    switch("channels-last", True,
           help="on a GPU, lay out a convolutional teacher as channels last")
    add("--distillation-alpha", float, 0.5, help="share of the teacher in the loss")
    add("--distillation-tau", float, 1.0,
        help="temperature of soft distillation and of --dense-teacher")

    # Without a teacher of another architecture
    add("--dense-teacher", float, 0.0, metavar="WEIGHT",
        help="share of the loss, in [0, 1], that is the divergence from the model before it was "
             "pruned")
    add("--cosub", bool, False,
        help="co-train two submodels under drop path; with binary cross-entropy")


def _add_data(group: Group) -> None:
    add, switch = group.add, group.switch
    add("--data-path", str, "", metavar="DIR",
        help="the data set; without it the built-in sample is used")
    add("--data-set", str, "IMNET",
        help=f"kind of data set in --data-path: {', '.join(DATA_SETS)}; or timm:folder, "
             "timm:torch/NAME or timm:wds/NAME, read by timm")
    add("--train-split", str, "train", help="with --data-set timm:..., the split to train on")
    add("--val-split", str, "validation", help="with --data-set timm:..., the split to evaluate on")
    add("--num-classes", int, None,
        help="with --data-set timm:..., the number of classes, if the data do not tell; 0, with "
             "any data set: a model without a head, which learns the features of the dense one "
             "and is evaluated by its nearest training images")
    ranks = ["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"]
    add("--inat-category", str, "name", choices=ranks,
        help="rank of the taxonomy that labels iNaturalist's images")

    # How images are loaded
    add("--num_workers", int, 10, sweep=FREE,
        help="processes that load images, for each training process")
    add("--skip-bad-images", int, 0, metavar="N",
        help="replace up to N training images that cannot be read, each by the next one, and "
             "name them")
    switch("pin-mem", True, sweep=FREE, help="copy batches to the GPU from pinned memory")

    # How training images are changed
    switch("repeated-aug", True,
           help="show each drawn image three times an epoch, augmented differently")
    add("--crop-padding", int, 4,
        help="pixels around images of 32 x 32 and less, before a random crop")
    add("--color-jitter", float, 0.3,
        help="strength of colour jitter, if the policy of --aa leaves room for it")
    add("--aa", str, "rand-m9-mstd0.5-inc1", help="AutoAugment policy in timm's notation, or none")
    add("--ThreeAugment", bool, False,
        help="3-Augment instead of --aa: grayscale, solarization or blur")
    add("--src", bool, False, help="with --ThreeAugment: simple random crop, without zooming in")
    add("--train-interpolation", str, "bicubic", choices=["random", "bilinear", "bicubic"],
        help="how training images are scaled")
    add("--reprob", float, 0.25, help="probability of random erasing")
    add("--remode", str, "pixel", choices=["const", "rand", "pixel"],
        help="fill of random erasing: black, one random colour, or noise")
    add("--recount", int, 1, help="areas that random erasing clears")
    add("--resplit", bool, False, help="accepted but without effect, as in DeiT")

    # How they are mixed
    add("--mixup", float, 0.8, help="mixup alpha; 0 turns it off")
    add("--cutmix", float, 1.0, help="cutmix alpha; 0 turns it off")
    add("--cutmix-minmax", float, None, nargs="+",
        help="smallest and largest side of the cutmix box, as fractions")
    add("--mixup-prob", float, 1.0, help="probability of mixing a batch at all")
    add("--mixup-switch-prob", float, 0.5, help="probability of cutmix if both are on")
    add("--mixup-mode", str, "batch", choices=["batch", "pair", "elem"],
        help="which images share a mixing ratio")

    # How images are evaluated
    add("--eval-crop-ratio", float, 0.875,
        help="fraction of the resized image that evaluation sees")

    # How pixels are normalized
    add("--mean", float, None, nargs="+",
        help="mean of red, green and blue, in [0, 1]; by default that of the weights")
    add("--std", float, None, nargs="+",
        help="deviation of red, green and blue; by default that of the weights")


# fmt: on
