"""At which steps masks change."""

import pytest
import torch

from sparsity_factory import SCHEDULES, Recipe
from sparsity_factory.pruned_weights import FrozenWeights, HiddenWeights, ZeroWeights


def changes(name: str, total: int, epoch: int, **fields) -> list[int]:
    recipe = Recipe("lamp", 0.9, prune_schedule=name, **fields)
    schedule = SCHEDULES[name](recipe, recipe.steps(total, epoch))
    return [step for step in range(total) if schedule.changes_at(step)]


class Asked:
    """Stands for a `Sparsifier`: returns what a schedule asks it for."""

    def choose(self, scale=lambda sparsity: sparsity, among_kept=False):
        return scale(0.9), among_kept

    def dense(self):
        return 0.0

    def regrow(self, share, growth):
        return share


def asked(name: str, total: int, epoch: int, step: int, **fields):
    recipe = Recipe("lamp", 0.9, prune_schedule=name, **fields)
    return SCHEDULES[name](recipe, recipe.steps(total, epoch)).masks(step, Asked())


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("one-shot", {}, []),
        ("gradual", {"prune_every": 30, "prune_start": 0.1, "prune_end": 0.8}, [40, 70, 80]),
        ("gradual", {"prune_end": 1.0}, [99]),  # the last step there is
        ("iterative", {}, [0, 25, 50, 75]),
        ("iterative", {"prune_rounds": 1, "prune_start": 0.3}, [30]),
        ("set", {"prune_every": 25}, [25, 50]),  # at the end nothing would be dropped
        ("rigl", {"prune_every": 25, "prune_start": 0.5, "prune_end": 1.0}, [75]),
        ("ac-dc", {"prune_rounds": 2, "prune_start": 0.1, "prune_end": 0.7}, [30, 50, 70]),
        ("ste", {"prune_every": 30}, [30, 60]),
        ("sr-ste", {"prune_every": 25}, [25, 50, 75]),
        ("maskllm", {"prune_end": 0.6}, [60]),
    ],
)
def test_masks_change_at_these_steps_of_a_hundred(name, fields, expected):
    assert changes(name, 100, 10, **fields) == expected


def test_the_phases_of_ac_dc_begin_with_an_epoch_unless_they_are_shorter_than_one():
    fields = {"prune_rounds": 2, "prune_start": 0.0, "prune_end": 0.75}
    assert changes("ac-dc", 1000, 70, **fields) == [280, 490, 770]  # near 250, 500, 750
    assert changes("ac-dc", 100, 50, **fields) == [25, 50, 75]


def test_ac_dc_is_dense_at_first_and_sparse_at_last():
    sparsities = [
        asked("ac-dc", 100, 10, step, prune_rounds=2, prune_end=0.6) for step in (20, 40, 60)
    ]
    assert sparsities == [(0.9, False), 0.0, (0.9, False)]


@pytest.mark.parametrize("step", [10, 40, 59, 60, 70])
def test_gradual_follows_the_cubic_curve_and_ends_exactly_at_the_target(step):
    sparsity, among_kept = asked("gradual", 100, 10, step, prune_start=0.1, prune_end=0.6)
    time = min((step - 10) / 50, 1)
    assert sparsity == pytest.approx(0.9 * (1 - (1 - time) ** 3), abs=1e-12)
    assert step < 60 or sparsity == 0.9
    assert among_kept


def test_each_round_of_iterative_prunes_the_same_fraction_of_what_is_left():
    sparsities = [
        asked("iterative", 100, 10, step, prune_rounds=3, prune_end=0.5)[0] for step in (0, 25, 50)
    ]
    densities = [1.0, *(1 - sparsity for sparsity in sparsities)]
    ratios = [later / earlier for earlier, later in zip(densities[:-1], densities[1:], strict=True)]
    assert ratios == pytest.approx([0.1 ** (1 / 3)] * 3)
    assert densities[-1] == 1 - 0.9


@pytest.mark.parametrize(("step", "share"), [(1, 0.3), (38, 0.15), (75, 0.0)])
def test_the_share_that_is_dropped_follows_a_cosine(step, share):
    assert asked("set", 101, 10, step, prune_end=0.75) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [0, 1, 2, 7])
def test_the_shortest_runs_reach_the_target_where_they_have_a_step_at_all(name, total):
    recipe = Recipe("lamp", 0.9, prune_schedule=name)
    schedule = SCHEDULES[name](recipe, recipe.steps(total, 3))
    made = [step for step in range(total) if schedule.changes_at(step)]
    assert schedule.is_final(made[-1] if made else -1) or not total


def test_the_growth_of_set_depends_on_seed_step_and_layer_only():
    def growth(seed, step, layer):
        schedule = SCHEDULES["set"](
            recipe := Recipe("lamp", 0.9, prune_schedule="set", seed=seed), recipe.steps(9, 3)
        )
        return schedule.growth(torch.empty(50), step, layer)

    torch.manual_seed(1)
    first = growth(0, 1, 2)
    torch.manual_seed(2)
    assert torch.equal(first, growth(0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)):
        assert not torch.equal(first, growth(*other))


@pytest.mark.parametrize("name", SCHEDULES)
def test_pruned_weights_are_hidden_by_ste_and_frozen_until_masks_are_learned_and_zero_otherwise(
    name,
):
    recipe = Recipe("lamp", 0.9, prune_schedule=name)
    schedule = SCHEDULES[name](recipe, recipe.steps(100, 10))
    before, after = {
        "ste": (HiddenWeights, HiddenWeights),
        "sr-ste": (HiddenWeights, HiddenWeights),
        "maskllm": (FrozenWeights, ZeroWeights),
    }.get(name, (ZeroWeights, ZeroWeights))
    assert schedule.pruned_weights(-1) is before
    assert schedule.pruned_weights(99) is after
