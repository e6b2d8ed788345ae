"""What removing weights one after the other costs, against eliminations with a new inverse for
every step.
"""

import pytest
import torch

from sparsity_factory import PruningError
from sparsity_factory import removal_costs as module
from sparsity_factory.removal_costs import (
    DAMPING,
    RELATIVE_DAMPING,
    add_squares,
    cut,
    halves,
    removal_costs,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of 16 weights; two are eliminated together."""
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "ON_CPU", 2)


def fisher_of(shape, images, seed=0, scale=1.0):
    gradients = torch.randn(
        images, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    by_block = cut(scale * gradients * torch.linspace(0.1, 3, shape[1])).transpose(0, 1)
    return by_block.mT @ by_block / images


def halves_of(matrices):
    """The lower halves of symmetric matrices, row after row."""
    rows, columns = torch.tril_indices(*matrices.shape[1:])
    return matrices[:, rows, columns]


def damped(fisher):
    return (
        fisher
        + (DAMPING + RELATIVE_DAMPING * fisher.diagonal().mean()) * torch.eye(len(fisher)).double()
    )


def brute_force(weight, fisher) -> tuple[torch.Tensor, list[list[int]]]:
    """The costs, and for each block its weights in the order of their removal."""
    costs, orders = [], []
    for start, block in zip(range(0, weight.numel(), 16), fisher, strict=True):
        w = weight.flatten()[start : start + 16].clone()
        full, left, total, order, found = (
            damped(block),
            list(range(len(w))),
            0.0,
            [],
            [0.0] * len(w),
        )
        while left:
            inverse = torch.linalg.inv(full[left][:, left])
            cost = w[left] ** 2 / (2 * inverse.diagonal())
            at = int(cost.argmin())
            total += float(cost[at])
            w[left] -= w[left[at]] / inverse[at, at] * inverse[:, at]
            order.append(left.pop(at))
            found[order[-1]] = total
        costs += found
        orders.append(order)
    return torch.tensor(costs, dtype=torch.float64).view(weight.shape), orders


@pytest.mark.parametrize("shape", [(5, 7), (4, 4), (1, 3), (6, 16)])
@pytest.mark.parametrize("images", [100, 6])  # of full rank, and of less
def test_removal_costs_equal_those_with_the_inverse_of_what_is_left_computed_anew(shape, images):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fisher = fisher_of(shape, images)
    expected, _ = brute_force(weight, fisher)
    squares = halves_of(images * fisher)
    before = squares.clone()
    costs = removal_costs(weight, squares, images)
    torch.testing.assert_close(costs, expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(squares, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves_add_up_the_products_of_gradients_of_single_images(dtype):
    gradients = torch.randn(3, 2, 5, 7, dtype=dtype)
    total = torch.zeros(halves(35), dtype=dtype)
    for of_images in gradients:
        add_squares(total, of_images)
    by_block = cut(gradients.flatten(0, 1))
    expected = sum(block[:, :, None] * block[:, None] for block in by_block)
    torch.testing.assert_close(total, halves_of(expected))


def test_the_costs_add_up_to_what_the_loss_rises_when_the_others_move_to_the_best_place():
    weight = torch.randn(4, 4, dtype=torch.float64)
    fisher = fisher_of((4, 4), 100)
    costs = removal_costs(weight, halves_of(fisher), 1).flatten()
    _, (order, *_) = brute_force(weight, fisher)
    full, w = damped(fisher[0]), weight.flatten()
    for count in range(1, 17):
        gone, left = order[:count], order[count:]
        change = torch.zeros(16, dtype=torch.float64)
        change[gone] = -w[gone]
        change[left] = torch.linalg.solve(full[left][:, left], full[left][:, gone] @ w[gone])
        torch.testing.assert_close(costs[order[count - 1]], change @ full @ change / 2)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-3, 1.0, 1e3, 1e12])
@pytest.mark.parametrize("images", [1, 5, 16])
def test_costs_are_finite_and_rise_in_the_order_of_removal_whatever_rank_and_scale(scale, images):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[0] = 0
    weight[1] = weight[2]
    costs = removal_costs(weight, halves_of(fisher_of((8, 8), images, scale=scale)), 1)
    assert costs.isfinite().all()
    assert not costs[0].any()
    by_block = cut(costs).sort(1).values
    assert (by_block >= 0).all()
    assert (by_block[:, 8:].diff() > 0).all()


def test_without_gradients_it_is_magnitude_and_of_equal_weights_the_later_goes_first():
    weight = torch.tensor([[3.0, -1.0, 2.0, 1.0]])
    costs = removal_costs(weight, torch.zeros(1, 10, dtype=torch.float64), 1)
    expected = torch.tensor([[15.0, 2.0, 6.0, 1.0]], dtype=torch.float64) * DAMPING / 2
    torch.testing.assert_close(costs, expected)


def test_weights_that_are_pruned_already_change_nothing_for_the_others():
    """Their gradients do not count: as if the block were that of the others alone."""
    weight = torch.randn(1, 12, dtype=torch.float64)
    weight[0, 8:] = 0
    fisher = fisher_of((1, 12), 50)
    fewer = removal_costs(weight[:, :8], halves_of(fisher[:, :8, :8]), 1)
    costs = removal_costs(weight, halves_of(fisher), 1)
    # Nearly, as the damping is a share of the mean over the block
    torch.testing.assert_close(costs[:, :8], fewer, rtol=1e-2, atol=0)


@pytest.mark.parametrize("images", [1, 2, 8, 100])
def test_sums_in_float32_give_nearly_the_costs_of_float64_whatever_rank(images, monkeypatch):
    """Rounding leaves matrices of less than full rank with negative eigenvalues."""
    monkeypatch.setattr(module, "BLOCK", 192)
    generator = torch.Generator().manual_seed(images)
    weight = 0.1 * torch.randn(64, 192, generator=generator)
    gradients = 1e-3 * torch.randn(images, 64, 192, generator=generator)
    totals = [
        torch.zeros(halves(weight.numel()), dtype=dtype) for dtype in (torch.float32, torch.float64)
    ]
    for total in totals:
        for gradient in gradients.split(4):
            add_squares(total, gradient)
    rough, exact = (removal_costs(weight, total, images) for total in totals)
    assert rough.isfinite().all()
    assert float((rough / exact).log().abs().median()) < 1e-3


def test_a_matrix_that_rounding_keeps_from_being_factored_has_more_damping(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    blocks = [[[1.0, 1.001], [1.001, 1.0]], [[2.0, 0.0], [0.0, 1.0]]]
    squares = halves_of(torch.tensor(blocks, dtype=torch.float64))
    costs = removal_costs(torch.ones(2, 2, dtype=torch.float64), squares, 1)
    assert costs.isfinite().all() and (costs > 0).all()
    # Only that one
    torch.testing.assert_close(costs[1], torch.tensor([1.5, 0.5]).double(), rtol=1e-4, atol=0)


def test_sums_that_are_not_finite_are_an_error():
    with pytest.raises(PruningError, match="expected finite gradients"):
        removal_costs(torch.ones(2, 2), torch.full((1, 10), torch.nan), 1)
