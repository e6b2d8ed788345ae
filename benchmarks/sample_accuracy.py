"""Accuracies of every automatic pruner on the built-in sample, before and after finetuning.

    python benchmarks/sample_accuracy.py [--sparsities 0.5 0.65 0.8 0.9] [any argument of main.py]

Each figure is a run of main.py with its defaults; progress goes to standard error, the table to standard output.
"""

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import parse_args  # noqa: E402
from main import main  # noqa: E402

PRUNERS = ["lamp", "glob", "unif", "unifplus", "erk"]


def accuracies(pruner: str, sparsity: float, others: list[str]) -> dict[str, float]:
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        accuracy = main(parse_args(["--pruner", pruner, "--sparsity", str(sparsity), "--output_dir", "", *others]))
    figures = ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
    print(f"{pruner} {sparsity}: {figures}  ({time.time() - start:.0f} s)", file=sys.stderr, flush=True)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.65, 0.8, 0.9])
    args, others = parser.parse_known_args()
    rows = {}
    for pruner in PRUNERS:
        rows[pruner] = [accuracies(pruner, sparsity, others) for sparsity in args.sparsities]
    print("| pruner | " + " | ".join(f"{sparsity:.0%}" for sparsity in args.sparsities) + " |")
    print("| --- |" + " --- |" * len(args.sparsities))
    for pruner, cells in rows.items():
        figures = [f"{cell['pruned']:.2f} → {cell['finetuned']:.2f}" for cell in cells]
        print(f"| `{pruner}` | " + " | ".join(figures) + " |")
    print(f"\nDense: {cells[0]['dense']:.2f}")
