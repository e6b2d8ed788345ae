"""Images are normalized, cropped and sized as the weights want it."""

import json
from argparse import Namespace

import pytest
import torch
from PIL import Image

from datasets import build_transform
from trainer.arguments import parse_args
from trainer.builders import build_batch_transform, load_start
from trainer.data_config import Renormalized, teacher_inputs, with_data_config

HALF = [0.5, 0.5, 0.5]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VIT = ["--model", "vit_tiny_patch16_224"]


def resolved(*flags, checkpoint=None, source=""):
    args = parse_args(["--data-path", "data", *flags])
    return with_data_config(args, checkpoint or {}, source)


def test_mean_and_deviation_are_those_of_the_models_weights():
    args = resolved(*VIT, "--no-pretrained")
    assert (args.mean, args.std) == (HALF, HALF)
    clip = resolved("--model", "vit_base_patch16_clip_224")
    assert clip.mean == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)


@pytest.mark.parametrize("model", ["deit_small_patch16_224", "deit3_base_patch16_384"])
def test_deits_models_keep_deits_defaults(model):
    args = resolved("--model", model)
    assert (args.mean, args.std) == IMAGENET
    assert (args.eval_crop_ratio, args.input_size) == (0.875, 224)


def test_the_sample_keeps_its_defaults():
    args = with_data_config(parse_args([]), {}, "")
    assert (args.mean, args.std) == IMAGENET
    assert (args.eval_crop_ratio, args.input_size) == (0.875, 28)


def test_training_evaluation_and_calibration_use_them():
    args = resolved(*VIT, "--reprob", "0", "--mixup", "0", "--cutmix", "0")
    white = Image.new("RGB", (300, 300), (255, 255, 255))
    assert torch.equal(build_transform(False, args)(white), torch.ones(3, 224, 224))
    pixels = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    batch, _ = build_batch_transform(args, 10, torch.device("cpu"))(pixels, torch.zeros(2))
    assert torch.equal(batch, torch.ones(2, 3, 4, 4))


def test_flags_overrule_the_weights(capsys):
    args = resolved(*VIT, "--mean", "0.1", "0.2", "0.3", "--std", "1", "1", "1")
    assert (args.mean, args.std) == ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])
    assert "those of vit_tiny_patch16_224: 0.5, 0.5, 0.5" in capsys.readouterr().out


def test_a_checkpoint_tells_its_own_and_an_old_one_had_imagenets():
    saved = {"mean": [0.1, 0.2, 0.3], "std": HALF, "eval_crop_ratio": 0.9, "input_size": 224}
    args = resolved(*VIT, checkpoint={"args": saved}, source="x.pth")
    assert (args.mean, args.std, args.eval_crop_ratio) == ([0.1, 0.2, 0.3], HALF, 0.9)
    for old in ({"model": "vit_tiny_patch16_224"}, Namespace(model="vit_tiny_patch16_224")):
        args = resolved(*VIT, checkpoint={"args": old}, source="x.pth")
        assert (args.mean, args.std) == IMAGENET

    # Files of others without arguments, of timm's training and of BEiT follow timm
    beit = {"args": Namespace(imagenet_default_mean_and_std=False)}
    assert resolved(*VIT, checkpoint=beit, source="x.pth").mean == HALF
    assert resolved(*VIT, checkpoint={"model": {}}, source="x.pth").mean == HALF
    timms = {"arch": "vit_tiny_patch16_224", "args": Namespace(mean=None)}
    assert resolved(*VIT, checkpoint=timms, source="x.pth").mean == HALF


def test_crop_and_size_follow_the_weights_unless_they_are_given(capsys):
    args = resolved("--model", "vit_base_patch16_384")
    assert (args.input_size, args.eval_crop_ratio) == (384, 1.0)
    assert "--input-size 384, as vit_base_patch16_384 was trained on" in capsys.readouterr().out

    given = ["--input-size", "224", "--eval-crop-ratio", "0.875"]
    args = resolved("--model", "vit_base_patch16_384", *given)
    assert (args.input_size, args.eval_crop_ratio) == (224, 0.875)
    output = capsys.readouterr().out
    assert "--input-size 224: vit_base_patch16_384 was trained on images of 384 pixels" in output
    assert "--eval-crop-ratio 0.875: vit_base_patch16_384 is evaluated with 1" in output

    random = resolved("--model", "vit_base_patch16_384", "--no-pretrained")
    assert (random.input_size, random.eval_crop_ratio) == (224, 0.875)


def test_a_teacher_sees_images_as_it_was_trained_on():
    student = resolved(
        "--model", "deit_tiny_patch16_224", "--teacher-model", "vit_tiny_patch16_224"
    )
    identity = torch.nn.Identity()
    teacher = teacher_inputs(identity, student, {})
    assert isinstance(teacher, Renormalized)
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    assert torch.allclose(teacher((pixels - mean) / std), (pixels - 0.5) / 0.5, atol=1e-6)

    student.teacher_model = "regnety_160"
    assert teacher_inputs(identity, student, {}) is identity


@pytest.mark.slow
def test_a_run_keeps_them_in_its_checkpoint_and_export(tmp_path, tiny, run_main):
    shape = ["patch_size=4", "depth=1", "embed_dim=16", "num_heads=2"]
    flags = [*tiny, *VIT, "--no-pretrained", "--model-kwargs", *shape]
    output = run_main(*flags, "--output_dir", "out")
    assert "Images of mean 0.5, 0.5, 0.5 and deviation 0.5, 0.5, 0.5" in output
    checkpoint = torch.load("out/checkpoint.pth", weights_only=True)
    assert (checkpoint["args"]["mean"], checkpoint["args"]["std"]) == (HALF, HALF)

    # Whatever the name of the model says later
    checkpoint["args"] |= {"mean": [0.1, 0.2, 0.3]}
    torch.save(checkpoint, "other.pth")
    args, _ = load_start(parse_args([*flags, "--eval", "--resume", "other.pth"]))
    assert (args.mean, args.std) == ([0.1, 0.2, 0.3], HALF)

    run_main("--export", "exported", "--resume", "other.pth")
    images = json.loads((tmp_path / "exported/shape.json").read_text())["images"]
    assert images == {"size": 28, "mean": [0.1, 0.2, 0.3], "std": HALF, "crop": 0.875}
    assert "(0.1, 0.2, 0.3)" in (tmp_path / "exported/README.md").read_text()


def test_a_sweep_has_them_too(tiny):
    import sweep
    from utils import Compute

    args = parse_args([*tiny, *VIT, "--no-pretrained", "--model-kwargs", "patch_size=4", "depth=1"])
    args.epochs = 0
    bench = sweep.Workbench(args, Compute(torch.device("cpu")), None)
    assert bench.args.mean == HALF
    assert bench.loaders.val.dataset.transform.transforms[-1].mean == HALF
