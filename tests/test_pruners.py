"""How the pruners share the budget among layers, and what `compute_masks` accepts."""

import copy
import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_up import linears, statistics_of
from torch import nn

from sparsity_factory import (
    PRUNERS,
    PruningError,
    check_request,
    compute_masks,
    describe,
    needs_of,
    prunable_weights,
)

REFERENCE = json.loads((Path(__file__).parent / "reference" / "masks_deit_tiny.json").read_text())
AUTOMATIC = [name for name in PRUNERS if name != "custom"]


def masks_of(model, pruner, sparsity) -> dict:
    statistics = statistics_of(model, needs_of(pruner)) if needs_of(pruner) else None
    return compute_masks(model, pruner, sparsity, statistics=statistics)


def kept(model, pruner, sparsity) -> list[int]:
    return [int(mask.sum()) for mask in masks_of(model, pruner, sparsity).values()]


# ---- the public reference figures ----


@pytest.fixture(scope="module")
def reference_model():
    model = timm.create_model("deit_tiny_patch16_224")
    for i, weight in enumerate(prunable_weights(model).values()):
        values = (
            np.random.RandomState(1000 + i).standard_normal(tuple(weight.shape))
            * 0.02
            * (1 + 0.15 * (i % 7))
        )
        weight.data = torch.from_numpy(values.astype(np.float32))
    return model


@pytest.mark.parametrize(
    "case", REFERENCE, ids=lambda case: f"{case['pruner']}-{case['sparsity'] or case['note']}"
)
def test_masks_equal_those_of_the_reference_implementations(reference_model, case):
    config = (
        {"sparsity": {"mode": case["mode"], "level": case["level"]}}
        if case["pruner"] == "custom"
        else None
    )
    masks = compute_masks(reference_model, case["pruner"], case["sparsity"], config)
    assert {name.removesuffix(".weight"): int(mask.sum()) for name, mask in masks.items()} == case[
        "kept"
    ]
    digest = hashlib.sha256(
        b"".join(np.packbits(mask.numpy()).tobytes() for mask in masks.values())
    )
    assert digest.hexdigest() == case["mask_sha256"]


@pytest.mark.gpu
# Which factors matrices of its own
@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name != "cap"])
def test_masks_on_a_gpu_equal_those_on_the_cpu_to_the_bit(reference_model, pruner):
    config = (
        {"sparsity": {"mode": "nxm", "level": {"default": [2, 4]}}} if pruner == "custom" else None
    )
    request = {"sparsity": None if config else 0.65, "custom_config": config}
    request["statistics"] = (
        statistics_of(reference_model, needs_of(pruner)) if needs_of(pruner) else None
    )
    expected = compute_masks(reference_model, pruner, **request)
    masks = compute_masks(copy.deepcopy(reference_model).cuda(), pruner, **request)
    assert all(torch.equal(mask.cpu(), expected[name]) for name, mask in masks.items())


# ---- properties on random shapes, scales, ties and sparsities ----

shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)
sparsities = st.floats(0, 1, exclude_max=True, allow_nan=False)
any_layers = settings(max_examples=examples(60))


@st.composite
def models(draw):
    """Layers of random shapes and very different scales; some rounded to few values, some all zero."""
    random = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    weights = []
    for shape in draw(shapes):
        values = random.standard_normal(shape) * draw(st.sampled_from([0.0, 1e-4, 1.0, 100.0]))
        decimals = draw(st.sampled_from([0, 1, 20]))
        weights.append(torch.from_numpy(values.round(decimals).astype(np.float32)))
    return linears(*weights)


def sizes(model) -> list[int]:
    return [weight.numel() for weight in prunable_weights(model).values()]


@any_layers
@given(models(), sparsities, st.sampled_from(["glob", "lamp", "owl", "alpha", "cap"]))
def test_all_but_the_uniform_ones_and_erk_meet_the_global_budget_exactly(model, sparsity, pruner):
    assert sum(kept(model, pruner, sparsity)) == round(sum(sizes(model)) * (1 - sparsity))


@any_layers
@given(models(), sparsities)
def test_lamp_keeps_at_least_one_weight_per_layer(model, sparsity):
    n = sizes(model)
    budget = round(sum(n) * (1 - sparsity))
    counts = kept(model, "lamp", sparsity)
    # A budget of fewer weights than layers goes to the earlier layers.
    assert [min(count, 1) for count in counts] == [int(i < budget) for i in range(len(n))]


@any_layers
@given(models(), sparsities)
def test_unif_rounds_in_every_layer(model, sparsity):
    assert kept(model, "unif", sparsity) == [n - round(sparsity * n) for n in sizes(model)]


@any_layers
@given(models(), sparsities)
def test_unifplus_leaves_the_ends_dense_or_says_why_it_cannot(model, sparsity):
    n = sizes(model)
    middle = sum(n[1:-1])
    if sparsity > 0 and sparsity * sum(n) >= middle:
        with pytest.raises(PruningError, match="first and last"):
            kept(model, "unifplus", sparsity)
        return
    counts = kept(model, "unifplus", sparsity)
    assert (counts[0], counts[-1]) == (n[0], n[-1])
    shared = sparsity * sum(n) / middle if middle else 0
    assert counts[1:-1] == [size - round(shared * size) for size in n[1:-1]]


@any_layers
@given(models(), sparsities)
def test_erk_shares_in_proportion_to_the_fans_up_to_dense_layers(model, sparsity):
    n = sizes(model)
    counts = kept(model, "erk", sparsity)
    assert all(count <= size for count, size in zip(counts, n, strict=True))
    assert abs(sum(counts) - sum(n) * (1 - sparsity)) <= 0.5 * len(n) + 1e-6
    fans = [sum(weight.shape) for weight in prunable_weights(model).values()]
    sparse = [
        (count, fan) for count, fan, size in zip(counts, fans, n, strict=True) if count < size
    ]
    # One scale explains all layers that are not dense, and the dense ones would have passed density
    # 1
    if sparse:
        low = max((count - 0.5) / fan for count, fan in sparse)
        high = min((count + 0.5) / fan for count, fan in sparse)
        assert low <= high + 1e-9
        assert all(
            high * fan >= size - 0.5
            for count, fan, size in zip(counts, fans, n, strict=True)
            if count == size
        )


@any_layers
@given(models(), sparsities, st.sampled_from(AUTOMATIC))
def test_within_a_layer_the_largest_magnitudes_are_kept_and_earlier_ones_of_equals(
    model, sparsity, pruner
):
    try:
        masks = masks_of(model, pruner, sparsity)
    except PruningError:
        assume(False)
    for name, weight in prunable_weights(model).items():
        magnitudes = weight.detach().abs().flatten()
        best_first = magnitudes.argsort(descending=True, stable=True)
        order = masks[name].flatten()[best_first].tolist()
        assert order == sorted(order, reverse=True)


integer_layers = st.lists(
    st.lists(st.integers(-4, 4), min_size=1, max_size=6), min_size=1, max_size=4
)


def best_over_all_layers(layers, score_of, budget) -> list[int]:
    """Brute force: how many weights of each layer are among the best, ties toward the earlier in
    model order.
    """
    scored = [
        (score_of(layer, j), i, j) for i, layer in enumerate(layers) for j in range(len(layer))
    ]
    chosen = sorted(scored, key=lambda item: (-item[0], item[1:]))[:budget]
    return [sum(i == layer for _, i, _ in chosen) for layer in range(len(layers))]


def exact_lamp_score(layer, j) -> Fraction:
    # max: the first of the largest
    if j == max(range(len(layer)), key=lambda i: abs(layer[i])):
        return Fraction(1)
    not_smaller = sum(v**2 for v in layer if abs(v) >= abs(layer[j]))
    return Fraction(layer[j] ** 2, not_smaller) if not_smaller else Fraction(0)


@settings(max_examples=examples(200))
@given(integer_layers, sparsities)
def test_lamp_equals_brute_force_with_exact_fractions_on_tied_weights(layers, sparsity):
    budget = round(sum(map(len, layers)) * (1 - sparsity))
    model = linears(*(torch.tensor([layer], dtype=torch.float32) for layer in layers))
    assert kept(model, "lamp", sparsity) == best_over_all_layers(layers, exact_lamp_score, budget)


@settings(max_examples=examples(100))
@given(integer_layers, sparsities)
def test_glob_equals_brute_force_on_tied_weights(layers, sparsity):
    budget = round(sum(map(len, layers)) * (1 - sparsity))
    model = linears(*(torch.tensor([layer], dtype=torch.float32) for layer in layers))
    assert kept(model, "glob", sparsity) == best_over_all_layers(
        layers, lambda layer, j: abs(layer[j]), budget
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.65, 0.99, 0.999])
def test_lamp_equals_sorting_every_score_on_layers_of_real_size(sparsity):
    random = np.random.RandomState(0)
    layers = [((300, 100), 0.02), ((64, 64), 3.0), ((100, 500), 0.1), ((1, 1), 0.01)]
    weights = [
        (random.standard_normal(shape) * scale).astype(np.float32) for shape, scale in layers
    ]
    scores, layer = [], []
    for i, weight in enumerate(weights):
        squares = np.sort(weight.astype(np.float64).ravel() ** 2)[::-1]
        scores.append(squares / np.cumsum(squares))
        layer.append(np.full(squares.size, i))
    budget = round(sum(weight.size for weight in weights) * (1 - sparsity))
    best = np.concatenate(layer)[np.argsort(-np.concatenate(scores), kind="stable")[:budget]]
    assert kept(linears(*weights), "lamp", sparsity) == np.bincount(best, minlength=4).tolist()


# ---- OWL, AlphaPruning and CAP against plain definitions ----


def sizes_and_budget(model, sparsity):
    return np.array(sizes(model)), round(sum(sizes(model)) * (1 - sparsity))


def small_models(count, seed=0):
    """Layers of unlike sizes, outliers and spectra."""
    random = np.random.RandomState(seed)
    for _ in range(count):
        weights = []
        for _ in range(random.randint(2, 6)):
            outputs, inputs = random.randint(8, 40, 2)
            tail = random.pareto(random.uniform(1, 6), (outputs, inputs)) + random.uniform(0, 2)
            weights.append(torch.from_numpy(tail * random.choice([-1, 1], (outputs, inputs))))
        yield linears(*weights)


def outlier_ratio(weight, norms) -> float:
    wanda = [[abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in weight]
    mean = sum(map(sum, wanda)) / (len(wanda) * len(norms))
    return sum(score > 5 * mean for row in wanda for score in row) / (len(wanda) * len(norms))


@pytest.mark.parametrize("sparsity", [0.3, 0.65])
def test_owl_moves_densities_by_the_share_of_outliers_within_008(sparsity):
    for model in small_models(10):
        statistics = statistics_of(model, {"input_norms"})
        masks = compute_masks(model, "owl", sparsity, statistics=statistics)
        n, budget = sizes_and_budget(model, sparsity)
        ratios = np.array(
            [
                outlier_ratio(weight.tolist(), statistics.value(name, "input_norms").tolist())
                for name, weight in prunable_weights(model).items()
            ]
        )
        deviation = ratios - sum(ratios * n) / sum(n)
        expected = (1 - sparsity + 0.08 * deviation / max(abs(deviation))) * n
        found = np.array([int(mask.sum()) for mask in masks.values()])
        assert abs(found - expected).max() < 1.01  # each is rounded up or down
        assert abs(found / n - (1 - sparsity)).max() <= 0.08 + 1 / n.min()
        assert found.sum() == budget


def test_owl_keeps_more_of_a_layer_with_outliers_and_looks_at_the_inputs_for_them():
    ones = torch.ones(10, 10)
    spiked = ones.clone()
    spiked[:, 0] = 1000
    assert kept_with_norms(linears(ones, spiked, ones), torch.ones(10)) == [46, 58, 46]
    norms = torch.ones(10)
    norms[0] = 1 / 1000  # which hides the outliers
    assert kept_with_norms(linears(ones, spiked, ones), norms) == [50, 50, 50]


def kept_with_norms(model, norms):
    statistics = statistics_of(model, {"input_norms"})
    for name in statistics.shapes:
        statistics.state_dict()[f"{name}.input_norms"].copy_(norms.square())
    return [
        int(mask.sum()) for mask in compute_masks(model, "owl", 0.5, statistics=statistics).values()
    ]


def hill_exponent(weight) -> float:
    """From singular values, one by one."""
    eigenvalues = sorted(value**2 for value in torch.linalg.svdvals(weight).tolist())
    tail = eigenvalues[len(eigenvalues) // 2 :]
    return 1 + len(tail) / sum(np.log(value / tail[0]) for value in tail)


@pytest.mark.parametrize("sparsity", [0.3, 0.65])
def test_alpha_prunes_in_proportion_to_08_to_12_along_the_exponents(sparsity):
    for model in small_models(10):
        n, budget = sizes_and_budget(model, sparsity)
        exponents = np.array(
            [hill_exponent(weight.detach()) for weight in prunable_weights(model).values()]
        )
        relative = 0.8 + 0.4 * (exponents - exponents.min()) / (exponents.max() - exponents.min())
        pruned = relative * (sum(n) - budget) / sum(relative * n)
        found = np.array(kept(model, "alpha", sparsity))
        assert abs(found - (1 - pruned) * n).max() < 1.01
        assert found.sum() == budget


def test_alpha_keeps_more_of_a_layer_with_a_heavier_tail():
    random = np.random.RandomState(0)
    light, heavy = random.standard_normal((2, 40, 40))
    heavy += 40 * np.outer(random.standard_normal(40), random.standard_normal(40)) / 40
    heavy += np.diag(random.pareto(1, 40))
    assert kept(linears(torch.from_numpy(light), torch.from_numpy(heavy)), "alpha", 0.5) == [
        640,
        960,
    ]


def test_alpha_prunes_most_where_there_is_no_spectrum():
    model = linears(torch.randn(10, 10), torch.zeros(10, 10), torch.eye(10))
    assert kept(model, "alpha", 0.5)[1:] == [50, 50]
    random = linears(
        torch.randn(10, 10), torch.rand(10, 10) ** 9, torch.zeros(10, 10), torch.eye(10)
    )
    counts = kept(random, "alpha", 0.5)
    assert counts[2] == counts[3] == min(counts) < max(counts)


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2"])
def test_cap_keeps_what_costs_most_to_remove_over_all_layers_whatever_score_chooses_within(
    sparsity, pattern
):
    random = np.random.RandomState(0)
    model = linears(
        *(random.standard_normal(shape) * scale for shape, scale in (((8, 6), 1), ((4, 10), 3)))
    )
    statistics = statistics_of(model)
    costs = [statistics.value(name, "removal_costs") for name in statistics.shapes]
    if pattern != "unstructured":
        costs = [cost.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3)) for cost in costs]
    budget = round(sum(cost.numel() for cost in costs) * (1 - sparsity))
    threshold = (
        torch.cat([cost.flatten() for cost in costs]).sort(descending=True).values[budget - 1]
    )
    expected = [int((cost >= threshold).sum()) for cost in costs]
    weights = 1 if pattern == "unstructured" else 4
    for score in ("magnitude", "wanda", "cap"):
        masks = compute_masks(
            model, "cap", sparsity, score=score, pattern=pattern, statistics=statistics
        )
        assert [int(mask.sum()) // weights for mask in masks.values()] == expected
    of_glob = compute_masks(
        model, "glob", sparsity, score="cap", pattern=pattern, statistics=statistics
    )
    assert all(torch.equal(mask, of_glob[name]) for name, mask in masks.items())


@pytest.mark.parametrize("pruner", ["owl", "alpha"])
@pytest.mark.parametrize("sparsity", [0.001, 0.03, 0.95, 0.99, 0.999])
def test_densities_out_of_range_stop_at_one_weight_and_at_all(pruner, sparsity):
    for model in small_models(5, seed=1):
        n, budget = sizes_and_budget(model, sparsity)
        found = np.array(kept(model, pruner, sparsity))
        assert found.sum() == budget
        assert (found <= n).all()
        assert (found >= np.minimum(1, np.arange(len(n)) < budget)).all()


# ---- unusual weights ----


@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_all_zero_and_one_weight_layers_are_shared_out_like_any_other(pruner):
    model = linears(torch.randn(4, 4), torch.zeros(4, 4), torch.randn(1, 1), torch.randn(4, 4))
    masks = masks_of(model, pruner, 0.3)
    assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(49 * 0.7, abs=2)


@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_a_model_of_zeros_keeps_its_budget(pruner):
    assert sum(kept(linears(*[torch.zeros(10, 10)] * 4), pruner, 0.25)) == 300


@pytest.mark.parametrize("pruner", AUTOMATIC)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer(pruner, value):
    model = linears(*[torch.randn(4, 4) for _ in range(3)])
    with torch.no_grad():
        model[1].weight[2, 3] = value
    with pytest.raises(PruningError, match=r"^1\.weight .*NaN or infinite"):
        masks_of(model, pruner, 0.2)


@pytest.mark.parametrize("pruner", AUTOMATIC)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_compared_in_float32(pruner, dtype):
    halves = linears(*[torch.randn(16, 16).to(dtype) for _ in range(3)])
    floats = copy.deepcopy(halves).float()
    expected = masks_of(floats, pruner, 0.3)
    for name, mask in masks_of(halves, pruner, 0.3).items():
        assert torch.equal(mask, expected[name])


def test_float64_weights_keep_their_precision_beside_float32_ones():
    model = linears(
        torch.tensor([[1.0, 1.0]]), torch.tensor([[1 + 1e-12, 1 - 1e-12]], dtype=torch.float64)
    )
    assert [mask.tolist() for mask in compute_masks(model, "glob", 0.5).values()] == [
        [[True, False]],
        [[True, False]],
    ]


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_lamp_does_not_depend_on_the_scale_of_a_layer_even_an_extreme_one(scale):
    weights = [torch.randn(8, 8, dtype=torch.float64) for _ in range(2)]
    # A power of two, so that the scaled weights have the same digits.
    scaled = [weights[0], weights[1] * 2.0 ** round(np.log2(scale))]
    assert kept(linears(*weights), "lamp", 0.5) == kept(linears(*scaled), "lamp", 0.5)


@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_non_contiguous_weights_get_the_masks_of_their_contiguous_copies(pruner):
    model = linears(*[torch.randn(6, 10).T for _ in range(3)])
    assert not model[0].weight.is_contiguous()
    expected = masks_of(
        linears(*[layer.weight.detach().contiguous() for layer in model]), pruner, 0.3
    )
    for name, mask in masks_of(model, pruner, 0.3).items():
        assert torch.equal(mask, expected[name])


@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_the_model_is_not_changed_and_sparsity_zero_keeps_everything(pruner):
    model = linears(*[torch.randn(5, 7) for _ in range(3)])
    before = copy.deepcopy(model.state_dict())
    assert all(
        mask.all() and mask.dtype == torch.bool for mask in masks_of(model, pruner, 0).values()
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- real architectures ----

ARCHITECTURES = {
    "deit_tiny_patch16_224": (8, {"embed_dim": 24, "depth": 2}),
    "deit_tiny_distilled_patch16_224": (8, {"embed_dim": 24, "depth": 2}),
    "deit3_small_patch16_224": (8, {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    # attention of CaiT: qkv, proj_l, proj_w, proj and 2 of the MLP; with the class token: q, k, v,
    # proj and 2
    "cait_xxs24_224": (2 * 6 + 2 * 6, {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    # two stages of one block each, and the reduction between them
    "swin_tiny_patch4_window7_224": (
        2 * 4 + 1,
        {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_vision_transformer_is_pruned_except_its_classifier(name):
    count, size = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **size)
    weights = prunable_weights(model)
    assert len(weights) == count
    assert not any("head" in name or "patch_embed" in name for name in weights)
    total = sum(weight.numel() for weight in weights.values())
    for pruner in AUTOMATIC:
        masks = masks_of(model, pruner, 0.4)
        assert list(masks) == list(weights)
        assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(
            0.6 * total, abs=len(masks)
        )


# ---- requests that cannot be met ----


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"pruner": "lump", "sparsity": 0.5},
            "pruner 'lump': expected one of lamp, glob, .*owl, alpha, cap, search, custom",
        ),
        (
            {"pruner": "lamp", "sparsity": 0.5, "score": "size"},
            "score 'size': expected one of magnitude",
        ),
        ({"pruner": "lamp"}, "pruner lamp needs sparsity as well"),
        *(
            ({"pruner": "lamp", "sparsity": s}, r"expected a number in \[0, 1\)")
            for s in (1, 1.0, -0.1, float("nan"), float("inf"), True, False, "0.5", [0.5], 1j)
        ),
        ({"pruner": "custom"}, "pruner custom needs custom_config as well"),
        (
            {"pruner": "custom", "sparsity": 0.5, "custom_config": {}},
            "sparsity 0.5: expected none with pruner custom",
        ),
        (
            {"pruner": "lamp", "sparsity": 0.5, "custom_config": {}},
            "custom_config needs pruner custom, got lamp",
        ),
        (
            {"pruner": "lamp", "sparsity": 0.5, "pattern": "2:4"},
            "sparsity 0.5: expected none with pattern 2:4",
        ),
        (
            {"pruner": "unif", "sparsity": 0.5, "pattern": "2:4"},
            "sparsity 0.5: expected none with pattern 2:4, which sets it",
        ),
        (
            {"pruner": "lamp", "pattern": "2:4"},
            "pruner 'lamp': expected unif with pattern 2:4, which prunes every layer alike",
        ),
        ({"pruner": "lamp", "pattern": "x:4"}, "pruner lamp needs sparsity as well"),
        (
            {"pruner": "lamp", "sparsity": 0.5, "pattern": "4:2"},
            "pattern '4:2': expected n:m with 1 <= n <= m",
        ),
        (
            {"pruner": "custom", "custom_config": {}, "pattern": "2:4"},
            "pattern '2:4': expected none with pruner custom, whose YAML sets the patterns",
        ),
        (
            {"pruner": "custom", "custom_config": {}, "pattern": "row"},
            "pattern 'row': expected none",
        ),
        (
            {"pruner": "owl", "sparsity": 0.5},
            "pruner owl looks at data: expected statistics with input_norms",
        ),
        ({"pruner": "unifplus", "sparsity": 0.5}, "expected a sparsity of less than 0.3333"),
    ],
)
def test_a_request_that_cannot_be_met_is_a_one_line_error(request_, message):
    with pytest.raises(PruningError, match=message) as error:
        compute_masks(linears(*[torch.randn(2, 2)] * 3), **request_)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("request_", "is_met"),
    [
        (("lamp", 0.5), True),
        (("lamp", 0.5, None, "obs"), True),  # statistics come later
        (("lump", 0.5), False),
        (("lamp", 0.5, None, "size"), False),
        (("lamp", 1.0), False),
        (("custom", None, "missing.yaml"), True),  # so does the file
    ],
)
def test_a_request_is_checked_before_there_is_a_model(request_, is_met):
    if is_met:
        return check_request(*request_)
    with pytest.raises(PruningError):
        check_request(*request_)


def test_what_a_request_needs_is_that_of_its_allocation_and_score():
    assert needs_of("lamp") == set()
    assert needs_of("owl") == {"input_norms"}
    assert needs_of("owl", "fisher") == {"input_norms", "squared_gradient"}
    assert needs_of(None, "obs") == {"gram"}


def test_every_allocation_describes_itself_in_one_line():
    for name, allocation in PRUNERS.items():
        line, source, _ = describe(allocation)
        assert line[-1] in ".:" and (source or name in ("unif", "glob", "custom"))


def test_unifplus_without_a_middle_layer_can_only_be_dense():
    model = linears(torch.randn(2, 2), torch.randn(2, 2))
    assert kept(model, "unifplus", 0) == [4, 4]
    with pytest.raises(PruningError, match="expected a sparsity of 0,"):
        kept(model, "unifplus", 0.1)


def test_a_model_without_prunable_weights_is_an_error():
    with pytest.raises(PruningError, match="no prunable weights"):
        compute_masks(nn.Conv2d(3, 3, 3), "lamp", 0.5)


def test_a_pruner_that_keeps_more_or_less_than_there_is_is_refused(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4))
    for kept in (-1, 17, None):
        monkeypatch.setitem(
            PRUNERS, "mine", lambda scores, sparsity, kept=kept: dict.fromkeys(scores, kept)
        )
        with pytest.raises(PruningError, match="pruner mine keeps .* of 0.weight"):
            compute_masks(model, "mine", 0.5)


@pytest.mark.parametrize("pattern", ["unstructured", "x:4", "heads+neurons"])
def test_only_the_chosen_layers_have_masks_and_the_sparsity_is_theirs(pattern):
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=3, num_classes=5
    )
    masks = compute_masks(model, "unif", 0.5, pattern=pattern, layers=["blocks.*", "!blocks.0.*"])
    weights = {name: mask for name, mask in masks.items() if mask.dim() == 2}
    assert [name for name in weights if name in prunable_weights(model)] == [
        f"blocks.{block}.{layer}.weight"
        for block in (1, 2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    total = sum(mask.numel() for mask in weights.values())
    assert sum(int(mask.sum()) for mask in weights.values()) <= round(0.5 * total)
