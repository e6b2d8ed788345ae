"""`Recipe`: the choices that make a pruned model, as one value with one name for each."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from .custom_yaml import (
    Amount,
    BlockLevel,
    has_units,
    level_section,
    parse_level,
    resolve_levels,
    resolve_units,
    unit_section,
)
from .errors import PruningError, as_flag, in_words, short
from .masks import why_no_layers
from .method import Option, check_method_options, chosen, name_of, options_of
from .patterns import parse_pattern
from .pruners import PRUNERS, check_request, needs_of
from .reconstruction import NONE, RECONSTRUCTIONS
from .schedules import SCHEDULES, Schedule, Steps, users_of
from .scores import SCORES

LARGEST = 2**53  # integers are smaller: floats count no further, and nothing here is that large
MOST_LEARNED = 8  # size of a group whose mask is learned: 4:8 has 70 masks, 8:16 has 12,870
MOST_ROUNDS = 10_000  # each is a number in a list
#: The choices whose methods may have options, by their fields of a recipe.
METHODS: dict[str, Mapping[str, Any]] = {
    "pruner": PRUNERS,
    "score": SCORES,
    "prune_schedule": SCHEDULES,
    "reconstruct": RECONSTRUCTIONS,
}


@dataclass(frozen=True)
class Recipe:
    """What prunes a model, how and when.

    Fields have the names of the command line's flags, and their defaults are here. A function may
    stand for the name of a pruner, score or reconstruction; a checkpoint cannot hold that.

    Attributes:
        pruner: a name in `PRUNERS`, or None for a dense model.
        sparsity: the fraction of the prunable weights to remove, in [0, 1); None if pruner or
            pattern decide it.
        custom_config: the parsed YAML of the pruner `custom`.
        score: a name in `SCORES`.
        pattern: what is removed together: `unstructured`, `2:4`, ...
        budget: what the sparsity is a fraction of: `weights`, or with heads and neurons also
            `macs`.
        permute: reorder inputs of layers before the first masks are chosen, so that groups of n:m
            keep more.
        prune_schedule: a name in `SCHEDULES`.
        prune_start, prune_end: when its changes begin and end, as fractions of the training.
        prune_every: steps from one change to the next.
        prune_rounds: how often `iterative` prunes, and how many sparse phases `ac-dc` has.
        rewind: `iterative` goes back to the weights at the beginning of this epoch; None: it does
            not go back.
        drop_fraction: the share of the kept weights that `set` and `rigl` replace at first.
        sr_decay: `sr-ste` adds the masked-out weights, times this, to their gradients.
        mask_lr: the learning rate of the logits of `maskllm`.
        reconstruct: a name in `RECONSTRUCTIONS`: how the kept weights compensate for the pruned.
        calibration_images: how many training images score, pruner and reconstruction may look at.
        method_options: numbers of the chosen methods, such as `{"owl.lambda": 0.1}`.
        layers: patterns of the layers that are prunable, as in `prunable_weights`; None: all.
        seed: decides every random choice.
    """

    pruner: str | Callable | None = None
    sparsity: float | None = None
    custom_config: Mapping | None = None
    score: str | Callable = "magnitude"
    pattern: str = "unstructured"
    budget: str = "weights"
    permute: bool = False
    prune_schedule: str = "one-shot"
    prune_start: float = 0.0
    prune_end: float = 0.75  # as RigL; in the last quarter of the training masks are final
    prune_every: int = 100
    prune_rounds: int = 4  # by default at 0, 1/4, 1/2 and 3/4 of the training
    rewind: int | None = None
    drop_fraction: float = 0.3
    sr_decay: float = 2e-4
    mask_lr: float = 3e-4
    reconstruct: str | Callable = NONE
    calibration_images: int = 1024
    method_options: Mapping[str, float] | None = None
    layers: Sequence[str] | None = None
    seed: int = 0

    def check(self, epochs: float | None = None) -> None:
        """Raises PruningError, in one line, for a wrong value or a combination that makes no sense.

        epochs: of the training, if they are known: a rewind has to lie before the first round.
        """
        self._check_numbers()
        self._check_schedule()
        if self.pruner is None:
            self._check_that_nothing_needs_a_pruner()
            return

        check_request(
            self.pruner,
            self.sparsity,
            self.custom_config,
            self.score,
            pattern=self.pattern,
            budget=self.budget,
            flags=True,
        )
        self._check_groups()
        self._check_reconstruction()
        check_method_options(self.method_options, self.options, flags=True)
        if self.rewind is not None and epochs is not None:
            self._expect(
                self.rewind <= self.prune_start * epochs,
                "rewind",
                f"an epoch up to the first round, at --prune-start {self.prune_start:g} of "
                f"{epochs} epochs",
            )

    def to_dict(self) -> dict:
        """The fields by name, in plain containers, numbers and strings: for a checkpoint.

        Raises:
            PruningError: a function stands for a name.
        """
        for choice, registry in METHODS.items():
            if callable(value := getattr(self, choice)):
                raise PruningError(
                    f"{choice} {name_of(value)} is a function, which cannot be saved: expected one "
                    f"of {', '.join(registry)}, to which it may be added"
                )
        found = asdict(self)
        # With the defaults of today, since those of a later version may be others
        known = self.options.items()
        options = {name: option.default for name, option in known if option.default is not None}
        found["method_options"] = {**options, **(self.method_options or {})} or None
        return _plain(found)

    @classmethod
    def from_dict(cls, untrusted) -> "Recipe":
        """The recipe of a `to_dict`, or of a checkpoint's older `pruner` entry.

        A missing field has its default. An unknown field is ignored if it says nothing: a newer
        version may have written it.

        Raises:
            PruningError: anything else, in one line.
        """
        if not isinstance(untrusted, Mapping):
            raise PruningError(f"the recipe is {short(untrusted)}: expected a mapping")
        values = dict(untrusted)
        if "name" in values and "pruner" not in values:
            values["pruner"] = values.pop("name")

        for name, value in values.items():
            is_list = name == "layers" and isinstance(value, list)
            if not is_list and not isinstance(value, str | int | float | Mapping | None):
                raise PruningError(
                    f"the recipe's {short(name)} is {short(value)}: expected a number or a word"
                )

        known = {field.name for field in fields(cls)}
        for name in [name for name in values if name not in known]:
            value = values.pop(name)
            if not isinstance(name, str) or value not in (None, False, "none"):
                raise PruningError(
                    f"the recipe has {short(name)}: {short(value)}, which is not known here"
                )

        recipe = cls(**values)
        recipe.check()
        return replace(
            recipe,
            custom_config=_plain(recipe.custom_config),
            method_options=_plain(recipe._value("method_options")),
        )

    def differences(self, other: "Recipe") -> list[str]:
        """The fields in which the recipes differ, among all that at least one of them uses.

        Both recipes have passed `check`. Custom configurations are compared by the meaning of their
        levels; a list always differs from a mapping, since only the names of the weights could tell
        whether they mean the same.
        """
        return [
            name
            for name in self._used() | other._used()
            if self._meaning(name) != other._meaning(name)
        ]

    def in_words(self) -> str:
        """The flags that ask for this recipe, without flags at their defaults."""
        if self.pruner is None:
            return "no pruner"
        used = self._used()
        return " ".join(self._flag(name) for name in self._given() if name in used)

    @property
    def options(self) -> dict[str, Option]:
        """The options that the chosen methods have, as users write them: `owl.lambda`."""
        found = {}
        for choice, registry in METHODS.items():
            found |= options_of(registry, getattr(self, choice))
        return found

    def method(self, choice: str) -> Any:
        """The function or class of a choice, with its options."""
        return chosen(METHODS[choice], getattr(self, choice), self.method_options)

    def schedule(self, steps: Steps) -> Schedule:
        """The schedule, with these times."""
        return self.method("prune_schedule")(self, steps)

    @property
    def needs(self) -> set[str]:
        """The statistics of the data that score and pruner need."""
        return set(needs_of(self.pruner, self.score)) if self.pruner else set()

    @property
    def looks_at_data(self) -> bool:
        """Whether score, pruner or reconstruction look at calibration images."""
        return bool(self.needs) or self.reconstruct != NONE

    def one_shot(self) -> "Recipe":
        """The same choices, made once: for an evaluation, or for masks that stay."""
        return self.with_schedule("one-shot")

    def with_schedule(self, schedule: str) -> "Recipe":
        """The same choices under another schedule; fields that it does not use have defaults."""
        unused = timed_fields() - {*SCHEDULES[schedule].uses}
        defaults = {field.name: field.default for field in fields(self) if field.name in unused}
        return self.replaced(prune_schedule=schedule, **defaults)

    def replaced(self, **choices) -> "Recipe":
        """The recipe with other choices, without the options of methods that these replace."""
        recipe = replace(self, **choices)
        given = self.method_options or {}
        left = {name: value for name, value in given.items() if name in recipe.options}
        return replace(recipe, method_options=left or None)

    def steps(self, total: int, epoch: int) -> Steps:
        """The times of the schedule in steps.

        Args:
            total: steps of the training.
            epoch: steps of an epoch.

        Raises:
            PruningError: the rewind lies after the first round.
        """
        end = min(round(self.prune_end * total), max(total - 1, 0))
        start = min(round(self.prune_start * total), end)
        rewind = None if self.rewind is None else self.rewind * epoch
        if rewind is not None and rewind > start:
            raise PruningError(
                f"--rewind {self.rewind}: expected an epoch up to the first round, at step "
                f"{start} of {total} with {epoch} an epoch"
            )
        return Steps(total, epoch, start, end, rewind)

    def levels(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Amount]:
        """What `custom` keeps of each weight. Nothing for other pruners.

        shapes: by the names of the prunable weights, in model order.

        Raises:
            PruningError: the configuration does not fit the weights.
        """
        return resolve_levels(self.custom_config or {}, shapes) if self.pruner == "custom" else {}

    @property
    def structured(self) -> bool:
        """Whether it prunes whole heads or neurons, which can be taken out of the model."""
        return parse_pattern(self.pattern).structured or bool(self._units())

    def shrinks(self, parameter: str) -> bool:
        """Whether heads or neurons may be pruned from the block of a weight or bias."""
        if parse_pattern(self.pattern).structured:
            return True
        return has_units(self._units(), parameter)

    def units(self, counts: Mapping[str, int]) -> dict[str, int]:
        """How many heads or neurons `custom` leaves of blocks, by name; nothing for others.

        counts: how many each block of the model has.

        Raises:
            PruningError: the configuration does not fit the blocks.
        """
        return resolve_units(self.custom_config or {}, counts) if self.pruner == "custom" else {}

    def request(self, shapes: Mapping[str, Sequence[int]], levels: Mapping, scale=None) -> dict:
        """The arguments of `compute_masks`.

        Args:
            shapes: by the names of the prunable weights, in model order.
            levels: what `levels(shapes)` returned.
            scale: from each sparsity of the recipe to the sparsity to use. In groups, the nearest
                number is kept. None: the recipe's own.
        """
        names = ("pruner", "sparsity", "custom_config", "score")
        request = {name: getattr(self, name) for name in names}
        if self.method_options:
            options = options_of(PRUNERS, self.pruner) | options_of(SCORES, self.score)
            request["method_options"] = {
                name: value for name, value in self.method_options.items() if name in options
            }
        if self.pattern != "unstructured":
            request |= {"pattern": self.pattern, "budget": self.budget}
        if scale is None:
            return request

        pattern = parse_pattern(self.pattern)
        if self.pruner == "custom":
            entries = [
                _scaled(level, math.prod(shapes[name]), scale) for name, level in levels.items()
            ]
            request["custom_config"] = {"sparsity": {"mode": "nxm", "level": entries}}
        elif pattern.sparsity is not None:
            n, _ = _scaled((pattern.n, pattern.m), 0, scale)
            request["pattern"] = pattern.keeping(n)
        else:
            request["sparsity"] = scale(self.sparsity)
        return request

    # ---- helpers of `check` ----

    def _check_numbers(self) -> None:
        """Each value that no other one and no registry decides."""
        self._expect(
            _is_integer(self.prune_rounds) and 1 <= self.prune_rounds <= MOST_ROUNDS,
            "prune_rounds",
            f"an integer from 1 to {MOST_ROUNDS}",
        )
        for name, smallest in (("prune_every", 1), ("calibration_images", 1), ("seed", 0)):
            value = getattr(self, name)
            good = _is_integer(value) and smallest <= value < LARGEST
            self._expect(good, name, f"an integer of at least {smallest}")
        if self.rewind is not None:
            good = _is_integer(self.rewind) and 0 <= self.rewind < LARGEST
            self._expect(good, "rewind", "the number of an epoch")

        # Fractions
        good = _is_real(self.prune_start) and 0 <= self.prune_start < 1
        self._expect(good, "prune_start", "a number in [0, 1)")
        for name in ("prune_end", "drop_fraction"):
            value = getattr(self, name)
            self._expect(_is_real(value) and 0 < value <= 1, name, "a number in (0, 1]")

        # Rates
        good = _is_real(self.sr_decay) and 0 <= self.sr_decay < math.inf
        self._expect(good, "sr_decay", "a number of at least 0")
        good = _is_real(self.mask_lr) and 0 < self.mask_lr < math.inf
        self._expect(good, "mask_lr", "a number above 0")

        self._expect(isinstance(self.permute, bool), "permute", "true or false")
        if self.layers is not None and (why := why_no_layers(self.layers)):
            raise PruningError(f"--layers: {why}")

    def _check_schedule(self) -> None:
        """The schedule, and that it uses the times and numbers that are given."""
        names = ", ".join(SCHEDULES)
        self._expect(_is_in(SCHEDULES, self.prune_schedule), "prune_schedule", f"one of {names}")

        for name in self._given():
            users = users_of(name)
            if users and name != "seed" and self.prune_schedule not in users:
                raise PruningError(
                    f"{self._flag(name)}: not with --prune-schedule {self.prune_schedule}; only "
                    f"{', '.join(users)} {'uses' if len(users) == 1 else 'use'} it"
                )

        if "prune_end" in SCHEDULES[self.prune_schedule].uses:
            self._expect(
                self.prune_start < self.prune_end,
                "prune_end",
                f"more than --prune-start {self.prune_start:g}",
            )

    def _check_that_nothing_needs_a_pruner(self) -> None:
        for name in self._given():
            if name not in ("seed", "calibration_images"):
                raise PruningError(
                    f"{self._flag(name)} needs --pruner as well, one of {', '.join(PRUNERS)}"
                )

    def _check_groups(self) -> None:
        """That permutation and schedule can do with the groups of weights."""
        groups = self._groups()
        schedule = SCHEDULES[self.prune_schedule]

        self._expect(
            groups.along_inputs or not self.permute,
            "permute",
            "n:m, n:mt or x:m, as --pattern or in a custom YAML; nothing else depends on the order "
            "of inputs",
        )
        self._expect(
            not (schedule.moves_weights and groups.exist),
            "prune_schedule",
            "unstructured levels only, since it moves weights anywhere in their layer, and groups "
            "would break",
        )
        self._expect(
            groups.learnable or not schedule.learns_masks,
            "prune_schedule",
            f"n:m or x:m in every pruned layer, with m of at most {MOST_LEARNED}, since each mask "
            "of a group has a logit",
        )
        self._expect(
            not self._units() or self.prune_schedule == "one-shot",
            "prune_schedule",
            "one-shot with units in the custom YAML",
        )
        self._expect(
            not (schedule.goes_dense and parse_pattern(self.pattern).structured),
            "prune_schedule",
            "a pattern whose weights can come back in a dense phase; whole heads and neurons get "
            "no gradient once they are zero",
        )

    def _groups(self) -> "Groups":
        if self.pruner == "custom":
            levels = [level for _, level in self._custom_levels()]
            along = any(isinstance(level, tuple) and level[0] < level[1] for level in levels)
            blocks = any(isinstance(level, BlockLevel) and level.sparsity for level in levels)
            learnable = all(
                level[1] <= MOST_LEARNED if isinstance(level, tuple) else level == 0
                for level in levels
            )
            return Groups(along or blocks, along_inputs=along, learnable=learnable)

        pattern = parse_pattern(self.pattern)
        m = getattr(pattern, "m", None) or 0
        return Groups(
            exist=self.pattern != "unstructured",
            along_inputs=m > 0,
            learnable=1 <= m <= MOST_LEARNED and not pattern.transposable,
        )

    def _check_reconstruction(self) -> None:
        """The reconstruction, and that the training begins with the weights that it leaves."""
        names = ", ".join(RECONSTRUCTIONS)
        known = callable(self.reconstruct) or _is_in(RECONSTRUCTIONS, self.reconstruct)
        self._expect(known, "reconstruct", f"one of {names}")
        if self.reconstruct == NONE:
            return

        self._expect(
            not SCHEDULES[self.prune_schedule].trains_pruned,
            "reconstruct",
            f"none with --prune-schedule {self.prune_schedule}, which trains the pruned weights",
        )
        self._expect(
            self.rewind is None,
            "reconstruct",
            "none with --rewind, which takes the weights back to what they were",
        )

    def _expect(self, good: bool, name: str, wanted: str) -> None:
        if not good:
            raise PruningError(f"{self._flag(name)}: expected {wanted}")

    # ---- other helpers, not exported ----

    def _flag(self, name: str) -> str:
        """A field as it is given on the command line."""
        value = self._value(name)
        if name == "method_options" and isinstance(value, Mapping):
            return " ".join([as_flag(name), *(f"{key}={in_words(value[key])}" for key in value)])
        if value is True or isinstance(value, Mapping):
            return as_flag(name)
        if name == "layers":
            return " ".join([as_flag(name), *value])
        return f"{as_flag(name)} {in_words(name_of(value) if callable(value) else value)}"

    def _given(self) -> list[str]:
        """The fields that are not at their defaults."""
        return [field.name for field in fields(self) if self._value(field.name) != field.default]

    def _value(self, name: str):
        """The value of a field, without options at their defaults."""
        value = getattr(self, name)
        if name != "method_options" or not isinstance(value, Mapping):
            return value
        known = self.options
        changed = {
            option: number
            for option, number in value.items()
            if option not in known or number != known[option].default
        }
        return changed or None

    def _used(self) -> dict[str, None]:
        """The fields that decide something: a set, in their order."""
        if self.pruner is None:
            return {"pruner": None}

        unused = timed_fields() | {"calibration_images", "seed"}
        unused -= {*SCHEDULES[self.prune_schedule].uses}
        if self.looks_at_data:
            unused -= {"calibration_images", "seed"}
        if self.score == "random":
            unused -= {"seed"}
        return {field.name: None for field in fields(self) if field.name not in unused}

    def _meaning(self, name: str):
        """The value of a field, in one form for all equal meanings."""
        if name == "custom_config" and self.custom_config is not None:
            return [*self._custom_levels(), *sorted(self._units().items())]
        value = self._value(name)
        return list(value) if isinstance(value, tuple) else value

    def _units(self) -> Mapping[str, int]:
        """The numbers of heads and neurons of the custom configuration, by patterns of blocks."""
        return unit_section(self.custom_config) if self.pruner == "custom" else {}

    def _custom_levels(self) -> list[tuple]:
        """(place or pattern, level) for each entry of the custom configuration."""
        if not isinstance(self.custom_config, Mapping):
            raise PruningError(f"custom_config is {short(self.custom_config)}: expected a mapping")

        level = level_section(self.custom_config, "custom_config")
        if isinstance(level, Mapping):
            # The default comes first, wherever it stands
            entries = sorted(level.items(), key=lambda entry: entry[0] != "default")
        elif isinstance(level, list | tuple):
            entries = list(enumerate(level))
        else:
            raise PruningError(
                f"custom_config: level is {short(level)}: expected a list, or a mapping"
            )
        return [
            (place, parse_level(entry, f"custom_config: level {short(place)}"))
            for place, entry in entries
        ]


class Groups(NamedTuple):
    """What the pattern, or the levels of a custom configuration, say of weights removed together.

    Attributes:
        exist: some weights are removed together.
        along_inputs: some groups are of consecutive inputs, such as those of n:m.
        learnable: each pruned layer has groups that are small enough to learn their masks.
    """

    exist: bool
    along_inputs: bool
    learnable: bool


def timed_fields() -> set[str]:
    """The fields of a recipe that only schedules use."""
    return {name for schedule in SCHEDULES.values() for name in schedule.uses} - {"seed"}


def _scaled(level: Amount, total: int, scale: Callable[[float], float]):
    """The entry of a custom configuration for the scaled sparsity of a level.

    Args:
        level: as `resolve_levels` gives it.
        total: the weights of the layer.
    """
    if isinstance(level, BlockLevel):
        return f"{level.name} {scale(level.sparsity):.17f}"
    if isinstance(level, tuple):
        n, m = level
        return m - round(m * scale(1 - n / m)), m
    # A configuration has no sparsity of 1, but a layer may keep nothing
    return min(scale(1 - level / total), math.nextafter(1, 0))


def _is_in(registry: Mapping, name) -> bool:
    return isinstance(name, str) and name in registry


def _is_integer(value) -> bool:
    return type(value) is int


def _is_real(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
