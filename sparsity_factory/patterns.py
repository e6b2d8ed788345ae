"""From the scores of one layer to its mask: the k largest, or n of every m.

Scores are finite and non-negative. Among equal scores the earlier weight in row-major order is kept, so that a mask
does not depend on the device, the number of threads or the sorting algorithm.

On a CPU the k largest are found by counting instead of sorting. Non-negative floats are ordered as their bit patterns
are, so the leading 16 bits put every score into one of a few thousand occupied bins, and only the bin in which the k-th
largest lies has to be sorted. numpy does the passes over the scores: it asks for large pages, and without them the page
faults of fresh memory take longer than the work itself. A GPU sorts in less time than it would take to copy the scores.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

BINS = 2**15  # the leading 16 bits of a non-negative float; the sign bit is 0
CHUNK = 2**18  # scores looked at together, so that what is computed from them stays in the cache
PAIRWISE_UP_TO = 32  # above this group size, sorting the groups is faster than comparing every pair


def k_largest(score: Tensor, k: int, at_least: Tensor | None = None) -> Tensor:
    """Mask of the shape of `score`, on its device, that keeps the `k` largest.

    Args:
        score: a tensor of any shape, float32 or float64.
        k: from 0 to the number of scores.
        at_least: `suffix_sums(histogram(score))`, where it is known already.
    """
    if score.device.type != "cpu":
        return _k_largest_by_sorting(score.flatten(), k).view(score.shape)
    at_least = suffix_sums(histogram(score)) if at_least is None else at_least
    return _k_largest_by_counting(score.flatten(), k, at_least).view(score.shape)


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask of the shape of `score` that keeps the `n` largest of every `m` consecutive weights of its last dimension.

    Args:
        score: a tensor; `m` divides its last dimension.
        n: from 1 to `m`.
    """
    groups = score.reshape(-1, m)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=score.device)
    if m > PAIRWISE_UP_TO:
        best_first = groups.argsort(dim=1, descending=True, stable=True)
        return mask.scatter_(1, best_first[:, :n], True).view(score.shape)
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


# ---- counting scores by size, which the pruners use too; not exported ----


def histogram(score: Tensor, weight_of: Callable[[np.ndarray], np.ndarray] | None = None) -> Tensor:
    """The number of scores in each bin, or the sum of their weights; shape (BINS,), on the CPU.

    weight_of: from some of the scores, as an array, to their weights; for scores on the CPU only.
    """
    bits, dropped = _LAYOUT[score.dtype]
    flat = score.flatten()
    if score.device.type != "cpu":
        return torch.bincount(flat.view(bits) >> dropped, minlength=BINS).cpu()
    total = 0
    for chunk in flat.split(CHUNK):
        bins = (chunk.view(bits) >> dropped).numpy()
        total = total + np.bincount(bins, weight_of and weight_of(chunk.numpy()), minlength=BINS)
    return torch.from_numpy(total)


def distinct(score: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The distinct scores in bins start to stop - 1, largest first, and how many there are of each; on the CPU."""
    edges = bin_edges(score.dtype)
    low, high = edges[start].item(), edges[stop].item()
    if score.device.type == "cpu":
        flat = score.flatten().numpy()
        inside = torch.from_numpy(flat[(flat >= low) & (flat < high)])
    else:
        inside = score[(score >= low) & (score < high)]
    values, counts = torch.unique(inside.cpu(), return_counts=True)
    return values.flip(0), counts.flip(0)


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


def _k_largest_by_counting(flat: Tensor, k: int, at_least: Tensor) -> Tensor:
    edges, border = bin_edges(flat.dtype), border_bin(at_least, k)
    flat = flat.numpy()
    mask = flat >= edges[border + 1].item()
    undecided = np.flatnonzero((flat >= edges[border].item()) ^ mask)
    best_first = np.argsort(-flat[undecided], kind="stable")
    mask[undecided[best_first[: k - int(at_least[border + 1])]]] = True
    return torch.from_numpy(mask)


def _k_largest_by_sorting(flat: Tensor, k: int) -> Tensor:
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:k]] = True
    return mask
