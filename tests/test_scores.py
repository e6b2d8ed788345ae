"""Each score against its formula, written out as loops over the weights in float64."""

import math

import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import linears, statistics_of
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsity_factory import (
    SCORES,
    STATISTICS,
    PruningError,
    compute_masks,
    describe,
    parse_pattern,
    prunable_weights,
)
from sparsity_factory.damping import DAMPING, damped_gram
from sparsity_factory.scores import Layer, Scores

DRAWN = [0.668705, 0.408056, 0.541732]


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (7, 5), (9, 6))
    return linears(
        *(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    )


def by_loops(formula, weight) -> torch.Tensor:
    outputs, inputs = weight.shape
    return torch.tensor(
        [[formula(i, j) for j in range(inputs)] for i in range(outputs)], dtype=weight.dtype
    )


def slow(score, weight, known) -> torch.Tensor:
    """The table of scores, word for word."""
    w = weight.tolist()
    if score == "magnitude":
        return by_loops(lambda i, j: abs(w[i][j]), weight)
    if score in ("snip", "taylor"):
        g = known("first_gradient" if score == "snip" else "gradient").tolist()
        return by_loops(lambda i, j: abs(w[i][j] * g[i][j]), weight)
    if score == "taylor-group":
        g = known("gradient").tolist()
        return by_loops(lambda i, j: (w[i][j] * g[i][j]) ** 2, weight)
    if score == "fisher":
        g2 = known("squared_gradient").tolist()
        return by_loops(lambda i, j: w[i][j] ** 2 * g2[i][j], weight)
    if score == "gate":
        column = [sum(map(abs, weights)) for weights in zip(*w, strict=True)]
        of_gate = known("gate_gradient").tolist()
        return by_loops(lambda i, j: abs(w[i][j]) / column[j] * of_gate[j], weight)
    if score == "wanda":
        norm = known("input_norms").tolist()
        return by_loops(lambda i, j: abs(w[i][j]) * norm[j], weight)
    if score == "ria":
        norm = known("input_norms").tolist()
        row = [sum(map(abs, weights)) for weights in w]
        column = [sum(map(abs, weights)) for weights in zip(*w, strict=True)]
        return by_loops(
            lambda i, j: (abs(w[i][j]) / column[j] + abs(w[i][j]) / row[i]) * math.sqrt(norm[j]),
            weight,
        )
    gram = known("gram")
    mean = sum(gram[j, j].item() for j in range(len(gram))) / len(gram)
    inverse = torch.linalg.inv(
        gram + DAMPING * mean * torch.eye(len(gram), dtype=torch.float64)
    ).tolist()
    return by_loops(lambda i, j: w[i][j] ** 2 / inverse[j][j], weight)


# See test_removal_costs.py
@pytest.mark.parametrize("score", [name for name in SCORES if name not in ("random", "cap")])
def test_a_score_is_its_formula(model, score):
    statistics = statistics_of(model)
    scores = Scores(prunable_weights(model), SCORES[score], statistics=statistics)
    for name, weight in prunable_weights(model).items():
        expected = slow(
            score, weight.detach(), lambda need, name=name: statistics.value(name, need)
        )
        torch.testing.assert_close(scores[name], expected, rtol=1e-12, atol=0)


def test_random_scores_are_uniform_and_depend_on_seed_and_layer_only():
    weight = torch.zeros(100, 100)
    first = SCORES["random"](weight, Layer("a.weight", 3))
    assert torch.equal(first, SCORES["random"](torch.ones(100, 100), Layer("a.weight", 3)))
    assert not torch.equal(first, SCORES["random"](weight, Layer("a.weight", 4)))
    assert not torch.equal(first, SCORES["random"](weight, Layer("b.weight", 3)))
    deciles = torch.histc(first, 10, 0, 1)
    assert (deciles - 1000).abs().max() < 120  # four standard deviations
    drawn = SCORES["random"](torch.zeros(1, 3), Layer("a.weight", 3)).tolist()[0]
    assert drawn == pytest.approx(DRAWN)  # on every machine


@settings(max_examples=examples(50))
@given(st.data())
def test_scores_are_finite_and_non_negative_also_of_zeros_and_dead_inputs(data):
    dtype = data.draw(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    )
    weight = torch.randn(
        4, 6, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ).to(dtype)
    weight[data.draw(st.sampled_from([[], [1], [0, 1, 2, 3]]))] = 0
    weight[:, data.draw(st.sampled_from([[], [2, 3]]))] = 0
    model = linears(weight)
    statistics = statistics_of(model)
    dead = data.draw(st.sampled_from([[], [0, 2], list(range(6))]))
    state = statistics.state_dict()
    state["0.weight.input_norms"][dead] = 0
    state["0.weight.gram"][dead] = state["0.weight.gram"][:, dead] = 0
    for name, score in SCORES.items():
        found = Scores(prunable_weights(model), score, statistics=statistics, seed=1)["0.weight"]
        assert found.isfinite().all() and (found >= 0).all(), name
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.shape == weight.shape
        if name in ("wanda", "ria", "obs"):
            assert not found[:, dead].any()


def test_a_score_that_is_too_large_is_an_error_that_names_layer_and_score():
    model = linears(torch.full((2, 2), 1e30))
    with pytest.raises(
        PruningError,
        match=r"^0\.weight has a fisher score that is NaN or infinite in torch.float32",
    ):
        compute_masks(model, "glob", 0.5, score="fisher", statistics=statistics_of(model))


# obs looks at whether a matrix can be factored, and a fake tensor has no values
@pytest.mark.parametrize("score", [name for name in SCORES if name != "obs"])
def test_scores_lie_where_the_weights_do(score):
    class Moved:
        """Statistics on the CPU of a model that has moved to a GPU since."""

        def value(self, name, need):
            return torch.empty(
                {"input_norms": (6,), "gate_gradient": (6,), "gram": (6, 6)}.get(need, (4, 6)),
                dtype=torch.float64,
            )

    with FakeTensorMode():
        weight = torch.empty(4, 6, device="cuda")
        found = SCORES[score](weight, Layer("0.weight", 0, Moved(), weight.device))
        assert (found.device, found.dtype, found.shape) == (
            weight.device,
            weight.dtype,
            weight.shape,
        )


# ---- what a score needs ----


@pytest.mark.parametrize("score", SCORES)
def test_a_score_looks_at_what_it_needs_and_nothing_else(model, score):
    needs = describe(SCORES[score]).needs
    scores = Scores(prunable_weights(model), SCORES[score], statistics=statistics_of(model, needs))
    assert scores["0.weight"].isfinite().all()
    for need in needs:
        scores = Scores(
            prunable_weights(model), SCORES[score], statistics=statistics_of(model, needs - {need})
        )
        with pytest.raises(PruningError, match=f"the statistics lack {need}"):
            scores["0.weight"]


@pytest.mark.parametrize("score", [name for name in SCORES if describe(SCORES[name]).needs])
def test_a_score_that_looks_at_data_says_what_it_misses(model, score):
    (need,) = describe(SCORES[score]).needs
    others = STATISTICS.keys() - {need}
    other_model = linears(torch.ones(5, 7, dtype=torch.float64))
    for statistics, message in (
        (None, f"^score {score} looks at data: expected statistics with {need}$"),
        (statistics_of(model, others), f"^score {score} needs {need}: the statistics hold "),
        (statistics_of(other_model), "^the statistics are of another model: 1.weight "),
    ):
        with pytest.raises(PruningError, match=message):
            compute_masks(model, "lamp", 0.5, score=score, statistics=statistics)


def test_statistics_of_a_model_that_moved_are_used_where_its_weights_are(model):
    statistics = statistics_of(model)
    expected = compute_masks(model, "lamp", 0.5, score="taylor", statistics=statistics)
    masks = compute_masks(model.float(), "lamp", 0.5, score="taylor", statistics=statistics)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


def test_a_signed_score_is_refused_by_the_name_of_its_layer(monkeypatch):
    def signed(weight, layer):
        return weight if layer.name == "1.weight" else weight.abs()

    monkeypatch.setitem(SCORES, "signed", signed)
    model = linears([[1.0, 2.0]], [[1.0, -2.0]])
    for pruner in ("glob", "lamp", "unif"):
        with pytest.raises(
            PruningError, match=r"^1\.weight has a signed score that is -2: expected"
        ):
            compute_masks(model, pruner, 0.5, score="signed")


def test_a_block_scores_the_square_of_its_sum_under_taylor_group():
    model = linears([[1.0, 1.0, 3.0, -3.0], [2.0, 2.0, 5.0, -4.0]])
    statistics = statistics_of(model, {"gradient"})
    statistics.state_dict()["0.weight.gradient"].fill_(20)  # of 20 images
    weights = prunable_weights(model)
    score = SCORES["taylor-group"]
    blocks = Scores(weights, score, parse_pattern("block:2x2"), statistics)
    torch.testing.assert_close(blocks["0.weight"], torch.tensor([[36.0, 1.0]]))
    left = {"0.weight": torch.tensor([[False, False, True, True]]).repeat(2, 1)}
    blocks = Scores(weights, score, parse_pattern("block:2x2"), statistics, among=left)
    torch.testing.assert_close(blocks["0.weight"], torch.tensor([[0.0, 1.0]]))


def test_a_negative_zero_scores_as_zero(monkeypatch):
    monkeypatch.setitem(SCORES, "zeros", lambda weight, layer: -0.0 * weight.abs())
    masks = compute_masks(linears([[1.0, 2.0], [3.0, 4.0]]), "glob", 0.5, score="zeros")
    assert masks["0.weight"].tolist() == [[True, True], [False, False]]


def test_obs_as_a_score_has_the_damping_of_obs_as_a_reconstruction():
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = inputs.T @ inputs
    gram[:, 1] = gram[1] = 0  # dead
    _, factor = damped_gram(gram)
    model = linears(torch.ones(1, 4))
    statistics = statistics_of(model, {"gram"})
    statistics.state_dict()["0.weight.gram"].copy_(gram)
    score = Scores(prunable_weights(model), SCORES["obs"], statistics=statistics)["0.weight"][0]
    expected = 1 / factor.square().sum(0)
    expected[1] = 0
    torch.testing.assert_close(score.double(), expected, rtol=1e-6, atol=0)


def test_obs_as_a_score_raises_its_damping_until_the_matrix_can_be_factored(caplog):
    # Rounding has made an eigenvalue negative
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    model = linears(torch.ones(1, 2))
    statistics = statistics_of(model, {"gram"})
    statistics.state_dict()["0.weight.gram"].copy_(gram)
    score = Scores(prunable_weights(model), SCORES["obs"], statistics=statistics)["0.weight"]
    assert (score > 0).all()
    assert "its damping is raised to 0.1" in caplog.text


def test_every_entry_describes_itself_in_one_line():
    for name, score in SCORES.items():
        line, source, needs = describe(score)
        assert line and source or name in ("magnitude", "random")
        assert needs <= STATISTICS.keys()
