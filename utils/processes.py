"""The processes of a run: their cores, and how they meet, talk and end."""

import contextlib
import datetime
import math
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .errors import UserError, first_line

#: Seconds that processes wait for each other. The first one may choose masks or write a checkpoint
#: meanwhile.
TIMEOUT = 1800
#: What a container may use of the cores, on Linux with cgroup version 2: microseconds of computing
#: in each period.
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


def launcher(processes: int) -> str:
    """The command that starts so many processes as these were started."""
    if processes == 1:
        return "python"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"


def local_rank() -> int:
    """The number of this process on its machine, as torchrun or SLURM says."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def processes_here() -> int:
    """How many processes of the run are on this machine, as torchrun or SLURM says; 1 where neither
    does.
    """
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"])
    if "SLURM_PROCID" not in env or not {"MASTER_ADDR", "RANK"} & env.keys():
        return 1  # no run of several processes, though perhaps in an allocation for some
    counts = []
    for group in env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1")).split(
        ","
    ):
        # 8(x2),4 are eight, eight and four
        count, _, machines = group.rstrip(")").partition("(x")
        counts += [int(count)] * int(machines or 1)
    return counts[int(env.get("SLURM_NODEID", 0)) % len(counts)]


def available_cores() -> int:
    """How many CPU cores this process may use: those it is bound to, or fewer where a container has
    a quota.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    # No quota: the file is missing, or says `max`
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(cores, 1)


def init_process_group(
    device_type: str,
    dist_url: str = "env://",
    distributed: bool = False,
    wanted: int = 1,
    timeout: float = TIMEOUT,
) -> None:
    """Joins the processes that torchrun or SLURM started.

    Reads RANK, WORLD_SIZE and LOCAL_RANK (torchrun), else SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID where MASTER_ADDR says that the job was meant to be distributed. Without them the
    run has a single process.

    Tensors on the CPU travel over gloo, on GPUs too, so that objects and numbers never wait in a
    GPU's queue. timeout: seconds that a process waits for another before it fails.
    Raises UserError when `distributed` or a number of processes `wanted` asks for others than there
    are.
    """
    env, processes = os.environ, 1
    if "RANK" in env and "WORLD_SIZE" in env:
        process, processes = int(env["RANK"]), int(env["WORLD_SIZE"])
    elif "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        process = int(env["SLURM_PROCID"])
        processes = int(env.get("SLURM_NTASKS", 1))
    if processes == 1 and distributed or wanted not in (1, processes):
        raise UserError(
            f"{'--distributed' if distributed else f'--world_size {wanted}'}: there "
            f"{'is one process' if processes == 1 else f'are {processes} processes'}; start as "
            "many as you want with torchrun"
        )
    if processes == 1:
        return
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, process, processes = next(rendezvous(dist_url, process, processes, timeout=limit))
        # Processes that torchrun starts again meet at the old store, where some torch releases
        # leave stale addresses.
        store = dist.PrefixStore(f"start_{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=store,
            rank=process,
            world_size=processes,
            timeout=limit,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--dist_url {dist_url}: the processes do not meet ({first_line(error)})"
        ) from None


def on_first_process(compute):
    """What `compute()` returns on process 0, on every process; an error it raises there is raised
    on all.

    The others raise an error of the same class with the same text, or a RuntimeError with that text
    where they do not know the class. A result that cannot be pickled is an error as well.
    """
    if world_size() == 1:
        return compute()
    result = error = None
    message = [None]
    if is_main_process():
        try:
            result = compute()
            # Here, so that the others learn of a failure
            message = [(pickle.dumps(result), None)]
        except Exception as raised:
            error = raised
            message = [(None, _description(raised))]
    dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    if is_main_process():
        if error is not None:
            raise error
        return result
    pickled, description = message[0]
    if description is not None:
        raise _described(*description)
    return pickle.loads(pickled)


def gather_objects(value) -> list:
    """The value of each process, in their order, on every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(values: list[float]) -> list[float]:
    """Element-wise float64 sum of a short list of numbers over all processes."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def is_first_to_fail() -> bool:
    """Whether this process is the first to ask, and so the one that says what went wrong.

    Before the processes have met, all make the same mistakes, and the first on each machine reports
    them.
    """
    if not dist.is_initialized():
        return local_rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone
        return False


def exchange_failure(error: BaseException) -> str:
    """One line for an error of gloo or NCCL, which follows when another process ends or is late;
    else nothing.
    """
    text = str(error)
    # [.../gloo/...:561] Conn...
    if not isinstance(error, dist.DistError) and "/gloo/" not in text.partition("]")[0]:
        return ""
    if "timed out" in text.lower() or "timeout" in text.lower():
        return f"process {rank()} waited for another one longer than --dist-timeout allows"
    return (
        f"process {rank()} lost the connection to another one, which was killed or cannot be "
        "reached"
    )


def end_process(work) -> NoReturn:
    """Ends this process with the status that `work()` returns, or with 1 and a traceback for an
    error.

    `work` leaves the process group where every process succeeds. While there still is one, this
    process has failed, perhaps alone, and ends at once: in an orderly exit NCCL may wait for the
    others forever.
    """
    try:
        status = work()
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


# ---- helpers, not exported ----


def _description(error: Exception) -> tuple[str, str, str, dict]:
    """Module and name of an error's class, its text, and those of its attributes that are plain
    values.
    """
    plain = {
        name: value
        for name, value in vars(error).items()
        if isinstance(value, str | int | float | None)
    }
    return type(error).__module__, type(error).__qualname__, str(error), plain


def _described(module: str, name: str, text: str, attributes: dict) -> Exception:
    """An error of the class of that name, made without its constructor, whose arguments are not
    known here.
    """
    kind = getattr(sys.modules.get(module), name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(Exception):
            error = kind.__new__(kind, text)
            vars(error).update(attributes)
            if str(error) == text:
                return error
    return RuntimeError(text)
