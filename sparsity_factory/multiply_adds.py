"""Counts the multiply-adds of a model by weight while it runs, with torch's FlopCounterMode."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .errors import PruningError
from .masks import dense_shapes, prunable_weights
from .statistics import evaluation

ATTENTION, OTHERS = "attention products", "other layers"


def multiply_adds(model: nn.Module, images: Tensor) -> dict[str, int]:
    """The multiply-adds of the dense model on `images`, by prunable weight and for all else.

    Each weight of a shrunk model counts with the shape that it had in the dense one.

    Args:
        model: is run once in evaluation mode, and left as it was, each module in its own mode.
        images: its input, such as one image (1, 3, height, width), on the model's device.

    Returns:
        By parameter name, in model order; then `attention products`, which are products of
        activations with activations (queries with keys, attention with values), and `other layers`
        (patch embedding, classifier).
    """
    weights = prunable_weights(model)
    counts = _run(model, images, weights)
    found = {name: counts.flops[name] // 2 for name in [*weights, ATTENTION, OTHERS]}

    dense = dense_shapes(model)
    for name, weight in weights.items():
        if name in dense:
            found[name] = found[name] * prod(dense[name]) // weight.numel()
    return found


def multiply_adds_of_modules(
    model: nn.Module, names: Sequence[str], images: Tensor, weights: Mapping[str, Tensor]
) -> tuple[list[int], int]:
    """The multiply-adds of each named module, and the total without other layers.

    The total is that of `weights`, the prunable ones by name, and of attention products. Other
    arguments are as for `multiply_adds`.
    """
    counts = _run(model, images, weights, names)
    total = sum(counts.flops.values()) // 2 - counts.flops[OTHERS] // 2
    return [counts.modules[name] // 2 for name in names], total


def image_of(model: nn.Module) -> Tensor:
    """An image of zeros, shape (1, channels, height, width), of the size that the model expects.

    Raises:
        PruningError: the model lacks the attribute that timm's transformers have for it.
    """
    try:
        height, width = model.patch_embed.img_size
        like = model.patch_embed.proj.weight
        return torch.zeros(1, like.shape[1], height, width, dtype=like.dtype, device=like.device)
    except (AttributeError, TypeError, ValueError, IndexError):
        raise PruningError(
            f"budget macs: {type(model).__name__} does not say for which images it is: expected a "
            "transformer of timm with patch_embed.img_size"
        ) from None


# ---- helpers, not exported ----


# FlopCounterMode needs gradients if a parameter is a module's input, as a class token is
@torch.enable_grad()
def _run(
    model: nn.Module, images: Tensor, weights: Mapping[str, Tensor], names: Sequence[str] = ()
) -> "_ByWeight":
    """Runs a model once in evaluation mode, and counts."""
    hooks = []
    fast_path = torch.backends.mha.get_fastpath_enabled()

    # Without fused attention the counts are the same on every device
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            evaluation(model),
            FlopCounterMode(display=False) as flops,
            _ByWeight(model, weights, flops) as counts,
            sdpa_kernel(SDPBackend.MATH),
        ):
            for name in names:
                hooks += counts.watch(name, model.get_submodule(name))
            model.forward(images)  # a call may run compiled code
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()
    return counts


class _ByWeight(TorchFunctionMode):
    """Counts the operations of each call of a torch function for the weight that it uses.

    It looks at functions, not modules, because some architectures use a layer's weight without
    calling the layer.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], counter: FlopCounterMode):
        super().__init__()
        self.flops = Counter()
        self.modules = Counter()
        self.counter = counter
        names = {id(weight): name for name, weight in weights.items()}
        self.parameters = [
            (parameter, names.get(id(parameter), OTHERS)) for parameter in model.parameters()
        ]
        self._names = names

    def watch(self, name: str, module: nn.Module) -> list:
        """Counts the operations of a module's calls; returns the hooks that do it."""

        def add(sign):
            self.modules[name] += sign * self.counter.get_total_flops()

        return [
            module.register_forward_pre_hook(lambda *_: add(-1)),
            module.register_forward_hook(lambda *_: add(1)),
        ]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # A function of several layers: each of its operations counts by itself
        if func is F.multi_head_attention_forward:
            with _ByStorage(self):
                return func(*args, **(kwargs or {}))

        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        spent = self.counter.get_total_flops() - before
        if spent:
            leaves = tree_leaves((args, kwargs))
            parameters = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
            self.book(spent, [self._names.get(id(leaf), OTHERS) for leaf in parameters])
        return result

    def book(self, spent: int, names: list[str]) -> None:
        """Counts an operation for the first weight that it uses, or for what else it computes.

        names: of the operation's parameters; `OTHERS` for those that are not prunable.
        """
        prunable = [name for name in names if name != OTHERS]
        if prunable:
            self.flops[prunable[0]] += spent
        else:
            self.flops[OTHERS if names else ATTENTION] += spent


class _ByStorage(TorchDispatchMode):
    """Counts the operations inside of a function, whose operands are views of the weights."""

    def __init__(self, counts: _ByWeight):
        super().__init__()
        self._counts = counts
        self._names = {_storage(parameter): name for parameter, name in counts.parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self._counts.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        spent = self._counts.counter.get_total_flops() - before
        if spent:
            leaves = tree_leaves((args, kwargs))
            storages = [_storage(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
            names = [self._names[storage] for storage in storages if storage in self._names]
            self._counts.book(spent, names)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
