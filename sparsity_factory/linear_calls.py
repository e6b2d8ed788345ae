"""Sees every linear function that uses a weight, also within torch's multi-head attention.

It looks at functions, not at calls of layers, because some architectures use a layer's weight
without calling the layer. `nn.MultiheadAttention` is one: its weights are arguments of a single
function, which calls the linear functions.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


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
        return func(*args, **kwargs)


# ---- helpers, not exported ----


def _operands(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Inputs and weight of a call of `F.linear`."""
    return (*args, kwargs.get("weight"))[:2] if args else (kwargs["input"], kwargs["weight"])


# Torch's function with one difference: it does not hand itself to the mode, only what it calls
_open_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_open_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
