"""What search.py chooses from: the choices for each part of a model, and what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch
import yaml

from sparsity_factory import (
    Kept,
    LayerSparsity,
    PruningError,
    multiply_adds,
    parse_pattern,
    prunable_weights,
    sparsity_yaml,
)
from sparsity_factory.custom_yaml import Amount, BlockLevel, entry_of, resolve_choices
from sparsity_factory.knapsack import cheapest, undominated
from sparsity_factory.multiply_adds import ATTENTION
from sparsity_factory.patterns import Block, NOfM, Unstructured
from sparsity_factory.time_table import Choice, Part, TimeTable
from sparsity_factory.units import HEADS, NEURONS
from utils import UserError

LEVELS = ("1:4", "2:4", "4:4")
#: The sparsities of patterns that have none of their own.
SPARSITIES = ("0.5", "0.6", "0.7", "0.8", "0.9", "0.95")
#: The shares of an MLP's neurons that it may keep.
NEURON_SHARES = [eighths / 8 for eighths in range(1, 8)]


@dataclass(frozen=True)
class Space:
    """The choices for each part.

    shapes: of each weight. levels: by weight, then by text of a level, what it keeps. parts: in
    model order. choices: by part, then by text.
    """

    shapes: Mapping[str, tuple[int, int]]
    levels: Mapping[str, Mapping[str, Amount]]
    parts: Sequence[Part]
    choices: Mapping[str, Mapping[str, Choice]]

    @classmethod
    def of(cls, options, model: torch.nn.Module, parts: Sequence[Part] | None = None) -> "Space":
        """The space that the command line asks for.

        parts: those that are measured; by default each layer is one.

        Raises PruningError for levels that do not exist, or do not fit the model.
        """
        shapes = {name: tuple(weight.shape) for name, weight in prunable_weights(model).items()}
        names = patterns_of(options)
        if names:
            levels = {
                name: _levels_in(names, options.levels, name, shapes[name]) for name in shapes
            }
            _expect_fits(names, levels, shapes)
        elif options.space:
            levels = resolve_choices(options.space[0], shapes)
        else:
            texts = [entry_of(text) for text in options.levels or LEVELS]
            config = {"sparsity": {"mode": "nxm", "choices": {"default": texts}}}
            levels = resolve_choices(config, shapes, "--levels")

        if parts is None:
            parts = [Part(name, (name,)) for name in shapes]
        choices = {part.name: _choices(part, levels, names) for part in parts}
        kinds = {part.group.kind for part in parts if part.group}
        for kind in (HEADS, NEURONS):
            if kind in names and kind not in kinds:
                raise PruningError(
                    f"--space {kind}: {type(model).__name__} has none in a known block that is "
                    "called with its tokens alone"
                )
        return cls(shapes, levels, parts, choices)

    @property
    def texts(self) -> list[str]:
        """The texts of all choices, in the order in which they were given."""
        return list(dict.fromkeys(text for texts in self.choices.values() for text in texts))

    @property
    def has_units(self) -> bool:
        """Whether a choice leaves fewer heads or neurons."""
        return any(choice.units for of in self.choices.values() for choice in of.values())

    def kinds(self, part: str, text: str) -> set[str]:
        """The patterns of a choice, nothing if it is dense; heads and neurons are both `units`."""
        choice = self.choices[part][text]
        return {"units"} if choice.units else set(map(_pattern, choice.levels.values())) - {""}

    def settings(self) -> dict:
        """The same as plain values, with which a resumed search is compared."""
        levels = {
            name: {
                text: text if isinstance(kept, BlockLevel) else kept for text, kept in of.items()
            }
            for name, of in self.levels.items()
        }
        if all(part.group is None for part in self.parts):
            return {"levels": levels}
        return {"levels": levels, "choices": {name: list(of) for name, of in self.choices.items()}}

    def kept(self, name: str, level: str) -> int:
        """How many weights a layer keeps at a level."""
        amount = self.levels[name][level]
        total = prod(self.shapes[name])
        if isinstance(amount, BlockLevel):
            units = amount.pattern.units(self.shapes[name])
            return total * amount.kept(self.shapes[name]) // units
        return total * amount[0] // amount[1] if isinstance(amount, tuple) else amount

    def units(self, chosen: Mapping[str, str]) -> dict[str, int]:
        """How many heads or neurons blocks keep that lose some, by name."""
        counts = {name: self.choices[name][text].units for name, text in chosen.items()}
        return {name: count for name, count in counts.items() if count}

    def rows(self, chosen: Mapping[str, str]) -> Kept:
        """What choices keep of the prunable weights; of no part means dense."""
        levels = {}
        counts = {}
        for part in self.parts:
            choice = self.choices[part.name][chosen[part.name]]
            levels |= choice.levels
            if choice.units:
                counts |= dict.fromkeys(part.weights, choice.units / part.group.units)

        layers = []
        for name, shape in self.shapes.items():
            level = levels.get(name, "dense")
            pattern = level if ":" in level or level == "dense" else "unstructured"
            kept = self.kept(name, level) if level in self.levels[name] else prod(shape)
            kept = round(kept * counts.get(name, 1))
            layers.append(LayerSparsity(name, shape, kept, prod(shape), pattern))

        kept = sum(row.kept for row in layers)
        total = LayerSparsity("prunable weights", (), kept, sum(row.total for row in layers))
        return Kept(layers, prunable=total, whole=total)

    def config(self, chosen: Mapping[str, str]) -> dict:
        """The same as `yaml`, parsed."""
        return yaml.safe_load(self.yaml(chosen))

    def yaml(self, chosen: Mapping[str, str], comment: str = "") -> str:
        """The custom configuration of a choice for each part."""
        return sparsity_yaml(self.rows(chosen), comment, self.units(chosen))


@dataclass(frozen=True)
class Prices:
    """What the choices cost, in one unit: multiply-adds, seconds or weights.

    costs: of each choice, by part. fixed: of what no choice changes. whole: of the dense model.
    budget: the share of `whole` that may be spent. unit: how many whole numbers are one cost.
    """

    costs: Mapping[str, Mapping[str, float]]
    whole: float
    budget: float
    fixed: float = 0.0
    unit: float = 1.0

    def spent(self, chosen: Mapping[str, str]) -> float:
        """What a choice for each part costs, with what is fixed."""
        return self.fixed + sum(self.costs[name][text] for name, text in chosen.items())

    def reached(self, chosen: Mapping[str, str]) -> float:
        """The share that a choice for each part spends."""
        return self.spent(chosen) / self.whole

    def bounds(self) -> tuple[float, float]:
        """The least and the greatest share that can be spent."""
        least = sum(min(texts.values()) for texts in self.costs.values())
        most = sum(max(texts.values()) for texts in self.costs.values())
        return (self.fixed + least) / self.whole, (self.fixed + most) / self.whole


class Problem(NamedTuple):
    """What `cheapest` solves: by part, the texts, costs and losses of choices; and the budget.

    Costs are whole numbers. Choices that cost and lose more than another are left out.
    """

    names: list[str]
    texts: list[list[str]]
    costs: list[list[int]]
    losses: list[list[float]]
    budget: int

    @classmethod
    def of(cls, prices: Prices, losses: Mapping[str, Mapping[str, float]]) -> "Problem":
        """The problem of these losses; a choice without one is left out."""
        texts, costs, lost = [], [], []
        for part, priced in prices.costs.items():
            own = [text for text in priced if text in losses[part]]
            cost = [round(prices.unit * priced[text]) for text in own]
            loss = [losses[part][text] for text in own]
            kept = undominated(cost, loss)
            texts.append([own[place] for place in kept])
            costs.append([cost[place] for place in kept])
            lost.append([loss[place] for place in kept])

        budget = int(prices.unit * (prices.budget * prices.whole - prices.fixed) + 1e-6)
        return cls(list(prices.costs), texts, costs, lost, budget)

    @property
    def is_soluble(self) -> bool:
        """Whether a choice meets the budget, with some room for rounding in each part."""
        return all(self.texts) and sum(map(min, self.costs)) <= self.budget + len(self.costs)

    def solve(self) -> list[int]:
        """The choice of least total loss, as places in `texts`."""
        least = sum(map(min, self.costs))
        return cheapest(self.costs, self.losses, max(self.budget, least))

    def named(self, places: Sequence[int]) -> dict[str, str]:
        """By part, the texts at these places."""
        triples = zip(self.names, self.texts, places, strict=True)
        return {name: texts[place] for name, texts, place in triples}


def prices_in_numbers(options, args, space: Space, model, device: torch.device) -> Prices:
    """Prices in weights or multiply-adds, which a layer has in proportion to what it keeps."""
    totals = {name: prod(shape) for name, shape in space.shapes.items()}
    dense = totals
    fixed = 0.0
    if options.budget_of == "macs":
        image = torch.zeros(1, 3, args.input_size, args.input_size, device=device)
        dense = multiply_adds(model, image)
        fixed = dense[ATTENTION]

    costs = {
        name: {level: dense[name] * space.kept(name, level) / totals[name] for level in levels}
        for name, levels in space.levels.items()
    }
    whole = fixed + sum(dense[name] for name in totals)
    return Prices(costs, whole, options.budget, fixed)


def prices_in_seconds(options, space: Space, table: TimeTable) -> Prices:
    """Prices in the time of the whole model.

    Raises UserError if no choice is quicker than the dense part.
    """
    for name, times in table.parts.items():
        if any(seconds < table.dense[name] for seconds in times.values()):
            return Prices(table.parts, table.whole, options.budget, table.rest, unit=1e9)
    raise UserError(
        "--budget-of latency: no choice of the space is measured to be quicker than dense here; "
        "expected --budget-of macs or weights"
    )


def patterns_of(options) -> list[str]:
    """The patterns that `--space` names; none if it names a file, or is not given.

    Raises UserError for other patterns than a search can choose, and without a budget of time.
    """
    given = options.space or []
    if len(given) == 1 and given[0].endswith((".yaml", ".yml")):
        return []

    for name in given:
        if not _is_searched(name):
            raise UserError(
                f"--space {name}: expected heads, neurons, unstructured, block:RxC, n:m, or one "
                "YAML file"
            )
    if given and options.budget_of != "latency":
        raise UserError(f"--space {' '.join(given)}: needs --budget-of latency")
    return given


# ---- helpers, not exported ----


def _is_searched(name: str) -> bool:
    """Whether a search can choose this pattern."""
    if name in (HEADS, NEURONS):
        return True
    try:
        return type(parse_pattern(name)) in (Unstructured, Block, NOfM)
    except PruningError:
        return False


def _levels_in(
    names: Sequence[str], sparsities: Sequence[str] | None, weight: str, shape: tuple[int, int]
) -> dict[str, Amount]:
    """The levels of a weight in the patterns that fit it, dense among them."""
    texts = ["dense"]
    for name in names:
        if name in (HEADS, NEURONS) or parse_pattern(name).misfit(weight, shape):
            continue
        prefix = "" if name == "unstructured" else f"{name} "
        own = [name] if ":" in name and not name.startswith("block") else []
        texts += own or [f"{prefix}{sparsity}" for sparsity in sparsities or SPARSITIES]

    config = {"sparsity": {"mode": "nxm", "choices": [[entry_of(text) for text in texts]]}}
    (levels,) = resolve_choices(config, {weight: shape}, "--levels").values()
    return levels


def _expect_fits(names: Sequence[str], levels: Mapping, shapes: Mapping) -> None:
    """Raises PruningError for a pattern that fits no weight."""
    for name in set(names) - {HEADS, NEURONS}:
        misfits = [parse_pattern(name).misfit(weight, shape) for weight, shape in shapes.items()]
        if all(misfits):
            raise PruningError(f"--space {name}: expected {misfits[0]}")


def _choices(part: Part, levels: Mapping, names: Sequence[str]) -> dict[str, Choice]:
    """The choices for a part, by text.

    Of two layers, each pair of levels is one, dense among them; of more layers, one level for all.
    Patterns that `--space` names are not mixed within a part.
    """
    own = [list(levels[name]) for name in part.weights]
    if len(own) > 2:
        shared = [text for text in own[0] if all(text in texts for texts in own)]
        pairs = [(text,) * len(own) for text in shared]
    else:
        pairs = list(product(*own))
    if names:
        pairs = [pair for pair in pairs if len({_pattern(text) for text in pair} - {""}) < 2]

    found = {}
    if names:
        found["dense"] = Choice(dict.fromkeys(part.weights, "dense"))
    for pair in pairs:
        text = pair[0] if len(set(pair)) == 1 else ", ".join(pair)
        found[text] = Choice(dict(zip(part.weights, pair, strict=True)))
    if part.group and part.group.kind in names:
        for count in _counts(part):
            found[f"{count} {part.group.kind}"] = Choice({}, count)
    return found


def _counts(part: Part) -> list[int]:
    """The numbers of heads or neurons that a part may keep, less than all."""
    units = part.group.units
    if part.group.kind == HEADS:
        return list(range(1, units))
    return sorted({max(round(share * units), 1) for share in NEURON_SHARES} - {units})


def _pattern(level: str) -> str:
    """The pattern of a level by its text; nothing if it is dense."""
    if level == "dense":
        return ""
    return level.split()[0] if ":" in level else "unstructured"
