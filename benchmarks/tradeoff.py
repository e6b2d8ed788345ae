"""Accuracy against measured speed: the sample's model without heads and neurons, and smaller models
from scratch.

    python benchmarks/tradeoff.py FASHION_MNIST        # the folder of the four official files

Every model is trained by main.py, in a folder of its own under `output/tradeoff`, and evaluated on
all 10,000 test images; a run that is there is not made again. Pruned models are finetuned for two
epochs on the 6,000 images of the sample, with the dense model as the only teacher. Smaller ones see
the 60,000 training images eight times, as the dense model did. Then all are timed in turns, which
wants an idle machine, and a table and `tradeoff.png` are written.
"""

import argparse
import contextlib
import io
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import timm.layers
import torch
from measure import ROOT, multiply_adds_left
from tqdm import tqdm

from sparsity_factory.sparse_kernels import in_turns
from trainer.arguments import parse_args
from trainer.export import load_model
from trainer.plots import png, tradeoff_points
from trainer.sweep_table import mean_and_range

OUTPUT = ROOT / "output" / "tradeoff"
SEEDS = (0, 1)
SHARES = (0.25, 0.5, 0.65)  # of the multiply-adds that go
SMALLER = {"width=56": ["embed_dim=56", "num_heads=2"]}
PRUNED, FAMILY = "pruned, finetuned {:.0%}", "smaller, from scratch"
BATCHES = (1, 64)


def wanted(official: Path) -> dict[str, list[list[str]]]:
    """By model the arguments of main.py for each of its runs."""
    pruned = [
        "--config",
        "configs/run/sample_best_units.yaml",
        "--data-set",
        "FASHION",
        "--data-path",
        str(beside_the_sample(official)),
    ]
    scratch = ["--config", "configs/run/sample_dense.yaml", "--data-path", str(official)]
    return {
        **{
            PRUNED.format(share): [
                [*pruned, "--sparsity", str(share), "--seed", str(seed)] for seed in SEEDS
            ]
            for share in SHARES
        },
        **{
            f"{FAMILY} {name}": [[*scratch, "--model-kwargs", *shape]]
            for name, shape in SMALLER.items()
        },
    }


def beside_the_sample(official: Path) -> Path:
    """A folder of the sample's training images and the official test images."""
    folder = OUTPUT / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for source, part in ((ROOT / "sample", "train"), (official, "t10k")):
        for file in source.glob(f"{part}-*-ubyte*"):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file.resolve())
    return folder


def accuracies(arguments: list[str], folder: Path) -> dict[str, float]:
    """What main.py measures in a run, by name: dense, pruned and finetuned, or trained. The run is
    made if need be.
    """
    printed = folder / "printed.txt"
    if not printed.exists():
        command = [
            sys.executable,
            "main.py",
            *arguments,
            "--output_dir",
            str(folder),
            "--resume",
            "auto",
        ]
        output = subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        printed.write_text(output)
    last = printed.read_text().splitlines()[-1]
    return {name: float(value) for name, value in re.findall(r"(\w+) ([0-9.]+) %", last)}


def speeds(models: dict[str, torch.nn.Module], batch: int) -> dict[str, float]:
    """Images a second of each model."""
    images = torch.randn(batch, 3, 28, 28)
    taken = in_turns({name: partial(model, images) for name, model in models.items()}, 30)
    return {name: batch / seconds for name, seconds in taken.items()}


def main(official: Path) -> None:
    timm.layers.set_fused_attn(False)  # as main.py has it on CPUs
    models = {}
    found = {}
    points = {}
    runs = {
        (name, seed): many[seed]
        for seed in SEEDS
        for name, many in wanted(official).items()
        if seed < len(many)
    }
    for (name, seed), arguments in tqdm(
        sorted(runs.items(), key=lambda run: run[0][0].startswith(FAMILY)), "runs"
    ):
        folder = OUTPUT / f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
        found.setdefault(name, []).append(accuracies(arguments, folder))
        if name not in models:
            with contextlib.redirect_stdout(io.StringIO()):
                _, dense, models[name], *_ = load_model(
                    parse_args(["--resume", f"{folder}/checkpoint.pth", "--eval"])
                )
            if name.startswith("pruned"):
                models.setdefault("dense", dense)
    rates = {batch: speeds(models, batch) for batch in BATCHES}
    macs = {
        name: multiply_adds_left(model, torch.zeros(1, 3, 28, 28)) for name, model in models.items()
    }
    found["dense"] = [
        {"finetuned": outcomes[0]["dense"]} for outcomes in found.values() if "dense" in outcomes[0]
    ][:1]
    print(
        "| model | multiply-adds | "
        + " | ".join(f"batch {batch}, times as fast" for batch in BATCHES)
        + " | without finetuning | top-1 |\n| --- |"
        + " ---: |" * (len(BATCHES) + 3)
    )
    for name in sorted(models, key=lambda name: -macs[name]):
        final = [outcome.get("finetuned", outcome.get("trained")) for outcome in found[name]]
        before = [outcome["pruned"] for outcome in found[name] if "pruned" in outcome]
        times = [rate[name] / rate["dense"] for rate in rates.values()]
        points[name] = (times[-1], final)
        print(
            f"| {name} | {macs[name] / macs['dense']:.0%} | "
            + " | ".join(f"{ratio:.2f}" for ratio in times)
            + f" | {mean_and_range(before)} | {mean_and_range(final)} |"
        )
    (OUTPUT / "tradeoff.png").write_bytes(
        png(tradeoff_points(points, f"times as fast as the dense model, batch {BATCHES[-1]}"))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("official", type=Path, metavar="FASHION_MNIST")
    main(parser.parse_args().official)
