"""Pruning for any `torch.nn.Module` with linear layers: which weights go, and how they stay gone.

    from sparsity_factory import Masks, compute_masks

    masks = Masks(model, compute_masks(model, "lamp", sparsity=0.65))  # prunes in place
    loss.backward(); masks.apply_to_grads(); optimizer.step(); masks.apply()

This folder needs torch, numpy and yaml, and nothing else of the project around it.
"""

from .audit import check_masks
from .config import read_yaml
from .errors import PruningError
from .masks import Masks, pack, prunable_weights, unpack
from .multiply_adds import multiply_adds
from .pruners import PRUNERS, SCORES, compute_masks
from .recipe import Recipe
from .report import (
    LayerSparsity,
    checkpoint_table,
    sparse_multiply_adds,
    sparsity_csv,
    sparsity_rows,
    sparsity_table,
    sparsity_yaml,
)
from .schedules import SCHEDULES
from .sparsifier import Sparsifier

__all__ = [
    "PRUNERS",
    "SCHEDULES",
    "SCORES",
    "LayerSparsity",
    "Masks",
    "PruningError",
    "Recipe",
    "Sparsifier",
    "check_masks",
    "checkpoint_table",
    "compute_masks",
    "multiply_adds",
    "pack",
    "prunable_weights",
    "read_yaml",
    "sparse_multiply_adds",
    "sparsity_csv",
    "sparsity_rows",
    "sparsity_table",
    "sparsity_yaml",
    "unpack",
]
