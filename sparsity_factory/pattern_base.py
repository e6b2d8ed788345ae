"""The base class of all patterns, with the methods that a pattern may override.

A pattern knows no allocation. A unit is what it keeps or removes as a whole: a weight, a block, a
head. A pattern that handles each layer by itself overrides some of these:

- `misfit(name, shape)`: why a weight of that shape cannot be divided into units, and stays dense;
- `units(shape)`: how many units a weight of that shape has;
- `score(score)`: the scores of the units, from the scores of the weights;
- `among(score, left)`, `most(left)`: the scores, and the number of units that a weight can keep, if
  only the weights in the mask `left` may be kept;
- `fit(kept, most, shapes, budget)`: the numbers of units that layers can keep, from those that an
  allocation wants;
- `step(shape)`: the smallest change of the number of units that a weight keeps;
- `mask(score, kept)`: the mask of a layer, from the scores of its units;
- `flaw(mask)`, `slack(shapes)`: what contradicts the pattern in the mask of a layer, and how far
  the total may be from the budget.

A pattern whose units reach over several layers overrides `masks` itself, the only method that
`compute_masks` calls, and `why_not`, which checks them. Scores are finite and non-negative.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

# How many densities a search tries: from 1 down to 1/64, each 16 % below the one before.
LEVELS = 25

Shapes = Mapping[str, Sequence[int]]


class Pattern:
    """What all patterns have in common; by itself it removes single weights.

    Attributes:
        form: how such patterns are written, with letters in place of numbers.
        name: as it is written on the command line.
        m: the size of a group, if there are groups; n: how many of it are kept, if that is fixed.
        sparsity: the sparsity that the pattern fixes, or None.
        budgets: what a sparsity can be a fraction of.
        by_row: whether the mask of a row depends on no other row of the layer.
        transposable: whether the pattern holds along the outputs as well as along the inputs.
        structured: whether a block without its pruned units is a smaller block. Both sides of a
            pruned unit are zero, so it has no gradient.
    """

    form: str
    name: str
    n: int
    m: Any = None
    sparsity: float | None = None
    budgets: tuple[str, ...] = ("weights",)
    by_row = False
    transposable = False
    structured = False

    @classmethod
    def parse(cls, name: str) -> "Pattern | None":
        """The pattern of that name, if it is one of this class. Raises PruningError for numbers."""
        raise NotImplementedError

    def keeping(self, n: int) -> str:
        """The name of the same pattern with another n."""
        raise NotImplementedError

    def masks(
        self, model: nn.Module, scores, allocate: Callable, sparsity: float, budget: str
    ) -> dict[str, Tensor]:
        """The masks of a model, by parameter name, in model order.

        Args:
            model: a module, which is not changed.
            scores: the `Scores` of its prunable weights that the pattern fits.
            allocate: from `Scores` and a sparsity to the number of units that each layer keeps.
            sparsity: the fraction of the budget to remove.
            budget: one of `budgets`.

        Raises:
            PruningError: the pattern cannot reach the sparsity.
        """
        total = round(sum(map(prod, scores.shapes.values())) * (1 - sparsity))
        kept = self.fit(allocate(scores, sparsity), scores.most, scores.shapes, total)
        return {name: scores.mask(name, kept[name]) for name in scores}

    def misfit(self, name: str, shape: Sequence[int]) -> str:
        """What the pattern expects of a weight that it does not fit; empty if it fits."""
        return ""

    def units(self, shape: Sequence[int]) -> int:
        """How many units a weight of this shape has."""
        return prod(shape)

    def kept(self, mask: Tensor) -> int:
        """How many units a mask of this pattern keeps."""
        return self.units(mask.shape) * int(mask.count_nonzero()) // mask.numel()

    def score(self, score: Tensor) -> Tensor:
        """The scores of the units, from those of the weights, shape (outputs, inputs)."""
        return score

    def among(self, score: Tensor, left: Tensor) -> Tensor:
        """Scores of weights with which only those in the mask `left` are kept, if they suffice.

        The others score 0. Those that are left score more, however little they matter.
        """
        return score.clamp(min=torch.finfo(score.dtype).tiny).where(left, 0.0)

    def most(self, left: Tensor) -> Tensor:
        """How many units a weight can keep if only the weights in the mask `left` may be kept.

        Returns:
            A tensor of one element on the mask's device.
        """
        return self.score(left.float()).count_nonzero()

    def fit(
        self, kept: dict[str, int], most: Mapping[str, int], shapes: Shapes, budget: int
    ) -> dict[str, int]:
        """How many units each layer keeps if the allocation wants `kept`, `budget` in all.

        most: how many units each layer can keep.
        """
        return kept

    def step(self, shape: Sequence[int]) -> int:
        """The smallest change of the number of units that a weight keeps."""
        return 1

    def levels(self, shape: Sequence[int]) -> list[int]:
        """The numbers of units that a search lets a weight keep, in rising order."""
        step = self.step(shape)
        most = self.units(shape) // step
        steps = {max(round(most * 2 ** (-k / 4)), 1) for k in range(LEVELS)}
        return [step * n for n in sorted(steps | {1})]

    def compared_columns(self, block_size: int) -> int:
        """How many columns to compare at once if units are chosen from left to right."""
        return block_size

    def share(self, kept: int, shape: Sequence[int], start: int, end: int) -> int:
        """How many of the `kept` units of a weight lie in its columns `start` to `end` - 1."""
        return round(kept * end / shape[1]) - round(kept * start / shape[1])

    def mask(self, score: Tensor, kept: int, at_least: Tensor | None = None) -> Tensor:
        """Bool tensor of the weight's shape that keeps `kept` units.

        at_least: `suffix_sums(histogram(score))`, if it is known already.
        """
        raise NotImplementedError

    # ---- checks of masks ----

    def why_not(self, masks: Mapping[str, Tensor], exact: bool = True) -> str:
        """Why the masks of a model contradict this pattern, naming a layer; empty if they do not.

        masks: by parameter name; only those of matrices count.
        exact: as for `flaw`.
        """
        for name, mask in masks.items():
            if mask.dim() == 2 and (flaw := self.flaw(mask, exact)):
                return f"{name}: {flaw}"
        return ""

    def flaw(self, mask: Tensor, exact: bool = True) -> str:
        """Why the mask of a layer contradicts this pattern; empty if it does not.

        exact: False for a mask made of weights that are not zero, of which a kept one may be zero
            by chance.
        """
        return ""

    def slack(self, shapes: Shapes) -> tuple[int, int]:
        """How many weights a model may keep below and above its budget, as units are whole.

        Each layer may round to its nearest unit.
        """
        unit = max(prod(shape) // self.units(shape) for shape in shapes.values())
        return (unit * (len(shapes) // 2 + 1),) * 2


def down(sparsity: float) -> str:
    """A sparsity as text: four digits, rounded down, so that the pattern can reach it."""
    return f"{int(sparsity * 10_000) / 10_000:g}"
