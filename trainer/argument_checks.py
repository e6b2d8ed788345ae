"""Refuses values of arguments, and combinations, that no run can have (pruning: see Recipe)."""

import math
import os
import shutil

from datasets import DATA_SETS, TIMM
from models import ATTENTION_ONLY, PARAMETER_KINDS, compile_modes
from sparsity_factory.errors import short
from utils import UserError

from .audit import parse_expectation
from .trackers import require

AT_LEAST_1 = (
    "--batch-size",
    "--accum-iter",
    "--epochs",
    "--input-size",
    "--recount",
    "--print-freq",
    "--eval-every",
    "--save-every",
)
AT_LEAST_0 = (
    "--num_workers",
    "--crop-padding",
    "--seed",
    "--tokens",
    "--start_epoch",
    "--warmup-epochs",
    "--checkpoint-every",
    "--skip-bad-images",
    "--cooldown-epochs",
    "--lr",
    "--min-lr",
    "--warmup-lr",
    "--weight-decay",
    "--mixup",
    "--cutmix",
    "--color-jitter",
    "--momentum",
    "--decay-rate",
    "--patience-epochs",
    "--lr-noise",
    "--lr-noise-pct",
    "--lr-noise-std",
    "--opt-eps",
    "--num-classes",
)
ABOVE_0 = ("--decay-epochs", "--dist-timeout", "--clip-grad")
BELOW_1 = ("--drop", "--drop-path", "--smoothing", "--model-ema-decay")
ABOVE_0_TO_1 = ("--eval-crop-ratio", "--layer-decay")
AT_MOST_1 = ("--reprob", "--mixup-prob", "--mixup-switch-prob")


def check_args(args) -> None:
    """Raises UserError for values and combinations that no run can have, except pruning's."""
    check_numbers(args)
    check_data_set(args)
    check_tasks(args)
    check_devices_and_output(args)
    check_distillation(args)
    check_headless(args)


def check_numbers(args) -> None:
    """Raises UserError for a number out of its range."""

    def expect(good, flag, wanted):
        if not good:
            raise UserError(f"{flag} {_value(args, flag)}: expected {wanted}")

    for flag in AT_LEAST_1:
        value = _value(args, flag)
        expect(value is None or value >= 1, flag, "at least 1")
    for flag in AT_LEAST_0:
        value = _value(args, flag)
        values = value if isinstance(value, list) else [value]
        good = all(number is None or 0 <= number < math.inf for number in values)
        expect(good, flag, "a number of at least 0")
    for flag in ABOVE_0:
        value = _value(args, flag)
        expect(value is None or 0 < value < math.inf, flag, "a number above 0")
    for flag in BELOW_1:
        expect(0 <= _value(args, flag) < 1, flag, "a number in [0, 1)")
    for flag in AT_MOST_1:
        expect(0 <= _value(args, flag) <= 1, flag, "a number in [0, 1]")
    for flag in ABOVE_0_TO_1:
        expect(0 < _value(args, flag) <= 1, flag, "a number in (0, 1]")

    # Several numbers
    betas = args.opt_betas
    good = betas is None or len(betas) >= 2 and all(0 <= beta < 1 for beta in betas)
    expect(good, "--opt-betas", "two numbers in [0, 1)")
    sides = args.cutmix_minmax
    good = sides is None or len(sides) == 2 and 0 <= sides[0] < sides[1] <= 1
    expect(good, "--cutmix-minmax", "two numbers in [0, 1], the smaller first")
    for flag, least in (("--mean", -math.inf), ("--std", 0)):
        values = _value(args, flag)
        good = values is None or len(values) == 3 and all(least < x < math.inf for x in values)
        expect(good, flag, "three numbers" + (" above 0" if flag == "--std" else ""))

    if mixes(args) and args.batch_size % 2:
        raise UserError(
            f"--batch-size {args.batch_size}: expected an even number, as mixup and cutmix pair "
            "images; --mixup 0 --cutmix 0 turns them off"
        )


def check_data_set(args) -> None:
    """Raises UserError for an unknown data set, and for flags that do not fit it."""
    name = args.data_set
    if name != "IMNET" and not args.data_path:
        raise UserError(f"--data-set {name} needs --data-path as well")

    if name.startswith(TIMM):
        kind = name.removeprefix(TIMM)
        if kind.startswith(("hfds/", "hfids/")):
            raise UserError(
                f"--data-set {name}: not available, as timm's reader needs the package `datasets`, "
                "which this project's datasets.py hides"
            )
        if kind not in ("", "folder") and not kind.startswith(("torch/", "wds/")):
            raise UserError(
                f"--data-set {name}: expected timm:folder, timm:torch/NAME or timm:wds/NAME"
            )
        return

    if name not in DATA_SETS:
        raise UserError(f"--data-set {name}: expected one of {', '.join(DATA_SETS)}, or timm:NAME")
    if args.num_classes or (args.train_split, args.val_split) != ("train", "validation"):
        raise UserError(
            f"--data-set {name}: --train-split, --val-split and --num-classes are for timm:NAME "
            "only"
        )


def check_tasks(args) -> None:
    """Raises UserError for flags that need another one, or exclude it."""
    if args.src and not args.ThreeAugment:
        raise UserError("--src needs --ThreeAugment as well")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto needs --output_dir as well")
    if args.overwrite and (args.eval or args.resume == "auto"):
        other = "--eval" if args.eval else "--resume auto"
        raise UserError(f"--overwrite: not together with {other}")
    if args.use_ema and not (args.finetune or args.resume and (args.eval or args.export)):
        raise UserError(
            "--use-ema needs --finetune FILE, or --resume FILE and --eval or --export, as well"
        )

    if args.train_only is not None:
        if args.attn_only:
            raise UserError("--train-only: not together with --attn-only")
        unknown = [kind for kind in trained_kinds(args) if kind not in PARAMETER_KINDS]
        if unknown:
            raise UserError(
                f"--train-only {args.train_only}: {short(unknown[0])} is no kind of parameters; "
                f"expected some of {', '.join(PARAMETER_KINDS)}, with commas between them"
            )

    if args.layer_decay < 1 and args.sched == "none":
        raise UserError(
            f"--layer-decay {args.layer_decay:g}: --sched none gives all layers the same rate; "
            "expected --sched constant or another schedule"
        )
    if args.eval_every > 1 and args.sched == "plateau":
        raise UserError(
            f"--eval-every {args.eval_every}: --sched plateau looks at the accuracy of every epoch"
        )
    if args.rewind is not None and args.sched == "plateau":
        raise UserError(
            "--rewind: --sched plateau has no place to go back to; expected another one"
        )

    if args.compare and not args.eval:
        raise UserError("--compare needs --eval as well")
    if args.expect and not args.audit:
        raise UserError("--expect needs --audit FILE as well")
    for expectation in args.expect or ():
        parse_expectation(expectation)
    if args.keep_zeros and not (args.finetune or args.resume):
        raise UserError("--keep-zeros needs --finetune FILE or --resume FILE as well")

    if args.export and not args.resume:
        raise UserError("--export needs --resume FILE as well")
    for flag in ("--eval", "--finetune", "--pruner"):
        if args.export and _value(args, flag):
            raise UserError(
                f"{flag}: not together with --export, which writes the model of --resume as it is"
            )

    if args.sparse_kernels and not (args.eval or args.export):
        raise UserError(
            "--sparse-kernels needs --eval or --export as well; training needs the dense weights"
        )
    if args.sparse_kernels and args.compile:
        raise UserError("--sparse-kernels: not together with --compile")


def check_devices_and_output(args) -> None:
    """Raises UserError if a compiler, a package or the output folder lacks that a flag needs."""
    compiler = os.environ.get("CXX", "g++")
    if args.compile and not shutil.which(compiler):
        raise UserError(
            f"--compile: torch.compile needs a C++ compiler, and there is no {compiler}; CXX may "
            "name one"
        )
    if args.compile_mode != "default" and not args.compile:
        raise UserError(f"--compile-mode {args.compile_mode} needs --compile as well")
    if args.compile_mode != "default" and args.compile_mode not in compile_modes():
        raise UserError(
            f"--compile-mode {args.compile_mode}: expected one of {', '.join(compile_modes())}"
        )

    for flag in ("--tensorboard", "--checkpoint-every", "--overwrite"):
        if _value(args, flag) and not args.output_dir:
            raise UserError(f"{flag} needs --output_dir as well")
    for package in ("tensorboard", "wandb"):
        if getattr(args, package):
            require(package)


def check_distillation(args) -> None:
    """Raises UserError for teachers that exclude each other, or lack what they need."""
    if not 0 <= args.dense_teacher <= 1:
        raise UserError(f"--dense-teacher {args.dense_teacher}: expected a number in [0, 1]")
    if args.dense_teacher and (args.cosub or args.distillation_type != "none"):
        other = "--cosub" if args.cosub else "--distillation-type"
        raise UserError(f"--dense-teacher: not together with {other}")
    if not 0 < args.distillation_tau < math.inf:
        raise UserError(f"--distillation-tau {args.distillation_tau}: expected a number above 0")

    if args.distillation_type == "none":
        return
    if not args.teacher_path:
        raise UserError(
            f"--distillation-type {args.distillation_type} needs --teacher-path FILE as well"
        )
    if args.cosub or not args.train_mode:
        other = "--cosub" if args.cosub else "--no-train-mode"
        raise UserError(f"{other}: not together with --distillation-type")
    if not 0 <= args.distillation_alpha <= 1:
        raise UserError(
            f"--distillation-alpha {args.distillation_alpha}: expected a number in [0, 1]"
        )


def check_headless(args) -> None:
    """Raises UserError for flags that need a head, or labels, if the model has none."""
    if args.num_classes != 0:
        return
    for flag in ("--dense-teacher", "--cosub", "--bce-loss"):
        if _value(args, flag):
            raise UserError(f"{flag}: not with --num-classes 0, which has a loss of its own")
    if args.distillation_type != "none":
        raise UserError("--distillation-type: not with --num-classes 0, a model without a head")
    if args.data_set.startswith(f"{TIMM}wds/"):
        raise UserError(
            f"--data-set {args.data_set}: not with --num-classes 0, which looks at each training "
            "image by its number; shards are a stream"
        )


def trained_kinds(args) -> list[str]:
    """The kinds of parameters that are trained, of `PARAMETER_KINDS`; none means all of them."""
    if args.attn_only:
        return [*ATTENTION_ONLY]
    if args.train_only is None:
        return []
    return [kind.strip() for kind in args.train_only.split(",")]


def mixes(args) -> bool:
    """Whether training images are mixed, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _value(args, flag: str):
    return getattr(args, flag.lstrip("-").replace("-", "_"))
