"""Channel permutation: the inputs of a layer are put in another order, together with what feeds them.

The network computes what it did, to rounding, and groups of n:m hold other weights, so that more score can be kept.
Hidden neurons of an MLP may change places, and the channels of the values within a head: rows of the layer that gives
them and columns of the layer that takes them. Pool and Yu 2021, Channel permutations for N:M sparsity (NeurIPS).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .structure import COLUMNS, HEADS, NEURONS, Group, unit_groups

VALUES = ("qkv", "v", "gate")  # layers whose last rows are the channels of the values, in the order of proj's columns
SWEEPS = 10  # over all pairs of groups, at most; each gains less than the one before
TINY = 1e-6  # of the kept score: what a change of places has to gain, which rounding is below


class Channels(NamedTuple):
    """Channels of a block that may change places within their set.

    sets: how many sets of equal size the channels make up, one after the other. weight: the name of the weight whose
    columns they are. places: for each parameter that goes with them, the dimension, and an int64 tensor (channels,
    copies) of where each channel lies.
    """

    sets: int
    weight: str
    places: dict[str, tuple[int, Tensor]]


def channels_of(group: Group) -> Channels:
    """The channels of a group of units: its neurons, or those of the values of each head."""
    places = {}
    for name, dim, unit in group.parts:
        layer = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if group.kind == NEURONS:
            places[name] = dim, unit.argsort(stable=True).view(group.units, -1)
        elif dim == COLUMNS and layer == "proj":
            places[name] = dim, torch.arange(len(unit))[:, None]
        elif layer in VALUES:
            channels = len(unit) // 3 if layer == "qkv" else len(unit)
            places[name] = dim, torch.arange(len(unit) - channels, len(unit))[:, None]
    weight = next(name for name, (dim, _) in places.items() if dim == COLUMNS)
    return Channels(group.units if group.kind == HEADS else 1, weight, places)


@torch.no_grad()
def best_orders(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    masks_of: Mapping[str, Callable[[Tensor], Tensor]],
    groups: Mapping[str, tuple[int, int]],
) -> dict[str, Tensor]:
    """By name of the weight whose inputs they are, the orders of channels that keep more score than the one there is.

    Args:
        model: one with blocks that `structure.py` knows; others stay as they are. It is not changed.
        scores: of its prunable weights.
        masks_of: by name of a weight, from scores to the mask.
        groups: by name of a weight (n, m): n of every m are kept.

    Returns:
        Int64 tensors (channels,) on the CPU: the channel that comes to each place.
    """
    orders = {}
    for channels in map(channels_of, unit_groups(model, (HEADS, NEURONS), known_only=True)):
        n, m = groups.get(channels.weight, (1, 1))
        size = scores[channels.weight].shape[1] // channels.sets
        if n == m or size % m:
            continue
        order = better_order(scores[channels.weight], n, m, channels.sets).cpu()
        before = after = 0.0
        for name, (dim, places) in channels.places.items():
            if name in masks_of:  # a mask may look at the order of the rows too
                moved = _moved(scores[name], dim, places, order)
                before += _kept(scores[name], masks_of[name])
                after += _kept(moved, masks_of[name])
        if after > before:
            orders[channels.weight] = order
    return orders


@torch.no_grad()
def permute(model: nn.Module, orders: Mapping[str, Tensor]) -> None:
    """Puts channels into other orders, in place; the model computes what it did, to rounding.

    orders: what `best_orders` returned.
    """
    parameters = dict(model.named_parameters())
    for channels in map(channels_of, unit_groups(model, (HEADS, NEURONS), known_only=True)):
        if channels.weight in orders:
            for name, (dim, places) in channels.places.items():
                parameters[name].copy_(_moved(parameters[name], dim, places, orders[channels.weight]))


def better_order(score: Tensor, n: int, m: int, sets: int = 1) -> Tensor:
    """An order of columns for which the n largest of every m of each row have a sum that is no smaller.

    In turns, every group of columns meets every other one of its set, and the two exchange those two columns that gain
    most, if any exchange gains. It ends when no exchange does, or after SWEEPS turns.

    Args:
        score: shape (outputs, inputs), non-negative.
        n, m: n of every m are kept, n < m; m divides the inputs of a set.
        sets: columns stay within so many sets of equal size, one after the other.

    Returns:
        Int64 tensor (inputs,): the column that comes to each place.
    """
    outputs, inputs = score.shape
    count = inputs // sets // m
    columns = score.T.float().reshape(sets, count, m, outputs).clone()
    order = torch.arange(inputs, device=score.device).view(sets, count, m)
    least = TINY * float(columns.mean()) * outputs * m
    all_sets = range(count + count % 2)
    for _ in range(SWEEPS):
        changed = False
        ring = list(all_sets)
        for _ in all_sets[1:]:  # as in a tournament
            half = len(ring) // 2
            pairs = [pair for pair in zip(ring[:half], ring[:half - 1:-1], strict=True) if max(pair) < count]
            one, other = torch.tensor(pairs, device=score.device).view(-1, 2).T
            gains = _gains(columns[:, one], columns[:, other], n)
            best, which = gains.flatten(2).max(2)
            if (best > least).any():
                changed = True
                swaps, pair = (best > least).nonzero(as_tuple=True)
                a, b = one[pair], other[pair]
                i, j = which[swaps, pair] // m, which[swaps, pair] % m
                for values in (columns, order):
                    values[swaps, a, i], values[swaps, b, j] = values[swaps, b, j], values[swaps, a, i]
            ring = [ring[0], ring[-1], *ring[1:-1]]
        if not changed:
            break
    return order.flatten()


# ---- helpers, not exported ----


def _kept(score: Tensor, mask_of: Callable[[Tensor], Tensor]) -> float:
    return float((score * mask_of(score)).sum(dtype=torch.float64))


def _moved(values: Tensor, dim: int, places: Tensor, order: Tensor) -> Tensor:
    """Values with the channels in another order."""
    source = torch.arange(values.shape[dim])
    source[places.flatten()] = places[order].flatten()
    return values.index_select(dim, source.to(values.device))


def _gains(one: Tensor, other: Tensor, n: int) -> Tensor:
    """What the kept score gains if column i of a group and column j of the other change places.

    one, other: shape (sets, pairs, m, outputs). Returns shape (sets, pairs, m, m).

    A group without one of its columns keeps its n - 1 largest anyway; another column adds what it has above the n-th.
    """
    def without(group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without each column in turn, the sum of the n - 1 largest and the n-th largest; and the sum of the n largest."""
        m = group.shape[2]
        largest = group.topk(min(n + 1, m), 2).values
        top, nth = largest[:, :, :n].sum(2, keepdim=True), largest[:, :, n - 1:n]
        following = largest[:, :, n:n + 1]
        inside = group >= nth  # on a tie both are alike
        limit = torch.where(inside, following, nth)
        kept = torch.where(inside, top - group, top - nth)
        return kept, limit, top
    kept_one, limit_one, top_one = without(one)
    kept_other, limit_other, top_other = without(other)
    gains = []
    for i in range(one.shape[2]):
        into_one = torch.maximum(other, limit_one[:, :, i:i + 1]) + kept_one[:, :, i:i + 1]
        into_other = torch.maximum(one[:, :, i:i + 1], limit_other) + kept_other
        gains.append((into_one + into_other - top_one - top_other).sum(3))
    return torch.stack(gains, 2)
