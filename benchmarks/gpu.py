"""How fast a GPU trains and what sparse kernels give there: one file that a stranger can send.

    make test-gpu            # the tests that need a GPU, then this; output/gpu.md has both
    python benchmarks/gpu.py --device cpu --models deit_tiny_patch16_224 --batch-size 2 --steps 2

- **Training**: images per second of this project's step (`lamp` at 65 %, AdamW, a moving average
  of the weights) and of a plain loop over timm's model in the same precision, each as it is and
  compiled.
- **Kernels**: the time of a batch with the quickest sparse kernels for 2:4 and for blocks, and
  dense.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import in_turns, random_model
from timm.utils import ModelEmaV3
from torch import nn

import utils
from engine import Learner, Progress, StepOptions, train_one_epoch
from losses import DistillationLoss
from sparsity_factory import Masks, Recipe, Sparsifier, compute_masks, sparse_kernels
from trainer.exit_status import exit_status
from trainer.parser import Parser
from utils import Compute

WARM_UP = 3  # steps before those that count: compiling, choosing of kernels, filling of caches
KINDS = {"plain": False, "compiled": True}  # of loops: whether the model is compiled
PATTERNS = {"2:4": None, "block:64x64": 0.75}  # what kernels are made for, and the sparsity


def main(argv: list[str]) -> int:
    parser = Parser("gpu.py", __doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=["auto", "bfloat16", "float16", "off"], default="auto")
    parser.add_argument(
        "--models", nargs="+", default=["deit_small_patch16_224", "deit_base_patch16_224"]
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("output/gpu.md"))
    args = parser.parse_args(argv)

    compute = Compute.choose(args.device, args.amp)
    utils.show_progress(quiet=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "a", encoding="utf-8") as file:
        for line in report(args, compute):
            print(line, flush=True)
            file.write(f"{line}\n")
    print(f"Written to {args.output}")
    return 0


def report(args: argparse.Namespace, compute: Compute) -> Iterator[str]:
    """The lines of the report, in Markdown, as they are measured."""
    yield "# Training steps and sparse kernels\n"
    yield f"On {compute.in_words()}; {utils.versions(compute.device)}.\n"

    yield f"| images/s, batch {args.batch_size} | timm's loop | this project | ratio |"
    yield "| --- | ---: | ---: | ---: |"
    for name in args.models:
        for kind in args.kinds:
            theirs, ours = (
                images_per_second(loop(name, compute, args, KINDS[kind]), args, compute)
                for loop in (plain_loop, our_loop)
            )
            yield f"| {name}, {kind} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |"

    yield f"\n| ms, batch {args.batch_size} | dense | sparse | times as fast | layers |"
    yield "| --- | ---: | ---: | ---: | --- |"
    for name in args.models:
        for pattern, sparsity in PATTERNS.items():
            yield kernel_row(name, pattern, sparsity, args.batch_size, compute)


def batch_of(
    model: nn.Module, batch_size: int, compute: Compute
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of the model's size, and targets, on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *model.default_cfg["input_size"], generator=generator)
    targets = torch.randint(1000, (batch_size,), generator=generator)
    return images.to(compute.device), targets.to(compute.device)


def plain_loop(
    name: str, compute: Compute, args: argparse.Namespace, compiled: bool
) -> Callable[[int], None]:
    """So many steps of a plain loop: forward under autocast, backward, AdamW, moving average."""
    model = random_model(name).to(compute.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    average = ModelEmaV3(model, decay=0.9999)
    network = torch.compile(model) if compiled else model
    images, targets = batch_of(model, args.batch_size, compute)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with compute.autocast():
                loss = nn.functional.cross_entropy(network(images), targets)
            loss.backward()
            optimizer.step()
            average.update(model)

    return run


def our_loop(
    name: str, compute: Compute, args: argparse.Namespace, compiled: bool
) -> Callable[[int], None]:
    """So many steps of `engine.train_one_epoch` with masks."""
    model = random_model(name).to(compute.device)
    recipe = Recipe("lamp", 0.65)
    sparsifier = Sparsifier(model, recipe, total_steps=1, epoch_steps=1)
    sparsifier.start()
    if compiled:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    learner = Learner(model, optimizer, sparsifier, ModelEmaV3(model, decay=0.9999))
    options = StepOptions(DistillationLoss(nn.CrossEntropyLoss()), compute)
    batch = batch_of(model, args.batch_size, compute)

    def run(steps: int) -> None:
        train_one_epoch(learner, options, [batch] * steps, Progress())

    return run


def images_per_second(
    run: Callable[[int], None], args: argparse.Namespace, compute: Compute
) -> float:
    """The speed of a loop after its first steps."""
    run(WARM_UP)
    synchronize(compute)
    start = time.perf_counter()
    run(args.steps)
    synchronize(compute)
    return args.steps * args.batch_size / (time.perf_counter() - start)


def synchronize(compute: Compute) -> None:
    """Waits until the device has computed everything."""
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)


def kernel_row(
    name: str, pattern: str, sparsity: float | None, batch_size: int, compute: Compute
) -> str:
    """A row of the table of kernels: the whole model, dense and with the quickest kernels."""
    dense = random_model(name).to(compute.device).eval().requires_grad_(False)
    pruned = copy.deepcopy(dense)
    Masks(pruned, compute_masks(pruned, "unif", sparsity, pattern=pattern))
    images, _ = batch_of(dense, batch_size, compute)

    with torch.no_grad(), compute.autocast():
        quick, report = sparse_kernels(pruned, images)

        def timed(model: nn.Module) -> Callable[[], None]:
            def run() -> None:
                model(images)
                synchronize(compute)

            return run

        taken = in_turns({"dense": timed(dense), "sparse": timed(quick)}, 10)
    used = sum(layer.kernel != "dense" for layer in report.layers) if report.used else 0
    before, after = 1e3 * taken["dense"], 1e3 * taken["sparse"]
    layers = f"{used} of {len(report.layers)} sparse"
    label = f"{name}, `{pattern}`" + (f" at {sparsity:.0%}" if sparsity else "")
    return f"| {label} | {before:.1f} | {after:.1f} | {before / after:.2f} | {layers} |"


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
