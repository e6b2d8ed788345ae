"""Models of a few weights, statistics that no images were needed for, and times that nobody
measured.
"""

import os
import shutil

import pytest
import torch
from torch import nn

from sparsity_factory import SCHEDULES, STATISTICS, Statistics, prunable_weights
from sparsity_factory.removal_costs import add_squares

needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX") or "g++"), reason="needs a C++ compiler, CXX or g++"
)


def linears(*weights) -> nn.Module:
    """A model with the given weights, each a nested list or a tensor, in linear layers named 0, 1,
    ...
    """
    model = nn.Sequential()
    for weight in weights:
        weight = torch.as_tensor(weight)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight
        model.append(layer)
    return model


def statistics_of(model: nn.Module, needs=STATISTICS, seed=0) -> Statistics:
    """As if each layer had seen 50 random inputs, some of them much larger, and two batches of
    random gradients.

    Those of the 20 images, for the removal costs, are random by themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    statistics = Statistics(prunable_weights(model), needs)
    state = statistics.state_dict()
    state["counts"].fill_(1)
    state["counts"][0] = torch.tensor([20, 2, 10])
    for name, shape in statistics.shapes.items():
        inputs = torch.randn(50, shape[1], generator=generator, dtype=torch.float64)
        inputs *= 1 + 20 * (torch.rand(shape[1], generator=generator) < 0.1)
        gradients = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        sums = {
            "input_norms": inputs.square().sum(0),
            "gram": inputs.T @ inputs,
            "gradient": 10 * gradients.sum(0),
            "first_gradient": 10 * gradients[0],
            "squared_gradient": gradients.square().sum(0),
            "gate_gradient": gradients.sum((0, 1)).abs(),
        }
        at_outputs = torch.randn(
            50, shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        sums["gradient_gram"] = at_outputs.T @ at_outputs
        if "removal_costs" in statistics.needs:
            of_images = torch.randn(20, *shape, generator=generator, dtype=torch.float64)
            sums["removal_costs"] = torch.zeros_like(state[f"{name}.removal_costs"]).double()
            add_squares(sums["removal_costs"], of_images)
        for need in statistics.needs:
            state[f"{name}.{need}"].copy_(sums[need])
    return statistics


class Clock:
    """Times by kernel instead of a clock: functions are called, as in a measurement, and what is
    asked is noted.
    """

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, functions, budget):
        self.asked.append(list(functions))
        for function in functions.values():
            function()
        return {name: self.seconds.get(name.replace("-", "_"), 9.0) for name in functions}


def pattern_for(schedule: str) -> str:
    """The pattern of a recipe with a sparsity and that schedule: unstructured, where it takes that."""
    return "x:4" if schedule in SCHEDULES and SCHEDULES[schedule].learns_masks else "unstructured"
