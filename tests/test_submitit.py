"""The SLURM script with submitit's local executor, which starts, stops and restarts real processes."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

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
    # It saved the step at which it was stopped, and resumed there
    assert "stopped by SIGUSR2 in epoch" in "".join(
        path.read_text() for path in tmp_path.rglob("*_log.err")
    )


def test_a_new_job_in_a_folder_that_holds_a_run_is_refused_unless_it_says_what_becomes_of_it(
    tmp_path, monkeypatch
):
    (tmp_path / "checkpoint.pth").touch()
    monkeypatch.setattr(run_with_submitit.submitit.AutoExecutor, "submit", lambda *_: "submitted")
    job = [*LOCAL, "--job_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="holds a run; --resume auto continues it, --overwrite"):
        run_with_submitit.submit(job)
    for flags in (["--resume", "auto"], ["--overwrite"]):
        assert run_with_submitit.submit([*job, *flags]) == "submitted"

    first = run_with_submitit.Trainer(["--overwrite", "--lr", "1"], tmp_path)
    again = first.checkpoint().function
    assert again.restarted and not first.restarted
    assert run_with_submitit.resuming(again.argv, tmp_path) == ["--lr", "1", "--resume", "auto"]


def test_a_job_that_slurm_starts_again_meets_at_another_file(tmp_path, monkeypatch):
    """SLURM starts the same command again, whose processes were killed and left their file."""
    urls = []
    monkeypatch.setattr(
        run_with_submitit.runpy, "run_path", lambda _: {"run": lambda argv: urls.append(argv)}
    )
    job = SimpleNamespace(global_rank=0, num_tasks=1, local_rank=0)
    monkeypatch.setattr(run_with_submitit.submitit, "JobEnvironment", lambda: job)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # `Trainer` sets them
    trainer = run_with_submitit.Trainer([], tmp_path)
    for count in (None, "1", "2"):
        if count:
            monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        if count == "2":
            (tmp_path / "checkpoint.pth").touch()
        trainer()
    # The first start begins a run, and the others have that one, whether it has a checkpoint yet
    assert [argv[4:] for argv in urls] == [[], ["--overwrite"], ["--resume", "auto"]]
    found = [argv[argv.index("--dist_url") + 1] for argv in urls]
    assert len({*found}) == 3 and all(url.startswith(tmp_path.as_uri()) for url in found)
