"""Finds the largest scores of a tensor, or of all layers together, by counting, not sorting.

Scores are finite and non-negative. Non-negative floats have the same order as their bit patterns,
so the leading 16 bits put every score into one of 32768 bins, a few thousand of which are occupied.
Only the bin with the k-th largest score has to be sorted. On a CPU, numpy does the passes over the
scores: it asks for large pages, and without them the page faults of fresh memory take longer than
the work itself. A GPU sorts in less time than it would take to copy the scores. For LAMP it counts
as well: sums in the order of a sort would depend on the device, and sums by bins are made exact.

Among equal scores the earlier one is kept, in row-major order and the earlier layer first, so that
a result does not depend on the device, the number of threads or the sorting algorithm.
"""

import math
import struct
from bisect import bisect_left
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

BINS = 2**15  # the leading 16 bits of a non-negative float; the sign bit is 0
# How many scores are handled at once, so that intermediate results stay in the cache
CHUNK = 2**18
MOST_EXPONENT = 1000  # of a power of two that scores are multiplied by; float64 has little more


def k_largest(score: Tensor, k: int, at_least: Tensor | None = None) -> Tensor:
    """Mask of the shape of `score`, on its device, that keeps the `k` largest.

    Args:
        score: a tensor of any shape, float32 or float64.
        k: from 0 to the number of scores.
        at_least: `suffix_sums(histogram(score))`, if it is known already.
    """
    if score.device.type != "cpu":
        return _k_largest_by_sorting(score.flatten(), k).view(score.shape)
    at_least = suffix_sums(histogram(score)) if at_least is None else at_least
    return _k_largest_by_counting(score.flatten(), k, at_least).view(score.shape)


def largest_overall(scores, budget: int) -> dict[str, int]:
    """How many of the `budget` largest scores over all layers lie in each layer.

    Args:
        scores: a `Scores`, which counts what is in each bin once and remembers it.
        budget: from 0 to the number of all scores.
    """
    if not _on_cpu(scores):
        return _largest_overall_by_sorting(scores, budget)
    at_least = torch.stack([scores.at_least(name) for name in scores])

    # The scores above the border bin are kept; those in it have to be compared
    border = _border_bin(at_least.sum(0), budget)
    undecided = [distinct(scores[name], border, border + 1) for name in scores]
    return _fill(scores, at_least[:, border + 1], undecided, budget)


def largest_lamp_scores_overall(scores, budget: int) -> dict[str, int]:
    """How many of the `budget` largest LAMP scores over all layers lie in each layer.

    `pruners.lamp` defines them. A LAMP score grows with the score that it is made from, so the bins
    of a layer bound the LAMP scores of the weights in them. These bounds decide nearly all weights,
    once bisection has found the threshold. LAMP scores themselves are computed only in the one or
    two bins of each layer that the threshold lies in.

    Args:
        scores: a `Scores`, which counts what is in each bin once and remembers it.
        budget: from 0 to the number of all scores.
    """
    source = _CpuBins(scores) if _on_cpu(scores) else _GpuBins(scores)
    layers = source.layers()
    at_least = torch.stack([layer.at_least for layer in layers])
    floor = torch.stack([layer.floor for layer in layers])

    def first_sure(threshold: float) -> Tensor:
        """For each layer the lowest bin whose weights all surely reach the threshold."""
        return torch.searchsorted(floor, torch.full((len(floor), 1), threshold, dtype=floor.dtype))

    def last_possible(threshold: float) -> Tensor:
        """For each layer the lowest bin that may hold a weight that reaches the threshold.

        It is the bin below the first sure one: weights further below have smaller squares and
        larger sums than the floor of that bin.
        """
        return (first_sure(threshold) - 1).clamp(min=0)

    def reaches_budget(lowest_bin: Callable[[float], Tensor]) -> Callable[[float], bool]:
        """Whether the bins from `lowest_bin` up hold the budget, as a function of the threshold."""
        return lambda threshold: int(at_least.gather(1, lowest_bin(threshold)).sum()) >= budget

    # The score of the last weight kept lies between two thresholds, so only the bins between them
    # have to be looked at closely.
    low = last_possible(largest_threshold(reaches_budget(first_sure)))
    high = first_sure(math.nextafter(largest_threshold(reaches_budget(last_possible)), 2))

    kept = at_least.gather(1, high).squeeze(1)
    bins = list(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True))
    undecided = [
        layer.candidates(found, stop)
        for layer, found, (_, stop) in zip(layers, source.within(bins, at_least), bins, strict=True)
    ]
    return _fill(scores, kept, undecided, budget)


def largest_threshold(holds: Callable[[float], bool]) -> float:
    """The largest float64 in [0, 1] for which `holds`.

    `holds` is true at 0, and once it is false it stays false. The bit patterns of non-negative
    floats have the same order as the floats, so bisecting them takes 62 steps at any scale.
    """

    def threshold(bits: int) -> float:
        return struct.unpack("<d", struct.pack("<q", bits))[0]

    bits_of_one = struct.unpack("<q", struct.pack("<d", 1.0))[0]
    candidates = range(1, bits_of_one + 1)
    return threshold(bisect_left(candidates, True, key=lambda bits: not holds(threshold(bits))))


def histogram(score: Tensor, parts_of: Callable | None = None) -> Tensor:
    """The number of scores in each bin, or the sum of what they count; shape (BINS,).

    Args:
        score: on the CPU.
        parts_of: from scores to what each of them counts instead of 1, in two parts, which are
            summed by themselves.
    """
    bits, dropped = _LAYOUT[score.dtype]
    totals: list = [0, 0]
    for chunk in score.flatten().split(CHUNK):
        bins = (chunk.view(bits) >> dropped).numpy()
        parts = parts_of(chunk) if parts_of else [None]
        sums = [np.bincount(bins, part, minlength=BINS) for part in parts]
        totals = [total + part for total, part in zip(totals, sums, strict=False)]
    return torch.from_numpy(sum(totals))


def suffix_sums(values: Tensor) -> Tensor:
    """For each bin the sum over it and all higher bins, and a final 0; shape (BINS + 1,)."""
    return torch.cat([values, values.new_zeros(1)]).flip(0).cumsum(0).flip(0)


def distinct(score: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The distinct scores in bins start to stop - 1, largest first, and their counts.

    Scores are on the CPU.
    """
    edges = bin_edges(score.dtype)
    low = edges[start].item()
    high = edges[stop].item()
    flat = score.flatten().numpy()
    return _counted(torch.from_numpy(flat[(flat >= low) & (flat < high)]))


def bin_edges(dtype: torch.dtype) -> Tensor:
    """The smallest score of each bin, shape (BINS + 1,); infinity past the finite scores."""
    bits, dropped = _LAYOUT[dtype]
    edges = (torch.arange(BINS + 1, dtype=bits).clamp(max=BINS - 1) << dropped).view(dtype)
    return edges.nan_to_num(nan=torch.inf, posinf=torch.inf)


# ---- helpers, not exported ----

# The integer type of the same size, and how many bits to drop
_LAYOUT = {torch.float32: (torch.int32, 16), torch.float64: (torch.int64, 48)}


def _border_bin(at_least: Tensor, k: int) -> int:
    """The bin of the k-th largest score: higher bins have fewer than k, with it they have k."""
    return int((at_least[:BINS] >= k).count_nonzero()) - 1


def _k_largest_by_counting(flat: Tensor, k: int, at_least: Tensor) -> Tensor:
    edges = bin_edges(flat.dtype)
    border = _border_bin(at_least, k)
    flat = flat.numpy()
    mask = flat >= edges[border + 1].item()

    # Sort the scores of the border bin only
    undecided = np.flatnonzero((flat >= edges[border].item()) ^ mask)
    best_first = np.argsort(-flat[undecided], kind="stable")
    missing = k - int(at_least[border + 1])
    mask[undecided[best_first[:missing]]] = True
    return torch.from_numpy(mask)


def _k_largest_by_sorting(flat: Tensor, k: int) -> Tensor:
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:k]] = True
    return mask


def _on_cpu(scores) -> bool:
    return all(weight.device.type == "cpu" for weight in scores.weights.values())


def _largest_overall_by_sorting(scores, budget: int) -> dict[str, int]:
    """`largest_overall` on a GPU: waits for it twice, to check the scores and for the counts."""
    if budget == 0:
        return dict.fromkeys(scores, 0)
    flat = torch.cat([scores[name].flatten() for name in scores])
    scores.check()
    last = flat.sort(descending=True).values[budget - 1]  # the smallest score that is kept

    layers = flat.split([scores.sizes[name] for name in scores])
    above = [(layer > last).count_nonzero() for layer in layers]
    equal = [(layer == last).count_nonzero() for layer in layers]
    counts = torch.stack([torch.stack(above), torch.stack(equal)], 1).tolist()

    # On a tie the earlier layer comes first
    left = budget - sum(sure for sure, _ in counts)
    kept = {}
    for name, (sure, tied) in zip(scores, counts, strict=True):
        kept[name] = sure + min(tied, left)
        left -= min(tied, left)
    return kept


def _counted(values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values, largest first, and their counts."""
    values, counts = torch.unique(values, return_counts=True)
    return values.flip(0), counts.flip(0)


def _fill(
    scores: Mapping[str, Tensor], kept: Tensor, undecided: list[tuple[Tensor, Tensor]], budget: int
) -> dict[str, int]:
    """Keeps the best undecided weights on top of `kept`, until the budget is met.

    undecided: for each layer the distinct values by which weights are compared, and how many
        weights have each value.
    """
    layer = torch.repeat_interleave(torch.tensor([len(values) for values, _ in undecided]))
    values, counts = (torch.cat(column) for column in zip(*undecided, strict=True))

    # The sort is stable, so that on a tie the earlier layer comes first
    best_first = values.argsort(descending=True, stable=True)
    layer = layer[best_first]
    counts = counts[best_first]

    # What is left of the budget when all better values have been kept
    left = budget - kept.sum() - (counts.cumsum(0) - counts)
    kept = kept.index_add(0, layer, left.clamp(min=0).minimum(counts))
    return dict(zip(scores, kept.tolist(), strict=True))


class _LampBins:
    """Bounds of the LAMP scores of a layer, from the bins of its weights, on the CPU.

    Args:
        at_least: for each bin the number of scores in it and all higher bins.
        squares: the sum of the scaled squares of the scores in each bin.
        scale: what scores are multiplied by.
        dtype: of the scores.
    """

    def __init__(self, at_least: Tensor, squares: Tensor, scale: float, dtype: torch.dtype):
        self.at_least = at_least
        self.squares = suffix_sums(squares)
        self._scale = scale

        # No weight of a bin scores less than its floor. Floors never fall from a bin to the next.
        edges = bin_edges(dtype)[:-1]
        self.floor = _scaled_square(edges, scale) / self.squares[:-1]
        self.floor[0] = 0.0  # in a layer of zeros it would be 0 / 0

    def candidates(self, found: tuple[Tensor, Tensor], stop: int) -> tuple[Tensor, Tensor]:
        """The LAMP scores of the distinct scores below bin `stop`, largest first; their counts."""
        values, counts = found
        squares = _scaled_square(values, self._scale)
        sums = self.squares[stop] + (squares * counts).cumsum(0)
        lamp_scores = torch.where(sums > 0, squares / sums, 0.0)

        # The largest weight of the layer is among them: the first of its equals has score 1
        if self.at_least[stop] == 0:
            lamp_scores = torch.cat([torch.ones(1, dtype=lamp_scores.dtype), lamp_scores])
            counts = torch.cat([counts.new_ones(1), counts[:1] - 1, counts[1:]])
        return lamp_scores, counts


def _scale(score: Tensor) -> Tensor:
    """A power of two that brings the largest score near 1, so that all squares are in range."""
    exponent = torch.frexp(score.max()).exponent.long().clamp(-MOST_EXPONENT, MOST_EXPONENT)
    return ((1023 - exponent) << 52).view(torch.float64)  # by its bits: `pow` may round


def _scaled_square(score: Tensor, scale: float | Tensor) -> Tensor:
    scaled = score.double() * scale
    return scaled * scaled


def _two_parts(square: Tensor) -> tuple[Tensor, Tensor]:
    """Squares in two parts, the sums of which over a bin are exact in float64, in any order.

    Squares of one bin have nearly one size. The square of a float32 has 48 bits, and each part 24:
    2^28 parts have an exact sum. Squares of float64 are rounded to 53 bits, and 2^23 parts have.
    """
    upper = square.float().double()
    return upper, square - upper


class _CpuBins:
    """What LAMP needs to know of scores on the CPU."""

    def __init__(self, scores):
        self._scores = scores

    def layers(self) -> list[_LampBins]:
        return [self._layer(name) for name in self._scores]

    def _layer(self, name: str) -> _LampBins:
        score = self._scores[name]
        scale = _scale(score).item()

        def parts(chunk: Tensor) -> list[np.ndarray]:
            return [part.numpy() for part in _two_parts(_scaled_square(chunk, scale))]

        squares = histogram(score, parts)
        return _LampBins(self._scores.at_least(name), squares, scale, score.dtype)

    def within(self, bins, at_least) -> list[tuple[Tensor, Tensor]]:
        """The distinct scores in bins start to stop - 1 of each layer, and their counts."""
        found = zip(self._scores, bins, strict=True)
        return [distinct(self._scores[name], start, stop) for name, (start, stop) in found]


class _GpuBins:
    """The same of scores on a GPU, whose bins are copied to the CPU, and only few of the scores."""

    def __init__(self, scores):
        self._scores = scores

    def layers(self) -> list[_LampBins]:
        """Waits for the GPU once."""
        sums = []
        scales = []
        for name in self._scores:
            score = self._scores[name].flatten()
            bits, dropped = _LAYOUT[score.dtype]
            bins = (score.view(bits) >> dropped).long() & (BINS - 1)  # NaN may have a sign
            scale = _scale(score)

            square = _scaled_square(score, scale)
            parts = torch.stack([torch.ones_like(square), *_two_parts(square)], 1)
            counts, upper, lower = parts.new_zeros(BINS, 3).index_add_(0, bins, parts).T
            sums += [counts, upper + lower]
            scales.append(scale)

        found = self._scores.checked(torch.cat([torch.stack(scales), torch.stack(sums).flatten()]))
        of_layers = found[len(scales) :].view(-1, 2, BINS)
        scales = found[: len(scales)].tolist()
        return [
            _LampBins(suffix_sums(counts.long()), squares, scale, score.dtype)
            for scale, (counts, squares) in zip(scales, of_layers, strict=True)
        ]

    def within(self, bins, at_least: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Waits once as well: it is known where in the order of a layer its bins begin and end."""
        found = []
        for name, of_layer, (start, stop) in zip(self._scores, at_least, bins, strict=True):
            best_first = self._scores[name].flatten().sort(descending=True).values
            found.append(best_first[int(of_layer[stop]) : int(of_layer[start])])

        copied = torch.cat(found).cpu()
        return [_counted(values) for values in copied.split([len(values) for values in found])]
