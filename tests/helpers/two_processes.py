"""Run under torchrun by test_distributed.py: one pair of processes makes all of its runs, as
starting it takes longest.

    torchrun --nproc_per_node=2 two_processes.py FOLDER

FOLDER/runs.json has the command lines by name. In FOLDER/NAME, each process leaves what it printed
(printed0.txt), and every set of masks that the run has had (masks0.pth); and the weights after each
permutation and each reconstruction (weights0.pth). FOLDER/exchanged0.pth and shared0.pth have what
the processes told each other before, listed0.json the images in FOLDER/images and how many folders
it listed, and evaluated0.json the figures of two models.
"""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import main
import utils
from datasets import build_dataset
from engine import evaluate, evaluate_together
from models import build_model
from sparsity_factory import Masks, PruningError, Sparsifier
from trainer.arguments import parse_args
from trainer.builders import build_sparsifier


def copy_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def record(found: list, replace):
    """`Masks.replace`, which also adds a copy of the new masks to the list."""

    def recording(masks, new):
        replace(masks, new)
        if new:
            found.append(copy_of(masks))

    return recording


def record_weights(found: list, method):
    """A method of `Sparsifier`, which also adds a copy of the weights to the list where it has
    changed them.
    """

    def recording(sparsifier, *args):
        weights = dict(sparsifier.model.named_parameters())
        before = copy_of(weights)
        result = method(sparsifier, *args)
        if any(not torch.equal(weight, before[name]) for name, weight in weights.items()):
            found.append(copy_of(weights))
        return result

    return recording


def exchange_tensors(folder: Path) -> None:
    """Saves what each process receives of the first one's tensors."""
    torch.manual_seed(utils.rank())

    def compute():
        numbers = torch.randn(6, 5)
        return {
            "bools": numbers > 0,
            "nested": [(numbers, "text"), {"transposed": numbers.T, "again": numbers}],
            "half": numbers.bfloat16()[1:],
            "one": torch.tensor(7),
            "none": torch.empty(0, 3),
        }

    torch.save(utils.on_first_process(compute), folder / f"exchanged{utils.rank()}.pth")


def share_masks(folder: Path) -> None:
    """Saves the masks of each process for weights that differ on purpose, and these before and
    after a permutation. If the weights alone decide, that is an error, which is saved too.
    """
    flags = ["--pattern", "2:4", "--permute", "--calibration-images", "8", "--score"]
    torch.manual_seed(utils.rank())
    args = parse_args([*flags, "magnitude"])
    model = build_model(args.model, 10, 28)
    sparsifier = build_sparsifier(args, model, {}, 1, utils.Compute(torch.device("cpu")))
    try:
        sparsifier.choose()
        error = ""
    except PruningError as raised:
        error = str(raised)

    args = parse_args([*flags, "wanda"])
    weights = dict(model.named_parameters())
    before = copy_of(weights)
    sparsifier = build_sparsifier(args, model, {}, 1, utils.Compute(torch.device("cpu")))
    first = sparsifier.first_masks()
    after = copy_of(weights)
    sparsifier.start(first)
    torch.save(
        {"masks": dict(sparsifier.masks), "before": before, "after": after, "error": error},
        folder / f"shared{utils.rank()}.pth",
    )


def list_images(folder: Path) -> None:
    """Builds both splits of a folder, and those of two tar files with the same images."""
    scandir = os.scandir
    listed = []
    os.scandir = lambda path: listed.append(path) or scandir(path)
    samples = []
    for flags in ([], ["--data-set", "timm:folder", "--train-split", "train.tar"]):
        args = parse_args(["--data-path", str(folder / "images"), "--input-size", "28", *flags])
        train, _ = build_dataset(True, args)
        val, _ = build_dataset(False, args, classes=train.class_to_idx)
        image, label = train[len(train) - 1]
        samples.append([train.samples, val.samples, list(image.shape), label])
    os.scandir = scandir

    content = json.dumps({"samples": samples, "listed": len(listed)})
    (folder / f"listed{utils.rank()}.json").write_text(content)


def evaluate_models(folder: Path) -> None:
    """Evaluates two models together and one after the other, with images shared out or not."""
    torch.manual_seed(0)
    images, targets = torch.randn(20, 3, 28, 28), torch.randint(10, (20,))
    batches = list(zip(images.split(8), targets.split(8), strict=True))
    compute = utils.Compute(torch.device("cpu"))
    models = {name: build_model("deit_sample_patch4_28", 10, 28) for name in ("", "ema")}

    found = []
    for shared in (True, False):
        mine = batches[utils.rank() :: 2] if shared else batches
        together = evaluate_together(mine, models, compute, shared=shared)
        alone = {
            name: evaluate(mine, model, compute, shared=shared) for name, model in models.items()
        }
        found.append([together, alone])
    (folder / f"evaluated{utils.rank()}.json").write_text(json.dumps(found))


def run_all(folder: Path) -> None:
    utils.init_process_group(torch.device("cpu"))
    list_images(folder)
    evaluate_models(folder)
    replace = Masks.replace
    permute, reconstruct = Sparsifier._permute, Sparsifier._reconstruct
    utils.init_process_group = lambda *_: None  # the group is there already
    exchange_tensors(folder)
    share_masks(folder)
    for name, argv in json.loads((folder / "runs.json").read_text()).items():
        (folder / name).mkdir(exist_ok=True)
        found, weights = [], []
        Masks.replace = record(found, replace)
        Sparsifier._permute, Sparsifier._reconstruct = (
            record_weights(weights, method) for method in (permute, reconstruct)
        )
        with (
            open(folder / name / f"printed{utils.rank()}.txt", "w") as file,
            contextlib.redirect_stdout(file),
        ):
            main.main(parse_args(argv))
        torch.save(found, folder / name / f"masks{utils.rank()}.pth")
        torch.save(weights, folder / name / f"weights{utils.rank()}.pth")


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
