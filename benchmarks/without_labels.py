"""A backbone without a head, pruned without labels: what do its features still say?

    python benchmarks/without_labels.py BACKBONE CIFAR IMAGENET

BACKBONE and CIFAR are those of `real_size.py`. IMAGENET is a clone of the public repository
EliSchwartz/imagenet-sample-images: a photograph of each class of ImageNet. A pruned backbone, which
is not trained, is judged by the classes of the 10,000 test images of CIFAR-10, as the nearest of
10,000 training images vote for them, and by the mean cosine between its features and the dense
ones, of the 1,000 photographs of ImageNet at 112 x 112 pixels. It was calibrated on 1,024 of the
training images of CIFAR-10.

Each result is a line of `output/real_size/without_labels.csv`. Killed and started again, it goes
on.
"""

import copy
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from comparison import Level
from PIL import Image
from real_size import Photographs, timm_weights
from timm.models.vision_transformer import checkpoint_filter_fn
from torchvision.transforms import functional as pixels

import utils
from sparsity_factory import prune
from trainer.exit_status import exit_status
from trainer.job_folder import JobFolder
from trainer.nearest_neighbours import votes
from trainer.parser import Parser
from utils import Compute

CALIBRATION = 1024
BATCH = 128
SIZE = 56
LARGE = 112
LEVELS = ("0.5", "0.6", "0.7", "2:4")
METHODS = {
    "magnitude": {"pruner": "erk", "reconstruct": "none"},
    "wanda": {"pruner": "erk", "score": "wanda", "reconstruct": "none"},
    "obs": {"pruner": "erk", "reconstruct": "obs"},
    "least-squares": {"pruner": "erk", "reconstruct": "least-squares"},
}
UNITS = "heads+neurons 0.25"
OF_UNITS = {
    "magnitude": {"pruner": "unif", "reconstruct": "none"},
    "wanda": {"pruner": "unif", "score": "wanda", "reconstruct": "none"},
    "least-squares": {"pruner": "unif", "score": "wanda", "reconstruct": "least-squares"},
}
TASKS = [
    *[(name, level) for level in LEVELS for name in METHODS],
    *[(name, UNITS) for name in OF_UNITS],
]


class Images(NamedTuple):
    """Bytes of shape (images, 3, height, width), with labels in int64.

    The bank's vote on the classes of the test images. Features of the others are compared with the
    dense ones.
    """

    bank: torch.Tensor
    bank_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    others: torch.Tensor


def read_images(cifar: Path, imagenet: Path) -> Images:
    """The photographs; those of the bank are what `real_size.py` trains pruned models on."""
    comparison = Photographs(cifar=cifar)
    comparison.arrange_images()
    folder = comparison.folder / "images" / "pass-test"
    bank, bank_labels = _labelled(folder / "train")
    test, test_labels = _labelled(folder / "val")
    others = torch.stack([_read(file, LARGE) for file in sorted(imagenet.glob("*.JPEG"))])
    return Images(bank, bank_labels, test, test_labels, others)


def _labelled(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    files = [
        (file, label)
        for label, name in enumerate(sorted(folder.iterdir()))
        for file in sorted(name.iterdir())
    ]
    images = torch.stack([_read(file, SIZE) for file, _ in files])
    return images, torch.tensor([label for _, label in files])


def _read(file: Path, size: int) -> torch.Tensor:
    """The middle square of a photograph, as bytes."""
    image = Image.open(file).convert("RGB")
    image = pixels.resize(image, size, pixels.InterpolationMode.BICUBIC, antialias=True)
    return pixels.pil_to_tensor(pixels.center_crop(image, size))


def batches(images: torch.Tensor) -> Iterator[torch.Tensor]:
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    for part in images.split(BATCH):
        yield pixels.normalize(part / 255, mean, std)


@torch.no_grad()
def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Of length 1, shape (images, dim)."""
    model.eval()
    with Compute.choose("cpu", "auto").autocast():
        found = [model(batch).float() for batch in batches(images)]
    return F.normalize(torch.cat(found), dim=1)


def neighbours(model: torch.nn.Module, images: Images) -> float:
    """The share of the test images, in percent, whose nearest images vote for their class."""
    bank = features(model, images.bank)
    found = votes(features(model, images.test), bank, images.bank_labels, 10).argmax(1)
    return 100 * (found == images.test_labels).float().mean().item()


def pruned(dense: torch.nn.Module, name: str, level: str, images: Images) -> torch.nn.Module:
    """A pruned copy of the model; without a name a copy that is not pruned."""
    model = copy.deepcopy(dense)
    if not name:
        return model

    place = Level.read(level)
    choices = (OF_UNITS if level == UNITS else METHODS)[name]
    if place.sparsity is None:
        choices = {**choices, "pruner": "unif"}
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images.bank), generator=generator)[:CALIBRATION]
    with Compute.choose("cpu", "auto").autocast():
        prune(
            model,
            sparsity=place.sparsity,
            pattern=place.pattern or "unstructured",
            batches=list(batches(images.bank[chosen])),
            **choices,
        )
    return model


def measure(backbone: Path, cifar: Path, imagenet: Path) -> list[list[str]]:
    """Method, level, accuracy of the neighbours in percent, cosine and seconds, dense first."""
    dense = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=SIZE, dynamic_img_size=True
    )
    dense.load_state_dict(checkpoint_filter_fn(timm_weights(backbone), dense))

    images = read_images(cifar, imagenet)
    expected = features(dense, images.others)
    Photographs.folder.mkdir(parents=True, exist_ok=True)
    results = JobFolder(Photographs.folder, "without_labels.csv")
    done = [row[:2] for row in results.read(_parse)]
    for name, level in [("", "0"), *TASKS]:
        if [name, level] in done:
            continue
        start = time.perf_counter()
        model = pruned(dense, name, level, images)
        cosine = (features(model, images.others) * expected).sum(1).mean().item()
        accuracy = neighbours(model, images)

        taken = time.perf_counter() - start
        row = [name, level, f"{accuracy:.2f}", f"{cosine:.4f}", f"{taken:.0f}"]
        results.add(",".join(row))
        print(*row, flush=True)
    return [*results.read(_parse)]


def _parse(line: str) -> list[str]:
    """Raises ValueError for a line that was not written whole."""
    row = next(csv.reader([line]), [])
    if len(row) != 5:
        raise ValueError(line)
    return row


def table(rows: list[list[str]]) -> str:
    """Markdown: methods by level; a cell has the accuracy and the cosine."""
    found = {(name, level): (accuracy, cosine) for name, level, accuracy, cosine, _ in rows}
    levels = (*LEVELS, UNITS)
    head = " | ".join(str(Level.read(level)) for level in levels)
    lines = [f"| neighbours in %, cosine | {head} |", "| --- |" + " ---: |" * len(levels)]
    for name in METHODS:
        cells = [", ".join(found.get((name, level), ())) for level in levels]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser("without_labels.py", __doc__)
    for name in ("backbone", "cifar", "imagenet"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    args = parser.parse_args(argv)
    print(table(measure(args.backbone, args.cifar, args.imagenet)))
    return 0


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: main(sys.argv[1:])))
