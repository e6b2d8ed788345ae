import math

import pytest
import torch
import torch.nn.functional as F

from losses import CosubLoss, DenseFeaturesLoss, DenseTeacherLoss, DistillationLoss

torch.manual_seed(0)
IMAGES, LABELS = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
CLASS, KD = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
TEACHER = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))


def distilled(kind, **options):
    return DistillationLoss(torch.nn.CrossEntropyLoss(), TEACHER, kind, **options)(
        IMAGES, (CLASS, KD), LABELS
    )


def test_without_distillation_it_is_the_criterion_on_the_class_head():
    assert distilled("none") == F.cross_entropy(CLASS, LABELS)
    assert DistillationLoss(torch.nn.CrossEntropyLoss())(IMAGES, CLASS, LABELS) == F.cross_entropy(
        CLASS, LABELS
    )


def test_soft_distillation_is_the_divergence_from_the_teacher_at_its_temperature():
    student, teacher = (F.softmax(logits / 3, dim=1) for logits in (KD, TEACHER(IMAGES)))
    divergence = (teacher * (teacher.log() - student.log())).sum() * 9 / 20
    expected = 0.3 * F.cross_entropy(CLASS, LABELS) + 0.7 * divergence
    torch.testing.assert_close(distilled("soft", alpha=0.7, tau=3.0), expected)


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_first_class():
    expected = 0.5 * F.cross_entropy(CLASS, LABELS) + 0.5 * F.cross_entropy(
        KD, TEACHER(IMAGES).argmax(1)
    )
    torch.testing.assert_close(distilled("hard"), expected)


def test_the_teacher_gets_no_gradients():
    distilled("soft").backward()
    assert all(parameter.grad is None for parameter in TEACHER.parameters())
    assert KD.grad is not None


def test_distillation_needs_two_heads():
    with pytest.raises(ValueError, match="two heads"):
        DistillationLoss(torch.nn.CrossEntropyLoss(), TEACHER, "hard")(IMAGES, CLASS, LABELS)


def dense_taught(weight, tau=1.0, outputs=CLASS, criterion=F.cross_entropy):
    return DenseTeacherLoss(criterion, TEACHER, weight, tau)(IMAGES, outputs, LABELS)


def divergence(logits, tau):
    """tau^2 times the mean over images of the sum over classes of t (log t - log s), number by
    number.
    """
    total = 0
    for row, wanted in zip(logits, TEACHER(IMAGES), strict=True):
        student, teacher = (
            logit.div(tau).exp() / logit.div(tau).exp().sum() for logit in (row, wanted)
        )
        total += sum(t * (t.log() - s.log()) for s, t in zip(student, teacher, strict=True))
    return tau**2 * total / len(logits)


@pytest.mark.parametrize("weight, tau", [(0.3, 1.0), (0.3, 4.0), (0.9, 0.5), (0, 2.0), (1, 2.0)])
def test_the_dense_teacher_has_its_share_of_the_loss_at_its_temperature(weight, tau):
    expected = (1 - weight) * F.cross_entropy(CLASS, LABELS) + weight * divergence(CLASS, tau)
    torch.testing.assert_close(dense_taught(weight, tau), expected)


def test_a_dense_teacher_with_all_of_the_loss_needs_no_targets():
    def none(outputs, targets):
        raise AssertionError

    torch.testing.assert_close(dense_taught(1, 2.0, criterion=none), divergence(CLASS, 2.0))
    torch.testing.assert_close(dense_taught(1, outputs=TEACHER(IMAGES)), torch.zeros(()))


def test_features_learn_the_direction_of_the_dense_ones():
    features = CLASS.detach().clone().requires_grad_()
    loss = DenseFeaturesLoss(TEACHER)(IMAGES, features, None)
    wanted = TEACHER(IMAGES).tolist()
    cosines = [
        sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)
        for one, other in zip(CLASS.tolist(), wanted, strict=True)
    ]
    assert loss.item() == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)
    loss.backward()
    assert features.grad.any()
    assert all(parameter.grad is None for parameter in TEACHER.parameters())


def test_each_of_two_heads_learns_from_the_dense_teacher_and_the_targets():
    expected = (dense_taught(0.3, 2.0, CLASS) + dense_taught(0.3, 2.0, KD)) / 2
    torch.testing.assert_close(dense_taught(0.3, 2.0, (CLASS, KD)), expected)


def test_the_dense_teacher_gets_no_gradients_and_runs_in_the_precision_of_the_student():
    ran_in = []
    hook = TEACHER.register_forward_hook(lambda module, inputs, output: ran_in.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = dense_taught(0.5, 2.0, CLASS.bfloat16())
    hook.remove()
    loss.backward()
    assert (ran_in, loss.dtype) == ([torch.bfloat16], torch.float32)
    assert all(parameter.grad is None for parameter in TEACHER.parameters())


def test_binary_cosub_counts_every_class_with_a_weight_fully():
    outputs, mixed = torch.randn(8, 5), F.one_hot(LABELS, 5) * 0.3
    torch.testing.assert_close(
        CosubLoss(binary=True)(IMAGES, outputs, mixed), CosubLoss()(IMAGES, outputs, LABELS)
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_cosub_trains_each_submodel_on_targets_and_on_the_other(mixed):
    outputs = torch.randn(8, 5, requires_grad=True)
    first, second = outputs[:4], outputs[4:]
    targets = F.one_hot(LABELS, 5).float()
    bce = F.binary_cross_entropy_with_logits
    expected = (
        bce(first, targets)
        + bce(second, targets)
        + bce(first, second.detach().sigmoid())
        + bce(second, first.detach().sigmoid())
    ) / 4
    loss = CosubLoss()(IMAGES, outputs, targets if mixed else LABELS)
    torch.testing.assert_close(loss, expected)
