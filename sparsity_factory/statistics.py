"""Sums over calibration images, for scores, allocations and reconstruction.

One pass over the images collects all sums. If those that a pass can free would take too much memory
at once, there are more passes, each for some of the layers: the sums for `removal_costs` become
costs, which are small, and on a GPU all others move to the CPU.

Each batch gives its part in float32 (float64 for a model in it), and the parts are added up in
float64. Sums of numbers of 24 bits that lie within a factor of 2**29 of each other are exact in the
53 bits of float64. So the order of the batches, and how they are shared out among processes, change
at most the last bits of the sums. That costs 8 bytes a weight for each of `gradient` and
`squared_gradient`: 0.7 GB on DeiT-Base. Sums in float32, of half the size, would round differently
in every order. Those for `removal_costs` do: they are too large for float64, and take 386 bytes a
weight as the halves of symmetric matrices. In a Gram matrix, the products of a batch are in float32
about its mean, and those of the mean in float64.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from .batches import Forward, compute, first_image, image_count, inputs_of, targets_of, targets_on
from .errors import PruningError
from .linear_calls import LinearCalls
from .masks import Layers, as_matrix, layer_name, prunable_weights
from .memory import free_memory
from .processes import ALONE, Processes
from .removal_costs import add_squares, halves, removal_costs
from .units import COLUMNS, unit_groups

# x: the inputs of the layer over all tokens of all images; g: the gradient of the mean loss over
# all images.
STATISTICS = {
    "input_norms": "norm2(x_j) of each input j",
    "gram": "X^T X of the inputs",
    "gradient_gram": "the sum over images of the mean over tokens of G^T G, G the gradient at the "
    "outputs of its loss",
    "gradient": "g, over all images",
    "first_gradient": "g of the first batch alone",
    "squared_gradient": "the mean over images of their squared gradients",
    "gate_gradient": "the mean over images of the absolute gradient of a gate, a factor of 1 for "
    "the inputs from a head or neuron, or for a single input, divided by their number",
    "removal_costs": "what removing the weights of a block one by one costs, by the gradients of "
    "single images",
}
# By what they are computed from: gradients of single images, gradients at a layer's outputs, its
# inputs, any gradients
OF_IMAGES = frozenset({"squared_gradient", "gate_gradient", "removal_costs"})
OF_OUTPUTS = frozenset({"gradient_gram"}) | OF_IMAGES
OF_INPUTS = frozenset({"input_norms", "gram"}) | OF_OUTPUTS
OF_GRADIENTS = frozenset(STATISTICS) - {"input_norms", "gram"}
# Collected only if named, because they take many numbers for each weight
BY_REQUEST = frozenset({"gram", "gradient_gram", "removal_costs"})
MEMORY = 0.5  # of the free memory, for the sums of a pass; a batch needs the rest
GRAM_COLUMNS = 384  # of a part of a Gram matrix
COSTS = ".costs"  # in the place of the sums for removal costs
LAYOUT_ERROR = 0.1  # of the inputs of an image, alone and in its batch: more than rounding


class Statistics:
    """Sums over calibration images for each prunable weight of a model.

    Several processes, each with a share of the batches, add their sums up and then check:

        statistics = collect_statistics(model, batches_of_this_process, loss, needs, share=rank)
        for total in statistics.state_dict().values():
            torch.distributed.all_reduce(total)
        statistics.check()

    Attributes:
        needs: the names in `STATISTICS` that were collected.
        shapes: the shape of each weight, as a matrix, by parameter name.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        needs: Iterable[str],
        gates: Mapping[str, Tensor] | None = None,
    ):
        self._gates = gates or {}
        self.needs = frozenset(needs)
        self.shapes = {name: as_matrix(weight).shape for name, weight in weights.items()}
        self._weights = weights
        self._costs = {}
        self._layout_errors: dict[str, Tensor] = {}
        self._tokens_first: set[str] = set()  # weights that see tokens before images

        # First row: images, batches, and images of the first batch. Then a row for each weight: 0,
        # batches in which its inputs were seen, and batches in which it had a gradient.
        device = next(iter(weights.values())).device
        self._counts = torch.zeros(len(weights) + 1, 3, dtype=torch.int64, device=device)

        self._sums = {
            name: {need: _zeros(need, weight) for need in STATISTICS if need in self.needs}
            for name, weight in weights.items()
        }

    @property
    def images(self) -> int:
        """The number of images that were seen."""
        return int(self._counts[0, 0])

    def value(self, name: str, need: str) -> Tensor:
        """One of the `STATISTICS` of a weight, float64.

        It is on the device where it was collected, or on the CPU if that took several passes. The
        first call for the removal costs computes them from the weight as it is then, and frees
        their sums, which are large.

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
                squares = self._sums[name].pop(need)
                self._costs[name] = removal_costs(
                    as_matrix(self._weights[name]), squares, self.images
                )
            return self._costs[name]

        total = self._sums[name][need]
        if need == "input_norms":
            return total.sqrt()
        if need in ("gram", "gradient_gram"):
            return total

        images, _, images_of_first = self._counts[0].tolist()
        return total / (images_of_first if need == "first_gradient" else images)

    def add(self, other: "Statistics") -> None:
        """Adds the sums over another share of the batches of the same model.

        Raises:
            PruningError: the other holds other statistics, or those of other weights, or either has
                freed sums.
        """
        if self._costs or other._costs:
            raise PruningError(
                "statistics can only be added before their removal costs are looked at"
            )
        if self.needs != other.needs or self.shapes != other.shapes:
            raise PruningError(
                "statistics can only be added to the same statistics of the same weights"
            )

        parts = other.state_dict().values()
        for total, part in zip(self.state_dict().values(), parts, strict=True):
            total += part.to(total.device)

    def state_dict(self) -> dict[str, Tensor]:
        """All sums and counts: the tensors themselves, for an all-reduce in place.

        Their order is the same on all processes.
        """
        state = {"counts": self._counts}
        for name, totals in self._sums.items():
            for need, total in totals.items():
                state[f"{name}.{need}"] = total
        for name, costs in self._costs.items():
            state[f"{name}{COSTS}"] = costs
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies a `state_dict` of the same statistics of the same weights."""
        for name, weight in self._weights.items():
            if f"{name}{COSTS}" in state:
                self._sums[name].pop("removal_costs", None)
                self._costs[name] = torch.zeros_like(as_matrix(weight), dtype=torch.float64)
        for key, total in self.state_dict().items():
            total.copy_(state[key])

    def check(self) -> None:
        """Checks that every weight was reached and that all sums are finite.

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

        if self.needs & OF_INPUTS:
            counts = zip(self.shapes, seen, strict=True)
            expect_used([name for name, (_, with_inputs, _) in counts if not with_inputs])
        for name, (_, _, with_gradient) in zip(self.shapes, seen, strict=True):
            if self.needs & OF_GRADIENTS and not with_gradient:
                raise PruningError(
                    f"{name} has no gradient on any of the calibration images: expected a layer "
                    f"that the loss depends on, or layers '!{layer_name(name)}' to leave it out"
                )

            if self._layout_errors.get(name, 0) > LAYOUT_ERROR:
                raise _not_images_first(name)

            for need, total in self._sums[name].items():
                if not total.isfinite().all():
                    raise PruningError(
                        f"{name} has NaN or infinity in its {need} over the calibration images"
                    )

    @classmethod
    def _joined(cls, parts: list["Statistics"]) -> "Statistics":
        """Joins several groups of weights over the same images, in the first of them."""
        whole, *others = parts
        for part in others:
            whole.shapes.update(part.shapes)
            whole._weights.update(part._weights)
            whole._sums.update(part._sums)
            whole._costs.update(part._costs)
            whole._layout_errors.update(part._layout_errors)
        whole._counts = torch.cat([whole._counts, *(part._counts[1:] for part in others)])
        return whole

    def _share_costs(self, processes: Processes) -> None:
        """Computes the removal costs of all weights, each on one of the processes."""
        owners = processes.owners({name: math.prod(shape) for name, shape in self.shapes.items()})
        for name, owner in owners.items():
            if owner == processes.rank:
                self.value(name, "removal_costs")
        if processes.add_up is None:
            return

        for name, weight in self._weights.items():
            self._sums[name].pop("removal_costs", None)
            if name not in self._costs:
                self._costs[name] = torch.zeros_like(as_matrix(weight), dtype=torch.float64)
            processes.add_up(self._costs[name])

    def _leave_device(self) -> None:
        """Moves what was collected to the CPU."""
        for totals in (*self._sums.values(), self._costs):
            for key, total in totals.items():
                totals[key] = total.cpu()


def collect_statistics(
    model: nn.Module,
    batches: Iterable,
    loss: Callable | None = None,
    needs: Iterable[str] | None = None,
    *,
    share: int | None = None,
    add_up: Callable[[Tensor], object] | None = None,
    memory: int | None = None,
    layers: Layers | None = None,
    forward: Forward | None = None,
) -> Statistics:
    """Runs a model on calibration images, and returns sums for each prunable weight.

    The model runs in evaluation mode, and keeps the modes of its modules, `requires_grad` and
    gradients. If nothing needs gradients, there is no backward pass. Autocast around the call holds
    for the model, not for the sums. Frozen weights have gradients all the same.

    Args:
        model: a module whose call takes a batch of images.
        batches: yields images, or pairs of images and targets; other forms need `forward`. They are
            brought to the model's device. Read once, or once for each group of layers whose sums
            fit into the memory; an iterator is always read once.
        loss: from the model's outputs and the targets to the mean loss over the batch; only
            gradients need it.
        needs: names in `STATISTICS`; by default all that batches and loss allow, without `gram`,
            `gradient_gram` and `removal_costs`.
        share: the number of this share, if whole batches are shared out among several processes.
            Share 0 has the first batch. Without `add_up` there is one pass and nothing is checked:
            add the shares up, and call `Statistics.check`.
        add_up: called on every process with the same sums in the same order; adds up the sums of
            all processes in place, as `torch.distributed.all_reduce` does.
        memory: how many bytes the sums of one pass may take, of those that it can free: on a CPU
            the sums for the removal costs, on a GPU all. A pass has one layer at least. By default
            half of what is free on the model's device, where that is least of all processes;
            processes on CPUs share it. With `add_up`, each process computes the removal costs of
            some layers.
        layers: of which layers, as in `prunable_weights`.
        forward: called with the model and a batch on its device, returns the outputs: for batches
            of another form, such as dictionaries. The loss is given these in place of targets.

    Raises:
        PruningError: an unknown name, no batches, no loss or targets for gradients, and, naming the
            weight, one that no image reached or whose sums are not finite.
    """
    weights = prunable_weights(model, layers)
    if not weights:
        raise PruningError(
            f"{type(model).__name__} has no prunable weights: no nn.Linear besides the classifier"
        )

    # The first batch tells whether there are targets
    stream = iter(batches)
    first = next(stream, None)
    needs = _checked_needs(needs, loss, first)
    is_iterator = stream is batches  # which can be read only once
    stream = chain([] if first is None else [first], stream)

    device = next(iter(weights.values())).device
    freed = needs & {"removal_costs"} if device.type == "cpu" else needs
    processes = Processes.meet(share, add_up, device) if freed else ALONE
    in_one_pass = is_iterator or (share is not None and add_up is None) or not freed

    if in_one_pass:
        groups = [weights]
    else:
        limit = _memory(device, processes) if memory is None else memory
        groups = _groups(weights, freed, limit)

    gates = _gates(model) if "gate_gradient" in needs else {}
    found = []
    for group in groups:
        statistics = Statistics(group, needs, gates)

        gradients = _with_gradients(group) if needs & OF_GRADIENTS else torch.no_grad()
        with evaluation(model), without_fast_attention(), gradients:
            for index, batch in enumerate(batches if found else stream):
                is_first = index == 0 and not share
                if index == 0 and needs & OF_IMAGES:
                    _find_layouts(model, group, batch, forward, statistics)
                _look(model, group, batch, loss, forward, statistics, is_first)

        if add_up:
            for total in statistics.state_dict().values():
                add_up(total)
        if share is None or add_up:
            statistics.check()

        # Make room for the next group
        if "removal_costs" in needs and (add_up or len(groups) > 1):
            statistics._share_costs(processes)
        if len(groups) > 1:
            statistics._leave_device()
        found.append(statistics)
    return Statistics._joined(found)


# ---- shared with layer_walk.py ----


def expect_used(unused: Sequence[str]) -> None:
    """Raises a PruningError that names the weights that no image reached, if there are any."""
    if unused:
        left_out = " ".join(f"'!{layer_name(name)}'" for name in unused)
        were = "were" if len(unused) > 1 else "was"
        raise PruningError(
            f"{', '.join(unused)} {were} used on none of the calibration images: expected layers "
            f"that run, or layers {left_out} to leave out what does not"
        )


def add_gram(total: Tensor, inputs: Tensor) -> None:
    """Adds X^T X of inputs X (tokens, inputs) to `total`.

    Only one half of the symmetric product is computed.
    """
    parts = inputs.split(GRAM_COLUMNS, 1)
    slices = [
        slice(start, start + part.shape[1])
        for start, part in zip(range(0, inputs.shape[1], GRAM_COLUMNS), parts, strict=True)
    ]
    for row, left in enumerate(parts):
        for column in range(row, len(parts)):
            product = left.T @ parts[column]
            total[slices[row], slices[column]] += product
            if column > row:
                total[slices[column], slices[row]] += product.T


def less_mean(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (..., inputs) less their mean, shape (tokens, inputs), and the mean in float64."""
    rows = at_least_float32(inputs.reshape(-1, inputs.shape[-1]))
    mean = rows.mean(0)
    rest = rows - mean

    # The mean was rounded, and the rest still has what that left out
    left = rest.mean(0)
    return rest.sub_(left), mean.double() + left


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def without_fast_attention() -> Iterator[None]:
    """Lets torch's attention call its modules and functions one by one, also without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode, and each module's own mode again afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


# ---- helpers, not exported ----


def _shape(need: str, weight: Tensor) -> tuple[int, ...]:
    outputs, inputs = shape = as_matrix(weight).shape
    shapes = {
        "input_norms": (inputs,),
        "gate_gradient": (inputs,),
        "gram": (inputs, inputs),
        "gradient_gram": (outputs, outputs),
        "removal_costs": halves(weight.numel()),
    }
    return shapes.get(need, tuple(shape))


def _dtype(need: str, weight: Tensor) -> torch.dtype:
    of_gradients = torch.promote_types(weight.dtype, torch.float32)
    return of_gradients if need == "removal_costs" else torch.float64


def _zeros(need: str, weight: Tensor) -> Tensor:
    return torch.zeros(_shape(need, weight), dtype=_dtype(need, weight), device=weight.device)


def _memory(device: torch.device, processes: Processes) -> float:
    """The bytes that the sums of a pass may take, the same for all processes."""
    free = MEMORY * processes.least(free_memory(device), device)
    # They may be on one machine, where each has a GPU of its own
    return free / processes.count if device.type == "cpu" else free


def _gates(model: nn.Module) -> dict[str, Tensor]:
    """Of layers that read heads or neurons: the inputs of each, int64 (units, inputs of a unit)."""
    weights = prunable_weights(model)
    return {
        name: part.unit.argsort(stable=True).view(group.units, -1).to(weights[name].device)
        for group in unit_groups(model)
        for name, part in group.weights(weights).items()
        if part.dim == COLUMNS
    }


def _groups(
    weights: dict[str, Tensor], needs: frozenset[str], memory: float
) -> list[dict[str, Tensor]]:
    """The weights in groups of consecutive ones, at least one each, whose sums fit into memory."""
    groups = [{}]
    left = memory
    for name, weight in weights.items():
        size = sum(
            math.prod(_shape(need, weight)) * _dtype(need, weight).itemsize for need in needs
        )
        if size > left and groups[-1]:
            groups.append({})
            left = memory
        groups[-1][name] = weight
        left -= size
    return groups


def _checked_needs(needs: Iterable[str] | None, loss: Callable | None, first) -> frozenset[str]:
    has_targets = targets_of(first) is not None
    if needs is None:
        by_default = frozenset(STATISTICS) - BY_REQUEST
        return by_default if loss and has_targets else by_default - OF_GRADIENTS

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
    model: nn.Module,
    weights: dict[str, Tensor],
    batch,
    loss: Callable | None,
    forward: Forward | None,
    statistics: Statistics,
    is_first: bool,
) -> None:
    """Adds the sums of one batch. Nothing here waits for a GPU."""
    device = next(iter(weights.values())).device
    inputs = inputs_of(batch, device, forward)
    images = image_count(inputs)

    seen = _Inputs(weights, statistics, images)
    with seen if statistics.needs & OF_INPUTS else nullcontext():
        outputs = compute(model, inputs, forward)

    counts = statistics._counts
    for column, count in enumerate((images, 1, images * is_first)):
        counts[0, column] += count
    if not statistics.needs & OF_GRADIENTS:
        return

    assert loss is not None
    # autograd.grad leaves .grad alone, and computes only the gradients of prunable weights
    mean_loss = loss(outputs, targets_on(batch, device))
    gradients = torch.autograd.grad(mean_loss, list(weights.values()), allow_unused=True)

    for index, (name, gradient) in enumerate(zip(weights, gradients, strict=True), start=1):
        if gradient is None:
            continue
        counts[index, 2] += 1
        gradient = at_least_float32(as_matrix(gradient))
        parts = {"gradient": (gradient, images), "first_gradient": (gradient, images * is_first)}
        for need, total in statistics._sums[name].items():
            part, times = parts.get(need, (None, 0))
            if times:
                total.add_(part, alpha=times)
    seen.finish()


def by_image(values: Tensor, images: int, tokens_first: bool) -> Tensor:
    """Values (..., width) of all tokens in the shape (images, tokens, width)."""
    if tokens_first:
        return values.reshape(-1, images, values.shape[-1]).transpose(0, 1)
    return values.reshape(images, -1, values.shape[-1])


def _find_layouts(
    model: nn.Module,
    weights: dict[str, Tensor],
    batch,
    forward: Forward | None,
    statistics: Statistics,
) -> None:
    """Finds out which layers see tokens before images: (tokens, images, inputs).

    For each layer it keeps how far the inputs of the first image are from those that it has alone.
    The distance is relative, and large if neither order is that of the layer. Nothing here waits
    for a GPU.

    Raises:
        PruningError: naming the first layer whose inputs have another number of rows.
    """
    inputs = inputs_of(batch, next(iter(weights.values())).device, forward)
    images = image_count(inputs)
    found = []
    with torch.no_grad():
        for part in (first_image(inputs), inputs):
            with _FirstInputs(weights) as first:
                compute(model, part, forward)
            found.append(first)
    alone, together = found

    for name, inputs in together.inputs.items():
        one = alone.inputs[name].reshape(-1, inputs.shape[-1]).float()
        if inputs.dim() == 1 or inputs[..., 0].numel() != images * len(one):
            raise _not_images_first(name)

        # Rows of attention do not show it; elsewhere, the dimension that grows is that of images
        tokens_first = name in together.of_attention
        if inputs.dim() > 2 and images > 1:
            tokens_first = len(inputs) == len(alone.inputs[name])
        if tokens_first:
            statistics._tokens_first.add(name)
        rows = by_image(inputs, images, tokens_first)[0].float()
        statistics._layout_errors[name] = (rows - one).norm() / one.norm().clamp(min=1e-30)


def _not_images_first(name: str) -> PruningError:
    return PruningError(
        f"{name} is not given the tokens of one image after the other, or the first token of all "
        "images first: expected that for gradients of single images"
    )


class _FirstInputs(LinearCalls):
    """Keeps the inputs of the first use of each weight, by name.

    of_attention: the names of weights that torch's multi-head attention uses.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__(weights)
        self.inputs: dict[str, Tensor] = {}
        self.of_attention: set[str] = set()

    def see(self, name, inputs, compute):
        self.inputs.setdefault(name, inputs.detach().clone())
        if self.in_attention:
            self.of_attention.add(name)
        return compute()


class _Inputs(LinearCalls):
    """Adds up the inputs of every linear function that uses a prunable weight.

    During the backward pass it adds up what the gradients at their outputs give. Call `finish`
    after that.
    """

    def __init__(self, weights: dict[str, Tensor], statistics: Statistics, images: int):
        super().__init__(weights)
        self._images = images
        # The gradients of single images, by weight, shape (images, outputs, inputs): as long as a
        # use of the weight is still to come
        self._gradients: dict[str, Tensor] = {}
        self._uses: Counter[str] = Counter()
        self._rows = {name: row for row, name in enumerate(weights, start=1)}
        self._statistics = statistics
        self._seen = set()

    def see(self, name, inputs, compute):
        self._add(name, inputs.detach())
        outputs = compute()
        if self._statistics.needs & OF_OUTPUTS and outputs.requires_grad:
            self._uses[name] += 1
            # A copy keeps its hook when the model changes the outputs in place
            outputs = outputs.clone()
            outputs.register_hook(partial(self._add_gradients, name, inputs.detach()))
        return outputs

    @torch.no_grad()
    def _add_gradients(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        totals = self._statistics._sums[name]
        with torch.autocast(inputs.device.type, enabled=False):
            # The batch's loss is the mean over its images: times their number, it is their sum
            if "gradient_gram" in totals:
                rows = at_least_float32(gradient.reshape(-1, gradient.shape[-1]))
                scale = self._images * (self._images / len(rows)) ** 0.5
                add_gram(totals["gradient_gram"], rows * scale)

            if totals.keys() & OF_IMAGES:
                tokens_first = name in self._statistics._tokens_first
                x = at_least_float32(by_image(inputs, self._images, tokens_first))
                dy = at_least_float32(by_image(gradient, self._images, tokens_first))
                self._gradients[name] = self._gradients.get(name, 0) + dy.mT @ x
                self._uses[name] -= 1
                if not self._uses[name]:
                    self._add_images(name)

    @torch.no_grad()
    def finish(self) -> None:
        """Adds up the gradients of weights one use of which the loss did not depend on."""
        for name in list(self._gradients):
            self._add_images(name)

    def _add_images(self, name: str) -> None:
        """Adds up the gradients of single images, and frees them: they are large."""
        totals = self._statistics._sums[name]
        weight = as_matrix(self._statistics._weights[name])
        # The batch's loss is the mean over its images
        of_images = self._gradients.pop(name).mul_(self._images)

        if "squared_gradient" in totals:
            totals["squared_gradient"] += of_images.square().sum(0)
        if "removal_costs" in totals:
            add_squares(totals["removal_costs"], of_images)
        if "gate_gradient" in totals:
            # A gate z is 1, and its layer computes W (z x): its gradient is the sum of W * dW
            of_inputs = torch.einsum("noi,oi->ni", of_images, weight.to(of_images)).double()
            each = torch.arange(weight.shape[1], device=weight.device)[:, None]
            gates = self._statistics._gates.get(name, each)
            of_gates = of_inputs[:, gates].sum(2).abs().sum(0)
            totals["gate_gradient"][gates] += of_gates[:, None] / gates.shape[1]

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
                # X^T X in float32 would lose small variations about a large mean
                rest, mean = less_mean(inputs)
                mean *= len(rest) ** 0.5
                add_gram(totals["gram"], rest)
                totals["gram"].addr_(mean, mean)


@contextmanager
def _with_gradients(weights: dict[str, Tensor]) -> Iterator[None]:
    """Enables gradients of the weights, frozen ones too, which are frozen again afterwards."""
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
