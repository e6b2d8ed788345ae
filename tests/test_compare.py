"""benchmarks/compare.py: what is compared is run, shared and gone on with; docs/comparison.md says
what it gave.
"""

import argparse
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from sparsity_factory.list_methods import COMPARED
from trainer.arguments import recipe_of

pytestmark = pytest.mark.slow


@pytest.fixture
def modules(monkeypatch):
    """benchmarks/compare.py and comparison.py, as the first imports its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("compare", "comparison"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import compare
    import comparison

    return compare, comparison


@pytest.fixture
def small(modules, monkeypatch, tmp_path, tiny_fashion):
    """The comparison of two methods at one sparsity on the tiny data set."""
    compare, comparison = modules
    world = comparison.WORLDS["finetuned"]
    methods = {name: world.methods[name]._replace(levels=("0.9",)) for name in ("unif", "ste")}
    tuning = world.tunings[1]._replace(levels=("0.9",), tried=("0.9",), rates=(1e-3, 1e-2))
    world = world._replace(
        arguments=(*world.arguments, "--batch-size", "16"),
        models=("sample",),
        tunings=(tuning,),
        methods=methods,
    )
    monkeypatch.setitem(comparison.WORLDS, "finetuned", world)
    monkeypatch.delitem(comparison.WORLDS, "from scratch")
    monkeypatch.setattr(comparison, "SEEDS", (0, 1))
    monkeypatch.setattr(compare, "OUTPUT", tmp_path / "compare")
    monkeypatch.setattr(compare, "SAMPLE", 3)
    monkeypatch.setattr(compare, "HELD_OUT", 1)
    return compare, comparison, tiny_fashion


def test_every_run_has_a_recipe_that_is_not_refused(modules):
    compare, comparison = modules
    parsed = {}
    for task in comparison.all_tasks():
        if task.kind == comparison.FINETUNED and task.seed == 0:
            arguments = tuple(compare.arguments_of(task))
            if arguments not in parsed:
                parsed[arguments] = vars(compare.parse_sweep_args(arguments)[1])
            recipe_of(argparse.Namespace(**{**parsed[arguments], **task.run.choices})).check(1)


def test_all_is_measured_once_and_each_rate_is_the_best_of_its_trials(small, monkeypatch, capfd):
    compare, comparison, official = small
    compare.OUTPUT.mkdir()
    compare.compare(official)
    found = comparison.Results(compare.OUTPUT / "results.csv").read()
    assert [*found] == comparison.all_tasks()
    # Trials, right after pruning, dense, finetuned with two seeds
    assert len(found) == 4 + 1 + 1 + 2 * 2
    for task, result in found.items():
        if task.kind == comparison.FINETUNED:
            trials = {
                rate: found[task._replace(kind=comparison.TUNING, seed=0, rate=rate)].accuracy
                for rate in (1e-3, 1e-2)
            }
            assert trials[result.rate] == max(trials.values())
    assert not [*(compare.OUTPUT / "runs").iterdir()], "finished runs are known by their line"
    monkeypatch.setattr(compare.Bench, "measure", None)
    compare.compare(official)  # nothing is left to measure
    compare.write_results(comparison.Results(compare.OUTPUT / "results.csv"), compare.OUTPUT)
    assert "| `ste` |" in (compare.OUTPUT / "tables.md").read_text()
    assert (compare.OUTPUT / "compare_sample_schedule.png").exists()


def test_held_out_images_are_trained_on_by_none(small):
    compare, _, official = small
    compare.OUTPUT.mkdir()
    compare.make_images(official)
    parts = {
        (folder, part): compare.read_idx(
            compare.OUTPUT / "images" / folder, f"{part}-images-idx3-ubyte", 3
        )
        for folder in ("sample-held-out", "quarter-held-out", "all-test")
        for part in ("train", "t10k")
    }
    held_out = {image.tobytes() for image in parts["sample-held-out", "t10k"]}
    # Two classes have no more than the three images of the sample
    assert len(held_out) == 8
    for folder in ("sample-held-out", "quarter-held-out", "all-test"):
        assert not held_out & {image.tobytes() for image in parts[folder, "train"]}
    assert len(parts["all-test", "train"]) == 4 * len(parts["quarter-held-out", "train"]) == 48 - 8
    assert len(parts["all-test", "t10k"]) == 61


def test_work_that_another_process_has_is_left_to_it_until_it_is_killed(small):
    compare, _, _ = small
    hold = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; from trainer.run_folder import RunFolder; "
        "lock = RunFolder(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(compare.OUTPUT / "claims" / "it"), str(ROOT)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    done = []
    assert not compare.claimed("it", lambda: done.append(1))
    other.kill()
    other.wait()
    for _ in range(100):
        if compare.claimed("it", lambda: done.append(1)):
            break
        time.sleep(0.1)
    assert done == [1]


def test_a_table_has_the_means_and_ranges_of_the_levels_that_a_world_has(modules):
    _, comparison = modules
    found = {
        comparison.Task(
            "finetuned", "from scratch", "tiny", method, level, seed
        ): comparison.Result(accuracy, 1)
        for method, level, seed, accuracy in (
            ("dense", "0", 0, 88),
            ("set", "0.9", 0, 80),
            ("set", "0.9", 1, 81),
        )
    }
    assert comparison.tables(found) == {
        ("from scratch", "tiny", "finetuned"): """\
| top-1 in % | 0 % | 50 % | 80 % | 90 % | 95 % | 98 % | 2:4 | 1:4 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `dense` | 88.00 |  |  |  |  |  |  |  |
| `set` |  |  |  | 80.50 |  |  |  |  |""",
        ("from scratch", "tiny", comparison.RANGES): """\
| top-1 in % | 0 % | 50 % | 80 % | 90 % | 95 % | 98 % | 2:4 | 1:4 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `dense` | 88.00 |  |  |  |  |  |  |  |
| `set` |  |  |  | 80.50 (80.00 to 81.00) |  |  |  |  |""",
    }


def test_half_a_line_is_no_result(modules, tmp_path):
    _, comparison = modules
    results = comparison.Results(tmp_path / "results.csv")
    task = comparison.Task("finetuned", "finetuned", "sample", "least-squares, teacher", "2:4", 1)
    results.add(task, comparison.Result(90.5, 12.3, 6e-4))
    with open(results.path, "a") as file:
        file.write("finetuned,finetuned,sample,unif,0.5,")
    assert results.read() == {task: comparison.Result(90.5, 12, 6e-4)}


def test_the_page_has_the_tables_of_the_published_results(modules):
    _, comparison = modules
    page = (ROOT / "docs" / "comparison.md").read_text()
    found = comparison.tables(comparison.Results(ROOT / "docs" / "comparison.csv").read())
    assert found
    for table in found.values():
        assert table in page


def test_the_menu_names_what_is_compared(modules):
    _, comparison = modules
    fields = {
        "--score": "score",
        "--pruner": "pruner",
        "--prune-schedule": "prune_schedule",
        "--reconstruct": "reconstruct",
    }
    used = {flag: set() for flag in fields}
    for task in comparison.all_tasks():
        if task.kind == comparison.FINETUNED:
            for flag, field in fields.items():
                used[flag].add(task.run.choices[field])
    assert {flag: set(names) for flag, names in COMPARED.items()} == used
