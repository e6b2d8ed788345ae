r"""Measures how fast a pruned model runs compared with the dense one, in one run and in turns.

    python benchmarks/latency.py CHECKPOINT [CHECKPOINT ...]
    python benchmarks/latency.py --sparse-kernels CHECKPOINT [CHECKPOINT ...]
    python benchmarks/latency.py --model deit_small_patch16_224 --pattern heads+neurons \
        --sparsity 0.25 0.5
    python benchmarks/latency.py --sparse-kernels --model deit_small_patch16_224 \
        --sparsity 0.8 0.9 0.95 0.98
    python benchmarks/latency.py --model deit_small_patch16_224 --sparsity 0 --tokens 13

The first two forms read checkpoints of main.py; the others prune random weights, which are enough
to measure speed. Pruned heads and neurons are removed from the model. Pruned single weights are
multiplied like other zeros, or computed as by `main.py --eval --sparse-kernels`. Each figure is the
shortest of many times; the machine should be idle.
"""

import argparse
import contextlib
import copy
import io
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from measure import multiply_adds_left, peak_above
from torch import nn

import utils
from engine import evaluate
from models import build_model
from sparsity_factory import (
    PRUNERS,
    Masks,
    PruningError,
    compute_masks,
    parse_pattern,
    shrink,
    sparse_kernels,
)
from sparsity_factory.sparse_kernels import in_turns
from trainer.arguments import parse_args
from trainer.builders import build_loaders
from trainer.exit_status import exit_status
from trainer.export import load_model
from trainer.tokens import merge_tokens

HEADINGS = (
    "| model | batch | | images/s | ms | times | MiB at work | file, MiB | M multiply-adds | "
    "sparse layers | top-1 |"
)


def of_random_weights(
    name: str, pruner: str, pattern: str, sparsity: float, tokens: int
) -> tuple[nn.Module, nn.Module, int]:
    """A model with random weights, the same model pruned, and the side of its images.

    tokens: how many of them each block of the pruned model merges.
    """
    torch.manual_seed(0)
    config = timm.get_pretrained_cfg(name)
    size = config.input_size[1] if config else 224
    dense = build_model(name, 1000, size)

    parsed = parse_pattern(pattern)
    asked = None if parsed.sparsity else sparsity  # n:m has a sparsity of its own
    try:
        masks = compute_masks(dense, pruner, asked, pattern=pattern)
    except PruningError as error:
        raise utils.UserError(str(error)) from None

    if parsed.structured:
        pruned = shrink(dense, masks)
    else:
        pruned = copy.deepcopy(dense)
        Masks(pruned, masks)
    if tokens:
        merge_tokens(pruned, tokens)
    return dense, pruned, size


def of_checkpoint(path: str) -> tuple[nn.Module, nn.Module, int]:
    """The model of a checkpoint with all its units, the pruned model, and the side of its images.

    The weights of the first one are arbitrary.
    """
    args = parse_args(["--resume", path, "--eval"])
    with contextlib.redirect_stdout(io.StringIO()):
        args, dense, pruned, *_ = load_model(args)
    return dense, pruned, args.input_size


def file_size(model: nn.Module) -> int:
    """The bytes of the model as a file."""
    with tempfile.NamedTemporaryFile() as file:
        torch.save(model.state_dict(), file.name)
        return Path(file.name).stat().st_size


def peak_memory(function, device: torch.device) -> int:
    """The bytes that a call needs at its peak, above those that are in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    return peak_above(function)


def accuracy(model: nn.Module, size: int, args, compute: utils.Compute) -> str:
    """Top-1 on the validation images of `--data-path`, or nothing without that."""
    if not args.data_path:
        return ""

    data = ["--data-path", args.data_path, "--data-set", args.data_set]
    data_args = parse_args([*data, "--input-size", str(size), "--eval"])
    with contextlib.redirect_stdout(io.StringIO()):
        loader = build_loaders(data_args, compute.device).val
        found = evaluate(loader, model, compute)
    return f"{found['acc1']:.2f} %"


def rows(title: str, dense: nn.Module, pruned: nn.Module, size: int, args) -> Iterator[str]:
    """Two rows for each batch size: the dense model, and the pruned one."""
    compute = utils.Compute.choose(args.device, args.amp)
    device = compute.device
    models = {"dense": dense, "pruned": pruned}
    models = {kind: model.to(device).eval().requires_grad_(False) for kind, model in models.items()}
    image = torch.zeros(1, 3, size, size, device=device)
    macs = {kind: multiply_adds_left(model, image) for kind, model in models.items()}

    for batch in args.batch_sizes:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, size, size, generator=generator).to(device)

        with torch.no_grad(), compute.autocast():
            quick = models["pruned"]
            sparse = "none"
            if args.sparse_kernels:
                quick, report = sparse_kernels(quick, images)
                used = sum(layer.kernel != "dense" for layer in report.layers) if report.used else 0
                sparse = f"{used} of {len(report.layers)}"
                if args.layers:
                    print(report.table(), flush=True)

            def run(model, images=images):
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize(device)

            runs = {"dense": partial(run, models["dense"]), "pruned": partial(run, quick)}
            taken = in_turns(runs, args.seconds)
            memory = {kind: peak_memory(runs[kind], device) for kind in runs}

        for kind, model in models.items():
            cells = [
                title,
                batch,
                kind,
                f"{batch / taken[kind]:.1f}",
                f"{1000 * taken[kind]:.1f}",
                f"{taken['dense'] / taken[kind]:.2f}",
                f"{memory[kind] / 2**20:.0f}",
                f"{file_size(model) / 2**20:.1f}",
                f"{macs[kind] / 1e6:.1f}",
                sparse if kind == "pruned" else "",
                accuracy(quick, size, args, compute) if kind == "pruned" else "",
            ]
            yield f"| {' | '.join(map(str, cells))} |"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    # What is measured
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument(
        "--model", help="random weights of this model of timm instead of checkpoints"
    )
    parser.add_argument(
        "--pruner", choices=[name for name in PRUNERS if name != "custom"], default="unif"
    )
    parser.add_argument("--pattern", default="unstructured", help="as that of main.py")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95])
    parser.add_argument("--tokens", type=int, default=0, help="with --model: as that of main.py")

    # How
    parser.add_argument("--sparse-kernels", action="store_true")
    parser.add_argument(
        "--layers", action="store_true", help="print what was measured of each layer"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument(
        "--seconds", type=float, default=20, help="for the turns of a model at a batch size"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=["auto", "bfloat16", "float16", "off"], default="auto")

    parser.add_argument(
        "--data-path",
        default="",
        metavar="DIR",
        help="measure the accuracy on its validation images",
    )
    parser.add_argument("--data-set", default="IMNET")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if bool(args.checkpoints) == bool(args.model):
        raise utils.UserError("expected either checkpoints or --model")

    # As in main.py.
    timm.layers.set_fused_attn(utils.choose_device(args.device).type == "cuda")

    print(HEADINGS, flush=True)
    print("| --- | ---: | --- |" + " ---: |" * 8, flush=True)
    for source in args.checkpoints or args.sparsity:
        if args.checkpoints:
            title = source
            found = of_checkpoint(source)
        else:
            title = f"{args.model}, `{args.pruner}` {args.pattern} {100 * source:g} %"
            if args.tokens:
                title += f", `--tokens {args.tokens}`"
            found = of_random_weights(args.model, args.pruner, args.pattern, source, args.tokens)
        for row in rows(title, *found, args):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
