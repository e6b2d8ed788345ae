"""Turns exceptions into a one-line message and an exit status."""

import sys

import torch.distributed as dist

import utils
from sparsity_factory import PruningError
from utils import DivergedError, UserError, WriteError

from .stop_signals import Stopped


def exit_status(work) -> int:
    """The status that `work()` returns, or else 2 with one line on standard error for a mistake of
    the user.
    """
    utils.quiet_libraries()
    try:
        status = work()
    except Exception as error:
        return _report(error)
    # After a failure of this process alone, NCCL would wait here for the others
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


# ---- helpers, not exported ----


def _report(error: Exception) -> int:
    """Tells the error in one line, on the first process that fails, and returns the exit status;
    else raises it.
    """
    if isinstance(error, UserError | PruningError):
        status, message = 2, f"error: {error}"
        # From a data worker, it makes a reference cycle that keeps the workers alive
        error.__traceback__ = None
    elif isinstance(error, Stopped):
        status, message = error.status, str(error)
    elif isinstance(error, DivergedError | WriteError | OSError):
        # OSError: a closed pipe, a disk full of output
        status, message = 1, f"error: {error}"
    elif reason := _reason_of(error):
        status, message = 1, f"error: {reason}"
    elif isinstance(error, RuntimeError) and dist.is_initialized() and not utils.is_first_to_fail():
        return 1  # another process failed first, and has told why
    else:
        raise error
    # What a half-made data loader raises when it is deleted is no news
    sys.unraisablehook = lambda _: None
    if utils.is_first_to_fail():
        if "Traceback" in message:  # from a data worker, the error is the last line
            message = "error: " + message.strip().splitlines()[-1].partition(": ")[2]
        print(" ".join(message.split()), file=sys.stderr)
    return status


def _reason_of(error: BaseException | None) -> str:
    """The data worker or process that is gone, by the message of the error or of one that led to
    it; else nothing.
    """
    while error:
        if str(error).startswith("DataLoader worker"):
            return str(error)
        if failure := utils.exchange_failure(error):
            return failure
        error = error.__context__
    return ""
