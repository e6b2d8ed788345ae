"""`--audit`: what a file keeps of each layer, and whether that is what its masks or users say."""

import sys
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

import utils
from sparsity_factory import (
    PruningError,
    Recipe,
    checkpoint_table,
    has_reached_target,
    nonzero_weights,
    parse_pattern,
    patterns_found,
    read_pruning,
    removable_units,
    unmet,
    unpack,
)
from utils import UserError


def audit(path: str, expected: Sequence[str] = ()) -> int:
    """Prints what a file keeps of each layer, which patterns it obeys, and what `--shrink` saves.

    Without masks, the weights that are not zero count as kept.

    expected: patterns and sparsities, as `parse_expectation` reads them.

    Returns the exit status: 1 if weights do not obey their masks, masks their recipe, or layers
    what is expected. Raises UserError for a file without layers.
    """
    checkpoint = utils.load_checkpoint(path)
    weights = checkpoint["model"]
    masks = unpack(checkpoint.get("masks", {}))
    recipe = None
    if masks:
        try:
            recipe, _ = read_pruning(checkpoint, strict=True)
        except PruningError as error:
            print(checkpoint_table(weights, masks))
            print(f"error: {path}: {error}", file=sys.stderr)
            return 1

    foreign = checkpoint.get("foreign_masks", {})
    layers = masks or foreign or nonzero_weights(weights)
    if not layers:
        raise UserError(f"{path}: has no layers; expected matrices whose names end in weight")
    print(checkpoint_table(weights, layers, patterns_found(layers)))
    if recipe:
        print_recipe(checkpoint, recipe)
    elif foreign:
        print("holds masks of another project, which say what is kept")
    else:
        print("holds no masks: weights that are not zero count as kept")
    print_savings(weights, layers)
    return check_expectations(path, expected, layers)


def parse_expectation(text: str) -> str | float:
    """A sparsity in [0, 1), or the name of a pattern. Raises UserError for anything else."""
    try:
        sparsity = float(text)
    except ValueError:
        try:
            return parse_pattern(text).name
        except PruningError as error:
            raise UserError(f"--expect {text}: {error}, or a sparsity in [0, 1)") from None
    if not 0 <= sparsity < 1:
        raise UserError(f"--expect {text}: expected a pattern, or a sparsity in [0, 1)")
    return sparsity


# ---- helpers, not exported ----


def print_recipe(checkpoint: dict, recipe: Recipe) -> None:
    """Prints what pruned a checkpoint whose masks are in order."""
    print(f"pruned with {recipe.in_words()}")
    if "shape" in checkpoint:
        print(
            "shrunk: the pruned heads and neurons are gone, and the table is of those that are left"
        )
    if "pruning" in checkpoint and not has_reached_target(checkpoint["pruning"]):
        print("every pruned weight is zero; its schedule has not reached the target yet")
    else:
        print("every pruned weight is zero, and pattern and sparsity are those of the recipe")


def print_savings(weights: dict[str, Tensor], layers: dict[str, Tensor]) -> None:
    """Prints how many weights `--shrink` would take out."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    saved, blocks = removable_units(layers, shapes)
    if not saved:
        print("--shrink would take nothing out: no whole head or neuron is zero")
        return

    units: Counter[str] = Counter()
    for block in blocks:
        units[block.kind] += block.pruned
    total = sum(weight.numel() for weight in weights.values())
    counts = " and ".join(f"{count:,} {kind}" for kind, count in units.items())
    print(f"--shrink would take out {counts}: {saved:,} of {total:,} weights")


def check_expectations(path: str, expected: Sequence[str], layers: dict[str, Tensor]) -> int:
    """Prints which expectations hold; returns 1 if one does not."""
    status = 0
    dense = [name for name, mask in layers.items() if mask.dim() > 1 and mask.all()]
    for text in expected:
        expectation = parse_expectation(text)
        if reason := unmet(expectation, layers):
            print(f"error: {path}: --expect {text} does not hold: {reason}", file=sys.stderr)
            status = 1
            continue

        of_layers = isinstance(expectation, str) and dense
        exception = f", but {len(dense)} layers have no zeros: {', '.join(dense)}"
        print(f"--expect {text} holds{exception if of_layers else ''}")
    return status
