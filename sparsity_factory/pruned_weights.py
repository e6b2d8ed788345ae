"""What happens to pruned weights in a training step: they are zero, hidden or frozen.

`Sparsifier` hands each of its three calls on to one of these objects. The schedule says which:

- `ZeroWeights`: they and their gradients are zero. Most schedules.
- `HiddenWeights`: they are trained too, but the forward pass does not see them. `ste`, `sr-ste`.
- `FrozenWeights`: all weights stand still until the masks are learned. `maskllm`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .followers import Followers
from .learned_masks import MaskLearner
from .masks import Masks, bits


class ZeroWeights:
    """Pruned weights are zero, and so are their gradients and the optimizer's state of them.

    Args:
        parameters: all parameters of the model, by name.
        masks: the masks of the model. Whoever changes them calls `change`.
        schedule: the `Schedule` of the run.
        followers: optimizer and averages.
        group_sizes: m, by the names of the weights that are pruned n:m.

    Attributes:
        learns: whether the masks are being learned.
    """

    learns = False

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        masks: Masks,
        schedule,
        followers: Followers,
        group_sizes: Mapping[str, int],
    ):
        self._parameters = parameters
        self._masks = masks
        self._schedule = schedule
        self._followers = followers
        self._group_sizes = group_sizes

    def start(self) -> None:
        """Prunes the weights by the masks, when these have been chosen for the first time."""
        self._masks.apply()

    def begin_step(self, step: int) -> None:
        """Before the forward pass."""

    def end_backward(self, scale: float | Tensor) -> None:
        """When the gradients are complete. scale: what the loss was multiplied by."""
        # Muon gives all singular values of a gradient one size. A gradient with holes has many that
        # are only noise.
        if not self._followers.orthogonalizes:
            self._masks.apply_to_grads()

    def end_step(self, masks_change: bool) -> None:
        """After the optimizer's step. masks_change: a call of `change` follows."""
        self._masks.apply()

    def change(self, masks: Mapping[str, Tensor]) -> "ZeroWeights":
        """Changes the masks, and prunes by them; returns what treats pruned weights from now on."""
        changes = self._masks.update(masks)
        self._masks.apply()
        self._followers.forget_changed(changes)
        return self

    def learned_masks(self) -> dict[str, Tensor]:
        """The masks that were learned so far, of the weights whose groups have a choice."""
        return {}

    def state_dict(self) -> dict[str, dict]:
        """The entries of a checkpoint that are about pruned weights. Tensors are not copied."""
        return {"hidden": {}}

    def load(self, saved, masks: Mapping[str, Tensor]) -> None:
        """Takes over the entries of a checkpoint; changes neither model nor masks.

        Args:
            saved: a `SavedPruning`.
            masks: the saved masks.

        Raises:
            PruningError: the entries are damaged, or belong to another model or schedule.
        """
        saved.hidden({}, masks)


class HiddenWeights(ZeroWeights):
    """Pruned weights are trained too, and the forward pass does not see them.

    Between steps the model has the kept weights and `_hidden` the pruned ones, each with zeros
    elsewhere. From the backward pass to the end of the step, the model has both. What passes from
    one to the other is added as bit patterns, which is exact.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._hidden: dict[str, Tensor] = {}

    def start(self) -> None:
        self._hide()

    def end_backward(self, scale: float | Tensor) -> None:
        if self._schedule.decay:
            self._add_decay(scale)
        self._reveal()

    def end_step(self, masks_change: bool) -> None:
        # New masks are chosen with all weights in place
        if not masks_change:
            self._hide()

    def change(self, masks: Mapping[str, Tensor]) -> ZeroWeights:
        self._masks.replace(masks)
        self._hide()
        return self

    def state_dict(self) -> dict[str, dict]:
        return {"hidden": dict(self._hidden)}

    def load(self, saved, masks: Mapping[str, Tensor]) -> None:
        hidden = saved.hidden({name: self._parameters[name] for name in masks}, masks)
        self._hidden = {
            name: values.to(self._parameters[name].device, copy=True)
            for name, values in hidden.items()
        }

    def _hide(self) -> None:
        """Takes the pruned weights out of the model."""
        weights = [self._parameters[name].detach() for name in self._masks]
        for name, weight in zip(self._masks, weights, strict=True):
            if name not in self._hidden:
                self._hidden[name] = torch.empty_like(weight)
        hidden = list(self._hidden.values())

        torch._foreach_copy_(hidden, weights)
        self._masks.apply()
        torch._foreach_sub_(
            [bits(values) for values in hidden], [bits(weight) for weight in weights]
        )

    def _reveal(self) -> None:
        """Puts the pruned weights into the model."""
        torch._foreach_add_(
            [bits(self._parameters[name]) for name in self._hidden],
            [bits(values) for values in self._hidden.values()],
        )

    def _add_decay(self, scale: float | Tensor) -> None:
        """Adds the pruned weights, times the schedule's decay, to their gradients."""
        decay = self._schedule.decay
        for name, values in self._hidden.items():
            gradient = self._parameters[name].grad
            if gradient is None:
                continue
            if isinstance(scale, Tensor):
                gradient.addcmul_(values, scale.to(values.dtype), value=decay)
            else:
                gradient.add_(values, alpha=decay * scale)


class FrozenWeights(HiddenWeights):
    """All weights stand still while the masks are learned; the next `change` ends that.

    Between steps pruned weights are hidden. In a step the model has all weights, multiplied by soft
    masks; `_frozen` has a copy of all parameters, from which the end of the step restores them.
    """

    learns = True

    def __init__(self, *args):
        super().__init__(*args)
        self._learner: MaskLearner  # made by `start` or `load`
        self._frozen: dict[str, Tensor] = {}

    def start(self) -> None:
        self._learner = self._new_learner(self._masks)
        self._hide()

    def begin_step(self, step: int) -> None:
        self._reveal()
        self._frozen = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }
        self._learner.soften(step, self._schedule.progress(step))

    def end_backward(self, scale: float | Tensor) -> None:
        finite = are_finite(self._parameters)
        self._learner.learn(self._frozen, self._schedule.recipe.mask_lr, scale, finite)

    def end_step(self, masks_change: bool) -> None:
        # Takes back what the soft masks and the optimizer have done to the parameters
        for name, values in self._frozen.items():
            self._parameters[name].copy_(values)
        self._frozen = {}

        if not masks_change:
            self._masks.replace(self._learner.masks())
            self._hide()
            self._followers.renew_averages()

    def change(self, masks: Mapping[str, Tensor]) -> ZeroWeights:
        self._masks.replace(masks)
        self._masks.apply()
        # From here on the weights are trained, as if the training began
        self._followers.forget()
        self._followers.renew_averages()
        return ZeroWeights(
            self._parameters, self._masks, self._schedule, self._followers, self._group_sizes
        )

    def learned_masks(self) -> dict[str, Tensor]:
        return self._learner.masks()

    def state_dict(self) -> dict[str, dict]:
        return {**super().state_dict(), "learned": self._learner.state_dict()}

    def load(self, saved, masks: Mapping[str, Tensor]) -> None:
        self._learner = self._new_learner(masks)
        self._learner.load_state_dict(saved.tensors("learned", self._learner.state_dict()))
        super().load(saved, masks)

    def _new_learner(self, masks: Mapping[str, Tensor]) -> MaskLearner:
        masks = {name: mask.to(self._parameters[name].device) for name, mask in masks.items()}
        # A layer of a custom configuration may be dense
        sizes = {name: self._group_sizes[name] for name in masks if name in self._group_sizes}
        seed = self._schedule.recipe.seed
        return MaskLearner(self._parameters, masks, sizes, seed, **self._schedule.learning)


def are_finite(parameters: Mapping[str, Tensor]) -> Tensor:
    """A bool tensor: whether all gradients are finite. Does not wait for the device."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()
