"""Statistics over calibration images: what is summed, and that the model does not notice."""

import copy

import pytest
import timm
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import linears, statistics_of
from pretend_cuda import pretend_cuda
from together import together
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sparsity_factory import (
    STATISTICS,
    PruningError,
    Statistics,
    collect_statistics,
    compute_masks,
    prunable_weights,
)
from sparsity_factory import statistics as module
from sparsity_factory.removal_costs import cut, removal_costs


class Uncalled(nn.Module):
    """A layer that is called, one whose weight is used without a call, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice, self.head = (
            nn.Linear(*size) for size in ((6, 8), (8, 8), (8, 8), (8, 3))
        )
        self.drop = nn.Dropout(0.5)

    def get_classifier(self):
        return self.head

    def forward(self, x):  # (images, tokens, 6)
        x = F.gelu(self.first(self.drop(x)))
        x = F.linear(x, self.second.weight, bias=self.second.bias)
        x = self.twice(F.gelu(self.twice(x)))
        return self.head(x.mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Uncalled().double()


def batches(sizes=(4, 4, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 5, 6, generator=generator, dtype=dtype),
            torch.randint(0, 3, (n,), generator=generator),
        )
        for n in sizes
    ]


def inputs_by_hand(model, data) -> dict:
    """All inputs of each layer, one row a token."""
    found = {name: [] for name in prunable_weights(model)}
    for images, _ in data:
        x = F.gelu(model.first(images))
        y = F.linear(x, model.second.weight, model.second.bias)
        z = F.gelu(model.twice(y))
        for name, value in {"first": [images], "second": [x], "twice": [y, z]}.items():
            found[f"{name}.weight"] += [v.detach().flatten(0, 1) for v in value]
    return {name: torch.cat(rows) for name, rows in found.items()}


def gradients_by_hand(model, images, targets) -> dict:
    copied = copy.deepcopy(model).eval()
    F.cross_entropy(copied(images), targets).backward()
    return {name: weight.grad for name, weight in prunable_weights(copied).items()}


# ---- what is collected ----


def test_inputs_are_summed_wherever_a_weight_is_used(model):
    model.train()  # the dropout would show
    statistics = collect_statistics(model, batches(), needs={"input_norms", "gram"})
    for name, x in inputs_by_hand(model, batches()).items():
        torch.testing.assert_close(statistics.value(name, "gram"), x.T @ x)
        norms = torch.stack([column.norm() for column in x.T])
        torch.testing.assert_close(statistics.value(name, "input_norms"), norms)


def test_gradients_are_those_of_autograd_by_hand(model):
    data = batches()
    statistics = collect_statistics(model, data, F.cross_entropy)
    assert statistics.images == 10
    of_all = gradients_by_hand(model, *(torch.cat(column) for column in zip(*data, strict=True)))
    of_batch = [gradients_by_hand(model, *batch) for batch in data]
    of_image = [
        gradients_by_hand(model, image[None], target[None])
        for images, targets in data
        for image, target in zip(images, targets, strict=True)
    ]
    for name in of_all:
        torch.testing.assert_close(statistics.value(name, "gradient"), of_all[name])
        torch.testing.assert_close(statistics.value(name, "first_gradient"), of_batch[0][name])
        mean_square = sum(gradients[name] ** 2 for gradients in of_image) / 10
        torch.testing.assert_close(statistics.value(name, "squared_gradient"), mean_square)


def test_squared_gradients_do_not_depend_on_the_size_of_batches(model):
    images, targets = (torch.cat(column) for column in zip(*batches(), strict=True))
    found = []
    for size in (1, 3, 10):
        data = list(zip(images.split(size), targets.split(size), strict=True))
        found.append(collect_statistics(model, data, F.cross_entropy, {"squared_gradient"}))
    for name in found[0].shapes:
        one, *others = (statistics.value(name, "squared_gradient") for statistics in found)
        assert all(torch.allclose(one, other) for other in others)


class Layers(nn.Module):
    """Layers that are given images, or tokens as in OpenAI's CLIP, first; or all rows of these."""

    def __init__(self, first="rows"):
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))

    def forward(self, x):
        if self.first == "images":
            return self.layers(x).mean(1)
        x = x.transpose(0, 1).contiguous()
        shape = x.shape
        x = x.flatten(0, 1) if self.first == "rows" else x
        return self.layers(x).view(shape).mean(0)


@pytest.mark.parametrize("need", ["squared_gradient", "removal_costs"])
@pytest.mark.parametrize("images", [5, 4], ids=["as many as tokens", "fewer than tokens"])
def test_tokens_may_come_before_images_unless_all_are_rows_of_one_matrix(need, images):
    data = batches((images, images - 1), torch.float32)
    for loss in (F.cross_entropy,):
        expected = collect_statistics(Layers("images"), data, loss, {need})
        found = collect_statistics(Layers("tokens"), data, loss, {need})
        for name in expected.shapes:
            torch.testing.assert_close(found.value(name, need), expected.value(name, need))
        with pytest.raises(
            PruningError, match="layers.0.weight is not given the tokens of one image"
        ):
            collect_statistics(Layers(), data, loss, {need})
        # Sums over all images do not mind
        collect_statistics(Layers(), data, loss, {"gradient", "input_norms"})


def test_a_weight_that_two_layers_share_is_summed_over_both(model):
    model.twice.weight = model.second.weight
    statistics = collect_statistics(model, batches(), F.cross_entropy, {"input_norms", "gradient"})
    assert list(statistics.shapes) == ["first.weight", "second.weight"]
    x = torch.cat([inputs_by_hand_of_shared(model, images) for images, _ in batches()])
    torch.testing.assert_close(statistics.value("second.weight", "input_norms"), x.norm(dim=0))
    of_all = gradients_by_hand(
        model, *(torch.cat(column) for column in zip(*batches(), strict=True))
    )
    torch.testing.assert_close(
        statistics.value("second.weight", "gradient"), of_all["second.weight"]
    )


def inputs_by_hand_of_shared(model, images):
    x = F.gelu(model.first(images))
    y = F.linear(x, model.second.weight, model.second.bias)
    return torch.cat([v.detach().flatten(0, 1) for v in (x, y, F.gelu(model.twice(y)))])


class InPlace(Uncalled):
    """What its layers give is changed in place afterwards."""

    def forward(self, x):
        x = self.first(x)
        x *= 2
        x = self.second(F.relu_(x))
        x += 1
        return self.head(x.mean(1) + self.twice(x[:, 0]))


def small_swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(1, 2),
        # Four windows an image, shifted ones, and patches that merge
        num_classes=3,
    )


def small_cait():
    return timm.create_model(
        "cait_xxs24_224", img_size=32, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )


@pytest.mark.parametrize("make", [Uncalled, InPlace, small_swin, small_cait])
@pytest.mark.parametrize("frozen", [False, True])
def test_removal_costs_are_summed_from_the_gradients_of_single_images(make, frozen):
    torch.manual_seed(0)
    model = make().double().requires_grad_(not frozen)
    data = batches((4, 3, 1))
    if make in (small_swin, small_cait):
        size = 56 if make is small_swin else 32
        data = [
            (torch.randn(len(targets), 3, size, size, dtype=torch.float64), targets)
            for _, targets in data
        ]
    statistics = collect_statistics(model, data, F.cross_entropy, {"removal_costs"})
    model.requires_grad_(True)
    singles = [
        gradients_by_hand(model, images[i : i + 1], targets[i : i + 1])
        for images, targets in data
        for i in range(len(images))
    ]
    for name, weight in prunable_weights(model).items():
        fisher = sum(cut(of[name])[:, :, None] * cut(of[name])[:, None, :] for of in singles)
        rows, columns = torch.tril_indices(*fisher.shape[1:])
        squares = fisher[:, rows, columns]
        torch.testing.assert_close(
            statistics.state_dict()[f"{name}.removal_costs"], squares, rtol=1e-9, atol=1e-15
        )
        expected = removal_costs(weight, squares, 8)
        torch.testing.assert_close(
            statistics.value(name, "removal_costs"), expected, rtol=1e-6, atol=1e-15
        )


def test_passes_for_some_layers_each_give_what_one_pass_gives(model):
    data, needs = (
        batches(),
        {"removal_costs", "squared_gradient", "input_norms", "gram", "first_gradient"},
    )
    whole = collect_statistics(model, data, F.cross_entropy, needs)
    of_a_layer = 8 * whole.state_dict()["second.weight.removal_costs"].numel()
    # An iterator cannot be read again
    once = collect_statistics(model, iter(data), F.cross_entropy, needs, memory=0)
    assert all(
        torch.equal(total, whole.state_dict()[key]) for key, total in once.state_dict().items()
    )
    for memory, passes in ((0, 3), (of_a_layer, 3), (2 * of_a_layer, 2), (3 * of_a_layer, 1)):
        loads = []

        class Loader:
            def __iter__(self, loads=loads):
                loads.append(1)
                return iter(data)

        parts = collect_statistics(model, Loader(), F.cross_entropy, needs, memory=memory)
        assert len(loads) == passes
        assert (parts.needs, parts.shapes, parts.images) == (
            whole.needs,
            whole.shapes,
            whole.images,
        )
        assert torch.equal(parts.state_dict()["counts"], whole.state_dict()["counts"])
        for name in whole.shapes:
            for need in needs - {"removal_costs"}:
                assert torch.equal(parts.value(name, need), whole.value(name, need))
        for pruner in ("cap", "lamp"):
            masks = compute_masks(model, pruner, 0.5, score="cap", statistics=parts)
            expected = compute_masks(model, pruner, 0.5, score="cap", statistics=whole)
            assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


def test_only_what_is_needed_is_collected_and_without_gradients_nothing_runs_backward(model):
    def no_loss(outputs, targets):
        raise AssertionError

    assert collect_statistics(model, batches(), no_loss, {"input_norms"}).needs == {"input_norms"}
    by_request = {"gram", "gradient_gram", "removal_costs"}
    assert (
        collect_statistics(model, batches(), F.cross_entropy).needs
        == STATISTICS.keys() - by_request
    )
    assert collect_statistics(model, batches()).needs == {"input_norms"}
    assert collect_statistics(model, [images for images, _ in batches()], no_loss).needs == {
        "input_norms"
    }
    images, targets = batches()[0]
    keys = collect_statistics(model, [[images]], None, {"gram"}).state_dict().keys()
    assert keys == {"counts", "first.weight.gram", "second.weight.gram", "twice.weight.gram"}


def test_sums_of_bfloat16_inputs_under_autocast_are_no_coarser_than_float32(model):
    model.float()
    data = batches(dtype=torch.float32)
    seen = {}
    handle = model.twice.register_forward_pre_hook(
        lambda module, args: seen.setdefault("x", []).append(args[0])
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = collect_statistics(model, data, F.cross_entropy, {"gram", "gradient"})
    handle.remove()
    assert seen["x"][0].dtype == torch.bfloat16
    x = torch.cat([x.detach().double().flatten(0, 1) for x in seen["x"]])
    torch.testing.assert_close(
        statistics.value("twice.weight", "gram"), x.T @ x, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("mean", [1, 100, 400])
def test_a_gram_matrix_of_float32_inputs_loses_nothing_about_a_large_mean(mean):
    """What varies of the inputs is seen in it, as if it were summed in float64."""
    torch.manual_seed(0)
    inputs = mean + torch.randn(3, 500, 6)
    statistics = collect_statistics(linears(torch.randn(4, 6)), inputs, needs={"gram"})
    inputs = inputs.flatten(0, 1).double()
    shift = inputs.mean(0)
    varying = statistics.value("0.weight", "gram") - len(inputs) * torch.outer(shift, shift)
    expected = (inputs - shift).T @ (inputs - shift)
    torch.testing.assert_close(varying, expected, rtol=1e-5, atol=1e-2)


# ---- the model is left as it was ----


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(model, frozen):
    model.requires_grad_(not frozen).train()
    model.drop.eval()  # a mode of its own
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before, modes = (
        copy.deepcopy(model.state_dict()),
        [module.training for module in model.modules()],
    )
    with torch.no_grad():
        statistics = collect_statistics(model, batches(), F.cross_entropy)
    assert all(value.any() for value in statistics.state_dict().values())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad != frozen for parameter in model.parameters())
    assert torch.equal(model.first.weight.grad, torch.ones_like(model.first.weight))
    assert model.second.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_is_left_as_it_was_when_the_loss_fails(model):
    def fails(outputs, targets):
        raise RuntimeError("a loss")

    model.train().requires_grad_(False)
    with pytest.raises(RuntimeError, match="a loss"):
        collect_statistics(model, batches(), fails, {"gradient"})
    assert model.training
    assert not model.first.weight.requires_grad


def test_a_distilled_model_gives_the_loss_the_one_output_of_its_evaluation_mode():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", embed_dim=24, depth=1, num_classes=3, img_size=32
    )
    shapes = []

    def loss(outputs, targets):
        shapes.append(outputs.shape)
        return F.cross_entropy(outputs, targets)

    collect_statistics(model.train(), [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))], loss)
    assert shapes == [(2, 3)]


def test_nothing_of_a_batch_waits_for_a_gpu_nor_leaves_it(monkeypatch):
    # The backward pass needs a real GPU.
    monkeypatch.setattr(
        torch.autograd, "grad", lambda loss, weights, **_: list(map(torch.empty_like, weights))
    )
    with FakeTensorMode(), torch.device("cuda"):  # reading a value of a fake tensor fails
        model = Uncalled()
        data = [
            (torch.empty(4, 5, 6, device="cpu"), torch.empty(4, dtype=torch.int64, device="cpu"))
        ] * 2
        statistics = collect_statistics(model, data, F.cross_entropy, STATISTICS, share=0)
        assert {total.device.type for total in statistics.state_dict().values()} == {"cuda"}


# ---- shares of the batches ----


@pytest.mark.parametrize(
    ("score", "pruner"),
    [
        ("wanda", "owl"),
        ("taylor", "lamp"),
        ("fisher", "glob"),
        ("snip", "unif"),
        ("obs", "lamp"),
        ("cap", "cap"),
    ],
)
def test_one_two_and_eight_shares_give_the_same_masks(score, pruner):
    torch.manual_seed(0)
    model = Uncalled()
    data = batches((4, 4, 4, 4, 4, 4, 2), torch.float32)
    whole = collect_statistics(model, data, F.cross_entropy, STATISTICS)
    sums = {key: total.clone() for key, total in whole.state_dict().items()}
    for count in (2, 3, 8):  # of eight, the last has no batch
        parts = [
            collect_statistics(model, data[i::count], F.cross_entropy, STATISTICS, share=i)
            for i in range(count)
        ]
        total = parts[0]
        for part in parts[1:]:
            total.add(part)
        total.check()
        for key, value in total.state_dict().items():
            # Those for the removal costs are in float32, too large for float64
            rtol, atol = (1e-4, 1e-8) if key.endswith("removal_costs") else (1e-13, 1e-14)
            torch.testing.assert_close(value, sums[key], rtol=rtol, atol=atol)
        masks = compute_masks(model, pruner, 0.5, score=score, statistics=total)
        expected = compute_masks(model, pruner, 0.5, score=score, statistics=whole)
        assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


@pytest.mark.parametrize("memory", [0, 2**30, None])
@pytest.mark.parametrize("count", [2, 5])
def test_each_process_computes_the_removal_costs_of_some_layers_and_all_have_the_same(
    model, memory, count, monkeypatch
):
    data = batches((4, 4, 4, 2, 1))
    whole = collect_statistics(model, data, F.cross_entropy, {"removal_costs"})
    expected = {name: whole.value(name, "removal_costs") for name in whole.shapes}
    computed = []

    def note(weight, *others):
        computed.append(weight.shape)
        return removal_costs(weight, *others)

    def collect(rank, add_up):
        return collect_statistics(
            copy.deepcopy(model),
            data[rank::count],
            F.cross_entropy,
            {"removal_costs"},
            share=rank,
            add_up=add_up,
            memory=memory,
        )

    monkeypatch.setattr(module, "removal_costs", note)
    first, *others = together(count, collect)
    assert len(computed) == 3 and first.images == whole.images
    for name, costs in expected.items():
        found = first.value(name, "removal_costs")
        torch.testing.assert_close(found, costs, rtol=1e-6, atol=0)
        assert all(torch.equal(found, other.value(name, "removal_costs")) for other in others)


def test_removal_costs_are_saved_in_the_place_of_their_sums(model):
    needs = {"removal_costs", "gram"}
    statistics = collect_statistics(model, batches(), F.cross_entropy, needs, memory=0)
    other = Statistics(prunable_weights(model), needs)
    other.load_state_dict(statistics.state_dict())
    for name in statistics.shapes:
        for need in needs:
            assert torch.equal(other.value(name, need), statistics.value(name, need))


def test_without_a_limit_a_pass_takes_half_of_the_free_memory_and_a_share_of_it_on_cpus(
    model, monkeypatch
):
    sizes = []
    groups = module._groups

    def note(weights, needs, memory):
        sizes.append(memory)
        return groups(weights, needs, memory)

    def collect(rank, add_up):
        needs = {"removal_costs"}
        collect_statistics(
            copy.deepcopy(model), batches(), F.cross_entropy, needs, share=rank, add_up=add_up
        )

    free = iter((300.0, 200.0))
    monkeypatch.setattr(module, "_groups", note)
    monkeypatch.setattr(module, "free_memory", lambda device: 800.0)
    collect(None, None)
    monkeypatch.setattr(module, "free_memory", lambda device: next(free))
    together(2, collect)
    assert sizes == [400, 50, 50]


def test_sums_that_no_pass_frees_take_one_pass(model):
    loads = []

    class Loader:
        def __iter__(self):
            loads.append(1)
            return iter(batches())

    collect_statistics(model, Loader(), F.cross_entropy, {"gram", "gradient"}, memory=0)
    assert len(loads) == 1


def test_on_a_gpu_the_sums_of_a_pass_leave_room_for_those_of_the_next(model):
    data = batches()
    needs = {"gram", "input_norms"}
    whole = collect_statistics(model, data, None, needs)
    with pretend_cuda():
        model.to("cuda")
        one = collect_statistics(model, data, None, needs)
        parts = collect_statistics(model, data, None, needs, memory=0)
        for name in whole.shapes:
            for need in needs:
                assert one.value(name, need).device.type == "cuda"
                assert parts.value(name, need).device.type == "cpu"
                assert torch.equal(parts.value(name, need), whole.value(name, need))


def test_sums_that_were_let_go_cannot_be_added(model):
    one, other = (
        collect_statistics(model, batches(), F.cross_entropy, {"removal_costs"}) for _ in range(2)
    )
    one.value("first.weight", "removal_costs")
    for a, b in ((one, other), (other, one)):
        with pytest.raises(PruningError, match="before their removal costs are looked at"):
            a.add(b)


def test_sums_of_float32_batches_do_not_depend_on_their_order():
    torch.manual_seed(0)
    model, data = Uncalled(), batches((4,) * 9, torch.float32)
    needs = {"input_norms", "gradient", "squared_gradient"}
    forward, backward = (
        collect_statistics(model, order, F.cross_entropy, needs) for order in (data, data[::-1])
    )
    for key, value in forward.state_dict().items():
        assert torch.equal(value, backward.state_dict()[key])


def test_the_state_is_the_sums_themselves_and_loads_into_other_statistics():
    model = linears(torch.randn(3, 4))
    statistics = statistics_of(model)
    other = Statistics(prunable_weights(model), STATISTICS)
    other.load_state_dict(statistics.state_dict())
    for total in other.state_dict().values():
        total *= 2  # as an all-reduce over two processes would
    assert other.images == 2 * statistics.images
    torch.testing.assert_close(
        other.value("0.weight", "gram"), 2 * statistics.value("0.weight", "gram")
    )
    torch.testing.assert_close(
        other.value("0.weight", "gradient"), statistics.value("0.weight", "gradient")
    )


@settings(max_examples=examples(20))
@given(
    st.sets(st.sampled_from(sorted(STATISTICS)), min_size=1),
    st.sets(st.sampled_from(sorted(STATISTICS))),
)
def test_only_statistics_of_the_same_kind_are_added(ours, theirs):
    model = linears(torch.randn(3, 4))
    a, b = statistics_of(model, ours), statistics_of(model, theirs)
    if ours == theirs:
        a.add(b)
        return
    with pytest.raises(PruningError, match="only be added to the same"):
        a.add(b)


# ---- mistakes ----


class Idle(Uncalled):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("model_", "request_", "message"),
    [
        (
            Layers(),
            {"needs": {"removal_costs"}},
            "^layers.0.weight is not given the tokens of one image",
        ),
        (
            Idle(),
            {"needs": {"removal_costs"}},
            "^idle.weight was used on none of the calibration images",
        ),
        (Uncalled(), {"batches": []}, "no calibration images"),
        (
            Uncalled(),
            {"needs": {"grams"}},
            "unknown statistics 'grams': expected some of input_norms, gram, ",
        ),
        (Uncalled(), {"needs": {"gradient"}, "loss": None}, "gradient needs a loss"),
        (
            Uncalled(),
            {"needs": {"gradient"}, "batches": [torch.ones(2, 5, 6)]},
            "gradient needs targets",
        ),
        (
            Uncalled(),
            {"needs": {"gradient"}, "batches": [[torch.ones(2, 5, 6)]]},
            "gradient needs targets",
        ),
        (Idle(), {"needs": {"gram"}}, "^idle.weight was used on none of the calibration images"),
        (
            Idle(),
            {"needs": {"gradient"}},
            "^idle.weight has no gradient on any of the calibration images",
        ),
        (
            Uncalled(),
            {"batches": [torch.full((2, 5, 6), torch.inf)]},
            "^first.weight has NaN or infinity in its input",
        ),
        (
            Uncalled(),
            {"needs": {"gradient"}, "loss": lambda outputs, targets: outputs.sum() * torch.nan},
            "^first.weight has NaN or infinity in its gradient",
        ),
        (nn.Conv2d(3, 3, 3), {}, "no prunable weights"),
    ],
)
def test_a_mistake_is_a_one_line_error(model_, request_, message):
    request_ = {"batches": batches(dtype=torch.float32), "loss": F.cross_entropy} | request_
    with pytest.raises(PruningError, match=message) as error:
        collect_statistics(model_, **request_)
    assert "\n" not in str(error.value)


def test_a_first_batch_that_no_share_had_is_missed(model):
    statistics = collect_statistics(model, batches(), F.cross_entropy, {"first_gradient"}, share=1)
    with pytest.raises(PruningError, match="first batch"):
        statistics.check()
