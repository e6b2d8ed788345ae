"""How long each block takes at each choice, measured by a clock that counts multiply-adds."""

import time

import pytest
import timm
import torch
from torch.nn import functional as F

from sparsity_factory import Recipe, compute_masks, prunable_weights, shrink
from sparsity_factory.sparse_layers import SparseLinear
from sparsity_factory.time_table import Choice, find_parts, time_of_whole, time_table

PER_WEIGHT = 1e-6  # seconds


class Clock:
    """Stands for time.perf_counter; only linear layers take time, each as long as it has weights."""

    def __init__(self, monkeypatch):
        self.now = 0.0

        def forward(layer, x):
            self.now += PER_WEIGHT * layer.weight.numel()
            return F.linear(x, layer.weight, layer.bias)

        monkeypatch.setattr(torch.nn.Linear, "forward", forward)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def kernel(clock):
        """A kernel that takes as long as it has weights that are not zero."""

        class Counting(SparseLinear):
            @staticmethod
            def why_not(weight, dtype):
                return None

            def prepare(self, weight, bias):
                self.seconds = PER_WEIGHT * int(weight.count_nonzero())

            def compute(self, x):
                clock.now += self.seconds
                return F.linear(x, self.weight, self.bias)

        return {"counting": Counting}


def small_vit():
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.models.VisionTransformer(num_classes=5, **shape).eval(), torch.randn(2, 3, 8, 8)


def test_parts_are_attentions_and_mlps_and_layers_of_blocks_that_want_more_than_tokens():
    model, images = small_vit()
    parts = find_parts(model, images)
    assert [part.name for part in parts] == [
        f"blocks.{block}.{own}" for block in range(2) for own in ("attn", "mlp")
    ]
    assert [part.last.rpartition(".")[0] for part in parts[:2]] == [
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc2",
    ]
    assert {name for part in parts for name in part.weights} == {*prunable_weights(model)}

    swin = timm.models.SwinTransformer(
        img_size=16, patch_size=2, window_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 2)
    ).eval()
    parts = {part.name: part for part in find_parts(swin, torch.randn(1, 3, 16, 16))}
    assert "layers.0.blocks.1.attn" not in parts and "layers.0.blocks.1.attn.qkv" in parts
    assert parts["layers.1.downsample.reduction"].group is None
    assert parts["layers.0.blocks.1.mlp"].group.units == 48


def test_the_times_of_parts_and_rest_add_up_to_that_of_the_pruned_model(monkeypatch):
    model, images = small_vit()
    clock = Clock(monkeypatch)
    parts = find_parts(model, images)
    choices = {}
    for part in parts:
        first, last = part.weights
        choices[part.name] = {
            "dense": Choice({}),
            "few": Choice({}, 1 if part.group.kind == "heads" else 24),
            "half": Choice({first: "0.5", last: "0.5"}),
            "blocks": Choice({first: "block:4x1 0.75", last: "dense"}),
        }
    kernels = clock.kernel()
    with torch.no_grad():
        table = time_table(model, images, parts, choices, kernels=kernels)

    def weights(name):
        return model.get_submodule(name).weight.numel()

    assert abs(table.rest - PER_WEIGHT * weights("head")) < 1e-9
    mlp = PER_WEIGHT * (weights("blocks.1.mlp.fc1") + weights("blocks.1.mlp.fc2"))
    found = table.parts["blocks.1.mlp"]
    expected = {"dense": 1, "few": 24 / 96, "half": 0.5, "blocks": (0.25 + 1) / 2}
    assert found.keys() == expected.keys()
    for text, share in expected.items():
        assert abs(found[text] - share * mlp) < 1e-9, text

    chosen = dict(zip(choices, ("few", "blocks", "half", "few"), strict=True))
    level = {"default": "dense", "blocks.0.mlp.fc1": "block:4x1 0.75", "blocks.1.attn.*": 0.5}
    units = {"blocks.0.attn": 1, "blocks.1.mlp": 24}
    config = {"sparsity": {"mode": "unstructured", "level": level, "units": units}}
    masks = compute_masks(model, "custom", custom_config=config)
    pruned = shrink(model, masks, Recipe("custom", custom_config=config).shrinks)
    with torch.no_grad():
        dense, seconds = time_of_whole(model, pruned, images, kernels=kernels)
    assert abs(dense - table.whole) < 1e-9
    predicted = table.rest + sum(table.parts[name][text] for name, text in chosen.items())
    assert abs(seconds - predicted) < 1e-9


def test_heads_and_neurons_are_timed_in_bfloat16_as_well():
    model, images = small_vit()
    parts = find_parts(model, images)
    choices = {part.name: {"half": Choice({}, part.group.units // 2)} for part in parts}
    with torch.autocast("cpu", torch.bfloat16):
        table = time_table(model, images, parts, choices)
    assert all(times["half"] > 0 for times in table.parts.values())


def test_blocks_of_one_shape_share_out_their_choices(monkeypatch):
    model, images = small_vit()
    clock = Clock(monkeypatch)
    parts = find_parts(model, images)
    choices = {
        part.name: {f"{k} units": Choice({}, k) for k in ((1, 2) if "attn" in part.name else (8,))}
        for part in parts
    }
    lines = []
    table = time_table(model, images, parts, choices, kernels=clock.kernel(), log=lines.append)
    assert lines == ["Measuring the times of 3 choices"]
    assert table.parts["blocks.0.attn"] == pytest.approx(table.parts["blocks.1.attn"])
    shares = [
        seconds / table.dense["blocks.1.attn"] for seconds in table.parts["blocks.1.attn"].values()
    ]
    assert shares == pytest.approx([1 / 3, 2 / 3])
