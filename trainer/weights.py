"""Fits the weights of a checkpoint to a model."""

import re

import torch

from models import head_parameters
from utils import UserError, first_line


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Loads a state dict that fits `model` exactly. Raises UserError naming what does not fit."""
    expected = model.state_dict()
    weights = with_timm_names(weights, expected)

    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{source}: does not fit the model: {problems[0]}{more}")

    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # sparse or otherwise odd tensors
        raise UserError(f"{source}: does not fit the model: {first_line(error)}") from None


def with_timm_names(weights: dict[str, torch.Tensor], expected) -> dict[str, torch.Tensor]:
    """Gives the layer scales of DeiT III's authors timm's names: `ls1.gamma` for `gamma_1`.

    expected: the names of the model; other names stay as they are.
    """

    def rename(name):
        ours = re.sub(r"\bgamma_([12])$", r"ls\1.gamma", name)
        return ours if ours in expected else name

    return {rename(name): value for name, value in weights.items()}


def adapt_weights(
    model: torch.nn.Module, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A copy of `weights` for finetuning `model`, adapted as by DeiT's `--finetune`.

    The position embedding is resized to the model's grid of patches (bicubic; class and
    distillation tokens kept), and a head for another number of classes is replaced by the model's
    fresh one.
    """
    own = model.state_dict()
    weights = dict(weights)

    both = [state["pos_embed"] for state in (weights, own) if "pos_embed" in state]
    if len(both) == 2 and both[0].ndim == both[1].ndim == 3:
        num_patches = model.patch_embed.num_patches
        num_tokens = own["pos_embed"].shape[1] - num_patches
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], num_patches, num_tokens)

    for name in head_parameters(model):
        if name in weights and weights[name].shape != own[name].shape:
            weights[name] = own[name]
    return weights


def has_trained_head(
    model: torch.nn.Module, weights: dict[str, torch.Tensor] | None = None
) -> bool:
    """Whether the model's head is a trained one, and not a new one for its number of classes.

    weights: the weights given to `adapt_weights`; None for timm's pretrained ones.
    """
    if weights is None:
        return model.pretrained_cfg.get("num_classes") == model.num_classes
    own = model.state_dict()
    return all(
        name not in weights or weights[name].shape == own[name].shape
        for name in head_parameters(model)
    )


def resize_pos_embed(pos_embed: torch.Tensor, num_patches: int, num_tokens: int) -> torch.Tensor:
    """A position embedding (1, num_tokens + side ** 2, dim) resized to a square of patches."""
    tokens = pos_embed[:, :num_tokens]
    grid = pos_embed[:, num_tokens:]
    old = round(grid.shape[1] ** 0.5)
    new = round(num_patches**0.5)

    # An embedding of the right size, or one that is no square grid, stays as it is
    if old in (0, new) or len(grid) != 1 or old**2 != grid.shape[1] or new**2 != num_patches:
        return pos_embed

    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid.float(), size=(new, new), mode="bicubic", align_corners=False
    )
    return torch.cat([tokens, grid.to(tokens.dtype).flatten(2).transpose(1, 2)], dim=1)
