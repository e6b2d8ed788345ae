"""SIGTERM and SIGINT as a request to stop after the current step."""

import os
import signal
import threading
import time

import torch
import torch.distributed as dist

import utils


class Stopped(Exception):
    """The run was asked to stop, and does. `status` is the exit status of a process that the signal ends."""

    def __init__(self, signum: int):
        self.name, self.status = signal.Signals(signum).name, 128 + signum
        super().__init__(f"stopped by {self.name} before the first step; start the same command again")

    def add_place(self, epoch: int, steps: int, output_dir: str) -> None:
        """Says how to go on with the training."""
        way = (f"; go on with the same command and --resume {output_dir}/checkpoint.pth, or --resume auto" if output_dir
               else "; nothing was written, as there is no --output_dir")
        self.args = (f"stopped by {self.name} in epoch {epoch} after step {steps}{way}",)


class StopSignals:
    """While it is entered, the first SIGTERM or SIGINT is only noted, and the next one ends the process at once.

    Those that come within a second of the first are taken for the same: a cluster sends one to every process, and
    torchrun passes its own on to the processes it started. A signal that somebody else handles already (submitit does)
    is left to them.
    """

    def __init__(self):
        self.received = 0
        self._pending = None
        self._group = None
        if utils.world_size() > 1:
            # The flags travel between hosts, so that no process waits for its device to learn of a signal.
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def __enter__(self):
        ours = (signal.SIG_DFL, signal.default_int_handler)
        self._previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        self._previous = {signum: handler for signum, handler in self._previous.items() if handler in ours}
        for signum in self._previous:
            signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum, frame):
        if not self.received:
            self.received, self._first = signum, time.monotonic()
        elif time.monotonic() - self._first > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def check(self) -> None:
        """Raises Stopped once a signal has come. Each process calls it after each step, and all stop at the same one.

        With several processes that is a step later: they exchange what they know beside it, and nobody waits.
        """
        received = self.received
        if self._group:
            received = 0
            if self._pending:
                work, flag = self._pending
                work.wait()
                received = int(flag)
            flag = torch.tensor(self.received)
            self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
        if received:
            raise Stopped(received)

    def check_alone(self) -> None:
        """Raises Stopped where no other process has to agree."""
        if self.received and not self._group:
            raise Stopped(self.received)

    def checks(self, rounds: int):
        """A function to call after each of at least `rounds` batches, which every process has: it calls `check`."""
        left = iter(range(rounds))
        return lambda: self.check() if next(left, None) is not None else self.check_alone()


def ignore_signals(worker_id: int) -> None:
    """For data workers: a signal that is sent to all processes alike is the training process's to answer.

    Only the SIGTERM of the training process itself ends a worker: without it, workers that an error cut off from their
    queues would never end, and Python waits for them when it exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        return

    def obey_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=obey_parent, daemon=True).start()
