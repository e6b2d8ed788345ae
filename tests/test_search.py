"""The exact choice under a budget, what layers lose, and the command that searches."""

import argparse
import csv
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import linears, statistics_of
from torch.nn import functional as F

import search
from models import build_model
from sparsity_factory import (
    PruningError,
    collect_statistics,
    compute_masks,
    levels,
    obs_prune,
    prunable_weights,
)
from sparsity_factory.custom_yaml import resolve_choices, resolve_levels
from sparsity_factory.damping import damped_gram
from sparsity_factory.knapsack import STATES, cheapest, undominated
from sparsity_factory.levels import MEASURES, Divergence, at_levels, exchanges
from sparsity_factory.patterns import n_of_m
from sparsity_factory.scores import Layer
from sparsity_factory.time_table import Choice, TimeTable
from trainer.exit_status import exit_status
from trainer.search_bench import Bench, Record
from trainer.search_space import Prices, Space

SHAPES = {"a.weight": (4, 8), "b.weight": (6, 8)}
NEEDS = {"gram", "gradient_gram", "removal_costs"}
options = st.tuples(st.integers(0, 12), st.integers(0, 6))
layers = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def totals(choice, layers):
    return tuple(
        sum(layer[option][part] for option, layer in zip(choice, layers, strict=True))
        for part in (0, 1)
    )


# ---- the exact choice ----


@settings(max_examples=examples(150))
@given(layers, st.integers(0, 30), st.integers(1, 50), st.booleans())
def test_no_choice_within_the_budget_loses_less(layers, spare, factor, spend_most):
    budget = factor * (sum(min(cost for cost, _ in layer) for layer in layers) + spare)
    costs = [[factor * cost for cost, _ in layer] for layer in layers]
    chosen = cheapest(
        costs, [[loss for _, loss in layer] for layer in layers], budget, spend_most=spend_most
    )
    every = [totals(choice, layers) for choice in product(*(range(len(layer)) for layer in layers))]
    allowed = [total for total in every if factor * total[0] <= budget]
    best = min(allowed, key=lambda total: (-total[0] if spend_most else 0, total[1]))
    found = totals(chosen, layers)
    assert factor * found[0] <= budget
    assert found[1] == best[1]
    assert not spend_most or found[0] == best[0]


def test_of_equal_choices_the_earlier_option_of_the_earlier_layer_is_taken():
    assert cheapest([[1, 0], [1, 0]], [[0, 1], [0, 1]], 1) == [0, 1]
    assert cheapest([[0, 0], [0, 0]], [[1, 1], [1, 1]], 0) == [0, 0]


@settings(max_examples=examples(30))
@given(
    st.lists(st.lists(st.integers(0, 10**12), min_size=2, max_size=4), min_size=2, max_size=4),
    st.floats(0, 1),
)
def test_a_budget_of_more_totals_than_are_told_apart_is_never_passed_and_nearly_used(costs, share):
    least, most = (sum(map(pick, costs)) for pick in (min, max))
    budget = least + int(share * (most - least))
    # The more it costs the better
    losses = [[-cost for cost in options] for options in costs]
    spent = [
        options[option]
        for options, option in zip(costs, cheapest(costs, losses, budget), strict=True)
    ]
    # What rounding up can take
    tighter = budget - (len(costs) + 1) * (-(-(budget - least) // STATES))
    best = max((sum(choice) for choice in product(*costs) if sum(choice) <= tighter), default=least)
    assert best <= sum(spent) <= budget


def test_a_budget_below_the_least_is_refused_and_one_for_all_leaves_all_options():
    with pytest.raises(ValueError, match="expected at least 7"):
        cheapest([[3, 5], [4, 9]], [[1, 0], [1, 0]], 6)
    assert cheapest([[3, 10**9 + 7], [4, 10**9 + 9]], [[1, 0], [1, 0]], 2 * 10**9 + 16) == [1, 1]


@settings(max_examples=examples(100))
@given(layers, st.integers(0, 30))
def test_without_the_options_that_another_beats_the_best_choice_loses_as_little(layers, spare):
    costs = [[cost for cost, _ in layer] for layer in layers]
    losses = [[loss for _, loss in layer] for layer in layers]
    kept = [undominated(*pair) for pair in zip(costs, losses, strict=True)]
    budget = sum(map(min, costs)) + spare

    def least(costs, losses):
        chosen = cheapest(costs, losses, budget)
        return sum(own[option] for own, option in zip(losses, chosen, strict=True))

    fewer = [
        [[own[option] for option in places] for own, places in zip(table, kept, strict=True)]
        for table in (costs, losses)
    ]
    assert all(kept) and least(*fewer) == least(costs, losses)


# ---- what a layer loses ----


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 12),
        torch.nn.GELU(),
        torch.nn.Linear(12, 4),
        torch.nn.GELU(),
        torch.nn.Linear(4, 4),
    )


def test_gradients_at_the_outputs_are_those_of_single_images(model):
    images, targets = torch.randn(7, 3, 8), torch.randint(0, 4, (7,))

    def loss(outputs, targets):
        return F.cross_entropy(outputs.mean(1), targets)

    batches = [(images[:4], targets[:4]), (images[4:], targets[4:])]
    statistics = collect_statistics(model, batches, loss, {"gradient_gram"})
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for image, target in zip(images, targets, strict=True):
        outputs = model[0](image).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model[1:](outputs)[None], target[None]), outputs)
        expected += (gradient.double().T @ gradient.double()) / 3
    torch.testing.assert_close(
        statistics.value("0.weight", "gradient_gram"), expected, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_is_its_formula_and_zero_where_nothing_is_pruned(measure, model):
    statistics = statistics_of(model, NEEDS)
    images = torch.randn(20, 8)
    divergence = Divergence(model, images.split(8), torch.autocast("cpu", enabled=False))
    weight, layer = model[2].weight.detach().clone(), Layer("2.weight", statistics=statistics)
    levels = [weight.numel() // 2, (1, 4), (4, 4)]
    half, quarter, whole = at_levels(weight, layer, levels, divergence=divergence)
    gram, at_outputs = layer.gram, layer.gradient_gram
    for pruned, level in ((half, levels[0]), (quarter, levels[1])):
        new, mask = obs_prune(weight, gram, level, block_size=8)
        assert torch.equal(pruned.new, new) and torch.equal(pruned.mask, mask)
        change = (new - weight).double()
        with torch.no_grad():
            dense = model(images).double().softmax(1)
            model[2].weight.copy_(new)
            other = model(images).double().softmax(1)
            model[2].weight.copy_(weight)
        expected = {
            "kfac": (at_outputs @ change @ gram @ change.T).trace() / 2 / 20**2,
            "output": (change @ gram @ change.T).trace() / 20,
            "divergence": (dense * (dense / other).log()).sum(1).mean(),
            "cap": layer.removal_costs[~mask].sum(),
        }
        assert MEASURES[measure](pruned) == pytest.approx(float(expected[measure]), rel=1e-5)
        assert torch.equal(model[2].weight, weight)
    assert MEASURES[measure](whole) == 0


def test_the_gram_matrix_of_a_layer_is_factored_once_for_all_its_levels(model, monkeypatch):
    factored = []

    def note(gram, damping):
        factored.append(1)
        return damped_gram(gram, damping)

    monkeypatch.setattr(levels, "damped_gram", note)
    layer = Layer("2.weight", statistics=statistics_of(model, NEEDS))
    weight = model[2].weight.detach()
    assert len(list(at_levels(weight, layer, [(4, 4)], mask_of=lambda kept: weight > 0))) == 1
    assert not factored
    found = list(at_levels(weight, layer, [10, (4, 4), (2, 4), 20]))
    assert len(factored) == 1 and not (found[0].new == found[3].new).all()


# ---- the pruner ----


@pytest.mark.parametrize("reconstructed", [False, True])
def test_search_takes_of_all_choices_the_one_that_loses_least(reconstructed):
    torch.manual_seed(0)
    model = linears(torch.randn(4, 8), 3 * torch.randn(8, 4), torch.randn(4, 8))
    statistics = statistics_of(model, {"gram", "gradient_gram"})
    masks = compute_masks(
        model, "search", 0.4, pattern="x:4", statistics=statistics, reconstructed=reconstructed
    )
    found = [int(mask[0, :4].sum()) for mask in masks.values()]

    def loss(name, weight, n):
        layer = Layer(name, statistics=statistics)
        new = weight * n_of_m(weight.abs(), n, 4)
        if reconstructed:
            new, _ = obs_prune(weight, layer.gram, (n, 4))
        change = (new - weight).double()
        return (
            float((layer.gradient_gram @ change @ layer.gram @ change.T).trace())
            / 2
            / layer.images**2
        )

    losses = [
        [loss(name, weight.detach(), n) for n in range(1, 5)]
        for name, weight in prunable_weights(model).items()
    ]
    allowed = [
        choice for choice in product(range(1, 5), repeat=3) if 8 * sum(choice) <= round(96 * 0.6)
    ]
    assert found == list(
        min(
            allowed,
            key=lambda choice: sum(loss[n - 1] for loss, n in zip(losses, choice, strict=True)),
        )
    )


@pytest.mark.parametrize("pattern", ["unstructured", "row", "block:2x2"])
def test_search_fills_the_budget_with_every_pattern(pattern):
    torch.manual_seed(0)
    model = linears(torch.randn(16, 8), torch.randn(8, 16), 2 * torch.randn(16, 16))
    statistics = statistics_of(model, {"gram", "gradient_gram"})
    masks = compute_masks(model, "search", 0.55, pattern=pattern, statistics=statistics)
    # A budget of blocks
    budget = {"unstructured": 230, "row": 230, "block:2x2": 4 * round(128 * 0.45)}[pattern]
    left = budget - sum(int(mask.sum()) for mask in masks.values())
    assert 0 <= left < (8 if pattern == "row" else 1)


def test_search_refuses_a_budget_of_less_than_a_weight_a_layer():
    model = linears(torch.randn(2, 2), torch.randn(2, 2))
    with pytest.raises(PruningError, match=r"pruner search .*at most 0\.75"):
        compute_masks(
            model, "search", 0.9, statistics=statistics_of(model, {"gram", "gradient_gram"})
        )


# ---- exchanges ----


def test_exchanges_keep_what_is_measured_to_be_better_within_the_budget_and_the_tries():
    costs, losses = [[1, 2, 3]] * 3, [[2.0, 1.0, 0.0]] * 3
    seen = []

    def measure(choice):
        seen.append(choice)
        return abs(choice[0] - 2) + abs(choice[1] - 1) + abs(choice[2] - 0)

    assert exchanges([1, 1, 1], costs, losses, 6, measure, 20) == (2, 1, 0)
    assert len(seen) == len(set(seen)) <= 21
    assert all(sum(costs[0][option] for option in choice) <= 6 for choice in seen)
    seen.clear()
    exchanges([1, 1, 1], costs, losses, 6, measure, 2)
    assert len(seen) == 3


# ---- choices in the YAML ----


@pytest.mark.parametrize(
    "choices",
    [
        [[[1, 4], "2:4", "dense"], [0.5, [4, 4]]],
        {"default": ["1:4", [2, 4], [4, 4]], "b*": [0.5, "dense"]},
    ],
)
def test_choices_are_lists_of_levels_by_list_and_by_name(choices):
    config = {"sparsity": {"mode": "nxm", "choices": choices, "greedy": {"eps_min": 0.0}}}
    assert resolve_choices(config, SHAPES) == {
        "a.weight": {"1:4": (1, 4), "2:4": (2, 4), "dense": (4, 4)}
        if isinstance(choices, dict)
        else {"1:4": (1, 4), "2:4": (2, 4), "dense": 32},
        "b.weight": {"0.5": 24, "dense": 48 if isinstance(choices, dict) else (4, 4)},
    }


@pytest.mark.parametrize("choices", [[[[1, 4]], ["dense"]], {"default": [[1, 4]], "b": ["dense"]}])
def test_one_choice_each_is_a_custom_configuration(choices):
    assert resolve_levels({"sparsity": {"mode": "nxm", "choices": choices}}, SHAPES) == {
        "a.weight": (1, 4),
        "b.weight": 48,
    }


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([[], ["dense"]], r"choices\[0\] is \[\]: expected a list of at least one level"),
        ({"default": "2:4"}, "choices 'default' is '2:4': expected a list"),
        ({"default": [[2, 4], 1.5]}, r"choices 'default'\[1\] is 1.5: expected \[n, m\]"),
        (
            {"default": ["2:3"]},
            r"2:3: expected a group size that divides the 8 inputs of a\.weight",
        ),
        ([[0.5]], "choices has 1 entries: expected 2"),
    ],
)
def test_wrong_choices_are_one_line_that_names_them(choices, message):
    with pytest.raises(PruningError, match=message):
        resolve_choices({"sparsity": {"mode": "nxm", "choices": choices}}, SHAPES)


def test_a_space_is_no_configuration_and_main_says_what_it_is_for(run_main, tiny, tmp_path):
    (tmp_path / "s.yaml").write_text(
        "sparsity: {mode: nxm, choices: {default: [[1, 4], [2, 4]]}}\n"
    )
    error = run_main(*tiny, "--pruner", "custom", "--custom-config", "s.yaml", status=2)
    assert error.startswith("error: s.yaml: is a space for search.py") and error.count("\n") == 1


# ---- the command ----


@pytest.fixture
def run_search(tmp_path, monkeypatch, capfd, tiny):
    monkeypatch.chdir(tmp_path)
    # Nothing is trained
    tiny = tiny[: tiny.index("--epochs")] + tiny[tiny.index("--epochs") + 2 :]

    def run(*argv, status=0):
        capfd.readouterr()
        command = [*map(str, argv), *tiny, "--calibration-images", "32"]
        assert exit_status(lambda: search.search(command)) == status
        captured = capfd.readouterr()
        return captured.err if status else captured.out

    return run


@pytest.mark.slow
def test_a_search_leaves_a_yaml_that_main_takes_and_goes_on_where_it_was_killed(
    run_search, run_main, tmp_path, monkeypatch
):
    budget = [
        "--budget",
        "0.5",
        "--budget-of",
        "macs",
        "--exchanges",
        "2",
        "--levels",
        "1:4",
        "dense",
    ]
    printed = run_search(*budget)
    out = tmp_path / "output/search"
    assert {path.name for path in out.iterdir()} >= {
        "search.yaml",
        "search.csv",
        "search.png",
        "search.md",
    }
    assert not (out / "statistics.pth").exists()
    levels = yaml.safe_load((out / "search.yaml").read_text())["sparsity"]["level"]
    assert list(levels) == list(prunable_weights(build_model("deit_sample_patch4_28", 10, 28)))
    assert set(map(str, levels.values())) <= {"[1, 4]", "dense"}
    command = printed.splitlines()[-1].removeprefix("To use it: python main.py ").split()
    run_main(*command, "--eval", "--output_dir", "used")
    pruned = (tmp_path / "used/sparsity.csv").read_text().splitlines()
    macs = [
        line.rsplit(",", 2)[1:]
        for line in pruned
        if line.startswith(("attention products", "prunable weights"))
    ]
    assert sum(int(after) for _, after in macs) <= 0.5 * sum(int(before) for before, _ in macs)

    measured = [line for line in (out / "measured.jsonl").read_text().splitlines() if line]
    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", stopping_after(Record.add, 30))
        with pytest.raises(KeyboardInterrupt):
            run_search(*budget, "--output_dir", other)
    with (other / "measured.jsonl").open("a") as file:
        file.write('{"loss": ["blocks')
    run_search(*budget, "--output_dir", other)
    again = [
        json.loads(line)
        for line in (other / "measured.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    assert again == [json.loads(line) for line in measured]
    assert (other / "search.csv").read_bytes() == (out / "search.csv").read_bytes()
    for change, told in (
        (["--budget", "0.6"], "--budget 0.5, not 0.6"),
        (["--seed", "1"], "--seed 0, not 1"),
        (["--levels", "1:2", "dense"], "other levels"),
    ):
        assert told in run_search(*budget, *change, status=2)


def stopping_after(add, number):
    def stop(record, **measured):
        if sum(map(len, record.losses.values())) == number:
            raise KeyboardInterrupt
        add(record, **measured)

    return stop


def test_levels_of_every_kind_are_chosen_for_the_weights_that_a_space_gives_them_to(
    run_search, tmp_path
):
    (tmp_path / "s.yaml").write_text(
        "sparsity:\n  mode: nxm\n  choices:\n    default: [dense]\n"
        "    '*.fc1': ['1:4', dense]\n    blocks.1.*: [0.5, 0.75]\n"
    )
    run_search("--space", "s.yaml", "--budget", "0.8", "--exchanges", "0", "--measure", "output")
    levels = yaml.safe_load((tmp_path / "output/search/search.yaml").read_text())["sparsity"][
        "level"
    ]
    for name, level in levels.items():
        expected = (
            [0.5, 0.75]
            if name.startswith("blocks.1.")
            else [[1, 4], "dense"]
            if "fc1" in name
            else ["dense"]
        )
        assert level in expected, name


def test_where_nothing_makes_up_levels_are_measured_by_magnitude_alone(
    run_search, run_main, tmp_path
):
    budget = [
        "--budget",
        "0.5",
        "--levels",
        "1:4",
        "0.5",
        "dense",
        "--exchanges",
        "0",
        "--measure",
        "output",
    ]
    printed = run_search(*budget, "--reconstruct", "none", "--output_dir", "none")
    run_search(*budget, "--output_dir", "obs")
    tables = [
        csv.DictReader(Path(folder, "search.csv").read_text().splitlines())
        for folder in ("none", "obs")
    ]
    for alone, made_up in zip(*tables, strict=True):
        for level in ("1:4", "0.5"):
            assert float(alone[f"loss at {level}"]) > float(made_up[f"loss at {level}"])
    command = printed.splitlines()[-1].removeprefix("To use it: python main.py ").split()
    assert command[-2:] == ["--reconstruct", "none"]
    run_main(*command, "--eval", "--output_dir", "used")
    other = run_search(*budget, "--reconstruct", "none", "--output_dir", "obs", status=2)
    assert "--reconstruct obs, not none" in other


IN_TIME = ["--budget", "0.5", "--budget-of", "latency", "--space"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--budget", "0.1"], "the levels reach 0.2500 to 1.0000; expected at least 0.25"),
        (["--budget", "0"], "--budget 0.0: expected the share"),
        (["--budget", "half"], "--budget"),
        (["--budget", "0.5", "--levels"], "--levels"),
        (
            ["--budget", "0.5", "--levels", "1:7"],
            "divides the 96 inputs of blocks.0.attn.qkv.weight",
        ),
        (["--budget", "0.5", "--levels", "2:4", "1.5"], "1.5"),
        (["--budget", "0.5", "--levels", "2:4", "--space", "s.yaml"], "--space"),
        (["--budget", "0.5", "--space", "missing.yaml"], "missing.yaml"),
        (["--budget", "0.5", "--pruner", "lamp"], "--pruner: not with a search"),
        (["--budget", "0.5", "--exchanges", "-1"], "--exchanges"),
        (["--budget", "0.5", "--layers", "blocks.9.*"], "layers 'blocks.9.*' matches no layer"),
        (["--budget", "0.5", "--layers", "*", "patch_embed.proj"], "without convolutions"),
        (["--budget", "0.5", "--space", "heads"], "--space heads: needs --budget-of latency"),
        ([*IN_TIME, "headz", "neurons"], "--space headz: expected heads, neurons"),
        ([*IN_TIME, "row"], "--space row: expected heads, neurons"),
        ([*IN_TIME, "block:5x1"], "--space block:5x1: expected blocks that divide blocks.0"),
        ([*IN_TIME, "block:4x1", "--levels", "1.5"], "1.5"),
        (
            ["--budget", "0.5", "--method-options", "owl.lambda=0.1"],
            "owl.lambda: expected an option",
        ),
    ],
)
def test_a_mistake_is_one_line_before_any_work(run_search, tmp_path, argv, told):
    line = run_search(*argv, status=2)
    assert line.startswith("error: ") and line.count("\n") == 1 and told in line
    assert not (tmp_path / "output").exists()


def made_up_times(seconds):
    """As if a second were the time of each part, and this that of a choice, by part and text."""

    def table(model, images, parts, choices, log):
        return TimeTable(
            len(parts) + 2.0,
            {part.name: 1.0 for part in parts},
            {
                name: {text: 1.0 if text == "dense" else seconds(name, text) for text in own}
                for name, own in choices.items()
            },
        )

    return table


LATENCY = ["--budget-of", "latency", "--exchanges", "0", "--measure", "output"]


def test_a_budget_of_time_is_met_by_the_blocks_that_are_quicker_and_lose_least(
    run_search, run_main, tmp_path, monkeypatch
):
    def seconds(part, text):
        return {"1 heads": 0.5, "96 neurons": 0.4, "block:4x1 0.5": 0.6}.get(text, 1.5)

    monkeypatch.setattr(search, "time_table", made_up_times(seconds))
    monkeypatch.setattr(search, "time_of_whole", lambda *models: (2.0, 1.25))
    space = ["--space", "heads", "neurons", "block:4x1", "--levels", "0.5"]
    printed = run_search("--budget", "0.7", *LATENCY, *space)

    out = tmp_path / "output/search"
    assert "1000 ms as measured" not in printed
    assert "dense 2000.0 ms" in printed and "1250.0 ms as measured" in printed
    rows = list(csv.DictReader((out / "times.csv").read_text().splitlines()))
    parts = {row["part"] for row in rows} - {"rest"}
    table = {part: [row for row in rows if row["part"] == part] for part in parts}
    costs = [[round(10 * float(row["seconds"])) for row in own] for own in table.values()]
    losses = [[float(row["loss"]) for row in own] for own in table.values()]

    # By brute force, over the parts alike: 14 seconds, of which 9.8 may be spent, 2 by the rest
    chosen = [[int(row["chosen"]) for row in own].index(1) for own in table.values()]
    least = cheapest(costs, losses, 78)
    assert sum(own[k] for own, k in zip(losses, chosen, strict=True)) == pytest.approx(
        sum(own[k] for own, k in zip(losses, least, strict=True))
    )
    assert sum(own[k] for own, k in zip(costs, chosen, strict=True)) <= 78

    section = yaml.safe_load((out / "search.yaml").read_text())["sparsity"]
    assert section.get("units") or "block:4x1 0.5" in section["level"].values()
    command = printed.splitlines()[-1].removeprefix("To use it: python main.py ").split()
    assert command[command.index("--score") + 1] == "fisher"
    run_main(*command, "--eval", "--output_dir", "used")


def test_a_budget_of_time_that_nothing_meets_is_refused_and_leaves_no_folder(
    run_search, monkeypatch, tmp_path
):
    for seconds, budget, told in (
        (1.5, 0.7, "error: --budget-of latency: no choice of the space is measured to be quicker"),
        (0.6, 0.2, "the levels reach 0.6571 to 1.0000; expected at least 0.6571"),
    ):
        monkeypatch.setattr(
            search, "time_table", made_up_times(lambda part, text, seconds=seconds: seconds)
        )
        error = run_search("--budget", budget, *LATENCY, "--levels", "0.9", "dense", status=2)
        assert told in error and error.count("\n") == 1
        assert not (tmp_path / "output").exists()


def test_choices_of_every_weight_and_of_one_pattern_alone_are_tried_and_the_nearest_is_kept():
    heads, levels = Choice({}, 1), Choice({"w": "0.5"})
    texts = {"dense": Choice({"w": "dense"}), "1 heads": heads, "0.5": levels}
    parts = ["a", "b"]
    space = Space({}, {}, [], {part: texts for part in parts})
    bench = Bench.__new__(Bench)
    bench.space = space
    bench.losses = {
        "a": {"dense": 0.0, "1 heads": 1.0, "0.5": 2.5},
        "b": {"dense": 0.0, "1 heads": 1.5, "0.5": 2.0},
    }
    bench.unit_losses = {"a": {"1 heads": 9.0}, "b": {"1 heads": 9.0}}
    prices = Prices({part: {"dense": 2.0, "1 heads": 1.0, "0.5": 1.0} for part in parts}, 4.0, 0.5)
    tried = []

    def trial(chosen):
        tried.append(tuple(chosen.values()))
        return {("0.5", "0.5"): 0.1}.get(tried[-1], 0.2)

    bench.trial = trial
    options = argparse.Namespace(exchanges=20)
    assert search.solve_in_time(options, bench, prices) == {"a": "0.5", "b": "0.5"}
    assert {*tried} == {("1 heads", "1 heads"), ("0.5", "0.5")}
    options.exchanges = 0
    assert search.solve_in_time(options, bench, prices) == {"a": "1 heads", "b": "1 heads"}


@pytest.mark.slow
def test_a_search_for_half_of_the_time_measures_what_main_then_prunes(tiny_fashion, tmp_path):
    arguments = ["--data-set", "FASHION", "--data-path", str(tiny_fashion), "--amp", "off"]
    arguments += ["--model", "deit_sample_patch4_28", "--input-size", "28", "--batch-size", "8"]
    arguments += ["--model-kwargs", "depth=2", "--no-pretrained", "--num_workers", "0"]
    arguments += ["--calibration-images", "32"]

    def run(program, *options):
        command = [sys.executable, str(ROOT / program), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    space = ["--space", "heads", "neurons", "unstructured", "--levels", "0.95"]
    budget = ["--budget", "0.8", "--budget-of", "latency", "--exchanges", "2"]
    printed = run("search.py", *budget, *space, *arguments)
    assert re.search(r"dense [0-9.]+ ms, pruned [0-9.]+ ms as predicted and [0-9.]+ ms", printed)
    command = printed.splitlines()[-1].removeprefix("To use it: python main.py ").split()
    again = run("main.py", *command, "--eval", "--sparse-kernels", "--output_dir", "used")
    assert "pruned" in again
