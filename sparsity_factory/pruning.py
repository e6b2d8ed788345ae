"""`prune`: prunes and reconstructs a model in one call."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike

from torch import Tensor, nn

from .batches import Forward
from .custom_yaml import read_yaml
from .layer_walk import walk_layers
from .masks import Layers, layer_name, prunable_weights
from .recipe import Recipe
from .sparsifier import Sparsifier
from .statistics import collect_statistics


def prune(
    model: nn.Module,
    pruner: str | Callable,
    sparsity: float | None = None,
    custom_config: str | PathLike | Mapping | None = None,
    score: str | Callable = "magnitude",
    *,
    pattern: str = "unstructured",
    batches: Sequence,
    loss: Callable | None = None,
    reconstruct: str | Callable = "obs",
    method_options: Mapping[str, float] | None = None,
    seed: int = 0,
    permute: bool = False,
    layers: Layers | None = None,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Prunes a model in place, and lets the kept weights compensate for the pruned ones.

    The choices are those of `compute_masks`. Layers are pruned in the order in which they compute,
    each with the inputs that the model, pruned so far, gives it.

    Args:
        batches: calibration images, or images and targets, each time it is iterated over: a list,
            a loader.
        loss: from outputs and targets to the mean loss, for scores that need gradients.
        reconstruct: a name in `RECONSTRUCTIONS`, or such a function.
        method_options: numbers of the chosen methods, such as `{"obs.columns": 128}`.
        permute: reorder inputs of layers first, so that groups of n:m keep more.
        layers: which layers are prunable, as in `prunable_weights`. The model remembers them.
        forward: for batches of another form, as in `collect_statistics`.

    Returns:
        Parameter name to bool mask, for `Masks(model, masks)`.

    Raises:
        PruningError: what `compute_masks` refuses, an unknown reconstruction, no batches, or a
            layer that does not run.
    """
    if isinstance(custom_config, str | PathLike):
        config = read_yaml(str(custom_config))
    else:
        config = custom_config
    if callable(layers):
        layers = [layer_name(name) for name in prunable_weights(model, layers)]
    recipe = Recipe(
        pruner,
        sparsity,
        config,
        score,
        pattern,
        permute=permute,
        reconstruct=reconstruct,
        method_options=method_options,
        layers=layers,
        seed=seed,
    )

    # One-shot: a training of one step, of which only the start happens
    sparsifier = Sparsifier(
        model,
        recipe,
        total_steps=1,
        epoch_steps=1,
        statistics=lambda needs: collect_statistics(model, batches, loss, needs, forward=forward),
        walk=lambda dense: walk_layers(model, batches, other=dense, forward=forward),
    )
    sparsifier.start()
    return dict(sparsifier.masks)
