"""The kernels for scattered zeros and for attention on CPUs: C++ that is compiled at first use.

`tiles.cpp` says how it computes. It needs a C++ compiler, as `torch.compile` does on CPUs: `CXX`,
or `g++`. What was compiled is kept in `~/.cache/sparsify-deit`, by source, compiler and processor.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .sparse_layers import SparseLinear


class TileLayer(ctypes.Structure):
    """`Layer` of tiles.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("inputs", "outputs", "rows", "parts", "half")),
        *((name, ctypes.c_void_p) for name in ("start", "entries", "bias")),
    ]


@functools.cache
def compiled(source: Path, processor: str = "native") -> ctypes.CDLL:
    """The library of tiles.cpp, compiled for a processor if that was not done before.

    processor: as the compiler's flag -march names it.

    Raises RuntimeError, with one line, if there is no compiler or it fails.
    """
    name = os.environ.get("CXX") or "g++"
    compiler = shutil.which(name)
    if not compiler:
        raise RuntimeError(f"no C++ compiler: {name} is not installed")

    def run(*arguments) -> bytes:
        command = [compiler, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            errors = done.stderr.decode(errors="replace").splitlines() or ["no message"]
            reason = next((line for line in errors if "error" in line), errors[0])
            raise RuntimeError(f"the C++ compiler {name} failed: {reason}")
        return done.stdout

    # Threads of torch's own pool: linked with the OpenMP that torch brings
    pools = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    flags = ["-std=c++17", "-O3", f"-march={processor}", "-fPIC", *(["-fopenmp"] if pools else [])]

    # The macros of a compiler name its version and what the processor can do
    macros = run(*flags, "-x", "c++", "-dM", "-E", os.devnull)
    key = hashlib.sha256(source.read_bytes() + macros + repr((flags, pools)).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsify-deit"
    library = cache / f"tiles-{key[:32]}.so"
    with contextlib.suppress(OSError):  # it is not there, or damaged
        return ctypes.CDLL(str(library))

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "tiles.so")
        run(*flags, "-c", source, "-o", made.with_suffix(".o"))
        run("-shared", made.with_suffix(".o"), *pools, "-o", made)
        with contextlib.suppress(OSError):  # without a cache it is compiled again next time
            cache.mkdir(parents=True, exist_ok=True)
            kept = cache / f"{library.name}.{os.getpid()}.tmp"
            shutil.copyfile(made, kept)
            os.replace(kept, library)
        return ctypes.CDLL(str(made))


class Tiles(SparseLinear):
    """Scattered zeros, or zeros in columns of 2, 4 or 8 outputs, on CPUs: the C++ of tiles.cpp.

    bfloat16 layers are multiplied in bfloat16 if the processor has AVX512_BF16, else in float32.
    """

    source = Path(__file__).with_name("tiles.cpp")
    needs = (TileLayer, compiled)
    dtypes = (torch.float32, torch.bfloat16)
    tokens = 32  # T of tiles.cpp
    bytes_of_part = 24 * 1024  # of a tile: less than the first-level cache

    @classmethod
    def why_not(cls, weight: Tensor, dtype: torch.dtype) -> str | None:
        if weight.device.type != "cpu":
            return "for CPUs"
        if dtype not in cls.dtypes:
            return "for float32 and bfloat16"
        if weight.numel() >= 2**26:  # numbers of entries have 32 bits
            return "for weights of less than 67 million numbers"
        try:
            compiled(cls.source)
        except RuntimeError as error:
            # As docs/performance.md measured it
            cost = "with it, zeros pay from about 50 % on, without it from about 90 %, in float32"
            return f"{error}; {cost}"
        return None

    @torch.no_grad()
    def prepare(self, weight: Tensor, bias: Tensor | None) -> None:
        if reason := self.why_not(weight, self.dtype):
            raise RuntimeError(reason)
        outputs, inputs = weight.shape
        self.rows = self.block(weight)
        library = compiled(self.source)
        self.half = self.dtype == torch.bfloat16 and bool(library.multiplies_bfloat())
        part = self.bytes_of_part // (self.tokens * (2 if self.half else 4))
        self.parts = max(1, -(-inputs // part))

        # Columns of weights that are kept, in the order of the parts and blocks
        blocks = -(-outputs // self.rows)
        padded = weight.new_zeros(blocks * self.rows, inputs, dtype=torch.float32)
        padded[:outputs] = weight
        columns = padded.view(blocks, self.rows, inputs).transpose(1, 2)
        block, column = (columns != 0).any(2).nonzero(as_tuple=True)
        group = column // part * blocks + block
        order = group.argsort(stable=True)
        block, column, group = block[order], column[order], group[order]

        counts = group.bincount(minlength=self.parts * blocks)
        entries = self.pairs if self.half else self.singles
        places, self.entries = entries(columns[block, column], column, group, counts)
        self.start = torch.cat([places.new_zeros(1), places.cumsum(0)]).int()
        self.offset = padded.new_zeros(len(padded))
        if bias is not None:
            self.offset[:outputs] = bias

    @classmethod
    def block(cls, weight: Tensor) -> int:
        """How many outputs have their zeros together: 8, 4, 2 or 1."""
        nonzero = weight != 0
        kept = int(nonzero.count_nonzero())
        for size in (8, 4, 2):
            if len(weight) % size == 0:
                blocks = nonzero.unflatten(0, (-1, size)).any(1)
                if int(blocks.count_nonzero()) * size <= 1.05 * kept:
                    return size
        return 1

    def singles(self, values, column, group, counts) -> tuple[Tensor, Tensor]:
        """Entries for float32: where the tile has the input, then the weights.

        values: (columns, rows). group: of each column. counts: columns of each group.

        Returns the number of entries of each group, and the entries, int32.
        """
        place = (column * self.tokens).int()
        return counts, torch.cat([place[:, None], values.contiguous().view(torch.int32)], 1)

    def pairs(self, values, column, group, counts) -> tuple[Tensor, Tensor]:
        """Entries for bfloat16: where the tile has two inputs, then pairs of weights."""
        places = (counts + 1) // 2
        within = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group]
        entry = (places.cumsum(0) - places)[group] + within // 2
        side = within % 2

        # A column without a partner is paired with input 0 and a weight of zero
        size = int(places.sum())
        inputs = torch.zeros(size, 2, dtype=torch.int32)
        inputs[entry, side] = (column * self.tokens).int()
        weights = torch.zeros(size, self.rows, 2, dtype=torch.bfloat16)
        weights[entry, :, side] = values.bfloat16()
        return places, torch.cat([inputs, weights.view(torch.int32).squeeze(2)], 1)

    def compute(self, x: Tensor) -> Tensor:
        return self.multiply([self], x)

    @staticmethod
    def multiply(layers: list["Tiles"], x: Tensor) -> Tensor:
        """The outputs of the last of one or two layers, with GELU after the first of two.

        Raises RuntimeError if x has not the inputs of the first layer.
        """
        first, last = layers[0], layers[-1]
        if x.shape[-1] != first.in_features:
            raise RuntimeError(f"expected {first.in_features} inputs, got {x.shape[-1]}")
        if x.dtype not in Tiles.dtypes:
            x = x.to(first.dtype)
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], last.out_features, dtype=last.dtype)

        described = (TileLayer * len(layers))()
        for place, layer in enumerate(layers):
            pointers = (layer.start.data_ptr(), layer.entries.data_ptr(), layer.offset.data_ptr())
            described[place] = TileLayer(
                *(layer.in_features, layer.out_features, layer.rows, layer.parts),
                *(layer.half, *pointers),
            )
        half = torch.bfloat16
        compiled(first.source).multiply(
            *(described, len(layers)),
            *(ctypes.c_void_p(x.data_ptr()), x.dtype == half),
            *(ctypes.c_void_p(y.data_ptr()), y.dtype == half),
            ctypes.c_int64(x.numel() // max(1, first.in_features)),
        )
        return y


class TilesMlp(nn.Module):
    """Two layers of `Tiles` with GELU between them: activations stay in tiles.

    It keeps the names of the module whose place it takes.

    Args:
        mlp: a module that `suits`.
    """

    def __init__(self, mlp: nn.Module):
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.layers = [child for child in mlp.children() if isinstance(child, Tiles)]
        self.train(mlp.training)

    @staticmethod
    def suits(mlp: nn.Module) -> bool:
        """Whether a module may be such an MLP, by its children; what it computes is to be tried."""
        children = [
            child for child in mlp.children() if not isinstance(child, (nn.Identity, nn.Dropout))
        ]
        kinds = [type(child) for child in children]
        if kinds != [Tiles, nn.GELU, Tiles] or children[1].approximate != "none":
            return False
        first, _, second = children
        return first.half == second.half and first.out_features == second.in_features

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return Tiles.multiply(self.layers, x)


@torch.no_grad()
def join_mlps(model: nn.Module) -> None:
    """Puts `TilesMlp` in the place of modules that compute the same, which is tried."""
    for name, module in list(model.named_modules()):
        if not (name and TilesMlp.suits(module)):
            continue
        joined = TilesMlp(module)
        first = joined.layers[0]
        x = torch.randn(2, first.in_features).to(first.dtype)
        expected = module(x).float()
        rounding = 1e-4 if first.dtype == torch.float32 else 3e-2
        if (joined(x).float() - expected).norm() <= rounding * expected.norm():
            model.set_submodule(name, joined)


class TilesAttention(nn.Module):
    """timm's attention by tiles.cpp: the scores of a head never leave the processor's cache.

    For float32 and bfloat16 on CPUs, in evaluation mode. With an attention mask, it computes as
    timm does. It takes the place of a module's class, which `plain` remembers.
    """

    plain: type[nn.Module]

    @torch.no_grad()
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kinds) -> Tensor:
        if attn_mask is not None or any(kinds.values()):
            return self.plain.forward(self, x, attn_mask, **kinds)
        return self.proj_drop(self.proj(self.attend(self.qkv(x))))

    def attend(self, qkv: Tensor) -> Tensor:
        """What each token attends to, (images, tokens, heads * width).

        qkv: (images, tokens, 3 * heads * width).

        Raises RuntimeError if it has another shape or dtype.
        """
        images, tokens, numbers = qkv.shape
        if self.num_heads < 1 or numbers % (3 * self.num_heads):
            raise RuntimeError(f"expected 3 numbers for each of {self.num_heads} heads")
        if qkv.dtype not in Tiles.dtypes or qkv.device.type != "cpu":
            raise RuntimeError(f"for float32 and bfloat16 on CPUs, got {qkv.dtype}, {qkv.device}")

        qkv = qkv.contiguous()
        heads = qkv.new_empty(images, tokens, numbers // 3)
        compiled(Tiles.source).attend(
            *(ctypes.c_void_p(qkv.data_ptr()), ctypes.c_void_p(heads.data_ptr())),
            *(qkv.dtype == torch.bfloat16, ctypes.c_int64(images), tokens, self.num_heads),
            *(numbers // 3 // self.num_heads, ctypes.c_float(self.scale)),
        )
        return heads

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """Whether it is timm's attention itself; without timm none is."""
        timm = sys.modules.get("timm.models.vision_transformer")
        return timm is not None and type(module) is timm.Attention

    @staticmethod
    @torch.no_grad()
    def of(attention: nn.Module, x: Tensor) -> "TilesAttention | None":
        """A copy that shares its layers, or None if it does not compute the same.

        x: inputs, (images, tokens, width), on which both are tried.
        """
        if not TilesAttention.knows(attention) or attention.training:
            return None
        quick = copy.copy(attention)
        quick.plain = type(attention)
        quick.__class__ = TilesAttention
        try:
            found = quick(x)
        except RuntimeError:  # no compiler, or another dtype or device
            return None

        expected = attention(x)
        rounding = 1e-4 if expected.dtype == torch.float32 else 3e-2
        same = (found - expected).float().norm() <= rounding * expected.float().norm()
        return quick if found.dtype == expected.dtype and same else None
