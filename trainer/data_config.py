"""Mean, deviation, crop and size of the images that weights were trained on, for the arguments."""

import argparse

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.models import get_pretrained_cfg

from datasets import normalization
from models import timm_name
from utils import log

DEIT_CROP = 0.875  # with which DeiT's authors measured


def with_data_config(args: argparse.Namespace, checkpoint: dict, source: str) -> argparse.Namespace:
    """The arguments with the mean, deviation, crop and size of the weights, unless they are given.

    They are those of the checkpoint's run; or timm's of the model, except that DeiT's models keep
    DeiT's crop, and DeiT's size. Without weights, crop and size are DeiT's for every model. A line
    tells a mean that is not ImageNet's, and a crop or size that is not that of the weights.

    checkpoint: the content of the file `source`; {} and "" without one.
    """
    saved = saved_args(checkpoint)
    has_weights = bool(source or args.pretrained)
    if not source and getattr(args, "mean", None) and "mean" not in args.given:
        return args  # chosen before, with the dense weights of a sweep

    own = _config(args.model, checkpoint)
    given = {name: getattr(args, name) for name in ("mean", "std") if name in args.given}
    chosen = {"mean": own["mean"], "std": own["std"], **given}
    origin = source or args.model
    images = f"Images of mean {_shown(chosen['mean'])} and deviation {_shown(chosen['std'])}"
    if (chosen["mean"], chosen["std"]) != (own["mean"], own["std"]):
        log(f"{images}; those of {origin}: {_shown(own['mean'])} and {_shown(own['std'])}")
    elif own["mean"] != list(IMAGENET_DEFAULT_MEAN) or own["std"] != list(IMAGENET_DEFAULT_STD):
        why = f"as {origin} was trained on" if has_weights else f"as timm has them for {args.model}"
        log(f"{images}, {why}")

    if has_weights:
        chosen |= _crop_and_size(args, own, saved, origin)
    return argparse.Namespace(**{**vars(args), **chosen})


def teacher_inputs(teacher: torch.nn.Module, args, checkpoint: dict) -> torch.nn.Module:
    """The teacher, which takes the student's images with its own mean and deviation."""
    own = _config(args.teacher_model, checkpoint)
    mean, std = normalization(args)
    if (mean, std) == (own["mean"], own["std"]):
        return teacher
    log(
        f"The teacher has images of mean {_shown(own['mean'])} and deviation {_shown(own['std'])}, "
        "as it was trained on"
    )
    return Renormalized(teacher, (mean, std), (own["mean"], own["std"]))


class Renormalized(torch.nn.Module):
    """A model whose images were normalized with another mean and deviation than its own.

    before: mean and deviation of the images that come; after: those of the model's.
    """

    def __init__(self, model: torch.nn.Module, before: tuple, after: tuple):
        super().__init__()
        self.model = model
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(3, 1, 1) for values in (*before, *after)
        )
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images * self.scale + self.shift)


def saved_args(checkpoint: dict) -> dict:
    """The arguments of a checkpoint's run; DeiT's own checkpoints hold a Namespace."""
    saved = checkpoint.get("args")
    return saved if isinstance(saved, dict) else getattr(saved, "__dict__", {})


# ---- helpers, not exported ----


def _config(model: str, checkpoint: dict) -> dict:
    """Mean, deviation, crop and size of a checkpoint, or of timm's weights of a model."""
    name = timm_name(model)
    known = get_pretrained_cfg(name)
    # A name that timm does not know is refused when the model is built
    config = resolve_data_config({}, pretrained_cfg=known.to_dict() if known else {"crop_pct": 1.0})
    own = {
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "crop": DEIT_CROP if _is_deit(name) else config["crop_pct"],
        "size": config["input_size"][-1],
    }

    # A run of this project before it kept them, or of DeiT, had ImageNet's. Files of timm's
    # training, which have an `arch`, and of BEiT and EVA, which have a flag, may have others.
    saved = saved_args(checkpoint)
    as_deit = "arch" not in checkpoint and saved.get("imagenet_default_mean_and_std", True)
    if saved and as_deit:
        own |= {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    for key in ("mean", "std"):
        if _is_triple(saved.get(key)):
            own[key] = [float(number) for number in saved[key]]

    crop = saved.get("eval_crop_ratio")
    if isinstance(crop, float) and 0 < crop <= 1:
        own["crop"] = crop
    size = saved.get("input_size")
    if isinstance(size, int) and size > 0:
        own["size"] = size
    return own


def _crop_and_size(args, own: dict, saved: dict, origin: str) -> dict:
    """Crop and size of evaluated images; a line tells those that are not of the weights."""
    chosen = {}
    follows = "input_size" not in args.given and not _is_deit(timm_name(args.model))
    size = args.input_size
    if follows and args.data_path and not saved and own["size"] != size:
        size = chosen["input_size"] = own["size"]
        log(f"--input-size {size}, as {origin} was trained on")
    elif own["size"] != size:
        log(f"--input-size {size}: {origin} was trained on images of {own['size']} pixels")

    if "eval_crop_ratio" not in args.given:
        if own["crop"] != args.eval_crop_ratio:
            chosen["eval_crop_ratio"] = own["crop"]
            log(f"--eval-crop-ratio {own['crop']:g}, as {origin} is evaluated with")
    elif own["crop"] != args.eval_crop_ratio:
        log(
            f"--eval-crop-ratio {args.eval_crop_ratio:g}: {origin} is evaluated with "
            f"{own['crop']:g}"
        )
    return chosen


def _is_deit(name: str) -> bool:
    return name.startswith("deit")


def _is_triple(value) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == 3
    return numbers and all(isinstance(number, int | float) for number in value)


def _shown(values) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
