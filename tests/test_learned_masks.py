"""Masks that are learned, against autograd through a mask that is a parameter's softmax."""

import copy
import io
from itertools import combinations

import pytest
import torch
from made_up import linears
from torch import nn

from sparsity_factory import PruningError, Recipe, Sparsifier, check_masks, walk_layers
from sparsity_factory.learned_masks import PRIOR, SCALES, TEMPERATURES, MaskLearner, adam

STEPS = 12
DEFAULTS = (PRIOR, SCALES, TEMPERATURES)


def recipe(**fields) -> Recipe:
    return Recipe("unif", pattern="2:4", prune_schedule="maskllm", mask_lr=0.1, **fields)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


def loss_of(model, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return (
        (model(torch.randn(16, 8, generator=generator)) - torch.randn(16, 6, generator=generator))
        .square()
        .mean()
    )


def test_at_first_the_prior_mask_is_drawn_in_83_of_100_groups():
    prior = torch.tensor([True, False, True, False]).repeat(64, 64)
    learner = MaskLearner({"w": torch.ones(64, 256)}, {"w": prior}, {"w": 4}, seed=0)
    learner.soften(step=0, progress=0)

    # With scale 100, a prior of 0.03 and two shared weights of two: e^6 / (e^6 + 4 e^3 + 1)
    most = learner._shares["w"].argmax(1)
    drawn = learner._choices["w"][most].bool().view(64, 256)
    groups = (drawn == prior).view(-1, 4).all(1)
    assert groups.float().mean() == pytest.approx(0.83, abs=0.02)


class Run:
    def __init__(self, chosen: Recipe, started: bool = True, **options):
        self.model = network()
        self.sparsifier = Sparsifier(
            self.model, chosen, total_steps=STEPS, epoch_steps=4, **options
        )
        if started:
            self.sparsifier.start()
        self.average = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.03, weight_decay=0.1)
        self.sparsifier.attach(self.optimizer, [self.average])

    def step(self, parts: int = 1, scale: float = 1.0, gradient: float | None = None) -> None:
        self.sparsifier.begin_step()
        self.optimizer.zero_grad()
        for _ in range(parts):
            (loss_of(self.model, self.sparsifier.step) * scale / parts).backward()
        if gradient is not None:
            self.model[0].bias.grad[0] = gradient
        self.sparsifier.end_backward(torch.tensor(scale))
        self.optimizer.step()
        self.sparsifier.end_step()
        for mean, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.data.lerp_(parameter.data, 0.1)

    def logits(self) -> list[torch.Tensor]:
        learned = self.sparsifier.state_dict()["learned"]
        return [state[0].clone() for name, state in learned.items() if name != "updates"]


def noise(step: int, layer: int, shape) -> torch.Tensor:
    """What `MaskLearner` draws, read off the shares that it makes of logits of zero."""
    learner = MaskLearner({"w": torch.ones(shape[0], 4)}, {}, {}, 0)
    learner.states = {str(place): torch.zeros(3, *shape) for place in range(layer + 1)}
    learner._choices = {name: torch.ones(shape[1], 4) for name in learner.states}
    learner._weights = {name: torch.ones(shape[0], 4) for name in learner.states}
    learner.soften(step, 0.0)
    # Up to a number for each group, which changes nothing
    return learner._shares[str(layer)].log() * TEMPERATURES[0]


@pytest.mark.parametrize("prior, scales, temperatures", [DEFAULTS, (0.2, (3.0, 7.0), (2.0, 0.5))])
def test_logits_learn_as_by_autograd_through_a_soft_mask(prior, scales, temperatures):
    options = {
        "maskllm.prior": prior,
        "maskllm.first-scale": scales[0],
        "maskllm.last-scale": scales[1],
        "maskllm.first-temperature": temperatures[0],
        "maskllm.last-temperature": temperatures[1],
    }
    given = {} if prior == PRIOR else {"method_options": options}
    dense, run = network(), Run(recipe(prune_end=1.0, **given))
    choices = torch.tensor(
        [[float(i in kept) for i in range(4)] for kept in combinations(range(4), 2)]
    )
    logits = []
    for weight in (dense[0].weight, dense[2].weight):
        groups = weight.detach().abs().view(-1, 4)
        first = (groups >= groups.topk(2, 1).values[:, 1:]).float()
        shared = torch.stack([(first * choice).sum(1) for choice in choices], 1)
        logits.append((prior * (shared - shared.mean(1, keepdim=True))).requires_grad_())
    optimizer = torch.optim.Adam(logits, lr=0.1)
    for step in range(STEPS - 1):
        torch.testing.assert_close(
            run.logits(), [values.detach() for values in logits], rtol=1e-3, atol=1e-3
        )
        share = step / (STEPS - 1)
        scale, temperature = (a + (b - a) * share for a, b in (scales, temperatures))
        masks = [
            ((scale * values + noise(step, layer, values.shape)) / temperature).softmax(1) @ choices
            for layer, values in enumerate(logits)
        ]

        def masked(images, masks=masks):
            hidden = nn.functional.linear(
                images, dense[0].weight * masks[0].view(12, 8), dense[0].bias
            )
            return nn.functional.linear(
                hidden.relu(), dense[2].weight * masks[1].view(6, 12), dense[2].bias
            )

        optimizer.zero_grad()
        loss_of(masked, step).backward()
        optimizer.step()
        run.step(parts=1 + step % 2, scale=2.0 ** (step % 5))  # neither changes anything
    for mask, values in zip(run.sparsifier.masks.values(), logits, strict=True):
        assert torch.equal(mask, choices[values.argmax(1)].bool().view(mask.shape))


def test_adam_is_that_of_torch():
    values = torch.randn(5, 3, requires_grad=True)
    state, optimizer = (
        torch.stack([values.detach(), torch.zeros(5, 3), torch.zeros(5, 3)]),
        torch.optim.Adam([values], lr=0.03),
    )
    for step in range(1, 6):
        values.grad = torch.randn(5, 3)
        optimizer.step()
        state = adam(state, values.grad, torch.tensor(step), 0.03)
    torch.testing.assert_close(state[0], values.detach())


def test_weights_stand_still_until_the_masks_are_final_and_train_from_there():
    dense, run = network(), Run(recipe(prune_end=0.5))
    for step in range(STEPS):
        masks = run.sparsifier.masks
        check_masks(run.model.state_dict(), masks, run.sparsifier.recipe)
        check_masks(run.average.state_dict(), masks, run.sparsifier.recipe)
        assert run.sparsifier.final == (step > 6)

        stands = all(
            torch.equal(value, dense.state_dict()[name] * masks.get(name, 1))
            for name, value in run.model.state_dict().items()
        )
        assert stands == (step <= 7)
        if step == 7:  # nothing is left of the learning
            assert (
                not run.optimizer.state
                and run.sparsifier.state_dict()["hidden"] == {}
                and "learned" not in run.sparsifier.state_dict()
            )
            final = {name: mask.clone() for name, mask in masks.items()}
        run.step()
    assert all(torch.equal(run.sparsifier.masks[name], mask) for name, mask in final.items())
    first = Run(recipe()).sparsifier.masks
    assert any(not torch.equal(final[name], mask) for name, mask in first.items())


@pytest.mark.parametrize("stop", [1, 3, 6, 7, 9])
def test_a_run_that_is_cut_goes_on_to_the_bit(stop):
    whole = Run(recipe(prune_end=0.5))
    for _ in range(STEPS):
        whole.step()

    # Another run, up to the cut
    first = Run(recipe(prune_end=0.5))
    for _ in range(stop):
        first.step()
    file = io.BytesIO()
    torch.save(
        [
            part.state_dict()
            for part in (first.model, first.sparsifier, first.optimizer, first.average)
        ],
        file,
    )
    file.seek(0)
    model, pruning, optimizer, average = torch.load(file, weights_only=True)

    # And from there
    again = Run(recipe(prune_end=0.5), started=False)
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.sparsifier.load_state_dict(pruning)
    again.average.load_state_dict(average)

    for _ in range(STEPS - stop):
        again.step()
    for one, other in ((whole.model, again.model), (whole.average, again.average)):
        assert all(
            torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items()
        )


def test_damaged_logits_are_refused_and_change_nothing():
    run = Run(recipe())
    run.step()
    state = run.sparsifier.state_dict()
    del state["learned"]["0.weight"]
    again = Run(recipe(), started=False)
    with pytest.raises(PruningError, match="learned"):
        again.sparsifier.load_state_dict(state)
    assert again.sparsifier.step == 0 and "learned" not in again.sparsifier.state_dict()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_whose_gradients_are_not_finite_teaches_nothing_and_masks_become_final_at_the_next(
    bad,
):
    run = Run(recipe(prune_end=0.5))
    for step in range(8):
        before = None if run.sparsifier.final else run.logits()
        run.step(gradient=bad if step in (2, 6) else None)
        if step in (2, 6):
            assert all(
                torch.equal(one, other) for one, other in zip(before, run.logits(), strict=True)
            )
        assert run.sparsifier.final == (step >= 7)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_a_reconstruction_chooses_the_first_masks_and_makes_up_for_the_learned_ones():
    inputs = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    walks = []

    def walk(dense):
        walks.append(len(walks))
        return walk_layers(run.model, [inputs], other=dense)

    run = Run(recipe(prune_end=0.5, reconstruct="obs"), started=False, walk=walk)
    run.sparsifier.start()
    by_obs = run.sparsifier.masks["0.weight"].clone()
    assert not torch.equal(by_obs, Run(recipe()).sparsifier.masks["0.weight"])
    assert torch.equal(run.model[0].weight, network()[0].weight * by_obs)
    for _ in range(6):
        run.step()
    learned = {name: mask.clone() for name, mask in run.sparsifier.masks.items()}
    run.step()
    assert len(walks) == 2
    kept = run.sparsifier.masks["0.weight"]
    assert (kept == learned["0.weight"]).float().mean() > 0.8  # one more step of learning
    assert not torch.equal(run.model[0].weight, network()[0].weight * kept)
    check_masks(run.model.state_dict(), run.sparsifier.masks, run.sparsifier.recipe)
    check_masks(run.average.state_dict(), run.sparsifier.masks, run.sparsifier.recipe)


def test_each_layer_learns_among_the_masks_of_its_own_n_and_a_dense_one_stays():
    config = {"sparsity": {"mode": "nxm", "level": [[1, 4], "dense"]}}
    run = Run(Recipe("custom", custom_config=config, prune_schedule="maskllm"))
    assert [values.shape for values in run.logits()] == [(24, 4)]
    for _ in range(STEPS):
        run.step()
    check_masks(run.model.state_dict(), run.sparsifier.masks, run.sparsifier.recipe)


def test_a_layer_without_a_gradient_keeps_its_masks():
    model = linears(torch.randn(4, 8), torch.randn(8, 4))
    model[0].weight.requires_grad_(False)
    sparsifier = Sparsifier(model, recipe(), total_steps=4, epoch_steps=2)
    sparsifier.start()
    before = sparsifier.masks["0.weight"].clone()
    for _ in range(4):
        sparsifier.begin_step()
        model(torch.randn(3, 8)).square().sum().backward()
        sparsifier.end_backward()
        sparsifier.end_step()
    assert torch.equal(sparsifier.masks["0.weight"], before)
