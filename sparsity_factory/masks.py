"""Which weights of a model are prunable, and `Masks`, which keeps the chosen ones at zero."""

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PruningError


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight of every `nn.Linear` except the classifier's, by parameter name, in model order.

    The classifier is what `model.get_classifier()` returns, where the model has that method: a module, or a list or
    tuple of them. A weight that several modules share appears once, under its first name; one shared with the
    classifier does not appear. Linear layers whose weight is not a plain parameter (`torch.nn.utils.prune`,
    parametrizations) are left out.
    """
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    seen = {id(module.weight) for module in _modules(classifier) if isinstance(module, nn.Linear)}
    weights = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not isinstance(module.weight, nn.Parameter):
            continue
        if module.weight.numel() and id(module.weight) not in seen:
            seen.add(id(module.weight))
            weights[f"{name}.weight" if name else "weight"] = module.weight
    return weights


class Masks:
    """Keeps the pruned weights of a model at zero.

    The surviving weights follow exactly the path they would take if every layer computed with `weight * mask`, while
    the model keeps its plain parameters: nothing is hooked, renamed or copied, and `copy.deepcopy(model)` works.

        masks = Masks(model, compute_masks(model, "lamp", sparsity=0.65))
        loss.backward(); masks.apply_to_grads(); optimizer.step(); masks.apply()

    Make it once the model is on its device; it holds the model's parameters themselves.

    Args:
        model: pruned in place, at once.
        masks: parameter name to bool tensor of the weight's shape, True where the weight is kept. Prunable weights
            without a mask stay dense.

    Attributes:
        masks: the masks by parameter name, each on its weight's device.

    Raises:
        PruningError: a name that is no prunable weight of the model, a wrong shape or dtype. Nothing is changed then.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        prunable = prunable_weights(model)
        for name, mask in masks.items():
            if name not in prunable:
                raise PruningError(f"mask {name!r}: the model has no prunable weight of that name")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != prunable[name].shape:
                raise PruningError(f"mask {name!r}: expected a bool tensor of shape {list(prunable[name].shape)}")
        self._weights = {name: weight for name, weight in prunable.items() if name in masks}
        self.masks = {name: masks[name].to(weight.device) for name, weight in self._weights.items()}
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the pruned weights to zero: after every optimizer step, before an average of the weights is updated."""
        for name, weight in self._weights.items():
            _multiply(weight, self.masks[name])

    @torch.no_grad()
    def apply_to_grads(self) -> None:
        """Sets the gradients of the pruned weights to zero: after backward, before they are unscaled and clipped."""
        for name, weight in self._weights.items():
            if weight.grad is not None:
                _multiply(weight.grad, self.masks[name])

    def __bool__(self) -> bool:
        """Whether any weight has a mask."""
        return bool(self.masks)

    def sparsity(self) -> float:
        """The fraction of the masked weights that is pruned, in [0, 1]."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.count_nonzero()) for mask in self.masks.values()) / total if total else 0.0

    def state_dict(self) -> dict[str, dict]:
        """The masks packed to one bit per weight, for `torch.load(..., weights_only=True)` and `unpack` to read.

        Per name `{"bits": uint8 tensor, "shape": [rows, columns]}`: row-major, most significant bit first, the last
        byte padded with zeros.
        """
        return {
            name: {"bits": torch.from_numpy(np.packbits(mask.cpu().numpy())), "shape": list(mask.shape)}
            for name, mask in self.masks.items()
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Replaces the masks by those of a `state_dict` for the same weights, and applies them.

        Raises:
            PruningError: names or shapes that are not those of these masks, damaged entries; nothing is changed then.
        """
        masks = unpack(state)
        for name in [*self.masks, *masks]:
            if name not in masks:
                raise PruningError(f"mask {name!r} is missing from the saved masks")
            if name not in self.masks:
                raise PruningError(f"mask {name!r} of the saved masks belongs to no weight that is masked here")
            if masks[name].shape != self.masks[name].shape:
                raise PruningError(
                    f"mask {name!r}: expected shape {list(self.masks[name].shape)}, got {list(masks[name].shape)}"
                )
        self.masks = {name: masks[name].to(mask.device) for name, mask in self.masks.items()}
        self.apply()


def unpack(state: dict[str, dict]) -> dict[str, Tensor]:
    """The bool masks, on the CPU, from what `Masks.state_dict` returned: `Masks(model, unpack(state))`.

    The state may come from anybody's file. Each of its bytes becomes eight mask entries and no more, so memory stays
    proportional to what was read.

    Raises:
        PruningError: naming the first entry that is not as `Masks.state_dict` writes it.
    """
    if not isinstance(state, dict):
        raise PruningError("the saved masks are not a dictionary")
    storages = set()
    for name, entry in state.items():
        problem = _packing_problem(name, entry)
        # Entries that are views of one another would multiply the memory that the file itself paid for.
        if not problem and entry["bits"].untyped_storage().data_ptr() in storages:
            problem = "shares its bits with another entry"
        if problem:
            raise PruningError(f"mask {str(name)[:200]!r} of the saved masks: {problem}")
        storages.add(entry["bits"].untyped_storage().data_ptr())
    return {name: _unpacked(entry["bits"], entry["shape"]) for name, entry in state.items()}


# ---- helpers, not exported ----


def _multiply(values: Tensor, mask: Tensor) -> None:
    values.mul_(mask.view(torch.int8))  # on CPUs less than half the time of a bool, which torch does not vectorise


def _modules(found) -> Iterator[nn.Module]:
    """Every module in a module, or in nested lists and tuples of modules."""
    if isinstance(found, nn.Module):
        yield from found.modules()
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _modules(item)


def _packing_problem(name, entry) -> str | None:
    if not isinstance(name, str) or not isinstance(entry, dict) or set(entry) != {"bits", "shape"}:
        return "expected a name with bits and a shape"
    bits, shape = entry["bits"], entry["shape"]
    if not isinstance(shape, list | tuple) or not 1 <= len(shape) <= 8:
        return "expected a shape of 1 to 8 dimensions"
    if not all(type(size) is int and 1 <= size < 2**31 for size in shape):
        return "expected a shape of positive integers"
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.layout != torch.strided or bits.is_meta:
        return "expected bits as a uint8 tensor"
    needed = -(-prod(shape) // 8)
    # Contiguous: a stride of 0 would let one stored byte stand for any number of them.
    if bits.dim() != 1 or bits.numel() != needed or not bits.is_contiguous():
        return f"expected {needed} contiguous bytes of bits for its shape"
    return None


def _unpacked(bits: Tensor, shape: list[int]) -> Tensor:
    flat = np.unpackbits(bits.cpu().numpy(), count=prod(shape)).view(np.bool_)
    return torch.from_numpy(flat).view(tuple(shape))
