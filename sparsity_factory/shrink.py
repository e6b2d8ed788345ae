"""`shrink` makes a smaller dense model without the heads and neurons that masks prune."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import PruningError
from .masks import Masks, dense_shapes
from .units import HEADS, Group, unit_groups


def shrink(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model without its pruned units; it computes what the masked model does.

    Outputs are the same up to rounding. A head or neuron is removed if the masks keep none of its
    weights, except for the last one of a block. Pruned weights of the units that stay are zero in
    the result, and blocks of other kinds keep their size.

    The result needs nothing of this project, with one exception: CaiT's attention takes the width
    of its heads from that of the tokens, so that `ClassAttn` and `TalkingHeadAttn` of this module
    replace timm's. The attribute `dense_shapes` of the result has the shapes of the dense model's
    parameters, for reports.

    Args:
        model: it is not changed. Hooks and compiled code are not copied.
        masks: as `compute_masks` returns them.

    Raises:
        PruningError: masks that are not the model's.
    """
    shrunk = copy.deepcopy(model)
    Masks(shrunk, masks)  # sets pruned weights to zero

    for group in unit_groups(shrunk, known_only=True):
        kept = group.kept(masks)
        if not kept.all():
            _take(shrunk, group, kept)

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shrunk.dense_shapes = {**shapes, **dense_shapes(model)}
    return shrunk


def unit_counts(model: nn.Module) -> dict[str, int]:
    """The number of heads or neurons of each block, by module name, which give a model's shape."""
    return {group.name: group.units for group in unit_groups(model, known_only=True)}


def with_units(model: nn.Module, counts) -> nn.Module:
    """A copy of a dense model with the first units of each block, as many as `counts` says.

    counts: what `unit_counts` returned; it may come from an untrusted file.

    Raises:
        PruningError: counts that are not of this model.
    """
    groups = unit_groups(model, known_only=True)
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
