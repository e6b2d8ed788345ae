import datetime
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, start_main

import utils
from trainer.exit_status import exit_status
from utils import UserError, processes

pytestmark = pytest.mark.slow

EXCHANGE = ROOT / "tests" / "helpers" / "exchange.py"


@pytest.fixture
def gpus(monkeypatch):
    """As many GPUs as a test says; returns the list of those that were chosen."""

    def see(count):
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return see


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher, and no others of their kind."""

    def set_only(**variables):
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in (
                "RANK",
                "WORLD_SIZE",
                "LOCAL_RANK",
                "LOCAL_WORLD_SIZE",
                "MASTER_ADDR",
            ):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


@pytest.fixture
def group_of_one(tmp_path, monkeypatch):
    """A process group of this process alone, in which functions exchange as if there were others."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_each_process_under_torchrun_has_the_gpu_of_its_number(gpus, environment):
    chosen = gpus(4)
    environment(LOCAL_RANK="2", LOCAL_WORLD_SIZE="4")
    for name in ("auto", "cuda"):
        assert utils.choose_device(name) == torch.device("cuda:2")
    assert chosen == [torch.device("cuda:2")] * 2


@pytest.mark.parametrize(
    "launcher",
    [
        {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "2"},
        {
            "SLURM_PROCID": "1",
            "SLURM_NTASKS": "6",
            "SLURM_LOCALID": "0",
            "MASTER_ADDR": "a",
            "SLURM_NODEID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "1,2(x2),1",
        },
    ],
)
@pytest.mark.parametrize("count", [0, 4])
def test_one_gpu_for_several_processes_is_refused_before_anything_else(
    gpus, environment, run_main, launcher, count
):
    chosen = gpus(count)
    environment(**launcher)
    error = run_main("--device", "cuda:1", status=2)
    assert error.startswith(
        "error: --device cuda:1: one GPU for 2 processes on this machine; expected auto or cuda"
    )
    assert error.count("\n") == 1
    assert chosen == []


@pytest.mark.parametrize(
    "launcher",
    [
        {},
        {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "4"},
    ],
)
def test_one_process_on_a_machine_takes_the_gpu_that_is_named(gpus, environment, launcher):
    chosen = gpus(4)
    environment(**launcher)
    assert utils.choose_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="there are 4 GPU"):
        utils.choose_device("cuda:4")


def test_processes_of_a_machine_are_counted_as_slurm_lists_them(environment):
    for node, count in enumerate((8, 8, 4, 1)):
        environment(
            SLURM_PROCID="0",
            MASTER_ADDR="a",
            SLURM_NODEID=str(node),
            SLURM_TASKS_PER_NODE="8(x2),4,1",
        )
        assert utils.processes_here() == count


@pytest.mark.parametrize(
    "quota, cores", [("max 100000", 6), ("250000 100000", 3), ("1000 100000", 1), (None, 6)]
)
def test_cores_are_those_that_the_process_is_bound_to_within_its_quota(
    tmp_path, monkeypatch, quota, cores
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(processes, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert utils.available_cores() == cores


@pytest.mark.parametrize("device, backend", [("cuda:1", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
def test_objects_have_gloo_beside_nccl_and_all_wait_as_long_as_asked(
    tmp_path, gpus, environment, monkeypatch, device, backend
):
    gpus(2)
    environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    calls = []
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: calls.append((backend, options))
    )
    for seconds in ({}, {"timeout": 7200}):
        utils.init_process_group(torch.device(device), f"file://{tmp_path}/meet", **seconds)
    assert [call[0] for call in calls] == [backend] * 2
    own_gpu = torch.device(device) if device != "cpu" else None
    assert calls[0][1]["device_id"] == own_gpu
    assert [call[1]["timeout"] for call in calls] == [
        datetime.timedelta(minutes=30),
        datetime.timedelta(hours=2),
    ]


def test_sums_never_touch_the_gpu(group_of_one, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: reduced.append(tensor.device.type))
    assert utils.sum_over_processes([1.0, 2.5]) == [1.0, 2.5]
    assert reduced == ["cpu"]


def test_the_group_is_left_only_where_all_succeed(group_of_one, capfd):
    def fail():
        raise UserError("alone")

    assert exit_status(fail) == 2
    assert dist.is_initialized()
    assert exit_status(lambda: 0) == 0
    assert not dist.is_initialized()


def test_processes_exchange_numbers_objects_errors_and_flags_over_gloo_in_a_group_with_gpus(
    tmp_path,
):
    result = start_main(tmp_path, "talk", cwd=tmp_path, processes=2, script=EXCHANGE)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for received in (first, second):
        assert received["sum"] == [3.0, 1.0]
        assert received["objects"] == [{"rank": 0}, {"rank": 1}]
        assert received["result"] == [0, None, "text"]
        assert received["then"] == "still together"
    same = [
        ["UserError", "a: mistake", None],
        ["PruningError", "b: mistake", None],
        ["WriteError", "full", None],
        ["NeedsTwo", "c: reason", None],
        ["Stopped", "stopped by SIGTERM before the first step; start the same command again", 143],
        ["FileNotFoundError", "[Errno 2] No such file: 'd'", None],
    ]
    assert first["errors"] == [*same, ["Unknown", "e", None], ["KeyError", "'f'", None]]
    assert second["errors"] == [*same, ["RuntimeError", "e", None], ["RuntimeError", "'f'", None]]
    assert "pickle" in first["unpicklable"][1]
    assert first["unpicklable"][1] == second["unpicklable"][1]
    assert [(tmp_path / f"stopped{rank}").read_text() for rank in range(2)] == ["3", "3"]


@pytest.mark.parametrize(
    "scenario, statuses, line",
    [
        (
            "killed",
            [-9, 1],
            "error: process 1 lost the connection to another one, which was killed or cannot be "
            "reached\n",
        ),
        (
            "late",
            [1, 1],
            "error: process 1 waited for another one longer than --dist-timeout allows\n",
        ),
    ],
)
def test_whoever_waits_for_a_process_that_is_killed_or_late_ends_by_itself_in_one_line(
    tmp_path, scenario, statuses, line
):
    def start(rank):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        return start_main(tmp_path, scenario, cwd=tmp_path, script=EXCHANGE, env=env)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(start, range(2)))
    assert [result.returncode for result in results] == statuses, results[1].stderr
    assert results[1].stderr == line
    assert results[0].stderr == ""


def test_a_process_that_fails_alone_ends_at_once_with_its_data_workers_and_torchrun_sees_it(
    tmp_path,
):
    result = start_main(tmp_path, "alone", cwd=tmp_path, processes=2, script=EXCHANGE)
    assert "forcefully" not in result.stderr, "torchrun had to kill a process"
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "error: one image cannot be read\n" in result.stderr
    assert "rank      : 1" in result.stderr and "exitcode  : 2" in result.stderr


def test_a_bug_in_one_of_several_processes_ends_it_with_a_traceback(tmp_path):
    program = (
        "import utils, atexit, time, torch.distributed as dist\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, "
        "world_size=1)\n"
        "atexit.register(time.sleep, 600)\n"
        "print('before')\n"
        "utils.end_process(lambda: {}['key'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stdout) == (1, "before\n")
    assert result.stderr.endswith("KeyError: 'key'\n")


LIBRARY = """
import logging, warnings

def tell():
    for image in range(3):
        warnings.warn(f"damaged image {image}, of which there " + "may be many more " * 30)
    warnings.warn("too many workers\\nfor this machine")
    warnings.warn("too many workers\\nfor that machine")
    log = logging.getLogger("library")
    for _ in range(2):
        log.warning("%s\\nits reason\\nan advice", "compiled again")
    log.error("an error\\nits reason")
"""

OURS = """
import logging, os, warnings, library, utils
utils.quiet_libraries()
library.tell()
for layer in "ab":
    logging.getLogger("sparsity_factory").warning("%s: %s", layer, "as long as it has to be " * 30)
    warnings.warn(f"{layer}: " + "as long as it has to be " * 30)
os.environ["RANK"] = "1"
warnings.warn_explicit("on another process", UserWarning, library.__file__, 99)
utils.logs.is_main_process = lambda: False
logging.getLogger("sparsity_factory").warning("of another process of the run")
"""


def test_libraries_warn_in_a_short_line_once_on_the_first_process_and_this_project_in_full(
    tmp_path,
):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/library.py").write_text(LIBRARY)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'site-packages'}"}
    result = subprocess.run(
        [sys.executable, "-c", OURS], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    damaged, *others = result.stderr.splitlines()
    assert damaged.startswith("warning: damaged image 0, of which there may be many more may be")
    assert damaged.endswith(" ... (library.py)")
    assert len(damaged) < 150
    assert others[:4] == [
        "warning: too many workers (library.py)",
        "warning: compiled again (library)",
        "an error",
        "its reason",
    ]
    assert [line.count("as long as it has to be") for line in others[4:]] == [30] * 4
