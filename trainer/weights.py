"""Fits the weights of a checkpoint to a model, whoever wrote it.

Each step takes weights and returns them with names and shapes nearer to the model's. Its notes say
what is lost on the way.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor

from models import head_parameters
from sparsity_factory import pack, prunable_weights
from utils import UserError, first_line, log

Weights = dict[str, Tensor]

FEW_ZEROS = 0.01  # a smaller share of the weights is zero by chance, for example by rounding

#: Parts of other models than classifiers, and heads for other tasks. They may be left out.
NO_CLASSIFIER = re.compile(
    r"(mask_token|decoder|attn_pool|lm_head|pooler|heads?|classifier|projector|predictor|prototypes"
    r"|\w+_head|n_averaged|logit_scale|logit_bias)([._]|$)|fc\."
)

#: From transformers' names for ViT, DeiT, BEiT, Swin, SwinV2 and DINOv2 to those of their authors.
TRANSFORMERS = (
    (r"^(vit|deit|beit|data2vec_vision|swin\w*|dinov[23]\w*|model)\.", ""),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^(encoder\.)?layer\.", "blocks."),
    (r"^encoder\.layers\.", "layers."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.(attention|self)\.(relative_position_bias\.)?", ".attn."),
    (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
#: The same for DINOv3, before the others. A gated MLP has a third layer.
DINOV3 = (
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"register_tokens$", "storage_tokens"),
    (r"embeddings\.storage_tokens$", "storage_tokens"),
)
PLAIN_MLP = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
GATED_MLP = (
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
)


@dataclass
class Fit:
    """The weights of a file with the model's names and shapes.

    weights: a state dict; the heads in `new` are the model's own.
    resized: by name, the shape in the file.
    left_out: names of the file that are no part of the model.
    new: heads that the file lacks, or has for another number of classes; its shape, or None.
    pooled_norm: whether the norm of the tokens became that of their mean.
    """

    weights: Weights
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    new: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    pooled_norm: bool = False


def load_weights(
    model: torch.nn.Module,
    weights: Weights,
    source: str,
    *,
    resizes: bool = False,
    new_heads: bool = False,
) -> None:
    """Loads a state dict into `model`, and logs what is resized, left out or made anew.

    resizes: position embeddings of other sizes are resized, as by DeiT's `--finetune`.
    new_heads: heads that the file lacks, or has for another number of classes, stay the model's.

    Raises UserError naming what does not fit. Nothing is loaded then.
    """
    expected = model.state_dict()
    fit = fit_weights(model, weights)
    problems = [f"{name} is missing" for name in expected if name not in fit.weights]
    problems += [f"{name} is not in the model" for name in fit.weights if name not in expected]
    shapes = {name: tuple(value.shape) for name, value in fit.weights.items()}
    if not resizes:
        shapes |= fit.resized
    if not new_heads:
        problems += [f"{name} is missing" for name, shape in fit.new.items() if not shape]
        shapes |= {name: shape for name, shape in fit.new.items() if shape}
    problems += [
        f"{name} is {shapes[name]}, the model's {tuple(value.shape)}"
        for name, value in expected.items()
        if name in shapes and shapes[name] != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        only_heads = all(problem.split()[0] in fit.new for problem in problems)
        hint = ""
        if only_heads:
            hint = (
                "; expected a trained head, as a new one says nothing, or --num-classes 0, which "
                "does without"
            )
        raise UserError(f"{source}: does not fit the model: {problems[0]}{more}{hint}")

    for line in in_words(fit):
        log(f"{source}: {line}")
    try:
        model.load_state_dict(fit.weights)
    except RuntimeError as error:  # sparse or otherwise odd tensors
        raise UserError(f"{source}: does not fit the model: {first_line(error)}") from None


def in_words(fit: Fit) -> list[str]:
    """A line for each kind of change to the weights of a file."""
    lines = []
    if fit.resized:
        name, shape = next(iter(fit.resized.items()))
        now = tuple(fit.weights[name].shape)
        lines.append(f"{_some(fit.resized)} resized ({shape} to {now})")
    if fit.pooled_norm:
        lines.append("norm is taken as fc_norm, which the file lacks")
    if fit.left_out:
        lines.append(f"{_some(fit.left_out)} left out: no part of the model")

    # Heads that the model has of its own
    if missing := [name for name, shape in fit.new.items() if not shape]:
        lines.append(f"{_some(missing)} made anew: not in the file")
    if other := {name: shape for name, shape in fit.new.items() if shape}:
        name, shape = next(iter(other.items()))
        there, here = shape[0], len(fit.weights[name])
        lines.append(f"{_some(other)} made anew: {there} classes in the file, {here} here")
    return lines


def fit_weights(model: torch.nn.Module, weights: Weights) -> Fit:
    """The weights of a file, with the model's names and shapes as far as they can have them.

    Names that are still unknown stay, and names that are missing stay missing.
    """
    own = model.state_dict()
    heads = set(head_parameters(model))

    # Names. The weights in `named` have the file's own shapes.
    given = with_own_wrappers(from_transformers(weights, own), own)
    named = with_timm_names(without_prefix(given, own), own)

    # Shapes, and names that timm knows.
    fitted = with_deits_grid(with_pooled_norm(named, own), model)
    backbone = {name: tuple(value.shape) for name, value in own.items() if name not in heads}
    if any(
        tuple(value.shape) != backbone.get(name)
        for name, value in fitted.items()
        if name not in heads
    ):
        fitted = through_timms_filter(fitted, model)
    fitted = {
        name: value
        for name, value in fitted.items()
        if name in own or not NO_CLASSIFIER.match(name)
    }

    new = {}
    for name in head_parameters(model):
        theirs = fitted.get(name)
        if theirs is None or theirs.shape != own[name].shape:
            new[name] = tuple(theirs.shape) if theirs is not None else None
            fitted[name] = own[name]

    resized = {
        name: tuple(named[name].shape)
        for name, value in fitted.items()
        if name in named and name not in new and named[name].numel() != value.numel()
    }
    if "register_tokens" in named and not _grid_is_resized(named, fitted):
        resized.pop("pos_embed", None)
    pooled_norm = "norm.weight" in named.keys() - fitted.keys()
    return Fit(fitted, resized, _lost(given, named, fitted), new, pooled_norm)


def has_trained_head(model: torch.nn.Module, weights: Weights | None = None) -> bool:
    """Whether the model's head is a trained one, and not a new one for its number of classes.

    A model without a head lacks none.

    weights: those of the file; None for timm's pretrained ones.
    """
    if not head_parameters(model):
        return True
    if weights is None:
        return model.pretrained_cfg.get("num_classes") == model.num_classes
    return not fit_weights(model, weights).new


def adopt_sparsity(model: torch.nn.Module, checkpoint: dict, source: str, keep_zeros: bool) -> None:
    """Gives the sparse checkpoint of another project masks of ours, in place.

    They are the file's own masks (`foreign_masks`), or with `keep_zeros` the places of its zeros.
    Otherwise zeros stay weights, which training changes, and a message says so.

    model: the one that has the weights of the checkpoint already.
    """
    foreign = checkpoint.pop("foreign_masks", None)
    if "masks" in checkpoint:
        return

    weights = prunable_weights(model)
    nonzero = {name: weight.detach() != 0 for name, weight in weights.items()}
    total = sum(mask.numel() for mask in nonzero.values())
    zeros = 1 - sum(int(mask.sum()) for mask in nonzero.values()) / total if total else 0.0
    if foreign:
        masks = _renamed_masks(model, checkpoint["model"], foreign)
        log(f"{source}: the masks of {len(masks)} parameters stay")
    elif keep_zeros:
        masks = {name: mask for name, mask in nonzero.items() if not mask.all()}
        log(f"{source}: {zeros:.1%} of the prunable weights are zero, and stay so")
    else:
        if zeros >= FEW_ZEROS:
            log(
                f"{source}: {zeros:.1%} of the prunable weights are zero, but the file has no "
                "masks, so training changes them; --keep-zeros keeps them at zero"
            )
        return

    if masks:
        checkpoint.pop("model_ema", None)
        checkpoint["model"] = model.state_dict()
        checkpoint["masks"] = pack(masks)


# ---- the steps ----


def from_transformers(weights: Weights, own) -> Weights:
    """Converts transformers' names to those of the models' authors; joins query, key and value."""
    if not any("embeddings.patch_embeddings." in name for name in weights):
        return weights

    patterns = TRANSFORMERS
    if any(".attention.o_proj." in name for name in weights):
        is_gated = any(".mlp.gate_proj." in name for name in weights)
        patterns = (*DINOV3, *(GATED_MLP if is_gated else PLAIN_MLP), *TRANSFORMERS)
    converted = {}
    for name, value in weights.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return with_joined_qkv(converted, own)


def with_joined_qkv(weights: Weights, own) -> Weights:
    """Joins query, key and value of each attention, as the models' authors have them.

    Without a bias of the key, the others are named `q_bias` and `v_bias`. If the model has none,
    and they are zero, as in DINOv3's distilled models, they are left out.
    """
    joined = dict(weights)
    for query in [name for name in weights if ".attn.query." in name]:
        key, value = (query.replace("query", part) for part in ("key", "value"))
        if key in joined:
            parts = [joined.pop(name) for name in (query, key, value)]
            joined[query.replace("query", "qkv")] = torch.cat(parts)
            continue
        for name, short in ((query, "query.bias"), (value, "value.bias")):
            bias = joined.pop(name)
            name = name.replace(short, f"{short[0]}_bias")
            if name in own or bias.any():
                joined[name] = bias
    return joined


def with_own_wrappers(weights: Weights, own) -> Weights:
    """Gives names back the `module.` of the model itself, such as iFormer's.

    Wrappers' are taken off when a file is read, and those of the model with them.
    """
    inner = {name.replace(".module.", "."): name for name in own if ".module." in name}
    return {inner.get(name, name): value for name, value in weights.items()} if inner else weights


def without_prefix(weights: Weights, own) -> Weights:
    """Takes off what precedes the model's names, such as `backbone.`; a teacher's come first.

    Names without it are dropped, unless they are the model's.
    """
    found: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        for length in range(1, min(len(parts), 4)):
            if ".".join(parts[length:]) in own:
                found[".".join(parts[:length]) + "."] += 1

    # OpenCLIP's are left to timm, which makes a head of its projection.
    for prefix in [prefix for prefix in found if prefix.startswith("visual.")]:
        del found[prefix]
    as_they_are = sum(name in own for name in weights)
    if not found or max(found.values()) <= as_they_are:
        return weights

    best = max(found, key=lambda prefix: (found[prefix], bool(re.search("teacher|ema", prefix))))
    kept = {name: value for name, value in weights.items() if name in own}
    return kept | {
        name.removeprefix(best): value for name, value in weights.items() if name.startswith(best)
    }


def with_pooled_norm(weights: Weights, own) -> Weights:
    """Takes the last norm of a pretrained model for that of its pooled tokens, as timm for EVA."""
    pooled = "fc_norm.weight" in own and "norm.weight" not in own
    if not pooled or "fc_norm.weight" in weights:
        return weights
    return {re.sub(r"^norm\.", "fc_norm.", name): value for name, value in weights.items()}


def with_deits_grid(weights: Weights, model: torch.nn.Module) -> Weights:
    """Resizes the position embedding as DeiT does; class and distillation tokens are kept."""
    theirs = weights.get("pos_embed")
    ours = model.state_dict().get("pos_embed")
    if theirs is None or ours is None or theirs.ndim != 3 or ours.ndim != 3:
        return weights

    num_patches = model.patch_embed.num_patches
    num_tokens = ours.shape[1] - num_patches
    return {**weights, "pos_embed": resize_pos_embed(theirs, num_patches, num_tokens)}


def through_timms_filter(weights: Weights, model: torch.nn.Module) -> Weights:
    """Passes weights through timm's own function for files of the architecture, if it has one."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture", "")
    if not timm.is_model(name):
        return weights
    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if not convert:
        return weights
    try:
        return convert(dict(weights), model)
    except Exception:  # of many kinds; `load_weights` names what does not fit
        return weights


def with_timm_names(weights: Weights, own) -> Weights:
    """Gives the layer scales of DeiT III's authors timm's names: `ls1.gamma` for `gamma_1`."""

    def rename(name):
        timms = re.sub(r"\bgamma_([12])$", r"ls\1.gamma", name)
        return timms if timms in own else name

    return {rename(name): value for name, value in weights.items()}


def resize_pos_embed(pos_embed: Tensor, num_patches: int, num_tokens: int) -> Tensor:
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


# ---- helpers, not exported ----


def _renamed_masks(model: torch.nn.Module, weights: Weights, masks: Weights) -> Weights:
    """The masks of a file by the model's names: they take the same steps as its weights."""
    marks = {
        name: masks[name].float() if name in masks else torch.ones_like(value)
        for name, value in weights.items()
    }
    fit = fit_weights(model, marks)
    parameters = {name for name, _ in model.named_parameters()} - fit.new.keys()
    found = {name: fit.weights[name] != 0 for name in fit.weights if name in parameters}
    return {name: mask for name, mask in found.items() if not mask.all()}


def _grid_is_resized(named: Weights, fitted: Weights) -> bool:
    """Whether DINOv2's position embedding lost more than its class token's part.

    timm adds that part to the class token, if the model has registers.
    """
    return named["pos_embed"].shape[1] != fitted["pos_embed"].shape[1] + 1


def _lost(given: Weights, named: Weights, fitted: Weights) -> list[str]:
    """The names of a file's weights of which nothing is in the model.

    A weight that is renamed, or split, shares its storage with the file's. Buffers such as
    attention masks and indices are no weights.
    """
    kept = [*fitted.values(), *(named[name] for name in fitted if name in named)]
    used = {value.untyped_storage().data_ptr() for value in kept}
    return [
        name
        for name, value in given.items()
        if value.untyped_storage().data_ptr() not in used
        and name.removeprefix("visual.trunk.") not in fitted
        and value.is_floating_point()
        and not name.endswith("attn_mask")
    ]


def _some(names) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    shown = ", ".join(names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown
