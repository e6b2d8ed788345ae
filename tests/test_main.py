"""Whole runs of the command line, on a tiny data set and on the built-in sample."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, start_main
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

import utils
from benchmarks.torture import differences
from sparsity_factory import unpack
from trainer.arguments import read_preset
from trainer.run_folder import RunFolder, read_log

pytestmark = pytest.mark.slow

LAMP = ["--pruner", "lamp", "--sparsity", "0.65"]


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_first_command_prunes_the_sample_finetunes_it_and_says_how_good_it_is(tmp_path):
    result = start_main(*LAMP, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "built-in sample" in result.stdout
    assert "--data-path" in result.stdout
    assert re.search(
        r"blocks\.0\.attn\.qkv\.weight +288 x 96 +[\d,]+ +27,648 +\d+\.\d+%", result.stdout
    )
    assert re.search(r"prunable weights +232,243 +663,552 +65\.00%", result.stdout)
    assert re.search(
        r"Epoch: \[0\]  \[50/93\]  eta: \d:\d\d:\d\d  lr: [\d.]+  loss: ", result.stdout
    )
    accuracy = re.search(
        r"dense ([\d.]+) %, pruned ([\d.]+) %, finetuned ([\d.]+) %", result.stdout
    )
    dense, pruned, finetuned = map(float, accuracy.groups())
    assert dense > 89
    assert pruned < finetuned
    assert finetuned > dense - 1
    folder = tmp_path / "output" / "sample"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "checkpoint.pth",
        "best_checkpoint.pth",
        "log.txt",
        "sparsity.csv",
        "sparsity.png",
        "sparsity.yaml",
        "training.png",
        "classes.csv",
        "classes.png",
        "predictions.csv",
        "summary.md",
    }
    assert "output/sample" in result.stdout


def test_a_checkpoint_is_plain_and_its_pruned_weights_are_zero(run_main, tiny, tmp_path):
    run_main(*tiny, *LAMP, "--output_dir", "out", "--clip-grad", "1")
    checkpoint = read(tmp_path / "out/checkpoint.pth")
    assert {
        "model",
        "optimizer",
        "lr_scheduler",
        "epoch",
        "model_ema",
        "scaler",
        "args",
        "masks",
        "pruner",
        "step",
    } <= checkpoint.keys()
    assert checkpoint["pruner"] == {"name": "lamp", "sparsity": 0.65, "custom_config": None}
    assert checkpoint["epoch"] == 0
    assert checkpoint["step"] == 3
    timm.create_model("deit_sample_patch4_28").load_state_dict(checkpoint["model"])
    for name, mask in unpack(checkpoint["masks"]).items():
        for weights in (checkpoint["model"], checkpoint["model_ema"]):
            assert not weights[name][~mask].any()
            assert weights[name][mask].all()


def test_log_txt_has_a_json_object_per_epoch(run_main, tiny, tmp_path):
    run_main(*tiny, *LAMP, "--output_dir", "out", "--epochs", "2")
    lines = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {
        "train_lr",
        "train_loss",
        "test_loss",
        "test_acc1",
        "test_acc5",
        "n_parameters",
    } <= lines[0].keys()


def test_resume_continues_to_the_bit_and_knows_its_masks(run_main, tiny, tmp_path, monkeypatch):
    recipe = [*tiny, "--epochs", "3", "--drop-path", "0.2", "--clip-grad", "1"]
    run_main(*recipe, *LAMP, "--output_dir", "whole")
    save = RunFolder.save

    def stop_after_the_first_epoch(*arguments):
        save(*arguments)
        raise utils.UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", stop_after_the_first_epoch)
        run_main(*recipe, *LAMP, "--output_dir", "parts", status=2)
    run_main(*recipe, "--output_dir", "parts", "--resume", "parts/checkpoint.pth")
    whole, parts = (read(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    assert whole["step"] == parts["step"] == 9
    assert parts["pruner"]["name"] == "lamp"


def test_options_are_in_the_checkpoint_and_in_the_summary_and_a_resumed_run_has_them(
    run_main, tiny, tmp_path
):
    recipe = [*tiny, "--pruner", "alpha", "--sparsity", "0.8", "--output_dir", "out"]
    (tmp_path / "run.yaml").write_text("method-options: [alpha.tau=0.1]\n")
    options = ["--config", "run.yaml", "--method-options", "alpha.tau=0.4"]
    run_main(*recipe, *options)

    saved = read(tmp_path / "out/checkpoint.pth")
    assert saved["pruning"]["recipe"]["method_options"] == {"alpha.tau": 0.4}
    told = "- recipe: --pruner alpha --sparsity 0.8 --method-options alpha.tau=0.4\n"
    assert told in (tmp_path / "out/summary.md").read_text()

    resume = ["--resume", "out/checkpoint.pth", "--epochs", "2"]
    error = run_main(*recipe, *resume, "--method-options", "alpha.tau=0.3", status=2)
    assert "alpha.tau=0.3: out/checkpoint.pth is of a run with" in error
    assert "alpha.tau=0.4" in error
    run_main(*recipe, *options, *resume)
    assert told in (tmp_path / "out/summary.md").read_text()


def test_the_choice_of_layers_is_kept_by_checkpoints_and_resumed_runs(run_main, tiny, tmp_path):
    layers = ["--layers", "blocks.*", "!blocks.0.*", "--layers", "!*.fc2"]
    output = run_main(*tiny, *LAMP, *layers, "--output_dir", "out")
    table = output[output.index("layer  ") :]
    assert "blocks.1.attn.qkv" in table and "blocks.0." not in table and ".fc2" not in table

    saved = read(tmp_path / "out" / "checkpoint.pth")
    assert saved["pruning"]["recipe"]["layers"] == ["blocks.*", "!blocks.0.*", "!*.fc2"]
    assert not [name for name in saved["masks"] if "blocks.0." in name or ".fc2." in name]

    again = ["--resume", "out/checkpoint.pth", "--epochs", "2"]
    error = run_main(*tiny, *LAMP, "--layers", "blocks.*", *again, status=2)
    assert "--layers blocks.* !blocks.0.* !*.fc2" in error
    output = run_main(*tiny, *again, "--output_dir", "out")
    sparsity = re.search(r"prunable weights .* (\S+)%", output)[1]
    assert float(sparsity) == pytest.approx(65, abs=0.01)
    assert "kept" in run_main("--audit", "out/checkpoint.pth")


@pytest.fixture
def pruned(run_main, tiny, tmp_path, once):
    """A checkpoint of a pruned run, from the one folder for all tests."""
    folder = once("pruned", lambda folder: run_main(*tiny, *LAMP, "--output_dir", folder))
    shutil.copytree(folder, tmp_path / "pruned")
    return "pruned/checkpoint.pth"


def test_resume_with_other_pruning_flags_is_refused(run_main, tiny, pruned):
    for flags in (
        ["--pruner", "glob", "--sparsity", "0.65"],
        ["--pruner", "lamp", "--sparsity", "0.5"],
    ):
        error = run_main(*tiny, *flags, "--resume", pruned, status=2)
        assert "lamp" in error
        assert "--finetune" in error
    run_main(*tiny, *LAMP, "--resume", pruned, "--epochs", "2")


def test_a_pruned_checkpoint_is_evaluated_as_it_was_left(run_main, tiny, pruned):
    outputs = [run_main(*tiny, "--eval", flag, pruned) for flag in ("--resume", "--finetune")]
    accuracies = {re.search(r"\* Acc@1 ([\d.]+)", output)[1] for output in outputs}
    assert len(accuracies) == 1
    assert all("65.00%" in output for output in outputs)


def test_finetune_keeps_the_masks_unless_a_pruner_asks_for_new_ones(
    run_main, tiny, pruned, tmp_path
):
    run_main(*tiny, "--finetune", pruned, "--output_dir", "kept")
    run_main(
        *tiny, "--finetune", pruned, "--output_dir", "anew", "--pruner", "glob", "--sparsity", "0.8"
    )
    old, kept, anew = (
        read(tmp_path / name / "checkpoint.pth") for name in ("pruned", "kept", "anew")
    )
    assert same(unpack(old["masks"]), unpack(kept["masks"]))
    assert old["pruner"] == kept["pruner"]
    assert anew["pruner"]["name"] == "glob"
    masks = unpack(anew["masks"])
    assert sum(int(mask.sum()) for mask in masks.values()) == round(
        0.2 * sum(m.numel() for m in masks.values())
    )


def test_a_dense_checkpoint_is_pruned_after_it_is_loaded(run_main, tiny):
    run_main(*tiny, "--output_dir", "dense")
    output = run_main(*tiny, *LAMP, "--eval", "--resume", "dense/checkpoint.pth")
    assert "65.00%" in output
    assert re.search(r"dense [\d.]+ %, pruned [\d.]+ %$", output.strip())


def test_a_dense_run_is_not_continued_as_a_pruned_one(run_main, tiny):
    run_main(*tiny, "--output_dir", "dense")
    assert "--finetune" in run_main(*tiny, *LAMP, "--resume", "dense/checkpoint.pth", status=2)


def test_bare_weights_from_elsewhere_are_pruned_and_trained(run_main, tiny, tmp_path):
    torch.save(
        {"model": timm.create_model("deit_sample_patch4_28").state_dict()},
        tmp_path / "released.pth",
    )
    run_main(*tiny, *LAMP, "--resume", "released.pth", "--output_dir", "out")
    assert read(tmp_path / "out/checkpoint.pth")["pruner"]["name"] == "lamp"


def test_resume_with_another_optimizer_or_schedule_is_refused(run_main, tiny, pruned, tmp_path):
    for flags in (["--opt", "sgd"], ["--sched", "step"]):
        error = run_main(
            *tiny, *flags, "--resume", pruned, "--epochs", "2", "--output_dir", "new", status=2
        )
        assert flags[1] in error
        assert "adamw" in error or "cosine" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("masks", {}),
        ("masks", {"a": 1}),
        ("pruner", 3),
        ("pruning", 3),
        ("pruning", {}),
        ("epoch", "x"),
        ("optimizer", {}),
        ("lr_scheduler", 1),
    ],
)
def test_a_checkpoint_with_a_damaged_part_is_refused_or_does_without_it(
    run_main, tiny, pruned, tmp_path, key, value
):
    checkpoint = read(tmp_path / pruned)
    if key == "pruner":
        del checkpoint["pruning"]  # as in a checkpoint of before there was that entry
    torch.save({**checkpoint, key: value}, tmp_path / "damaged.pth")
    flags = [*tiny, "--resume", "damaged.pth", "--epochs", "2", "--output_dir", "new"]
    if (key, value) == ("masks", {}):
        run_main(*flags)
    else:
        assert "damaged.pth" in run_main(*flags, status=2)
        assert not (tmp_path / "new").exists()


def test_without_a_pruner_it_trains_dense(run_main, tiny, tmp_path):
    run_main(*tiny, "--no-pretrained", "--output_dir", "out")
    checkpoint = read(tmp_path / "out/checkpoint.pth")
    assert "masks" not in checkpoint
    assert all(
        value.all() for name, value in checkpoint["model"].items() if name.endswith("qkv.weight")
    )


def test_a_custom_yaml_prunes_and_is_remembered(run_main, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(
        'sparsity:\n  mode: nxm\n  level: {default: 2:4, "blocks.0.*": dense}\n'
    )
    output = run_main(
        *tiny, "--pruner", "custom", "--custom-config", "c.yaml", "--output_dir", "out"
    )
    assert re.search(r"blocks\.0\.attn\.qkv\.weight .* 0\.00%", output)
    assert re.search(r"blocks\.1\.attn\.qkv\.weight .* 50\.00%", output)
    mask = unpack(read(tmp_path / "out/checkpoint.pth")["masks"])["blocks.1.mlp.fc1.weight"]
    assert (mask.reshape(-1, 4).sum(1) == 2).all()
    run_main(
        *tiny,
        "--pruner",
        "custom",
        "--custom-config",
        "c.yaml",
        "--epochs",
        "2",
        "--resume",
        "out/checkpoint.pth",
    )


UNMIXED = ["--mixup", "0", "--cutmix", "0"]


@pytest.mark.parametrize(
    "common, flags",
    [
        ([], ["--bce-loss"]),
        (UNMIXED, ["--bce-loss"]),
        ([], ["--repeated-aug"]),
        ([], ["--mixup-mode", "elem"]),
        ([], ["--cutmix-minmax", "0.2", "0.8"]),
        ([], ["--opt", "sgd"]),
        ([], ["--amp", "bfloat16"]),
        ([], ["--amp", "float16"]),
        (UNMIXED, ["--smoothing", "0"]),
        ([], ["--cosub"]),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_flag_that_changes_the_steps_gives_other_weights(
    run_main, tiny, tmp_path, once, common, flags
):
    recipe = [*tiny, *LAMP, *common, "--no-model-ema", "--output_dir"]
    without = once(
        f"without_{'mixing' if common else 'flags'}", lambda folder: run_main(*recipe, folder)
    )
    run_main(*recipe, "with", *flags)
    first, second = read(without / "checkpoint.pth"), read(tmp_path / "with/checkpoint.pth")
    assert same(unpack(first["masks"]), unpack(second["masks"]))
    for key, mask in unpack(first["masks"]).items():
        assert torch.equal(second["model"][key] != 0, mask)
    assert all(
        not torch.equal(weight, second["model"][key]) for key, weight in first["model"].items()
    )


def test_attn_only_leaves_all_but_attention_position_embedding_and_head_as_pruned(
    run_main, tiny, tmp_path
):
    run_main(*tiny, *LAMP, "--attn-only", "--output_dir", "out")
    start, masks = timm.create_model("deit_sample_patch4_28", pretrained=True).state_dict(), None
    checkpoint = read(tmp_path / "out/checkpoint.pth")
    masks = unpack(checkpoint["masks"])
    moved = {
        key
        for key, weight in checkpoint["model"].items()
        if not torch.equal(weight, start[key] * masks.get(key, torch.ones(())))
    }
    assert moved == {
        key for key in start if ".attn." in key or key in ("pos_embed", "head.weight", "head.bias")
    }


FEW = "norms,biases,head"


def test_train_only_moves_these_kinds_alone_as_a_training_of_all_would(run_main, tiny, tmp_path):
    step = [*tiny, *LAMP, "--batch-size", "48", "--opt", "sgd", "--no-repeated-aug"]
    printed = run_main(*step, "--train-only", FEW, "--output_dir", "few")
    run_main(*step, "--train-only", FEW, "--grad-checkpointing", "--output_dir", "checkpointed")
    run_main(*step, "--output_dir", "all")

    few, checkpointed, whole = (
        read(tmp_path / name / "checkpoint.pth") for name in ("few", "checkpointed", "all")
    )
    assert whole["step"] == 1 and same(few["model"], checkpointed["model"])
    start = timm.create_model("deit_sample_patch4_28", pretrained=True).state_dict()
    masks = unpack(few["masks"])
    trained = {key for key in start if re.search(r"norm|bias|head", key)}
    for key, weight in few["model"].items():
        pruned = start[key] * masks.get(key, torch.ones(()))
        assert not torch.equal(whole["model"][key], pruned)
        if key in trained:
            torch.testing.assert_close(weight, whole["model"][key], rtol=0, atol=1e-7)
        else:
            assert torch.equal(weight, pruned)

    # The optimizer knows no others
    count = sum(start[key].numel() for key in trained)
    total = sum(weight.numel() for weight in start.values())
    assert f"{count:,} of {total:,} parameters are trained ({100 * count / total:.2g} %)" in printed
    values = [state["momentum_buffer"] for state in few["optimizer"]["state"].values()]
    assert sum(value.numel() for value in values) == count
    log_line = json.loads((tmp_path / "few/log.txt").read_text().splitlines()[-1])
    assert log_line["n_parameters"] == count


def test_train_only_resumes_to_the_bit_and_with_no_other_kinds(run_main, tiny, tmp_path, stop_at):
    recipe = [*tiny, "--layer-decay", "0.8", "--dense-teacher", "0.5", "--clip-grad", "1"]
    recipe += [*LAMP, "--prune-schedule", "gradual", "--prune-every", "1", "--train-only", FEW]
    run_main(*recipe, "--output_dir", "whole")
    stop_at(2)
    run_main(*recipe, "--output_dir", "parts", status=143)
    resume = [*tiny, "--output_dir", "parts", "--resume", "parts/checkpoint.pth"]
    error = run_main(*resume, "--train-only", "norms", status=2)
    assert f"--train-only norms: parts/checkpoint.pth is of a run with --train-only {FEW}" in error

    assert "parameters are trained" in run_main(*resume)
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_train_only_says_so_if_a_new_head_stays_random(run_main, tiny, tmp_path):
    run_main(*tiny, "--output_dir", "ten")
    three = read(tmp_path / "ten/checkpoint.pth")["model"]
    three["head.weight"], three["head.bias"] = three["head.weight"][:3], three["head.bias"][:3]
    torch.save({"model": three}, tmp_path / "three.pth")

    warned = "the head is new, and stays random"
    for kinds, warns in (("norms", True), (FEW, False)):
        printed = run_main(*tiny, "--finetune", "three.pth", "--train-only", kinds)
        assert (warned in printed) == warns
    assert warned not in run_main(
        *tiny, "--finetune", "ten/checkpoint.pth", "--train-only", "norms"
    )


def test_train_only_trains_backbones_and_models_without_their_pruned_units(
    run_main, tiny, tmp_path
):
    few = ["--train-only", FEW]
    printed = run_main(*tiny, *LAMP, "--num-classes", "0", *few)
    assert re.search(r"([\d,]+) of [\d,]+ parameters are trained", printed)

    units = ["--pruner", "unif", "--sparsity", "0.5", "--pattern", "neurons", "--shrink"]
    printed = run_main(*tiny, *units, *few, "--output_dir", "out")
    smaller = sum(w.numel() for w in read(tmp_path / "out/checkpoint.pth")["model"].values())
    assert f" of {smaller:,} parameters are trained" in printed


def test_a_pruned_student_learns_from_a_pruned_teacher_and_resumes(run_main, tiny, tmp_path):
    recipe = [*tiny, *LAMP, "--input-size", "32", "--no-pretrained"]
    run_main(*recipe, "--output_dir", "teacher")
    student = [
        *recipe,
        "--model",
        "deit_tiny_distilled_patch16_224",
        "--output_dir",
        "student",
        "--distillation-type",
        "soft",
        "--teacher-model",
        "deit_sample_patch4_28",
        "--teacher-path",
        "teacher/checkpoint.pth",
    ]
    run_main(*student)
    assert "Training epochs 1 to 1" in run_main(*student, "--resume", "auto", "--epochs", "2")


def test_an_interrupted_write_leaves_the_old_checkpoint_whole(tmp_path):
    utils.save_checkpoint({"a": 1}, tmp_path / "c.pth")
    with pytest.raises(Exception, match="pickle"):
        utils.save_checkpoint({"a": lambda: 1}, tmp_path / "c.pth")
    assert read(tmp_path / "c.pth") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_every_run_preset_is_valid():
    for path in (ROOT / "configs" / "run").glob("*.yaml"):
        assert read_preset(path)


def test_accumulated_batches_train_as_larger_ones_do_with_the_same_learning_rate(
    run_main, tiny, tmp_path
):
    plain = [*tiny, *LAMP, "--drop-path", "0", "--mixup", "0", "--cutmix", "0", "--reprob", "0"]
    run_main(*plain, "--batch-size", "16", "--output_dir", "whole")
    run_main(*plain, "--batch-size", "8", "--accum-iter", "2", "--output_dir", "parts")
    whole, parts = (read(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 3
    assert (
        whole["optimizer"]["param_groups"][0]["lr"] == parts["optimizer"]["param_groups"][0]["lr"]
    )
    for name, weight in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], weight, rtol=1e-3, atol=1e-5)


def test_compile_trains_as_without_and_compiles_each_shape_for_itself(
    run_main, tiny, tmp_path, monkeypatch
):
    """By the compiler's back end that generates no code, since the usual one takes minutes."""
    counter, compile_model = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda model, **options: compile_model(model, backend=counter, **options),
    )
    recipe = [*tiny, *LAMP, "--drop-path", "0.2", "--no-model-ema"]
    run_main(*recipe, "--output_dir", "plain")
    assert counter.frame_count == 0
    run_main(*recipe, "--output_dir", "compiled", "--compile")
    inputs = [
        node.meta["example_value"].shape
        for graph in counter.graphs
        for node in graph.graph.nodes
        if node.op == "placeholder"
    ]
    assert all(isinstance(size, int) for shape in inputs for size in shape)
    # Batches of 16 to train; of 24 and, at the end, 13 to evaluate
    assert counter.frame_count == 3
    plain, compiled = (
        read(tmp_path / name / "checkpoint.pth")["model"] for name in ("plain", "compiled")
    )
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-5)


def test_the_mode_of_the_compiler_reaches_the_model_its_average_and_its_teacher(
    run_main, tiny, monkeypatch
):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda model, **options: compiled.append((model, options))
    )
    flags = ["--compile", "--compile-mode", "reduce-overhead", "--dense-teacher", "0.5"]
    run_main(*tiny, *LAMP, *flags)
    assert len({id(model) for model, _ in compiled}) == 3
    assert all(options == {"dynamic": False, "mode": "reduce-overhead"} for _, options in compiled)


def test_a_compiled_model_and_its_average_share_their_code(run_main, tiny, monkeypatch):
    counter, compile_model = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda model, **options: compile_model(model, backend=counter, **options),
    )
    run_main(*tiny, "--compile", "--epochs", "2")
    # Batches of 16 to train; of 24 and, at the end, 13 to evaluate
    assert counter.frame_count == 3


def test_compile_needs_a_compiler(run_main, tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run_main(*tiny, "--compile", status=2).startswith("error: --compile: ")


# ---- resuming with other arguments ----


@pytest.fixture
def bare(tiny):
    """The arguments of `tiny` without its --epochs and --warmup-epochs."""
    return [*tiny[: tiny.index("--epochs")], *tiny[tiny.index("--warmup-epochs") + 2 :]]


def learning_rates(folder):
    return [line["train_lr"] for line in read_log(folder)]


def test_a_resumed_run_has_the_schedule_of_its_checkpoint_unless_flags_say_otherwise(
    run_main, bare, tmp_path
):
    schedule = [
        "--warmup-epochs",
        "1",
        "--lr",
        "0.1",
        "--unscale-lr",
        "--weight-decay",
        "0.3",
        "--opt",
        "sgd",
    ]
    run_main(*bare, *schedule, "--epochs", "4", "--output_dir", "whole")
    run_main(*bare, *schedule, "--epochs", "2", "--output_dir", "longer")
    output = run_main(
        *bare, "--epochs", "4", "--resume", "longer/checkpoint.pth", "--output_dir", "longer"
    )
    assert "The run resumes with --epochs 4 instead of 2\n" in output
    assert learning_rates(tmp_path / "longer")[2:] == learning_rates(tmp_path / "whole")[2:]
    assert (
        read(tmp_path / "longer/checkpoint.pth")["optimizer"]["param_groups"][1]["weight_decay"]
        == 0.3
    )
    assert "Training epochs 4 to 3" in run_main(*bare, "--resume", "longer/checkpoint.pth")


def test_a_resumed_run_continues_its_whole_recipe_and_tells_what_is_given_instead(
    run_main, tiny, tmp_path, stop_at
):
    recipe = [*tiny, *LAMP, "--prune-schedule", "gradual", "--prune-every", "1"]
    changes = "--seed 3 --batch-size 6 --accum-iter 2 --mixup 0.5 --drop-path 0.3 --reprob 0.5"
    changes += " --aa rand-m5-n1 --opt-betas 0.8 0.9 --model-ema-decay 0.5 --warmup-epochs 1"
    recipe += changes.split()
    run_main(*recipe, "--output_dir", "whole")
    stop_at(2)
    run_main(*recipe, "--output_dir", "parts", status=128 + signal.SIGTERM)
    shutil.copytree("parts", "told")

    resumed = ["--num_workers", "0", "--resume", "auto", "--output_dir"]
    output = run_main(*resumed, "parts")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    assert "The run resumes with" not in output and "built-in sample" not in output

    output = run_main(*resumed, "told", "--mixup", "0", "--seed", "4", "--reprob", "0.5")
    assert "The run resumes with --seed 4 instead of 3, --mixup 0.0 instead of 0.5\n" in output


def test_flags_of_a_resumed_run_change_rate_decay_and_lowest_rate(run_main, bare, tmp_path):
    common = ["--epochs", "3", "--warmup-epochs", "0", "--unscale-lr"]
    run_main(
        *bare,
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--lr",
        "0.1",
        "--unscale-lr",
        "--output_dir",
        "out",
    )
    changed = [*common, "--lr", "0.01", "--weight-decay", "0.2", "--min-lr", "1e-3"]
    output = run_main(*bare, *changed, "--resume", "out/checkpoint.pth", "--output_dir", "out")
    assert "--lr 0.01 instead of 0.1" in output
    run_main(*bare, *changed, "--output_dir", "fresh")
    assert learning_rates(tmp_path / "out")[1:] == learning_rates(tmp_path / "fresh")[1:]
    groups = read(tmp_path / "out/checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]


def test_a_resumed_run_with_other_batches_has_the_rate_for_its_images_a_step(
    run_main, bare, tmp_path
):
    common = ["--epochs", "2", "--warmup-epochs", "0", "--lr", "0.1"]
    run_main(*bare, *common, "--output_dir", "whole", "--batch-size", "8")
    run_main(*bare, *common, "--epochs", "1", "--output_dir", "out")
    output = run_main(
        *bare, *common, "--resume", "out/checkpoint.pth", "--output_dir", "out", "--batch-size", "8"
    )
    assert "The learning rate is 0.0015625 instead of 0.003125, for 8 images a step" in output
    assert learning_rates(tmp_path / "out")[1:] == learning_rates(tmp_path / "whole")[1:]


def test_a_long_warm_up_is_told(run_main, tiny):
    assert "rate rises" not in run_main(*tiny, "--epochs", "3", "--warmup-epochs", "1")
    half = "--warmup-epochs 1: the learning rate rises in 1 of 2 epochs\n"
    assert half in run_main(*tiny, "--epochs", "2", "--warmup-epochs", "1")
    whole = "the learning rate rises in 1 of 1 epochs, and never reaches its highest value\n"
    assert whole in run_main(*tiny, "--warmup-epochs", "5")


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_the_plateau_schedule_resumes_with_what_it_has_counted(run_main, bare, tmp_path):
    recipe = [
        *bare,
        "--warmup-epochs",
        "0",
        "--sched",
        "plateau",
        "--patience-epochs",
        "0",
        "--decay-rate",
        "0.5",
        # The accuracy never changes
        "--opt",
        "sgd",
        "--lr",
        "1e-6",
        "--unscale-lr",
        "--min-lr",
        "0",
    ]
    run_main(*recipe, "--epochs", "4", "--output_dir", "whole")
    run_main(*recipe, "--epochs", "2", "--output_dir", "parts")
    run_main(*recipe, "--epochs", "4", "--resume", "parts/checkpoint.pth", "--output_dir", "parts")
    assert learning_rates(tmp_path / "parts") == learning_rates(tmp_path / "whole")
    assert len(set(learning_rates(tmp_path / "whole"))) > 1


@pytest.mark.parametrize(
    "key, value", [("epochs", "many"), ("lr", -1.0), ("opt_betas", [2.0, 3.0]), ("lr", [1.0])]
)
def test_arguments_that_no_run_can_have_are_refused_in_a_checkpoint_too(
    run_main, bare, tiny, tmp_path, key, value
):
    run_main(*tiny, "--output_dir", "out")
    checkpoint = read(tmp_path / "out/checkpoint.pth")
    torch.save({**checkpoint, "args": {**checkpoint["args"], key: value}}, tmp_path / "odd.pth")
    error = run_main(*bare, "--resume", "odd.pth", status=2)
    assert error.startswith("error: ")
    assert error.count("\n") == 1


# ---- the moving average ----


def test_the_moving_average_of_a_checkpoint_is_evaluated_finetuned_and_exported(
    run_main, tiny, tmp_path
):
    # One step at a ruinous rate: the average, which hardly moves, is better than the model.
    run_main(*tiny, *LAMP, "--batch-size", "48", "--lr", "9", "--unscale-lr", "--output_dir", "out")
    best = read(tmp_path / "out/best_checkpoint.pth")
    assert best["best"] == "model_ema"
    flags = ["--use-ema", "--resume", "out/best_checkpoint.pth", "--eval"]
    accuracy = float(re.search(r"pruned ([\d.]+) %", run_main(*tiny, *flags))[1])
    assert accuracy == pytest.approx(best["max_accuracy"], abs=0.005)
    run_main(
        *tiny,
        "--use-ema",
        "--finetune",
        "out/best_checkpoint.pth",
        "--lr",
        "0",
        "--min-lr",
        "0",
        "--output_dir",
        "tuned",
    )
    assert same(read(tmp_path / "tuned/checkpoint.pth")["model"], best["model_ema"])
    script = ROOT / "sample" / "export_weights.py"
    subprocess.run(
        [sys.executable, script, "out/best_checkpoint.pth", "w.safetensors", "--use-ema"],
        check=True,
    )
    assert same(load_file(tmp_path / "w.safetensors"), best["model_ema"])


def test_use_ema_needs_a_checkpoint_that_has_an_average(run_main, tiny, tmp_path):
    assert "--finetune" in run_main(*tiny, "--use-ema", status=2)
    run_main(*tiny, "--no-model-ema", "--output_dir", "out")
    error = run_main(*tiny, "--use-ema", "--finetune", "out/checkpoint.pth", status=2)
    assert error == "error: --use-ema: out/checkpoint.pth holds no moving average of the weights\n"


def test_a_checkpoint_without_the_newer_choices_resumes_with_the_same_flags_and_no_others(
    run_main, tiny, pruned, tmp_path
):
    checkpoint = read(tmp_path / pruned)
    del checkpoint["pruning"]
    checkpoint["pruner"] = {"custom_config": None, "sparsity": 0.65, "name": "lamp"}
    torch.save(checkpoint, tmp_path / "older.pth")
    run_main(*tiny, *LAMP, "--resume", "older.pth", "--epochs", "2")
    error = run_main(*tiny, *LAMP, "--pattern", "row", "--resume", "older.pth", status=2)
    assert "older.pth is of a run with --pruner lamp --sparsity 0.65" in error
