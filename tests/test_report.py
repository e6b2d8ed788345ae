"""The per-layer report."""

import torch
from torch import nn

from sparsity_factory import Masks, compute_masks, sparsity_rows, sparsity_table


def model_and_masks():
    model = nn.Sequential(nn.Linear(100, 20), nn.LayerNorm(20), nn.Linear(20, 5))
    return model, compute_masks(model, "unif", 0.5)


def test_rows_count_every_layer_the_prunable_weights_and_the_whole_model():
    model, masks = model_and_masks()
    rows = sparsity_rows(model, masks)
    assert [tuple(row) for row in rows] == [
        ("0.weight", (20, 100), 1000, 2000),
        ("2.weight", (5, 20), 50, 100),
        ("prunable weights", (), 1050, 2100),
        ("whole model", (), 1050 + 20 + 40 + 5, 2100 + 20 + 40 + 5),
    ]
    assert rows[2].sparsity == 0.5


def test_a_weight_without_a_mask_counts_as_dense():
    model, masks = model_and_masks()
    del masks["0.weight"]
    assert [row.kept for row in sparsity_rows(model, masks)] == [2000, 50, 2050, 2115]


def test_the_totals_are_the_weights_that_are_not_zero():
    model, masks = model_and_masks()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    Masks(model, masks)
    assert sparsity_rows(model, masks)[-1].kept == sum(int(p.count_nonzero()) for p in model.parameters())


def test_the_table_has_aligned_columns_with_everything_a_row_says():
    table = sparsity_table(*model_and_masks()).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[2].split() == ["0.weight", "20", "x", "100", "1,000", "2,000", "50.00%"]
    assert table[-1].split() == ["whole", "model", "1,115", "2,165", "48.50%"]
