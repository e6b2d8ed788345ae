"""Turns exceptions into a one-line message and an exit status."""

import sys

import torch.distributed as dist

import utils
from sparsity_factory import PruningError
from utils import DivergedError, UserError, WriteError

from .stop_signals import Stopped


def exit_status(work) -> int:
    """The status that `work()` returns, or that of its error, which is reported in one line.

    A mistake of the user is status 2, another known failure 1, and a signal 128 and its number.
    Raises any other error.
    """
    utils.quiet_libraries()
    try:
        status = work()
    except Exception as error:
        return _report(error)

    # After a failure of this process alone, NCCL would wait here for the others.
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


# ---- helpers, not exported ----


def _report(error: Exception) -> int:
    """Returns the exit status, and prints one line on the first process that fails.

    Raises the error itself if it is none of those that a user may expect.
    """
    if isinstance(error, UserError | PruningError):
        status, message = 2, f"error: {error}"
        # The traceback of a data worker's error is a reference cycle that keeps the workers alive.
        error.__traceback__ = None
    elif isinstance(error, Stopped):
        status, message = error.status, str(error)
    elif isinstance(error, DivergedError | WriteError | OSError):
        # An OSError is a closed pipe, or a full disk.
        status, message = 1, f"error: {error}"
    elif reason := _reason_of(error):
        status, message = 1, f"error: {reason}"
    elif isinstance(error, RuntimeError) and dist.is_initialized() and not utils.is_first_to_fail():
        return 1  # another process failed first, and has reported why
    else:
        raise error

    # A half-made data loader raises an error when it is deleted, which tells nothing new.
    sys.unraisablehook = lambda _: None
    if utils.is_first_to_fail():
        if "Traceback" in message:  # a data worker's, whose last line is the error
            message = "error: " + message.strip().splitlines()[-1].partition(": ")[2]
        print(" ".join(message.split()), file=sys.stderr)
    return status


def _reason_of(error: BaseException | None) -> str:
    """Why a data worker or a process is gone, if the error or its context says so; else nothing."""
    while error:
        if str(error).startswith("DataLoader worker"):
            return str(error)
        if failure := utils.exchange_failure(error):
            return failure

        error = error.__context__
    return ""
