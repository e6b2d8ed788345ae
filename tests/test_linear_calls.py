"""Torch's multi-head attention is seen from within: as a model with layers of its own."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from sparsity_factory import (
    RECONSTRUCTIONS,
    SCORES,
    STATISTICS,
    Masks,
    collect_statistics,
    compute_masks,
    parse_pattern,
    prunable_weights,
    prune,
    shrink,
    walk_layers,
)

WIDTH, HEADS = 8, 2


class Written(nn.Module):
    """The attention of an `nn.MultiheadAttention`, written with two linear layers."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.in_proj.weight.data.copy_(attention.in_proj_weight)
        self.in_proj.bias.data.copy_(attention.in_proj_bias)
        self.out_proj = copy.deepcopy(attention.out_proj)
        self.batch_first = attention.batch_first

    def forward(self, query, key, value, need_weights):
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = self.in_proj(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        x = F.linear(heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return (x if self.batch_first else x.transpose(0, 1)), None


class Block(nn.Module):
    """As OpenAI's CLIP, open_clip and torchvision write it."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        h = F.layer_norm(x, [WIDTH])
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(F.layer_norm(x, [WIDTH]))


class Model(nn.Module):
    def __init__(self, batch_first: bool):
        super().__init__()
        self.batch_first = batch_first
        self.blocks = nn.Sequential(Block(batch_first), Block(batch_first))

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        return self.blocks(x).mean(1 if self.batch_first else 0)


def pair(batch_first: bool) -> tuple[nn.Module, nn.Module, list]:
    """A model with torch's attention, the same with written attention, and two batches."""
    torch.manual_seed(0)
    model = Model(batch_first).eval()
    written = copy.deepcopy(model)
    for block in written.blocks:
        block.attn = Written(block.attn)
    images = torch.randn(7, 5, WIDTH)
    targets = torch.randint(0, WIDTH, (7,))
    return model, written, list(zip(images.split(4), targets.split(4), strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
def test_statistics_of_torchs_attention_are_those_of_its_layers(batch_first):
    model, written, batches = pair(batch_first)
    needs = STATISTICS.keys() - {"gate_gradient"}  # one for each head that is known
    found, expected = (
        collect_statistics(each, batches, F.cross_entropy, needs) for each in (model, written)
    )
    assert "blocks.0.attn.in_proj_weight" in found.shapes
    for name, like in zip(found.shapes, expected.shapes, strict=True):
        for need in needs:
            torch.testing.assert_close(
                found.value(name, need), expected.value(like, need), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_walk_looks_into_torchs_attention(batch_first):
    model, written, batches = pair(batch_first)
    found, expected = ([*walk_layers(each, batches)] for each in (model, written))
    assert [name for name, _ in found] == list(prunable_weights(model))
    for (_, inputs), (_, like) in zip(found, expected, strict=True):
        torch.testing.assert_close(inputs.gram, like.gram, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.mean, like.mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reconstruct", RECONSTRUCTIONS)
def test_torchs_attention_is_reconstructed_as_its_layers_are(reconstruct):
    model, written, batches = pair(batch_first=False)
    options = {"pattern": "2:4", "batches": batches, "reconstruct": reconstruct}
    found = prune(model, "unif", **options)
    expected = prune(written, "unif", **options)
    for mask, like in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(mask, like)
    images, _ = batches[0]
    torch.testing.assert_close(model(images), written(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_heads_of_torchs_attention_are_pruned_with_every_score(score):
    model, _, batches = pair(batch_first=False)
    statistics = collect_statistics(model, batches, F.cross_entropy, STATISTICS)
    options = {"pattern": "heads", "score": score, "statistics": statistics}
    masks = compute_masks(model, "unif", 0.25, **options)
    assert not parse_pattern("heads").why_not(masks)
    for block in ("blocks.0.attn", "blocks.1.attn"):
        rows = masks[f"{block}.in_proj_weight"].view(3, HEADS, -1).all(2)
        assert (rows == rows[0]).all() and rows[0].sum() == 1
        assert torch.equal(masks[f"{block}.in_proj_bias"].view(3, HEADS, -1).all(2), rows)

    # A pruned head has no effect and gets no gradient
    Masks(model, masks)
    model(batches[0][0]).square().sum().backward()
    assert all((model.get_parameter(name).grad[~mask] == 0).all() for name, mask in masks.items())


def test_torchs_attention_is_permuted_for_n_of_m_and_keeps_its_size(caplog):
    model, _, batches = pair(batch_first=True)
    images, _ = batches[0]
    before = model(images)
    prune(model, "unif", 0.0, pattern="x:4", batches=batches, reconstruct="none", permute=True)
    torch.testing.assert_close(model(images), before)

    masks = compute_masks(model, "unif", 0.25, pattern="heads")
    small = shrink(model, masks)
    Masks(model, masks)
    torch.testing.assert_close(small(images), model(images))
    assert "blocks.0.attn keeps its heads" in caplog.text


def test_torchs_encoder_and_torchvisions_transformer_are_pruned():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    vision = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16
    )
    for model, images in ((encoder, torch.randn(5, 4, WIDTH)), (vision, torch.randn(4, 3, 8, 8))):
        masks = prune(model, "erk", 0.5, score="wanda", batches=[images], reconstruct="obs")
        assert list(masks) == list(prunable_weights(model))
        assert sum("in_proj_weight" in name for name in masks) == 2
        assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
