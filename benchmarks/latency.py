"""Measures how fast a pruned model runs beside the dense one, in one run and in turns.

    python benchmarks/latency.py --sparse-kernels CHECKPOINT [CHECKPOINT ...]
    python benchmarks/latency.py --sparse-kernels --model deit_small_patch16_224 --sparsity 0.8 0.9 0.95 0.98

The first form takes checkpoints of main.py; the second prunes random weights, which do for speed. With
`--sparse-kernels` the pruned model is what `main.py --eval --sparse-kernels` evaluates; without, its zeros are computed
as other numbers are. The shortest of many times; the machine should be idle.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run import peak_above  # noqa: E402

import utils  # noqa: E402
from arguments import parse_args  # noqa: E402
from builders import build_loaders  # noqa: E402
from cli import exit_status  # noqa: E402
from engine import evaluate  # noqa: E402
from models import build_model, load_weights  # noqa: E402
from run_folder import read_pruning  # noqa: E402
from sparsity_factory import (  # noqa: E402
    PRUNERS,
    Masks,
    compute_masks,
    multiply_adds,
    prunable_weights,
    sparse_kernels,
    sparse_multiply_adds,
    sparsity_rows,
)
from sparsity_factory.kernels import in_turns  # noqa: E402


def random_model(name: str, pruner: str, sparsity: float) -> tuple[nn.Module, int]:
    """A model of random weights, pruned, and the side of its images."""
    torch.manual_seed(0)
    size = timm.get_pretrained_cfg(name).input_size[1] if timm.get_pretrained_cfg(name) else 224
    model = build_model(name, 1000, size)
    Masks(model, compute_masks(model, pruner, sparsity))
    return model, size


def of_checkpoint(path: str) -> tuple[nn.Module, int]:
    """The model of a checkpoint of main.py, and the side of its images."""
    checkpoint = utils.load_checkpoint(path)
    args = checkpoint.get("args")
    if not isinstance(args, dict) or read_pruning(checkpoint)[1] is None:
        raise utils.UserError(f"{path}: holds no masks or arguments; expected a checkpoint of a pruned run")
    weights = checkpoint["model"]
    classes = next(len(value) for name, value in reversed(weights.items()) if name.endswith("bias"))
    model = build_model(args["model"], classes, args["input_size"])
    load_weights(model, weights, path)
    return model, args["input_size"]


def file_size(model: nn.Module) -> int:
    """Bytes of the model's weights as a file."""
    with tempfile.NamedTemporaryFile() as file:
        torch.save(model.state_dict(), file.name)
        return Path(file.name).stat().st_size


def peak_memory(function, device: torch.device) -> int:
    """The most bytes that a call needs beyond what is there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    return peak_above(function)


def accuracy(model: nn.Module, size: int, args, device: torch.device, amp_dtype) -> str:
    """Top-1 on the validation images of `--data-path`, where that is given."""
    if not args.data_path:
        return ""
    data = parse_args(["--data-path", args.data_path, "--data-set", args.data_set, "--input-size", str(size), "--eval"])
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(build_loaders(data, device)[1], model, device, amp_dtype=amp_dtype)
    return f"{found['acc1']:.2f} %"


def rows(title: str, model: nn.Module, size: int, args) -> Iterator[str]:
    """The rows of one model, at each batch size: dense, which zeros make no quicker, and pruned."""
    device = utils.choose_device(args.device)
    amp_dtype = utils.choose_amp(args.amp, device)
    model = model.to(device).eval().requires_grad_(False)
    counts = multiply_adds(model, torch.zeros(1, 3, size, size, device=device))
    kept = sparsity_rows(model, {name: weight != 0 for name, weight in prunable_weights(model).items()})
    macs = {"dense": sum(counts.values()), "pruned": sum(sparse_multiply_adds(kept, counts).values())}
    for batch in args.batch_sizes:
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad(), torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            quick, sparse = model, "none"
            if args.sparse_kernels:
                quick, report = sparse_kernels(model, images)
                used = sum(layer.kernel != "dense" for layer in report.layers) if report.used else 0
                sparse = f"{used} of {len(report.layers)}"
                if args.layers:
                    print(report.table(), flush=True)
            models = {"dense": model, "pruned": quick}

            def run(kind, images=images, models=models):
                models[kind](images)
                if images.is_cuda:
                    torch.cuda.synchronize(device)

            runs = {kind: partial(run, kind) for kind in models}
            taken = in_turns(runs, args.seconds)
            memory = {kind: peak_memory(runs[kind], device) for kind in models}
        for kind in models:
            cells = [title, batch, kind, f"{batch / taken[kind]:.1f}", f"{1000 * taken[kind]:.1f}",
                     f"{taken['dense'] / taken[kind]:.2f}", f"{memory[kind] / 2**20:.0f}",
                     f"{file_size(models[kind]) / 2**20:.1f}", f"{macs[kind] / 1e9:.2f}",
                     sparse if kind == "pruned" else "",
                     accuracy(quick, size, args, device, amp_dtype) if kind == "pruned" else ""]
            yield f"| {' | '.join(map(str, cells))} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--model", help="random weights of this model of timm instead of checkpoints")
    parser.add_argument("--pruner", choices=[name for name in PRUNERS if name != "custom"], default="unif")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95])
    parser.add_argument("--sparse-kernels", action="store_true")
    parser.add_argument("--layers", action="store_true", help="print what was measured of each layer")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=20, help="for the turns of a model at a batch size")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=["auto", "bfloat16", "float16", "off"], default="auto")
    parser.add_argument("--data-path", default="", metavar="DIR", help="measure the accuracy on its validation images")
    parser.add_argument("--data-set", default="IMNET")
    args = parser.parse_args(argv)
    if bool(args.checkpoints) == bool(args.model):
        raise utils.UserError("expected either checkpoints or --model")
    timm.layers.set_fused_attn(utils.choose_device(args.device).type == "cuda")  # as main.py has it
    print("| model | batch | | images/s | ms | times | MiB at work | file, MiB | G multiply-adds | sparse layers | "
          "top-1 |\n| --- | ---: | --- |" + " ---: |" * 8, flush=True)
    for source in args.checkpoints or args.sparsity:
        model, size = of_checkpoint(source) if args.checkpoints else random_model(args.model, args.pruner, source)
        title = source if args.checkpoints else f"{args.model}, `{args.pruner}` {100 * source:g} %"
        for row in rows(title, model, size, args):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
