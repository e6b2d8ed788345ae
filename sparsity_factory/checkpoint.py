"""What a checkpoint says of a run's pruning: the `state_dict` of a `Sparsifier`, which nobody has
to trust.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import PruningError
from .masks import bits, unpack
from .patterns import parse_pattern
from .recipe import LARGEST, Recipe
from .schedules import SCHEDULES, Steps

VERSION = 1  # of the state


def has_reached_target(untrusted) -> bool:
    """Whether the `state_dict` of a `Sparsifier` is of a model with the sparsity and pattern that
    its recipe asks for.

    Raises:
        PruningError: a state that is damaged.
    """
    state = SavedPruning(untrusted)
    return state.is_final(state.recipe())


def read_pruning(checkpoint: dict) -> tuple[Recipe, dict[str, Tensor] | None]:
    """The recipe and the masks of an untrusted checkpoint, None where it has none; its weights are
    checked by them.

    Raises PruningError for what is damaged, weights that do not obey their masks, and groups that
    do not hold.
    """
    pruning = checkpoint.get("pruning")
    stored = pruning.get("recipe") if isinstance(pruning, dict) else checkpoint.get("pruner")
    recipe = Recipe() if stored is None else Recipe.from_dict(stored)
    if "masks" not in checkpoint:
        return recipe, None
    masks = unpack(checkpoint["masks"])
    reached = has_reached_target(pruning) if isinstance(pruning, dict) else True
    for kind in ("model", "model_ema"):
        try:
            check_masks(checkpoint.get(kind, {}), masks, recipe if reached else None)
        except PruningError as error:
            raise PruningError(f"{kind}: {error}") from None
    return recipe, masks


def check_masks(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], recipe: Recipe | None = None
) -> None:
    """Checks a state dict against its masks: pruned weights are zero, and every group holds what
    n:m allows.

    Args:
        weights: parameter name to tensor; names without a mask are not looked at. May be empty.
        masks: parameter name to bool tensor, True where the weight is kept; on any device, as the
        weights are.
        recipe: the one that made the masks, where its target is reached: its groups are counted.

    Raises:
        PruningError: naming the first weight that does not obey.
    """
    if not isinstance(weights, Mapping):
        raise PruningError(
            f"the weights are a {type(weights).__name__}, expected a mapping of names to tensors"
        )
    for name, mask in masks.items() if weights else ():
        weight = weights.get(name)
        if (
            not isinstance(weight, Tensor)
            or weight.shape != mask.shape
            or weight.is_meta
            or weight.layout != torch.strided
        ):
            raise PruningError(
                f"mask {name!r}: there is no weight of that name and of shape {list(mask.shape)}"
            )
        nonzero = int(
            (weight != 0).logical_and_(mask.to(weight.device).logical_not()).count_nonzero()
        )
        if nonzero:
            raise PruningError(f"{name}: {nonzero} of its pruned weights are not zero")
    if recipe is None:
        return
    shapes = {name: mask.shape for name, mask in masks.items() if mask.dim() == 2}
    levels = recipe.levels(shapes)
    pattern = parse_pattern(recipe.pattern)
    if pattern.sparsity is not None:
        levels = dict.fromkeys(shapes, (pattern.n, pattern.m))
    for name, level in levels.items():
        if isinstance(level, int):
            if int(masks[name].count_nonzero()) != level:
                raise PruningError(
                    f"{name}: keeps {int(masks[name].count_nonzero())} weights, expected {level}"
                )
        elif any(
            (side.reshape(-1, level[1]).sum(1) != level[0]).any()
            for side in (masks[name], masks[name].T)[: 1 + pattern.transposable]
        ):
            raise PruningError(f"{name}: a group of {level[1]} does not keep {level[0]}")


class SavedPruning:
    """What a checkpoint says of a run's pruning, read entry by entry. Raises PruningError for what
    cannot be.
    """

    def __init__(self, untrusted):
        if not isinstance(untrusted, Mapping):
            raise PruningError("the saved pruning is not a dictionary")
        self._entries = untrusted
        if (version := self.integer("version")) != VERSION:
            raise PruningError(f"the saved pruning is of version {version}, expected {VERSION}")

    def entry(self, name: str, kind: type, entries: Mapping | None = None):
        value = (self._entries if entries is None else entries).get(name)
        if not isinstance(value, kind) or isinstance(value, bool) and kind is int:
            raise PruningError(
                f"the saved pruning's {name} is a {type(value).__name__}, expected {kind.__name__}"
            )
        return value

    def integer(self, name: str, smallest: int = 0, entries: Mapping | None = None) -> int:
        value = self.entry(name, int, entries)
        if not smallest <= value < LARGEST:
            raise PruningError(
                f"the saved pruning's {name}: expected an integer from {smallest} to 2**53"
            )
        return value

    def recipe(self) -> Recipe:
        return Recipe.from_dict(self.entry("recipe", Mapping))

    def progress(self) -> tuple[int, int, bool]:
        """The step to train next, the one of the last change of the masks, and whether a change is
        late.
        """
        step = self.integer("step")
        changed = self.integer("changed", -1)
        late = self.entry("late", bool)
        if changed >= max(step, 1):
            raise PruningError(
                f"the saved pruning has changed masks at step {changed}, after its step {step}"
            )
        return step, changed, late

    def steps(self, recipe: Recipe) -> Steps:
        found = self.entry("steps", Mapping)
        rewind = None if recipe.rewind is None else self.integer("rewind", 0, found)
        steps = Steps(
            *(self.integer(name, 0, found) for name in ("total", "epoch", "start", "end")), rewind
        )
        if (
            not steps.start <= steps.end <= max(steps.total - 1, 0)
            or not steps.epoch
            or (rewind or 0) > steps.start
        ):
            raise PruningError(f"the saved pruning's steps are out of order: {steps}")
        return steps

    def is_final(self, recipe: Recipe) -> bool:
        """Whether the target of the recipe is reached."""
        return SCHEDULES[recipe.prune_schedule](recipe, self.steps(recipe)).is_final(
            self.integer("changed", -1)
        )

    def masks(self) -> dict[str, Tensor]:
        return unpack(self.entry("masks", dict))

    def hidden(
        self, expected: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The pruned weights that are kept outside of the model, as `tensors` has them."""
        hidden = self.tensors("hidden", expected)
        for name, values in hidden.items():
            if bits(values).cpu().mul(masks[name].view(torch.int8)).any():
                raise PruningError(
                    f"hidden {name!r} of the saved pruning: expected zeros where the weight is kept"
                )
        return hidden

    def tensors(self, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of exactly the expected names, shapes and dtypes."""
        found = self.entry(name, Mapping)
        if found.keys() != expected.keys():
            raise PruningError(
                f"the saved pruning's {name} has {len(found)} tensors, expected other names or "
                f"{len(expected)}"
            )
        for key, like in expected.items():
            value = found[key]
            if (
                not isinstance(value, Tensor)
                or value.shape != like.shape
                or value.dtype != like.dtype
                or value.is_meta
                or value.layout != torch.strided
            ):
                raise PruningError(
                    f"the saved pruning's {name} {key!r}: expected a {like.dtype} tensor of shape "
                    f"{list(like.shape)}"
                )
        return dict(found)
