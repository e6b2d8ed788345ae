"""Runs that learn from the model as it was before pruning."""

import copy

import pytest
import timm
import torch

import losses
from benchmarks.torture import differences
from engine import Learner, Progress, StepOptions, train_one_epoch
from trainer import builders
from trainer.arguments import parse_args
from utils import Compute, DivergedError

pytestmark = pytest.mark.slow

LAMP = ["--pruner", "lamp", "--sparsity", "0.9"]
TAUGHT = [*LAMP, "--dense-teacher", "0.7", "--distillation-tau", "2"]
CPU = torch.device("cpu")
COMPUTE = Compute(CPU)


def read(path):
    return torch.load(path, weights_only=True)


def dense(seed=None):
    """The weights of the sample, or others near them."""
    weights = timm.create_model("deit_sample_patch4_28", pretrained=True).state_dict()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
            for name, weight in weights.items()
        }
    return weights


@pytest.fixture
def teachers(monkeypatch):
    """The losses of a dense teacher of this process, each with its teacher's weights as they were
    at first.
    """
    made, init = [], losses.DenseTeacherLoss.__init__

    def record(self, criterion, teacher, *options):
        init(self, criterion, teacher, *options)
        made.append((self, copy.deepcopy(teacher.state_dict())))

    monkeypatch.setattr(losses.DenseTeacherLoss, "__init__", record)
    return made


def test_the_teacher_is_the_dense_model_and_stays_so_while_the_pruned_one_trains(
    run_main, tiny, tmp_path, teachers
):
    run_main(*tiny, *TAUGHT, "--drop-path", "0.2", "--output_dir", "out")
    ((loss, first),) = teachers
    assert (loss.weight, loss.tau) == (0.7, 2.0)
    assert not loss.teacher.training
    pruned, start = read(tmp_path / "out/checkpoint.pth"), dense()
    for name, weight in loss.teacher.state_dict().items():
        assert torch.equal(weight, start[name]) and torch.equal(first[name], start[name]), name
        assert not torch.equal(pruned["model"][name], weight), name
    assert "dense_teacher" in pruned


def test_a_distilled_model_and_a_compiled_one_are_taught_by_a_copy_in_storage_of_its_own():
    args = parse_args(
        [
            *TAUGHT,
            "--model",
            "deit_tiny_distilled_patch16_224",
            "--input-size",
            "32",
            "--no-pretrained",
            "--compile",
        ]
    )
    model = builders.prepare_model(args, 10, {}, CPU)
    assert model._compiled_call_impl
    args.pretrained = True
    # As if timm's weights, which are not here, had been loaded
    model.pretrained_cfg = {"num_classes": 10}
    teacher = builders.build_dense_teacher(args, 10, model, {}, CPU).model
    assert teacher._compiled_call_impl
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    own = {weight.data_ptr() for weight in model.state_dict().values()}
    assert not own & {weight.data_ptr() for weight in teacher.state_dict().values()}
    # The mean of the heads
    assert isinstance(teacher.forward(torch.zeros(2, 3, 32, 32)), torch.Tensor)


def test_the_teacher_sees_the_images_that_the_student_sees():
    seen = {"student": [], "teacher": []}
    student, teacher = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)) for _ in range(2)
    )
    for name, network in (("student", student), ("teacher", teacher)):
        network.register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append(inputs[0])
        )
    options = StepOptions(
        losses.DenseTeacherLoss(torch.nn.CrossEntropyLoss(), teacher, 0.5),
        COMPUTE,
        batch_transform=lambda images, targets: (images.flip(0) * 0.3 + images * 0.7, targets),
    )
    loader = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
    train_one_epoch(
        Learner(student, torch.optim.SGD(student.parameters(), 0.1)), options, loader, Progress()
    )
    (one,), (two,) = seen.values()
    assert torch.equal(one, two)
    assert not torch.equal(one, loader[0][0])


def test_accumulated_batches_learn_from_the_teacher_as_larger_ones_do(run_main, tiny, tmp_path):
    plain = [
        *tiny,
        *TAUGHT,
        "--drop-path",
        "0",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--reprob",
        "0",
        "--opt",
        "sgd",
        "--lr",
        "0.1",
        "--unscale-lr",
    ]
    run_main(*plain, "--batch-size", "16", "--output_dir", "whole")
    run_main(*plain, "--batch-size", "8", "--accum-iter", "2", "--output_dir", "parts")
    whole, parts = (
        read(tmp_path / name / "checkpoint.pth")["model"] for name in ("whole", "parts")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("source", ["timm", "average"])
def test_a_run_that_is_stopped_goes_on_to_the_bit_with_the_same_teacher(
    run_main, tiny, tmp_path, stop_at, teachers, source
):
    torch.save({"model": dense(0), "model_ema": dense(1)}, "dense.pth")
    weights = ["--finetune", "dense.pth", "--use-ema"] if source == "average" else []
    recipe = [*tiny, *TAUGHT, *weights, "--epochs", "2", "--resume", "auto"]
    run_main(*recipe, "--output_dir", "whole")
    stop_at(2)
    run_main(*recipe, "--output_dir", "parts", status=143)
    stop_at(4)
    run_main(
        *tiny,
        "--resume",
        "parts/checkpoint.pth",
        "--output_dir",
        "parts",
        "--epochs",
        "2",
        status=143,
    )
    run_main(*recipe, "--output_dir", "parts")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    assert len(teachers) == 4  # the third run was not told of one
    expected = dense(1 if source == "average" else None)
    for loss, _ in teachers:
        assert (loss.weight, loss.tau) == (0.7, 2.0)
        assert all(
            torch.equal(weight, expected[name])
            for name, weight in loss.teacher.state_dict().items()
        )


def test_a_run_does_not_go_on_with_another_teacher(run_main, tiny, tmp_path, stop_at):
    torch.save(dense(0), "dense.pth")
    stop_at(2)
    run_main(*tiny, *TAUGHT, "--finetune", "dense.pth", "--output_dir", "out", status=143)
    goes_on = [*tiny, "--resume", "out/checkpoint.pth", "--output_dir", "out"]
    before = (tmp_path / "out/checkpoint.pth").read_bytes()
    (tmp_path / "dense.pth").rename(tmp_path / "moved.pth")
    error = run_main(*goes_on, status=2)
    assert error == (
        "error: out/checkpoint.pth: its dense teacher: dense.pth: no such checkpoint; --finetune "
        "FILE says where the dense weights are now\n"
    )
    torch.save(dense(1), "dense.pth")
    assert run_main(*goes_on, status=2) == (
        "error: dense.pth: not the dense weights that out/checkpoint.pth learned from; they have "
        "changed since\n"
    )
    assert "is pruned" in run_main(*goes_on, "--finetune", "out/checkpoint.pth", status=2)
    assert (tmp_path / "out/checkpoint.pth").read_bytes() == before
    run_main(*goes_on, "--finetune", "moved.pth")
    assert read(tmp_path / "out/checkpoint.pth")["dense_teacher"]["file"] == "moved.pth"


def test_a_run_can_go_on_without_its_teacher_but_not_with_one_that_it_did_not_have(run_main, tiny):
    goes_on = [*tiny, "--resume", "out/checkpoint.pth", "--output_dir", "out", "--epochs"]
    run_main(*tiny, *TAUGHT, "--output_dir", "out")
    assert "--dense-teacher 0.0 instead of 0.7" in run_main(*goes_on, "2", "--dense-teacher", "0")
    error = run_main(*goes_on, "3", "--dense-teacher", "0.5", status=2)
    assert error.startswith("error: --dense-teacher 0.5: out/checkpoint.pth is of a run without it")


def test_an_evaluation_needs_no_teacher(run_main, tiny):
    run_main(*tiny, *TAUGHT, "--no-pretrained", "--eval")


def test_dense_weights_that_teach_nothing_are_refused_in_one_line(run_main, tiny, tmp_path):
    torch.save({**dense(), "norm.bias": torch.full((96,), torch.nan)}, "nan.pth")
    torch.save(
        {**dense(), "head.weight": torch.zeros(5, 96), "head.bias": torch.zeros(5)}, "five.pth"
    )
    run_main(*tiny, *LAMP, "--output_dir", "pruned")
    before = set(tmp_path.rglob("*"))
    for file, said in (
        ("nan.pth", "norm.bias of nan.pth is not finite"),
        ("five.pth", "five.pth has no head for 10"),
        ("pruned/checkpoint.pth", "pruned/checkpoint.pth is pruned"),
    ):
        error = run_main(*tiny, *TAUGHT, "--finetune", file, "--output_dir", "out", status=2)
        assert error.startswith("error: --dense-teacher 0.7: ") and error.count("\n") == 1
        assert said in error
    assert set(tmp_path.rglob("*")) == before


def test_a_teacher_whose_logits_are_not_finite_ends_the_training():
    student, teacher = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)) for _ in range(2)
    )
    teacher[1].bias.data[0] = torch.inf
    options = StepOptions(
        losses.DenseTeacherLoss(torch.nn.CrossEntropyLoss(), teacher, 0.5), COMPUTE
    )
    loader = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
    with pytest.raises(DivergedError, match="not finite"):
        train_one_epoch(
            Learner(student, torch.optim.SGD(student.parameters(), 0.1)),
            options,
            loader,
            Progress(),
        )
