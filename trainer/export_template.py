"""Builds this model with torch, timm and safetensors alone."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file


def load(folder=Path(__file__).parent):
    """The model of shape.json with the weights of model.safetensors, in evaluation mode."""
    shape = json.loads(Path(folder, "shape.json").read_text())
    weights = load_file(Path(folder, "model.safetensors"))
    model = timm.create_model(shape["model"], **shape["arguments"])

    # Fit the layers to the weights, which may have fewer heads and neurons
    for name, weight in list(model.named_parameters()):
        if weights[name].shape != weight.shape:
            path, _, own = name.rpartition(".")
            layer = model.get_submodule(path)
            setattr(layer, own, torch.nn.Parameter(weights[name]))
            if isinstance(layer, torch.nn.Linear):
                layer.out_features, layer.in_features = layer.weight.shape

    for name, heads in shape["heads"].items():
        attention = model.get_submodule(name)
        attention.num_heads = heads
        attention.attn_dim = attention.proj.weight.shape[1]

    model.load_state_dict(weights)
    return model.eval()
