"""From arguments to the objects of a run: data loaders, model, sparsifier, teacher, criterion,
batch transform.
"""

import argparse
import copy
import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.utils.data import DataLoader, Dataset, IterableDataset

import utils
from augment import BatchTransform
from datasets import build_dataset, normalization
from engine import StepOptions, steps_of_epoch
from losses import CosubLoss, DenseFeaturesLoss, DenseTeacherLoss, DistillationLoss
from models import (
    build_model,
    checkpoint_gradients,
    compile_model,
    cut_pixels,
    has_batch_norm,
    train_both_heads,
    train_only,
    trained_share,
)
from samplers import EvalBatchSampler, TrainSampler
from sparsity_factory import (
    PruningError,
    Recipe,
    Sparsifier,
    prunable_weights,
    read_pruning,
    shrink,
    with_units,
)
from sparsity_factory.processes import Processes
from sparsity_factory.shrink import masks_of_the_rest
from utils import Compute, UserError, log

from .argument_checks import mixes, trained_kinds
from .arguments import (
    continued_args,
    naming_the_config,
    recipe_of,
    with_saved_model,
    with_saved_tokens,
    without_head,
)
from .calibration_images import Calibration
from .data_config import teacher_inputs, with_data_config
from .run_folder import newest_checkpoint
from .seeded_data import SeededDataset, SeededStream, StreamLoader, WithoutLabels
from .stop_signals import ignore_signals
from .tokens import keep_all_tokens, merge_tokens, tokens_in_words
from .training_state import TrainingState
from .weights import adopt_sparsity, has_trained_head, load_weights


@dataclass(frozen=True)
class DenseTeacher:
    """The model as it was before pruning, frozen and in evaluation mode.

    origin: what a checkpoint keeps of it, to load it again: `file` ("" for timm's weights), whether
    to `use_ema`, and the `sha256` of the weights.
    """

    model: torch.nn.Module
    origin: dict


def choose_compute(args) -> Compute:
    """The device and the precision that the arguments ask for.

    Raises UserError for a device that is not available.
    """
    compute = Compute.choose(args.device, args.amp)
    compute.tune(args.tf32, args.cudnn_benchmark)
    return compute


def evaluation_batch_size(args) -> int:
    """How many images an evaluation takes at once; as DeiT has it."""
    return int(1.5 * args.batch_size)


@dataclass(frozen=True)
class Loaders:
    """The images of a run.

    train: the loader of the training images; None in an evaluation.
    val: that of the validation images.
    num_classes: the number of classes; 0 for a model without a head.
    classes: the labels of the classes by name, if the data have names.
    training_images: returns the training images, for what else looks at them. They are listed once,
        when they are first asked for.
    """

    train: DataLoader | StreamLoader | None
    val: DataLoader | StreamLoader
    num_classes: int
    classes: dict[str, int] | None
    training_images: Callable[[], Dataset]

    def steps_of_epoch(self, accum_iter: int) -> int:
        """Optimizer steps of an epoch; 1 in an evaluation."""
        return 1 if self.train is None else steps_of_epoch(self.train, accum_iter)


def build_loaders(args, device) -> Loaders:
    """The images that the arguments ask for.

    An evaluation needs no training images, and a training folder only for the names of its classes.
    With `--num-classes 0`, the images of the training have no labels.
    Raises UserError for classes that differ between the two, and for too few training images.
    """

    @functools.cache
    def training() -> tuple[Dataset, int]:
        found = build_dataset(True, args)
        log_notes(found[0])
        return found

    train_set = None
    classes = None
    if not args.eval:
        train_set, num_classes = training()
        classes = getattr(train_set, "class_to_idx", None)
    val_set, val_classes = build_dataset(False, args, classes=classes)
    log_notes(val_set)
    if args.eval:
        num_classes = val_classes
        classes = getattr(val_set, "class_to_idx", None)
    else:
        check_classes(train_set, val_set, args.data_path)
    if args.num_classes == 0:
        num_classes = 0
        classes = None

    pin_memory = args.pin_mem and device.type == "cuda"
    return Loaders(
        train=None if args.eval else train_loader(args, train_set, num_classes, pin_memory),
        val=val_loader(args, val_set, num_classes, pin_memory),
        num_classes=num_classes,
        classes={str(name): int(classes[name]) for name in classes} if classes else None,
        training_images=lambda: training()[0],
    )


def log_notes(data: Dataset) -> None:
    for note in getattr(data, "notes", ()):
        log(note)


def train_loader(
    args, images: Dataset, num_classes: int, pin_memory: bool
) -> DataLoader | StreamLoader:
    """This process's batches of the training images, without labels if there are no classes.

    Raises UserError if there is none.
    """
    images = images if num_classes else WithoutLabels(images)
    process = utils.rank(), utils.world_size()
    if isinstance(images, IterableDataset):
        stream = SeededStream(images, args.seed, num_classes)
        loader = StreamLoader(
            stream,
            args.batch_size,
            args.num_workers,
            process,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
        )
    else:
        repeats = 3 if args.repeated_aug else 1
        loader = DataLoader(
            SeededDataset(images, args.skip_bad_images),
            args.batch_size,
            sampler=TrainSampler(len(images), args.seed, repeats, *process),
            drop_last=True,
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
        )

    if not len(loader):
        raise UserError(
            f"--batch-size {args.batch_size}: more than the training images of each process"
        )
    return loader


def val_loader(
    args, images: Dataset, num_classes: int, pin_memory: bool
) -> DataLoader | StreamLoader:
    """The batches of the validation images: this process's share with `--dist-eval`, or all."""
    share = (utils.rank(), utils.world_size()) if args.dist_eval else (0, 1)
    size = evaluation_batch_size(args)

    if isinstance(images, IterableDataset):
        stream = SeededStream(images, args.seed, num_classes)
        return StreamLoader(
            stream,
            size,
            args.num_workers,
            share,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
        )

    return DataLoader(
        images,
        batch_sampler=EvalBatchSampler(len(images), size, *share),
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )


def check_classes(train_set, val_set, data_path: str) -> None:
    """Raises UserError if a class of the validation images has another number in training."""
    labels = getattr(train_set, "class_to_idx", {})
    for name, label in getattr(val_set, "class_to_idx", {}).items():
        if labels.get(name) != label:
            raise UserError(
                f"--data-path {data_path}: class {name} of val/ is number {label} there, and "
                f"{labels.get(name, 'missing')} in train/; expected the same folders in both"
            )


def load_start(args) -> tuple[argparse.Namespace, dict]:
    """The arguments of a run, and the checkpoint it starts from; an empty one without a file.

    `--resume` and `--finetune` name the file. The checkpoint keeps its optimizer only if the
    training resumes from it.
    """
    args = argparse.Namespace(**vars(args))
    if args.resume == "auto":
        args.resume = utils.on_first_process(lambda: newest_checkpoint(args.output_dir))
        none = f"no checkpoint in {args.output_dir}, so the run starts from the beginning"
        if args.eval and not args.resume:
            raise UserError(f"--resume auto: no checkpoint in {args.output_dir}")
        log(f"--resume auto: {args.resume or none}")
    if args.resume and not args.eval:
        args.use_ema = False  # it was for the file that the run began with

    source = args.resume or args.finetune
    if not source:
        return with_data_config(args, {}, ""), {}

    checkpoint = utils.load_checkpoint(source)
    if args.use_ema:
        if "model_ema" not in checkpoint:
            raise UserError(f"--use-ema: {source} holds no moving average of the weights")
        checkpoint["model"] = checkpoint["model_ema"]

    if not args.resume or args.eval:
        checkpoint.pop("optimizer", None)
    args = with_saved_model(args, checkpoint, source)
    args = with_saved_tokens(args, checkpoint, source)
    if args.resume:
        args = without_head(args, checkpoint)
    if "optimizer" in checkpoint:
        args = continued_args(args, checkpoint.get("args"), source)
        by_default = args.default_folder and (args.output_dir or "data_path" not in args.given)
        if by_default and "run" in checkpoint and os.path.isfile(source):
            args.output_dir = os.path.dirname(source) or "."
    return with_data_config(args, checkpoint, source), checkpoint


def check_class_labels(args, checkpoint: dict, labels: dict[str, int] | None) -> None:
    """Raises UserError if the data name classes otherwise than those of the checkpoint.

    A model that is finetuned may learn other classes; then a message says so.
    """
    stored = checkpoint.get("classes")
    if not isinstance(stored, dict) or not labels:
        return
    different = [name for name, label in labels.items() if stored.get(name) != label]
    if not different:
        return

    source = args.resume or args.finetune
    label = labels[different[0]]
    theirs = next((name for name, number in stored.items() if number == label), "none")
    line = (
        f"{source}: its classes are not those of the data: number {label} is {theirs} there, "
        f"{different[0]} here"
    )
    if args.resume or args.eval:
        raise UserError(f"{line}; expected the data set that it was trained on")
    log(line)


def build_state(
    args,
    model,
    sparsifier: Sparsifier,
    checkpoint: dict,
    compute: Compute,
    bad_images: torch.Tensor | None,
    teacher: DenseTeacher | None = None,
    classes: dict[str, int] | None = None,
) -> TrainingState:
    """The state that the training starts with, or resumes if the checkpoint has one.

    classes: the labels of the classes by name, for later checkpoints.
    Raises UserError if the checkpoint had another dense teacher.
    """
    if kinds := trained_kinds(args):
        log(f"{trained_share(model)}: {', '.join(kinds)}")
    state = TrainingState(model, sparsifier, args, compute, bad_images)
    state.dense_teacher = teacher.origin if teacher else None
    state.classes = classes

    if "optimizer" in checkpoint:
        stored = checkpoint.get("dense_teacher")
        known = stored.get("sha256") if isinstance(stored, dict) else None
        if teacher and known != teacher.origin["sha256"]:
            raise UserError(
                f"{teacher.origin['file'] or 'timm'}: not the dense weights that {args.resume} "
                "learned from; they have changed since"
            )
        state.resume(checkpoint, args.resume)
    return state


def build_dense_teacher(
    args, num_classes: int, model: torch.nn.Module, checkpoint: dict, device: torch.device
) -> DenseTeacher | None:
    """What `--dense-teacher` learns from: a copy of `model` before it is pruned. None without it.

    It keeps all tokens, also if `model` merges some.

    A model without a head always has one, as nothing else says what it should learn.

    A resumed run has no dense model. It loads one again from where the first run had it, or from
    `--finetune`.

    Raises UserError if there are no dense weights that a training could learn from.
    """
    if args.eval or (num_classes and not args.dense_teacher):
        return None
    if num_classes:
        flag = f"--dense-teacher {args.dense_teacher:g}"
        log(f"Teacher: the dense model, with {args.dense_teacher:g} of the loss")
    else:
        flag = "--num-classes 0"
        log("Teacher: the features of the dense model; no label is used")

    if "optimizer" in checkpoint:
        args, checkpoint, teacher = load_dense(args, num_classes, checkpoint, device)
    else:
        teacher = copy.deepcopy(model)
        keep_all_tokens(teacher)
        if args.grad_checkpointing:
            teacher.set_grad_checkpointing(False)
        if args.compile:
            compile_model(teacher, args.compile_mode)

    source = args.resume or args.finetune
    if "masks" in checkpoint:
        raise UserError(
            f"{flag}: {source} is pruned; expected --finetune with a file of dense weights"
        )
    if not source and not args.pretrained:
        raise UserError(
            f"{flag}: random weights teach nothing; expected --finetune FILE, or no --no-pretrained"
        )
    if not has_trained_head(teacher, checkpoint.get("model")):
        raise UserError(
            f"{flag}: {source or 'timm'} has no head for {num_classes} classes, and a fresh one "
            "teaches nothing; expected --finetune with a file that has one"
        )
    for name, weight in teacher.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(
                f"{flag}: {name} of {source or 'timm'} is not finite; expected finite dense weights"
            )

    # The digest is of the file as it is: another machine may round a resized position embedding
    # otherwise.
    digest = sha256_of(checkpoint.get("model", teacher.state_dict()))
    origin = {"file": source, "use_ema": args.use_ema, "sha256": digest}
    return DenseTeacher(teacher.eval().requires_grad_(False), origin)


def load_dense(
    args, num_classes: int, checkpoint: dict, device: torch.device
) -> tuple[argparse.Namespace, dict, torch.nn.Module]:
    """The arguments, the checkpoint and the dense model with which a resumed run once began.

    Raises UserError if its checkpoint does not say, or the file is gone.
    """
    stored = checkpoint.get("dense_teacher")
    if not isinstance(stored, dict) or not isinstance(stored.get("file"), str):
        raise UserError(
            f"--dense-teacher {args.dense_teacher:g}: {args.resume} is of a run without it; "
            "expected --finetune FILE in place of --resume, to begin another run"
        )

    first = argparse.Namespace(**vars(args))
    first.resume = ""
    first.finetune = args.finetune or stored["file"]
    first.use_ema = bool(stored.get("use_ema"))
    first.pretrained = True
    first.grad_checkpointing = False
    first.tokens = 0  # the teacher keeps all of them
    first.given = [*args.given, "tokens"]
    try:
        first, dense = load_start(first)
        return first, dense, prepare_model(first, num_classes, dense, device)
    except UserError as error:
        raise UserError(
            f"{args.resume}: its dense teacher: {error}; --finetune FILE says where the dense "
            "weights are now"
        ) from None


def build_compared(args, num_classes: int, device: torch.device) -> torch.nn.Module:
    """The model of `--compare`, read as `--finetune` does, or with timm's weights.

    It merges tokens only if its own run did.

    Raises UserError if it does not fit the model that is evaluated, or takes other images.
    """
    # Its own weights and tokens
    other = argparse.Namespace(**vars(args))
    other.resume = ""
    other.finetune = "" if args.compare == "timm" else args.compare
    other.use_ema = False
    other.pretrained = True
    other.keep_zeros = False
    other.tokens = 0
    other.given = [name for name in args.given if name != "tokens"]
    other, checkpoint = load_start(other)

    # The same images
    for name in ("input_size", "mean", "std"):
        theirs, ours = getattr(other, name), getattr(args, name)
        if theirs != ours:
            raise UserError(
                f"--compare {args.compare}: its images have another {name}, {theirs}; expected "
                f"{ours}, that of the evaluated model"
            )
    return prepare_model(other, num_classes, checkpoint, device)


def sha256_of(weights: dict[str, torch.Tensor]) -> str:
    """The SHA-256 of the names and the bytes of a state dict, in whatever order."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def prepare_model(
    args, num_classes: int, checkpoint: dict, device: torch.device
) -> torch.nn.Module:
    """The model on its device, with timm's weights or the checkpoint's.

    The checkpoint of another project gets masks of ours, if it is sparse (see `adopt_sparsity`).
    """
    # On CPUs plain attention is quicker: a training step of the sample in bfloat16 takes half as
    # long as with fused attention.
    timm.layers.set_fused_attn(device.type == "cuda")

    pretrained = args.pretrained and not checkpoint
    source = args.resume or args.finetune or ("timm, pretrained" if pretrained else "random")
    log(f"Weights of {args.model}: {source}{', moving average' if args.use_ema else ''}")
    model = build_model(
        args.model,
        num_classes,
        args.input_size,
        drop=args.drop,
        drop_path=args.drop_path,
        pretrained=pretrained,
        assignments=args.model_kwargs,
    )
    if cut := cut_pixels(model, args.input_size):
        log(cut)
    if "shape" in checkpoint:
        try:
            model = with_units(model, checkpoint["shape"])
        except PruningError as error:
            raise UserError(f"{source}: {error}") from None

    if args.resume:
        load_weights(model, checkpoint["model"], args.resume)
    elif args.finetune:
        load_weights(
            model, checkpoint["model"], args.finetune, resizes=True, new_heads=not args.eval
        )
    elif pretrained and args.eval and not has_trained_head(model):
        raise UserError(
            f"--eval: timm's weights of {args.model} have no head for {num_classes} classes, and a "
            "new one says nothing; expected --finetune or --resume with a file that has one, or "
            "--num-classes 0, which does without"
        )
    if checkpoint:
        adopt_sparsity(model, checkpoint, source, args.keep_zeros)

    if args.tokens:
        merge_tokens(model, args.tokens)
        log(f"Tokens: {tokens_in_words(model)}")
    kinds = trained_kinds(args)
    if kinds and not args.eval:
        train_only(model, kinds)
        starts_trained = bool(checkpoint or pretrained)
        if starts_trained and "head" not in kinds:
            check_frozen_head(model, checkpoint.get("model"))
    if args.distillation_type != "none":
        train_both_heads(model, args.model)
    if args.sync_bn:
        model = with_synchronized_norm(model, args.model, device)
    if args.grad_checkpointing:
        checkpoint_gradients(model, args.model)
    if args.compile:
        compile_model(model, args.compile_mode)
    return model.to(device)


def check_frozen_head(model: torch.nn.Module, weights: dict | None) -> None:
    """Logs it if a head that is not trained is a new one. weights: as for `has_trained_head`."""
    if not has_trained_head(model, weights):
        log("--train-only: the head is new, and stays random; with `head` it is trained as well")


def exchanges() -> dict[str, Any]:
    """How the processes of a run share what one chooses, compare what each has, and add up."""
    if utils.world_size() == 1:
        return {}
    processes = Processes(utils.rank(), utils.world_size(), dist.all_reduce)
    return {"share": utils.on_first_process, "gather": utils.gather_objects, "processes": processes}


def with_synchronized_norm(
    model: torch.nn.Module, name: str, device: torch.device
) -> torch.nn.Module:
    """The model with batch norm over the images of all processes; unchanged if there is one.

    Raises UserError if the model has no batch norm, or the processes compute on CPUs.
    """
    if not has_batch_norm(model):
        raise UserError(f"--sync-bn: {name} has no batch norm")
    if utils.world_size() == 1:
        return model
    if device.type != "cuda":
        raise UserError(
            "--sync-bn: torch synchronizes batch norm on GPUs only; --dist-bn reduce averages its "
            "statistics after each epoch"
        )
    return timm.layers.convert_sync_batchnorm(model)


def build_sparsifier(
    args,
    model: torch.nn.Module,
    checkpoint: dict,
    epoch_steps: int,
    compute: Compute,
    known: dict | None = None,
    training_images: Callable[[], Dataset] | None = None,
) -> Sparsifier:
    """What prunes the model: by the masks of the checkpoint, or by a recipe that has yet to choose.

    A resumed run has the recipe of its checkpoint, and its place in the schedule. With
    `--finetune`, a pruner that is asked for replaces both; without one, the masks of the
    checkpoint stay.

    epoch_steps: optimizer steps an epoch.
    known, training_images: as `Calibration` shares them.
    Raises UserError for a recipe that the model or the checkpoint does not fit.
    """
    source = args.resume or args.finetune
    resumes = "optimizer" in checkpoint
    asked = recipe_of(args)

    def sparsifier(recipe: Recipe, masks=None) -> Sparsifier:
        data = {}
        if recipe.looks_at_data and (resumes or not masks):
            shared = None if resumes else known
            calibration = Calibration(args, model, compute, shared, training_images)
            data = {"statistics": calibration, "walk": calibration.walk}
        return Sparsifier(
            model,
            recipe,
            total_steps=max(args.epochs - args.start_epoch, 1) * epoch_steps,
            epoch_steps=epoch_steps,
            masks=masks,
            **exchanges(),
            **data,
        )

    try:
        stored, masks = read_pruning(checkpoint)
        has_pruning = masks is not None or resumes
        if args.resume and asked.pruner and has_pruning and asked.differences(stored):
            raise UserError(
                f"{asked.in_words()}: {source} is of a run with {stored.in_words()}; leave the "
                "pruning flags out, or prune its weights anew with --finetune"
            )

        # New masks.
        if masks is None or (asked.pruner and not args.resume):
            with naming_the_config(args.custom_config):
                return sparsifier(asked.one_shot() if args.eval else asked)

        # The masks of the file, which stay as they are.
        if not resumes:
            return sparsifier(stored.one_shot(), masks)

        # The masks of the file, which its schedule may change.
        resumed = sparsifier(stored, masks)
        if "pruning" in checkpoint:
            resumed.load_state_dict(checkpoint["pruning"])
        return resumed
    except PruningError as error:
        names_file = source and not args.custom_config
        raise UserError(f"{source}: {error}" if names_file else str(error)) from None


def shrink_before_training(
    args, model: torch.nn.Module, sparsifier: Sparsifier, masks: dict[str, torch.Tensor]
) -> tuple[torch.nn.Module, torch.nn.Module, Sparsifier]:
    """The dense model, the model without its pruned units, and a sparsifier for that.

    The new sparsifier masks only what is pruned in other layers; it has the recipe, for the
    checkpoint.
    """
    if not masks:
        raise UserError(
            f"--shrink: the weights of {args.resume} are pruned already; expected a run that prunes"
        )
    dense = copy.deepcopy(model)
    sparsifier.start(masks)
    recipe = sparsifier.recipe
    small = shrink(model, sparsifier.masks, recipe.shrinks)
    if args.compile:
        compile_model(small, args.compile_mode)

    weights = prunable_weights(small)
    kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    kept |= masks_of_the_rest(small, sparsifier.masks, recipe.shrinks)
    follower = Sparsifier(
        small,
        recipe,
        total_steps=sparsifier.steps.total,
        epoch_steps=sparsifier.steps.epoch,
        masks=kept,
        **exchanges(),
    )
    return dense, small, follower


def build_step_options(
    args, num_classes: int, compute: Compute, teacher: DenseTeacher | None = None
) -> StepOptions:
    """How the steps of a run are made."""
    return StepOptions(
        build_criterion(args, num_classes, compute.device, teacher),
        compute,
        build_batch_transform(args, num_classes, compute.device),
        args.clip_grad,
        args.accum_iter,
        args.train_mode,
        args.cosub,
    )


def build_batch_transform(args, num_classes: int, device: torch.device) -> BatchTransform:
    """DeiT's transforms of a training batch; 3-Augment comes without random erasing."""
    erase = mixup = None
    if args.reprob and not args.ThreeAugment:
        erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
    if mixes(args):
        # Binary cross-entropy asks for each class whether the image shows it. Every class that is
        # mixed in counts fully, so smoothing, which gives every class a share, must be off.
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            args.cutmix_minmax,
            args.mixup_prob,
            args.mixup_switch_prob,
            args.mixup_mode,
            label_smoothing=0.0 if args.bce_loss else args.smoothing,
            num_classes=max(num_classes, 1),
        )
    return BatchTransform(device, erase, mixup, *normalization(args))


def build_criterion(
    args, num_classes: int, device: torch.device, dense_teacher: DenseTeacher | None = None
):
    """The training loss, called with images, outputs and targets."""
    if not num_classes:
        return DenseFeaturesLoss(dense_teacher.model)
    if args.cosub:
        return CosubLoss(binary=args.bce_loss)

    if args.bce_loss:
        criterion = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    elif mixes(args):
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(args.smoothing)

    tau = args.distillation_tau
    if dense_teacher:
        return DenseTeacherLoss(criterion, dense_teacher.model, args.dense_teacher, tau)

    teacher = None
    if args.distillation_type != "none":
        teacher = prepare_teacher(args, num_classes, device).to(device)
    return DistillationLoss(
        criterion, teacher, args.distillation_type, args.distillation_alpha, tau
    )


def prepare_teacher(args, num_classes: int, device: torch.device) -> torch.nn.Module:
    """The frozen model that `--distillation-type` learns from, with `--teacher-path`'s weights.

    device: where it will compute.
    """
    log(f"Teacher: {args.teacher_model} with the weights of {args.teacher_path}")
    teacher = build_model(args.teacher_model, num_classes, args.input_size, flag="--teacher-model")
    checkpoint = utils.load_checkpoint(args.teacher_path)
    load_weights(teacher, checkpoint["model"], args.teacher_path)
    if args.compile:
        compile_model(teacher, args.compile_mode)
    if args.channels_last and device.type == "cuda" and is_convolutional(teacher):
        teacher.to(memory_format=torch.channels_last)
    teacher = teacher_inputs(teacher, args, checkpoint)
    return teacher.eval().requires_grad_(False)


def is_convolutional(model: torch.nn.Module) -> bool:
    """Whether a model has convolutions that overlap; those of a patch embedding do not."""
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    return any(layer.kernel_size > layer.stride for layer in convolutions)
