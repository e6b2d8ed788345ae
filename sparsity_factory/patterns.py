"""What may be removed together, and from the scores of one layer to its mask.

A pattern knows no allocation. Where it looks at each layer by itself, it says

- `units(shape)`: how many units, things that are kept or removed as one, a weight of that shape has;
- `score(score)`: the scores of the units from the scores of the weights;
- `fit(kept, shapes, budget)`: the numbers of units that layers can keep, from those that an allocation wants;
- `step(shape)`: by how many units the number that a weight keeps can change at least;
- `mask(score, kept)`: the mask of a layer from the scores of its units.

Where units reach over several layers, it has a `masks` of its own, which is all that the outside calls. To add one,
write such a class and name it in `PATTERNS`. Scores are finite and non-negative. Among equal scores the earlier weight
or block in row-major order is kept.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations, product
from math import gcd, prod

import numpy as np
import torch
from torch import Tensor, nn

from .counting import k_largest, largest_threshold
from .errors import PruningError
from .knapsack import STATES, cheapest
from .methods import method
from .multiply_adds import image_of, multiply_adds_of_modules
from .structure import HEADS, NEURONS, unit_groups

LEVELS = 25  # that a search looks at, from 1 down to 1/64, each 16 % below the one before
PAIRWISE_UP_TO = 32  # above this group size, partitioning the groups is faster than comparing every pair
MOST_TRANSPOSABLE = 4  # group size, of which all masks are looked at: 90 for 2:4t, and of 8 a hundred million
BLOCKS_AT_ONCE = 2**16  # so that the sums of all masks of these take 50 MB

Shapes = Mapping[str, Sequence[int]]


class Pattern:
    """What all patterns have in common.

    Attributes:
        name: as it is written on the command line.
        sparsity: what the pattern itself fixes, else None.
        budgets: what a sparsity can be a fraction of.
        transposable: what holds along the inputs holds along the outputs as well.
        structured: a block without what is pruned is a smaller block. It is zero on both sides, and so has no gradient.
    """

    name: str
    sparsity: float | None = None
    budgets: tuple[str, ...] = ("weights",)
    transposable = False
    structured = False

    def masks(self, model: nn.Module, scores, allocate: Callable, sparsity: float, budget: str) -> dict[str, Tensor]:
        """The masks of a model, by parameter name, in model order.

        Args:
            model: it is not changed.
            scores: the `Scores` of its prunable weights.
            allocate: from `Scores` and a sparsity to the number of units that each layer keeps.
            sparsity: the fraction of the budget that goes.
            budget: one of `budgets`.
        """
        self.check(scores.shapes)
        total = round(sum(map(prod, scores.shapes.values())) * (1 - sparsity))
        kept = self.fit(allocate(scores, sparsity), scores.shapes, total)
        return {name: scores.mask(name, kept[name]) for name in scores}

    def check(self, shapes: Shapes) -> None:
        """Raises a PruningError that names the first layer that the pattern does not fit."""

    def units(self, shape: Sequence[int]) -> int:
        """How many units a weight has: without more ado, each single weight is one."""
        return prod(shape)

    def score(self, score: Tensor) -> Tensor:
        """The scores of the units, from those of the weights, shape (outputs, inputs)."""
        return score

    def fit(self, kept: dict[str, int], shapes: Shapes, budget: int) -> dict[str, int]:
        """The numbers of units that layers keep, where an allocation wants `kept` and all have `budget` together."""
        return kept

    def step(self, shape: Sequence[int]) -> int:
        """By how many units the number that a weight keeps can change at least."""
        return 1

    def levels(self, shape: Sequence[int]) -> list[int]:
        """Numbers of units that a weight may keep, in rising order, among which a search chooses: all, if few."""
        step = self.step(shape)
        most = self.units(shape) // step
        return [step * n for n in sorted({1, *(max(round(most * 2 ** (-k / 4)), 1) for k in range(LEVELS))})]

    def compared_columns(self, block_size: int) -> int:
        """How many columns are taken together where units are chosen from left to right: about `block_size`."""
        return block_size

    def share(self, kept: int, shape: Sequence[int], start: int, end: int) -> int:
        """Of the units that a weight keeps, those that its columns from `start` to `end` keep."""
        return round(kept * end / shape[1]) - round(kept * start / shape[1])

    def mask(self, score: Tensor, kept: int, at_least: Tensor | None = None) -> Tensor:
        """Bool tensor of the weight's shape that keeps `kept` units.

        at_least: `counting.suffix_sums(counting.histogram(score))`, where it is known already.
        """
        raise NotImplementedError


@method()
class Unstructured(Pattern):
    """Single weights; each layer keeps as many as the allocation says."""

    form = name = "unstructured"

    @classmethod
    def parse(cls, name: str) -> "Unstructured | None":
        return cls() if name == cls.form else None

    def mask(self, score, kept, at_least=None):
        return k_largest(score, kept, at_least)


class _Groups(Pattern):
    """n of every m consecutive weights along the inputs, with 1 <= n <= m.

    m: the size of a group; None for whole rows.
    """

    def __init__(self, name: str, m: int | None):
        self.name, self.m = name, m

    def check(self, shapes):
        for name, (outputs, inputs) in shapes.items():
            if self.m and inputs % self.m:
                raise PruningError(f"pattern {self.name}: expected a group size that divides the {inputs} inputs of "
                                   f"{name} ({outputs} x {inputs})")

    def fit(self, kept, shapes, budget):
        """All layers together keep as much of the budget as whole n allow, and never more than it.

        Among the ways to do so, it is the one that stays nearest to what the allocation wants. Layers that it wants
        dense stay dense, if the budget allows that. What is whole and within the budget already stays as it is.
        """
        m = {name: self.m or shape[1] for name, shape in shapes.items()}
        groups = {name: prod(shape) // m[name] for name, shape in shapes.items()}
        least = sum(groups.values())
        if least > budget:
            most = 1 - least / sum(map(prod, shapes.values()))
            group = f"every {self.m} weights" if self.m else "each row"
            raise PruningError(f"pattern {self.name} keeps at least one of {group}: "
                               f"expected a sparsity of at most {_down(most)}")
        if all(kept[name] and kept[name] % groups[name] == 0 for name in kept) and sum(kept.values()) <= budget:
            return kept
        n = _nearest_steps(np.array(list(kept.values())), np.array(list(groups.values())), np.array(list(m.values())),
                           budget)
        return {name: int(n) * groups[name] for name, n in zip(kept, n, strict=True)}

    def step(self, shape):
        return prod(shape) // (self.m or shape[1])

    def compared_columns(self, block_size):
        return self.m or block_size

    def share(self, kept, shape, start, end):
        return shape[0] * super().share(kept // shape[0], shape, start, end)  # the same in each row

    def mask(self, score, kept, at_least=None):
        m = self.m or score.shape[1]
        return n_of_m(score, kept * m // score.numel(), m)


@method("Sun et al. 2024, arXiv:2306.11695")
class Row(_Groups):
    """Each output row of a layer keeps the same number of weights, at least one: as Wanda compares."""

    form = "row"

    @classmethod
    def parse(cls, name: str) -> "Row | None":
        return cls(name, None) if name == cls.form else None


@method("Mishra et al. 2021, arXiv:2104.08378")
class NOfM(_Groups):
    """n of every m consecutive weights along the inputs, such as 2:4, in every layer; takes no sparsity."""

    form = "n:m"
    suffix = ""

    def __init__(self, name: str, n: int, m: int):
        super().__init__(name, m)
        self.n, self.sparsity = n, 1 - n / m

    @classmethod
    def parse(cls, name: str) -> "NOfM | None":
        if written := re.fullmatch(rf"([0-9]{{1,9}}):([0-9]{{1,9}}){cls.suffix}", name):
            n, m = map(int, written.groups())
            if not 1 <= n <= m:
                raise PruningError(f"pattern {name!r}: expected {cls.form} with 1 <= n <= m")
            return cls(name, n, m)

    def keeping(self, n: int) -> str:
        """The name of the same pattern with another n."""
        return f"{n}:{self.m}{self.suffix}"

    def fit(self, kept, shapes, budget):
        return {name: prod(shape) // self.m * self.n for name, shape in shapes.items()}


@method("Hubara et al. 2021, arXiv:2102.08124")
class Transposable(NOfM):
    """n of every m along the inputs and along the outputs, such as 2:4t: n:m for the backward pass as well."""

    form, suffix = "n:mt", "t"
    transposable = True

    def __init__(self, name: str, n: int, m: int):
        super().__init__(name, n, m)
        if m > MOST_TRANSPOSABLE:
            raise PruningError(f"pattern {name!r}: expected n:mt with m of at most {MOST_TRANSPOSABLE}")

    def check(self, shapes):
        for name, (outputs, inputs) in shapes.items():
            if outputs % self.m or inputs % self.m:
                raise PruningError(f"pattern {self.name}: expected blocks of {self.m} x {self.m} that divide {name} "
                                   f"({outputs} x {inputs})")

    def mask(self, score, kept, at_least=None):
        return transposable_n_of_m(score, kept * self.m // score.numel(), self.m)


@method("Sun et al. 2021, DominoSearch (NeurIPS)")
class AnyOfM(_Groups):
    """n of every m, such as x:4, with an n for each layer that the allocation decides, from 1 to m."""

    form = "x:m"

    @classmethod
    def parse(cls, name: str) -> "AnyOfM | None":
        if written := re.fullmatch(r"x:([0-9]{1,9})", name):
            if not int(written[1]):
                raise PruningError(f"pattern {name!r}: expected x:m with m of at least 1")
            return cls(name, int(written[1]))


@method("Gray et al. 2017, block-sparse kernels")
class Block(Pattern):
    """Blocks of R outputs by C inputs, such as block:16x16; the score of a block is the sum over its weights."""

    form = "block:RxC"

    def __init__(self, name: str, rows: int, columns: int):
        self.name, self.rows, self.columns = name, rows, columns

    @classmethod
    def parse(cls, name: str) -> "Block | None":
        if written := re.fullmatch(r"block:([0-9]{1,9})x([0-9]{1,9})", name):
            rows, columns = map(int, written.groups())
            if not rows or not columns:
                raise PruningError(f"pattern {name!r}: expected block:RxC with R and C of at least 1")
            return cls(name, rows, columns)

    def check(self, shapes):
        for name, (outputs, inputs) in shapes.items():
            if outputs % self.rows or inputs % self.columns:
                raise PruningError(f"pattern {self.name}: expected blocks that divide {name} ({outputs} x {inputs})")

    def units(self, shape):
        return prod(shape) // (self.rows * self.columns)

    def score(self, score):
        blocks = score.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        return blocks.sum((1, 3), dtype=torch.float64).to(score.dtype)  # so that rounding depends on no device

    def compared_columns(self, block_size):
        return max(block_size // self.columns, 1) * self.columns

    def mask(self, score, kept, at_least=None):
        mask = k_largest(score, kept, at_least)
        return mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)


class _Units(Pattern):
    """Whole heads or neurons: their rows and columns in all parameters of their block, biases too.

    Attributes:
        kinds: of `structure.HEADS` and `structure.NEURONS`.
    """

    kinds: tuple[str, ...]
    budgets = ("weights", "macs")
    structured = True

    @classmethod
    def parse(cls, name: str) -> "_Units | None":
        return cls() if name == cls.form else None

    def masks(self, model, scores, allocate, sparsity, budget):
        """An allocation sees the weights of all units, each with the mean score of its unit, and says how many it wants
        of each layer. Blocks keep units in proportion to that, as nearly as whole ones allow, and never more than the
        budget. A block with a layer that is wanted dense stays dense, if the budget allows that. Other weights stay.

        Within a block the units of the largest sums are kept, on a tie the earlier. Units of zeros alone, such as those
        that are pruned already, are never kept, unless no other is left.
        """
        groups = unit_groups(model, self.kinds)
        if not groups:
            raise PruningError(f"pattern {self.name}: {type(model).__name__} has none that are known: expected a "
                               "transformer of timm")
        numel = {name: prod(shape) for name, shape in scores.shapes.items()}
        weights = [group.weights(numel) for group in groups]  # by name the part that says how its units lie
        sizes = [sum(numel[name] for name in parts) for parts in weights]
        costs, total = sizes, sum(numel.values())
        if budget == "macs":
            costs, total = multiply_adds_of_modules(model, [group.name for group in groups], image_of(model))
        step = np.array([-(-cost // group.units) for cost, group in zip(costs, groups, strict=True)])
        left = round(total * (1 - sparsity)) - (total - sum(costs))
        if left < step.sum():
            raise PruningError(f"pattern {self.name} keeps at least one unit of each block and all weights elsewhere: "
                               f"expected a sparsity of at most {_down((sum(costs) - step.sum()) / total)}")

        sums = [group.sums(scores.__getitem__, parts) for group, parts in zip(groups, weights, strict=True)]
        alive = [group.sums(lambda name: scores.weight(name) != 0, parts) > 0
                 for group, parts in zip(groups, weights, strict=True)]
        means = {name: (total_score * group.units / size)[part.unit].unsqueeze(1 - part.dim)
                 for group, parts, size, total_score in zip(groups, weights, sizes, sums, strict=True)
                 for name, part in parts.items()}
        try:
            wanted = allocate(scores.replaced(means), 1 - left / sum(costs))
        except PruningError as error:  # with figures that are not those of all prunable weights
            raise PruningError(f"pattern {self.name}, of the weights that it can remove: {error}") from None
        shares = [1.0 if any(wanted[name] == numel[name] for name in parts) else
                  sum(wanted[name] for name in parts) / size for parts, size in zip(weights, sizes, strict=True)]
        most = np.array([max(int(units.sum()), 1) for units in alive])
        kept = _nearest_steps(np.array(shares) * [group.units for group in groups] * step, step, most, left)

        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in scores.weights.items()}
        parameters = dict(model.named_parameters())
        for group, total_score, live, count in zip(groups, sums, alive, kept, strict=True):
            best_first = np.lexsort((-total_score.numpy(), ~live.numpy()))
            chosen = torch.zeros(group.units, dtype=torch.bool)
            chosen[torch.from_numpy(best_first[:count])] = True
            masks |= group.masks(chosen, parameters)
        return {name: masks[name] for name in parameters if name in masks}


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


PATTERNS: dict[str, type[Pattern]] = {
    pattern.form: pattern
    for pattern in (Unstructured, Row, NOfM, Transposable, AnyOfM, Block, Heads, Neurons, HeadsAndNeurons)
}


def parse_pattern(name: str) -> Pattern:
    """The pattern of that name: one of the forms in `PATTERNS`, with numbers for their capital and small letters.

    Raises:
        PruningError: no form fits, or its numbers are out of range.
    """
    for pattern in PATTERNS.values():
        if found := pattern.parse(name) if isinstance(name, str) else None:
            return found
    raise PruningError(f"unknown pattern {str(name)[:100]!r}: expected unstructured, row, n:m such as 2:4, n:mt such "
                       "as 2:4t, x:m such as x:4, block:RxC such as block:16x16, heads, neurons or heads+neurons")


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask of the shape of `score` that keeps the `n` largest of every `m` consecutive weights of its last dimension.

    Args:
        score: a tensor; `m` divides its last dimension.
        n: from 0 to `m`.
    """
    if not n:
        return torch.zeros_like(score, dtype=torch.bool)
    groups = score.reshape(-1, m)
    if m > PAIRWISE_UP_TO:
        return _n_of_large_groups(groups, n).view(score.shape)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=score.device)
    # The rank of a weight is the number of weights that go before it in its group: to begin with, all earlier ones.
    ranks = [torch.full((len(groups),), place, dtype=torch.uint8, device=score.device) for place in range(m)]
    for later in range(m):
        for earlier in range(later):
            overtakes = (groups[:, later] > groups[:, earlier]).view(torch.uint8)  # on a tie the earlier stays ahead
            ranks[earlier] += overtakes
            ranks[later] -= overtakes
    for place, rank in enumerate(ranks):
        mask[:, place] = rank < n
    return mask.view(score.shape)


def transposable_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps n of every m consecutive weights of each row and of each column.

    Of each m x m block it is the mask of the largest sum of scores, among all that there are. On a tie it is the first
    of those masks in the order of their first rows, then of their second ones, and so on, a row that keeps earlier
    weights being first.

    Args:
        score: shape (outputs, inputs); `m` divides both.
        n: from 0 to `m`, which is small.
    """
    masks = torch.from_numpy(_transposable_masks(n, m)).to(score.device)
    blocks = score.unflatten(0, (-1, m)).unflatten(2, (-1, m)).transpose(1, 2)
    # In float64 the sums of float32 scores are exact, but for extreme ones, whatever the order in which they are added.
    sums = (part.double() @ masks.T.double() for part in blocks.reshape(-1, m * m).split(BLOCKS_AT_ONCE))
    best = torch.cat([of_masks.argmax(1) for of_masks in sums])
    return masks[best].view(blocks.shape).transpose(1, 2).reshape(score.shape)


def regrow(weight: Tensor, mask: Tensor, growth: Tensor, count: int) -> Tensor:
    """Drops the smallest of the kept weights, and grows as many of all that are then not kept, dropped ones included.

    Among equals the earlier weight in row-major order is kept, and grown.

    Args:
        weight: the `count` smallest magnitudes that the mask keeps are dropped.
        mask: bool tensor of the weight's shape, True where the weight is kept.
        growth: of the weight's shape, finite and non-negative: the `count` largest are grown.
        count: from 0 to the number of weights that the mask keeps.

    Returns:
        A mask that keeps as many weights as the given one.

    Raises:
        PruningError: a count that is out of range.
    """
    kept = int(mask.count_nonzero())
    if not 0 <= count <= kept:
        raise PruningError(f"{count} weights to drop and grow: expected 0 to the {kept} that are kept")
    left = k_largest(_positive_where(mask, weight.detach().abs()), kept - count)
    return left | k_largest(_positive_where(~left, growth), count)


# ---- helpers, not exported ----


def _positive_where(mask: Tensor, values: Tensor) -> Tensor:
    """Values in the same order, and above 0 where the mask is True; 0 elsewhere."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.nextafter(values.new_tensor(torch.inf)).masked_fill(~mask, 0)


@cache
def _transposable_masks(n: int, m: int) -> np.ndarray:
    """The masks of m x m that keep n of each row and column, shape (masks, m * m), earlier weights first."""
    rows = [[place in kept for place in range(m)] for kept in combinations(range(m), n)]
    blocks = np.array(list(product(rows, repeat=m)))
    return blocks[(blocks.sum(1) == n).all(1)].reshape(-1, m * m)


def _n_of_large_groups(groups: Tensor, n: int) -> Tensor:
    if groups.device.type != "cpu":
        best_first = groups.argsort(dim=1, descending=True, stable=True)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best_first[:, :n], True)
    groups = groups.numpy()
    last_kept = np.partition(groups, -n, axis=1)[:, -n, None]
    mask, ties = groups > last_kept, groups == last_kept
    missing = n - mask.sum(1, keepdims=True)
    mask |= ties & (ties.cumsum(1, dtype=np.int32) <= missing)
    return torch.from_numpy(mask)


def _down(sparsity: float) -> str:
    """To four digits, towards zero, so that what is printed can be met."""
    return f"{int(sparsity * 10_000) / 10_000:g}"


def _nearest_steps(wanted: np.ndarray, step: np.ndarray, most: np.ndarray, budget: int) -> np.ndarray:
    """How many steps each layer takes, from 1 to `most`.

    A layer that is wanted whole stays so, if the budget allows that for all of those. The total is the largest that
    does not pass the budget; among the ways to reach it, the one of the least squared distance to shares of the budget
    that are proportional to what is wanted. All ways are searched in which no layer is more than 32 steps from its
    share; fewer steps, or rounded totals, where layers have so many sizes that their sums are more than STATES.

    wanted, step: numbers of weights.
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
    cost, total = -(-step // unit), spare // unit  # rounded such that the budget is never passed

    n = [range(top, lowest - 1, -1) for top, lowest in zip(high, low, strict=True)]  # of equals the earlier keeps more
    costs = [[(steps - lowest) * one for steps in options] for options, lowest, one in zip(n, low, cost, strict=True)]
    distances = [size * (np.array(options) - wish) ** 2 for options, size, wish in zip(n, step, share, strict=True)]
    chosen = cheapest(costs, distances, total, spend_most=True)
    return np.array([options[option] for options, option in zip(n, chosen, strict=True)])
