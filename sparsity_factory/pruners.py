"""Every supported pruning algorithm, and `compute_masks`, which runs one on a model.

A pruner is an *allocation*: it decides how many weights each layer keeps. It is a function

    def pruner(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]

from the scores of every prunable weight (parameter name to tensor of the weight's shape, finite, non-negative, on the
weight's device, in model order) and the share of weights to remove, to the number of weights each layer keeps. What it
is given is a `Scores`, which also knows the shapes and how the scores are distributed. Within a layer the largest are
kept, which `patterns.py` does. To add a pruner, write such a function and name it in `PRUNERS`.

Sizes: N prunable weights in all, n of them in a layer. The global budget is round(N (1 - sparsity)), half to even.
"""

import numbers
from collections.abc import Callable, Iterator, Mapping
from os import PathLike

import numpy as np
import torch
from torch import Tensor, nn

from . import counting, patterns
from .config import resolve_levels
from .errors import PruningError
from .masks import prunable_weights


def compute_masks(
    model: nn.Module,
    pruner: str,
    sparsity: float | None = None,
    custom_config: str | PathLike | Mapping | None = None,
    score: str = "magnitude",
) -> dict[str, Tensor]:
    """Decides which prunable weights of a model to keep. The model is not changed.

    Args:
        model: any module with linear layers; see `prunable_weights` for which of its weights are prunable.
        pruner: a name in `PRUNERS`.
        sparsity: the fraction of the prunable weights to remove, in [0, 1); for every pruner but `custom`.
        custom_config: path of a YAML file, or what such a file parses to; for `custom` only.
        score: a name in `SCORES`: how much a weight matters.

    Returns:
        Parameter name to bool tensor of the weight's shape, on its device, True where the weight is kept; in model
        order.

    Raises:
        PruningError: an unknown name, a sparsity or configuration that is wrong, missing or superfluous, a model
            without prunable weights, a weight that is not finite.
    """
    if pruner not in PRUNERS:
        raise PruningError(f"unknown pruner {pruner!r}: expected one of {', '.join(PRUNERS)}")
    if score not in SCORES:
        raise PruningError(f"unknown score {score!r}: expected one of {', '.join(SCORES)}")
    _check_request(pruner, sparsity, custom_config)
    weights = prunable_weights(model)
    if not weights:
        raise PruningError(f"{type(model).__name__} has no prunable weights: no nn.Linear besides the classifier")
    scores = Scores(weights, SCORES[score])
    allocation = PRUNERS[pruner](scores, custom_config if pruner == "custom" else float(sparsity))
    for name, weight in weights.items():
        kept = allocation.get(name)
        if not isinstance(kept, tuple) and (kept is None or not 0 <= kept <= weight.numel()):
            raise PruningError(f"pruner {pruner} keeps {kept} of {name}: expected 0 to {weight.numel()} weights")
    return {name: scores.mask(name, allocation[name]) for name in weights}


class Scores(Mapping[str, Tensor]):
    """Scores by parameter name, on the device of the weight, computed when asked for; and how they are distributed.

    Another pass over the weights costs less time than touching the memory for a copy of them all, and no such memory.
    All scores have one dtype, so that they compare: float64 when some weight has it, else float32 (half precision is
    exact in it).

    Attributes:
        shapes: parameter name to shape; asking for it computes no score.
    """

    def __init__(self, weights: Mapping[str, Tensor], score: Callable[[Tensor], Tensor]):
        self._weights, self._score = weights, score
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        wide = any(weight.dtype == torch.float64 for weight in weights.values())
        self._dtype = torch.float64 if wide else torch.float32
        self._finite: set[str] = set()
        self._at_least: dict[str, Tensor] = {}
        self._latest: tuple[str, Tensor] | None = None  # what one layer is asked for comes in a row

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if self._latest and self._latest[0] == name:
            return self._latest[1]
        self._latest = None  # so that its memory is used again: fresh memory takes longer
        score = self._score(self._weights[name].detach().to(self._dtype))
        if name not in self._finite and not score.amax().isfinite():
            raise PruningError(f"{name} has a weight that is NaN or infinite")
        self._finite.add(name)
        self._latest = name, score
        return score

    def at_least(self, name: str) -> Tensor:
        """For each bin of `counting` the scores in it and in all higher bins: counted once, then remembered."""
        if name not in self._at_least:
            self._at_least[name] = counting.suffix_sums(counting.histogram(self[name]))
        return self._at_least[name]

    def mask(self, name: str, kept: int | tuple[int, int]) -> Tensor:
        """The mask of a layer that keeps so many weights, or (n, m) for n of every m."""
        if isinstance(kept, tuple):
            return patterns.n_of_m(self[name], *kept)
        return counting.k_largest(self[name], kept, self._at_least.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def unif(scores: Scores, sparsity: float) -> dict[str, int]:
    """Uniform: every layer has the same sparsity and keeps n - round(sparsity n)."""
    return {name: _remaining(n, sparsity) for name, n in _sizes(scores).items()}


def unifplus(scores: Scores, sparsity: float) -> dict[str, int]:
    """Uniform+: the first and the last prunable layer stay dense, the others share the sparsity that meets the target.

    Gale et al. 2019, arXiv:1902.09574.

    Raises:
        PruningError: the target is out of reach with those two layers dense.
    """
    sizes = _sizes(scores)
    total, middle = sum(sizes.values()), sum(list(sizes.values())[1:-1])
    if sparsity * total >= middle and sparsity > 0:
        limit = f"less than {middle / total:.4f}" if middle else "0"
        raise PruningError(
            f"unifplus keeps the first and last prunable layer dense: expected a sparsity of {limit}, got {sparsity:g}"
        )
    dense = {next(iter(sizes)), next(reversed(sizes))}
    shared = sparsity * total / middle if middle else 0.0
    return {name: n if name in dense else _remaining(n, shared) for name, n in sizes.items()}


def glob(scores: Scores, sparsity: float) -> dict[str, int]:
    """Global: the largest scores over all layers together are kept; on a tie the earlier layer's. Meets the budget."""
    return counting.largest_overall(scores, _budget(scores, sparsity))


def erk(scores: Scores, sparsity: float) -> dict[str, int]:
    """Erdos-Renyi kernel: a layer keeps a number of weights proportional to fan_in + fan_out.

    A layer that would keep more than it has stays dense, and the rest of the budget is shared again. Each layer's share
    is rounded by itself, so that the total may differ from the budget by half a weight per layer.

    Evci et al. 2020, arXiv:1911.11134.
    """
    sizes = _sizes(scores)
    fans = {name: sum(shape) for name, shape in scores.shapes.items()}
    kept = {}
    left = sum(sizes.values()) * (1 - sparsity)
    while len(kept) < len(sizes):
        shared = {name: fan for name, fan in fans.items() if name not in kept}
        scale = left / sum(shared.values())
        full = {name: sizes[name] for name, fan in shared.items() if scale * fan > sizes[name]}
        kept |= full or {name: round(scale * fan) for name, fan in shared.items()}
        left -= sum(full.values())
    return {name: kept[name] for name in sizes}


def lamp(scores: Scores, sparsity: float) -> dict[str, int]:
    """Layer-adaptive magnitude pruning: the largest LAMP scores over all layers together are kept.

    The LAMP score of a weight w is w^2 over the sum of v^2, in float64, over the weights v of its layer with
    |v| >= |w|, w itself included (with another score than the magnitude, that score stands for |w|). Equal weights of a
    layer have equal scores, except that the first of its largest weights counts as score 1, as it does without ties; so
    every layer keeps a weight. A layer of zeros has score 0 elsewhere. On a tie the earlier layer goes first.

    The budget is met exactly. When it is smaller than the number of layers, the earlier layers keep one weight each,
    and the later ones none.

    Lee et al. 2021, arXiv:2010.07611.
    """
    return counting.largest_lamp_scores_overall(scores, _budget(scores, sparsity))


def custom(scores: Scores, config: str | PathLike | Mapping) -> dict[str, int | tuple[int, int]]:
    """What the configuration says, per layer: the number of weights kept, or (n, m) for n of every m.

    Raises:
        PruningError: see `config.resolve_levels`.
    """
    return resolve_levels(config, scores.shapes)


PRUNERS: dict[str, Callable] = {pruner.__name__: pruner for pruner in (lamp, glob, unif, unifplus, erk, custom)}


def magnitude(weight: Tensor) -> Tensor:
    """The absolute value of each weight."""
    if weight.device.type == "cpu":  # numpy asks for large pages; page faults are most of the time that torch takes
        return torch.from_numpy(np.abs(weight.numpy()))
    return weight.abs()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {score.__name__: score for score in (magnitude,)}


# ---- helpers, not exported ----


def _check_request(pruner: str, sparsity, custom_config) -> None:
    if pruner == "custom":
        if sparsity is not None:
            raise PruningError("pruner custom takes its sparsity from the configuration: expected no sparsity")
        if custom_config is None:
            raise PruningError("pruner custom needs a configuration: expected a YAML file")
        return
    if custom_config is not None:
        raise PruningError(f"pruner {pruner} takes no custom configuration: expected a sparsity only")
    if sparsity is None:
        raise PruningError(f"pruner {pruner} needs a sparsity: expected a number in [0, 1)")
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real) or not 0 <= sparsity < 1:
        raise PruningError(f"sparsity {sparsity!r}: expected a number in [0, 1)")


def _sizes(scores: Scores) -> dict[str, int]:
    return {name: shape.numel() for name, shape in scores.shapes.items()}


def _budget(scores: Scores, sparsity: float) -> int:
    return round(sum(_sizes(scores).values()) * (1 - sparsity))


def _remaining(n: int, sparsity: float) -> int:
    return n - round(sparsity * n)
