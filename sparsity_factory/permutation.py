"""Channel permutation puts the inputs of a layer, and the outputs that feed them, in another order.

The model computes the same up to rounding, but groups of n:m hold other weights, so that more score
can be kept. The hidden neurons of an MLP may change places, and so may the channels of the values
within a head: rows of the layers that compute them, and columns of the layer that reads them.

Pool and Yu 2021, Channel Permutations for N:M Sparsity (NeurIPS).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .masks import layer_name
from .patterns import Pattern
from .units import COLUMNS, HEADS, NEURONS, Group, unit_groups

# The last rows of these layers are the channels of the values, in the order of proj's columns
VALUES = ("qkv", "in_proj", "v", "gate")
JOINT = ("qkv", "in_proj")  # of these the last third
READERS = ("proj", "out_proj")
ROUNDS = 100  # of the search
TINY = 1e-6  # a gain below this share of its terms is rounding


class Channels(NamedTuple):
    """Channels of a block that may change places within their set.

    weight: the name of the weight whose columns they are.
    sets: into how many consecutive sets of one size they fall.
    places: by name, for each parameter that has them: its dimension, and an int64 tensor
        (channels, copies) of the indices of each channel.
    """

    weight: str
    sets: int
    places: dict[str, tuple[int, Tensor]]


@torch.no_grad()
def best_orders(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    pattern_of: Callable[[str], Pattern | None],
) -> dict[str, Tensor]:
    """Orders of channels that keep more score, by name of the weight whose columns they are.

    Args:
        model: its blocks that `units.py` knows are examined. It is not changed.
        scores: of the prunable weights, by name.
        masks: of the same weights, by the patterns: they say how many weights each layer keeps.
        pattern_of: from the name of a weight to its pattern. Only a pattern with groups of m along
            the inputs gives an order. None: its mask stays.

    Returns:
        Int64 tensors (channels,) on the CPU: the channel that comes to each place. Blocks that gain
        nothing have none.
    """
    kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}

    # Of all layers that have the channels: a transposable mask depends on the order of rows, too
    def kept_score(channels: Channels, order: Tensor) -> float:
        total = 0.0
        for name, (dim, places) in channels.places.items():
            pattern = pattern_of(name) if name in kept else None
            if pattern:
                score = _moved(scores[name], dim, places, order)
                mask = pattern.mask(score, kept[name])
                total += float((score * mask).sum(dtype=torch.float64))
        return total

    orders = {}
    for channels in _channels(model):
        name = channels.weight
        if name not in kept:
            continue
        m = getattr(pattern_of(name), "m", None)
        outputs, inputs = masks[name].shape
        if not m or inputs // channels.sets % m or kept[name] == outputs * inputs:
            continue

        n = kept[name] * m // (outputs * inputs)
        order = better_order(scores[name], n, m, channels.sets).cpu()
        if kept_score(channels, order) > kept_score(channels, torch.arange(inputs)):
            orders[name] = order
    return orders


@torch.no_grad()
def reorder(model: nn.Module, orders: Mapping[str, Tensor]) -> None:
    """Puts channels in the orders that `best_orders` returned, in place.

    The model computes the same up to rounding.
    """
    parameters = dict(model.named_parameters())
    for channels in _channels(model):
        if channels.weight in orders:
            for name, place in channels.places.items():
                parameters[name].copy_(_moved(parameters[name], *place, orders[channels.weight]))


def better_order(score: Tensor, n: int, m: int, sets: int = 1) -> Tensor:
    """An order of columns in which the n largest of every m of each row sum up to no less.

    In each round every group takes out one column at random, and two groups exchange theirs if each
    gains most from the other. Whatever column c a group receives, it keeps the n - 1 largest of its
    other columns, and the larger one of c and their n-th, t. Since
    max(t, c) = (t + c + abs(t - c)) / 2, the distances of t and c tell the gains.

    Args:
        score: shape (outputs, inputs), finite and non-negative.
        n, m: n of every m are kept, n < m; m divides the inputs of a set.
        sets: the number of consecutive sets of one size that columns do not leave.

    Returns:
        Int64 tensor (inputs,), on the device of the score: the column that comes to each place.
    """
    outputs, inputs = score.shape
    groups = inputs // sets // m
    columns = score.T.float().reshape(sets, groups, m, outputs)
    order = torch.arange(inputs, device=score.device).view(sets, groups, m)
    own = torch.arange(groups, device=score.device)
    generator = torch.Generator().manual_seed(0)

    for _ in range(ROUNDS):
        shuffled = torch.rand(order.shape, generator=generator).argsort(2).to(score.device)
        order = order.gather(2, shuffled)
        columns = columns.gather(2, shuffled[..., None].expand_as(columns))

        # gain[s, i, j]: by how much groups i and j of set s keep more if they exchange columns
        out = columns[:, :, 0]
        limit = columns[:, :, 1:].topk(n, 2).values[:, :, -1]
        distance = torch.cdist(limit, out, p=1)
        as_it_is = distance.diagonal(dim1=1, dim2=2)
        gain = distance + distance.mT - (as_it_is[:, None] + as_it_is[:, :, None])

        # Groups that are the best partner of their best partner exchange
        best, other = gain.max(2)
        exchanges = (other.gather(1, other) == own) & (best > TINY * distance.amax())
        source = torch.where(exchanges, other, own)
        order[:, :, 0] = order[:, :, 0].gather(1, source)
        columns[:, :, 0] = out.gather(1, source[..., None].expand_as(out))

    return order.flatten()


# ---- helpers, not exported ----


def _channels(model: nn.Module) -> list[Channels]:
    return [_channels_of(group) for group in unit_groups(model)]


def _channels_of(group: Group) -> Channels:
    """The neurons of a group of units, or the channels of the values of its heads."""
    places = {}
    for name, dim, unit in group.parts:
        layer = layer_name(name).removesuffix("bias").rstrip("._").rpartition(".")[2]
        if group.kind == NEURONS:
            places[name] = dim, unit.argsort(stable=True).view(group.units, -1)
        elif layer in VALUES or layer in READERS and dim == COLUMNS:
            channels = len(unit) // 3 if layer in JOINT else len(unit)
            places[name] = dim, torch.arange(len(unit) - channels, len(unit))[:, None]

    weight = next(name for name, (dim, _) in places.items() if dim == COLUMNS)
    return Channels(weight, group.units if group.kind == HEADS else 1, places)


def _moved(values: Tensor, dim: int, places: Tensor, order: Tensor) -> Tensor:
    """Values with the channels in another order."""
    source = torch.arange(values.shape[dim])
    source[places.flatten()] = places[order].flatten()
    return values.index_select(dim, source.to(values.device))
