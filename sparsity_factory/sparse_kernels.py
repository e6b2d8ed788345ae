"""Sparse kernels: which layers of a pruned model run faster with their zeros left out, measured
where they run.

    quick, report = sparse_kernels(model, images)
    print(report.table())

A kernel is a class in `KERNELS`: a linear layer that computes with another form of its weight.
`why_not` gives the reason against a kernel for a weight. A kernel that fails for any other reason
raises RuntimeError when it is tried; then the layer stays dense.
"""

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from .masks import prunable_weights

DENSE = "dense"
# A kernel has to take at most this part of the dense time, since times repeat to some percent only
WORTH = 0.95
# Seconds for the measurements of a layer, and of the whole model
BUDGET, WHOLE_BUDGET = 0.5, 5.0
HOPELESS = 2  # a kernel that once took so many times the dense time is not measured further


class SparseLinear(nn.Linear):
    """A linear layer that leaves out zeros of its weight; for inference only, no gradients flow.

    It holds the parameters of the dense layer itself, so that state dicts, names and counts stay
    those of the dense model. The sparse form is made once, on the weight's device: it follows
    neither later changes nor moves of it.

    Args:
        linear: the dense layer.
        dtype: that of the outputs, as the dense layer would give them.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight = linear.weight
        self.bias = linear.bias
        self.dtype = dtype
        self.train(linear.training)
        # Torch calls each of its sparse formats a prototype
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.prepare(
                linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
            )

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.compute(x)

    @staticmethod
    def why_not(weight: Tensor, dtype: torch.dtype) -> str | None:
        """Why this kernel is not for such a weight, or None. dtype: that in which the dense layer
        computes.
        """
        raise NotImplementedError

    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        raise NotImplementedError

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Transposed(SparseLinear):
    """Sparse weight (outputs, inputs) times transposed activations (inputs, tokens).

    Attributes:
        hands_on: the result stays as it lies in memory, with the shape that the dense layer's has.
            An activation function keeps that order, so that between two such layers, as in an MLP,
            nothing is transposed.
    """

    hands_on = False
    # Tokens at once: those of two images of 224 x 224; from there on more made no difference
    chunk = 400

    def compute(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features).t().to(self.column.dtype)
        outputs = tokens.new_empty(self.out_features, tokens.shape[1])
        for part, into in zip(
            tokens.split(self.chunk, 1), outputs.split(self.chunk, 1), strict=True
        ):
            self.multiply(part.contiguous(), into)
        outputs = outputs.t().to(self.dtype)
        return (outputs if self.hands_on else outputs.contiguous()).view(
            *x.shape[:-1], self.out_features
        )

    def multiply(self, tokens: Tensor, into: Tensor) -> None:
        torch.addmm(self.column, self.sparse, tokens, out=into)

    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.is_cuda:
            self.chunk = 2**31 - 1
            weight = weight.to(self.dtype)
        else:  # where no sparse product takes less than float32
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self.sparse = self.compress(weight)
        self.column = (
            weight.new_zeros(len(weight), 1) if bias is None else bias.to(weight.dtype)[:, None]
        )

    @classmethod
    def compress(cls, weight: Tensor) -> Tensor:
        # With the short indices that MKL has, which else are converted at each call
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
        """The largest side of blocks that are either zero or have hardly a zero in them; 0 where
        there is none.
        """
        kept = int(weight.count_nonzero())
        for size in cls.sizes:
            if all(side % size == 0 for side in weight.shape):
                blocks = (
                    (weight != 0).unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)
                )
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
        groups = weight.shape[1] % 4 == 0 and (weight != 0).unflatten(1, (-1, 4)).sum(2).max() <= 2
        return None if groups else "more than two of four weights are kept"

    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        self.sparse = to_sparse_semi_structured(weight.to(self.dtype).contiguous())
        self.offset = None if bias is None else bias.to(self.dtype)

    def compute(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.sparse, self.offset)


class Compact(SparseLinear):
    """A dense product without the inputs and outputs that are wholly pruned, as those of heads and
    neurons are.
    """

    @staticmethod
    def why_not(weight: Tensor, dtype: torch.dtype) -> str | None:
        kept = weight != 0
        return (
            "no input or output is wholly pruned"
            if bool(kept.any(0).all() and kept.any(1).all())
            else None
        )

    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        kept = weight != 0
        self.rows, self.columns = (kept.any(dim).nonzero().flatten() for dim in (1, 0))
        weight = weight.to(self.dtype)
        self.small = weight[self.rows][:, self.columns]
        self.offset = weight.new_zeros(len(weight)) if bias is None else bias.to(self.dtype)

    def compute(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        x = x if len(self.columns) == self.in_features else x.index_select(-1, self.columns)
        y = F.linear(x, self.small, self.offset[self.rows])
        if len(self.rows) == self.out_features:
            return y
        return self.offset.expand(*y.shape[:-1], -1).index_copy(-1, self.rows, y)


#: The kernels by name, in the order in which they are tried.
KERNELS: dict[str, type[SparseLinear]] = {
    "csr-mkl": MklCsr,
    "csr": Csr,
    "bsr": Bsr,
    "2:4": TwoOfFour,
    "compact": Compact,
}


class LayerTimes(NamedTuple):
    """What was measured of a layer that has zeros.

    seconds: of one call, by kernel, `dense` among them; empty where nothing could be measured.
    refused: by kernel, why it is not for this layer.
    """

    name: str
    sparsity: float
    seconds: Mapping[str, float]
    refused: Mapping[str, str]

    @property
    def quickest(self) -> str | None:
        """The quickest sparse kernel that was measured."""
        return min(
            (name for name in self.seconds if name != DENSE), key=self.seconds.get, default=None
        )

    @property
    def kernel(self) -> str:
        """The kernel to use: dense unless a sparse one is quicker beyond the noise."""
        best = self.quickest
        return best if best and self.seconds[best] <= WORTH * self.seconds[DENSE] else DENSE


class KernelReport(NamedTuple):
    """What `sparse_kernels` measured. seconds: of the whole model on `images` images, dense and, if
    tried, sparse.
    """

    layers: Sequence[LayerTimes]
    images: int
    seconds: Mapping[str, float]

    @property
    def used(self) -> bool:
        """Whether the model as a whole is quicker with its kernels."""
        return self.seconds.get("sparse", float("inf")) <= WORTH * self.seconds.get(DENSE, 0.0)

    def table(self) -> str:
        """All of it as text: a line for each layer, what each kernel is not for, and the whole
        model.
        """
        cells = [("layer", "sparsity", "kernel", "dense", "sparse", "by")]
        for layer in self.layers:
            best = layer.quickest
            cells.append(
                (
                    layer.name,
                    f"{layer.sparsity:.2%}",
                    layer.kernel,
                    _milliseconds(layer.seconds.get(DENSE)),
                    _milliseconds(layer.seconds.get(best)),
                    best or "none",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in cells
        ]
        reasons = {}
        for layer in self.layers:
            for kernel, reason in layer.refused.items():
                reasons.setdefault((kernel, reason), []).append(layer.name)
        lines += [
            f"{kernel}: {reason} ({_names(names)})" for (kernel, reason), names in reasons.items()
        ]
        return "\n".join([*(lines if self.layers else []), self.in_words()])

    def in_words(self) -> str:
        """The whole model in one line."""
        if not self.layers:
            return "Sparse kernels: no layer has zeros, so the model stays dense"
        if "sparse" not in self.seconds:
            return "Sparse kernels: no layer is quicker than dense, so the model stays dense"
        rates = ", ".join(
            f"{name} {self.images / taken:,.1f}" for name, taken in self.seconds.items()
        )
        count = sum(layer.kernel != DENSE for layer in self.layers)
        return (
            f"Sparse kernels in {count} of {len(self.layers)} layers, whole model, {self.images} "
            f"images at once: {rates} images/s, "
            f"{self.seconds[DENSE] / self.seconds['sparse']:.2f} times"
            + ("" if self.used else "; not quicker by 5 % as a whole, so the model stays dense")
        )


@torch.no_grad()
def in_turns(functions: Mapping[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """The shortest seconds of each function, called in turns, since the speed of a machine drifts.

    budget: seconds after which no further round begins; two are always made, after a first one that
    is not counted.
    """
    for function in functions.values():
        function()
    taken = {}
    start = time.perf_counter()
    rounds = 0
    while rounds < 2 or time.perf_counter() - start < budget and rounds < 50:
        for name, function in functions.items():
            if rounds and taken[name] > HOPELESS * taken.get(DENSE, float("inf")):
                continue
            began = time.perf_counter()
            function()
            taken[name] = min(taken.get(name, float("inf")), time.perf_counter() - began)
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
    """Gives a pruned model sparse kernels in the layers where they are measured to be quicker, for
    inference.

    Call it under the autocast under which the model will run. Layers are measured one by one on
    random inputs of the shapes that they have in the model, and their outputs put into the order
    that a dense layer gives. Between two sparse layers that is saved, so that the model gains more
    than its layers; it is measured as a whole as well.

    Args:
        model: in evaluation mode; not changed. Only plain `nn.Linear` that it calls are replaced.
        images: a batch as the model will see, on its device.
        kernels: those to try, by name.
        measure: called with functions by name, `dense` first, and the seconds it may take; returns
            those of each.

    Returns:
        A copy of the model with the quickest kernels, which shares its parameters, or `model`
        itself where it is not quicker; and what was measured. Outputs are equal to rounding.
    """
    weights = {name: weight for name, weight in prunable_weights(model).items() if not weight.all()}
    layers = {
        name: model.get_submodule(name.removesuffix("weight").rstrip(".")) for name in weights
    }
    inputs = _inputs(model, images, layers.values())
    times, chosen = [], {}
    for name, layer in layers.items():
        timed, built = _try_kernels(name, layer, inputs.get(layer), kernels, measure)
        times.append(timed)
        if timed.kernel != DENSE:
            chosen[name.removesuffix("weight").rstrip(".")] = built[timed.kernel]
    report = KernelReport(times, len(images), {})
    if not chosen:
        return model, report
    quick = _with_layers(model, chosen)
    _hand_on(quick, images)
    whole = {DENSE: _call(model, images), "sparse": _call(quick, images)}
    report = report._replace(seconds=measure(whole, WHOLE_BUDGET))
    return (quick if report.used else model), report


# ---- helpers, not exported ----


def _try_kernels(name, layer, x, kernels, measure) -> tuple[LayerTimes, dict[str, SparseLinear]]:
    """Measures each kernel that takes the layer on inputs like `x`, a shape and a dtype, or None if
    it has none.
    """
    weight = layer.weight
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    if x is None:
        return LayerTimes(name, sparsity, {}, {"none": "the model does not call the layer"}), {}
    if type(layer) is not nn.Linear:
        return LayerTimes(
            name, sparsity, {}, {"none": f"a {type(layer).__name__} is no plain linear layer"}
        ), {}
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    images = torch.randn(x[0], device=weight.device).to(x[1])
    built, refused = {}, {}
    for kernel, make in kernels.items():
        try:
            if reason := make.why_not(weight, dtype):
                refused[kernel] = reason
                continue
            sparse = make(layer, dtype)
            sparse(images)
            built[kernel] = sparse
        except RuntimeError as error:  # a shape or dtype that torch has no kernel for
            refused[kernel] = str(error).partition("\n")[0]
    seconds = {}
    if built:
        seconds = measure(
            {kind: _call(module, images) for kind, module in {DENSE: layer, **built}.items()},
            BUDGET,
        )
    return LayerTimes(name, sparsity, seconds, refused), built


def _inputs(
    model: nn.Module, images: Tensor, layers
) -> dict[nn.Module, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of what each of the layers is called with; those that are not called are
    missing.
    """
    found = {}

    def note(layer, arguments):
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
    """A copy of the model with these layers, by name, in the place of its own; it shares parameters
    and buffers.
    """
    copied = copy.deepcopy(
        model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    )
    for name, layer in layers.items():
        if not name:  # the model is the layer
            return layer
        copied.set_submodule(name, layer)
    return copied


def _hand_on(model: nn.Module, images: Tensor) -> None:
    """Lets those layers hand their results on transposed whose result reaches the next sparse layer
    so.
    """
    calls = []
    layers = [module for module in model.modules() if isinstance(module, Transposed)]
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, arguments: calls.append((layer, arguments[0].stride(-1)))
        )
        for layer in layers
    ]
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
    """One call of the module, to its end, and with its output in the usual order."""

    def call():
        module(x).contiguous()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f} ms"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} the first"
