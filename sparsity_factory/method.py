"""What a method says of itself: a line, its source, its needs, and its options.

An option is a number of a method that a user may set, such as `owl.outlier=7`. It is a keyword of
the function, or of a class's `__init__`. The keyword has the default, its type says which numbers
are expected, and the decorator says what the number is:

    @method("Yin et al. 2024", needs={"input_norms"}, outlier="times the mean, from which on ...")
    def owl(scores: Scores, sparsity: float, *, outlier: Positive = 5.0) -> dict[str, int]:
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple, get_args

from .errors import PruningError, as_flag, in_words, short


class Numbers(NamedTuple):
    """The numbers that an option may be.

    words: what they are, for a message.
    whole: integers only.
    """

    words: str
    least: float
    most: float = 2.0**53  # floats count no further, and nothing here is that large
    whole: bool = False

    def have(self, value) -> bool:
        kinds = (int,) if self.whole else (int, float)
        return type(value) in kinds and self.least <= value <= self.most


Count = Annotated[int, Numbers("an integer of at least 1", 1, whole=True)]
Positive = Annotated[float, Numbers("a number above 0", math.ulp(0.0))]
NotNegative = Annotated[float, Numbers("a number of at least 0", 0)]
Fraction = Annotated[float, Numbers("a number in [0, 1]", 0, 1)]


class Option(NamedTuple):
    """A number of a method that a user may set.

    parameter: the keyword of the function.
    line: what it is.
    default: None if it is another one for each layer; the line then says which.
    """

    parameter: str
    line: str
    default: float | None
    numbers: Numbers


class Description(NamedTuple):
    """One line of a list of methods."""

    line: str  # what it does, a sentence
    source: str  # a publication, or empty
    needs: frozenset[str]  # names in `STATISTICS`


def method(source: str = "", needs: Iterable[str] = (), **options: str) -> Callable:
    """Decorates a method with its source, the statistics that it needs, and what its options are.

    options: a line for each, by the keyword of the method.
    """

    def decorate(decorated):
        decorated.source = source
        decorated.needs = frozenset(needs)
        decorated.options = options
        return decorated

    return decorate


def describe(entry) -> Description:
    """A function or class of a registry: the first line of its docstring, its source and needs."""
    entry = unbound(entry)
    line = (entry.__doc__ or "").strip().partition("\n")[0]
    return Description(line, getattr(entry, "source", ""), getattr(entry, "needs", frozenset()))


def unbound(entry) -> Any:
    """The function of a `functools.partial`; anything else as it is."""
    while isinstance(entry, partial):
        entry = entry.func
    return entry


def name_of(entry) -> str:
    """The name of a method, which may be a function in its place."""
    entry = unbound(entry)
    return entry if isinstance(entry, str) else getattr(entry, "__name__", type(entry).__name__)


def options_of(registry: Mapping[str, Any], name) -> dict[str, Option]:
    """The options of a method of a registry, as users write them: `least-squares.last-steps`.

    name: of the method; another value, such as a function in its place, has no options.
    """
    entry: Any = registry.get(name) if isinstance(name, str) else None
    lines = getattr(entry, "options", {})
    if not lines:
        return {}

    keywords = inspect.signature(entry, eval_str=True).parameters
    return {
        # A keyword of Python has an underscore behind it
        f"{name}.{keyword.strip('_').replace('_', '-')}": Option(
            keyword, line, keywords[keyword].default, _numbers(keywords[keyword].annotation)
        )
        for keyword, line in lines.items()
    }


def check_method_options(given, known: Mapping[str, Option], flags: bool = False) -> None:
    """Refuses options that the chosen methods do not have, and numbers out of their range.

    Args:
        given: option to number, or None.
        known: the options of the chosen methods.
        flags: messages name the flag, `--method-options` for `method_options`.

    Raises:
        PruningError: in one line.
    """
    choice = as_flag("method_options") if flags else "method_options"
    if given is not None and not isinstance(given, Mapping):
        raise PruningError(f"{choice} {short(given)}: expected a mapping of options to numbers")

    for name, value in (given or {}).items():
        if not isinstance(name, str) or name not in known:
            wanted = "none, as the chosen methods have no options"
            if known:
                wanted = f"an option of the chosen methods, one of {', '.join(known)}"
            raise PruningError(f"{choice} {in_words(name)}: expected {wanted}")
        if not known[name].numbers.have(value):
            raise PruningError(
                f"{choice} {name}={in_words(value)}: expected {known[name].numbers.words}"
            )


def chosen(registry: Mapping[str, Any], name, given: Mapping[str, float] | None = None) -> Any:
    """The method of a name with the options that are given for it.

    name: a function in its place is returned as it is.
    """
    if not isinstance(name, str):
        return name
    entry = registry[name]
    options = options_of(registry, name)
    values = {
        options[option].parameter: value
        for option, value in (given or {}).items()
        if option in options
    }
    return partial(entry, **values) if values else entry


# ---- helpers, not exported ----


def _numbers(hint) -> Numbers:
    """The numbers of a type such as `Count` or `Count | None`."""
    annotated = hint if hasattr(hint, "__metadata__") else get_args(hint)[0]
    return annotated.__metadata__[0]
