"""Pruning for any `torch.nn.Module` with linear layers: chooses weights, and keeps them at zero.

    from sparsity_factory import Masks, compute_masks

    masks = Masks(model, compute_masks(model, "lamp", sparsity=0.65))  # prunes in place
    loss.backward(); masks.apply_to_grads(); optimizer.step(); masks.apply()

This folder needs torch, numpy and yaml, and nothing else of the project around it.
"""

from .checkpoint import check_masks, has_reached_target, read_pruning
from .custom_yaml import read_yaml
from .errors import PruningError
from .layer_walk import Inputs, walk_layers
from .masks import Masks, choose_layers, pack, prunable_weights, unpack
from .method import Description, describe
from .multiply_adds import multiply_adds
from .patterns import PATTERNS, parse_pattern, regrow
from .predictions import Changes, Predictions, compare_predictions
from .pruners import PRUNERS, check_request, compute_masks, needs_of
from .pruning import prune
from .recipe import Recipe
from .reconstruction import RECONSTRUCTIONS, obs_prune
from .schedules import SCHEDULES
from .scores import SCORES
from .shrink import shrink, unit_counts, with_units
from .sparse_kernels import KERNELS, KernelReport, sparse_kernels
from .sparsifier import Sparsifier
from .sparsity_table import (
    Kept,
    LayerSparsity,
    checkpoint_table,
    sparse_multiply_adds,
    sparsity_csv,
    sparsity_rows,
    sparsity_table,
    sparsity_yaml,
)
from .statistics import STATISTICS, Statistics, collect_statistics
from .zeros import nonzero_weights, patterns_found, removable_units, unmet

__version__ = "0.1.0"

__all__ = [
    "KERNELS",
    "PATTERNS",
    "PRUNERS",
    "RECONSTRUCTIONS",
    "SCHEDULES",
    "SCORES",
    "STATISTICS",
    "Changes",
    "Description",
    "Inputs",
    "KernelReport",
    "Kept",
    "LayerSparsity",
    "Masks",
    "Predictions",
    "PruningError",
    "Recipe",
    "Sparsifier",
    "Statistics",
    "check_masks",
    "check_request",
    "checkpoint_table",
    "choose_layers",
    "collect_statistics",
    "compare_predictions",
    "compute_masks",
    "describe",
    "has_reached_target",
    "multiply_adds",
    "needs_of",
    "nonzero_weights",
    "obs_prune",
    "pack",
    "parse_pattern",
    "patterns_found",
    "prunable_weights",
    "prune",
    "read_pruning",
    "read_yaml",
    "regrow",
    "removable_units",
    "shrink",
    "sparse_kernels",
    "sparse_multiply_adds",
    "sparsity_csv",
    "sparsity_rows",
    "sparsity_table",
    "sparsity_yaml",
    "unit_counts",
    "unmet",
    "unpack",
    "walk_layers",
    "with_units",
]
