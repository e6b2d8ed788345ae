"""A recipe at work: schedules against plain loops, the optimizer's state, runs that are resumed."""

import contextlib
import copy
import io
import math

import pytest
import torch
from made_up import pattern_for
from timm.optim import create_optimizer_v2
from timm.optim.lookahead import Lookahead
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity_factory import (
    SCHEDULES,
    PruningError,
    Recipe,
    Sparsifier,
    check_masks,
    compute_masks,
    pack,
    parse_pattern,
    walk_layers,
)
from sparsity_factory.patterns import regrow
from sparsity_factory.reconstruction import reconstruct_layers

STEPS, EPOCH = 24, 6
SPARSITY = 0.7
SETTINGS = {
    "one-shot": {},
    "gradual": {"prune_every": 4, "prune_start": 0.1, "prune_end": 0.6},
    "iterative": {"prune_rounds": 3, "prune_start": 0.25, "rewind": 1},
    "set": {"prune_every": 3, "seed": 7},
    "rigl": {"prune_every": 3},
    "ac-dc": {"prune_rounds": 2, "prune_end": 0.6},
    "ste": {"prune_every": 5},
    "sr-ste": {"prune_every": 5, "sr_decay": 0.1},
    "maskllm": {"prune_end": 0.6},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))


def recipe(schedule: str, **fields) -> Recipe:
    return Recipe(
        "unif",
        SPARSITY,
        pattern=pattern_for(schedule),
        prune_schedule=schedule,
        **{**SETTINGS[schedule], **fields},
    )


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return (
        (model(torch.randn(16, 8, generator=generator)) - torch.randn(16, 6, generator=generator))
        .square()
        .mean()
    )


def sgd(model: nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum)


class Run:
    """A training of `network`; `step` makes one step of it."""

    def __init__(self, chosen: Recipe, make=sgd, started: bool = True, **options):
        self.model = network()
        self.sparsifier = Sparsifier(
            self.model, chosen, total_steps=STEPS, epoch_steps=EPOCH, **options
        )
        if started:
            self.sparsifier.start()
        self.average = copy.deepcopy(self.model)
        self.optimizer = make(self.model)
        self.sparsifier.attach(self.optimizer, [self.average])

    def step(self, gradient=None, scale: float = 1.0, after_backward=None) -> None:
        self.sparsifier.begin_step()
        self.optimizer.zero_grad()
        (loss_of(self.model, self.sparsifier.step) * scale).backward()
        if gradient is not None:
            self.model[0].weight.grad[0, 0] = gradient

        self.sparsifier.end_backward(scale)
        if after_backward is not None:
            after_backward()

        # As a gradient scaler does, which skips the step of a gradient that is not finite
        if gradient is None:
            for parameter in self.model.parameters():
                parameter.grad.div_(scale)
            self.optimizer.step()
        self.sparsifier.end_step()
        for mean, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.data.lerp_(parameter.data, 0.1)

    def masks(self) -> dict[str, torch.Tensor]:
        return {name: mask.clone() for name, mask in self.sparsifier.masks.items()}


# ---- each schedule against a plain loop ----


def largest(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """What `unif` keeps of a layer, by sorting."""
    pruned = round(sparsity * weight.numel())
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.detach().abs().flatten().argsort(stable=True)[:pruned]] = False
    return mask.view(weight.shape)


def plain_masks(
    schedule: str, step: int, weights: dict, masks: dict, gradients: dict
) -> dict | None:
    """The masks after this step (-1: before the first), or None if they stay, by the SETTINGS."""

    def all_largest(sparsity):
        return {name: largest(weight, sparsity) for name, weight in weights.items()}

    if step == -1:
        return all_largest(0.0 if schedule in ("gradual", "iterative", "ac-dc") else SPARSITY)
    if schedule == "gradual" and step in (6, 10, 14):  # from step 2 to step 14
        return all_largest(SPARSITY * (1 - (1 - (step - 2) / 12) ** 3))
    if schedule == "iterative" and step in (6, 12, 18):
        return all_largest(1 - (1 - SPARSITY) ** (step / 18))
    if schedule in ("set", "rigl") and step in (3, 6, 9, 12, 15):
        share = 0.3 / 2 * (1 + math.cos(math.pi * step / 18))
        new = {}
        for layer, (name, mask) in enumerate(masks.items()):
            growth = (
                SCHEDULES["set"](recipe("set"), None).growth(mask, step, layer)
                if schedule == "set"
                else gradients[name].abs()
            )
            new[name] = regrow(weights[name], mask, growth, int(share * int(mask.sum())))
        return new
    if schedule == "ac-dc" and step in (4, 9, 14):  # of phases shorter than an epoch
        return all_largest(0.0 if step == 9 else SPARSITY)
    if schedule in ("ste", "sr-ste") and step in (5, 10, 15):
        return all_largest(SPARSITY)
    return None


def plain_training(schedule: str):
    """A loop that knows nothing of `Sparsifier`; yields the model with its masked weights, and its
    masks, each step.
    """
    model, names = network(), ("0.weight", "3.weight")
    weights = {name: model.get_parameter(name) for name in names}
    masks = plain_masks(schedule, -1, weights, {}, {})

    def mask_weights():
        for name, weight in weights.items():
            weight.data = torch.where(masks[name], weight.data, 0.0)

    mask_weights()
    remembered = None
    for step in range(STEPS):
        if step == EPOCH:
            remembered = copy.deepcopy(model.state_dict())
        model.zero_grad()
        loss_of(model, step).backward()
        gradients = {name: weight.grad.clone() for name, weight in weights.items()}
        # These choose with the weights that the gradients belong to
        early = schedule in ("set", "rigl")
        new = plain_masks(schedule, step, weights, masks, gradients) if early else None
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.grad[~masks[name]] = 0.0
            parameter.data -= 0.3 * parameter.grad
        if not early:
            new = plain_masks(schedule, step, weights, masks, gradients)
        if new:
            if schedule == "iterative":
                model.load_state_dict(remembered)
            masks = new
            mask_weights()
        yield model, masks


def straight_through(schedule: str):
    """The same for `ste` and `sr-ste`: autograd through weight * mask, as if the product had a
    gradient of 1.
    """

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, mask):
            ctx.save_for_backward(weight, mask)
            return weight * mask

        @staticmethod
        def backward(ctx, gradient):
            weight, mask = ctx.saved_tensors
            return gradient + (0.1 * ~mask * weight if schedule == "sr-ste" else 0), None

    model = network()
    weights = {name: model.get_parameter(name) for name in ("0.weight", "3.weight")}
    masks = plain_masks(schedule, -1, weights, {}, {})
    optimizer = sgd(model)

    def forward(images):
        hidden = nn.functional.linear(
            images, Product.apply(weights["0.weight"], masks["0.weight"]), model[0].bias
        )
        return nn.functional.linear(
            model[2](model[1](hidden)),
            Product.apply(weights["3.weight"], masks["3.weight"]),
            model[3].bias,
        )

    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(forward, step).backward()
        optimizer.step()
        masks = plain_masks(schedule, step, weights, masks, {}) or masks
        seen = copy.deepcopy(model)
        for name, mask in masks.items():
            seen.get_parameter(name).data.mul_(mask)
        yield seen, masks


# Which test_learned_masks.py compares
@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"maskllm"}))
def test_a_schedule_trains_as_the_plain_loop_does(schedule):
    run = Run(recipe(schedule))
    plain = straight_through if schedule in ("ste", "sr-ste") else plain_training
    for step, (expected, masks) in enumerate(plain(schedule)):
        run.step()
        assert all(torch.equal(run.masks()[name], mask) for name, mask in masks.items()), step
        torch.testing.assert_close(
            run.model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-6
        )
    assert run.sparsifier.final
    assert run.sparsifier.masks.sparsity() == pytest.approx(SPARSITY, abs=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: create_optimizer_v2(model, "muon", lr=0.03),
        lambda model: create_optimizer_v2(model, "lookahead_muon", lr=0.03),
        lambda model: torch.optim.Muon([model[0].weight, model[3].weight], lr=0.03),
    ],
    ids=["timm", "lookahead", "torch"],
)
def test_muon_sees_whole_gradients(make):
    run, model = Run(recipe("one-shot"), make), network()
    masks, optimizer = run.masks(), make(model)

    def mask_weights():
        for name, mask in masks.items():
            model.get_parameter(name).data.mul_(mask)

    mask_weights()
    for step in range(4):
        run.step()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        mask_weights()
        assert all(
            torch.equal(value, model.get_parameter(name))
            for name, value in run.model.named_parameters()
        )
    assert any(
        weight.grad[~masks[name]].any()
        for name in masks
        for weight in [run.model.get_parameter(name)]
    )


def test_the_final_sparsity_is_reached_at_the_end_of_the_schedule_and_not_before():
    reached = {}
    for schedule in SCHEDULES:
        run = Run(recipe(schedule))
        finals = [run.sparsifier.final]
        for _ in range(STEPS):
            run.step()
            finals.append(run.sparsifier.final)
            assert not finals[-1] or run.sparsifier.masks.sparsity() > SPARSITY - 0.01
        reached[schedule] = finals.index(True)  # after so many steps
        assert all(finals[reached[schedule] :])

    assert reached == {
        "one-shot": 0,
        "gradual": 15,
        "iterative": 19,
        "set": 0,
        "rigl": 0,
        "ac-dc": 15,
        "ste": 0,
        "sr-ste": 0,
        "maskllm": 15,
    }


def test_one_round_at_the_start_is_one_shot_to_the_bit():
    runs = [
        Run(recipe("one-shot")),
        Run(Recipe("unif", SPARSITY, prune_schedule="iterative", prune_rounds=1)),
    ]
    for run in runs:
        for _ in range(3):
            run.step()
    assert torch.equal(runs[0].model[0].weight, runs[1].model[0].weight)


def test_a_dense_recipe_does_nothing():
    run, model = Run(Recipe()), network()
    optimizer = sgd(model)
    for step in range(4):
        run.step()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in run.model.state_dict().items()
    )
    assert (
        not run.sparsifier.masks and run.sparsifier.final and run.sparsifier.masks.sparsity() == 0
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_custom_levels_hold_at_the_end_and_what_is_pruned_on_the_way_stays_so(schedule):
    levels = [0.6, "dense"] if schedule in ("set", "rigl") else [[1, 4], 0.5]
    if schedule == "maskllm":
        levels = [[1, 4], "dense"]
    config = {"sparsity": {"mode": "nxm", "level": levels}}
    run = Run(Recipe("custom", custom_config=config, prune_schedule=schedule, **SETTINGS[schedule]))
    before = run.masks()
    for _ in range(STEPS):
        run.step()
        if schedule in ("gradual", "iterative"):
            assert not any((run.masks()[name] & ~mask).any() for name, mask in before.items())
            before = run.masks()
            # N goes down together
            assert (groups := before["0.weight"].view(-1, 4).sum(1)).min() == groups.max()
    check_masks(run.model.state_dict(), run.sparsifier.masks, run.sparsifier.recipe)


def test_masks_that_the_model_came_with_are_kept():
    chosen = compute_masks(network(), "glob", 0.3)
    run = Run(recipe("one-shot"), masks=chosen)
    run.step()
    assert all(torch.equal(run.masks()[name], mask) for name, mask in chosen.items())


def test_first_masks_change_nothing_and_a_target_that_is_out_of_reach_shows_before_the_training():
    model = network()
    sparsifier = Sparsifier(model, recipe("gradual"), total_steps=STEPS, epoch_steps=EPOCH)
    assert all(mask.all() for mask in sparsifier.first_masks().values())
    assert torch.equal(model[0].weight, network()[0].weight)
    sparsifier = Sparsifier(
        model, Recipe("unifplus", 0.7, prune_schedule="gradual"), total_steps=9, epoch_steps=3
    )
    with pytest.raises(PruningError, match="unifplus keeps"):
        sparsifier.start()
    config = {"sparsity": {"mode": "nxm", "level": [[2, 4]]}}
    with pytest.raises(PruningError, match="expected 2"):
        Sparsifier(model, Recipe("custom", custom_config=config), total_steps=9, epoch_steps=3)


# ---- what changes starts from zero ----


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.03),
    "momentum": lambda model: sgd(model, momentum=0.9),
    "lamb": lambda model: create_optimizer_v2(model, "lamb", lr=0.03),
    "muon": lambda model: create_optimizer_v2(model, "muon", lr=0.03),
    "lookahead": lambda model: Lookahead(torch.optim.AdamW(model.parameters(), lr=0.03), k=2),
}


def state_of(optimizer, weight) -> list[torch.Tensor]:
    states = getattr(optimizer, "_base_optimizer", optimizer).state[weight]
    return [
        value
        for value in states.values()
        if isinstance(value, torch.Tensor) and value.shape == weight.shape
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["gradual", "set", "rigl", "ac-dc"])
def test_dropped_and_grown_weights_start_from_zero_and_so_does_the_state_of_the_optimizer(
    schedule, optimizer
):
    run, changes = Run(recipe(schedule), OPTIMIZERS[optimizer]), 0
    for _ in range(STEPS):
        before, old = run.masks(), {}
        run.step(
            after_backward=lambda old=old: old.update(
                {name: run.model.get_parameter(name).detach().clone() for name in run.masks()}
            )
        )
        for name, mask in run.masks().items():
            weight, changed = run.model.get_parameter(name), mask != before[name]
            assert not weight[~mask].any()
            assert not weight[mask & ~before[name]].any()
            values = state_of(run.optimizer, weight)
            assert values
            assert not any(value[changed].any() for value in values)
            # The others keep theirs
            assert all(value[mask & before[name]].any() for value in values)
            changes += int(changed.any())
    assert changes


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pruned_weights_stay_zero_also_with_an_optimizer_that_moves_them_and_the_average_obeys(
    schedule,
):
    run = Run(recipe(schedule), OPTIMIZERS["muon"])
    for _ in range(STEPS):
        run.step()
        for model in (run.model, run.average):
            check_masks(model.state_dict(), run.sparsifier.masks)


def test_state_from_before_a_weight_was_pruned_is_not_found_again_when_it_grows():
    run = Run(recipe("rigl"), OPTIMIZERS["momentum"])
    for _ in range(3):
        run.step()
    before, momentum = run.masks()["0.weight"], state_of(run.optimizer, run.model[0].weight)[0]
    momentum[~before] = 1.0
    run.step()
    grown = run.masks()["0.weight"] & ~before
    assert grown.any() and not momentum[grown].any()


def test_a_tie_between_a_pruned_weight_and_a_kept_one_of_zero_brings_nothing_back():
    run = Run(recipe("gradual"))
    for _ in range(8):
        run.step()
    before = run.masks()
    assert not before["0.weight"].all()
    with torch.no_grad():
        run.model[0].weight.zero_()
    chosen = run.sparsifier.choose(lambda sparsity: 0.9 * sparsity, among_kept=True)
    assert not (chosen["0.weight"] & ~before["0.weight"]).any()


def test_a_rewind_clears_the_state_of_the_optimizer_and_takes_all_weights_back():
    run = Run(recipe("iterative"), OPTIMIZERS["adamw"])
    for _ in range(EPOCH):
        run.step()
    remembered = copy.deepcopy(run.model.state_dict())
    run.step()
    assert not run.optimizer.state
    mask = run.masks()["0.weight"]
    assert torch.equal(run.model[0].weight, remembered["0.weight"] * mask)
    for name in ("0.bias", "1.running_mean", "3.bias"):
        assert torch.equal(run.model.state_dict()[name], remembered[name])


def test_a_rewind_takes_the_average_back_as_well():
    run = Run(recipe("iterative"))
    for _ in range(EPOCH):
        run.step()
    remembered = copy.deepcopy(run.average.state_dict())
    for _ in range(3):  # of the first round, and of two more steps
        run.sparsifier.begin_step()
        with torch.no_grad():
            for weight in [*run.model.parameters(), *run.average.parameters()]:
                weight.add_(1)
        run.sparsifier.end_backward()
        run.sparsifier.end_step()
        if run.sparsifier.step == EPOCH + 1:
            for name, value in run.average.state_dict().items():
                kept = run.masks().get(name, torch.ones_like(value, dtype=torch.bool))
                assert torch.equal(value, remembered[name] * kept), name


def test_a_rewind_takes_the_place_in_the_learning_rate_schedule_back():
    """Each round trains along the schedule from the rewind to its end, in the steps it has."""
    run = Run(recipe("iterative"))
    rounds, places = run.sparsifier.schedule.rounds, []
    for _ in range(STEPS):
        places.append(run.sparsifier.schedule_step)
        run.step()

    begins = [EPOCH, *(round_ + 1 for round_ in rounds[1:]), STEPS]
    assert rounds[0] == EPOCH and places[: EPOCH + 1] == [*range(EPOCH + 1)]
    # The first round is made after the step of the rewind itself
    begins[0] += 1
    for first, after in zip(begins, begins[1:], strict=False):
        span = after - first
        expected = [EPOCH + (STEPS - EPOCH) * step // span for step in range(span)]
        assert places[first:after] == expected
        assert places[first] == EPOCH and places[after - 1] >= STEPS - (STEPS - EPOCH) // span - 1
    assert Run(recipe("gradual")).sparsifier.schedule_step == 0


def test_a_weight_without_gradient_is_not_moved():
    run = Run(recipe("rigl"))
    run.model[3].weight.requires_grad_(False)
    before = run.masks()
    for _ in range(STEPS // 2):
        run.sparsifier.begin_step()
        run.optimizer.zero_grad()
        loss_of(run.model, run.sparsifier.step).backward()
        run.sparsifier.end_backward()
        run.optimizer.step()
        run.sparsifier.end_step()
    assert torch.equal(run.masks()["3.weight"], before["3.weight"])
    assert not torch.equal(run.masks()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_that_need_trained_weights_refuse_frozen_ones(schedule):
    model = network()
    for layer in (model[0], model[3]):
        layer.weight.requires_grad_(False)
    needs = schedule not in ("one-shot", "gradual", "iterative")
    expected = pytest.raises(PruningError, match=f"--prune-schedule {schedule}: needs")
    with expected if needs else contextlib.nullcontext():
        Sparsifier(model, recipe(schedule), total_steps=STEPS, epoch_steps=EPOCH)


# ---- reconstruction ----


def walk(model):
    return walk_layers(model, [torch.randn(40, 8, generator=torch.Generator().manual_seed(1))])


def reconstructing(schedule: str, method: str = "obs", make=sgd):
    """A run, and by step (0: the start, too) copies of the model as it was when its layers were
    reconstructed.
    """
    before = {}

    def remember_and_walk(dense):
        before[run.sparsifier.step] = copy.deepcopy(run.model)
        return walk(run.model)

    fields = {"reconstruct": method} | ({"rewind": None} if schedule == "iterative" else {})
    run = Run(recipe(schedule, **fields), make, started=False, walk=remember_and_walk)
    run.sparsifier.start()
    return run, before


@pytest.mark.parametrize(
    "schedule, steps",
    [("one-shot", [0]), ("gradual", [6, 10, 14]), ("iterative", [6, 12, 18]), ("ac-dc", [4, 14])],
)
def test_each_choice_of_masks_reconstructs_and_averages_begin_anew(schedule, steps):
    run, before = reconstructing(schedule, "obs-mask")
    for step in range(STEPS):
        if step or schedule != "one-shot":
            run.step()

        # By hand, from the model as it was when the recipe reconstructed it
        if step in steps:
            expected = before[step]
            reconstruct_layers(
                expected,
                run.masks(),
                "obs-mask",
                lambda dense, model=expected: walk(model),
                patterns=lambda name: parse_pattern("unstructured"),
            )
            for model in (run.model, run.average):
                assert all(
                    torch.equal(value, model.state_dict()[name])
                    for name, value in expected.state_dict().items()
                )

    assert list(before) == steps
    assert run.sparsifier.final
    assert run.sparsifier.masks.sparsity() == pytest.approx(SPARSITY, abs=0.01)


@pytest.mark.parametrize("schedule", ["set", "rigl"])
def test_weights_that_are_moved_are_not_reconstructed(schedule):
    run, before = reconstructing(schedule)
    first = run.masks()
    for _ in range(STEPS):
        run.step()
    assert list(before) == [0]
    assert [int(mask.sum()) for mask in run.masks().values()] == [
        int(mask.sum()) for mask in first.values()
    ]
    assert not torch.equal(run.masks()["0.weight"], first["0.weight"])


@pytest.mark.parametrize("schedule", ["gradual", "iterative", "ac-dc"])
def test_what_obs_chooses_has_the_numbers_of_the_schedule_and_the_state_of_what_changes_is_cleared(
    schedule,
):
    run, _ = reconstructing(schedule, make=OPTIMIZERS["momentum"])
    plain = Run(recipe(schedule, **({"rewind": None} if schedule == "iterative" else {})))
    changes = 0
    for _ in range(STEPS):
        old = run.masks()
        run.step()
        plain.step()

        for name, mask in run.masks().items():
            assert mask.sum() == plain.masks()[name].sum()
            (momentum,) = state_of(run.optimizer, run.model.get_parameter(name))
            assert not momentum[mask != old[name]].any()
            changes += int((mask != old[name]).any())
        for model in (run.model, run.average):
            check_masks(model.state_dict(), run.masks())
    assert changes >= 4


def test_reconstruction_without_a_walk_over_the_layers_is_refused():
    with pytest.raises(PruningError, match="reconstruct obs looks at data: expected a walk"):
        Run(recipe("one-shot", reconstruct="obs"))
    # Reconstructs nothing
    Run(recipe("one-shot", reconstruct="obs"), masks=compute_masks(network(), "unif", 0.5))


# ---- gradients ----


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"one-shot", "maskllm"}))
def test_a_step_whose_gradients_are_not_finite_changes_no_mask_and_the_next_one_does(
    schedule, value
):
    steps = recipe(schedule).steps(STEPS, EPOCH)
    first = next(
        step
        for step in range(1, STEPS)
        if SCHEDULES[schedule](recipe(schedule), steps).changes_at(step)
    )
    run = Run(recipe(schedule))
    for _ in range(first):
        run.step()

    before, weight = run.masks(), run.model[0].weight.clone()
    run.step(gradient=value)
    assert all(torch.equal(run.masks()[name], mask) for name, mask in before.items())
    assert torch.equal(run.model[0].weight, weight)

    run.step()
    assert any(not torch.equal(run.masks()[name], mask) for name, mask in before.items())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_scale_of_the_loss_changes_nothing(schedule, as_tensor):
    plain, scaled = Run(recipe(schedule)), Run(recipe(schedule))
    for _ in range(STEPS):
        plain.step()
        scaled.step(scale=torch.tensor(1024.0) if as_tensor else 1024.0)
        assert torch.equal(plain.masks()["0.weight"], scaled.masks()["0.weight"])
        torch.testing.assert_close(
            plain.model[0].weight, scaled.model[0].weight, rtol=1e-5, atol=1e-7
        )


def test_gradients_of_pruned_weights_are_zero_but_those_of_ste_and_of_learned_masks():
    for schedule in SCHEDULES:
        run = Run(recipe(schedule))
        if schedule in ("gradual", "iterative", "ac-dc"):
            run.step()
        seen = {}
        run.step(
            after_backward=lambda run=run, seen=seen: seen.update(
                gradient=run.model[0].weight.grad.clone(), mask=run.masks()["0.weight"]
            )
        )
        dense = bool(seen["gradient"][~seen["mask"]].any())
        assert dense == (schedule in ("ste", "sr-ste", "maskllm"))


def test_only_steps_with_a_change_look_whether_gradients_are_finite(monkeypatch):
    looked = []
    norm = torch.nn.utils.get_total_norm
    run = Run(recipe("rigl"))
    monkeypatch.setattr(
        torch.nn.utils,
        "get_total_norm",
        lambda *args: looked.append(run.sparsifier.step) or norm(*args),
    )
    for _ in range(STEPS):
        run.step()
    assert looked == [3, 6, 9, 12, 15]


# ---- processes ----


# Which learns the same everywhere
@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"maskllm"}))
def test_the_masks_of_the_first_process_are_those_of_all(schedule):
    """The second process has weights of its own, so that its own choice would be another one."""
    answers = []

    def first(compute):
        answers.append(compute())
        return answers[-1]

    runs = [Run(recipe(schedule), share=first)]
    waiting = iter(answers)
    runs.append(Run(recipe(schedule), share=lambda compute: next(waiting), started=False))
    with torch.no_grad():
        runs[1].model[0].weight.normal_()
    runs[1].sparsifier.start()
    for _ in range(STEPS):
        for run in runs:
            run.step()
        one, other = (run.masks() for run in runs)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(
        isinstance(answer, bool) or all(bits.dtype == torch.uint8 for bits, _ in answer.values())
        for answer in answers
    )


# ---- saving and loading ----


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(run: Run) -> dict:
    return {
        "model": run.model.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "pruning": run.sparsifier.state_dict(),
    }


def resumed(state: dict, chosen: Recipe, make, **options) -> Run:
    run = Run(chosen, make, started=False, **options)
    run.model.load_state_dict(state["model"])
    run.sparsifier.load_state_dict(state["pruning"])
    run.average.load_state_dict(state["average"])
    run.optimizer.load_state_dict(state["optimizer"])
    return run


def assert_same_bits(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.numpy().tobytes() == other.numpy().tobytes()
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same_bits(*pair)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_cut_anywhere_goes_on_to_the_bit(schedule):
    whole = Run(recipe(schedule), OPTIMIZERS["adamw"])
    for _ in range(STEPS):
        whole.step()
    cut = Run(recipe(schedule), OPTIMIZERS["adamw"])
    for _ in range(STEPS):
        cut = resumed(through_a_file(everything(cut)), recipe(schedule), OPTIMIZERS["adamw"])
        cut.step()
    assert_same_bits(everything(whole), everything(cut))


def test_a_change_that_was_put_off_is_made_after_a_cut_too():
    run = Run(recipe("rigl"))
    for _ in range(3):
        run.step()
    before = run.masks()
    run.step(gradient=math.inf)
    run = resumed(through_a_file(everything(run)), recipe("rigl"), sgd)
    run.step()
    assert not torch.equal(run.masks()["0.weight"], before["0.weight"])


def test_the_saved_steps_win_over_those_of_the_run_that_goes_on():
    run = Run(recipe("gradual"))
    run.step()
    model = network()
    other = Sparsifier(model, recipe("gradual"), total_steps=2 * STEPS, epoch_steps=2 * EPOCH)
    other.load_state_dict(run.sparsifier.state_dict())
    assert other.steps == run.sparsifier.steps


def damage(schedule: str, change) -> tuple[Sparsifier, object]:
    run = Run(recipe(schedule))
    for _ in range(EPOCH + 3):
        run.step()
    state = through_a_file(run.sparsifier.state_dict())
    fresh = Sparsifier(network(), recipe(schedule), total_steps=STEPS, epoch_steps=EPOCH)
    return fresh, change(state) or state


ALL = torch.ones(12, 8, dtype=torch.bool)
DAMAGES = {
    "no dictionary": ("gradual", lambda state: [1], "not a dictionary"),
    "another version": ("gradual", lambda state: state.update(version=2), "version 2"),
    "no version": ("gradual", lambda state: state.pop("version") and None, "version"),
    "another recipe": (
        "gradual",
        lambda state: state["recipe"].update(sparsity=0.5),
        "sparsity differ",
    ),
    "damaged recipe": ("gradual", lambda state: state.update(recipe=3), "recipe is a int"),
    "negative step": ("gradual", lambda state: state.update(step=-1), "step: expected an integer"),
    "step of no number": ("gradual", lambda state: state.update(step=True), "step is a bool"),
    "huge step": ("gradual", lambda state: state.update(step=2**60), "step"),
    "change to come": (
        "gradual",
        lambda state: state.update(changed=50),
        "changed masks at step 50",
    ),
    "late is a number": ("gradual", lambda state: state.update(late=1), "late is a int"),
    "no steps": ("gradual", lambda state: state.pop("steps") and None, "steps"),
    "end before start": ("gradual", lambda state: state["steps"].update(end=0), "out of order"),
    "end after the run": (
        "gradual",
        lambda state: state["steps"].update(end=STEPS),
        "out of order",
    ),
    "epochs of no step": ("gradual", lambda state: state["steps"].update(epoch=0), "out of order"),
    "a mask is missing": (
        "gradual",
        lambda state: state["masks"].pop("0.weight") and None,
        "'0.weight' is missing",
    ),
    "unknown mask": (
        "gradual",
        lambda state: state["masks"].update(pack({"9.weight": ALL})),
        "'9.weight'",
    ),
    "mask of another shape": (
        "gradual",
        lambda state: state["masks"].update(pack({"3.weight": ALL})),
        "'3.weight'",
    ),
    "damaged mask": (
        "gradual",
        lambda state: state["masks"]["0.weight"].update(shape=[2]),
        "'0.weight'",
    ),
    "hidden weights of no use": (
        "gradual",
        lambda state: state.update(hidden={"x": ALL}),
        "hidden has 1 tensors",
    ),
    "hidden weights are missing": (
        "ste",
        lambda state: state.update(hidden={}),
        "hidden has 0 tensors",
    ),
    "hidden weights of another shape": (
        "ste",
        lambda state: state["hidden"].update({"0.weight": torch.ones(8, 12)}),
        "hidden '0.weight'",
    ),
    "hidden weights of another type": (
        "ste",
        lambda state: state["hidden"].update({"0.weight": ALL}),
        "hidden '0.weight'",
    ),
    "hidden weights that are kept": (
        "ste",
        lambda state: state["hidden"].update({"0.weight": torch.ones(12, 8)}),
        "expected zeros",
    ),
    "rewind is missing": (
        "iterative",
        lambda state: state.update(rewind={}),
        "rewind has 0 tensors",
    ),
    "rewind of no tensor": (
        "iterative",
        lambda state: state["rewind"].update({"0.bias": 3}),
        "rewind '0.bias'",
    ),
    "rewind after the start": (
        "iterative",
        lambda state: state["steps"].update(rewind=9),
        "out of order",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_state_is_refused_in_one_line_and_changes_nothing(case):
    schedule, change, message = DAMAGES[case]
    sparsifier, state = damage(schedule, change)
    before, kept = (
        copy.deepcopy(sparsifier.model.state_dict()),
        copy.deepcopy(sparsifier.state_dict()),
    )
    with pytest.raises(PruningError, match=message) as error:
        sparsifier.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert_same_bits(sparsifier.model.state_dict(), before)
    assert_same_bits(sparsifier.state_dict(), kept)


def test_masks_on_their_way_to_other_processes_are_bits():
    sent = []
    Run(recipe("one-shot"), share=lambda compute: sent.append(compute()) or sent[-1])
    assert sum(bits.numel() for bits, _ in sent[0].values()) == (12 * 8 + 6 * 12) // 8


# Which grow weights by what the first process draws or sees, or take the masks that were learned
@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"set", "rigl", "maskllm"}))
def test_masks_that_weights_alone_decide_do_not_travel(schedule):
    alone = Run(recipe(schedule))
    sent, compared = [], []

    def gather(sums):
        compared.append(sums)
        return [sums, list(sums)]

    run = Run(recipe(schedule), share=lambda c: sent.append(c()) or sent[-1], gather=gather)
    for _ in range(STEPS):
        alone.step()
        run.step()
    expected = alone.masks()
    assert all(torch.equal(mask, expected[name]) for name, mask in run.masks().items())
    assert compared and all(isinstance(answer, bool) for answer in sent)


def test_masks_that_differ_among_processes_are_an_error_that_names_the_weight():
    def gather(sums):
        return [sums, sums, [sums[0], sums[1] + 1]]

    with pytest.raises(PruningError, match=r"^3\.weight: processes 0 and 2 choose different masks"):
        Run(recipe("one-shot"), share=lambda compute: compute(), gather=gather)


class NoHostReads(TorchDispatchMode):
    """Fails if a number is read from the meta device, which stands for a GPU: reading one waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "reads a number"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_between_changes_waits_for_the_device(schedule):
    # It counts what the first masks keep
    meta = torch.device("cpu" if SCHEDULES[schedule].learns_masks else "meta")
    model = network().to(meta)
    every = {"prune_every": 1000} if "prune_every" in SETTINGS[schedule] else {}
    masks = {
        name: torch.ones_like(model.get_parameter(name), dtype=torch.bool)
        for name in ("0.weight", "3.weight")
    }
    for mask in masks.values():
        mask[:, ::2] = False

    sparsifier = Sparsifier(
        model, recipe(schedule, **every), total_steps=1000, epoch_steps=250, masks=masks
    )
    sparsifier.start()
    optimizer = sgd(model)
    sparsifier.attach(optimizer)

    with NoHostReads():
        for _ in range(3):
            sparsifier.begin_step()
            model(torch.ones(4, 8, device=meta)).sum().backward()
            sparsifier.end_backward(torch.ones((), device=meta))
            optimizer.step()
            sparsifier.end_step()
