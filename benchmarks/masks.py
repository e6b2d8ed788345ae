"""Seconds that each pruner takes to choose the masks of a model with random weights, best of three.

    python benchmarks/masks.py [--model deit_base_patch16_224] [--sparsity 0.65]
"""

import argparse
import sys
import time
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sparsity_factory import PRUNERS, compute_masks, prunable_weights  # noqa: E402

TWO_OF_FOUR = {"sparsity": {"mode": "nxm", "level": {"default": [2, 4]}}}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--sparsity", type=float, default=0.65)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model)
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    print(f"{args.model}: {total / 1e6:.1f} M prunable weights, {torch.get_num_threads()} threads")
    for pruner in PRUNERS:
        request = {"custom_config": TWO_OF_FOUR} if pruner == "custom" else {"sparsity": args.sparsity}
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            compute_masks(model, pruner, **request)
            seconds.append(time.perf_counter() - start)
        print(f"{pruner if pruner != 'custom' else '2:4':8} {min(seconds):.2f} s")
