"""Counts the multiply-adds of a model by weight while it runs, with torch's FlopCounterMode."""

from collections import Counter
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .errors import PruningError
from .masks import dense_shapes, prunable_weights

ATTENTION, OTHERS = "attention products", "other layers"


def multiply_adds(model: nn.Module, images: Tensor) -> dict[str, int]:
    """The multiply-adds of the dense model on `images`, by prunable weight and for all else.

    Each weight of a shrunk model counts with the shape that it had in the dense one.

    Args:
        model: is run once in evaluation mode, and left as it was.
        images: its input, such as one image (1, 3, height, width), on the model's device.

    Returns:
        By parameter name, in model order; then `attention products`, which are products of
        activations with activations (queries with keys, attention with values), and `other layers`
        (patch embedding, classifier).
    """
    counts = _run(model, images)
    weights = prunable_weights(model)
    found = {name: counts.flops[name] // 2 for name in [*weights, ATTENTION, OTHERS]}

    dense = dense_shapes(model)
    for name, weight in weights.items():
        if name in dense:
            found[name] = found[name] * prod(dense[name]) // weight.numel()
    return found


def multiply_adds_of_modules(
    model: nn.Module, names: Sequence[str], images: Tensor
) -> tuple[list[int], int]:
    """The multiply-adds of each named module, and the total without other layers.

    The total is that of all prunable weights and attention products. Arguments are as for
    `multiply_adds`.
    """
    counts = _run(model, images, names)
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
def _run(model: nn.Module, images: Tensor, names: Sequence[str] = ()) -> "_ByWeight":
    """Runs a model once in evaluation mode, and counts."""
    was_training = model.training
    model.eval()
    hooks = []

    # Without fused attention the counts are the same on every device
    with (
        FlopCounterMode(display=False) as flops,
        _ByWeight(model, flops) as counts,
        sdpa_kernel(SDPBackend.MATH),
    ):
        for name in names:
            hooks += counts.watch(name, model.get_submodule(name))
        model.forward(images)  # a call may run compiled code

    for hook in hooks:
        hook.remove()
    model.train(was_training)
    return counts


class _ByWeight(TorchFunctionMode):
    """Counts the operations of each call of a torch function for the weight that it uses.

    It looks at functions, not modules, because some architectures use a layer's weight without
    calling the layer.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode):
        super().__init__()
        self.flops = Counter()
        self.modules = Counter()
        self._counter = counter
        self._names = {id(weight): name for name, weight in prunable_weights(model).items()}

    def watch(self, name: str, module: nn.Module) -> list:
        """Counts the operations of a module's calls; returns the hooks that do it."""

        def add(sign):
            self.modules[name] += sign * self._counter.get_total_flops()

        return [
            module.register_forward_pre_hook(lambda *_: add(-1)),
            module.register_forward_hook(lambda *_: add(1)),
        ]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        spent = self._counter.get_total_flops() - before
        if spent:
            self.flops[self._user(args, kwargs)] += spent
        return result

    def _user(self, args, kwargs) -> str:
        """The weight among the arguments of a function, or what else it computes."""
        leaves = tree_leaves((args, kwargs))
        parameters = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
        names = [self._names[id(leaf)] for leaf in parameters if id(leaf) in self._names]
        if names:
            return names[0]
        return OTHERS if parameters else ATTENTION
