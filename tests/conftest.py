import fcntl
import gzip
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Fixtures import the trainer, which takes seconds: tests of sparsity_factory do without it.

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = "torch sees no CUDA GPU here; `make test-gpu` runs these tests where there is one"


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.tobytes())


def examples(count: int) -> int:
    """How many random inputs a test draws: `count` in CI, where the variable CI is set, fewer at home."""
    return count if os.environ.get("CI") else max(count // 5, 10)


settings.register_profile("project", max_examples=examples(100), deadline=None)
settings.load_profile("project")


def pytest_configure():
    """Ctrl-C reaches the runs of tests also where a shell has started them in the background."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Tests with the marker gpu are skipped where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Says how many tests were left out, and why."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} test{'s' * (count > 1)} left out: {reason}")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Calls a function with a new folder, once for all workers of pytest-xdist; returns the folder."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder_of(name: str, make) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_fashion(tmp_path_factory) -> Path:
    """48 training and 61 test images of Fashion-MNIST as idx files, one of them gzipped."""
    from datasets import SAMPLE_PATH, read_idx

    folder = tmp_path_factory.mktemp("tiny_fashion")
    for prefix, count in (("train", 48), ("t10k", 61)):
        for kind, ndim in (("images-idx3", 3), ("labels-idx1", 1)):
            name = f"{prefix}-{kind}-ubyte"
            write_idx(folder / name, read_idx(SAMPLE_PATH, name, ndim)[:count])
    packed = folder / "t10k-labels-idx1-ubyte"
    (folder / f"{packed.name}.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_fashion) -> list[str]:
    """Arguments for a run of three steps on the tiny data set, in float32."""
    return [
        "--data-set",
        "FASHION",
        "--data-path",
        str(tiny_fashion),
        "--model",
        "deit_sample_patch4_28",
        "--input-size",
        "28",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--num_workers",
        "0",
        "--no-repeated-aug",
        "--amp",
        "off",
    ]


@pytest.fixture(autouse=True)
def lines_again():
    """A run chooses how the process shows progress; the next test has lines again."""
    yield
    if "utils.logs" in sys.modules:
        sys.modules["utils.logs"]._display = "lines"


@pytest.fixture
def run_main(tmp_path, monkeypatch, capfd):
    """Runs the command line in this process, in an empty folder; returns what it printed."""
    import main

    monkeypatch.chdir(tmp_path)

    def run(*argv, status=0) -> str:
        capfd.readouterr()
        assert main.run([str(argument) for argument in argv]) == status
        captured = capfd.readouterr()
        return captured.err if status else captured.out

    return run


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a signal during the training step of that number."""
    from engine import Progress

    end_step = Progress.end_step

    def stop_at(number, signum=signal.SIGTERM):
        def stop(progress, images):
            end_step(progress, images)
            if progress.step == number:
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(Progress, "end_step", stop)

    return stop_at


def start_main(
    *argv, cwd, processes=0, script=ROOT / "main.py", env=None, nodes=("--standalone",), timeout=300
) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own, or under torchrun in as many as given."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *nodes]
    # Waiting threads that spin would take the cores from the other processes.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(
        [*launcher, str(script), *map(str, argv)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
