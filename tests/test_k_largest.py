"""The k largest scores, found by counting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up import linears
from pretend_cuda import pretend_cuda

from sparsity_factory import compute_masks, prunable_weights
from sparsity_factory.k_largest import _CpuBins, _GpuBins, _k_largest_by_sorting, k_largest
from sparsity_factory.scores import Scores

# Many ties, several in one bin
few_values = st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.001, 1.002, 3.0, 1e30])


@given(st.lists(few_values, min_size=1, max_size=40), st.data())
def test_k_largest_keeps_the_k_largest_and_the_earlier_of_equals(values, data):
    k = data.draw(st.integers(0, len(values)))
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    for dtype in (torch.float32, torch.float64):
        score = torch.tensor(values, dtype=dtype)
        # As on CPUs, and as on GPUs
        for mask in (k_largest(score, k), _k_largest_by_sorting(score, k)):
            assert mask.nonzero().flatten().tolist() == sorted(best)


def test_k_largest_goes_row_major_through_a_transposed_score():
    score = torch.arange(12.0).view(3, 4).T
    assert not score.is_contiguous()
    assert torch.equal(k_largest(score, 5), score > 6)
    assert k_largest(torch.ones(3, 4).T, 4).tolist() == [
        [True] * 3,
        [True, False, False],
        [False] * 3,
        [False] * 3,
    ]


def test_k_largest_of_many_scores_has_the_same_threshold_as_sorting():
    # Several chunks
    score = torch.randn(1000, 700, generator=torch.Generator().manual_seed(0)).abs()
    k = 234_567
    assert torch.equal(
        k_largest(score, k), score >= score.flatten().sort(descending=True).values[k - 1]
    )


@pytest.mark.parametrize("pruner", ["glob", "lamp"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.999])
def test_a_gpu_keeps_what_the_cpu_keeps_of_all_layers_on_ties_too(pruner, sparsity):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randint(-4, 5, (size, 6), generator=generator).float() for size in (3, 5, 2)]
    here = compute_masks(linears(*weights), pruner, sparsity)
    with pretend_cuda():
        there = compute_masks(linears(*weights).to("cuda"), pruner, sparsity)
        assert all(torch.equal(here[name], mask.cpu()) for name, mask in there.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_gpu_keeps_what_the_cpu_keeps_of_layers_of_any_scale_by_lamp(dtype, scale):
    torch.manual_seed(0)
    weights = [torch.randn(40, size, dtype=dtype) for size in (30, 50, 70)]
    weights[1] *= scale
    weights[2][:20] = weights[2][20:]
    for sparsity in (0.1, 0.6, 0.99):
        here = compute_masks(linears(*weights), "lamp", sparsity)
        with pretend_cuda():
            there = compute_masks(linears(*weights).to("cuda"), "lamp", sparsity)
            assert all(torch.equal(here[name], mask.cpu()) for name, mask in there.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_squares_depend_neither_on_the_order_nor_on_the_device(dtype):
    torch.manual_seed(0)
    weight = torch.rand(600, 700, dtype=dtype)  # two chunks
    shuffled = weight.flatten()[torch.randperm(weight.numel())].view(weight.shape)

    def sums(weight, device="cpu", bins=_CpuBins):
        layer = bins(Scores(prunable_weights(linears(weight).to(device)))).layers()[0]
        return layer.squares, layer.at_least, layer.floor

    expected = sums(weight)
    with pretend_cuda():
        for found in (sums(shuffled), sums(shuffled, "cuda", _GpuBins)):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert expected[0][0].item() == pytest.approx(
        math.fsum(weight.double().square().flatten().tolist()), rel=1e-13
    )
