"""Checks that weights obey their masks, and masks their configuration."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import PruningError
from .patterns import parse_pattern
from .recipe import Recipe


def check_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], recipe: Recipe | None = None) -> None:
    """Checks a state dict against its masks: pruned weights are zero, and every group holds what n:m allows.

    Args:
        weights: parameter name to tensor; names without a mask are not looked at. May be empty.
        masks: parameter name to bool tensor, True where the weight is kept; on any device, as the weights are.
        recipe: the one that made the masks, where its target is reached: its groups are counted.

    Raises:
        PruningError: naming the first weight that does not obey.
    """
    if not isinstance(weights, Mapping):
        raise PruningError(f"the weights are a {type(weights).__name__}, expected a mapping of names to tensors")
    for name, mask in masks.items() if weights else ():
        weight = weights.get(name)
        if not isinstance(weight, Tensor) or weight.shape != mask.shape or weight.is_meta \
                or weight.layout != torch.strided:
            raise PruningError(f"mask {name!r}: there is no weight of that name and of shape {list(mask.shape)}")
        nonzero = int((weight != 0).logical_and_(mask.to(weight.device).logical_not()).count_nonzero())
        if nonzero:
            raise PruningError(f"{name}: {nonzero} of its pruned weights are not zero")
    if recipe is None:
        return
    shapes = {name: mask.shape for name, mask in masks.items() if mask.dim() == 2}
    levels, pattern = recipe.levels(shapes), parse_pattern(recipe.pattern)
    if pattern.sparsity is not None:
        levels = dict.fromkeys(shapes, (pattern.n, pattern.m))
    for name, level in levels.items():
        if isinstance(level, int):
            if int(masks[name].count_nonzero()) != level:
                raise PruningError(f"{name}: keeps {int(masks[name].count_nonzero())} weights, expected {level}")
        elif any((side.reshape(-1, level[1]).sum(1) != level[0]).any()
                 for side in (masks[name], masks[name].T)[:1 + pattern.transposable]):
            raise PruningError(f"{name}: a group of {level[1]} does not keep {level[0]}")
