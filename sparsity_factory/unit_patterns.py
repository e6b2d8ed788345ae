"""Patterns whose units span several layers: whole heads and neurons of the blocks of `units.py`."""

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PruningError, warn_once
from .knapsack import nearest_steps
from .method import method
from .multiply_adds import image_of, multiply_adds_of_modules
from .pattern_base import Pattern, down
from .units import HEADS, NEURONS, Group, unit_groups, unit_sums
from .whole_units import whole_units


class _Units(Pattern):
    """Whole heads or neurons: their rows and columns in all parameters of their block, biases too.

    Attributes:
        kinds: of `units.HEADS` and `units.NEURONS`.
    """

    kinds: tuple[str, ...]
    budgets = ("weights", "macs")
    structured = True

    @classmethod
    def parse(cls, name: str) -> "_Units | None":
        return cls() if name == cls.form else None

    def masks(self, model, scores, allocate, sparsity, budget):
        """Keeps the units of the largest sums in each block, on a tie the earlier.

        The allocation is given only the weights that can be removed, each scored with the mean of
        its unit, and decides how many each layer keeps. Blocks keep units in proportion to that, as
        nearly as whole units allow, and never more than the budget. If a layer is to stay dense,
        its whole block does, if the budget allows it. Other weights stay.

        Units of zeros alone, such as those that are pruned already, are never kept, unless no other
        is left.
        """
        groups = self._groups(model, scores.weights)

        # Lists have an entry for each group; weights: by name, the part that tells a unit's place
        numel = {name: prod(shape) for name, shape in scores.shapes.items()}
        units = [group.units for group in groups]
        weights = [group.weights(numel) for group in groups]
        sizes = [sum(numel[name] for name in parts) for parts in weights]
        costs = sizes
        total = sum(numel.values())
        if budget == "macs":
            names = [group.name for group in groups]
            costs, total = multiply_adds_of_modules(model, names, image_of(model), scores.weights)

        # The cost of one unit, rounded up, and what the units of all groups may cost together
        step = np.array([-(-cost // count) for cost, count in zip(costs, units, strict=True)])
        left = round(total * (1 - sparsity)) - (total - sum(costs))
        if left < step.sum():
            raise PruningError(
                f"pattern {self.name} keeps at least one unit of each block and all weights "
                "elsewhere: expected a sparsity of at most "
                f"{down((sum(costs) - step.sum()) / total)}"
            )

        sums = scores.of_groups(groups, weights)
        scores.check()
        nonzero = unit_sums(groups, weights, lambda name: scores.weights[name] != 0)
        alive = [count > 0 for count in nonzero]

        means = {}
        for group, parts, size, score in zip(groups, weights, sizes, sums, strict=True):
            for name, part in parts.items():
                means[name] = (score * group.units / size)[part.unit].unsqueeze(1 - part.dim)

        try:
            wanted = allocate(scores.replaced(means), 1 - left / sum(costs))
        except PruningError as error:
            # Its figures are about these weights, not about all prunable weights
            raise PruningError(
                f"pattern {self.name}, of the weights that it can remove: {error}"
            ) from None

        shares = []
        for parts, size in zip(weights, sizes, strict=True):
            stays_dense = any(wanted[name] == numel[name] for name in parts)
            shares.append(1.0 if stays_dense else sum(wanted[name] for name in parts) / size)
        most = np.array([max(int(live.sum()), 1) for live in alive])
        kept = nearest_steps(np.array(shares) * units * step, step, most, left)

        masks = {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in scores.weights.items()
        }
        parameters = dict(model.named_parameters())
        for group, score, live, count in zip(groups, sums, alive, kept, strict=True):
            masks |= group.masks(_best(score, live, count), parameters)
        return {name: masks[name] for name in parameters if name in masks}

    def _groups(self, model: nn.Module, weights: Mapping[str, Tensor]) -> list[Group]:
        """The groups that it prunes; a warning names blocks that stay whole."""
        unknown: list[str] = []
        groups = unit_groups(model, self.kinds, weights, unknown)
        if not groups:
            reason = unknown[0] if unknown else "expected a transformer of timm"
            raise PruningError(
                f"pattern {self.name}: {type(model).__name__} has none that are known: {reason}"
            )
        if unknown:
            others = f" (as {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            warn_once(f"pattern {self.name} leaves blocks whole: {unknown[0]}{others}")
        return groups

    def why_not(self, masks, exact=True):
        known = set()
        for block in whole_units(masks):
            layers = [*block.first, block.last]
            known.update(layers)
            if block.kind in self.kinds:
                flaw = block.flaw
            else:
                pruned = next((name for name in layers if not masks[name].all()), None)
                flaw = (
                    f"{pruned}: has no {' or '.join(self.kinds)}, and is pruned" if pruned else ""
                )
            if flaw:
                return flaw

        others = {name: mask for name, mask in masks.items() if name not in known}
        return super().why_not(others, exact)

    def flaw(self, mask, exact=True):
        # Of a layer of no known block: whole rows and whole columns are pruned
        whole = mask.any(1, keepdim=True) & mask.any(0, keepdim=True)
        return "" if torch.equal(mask, whole) else f"prunes {' and '.join(self.kinds)} in part"

    def slack(self, shapes):
        # Units of zeros are never kept, however many they are
        return sum(map(prod, shapes.values())), 1


def keep_units(
    model: nn.Module, scores, counts_of: Callable[[Mapping[str, int]], Mapping[str, int]]
) -> dict[str, Tensor]:
    """The masks of blocks that keep given numbers of heads or neurons, those of the largest sums.

    Args:
        scores: the `Scores` of the prunable weights.
        counts_of: from how many units each block has, by name, to how many of them some keep.

    Returns:
        By parameter name the masks of all parameters of these blocks, in model order.
    """
    groups = {group.name: group for group in unit_groups(model, weights=scores.weights)}
    counts = counts_of({name: group.units for name, group in groups.items()})
    smaller = [groups[name] for name in counts]
    weights = [group.weights(scores.shapes) for group in smaller]
    if not smaller:
        return {}

    sums = scores.of_groups(smaller, weights)
    nonzero = unit_sums(smaller, weights, lambda name: scores.weights[name] != 0)
    masks = {}
    parameters = dict(model.named_parameters())
    for group, score, alive, count in zip(smaller, sums, nonzero, counts.values(), strict=True):
        masks |= group.masks(_best(score, alive > 0, count), parameters)
    return {name: masks[name] for name in parameters if name in masks}


def _best(score: Tensor, alive: Tensor, count: int) -> Tensor:
    """Which units are kept, bool (units,): those that are alive, the largest scores first."""
    best_first = np.lexsort((-score.numpy(), ~alive.numpy()))
    kept = torch.zeros(len(score), dtype=torch.bool)
    kept[torch.from_numpy(best_first[:count])] = True
    return kept


@method("Michel et al. 2019, arXiv:1905.10650")
class Heads(_Units):
    """Whole attention heads; every block keeps at least one."""

    form = name = "heads"
    kinds = (HEADS,)


@method("Li et al. 2017, arXiv:1608.08710")
class Neurons(_Units):
    """Whole hidden neurons of the MLPs; every block keeps at least one."""

    form = name = "neurons"
    kinds = (NEURONS,)


@method("Yang et al. 2023, arXiv:2110.04869")
class HeadsAndNeurons(_Units):
    """Whole heads and hidden neurons, under one budget."""

    form = name = "heads+neurons"
    kinds = (HEADS, NEURONS)
