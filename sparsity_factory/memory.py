"""How much memory is free on a device."""

import contextlib
from pathlib import Path

import torch

UNKNOWN = 4 * 2**30  # bytes, if the system does not say
SYSTEM = Path("/proc/meminfo")  # of Linux
CONTAINER = Path("/sys/fs/cgroup")  # with version 2 of control groups


def free_memory(device: torch.device) -> int:
    """The bytes that a process can still use on a device, without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The process keeps blocks that it uses again
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept

    # Other systems have no such file, and a container without a limit says `max`
    found = []
    for ask in (_of_system, _of_container):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append(ask())
    return max(min(found, default=UNKNOWN), 0) if device.type == "cpu" else UNKNOWN


# ---- helpers, not exported ----


def _of_system() -> int:
    lines = dict(line.split(":") for line in SYSTEM.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _of_container() -> int:
    limit = int((CONTAINER / "memory.max").read_text())
    used = int((CONTAINER / "memory.current").read_text())
    # Cached files make room
    lines = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
    return limit - used + int(lines["inactive_file"])
