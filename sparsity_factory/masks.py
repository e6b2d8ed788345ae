"""Which weights of a model are prunable, and `Masks`, which keeps the chosen ones at zero."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PruningError, short

#: Modules that turn coordinates into position biases, by their names in timm: Swin V2's
#: and MaxViT's. They are small and see no tokens.
POSITION_MLPS = {"cpb_mlp", "meta_mlp", "rel_pos"}

#: Chooses layers: patterns of names, or a function of name and module.
Layers = Sequence[str] | Callable[[str, nn.Module], bool]


def prunable_weights(model: nn.Module, layers: Layers | None = None) -> dict[str, nn.Parameter]:
    """The prunable weights of a model, by parameter name, in model order.

    By default these are the weights of every `nn.Linear`, and those that `nn.MultiheadAttention`
    holds itself, such as `in_proj_weight`; except the classifier's and those of `POSITION_MLPS`.
    The classifier is what `get_classifier()` returns, of the model or of a model in it: a module,
    or a list or tuple of them. A weight that several modules share appears once, under its first
    name. Weights that are no plain parameters (`torch.nn.utils.prune`, parametrizations) cannot be
    pruned.

    Args:
        layers: which of them. Patterns such as `blocks.*` are matched with the names of layers and
            of weights, one after the other: each adds the layers that it matches, or takes them
            away if it begins with `!`. If the first one does, all layers are there before it. A
            pattern that matches only layers that are not prunable by default adds these: the
            classifier, a position MLP, an `nn.Conv2d` without groups. A function is called with
            the name of each default layer and with the layer itself. None: those of
            `choose_layers`, or all.

    Raises:
        PruningError: the model is in a wrapper such as DDP's, which renames its parameters; a
            pattern that matches nothing.
    """
    owned = _owned_weights(model)
    by_default = _by_default(model, owned)
    chosen: Collection[str] = getattr(model, "prunable_names", by_default)
    if layers is not None:
        chosen = _chosen(layers, owned, by_default)
    return {name: weight for name, (_, weight) in owned.items() if name in chosen}


def default_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are prunable by default, whatever `choose_layers` has chosen."""
    owned = _owned_weights(model)
    return {name: owned[name].weight for name in _by_default(model, owned)}


def choose_layers(model: nn.Module, layers: Layers) -> None:
    """Makes `layers`, as in `prunable_weights`, the prunable ones of this model and its copies."""
    model.prunable_names = list(prunable_weights(model, layers))


def as_matrix(weight: Tensor) -> Tensor:
    """A weight, its gradient or its mask as a matrix, shape (outputs, inputs).

    The inputs of a convolution are all values that one of its outputs sees: row by row of the
    kernel, all channels of one place together, as in the memory format of channels last. Others are
    matrices already.
    """
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """What `as_matrix` was given, from what it returned and its shape."""
    if len(shape) != 4:
        return matrix
    outputs, channels, rows, columns = shape
    return matrix.view(outputs, rows, columns, channels).permute(0, 3, 1, 2).contiguous()


def why_no_layers(patterns) -> str:
    """Why these are no patterns for `prunable_weights`, empty if they are."""
    is_list = isinstance(patterns, list | tuple) and len(patterns) > 0
    if is_list and all(isinstance(pattern, str) and pattern.strip("!") for pattern in patterns):
        return ""
    return f"expected a list of patterns such as 'blocks.*', got {short(patterns)}"


def layer_name(weight: str) -> str:
    """The name of the layer that has a weight of this name."""
    return weight.removesuffix("weight").rstrip("._")


def dense_shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """By name, the shapes that the parameters of a shrunk model had before; else nothing."""
    return getattr(model, "dense_shapes", {})


class Change(NamedTuple):
    """What a change of a mask did: bool tensors of the weight's shape, on its device."""

    dropped: Tensor
    grown: Tensor


class Masks(Mapping[str, Tensor]):
    """Keeps the pruned weights of a model at zero: a mapping of parameter names to bool masks.

    The surviving weights follow exactly the path they would take if every layer computed with
    `weight * mask`, while the model keeps its plain parameters: nothing is hooked, renamed or
    copied, and `copy.deepcopy(model)` works.

        masks = Masks(model, compute_masks(model, "lamp", sparsity=0.65))
        loss.backward(); masks.apply_to_grads(); optimizer.step(); masks.apply()

    Make it once the model is on its device; it holds the model's parameters themselves.

    Args:
        model: pruned in place, at once.
        masks: parameter name to bool tensor of the parameter's shape, True where the weight is
            kept. They are copied. Parameters without a mask stay dense. A parameter that several
            modules share has its first name.

    Raises:
        PruningError: a name that is no floating-point parameter of the model, a wrong shape or
            dtype. Nothing is changed then.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        self._parameters = dict(model.named_parameters())
        dense = dense_shapes(model)
        self._sizes = {
            name: prod(dense.get(name, weight.shape))
            for name, weight in prunable_weights(model).items()
        }

        self._masks: dict[str, Tensor] = {}
        self.replace(masks)
        self.apply()

    @torch.no_grad()
    def update(self, masks: Mapping[str, Tensor]) -> dict[str, Change]:
        """Changes masks in place, and no weight: `apply` does that.

        Args:
            masks: as for the class. Other masks stay. A parameter without a mask was dense.

        Returns:
            For each name in `masks`, which weights were dropped and which have grown.

        Raises:
            PruningError: as for the class; nothing is changed then.
        """
        self.check(masks)
        changes = {}
        for name, new in masks.items():
            new = new.to(self._parameters[name].device)
            old = self._masks[name] if name in self._masks else torch.ones_like(new)
            changes[name] = Change(dropped=old > new, grown=new > old)

        self.replace(masks)
        return changes

    @torch.no_grad()
    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """As `update`, for those who do not need to know what has changed."""
        self.check(masks)
        for name, new in masks.items():
            if name not in self._masks:
                device = self._parameters[name].device
                self._masks[name] = torch.empty(new.shape, dtype=torch.bool, device=device)
        if masks:
            torch._foreach_copy_([self._masks[name] for name in masks], list(masks.values()))

        # In model order
        self._masks = {name: self._masks[name] for name in self._parameters if name in self._masks}

    def check(self, masks: Mapping[str, Tensor]) -> None:
        """Raises PruningError for masks that `update` would refuse."""
        for name, mask in masks.items():
            parameter = self._parameters.get(name)
            if parameter is None or parameter.dtype not in _INTEGERS:
                raise PruningError(
                    f"mask {name!r}: the model has no floating-point parameter of that name"
                )
            is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool
            if not is_mask or mask.shape != parameter.shape:
                raise PruningError(
                    f"mask {name!r}: expected a bool tensor of shape {list(parameter.shape)}"
                )

    @torch.no_grad()
    def apply(self) -> None:
        """Sets pruned weights to zero: after each optimizer step, before averages are updated."""
        for name, mask in self._masks.items():
            select(self._parameters[name], mask)

    @torch.no_grad()
    def apply_to_grads(self) -> None:
        """Sets gradients of pruned weights to zero: after backward, before unscaling, clipping."""
        for name, mask in self._masks.items():
            if self._parameters[name].grad is not None:
                select(self._parameters[name].grad, mask)

    @torch.no_grad()
    def apply_to(self, module: nn.Module) -> None:
        """Sets the pruned weights of another module to zero, such as an average of the weights.

        The module may be on any device. An average needs this only when the masks have changed: the
        average of zeros is zero.

        Raises:
            AttributeError: the module has no parameter of a masked name.
        """
        for name, mask in self._masks.items():
            parameter = module.get_parameter(name)
            select(parameter, mask.to(parameter.device))

    def __getitem__(self, name: str) -> Tensor:
        """The mask of a parameter, on its device. It changes in place."""
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the masked parameters, in model order."""
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    # By identity: a comparison of mappings would need one truth value for a tensor
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def kept(self) -> dict[str, int]:
        """How many weights each mask keeps. Waits for the device once."""
        if not self._masks:
            return {}
        counts = torch.stack([mask.count_nonzero() for mask in self._masks.values()])
        return dict(zip(self._masks, counts.tolist(), strict=True))

    def sparsity(self) -> float:
        """The pruned fraction of the prunable weights with a mask, in [0, 1]; without biases."""
        kept = {name: count for name, count in self.kept().items() if name in self._sizes}
        total = sum(self._sizes[name] for name in kept)
        return 1 - sum(kept.values()) / total if total else 0.0

    def state_dict(self) -> dict[str, dict]:
        """The masks packed to one bit per weight: see `pack`."""
        return pack(self._masks)

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Replaces the masks by those of a `state_dict` for the same weights, and applies them.

        Raises:
            PruningError: other names or shapes than these masks have, or damaged entries; nothing
                is changed then.
        """
        masks = unpack(state)
        for name in [*self._masks, *masks]:
            if name not in masks:
                raise PruningError(f"mask {name!r} is missing from the saved masks")
            if name not in self._masks:
                raise PruningError(
                    f"mask {name!r} of the saved masks belongs to no weight that is masked here"
                )
            if masks[name].shape != self._masks[name].shape:
                raise PruningError(
                    f"mask {name!r}: expected shape {list(self._masks[name].shape)}, got "
                    f"{list(masks[name].shape)}"
                )

        self.replace(masks)
        self.apply()


def select(values: Tensor, mask: Tensor) -> None:
    """Sets `values` to 0.0 where the bool `mask` of their shape is False, in place.

    A bit pattern times 1 is itself, and times 0 it is that of 0.0, even if it stands for infinity
    or NaN. On CPUs this takes a tenth of the time of `masked_fill_`, and no more than a product of
    floats, which would make NaN of infinity times 0. An int8 mask takes half the time of a bool
    one, which torch does not vectorise.
    """
    bits(values).mul_(mask.view(torch.int8))


def bits(values: Tensor) -> Tensor:
    """The bit patterns of floats as integers of their size: a view of the same memory, detached."""
    return values.detach().view(_INTEGERS[values.dtype])


def pack(masks: Mapping[str, Tensor]) -> dict[str, dict]:
    """Packs bool masks to one bit per weight, for `torch.load(..., weights_only=True)`.

    Returns:
        For each name `{"bits": uint8 tensor, "shape": [rows, columns]}`: row-major, most
        significant bit first, the last byte padded with zeros. `unpack` reads it.
    """
    return {
        name: {"bits": packed(mask).cpu(), "shape": list(mask.shape)}
        for name, mask in masks.items()
    }


def unpack(state: dict[str, dict]) -> dict[str, Tensor]:
    """The bool masks, on the CPU, from what `pack` or `Masks.state_dict` returned.

    The state may come from an untrusted file. Each of its bytes becomes eight mask entries and no
    more, so that memory stays proportional to the size of the file.

    Raises:
        PruningError: naming the first entry that is not as `pack` writes it.
    """
    if not isinstance(state, dict):
        raise PruningError("the saved masks are not a dictionary")

    storages = set()
    for name, entry in state.items():
        problem = _why_not_packed(name, entry)
        # Entries that are views of one another would take more memory than the size of the file
        if not problem and entry["bits"].untyped_storage().data_ptr() in storages:
            problem = "shares its bits with another entry"
        if problem:
            raise PruningError(f"mask {str(name)[:200]!r} of the saved masks: {problem}")
        storages.add(entry["bits"].untyped_storage().data_ptr())
    return {name: unpacked(entry["bits"].cpu(), entry["shape"]) for name, entry in state.items()}


def packed(mask: Tensor) -> Tensor:
    """The bits of a bool mask in a uint8 tensor on its device, as `pack` describes them."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy()))
    flat = mask.flatten().view(torch.uint8)
    eights = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights * _powers(mask.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask whose bits `packed` returned, on their device."""
    if bits.device.type == "cpu":
        flat = np.unpackbits(bits.numpy(), count=prod(shape)).view(np.bool_)
        return torch.from_numpy(flat).view(tuple(shape))
    return (bits[:, None] & _powers(bits.device)).bool().flatten()[: prod(shape)].view(tuple(shape))


def checksums(masks: Mapping[str, Tensor]) -> list[int]:
    """A number for each mask, the same on every device. Waits for the device once.

    Equal masks have equal numbers, and other masks of the same shape all but certainly others.
    """

    def checksum(mask: Tensor) -> Tensor:
        bits = packed(mask)
        words = nn.functional.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
        # A factor for each place, without structure, so that weights that trade places show
        factors = torch.arange(len(words), device=mask.device) * _FACTOR + _FIRST
        return (words * factors).sum()

    sums = [checksum(mask) for mask in masks.values()]
    return torch.stack(sums).tolist() if sums else []


# ---- helpers, not exported ----


# Odd and arbitrary
_FACTOR, _FIRST = 0x1B873593CC9E2D51, 0x165667B19E3779B9

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class _Owned(NamedTuple):
    """A weight that can be pruned, and the layer that owns it."""

    layer: nn.Module
    weight: nn.Parameter


def _owned_weights(model: nn.Module) -> dict[str, _Owned]:
    """By name, each weight that can be pruned; in model order."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise PruningError(f"the model is in {type(model).__name__}: expected its `.module`")

    seen = set()
    owned = {}
    for path, module in model.named_modules():
        for name in _own_names(module):
            weight = getattr(module, name)
            is_plain = isinstance(weight, nn.Parameter) and weight.numel()
            if is_plain and id(weight) not in seen:
                seen.add(id(weight))
                owned[f"{path}.{name}".lstrip(".")] = _Owned(module, weight)
    return owned


def _own_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights that a module has itself."""
    if isinstance(module, nn.Conv2d):
        return ("weight",) if module.groups == 1 else ()
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ("weight",) if isinstance(module, nn.Linear) else ()


def _by_default(model: nn.Module, owned: Mapping[str, _Owned]) -> list[str]:
    """The names of the weights that are prunable by default."""
    of_classifiers = set()
    for module in model.modules():
        if hasattr(module, "get_classifier"):
            layers = _modules(module.get_classifier())
            of_classifiers |= {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}
    return [
        name
        for name, (_, weight) in owned.items()
        if weight.dim() == 2
        and id(weight) not in of_classifiers
        and not POSITION_MLPS & {*name.split(".")}
    ]


def _chosen(layers: Layers, owned: Mapping[str, _Owned], by_default: Sequence[str]) -> set[str]:
    """The names of the weights that `layers` chooses, as in `prunable_weights`."""
    if callable(layers):
        return {name for name in by_default if layers(layer_name(name), owned[name].layer)}
    if why := why_no_layers(layers):
        raise PruningError(f"layers: {why}")

    chosen = {*by_default} if layers[0].startswith("!") else set()
    for pattern in layers:
        wanted = pattern.removeprefix("!")
        matched = {
            name
            for name in owned
            if fnmatchcase(name, wanted) or fnmatchcase(layer_name(name), wanted)
        }
        if not matched:
            example = layer_name(next(iter([*by_default, *owned]), "blocks.*"))
            raise PruningError(
                f"layers {short(pattern)} matches no layer: expected a pattern such as {example}"
            )
        if pattern.startswith("!"):
            chosen -= matched
        else:
            chosen |= matched.intersection(by_default) or matched
    return chosen


def _modules(found) -> Iterator[nn.Module]:
    """Every module in a module, or in nested lists and tuples of modules."""
    if isinstance(found, nn.Module):
        yield from found.modules()
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _modules(item)


def _why_not_packed(name, entry) -> str | None:
    """Why an entry is not as `pack` writes it; None if it is."""
    if not isinstance(name, str) or not isinstance(entry, dict) or set(entry) != {"bits", "shape"}:
        return "expected a name with bits and a shape"
    bits = entry["bits"]
    shape = entry["shape"]

    if not isinstance(shape, list | tuple) or not 1 <= len(shape) <= 8:
        return "expected a shape of 1 to 8 dimensions"
    if not all(type(size) is int and 1 <= size < 2**31 for size in shape):
        return "expected a shape of positive integers"

    is_bytes = isinstance(bits, Tensor) and bits.dtype == torch.uint8
    if not is_bytes or bits.layout != torch.strided or bits.is_meta:
        return "expected bits as a uint8 tensor"
    needed = -(-prod(shape) // 8)
    # Contiguous: a stride of 0 would let one stored byte stand for any number of bytes
    if bits.dim() != 1 or bits.numel() != needed or not bits.is_contiguous():
        return f"expected {needed} contiguous bytes of bits for its shape"
    return None


def _powers(device: torch.device) -> Tensor:
    """128, 64, ..., 1."""
    return 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
