"""The masks that `sparsity_factory.patterns` makes from scores."""

from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import linears, statistics_of
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsity_factory import (
    PATTERNS,
    PRUNERS,
    SCORES,
    PruningError,
    compute_masks,
    describe,
    needs_of,
    parse_pattern,
    prunable_weights,
    regrow,
)
from sparsity_factory.errors import warn_once
from sparsity_factory.knapsack import nearest_steps
from sparsity_factory.patterns import PAIRWISE_UP_TO, n_of_m
from sparsity_factory.scores import Scores

# Many ties, several in one bin
few_values = st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.001, 1.002, 3.0, 1e30])


@given(st.data())
def test_n_of_m_keeps_the_n_largest_and_the_earlier_of_equals_in_every_group(data):
    m = data.draw(st.sampled_from([1, 2, 3, 4, 8, PAIRWISE_UP_TO, PAIRWISE_UP_TO + 1]))
    n = data.draw(st.integers(1, m))
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    values = data.draw(st.lists(few_values, min_size=rows * groups * m, max_size=rows * groups * m))
    score = torch.tensor(values).view(rows, groups * m)
    mask = n_of_m(score, n, m)
    for group, kept in zip(score.view(-1, m).tolist(), mask.view(-1, m), strict=True):
        best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
        assert kept.nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("m", [4, 64])
def test_n_of_m_groups_along_the_input_dimension_of_a_transposed_score(m):
    score = torch.randn(128, 6, generator=torch.Generator().manual_seed(0)).abs().T
    mask = n_of_m(score, 1, m)
    assert mask.shape == (6, 128)
    assert torch.equal(mask, n_of_m(score.contiguous(), 1, m))
    assert (mask.reshape(-1, m).sum(1) == 1).all()


@pytest.mark.parametrize("values", ["random", "tied"])
@pytest.mark.parametrize(("n", "count"), [(1, 24), (2, 90), (3, 24), (4, 1)])
def test_a_transposable_mask_has_the_largest_sum_of_all_and_the_first_one_on_a_tie(
    n, count, values
):
    generator = torch.Generator().manual_seed(n)
    score = (
        torch.rand(12, 8, generator=generator)
        if values == "random"
        else torch.randint(3, (12, 8), generator=generator).float()
    )
    # Those of earlier weights first
    everything = torch.tensor(list(product([True, False], repeat=16))).view(-1, 4, 4)
    allowed = everything[(everything.sum(1) == n).all(1) & (everything.sum(2) == n).all(1)]
    assert len(allowed) == count
    mask = parse_pattern(f"{n}:4t").mask(score, 12 * 8 * n // 4)
    assert (mask.view(-1, 4).sum(1) == n).all() and (mask.T.reshape(-1, 4).sum(1) == n).all()
    for row, column in product(range(0, 12, 4), range(0, 8, 4)):
        block = slice(row, row + 4), slice(column, column + 4)
        sums = [score[block].double()[kept].sum().item() for kept in allowed]
        assert torch.equal(mask[block], allowed[sums.index(max(sums))])


# ---- every pattern with every score and allocation, against slow definitions ----

SHAPES = ((4, 8), (8, 16), (12, 8), (4, 8))
AUTOMATIC = [name for name in PRUNERS if name != "custom"]


def random_model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return linears(
        *(torch.randn(shape, generator=generator) * (1 + i) for i, shape in enumerate(SHAPES))
    )


def chosen(model, pruner, sparsity, pattern, score="magnitude"):
    """Masks, and beside them the scores that they were made from."""
    statistics = statistics_of(model, needs_of(pruner, score)) if needs_of(pruner, score) else None
    masks = compute_masks(
        model, pruner, sparsity, score=score, pattern=pattern, statistics=statistics
    )
    scores = Scores(prunable_weights(model), SCORES[score], statistics=statistics)
    if scores.signed and pattern.startswith("block"):
        weights = prunable_weights(model)
        return [
            (masks[name], SCORES[score](weights[name].detach(), scores.layer(name)))
            for name in masks
        ]
    return [(masks[name], scores[name]) for name in masks]


def largest(values, k) -> set[int]:
    """The places of the k largest, on a tie the earlier ones."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def keeps_the_largest_of_every(m, mask, score, n):
    for kept, values in zip(mask.reshape(-1, m), score.reshape(-1, m).tolist(), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == largest(values, n)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_x_of_m_and_rows_keep_the_same_number_in_every_group_and_no_more_than_the_budget(
    pruner, score
):
    for pattern, sparsity in (("x:4", 0.55), ("row", 0.55), ("x:8", 0.3)):
        found = chosen(random_model(), pruner, sparsity, pattern, score)
        steps = []
        for mask, scores in found:
            m = mask.shape[1] if pattern == "row" else int(pattern[2:])
            n, rest = divmod(int(mask.sum()) * m, mask.numel())
            assert rest == 0 and 1 <= n <= m
            keeps_the_largest_of_every(m, mask, scores, n)
            steps += [mask.numel() // m] * (n < m)
        budget = round(sum(map(prod, SHAPES)) * (1 - sparsity))
        total = sum(int(mask.sum()) for mask, _ in found)
        # One more of any group would be too many
        assert budget - min(steps) < total <= budget


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_blocks_are_kept_whole_and_those_of_the_largest_sums(pruner, score):
    found = chosen(random_model(), pruner, 0.5, "block:2x4", score)
    counts = []
    for mask, scores in found:
        rows, columns = mask.shape[0] // 2, mask.shape[1] // 4
        blocks = [(r, c) for r in range(rows) for c in range(columns)]
        sums = [
            scores[2 * r : 2 * r + 2, 4 * c : 4 * c + 4].double().sum().float().item()
            for r, c in blocks
        ]
        if getattr(SCORES[score], "signed", False):
            sums = [total**2 for total in sums]
        kept = {i for i, (r, c) in enumerate(blocks) if mask[2 * r, 4 * c]}
        assert mask.sum() == 8 * len(kept)
        assert all(
            mask[2 * r : 2 * r + 2, 4 * c : 4 * c + 4].all()
            for i, (r, c) in enumerate(blocks)
            if i in kept
        )
        assert kept == largest(sums, len(kept))
        counts.append((sums, len(kept)))
    if pruner == "glob":  # what a model with the sums as its weights would keep
        sums = [sum_ for sums, _ in counts for sum_ in sums]
        best = largest(sums, round(len(sums) * 0.5))
        ends = np.cumsum([0, *(len(sums) for sums, _ in counts)])
        assert [kept for _, kept in counts] == [
            sum(start <= i < end for i in best) for start, end in zip(ends, ends[1:], strict=False)
        ]
    if pruner not in ("unif", "unifplus", "erk"):
        assert sum(kept for _, kept in counts) == round(sum(map(prod, SHAPES)) / 8 * 0.5)


@pytest.mark.parametrize("score", SCORES)
def test_n_of_m_is_the_same_in_every_layer_and_takes_no_sparsity(score):
    for mask, scores in chosen(random_model(), "unif", None, "2:4", score):
        keeps_the_largest_of_every(4, mask, scores, 2)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pruner", AUTOMATIC)
def test_without_a_pattern_the_largest_scores_of_a_layer_are_kept(pruner, score):
    for mask, scores in chosen(random_model(), pruner, 0.6, "unstructured", score):
        kept = int(mask.sum())
        assert set(mask.flatten().nonzero().flatten().tolist()) == largest(
            scores.flatten().tolist(), kept
        )


@pytest.mark.parametrize("score", SCORES)
def test_a_custom_configuration_gives_patterns_by_layer_with_every_score(score):
    model = random_model()
    config = {"sparsity": {"mode": "nxm", "level": [[2, 4], [1, 4], 0.25, "dense"]}}
    statistics = statistics_of(model)
    masks = compute_masks(model, "custom", custom_config=config, score=score, statistics=statistics)
    scores = Scores(prunable_weights(model), SCORES[score], statistics=statistics)
    keeps_the_largest_of_every(4, masks["0.weight"], scores["0.weight"], 2)
    keeps_the_largest_of_every(4, masks["1.weight"], scores["1.weight"], 1)
    keeps_the_largest_of_every(96, masks["2.weight"], scores["2.weight"], 72)
    assert masks["3.weight"].all()


# ---- whole n under a budget ----


@settings(max_examples=examples(100))
@given(st.data())
def test_whole_steps_come_as_near_to_the_budget_as_any_do_and_then_as_near_to_what_is_wanted(data):
    m = data.draw(st.integers(1, 6))
    step = np.array(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    wanted = np.array([data.draw(st.integers(0, int(s) * m)) for s in step])
    # As an allocation that rounds in each layer
    rounded = data.draw(st.integers(-len(step), len(step)))
    budget = int(np.clip(wanted.sum() + rounded, step.sum(), step.sum() * m))
    found = nearest_steps(wanted, step, np.full(len(step), m), budget)
    assert all(1 <= n <= m for n in found)
    ways = [way for way in product(range(1, m + 1), repeat=len(step)) if way @ step <= budget]
    whole = wanted == step * m
    # What is wanted dense stays so
    ways = [way for way in ways if (np.array(way)[whole] == m).all()] or ways
    assert found @ step == max(way @ step for way in ways)
    fits = (wanted >= step).all() and wanted.sum() == budget
    if fits:  # then the share of each layer is what it wants

        def distance(way):
            return sum(step * (np.array(way) - wanted / step) ** 2)

        nearest = min(distance(way) for way in ways if way @ step == found @ step)
        assert distance(found) == pytest.approx(nearest, rel=1e-6, abs=1e-6)


def test_layers_that_are_alike_differ_by_one_step_at_most_and_the_earlier_keep_more():
    model = linears(*[torch.randn(4, 8)] * 5)
    masks = compute_masks(model, "unif", 0.6, pattern="x:4").values()
    assert [int(mask.sum()) // 8 for mask in masks] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("pattern", ["x:4", "row"])
def test_layers_that_the_allocation_keeps_dense_stay_dense_though_others_would_come_nearer_to_the_budget(
    pattern,
):
    first, *_, last = (mask for mask, _ in chosen(random_model(), "unifplus", 0.55, pattern))
    assert first.all() and last.all()


def test_many_layers_of_unlike_sizes_are_fitted_in_no_time_and_closely():
    random = np.random.RandomState(0)
    # A row of each, of sizes that have no divisor in common
    step = random.randint(500, 5000, 60)
    most = random.randint(300, 3000, 60)
    budget = int(step @ most * 0.35)
    found = nearest_steps((step * most * 0.35).astype(int), step, most, budget)
    assert budget * (1 - 1e-5) <= found @ step <= budget
    assert abs(found - most * 0.35).max() < 10


@pytest.mark.parametrize("pattern", ["x:4", "row"])
def test_as_many_are_pruned_as_one_of_every_group_allows_and_no_more(pattern):
    model = linears(torch.randn(4, 8), torch.randn(8, 4))
    limit = {"x:4": 0.75, "row": 1 - 12 / 64}[pattern]
    assert all(
        (mask.reshape(-1, 4 if pattern == "x:4" else mask.shape[1]).sum(1) == 1).all()
        for mask in compute_masks(model, "lamp", limit, pattern=pattern).values()
    )
    with pytest.raises(
        PruningError, match=f"pattern {pattern} keeps at least one of .* sparsity of at most 0.[78]"
    ):
        compute_masks(model, "lamp", limit + 0.02, pattern=pattern)


@pytest.mark.parametrize("pattern", ["x:4", "row", "block:2x2", "unstructured"])
@pytest.mark.parametrize("pruner", [name for name in AUTOMATIC])
def test_sparsity_zero_keeps_everything(pruner, pattern):
    assert all(mask.all() for mask, _ in chosen(random_model(), pruner, 0, pattern))


# ---- names ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (
                name,
                "unknown pattern .*expected unstructured, row, n:m such as 2:4, n:mt such as "
                "2:4t, x:m .* heads",
            )
            for name in (
                "2:",
                ":4",
                "x:",
                "2:4:8",
                "-1:4",
                "rows",
                "",
                "block",
                "block:16",
                "block:16x",
                "block:1x2x3",
                "n:m",
                "2.0:4",
                "2:4T",
                "x:4t",
                " 2:4",
                "x:4\n",
                None,
                4,
                "a" * 500,
            )
        ),
        ("5:4", "pattern '5:4': expected n:m with 1 <= n <= m"),
        ("0:4", "pattern '0:4': expected n:m with 1 <= n <= m"),
        ("0:0", "pattern '0:0'"),
        ("5:4t", "pattern '5:4t': expected n:mt with 1 <= n <= m"),
        ("4:8t", "pattern '4:8t': expected n:mt with m of at most 4"),
        ("x:0", "pattern 'x:0': expected x:m with m of at least 1"),
        ("block:0x4", "pattern 'block:0x4': expected block:RxC with R and C of at least 1"),
        ("block:4x0", "pattern 'block:4x0'"),
    ],
)
def test_a_name_that_is_no_pattern_is_a_one_line_error(name, message):
    with pytest.raises(PruningError, match=message) as error:
        parse_pattern(name)
    assert len(str(error.value)) < 300 and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("pattern", ["3:5", "x:5", "2:3t", "block:4x5", "block:3x4", "2:999999999"])
def test_a_pattern_that_fits_no_layer_names_one(pattern):
    model = linears(torch.randn(4, 8), torch.randn(7, 8))
    with pytest.raises(PruningError, match=rf"^pattern {pattern}: expected .*0.weight \(4 x 8\)$"):
        compute_masks(model, "unif", None if pattern[0] in "23" else 0.5, pattern=pattern)


@pytest.mark.parametrize("pattern", ["3:5", "x:5", "2:3t", "block:4x5", "block:3x4"])
def test_a_layer_that_no_group_fits_stays_dense_and_is_named(pattern, caplog):
    model = linears(torch.randn(60, 60), torch.randn(4, 8), torch.randn(60, 60))
    sparsity = None if pattern[0] in "23" else 0.5
    warn_once.cache_clear()
    for _ in range(2):
        masks = (
            compute_masks(model, "erk", sparsity, pattern=pattern)
            if sparsity
            else (compute_masks(model, "unif", pattern=pattern))
        )
    assert list(masks) == ["0.weight", "1.weight", "2.weight"] and masks["1.weight"].all()
    (warned,) = caplog.messages
    assert warned == f"pattern {pattern} leaves layers dense that it does not fit: 1.weight"
    assert not masks["0.weight"].all() and not parse_pattern(pattern).why_not(masks)
    if sparsity:
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert 3616 - 720 <= kept <= 3616 + 20  # half of 7,232, in whole groups or blocks
        with pytest.raises(PruningError, match="fits 7,200 of 7,232 weights: .* less than 0.9955"):
            compute_masks(model, "unif", 0.999, pattern=pattern)


def test_every_pattern_describes_itself_in_one_line():
    assert list(PATTERNS) == [
        "unstructured",
        "row",
        "n:m",
        "n:mt",
        "x:m",
        "block:RxC",
        "heads",
        "neurons",
        "heads+neurons",
    ]
    for form, pattern in PATTERNS.items():
        line, source, _ = describe(pattern)
        assert line.endswith(".") and (source or form == "unstructured")


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [("unstructured", 16), ("row", 16), ("2:4", 16), ("2:4t", 16), ("x:4", 16), ("block:2x2", 4)],
)
def test_masks_lie_where_the_weights_do(pattern, kept):
    with FakeTensorMode():
        score = torch.empty(4, 8, device="cuda")
        pattern = parse_pattern(pattern)
        mask = pattern.mask(pattern.score(score), kept)
        assert (mask.device, mask.dtype, mask.shape) == (score.device, torch.bool, score.shape)


# ---- regrow ----


def test_regrow_by_hand():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.0, 5.0, 0.0]])
    mask = torch.tensor([[True, True, True, True, False, False]])
    growth = torch.tensor([[9.0, 4.0, 9.0, 1.0, 2.0, 4.0]])
    # Dropped are 0.0 and -1.0; grown are, of places 1, 3, 4 and 5, first 1 and then 5, both of
    # growth 4.
    assert regrow(weight, mask, growth, 2).tolist() == [[True, True, True, False, False, True]]
    assert regrow(weight, mask, growth, 1).tolist() == [[True, True, True, False, False, True]]
    assert torch.equal(regrow(weight, mask, growth, 0), mask)


@settings(max_examples=examples(100))
@given(st.data())
def test_regrow_drops_the_smallest_kept_and_grows_the_largest_of_all_others(data):
    size = data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32, torch.float64]))
    values = st.sampled_from([0.0, -1.0, 1.0, 2.0, -3.0, 6e-8])
    weight = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype)
    growth = torch.tensor(
        data.draw(st.lists(values.map(abs), min_size=size, max_size=size)), dtype=dtype
    )
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    kept = mask.nonzero().flatten().tolist()
    count = data.draw(st.integers(0, len(kept)))
    best = sorted(kept, key=lambda i: (-abs(weight[i].item()), i))
    left = set(best[: len(kept) - count])
    others = sorted(set(range(size)) - left, key=lambda i: (-growth[i].item(), i))
    expected = left | set(others[:count])
    found = regrow(weight, mask, growth, count)
    assert set(found.nonzero().flatten().tolist()) == expected
    assert found.sum() == mask.sum()


@pytest.mark.parametrize("count", [-1, 3])
def test_regrow_refuses_to_drop_what_is_not_there(count):
    with pytest.raises(PruningError, match="expected 0 to the 2 that are kept"):
        regrow(torch.ones(4), torch.tensor([True, True, False, False]), torch.ones(4), count)
