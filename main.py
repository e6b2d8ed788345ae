"""Prunes a vision transformer and finetunes it, with DeiT's recipe and DeiT's arguments.

    python main.py --pruner lamp --sparsity 0.65
    python main.py --model deit_small_patch16_224 --data-path IMAGENET --output_dir OUT \
        --pruner lamp --sparsity 0.65
    torchrun --nproc_per_node=8 main.py --model deit_small_patch16_224 --data-path IMAGENET \
        --output_dir OUT --pruner lamp --sparsity 0.65

The first line needs no data set: it uses the sample in this repository.
"""

import sys

import torch

import utils
from sparsity_factory import Kept, Sparsifier, sparsity_rows, sparsity_table
from sparsity_factory.list_methods import menu
from trainer.arguments import parse_args
from trainer.audit import audit
from trainer.builders import (
    build_compared,
    build_dense_teacher,
    build_loaders,
    build_sparsifier,
    build_state,
    build_step_options,
    check_class_labels,
    choose_compute,
    load_start,
    prepare_model,
    shrink_before_training,
)
from trainer.changes import Reference
from trainer.epochs import Evaluator, train
from trainer.exit_status import exit_status
from trainer.export import export
from trainer.results import open_results
from trainer.run_folder import check_same_run, with_own_folder
from trainer.stop_signals import StopSignals
from utils import Compute, log


def main(args) -> dict[str, float]:
    """The whole run. Returns the top-1 accuracies in percent by name: dense, pruned, finetuned."""
    compute = choose_compute(args)
    utils.init_process_group(
        compute.device, args.dist_url, args.distributed, args.world_size, args.dist_timeout
    )
    utils.show_progress(args.quiet)

    with StopSignals() as stop:
        # Folder, data and model. The model is still dense here, so a dense teacher is copied now.
        args = utils.on_first_process(lambda: with_own_folder(args))
        args, checkpoint = load_start(args)
        compute = choose_compute(args)  # the precision may be the checkpoint's
        utils.seed_everything(utils.INIT, args.seed)  # fresh weights are the same on every process
        utils.on_first_process(lambda: check_same_run(args, checkpoint))
        describe(args)
        describe_device(args, compute)
        loaders = build_loaders(args, compute.device)
        num_classes = loaders.num_classes
        check_class_labels(args, checkpoint, loaders.classes)
        model = prepare_model(args, num_classes, checkpoint, compute.device)
        teacher = build_dense_teacher(args, num_classes, model, checkpoint, compute.device)

        # Masks are chosen, but not applied yet.
        epoch_steps = loaders.steps_of_epoch(args.accum_iter)
        sparsifier = build_sparsifier(
            args, model, checkpoint, epoch_steps, compute, training_images=loaders.training_images
        )
        first_masks = {} if sparsifier.masks else sparsifier.first_masks()
        dense = model
        if args.shrink and (first_masks or "shape" not in checkpoint):
            dense, model, sparsifier = shrink_before_training(args, model, sparsifier, first_masks)

        # What the predictions are compared with.
        before = "before pruning" if "masks" in checkpoint else "dense"
        if args.compare:
            dense, before = build_compared(args, num_classes, compute.device), "reference"
        elif not first_masks:
            dense = None

        # Loss and optimizer come before any evaluation, so that a mistake in them shows at once.
        state = options = None
        if not args.eval:
            options = build_step_options(args, num_classes, compute, teacher)
            bad_images = loaders.train.dataset.bad
            state = build_state(
                args, model, sparsifier, checkpoint, compute, bad_images, teacher, loaders.classes
            )
        results = open_results(args, sparsifier.recipe, state, loaders.train, loaders.val, compute)
        accuracy = state.accuracy if state else {}
        test = Evaluator(loaders.val, args, compute, stop, accuracy, loaders.training_images)
        test.reference = state.reference if state else None

        # Prune, and measure before and after.
        checkpoint = None  # it would only take memory from here on
        kept = prune(dense, model, sparsifier, first_masks, test, before, args.eval)
        dense = None
        image = torch.zeros(1, 3, args.input_size, args.input_size, device=compute.device)
        results.start(model, kept, test.accuracy, image)

        # Finetune.
        accuracy = test.accuracy
        if state:
            state.reference = test.reference
            trained = train(state, options, loaders.train, test, stop, results)
            accuracy = {**accuracy, "finetuned" if sparsifier.masks else "trained": trained}
        comparison = test.compared(next(reversed(accuracy)))

    results.finish(accuracy, sparsity_rows(model, sparsifier.masks), comparison)
    if utils.is_main_process():  # also with --quiet
        shown = ", ".join(f"{name} {value:.2f} %" for name, value in accuracy.items())
        print(f"Top-1 accuracy: {shown}")
    return accuracy


def prune(
    dense,
    model,
    sparsifier: Sparsifier,
    first_masks: dict,
    test: Evaluator,
    before: str,
    evaluates: bool,
) -> Kept:
    """Applies masks that the model does not have yet, and reports what is kept of each layer.

    dense: what is measured before pruning, and compared with: the model itself, what it was before
        it was shrunk, or that of `--compare`; or None.
    before: the name of its accuracy.
    evaluates: measure the accuracy also if nothing is pruned here.
    """
    if dense is not None:
        test.measure(before, dense)
        test.reference = Reference(before, test.predictions())
    if first_masks:
        sparsifier.start(first_masks)

    kept = sparsity_rows(model, sparsifier.masks)
    pruned = sparsifier.masks.sparsity() > 0
    if pruned:
        log(sparsity_table(kept))

    if evaluates or first_masks and pruned:
        test.measure("pruned" if pruned else "dense", test.quickest(model))
    return kept


def describe(args) -> None:
    """Prints the first lines of a run: its arguments, or that it uses the sample."""
    if args.data_path:
        log(f"Arguments: {vars(args)}", only=utils.LINES)
    else:
        log(
            "No --data-path: using the built-in sample, 6,000 training and 2,000 test images of "
            "Fashion-MNIST.\n"
            "For a data set of your own: --data-path DIR --model NAME. DIR needs train/ and val/, "
            "each with a folder per class."
        )


def describe_device(args, compute: Compute) -> None:
    """Prints the model, and where and how it is computed."""
    log(f"{args.model} on {compute.in_words()}, {utils.world_size()} process(es)")
    if compute.device.type == "cuda" and args.tf32:
        log("Factors of float32 products are rounded to TensorFloat-32; --no-tf32 keeps them whole")


def command(argv: list[str]) -> int:
    """The work of the command line."""
    args = parse_args(argv)
    if args.list_methods:
        print(menu())
        return 0
    if args.audit:
        return audit(args.audit, args.expect or ())
    if args.export:
        export(args)
        return 0
    main(args)
    return 0


def run(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: command(argv))


if __name__ == "__main__":
    utils.end_process(lambda: run(sys.argv[1:]))
