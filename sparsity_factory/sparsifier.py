"""`Sparsifier`: a recipe at work on a model that trains."""

from .masks import Masks
from .pruners import compute_masks
from .recipe import Recipe


class Sparsifier:
    """Chooses the masks that a recipe asks for and keeps the model sparse while it trains."""

    def __init__(self, model, recipe=None, *, masks=None, share=None):
        self.model, self.recipe, self._share = model, recipe or Recipe(), share or (lambda compute: compute())
        self.started = masks is not None or self.recipe.pruner is None
        self.masks = Masks(model, masks or {})
        self._averages = ()

    def attach(self, optimizer, averages=()):
        self._averages = averages

    def start(self):
        def choose():
            recipe = self.recipe
            masks = compute_masks(self.model, recipe.pruner, recipe.sparsity, recipe.custom_config)
            return {name: mask.cpu() for name, mask in masks.items()}

        self.masks = Masks(self.model, self._share(choose))
        self.started = True
        for average in self._averages:
            Masks(average, self.masks.masks)

    def begin_step(self):
        pass

    def end_backward(self):
        self.masks.apply_to_grads()

    def end_step(self):
        self.masks.apply()
