"""The menu: tables of all methods, and which combinations are refused: made from the registries and
`Recipe.check`.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import combinations

from .errors import PruningError, as_flag
from .method import describe
from .patterns import PATTERNS, parse_pattern
from .pruners import PRUNERS
from .recipe import Recipe
from .reconstruction import RECONSTRUCTIONS
from .schedules import SCHEDULES, users_of
from .scores import SCORES

WIDTH = 120
CHOICES = {
    "--score": ("how much a weight matters", SCORES),
    "--pruner": (
        "how the budget is shared among layers, which papers call the allocation",
        PRUNERS,
    ),
    "--pattern": ("what may be removed together", PATTERNS),
    "--prune-schedule": ("when masks are chosen and changed", SCHEDULES),
    "--reconstruct": ("how the kept weights make up for the pruned ones", RECONSTRUCTIONS),
}
#: What docs/comparison.md measures side by side.
COMPARED = {
    "--score": ("magnitude", "wanda", "taylor", "fisher", "cap", "random"),
    "--pruner": ("unif", "erk", "lamp", "glob", "cap"),
    "--prune-schedule": ("one-shot", "gradual", "ste", "sr-ste", "set", "rigl", "maskllm"),
    "--reconstruct": ("none", "obs", "least-squares"),
}
# Of patterns with numbers
EXAMPLES = {"n:m": "2:4", "n:mt": "2:4t", "x:m": "x:4", "block:RxC": "block:16x16"}
CONFIG = {"sparsity": {"mode": "unstructured", "level": {"default": 0.5}}}
GROUPS = {"sparsity": {"mode": "nxm", "level": {"default": [2, 4]}}}

# What is refused for what stands beside a choice: a recipe of that kind, and the epochs of the
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
--pattern n:m, n:mt, x:m, block:RxC: sizes that do not divide the layers
--pattern heads, neurons, heads+neurons: less than one unit left in a block, unknown blocks
what looks at data: more --calibration-images than training images, and streams (timm:wds/...)
"""


def menu() -> str:
    """What `main.py --list-methods` prints: a table of each choice, then what is refused."""
    parts = [
        f"{flag}: {what}\n\n{table(registry)}{compared(flag)}"
        for flag, (what, registry) in CHOICES.items()
    ]
    return "\n\n".join(
        [
            *parts,
            "Refused before any work\n\n" + "\n".join(refusals()),
            "Refused when data and model are known\n\n" + OF_THE_MODEL.strip(),
        ]
    )


def compared(flag: str) -> str:
    """Where to see what the names of a choice gave."""
    names = f"\n\nSide by side in docs/comparison.md: {', '.join(COMPARED.get(flag, ()))}"
    return names if flag in COMPARED else ""


def table(registry: Mapping) -> str:
    """All names of a registry: what each does, the statistics that it looks at where any do, and
    its source.
    """
    rows = [
        (name, line.rstrip("."), ", ".join(sorted(needs)), source)
        for name, (line, source, needs) in (
            (name, describe(entry)) for name, entry in registry.items()
        )
    ]
    heads = ("name", "what it does", "looks at", "source")
    columns = [column for column in zip(heads, *rows, strict=True) if any(column[1:])]
    widths = [min(max(map(len, column)), 36) for column in columns]
    widths[1] = 0
    widths[1] = min(max(map(len, columns[1])), WIDTH - sum(widths) - 2 * (len(widths) - 1))
    lines = []
    for row in zip(*columns, strict=True):
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            texts = (cell[number] if number < len(cell) else "" for cell in cells)
            lines.append(
                "  ".join(
                    text.ljust(width) for text, width in zip(texts, widths, strict=True)
                ).rstrip()
            )
    return "\n".join(lines)


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
    """Which values of two choices are refused together, whatever the others are: one, its values,
    other, its, why.
    """
    found = []
    for (one, ones), (other, others) in combinations(_values().items(), 2):
        reasons = {}  # by value of the one choice and reason, the values of the other
        for value in ones:
            for beside in others:
                if reason := _reason(example(**{one: value, other: beside})):
                    reasons.setdefault((value, reason), []).append(beside)
        alike = {}
        for (value, reason), refused in reasons.items():
            alike.setdefault((reason, tuple(refused)), []).append(value)
        found += [
            (one, values, other, list(refused), reason)
            for (reason, refused), values in alike.items()
        ]
    return found


def example(pruner: str = "unif", pattern: str | None = None, **choices) -> Recipe:
    """A recipe of these choices, with the pattern, sparsity or configuration that they need."""
    learns_masks = SCHEDULES[choices.get("prune_schedule", Recipe.prune_schedule)].learns_masks
    if pruner == "custom":
        return Recipe(pruner, custom_config=CONFIG, pattern=pattern or Recipe.pattern, **choices)
    pattern = pattern or (EXAMPLES["x:m"] if learns_masks else Recipe.pattern)
    return Recipe(
        pruner, 0.5 if parse_pattern(pattern).sparsity is None else None, pattern=pattern, **choices
    )


# ---- helpers, not exported ----


def _values() -> dict[str, Iterable[str]]:
    """By field of a recipe all values of a choice, patterns by example."""
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
        return re.search(r"\b(expected|needs) .*", str(error))[0]
    return ""
