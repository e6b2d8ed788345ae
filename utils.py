"""Process group, logging, seeding and checkpoints: what every part of the trainer leans on."""

import argparse
import contextlib
import datetime
import os
import pickle
import random
import re
import sys
import time
import warnings
import zipfile
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user, told in one line; `main.py` prints it as `error: ...` and exits with status 2."""


class BadImageError(UserError):
    """A file that cannot be read as an image."""


class WriteError(Exception):
    """A file that cannot be written, for want of room or otherwise; what it held before is whole."""


# Processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


#: How a run tells of its progress: DeiT's lines, bars on a terminal with a line per epoch, or not at all.
LINES, BARS, QUIET = "lines", "bars", "quiet"
_display = LINES


def show_progress(quiet: bool = False) -> str:
    """Chooses the display: bars where the output is a terminal, lines where it is a file or a pipe."""
    global _display
    _display = QUIET if quiet else BARS if sys.stdout.isatty() else LINES
    return _display


def log(*message, only: str = "") -> None:
    """Prints on the first process only, at once (so that a log file can be followed). `only`: with that display."""
    if is_main_process() and _display != QUIET and only in ("", _display):
        tqdm.write(" ".join(map(str, message)), file=sys.stdout)
        sys.stdout.flush()


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


# Metrics, in DeiT's log format


class SmoothedValue:
    """A series of numbers, shown as the median of the last ones and the mean of all.

    Tensors are kept on their device and read only when a figure is asked for: reading one waits for the device.
    """

    def __init__(self, window: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})"):
        self.recent = deque(maxlen=window)
        self.fmt = fmt
        self.total = 0.0
        self.count = 0

    def update(self, value, n: int = 1) -> None:
        self.recent.append(value)
        self.total = self.total + value * n
        self.count += n

    @property
    def global_avg(self) -> float:
        return float(self.total) / max(self.count, 1)

    def __str__(self) -> str:
        recent = [float(value) for value in self.recent]
        return self.fmt.format(median=float(np.median(recent)) if recent else 0.0, global_avg=self.global_avg,
                               value=recent[-1] if recent else 0.0)


class MetricLogger:
    """Gathers named series and prints DeiT's progress lines while iterating over a loader."""

    def __init__(self):
        self.meters = defaultdict(SmoothedValue)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def update(self, n: int = 1, **values) -> None:
        for name, value in values.items():
            self.meters[name].update(value, n)

    def averages(self) -> dict[str, float]:
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def synchronize(self) -> None:
        """Makes every mean the mean over all processes."""
        for meter in self.meters.values():
            meter.total, meter.count = sum_over_processes([float(meter.total), meter.count])

    def state_dict(self) -> dict[str, list]:
        """The sum and the count of each series of this process."""
        return {name: [float(meter.total), meter.count] for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        for name, (total, count) in state.items():
            self.meters[name].total, self.meters[name].count = float(total), int(count)

    def __str__(self) -> str:
        return "  ".join(f"{name}: {meter}" for name, meter in self.meters.items())

    def log_every(self, loader, print_freq: int, header: str, first: int = 0):
        """Yields the batches of `loader`; logs every `print_freq` of them, and the total time at the end.

        On a terminal, a bar shows them instead. first: the number of the first batch, where earlier ones were seen
        before.
        """
        steps = first + len(loader)
        disable = _display != BARS or not is_main_process()
        width = len(str(steps))
        iter_time, data_time = SmoothedValue(fmt="{global_avg:.4f}"), SmoothedValue(fmt="{global_avg:.4f}")
        start = end = time.time()
        with tqdm(total=steps, initial=first, desc=header.rstrip(":"), unit="batch", leave=False, dynamic_ncols=True,
                  file=sys.stdout, disable=disable) as bar:
            for step, batch in enumerate(loader, first):
                data_time.update(time.time() - end)
                yield batch
                iter_time.update(time.time() - end)
                bar.update()
                if step % print_freq == 0 or step == steps - 1:
                    averages = ", ".join(f"{name} {mean:.4g}" for name, mean in self.averages().items())
                    bar.set_postfix_str(averages, refresh=False)
                    eta = datetime.timedelta(seconds=int(iter_time.global_avg * (steps - 1 - step)))
                    line = f"{header}  [{step:{width}d}/{steps}]  eta: {eta}  {self}  "
                    line += f"time: {iter_time}  data: {data_time}"
                    if torch.cuda.is_available():
                        line += f"  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}"
                    log(line, only=LINES)
                end = time.time()
        total = time.time() - start
        log(f"{header} Total time: {datetime.timedelta(seconds=int(total))} ({total / max(len(loader), 1):.4f} s / it)",
            only=LINES)


# Checkpoints


def save_checkpoint(content: dict, path) -> None:
    """Writes a checkpoint, whole or not at all. Raises WriteError."""
    write_atomically(Path(path), lambda file: torch.save(content, file))


def write_atomically(path: Path, write) -> None:
    """Replaces `path` by what `write(file)` writes: a temporary file beside it is synced, then renamed.

    There is one writer to a folder (see `output.OutputDir`), so what a killed one left is simply overwritten.
    Raises WriteError when there is no room, leaving the old file as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, has to survive a power failure
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps what the file raised
        if isinstance(cause, OSError):
            raise WriteError(f"{path}: cannot be written ({cause.strerror or first_line(cause)}); what it held before "
                             "is whole") from None
        raise


def load_checkpoint(source: str) -> dict:
    """Reads a checkpoint (`.pth`, `.safetensors`, or the URL of a `.pth`) without running any code in it.

    Returns a dict with at least `model`, a state dict of tensors; bare state dicts and those under `state_dict` are
    wrapped. Raises UserError when the file is missing, damaged, or holds anything but tensors and plain containers.
    """
    try:
        # DeiT's own training checkpoints carry their arguments as a Namespace, which is as harmless as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says it all
            if source.startswith(("https://", "http://")):
                content = torch.hub.load_state_dict_from_url(source, map_location="cpu", check_hash=True,
                                                             weights_only=True, progress=is_main_process())
            elif source.endswith(".safetensors"):
                content = load_file(source)
            else:
                _check_archive(source)
                content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{source}: no such checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"{source}: is a folder; give a checkpoint file in it") from None
    except pickle.UnpicklingError as error:
        if code := re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error)):
            raise UserError(f"{source}: refused, it holds {code[1]} where only tensors and plain containers are "
                            "read") from None
        raise UserError(f"{source}: not a checkpoint") from None
    except Exception as error:  # damaged files raise whatever the byte that is wrong leads to
        raise UserError(f"{source}: cannot be read as a checkpoint ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, expected a dict of weights")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = {**content, "model": content[key]}
            break
    else:
        content = {"model": content}
    weights = content["model"]
    if not weights or not all(isinstance(name, str) and isinstance(value, torch.Tensor) and not value.is_meta
                              and value.layout == torch.strided for name, value in weights.items()):
        raise UserError(f"{source}: has no state dict of tensors, neither at its top nor under `model`")
    return content


def _check_archive(source: str) -> None:
    """Raises ValueError when a checkpoint in torch's zip format is damaged anywhere; torch.load checks no checksums."""
    if not zipfile.is_zipfile(source):
        return
    with zipfile.ZipFile(source) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("compressed, which torch.save never does")
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")


def first_line(error) -> str:
    """The first line of an exception's message, and the next where it only announces that."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2 if lines[0].endswith(":") else 1])
