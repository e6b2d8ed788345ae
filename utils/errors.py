"""Errors that end a run in one line."""


class UserError(Exception):
    """A mistake of the user, told in one line; `main.py` prints it as `error: ...` and exits with
    status 2.
    """


class BadImageError(UserError):
    """A file that cannot be read as an image."""


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number."""


class WriteError(Exception):
    """A file that cannot be written, such as on a full disk; its old content is whole."""


def first_line(error) -> str:
    """The first line of an exception's message, and the next where it only announces that."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
