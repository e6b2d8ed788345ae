"""Where the units of a transformer are, its attention heads and hidden neurons: which rows and
columns make up each.

What is known of a kind of block is a function

    def block(module: nn.Module) -> Block

To add one, write such a function and name it in `BLOCKS` under the name of the module's class.
Nothing here imports
timm: a block is recognised by that name, and then by its parameters, all of which have to be
accounted for.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import PruningError
from .masks import prunable_weights

ROWS, COLUMNS = 0, 1
HEADS, NEURONS = "heads", "neurons"


class Part(NamedTuple):
    """A parameter of which each unit has some rows (dim 0) or columns (dim 1).

    unit: int64 tensor, the unit to which each row or column belongs.
    """

    parameter: str
    dim: int
    unit: Tensor


class Block(NamedTuple):
    """What a function in `BLOCKS` says of a module.

    parts: of a linear layer its name, or of a parameter that of its own. The rows of a layer take
    its bias with them.
    untouched: modules whose parameters serve all units alike.
    """

    kind: str
    units: int
    parts: list[Part]
    untouched: tuple[str, ...] = ()


class Group(NamedTuple):
    """The units of one module: parameters by their names in the model. At least one unit of a group
    is always kept.

    A weight that two parts share, such as one that mixes heads, counts by the first: each unit owns
    its rows.
    """

    name: str
    kind: str
    units: int
    parts: list[Part]

    def masks(self, kept: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of all parameters of the group.

        kept: bool tensor (units,). parameters: those of the model, by name.
        """
        masks = {}
        for name, dim, unit in self.parts:
            parameter = parameters[name]
            mask = masks.setdefault(
                name, torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            )
            of_index = kept[unit].to(parameter.device)
            mask &= of_index.view([-1 if axis == dim else 1 for axis in range(mask.dim())])
        return masks

    def kept(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Which units have a weight left, bool (units,); the first one, if none has.

        masks: by parameter name. Parameters without one are dense. Vectors, such as biases, do not
        count.
        """
        kept = torch.zeros(self.units, dtype=torch.bool)
        for name, dim, unit in self.parts:
            if not name.endswith("weight"):
                continue
            left = (
                masks[name].any(1 - dim).cpu()
                if name in masks
                else torch.ones(len(unit), dtype=torch.bool)
            )
            kept[unit[left]] = True
        if not kept.any():
            kept[0] = True
        return kept

    def weights(self, names: Collection[str]) -> dict[str, Part]:
        """For each of these weights that the group has, the part by which it counts."""
        return {part.parameter: part for part in reversed(self.parts) if part.parameter in names}

    def sums(self, values_of: Callable[[str], Tensor], weights: Mapping[str, Part]) -> Tensor:
        """The sum of what belongs to each unit, float64 (units,), on the CPU, where sums have one
        order.

        values_of: from the name of a weight to values of its shape. weights: what `weights`
        returned.
        """
        total = torch.zeros(self.units, dtype=torch.float64)
        for name, part in weights.items():
            total.index_add_(
                0, part.unit, values_of(name).sum(1 - part.dim, dtype=torch.float64).cpu()
            )
        return total


def unit_groups(
    model: nn.Module, kinds: Collection[str] = (HEADS, NEURONS), known_only: bool = False
) -> list[Group]:
    """The groups of units of a model, in model order.

    kinds: of `heads` and `neurons`, those that are asked for.
    known_only: pass over blocks that cannot be handled.

    Raises:
        PruningError: naming the first block that looks as if it had such units and cannot be
        handled.
    """
    weights, groups = prunable_weights(model), []
    for name, module in model.named_modules():
        kind = _kind(module)
        own = [
            f"{name}.{child}.weight".lstrip(".")
            for child, layer in module.named_children()
            if isinstance(layer, nn.Linear)
        ]
        if kind not in kinds or not any(weight in weights for weight in own):
            continue
        try:
            groups.append(_group(name, module, kind, weights))
        except PruningError:
            if not known_only:
                raise
    return groups


# ---- the blocks ----


def attention(module: nn.Module) -> Block:
    """Queries, keys and values out of one layer, `qkv`, in this order; an optional gate and norms
    of single heads.
    """
    head = _heads(module)
    return Block(
        HEADS,
        module.num_heads,
        [
            Part("qkv", ROWS, head.repeat(3)),
            *([Part("gate", ROWS, head)] if getattr(module, "gate", None) else []),
            Part("proj", COLUMNS, head),
        ],
        untouched=("q_norm", "k_norm"),
    )


def window_attention(module: nn.Module) -> Block:
    """Swin's, whose table of position biases has a column for each head."""
    block = attention(module)
    each = torch.arange(module.num_heads)
    return block._replace(parts=[*block.parts, Part("relative_position_bias_table", COLUMNS, each)])


def talking_heads(module: nn.Module) -> Block:
    """CaiT's, with two layers that mix the heads before and after the softmax."""
    block = attention(module)
    each = torch.arange(module.num_heads)
    mixed = [Part(name, dim, each) for name in ("proj_l", "proj_w") for dim in (ROWS, COLUMNS)]
    return block._replace(parts=[*block.parts, *mixed])


def class_attention(module: nn.Module) -> Block:
    """CaiT's of the class token, with a layer each for queries, keys and values."""
    head = _heads(module)
    return Block(
        HEADS,
        module.num_heads,
        [*(Part(name, ROWS, head) for name in "qkv"), Part("proj", COLUMNS, head)],
    )


def mlp(module: nn.Module) -> Block:
    """Two layers with an activation between."""
    each = torch.arange(module.fc2.in_features)
    return Block(NEURONS, len(each), [Part("fc1", ROWS, each), Part("fc2", COLUMNS, each)])


def glu_mlp(module: nn.Module) -> Block:
    """A first layer that has the values and their gates one after the other."""
    each = torch.arange(module.fc2.in_features)
    return Block(
        NEURONS, len(each), [Part("fc1", ROWS, each.repeat(2)), Part("fc2", COLUMNS, each)]
    )


def swiglu(module: nn.Module) -> Block:
    """A layer each for values and gates."""
    each = torch.arange(module.fc2.in_features)
    return Block(
        NEURONS,
        len(each),
        [Part("fc1_g", ROWS, each), Part("fc1_x", ROWS, each), Part("fc2", COLUMNS, each)],
    )


BLOCKS: dict[str, Callable[[nn.Module], Block]] = {
    "Attention": attention,
    "WindowAttention": window_attention,
    "TalkingHeadAttn": talking_heads,
    "ClassAttn": class_attention,
    "Mlp": mlp,
    "GluMlp": glu_mlp,
    "SwiGLU": swiglu,
}


# ---- helpers, not exported ----


def _kind(module: nn.Module) -> str | None:
    """What units a module has, or looks as if it had."""
    if isinstance(getattr(module, "num_heads", None), int):
        return HEADS
    name = type(module).__name__.lower()
    return (
        NEURONS
        if "mlp" in name or "glu" in name or hasattr(module, "fc1") and hasattr(module, "fc2")
        else None
    )


def _heads(module: nn.Module) -> Tensor:
    """To which head each channel of the attention's output belongs."""
    return torch.arange(module.num_heads).repeat_interleave(
        module.proj.in_features // module.num_heads
    )


def _group(name: str, module: nn.Module, kind: str, weights: Collection[str]) -> Group:
    kind_of_block = type(module).__name__
    refused = PruningError(
        f"{name or 'the model'} is a {kind_of_block}, whose {kind} cannot be told apart: expected "
        f"one of timm's {', '.join(BLOCKS)}, as they are by default"
    )
    if kind_of_block not in BLOCKS:
        raise refused
    try:
        block = BLOCKS[kind_of_block](module)
    except AttributeError:  # another library's module of that name
        raise refused from None
    parts = []
    accounted = {f"{child}.bias" for child, dim, _ in block.parts if dim == COLUMNS}
    parameters = dict(module.named_parameters())
    for child, dim, unit in block.parts:
        for own in (child, f"{child}.weight", *([f"{child}.bias"] if dim == ROWS else [])):
            if own in parameters:
                parts.append(Part(f"{name}.{own}".lstrip("."), dim, unit))
                accounted.add(own)
                if parameters[own].shape[dim] != len(unit):
                    raise refused
    unknown = [
        own
        for own in parameters
        if own not in accounted and own.split(".")[0] not in block.untouched
    ]
    linear = [part.parameter for part in parts if part.parameter.endswith(".weight")]
    if unknown or not all(weight in weights for weight in linear) or block.kind != kind:
        raise refused
    return Group(name, kind, block.units, parts)
