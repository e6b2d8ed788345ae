"""What each of DeiT's arguments changes. docs/deit.md names the test of every one."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3

import utils
from datasets import build_transform
from engine import StepOptions, learning_rate, train_one_epoch
from losses import CosubLoss
from sparsity_factory import Recipe, Sparsifier, check_masks, unpack
from trainer import builders, epochs
from trainer.arguments import parse_args
from trainer.training_state import TrainingState
from utils import Compute, UserError

CPU = torch.device("cpu")
COMPUTE = Compute(CPU)
MODEL = ["--data-path", "unused", "--model", "deit_sample_patch4_28", "--input-size", "28"]


def options(*flags):
    return parse_args([*MODEL, "--no-pretrained", *map(str, flags)])


def model_of(*flags):
    return builders.prepare_model(options(*flags), 10, {}, CPU)


def state_of(*flags):
    model = timm.create_model("deit_sample_patch4_28")
    return TrainingState(
        model, Sparsifier(model, Recipe(), total_steps=1, epoch_steps=1), options(*flags), COMPUTE
    )


def group(*flags):
    """The first parameter group of the optimizer, which has no weight decay, and the second, which
    has.
    """
    return state_of(*flags).learner.optimizer.param_groups


def rates(*flags, epochs=10):
    """The learning rate of each epoch."""
    state = state_of("--epochs", epochs, "--unscale-lr", "--lr", "1", *flags)
    values = []
    for epoch in range(epochs):
        values.append(state.learner.optimizer.param_groups[0]["lr"])
        state.lr_scheduler.step(epoch + 1, metric=50.0)
    return values


def augmented(*flags, image=None, count=20):
    """Training images of the transform, each made with a seed of its own; the same ones for the
    same arguments.
    """
    args = options("--input-size", "48", "--mixup", "0", "--cutmix", "0", *flags)
    transform, batch_transform = (
        build_transform(True, args),
        builders.build_batch_transform(args, 10, CPU),
    )
    image = image or Image.fromarray(
        np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    )
    results = []
    for seed in range(count):
        utils.seed_everything(utils.SAMPLE, seed)
        results.append(batch_transform(transform(image)[None], None)[0])
    return torch.cat(results)


def read(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


PLAIN = ["--aa", "none", "--reprob", "0", "--color-jitter", "0"]


# ---- run ----


def test_batch_size_is_the_images_of_a_step(run_main, tiny):
    assert "3 steps each" in run_main(*tiny)
    assert "6 steps each" in run_main(*tiny, "--batch-size", "8")


@pytest.mark.slow
def test_epochs_and_start_epoch_bound_the_training(run_main, tiny):
    output = run_main(*tiny, "--epochs", "3", "--start_epoch", "1")
    assert sorted(set(re.findall(r"Epoch: \[(\d)\]", output))) == ["1", "2"]


@pytest.mark.slow
def test_seed_changes_the_result_and_the_same_seed_does_not(run_main, tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_main(*tiny, "--no-pretrained", "--seed", seed, "--output_dir", name)
    a, b, c = (read(tmp_path / name)["model"]["head.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_output_dir_is_where_files_go_and_empty_writes_nothing(run_main, tiny, tmp_path):
    run_main(*tiny)
    assert not list(tmp_path.iterdir())
    run_main(*tiny, "--output_dir", "a/b")
    assert {path.name for path in (tmp_path / "a/b").glob("[!.]*")} == {
        "checkpoint.pth",
        "best_checkpoint.pth",
        "log.txt",
        "summary.md",
        "training.png",
    }


def test_eval_does_not_train(run_main, tiny):
    output = run_main(*tiny, "--eval", "--output_dir", "out")
    assert "Epoch" not in output
    assert "* Acc@1" in output


def test_num_workers_and_pin_mem_reach_the_loader(tiny):
    for flags, workers, pinned in ((["--num_workers", "2"], 2, True), (["--no-pin-mem"], 0, False)):
        arguments = parse_args([*tiny, *flags])
        loader = builders.build_loaders(arguments, torch.device("cuda")).train
        assert loader.num_workers == workers
        assert loader.pin_memory == pinned


def test_the_default_number_of_workers_is_at_most_the_cores_and_a_flag_is_taken_as_it_is(
    monkeypatch,
):
    monkeypatch.setattr("trainer.arguments.available_cores", lambda: 4)
    monkeypatch.setattr("trainer.arguments.processes_here", lambda: 2)
    assert options().num_workers == 2
    assert options("--num_workers", "7").num_workers == 7
    monkeypatch.setattr("trainer.arguments.available_cores", lambda: 64)
    assert options().num_workers == 10


# ---- model ----


def test_model_and_input_size_choose_the_architecture():
    args = parse_args(
        [
            "--data-path",
            "x",
            "--model",
            "deit_tiny_patch16_224",
            "--input-size",
            "64",
            "--no-pretrained",
        ]
    )
    model = builders.prepare_model(args, 7, {}, CPU)
    assert model.embed_dim == 192
    assert model.patch_embed.grid_size == (4, 4)
    assert model.head.out_features == 7


def test_drop_is_the_dropout_rate():
    rates = {
        module.p
        for module in model_of("--drop", "0.25").modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert 0.25 in rates
    assert {
        module.p for module in model_of().modules() if isinstance(module, torch.nn.Dropout)
    } == {0.0}


def test_drop_path_grows_to_its_rate_in_the_last_block():
    blocks = model_of("--drop-path", "0.3").blocks
    assert blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert isinstance(blocks[0].drop_path1, torch.nn.Identity)


def test_model_ema_follows_with_its_decay_and_can_be_left_out(run_main, tiny, tmp_path):
    run_main(*tiny, "--model-ema-decay", "0", "--output_dir", "follows", "--model-ema-force-cpu")
    run_main(*tiny, "--output_dir", "lags")
    run_main(*tiny, "--no-model-ema", "--output_dir", "none")
    follows, lags, none = (read(tmp_path / name) for name in ("follows", "lags", "none"))
    assert torch.equal(follows["model_ema"]["head.weight"], follows["model"]["head.weight"])
    assert not torch.equal(lags["model_ema"]["head.weight"], lags["model"]["head.weight"])
    assert "model_ema" not in none


def test_model_ema_force_cpu_keeps_the_average_in_the_cpus_memory(monkeypatch):
    asked, average = [], ModelEmaV3(torch.nn.Linear(2, 2))
    monkeypatch.setattr(
        "trainer.training_state.MovingAverage",
        lambda model, decay, device: asked.append(device) or average,
    )
    for flags in (["--model-ema-force-cpu"], []):
        state_of(*flags)
    assert asked == ["cpu", None]


def test_train_mode_reaches_the_training(run_main, tiny, monkeypatch):
    seen, train = [], epochs.train_one_epoch
    monkeypatch.setattr(
        epochs,
        "train_one_epoch",
        lambda learner, options, *args, **others: (
            seen.append(options.train_mode) or train(learner, options, *args, **others)
        ),
    )
    run_main(*tiny)
    run_main(*tiny, "--no-train-mode")
    assert seen == [True, False]


# ---- optimizer and schedule ----


def test_optimizers_that_torch_fuses_are_fused():
    assert group()[0]["fused"] is group("--opt", "sgd")[0]["fused"] is True
    assert "fused" not in group("--opt", "lamb")[0]


def test_opt_chooses_the_optimizer_and_its_options_reach_it():
    _, decayed = group("--weight-decay", "0.3", "--opt-eps", "1e-5", "--opt-betas", "0.7", "0.8")
    assert decayed["weight_decay"] == 0.3
    assert decayed["eps"] == 1e-5
    assert tuple(decayed["betas"]) == (0.7, 0.8)
    _, decayed = group("--opt", "sgd", "--momentum", "0.6")
    assert decayed["momentum"] == 0.6
    assert "betas" not in decayed


@pytest.mark.parametrize(
    "opt",
    [
        "sgd",
        "nesterov",
        "momentum",
        "adam",
        "adamw",
        "nadam",
        "radam",
        "adamp",
        "sgdp",
        "adadelta",
        "adafactor",
        "adahessian",
        "rmsprop",
        "rmsproptf",
        "novograd",
        "lookahead_adam",
        "lamb",
        "muon",
    ],
)
def test_an_optimizer_moves_the_weights_that_are_kept_and_no_others(opt):
    model = timm.create_model("deit_sample_patch4_28")
    sparsifier = Sparsifier(model, Recipe("unif", 0.5), total_steps=2, epoch_steps=2)
    sparsifier.start()
    args = options("--opt", opt, "--lr", "0.1", "--unscale-lr", "--warmup-epochs", "0")
    state = TrainingState(model, sparsifier, args, COMPUTE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = [(torch.randn(4, 3, 28, 28), torch.arange(4)) for _ in range(2)]
    step = StepOptions(
        lambda images, logits, targets: torch.nn.functional.cross_entropy(logits, targets), COMPUTE
    )
    train_one_epoch(state.learner, step, batches, state.progress)
    for name, mask in sparsifier.masks.items():
        moved = model.get_parameter(name) != before[name]
        assert moved[mask].any()
        assert not moved[~mask].any()


@pytest.mark.parametrize(
    "opt",
    [
        "nvnovograd",
        "fusedmomentum",
        "lookahead_nvnovograd",
        "fusedsgd",
        "fusedadam",
        "fusedadamw",
        "fusedlamb",
        "fusednovograd",
    ],
)
def test_an_optimizer_that_timm_no_longer_has_or_that_needs_apex_is_refused_with_the_reason(opt):
    reason = "timm no longer has" if "nvnovograd" in opt or opt == "fusedmomentum" else "APEX|apex"
    with pytest.raises(UserError, match=f"--opt {opt} .*({reason})"):
        group("--opt", opt)


def test_lr_is_for_512_images_a_step_unless_unscaled():
    flags = ["--lr", "0.1", "--batch-size", "128", "--warmup-epochs", "0"]
    assert group(*flags)[0]["lr"] == pytest.approx(0.025)
    assert group(*flags, "--unscale-lr")[0]["lr"] == pytest.approx(0.1)


def test_clip_grad_bounds_the_step(run_main, tiny, tmp_path):
    start = timm.create_model("deit_sample_patch4_28", pretrained=True).state_dict()["head.weight"]
    moved = []
    for flags in ([], ["--clip-grad", "1e-3"]):
        run_main(
            *tiny,
            "--opt",
            "sgd",
            "--lr",
            "10",
            "--weight-decay",
            "0",
            "--output_dir",
            "out",
            "--overwrite",
            *flags,
        )
        moved.append((read(tmp_path / "out")["model"]["head.weight"] - start).norm())
    assert moved[1] < moved[0] / 10


def test_sched_warms_up_and_ends_at_min_lr():
    cosine = rates("--warmup-epochs", "2", "--warmup-lr", "0.1", "--min-lr", "0.2")
    assert cosine[0] == pytest.approx(0.1)
    assert cosine[1] == pytest.approx(0.55)
    assert cosine[2] == max(cosine)
    assert cosine[9] == min(cosine[2:]) >= 0.2
    assert rates("--sched", "tanh", "--warmup-epochs", "0") != rates("--warmup-epochs", "0")


def test_a_schedule_that_timm_does_not_know_is_an_error_also_if_timm_says_nothing(
    run_main, tiny, monkeypatch
):
    def create(args, optimizer):  # as timm 1.0.24
        return None, args.epochs

    monkeypatch.setattr("trainer.training_state.create_scheduler", create)
    error = run_main(*tiny, "--sched", "cosin", status=2)
    assert error == f"error: --sched cosin: timm {timm.__version__} has no such schedule\n"
    run_main(*tiny, "--sched", "none")


def test_step_schedule_decays_by_its_rate_at_its_interval():
    step = rates(
        "--sched", "step", "--decay-epochs", "3", "--decay-rate", "0.5", "--warmup-epochs", "0"
    )
    assert step == pytest.approx([1] * 3 + [0.5] * 3 + [0.25] * 3 + [0.125])
    assert step == rates(
        "--sched", "step", "--decay-epochs", "3", "--dr", "0.5", "--warmup-epochs", "0"
    )


def test_start_epoch_begins_at_the_rate_of_that_epoch():
    schedule = rates("--warmup-epochs", "5")
    state = state_of("--epochs", "10", "--unscale-lr", "--lr", "1", "--start_epoch", "5")
    assert state.learner.optimizer.param_groups[0]["lr"] == schedule[5]


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_plateau_schedule_waits_for_its_patience():
    plateau = ["--sched", "plateau", "--warmup-epochs", "0", "--decay-rate", "0.5", "--min-lr", "0"]
    assert rates(*plateau, "--patience-epochs", "2", epochs=6) == pytest.approx(
        [1, 1, 1, 1, 0.5, 0.5]
    )
    assert rates(*plateau, "--patience-epochs", "9", epochs=6) == [1] * 6


def test_lr_noise_disturbs_the_rate_within_its_range_and_limit():
    flat = ["--sched", "step", "--decay-epochs", "100", "--warmup-epochs", "0"]
    noisy = rates(
        *flat, "--lr-noise", "0.4", "0.8", "--lr-noise-pct", "0.1", "--lr-noise-std", "0.05"
    )
    assert noisy[:4] == [1] * 4
    assert noisy[8:] == [1] * 2
    assert any(rate != 1 for rate in noisy[4:8])
    assert all(abs(rate - 1) < 0.1 for rate in noisy)
    wild = rates(
        *flat, "--lr-noise", "0.4", "0.8", "--lr-noise-pct", "0.9", "--lr-noise-std", "0.5"
    )
    assert max(abs(rate - 1) for rate in wild) > max(abs(rate - 1) for rate in noisy)


def test_cooldown_epochs_add_nothing_to_the_training_as_in_deit():
    assert rates("--cooldown-epochs", "0") == rates("--cooldown-epochs", "5")


# ---- loss ----


def loss_of(*flags, logits, targets):
    criterion = builders.build_criterion(options("--mixup", "0", "--cutmix", "0", *flags), 10, CPU)
    return criterion(None, logits, targets).item()


def test_smoothing_and_bce_choose_the_loss():
    logits, targets = torch.randn(4, 10), torch.arange(4)
    plain = torch.nn.functional.cross_entropy(logits, targets).item()
    assert loss_of("--smoothing", "0", logits=logits, targets=targets) == pytest.approx(plain)
    smoothed = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2).item()
    assert loss_of("--smoothing", "0.2", logits=logits, targets=targets) == pytest.approx(smoothed)
    one_hot = torch.nn.functional.one_hot(targets, 10).float()
    binary = torch.nn.functional.binary_cross_entropy_with_logits(logits, one_hot).item()
    assert loss_of("--bce-loss", logits=logits, targets=targets) == pytest.approx(binary)


def test_bce_counts_every_class_that_is_mixed_in_fully():
    criterion = builders.build_criterion(options("--bce-loss"), 10, CPU)
    logits, mixed = torch.randn(1, 10), torch.zeros(1, 10)
    mixed[0, 2], mixed[0, 5] = 0.9, 0.1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, mixed.gt(0).float())
    assert criterion(None, logits, mixed).item() == pytest.approx(expected.item())


def test_bce_is_not_told_by_smoothing_that_every_class_is_there():
    mixup = builders.build_batch_transform(
        options("--bce-loss", "--smoothing", "0.1"), 10, CPU
    ).mixup
    _, targets = mixup(torch.zeros(8, 3, 16, 16), torch.arange(8))
    assert (targets > 0).sum(1).max() <= 2


@pytest.mark.parametrize(
    "flags, binary",
    [([], False), (["--mixup", "0", "--cutmix", "0"], False), (["--bce-loss"], True)],
)
def test_cosub_is_its_own_loss(flags, binary):
    """test_engine.py shows how it trains."""
    step = builders.build_step_options(options("--cosub", *flags), 10, COMPUTE)
    assert step.cosub
    assert isinstance(step.criterion, CosubLoss)
    assert step.criterion.binary == binary


def test_the_moving_average_is_evaluated_and_the_best_checkpoint_says_which_was_best(
    run_main, tiny, tmp_path
):
    # One step at a ruinous rate: the average, which hardly moves, is better than the model.
    output = run_main(
        *tiny, "--batch-size", "48", "--lr", "9", "--unscale-lr", "--output_dir", "out"
    )
    assert output.count("* Acc@1") == 2
    assert output.count("Test: Total time") == 1  # the images are decoded once
    assert "(model_ema)" in output
    best = torch.load(tmp_path / "out/best_checkpoint.pth", weights_only=True)
    assert best["best"] == "model_ema"
    line = json.loads((tmp_path / "out/log.txt").read_text())
    assert best["max_accuracy"] == line["test_ema_acc1"] > line["test_acc1"]


def test_distributed_and_world_size_insist_on_processes(run_main, tiny):
    assert "torchrun" in run_main(*tiny, "--distributed", status=2)
    assert "--world_size 3" in run_main(*tiny, "--world_size", "3", status=2)


def mix(*flags):
    mixup = builders.build_batch_transform(options(*flags), 10, CPU).mixup
    images = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 16, 16).clone()
    utils.seed_everything(utils.STEP, 1)
    return mixup(images, torch.arange(8))


def test_mixup_blends_whole_images_and_cutmix_pastes_boxes():
    blended, targets = mix("--cutmix", "0", "--smoothing", "0")
    assert all(image.unique().numel() == 1 for image in blended)
    assert targets.shape == (8, 10)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    pasted, _ = mix("--mixup", "0")
    assert all(set(image.unique().tolist()) <= set(range(8)) for image in pasted)
    assert any(image.unique().numel() == 2 for image in pasted)


def test_without_mixup_and_cutmix_nothing_is_mixed():
    assert (
        builders.build_batch_transform(options("--mixup", "0", "--cutmix", "0"), 10, CPU).mixup
        is None
    )


def test_cutmix_minmax_bounds_the_side_of_the_box():
    pasted, _ = mix("--mixup", "0", "--cutmix-minmax", "0.4", "0.6")
    assert 0.1 < (pasted[0] != 0).float().mean() < 0.4
    pasted, _ = mix("--mixup", "0", "--cutmix-minmax", "0.9", "1")
    assert (pasted[0] != 0).float().mean() > 0.7


def test_mixup_prob_and_switch_prob_choose_what_happens():
    assert torch.equal(mix("--mixup-prob", "0")[0][:, 0, 0, 0], torch.arange(8.0))
    assert all(image.unique().numel() == 1 for image in mix("--mixup-switch-prob", "0")[0])
    assert any(image.unique().numel() == 2 for image in mix("--mixup-switch-prob", "1")[0])


def test_mixup_mode_shares_one_ratio_by_batch_pair_or_not_at_all():
    ratios = {}
    for mode in ("batch", "pair", "elem"):
        _, targets = mix("--cutmix", "0", "--smoothing", "0", "--mixup-mode", mode)
        ratios[mode] = [round(targets[i, i].item(), 4) for i in range(8)]
    assert len(set(ratios["batch"])) == 1
    assert len(set(ratios["elem"])) > 4
    assert ratios["pair"] == ratios["pair"][::-1]
    assert len(set(ratios["pair"])) > 1


# ---- distillation ----


@pytest.fixture
def teacher(tmp_path):
    torch.save(
        {"model": timm.create_model("deit_sample_patch4_28", pretrained=True).state_dict()},
        tmp_path / "t.pth",
    )
    return ["--teacher-model", "deit_sample_patch4_28", "--teacher-path", "t.pth"]


STUDENT = ["--model", "deit_tiny_distilled_patch16_224", "--input-size", "32", "--no-pretrained"]


@pytest.mark.slow
def test_distillation_trains_a_student_with_two_heads(run_main, tiny, tmp_path):
    """With all of the loss from the teacher only the distillation head learns, with none of it only
    the class head.
    """
    torch.save(
        {"model": timm.create_model("resnet10t", num_classes=10).state_dict()}, tmp_path / "t.pth"
    )
    recipe = [
        *tiny,
        *STUDENT,
        "--teacher-model",
        "resnet10t",
        "--teacher-path",
        "t.pth",
        "--pruner",
        "lamp",
        "--sparsity",
        "0.5",
        "--opt",
        "sgd",
        "--unscale-lr",
        "--weight-decay",
        "0",
        "--min-lr",
        "0",
    ]
    heads = {}
    for name, kind, alpha, lr in (
        ("start", "soft", 1, 0),
        ("soft", "soft", 1, 1),
        ("hard", "hard", 1, 1),
        ("class", "soft", 0, 1),
    ):
        run_main(
            *recipe,
            "--distillation-type",
            kind,
            "--distillation-alpha",
            alpha,
            "--lr",
            lr,
            "--output_dir",
            name,
        )
        checkpoint = read(tmp_path / name)
        check_masks(checkpoint["model"], unpack(checkpoint["masks"]))
        heads[name] = [checkpoint["model"][f"{head}.weight"] for head in ("head", "head_dist")]
    moved = {
        name: [not torch.equal(*pair) for pair in zip(heads["start"], heads[name], strict=True)]
        for name in heads
    }
    assert moved == {
        "start": [False, False],
        "soft": [False, True],
        "hard": [False, True],
        "class": [True, False],
    }
    assert not torch.equal(heads["soft"][1], heads["hard"][1])


def test_distillation_alpha_tau_and_type_reach_the_loss(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    criterion = builders.build_criterion(
        options(
            "--distillation-type",
            "soft",
            "--distillation-alpha",
            "0.3",
            "--distillation-tau",
            "4",
            *teacher,
        ),
        10,
        CPU,
    )
    assert (criterion.distillation_type, criterion.alpha, criterion.tau) == ("soft", 0.3, 4.0)
    assert not any(parameter.requires_grad for parameter in criterion.teacher_model.parameters())


@pytest.mark.parametrize(
    "name, device, flags, expected",
    [
        ("resnet10t", "cuda", [], True),
        ("resnet10t", "cuda", ["--no-channels-last"], False),
        ("resnet10t", "cpu", [], False),
        ("deit_sample_patch4_28", "cuda", [], False),
    ],
)
def test_convolutional_teachers_have_channels_last_on_a_gpu(
    tmp_path, name, device, flags, expected
):
    path = tmp_path / "t.pth"
    torch.save(timm.create_model(name, num_classes=10).state_dict(), path)
    args = options(*flags, "--teacher-model", name, "--teacher-path", path)
    teacher = builders.prepare_teacher(args, 10, torch.device(device))
    weights = [weight for weight in teacher.parameters() if weight.dim() == 4]
    last = [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]
    assert all(last) == expected


def test_distillation_of_a_student_with_one_head_is_refused(run_main, tiny, teacher):
    error = run_main(*tiny, "--distillation-type", "hard", *teacher, status=2)
    assert "deit_sample_patch4_28" in error
    assert "distillation head" in error


def test_a_teacher_that_is_missing_or_of_other_classes_is_refused(run_main, tiny, tmp_path):
    flags = [*tiny, *STUDENT, "--distillation-type", "hard"]
    assert "--teacher-path" in run_main(*flags, status=2)
    assert "t.pth: no such" in run_main(
        *flags, "--teacher-path", "t.pth", "--teacher-model", "resnet10t", status=2
    )
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "t.pth")
    error = run_main(*flags, "--teacher-path", "t.pth", "--teacher-model", "resnet10t", status=2)
    assert "t.pth" in error
    assert "fc.weight" in error
    assert "--teacher-model" in run_main(
        *flags, "--teacher-path", "t.pth", "--teacher-model", "resnet10x", status=2
    )


# ---- augmentation ----


def test_the_same_seed_gives_the_same_image():
    assert torch.equal(augmented(), augmented())


def test_aa_applies_its_policy_or_none():
    assert not torch.equal(augmented(), augmented(*PLAIN))
    assert not torch.equal(augmented("--reprob", "0", "--aa", "augmix-m5-w4-d2"), augmented(*PLAIN))


def test_color_jitter_applies_where_no_policy_does():
    assert not torch.equal(
        augmented("--aa", "none", "--reprob", "0", "--color-jitter", "0.5"), augmented(*PLAIN)
    )


def test_three_augment_replaces_the_policy_and_src_its_crop():
    image = Image.new("RGB", (64, 64))
    image.paste((110, 110, 110), (0, 0, 64, 32))
    three = augmented("--ThreeAugment", "--color-jitter", "0", image=image)
    simple = augmented("--ThreeAugment", "--src", "--color-jitter", "0", image=image)
    assert not torch.equal(three, augmented(*PLAIN, image=image))
    # Zoomed into one half
    assert any(result.std(dim=(1, 2)).max() < 0.05 for result in three)
    assert not any(result.std(dim=(1, 2)).max() < 0.05 for result in simple)


def test_train_interpolation_changes_how_images_are_scaled():
    common = ["--aa", "none", "--reprob", "0", "--color-jitter", "0", "--train-interpolation"]
    assert not torch.equal(augmented(*common, "bilinear"), augmented(*common, "bicubic"))


def erased(*flags):
    """The fraction of pixels that random erasing has changed, for each of many images."""
    common = ["--aa", "none", "--color-jitter", "0"]
    changed = augmented(*common, *flags) != augmented(*common, "--reprob", "0")
    return changed.any(1).float().mean((1, 2))


def test_reprob_is_how_often_something_is_erased():
    assert erased("--reprob", "1").count_nonzero() == 20
    assert 0 < erased("--reprob", "0.5").count_nonzero() < 20


def test_remode_is_what_is_filled_in():
    black = augmented("--aa", "none", "--color-jitter", "0", "--reprob", "1", "--remode", "const")
    noise = augmented("--aa", "none", "--color-jitter", "0", "--reprob", "1", "--remode", "pixel")
    assert (black == 0).all(1).any((1, 2)).all()
    assert not (noise == 0).all(1).any()


def areas(black):
    """How many connected areas of True a picture has."""
    left, count = {tuple(place) for place in black.nonzero().tolist()}, 0
    while left:
        count += 1
        edge = [left.pop()]
        while edge:
            row, column = edge.pop()
            near = {
                (row + 1, column),
                (row - 1, column),
                (row, column + 1),
                (row, column - 1),
            } & left
            left -= near
            edge += near
    return count


def test_recount_is_how_many_areas_are_erased():
    """Up to that many, which may touch."""
    common, counts = (
        ["--aa", "none", "--color-jitter", "0", "--reprob", "1", "--remode", "const", "--recount"],
        {},
    )
    for recount in (1, 4):
        counts[recount] = [
            areas((image == 0).all(0)) for image in augmented(*common, recount, count=40)
        ]
    assert set(counts[1]) == {1}
    assert {2, 3} <= set(counts[4]) <= {1, 2, 3, 4}


def test_resplit_does_nothing_as_in_deit():
    assert torch.equal(augmented("--resplit"), augmented())


def test_eval_crop_ratio_is_the_part_of_the_image_that_is_seen():
    image = Image.new("RGB", (100, 100))
    image.paste((255, 255, 255), (10, 10, 90, 90))  # white but for a frame of a tenth
    inside = build_transform(False, options("--input-size", "40", "--eval-crop-ratio", "0.5"))(
        image
    )
    whole = build_transform(False, options("--input-size", "40", "--eval-crop-ratio", "1"))(image)
    assert inside.min() > 2
    assert whole.min() < -1


def test_repeated_aug_shows_an_image_three_times(tiny):
    for flags, repeats in (([], 1), (["--repeated-aug"], 3)):
        loader = builders.build_loaders(parse_args([*tiny, *flags]), CPU).train
        indices = [index for index, _ in loader.sampler]
        assert len(set(indices)) == len(indices) / repeats


def test_device_is_where_the_model_goes(run_main, tiny):
    assert " on cpu in float32" in run_main(*tiny, "--eval", "--device", "cpu")


REWINDS = [
    *("--pruner", "unif", "--sparsity", "0.5", "--prune-schedule", "iterative", "--rewind", "1"),
    *("--prune-rounds", "2", "--prune-start", "0.25", "--prune-end", "0.5", "--epochs", "4"),
]


def rates_of(run_main, monkeypatch, *argv, status=0) -> list[float]:
    """The learning rate of each step of a run, relative to the first of its schedule."""
    rates, step = [], torch.optim.AdamW.step

    def record(optimizer, *args, **options):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        run_main(*argv, status=status)
    return rates


@pytest.mark.slow
def test_after_a_rewind_each_round_trains_along_the_whole_learning_rate_schedule(
    run_main, tiny, monkeypatch, tmp_path, stop_at
):
    """Epochs of three steps; rounds after steps 3 and 6, back to the beginning of epoch 1."""
    plain = rates_of(run_main, monkeypatch, *tiny, "--epochs", "4")
    by_epoch = plain[::3]
    flags = [*tiny, *REWINDS, "--output_dir", "whole"]
    rates = rates_of(run_main, monkeypatch, *flags)
    epochs = [0, 0, 0, 1, *(1, 2, 3), *(1, 1, 2, 2, 3)]
    assert rates == [by_epoch[epoch] for epoch in epochs] and len({*by_epoch}) == 4

    # Stopped in the last round and resumed
    flags = [*tiny, *REWINDS, "--output_dir", "cut"]
    stop_at(9)
    assert rates_of(run_main, monkeypatch, *flags, status=143) == rates[:9]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert rates_of(run_main, monkeypatch, *flags, "--resume", "auto") == rates[9:]
    whole, cut = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("whole", "cut")
    )
    for kind in ("model", "model_ema"):
        assert all(torch.equal(cut[kind][name], value) for name, value in whole[kind].items())


def test_layer_decay_scales_the_rate_of_each_layer_and_the_log_has_that_of_the_head():
    state = state_of("--layer-decay", "0.5", "--unscale-lr", "--lr", "1", "--warmup-epochs", "0")
    optimizer = state.learner.optimizer
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    model = state.learner.model
    assert rates[id(model.head.weight)] == 1
    assert rates[id(model.blocks[5].mlp.fc1.weight)] == 0.5
    assert rates[id(model.blocks[0].mlp.fc1.weight)] == 0.5**6
    assert rates[id(model.pos_embed)] == 0.5**7
    assert learning_rate(optimizer) == 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["one-shot", "ste"])
def test_gradient_checkpointing_gives_the_same_weights_to_the_bit(
    run_main, tiny, tmp_path, schedule
):
    recipe = [
        "--pruner",
        "unif",
        "--sparsity",
        "0.5",
        "--score",
        "taylor",
        "--calibration-images",
        32,
    ]
    recipe += ["--prune-schedule", schedule, "--drop-path", "0.3"]
    kept = {}
    for flags in ([], ["--grad-checkpointing"]):
        run_main(*tiny, *recipe, *flags, "--output_dir", tmp_path / "run", "--overwrite")
        kept[len(flags)] = read(tmp_path / "run")["model"]
    assert all(weight.equal(kept[1][name]) for name, weight in kept[0].items())


def test_gradient_checkpointing_computes_each_block_twice():
    model = model_of("--grad-checkpointing")
    calls = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.zeros(2, 3, 28, 28)).sum().backward()
    assert len(calls) == 2
