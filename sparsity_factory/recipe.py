"""`Recipe`: the choices that make a pruned model, as one value with one name for each."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from .custom_yaml import level_section, parse_level, resolve_levels
from .errors import PruningError, short
from .patterns import parse_pattern
from .pruners import PRUNERS, needs_of
from .reconstruction import NONE, RECONSTRUCTIONS
from .schedules import SCHEDULES, Steps
from .scores import SCORES

LARGEST = 2**53  # of integers: floats count no further, and nothing here is that large
MOST_LEARNED = 8  # group size: 4:8 has 70 masks, 8:16 has 12,870
MOST_ROUNDS = 10_000  # each is a number in a list


@dataclass(frozen=True)
class Recipe:
    """What prunes a model, how and when. Fields are named as the command line's flags, and have
    their defaults here.

    Attributes:
        pruner: a name in `PRUNERS`, or None for a dense model.
        sparsity: the fraction of the prunable weights to remove, in [0, 1); None where pruner or
        pattern decide it.
        custom_config: what the YAML of the pruner `custom` parses to.
        score: a name in `SCORES`.
        pattern: what is removed together: `unstructured`, `2:4`, ...
        budget: what the sparsity is a fraction of: `weights`, or with heads and neurons also
        `macs`.
        permute: reorder inputs of layers before the first masks are chosen, so that groups of n:m
        keep more.
        prune_schedule: a name in `SCHEDULES`.
        prune_start, prune_end: when its changes begin and end, as fractions of the training.
        prune_every: steps from a change to the next.
        prune_rounds: how often `iterative` prunes, and how many sparse phases `ac-dc` has.
        rewind: the epoch whose weights `iterative` goes back to, at its beginning; None not to go
        back.
        drop_fraction: of the kept weights, the share that `set` and `rigl` replace at first.
        sr_decay: what `sr-ste` multiplies masked-out weights by and adds to their gradients.
        mask_lr: the learning rate of the logits of `maskllm`.
        reconstruct: a name in `RECONSTRUCTIONS`: how the kept weights make up for the pruned ones.
        calibration_images: how many training images score, pruner and reconstruction may look at.
        seed: decides every random choice.
    """

    pruner: str | None = None
    sparsity: float | None = None
    custom_config: Mapping | None = None
    score: str = "magnitude"
    pattern: str = "unstructured"
    budget: str = "weights"
    permute: bool = False
    prune_schedule: str = "one-shot"
    prune_start: float = 0.0
    prune_end: float = 0.75  # as RigL; the last quarter of the training is the final masks'
    prune_every: int = 100
    prune_rounds: int = 4  # by default at 0, 1/4, 1/2 and 3/4 of the training
    rewind: int | None = None
    drop_fraction: float = 0.3
    sr_decay: float = 2e-4
    mask_lr: float = 1e-2
    reconstruct: str = NONE
    calibration_images: int = 1024
    seed: int = 0

    def check(self, epochs: float | None = None) -> None:
        """Raises PruningError, in one line, for a wrong value or a combination that makes no sense.

        epochs: of the training, where they are known: a rewind has to lie before the first round.
        """
        self._check_schedule()
        if self.pruner is None:
            for name in self._given():
                if name not in ("seed", "calibration_images"):
                    raise PruningError(
                        f"{self._flag(name)}: expected --pruner beside it, one of "
                        f"{', '.join(PRUNERS)}"
                    )
            return
        self._check_choices()
        self._expect(
            self.rewind is None or epochs is None or self.rewind <= self.prune_start * epochs,
            "rewind",
            f"an epoch up to the first round, at --prune-start {self.prune_start:g} of {epochs} "
            "epochs",
        )

    def to_dict(self) -> dict:
        """The fields by name, in plain containers, numbers and strings: for a checkpoint."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, untrusted) -> "Recipe":
        """The recipe that `to_dict` was called on, or that a checkpoint's older `pruner` entry
        means.

        A field that is missing has its default. One that is not known here is passed over if it
        says nothing: a newer version may have written it.

        Raises:
            PruningError: anything else, in one line.
        """
        if not isinstance(untrusted, Mapping):
            raise PruningError(f"the recipe is {short(untrusted)}: expected a mapping")
        values = dict(untrusted)
        if "name" in values and "pruner" not in values:
            values["pruner"] = values.pop("name")
        for name, value in values.items():
            if not isinstance(value, str | int | float | Mapping | None):
                raise PruningError(
                    f"the recipe's {short(name)} is {short(value)}: expected a number or a word"
                )
        known = {field.name for field in fields(cls)}
        for name in [name for name in values if name not in known]:
            if not isinstance(name, str) or values[name] not in (None, False, "none"):
                raise PruningError(
                    f"the recipe has {short(name)}: {short(values[name])}, which is not known here"
                )
            del values[name]
        recipe = cls(**values)
        recipe.check()
        return replace(recipe, custom_config=_plain(recipe.custom_config))

    def differences(self, other: "Recipe") -> list[str]:
        """The fields that make the other recipe another one. Those that neither uses do not count.

        Both are as `check` wants them. Custom configurations are compared by what their levels say;
        a list differs from a mapping, since only the names of the weights could tell that they say
        the same.
        """
        return [
            name
            for name in self._used() | other._used()
            if self._meaning(name) != other._meaning(name)
        ]

    def in_words(self) -> str:
        """The flags that ask for this recipe, without those at their defaults."""
        if self.pruner is None:
            return "no pruner"
        used = self._used()
        return " ".join(self._flag(name) for name in self._given() if name in used)

    @property
    def needs(self) -> set[str]:
        """What score and pruner need to know of the data."""
        return set(needs_of(self.pruner, self.score)) if self.pruner else set()

    @property
    def looks_at_data(self) -> bool:
        """Whether score, pruner or reconstruction look at calibration images."""
        return bool(self.needs) or self.reconstruct != NONE

    def one_shot(self) -> "Recipe":
        """The same choices, made once: for an evaluation, or for masks that stay."""
        return self.with_schedule("one-shot")

    def with_schedule(self, schedule: str) -> "Recipe":
        """The same choices under another schedule; the times and numbers that it does not use are
        at their defaults.
        """
        unused = timed_fields() - {*SCHEDULES[schedule].uses}
        return replace(
            self,
            prune_schedule=schedule,
            **{field.name: field.default for field in fields(self) if field.name in unused},
        )

    def steps(self, total: int, epoch: int) -> Steps:
        """The times of the schedule in steps, of a training of `total` steps with `epoch` steps an
        epoch.
        """
        end = min(round(self.prune_end * total), max(total - 1, 0))
        start = min(round(self.prune_start * total), end)
        rewind = None if self.rewind is None else self.rewind * epoch
        if rewind is not None and rewind > start:
            raise PruningError(
                f"--rewind {self.rewind}: expected an epoch up to the first round, at step {start} "
                "of "
                f"{total} with {epoch} an epoch"
            )
        return Steps(total, epoch, start, end, rewind)

    def levels(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int | tuple[int, int]]:
        """Of `custom`, what each weight keeps: a number, or (n, m). Nothing for other pruners.

        shapes: of the prunable weights, by name in model order.

        Raises:
            PruningError: the configuration does not fit the weights.
        """
        return resolve_levels(self.custom_config, shapes) if self.pruner == "custom" else {}

    def request(self, shapes: Mapping[str, Sequence[int]], levels: Mapping, scale=None) -> dict:
        """The arguments of `compute_masks`, with every sparsity replaced by `scale(sparsity)`,
        where that is given.

        Of every m weights, the number kept is the nearest; it is the target's n where nothing is
        scaled.

        levels: what `levels(shapes)` returned.
        """
        request = {
            name: getattr(self, name) for name in ("pruner", "sparsity", "custom_config", "score")
        }
        if self.pattern != "unstructured":
            request |= {"pattern": self.pattern, "budget": self.budget}
        if scale is None:
            return request
        if self.pruner == "custom":
            entries = [
                _scaled(level, math.prod(shapes[name]), scale) for name, level in levels.items()
            ]
            request["custom_config"] = {"sparsity": {"mode": "nxm", "level": entries}}
        elif (pattern := parse_pattern(self.pattern)).sparsity is not None:
            request["pattern"] = pattern.keeping(_scaled((pattern.n, pattern.m), 0, scale)[0])
        else:
            request["sparsity"] = scale(self.sparsity)
        return request

    # ---- helpers, not exported ----

    def _check_choices(self) -> None:
        self._expect(_known(self.pruner, PRUNERS), "pruner", f"one of {', '.join(PRUNERS)}")
        self._expect(_known(self.score, SCORES), "score", f"one of {', '.join(SCORES)}")
        self._expect(
            _known(self.reconstruct, RECONSTRUCTIONS),
            "reconstruct",
            f"one of {', '.join(RECONSTRUCTIONS)}",
        )
        pattern = parse_pattern(self.pattern)
        fixed = pattern.sparsity is not None
        learnable = (
            1 <= (getattr(pattern, "m", None) or 0) <= MOST_LEARNED and not pattern.transposable
        )
        self._expect(
            _known(self.budget, dict.fromkeys(pattern.budgets)),
            "budget",
            f"{' or '.join(pattern.budgets)} with --pattern {self.pattern}",
        )
        grouped = self.pattern != "unstructured"
        has_groups = bool(getattr(pattern, "m", None))
        if self.pruner == "custom":
            self._expect(
                self.sparsity is None,
                "sparsity",
                "none with --pruner custom, whose YAML sets the sparsity",
            )
            self._expect(
                not grouped, "pattern", "none with --pruner custom, whose YAML sets the patterns"
            )
            if self.custom_config is None:
                raise PruningError("--pruner custom: expected --custom-config FILE beside it")
            levels = [level for _, level in self._custom_levels()]
            grouped = has_groups = any(
                isinstance(level, tuple) and level[0] < level[1] for level in levels
            )
            learnable = all(
                level[1] <= MOST_LEARNED if isinstance(level, tuple) else level == 0
                for level in levels
            )
        else:
            self._expect(self.custom_config is None, "custom_config", "--pruner custom beside it")
            if fixed:
                self._expect(
                    self.sparsity is None,
                    "sparsity",
                    f"none with --pattern {self.pattern}, which sets it",
                )
                self._expect(
                    self.pruner == "unif",
                    "pruner",
                    f"unif or none with --pattern {self.pattern}, which prunes every layer alike",
                )
            elif self.sparsity is None:
                raise PruningError(
                    f"--pruner {self.pruner}: expected --sparsity beside it, a number in [0, 1)"
                )
            else:
                self._expect(
                    _is_real(self.sparsity) and 0 <= self.sparsity < 1,
                    "sparsity",
                    "a number in [0, 1)",
                )
        self._expect(
            not self.permute or has_groups,
            "permute",
            "n:m, n:mt or x:m, as --pattern or in a custom YAML; nothing else depends on the order "
            "of inputs",
        )
        if self.reconstruct != NONE:
            self._expect(
                not SCHEDULES[self.prune_schedule].trains_pruned,
                "reconstruct",
                f"none with --prune-schedule {self.prune_schedule}, which trains the pruned "
                "weights",
            )
            self._expect(
                self.rewind is None,
                "reconstruct",
                "none with --rewind, which takes the weights back to what they were",
            )
        if grouped and self.prune_schedule in ("set", "rigl"):
            raise PruningError(
                f"--prune-schedule {self.prune_schedule}: expected unstructured levels only, since "
                "it "
                "moves weights anywhere in their layer, and groups would break"
            )
        if SCHEDULES[self.prune_schedule].learns_masks and not learnable:
            raise PruningError(
                f"--prune-schedule {self.prune_schedule}: expected n:m or x:m in every pruned "
                "layer, "
                f"with m of at most {MOST_LEARNED}, since each mask of a group has a logit"
            )
        if pattern.structured and self.prune_schedule == "ac-dc":
            raise PruningError(
                "--prune-schedule ac-dc: expected a pattern whose weights can come back in a dense "
                "phase; whole heads and neurons get no gradient once they are zero"
            )

    def _check_schedule(self) -> None:
        self._expect(
            _known(self.prune_schedule, SCHEDULES),
            "prune_schedule",
            f"one of {', '.join(SCHEDULES)}",
        )
        self._expect(
            _is_integer(self.prune_rounds) and 1 <= self.prune_rounds <= MOST_ROUNDS,
            "prune_rounds",
            f"an integer from 1 to {MOST_ROUNDS}",
        )
        for name, smallest in (("prune_every", 1), ("calibration_images", 1), ("seed", 0)):
            value = getattr(self, name)
            self._expect(
                _is_integer(value) and smallest <= value < LARGEST,
                name,
                f"an integer of at least {smallest}",
            )
        self._expect(
            self.rewind is None or _is_integer(self.rewind) and 0 <= self.rewind < LARGEST,
            "rewind",
            "the number of an epoch",
        )
        self._expect(
            _is_real(self.prune_start) and 0 <= self.prune_start < 1,
            "prune_start",
            "a number in [0, 1)",
        )
        self._expect(isinstance(self.permute, bool), "permute", "true or false")
        for name in ("prune_end", "drop_fraction"):
            self._expect(
                _is_real(getattr(self, name)) and 0 < getattr(self, name) <= 1,
                name,
                "a number in (0, 1]",
            )
        self._expect(
            _is_real(self.sr_decay) and 0 <= self.sr_decay < math.inf,
            "sr_decay",
            "a number of at least 0",
        )
        self._expect(
            _is_real(self.mask_lr) and 0 < self.mask_lr < math.inf, "mask_lr", "a number above 0"
        )
        for name in self._given():
            users = [schedule for schedule in SCHEDULES if name in SCHEDULES[schedule].uses]
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

    def _expect(self, good: bool, name: str, wanted: str) -> None:
        if not good:
            raise PruningError(f"{self._flag(name)}: expected {wanted}")

    def _flag(self, name: str) -> str:
        value = getattr(self, name)
        flag = f"--{name.replace('_', '-')}"
        return flag if value is True or isinstance(value, Mapping) else f"{flag} {_in_words(value)}"

    def _given(self) -> list[str]:
        """The fields that are not at their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def _used(self) -> dict[str, None]:
        """The fields that decide something, in their order: a set that keeps it."""
        if self.pruner is None:
            return {"pruner": None}
        unused = {name for schedule in SCHEDULES.values() for name in schedule.uses} | {
            "calibration_images",
            "seed",
        }
        unused -= {*SCHEDULES[self.prune_schedule].uses}
        if self.looks_at_data:
            unused -= {"calibration_images", "seed"}
        if self.score == "random":
            unused -= {"seed"}
        return {field.name: None for field in fields(self) if field.name not in unused}

    def _meaning(self, name: str):
        """The value of a field in the one form that equal meanings share."""
        if name == "custom_config" and self.custom_config is not None:
            return self._custom_levels()
        return getattr(self, name)

    def _custom_levels(self) -> list[tuple]:
        """Per entry of the custom configuration its place or pattern, and the sparsity or (n, m)
        that it asks for.
        """
        if not isinstance(self.custom_config, Mapping):
            raise PruningError(f"custom_config is {short(self.custom_config)}: expected a mapping")
        level = level_section(self.custom_config, "custom_config")
        if isinstance(level, Mapping):
            # Looked at first, wherever it is
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


def timed_fields() -> set[str]:
    """The fields of a recipe that only schedules use."""
    return {name for schedule in SCHEDULES.values() for name in schedule.uses} - {"seed"}


def _scaled(level: int | tuple[int, int], total: int, scale: Callable[[float], float]):
    """An entry of a custom configuration for the scaled sparsity of a level, as `resolve_levels`
    gives it.
    """
    if isinstance(level, tuple):
        n, m = level
        return m - round(m * scale(1 - n / m)), m
    # Of a layer that keeps nothing, too
    return min(scale(1 - level / total), math.nextafter(1, 0))


def _known(name, names: Mapping) -> bool:
    return isinstance(name, str) and name in names


def _is_integer(value) -> bool:
    return type(value) is int


def _is_real(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _in_words(value) -> str:
    return (
        f"{value}"
        if isinstance(value, int | float) and abs(value) < LARGEST
        else short(value).strip("'")
    )
