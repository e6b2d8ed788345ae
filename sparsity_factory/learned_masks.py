"""Learns masks: each group of weights has a logit for each mask it can have; weights stand still.

With p the softmax of (scale logits + Gumbel noise) / temperature, the forward pass sees w s. The
soft mask s of a group is the mean of its masks with weights p. Since w stands still, its gradient g
gives the gradient of the logits in closed form, and no layer has to be wrapped:
d loss / d s = g w, then the Jacobian of the softmax.

Fang et al. 2024, arXiv:2409.17481 (MaskLLM).
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

PRIOR = 0.03  # added to a logit for each weight shared with the first mask: the paper's 3 x 0.01
# At the beginning and at the end of the learning, as in the paper
TEMPERATURES = (4.0, 0.05)
SCALES = (100.0, 500.0)
# Of Adam, which trains the logits
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class MaskLearner:
    """The logits of a model's weights, and what trains them.

    Args:
        weights: parameter name to weight, shape (outputs, inputs).
        masks: the first masks, by name.
        sizes: m, by the names of the weights that are pruned n:m.
        seed: of the noise.
        prior: added to a logit for each weight that its mask shares with the first one.
        temperatures, scales: at the beginning and at the end of the learning.

    Attributes:
        states: by name a tensor (3, groups, masks): the logits, and Adam's two moments of their
            gradients. Only for weights whose groups have a choice.
        updates: int64 tensor, how many steps the logits have made.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        seed: int,
        *,
        prior: float = PRIOR,
        temperatures: tuple[float, float] = TEMPERATURES,
        scales: tuple[float, float] = SCALES,
    ):
        self._weights = weights
        self._seed = seed
        self._temperatures = temperatures
        self._scales = scales
        self._choices: dict[str, Tensor] = {}
        self._shares: dict[str, Tensor] = {}
        self._factor = 1.0

        self.states: dict[str, Tensor] = {}
        for name, size in sizes.items():
            groups = masks[name].reshape(-1, size)
            choices = group_masks(int(groups[0].count_nonzero()), size).to(groups.device)
            if len(choices) == 1:
                continue
            # The more weights a mask shares with the first one, the larger is its logit
            shared = groups.to(choices) @ choices.T
            logits = prior * (shared - shared.mean(1, keepdim=True))
            moment = torch.zeros_like(logits)
            self._choices[name] = choices
            self.states[name] = torch.stack([logits, moment, moment])

        device = next(iter(weights.values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    def soften(self, step: int, progress: float) -> None:
        """Multiplies the weights by soft masks, in place.

        Args:
            step: decides the noise, with the seed and the number of the weight.
            progress: 0 at the beginning of the learning, 1 at its end.
        """
        scale = _between(self._scales, progress)
        temperature = _between(self._temperatures, progress)
        self._factor = scale / temperature

        for layer, (name, (logits, _, _)) in enumerate(self.states.items()):
            noise = gumbel(logits, (self._seed, step, layer))
            self._shares[name] = ((scale * logits + noise) / temperature).softmax(1)
            weight = self._weights[name]
            weight.mul_((self._shares[name] @ self._choices[name]).view(weight.shape))

    def learn(
        self, dense: Mapping[str, Tensor], rate: float, scale: float | Tensor, finite: Tensor
    ) -> None:
        """A step of Adam for the logits, by the gradients of the weights that `soften` has masked.

        Args:
            dense: the weights before `soften`, by name.
            rate: the learning rate.
            scale: what the loss was multiplied by.
            finite: bool tensor; if it is False, nothing is learned. Nobody waits for the device.
        """
        self.updates += finite
        for name, state in self.states.items():
            gradient = self._weights[name].grad
            if gradient is None:
                continue
            of_logits = logits_gradient(
                dense[name] * gradient, self._shares[name], self._choices[name]
            )
            new = adam(state, self._factor * of_logits / scale, self.updates, rate)
            torch.where(finite, new, state, out=state)
        self._shares.clear()

    def masks(self) -> dict[str, Tensor]:
        """For each group the mask of the largest logit; on a tie the first one."""
        return {
            name: self._choices[name][state[0].argmax(1)].bool().view(self._weights[name].shape)
            for name, state in self.states.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """`states` and `updates`; not copies."""
        return {**self.states, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies what `state_dict` returned, of the same names and shapes."""
        for name, values in self.state_dict().items():
            values.copy_(state[name])


def group_masks(n: int, m: int) -> Tensor:
    """All masks that keep n of m, float32 of shape (masks, m); earlier weights are kept first."""
    masks = [[float(place in kept) for place in range(m)] for kept in combinations(range(m), n)]
    return torch.tensor(masks)


def gumbel(like: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Gumbel noise of the shape of `like`, a function of the seed."""
    number = np.random.SeedSequence(seed).generate_state(1, np.uint64).item()
    generator = torch.Generator(like.device).manual_seed(number)
    return -torch.empty_like(like).exponential_(generator=generator).log()


def logits_gradient(change: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    """The gradient with respect to the input of the softmax, shape (groups, masks).

    Args:
        change: the gradient of the loss by the soft mask, of the weight's shape.
        shares: the softmax, shape (groups, masks).
        choices: the masks, shape (masks, m).
    """
    of_shares = change.to(shares).reshape(len(shares), -1) @ choices.T
    return shares * (of_shares - (shares * of_shares).sum(1, keepdim=True))


def adam(state: Tensor, gradient: Tensor, updates: Tensor, rate: float) -> Tensor:
    """The state after a step of Adam.

    Args:
        state: stacked values and their two moments, shape (3, ...).
        gradient: of the values.
        updates: the number of this step, from 1.
        rate: the learning rate.
    """
    value, first, second = state
    first = BETAS[0] * first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()

    # Corrected for the moments' start at zero
    steps = updates.to(value)
    size = (second / (1 - BETAS[1] ** steps)).sqrt() + EPSILON
    return torch.stack([value - rate * first / (1 - BETAS[0] ** steps) / size, first, second])


def _between(ends: tuple[float, float], progress: float) -> float:
    first, last = ends
    return first + (last - first) * progress
