"""What a layer loses at a level, and levels for all layers that lose least under a budget.

A measure is a function

    def measure(pruned: Pruned) -> float

from a layer at a level, whose kept weights may make up for the pruned ones, to what is lost: 0
where nothing is pruned. Losses of layers are added up, so they have to compare among layers. It
looks at the statistics that it `needs`. To add one, write such a function and name it in
`MEASURES`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .masks import prunable_weights
from .method import method
from .patterns import Pattern
from .reconstruction import few_columns, obs_prune
from .scores import Layer
from .statistics import evaluation, images_of


@dataclass(frozen=True)
class Pruned:
    """A layer at a level.

    layer: what is known of it; weight: as it was; new: as it is then; mask: what is kept.
    divergence: from the new weights of some layers, by name, to how far the model's logits are from
    the dense ones.
    """

    layer: Layer
    weight: Tensor
    new: Tensor
    mask: Tensor
    divergence: Callable[[Mapping[str, Tensor]], float] | None = None


@method("Martens and Grosse 2015, arXiv:1503.05671", needs={"gram", "gradient_gram"})
def kfac(pruned: Pruned) -> float:
    """The rise of the loss to second order: the error of the outputs, weighed by the gradients
    there.

    tr(S D G D^T) / 2 with D the change of the weight, G and S the means over images of X^T X and of
    the gradients'.
    """
    change = (pruned.new - pruned.weight).to(pruned.layer.gram)
    layer = pruned.layer
    return (
        float(((layer.gradient_gram @ change) * (change @ layer.gram)).sum()) / 2 / layer.images**2
    )


@method("Frantar and Alistarh 2023, arXiv:2301.00774", needs={"gram"})
def output(pruned: Pruned) -> float:
    """The squared error of the outputs, summed over an image's tokens."""
    change = (pruned.new - pruned.weight).to(pruned.layer.gram)
    return float((change * (change @ pruned.layer.gram)).sum()) / pruned.layer.images


@method("this project", needs={"gram"})
def divergence(pruned: Pruned) -> float:
    """Kullback and Leibler's divergence of the model's predictions with this layer alone pruned
    from the dense ones.
    """
    return pruned.divergence({pruned.layer.name: pruned.new})


@method("Kuznedelev et al. 2023, arXiv:2210.09223", needs={"gram", "removal_costs"})
def cap(pruned: Pruned) -> float:
    """The sum of the `cap` scores of what goes."""
    return float((pruned.layer.removal_costs * ~pruned.mask).sum())


MEASURES: dict[str, Callable[[Pruned], float]] = {
    measure.__name__: measure for measure in (kfac, output, divergence, cap)
}


def at_levels(
    weight: Tensor,
    layer: Layer,
    levels: Iterable[int | tuple[int, int]],
    pattern: Pattern | None = None,
    divergence: Callable | None = None,
    mask_of: Callable[[int | tuple[int, int]], Tensor] | None = None,
) -> Iterator[Pruned]:
    """A layer at each of some levels: numbers of units of the pattern that are kept, or (n, m).

    mask_of: from a level to what is kept, the others staying as they are; without it, Optimal Brain
        Surgeon chooses, and the others make up.
    """
    units = pattern.units(weight.shape) if pattern else weight.numel()
    for kept in levels:
        if kept == units or isinstance(kept, tuple) and kept[0] == kept[1]:
            yield Pruned(
                layer, weight, weight, torch.ones_like(weight, dtype=torch.bool), divergence
            )
        elif mask_of:
            mask = mask_of(kept)
            yield Pruned(layer, weight, weight * mask, mask, divergence)
        else:
            new, mask = obs_prune(
                weight, layer.gram, kept, pattern=pattern, block_size=few_columns(weight)
            )
            yield Pruned(layer, weight, new, mask, divergence)


class Divergence:
    """Called with new weights of some layers, by name: how far the model's predictions are then
    from the dense ones.

    That is the mean over images of KL(dense || pruned). The model has its own weights again
    afterwards.

    Args:
        model: on its device.
        batches: of images, or tuples that begin with them; all are held.
        autocast: under which the model runs.
    """

    def __init__(self, model: nn.Module, batches: Iterable, autocast: torch.autocast):
        self.model = model
        self._weights = prunable_weights(model)
        self._autocast = autocast
        device = next(iter(self._weights.values())).device
        self._batches = [images_of(batch).to(device) for batch in batches]
        self._dense = self._predictions()

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        before = {name: self._weights[name].clone() for name in weights}
        try:
            for name, weight in weights.items():
                self._weights[name].copy_(weight)
            found = self._predictions()
        finally:
            for name, weight in before.items():
                self._weights[name].copy_(weight)
        return float(
            nn.functional.kl_div(found, self._dense, reduction="batchmean", log_target=True)
        )

    @torch.no_grad()
    def _predictions(self) -> Tensor:
        with evaluation(self.model), self._autocast:
            return torch.cat(
                [self.model.forward(images).double().log_softmax(1) for images in self._batches]
            )


def exchanges(
    chosen: Sequence[int],
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    measure: Callable[[tuple[int, ...]], float],
    tries: int,
) -> tuple[int, ...]:
    """Options that a measurement of the whole finds better, from pairs of layers that exchange a
    level.

    One layer goes a level up, another a level down, where the budget allows it. Exchanges are
    measured in the order of what the sum of the losses says of them; the first that is better is
    kept, and the next round begins from there.

    Args:
        chosen, costs, losses, budget: as for `cheapest`.
        measure: of a choice for all layers; the least is best.
        tries: how many exchanges are measured at most.
    """
    orders = [
        sorted(range(len(options)), key=lambda option, options=options: (options[option], option))
        for options in costs
    ]
    best = tuple(chosen)
    least = measure(best)
    seen = {best}
    tries = tries + 1

    def steps(layer: int, by: int) -> int | None:
        place = orders[layer].index(best[layer]) + by
        return orders[layer][place] if 0 <= place < len(orders[layer]) else None

    def candidates() -> list[tuple[int, ...]]:
        found = []
        for up in range(len(best)):
            for down in range(len(best)):
                options = list(best)
                options[up] = steps(up, 1)
                options[down] = steps(down, -1)
                if (
                    up != down
                    and None not in (options[up], options[down])
                    and sum(cost[option] for cost, option in zip(costs, options, strict=True))
                    <= budget
                ):
                    found.append(tuple(options))
        return sorted(
            found,
            key=lambda options: sum(
                loss[option] for loss, option in zip(losses, options, strict=True)
            ),
        )

    while untried := [options for options in candidates() if options not in seen]:
        for options in untried:
            if len(seen) >= tries:
                return best
            seen.add(options)
            if (value := measure(options)) < least:
                best, least = options, value
                break
        else:
            break
    return best
