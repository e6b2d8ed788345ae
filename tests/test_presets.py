"""The recipes in configs/run/: each is read, says where it comes from, and runs."""

import json

import pytest
import torch
from conftest import ROOT

from sparsity_factory import SCHEDULES, Recipe, Sparsifier
from trainer.arguments import parse_args, recipe_of
from trainer.training_state import TrainingState
from utils import Compute

PRESETS = ROOT / "configs" / "run"
ADDED = {  # what the command line has to add
    "gmp": ["--sparsity", "0.9"],
    "rigl_from_scratch": ["--sparsity", "0.9"],
    "sr_ste_2_4": [],
    "ac_dc": ["--sparsity", "0.9"],
    "imagenet_finetune": ["--pruner", "lamp", "--sparsity", "0.5"],
    "imagenet_near_lossless": ["--sparsity", "0.5"],
    "imagenet_gradual": ["--sparsity", "0.9"],
    "imagenet_2_4": [],
    "imagenet_structured": ["--sparsity", "0.5"],
    "imagenet_from_scratch": ["--sparsity", "0.6"],
}


def args_of(name: str, *argv: str):
    return parse_args(
        ["--config", str(PRESETS / f"{name}.yaml"), "--data-path", "IMAGENET", *ADDED[name], *argv]
    )


@pytest.mark.parametrize("name", ADDED)
def test_a_recipe_says_how_to_start_it_its_source_and_what_was_not_run(name):
    text = (PRESETS / f"{name}.yaml").read_text()
    command = (
        f"python main.py --config configs/run/{name}.yaml --data-path IMAGENET --output_dir OUT"
    )
    assert " ".join([command, *ADDED[name]]) in " ".join(text.replace("\\\n#", "").split())
    assert "arXiv:" in text and "Not run on ImageNet here" in text
    assert "What it gave:" in text or not name.startswith("imagenet_")
    assert f"`{name}.yaml`" in (ROOT / "docs" / "methods.md").read_text()


def steps(name: str, epoch: int = 1000) -> list[int]:
    """The epochs at which masks change, with so many steps an epoch."""
    args = args_of(name)
    recipe = recipe_of(args)
    schedule = SCHEDULES[recipe.prune_schedule](recipe, recipe.steps(args.epochs * epoch, epoch))
    return [step / epoch for step in range(args.epochs * epoch) if schedule.changes_at(step)]


def test_gmp_prunes_every_100_steps_for_three_quarters_of_the_training():
    assert steps("gmp") == [step / 10 for step in range(1, 2251)]


def test_rigl_moves_weights_every_100_steps_for_three_quarters_of_the_training():
    assert steps("rigl_from_scratch") == [step / 10 for step in range(1, 2250)]


def test_sr_ste_chooses_two_of_four_at_every_step():
    assert steps("sr_ste_2_4", epoch=10) == [step / 10 for step in range(1, 3000)]
    assert recipe_of(args_of("sr_ste_2_4")).pattern == "2:4"


def test_ac_dc_has_phases_of_five_epochs_after_ten_dense_ones():
    assert steps("ac_dc") == list(range(10, 81, 5))


def test_every_recipe_for_imagenet_is_tried_here():
    ours = ("sample", "photographs")  # presets of models that are trained here
    names = {path.stem for path in PRESETS.glob("*.yaml")}
    assert {name for name in names if not name.startswith(ours)} == {*ADDED}


def test_gradual_in_100_epochs_reaches_its_target_at_epoch_80():
    assert steps("imagenet_gradual") == [step / 10 for step in range(1, 801)]


def test_from_scratch_moves_weights_every_15000_steps_of_2502_an_epoch():
    assert [round(epoch * 2502) for epoch in steps("imagenet_from_scratch", 2502)] == list(
        range(15000, 1200960, 15000)
    )


@pytest.mark.parametrize("name", [name for name in ADDED if args_of(name).pretrained])
def test_what_starts_from_dense_weights_does_not_train_as_from_scratch(name):
    """DeiT's own 300 epochs at 5e-4 for each 512 images are for random weights."""
    args = args_of(name, "--batch-size", "1024")
    assert (args.epochs, args.lr * (1 if args.unscale_lr else 2)) < (300, 1e-3)


@pytest.mark.parametrize(
    "name, first, last", [("imagenet_finetune", 1e-4, 1e-5), ("imagenet_2_4", 5e-4, 1e-5)]
)
def test_the_rate_of_the_short_finetuning_falls_in_a_line(name, first, last):
    args, rates = args_of(name, "--model", "deit_sample_patch4_28", "--input-size", "28"), []
    model = torch.nn.Linear(2, 2)
    state = TrainingState(
        model,
        Sparsifier(model, Recipe(), total_steps=1, epoch_steps=1),
        args,
        Compute(torch.device("cpu")),
    )
    for epoch in range(args.epochs):
        state.lr_scheduler.step(epoch)
        rates.append(state.learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(
        [first + (last - first) * epoch / args.epochs for epoch in range(args.epochs)]
    )


@pytest.mark.parametrize(
    "name, added, sparsity",
    [
        ("sample_best", ["--sparsity", "0.9"], 0.9),
        ("sample_best_units", ["--sparsity", "0.5"], 0.5),
        ("sample_best_nm", ["--pattern", "2:4"], None),
    ],
)
def test_the_best_recipe_of_the_sample_names_all_but_the_sparsity(name, added, sparsity):
    args = parse_args(["--config", str(PRESETS / f"{name}.yaml"), *added])
    recipe = recipe_of(args)
    recipe.check(args.epochs)
    assert (recipe.reconstruct, args.dense_teacher, args.epochs) == ("least-squares", 1.0, 2)
    assert recipe.sparsity == sparsity
    assert (
        f"main.py --config configs/run/{name}.yaml {' '.join(added)}\n"
        in (PRESETS / f"{name}.yaml").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDED)
def test_a_recipe_runs_on_the_tiny_data_set(run_main, tiny, tmp_path, name):
    run_main(
        "--config",
        PRESETS / f"{name}.yaml",
        *tiny,
        *ADDED[name],
        "--output_dir",
        "out",
        "--lr",
        "1e-4",
        "--calibration-images",
        "40",
    )
    line = json.loads((tmp_path / "out" / "log.txt").read_text())
    asked = recipe_of(args_of(name))
    near = 0.05 if asked.budget == "macs" else 0.01  # what goes is counted in weights here
    assert line["sparsity"] == pytest.approx(
        0.5 if asked.sparsity is None else asked.sparsity, abs=near
    )
    assert (tmp_path / "out" / "best_checkpoint.pth").exists()
