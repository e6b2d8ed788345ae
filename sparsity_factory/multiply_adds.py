"""Multiply-adds of a model, by weight: counted while it runs, by torch's FlopCounterMode."""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .masks import prunable_weights

ATTENTION, OTHERS = "attention products", "other layers"


@torch.enable_grad()  # FlopCounterMode fails without, where a parameter is a module's input, as a class token is
def multiply_adds(model: nn.Module, images: Tensor) -> dict[str, int]:
    """How many multiply-adds the dense model spends on `images`, on each prunable weight and on everything else.

    Args:
        model: is run once in evaluation mode, and left as it was.
        images: its input, such as one image (1, 3, height, width), on the model's device.

    Returns:
        By parameter name, in model order; then `attention products`, which are products of activations with
        activations (queries with keys, attention with values), and `other layers` (patch embedding, classifier).
    """
    was_training = model.training
    model.eval()
    # Fused attention is taken apart, so that it counts alike whatever the device has a kernel for.
    with FlopCounterMode(display=False) as flops, _ByWeight(model, flops) as counts, sdpa_kernel(SDPBackend.MATH):
        model.forward(images)  # not by a call, which may be a compiled one
    model.train(was_training)
    return {name: counts.flops[name] // 2 for name in [*prunable_weights(model), ATTENTION, OTHERS]}


# ---- helpers, not exported ----


class _ByWeight(TorchFunctionMode):
    """Books the operations of each call of a torch function on the weight it is made with.

    Calls and not modules, since some architectures use a layer's weight without calling the layer.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode):
        super().__init__()
        self.flops, self._counter = Counter(), counter
        self._names = {id(weight): name for name, weight in prunable_weights(model).items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        if spent := self._counter.get_total_flops() - before:
            parameters = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)]
            names = [self._names[id(leaf)] for leaf in parameters if id(leaf) in self._names]
            self.flops[names[0] if names else OTHERS if parameters else ATTENTION] += spent
        return result
