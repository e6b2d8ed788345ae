"""The units of a transformer, attention heads and hidden neurons: the rows and columns of each.

A kind of block is described by a function

    def block(module: nn.Module) -> Block

To add one, write such a function and name it in `BLOCKS` under the name of the module's class.
Nothing here imports timm: a block is recognised by that name, and then by its parameters, all of
which have to be accounted for.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import PruningError
from .masks import default_weights

ROWS, COLUMNS = 0, 1
HEADS, NEURONS = "heads", "neurons"


class Part(NamedTuple):
    """A parameter whose rows (dim 0) or columns (dim 1) belong to units.

    unit: int64 tensor, the unit to which each row or column belongs.
    """

    parameter: str
    dim: int
    unit: Tensor


class Block(NamedTuple):
    """A module as a function in `BLOCKS` describes it.

    parts: named by linear layer or by parameter. The rows of a layer include its bias.
    untouched: names of modules whose parameters serve all units alike.
    """

    kind: str
    units: int
    parts: list[Part]
    untouched: tuple[str, ...] = ()


class Group(NamedTuple):
    """The units of one module, of which at least one is always kept.

    name: of the module in the model.
    parts: named by parameter in the model. A weight in two parts, such as one that mixes heads,
        counts by the first: each unit owns its rows.
    """

    name: str
    kind: str
    units: int
    parts: list[Part]

    def masks(self, kept: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of all parameters of the group.

        kept: bool tensor (units,).
        parameters: those of the model, by name.
        """
        masks: dict[str, Tensor] = {}
        for name, dim, unit in self.parts:
            parameter = parameters[name]
            if name not in masks:
                device = parameter.device
                masks[name] = torch.ones(parameter.shape, dtype=torch.bool, device=device)

            shape = [1] * parameter.dim()
            shape[dim] = -1
            masks[name] &= kept[unit].to(parameter.device, non_blocking=True).view(shape)
        return masks

    def kept(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Which units have a weight left, bool (units,); only the first one if none has.

        masks: by parameter name. Parameters without one are dense. Vectors, such as biases, do not
            count.
        """
        kept = torch.zeros(self.units, dtype=torch.bool)
        for name, dim, unit in self.parts:
            if not name.endswith("weight"):
                continue
            if name in masks:
                kept[unit[masks[name].any(1 - dim).cpu()]] = True
            else:
                kept[unit] = True

        if not kept.any():
            kept[0] = True
        return kept

    def weights(self, names: Collection[str]) -> dict[str, Part]:
        """For each named weight of the group, the part by which it counts."""
        return {part.parameter: part for part in reversed(self.parts) if part.parameter in names}


def unit_sums(
    groups: Sequence[Group],
    weights: Sequence[Mapping[str, Part]],
    values_of: Callable[[str], Tensor],
) -> list[Tensor]:
    """The sum of values over each unit of each group, float64 (units,), on the CPU.

    weights: for each group what its `weights` returned.
    values_of: from the name of a weight to values of its shape.
    """
    of_lines = [
        values_of(name).sum(1 - part.dim, dtype=torch.float64)
        for parts in weights
        for name, part in parts.items()
    ]
    # One copy to the CPU, where the order of a sum is always the same
    lines = iter(torch.cat(of_lines).cpu().split([len(values) for values in of_lines]))

    sums = []
    for group, parts in zip(groups, weights, strict=True):
        total = torch.zeros(group.units, dtype=torch.float64)
        for part in parts.values():
            total.index_add_(0, part.unit, next(lines))
        sums.append(total)
    return sums


def unit_groups(
    model: nn.Module,
    kinds: Collection[str] = (HEADS, NEURONS),
    weights: Collection[str] | None = None,
    unknown: list[str] | None = None,
) -> list[Group]:
    """The groups of units of a model, in model order.

    kinds: the kinds to return, of `heads` and `neurons`.
    weights: the names of the prunable weights; by default those that are prunable by default.
    unknown: gets a line for each block that looks as if it had such units and cannot be handled.
    """
    weights = default_weights(model) if weights is None else weights
    groups = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None or kind not in kinds:
            continue

        # A module without prunable layers has nothing to remove
        own = [
            f"{name}.{child}.weight".lstrip(".")
            for child, layer in module.named_children()
            if isinstance(layer, nn.Linear)
        ]
        if not any(weight in weights for weight in own):
            continue

        try:
            groups.append(_group(name, module, kind, weights))
        except PruningError as error:
            if unknown is not None:
                unknown.append(str(error))
    return groups


# ---- the blocks ----


def attention(module: nn.Module) -> Block:
    """Attention with one layer, `qkv`, for queries, keys and values, in this order.

    It may have a gate and norms of single heads.
    """
    head = _heads(module)
    parts = [Part("qkv", ROWS, head.repeat(3))]
    if getattr(module, "gate", None):
        parts.append(Part("gate", ROWS, head))
    parts.append(Part("proj", COLUMNS, head))
    return Block(HEADS, module.num_heads, parts, untouched=("q_norm", "k_norm"))


def window_attention(module: nn.Module) -> Block:
    """Swin's attention, whose table of position biases has a column for each head."""
    block = attention(module)
    each = torch.arange(module.num_heads)
    return block._replace(parts=[*block.parts, Part("relative_position_bias_table", COLUMNS, each)])


def talking_heads(module: nn.Module) -> Block:
    """CaiT's attention, with two layers that mix the heads before and after the softmax."""
    block = attention(module)
    each = torch.arange(module.num_heads)
    mixed = [Part(name, dim, each) for name in ("proj_l", "proj_w") for dim in (ROWS, COLUMNS)]
    return block._replace(parts=[*block.parts, *mixed])


def class_attention(module: nn.Module) -> Block:
    """CaiT's attention of the class token, with a layer each for queries, keys and values."""
    head = _heads(module)
    parts = [Part(name, ROWS, head) for name in ("q", "k", "v")]
    parts.append(Part("proj", COLUMNS, head))
    return Block(HEADS, module.num_heads, parts)


def multihead_attention(module: nn.Module) -> Block:
    """Torch's own attention, which holds the weight for queries, keys and values itself."""
    head = torch.arange(module.num_heads).repeat_interleave(module.head_dim)
    parts = [Part(name, ROWS, head.repeat(3)) for name in ("in_proj_weight", "in_proj_bias")]
    parts.append(Part("out_proj", COLUMNS, head))
    return Block(HEADS, module.num_heads, parts)


def mlp(module: nn.Module) -> Block:
    """Two layers with an activation between them."""
    each = torch.arange(module.fc2.in_features)
    return Block(NEURONS, len(each), [Part("fc1", ROWS, each), Part("fc2", COLUMNS, each)])


def glu_mlp(module: nn.Module) -> Block:
    """An MLP whose first layer computes the values and then their gates."""
    each = torch.arange(module.fc2.in_features)
    parts = [Part("fc1", ROWS, each.repeat(2)), Part("fc2", COLUMNS, each)]
    return Block(NEURONS, len(each), parts)


def swiglu(module: nn.Module) -> Block:
    """An MLP with a layer each for gates and values."""
    each = torch.arange(module.fc2.in_features)
    parts = [Part("fc1_g", ROWS, each), Part("fc1_x", ROWS, each), Part("fc2", COLUMNS, each)]
    return Block(NEURONS, len(each), parts)


BLOCKS: dict[str, Callable[[nn.Module], Block]] = {
    "Attention": attention,
    "MergingAttention": attention,  # timm's own, where tokens merge
    "WindowAttention": window_attention,
    "TalkingHeadAttn": talking_heads,
    "ClassAttn": class_attention,
    "MultiheadAttention": multihead_attention,
    "Mlp": mlp,
    "GluMlp": glu_mlp,
    "SwiGLU": swiglu,
}


# ---- helpers, not exported ----


def _kind(module: nn.Module) -> str | None:
    """The kind of units that a module has, or looks as if it had."""
    if isinstance(getattr(module, "num_heads", None), int):
        return HEADS

    name = type(module).__name__.lower()
    has_two_layers = hasattr(module, "fc1") and hasattr(module, "fc2")
    return NEURONS if "mlp" in name or "glu" in name or has_two_layers else None


def _heads(module: nn.Module) -> Tensor:
    """The head to which each channel of the attention's output belongs."""
    width = module.proj.in_features // module.num_heads
    return torch.arange(module.num_heads).repeat_interleave(width)


def _group(name: str, module: nn.Module, kind: str, weights: Collection[str]) -> Group:
    """The units of a module; an error unless `BLOCKS` accounts for all of its parameters."""
    kind_of_block = type(module).__name__
    refused = PruningError(
        f"{name or 'the model'} is a {kind_of_block}, whose {kind} cannot be told apart: expected "
        f"one of timm's or torch's {', '.join(BLOCKS)}, as they are by default"
    )
    if kind_of_block not in BLOCKS:
        raise refused
    try:
        block = BLOCKS[kind_of_block](module)
    except AttributeError:  # another library's module of that name
        raise refused from None

    # Rows of a layer include its bias; the bias behind columns serves all units
    parts = []
    accounted = {f"{part.parameter}.bias" for part in block.parts if part.dim == COLUMNS}
    parameters = dict(module.named_parameters())
    for child, dim, unit in block.parts:
        names = [child, f"{child}.weight"]
        if dim == ROWS:
            names.append(f"{child}.bias")
        for own in names:
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
    linear = [part.parameter for part in parts if part.parameter.endswith("weight")]
    if unknown or not all(weight in weights for weight in linear) or block.kind != kind:
        raise refused
    return Group(name, kind, block.units, parts)
