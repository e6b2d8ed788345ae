"""Zeros of any file: which weights are layers, and which patterns they obey."""

import pytest
import torch
from test_units import MODELS, model_of

from sparsity_factory import (
    Masks,
    compute_masks,
    nonzero_weights,
    patterns_found,
    removable_units,
    shrink,
    unmet,
)

PATTERNS = {
    "2:4": None,
    "1:4": None,
    "2:4t": None,
    "3:6": None,
    "row": 0.5,
    "block:4x4": 0.5,
    "block:8x8": 0.5,
    "block:1x8": 0.5,
    "block:8x1": 0.5,
    "heads": 0.1,
    "neurons": 0.3,
    "heads+neurons": 0.4,
}


def pruned(pattern, kind="vit"):
    model = model_of(kind)
    masks = compute_masks(model, "unif", PATTERNS[pattern], pattern=pattern)
    Masks(model, masks)
    return model, masks


@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_obey_the_pattern_that_made_them(pattern):
    layers = nonzero_weights(pruned(pattern)[0].state_dict())
    found = patterns_found(layers)
    for name, mask in layers.items():
        if not mask.all():
            assert pattern in found[name] or set(found[name]) <= {"heads", "neurons"}
    assert not unmet(pattern, layers)
    for other in {*PATTERNS} - {pattern}:
        implied = {"1:4": ["2:4", "row", "3:6"], "2:4t": ["2:4", "row"], "2:4": ["row"]}
        implied |= {"block:8x8": ["block:4x4", "block:1x8", "block:8x1"], "3:6": ["row"]}
        implied |= {"heads": ["heads+neurons"], "neurons": ["heads+neurons"]}
        assert bool(unmet(other, layers)) == (other not in implied.get(pattern, []))


def test_unstructured_zeros_obey_nothing():
    model = model_of()
    Masks(model, compute_masks(model, "unif", 0.3))
    assert not any(patterns_found(nonzero_weights(model.state_dict())).values())


def test_a_kept_weight_that_is_zero_by_chance_leaves_n_of_m():
    model, _ = pruned("2:4")
    weight = model.blocks[0].mlp.fc1.weight
    weight.data[0, weight[0].nonzero()[0]] = 0
    layers = nonzero_weights(model.state_dict())
    assert patterns_found(layers)["blocks.0.mlp.fc1.weight"] == ["2:4"]
    assert not unmet("2:4", layers)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pattern", ["heads", "neurons", "heads+neurons"])
def test_what_shrink_would_save_is_what_it_saves(pattern, kind):
    if kind == "cait" and pattern != "neurons":
        pytest.skip("layers that mix heads are smaller too, by a few weights")
    model, masks = pruned(pattern, kind)
    weights = model.state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    saved, blocks = removable_units(nonzero_weights(weights), shapes)
    small = shrink(model, masks)
    before, after = (
        sum(parameter.numel() for name, parameter in each.named_parameters() if "table" not in name)
        for each in (model, small)
    )
    assert saved == before - after > 0
    assert {block.kind for block in blocks} == {*pattern.split("+")}


def test_classifiers_embeddings_and_convolutions_are_layers_only_if_they_have_zeros():
    weights = {
        "head.weight": torch.ones(2, 4),
        "heads.head.weight": torch.ones(2, 4),
        "patch_embed.proj.weight": torch.ones(4, 3, 2, 2),
        "embeddings.word_embeddings.weight": torch.ones(4, 4),
        "norm.weight": torch.zeros(4),
        "blocks.0.attn.in_proj_weight": torch.ones(12, 4),
        "blocks.0.mlp.fc1.weight": torch.ones(8, 4, dtype=torch.int8),
    }
    assert [*nonzero_weights(weights)] == [*weights][-2:]
    for weight in weights.values():
        weight[0] = 0
    layers = nonzero_weights(weights)
    assert [*layers] == [name for name in weights if name != "norm.weight"]
    assert "a group of 4 keeps more than 2" in unmet("2:4", layers)
    assert "is no matrix" in unmet("2:4", {"conv.weight": torch.zeros(2, 4, 4) > 0})


def test_a_sparsity_is_met_within_half_a_percentage_point():
    layers = {"a.weight": torch.arange(1000).view(10, 100) >= 804}
    assert not unmet(0.8, layers)
    assert "the sparsity is 0.8040" in unmet(0.7, layers)
    assert "no layer has zeros" in unmet("2:4", {"a.weight": torch.ones(4, 4, dtype=torch.bool)})
