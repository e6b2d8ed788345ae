"""From the scores of one layer to its mask: n of every m.

Scores are finite and non-negative. Among equal scores the earlier weight in row-major order is kept.
"""

import torch
from torch import Tensor

PAIRWISE_UP_TO = 32  # above this group size, sorting the groups is faster than comparing every pair


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
