"""Sweeps over pruners, scores, patterns, schedules, sparsities and seeds."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start_main
from PIL import Image

import sweep as sweeping
from engine import Progress
from sparsity_factory import PRUNERS, prunable_weights
from trainer import builders, calibration_images
from trainer.exit_status import exit_status
from trainer.job_folder import JobFolder
from trainer.run_folder import read_log
from trainer.sweep_table import Outcome, Table
from utils import UserError, load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def run_sweep(tmp_path, monkeypatch, capfd, tiny):
    """Runs the command line in this process on the tiny data set; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    place = tiny.index("--epochs")
    recipe = [*tiny[:place], *tiny[place + 2 :], "--lr", "0.02", "--no-model-ema"]

    def run(*argv, status=0):
        capfd.readouterr()
        assert exit_status(lambda: sweeping.sweep([*recipe, *map(str, argv)])) == status
        captured = capfd.readouterr()
        return captured.err if status else captured.out

    return run


def rows(folder="output/sweep"):
    with open(f"{folder}/sweep.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def key(row):
    return row["kind"], row["name"], row["sparsity"], row["seed"]


def test_every_combination_is_measured_and_drawn(run_sweep, tmp_path):
    output = run_sweep(
        "--pruners",
        "lamp",
        "erk",
        "--sparsities",
        "0.5",
        "0.9",
        "--finetune-epochs",
        "1",
        "--seeds",
        "0",
        "1",
    )
    assert [key(row) for row in rows()] == [
        ("dense", "", "0.0", ""),
        *(
            ("one-shot", name, sparsity, "")
            for name in ("lamp", "erk")
            for sparsity in ("0.5", "0.9")
        ),
        *(
            ("finetuned", name, sparsity, seed)
            for seed in "01"
            for name in ("lamp", "erk")
            for sparsity in ("0.5", "0.9")
        ),
    ]
    assert all(0 <= float(row["accuracy"]) <= 100 for row in rows())
    assert float(rows()[2]["pruned"]) == pytest.approx(0.9, abs=1e-5)
    assert re.search(r"\[13/13\] finetuned, erk at 90 %, seed 1: [\d.]+ %", output)
    text = (tmp_path / "output/sweep/sweep.md").read_text()
    assert "| top-1 in % | 50 % | 90 % |" in text
    assert re.search(r"\| `lamp` \| [\d.]+ → [\d.]+ \([\d.]+ to [\d.]+\) \|", text)
    assert "python sweep.py --data-set FASHION" in text
    assert Image.open("output/sweep/sweep.png").size[0] == 960


def test_a_sweep_measures_what_single_runs_measure(run_sweep, run_main, tiny):
    flags = ["--seed", "3", "--lr", "0.02", "--drop-path", "0.2", "--no-model-ema"]
    single = run_main(*tiny, *flags, "--pruner", "lamp", "--sparsity", "0.8", "--epochs", "2")
    run_sweep(
        "--seeds",
        "1",
        "3",
        "--drop-path",
        "0.2",
        "--pruners",
        "glob",
        "lamp",
        "--sparsities",
        "0.8",
        "0.5",
        "--finetune-epochs",
        "2",
    )
    found = {key(row): float(row["accuracy"]) for row in rows()}
    dense, pruned, finetuned = map(
        float, re.findall(r"(?:dense|pruned|finetuned) ([\d.]+) %", single)
    )
    assert found["dense", "", "0.0", ""] == pytest.approx(dense, abs=0.005)
    assert found["one-shot", "lamp", "0.8", ""] == pytest.approx(pruned, abs=0.005)
    assert found["finetuned", "lamp", "0.8", "3"] == pytest.approx(finetuned, abs=0.005)


def weights(folder):
    return load_checkpoint(f"{folder}/checkpoint.pth")["model"]


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_every_combination_of_the_choices_is_a_task_once(run_sweep, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        sweeping.Workbench, "outcome", lambda self, task: done.append(task) or Outcome(50.0, 0.5)
    )
    (tmp_path / "mine.yaml").write_text("sparsity: {mode: unstructured, level: {default: 0.3}}\n")
    run_sweep(
        "--pruners",
        "lamp",
        "erk",
        "--scores",
        "magnitude",
        "taylor",
        "--patterns",
        "unstructured",
        "2:4",
        "block:16x16",
        "--schedules",
        "gradual",
        "one-shot",
        "--sparsities",
        "0.5",
        "0.9",
        "--finetune-epochs",
        "1",
        "--seeds",
        "0",
        "1",
        "--custom-configs",
        "mine.yaml",
        "--calibration-images",
        "32",
    )
    crossed = [
        (name, score, pattern, schedule, sparsity)
        for name in ("lamp", "erk")
        for score in ("magnitude", "taylor")
        for pattern in ("unstructured", "block:16x16")
        for schedule in ("gradual", "one-shot")
        for sparsity in ("0.5", "0.9")
    ]
    others = [
        (name, score, pattern, schedule, sparsity)
        for name, pattern, sparsity in (("unif", "2:4", "0.5"), ("mine.yaml", "", "0.3"))
        for score in ("magnitude", "taylor")
        for schedule in ("gradual", "one-shot")
    ]
    expected = [("dense", "", "", "", "", "0.0", "")]
    expected += [("one-shot", *place, "") for place in crossed + others if place[3] == "one-shot"]
    expected += [("finetuned", *place, seed) for place in crossed + others for seed in "01"]
    found = [
        tuple(
            row[name]
            for name in ("kind", "name", "score", "pattern", "schedule", "sparsity", "seed")
        )
        for row in rows()
    ]
    assert sorted(
        (*row[:5], f"{float(row[5]):.4g}" if row[1] else "0.0", row[6]) for row in found
    ) == sorted(expected)
    text = (tmp_path / "output/sweep/sweep.md").read_text()
    assert (
        "| `erk, taylor, block:16x16, gradual` | 50.00 (50.00 to 50.00) | 50.00 (50.00 to 50.00) |"
        in text
    )
    assert "- `unif, magnitude, 2:4, one-shot`, 50.00 % pruned: 50.00 → 50.00" in text
    assert "- `mine.yaml, taylor, gradual`, 30.00 % pruned: 50.00" in text
    assert len({task.run for task in done if task.kind == "finetuned"}) == 2 * len(crossed + others)


def test_a_refused_combination_stands_as_refused_and_costs_no_work(
    run_sweep, tmp_path, monkeypatch
):
    work = []
    for module, name in ((sweeping, "train"), (builders, "Calibration")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, name=name, original=original: work.append(name) or original(*args),
        )
    output = run_sweep(
        "--pruners",
        "owl",
        "--scores",
        "wanda",
        "--patterns",
        "row",
        "x:5",
        "--schedules",
        "one-shot",
        "rigl",
        "--sparsities",
        "0.5",
        "0.75",
        "--finetune-epochs",
        "1",
        "--drop-fraction",
        "0.2",
        "--prune-every",
        "1",
        "--calibration-images",
        "32",
    )
    refused = {
        (row["kind"], row["pattern"], row["schedule"]): row["error"]
        for row in rows()
        if not row["accuracy"]
    }
    assert set(refused) == {
        ("one-shot", "x:5", "one-shot"),
        ("finetuned", "x:5", "one-shot"),
        ("finetuned", "row", "rigl"),
        ("finetuned", "x:5", "rigl"),
    }
    assert all(error.startswith("refused: ") for error in refused.values())
    assert "divides the 96 inputs" in refused["one-shot", "x:5", "one-shot"]
    assert sorted(work) == ["Calibration"] * 4 + ["train"] * 2
    assert "| `owl, x:5, one-shot` | refused | refused |" in output
    assert (
        "- owl, row, rigl at 50, 75 %: refused: --prune-schedule rigl: expected unstructured"
        in output
    )


def test_a_finetuning_goes_on_from_its_checkpoint(run_sweep, monkeypatch):
    recipe = [
        "--pruners",
        "lamp",
        "--scores",
        "taylor",
        "--schedules",
        "gradual",
        "--sparsities",
        "0.8",
        "--finetune-epochs",
        "2",
        "--prune-every",
        "2",
        "--calibration-images",
        "32",
        "--model-ema",
    ]
    run_sweep(*recipe, "--output_dir", "whole")
    end_step, steps = Progress.end_step, []

    def stop_at_the_fifth(progress, images):
        end_step(progress, images)
        steps.append(progress.step)
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "end_step", stop_at_the_fifth)
    assert "the same command" in run_sweep(*recipe, "--output_dir", "parts", status=143)
    run_sweep(*recipe, "--output_dir", "parts")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert rows("parts") == rows("whole")
    assert rows("whole")[-1]["accuracy"]
    name = "runs/lamp_taylor_gradual_0.8_seed0"
    assert_same_weights(f"parts/{name}", f"whole/{name}")
    assert [line["epoch"] for line in read_log(Path("parts", name))] == [0, 1]


def test_options_are_for_the_combinations_that_have_them_and_are_shown(run_sweep, run_main, tiny):
    options = ["--method-options", "alpha.tau=0.5"]
    flags = ["--pruner", "alpha", "--sparsity", "0.9", "--lr", "0.02", "--no-model-ema"]
    single = run_main(*tiny, *flags, *options, "--epochs", "1")
    run_sweep("--pruners", "unif", "alpha", "--sparsities", "0.9", *options, "--finetune-epochs", 1)

    found = {key(row): float(row["accuracy"]) for row in rows()}
    pruned, finetuned = map(float, re.findall(r"(?:pruned|finetuned) ([\d.]+) %", single))
    assert found["one-shot", "alpha", "0.9", ""] == pytest.approx(pruned, abs=0.006)
    assert found["finetuned", "alpha", "0.9", "0"] == pytest.approx(finetuned, abs=0.006)
    assert "- method options: alpha.tau=0.5\n" in Path("output/sweep/sweep.md").read_text()

    recipes = {
        name: load_checkpoint(f"output/sweep/runs/{name}_0.9_seed0/checkpoint.pth")["pruning"]
        for name in ("unif", "alpha")
    }
    assert recipes["unif"]["recipe"]["method_options"] is None
    assert recipes["alpha"]["recipe"]["method_options"] == {"alpha.tau": 0.5}
    again = ["--pruners", "alpha", "--finetune-epochs", 1, "--method-options", "alpha.tau=0.4"]
    other = run_sweep(*again, status=2)
    assert "holds a sweep with --method-options" in other


def test_a_sweep_trains_by_a_schedule_as_single_runs_do(run_sweep, run_main, tiny):
    flags = ["--lr", "0.02", "--no-model-ema", "--prune-every", "2", "--calibration-images", "32"]
    single = run_main(
        *tiny,
        *flags,
        "--seed",
        "3",
        "--pruner",
        "erk",
        "--score",
        "wanda",
        "--sparsity",
        "0.8",
        "--prune-schedule",
        "gradual",
        "--epochs",
        "2",
        "--output_dir",
        "single",
    )
    run_sweep(
        "--seeds",
        "3",
        "--pruners",
        "erk",
        "--scores",
        "wanda",
        "--schedules",
        "one-shot",
        "gradual",
        "--sparsities",
        "0.8",
        "--finetune-epochs",
        "2",
        *flags[3:],
    )
    found = {(row["kind"], row["schedule"]): row for row in rows()}
    accuracy = float(re.search(r"finetuned ([\d.]+) %", single)[1])
    assert float(found["finetuned", "gradual"]["accuracy"]) == pytest.approx(accuracy, abs=0.005)
    assert float(found["finetuned", "gradual"]["pruned"]) == pytest.approx(0.8, abs=1e-4)
    assert ("one-shot", "gradual") not in found
    assert_same_weights("single", "output/sweep/runs/erk_wanda_gradual_0.8_seed3")


def test_a_sweep_learns_from_the_dense_model_as_single_runs_do_and_goes_on(
    run_sweep, run_main, tiny, stop_at
):
    flags = ["--lr", "0.02", "--no-model-ema", "--dense-teacher", "0.5", "--distillation-tau", "2"]
    run_main(*tiny, *flags, "--pruner", "lamp", "--sparsity", "0.9", "--output_dir", "single")
    sweep = ["--pruners", "lamp", "--sparsities", "0.9", "--finetune-epochs", "1", *flags[3:]]
    stop_at(2)
    run_sweep(*sweep, status=143)
    run_sweep(*sweep)
    assert_same_weights("single", "output/sweep/runs/lamp_0.9_seed0")
    run_main(*tiny, "--resume", "output/sweep/runs/lamp_0.9_seed0/checkpoint.pth", "--epochs", "2")


def test_a_sweep_without_a_head_measures_as_single_runs_and_refuses_scores_that_need_labels(
    run_sweep, run_main, tiny
):
    flags = ["--num-classes", "0", "--lr", "0.02", "--no-model-ema"]
    run_main(*tiny, *flags, "--pruner", "lamp", "--sparsity", "0.9", "--output_dir", "single")
    sweep = ["--pruners", "lamp", "--scores", "magnitude", "taylor", "--sparsities", "0.9"]
    run_sweep(*flags[:2], *sweep, "--finetune-epochs", "1")
    assert_same_weights("single", "output/sweep/runs/lamp_0.9_seed0")
    found = {(row["kind"], row["score"]): row["error"] for row in rows()}
    assert not found["finetuned", "magnitude"]
    assert "needs the gradient of a loss" in found["finetuned", "taylor"]


def test_runs_share_the_statistics_of_the_dense_model_and_of_no_other(run_sweep, monkeypatch):
    command = [
        "--pruners",
        "unif",
        "--scores",
        "taylor",
        "--schedules",
        "one-shot",
        "gradual",
        "--sparsities",
        "0.5",
        "--finetune-epochs",
        "1",
        "--prune-every",
        "1",
        "--calibration-images",
        "16",
    ]
    first, looked = {}, []
    collect = calibration_images.collect_statistics

    def note(model, *args, **kwargs):
        weight = next(iter(prunable_weights(model).values()))
        looked.append(torch.equal(weight, first.setdefault("weight", weight.clone())))
        return collect(model, *args, **kwargs)

    monkeypatch.setattr(calibration_images, "collect_statistics", note)
    run_sweep(*command)
    assert looked.count(True) == 1  # for three runs
    assert looked.count(False) == 2  # at the second and the third step of the gradual one

    shared, build = rows(), sweeping.build_sparsifier
    monkeypatch.setattr(sweeping, "build_sparsifier", lambda *args: build(*args[:-2]))
    run_sweep(*command, "--output_dir", "alone")
    assert rows("alone") == shared


def test_a_table_of_eight_columns_is_read_with_the_defaults(run_sweep, tmp_path):
    run_sweep("--pruners", "lamp", "--sparsities", "0.5")
    (tmp_path / "output/sweep/sweep.csv").write_text(
        "kind,name,sparsity,seed,config,pruned,accuracy,error\n"
        "dense,,0.0,,,,91.0000,\none-shot,lamp,0.5,,,0.500000,12.3000,\n"
    )
    run_sweep("--pruners", "lamp", "erk", "--sparsities", "0.5")
    found = {row["name"]: row for row in rows()}
    assert [float(found[name]["accuracy"]) for name in ("", "lamp")] == [91, 12.3]
    assert [(row["score"], row["pattern"], row["schedule"]) for row in rows()] == [
        ("", "", ""),
        *[("magnitude", "unstructured", "one-shot")] * 2,
    ]


def test_a_table_of_eleven_columns_is_read_as_without_reconstruction(run_sweep, tmp_path):
    flags = ["--pruners", "lamp", "--sparsities", "0.5", "--calibration-images", "32"]
    run_sweep(*flags)
    (tmp_path / "output/sweep/sweep.csv").write_text(
        "kind,name,score,pattern,schedule,sparsity,seed,config,pruned,accuracy,error\n"
        "dense,,,,,0.0,,,,91.0000,\none-shot,lamp,magnitude,unstructured,one-shot,0.5,,,0.500000,12.3000,\n"
    )
    run_sweep(*flags, "--reconstructions", "none", "obs")
    assert [(row["name"], row["reconstruct"]) for row in rows()] == [
        ("", ""),
        ("lamp", "none"),
        ("lamp", "obs"),
    ]
    assert [float(row["accuracy"]) for row in rows()[:2]] == [91, 12.3]


def test_a_sweep_crosses_reconstructions_and_measures_what_single_runs_measure(
    run_sweep, run_main, tiny, tmp_path
):
    flags = ["--lr", "0.02", "--no-model-ema", "--calibration-images", "32"]
    single = run_main(
        *tiny,
        *flags,
        "--pruner",
        "lamp",
        "--sparsity",
        "0.8",
        "--reconstruct",
        "obs",
        "--output_dir",
        "single",
    )
    run_sweep(
        "--pruners",
        "lamp",
        "--sparsities",
        "0.8",
        "--reconstructions",
        "none",
        "obs",
        "--schedules",
        "one-shot",
        "ste",
        "--finetune-epochs",
        "1",
        *flags[3:],
    )
    found = {(row["kind"], row["schedule"], row["reconstruct"]): row for row in rows()}
    assert set(found) == {
        ("dense", "", ""),
        *(("one-shot", "one-shot", method) for method in ("none", "obs")),
        *(
            ("finetuned", schedule, method)
            for schedule in ("one-shot", "ste")
            for method in ("none", "obs")
        ),
    }
    assert found["finetuned", "ste", "obs"]["error"].startswith("refused: --reconstruct obs")
    pruned, finetuned = map(float, re.findall(r"(?:pruned|finetuned) ([\d.]+) %", single))
    for kind, accuracy in (("one-shot", pruned), ("finetuned", finetuned)):
        assert float(found[kind, "one-shot", "obs"]["accuracy"]) == pytest.approx(
            accuracy, abs=0.005
        )
        assert float(found[kind, "one-shot", "obs"]["pruned"]) == pytest.approx(0.8, abs=1e-4)
    assert_same_weights("single", "output/sweep/runs/lamp_obs_0.8_seed0")
    assert "| `lamp, one-shot, obs` |" in (tmp_path / "output/sweep/sweep.md").read_text()


def test_started_again_it_does_what_is_missing_only(run_sweep, tmp_path, monkeypatch):
    run_sweep("--pruners", "lamp", "erk", "--sparsities", "0.5")
    path = tmp_path / "output/sweep/sweep.csv"
    path.write_text(path.read_text()[:-5])  # killed while it wrote the last line
    done, outcome = [], sweeping.Workbench.outcome
    monkeypatch.setattr(
        sweeping.Workbench,
        "outcome",
        lambda self, task: done.append(task.name) or outcome(self, task),
    )
    run_sweep("--pruners", "lamp", "erk", "unif", "--sparsities", "0.5")
    assert done == ["erk", "unif"]
    assert [row["name"] for row in rows()] == ["", "lamp", "erk", "unif"]
    assert all(row["accuracy"] for row in rows())


def test_a_line_that_the_file_system_lost_is_written_again(run_sweep, monkeypatch):
    add = Table.add
    lost = []

    def lose_one(table, task, outcome):
        if task.name == "lamp" and not lost:
            lost.append(task)
        else:
            add(table, task, outcome)

    monkeypatch.setattr(Table, "add", lose_one)
    run_sweep("--pruners", "lamp", "unif", "--sparsities", "0.5")
    assert lost and [row["name"] for row in rows()] == ["", "lamp", "unif"]


HOLDS_THE_LOCK = """
import fcntl, sys
file = open("results", "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
file.write("theirs\\n")
"""


def test_a_line_is_added_after_that_of_a_process_that_has_the_lock(tmp_path):
    command = [sys.executable, "-c", HOLDS_THE_LOCK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as other:
        other.stdout.readline()
        adding = threading.Thread(target=JobFolder(tmp_path, "results").add, args=("ours",))
        adding.start()
        adding.join(0.3)
        other.stdin.close()
        adding.join()
    assert (tmp_path / "results").read_text() == "theirs\nours\n"


def test_a_signal_ends_a_sweep_that_goes_on_where_it_stopped(run_sweep, monkeypatch):
    outcome = sweeping.Workbench.outcome

    def stop_in_the_second(self, task):
        if task.kind == "one-shot":
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping.Workbench, "outcome", stop_in_the_second)
        message = run_sweep("--pruners", "lamp", "--sparsities", "0.5", status=143)
    assert message == "stopped by SIGTERM; the same command does what is missing in output/sweep\n"
    assert "1 of 2 done before" in run_sweep("--pruners", "lamp", "--sparsities", "0.5")


def test_a_combination_that_fails_is_told_in_the_table_and_the_others_go_on(run_sweep):
    output = run_sweep(
        "--pruners", "unifplus", "unif", "--sparsities", "0.5", "0.95", "--finetune-epochs", "1"
    )
    assert [row["error"][:23] for row in rows() if not row["accuracy"]] == [
        "refused: unifplus keeps"
    ] * 2
    assert re.search(r"\| `unifplus` \| [\d.]+ → [\d.]+ \| refused \|", output)
    assert "- unifplus at 95 %: refused: unifplus keeps the first and last" in output


def test_a_training_that_diverges_ends_no_other(run_sweep):
    output = run_sweep(
        "--pruners",
        "lamp",
        "--sparsities",
        "0.5",
        "--finetune-epochs",
        "1",
        "--opt",
        "sgd",
        "--lr",
        "1e30",
    )
    assert "the loss is not finite" in output
    assert [bool(row["accuracy"]) for row in rows()] == [True, True, False]


def test_custom_configurations_take_part_where_they_are_and_are_measured_again_when_edited(
    run_sweep, tmp_path
):
    path = tmp_path / "mine.yaml"
    path.write_text("sparsity:\n  mode: nxm\n  level: {default: 2:4, blocks.0.*: dense}\n")
    output = run_sweep("--custom-configs", "mine.yaml", "--pruners", "unif", "--sparsities", "0.5")
    row = rows()[-1]
    assert row["name"] == "mine.yaml"
    assert float(row["pruned"]) == float(row["sparsity"]) == pytest.approx(5 / 12, abs=1e-5)
    assert re.search(r"- `mine.yaml`, 41.67 % pruned: [\d.]+", output)
    path.write_text(path.read_text().replace("blocks.0.*", "blocks.1.*"))
    assert "[3/3] one-shot, mine.yaml" in run_sweep(
        "--custom-configs", "mine.yaml", "--pruners", "unif", "--sparsities", "0.5"
    )


def test_sensitivity_prunes_each_layer_alone(run_sweep):
    run_sweep("--sensitivity", "--sparsities", "0.5", "0.95")
    assert len(rows()) == 1 + 24 * 2
    qkv = {
        row["sparsity"]: float(row["pruned"])
        for row in rows()
        if row["name"] == "blocks.0.attn.qkv.weight"
    }
    assert qkv == {
        "0.5": pytest.approx(0.5 * 27648 / 663552, abs=1e-6),
        "0.95": pytest.approx(0.95 * 27648 / 663552, abs=1e-6),
    }
    assert Image.open("output/sweep/sensitivity.png").size[0] == 960


def test_a_sweep_prunes_the_chosen_layers_only(run_sweep):
    layers = ["--layers", "blocks.0.*", "!*.mlp.*"]
    run_sweep("--sensitivity", "--pruners", "unif", "--sparsities", "0.5", *layers)
    found = {row["name"]: float(row["pruned"]) for row in rows() if row["kind"] == "layer"}
    qkv, proj = 27648, 9216
    assert found == {
        "blocks.0.attn.qkv.weight": pytest.approx(0.5 * qkv / (qkv + proj), abs=1e-6),
        "blocks.0.attn.proj.weight": pytest.approx(0.5 * proj / (qkv + proj), abs=1e-6),
    }
    run_sweep("--pruners", "lamp", "--sparsities", "0.5", *layers, "--output_dir", "lamp")
    (pruned,) = (row["pruned"] for row in rows("lamp") if row["kind"] == "one-shot")
    assert float(pruned) == pytest.approx(0.5, abs=1e-4)


def test_processes_share_the_combinations(tmp_path, tiny):
    place = tiny.index("--epochs")
    result = start_main(
        *tiny[:place],
        *tiny[place + 2 :],
        "--pruners",
        "lamp",
        "erk",
        "unif",
        "--sparsities",
        "0.5",
        "--output_dir",
        "out",
        cwd=tmp_path,
        processes=2,
        script=ROOT / "sweep.py",
    )
    assert result.returncode == 0, result.stderr
    assert [row["name"] for row in rows(tmp_path / "out")] == ["", "lamp", "erk", "unif"]
    assert len(re.findall(r"^\[\d/4\] ", result.stdout, re.M)) == 4
    assert result.stdout.count("Written to out") == 1


def test_all_processes_share_one_run(tmp_path, tiny):
    flags = [*tiny, "--lr", "0.02", "--batch-size", "8", "--calibration-images", "40"]
    place = flags.index("--epochs")
    single = start_main(
        *flags,
        "--pruner",
        "erk",
        "--score",
        "wanda",
        "--sparsity",
        "0.5",
        "--output_dir",
        "single",
        cwd=tmp_path,
        processes=2,
    )
    assert single.returncode == 0, single.stderr
    result = start_main(
        *flags[:place],
        *flags[place + 2 :],
        "--pruners",
        "lamp",
        "erk",
        "--scores",
        "wanda",
        "--sparsities",
        "0.5",
        "--finetune-epochs",
        "1",
        "--processes-per-run",
        "all",
        "--output_dir",
        "out",
        cwd=tmp_path,
        processes=2,
        script=ROOT / "sweep.py",
    )
    assert result.returncode == 0, result.stderr
    assert [row["kind"] for row in rows(tmp_path / "out")] == [
        "dense",
        *["one-shot"] * 2,
        *["finetuned"] * 2,
    ]
    assert len(re.findall(r"^\[\d/5\] ", result.stdout, re.M)) == 5
    assert f"finetuned {float(rows(tmp_path / 'out')[-1]['accuracy']):.2f} %" in single.stdout
    assert_same_weights(tmp_path / "single", tmp_path / "out/runs/erk_wanda_0.5_seed0")
    again = start_main(
        *flags[:place],
        *flags[place + 2 :],
        "--finetune-epochs",
        "1",
        "--output_dir",
        "out",
        cwd=tmp_path,
        script=ROOT / "sweep.py",
    )
    assert "--processes-per-run 2, not 1" in again.stderr


@pytest.mark.parametrize(
    "argv, culprit",
    [
        (["--pruners", "lampp"], "lampp"),
        (["--pruners", "custom"], "custom"),
        (["--sparsities", "1.0"], "1.0"),
        (["--sparsities", "0.5", "half"], "half"),
        (["--finetune-epochs", "-1"], "--finetune-epochs"),
        (["--pruner", "lamp", "--sparsity", "0.5"], "--pruners"),
        (["--epochs", "3"], "--finetune-epochs"),
        (["--eval"], "--eval"),
        (["--custom-configs", "missing.yaml"], "missing.yaml"),
        (["--custom-configs", "misfit.yaml"], "blocks.9"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--opt", "adamwx", "--finetune-epochs", "1"], "adamwx"),
        (["--scores", "l1"], "l1"),
        (["--patterns", "5:4"], "5:4"),
        (["--schedules", "gradual"], "--finetune-epochs"),
        (["--score", "snip"], "--scores"),
        (["--reconstruct", "obs"], "--reconstructions"),
        (["--reconstructions", "sgd"], "sgd"),
        (["--reconstructions", "obs", "--calibration-images", "49"], "images 49"),
        (["--method-options", "gradual.exponent=2"], "gradual.exponent: expected an option"),
        (["--pruners", "lamp", "--method-options", "owl.lambda=0.1"], "owl.lambda: expected none"),
        (["--method-options", "owl.lambda=2"], "owl.lambda=2: expected a number in [0, 1]"),
        (["--layers", "blocks.9.*"], "layers 'blocks.9.*' matches no layer"),
        (["--prune-every", "5"], "--prune-every: not with --schedules one-shot"),
        (
            ["--prune-start", "2", "--schedules", "gradual", "--finetune-epochs", "1"],
            "--prune-start 2",
        ),
        (["--scores", "wanda", "--calibration-images", "49"], "--calibration-images 49"),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_line_before_any_work(run_sweep, tmp_path, argv, culprit):
    (tmp_path / "misfit.yaml").write_text(
        "sparsity:\n  mode: nxm\n  level: {default: 2:4, blocks.9.*: dense}\n"
    )
    error = run_sweep(*argv, status=2)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert culprit in error
    assert [path.name for path in tmp_path.iterdir()] == ["misfit.yaml"]


def test_the_folder_of_another_sweep_is_refused(run_sweep, tmp_path):
    run_sweep("--pruners", "lamp", "--sparsities", "0.5")
    before = (tmp_path / "output/sweep/sweep.csv").read_bytes()
    error = run_sweep("--pruners", "lamp", "--sparsities", "0.5", "--lr", "0.5", status=2)
    assert error == (
        "error: --output_dir output/sweep: holds a sweep with --lr 0.02, not 0.5; choose another "
        "folder\n"
    )
    assert (tmp_path / "output/sweep/sweep.csv").read_bytes() == before
    assert "--seed 0, not 7" in run_sweep(
        "--pruners", "lamp", "--sparsities", "0.5", "--seed", "7", status=2
    )
    path = tmp_path / "output/sweep/sweep.json"
    path.write_text(
        json.dumps(
            {name: value for name, value in json.loads(path.read_text()).items() if name != "drop"}
        )
    )
    # Made before that argument existed
    run_sweep("--pruners", "lamp", "--sparsities", "0.5")
    path.write_text(json.dumps([1]))
    assert "sweep.json" in run_sweep("--pruners", "lamp", status=2)


def test_the_parser_takes_the_arguments_of_main_beside_its_own():
    options, args = sweeping.parse_sweep_args(
        ["--finetune-epochs", "3", "--lr", "0.1", "--seed", "7"]
    )
    every = [name for name in PRUNERS if name != "custom"]
    assert (options.pruners, options.seeds) == (every, [7])
    assert (args.lr, args.epochs, args.output_dir) == (0.1, 3, "output/sweep")
    assert (options.scores, options.patterns, options.schedules) == (
        ["magnitude"],
        ["unstructured"],
        ["one-shot"],
    )
    for flags, pruners in (
        ([], every),
        (["--custom-configs", "a.yaml"], every),
        (["--sensitivity"], []),
        (["--sensitivity", "--pruners", "erk"], ["erk"]),
        (["--pruners"], []),
    ):
        assert sweeping.parse_sweep_args(flags)[0].pruners == pruners
    with pytest.raises(UserError, match="unrecognized"):
        sweeping.parse_sweep_args(["--sparsitie", "0.5"])


def test_what_a_preset_says_in_the_place_of_the_sweeps_flags_is_named(capfd, tmp_path):
    (tmp_path / "run.yaml").write_text("pruner: lamp\nepochs: 3\nlr: 0.5\n")
    options, args = sweeping.parse_sweep_args(
        ["--config", f"{tmp_path}/run.yaml", "--pruners", "erk"]
    )
    assert (options.pruners, args.epochs, args.lr) == (["erk"], 0, 0.5)
    assert capfd.readouterr().out.rstrip().endswith("flags of its own for --epochs, --pruner")


def test_a_sweep_permutes_as_a_run_does(run_sweep, run_main, tiny, monkeypatch):
    monkeypatch.setattr("sparsity_factory.permutation.ROUNDS", 10)
    run_sweep(
        "--pruners", "lamp", "--patterns", "unstructured", "1:4", "--sparsities", "0.5", "--permute"
    )
    _, refused, pruned = rows()
    assert refused["error"].startswith("refused: --permute: expected n:m")
    printed = run_main(*tiny, "--pattern", "1:4", "--permute", "--eval")
    assert f"pruned {float(pruned['accuracy']):.2f} %" in printed
