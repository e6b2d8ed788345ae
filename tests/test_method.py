"""The numbers of methods that users may set, and functions in the place of names."""

import dataclasses
import inspect
from functools import partial

import pytest
import torch
from made_up import linears, statistics_of
from torch import nn

from sparsity_factory import (
    PRUNERS,
    SCORES,
    PruningError,
    Recipe,
    Sparsifier,
    compute_masks,
    needs_of,
    obs_prune,
    parse_pattern,
    prune,
)
from sparsity_factory.damping import DAMPING, damped_gram
from sparsity_factory.layer_walk import Inputs
from sparsity_factory.method import Positive, method, options_of
from sparsity_factory.recipe import METHODS
from sparsity_factory.scores import Layer

ALL = {
    option: (choice, name, found)
    for choice, registry in METHODS.items()
    for name in registry
    for option, found in options_of(registry, name).items()
}


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 24), (24, 16), (12, 24), (16, 12))
    return linears(
        *(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    )


def densities(masks) -> torch.Tensor:
    return torch.tensor([mask.double().mean() for mask in masks.values()])


# ---- what a method declares ----


@pytest.mark.parametrize("option", ALL)
def test_the_default_of_an_option_is_the_methods_own_and_is_accepted(option):
    choice, name, found = ALL[option]
    parameter = inspect.signature(METHODS[choice][name]).parameters[found.parameter]
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert found.default == parameter.default
    assert found.default is None or found.numbers.have(found.default)
    assert option.startswith(f"{name}.") and found.line


def test_every_keyword_of_a_method_is_an_option():
    for choice, registry in METHODS.items():
        for name, entry in registry.items():
            keywords = {
                parameter.name
                for parameter in inspect.signature(entry).parameters.values()
                if parameter.kind is parameter.KEYWORD_ONLY
            }
            declared = {option.parameter for option in options_of(registry, name).values()}
            assert declared == keywords, f"{choice} {name}"


# ---- what the options do ----


@pytest.mark.parametrize("given", [None, {"owl.outlier": 5}, {"owl.lambda": 0.08}])
def test_an_option_at_its_default_changes_nothing(model, given):
    known = {"statistics": statistics_of(model, {"input_norms"})}
    plain = compute_masks(model, "owl", 0.5, **known)
    masks = compute_masks(model, "owl", 0.5, method_options=given, **known)
    assert all(torch.equal(masks[name], plain[name]) for name in plain)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3])
def test_lambda_of_owl_is_how_far_densities_may_be_from_the_target(model, spread):
    masks = compute_masks(
        model,
        "owl",
        0.5,
        statistics=statistics_of(model, {"input_norms"}),
        method_options={"owl.lambda": spread, "owl.outlier": 2},
    )
    furthest = (densities(masks) - 0.5).abs().max()
    assert furthest == pytest.approx(spread, abs=0.02)


def test_outlier_of_owl_is_from_how_many_times_the_mean_on_a_weight_is_one(model):
    """A weight of 3 among ones is above 2.5 times the mean, and not above 5 times."""
    rows = torch.ones(2, 8, 8, dtype=torch.float64)
    rows[0, :, 0] = 3
    model = linears(*rows)
    statistics = statistics_of(model, {"input_norms"})
    for total in list(statistics.state_dict().values())[1:]:
        total.fill_(1)

    def kept(outlier):
        options = {"owl.outlier": outlier}
        masks = compute_masks(model, "owl", 0.5, statistics=statistics, method_options=options)
        return [int(mask.sum()) for mask in masks.values()]

    assert kept(5) == [32, 32]
    assert kept(2.3) == [37, 27]  # 0.08 of 64 more and less


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_tau_of_alpha_is_how_far_sparsities_are_from_one_value(model, tau):
    masks = compute_masks(model, "alpha", 0.6, method_options={"alpha.tau": tau})
    sparsities = 1 - densities(masks)
    ratio = sparsities.max() / sparsities.min()
    assert ratio == pytest.approx((1 + tau) / (1 - tau), rel=0.03)


def test_power_of_ria_is_that_of_the_norms():
    weight = torch.rand(5, 7, dtype=torch.float64)
    layer = Layer("0.weight", statistics=statistics_of(linears(weight)))
    relative = weight / weight.sum(0, keepdim=True) + weight / weight.sum(1, keepdim=True)
    found = SCORES["ria"](weight, layer, power=2)
    torch.testing.assert_close(found, relative * layer.input_norms**2)
    assert torch.equal(SCORES["ria"](weight, layer, power=0.5), SCORES["ria"](weight, layer))


def test_damping_of_obs_is_that_of_score_and_reconstruction(model):
    name = "0.weight"
    statistics = statistics_of(model, {"gram"})
    layer = Layer(name, statistics=statistics)
    weight = model[0].weight.detach()
    mean = layer.gram.diagonal().mean()
    inverse = torch.linalg.inv(layer.gram + 0.5 * mean * torch.eye(24, dtype=torch.float64))

    options = {"obs.damping": 0.5}
    masks = compute_masks(
        model, "unif", 0.5, score="obs", statistics=statistics, method_options=options
    )
    costs = weight.square() / inverse.diagonal()
    largest = costs.flatten().sort(descending=True).values[191]
    assert torch.equal(masks[name], costs >= largest)

    recipe = Recipe("unif", 0.5, score="obs", reconstruct="obs", method_options=options)
    reconstruct = recipe.method("reconstruct")
    inputs = inputs_of(layer.gram)
    new, _ = reconstruct(weight, inputs, masks[name], None)
    torch.testing.assert_close(new, obs_prune(weight, layer.gram, masks[name], damping=0.5)[0])


def inputs_of(gram) -> Inputs:
    """Of a layer whose inputs have a mean of zero."""
    zero = torch.zeros(len(gram), dtype=torch.float64)
    return Inputs(gram, zero, torch.tensor(50.0), gram, zero)


def test_columns_of_obs_are_among_which_weights_compare(model):
    weight = model[0].weight.detach()
    gram = statistics_of(model, {"gram"}).value("0.weight", "gram")
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, ::2] = False
    pattern = parse_pattern("unstructured")

    recipe = Recipe("unif", 0.5, reconstruct="obs", method_options={"obs.columns": 24})
    _, found = recipe.method("reconstruct")(weight, inputs_of(gram), mask, pattern)
    _, wanted = obs_prune(weight, gram, 192, block_size=24)
    _, narrow = obs_prune(weight, gram, 192, block_size=8)
    assert torch.equal(found, wanted) and not torch.equal(found, narrow)


@pytest.mark.parametrize("option", ["search.columns=24", "search.damping=3"])
def test_search_prunes_its_levels_with_its_columns_and_damping(model, monkeypatch, option):
    name, _, value = option.partition("=")
    seen = []

    def noted(weight, gram, kept, *, block_size, factor, pattern):
        _, expected = damped_gram(gram, 3 if name == "search.damping" else DAMPING)
        seen.append((block_size, torch.equal(factor, expected)))
        return obs_prune(weight, gram, kept, block_size=block_size, factor=factor, pattern=pattern)

    monkeypatch.setattr("sparsity_factory.levels.obs_prune", noted)
    compute_masks(
        model,
        "search",
        0.5,
        pattern="x:4",
        reconstructed=True,
        statistics=statistics_of(model, {"gram", "gradient_gram"}),
        method_options={name: int(value)},
    )
    assert set(seen) == {(24 if name == "search.columns" else 8, True)}


def test_rounds_and_steps_of_least_squares_are_counted(model, monkeypatch):
    asked = []
    solve = "sparsity_factory.reconstruction._LeastSquares.solve"
    monkeypatch.setattr(solve, lambda self, start, mask, steps: asked.append(steps) or start)
    weight = model[0].weight.detach()
    mask = torch.ones_like(weight, dtype=torch.bool)
    inputs = inputs_of(statistics_of(model, {"gram"}).value("0.weight", "gram"))

    options = {"least-squares.rounds": 3, "least-squares.steps": 2, "least-squares.last-steps": 9}
    reconstruct = Recipe("unif", 0.5, reconstruct="least-squares", method_options=options).method(
        "reconstruct"
    )
    reconstruct(weight, inputs, mask, parse_pattern("unstructured"))
    assert asked == [2, 2, 2, 9]

    asked.clear()
    reconstruct(weight, inputs, mask, None)
    assert asked == [9]


@pytest.mark.parametrize("exponent", [1, 3, 5.5])
def test_the_exponent_of_gradual_is_that_of_what_is_left(exponent):
    recipe = Recipe(
        "unif",
        0.8,
        prune_schedule="gradual",
        prune_every=10,
        prune_end=1.0,
        method_options={"gradual.exponent": exponent},
    )

    class Asked:
        def choose(self, scale, among_kept):
            return scale(0.8)

    schedule = recipe.schedule(recipe.steps(101, 10))
    assert schedule.masks(50, Asked()) == 0.8 * (1 - 0.5**exponent)


# ---- the recipe ----

OWL = Recipe("owl", 0.5, reconstruct="obs")


def with_options(recipe=OWL, **given) -> Recipe:
    return dataclasses.replace(recipe, method_options=given and dict(given))


def test_a_recipe_keeps_its_options_and_shows_them():
    options = {"owl.lambda": 0.1, "obs.columns": 128}
    recipe = with_options(**options)
    recipe.check()
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    defaults = {"owl.outlier": 5, "obs.damping": 0.01}
    assert recipe.to_dict()["method_options"] == {**options, **defaults}
    assert "--method-options" not in with_options(**defaults).in_words()
    assert recipe.in_words().endswith("--method-options owl.lambda=0.1 obs.columns=128")


def test_recipes_differ_by_an_option_that_is_not_the_default():
    assert not OWL.differences(with_options(**{"owl.lambda": 0.08}))
    assert not with_options(**{"owl.lambda": 1}).differences(with_options(**{"owl.lambda": 1.0}))
    assert OWL.differences(with_options(**{"owl.lambda": 0.1})) == ["method_options"]


def test_a_saved_recipe_keeps_its_numbers_where_the_defaults_have_changed(monkeypatch):
    saved = OWL.to_dict()

    @method(outlier="", lambda_="")
    def owl(scores, sparsity, *, outlier: Positive = 5.0, lambda_: Positive = 0.5):
        """A later version."""

    monkeypatch.setitem(PRUNERS, "owl", owl)
    recipe = Recipe.from_dict(saved)
    assert recipe.method_options == {"owl.lambda": 0.08}
    assert recipe.differences(OWL) == ["method_options"]


def test_choices_that_are_replaced_take_their_options_along():
    recipe = Recipe(
        "owl",
        0.5,
        prune_schedule="gradual",
        method_options={"gradual.exponent": 2, "owl.lambda": 0.1},
    )
    recipe.check()
    assert recipe.one_shot().method_options == {"owl.lambda": 0.1}
    assert recipe.replaced(pruner="unif").method_options == {"gradual.exponent": 2}
    assert recipe.one_shot().replaced(pruner="unif").method_options is None


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"owl.lambdas": 0.1},
            "owl.lambdas: expected an option of the chosen methods, one of owl.outlier, owl.lambda, obs.c",
        ),
        ({"lambda": 0.1}, "lambda: expected an option"),
        ({"alpha.tau": 0.1}, "alpha.tau: expected an option"),
        ({3: 0.1}, "3: expected an option"),
        ({"owl.lambda": 1.5}, "owl.lambda=1.5: expected a number in \\[0, 1\\]"),
        ({"owl.lambda": float("nan")}, "owl.lambda=nan: expected a number"),
        ({"owl.lambda": "0.1"}, "owl.lambda=0.1: expected a number"),
        ({"owl.lambda": True}, "owl.lambda=True: expected a number"),
        ({"owl.outlier": 0}, "owl.outlier=0: expected a number above 0"),
        ({"owl.outlier": 10**400}, "owl.outlier="),
        ({"obs.columns": 8.0}, "obs.columns=8.0: expected an integer of at least 1"),
        ({"obs.columns": 0}, "obs.columns=0: expected an integer of at least 1"),
        ([0.1], "expected a mapping of options to numbers"),
    ],
    ids=str,
)
def test_an_option_that_no_method_has_or_a_wrong_number_is_refused(given, message):
    recipe = dataclasses.replace(OWL, method_options=given)
    with pytest.raises(PruningError, match=f"--method-options .*{message}") as found:
        recipe.check()
    assert "\n" not in str(found.value)
    if isinstance(given, dict):
        with pytest.raises(PruningError):
            Recipe.from_dict({**OWL.to_dict(), "method_options": given})


def test_methods_without_options_take_none(model):
    with pytest.raises(PruningError, match="^method_options owl.lambda: expected none"):
        compute_masks(model, "lamp", 0.5, method_options={"owl.lambda": 0.1})
    with pytest.raises(PruningError, match="--method-options owl.lambda=0.1 needs --pruner"):
        Recipe(method_options={"owl.lambda": 0.1}).check()


# ---- functions in the place of names ----


def from_the_left(weight, layer):
    """The earlier an input, the more its weights matter."""
    return torch.arange(weight.shape[1], 0, -1).to(weight).expand_as(weight).contiguous()


def first_layer_dense(scores, sparsity):
    sizes = dict(scores.sizes)
    first = next(iter(sizes))
    left = round(sum(sizes.values()) * (1 - sparsity)) - sizes[first]
    others = sum(sizes.values()) - sizes[first]
    return {
        name: size if name == first else round(left * size / others) for name, size in sizes.items()
    }


def test_a_function_may_stand_for_a_score_and_for_a_pruner(model, monkeypatch):
    masks = compute_masks(model, first_layer_dense, 0.5, score=from_the_left)
    assert masks["0.weight"].all()
    assert masks["1.weight"][:, 0].all() and not masks["1.weight"][:, -1].any()

    monkeypatch.setitem(SCORES, "mine", from_the_left)
    monkeypatch.setitem(PRUNERS, "my-own", first_layer_dense)
    named = compute_masks(model, "my-own", 0.5, score="mine")
    assert all(torch.equal(masks[name], named[name]) for name in named)


@pytest.mark.parametrize("pattern", ["row", "x:4", "block:4x4"])
def test_a_function_works_with_every_pattern(model, pattern):
    masks = compute_masks(model, "unif", 0.5, score=from_the_left, pattern=pattern)
    assert not parse_pattern(pattern).why_not(masks)


def test_a_function_names_the_statistics_that_it_needs(model):
    @method(needs={"input_norms"})
    def by_norm(weight, layer):
        return layer.input_norms.to(weight).expand_as(weight).contiguous()

    assert needs_of("lamp", by_norm) == {"input_norms"}
    with pytest.raises(PruningError, match="score by_norm looks at data: expected statistics"):
        compute_masks(model, "unif", 0.5, score=by_norm)
    known = statistics_of(model, {"input_norms"})
    masks = compute_masks(model, "unif", 0.5, score=by_norm, statistics=known)
    assert masks["0.weight"][:, known.value("0.weight", "input_norms").argmax()].all()


def test_a_partial_sets_options_and_has_the_needs_of_its_function(model):
    known = statistics_of(model, {"gram", "input_norms"})
    by_name = compute_masks(
        model,
        "owl",
        0.5,
        score="obs",
        statistics=known,
        method_options={"owl.lambda": 0.3, "obs.damping": 2},
    )
    pruner = partial(PRUNERS["owl"], lambda_=0.3)
    score = partial(SCORES["obs"], damping=2)
    assert needs_of(pruner, score) == {"gram", "input_norms"}
    masks = compute_masks(model, pruner, 0.5, score=score, statistics=known)
    assert all(torch.equal(masks[name], by_name[name]) for name in masks)


def test_a_function_that_returns_what_no_mask_can_be_is_named(model):
    def too_many(scores, sparsity):
        return {name: size + 1 for name, size in scores.sizes.items()}

    def negative(weight, layer):
        return -weight.abs()

    with pytest.raises(PruningError, match="pruner too_many keeps 385 of 0.weight"):
        compute_masks(model, too_many, 0.5)
    with pytest.raises(PruningError, match="0.weight has a negative score that is -"):
        compute_masks(model, "unif", 0.5, score=negative)
    with pytest.raises(PruningError, match="pruner too_many needs sparsity as well"):
        compute_masks(model, too_many)


def test_prune_takes_functions_and_options():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 8))
    batches = [torch.randn(40, 8)]
    seen = []

    def only_mask(weight, inputs, mask, pattern):
        seen.append(tuple(inputs.gram.shape))
        return weight * mask, mask

    masks = prune(
        model, first_layer_dense, 0.4, score=from_the_left, batches=batches, reconstruct=only_mask
    )
    assert masks["0.weight"].all() and not masks["2.weight"][:, -1].any()
    assert seen == [(16, 16), (12, 12)]

    with pytest.raises(
        PruningError,
        match="obs.column: expected an option of the chosen methods, one of obs.columns",
    ):
        prune(model, "unif", 0.5, batches=batches, method_options={"obs.column": 8})


def test_a_recipe_with_a_function_trains_but_cannot_be_saved(model):
    recipe = Recipe("unif", 0.5, score=from_the_left, reconstruct="none")
    sparsifier = Sparsifier(model, recipe, total_steps=1, epoch_steps=1)
    sparsifier.start()
    assert sparsifier.masks.sparsity() == 0.5
    assert recipe.in_words() == "--pruner unif --sparsity 0.5 --score from_the_left"
    with pytest.raises(PruningError, match="score from_the_left is a function, which cannot be"):
        sparsifier.state_dict()
