"""Chooses one option for each of many layers under a budget, exactly, by dynamic programming."""

from collections.abc import Sequence
from math import gcd

import numpy as np

from .k_largest import largest_threshold

STATES = 2**16  # how many different totals dynamic programming tells apart


def cheapest(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    *,
    spend_most: bool = False,
) -> list[int]:
    """The options of least total loss among those whose total cost is within the budget.

    The choice is exact if at most `STATES` different totals are possible. Otherwise costs are
    rounded up to multiples of budget / `STATES`, so that the budget is never exceeded. Among equal
    choices the earlier option of the earlier layer is taken.

    Args:
        costs: for each layer the costs of its options, whole numbers.
        losses: for each layer the losses of its options, finite.
        budget: at least the sum of each layer's smallest cost.
        spend_most: consider only choices with the largest total cost within the budget.

    Returns:
        For each layer the index of its option.

    Raises:
        ValueError: the budget is too small.
    """
    least = sum(map(min, costs))
    if budget < least:
        raise ValueError(f"budget {budget}: expected at least {least}")

    # Count costs above each layer's smallest, in a unit that leaves at most `STATES` totals
    above = [np.asarray(options, np.int64) - min(options) for options in costs]
    most = sum(int(extra.max()) for extra in above)
    left = min(int(budget) - least, most)
    unit = max(gcd(*np.concatenate(above).tolist()), -(-left // STATES), 1)
    above = [-(-extra // unit) for extra in above]
    left = left // unit if left < most else sum(int(extra.max()) for extra in above)

    # best[t] is the least loss of the layers from here to the last if they cost t in all
    best = np.where(np.arange(left + 1) == 0, 0.0, np.inf)
    choices = []
    for extra, loss in zip(reversed(above), reversed(losses), strict=True):
        reached = np.full(left + 1, np.inf)
        choice = np.zeros(left + 1, np.int16)
        for option, spent in enumerate(extra.tolist()):
            if spent <= left:
                total = best[: left + 1 - spent] + loss[option]
                better = total < reached[spent:]
                reached[spent:][better] = total[better]
                choice[spent:][better] = option
        best = reached
        choices.append(choice)

    # Follow the choices from the first layer to the last
    total = int(np.flatnonzero(np.isfinite(best))[-1]) if spend_most else int(best.argmin())
    chosen = []
    for choice, extra in zip(reversed(choices), above, strict=True):
        option = int(choice[total])
        chosen.append(option)
        total -= int(extra[option])
    return chosen


def undominated(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """The options of a layer that no other beats: none costs and loses at most as much, one less.

    Returns:
        Their indices, in order.
    """

    def beaten(option: int) -> bool:
        own = (costs[option], losses[option])
        others = zip(costs, losses, strict=True)
        return any(
            cost <= own[0] and loss <= own[1] and (cost, loss) != own for cost, loss in others
        )

    return [option for option in range(len(costs)) if not beaten(option)]


def nearest_steps(
    wanted: np.ndarray, step: np.ndarray, most: np.ndarray, budget: int
) -> np.ndarray:
    """How many steps each of many layers takes, from 1 to `most`, under a budget.

    Layers whose wanted cost is all their steps take them all, if the budget allows that for each of
    these layers. The total cost is the largest within the budget. Of the ways to reach it, the
    result has the least squared distance to shares of the budget proportional to the wanted costs,
    among all ways in which no layer is more than 32 steps from its share. If the layers have so
    many sizes that more than `STATES` totals are possible, the search looks at fewer steps and
    rounds totals.

    Args:
        wanted: the cost that each layer should have.
        step: the cost of a step of each layer.
        most: how many steps each layer can take.
        budget: the largest total cost, at least that of one step of each layer.
    """
    least = np.where(wanted >= most * step, most, 1)
    if least @ step > budget:
        least = np.ones_like(most)

    def shares(scale: float) -> np.ndarray:
        return np.clip(4 * scale * wanted / step, least, most)

    share = shares(largest_threshold(lambda scale: (shares(scale) * step).sum() <= budget))

    # The widest window around the shares for which totals need no rounding
    unit = gcd(*step.tolist())
    for window in (32, 8, 2):
        low = np.maximum(np.floor(share).astype(int) - window, least)
        spare = budget - int(low @ step)
        if spare <= STATES * unit:
            break
    high = np.minimum(np.floor(share).astype(int) + window, most)

    # Costs are rounded up and the budget down, so that it is never exceeded
    unit = max(unit, -(-spare // STATES))
    cost = -(-step // unit)
    total = spare // unit

    # Options count down, so that among equal choices the earlier layer takes more steps
    n = [range(top, lowest - 1, -1) for top, lowest in zip(high, low, strict=True)]
    costs = [
        [(steps - lowest) * one for steps in options]
        for options, lowest, one in zip(n, low, cost, strict=True)
    ]
    distances = [
        size * (np.array(options) - wish) ** 2
        for options, size, wish in zip(n, step, share, strict=True)
    ]
    chosen = cheapest(costs, distances, total, spend_most=True)
    return np.array([options[option] for options, option in zip(n, chosen, strict=True)])
