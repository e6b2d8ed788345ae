"""Statistics over calibration images: what is summed, and that the model does not notice."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import linears, statistics_of
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


class Uncalled(nn.Module):
    """A layer that is called, one whose weight is used without a call, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice, self.head = (nn.Linear(*size) for size in ((6, 8), (8, 8), (8, 8), (8, 3)))
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
    return [(torch.randn(n, 5, 6, generator=generator, dtype=dtype), torch.randint(0, 3, (n,), generator=generator))
            for n in sizes]


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
    for name in of_all:
        torch.testing.assert_close(statistics.value(name, "gradient"), of_all[name])
        torch.testing.assert_close(statistics.value(name, "first_gradient"), of_batch[0][name])
        mean_square = sum(gradients[name] ** 2 for gradients in of_batch) / 3
        torch.testing.assert_close(statistics.value(name, "squared_gradient"), mean_square)


def test_a_weight_that_two_layers_share_is_summed_over_both(model):
    model.twice.weight = model.second.weight
    statistics = collect_statistics(model, batches(), F.cross_entropy, {"input_norms", "gradient"})
    assert list(statistics.shapes) == ["first.weight", "second.weight"]
    x = torch.cat([inputs_by_hand_of_shared(model, images) for images, _ in batches()])
    torch.testing.assert_close(statistics.value("second.weight", "input_norms"), x.norm(dim=0))
    of_all = gradients_by_hand(model, *(torch.cat(column) for column in zip(*batches(), strict=True)))
    torch.testing.assert_close(statistics.value("second.weight", "gradient"), of_all["second.weight"])


def inputs_by_hand_of_shared(model, images):
    x = F.gelu(model.first(images))
    y = F.linear(x, model.second.weight, model.second.bias)
    return torch.cat([v.detach().flatten(0, 1) for v in (x, y, F.gelu(model.twice(y)))])


def test_only_what_is_needed_is_collected_and_without_gradients_nothing_runs_backward(model):
    def no_loss(outputs, targets):
        raise AssertionError

    assert collect_statistics(model, batches(), no_loss, {"input_norms"}).needs == {"input_norms"}
    assert collect_statistics(model, batches(), F.cross_entropy).needs == STATISTICS.keys() - {"gram"}
    assert collect_statistics(model, batches()).needs == {"input_norms"}
    assert collect_statistics(model, [images for images, _ in batches()], no_loss).needs == {"input_norms"}
    images, targets = batches()[0]
    keys = collect_statistics(model, [[images]], None, {"gram"}).state_dict().keys()
    assert keys == {"counts", "first.weight.gram", "second.weight.gram", "twice.weight.gram"}


def test_sums_of_bfloat16_inputs_under_autocast_are_no_coarser_than_float32(model):
    model.float()
    data = batches(dtype=torch.float32)
    seen = {}
    handle = model.twice.register_forward_pre_hook(lambda module, args: seen.setdefault("x", []).append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = collect_statistics(model, data, F.cross_entropy, {"gram", "gradient"})
    handle.remove()
    assert seen["x"][0].dtype == torch.bfloat16
    x = torch.cat([x.detach().double().flatten(0, 1) for x in seen["x"]])
    torch.testing.assert_close(statistics.value("twice.weight", "gram"), x.T @ x, rtol=1e-6, atol=1e-6)


# ---- the model is left as it was ----


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(model, frozen):
    model.requires_grad_(not frozen).train()
    model.drop.eval()  # a mode of its own
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
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
    model = timm.create_model("deit_tiny_distilled_patch16_224", embed_dim=24, depth=1, num_classes=3, img_size=32)
    shapes = []

    def loss(outputs, targets):
        shapes.append(outputs.shape)
        return F.cross_entropy(outputs, targets)

    collect_statistics(model.train(), [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))], loss)
    assert shapes == [(2, 3)]


def test_nothing_of_a_batch_waits_for_a_gpu_nor_leaves_it(monkeypatch):
    # The backward pass needs a real GPU.
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, weights, **_: list(map(torch.empty_like, weights)))
    with FakeTensorMode(), torch.device("cuda"):  # reading a value of a fake tensor fails
        model = Uncalled()
        data = [(torch.empty(4, 5, 6, device="cpu"), torch.empty(4, dtype=torch.int64, device="cpu"))] * 2
        statistics = collect_statistics(model, data, F.cross_entropy, STATISTICS, share=0)
        assert {total.device.type for total in statistics.state_dict().values()} == {"cuda"}


# ---- shares of the batches ----


@pytest.mark.parametrize(("score", "pruner"), [("wanda", "owl"), ("taylor", "lamp"), ("fisher", "glob"),
                                               ("snip", "unif"), ("obs", "lamp")])
def test_one_two_and_eight_shares_give_the_same_masks(score, pruner):
    torch.manual_seed(0)
    model = Uncalled()
    data = batches((4, 4, 4, 4, 4, 4, 2), torch.float32)
    whole = collect_statistics(model, data, F.cross_entropy, STATISTICS)
    for count in (2, 3, 8):  # of eight, the last has no batch
        parts = [collect_statistics(model, data[i::count], F.cross_entropy, STATISTICS, share=i) for i in range(count)]
        total = parts[0]
        for part in parts[1:]:
            total.add(part)
        total.check()
        for key, value in total.state_dict().items():
            torch.testing.assert_close(value, whole.state_dict()[key], rtol=1e-14, atol=1e-18)
        masks = compute_masks(model, pruner, 0.5, score=score, statistics=total)
        expected = compute_masks(model, pruner, 0.5, score=score, statistics=whole)
        assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


def test_sums_of_float32_batches_do_not_depend_on_their_order():
    torch.manual_seed(0)
    model, data = Uncalled(), batches((4,) * 9, torch.float32)
    needs = {"input_norms", "gradient", "squared_gradient"}
    forward, backward = (collect_statistics(model, order, F.cross_entropy, needs) for order in (data, data[::-1]))
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
    torch.testing.assert_close(other.value("0.weight", "gram"), 2 * statistics.value("0.weight", "gram"))
    torch.testing.assert_close(other.value("0.weight", "gradient"), statistics.value("0.weight", "gradient"))


@settings(deadline=None, max_examples=20)
@given(st.sets(st.sampled_from(sorted(STATISTICS)), min_size=1), st.sets(st.sampled_from(sorted(STATISTICS))))
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
        (Uncalled(), {"batches": []}, "no calibration images"),
        (Uncalled(), {"needs": {"grams"}}, "unknown statistics 'grams': expected some of input_norms, gram, "),
        (Uncalled(), {"needs": {"gradient"}, "loss": None}, "gradient needs a loss"),
        (Uncalled(), {"needs": {"gradient"}, "batches": [torch.ones(2, 5, 6)]}, "gradient needs targets"),
        (Uncalled(), {"needs": {"gradient"}, "batches": [[torch.ones(2, 5, 6)]]}, "gradient needs targets"),
        (Idle(), {"needs": {"gram"}}, "^idle.weight was used on none of the calibration images"),
        (Idle(), {"needs": {"gradient"}}, "^idle.weight has no gradient on any of the calibration images"),
        (Uncalled(), {"batches": [torch.full((2, 5, 6), torch.inf)]}, "^first.weight has NaN or infinity in its input"),
        (Uncalled(), {"needs": {"gradient"}, "loss": lambda outputs, targets: outputs.sum() * torch.nan},
         "^first.weight has NaN or infinity in its gradient"),
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
