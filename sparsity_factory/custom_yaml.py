"""Reads and checks the YAML of the `custom` pruner.

    sparsity:
      mode: nxm                  # or: unstructured
      level:                     # a list with one entry per prunable weight, or by name:
        default: [2, 4]
        blocks.0.*: dense
        "*.mlp.fc2": [1, 4]      # later lines win
        "*.mlp.fc1": block:4x1 0.7   # seven of ten blocks are pruned
      units:                     # how many heads and neurons blocks keep; may be left out
        blocks.0.attn: 2

Either mode accepts entries of all forms; the mode only tells a reader what to expect. Layers of a
block in `units` stay dense otherwise.

`choices` in place of `level` has a list of levels for each weight. With one level each it is a
configuration; with more it is a space, from which `search.py` chooses one level for each weight.
"""

import logging
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike, fspath

import yaml

from .errors import PruningError, short
from .patterns import Pattern, parse_pattern

MODES = ("nxm", "unstructured")
EXPECTED_LEVEL = (
    'expected [n, m] with 1 <= n <= m, "n:m", a sparsity in [0, 1), "block:RxC SPARSITY", or dense'
)
# Parsing takes some seconds per megabyte, and a list of a thousand entries has ten kilobytes.
MAX_BYTES = 2**18
MAX_DEPTH = 8  # a correct file has six levels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockLevel:
    """A share of the blocks of a weight that is pruned. name: of the pattern, `block:RxC`."""

    name: str
    sparsity: float

    @property
    def pattern(self) -> Pattern:
        return parse_pattern(self.name)

    def kept(self, shape: Sequence[int]) -> int:
        """How many blocks a weight of this shape keeps."""
        blocks = self.pattern.units(shape)
        return blocks - round(self.sparsity * blocks)

    def __str__(self) -> str:
        return f"{self.name} {self.sparsity!r}"


#: What a layer keeps: a number of weights, n of every m, or a share of its blocks.
Amount = int | tuple[int, int] | BlockLevel


def resolve_levels(
    source: str | PathLike | Mapping, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Amount]:
    """The level that a custom configuration gives each prunable weight.

    Args:
        source: path of a YAML file, or what such a file parses to.
        shapes: the shape (outputs, inputs) of every prunable weight by parameter name, in model
            order.

    Returns:
        In the order of `shapes`: the number of weights kept, (n, m) to keep n of every m along
        the inputs, or a `BlockLevel`.

    Raises:
        PruningError: in one line that names the file (or `custom_config`), the entry and what was
            expected.
    """
    config, where = _read(source)
    entries = _by_name(level_section(config, where), list(shapes), where, "level", _parse_all)
    found = {}
    for name, shape in shapes.items():
        label, level = entries[name]
        found[name] = _amount(label, level, name, shape, where)
    return found


def resolve_choices(
    source: str | PathLike | Mapping, shapes: Mapping[str, Sequence[int]], where: str | None = None
) -> dict[str, dict[str, Amount]]:
    """The levels from which a search may choose, for each prunable weight.

    Args:
        source: path of a YAML file with `choices`, or what such a file parses to.
        shapes: as for `resolve_levels`.
        where: what messages call the configuration; by default the file.

    Returns:
        In the order of `shapes`: the text of each level, such as `2:4`, `0.5` or `dense`, to what
        is kept, as in `resolve_levels`.

    Raises:
        PruningError: as `resolve_levels`, and for an empty list of levels.
    """
    config, name = _read(source)
    where = where or name
    section = _checked(config, where)
    if "choices" not in section:
        raise PruningError(
            f"{where}: has a level for each weight: expected choices, a list of levels for each"
        )

    entries = _by_name(section["choices"], list(shapes), where, "choices", _parse_choices)
    found = {}
    for name, shape in shapes.items():
        _, levels = entries[name]
        found[name] = {
            level_text(level): _amount(label, level, name, shape, where) for label, level in levels
        }
    return found


def resolve_units(source: str | PathLike | Mapping, units: Mapping[str, int]) -> dict[str, int]:
    """How many heads or neurons a custom configuration leaves of blocks.

    Args:
        source: as for `resolve_levels`.
        units: by the name of every block that has any, how many it has.

    Returns:
        By the name of each block in its `units`, the number that is kept.

    Raises:
        PruningError: as `resolve_levels`.
    """
    config, where = _read(source)
    found = {}
    for pattern, count in unit_section(config, where).items():
        label = f"{where}: units {short(pattern)}"
        matched = [name for name in units if fnmatchcase(name, pattern)]
        if not matched:
            example = f" such as {next(iter(units))}" if units else ", and the model has none"
            raise PruningError(
                f"{label} matches no block of heads or neurons: expected one{example}"
            )

        for name in matched:
            if count > units[name]:
                raise PruningError(f"{label} is {count}: expected 1 to {units[name]} for {name}")
            found[name] = count
    return found


def unit_section(config, where: str = "custom_config") -> Mapping[str, int]:
    """The numbers of heads and neurons of a configuration, by patterns of block names.

    Raises:
        PruningError: they are malformed.
    """
    section = config.get("sparsity") if isinstance(config, Mapping) else None
    units = section.get("units", {}) if isinstance(section, Mapping) else {}
    if not isinstance(units, Mapping):
        raise PruningError(
            f"{where}: units is {short(units)}: expected a mapping from blocks to numbers"
        )
    for pattern, count in units.items():
        good = _is_number(count, numbers.Integral) and count >= 1
        if not isinstance(pattern, str) or not good:
            raise PruningError(
                f"{where}: units {short(pattern)} is {short(count)}: expected the name of a block "
                "and a number of at least 1"
            )
    return units


def has_units(units: Mapping[str, int], parameter: str) -> bool:
    """Whether a weight or bias belongs to a block in `unit_section`."""
    block = re.sub(r"\.(weight|bias)$", "", parameter).rpartition(".")[0]
    return any(fnmatchcase(block, pattern) for pattern in units)


def level_text(level: float | tuple[int, int] | BlockLevel) -> str:
    """A level as it is written: `2:4`, `0.5`, `block:4x1 0.5`, `dense`."""
    if isinstance(level, BlockLevel):
        return str(level)
    if isinstance(level, tuple):
        n, m = level
        return f"{n}:{m}" if n < m else "dense"
    return f"{level:g}" if level else "dense"


def entry_of(text: str) -> float | str:
    """The entry of a configuration that a level's text stands for."""
    try:
        return float(text)
    except ValueError:
        return text


# ---- helpers, not exported ----


class _Loader(yaml.SafeLoader):
    """The safe loader, except that a key that is written twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {short(key.value)} twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _path(source) -> str:
    if not isinstance(source, str | PathLike):
        raise PruningError(
            f"custom_config is {short(source)}: expected the path of a YAML file, or a mapping"
        )
    return str(fspath(source))


def read_yaml(path: str):
    """What a YAML file parses to.

    Raises:
        PruningError: the file cannot be read, is too large, or is not plain YAML.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PruningError(f"{path}: cannot be read: {reason}") from None

    if len(content) > MAX_BYTES:
        raise PruningError(f"{path}: expected at most {MAX_BYTES // 1024} KiB of YAML")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PruningError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None

    try:
        _refuse_exotic(text, path)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        problem = problem or "cannot be parsed"
        raise PruningError(f"{path}: {place}not valid YAML here: {problem}") from None
    except ValueError as error:  # a scalar that looks like a date or a number, but is not valid
        raise PruningError(f"{path}: not valid YAML here: {error}") from None


def _refuse_exotic(text: str, path: str) -> None:
    """Refuses tags, anchors and deep nesting, as no configuration needs them.

    Hostile files use them to run code or to fill the memory.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        place = f"{path}: line {event.start_mark.line + 1}"

        for kind in ("tag", "anchor"):
            if found := getattr(event, kind, None):
                raise PruningError(
                    f"{place}: {kind} {short(found)}: expected plain YAML without {kind}s"
                )

        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise PruningError(f"{place}: expected at most {MAX_DEPTH} nested levels")


def level_section(config, where: str):
    """The levels of a configuration: a list, or a mapping from patterns to levels.

    Raises:
        PruningError: the configuration is malformed, or a space with several levels for a weight.
    """
    section = _checked(config, where)
    if "level" in section:
        return section["level"]

    choices = section["choices"]
    if not isinstance(choices, list | tuple | Mapping):
        return choices

    entries = choices.items() if isinstance(choices, Mapping) else enumerate(choices)
    for place, entry in entries:
        if not isinstance(entry, list | tuple) or len(entry) != 1:
            raise PruningError(
                f"{where}: is a space for search.py --space, with {short(entry)} in choices "
                f"{short(place)}: expected one level for each weight"
            )

    if isinstance(choices, Mapping):
        return {place: entry[0] for place, entry in choices.items()}
    return [entry[0] for entry in choices]


def _read(source) -> tuple:
    """What a configuration parses to, and what messages call it."""
    if isinstance(source, Mapping):
        return source, "custom_config"
    path = _path(source)
    return read_yaml(path), path


def _checked(config, where: str) -> Mapping:
    """The section of a configuration, which has a mode and either `level` or `choices`."""
    if config is None:
        raise PruningError(f"{where}: is empty: expected a mapping with the key sparsity")
    whole = "it" if where == "custom_config" else "the file"
    section = _section(config, ("sparsity",), where, whole)["sparsity"]

    if isinstance(section, Mapping) and "choices" in section:
        # Later files of the format have the settings of a search under `greedy`
        section = {key: value for key, value in section.items() if key != "greedy"}
        section = _section(section, ("mode", "choices"), where, "sparsity")
    else:
        unit_section(config, where)
        if isinstance(section, Mapping):
            section = {key: value for key, value in section.items() if key != "units"}
        section = _section(section, ("mode", "level"), where, "sparsity")

    if section["mode"] not in MODES:
        raise PruningError(
            f"{where}: mode is {short(section['mode'])}: expected {' or '.join(MODES)}"
        )
    return section


def _section(found, keys: tuple[str, ...], where: str, what: str) -> Mapping:
    """Checks that a part of the configuration is a mapping with exactly these keys."""
    expected = f"expected a mapping with the key{'s' * (len(keys) > 1)} {' and '.join(keys)}"
    if not isinstance(found, Mapping):
        raise PruningError(f"{where}: {what} is {short(found)}: {expected}")
    for key in found:
        if key not in keys:
            raise PruningError(f"{where}: unknown key {short(key)} in {what}: {expected}")
    for key in keys:
        if key not in found:
            raise PruningError(f"{where}: {what} lacks {key}: {expected}")
    return found


def _by_name(level, names: list[str], where: str, key: str, parse: Callable) -> dict[str, tuple]:
    """Weight name to (label of its entry, parsed entry).

    key: `level` or `choices`. parse: `_parse_all` or `_parse_choices`.
    """
    if isinstance(level, list | tuple):
        return _from_list(level, names, where, key, parse)
    if isinstance(level, Mapping):
        return _from_patterns(level, names, where, key, parse)
    raise PruningError(
        f"{where}: {key} is {short(level)}: expected a list, or a mapping from patterns to levels"
    )


def _from_list(
    level: Sequence, names: list[str], where: str, key: str, parse: Callable
) -> dict[str, tuple]:
    if len(level) != len(names):
        raise PruningError(
            f"{where}: {key} has {len(level)} entries: expected {len(names)}, one for each of "
            f"{', '.join(names)}"
        )
    labels = [f"{key}[{index}]" for index in range(len(level))]
    return dict(zip(names, parse(zip(labels, level, strict=True), where), strict=True))


def _from_patterns(
    level: Mapping, names: list[str], where: str, key: str, parse: Callable
) -> dict[str, tuple]:
    """As `_by_name`. `default` is applied first, wherever it stands; later lines win."""
    for pattern in level:
        if not isinstance(pattern, str):
            raise PruningError(
                f"{where}: {key} has the key {short(pattern)}: expected a pattern of weight names"
            )

    ordered = sorted(level, key=lambda pattern: pattern != "default")
    parsed = parse([(f"{key} {short(pattern)}", level[pattern]) for pattern in ordered], where)

    entries = {}
    for pattern, entry in zip(ordered, parsed, strict=True):
        matched = [name for name in names if pattern == "default" or _matches(name, pattern)]
        if not matched:
            raise PruningError(
                f"{where}: {key} {short(pattern)} matches no prunable weight: expected a pattern "
                f"such as {names[0]}"
            )
        entries |= dict.fromkeys(matched, entry)

    for name in names:
        if name not in entries:
            raise PruningError(
                f"{where}: {key} says nothing of {name}: expected a default or a pattern that fits"
            )
    return entries


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _parse_all(entries, where: str) -> list[tuple]:
    """(label, sparsity or (n, m)) for each (label, entry); warns once of the oldest form."""
    parsed = []
    oldest = []
    for label, entry in entries:
        level = parse_level(entry, f"{where}: {label}")
        if isinstance(entry, list | tuple) and tuple(entry) != level:
            oldest.append((label, entry, level))
        parsed.append((label, level))

    if oldest:
        label, (m, p), _ = oldest[0]
        reading = f"[{m}, {p}] is read as group size and number pruned, so {m - p}:{m}"
        more = f" (as {len(oldest) - 1} more)" if len(oldest) > 1 else ""
        log.warning("%s: %s: %s%s", where, label, reading, more)
    return parsed


def _parse_choices(entries, where: str) -> list[tuple]:
    """(label, its levels as from `_parse_all`) for each (label, entry)."""
    entries = list(entries)
    for label, entry in entries:
        if not isinstance(entry, list | tuple) or not entry:
            raise PruningError(
                f"{where}: {label} is {short(entry)}: expected a list of at least one level"
            )

    # All at once, so that one warning covers all entries in the oldest form
    labelled = [
        (f"{label}[{place}]", level)
        for label, entry in entries
        for place, level in enumerate(entry)
    ]
    levels = iter(_parse_all(labelled, where))
    return [(label, [next(levels) for _ in entry]) for label, entry in entries]


def parse_level(entry, label: str) -> float | tuple[int, int] | BlockLevel:
    """The level that an entry means: a sparsity in [0, 1), (n, m), or one of blocks.

    Raises:
        PruningError: the entry is no level; `label` names it.
    """
    if _is_number(entry, numbers.Real) and 0 <= entry < 1:
        return float(entry)
    if isinstance(entry, str) and entry == "dense":
        return 0.0
    if level := _blocks(entry):
        return level

    n, m = _group(entry)
    if not 1 <= n <= m:
        raise PruningError(f"{label} is {short(entry)}: {EXPECTED_LEVEL}")
    return n, m


def _blocks(entry) -> BlockLevel | None:
    """The level of blocks that an entry means; None if it has not that form."""
    number = r"[0-9]{1,9}"
    form = rf"\s*(block:{number}x{number})\s+({number}?(?:\.[0-9]{{0,18}})?)\s*"
    written = re.fullmatch(form, entry) if isinstance(entry, str) else None
    try:
        if written and float(written[2]) < 1:
            parse_pattern(written[1])
            return BlockLevel(written[1], float(written[2]))
    except ValueError:  # no digit, or no block
        pass
    return None


def _group(entry) -> tuple[int, int]:
    """The (n, m) that an entry means; (0, 0) if it has none of the forms of n:m."""
    if isinstance(entry, str):
        written = re.fullmatch(r"\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*", entry)
        return (int(written[1]), int(written[2])) if written else (0, 0)

    # YAML 1.1 reads an unquoted 2:4 as the base-60 integer 124
    if _is_number(entry, numbers.Integral):
        return divmod(int(entry), 60)

    is_pair = isinstance(entry, list | tuple) and len(entry) == 2
    if not is_pair or not all(_is_number(number, numbers.Integral) for number in entry):
        return 0, 0

    # The oldest form has the group size first, then how many weights of a group are pruned
    first, second = map(int, entry)
    if first > second >= 0:
        return first - second, first
    return first, second


def _is_number(entry, kind: type) -> bool:
    return isinstance(entry, kind) and not isinstance(entry, bool)


def _amount(label: str, level, name: str, shape: Sequence[int], where: str) -> Amount:
    """A level as what a weight keeps, checked against its shape."""
    if isinstance(level, BlockLevel):
        if misfit := level.pattern.misfit(name, shape):
            raise PruningError(f"{where}: {label} is {level}: expected {misfit}")
        return level
    if isinstance(level, float):
        total = shape[0] * shape[1]
        return total - round(level * total)
    n, m = level
    if shape[1] % m:
        found = f"{where}: {label} is {short(n)}:{short(m)}"
        raise PruningError(
            f"{found}: expected a group size that divides the {shape[1]} inputs of {name}"
        )
    return n, m
