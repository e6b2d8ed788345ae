"""Errors, processes, logging and checkpoint files: what every part of the trainer leans on."""

from .errors import BadImageError, UserError, WriteError, first_line
from .files import load_checkpoint, save_checkpoint, write_atomically
from .logs import BARS, LINES, QUIET, MetricLogger, SmoothedValue, log, show_progress
from .processes import (
    INIT,
    ORDER,
    SAMPLE,
    STEP,
    choose_amp,
    choose_device,
    gather_objects,
    in_words,
    init_process_group,
    is_first_to_fail,
    is_main_process,
    local_rank,
    on_first_process,
    rank,
    seed_everything,
    sum_over_processes,
    world_size,
)

__all__ = [
    "BARS", "INIT", "LINES", "ORDER", "QUIET", "SAMPLE", "STEP", "BadImageError", "MetricLogger", "SmoothedValue",
    "UserError", "WriteError", "choose_amp", "choose_device", "first_line", "gather_objects", "in_words",
    "init_process_group", "is_first_to_fail", "is_main_process", "load_checkpoint", "local_rank", "log",
    "on_first_process", "rank", "save_checkpoint", "seed_everything", "show_progress", "sum_over_processes",
    "world_size", "write_atomically",
]
