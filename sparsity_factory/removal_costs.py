"""The costs of removing weights one after the other while the others compensate, as in CAP.

Kuznedelev et al. 2023, arXiv:2210.09223. The weights w of a layer, row after row, are cut into
blocks of 192. In each block the empirical Fisher matrix F stands for the Hessian of the loss. The
weight q of least cost w_q^2 / (2 [F^-1]_qq) is removed first. The others move by
-w_q / [F^-1]_qq F^-1[:, q], which changes the loss least, and F^-1 becomes the inverse of F without
q. This repeats until all weights are removed.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 192  # weights, as the paper has it for vision transformers
DAMPING = 1e-8  # added to the diagonal, as the paper has it
# Added too, as a share of the mean of the diagonal, so that float64 can factor a matrix of any
# scale and rank. It is less than DAMPING where the mean is below 100; the gradients of trained
# models give means far below 1.
RELATIVE_DAMPING = 1e-10
# Blocks (0.9 MB each) eliminated together: few that fit a CPU's cache, many that keep a GPU busy
ON_CPU, ON_GPU = 32, 2048


def blocks_of(count: int) -> tuple[int, int]:
    """The number and the size of the blocks into which a number of weights is cut."""
    size = min(BLOCK, count)
    return math.ceil(count / size), size


def cut(values: Tensor) -> Tensor:
    """Values of a layer's weights (..., outputs, inputs) by block (..., blocks, size).

    Zeros fill the last block.
    """
    values = values.flatten(-2)
    count = values.shape[-1]
    blocks, size = blocks_of(count)
    return F.pad(values, (0, blocks * size - count)).unflatten(-1, (blocks, size))


@torch.no_grad()
def removal_costs(weight: Tensor, fisher: Tensor) -> Tensor:
    """For each weight, the sum of costs in its block up to and including its own removal.

    Of equal costs the later weight is removed first.

    Args:
        weight: of shape (outputs, inputs).
        fisher: for each block the mean over images of g g^T, g the gradient of an image's own loss;
            shape (blocks, size, size), float64, on the weight's device.

    Returns:
        A float64 tensor of the weight's shape; finite where the arguments are.
    """
    step = ON_CPU if weight.device.type == "cpu" else ON_GPU
    chunks = zip(cut(weight.double()).split(step), fisher.split(step), strict=True)
    costs = [_eliminate(weights, matrices) for weights, matrices in chunks]
    return torch.cat(costs).flatten()[: weight.numel()].view(weight.shape)


# ---- helpers, not exported ----


def _eliminate(weights: Tensor, fisher: Tensor) -> Tensor:
    """The costs of the weights of some blocks, shape (blocks, size).

    After some removals, F^-1 is F^-1 - U^T U with a row of U for each removed weight: rows of a
    Cholesky factor whose pivots are the removed weights. So a step computes only the row of F^-1
    that it needs, and its diagonal.
    """
    # `min` finds the first of equal costs; flipped, that is the later weight
    weights = weights.flip(1)
    fisher = fisher.flip(1, 2)

    diagonal = fisher.diagonal(dim1=1, dim2=2)
    diagonal += DAMPING + RELATIVE_DAMPING * diagonal.mean(1, keepdim=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
    variance = inverse.diagonal(dim1=1, dim2=2).clone()  # [F^-1]_qq of each weight q
    least = 1 / diagonal  # no removal brings a variance below this, but rounding may
    rows = torch.zeros_like(inverse)  # U
    costs = torch.empty_like(weights)
    total = 0

    for step in range(weights.shape[1]):
        cost, q = (weights.square() / variance).min(1, keepdim=True)
        total = total + cost / 2
        costs.scatter_(1, q, total)

        # The next row of U: row q of F^-1 after the removals so far, over the root of [F^-1]_qq
        done = rows[:, :step]
        at_q = done.gather(2, q[:, None].expand(-1, step, 1))
        deviation = variance.gather(1, q).sqrt()
        row = inverse.gather(1, q[..., None].expand(-1, 1, inverse.shape[2]))
        row = torch.baddbmm(row, at_q.mT, done, alpha=-1).squeeze(1) / deviation
        rows[:, step] = row

        # The others compensate; infinite weights are never the least again
        weights = weights - weights.gather(1, q) / deviation * row
        weights.scatter_(1, q, torch.inf)
        variance = (variance - row.square()).maximum(least)

    return costs.flip(1)
