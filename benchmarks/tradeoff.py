"""Accuracy against measured speed: the sample's model, pruned, and smaller models from scratch.

    python benchmarks/tradeoff.py FASHION_MNIST        # the folder of the four official files

main.py trains every model, in its own folder under `output/tradeoff`, and evaluates it on all
10,000 test images; a run whose folder is complete is not repeated. Pruned models lose heads and
neurons, and are finetuned for two epochs on the 6,000 images of the sample, with the dense model as
the only teacher. Smaller models see the 60,000 training images eight times, as the dense model did.
Then all are timed in turns, for which the machine should be idle, and a table is printed and
`tradeoff.png` written.
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
SHARES = (0.25, 0.5, 0.65)  # of the multiply-adds that are pruned
SMALLER = {"width=56": ["embed_dim=56", "num_heads=2"]}
PRUNED = "pruned, finetuned {:.0%}"
FAMILY = "smaller, from scratch"
BATCHES = (1, 64)


def wanted(official: Path) -> dict[str, list[list[str]]]:
    """The arguments of main.py for each run, by the name of the model."""
    data = ["--data-set", "FASHION", "--data-path", str(sample_with_all_tests(official))]
    pruned = ["--config", "configs/run/sample_best_units.yaml", *data]
    scratch = ["--config", "configs/run/sample_dense.yaml", "--data-path", str(official)]

    runs = {}
    for share in SHARES:
        asked = [*pruned, "--sparsity", str(share)]
        runs[PRUNED.format(share)] = [[*asked, "--seed", str(seed)] for seed in SEEDS]
    for name, shape in SMALLER.items():
        runs[f"{FAMILY} {name}"] = [[*scratch, "--model-kwargs", *shape]]
    return runs


def sample_with_all_tests(official: Path) -> Path:
    """A folder of the sample's training images and the official test images."""
    folder = OUTPUT / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for source, part in ((ROOT / "sample", "train"), (official, "t10k")):
        for file in source.glob(f"{part}-*-ubyte*"):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file.resolve())
    return folder


def accuracies(arguments: list[str], folder: Path) -> dict[str, float]:
    """The accuracies that main.py prints in the end, by name; it runs unless it has before.

    The names are dense, pruned and finetuned, or trained.
    """
    printed = folder / "printed.txt"
    if not printed.exists():
        place = ["--output_dir", str(folder), "--resume", "auto"]
        command = [sys.executable, "main.py", *arguments, *place]
        run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        printed.write_text(run.stdout)

    last = printed.read_text().splitlines()[-1]
    return {name: float(value) for name, value in re.findall(r"(\w+) ([0-9.]+) %", last)}


def speeds(models: dict[str, torch.nn.Module], batch: int) -> dict[str, float]:
    """Images per second of each model."""
    images = torch.randn(batch, 3, 28, 28)
    taken = in_turns({name: partial(model, images) for name, model in models.items()}, 30)
    return {name: batch / seconds for name, seconds in taken.items()}


def train_all(official: Path) -> tuple[dict[str, torch.nn.Module], dict[str, list[dict]]]:
    """The models by name, the dense one among them, and the accuracies of each one's runs."""
    runs = [
        (name, seed, arguments[seed])
        for seed in SEEDS
        for name, arguments in wanted(official).items()
        if seed < len(arguments)
    ]
    runs.sort(key=lambda run: run[0].startswith(FAMILY))  # the long ones last

    models = {}
    found = {}
    for name, seed, arguments in tqdm(runs, "runs"):
        folder = OUTPUT / f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
        found.setdefault(name, []).append(accuracies(arguments, folder))
        if name in models:
            continue

        args = parse_args(["--resume", f"{folder}/checkpoint.pth", "--eval"])
        with contextlib.redirect_stdout(io.StringIO()):
            _, dense, models[name], *_ = load_model(args)
        if name.startswith("pruned"):
            models.setdefault("dense", dense)

    # Every pruned run measures the dense model first.
    measured = [outcomes[0] for outcomes in found.values() if "dense" in outcomes[0]]
    found["dense"] = [{"finetuned": outcome["dense"]} for outcome in measured[:1]]
    return models, found


def main(official: Path) -> None:
    timm.layers.set_fused_attn(False)  # as main.py has it on CPUs
    models, found = train_all(official)
    rates = {batch: speeds(models, batch) for batch in BATCHES}
    image = torch.zeros(1, 3, 28, 28)
    macs = {name: multiply_adds_left(model, image) for name, model in models.items()}

    headings = ["model", "multiply-adds"]
    headings += [f"batch {batch}, times as fast" for batch in BATCHES]
    headings += ["without finetuning", "top-1"]
    print(f"| {' | '.join(headings)} |\n| --- |{' ---: |' * (len(BATCHES) + 3)}")

    points = {}
    for name in sorted(models, key=lambda name: -macs[name]):
        final = [outcome.get("finetuned", outcome.get("trained")) for outcome in found[name]]
        before = [outcome["pruned"] for outcome in found[name] if "pruned" in outcome]
        times = [rate[name] / rate["dense"] for rate in rates.values()]
        points[name] = (times[-1], final)

        cells = [name, f"{macs[name] / macs['dense']:.0%}", *(f"{ratio:.2f}" for ratio in times)]
        cells += [mean_and_range(before), mean_and_range(final)]
        print(f"| {' | '.join(cells)} |")

    axis = f"times as fast as the dense model, batch {BATCHES[-1]}"
    (OUTPUT / "tradeoff.png").write_bytes(png(tradeoff_points(points, axis)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("official", type=Path, metavar="FASHION_MNIST")
    main(parser.parse_args().official)
