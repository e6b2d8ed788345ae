"""`Sparsifier`: a recipe at work on a model that trains."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from .checkpoint import VERSION, SavedPruning
from .custom_yaml import BlockLevel
from .errors import PruningError
from .followers import Followers, on_cpu
from .masks import Masks, as_matrix, checksums, choose_layers, packed, prunable_weights, unpacked
from .method import name_of
from .patterns import Pattern, parse_pattern, regrow
from .permutation import best_orders, reorder
from .processes import ALONE, Processes
from .pruned_weights import ZeroWeights, are_finite
from .pruners import compute_masks
from .recipe import Recipe
from .reconstruction import NONE, reconstruct_layers
from .schedules import SCHEDULES, Schedule, Steps
from .scores import Scores
from .shrink import unit_counts


class Sparsifier:
    """Chooses the masks of a model by a recipe, keeps them, and changes them by the schedule.

        sparsifier = Sparsifier(model, recipe, total_steps=1000, epoch_steps=100)
        sparsifier.start()                       # or load_state_dict, to resume
        sparsifier.attach(optimizer, [average])

        for images, targets in batches:
            sparsifier.begin_step()
            loss.backward()
            sparsifier.end_backward()            # before gradients are unscaled and clipped
            optimizer.step()
            sparsifier.end_step()                # before an average of the weights is updated

    Between steps the model has its plain parameters, with the pruned ones at zero, whatever the
    schedule: this model is evaluated, averaged and saved. A dense recipe does nothing.

    All schedules keep these rules:

    - Weights that grow start at zero. The optimizer's state of a weight that is dropped or grown
      starts at zero too, wherever it has a value for each weight. (`ste` and `sr-ste` train pruned
      weights all along: their values and state stay.)
    - A change that is due at a step whose gradients are not all finite is made at the next step
      with finite gradients. Only steps with a change look at them, since that waits for the device.
    - A change is a function of the seed, the step, the weights and their gradients, so that a
      resumed run continues to the bit. All processes have the same masks: those that follow from
      the weights alone are computed by each and compared, all others come from the first process.
    - `set` and `rigl` neither drop nor grow weights without a gradient.
    - Optimizers see the gradients of the kept weights only. Muon and its kin see whole gradients.
    - Whenever the recipe chooses masks, its reconstruction changes the weights and, if it chooses
      weights itself, the masks. Averages of the weights begin anew from there.
    - A rewind takes all parameters, buffers and averages back, and the place in the learning-rate
      schedule. It clears the optimizer's state, as a training that begins at that epoch does.

    Args:
        model: on its device, without DDP's wrapper. It is changed by `start` and, if masks are
            given, at once. It remembers the layers of the recipe.
        recipe: checked here.
        total_steps: optimizer steps of the whole training.
        epoch_steps: optimizer steps of an epoch.
        masks: by which the model was pruned already; then `start` chooses none.
        statistics: called on every process with the names of what a score needs; returns a
            `Statistics`.
        walk: called on every process if the recipe reconstructs, with a copy of the dense model
            or None; returns what `walk_layers` does, given these as its `other`.
        share: calls a function on the first process, and returns its result on all: plain
            containers, numbers and tensors on their devices. Without it, each process calls the
            function.
        gather: returns the list of what all processes call it with. Without it, all masks come
            from the first process.
        processes: share out the rows of a layer that is reconstructed. Without it, each process
            reconstructs all rows.

    Attributes:
        masks: the current `Masks`, the same object for the whole run.
        schedule: the `Schedule` of the recipe.
        steps: its times in steps.
        step: the step to train next.

    Raises:
        PruningError: a recipe, configuration or mask that is wrong or does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        total_steps: int,
        epoch_steps: int,
        masks: Mapping[str, Tensor] | None = None,
        statistics: Callable | None = None,
        walk: Callable | None = None,
        share: Callable | None = None,
        gather: Callable | None = None,
        processes: Processes = ALONE,
    ):
        recipe.check()
        self.model = model
        self.recipe = recipe
        self._statistics = statistics
        self._walk = walk
        self._share = share
        self._gather = gather
        self._processes = processes

        # What the recipe means for the weights of this model
        if recipe.layers is not None:
            choose_layers(model, recipe.layers)
        weights = prunable_weights(model)
        self._shapes = {name: tuple(as_matrix(weight).shape) for name, weight in weights.items()}
        self._levels = recipe.levels(self._shapes)
        recipe.units(unit_counts(model))  # a mistake shows before any work
        schedule = SCHEDULES[recipe.prune_schedule]
        frozen = all(not weight.requires_grad for weight in weights.values())
        if weights and frozen and schedule.needs_training:
            raise PruningError(
                f"--prune-schedule {recipe.prune_schedule}: needs the gradients of prunable "
                "weights, and all of these are frozen; expected one-shot, gradual or iterative"
            )
        if schedule.learns_masks and any(weight.dim() != 2 for weight in weights.values()):
            raise PruningError(
                f"--prune-schedule {recipe.prune_schedule}: expected linear layers alone, without "
                "convolutions"
            )
        self._parameters = dict(model.named_parameters())

        # Where the run is in its schedule
        self.schedule = self._scheduled(recipe.steps(total_steps, epoch_steps))
        self.step = 0
        self._changed = -1  # the step of the latest change of the masks
        self._late = False  # whether a change is overdue
        self._due = False  # whether the masks change at the end of this step
        self._pending: dict[str, Tensor] | None = None  # the masks of that change, if chosen early
        self._rewind: dict[str, Tensor] = {}  # the model's state to go back to
        self._rewind_averages: list[dict[str, Tensor]] = []

        self.masks = Masks(model, masks or {})
        self._followers = Followers(model, self.masks)
        # A run that is never started treats pruned weights as after the last change
        self._pruned_weights = self._pruned_weights_after(self.steps.total, self.schedule)

    @property
    def steps(self) -> Steps:
        """The times of the schedule in steps."""
        return self.schedule.steps

    @property
    def schedule_step(self) -> int:
        """The place of the next step in the learning-rate schedule; a rewind takes it back too."""
        return self.schedule.place(self.step, self._changed)

    @property
    def final(self) -> bool:
        """Whether the model has reached the sparsity and pattern that the recipe asks for."""
        return self.schedule.is_final(self._changed)

    def first_masks(self) -> dict[str, Tensor]:
        """The masks that the training begins with. What the model computes does not change.

        The target's masks are chosen in any case, so that a mistake shows before the training. If
        the recipe permutes, channels change places first; averages of the model have to be copied
        after that.
        """
        if not self.recipe.pruner:
            return {}
        if self.recipe.permute:
            self._permute()

        target = self.choose()
        if self.schedule.changes_at(0):
            return self.schedule.masks(0, self)
        if self.schedule.starts_sparse:
            return target
        return {name: torch.ones_like(mask) for name, mask in target.items()}

    @torch.no_grad()
    def start(self, first: Mapping[str, Tensor] | None = None) -> None:
        """Prunes the model for the first step.

        first: what `first_masks` returned, if it was called already.
        """
        if not self.masks:
            first = self.first_masks() if first is None else dict(first)
            self._changed = 0 if self.schedule.changes_at(0) else -1
            learns = self.schedule.learns_masks and not self.final

            # Weights stand still while they learn: a reconstruction only chooses their first masks
            dense = copy.deepcopy(self.model.state_dict()) if learns else {}
            self.masks.replace(self._reconstruct(first))
            if learns:
                self.model.load_state_dict(dense)

        self._pruned_weights = self._pruned_weights_after(self._changed, self.schedule)
        self._pruned_weights.start()
        self._followers.mask_averages()

    def attach(self, optimizer: torch.optim.Optimizer, averages: Iterable[nn.Module] = ()) -> None:
        """Names the optimizer and the averages, which follow the masks.

        Args:
            optimizer: over parameters of the model.
            averages: modules with the model's parameter names, such as moving averages of it, on
                any device.
        """
        self._followers.attach(optimizer, averages)
        self._followers.mask_averages()

    # ---- the three calls of a training step ----

    @torch.no_grad()
    def begin_step(self) -> None:
        """Before the first forward pass of an optimizer step."""
        if self.step == self.steps.rewind and not self._rewind:
            self._rewind = on_cpu(self.model.state_dict())
            self._rewind_averages = self._followers.copy_averages()
        self._pruned_weights.begin_step(self.step)

    @torch.no_grad()
    def end_backward(self, scale: float | Tensor = 1.0) -> None:
        """When the gradients of a step are complete; before they are unscaled and clipped.

        scale: what the loss was multiplied by: a number, or a tensor of one element on the
            gradients' device.
        """
        self._due = self.step > 0 and (self._late or self.schedule.changes_at(self.step))
        if self._due:
            self._late = not self._gradients_are_finite()
            self._due = not self._late
        # The gradients are still dense here
        if self._due and self.schedule.looks_at_gradients:
            self._pending = self.schedule.masks(self.step, self)

        self._pruned_weights.end_backward(scale)

    @torch.no_grad()
    def end_step(self) -> None:
        """After the optimizer's step, made or skipped; before averages are updated."""
        self._pruned_weights.end_step(masks_change=self._due)
        if self._due:
            self._change()
        self.step += 1

    # ---- what schedules ask for ----

    def choose(
        self, scale: Callable[[float], float] | None = None, among_kept: bool = False
    ) -> dict[str, Tensor]:
        """The masks of the recipe, for the weights as they are.

        Args:
            scale: from a target sparsity to the sparsity to choose by.
            among_kept: pruned weights stay pruned.
        """
        request = self._request(scale)
        if among_kept:
            request["among"] = self.masks

        def compute() -> dict[str, Tensor]:
            return compute_masks(self.model, **request)

        if self.recipe.needs or not self._gather:
            return self._shared_masks(compute)
        masks = compute()
        self._expect_same_everywhere(masks)
        return masks

    def dense(self) -> dict[str, Tensor]:
        """Masks that keep every weight."""
        return {name: torch.ones_like(mask) for name, mask in self.masks.items()}

    def learned(self) -> dict[str, Tensor]:
        """The learned masks; those of the recipe if the training is too short to learn any."""
        if not self._pruned_weights.learns:
            return self.choose()
        return self._shared_masks(lambda: {**self.masks, **self._pruned_weights.learned_masks()})

    def regrow(self, share: float, growth: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
        """Masks for which each layer has dropped a share of its weights and grown as many.

        Args:
            share: of the kept weights, rounded down.
            growth: from a weight and the number of its layer to how much each of its elements
                deserves to grow.
        """

        def compute():
            new = {}
            kept = self.masks.kept()
            for layer, (name, mask) in enumerate(self.masks.items()):
                weight = self._parameters[name]
                if weight.grad is not None:
                    count = int(share * kept[name])
                    new[name] = regrow(weight, mask, growth(weight, layer), count, kept[name])
            return new

        return self._shared_masks(compute)

    # ---- saving and loading ----

    def state_dict(self) -> dict:
        """All that a resumed run needs, between two steps, for `torch.load(weights_only=True)`.

        Only the masks are copies; other tensors are this object's own, as in torch. Every process
        may call it.
        """
        return {
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
            "steps": asdict(self.steps),
            "step": self.step,
            "changed": self._changed,
            "late": self._late,
            "masks": self.masks.state_dict(),
            **self._pruned_weights.state_dict(),
            "rewind": dict(self._rewind),
            "rewind_averages": [dict(state) for state in self._rewind_averages],
        }

    @torch.no_grad()
    def load_state_dict(self, untrusted) -> None:
        """Resumes where `state_dict` was called, instead of `start`; weights are loaded already.

        The schedule keeps its saved steps, even if an epoch of this run has another number of them.

        Raises:
            PruningError: a state that is damaged, of another model or of another recipe; nothing is
                changed then.
        """
        # Read and check everything first
        state = SavedPruning(untrusted)
        recipe = state.recipe()
        self._check_same_recipe(recipe)
        step, changed, late = state.progress()
        schedule = self._scheduled(state.steps(recipe))
        masks = state.masks()
        self._check_same_weights(masks)
        pruned_weights = self._pruned_weights_after(changed, schedule)
        pruned_weights.load(state, masks)
        rewound = schedule.steps.rewind is not None and schedule.steps.rewind < step
        expected = self.model.state_dict() if rewound else {}
        rewind = state.tensors("rewind", expected)
        averages = state.averages("rewind_averages", expected)

        # From here on nothing can fail
        self.schedule = schedule
        self.step = step
        self._changed = changed
        self._late = late
        self._due = False
        self._pending = None
        self._rewind = on_cpu(rewind)
        self._rewind_averages = [on_cpu(average) for average in averages]

        self.masks.replace(masks)
        self.masks.apply()
        self._pruned_weights = pruned_weights
        self._followers.mask_averages()

    # ---- helpers, not exported ----

    def _scheduled(self, steps: Steps) -> Schedule:
        return self.recipe.schedule(steps)

    def _pruned_weights_after(self, changed: int, schedule: Schedule) -> ZeroWeights:
        """What treats the pruned weights after a change of the masks at step `changed`."""
        sizes = {name: getattr(self._pattern(name), "m", None) for name in self._shapes}
        return schedule.pruned_weights(changed)(
            self._parameters,
            self.masks,
            schedule,
            self._followers,
            {name: m for name, m in sizes.items() if m},
        )

    def _change(self) -> None:
        """Makes the change of the masks that is due."""
        new = self._pending
        if new is None:
            new = self._reconstruct(self.schedule.masks(self.step, self))
        # Otherwise masks were chosen early: weights have grown from zero, and nothing compensates

        if self._rewind:
            self.model.load_state_dict(self._rewind)
            self._followers.load_averages(self._rewind_averages)
            self._followers.forget()
        self._pruned_weights = self._pruned_weights.change(new)
        self._followers.mask_averages()

        self._changed = self.step
        self._due = False
        self._pending = None

    def _check_same_recipe(self, saved: Recipe) -> None:
        if differences := self.recipe.differences(saved):
            raise PruningError(
                f"the saved run has {saved.in_words()}, this one {self.recipe.in_words()}: "
                f"{', '.join(differences)} differ"
            )

    def _check_same_weights(self, saved: Mapping[str, Tensor]) -> None:
        self.masks.check(saved)
        expected = self.masks or (self._shapes if self.recipe.pruner else {})
        # Structured patterns mask other parameters as well
        if saved.keys() <= expected.keys():
            for name in expected:
                if name not in saved:
                    raise PruningError(f"mask {name!r} is missing from the saved masks")

    def _gradients_are_finite(self) -> bool:
        finite = are_finite(self._parameters)
        return self._shared(lambda: bool(finite))

    def _shared(self, compute: Callable):
        return self._share(compute) if self._share else compute()

    def _shared_masks(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The masks that `compute` returns on the first process, which travel as bits."""
        if not self._share:
            return compute()

        def as_bits() -> dict[str, tuple[Tensor, list[int]]]:
            return {name: (packed(mask), list(mask.shape)) for name, mask in compute().items()}

        return {name: unpacked(*entry) for name, entry in self._share(as_bits).items()}

    def _expect_same_everywhere(self, masks: dict[str, Tensor]) -> None:
        """Compares the masks of all processes, which each has computed from its weights.

        Raises:
            PruningError: on all processes, if they differ.
        """
        assert self._gather is not None
        found = self._gather(checksums(masks))
        for name, *sums in zip(masks, *found, strict=True):
            if len(set(sums)) > 1:
                other = next(rank for rank, value in enumerate(sums) if value != sums[0])
                raise PruningError(
                    f"{name}: processes 0 and {other} choose different masks, so their weights "
                    "differ; expected the same weights on all processes"
                )

    def _request(self, scale: Callable[[float], float] | None = None) -> dict:
        """The arguments of `compute_masks`, with statistics of the model as it is."""
        request = self.recipe.request(self._shapes, self._levels, scale)
        if self.recipe.score != "magnitude":
            request["seed"] = self.recipe.seed
        if self.recipe.needs and self._statistics:
            request["statistics"] = self._statistics(self.recipe.needs)
        if self.recipe.reconstruct != NONE:
            request["reconstructed"] = True
        return request

    def _permute(self) -> None:
        """Reorders channels so that the masks of the recipe keep more score.

        The masks have to be chosen anew after that.
        """
        request = self._request()

        def orders() -> dict[str, Tensor]:
            masks = compute_masks(self.model, **request)
            scores = Scores(
                prunable_weights(self.model),
                self.recipe.method("score"),
                statistics=request.get("statistics"),
                seed=self.recipe.seed,
            )
            return best_orders(self.model, scores, masks, self._pattern)

        reorder(self.model, self._shared(orders))
        self._followers.renew_averages()

    def _reconstruct(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prunes the weights as the recipe's reconstruction does; returns the masks that it leaves.

        Learned masks stay as they are.
        """
        if self.recipe.reconstruct == NONE or all(mask.all() for mask in masks.values()):
            return masks
        if self._walk is None:
            raise PruningError(
                f"reconstruct {name_of(self.recipe.reconstruct)} looks at data: expected a walk "
                "over the layers"
            )

        def no_pattern(name: str) -> None:
            return None

        masks = reconstruct_layers(
            self.model,
            masks,
            self.recipe.method("reconstruct"),
            self._walk,
            patterns=no_pattern if self._pruned_weights.learns else self._pattern,
            processes=self._processes,
        )
        self._followers.renew_averages()
        return masks

    def _pattern(self, name: str) -> Pattern | None:
        """The pattern by which a layer chooses its mask anew; None if it stays."""
        level = self._levels.get(name)
        if isinstance(level, tuple):
            n, m = level
            return parse_pattern(f"{n}:{m}")
        if isinstance(level, BlockLevel):
            return level.pattern
        pattern = parse_pattern(self.recipe.pattern)
        stays = self.recipe.shrinks(name) or pattern.misfit(name, self._shapes[name])
        return None if stays else pattern
