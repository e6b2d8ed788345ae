"""Sparse kernels: runs layers of a pruned model without their zeros if that measures faster.

    quick, report = sparse_kernels(model, images)
    print(report.table())

A kernel is a class in `KERNELS`, a `SparseLinear` of sparse_layers.py or tiles.py.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .masks import prunable_weights
from .sparse_layers import Bsr, Compact, Csr, MklCsr, SparseLinear, Transposed, TwoOfFour
from .tiles import Tiles, TilesAttention, join_mlps

DENSE = "dense"
# A kernel has to take at most this fraction of the dense time, since times vary by some percent.
WORTH = 0.95
# Seconds for the measurements of a layer, and for those of the whole model.
BUDGET = 0.25
WHOLE_BUDGET = 5.0
# A kernel that once took this many times the dense time is not measured again.
HOPELESS = 2

#: The kernels by name, in the order in which they are tried.
KERNELS: dict[str, type[SparseLinear]] = {
    "tiles": Tiles,
    "csr-mkl": MklCsr,
    "csr": Csr,
    "bsr": Bsr,
    "2:4": TwoOfFour,
    "compact": Compact,
}


class LayerTimes(NamedTuple):
    """The times of a layer that has zeros, or of an attention module.

    seconds: by kernel, `dense` among them, the time of one call; empty if nothing could be
        measured.
    refused: by kernel, why it is not for this layer.
    """

    name: str
    sparsity: float
    seconds: Mapping[str, float]
    refused: Mapping[str, str]

    @property
    def quickest(self) -> str | None:
        """The quickest sparse kernel that was measured, or None."""
        sparse = [name for name in self.seconds if name != DENSE]
        return min(sparse, key=lambda name: self.seconds[name], default=None)

    @property
    def kernel(self) -> str:
        """The kernel to use: dense, unless a sparse one is quicker by more than the noise."""
        best = self.quickest
        return best if best and self.seconds[best] <= WORTH * self.seconds[DENSE] else DENSE


class KernelReport(NamedTuple):
    """What `sparse_kernels` measured.

    images: how many images the whole model was given at once.
    seconds: the time of the whole model, `dense` and, if anything has a kernel, `sparse`.
    attention: the times of attention modules with the kernels of the layers in them, by torch
        (`dense`) and by tiles.cpp (`attention`); those of one shape share a measurement.
    """

    layers: Sequence[LayerTimes]
    images: int
    seconds: Mapping[str, float]
    attention: Sequence[LayerTimes]

    @property
    def used(self) -> bool:
        """Whether the model as a whole is quicker with its kernels."""
        return self.seconds.get("sparse", float("inf")) <= WORTH * self.seconds.get(DENSE, 0.0)

    def table(self) -> str:
        """The report as text: each layer, the reasons against kernels, and the whole model."""
        if not self.layers:
            return self.in_words()

        cells = [("layer", "sparsity", "kernel", "dense", "sparse", "by")]
        for layer in (*self.layers, *self.attention):
            best = layer.quickest
            cells.append(
                (
                    layer.name,
                    f"{layer.sparsity:.2%}" if layer.sparsity else "-",
                    layer.kernel,
                    _milliseconds(layer.seconds.get(DENSE)),
                    _milliseconds(layer.seconds[best] if best else None),
                    best or "none",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for name, *others in cells:
            lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))

        # One line for each kernel and reason against it, with the layers that share the reason
        names_by_reason = {}
        for layer in self.layers:
            for kernel, reason in layer.refused.items():
                names_by_reason.setdefault((kernel, reason), []).append(layer.name)
        for (kernel, reason), names in names_by_reason.items():
            lines.append(f"{kernel}: {reason} ({_names(names)})")

        return "\n".join([*lines, self.in_words()])

    def in_words(self) -> str:
        """The whole model in one line."""
        if not self.layers:
            return "Sparse kernels: no layer has zeros, so the model stays dense"
        if "sparse" not in self.seconds:
            return "Sparse kernels: no layer is quicker than dense, so the model stays dense"

        count = sum(layer.kernel != DENSE for layer in self.layers)
        attention = sum(module.kernel != DENSE for module in self.attention)
        rates = ", ".join(
            f"{name} {self.images / taken:,.1f}" for name, taken in self.seconds.items()
        )
        ratio = self.seconds[DENSE] / self.seconds["sparse"]
        unused = "; not quicker by 5 % as a whole, so the model stays dense"
        return (
            f"Sparse kernels in {count} of {len(self.layers)} layers"
            f"{f', quick attention in {attention} modules' if attention else ''}, whole model, "
            f"{self.images} images at once: {rates} images/s, {ratio:.2f} times"
            f"{'' if self.used else unused}"
        )


@torch.no_grad()
def in_turns(functions: Mapping[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """The shortest time of each function in seconds.

    Functions are called in turns, since the speed of a machine drifts.

    budget: seconds after which no further round begins. After a first round that is not counted,
        there are always two.
    """
    for function in functions.values():
        function()

    taken = {}
    rounds = 0
    start = time.perf_counter()
    while rounds < 2 or (rounds < 50 and time.perf_counter() - start < budget):
        for name, function in functions.items():
            if rounds and taken[name] > HOPELESS * taken.get(DENSE, float("inf")):
                continue
            began = time.perf_counter()
            function()
            seconds = time.perf_counter() - began
            taken[name] = min(taken.get(name, float("inf")), seconds)
        rounds += 1
    return taken


@torch.no_grad()
def sparse_kernels(
    model: nn.Module,
    images: Tensor,
    *,
    kernels: Mapping[str, type[SparseLinear]] = KERNELS,
    measure: Callable = in_turns,
) -> tuple[nn.Module, KernelReport]:
    """Gives a pruned model sparse kernels in the layers that they make quicker, for inference.

    Call it under the autocast under which the model will run. Layers are measured one by one on
    random inputs of the shapes that they have in the model, including the time to bring outputs
    into the order of a dense layer. Between two sparse layers the model saves that time, so it can
    gain more than its layers. Attention of timm that has zeros is computed by tiles.cpp if that is
    quicker. The model is also measured as a whole.

    Args:
        model: a module in evaluation mode, which is not changed. Only plain `nn.Linear` layers that
            it calls are replaced.
        images: a batch as the model will see, on the model's device.
        kernels: the kernels to try, by name. That for attention is tried with `Tiles`.
        measure: called with functions by name, `dense` first, and the seconds it may take; returns
            the seconds of each function.

    Returns:
        A copy of the model with the quickest kernels, which shares its parameters, or `model`
        itself if the copy is not quicker; and the report. Outputs are equal up to rounding.
    """
    # A weight of torch's multi-head attention has no layer of its own
    weights = prunable_weights(model).items()
    pruned = [
        name
        for name, weight in weights
        if weight.dim() == 2 and not name.endswith("_weight") and not weight.all()
    ]
    paths = {name: name.removesuffix("weight").rstrip(".") for name in pruned}
    layers = {name: model.get_submodule(path) for name, path in paths.items()}

    # Each layer by itself
    inputs = _inputs(model, images, layers.values())
    times = []
    chosen = {}
    for name, layer in layers.items():
        timed, built = _try_kernels(name, layer, inputs.get(layer), kernels, measure)
        times.append(timed)
        if timed.kernel != DENSE:
            chosen[paths[name]] = built[timed.kernel]

    report = KernelReport(times, len(images), {}, [])
    if not times:
        return model, report

    # The modules around them
    quick = _with_layers(model, chosen)
    _hand_on(quick, images)
    join_mlps(quick)
    if Tiles in kernels.values():
        around = dict.fromkeys(path.rpartition(".")[0] for path in paths.values())
        report = report._replace(attention=_quick_attention(quick, around, images, measure))
    if not chosen and all(module.kernel == DENSE for module in report.attention):
        return model, report

    # The whole model
    calls = {DENSE: _call(model, images), "sparse": _call(quick, images)}
    report = report._replace(seconds=measure(calls, WHOLE_BUDGET))
    return (quick if report.used else model), report


# ---- helpers, not exported ----


def _try_kernels(name, layer, x, kernels, measure) -> tuple[LayerTimes, dict[str, SparseLinear]]:
    """Measures each kernel that suits the layer; returns the times and the kernels by name.

    x: shape and dtype of the layer's inputs, or None if the model does not call it.
    """
    weight = layer.weight
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    if x is None:
        return LayerTimes(name, sparsity, {}, {"none": "the model does not call the layer"}), {}
    if type(layer) is not nn.Linear:
        reason = f"a {type(layer).__name__} is no plain linear layer"
        return LayerTimes(name, sparsity, {}, {"none": reason}), {}

    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    shape, input_dtype = x
    inputs = torch.randn(shape, device=weight.device).to(input_dtype)

    built = {}
    refused = {}
    for kernel, make in kernels.items():
        try:
            if reason := make.why_not(weight, dtype):
                refused[kernel] = reason
                continue
            sparse = make(layer, dtype)
            sparse(inputs)
            built[kernel] = sparse
        except RuntimeError as error:  # torch has no kernel for this shape or dtype
            refused[kernel] = str(error).partition("\n")[0]

    seconds = {}
    if built:
        calls = {kind: _call(module, inputs) for kind, module in {DENSE: layer, **built}.items()}
        seconds = measure(calls, BUDGET)
    return LayerTimes(name, sparsity, seconds, refused), built


def _quick_attention(
    model: nn.Module, names: Iterable[str], images: Tensor, measure
) -> list[LayerTimes]:
    """Puts `TilesAttention` in the place of those modules of these names that it makes quicker."""
    modules = {name: model.get_submodule(name) for name in names if name}
    modules = {name: module for name, module in modules.items() if TilesAttention.knows(module)}
    inputs = _inputs(model, images, modules.values())

    seconds = {}
    times = []
    for name, module in modules.items():
        shape, dtype = inputs.get(module, ((), None))
        x = torch.randn(shape, device=images.device).to(dtype)
        if len(shape) != 3 or not (quick := TilesAttention.of(module, x[:2])):
            continue

        kind = (shape, dtype, module.num_heads, type(module.qkv), type(module.proj))
        if kind not in seconds:
            seconds[kind] = measure({DENSE: _call(module, x), "attention": _call(quick, x)}, BUDGET)
        times.append(LayerTimes(name, 0.0, seconds[kind], {}))
        if times[-1].kernel != DENSE:
            model.set_submodule(name, quick)
    return times


def _inputs(
    model: nn.Module, images: Tensor, layers
) -> dict[nn.Module, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of the inputs of each layer that the model calls."""
    found = {}

    def note(layer, arguments):
        if arguments:
            found.setdefault(layer, (arguments[0].shape, arguments[0].dtype))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        if hooks:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _with_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model that has these layers, by name, and shares parameters and buffers."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, shared)
    for name, layer in layers.items():
        if not name:  # the model is the layer
            return layer
        copied.set_submodule(name, layer)
    return copied


def _hand_on(model: nn.Module, images: Tensor) -> None:
    """Sets `hands_on` of the layers whose transposed result reaches the next sparse layer so."""
    calls = []

    def note(layer, arguments):
        calls.append((layer, arguments[0].stride(-1)))

    # Run the model with all layers handing on, and see in which order inputs arrive
    layers = [module for module in model.modules() if isinstance(module, Transposed)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    for layer in layers:
        layer.hands_on = True
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()

    for layer in layers:
        layer.hands_on = False
    for (layer, _), (_, stride) in pairwise(calls):
        layer.hands_on = stride != 1


def _call(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function that calls the module, brings its output into order, and waits for the end."""

    def call():
        module(x).contiguous()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f} ms"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} the first"
