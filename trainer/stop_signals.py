"""Signals as a request to stop after the current step, with a checkpoint."""

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

#: Option of Linux's prctl: the signal that a process receives when its parent ends.
PR_SET_PDEATHSIG = 1


#: What `sbatch --signal` names. By themselves they would end a process.
USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """The run stops, as a signal asked it to.

    status: the exit status of a process that the signal ends.
    """

    def __init__(self, signum: int):
        self.name = signal.Signals(signum).name
        self.status = 128 + signum
        super().__init__(
            f"stopped by {self.name} before the first step; start the same command again"
        )

    def add_place(self, epoch: int, steps: int, output_dir: str, overwrites: bool) -> None:
        """Adds to the message where the training stopped, and how to resume it.

        overwrites: whether the run was told to replace another one, as the resumed one must not be.
        """
        way = "nothing was written, as there is no --output_dir"
        if output_dir:
            command = "the same command" + (", less --overwrite," if overwrites else "")
            way = (
                f"resume with {command} and --resume {output_dir}/checkpoint.pth, or --resume auto"
            )
        self.args = (f"stopped by {self.name} in epoch {epoch} after step {steps}; {way}",)


class StopSignals:
    """A context that only notes the first signal to stop; the next one ends the process at once.

    These are SIGTERM, SIGINT, and SIGUSR1 and SIGUSR2, which SLURM sends before it stops a job if
    it is asked to. Signals within a second of the first count as the same one: a cluster sends it
    to every process, and torchrun passes its own on to the processes it started. SIGTERM and SIGINT
    keep another handler that they have already; all have their handlers again afterwards.
    """

    def __init__(self):
        self.received = 0
        self._pending = None
        self._together = utils.world_size() > 1

    def __enter__(self):
        self._previous = {}
        for signum in (signal.SIGTERM, signal.SIGINT, *USER_SIGNALS):
            handler = signal.getsignal(signum)
            if signum in USER_SIGNALS or handler in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[signum] = handler
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
        """Raises Stopped after a signal. Every process calls it after each step; all stop together.

        With several processes they stop a step later: the flags travel while the next step is
        computed, so that no process waits for them. The flags are tensors on the CPU and travel
        over gloo, which pairs the exchanges of the processes by their order. So every process has
        to call this between the same two exchanges.
        """
        received = self._exchange() if self._together else self.received
        if received:
            raise Stopped(received)

    def _exchange(self) -> int:
        """Sends this process's flag; returns the largest of all flags that were sent last time."""
        received = 0
        if self._pending:
            work, flag = self._pending
            work.wait()
            received = int(flag)

        flag = torch.tensor(self.received)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        self._pending = work, flag
        return received

    def check_alone(self) -> None:
        """Raises Stopped after a signal, if this is the only process."""
        if self.received and not self._together:
            raise Stopped(self.received)

    def checks(self, rounds: int):
        """Returns a function to call after each batch, of which every process has `rounds` or more.

        Processes check together for that many batches, and then each alone.
        """
        left = iter(range(rounds))

        def check_batch():
            if next(left, None) is None:
                self.check_alone()
            else:
                self.check()

        return check_batch


def ignore_signals(worker_id: int) -> None:
    """Makes a data worker ignore the signals that a terminal or a cluster sends to every process.

    Only a SIGTERM of the training process ends a worker. A worker that an error has cut off from
    its queues needs it, because Python waits for its workers when it exits. On Linux, a worker also
    ends with the training process, whatever it is doing.
    """
    for signum in (signal.SIGINT, *USER_SIGNALS):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        return
    training_process = multiprocessing.parent_process().pid

    def obey_training_process():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training_process:
            pass
        os._exit(0)

    # SIGTERM is blocked, and left to the thread that waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=obey_training_process, daemon=True).start()
