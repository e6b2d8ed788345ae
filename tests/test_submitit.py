"""The SLURM script with submitit's local executor, which starts, stops and restarts real processes."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("submitit")
import run_with_submitit  # noqa: E402

pytestmark = pytest.mark.slow

LOCAL = ["--cluster", "local", "--nodes", "1", "--timeout", "10"]


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.2)
    assert condition()


@pytest.fixture
def submit(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def submit(processes, epochs):
        return run_with_submitit.submit(
            [
                *LOCAL,
                "--ngpus",
                str(processes),
                "--job_dir",
                str(tmp_path),
                *tiny,
                "--batch-size",
                "8",
                "--pruner",
                "lamp",
                "--sparsity",
                "0.5",
                "--epochs",
                str(epochs),
            ]
        )

    return submit


def output(folder):
    return "".join(path.read_text() for path in folder.rglob("*_log.out"))


def test_the_processes_of_a_job_train_together(submit, tmp_path):
    submit(processes=2, epochs=1).results()
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 3
    assert output(tmp_path).count("2 process(es)") == 1


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs /proc to find the process of the job"
)
def test_a_stopped_job_queues_itself_again_and_resumes(submit, tmp_path):
    job = submit(processes=1, epochs=15)
    wait_for((tmp_path / "checkpoint.pth").exists)
    process = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()[0]
    os.kill(int(process), signal.SIGUSR2)  # as SLURM does before it stops a job
    job.results()
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 14
    assert output(tmp_path).count("Training epochs 0 to") == 1
    assert output(tmp_path).count("Training epochs") == 2
