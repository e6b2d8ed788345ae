"""The loss of a layer at a level, and levels for all layers that lose least within a budget.

A measure is a function

    def measure(pruned: Pruned) -> float

from a layer at a level to its loss, 0 if nothing is pruned. The kept weights may already compensate
for the pruned ones. Losses of layers are added up, so they have to be comparable. A measure reads
the statistics that it `needs`. To add one, write such a function and name it in `MEASURES`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import torch
from torch import Tensor, nn

from .batches import inputs_of
from .custom_yaml import Amount, BlockLevel
from .damping import DAMPING, damped_gram
from .masks import prunable_weights
from .method import method
from .patterns import Pattern
from .reconstruction import few_columns, obs_prune
from .scores import Layer
from .statistics import evaluation


@dataclass(frozen=True)
class Pruned:
    """A layer at a level.

    layer: its name and statistics.
    weight, new: its weight before and after pruning.
    mask: True where the new weight is kept.
    divergence: from new weights of some layers, by name, to the divergence of the model's
        predictions from those of the dense model.
    """

    layer: Layer
    weight: Tensor
    new: Tensor
    mask: Tensor
    divergence: Callable[[Mapping[str, Tensor]], float] | None = None


@method("Martens and Grosse 2015, arXiv:1503.05671", needs={"gram", "gradient_gram"})
def kfac(pruned: Pruned) -> float:
    """The rise of the loss to second order: errors of outputs, weighted by their gradients.

    tr(S D G D^T) / 2 with D the change of the weight, and G and S the means over images of X^T X
    and of the same product of the gradients.
    """
    layer = pruned.layer
    change = (pruned.new - pruned.weight).to(layer.gram)
    rise = float(((layer.gradient_gram @ change) * (change @ layer.gram)).sum()) / 2
    return rise / layer.images**2


@method("Frantar and Alistarh 2023, arXiv:2301.00774", needs={"gram"})
def output(pruned: Pruned) -> float:
    """The squared error of the outputs, summed over an image's tokens."""
    change = (pruned.new - pruned.weight).to(pruned.layer.gram)
    return float((change * (change @ pruned.layer.gram)).sum()) / pruned.layer.images


@method("this project", needs={"gram"})
def divergence(pruned: Pruned) -> float:
    """The KL divergence from the dense model's predictions if only this layer is pruned."""
    assert pruned.divergence is not None
    return pruned.divergence({pruned.layer.name: pruned.new})


@method("Kuznedelev et al. 2023, arXiv:2210.09223", needs={"gram", "removal_costs"})
def cap(pruned: Pruned) -> float:
    """The sum of the `cap` scores of the pruned weights."""
    return float((pruned.layer.removal_costs * ~pruned.mask).sum())


MEASURES: dict[str, Callable[[Pruned], float]] = {
    measure.__name__: measure for measure in (kfac, output, divergence, cap)
}


def at_levels(
    weight: Tensor,
    layer: Layer,
    levels: Iterable[Amount | Tensor],
    pattern: Pattern | None = None,
    divergence: Callable | None = None,
    mask_of: Callable[[Amount], Tensor] | None = None,
    *,
    columns: int | None = None,
    damping: float = DAMPING,
) -> Iterator[Pruned]:
    """Yields a layer at each level: how many units of the pattern are kept, another `Amount`, or a
    mask.

    mask_of: from a level to the mask, by which weights are pruned without compensation. By default
        Optimal Brain Surgeon chooses the mask, and the kept weights compensate. All levels share
        the factor of the layer's Gram matrix, which takes longer than a level.
    columns, damping: as for the reconstruction `obs`.
    """
    factor = None
    columns = columns or few_columns(weight)

    for level in levels:
        own = level.pattern if isinstance(level, BlockLevel) else pattern
        kept = level.kept(weight.shape) if isinstance(level, BlockLevel) else level
        if _is_whole(kept, own.units(weight.shape) if own else weight.numel()):
            new = weight
            mask = torch.ones_like(weight, dtype=torch.bool)
        elif mask_of:
            mask = level if isinstance(level, Tensor) else mask_of(level)
            new = weight * mask
        else:
            if factor is None:
                _, factor = damped_gram(layer.gram, damping)
            new, mask = obs_prune(
                weight, layer.gram, kept, pattern=own, block_size=columns, factor=factor
            )
        yield Pruned(layer, weight, new, mask, divergence)


class Divergence:
    """Called with new weights of some layers, returns the divergence of the model's predictions.

    The divergence is the mean over images of KL(dense || pruned). The weights are given by name;
    the model has its own weights again afterwards.

    Args:
        model: on its device.
        batches: of images, or tuples that begin with them; all are kept in memory.
        autocast: under which the model runs.
    """

    def __init__(self, model: nn.Module, batches: Iterable, autocast: torch.autocast):
        self.model = model
        self._weights = prunable_weights(model)
        self._autocast = autocast

        device = next(iter(self._weights.values())).device
        self._batches = [inputs_of(batch, device) for batch in batches]
        self._dense = self._predictions(model)

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        before = {name: self._weights[name].clone() for name in weights}
        try:
            for name, weight in weights.items():
                self._weights[name].copy_(weight)
            return self.of(self.model)
        finally:
            for name, weight in before.items():
                self._weights[name].copy_(weight)

    @torch.no_grad()
    def of(self, model: nn.Module) -> float:
        """The divergence of another model's predictions."""
        kl_div = nn.functional.kl_div
        found = self._predictions(model)
        return float(kl_div(found, self._dense, reduction="batchmean", log_target=True))

    @torch.no_grad()
    def _predictions(self, model: nn.Module) -> Tensor:
        with evaluation(model), self._autocast:
            return torch.cat(
                [model.forward(images).double().log_softmax(1) for images in self._batches]
            )


def exchanges(
    chosen: Sequence[int],
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    measure: Callable[[tuple[int, ...]], float],
    tries: int,
) -> tuple[int, ...]:
    """Improves a choice of options by exchanges of a level between two layers.

    In an exchange, one layer moves a level up and another a level down, if the budget allows it.
    Exchanges are measured in the order of their sum of losses, the least first. The first that the
    measure finds better is kept, and the next round begins from there.

    Args:
        chosen, costs, losses, budget: as for `cheapest`.
        measure: from a choice for all layers to a number, the smaller the better.
        tries: how many exchanges are measured at most.

    Returns:
        The best choice that was measured.
    """
    best = tuple(chosen)
    least = measure(best)
    seen = {best}

    # By layer, its options from the least to the largest cost; of equal costs the earlier first
    orders = [sorted(range(len(options)), key=options.__getitem__) for options in costs]

    def total(table: Sequence[Sequence[float]], options: Sequence[int]) -> float:
        return sum(row[option] for row, option in zip(table, options, strict=True))

    def moved(layer: int, by: int) -> int | None:
        """The option of a layer a level up or down; None if there is none."""
        place = orders[layer].index(best[layer]) + by
        return orders[layer][place] if 0 <= place < len(orders[layer]) else None

    def candidates() -> list[tuple[int, ...]]:
        found = []
        for up, down in permutations(range(len(best)), 2):
            larger = moved(up, 1)
            smaller = moved(down, -1)
            if larger is None or smaller is None:
                continue

            options = list(best)
            options[up] = larger
            options[down] = smaller
            if total(costs, options) <= budget:
                found.append(tuple(options))
        return sorted(found, key=partial(total, losses))

    while untried := [options for options in candidates() if options not in seen]:
        for options in untried:
            if len(seen) > tries:
                return best
            seen.add(options)
            value = measure(options)
            if value < least:
                best = options
                least = value
                break
        else:
            break  # none of them is better
    return best


# ---- helpers, not exported ----


def _is_whole(kept: int | tuple[int, int] | Tensor, units: int) -> bool:
    """Whether a level keeps all of the units."""
    if isinstance(kept, Tensor):
        return bool(kept.all())
    return kept[0] == kept[1] if isinstance(kept, tuple) else kept == units
