"""Which method, at which sparsity: all on the same models, images and budget. Takes hours.

    python benchmarks/compare.py FASHION_MNIST       # the folder of the four official files
    torchrun --standalone --nproc_per_node=2 benchmarks/compare.py FASHION_MNIST  # make compare

Two worlds: a dense model is pruned and finetuned for an epoch on the 6,000 images of the sample; or
a random one is trained for four epochs on a quarter of the training images that are not held out.
Each method's learning rate is the best of three or four on 5,000 held-out training images, and the
accuracies are those on the 10,000 test images. `real_size.py` does it with a larger model.

Results, tables and pictures come to `output/compare`. Any number of processes share the work;
killed and started again, they go on. With `--tables FILE` tables and pictures are made at once, of
the lines that are there.
"""

import sys
from pathlib import Path

import numpy as np
from bench import Bench, add_tables_argument, finish, train_dense
from comparison import (
    DENSE,
    FINETUNED,
    ONE_SHOT,
    TUNING,
    UNPRUNED,
    Comparison,
    Method,
    Task,
    Tuning,
    World,
)
from measure import ROOT, peak_above, seconds

import utils
from datasets import FashionMNIST, read_idx, write_idx
from trainer.exit_status import exit_status
from trainer.parser import Parser
from trainer.stop_signals import StopSignals

#: Images of each class: the first ones are in the sample, the next ones are held out.
SAMPLE = 600
HELD_OUT = 500
COSTED = "0.9"  # the sparsity at which the cost of pruning is measured

SPARSITIES = ("0.5", "0.8", "0.9", "0.95", "0.98")
GROUPS = ("2:4", "1:4")
LEVELS = (*SPARSITIES, *GROUPS)

#: By model the arguments of main.py for its shape; the second has DeiT-Tiny's depth and heads.
MODELS = {"sample": (), "tiny": ("--model-kwargs", "depth=12", "patch_size=7")}

OFTEN = ("--prune-every", "10")
AT_TIMES = ("--prune-every", "25")
ERK = {"name": "erk"}
LAMP = {"name": "lamp"}
RANDOM = {"name": "erk", "score": "random"}
WORLDS = {
    "finetuned": World(
        ("--config", "configs/run/sample.yaml"),
        MODELS,
        "sample",
        1,
        (
            Tuning(("0.5", "2:4"), ("2:4", "0.5"), (2e-4, 6e-4, 2e-3)),
            Tuning(("0.8",), ("0.8",), (2e-4, 6e-4, 2e-3)),
            Tuning(("0.9", "1:4"), ("0.9", "1:4"), (6e-4, 2e-3, 6e-3)),
            Tuning(("0.95", "0.98"), ("0.95",), (6e-4, 2e-3, 6e-3)),
        ),
        {
            "unif": Method("allocation", {"name": "unif"}, LEVELS),
            "erk": Method("allocation", ERK, SPARSITIES),
            "lamp": Method("allocation", LAMP, SPARSITIES),
            "glob": Method("allocation", {"name": "glob"}, SPARSITIES),
            "wanda": Method("score", {**ERK, "score": "wanda"}, LEVELS),
            "taylor": Method("score", {**ERK, "score": "taylor"}, LEVELS),
            "fisher": Method("score", {**ERK, "score": "fisher"}, LEVELS),
            "cap": Method("score", {"name": "cap", "score": "cap"}, SPARSITIES),
            "obs": Method("reconstruction", {**ERK, "reconstruct": "obs"}, LEVELS),
            "least-squares": Method(
                "reconstruction", {**ERK, "reconstruct": "least-squares"}, LEVELS
            ),
            "least-squares, teacher": Method(
                "reconstruction",
                {**ERK, "reconstruct": "least-squares"},
                LEVELS,
                ("--dense-teacher", "1"),
            ),
            "gradual": Method("schedule", {**LAMP, "schedule": "gradual"}, LEVELS, OFTEN),
            "ste": Method("schedule", {**LAMP, "schedule": "ste"}, LEVELS, OFTEN),
            "rigl": Method("schedule", {**ERK, "schedule": "rigl"}, SPARSITIES, OFTEN),
            "sr-ste": Method("schedule", {"name": "unif", "schedule": "sr-ste"}, GROUPS, OFTEN),
            "maskllm": Method("schedule", {"name": "unif", "schedule": "maskllm"}, GROUPS),
        },
    ),
    "from scratch": World(
        ("--config", "configs/run/sample_dense.yaml"),
        {"tiny": MODELS["tiny"]},
        "quarter",
        4,
        (
            Tuning((UNPRUNED, "0.5", "0.8", "2:4"), (UNPRUNED, "0.8", "2:4"), (2.5e-3, 5e-3, 1e-2)),
            Tuning(("0.9", "0.95", "0.98", "1:4"), ("0.95", "1:4"), (5e-3, 1e-2, 2e-2, 4e-2)),
        ),
        {
            DENSE: Method("", {"name": "unif"}, (UNPRUNED,)),
            "static": Method("sparse training", RANDOM, LEVELS),
            "set": Method("sparse training", {**RANDOM, "schedule": "set"}, SPARSITIES, AT_TIMES),
            "rigl": Method("sparse training", {**RANDOM, "schedule": "rigl"}, SPARSITIES, AT_TIMES),
            "gmp": Method("sparse training", {**ERK, "schedule": "gradual"}, LEVELS, AT_TIMES),
            "ste": Method("sparse training", {**ERK, "schedule": "ste"}, LEVELS, OFTEN),
            "sr-ste": Method(
                "sparse training", {"name": "unif", "schedule": "sr-ste"}, GROUPS, OFTEN
            ),
        },
        kinds=(FINETUNED,),
    ),
}


class SmallModels(Comparison):
    """On Fashion-MNIST; official: the folder of its four files."""

    folder = ROOT / "output" / "compare"
    worlds = WORLDS
    seeds = (0, 1, 2)
    levels = (UNPRUNED, *LEVELS)

    def __init__(self, official: Path | None = None):
        self.official = official

    def needs(self, task):
        makers = {"images": self.make_images}
        if self._has_own_dense(task):
            makers[task.model] = lambda: self._train_dense(task.model)
        return makers

    def arguments(self, task):
        world = self.worlds[task.world]
        data = "held-out" if task.kind == TUNING else "test"
        images = self.folder / "images" / f"{world.images}-{data}"
        arguments = [*world.arguments, *world.models[task.model]]
        arguments += ["--data-set", "FASHION", "--data-path", str(images)]
        arguments += ["--finetune-epochs", str(world.epochs), "--seed", str(task.seed)]
        arguments += ["--num_workers", "0", "--quiet"]

        if self._has_own_dense(task):
            arguments += ["--finetune", str(self.folder / task.model / "checkpoint.pth")]
        if method := self.method(task):
            arguments += method.arguments
            if "schedule" in method.choices:
                arguments += ["--schedules", method.choices["schedule"]]
        return arguments

    def _has_own_dense(self, task: Task) -> bool:
        """Whether its dense model has to be trained first; the sample's comes with the project."""
        return DENSE in self.worlds[task.world].kinds and bool(MODELS[task.model])

    def _train_dense(self, model: str) -> None:
        """Trains a dense model as the sample's was, on all images that are not held out."""
        arguments = ["--config", "configs/run/sample_dense.yaml", *MODELS[model]]
        arguments += ["--num_workers", "0", "--data-path", str(self.folder / "images" / "all-test")]
        train_dense(arguments, self.folder / model)

    def make_images(self) -> None:
        """Writes a data set for each pair of images to train on and images to test on.

        To train on: the sample, all that are not held out, or a quarter of these. To test on: the
        held-out or the official test images.
        """
        parts = {
            part: [
                read_idx(self.official, f"{part}-images-idx3-ubyte", ndim=3),
                read_idx(self.official, f"{part}-labels-idx1-ubyte", ndim=1),
            ]
            for part in ("train", "t10k")
        }

        # Indices of training images
        labels = parts["train"][1]
        classes = [np.flatnonzero(labels == label) for label in range(FashionMNIST.num_classes)]
        sample = np.sort(np.concatenate([images[:SAMPLE] for images in classes]))
        held_out = np.sort(
            np.concatenate([images[SAMPLE : SAMPLE + HELD_OUT] for images in classes])
        )
        rest = np.setdiff1d(np.arange(len(labels)), held_out)

        # Images and labels
        train = {
            name: [array[chosen] for array in parts["train"]]
            for name, chosen in {"sample": sample, "all": rest, "quarter": rest[::4]}.items()
        }
        test = {"held-out": [array[held_out] for array in parts["train"]], "test": parts["t10k"]}

        for name, trained in train.items():
            for other, tested in test.items():
                folder = self.folder / "images" / f"{name}-{other}"
                folder.mkdir(parents=True, exist_ok=True)
                for part, (images, labels) in (("train", trained), ("t10k", tested)):
                    write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
                    write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)


def costs(comparison: Comparison) -> str:
    """A Markdown table of what pruning the sample's model costs; nothing else should run."""
    utils.show_progress(quiet=True)
    lines = ["| | seconds | MB above the model |", "| --- | ---: | ---: |"]
    with StopSignals() as stop:
        bench = Bench(comparison, stop)
        for name, method in WORLDS["finetuned"].methods.items():
            if "schedule" not in method.choices and not method.arguments:
                taken, needed = cost(bench, Task(ONE_SHOT, "finetuned", "sample", name, COSTED))
                lines.append(f"| `{name}` | {taken:.2g} | {needed / 1e6:.0f} |")
    return "\n".join(lines)


def cost(bench: Bench, task: Task) -> tuple[float, int]:
    """The seconds that pruning takes, and the bytes that it needs besides the model."""
    bench.prepare(task)
    workbench = bench.bench
    args = workbench.arguments(bench.comparison.run(task))
    taken = []

    def prune():
        workbench.model.load_state_dict(workbench.dense)
        workbench.statistics.clear()
        taken.append(seconds(workbench.sparsifier(args, {}).start, 1))

    needed = peak_above(prune)
    prune()
    return min(taken), needed


def main(argv: list[str]) -> int:
    parser = Parser("compare.py", __doc__)
    parser.add_argument("official", type=Path, nargs="?", metavar="FASHION_MNIST")
    parser.add_argument(
        "--costs", action="store_true", help="only print what pruning by each method costs"
    )
    add_tables_argument(parser)
    args = parser.parse_args(argv)
    if not args.official and not args.tables:
        parser.error("expected FASHION_MNIST, the folder of the four official files")

    comparison = SmallModels(args.official)
    if args.costs:
        comparison.make_images()
        print(costs(comparison))
        return 0

    finish(comparison, args.tables)
    return 0


if __name__ == "__main__":
    utils.end_process(lambda: exit_status(lambda: main(sys.argv[1:])))
