"""Run under torchrun by test_distributed.py: saves the masks of each process, whose weights differ on purpose."""

import sys

import torch

import utils
from arguments import parse_args
from builders import build_sparsifier
from models import build_model

if __name__ == "__main__":
    args = parse_args(["--pruner", "lamp", "--sparsity", "0.65"])
    utils.init_process_group("cpu")
    torch.manual_seed(utils.rank())
    model = build_model(args.model, 10, 28)
    sparsifier = build_sparsifier(args, model, {}, 1, torch.device("cpu"), None)
    sparsifier.start()
    torch.save(sparsifier.masks.masks, f"{sys.argv[1]}/masks{utils.rank()}.pth")
