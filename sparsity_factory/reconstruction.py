"""Reconstruction: at the moment of pruning, the kept weights of a layer make up for the pruned
ones.

A reconstruction is a function

    def reconstruction(weight: Tensor, inputs: Inputs, mask: Tensor, pattern: Pattern) ->
    tuple[Tensor, Tensor]

from a weight of shape (outputs, inputs), the sums over its layer's inputs, the mask that score and
allocation have chosen, and its pattern, to the new weight, zero where it is pruned, and its mask,
which keeps as many weights. Without a pattern, the mask stays. To add one, write such a function
and name it in `RECONSTRUCTIONS`.
"""

import copy
import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .errors import PruningError
from .layer_walk import Inputs
from .method import describe, method
from .patterns import Pattern, Unstructured, parse_pattern

log = logging.getLogger(__name__)

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, as SparseGPT has it
MOST_DAMPING = 1e3  # with so much, the matrix is a diagonal one
# In which least-squares prunes, with so many steps of conjugate gradients after each
ROUNDS = 8
# After 20 the error was that of the exact solution to four digits
STEPS, LAST_STEPS = 5, 20
TINY = 1e-30
NONE = "none"
# What those need that look at the model before pruning as well
DENSE_INPUTS = "dense_inputs"


def obs_prune(
    weight: Tensor,
    gram: Tensor,
    kept: int | tuple[int, int] | Tensor,
    *,
    damping: float = DAMPING,
    block_size: int = 128,
    pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor]:
    """Prunes a weight by Optimal Brain Surgeon, columns from left to right, the kept ones making up
    for the pruned.

    With H the Gram matrix, to whose diagonal `damping` times its mean is added, and U the upper
    Cholesky factor of H^-1, the error of each pruned weight, w / U_jj, is spread over the columns
    to its right by row j of U. What goes is what costs least, w^2 / U_jj^2, of the weights as
    updated so far.

    Frantar and Alistarh 2023, arXiv:2301.00774 (SparseGPT).

    Args:
        weight: shape (outputs, inputs); it is not changed.
        gram: X^T X of the layer's inputs X (tokens, inputs), shape (inputs, inputs); a factor
            changes nothing. The work is done in its dtype. Weights of an input that is always zero
            become zero.
        kept: how many units of the pattern stay: each block of columns keeps its share, and the
            total is exact. Or (n, m): n of every m, chosen when their group is reached. Or a bool
            mask of the weight's shape, which stays.
        damping: raised tenfold, with a line in the log, until the matrix can be factored.
        block_size: columns among which weights compare.
        pattern: what is removed together, where `kept` is a number; single weights by default.

    Returns:
        The new weight in the dtype of the given one, zero where it is pruned; and the mask.

    Raises:
        PruningError: a weight or Gram matrix that is not finite, or a number, group or mask that
            does not fit; damping or block size out of range.
    """
    outputs, inputs = weight.shape
    if isinstance(kept, tuple):
        pattern = parse_pattern("{}:{}".format(*kept))
        kept = pattern.units(weight.shape) * pattern.n // pattern.m
    pattern = pattern or Unstructured()
    _check(weight, gram, kept, pattern)
    if not 0 <= damping < math.inf or block_size < 1:
        raise PruningError(
            f"damping {damping:g}, block size {block_size}: expected at least 0 and at least 1"
        )
    width = pattern.compared_columns(block_size)  # a group in which units compare
    block_size = max(block_size // width, 1) * width
    _, factor = _damped(gram, damping)
    diagonal = factor.diagonal()
    # A column of the weight is a row here, so that it lies together
    columns = weight.detach().to(gram.dtype).T.clone()
    columns[gram.diagonal() == 0] = 0
    mask = (
        torch.empty_like(columns, dtype=torch.bool)
        if isinstance(kept, int)
        else kept.T.contiguous()
    )
    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        errors = torch.empty_like(columns[start:end])
        for column in range(start, end):
            if isinstance(kept, int) and (column - start) % width == 0:
                group = slice(column, min(column + width, end))
                score = pattern.score((columns[group] / diagonal[group, None]).square_().T)
                mask[group] = pattern.mask(
                    score, pattern.share(kept, weight.shape, group.start, group.stop)
                ).T
            torch.mul(columns[column], ~mask[column], out=errors[column - start]).div_(
                diagonal[column]
            )
            columns[column + 1 : end].addr_(
                factor[column, column + 1 : end], errors[column - start], alpha=-1
            )
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    columns *= mask
    return columns.T.to(weight.dtype).contiguous(), mask.T.contiguous()


def few_columns(weight: Tensor) -> int:
    """Columns that compare at once: on small layers, choosing late was measured to be better."""
    return max(weight.shape[1] // 32, 8)


@method()
def none(
    weight: Tensor, inputs: Inputs, mask: Tensor, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """Kept weights stay as they are."""
    return weight * mask, mask


@method("Frantar and Alistarh 2023, arXiv:2301.00774", needs={"gram"})
def obs(
    weight: Tensor, inputs: Inputs, mask: Tensor, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon chooses which weights of a layer go, as many as the mask prunes, and
    updates the others.
    """
    return obs_prune(
        weight,
        inputs.gram,
        _kept(mask, pattern) if pattern else mask,
        pattern=pattern,
        block_size=few_columns(weight),
    )


@method("Frantar and Alistarh 2023, arXiv:2301.00774", needs={"gram"})
def obs_mask(
    weight: Tensor, inputs: Inputs, mask: Tensor, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon only updates the kept weights; score and pruner have chosen which those
    are.
    """
    return obs_prune(weight, inputs.gram, mask)


@method("Boža 2024, arXiv:2401.02938; this project", needs={"gram", DENSE_INPUTS})
def least_squares(
    weight: Tensor, inputs: Inputs, mask: Tensor, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """Prunes in rounds by what a weight costs; after each, the kept ones are those whose outputs
    are next to the dense.

    With X the layer's inputs and Y those that it has in the dense model, the kept weights w' of
    each row are the least squares of X w' - Y w, damped by w' - w. A weight costs w'^2 (H_jj /
    [H^-1]_jj)^0.5, H being the damped X^T X: the geometric mean of what its removal costs alone,
    and of what it costs if the others make up for it.
    """
    if pattern is None:
        return least_squares_mask(weight, inputs, mask)
    units, last = pattern.units(weight.shape), _kept(mask, pattern)
    problem = _LeastSquares(weight, inputs)
    new = problem.solve(weight, torch.ones_like(mask), STEPS)
    mask = torch.ones_like(mask)
    for round_ in range(1, ROUNDS + 1):
        kept = last + round((units - last) * (1 - round_ / ROUNDS) ** 3)
        mask = pattern.mask(pattern.score(problem.costs(new) * mask), kept)
        new = problem.solve(new, mask, STEPS if round_ < ROUNDS else LAST_STEPS)
    return new.to(weight.dtype), mask


@method("Boža 2024, arXiv:2401.02938; this project", needs={"gram", DENSE_INPUTS})
def least_squares_mask(
    weight: Tensor, inputs: Inputs, mask: Tensor, pattern: Pattern | None = None
) -> tuple[Tensor, Tensor]:
    """As least-squares, with the mask that score and pruner have chosen."""
    return _LeastSquares(weight, inputs).solve(weight, mask, LAST_STEPS).to(weight.dtype), mask


def reconstruct_layers(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    method: str,
    walk: Callable,
    *,
    patterns: Callable[[str], Pattern | None],
    share: Callable = lambda compute: compute(),
) -> dict[str, Tensor]:
    """Prunes the weights of a model by masks, layer after layer, and lets the kept ones make up for
    it.

    Each layer is given the inputs that it has when all before it are pruned. Where it has a bias,
    the Gram matrix is that of the inputs less their mean, and the mean of what the outputs have
    lost goes to the bias: the least squares over weights and bias together.

    Args:
        model: changed in place.
        masks: of weights and biases, on their devices; those of other parameters are left to the
            caller.
        method: a name in `RECONSTRUCTIONS`.
        walk: `walk(visit, beside)` calls `visit(name, inputs)` for each prunable weight, as
        `visit_layers` does.
        patterns: from the name of a weight to the pattern by which its mask may be chosen anew;
        None where it stays.
        share: calls a function on one process, and returns on all what it returned.

    Returns:
        The masks of the pruned model, in the order of those given.
    """
    parameters, found = dict(model.named_parameters()), dict(masks)

    def visit(name: str, inputs: Inputs) -> None:
        weight, mask = parameters[name], masks.get(name)
        if mask is None or mask.all():
            return
        bias_name = f"{name.removesuffix('weight')}bias"
        bias = parameters.get(bias_name)
        seen = inputs if bias is None else inputs.centred()

        def compute():
            try:
                new = RECONSTRUCTIONS[method](weight, seen, mask, patterns(name))
            except PruningError as error:
                raise PruningError(f"{name}: {error}") from error
            return [part.cpu() for part in new]

        pruned = share(compute)
        new, found[name] = (part.to(weight.device) for part in pruned)
        if bias is not None:
            bias += (
                weight.to(inputs.mean) @ inputs.other_mean - new.to(inputs.mean) @ inputs.mean
            ).to(bias)
            bias *= masks.get(bias_name, 1)
        weight.copy_(new)

    with torch.no_grad():
        walk(
            visit,
            copy.deepcopy(model)
            if DENSE_INPUTS in describe(RECONSTRUCTIONS[method]).needs
            else None,
        )
    return found


RECONSTRUCTIONS: dict[str, Callable] = {
    function.__name__.replace("_", "-"): function
    for function in (none, obs, obs_mask, least_squares, least_squares_mask)
}


# ---- helpers, not exported ----


def _kept(mask: Tensor, pattern: Pattern) -> int:
    """The units that a mask keeps."""
    return pattern.units(mask.shape) * int(mask.count_nonzero()) // mask.numel()


class _LeastSquares:
    """The rows w' of a new weight that are nearest to |X w' - Y w|^2 + damping |w' - w|^2, by
    conjugate gradients.
    """

    def __init__(self, weight: Tensor, inputs: Inputs):
        self.damped, self.factor = _damped(inputs.gram, DAMPING)
        # What is always zero here may be alive in the dense model
        self.alive = inputs.gram.diagonal() != 0
        damping = (self.damped.diagonal() - inputs.gram.diagonal()) * self.alive
        weight = weight.to(self.damped)
        self.wanted = weight @ inputs.cross.T + weight * damping
        self.diagonal = self.damped.diagonal()

    def costs(self, weight: Tensor) -> Tensor:
        """What it costs to remove each weight."""
        return weight.square() * (self.diagonal / self.factor.square().sum(0)).sqrt()

    def solve(self, start: Tensor, mask: Tensor, steps: int) -> Tensor:
        """The rows with zeros where the mask has them and where an input is always zero, from a
        start without them.
        """
        new = start.to(self.damped) * (mask & self.alive)
        left = (self.wanted - new @ self.damped) * mask
        towards = scaled = left / self.diagonal
        size = (left * scaled).sum(1, keepdim=True)
        for _ in range(steps):
            change = (towards @ self.damped) * mask
            share = size / (towards * change).sum(1, keepdim=True).clamp_min(TINY)
            new, left = new + share * towards, left - share * change
            scaled = left / self.diagonal
            before, size = size, (left * scaled).sum(1, keepdim=True)
            towards = scaled + size / before.clamp_min(TINY) * towards
        return new


def _check(weight: Tensor, gram: Tensor, kept: int | Tensor, pattern: Pattern) -> None:
    outputs, inputs = weight.shape
    if gram.shape != (inputs, inputs) or not gram.isfinite().all() or not weight.isfinite().all():
        raise PruningError(
            f"expected a finite weight and a finite Gram matrix of {inputs} x {inputs}"
        )
    if isinstance(kept, Tensor):
        if kept.shape != weight.shape or kept.dtype != torch.bool:
            raise PruningError(f"expected a bool mask of shape {outputs} x {inputs}")
        return
    pattern.check({"the weight": weight.shape})
    if not 0 <= kept <= pattern.units(weight.shape):
        raise PruningError(f"{kept} kept: expected 0 to {pattern.units(weight.shape)}")


def _damped(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Gram matrix, and the upper Cholesky factor U of its inverse: U^T U = (G +
    damping)^-1.
    """
    diagonal = gram.diagonal()
    scale = diagonal.mean() if diagonal.any() else torch.ones_like(diagonal[0])
    while True:
        # An input that is always zero stands alone, whatever the damping.
        damped = gram + torch.diag(damping * scale + scale * (diagonal == 0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and factor.isfinite().all():
            return damped, factor
        if damping > MOST_DAMPING:
            raise PruningError(
                "expected the Gram matrix of some inputs: this one has negative eigenvalues"
            )
        damping = max(10 * damping, 1e-6)
        log.warning(
            "A Gram matrix of %d inputs cannot be factored: its damping is raised to %g",
            len(gram),
            damping,
        )
