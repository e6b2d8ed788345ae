"""Whole commands on a pretended GPU: no operation mixes devices, and numbers are those of the CPU."""

import contextlib
import json
from collections import Counter

import pytest
import torch
from conftest import write_idx
from made_up import pattern_for
from pretend_cuda import pretend_cuda

import main
import search
import sweep
from datasets import SAMPLE_PATH, read_idx
from engine import Progress
from sparsity_factory import PRUNERS, SCHEDULES, SCORES
from sparsity_factory.reconstruction import RECONSTRUCTIONS
from sparsity_factory.schedules import users_of
from trainer.stop_signals import Stopped

pytestmark = pytest.mark.slow

LAMP = "--pruner lamp --sparsity 0.5"
#: One of each kind, with a pruner that takes it. A model of two heads has few weights in them.
PATTERNS = {
    "unstructured": LAMP,
    "row": "--pruner unif --sparsity 0.5 --pattern row",
    "2:4": "--pruner unif --pattern 2:4",
    "2:4t": "--pruner unif --pattern 2:4t",
    "x:4": f"{LAMP} --pattern x:4",
    "block": f"{LAMP} --pattern block:4x4",
    "heads": "--pruner lamp --sparsity 0.1 --pattern heads",
    "neurons": "--pruner lamp --sparsity 0.3 --pattern neurons",
    "heads+neurons": "--pruner lamp --sparsity 0.3 --pattern heads+neurons",
}


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """12 training and 5 test images of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("few_images")
    for prefix, count in (("train", 12), ("t10k", 5)):
        for kind, ndim in (("images-idx3", 3), ("labels-idx1", 1)):
            name = f"{prefix}-{kind}-ubyte"
            write_idx(folder / name, read_idx(SAMPLE_PATH, name, ndim)[:count])
    return folder


@pytest.fixture
def few(few_images, tmp_path, monkeypatch) -> list[str]:
    """Arguments for a model of one block, in an empty folder; an epoch has three steps."""
    monkeypatch.chdir(tmp_path)
    arguments = (
        f"--data-set FASHION --data-path {few_images} --num_workers 0 --no-repeated-aug "
        "--model deit_sample_patch4_28 --model-kwargs depth=1 embed_dim=16 num_heads=2 "
        "--input-size 28 --no-pretrained --batch-size 4 --warmup-epochs 0 --amp off "
        "--calibration-images 6"
    )
    return arguments.split()


@pytest.fixture
def on_cuda(few):
    """Runs a command line of main.py on the pretended GPU."""

    def run(flags: str, command=main.command) -> None:
        with pretend_cuda():
            assert command([*few, "--epochs", "1", *flags.split()]) == 0

    return run


def weights(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


# ---- what is chosen ----


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_and_reconstruction_runs(on_cuda, pattern, reconstruction):
    on_cuda(f"--eval {PATTERNS[pattern]} --reconstruct {reconstruction}")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "heads+neurons"])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_runs(on_cuda, score, pattern):
    on_cuda(f"--eval {PATTERNS[pattern]} --score {score}")


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name != "custom"])
def test_every_pruner_runs(on_cuda, pruner):
    pattern = "x:4" if pruner == "search" else "unstructured"
    on_cuda(f"--eval --pruner {pruner} --sparsity 0.3 --pattern {pattern}")


def test_a_custom_configuration_runs(on_cuda, tmp_path):
    levels = {"default": 0.5, "*fc1*": [2, 4], "*proj*": "dense"}
    config = {"sparsity": {"mode": "nxm", "level": levels}}
    (tmp_path / "levels.yaml").write_text(json.dumps(config))
    on_cuda("--eval --pruner custom --custom-config levels.yaml --reconstruct obs")


@pytest.mark.parametrize("pattern", ["2:4", "2:4t", "x:4"])
@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_permutations_run(on_cuda, pattern, score):
    on_cuda(f"--eval {PATTERNS[pattern]} --permute --score {score} --reconstruct obs-mask")


@pytest.mark.parametrize("pattern", ["heads", "neurons", "heads+neurons"])
def test_shrunk_models_are_trained(on_cuda, pattern):
    flags = f"{PATTERNS[pattern]} --shrink --reconstruct least-squares --budget macs"
    on_cuda(f"{flags} --output_dir out")
    on_cuda("--resume out/checkpoint.pth --epochs 2 --output_dir out")


# ---- training ----


def schedule_flags(schedule: str) -> str:
    """A schedule with several changes within three steps."""
    flags = f"{PATTERNS[pattern_for(schedule)]} --prune-schedule {schedule} --prune-end 0.7"
    if schedule == "one-shot":
        return LAMP
    if schedule in users_of("prune_every"):
        flags += " --prune-every 1"
    if schedule in users_of("prune_rounds"):
        flags += " --prune-rounds 2"
    return flags


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_leaves_the_weights_that_it_leaves_on_the_cpu(on_cuda, few, schedule):
    flags = schedule_flags(schedule)
    on_cuda(f"{flags} --output_dir there")
    main.command([*few, "--epochs", "1", "--device", "cpu", *f"{flags} --output_dir here".split()])
    there, here = weights("there/checkpoint.pth"), weights("here/checkpoint.pth")
    assert there.keys() == here.keys()
    for name, weight in there.items():
        assert torch.equal(weight == 0, here[name] == 0), name
        torch.testing.assert_close(weight, here[name])


@pytest.mark.parametrize("schedule", ["rigl", "sr-ste", "maskllm"])
def test_a_run_resumes_to_the_bit_from_within_an_epoch(on_cuda, schedule, monkeypatch, tmp_path):
    flags = f"{schedule_flags(schedule)} --drop-path 0.2 --clip-grad 1"
    on_cuda(f"{flags} --output_dir whole")
    end_step = Progress.end_step

    def stop(progress, images):
        end_step(progress, images)
        if progress.step == 2:
            raise Stopped(15)

    monkeypatch.setattr(Progress, "end_step", stop)
    with contextlib.suppress(Stopped):
        on_cuda(f"{flags} --output_dir parts --checkpoint-every 1")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    on_cuda(f"{flags} --output_dir parts --resume parts/checkpoint.pth")

    whole, parts = weights("whole/checkpoint.pth"), weights("parts/checkpoint.pth")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    "flags",
    [
        "--prune-schedule gradual --prune-every 1 --score fisher --reconstruct obs",
        "--prune-schedule gradual --prune-every 1 --pattern heads+neurons",
        "--prune-schedule iterative --prune-rounds 2 --rewind 0 --score wanda",
        "--prune-schedule sr-ste --prune-every 1 --pattern x:4 --permute --amp bfloat16",
        "--prune-schedule maskllm --pattern x:4 --score wanda --amp float16",
        "--prune-schedule rigl --prune-every 1 --amp float16 --accum-iter 2 --opt muon",
    ],
)
def test_schedules_combine(on_cuda, flags):
    on_cuda(f"{LAMP} {flags} --output_dir out")


@pytest.mark.parametrize(
    "flags",
    [
        "--amp bfloat16",
        "--amp float16",
        "--amp float16 --clip-grad 1 --accum-iter 2",
        "--clip-grad 1",
        "--accum-iter 2",
        "--opt muon",
        "--opt sgd",
        "--opt lookahead_adamw",
        "--attn-only",
        "--train-only norms,biases,head --amp float16 --clip-grad 1",
        "--no-train-mode",
        "--drop 0.1 --drop-path 0.1",
        "--sched step --lr-noise 0.1 0.9",
        "--cosub",
        "--cosub --bce-loss",
        "--bce-loss",
        "--mixup 0 --cutmix 0 --smoothing 0",
        "--mixup-mode elem",
        "--mixup-mode pair",
        "--cutmix-minmax 0.2 0.8",
        "--reprob 1",
        "--reprob 1 --remode rand --recount 2",
        "--ThreeAugment --src",
        "--repeated-aug",
        "--no-pin-mem",
        "--no-model-ema",
        "--model-ema --model-ema-force-cpu",
    ],
)
def test_recipes_run(on_cuda, flags):
    on_cuda(f"{LAMP} {flags}")


@pytest.fixture
def dense(on_cuda) -> str:
    """A checkpoint of a dense run."""
    on_cuda("--output_dir dense")
    return "dense/checkpoint.pth"


def test_a_dense_teacher_runs(on_cuda, dense):
    flags = f"--finetune {dense} --dense-teacher 0.5 {LAMP} --output_dir out"
    on_cuda(flags)
    on_cuda("--resume out/checkpoint.pth --dense-teacher 0.5 --epochs 2 --output_dir out")


def test_a_model_without_a_head_runs(on_cuda, dense):
    on_cuda(f"--finetune {dense} --num-classes 0 {LAMP} --output_dir out")
    on_cuda("--resume out/checkpoint.pth --eval")


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_runs(on_cuda, kind):
    teacher = "--teacher-model resnet10t --teacher-path"
    student = "--model deit_tiny_distilled_patch16_224 --input-size 32"
    on_cuda("--model resnet10t --model-kwargs in_chans=3 --input-size 32 --output_dir teacher")
    on_cuda(f"{student} {LAMP} --distillation-type {kind} {teacher} teacher/checkpoint.pth")


# ---- files ----


@pytest.mark.parametrize("average", ["", "--model-ema-force-cpu"])
def test_checkpoints_are_evaluated_finetuned_audited_and_exported(on_cuda, average, tmp_path):
    on_cuda(f"{PATTERNS['heads+neurons']} --model-ema {average} --output_dir out")
    on_cuda("--eval --resume out/checkpoint.pth")
    on_cuda("--eval --resume out/checkpoint.pth --use-ema --sparse-kernels")
    on_cuda("--finetune out/checkpoint.pth --input-size 32")
    on_cuda("--audit out/checkpoint.pth")
    on_cuda("--resume out/checkpoint.pth --export exported")
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_predictions_are_read_in_three_waits_whatever_the_number_of_batches(few):
    found = []
    for size in (2, 4):
        with pretend_cuda() as waits:
            main.command([*few, "--epochs", "1", "--batch-size", f"{size}", *LAMP.split()])
        found.append({place: n for place, n in waits.items() if "epochs.py" in place})
    # Of the dense model and of the finetuned one: targets, classes and confidences
    assert [sum(places.values()) for places in found] == [6, 6]


def test_a_sweep_runs(few, tmp_path):
    with pretend_cuda():
        flags = "--pruners lamp erk --sparsities 0.5 --finetune-epochs 1 --reconstructions obs"
        assert sweep.sweep([*few, *flags.split()]) == 0
    assert (tmp_path / "output/sweep/sweep.csv").exists()


@pytest.mark.parametrize("measure", search.MEASURES)
def test_a_search_runs(few, tmp_path, measure):
    with pretend_cuda():
        flags = f"--budget 0.6 --levels 2:4 dense --exchanges 1 --measure {measure}"
        assert search.search([*few, *flags.split()]) == 0
    assert json.loads((tmp_path / "output/search/measured.jsonl").read_text().splitlines()[0])


# ---- waits ----

#: The steps of twelve at which masks change.
CHANGES = {
    "one-shot": set(),
    "gradual": {4, 8, 9},
    "iterative": {9},
    "set": {4, 8},
    "rigl": {4, 8},
    "ac-dc": {3, 6, 9},
    "ste": {4, 8},
    "sr-ste": {4, 8},
    "maskllm": {9},
}
#: Of a change: are gradients finite, are scores, how many weights are left, how many does each
#: layer keep.
MOST_WAITS = 4
#: As well: are weights finite, sums of scores and of nonzero weights, two checks of scores and what
#: is left of each layer for the allocation.
MOST_WAITS_OF_UNITS = 9


@pytest.fixture
def waits_by_step(few, monkeypatch):
    """Trains some blocks for twelve steps; returns the waits of each step from number 2 on."""

    def run(flags: str, depth: int = 2) -> dict[int, Counter]:
        end_step = Progress.end_step
        so_far = []

        def counting(progress, images):
            end_step(progress, images)
            so_far.append(waits.copy())

        monkeypatch.setattr(Progress, "end_step", counting)
        argv = "--epochs 1 --batch-size 1 --mixup 0 --cutmix 0 --print-freq 100"
        model = f"--model-kwargs depth={depth} embed_dim=16 num_heads=2"
        with pretend_cuda() as waits:
            main.command([*few, *f"{argv} {model} {flags}".split()])
        monkeypatch.setattr(Progress, "end_step", end_step)
        # The line of the log after step 0 belongs to step 1
        return {step: so_far[step] - so_far[step - 1] for step in range(2, 12)}

    return run


def of_twelve_steps(schedule: str, pruned: str = "") -> str:
    flags = f"{pruned or PATTERNS[pattern_for(schedule)]} --prune-schedule {schedule}"
    if schedule in users_of("prune_every"):
        flags += " --prune-every 4"
    if schedule in users_of("prune_rounds"):
        flags += " --prune-rounds 2"
    return flags


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_waits_only_to_change_masks_and_then_no_more_for_more_layers(
    waits_by_step, schedule
):
    found = waits_by_step(f"{of_twelve_steps(schedule)} --clip-grad 1 --model-ema")
    assert {step for step, waits in found.items() if waits} == CHANGES[schedule], found
    assert all(waits.total() <= MOST_WAITS for waits in found.values()), found


@pytest.mark.parametrize(
    "pruned",
    [
        PATTERNS["2:4"],
        PATTERNS["2:4t"],
        PATTERNS["row"],
        f"{PATTERNS['x:4']} --amp bfloat16",
        PATTERNS["block"],
        "--pruner glob --sparsity 0.5 --amp float16 --clip-grad 1",
        "--pruner erk --sparsity 0.5 --cosub",
    ],
)
def test_a_change_of_masks_waits_no_more_for_more_layers(waits_by_step, pruned):
    found = waits_by_step(of_twelve_steps("gradual", pruned))
    assert {step for step, waits in found.items() if waits} == CHANGES["gradual"], found
    assert all(waits.total() <= MOST_WAITS for waits in found.values()), found


@pytest.mark.parametrize("pattern", ["heads", "neurons", "heads+neurons"])
def test_a_change_of_whole_units_waits_no_more_for_more_blocks(waits_by_step, pattern):
    flags = of_twelve_steps("gradual", PATTERNS[pattern])
    one, two = (waits_by_step(flags, depth)[4] for depth in (1, 2))
    assert one == two and two.total() <= MOST_WAITS_OF_UNITS


def test_an_average_in_the_cpus_memory_adds_one_wait_to_a_step(waits_by_step):
    found = waits_by_step("--model-ema --model-ema-force-cpu")
    assert [waits.total() for waits in found.values()] == [1] * 10


@pytest.mark.parametrize("average", ["--model-ema", "--no-model-ema"])
def test_an_epoch_waits_once_for_each_line_of_the_log_and_once_at_its_end(few, average):
    with pretend_cuda() as waits:
        argv = f"--epochs 2 --batch-size 2 {average} --print-freq 3"
        main.command([*few, *argv.split()])
    # Training has lines after batches 0, 3 and 5, the evaluation after 0 and 1
    assert sum(count for place, count in waits.items() if "utils/logs.py" in place) == 2 * (3 + 2)
    # Predictions are read once at the end, if at all
    assert not any("epochs.py" in place or "predictions.py" in place for place in waits)
    # The weights are finite, and the sums of the evaluation, of one model or two
    assert sum(count for place, count in waits.items() if "engine.py" in place) == 2 * (1 + 1)
