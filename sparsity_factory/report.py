"""What pruning left of a model, layer by layer: as rows, and as a text table."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from .masks import prunable_weights


class LayerSparsity(NamedTuple):
    """One row of the report: a prunable weight or, with an empty shape, a total over several."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """The fraction that is pruned, in [0, 1]."""
        return 1 - self.kept / self.total if self.total else 0.0


def sparsity_rows(model: nn.Module, masks: Mapping[str, Tensor]) -> list[LayerSparsity]:
    """One row per prunable weight in model order, then two totals: the prunable weights, and all parameters.

    Args:
        model: a module; only names, shapes and sizes of its parameters are read.
        masks: parameter name to bool tensor, as `compute_masks` returns and `Masks.masks` holds. A prunable weight
            without a mask counts as dense.
    """
    return _rows(prunable_weights(model), masks, sum(parameter.numel() for parameter in model.parameters()))


def sparsity_table(model: nn.Module, masks: Mapping[str, Tensor]) -> str:
    """The rows of `sparsity_rows` as text: name, shape, kept of total, sparsity in percent; the totals below a line."""
    return _table(sparsity_rows(model, masks))


def checkpoint_table(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> str:
    """The table of a state dict whose model is not at hand: what its masks name counts as prunable."""
    masked = {name: weights[name] for name in masks if name in weights}
    return _table(_rows(masked, masks, sum(weight.numel() for weight in weights.values())))


# ---- helpers, not exported ----


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """The name to the left, everything else to the right, so that digits stand below digits."""
    name, *others = row
    return "  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])])


def _rows(prunable: Mapping[str, Tensor], masks: Mapping[str, Tensor], parameters: int) -> list[LayerSparsity]:
    layers = []
    for name, weight in prunable.items():
        kept = int(masks[name].count_nonzero()) if name in masks else weight.numel()
        layers.append(LayerSparsity(name, tuple(weight.shape), kept, weight.numel()))
    total = LayerSparsity("prunable weights", (), sum(row.kept for row in layers), sum(row.total for row in layers))
    whole = LayerSparsity("whole model", (), parameters - (total.total - total.kept), parameters)
    return [*layers, total, whole]


def _table(rows: list[LayerSparsity]) -> str:
    header = ("layer", "shape", "kept", "of", "sparsity")
    cells = [
        (row.name, " x ".join(map(str, row.shape)), f"{row.kept:,}", f"{row.total:,}", f"{row.sparsity:.2%}")
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [_line(row, widths) for row in [header, *cells]]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])
