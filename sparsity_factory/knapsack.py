"""One option for each of many layers under a budget: the exact choice, by dynamic programming."""

from collections.abc import Sequence
from math import gcd

import numpy as np

from .k_largest import largest_threshold

STATES = 2**16  # the totals that are told apart


def cheapest(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    *,
    spend_most: bool = False,
) -> list[int]:
    """The options of least total loss among those whose total cost does not pass the budget.

    The choice is exact where all totals up to the budget are multiples of so much that there are at
    most `STATES` of them. Elsewhere costs are rounded up to a part of the budget in `STATES`, so
    that it is never passed. Among equal choices the earlier option of the earlier layer is taken.

    Args:
        costs: of each layer the costs of its options, whole numbers.
        losses: of each layer the losses of its options, finite.
        budget: at least the sum of the least costs.
        spend_most: take the least loss among those choices whose cost is the largest within the
            budget.

    Returns:
        Of each layer the number of its option.
    """
    least = sum(map(min, costs))
    if budget < least:
        raise ValueError(f"budget {budget}: expected at least {least}")
    above = [np.asarray(options, np.int64) - min(options) for options in costs]
    most = sum(int(extra.max()) for extra in above)
    left = min(int(budget) - least, most)
    unit = max(gcd(*np.concatenate(above).tolist()), -(-left // STATES), 1)
    above = [-(-extra // unit) for extra in above]
    left = left // unit if left < most else sum(int(extra.max()) for extra in above)
    # best[t]: the least loss of the later layers if they cost t above their least.
    best, choices = np.where(np.arange(left + 1) == 0, 0.0, np.inf), []
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
    place = int(np.flatnonzero(np.isfinite(best))[-1]) if spend_most else int(best.argmin())
    chosen = []
    for choice, extra in zip(reversed(choices), above, strict=True):
        chosen.append(int(choice[place]))
        place -= int(extra[chosen[-1]])
    return chosen


def nearest_steps(
    wanted: np.ndarray, step: np.ndarray, most: np.ndarray, budget: int
) -> np.ndarray:
    """How many steps each of many layers takes, from 1 to `most`, under a budget.

    A layer that is wanted whole stays so, if the budget allows that for all of those. The total is
    the largest that does not pass the budget; among the ways to reach it, the one of the least
    squared distance to shares of the budget that are proportional to what is wanted. All ways are
    searched in which no layer is more than 32 steps from its share; fewer steps, or rounded totals,
    where layers have so many sizes that their sums are more than STATES.

    Args:
        wanted: of each layer the cost that it should have.
        step: of each layer the cost of a step.
        most: of each layer how many steps it can take.
        budget: of the total cost, at least that of one step of each layer.
    """
    least = np.where(wanted >= most * step, most, 1)
    if least @ step > budget:
        least = np.ones_like(most)

    def shares(scale: float) -> np.ndarray:
        return np.clip(4 * scale * wanted / step, least, most)

    share = shares(largest_threshold(lambda scale: (shares(scale) * step).sum() <= budget))
    unit = gcd(*step.tolist())
    for window in (32, 8, 2):
        low = np.maximum(np.floor(share).astype(int) - window, least)
        spare = budget - int(low @ step)
        if spare <= STATES * unit:
            break
    high = np.minimum(np.floor(share).astype(int) + window, most)
    unit = max(unit, -(-spare // STATES))
    # Rounded such that the budget is never passed
    cost, total = -(-step // unit), spare // unit

    # Of equals the earlier keeps more
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
