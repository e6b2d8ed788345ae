"""Allocations, which share the global budget among layers, and `compute_masks`, which uses them.

A pruner is the name of an allocation. An allocation is a function

    def allocation(scores: Scores, sparsity: float) -> dict[str, int]

from the scores of every prunable weight, in model order, and the fraction of weights to remove, to
the number of weights that each layer keeps. An allocation knows no pattern: the pattern in
`patterns.py` keeps the largest scores of a layer. If the pattern removes blocks, the allocation is
given the scores of blocks and counts blocks. To add an allocation, write such a function and name
it in `PRUNERS`.

N is the number of all prunable weights, n that of a layer. The global budget is
round(N (1 - sparsity)), half to even.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from .custom_yaml import Amount, BlockLevel, resolve_levels, resolve_units
from .damping import DAMPING, DAMPING_LINE
from .errors import PruningError, as_flag, in_words, short, warn_once
from .k_largest import largest_lamp_scores_overall, largest_overall, largest_threshold
from .knapsack import cheapest
from .levels import at_levels, kfac
from .masks import Layers, as_matrix, from_matrix, prunable_weights
from .method import (
    Count,
    Fraction,
    NotNegative,
    Numbers,
    Positive,
    check_method_options,
    chosen,
    describe,
    method,
    name_of,
    options_of,
)
from .pattern_base import Pattern, down
from .patterns import n_of_m, parse_pattern
from .reconstruction import COLUMNS_LINE
from .scores import SCORES, Scores, wanda
from .statistics import Statistics
from .unit_patterns import keep_units

UpToHalf = Annotated[float, Numbers("a number in [0, 0.5]", 0, 0.5)]


def compute_masks(
    model: nn.Module,
    pruner: str | Callable,
    sparsity: float | None = None,
    custom_config: str | PathLike | Mapping | None = None,
    score: str | Callable = "magnitude",
    *,
    pattern: str = "unstructured",
    budget: str = "weights",
    method_options: Mapping[str, float] | None = None,
    layers: Layers | None = None,
    statistics: Statistics | None = None,
    seed: int = 0,
    reconstructed: bool = False,
    among: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Decides which prunable weights of a model to keep. The model is not changed.

    Args:
        model: any module with linear layers; `prunable_weights` says which weights are prunable.
        pruner: how the budget is shared among layers: a name in `PRUNERS`, or an allocation.
        sparsity: the fraction of the prunable weights to remove, in [0, 1); None for `custom`, and
            for a pattern such as 2:4 that has its own. With `budget="macs"`, the fraction of the
            multiply-adds of these weights and of the attention products.
        custom_config: path of a YAML file, or what such a file parses to; for `custom` only.
        score: how much a weight matters: a name in `SCORES`, or such a function.
        pattern: one of the forms in `PATTERNS`, such as `2:4`: what may be removed together.
        budget: `weights`, or with heads and neurons also `macs`; for that the model, one of timm,
            is run once.
        method_options: numbers of pruner and score, such as `{"owl.lambda": 0.1}`.
        layers: which layers are prunable: patterns or a function, as in `prunable_weights`.
        statistics: what `collect_statistics` returned for the model; needed unless
            `needs_of(pruner, score)` is empty.
        seed: the seed of scores that are drawn at random.
        reconstructed: whether a reconstruction follows; `search` then looks at the losses after
            it.
        among: masks by parameter name: only these weights may be kept, as far as they suffice.

    Layers that the pattern does not fit stay dense, and so do blocks whose heads and neurons are
    not known: a warning names them.

    Returns:
        Parameter name to bool tensor of the weight's shape, on its device, True where the weight is
        kept; in model order. All prunable weights have a mask. If heads or neurons are pruned, so
        have their biases and every other parameter with a row or column for each of them.

    Raises:
        PruningError: `check_request` refuses the request; statistics are missing or incomplete; the
            model has no prunable weights, or the pattern does not fit it; a weight or score is not
            finite.
    """
    check_request(pruner, sparsity, custom_config, score, pattern=pattern, budget=budget)
    check_method_options(method_options, options_of(PRUNERS, pruner) | options_of(SCORES, score))
    owned = prunable_weights(model, layers)
    weights = {name: as_matrix(weight) for name, weight in owned.items()}
    among = {name: as_matrix(mask) for name, mask in (among or {}).items()}
    if not weights:
        raise PruningError(
            f"{type(model).__name__} has no prunable weights: no nn.Linear besides the classifier"
        )
    _check_statistics(statistics, weights, pruner, score)

    units = parse_pattern(pattern)
    fitting = _fitting(weights, units)
    measure = chosen(SCORES, score, method_options)
    scores = Scores(fitting, measure, units, statistics, seed, reconstructed, among)
    if pruner == "custom":
        assert custom_config is not None  # `check_request` refuses that
        levels = custom(scores, custom_config)
        masks = {name: mask_at(scores, name, level) for name, level in levels.items()}
        smaller = keep_units(model, scores, partial(resolve_units, custom_config))
        scores.check()
        for name, mask in masks.items():
            if name in smaller and not mask.all():
                raise PruningError(f"custom_config: {name} has a level and units: expected one")
        masks |= smaller
        masks = {name: masks[name] for name, _ in model.named_parameters() if name in masks}
        return _of_parameters(masks, owned)

    share_out = chosen(PRUNERS, pruner, method_options)

    def allocate(scores: Scores, sparsity: float) -> dict[str, int]:
        allocation = share_out(scores, sparsity)
        for name, size in scores.sizes.items():
            kept = allocation.get(name)
            if kept is None or not 0 <= kept <= size:
                raise PruningError(
                    f"pruner {name_of(pruner)} keeps {kept} of {name}: expected 0 to {size} weights"
                )
        return _within({name: allocation[name] for name in scores}, scores.most)

    target = sparsity if units.sparsity is None else units.sparsity
    assert target is not None  # `check_request` refuses that
    dense = {name: weight for name, weight in weights.items() if name not in fitting}
    if dense and units.sparsity is None:
        target = _without_dense(fitting, dense, target, units)  # layers that fit keep less

    masks = units.masks(model, scores, allocate, float(target), budget)
    scores.check()
    if dense:
        masks |= {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
        masks = {name: masks[name] for name in weights}
    return _of_parameters(masks, owned)


def check_request(
    pruner: str | Callable,
    sparsity: float | None = None,
    custom_config: str | PathLike | Mapping | None = None,
    score: str | Callable = "magnitude",
    *,
    pattern: str = "unstructured",
    budget: str = "weights",
    flags: bool = False,
) -> None:
    """Refuses choices with which no model could be pruned: unknown, out of range, or in conflict.

    flags: messages name the choices as the command line does, `--pruner` for `pruner`.

    Raises:
        PruningError: in one line.
    """
    name = as_flag if flags else str
    words = in_words if flags else short

    def expect(good: bool, choice: str, value, wanted: str) -> None:
        if not good:
            raise PruningError(f"{name(choice)} {words(value)}: expected {wanted}")

    # Each by itself
    known = callable(pruner) or isinstance(pruner, str) and pruner in PRUNERS
    expect(known, "pruner", pruner, f"one of {', '.join(PRUNERS)}")
    known = callable(score) or isinstance(score, str) and score in SCORES
    expect(known, "score", score, f"one of {', '.join(SCORES)}")
    parsed = parse_pattern(pattern)
    with_pattern = f"with {name('pattern')} {pattern}"
    budgets = " or ".join(parsed.budgets)
    expect(budget in parsed.budgets, "budget", budget, f"{budgets} {with_pattern}")

    called = name_of(pruner)

    # A custom configuration says everything
    if pruner == "custom":
        by_yaml = f"none with {name('pruner')} custom, whose YAML sets"
        expect(sparsity is None, "sparsity", sparsity, f"{by_yaml} the sparsity")
        expect(pattern == "unstructured", "pattern", pattern, f"{by_yaml} the patterns")
        if custom_config is None:
            raise PruningError(f"{name('pruner')} custom needs {name('custom_config')} as well")
        return
    if custom_config is not None:
        raise PruningError(f"{name('custom_config')} needs {name('pruner')} custom, got {called}")

    # Every other pruner has one sparsity to meet, that of the pattern if it has its own
    if parsed.sparsity is not None:
        expect(sparsity is None, "sparsity", sparsity, f"none {with_pattern}, which sets it")
        alike = f"unif {with_pattern}, which prunes every layer alike"
        expect(pruner == "unif", "pruner", pruner, alike)
        return
    if sparsity is None:
        raise PruningError(
            f"{name('pruner')} {called} needs {name('sparsity')} as well, a number in [0, 1)"
        )
    is_number = isinstance(sparsity, numbers.Real) and not isinstance(sparsity, bool)
    expect(is_number and 0 <= sparsity < 1, "sparsity", sparsity, "a number in [0, 1)")


def needs_of(
    pruner: str | Callable | None = None, score: str | Callable = "magnitude"
) -> frozenset[str]:
    """The names in `STATISTICS` that `compute_masks` needs for these choices; often none."""
    allocation = PRUNERS.get(pruner) if isinstance(pruner, str) else pruner
    measure = SCORES.get(score) if isinstance(score, str) else score
    return describe(allocation).needs | describe(measure).needs


@method()
def unif(scores: Scores, sparsity: float) -> dict[str, int]:
    """Uniform: every layer has the same sparsity and keeps n - round(sparsity n)."""
    return {name: _remaining(n, sparsity) for name, n in scores.sizes.items()}


@method("Gale et al. 2019, arXiv:1902.09574")
def unifplus(scores: Scores, sparsity: float) -> dict[str, int]:
    """Uniform+: first and last prunable layer stay dense, all others get one sparsity.

    That sparsity is the one that meets the target.

    Gale et al. 2019, arXiv:1902.09574.

    Raises:
        PruningError: the target is out of reach with those two layers dense.
    """
    sizes = scores.sizes
    total = sum(sizes.values())
    middle = sum(list(sizes.values())[1:-1])

    if sparsity * total >= middle and sparsity > 0:
        limit = f"less than {middle / total:.4f}" if middle else "0"
        raise PruningError(
            "unifplus keeps the first and last prunable layer dense: expected a sparsity of "
            f"{limit}, got {sparsity:g}"
        )

    dense = {next(iter(sizes)), next(reversed(sizes))}
    shared = sparsity * total / middle if middle else 0.0
    return {name: n if name in dense else _remaining(n, shared) for name, n in sizes.items()}


@method()
def glob(scores: Scores, sparsity: float) -> dict[str, int]:
    """Global: the largest scores over all layers together are kept.

    On a tie the earlier layer's are. The budget is met exactly.
    """
    return largest_overall(scores, _budget(scores.sizes, sparsity))


@method("Evci et al. 2020, arXiv:1911.11134")
def erk(scores: Scores, sparsity: float) -> dict[str, int]:
    """Erdos-Renyi kernel: a layer keeps a number of weights proportional to fan_in + fan_out.

    A layer that would keep more weights than it has stays dense, and the rest of the budget is
    shared again. Each layer's share is rounded by itself, so the total may differ from the budget
    by half a weight per layer.

    Evci et al. 2020, arXiv:1911.11134.
    """
    sizes = scores.sizes
    fans = {name: sum(shape) for name, shape in scores.shapes.items()}
    kept = {}
    left = sum(sizes.values()) * (1 - sparsity)

    while len(kept) < len(sizes):
        shared = {name: fan for name, fan in fans.items() if name not in kept}
        scale = left / sum(shared.values())
        full = {name: sizes[name] for name, fan in shared.items() if scale * fan > sizes[name]}

        # Once no layer overflows, the shares are final
        kept |= full or {name: round(scale * fan) for name, fan in shared.items()}
        left -= sum(full.values())

    return {name: kept[name] for name in sizes}


@method("Lee et al. 2021, arXiv:2010.07611")
def lamp(scores: Scores, sparsity: float) -> dict[str, int]:
    """Layer-adaptive magnitude pruning: the largest LAMP scores over all layers together are kept.

    The LAMP score of a weight w is w^2 divided by the sum of v^2 over the weights v of its layer
    with |v| >= |w|, w itself included, in float64. With another score than the magnitude, that
    score takes the place of |w|. Equal weights of a layer have equal LAMP scores, with one
    exception: the first of its largest weights has 1, as it would without ties, so every layer
    keeps a weight. The other weights of a layer of zeros have 0. On a tie the earlier layer's
    weights are kept.

    The budget is met exactly. If it is smaller than the number of layers, the earlier layers keep
    one weight each, and the later ones none.

    Lee et al. 2021, arXiv:2010.07611.
    """
    return largest_lamp_scores_overall(scores, _budget(scores.sizes, sparsity))


@method(
    "Yin et al. 2024, arXiv:2310.05175",
    needs=wanda.needs,
    outlier="times the mean score of its layer, above which a weight is an outlier; the paper's M",
    lambda_="how far the density of a layer may be from that of the model",
)
def owl(
    scores: Scores, sparsity: float, *, outlier: Positive = 5.0, lambda_: Fraction = 0.08
) -> dict[str, int]:
    """Outlier-weighed: a layer keeps more if more of its weights have an outlying Wanda score.

    A weight is an outlier if abs(w_ij) norm2(x_j) is more than `outlier` times the mean over the
    layer, whichever score then chooses within the layer. Let r be the fraction of outliers in a
    layer, R that in the whole model, and D = 1 - sparsity: then the density of the layer is
    D + lambda (r - R) / max over layers of abs(r - R).

    The budget is met exactly: densities are limited to [one weight, 1], and the others shift by one
    amount. A layer is a prunable weight here, and a transformer block in the paper. The paper asks
    for densities within lambda of D, as here. Its public code spreads them over 2 lambda around
    their mean, so some can be further from it.

    Yin et al. 2024, arXiv:2310.05175.
    """
    sizes = np.array(list(scores.sizes.values()), float)
    wandas = (wanda(scores.weight(name), scores.layer(name)) for name in scores)
    outliers = np.array([_outlier_ratio(score, outlier) for score in wandas])

    deviation = outliers - outliers @ sizes / sizes.sum()
    density = 1 - sparsity + lambda_ * deviation / (np.abs(deviation).max() or 1)
    return _meet_budget(scores, sparsity, lambda share: density + 2 * share - 1)


@method(
    "Lu et al. 2024, arXiv:2410.10912",
    tau="the sparsity of a layer is 1 - tau to 1 + tau times one value for the model",
)
def alpha(scores: Scores, sparsity: float, *, tau: UpToHalf = 0.2) -> dict[str, int]:
    """AlphaPruning: a layer keeps more if the tail of its spectrum is heavier.

    A heavier tail indicates a better trained layer. The tail is the upper half of the nonzero
    eigenvalues of W^T W: e_1, the smallest, to e_k. Hill's estimate of its exponent is
    alpha = 1 + k / sum(ln(e_i / e_1)). The sparsity of a layer is
    c (1 - tau + 2 tau (alpha - min) / (max - min)), with the minimum and maximum of alpha over
    layers, and one c for all. A layer without an exponent, such as one of zeros, is given the
    maximum.

    The budget is met exactly: every layer keeps at least one weight, and c grows for the others.
    Eigenvalues are computed in float64 on the CPU, so that the counts depend on no device. As in
    the public code for vision transformers, each prunable weight has its own sparsity; for language
    models that code has one per block.

    Lu et al. 2024, arXiv:2410.10912.
    """
    exponents = np.array([_hill_exponent(scores.weight(name)) for name in scores])
    largest = exponents[np.isfinite(exponents)].max(initial=0)
    exponents = np.minimum(exponents, largest)

    position = (exponents - exponents.min()) / (np.ptp(exponents) or 1)
    relative = 1 - tau + 2 * tau * position
    return _meet_budget(scores, sparsity, lambda share: 1 - 2 * (1 - share) * relative)


@method("Kuznedelev et al. 2023, arXiv:2210.09223", needs={"removal_costs"})
def cap(scores: Scores, sparsity: float) -> dict[str, int]:
    """Correlation-aware: keeps the weights whose removal costs most if the others compensate.

    A layer keeps as many weights as it has among the largest `cap` scores over all layers,
    whichever score then chooses within the layer. On a tie the earlier layer's are kept. The budget
    is met exactly. With the score `cap` these are the paper's masks.

    Kuznedelev et al. 2023, arXiv:2210.09223.
    """
    return glob(scores.by(SCORES["cap"]), sparsity)


@method(
    "this project; Martens and Grosse 2015, arXiv:1503.05671",
    needs=kfac.needs,
    columns=COLUMNS_LINE,
    damping=DAMPING_LINE,
)
def search(
    scores: Scores, sparsity: float, *, columns: Count | None = None, damping: NotNegative = DAMPING
) -> dict[str, int]:
    """Levels found by search: the sum of what the layers lose is the smallest within the budget.

    Each layer is pruned by itself at each level of the pattern, by its scores or, if a
    reconstruction follows, by Optimal Brain Surgeon; `levels.kfac` is its loss. Of all choices of
    levels within the budget the best is found exactly, up to the rounding of `cheapest`. What is
    then left of the budget, too little for another level, is given to the earliest layers.

    Raises:
        PruningError: the budget is less than the lowest levels take.
    """

    def losses_of(name: str, kept: list[int]) -> list[float]:
        """What a layer loses at each of its levels."""
        mask_of = None if scores.reconstructed else partial(scores.mask, name)
        found = at_levels(
            scores.weight(name),
            scores.layer(name),
            kept,
            scores.pattern,
            mask_of=mask_of,
            columns=columns,
            damping=damping,
        )
        return [kfac(pruned) for pruned in found]

    levels = []
    for name, shape in scores.shapes.items():
        smallest, *others = scores.pattern.levels(shape)
        levels.append([smallest, *(kept for kept in others if kept <= scores.most[name])])
    losses = [losses_of(name, kept) for name, kept in zip(scores, levels, strict=True)]

    budget = _budget(scores.sizes, sparsity)
    least = sum(kept[0] for kept in levels)
    if budget < least:
        most = 1 - least / sum(scores.sizes.values())
        raise PruningError(
            "pruner search keeps something of each layer: expected a sparsity of at most "
            f"{most:.6f}"
        )

    chosen = {}
    for name, kept, option in zip(scores, levels, cheapest(levels, losses, budget), strict=True):
        chosen[name] = kept[option]

    # Spend what the levels leave of the budget
    for name, units in scores.most.items():
        more = max(min(budget - sum(chosen.values()), units - chosen[name]), 0)
        chosen[name] += more - more % scores.pattern.step(scores.shapes[name])
    return chosen


@method()
def custom(scores: Scores, config: str | PathLike | Mapping) -> dict[str, Amount]:
    """As the YAML says: each layer keeps a number of weights, or n of every m.

    Returns:
        Weight name to the number of weights kept, to (n, m), or to a `BlockLevel`.

    Raises:
        PruningError: see `custom_yaml.resolve_levels`.
    """
    return resolve_levels(config, scores.shapes)


PRUNERS: dict[str, Callable] = {
    allocation.__name__: allocation
    for allocation in (lamp, glob, unif, unifplus, erk, owl, alpha, cap, search, custom)
}


def mask_at(scores: Scores, name: str, level: Amount) -> Tensor:
    """The mask of a layer at a level, what it keeps of single weights, groups or blocks."""
    if isinstance(level, BlockLevel):
        pattern = level.pattern
        return pattern.mask(pattern.score(scores[name]), level.kept(scores.shapes[name]))
    return n_of_m(scores[name], *level) if isinstance(level, tuple) else scores.mask(name, level)


# ---- helpers, not exported ----


def _check_statistics(
    statistics: Statistics | None,
    weights: Mapping[str, Tensor],
    pruner: str | Callable,
    score: str | Callable,
) -> None:
    """Refuses statistics that lack something, and says which choice needs it."""
    needs_by_choice = {
        f"pruner {name_of(pruner)}": needs_of(pruner),
        f"score {name_of(score)}": needs_of(None, score),
    }
    for choice, needs in needs_by_choice.items():
        if not needs:
            continue

        if statistics is None:
            raise PruningError(
                f"{choice} looks at data: expected statistics with {', '.join(sorted(needs))}"
            )
        if missing := needs - statistics.needs:
            held = ", ".join(sorted(statistics.needs)) or "nothing"
            raise PruningError(
                f"{choice} needs {', '.join(sorted(missing))}: the statistics hold {held}"
            )

        for name, weight in weights.items():
            if statistics.shapes.get(name) != weight.shape:
                raise PruningError(
                    f"the statistics are of another model: {name} of shape {list(weight.shape)} "
                    "is not among their weights"
                )


def _of_parameters(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of matrices in the shapes of their parameters."""
    return {
        name: from_matrix(mask, weights[name].shape) if name in weights else mask
        for name, mask in masks.items()
    }


def _fitting(weights: Mapping[str, Tensor], pattern: Pattern) -> dict[str, Tensor]:
    """The weights that a pattern fits; a warning names the others, which stay dense.

    Raises:
        PruningError: it fits none.
    """
    misfits = {name: pattern.misfit(name, weight.shape) for name, weight in weights.items()}
    fitting = {name: weight for name, weight in weights.items() if not misfits[name]}
    if not fitting:
        raise PruningError(f"pattern {pattern.name}: expected {next(iter(misfits.values()))}")
    if dense := [name for name in weights if name not in fitting]:
        warn_once(
            f"pattern {pattern.name} leaves layers dense that it does not fit: {', '.join(dense)}"
        )
    return fitting


def _without_dense(
    fitting: Mapping[str, Tensor], dense: Mapping[str, Tensor], sparsity: float, pattern: Pattern
) -> float:
    """The sparsity of the weights that a pattern fits, if `sparsity` is that of all."""
    prunable = sum(weight.numel() for weight in fitting.values())
    total = prunable + sum(weight.numel() for weight in dense.values())
    kept = round(total * (1 - sparsity)) - (total - prunable)
    if kept < 1:
        raise PruningError(
            f"pattern {pattern.name} fits {prunable:,} of {total:,} weights: expected a sparsity "
            f"of less than {down(prunable / total)}"
        )
    return 1 - kept / prunable


def _budget(sizes: Mapping[str, int], sparsity: float) -> int:
    return round(sum(sizes.values()) * (1 - sparsity))


def _remaining(n: int, sparsity: float) -> int:
    return n - round(sparsity * n)


def _meet_budget(
    scores: Scores, sparsity: float, density: Callable[[float], np.ndarray]
) -> dict[str, int]:
    """How many weights each layer keeps so that the budget is met as the densities say.

    Every layer keeps at least one weight, and no more than may be kept of it; if the budget has
    fewer weights than there are layers, the earlier layers keep one.

    density: from a number in [0, 1] to the densities of all layers, none of which falls as that
        number grows.
    """
    sizes = np.array(list(scores.sizes.values()), float)
    most = np.array(list(scores.most.values()), float)
    budget = min(_budget(scores.sizes, sparsity), int(most.sum()))
    least = np.minimum(np.arange(len(sizes)) < budget, most)

    def wanted(share: float) -> np.ndarray:
        return np.clip(density(share) * sizes, least, most)

    return dict(zip(scores, _whole(wanted, budget), strict=True))


def _within(kept: dict[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """Moves what layers would keep beyond `most` to the others, in proportion to what they keep."""
    if all(count <= most[name] for name, count in kept.items()):
        return kept
    limits = np.array([most[name] for name in kept], float)
    counts = np.array(list(kept.values()), float)

    def wanted(share: float) -> np.ndarray:
        # From nothing at 0 to all at 1, each layer by the same factor until it is full
        return np.minimum(counts * share / max(1 - share, 1e-300), limits)

    budget = min(sum(kept.values()), int(limits.sum()))
    return dict(zip(kept, _whole(wanted, budget), strict=True))


def _whole(wanted: Callable[[float], np.ndarray], budget: int) -> list[int]:
    """Whole numbers that meet the budget, next to the largest wanted ones that do not exceed it.

    Numbers are rounded down, and what is left goes to the layers with the largest fractions, on a
    tie to the earlier ones.

    wanted: from a number in [0, 1] to the numbers of all layers, none of which falls as it grows.
    """
    exact = wanted(largest_threshold(lambda share: wanted(share).sum() <= budget))
    kept = np.floor(exact)
    by_fraction = np.argsort(kept - exact, kind="stable")
    kept[by_fraction[: budget - int(kept.sum())]] += 1
    return kept.astype(int).tolist()


def _outlier_ratio(score: Tensor, times: float) -> float:
    return int((score > times * score.mean(dtype=torch.float64)).count_nonzero()) / score.numel()


def _hill_exponent(weight: Tensor) -> float:
    """The power-law exponent of the upper half of the spectrum of W^T W; infinite if none."""
    weight = weight.cpu().double()
    narrow = weight if weight.shape[0] < weight.shape[1] else weight.T
    eigenvalues = torch.linalg.eigvalsh(narrow @ narrow.T).numpy()

    # An eigenvalue of zero is computed as something up to this
    noise = eigenvalues[-1] * len(eigenvalues) * np.finfo(float).eps
    eigenvalues = eigenvalues[eigenvalues > noise]

    tail = eigenvalues[len(eigenvalues) // 2 :]
    spread = np.log(tail / tail[0]).mean() if len(tail) else 0.0
    return 1 + 1 / spread if spread > 1e-6 else math.inf
