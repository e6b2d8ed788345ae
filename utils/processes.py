"""The processes of a run: their devices, how they meet, what they tell each other, and their random numbers."""

import os
import random

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .errors import UserError, first_line


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine, as torchrun or SLURM says."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is this process's GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected auto, cuda or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: expected auto, cuda or cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: no CUDA GPU is available here; use --device cpu or auto")
        count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if processes > count:
            raise UserError(f"--device {name}: {processes} processes but {count} GPU(s) on this machine")
        # Under SLURM a process may see no GPU but its own.
        device = torch.device("cuda", local_rank() % count if device.index is None else device.index)
        if device.index >= count:
            raise UserError(f"--device {name}: there are {count} GPU(s) on this machine")
        torch.cuda.set_device(device)
    return device


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype that `--amp` means on this device, None for float32 throughout.

    `auto` is bfloat16 where the device computes it in hardware; else float16 on a GPU and float32 on a CPU.
    """
    if name == "off":
        return None
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    capabilities = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, name, lambda: False)() for name in capabilities)
    return torch.bfloat16 if native else None


def in_words(amp_dtype: torch.dtype | None) -> str:
    return str(amp_dtype or torch.float32).removeprefix("torch.")


def init_process_group(device_name: str, dist_url: str = "env://", distributed: bool = False,
                       wanted: int = 1) -> torch.device:
    """Joins the processes that torchrun or SLURM started, and returns this process's device.

    Reads RANK, WORLD_SIZE and LOCAL_RANK (torchrun), else SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID where
    MASTER_ADDR says that the job was meant to be distributed. Without them the run has a single process. Raises
    UserError when `distributed` or a number of processes `wanted` asks for others than there are.
    """
    env, processes = os.environ, 1
    if "RANK" in env and "WORLD_SIZE" in env:
        process, processes = int(env["RANK"]), int(env["WORLD_SIZE"])
    elif "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        process, processes = int(env["SLURM_PROCID"]), int(env.get("SLURM_NTASKS", 1))
    if processes == 1 and distributed or wanted not in (1, processes):
        raise UserError(f"{'--distributed' if distributed else f'--world_size {wanted}'}: there "
                        f"{'is one process' if processes == 1 else f'are {processes} processes'}; start as many as you "
                        "want with torchrun")
    if processes == 1:
        return choose_device(device_name)
    device = choose_device(device_name)
    try:
        store, process, processes = next(rendezvous(dist_url, process, processes))
        # Processes that torchrun starts again meet at the old store, where some torch releases leave stale addresses.
        store = dist.PrefixStore(f"start_{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=process,
                                world_size=processes)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--dist_url {dist_url}: the processes do not meet ({first_line(error)})") from None
    return device


def on_first_process(compute):
    """What `compute()` returns on process 0, on every process; an error it raises there is raised everywhere."""
    if world_size() == 1:
        return compute()
    outcome = [None, None]
    if is_main_process():
        try:
            outcome[0] = compute()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def is_first_to_fail() -> bool:
    """Whether this process is the first to ask, and so the one that says what went wrong.

    Before the processes have met, all make the same mistakes, and the first on each machine tells.
    """
    if not dist.is_initialized():
        return local_rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone
        return False


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
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


#: What random numbers are drawn for; first in every key, so that no two purposes share their numbers.
INIT, ORDER, SAMPLE, STEP = range(4)


def seed_everything(purpose: int, *key: int) -> None:
    """Seeds every generator from a key such as (SAMPLE, seed, epoch, position), so that no random choice has a past."""
    seed = int(np.random.SeedSequence((purpose, *key)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long where there is no GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
