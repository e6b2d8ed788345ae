import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.nn.utils import prune

import engine
from engine import DivergedError, evaluate, train_one_epoch
from losses import DistillationLoss
from sparsity_factory import Masks, compute_masks, prunable_weights

CPU = torch.device("cpu")
PLAIN = DistillationLoss(torch.nn.CrossEntropyLoss())


def tiny_vit(classes=10, drop_path=0.0):
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2,
                             num_classes=classes, drop_path_rate=drop_path)


def batches(count, size=8, classes=10):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 32, 32, generator=generator),
             torch.randint(classes, (size,), generator=generator)) for _ in range(count)]


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)


def test_training_lowers_the_loss():
    model, loader = tiny_vit(), batches(4)
    optimizer = adamw(model)
    losses = [train_one_epoch(model, PLAIN, loader, optimizer, CPU, epoch)["loss"]
              for epoch in range(5)]
    assert losses[-1] < losses[0] - 0.5


def test_masked_training_follows_the_reparametrised_network():
    """Same masks, data and drop path: AdamW, weight decay, clipping and EMA see what they would with weight * mask."""
    ours, theirs = tiny_vit(drop_path=0.3), tiny_vit(drop_path=0.3)
    chosen = compute_masks(ours, "lamp", 0.7)
    masks = Masks(ours, chosen)
    for name, mask in chosen.items():
        prune.custom_from_mask(theirs.get_submodule(name.removesuffix(".weight")), "weight", mask)
    ema = ModelEmaV3(ours, decay=0.9)
    options = {"clip_grad": 0.5, "seed": 5}
    train_one_epoch(ours, PLAIN, batches(12), adamw(ours), CPU, 0, masks=masks, ema=ema, **options)
    train_one_epoch(theirs, PLAIN, batches(12), adamw(theirs), CPU, 0, **options)
    averaged = dict(ema.module.named_parameters())
    for name, weight in prunable_weights(ours).items():
        layer = theirs.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(weight, layer.weight_orig * layer.weight_mask, atol=1e-5, rtol=1e-4)
        assert not weight[~chosen[name]].any()
        assert not averaged[name][~chosen[name]].any()
        assert averaged[name].count_nonzero() == chosen[name].sum()


def test_drop_path_depends_on_seed_epoch_and_step_only():
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        model = tiny_vit(drop_path=0.5)
        train_one_epoch(model, PLAIN, batches(2), adamw(model), CPU, 0, seed=7)
        torch.manual_seed(disturbance)
        results.append(model.head.weight.clone())
    assert torch.equal(*results)


def test_train_mode_off_turns_drop_path_off():
    results = []
    for seed in (1, 2):
        model = tiny_vit(drop_path=0.5)
        train_one_epoch(model, PLAIN, batches(2), adamw(model), CPU, 0, seed=seed, train_mode=False)
        results.append(model.head.weight.clone())
    assert torch.equal(*results)


def test_a_loss_that_is_not_finite_stops_the_training():
    model, loader = tiny_vit(), batches(30)
    loader[1][0].fill_(float("nan"))
    seen = []

    def criterion(images, logits, targets):
        seen.append(1)
        return torch.nn.functional.cross_entropy(logits, targets)

    with pytest.raises(DivergedError, match="epoch 3"):
        train_one_epoch(model, criterion, loader, adamw(model), CPU, 3)
    assert len(seen) <= engine.PRINT_FREQ + 2


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluation_counts_every_image_once_whatever_the_last_batch(classes):
    model, (images, targets) = tiny_vit(classes).eval(), batches(1, 23, classes)[0]
    logits = model(images)
    stats = evaluate(list(zip(images.split(10), targets.split(10), strict=True)), model, CPU)
    top5 = logits.topk(min(5, classes)).indices
    assert stats["acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).sum().item() / 23)
    assert stats["acc5"] == pytest.approx(100 * (top5 == targets[:, None]).any(1).sum().item() / 23)
    assert stats["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    evaluate(batches(2), model, CPU)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_masked_training_on_a_gpu_keeps_pruned_weights_at_zero(amp_dtype):
    device = torch.device("cuda")
    model = tiny_vit(drop_path=0.1).to(device)
    chosen = compute_masks(model, "lamp", 0.5)
    masks = Masks(model, chosen)
    scaler = torch.amp.GradScaler("cuda", enabled=amp_dtype == torch.float16)
    stats = train_one_epoch(model, PLAIN, batches(4), adamw(model), device, 0, amp_dtype=amp_dtype, scaler=scaler,
                            clip_grad=1.0, masks=masks, ema=ModelEmaV3(model))
    assert stats["loss"] > 0
    for name, weight in prunable_weights(model).items():
        assert weight.device.type == "cuda"
        assert torch.equal(weight != 0, chosen[name])
