import copy

import pytest
import torch
from pretend_cuda import pretend_cuda
from timm.utils import ModelEmaV3
from torch import nn

from trainer.moving_average import MovingAverage


def step(model):
    """Changes every weight, and the statistics of batch normalization."""
    model.train()(torch.randn(4, 3))
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_average_has_timms_values_to_the_bit(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    timms = ModelEmaV3(model, 0.9)
    ours = MovingAverage(model, 0.9, device)
    before = copy.deepcopy(model.state_dict())

    for number in range(6):
        step(model)
        if number == 2:  # as a rewind does
            model.load_state_dict(before)
        if number == 4:  # as a schedule that hides pruned weights may do
            model[0].weight.data = torch.ones_like(model[0].weight)
        timms.update(model)
        ours.update(model)

        for name, value in timms.module.state_dict().items():
            assert ours.module.state_dict()[name].equal(value), name
    assert ours.module[1].num_batches_tracked == 3


def test_an_average_in_the_cpus_memory_waits_once_for_the_copies_of_all_weights():
    """And once more for the counts of batches, if the model has batch normalization."""
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    expected = ModelEmaV3(here, 0.9)
    with pretend_cuda() as waits:
        there = copy.deepcopy(here).to("cuda")
        average = MovingAverage(there, 0.9, "cpu")
        for model in (here, there):
            nn.init.ones_(model[0].weight)
        waits.clear()
        average.update(there)
    expected.update(here)
    assert [place.partition(" at ")[0] for place in waits] == ["synchronize"]
    assert waits.total() == 2
    for name, value in expected.module.state_dict().items():
        assert average.module.state_dict()[name].equal(value), name


def test_an_update_makes_no_state_dict(monkeypatch):
    model = nn.Linear(3, 4)
    average = MovingAverage(model, 0.9)
    average.update(model)
    monkeypatch.setattr(nn.Module, "state_dict", None)
    average.update(model)


def test_another_model_is_followed_from_its_first_update():
    average = MovingAverage(nn.Linear(1, 1, bias=False), 0.5)
    for value in (2.0, 4.0):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, value)
        nn.init.zeros_(average.module.weight)
        average.update(model)
        assert average.module.weight.item() == value / 2
    assert [name for name, _ in average.named_parameters()] == ["module.weight"]
