"""Schedules that prune step by step: what is pruned stays pruned, and the target is met."""

import pytest
import torch
from torch import nn

from sparsity_factory import (
    PRUNERS,
    Recipe,
    Sparsifier,
    collect_statistics,
    compute_masks,
    needs_of,
    parse_pattern,
    prunable_weights,
)

STEPS = 12
SPARSITY = 0.5
PATTERNS = ["unstructured", "row", "x:4", "block:2x2"]
SCHEDULES = {"gradual": {"prune_every": 2}, "iterative": {"prune_rounds": 4}}


def model_and_batches():
    """Layers of different sizes, scales and spectra; images with outlying features."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)
    )
    for layer, scale in zip(model[::2], (1.0, 3.0, 0.2), strict=True):
        layer.weight.data *= scale * torch.rand(layer.weight.shape) ** 4
    images = torch.randn(8, 5, 16) * torch.tensor([20.0, *[1.0] * 15])
    return model, [(images, torch.randint(8, (8,)))]


def changes_of(recipe: Recipe):
    """The masks after each step of a training in which weights move at random."""
    model, batches = model_and_batches()

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs.mean(1), targets)

    sparsifier = Sparsifier(
        model,
        recipe,
        total_steps=STEPS,
        epoch_steps=STEPS,
        statistics=lambda needs: collect_statistics(model, batches, loss, needs),
    )
    sparsifier.start()
    for _ in range(STEPS):
        sparsifier.begin_step()
        sparsifier.end_backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * torch.randn_like(weight)
        sparsifier.end_step()
        yield model, sparsifier


def request_of(pruner: str, pattern: str, schedule: str) -> Recipe:
    custom = {"sparsity": {"mode": "unstructured", "level": {"default": 0.7, "0.*": 0.4}}}
    return Recipe(
        pruner,
        None if pruner == "custom" else SPARSITY,
        custom if pruner == "custom" else None,
        "wanda" if needs_of(pruner) else "magnitude",
        pattern,
        prune_schedule=schedule,
        prune_end=0.9,
        **SCHEDULES[schedule],
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruned_weights_stay_pruned_and_the_target_is_met_to_the_weight(pruner, pattern, schedule):
    if pruner == "custom" and pattern != "unstructured":
        pytest.skip("custom has patterns of its own")
    recipe = request_of(pruner, pattern, schedule)
    before = None
    for _, sparsifier in changes_of(recipe):
        now = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        if before:
            for name, mask in now.items():
                assert not (mask & ~before[name]).any(), name
        before = now

    assert sparsifier.final
    model, batches = model_and_batches()
    weights = prunable_weights(model)
    kept = sum(int(mask.sum()) for mask in before.values())
    if pruner in ("unif", "unifplus", "erk", "custom") and pattern == "unstructured":
        # Their numbers follow from the shapes alone
        once = compute_masks(model, pruner, recipe.sparsity, recipe.custom_config)
        assert {name: int(mask.sum()) for name, mask in before.items()} == {
            name: int(mask.sum()) for name, mask in once.items()
        }
    else:
        # Whole units of the pattern reach the budget but for less than the largest step
        units = parse_pattern(pattern)
        steps = [
            units.step(weight.shape) * weight.numel() // units.units(weight.shape)
            for weight in weights.values()
        ]
        budget = round((1 - SPARSITY) * sum(weight.numel() for weight in weights.values()))
        assert budget - max(steps) < kept <= budget


@pytest.mark.parametrize("pattern", ["2:4", "2:4t", "1:4"])
def test_groups_hold_their_number_and_no_pruned_weight_comes_back(pattern):
    recipe = Recipe("unif", pattern=pattern, prune_schedule="gradual", prune_every=2, prune_end=0.9)
    before = None
    for model, sparsifier in changes_of(recipe):
        # A kept weight of size zero is no reason to take a pruned one
        with torch.no_grad():
            weight = model[0].weight
            weight[:, ::3] = 0
        now = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        if before:
            for name, mask in now.items():
                assert not (mask & ~before[name]).any(), name
        before = now
    for mask in before.values():
        assert (mask.reshape(-1, 4).sum(1) == int(pattern[0])).all()
