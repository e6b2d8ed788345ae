"""Takes the weights out of a checkpoint of main.py, for any program that reads safetensors.

    python sample/export_weights.py output/sample_dense/checkpoint.pth sample/deit_sample_patch4_28.safetensors
"""

import argparse

import torch
from safetensors.torch import save_file

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("target", help="a .safetensors file")
    parser.add_argument("--use-ema", action="store_true", help="take the moving average of the weights")
    args = parser.parse_args()
    checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    save_file(checkpoint["model_ema" if args.use_ema else "model"], args.target)
