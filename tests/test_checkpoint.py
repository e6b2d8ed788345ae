"""Masks are checked against the pattern and the budget of their recipe, whatever those are."""

import pytest
import torch
from made_up import linears, statistics_of
from test_units import MODELS, model_of

from sparsity_factory import PRUNERS, PruningError, Recipe, check_masks, compute_masks, needs_of

PATTERNS = ["unstructured", "row", "x:4", "block:4x4", "heads", "neurons", "heads+neurons"]
AUTOMATIC = [name for name in PRUNERS if name != "custom"]


@pytest.mark.parametrize("sparsity", [0.1, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_masks_of_every_pruner_and_pattern_are_what_their_recipe_asks_for(
    pruner, pattern, sparsity
):
    model = model_of()
    statistics = statistics_of(model, needs_of(pruner))
    try:
        masks = compute_masks(model, pruner, sparsity, pattern=pattern, statistics=statistics)
    except PruningError as error:
        assert "at most" in str(error) or "less than" in str(error)  # out of reach
    else:
        check_masks({}, masks, Recipe(pruner, sparsity, pattern=pattern))


@pytest.mark.parametrize("kind", MODELS)
def test_masks_of_every_known_block_are_whole_units(kind):
    for pattern in ("heads", "neurons", "heads+neurons"):
        masks = compute_masks(model_of(kind), "glob", 0.15, pattern=pattern)
        check_masks({}, masks, Recipe("glob", 0.15, pattern=pattern))


@pytest.mark.parametrize("pattern", [*PATTERNS[1:], "2:4", "2:4t"])
def test_random_masks_are_not_of_a_pattern(pattern):
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(mask.shape, generator=generator) >= 0.5
        for name, mask in compute_masks(model_of(), "unif", 0.5).items()
    }
    sparsity = None if pattern.startswith("2:4") else 0.5
    with pytest.raises(PruningError, match=r"blocks\.0\."):
        check_masks({}, masks, Recipe("unif", sparsity, pattern=pattern))


@pytest.mark.parametrize("pattern", ["unstructured", "row", "x:4", "block:4x4"])
def test_masks_of_another_sparsity_miss_the_budget(pattern, caplog):
    recipe = Recipe("unif", 0.5, pattern=pattern)
    for other in (0.25, 0.75):
        masks = compute_masks(model_of(), "unif", other, pattern=pattern)
        with pytest.raises(PruningError, match=f"a sparsity of {other:.2f}.*expected 0.5"):
            check_masks({}, masks, recipe)

    # Older versions made such masks: their files still load, with a warning
    check_masks({}, masks, recipe, strict=False)
    assert "expected 0.5" in caplog.text


def test_heads_that_keep_more_than_the_budget_miss_it():
    masks = compute_masks(model_of(), "glob", 0.1, pattern="heads")
    with pytest.raises(PruningError, match=r"a sparsity of 0\.1.*expected 0\.25"):
        check_masks({}, masks, Recipe("glob", 0.25, pattern="heads"))


@pytest.mark.parametrize("pattern", ["heads", "neurons"])
def test_a_unit_that_is_pruned_on_one_side_only_is_not_whole(pattern):
    masks = compute_masks(model_of(), "glob", 0.15, pattern=pattern)
    last = "blocks.0.attn.proj.weight" if pattern == "heads" else "blocks.0.mlp.fc2.weight"
    masks[last] = masks[last].roll(1, dims=1)
    with pytest.raises(PruningError, match=f"blocks.0.*{pattern}"):
        check_masks({}, masks, Recipe("glob", 0.15, pattern=pattern))


def test_a_layer_that_no_group_fits_is_dense():
    masks = compute_masks(linears(torch.rand(4, 8)), "unif", pattern="2:4")
    masks["1.weight"] = torch.ones(3, 6, dtype=torch.bool)
    check_masks({}, masks, Recipe("unif", pattern="2:4"))
    masks["1.weight"][0, 0] = False
    with pytest.raises(PruningError, match=r"1\.weight: its 6 inputs are not groups of 4"):
        check_masks({}, masks, Recipe("unif", pattern="2:4"))
