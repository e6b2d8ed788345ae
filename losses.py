"""Losses beyond a plain criterion: distillation, the dense model as teacher, co-distillation.

Each is called as `loss(images, outputs, targets)` with the model's outputs for the images.
"""

import torch
import torch.nn.functional as F
from torch import nn


class DistillationLoss(nn.Module):
    """The criterion on the class head, and on the distillation head what the teacher says.

    Touvron et al. 2021, arXiv:2012.12877. `soft` is the Kullback-Leibler divergence at temperature
    `tau`, times tau squared, over the number of logits; `hard` is the cross-entropy with the
    teacher's first class. `alpha` is the share of the teacher in the loss; `none` uses the
    criterion alone.

    teacher_model: maps the images to logits; None with `none`. It runs without gradients.
    outputs: logits (batch, classes), or the pair (class head, distillation head) of a distilled
    model.
    targets: whatever the criterion takes.
    """

    def __init__(
        self, base_criterion, teacher_model=None, distillation_type="none", alpha=0.5, tau=1.0
    ):
        super().__init__()
        if distillation_type not in ("none", "soft", "hard"):
            raise ValueError(
                f"distillation_type {distillation_type!r}: expected none, soft or hard"
            )
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, images, outputs, targets):
        outputs, outputs_kd = (outputs, None) if isinstance(outputs, torch.Tensor) else outputs

        loss = self.base_criterion(outputs.float(), targets)
        if self.distillation_type == "none":
            return loss
        if outputs_kd is None:
            raise ValueError(
                "distillation needs a model that returns the logits of two heads while it trains"
            )

        with torch.no_grad():
            teacher = self.teacher_model(images).float()
        outputs_kd = outputs_kd.float()

        if self.distillation_type == "soft":
            student = F.log_softmax(outputs_kd / self.tau, dim=1)
            teacher = F.log_softmax(teacher / self.tau, dim=1)
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            kd_loss = divergence * self.tau**2 / student.numel()
        else:
            kd_loss = F.cross_entropy(outputs_kd, teacher.argmax(dim=1))
        return loss * (1 - self.alpha) + kd_loss * self.alpha


class DenseTeacherLoss(nn.Module):
    """The criterion on the targets, and what the model before it was pruned says of the images.

    Hinton et al. 2015, arXiv:1503.02531: (1 - weight) * criterion + weight * tau^2 * the mean over
    images of the Kullback-Leibler divergence KL(teacher || student), both at temperature `tau`. A
    weight of 1 uses no targets.

    criterion: called with logits (batch, classes) and the targets; whatever targets it takes.
    teacher: maps the images to logits (batch, classes). It runs without gradients, in the precision
    of the student.
    outputs: logits (batch, classes), or a pair of them; then each learns both, and the loss is the
    mean.
    """

    def __init__(self, criterion, teacher: nn.Module, weight: float, tau: float = 1.0):
        super().__init__()
        self.criterion = criterion
        self.teacher = teacher
        self.weight = weight
        self.tau = tau

    def forward(self, images, outputs, targets):
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(images).float() / self.tau, dim=1)

        def loss(logits):
            student = F.log_softmax(logits / self.tau, dim=1)
            divergence = F.kl_div(student, wanted, reduction="batchmean", log_target=True)
            loss = self.weight * self.tau**2 * divergence
            if self.weight == 1:
                return loss
            return loss + (1 - self.weight) * self.criterion(logits, targets)

        heads = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return sum(loss(logits.float()) for logits in heads) / len(heads)


class DenseFeaturesLoss(nn.Module):
    """How far features point away from those of the model before it was pruned; no targets.

    The mean over images of 1 - cos(features, dense features), as AM-RADIO (Ranzinger et al. 2024,
    arXiv:2312.06709) has it for the one vector of an image.

    teacher: maps the images to features (batch, dim). It runs without gradients, in the precision
    of the student.
    outputs: features (batch, dim).
    """

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.teacher = teacher

    def forward(self, images, outputs, targets):
        with torch.no_grad():
            wanted = self.teacher(images).float()
        return 1 - F.cosine_similarity(outputs.float(), wanted, dim=1).mean()


class CosubLoss(nn.Module):
    """Co-training of two submodels: each learns the targets and what the other one says.

    Touvron et al. 2022, arXiv:2212.04884. The submodels are two forward passes of one network under
    drop path: `outputs` has the logits of the batch twice, shape (2 * batch, classes). Binary
    cross-entropy throughout; targets are class indices (batch,) or the weights (batch, classes)
    that mixup gives. binary: every class with a weight counts fully.
    """

    def __init__(self, binary: bool = False):
        super().__init__()
        self.binary = binary

    def forward(self, images, outputs, targets):
        first, second = outputs.float().chunk(2)
        if targets.ndim == 1:
            targets = F.one_hot(targets, first.shape[1])
        targets = (targets > 0 if self.binary else targets).to(first.dtype)
        pairs = (
            (first, targets),
            (second, targets),
            (first, second.detach().sigmoid()),
            (second, first.detach().sigmoid()),
        )
        losses = [F.binary_cross_entropy_with_logits(logits, wanted) for logits, wanted in pairs]
        return sum(losses) / 4
