"""Errors, processes, logging and checkpoint files, which all parts of the project use."""

from .errors import BadImageError, UserError, WriteError, first_line
from .files import load_checkpoint, save_checkpoint, write_atomically
from .logs import BARS, LINES, QUIET, MetricLogger, SmoothedValue, log, quiet_libraries, show_progress
from .processes import (
    CALIBRATION,
    INIT,
    ORDER,
    SAMPLE,
    STEP,
    TIMEOUT,
    available_cores,
    choose_amp,
    choose_device,
    end_process,
    exchange_failure,
    gather_objects,
    in_words,
    init_process_group,
    is_first_to_fail,
    is_main_process,
    local_rank,
    on_first_process,
    processes_here,
    rank,
    seed_everything,
    sum_over_processes,
    world_size,
)

__all__ = [
    "BARS", "CALIBRATION", "INIT", "LINES", "ORDER", "QUIET", "SAMPLE", "STEP", "TIMEOUT", "BadImageError",
    "MetricLogger", "SmoothedValue", "UserError", "WriteError", "available_cores", "choose_amp", "choose_device",
    "end_process", "exchange_failure", "first_line", "gather_objects", "in_words", "init_process_group",
    "is_first_to_fail", "is_main_process", "load_checkpoint", "local_rank", "log", "on_first_process",
    "processes_here", "quiet_libraries", "rank", "save_checkpoint", "seed_everything", "show_progress",
    "sum_over_processes", "world_size", "write_atomically",
]
