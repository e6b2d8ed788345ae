"""Each mistake of a user ends in one line that names the culprit, with status 2 and without a trace
on the disk.
"""

import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, start_main, write_idx
from PIL import Image

LAMP = ["--pruner", "lamp", "--sparsity", "0.5"]
OWL = ["--pruner", "owl", "--sparsity", "0.5"]
CUSTOM = ["--pruner", "custom", "--custom-config"]


class Hostile:
    def __reduce__(self):
        return (open, ("hacked", "w"))


def yaml_with(level, mode="nxm"):
    return f"sparsity:\n  mode: {mode}\n  level: {level}\n"


# arguments; what the line must name; files to make first, by name
MISTAKES = [
    (["--pruner", "lampp", "--sparsity", "0.5"], "lampp", {}),
    (["--pruner", "lamp"], "--sparsity", {}),
    (["--pruner", "lamp", "--sparsity", "1"], "1.0", {}),
    (["--pruner", "lamp", "--sparsity", "-0.1"], "-0.1", {}),
    (["--pruner", "lamp", "--sparsity", "nan"], "nan", {}),
    (["--pruner", "lamp", "--sparsity", "half"], "half", {}),
    (["--pruner", "unifplus", "--sparsity", "0.95"], "unifplus", {}),
    (["--sparsity", "0.5"], "--pruner", {}),
    (
        [*LAMP, "--custom-config", "c.yaml"],
        "--custom-config",
        {"c.yaml": yaml_with("{default: 2:4}")},
    ),
    (["--pruner", "custom"], "--custom-config", {}),
    (
        [*CUSTOM, "c.yaml", "--sparsity", "0.5"],
        "--sparsity",
        {"c.yaml": yaml_with("{default: 2:4}")},
    ),
    ([*CUSTOM, "missing.yaml"], "missing.yaml", {}),
    ([*CUSTOM, "c.yaml"], "c.yaml", {"c.yaml": ""}),
    ([*CUSTOM, "c.yaml"], "c.yaml", {"c.yaml": "sparsity: [unclosed"}),
    (
        [*CUSTOM, "c.yaml"],
        "tag",
        {"c.yaml": "sparsity: !!python/object/apply:os.system ['touch hacked']\n"},
    ),
    ([*CUSTOM, "c.yaml"], "c.yaml: level has 2 entries", {"c.yaml": yaml_with("[[2, 4], [2, 4]]")}),
    ([*CUSTOM, "c.yaml"], "blocks.9", {"c.yaml": yaml_with("{default: 2:4, blocks.9.*: dense}")}),
    ([*CUSTOM, "c.yaml"], "96", {"c.yaml": yaml_with("{default: [2, 7]}")}),
    ([*CUSTOM, "c.yaml"], "[0, 4]", {"c.yaml": yaml_with("{default: [0, 4]}")}),
    ([*CUSTOM, "c.yaml"], "1.5", {"c.yaml": yaml_with("{default: 1.5}", "unstructured")}),
    (
        [*CUSTOM, "c.yaml"],
        "block:5x1 0.5: expected blocks",
        {"c.yaml": yaml_with("{default: block:5x1 0.5}")},
    ),
    (
        [*CUSTOM, "c.yaml"],
        "c.yaml: units 'blocks.0.attn' is 9: expected 1 to 3",
        {"c.yaml": yaml_with("{default: dense}") + "  units: {blocks.0.attn: 9}\n"},
    ),
    (
        [*CUSTOM, "c.yaml", "--prune-schedule", "gradual"],
        "one-shot with units",
        {"c.yaml": yaml_with("{default: dense}") + "  units: {blocks.0.attn: 2}\n"},
    ),
    (
        ["--pruner", "erk", "--sparsity", "0.5", "--pattern", "block:5x1"],
        "pattern block:5x1: expected blocks",
        {},
    ),
    ([*CUSTOM, "c.yaml"], "structured", {"c.yaml": yaml_with("{default: 0.5}", "structured")}),
    ([*CUSTOM, "c.yaml"], "levels", {"c.yaml": "sparsity:\n  mode: nxm\n  levels: {}\n"}),
    (["--config", "missing.yaml"], "missing.yaml", {}),
    (["--config", "r.yaml"], "epoch", {"r.yaml": "epoch: 3\n"}),
    (["--config", "r.yaml"], "epochs", {"r.yaml": "epochs: three\n"}),
    (["--unknown-flag"], "--unknown-flag", {}),
    (["--epochs", "0"], "--epochs", {}),
    (["--batch-size", "0"], "--batch-size", {}),
    (["--batch-size", "9000"], "9000", {}),
    (["--mixup", "0.8", "--batch-size", "33"], "33", {}),
    (["--amp", "fp8"], "fp8", {}),
    (["--device", "cuda"], "cuda", {}),
    (["--device", "tpu"], "tpu", {}),
    (["--remode", "pixels"], "pixels", {}),
    (["--mean", "0.5", "0.5"], "--mean [0.5, 0.5]: expected three numbers", {}),
    (["--mean", "0.5", "nan", "0.5"], "--mean", {}),
    (["--std", "0.5", "0", "0.5"], "--std [0.5, 0.0, 0.5]: expected three numbers above 0", {}),
    (["--decay-epochs", "0"], "--decay-epochs", {}),
    (["--clip-grad", "0"], "--clip-grad 0.0: expected a number above 0", {}),
    (["--overwrite", "--eval"], "--overwrite: not together with --eval", {}),
    (["--overwrite", "--resume", "auto"], "--overwrite: not together with --resume auto", {}),
    (
        ["--eval", "--resume", "auto", "--output_dir", "empty"],
        "--resume auto: no checkpoint in empty",
        {"empty/x": ""},
    ),
    (["--opt", "adamwx"], "adamwx", {}),
    (["--tokens", "-1"], "--tokens -1", {}),
    (["--tokens", "8"], "--tokens 8: expected at most 7, since each of 6 blocks", {}),
    (
        ["--tokens", "2", "--model", "swin_tiny_patch4_window7_224", "--no-pretrained"],
        "--tokens 2: expected a plain vision transformer of timm; SwinTransformer is another",
        {},
    ),
    *(
        (["--layer-decay", factor], f"--layer-decay {factor}", {})
        for factor in ("0.0", "1.1", "nan")
    ),
    (["--compile-mode", "max-autotune"], "--compile-mode max-autotune needs --compile", {}),
    (["--compile", "--compile-mode", "fastest"], "fastest: expected one of default, ", {}),
    (["--sync-bn"], "--sync-bn: deit_sample_patch4_28 has no batch norm", {}),
    (["--dist-bn", "mean"], "mean", {}),
    (["--eval-every", "0"], "--eval-every 0", {}),
    (["--save-every", "0"], "--save-every 0", {}),
    (["--eval-every", "2", "--sched", "plateau"], "--sched plateau", {}),
    (["--layer-decay", "0.7", "--sched", "none"], "--sched none", {}),
    (
        ["--model", "pit_ti_224", "--input-size", "224", "--no-pretrained", "--grad-checkpointing"],
        "--grad-checkpointing: timm's pit_ti_224",
        {},
    ),
    (["--aa", "randm9"], "randm9", {}),
    (["--sched", "cosin"], "cosin", {}),
    (
        [
            "--pruner",
            "lamp",
            "--sparsity",
            "0.5",
            "--prune-schedule",
            "iterative",
            "--rewind",
            "0",
            "--sched",
            "plateau",
        ],
        "--sched plateau",
        {},
    ),
    (
        ["--train-only", "norms,bias"],
        "'bias' is no kind of parameters; expected some of norms, ",
        {},
    ),
    (["--train-only", ""], "--train-only : '' is no kind of parameters", {}),
    (["--train-only", "norms", "--attn-only"], "--train-only: not together with --attn-only", {}),
    (["--train-only", "layerscale"], "so nothing would be trained; expected some of norms, ", {}),
    (["--train-only", "head", "--num-classes", "0"], "--train-only head: the model has no", {}),
    ([*LAMP, "--prune-schedule", "rigl", "--train-only", "norms"], "all of these are frozen", {}),
    (["--model", "deit_sampel_patch4_28"], "deit_sample_patch4_28", {}),
    (
        ["--model", "deit_tiny_patch16_224", "--input-size", "8", "--no-pretrained"],
        "--input-size 8",
        {},
    ),
    (["--data-path", "missing", "--model", "deit_sample_patch4_28"], "missing", {}),
    (["--data-path", "empty", "--input-size", "28"], "train", {"empty/x": ""}),
    (
        ["--data-path", "empty", "--input-size", "28"],
        "class",
        {"empty/train/a/x": "", "empty/val/a/x": ""},
    ),
    (["--data-set", "CIFAR"], "--data-path", {}),
    (["--data-set", "CIFAR", "--data-path", "empty"], "empty", {"empty/x": ""}),
    (["--data-set", "FASHION", "--data-path", "empty"], "train-images", {"empty/x": ""}),
    (["--finetune", "missing.pth"], "missing.pth", {}),
    (["--compare", "x.pth"], "--compare needs --eval as well", {}),
    (["--eval", *LAMP, "--compare", "x.pth"], "--compare: not together with --pruner", {}),
    (["--eval", "--pattern", "2:4", "--compare", "x.pth"], "--compare: not together", {}),
    (["--eval", "--compare", "missing.pth", "--output_dir", "out"], "missing.pth", {}),
    (
        ["--eval", "--compare", "c.pth", "--output_dir", "out"],
        "--compare c.pth: its images have another mean",
        {"c.pth": {"model": {"a": torch.zeros(1)}, "args": {"mean": [0.1, 0.2, 0.3]}}},
    ),
    (["--keep-zeros"], "--keep-zeros needs --finetune FILE or --resume FILE", {}),
    ([*LAMP, "--finetune", "x.pth", "--keep-zeros"], "--keep-zeros: not together", {}),
    (
        ["--finetune", "c.pth", "--eval"],
        "c.pth: does not fit the model",
        {"c.pth": {"model": {"cls_token": torch.zeros(1, 1, 96)}}},
    ),
    (
        ["--finetune", "c.pth"],
        "c.pth: refused, its tensors",
        {"c.pth": {"model": {"a": torch.zeros(1).expand(2**30)}}},
    ),
    (["--finetune", "bad.pth"], "bad.pth", {"bad.pth": b"not a checkpoint"}),
    (["--finetune", "bad.pth"], "bad.pth", {"bad.pth": pickle.dumps(Hostile())}),
    (["--resume", "bad.pth"], "bad.pth", {"bad.pth": {"model": Hostile()}}),
    (["--resume", "bad.pth"], "bad.pth", {"bad.pth": {"model": {"a": torch.zeros(1)}}}),
    (["--resume", "bad.pth"], "bad.pth", {"bad.pth": [1, 2]}),
    (
        ["--finetune", "bad.safetensors"],
        "bad.safetensors",
        {"bad.safetensors": struct.pack("<Q", 2**60) + b"{}"},
    ),
    (["--output_dir", "file/out"], "file/out", {"file": "in the way"}),
    ([*LAMP, "--score", "size"], "size", {}),
    (["--score", "wanda"], "--pruner", {}),
    ([*LAMP, "--score", "taylor", "--calibration-images", "9000"], "there are 6000", {}),
    ([*LAMP, "--score", "taylor", "--calibration-images", "0"], "--calibration-images 0", {}),
    (["--pruner", "owl", "--sparsity", "0.5", "--calibration-images", "9000"], "9000", {}),
    ([*LAMP, "--pattern", "2:4"], "--sparsity", {}),
    (["--pattern", "5:4"], "5:4", {}),
    (["--pattern", "2:7"], "96 inputs", {}),
    (["--pattern", "1:2t", "--sparsity", "0.5"], "--pattern 1:2t", {}),
    (["--pattern", "4:8t"], "4:8t", {}),
    ([*LAMP, "--permute"], "--permute: expected n:m", {}),
    (["--permute"], "--permute needs --pruner", {}),
    (["--pattern", "blok:4x4"], "blok:4x4", {}),
    (["--expect", "2:4"], "--expect needs --audit FILE", {}),
    (["--audit", "x.pth", "--expect", "2:4", "--expect", "2;4"], "--expect 2;4", {}),
    (["--audit", "x.pth", "--expect", "1.0"], "--expect 1.0: expected a pattern", {}),
    (["--audit", "x.pth", "--expect", "nan"], "--expect nan", {}),
    (["--audit", "x.pth", "--expect", "5:4"], "--expect 5:4", {}),
    (["--audit", "x.pth"], "x.pth: has no layers", {"x.pth": {"bias": torch.zeros(3)}}),
    ([*LAMP, "--pattern", "block:5x4"], "block:5x4", {}),
    (["--pruner", "lamp", "--sparsity", "0.9", "--pattern", "x:4"], "at most 0.75", {}),
    (
        [*CUSTOM, "c.yaml", "--pattern", "row"],
        "--pattern row",
        {"c.yaml": yaml_with("{default: 2:4}")},
    ),
    (
        [*CUSTOM, "c.yaml", "--prune-schedule", "rigl"],
        "groups would break",
        {"c.yaml": yaml_with("{default: 2:4}")},
    ),
    (["--pattern", "2:4", "--prune-schedule", "set"], "groups would break", {}),
    ([*LAMP, "--prune-schedule", "often"], "often", {}),
    ([*LAMP, "--prune-schedule", "maskllm"], "--prune-schedule maskllm: expected n:m or x:m", {}),
    (["--pattern", "2:4", "--prune-schedule", "maskllm", "--mask-lr", "0"], "--mask-lr 0", {}),
    ([*LAMP, "--mask-lr", "0.1"], "--mask-lr", {}),
    ([*LAMP, "--prune-schedule", "gradual", "--prune-start", "0.8"], "--prune-end 0.75", {}),
    ([*LAMP, "--prune-schedule", "gradual", "--prune-every", "0"], "--prune-every 0", {}),
    ([*LAMP, "--prune-schedule", "iterative", "--prune-rounds", "0"], "--prune-rounds 0", {}),
    ([*LAMP, "--prune-schedule", "iterative", "--rewind", "1"], "--rewind 1", {}),
    ([*LAMP, "--prune-schedule", "rigl", "--drop-fraction", "1.5"], "--drop-fraction 1.5", {}),
    ([*LAMP, "--prune-schedule", "sr-ste", "--sr-decay", "-1"], "--sr-decay -1", {}),
    ([*LAMP, "--sr-decay", "1e-3"], "--sr-decay", {}),
    ([*LAMP, "--method-options", "owl.lambda=0.1"], "owl.lambda: expected none, as the", {}),
    ([*OWL, "--method-options", "owl.lambdas=0.1"], "one of owl.outlier, owl.lambda", {}),
    ([*OWL, "--method-options", "owl.lambda=2"], "owl.lambda=2: expected a number in [0, 1]", {}),
    ([*OWL, "--method-options", "owl.lambda"], "expected NAME=VALUE with a number", {}),
    ([*OWL, "--method-options", "owl.lambda="], "expected NAME=VALUE with a number", {}),
    ([*OWL, "--method-options", "gradual.exponent=2"], "gradual.exponent: expected an option", {}),
    (["--method-options", "owl.lambda=0.1"], "owl.lambda=0.1 needs --pruner", {}),
    (["--config", "r.yaml"], "r.yaml: method-options", {"r.yaml": "method-options: {a: 1}\n"}),
    ([*LAMP, "--dist-timeout", "0"], "--dist-timeout", {}),
    *(
        ([*LAMP, "--dense-teacher", weight], f"--dense-teacher {weight}", {})
        for weight in ("-0.1", "1.5", "nan")
    ),
    ([*LAMP, "--dense-teacher", "0.5", "--distillation-tau", "0"], "--distillation-tau 0", {}),
    ([*LAMP, "--dense-teacher", "0.5", "--cosub"], "--cosub", {}),
    (
        [*LAMP, "--dense-teacher", "0.5", "--distillation-type", "soft"],
        "not together with --distillation-type",
        {},
    ),
    ([*LAMP, "--dense-teacher", "0.5", "--no-pretrained"], "random weights teach nothing", {}),
    *(
        ([*flags, "--num-classes", "0"], named, {})
        for flags, named in (
            ([*LAMP, "--score", "taylor"], "--score taylor: needs the gradient of a loss"),
            (["--pruner", "cap", "--sparsity", "0.5"], "--pruner cap"),
            ([*LAMP, "--dense-teacher", "0.5"], "--dense-teacher"),
            ([*LAMP, "--cosub"], "--cosub"),
            ([*LAMP, "--bce-loss"], "--bce-loss"),
            (
                [*LAMP, "--distillation-type", "soft", "--teacher-path", "t.pth"],
                "--distillation-type",
            ),
            ([*LAMP, "--no-pretrained"], "--num-classes 0: random weights teach nothing"),
            (["--data-path", ".", "--data-set", "timm:wds/x"], "timm:wds/x"),
        )
    ),
    ([*LAMP, "--reconstruct", "sgd"], "sgd", {}),
    (["--reconstruct", "obs"], "--pruner", {}),
    ([*LAMP, "--reconstruct", "obs", "--prune-schedule", "ste"], "--reconstruct obs", {}),
    (
        [*LAMP, "--reconstruct", "obs-mask", "--prune-schedule", "sr-ste"],
        "--reconstruct obs-mask",
        {},
    ),
    (
        [*LAMP, "--reconstruct", "obs", "--prune-schedule", "iterative", "--rewind", "0"],
        "--rewind",
        {},
    ),
    ([*LAMP, "--reconstruct", "obs", "--calibration-images", "9000"], "there are 6000", {}),
    ([*LAMP, "--layers", "blocks.*", "blocks.9.*"], "layers 'blocks.9.*' matches no layer", {}),
    ([*LAMP, "--layers", "!"], "--layers: expected a list of patterns", {}),
    (["--layers", "blocks.*"], "--layers blocks.* needs --pruner", {}),
    ([*LAMP, "--sparse-kernels"], "--sparse-kernels needs --eval or --export as well", {}),
    (
        [*LAMP, "--sparse-kernels", "--eval", "--compile"],
        "--sparse-kernels: not together with --compile",
        {},
    ),
]


def make(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)


def listing(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "argv, culprit, files", MISTAKES, ids=[" ".join(argv) for argv, _, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_status_2(run_main, tmp_path, argv, culprit, files):
    make(tmp_path, files)
    before = listing(tmp_path)
    error = run_main(*argv, status=2)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert culprit in error
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_the_process_of_a_mistaken_run_says_only_that_line(tmp_path):
    result = start_main("--finetune", "missing.pth", "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: missing.pth: no such checkpoint\n"
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("train, val, culprit", [("ab", "bc", "c"), ("a", "ab", "b")])
def test_classes_of_the_evaluation_must_be_those_of_the_training(
    run_main, tmp_path, train, val, culprit
):
    for folder in [f"train/{name}" for name in train] + [f"val/{name}" for name in val]:
        (tmp_path / "data" / folder).mkdir(parents=True)
        Image.new("RGB", (28, 28)).save(tmp_path / "data" / folder / "x.png")
    error = run_main(
        "--data-path", "data", "--model", "deit_sample_patch4_28", "--num_workers", "0", status=2
    )
    assert f"class {culprit} of val/" in error


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_one_line(run_main, tmp_path, workers):
    for folder in ("train", "val"):
        (tmp_path / "data" / folder / "a").mkdir(parents=True)
        (tmp_path / "data" / folder / "a" / "broken.png").write_bytes(b"no image")
    error = run_main(
        "--data-path",
        "data",
        "--model",
        "deit_sample_patch4_28",
        "--input-size",
        "28",
        "--eval",
        "--num_workers",
        workers,
        "--no-pretrained",
        status=2,
    )
    assert error.startswith("error: data/val/a/broken.png: cannot be read")
    assert error.count("\n") == 1


def test_labels_without_images_are_refused(run_main, tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    error = run_main("--data-set", "FASHION", "--data-path", ".", status=2)
    assert "3 train images but 2 labels" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments",
    [("make_sample.py", ["missing"]), ("export_weights.py", ["missing", "w.safetensors"])],
)
def test_a_mistake_with_a_script_of_the_sample_is_one_line(script, arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sample" / script, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: missing") and done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]
