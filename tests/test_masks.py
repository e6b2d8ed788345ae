"""Which weights are prunable, and how `Masks` keeps them pruned."""

import copy
import io

import pytest
import timm
import torch
from pretend_cuda import pretend_cuda
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, prune
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity_factory import (
    Masks,
    PruningError,
    check_masks,
    choose_layers,
    compute_masks,
    prunable_weights,
    unpack,
)
from sparsity_factory.masks import POSITION_MLPS, checksums, packed, select, unpacked


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224",
        img_size=32,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=5,
        drop_path_rate=0.3,
    )


# ---- which weights are prunable ----


def test_deit_small_has_48_prunable_weights_in_model_order():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(prunable_weights(model)) == [
        f"blocks.{b}.{layer}.weight" for b in range(12) for layer in layers
    ]


class WithClassifier(nn.Module):
    def __init__(self, classifier):
        super().__init__()
        self.body, self.head, self.head_dist = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.classifier = lambda: classifier(self)

    def get_classifier(self):
        return self.classifier()


def test_the_classifier_of_a_model_in_a_model_is_not_prunable():
    inner = WithClassifier(lambda model: model.head)
    wrapped = nn.Sequential(nn.Identity(), inner)
    expected = [f"1.{name}" for name in prunable_weights(inner)]
    assert list(prunable_weights(wrapped)) == expected and "1.head.weight" not in expected


@pytest.mark.parametrize("wrapper", [nn.DataParallel, DistributedDataParallel])
def test_a_wrapped_model_is_refused_by_name(wrapper):
    wrapped = wrapper.__new__(wrapper)  # its constructor wants GPUs or other processes
    with pytest.raises(PruningError, match=f"in {wrapper.__name__}: expected its `.module`"):
        prunable_weights(wrapped)


@pytest.mark.parametrize(
    "name", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "maxvit_rmlp_pico_rw_256"]
)
def test_mlps_of_position_biases_are_not_prunable(name):
    model = timm.create_model(name, num_classes=3)
    biases = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features == 2
    ]
    weights = prunable_weights(model)
    assert biases and all(weight.shape[1] > 2 for weight in weights.values())
    assert not any(POSITION_MLPS & {*name.split(".")} for name in weights)
    assert any(".attn.qkv." in name or name.endswith("qkv.weight") for name in weights)


@pytest.mark.parametrize(
    ("classifier", "expected"),
    [
        (lambda model: model.head, ["body.weight", "head_dist.weight"]),
        (lambda model: (model.head, model.head_dist), ["body.weight"]),
        (lambda model: [[model.head], (model.head_dist,)], ["body.weight"]),
        (lambda model: nn.Sequential(nn.ReLU(), model.head), ["body.weight", "head_dist.weight"]),
        (lambda model: nn.Identity(), ["body.weight", "head.weight", "head_dist.weight"]),
        (lambda model: None, ["body.weight", "head.weight", "head_dist.weight"]),
    ],
)
def test_whatever_the_model_calls_its_classifier_is_not_prunable(classifier, expected):
    assert list(prunable_weights(WithClassifier(classifier))) == expected


def layers_of(model, layers):
    return [name.removesuffix(".weight") for name in prunable_weights(model, layers)]


BLOCKS = nn.ModuleDict(
    {
        "a": nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}),
        "b": nn.ModuleDict({"fc1": nn.Linear(4, 4), "cpb_mlp": nn.Linear(2, 4)}),
    }
)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["a.*"], ["a.fc1", "a.fc2"]),
        (["*", "!a.*"], ["b.fc1"]),
        (["!a.*"], ["b.fc1"]),
        (["!*.fc1", "b.fc1.weight"], ["a.fc2", "b.fc1"]),
        (["*"], ["a.fc1", "a.fc2", "b.fc1"]),
        (["*", "b.cpb_*"], ["a.fc1", "a.fc2", "b.fc1", "b.cpb_mlp"]),
        (lambda name, layer: name == "a.fc1" or layer is BLOCKS["b"]["fc1"], ["a.fc1", "b.fc1"]),
    ],
)
def test_patterns_or_a_function_say_which_layers_are_prunable(layers, expected):
    assert layers_of(BLOCKS, layers) == expected
    model = copy.deepcopy(BLOCKS)
    if not callable(layers):
        choose_layers(model, layers)
        assert layers_of(copy.deepcopy(model), None) == expected


@pytest.mark.parametrize("layers", [["a.*", "c.*"], ["*", "!c.*"], [], [""], ["!"], [3], "a.*"])
def test_layers_that_do_not_exist_are_an_error_in_one_line(layers):
    with pytest.raises(PruningError, match="^layers"):
        prunable_weights(BLOCKS, layers)


def test_a_classifier_is_prunable_if_a_pattern_asks_for_it_alone():
    model = WithClassifier(lambda model: model.head)
    assert layers_of(model, ["*"]) == ["body", "head_dist"]
    assert layers_of(model, ["*", "head"]) == ["body", "head", "head_dist"]


def test_a_shared_linear_or_weight_counts_once_under_its_first_name():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": shared, "d": nn.Linear(4, 4)})
    model["d"].weight = model["b"].weight
    assert list(prunable_weights(model)) == ["a.weight", "b.weight"]
    Masks(model, compute_masks(model, "unif", 0.5))
    assert model["c"].weight.count_nonzero() == model["d"].weight.count_nonzero() == 8


def test_a_lone_linear_is_prunable():
    layer = nn.Linear(4, 4)
    assert list(prunable_weights(layer)) == ["weight"]
    assert Masks(layer, compute_masks(layer, "lamp", 0.5)).sparsity() == 0.5


# ---- keeping them pruned ----


def train(model: nn.Module, masks: Masks | None) -> nn.Module | None:
    """Eight steps of AdamW with weight decay, clipping, drop path and, with masks, an average of
    the weights.

    Returns the averaged model.
    """
    model.train()
    ema = ModelEmaV3(model, decay=0.9) if masks else None
    parameters = list(model.parameters())
    # The gradient of a key bias is nothing but rounding; a small epsilon would blow it up to the
    # size of the others.
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-4)
    data = torch.Generator().manual_seed(1)
    torch.manual_seed(2)  # drop path
    for _ in range(8):
        images = torch.randn(4, 3, 32, 32, generator=data)
        labels = torch.randint(5, (4,), generator=data)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        if masks:
            masks.apply_to_grads()
        assert clip_grad_norm_(parameters, 0.5) > 0.5  # clipping does clip
        optimizer.step()
        if masks:
            masks.apply()
            ema.update(model)
    return ema.module if masks else None


def test_training_follows_the_path_of_the_reparametrised_network_and_pruned_weights_stay_zero():
    ours, theirs = tiny_vit(), tiny_vit()
    chosen = compute_masks(ours, "lamp", 0.65)
    averaged = train(ours, Masks(ours, chosen))

    for name, mask in chosen.items():
        prune.custom_from_mask(theirs.get_submodule(name.removesuffix(".weight")), "weight", mask)
    train(theirs, None)

    start = tiny_vit()
    for name, parameter in theirs.named_parameters():
        name = name.removesuffix("_orig")
        mask = chosen.get(name, torch.ones_like(parameter, dtype=torch.bool))
        torch.testing.assert_close(
            ours.get_parameter(name)[mask], parameter[mask], rtol=1e-4, atol=1e-5
        )
        # It did learn something
        assert (start.get_parameter(name) - parameter)[mask].abs().max() > 1e-3
    for name, mask in chosen.items():
        for model in (ours, averaged):
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            assert weight[mask].all()


def test_masks_are_applied_at_construction_and_leave_survivors_untouched():
    model = two_layers()
    before = copy.deepcopy(model)
    masks = compute_masks(model, "unif", 0.5)
    assert Masks(model, masks).sparsity() == pytest.approx(0.5, abs=0.01)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), before.get_parameter(name) * mask)
    assert torch.equal(model[0].bias, before[0].bias)


def test_only_existing_gradients_are_masked():
    model = two_layers()
    masks = Masks(model, compute_masks(model, "unif", 0.5))
    masks.apply_to_grads()
    assert model[0].weight.grad is None
    model[0].weight.grad = torch.ones(7, 10)
    masks.apply_to_grads()
    assert torch.equal(model[0].weight.grad.bool(), masks["0.weight"])


def test_a_masked_model_can_be_copied_and_has_its_plain_parameters():
    model = two_layers()
    names = list(model.state_dict())
    Masks(model, compute_masks(model, "lamp", 0.5))
    copied = copy.deepcopy(model)
    assert list(copied.state_dict()) == names
    assert torch.equal(copied(torch.ones(1, 10)), model(torch.ones(1, 10)))


def test_masks_work_on_the_device_of_the_weights():
    with FakeTensorMode():
        layer = nn.Linear(10, 7, device="cuda")
        layer.weight.grad = torch.empty(7, 10, device="cuda")
        masks = Masks(layer, {"weight": torch.ones(7, 10, dtype=torch.bool)})
        masks.apply()
        masks.apply_to_grads()
        for tensor in (masks["weight"], layer.weight, layer.weight.grad):
            assert tensor.device.type == "cuda"


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("1.weight", torch.ones(7, 10, dtype=torch.bool)),
        ("0.bias", torch.ones(8, dtype=torch.bool)),
        ("0.weight", torch.ones(10, 7, dtype=torch.bool)),
        ("0.weight", torch.ones(7, 10)),
        ("0.weight", [[True] * 10] * 7),
    ],
)
def test_a_mask_that_does_not_fit_is_an_error_that_names_it_and_changes_nothing(name, mask):
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=f"mask '{name}'"):
        Masks(model, {"2.weight": torch.zeros(3, 7, dtype=torch.bool), name: mask})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_select_whatever_the_values_are(dtype):
    odd = [torch.inf, -torch.inf, torch.nan, -0.0, -1.0, 6e4]
    values = torch.tensor(odd * 20, dtype=dtype)
    mask = torch.arange(len(values)) % 7 < 3
    expected = [
        repr(value) if kept else "0.0"
        for value, kept in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    select(values, mask)
    assert [repr(value) for value in values.tolist()] == expected


def test_an_infinite_gradient_of_a_pruned_weight_becomes_zero_and_that_of_a_kept_one_stays():
    model = two_layers()
    masks = Masks(model, compute_masks(model, "unif", 0.5))
    model[0].weight.grad = torch.full((7, 10), torch.inf)
    masks.apply_to_grads()
    assert torch.equal(model[0].weight.grad, torch.where(masks["0.weight"], torch.inf, 0.0))


def test_strided_values_are_selected_in_place():
    values = torch.ones(4, 6).t()
    select(values, torch.eye(6, 4, dtype=torch.bool))
    assert torch.equal(values, torch.eye(6, 4))


def test_masks_are_copies_of_what_they_were_made_from():
    model = two_layers()
    chosen = compute_masks(model, "unif", 0.5)
    masks = Masks(model, chosen)
    kept = int(chosen["0.weight"].sum())
    chosen["0.weight"].fill_(True)
    assert int(masks["0.weight"].sum()) == kept
    masks.update({"0.weight": (new := torch.zeros(7, 10, dtype=torch.bool))})
    new.fill_(True)
    assert not masks["0.weight"].any()


def test_an_update_changes_masks_in_place_and_tells_what_was_dropped_and_grown():
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    masks = Masks(model, {"0.weight": torch.tensor([[True, True, False]])})
    held, weight = masks["0.weight"], model[0].weight.detach().clone()
    change = masks.update({"0.weight": torch.tensor([[True, False, True]])})
    assert list(change) == ["0.weight"]
    assert change["0.weight"].dropped.tolist() == [[False, True, False]]
    assert change["0.weight"].grown.tolist() == [[False, False, True]]
    assert masks["0.weight"] is held and held.tolist() == [[True, False, True]]
    assert torch.equal(model[0].weight, weight)  # until they are applied
    masks.apply()
    assert model[0].weight.count_nonzero() == 1


def test_any_parameter_can_have_a_mask_also_later_and_masks_stay_in_model_order():
    model = two_layers()
    masks = Masks(model, {"2.weight": torch.ones(3, 7, dtype=torch.bool)})
    bias = torch.arange(7) < 5
    change = masks.update({"0.bias": bias})
    masks.apply()
    assert list(masks) == ["0.bias", "2.weight"]
    assert torch.equal(change["0.bias"].dropped, ~bias)
    assert torch.equal(model[0].bias != 0, bias)
    restored = Masks(fresh := two_layers(), unpack(masks.state_dict()))
    assert torch.equal(restored["0.bias"], bias) and torch.equal(fresh[0].bias, model[0].bias)
    check_masks(model.state_dict(), masks)


def test_an_update_that_does_not_fit_changes_nothing():
    model = two_layers()
    masks = Masks(model, compute_masks(model, "unif", 0.5))
    before = {name: mask.clone() for name, mask in masks.items()}
    with pytest.raises(PruningError, match="'2.weight'"):
        masks.update(
            {"0.weight": torch.zeros(7, 10, dtype=torch.bool), "2.weight": torch.zeros(7, 3)}
        )
    assert all(torch.equal(masks[name], mask) for name, mask in before.items())


def test_an_average_obeys_the_masks():
    model = two_layers()
    masks = Masks(model, compute_masks(model, "unif", 0.5))
    average = ModelEmaV3(two_layers())
    masks.apply_to(average.module)
    assert torch.equal(average.module[0].weight != 0, masks["0.weight"])


class ReadsZero(TorchDispatchMode):
    """Gives 0 for every number that is read from a fake tensor, which has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return func(*args, **(kwargs or {}))


def test_an_average_on_the_cpu_obeys_masks_on_a_gpu_and_is_checked_against_them():
    with FakeTensorMode(), ReadsZero():
        layer, average = nn.Linear(10, 7, device="cuda"), nn.Linear(10, 7)
        masks = Masks(layer, {"weight": torch.ones(7, 10, dtype=torch.bool)})
        assert masks["weight"].device.type == "cuda"
        masks.apply_to(average)
        check_masks(average.state_dict(), masks)
        assert average.weight.device.type == "cpu"


# ---- saving and loading ----


def test_masks_survive_a_file_that_is_read_with_weights_only():
    model = two_layers()
    masks = Masks(model, compute_masks(model, "lamp", 0.5))
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["2.weight"]["bits"].numel() == 3  # 21 weights
    fresh = two_layers()
    restored = Masks(fresh, unpack(state))
    assert list(restored) == list(masks)
    assert all(torch.equal(restored[name], mask) for name, mask in masks.items())
    assert torch.equal(fresh[0].weight, model[0].weight)


@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (16, 8), (33, 31)])
def test_a_gpu_packs_the_same_bits_as_a_cpu_and_has_the_same_checksum(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = packed(mask)
    assert len(bits) == -(-mask.numel() // 8) and torch.equal(unpacked(bits, shape), mask)
    with pretend_cuda():
        on_gpu = mask.to("cuda")
        assert torch.equal(packed(on_gpu).cpu(), bits)
        assert torch.equal(unpacked(packed(on_gpu), shape).cpu(), mask)
        assert checksums({"": on_gpu, "turned": on_gpu.T}) == checksums(
            {"": mask, "turned": mask.T}
        )


def test_masks_that_keep_other_weights_have_other_checksums():
    masks = {"": torch.zeros(400, dtype=torch.bool)}
    for i in range(0, 400, 9):
        for j in range(0, i, 9):
            masks[f"{i} {j}"] = torch.zeros(400, dtype=torch.bool)
            masks[f"{i} {j}"][[i, j]] = True
    assert len(set(checksums(masks))) == len(masks)
    assert checksums({}) == []


def test_loading_replaces_the_masks_and_applies_them():
    model, other = two_layers(), two_layers()
    masks = Masks(model, compute_masks(model, "unif", 0.2))
    masks.load_state_dict(Masks(other, compute_masks(other, "unif", 0.8)).state_dict())
    assert masks.sparsity() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(model[0].weight, other[0].weight)


def damaged(change):
    model = two_layers()
    state = Masks(model, compute_masks(model, "unif", 0.5)).state_dict()
    return change(state) or state


HUGE = torch.zeros(1, dtype=torch.uint8).expand(2**40)  # one byte of storage
DAMAGES = {
    "no dictionary": (lambda state: [1], "not a dictionary"),
    "missing name": (lambda state: {"0.weight": state["0.weight"]}, "'2.weight' is missing"),
    "unexpected name": (
        lambda state: state.update({"4.weight": state["0.weight"].copy()}),
        "'4.weight'",
    ),
    "name of no text": (lambda state: {3: state["0.weight"]}, "'3'"),
    "other shape": (lambda state: state["0.weight"].update(shape=[10, 7]), "expected shape"),
    "negative shape": (lambda state: state["0.weight"].update(shape=[-7, -10]), "positive"),
    "huge shape": (lambda state: state["0.weight"].update(shape=[2**30, 2**30]), "bytes"),
    "repeated byte": (
        lambda state: state["0.weight"].update(bits=HUGE, shape=[2**20, 2**23]),
        "contiguous",
    ),
    "endless shape": (lambda state: state["0.weight"].update(shape=[1] * 10**6), "dimensions"),
    "boolean shape": (lambda state: state["0.weight"].update(shape=[True, 70]), "positive"),
    "shape of no list": (lambda state: state["0.weight"].update(shape=70), "shape"),
    "too few bytes": (
        lambda state: state["0.weight"].update(bits=torch.zeros(8, dtype=torch.uint8)),
        "9 contiguous",
    ),
    "other dtype": (lambda state: state["0.weight"].update(bits=torch.zeros(9)), "uint8"),
    "no storage": (
        lambda state: state["0.weight"].update(
            bits=torch.zeros(9, dtype=torch.uint8, device="meta")
        ),
        "uint8",
    ),
    "no tensor": (lambda state: state["0.weight"].update(bits=b"123456789"), "uint8"),
    "missing part": (lambda state: state["0.weight"].pop("shape") and None, "bits and a shape"),
    "shared bytes": (
        lambda state: state["2.weight"].update(bits=state["0.weight"]["bits"][:3]),
        "shares",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_masks_are_a_one_line_error_and_change_nothing(damage):
    change, message = DAMAGES[damage]
    model = two_layers()
    masks = Masks(model, compute_masks(model, "unif", 0.1))
    before, weight = dict(masks), model[0].weight.clone()
    with pytest.raises(PruningError, match=message) as error:
        masks.load_state_dict(damaged(change))
    assert "\n" not in str(error.value)
    assert all(masks[name] is mask for name, mask in before.items())
    assert torch.equal(model[0].weight, weight)
