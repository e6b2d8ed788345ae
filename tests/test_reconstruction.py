"""Kept weights that make up for the pruned ones: `obs_prune`, and whole models layer after layer."""

import copy
import itertools
import json
import logging
import math

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from made_up import linears
from pretend_cuda import pretend_cuda
from together import together
from torch import nn

from sparsity_factory import (
    PRUNERS,
    RECONSTRUCTIONS,
    SCORES,
    STATISTICS,
    Inputs,
    PruningError,
    collect_statistics,
    compute_masks,
    obs_prune,
    parse_pattern,
    prunable_weights,
    prune,
    walk_layers,
)
from sparsity_factory.processes import ALONE, Processes
from sparsity_factory.reconstruction import reconstruct_layers

CASES = json.loads((ROOT / "tests/reference/obs_update.json").read_text())


def layer(seed=0, rows=6, columns=20, tokens=60, correlated=True):
    """A weight and inputs (tokens, columns), in float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    if correlated:
        inputs = (
            inputs
            @ (
                torch.eye(columns)
                + torch.randn(columns, columns, generator=generator) / columns**0.5
            ).double()
        )
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs


def error(new, weight, inputs) -> float:
    """Of the outputs, relative to them."""
    return ((inputs @ (new - weight).T).square().sum() / (inputs @ weight.T).square().sum()).item()


# ---- the figures of the public code ----


def drawn(case):
    random = np.random.RandomState(case["seed"])
    rows, columns, tokens = case["rows"], case["columns"], case["tokens"]
    mix = random.standard_normal((columns, columns)) / columns**0.5 + np.eye(columns)
    inputs = random.standard_normal((tokens, columns)) @ mix * (0.5 + random.random_sample(columns))
    weight = random.standard_normal((rows, columns)) * 0.1
    bits = np.unpackbits(
        np.frombuffer(bytes.fromhex(case["mask_hex"]), np.uint8), count=rows * columns
    )
    mask = torch.from_numpy(bits.astype(bool).reshape(rows, columns))
    return torch.from_numpy(weight), torch.from_numpy(inputs), mask


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed {case['seed']}")
def test_the_public_code_gives_the_same(case):
    weight, inputs, mask = drawn(case)
    gram = inputs.T @ inputs
    assert int(mask.sum()) == case["kept_total"]
    for block_size in (case["block_size"], 1, 7, 128, 1000):
        new, left = obs_prune(weight, gram, mask, damping=case["damping"], block_size=block_size)
        assert torch.equal(left, mask)
        assert torch.equal(new * ~mask, torch.zeros_like(new))
        torch.testing.assert_close(
            new[0], torch.tensor(case["first_row"], dtype=torch.float64), atol=1e-6, rtol=0
        )
        assert error(new, weight, inputs) == pytest.approx(case["relative_output_error"], rel=1e-6)
    if "n" in case:
        assert torch.equal(
            obs_prune(weight, gram, (case["n"], case["m"]), damping=case["damping"])[1], mask
        )
    else:
        new, found = obs_prune(
            weight, gram, case["kept_total"], damping=case["damping"], block_size=case["block_size"]
        )
        assert int(found.sum()) == case["kept_total"]
        assert error(new, weight, inputs) <= 1.02 * case["relative_output_error"]


# ---- against plain definitions ----


def plain_obs(weight, gram, damping, groups, choose):
    """Column by column, with the inverse for the columns that are left computed anew for each.

    groups: the first columns of groups, with an end; choose: from costs (outputs, width) and the
    group's place to what of it is kept.
    """
    weight, count = weight.clone(), weight.shape[1]
    gram = gram + damping * gram.diagonal().mean() * torch.eye(count, dtype=gram.dtype)
    inverses = [torch.linalg.inv(gram[column:, column:]) for column in range(count)]
    mask = torch.ones(weight.shape, dtype=torch.bool)
    for place, (start, end) in enumerate(zip(groups, groups[1:], strict=False)):
        costs = torch.stack(
            [weight[:, column] ** 2 / inverses[column][0, 0] for column in range(start, end)], 1
        )
        mask[:, start:end] = choose(costs, place)
        for column in range(start, end):
            inverse = inverses[column]
            spread = torch.where(mask[:, column], 0.0, weight[:, column]) / inverse[0, 0]
            weight[:, column:] -= torch.outer(spread, inverse[0])
            weight[:, column] *= mask[:, column]
    return weight, mask


def k_cheapest_go(costs, kept):
    mask = torch.zeros(costs.numel(), dtype=torch.bool)
    mask[costs.flatten().argsort(descending=True, stable=True)[:kept]] = True
    return mask.view(costs.shape)


def test_one_pruned_weight_is_the_closed_form_of_optimal_brain_surgeon():
    weight, inputs = layer(rows=1)
    gram = inputs.T @ inputs
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, 0] = False  # of the first column, all others make up for it
    inverse = torch.linalg.inv(gram)
    expected = weight - weight[0, 0] / inverse[0, 0] * inverse[0]
    expected[0, 0] = 0.0
    new, _ = obs_prune(weight, gram, mask, damping=0.0)
    torch.testing.assert_close(new, expected, rtol=1e-10, atol=1e-12)
    squared = (inputs @ (new - weight).T).square().sum()
    torch.testing.assert_close(squared, weight[0, 0] ** 2 / inverse[0, 0])


@pytest.mark.parametrize("block_size", [1, 6, 7, 20, 128])
def test_a_given_mask_is_reconstructed_as_column_by_column(block_size):
    weight, inputs = layer()
    gram = inputs.T @ inputs
    given = torch.rand(6, 20, generator=torch.Generator().manual_seed(1)) < 0.4
    new, mask = obs_prune(weight, gram, given, block_size=block_size)
    expected, _ = plain_obs(weight, gram, 0.01, [0, 20], lambda costs, place: given)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(mask, given)
    assert error(new, weight, inputs) < error(weight * given, weight, inputs)


@pytest.mark.parametrize("block_size", [1, 6, 7, 20, 128])
@pytest.mark.parametrize("kept", [0, 1, 37, 60, 119, 120])
def test_a_number_goes_by_blocks_each_with_its_share_as_column_by_column(block_size, kept):
    weight, inputs = layer()
    gram = inputs.T @ inputs
    new, mask = obs_prune(weight, gram, kept, block_size=block_size)
    assert int(mask.sum()) == kept
    ends = [*range(0, 20, block_size), 20]
    shares = [
        round(kept * end / 20) - round(kept * start / 20)
        for start, end in zip(ends, ends[1:], strict=False)
    ]
    expected, by_hand = plain_obs(
        weight, gram, 0.01, ends, lambda costs, place: k_cheapest_go(costs, shares[place])
    )
    assert torch.equal(mask, by_hand)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group", [(1, 4), (2, 4), (3, 5), (1, 1), (4, 4), (2, 20)])
def test_groups_are_chosen_among_the_weights_as_updated_so_far(group):
    weight, inputs = layer()
    gram = inputs.T @ inputs
    n, m = group
    expected, by_hand = plain_obs(
        weight,
        gram,
        0.01,
        range(0, 21, m),
        lambda costs, place: torch.stack([k_cheapest_go(row, n) for row in costs]),
    )
    for block_size in (1, 8, 128):
        new, mask = obs_prune(weight, gram, group, block_size=block_size)
        assert torch.equal(mask, by_hand)
        torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 5, 8, 48, 128])
@pytest.mark.parametrize(
    "pattern, kept",
    [
        ("unstructured", 0),
        ("unstructured", 17),
        ("unstructured", 311),
        ("unstructured", 480),
        ("row", 10),
        ("row", 70),
        ("row", 240),
        ("row", 480),
        ("x:4", 120),
        ("x:4", 360),
        ("x:48", 10),
        ("x:48", 110),
        ("block:2x4", 0),
        ("block:2x4", 1),
        ("block:2x4", 23),
        ("block:5x16", 5),
        ("block:10x48", 1),
    ],
)
def test_what_is_kept_is_exact_and_fits_the_pattern(pattern, kept, block_size):
    weight, inputs = layer(rows=10, columns=48, tokens=100)
    form = parse_pattern(pattern)
    new, mask = obs_prune(weight, inputs.T @ inputs, kept, block_size=block_size, pattern=form)
    numbers = form.units(weight.shape)
    assert int(mask.sum()) * numbers == kept * mask.numel()
    assert not new[~mask].any()
    if pattern == "row":
        assert set(mask.sum(1).tolist()) == {kept // 10}
    if pattern.startswith("x:"):
        m = int(pattern[2:])
        assert set(mask.reshape(-1, m).sum(1).tolist()) == {kept * m // 480}
    if pattern.startswith("block:"):
        rows, columns = form.rows, form.columns
        blocks = mask.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3))
        assert set(blocks.flatten().tolist()) <= {0, rows * columns}


@pytest.mark.parametrize("name", ["block:2x4", "row"])
def test_a_pattern_sums_costs_and_compares_as_it_does_with_scores(name):
    pattern, (weight, inputs) = parse_pattern(name), layer(rows=4, columns=24, tokens=80)
    gram = inputs.T @ inputs
    kept = 7 if name == "block:2x4" else 32
    new, mask = obs_prune(weight, gram, kept, block_size=8, pattern=pattern)
    shares = [round(kept * (i + 1) / 3) - round(kept * i / 3) for i in range(3)]

    def choose(costs, place):
        if name == "row":
            per_row = round(8 * (place + 1) / 3) - round(8 * place / 3)
            return torch.stack([k_cheapest_go(row, per_row) for row in costs])
        sums = costs.unflatten(1, (-1, 4)).unflatten(0, (-1, 2)).sum((1, 3))
        return k_cheapest_go(sums, shares[place]).repeat_interleave(2, 0).repeat_interleave(4, 1)

    expected, by_hand = plain_obs(weight, gram, 0.01, [0, 8, 16, 24], choose)
    assert torch.equal(mask, by_hand)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-12)


def test_rows_of_more_columns_than_one_block_keep_their_number_where_a_block_keeps_none():
    weight, inputs = layer(rows=3, columns=300, tokens=400, correlated=False)
    _, mask = obs_prune(weight, inputs.T @ inputs, 3, pattern=parse_pattern("row"))
    assert mask.sum(1).tolist() == [1, 1, 1]


# ---- inputs that are hard ----


def test_inputs_that_are_always_zero_lose_their_weights_and_change_no_others():
    weight, inputs = layer()
    inputs[:, [0, 7, 19]] = 0
    gram = inputs.T @ inputs
    alive = [column for column in range(20) if column not in (0, 7, 19)]
    mask = torch.rand(6, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    # Damping is of the mean over all inputs
    scale = gram.diagonal().mean() / gram[alive][:, alive].diagonal().mean()
    new, _ = obs_prune(weight, gram, mask)
    assert not new[:, [0, 7, 19]].any()
    small, _ = obs_prune(
        weight[:, alive], gram[alive][:, alive], mask[:, alive], damping=0.01 * scale.item()
    )
    torch.testing.assert_close(new[:, alive], small, rtol=1e-9, atol=1e-12)
    _, chosen = obs_prune(weight, gram, 100)
    assert chosen[:, alive].sum() == 100
    nothing, mask = obs_prune(weight, torch.zeros(20, 20, dtype=torch.float64), 30)
    assert int(mask.sum()) == 30 and not nothing.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [60, (2, 4), "mask"])
def test_fewer_tokens_than_inputs_raise_the_damping_and_say_so(dtype, kept, caplog):
    weight, inputs = layer(tokens=5)
    gram = (inputs.T @ inputs).to(dtype)
    if kept == "mask":
        kept = weight > 0
    with caplog.at_level(logging.WARNING):
        new, mask = obs_prune(weight.to(dtype), gram, kept, damping=0.0)
    assert "its damping is raised to" in caplog.text
    assert new.dtype == dtype and new.isfinite().all()
    assert error(new.double(), weight, inputs) < error(weight * mask, weight, inputs)


def test_a_damping_that_suffices_says_nothing(caplog):
    weight, inputs = layer(tokens=5)
    obs_prune(weight, inputs.T @ inputs, 60)
    assert not caplog.text


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_work_is_done_in_the_dtype_of_the_gram_matrix_and_the_weight_keeps_its_own(
    dtype, gram_dtype
):
    weight, inputs = layer()
    gram, mask = inputs.T @ inputs, weight > 0
    exact, _ = obs_prune(weight.to(dtype).double(), gram, mask)
    before = weight.to(dtype)
    new, _ = obs_prune(given := before.clone(), gram.to(gram_dtype), mask)
    assert new.dtype == dtype and torch.equal(given, before)
    torch.testing.assert_close(
        new, exact.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5
    )


def test_a_factor_of_the_gram_matrix_changes_nothing():
    weight, inputs = layer()
    gram = inputs.T @ inputs
    for one, other in zip(
        obs_prune(weight, gram, 60), obs_prune(weight, 2**20 * gram, 60), strict=True
    ):
        assert torch.equal(one, other)


NAN = torch.full((20, 20), math.nan, dtype=torch.float64)
EYE = torch.eye(20, dtype=torch.float64)


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"gram": NAN}, "finite"),
        ({"gram": EYE[:4, :4]}, "20 x 20"),
        ({"weight": NAN[:6]}, "finite"),
        ({"gram": -EYE}, "negative eigenvalues"),
        ({"kept": -1}, "0 to 120"),
        ({"kept": 121}, "0 to 120"),
        ({"kept": (2, 3)}, "divides the 20 inputs"),
        ({"kept": (5, 4)}, "1 <= n <= m"),
        ({"kept": (0, 4)}, "1 <= n <= m"),
        ({"kept": (0, 0)}, "1 <= n <= m"),
        ({"kept": torch.ones(6, 19, dtype=torch.bool)}, "6 x 20"),
        ({"kept": torch.ones(6, 20)}, "bool mask"),
        ({"damping": -1.0}, "damping -1"),
        ({"damping": math.nan}, "damping"),
        ({"block_size": 0}, "block size 0"),
        ({"pattern": parse_pattern("block:4x4")}, "blocks that divide"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_does_not_fit_is_an_error_in_one_line(change, culprit):
    arguments = {"weight": layer()[0], "gram": EYE, "kept": 60, **change}
    with pytest.raises(PruningError, match=culprit) as found:
        obs_prune(
            arguments.pop("weight"), arguments.pop("gram"), arguments.pop("kept"), **arguments
        )
    assert "\n" not in str(found.value)


# ---- layer after layer ----


def unstructured(name):
    return parse_pattern("unstructured")


def as_walked(model, batches):
    return lambda dense: walk_layers(model, batches, other=dense)


def one_layer(inputs, rows=5, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs.shape[1], rows, bias=bias, dtype=torch.float64))


def moved(inputs, mean_to_std):
    """Inputs in float32, each with a mean of so many of its standard deviations."""
    return (inputs / inputs.std(0) + mean_to_std * (1 + torch.rand(inputs.shape[1]))).float()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mean_to_std", [1, 100, 400])
def test_on_a_gpu_float32_errs_as_float64_does_also_about_large_means(caplog, mean_to_std, bias):
    """On the pretended one, compared with the plain definition over all inputs at once."""
    inputs = moved(layer(columns=32, tokens=4000)[1], mean_to_std)
    model = one_layer(inputs, bias=bias).float()
    dense = copy.deepcopy(model).double()
    mask = torch.rand(5, 32, generator=torch.Generator().manual_seed(1)) < 0.5

    with pretend_cuda():
        on_gpu = model.to("cuda")
        reconstruct_layers(
            on_gpu,
            {"0.weight": mask.to("cuda")},
            "obs-mask",
            as_walked(on_gpu, inputs.to("cuda").split(600)),
            patterns=unstructured,
        )
        found = copy.deepcopy(on_gpu.cpu()).double()

    inputs = inputs.double()
    seen = inputs - inputs.mean(0) if bias else inputs
    plain = copy.deepcopy(dense)
    weight, _ = plain_obs(dense[0].weight.detach(), seen.T @ seen, 0.01, [0, 32], lambda *_: mask)
    with torch.no_grad():
        plain[0].weight.copy_(weight)
        if bias:
            plain[0].bias += (dense[0].weight - weight) @ inputs.mean(0)

    def lost(pruned):
        return (pruned(inputs) - dense(inputs)).square().sum().item()

    assert "damping" not in caplog.text
    assert lost(found) == pytest.approx(lost(plain), rel=1e-3)


def test_with_a_bias_it_is_the_least_squares_over_weights_and_bias(monkeypatch):
    """Without damping, and with the first inputs pruned, for which all that are left make up."""
    inputs = layer(columns=12, tokens=200)[1] + torch.arange(12)
    model = one_layer(inputs)
    outputs, mask = model(inputs).detach(), torch.ones(5, 12, dtype=torch.bool)
    mask[:, :4] = False
    monkeypatch.setitem(
        RECONSTRUCTIONS,
        "undamped",
        lambda weight, inputs, mask, pattern: obs_prune(weight, inputs.gram, mask, damping=0.0),
    )
    reconstruct_layers(
        model,
        {"0.weight": mask},
        "undamped",
        as_walked(model, [inputs[:90], inputs[90:]]),
        patterns=unstructured,
    )
    with_ones = torch.cat([inputs[:, 4:], torch.ones(200, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(with_ones, outputs).solution
    torch.testing.assert_close(model[0].weight.detach()[:, 4:], best[:-1].T)
    torch.testing.assert_close(model[0].bias.detach(), best[-1])


def test_a_layer_without_bias_uses_its_inputs_as_they_are():
    inputs = layer(columns=12, tokens=200)[1] + 3
    model = one_layer(inputs, bias=False)
    weight, mask = (
        model[0].weight.detach().clone(),
        torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < 0.5,
    )
    reconstruct_layers(
        model, {"0.weight": mask}, "obs-mask", as_walked(model, [inputs]), patterns=unstructured
    )
    torch.testing.assert_close(
        model[0].weight.detach(), obs_prune(weight, inputs.T @ inputs, mask)[0]
    )


# ---- least squares ----


def seen(inputs, other):
    """The sums over the inputs of a layer, and over those of the dense model."""
    sums = Inputs.of(torch.empty(1, inputs.shape[1]), with_other=True)
    for part, beside in zip(inputs.split(25), other.split(25), strict=True):
        sums.add(part, beside)
    return sums.about_zero()


def exact(weight, inputs, other, mask):
    """Row by row the least squares of X w' - Y w and of the damping times w' - w, as one system of
    equations.
    """
    damping = math.sqrt(0.01 * inputs.square().sum(0).mean())
    new = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        wanted = torch.cat([other @ weight[row], damping * weight[row]])
        matrix = torch.cat([inputs, damping * torch.eye(inputs.shape[1], dtype=inputs.dtype)])[
            :, kept
        ]
        new[row, kept] = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    return new


def test_the_kept_weights_are_the_least_squares_next_to_the_dense_outputs():
    weight, inputs = layer(columns=16, tokens=100)
    other = inputs + 0.3 * layer(seed=1, columns=16, tokens=100)[1]
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0], mask[1] = False, True
    new, same = RECONSTRUCTIONS["least-squares-mask"](
        weight, seen(inputs, other), mask, parse_pattern("unstructured")
    )
    assert torch.equal(same, mask)
    torch.testing.assert_close(new, exact(weight, inputs, other, mask), rtol=1e-4, atol=1e-5)


def test_weights_of_an_input_that_is_always_zero_go_first():
    weight, inputs = layer(columns=16, tokens=100)
    inputs[:, 3] = 0
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    new, chosen = RECONSTRUCTIONS["least-squares"](
        weight, seen(inputs, inputs), mask, parse_pattern("unstructured")
    )
    assert not new[:, 3].any() and not chosen[:, 3].any()
    # In the dense model it is what another one is
    other = inputs + 1.0 * (torch.arange(16) == 3) * inputs[:, [5]]
    new, _ = RECONSTRUCTIONS["least-squares-mask"](
        weight, seen(inputs, other), torch.ones_like(mask), None
    )
    torch.testing.assert_close(new[:, 5], (weight[:, 5] + weight[:, 3]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4", "2:4t", "x:4", "block:3x2"])
def test_chosen_in_rounds_it_keeps_as_many_and_errs_less_than_obs(pattern):
    weight, inputs = layer(rows=12, columns=32, tokens=200)
    pattern = parse_pattern(pattern)
    mask = pattern.mask(pattern.score(weight.abs()), pattern.units(weight.shape) // 2)
    sums = seen(inputs, inputs)
    new, chosen = RECONSTRUCTIONS["least-squares"](weight, sums, mask, pattern)
    assert chosen.sum() == mask.sum() and not new[~chosen].any()
    if pattern.name != "unstructured":  # the groups of the mask hold as well
        assert torch.equal(
            chosen, pattern.mask(pattern.score(chosen.double()), pattern.units(weight.shape) // 2)
        )
    by_obs, _ = RECONSTRUCTIONS["obs"](weight, sums, mask, pattern)
    assert error(new, weight, inputs) < error(by_obs, weight, inputs)
    torch.testing.assert_close(new, exact(weight, inputs, inputs, chosen), rtol=1e-3, atol=1e-4)


def test_a_layer_makes_up_for_what_the_layers_before_it_have_lost():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 6)).double()
    images = torch.randn(200, 8, dtype=torch.float64)
    wanted = model(images).detach()
    masks = compute_masks(model, "unif", 0.5)
    masks["2.weight"] = torch.ones_like(masks["2.weight"])
    masks["2.weight"][:, 0] = False

    def lost(method):
        pruned = copy.deepcopy(model)
        reconstruct_layers(
            pruned,
            masks,
            method,
            as_walked(pruned, [images[:80], images[80:]]),
            patterns=unstructured,
        )
        return (pruned(images) - wanted).square().mean().item()

    assert lost("least-squares-mask") < 0.8 * lost("obs-mask")


def test_inputs_that_do_not_vary_go_to_the_bias():
    """As those of a class token that no image has reached yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5))
    inputs = (10 * torch.randn(1, 12)).expand(3000, 12)
    before = model(inputs[:1]).detach()
    for method in ("obs", "obs-mask"):
        reconstructed = copy.deepcopy(model)
        masks = compute_masks(model, "unif", 0.5)
        found = reconstruct_layers(
            reconstructed,
            masks,
            method,
            as_walked(reconstructed, [inputs] * 3),
            patterns=unstructured,
        )
        torch.testing.assert_close(reconstructed(inputs[:1]).detach(), before)
        assert found["0.weight"].sum() == 30


def test_each_layer_sees_what_the_pruned_ones_before_it_give():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6)).double()
    images = torch.randn(50, 8, dtype=torch.float64)
    dense, masks = copy.deepcopy(model), compute_masks(model, "unif", 0.5)
    reconstruct_layers(model, masks, "obs-mask", as_walked(model, [images]), patterns=unstructured)

    def by_hand(layer, inputs, mask):
        centred = inputs - inputs.mean(0)
        new, _ = obs_prune(layer.weight, centred.T @ centred, mask)
        return new, layer.bias + (layer.weight - new) @ inputs.mean(0)

    with torch.no_grad():
        first, bias = by_hand(dense[0], images, masks["0.weight"])
        second, last = by_hand(dense[2], (images @ first.T + bias).relu(), masks["2.weight"])
    for found, expected in zip(model.parameters(), (first, bias, second, last), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-12)


def test_under_autocast_only_the_model_runs_in_half_precision(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    masks, seen = compute_masks(model, "unif", 0.5), []

    def plain(weight, inputs, mask, pattern):
        assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        seen.append(inputs.gram)
        return weight * mask, mask

    monkeypatch.setitem(RECONSTRUCTIONS, "plain", plain)
    images = torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        reconstruct_layers(model, masks, "plain", as_walked(model, [images]), patterns=unstructured)
        with torch.no_grad():
            hidden = model[1](model[0](images)).double()
    hidden -= hidden.mean(0)
    torch.testing.assert_close(seen[1], hidden.T @ hidden, rtol=1e-2, atol=1e-2)


def test_layers_without_mask_or_pruned_weights_stay_as_they_are():
    model = linears(torch.randn(8, 8), torch.randn(8, 8), torch.randn(8, 8))
    before = copy.deepcopy(model.state_dict())
    some = torch.arange(64).view(8, 8) % 2 == 0
    masks = {"2.weight": some, "1.weight": torch.ones(8, 8, dtype=torch.bool)}
    found = reconstruct_layers(
        model, masks, "obs", as_walked(model, [torch.randn(40, 8)]), patterns=unstructured
    )
    assert list(found) == ["2.weight", "1.weight"]
    assert torch.equal(model[0].weight, before["0.weight"]) and torch.equal(
        model[1].weight, before["1.weight"]
    )
    assert not model[2].weight[~found["2.weight"]].any()


def test_a_weight_that_is_not_finite_is_named():
    model = linears(torch.randn(8, 8), torch.full((8, 8), math.nan))
    with pytest.raises(PruningError, match=r"^1\.weight: expected a finite weight"):
        reconstruct_layers(
            model,
            compute_masks(linears(*[torch.randn(8, 8)] * 2), "unif", 0.5),
            "obs-mask",
            as_walked(model, [torch.randn(40, 8)]),
            patterns=unstructured,
        )


# ---- rows of a layer on several processes ----


def on_processes(count, method, pattern, bias=False):
    """Weight, bias and mask of a layer that as many processes have reconstructed, one after another."""
    weight, inputs = layer(rows=8, columns=16, tokens=200)
    pattern = parse_pattern(pattern)
    kept = pattern.units(weight.shape) * (pattern.n if pattern.name == "2:4t" else 2) // 4
    mask = pattern.mask(pattern.score(weight.abs()), kept)

    sums = Inputs.of(weight, with_other=True)
    sums.add(inputs + 1, inputs + 1.1)
    sums.complete()

    def walk(dense):
        yield "0.weight", sums

    def reconstructed(rank, add_up):
        model = one_layer(inputs, rows=8, bias=bias)
        with torch.no_grad():
            model[0].weight.copy_(weight)
        found = reconstruct_layers(
            model,
            {"0.weight": mask},
            method,
            walk,
            patterns=lambda name: pattern,
            processes=Processes(rank, count, add_up) if count > 1 else ALONE,
        )
        return model.state_dict() | {"mask": found["0.weight"]}

    return together(count, reconstructed)


@pytest.mark.parametrize("count", [2, 3, 9])  # of nine, not each has a row
@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4", "2:4t", "x:4", "block:2x2"])
@pytest.mark.parametrize("method", RECONSTRUCTIONS)
def test_processes_that_share_out_the_rows_of_a_layer_have_the_result_of_one(
    method, pattern, count
):
    (whole,) = on_processes(1, method, pattern)
    first, *others = on_processes(count, method, pattern)
    assert first["mask"].sum() == 64
    assert torch.equal(first["mask"], whole["mask"])
    for name, value in whole.items():
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(first[name], other[name]) for other in others)


def test_each_process_is_given_its_rows_alone(monkeypatch):
    given = []

    def noted(weight, inputs, mask, pattern):
        given.append((len(weight), len(mask)))
        return weight * mask, mask

    monkeypatch.setitem(RECONSTRUCTIONS, "noted", noted)
    on_processes(3, "noted", "unstructured", bias=True)
    assert sorted(given) == [(2, 2), (3, 3), (3, 3)]


# ---- `prune` of a model ----


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=10
    )


def images(count=2, size=24):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def outputs():
    model = vit().eval()
    return torch.cat([model(batch).detach() for batch, _ in images()])


def distance(model, outputs) -> float:
    with torch.no_grad():
        return (
            (torch.cat([model.eval()(batch) for batch, _ in images()]) - outputs)
            .square()
            .mean()
            .item()
        )


@pytest.mark.parametrize(
    "pruner, choices",
    [
        ("lamp", {"sparsity": 0.7}),
        ("unif", {"sparsity": 0.6, "pattern": "row"}),
        ("unif", {"pattern": "2:4"}),
        ("erk", {"sparsity": 0.6, "pattern": "x:4"}),
        ("glob", {"sparsity": 0.5, "pattern": "block:4x4"}),
        (
            "custom",
            {
                "custom_config": {
                    "sparsity": {"mode": "nxm", "level": {"default": [2, 4], "blocks.0.*": "dense"}}
                }
            },
        ),
    ],
)
def test_prune_leaves_outputs_nearer_to_the_dense_model_than_magnitude_does(
    pruner, choices, outputs
):
    errors = {}
    for reconstruct in RECONSTRUCTIONS:
        model = vit().train()
        masks = prune(model, pruner, batches=images(), reconstruct=reconstruct, **choices)
        assert model.training
        counts = compute_masks(vit(), pruner, **choices)
        assert {name: int(mask.sum()) for name, mask in masks.items()} == {
            name: int(mask.sum()) for name, mask in counts.items()
        }
        assert all(
            not weight[~masks[name]].any() for name, weight in prunable_weights(model).items()
        )
        if reconstruct not in ("obs", "least-squares"):
            assert all(torch.equal(masks[name], counts[name]) for name in counts)
        errors[reconstruct] = distance(model, outputs)
    assert all(errors[name] < errors["none"] for name in RECONSTRUCTIONS if name != "none")


def test_prune_at_0_changes_nothing_and_reads_the_yaml_of_a_custom_allocation(tmp_path):
    model = vit()
    masks = prune(model, "unif", 0.0, batches=images())
    assert all(mask.all() for mask in masks.values())
    assert all(
        torch.equal(*pair) for pair in zip(model.parameters(), vit().parameters(), strict=True)
    )
    (tmp_path / "c.yaml").write_text("sparsity: {mode: nxm, level: {default: 2:4}}\n")
    masks = prune(model, "custom", custom_config=tmp_path / "c.yaml", batches=images(1))
    assert {tuple(mask.reshape(-1, 4).sum(1).unique().tolist()) for mask in masks.values()} == {
        (2,)
    }


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"batches": []}, "no calibration images"),
        ({"reconstruct": "sgd"}, "reconstruct sgd"),
        ({"sparsity": 1.0}, "sparsity 1"),
        ({"pattern": "3:7"}, "divides the 48 inputs"),
        ({"score": "taylor"}, "loss"),
    ],
)
def test_prune_refuses_what_cannot_be(change, culprit):
    arguments = {"pruner": "unif", "sparsity": 0.5, "batches": images(1), **change}
    if "pattern" in change:
        arguments["sparsity"] = None
    model = vit()
    with pytest.raises(PruningError, match=culprit):
        prune(model, **arguments)
    assert all(
        torch.equal(*pair) for pair in zip(model.parameters(), vit().parameters(), strict=True)
    )


SHAPES = ((4, 8), (8, 4), (12, 8))
AUTOMATIC = [name for name in PRUNERS if name != "custom"]


@pytest.mark.parametrize("method", [name for name in RECONSTRUCTIONS if name != "none"])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4", "2:4t", "x:4", "block:2x4"])
def test_every_score_and_allocation_keeps_as_many_as_without_reconstruction(method, pattern):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    data = [
        (torch.randn(30, 8, generator=generator), torch.randint(12, (30,), generator=generator))
    ]
    loss = torch.nn.functional.cross_entropy
    statistics = collect_statistics(linears(*weights), data, loss, STATISTICS)
    assert len(SCORES) >= len(AUTOMATIC)
    for score, pruner in zip(
        SCORES, itertools.cycle(["unif"] if pattern[0] == "2" else AUTOMATIC), strict=False
    ):
        sparsity = {"2:4": None, "2:4t": None}.get(pattern, 0.1 if pruner == "unifplus" else 0.5)
        model = linears(*(weight.clone() for weight in weights))
        before = compute_masks(
            model,
            pruner,
            sparsity,
            score=score,
            pattern=pattern,
            statistics=statistics,
            reconstructed=True,
        )
        masks = prune(
            model,
            pruner,
            sparsity,
            score=score,
            pattern=pattern,
            batches=data,
            loss=loss,
            reconstruct=method,
        )
        assert [int(mask.sum()) for mask in masks.values()] == [
            int(mask.sum()) for mask in before.values()
        ]
        assert pattern != "2:4t" or all(
            (mask.T.reshape(-1, 4).sum(1) == 2).all() for mask in masks.values()
        )
        assert all(
            weight.isfinite().all() and not weight[~masks[name]].any()
            for name, weight in prunable_weights(model).items()
        )
