"""Layers in the order in which they compute, each with the inputs that the model gives it by then.

The forward pass of each batch runs in a thread of its own, which stops wherever a module is called
that holds layers to visit, such as a block of a transformer. So all batches are at the same place,
what lies before has its final weights, and only that module is computed again for each of its
layers, up to the layer. A whole walk takes about three evaluations of the images, and the memory of
what the model passes from one such module to the next.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import PruningError
from .masks import prunable_weights
from .statistics import add_gram, at_least_float32, evaluation, images_of, linear_operands

# Of a module that is computed again for each of its layers. A block of a transformer has as many; a
# pass that stands still there holds the tokens once, and within the block three times.
MOST_LAYERS = 4
ROUNDING = 100  # of sums, in the last places of a number


@dataclass
class Inputs:
    """Sums over the inputs x of a layer, of all tokens of all images; and over those that it had in
    another model, y.

    gram: X^T X, shape (inputs, inputs); total: the sum of x, shape (inputs,); tokens: how many
    there are. All are float64, on a GPU float32. cross, other: X^T Y and the sum of y; the same as
    gram and total without another model.
    """

    gram: Tensor
    total: Tensor
    tokens: Tensor
    cross: Tensor
    other: Tensor

    @classmethod
    def of(cls, weight: Tensor, with_other: bool = False) -> "Inputs":
        """Sums over nothing yet."""
        dtype = torch.float64 if weight.device.type == "cpu" else torch.float32
        options = {"dtype": dtype, "device": weight.device}
        inputs = weight.shape[1]
        gram = torch.zeros(inputs, inputs, **options)
        total = torch.zeros(inputs, **options)
        return cls(
            gram,
            total,
            torch.zeros((), **options),
            torch.zeros_like(gram) if with_other else gram,
            torch.zeros_like(total) if with_other else total,
        )

    @property
    def sums(self) -> list[Tensor]:
        """All that is added up, each once."""
        return list(
            {
                id(part): part
                for part in (self.gram, self.total, self.tokens, self.cross, self.other)
            }.values()
        )

    @property
    def mean(self) -> Tensor:
        """The mean of x, shape (inputs,)."""
        return self.total / self.tokens

    @property
    def other_mean(self) -> Tensor:
        """The mean of y, shape (inputs,)."""
        return self.other / self.tokens

    def centred(self) -> "Inputs":
        """The same of x and y less their means; zero for an x that varies by no more than the
        rounding of its sums.
        """
        gram = self.gram - torch.outer(self.total, self.mean)
        varies = gram.diagonal() > ROUNDING * torch.finfo(gram.dtype).eps * self.gram.diagonal()
        gram.mul_(varies).mul_(varies[:, None])
        cross = gram
        if self.cross is not self.gram:
            cross = (self.cross - torch.outer(self.total, self.other_mean)).mul_(varies[:, None])
        zero = torch.zeros_like(self.total)
        return Inputs(gram, zero, self.tokens, cross, zero)

    def add(self, inputs: Tensor, other: Tensor | None = None) -> None:
        """Counts inputs in, shape (..., inputs), and those of the other model."""
        rest, shift, tokens = _split(inputs)
        self.tokens += tokens
        add_gram(self.gram, rest)
        rest_total = rest.sum(0).to(self.gram)
        shift = shift.to(self.gram)
        half = rest_total + tokens / 2 * shift
        self.gram.addr_(shift, half).addr_(half, shift)
        self.total += (total := rest_total + tokens * shift)
        if other is not None:
            other_rest, other_shift, _ = _split(other)
            other_total = other_rest.sum(0).to(self.gram)
            other_shift = other_shift.to(self.gram)
            self.cross += rest.T @ other_rest
            self.cross.addr_(total, other_shift).addr_(shift, other_total)
            self.other += other_total + tokens * other_shift


@torch.no_grad()
def visit_layers(
    model: nn.Module,
    batches: Iterable,
    visit: Callable[[str, Inputs], None],
    *,
    beside: nn.Module | None = None,
    add_up: Callable[[Tensor], None] | None = None,
) -> None:
    """Calls `visit(name, inputs)` for each prunable weight, in the order in which they compute.

    What a visit changes about the model, later layers see in their inputs. The model runs in
    evaluation mode, under the autocast around the call, and has its modes again afterwards.

    Args:
        model: a module that uses its layers in an order that the images do not change. A weight
            that is used more than once in a pass is visited at its first use, with the inputs of
            that.
        batches: yields images, or tuples that begin with them. All of them are in the walk at once.
        visit: called with the name of the weight and the sums over its inputs.
        beside: another model of the same layers, such as a copy from before any change; it sees the
        same images.
        add_up: adds up a tensor of all processes, in place, where each has some of the batches, at
            least one.

    Raises:
        PruningError: no batches, an order that differs, and, naming the weight, one that no image
        reached.
    """
    device = next(model.parameters()).device
    autocast = partial(
        torch.autocast,
        device.type,
        torch.get_autocast_dtype(device.type),
        # A cache would have old weights
        torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
    batches = [images_of(batch).to(device) for batch in batches]
    if not batches:
        raise PruningError("no calibration images: expected at least one batch")
    with torch.autocast(device.type, enabled=False), ExitStack() as stack:
        lanes = []
        for network in (model,) if beside is None else (model, beside):
            stack.enter_context(evaluation(network))
            with autocast():
                units = _units(network, prunable_weights(network), batches[0][:1])
            computed = stack.enter_context(_stops(set(units.values())))
            lanes.append(_Lane(network, prunable_weights(network), units, computed, []))
        try:
            while batches:  # what is passed on needs no second place here
                images = batches.pop()
                for lane in lanes:
                    lane.passes.append(_Pass(lane.model, images, autocast))
                del images
            _walk(lanes, autocast, visit, add_up)
        finally:
            for pass_ in (pass_ for lane in lanes for pass_ in lane.passes):
                pass_.close()


# ---- helpers, not exported ----


def _split(inputs: Tensor) -> tuple[Tensor, Tensor, int]:
    """Inputs less their mean, shape (tokens, inputs), the mean, and the number of tokens.

    Products in float32 would lose what varies little about a large mean.
    """
    inputs = at_least_float32(inputs.reshape(-1, inputs.shape[-1]))
    shift = inputs.mean(0)
    return inputs - shift, shift, len(inputs)


class _Lane(NamedTuple):
    """A model in the walk: its weights and the units where it stops by their names, what computes
    those, its passes.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    units: dict[str, nn.Module]
    computed: dict[nn.Module, Callable]
    passes: list


def _walk(lanes: list[_Lane], autocast, visit, add_up) -> None:
    pending = dict.fromkeys(lanes[0].weights)
    passes = [pass_ for lane in lanes for pass_ in lane.passes]
    while any(pass_.unit is not None for pass_ in passes):
        for lane in lanes:
            if any(pass_.unit is not lane.passes[0].unit for pass_ in lane.passes):
                raise PruningError(
                    "the model calls its layers in an order that depends on the images"
                )
        while any(lanes[0].units[name] is lanes[0].passes[0].unit for name in pending):
            name, inputs = _inputs_of_next(lanes, pending, autocast)
            if not name:
                break  # a later call of the unit uses it
            if add_up:
                for total in inputs.sums:
                    add_up(total)
            visit(name, inputs)
            del pending[name]
        for lane in lanes:
            for pass_ in lane.passes:
                with autocast():
                    result = lane.computed[pass_.unit](*pass_.args, **pass_.kwargs)
                pass_.go_on(result)
                del result
    _expect_none(pending)


def _inputs_of_next(
    lanes: list[_Lane], pending: Iterable[str], autocast
) -> tuple[str | None, Inputs | None]:
    """The weight that computes next, and the sums over its inputs; None where no pending one
    computes in the units.
    """
    name = inputs = None
    for batch, passes in enumerate(zip(*(lane.passes for lane in lanes), strict=True)):
        values = []
        for lane, pass_ in zip(lanes, passes, strict=True):
            with autocast():
                found, value = _next_layer(
                    partial(lane.computed[pass_.unit], *pass_.args, **pass_.kwargs),
                    {name: lane.weights[name] for name in pending},
                )
            if not batch and not values:
                name = found
                inputs = Inputs.of(lane.weights[found], len(lanes) > 1) if found else None
            if found != name:
                raise PruningError(f"the images decide whether {name} or {found} computes first")
            values.append(value)
        if name:
            inputs.add(*values)
    return name, inputs


class _Pass:
    """The forward pass of a batch, in a thread that stands still wherever a unit is called.

    Attributes:
        unit, args, kwargs: the call where it stands; no unit when the pass has ended.
    """

    def __init__(self, model: nn.Module, images: Tensor, autocast):
        self._calls = SimpleQueue()
        self._results = SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(model, images, autocast), daemon=True
        )
        self._thread.pass_ = self
        self._thread.start()
        self._wait()

    def go_on(self, result) -> None:
        """Hands over what the unit returns, and waits until the pass is at the next one."""
        self.unit = self.args = self.kwargs = None
        self._results.put((result,))
        del result
        self._wait()

    def close(self) -> None:
        """Ends the thread."""
        self._results.put(None)
        self._thread.join()

    def _wait(self) -> None:
        error, self.unit, self.args, self.kwargs = self._calls.get()
        if error is not None:
            raise error

    # ---- in the thread ----

    def _run(self, model: nn.Module, images: Tensor, autocast) -> None:
        try:
            if images.device.type == "cuda":
                torch.cuda.set_device(images.device)
            with torch.no_grad(), autocast():
                model.forward(images)  # not by a call, which may be a compiled one
            self._calls.put((None, None, (), {}))
        except _Closed:
            pass
        except BaseException as error:
            self._calls.put((error, None, (), {}))

    def stand(self, unit: nn.Module, args: tuple, kwargs: dict):
        """Called in the place of a unit."""
        self._calls.put((None, unit, args, kwargs))
        del args, kwargs
        if (result := self._results.get()) is None:
            raise _Closed
        return result[0]


class _Closed(Exception):
    """The walk is over before the pass is."""


@contextmanager
def _stops(units: set[nn.Module]) -> Iterator[dict[nn.Module, Callable]]:
    """In the threads of passes, units stop; yields what computes them."""
    computed = {unit: unit.forward for unit in units}
    own = {unit for unit in units if "forward" in vars(unit)}

    def stop(unit, *args, **kwargs):
        # Another unit may call this one
        pass_ = getattr(threading.current_thread(), "pass_", None)
        return pass_.stand(unit, args, kwargs) if pass_ else computed[unit](*args, **kwargs)

    try:
        for unit in units:
            unit.forward = partial(stop, unit)
        yield computed
    finally:
        for unit in units:
            if unit in own:
                unit.forward = computed[unit]
            else:
                del unit.forward


class _Found(Exception):
    """A layer's inputs are there."""


class _Linears(TorchFunctionMode):
    """Calls a function with the weight and the inputs of every linear function."""

    def __init__(self, look: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self._look = look

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            inputs, weight = linear_operands(args, kwargs)
            self._look(weight, inputs)
        return func(*args, **kwargs)


def _expect_none(unused: Iterable[str]) -> None:
    for name in unused:
        raise PruningError(
            f"{name} was used on none of the calibration images: expected a layer that runs"
        )


def _next_layer(
    compute: Callable[[], object], pending: dict[str, Tensor]
) -> tuple[str | None, Tensor | None]:
    """Computes up to the first weight that is pending; returns its name and its inputs."""
    names = {id(weight): name for name, weight in pending.items()}
    found = []

    def look(weight, inputs):
        if name := names.get(id(weight)):
            found.extend((name, inputs))
            raise _Found

    try:
        with _Linears(look):
            compute()
    except _Found:
        return tuple(found)
    return None, None


def _units(model: nn.Module, weights: dict[str, Tensor], images: Tensor) -> dict[str, nn.Module]:
    """The module to stop at for each weight: the outermost one, within the model, that has few
    enough layers, or that uses a weight itself."""
    names = {id(weight): name for name, weight in weights.items()}
    stack = [model]
    stacks = {}

    def look(weight, inputs):
        if name := names.get(id(weight)):
            stacks.setdefault(name, tuple(stack))

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: stack.append(module)
        ),
        nn.modules.module.register_module_forward_hook(
            lambda module, args, output: stack.pop() and None, always_call=True
        ),
    ]
    try:
        with _Linears(look):
            model.forward(images)
    finally:
        for hook in hooks:
            hook.remove()
    _expect_none(name for name in weights if name not in stacks)
    layers = Counter(module for stack in stacks.values() for module in dict.fromkeys(stack))
    chosen = {
        next((module for module in stack[1:] if layers[module] <= MOST_LAYERS), stack[-1])
        for stack in stacks.values()
    }
    return {
        name: next(module for module in stack if module in chosen) for name, stack in stacks.items()
    }
