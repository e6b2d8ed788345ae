"""`--export`: a folder with the model of a checkpoint, which computes the same without this project, or no folder."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import exporting
import main
from sparsity_factory import Recipe, Sparsifier, shrink

SAMPLE = "deit_sample_patch4_28"
SHRINK = ["--pruner", "lamp", "--sparsity", "0.5", "--pattern", "heads+neurons", "--shrink"]
SKEWED = {"pruner": "glob", "sparsity": 0.6, "pattern": "heads+neurons"}  # blocks of many sizes

LOAD = """
import sys
import torch
from load import load
images = torch.load("images.pt")
with torch.inference_mode():
    torch.save([load()(images), torch.export.load("model.pt2").module()(images)], "logits.pt")
ours = {"exported", "exporting", "models", "sparsity_factory", "utils"} & sys.modules.keys()
assert not ours, ours
"""

WITHOUT_PACKAGES = """
import sys
sys.modules.update(onnx=None, onnxruntime=None)
import main
sys.exit(main.run(sys.argv[1:]))
"""


def save_checkpoint(path, name=SAMPLE, size=28, classes=10, **recipe):
    """A checkpoint as a pruned run writes it, of random weights; returns its model and masks."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, img_size=size).eval()
    for parameter in model.parameters():  # biases too, so that it shows where one is lost
        parameter.data += 0.05 * torch.randn_like(parameter)
    sparsifier = Sparsifier(model, Recipe(**recipe), total_steps=1, epoch_steps=1)
    content = {"args": {"model": name, "input_size": size}}
    if recipe:
        sparsifier.start(sparsifier.first_masks())
        content |= {"masks": sparsifier.masks.state_dict(), "pruning": sparsifier.state_dict()}
    torch.save({**content, "model": model.state_dict()}, path)
    return model, sparsifier.masks.masks


def logits_elsewhere(folder, images):
    """What the function of the folder and its program make of images, in a process that cannot see this project."""
    torch.save(images, folder / "images.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", LOAD], cwd=folder, env=env, check=True)
    return torch.load(folder / "logits.pt")


def no_onnx(monkeypatch):
    """Spares the seconds that ONNX takes."""
    monkeypatch.setattr(exporting, "ONNX_PACKAGES", ("no_such_package",))


@pytest.mark.parametrize(("recipe", "smaller"), [
    (SKEWED, True), ({"pruner": "lamp", "sparsity": 0.65}, False), ({}, False)], ids=["masked units", "zeros", "dense"])
def test_an_exported_model_computes_the_same_without_this_project(run_main, tmp_path, monkeypatch, recipe, smaller):
    no_onnx(monkeypatch)
    model, masks = save_checkpoint(tmp_path / "c.pth", **recipe)
    output = run_main("--resume", "c.pth", "--export", "out")
    images = torch.randn(5, 3, 28, 28)
    for logits in logits_elsewhere(tmp_path / "out", images):
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)
    weights = load_file(tmp_path / "out/model.safetensors")
    sizes = [sum(tensor.numel() for tensor in state.values()) for state in (weights, model.state_dict())]
    assert (sizes[0] < 0.5 * sizes[1]) if smaller else (sizes[0] == sizes[1])
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items() if not smaller)
    readme = (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/load.py").read_text().rstrip() in readme
    assert "--resume c.pth --export out" in readme and ("skip zeros" in readme) == (bool(recipe) and not smaller)
    assert "model.onnx is left out: it needs pip install no_such_package" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pth", "out"]


def test_a_model_that_was_shrunk_and_its_moving_average_are_exported(run_main, tiny, tmp_path, monkeypatch, once):
    no_onnx(monkeypatch)
    run = once("shrunk", lambda folder: main.run([*tiny, *SHRINK, "--output_dir", str(folder)]))
    checkpoint = torch.load(run / "checkpoint.pth", weights_only=True)
    for flags, kind in (([], "model"), (["--use-ema"], "model_ema")):
        run_main("--resume", run / "checkpoint.pth", "--export", tmp_path / kind, *flags)
        weights = load_file(tmp_path / kind / "model.safetensors")
        assert weights.keys() == checkpoint[kind].keys()
        assert all(torch.equal(weight, checkpoint[kind][name]) for name, weight in weights.items())
        shape = json.loads((tmp_path / kind / "shape.json").read_text())
        assert {**shape["heads"], **shape["neurons"]} == checkpoint["shape"]
    summary, readme = ((folder / name).read_text() for folder, name in (
        (run, "summary.md"), (tmp_path / "model", "README.md")))
    assert [line for line in readme.splitlines() if line.startswith(("| parameters", "| of these prunable"))] == [
        line for line in summary.splitlines() if line.startswith(("| parameters", "| of these prunable"))]


@pytest.mark.parametrize(("name", "size"), [("cait_xxs24_224", 32), ("swin_tiny_patch4_window7_224", 64)])
def test_attention_that_is_not_plain_is_exported_without_its_heads(tmp_path, monkeypatch, name, size):
    monkeypatch.chdir(tmp_path)
    no_onnx(monkeypatch)
    model, masks = save_checkpoint(tmp_path / "c.pth", name, size, 3, **SKEWED)
    assert main.run(["--resume", "c.pth", "--export", "out"]) == 0
    images = torch.randn(2, 3, size, size)
    for logits in logits_elsewhere(tmp_path / "out", images):
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in shrink(model, masks).state_dict().items()}


def test_an_onnx_file_computes_the_same_for_other_batches(run_main, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, _ = save_checkpoint(tmp_path / "c.pth", **SKEWED)
    output = run_main("--resume", "c.pth", "--export", "out")
    assert "left out" not in output
    images = torch.randn(5, 3, 28, 28)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    logits = session.run(["logits"], {"images": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


def test_without_the_packages_of_onnx_a_line_says_so_and_the_rest_is_written(tmp_path):
    save_checkpoint(tmp_path / "c.pth")
    env = {**os.environ, "PYTHONPATH": os.path.dirname(main.__file__)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGES, "--resume", "c.pth", "--export", "out"],
                          cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.onnx is left out: it needs pip install onnx " in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "load.py", "model.pt2", "model.safetensors", "shape.json"]


def test_after_a_failure_there_is_no_folder(run_main, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c.pth")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_programs", full_disk)
    error = run_main("--resume", "c.pth", "--export", "out", status=1)
    assert error == "error: --export out: cannot be written (No space left on device)\n"
    monkeypatch.setattr(exporting, "loader_for", lambda model: "def load(folder): return lambda images: images.mean()")
    assert "model.safetensors: its logits differ" in run_main("--resume", "c.pth", "--export", "out", status=1)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--export", "out"], "--export: expected --resume FILE beside it"),
    (["--resume", "c.pth", "--export", "full"], "--export full: exists; expected a new folder, or an empty one"),
    (["--resume", "c.pth", "--export", "c.pth"], "--export c.pth: exists; expected a new folder, or an empty one"),
    (["--resume", "c.pth", "--export", "c.pth/out"], "--export c.pth/out: Not a directory"),
    (["--resume", "none.pth", "--export", "out"], "none.pth: no such checkpoint"),
    (["--resume", "bare.pth", "--export", "out"], "bare.pth: does not say of which model it is"),
    (["--resume", "odd.pth", "--export", "out"], "odd.pth: has no state dict of tensors"),
    (["--resume", "bare.pth", "--export", "out", "--model", SAMPLE], "bare.pth: does not fit the model: head.weight"),
    (["--resume", "c.pth", "--export", "out", "--use-ema"], "--use-ema: c.pth holds no moving average"),
    (["--resume", "c.pth", "--export", "out", "--eval"], "--eval: not together with --export"),
    (["--resume", "c.pth", "--export", "out", "--pruner", "lamp", "--sparsity", "0.5"], "--pruner: not together with"),
    (["--resume", "auto", "--output_dir", "full", "--export", "out"], "--resume auto: no checkpoint in full"),
])
def test_what_cannot_be_exported_is_refused_in_one_line(run_main, tmp_path, flags, message):
    save_checkpoint(tmp_path / "c.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "bare.pth")
    torch.save({"model": 3}, tmp_path / "odd.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    error = run_main(*flags, status=2)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.pth", "c.pth", "full", "odd.pth"]


def test_a_checkpoint_that_does_not_name_its_model_is_exported_with_its_name_given(run_main, tmp_path, monkeypatch):
    no_onnx(monkeypatch)
    model, _ = save_checkpoint(tmp_path / "c.pth")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    (tmp_path / "out").mkdir()  # an empty folder is taken
    run_main("--resume", "bare.pth", "--export", "out", "--model", SAMPLE)
    assert load_file(tmp_path / "out/model.safetensors").keys() == model.state_dict().keys()
