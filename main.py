"""Prunes a vision transformer and finetunes it, with DeiT's recipe and DeiT's arguments.

    python main.py --pruner lamp --sparsity 0.65
    python main.py --model deit_small_patch16_224 --data-path IMAGENET --output_dir OUT --pruner lamp --sparsity 0.65
    torchrun --nproc_per_node=8 main.py --model deit_small_patch16_224 --data-path IMAGENET --output_dir OUT \
        --pruner lamp --sparsity 0.65

The first line needs no data set: it uses the sample in this repository.
"""

import datetime
import math
import sys
import time

import timm.layers
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

import utils
from arguments import mixes, parse_args
from augment import BatchTransform
from datasets import build_dataset
from engine import DivergedError, check_finite, evaluate, train_one_epoch
from losses import CosubLoss, DistillationLoss
from models import adapt_weights, build_model, load_weights, train_attention_only, train_both_heads
from output import OutputDir, newest_checkpoint
from results import open_results
from samplers import EvalBatchSampler, SeededDataset, SeededStream, StreamLoader, TrainSampler
from sparsity_factory import (
    Masks,
    PruningError,
    check_masks,
    checkpoint_table,
    compute_masks,
    read_yaml,
    sparsity_rows,
    sparsity_table,
    unpack,
)
from state import TrainingState
from stopping import Stopped, StopSignals, ignore_signals
from utils import UserError, WriteError, log


def main(args) -> dict[str, float]:
    """The whole run; returns the top-1 accuracies in percent (dense, pruned, finetuned) that it measured."""
    device = utils.init_process_group(args.device, args.dist_url, args.distributed, args.world_size)
    amp_dtype = utils.choose_amp(args.amp, device)
    utils.show_progress(args.quiet)
    describe(args, device, amp_dtype)
    utils.seed_everything(utils.INIT, args.seed)  # the same on every process, so that fresh weights are the same

    with StopSignals() as stop:
        train_loader, val_loader, num_classes = build_loaders(args, device)
        args.resume = find_resume(args.resume, args.output_dir)
        checkpoint = utils.load_checkpoint(args.resume or args.finetune) if args.resume or args.finetune else {}
        model = prepare_model(args, num_classes, checkpoint, device)
        pruner, masks, chosen = prepare_masks(args, model, checkpoint)
        was_pruned, resumes = "masks" in checkpoint, bool(args.resume) and "optimizer" in checkpoint and not args.eval
        accuracy = {}
        if not args.eval:  # before any evaluation, so that a mistake shows at once
            state = TrainingState(model, args, device, train_loader.dataset.bad)
            if resumes:
                state.start(masks, pruner)
                state.resume(checkpoint, args.resume)
            accuracy = state.accuracy
            batch_transform = build_batch_transform(args, num_classes, device)
            criterion = build_criterion(args, num_classes, device)
        results = open_results(args, pruner, 0 if args.eval else state.epoch, train_loader, val_loader, device)
        checkpoint = None  # from here on it would only take memory

        def test(network=model):
            where = next(network.parameters()).device  # a moving average may be kept on the CPU
            return evaluate(val_loader, network, where, amp_dtype=amp_dtype, shared=args.dist_eval,
                            after_batch=stop.checks(common_batches(val_loader)), print_freq=args.print_freq)

        def measure(name):
            log(f"Accuracy: {name}", only=utils.LINES)
            accuracy[name] = test()["acc1"]
            log(f"{name}: {accuracy[name]:.2f} %", only=utils.BARS)

        if chosen is not None:
            measure("before pruning" if was_pruned else "dense")
            masks = Masks(model, chosen)
        rows = sparsity_rows(model, masks.masks if masks else {})
        if masks is not None:
            log(sparsity_table(rows))
        if chosen is not None or args.eval:
            measure("pruned" if masks else "dense")
        results.start(model, rows, accuracy, torch.zeros(1, 3, args.input_size, args.input_size, device=device))
        if not args.eval:
            if not resumes:
                state.start(masks, pruner)
            finetuned = train(state, train_loader, batch_transform, criterion, test, stop, device, amp_dtype, results)
            accuracy = {**accuracy, "finetuned" if masks else "trained": finetuned}
        if masks is not None:
            check_masks(model.state_dict(), masks.masks, pruner)
            if not args.eval and state.ema:
                check_masks(state.ema.module.state_dict(), masks.masks, pruner)
    results.finish(accuracy)
    if utils.is_main_process():  # also with --quiet
        print("Top-1 accuracy: " + ", ".join(f"{name} {value:.2f} %" for name, value in accuracy.items()))
    return accuracy


def describe(args, device, amp_dtype) -> None:
    """Prints the first lines of a run: its arguments, and what it runs on."""
    if args.data_path:
        log(f"Arguments: {vars(args)}", only=utils.LINES)
    else:
        log("No --data-path: using the built-in sample, 6,000 training and 2,000 test images of Fashion-MNIST.\n"
            "For a data set of your own: --data-path DIR --model NAME, DIR having train/ and val/ with a folder per "
            "class.")
    log(f"{args.model} on {device} in {utils.in_words(amp_dtype)}, {utils.world_size()} process(es)")


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
    share = (rank, world_size) if args.dist_eval else (0, 1)
    val_batch_size = int(1.5 * args.batch_size)
    options = {"num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda",
               "worker_init_fn": ignore_signals}
    if isinstance(train_set, IterableDataset):
        train_set, val_set = (SeededStream(stream, args.seed, num_classes) for stream in (train_set, val_set))
        train_loader = StreamLoader(train_set, args.batch_size, share=(rank, world_size), **options)
        val_loader = StreamLoader(val_set, val_batch_size, share=share, **options)
    else:
        options["persistent_workers"] = args.num_workers > 0
        sampler = TrainSampler(len(train_set), args.seed, 3 if args.repeated_aug else 1, rank, world_size)
        train_set = SeededDataset(train_set, args.skip_bad_images)
        train_loader = DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **options)
        val_batches = EvalBatchSampler(len(val_set), val_batch_size, *share)
        val_loader = DataLoader(val_set, batch_sampler=val_batches, **options)
    if not len(train_loader) and not args.eval:
        raise UserError(f"--batch-size {args.batch_size}: more than the training images of each process")
    return train_loader, val_loader, num_classes


def common_batches(val_loader) -> int:
    """How many batches every process evaluates: with `--dist-eval` some have one more."""
    sampler = getattr(val_loader, "batch_sampler", None)
    return sampler.common_length() if sampler else 0  # what a stream has shows when it ends


def find_resume(resume: str, output_dir: str) -> str:
    """The checkpoint to resume from: with `auto` the newest in the folder, or none; the same on every process."""
    if resume != "auto":
        return resume
    found = utils.on_first_process(lambda: newest_checkpoint(output_dir))
    log(f"--resume auto: {found or f'no checkpoint in {output_dir}, so the run starts from the beginning'}")
    return found


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
    if args.compile:
        model.compile()  # in place: parameters keep their names, and masks and averages their parameters
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
    if args.resume and asked and continues and str(asked) != str(stored):  # what is stored may be anybody's
        raise UserError(f"--pruner {args.pruner}: {args.resume} is of a run with {pruner_in_words(stored)}; leave the "
                        "pruning flags out, or prune its weights anew with --finetune")
    if "masks" in checkpoint and (args.resume or not asked):
        try:
            stored_masks = unpack(checkpoint["masks"])
            for kind in ("model", "model_ema"):
                check_masks(checkpoint.get(kind, {}), stored_masks, stored)
            return stored, Masks(model, stored_masks), None
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


def build_batch_transform(args, num_classes: int, device: torch.device) -> BatchTransform:
    """DeiT's transforms of a training batch on its device; 3-Augment comes without random erasing."""
    erase = mixup = None
    if args.reprob and not args.ThreeAugment:
        erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
    if mixes(args):
        # Binary cross-entropy asks of each class whether the image shows it: every class that is mixed in counts fully,
        # and smoothing, which gives every class a share, would make that every class.
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                      args.mixup_mode, label_smoothing=0.0 if args.bce_loss else args.smoothing,
                      num_classes=num_classes)
    return BatchTransform(device, erase, mixup)


def build_criterion(args, num_classes, device):
    """The training loss, called with images, outputs and targets."""
    if args.cosub:
        return CosubLoss(binary=args.bce_loss)
    if args.bce_loss:
        criterion = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    else:
        criterion = SoftTargetCrossEntropy() if mixes(args) else LabelSmoothingCrossEntropy(args.smoothing)
    teacher = None
    if args.distillation_type != "none":
        teacher = prepare_teacher(args, num_classes).to(device)
    return DistillationLoss(criterion, teacher, args.distillation_type, args.distillation_alpha,
                            args.distillation_tau)


def prepare_teacher(args, num_classes) -> torch.nn.Module:
    """The model that `--distillation-type` learns from, frozen, with the weights of `--teacher-path`."""
    log(f"Teacher: {args.teacher_model} with the weights of {args.teacher_path}")
    teacher = build_model(args.teacher_model, num_classes, args.input_size, flag="--teacher-model")
    load_weights(teacher, utils.load_checkpoint(args.teacher_path)["model"], args.teacher_path)
    return teacher.eval().requires_grad_(False)


def train(state, loader, batch_transform, criterion, test, stop, device, amp_dtype, results) -> float:
    """Trains to the last epoch, evaluating and writing checkpoints after each; returns the last top-1 accuracy."""
    args, network = state.args, state.model
    if utils.world_size() > 1:
        network = distribute(network, device, args.input_size)
    loader.sampler.set_epoch(state.epoch)
    steps = math.ceil(len(loader) / args.accum_iter)
    log(f"Training epochs {state.epoch} to {args.epochs - 1}, {steps} steps each"
        + (f"; going on after step {state.epoch_step} of epoch {state.epoch}" if state.epoch_step else ""))
    start, test_stats = time.time(), {}

    def after_step(done):
        state.end_step()
        stop.check()
        if args.checkpoint_every and done % args.checkpoint_every == 0 and done < steps:
            save(state, results.folder)

    try:
        while state.epoch < args.epochs:
            loader.sampler.set_epoch(state.epoch, skip=state.epoch_step * args.batch_size * args.accum_iter)
            began, images = time.time(), len(loader) * args.batch_size * utils.world_size()
            train_stats = train_one_epoch(
                network, criterion, loader, state.optimizer, device, state.epoch, seed=args.seed, amp_dtype=amp_dtype,
                scaler=state.scaler, clip_grad=args.clip_grad, ema=state.ema, batch_transform=batch_transform,
                masks=state.masks, train_mode=args.train_mode, cosub=args.cosub, accum_iter=args.accum_iter,
                first_step=state.epoch_step, logger=state.logger, after_step=after_step, print_freq=args.print_freq)
            speed = images / (time.time() - began)
            test_stats = {"test": test()}
            if state.ema:
                log("Moving average of the weights", only=utils.LINES)
                test_stats["test_ema"] = test(state.ema.module)
            state.share_bad_images()
            improved = state.end_epoch([stats["acc1"] for stats in test_stats.values()])
            line = epoch_metrics(state, {"train": train_stats, **test_stats})
            log(f"Max accuracy: {state.max_accuracy:.2f}% ({state.best})", only=utils.LINES)
            log(epoch_in_words(line, speed), only=utils.BARS)
            results.log_epoch(line, speed)
            save(state, results.folder, improved)
    except Stopped as stopped:
        save(state, results.folder)
        stopped.add_place(state.epoch, state.epoch_step, args.output_dir)
        raise
    log(f"Training time {datetime.timedelta(seconds=int(time.time() - start))}")
    return test_stats["test"]["acc1"] if test_stats else test()["acc1"]


def distribute(model, device, input_size) -> DistributedDataParallel:
    """The model in DDP, which averages gradients over the processes."""
    network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    # DDP arranges its buckets anew after the first backward pass, and with them the order of its sums. That pass is
    # made here, so that the first step of a resumed run sums as the same step of an undisturbed one does.
    outputs = network(torch.zeros(2, 3, input_size, input_size, device=device))
    sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    model.zero_grad()
    return network


def save(state, output: OutputDir | None, best: bool = False) -> None:
    """Writes the checkpoint, if the run has an output folder. Every process calls it; the first one writes."""
    if state.args.output_dir:
        check_finite(state.logger, state.epoch, state.epoch_step, state.model)
        content = state.state_dict()
        utils.on_first_process(lambda: output.save(content, best))


def epoch_metrics(state, metrics: dict[str, dict[str, float]]) -> dict:
    """The line of log.txt for the epoch that has just ended."""
    line = {f"{kind}_{name}": value for kind, stats in metrics.items() for name, value in stats.items()}
    return {**line, "epoch": state.epoch - 1,
            "n_parameters": sum(p.numel() for p in state.model.parameters() if p.requires_grad)}


def epoch_in_words(line: dict[str, float], speed: float) -> str:
    """What a terminal shows of an epoch; `speed` in images a second."""
    average = f", moving average {line['test_ema_acc1']:.2f} %" if "test_ema_acc1" in line else ""
    return (f"epoch {line['epoch']}: training loss {line['train_loss']:.4f}, validation loss {line['test_loss']:.4f}, "
            f"top-1 {line['test_acc1']:.2f} %{average}, learning rate {line['train_lr']:.2g}, {speed:,.0f} images/s")


def run(argv) -> int:
    """What the command line does; returns the exit status."""
    def work():
        args = parse_args(argv)
        if args.audit:
            return audit(args.audit)
        main(args)
        return 0

    return exit_status(work)


def exit_status(work) -> int:
    """What `work()` returns, or else 2 with one line on standard error for a mistake of the user."""
    utils.quiet_libraries()
    try:
        status = work()
        if dist.is_initialized():  # after a failure of one process alone, NCCL would wait here for the others
            dist.destroy_process_group()
        return status
    except (UserError, PruningError) as error:
        status, message = 2, f"error: {error}"
        error.__traceback__ = None  # from a data worker, it makes a reference cycle that keeps the workers alive
    except (DivergedError, WriteError) as error:
        status, message = 1, f"error: {error}"
    except Stopped as stopped:
        status, message = stopped.status, str(stopped)
    except OSError as error:  # a pipe that was closed, a disk that is full where the output goes
        status, message = 1, f"error: {error}"
    except RuntimeError as error:
        reason = reason_of(error)
        if not reason:
            if not dist.is_initialized() or utils.is_first_to_fail():
                raise
            return 1  # the first process to fail has said why
        status, message = 1, f"error: {reason}"
    if utils.is_first_to_fail():
        if "Traceback" in message:  # from a data worker, the error is the last line
            message = "error: " + message.strip().splitlines()[-1].partition(": ")[2]
        print(" ".join(message.split()), file=sys.stderr)
    return status


def reason_of(error) -> str:
    """Which data worker or process is gone, where an error or one that it came from tells that; else nothing."""
    while error:
        if str(error).startswith("DataLoader worker"):
            return str(error)
        if failure := utils.exchange_failure(error):
            return failure
        error = error.__context__
    return ""


def audit(path: str) -> int:
    """Prints what a checkpoint keeps of each layer, from the file alone; 1 if its weights do not obey its masks."""
    checkpoint = utils.load_checkpoint(path)
    masks = unpack(checkpoint.get("masks", {}))
    if not masks:
        raise UserError(f"{path}: holds no masks; expected a checkpoint of a pruned run")
    print(checkpoint_table(checkpoint["model"], masks))
    print(f"pruned with {pruner_in_words(checkpoint.get('pruner'))}")
    for kind in ("model", "model_ema"):
        try:
            check_masks(checkpoint.get(kind, {}), masks, checkpoint.get("pruner"))
        except PruningError as error:
            print(f"error: {path}: {kind}: {error}", file=sys.stderr)
            return 1
    print("every pruned weight is zero, and every n:m group holds")
    return 0


if __name__ == "__main__":
    utils.end_process(lambda: run(sys.argv[1:]))
