"""What pruning kept of a model, layer by layer: as rows, text, CSV and a custom configuration."""

import csv
import io
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from .masks import as_matrix, dense_shapes, prunable_weights
from .multiply_adds import ATTENTION, OTHERS

CSV_COLUMNS = ["layer", "shape", "kept", "total", "sparsity", "pattern"]
CSV_COLUMNS += ["multiply_adds_dense", "multiply_adds_sparse"]


class LayerSparsity(NamedTuple):
    """One row of the table: a prunable weight or, with an empty shape, a total over several."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    pattern: str = ""  # dense, n:m, unstructured, block:RxC and a sparsity; empty for a total

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
        model: a module; only names, shapes and sizes of its parameters are read. A shrunk model is
            compared with the dense one it was made from.
        masks: parameter name to bool tensor, as `compute_masks` returns, or a `Masks`. A
            prunable weight without a mask counts as dense.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parameters = sum(map(prod, shapes.values()))
    return _rows(prunable_weights(model), masks, {**shapes, **dense_shapes(model)}, parameters)


def sparsity_table(kept: Kept, obeys: Mapping[str, Sequence[str]] | None = None) -> str:
    """What is kept as text: name, shape, kept of total, sparsity; the totals below a line.

    obeys: by layer, the names of the patterns to show in a column of their own.
    """
    cells: list[tuple[str, ...]] = [("layer", "shape", "kept", "of", "sparsity")]
    for row in kept.rows:
        shape = " x ".join(map(str, row.shape))
        cells.append((row.name, shape, f"{row.kept:,}", f"{row.total:,}", f"{row.sparsity:.2%}"))
    if obeys is not None:
        names = ["obeys", *(", ".join(obeys.get(row.name, ())) for row in kept.rows)]
        cells = [(*row, found) for row, found in zip(cells, names, strict=True)]

    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(row, widths).rstrip() for row in cells]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def checkpoint_table(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    obeys: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The table of a state dict without its model: the masked weights count as prunable."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    masked = {
        name: weights[name]
        for name, mask in masks.items()
        if name in weights and mask.dim() >= 2 and name.endswith("weight")
    }
    parameters = sum(map(prod, shapes.values()))
    return sparsity_table(_rows(masked, masks, shapes, parameters), obeys)


def sparsity_csv(
    kept: Kept, dense: Mapping[str, int], computed: Mapping[str, int] | None = None
) -> str:
    """What is kept as CSV, with each row's multiply-adds, dense and times the layer's density.

    Args:
        kept: from `sparsity_rows`.
        dense: from `multiply_adds`. Its attention products and other layers get rows of their own.
        computed: the same of the model as it runs, if it computes fewer tokens than the dense one.
    """
    layers, prunable, whole = kept
    sparse = sparse_multiply_adds(kept, computed or dense)
    names = [row.name for row in layers]
    dense_total = sum(dense[name] for name in names)
    sparse_total = sum(sparse[name] for name in names)

    # Attention products have no parameters; other layers are never pruned
    attention = LayerSparsity(ATTENTION, (), 0, 0)
    unprunable = whole.total - prunable.total
    others = LayerSparsity(OTHERS, (), unprunable, unprunable)

    table = [(row, dense[row.name], sparse[row.name]) for row in layers]
    table.append((attention, dense[ATTENTION], sparse[ATTENTION]))
    table.append((others, dense[OTHERS], sparse[OTHERS]))
    table.append((prunable, dense_total, sparse_total))
    table.append((whole, sum(dense.values()), sum(sparse.values())))

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row, before, after in table:
        shape = "x".join(map(str, row.shape))
        sparsity = f"{row.sparsity:.6f}"
        writer.writerow(
            [row.name, shape, row.kept, row.total, sparsity, row.pattern, before, after]
        )
    return text.getvalue()


def sparse_multiply_adds(kept: Kept, dense: Mapping[str, int]) -> dict[str, int]:
    """The counts of `multiply_adds`, each times the fraction of the weight that is kept."""
    density = {row.name: row.kept / row.total for row in kept.layers}
    return {name: round(count * density.get(name, 1)) for name, count in dense.items()}


def sparsity_yaml(kept: Kept, comment: str = "", units: Mapping[str, int] | None = None) -> str:
    """A custom configuration that keeps the same number of weights in each layer.

    comment: text to put at the top. units: by block, how many heads or neurons it keeps.
    """
    layers = kept.layers
    groups = any(":" in row.pattern and not row.pattern.startswith("block") for row in layers)
    mode = "nxm" if groups else "unstructured"
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += ["sparsity:", f"  mode: {mode}", "  level:"]
    lines += [f"    {row.name}: {_level(row)}" for row in layers]
    if units:
        lines.append("  units:")
        lines += [f"    {name}: {count}" for name, count in units.items()]
    return "\n".join(lines) + "\n"


# ---- helpers, not exported ----


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """A row of cells: the first to the left, the others to the right, digits below digits."""
    name, *others = row
    return "  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])])


def _rows(
    prunable: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    parameters: int,
) -> Kept:
    """What is kept of each prunable weight and in all.

    shapes: the shape of each parameter in the dense model. parameters: how many the model has now,
        zero or not.
    """
    layers = []
    for name, weight in prunable.items():
        kept = int(masks[name].count_nonzero()) if name in masks else weight.numel()
        dense = prod(shapes[name])
        if kept == dense:
            pattern = "dense"
        elif name in masks:
            pattern = _pattern(masks[name])
        else:  # a shrunk layer
            pattern = "unstructured"
        layers.append(LayerSparsity(name, shapes[name], kept, dense, pattern))
    kept = sum(row.kept for row in layers)
    total = LayerSparsity("prunable weights", (), kept, sum(row.total for row in layers))

    # Masks of biases count for the whole model only
    pruned = sum(
        mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items() if name in shapes
    )
    whole = LayerSparsity("whole model", (), parameters - pruned, sum(map(prod, shapes.values())))
    return Kept(layers, total, whole)


def _pattern(mask: Tensor) -> str:
    """The n:m of the smallest groups that the mask obeys, or `unstructured`."""
    mask = as_matrix(mask)
    inputs = mask.shape[1]
    for m in range(2, inputs + 1):
        if inputs % m:
            continue
        n = int(mask[0, :m].count_nonzero())
        if n == m:
            continue
        # The first row alone rules out nearly every n:m, with a fraction of the work
        if n and all((part.reshape(-1, m).sum(1) == n).all() for part in (mask[0], mask)):
            return f"{n}:{m}"
    return "unstructured"


def _level(row: LayerSparsity) -> str:
    """The custom configuration's entry that keeps as many weights, as the shortest number."""
    if row.pattern == "dense" or row.pattern.startswith("block"):
        return row.pattern
    if ":" in row.pattern:
        return f"[{row.pattern.replace(':', ', ')}]"

    # A sparsity is below 1, even that of a layer that keeps nothing
    pruned = row.total - row.kept
    exact = min(pruned, row.total - 0.25) / row.total
    for digits in range(1, 18):
        level = f"{exact:.{digits}f}"
        if float(level) < 1 and round(float(level) * row.total) == pruned:
            return level
    # Only a layer of more than 2**52 weights has no such number
    raise ValueError(f"{row.name}: no number keeps {row.kept} of {row.total}")
