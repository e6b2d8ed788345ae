"""Patterns: which weights are removed together, and the mask of a layer from its scores.

To add one, write a subclass of `Pattern` in `pattern_base.py` and name it in `PATTERNS`. Among
equal scores the earlier weight or block in row-major order is kept.
"""

import re
from functools import cache
from itertools import combinations, product
from math import prod

import numpy as np
import torch
from torch import Tensor

from .errors import PruningError, short
from .k_largest import k_largest
from .knapsack import nearest_steps
from .method import method
from .pattern_base import Pattern, down
from .unit_patterns import Heads, HeadsAndNeurons, Neurons

# Above this group size, partitioning the groups is faster than comparing every pair.
PAIRWISE_UP_TO = 32
# The largest group size of n:mt, which tries all masks of a block: 90 for 2:4t, but a hundred
# million for a group size of 8.
MOST_TRANSPOSABLE = 4
# For so many blocks, the sums of scores under all masks take 50 MB.
BLOCKS_AT_ONCE = 2**16


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

    by_row = True

    def __init__(self, name: str, m: int | None):
        self.name = name
        self.m = m

    def misfit(self, name, shape):
        outputs, inputs = shape
        if not self.m or not inputs % self.m:
            return ""
        return f"a group size that divides the {inputs} inputs of {name} ({outputs} x {inputs})"

    def most(self, left):
        m = self.m or left.shape[1]
        fewest = left.reshape(-1, m).sum(1).min()
        return fewest * left.numel() // m

    def fit(self, kept, most, shapes, budget):
        """Makes the n of each layer whole, and uses as much of the budget as that allows.

        The result is the one nearest to what the allocation wants. Layers that it wants dense stay
        dense if the budget allows that. Numbers that are whole and within the budget already stay
        as they are.
        """
        m = {name: self.m or shape[1] for name, shape in shapes.items()}
        groups = {name: prod(shape) // m[name] for name, shape in shapes.items()}

        least = sum(groups.values())
        if least > budget:
            most = 1 - least / sum(map(prod, shapes.values()))
            group = f"every {self.m} weights" if self.m else "each row"
            raise PruningError(
                f"pattern {self.name} keeps at least one of {group}: "
                f"expected a sparsity of at most {down(most)}"
            )

        whole = all(kept[name] and kept[name] % groups[name] == 0 for name in kept)
        if whole and sum(kept.values()) <= budget:
            return kept

        largest_n = {name: max(most[name] // groups[name], 1) for name in groups}
        wanted, step, largest = (np.array(list(of.values())) for of in (kept, groups, largest_n))
        n_of_layers = nearest_steps(wanted, step, largest, budget)
        return {name: int(n) * groups[name] for name, n in zip(kept, n_of_layers, strict=True)}

    def step(self, shape):
        return prod(shape) // (self.m or shape[1])

    def compared_columns(self, block_size):
        return self.m or block_size

    def share(self, kept, shape, start, end):
        # Each row keeps the same share
        return shape[0] * super().share(kept // shape[0], shape, start, end)

    def mask(self, score, kept, at_least=None):
        m = self.m or score.shape[1]
        return n_of_m(score, kept * m // score.numel(), m)

    def flaw(self, mask, exact=True):
        m = self.m or mask.shape[1]
        if mask.shape[1] % m:
            return "" if mask.all() else f"its {mask.shape[1]} inputs are not groups of {m}"
        return self._flaw(mask.reshape(-1, m).sum(1), m, exact)

    def _flaw(self, kept: Tensor, m: int, exact: bool) -> str:
        """The same, from how many weights each group keeps."""
        least, most = int(kept.min()), int(kept.max())
        if least == most > 0 or self.m and not exact and most < m:
            return ""
        group = f"groups of {m}" if self.m else "rows"
        return f"its {group} keep {least} to {most} weights, expected one number, at least 1"

    def slack(self, shapes):
        # `fit` spends what it can, its totals rounded by some thousandths at most
        total = sum(map(prod, shapes.values()))
        return max(map(self.step, shapes.values())) + total // 100, 1


@method("Sun et al. 2024, arXiv:2306.11695")
class Row(_Groups):
    """Each output row of a layer keeps the same number of weights, at least one (Wanda)."""

    form = "row"

    @classmethod
    def parse(cls, name: str) -> "Row | None":
        return cls(name, None) if name == cls.form else None


@method("Mishra et al. 2021, arXiv:2104.08378")
class NOfM(_Groups):
    """n of every m consecutive weights along the inputs, such as 2:4; takes no sparsity."""

    form = "n:m"
    suffix = ""

    def __init__(self, name: str, n: int, m: int):
        super().__init__(name, m)
        self.n = n
        self.sparsity = 1 - n / m

    @classmethod
    def parse(cls, name: str) -> "NOfM | None":
        if written := re.fullmatch(rf"([0-9]{{1,9}}):([0-9]{{1,9}}){cls.suffix}", name):
            n, m = map(int, written.groups())
            if not 1 <= n <= m:
                raise PruningError(f"pattern {name!r}: expected {cls.form} with 1 <= n <= m")
            return cls(name, n, m)
        return None

    def keeping(self, n: int) -> str:
        return f"{n}:{self.m}{self.suffix}"

    def fit(self, kept, most, shapes, budget):
        return {name: prod(shape) // self.m * self.n for name, shape in shapes.items()}

    def _flaw(self, kept, m, exact):
        if exact:
            return f"a group of {m} does not keep {self.n}" if (kept != self.n).any() else ""
        return f"a group of {m} keeps more than {self.n}" if (kept > self.n).any() else ""


@method("Hubara et al. 2021, arXiv:2102.08124")
class Transposable(NOfM):
    """n of every m along inputs and outputs, such as 2:4t: n:m in the backward pass as well."""

    form = "n:mt"
    suffix = "t"
    by_row = False
    transposable = True

    def __init__(self, name: str, n: int, m: int):
        super().__init__(name, n, m)
        if m > MOST_TRANSPOSABLE:
            raise PruningError(
                f"pattern {name!r}: expected n:mt with m of at most {MOST_TRANSPOSABLE}"
            )

    def misfit(self, name, shape):
        outputs, inputs = shape
        if not outputs % self.m and not inputs % self.m:
            return ""
        return f"blocks of {self.m} x {self.m} that divide {name} ({outputs} x {inputs})"

    def among(self, score, left):
        # The best mask of a block is the one of the largest sum: a single weight that may not be
        # kept has to outweigh all others
        return score.where(left, -1 - score.amax() * self.m**2)

    def mask(self, score, kept, at_least=None):
        return transposable_n_of_m(score, kept * self.m // score.numel(), self.m)

    def flaw(self, mask, exact=True):
        if self.misfit("", mask.shape) and mask.all():
            return ""
        return super().flaw(mask, exact) or super().flaw(mask.T, exact)


@method("Sun et al. 2021, DominoSearch (NeurIPS)")
class AnyOfM(_Groups):
    """n of every m, such as x:4; the allocation decides the n of each layer, 1 to m."""

    form = "x:m"

    @classmethod
    def parse(cls, name: str) -> "AnyOfM | None":
        if written := re.fullmatch(r"x:([0-9]{1,9})", name):
            if not int(written[1]):
                raise PruningError(f"pattern {name!r}: expected x:m with m of at least 1")
            return cls(name, int(written[1]))
        return None


@method("Gray et al. 2017, block-sparse kernels")
class Block(Pattern):
    """Blocks of R outputs by C inputs, such as block:16x16; a block's score is its weights' sum."""

    form = "block:RxC"

    def __init__(self, name: str, rows: int, columns: int):
        self.name = name
        self.rows = rows
        self.columns = columns

    @classmethod
    def parse(cls, name: str) -> "Block | None":
        if written := re.fullmatch(r"block:([0-9]{1,9})x([0-9]{1,9})", name):
            rows, columns = map(int, written.groups())
            if not rows or not columns:
                raise PruningError(
                    f"pattern {name!r}: expected block:RxC with R and C of at least 1"
                )
            return cls(name, rows, columns)
        return None

    def misfit(self, name, shape):
        outputs, inputs = shape
        if not outputs % self.rows and not inputs % self.columns:
            return ""
        return f"blocks that divide {name} ({outputs} x {inputs})"

    def units(self, shape):
        return prod(shape) // (self.rows * self.columns)

    def score(self, score):
        blocks = score.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        # In float64, so that the order of the sum, which differs between devices, does not matter
        return blocks.sum((1, 3), dtype=torch.float64).to(score.dtype)

    def compared_columns(self, block_size):
        return max(block_size // self.columns, 1) * self.columns

    def mask(self, score, kept, at_least=None):
        mask = k_largest(score, kept, at_least)
        return mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def flaw(self, mask, exact=True):
        rows, columns = mask.shape
        if rows % self.rows or columns % self.columns:
            return "" if mask.all() else f"{rows} x {columns} has no whole blocks"
        blocks = mask.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        parts = blocks.any(3).any(1) & ~blocks.all(3).all(1)
        return f"{int(parts.sum())} of its blocks are pruned in part" if parts.any() else ""


PATTERNS: dict[str, type[Pattern]] = {
    pattern.form: pattern
    for pattern in (
        Unstructured,
        Row,
        NOfM,
        Transposable,
        AnyOfM,
        Block,
        Heads,
        Neurons,
        HeadsAndNeurons,
    )
}


def parse_pattern(name: str) -> Pattern:
    """The pattern of that name: a form in `PATTERNS` with numbers in place of n, m, R and C.

    Raises:
        PruningError: no form fits, or its numbers are out of range.
    """
    if isinstance(name, str):
        for pattern in PATTERNS.values():
            if found := pattern.parse(name):
                return found
    raise PruningError(
        f"unknown pattern {short(name)}: expected unstructured, row, n:m such as 2:4, n:mt such as "
        "2:4t, x:m such as x:4, block:RxC such as block:16x16, heads, neurons or heads+neurons"
    )


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps the `n` largest of every `m` consecutive scores of the last dimension.

    Args:
        score: a tensor; `m` divides its last dimension.
        n: from 0 to `m`.

    Returns:
        A bool tensor of the shape of `score`, on its device.
    """
    if n == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    groups = score.reshape(-1, m)
    if m > PAIRWISE_UP_TO:
        return _n_of_large_groups(groups, n).view(score.shape)

    # The rank of a weight is how many weights of its group come before it, shape (m, groups). At
    # first each weight ranks at its place.
    columns = groups.T
    ranks = torch.empty(columns.shape, dtype=torch.uint8, device=score.device)
    ranks[:] = torch.arange(m, dtype=torch.uint8, device=score.device)[:, None]

    # Compare all pairs that are as far apart; on a tie the earlier weight stays ahead
    overtakes = torch.empty_like(ranks[1:], dtype=torch.bool)
    for apart in range(1, m):
        later = overtakes[apart - 1 :]
        torch.gt(columns[apart:], columns[:-apart], out=later)
        ranks[:-apart] += later.view(torch.uint8)
        ranks[apart:] -= later.view(torch.uint8)

    mask = torch.empty(groups.shape, dtype=torch.bool, device=score.device)
    torch.lt(ranks, n, out=mask.T)
    return mask.view(score.shape)


def transposable_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps n of every m consecutive weights of each row and of each column.

    Each m x m block gets the mask under which the sum of its scores is largest, of all possible
    masks. On a tie it gets the mask whose first row keeps earlier weights, then the one whose
    second row does, and so on.

    Args:
        score: shape (outputs, inputs); `m` divides both.
        n: from 0 to `m`, which is small.
    """
    masks = torch.from_numpy(_transposable_masks(n, m)).to(score.device, non_blocking=True)
    blocks = score.unflatten(0, (-1, m)).unflatten(2, (-1, m)).transpose(1, 2)

    # In float64 the sums of float32 scores are exact in any order, unless the scores are extreme
    parts = blocks.reshape(-1, m * m).split(BLOCKS_AT_ONCE)
    best = torch.cat([(part.double() @ masks.T.double()).argmax(1) for part in parts])
    return masks[best].view(blocks.shape).transpose(1, 2).reshape(score.shape)


def regrow(
    weight: Tensor, mask: Tensor, growth: Tensor, count: int, kept: int | None = None
) -> Tensor:
    """Drops the smallest kept weights, and grows as many of those that are then not kept.

    A weight that was dropped may grow again. Among equals the earlier weight in row-major order is
    kept, and grown.

    Args:
        weight: the `count` smallest magnitudes that the mask keeps are dropped.
        mask: bool tensor of the weight's shape, True where the weight is kept.
        growth: of the weight's shape, finite and non-negative: the `count` largest are grown.
        count: from 0 to the number of weights that the mask keeps.
        kept: that number, if it is known already.

    Returns:
        A mask that keeps as many weights as the given one.

    Raises:
        PruningError: the count is out of range.
    """
    kept = int(mask.count_nonzero()) if kept is None else kept
    if not 0 <= count <= kept:
        raise PruningError(
            f"{count} weights to drop and grow: expected 0 to the {kept} that are kept"
        )

    left = k_largest(_positive_where(mask, weight.detach().abs()), kept - count)
    return left | k_largest(_positive_where(~left, growth), count)


# ---- helpers, not exported ----


def _positive_where(mask: Tensor, values: Tensor) -> Tensor:
    """The values above 0 in the same order where the mask is True; 0 elsewhere."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.nextafter(values.new_full((), torch.inf)).masked_fill(~mask, 0)


@cache
def _transposable_masks(n: int, m: int) -> np.ndarray:
    """All m x m masks that keep n of each row and column, shape (masks, m * m), in tie order."""
    rows = [[place in kept for place in range(m)] for kept in combinations(range(m), n)]
    blocks = np.array(list(product(rows, repeat=m)))
    return blocks[(blocks.sum(1) == n).all(1)].reshape(-1, m * m)


def _n_of_large_groups(groups: Tensor, n: int) -> Tensor:
    """The mask of groups, shape (groups, m), by sorting on a GPU and by partitioning on a CPU."""
    if groups.device.type != "cpu":
        best_first = groups.argsort(dim=1, descending=True, stable=True)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best_first[:, :n], True)

    groups = groups.numpy()
    last_kept = np.partition(groups, -n, axis=1)[:, -n, None]
    mask = groups > last_kept

    # Of the scores that equal the last one kept, the earlier ones are kept
    ties = groups == last_kept
    missing = n - mask.sum(1, keepdims=True)
    mask |= ties & (ties.cumsum(1, dtype=np.int32) <= missing)
    return torch.from_numpy(mask)
