"""Calibration batches of other forms than images and targets."""

from collections import UserDict

import pytest
import torch
from made_up import linears
from torch import nn
from torch.nn import functional as F

from sparsity_factory import STATISTICS, PruningError, collect_statistics, prune, walk_layers


class Named(nn.Module):
    """A model that is called with names, and returns outputs by name, as those of transformers."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, *, pixels):
        return {"logits": self.layers(pixels)}


def forward(model, batch):
    return model(pixels=batch["pixels"])["logits"]


def loss(outputs, batch):
    return F.cross_entropy(outputs, batch["labels"])


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return linears(torch.randn(6, 8), torch.randn(4, 6))


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 8).mean(1), torch.randint(0, 4, (size,))) for size in (5, 3)]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_dictionaries_give_the_statistics_of_their_images(plain, batches, kind):
    named = [kind(labels=labels, pixels=images) for images, labels in batches]
    expected = collect_statistics(plain, batches, F.cross_entropy, STATISTICS)
    found = collect_statistics(Named(plain), named, loss, STATISTICS, forward=forward)
    assert found.images == expected.images == 8
    for name, like in zip(found.shapes, expected.shapes, strict=True):
        for need in STATISTICS:
            assert torch.equal(found.value(name, need), expected.value(like, need))

    walks = (walk_layers(Named(plain), named, forward=forward), walk_layers(plain, batches))
    for (_, inputs), (_, like) in zip(*walks, strict=True):
        assert torch.equal(inputs.gram, like.gram)


def test_a_model_is_pruned_with_dictionaries(plain, batches):
    named = [{"pixels": images, "labels": labels} for images, labels in batches]
    options = {"score": "fisher", "reconstruct": "least-squares"}
    model = Named(linears(*(weight.clone() for weight in plain.parameters())))
    expected = prune(plain, "lamp", 0.5, batches=batches, loss=F.cross_entropy, **options)
    found = prune(model, "lamp", 0.5, batches=named, loss=loss, forward=forward, **options)
    for mask, like in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(mask, like)


@pytest.mark.parametrize("batch", [{"pixels": torch.randn(2, 8)}, [{"pixels": 3}], "images", []])
def test_a_batch_of_another_form_needs_a_function(plain, batch):
    with pytest.raises(PruningError, match="^a batch is a .*: expected images, .* or forward="):
        collect_statistics(plain, [batch], needs={"gram"})
    with pytest.raises(PruningError, match="^a batch is a .*: expected images, .* or forward="):
        [*walk_layers(plain, [batch])]
