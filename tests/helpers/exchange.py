"""Run by test_processes.py in each of two processes: what they tell each other, over gloo as in a
run on GPUs.

exchange.py FOLDER talk     what each received goes to FOLDER
exchange.py FOLDER killed   the first process is killed while the other waits for it
exchange.py FOLDER late     the first process takes longer than the time-out
exchange.py FOLDER alone    the second process fails in the middle of a step, while its data worker
loads an image;
                            to leave the group or the interpreter in order would take minutes, as it
                            may with NCCL
"""

import atexit
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import utils
from sparsity_factory import PruningError
from trainer.stop_signals import Stopped, StopSignals, ignore_signals
from utils import UserError, WriteError

FOLDER = Path(sys.argv[1])


class NeedsTwo(Exception):
    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")


def talk():
    # The backend `fake`, in the place of NCCL
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    init = dist.init_process_group
    dist.init_process_group = lambda backend, **options: init("cpu:gloo,cuda:fake", **options)
    utils.init_process_group(torch.device("cpu"))
    received = {
        "rank": utils.rank(),
        "sum": utils.sum_over_processes([utils.rank() + 1.0, 0.5]),
        "objects": utils.gather_objects({"rank": utils.rank()}),
        "result": utils.on_first_process(lambda: [utils.rank(), None, "text"]),
    }

    class Unknown(Exception):
        pass

    errors = [
        UserError("a: mistake"),
        PruningError("b: mistake"),
        WriteError("full"),
        NeedsTwo("c", "reason"),
        Stopped(signal.SIGTERM),
        FileNotFoundError(2, "No such file", "d"),
        Unknown("e"),
        KeyError("f"),
    ]
    received["errors"] = [attempt(raiser(error)) for error in errors]
    received["unpicklable"] = attempt(lambda: lambda: 0)
    received["then"] = utils.on_first_process(lambda: "still together")
    (FOLDER / f"{utils.rank()}.json").write_text(json.dumps(received))
    stop = StopSignals()
    with stop:
        for step in range(5):
            if (utils.rank(), step) == (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                stop.check()
            except Stopped:
                (FOLDER / f"stopped{utils.rank()}").write_text(str(step))
                break
            assert utils.sum_over_processes([1.0]) == [2.0]  # while the flags are under way
    dist.destroy_process_group()


def raiser(error):
    def compute():
        raise error

    return compute


def attempt(compute):
    try:
        return utils.on_first_process(compute)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "status", None)


def wait_for_first(compute, timeout):
    """Both processes meet, and the second waits for what the first computes."""
    (FOLDER / f"ready{os.environ['RANK']}").touch()
    while len(list(FOLDER.glob("ready*"))) < 2:
        time.sleep(0.05)
    utils.init_process_group(torch.device("cpu"), f"file://{FOLDER}/meet", timeout=timeout)
    utils.sum_over_processes([1.0])  # now all connections stand
    with StopSignals():
        utils.on_first_process(compute)


def killed():
    wait_for_first(lambda: os.kill(os.getpid(), signal.SIGKILL), timeout=600)


def late():
    wait_for_first(lambda: time.sleep(6), timeout=4)


class Slow:
    """Numbers of which the fifth takes minutes to load."""

    def __len__(self):
        return 99

    def __getitem__(self, index):
        if index == 4:
            time.sleep(600)
        return torch.ones(1)


def alone():
    atexit.register(time.sleep, 600)
    dist.destroy_process_group = lambda: time.sleep(600)
    utils.init_process_group(torch.device("cpu"))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    batches = iter(DataLoader(Slow(), num_workers=1, worker_init_fn=ignore_signals))
    with StopSignals() as stop:
        for step, batch in enumerate(batches):
            loss = model(batch).sum()
            if (utils.rank(), step) == (1, 3):
                raise UserError("one image cannot be read")
            loss.backward()
            stop.check()


if __name__ == "__main__":
    if sys.argv[2] == "talk":
        talk()
    else:
        from trainer.exit_status import exit_status

        def work():
            globals()[sys.argv[2]]()
            return 0

        utils.end_process(lambda: exit_status(work))
