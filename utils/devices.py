"""The device of a process, the precision in which it computes, and the batches on it."""

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import timm
import torch
import torchvision

from .errors import UserError
from .processes import local_rank, processes_here


@dataclass(frozen=True)
class Compute:
    """Where a model runs, and in which precision.

    dtype: of the forward pass, under autocast unless it is float32.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def choose(cls, device: str, amp: str) -> "Compute":
        """As `--device` and `--amp` say. Raises UserError for a device that is not available."""
        chosen = choose_device(device)
        return cls(chosen, choose_amp(amp, chosen))

    def autocast(self) -> torch.autocast:
        lowers = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=lowers)

    def tune(self, tf32: bool, cudnn_benchmark: bool) -> None:
        """Says how a GPU computes; on a CPU without effect.

        tf32: products of float32 numbers round their factors to TensorFloat-32.
        cudnn_benchmark: cuDNN times its algorithms of a convolution, and takes the fastest.
        """
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.backends.cudnn.allow_tf32 = tf32
            torch.backends.cudnn.benchmark = cudnn_benchmark

    def in_words(self) -> str:
        return f"{self.device} in {str(self.dtype).removeprefix('torch.')}"


class OnDevice:
    """The batches of a loader on a device; a batch is a sequence of tensors.

    On a GPU, a stream of its own copies the next batch while the model computes the present one, as
    by timm's `PrefetchLoader`. Pixels stay as they are: normalizing them is a part of the step.
    """

    def __init__(self, loader, device: torch.device):
        self.loader = loader
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        return self._ahead() if self.device.type == "cuda" else map(self._copied, self.loader)

    def _copied(self, batch) -> list[torch.Tensor]:
        return [values.to(self.device, non_blocking=True) for values in batch]

    def _ahead(self) -> Iterator[list[torch.Tensor]]:
        side = torch.cuda.Stream(self.device)
        present = None
        for batch in self.loader:
            with torch.cuda.stream(side):
                coming = self._copied(batch)
            if present is not None:
                yield present

            # What follows on the stream of the model waits for the copy. The memory of the copy is
            # the side stream's, which has to know that it is in use.
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(side)
            for values in coming:
                values.record_stream(stream)
            present = coming
        if present is not None:
            yield present


@contextlib.contextmanager
def full_precision():
    """A context in which no product of float32 numbers rounds its factors, on any device.

    Inverses of Gram matrices are wrong in their first digits otherwise.
    """
    modules = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = False
    try:
        yield
    finally:
        for module, allows in zip(modules, before, strict=True):
            module.allow_tf32 = allows


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is a GPU of this process, or else the CPU.

    A GPU becomes torch's current one. Raises UserError for a device that is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected auto, cuda or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: expected auto, cuda or cpu")
    return own_gpu(device, name) if device.type == "cuda" else device


def own_gpu(device: torch.device, name: str) -> torch.device:
    """The GPU of this process, with its index; it becomes torch's current one.

    name: what `--device` says, for messages. Raises UserError if there are too few GPUs.
    """
    if device.index is not None and processes_here() > 1:
        raise UserError(
            f"--device {name}: one GPU for {processes_here()} processes on this machine; "
            "expected auto or cuda, with which each has its own"
        )
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA GPU is available here; use --device cpu or auto")

    # SLURM may show each process no GPU but its own, so only torchrun's processes are counted.
    count = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > count:
        raise UserError(
            f"--device {name}: {processes} processes but {count} GPU(s) on this machine"
        )

    index = local_rank() % count if device.index is None else device.index
    if index >= count:
        raise UserError(f"--device {name}: there are {count} GPU(s) on this machine")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def choose_amp(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass that `--amp` means on this device.

    `auto` is bfloat16 if the device has it in hardware, or else float16 on a GPU and float32 on a
    CPU.
    """
    if name == "off":
        return torch.float32
    if name != "auto":
        return getattr(torch, name)

    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16

    # Older releases of torch lack one or the other.
    capabilities = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, name, lambda: False)() for name in capabilities)
    return torch.bfloat16 if native else torch.float32


def versions(device: torch.device) -> str:
    """Python, the main packages and the GPU, for the summary of a run."""
    modules = (torch, torchvision, timm, numpy)
    packages = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"Python {platform.python_version()}, {packages}{gpu}"
