"""`--audit`: what a checkpoint keeps of each layer, and whether its weights obey its masks."""

import sys

import utils
from sparsity_factory import (
    PruningError,
    checkpoint_table,
    has_reached_target,
    read_pruning,
    unpack,
)
from utils import UserError


def audit(path: str) -> int:
    """Prints what a checkpoint keeps of each layer, from the file alone.

    Returns the exit status: 1 if the weights do not obey the masks. Raises UserError without masks.
    """
    checkpoint = utils.load_checkpoint(path)
    masks = unpack(checkpoint.get("masks", {}))
    if not masks:
        raise UserError(f"{path}: holds no masks; expected a checkpoint of a pruned run")

    print(checkpoint_table(checkpoint["model"], masks))
    try:
        recipe, _ = read_pruning(checkpoint)
    except PruningError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 1

    print(f"pruned with {recipe.in_words()}")
    if "shape" in checkpoint:
        print(
            "shrunk: the pruned heads and neurons are gone, and the table is of those that are left"
        )
    if "pruning" in checkpoint and not has_reached_target(checkpoint["pruning"]):
        print("every pruned weight is zero; its schedule has not reached the target yet")
    else:
        print("every pruned weight is zero, and every n:m group holds")
    return 0
