"""The compiled kernel: its products against the dense layer's, and how it is compiled and found."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import Clock, needs_compiler
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F

from models import build_model
from sparsity_factory import Masks, compute_masks, sparse_kernels
from sparsity_factory.tiles import Tiles, TilesAttention, TilesMlp, compiled, join_mlps

pytestmark = needs_compiler

RNG = torch.Generator().manual_seed(0)
PROCESSORS = ["x86-64", "x86-64-v3", "x86-64-v4"]


def compiled_for(processor):
    """The library for a processor, if this one can run it."""
    known = Path("/proc/cpuinfo").read_text()
    if processor != "x86-64" and {"v3": "avx2", "v4": "avx512f"}[processor[-2:]] not in known:
        pytest.skip("this processor has no such registers")
    return compiled(Tiles.source, processor)


def pruned(outputs, inputs, rows=1, kept=0.3, dtype=torch.float32):
    """A layer whose weights are kept in columns of `rows` outputs."""
    layer = nn.Linear(inputs, outputs)
    mask = torch.rand(outputs // rows, inputs, generator=RNG) < kept
    layer.weight.data = torch.randn(outputs, inputs, generator=RNG)
    layer.weight.data *= mask.repeat_interleave(rows, 0)
    layer.bias.data = torch.randn(outputs, generator=RNG)
    return layer.to(dtype).requires_grad_(False)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=RNG).to(dtype)


def assert_near(found, expected):
    """Equal up to rounding of the dtype, of numbers of the size of these."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    size = expected.abs().max().item() if expected.numel() else 1
    close = size * (1e-5 if found.dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=close)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """Nothing was compiled so far; returns the folder of what will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled.cache_clear()
    yield tmp_path / "cache/sparsify-deit"
    compiled.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 197, 1100])
@pytest.mark.parametrize(
    "outputs, inputs", [(32, 48), (1, 1), (7, 5), (100, 37), (40, 400)], ids=str
)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_products_equal_the_dense_layers_for_every_shape(rows, outputs, inputs, tokens, dtype):
    layer = pruned(outputs, inputs, rows if outputs % rows == 0 else 1, dtype=dtype)
    tiles, x = Tiles(layer, dtype), draw(tokens, inputs, dtype=dtype)
    assert_near(tiles(x), layer(x))


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_zeros_in_columns_of_outputs_are_found(rows):
    assert Tiles(pruned(64, 50, rows), torch.float32).rows == rows


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_every_width_of_registers_gives_the_same(rows, processor, monkeypatch):
    layer, x = pruned(48, 300, rows), draw(70, 300)
    library = compiled_for(processor)
    monkeypatch.setattr("sparsity_factory.tiles.compiled", lambda source: library)
    assert_near(Tiles(layer, torch.float32)(x), layer(x))
    half = layer.to(torch.bfloat16)
    assert_near(Tiles(half, torch.bfloat16)(x.bfloat16()), half(x.bfloat16()))


def test_several_threads_give_to_the_bit_what_one_gives():
    layer = Tiles(pruned(96, 200), torch.float32)
    few, many = draw(40, 200), draw(1000, 200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer(few), layer(many)
        torch.set_num_threads(3)
        assert torch.equal(layer(few), alone[0]) and torch.equal(layer(many), alone[1])
    finally:
        torch.set_num_threads(threads)


def test_under_autocast_float32_inputs_give_the_bfloat16_of_the_dense_layer():
    layer, x = pruned(32, 48), draw(50, 48)
    tiles = Tiles(layer, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(tiles(x), layer(x))


def test_rows_without_a_weight_give_the_bias():
    layer = pruned(20, 30, kept=0)
    assert torch.equal(Tiles(layer, torch.float32)(draw(3, 30)), layer.bias.expand(3, -1))


def test_inputs_of_another_width_are_refused_and_nothing_is_read_behind_them():
    tiles = Tiles(pruned(16, 32), torch.float32)
    with pytest.raises(RuntimeError, match="expected 32 inputs, got 31"):
        tiles(draw(4, 31))


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="for float32 and bfloat16"):
        Tiles(pruned(16, 32, dtype=torch.float64), torch.float64)


# ---- MLPs ----


class Mlp(nn.Module):
    def __init__(self, act, inputs=24, hidden=96, dtype=torch.float32):
        super().__init__()
        self.fc1 = pruned(hidden, inputs, dtype=dtype)
        self.act = act
        self.drop = nn.Dropout(0.5)
        self.fc2 = pruned(inputs, hidden, dtype=dtype)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Doubled(Mlp):
    def forward(self, x):
        return 2 * super().forward(x)


def with_tiles(mlp, dtype=torch.float32):
    """A model of the MLP with tiles in its layers."""
    mlp.fc1, mlp.fc2 = Tiles(mlp.fc1, dtype), Tiles(mlp.fc2, dtype)
    return nn.Sequential(mlp).eval()


@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_mlp_is_computed_as_one_with_the_results_and_names_of_its_layers(dtype, tokens):
    dense = nn.Sequential(Mlp(nn.GELU(), dtype=dtype)).eval()
    x = draw(tokens, 24, dtype=dtype)
    expected, names = dense(x), list(dense.state_dict())
    model = with_tiles(dense[0], dtype)
    join_mlps(model)
    assert isinstance(model[0], TilesMlp) and list(model.state_dict()) == names
    assert_near(model(x), expected)


@pytest.mark.parametrize(
    "mlp",
    [Mlp(nn.ReLU()), Mlp(nn.GELU("tanh")), Doubled(nn.GELU())],
    ids=["another activation", "another GELU", "another forward"],
)
def test_modules_that_compute_something_else_are_left_as_they_are(mlp):
    model = with_tiles(mlp)
    join_mlps(model)
    assert model[0] is mlp


def test_gelu_is_exact_to_float32():
    # Through an MLP of two layers that pass numbers on as they are
    mlp = Mlp(nn.GELU(), 1, 1)
    for layer in (mlp.fc1, mlp.fc2):
        layer.weight.data.fill_(1)
        layer.bias.data.zero_()
    model = with_tiles(mlp)
    join_mlps(model)
    x = torch.linspace(-12, 12, 20001)[:, None]
    error = (model(x) - F.gelu(x.double())).abs()
    assert error.max() < 1e-6


# ---- compiling ----


@pytest.mark.slow
def test_what_was_compiled_once_is_found_again(fresh_cache, monkeypatch):
    compiled(Tiles.source)
    (library,) = fresh_cache.iterdir()
    made = library.stat().st_mtime_ns

    compiled.cache_clear()
    compiled(Tiles.source)
    assert [file.stat().st_mtime_ns for file in fresh_cache.iterdir()] == [made]


@pytest.mark.slow
def test_a_damaged_library_is_compiled_again(fresh_cache):
    code = "from sparsity_factory.tiles import *; print(compiled(Tiles.source).multiplies_bfloat())"
    command = [sys.executable, "-c", code]
    first = subprocess.run(command, capture_output=True, check=True).stdout
    (library,) = fresh_cache.iterdir()
    library.write_bytes(b"not a library")
    assert subprocess.run(command, capture_output=True, check=True).stdout == first
    assert library.stat().st_size > 1000


@pytest.mark.slow
def test_where_no_cache_can_be_written_it_is_compiled_all_the_same(fresh_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    layer, x = pruned(16, 16), draw(2, 16)
    torch.testing.assert_close(Tiles(layer, torch.float32)(x), layer(x))


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler", r"no C\+\+ compiler: no-such-compiler is not installed"),
        ("false", r"the C\+\+ compiler false failed"),
    ],
)
def test_without_a_compiler_that_works_the_reason_is_listed_and_other_kernels_are_tried(
    compiler, reason, fresh_cache, monkeypatch
):
    monkeypatch.setenv("CXX", compiler)
    model = nn.Sequential(pruned(64, 64, kept=0.1))
    _, report = sparse_kernels(model, draw(4, 64))
    assert re.search(reason, report.layers[0].refused["tiles"])
    assert "without it from about 90 %" in report.table()
    assert "csr" in report.layers[0].seconds and "tiles" not in report.layers[0].seconds
    assert len([line for line in report.table().splitlines() if line.startswith("tiles:")]) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_its_threads_are_those_of_torch():
    code = """
import torch
from sparsity_factory.tiles import Tiles
layer = torch.nn.Linear(64, 64)
Tiles(layer, torch.float32)(torch.randn(900, 64))
print({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].lower()})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pools = {name for name in eval(done.stdout) if "iomp" not in name}
    assert len(pools) == 1 and "torch" in pools.pop()


# ---- attention ----


def attention_of(heads, width, dtype=torch.float32, **options):
    """timm's attention with random weights and these heads."""
    torch.manual_seed(0)
    module = Attention(heads * width, num_heads=heads, qkv_bias=True, **options)
    return module.to(dtype).eval().requires_grad_(False)


def assert_attention_near(found, expected):
    """Equal up to rounding, in float64 where torch's own result is rounded at each step."""
    close = expected.abs().max().item() * (1e-5 if found.dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images, tokens", [(0, 5), (1, 1), (3, 16), (2, 33), (1, 197)], ids=str)
@pytest.mark.parametrize("heads, width", [(1, 1), (3, 5), (2, 32), (3, 64), (1, 70)], ids=str)
def test_attention_equals_timms_for_every_shape(heads, width, images, tokens, dtype):
    module = attention_of(heads, width, dtype)
    x = 3 * draw(images, tokens, heads * width, dtype=dtype)
    quick = TilesAttention.of(module, x if images else draw(1, *x.shape[1:], dtype=dtype))
    if not images:
        assert quick(x).shape == x.shape
        return
    assert_attention_near(quick(x), copy.deepcopy(module).double()(x.double()))
    assert quick(x).dtype == dtype


@pytest.mark.parametrize("processor", PROCESSORS)
def test_attention_with_every_width_of_registers_gives_the_same(processor, monkeypatch):
    library = compiled_for(processor)
    monkeypatch.setattr("sparsity_factory.tiles.compiled", lambda source: library)
    for dtype in (torch.float32, torch.bfloat16):
        module, x = attention_of(3, 20, dtype), draw(2, 75, 60, dtype=dtype)
        quick = TilesAttention.of(module, x)
        assert_attention_near(quick(x), copy.deepcopy(module).double()(x.double()))


def test_large_scores_neither_overflow_nor_lose_the_largest():
    module, x = attention_of(2, 16), 1000 * draw(2, 40, 32)
    assert_attention_near(
        TilesAttention.of(module, x)(x), copy.deepcopy(module).double()(x.double())
    )


def test_a_nan_in_a_token_reaches_every_token_of_its_image_and_no_other_image():
    module, x = attention_of(2, 16), draw(2, 40, 32)
    quick = TilesAttention.of(module, x)
    x[0, 7, 3] = torch.nan
    assert quick(x)[0].isnan().all() and not quick(x)[1].isnan().any()


@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True}, {"scale_norm": True}, {"gated": True}],
    ids=["norms of queries and keys", "a norm of heads", "a gate"],
)
def test_attention_that_computes_something_else_is_left_alone(options):
    module = attention_of(2, 16, norm_layer=nn.LayerNorm, **options)
    assert TilesAttention.of(module, draw(2, 9, 32)) is None


def test_attention_of_another_class_is_left_alone():
    class Own(Attention):
        pass

    module = attention_of(2, 16)
    module.__class__ = Own
    assert TilesAttention.of(module, draw(2, 9, 32)) is None


def test_with_a_mask_attention_is_timms():
    module, x = attention_of(2, 16), draw(2, 9, 32)
    mask = torch.randn(2, 2, 9, 9, generator=RNG)
    assert torch.equal(TilesAttention.of(module, x)(x, attn_mask=mask), module(x, attn_mask=mask))


def test_attention_is_replaced_only_if_it_is_quicker():
    torch.manual_seed(0)
    model = build_model("deit_sample_patch4_28", 10, 28).eval()
    Masks(model, compute_masks(model, "unif", 0.5))
    images = draw(2, 3, 28, 28)
    names = list(model.state_dict())
    for seconds, count in ((1.0, 6), (2.0, 0)):
        clock = Clock(dense=2.0, csr=1.0, attention=seconds, sparse=1.0)
        quick, report = sparse_kernels(model, images, measure=clock)
        kinds = [type(block.attn) for block in quick.blocks]
        assert kinds.count(TilesAttention) == count and kinds.count(Attention) == 6 - count
        assert len(report.attention) == 6 and list(quick.state_dict()) == names
        torch.testing.assert_close(quick(images), model(images), rtol=1e-4, atol=1e-5)
        assert ("quick attention in 6 modules" in report.table()) == bool(count)
