"""How long each block of a model takes at each choice for it, as measured on this machine.

    parts = find_parts(model, images)
    table = time_table(model, images, {part: {"dense": Choice({}), ...} for part in parts})

A part is an attention, an MLP, or a linear layer of neither. It is measured as a whole: heads and
neurons as `shrink` leaves it, levels with the sparse kernels that are quickest. What the model
needs besides its parts, such as patch embedding and norms, is the rest.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .custom_yaml import entry_of
from .masks import Masks, prunable_weights
from .pruners import compute_masks
from .shrink import unit_counts, with_units
from .sparse_kernels import DENSE, KERNELS, in_turns, sparse_kernels
from .units import COLUMNS, Group, unit_groups

# Seconds for a kernel of a part, for a run of the model with other choices, and for whole models
KERNEL_BUDGET, RUN_BUDGET, WHOLE_BUDGET = 0.15, 2.0, 10.0
# How often such a run is repeated: its shortest times count
LEAST_ROUNDS, MOST_ROUNDS = 4, 30


class Choice(NamedTuple):
    """What a part keeps.

    levels: by weight, the text of a level; other weights are dense.
    units: how many heads or neurons stay, and then no level; 0: all.
    """

    levels: Mapping[str, str]
    units: int = 0


class Part(NamedTuple):
    """A module whose time is measured, and its prunable weights by name, in model order.

    group: its heads or neurons, if it has any.
    inputs: shape and dtype of its only input; None if it has none.
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


@torch.no_grad()
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

    Parts are measured within the model, where caches and memory are as they will be. Those of one
    shape share their measurements: in each of some runs every part has another choice, and the
    dense model runs in turns with that one. A choice counts as its share of the time of the same
    part in the dense model, the shortest of each, so that it does not matter if the machine is
    slower for a while. The times of the dense parts are the shortest of all runs.

    Args:
        model: dense, in evaluation mode; it is not changed.
        images: a batch as the model will see.
        choices: by part, then by their texts.
        kernels, measure: as for `sparse_kernels`, which chooses the kernels of each part.
        log: is called with a line for each run.
    """
    names = [part.name for part in parts]
    alike: dict[tuple, list[Part]] = {}
    for part in parts:
        alike.setdefault(_shape(model, part), []).append(part)
    waiting = {
        shape: {text: choice for part in same for text, choice in choices[part.name].items()}
        for shape, same in alike.items()
    }

    dense = _segments(model, images, names)
    shares: dict[tuple[tuple, str], float] = {}
    while left := sum(map(len, waiting.values())):
        log(f"Measuring the times of {left} choices")
        variant = copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})
        measured = []
        for shape, same in alike.items():
            for part in same[: len(waiting[shape])]:
                text = next(iter(waiting[shape]))
                choice = waiting[shape].pop(text)
                module = model.get_submodule(part.name)
                chosen = _variant(module, part, choice, images.device, kernels, measure)
                if chosen is module:
                    shares[shape, text] = 1.0
                elif chosen is not None:
                    variant.set_submodule(part.name, chosen)
                    measured.append((shape, text, part.name))

        if measured:
            before, after = _both(model, variant, images, names)
            dense = {key: min(dense[key], seconds) for key, seconds in before.items()}
            for shape, text, name in measured:
                shares[shape, text] = after[name] / before[name]

    times = {}
    for part in parts:
        shape = _shape(model, part)
        own = [text for text in choices[part.name] if (shape, text) in shares]
        times[part.name] = {text: dense[part.name] * shares[shape, text] for text in own}
    return TimeTable(sum(dense.values()), {name: dense[name] for name in names}, times)


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
    taken = measure({str(dtype): under(dtype) for dtype in dtypes}, WHOLE_BUDGET)
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


def _shape(model: nn.Module, part: Part) -> tuple:
    """The same for parts that take the same time at the same choice."""
    module = model.get_submodule(part.name)
    shapes = tuple(weight.shape for weight in module.parameters())
    return type(module), getattr(module, "num_heads", 0), shapes, part.inputs


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _both(
    dense: nn.Module, variant: nn.Module, images: Tensor, names: list[str]
) -> tuple[dict, dict]:
    """The shortest segments of two models that run in turns."""
    found = [_segments(model, images, names) for model in (dense, variant)]
    start = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - start > RUN_BUDGET:
            break
        for place, model in enumerate((dense, variant)):
            again = _segments(model, images, names)
            found[place] = {key: min(found[place][key], again[key]) for key in again}
    return found[0], found[1]


def _segments(model: nn.Module, images: Tensor, names: list[str]) -> dict[str | int, float]:
    """The seconds of each named module in one run of a model, and of the gaps between them.

    Gaps have numbers for names.
    """
    seconds: dict[str | int, float] = {}
    gaps: list[float] = []
    last = 0.0

    def since_last() -> float:
        nonlocal last
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        before, last = last, time.perf_counter()
        return last - before

    def watch(name: str) -> list:
        def begin(*_):
            gaps.append(since_last())

        def end(*_):
            seconds[name] = seconds.get(name, 0.0) + since_last()

        module = model.get_submodule(name)
        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    hooks = [hook for name in names for hook in watch(name)]
    last = time.perf_counter()
    try:
        model(images)
        gaps.append(since_last())
    finally:
        for hook in hooks:
            hook.remove()
    return {**seconds, **dict(enumerate(gaps))}


def _variant(
    module: nn.Module,
    part: Part,
    choice: Choice,
    device: torch.device,
    kernels: Mapping,
    measure: Callable,
) -> nn.Module | None:
    """A part at a choice, with its quickest kernels; the module itself if it stays dense.

    None if the choice cannot be made.
    """

    def briefly(functions, budget):
        return measure(functions, min(budget, KERNEL_BUDGET))

    alone = nn.Sequential(module)
    if choice.units:
        with torch.autocast(device.type, enabled=False):  # outputs are compared there
            chosen = with_units(alone, {"0": choice.units})
        if unit_counts(chosen)["0"] != choice.units:
            return None
    else:
        own = len(part.name)
        level = {f"0{name[own:]}": entry_of(text) for name, text in choice.levels.items()}
        config = {"sparsity": {"mode": "unstructured", "level": {"default": "dense", **level}}}
        chosen = copy.deepcopy(alone)
        Masks(chosen, compute_masks(chosen, "custom", custom_config=config))

    assert part.inputs is not None
    shape, dtype = part.inputs
    inputs = torch.randn(shape, device=device).to(dtype)
    quick, _ = sparse_kernels(chosen, inputs, kernels=kernels, measure=briefly)
    return module if quick is chosen and not choice.units else quick.get_submodule("0")


def _call(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function that calls the module and waits for the end."""

    def call() -> None:
        module(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call
