"""How long each block of a model takes at each choice for it, as measured on this machine.

    parts = find_parts(model, images)
    table = time_table(model, images, {part: {"dense": Choice({}), ...} for part in parts})

A part is an attention, an MLP, or a linear layer of neither. It is measured by itself, as a whole:
heads and neurons as `shrink` leaves it, levels with the sparse kernels that are quickest. What the
model needs besides its parts, such as patch embedding and norms, is the rest.
"""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .custom_yaml import entry_of
from .masks import Masks, prunable_weights
from .pruners import compute_masks
from .shrink import unit_counts, with_units
from .sparse_kernels import DENSE, KERNELS, in_turns, sparse_kernels
from .units import COLUMNS, Group, unit_groups

# Seconds for the dense model and its parts together, for each choice, and for the whole at the end
DENSE_BUDGET, CHOICE_BUDGET, WHOLE_BUDGET = 10.0, 0.3, 10.0


class Choice(NamedTuple):
    """What a part keeps.

    levels: by weight, the text of a level; other weights are dense.
    units: how many heads or neurons stay, and then no level; 0: all.
    """

    levels: Mapping[str, str]
    units: int = 0


class Part(NamedTuple):
    """A module that is measured by itself, and its prunable weights by name, in model order.

    group: its heads or neurons, if it has any.
    inputs: shape and dtype of its only input; None if it was not measured.
    """

    name: str
    weights: tuple[str, ...]
    group: Group | None = None
    inputs: tuple[torch.Size, torch.dtype] | None = None

    @property
    def last(self) -> str:
        """The weight that reads the heads or neurons."""
        assert self.group is not None
        dims: dict[str, set[int]] = {}
        for part in self.group.parts:
            dims.setdefault(part.parameter, set()).add(part.dim)
        return next(name for name in self.weights if dims.get(name) == {COLUMNS})


class TimeTable(NamedTuple):
    """Seconds of a batch.

    whole: of the dense model. dense: of each part of it. parts: by part and choice; a choice that
    cannot be measured is missing.
    """

    whole: float
    dense: Mapping[str, float]
    parts: Mapping[str, Mapping[str, float]]

    @property
    def rest(self) -> float:
        """Of what is in no part."""
        return max(self.whole - sum(self.dense.values()), 0.0)


@torch.no_grad()
def find_parts(model: nn.Module, images: Tensor) -> list[Part]:
    """The parts of a model that can be measured, in model order.

    A module is one if the model calls it with a tensor alone. An attention or MLP with other
    arguments, such as a mask of windows, is measured layer by layer.
    """
    weights = prunable_weights(model)
    groups = unit_groups(model, weights=weights)
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    inputs = _inputs(model, images, [*(group.name for group in groups), *layers])

    parts = []
    for group in groups:
        names = tuple(name for name in weights if name in group.weights(weights))
        if inputs.get(group.name):
            parts.append(Part(group.name, names, group, inputs[group.name]))

    known = {name for part in parts for name in part.weights}
    for layer in layers:
        name = f"{layer}.weight"
        if name not in known and inputs.get(layer):
            parts.append(Part(layer, (name,), None, inputs[layer]))
    order = list(weights)
    return sorted(parts, key=lambda part: order.index(part.weights[0]))


def time_table(
    model: nn.Module,
    images: Tensor,
    parts: list[Part],
    choices: Mapping[str, Mapping[str, Choice]],
    *,
    kernels: Mapping = KERNELS,
    measure: Callable = in_turns,
    log: Callable[[str], object] = lambda line: None,
) -> TimeTable:
    """Measures a model and its parts. Call it under the autocast under which the model will run.

    The dense model and its parts are measured in turns. Each choice is measured in turns with the
    dense part, and counts as that share of the part's time: so it does not matter if the machine is
    slower for a while. Parts of one shape share their measurements.

    Args:
        model: dense, in evaluation mode; it is not changed.
        images: a batch as the model will see.
        choices: by part, then by their texts.
        kernels, measure: as for `sparse_kernels`.
        log: is called with a line for each shape.
    """
    first = {}
    for part in parts:
        first.setdefault(_alike(model, part), part)
    modules = {part.name: model.get_submodule(part.name) for part in first.values()}
    inputs = {part.name: _random(part, images.device) for part in first.values()}

    calls = {name: _call(module, inputs[name]) for name, module in modules.items()}
    seconds = measure({"": _call(model, images), **calls}, DENSE_BUDGET)
    dense = {part.name: seconds[first[_alike(model, part)].name] for part in parts}

    shares: dict[tuple[str, str], float | None] = {}
    found = {}
    for part in parts:
        own = first[_alike(model, part)]
        missing = {
            text: choice
            for text, choice in choices[part.name].items()
            if (own.name, text) not in shares
        }
        if missing:
            log(f"Measuring {part.name}, choices: {len(missing)}")
        for text, choice in missing.items():
            share = _share(modules[own.name], inputs[own.name], part, choice, kernels, measure)
            shares[own.name, text] = share
        found[part.name] = {
            text: dense[part.name] * share
            for text in choices[part.name]
            if (share := shares[own.name, text]) is not None
        }

    return TimeTable(seconds[""], dense, found)


def time_of_whole(
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor,
    *,
    kernels: Mapping = KERNELS,
    measure: Callable = in_turns,
) -> tuple[float, float]:
    """The seconds of a dense model, and of a pruned one with its quickest kernels, in turns."""
    quick, _ = sparse_kernels(pruned, images, kernels=kernels, measure=measure)
    taken = measure({DENSE: _call(dense, images), "pruned": _call(quick, images)}, WHOLE_BUDGET)
    return taken[DENSE], taken["pruned"]


def time_by_dtype(
    model: nn.Module, images: Tensor, measure: Callable = in_turns
) -> dict[torch.dtype, float]:
    """The seconds of a model in float32 and, under autocast, in bfloat16, in turns."""

    def under(dtype: torch.dtype) -> Callable[[], None]:
        call = _call(model, images)

        def in_dtype() -> None:
            with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                call()

        return in_dtype

    dtypes = (torch.float32, torch.bfloat16)
    taken = measure({str(dtype): under(dtype) for dtype in dtypes}, DENSE_BUDGET)
    return {dtype: taken[str(dtype)] for dtype in dtypes}


# ---- helpers, not exported ----


def _inputs(
    model: nn.Module, images: Tensor, names: list[str]
) -> dict[str, tuple[torch.Size, torch.dtype] | None]:
    """Shape and dtype of the input of each module that is called; None if it has others."""
    found: dict[str, tuple[torch.Size, torch.dtype] | None] = {}

    def watch(name: str):
        def note(module, arguments, named):
            others = [value for value in named.values() if value is not None and value is not False]
            alone = len(arguments) == 1 and isinstance(arguments[0], Tensor) and not others
            found[name] = (arguments[0].shape, arguments[0].dtype) if alone else None

        return model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)

    hooks = [watch(name) for name in names]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _alike(model: nn.Module, part: Part) -> tuple:
    """The same for parts that take the same time at the same choice."""
    module = model.get_submodule(part.name)
    shapes = tuple(weight.shape for weight in module.parameters())
    return type(module), getattr(module, "num_heads", 0), shapes, part.inputs


def _random(part: Part, device: torch.device) -> Tensor:
    assert part.inputs is not None
    shape, dtype = part.inputs
    return torch.randn(shape, device=device).to(dtype)


def _share(
    module: nn.Module, x: Tensor, part: Part, choice: Choice, kernels: Mapping, measure: Callable
) -> float | None:
    """The time of a part at a choice, as a share of its dense time; None if it has no such form."""

    def briefly(functions, budget):
        return measure(functions, min(budget, CHOICE_BUDGET))

    alone = nn.Sequential(module)
    if choice.units:
        chosen = with_units(alone, {"0": choice.units})
        if unit_counts(chosen)["0"] != choice.units:
            return None
    else:
        own = len(part.name)
        level = {f"0{name[own:]}": entry_of(text) for name, text in choice.levels.items()}
        config = {"sparsity": {"mode": "unstructured", "level": {"default": "dense", **level}}}
        chosen = copy.deepcopy(alone)
        Masks(chosen, compute_masks(chosen, "custom", custom_config=config))

    quick, _ = sparse_kernels(chosen, x, kernels=kernels, measure=briefly)
    if quick is chosen and not choice.units:
        return 1.0
    taken = briefly({DENSE: _call(alone, x), "quick": _call(quick, x)}, CHOICE_BUDGET)
    return taken["quick"] / taken[DENSE]


def _call(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function that calls the module and waits for the end."""

    def call() -> None:
        module(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call
