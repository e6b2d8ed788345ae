"""The per-layer report."""

import csv

import pytest
import timm
import torch
import yaml
from torch import nn

import models  # noqa: F401, the sample's model
from sparsity_factory import (
    Masks,
    compute_masks,
    multiply_adds,
    sparsity_csv,
    sparsity_rows,
    sparsity_table,
    sparsity_yaml,
)


def model_and_masks():
    model = nn.Sequential(nn.Linear(100, 20), nn.LayerNorm(20), nn.Linear(20, 5))
    return model, compute_masks(model, "unif", 0.5)


def test_rows_count_every_layer_the_prunable_weights_and_the_whole_model():
    model, masks = model_and_masks()
    rows = sparsity_rows(model, masks).rows
    assert [row[:4] for row in rows] == [
        ("0.weight", (20, 100), 1000, 2000),
        ("2.weight", (5, 20), 50, 100),
        ("prunable weights", (), 1050, 2100),
        ("whole model", (), 1050 + 20 + 40 + 5, 2100 + 20 + 40 + 5),
    ]
    assert rows[2].sparsity == 0.5


def test_a_weight_without_a_mask_counts_as_dense():
    model, masks = model_and_masks()
    del masks["0.weight"]
    assert [row.kept for row in sparsity_rows(model, masks).rows] == [2000, 50, 2050, 2115]


def test_the_totals_are_the_weights_that_are_not_zero():
    model, masks = model_and_masks()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    Masks(model, masks)
    assert sparsity_rows(model, masks).whole.kept == sum(
        int(p.count_nonzero()) for p in model.parameters()
    )


def test_the_table_has_aligned_columns_with_everything_a_row_says():
    table = sparsity_table(sparsity_rows(*model_and_masks())).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[2].split() == ["0.weight", "20", "x", "100", "1,000", "2,000", "50.00%"]
    assert table[-1].split() == ["whole", "model", "1,115", "2,165", "48.50%"]


LEVELS = {
    "default": 0.37,
    "blocks.0.*": "dense",
    "blocks.1.mlp.fc1": [2, 4],
    "blocks.2.attn.*": [1, 4],
    "blocks.3.mlp.fc2": 0.99999,
}


@pytest.mark.parametrize(
    "request_",
    [
        {"pruner": "lamp", "sparsity": 0.65},
        {"pruner": "erk", "sparsity": 0.9},
        {"pruner": "glob", "sparsity": 0.99999},
        {"pruner": "unif", "sparsity": 0.0},
        {"pruner": "custom", "custom_config": {"sparsity": {"mode": "nxm", "level": LEVELS}}},
    ],
    ids=str,
)
def test_the_yaml_gives_the_same_kept_counts_and_patterns_again(request_):
    model = timm.create_model("deit_sample_patch4_28")
    rows = sparsity_rows(model, compute_masks(model, **request_))
    again = compute_masks(
        model, "custom", custom_config=yaml.safe_load(sparsity_yaml(rows, "two\nlines"))
    )
    assert sparsity_rows(model, again) == rows


def test_every_row_names_its_pattern():
    model = timm.create_model("deit_sample_patch4_28")
    masks = compute_masks(
        model, "custom", custom_config={"sparsity": {"mode": "nxm", "level": LEVELS}}
    )
    patterns = {row.name: row.pattern for row in sparsity_rows(model, masks).layers}
    assert patterns["blocks.0.mlp.fc1.weight"] == "dense"
    assert patterns["blocks.1.mlp.fc1.weight"] == "2:4"
    assert patterns["blocks.2.attn.proj.weight"] == "1:4"
    assert patterns["blocks.4.mlp.fc1.weight"] == "unstructured"


@pytest.mark.parametrize("fused", [False, True])
def test_multiply_adds_of_a_vision_transformer_are_those_of_its_formula(fused):
    model = timm.create_model("deit_sample_patch4_28").train()
    for block in model.blocks:
        block.attn.fused_attn = fused
    counts = multiply_adds(model, torch.zeros(1, 3, 28, 28))
    tokens, width, depth = 50, 96, 6
    assert counts["blocks.0.attn.qkv.weight"] == tokens * width * 3 * width
    assert counts["blocks.5.mlp.fc2.weight"] == tokens * 4 * width * width
    assert counts["attention products"] == depth * 2 * tokens * tokens * width
    assert counts["other layers"] == 49 * 3 * 4 * 4 * width + width * 10
    assert len(counts) == 4 * depth + 2
    assert model.training


def test_multiply_adds_of_a_compiled_model_are_counted_without_compiling():
    def backend(*_):
        raise AssertionError("compiled")

    model = nn.Sequential(nn.Linear(100, 20), nn.Linear(20, 5))
    model.compile(backend=backend)
    assert multiply_adds(model, torch.zeros(1, 100))["0.weight"] == 2000


def test_multiply_adds_are_booked_on_a_weight_that_is_used_without_its_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight)

    assert multiply_adds(Tied(), torch.zeros(3, 8)) == {
        "inner.weight": 3 * 8 * 4,
        "attention products": 0,
        "other layers": 0,
    }


def test_multiply_adds_leave_each_module_in_its_own_mode():
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2
    )
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    multiply_adds(model, torch.zeros(1, 3, 8, 8))
    assert before == {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("frozen", [False, True])
def test_multiply_adds_of_torch_attention_are_booked_on_each_of_its_weights(frozen):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.requires_grad_(not frozen)
    counts = multiply_adds(layer, torch.zeros(1, 5, 8))
    products = 2 * 5 * 5 * 8
    assert counts["attention products"] == products
    assert counts["self_attn.out_proj.weight"] == 5 * 8 * 8
    assert counts["linear1.weight"] == counts["linear2.weight"] == 5 * 8 * 16
    projections = counts.get("self_attn.in_proj_weight", 0) + counts["other layers"]
    assert projections == 3 * 5 * 8 * 8


def test_the_csv_has_every_layer_and_weights_multiply_adds_by_density():
    model, masks = model_and_masks()
    text = sparsity_csv(sparsity_rows(model, masks), multiply_adds(model, torch.zeros(2, 100)))
    rows = {row["layer"]: row for row in csv.DictReader(text.splitlines())}
    assert list(rows) == [
        "0.weight",
        "2.weight",
        "attention products",
        "other layers",
        "prunable weights",
        "whole model",
    ]
    assert list(rows["0.weight"].values()) == [
        "0.weight",
        "20x100",
        "1000",
        "2000",
        "0.500000",
        "unstructured",
        "4000",
        "2000",
    ]
    assert (
        rows["whole model"]["multiply_adds_dense"],
        rows["whole model"]["multiply_adds_sparse"],
    ) == ("4200", "2100")
    assert rows["other layers"]["kept"] == "65"
