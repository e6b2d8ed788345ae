"""Measures every row of docs/performance.md and writes the page; `make bench` runs it whole.

    python benchmarks/run.py                  # everything, then the page
    python benchmarks/run.py masks step       # some groups only

The page is written once all groups have been measured. Each figure is compared with what a user
would otherwise use, measured in the same run. The machine should be idle.
"""

import argparse
import contextlib
import copy
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from measure import (
    CPU,
    ROOT,
    batches,
    in_turns,
    over,
    peak_above,
    random_model,
    row,
    seconds,
    step_seconds,
    under,
)
from PIL import Image
from smaller import kernels, sparse_products, structured
from timm.data import create_transform
from timm.optim import create_optimizer_v2, muon
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import utils
from engine import Learner, evaluate
from sparsity_factory import (
    SCHEDULES,
    Masks,
    Recipe,
    Sparsifier,
    collect_statistics,
    compute_masks,
    obs_prune,
    prunable_weights,
    walk_layers,
)
from sparsity_factory import prune as prune_and_reconstruct
from trainer.arguments import parse_args
from trainer.builders import build_batch_transform, build_loaders, prepare_model
from trainer.calibration_images import Calibration
from trainer.training_state import NEWTON_SCHULZ, TrainingState

RESULTS = ROOT / "output" / "benchmarks.json"
PAGE = ROOT / "docs" / "performance.md"
SPARSITY = 0.65
TWO_OF_FOUR = {"sparsity": {"mode": "nxm", "level": {"default": [2, 4]}}}
LIMITS = {
    "lamp": (1.0, 10),
    "glob": (0.5, 25),
    "unif": (0.6, 10),
    "unifplus": (0.6, 10),
    "erk": (0.6, 10),
}
REQUESTS = (*LIMITS, "2:4")
BATCH = 64  # images of a training step
CALIBRATION = (2, 32)  # batches that statistics look at, and images in each
PRUNE_EVERY = 100  # steps between two changes of the masks


def choose(model, pruner: str) -> dict:
    if pruner == "2:4":
        return compute_masks(model, "custom", custom_config=TWO_OF_FOUR)
    return compute_masks(model, pruner, SPARSITY)


# ---- the groups: each returns its rows, or a table of its own ----


def masks() -> list[dict]:
    """Choosing the masks of DeiT-Base."""
    model = random_model("deit_base_patch16_224")
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in prunable_weights(model)]

    def all_at_once():
        prune.global_unstructured(
            [(layer, "weight") for layer in copy.deepcopy(layers)],
            prune.L1Unstructured,
            amount=SPARSITY,
        )

    def layer_by_layer():
        for layer in copy.deepcopy(layers):
            prune.l1_unstructured(layer, "weight", SPARSITY)

    copying = seconds(lambda: copy.deepcopy(layers))
    others = {
        "prune.global_unstructured": seconds(all_at_once, 1) - copying,
        "prune.l1_unstructured": seconds(layer_by_layer, 1) - copying,
    }

    rows = []
    most = 0
    for pruner in tqdm(REQUESTS, "masks"):
        most = max(most, peak_above(partial(choose, model, pruner)))
        taken = seconds(partial(choose, model, pruner), 6)
        if pruner == "2:4":
            what = "2:4 everywhere, DeiT-Base"
            rows.append(row(what, "at most 0.8 s", f"{taken:.2f} s", over(taken, 0.8, "s")))
            continue

        limit, times = LIMITS[pruner]
        other = f"prune.{'global' if pruner in ('lamp', 'glob') else 'l1'}_unstructured"
        ratio = others[other] / taken
        rows.append(
            row(
                f"`{pruner}` masks, DeiT-Base",
                f"at most {limit} s, {times} times `{other}`",
                f"{taken:.2f} s, {ratio:.0f} times ({others[other]:.1f} s)",
                over(taken, limit, "s") or under(ratio, times),
            )
        )

    what = "memory above the model for any of them"
    most /= 1e9
    rows.append(row(what, "at most 1.0 GB", f"{most:.2f} GB", over(most, 1, "GB")))
    return rows


def growth() -> dict:
    """Seconds and memory of every pruner, by size of the model."""
    table = {}
    for family in tqdm(("deit_tiny", "deit_small", "deit_base", "vit_large"), "growth"):
        name = f"{family}_patch16_224"
        model = random_model(name)
        most = max(peak_above(partial(choose, model, pruner)) for pruner in REQUESTS)
        weights = sum(weight.numel() for weight in prunable_weights(model).values())
        taken = {pruner: seconds(partial(choose, model, pruner), 2) for pruner in REQUESTS}
        table[name] = {"weights": weights, "memory": most, **taken}
    return table


def ours(name: str, *flags: str) -> Learner:
    """A model and its optimizer as main.py makes them."""
    args = parse_args(["--data-path", "unused", "--model", name, "--no-pretrained", *flags])
    with contextlib.redirect_stdout(io.StringIO()):
        model = prepare_model(args, 1000, {}, CPU)
        sparsifier = Sparsifier(model, Recipe(), total_steps=1, epoch_steps=1)
        return TrainingState(model, sparsifier, args, utils.Compute(CPU)).learner


def step() -> list[dict]:
    """The time that masks add to a training step.

    It is measured without the step, since steps vary by more than that.
    """
    rows = []
    for title in tqdm(("DeiT-Tiny", "DeiT-Small"), "step"):
        state = ours(f"{title.lower().replace('-', '_')}_patch16_224")
        chosen = compute_masks(state.model, "lamp", SPARSITY)
        kept = Masks(state.model, chosen)
        total_bytes = sum(mask.element_size() * mask.numel() for mask in kept.values())
        bytes_each = total_bytes / sum(mask.numel() for mask in kept.values())

        # A dtype that the machine has no instructions for is slow, and not measured.
        dense = {
            dtype: step_seconds(state.model, state.optimizer, 64, dtype)
            for dtype in {torch.float32, utils.choose_amp("auto", CPU)}
        }

        def masked(kept=kept):
            kept.apply_to_grads()
            kept.apply()

        added = seconds(masked, 10)
        theirs = torch_prune_seconds(state.model, chosen)

        for dtype, whole in dense.items():
            share = 100 * added / whole
            rows.append(
                row(
                    f"masks in a step, {title}, batch 64, {str(dtype).removeprefix('torch.')}",
                    "at most 1 % of the dense step, 1 byte a weight, less than "
                    "`torch.nn.utils.prune`",
                    f"{share:.2f} %, {bytes_each:g} byte ({1e3 * added:.1f} ms of {whole:.2f} s; "
                    f"`prune` {1e3 * theirs:.1f} ms)",
                    over(share, 1, "%") or over(bytes_each, 1, "bytes") or over(added, theirs, "s"),
                )
            )
    return rows


def torch_prune_seconds(model, masks: dict) -> float:
    """The time that the same masks add to a step with `torch.nn.utils.prune`, which it applies."""
    layers = [model.get_submodule(weight.removesuffix(".weight")) for weight in masks]
    for layer, mask in zip(layers, masks.values(), strict=True):
        prune.custom_from_mask(layer, "weight", mask)
    hooks = [(layer, next(iter(layer._forward_pre_hooks.values()))) for layer in layers]

    def reparametrised():
        for layer, hook in hooks:
            hook(layer, ())
            layer.weight.backward(torch.ones_like(layer.weight))

    return seconds(reparametrised, 10)


def few() -> list[dict]:
    """The CPU time and the memory of steps that train norms, biases and head alone."""
    compute = utils.Compute.choose("cpu", "auto")
    steps = 3

    def measured(*flags: str) -> tuple[float, float]:
        """Seconds of a step, and the gigabytes that it needs besides the model."""
        learner = ours("deit_small_patch16_224", *flags)

        def train():
            step_seconds(learner.model, learner.optimizer, 16, compute.dtype, steps - 1)

        start = time.process_time()
        needed = peak_above(train)
        return (time.process_time() - start) / steps, needed / 1e9

    time_of_few, memory_of_few = measured("--train-only", "norms,biases,head")
    time_of_all, memory_of_all = measured()
    faster = time_of_all / time_of_few
    share = memory_of_few / memory_of_all
    return [
        row(
            "step of `--train-only norms,biases,head`, DeiT-Small, batch 16, "
            f"{str(compute.dtype).removeprefix('torch.')}",
            "1.2 times as fast as a step of all parameters, in 0.7 of the memory",
            f"{faster:.2f} times ({time_of_few:.2f} s of CPU time, {time_of_all:.2f} s), in "
            f"{share:.2f} of the memory ({memory_of_few:.2f} GB, {memory_of_all:.2f} GB)",
            under(faster, 1.2) or over(share, 0.7, "of the memory"),
        )
    ]


def schedules() -> list[dict]:
    """The time that a schedule adds to a training step of DeiT-Small.

    It is measured without the step, since steps vary by more than that.
    """
    compute = utils.Compute.choose("cpu", "auto")
    state = ours("deit_small_patch16_224")

    # The steps leave gradients and the optimizer's state, which schedules need.
    dense = step_seconds(state.model, state.optimizer, BATCH, compute.dtype)
    weights = copy.deepcopy(state.model.state_dict())

    rows = []
    for schedule in tqdm(SCHEDULES, "schedules"):
        state.model.load_state_dict(weights)
        recipe = Recipe("lamp", SPARSITY, prune_schedule=schedule)
        sparsifier = Sparsifier(
            state.model,
            recipe,
            total_steps=100 * PRUNE_EVERY,
            epoch_steps=10 * PRUNE_EVERY,
            share=utils.on_first_process,
        )
        sparsifier.start()
        sparsifier.attach(state.optimizer)
        steps = range(1, sparsifier.steps.total)
        changes = [step for step in steps if sparsifier.schedule.changes_at(step)]

        def calls(step, sparsifier=sparsifier):
            sparsifier.step = step  # the same one each time; step 1 changes no masks
            sparsifier.begin_step()
            sparsifier.end_backward()
            sparsifier.end_step()

        plain = seconds(partial(calls, 1), 10)
        change = seconds(partial(calls, changes[0]), 3) - plain if changes else 0.0
        share = 100 * (plain + change / PRUNE_EVERY) / dense
        copies = sum(values.nbytes for values in sparsifier.state_dict()["hidden"].values())

        details = f"{1e3 * plain:.1f} ms each step of {dense:.2f} s"
        if changes:
            details += f", {1e3 * change:.0f} ms a change, counted each {PRUNE_EVERY} steps"
        if copies:
            details += f"; {copies / 1e6:.0f} MB for the second copy"
        limit = 6 if sparsifier.schedule.trains_pruned else 2
        rows.append(
            row(
                f"schedule `{schedule}`, DeiT-Small, batch {BATCH}",
                f"at most {limit} % of the dense step",
                f"{share:.2f} % ({details})",
                over(share, limit, "%"),
            )
        )
    return rows + again()


def again() -> list[dict]:
    """Choosing the masks of DeiT-Base once more, as a schedule does."""
    model = random_model("deit_base_patch16_224")
    recipe = Recipe("lamp", SPARSITY, prune_schedule="gradual")
    sparsifier = Sparsifier(
        model, recipe, total_steps=99, epoch_steps=9, share=utils.on_first_process
    )
    sparsifier.start()

    taken = in_turns({"again": sparsifier.choose, "lamp": partial(choose, model, "lamp")}, 4)
    ratio = taken["again"] / taken["lamp"]
    return [
        row(
            "masks chosen again by a schedule, DeiT-Base",
            "at most 1.1 times `lamp` masks",
            f"{ratio:.2f} times ({taken['again']:.2f} s, {taken['lamp']:.2f} s)",
            over(ratio, 1.1, "times"),
        )
    ]


class Operations(TorchDispatchMode):
    """Counts operations that compute: on a GPU each of them is asked for by the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


def change() -> list[dict]:
    """The host's part of a step of `sr_ste_2_4.yaml`, which chooses masks at each step.

    The layers are as many as DeiT-Base's, and so narrow that they take no time to compute.
    """
    model = timm.create_model("deit_base_patch16_224", embed_dim=16, num_heads=2)
    recipe = Recipe("unif", pattern="2:4", prune_schedule="sr-ste", prune_end=1.0, prune_every=1)
    sparsifier = Sparsifier(model, recipe, total_steps=10**6, epoch_steps=10**4)
    sparsifier.start()
    sparsifier.attach(torch.optim.AdamW(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def step():
        sparsifier.begin_step()
        sparsifier.end_backward()
        sparsifier.end_step()

    step()  # step 0 changes no masks
    taken = seconds(step, 60)
    with Operations() as operations:
        step()
    each = operations.count / len(sparsifier.masks)
    return [
        row(
            "host's part of a step of `configs/run/sr_ste_2_4.yaml`, 48 layers as in DeiT-Base",
            "at most 25 operations a layer",
            f"{each:.0f} operations a layer, {1e3 * taken:.1f} ms",
            over(each, 25, "operations"),
        )
    ]


def statistics() -> list[dict]:
    """The time to collect statistics, and that of a pass of DeiT-Small over the same images."""
    compute = utils.Compute.choose("cpu", "auto")
    data = batches(*CALIBRATION)
    model = ours("deit_small_patch16_224").model
    loss = torch.nn.functional.cross_entropy

    def evaluation_pass():
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate(data, model, compute)

    def training_pass():
        model.train()
        for images, targets in data:
            with compute.autocast():
                outputs = model(images)
            loss(outputs.float(), targets).backward()
            model.zero_grad()

    def collected(need):
        with compute.autocast():
            collect_statistics(model, data, loss, {need})

    rows = []
    passes = [
        (evaluation_pass, "an evaluation", ("input_norms", "gram")),
        (training_pass, "a training pass", ("gradient", "squared_gradient")),
    ]
    for pass_, name, needs in passes:
        taken = in_turns({"pass": pass_, **{need: partial(collected, need) for need in needs}}, 4)
        for need in needs:
            ratio = taken[need] / taken["pass"]
            rows.append(
                row(
                    f"collecting `{need}`, DeiT-Small",
                    f"at most 1.3 times {name} of the same images",
                    f"{ratio:.2f} times ({taken[need]:.2f} s, {taken['pass']:.2f} s)",
                    over(ratio, 1.3, "times"),
                )
            )
    return rows


def plain_obs(weight, gram, kept: int, damping: float = 0.01, block_size: int = 128):
    """`obs_prune` as plainly as it can be written: each column updates all to its right."""
    weight = weight.double()
    outputs, inputs = weight.shape
    damped = gram + damping * gram.diagonal().mean() * torch.eye(inputs, dtype=gram.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    mask = torch.zeros(outputs, inputs, dtype=torch.bool)

    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        share = round(kept * end / inputs) - round(kept * start / inputs)
        costs = (weight[:, start:end] / factor.diagonal()[start:end]).square()
        mask[:, start:end] = costs >= costs.flatten().topk(share).values[-1]

        for column in range(start, end):
            error = weight[:, column] * ~mask[:, column] / factor[column, column]
            weight[:, column:] -= torch.outer(error, factor[column, column:])
    return weight * mask, mask


def reconstruction() -> list[dict]:
    """Optimal Brain Surgeon on a layer, and on DeiT-Small layer after layer."""
    return [obs_of_layer(), obs_of_model()]


def obs_of_layer() -> dict:
    generator = torch.Generator().manual_seed(0)
    inputs = 3072
    outputs = 768
    tokens = torch.randn(2 * inputs, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    gram = (tokens.T @ tokens).double()
    kept = round(weight.numel() * (1 - SPARSITY))
    found = {}

    def pruned(function):
        found[function] = function(weight, gram, kept)[1]

    taken = in_turns({"ours": partial(pruned, obs_prune), "plain": partial(pruned, plain_obs)}, 1)

    # Of two weights that cost nearly the same, either may be pruned.
    assert int((found[obs_prune] != found[plain_obs]).sum()) <= 20

    ratio = taken["plain"] / taken["ours"]
    return row(
        f"`obs_prune`, {inputs} inputs, {outputs} outputs",
        "2 times plain code, column by column",
        f"{ratio:.1f} times ({taken['ours']:.1f} s, {taken['plain']:.1f} s)",
        under(ratio, 2),
    )


def obs_of_model() -> dict:
    compute = utils.Compute.choose("cpu", "auto")
    data = batches(*CALIBRATION)
    model = ours("deit_small_patch16_224").model
    dense = copy.deepcopy(model.state_dict())

    def evaluation_pass():
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate(data, model, compute)

    def walk():
        with compute.autocast():
            layers = walk_layers(model, data)
        for _ in layers:
            pass

    def whole():
        model.load_state_dict(dense)
        with compute.autocast():
            prune_and_reconstruct(model, "lamp", SPARSITY, batches=data)

    taken = in_turns({"evaluation": evaluation_pass, "walk": walk, "whole": whole}, 2)
    ratio = taken["walk"] / taken["evaluation"]
    whole_ratio = taken["whole"] / taken["evaluation"]
    images = CALIBRATION[0] * CALIBRATION[1]
    return row(
        f"`prune` of DeiT-Small, {images} images, without factors and updates",
        "at most 4 times an evaluation of the same images",
        f"{ratio:.1f} times ({taken['walk']:.1f} s, {taken['evaluation']:.1f} s; with factors and "
        f"updates {whole_ratio:.1f} times, {taken['whole']:.1f} s)",
        over(ratio, 4, "times"),
    )


def products(dtype) -> float:
    """How many times as fast as in float32 are matrix products of DeiT-Small's MLP, batch 16."""

    def product(kind):
        inputs = torch.randn(16 * 197, 384, dtype=kind)
        weight = torch.randn(1536, 384, dtype=kind)
        return lambda: torch.nn.functional.linear(inputs, weight)

    taken = in_turns({"plain": product(torch.float32), "quick": product(dtype)}, 50)
    return taken["plain"] / taken["quick"]


def train() -> list[dict]:
    """A training step of DeiT-Small in the machine's fastest dtype, and a plain one in float32."""
    dtype = utils.choose_amp("auto", CPU)
    state = ours("deit_small_patch16_224")
    timm.layers.set_fused_attn(True)  # as it is by default
    model = random_model("deit_small_patch16_224")
    optimizer = torch.optim.AdamW(model.parameters())
    quick = plain = float("inf")
    for _ in tqdm(range(3), "train"):  # in turns, since the speed of a machine drifts
        quick = min(quick, step_seconds(state.model, state.optimizer, 16, dtype))
        plain = min(plain, step_seconds(model, optimizer, 16, torch.float32))

    name = str(dtype).removeprefix("torch.")
    return [
        row(
            "training step, DeiT-Small, batch 16, `--amp auto`",
            "2.5 times a float32 step with timm's defaults",
            f"{plain / quick:.2f} times ({16 / quick:.1f} images/s in {name}, {16 / plain:.1f} in "
            f"float32; matrix products alone {products(dtype):.2f} times)",
            under(plain / quick, 2.5),
        ),
        muon_step(),
    ]


def muon_step() -> dict:
    """A step of Muon on the sample's model, and one of timm's, which is in bfloat16 everywhere."""
    model = ours("deit_sample_patch4_28").model
    optimizer = create_optimizer_v2(model, "muon")
    chosen = muon.zeropower_via_newtonschulz
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)

    def step(newton_schulz):
        muon.zeropower_via_newtonschulz = newton_schulz
        optimizer.step()

    taken = in_turns({"quick": lambda: step(chosen), "plain": lambda: step(NEWTON_SCHULZ)}, 4)
    muon.zeropower_via_newtonschulz = chosen
    quick, plain = taken["quick"], taken["plain"]
    return row(
        "step of `--opt muon`, the sample's model",
        "no slower than timm's, which is in bfloat16",
        f"{plain / quick:.1f} times ({1e3 * quick:.0f} ms, {1e3 * plain:.0f} ms)",
        under(plain / quick, 0.95),
    )


def evaluation() -> list[dict]:
    """Evaluation of DeiT-Small, likewise, and how the dtype changes the accuracy of the sample."""
    dtype = utils.choose_amp("auto", CPU)

    def run(model, dtype):
        with contextlib.redirect_stdout(io.StringIO()):
            return evaluate(batches(2, 32), model, utils.Compute(CPU, dtype))

    state = ours("deit_small_patch16_224")
    timm.layers.set_fused_attn(True)  # as it is by default
    model = random_model("deit_small_patch16_224")
    taken = in_turns(
        {"quick": lambda: run(state.model, dtype), "plain": lambda: run(model, torch.float32)}, 4
    )

    accuracy = []
    for amp in ("auto", "off"):
        args = parse_args(["--amp", amp])
        with contextlib.redirect_stdout(io.StringIO()):
            loaders = build_loaders(args, CPU)
            sample = prepare_model(args, loaders.num_classes, {}, CPU)
            compute = utils.Compute.choose("cpu", amp)
            accuracy.append(evaluate(loaders.val, sample, compute)["acc1"])

    quick, plain = taken["quick"], taken["plain"]
    apart = abs(accuracy[0] - accuracy[1])
    return [
        row(
            "evaluation, DeiT-Small, `--amp auto`",
            "2.5 times float32 with timm's defaults, accuracy of the sample within 0.1 points",
            f"{plain / quick:.2f} times ({64 / quick:.0f} images/s, {64 / plain:.0f} in float32), "
            f"{apart:.2f} points apart",
            under(plain / quick, 2.5) or over(apart, 0.1, "points"),
        )
    ]


def inputs() -> list[dict]:
    """Images per second of the training loader, and of a plain ImageFolder and DataLoader."""
    # "workers" is ours without the transforms of whole batches.
    rates = {"ours": [], "workers": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        make_images(folder)
        data = ["--data-path", folder, "--model", "deit_small_patch16_224", "--num_workers", "2"]
        args = parse_args([*data, "--no-repeated-aug", "--mixup", "0", "--cutmix", "0"])

        # Ours is made first, because that repairs timm's posterize for both.
        loaders = {"ours": build_loaders(args, CPU).train}
        loaders["workers"] = loaders["ours"]
        loaders["plain"] = plain_loader(folder, args)
        transform = build_batch_transform(args, 1, CPU)

        # Many short passes in turns, since the speed of the machine drifts.
        for _ in tqdm(range(16), "inputs"):
            for kind, loader in loaders.items():
                start = time.perf_counter()
                count = 0
                for images, targets in loader:
                    if kind == "ours":
                        images, _ = transform(images, targets)
                    count += len(images)
                rates[kind].append(count / (time.perf_counter() - start))

    # The first pass of each starts its workers.
    quick, workers, plain = (float(np.median(rates[kind][1:])) for kind in rates)
    return [
        row(
            "input pipeline, JPEG of 500 x 375, DeiT's training transforms, 2 workers",
            "1.4 times ImageFolder and DataLoader with timm's transform",
            f"{quick / plain:.2f} times ({quick:.0f} and {plain:.0f} images/s; {workers:.0f} "
            "before batches are normalized)",
            under(quick / plain, 1.4),
        )
    ]


def startup() -> list[dict]:
    """Listing 200,000 small files: for a sweep of four recipes by images, and for an evaluation."""
    compute = utils.Compute(CPU)
    model = random_model("deit_tiny_patch16_224")
    with tempfile.TemporaryDirectory() as folder:
        make_small_files(Path(folder), classes=1000, images=200)
        args = parse_args(["--data-path", folder, "--num_workers", "0"])
        evaluation = argparse.Namespace(**{**vars(args), "eval": True})

        def recipes():
            loaders = build_loaders(args, CPU)
            for _ in range(4):
                Calibration(args, model, compute, training_images=loaders.training_images)

        with contextlib.redirect_stdout(io.StringIO()):
            taken = in_turns(
                {
                    "train": lambda: ImageFolder(f"{folder}/train"),
                    "val": lambda: ImageFolder(f"{folder}/val"),
                    "recipes": recipes,
                    "evaluation": lambda: build_loaders(evaluation, CPU),
                },
                4,
            )

    both = taken["train"] + taken["val"]
    six = both + 4 * taken["train"]
    return [
        row(
            "listing 200,000 images of 1000 classes for training, validation and four recipes that "
            "look at images",
            "3 times as quick as an `ImageFolder` for each",
            f"{six / taken['recipes']:.1f} times ({taken['recipes']:.2f} s, {six:.2f} s)",
            under(six / taken["recipes"], 3),
        ),
        row(
            "listing them for `--eval`",
            "2 times as quick as an `ImageFolder` for each of both splits",
            f"{both / taken['evaluation']:.1f} times ({taken['evaluation']:.2f} s, {both:.2f} s)",
            under(both / taken["evaluation"], 2),
        ),
    ]


def make_small_files(folder: Path, classes: int, images: int) -> None:
    """Fills a folder with training images of a pixel, and one validation image of each class."""
    for split, count in (("train", images), ("val", 1)):
        for name in range(classes):
            place = folder / split / f"class{name}"
            place.mkdir(parents=True)
            first = place / "0.png"
            Image.new("RGB", (1, 1)).save(first)
            for number in range(1, count):
                (place / f"{number}.png").hardlink_to(first)


def make_images(folder: str) -> None:
    """Fills a folder with 512 training images, JPEG of 500 x 375, and one to validate on."""
    for part in ("train", "val"):
        Path(folder, part, "one").mkdir(parents=True)

    random = np.random.RandomState(0)
    for number in range(512):
        coarse = Image.fromarray(random.randint(0, 256, (24, 32, 3), dtype=np.uint8))
        image = coarse.resize((500, 375), Image.Resampling.BICUBIC)
        image.save(f"{folder}/train/one/{number}.jpg", quality=90)
    coarse.save(f"{folder}/val/one/0.jpg")


def plain_loader(folder: str, args) -> DataLoader:
    """A training loader as made from timm's transform alone."""
    transform = create_transform(
        224,
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )

    return DataLoader(
        ImageFolder(f"{folder}/train", transform),
        64,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
    )


def sample() -> list[dict]:
    """The sample run."""
    flags = ["--pruner", "lamp", "--sparsity", str(SPARSITY)]
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    with tempfile.TemporaryDirectory() as folder:
        run = partial(subprocess.run, command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        taken = seconds(run, 2)

    what = "`python main.py --pruner lamp --sparsity 0.65`"
    return [row(what, "at most 40 s", f"{taken:.0f} s", over(taken, 40, "s"))]


GROUPS = {
    group.__name__: group
    for group in (
        masks,
        step,
        few,
        schedules,
        change,
        statistics,
        reconstruction,
        train,
        evaluation,
        structured,
        kernels,
        sparse_products,
        inputs,
        startup,
        sample,
        growth,
    )
}


# ---- the page ----


def machine() -> str:
    """The processor, and the versions of the packages."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = next(line for line in cpuinfo.splitlines() if line.startswith("model name"))
    model = name.split(":")[1].strip()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    features = ", ".join(feature for feature in wanted if feature in cpuinfo.split())
    return (
        f"{model} ({features}), {torch.get_num_threads()} cores; Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, timm {timm.__version__}, numpy {np.__version__}, Pillow "
        f"{Image.__version__}"
    )


def page(results: dict) -> str:
    """docs/performance.md."""
    lines = [
        "# Performance",
        "",
        "Made by `make bench`, which measures each figure and what it is compared with in one "
        "run: the shortest of several times, and for the input pipeline the median.",
        "",
        f"Machine: {results['machine']}.",
        "",
        "| what | target | measured | met |",
        "| --- | --- | --- | --- |",
    ]
    rows = [found for group in GROUPS if group != "growth" for found in results.get(group, [])]
    for found in rows:
        met = f"missed: {found['missed']}" if found["missed"] else "yes"
        lines.append(f"| {found['what']} | {found['target']} | {found['found']} | {met} |")

    if "growth" in results:
        names = " | ".join(f"`{name}`" for name in REQUESTS)
        lines += [
            "",
            "## Growth",
            "",
            "Seconds to choose the masks, and the most memory above the model that one of them "
            "needs:",
            "",
            f"| model | prunable weights | {names} | memory |",
            "| --- |" + " ---: |" * (len(REQUESTS) + 2),
        ]
        for name, found in results["growth"].items():
            cells = " | ".join(f"{found[pruner]:.2f}" for pruner in REQUESTS)
            lines.append(
                f"| `{name}` | {found['weights'] / 1e6:.1f} M | {cells} | "
                f"{found['memory'] / 1e9:.2f} GB |"
            )

    return "\n".join([*lines, "", (Path(__file__).parent / "notes.md").read_text()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all by default"
    )
    chosen = parser.parse_args().groups
    for unknown in set(chosen) - set(GROUPS):
        parser.error(f"no group {unknown}: expected some of {', '.join(GROUPS)}")

    results = json.loads(RESULTS.read_text()) if chosen and RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    for name in chosen or GROUPS:
        print(f"{name}: {GROUPS[name].__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
        results[name] = GROUPS[name]()
        results["machine"] = machine()
        RESULTS.write_text(json.dumps(results))

    if results.keys() >= GROUPS.keys():
        PAGE.write_text(page(results))
    print(page(results))
