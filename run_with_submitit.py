"""Runs main.py on a SLURM cluster through submitit, as DeiT's script of this name does.

    python run_with_submitit.py --nodes 2 --ngpus 8 --job_dir JOBS --partition gpu

Takes any argument of main.py as well. Each GPU has one process. Output, checkpoints and log.txt are
written to JOBS. When SLURM preempts the job or its time is up, it queues itself again and resumes
from its last checkpoint. Needs `pip install submitit`.
"""

import argparse
import os
import runpy
import signal
import sys
import uuid
from pathlib import Path

try:
    import submitit
except ImportError:
    sys.exit("error: submitit is not installed; pip install submitit")


# fmt: off


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the job, and the arguments that are left for main.py."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ngpus", type=int, default=8, help="GPUs, and so processes, of each node")
    add("--nodes", type=int, default=2, help="number of nodes")
    add("--timeout", type=int, default=2800,
        help="minutes until the job is stopped and queued again")
    add("--job_dir", type=Path, required=True, help="a folder that all nodes see")

    # For the scheduler
    add("--partition", help="SLURM partition")
    add("--use_volta32", action="store_true", help="ask for V100 GPUs of 32 GB")
    add("--comment", help="comment for the scheduler")
    add("--cluster", help="slurm, or local for processes on this machine; by default what is there")
    return parser.parse_known_args(argv)


# fmt: on


class Trainer:
    """One process of the job."""

    def __init__(self, argv: list[str], job_dir: Path, restarted: bool = False):
        """argv: for main.py. restarted: whether the job ran before, and was queued again."""
        self.argv = argv
        self.job_dir = job_dir
        self.restarted = restarted
        self.meeting = job_dir.resolve() / f".meet_{uuid.uuid4().hex}"

    def __call__(self) -> None:
        job = submitit.JobEnvironment()
        os.environ["RANK"] = str(job.global_rank)
        os.environ["WORLD_SIZE"] = str(job.num_tasks)
        os.environ["LOCAL_RANK"] = str(job.local_rank)

        # The processes find each other at a file of this start of the job: if SLURM queues the job
        # again by itself, the file of the last start still has its addresses.
        start = os.environ.get("SLURM_RESTART_COUNT", "0")
        dist_url = self.meeting.with_name(f"{self.meeting.name}_{start}").as_uri()

        argv = [*self.argv, "--output_dir", str(self.job_dir), "--dist_url", dist_url]
        if self.restarted or start != "0":
            argv = resuming(argv, self.job_dir)
        run = runpy.run_path(str(Path(__file__).with_name("main.py")))["run"]
        status = run(argv)

        # The run has saved its step; now submitit queues the job again, and ends this process
        preempted = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
        if status == 128 + preempted:
            signal.getsignal(preempted)(preempted, None)
        if status:
            raise RuntimeError(f"main.py ended with status {status}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """submitit calls this before the job is stopped, and queues what it returns."""
        return submitit.helpers.DelayedSubmission(Trainer(self.argv, self.job_dir, restarted=True))


def resuming(argv: list[str], job_dir: Path) -> list[str]:
    """The arguments of a job that starts again, and may not have written a checkpoint yet."""
    first = [argument for argument in argv if argument != "--overwrite"]
    if (job_dir / "checkpoint.pth").exists():
        return [*first, "--resume", "auto"]
    resumes = any(argument.startswith("--resume") for argument in first)
    return first if resumes else [*first, "--overwrite"]


def submit(argv: list[str]) -> submitit.Job:
    """Queues the job."""
    args, main_argv = parse_args(argv)
    decided = any(argument.startswith(("--resume", "--overwrite")) for argument in main_argv)
    if (args.job_dir / "checkpoint.pth").exists() and not decided:
        sys.exit(
            f"error: --job_dir {args.job_dir}: holds a run; --resume auto continues it, "
            "--overwrite replaces it, or choose another folder"
        )
    args.job_dir.mkdir(parents=True, exist_ok=True)

    wishes = {}
    if args.partition:
        wishes["slurm_partition"] = args.partition
    if args.use_volta32:
        wishes["slurm_constraint"] = "volta32gb"
    if args.comment:
        wishes["slurm_comment"] = args.comment

    executor = submitit.AutoExecutor(
        folder=args.job_dir / "%j", cluster=args.cluster, slurm_max_num_timeout=30
    )
    executor.update_parameters(
        name="deit",
        nodes=args.nodes,
        tasks_per_node=args.ngpus,
        timeout_min=args.timeout,
        cpus_per_task=10,
        slurm_gpus_per_node=args.ngpus,
        slurm_mem_per_gpu="40G",
        slurm_signal_delay_s=120,
        **wishes,
    )
    return executor.submit(Trainer(main_argv, args.job_dir))


if __name__ == "__main__":
    job = submit(sys.argv[1:])
    print(f"Submitted job {job.job_id}; its output is in {job.paths.stdout}")
