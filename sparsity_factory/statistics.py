"""What scores, allocations and reconstruction need to know of the data: sums over calibration
images, in one pass.

More passes, each for some of the layers, are made where the sums would take too much memory at
once.

A weight's inputs are seen where a linear function is computed with it, not where its layer is
called, since some architectures use a layer's weight without calling the layer.

Each batch gives its part in float32 (float64 for a model in it), and the parts are added up in
float64. Sums of numbers of 24 bits that lie within a factor of 2**29 of each other are exact in the
53 bits of float64, so the order of the batches, and how they are shared out among processes, change
the sums in their last bits at most. That costs 8 bytes a weight for each of `gradient` and
`squared_gradient`: 0.7 GB on DeiT-Base. Sums in float32, of half the size, would round differently
in every order. `removal_costs` takes 1,536 bytes a weight for as long as it is summed.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import PruningError
from .masks import prunable_weights
from .removal_costs import blocks_of, cut, removal_costs

# x: the inputs of the layer over all tokens of all images; g: the gradient of the mean loss over
# all images.
STATISTICS = {
    "input_norms": "norm2(x_j) of each input j",
    "gram": "X^T X of the inputs",
    "gradient_gram": "the sum over images of the mean over tokens of G^T G, G the gradient at the "
    "outputs of its loss",
    "gradient": "g, over all images",
    "first_gradient": "g of the first batch alone",
    "squared_gradient": "the mean over batches of their squared gradients",
    "removal_costs": "what removing the weights of a block one by one costs, by the gradients of "
    "single images",
}
# What the gradients at the outputs give
OF_OUTPUTS = frozenset({"gradient_gram", "removal_costs"})
OF_INPUTS = frozenset({"input_norms", "gram"}) | OF_OUTPUTS
OF_GRADIENTS = frozenset(STATISTICS) - {"input_norms", "gram"}
# only: they take memory for many numbers a weight
BY_REQUEST = frozenset({"gram"}) | OF_OUTPUTS
MEMORY = 4 * 2**30  # bytes of sums that one pass may hold
GRAM_COLUMNS = 384  # of a part of a Gram matrix


class Statistics:
    """Sums over calibration images for each prunable weight of a model.

    Several processes, each with a share of the batches, add theirs up and then check:

        statistics = collect_statistics(model, batches_of_this_process, loss, needs, share=rank)
        for total in statistics.state_dict().values():
            torch.distributed.all_reduce(total)
        statistics.check()

    Attributes:
        needs: the names in `STATISTICS` that were collected.
        shapes: the shape of each weight by parameter name.
    """

    def __init__(self, weights: dict[str, Tensor], needs: Iterable[str]):
        self.needs = frozenset(needs)
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self._weights = weights
        self._costs = {}
        device = next(iter(weights.values())).device
        # In the first row images, batches, and images of the first batch; then for each weight the
        # batches in which its inputs were seen, and those in which it had a gradient.
        self._counts = torch.zeros(len(weights) + 1, 3, dtype=torch.int64, device=device)
        self._sums = {
            name: {
                need: torch.zeros(_shape(need, weight), dtype=torch.float64, device=weight.device)
                for need in STATISTICS
                if need in self.needs
            }
            for name, weight in weights.items()
        }

    @property
    def images(self) -> int:
        """The number of images that were looked at."""
        return int(self._counts[0, 0])

    def value(self, name: str, need: str) -> Tensor:
        """One of the `STATISTICS` of a weight, float64, on the device where it was collected.

        The removal costs are those of the weight as it is when they are first asked for. The sums
        that they are computed from, which are large, are let go then.

        Raises:
            PruningError: it was not collected, or not of this weight.
        """
        if name not in self._sums:
            raise PruningError(f"{name} is not among the weights of the statistics")
        if need not in self.needs:
            raise PruningError(
                f"the statistics lack {need}: they hold "
                f"{', '.join(sorted(self.needs)) or 'nothing'}"
            )
        if need == "removal_costs":
            if name not in self._costs:
                fisher = self._sums[name].pop(need) / self.images
                self._costs[name] = removal_costs(self._weights[name], fisher)
            return self._costs[name]
        total = self._sums[name][need]
        if need == "input_norms":
            return total.sqrt()
        if need in ("gram", "gradient_gram"):
            return total
        images, batches, images_of_first = self._counts[0].tolist()
        return (
            total
            / {"gradient": images, "squared_gradient": batches, "first_gradient": images_of_first}[
                need
            ]
        )

    def add(self, other: "Statistics") -> None:
        """Adds what another share of the batches of the same model gave.

        Raises:
            PruningError: the other holds other statistics, or those of other weights, or either has
            let sums go.
        """
        if self._costs or other._costs:
            raise PruningError(
                "statistics can only be added before their removal costs are looked at"
            )
        if self.needs != other.needs or self.shapes != other.shapes:
            raise PruningError(
                "statistics can only be added to the same statistics of the same weights"
            )
        for total, part in zip(
            self.state_dict().values(), other.state_dict().values(), strict=True
        ):
            total += part.to(total.device)

    def state_dict(self) -> dict[str, Tensor]:
        """All sums and counts, in one order on all processes: the tensors themselves, for an
        all-reduce in place.
        """
        return {"counts": self._counts} | {
            f"{name}.{need}": total
            for name, totals in self._sums.items()
            for need, total in totals.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replaces sums and counts by those of a `state_dict` of the same statistics of the same
        weights.
        """
        for key, total in self.state_dict().items():
            total.copy_(state[key])

    def check(self) -> None:
        """Makes sure that the sums tell something of every weight.

        Raises:
            PruningError: no images, a first batch that no share had, and, naming the weight, one
                that no image reached or whose sums are not finite.
        """
        (images, _, first), *seen = self._counts.tolist()
        if not images:
            raise PruningError("no calibration images: expected at least one batch")
        if "first_gradient" in self.needs and not first:
            raise PruningError(
                "no share has the first batch of calibration images: expected one with share 0"
            )
        for name, (_, with_inputs, with_gradient) in zip(self.shapes, seen, strict=True):
            if self.needs & OF_INPUTS and not with_inputs:
                raise PruningError(
                    f"{name} was used on none of the calibration images: expected a layer that runs"
                )
            if self.needs & OF_GRADIENTS and not with_gradient:
                raise PruningError(
                    f"{name} has no gradient on any of the calibration images: expected a layer "
                    "that the loss depends on"
                )
            for need, total in self._sums[name].items():
                if not total.isfinite().all():
                    raise PruningError(
                        f"{name} has NaN or infinity in its {need} over the calibration images"
                    )

    @classmethod
    def _joined(cls, parts: list["Statistics"]) -> "Statistics":
        """Those of several groups of weights over the same images, as one; the first takes what the
        others hold.
        """
        whole, *others = parts
        for part in others:
            for ours, theirs in (
                (whole.shapes, part.shapes),
                (whole._weights, part._weights),
                (whole._sums, part._sums),
                (whole._costs, part._costs),
            ):
                ours.update(theirs)
        whole._counts = torch.cat([whole._counts, *(part._counts[1:] for part in others)])
        return whole


def collect_statistics(
    model: nn.Module,
    batches: Iterable,
    loss: Callable | None = None,
    needs: Iterable[str] | None = None,
    *,
    share: int | None = None,
    add_up: Callable[[Tensor], object] | None = None,
    memory: int = MEMORY,
) -> Statistics:
    """Looks at calibration images, and returns sums over them for each prunable weight.

    The model runs in evaluation mode, and is left as it was: modes of its modules, `requires_grad`,
    gradients. Where no gradients are asked for, there is no backward pass; autocast around the call
    holds for the model, not for the sums. Frozen weights have gradients all the same.

    Args:
        model: a module whose call takes a batch of images.
        batches: yields images, or pairs of images and targets; they are brought to the model's
            device. Read once, or once for each group of layers whose sums fit into the memory; an
            iterator is read once whatever they take.
        loss: from the model's outputs and the targets to the mean loss over the batch; where
        gradients are asked for.
        needs: names in `STATISTICS`; without, all that batches and loss allow but `gram`,
            `gradient_gram` and `removal_costs`.
        share: the number of this share, where the batches are shared out whole among several
            processes. Share 0 has the first batch. Without `add_up` there is one pass and nothing
            is checked: add the shares up, and call `Statistics.check`.
        add_up: called on every process with the same sums in the same order, adds those of all in
            place, as `torch.distributed.all_reduce` does.
        memory: how many bytes the sums of one pass may take; a pass has one layer at least.

    Raises:
        PruningError: an unknown name, no batches, no loss or targets where gradients are asked for,
            and, naming the weight, one that no image reached or whose sums are not finite.
    """
    weights = prunable_weights(model)
    if not weights:
        raise PruningError(
            f"{type(model).__name__} has no prunable weights: no nn.Linear besides the classifier"
        )
    stream = iter(batches)
    first = next(stream, None)
    needs = _checked_needs(needs, loss, first)
    in_one_pass = stream is batches or (share is not None and add_up is None)
    stream = chain([] if first is None else [first], stream)
    groups = _groups(weights, needs, math.inf if in_one_pass else memory)
    found = []
    for group in groups:
        statistics = Statistics(group, needs)
        with evaluation(model), _with_gradients(group) if needs & OF_GRADIENTS else torch.no_grad():
            for index, batch in enumerate(batches if found else stream):
                _look(model, group, batch, loss, statistics, is_first=index == 0 and not share)
        if add_up:
            for total in statistics.state_dict().values():
                add_up(total)
        if share is None or add_up:
            statistics.check()
        if len(groups) > 1 and "removal_costs" in needs:
            for name in group:
                # Which makes room for the next group
                statistics.value(name, "removal_costs")
        found.append(statistics)
    return Statistics._joined(found)


# ---- shared with layer_walk.py ----


def images_of(batch) -> Tensor:
    """The images of a batch, which may have targets as well."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def linear_operands(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Inputs and weight of a call of `F.linear`."""
    return (*args, kwargs.get("weight"))[:2] if args else (kwargs["input"], kwargs["weight"])


def add_gram(total: Tensor, inputs: Tensor) -> None:
    """Adds X^T X of inputs X (tokens, inputs) to `total`; of the symmetric product only a half is
    computed.
    """
    columns = inputs.split(GRAM_COLUMNS, 1)
    for row, left in enumerate(columns):
        for column, right in enumerate(columns[row:], row):
            part = left.T @ right
            place = total[row * GRAM_COLUMNS :, column * GRAM_COLUMNS :][
                : part.shape[0], : part.shape[1]
            ]
            place += part
            if column > row:
                total[column * GRAM_COLUMNS :, row * GRAM_COLUMNS :][
                    : part.shape[1], : part.shape[0]
                ] += part.T


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; then each module's own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


# ---- helpers, not exported ----


def _shape(need: str, weight: Tensor) -> tuple[int, ...]:
    outputs, inputs = weight.shape
    blocks, size = blocks_of(weight.numel())
    shapes = {
        "input_norms": (inputs,),
        "gram": (inputs, inputs),
        "gradient_gram": (outputs, outputs),
        "removal_costs": (blocks, size, size),
    }
    return shapes.get(need, tuple(weight.shape))


def _groups(
    weights: dict[str, Tensor], needs: frozenset[str], memory: float
) -> list[dict[str, Tensor]]:
    """The weights in groups of consecutive ones whose sums fit into the memory; at least one in
    each.
    """
    groups, left = [{}], memory
    for name, weight in weights.items():
        size = 8 * sum(math.prod(_shape(need, weight)) for need in needs)
        if size > left and groups[-1]:
            groups.append({})
            left = memory
        groups[-1][name] = weight
        left -= size
    return groups


def _checked_needs(needs: Iterable[str] | None, loss: Callable | None, first) -> frozenset[str]:
    has_targets = isinstance(first, tuple | list) and len(first) > 1
    if needs is None:
        return (
            frozenset(STATISTICS)
            - BY_REQUEST
            - (frozenset() if loss and has_targets else OF_GRADIENTS)
        )
    needs = frozenset(needs)
    for need in sorted(needs - STATISTICS.keys()):
        raise PruningError(f"unknown statistics {need!r}: expected some of {', '.join(STATISTICS)}")
    for need in sorted(needs & OF_GRADIENTS):
        if loss is None:
            raise PruningError(f"{need} needs a loss: expected a function of outputs and targets")
        if first is not None and not has_targets:
            raise PruningError(f"{need} needs targets: expected batches of images and targets")
    return needs


def _look(
    model: nn.Module, weights: dict, batch, loss: Callable, statistics: Statistics, is_first: bool
) -> None:
    """Adds the sums of one batch. Nothing here waits for a GPU."""
    images = images_of(batch)
    targets = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    device = next(iter(weights.values())).device
    images = images.to(device, non_blocking=True)
    seen = _Inputs(weights, statistics, len(images))
    with seen if statistics.needs & OF_INPUTS else nullcontext():
        outputs = model.forward(images)  # not by a call, which may be a compiled one
    counts = statistics._counts
    for column, count in enumerate((len(images), 1, len(images) * is_first)):
        counts[0, column] += count
    if not statistics.needs & OF_GRADIENTS:
        return
    targets = targets.to(device, non_blocking=True)
    # autograd.grad leaves .grad alone, and computes no gradients of what cannot be pruned.
    gradients = torch.autograd.grad(
        loss(outputs, targets), list(weights.values()), allow_unused=True
    )
    for index, (name, gradient) in enumerate(zip(weights, gradients, strict=True), start=1):
        if gradient is None:
            continue
        counts[index, 2] += 1
        gradient = at_least_float32(gradient)
        parts = {
            "gradient": (gradient, len(images)),
            "first_gradient": (gradient, len(images) * is_first),
        }
        if "squared_gradient" in statistics.needs:
            parts["squared_gradient"] = (gradient.square(), 1)
        for need, total in statistics._sums[name].items():
            part, times = parts.get(need, (None, 0))
            if times:
                total.add_(part, alpha=times)
    for name, of_images in seen.gradients.items():
        # Blocks, images, size
        by_block = cut(of_images.double() * len(images)).transpose(0, 1)
        statistics._sums[name]["removal_costs"].baddbmm_(by_block.mT, by_block)


class _Inputs(TorchFunctionMode):
    """Adds up what every linear function with a prunable weight is given.

    Attributes:
        gradients: where single images matter, after the backward pass, for each weight the gradient
            of the batch's loss by what it does for each image: shape (images, outputs, inputs).
    """

    def __init__(self, weights: dict[str, Tensor], statistics: Statistics, images: int):
        super().__init__()
        self.gradients: dict[str, Tensor] = {}
        self._images = images
        self._names = {id(weight): name for name, weight in weights.items()}
        self._rows = {name: row for row, name in enumerate(weights, start=1)}
        self._statistics = statistics
        self._seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = None
        if func is F.linear:
            inputs, weight = linear_operands(args, kwargs)
            if name := self._names.get(id(weight)):
                self._add(name, inputs.detach())
        outputs = func(*args, **kwargs)
        if name and self._statistics.needs & OF_OUTPUTS and outputs.requires_grad:
            of_images = "removal_costs" in self._statistics.needs
            if of_images and (inputs.dim() == 1 or len(inputs) % self._images):
                raise PruningError(
                    f"{name} is given inputs of shape {list(inputs.shape)} for {self._images} "
                    "images: removal_costs expects those of an image together along the first "
                    "dimension"
                )
            # No view: a change of it in place leaves the hook where it is
            outputs = outputs.clone()
            outputs.register_hook(partial(self._add_gradients, name, inputs.detach()))
        return outputs

    @torch.no_grad()
    def _add_gradients(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        totals = self._statistics._sums[name]
        with torch.autocast(inputs.device.type, enabled=False):
            if "gradient_gram" in totals:  # the batch's loss is the mean over its images
                rows = at_least_float32(gradient.reshape(-1, gradient.shape[-1]))
                add_gram(
                    totals["gradient_gram"],
                    rows * (self._images * (self._images / len(rows)) ** 0.5),
                )
            if "removal_costs" not in totals:
                return
            x, dy = (
                at_least_float32(rows.reshape(self._images, -1, rows.shape[-1]))
                for rows in (inputs, gradient)
            )
            self.gradients[name] = self.gradients.get(name, 0) + dy.mT @ x

    @torch.no_grad()
    def _add(self, name: str, inputs: Tensor) -> None:
        if name not in self._seen:
            self._seen.add(name)
            self._statistics._counts[self._rows[name], 1] += 1
        totals = self._statistics._sums[name]
        with torch.autocast(inputs.device.type, enabled=False):
            inputs = at_least_float32(inputs.flatten(0, -2) if inputs.dim() > 1 else inputs[None])
            if "input_norms" in totals:
                totals["input_norms"] += inputs.square().sum(0)
            if "gram" in totals:
                add_gram(totals["gram"], inputs)


@contextmanager
def _with_gradients(weights: dict[str, Tensor]) -> Iterator[None]:
    """Gradients of the weights, frozen ones included; then each as it was."""
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
