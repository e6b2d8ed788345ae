import copy
import re

import pytest
import timm
import torch
from made_up import pattern_for
from pretend_cuda import CUDA, pretend_cuda
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

import utils
from augment import BatchTransform
from engine import Learner, Progress, StepOptions, evaluate, evaluate_together, train_one_epoch
from losses import CosubLoss, DistillationLoss
from sparsity_factory import (
    SCHEDULES,
    Masks,
    Recipe,
    Sparsifier,
    check_masks,
    compute_masks,
    prunable_weights,
)
from trainer.epochs import distribute
from trainer.training_state import NEWTON_SCHULZ, choose_muon_dtype
from utils import Compute, DivergedError

CPU = Compute(torch.device("cpu"))
PLAIN = DistillationLoss(torch.nn.CrossEntropyLoss())


def tiny_vit(classes=10, drop_path=0.0):
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224",
        img_size=32,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=classes,
        drop_path_rate=drop_path,
    )


def batches(count, size=8, classes=10):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)


def sgd(model):
    """Plain SGD: its steps are as large as the gradients, which AdamW and clipping would hide."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def muon(model):
    """Moves weights whose gradient is zero."""
    return create_optimizer_v2(model, "muon", lr=0.01, weight_decay=0.1)


def weights_of(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def train(
    network,
    loader,
    optimizer,
    *,
    criterion=PLAIN,
    compute=CPU,
    progress=None,
    after_step=None,
    masks=None,
    sparsifier=None,
    ema=None,
    scaler=None,
    **options,
):
    learner = Learner(network, optimizer, ema=ema)
    learner.sparsifier = sparsifier or Sparsifier(
        learner.model, Recipe(), total_steps=99, epoch_steps=9, masks=masks
    )
    learner.scaler = scaler or learner.scaler
    return train_one_epoch(
        learner,
        StepOptions(criterion, compute, **options),
        loader,
        progress or Progress(),
        after_step=after_step,
        print_freq=10,
    )


def test_training_lowers_the_loss():
    model, loader = tiny_vit(), batches(4)
    optimizer = adamw(model)
    losses = [
        train(model, loader, optimizer, progress=Progress(epoch=epoch))["loss"]
        for epoch in range(5)
    ]
    assert losses[-1] < losses[0] - 0.5


def test_masked_training_follows_the_reparametrised_network():
    """Same masks, data and drop path: AdamW, weight decay, clipping and EMA see what they would
    with weight * mask.
    """
    ours, theirs = tiny_vit(drop_path=0.3), tiny_vit(drop_path=0.3)
    chosen = compute_masks(ours, "lamp", 0.7)
    for name, mask in chosen.items():
        prune.custom_from_mask(theirs.get_submodule(name.removesuffix(".weight")), "weight", mask)
    ema = ModelEmaV3(ours, decay=0.9)
    Masks(ema.module, chosen)
    train(
        ours, batches(12), adamw(ours), progress=Progress(5), masks=chosen, ema=ema, clip_grad=0.5
    )
    train(theirs, batches(12), adamw(theirs), progress=Progress(5), clip_grad=0.5)
    averaged = dict(ema.module.named_parameters())
    for name, weight in prunable_weights(ours).items():
        layer = theirs.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(
            weight, layer.weight_orig * layer.weight_mask, atol=1e-5, rtol=1e-4
        )
        assert not weight[~chosen[name]].any()
        assert not averaged[name][~chosen[name]].any()
        assert averaged[name].count_nonzero() == chosen[name].sum()


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one_with_the_same_names():
    """By the compiler's back end that generates no code, since the usual one takes minutes."""
    plain, compiled = tiny_vit(drop_path=0.3), tiny_vit(drop_path=0.3)
    compiled.compile(backend="aot_eager")
    states = []
    for model in (plain, compiled):
        masks, ema = compute_masks(model, "lamp", 0.7), ModelEmaV3(model, decay=0.9)
        train(model, batches(3), adamw(model), masks=masks, ema=ema)
        evaluate(batches(1), model, CPU)
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask)
        states += [model.state_dict(), ema.module.state_dict()]
    for state, expected in zip(states[2:], states[:2], strict=True):
        assert list(state) == list(expected)
        for name, weight in expected.items():
            torch.testing.assert_close(state[name], weight, rtol=1e-3, atol=1e-5)


def test_co_distillation_gives_the_network_each_image_twice_and_the_two_passes_learn_from_each_other():
    loader, options = batches(2), StepOptions(CosubLoss(), CPU, cosub=True)
    ours, theirs = tiny_vit(drop_path=0.5), tiny_vit(drop_path=0.5)
    train_one_epoch(Learner(ours, sgd(ours)), options, loader, Progress())
    optimizer, losses = sgd(theirs.train()), []
    for batch, (images, targets) in enumerate(loader):
        utils.seed_everything(utils.STEP, 0, 0, batch, 0)  # drop path
        first, second = theirs(torch.cat([images, images])).chunk(2)
        assert not torch.equal(first, second)
        wanted = torch.nn.functional.one_hot(targets, 10).float()
        pairs = (
            (first, wanted),
            (second, wanted),
            (first, second.detach().sigmoid()),
            (second, first.detach().sigmoid()),
        )
        losses = [torch.nn.functional.binary_cross_entropy_with_logits(*pair) for pair in pairs]
        optimizer.zero_grad()
        (sum(losses) / 4).backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=1e-4, atol=1e-6)


def test_drop_path_depends_on_seed_epoch_and_step_only():
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        model = tiny_vit(drop_path=0.5)
        train(model, batches(2), adamw(model), progress=Progress(7))
        torch.manual_seed(disturbance)
        results.append(model.head.weight.clone())
    assert torch.equal(*results)


def test_train_mode_off_turns_drop_path_off():
    results = []
    for seed in (1, 2):
        model = tiny_vit(drop_path=0.5)
        train(model, batches(2), adamw(model), progress=Progress(seed), train_mode=False)
        results.append(model.head.weight.clone())
    assert torch.equal(*results)


def test_accumulated_batches_make_the_steps_of_whole_ones_also_at_the_end_of_an_epoch():
    images, targets = batches(1, 24)[0]
    weights, steps = [], []
    # Two steps either way, the second of 8 images only
    for size, accum_iter in ((8, 2), (16, 1)):
        model, progress = tiny_vit(), Progress()
        loader = list(zip(images.split(size), targets.split(size), strict=True))
        train(
            model,
            loader,
            sgd(model),
            progress=progress,
            accum_iter=accum_iter,
            after_step=lambda progress=progress: steps.append((progress.step, progress.images)),
        )
        weights.append(weights_of(model))
    assert steps == [(1, 16), (2, 24)] * 2
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["one-shot", "sr-ste"])
@pytest.mark.parametrize("clip_grad", [None, 0.5])
def test_the_scale_of_the_loss_changes_no_step_and_gradients_are_clipped_without_it(
    schedule, clip_grad
):
    decay, weights = {"sr_decay": 5.0} if schedule == "sr-ste" else {}, []
    for scale in (None, 2.0**20):
        model, scaler = tiny_vit(), scale and torch.amp.GradScaler("cpu", init_scale=scale)
        sparsifier = Sparsifier(
            model,
            Recipe("unif", 0.5, prune_schedule=schedule, **decay),
            total_steps=9,
            epoch_steps=3,
        )
        sparsifier.start()
        train(
            model, batches(3), sgd(model), sparsifier=sparsifier, scaler=scaler, clip_grad=clip_grad
        )
        hidden = [values.flatten() for values in sparsifier.state_dict()["hidden"].values()]
        weights.append(torch.cat([weights_of(model), *hidden]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


def test_a_step_that_overflows_in_float16_is_skipped_and_changes_masks_with_the_next_one():
    # The scale is 2^8 in steps 0 and 2, and in step 1, whose masks are due to change, so large that
    # gradients overflow.
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**8, growth_interval=1, growth_factor=2.0**40, backoff_factor=2.0**-40
    )
    model, seen = tiny_vit(), []
    sparsifier = Sparsifier(
        model,
        Recipe("unif", 0.5, prune_schedule="rigl", prune_every=1),
        total_steps=9,
        epoch_steps=9,
    )
    sparsifier.start()
    optimizer = sgd(model)
    sparsifier.attach(optimizer)

    def after_step():
        masks = torch.cat([mask.flatten() for mask in sparsifier.masks.values()])
        seen.append((scaler.get_scale(), weights_of(model), masks))

    train(
        model,
        batches(3),
        optimizer,
        sparsifier=sparsifier,
        scaler=scaler,
        compute=Compute(CPU.device, torch.float16),
        clip_grad=1.0,
        after_step=after_step,
    )
    scales, weights, masks = zip(*seen, strict=True)
    assert scales == (2.0**48, 2.0**8, 2.0**48)
    assert torch.equal(weights[0], weights[1]) and torch.equal(masks[0], masks[1])
    assert not torch.equal(weights[1], weights[2]) and not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pruned_weights_are_zero_after_every_step_of_an_optimizer_that_moves_them(schedule):
    model = tiny_vit()
    ema = ModelEmaV3(model, decay=0.5)
    recipe = Recipe("unif", 0.5, pattern=pattern_for(schedule), prune_schedule=schedule)
    sparsifier = Sparsifier(model, recipe, total_steps=9, epoch_steps=3)
    sparsifier.start()
    optimizer = muon(model)
    sparsifier.attach(optimizer, [ema.module])
    checked = []

    def after_step():
        for weights in (model.state_dict(), ema.module.state_dict()):
            check_masks(weights, sparsifier.masks)
        checked.append(sparsifier.masks.sparsity())

    train(model, batches(9), optimizer, sparsifier=sparsifier, ema=ema, after_step=after_step)
    assert len(checked) == 9
    assert checked[-1] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize(("native", "bound"), [(torch.bfloat16, 0.1), (None, 1e-5)])
def test_muon_computes_in_float32_unless_the_device_has_bfloat16(native, bound, monkeypatch):
    # As another processor has it
    monkeypatch.setattr(utils, "choose_amp", lambda name, device: native)
    # And the old one afterwards
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", NEWTON_SCHULZ)
    choose_muon_dtype(CPU.device)
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    weight.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    a, b, c = 3.4445, -4.775, 2.0315
    timm.optim.Muon(
        [weight], lr=1.0, momentum=0.0, adjust_lr_fn=None, ns_coefficients=(a, b, c)
    ).step()

    expected = weight.grad.double() / weight.grad.double().norm()
    for _ in range(5):
        squared = expected @ expected.T
        expected = a * expected + (b * squared + c * squared @ squared) @ expected
    error = (weight.detach() + expected).abs().max()
    assert bound / 100 < error < bound


def test_processes_exchange_gradients_once_a_step(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        model, exchanges = DistributedDataParallel(tiny_vit()), []

        def hook(_, bucket):
            exchanges.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        train(model, batches(5), adamw(model.module), accum_iter=2)
    finally:
        torch.distributed.destroy_process_group()
    assert exchanges.count(0) == 3


class WithBatchNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 10)

    def forward(self, images):
        return self.head(self.norm(images).mean((2, 3)))


def test_distributing_a_model_leaves_its_statistics_and_gradients_as_they_were(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        model = WithBatchNorm().eval()
        before = copy.deepcopy(model.state_dict())
        network = distribute(model, StepOptions(PLAIN, CPU), 32, 4)
        weight = next(network.parameters())
        network(torch.zeros(4, 3, 32, 32)).sum().backward()
        assert weight.grad._is_view() and network.static_graph
        accumulating = distribute(model, StepOptions(PLAIN, CPU, accum_iter=2), 32, 4)
        assert not accumulating.static_graph
        assert not distribute(model, StepOptions(PLAIN, CPU), 32, 4, False).static_graph
        model.load_state_dict(before)
    finally:
        torch.distributed.destroy_process_group()
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_training_step_waits_for_the_device_but_those_with_a_log_line():
    found = []
    with pretend_cuda() as waits:
        model = tiny_vit(drop_path=0.1).to(CUDA)
        masks = {
            name: torch.ones_like(w, dtype=bool) for name, w in prunable_weights(model).items()
        }
        erasing = RandomErasing(1.0, mode="pixel", device=CUDA)
        train(
            model,
            [(images.byte(), targets) for images, targets in batches(25)],
            adamw(model),
            criterion=DistillationLoss(SoftTargetCrossEntropy()),
            compute=Compute(CUDA),
            batch_transform=BatchTransform(CUDA, erasing, Mixup(0.8, 1.0, num_classes=10)),
            masks=masks,
            ema=ModelEmaV3(model),
            clip_grad=1.0,
            after_step=lambda: found.append(waits.total()),
        )
    # A line is logged after steps 0, 10 and 20, and its wait is counted with the next step.
    assert [step for step in range(1, 25) if found[step] > found[step - 1]] == [1, 11, 21]
    assert found[-1] - found[0] == 3


def test_no_batch_of_an_evaluation_waits_for_the_device_but_those_with_a_log_line():
    found = []
    with pretend_cuda() as waits:
        evaluate(
            batches(25),
            tiny_vit().to(CUDA),
            Compute(CUDA),
            after_batch=lambda *_: found.append(waits.total()),
            print_freq=10,
        )
    assert [batch for batch in range(1, 25) if found[batch] > found[batch - 1]] == [1, 11, 21]
    assert found[-1] - found[0] == 3


def test_a_loss_that_is_not_finite_stops_the_training():
    model, loader = tiny_vit(), batches(30)
    loader[1][0].fill_(float("nan"))
    seen = []

    def criterion(images, logits, targets):
        seen.append(1)
        return torch.nn.functional.cross_entropy(logits, targets)

    with pytest.raises(DivergedError, match="epoch 3"):
        train(model, loader, adamw(model), criterion=criterion, progress=Progress(epoch=3))
    assert len(seen) <= 12


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluation_counts_every_image_once_whatever_the_last_batch(classes):
    model, (images, targets) = tiny_vit(classes).eval(), batches(1, 23, classes)[0]
    logits = model(images)
    stats = evaluate(list(zip(images.split(10), targets.split(10), strict=True)), model, CPU)
    top5 = logits.topk(min(5, classes)).indices
    assert stats["acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).sum().item() / 23)
    assert stats["acc5"] == pytest.approx(100 * (top5 == targets[:, None]).any(1).sum().item() / 23)
    assert stats["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_are_evaluated_together_have_the_figures_of_each_alone_to_the_bit(dtype):
    first = tiny_vit()
    second = copy.deepcopy(first)
    torch.nn.init.normal_(second.head.weight)

    class Counting(list):
        read = 0

        def __iter__(self):
            for batch in super().__iter__():
                self.read += 1
                yield batch

    compute = Compute(torch.device("cpu"), dtype)
    loader = Counting(batches(3))
    found = evaluate_together(loader, {"": first, "ema": second}, compute)
    assert loader.read == 3
    assert found == {
        "": evaluate(batches(3), first, compute),
        "ema": evaluate(batches(3), second, compute),
    }


def test_log_lines_name_the_figures_of_models_that_are_evaluated_together(capsys):
    evaluate_together(batches(2), {"": tiny_vit(), "ema": tiny_vit()}, CPU)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"Test:  \[0/2\] .* loss: .* acc1: .* ema_loss: .* ema_acc5: ", lines[0])
    assert lines[-2].startswith("* Acc@1 ") and lines[-1] == f"{lines[-2]} (ema)"


def test_where_each_process_evaluates_for_itself_all_have_the_figures_of_the_first(monkeypatch):
    loader = [(images, targets) for images, targets in batches(2)]
    first = evaluate(loader, tiny_vit(), CPU)
    sent = []
    monkeypatch.setattr(utils, "sum_over_processes", lambda totals: sent.append(totals) or totals)
    evaluate(loader, tiny_vit(), CPU)
    monkeypatch.setattr(utils, "is_main_process", lambda: False)
    monkeypatch.setattr(
        utils,
        "sum_over_processes",
        lambda totals: [sum(pair) for pair in zip(sent[0], totals, strict=True)],
    )
    # Another model, which counts otherwise
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    assert evaluate(loader, other, CPU) == first


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    evaluate(batches(2), model, CPU)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_training_on_a_gpu_keeps_pruned_weights_at_zero(amp_dtype):
    device = torch.device("cuda")
    model = tiny_vit(drop_path=0.1).to(device)
    chosen = compute_masks(model, "lamp", 0.5)
    scaler = torch.amp.GradScaler("cuda", enabled=amp_dtype == torch.float16)
    stats = train(
        model,
        batches(4),
        adamw(model),
        compute=Compute(device, amp_dtype),
        scaler=scaler,
        clip_grad=1.0,
        masks=chosen,
        ema=ModelEmaV3(model),
    )
    assert stats["loss"] > 0
    for name, weight in prunable_weights(model).items():
        assert weight.device.type == "cuda"
        assert torch.equal(weight != 0, chosen[name])
