"""Masks that are learned: a group of weights has a logit for each mask that it can have, and the
weights stand still.

With p the softmax of (scale logits + Gumbel noise) / temperature, the forward pass sees w s, where
the soft mask s of a group is the mean of its masks with weights p. Since w stands still, its
gradient g gives that of the logits in closed form, and nothing has to be wrapped: d loss / d s = g
w, then the Jacobian of the softmax.

Fang et al. 2024, arXiv:2409.17481 (MaskLLM).
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

# How much a logit rises with each weight that its mask shares with the first one: the paper's 3 x
# 0.01
PRIOR = 0.03
# From the beginning to the end of the learning, as the paper has it
TEMPERATURES = 4.0, 0.05
SCALES = 10.0, 100.0
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, which trains the logits


class MaskLearner:
    """The logits of a model's weights, and what trains them.

    Args:
        weights: parameter name to weight, shape (outputs, inputs).
        masks: those to begin with, by name.
        sizes: m, by the names of those of which every group keeps n of m.
        seed: of the noise.

    Attributes:
        states: by name a tensor (3, groups, masks): the logits, and Adam's two moments of their
            gradients. for weights whose groups have a choice.
        updates: int64 tensor, how many steps the logits have made.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        seed: int,
    ):
        self._weights = weights
        self._seed = seed
        self._choices = {}
        self.states = {}
        for name, size in sizes.items():
            groups = masks[name].reshape(-1, size)
            choices = group_masks(int(groups[0].count_nonzero()), size).to(groups.device)
            if len(choices) > 1:
                shared = groups.to(choices) @ choices.T
                logits = PRIOR * (shared - shared.mean(1, keepdim=True))
                self._choices[name] = choices
                self.states[name] = torch.stack(
                    [logits, torch.zeros_like(logits), torch.zeros_like(logits)]
                )
        self.updates = torch.zeros(
            (), dtype=torch.int64, device=next(iter(weights.values())).device
        )
        self._shares: dict[str, Tensor] = {}
        self._factor = 1.0

    def soften(self, step: int, progress: float) -> None:
        """Multiplies the weights by soft masks, in place.

        step: decides the noise, with the seed and the number of the weight. progress: 0 at the
        beginning, 1 at the end.
        """
        scale, temperature = (
            first + (last - first) * progress for first, last in (SCALES, TEMPERATURES)
        )
        self._factor = scale / temperature
        for layer, (name, (logits, _, _)) in enumerate(self.states.items()):
            seed = (
                np.random.SeedSequence((self._seed, step, layer))
                .generate_state(1, np.uint64)
                .item()
            )
            noise = (
                -torch.empty_like(logits)
                .exponential_(generator=torch.Generator(logits.device).manual_seed(seed))
                .log()
            )
            self._shares[name] = ((scale * logits + noise) / temperature).softmax(1)
            weight = self._weights[name]
            weight.mul_((self._shares[name] @ self._choices[name]).view(weight.shape))

    def learn(
        self, dense: Mapping[str, Tensor], rate: float, scale: float | Tensor, finite: Tensor
    ) -> None:
        """A step of Adam for the logits, by the gradients of the weights that `soften` has masked.

        Args:
            dense: the weights before that, by name.
            rate: of learning.
            scale: what the loss was multiplied by.
            finite: bool tensor; where it is False, nothing is learned. Nobody waits for the device.
        """
        self.updates += finite
        for name, state in self.states.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                of_logits = (
                    self._factor
                    * logits_gradient(
                        dense[name] * gradient, self._shares[name], self._choices[name]
                    )
                    / scale
                )
                new = adam(state, of_logits, self.updates, rate)
                torch.where(finite, new, state, out=state)
        self._shares.clear()

    def masks(self) -> dict[str, Tensor]:
        """Of each group the mask of the largest logit; on a tie the first one."""
        return {
            name: self._choices[name][state[0].argmax(1)].bool().view(self._weights[name].shape)
            for name, state in self.states.items()
        }


def group_masks(n: int, m: int) -> Tensor:
    """All masks that keep n of m, those of earlier weights first: float32 (masks, m)."""
    return torch.tensor(
        [[float(place in kept) for place in range(m)] for kept in combinations(range(m), n)]
    )


def logits_gradient(change: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    """The gradient with respect to what the softmax is taken of, shape (groups, masks).

    Args:
        change: the gradient of the loss by the soft mask, of the weight's shape.
        shares: the softmax, shape (groups, masks).
        choices: the masks, shape (masks, m).
    """
    of_shares = change.to(shares).reshape(len(shares), -1) @ choices.T
    return shares * (of_shares - (shares * of_shares).sum(1, keepdim=True))


def adam(state: Tensor, gradient: Tensor, updates: Tensor, rate: float) -> Tensor:
    """The state (values and two moments, one after the other) after Adam's step of the number
    `updates`, from 1 on.
    """
    value, first, second = state
    first = BETAS[0] * first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
    steps = updates.to(value)
    size = (second / (1 - BETAS[1] ** steps)).sqrt() + EPSILON
    return torch.stack([value - rate * first / (1 - BETAS[0] ** steps) / size, first, second])
