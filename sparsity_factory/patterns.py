"""From the scores of one layer to its mask: the k largest, or n of every m.

Scores are finite and non-negative. Among equal scores the earlier weight in row-major order is kept, so that a mask
does not depend on the device, the number of threads or the sorting algorithm.

The k largest are found by counting instead of sorting. Non-negative floats are ordered as their bit patterns are, so
the leading 16 bits put every score into one of a few thousand occupied bins, and only the bin in which the k-th largest
lies has to be sorted.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BINS = 2**15  # the leading 16 bits of a non-negative float; the sign bit is 0
CHUNK = 2**20  # scores looked at together, so that what is computed from them stays in the cache
PAIRWISE_UP_TO = 32  # above this group size, sorting the groups is faster than comparing every pair


def k_largest(score: Tensor, k: int) -> Tensor:
    """Mask of the shape of `score` that keeps the `k` largest.

    Args:
        score: a tensor of any shape, float32 or float64, on the CPU.
        k: from 0 to the number of scores.
    """
    flat, edges = score.flatten(), bin_edges(score.dtype)
    border = border_bin(suffix_sums(histogram(flat)), k)
    mask = flat >= edges[border + 1]
    undecided = torch.nonzero((flat >= edges[border]) & ~mask).squeeze(1)
    best_first = flat[undecided].argsort(descending=True, stable=True)
    mask[undecided[best_first[: k - int(mask.count_nonzero())]]] = True
    return mask.view(score.shape)


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask of the shape of `score` that keeps the `n` largest of every `m` consecutive weights of its last dimension.

    Args:
        score: a tensor on the CPU; `m` divides its last dimension.
        n: from 1 to `m`.
    """
    groups = score.reshape(-1, m)
    mask = torch.zeros(groups.shape, dtype=torch.bool)
    if m > PAIRWISE_UP_TO:
        best_first = groups.argsort(dim=1, descending=True, stable=True)
        return mask.scatter_(1, best_first[:, :n], True).view(score.shape)
    # The rank of a weight is the number of weights that go before it in its group: to begin with, all earlier ones.
    ranks = [torch.full((len(groups),), place, dtype=torch.uint8) for place in range(m)]
    for later in range(m):
        for earlier in range(later):
            overtakes = (groups[:, later] > groups[:, earlier]).view(torch.uint8)  # on a tie the earlier stays ahead
            ranks[earlier] += overtakes
            ranks[later] -= overtakes
    for place, rank in enumerate(ranks):
        mask[:, place] = rank < n
    return mask.view(score.shape)


# ---- counting scores by size, which the pruners use too; not exported ----


def histogram(score: Tensor, weight_of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The number of scores in each bin, or the sum of their weights; shape (BINS,)."""
    bits, dropped = _LAYOUT[score.dtype]
    total = 0
    for chunk in score.flatten().split(CHUNK):
        total += torch.bincount(chunk.view(bits) >> dropped, weight_of and weight_of(chunk), minlength=BINS)
    return total


def bin_edges(dtype: torch.dtype) -> Tensor:
    """The smallest score of each bin, shape (BINS + 1,); infinity for the bins past every finite score."""
    bits, dropped = _LAYOUT[dtype]
    edges = (torch.arange(BINS + 1, dtype=bits).clamp(max=BINS - 1) << dropped).view(dtype)
    return edges.nan_to_num(nan=torch.inf, posinf=torch.inf)


def suffix_sums(values: Tensor) -> Tensor:
    """For each bin the sum over it and all higher bins, and a final 0; shape (BINS + 1,)."""
    return torch.cat([values, values.new_zeros(1)]).flip(0).cumsum(0).flip(0)


def border_bin(at_least: Tensor, k: int) -> int:
    """The bin of the k-th largest score: those in higher bins are fewer than k, those in it complete them."""
    return int((at_least[:BINS] >= k).count_nonzero()) - 1


_LAYOUT = {torch.float32: (torch.int32, 16), torch.float64: (torch.int64, 48)}  # same-size integer, bits to drop
