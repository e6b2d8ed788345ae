"""When masks are chosen or changed during a training.

A schedule is a class of a few lines. It says at which steps masks change, and asks a `Sparsifier`
for the new ones. No schedule knows how weights are scored, allocated or grouped; no pruner knows
the training loop. To add a schedule, write such a class and name it in `SCHEDULES`.

Steps are counted from 0. Masks that change at step t hold from step t + 1 on. A change at step 0 is
made before the training begins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .learned_masks import PRIOR, SCALES, TEMPERATURES
from .method import NotNegative, Positive, method
from .pruned_weights import FrozenWeights, HiddenWeights, ZeroWeights


@dataclass(frozen=True)
class Steps:
    """The times of a run, in steps.

    Attributes:
        total: steps of the whole training.
        epoch: steps of an epoch.
        start, end: the first and the last step at which a schedule changes masks.
        rewind: the step whose weights the run goes back to, or None.
    """

    total: int
    epoch: int
    start: int
    end: int
    rewind: int | None = None


class Schedule:
    """What the schedules have in common.

    Attributes:
        uses: the fields of a recipe that it looks at.
        starts_sparse: the run begins with the masks of the target, not with a dense network.
        looks_at_gradients: `masks` is called before the optimizer's step, with dense gradients.
        needs_training: its masks change because prunable weights are trained; if all of them are
            frozen, it has nothing to go by.
        moves_weights: any pruned weight of a layer may come back, whatever the pattern.
        goes_dense: a pruned model becomes dense again on the way.
        trains_pruned: pruned weights are trained too, but the forward pass does not see them.
        decay: such weights, times this, are added to their gradients.
        learns_masks: until its one change of masks, all weights stand still while groups learn
            their masks.
        learning: how they do, as arguments of a `MaskLearner`.
    """

    uses: tuple[str, ...] = ()
    starts_sparse = True
    looks_at_gradients = False
    needs_training = False
    moves_weights = False
    goes_dense = False
    trains_pruned = False
    decay = 0.0
    learns_masks = False
    learning: Mapping = {}

    def __init__(self, recipe, steps: Steps):
        self.recipe = recipe
        self.steps = steps

    def changes_at(self, step: int) -> bool:
        """Whether the masks change at this step."""
        return False

    def masks(self, step: int, network) -> dict[str, Tensor]:
        """The masks that a change at this step brings.

        Args:
            step: when the change is made, which may be some steps after it was due.
            network: the `Sparsifier` that chooses or grows them.
        """
        raise NotImplementedError

    def is_final(self, changed: int) -> bool:
        """Whether the target is reached with a latest change at step `changed` (-1: none yet)."""
        return True

    def place(self, step: int, changed: int) -> int:
        """The step of the learning-rate schedule whose rate trains at `step`.

        changed: the step of the latest change of the masks, -1 if there was none.
        """
        return step

    def pruned_weights(self, changed: int) -> type[ZeroWeights]:
        """What treats pruned weights after a change of the masks at step `changed`."""
        if self.trains_pruned:
            return HiddenWeights
        if self.learns_masks and not self.is_final(changed):
            return FrozenWeights
        return ZeroWeights

    def every(self, step: int) -> bool:
        """Whether a change is due: every `prune_every` steps after the start, up to the end."""
        since = step - self.steps.start
        return since > 0 and step <= self.steps.end and since % self.recipe.prune_every == 0

    def progress(self, step: int) -> float:
        """0 at the start, 1 from the end on."""
        return min((step - self.steps.start) / max(self.steps.end - self.steps.start, 1), 1.0)


@method()
class OneShot(Schedule):
    """Masks are chosen before the training."""


@method(
    "Zhu and Gupta 2017, arXiv:1710.01878",
    exponent="of 1 - t: the larger, the more is pruned early",
)
class Gradual(Schedule):
    """Sparsity s (1 - (1 - t)^3) from --prune-start to --prune-end; what is pruned stays so."""

    uses = ("prune_start", "prune_end", "prune_every")
    starts_sparse = False

    def __init__(self, recipe, steps, *, exponent: Positive = 3.0):
        super().__init__(recipe, steps)
        self.exponent = exponent

    def changes_at(self, step):
        return self.every(step) or step == self.steps.end

    def masks(self, step, network):
        left = 1 - self.progress(step) if step < self.steps.end else 0

        def so_far(sparsity: float) -> float:
            return sparsity * (1 - left**self.exponent)

        return network.choose(so_far, among_kept=True)

    def is_final(self, changed):
        return changed >= self.steps.end


@method("Han et al. 2015, arXiv:1506.02626; Frankle et al. 2020, arXiv:1912.05671")
class Iterative(Schedule):
    """Each of --prune-rounds prunes the same fraction of what is left; --rewind goes back after it.

    With a rewind, weights and averages go back to what they were at its epoch, and each round
    trains along the whole learning-rate schedule from there on, in the steps that it has.
    """

    uses = ("prune_start", "prune_end", "prune_rounds", "rewind")
    starts_sparse = False

    def __init__(self, recipe, steps):
        super().__init__(recipe, steps)
        span = steps.end - steps.start
        gaps = max(recipe.prune_rounds - 1, 1)
        self.rounds = [steps.start + span * i // gaps for i in range(recipe.prune_rounds)]

    def changes_at(self, step):
        return step in self.rounds

    def masks(self, step, network):
        share = sum(start <= step for start in self.rounds) / len(self.rounds)

        def so_far(sparsity: float) -> float:
            return 1 - (1 - sparsity) ** share if share < 1 else sparsity

        return network.choose(so_far, among_kept=True)

    def is_final(self, changed):
        return changed >= self.rounds[-1]

    def place(self, step, changed):
        rewind = self.steps.rewind
        if rewind is None or step <= rewind:
            return step

        # A round at step 0 is made before the training, others after the step
        first = max(changed + 1 if changed > 0 else 0, rewind)
        after = min((round_ + 1 for round_ in self.rounds if round_ > changed), default=0)
        steps = (after or self.steps.total) - first
        place = rewind + (self.steps.total - rewind) * (step - first) // max(steps, 1)
        return min(place, self.steps.total - 1)


@method("Mocanu et al. 2018, arXiv:1707.04780")
class Set(Schedule):
    """Every few steps the smallest kept weights of a layer make room for others, at random."""

    uses: tuple[str, ...] = ("prune_start", "prune_end", "prune_every", "drop_fraction", "seed")
    # A weight without a gradient is not trained, and would not grow
    looks_at_gradients = True
    needs_training = True
    moves_weights = True

    def changes_at(self, step):
        return self.every(step) and step < self.steps.end

    def masks(self, step, network):
        share = self.recipe.drop_fraction / 2 * (1 + math.cos(math.pi * self.progress(step)))

        def growth(weight: Tensor, layer: int) -> Tensor:
            return self.growth(weight, step, layer)

        return network.regrow(share, growth)

    def growth(self, weight: Tensor, step: int, layer: int) -> Tensor:
        """How much each weight of a layer deserves to grow: non-negative, of the weight's shape."""
        sequence = np.random.SeedSequence((self.recipe.seed, step, layer))
        seed = sequence.generate_state(1, np.uint64).item()
        generator = torch.Generator(weight.device).manual_seed(seed)
        return torch.rand(weight.shape, generator=generator, device=weight.device)


@method("Evci et al. 2020, arXiv:1911.11134")
class RigL(Set):
    """As set, but weights with the largest dense gradients take the place of the smallest."""

    uses = ("prune_start", "prune_end", "prune_every", "drop_fraction")

    def growth(self, weight, step, layer):
        return weight.grad.abs()


@method("Peste et al. 2021, arXiv:2106.12379")
class ACDC(Schedule):
    """Dense and sparse phases in turn: --prune-rounds sparse ones, the last from --prune-end on.

    From the start to the end all phases have the same length, the first one dense; from the end on
    the model is sparse. Phases begin with an epoch, unless they would be shorter than one.
    """

    uses = ("prune_start", "prune_end", "prune_rounds")
    starts_sparse = False
    needs_training = True
    goes_dense = True

    def __init__(self, recipe, steps):
        super().__init__(recipe, steps)
        phases = 2 * recipe.prune_rounds - 1
        span = steps.end - steps.start
        # Phases begin here after the first, dense one: sparse, dense, sparse, ..., sparse
        self.begins = [steps.start + span * phase // phases for phase in range(1, phases + 1)]

        if span >= phases * steps.epoch:
            last_epoch = (steps.total - 1) // steps.epoch
            epochs = [(2 * step + steps.epoch) // (2 * steps.epoch) for step in self.begins]
            self.begins = [min(epoch, last_epoch) * steps.epoch for epoch in epochs]

    def changes_at(self, step):
        return step in self.begins

    def masks(self, step, network):
        is_sparse = sum(begin <= step for begin in self.begins) % 2
        return network.choose() if is_sparse else network.dense()

    def is_final(self, changed):
        return changed >= self.begins[-1]


@method("Bengio et al. 2013, arXiv:1308.3432")
class STE(Schedule):
    """The forward pass sees masked weights, all are trained; masks are chosen every few steps."""

    uses: tuple[str, ...] = ("prune_start", "prune_end", "prune_every")
    needs_training = True
    trains_pruned = True

    def changes_at(self, step):
        return self.every(step)

    def masks(self, step, network):
        return network.choose()


@method("Zhou et al. 2021, arXiv:2102.04010")
class SRSTE(STE):
    """As ste, with --sr-decay times the masked-out weight added to its gradient."""

    uses = (*STE.uses, "sr_decay")

    def __init__(self, recipe, steps):
        super().__init__(recipe, steps)
        self.decay = recipe.sr_decay


@method(
    "Fang et al. 2024, arXiv:2409.17481",
    prior="is added to a logit for each weight that its mask shares with the first mask",
    first_scale="of the logits, when the learning begins",
    last_scale="of the logits, when it ends",
    first_temperature="of the softmax, when the learning begins",
    last_temperature="of the softmax, when it ends",
)
class MaskLLM(Schedule):
    """Until --prune-end weights stand still and n:m groups learn masks; then weights train."""

    uses = ("prune_end", "mask_lr", "seed")
    needs_training = True
    learns_masks = True

    def __init__(
        self,
        recipe,
        steps,
        *,
        prior: NotNegative = PRIOR,
        first_scale: Positive = SCALES[0],
        last_scale: Positive = SCALES[1],
        first_temperature: Positive = TEMPERATURES[0],
        last_temperature: Positive = TEMPERATURES[1],
    ):
        super().__init__(recipe, steps)
        self.learning = {
            "prior": prior,
            "scales": (first_scale, last_scale),
            "temperatures": (first_temperature, last_temperature),
        }

    def changes_at(self, step):
        return step == self.steps.end

    def masks(self, step, network):
        return network.learned()

    def is_final(self, changed):
        return changed >= self.steps.end


SCHEDULES: dict[str, type[Schedule]] = {
    "one-shot": OneShot,
    "gradual": Gradual,
    "iterative": Iterative,
    "set": Set,
    "rigl": RigL,
    "ac-dc": ACDC,
    "ste": STE,
    "sr-ste": SRSTE,
    "maskllm": MaskLLM,
}


def users_of(field: str) -> list[str]:
    """The names of the schedules that look at a field of a recipe."""
    return [name for name, schedule in SCHEDULES.items() if field in schedule.uses]
