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

from .errors import PruningError

BLOCK = 192  # weights, as the paper has it for vision transformers
DAMPING = 1e-8  # added to the diagonal, as the paper has it
# Added too, as a share of the mean of the diagonal: a sum in float32 errs by as much, and a matrix
# of less than full rank could not be factored. It is less than DAMPING where the mean is below
# 0.001; the gradients of trained models give means far below that.
RELATIVE_DAMPING = 1e-5
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


def halves(count: int) -> tuple[int, int]:
    """The shape that the lower halves of the blocks' symmetric matrices have, row after row."""
    blocks, size = blocks_of(count)
    return blocks, size * (size + 1) // 2


@torch.no_grad()
def add_squares(total: Tensor, gradients: Tensor) -> None:
    """Adds g g^T for the gradients g of some images, shape (images, outputs, inputs).

    Args:
        total: of the shape `halves`.
    """
    by_block = cut(gradients.to(total.dtype)).transpose(0, 1)  # (blocks, images, size)
    step = _together(total)
    lower = _lower(by_block.shape[2], total.device)
    for part, g in zip(total.split(step), by_block.split(step), strict=True):
        part += (g.mT @ g).flatten(1)[:, lower]


@torch.no_grad()
def removal_costs(weight: Tensor, squares: Tensor, images: int) -> Tensor:
    """For each weight, the sum of costs in its block up to and including its own removal.

    Of equal costs the later weight is removed first.

    Args:
        weight: of shape (outputs, inputs).
        squares: for each block the sum over images of g g^T, g the gradient of an image's own loss:
            the lower halves, shape `halves`, on the weight's device.
        images: their number.

    Returns:
        A float64 tensor of the weight's shape; finite where the arguments are.
    """
    step = _together(weight)
    chunks = zip(cut(weight.double()).split(step), squares.split(step), strict=True)
    costs = [_eliminate(weights, _whole(part, weights) / images) for weights, part in chunks]
    return torch.cat(costs).flatten()[: weight.numel()].view(weight.shape)


# ---- helpers, not exported ----


def _together(tensor: Tensor) -> int:
    """How many blocks are handled together on the device of a tensor."""
    return ON_CPU if tensor.device.type == "cpu" else ON_GPU


def _lower(size: int, device: torch.device) -> Tensor:
    """Where the elements of the lower half are in a matrix, row after row."""
    rows, columns = torch.tril_indices(size, size, device=device)
    return rows * size + columns


def _whole(half: Tensor, weights: Tensor) -> Tensor:
    """The symmetric matrices (blocks, size, size) of some blocks of weights, float64."""
    blocks, size = weights.shape
    whole = weights.new_zeros(blocks, size * size)
    whole[:, _lower(size, half.device)] = half.double()
    whole = whole.unflatten(1, (size, size))
    return whole + whole.tril(-1).mT


def _eliminate(weights: Tensor, fisher: Tensor) -> Tensor:
    """The costs of the weights of some blocks, shape (blocks, size).

    After some removals, F^-1 is F^-1 - U^T U with a row of U for each removed weight: rows of a
    Cholesky factor whose pivots are the removed weights. So a step computes only the row of F^-1
    that it needs, and its diagonal.
    """
    # `min` finds the first of equal costs; flipped, that is the later weight
    weights = weights.flip(1)
    fisher = fisher.flip(1, 2)

    diagonal, lower = _factored(fisher)
    inverse = torch.cholesky_inverse(lower)
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


def _factored(fisher: Tensor) -> tuple[Tensor, Tensor]:
    """The damped diagonals of matrices, and the Cholesky factors of the damped matrices.

    The damping of a matrix that cannot be factored is raised tenfold.
    """
    diagonal = fisher.diagonal(dim1=1, dim2=2)
    damping = DAMPING + RELATIVE_DAMPING * diagonal.mean(1, keepdim=True)
    while damping.isfinite().all():
        damped = diagonal + damping
        lower, failed = torch.linalg.cholesky_ex(fisher.diagonal_scatter(damped, dim1=1, dim2=2))
        if not failed.any():
            return damped, lower
        damping = torch.where(failed[:, None] > 0, 10 * damping, damping)
    raise PruningError("expected finite gradients of the calibration images")
