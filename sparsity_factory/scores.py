"""How much each weight matters, and `Scores`, which computes that for all prunable weights.

A score is a function

    def score(weight: Tensor, layer: Layer) -> Tensor

from a weight of shape (outputs, inputs), float32 or float64, and what is known of its layer, to a
tensor of the weight's shape, dtype and device. Its values are finite and non-negative, and larger
for weights that matter more. It looks at the statistics that it `needs`, and no others. To add a
score, write such a function and name it in `SCORES`.

A unit of several weights, such as a block or a head, scores the sum of its weights' scores. If a
function has an attribute `signed` that is true, its values may be negative, and a unit scores the
square of their sum: effects of opposite sign cancel out. If `of_columns` is true, a head or neuron
scores the sum over the weights that read it, without those that compute it.

w_ij: the weight from input j to output i; x: the inputs of the layer over all tokens of the
calibration images; g: the gradient of the mean loss over them, g_i: of the loss of image i.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .damping import DAMPING, DAMPING_LINE, damped_gram
from .errors import PruningError
from .k_largest import histogram, suffix_sums
from .method import NotNegative, method, name_of, unbound
from .patterns import Pattern, Unstructured
from .statistics import STATISTICS, Statistics
from .units import COLUMNS, Group, Part, unit_sums


class Layer:
    """What is known of a layer besides its weight.

    Attributes:
        name: the name of the weight.
        seed: the seed of scores that are drawn at random.
        images: the number of images that the statistics were collected from.
        input_norms, gram, gradient_gram, gradient, first_gradient, squared_gradient, gate_gradient,
            removal_costs: the statistics of these names in `STATISTICS`, float64, on the device of
            the weight.

    Raises:
        PruningError: on access to a statistic, if no statistics were given.
    """

    def __init__(self, name: str, seed: int = 0, statistics: Statistics | None = None, device=None):
        self.name = name
        self.seed = seed
        self._statistics = statistics
        self._device = device
        self._diagonals: dict[float, Tensor] = {}

    @property
    def images(self) -> int:
        if self._statistics is None:
            raise PruningError(f"{self.name}: expected statistics")
        return self._statistics.images

    def __getattr__(self, need: str) -> Tensor:
        if need not in STATISTICS:
            raise AttributeError(need)
        if self._statistics is None:
            message = f"{self.name}: {need} of its layer is not known: expected statistics"
            raise PruningError(message)
        return self._statistics.value(self.name, need).to(self._device)

    def inverse_gram_diagonal(self, damping: float = DAMPING) -> Tensor:
        """The diagonal of the damped Gram matrix's inverse; infinite for dead inputs."""
        if damping not in self._diagonals:
            _, factor = damped_gram(self.gram, damping)
            diagonal = factor.square().sum(0).masked_fill(self.gram.diagonal() == 0, torch.inf)
            self._diagonals[damping] = diagonal
        return self._diagonals[damping]


@method()
def magnitude(weight: Tensor, layer: Layer) -> Tensor:
    """abs(w)."""
    # numpy asks for large pages, and torch spends most of its time on page faults
    if weight.device.type == "cpu":
        return torch.from_numpy(np.abs(weight.detach().numpy()))
    return weight.abs()


@method()
def random(weight: Tensor, layer: Layer) -> Tensor:
    """Uniform in [0, 1), a function of the seed and the layer's name."""
    digest = hashlib.sha256(f"{layer.seed}:{layer.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight)


@method("Lee et al. 2019, arXiv:1810.02340", needs={"first_gradient"})
def snip(weight: Tensor, layer: Layer) -> Tensor:
    """abs(w g), with g of the first batch alone."""
    return (weight * layer.first_gradient).abs().to(weight)


@method("Molchanov et al. 2019, arXiv:1906.10771", needs={"gradient"})
def taylor(weight: Tensor, layer: Layer) -> Tensor:
    """abs(w g), with g of all calibration images."""
    return (weight * layer.gradient).abs().to(weight)


@method("Molchanov et al. 2019, arXiv:1906.10771", needs={"gradient"})
def taylor_group(weight: Tensor, layer: Layer) -> Tensor:
    """(sum over the unit of w g)^2, with g of all calibration images; of single weights (w g)^2."""
    return (weight * layer.gradient).to(weight)


taylor_group.signed = True


@method("LeCun et al. 1990; Theis et al. 2018, arXiv:1801.05787", needs={"squared_gradient"})
def fisher(weight: Tensor, layer: Layer) -> Tensor:
    """w^2 mean_i(g_i^2), with g_i the gradient of image i."""
    return (weight * (weight * layer.squared_gradient)).to(weight)


@method("Michel et al. 2019, arXiv:1905.10650", needs={"gate_gradient"})
def gate(weight: Tensor, layer: Layer) -> Tensor:
    """Mean over images of abs(gradient of a gate at the head or neuron that a weight reads).

    The gate is a factor of 1 for what a layer reads from one unit; other layers have a gate at each
    input. The weights share the gradient out by their size, so that a head or neuron scores what
    its gate does.
    """
    size = weight.abs()
    total = size.sum(0, dtype=torch.float64)
    return (size * (layer.gate_gradient / total.masked_fill(total == 0, 1))).to(weight)


gate.of_columns = True


@method("Sun et al. 2024, arXiv:2306.11695", needs={"input_norms"})
def wanda(weight: Tensor, layer: Layer) -> Tensor:
    """abs(w_ij) norm2(x_j)."""
    return weight.abs() * layer.input_norms.to(weight)


@method(
    "Zhang et al. 2024, Plug-and-Play (ICLR)",
    needs={"input_norms"},
    power="of norm2(x_j); the paper's a",
)
def ria(weight: Tensor, layer: Layer, *, power: NotNegative = 0.5) -> Tensor:
    """(abs(w_ij) / sum_i abs(w_ij) + abs(w_ij) / sum_j abs(w_ij)) norm2(x_j)^0.5.

    A row or column of zeros adds 0. `power` takes the place of 0.5.
    """
    size = weight.abs()
    sums = [size.sum(dim, keepdim=True, dtype=torch.float64) for dim in (0, 1)]
    relative = sum(size / total.masked_fill(total == 0, 1) for total in sums)
    return (relative * layer.input_norms**power).to(weight)


@method(
    "Hassibi and Stork 1993; Frantar and Alistarh 2023, arXiv:2301.00774",
    needs={"gram"},
    damping=DAMPING_LINE,
)
def obs(weight: Tensor, layer: Layer, *, damping: NotNegative = DAMPING) -> Tensor:
    """w_ij^2 / [(X^T X + damping)^-1]_jj: cost of removal if the other weights compensate.

    It is 0 if x_j is always 0.
    """
    return (weight * (weight / layer.inverse_gram_diagonal(damping))).to(weight)


@method("Kuznedelev et al. 2023, arXiv:2210.09223", needs={"removal_costs"})
def cap(weight: Tensor, layer: Layer) -> Tensor:
    """Rise in loss when a block's weights are removed cheapest first and the others compensate."""
    return layer.removal_costs.to(weight)


SCORES: dict[str, Callable[[Tensor, Layer], Tensor]] = {
    score.__name__.replace("_", "-"): score
    for score in (magnitude, random, snip, taylor, taylor_group, fisher, gate, wanda, ria, obs, cap)
}


# Those of this file, which need no check: it would take as long as the magnitude itself
NON_NEGATIVE = frozenset(SCORES.values())


class Scores(Mapping[str, Tensor]):
    """Scores by parameter name, each computed on the device of the weight when it is asked for.

    There is one score per unit. A unit is what the pattern removes together: a single weight, or a
    block. Allocations see units and no pattern.

    Scores are not stored: computing them again takes less time than touching the memory for a copy
    of all weights. All scores have one dtype, so that they can be compared: float64 if any weight
    is float64, else float32, which represents half precision exactly.

    among: masks by parameter name. Only these weights may be kept; the others score 0, and are kept
        only if there are too few.

    Attributes:
        pattern: defines the units.
        reconstructed: whether the kept weights will compensate for the pruned ones.
        weights: parameter name to the weight itself.
        sizes: parameter name to the number of units.
        most: parameter name to the number of units that may be kept.
        shapes: parameter name to the shape of the weight, (outputs, inputs).
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        score: Callable[[Tensor, Layer], Tensor] = magnitude,
        pattern: Pattern | None = None,
        statistics: Statistics | None = None,
        seed: int = 0,
        reconstructed: bool = False,
        among: Mapping[str, Tensor] | None = None,
    ):
        self.weights = weights
        self.pattern = pattern or Unstructured()
        self.reconstructed = reconstructed
        self._score = score
        self._statistics = statistics
        self._seed = seed

        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.sizes = {name: self.pattern.units(shape) for name, shape in self.shapes.items()}
        self._among = {name: left for name, left in (among or {}).items() if name in weights}
        self.most = {**self.sizes, **self._most_among()}
        wide = any(weight.dtype == torch.float64 for weight in weights.values())
        self._dtype = torch.float64 if wide else torch.float32

        self._layers: dict[str, Layer] = {}
        self._finite: set[str] = set()
        # The largest scores of layers, and the smallest or others that cannot be negative
        self._unchecked: dict[str, tuple[Tensor, Tensor]] = {}
        self._at_least: dict[str, Tensor] = {}
        # Callers ask for the scores of one layer several times in a row
        self._latest: tuple[str, Tensor] | None = None

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if self._latest and self._latest[0] == name:
            return self._latest[1]
        self._latest = None  # frees its memory for use below; fresh memory takes longer

        weight = self.weights[name].detach().to(self._dtype)
        score = self._score(weight, self.layer(name))
        smallest = None
        if self._score not in NON_NEGATIVE and not self.signed:
            smallest = score.amin()
            score = score.abs()  # so that zeros have one sign: bits are compared
        score = self._of_units(score, self._among.get(name))
        if name not in self._finite:
            largest = score.amax()
            self._unchecked[name] = (largest, largest if smallest is None else smallest)
            # On a GPU every check waits, so that all layers are checked at once, by the caller
            if score.device.type == "cpu":
                self.check()

        self._latest = (name, score)
        return score

    @property
    def signed(self) -> bool:
        """Whether a unit scores the square of the sum of its weights' values."""
        return getattr(unbound(self._score), "signed", False)

    def of_groups(
        self, groups: Sequence[Group], parts: Sequence[Mapping[str, Part]]
    ) -> list[Tensor]:
        """The scores of the units of groups of several layers, each float64 (units,), on the CPU.

        parts: for each group what its `weights` returned.

        Raises:
            PruningError: a weight is not finite.
        """
        self._check_weights([name for group in parts for name in group])
        if getattr(unbound(self._score), "of_columns", False):
            parts = [
                {name: part for name, part in group.items() if part.dim == COLUMNS}
                for group in parts
            ]
        if not self.signed:
            return unit_sums(groups, parts, self.__getitem__)

        def values(name: str) -> Tensor:
            weight = self.weights[name].detach().to(self._dtype)
            return self._score(weight, self.layer(name))

        return [sums.square() for sums in unit_sums(groups, parts, values)]

    def _of_units(self, score: Tensor, left: Tensor | None) -> Tensor:
        """The scores of units from those of weights, of which only those in `left` may be kept."""
        if self.signed:
            score = self.pattern.score(score).square()
            if left is None:
                return score
            return self.pattern.among(score, self.pattern.score(left.to(score.dtype)) > 0)

        if left is not None:
            score = self.pattern.among(score, left)
        return self.pattern.score(score)

    def check(self) -> None:
        """Checks the scores that were computed so far; before the host uses them, and at the end.

        Raises:
            PruningError: a score is not finite, or negative.
        """
        if self._unchecked:
            self._refuse(torch.stack(self._extremes()).tolist())

    def checked(self, values: Tensor) -> Tensor:
        """As `check`; returns float64 values on the CPU. Waits for a GPU once for both."""
        extremes = self._extremes()
        if not extremes:
            return values.cpu()
        found = torch.cat([torch.stack(extremes).double(), values]).cpu()
        self._refuse(found[: len(extremes)].tolist())
        return found[len(extremes) :]

    def _extremes(self) -> list[Tensor]:
        """The largest and the smallest score of each layer that is not checked yet, in turns."""
        return [value for both in self._unchecked.values() for value in both]

    def _refuse(self, extremes: list[float]) -> None:
        """Checks what `_extremes` returned, as numbers."""
        for name, largest, smallest in zip(
            self._unchecked, extremes[::2], extremes[1::2], strict=True
        ):
            kind = f"{name} has a {name_of(self._score)} score that is"
            if not math.isfinite(largest):
                self.weight(name)  # raises if the weight itself is the cause
                raise PruningError(f"{kind} NaN or infinite in {self._dtype}")
            if smallest < 0:
                raise PruningError(f"{kind} {smallest:g}: expected scores of at least 0")

        self._finite |= self._unchecked.keys()
        self._unchecked.clear()

    def by(self, score: Callable[[Tensor, Layer], Tensor]) -> "Scores":
        """The same weights and units with another score."""
        if score is self._score:
            return self
        return Scores(
            self.weights,
            score,
            self.pattern,
            self._statistics,
            self._seed,
            self.reconstructed,
            self._among,
        )

    def replaced(self, values: Mapping[str, Tensor]) -> "Scores":
        """The weights that `values` names, with these values as scores, broadcast to each shape."""

        def given(weight: Tensor, layer: Layer) -> Tensor:
            return values[layer.name].to(weight, non_blocking=True).expand_as(weight).contiguous()

        weights = {name: weight for name, weight in self.weights.items() if name in values}
        return Scores(
            weights, given, None, self._statistics, self._seed, self.reconstructed, self._among
        )

    def weight(self, name: str) -> Tensor:
        """The weight itself, shape (outputs, inputs), in the dtype of all scores.

        Raises:
            PruningError: the weight is not finite.
        """
        weight = self.weights[name].detach().to(self._dtype)
        if not weight.isfinite().all():
            raise PruningError(f"{name} has a weight that is NaN or infinite")
        return weight

    def _check_weights(self, names: Sequence[str]) -> None:
        """The check of `weight` for several weights, with one wait for their device."""
        finite = [self.weights[name].detach().to(self._dtype).isfinite().all() for name in names]
        for name, is_finite in zip(names, torch.stack(finite).tolist(), strict=True):
            if not is_finite:
                self.weight(name)

    def layer(self, name: str) -> Layer:
        """What is known of the layer besides its weight."""
        if name not in self._layers:
            device = self.weights[name].device
            self._layers[name] = Layer(name, self._seed, self._statistics, device)
        return self._layers[name]

    def at_least(self, name: str) -> Tensor:
        """For each bin of `k_largest.py` the number of scores in it and all higher bins; cached."""
        if name not in self._at_least:
            self._at_least[name] = suffix_sums(histogram(self[name]))
        return self._at_least[name]

    def mask(self, name: str, kept: int) -> Tensor:
        """The mask of a layer that keeps `kept` units."""
        return self.pattern.mask(self[name], kept, self._at_least.get(name))

    def _most_among(self) -> dict[str, int]:
        counts = [self.pattern.most(left) for left in self._among.values()]
        return dict(zip(self._among, torch.stack(counts).tolist(), strict=True)) if counts else {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
