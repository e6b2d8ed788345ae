"""Batches of calibration images in every form, and how a model computes on them.

A batch is a tensor of images, a tuple or list that begins with it, or anything else, such as a
dictionary, that a function `forward(model, batch)` gives to the model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import PruningError

#: From a model and a batch on its device to the model's outputs.
Forward = Callable[[nn.Module, Any], Any]


def inputs_of(batch, device: torch.device, forward: Forward | None = None):
    """What a model computes on, on its device: the images of a batch; with `forward` all of it.

    Raises:
        PruningError: a batch without `forward` whose images are not known.
    """
    if forward:
        return _to(batch, device)
    images = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not isinstance(images, Tensor):
        raise PruningError(
            f"a batch is a {type(batch).__name__}: expected images, a tuple that begins with them, "
            "or forward=, a function of model and batch"
        )
    return images.to(device, non_blocking=True)


def targets_of(batch):
    """What a loss is given besides the outputs; None if there is nothing.

    It is the second part of a tuple, and the whole batch if that is neither images nor a tuple.
    """
    if isinstance(batch, tuple | list):
        return batch[1] if len(batch) > 1 else None
    return None if isinstance(batch, Tensor) else batch


def targets_on(batch, device: torch.device):
    """The same on a device."""
    return _to(targets_of(batch), device)


def compute(model: nn.Module, inputs, forward: Forward | None = None):
    """The outputs of a model for what `inputs_of` returned."""
    # Not by a call of the model, which may run compiled code
    return forward(model, inputs) if forward else model.forward(inputs)


def image_count(inputs) -> int:
    """The number of images: the size of the first tensor."""
    return next(
        len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()
    )


def first_image(inputs):
    """The inputs of the first image alone."""
    return tree_map_only(Tensor, lambda values: values[:1] if values.dim() else values, inputs)


# ---- helpers, not exported ----


def _to(batch, device: torch.device):
    # Some libraries have mappings of their own
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map_only(Tensor, lambda values: values.to(device, non_blocking=True), plain)
