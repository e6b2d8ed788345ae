"""What the zeros of any file say: which layers are sparse, and which patterns they obey."""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from .masks import as_matrix
from .patterns import Block, NOfM, Row, Transposable, parse_pattern
from .whole_units import WholeUnits, removable, whole_units

LARGEST_GROUP = 8  # of the n:m that are looked for
LARGEST_TRANSPOSABLE = 4
# Sizes of blocks that are looked for, the largest first: squares, and parts of rows and of columns
BLOCKS = [
    [(size, size) for size in (32, 16, 8, 4)],
    [(1, size) for size in (32, 16, 8, 4)],
    [(size, 1) for size in (32, 16, 8, 4)],
]
TOLERANCE = 0.005  # of an expected sparsity: whole units, and layers that stay dense

# Names of classifiers and embeddings: they count only if they have zeros
NOT_PRUNED = re.compile(r"embed|\b(heads?|head_dist|classifier|\w+_classifier|fc|lm_head)\b")


def nonzero_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which weights of each layer of a state dict are not zero: bool tensors, by name.

    All matrices named `weight` are layers. Classifiers, embeddings and convolutions are layers
    only if they have zeros, since they are rarely pruned.
    """
    found = {}
    for name, weight in weights.items():
        if weight.dim() < 2 or not weight.numel() or not name.endswith("weight"):
            continue
        # Types of 8 bits have no comparison
        nonzero = (weight.float() if weight.dtype.itemsize == 1 else weight) != 0
        is_layer = weight.dim() == 2 and not NOT_PRUNED.search(name)
        if is_layer or not nonzero.all():
            found[name] = nonzero
    return found


def patterns_found(masks: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the patterns that each sparse layer obeys, without those that others imply.

    They are n:m up to groups of 8, rows, blocks of some sizes, whole heads and whole neurons.

    masks: parameter name to bool tensor, as `nonzero_weights` returns, or those of a pruned model.
    """
    of_units = {
        name: block.kind
        for block in whole_units(masks)
        if block.pruned and not block.flaw
        for name in (*block.first, block.last)
    }

    found = {}
    for name, values in masks.items():
        mask = as_matrix(values)
        if mask.dim() != 2 or not mask.any() or mask.all():
            found[name] = []
        elif name in of_units:
            found[name] = [of_units[name]]
        else:
            found[name] = [*_groups(mask), *_blocks(mask)]
    return found


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """The fraction of zeros of all layers."""
    layers = _layers(masks).values()
    total = sum(mask.numel() for mask in layers)
    return 1 - sum(int(mask.count_nonzero()) for mask in layers) / total if total else 0.0


def unmet(expected: str | float, masks: Mapping[str, Tensor]) -> str:
    """Why the layers of a file are not what was expected; empty if they are.

    Args:
        expected: a sparsity of all layers, or the name of a pattern, which each layer that has
            zeros has to obey, and at least one layer has zeros.
        masks: as for `patterns_found`.
    """
    if isinstance(expected, float):
        sparsity = sparsity_of(masks)
        good = abs(sparsity - expected) <= TOLERANCE
        return "" if good else f"the sparsity is {sparsity:.4f}"

    layers = {name: as_matrix(mask) for name, mask in _layers(masks).items()}
    sparse = {name: mask for name, mask in layers.items() if not mask.all()}
    for name, mask in sparse.items():
        if mask.dim() > 2:
            return f"{name}: is no matrix, and only matrices have patterns here"
    if not sparse:
        return "no layer has zeros"
    return parse_pattern(expected).why_not(layers, exact=False)


def removable_units(
    masks: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, list[WholeUnits]]:
    """How many weights and biases `shrink` would take out of a model, and of which blocks."""
    counts = [(removable(block, shapes), block) for block in whole_units(masks)]
    return sum(count for count, _ in counts), [block for count, block in counts if count]


# ---- helpers, not exported ----


def _layers(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the masks of biases and of tables."""
    return {
        name: mask for name, mask in masks.items() if mask.dim() >= 2 and name.endswith("weight")
    }


def _groups(mask: Tensor) -> list[str]:
    """The n:m that a mask obeys, none of which another one implies, and `row`."""
    inputs = mask.shape[1]
    found: list[NOfM] = []
    rows_follow = False  # from groups that all keep the same number
    for m in range(2, LARGEST_GROUP + 1):
        if inputs % m:
            continue
        kept = mask.reshape(-1, m).sum(1)
        n = int(kept.max())
        rows_follow |= n == int(kept.min())
        implied = any(_most_in_a_group(m, other) <= n for other in found)
        if n == m or implied:
            continue
        both = Transposable(f"{n}:{m}t", n, m) if m <= LARGEST_TRANSPOSABLE else None
        obeys_both = both and len(mask) % m == 0 and not both.flaw(mask, exact=False)
        found.append(both if both and obeys_both else NOfM(f"{n}:{m}", n, m))

    names = [pattern.name for pattern in found]
    if not rows_follow and not Row("row", None).flaw(mask):
        names.append("row")
    return names


def _most_in_a_group(m: int, pattern: NOfM) -> int:
    """How many weights a group of m can keep if the weights obey a pattern of other groups."""
    starts = range(0, m * pattern.m, m)
    groups = [Counter(place // pattern.m for place in range(start, start + m)) for start in starts]
    return max(sum(min(count, pattern.n) for count in group.values()) for group in groups)


def _blocks(mask: Tensor) -> list[str]:
    """The largest block of each kind that a mask obeys; squares imply parts of rows and columns."""
    found: list[tuple[int, int]] = []
    for sizes in BLOCKS:
        for rows, columns in sizes:
            fits = mask.shape[0] % rows == 0 and mask.shape[1] % columns == 0
            if fits and not Block("", rows, columns).flaw(mask):
                implied = any(large[0] >= rows and large[1] >= columns for large in found)
                found += [] if implied else [(rows, columns)]
                break
    return [f"block:{rows}x{columns}" for rows, columns in found]
