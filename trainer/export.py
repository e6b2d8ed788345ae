"""`--export`: writes the model of a checkpoint for use without this project."""

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import platform
import re
import runpy
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import timm.layers
import torch
from safetensors.torch import save
from torch import nn

import utils
from datasets import normalization
from models import build_model, timm_call
from sparsity_factory import (
    KERNELS,
    PruningError,
    multiply_adds,
    read_pruning,
    shrink,
    sparse_kernels,
    sparse_multiply_adds,
    sparsity_rows,
)
from sparsity_factory.shrink import ClassAttn, TalkingHeadAttn, masks_of_the_rest
from sparsity_factory.sparse_layers import SparseLinear
from sparsity_factory.tiles import Tiles, TilesAttention, TilesMlp, join_mlps
from sparsity_factory.units import HEADS, NEURONS, unit_groups
from utils import UserError, WriteError, first_line, log

from .arguments import with_model_of
from .builders import evaluation_batch_size, load_start, prepare_model
from .tokens import MergingAttention, MergingBlock, flat, make_merging, merge, pair_up, rows
from .weights import fit_weights

WEIGHTS = "model.safetensors"
SHAPE = "shape.json"
LOADER = "load.py"
PROGRAM = "model.pt2"
ONNX = "model.onnx"
README = "README.md"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

CONTENTS = {
    WEIGHTS: "the weights, by timm's names",
    SHAPE: "timm's name of the model, its images, the heads and neurons that are left of each "
    "block, how many tokens each block merges, and the labels of its classes if the data had names",
    LOADER: "a function that builds the model from both",
    Tiles.source.name: "sparse products; the loader compiles them at first use with `CXX` or `g++`",
    PROGRAM: "the model as a `torch.export` program, for batches of any size",
    ONNX: "the model as ONNX, for batches of any size",
}

#: How the exported function begins, and its line before which `OWN_ATTENTION` is put if timm's
#: attention cannot have fewer heads.
FUNCTION = "\n\ndef load("
LAST = "    model.load_state_dict(weights)\n"
OWN_ATTENTION = """\
    # timm's own attention takes the width of a head from that of the tokens.
    for module in model.modules():
        module.__class__ = globals().get(type(module).__name__, type(module))
"""
#: What an exported folder has of tokens.py, and the line of its function that uses it.
MERGING = (MergingBlock, MergingAttention, make_merging, pair_up, merge, rows, flat)
MERGE = '    make_merging(model.blocks, shape["tokens"], model.num_prefix_tokens)\n'
RETURN = "    return model.eval()\n"
#: Lines of the exported function, and what takes their place if there are sparse kernels.
WITH_KERNELS = {
    "import json\n": "import json\nimport warnings\n",
    ".parent):\n": ".parent, sparse_kernels=False):\n",
    'in evaluation mode."""\n': """\
in evaluation mode.

    sparse_kernels: leave zeros out in the layers of shape.json, where the exporting
        machine was quicker so.
        For inference on CPUs only.
    \"""
""",
    RETURN: """\
    if sparse_kernels:
        for name, kernel in shape["sparse_kernels"].items():
            layer, sparse = model.get_submodule(name), KERNELS[kernel["name"]]
            if reason := sparse.why_not(layer.weight, torch.float32):
                warnings.warn(f"{name} stays dense: {reason}")
                continue
            layer = sparse(layer, torch.float32)
            layer.hands_on = kernel["hands_on"]
            model.set_submodule(name, layer)
    return model.eval()
""",
}
#: The line before `RETURN` if layers are `Tiles`.
JOIN_MLPS = "        join_mlps(model)\n"
#: The lines before `RETURN` if there is quick attention.
QUICK_ATTENTION = """\
        for name in shape["quick_attention"]:
            attention = model.get_submodule(name).eval()
            quick = TilesAttention.of(attention, torch.randn(2, 5, attention.qkv.in_features))
            if quick:
                model.set_submodule(name, quick)
            else:
                warnings.warn(f"{name} stays timm's: tiles.cpp does not run here")
"""


def export(args: argparse.Namespace) -> None:
    """Writes the model of `--resume` to the folder of `--export`, all of it or nothing.

    Pruned heads and neurons are taken out; other patterns keep their zeros. Every file is read
    again, and its logits are compared with the model's. If the packages of ONNX are missing, or an
    exporter cannot trace the model, the file is left out with a message. With `--sparse-kernels`
    the loader can also give the model the kernels that are quicker here.

    Raises UserError if the file is not a checkpoint or does not tell its model, or the folder is
    not empty.
    """
    utils.show_progress(args.quiet)
    folder = Path(os.path.abspath(args.export))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--export {args.export}: exists; expected a new folder, or an empty one")

    # The logits of random images, for comparison
    args, dense, model, masks, recipe, classes = load_model(args)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, args.input_size, args.input_size, generator=generator)
    with torch.inference_mode():
        expected = Expected(images, model(images), 1 if args.tokens else 0)

    with new_folder(folder, f"--export {args.export}") as temporary:
        call = timm_call(args.model, model.num_classes, args.input_size, args.model_kwargs)
        told = {
            "images": images_of(args),
            **({"tokens": args.tokens} if args.tokens else {}),
            **({"classes": classes} if classes else {}),
        }
        exported = write_weights(temporary, model, call, told)
        with torch.inference_mode():
            expected.compare(WEIGHTS, exported(images), 1e-5)

        measured = ""
        if args.sparse_kernels:
            batch_size = evaluation_batch_size(args)
            measured = write_kernels(temporary, exported, batch_size, expected)
        left_out = write_programs(temporary, exported, expected)

        facts = {**describe(args, dense, model, masks, recipe, images[:1]), "kernels": measured}
        (temporary / README).write_text(readme(temporary, facts, left_out), encoding="utf-8")

    for line in left_out:
        log(line)
    sizes = [f"{path.name} {in_bytes(path)}" for path in sorted(folder.iterdir())]
    log(f"{args.export}: {', '.join(sizes)}")


def load_model(args):
    """The model to export, in evaluation mode, and what the README says of it.

    Returns:
        The arguments that fit the model, the dense model that it was (with any weights), the model
        itself, the masks of weights that are still there as zeros, the recipe, and the labels of
        the classes by name, if they are known.
    """
    args, checkpoint = load_start(argparse.Namespace(**{**vars(args), "eval": True}))
    args = with_model_of(args, checkpoint, args.resume)

    dense = build_model(args.model, 1, args.input_size, assignments=args.model_kwargs)
    classes = 0 if args.num_classes == 0 else classes_of(dense, checkpoint["model"], args.resume)
    dense = build_model(args.model, classes, args.input_size, assignments=args.model_kwargs)

    as_it_is = {"compile": False, "grad_checkpointing": False, "distillation_type": "none"}
    args = argparse.Namespace(**{**vars(args), **as_it_is})
    model = prepare_model(args, classes, checkpoint, torch.device("cpu")).eval()
    try:
        recipe, masks = read_pruning(checkpoint)
    except PruningError as error:
        raise UserError(f"{args.resume}: {error}") from None

    if masks and recipe.structured:
        shrunk = shrink(model, masks, recipe.shrinks)
        model, masks = shrunk, masks_of_the_rest(shrunk, masks, recipe.shrinks)
    return args, dense.eval(), model, masks or {}, recipe, checkpoint.get("classes")


def classes_of(model: nn.Module, weights: Mapping, source: str) -> int:
    """The number of classes of the head in a file. model: one with one class.

    Raises UserError if there is no head.
    """
    # What differs from a head for one class does so in the number of classes
    heads = fit_weights(model, weights).new
    for name, shape in heads.items():
        if not shape:
            raise UserError(
                f"{source}: does not fit the model: {name} is missing; --num-classes 0 exports a "
                "model without a head"
            )
    return next((shape[0] for shape in heads.values() if shape), 1)


def images_of(args) -> dict:
    """The images that the model takes: size, mean and deviation, and the crop of an evaluation."""
    mean, std = normalization(args)
    return {"size": args.input_size, "mean": mean, "std": std, "crop": args.eval_crop_ratio}


def write_weights(folder: Path, model: nn.Module, call: tuple[str, dict], told: dict) -> nn.Module:
    """Writes weights, shape and loader; returns the model that the loader makes of them.

    call: what `timm_call` returned. told: what the shape file also tells, for its readers.
    """
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))

    units = {
        kind: {group.name: group.units for group in unit_groups(model, [kind])}
        for kind in (HEADS, NEURONS)
    }
    shape = {"model": call[0], "arguments": call[1], **units, **told}
    (folder / SHAPE).write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")
    (folder / LOADER).write_text(loader_for(model), encoding="utf-8")

    # Fused attention is one operation of torch, which chooses the quickest way on each device
    timm.layers.set_fused_attn(True)
    return runpy.run_path(str(folder / LOADER))["load"](folder)


def loader_for(model: nn.Module) -> str:
    """The source of a loader; CaiT with fewer heads, and merged tokens, need classes of ours."""
    source = Path(__file__).with_name("export_template.py").read_text(encoding="utf-8")
    kinds = {type(module) for module in model.modules()}
    if MergingBlock in kinds:
        return with_classes(source, MERGING).replace(LAST, MERGE + LAST)
    own = [kind for kind in (ClassAttn, TalkingHeadAttn) if kind in kinds]
    if not own:
        return source
    return with_classes(source, own).replace(LAST, OWN_ATTENTION + LAST)


def write_kernels(folder: Path, model: nn.Module, batch_size: int, expected: "Expected") -> str:
    """Measures sparse kernels, and adds the quicker ones to shape and loader.

    model: the model that the loader makes. batch_size: how many images to measure with.

    Returns the measurements in words. If the model is not quicker with kernels, returns an empty
    string and leaves the files as they are.
    """
    quick, report = sparse_kernels(model, torch.randn(batch_size, *expected.images.shape[1:]))
    log(report.table())
    if not report.used:
        return ""

    chosen = {
        layer.name.removesuffix(".weight"): layer.kernel
        for layer in report.layers
        if layer.kernel in KERNELS
    }
    shape = json.loads((folder / SHAPE).read_text(encoding="utf-8"))
    shape["sparse_kernels"] = {
        name: {"name": kernel, "hands_on": getattr(quick.get_submodule(name), "hands_on", False)}
        for name, kernel in chosen.items()
    }
    attention = [module.name for module in report.attention if module.kernel != "dense"]
    if attention:
        shape["quick_attention"] = attention
    (folder / SHAPE).write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")

    used = {name: kernel for name, kernel in KERNELS.items() if name in chosen.values()}
    source = (folder / LOADER).read_text(encoding="utf-8")
    source = loader_with(used, source, bool(attention))
    (folder / LOADER).write_text(source, encoding="utf-8")
    if Tiles in used.values() or attention:
        shutil.copy(Tiles.source, folder)
    with torch.inference_mode():
        quick = runpy.run_path(str(folder / LOADER))["load"](folder, sparse_kernels=True)
        expected.compare(f"{LOADER} with sparse kernels", quick(expected.images), 1e-4)

    threads = torch.get_num_threads()
    return (
        f"{report.in_words()}, in float32 on {threads} thread{'s' * (threads > 1)} of "
        f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    )


def loader_with(
    kernels: Mapping[str, type[SparseLinear]], source: str, attention: bool = False
) -> str:
    """The source of a loader with the keyword `sparse_kernels` and these kernels, by name.

    attention: whether it has quick attention too.
    """
    needed = {}
    for kernel in [*kernels.values(), *[Tiles] * attention]:
        classes = [kind for kind in reversed(kernel.__mro__) if issubclass(kind, SparseLinear)]
        needed.update(dict.fromkeys([*kernel.needs, *classes]))

    joined = ""
    if Tiles in needed:
        needed.update(dict.fromkeys([TilesMlp, join_mlps]))
        joined = JOIN_MLPS
    if attention:
        needed[TilesAttention] = None
        joined += QUICK_ATTENTION

    source = with_classes(source, needed)
    names = ", ".join(f'"{name}": {kernel.__name__}' for name, kernel in kernels.items())
    for before, after in WITH_KERNELS.items():
        source = source.replace(before, after)
    source = source.replace(RETURN, joined + RETURN)
    return source.replace(FUNCTION, f"\n\nKERNELS = {{{names}}}\n{FUNCTION}")


def with_classes(source: str, needed: Iterable) -> str:
    """The source of a loader with these classes and functions before its function."""
    body = "\n\n".join(map(inspect.getsource, needed))

    # What they need of the imports of their files
    imports = {}
    for file in dict.fromkeys(map(inspect.getmodule, needed)):
        for node in ast.parse(inspect.getsource(file)).body:
            if not isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "level", 0):
                continue
            for name in node.names:
                if re.search(rf"\b{name.asname or name.name}\b", body):
                    node.names = [name]
                    imports[ast.unparse(node)] = None
    lines = "".join(f"{line}\n" for line in imports if f"{line}\n" not in source)
    return source.replace(FUNCTION, "\n\n".join([f"\n{lines}", body]) + FUNCTION)


def write_programs(folder: Path, model: nn.Module, expected: "Expected") -> list[str]:
    """Writes the `torch.export` program and the ONNX file; returns messages on files left out."""
    outputs = outputs_of(model)
    images = expected.images
    try:
        # Traced with another number of images than it is compared with
        program = torch.export.export(
            model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    except Exception as error:  # each architecture has its own way not to be traced
        return [
            f"{PROGRAM} and {ONNX} are left out: torch.export cannot trace the model "
            f"({first_line(error)})"
        ]

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    (folder / PROGRAM).write_bytes(buffer.getbuffer())
    with torch.inference_mode():
        found = torch.export.load(folder / PROGRAM).module()(images)
    expected.compare(PROGRAM, found, 1e-5)

    if missing := [package for package in ONNX_PACKAGES if not is_installed(package)]:
        return [f"{ONNX} is left out: it needs pip install {' '.join(missing)}"]
    try:
        onnx = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=[outputs]
        )
    except Exception as error:  # ONNX lacks some operations
        return [f"{ONNX} is left out: torch.onnx cannot translate the model ({first_line(error)})"]
    import onnxruntime

    onnx.save(folder / ONNX)
    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    found = session.run([outputs], {"images": images.numpy()})[0]
    expected.compare(ONNX, torch.from_numpy(found), 1e-4)
    return []


def describe(args, dense: nn.Module, model: nn.Module, masks, recipe, image: torch.Tensor) -> dict:
    """What the README says of the model."""
    kept = sparsity_rows(model, masks)
    pruned = kept.prunable.kept < kept.prunable.total
    share = f"{kept.prunable.sparsity:.2%} of the prunable weights pruned" if pruned else "dense"

    before = sum(multiply_adds(dense, image).values())
    after = sum(sparse_multiply_adds(kept, multiply_adds(model, image)).values())
    weights = f"{args.resume}{', the moving average' if args.use_ema else ''}"
    mean, std = normalization(args)

    return {
        "title": f"{args.model}, {share}",
        "command": f"python {args.command}",
        "table": [
            ("parameters", kept.whole.total, kept.whole.kept),
            ("of these prunable", kept.prunable.total, kept.prunable.kept),
            ("multiply-adds of an image", before, after),
        ],
        "facts": [
            f"weights: {weights}, pruned with {recipe.in_words()}",
            *([f"tokens: {args.tokens} merged in each block"] if args.tokens else []),
            f"images: float32 of shape (images, 3, {args.input_size}, {args.input_size}): pixels "
            f"in [0, 1], less the mean {tuple(mean)}, over the deviation {tuple(std)}",
            f"outputs: {outputs_of(model)}",
            f"versions: {utils.versions(torch.device('cpu'))}",
        ],
        "outputs": outputs_of(model),
        "zeros": pruned and bool(masks),
    }


def readme(folder: Path, facts: dict, left_out: list[str]) -> str:
    """The README of an exported folder. facts: from `describe`, and `kernels` in words."""
    lines = [f"# {facts['title']}", "", f"    {facts['command']}", ""]
    lines += ["| | dense | pruned | left |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {before:,} | {after:,} | {after / max(before, 1):.1%} |"
        for name, before, after in facts["table"]
    ]

    if facts["zeros"]:
        lines += [
            "",
            "Pruned weights are zeros in the files. Only programs that skip zeros need fewer "
            "multiply-adds.",
        ]

    lines += ["", "| file | size | what it is |", "| --- | ---: | --- |"]
    lines += [
        f"| `{name}` | {in_bytes(folder / name)} | {text} |"
        for name, text in CONTENTS.items()
        if (folder / name).exists()
    ]

    if left_out:
        lines += ["", *left_out]
    lines += ["", *(f"- {fact}" for fact in facts["facts"])]

    lines += [
        "",
        "## How to load it",
        "",
        f"`{LOADER}`, as `from load import load; model = load()`:",
        "",
        "```python",
        (folder / LOADER).read_text(encoding="utf-8").rstrip(),
        "```",
    ]
    if facts["kernels"]:
        lines += [
            "",
            f"`load(sparse_kernels=True)` leaves zeros out in the layers that `{SHAPE}` names, "
            "for inference on CPUs; the other files compute densely, with zeros. Measured on the "
            "machine of the export only:",
            "",
            f"{facts['kernels']}.",
        ]

    if (folder / PROGRAM).exists():
        lines += ["", f'The program: `torch.export.load("{PROGRAM}").module()(images)`.']
    if (folder / ONNX).exists():
        lines += [
            "",
            f'ONNX: `onnxruntime.InferenceSession("{ONNX}")'
            f'.run(["{facts["outputs"]}"], {{"images": images}})`.',
        ]
    return "\n".join(lines) + "\n"


# ---- helpers, not exported ----


@contextlib.contextmanager
def new_folder(folder: Path, flag: str):
    """A temporary folder that is renamed to `folder` at the end, or removed after an error.

    Its name is fixed, like those of the temporary files of checkpoints, so that it overwrites what
    a killed process left.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror}") from None

    try:
        yield temporary
        os.replace(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or first_line(error)
            raise WriteError(f"{flag}: cannot be written ({reason})") from None
        raise


def outputs_of(model: nn.Module) -> str:
    """What a model returns: `logits`, or `features` of a model without a head."""
    return "logits" if model.num_classes else "features"


class Expected(NamedTuple):
    """Images, and the logits of the model for them, to compare every written file with.

    exceptions: of how many images other logits are let pass. Where tokens merge, two pairs may be
        so nearly as similar that rounding decides between them.
    """

    images: torch.Tensor
    logits: torch.Tensor
    exceptions: int

    def compare(self, name: str, found: torch.Tensor, tolerance: float) -> None:
        """Raises WriteError if logits differ by more than an absolute plus relative tolerance."""
        near = torch.isclose(found, self.logits, rtol=tolerance, atol=tolerance).flatten(1).all(1)
        if len(near) - int(near.sum()) > self.exceptions:
            raise WriteError(
                f"{name}: its logits differ from the model's by up to "
                f"{(found - self.logits).abs().max():.2g}; nothing is written"
            )


def is_installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def in_bytes(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"
