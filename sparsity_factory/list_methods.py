"""The menu of `--list-methods`: tables of all methods, and the combinations that are refused.

It is made from the registries and from `Recipe.check`.
"""

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import combinations, product, zip_longest

from .errors import PruningError, as_flag
from .method import describe, options_of
from .patterns import PATTERNS, parse_pattern
from .pruners import PRUNERS
from .recipe import METHODS, Recipe
from .reconstruction import RECONSTRUCTIONS
from .schedules import SCHEDULES, users_of
from .scores import SCORES

WIDTH = 120
CHOICES: dict[str, tuple[str, Mapping]] = {
    "--score": ("how much a weight matters", SCORES),
    "--pruner": (
        "how the budget is shared among layers, which papers call the allocation",
        PRUNERS,
    ),
    "--pattern": ("what may be removed together", PATTERNS),
    "--prune-schedule": ("when masks are chosen and changed", SCHEDULES),
    "--reconstruct": ("how the kept weights compensate for the pruned ones", RECONSTRUCTIONS),
}
#: What docs/comparison.md measures side by side.
COMPARED = {
    "--score": ("magnitude", "wanda", "taylor", "fisher", "cap", "random"),
    "--pruner": ("unif", "erk", "lamp", "glob", "cap"),
    "--prune-schedule": ("one-shot", "gradual", "ste", "sr-ste", "set", "rigl", "maskllm"),
    "--reconstruct": ("none", "obs", "least-squares"),
}
# An example of each pattern with numbers
EXAMPLES = {"n:m": "2:4", "n:mt": "2:4t", "x:m": "x:4", "block:RxC": "block:16x16"}
CONFIG = {"sparsity": {"mode": "unstructured", "level": {"default": 0.5}}}
GROUPS = {"sparsity": {"mode": "nxm", "level": {"default": [2, 4]}}}
UNITS = {"sparsity": {"mode": "nxm", "level": {"default": "dense"}, "units": {"blocks.0.mlp": 8}}}

# What is refused besides pairs of choices: an example of it as a recipe, and the epochs of the
# training if they matter.
ALONE = {
    "another choice without --pruner (--pattern n:m implies unif)": (Recipe(sparsity=0.5), None),
    "--pruner without --sparsity": (Recipe("lamp"), None),
    "--pruner custom without --custom-config": (Recipe("custom"), None),
    "--custom-config with another pruner": (Recipe("lamp", 0.5, CONFIG), None),
    "--sparsity with --pruner custom": (Recipe("custom", 0.5, CONFIG), None),
    "--sparsity with --pattern 2:4": (Recipe("unif", 0.5, pattern="2:4"), None),
    "--budget macs with single weights, rows, groups or blocks": (
        Recipe("unif", 0.5, budget="macs"),
        None,
    ),
    "--pruner custom with n:m in its YAML and --prune-schedule rigl": (
        Recipe("custom", None, GROUPS, prune_schedule="rigl"),
        None,
    ),
    "--pruner custom with units in its YAML and --prune-schedule gradual": (
        Recipe("custom", None, UNITS, prune_schedule="gradual"),
        None,
    ),
    "--permute without groups along the inputs": (Recipe("lamp", 0.5, permute=True), None),
    "--prune-end before --prune-start": (
        Recipe("lamp", 0.5, prune_schedule="gradual", prune_start=0.5, prune_end=0.4),
        None,
    ),
    "--rewind beyond the first round": (
        Recipe("lamp", 0.5, prune_schedule="iterative", rewind=5),
        10,
    ),
    "--reconstruct with --rewind": (
        Recipe("lamp", 0.5, prune_schedule="iterative", rewind=0, reconstruct="obs"),
        None,
    ),
}
OF_THE_MODEL = """\
--pruner unifplus: a sparsity that the layers between the first and the last cannot reach
--pattern row, x:m: a sparsity that leaves less than one weight of a row or group
--pattern n:m, n:mt, x:m, block:RxC: sizes that divide those of no layer
--pattern heads, neurons, heads+neurons: a block without a unit left, or only unknown blocks
methods that look at data: more --calibration-images than training images; streams (timm:wds/...)
"""


def menu() -> str:
    """What `main.py --list-methods` prints: a table of each choice, then what is refused."""
    parts = []
    for flag, (what, registry) in CHOICES.items():
        parts.append(f"{flag}: {what}\n\n{table(registry)}{compared(flag)}")
    parts.append(f"--method-options: numbers of methods, such as owl.lambda=0.1\n\n{options()}")
    parts.append("Refused before any work\n\n" + "\n".join(refusals()))
    parts.append("Refused when data and model are known\n\n" + OF_THE_MODEL.strip())
    return "\n\n".join(parts)


def compared(flag: str) -> str:
    """A paragraph that says where the methods of a choice are compared; empty if nowhere."""
    if flag not in COMPARED:
        return ""
    return f"\n\nSide by side in docs/comparison.md: {', '.join(COMPARED[flag])}"


def table(registry: Mapping) -> str:
    """A table of a registry: name, what it does, the statistics it looks at, and its source."""
    rows = [("name", "what it does", "looks at", "source")]
    for name, entry in registry.items():
        line, source, needs = describe(entry)
        rows.append((name, line.rstrip("."), ", ".join(sorted(needs)), source))
    return _aligned(rows)


def options() -> str:
    """A table of the options of all methods: name, what it is, its default, what is expected.

    Two methods of one name share their options of one name.
    """
    rows = {"option": ("option", "what it is", "default", "expected")}
    for registry in METHODS.values():
        for name in registry:
            for option, (_, line, default, numbers) in options_of(registry, name).items():
                shown = "" if default is None else f"{default:g}"
                rows[option] = (option, line, shown, numbers.words)
    return _aligned(list(rows.values()))


def refusals() -> list[str]:
    """What `Recipe.check` refuses, with its reasons, in lines of at most `WIDTH`."""
    lines = [
        f"{as_flag(one)} {', '.join(ones)} with {as_flag(other)} {', '.join(others)}: {reason}"
        for one, ones, other, others, reason in refused_pairs()
    ]
    lines += [f"{what}: {_reason(*refused)}" for what, refused in ALONE.items()]

    for field in fields(Recipe):
        users = users_of(field.name)
        if users and field.name != "seed":
            lines.append(
                f"{as_flag(field.name)} with another --prune-schedule than {', '.join(users)}"
            )

    return [line for long in lines for line in textwrap.wrap(long, WIDTH, subsequent_indent="    ")]


def refused_pairs() -> list[tuple[str, list[str], str, list[str], str]]:
    """The values of two choices that are refused together, whatever the other choices are.

    Returns:
        (one choice, its values, another choice, its values, the reason) for each group of values.
    """
    found = []
    for (one, ones), (other, others) in combinations(_values().items(), 2):
        # The refused values of the other choice, by value of the one choice and reason
        reasons = defaultdict(list)
        for value, other_value in product(ones, others):
            if reason := _reason(example(**{one: value, other: other_value})):
                reasons[value, reason].append(other_value)

        # The values of the one choice for which the same values are refused for the same reason
        alike = defaultdict(list)
        for (value, reason), refused in reasons.items():
            alike[reason, tuple(refused)].append(value)

        for (reason, others_refused), values in alike.items():
            found.append((one, values, other, list(others_refused), reason))
    return found


def example(pruner: str = "unif", pattern: str | None = None, **choices) -> Recipe:
    """A recipe of these choices, with the pattern, sparsity or configuration that they need."""
    if pruner == "custom":
        return Recipe(pruner, custom_config=CONFIG, pattern=pattern or Recipe.pattern, **choices)

    schedule = SCHEDULES[choices.get("prune_schedule", Recipe.prune_schedule)]
    pattern = pattern or (EXAMPLES["x:m"] if schedule.learns_masks else Recipe.pattern)
    sparsity = 0.5 if parse_pattern(pattern).sparsity is None else None
    return Recipe(pruner, sparsity, pattern=pattern, **choices)


# ---- helpers, not exported ----


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """The rows in columns, without those that are empty below the first row."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]

    # The second column gets the room that the other columns leave
    widths = [min(max(map(len, column)), 36) for column in columns]
    others = sum(widths) - widths[1] + 2 * (len(widths) - 1)
    widths[1] = min(max(map(len, columns[1])), WIDTH - others)

    lines = []
    for row in zip(*columns, strict=True):
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for texts in zip_longest(*cells, fillvalue=""):
            padded = map(str.ljust, texts, widths)
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _values() -> dict[str, Iterable[str]]:
    """All values of each choice, by its field of a recipe; patterns are examples."""
    return {
        "pruner": PRUNERS,
        "pattern": [EXAMPLES.get(form, form) for form in PATTERNS],
        "prune_schedule": SCHEDULES,
        "score": SCORES,
        "reconstruct": RECONSTRUCTIONS,
    }


def _reason(recipe: Recipe, epochs: float | None = None) -> str:
    """Why a recipe is refused, without the flag that begins the message; empty if it is not."""
    try:
        recipe.check(epochs)
    except PruningError as error:
        found = re.search(r"\b(expected|needs) .*", str(error))
        return found[0] if found else str(error)
    return ""
