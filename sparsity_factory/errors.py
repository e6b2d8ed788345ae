"""The one exception that a user's mistake raises, warnings, and values as messages show them."""

import logging
import reprlib
from functools import cache

log = logging.getLogger(__name__)


class PruningError(ValueError):
    """A request, configuration or checkpoint that cannot be used; the message is one line."""

    def __init__(self, message: str):
        # File names and YAML keys may hold line breaks, which would make several lines
        super().__init__(" ".join(message.split()))


@cache
def warn_once(message: str) -> None:
    """Logs a warning, the first time that it is given: masks are chosen many times in a run."""
    log.warning("%s", message)


def as_flag(name: str) -> str:
    """The flag of the command line that sets a field of a recipe: `--custom-config`."""
    return f"--{name.replace('_', '-')}"


def in_words(value) -> str:
    """A value as it is typed on the command line, but never long."""
    return f"{value}" if isinstance(value, float) else short(value).strip("'")


def short(value) -> str:
    """A value as a message shows it: as Python writes it, cut to about a hundred characters."""
    try:
        return _REPR.repr(value)
    except ValueError:  # integers of thousands of digits have no repr
        return "a huge number"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
