"""Run under torchrun by test_distributed.py: one pair of processes makes all of its runs, as starting it takes longest.

    torchrun --nproc_per_node=2 two_processes.py FOLDER

FOLDER/runs.json has the command lines by name. In FOLDER/NAME, each process leaves what it printed (printed0.txt), and
every set of masks that the run has had (masks0.pth); and the weights after each reconstruction (weights0.pth).
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

import main
import utils
from arguments import parse_args
from builders import build_sparsifier
from models import build_model
from sparsity_factory import Masks, Sparsifier


def record(found: list, update):
    """`Masks.update`, which also adds a copy of the new masks to the list."""
    def recording(masks, new):
        changes = update(masks, new)
        if new:
            found.append({name: mask.clone() for name, mask in masks.masks.items()})
        return changes
    return recording


def record_weights(found: list, reconstruct):
    """`Sparsifier._reconstruct`, which also adds a copy of the new weights to the list."""
    def recording(sparsifier, masks):
        new = reconstruct(sparsifier, masks)
        if new is not masks:
            found.append({name: weight.detach().clone() for name, weight in sparsifier.model.named_parameters()})
        return new
    return recording


def share_masks(folder: Path) -> None:
    """Saves the masks of each process for weights that differ on purpose."""
    args = parse_args(["--pruner", "lamp", "--sparsity", "0.65"])
    torch.manual_seed(utils.rank())
    sparsifier = build_sparsifier(args, build_model(args.model, 10, 28), {}, 1, torch.device("cpu"), None)
    sparsifier.start()
    torch.save(sparsifier.masks.masks, folder / f"shared{utils.rank()}.pth")


def run_all(folder: Path) -> None:
    device, update, reconstruct = utils.init_process_group("cpu"), Masks.update, Sparsifier._reconstruct
    utils.init_process_group = lambda *_: device  # the group is there already
    share_masks(folder)
    for name, argv in json.loads((folder / "runs.json").read_text()).items():
        (folder / name).mkdir(exist_ok=True)
        found, weights = [], []
        Masks.update, Sparsifier._reconstruct = record(found, update), record_weights(weights, reconstruct)
        with open(folder / name / f"printed{utils.rank()}.txt", "w") as file, contextlib.redirect_stdout(file):
            main.main(parse_args(argv))
        torch.save(found, folder / name / f"masks{utils.rank()}.pth")
        torch.save(weights, folder / name / f"weights{utils.rank()}.pth")


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
