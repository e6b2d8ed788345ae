"""Accuracy against measured time, for each way to make the sample's model faster.

    python benchmarks/tradeoff.py FASHION_MNIST   # the folder of the four official files
    python benchmarks/tradeoff.py                 # trains nothing, and measures what there is

main.py trains every model, in its own folder under `output/tradeoff`, and evaluates it on all
10,000 test images; a run whose folder is complete is not repeated. Pruned models are reconstructed,
and finetuned for two epochs on the 6,000 images of the sample, with the dense model as the only
teacher. What is searched has a budget of time, as search.py measures it here. Smaller models see
the 60,000 training images eight times, as the dense model did.

Then all are timed in turns, as they run fastest: without pruned heads and neurons, with sparse
kernels, in float32 or bfloat16. So are random weights of DeiT-Small's shape, pruned alike. The
machine should be idle. Two tables are printed, and two pictures written to `output/tradeoff`.
"""

import argparse
import contextlib
import copy
import io
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm.layers
import torch
from measure import ROOT, multiply_adds_left
from torch import Tensor, nn
from tqdm import tqdm

from models import build_model
from sparsity_factory import Masks, compute_masks, shrink, sparse_kernels
from sparsity_factory.sparse_kernels import DENSE, in_turns
from trainer.arguments import parse_args
from trainer.export import load_model
from trainer.plots import png, tradeoff_points
from trainer.sweep_table import mean_and_range
from trainer.tokens import merge_tokens

OUTPUT = ROOT / "output" / "tradeoff"
SAMPLE = str(OUTPUT / "images" / "sample")  # the sample's training images and all test images
WHOLE = str(OUTPUT / "images" / "whole")
SEEDS = (0, 1)

DATA = ("--data-set", "FASHION", "--data-path", SAMPLE)
ZEROS = ("--config", "configs/run/sample_best.yaml", *DATA)
GENTLE = (*ZEROS, "--lr", "2e-4")  # where little has to be won back
UNITS = ("--config", "configs/run/sample_best_units.yaml", *DATA)
CUSTOM = (*GENTLE, "--pruner", "custom", "--score", "fisher")
SCRATCH = ("--config", "configs/run/sample_dense.yaml", "--data-path", WHOLE)
SMALLER = "smaller"
SEARCHED = "searched"
#: The share of the dense model's time that each search may spend, at the last of BATCHES.
SEARCHES = {"70%": "0.7", "50%": "0.5"}
FOUND = str(OUTPUT / "search")  # begins the name of the folder of each search


def at_sparsities(sparsities: Sequence[float], *arguments: str) -> dict[str, list[str]]:
    """The arguments of main.py for each sparsity, by its label."""
    return {f"{share:.0%}": [*arguments, "--sparsity", str(share)] for share in sparsities}


#: The arguments of main.py for each model, by its way to be faster and its label.
WAYS: dict[str, dict[str, list[str]]] = {
    "heads+neurons": at_sparsities((0.25, 0.5, 0.65), *UNITS),
    "unstructured": {
        **at_sparsities((0.5, 0.7, 0.8), *GENTLE),
        **at_sparsities((0.9, 0.95), *ZEROS),
    },
    "block:2x1": {
        **at_sparsities((0.5, 0.7, 0.8), *GENTLE, "--pattern", "block:2x1"),
        **at_sparsities((0.9,), *ZEROS, "--pattern", "block:2x1"),
    },
    "block:4x1": {
        **at_sparsities((0.5, 0.7, 0.8), *GENTLE, "--pattern", "block:4x1"),
        **at_sparsities((0.9,), *ZEROS, "--pattern", "block:4x1"),
    },
    "tokens": {
        f"R = {count}": [*GENTLE, "--sparsity", "0", "--tokens", str(count)] for count in (2, 4, 6)
    },
    SEARCHED: {
        label: [*CUSTOM, "--custom-config", f"{FOUND}-{budget}/search.yaml"]
        for label, budget in SEARCHES.items()
    },
    SMALLER: {"56 wide": [*SCRATCH, "--model-kwargs", "embed_dim=56", "num_heads=2"]},
}

#: DeiT-Small is timed as well: 4 times as wide, with 4 times the patches and 2 times the blocks.
LARGE = "deit_small_patch16_224"
#: Its label and further arguments for some labels above.
LARGE_LABELS = {
    "R = 2": ("R = 4", ["--tokens", "4"]),
    "R = 4": ("R = 8", ["--tokens", "8"]),
    "R = 6": ("R = 12", ["--tokens", "12"]),
    "56 wide": ("224 wide", ["--model-kwargs", "embed_dim=224", "num_heads=4"]),
}

BATCHES = (1, 64)
DTYPES = (torch.float32, torch.bfloat16)
SECONDS = 10  # for the turns of all models
FEW = 8  # images that show as well as many which kernels and dtypes are the quickest

Name = tuple[str, str]  # way and label
NO_WAY = (DENSE, "")


class Measured(NamedTuple):
    """A model of a table.

    seconds: of each batch. left: the share of the dense model's multiply-adds. pruned, final: top-1
    accuracies in percent of each seed, right after pruning and in the end.
    """

    seconds: Sequence[float]
    left: float
    pruned: Sequence[float] = ()
    final: Sequence[float] = ()


# ---- training ----


def train(official: Path) -> None:
    """Trains each model whose folder is not complete, all of a seed before those of the next."""
    link_images(official)
    runs = [(seed, *name) for seed in SEEDS for name in names() if seed == 0 or name[0] != SMALLER]
    for seed, way, label in tqdm(runs, "runs"):
        folder = folder_of((way, label), seed)
        printed = folder / "printed.txt"
        if printed.exists():
            continue

        if way == SEARCHED and not Path(f"{FOUND}-{SEARCHES[label]}", "search.yaml").exists():
            search(SEARCHES[label])
        place = ["--seed", str(seed), "--output_dir", str(folder), "--resume", "auto"]
        command = [sys.executable, "main.py", *WAYS[way][label], *place]
        run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        printed.write_text(run.stdout)


def search(budget: str) -> None:
    """Finds what each attention and MLP keeps within this share of the dense model's time."""
    command = [sys.executable, "search.py", "--budget-of", "latency", "--budget", budget]
    command += ["--space", "heads", "neurons", "unstructured", "block:2x1", "block:4x1"]
    command += ["--reconstruct", "least-squares", "--batch-size", str(BATCHES[-1])]
    subprocess.run([*command, "--output_dir", f"{FOUND}-{budget}"], cwd=ROOT, check=True)


def link_images(official: Path) -> None:
    """Makes the folders SAMPLE and WHOLE."""
    parts = [(ROOT / "sample", "train", SAMPLE), (official, "t10k", SAMPLE)]
    parts += [(official, "train", WHOLE), (official, "t10k", WHOLE)]
    for source, part, folder in parts:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in source.glob(f"{part}-*-ubyte*"):
            link = Path(folder, file.name)
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())


# ---- what was trained ----


def names() -> list[Name]:
    return [(way, label) for way, models in WAYS.items() for label in models]


def folder_of(name: Name, seed: int) -> Path:
    return OUTPUT / f"{re.sub('[^a-z0-9]+', '-', ' '.join(name).lower()).strip('-')}-{seed}"


def accuracies(name: Name) -> list[dict[str, float]]:
    """The accuracies that main.py printed in the end, for each seed that was trained.

    They are called dense, pruned and finetuned, or trained.
    """
    files = [folder_of(name, seed) / "printed.txt" for seed in SEEDS]
    ends = [file.read_text().splitlines()[-1] for file in files if file.exists()]
    return [
        {kind: float(value) for kind, value in re.findall(r"(\w+) ([0-9.]+) %", end)}
        for end in ends
    ]


def trained_models() -> dict[Name, nn.Module]:
    """The dense model, and each that was trained, without its pruned heads and neurons."""
    models = {NO_WAY: build_model("deit_sample_patch4_28", 10, 28)}
    for name in names():
        if accuracies(name):
            args = parse_args(["--resume", f"{folder_of(name, 0)}/checkpoint.pth", "--eval"])
            with contextlib.redirect_stdout(io.StringIO()):
                _, _, models[name], *_ = load_model(args)
    return models


def large_models() -> dict[Name, nn.Module]:
    """DeiT-Small with random weights: dense, and pruned in each way."""
    torch.manual_seed(0)
    dense = build_model(LARGE, 1000, 224)
    models = {NO_WAY: dense}
    for way, label in names():
        if way == SEARCHED:  # which weighs what the trained weights lose
            continue
        own_label, more = LARGE_LABELS.get(label, (label, []))
        args = parse_args([*WAYS[way][label], *more])
        model = copy.deepcopy(dense)
        if args.model_kwargs:
            model = build_model(LARGE, 1000, 224, assignments=args.model_kwargs)
        models[way, own_label] = pruned(model, args)
    return models


def pruned(model: nn.Module, args) -> nn.Module:
    """What a run with `args` makes of random weights: with zeros, smaller, or merging tokens."""
    if args.tokens:
        merge_tokens(model, args.tokens)
    if not args.sparsity:
        return model

    how = {"pattern": args.pattern, "budget": args.budget}
    masks = compute_masks(model, args.pruner, args.sparsity, **how)
    if args.shrink:
        return shrink(model, masks)
    Masks(model, masks)
    return model


# ---- measurements ----


def measure(models: Mapping[Name, nn.Module], side: int) -> dict[Name, Measured]:
    """Time and multiply-adds of each model. side: of an image, in pixels."""
    image = torch.zeros(1, 3, side, side)
    macs = {name: multiply_adds_left(model, image) for name, model in models.items()}
    times = [times_of(models, torch.randn(batch, 3, side, side)) for batch in BATCHES]
    return {
        name: Measured([taken[name] for taken in times], macs[name] / macs[NO_WAY])
        for name in models
    }


@torch.no_grad()
def times_of(models: Mapping[Name, nn.Module], images: Tensor) -> dict[Name, float]:
    """The seconds of each model for the images, in the dtype in which it is quickest."""
    calls = {dtype: call_of(models[NO_WAY], images[:FEW], dtype) for dtype in DTYPES}
    dense = in_turns(calls, 2)
    dtypes = [dtype for dtype in DTYPES if dense[dtype] < 1.5 * min(dense.values())]

    calls = {}
    for name, model in tqdm(models.items(), f"kernels for batch {len(images)}"):
        calls |= {(name, dtype): call_of(model, images, dtype) for dtype in dtypes}
    taken = in_turns(calls, SECONDS)
    return {name: min(taken[name, dtype] for dtype in dtypes) for name in models}


def call_of(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A function that runs the model on the images in a dtype, with sparse kernels."""
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    images = images.to(dtype)
    quick, _ = sparse_kernels(model, images[:FEW], measure=briefly)
    return partial(quick, images)


def briefly(calls: Mapping[str, Callable], seconds: float) -> dict[str, float]:
    """Times in turns, in a twentieth of the seconds that `sparse_kernels` has for them."""
    return in_turns(calls, seconds / 20)


# ---- tables and pictures ----


def table(found: Mapping[Name, Measured]) -> str:
    """A row for each model: its multiply-adds, its times, and its accuracies, if there are any."""
    headings = ["way", "", "multiply-adds"]
    headings += [f"batch {batch}, ms (times as fast)" for batch in BATCHES]
    trained = any(model.final for model in found.values())
    if trained:
        headings += ["not finetuned", "finetuned"]
    lines = [f"| {' | '.join(headings)} |", "| --- | --- |" + " ---: |" * (len(headings) - 2)]

    for name, model in found.items():
        cells = [*name, f"{model.left:.0%}"]
        for seconds, ratio in zip(model.seconds, speeds(found, name), strict=True):
            cells.append(f"{1000 * seconds:.3g} ({ratio:.2f})")
        if trained:
            cells += [mean_and_range(model.pruned), mean_and_range(model.final)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: Mapping[Name, Measured], axis: str, height: Callable) -> bytes:
    """The height of each model, of which there may be several, against its speed by batch."""
    panels = {f"batch {batch}": defaultdict(list) for batch in BATCHES}
    for name, model in found.items():
        if name != NO_WAY:
            for points, ratio in zip(panels.values(), speeds(found, name), strict=True):
                points[name[0]].append((ratio, height(model)))
    (dense,) = height(found[NO_WAY])
    return png(tradeoff_points(panels, dense, "times as fast as the dense model", axis))


def speeds(found: Mapping[Name, Measured], name: Name) -> list[float]:
    """How many times as fast as the dense model a model is, for each batch."""
    pairs = zip(found[NO_WAY].seconds, found[name].seconds, strict=True)
    return [dense / seconds for dense, seconds in pairs]


def with_accuracies(found: Mapping[Name, Measured]) -> dict[Name, Measured]:
    """The models with what their runs printed."""
    outcomes = {name: accuracies(name) for name in found if name != NO_WAY}
    # Every pruned run measures the dense model first, and one with --tokens what merging costs
    dense = [run["dense"] for runs in outcomes.values() for run in runs if "pruned" in run]
    models = {NO_WAY: found[NO_WAY]._replace(final=dense[:1])}
    for name, runs in outcomes.items():
        before = [run.get("pruned", run["dense"]) for run in runs if "dense" in run]
        final = [run.get("finetuned", run.get("trained")) for run in runs]
        models[name] = found[name]._replace(pruned=before, final=final)
    return models


def main(official: Path | None) -> None:
    timm.layers.set_fused_attn(False)  # as main.py has it on CPUs
    if official:
        train(official)

    found = with_accuracies(measure(trained_models(), 28))
    print(table(found), flush=True)
    drawn = picture(found, "top-1 accuracy, %", lambda model: model.final)
    (OUTPUT / "tradeoff.png").write_bytes(drawn)

    found = measure(large_models(), 224)
    print(f"\n{table(found)}")
    drawn = picture(found, "multiply-adds left, %", lambda model: [100 * model.left])
    (OUTPUT / "tradeoff_deit_small.png").write_bytes(drawn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("official", type=Path, nargs="?", metavar="FASHION_MNIST")
    main(parser.parse_args().official)
