"""`--tokens`: blocks that merge similar tokens, so that fewer are computed.

Bolya et al. 2023, Token Merging: Your ViT But Faster, arXiv:2210.09461. Between its attention and
its MLP, each block merges R pairs of tokens. A merged token is the mean of its patches, and
attention counts it as often as it has patches. Tokens before the patches (class, distillation,
registers) are never merged.

Blocks hand on a pair: the tokens, and for each token of the image the place where it is now. The
last block puts the tokens back into their places, so that all that follows sees as many as ever:
a mean over them weighs a merged token by its patches. Parameters keep their names and shapes.
"""

from contextlib import contextmanager

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from utils import UserError


def merge_tokens(model: nn.Module, count: int) -> None:
    """Makes each block of a vision transformer of timm merge `count` pairs of patches, in place.

    Raises UserError for a model that cannot, and for a count that it has too few patches for.
    """
    if reason := why_not(model):
        raise UserError(f"--tokens {count}: {reason}")
    patches = patches_of(model)
    blocks = len(model.blocks)
    most = patches // (blocks + 1)
    if not 0 < count <= most:
        raise UserError(
            f"--tokens {count}: expected at most {most}, since each of {blocks} blocks can merge "
            f"half of the patches that it has left of {patches}"
        )
    make_merging(model.blocks, count, model.num_prefix_tokens)


def why_not(model: nn.Module) -> str:
    """Why the blocks of a model cannot merge tokens; empty if they can."""
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        return f"expected a plain vision transformer of timm; {name} is another architecture"
    for block in model.blocks:
        for module, kind in ((block, Block), (getattr(block, "attn", None), Attention)):
            if type(module) is not kind:
                return (
                    f"expected blocks of timm's {kind.__name__}; this {name} has "
                    f"{type(module).__name__}"
                )
    return ""


def patches_of(model: VisionTransformer) -> int:
    """How many patches reach the first block, also in a training that drops some."""
    dropped = getattr(model.patch_drop, "prob", 0.0)
    return int(model.patch_embed.num_patches * (1 - dropped))


def tokens_in_words(model: VisionTransformer) -> str:
    """What a model merges, for people."""
    blocks = merging_blocks(model)
    merged = sum(block.count for block in blocks)
    tokens = patches_of(model) + model.num_prefix_tokens
    return (
        f"{blocks[0].count} merged in each of {len(blocks)} blocks, {tokens} to {tokens - merged}"
    )


def merging_blocks(*models: nn.Module) -> list["MergingBlock"]:
    """The blocks of models that merge tokens."""
    modules = [module for model in models for module in model.modules()]
    return [module for module in modules if isinstance(module, MergingBlock)]


def keep_all_tokens(model: nn.Module) -> None:
    """Makes the blocks of a model timm's own again."""
    for block in merging_blocks(model):
        block.__class__ = Block
        block.attn.__class__ = Attention


@contextmanager
def all_tokens(*models: nn.Module):
    """A context in which models merge nothing."""
    blocks = merging_blocks(*models)
    for model in models:
        keep_all_tokens(model)
    try:
        yield
    finally:
        for block in blocks:
            block.__class__ = MergingBlock
            block.attn.__class__ = MergingAttention


# ---- what an exported folder has as well ----


def make_merging(blocks: nn.Sequential, count: int, prefix: int) -> None:
    """Makes blocks merge `count` pairs of tokens each, behind the first `prefix` ones."""
    for block in blocks:
        block.__class__ = MergingBlock
        block.attn.__class__ = MergingAttention
        block.count = count
        block.prefix = prefix
        block.is_last = block is blocks[-1]


class MergingBlock(Block):
    """timm's block, which merges `count` pairs of tokens between its attention and its MLP."""

    def forward(self, tokens):
        """Tokens (images, tokens, width), or a pair of them and their places (images, patches)."""
        if isinstance(tokens, tuple):
            x, places = tokens
        else:
            x = tokens
            places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)

        ones = torch.ones_like(places, dtype=torch.float32)
        sizes = ones.new_zeros(x.shape[:2]).scatter_add(1, places, ones)
        attended, keys = self.attn(self.norm1(x), sizes)
        x = x + self.drop_path1(self.ls1(attended))

        kept, merged, into = pair_up(keys, self.count, self.prefix)
        x, moved = merge(x, sizes, kept, merged, into)
        places = moved.gather(1, places)

        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return rows(x, places) if self.is_last else (x, places)


class MergingAttention(Attention):
    """timm's attention, which can count each token as often as a size says."""

    def forward(self, x, sizes=None):
        """Tokens of the shape of x; with sizes (images, tokens) also the mean keys of the heads."""
        if sizes is None:
            return super().forward(x)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)

        # To add log(size) to a logit is to have that many equal keys
        bias = sizes.log().to(q.dtype)[:, None, None]
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        else:
            weights = ((q * self.scale) @ k.mT).add_(bias).softmax(-1)
            heads = self.attn_drop(weights) @ v

        heads = self.norm(heads.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:
            heads = heads * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(heads)), k.mean(1)


@torch.no_grad()
def pair_up(keys, count, prefix):
    """Which tokens stay, which merge, and into which: three lists of places (images, ...).

    Every second patch has a partner among the others, the one with the most similar key by cosine.
    Of these pairs the `count` most similar merge. The list of tokens that stay has the prefix
    first, then those with a partner, then the others.
    """
    with torch.autocast(keys.device.type, enabled=False):
        keys = F.normalize(keys.float(), dim=2)
        cosine, partner = (keys[:, prefix + 1 :: 2] @ keys[:, prefix::2].mT).max(2)
    order = cosine.argsort(1, descending=True)
    merged = order[:, :count]
    into = partner.gather(1, merged)

    # From numbers of a set to places among all tokens
    places = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[0], -1)
    stays = prefix + 1 + 2 * order[:, count:].sort(1).values
    kept = torch.cat([places[:, :prefix], stays, places[:, prefix::2]], 1)
    return kept, prefix + 1 + 2 * merged, prefix + 2 * into


def merge(x, sizes, kept, merged, into):
    """The tokens after a merger, and the new place of each token.

    A token becomes the mean of those that merge into it, weighed by their sizes. Arguments as in
    `MergingBlock`, and from `pair_up`.
    """
    moved = torch.zeros_like(sizes, dtype=torch.int64)
    moved = moved.scatter(1, kept, torch.arange(kept.shape[1], device=x.device).expand_as(kept))
    target = moved.gather(1, into)
    moved = moved.scatter(1, merged, target)

    # Each token that merges pulls the other towards itself by its share of their patches
    added = sizes.gather(1, merged)
    total = sizes.gather(1, kept).scatter_add(1, target, added)
    share = (added / total.gather(1, target)).to(x.dtype)
    pulls = share[..., None] * (rows(x, merged) - rows(x, into))

    x = rows(x, kept)
    shape = x.shape
    x = x.flatten(0, 1).index_add(0, flat(target, shape[1]), pulls.flatten(0, 1))
    return x.view(shape), moved


def rows(x, places):
    """The tokens of each image at its places, shape (images, places, width)."""
    return x.flatten(0, 1).index_select(0, flat(places, x.shape[1])).unflatten(0, places.shape)


def flat(places, tokens):
    """Places (images, ...) within images of so many tokens, as places among all tokens."""
    first = tokens * torch.arange(places.shape[0], device=places.device)
    return (places + first[:, None]).flatten()
