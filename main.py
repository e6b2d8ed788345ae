"""Prunes a vision transformer and finetunes it, with DeiT's recipe and DeiT's arguments.

    python main.py --pruner lamp --sparsity 0.65
    python main.py --model deit_small_patch16_224 --data-path IMAGENET --output_dir OUT --pruner lamp --sparsity 0.65
    torchrun --nproc_per_node=8 main.py --model deit_small_patch16_224 --data-path IMAGENET --output_dir OUT \
        --pruner lamp --sparsity 0.65

The first line needs no data set: it uses the sample in this repository.
"""

import datetime
import json
import logging
import os
import sys
import time
from pathlib import Path

import timm.layers
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import utils
from arguments import mixes, parse_args
from datasets import build_dataset
from engine import DivergedError, evaluate, train_one_epoch
from losses import CosubLoss, DistillationLoss
from models import adapt_weights, build_model, load_weights, train_attention_only, train_both_heads
from samplers import EvalBatchSampler, SeededDataset, TrainSampler
from sparsity_factory import Masks, PruningError, compute_masks, read_yaml, sparsity_table, unpack
from state import TrainingState
from utils import UserError, log


def main(args) -> dict[str, float]:
    """The whole run; returns the top-1 accuracies in percent (dense, pruned, finetuned) that it measured."""
    device = utils.init_process_group(args.device, args.dist_url, args.distributed, args.world_size)
    amp_dtype = utils.choose_amp(args.amp, device)
    log(describe(args, device, amp_dtype))
    utils.seed_everything(utils.INIT, args.seed)  # the same on every process, so that fresh weights are the same

    train_loader, val_loader, num_classes = build_loaders(args, device)
    checkpoint = utils.load_checkpoint(args.resume or args.finetune) if args.resume or args.finetune else {}
    model = prepare_model(args, num_classes, checkpoint, device)
    pruner, masks, chosen = prepare_masks(args, model, checkpoint)
    was_pruned, resumes = "masks" in checkpoint, bool(args.resume) and "optimizer" in checkpoint
    if not args.eval:  # before any evaluation, so that a mistake shows at once
        state = TrainingState(model, args, device)
        if resumes:
            state.start(masks, pruner)
            state.resume(checkpoint, args.resume)
        criterion, mixup_fn = build_criterion(args, num_classes, device)
        output_dir = make_output_dir(args.output_dir)
    checkpoint = None  # from here on it would only take memory

    def test(network=model):
        where = next(network.parameters()).device  # a moving average may be kept on the CPU
        return evaluate(val_loader, network, where, amp_dtype=amp_dtype, shared=args.dist_eval)

    accuracy = {}
    if chosen is not None:
        log("Accuracy before pruning")
        accuracy["before pruning" if was_pruned else "dense"] = test()["acc1"]
        masks = Masks(model, chosen)
    if masks is not None:
        log(sparsity_table(model, masks.masks))
    if chosen is not None or args.eval:
        log("Accuracy of the pruned model" if masks else "Accuracy of the dense model")
        accuracy["pruned" if masks else "dense"] = test()["acc1"]
    if not args.eval:
        if not resumes:
            state.start(masks, pruner)
        accuracy["finetuned" if masks else "trained"] = train(
            state, train_loader, criterion, mixup_fn, test, device, amp_dtype, output_dir)
    log("Top-1 accuracy: " + ", ".join(f"{name} {value:.2f} %" for name, value in accuracy.items()))
    return accuracy


def describe(args, device, amp_dtype) -> str:
    """The first lines of a run: its arguments, and what it runs on."""
    source = f"Arguments: {vars(args)}" if args.data_path else (
        "No --data-path: using the built-in sample, 6,000 training and 2,000 test images of Fashion-MNIST.\n"
        "For a data set of your own: --data-path DIR --model NAME, DIR having train/ and val/ with a folder per class.")
    precision = str(amp_dtype or torch.float32).removeprefix("torch.")
    return f"{source}\n{args.model} on {device} in {precision}, {utils.world_size()} process(es)"


def build_loaders(args, device) -> tuple[DataLoader, DataLoader, int]:
    """The loaders of the training and the validation images, and the number of classes."""
    train_set, num_classes = build_dataset(True, args)
    val_set, _ = build_dataset(False, args)
    labels = getattr(train_set, "class_to_idx", {})
    for name, label in getattr(val_set, "class_to_idx", {}).items():
        if labels.get(name) != label:
            raise UserError(f"--data-path {args.data_path}: class {name} of val/ is number {label} there, and "
                            f"{labels.get(name, 'missing')} in train/; expected the same folders in both")
    rank, world_size = utils.rank(), utils.world_size()
    sampler = TrainSampler(len(train_set), args.seed, 3 if args.repeated_aug else 1, rank, world_size)
    if len(sampler) < args.batch_size and not args.eval:
        raise UserError(f"--batch-size {args.batch_size}: there are only {len(sampler)} images for each process")
    options = {"num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda",
               "persistent_workers": args.num_workers > 0}
    train_loader = DataLoader(SeededDataset(train_set), args.batch_size, sampler=sampler, drop_last=True, **options)
    share = (rank, world_size) if args.dist_eval else (0, 1)
    batches = EvalBatchSampler(len(val_set), int(1.5 * args.batch_size), *share)
    return train_loader, DataLoader(val_set, batch_sampler=batches, **options), num_classes


def prepare_model(args, num_classes, checkpoint, device) -> torch.nn.Module:
    """The model on its device, with timm's weights or the checkpoint's."""
    # On CPUs plain attention is quicker: a training step of the sample in bfloat16 takes half as long as with fused.
    timm.layers.set_fused_attn(device.type == "cuda")
    pretrained = args.pretrained and not checkpoint
    source = args.resume or args.finetune or ("timm, pretrained" if pretrained else "random")
    log(f"Weights of {args.model}: {source}")
    model = build_model(args.model, num_classes, args.input_size, drop=args.drop, drop_path=args.drop_path,
                        pretrained=pretrained)
    if args.resume:
        load_weights(model, checkpoint["model"], args.resume)
    elif args.finetune:
        load_weights(model, adapt_weights(model, checkpoint["model"]), args.finetune)
    if args.attn_only:
        train_attention_only(model)
    if args.distillation_type != "none":
        train_both_heads(model, args.model)
    return model.to(device)


def prepare_masks(args, model, checkpoint) -> tuple[dict | None, Masks | None, dict | None]:
    """What prunes the model: a description for checkpoints, the masks of the checkpoint, or else newly chosen ones.

    A resumed run has the masks of its checkpoint. With `--finetune`, a pruner that is asked for replaces them. The
    newly chosen masks are not applied yet, so that the dense model can be evaluated.
    """
    asked = args.pruner and {"name": args.pruner, "sparsity": args.sparsity,
                             "custom_config": read_yaml(args.custom_config) if args.custom_config else None}
    stored = checkpoint.get("pruner")
    continues = "masks" in checkpoint or ("optimizer" in checkpoint and not args.eval)
    if args.resume and asked and continues and asked != stored:
        raise UserError(f"--pruner {args.pruner}: {args.resume} is of a run with {pruner_in_words(stored)}; leave the "
                        "pruning flags out, or prune its weights anew with --finetune")
    if "masks" in checkpoint and (args.resume or not asked):
        try:
            return stored, Masks(model, unpack(checkpoint["masks"])), None
        except PruningError as error:
            raise UserError(f"{args.resume or args.finetune}: {error}") from None
    if not asked:
        return None, None, None

    def choose():
        masks = compute_masks(model, args.pruner, args.sparsity, args.custom_config)
        return {name: mask.cpu() for name, mask in masks.items()}

    return asked, None, utils.on_first_process(choose)


def pruner_in_words(pruner: dict | None) -> str:
    """What a checkpoint says it was pruned with, as the flags that ask for it."""
    if not isinstance(pruner, dict):
        return "no pruner"
    sparsity = pruner.get("sparsity")
    return f"--pruner {pruner.get('name')} " + ("--custom-config" if sparsity is None else f"--sparsity {sparsity}")


def build_criterion(args, num_classes, device):
    """The training loss, called with images, outputs and targets, and what mixes the images of a batch (or None)."""
    # Binary cross-entropy asks of each class whether the image shows it: every class that is mixed in counts fully, and
    # smoothing, which gives every class a share, would make that every class.
    smoothing = 0.0 if args.bce_loss else args.smoothing
    mixup_fn = None
    if mixes(args):
        mixup_fn = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                         args.mixup_mode, label_smoothing=smoothing, num_classes=num_classes)
    if args.cosub:
        return CosubLoss(binary=args.bce_loss), mixup_fn
    if args.bce_loss:
        criterion = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    else:
        criterion = SoftTargetCrossEntropy() if mixup_fn else LabelSmoothingCrossEntropy(args.smoothing)
    teacher = None
    if args.distillation_type != "none":
        teacher = prepare_teacher(args, num_classes).to(device)
    return DistillationLoss(criterion, teacher, args.distillation_type, args.distillation_alpha,
                            args.distillation_tau), mixup_fn


def prepare_teacher(args, num_classes) -> torch.nn.Module:
    """The model that `--distillation-type` learns from, frozen, with the weights of `--teacher-path`."""
    log(f"Teacher: {args.teacher_model} with the weights of {args.teacher_path}")
    teacher = build_model(args.teacher_model, num_classes, args.input_size, flag="--teacher-model")
    load_weights(teacher, utils.load_checkpoint(args.teacher_path)["model"], args.teacher_path)
    return teacher.eval().requires_grad_(False)


def train(state, loader, criterion, mixup_fn, test, device, amp_dtype, output_dir) -> float:
    """Trains to the last epoch, evaluating and writing checkpoints after each; returns the last top-1 accuracy."""
    args, network = state.args, state.model
    if utils.world_size() > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    log(f"Training epochs {state.epoch} to {args.epochs - 1}, {len(loader)} steps each")
    start, test_stats = time.time(), {}
    while state.epoch < args.epochs:
        loader.sampler.set_epoch(state.epoch)
        train_stats = train_one_epoch(
            network, criterion, loader, state.optimizer, device, state.epoch, seed=args.seed, amp_dtype=amp_dtype,
            scaler=state.scaler, clip_grad=args.clip_grad, ema=state.ema, mixup_fn=mixup_fn, masks=state.masks,
            train_mode=args.train_mode, cosub=args.cosub)
        test_stats = {"test": test()}
        if state.ema:
            log("Moving average of the weights")
            test_stats["test_ema"] = test(state.ema.module)
        improved = state.end_epoch(len(loader), [stats["acc1"] for stats in test_stats.values()])
        log(f"Max accuracy: {state.max_accuracy:.2f}% ({state.best})")
        if output_dir and utils.is_main_process():
            write_epoch(output_dir, state, improved, {"train": train_stats, **test_stats})
    log(f"Training time {datetime.timedelta(seconds=int(time.time() - start))}")
    if output_dir and test_stats:
        log(f"Written to {output_dir}: checkpoint.pth (last epoch), best_checkpoint.pth, log.txt")
    return test_stats["test"]["acc1"] if test_stats else test()["acc1"]


def write_epoch(output_dir: Path, state, improved: bool, metrics: dict[str, dict[str, float]]) -> None:
    """Writes the checkpoints of an epoch, and its metrics as a line of log.txt."""
    content = state.state_dict()
    utils.save_checkpoint(content, output_dir / "checkpoint.pth")
    if improved:
        utils.save_checkpoint(content, output_dir / "best_checkpoint.pth")
    line = {f"{kind}_{name}": value for kind, stats in metrics.items() for name, value in stats.items()}
    line |= {"epoch": state.epoch - 1,
             "n_parameters": sum(p.numel() for p in state.model.parameters() if p.requires_grad)}
    utils.append_line(output_dir / "log.txt", json.dumps(line))


def make_output_dir(name: str) -> Path | None:
    """The folder of `--output_dir`, made where it is missing; None when nothing is to be written."""
    if not name:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {name}: {error.strerror}") from None
    if not os.access(name, os.W_OK):
        raise UserError(f"--output_dir {name}: not writable")
    return Path(name)


def run(argv) -> int:
    """Runs `main` and returns the exit status: 2 with one line on standard error for a mistake of the user."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # an error line here says what its many say
    try:
        main(parse_args(argv))
        return 0
    except (UserError, PruningError) as error:
        status, message = 2, error
    except DivergedError as error:
        status, message = 1, error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if utils.local_rank() == 0:
        # From a data worker the message comes with a traceback before it.
        print("error:", " ".join(str(message).rpartition("UserError: ")[2].split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
