"""The folder of a job of many measurements: its settings, and a line for each result."""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import utils
from utils import UserError

from .arguments import shared_flags
from .run_folder import RunFolder

Result = TypeVar("Result")


class JobFolder:
    """A job measures one thing after another; stopped and started again, it does what is missing.

    Each result is a line of the file `results`, and any process of the job may add one. All starts
    of a job must agree on its settings, which are in a JSON file named after the job.
    """

    def __init__(self, folder: str | Path, results: str, job: str = "job", header: str = ""):
        """header: the first line of `results`, if it has one."""
        self.path = Path(folder)
        self.results = self.path / results
        self._job = job
        self._settings_path = self.path / f"{job}.json"
        self._settings = {}
        self._header = header
        self._lock = None

    def agree(
        self,
        args: argparse.Namespace,
        own: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        flags: Mapping[str, str] | None = None,
    ) -> None:
        """Raises UserError if an earlier start had other settings.

        The settings are those arguments of main.py that change results, and the job's own.
        defaults: of own settings that older folders lack. flags: as messages name a setting.
        """
        shared = shared_flags()
        settings = {flag.name: getattr(args, flag.name) for flag in shared}
        settings |= own
        defaults = {flag.name: flag.default for flag in shared} | dict(defaults or {})
        flags = {flag.name: str(flag) for flag in shared} | dict(flags or {})
        self._settings = json.loads(json.dumps(settings))  # as they are read back

        if not self._settings_path.exists() and not self.results.exists():
            return
        theirs = self._read_settings()
        for name, ours in self._settings.items():
            before = theirs.get(name, defaults.get(name))  # arguments may have been added since
            if before == ours:
                continue
            flag = flags.get(name, f"--{name.replace('_', '-')}")
            told = f"{flag} {before}, not {ours}"
            if isinstance(ours, dict):  # too long for a message
                told = f"other {name}"
            raise UserError(
                f"--output_dir {self.path}: holds a {self._job} with {told}; choose another folder"
            )

    def open(self, first: bool = True) -> None:
        """The first process makes and locks the folder and writes the settings; others wait."""
        if first and not self._lock:
            self._lock = RunFolder(str(self.path))
            content = json.dumps(self._settings, indent=1).encode()
            self.write(self._settings_path.name, content)

        while not self._settings_path.exists():
            time.sleep(0.2)

    def read(self, parse: Callable[[str], Result]) -> Iterator[Result]:
        """Each result as `parse(line)`; passes over lines for which that raises ValueError.

        These are the header and, after a process was killed, a line that was not written whole.
        """
        for line in self._content().decode("utf-8", errors="replace").split("\n"):
            try:
                result = parse(line)
            except ValueError:
                continue
            yield result

    def add(self, line: str) -> None:
        """Adds a line to the results, so that it outlives a power failure. Raises WriteError."""
        try:
            with open(self.results, "ab+", buffering=0) as file:
                # On NFS, two machines may append at one place: with a lock, each sees the other's
                # line first. There are file systems without locks.
                with contextlib.suppress(OSError):
                    fcntl.lockf(file, fcntl.LOCK_EX)

                lines = [line]
                if _is_torn(file):
                    lines = ["", line]
                elif file.tell() == 0 and self._header:
                    lines = [self._header, line]

                # One short write in append mode, which is not mixed with another process's
                file.write("".join(f"{text}\n" for text in lines).encode())
                os.fsync(file.fileno())
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise utils.WriteError(f"{self.results}: {reason}") from None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the folder, whole or not at all. Raises WriteError."""
        utils.write_atomically(self.path / name, lambda file: file.write(content))

    def _content(self) -> bytes:
        """The results as they are in the file; nothing if there is none."""
        for may_be_replaced in (True, False):
            try:
                return self.results.read_bytes()
            except FileNotFoundError:
                break
            except OSError as error:
                # NFS says so if another machine has just put a new file in its place
                if error.errno == errno.ESTALE and may_be_replaced:
                    continue
                raise UserError(f"{self.results}: cannot be read ({error.strerror})") from None
        return b""

    def _read_settings(self) -> dict:
        path = self._settings_path
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            settings = None
        if not isinstance(settings, dict):
            raise UserError(
                f"--output_dir {self.path}: its {path.name} cannot be read; choose another folder"
            )
        return settings


def _is_torn(file) -> bool:
    """Whether the last line was not written whole; leaves the file at its end."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
