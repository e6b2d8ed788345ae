"""Whole heads and neurons in the masks or nonzero weights of a file, found without its model.

`units.py` knows the units from the modules of a model. Here only names and shapes are known: a
block is a parent name with a last layer, such as `blocks.0.mlp` with `fc2`, and first layers whose
outputs are its inputs, once or several times (queries, keys and values).
"""

from collections import defaultdict
from collections.abc import Mapping
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .units import HEADS, NEURONS

# The last layers of attentions and MLPs of timm, of OpenAI's CLIP, and of torchvision
LAST = ("proj", "out_proj", "fc2", "c_proj", "w3", "3")
NARROWEST_HEAD = 2  # channels; narrower runs of pruned channels are no heads


class WholeUnits(NamedTuple):
    """The channels of a block between its first layers and its last one.

    Attributes:
        name: of the block.
        kind: `heads` or `neurons`.
        first, last: names of weights.
        alive: bool (channels,), on the CPU: which channels have a weight on any side.
        flaw: why the pruned weights of the block are not whole units; empty if they are.
    """

    name: str
    kind: str
    first: list[str]
    last: str
    alive: Tensor
    flaw: str

    @property
    def width(self) -> int:
        """Channels of a unit: of heads, the widest that fits the runs of pruned channels."""
        return _width(self.alive) if self.kind == HEADS else 1

    @property
    def pruned(self) -> int:
        """How many units are pruned."""
        return int((~self.alive).count_nonzero()) // self.width


def whole_units(masks: Mapping[str, Tensor]) -> list[WholeUnits]:
    """The blocks of a model whose layers have these masks.

    masks: parameter name to bool tensor, True where the weight is kept, or is not zero. Those of
        biases are compared if they are given.
    """
    blocks: dict[str, dict[str, str]] = defaultdict(dict)
    for name, mask in masks.items():
        if mask.dim() == 2 and name.endswith("weight"):
            parent, _, own = _layer(name).rpartition(".")
            blocks[parent][own] = name

    found = []
    for parent, layers in blocks.items():
        last = next((name for own, name in layers.items() if own in LAST), None)
        if last is None:
            continue
        channels = masks[last].shape[1]
        first = [name for name in layers.values() if name != last]
        first = [name for name in first if masks[name].shape[0] % channels == 0]
        if first:
            found.append(_block(parent, first, last, masks))
    return found


def removable(block: WholeUnits, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many weights and biases the pruned units of a block have.

    shapes: of all parameters of the model, by name.
    """
    if block.kind == HEADS and block.width < NARROWEST_HEAD:
        return 0
    share = int((~block.alive).count_nonzero())
    count = share * shapes[block.last][0]
    for name in block.first:
        rows, inputs = shapes[name]
        has_bias = f"{name.removesuffix('weight')}bias" in shapes
        count += share * (rows // len(block.alive)) * (inputs + has_bias)
    return count


# ---- helpers, not exported ----


def _layer(name: str) -> str:
    """The layer of a weight: `attn.qkv` of `attn.qkv.weight`, `attn.in_proj` of its own."""
    return name.removesuffix("weight").rstrip("._")


def _block(parent: str, first: list[str], last: str, masks: Mapping[str, Tensor]) -> WholeUnits:
    left = [masks[last].any(0).cpu()]
    left += [masks[name].any(1).cpu().view(-1, len(left[0])).any(0) for name in first]
    alive = torch.stack(left).any(0)
    # Of an MLP within an attention pool, only the last name counts
    kind = HEADS if "att" in parent.rpartition(".")[2].lower() else NEURONS

    flaw = ""
    if kind == HEADS and _width(alive) < NARROWEST_HEAD:
        flaw = f"{parent}: prunes single channels, expected whole heads"
    expected = {last: alive.expand(masks[last].shape)}
    for name in first:
        rows = alive.repeat(len(masks[name]) // len(alive))
        expected[name] = rows.unsqueeze(1).expand(masks[name].shape)
        expected[f"{name.removesuffix('weight')}bias"] = rows
    for name, mask in expected.items():
        if name in masks and not torch.equal(masks[name].cpu(), mask):
            flaw = flaw or f"{name}: prunes some of the {kind} in part"
    return WholeUnits(parent, kind, first, last, alive, flaw)


def _width(alive: Tensor) -> int:
    """The greatest common divisor of the places where runs of channels begin and end."""
    borders = (alive[1:] != alive[:-1]).nonzero().flatten() + 1
    return gcd(len(alive), *borders.tolist())
