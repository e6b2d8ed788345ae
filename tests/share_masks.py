"""Run under torchrun by test_distributed.py: saves the masks of each process, whose weights differ on purpose."""

import sys

import torch

import main
import utils
from arguments import parse_args
from models import build_model

if __name__ == "__main__":
    args = parse_args(["--pruner", "lamp", "--sparsity", "0.65"])
    utils.init_process_group("cpu")
    torch.manual_seed(utils.rank())
    _, _, masks = main.prepare_masks(args, build_model(args.model, 10, 28), {})
    torch.save(masks, f"{sys.argv[1]}/masks{utils.rank()}.pth")
