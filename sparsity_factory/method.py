"""What a method says of itself, for lists of methods: a line, its source, its needs."""

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Description(NamedTuple):
    """One line of a list of methods."""

    line: str  # what it does, a sentence
    source: str  # a publication, or empty
    needs: frozenset[str]  # names in `STATISTICS`


def method(source: str = "", needs: Iterable[str] = ()) -> Callable:
    """Decorates a method with its source and the names of the statistics that it needs."""

    def decorate(decorated):
        decorated.source = source
        decorated.needs = frozenset(needs)
        return decorated

    return decorate


def describe(entry) -> Description:
    """A function or class of a registry: the first line of its docstring, its source and needs."""
    line = (entry.__doc__ or "").strip().partition("\n")[0]
    return Description(line, getattr(entry, "source", ""), getattr(entry, "needs", frozenset()))
