"""The progress of a run, in DeiT's log format or as bars on a terminal."""

import datetime
import logging
import os
import sys
import textwrap
import time
import warnings
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .processes import is_main_process, sum_over_processes

#: How a run shows its progress: as DeiT's lines, as bars on a terminal with a line per epoch, or
#: not at all.
LINES = "lines"
BARS = "bars"
QUIET = "quiet"
_display = LINES

PROJECT = Path(__file__).resolve().parent.parent
SHORT = 120  # characters of a warning of another library


def show_progress(quiet: bool = False) -> str:
    """Chooses the display: bars on a terminal, lines for a file or a pipe."""
    global _display
    shown = BARS if sys.stdout.isatty() else LINES
    _display = QUIET if quiet else shown
    return _display


def log(*message, only: str = "") -> None:
    """Prints on the first process only, and at once, so that a log file can be followed.

    only: prints with this display alone, BARS or LINES.
    """
    if is_main_process() and _display != QUIET and only in ("", _display):
        tqdm.write(" ".join(map(str, message)), file=sys.stdout)
        sys.stdout.flush()


def quiet_libraries() -> None:
    """Shortens warnings of other libraries to a line, shown once, on the first process only.

    Warnings of this project and errors in logs are shown whole. What this project logs is the same
    on all processes, and the first one shows it. With `-W` or PYTHONWARNINGS, Python shows its
    warnings as usual.
    """
    if not sys.warnoptions:
        warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s", level=logging.WARNING)

    # After its many lines comes an exception, which is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)

    for handler in logging.root.handlers + logging.getLogger("torch").handlers:
        handler.addFilter(_shorten_record)


class SmoothedValue:
    """A series of numbers, shown as the median of the last ones and the mean of all.

    Tensors stay on their device until a figure is needed, because reading one waits for the device.
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
        return self.fmt.format(
            median=float(np.median(recent)) if recent else 0.0,
            global_avg=self.global_avg,
            value=recent[-1] if recent else 0.0,
        )


class MetricLogger:
    """Gathers named series and prints DeiT's progress lines while iterating over a loader."""

    def __init__(self):
        self.meters = defaultdict(SmoothedValue)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def update(self, n: int = 1, **values) -> None:
        for name, value in values.items():
            self.meters[name].update(value, n)

    def read(self) -> None:
        """Turns tensors into numbers, with one wait for the device."""
        meters = self.meters.values()
        values = [value for meter in meters for value in (meter.total, *meter.recent)]
        tensors = [value.double() for value in values if isinstance(value, Tensor)]
        if not tensors:
            return
        numbers = iter(torch.stack(tensors).tolist())

        def number(value: float | Tensor) -> float:
            return next(numbers) if isinstance(value, Tensor) else value

        for meter in meters:
            meter.total = number(meter.total)
            meter.recent = deque(map(number, meter.recent), meter.recent.maxlen)

    def averages(self) -> dict[str, float]:
        self.read()
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def synchronize(self) -> None:
        """Makes every mean the mean over all processes."""
        self.read()
        meters = list(self.meters.values())
        figures = [figure for meter in meters for figure in (meter.total, meter.count)]
        sums = iter(sum_over_processes(figures))
        for meter in meters:
            meter.total = next(sums)
            meter.count = next(sums)

    def state_dict(self) -> dict[str, list]:
        """The sum and the count of each series of this process."""
        self.read()
        return {name: [meter.total, meter.count] for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        for name, (total, count) in state.items():
            self.meters[name].total = float(total)
            self.meters[name].count = int(count)

    def __str__(self) -> str:
        self.read()
        return "  ".join(f"{name}: {meter}" for name, meter in self.meters.items())

    def log_every(self, loader, print_freq: int, header: str, first: int = 0, processes: int = 1):
        """Yields the batches of `loader`, and logs every `print_freq` of them and the total time.

        On a terminal, a bar takes the place of the lines.
        first: the number of the first batch, if earlier ones were seen before.
        processes: how many share the images; their images per second are shown together.
        """
        steps = first + len(loader)
        iter_time = SmoothedValue(fmt="{global_avg:.4f}")
        data_time = SmoothedValue(fmt="{global_avg:.4f}")
        bar = tqdm(
            total=steps,
            initial=first,
            desc=header.rstrip(":"),
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=_display != BARS or not is_main_process(),
        )

        images = 0
        start = end = time.time()
        with bar:
            for step, batch in enumerate(loader, first):
                data_time.update(time.time() - end)
                yield batch
                iter_time.update(time.time() - end)
                images += processes * _images_in(batch)

                bar.update()
                if step % print_freq == 0 or step == steps - 1:
                    # The only wait for the device, unless masks change.
                    self.read()
                    bar.set_postfix_str(self._short(), refresh=False)
                    left = iter_time.global_avg * (steps - 1 - step)
                    line = f"{header}  [{step:{len(str(steps))}d}/{steps}]  eta: {_duration(left)}"
                    line += f"  {self}  time: {iter_time}  data: {data_time}"
                    if images:
                        line += f"  images/s: {images / (time.time() - start):.0f}"
                    if torch.cuda.is_available():
                        line += f"  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}"
                    log(line, only=LINES)
                end = time.time()

        total = time.time() - start
        each = total / max(len(loader), 1)
        log(f"{header} Total time: {_duration(total)} ({each:.4f} s / it)", only=LINES)

    def _short(self) -> str:
        return ", ".join(f"{name} {mean:.4g}" for name, mean in self.averages().items())


# ---- helpers, not exported ----


def _images_in(batch) -> int:
    """How many images a batch of images and targets has; 0 for anything else."""
    is_batch = isinstance(batch, tuple | list) and isinstance(batch[0], torch.Tensor)
    return len(batch[0]) if is_batch else 0


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:01:23."""
    return str(datetime.timedelta(seconds=int(seconds)))


_shown = set()  # the places and texts of other libraries' warnings so far


def _short(text: str, path: str, line: int) -> str:
    """A library's warning in one line; "" if its place or text was shown, or on other processes."""
    first = text.strip().partition("\n")[0].partition(" (Triggered internally at")[0]
    text = textwrap.shorten(first, SHORT, placeholder=" ...")

    keys = {(path, line), text}
    if _shown & keys or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return ""
    _shown.update(keys)
    return text


def _is_ours(path: str) -> bool:
    return Path(path).resolve().is_relative_to(PROJECT) and "site-packages" not in path


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Takes the place of `warnings.showwarning`."""
    if _is_ours(filename):
        text = " ".join(str(message).split())
    else:
        text = _short(str(message), filename, lineno)

    if text:
        where = filename.rpartition("site-packages/")[2]
        print(f"warning: {text} ({where})", file=file or sys.stderr)


def _shorten_record(record: logging.LogRecord) -> bool:
    """A filter of log records: shortens those of other libraries, and drops repeated ones."""
    if record.levelno >= logging.ERROR:
        return True
    if _is_ours(record.pathname):
        return is_main_process()

    text = _short(record.getMessage(), record.pathname, record.lineno)
    record.msg = f"warning: {text} ({record.name})"
    record.args = ()
    return bool(text)
