"""What no run can have: values of arguments, and combinations. Those of pruning are the recipe's to
check.
"""

import math
import os
import shutil

from datasets import DATA_SETS, TIMM
from utils import UserError

from .trackers import require


def check_args(args) -> None:
    """Raises UserError for values and combinations that no run can have, except pruning's."""

    def value_of(flag):
        return getattr(args, flag.lstrip("-").replace("-", "_"))

    def expect(good, flag, wanted):
        if not good:
            raise UserError(f"{flag} {value_of(flag)}: expected {wanted}")

    for flag in (
        "--batch-size",
        "--accum-iter",
        "--epochs",
        "--input-size",
        "--recount",
        "--print-freq",
    ):
        expect(value_of(flag) >= 1, flag, "at least 1")
    for flag in (
        "--num_workers",
        "--crop-padding",
        "--seed",
        "--start_epoch",
        "--warmup-epochs",
        "--checkpoint-every",
        "--skip-bad-images",
        "--cooldown-epochs",
        "--lr",
        "--min-lr",
        "--warmup-lr",
        "--weight-decay",
        "--clip-grad",
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
    ):
        values = value_of(flag) if isinstance(value_of(flag), list) else [value_of(flag)]
        expect(
            all(value is None or 0 <= value < math.inf for value in values),
            flag,
            "a number of at least 0",
        )
    expect(
        args.opt_betas is None
        or len(args.opt_betas) >= 2
        and all(0 <= beta < 1 for beta in args.opt_betas),
        "--opt-betas",
        "two numbers in [0, 1)",
    )
    expect(args.num_classes is None or args.num_classes >= 1, "--num-classes", "at least 1")
    for flag in ("--drop", "--drop-path", "--smoothing", "--model-ema-decay"):
        expect(0 <= value_of(flag) < 1, flag, "a number in [0, 1)")
    for flag in ("--reprob", "--mixup-prob", "--mixup-switch-prob"):
        expect(0 <= value_of(flag) <= 1, flag, "a number in [0, 1]")
    expect(0 < args.eval_crop_ratio <= 1, "--eval-crop-ratio", "a number in (0, 1]")
    for flag in ("--decay-epochs", "--dist-timeout"):
        expect(0 < value_of(flag) < math.inf, flag, "a number above 0")
    sides = args.cutmix_minmax
    expect(
        sides is None or len(sides) == 2 and 0 <= sides[0] < sides[1] <= 1,
        "--cutmix-minmax",
        "two numbers in [0, 1], the smaller first",
    )
    if mixes(args) and args.batch_size % 2:
        raise UserError(
            f"--batch-size {args.batch_size}: expected an even number, as mixup and cutmix pair "
            "images; "
            "--mixup 0 --cutmix 0 turns them off"
        )
    check_data_set(args)
    if args.src and not args.ThreeAugment:
        raise UserError("--src: expected --ThreeAugment beside it")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto: expected --output_dir beside it")
    if args.use_ema and not (args.finetune or args.resume and (args.eval or args.export)):
        raise UserError(
            "--use-ema: expected --finetune FILE, or --resume FILE and --eval or --export, beside "
            "it"
        )
    if args.export and not args.resume:
        raise UserError("--export: expected --resume FILE beside it")
    for flag in ("--eval", "--finetune", "--pruner"):
        if args.export and value_of(flag):
            raise UserError(
                f"{flag}: not together with --export, which writes the model of --resume as it is"
            )
    if args.sparse_kernels and not (args.eval or args.export):
        raise UserError(
            "--sparse-kernels: expected --eval or --export beside it; training needs the dense "
            "weights"
        )
    if args.sparse_kernels and args.compile:
        raise UserError("--sparse-kernels: not together with --compile")
    compiler = os.environ.get("CXX", "g++")
    if args.compile and not shutil.which(compiler):
        raise UserError(
            f"--compile: torch.compile needs a C++ compiler, and there is no {compiler}; CXX may "
            "name one"
        )
    for flag in ("--tensorboard", "--checkpoint-every"):
        if value_of(flag) and not args.output_dir:
            raise UserError(f"{flag}: expected --output_dir beside it")
    for package in ("tensorboard", "wandb"):
        if value_of(package):
            require(package)
    check_distillation(args)


def check_data_set(args) -> None:
    name = args.data_set
    if name != "IMNET" and not args.data_path:
        raise UserError(f"--data-set {name}: expected --data-path beside it")
    if name.startswith(TIMM):
        kind = name.removeprefix(TIMM)
        if kind.startswith(("hfds/", "hfids/")):
            raise UserError(
                f"--data-set {name}: not available, as timm's reader needs the package `datasets`, "
                "which "
                "this project's datasets.py hides"
            )
        if kind not in ("", "folder") and not kind.startswith(("torch/", "wds/")):
            raise UserError(
                f"--data-set {name}: expected timm:folder, timm:torch/NAME or timm:wds/NAME"
            )
    elif name not in DATA_SETS:
        raise UserError(f"--data-set {name}: expected one of {', '.join(DATA_SETS)}, or timm:NAME")
    elif args.num_classes or (args.train_split, args.val_split) != ("train", "validation"):
        raise UserError(
            f"--data-set {name}: --train-split, --val-split and --num-classes are for timm:NAME "
            "only"
        )


def check_distillation(args) -> None:
    if not 0 <= args.dense_teacher <= 1:
        raise UserError(f"--dense-teacher {args.dense_teacher}: expected a number in [0, 1]")
    if args.dense_teacher and (args.cosub or args.distillation_type != "none"):
        raise UserError(
            "--dense-teacher: not together with "
            f"{'--cosub' if args.cosub else '--distillation-type'}"
        )
    if not 0 < args.distillation_tau < math.inf:
        raise UserError(f"--distillation-tau {args.distillation_tau}: expected a number above 0")
    if args.distillation_type == "none":
        return
    if not args.teacher_path:
        raise UserError(
            f"--distillation-type {args.distillation_type}: expected --teacher-path FILE beside it"
        )
    if args.cosub or not args.train_mode:
        raise UserError(
            f"{'--cosub' if args.cosub else '--no-train-mode'}: not together with "
            "--distillation-type"
        )
    if not 0 <= args.distillation_alpha <= 1:
        raise UserError(
            f"--distillation-alpha {args.distillation_alpha}: expected a number in [0, 1]"
        )


def mixes(args) -> bool:
    """Whether training images are mixed, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
