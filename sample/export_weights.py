"""Takes the weights out of a checkpoint of main.py, for any program that reads safetensors.

    python sample/export_weights.py output/sample_dense/checkpoint.pth \\
        sample/deit_sample_patch4_28.safetensors
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from trainer.exit_status import exit_status  # noqa: E402
from utils import UserError, load_checkpoint  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("target", help="a .safetensors file")
    parser.add_argument(
        "--use-ema", action="store_true", help="take the moving average of the weights"
    )
    args = parser.parse_args()

    checkpoint = load_checkpoint(args.checkpoint)
    if args.use_ema and "model_ema" not in checkpoint:
        raise UserError(f"--use-ema: {args.checkpoint} holds no moving average of the weights")
    save_file(checkpoint["model_ema" if args.use_ema else "model"], args.target)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
