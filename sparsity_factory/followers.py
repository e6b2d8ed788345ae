"""The optimizer and the averages of a model, which follow its masks."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .masks import Change, Masks, select


class Followers:
    """What obeys the masks of a model as well: its optimizer's state, and averages of its weights.

    Args:
        model: the one that is trained.
        masks: its masks, which change in place.

    Attributes:
        orthogonalizes: whether the optimizer is Muon or of its kin.
    """

    def __init__(self, model: nn.Module, masks: Masks):
        self._model = model
        self._masks = masks
        self._optimizer: torch.optim.Optimizer | None = None
        self._averages: tuple[nn.Module, ...] = ()
        self.orthogonalizes = False

    def attach(self, optimizer: torch.optim.Optimizer, averages: Iterable[nn.Module]) -> None:
        """Names the optimizer, and the modules with the model's parameter names."""
        self._optimizer = optimizer
        self._averages = tuple(averages)
        self.orthogonalizes = any("ns_steps" in group for group in optimizer.param_groups)

    # ---- averages ----

    def mask_averages(self) -> None:
        """Sets the pruned weights of the averages to zero."""
        for average in self._averages:
            self._masks.apply_to(average)

    def renew_averages(self) -> None:
        """Lets the averages begin anew from the weights as they are."""
        for average in self._averages:
            average.load_state_dict(self._model.state_dict())

    def copy_averages(self) -> list[dict[str, Tensor]]:
        """The averages' states, on the CPU."""
        return [on_cpu(average.state_dict()) for average in self._averages]

    def load_averages(self, states: list[dict[str, Tensor]]) -> None:
        """Loads what `copy_averages` returned; without it, averages begin anew."""
        if len(states) != len(self._averages):
            self.renew_averages()
            return
        for average, state in zip(self._averages, states, strict=True):
            average.load_state_dict(state)

    # ---- the optimizer's state ----

    def forget(self) -> None:
        """Clears the optimizer's state, as at the beginning of a training."""
        self._states().clear()

    def forget_changed(self, changes: Mapping[str, Change]) -> None:
        """Clears what the optimizer knows of weights that were dropped or have grown."""
        states = self._states()
        for name, change in changes.items():
            weight = self._model.get_parameter(name)
            unchanged = change.dropped.logical_or(change.grown).logical_not_()

            for value in states.get(weight, {}).values():
                if _has_a_float_for_each(value, weight):
                    select(value, unchanged.to(value.device))

    def _states(self) -> dict[Tensor, dict]:
        optimizer = self._optimizer
        while inner := getattr(optimizer, "_base_optimizer", None):  # timm's Lookahead
            optimizer = inner
        return optimizer.state if optimizer is not None else {}


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict in the CPU's memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _has_a_float_for_each(value, weight: Tensor) -> bool:
    is_tensor = isinstance(value, Tensor)
    return is_tensor and value.shape == weight.shape and value.is_floating_point()
