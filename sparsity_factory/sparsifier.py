"""`Sparsifier`: a recipe at work on a model that trains."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike

import torch
from torch import Tensor, nn

from .checkpoint import VERSION, SavedPruning
from .custom_yaml import read_yaml
from .errors import PruningError
from .layer_walk import visit_layers
from .learned_masks import MaskLearner
from .masks import Change, Masks, bits, pack, prunable_weights, select, unpack
from .patterns import Pattern, parse_pattern, regrow
from .permutation import best_orders, reorder
from .pruners import compute_masks
from .recipe import Recipe
from .reconstruction import NONE, reconstruct_layers
from .schedules import SCHEDULES, Steps
from .scores import SCORES, Scores
from .statistics import collect_statistics


class Sparsifier:
    """Chooses the masks of a model by a recipe, keeps them, and changes them when the schedule says
    so.

        sparsifier = Sparsifier(model, recipe, total_steps=1000, epoch_steps=100)
        sparsifier.start()                                   # or load_state_dict, to go on
        sparsifier.attach(optimizer, [average])
        for every step of the training:
            sparsifier.begin_step()
            loss.backward()
            sparsifier.end_backward()                        # before gradients are unscaled and
            clipped optimizer.step()
            sparsifier.end_step()                            # before an average of the weights is
            updated

    Between steps the model has its plain parameters, with the pruned ones at zero, whatever the
    schedule: that is what is evaluated, averaged and saved. A dense recipe does nothing.

    What all schedules keep:

    - Weights that grow start at zero, and so does the optimizer's state of those that are dropped
      or grown, wherever it has a value for each weight. (`ste` and `sr-ste` train pruned weights
      all along: their state and values stay.)
    - A change due at a step whose gradients are not all finite is made at the next step where they
      are. Only steps with a change look, since looking waits for the device.
    - A change is a function of the seed, the step, the weights and their gradients, so that a
      resumed run goes on to the bit. What the first process chooses, all have.
    - Weights without a gradient neither drop nor grow by `set` and `rigl`.
    - Optimizers see the gradients of the kept weights alone. Muon and its kin see whole ones: they
      give all singular values of a gradient one size, and most of those of a gradient with holes
      are noise.
    - Whenever masks are chosen by the recipe, its reconstruction changes the weights and, where it
      chooses itself, the masks. Averages of the weights begin anew from there.
    - A rewind takes all parameters and buffers back, and clears the optimizer's state, as a
      training that begins at that epoch does.

    Args:
        model: on its device, without DDP's wrapper. It is changed by `start` and, if masks are
        given, at once.
        recipe: checked here.
        total_steps, epoch_steps: optimizer steps of the whole training, and of an epoch.
        masks: those that the model was pruned with already; then `start` chooses none.
        statistics: called on every process with what a score needs to know, returns a `Statistics`.
        walk: called on every process where the recipe reconstructs, with what `visit_layers` calls
        for each weight.
        share: calls a function on the first process and returns on all what it returned, which is
            made of plain containers, numbers and tensors on the CPU. Without it, each process calls
            it.

    Attributes:
        masks: the `Masks` of the moment, the same object for the whole run.
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
    ):
        recipe.check()
        self.model = model
        self.recipe = recipe
        self._statistics = statistics
        self._walk = walk
        self._share = share
        self._shapes = {
            name: tuple(weight.shape) for name, weight in prunable_weights(model).items()
        }
        self._levels = recipe.levels(self._shapes)
        self._parameters = dict(model.named_parameters())
        self._optimizer = None
        self._averages = ()
        self._orthogonalizes = False
        self._plan(recipe.steps(total_steps, epoch_steps))
        self.masks = Masks(model, masks or {})
        self.step = 0
        self._changed = -1
        self._late = False
        self._due = False
        self._pending = None
        self._learner: MaskLearner | None = None
        self._hidden: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}
        self._rewind: dict[str, Tensor] = {}

    @property
    def final(self) -> bool:
        """Whether the model has reached the sparsity and pattern that the recipe asks for."""
        return self.schedule.is_final(self._changed)

    def first_masks(self) -> dict[str, Tensor]:
        """The masks that the training begins with, without changing what the model computes.

        The target's masks are chosen in any case, so that what is wrong with them shows before the
        training. Where the recipe permutes, channels change places before; copies of the model that
        are averaged later are made after it.
        """
        if not self.recipe.pruner:
            return {}
        if self.recipe.permute:
            self._permute()
        target = self.choose()
        if self.schedule.changes_at(0):
            return self.schedule.masks(0, self)
        return (
            target
            if self.schedule.starts_sparse
            else {name: torch.ones_like(mask) for name, mask in target.items()}
        )

    @torch.no_grad()
    def start(self, first: Mapping[str, Tensor] | None = None) -> None:
        """Prunes the model for the first step. `first`: what `first_masks` returned, where it was
        called already.
        """
        if not self.masks:
            first = self.first_masks() if first is None else first
            self._changed = 0 if self.schedule.changes_at(0) else -1
            dense = copy.deepcopy(self.model.state_dict()) if self._learns else {}
            self.masks.update(self._reconstruct(first))
            # What a reconstruction chooses is where the learning begins; the weights stand still
            if dense:
                self.model.load_state_dict(dense)
        if self._learns:
            self._learner = self._new_learner(self.masks)
        self._hide() if self._hides else self.masks.apply()
        self._mask_averages()

    def attach(self, optimizer: torch.optim.Optimizer, averages: Iterable[nn.Module] = ()) -> None:
        """Names what obeys the masks besides the model.

        Args:
            optimizer: over parameters of the model.
            averages: modules with the model's parameter names, such as moving averages of it, on
            any device.
        """
        self._optimizer = optimizer
        self._averages = tuple(averages)
        # Muon and its kin
        self._orthogonalizes = any("ns_steps" in group for group in optimizer.param_groups)
        for average in self._averages:
            self.masks.apply_to(average)

    # ---- the three calls of a training step ----

    def begin_step(self) -> None:
        """Before the first forward pass of an optimizer step."""
        if self.step == self.steps.rewind and not self._rewind:
            state = self.model.state_dict()
            self._rewind = {
                name: value.detach().to("cpu", copy=True) for name, value in state.items()
            }
        if self._learner:
            self._soften()

    @torch.no_grad()
    def end_backward(self, scale: float | Tensor = 1.0) -> None:
        """When the gradients of an optimizer step are complete; before they are unscaled and
        clipped.

        scale: what the loss was multiplied by: a number, or a tensor of one element on the
        gradients' device.
        """
        self._due = self.step > 0 and (self._late or self.schedule.changes_at(self.step))
        if self._due:
            self._late = not self._gradients_are_finite()
            self._due = not self._late
            if self._due and self.schedule.looks_at_gradients:
                self._pending = self.schedule.masks(self.step, self)
        if self._learner:
            self._learner.learn(
                self._frozen, self.recipe.mask_lr, scale, self._largest_gradient().isfinite()
            )
        elif self.schedule.trains_pruned:
            self._decay_hidden(scale)
            self._reveal()
        elif not self._orthogonalizes:
            self.masks.apply_to_grads()

    @torch.no_grad()
    def end_step(self) -> None:
        """After the optimizer's step, made or skipped; before averages are updated."""
        if self._learner:
            self._thaw()
        elif not self.schedule.trains_pruned:
            self.masks.apply()
        if self._due:
            # Grown weights start at zero, and nothing makes up for the dropped ones
            new = self._pending
            if new is None:
                new = self._reconstruct(self.schedule.masks(self.step, self))
            self._change(new)
            self._changed = self.step
            self._due = False
            self._pending = None
        elif self._learner:
            self.masks.update(self._learner.masks())
            self._hide()
            self._renew_averages()
        elif self.schedule.trains_pruned:
            self._hide()
        self.step += 1

    # ---- what schedules ask for ----

    def choose(
        self, scale: Callable[[float], float] | None = None, among_kept: bool = False
    ) -> dict[str, Tensor]:
        """The masks of the recipe, for the weights as they are.

        Args:
            scale: from a target sparsity to the one to choose by.
            among_kept: pruned weights stay pruned. They are zeros with a score of zero, and so are
                chosen last. In an n:m group, whose number must hold, one may come back in the place
                of a kept weight of score zero, and in an n:mt block where the best mask has it.
        """
        request = self._request(scale)
        new = self._shared_masks(lambda: compute_masks(self.model, **request))
        if among_kept:
            grouped = {
                name
                for name in new
                if self.recipe.pattern != "unstructured"
                or isinstance(self._levels.get(name), tuple)
            }
            for name, mask in self.masks.items():
                if name in new and name not in grouped:
                    new[name] = new[name].to(mask.device) & mask
        return new

    def dense(self) -> dict[str, Tensor]:
        """Masks that keep every weight."""
        return {name: torch.ones_like(mask) for name, mask in self.masks.items()}

    def learned(self) -> dict[str, Tensor]:
        """The masks that were learned; those of the recipe where the training is too short to learn
        any.
        """
        learner = self._learner
        return (
            self._shared_masks(lambda: {**self.masks, **learner.masks()})
            if learner
            else self.choose()
        )

    def regrow(self, share: float, growth: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
        """Masks for which each layer has dropped a share of its weights, rounded down, and grown as
        many.

        growth: from a weight and the number of its layer to how much its weights deserve to grow.
        """

        def compute():
            new = {}
            for layer, (name, mask) in enumerate(self.masks.items()):
                weight = self._parameters[name]
                if weight.grad is not None:
                    count = int(share * int(mask.count_nonzero()))
                    new[name] = regrow(weight, mask, growth(weight, layer), count)
            return new

        return self._shared_masks(compute)

    # ---- saving and loading ----

    def state_dict(self) -> dict:
        """All that a resumed run needs, between two steps; `torch.load(..., weights_only=True)`
        reads it.

        Tensors but those of the masks are this object's own, not copies, as torch has it. Every
        process may call it.
        """
        return {
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
            "steps": asdict(self.steps),
            "step": self.step,
            "changed": self._changed,
            "late": self._late,
            "masks": self.masks.state_dict(),
            "hidden": dict(self._hidden),
            **(
                {"learned": {**self._learner.states, "updates": self._learner.updates}}
                if self._learner
                else {}
            ),
            "rewind": dict(self._rewind),
        }

    @torch.no_grad()
    def load_state_dict(self, untrusted) -> None:
        """Goes on where `state_dict` was called, in the place of `start`; the model's weights are
        loaded already.

        The schedule's steps are the saved ones, also where this run has other steps an epoch.

        Raises:
            PruningError: a state that is damaged, of another model or of another recipe; nothing is
            changed then.
        """
        state = SavedPruning(untrusted)
        recipe = state.recipe()
        if differences := self.recipe.differences(recipe):
            raise PruningError(
                f"the saved run is one with {recipe.in_words()}, not {self.recipe.in_words()}: "
                f"{', '.join(differences)} differ"
            )
        step, changed, late = state.progress()
        steps = state.steps(recipe)
        masks = state.masks()
        self.masks.check(masks)
        expected = self.masks or (self._shapes if self.recipe.pruner else {})
        for name in expected:
            # Structured patterns mask other parameters
            if name not in masks and masks.keys() <= expected.keys():
                raise PruningError(f"mask {name!r} is missing from the saved masks")
        learns = self.schedule.learns_masks and not state.is_final(recipe)
        learner = self._new_learner(masks) if learns else None
        learned = (
            state.tensors("learned", {**learner.states, "updates": learner.updates})
            if learner
            else {}
        )
        hides = self.schedule.trains_pruned or learner
        hidden = state.hidden(
            {name: self._parameters[name] for name in masks} if hides else {}, masks
        )
        has_rewind = steps.rewind is not None and steps.rewind < step
        rewind = state.tensors("rewind", self.model.state_dict() if has_rewind else {})

        self._plan(steps)
        self.step = step
        self._changed = changed
        self._late = late
        self.masks.update(masks)
        self.masks.apply()
        self._hidden = {
            name: values.to(self._parameters[name].device, copy=True)
            for name, values in hidden.items()
        }
        self._rewind = {name: values.to("cpu", copy=True) for name, values in rewind.items()}
        self._learner = learner
        for name, values in learned.items():
            (learner.updates if name == "updates" else learner.states[name]).copy_(values)
        self._due = False
        self._pending = None
        self._mask_averages()

    # ---- helpers, not exported ----

    def _plan(self, steps: Steps) -> None:
        self.steps = steps
        self.schedule = SCHEDULES[self.recipe.prune_schedule](self.recipe, steps)

    @property
    def _learns(self) -> bool:
        """Whether the masks are still to be learned."""
        return self.schedule.learns_masks and not self.final

    @property
    def _hides(self) -> bool:
        """Whether pruned weights are kept outside of the model."""
        return self.schedule.trains_pruned or self._learns

    def _largest_gradient(self) -> Tensor:
        gradients = [
            parameter.grad for parameter in self._parameters.values() if parameter.grad is not None
        ]
        return torch.nn.utils.get_total_norm(gradients, math.inf)

    def _gradients_are_finite(self) -> bool:
        largest = self._largest_gradient()
        return self._shared(lambda: bool(largest.isfinite()))

    def _shared(self, compute: Callable):
        return self._share(compute) if self._share else compute()

    def _shared_masks(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Masks travel as bits."""
        return unpack(self._share(lambda: pack(compute()))) if self._share else compute()

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
        """Reorders channels so that the masks of the recipe, which then have to be chosen anew,
        keep more score.
        """
        request = self._request()

        def orders() -> dict[str, Tensor]:
            scores = Scores(
                prunable_weights(self.model),
                SCORES[self.recipe.score],
                statistics=request.get("statistics"),
                seed=self.recipe.seed,
            )
            return best_orders(
                self.model, scores, compute_masks(self.model, **request), self._pattern
            )

        reorder(self.model, self._shared(orders))
        self._renew_averages()

    def _reconstruct(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prunes the weights as the recipe's reconstruction does; the masks that it leaves, or the
        learned ones.
        """
        if self.recipe.reconstruct == NONE or all(mask.all() for mask in masks.values()):
            return masks
        if self._walk is None:
            raise PruningError(
                f"reconstruct {self.recipe.reconstruct} looks at data: expected a walk over the "
                "layers"
            )
        patterns = (lambda name: None) if self._learner else self._pattern
        masks = reconstruct_layers(
            self.model,
            masks,
            self.recipe.reconstruct,
            self._walk,
            patterns=patterns,
            share=self._shared,
        )
        self._renew_averages()
        return masks

    def _pattern(self, name: str) -> Pattern | None:
        """The pattern by which a layer chooses its mask anew; None if layers have to agree."""
        level = self._levels.get(name)
        pattern = parse_pattern(
            "{}:{}".format(*level) if isinstance(level, tuple) else self.recipe.pattern
        )
        return None if pattern.structured else pattern

    def _renew_averages(self) -> None:
        for average in self._averages:
            average.load_state_dict(self.model.state_dict())

    def _change(self, new: Mapping[str, Tensor]) -> None:
        changes = self.masks.update(new)
        if self.schedule.trains_pruned:
            self._hide()
        else:
            if self._rewind:
                self.model.load_state_dict(self._rewind)
                self._optimizer_state().clear()
            self.masks.apply()
            self._clear_state(changes)
        if self._learner:  # from here on the weights are trained, as if the training began
            self._learner = None
            self._hidden = {}
            self._optimizer_state().clear()
            self._renew_averages()
        self._mask_averages()

    def _optimizer_state(self) -> dict[Tensor, dict]:
        optimizer = self._optimizer
        while inner := getattr(optimizer, "_base_optimizer", None):  # timm's Lookahead
            optimizer = inner
        return optimizer.state if optimizer is not None else {}

    def _clear_state(self, changes: Mapping[str, Change]) -> None:
        states = self._optimizer_state()
        for name, change in changes.items():
            weight = self._parameters[name]
            unchanged = change.dropped.logical_or(change.grown).logical_not_()
            for value in states.get(weight, {}).values():
                if (
                    isinstance(value, Tensor)
                    and value.shape == weight.shape
                    and value.is_floating_point()
                ):
                    select(value, unchanged.to(value.device))

    def _mask_averages(self) -> None:
        for average in self._averages:
            self.masks.apply_to(average)

    # Learned masks: in a step all parameters stand still, and `_frozen` has them, the pruned ones
    # too.

    def _new_learner(self, masks: Mapping[str, Tensor]) -> MaskLearner:
        masks = {name: mask.to(self._parameters[name].device) for name, mask in masks.items()}
        # A custom layer may be dense
        sizes = {name: getattr(self._pattern(name), "m", None) for name in masks}
        return MaskLearner(
            self._parameters, masks, {name: m for name, m in sizes.items() if m}, self.recipe.seed
        )

    @torch.no_grad()
    def _soften(self) -> None:
        self._reveal()
        self._frozen = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }
        self._learner.soften(self.step, self.schedule.progress(self.step))

    def _thaw(self) -> None:
        """Takes back what the soft masks and the optimizer have done to the parameters."""
        for name, values in self._frozen.items():
            self._parameters[name].copy_(values)
        self._frozen = {}

    # `ste` and `sr-ste`, and learned masks between steps: the model has the kept weights and
    # `_hidden` the pruned ones, each with zeros elsewhere. What passes from one to the other is
    # added as bit patterns, which is exact.

    def _hide(self) -> None:
        """Takes the pruned weights out of the model."""
        weights = [self._parameters[name].detach() for name in self.masks]
        for name, weight in zip(self.masks, weights, strict=True):
            if name not in self._hidden:
                self._hidden[name] = torch.empty_like(weight)
        hidden = list(self._hidden.values())
        torch._foreach_copy_(hidden, weights)
        self.masks.apply()
        torch._foreach_sub_(
            [bits(values) for values in hidden], [bits(weight) for weight in weights]
        )

    def _reveal(self) -> None:
        """Puts the pruned weights into the model."""
        weights = [self._parameters[name] for name in self._hidden]
        torch._foreach_add_(
            [bits(weight) for weight in weights], [bits(values) for values in self._hidden.values()]
        )

    def _decay_hidden(self, scale: float | Tensor) -> None:
        """Puts the schedule's decay of the pruned weights into their gradients."""
        hidden = list(self._hidden.values())
        weights = [self._parameters[name] for name in self._hidden]
        if self.schedule.decay:
            trained = [
                (weight.grad, values)
                for weight, values in zip(weights, hidden, strict=True)
                if weight.grad is not None
            ]
            for gradient, values in trained:
                if isinstance(scale, Tensor):
                    gradient.addcmul_(values, scale.to(values.dtype), value=self.schedule.decay)
                else:
                    gradient.add_(values, alpha=self.schedule.decay * scale)


def prune(
    model: nn.Module,
    pruner: str,
    sparsity: float | None = None,
    custom_config: str | PathLike | Mapping | None = None,
    score: str = "magnitude",
    *,
    pattern: str = "unstructured",
    batches: Sequence,
    loss: Callable | None = None,
    reconstruct: str = "obs",
    seed: int = 0,
    permute: bool = False,
) -> dict[str, Tensor]:
    """Prunes a model in place, and lets the kept weights of each layer make up for the pruned ones.

    The choices are those of `compute_masks`. Layers are taken in the order in which they compute,
    each with the inputs that the model, pruned so far, gives it.

    Args:
        batches: yields calibration images, or images and targets, whenever it is iterated over: a
        list, a loader.
        loss: from outputs and targets to the mean loss, for scores that need gradients.
        reconstruct: a name in `RECONSTRUCTIONS`.
        permute: reorder inputs of layers first, so that groups of n:m keep more.

    Returns:
        Parameter name to bool mask, for `Masks(model, masks)`.

    Raises:
        PruningError: what `compute_masks` refuses, an unknown reconstruction, no batches, or a
        layer that does not run.
    """
    if isinstance(custom_config, str | PathLike):
        custom_config = read_yaml(custom_config)
    recipe = Recipe(
        pruner,
        sparsity,
        custom_config,
        score,
        pattern,
        permute=permute,
        reconstruct=reconstruct,
        seed=seed,
    )
    sparsifier = Sparsifier(
        model,
        recipe,
        total_steps=1,
        epoch_steps=1,
        statistics=lambda needs: collect_statistics(model, batches, loss, needs),
        walk=lambda visit, beside: visit_layers(model, batches, visit, beside=beside),
    )
    sparsifier.start()
    return dict(sparsifier.masks)
