"""Reads what a checkpoint says of a run's pruning, and trusts none of it."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from .custom_yaml import BlockLevel
from .errors import PruningError
from .masks import as_matrix, bits, unpack
from .patterns import parse_pattern
from .recipe import LARGEST, Recipe
from .schedules import Steps

log = logging.getLogger(__name__)

VERSION = 1  # of the state


def has_reached_target(untrusted) -> bool:
    """Whether the model of a `Sparsifier`'s `state_dict` has reached its target.

    Raises:
        PruningError: a state that is damaged.
    """
    state = SavedPruning(untrusted)
    return state.is_final(state.recipe())


def read_pruning(checkpoint: dict, strict: bool = False) -> tuple[Recipe, dict[str, Tensor] | None]:
    """The recipe and the masks of an untrusted checkpoint; None if it has no masks.

    strict: as for `check_masks`.

    Raises:
        PruningError: an entry is damaged, pruned weights are not zero, or masks are not of their
            pattern.
    """
    pruning = checkpoint.get("pruning")
    stored = pruning.get("recipe") if isinstance(pruning, dict) else checkpoint.get("pruner")
    recipe = Recipe() if stored is None else Recipe.from_dict(stored)
    if "masks" not in checkpoint:
        return recipe, None

    masks = unpack(checkpoint["masks"])
    reached = has_reached_target(pruning) if isinstance(pruning, dict) else True
    if reached:
        check_masks({}, masks, recipe, strict)
    for kind in ("model", "model_ema"):
        try:
            check_masks(checkpoint.get(kind, {}), masks)
        except PruningError as error:
            raise PruningError(f"{kind}: {error}") from None
    return recipe, masks


def check_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    recipe: Recipe | None = None,
    strict: bool = True,
) -> None:
    """Checks that pruned weights are zero, and that masks are what their recipe asks for.

    Args:
        weights: parameter name to tensor, a state dict. Names without a mask are ignored. If it is
            empty, only the masks are checked.
        masks: parameter name to bool tensor, True where the weight is kept; on any device, as the
            weights are.
        recipe: the one that made the masks, if its target is reached: its pattern and its budget
            are checked.
        strict: False: masks that miss the budget are logged as a warning, since older versions
            made such masks.

    Raises:
        PruningError: naming the first weight that does not obey, or how many weights are kept.
    """
    if not isinstance(weights, Mapping):
        raise PruningError(
            f"the weights are a {type(weights).__name__}, expected a mapping of names to tensors"
        )
    for name, mask in masks.items() if weights else ():
        _check_weight(name, weights.get(name), mask)
    if recipe is None:
        return

    matrices = {name: as_matrix(mask) for name, mask in masks.items()}
    _check_layers(matrices, recipe)
    if missed := _missed_budget(matrices, recipe):
        if strict:
            raise PruningError(missed)
        log.warning("%s", missed)


class SavedPruning:
    """What a checkpoint says of a run's pruning, read entry by entry.

    Its methods raise PruningError for an entry that is missing, damaged or out of range.
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
        """The step to train next, the step of the last change of masks, whether one is overdue."""
        step = self.integer("step")
        changed = self.integer("changed", -1)
        late = self.entry("late", bool)
        if changed >= max(step, 1):
            raise PruningError(
                f"the saved pruning has changed masks at step {changed}, after its step {step}"
            )
        return step, changed, late

    def steps(self, recipe: Recipe) -> Steps:
        """The times of the schedule."""
        found = self.entry("steps", Mapping)
        names = ["total", "epoch", "start", "end"]
        if recipe.rewind is not None:
            names.append("rewind")
        steps = Steps(**{name: self.integer(name, 0, found) for name in names})

        in_order = (steps.rewind or 0) <= steps.start <= steps.end <= max(steps.total - 1, 0)
        if not in_order or not steps.epoch:
            raise PruningError(f"the saved pruning's steps are out of order: {steps}")
        return steps

    def is_final(self, recipe: Recipe) -> bool:
        """Whether the target of the recipe is reached."""
        schedule = recipe.schedule(self.steps(recipe))
        return schedule.is_final(self.integer("changed", -1))

    def masks(self) -> dict[str, Tensor]:
        return unpack(self.entry("masks", dict))

    def hidden(
        self, expected: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The pruned weights that are kept outside of the model, with zeros elsewhere."""
        hidden = self.tensors("hidden", expected)
        for name, values in hidden.items():
            if bits(values).cpu().mul(masks[name].view(torch.int8)).any():
                raise PruningError(
                    f"hidden {name!r} of the saved pruning: expected zeros where the weight is kept"
                )
        return hidden

    def averages(self, name: str, expected: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """A list of state dicts with the expected names; none in files of older versions."""
        states = self._entries.get(name, [])
        if not isinstance(states, list):
            raise PruningError(f"the saved pruning's {name} is no list")
        return [
            self.tensors(f"{name} {number}", expected, {f"{name} {number}": state})
            for number, state in enumerate(states)
        ]

    def tensors(
        self, name: str, expected: Mapping[str, Tensor], entries: Mapping | None = None
    ) -> dict[str, Tensor]:
        """Tensors of exactly the expected names, shapes and dtypes."""
        found = self.entry(name, Mapping, entries)
        if found.keys() != expected.keys():
            raise PruningError(
                f"the saved pruning's {name} has {len(found)} tensors, expected other names or "
                f"{len(expected)}"
            )

        for key, like in expected.items():
            value = found[key]
            if not _is_plain_tensor(value, like.shape) or value.dtype != like.dtype:
                raise PruningError(
                    f"the saved pruning's {name} {key!r}: expected a {like.dtype} tensor of shape "
                    f"{list(like.shape)}"
                )
        return dict(found)


# ---- helpers, not exported ----


def _check_weight(name: str, weight, mask: Tensor) -> None:
    """That a weight fits its mask, and is zero wherever it is pruned."""
    if not _is_plain_tensor(weight, mask.shape):
        raise PruningError(
            f"mask {name!r}: there is no weight of that name and of shape {list(mask.shape)}"
        )
    pruned = mask.to(weight.device).logical_not()
    nonzero = int((weight != 0).logical_and_(pruned).count_nonzero())
    if nonzero:
        raise PruningError(f"{name}: {nonzero} of its pruned weights are not zero")


def _check_layers(masks: Mapping[str, Tensor], recipe: Recipe) -> None:
    """That masks are of their pattern, and keep of each layer what a custom configuration says."""
    if flaw := parse_pattern(recipe.pattern).why_not(masks):
        raise PruningError(flaw)

    shapes = {name: mask.shape for name, mask in masks.items() if mask.dim() == 2}
    levels = recipe.levels(shapes)
    smaller = {name: mask for name, mask in masks.items() if levels and recipe.shrinks(name)}
    if flaw := parse_pattern("heads+neurons").why_not(smaller):
        raise PruningError(flaw)

    for name, level in levels.items():
        if name in smaller:
            continue
        if isinstance(level, tuple):
            flaw = parse_pattern("{}:{}".format(*level)).flaw(masks[name])
        elif isinstance(level, BlockLevel):
            flaw = level.pattern.flaw(masks[name]) or _other_number(
                level.pattern.kept(masks[name]), level.kept(masks[name].shape), "blocks"
            )
        else:
            flaw = _other_number(int(masks[name].count_nonzero()), level, "weights")
        if flaw:
            raise PruningError(f"{name}: {flaw}")


def _other_number(kept: int, expected: int, of: str) -> str:
    return "" if kept == expected else f"keeps {kept} {of}, expected {expected}"


def _missed_budget(masks: Mapping[str, Tensor], recipe: Recipe) -> str:
    """How masks miss the sparsity of their recipe, beyond what whole units allow, or nothing."""
    layers = [mask for name, mask in masks.items() if mask.dim() == 2 and name.endswith("weight")]
    pattern = parse_pattern(recipe.pattern)
    # Nothing is left to count of a shrunk model, and multiply-adds are not those of the weights
    gone = pattern.structured and all(mask.all() for mask in layers)
    if recipe.sparsity is None or not layers or gone or recipe.budget != "weights":
        return ""

    total = sum(mask.numel() for mask in layers)
    kept = sum(int(mask.count_nonzero()) for mask in layers)
    budget = round(total * (1 - recipe.sparsity))
    below, above = pattern.slack({str(place): mask.shape for place, mask in enumerate(layers)})
    if budget - below <= kept <= budget + above:
        return ""
    return (
        f"the masks keep {kept:,} of {total:,} prunable weights, a sparsity of "
        f"{1 - kept / total:.4f}; expected {recipe.sparsity:g}"
    )


def _is_plain_tensor(value, shape: torch.Size) -> bool:
    if not isinstance(value, Tensor) or value.shape != shape:
        return False
    return not value.is_meta and value.layout == torch.strided
