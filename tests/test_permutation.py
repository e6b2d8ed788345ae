"""Channel permutation: models compute what they did, and n:m keeps more of them."""

import copy
from itertools import combinations

import pytest
import torch
from made_up import linears
from test_units import MODELS, images_for, model_of

from benchmarks.torture import differences
from sparsity_factory import (
    PruningError,
    Recipe,
    Sparsifier,
    collect_statistics,
    compute_masks,
    parse_pattern,
    prunable_weights,
    prune,
)
from sparsity_factory.patterns import n_of_m
from sparsity_factory.permutation import best_orders, better_order, reorder
from sparsity_factory.scores import Scores

CUSTOM = {
    "sparsity": {"mode": "nxm", "level": {"default": 0.5, "*.mlp.*": [1, 4], "*.proj": [1, 2]}}
}


def started(model, recipe, **options):
    sparsifier = Sparsifier(model, recipe, total_steps=10, epoch_steps=5, **options)
    sparsifier.start()
    return sparsifier


def kept(score, n, m):
    return float((score * n_of_m(score, n, m)).sum(dtype=torch.float64))


def kept_magnitude(model, masks):
    return sum(
        float((weight.detach().abs() * masks[name]).sum(dtype=torch.float64))
        for name, weight in prunable_weights(model).items()
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_computes_what_it_did_and_keeps_more(kind):
    model = model_of(kind)
    dense, images = copy.deepcopy(model), images_for(model)
    recipe = Recipe("unif", pattern="1:2", permute=True)  # of the six channels of a head
    masks = Sparsifier(model, recipe, total_steps=10, epoch_steps=5).first_masks()
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense(images), atol=1e-5, rtol=1e-4)
    old = dict(dense.named_parameters())
    changed = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, old[name])
    }
    assert {
        name for name in old if name.endswith((".fc1.bias", ".fc2.weight", "attn.proj.weight"))
    } <= changed
    assert all(".fc" in name or ".attn." in name for name in changed)
    assert kept_magnitude(model, masks) > kept_magnitude(
        dense, compute_masks(dense, "unif", pattern="1:2")
    )


def test_channels_stay_within_their_head():
    model = model_of("vit")
    scores = Scores(prunable_weights(model))
    orders = best_orders(
        model,
        scores,
        compute_masks(model, "unif", pattern="1:2"),
        lambda name: parse_pattern("1:2"),
    )
    order = orders["blocks.0.attn.proj.weight"].view(4, 6)
    assert not torch.equal(order.flatten(), torch.arange(24))
    assert torch.equal(order.sort(1).values, torch.arange(24).view(4, 6))


def test_blocks_that_are_not_known_stay_as_they_are():
    model = linears(torch.rand(8, 8), torch.rand(8, 8))
    dense = copy.deepcopy(model)
    masks = started(model, Recipe("unif", pattern="2:4", permute=True)).masks
    for name, mask in compute_masks(dense, "unif", pattern="2:4").items():
        assert torch.equal(masks[name], mask)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "2:8"])
def test_an_order_never_keeps_less(pattern):
    n, m = map(int, pattern.split(":"))
    for seed in range(5):
        score = torch.rand(6, 48, generator=torch.Generator().manual_seed(seed)).square()
        for sets in (1, 2):
            order = better_order(score, n, m, sets)
            assert torch.equal(order.view(sets, -1).sort(1).values, torch.arange(48).view(sets, -1))
            assert kept(score[:, order], n, m) > kept(score, n, m)
    assert torch.equal(better_order(torch.ones(6, 48), n, m).sort().values, torch.arange(48))


def test_an_order_of_two_pairs_is_the_best_of_all():
    """Any other pairs are one exchange away."""
    for seed in range(20):
        score = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
        best = max(
            kept(score[:, [*pair, *({0, 1, 2, 3} - {*pair})]], 1, 2)
            for pair in combinations(range(4), 2)
        )
        assert kept(score[:, better_order(score, 1, 2)], 1, 2) == pytest.approx(best)


def test_where_the_best_order_is_known_it_is_found():
    # Large columns first, then small ones
    score = torch.ones(5, 64) * torch.tensor([9.0, 1.0]).repeat_interleave(32)
    assert kept(score, 2, 4) == 5 * (16 * 9 + 16 * 1)
    assert kept(score[:, better_order(score, 2, 4)], 2, 4) == 5 * 32 * 9


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("unif", pattern="1:2t", permute=True),
        Recipe("lamp", 0.5, pattern="x:2", permute=True),
        Recipe("custom", custom_config=CUSTOM, permute=True),
        Recipe("unif", pattern="1:2", permute=True, score="random"),
        Recipe("unif", pattern="1:2", permute=True, prune_schedule="gradual"),
    ],
    ids=lambda recipe: recipe.in_words(),
)
def test_it_goes_with_every_pattern_that_has_groups(recipe):
    model = model_of("swin")
    dense, images = copy.deepcopy(model), images_for(model)
    masks = Sparsifier(model, recipe, total_steps=10, epoch_steps=5).first_masks()
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense(images), atol=1e-5, rtol=1e-4)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(model.parameters(), dense.parameters(), strict=True)
    )
    if recipe.score == "magnitude" and recipe.prune_schedule == "one-shot":
        request = recipe.request({}, {})
        assert kept_magnitude(model, masks) > kept_magnitude(dense, compute_masks(dense, **request))


def test_scores_look_at_the_data_anew_after_the_permutation():
    model = model_of("vit")
    batches = [images_for(model, 8)]
    sparsifier = Sparsifier(
        model,
        Recipe("unif", pattern="1:2", score="wanda", permute=True),
        total_steps=1,
        epoch_steps=1,
        statistics=lambda needs: collect_statistics(model, batches, None, needs),
    )
    masks = sparsifier.first_masks()
    expected = compute_masks(
        model,
        "unif",
        pattern="1:2",
        score="wanda",
        statistics=collect_statistics(model, batches, None, {"input_norms"}),
    )
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    again = model_of("vit")
    pruned = prune(
        again,
        "unif",
        pattern="1:2",
        score="wanda",
        permute=True,
        batches=batches,
        reconstruct="none",
    )
    assert all(torch.equal(pruned[name], expected[name]) for name in expected)
    for name, weight in prunable_weights(model).items():
        assert torch.equal(prunable_weights(again)[name], weight * expected[name])


def test_the_orders_of_the_first_process_are_those_of_all():
    """The second process has weights of its own, so that its own orders would be others."""
    recipe, answers = Recipe("unif", pattern="1:2", permute=True), []
    first = started(
        model_of("vit"), recipe, share=lambda compute: answers.append(compute()) or answers[-1]
    )
    orders, _ = answers
    assert orders and all(
        order.device.type == "cpu" and order.dtype == torch.int64 for order in orders.values()
    )
    waiting, model = iter(answers), model_of("vit", seed=1)
    second = started(model, recipe, share=lambda compute: next(waiting))
    expected = model_of("vit", seed=1)
    reorder(expected, orders)
    second.masks.apply_to(expected)
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), expected.parameters(), strict=True)
    )
    assert all(torch.equal(first.masks[name], mask) for name, mask in second.masks.items())


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("lamp", 0.5),
        Recipe("lamp", 0.5, pattern="row"),
        Recipe("lamp", 0.5, pattern="block:4x4"),
        Recipe("unif", 0.5, pattern="heads"),
        Recipe(
            "custom",
            custom_config={"sparsity": {"mode": "unstructured", "level": {"default": 0.5}}},
        ),
    ],
    ids=lambda recipe: recipe.pattern,
)
def test_other_patterns_are_refused(recipe):
    recipe.check()
    with pytest.raises(PruningError, match="^--permute: expected n:m, n:mt or x:m"):
        Recipe.from_dict({**recipe.to_dict(), "permute": True})


def test_a_checkpoint_without_the_field_is_of_a_run_without_it():
    old = Recipe("unif", pattern="2:4").to_dict()
    del old["permute"]
    assert Recipe.from_dict(old) == Recipe("unif", pattern="2:4")
    with pytest.raises(PruningError, match="--permute 1: expected true or false"):
        Recipe.from_dict({**old, "permute": 1})


@pytest.mark.slow
def test_a_run_that_permutes_goes_on_to_the_bit_and_permutes_no_more(
    run_main, tiny, tmp_path, stop_at, monkeypatch
):
    monkeypatch.setattr("sparsity_factory.permutation.ROUNDS", 10)
    flags = [
        *tiny,
        "--pattern",
        "2:4",
        "--permute",
        "--epochs",
        "2",
        "--resume",
        "auto",
        "--model-ema-decay",
        "0.9",
    ]
    run_main(*flags, "--output_dir", "whole")
    stop_at(4)
    run_main(*flags, "--output_dir", "parts", status=143)
    monkeypatch.setattr("sparsity_factory.sparsifier.reorder", None)
    run_main(*flags, "--output_dir", "parts")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    assert (
        torch.load(tmp_path / "parts/checkpoint.pth", weights_only=True)["pruning"]["recipe"][
            "permute"
        ]
        is True
    )
    printed = run_main(
        *tiny, "--resume", "parts/checkpoint.pth", "--eval", "--pattern", "2:4", status=2
    )
    assert "is of a run with --pruner unif --pattern 2:4 --permute" in printed
