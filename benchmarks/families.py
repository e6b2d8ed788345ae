"""Which features work with which families of models: the tables of docs/models.md.

    python benchmarks/families.py                  # a minute or more for each family
    python benchmarks/families.py ViT Swin         # these families alone

Each cell is a run of the feature with a tiny model of the family, of random weights, on random
images. It is "yes" if the run does what it promises: masks keep their share and hold in training,
outputs of smaller and of exported models are those of the model.
"""

import contextlib
import copy
import functools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
import torchvision
from measure import CPU
from torch import nn
from torch.nn.functional import cross_entropy

import utils
from engine import Learner, Progress, StepOptions, train_one_epoch
from models import timm_call
from sparsity_factory import (
    SCORES,
    Masks,
    PruningError,
    Recipe,
    Sparsifier,
    collect_statistics,
    compute_masks,
    needs_of,
    prunable_weights,
    prune,
    shrink,
)
from trainer import export

CLASSES = 5
UNITS = 0.1  # sparsity of heads and neurons: tiny models have few heads
PLAIN = {"embed_dim": 48, "depth": 2, "num_heads": 4}
STAGES = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
LEVIT = {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8}

#: By family: timm's name of a model, the side of its images, and arguments that make it tiny.
FAMILIES = {
    "ViT": ("vit_tiny_patch16_224", 32, PLAIN),
    "DeiT": ("deit_tiny_patch16_224", 32, PLAIN),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", 32, PLAIN),
    "DeiT III": ("deit3_small_patch16_224", 32, PLAIN),
    "DINOv2": ("vit_small_patch14_dinov2", 28, PLAIN),
    "DINOv3": ("vit_small_patch16_dinov3", 32, PLAIN),
    "EVA-02": ("eva02_tiny_patch14_224", 28, PLAIN),
    "BEiT": ("beit_base_patch16_224", 32, PLAIN),
    "SigLIP": ("vit_base_patch16_siglip_224", 32, PLAIN),
    "CLIP": ("vit_base_patch16_clip_224", 32, PLAIN),
    "CaiT": ("cait_xxs24_224", 32, PLAIN),
    "XCiT": ("xcit_nano_12_p16_224", 32, PLAIN),
    "Swin": ("swin_tiny_patch4_window7_224", 32, STAGES),
    "SwinV2": ("swinv2_tiny_window8_256", 32, STAGES),
    "LeViT": ("levit_128s", 64, LEVIT),
    "MobileViT": ("mobilevit_xxs", 64, {}),
    "torchvision's ViT": ("", 32, {}),
}


def tiny_model(family: str) -> nn.Module:
    """A model of a family in evaluation mode, each of its weights random."""
    torch.manual_seed(0)
    name, size, options = FAMILIES[family]
    if not name:
        shape = {"num_layers": 2, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 96}
        model = torchvision.models.VisionTransformer(size, 16, **shape, num_classes=CLASSES)
    else:
        try:
            model = timm.create_model(name, num_classes=CLASSES, img_size=size, **options)
        except TypeError:  # it takes any size
            model = timm.create_model(name, num_classes=CLASSES, **options)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def batches(family: str, count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images and labels."""
    size = FAMILIES[family][1]
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 3, size, size, generator=generator),
            torch.randint(CLASSES, (8,), generator=generator),
        )
        for _ in range(count)
    ]


# ---- the features: each raises an error if it does not work ----


def trains(family: str) -> None:
    model = tiny_model(family)
    recipe = Recipe("unif", 0.5)
    sparsifier = Sparsifier(model, recipe, total_steps=2, epoch_steps=2)
    sparsifier.start(sparsifier.first_masks())
    before = copy.deepcopy(model.state_dict())

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sparsifier.attach(optimizer, [])
    options = StepOptions(criterion, utils.Compute(CPU))
    train_one_epoch(Learner(model, optimizer, sparsifier), options, batches(family), Progress())

    for name, mask in sparsifier.masks.items():
        weight = model.get_parameter(name)
        expect(not weight[~mask].any(), f"{name}: pruned weights are not zero")
        expect(not torch.equal(weight, before[name]), f"{name} is not trained")


def scores(family: str, score: str) -> None:
    model = tiny_model(family)
    needs = needs_of(None, score)
    statistics = collect_statistics(model, batches(family), cross_entropy, needs) if needs else None
    masks = compute_masks(model, "unif", 0.5, score=score, statistics=statistics)
    expect_share(masks)


def reconstructs(family: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    masks = prune(model, "unif", 0.5, batches=batches(family), reconstruct="least-squares")
    expect_share(masks)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        expect(not weight[~mask].any(), f"{name}: pruned weights are not zero")
        expect(not torch.equal(weight[mask], before[name][mask]), f"{name} is not changed")


def two_of_four(family: str) -> None:
    model = tiny_model(family)
    masks = compute_masks(model, "unif", pattern="2:4")
    expect(masks.keys() == prunable_weights(model).keys(), "not all layers have masks")
    for name, mask in masks.items():
        expect((mask.reshape(-1, 4).sum(1) == 2).all(), f"{name} is not 2:4")


def removes(family: str, units: str) -> None:
    model = tiny_model(family)
    masks = compute_masks(model, "glob", UNITS, pattern=units)
    expect(any(not mask.all() for mask in masks.values()), "nothing is pruned")


def shrinks(family: str) -> None:
    model = tiny_model(family)
    masks = compute_masks(model, "glob", UNITS, pattern=units_of(model))
    small = shrink(model, masks)
    Masks(model, masks)

    images, _ = batches(family)[0]
    with torch.no_grad():
        difference = (small(images) - model(images)).abs().max()
    expect(size_of(small) < size_of(model), "nothing is taken out")
    expect(difference < 1e-4, f"outputs differ by {difference:.2g}")


def exports(family: str) -> None:
    name, size, options = FAMILIES[family]
    expect(name, "models of timm only")
    model = tiny_model(family)
    images = torch.cat([images for images, _ in batches(family)])[:3]
    call = timm_call(name, CLASSES, size)
    call[1].update(options)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        expected = export.Expected(images, model(images), exceptions=0)
        exported = export.write_weights(Path(folder), model, call, {})
        expected.compare(export.WEIGHTS, exported(images), 1e-5)
        left_out = export.write_programs(Path(folder), exported, expected)
        expect(not left_out, "; ".join(left_out))


FEATURES: dict[str, Callable[[str], None]] = {
    "train": trains,
    **{score: functools.partial(scores, score=score) for score in SCORES},
    "reconstruct": reconstructs,
    "2:4": two_of_four,
    "heads": functools.partial(removes, units="heads"),
    "neurons": functools.partial(removes, units="neurons"),
    "shrink": shrinks,
    "export": exports,
}


# ---- the table ----


def outcomes(families: Iterable[str], features: Iterable[str]) -> dict[tuple[str, str], str]:
    """For each family and feature, "" or the reason why it does not work, in a line."""
    found = {}
    for family in families:
        for feature in features:
            print(f"{family}: {feature}", file=sys.stderr)
            try:
                with warnings.catch_warnings(action="ignore"):
                    FEATURES[feature](family)
                found[family, feature] = ""
            except Exception as error:  # each model has its own way not to work
                found[family, feature] = utils.first_line(error)
    return found


def table(found: dict[tuple[str, str], str]) -> list[str]:
    """The lines of the table; all scores are one column. Below it are the reasons."""
    families = list(dict.fromkeys(family for family, _ in found))
    columns = ["train", "scores", *[name for name in FEATURES if name not in (*SCORES, "train")]]
    lines = [f"| family | {' | '.join(columns)} |", f"| --- {'| --- ' * len(columns)}|"]
    for family in families:
        without = [score for score in SCORES if found[family, score]]
        cells = {"scores": f"all but {', '.join(without)}" if without else "all"}
        for name in columns:
            if name != "scores":
                cells[name] = "no" if found[family, name] else "yes"
        lines.append(f"| {family} | {' | '.join(cells[name] for name in columns)} |")

    reasons: dict[tuple[str, str], list[str]] = {}
    for (family, feature), text in found.items():
        if reason := text.partition(": expected")[0]:
            reasons.setdefault((family, reason), []).append(feature)
    lines.append("")
    for (family, reason), features in reasons.items():
        lines.append(f"- {family}, {', '.join(features)}: {reason}")
    return lines


# ---- helpers, not exported ----


def criterion(images, outputs, targets):
    """The cross-entropy of the logits of all heads."""
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(cross_entropy(logits, targets) for logits in heads)


def units_of(model: nn.Module) -> str:
    """The pattern of all units that a model has; of both kinds if it has none, for the error."""
    works = []
    for units in ("heads", "neurons"):
        with contextlib.suppress(PruningError):
            compute_masks(model, "glob", UNITS, pattern=units)
            works.append(units)
    return "+".join(works) or "heads+neurons"


def expect(good, otherwise: str) -> None:
    if not good:
        raise AssertionError(otherwise)


def expect_share(masks) -> None:
    """Raises an error unless each mask keeps half of its weights."""
    for name, mask in masks.items():
        kept = int(mask.sum())
        expect(abs(kept - mask.numel() / 2) <= 1, f"{name} keeps {kept} of {mask.numel()}")


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    utils.show_progress(quiet=True)
    asked = sys.argv[1:] or list(FAMILIES)
    print("\n".join(table(outcomes(asked, FEATURES))))
