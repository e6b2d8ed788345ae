"""Sees every linear function that uses a weight, also within attention and convolutions.

It looks at functions, not at calls of layers, because some architectures use a layer's weight
without calling the layer. `nn.MultiheadAttention` is one: its weights are arguments of a single
function, which calls the linear functions. A convolution is computed as the linear function of what
each of its outputs sees.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .masks import as_matrix


class LinearCalls(TorchFunctionMode):
    """Calls `see` for each linear function that uses one of the weights. To be derived from.

    Attributes:
        in_attention: whether the function is called within torch's multi-head attention, where
            tokens come before images: (tokens, images, inputs), or rows in that order.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self.in_attention = False
        self._names = {id(weight): name for name, weight in weights.items()}

    def see(self, name: str, inputs: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The outputs of a linear function, which `compute` returns.

        name: of its weight. inputs: shape (..., inputs).
        """
        raise NotImplementedError

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self.in_attention = True
            try:
                with self:
                    return _open_attention(*args, **kwargs)
            finally:
                self.in_attention = False

        if func is F.linear:
            inputs, weight = _operands(args, kwargs)
            if name := self._names.get(id(weight)):
                return self.see(name, inputs, partial(func, *args, **kwargs))
        if func is F.conv2d and (name := self._names.get(id(_operands(args, kwargs)[1]))):
            return self._convolve(name, *args, **kwargs)
        return func(*args, **kwargs)

    def _convolve(self, name, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        """A convolution, as torch computes it, by its matrix."""
        if isinstance(padding, str):
            input, padding = _padded(input, weight, padding, dilation)
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        like = (torch.empty(values.shape, device="meta") for values in (input, weight))
        rows, columns = F.conv2d(*like, **options).shape[2:]

        # (images, places, inputs), the inputs in the order of `as_matrix`
        seen = F.unfold(input, weight.shape[2:], **options).unflatten(1, (weight.shape[1], -1))
        seen = seen.permute(0, 3, 2, 1).flatten(2)
        outputs = self.see(name, seen, partial(F.linear, seen, as_matrix(weight), bias))
        return outputs.transpose(1, 2).unflatten(2, (rows, columns))


# ---- helpers, not exported ----


def _operands(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Inputs and weight of a call of `F.linear` or `F.conv2d`."""
    return (*args, kwargs.get("weight"))[:2] if args else (kwargs["input"], kwargs["weight"])


def _padded(input: Tensor, weight: Tensor, padding: str, dilation) -> tuple[Tensor, int]:
    """The input of a convolution with `same` or `valid` as padding, and what is left to pad."""
    if padding == "valid":
        return input, 0
    steps = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    sides = []
    for size, step in zip(weight.shape[:1:-1], steps[::-1], strict=True):  # columns, then rows
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return F.pad(input, sides), 0


# Torch's function with one difference: it does not hand itself to the mode, only what it calls
_open_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_open_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
