"""The moving average of the weights, updated by one call over all of them."""

import torch
from timm.utils import ModelEmaV3


class MovingAverage(ModelEmaV3):
    """timm's moving average, with the same values; its update takes the host less time.

    timm makes the state dicts of both models at each step. Here the lists of tensors are made once,
    which is right as long as a model keeps its parameters and buffers, whatever is written to them.
    """

    def __init__(self, model: torch.nn.Module, decay: float, device: str | None = None):
        super().__init__(model, decay, device=device)
        self._model: torch.nn.Module | None = None

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int | None = None) -> None:
        if model is not self._model:
            self._pair_up(model)

        new = self._here(self._new)
        torch._foreach_lerp_(self._averages, new, weight=1 - self.get_decay(step))
        for own, value in zip(self._own_counts, self._here(self._counts), strict=True):
            own.copy_(value)

    def _here(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of the model on the device of the average.

        From a GPU, one wait follows the copies of all.
        """
        if self.device is None or not values:
            return values
        copies = [value.to(self.device, non_blocking=True) for value in values]
        if values[0].is_cuda and not copies[0].is_cuda:
            torch.cuda.current_stream(values[0].device).synchronize()
        return copies

    def _pair_up(self, model: torch.nn.Module) -> None:
        """Lists the tensors of a model that are averaged, and those that are copied."""
        own = self.module.state_dict(keep_vars=True)
        theirs = model.state_dict(keep_vars=True)
        pairs = [(value, theirs[name]) for name, value in own.items()]

        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averages = [own for own, _ in averaged]
        self._new = [value for _, value in averaged]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._own_counts = [own for own, _ in counts]
        self._counts = [value for _, value in counts]
        # Not as a part of this module
        object.__setattr__(self, "_model", model)
