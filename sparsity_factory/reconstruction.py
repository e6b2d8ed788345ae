"""Reconstruction: when a layer is pruned, its kept weights compensate for the pruned ones.

A reconstruction is a function

    def reconstruction(
        weight: Tensor, inputs: Inputs, mask: Tensor, pattern: Pattern | None
    ) -> tuple[Tensor, Tensor]

It is given a weight of shape (outputs, inputs), the sums over its layer's inputs, the mask that
score and allocation have chosen, and the weight's pattern. It returns the new weight, zero where it
is pruned, and its mask, which keeps as many weights. Without a pattern the mask stays. To add one,
write such a function and name it in `RECONSTRUCTIONS`.

Several processes share out the rows of a layer: each is given the weight and mask of some of them,
as if it had only these outputs, and the pattern compares units over all rows. So a row may depend
on others through the pattern alone.
"""

import copy
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .damping import DAMPING, DAMPING_LINE, damped_gram
from .errors import PruningError
from .layer_walk import Inputs
from .masks import as_matrix, from_matrix
from .method import Count, NotNegative, chosen, describe, method
from .patterns import Pattern, Unstructured, parse_pattern
from .processes import ALONE, Processes

# Of conjugate gradients, after each round and after the last. After 20 the error was that of the
# exact solution to four digits.
STEPS, LAST_STEPS = 5, 20
STEPS_LINE = "of conjugate gradients"
TINY = 1e-30
NONE = "none"
COLUMNS_LINE = "among which weights compare; by default a 32nd of the inputs, at least 8"
DENSE_INPUTS = "dense_inputs"  # the inputs that a layer has in the model before pruning


def obs_prune(
    weight: Tensor,
    gram: Tensor,
    kept: int | tuple[int, int] | Tensor,
    *,
    damping: float = DAMPING,
    block_size: int = 128,
    pattern: Pattern | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prunes a weight by Optimal Brain Surgeon; the kept weights compensate for the pruned ones.

    Frantar and Alistarh 2023, arXiv:2301.00774 (SparseGPT), whose letters these are:

        W: `weight`; w: one of its weights, as updated so far.
        H = 2 X^T X / tokens, of which `gram` is X^T X: a factor of H changes nothing.
        U: `factor`, the upper Cholesky factor of H^-1: H^-1 = U^T U, with `damping` times the mean
            of the diagonal of H added to that diagonal first.

    Columns are pruned from left to right, those weights first in each group whose cost
    w^2 / U_jj^2 is least. The error w / U_jj of a pruned weight is spread over the columns to its
    right by row j of U.

    Args:
        weight: shape (outputs, inputs); it is not changed.
        gram: X^T X of the layer's inputs X (tokens, inputs), shape (inputs, inputs). The work is
            done in its dtype. Weights of an input that is always zero become zero.
        kept: how many units of the pattern stay: each block of columns keeps its share, and the
            total is exact. Or (n, m): n of every m, chosen when their group is reached. Or a bool
            mask of the weight's shape, which stays.
        damping: raised tenfold, with a warning in the log, until the matrix can be factored.
        block_size: columns among which weights compare.
        pattern: what is removed together, if `kept` is a number; single weights by default.
        factor: U, if it is known already; `damping` then changes nothing.

    Returns:
        The new weight in the dtype of the given one, zero where it is pruned; and the mask.

    Raises:
        PruningError: a weight or Gram matrix that is not finite, or a number, group or mask that
            does not fit; damping or block size out of range.
    """
    if isinstance(kept, tuple):
        pattern = parse_pattern("{}:{}".format(*kept))
        kept = pattern.units(weight.shape) * pattern.n // pattern.m
    pattern = pattern or Unstructured()
    _check(weight, gram, kept, pattern)
    if not 0 <= damping < math.inf or block_size < 1:
        raise PruningError(
            f"damping {damping:g}, block size {block_size}: expected at least 0 and at least 1"
        )

    # A block is one or more groups of columns within which units compare
    inputs = weight.shape[1]
    width = pattern.compared_columns(block_size)
    block_size = max(block_size // width, 1) * width

    if factor is None:
        _, factor = damped_gram(gram, damping)
    diagonal = factor.diagonal()

    # Transposed, so that a column of W is contiguous: columns[j] is W[:, j]
    columns = weight.detach().to(gram.dtype).T.clone()
    columns[gram.diagonal() == 0] = 0
    if isinstance(kept, Tensor):
        mask = kept.T.contiguous()
    else:
        mask = torch.empty_like(columns, dtype=torch.bool)

    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        errors = torch.empty_like(columns[start:end])

        for j in range(start, end):
            # Choose the weights of a group when its first column is reached: least w^2 / U_jj^2
            if not isinstance(kept, Tensor) and (j - start) % width == 0:
                group = slice(j, min(j + width, end))
                costs = (columns[group] / diagonal[group, None]).square_().T
                share = pattern.share(kept, weight.shape, group.start, group.stop)
                mask[group] = pattern.mask(pattern.score(costs), share).T

            # Spread the errors w / U_jj of the pruned weights over the rest of the block
            error = errors[j - start]
            torch.mul(columns[j], ~mask[j], out=error).div_(diagonal[j])
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)

        # Spread all errors of the block over the columns behind it
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)

    columns *= mask
    return columns.T.to(weight.dtype).contiguous(), mask.T.contiguous()


def few_columns(weight: Tensor) -> int:
    """A block size for `obs_prune`: few columns, as small layers were more accurate with them."""
    return max(weight.shape[1] // 32, 8)


@method()
def none(
    weight: Tensor, inputs: Inputs, mask: Tensor, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """Kept weights stay as they are."""
    return weight * mask, mask


@method(
    "Frantar and Alistarh 2023, arXiv:2301.00774",
    needs={"gram"},
    columns=COLUMNS_LINE,
    damping=DAMPING_LINE,
)
def obs(
    weight: Tensor,
    inputs: Inputs,
    mask: Tensor,
    pattern: Pattern | None,
    *,
    columns: Count | None = None,
    damping: NotNegative = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon chooses the pruned weights of each layer and updates the others.

    It prunes as many as the mask.
    """
    return obs_prune(
        weight,
        inputs.gram,
        pattern.kept(mask) if pattern else mask,
        pattern=pattern,
        damping=damping,
        block_size=columns or few_columns(weight),
    )


@method("Frantar and Alistarh 2023, arXiv:2301.00774", needs={"gram"}, damping=DAMPING_LINE)
def obs_mask(
    weight: Tensor,
    inputs: Inputs,
    mask: Tensor,
    pattern: Pattern | None,
    *,
    damping: NotNegative = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon only updates the kept weights; score and pruner choose the mask."""
    return obs_prune(weight, inputs.gram, mask, damping=damping)


@method(
    "Boža 2024, arXiv:2401.02938; this project",
    needs={"gram", DENSE_INPUTS},
    rounds="each of which prunes a part of the weights",
    steps=f"{STEPS_LINE} after each round but the last",
    last_steps=f"{STEPS_LINE} after the last round, or with a given mask",
    damping=DAMPING_LINE,
)
def least_squares(
    weight: Tensor,
    inputs: Inputs,
    mask: Tensor,
    pattern: Pattern | None,
    *,
    rounds: Count = 8,
    steps: Count = STEPS,
    last_steps: Count = LAST_STEPS,
    damping: NotNegative = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Prunes in rounds by cost; after each, fits the kept weights to the dense outputs.

    With X the layer's inputs and Y its inputs in the dense model, the kept weights w' of each row
    are the least squares of X w' - Y w, damped by w' - w. A weight costs
    w'^2 (H_jj / [H^-1]_jj)^0.5, H being the damped X^T X: the geometric mean of the costs of its
    removal if the others stay, and if they compensate.
    """
    if pattern is None:
        return least_squares_mask(weight, inputs, mask, steps=last_steps, damping=damping)

    problem = _LeastSquares(weight, inputs, damping)
    units = pattern.units(weight.shape)
    last = pattern.kept(mask)
    mask = torch.ones_like(mask)
    new = problem.solve(weight, mask, steps)

    # Fewer units are kept in each round, as in gradual pruning (Zhu and Gupta 2017)
    for round_ in range(1, rounds + 1):
        kept = last + round((units - last) * (1 - round_ / rounds) ** 3)
        mask = pattern.mask(pattern.score(problem.costs(new) * mask), kept)
        new = problem.solve(new, mask, steps if round_ < rounds else last_steps)
    return new.to(weight.dtype), mask


@method(
    "Boža 2024, arXiv:2401.02938; this project",
    needs={"gram", DENSE_INPUTS},
    steps=STEPS_LINE,
    damping=DAMPING_LINE,
)
def least_squares_mask(
    weight: Tensor,
    inputs: Inputs,
    mask: Tensor,
    pattern: Pattern | None = None,
    *,
    steps: Count = LAST_STEPS,
    damping: NotNegative = DAMPING,
) -> tuple[Tensor, Tensor]:
    """As least-squares, with the mask that score and pruner choose."""
    new = _LeastSquares(weight, inputs, damping).solve(weight, mask, steps)
    return new.to(weight.dtype), mask


def reconstruct_layers(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    method: str | Callable,
    walk: Callable[[nn.Module | None], Generator[tuple[str, Inputs]]],
    *,
    patterns: Callable[[str], Pattern | None],
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Prunes the weights of a model by masks, layer after layer, and reconstructs each.

    Each layer is given the inputs that it has when all before it are pruned. If it has a bias, the
    Gram matrix is that of the inputs less their mean, and the bias is given what the mean outputs
    lose: the least squares over weights and bias together. Without a bias, it is that of the inputs
    themselves.

    Args:
        model: changed in place.
        masks: of weights and biases, on their devices; those of other parameters are left to the
            caller.
        method: a name in `RECONSTRUCTIONS`, or such a function.
        walk: from the dense model, or None if the method does not look at it, to what
            `walk_layers` returns for the model, with the dense one as the other.
        patterns: from the name of a weight to the pattern by which its mask may be chosen anew;
            None if it stays.
        processes: share out the rows of each layer.

    Returns:
        The masks of the pruned model, in the order of those given.
    """
    parameters = dict(model.named_parameters())
    found = dict(masks)
    reconstruction = chosen(RECONSTRUCTIONS, method)
    needs_dense = DENSE_INPUTS in describe(reconstruction).needs
    dense = copy.deepcopy(model) if needs_dense else None

    with torch.no_grad(), closing(walk(dense)) as layers:
        for name, inputs in layers:
            mask = masks.get(name)
            if mask is None or mask.all():
                continue
            bias_name = f"{name.removesuffix('weight')}bias"
            weight = parameters[name]
            layer = _Layer(name, as_matrix(weight), parameters.get(bias_name), inputs)
            mask = as_matrix(mask)

            with torch.autocast(weight.device.type, enabled=False):
                new, mask = _reconstructed(reconstruction, layer, mask, patterns(name), processes)
                found[name] = from_matrix(mask, weight.shape)
                if layer.bias is not None:
                    layer.bias.add_(layer.mean_loss(new).to(layer.bias))
                    layer.bias.mul_(masks.get(bias_name, 1))
                weight.copy_(from_matrix(new, weight.shape))
    return found


RECONSTRUCTIONS: dict[str, Callable] = {
    function.__name__.replace("_", "-"): function
    for function in (none, obs, obs_mask, least_squares, least_squares_mask)
}


# ---- helpers, not exported ----


class _Layer(NamedTuple):
    """A layer in its turn, with the sums over its inputs."""

    name: str
    weight: Tensor
    bias: Tensor | None
    inputs: Inputs

    def mean_loss(self, new: Tensor) -> Tensor:
        """What the mean outputs lose by a new weight, shape (outputs,)."""
        mean = self.inputs.mean
        return self.weight.to(mean) @ self.inputs.other_mean - new.to(mean) @ mean


class _OverAllRows(Pattern):
    """The pattern of a layer as a process sees it that has some of the rows.

    Scores of weights, masks and shapes are those of its rows; scores and numbers of units are those
    of all rows.
    """

    def __init__(self, pattern: Pattern, processes: Processes, outputs: int):
        self._pattern = pattern
        self._processes = processes
        self._outputs = outputs

    def _whole(self, shape: Sequence[int]) -> tuple[int, int]:
        return self._outputs, shape[1]

    def misfit(self, name, shape):
        return self._pattern.misfit(name, self._whole(shape))

    def units(self, shape):
        return self._pattern.units(self._whole(shape))

    def kept(self, mask):
        return self._pattern.kept(self._processes.joined(mask, self._outputs))

    def score(self, score):
        return self._pattern.score(self._processes.joined(score, self._outputs))

    def compared_columns(self, block_size):
        return self._pattern.compared_columns(block_size)

    def share(self, kept, shape, start, end):
        return self._pattern.share(kept, self._whole(shape), start, end)

    def mask(self, score, kept, at_least=None):
        return self._pattern.mask(score, kept, at_least)[self._processes.rows(self._outputs)]


def _reconstructed(
    reconstruction: Callable,
    layer: _Layer,
    mask: Tensor,
    pattern: Pattern | None,
    processes: Processes,
) -> tuple[Tensor, Tensor]:
    """The new weight and mask of a layer, on all processes."""
    outputs = len(mask)
    own = processes.rows(outputs)
    inputs = layer.inputs.about_zero() if layer.bias is None else layer.inputs
    if processes.count > 1 and pattern and not pattern.by_row:
        pattern = _OverAllRows(pattern, processes, outputs)

    try:
        new, mask = reconstruction(layer.weight[own], inputs, mask[own], pattern)
    except PruningError as error:
        raise PruningError(f"{layer.name}: {error}") from error
    return processes.joined(new, outputs), processes.joined(mask, outputs)


class _LeastSquares:
    """Rows w' that minimize |X w' - Y w|^2 + damping |w' - w|^2, by conjugate gradients."""

    def __init__(self, weight: Tensor, inputs: Inputs, damping: float):
        self.damped, self.factor = damped_gram(inputs.gram, damping)
        self.diagonal = self.damped.diagonal()

        # An input that is always zero here may vary in the dense model
        self.alive = inputs.gram.diagonal() != 0
        added = (self.diagonal - inputs.gram.diagonal()) * self.alive
        weight = weight.to(self.damped)
        self.wanted = weight @ inputs.cross.T + weight * added

    def costs(self, weight: Tensor) -> Tensor:
        """What it costs to remove each weight."""
        return weight.square() * (self.diagonal / self.factor.square().sum(0)).sqrt()

    def solve(self, start: Tensor, mask: Tensor, steps: int) -> Tensor:
        """The rows after some steps from `start`.

        They are zero where the mask is False and where an input is always zero.
        """
        new = start.to(self.damped) * (mask & self.alive)

        # Preconditioned by the diagonal; each row of the weight is a system of its own
        residual = (self.wanted - new @ self.damped) * mask
        scaled = residual / self.diagonal
        direction = scaled
        size = (residual * scaled).sum(1, keepdim=True)

        for _ in range(steps):
            change = (direction @ self.damped) * mask
            step = size / (direction * change).sum(1, keepdim=True).clamp_min(TINY)
            new = new + step * direction
            residual = residual - step * change

            scaled = residual / self.diagonal
            before = size
            size = (residual * scaled).sum(1, keepdim=True)
            direction = scaled + size / before.clamp_min(TINY) * direction
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

    if misfit := pattern.misfit("the weight", weight.shape):
        raise PruningError(f"pattern {pattern.name}: expected {misfit}")
    if not 0 <= kept <= pattern.units(weight.shape):
        raise PruningError(f"{kept} kept: expected 0 to {pattern.units(weight.shape)}")
