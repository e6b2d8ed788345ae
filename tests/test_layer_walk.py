"""Layers in the order in which they compute, with their inputs."""

import copy
import threading
from collections import Counter

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torch.nn import functional as F

from sparsity_factory import (
    Inputs,
    PruningError,
    collect_statistics,
    prunable_weights,
    prune,
    walk_layers,
)


class Direct(nn.Module):
    """Uses the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(F.linear(x, self.hidden.weight).relu())


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))


class Beside(nn.Module):
    """Top-level layers beside blocks, called in another order than that of the model, one of them
    deep within.
    """

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(6), mlp()) for _ in range(2)])
        self.first = nn.Linear(6, 6)
        self.wrapped = nn.Sequential(
            nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(6, 6))), nn.Linear(6, 6)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.wrapped(x))


class Shared(nn.Module):
    """A module that is called by itself, within another one, and twice with other layers."""

    def __init__(self):
        super().__init__()
        self.common = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.block = nn.ModuleDict({"own": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
        # An attribute of the module, which must be there again afterwards
        self.block.forward = self.in_block
        self.last = nn.Linear(6, 6)

    def in_block(self, x, again=False):
        return self.block["other"](x) if again else self.block["own"](self.common(x))

    def forward(self, x):
        return self.last(self.block(self.common(self.block(self.common(x))), again=True))


def small(name, size=32, **options):
    return timm.create_model(name, img_size=size, num_classes=10, **options), (3, size, size)


class InPlace(nn.Module):
    """Blocks that add their branches to their own input, in place, as some transformers do."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = nn.Linear(6, 6)

        def forward(self, x, rest=None):
            x += self.one(x).relu()
            rest["scale"].mul_(0.9)
            return x.add_(self.two(x) * rest["scale"])

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(3)])

    def forward(self, x):
        x = x.clone()
        rest = {"scale": torch.ones(1)}
        for block in self.blocks:
            x = block(x, rest=rest)
        return x


MODELS = {
    "deit": lambda: small("deit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3),
    "deit distilled": lambda: small(
        "deit_tiny_distilled_patch16_224", depth=2, embed_dim=48, num_heads=3
    ),
    "deit3": lambda: small("deit3_small_patch16_224", depth=2, embed_dim=48, num_heads=3),
    "cait": lambda: small("cait_xxs24_224", depth=2, embed_dim=48, num_heads=3),
    "swin": lambda: small(
        "swin_tiny_patch4_window7_224", 56, depths=(1, 2), num_heads=(2, 4), embed_dim=24
    ),
    # F.linear for queries and keys
    "beit": lambda: small("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=3),
    "mixer": lambda: (
        MlpMixer(num_classes=10, img_size=32, num_blocks=2, embed_dim=48),
        (3, 32, 32),
    ),
    "plain": lambda: (nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)), (5, 6)),
    "deep": lambda: (nn.Sequential(nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))), (6,)),
    "direct": lambda: (Direct(), (6,)),
    "in place": lambda: (InPlace(), (5, 6)),
    "beside": lambda: (Beside(), (5, 6)),
    "shared": lambda: (Shared(), (6,)),
}


def made(name):
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    # Layer scales, biases and tokens that begin at zero would hide mistakes
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.any():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model, [torch.randn(size, *shape) for size in (5, 5, 3)]


@torch.no_grad()
def halve(model, name):
    """What a loop changes: about half of the weights become zero."""
    weight = model.get_parameter(name)
    weight.mul_(
        torch.rand(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) < 0.5
    )


def next_in_turn(model, batches, pending):
    """By running the whole model: the first weight of those that are pending, and its inputs."""
    names, found = {id(model.get_parameter(name)): name for name in pending}, {}

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is F.linear:
                inputs, weight = (
                    *args,
                    *(kwargs[key] for key in ("input", "weight") if key in kwargs),
                )[:2]
                if name := names.get(id(weight)):
                    seen = found.setdefault(name, {})
                    # Of its first use
                    seen.setdefault(id(self), inputs.reshape(-1, inputs.shape[-1]).clone())
            return func(*args, **kwargs)

    looks = [Look() for _ in batches]
    for look, batch in zip(looks, batches, strict=True):
        with look:
            model(batch)
    name, inputs = next(iter(found.items()))
    return name, torch.cat(list(inputs.values()))


def plain_walk(model, batches, visit):
    pending = list(prunable_weights(model))
    with torch.no_grad():
        while pending:
            name, inputs = next_in_turn(model.eval(), batches, pending)
            pending.remove(name)
            visit(name, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_layers_come_as_they_compute_each_with_the_inputs_that_the_changed_model_gives_it(name):
    model, batches = made(name)
    expected, found = [], []

    def visit_plainly(layer, inputs):
        expected.append((layer, inputs))
        halve(model, layer)

    plain_walk(model, batches, visit_plainly)
    model, batches = made(name)

    for layer, inputs in walk_layers(model, [(batch, None) for batch in batches]):
        found.append((layer, inputs))
        halve(model, layer)
    assert [layer for layer, _ in found] == [layer for layer, _ in expected]
    assert sorted(layer for layer, _ in found) == sorted(prunable_weights(model))
    for (_, sums), (_, inputs) in zip(found, expected, strict=True):
        inputs = inputs.double()
        assert sums.gram.dtype == torch.float64
        assert sums.tokens == len(inputs)
        torch.testing.assert_close(sums.mean, inputs.mean(0), rtol=1e-5, atol=1e-6)
        centred = inputs - inputs.mean(0)
        torch.testing.assert_close(sums.gram, centred.T @ centred, rtol=1e-4, atol=1e-3)
        about_zero = sums.about_zero().gram
        torch.testing.assert_close(about_zero, inputs.T @ inputs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["deit", "cait", "shared", "plain"])
def test_the_model_is_left_as_it_was(name):
    model, batches = made(name)
    model.train()
    next(model.children()).eval()

    def state():
        return [
            (
                module.training,
                {key: value for key, value in vars(module).items() if key == "forward"},
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
            )
            for module in model.modules()
        ]

    before, weights, threads = (
        state(),
        {key: value.clone() for key, value in model.state_dict().items()},
        threading.active_count(),
    )
    list(walk_layers(model, batches))
    assert state() == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert threading.active_count() == threads
    assert (
        not nn.modules.module._global_forward_hooks
        and not nn.modules.module._global_forward_pre_hooks
    )


def test_the_model_may_be_used_during_a_visit():
    model, batches = made("deit")
    model.eval()
    outputs = []
    for _ in walk_layers(model, batches):
        outputs.append(model(batches[0]))
    assert len(outputs) == 8
    assert all(torch.equal(output, model(batches[0])) for output in outputs)


class Counted(nn.Module):
    """Counts the calls of a model's modules."""

    def __init__(self, model):
        super().__init__()
        self.calls = Counter()
        self.hooks = [
            module.register_forward_pre_hook(lambda module, args: self.calls.update([module]))
            for module in model.modules()
        ]


@pytest.mark.parametrize("name, most", [("deit", 5), ("swin", 5), ("cait", 6), ("deep", 3)])
def test_no_part_of_the_model_runs_once_for_each_layer(name, most):
    """Per batch, and once more for the order: each layer when it is looked at and when it computes,
    those before it in the same block as well, and what lies outside of blocks once."""
    model, batches = made(name)
    counted = Counted(model)
    list(walk_layers(model, batches))
    assert max(counted.calls.values()) <= most * len(batches) + 1
    if name == "deit":
        for block in model.blocks:
            calls = {
                block: 1,
                model.norm: 1,
                model.patch_embed.proj: 1,
                block.norm1: 5,
                block.attn.qkv: 5,
                block.attn.proj: 4,
                block.mlp.fc1: 3,
                block.mlp.fc2: 2,
            }
            assert {part: counted.calls[part] for part in calls} == {
                part: times * len(batches) + 1 for part, times in calls.items()
            }


def test_under_autocast_later_layers_see_changed_weights():
    """Autocast keeps the weights that it has cast, which a walk must not use again."""
    model, batches = made("deit")
    model.eval()
    found, expected = [], []
    with torch.autocast("cpu", torch.bfloat16):
        model(batches[0])  # casts, and keeps
        for layer, inputs in walk_layers(model, batches):
            assert torch.is_autocast_enabled("cpu")
            found.append(inputs.about_zero().gram)
            with torch.autocast("cpu", enabled=False):
                halve(model, layer)
        assert torch.is_autocast_enabled("cpu")
    model, batches = made("deit")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):

        def visit_plainly(layer, inputs):
            assert inputs.dtype in (torch.bfloat16, torch.float32)
            inputs = inputs.double()
            expected.append(inputs.T @ inputs)
            with torch.autocast("cpu", enabled=False):
                halve(model, layer)

        plain_walk(model, batches, visit_plainly)
    assert len(found) == len(expected) == 8
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one, other.double(), rtol=1e-2, atol=1e-2 * other.abs().max().item()
        )


def test_what_processes_have_seen_is_merged():
    """Two processes, whose shares have other means: the second adds up what the first has left."""
    generator = torch.Generator().manual_seed(0)
    shares = [torch.randn(n, 6, generator=generator) + shift for n, shift in ((90, 1), (40, 5))]
    others = [3 * share - share.flip(1) for share in shares]

    def merged(own: int, tensors_of_other: list[torch.Tensor]) -> tuple[Inputs, list]:
        left = []
        coming = iter(tensors_of_other)

        def add_up(total):
            left.append(total.clone())
            total += next(coming, torch.zeros_like(total))

        sums = Inputs.of(torch.zeros(3, 6), with_other=True)
        for part, other in zip(shares[own].split(25), others[own].split(25), strict=True):
            sums.add(part, other)
        sums.complete(add_up)
        return sums, left

    # An exchange needs what came out of those before: the first tensor, then two, then all
    tensors: list = []
    for _ in range(5):
        _, first = merged(0, tensors)
        found, tensors = merged(1, first)

    inputs = torch.cat(shares).double()
    other = torch.cat(others).double()
    centred = inputs - inputs.mean(0)
    assert found.tokens == 130
    torch.testing.assert_close(found.mean, inputs.mean(0))
    torch.testing.assert_close(found.other_mean, other.mean(0))
    torch.testing.assert_close(found.gram, centred.T @ centred, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        found.cross, centred.T @ (other - other.mean(0)), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(found.about_zero().cross, inputs.T @ other, rtol=1e-5, atol=1e-4)


def test_the_walk_merges_processes():
    model, batches = made("deit")
    alone = [inputs for _, inputs in walk_layers(model, batches)]
    twice = [inputs for _, inputs in walk_layers(model, batches, add_up=lambda x: x.mul_(2))]
    for one, two in zip(alone, twice, strict=True):
        assert torch.equal(2 * one.gram, two.gram) and torch.equal(one.mean, two.mean)
        assert 2 * one.tokens == two.tokens


def test_an_input_that_does_not_vary_has_a_gram_matrix_of_zero_there():
    inputs = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    inputs[:, 2], inputs[:, 5], inputs[:, 6] = 7.3, 0.0, 1000 + inputs[:, 6]
    sums = Inputs.of(torch.zeros(3, 8))
    for part in inputs.split(3000):
        sums.add(part)
    sums.complete()
    assert sums.gram.isfinite().all()
    assert sums.gram.diagonal().eq(0).nonzero().flatten().tolist() == [2, 5]
    assert not sums.gram[2].any() and not sums.gram[:, 2].any()
    centred = inputs.double() - inputs.double().mean(0)
    centred[:, 2] = 0
    torch.testing.assert_close(sums.gram, centred.T @ centred, rtol=1e-4, atol=1e-2)
    assert sums.about_zero().gram.diagonal().eq(0).nonzero().flatten().tolist() == [5]


# ---- errors ----


class Odd(nn.Module):
    """Fails, or takes another way, by what the first pixel is."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        kind = int(x[0, 0])
        if kind == 0:  # before any layer
            raise ValueError("zero")
        x = self.one(x) if kind != 2 else self.two(x)
        if kind == 3:  # between layers
            raise ValueError("three")
        if kind == 4:
            return x
        return self.two(x) if kind != 2 else self.one(x)


def pixel(value):
    return torch.full((2, 4), float(value))


@pytest.mark.parametrize(
    "batches, error, words",
    [
        ([], PruningError, "no calibration images"),
        ([pixel(1), pixel(0)], ValueError, "zero"),
        ([pixel(0), pixel(1)], ValueError, "zero"),
        ([pixel(1), pixel(1), pixel(3)], ValueError, "three"),
        ([pixel(1), pixel(3), pixel(1)], ValueError, "three"),
        ([pixel(1), pixel(2)], PruningError, "an order that depends on the images"),
        ([pixel(2), pixel(1), pixel(1)], PruningError, "an order that depends on the images"),
        ([pixel(1), pixel(4)], PruningError, "an order that depends on the images"),
        ([pixel(1), pixel(4), pixel(1)], PruningError, "an order that depends on the images"),
        ([pixel(4), pixel(4)], PruningError, "two.0.weight was used on none"),
    ],
    ids=lambda value: (
        "".join(str(int(batch[0, 0])) for batch in value) or "none"
        if isinstance(value, list)
        else ""
    ),
)
def test_what_goes_wrong_ends_all_threads_and_leaves_the_model_as_it_was(batches, error, words):
    model, threads = Odd().train(), threading.active_count()
    del model.unused
    with pytest.raises(error, match=words):
        list(walk_layers(model, batches))
    assert threading.active_count() == threads
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    assert (
        not nn.modules.module._global_forward_hooks
        and not nn.modules.module._global_forward_pre_hooks
    )


def test_an_error_of_a_visit_ends_all_threads():
    model, threads = Odd(), threading.active_count()
    del model.unused
    with pytest.raises(KeyboardInterrupt):
        for _ in walk_layers(model, [pixel(1)] * 3):
            raise KeyboardInterrupt
    assert threading.active_count() == threads
    assert all(module.training and "forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_loop_that_breaks_or_a_closed_walk_ends_all_threads(layers):
    model, threads = Odd(), threading.active_count()
    del model.unused

    def as_before():
        return threading.active_count() == threads and all(
            module.training and "forward" not in vars(module) for module in model.modules()
        )

    for number, _ in enumerate(walk_layers(model, [pixel(1)] * 3)):
        assert not as_before()
        if number + 1 >= layers:
            break
    assert as_before()

    walk = walk_layers(model, [pixel(1)] * 3)
    for _ in range(layers):
        next(walk)
    walk.close()
    assert as_before()


def test_the_body_of_a_loop_has_its_own_gradients():
    model, batches = made("plain")
    with torch.no_grad():
        walk = walk_layers(model, batches)
    for _, inputs in walk:
        assert torch.is_grad_enabled() and not inputs.gram.requires_grad


def test_a_layer_that_no_image_reaches_is_named():
    with pytest.raises(
        PruningError, match="^unused.weight was used on none of the calibration images"
    ):
        list(walk_layers(Odd(), [pixel(1)]))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
        self.part.forward = self.within

    def within(self, x):
        first, second = ("one", "two") if x[0, 0] > 0 else ("two", "one")
        return self.part[second](self.part[first](x))

    def forward(self, x):
        return self.part(x)


def test_an_order_within_a_module_that_the_images_decide_is_an_error():
    with pytest.raises(
        PruningError,
        match="the images decide whether part.(one|two).weight or part.(one|two).weight",
    ):
        list(walk_layers(Branch(), [pixel(1), pixel(-1)]))


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_a_model_beside_sees_the_same_images(name):
    """The sums over what the changed model and its copy give a layer, each from the hooks of a
    plain pass.
    """
    model, batches = made(name)
    dense, found = copy.deepcopy(model), {}

    for layer, inputs in walk_layers(model, batches, other=dense):
        found[layer] = inputs
        halve(model, layer)

    expected, others = [], []
    model, _ = made(name)
    plain_walk(
        model,
        batches,
        lambda layer, inputs: (expected.append((layer, inputs.double())), halve(model, layer)),
    )
    plain_walk(dense, batches, lambda layer, inputs: others.append(inputs.double()))
    for (layer, inputs), other in zip(expected, others, strict=True):
        about_zero = found[layer].about_zero().cross
        torch.testing.assert_close(about_zero, inputs.T @ other, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found[layer].other_mean, other.mean(0), rtol=1e-5, atol=1e-6)
        centred = (inputs - inputs.mean(0)).T @ (other - other.mean(0))
        torch.testing.assert_close(found[layer].cross, centred, rtol=1e-4, atol=1e-3)


def test_a_layer_that_no_image_reaches_is_named_and_can_be_left_out():
    class Idle(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)

        def forward(self, x):
            return self[1](self[0](x))

    torch.manual_seed(0)
    model = Idle()
    batches = [torch.randn(8, 4)]
    named = "^one.weight, two.weight were used on none .* layers '!one' '!two' to leave out"
    with pytest.raises(PruningError, match=named):
        collect_statistics(model, batches, needs={"gram"})
    with pytest.raises(PruningError, match=named):
        prune(model, "unif", 0.5, batches=batches)

    masks = prune(model, "unif", 0.5, score="wanda", batches=batches, layers=["!one", "!two"])
    assert list(masks) == list(prunable_weights(model)) == ["0.weight", "1.weight"]
    model = Idle()
    masks = prune(model, "unif", 0.5, batches=batches, layers=lambda name, layer: name == "1")
    assert list(masks) == ["1.weight"] and masks["1.weight"].sum() == 4
