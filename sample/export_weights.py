"""Takes the weights out of a checkpoint of main.py, for any program that reads safetensors.

    python sample/export_weights.py output/sample_dense/checkpoint.pth sample/deit_sample_patch4_28.safetensors
"""

import sys

import torch
from safetensors.torch import save_file

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    checkpoint, target = sys.argv[1:]
    save_file(torch.load(checkpoint, map_location="cpu", weights_only=True)["model"], target)
