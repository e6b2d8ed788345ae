"""Sparse kernels: their results against the dense layer's, and where they are used."""

import copy
import warnings

import pytest
import torch
from made_up import Clock, linears, needs_compiler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from models import build_model
from sparsity_factory import KERNELS, Masks, compute_masks, prunable_weights, sparse_kernels
from sparsity_factory.sparse_kernels import Bsr, Csr, in_turns

WITH_TORCH = ["csr-mkl", "csr", "bsr", "compact"]
CPU_KERNELS = [pytest.param("tiles", marks=needs_compiler), *WITH_TORCH]
RNG = torch.Generator().manual_seed(0)


def in_blocks(kept: torch.Tensor) -> nn.Linear:
    """A layer of 32 x 48 whose blocks of 16 x 16 are kept where `kept` (2, 3) says so."""
    layer = nn.Linear(48, 32)
    layer.weight.data = torch.randn(32, 48, generator=RNG) * kept.repeat_interleave(
        16, 0
    ).repeat_interleave(16, 1)
    layer.bias.data = torch.randn(32, generator=RNG)
    return layer.requires_grad_(False)


SOME = torch.tensor([[1, 0, 0], [1, 0, 1]])
NO_FIRST_ROWS = torch.tensor([[0, 0, 0], [1, 0, 1]])
NONE = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "kept", [SOME, NO_FIRST_ROWS, NONE], ids=["some", "rows wholly zero", "no weight kept"]
)
@pytest.mark.parametrize(
    "shape", [(48,), (5, 48), (2, 7, 48), (2, 3, 4, 48), (2, 150, 48), (0, 48)], ids=str
)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_a_kernel_equals_the_dense_layer_on_inputs_of_every_shape(kernel, shape, kept):
    layer, x = in_blocks(kept), torch.randn(shape, generator=RNG)
    with warnings.catch_warnings(action="error"):
        sparse = KERNELS[kernel](layer, torch.float32)
    assert sparse(x).shape == layer(x).shape
    torch.testing.assert_close(sparse(x), layer(x))
    layer.bias = None
    torch.testing.assert_close(KERNELS[kernel](layer, torch.float32)(x), layer(x))


@pytest.mark.parametrize(
    "kernel, dtype",
    [(kernel, dtype) for kernel in WITH_TORCH for dtype in (torch.bfloat16, torch.float64)]
    + [pytest.param("tiles", torch.bfloat16, marks=needs_compiler)],
)
def test_a_kernel_gives_the_dtype_of_the_dense_layer(kernel, dtype):
    layer, x = in_blocks(SOME).to(dtype), torch.randn(5, 48, generator=RNG).to(dtype)
    torch.testing.assert_close(KERNELS[kernel](layer, dtype)(x), layer(x))


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_under_autocast_a_kernel_gives_what_the_dense_layer_gives_there(kernel):
    layer, x = in_blocks(SOME), torch.randn(5, 48, generator=RNG)
    with torch.autocast("cpu", torch.bfloat16):
        dense, sparse = layer(x), KERNELS[kernel](layer, torch.bfloat16)(x)
    assert dense.dtype == sparse.dtype == torch.bfloat16
    torch.testing.assert_close(sparse, dense, rtol=2e-2, atol=5e-2)


def test_between_two_sparse_layers_nothing_is_transposed():
    first, second = linears(torch.randn(48, 32), torch.randn(16, 48))
    model = nn.Sequential(first, nn.GELU(), second, nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    Masks(model, compute_masks(model, "unif", 0.5))
    x = torch.randn(2, 7, 32)
    quick, _ = sparse_kernels(
        model, x, kernels={"csr": KERNELS["csr"]}, measure=Clock(dense=2.0, csr=1.0, sparse=1.0)
    )
    hidden = quick[:2](x)
    tokens = hidden.reshape(-1, 48).t()
    assert tokens.is_contiguous() and tokens.data_ptr() == hidden.data_ptr()
    assert quick[:3](x).is_contiguous()  # as what follows a dense layer expects it
    torch.testing.assert_close(quick(x), model(x))


def test_blocks_are_found_where_they_are_and_nowhere_else():
    assert Bsr.block(in_blocks(SOME).weight) == 16
    assert Bsr.block(torch.ones(128, 64) * (torch.arange(128) < 64)[:, None]) == 64
    assert Bsr.block(torch.ones(24, 48)) == 0
    assert Bsr.block(torch.rand(32, 32, generator=RNG) > 0.5) == 0


def pruned_sample(pruner="lamp", sparsity=0.9, **options):
    torch.manual_seed(0)
    model = build_model("deit_sample_patch4_28", 10, 28).eval()
    masks = Masks(model, compute_masks(model, pruner, sparsity, **options))
    return model, masks, torch.randn(3, 3, 28, 28, generator=RNG)


def kernels_in(model) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}


def test_a_layer_gets_the_quickest_kernel_and_the_model_gives_the_same_logits():
    model, _, images = pruned_sample()
    before, weights = model(images), copy.deepcopy(model.state_dict())
    quick, report = sparse_kernels(
        model, images, measure=Clock(dense=2.0, csr=1.0, csr_mkl=1.5, sparse=1.0)
    )
    assert kernels_in(quick) == {"Csr", "Linear"}  # the classifier is no prunable layer
    assert {layer.kernel for layer in report.layers} == {"csr"} and report.used
    torch.testing.assert_close(quick(images), before, rtol=1e-4, atol=1e-5)
    assert kernels_in(model) == {"Linear"} and torch.equal(model(images), before)
    assert list(quick.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in quick.state_dict().items())
    assert all(a is b for a, b in zip(quick.parameters(), model.parameters(), strict=True))


def test_a_layer_whose_kernels_are_not_quicker_beyond_the_noise_stays_dense():
    model, _, images = pruned_sample()
    clock = Clock(dense=1.0, csr=0.96, csr_mkl=2.0)
    quick, report = sparse_kernels(model, images, measure=clock)
    assert quick is model and {layer.kernel for layer in report.layers} == {"dense"}
    assert "sparse" not in clock.asked[-1], "there is no model to measure"
    assert "stays dense" in report.table()


def test_a_model_that_is_not_quicker_as_a_whole_stays_dense_and_the_report_says_so():
    model, _, images = pruned_sample()
    clock = Clock(dense=1.0, csr=0.5, sparse=1.1)
    quick, report = sparse_kernels(model, images, measure=clock)
    assert quick is model and not report.used and clock.asked[-1] == ["dense", "sparse"]
    assert "24 of 24 layers" in report.table() and "not quicker by 5 % as a whole" in report.table()


def test_in_a_dense_model_nothing_is_measured_or_replaced():
    model = build_model("deit_sample_patch4_28", 10, 28).eval()
    clock = Clock()
    quick, report = sparse_kernels(model, torch.zeros(1, 3, 28, 28), measure=clock)
    assert quick is model and not clock.asked and not report.layers
    assert report.table() == "Sparse kernels: no layer has zeros, so the model stays dense"


def test_a_layer_that_the_model_does_not_call_or_that_is_of_another_class_is_left_alone():
    class OfItsOwn(nn.Linear):
        pass

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.called, self.own = nn.Linear(8, 8), nn.Linear(8, 8), OfItsOwn(8, 8)

        def forward(self, x):
            x = nn.functional.linear(x, self.used.weight)  # without calling the layer
            return self.own(self.called(x)) + self.called.weight.sum()

    model = Uses()
    Masks(model, compute_masks(model, "unif", 0.5))
    x = torch.randn(3, 8)
    quick, report = sparse_kernels(model, x, measure=Clock(dense=2.0, csr=1.0, sparse=1.0))
    assert {layer.name: layer.kernel for layer in report.layers} == {
        "used.weight": "dense",
        "called.weight": "csr",
        "own.weight": "dense",
    }
    assert (
        type(quick.called).__name__ == "Csr"
        and type(quick.used) is nn.Linear
        and type(quick.own) is OfItsOwn
    )
    torch.testing.assert_close(quick(x), model(x))
    assert "the model does not call the layer (used.weight)" in report.table()


def test_a_kernel_that_fails_on_a_layer_is_listed_with_its_reason_and_the_layer_stays_dense():
    class Fails(Csr):
        def compute(self, x):
            raise RuntimeError("shapes of this kind\nare not supported")

    model, _, images = pruned_sample()
    quick, report = sparse_kernels(model, images, kernels={"fails": Fails}, measure=Clock())
    assert quick is model
    assert (
        "fails: shapes of this kind (24 layers, blocks.0.attn.qkv.weight the first)"
        in report.table()
    )


def test_the_table_has_a_line_for_each_layer_with_both_times():
    model, masks, images = pruned_sample()
    _, report = sparse_kernels(model, images, measure=Clock(dense=2.0, csr=1.0, sparse=1.0))
    lines = report.table().splitlines()
    for line, (name, mask) in zip(lines[1:], masks.items(), strict=False):
        sparsity = 1 - int(mask.sum()) / mask.numel()
        assert line.split() == [
            name,
            f"{sparsity:.2%}",
            "csr",
            "2000.00",
            "ms",
            "1000.00",
            "ms",
            "csr",
        ]
    assert lines[-1].endswith(
        "whole model, 3 images at once: dense 1.5, sparse 3.0 images/s, 2.00 times"
    )


def test_a_model_that_is_one_layer_becomes_that_layer():
    layer = in_blocks(SOME)
    quick, _ = sparse_kernels(
        layer, torch.randn(3, 48), measure=Clock(dense=2.0, bsr=1.0, sparse=1.0)
    )
    assert type(quick) is Bsr


def test_times_are_the_shortest_of_turns_after_a_first_call_that_is_not_counted():
    calls = []
    taken = in_turns(
        {name: lambda name=name: calls.append(name) for name in ("dense", "sparse")}, budget=0
    )
    assert (
        set(taken) == {"dense", "sparse"}
        and calls[:4] == ["dense", "sparse"] * 2
        and len(calls) <= 6
    )


# ---- 2:4, on the CPU as far as it goes ----


def test_2_of_4_compressed_and_expanded_gives_the_weights_of_every_layer():
    model, _, _ = pruned_sample("unif", None, pattern="2:4")
    for weight in prunable_weights(model).values():
        weight = weight.detach().half()
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.numel() * 2 == weight.numel()
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), weight)


def test_2_of_4_stays_on_the_device_of_the_layer(monkeypatch):
    # cuSPARSELt asks the GPU already when it compresses, CUTLASS does not.
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    with FakeTensorMode(), torch.device("cuda"):
        layer = KERNELS["2:4"](nn.Linear(128, 64, dtype=torch.float16), torch.float16)
        assert {layer.sparse.device.type, layer.offset.device.type} == {"cuda"}
        output = layer(torch.zeros(3, 7, 128, dtype=torch.float16))
        assert (
            output.device.type == "cuda"
            and output.shape == (3, 7, 64)
            and output.dtype == torch.float16
        )


def test_2_of_4_is_for_gpus_that_have_it_and_for_dtypes_that_it_does_not_round(monkeypatch):
    class OnCuda:  # a weight of zeros and ones as a GPU would have it
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, weight):
            self.weight, self.shape = weight, weight.shape

        def __ne__(self, other):
            return self.weight != other

    why_not, half, good = KERNELS["2:4"].why_not, torch.float16, OnCuda(torch.eye(4).repeat(1, 2))
    assert "CUDA" in why_not(torch.eye(4), half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8" in why_not(good, half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why_not(good, half) is None
    assert "TF32" in why_not(good, torch.float32)
    assert "two of four" in why_not(OnCuda(torch.ones(4, 8)), half)
    assert "two of four" in why_not(OnCuda(torch.eye(6)), half)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernel, options",
    [
        ("2:4", {"pattern": "2:4"}),
        ("bsr", {"sparsity": 0.8, "pattern": "block:16x16"}),
        ("compact", {"sparsity": 0.8, "pattern": "block:16x384"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_a_kernel_equals_the_dense_layer(kernel, options, dtype):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(384, 1152), nn.GELU(), nn.Linear(1152, 384))
        .to("cuda", dtype)
        .eval()
    )
    Masks(model, compute_masks(model, "unif", **options))
    images = torch.randn(4, 197, 384, device="cuda", dtype=dtype)
    quick, report = sparse_kernels(
        model,
        images,
        kernels={kernel: KERNELS[kernel]},
        measure=Clock(dense=20.0, **{kernel: 1.0}, sparse=1.0),
    )
    assert kernels_in(quick) != {"Linear"}, report.table()
    torch.testing.assert_close(quick(images), model(images).detach(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_on_a_gpu_layers_are_measured_and_what_is_not_taken_is_listed():
    model, _, images = pruned_sample("unif", None, pattern="2:4")
    with torch.autocast("cuda", torch.float16):
        quick, report = sparse_kernels(model.cuda(), images.cuda())
        torch.testing.assert_close(quick(images.cuda()), model(images.cuda()), rtol=2e-2, atol=2e-2)
    assert len(report.layers) == 24 and all(
        layer.seconds or layer.refused for layer in report.layers
    )


# ---- the command line ----


def test_an_evaluation_with_sparse_kernels_gives_the_accuracy_of_the_dense_one(
    run_main, tiny, monkeypatch
):
    used = []

    def measured(model, images):
        quick, report = sparse_kernels(model, images, measure=Clock(dense=2.0, csr=1.0, sparse=1.0))
        used.append(kernels_in(quick))
        return quick, report

    monkeypatch.setattr("trainer.epochs.sparse_kernels", measured)
    evaluate = [*tiny, "--eval", "--pruner", "lamp", "--sparsity", "0.8"]
    dense = run_main(*evaluate, "--output_dir", "dense").splitlines()[-1]
    assert not used
    printed = run_main(*evaluate, "--sparse-kernels", "--output_dir", "sparse")
    assert printed.splitlines()[-1] == dense
    assert (
        used == [{"Csr", "Linear"}]
        and "blocks.0.attn.qkv.weight" in printed
        and "2.00 times" in printed
    )


def test_sparse_kernels_on_a_dense_model_say_so_and_evaluate_it(run_main, tiny):
    printed = run_main(*tiny, "--eval", "--sparse-kernels")
    assert (
        "no layer has zeros, so the model stays dense" in printed
        and "Top-1 accuracy: dense" in printed
    )
