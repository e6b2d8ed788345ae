"""How benchmarks measure time, memory and training steps, and the rows of their tables."""

import contextlib
import ctypes
import io
import itertools
import sys
import time
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine import Learner, Progress, StepOptions, train_one_epoch  # noqa: E402
from losses import DistillationLoss  # noqa: E402
from sparsity_factory import multiply_adds, prunable_weights, sparse_multiply_adds, sparsity_rows  # noqa: E402
from utils import Compute  # noqa: E402

CPU = torch.device("cpu")


def seconds(function, repeats: int = 3) -> float:
    """The time of the shortest of some runs, because a disturbance only makes a run longer."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def in_turns(functions: dict, rounds: int) -> dict[str, float]:
    """The shortest time of each function, called in turns, since the speed of a machine drifts."""
    best = {name: float("inf") for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            best[name] = min(best[name], seconds(function, 1))
    return best


def row(what: str, target: str, found: str, missed: str = "") -> dict:
    """A row of the table. missed: by how much the target is missed; empty if it is met."""
    return {"what": what, "target": target, "found": found, "missed": missed}


def over(value: float, limit: float, unit: str) -> str:
    return "" if value <= limit else f"by {value - limit:.2g} {unit}"


def under(ratio: float, limit: float) -> str:
    return "" if ratio >= limit else f"{ratio:.2f} of {limit:g} times"


def random_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name)


def multiply_adds_left(model: torch.nn.Module, image: torch.Tensor) -> int:
    """The multiply-adds of an image, without those of weights that are zero."""
    masks = {name: weight != 0 for name, weight in prunable_weights(model).items()}
    kept = sparsity_rows(model, masks)
    return sum(sparse_multiply_adds(kept, multiply_adds(model, image)).values())


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_above(function) -> int:
    """The bytes that a call needs at its peak, above those that the process has before it."""
    # The call could reuse memory that earlier ones have freed, which would not count.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def batches(count: int, size: int) -> list:
    """The same random batch of images and targets several times."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 224, 224, generator=generator)
    targets = torch.randint(1000, (size,), generator=generator)
    return [(images, targets)] * count


def step_seconds(model, optimizer, size: int, dtype: torch.dtype, steps: int = 2) -> float:
    """The time of the shortest of some training steps, after a first one that is not counted."""
    options = StepOptions(DistillationLoss(torch.nn.CrossEntropyLoss()), Compute(CPU, dtype))
    learner = Learner(model, optimizer)
    loader = batches(steps + 1, size)

    ends = []
    with contextlib.redirect_stdout(io.StringIO()):
        train_one_epoch(
            learner,
            options,
            loader,
            Progress(),
            after_step=lambda: ends.append(time.perf_counter()),
        )
    return min(later - earlier for earlier, later in itertools.pairwise(ends))
