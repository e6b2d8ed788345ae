"""Convolutions are prunable if they are asked for: as the linear layers of what each output sees."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsity_factory import (
    RECONSTRUCTIONS,
    SCORES,
    STATISTICS,
    Masks,
    check_masks,
    collect_statistics,
    compute_masks,
    nonzero_weights,
    parse_pattern,
    patterns_found,
    prunable_weights,
    prune,
    sparsity_rows,
    unmet,
    walk_layers,
)
from sparsity_factory.masks import as_matrix, from_matrix

LAYERS = ["*", "patches", "conv"]


class Model(nn.Module):
    """A patch embedding, a convolution and a classifier."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(8, 8, (1, 3), padding="same", dilation=2)
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        return self.head(self.conv(F.gelu(self.patches(images))).mean((2, 3)))


class Unfolded(nn.Module):
    """A convolution as a linear layer over what each output sees."""

    def __init__(self, conv: nn.Conv2d, sides: tuple[int, ...]):
        super().__init__()
        outputs, channels, rows, columns = conv.weight.shape
        self.channels = channels
        self.sides = sides
        self.options = {"stride": conv.stride, "dilation": conv.dilation}
        self.size = (rows, columns)
        self.linear = nn.Linear(channels * rows * columns, outputs)
        self.linear.weight.data = torch.stack(
            [
                torch.stack(
                    [kernel[:, r, c] for r in range(rows) for c in range(columns)]
                ).flatten()
                for kernel in conv.weight.data
            ]
        )
        self.linear.bias.data.copy_(conv.bias)

    def forward(self, x):
        x = F.pad(x, self.sides)
        rows = (x.shape[2] - self.options["dilation"][0] * (self.size[0] - 1) - 1) // (
            self.options["stride"][0]
        ) + 1
        x = F.unfold(x, self.size, **self.options)
        x = x.view(len(x), self.channels, -1, x.shape[2]).permute(0, 3, 2, 1).flatten(2)
        return self.linear(x).transpose(1, 2).unflatten(2, (rows, -1))


def pair() -> tuple[nn.Module, nn.Module, list]:
    """A model of convolutions, the same of linear layers, and two batches."""
    torch.manual_seed(0)
    model = Model()
    unfolded = Model()
    unfolded.head.load_state_dict(model.head.state_dict())
    unfolded.patches = Unfolded(model.patches, (1, 1, 1, 1))
    unfolded.conv = Unfolded(model.conv, (2, 2, 0, 0))
    images = torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(unfolded(images), model(images))
    targets = torch.randint(0, 4, (5,))
    return model, unfolded, list(zip(images.split(3), targets.split(3), strict=True))


def test_convolutions_are_prunable_only_if_they_are_asked_for():
    model, _, _ = pair()
    assert list(prunable_weights(model)) == ["head.weight"]
    assert list(prunable_weights(model, ["*"])) == ["head.weight"]
    assert list(prunable_weights(model, LAYERS)) == ["patches.weight", "conv.weight", "head.weight"]
    weight = model.patches.weight
    assert torch.equal(from_matrix(as_matrix(weight), weight.shape), weight)


def test_statistics_of_a_convolution_are_those_of_its_linear_layer():
    model, unfolded, batches = pair()
    found = collect_statistics(model, batches, F.cross_entropy, STATISTICS, layers=LAYERS)
    expected = collect_statistics(unfolded, batches, F.cross_entropy, STATISTICS)
    for name, like in zip(found.shapes, expected.shapes, strict=True):
        for need in STATISTICS:
            torch.testing.assert_close(
                found.value(name, need), expected.value(like, need), rtol=1e-4, atol=1e-5
            )

    walks = walk_layers(model, batches, layers=LAYERS), walk_layers(unfolded, batches)
    for (_, inputs), (_, like) in zip(*walks, strict=True):
        torch.testing.assert_close(inputs.gram, like.gram, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("score", sorted(SCORES.keys() - {"random"}))
def test_every_score_prunes_a_convolution_as_its_linear_layer(score, pattern):
    model, unfolded, batches = pair()
    options = {"pruner": "unif", "score": score, "pattern": pattern}
    if pattern == "unstructured":
        options["sparsity"] = 0.5
    masks = []
    for each, layers in ((model, LAYERS), (unfolded, None)):
        statistics = collect_statistics(each, batches, F.cross_entropy, STATISTICS, layers=layers)
        masks.append(compute_masks(each, **options, layers=layers, statistics=statistics))
    found, expected = masks
    for (name, mask), like in zip(found.items(), expected.values(), strict=True):
        assert mask.shape == model.get_parameter(name).shape
        assert (as_matrix(mask) == like).float().mean() > 0.95  # rounding may decide a tie
    matrices = {name: as_matrix(mask) for name, mask in found.items()}
    assert not parse_pattern(pattern).why_not(matrices)


@pytest.mark.parametrize("reconstruct", RECONSTRUCTIONS)
def test_a_convolution_is_reconstructed_as_its_linear_layer(reconstruct):
    model, unfolded, batches = pair()
    options = {"pattern": "2:4", "batches": batches, "reconstruct": reconstruct}
    masks = prune(model, "unif", **options, layers=LAYERS)
    prune(unfolded, "unif", **options)
    images, _ = batches[0]
    torch.testing.assert_close(model(images), unfolded(images), rtol=1e-3, atol=1e-4)
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())

    kept = sparsity_rows(model, Masks(model, masks))
    assert {row.pattern for row in kept.layers} == {"2:4"} and kept.prunable.sparsity == 0.5
    check_masks(model.state_dict(), masks)
    found = nonzero_weights(model.state_dict())
    assert not unmet("2:4", found) and "2:4" in patterns_found(found)["patches.weight"]


def test_a_patch_embedding_is_pruned_resumed_and_audited(run_main, tiny):
    layers = ["--pattern", "2:4", "--layers", "blocks.0.*", "patch_embed.proj"]
    output = run_main(
        *tiny, *layers, "--reconstruct", "obs", "--calibration-images", "16", "--output_dir", "out"
    )
    assert "patch_embed.proj.weight" in output and "blocks.1." not in output
    again = ["--resume", "out/checkpoint.pth", "--epochs", "2", "--calibration-images", "16"]
    output = run_main(*tiny, *again)
    assert "patch_embed.proj.weight" in output
    assert "2:4" in run_main("--audit", "out/checkpoint.pth")
