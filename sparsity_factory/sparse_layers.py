"""Linear layers that compute with another form of their weight, without its zeros.

`why_not` gives the reason against a kernel for a weight. If a kernel raises RuntimeError when it is
tried, it is not used for that layer.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured


class SparseLinear(nn.Linear):
    """A linear layer that leaves out zeros of its weight; for inference only, no gradients flow.

    It holds the parameters of the dense layer itself, so that state dicts, names and counts stay
    those of the dense model. The sparse form is made once, on the weight's device. It does not
    follow later changes of the weight, nor a move to another device.

    Args:
        linear: the dense layer.
        dtype: the dtype of the outputs, as the dense layer would give them.

    Attributes:
        needs: functions and classes without which the class cannot compute.
    """

    needs: tuple = ()

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight = linear.weight
        self.bias = linear.bias
        self.dtype = dtype
        self.train(linear.training)

        bias = None if linear.bias is None else linear.bias.detach()
        # torch warns that its sparse formats are prototypes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.prepare(linear.weight.detach(), bias)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.compute(x)

    @staticmethod
    def why_not(weight: Tensor, dtype: torch.dtype) -> str | None:
        """Why this kernel is not for such a weight, or None.

        dtype: the dtype in which the dense layer computes.
        """
        raise NotImplementedError

    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        """Makes the sparse form of the weight."""
        raise NotImplementedError

    def compute(self, x: Tensor) -> Tensor:
        """The outputs for inputs of shape (..., inputs)."""
        raise NotImplementedError


class Transposed(SparseLinear):
    """Sparse weight (outputs, inputs) times transposed activations (inputs, tokens).

    Attributes:
        hands_on: whether the result keeps its transposed order in memory, though it has the shape
            of the dense layer's. An activation function keeps that order, so that between two such
            layers, as in an MLP, nothing is transposed.
    """

    hands_on = False
    # How many tokens to multiply at once: those of two 224 x 224 images; more were not faster
    chunk = 400

    def compute(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features).t().to(self.column.dtype)
        outputs = tokens.new_empty(self.out_features, tokens.shape[1])
        parts = zip(tokens.split(self.chunk, 1), outputs.split(self.chunk, 1), strict=True)
        for part, into in parts:
            self.multiply(part.contiguous(), into)

        outputs = outputs.t().to(self.dtype)
        if not self.hands_on:
            outputs = outputs.contiguous()
        return outputs.view(*x.shape[:-1], self.out_features)

    def multiply(self, tokens: Tensor, into: Tensor) -> None:
        """Writes the outputs for tokens (inputs, tokens) to `into`, (outputs, tokens)."""
        torch.addmm(self.column, self.sparse, tokens, out=into)

    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.is_cuda:
            self.chunk = 2**31 - 1
            weight = weight.to(self.dtype)
        else:  # sparse products on CPUs need float32 or more
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))

        self.sparse = self.compress(weight)
        if bias is None:
            self.column = weight.new_zeros(len(weight), 1)
        else:
            self.column = bias.to(weight.dtype)[:, None]

    @classmethod
    def compress(cls, weight: Tensor) -> Tensor:
        """The sparse form of a weight."""
        # MKL has 32-bit indices; longer ones would be converted at each call
        rows = weight.to_sparse_csr()
        return torch.sparse_csr_tensor(
            rows.crow_indices().int(), rows.col_indices().int(), rows.values(), rows.shape
        )


class MklCsr(Transposed):
    """Compressed sparse rows on CPUs, multiplied by MKL."""

    @staticmethod
    def why_not(weight: Tensor, dtype: torch.dtype) -> str | None:
        if weight.device.type != "cpu":
            return "for CPUs"
        return None if torch.backends.mkl.is_available() else "this build of torch has no MKL"


class Csr(Transposed):
    """Compressed sparse rows on CPUs, multiplied by torch's own kernel."""

    @staticmethod
    def why_not(weight: Tensor, dtype: torch.dtype) -> str | None:
        return None if weight.device.type == "cpu" else "for CPUs"

    def multiply(self, tokens: Tensor, into: Tensor) -> None:
        torch.add(torch.sparse.mm(self.sparse, tokens, reduce="sum"), self.column, out=into)


class Bsr(Transposed):
    """Compressed rows of square blocks, for the block patterns."""

    sizes = (64, 32, 16)

    @classmethod
    def why_not(cls, weight: Tensor, dtype: torch.dtype) -> str | None:
        return None if cls.block(weight) else "its zeros are not in blocks of 16 x 16 or larger"

    @classmethod
    def block(cls, weight: Tensor) -> int:
        """The largest side of blocks that are either all zero or have hardly a zero, or 0."""
        nonzero = weight != 0
        kept = int(nonzero.count_nonzero())
        for size in cls.sizes:
            if any(side % size for side in weight.shape):
                continue
            blocks = nonzero.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)
            if int(blocks.count_nonzero()) * size**2 <= 1.05 * kept:
                return size
        return 0

    @classmethod
    def compress(cls, weight: Tensor) -> Tensor:
        size = cls.block(weight)
        return weight.to_sparse_bsr((size, size))


class TwoOfFour(SparseLinear):
    """2:4 on CUDA of compute capability 8 and above, by torch's SparseSemiStructuredTensor."""

    @staticmethod
    def why_not(weight: Tensor, dtype: torch.dtype) -> str | None:
        if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
            return "for CUDA of compute capability 8 and above"
        if dtype not in (torch.float16, torch.bfloat16):
            return "for float16 and bfloat16; float32 would be rounded to TF32"
        in_groups = weight.shape[1] % 4 == 0
        if in_groups and (weight != 0).unflatten(1, (-1, 4)).sum(2).max() <= 2:
            return None
        return "more than two of four weights are kept"

    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        self.sparse = to_sparse_semi_structured(weight.to(self.dtype).contiguous())
        self.offset = None if bias is None else bias.to(self.dtype)

    def compute(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.sparse, self.offset)


class Compact(SparseLinear):
    """A dense product without wholly pruned inputs and outputs, such as those of pruned heads."""

    @staticmethod
    def why_not(weight: Tensor, dtype: torch.dtype) -> str | None:
        kept = weight != 0
        if bool(kept.any(0).all() and kept.any(1).all()):
            return "no input or output is wholly pruned"
        return None

    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        kept = weight != 0
        self.rows = kept.any(1).nonzero().flatten()
        self.columns = kept.any(0).nonzero().flatten()
        weight = weight.to(self.dtype)
        self.small = weight[self.rows][:, self.columns]
        self.offset = weight.new_zeros(len(weight)) if bias is None else bias.to(self.dtype)

    def compute(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if len(self.columns) < self.in_features:
            x = x.index_select(-1, self.columns)
        y = F.linear(x, self.small, self.offset[self.rows])
        if len(self.rows) == self.out_features:
            return y
        return self.offset.expand(*y.shape[:-1], -1).index_copy(-1, self.rows, y)
