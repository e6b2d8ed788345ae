"""The processes of a run: their cores, and how they meet, talk and end."""

import contextlib
import datetime
import io
import math
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from .errors import UserError, first_line

#: Seconds that processes wait for each other: the first one may be choosing masks, or writing a
#: checkpoint.
TIMEOUT = 1800

#: The share of the cores that a container may use, on Linux with cgroup version 2: microseconds of
#: computing in each period, and the length of a period.
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
    """The number of the run's processes on this machine, by torchrun or SLURM; otherwise 1."""
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"])
    if "SLURM_PROCID" not in env or not {"MASTER_ADDR", "RANK"} & env.keys():
        return 1  # a single process, though perhaps in an allocation for several

    # SLURM writes 8(x2),4 for eight, eight and four.
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
    counts = []
    for group in tasks.split(","):
        count, _, machines = group.rstrip(")").partition("(x")
        counts += [int(count)] * int(machines or 1)
    return counts[int(env.get("SLURM_NODEID", 0)) % len(counts)]


def available_cores() -> int:
    """How many CPU cores this process may use: those it is bound to, within a container's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1

    # Without a quota the file is missing, or says `max`.
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(cores, 1)


def init_process_group(
    device: torch.device,
    dist_url: str = "env://",
    distributed: bool = False,
    wanted: int = 1,
    timeout: float = TIMEOUT,
) -> None:
    """Joins the processes that torchrun or SLURM started.

    Reads RANK, WORLD_SIZE and LOCAL_RANK (torchrun), or else SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID if MASTER_ADDR says that the job was meant to be distributed. Without them the run
    has a single process.

    Tensors on the CPU travel over gloo, also in a run on GPUs, so that objects and numbers never
    wait in a GPU's queue.

    device: of this process. A GPU has an index; NCCL connects its processes here, and not at their
        first exchange.
    distributed: several processes are expected.
    wanted: the number of processes that is expected; 1 is any number.
    timeout: seconds that a process waits for another before it fails.
    Raises UserError if the processes are not as expected, or cannot reach each other.
    """
    env = os.environ
    processes = 1
    if "RANK" in env and "WORLD_SIZE" in env:
        process, processes = int(env["RANK"]), int(env["WORLD_SIZE"])
    elif "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        process = int(env["SLURM_PROCID"])
        processes = int(env.get("SLURM_NTASKS", 1))

    if processes == 1 and distributed or wanted not in (1, processes):
        flag = "--distributed" if distributed else f"--world_size {wanted}"
        there = "there is one process" if processes == 1 else f"there are {processes} processes"
        raise UserError(f"{flag}: {there}; start as many as you want with torchrun")
    if processes == 1:
        return

    limit = datetime.timedelta(seconds=timeout)
    try:
        store, process, processes = next(rendezvous(dist_url, process, processes, timeout=limit))
        # Processes that torchrun restarts meet at the old store, in which some releases of torch
        # leave stale addresses.
        store = dist.PrefixStore(f"start_{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=process,
            world_size=processes,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--dist_url {dist_url}: the processes cannot reach each other ({first_line(error)})"
        ) from None


def on_first_process(compute):
    """Calls `compute()` on process 0, and returns its result on every process.

    Tensors in the result travel by the backend of their device, and all else as an object. An
    error is raised on every process: on the others as one of the same class with the same text,
    or as a RuntimeError with that text if they do not know the class. A result that cannot be
    pickled is an error as well.
    """
    if world_size() == 1:
        return compute()

    result = None
    error = None
    message: list[Any] = [None]
    tensors: list[Tensor] = []
    if is_main_process():
        try:
            result = compute()
            # Pickled before the broadcast, so that the others learn of a failure.
            message = [(_pickled(result, tensors), None)]
        except Exception as raised:
            error = raised
            message = [(None, _description(raised))]
    dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))

    if is_main_process():
        if error is not None:
            raise error
        _broadcast(tensors)
        return result

    pickled, description = message[0]
    if description is not None:
        raise _described(*description)
    result = _unpickled(pickled, tensors)
    _broadcast(tensors)
    return result


def gather_objects(value) -> list:
    """The values of all processes, by rank; the same list on every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(values: list[float]) -> list[float]:
    """The element-wise sum of a short list of numbers over all processes, in float64."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def is_first_to_fail() -> bool:
    """Whether this process is the first to ask; it is the one that reports what went wrong.

    Before the processes are connected, all make the same mistakes, and the first on each machine
    reports them.
    """
    if not dist.is_initialized():
        return local_rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone
        return False


def exchange_failure(error: BaseException) -> str:
    """One line for an error of gloo or NCCL because of another process; "" for other errors."""
    text = str(error)

    # gloo's begin with their place: [.../gloo/...:561] Connection closed ...
    if not isinstance(error, dist.DistError) and "/gloo/" not in text.partition("]")[0]:
        return ""

    if "timed out" in text.lower() or "timeout" in text.lower():
        return f"process {rank()} waited for another one longer than --dist-timeout allows"
    return (
        f"process {rank()} lost the connection to another one, which was killed or cannot be "
        "reached"
    )


def end_process(work) -> NoReturn:
    """Ends this process with the status of `work()`, or with 1 and a traceback for an error.

    `work` leaves the process group if every process succeeds. If there still is a group, this
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


def _pickled(result, tensors: list[Tensor]) -> bytes:
    """A pickle of `result` without the values of its tensors, which are appended to the list."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Tensor):
                return None
            tensors.append(value.detach().contiguous())
            return value.shape, value.dtype, value.device.type

    file = io.BytesIO()
    Pickler(file).dump(result)
    return file.getvalue()


def _unpickled(pickled: bytes, tensors: list[Tensor]):
    """What was pickled, with empty tensors, which are appended to the list."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, described):
            shape, dtype, device = described
            tensors.append(torch.empty(shape, dtype=dtype, device=device))
            return tensors[-1]

    return Unpickler(io.BytesIO(pickled)).load()


def _broadcast(tensors: list[Tensor]) -> None:
    """Fills contiguous tensors with the values that they have on process 0."""
    as_bytes = [tensor.view(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]
    for work in [dist.broadcast(part, src=0, async_op=True) for part in as_bytes]:
        work.wait()


def _description(error: Exception) -> tuple[str, str, str, dict]:
    """The module and name of an error's class, its text, and its attributes with plain values."""
    plain = {
        name: value
        for name, value in vars(error).items()
        if isinstance(value, str | int | float | None)
    }
    return type(error).__module__, type(error).__qualname__, str(error), plain


def _described(module: str, name: str, text: str, attributes: dict) -> Exception:
    """The error of `_description`, or a RuntimeError if its class is not known here.

    It is made without its constructor, whose arguments are unknown.
    """
    kind = getattr(sys.modules.get(module), name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(Exception):
            error = kind.__new__(kind, text)
            vars(error).update(attributes)
            if str(error) == text:
                return error
    return RuntimeError(text)
