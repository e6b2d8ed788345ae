"""What pruning left of a model, layer by layer: as rows, as a text table, as CSV, and as a custom
configuration.
"""

import csv
import io
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from .masks import dense_shapes, prunable_weights
from .multiply_adds import ATTENTION, OTHERS


class LayerSparsity(NamedTuple):
    """One row of the report: a prunable weight or, with an empty shape, a total over several."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    pattern: str = ""  # dense, n:m or unstructured; of a prunable weight only

    @property
    def sparsity(self) -> float:
        """The fraction that is pruned, in [0, 1]."""
        return 1 - self.kept / self.total if self.total else 0.0


class Kept(NamedTuple):
    """How much pruning kept of a model.

    layers: one row per prunable weight, in model order.
    prunable, whole: the totals over the prunable weights and over all parameters.
    """

    layers: list[LayerSparsity]
    prunable: LayerSparsity
    whole: LayerSparsity

    @property
    def rows(self) -> list[LayerSparsity]:
        """The layers, then the two totals."""
        return [*self.layers, self.prunable, self.whole]


def sparsity_rows(model: nn.Module, masks: Mapping[str, Tensor]) -> Kept:
    """What is kept of each prunable weight, of all of them and of the whole model.

    Args:
        model: a module; only names, shapes and sizes of its parameters are read. A shrunk one is
            compared with the dense one that it was.
        masks: parameter name to bool tensor, as `compute_masks` returns, or a `Masks`. A
            prunable weight without a mask counts as dense.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return _rows(
        prunable_weights(model),
        masks,
        {**shapes, **dense_shapes(model)},
        sum(map(prod, shapes.values())),
    )


def sparsity_table(kept: Kept) -> str:
    """What is kept as text: name, shape, kept of total, sparsity in percent; the
    totals below a line.
    """
    header = ("layer", "shape", "kept", "of", "sparsity")
    cells = [
        (
            row.name,
            " x ".join(map(str, row.shape)),
            f"{row.kept:,}",
            f"{row.total:,}",
            f"{row.sparsity:.2%}",
        )
        for row in kept.rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [_line(row, widths) for row in [header, *cells]]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def checkpoint_table(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> str:
    """The table of a state dict without its model: the masked weights count as prunable."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    masked = {
        name: weights[name]
        for name, mask in masks.items()
        if name in weights and mask.dim() == 2 and name.endswith("weight")
    }
    return sparsity_table(_rows(masked, masks, shapes, sum(map(prod, shapes.values()))))


def sparsity_csv(kept: Kept, dense: Mapping[str, int]) -> str:
    """What is kept as CSV, with the multiply-adds of each, dense and weighted by the
    layer's density.

    Args:
        kept: from `sparsity_rows`.
        dense: from `multiply_adds`. Its attention products and other layers get rows of their own.
    """
    layers, prunable, whole = kept
    others = LayerSparsity(OTHERS, (), whole.total - prunable.total, whole.total - prunable.total)
    sparse = sparse_multiply_adds(kept, dense)
    totals = [sum(count[row.name] for row in layers) for count in (dense, sparse)]
    table = [(row, dense[row.name], sparse[row.name]) for row in layers]
    table += [(LayerSparsity(ATTENTION, (), 0, 0), dense[ATTENTION], dense[ATTENTION])]
    table += [(others, dense[OTHERS], dense[OTHERS]), (prunable, *totals)]
    table += [(whole, sum(dense.values()), sum(sparse.values()))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "layer",
            "shape",
            "kept",
            "total",
            "sparsity",
            "pattern",
            "multiply_adds_dense",
            "multiply_adds_sparse",
        ]
    )
    for row, before, after in table:
        writer.writerow(
            [
                row.name,
                "x".join(map(str, row.shape)),
                row.kept,
                row.total,
                f"{row.sparsity:.6f}",
                row.pattern,
                before,
                after,
            ]
        )
    return text.getvalue()


def sparse_multiply_adds(kept: Kept, dense: Mapping[str, int]) -> dict[str, int]:
    """The counts of `multiply_adds`, those of each prunable weight times the fraction of it that is
    kept.
    """
    density = {row.name: row.kept / row.total for row in kept.layers}
    return {name: round(count * density.get(name, 1)) for name, count in dense.items()}


def sparsity_yaml(kept: Kept, comment: str = "") -> str:
    """A custom configuration that keeps the same number of weights in each layer.

    comment: its lines are put first.
    """
    layers = kept.layers
    mode = "nxm" if any(":" in row.pattern for row in layers) else "unstructured"
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += ["sparsity:", f"  mode: {mode}", "  level:"]
    return "\n".join([*lines, *(f"    {row.name}: {_level(row)}" for row in layers)]) + "\n"


# ---- helpers, not exported ----


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """The name to the left, everything else to the right, so that digits stand below digits."""
    name, *others = row
    return "  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])])


def _rows(
    prunable: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    parameters: int,
) -> Kept:
    """shapes: those of the dense model. parameters: how many there are, pruned or not."""
    layers = []
    for name, weight in prunable.items():
        kept = int(masks[name].count_nonzero()) if name in masks else weight.numel()
        dense = prod(shapes[name])
        pattern = (
            "dense" if kept == dense else _pattern(masks[name]) if name in masks else "unstructured"
        )
        layers.append(LayerSparsity(name, shapes[name], kept, dense, pattern))
    total = LayerSparsity(
        "prunable weights", (), sum(row.kept for row in layers), sum(row.total for row in layers)
    )
    pruned = sum(
        mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items() if name in shapes
    )
    whole = LayerSparsity("whole model", (), parameters - pruned, sum(map(prod, shapes.values())))
    return Kept(layers, total, whole)


def _pattern(mask: Tensor) -> str:
    """The n:m that the mask obeys, of the smallest groups there are, or `unstructured`."""
    inputs = mask.shape[1]
    for m in (m for m in range(2, inputs + 1) if inputs % m == 0):
        n = int(mask[0, :m].count_nonzero())
        if n == m:
            continue
        # Nearly always the first row decides, at a small part of the work.
        if n and all((part.reshape(-1, m).sum(1) == n).all() for part in (mask[0], mask)):
            return f"{n}:{m}"
    return "unstructured"


def _level(row: LayerSparsity) -> str:
    """The custom configuration's entry that keeps as many weights, as the shortest number."""
    if row.pattern == "dense":
        return "dense"
    if ":" in row.pattern:
        return f"[{row.pattern.replace(':', ', ')}]"
    pruned = row.total - row.kept
    # 1 is no sparsity, not even of a layer that keeps nothing
    exact = min(pruned, row.total - 0.25) / row.total
    for digits in range(1, 18):
        level = f"{exact:.{digits}f}"
        if float(level) < 1 and round(float(level) * row.total) == pruned:
            return level
    # Past 2**52 weights a layer
    raise ValueError(f"{row.name}: no number keeps {row.kept} of {row.total}")
