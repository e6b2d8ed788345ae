"""`--export`: a folder with the model of a checkpoint, which computes the same without this
project, or no folder.
"""

import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import Clock, needs_compiler

import main
from models import build_model
from sparsity_factory import Recipe, Sparsifier, multiply_adds, shrink, sparse_kernels
from trainer import export as exporting
from trainer.tokens import merge_tokens

pytestmark = pytest.mark.slow

SAMPLE = "deit_sample_patch4_28"
SHRINK = ["--pruner", "lamp", "--sparsity", "0.5", "--pattern", "heads+neurons", "--shrink"]
# Blocks of many sizes
UNITS = {"pruner": "glob", "sparsity": 0.6, "pattern": "heads+neurons"}

ELSEWHERE = """
import sys
import torch
from load import load
images = torch.load("images.pt")
with torch.inference_mode():
    torch.save([load()(images), torch.export.load("model.pt2").module()(images)], "logits.pt")
ours = {"trainer", "models", "sparsity_factory", "utils"} & sys.modules.keys()
assert not ours, ours
"""


WITH_AND_WITHOUT_KERNELS = """
import sys
import torch
from load import KERNELS, load
images = torch.load("images.pt")
with torch.inference_mode():
    torch.save([load(sparse_kernels=quick)(images) for quick in (False, True)], "logits.pt")
kinds = {type(module).__name__ for module in load(sparse_kernels=True).modules()}
assert {kernel.__name__ for kernel in KERNELS.values()} <= kinds, kinds
ours = {"trainer", "models", "sparsity_factory", "utils"} & sys.modules.keys()
assert not ours, ours
"""


def save_checkpoint(path, name=SAMPLE, size=28, classes=10, tokens=0, **recipe):
    """A checkpoint as a pruned run writes it, of random weights; returns its model and masks."""
    torch.manual_seed(0)
    model = build_model(name, classes, size).eval()
    for parameter in model.parameters():  # biases too, so that it shows where one is lost
        parameter.data += 0.05 * torch.randn_like(parameter)
    sparsifier = Sparsifier(model, Recipe(**recipe), total_steps=1, epoch_steps=1)
    content = {"args": {"model": name, "input_size": size, "tokens": tokens}}
    if recipe:
        sparsifier.start(sparsifier.first_masks())
        content |= {"masks": sparsifier.masks.state_dict(), "pruning": sparsifier.state_dict()}
    torch.save({**content, "model": model.state_dict()}, path)
    return model, sparsifier.masks


@pytest.fixture
def weights_only(monkeypatch):
    """Spares the seconds that the other files take."""
    monkeypatch.setattr(exporting, "write_programs", lambda *_: [])


def test_arguments_of_the_architecture_travel_from_the_run_to_the_export(
    run_main, tiny, weights_only
):
    run_main(
        *tiny,
        "--no-pretrained",
        "--model-kwargs",
        "depth=1",
        "embed_dim=32",
        "num_heads=2",
        "--output_dir",
        "run",
        "--pruner",
        "lamp",
        "--sparsity",
        "0.5",
        "--pattern",
        "neurons",
        "--shrink",
    )
    run_main("--resume", "run/checkpoint.pth", "--export", "out")
    shape = json.loads(Path("out", "shape.json").read_text())
    assert shape["arguments"]["embed_dim"] == 32 and shape["heads"] == {"blocks.0.attn": 2}


@pytest.mark.parametrize("name", ["levit_128s", "caformer_s18", "repvit_m0_9", "iformer_t"])
def test_an_architecture_whose_head_is_more_than_one_layer_is_exported(
    run_main, tmp_path, weights_only, name
):
    save_checkpoint(tmp_path / "c.pth", name, 224 if name == "levit_128s" else 64, classes=5)
    output = run_main("--resume", "c.pth", "--export", "out")
    assert "are zero" not in output  # convnets have no prunable weight that could be
    shape = json.loads(Path("out", "shape.json").read_text())
    assert (shape["model"], shape["arguments"]["num_classes"]) == (name, 5)
    assert loaded(tmp_path / "out").num_classes == 5


def loaded(folder, **options):
    """What the function of an exported folder makes of it."""
    return runpy.run_path(str(folder / "load.py"))["load"](**options)


def run_elsewhere(script, folder, images):
    """The logits that a script makes of the images in the folder, in a process that does not find
    this project.
    """
    torch.save(images, folder / "images.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, check=True)
    return torch.load(folder / "logits.pt")


def test_without_this_project_and_without_onnx_an_exported_model_computes_the_same(
    run_main, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    model, masks = save_checkpoint(tmp_path / "c.pth", **UNITS)
    (tmp_path / "out").mkdir()  # an empty folder is taken
    output = run_main("--resume", "c.pth", "--export", "out")
    assert "model.onnx is left out: it needs pip install " in output
    folder = tmp_path / "out"
    readme = (folder / "README.md").read_text()
    assert "model.onnx is left out" in readme and "main.py --resume c.pth --export out" in readme
    assert (folder / "load.py").read_text().rstrip() in readme
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "load.py",
        "model.pt2",
        "model.safetensors",
        "shape.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pth", "out"]

    images = torch.randn(5, 3, 28, 28)
    for logits in run_elsewhere(ELSEWHERE, folder, images):
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)


def test_without_this_project_an_exported_model_merges_its_tokens(run_main, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # which takes seconds
    model, _ = save_checkpoint(tmp_path / "c.pth", tokens=5, **UNITS)
    run_main("--resume", "c.pth", "--export", "out")
    whole = model(images := torch.randn(5, 3, 28, 28))
    merge_tokens(model, 5)
    assert not torch.allclose(model(images), whole, atol=1e-3)
    for logits in run_elsewhere(ELSEWHERE, tmp_path / "out", images):
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_without_this_project_an_exported_model_with_kernels_merges_its_tokens(
    run_main, tmp_path, weights_only, monkeypatch
):
    measure_by(monkeypatch, Clock(dense=2.0, sparse=1.0, tiles=1.0))
    model, _ = save_checkpoint(tmp_path / "c.pth", tokens=5, pruner="unif", sparsity=0.9)
    run_main("--resume", "c.pth", "--export", "out", "--sparse-kernels", "--batch-size", "4")
    merge_tokens(model, 5)
    images = torch.randn(5, 3, 28, 28)
    for logits in run_elsewhere(WITH_AND_WITHOUT_KERNELS, tmp_path / "out", images):
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size"), [(SAMPLE, 28), ("cait_xxs24_224", 32), ("swin_tiny_patch4_window7_224", 64)]
)
def test_pruned_heads_and_neurons_are_not_in_the_files(
    run_main, tmp_path, weights_only, name, size
):
    model, masks = save_checkpoint(tmp_path / "c.pth", name, size, 3, **UNITS)
    run_main("--resume", "c.pth", "--export", "out")
    images = torch.randn(2, 3, size, size)
    small, exported = shrink(model, masks), loaded(tmp_path / "out")
    torch.testing.assert_close(exported(images), model(images), rtol=1e-5, atol=1e-5)
    assert {name: weight.shape for name, weight in exported.state_dict().items()} == {
        name: weight.shape for name, weight in small.state_dict().items()
    }
    assert [
        layer.weight.shape == (layer.out_features, layer.in_features)
        for layer in exported.modules()
        if isinstance(layer, torch.nn.Linear)
    ].count(False) == 0
    multiply_adds_left = sum(multiply_adds(exported, images[:1]).values())
    row = rf"\| multiply-adds of an image \| {sum(multiply_adds(model, images[:1]).values()):,} \| ([\d,]+) \|"
    assert re.search(row, (tmp_path / "out/README.md").read_text())[1] == f"{multiply_adds_left:,}"


@pytest.mark.parametrize(
    "recipe",
    [{"pruner": "lamp", "sparsity": 0.65}, {"pruner": "unif", "pattern": "2:4"}, {}],
    ids=["free", "2:4", "dense"],
)
def test_other_patterns_keep_their_zeros(run_main, tmp_path, weights_only, recipe):
    model, _ = save_checkpoint(tmp_path / "c.pth", **recipe)
    run_main("--resume", "c.pth", "--export", "out")
    for name, weight in loaded(tmp_path / "out").state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    readme = (tmp_path / "out/README.md").read_text()
    assert ("Only programs that skip zeros" in readme) == bool(recipe)
    assert {"lamp": "65.00% of", "unif": "50.00% of"}.get(recipe.get("pruner"), ", dense") in readme


def test_a_model_that_was_shrunk_and_its_moving_average_are_exported(
    run_main, tiny, tmp_path, weights_only, once
):
    run = once("shrunk", lambda folder: main.run([*tiny, *SHRINK, "--output_dir", str(folder)]))
    checkpoint = torch.load(run / "checkpoint.pth", weights_only=True)
    for flags, kind in (([], "model"), (["--use-ema"], "model_ema")):
        run_main("--resume", run / "checkpoint.pth", "--export", tmp_path / kind, *flags)
        weights = loaded(tmp_path / kind).state_dict()
        assert weights.keys() == checkpoint[kind].keys()
        assert all(torch.equal(weight, checkpoint[kind][name]) for name, weight in weights.items())
        shape = json.loads((tmp_path / kind / "shape.json").read_text())
        assert {**shape["heads"], **shape["neurons"]} == checkpoint["shape"]
    summary, readme = (
        (folder / name).read_text()
        for folder, name in ((run, "summary.md"), (tmp_path / "model", "README.md"))
    )
    for name in ("parameters", "of these prunable"):
        assert (
            re.search(rf"\| {name} \| .*", readme)[0] == re.search(rf"\| {name} \| .*", summary)[0]
        )


def test_an_onnx_file_computes_the_same_for_other_batches(run_main, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, _ = save_checkpoint(tmp_path / "c.pth", **UNITS)
    output = run_main("--resume", "c.pth", "--export", "out")
    assert "left out" not in output
    images = torch.randn(5, 3, 28, 28)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    logits = session.run(["logits"], {"images": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


def test_after_a_failure_there_is_no_folder(run_main, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c.pth")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_programs", full_disk)
    error = run_main("--resume", "c.pth", "--export", "out", status=1)
    assert error == "error: --export out: cannot be written (No space left on device)\n"
    monkeypatch.setattr(
        exporting,
        "loader_for",
        lambda model: "def load(folder): return lambda images: images.mean()",
    )
    assert "model.safetensors: its logits differ" in run_main(
        "--resume", "c.pth", "--export", "out", status=1
    )
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--export", "out"], "--export needs --resume FILE as well"),
        (
            ["--resume", "c.pth", "--export", "full"],
            "--export full: exists; expected a new folder, or an empty one",
        ),
        (
            ["--resume", "c.pth", "--export", "c.pth"],
            "--export c.pth: exists; expected a new folder, or an empty one",
        ),
        (["--resume", "c.pth", "--export", "c.pth/out"], "--export c.pth/out: Not a directory"),
        (["--resume", "none.pth", "--export", "out"], "none.pth: no such checkpoint"),
        (
            ["--resume", "bare.pth", "--export", "out"],
            "bare.pth: does not say of which model it is",
        ),
        (["--resume", "odd.pth", "--export", "out"], "odd.pth: has no state dict of tensors"),
        (
            ["--resume", "bare.pth", "--export", "out", "--model", SAMPLE],
            "bare.pth: does not fit the model: head.weight",
        ),
        (
            ["--resume", "c.pth", "--export", "out", "--use-ema"],
            "--use-ema: c.pth holds no moving average",
        ),
        (["--resume", "c.pth", "--export", "out", "--eval"], "--eval: not together with --export"),
        (
            ["--resume", "c.pth", "--export", "out", "--pruner", "lamp", "--sparsity", "0.5"],
            "--pruner: not together with",
        ),
        (
            ["--resume", "auto", "--output_dir", "full", "--export", "out"],
            "--resume auto: no checkpoint in full",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(run_main, tmp_path, flags, message):
    save_checkpoint(tmp_path / "c.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "bare.pth")
    torch.save({"model": 3}, tmp_path / "odd.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    error = run_main(*flags, status=2)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bare.pth",
        "c.pth",
        "full",
        "odd.pth",
    ]


def test_a_checkpoint_that_does_not_name_its_model_is_exported_with_its_name_given(
    run_main, tmp_path, weights_only
):
    model, _ = save_checkpoint(tmp_path / "c.pth")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    run_main("--resume", "bare.pth", "--export", "out", "--model", SAMPLE)
    assert loaded(tmp_path / "out").state_dict().keys() == model.state_dict().keys()


# ---- with sparse kernels ----


def measure_by(monkeypatch, *clocks):
    """Lets these clocks say how long the kernels take, each of them of one layer in turn; returns
    the batches used.
    """
    turns, batches = itertools.cycle(clocks), []

    def measured(model, images):
        batches.append(images)
        return sparse_kernels(model, images, measure=lambda *asked: next(turns)(*asked))

    monkeypatch.setattr(exporting, "sparse_kernels", measured)
    return batches


@needs_compiler
def test_without_this_project_an_exported_model_with_its_kernels_computes_the_same(
    run_main, tmp_path, weights_only, monkeypatch
):
    batches = measure_by(
        monkeypatch,
        *(
            Clock(**{"dense": 2.0, "sparse": 1.0, kernel: 1.0})
            for kernel in ("csr", "csr_mkl", "none", "bsr", "compact", "tiles")
        ),
    )
    model, _ = save_checkpoint(
        tmp_path / "c.pth", pruner="unif", sparsity=0.9, pattern="block:16x16"
    )
    output = run_main(
        "--resume", "c.pth", "--export", "out", "--sparse-kernels", "--batch-size", "4"
    )
    # As many as an evaluation takes at once
    assert [tuple(batch.shape) for batch in batches] == [(6, 3, 28, 28)]
    folder, images = tmp_path / "out", torch.randn(5, 3, 28, 28)
    chosen = json.loads((folder / "shape.json").read_text())["sparse_kernels"]
    found = {
        line.split()[0]: line.split()[2]
        for line in output.splitlines()
        if line.startswith("blocks") and ".weight" in line
    }
    assert {f"{name}.weight": kernel["name"] for name, kernel in chosen.items()} == {
        name: kernel for name, kernel in found.items() if kernel != "dense"
    }
    assert {kernel["name"] for kernel in chosen.values()} == {
        "csr",
        "csr-mkl",
        "bsr",
        "compact",
        "tiles",
    } and len(found) == 24
    dense, sparse = run_elsewhere(WITH_AND_WITHOUT_KERNELS, folder, images)
    for logits in (dense, sparse):
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)
    assert all(
        torch.equal(weight, model.state_dict()[name])
        for name, weight in loaded(folder, sparse_kernels=True).state_dict().items()
    )
    readme = (folder / "README.md").read_text()
    assert (
        "load(sparse_kernels=True)" in readme
        and "6 images at once: dense 3.0, sparse 6.0 images/s" in readme
    )
    assert "on the machine of the export only" in readme


def test_an_exported_loader_has_the_kernels_that_it_needs_and_hands_results_on_as_measured(
    run_main, tmp_path, weights_only, monkeypatch
):
    measure_by(monkeypatch, Clock(dense=2.0, csr=1.0, sparse=1.0))
    save_checkpoint(tmp_path / "c.pth", pruner="unif", sparsity=0.9)
    run_main("--resume", "c.pth", "--export", "out", "--sparse-kernels", "--batch-size", "2")
    classes = re.findall(r"^class (\w+)", (tmp_path / "out/load.py").read_text(), re.MULTILINE)
    assert classes == ["SparseLinear", "Transposed", "Csr"]
    kernels = json.loads((tmp_path / "out/shape.json").read_text())["sparse_kernels"]
    assert {name for name, kernel in kernels.items() if kernel["hands_on"]} == {
        f"blocks.{number}.mlp.fc1" for number in range(6)
    }
    mlp = loaded(tmp_path / "out", sparse_kernels=True).blocks[0].mlp
    hidden = mlp.fc1(torch.randn(2, 5, 96))
    assert hidden.reshape(-1, 384).t().is_contiguous() and mlp.fc2(hidden).is_contiguous()


@needs_compiler
def test_an_exported_folder_compiles_its_kernel_and_stays_dense_with_a_warning_if_it_cannot(
    run_main, tmp_path, weights_only, monkeypatch
):
    measure_by(monkeypatch, Clock(dense=2.0, tiles=1.0, attention=1.0, sparse=1.0))
    model, _ = save_checkpoint(tmp_path / "c.pth", pruner="unif", sparsity=0.8)
    run_main("--resume", "c.pth", "--export", "out", "--sparse-kernels", "--batch-size", "2")
    folder, images = tmp_path / "out", torch.randn(5, 3, 28, 28)

    kinds = {type(part).__name__ for part in loaded(folder, sparse_kernels=True).modules()}
    assert {"Tiles", "TilesMlp", "TilesAttention"} <= kinds and (folder / "tiles.cpp").exists()
    for logits in run_elsewhere(WITH_AND_WITHOUT_KERNELS, folder, images):
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="stays dense: no C.. compiler: no-such-compiler"):
        dense = loaded(folder, sparse_kernels=True)
    torch.testing.assert_close(dense(images), model(images))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("heads", [-1, 5])
def test_a_hostile_number_of_heads_in_an_exported_folder_is_refused_by_its_kernel(
    run_main, tmp_path, weights_only, monkeypatch, heads
):
    measure_by(monkeypatch, Clock(dense=2.0, tiles=1.0, attention=1.0, sparse=1.0))
    save_checkpoint(tmp_path / "c.pth", pruner="unif", sparsity=0.8)
    run_main("--resume", "c.pth", "--export", "out", "--sparse-kernels", "--batch-size", "2")
    model = loaded(tmp_path / "out", sparse_kernels=True)
    model.blocks[0].attn.num_heads = heads
    with pytest.raises(RuntimeError, match=f"expected 3 numbers for each of {heads} heads"):
        model(torch.randn(1, 3, 28, 28))


@pytest.mark.parametrize(
    "seconds", [{"dense": 1.0}, {"dense": 1.0, "csr": 0.5, "sparse": 1.1}], ids=["layer", "model"]
)
def test_where_no_kernel_is_quicker_a_line_says_so_and_the_folder_is_as_without_the_flag(
    run_main, tmp_path, weights_only, monkeypatch, seconds
):
    measure_by(monkeypatch, Clock(**seconds))
    save_checkpoint(tmp_path / "c.pth", pruner="unif", sparsity=0.9)
    output = run_main(
        "--resume", "c.pth", "--export", "flag", "--sparse-kernels", "--batch-size", "2"
    )
    assert "so the model stays dense" in output
    run_main("--resume", "c.pth", "--export", "none")
    with_flag, without = (
        {path.name: path.read_text("latin1") for path in (tmp_path / name).iterdir()}
        for name in ("flag", "none")
    )
    assert with_flag.pop("README.md").replace(
        "--export flag --sparse-kernels --batch-size 2", "--export none"
    ) == (without.pop("README.md"))
    assert with_flag == without
    assert (
        without["load.py"] == Path(exporting.__file__).with_name("export_template.py").read_text()
    )


def test_kernels_that_compute_something_else_are_not_written(
    run_main, tmp_path, weights_only, monkeypatch
):
    measure_by(monkeypatch, Clock(dense=2.0, csr=1.0, sparse=1.0))
    save_checkpoint(tmp_path / "c.pth", pruner="unif", sparsity=0.9)
    right = exporting.loader_with
    monkeypatch.setattr(
        exporting, "loader_with", lambda *given: right(*given).replace("self.column, out", "0, out")
    )
    error = run_main(
        "--resume", "c.pth", "--export", "out", "--sparse-kernels", "--batch-size", "2", status=1
    )
    assert "load.py with sparse kernels: its logits differ" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]
