"""benchmarks/compare.py and real_size.py: what is compared is run, shared and gone on with; docs/comparison.md says
what it gave.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image

from sparsity_factory.list_methods import COMPARED
from trainer.arguments import recipe_of

pytestmark = pytest.mark.slow


@pytest.fixture
def modules(monkeypatch):
    """benchmarks/compare.py, comparison.py and bench.py, which import each other when they run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("compare", "comparison", "bench", "real_size", "without_labels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench
    import compare
    import comparison

    return compare, comparison, bench


@pytest.fixture
def small(modules, monkeypatch, tmp_path, tiny_fashion):
    """The comparison of two methods at one sparsity on the tiny data set."""
    compare, _, _ = modules
    world = compare.WORLDS["finetuned"]
    methods = {name: world.methods[name]._replace(levels=("0.9",)) for name in ("unif", "ste")}
    tuning = world.tunings[1]._replace(levels=("0.9",), tried=("0.9",), rates=(1e-3, 1e-2))
    world = world._replace(
        arguments=(*world.arguments, "--batch-size", "16"),
        models={"sample": ()},
        tunings=(tuning,),
        methods=methods,
    )
    monkeypatch.setattr(compare, "SAMPLE", 3)
    monkeypatch.setattr(compare, "HELD_OUT", 1)

    comparison = compare.SmallModels(tiny_fashion)
    comparison.worlds = {"finetuned": world}
    comparison.seeds = (0, 1)
    comparison.folder = tmp_path / "compare"
    return comparison


@pytest.mark.parametrize("name", ["SmallModels", "Photographs"])
def test_every_run_has_a_recipe_that_is_not_refused(modules, name):
    compare, kinds, bench = modules
    import real_size

    comparison = getattr(compare if name == "SmallModels" else real_size, name)()
    parsed = {}
    for task in comparison.tasks():
        if task.kind != kinds.DENSE and task.seed == 0:
            arguments = tuple(comparison.arguments(task))
            if arguments not in parsed:
                parsed[arguments] = vars(bench.parse_sweep_args(arguments)[1])
            choices = comparison.run(task).choices
            recipe_of(argparse.Namespace(**{**parsed[arguments], **choices})).check(1)


def test_all_is_measured_once_and_each_rate_is_the_best_of_its_trials(
    modules, small, monkeypatch, capfd
):
    _, comparison, bench = modules
    bench.measure_all(small)
    results = comparison.Results(small.folder / "results.csv")
    found = results.read()
    assert [*found] == small.tasks()
    # Dense, right after pruning, trials, finetuned with two seeds
    assert len(found) == 1 + 1 + 4 + 2 * 2
    for task, result in found.items():
        if task.kind == comparison.FINETUNED:
            trials = {
                rate: found[task._replace(kind=comparison.TUNING, seed=0, rate=rate)].accuracy
                for rate in (1e-3, 1e-2)
            }
            assert trials[result.rate] == max(trials.values())
    assert not [*(small.folder / "runs").iterdir()], "finished runs are known by their line"

    monkeypatch.setattr(bench.Bench, "measure", None)
    bench.measure_all(small)  # nothing is left to measure
    bench.write_results(small, results)
    assert "| `ste` |" in (small.folder / "tables.md").read_text()
    assert (small.folder / "compare_sample_schedule.png").exists()


def test_held_out_images_are_trained_on_by_none(modules, small):
    compare, _, _ = modules
    small.make_images()
    parts = {
        (folder, part): compare.read_idx(
            small.folder / "images" / folder, f"{part}-images-idx3-ubyte", 3
        )
        for folder in ("sample-held-out", "quarter-held-out", "all-test")
        for part in ("train", "t10k")
    }
    held_out = {image.tobytes() for image in parts["sample-held-out", "t10k"]}
    # Two classes have no more than the three images of the sample
    assert len(held_out) == 8
    for folder in ("sample-held-out", "quarter-held-out", "all-test"):
        assert not held_out & {image.tobytes() for image in parts[folder, "train"]}
    assert len(parts["all-test", "train"]) == 4 * len(parts["quarter-held-out", "train"]) == 48 - 8
    assert len(parts["all-test", "t10k"]) == 61


def test_work_that_another_process_has_is_left_to_it_until_it_is_killed(modules, tmp_path):
    _, _, bench = modules
    hold = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; from trainer.run_folder import RunFolder; "
        "lock = RunFolder(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "claims" / "it"), str(ROOT)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    done = []
    assert not bench.claimed(tmp_path, "it", lambda: done.append(1))
    other.kill()
    other.wait()
    for _ in range(100):
        if bench.claimed(tmp_path, "it", lambda: done.append(1)):
            break
        time.sleep(0.1)
    assert done == [1]


def test_a_table_has_the_means_and_ranges_of_the_levels_that_a_world_has(modules):
    compare, comparison, _ = modules
    found = {
        comparison.Task(
            "finetuned", "from scratch", "tiny", method, level, seed
        ): comparison.Result(accuracy, 1)
        for method, level, seed, accuracy in (
            ("dense", "0", 0, 88),
            ("set", "0.9", 0, 80),
            ("set", "0.9", 1, 81),
        )
    }
    assert compare.SmallModels().tables(found) == {
        ("from scratch", "tiny", "finetuned"): """\
| top-1 in % | 0 % | 50 % | 80 % | 90 % | 95 % | 98 % | 2:4 | 1:4 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `dense` | 88.00 |  |  |  |  |  |  |  |
| `set` |  |  |  | 80.50 |  |  |  |  |""",
        ("from scratch", "tiny", comparison.RANGES): """\
| top-1 in % | 0 % | 50 % | 80 % | 90 % | 95 % | 98 % | 2:4 | 1:4 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `dense` | 88.00 |  |  |  |  |  |  |  |
| `set` |  |  |  | 80.50 (80.00 to 81.00) |  |  |  |  |""",
    }


def test_half_a_line_is_no_result(modules, tmp_path):
    _, comparison, _ = modules
    results = comparison.Results(tmp_path / "results.csv")
    task = comparison.Task("finetuned", "finetuned", "sample", "least-squares, teacher", "2:4", 1)
    results.add(task, comparison.Result(90.5, 12.3, 6e-4))
    with open(results.path, "a") as file:
        file.write("finetuned,finetuned,sample,unif,0.5,")
    assert results.read() == {task: comparison.Result(90.5, 12, 6e-4)}


@pytest.mark.parametrize("name", ["comparison", "real_size"])
def test_the_page_has_the_tables_of_the_published_results(modules, name):
    compare, kinds, _ = modules
    import real_size

    comparison = compare.SmallModels() if name == "comparison" else real_size.Photographs()
    page = (ROOT / "docs" / "comparison.md").read_text()
    found = comparison.tables(kinds.Results(ROOT / "docs" / f"{name}.csv").read())
    assert found
    for table in found.values():
        assert table in page


def test_the_menu_names_what_is_compared(modules):
    compare, comparison, _ = modules
    fields = {
        "--score": "score",
        "--pruner": "pruner",
        "--prune-schedule": "prune_schedule",
        "--reconstruct": "reconstruct",
    }
    used = {flag: set() for flag in fields}
    small = compare.SmallModels()
    for task in small.tasks():
        if task.kind == comparison.FINETUNED:
            for flag, field in fields.items():
                used[flag].add(small.run(task).choices[field])
    assert {flag: set(names) for flag, names in COMPARED.items()} == used


def test_transformers_onnx_weights_are_timm_weights(modules, tmp_path):
    import real_size

    made = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=28, embed_dim=12, num_heads=2
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    save_as_transformers_would(made.state_dict(), tmp_path / "backbone.onnx")

    weights = real_size.timm_weights(tmp_path / "backbone.onnx")
    assert weights.keys() == made.state_dict().keys()
    for name, value in made.state_dict().items():
        assert torch.equal(weights[name], value), name


def save_as_transformers_would(weights: dict[str, torch.Tensor], path: Path) -> None:
    """An ONNX file in which vectors have names, and matrices are known by their products."""
    tensors, nodes = {}, []

    def product(layer, weight):
        tensors[f"onnx::MatMul_{len(tensors)}"] = weight.T
        name = f"/backbone/{layer}/MatMul"
        nodes.append(onnx.helper.make_node("MatMul", ["x", [*tensors][-1]], ["y"], name=name))

    embeddings = "backbone.embeddings"
    tensors[f"{embeddings}.cls_token"] = weights["cls_token"]
    for node, part in (("Concat_6", slice(0, 1)), ("Reshape_1", slice(1, None))):
        tensors[node] = weights["pos_embed"][:, part]
        name = f"/backbone/embeddings/{node}"
        nodes.append(onnx.helper.make_node(node.split("_")[0], [node, "x"], ["y"], name=name))
    for kind in ("weight", "bias"):
        proj = f"{embeddings}.patch_embeddings.projection.{kind}"
        tensors[proj] = weights[f"patch_embed.proj.{kind}"]
        tensors[f"backbone.layernorm.{kind}"] = weights[f"norm.{kind}"]

    for index in range(12):
        block = f"blocks.{index}"
        layer = f"encoder/layer.{index}"
        theirs = f"backbone.encoder.layer.{index}"
        for part in (1, 2):
            tensors[f"{theirs}.layer_scale{part}.lambda1"] = weights[f"{block}.ls{part}.gamma"]
            for kind in ("weight", "bias"):
                tensors[f"{theirs}.norm{part}.{kind}"] = weights[f"{block}.norm{part}.{kind}"]
        parts = ("query", "key", "value")
        matrices = weights[f"{block}.attn.qkv.weight"].chunk(3)
        vectors = weights[f"{block}.attn.qkv.bias"].chunk(3)
        for part, matrix, vector in zip(parts, matrices, vectors, strict=True):
            product(f"{layer}/attention/attention/{part}", matrix)
            tensors[f"{theirs}.attention.attention.{part}.bias"] = vector
        names = {"attention/output/dense": "attn.proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
        for name, ours in names.items():
            product(f"{layer}/{name}", weights[f"{block}.{ours}.weight"])
            bias = f"{theirs}.{name.replace('/', '.')}.bias"
            tensors[bias] = weights[f"{block}.{ours}.bias"]

    initializers = [
        onnx.numpy_helper.from_array(value.numpy(), name) for name, value in tensors.items()
    ]
    graph = onnx.helper.make_graph(nodes, "backbone", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), path)


def test_pruned_backbones_are_judged_by_neighbours_and_by_their_features(
    modules, monkeypatch, tmp_path
):
    import real_size
    import without_labels

    dense = timm.create_model("vit_small_patch14_dinov2", num_classes=0, init_values=1.0)
    save_as_transformers_would(dense.state_dict(), tmp_path / "backbone.onnx")
    monkeypatch.setattr(without_labels, "TASKS", [("magnitude", "2:4"), ("wanda", "0.5")])
    monkeypatch.setattr(real_size.Photographs, "folder", tmp_path / "real_size")
    monkeypatch.setattr(real_size, "HELD_OUT", 0)
    generator = np.random.default_rng(0)
    for file in ("train/cat/0", "train/dog/0", "test/cat/0", "test/dog/0", "n01_tench"):
        path = tmp_path / "pictures" / f"{file}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(path)

    pictures = tmp_path / "pictures"
    rows = without_labels.measure(tmp_path / "backbone.onnx", pictures, pictures)
    assert [row[:2] for row in rows] == [["", "0"], ["magnitude", "2:4"], ["wanda", "0.5"]]
    cosines = [float(row[3]) for row in rows]
    assert cosines[0] == 1 > max(cosines[1:])
    assert all(0 <= float(row[2]) <= 100 for row in rows)

    # Killed and started again, it goes on; a table has both figures in a cell
    monkeypatch.setattr(without_labels, "pruned", None)
    assert without_labels.measure(tmp_path / "backbone.onnx", pictures, pictures) == rows
    assert f"{rows[2][2]}, {rows[2][3]}" in without_labels.table(rows)


def test_held_out_photographs_are_trained_on_by_none(modules, monkeypatch, tmp_path):
    import real_size

    monkeypatch.setattr(real_size, "HELD_OUT", 2)
    monkeypatch.setattr(real_size, "PASS", 3)
    for part, count in (("train", 8), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "cifar" / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.jpg").write_bytes(f"{part} {label} {index}".encode())

    comparison = real_size.Photographs(cifar=tmp_path / "cifar")
    comparison.folder = tmp_path / "real_size"
    comparison.arrange_images()
    images = {
        str(path.relative_to(comparison.folder / "images")): {
            file.read_bytes() for file in path.rglob("*.jpg")
        }
        for path in (comparison.folder / "images").glob("*/*")
    }
    held_out = images["all-held-out/val"]
    assert held_out == images["pass-held-out/val"]
    assert held_out == {f"train {x} {i}".encode() for x in ("cat", "dog") for i in (0, 1)}
    assert images["pass-test/train"] == images["pass-held-out/train"]
    assert images["pass-test/train"] == {
        f"train {x} {i}".encode() for x in ("cat", "dog") for i in (2, 3, 4)
    }
    assert len(images["all-held-out/train"]) == 12 and len(images["pass-test/val"]) == 8
    for path, found in images.items():
        assert path.endswith("held-out/val") or not held_out & found
