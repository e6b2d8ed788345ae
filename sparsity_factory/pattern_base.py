"""What a pattern is asked.

It knows no allocation. Where it looks at each layer by itself, it says

- `units(shape)`: how many units, things that are kept or removed as one, a weight of that shape
  has;
- `score(score)`: the scores of the units from the scores of the weights;
- `fit(kept, shapes, budget)`: the numbers of units that layers can keep, from those that an
  allocation wants;
- `step(shape)`: by how many units the number that a weight keeps can change at least;
- `mask(score, kept)`: the mask of a layer from the scores of its units.

Where units reach over several layers, it has a `masks` of its own, which is all that the outside
calls. Scores are finite and non-negative.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

from torch import Tensor, nn

LEVELS = 25  # that a search looks at, from 1 down to 1/64, each 16 % below the one before

Shapes = Mapping[str, Sequence[int]]


class Pattern:
    """What all patterns have in common.

    Attributes:
        name: as it is written on the command line.
        sparsity: what the pattern itself fixes, else None.
        budgets: what a sparsity can be a fraction of.
        transposable: what holds along the inputs holds along the outputs as well.
        structured: a block without what is pruned is a smaller block. It is zero on both sides, and
        so has no gradient.
    """

    name: str
    sparsity: float | None = None
    budgets: tuple[str, ...] = ("weights",)
    transposable = False
    structured = False

    def masks(
        self, model: nn.Module, scores, allocate: Callable, sparsity: float, budget: str
    ) -> dict[str, Tensor]:
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
        """The numbers of units that layers keep, where an allocation wants `kept` and all have
        `budget` together.
        """
        return kept

    def step(self, shape: Sequence[int]) -> int:
        """By how many units the number that a weight keeps can change at least."""
        return 1

    def levels(self, shape: Sequence[int]) -> list[int]:
        """Numbers of units that a weight may keep, in rising order, among which a search chooses:
        all, if few.
        """
        step = self.step(shape)
        most = self.units(shape) // step
        return [
            step * n
            for n in sorted({1, *(max(round(most * 2 ** (-k / 4)), 1) for k in range(LEVELS))})
        ]

    def compared_columns(self, block_size: int) -> int:
        """How many columns are taken together where units are chosen from left to right: about
        `block_size`.
        """
        return block_size

    def share(self, kept: int, shape: Sequence[int], start: int, end: int) -> int:
        """Of the units that a weight keeps, those that its columns from `start` to `end` keep."""
        return round(kept * end / shape[1]) - round(kept * start / shape[1])

    def mask(self, score: Tensor, kept: int, at_least: Tensor | None = None) -> Tensor:
        """Bool tensor of the weight's shape that keeps `kept` units.

        at_least: `suffix_sums(histogram(score))`, where it is known already.
        """
        raise NotImplementedError


def down(sparsity: float) -> str:
    """To four digits, towards zero, so that what is printed can be met."""
    return f"{int(sparsity * 10_000) / 10_000:g}"
