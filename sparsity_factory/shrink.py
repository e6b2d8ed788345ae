"""`shrink` makes a smaller dense model without the heads and neurons that masks prune."""

import copy
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import PruningError, short
from .masks import Masks, dense_shapes, prunable_weights, select
from .units import HEADS, Group, unit_groups

log = logging.getLogger(__name__)


def shrink(
    model: nn.Module, masks: Mapping[str, Tensor], may_shrink: Callable[[str], bool] | None = None
) -> nn.Module:
    """A copy of a model without its pruned units; it computes what the masked model does.

    Outputs are the same up to rounding. A head or neuron is removed if the masks keep none of its
    weights, except for the last one of a block. Pruned weights of the units that stay are zero in
    the result. Blocks of other kinds keep their size, and so do blocks that compute something else
    without a unit than with a masked one: that is tried on random tokens, and a warning names them.

    The result needs nothing of this project, with one exception: CaiT's attention takes the width
    of its heads from that of the tokens, so that `ClassAttn` and `TalkingHeadAttn` of this module
    replace timm's. The attribute `dense_shapes` of the result has the shapes of the dense model's
    parameters, for reports.

    Args:
        model: it is not changed. Hooks and compiled code are not copied.
        masks: as `compute_masks` returns them.
        may_shrink: called with the name of a block's weight; by default every block may. Where
            single weights were pruned, a layer without those units whose weights are all gone by
            chance may no longer fit a kernel for blocks.

    Raises:
        PruningError: masks that are not the model's.
    """
    shrunk = copy.deepcopy(model)
    Masks(shrunk, masks)  # sets pruned weights to zero

    for group in unit_groups(shrunk):
        kept = group.kept(masks)
        if kept.all() or may_shrink and not may_shrink(group.parts[0].parameter):
            continue
        if reason := _why_not(shrunk, group):
            log.warning("%s keeps its %s: %s", group.name, group.kind, reason)
        else:
            _take(shrunk, group, kept)

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shrunk.dense_shapes = {**shapes, **dense_shapes(model)}
    return shrunk


def masks_of_the_rest(
    shrunk: nn.Module, masks: Mapping[str, Tensor], may_shrink: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The masks of those prunable weights of a shrunk model whose blocks may not shrink."""
    return {name: masks[name] for name in prunable_weights(shrunk) if not may_shrink(name)}


def unit_counts(model: nn.Module) -> dict[str, int]:
    """The number of heads or neurons of each block, by module name, which give a model's shape."""
    return {group.name: group.units for group in unit_groups(model)}


def with_units(model: nn.Module, counts) -> nn.Module:
    """A copy of a dense model with the first units of each block, as many as `counts` says.

    counts: what `unit_counts` returned; it may come from an untrusted file.

    Raises:
        PruningError: counts that are not of this model.
    """
    groups = unit_groups(model)
    if not isinstance(counts, Mapping) or counts.keys() != {group.name for group in groups}:
        raise PruningError(
            "the saved shape is of another model: expected a number for each of its blocks"
        )

    parameters = dict(model.named_parameters())
    masks = {}
    for group in groups:
        count = counts[group.name]
        if type(count) is not int or not 1 <= count <= group.units:
            raise PruningError(
                f"the saved shape of {group.name}: expected 1 to {group.units} {group.kind}"
            )
        masks |= group.masks(torch.arange(group.units) < count, parameters)
    return shrink(model, masks)


class ClassAttn(nn.Module):
    """CaiT's attention of the class token for any number of heads.

    Touvron et al. 2021, arXiv:2103.17239.
    """

    def forward(self, x: Tensor) -> Tensor:
        def by_head(layer, tokens):  # (images, heads, tokens, width)
            return layer(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        dropout = self.attn_drop.p if self.training else 0.0
        heads = F.scaled_dot_product_attention(
            by_head(self.q, x[:, :1]), by_head(self.k, x), by_head(self.v, x), dropout_p=dropout
        )
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))


class TalkingHeadAttn(nn.Module):
    """CaiT's attention of the patches for any number of heads.

    Heads are mixed before and after the softmax.
    """

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (self.scale * q) @ k.mT  # (images, heads, queries, keys)
        weights = self._mix(self.proj_l, scores).softmax(-1)
        heads = self.attn_drop(self._mix(self.proj_w, weights)) @ v
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))

    @staticmethod
    def _mix(layer: nn.Linear, heads: Tensor) -> Tensor:
        return layer(heads.movedim(1, -1)).movedim(-1, 1)


# ---- helpers, not exported ----


@torch.no_grad()
def _why_not(model: nn.Module, group: Group) -> str:
    """Why units of a block cannot be removed; empty if they can.

    The block is tried by itself, on random tokens, with its first unit masked and without it.
    """
    block = copy.deepcopy(model.get_submodule(group.name)).eval()
    tokens = _tokens_for(block, group, model)
    if tokens is None:
        return "it does not run on tokens alone"

    # The same group in a model that has only this block
    parts = [
        part._replace(parameter=f"0.{part.parameter.removeprefix(f'{group.name}.')}")
        for part in group.parts
    ]
    alone = group._replace(name="0", parts=parts)
    masked = nn.Sequential(block)
    kept = torch.arange(group.units) > 0
    for name, mask in alone.masks(kept, dict(masked.named_parameters())).items():
        select(masked.get_parameter(name), mask)
    smaller = copy.deepcopy(masked)
    _take(smaller, alone, kept)

    expected = masked(tokens)
    try:
        found = smaller(tokens)
    except Exception as error:  # each architecture fails in its own way
        return f"it does not run without one of them ({short(error)})"
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        return "it computes something else without one of them"
    return ""


def _tokens_for(block: nn.Module, group: Group, model: nn.Module) -> Tensor | None:
    """Random tokens on which a block runs; None if it wants other inputs."""
    rows = next(part for part in group.parts if part.dim == 0 and part.parameter.endswith("weight"))
    weight = model.get_parameter(rows.parameter)
    width = weight.shape[1]
    count = getattr(block, "window_area", 4)  # a window has a bias for each pair of its tokens

    generator = torch.Generator().manual_seed(0)
    for shape in ((2, count), (2, 2, count), (2, count, count)):
        tokens = torch.randn(*shape, width, generator=generator).to(weight)
        try:
            if isinstance(block(tokens), Tensor):
                return tokens
        except Exception:  # each architecture refuses other shapes in its own way
            continue
    return None


def _take(model: nn.Module, group: Group, kept: Tensor) -> None:
    """Removes all units of a group that are not kept, in place."""
    for name, dim, unit in group.parts:
        path, _, own = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, own)
        index = kept[unit].nonzero().flatten().to(old.device)
        setattr(owner, own, nn.Parameter(old.detach().index_select(dim, index), old.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
    if group.kind != HEADS:
        return

    module = model.get_submodule(group.name)
    module.num_heads = int(kept.sum())
    if hasattr(module, "attn_dim"):
        module.attn_dim = module.proj.in_features

    # The forward of timm's classes takes the width of a head from that of the tokens
    for own_class in (ClassAttn, TalkingHeadAttn):
        if type(module).__name__ == own_class.__name__:
            module.__class__ = own_class
