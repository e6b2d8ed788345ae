"""Errors that end a run in one line."""


class UserError(Exception):
    """A mistake of the user; `main.py` prints it in one line, `error: ...`, and exits with 2."""


class BadImageError(UserError):
    """A file that cannot be read as an image."""


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number."""


class WriteError(Exception):
    """A file cannot be written, for example on a full disk; its old content is whole."""


def first_line(error) -> str:
    """The first line of an exception's message, and the second if the first ends in a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    count = 2 if lines[0].endswith(":") else 1
    return " ".join(line.strip() for line in lines[:count])
