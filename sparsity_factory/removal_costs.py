"""What removing weights one after the other costs, the others making up for it: the eliminations of
CAP.

Kuznedelev et al. 2023, arXiv:2210.09223. The weights of a layer, row after row, are cut into blocks
of 192, and the empirical Fisher matrix of each block stands for the Hessian of the loss in it. In a
block the weight q of least cost w_q^2 / (2 [F^-1]_qq) goes first; the others move by -w_q /
[F^-1]_qq F^-1[:, q], which changes the loss least, and F^-1 becomes the inverse of the matrix
without q; and so on until all are gone.
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
# Blocks eliminated together: few enough for a cache of a CPU; many, with 0.9 MB each, for a GPU to
# be busy.
ON_CPU, ON_GPU = 32, 2048


def blocks_of(count: int) -> tuple[int, int]:
    """Into how many blocks so many weights are cut, and the size of a block."""
    size = min(BLOCK, count)
    return math.ceil(count / size), size


def cut(values: Tensor) -> Tensor:
    """Values of all weights of a layer, (..., outputs, inputs), by block: (..., blocks, size);
    zeros fill the last.
    """
    values = values.flatten(-2)
    count = values.shape[-1]
    blocks, size = blocks_of(count)
    return F.pad(values, (0, blocks * size - count)).unflatten(-1, (blocks, size))


@torch.no_grad()
def removal_costs(weight: Tensor, fisher: Tensor) -> Tensor:
    """The sum of the costs in the weight's block up to and including its own removal.

    Of equal costs the later weight goes first.

    Args:
        weight: of shape (outputs, inputs).
        fisher: for each block the mean over images of g g^T, g the gradient of an image's own loss;
            shape (blocks, size, size), float64, on the weight's device.

    Returns:
        A float64 tensor of the weight's shape; finite where the arguments are.
    """
    step = ON_CPU if weight.device.type == "cpu" else ON_GPU
    costs = [
        _eliminate(*chunk)
        for chunk in zip(cut(weight.double()).split(step), fisher.split(step), strict=True)
    ]
    return torch.cat(costs).flatten()[: weight.numel()].view(weight.shape)


# ---- helpers, not exported ----


def _eliminate(weights: Tensor, fisher: Tensor) -> Tensor:
    """The costs of the weights of some blocks, (blocks, size).

    What is left of F^-1 after some removals is F^-1 - U^T U, with a row of U for each: the rows of
    a Cholesky factor whose pivots are the removed weights. So a step computes the one row of it
    that it needs, and its diagonal.
    """
    # Of equals the first is found: the later weight
    weights, fisher = weights.flip(1), fisher.flip(1, 2)
    diagonal = fisher.diagonal(dim1=1, dim2=2)
    diagonal += DAMPING + RELATIVE_DAMPING * diagonal.mean(1, keepdim=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
    variance = inverse.diagonal(dim1=1, dim2=2).clone()
    least = 1 / diagonal  # of a variance, whatever is removed; rounding may go below
    rows = torch.zeros_like(inverse)
    costs = torch.empty_like(weights)
    total = 0
    for step in range(weights.shape[1]):
        cost, q = (weights.square() / variance).min(1, keepdim=True)
        total = total + cost / 2
        costs.scatter_(1, q, total)
        done, column = rows[:, :step], q[:, None].expand(-1, step, 1)
        row = inverse.gather(1, q[..., None].expand(-1, 1, inverse.shape[2]))
        row = (
            torch.baddbmm(row, done.gather(2, column).mT, done, alpha=-1).squeeze(1)
            / variance.gather(1, q).sqrt()
        )
        rows[:, step] = row
        weights = weights - weights.gather(1, q) / variance.gather(1, q).sqrt() * row
        weights.scatter_(1, q, torch.inf)  # never the least again
        variance = (variance - row.square()).maximum(least)
    return costs.flip(1)
