"""Whole heads and neurons: which go, and that a model without them computes what the masked one
does.
"""

import copy
import re
from functools import partial
from math import prod

import pytest
import timm
import torch
import torchvision
from made_up import linears, statistics_of
from timm.layers import GluMlp, SwiGLU
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import main
from benchmarks.torture import content
from sparsity_factory import (
    PRUNERS,
    SCORES,
    Masks,
    PruningError,
    Recipe,
    Sparsifier,
    checkpoint_table,
    collect_statistics,
    compute_masks,
    multiply_adds,
    needs_of,
    parse_pattern,
    prunable_weights,
    shrink,
    sparsity_rows,
    unit_counts,
    with_units,
)
from sparsity_factory.errors import warn_once
from sparsity_factory.multiply_adds import OTHERS, multiply_adds_of_modules
from sparsity_factory.scores import Scores
from sparsity_factory.units import unit_groups

SIZE = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}
MODELS = {
    "vit": partial(VisionTransformer, **SIZE),
    "vit without qkv_bias": partial(VisionTransformer, **SIZE, qkv_bias=False),
    "vit with qk_norm": partial(VisionTransformer, **SIZE, qk_norm=True),
    "vit with layer scale": partial(VisionTransformer, **SIZE, init_values=0.5),
    "vit with SwiGLU": partial(VisionTransformer, **SIZE, mlp_layer=SwiGLU),
    "vit with packed GLU": partial(VisionTransformer, **SIZE, mlp_layer=GluMlp),
    "distilled deit": partial(VisionTransformerDistilled, **SIZE),
    "deit III": partial(
        timm.create_model,
        "deit3_small_patch16_224",
        **{**SIZE, "img_size": 32, "patch_size": 16},
        init_values=0.5,
    ),
    "cait": partial(Cait, **SIZE, init_values=0.5),
    "swin": partial(
        SwinTransformer,
        img_size=16,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=5,
    ),
}
PATTERNS = ["heads", "neurons", "heads+neurons"]
READERS = ("proj.weight", "fc2.weight")  # of what a unit has computed
AUTOMATIC = [name for name in PRUNERS if name != "custom"]


def model_of(kind="vit", seed=0, **changes):
    """With every parameter drawn anew, since biases begin at zero."""
    model, generator = MODELS[kind](**changes), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def images_for(model, count=2):
    size = model.patch_embed.img_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def masked(model, masks):
    model = copy.deepcopy(model)
    Masks(model, masks)
    return model


# ---- shrink ----


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_shrunk_model_computes_what_the_masked_one_does(kind, fused):
    model = model_of(kind)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    before, images = copy.deepcopy(model.state_dict()), images_for(model)
    for pattern in PATTERNS:
        masks = compute_masks(model, "glob", 0.15 if pattern == "heads" else 0.4, pattern=pattern)
        small = shrink(model, masks)
        torch.testing.assert_close(
            small(images), masked(model, masks)(images), rtol=1e-5, atol=1e-5
        )
        assert (
            sum(parameter.numel() for parameter in small.parameters())
            == sparsity_rows(model, masks).whole.kept
            < sum(parameter.numel() for parameter in model.parameters())
        )
        for layer in small.modules():
            if isinstance(layer, torch.nn.Linear):
                assert layer.weight.shape == (layer.out_features, layer.in_features)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_masks_are_those_of_prunable_weights_and_of_what_has_a_place_for_each_unit(kind):
    model = model_of(kind)
    masks = compute_masks(model, "unif", 0.5, pattern="heads+neurons")
    order = [name for name, _ in model.named_parameters()]
    assert list(masks) == sorted(masks, key=order.index)
    assert prunable_weights(model).keys() <= masks.keys()
    others = {
        re.sub(r"^.*?(?=attn|mlp)", "", name)
        for name in masks.keys() - prunable_weights(model).keys()
    }
    expected = {"attn.qkv.bias", "mlp.fc1.bias"}
    if kind == "vit without qkv_bias":
        expected -= {"attn.qkv.bias"}
    if kind == "vit with SwiGLU":
        expected = {"attn.qkv.bias", "mlp.fc1_g.bias", "mlp.fc1_x.bias"}
    if kind == "swin":
        expected |= {"attn.relative_position_bias_table"}
    if kind == "cait":
        expected |= {f"attn.{name}.bias" for name in ("q", "k", "v", "proj_l", "proj_w")}
    assert others == expected


def test_a_shrunk_model_trains_as_the_masked_one_does():
    model = model_of("vit with layer scale")
    masks = compute_masks(model, "lamp", 0.6, pattern="heads+neurons")
    images, small, large = images_for(model, 4), shrink(model, masks), copy.deepcopy(model)
    keeper = Masks(large, masks)
    for network in (small, large):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            if network is large:
                keeper.apply_to_grads()
            optimizer.step()
            if network is large:
                keeper.apply()
    torch.testing.assert_close(small(images), large(images), rtol=1e-4, atol=1e-5)


def test_only_units_of_which_nothing_is_left_go_and_other_zeros_stay():
    model = model_of()
    masks = {
        name: torch.ones_like(weight, dtype=torch.bool)
        for name, weight in prunable_weights(model).items()
    }
    hidden = slice(3, 5)
    # Of two neurons the rows, and of one the column too
    masks["blocks.0.mlp.fc1.weight"][hidden] = False
    masks["blocks.0.mlp.fc2.weight"][:, 4] = False
    masks["blocks.0.mlp.fc2.weight"][0, :10] = False
    masks["blocks.1.attn.qkv.weight"][:6] = False  # the queries of a head are not the head
    small = shrink(model, masks)
    assert unit_counts(small) == {**unit_counts(model), "blocks.0.mlp": 95}
    assert (small.blocks[0].mlp.fc2.weight[0, :9] == 0).all() and (
        small.blocks[0].mlp.fc1.weight[3] == 0
    ).all()
    torch.testing.assert_close(
        small(images_for(model)), masked(model, masks)(images_for(model)), rtol=1e-5, atol=1e-5
    )


def test_a_block_of_which_nothing_is_left_keeps_one_unit_of_zeros():
    model = model_of()
    masks = {
        name: torch.zeros_like(weight, dtype=torch.bool)
        for name, weight in prunable_weights(model).items()
    }
    small = shrink(model, masks)
    assert set(unit_counts(small).values()) == {1}
    torch.testing.assert_close(
        small(images_for(model)), masked(model, masks)(images_for(model)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["vit", "cait", "swin"])
def test_a_shrunk_model_is_pruned_and_shrunk_again_and_reports_what_is_left_of_the_dense_one(kind):
    model = model_of(kind)
    masks = compute_masks(model, "unif", 0.3, pattern="heads+neurons")
    once = shrink(model, masks)
    again = compute_masks(once, "unif", 0.3, pattern="heads+neurons")
    twice = shrink(once, again)
    images = images_for(model)
    torch.testing.assert_close(twice(images), masked(once, again)(images), rtol=1e-5, atol=1e-5)
    kept = sparsity_rows(twice, {})
    assert kept.prunable.total == sum(weight.numel() for weight in prunable_weights(model).values())
    assert kept.prunable.kept == sum(weight.numel() for weight in prunable_weights(twice).values())
    assert kept.whole.total == sum(parameter.numel() for parameter in model.parameters())
    dense, small = multiply_adds(model, images), multiply_adds(once, images)
    assert {name: small[name] for name in prunable_weights(model)} == {
        name: dense[name] for name in prunable_weights(model)
    }


@pytest.mark.parametrize("kind", ["vit", "cait", "swin"])
def test_the_numbers_of_units_are_enough_to_build_the_shape_again(kind):
    model = model_of(kind)
    small = shrink(model, compute_masks(model, "lamp", 0.5, pattern="heads+neurons"))
    built = with_units(model_of(kind, seed=1), unit_counts(small))
    built.load_state_dict(small.state_dict())
    assert torch.equal(built(images_for(model)), small(images_for(model)))
    assert built.dense_shapes == small.dense_shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.mlp": 0}, "blocks.0.mlp: expected 1 to 96 neurons"),
        ({"blocks.0.mlp": 97}, "expected 1 to 96"),
        ({"blocks.0.attn": 2.0}, "blocks.0.attn: expected 1 to 4 heads"),
        ({"blocks.0.attn": True}, "expected 1 to 4"),
        ({"x": 1}, "of another model"),
    ],
)
def test_a_shape_that_is_not_the_models_is_refused(change, message):
    model = model_of()
    with pytest.raises(PruningError, match=message):
        with_units(model, {**unit_counts(model), **change})
    with pytest.raises(PruningError, match="of another model"):
        with_units(model, [1])


# ---- which units go ----


def slow_units(model, pattern):
    """By block the weights of each unit, as pairs of a name and a bool tensor: written out for a
    plain ViT.
    """
    found = {}
    for block in range(len(model.blocks)):
        if "heads" in pattern:
            qkv, proj = f"blocks.{block}.attn.qkv.weight", f"blocks.{block}.attn.proj.weight"
            for head in range(4):
                rows, columns = (
                    torch.zeros(72, 24, dtype=torch.bool),
                    torch.zeros(24, 24, dtype=torch.bool),
                )
                for part in range(3):
                    rows[24 * part + 6 * head : 24 * part + 6 * head + 6] = True
                columns[:, 6 * head : 6 * head + 6] = True
                found.setdefault(f"blocks.{block}.attn", []).append({qkv: rows, proj: columns})
        if "neurons" in pattern:
            fc1, fc2 = f"blocks.{block}.mlp.fc1.weight", f"blocks.{block}.mlp.fc2.weight"
            hidden = model.blocks[block].mlp.fc1.out_features
            for neuron in range(hidden):
                rows, columns = (
                    torch.zeros(hidden, 24, dtype=torch.bool),
                    torch.zeros(24, hidden, dtype=torch.bool),
                )
                rows[neuron], columns[:, neuron] = True, True
                found.setdefault(f"blocks.{block}.mlp", []).append({fc1: rows, fc2: columns})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_units_are_kept_whole_and_those_of_the_largest_sums_and_no_more_than_the_budget(
    pruner, score
):
    model = model_of(depth=3, mlp_ratio=1)
    statistics = statistics_of(model) if needs_of(pruner, score) else None
    scores = Scores(prunable_weights(model), SCORES[score], statistics=statistics)
    values = scores
    if scores.signed:
        values = {
            name: SCORES[score](weight.detach(), scores.layer(name))
            for name, weight in prunable_weights(model).items()
        }
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    for pattern, sparsity in (("heads", 0.25), ("neurons", 0.2), ("heads+neurons", 0.55)):
        masks = compute_masks(
            model, pruner, sparsity, pattern=pattern, score=score, statistics=statistics
        )
        cheapest = []
        for units in slow_units(model, pattern).values():
            sums = [
                sum(
                    values[name][where].double().sum().item()
                    for name, where in unit.items()
                    if score != "gate" or name.endswith(READERS)
                )
                for unit in units
            ]
            if scores.signed:
                sums = [total**2 for total in sums]
            kept = [all(masks[name][where].all() for name, where in unit.items()) for unit in units]
            gone = [
                not any(masks[name][where].any() for name, where in unit.items()) for unit in units
            ]
            assert all(a != b for a, b in zip(kept, gone, strict=True)) and any(kept)
            best = sorted(range(len(sums)), key=lambda i: (-sums[i], i))[: sum(kept)]
            assert sorted(best) == [i for i, whole in enumerate(kept) if whole]
            if not all(kept):
                cheapest.append(sum(int(where.sum()) for where in units[0].values()))
        left = sum(int(masks[name].sum()) for name in scores)
        assert round(total * (1 - sparsity)) - min(cheapest) < left <= round(total * (1 - sparsity))


@pytest.mark.parametrize("kind", ["vit", "vit with SwiGLU", "cait", "swin"])
def test_a_unit_scores_the_mean_absolute_gradient_of_a_real_gate(kind):
    """By the score `gate`. The gate is a factor of 1 for what the next layer reads from the unit."""
    model = model_of(kind)
    images = images_for(model, count=5)
    targets = torch.arange(5)
    statistics = collect_statistics(
        model,
        [(images[:2], targets[:2]), (images[2:], targets[2:])],
        nn.functional.cross_entropy,
        {"gate_gradient"},
    )
    weights = prunable_weights(model)
    scores = Scores(weights, SCORES["gate"], statistics=statistics)

    groups = unit_groups(model)
    gates = []
    for group in groups:
        gate = torch.ones(group.units, requires_grad=True)
        (reader,) = (name for name, dim, _ in group.parts if dim == 1 and name.endswith(READERS))
        unit = next(part.unit for part in group.parts if part.parameter == reader)
        model.get_submodule(reader.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, inputs, gate=gate, unit=unit: (inputs[0] * gate[unit],)
        )
        gates.append(gate)
    total = [torch.zeros(group.units) for group in groups]
    for image, target in zip(images, targets, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), target[None])
        for sums, gradient in zip(total, torch.autograd.grad(loss, gates), strict=True):
            sums += gradient.abs() / len(images)

    assert len(groups) >= 4
    for group, expected in zip(groups, total, strict=True):
        (found,) = scores.of_groups([group], [group.weights(weights)])
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-7)


def test_heads_of_torchs_attention_score_by_a_gate_at_the_weights_that_read_them():
    """W (z x) is (W z) x: torch calls no layer at whose inputs a gate could be."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 8, 1, 4, 24, 48, num_classes=5).eval()
    nn.init.normal_(model.heads[0].weight)
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    cross_entropy = nn.functional.cross_entropy
    data = [(images[:1], targets[:1]), (images[1:], targets[1:])]
    statistics = collect_statistics(model, data, cross_entropy, {"gate_gradient"})
    weights = prunable_weights(model)
    scores = Scores(weights, SCORES["gate"], statistics=statistics)

    (group,) = unit_groups(model, ["heads"])
    reader = "encoder.layers.encoder_layer_0.self_attention.out_proj.weight"
    unit = torch.arange(4).repeat_interleave(6)
    total = torch.zeros(4)
    for image, target in zip(images, targets, strict=True):
        gate = torch.ones(4, requires_grad=True)
        gated = {reader: weights[reader].detach() * gate[unit]}
        outputs = torch.func.functional_call(model, gated, (image[None],))
        total += torch.autograd.grad(cross_entropy(outputs, target[None]), gate)[0].abs() / 4
    (found,) = scores.of_groups([group], [group.weights(weights)])
    torch.testing.assert_close(found, total.double(), rtol=1e-4, atol=1e-7)


def test_heads_and_neurons_of_the_least_gradient_at_their_gates_go():
    model = model_of()
    statistics = statistics_of(model, {"gate_gradient"})
    of_heads = torch.tensor([3.0, 1.0, 4.0, 2.0]).repeat_interleave(6)
    state = statistics.state_dict()
    for block in range(2):
        state[f"blocks.{block}.attn.proj.weight.gate_gradient"].copy_(of_heads)
        state[f"blocks.{block}.mlp.fc2.weight.gate_gradient"].copy_(torch.arange(96))
        # A large gradient at the gates of what computes a unit says nothing of it
        state[f"blocks.{block}.attn.qkv.weight.gate_gradient"].fill_(1e6)
    for pattern, sparsity in (("heads", 0.15), ("neurons", 0.3)):
        masks = compute_masks(
            model, "unif", sparsity, pattern=pattern, score="gate", statistics=statistics
        )
        for group in unit_groups(model, [pattern]):
            kept = group.kept(masks).tolist()
            assert kept == ([True, False, True, False] if pattern == "heads" else sorted(kept))
            assert any(kept) and not all(kept)


def test_glob_keeps_the_units_of_the_largest_means_as_nearly_as_whole_ones_allow():
    model = model_of()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(10)
    units = {name: len(found) for name, found in slow_units(model, "neurons").items()}
    masks = compute_masks(model, "glob", 0.3, pattern="neurons")
    kept = {name: int(masks[f"{name}.fc1.bias"].sum()) for name in units}
    means = sorted(
        (
            (
                sum(
                    model.get_parameter(key)[where].abs().double().sum().item()
                    for key, where in unit.items()
                ),
                name,
            )
            for name, found in slow_units(model, "neurons").items()
            for unit in found
        ),
        reverse=True,
    )
    best = [name for _, name in means[: sum(kept.values())]]
    assert kept == {name: best.count(name) for name in units}


def test_units_are_compared_by_the_mean_score_of_their_weights_since_heads_have_more_than_neurons():
    model = model_of()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(0.3)
            block.attn.proj.weight.mul_(0.3)
    masks = compute_masks(model, "glob", 0.2, pattern="heads+neurons")
    kept = {
        kind: sum(int(group.kept(masks).sum()) for group in unit_groups(model, [kind]))
        for kind in ("heads", "neurons")
    }
    # 0.8 of the weights, of which all neurons have two thirds
    assert kept == {"heads": 3, "neurons": 2 * 96}


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_units_of_zeros_are_kept_only_where_no_other_is_left(score):
    model = model_of()
    with torch.no_grad():
        for block, start in zip(model.blocks, (0, 50), strict=True):
            block.mlp.fc1.weight[start : start + 40] = 0
            block.mlp.fc2.weight[:, start : start + 40] = 0
    masks = compute_masks(model, "unif", 0.1, pattern="neurons", score=score)
    for block, start in ((0, 0), (1, 50)):
        kept = masks[f"blocks.{block}.mlp.fc1.bias"]
        assert not kept[start : start + 40].any() and kept.sum() == 96 - 40
    for parameter in model.blocks[0].mlp.parameters():
        parameter.data.zero_()
    assert (
        compute_masks(model, "unif", 0.1, pattern="neurons", score=score)[
            "blocks.0.mlp.fc1.bias"
        ].sum()
        == 1
    )


def test_unifplus_leaves_the_first_and_the_last_block_whole():
    model = MODELS["vit"](depth=4)
    masks = compute_masks(model, "unifplus", 0.4, pattern="heads+neurons")
    groups = unit_groups(model)
    whole = {group.name for group in groups if group.kept(masks).all()}
    assert whole == {groups[0].name, groups[-1].name}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_sparsity_zero_keeps_everything(pruner, pattern):
    model = model_of()
    statistics = statistics_of(model) if needs_of(pruner) else None
    assert all(
        mask.all()
        for mask in compute_masks(model, pruner, 0, pattern=pattern, statistics=statistics).values()
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", MODELS)
def test_as_many_are_pruned_as_one_unit_of_each_block_allows_and_no_more(kind, pattern):
    model = model_of(kind)
    with pytest.raises(
        PruningError, match="at least one unit of each block and all weights elsewhere"
    ) as refused:
        compute_masks(model, "unif", 0.999, pattern=pattern)
    limit = float(str(refused.value).rpartition(" ")[2])
    masks = compute_masks(model, "unif", limit, pattern=pattern)
    groups = unit_groups(model, pattern.split("+"))
    assert groups and {int(group.kept(masks).sum()) for group in groups} == {1}


@pytest.mark.parametrize("kind", MODELS)
def test_a_budget_of_multiply_adds_is_met_by_what_the_shrunk_model_spends(kind):
    model = model_of(kind)
    image = images_for(model, 1)

    def spent(network):
        return sum(count for name, count in multiply_adds(network, image).items() if name != OTHERS)

    for pattern, sparsity in (("heads", 0.2), ("neurons", 0.25), ("heads+neurons", 0.5)):
        masks = compute_masks(model, "unif", sparsity, pattern=pattern, budget="macs")
        small = shrink(model, masks)
        small.dense_shapes = {}
        open_groups = [
            group for group in unit_groups(model, pattern.split("+")) if not group.kept(masks).all()
        ]
        counts, _ = multiply_adds_of_modules(
            model, [group.name for group in open_groups], image, prunable_weights(model)
        )
        cheapest = min(
            count / group.units for count, group in zip(counts, open_groups, strict=True)
        )
        # The mixing of n heads costs n^2, and is counted as n x heads
        slack = 0.02 * spent(model) * (kind == "cait")
        assert (
            (1 - sparsity) * spent(model) - cheapest - slack - 1
            < spent(small)
            <= (1 - sparsity) * spent(model) + 1
        )


# ---- schedules ----


@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_unit_that_is_pruned_stays_pruned_and_the_target_is_reached(pattern, schedule, score):
    model, sparsity = model_of(), 0.25
    recipe = Recipe(
        "glob",
        sparsity,
        pattern=pattern,
        prune_schedule=schedule,
        score=score,
        **({"prune_every": 2} if schedule == "gradual" else {}),
    )
    sparsifier = Sparsifier(model, recipe, total_steps=12, epoch_steps=4)
    sparsifier.start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sparsifier.attach(optimizer, [average := copy.deepcopy(model)])
    images, previous, sparsities = images_for(model), None, []
    for step in range(12):
        sparsifier.begin_step()
        optimizer.zero_grad()
        model(images).square().mean().backward()
        sparsifier.end_backward()
        optimizer.step()
        sparsifier.end_step()
        masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        assert previous is None or all((masks[name] <= previous[name]).all() for name in masks)
        assert all(
            (dict(network.named_parameters())[name][~mask] == 0).all()
            for network in (model, average)
            for name, mask in masks.items()
        )
        previous = masks
        sparsities.append(sparsifier.masks.sparsity())
        if step == 6:
            other = Sparsifier(copy.deepcopy(model), recipe, total_steps=12, epoch_steps=4)
            other.load_state_dict(sparsifier.state_dict())
            assert all(torch.equal(mask, other.masks[name]) for name, mask in masks.items())
    assert sparsities == sorted(sparsities) and len(set(sparsities)) > 2 and sparsifier.final
    assert (
        sparsity
        <= sparsities[-1]
        == sparsity_rows(model, masks).prunable.sparsity
        < sparsity + 0.09
    )


@pytest.mark.parametrize("schedule", ["ste", "sr-ste"])
def test_units_that_are_masked_keep_their_values_and_may_return_with_ste(schedule):
    model = model_of()
    recipe = Recipe("lamp", 0.5, pattern="heads+neurons", prune_schedule=schedule, prune_every=1)
    sparsifier = Sparsifier(model, recipe, total_steps=4, epoch_steps=4)
    sparsifier.start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for _ in range(4):
        sparsifier.begin_step()
        optimizer.zero_grad()
        model(images_for(model)).square().mean().backward()
        sparsifier.end_backward()
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight[~first["blocks.0.mlp.fc1.weight"]] *= 2
        optimizer.step()
        sparsifier.end_step()
    masks = sparsifier.masks
    assert (masks["blocks.0.mlp.fc1.bias"] > first["blocks.0.mlp.fc1.bias"]).any()
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())


def test_a_pruned_unit_gets_no_gradient_also_without_its_mask():
    """Which is why ac-dc, whose dense phases are to bring weights back, is refused."""
    model = model_of()
    masks = compute_masks(model, "unif", 0.5, pattern="heads+neurons")
    Masks(model, masks)
    model(images_for(model)).square().mean().backward()
    assert all((model.get_parameter(name).grad[~mask] == 0).all() for name, mask in masks.items())
    with pytest.raises(
        PruningError, match="ac-dc: expected a pattern whose weights can come back .* no gradient"
    ):
        Recipe("unif", 0.5, pattern="heads", prune_schedule="ac-dc").check()


# ---- reports and refusals ----


def test_the_table_of_a_checkpoint_has_no_rows_for_biases():
    model = model_of("swin")
    masks = compute_masks(model, "unif", 0.5, pattern="heads+neurons")
    named = [
        line.split()[0]
        for line in checkpoint_table(masked(model, masks).state_dict(), masks).splitlines()[2:-3]
    ]
    assert named == list(prunable_weights(model))


def test_a_model_without_units_and_a_block_that_is_not_known_are_named():
    with pytest.raises(PruningError, match="pattern heads: Sequential has none that are known"):
        compute_masks(linears(torch.randn(4, 8)), "unif", 0.5, pattern="heads")
    model = VisionTransformer(**SIZE, scale_attn_norm=True)
    with pytest.raises(
        PruningError, match="blocks.0.attn is a Attention, whose heads cannot be told apart"
    ):
        compute_masks(model, "unif", 0.2, pattern="heads")
    model = timm.create_model(
        "swinv2_tiny_window8_256",
        img_size=64,
        embed_dim=24,
        depths=(1, 1),
        num_heads=(2, 4),
        window_size=2,
    )
    with pytest.raises(
        PruningError,
        match="layers.0.blocks.0.attn is a WindowAttention, whose heads cannot be told",
    ):
        compute_masks(model, "unif", 0.2, pattern="heads")


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224",
        "eva02_tiny_patch14_224",
        "beit_base_patch16_224",
        "xcit_nano_12_p16_224",
    ],
)
def test_blocks_that_are_not_known_stay_whole_and_are_named(name, caplog):
    sizes = {"xcit_nano_12_p16_224": {"num_heads": 2}}.get(name, {"num_heads": 3})
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, embed_dim=24, num_classes=5, **sizes).eval()
    warn_once.cache_clear()
    masks = compute_masks(model, "unif", 0.2, pattern="heads+neurons")
    assert caplog.messages[0].startswith("pattern heads+neurons leaves blocks whole: ")

    weights = {weight: mask for weight, mask in masks.items() if weight in prunable_weights(model)}
    kept = sum(int(mask.sum()) for mask in weights.values())
    total = sum(mask.numel() for mask in weights.values())
    assert list(weights) == list(prunable_weights(model)) and 0.75 * total < kept <= 0.8 * total
    assert not parse_pattern("heads+neurons").why_not(masks)
    images = torch.randn(1, 3, 224, 224)
    small = shrink(model, masks)
    torch.testing.assert_close(small(images), masked(model, masks)(images), rtol=1e-3, atol=1e-4)


def test_multiply_adds_are_a_budget_of_heads_and_neurons_alone_and_of_models_that_say_their_size():
    with pytest.raises(PruningError, match="budget 'macs': expected weights with pattern 2:4"):
        compute_masks(model_of(), "unif", pattern="2:4", budget="macs")
    with pytest.raises(
        PruningError, match="--budget macs: expected weights with --pattern unstructured"
    ):
        Recipe("unif", 0.5, budget="macs").check()
    with pytest.raises(
        PruningError, match="--budget bytes: expected weights or macs with --pattern heads"
    ):
        Recipe("unif", 0.5, pattern="heads", budget="bytes").check()
    model = model_of()
    del model.patch_embed.img_size
    with pytest.raises(
        PruningError, match="budget macs: VisionTransformer does not say for which images it is"
    ):
        compute_masks(model, "unif", 0.5, pattern="heads+neurons", budget="macs")
    assert prod(model.patch_embed.grid_size) == 4


# ---- the command line ----

SHRINK = ["--pruner", "lamp", "--sparsity", "0.5", "--pattern", "heads+neurons", "--shrink"]


@pytest.fixture(scope="module")
def whole_run(once, tiny):
    """The folder of a run that was shrunk."""
    return once("shrunk", lambda folder: main.run([*tiny, *SHRINK, "--output_dir", str(folder)]))


def test_a_shrunk_run_that_was_stopped_goes_on_to_the_bit(
    run_main, tiny, stop_at, tmp_path, monkeypatch, whole_run
):
    with monkeypatch.context():
        stop_at(2)
        run_main(*tiny, *SHRINK, "--output_dir", "cut", status=143)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run_main(*tiny, *SHRINK, "--output_dir", "cut", "--resume", "auto")
    whole, cut = (
        torch.load(folder / "checkpoint.pth", weights_only=True)
        for folder in (whole_run, tmp_path / "cut")
    )
    for kind in ("model", "model_ema"):
        assert all(torch.equal(value, cut[kind][name]) for name, value in whole[kind].items())
    assert whole["shape"] == cut["shape"]
    assert (
        whole["model"]["blocks.0.mlp.fc1.weight"].shape[0] == whole["shape"]["blocks.0.mlp"] < 384
    )
    for name in ("log.txt", "sparsity.csv"):
        assert content(whole_run / name) == content(tmp_path / "cut" / name)
    assert '"sparsity": 0.5' in (whole_run / "log.txt").read_text()


def test_a_shrunk_checkpoint_is_evaluated_audited_and_finetuned_further(
    run_main, tiny, tmp_path, whole_run
):
    finetuned = re.search(r"\| finetuned \| (.*) \|", (whole_run / "summary.md").read_text())[1]
    assert f"pruned {finetuned}" in run_main(
        *tiny, "--eval", "--resume", whole_run / "checkpoint.pth"
    )
    assert "shrunk: the pruned heads and neurons are gone" in run_main(
        "--audit", whole_run / "checkpoint.pth"
    )
    run_main(*tiny, "--finetune", whole_run / "checkpoint.pth", *SHRINK, "--output_dir", "further")
    before, after = (
        torch.load(folder / "checkpoint.pth", weights_only=True)["shape"]
        for folder in (whole_run, tmp_path / "further")
    )
    assert sum(after.values()) < 0.8 * sum(before.values())


@pytest.mark.slow
def test_a_yaml_with_units_and_levels_of_blocks_is_trained_shrunk_and_resumed(
    run_main, tiny, tmp_path
):
    (tmp_path / "c.yaml").write_text(
        "sparsity:\n  mode: unstructured\n  level:\n    default: dense\n"
        "    blocks.1.*: block:4x1 0.75\n  units: {blocks.0.attn: 1, '*.5.mlp': 64}\n"
    )
    pruned = ["--pruner", "custom", "--custom-config", "c.yaml", "--reconstruct", "least-squares"]
    run_main(*tiny, *pruned, "--calibration-images", 32, "--shrink", "--output_dir", "run")
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    weights = checkpoint["model"]
    assert len(weights["blocks.5.mlp.fc1.weight"]) == 64
    assert len(weights["blocks.0.attn.qkv.weight"]) == 96
    blocks = (weights["blocks.1.mlp.fc1.weight"] != 0).unflatten(0, (-1, 4)).any(1)
    assert int(blocks.sum()) == blocks.numel() // 4
    summary = (tmp_path / "run/summary.md").read_text()
    finetuned = re.search(r"\| finetuned \| (.*) \|", summary)[1]
    again = run_main(*tiny, "--eval", "--resume", "run/checkpoint.pth")
    assert f"pruned {finetuned}" in again


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pruner", "lamp", "--sparsity", "0.5", "--shrink"], "--shrink needs --pattern heads"),
        (["--shrink"], "--shrink needs --pattern heads"),
        (
            [*SHRINK, "--prune-schedule", "gradual"],
            "--shrink needs --prune-schedule one-shot, not gradual",
        ),
        ([*SHRINK[:3], "0.99", *SHRINK[4:]], "expected a sparsity of at most 0.8"),
    ],
)
def test_what_cannot_be_shrunk_is_refused_before_any_work(run_main, tiny, flags, message, tmp_path):
    assert message in run_main(*tiny, *flags, "--output_dir", "out", status=2)
    assert not (tmp_path / "out").exists()


def test_a_masked_run_is_as_accurate_as_a_shrunk_one_and_is_not_shrunk_on_the_way(
    run_main, tiny, tmp_path, whole_run
):
    run_main(*tiny, *SHRINK[:-1], "--output_dir", "masked")
    summaries = [(folder / "summary.md").read_text() for folder in (whole_run, tmp_path / "masked")]
    accuracies, weights = (
        [re.search(rf"\| {name} \| .*", text)[0] for text in summaries]
        for name in ("pruned", "of these prunable")
    )
    assert accuracies[0] == accuracies[1] and weights[0] == weights[1]
    assert "are pruned already" in run_main(
        *tiny, *SHRINK, "--resume", "masked/checkpoint.pth", status=2
    )


@pytest.mark.parametrize("name", ["nest_tiny", "caformer_s18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("pattern", ["heads", "neurons"])
def test_a_block_that_computes_something_else_without_a_unit_keeps_its_size(name, pattern, caplog):
    """The first two take the width of their attention from the tokens, under timm's usual names."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    try:
        masks = compute_masks(model, "unif", 0.1, pattern=pattern)
    except PruningError as error:
        assert name == "caformer_s18" and "whose neurons cannot be told apart" in str(error)
        return
    caplog.clear()
    masked = copy.deepcopy(model)
    Masks(masked, masks)
    small = shrink(model, masks)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(small(images), masked(images), rtol=1e-3, atol=1e-4)

    whole = sum(parameter.numel() for parameter in model.parameters())
    left = sum(parameter.numel() for parameter in small.parameters())
    if pattern == "heads" and name != "vit_tiny_patch16_224":
        assert left == whole and "keeps its heads: it does not run without" in caplog.text
    else:
        assert left < whole and not caplog.records
