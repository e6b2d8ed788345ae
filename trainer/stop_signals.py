"""SIGTERM and SIGINT as a request to stop after the current step."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

import utils

# Of Linux's prctl: the signal that a process gets when its parent ends
PR_SET_PDEATHSIG = 1


class Stopped(Exception):
    """The run was asked to stop, and does. `status` is the exit status of a process that the signal
    ends.
    """

    def __init__(self, signum: int):
        self.name = signal.Signals(signum).name
        self.status = 128 + signum
        super().__init__(
            f"stopped by {self.name} before the first step; start the same command again"
        )

    def add_place(self, epoch: int, steps: int, output_dir: str) -> None:
        """Says how to go on with the training."""
        way = (
            f"; go on with the same command and --resume {output_dir}/checkpoint.pth, or --resume "
            "auto"
            if output_dir
            else "; nothing was written, as there is no --output_dir"
        )
        self.args = (f"stopped by {self.name} in epoch {epoch} after step {steps}{way}",)


class StopSignals:
    """While it is entered, the first SIGTERM or SIGINT is only noted, and the next one ends the
    process at once.

    Signals within a second of the first are taken for the same one: a cluster sends it to every
    process, and torchrun passes its own on to the processes it started. A signal that has a handler
    already (submitit's) keeps it.
    """

    def __init__(self):
        self.received = 0
        self._pending = None
        self._together = utils.world_size() > 1

    def __enter__(self):
        ours = (signal.SIG_DFL, signal.default_int_handler)
        self._previous = {
            signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)
        }
        self._previous = {
            signum: handler for signum, handler in self._previous.items() if handler in ours
        }
        for signum in self._previous:
            signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum, frame):
        if not self.received:
            self.received = signum
            self._first = time.monotonic()
        elif time.monotonic() - self._first > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def check(self) -> None:
        """Raises Stopped once a signal has come. Each process calls it after each step, and all
        stop at the same one.

        With several processes that is a step later: the flags travel while the next step is
        computed, so nobody waits for them. They are tensors on the CPU and travel over gloo, which
        pairs the exchanges of the processes by their order; so every process has to call this
        between the same two exchanges.
        """
        received = self.received
        if self._together:
            received = 0
            if self._pending:
                work, flag = self._pending
                work.wait()
                received = int(flag)
            flag = torch.tensor(self.received)
            self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag
        if received:
            raise Stopped(received)

    def check_alone(self) -> None:
        """Raises Stopped where no other process has to agree."""
        if self.received and not self._together:
            raise Stopped(self.received)

    def checks(self, rounds: int):
        """A function to call after each of at least `rounds` batches, which every process has: it
        calls `check`.
        """
        left = iter(range(rounds))
        return lambda: self.check() if next(left, None) is not None else self.check_alone()


def ignore_signals(worker_id: int) -> None:
    """For data workers: ignores SIGINT and SIGTERM, which a terminal or a cluster sends to every
    process of the run.

    Only a SIGTERM from the training process ends a worker. A worker that has lost its queues to an
    error needs it: Python waits for its workers when it exits. On Linux a worker also ends,
    whatever it does, when that process does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        return
    training_process = multiprocessing.parent_process().pid

    def obey_training_process():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training_process:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=obey_training_process, daemon=True).start()
