"""The folder of a run: its lock, its checkpoints and its log; which folder a run may write to."""

import argparse
import contextlib
import copy
import errno
import fcntl
import json
import math
import os
import socket
import threading
from datetime import datetime
from pathlib import Path

import torch

import utils
from utils import UserError

CHECKPOINT = "checkpoint.pth"
BEST = "best_checkpoint.pth"
LOG = "log.txt"
LOCK = ".lock"


class RunFolder:
    """Makes and locks the folder of `--output_dir`; the lock ends with the process.

    Raises UserError if the folder cannot be written to, or another run is using it.
    """

    def __init__(self, name: str):
        self.path = Path(name)
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Open for as long as the process lives
            self._lock = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
            for file in (CHECKPOINT, BEST, LOG):
                if (self.path / file).is_dir():
                    raise UserError(f"--output_dir {name}: {file} in it is a folder")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--output_dir {name}: {reason}") from None

        # A lock of this process alone: with flock, data workers that outlast a killed run would
        # keep it
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                utils.log(
                    f"--output_dir {name}: cannot be locked ({error.strerror}); no second run may "
                    "write to it"
                )
                return
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another run"
            raise UserError(f"--output_dir {name}: in use by {owner}") from None

        # The owner, for the message to another run. A full disk is no reason to stop yet
        started = datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):
            self._lock.truncate(0)
            self._lock.write(
                f"process {os.getpid()} on {socket.gethostname()}, started {started}\n"
            )
            self._lock.flush()

    def begin(self, overwrite: bool) -> None:
        """Removes the log of an earlier start, and with `overwrite` its checkpoints, too."""
        for file in (CHECKPOINT, BEST, LOG) if overwrite else (LOG,):
            (self.path / file).unlink(missing_ok=True)

    def save(self, content: dict, best: bool = False) -> None:
        """Writes checkpoint.pth; the best so far is best_checkpoint.pth too, by a hard link."""
        newest = self.path / CHECKPOINT
        if not best:
            utils.save_checkpoint(content, newest)
            return

        utils.save_checkpoint(content, self.path / BEST)
        link = self.path / f".{CHECKPOINT}.tmp"
        try:
            link.unlink(missing_ok=True)
            os.link(self.path / BEST, link)
            os.replace(link, newest)
        except OSError:  # file systems without hard links
            utils.save_checkpoint(content, newest)

    def save_later(self, content: dict, best: bool = False) -> None:
        """Writes as `save` does, in a thread and from a copy, so that the training continues.

        One checkpoint is written after another. Raises the error of the one before.
        """
        self.wait()
        copied = copy_on_cpu(content)

        def write():
            try:
                self.save(copied, best)
            except BaseException as error:
                self._failure = error

        self._writing = threading.Thread(target=write, name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Returns when no checkpoint is being written; raises the error of the last one."""
        if self._writing:
            self._writing.join()
            self._writing = None
        self.check()

    def check(self) -> None:
        """Raises the error of a checkpoint that could not be written, without waiting for one."""
        failure = self._failure
        self._failure = None
        if failure:
            raise failure

    def log_epoch(self, line: dict) -> None:
        """Adds an epoch to log.txt, in place of this epoch and later ones of an earlier start."""
        earlier = [entry for entry in read_log(self.path) if entry["epoch"] < line["epoch"]]
        text = "".join(f"{json.dumps(entry)}\n" for entry in [*earlier, line])
        utils.write_atomically(self.path / LOG, lambda file: file.write(text.encode()))


def copy_on_cpu(value):
    """A copy of nested dicts, lists and tuples whose tensors are copies too, all on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with the metadata of a state dict
        for key, item in value.items():
            copied[key] = copy_on_cpu(item)
        return copied
    if isinstance(value, list | tuple):
        return type(value)(copy_on_cpu(item) for item in value)
    return value


def read_log(folder: Path) -> list[dict]:
    """The epochs in the log.txt of a folder, as they were written."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("epoch"), int):
            entries.append(entry)
    return entries


def holds_run(folder: str | Path) -> bool:
    """Whether a training run has written to the folder."""
    return any(os.path.exists(Path(folder, file)) for file in (CHECKPOINT, BEST, LOG))


def with_own_folder(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the folder that this run writes to.

    If the folder of `--output_dir` is a default and holds a run, a new run takes the next of
    `output/sample-2`, `output/sample-3`, ..., and `--resume auto` the last one that holds a run.
    Raises UserError for a new run in a folder that was asked for and holds one.
    """
    folder = args.output_dir
    begins = not (args.resume or args.eval)
    if not folder or args.overwrite or not holds_run(folder):
        return args
    if begins and not args.default_folder:
        raise UserError(
            f"--output_dir {folder}: holds a run; --resume auto continues it, --overwrite replaces "
            "it, or choose another folder"
        )
    if not args.default_folder or not (begins or args.resume == "auto"):
        return args

    last, free = folder, f"{folder}-2"
    while holds_run(free):
        last, free = free, f"{folder}-{int(free.rpartition('-')[2]) + 1}"
    if begins:
        utils.log(f"{last} holds a run; this one writes to {free}")
    return argparse.Namespace(**{**vars(args), "output_dir": free if begins else last})


def check_same_run(args: argparse.Namespace, checkpoint: dict) -> None:
    """Raises UserError if `--resume` names a checkpoint of another run than `--output_dir` holds.

    The folder's own checkpoints are of its run, and so are those that have the id in its log.
    """
    folder = args.output_dir
    if args.eval or not (args.resume and folder and holds_run(folder)):
        return
    own = Path(args.resume).resolve().parent == Path(folder).resolve()
    if own and args.overwrite:
        raise UserError(f"--overwrite: {args.resume} is of the run that would be replaced")
    if own or args.overwrite:
        return

    run = run_in_log(Path(folder))
    if run is None or run != checkpoint.get("run"):
        raise UserError(
            f"--output_dir {folder}: holds another run than {args.resume}; --overwrite "
            "replaces it, or choose another folder"
        )


def run_in_log(folder: Path) -> str | None:
    """The id of the run whose log.txt is in a folder; None without one."""
    entries = read_log(folder)
    return entries[-1].get("run") if entries else None


def newest_checkpoint(folder: str) -> str:
    """The whole checkpoint in `folder` that got furthest, for `--resume auto`; empty if none.

    The times of the files do not count, as copies have other ones. A checkpoint of another run than
    log.txt is passed over, and a message says so.
    """
    run = run_in_log(Path(folder))
    newest = Path(folder, CHECKPOINT)
    best = Path(folder, BEST)
    paths = [path for path in (newest, best) if path.is_file()]
    if len(paths) == 2 and newest.samefile(best):
        paths = [newest]  # two names of one file, which need not be read twice

    furthest = (-math.inf, 0)
    found = ""
    for path in map(str, paths):
        try:
            checkpoint = utils.load_checkpoint(path)
            own = checkpoint.get("run")
            if run and own and own != run:
                utils.log(f"--resume auto: passing over {path}: of another run than {LOG}")
                continue
            reached = int(checkpoint.get("epoch", -1)), int(checkpoint.get("images", 0))
        except (TypeError, ValueError, RuntimeError):
            reached = -1, 0  # the resumed run will say what is wrong
        except UserError as error:
            utils.log(f"--resume auto: passing over {error}")
            continue
        if reached > furthest:
            furthest = reached
            found = path
    return found
