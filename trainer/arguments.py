"""The command line: DeiT's arguments, the pruning ones, and YAML files of defaults."""

import argparse
import contextlib
import shlex
from dataclasses import fields
from pathlib import Path

from datasets import DATA_SETS
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
from utils import TIMEOUT, UserError, available_cores, log, processes_here

from .argument_checks import check_args

SAMPLE_PRESET = Path(__file__).resolve().parent.parent / "configs" / "run" / "sample.yaml"


#: What a sweep makes of an argument: its runs share it, and two starts of one sweep have to agree
#: on it; or two starts may differ, since it changes no result; or the sweep has a flag of its own,
#: or none, in its place.
SHARED = "shared"
FREE = "free"
REFUSED = "refused"


def parse_args(argv: list[str], one_recipe: bool = True) -> argparse.Namespace:
    """The arguments of `argv`, over the defaults of `--config`, over the sample's where no data set
    is given.

    `given` in the result lists the arguments that `argv` or `--config` set, and `command` is the
    command line.
    one_recipe: the pruning arguments are those of a run; a sweep makes many recipes of them, and
    checks those. Raises UserError for anything that can be seen to be wrong before a file of the
    data set or a model is touched.
    """
    args = get_args_parser().parse_args(argv)
    config = read_preset(args.config) if args.config else {}
    args = get_args_parser(config).parse_args(argv)
    if not args.data_path:
        sample = read_preset(SAMPLE_PRESET)
        args = get_args_parser({**sample, **config}).parse_args(argv)
        if args.model != sample["model"]:  # another model brings DeiT's own input size
            del sample["input_size"]
            args = get_args_parser({**sample, **config}).parse_args(argv)
    check_args(args)
    if one_recipe:
        check_recipe(args)
    args.command = shlex.join(["main.py", *argv])
    args.given = sorted(given(argv) | config.keys())
    if "num_workers" not in args.given:
        args.num_workers = min(args.num_workers, max(1, available_cores() // processes_here()))
    return args


def continued_args(args: argparse.Namespace, saved, source: str) -> argparse.Namespace:
    """The arguments of a run that goes on from the checkpoint `source`, which was written with the
    arguments `saved`.

    Epochs, optimizer and schedule are those of the checkpoint, except where they are given: then a
    line says what changed. Raises UserError for another optimizer or schedule, and for saved values
    that no run can have.
    """
    # DeiT's own have a Namespace
    saved = saved if isinstance(saved, dict) else getattr(saved, "__dict__", {})
    continued, changed = dict(vars(args)), []
    for action in get_args_parser()._actions:
        name = action.dest
        if not getattr(action, "continues", False) or name not in saved:
            continue
        flag = f"--{name.replace('_', '-')}"
        value = _preset_value(action, saved[name], f"{source}: {name}")
        if name not in args.given:
            continued[name] = value
        elif value != continued[name]:
            if name in ("opt", "sched"):
                raise UserError(
                    f"{flag} {continued[name]}: {source} is of a run with {flag} {value}"
                )
            changed.append(f"{flag} {continued[name]} instead of {value}")
    if changed:
        log(f"The run goes on with {', '.join(changed)}")
    result = argparse.Namespace(**continued)
    check_args(result)
    check_recipe(result)
    return result


def with_model_of(args: argparse.Namespace, checkpoint: dict, source: str) -> argparse.Namespace:
    """The arguments with the model and the input size that a checkpoint was written with, except
    where they are given.

    Raises UserError where neither says which model it is.
    """
    saved = checkpoint.get("args")
    saved = saved if isinstance(saved, dict) else getattr(saved, "__dict__", {})
    if "model" not in args.given and "model" not in saved:
        raise UserError(
            f"{source}: does not say of which model it is; expected a checkpoint of main.py, or "
            "--model "
            "and --input-size beside it"
        )
    own = {
        action.dest: _preset_value(action, saved[action.dest], f"{source}: {action.dest}")
        for action in get_args_parser()._actions
        if action.dest in {"model", "model_kwargs", "input_size"} & saved.keys() - args.given
    }
    return argparse.Namespace(**{**vars(args), **own})


def get_args_parser(defaults: dict | None = None) -> argparse.ArgumentParser:
    """DeiT's arguments and those of pruning; `defaults` (by destination) replace the ones written
    here.
    """
    parser = _Parser(
        "main.py",
        description="Prunes a vision transformer and finetunes it, with DeiT's recipe.",
        formatter_class=_Help,
    )

    def group_of(title, continues=False):
        """Functions that add an argument, and a pair of on and off, to a new group of this title.

        sweep: see `SHARED`; instead: the flag of the sweep that takes the place of a refused one.
        continues: a resumed run has the checkpoint's value, unless the flag is given.
        """
        group = parser.add_argument_group(title)

        def add(*flags, sweep=SHARED, instead="", continues=continues, **options):
            action = group.add_argument(*flags, **options)
            action.sweep = sweep
            action.instead = instead
            action.continues = continues

        def switch(name, default, text, **options):
            options |= {"dest": name.replace("-", "_"), "default": default}
            add(f"--{name}", action="store_true", help=text, **options)
            add(f"--no-{name}", action="store_false", help="the opposite", **options)

        return add, switch

    add, switch = group_of("run")
    add(
        "--config",
        sweep=FREE,
        metavar="FILE",
        help="YAML file of defaults for any of these arguments; flags win",
    )
    add("--batch-size", type=int, default=64, help="images a batch, for each process")
    add(
        "--accum-iter",
        type=int,
        default=1,
        metavar="N",
        help="optimizer steps take the mean gradient of N batches; the scaling of --lr counts "
        "their images",
    )
    add(
        "--epochs",
        continues=True,
        sweep=REFUSED,
        instead="--finetune-epochs",
        type=int,
        default=300,
        help="passes over the training images",
    )
    add(
        "--output_dir",
        sweep=FREE,
        default="",
        metavar="DIR",
        help="where checkpoints, log.txt, tables and pictures go; empty writes nothing",
    )
    add(
        "--print-freq",
        sweep=FREE,
        type=int,
        default=10,
        metavar="STEPS",
        help="steps between two lines of the log; on a terminal a bar takes their place",
    )
    add(
        "--quiet",
        sweep=FREE,
        action="store_true",
        help="print nothing but the accuracies at the end, and errors",
    )
    add(
        "--tensorboard",
        sweep=REFUSED,
        action="store_true",
        help="log to tensorboard/ in --output_dir as well; needs its package",
    )
    add(
        "--wandb",
        sweep=REFUSED,
        action="store_true",
        help="log to Weights & Biases as well; needs its package",
    )
    add(
        "--device",
        sweep=FREE,
        default="auto",
        help="auto (cuda where there is one, else cpu), cuda or cpu",
    )
    add(
        "--amp",
        choices=["auto", "bfloat16", "float16", "off"],
        default="auto",
        help="precision of the forward pass; auto takes the fastest one that the device has in "
        "hardware",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the model: takes minutes at first, needs a C++ compiler",
    )
    add("--seed", type=int, default=0, help="decides every random choice")
    add(
        "--resume",
        sweep=REFUSED,
        default="",
        metavar="FILE",
        help="checkpoint (file or URL) of a run to continue or evaluate; auto takes the newest in "
        "--output_dir, if any",
    )
    add(
        "--checkpoint-every",
        sweep=FREE,
        type=int,
        default=0,
        metavar="STEPS",
        help="write a checkpoint each so many steps as well as after each epoch; 0 for after each "
        "epoch only",
    )
    add(
        "--audit",
        sweep=REFUSED,
        default="",
        metavar="FILE",
        help="only print what a checkpoint keeps of each layer and check that its weights obey its "
        "masks",
    )
    add(
        "--export",
        sweep=REFUSED,
        default="",
        metavar="DIR",
        help="only write the model of --resume to a new folder, for use without this project: "
        "state dict, torch.export "
        "program, ONNX",
    )
    add(
        "--dist-timeout",
        sweep=FREE,
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long processes wait for each other, as for one that writes a checkpoint, before "
        "the run fails",
    )
    add("--start_epoch", type=int, default=0, help="first epoch; --resume sets it")
    add(
        "--eval",
        sweep=REFUSED,
        action="store_true",
        help="only evaluate, after pruning where a pruner is given",
    )
    add(
        "--sparse-kernels",
        sweep=REFUSED,
        action="store_true",
        help="with --eval or --export: leave zeros out in the layers where that is measured to be "
        "quicker",
    )
    switch(
        "dist-eval",
        True,
        "share the evaluation among the processes; its figures do not depend on it",
        sweep=FREE,
    )
    add("--dist_url", sweep=FREE, default="env://", help="how the processes find each other")
    add(
        "--distributed",
        sweep=FREE,
        action="store_true",
        help="insist on more than one process, as torchrun or SLURM starts them",
    )
    add(
        "--world_size",
        sweep=FREE,
        type=int,
        default=1,
        help="insist on this many processes, where it is more than one",
    )

    add, _ = group_of("pruning")
    add(
        "--list-methods",
        sweep=REFUSED,
        action="store_true",
        help="only print what each method does, and which combinations are refused",
    )
    add(
        "--pruner",
        sweep=REFUSED,
        instead="--pruners",
        choices=list(PRUNERS),
        help="how the sparsity is shared among layers; without it nothing is pruned",
    )
    add(
        "--score",
        sweep=REFUSED,
        instead="--scores",
        choices=list(SCORES),
        default=Recipe.score,
        help="how much a weight matters; all but magnitude and random look at training images",
    )
    add(
        "--pattern",
        sweep=REFUSED,
        instead="--patterns",
        default=Recipe.pattern,
        help="what goes together: unstructured, row, 2:4 (any n:m; without --sparsity), 2:4t "
        "(along the outputs too), "
        "x:4 (n by layer), block:16x16, heads, neurons, heads+neurons",
    )
    add(
        "--permute",
        action="store_true",
        help="with n:m, n:mt, x:m: first reorder the inputs of layers, and what feeds them, so "
        "that groups keep more",
    )
    add(
        "--sparsity",
        sweep=REFUSED,
        instead="--sparsities",
        type=float,
        metavar="FRACTION",
        help="fraction of the prunable weights to remove, in [0, 1)",
    )
    add(
        "--budget",
        choices=["weights", "macs"],
        default=Recipe.budget,
        help="what --sparsity is a fraction of, with heads and neurons: weights, or multiply-adds "
        "of an image",
    )
    add(
        "--shrink",
        sweep=REFUSED,
        action="store_true",
        help="with heads and neurons: take what is pruned out of the model before it is finetuned, "
        "which is faster",
    )
    add(
        "--custom-config",
        sweep=REFUSED,
        instead="--custom-configs",
        metavar="FILE",
        help="YAML file with the sparsity of each layer, for --pruner custom",
    )
    add(
        "--prune-schedule",
        sweep=REFUSED,
        instead="--schedules",
        choices=list(SCHEDULES),
        default=Recipe.prune_schedule,
        help="when masks are chosen and changed",
    )
    add(
        "--prune-start",
        type=float,
        default=Recipe.prune_start,
        metavar="FRACTION",
        help="when a schedule begins, as a fraction of the training",
    )
    add(
        "--prune-end",
        type=float,
        default=Recipe.prune_end,
        metavar="FRACTION",
        help="when its last change is due",
    )
    add(
        "--prune-every",
        type=int,
        default=Recipe.prune_every,
        metavar="STEPS",
        help="steps between changes, for gradual, set, rigl, ste and sr-ste",
    )
    add(
        "--prune-rounds",
        type=int,
        default=Recipe.prune_rounds,
        metavar="N",
        help="how often iterative prunes, and how many sparse phases ac-dc has",
    )
    add(
        "--rewind",
        type=int,
        metavar="EPOCH",
        help="the epoch whose weights iterative goes back to after each round",
    )
    add(
        "--drop-fraction",
        type=float,
        default=Recipe.drop_fraction,
        metavar="FRACTION",
        help="share of the kept weights that set and rigl replace at first",
    )
    add(
        "--sr-decay",
        type=float,
        default=Recipe.sr_decay,
        metavar="DECAY",
        help="sr-ste adds so many times the pruned weights to their gradients",
    )
    add(
        "--mask-lr",
        type=float,
        default=Recipe.mask_lr,
        metavar="RATE",
        help="learning rate of the logits from which maskllm takes its masks",
    )
    add(
        "--reconstruct",
        sweep=REFUSED,
        instead="--reconstructions",
        choices=list(RECONSTRUCTIONS),
        default=Recipe.reconstruct,
        help="how the kept weights of a layer make up for the pruned ones",
    )
    add(
        "--calibration-images",
        type=int,
        default=Recipe.calibration_images,
        metavar="N",
        help="training images that score, pruner and reconstruction look at, where they look at "
        "any",
    )

    add, switch = group_of("model")
    add("--model", default="deit_base_patch16_224", help="any vision transformer of timm")
    add(
        "--model-kwargs",
        nargs="+",
        metavar="KEY=VALUE",
        help="arguments of the architecture, as timm has them, such as depth=6 embed_dim=192",
    )
    add("--input-size", type=int, default=224, help="side of the images, in pixels")
    add("--drop", type=float, default=0.0, help="dropout rate")
    add("--drop-path", type=float, default=0.1, help="drop path rate")
    add(
        "--finetune",
        default="",
        metavar="FILE",
        help="checkpoint (file or URL) to take the weights from",
    )
    switch(
        "pretrained", True, "start from timm's weights, unless --finetune or --resume gives some"
    )
    add(
        "--attn-only", action="store_true", help="train only attention, position embedding and head"
    )
    switch("train-mode", True, "train with drop path and dropout on")
    switch("model-ema", True, "keep a moving average of the weights")
    add(
        "--use-ema",
        action="store_true",
        help="with --finetune, or with --resume and --eval or --export: take the moving average of "
        "the checkpoint",
    )
    add("--model-ema-decay", type=float, default=0.99996, help="decay of the moving average")
    add(
        "--model-ema-force-cpu",
        action="store_true",
        help="keep the moving average in the CPU's memory",
    )

    add, _ = group_of("optimizer and schedule", continues=True)
    add("--opt", default="adamw", help="any optimizer of timm")
    add("--opt-eps", type=float, default=1e-8, help="epsilon of the optimizer")
    add("--opt-betas", type=float, nargs="+", help="betas of the optimizer; its own by default")
    add(
        "--clip-grad",
        type=float,
        help="clip the norm of the gradients to this; by default it is not clipped",
    )
    add("--momentum", type=float, default=0.9, help="momentum of SGD")
    add("--weight-decay", type=float, default=0.05, help="weight decay")
    add("--sched", default="cosine", help="any learning-rate schedule of timm")
    add("--lr", type=float, default=5e-4, help="learning rate for 512 images a step")
    add("--unscale-lr", action="store_true", help="take --lr as it is, whatever the images a step")
    add(
        "--lr-noise",
        type=float,
        nargs="+",
        help="epochs, as fractions, between which the rate is disturbed",
    )
    add("--lr-noise-pct", type=float, default=0.67, help="limit of the disturbance")
    add("--lr-noise-std", type=float, default=1.0, help="standard deviation of the disturbance")
    add("--warmup-lr", type=float, default=1e-6, help="rate at the start of the warm-up")
    add("--min-lr", type=float, default=1e-5, help="rate at the end of the schedule")
    add("--decay-epochs", type=float, default=30, help="interval of the step schedule")
    add("--warmup-epochs", type=int, default=5, help="epochs of linear warm-up")
    add(
        "--cooldown-epochs",
        type=int,
        default=10,
        help="epochs at the lowest rate after the schedule",
    )
    add("--patience-epochs", type=int, default=10, help="patience of the plateau schedule")
    add(
        "--decay-rate",
        "--dr",
        type=float,
        default=0.1,
        help="factor of the step and plateau schedules",
    )
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--bce-loss", action="store_true", help="binary cross-entropy for each class")

    add, _ = group_of("distillation")
    add(
        "--distillation-type",
        choices=["none", "soft", "hard"],
        default="none",
        help="what a distilled model's second head learns from the teacher: its logits, or its "
        "first class",
    )
    add("--teacher-model", default="regnety_160", help="any model of timm")
    add(
        "--teacher-path", default="", metavar="FILE", help="checkpoint (file or URL) of the teacher"
    )
    add("--distillation-alpha", type=float, default=0.5, help="share of the teacher in the loss")
    add(
        "--distillation-tau",
        continues=True,
        type=float,
        default=1.0,
        help="temperature of soft distillation and of --dense-teacher",
    )
    add(
        "--dense-teacher",
        continues=True,
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="share of the loss, in [0, 1], that is the divergence from the model as it was before "
        "pruning",
    )
    add(
        "--cosub",
        action="store_true",
        help="co-train two submodels under drop path; with binary cross-entropy",
    )

    add, switch = group_of("data and augmentation")
    add(
        "--data-path",
        default="",
        metavar="DIR",
        help="the data set; without it the built-in sample is used",
    )
    add(
        "--data-set",
        default="IMNET",
        help=f"what is in --data-path: {', '.join(DATA_SETS)}; or timm:folder, timm:torch/NAME or "
        "timm:wds/NAME, read "
        "by timm",
    )
    add("--train-split", default="train", help="with --data-set timm:..., the split to train on")
    add(
        "--val-split",
        default="validation",
        help="with --data-set timm:..., the split to evaluate on",
    )
    add(
        "--num-classes",
        type=int,
        help="with --data-set timm:..., the number of classes, where the data do not tell",
    )
    add(
        "--inat-category",
        default="name",
        help="rank of the taxonomy that labels iNaturalist's images",
        choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"],
    )
    add(
        "--num_workers",
        sweep=FREE,
        type=int,
        default=10,
        help="processes that load images, for each training process",
    )
    add(
        "--skip-bad-images",
        type=int,
        default=0,
        metavar="N",
        help="replace up to N training images that cannot be read, each by the next one, and name "
        "them",
    )
    switch("pin-mem", True, "copy batches to the GPU from pinned memory", sweep=FREE)
    switch(
        "repeated-aug", True, "show each drawn image three times an epoch, augmented differently"
    )
    add(
        "--crop-padding",
        type=int,
        default=4,
        help="pixels around images of 32 x 32 and less, before a random crop",
    )
    add(
        "--color-jitter",
        type=float,
        default=0.3,
        help="strength of colour jitter, where --aa none leaves room for it",
    )
    add(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help="AutoAugment policy in timm's notation, or none",
    )
    add(
        "--ThreeAugment",
        action="store_true",
        help="3-Augment instead of --aa: grayscale, solarization or blur",
    )
    add(
        "--src",
        action="store_true",
        help="with --ThreeAugment: simple random crop, without zooming in",
    )
    add(
        "--train-interpolation",
        choices=["random", "bilinear", "bicubic"],
        default="bicubic",
        help="how training images are scaled",
    )
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add(
        "--remode",
        choices=["const", "rand", "pixel"],
        default="pixel",
        help="what random erasing fills in: black, one random colour, or noise",
    )
    add("--recount", type=int, default=1, help="areas that random erasing clears")
    add(
        "--resplit",
        action="store_true",
        help="accepted for DeiT's sake, where it does nothing either",
    )
    add("--mixup", type=float, default=0.8, help="mixup alpha; 0 turns it off")
    add("--cutmix", type=float, default=1.0, help="cutmix alpha; 0 turns it off")
    add(
        "--cutmix-minmax",
        type=float,
        nargs="+",
        help="smallest and largest side of the cutmix box, as fractions",
    )
    add("--mixup-prob", type=float, default=1.0, help="probability of mixing a batch at all")
    add(
        "--mixup-switch-prob",
        type=float,
        default=0.5,
        help="probability of cutmix where both are on",
    )
    add(
        "--mixup-mode",
        default="batch",
        choices=["batch", "pair", "elem"],
        help="what shares one mixing ratio",
    )
    add(
        "--eval-crop-ratio",
        type=float,
        default=0.875,
        help="fraction of the resized image that evaluation sees",
    )

    parser.set_defaults(**(defaults or {}))
    return parser


def read_preset(path) -> dict:
    """A YAML file of defaults, by destination: `batch_size: 64` or `batch-size: 64`. Raises
    UserError.
    """
    try:
        content = read_yaml(path)
    except PruningError as error:
        raise UserError(str(error)) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of arguments to values")
    actions = {
        action.dest: action
        for action in get_args_parser()._actions
        if action.dest not in ("help", "config")
    }
    preset = {}
    for key, value in content.items():
        destination = str(key).replace("-", "_")
        if destination not in actions:
            raise UserError(f"{path}: {key}: no such argument")
        preset[destination] = _preset_value(actions[destination], value, f"{path}: {key}")
    return preset


def _preset_value(action, value, where):
    """`value` as the command line would have read it, so that a preset and a flag can never differ
    in type.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, got {short(value)}")
        return value
    if value is None and action.default is None:
        return None
    # What YAML makes of a bare `off`
    if value is False and "off" in (action.choices or ()):
        value = "off"
    values = value if action.nargs == "+" and isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{where}: expected at least one value")
    read = []
    for item in values:
        if isinstance(item, (dict, list, bool)) or item is None:
            raise UserError(
                f"{where}: expected a value of type {(action.type or str).__name__}, got "
                f"{short(item)}"
            )
        try:
            item = (action.type or str)(str(item))
        except ValueError:  # also of an integer that has too many digits to be printed
            raise UserError(
                f"{where}: expected a value of type {action.type.__name__}, got {short(item)}"
            ) from None
        if action.choices and item not in action.choices:
            raise UserError(
                f"{where}: expected one of {', '.join(action.choices)}, got {short(item)}"
            )
        read.append(item)
    return read if action.nargs == "+" else read[0]


def recipe_of(args) -> Recipe:
    """The choices of pruning among the arguments. Raises PruningError for a YAML file that cannot
    be read.
    """
    choices = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    if args.custom_config:
        choices["custom_config"] = read_yaml(args.custom_config)
        # Names the file where it is no configuration
        level_section(choices["custom_config"], args.custom_config)
    if args.pruner is None and parse_pattern(args.pattern).sparsity is not None:
        choices["pruner"] = "unif"  # n:m says what every layer keeps
    return Recipe(**choices)


def check_recipe(args) -> None:
    """Raises PruningError for choices of pruning that make no sense."""
    with naming_the_config(args.custom_config):
        recipe = recipe_of(args)
        recipe.check(args.epochs)
    if args.shrink:
        if not parse_pattern(recipe.pattern).structured:
            raise UserError(
                "--shrink: expected --pattern heads, neurons or heads+neurons beside it"
            )
        if recipe.prune_schedule != "one-shot":
            raise UserError(
                "--shrink: expected --prune-schedule one-shot beside it, got "
                f"{recipe.prune_schedule}"
            )


@contextlib.contextmanager
def naming_the_config(path: str | None):
    """An error in a custom configuration names the file that it was read from."""
    try:
        yield
    except PruningError as error:
        if path and str(error).startswith("custom_config"):
            raise PruningError(path + str(error).removeprefix("custom_config")) from None
        raise


def given(argv: list[str]) -> set[str]:
    """The destinations that a command line sets."""
    parser = get_args_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells a default where there is one."""

    def _get_help_string(self, action):
        has_default = action.default not in (None, "") and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)
