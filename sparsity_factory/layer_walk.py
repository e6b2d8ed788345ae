"""A walk over the layers of a model in computing order, each with the inputs that it has by then.

The forward pass of each batch runs in a thread of its own, which stops wherever the model calls a
module with layers to look at (a unit), such as a block of a transformer. So all batches are at the
same place, all layers before it have their final weights, and only this unit is computed again for
each of its layers, up to the layer. A whole walk takes about three evaluations of the images, and
the memory of what the model passes from one unit to the next.
"""

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .batches import Forward, compute, first_image, inputs_of
from .errors import PruningError
from .linear_calls import LinearCalls
from .masks import Layers, as_matrix, prunable_weights
from .statistics import add_gram, evaluation, expect_used, less_mean, without_fast_attention

# Most layers of a unit. A block of a transformer has four; a pass that stops there holds the tokens
# once, and one that stops within the block holds them three times.
MOST_LAYERS = 4
ROUNDING = 2**-22  # of an input in float32, as a share of its mean: two units of the last place


@dataclass
class Inputs:
    """The inputs x of a layer over the tokens of all images: their number, mean and Gram matrix.

    With another model, y are the inputs that the same layer has there. Gram matrices are of x and y
    less their means, because float32 would lose small variations about a large mean. Batches and
    processes are merged by their means: Chan, Golub and LeVeque 1983, Algorithms for computing the
    sample variance (The American Statistician 37).

    gram: the sum of (x - mean)(x - mean)^T, shape (inputs, inputs), float64 on a CPU and float32 on
        a GPU.
    mean: of x, shape (inputs,), float64.
    tokens: their number, float64, without dimensions.
    cross: the sum of (x - mean)(y - other_mean)^T; `gram` itself without another model.
    other_mean: of y; `mean` itself without another model.
    """

    gram: Tensor
    mean: Tensor
    tokens: Tensor
    cross: Tensor
    other_mean: Tensor

    @classmethod
    def of(cls, weight: Tensor, with_other: bool = False) -> "Inputs":
        """No tokens yet, for a weight of shape (outputs, inputs)."""
        inputs = weight.shape[1]
        dtype = torch.float64 if weight.device.type == "cpu" else torch.float32
        gram = torch.zeros(inputs, inputs, dtype=dtype, device=weight.device)
        mean = torch.zeros(inputs, dtype=torch.float64, device=weight.device)
        tokens = torch.zeros((), dtype=torch.float64, device=weight.device)
        if with_other:
            return cls(gram, mean, tokens, torch.zeros_like(gram), torch.zeros_like(mean))
        return cls(gram, mean, tokens, gram, mean)

    def add(self, inputs: Tensor, other: Tensor | None = None) -> None:
        """Adds inputs of shape (..., inputs), and those of the other model."""
        rest, mean = less_mean(inputs)
        other_rest, other_mean = (rest, mean) if other is None else less_mean(other)
        add_gram(self.gram, rest)
        if other is not None:
            self.cross += rest.T @ other_rest

        # n old tokens and m new ones: n m / (n + m) times the product of how far means are apart
        share = len(rest) / (self.tokens + len(rest))
        apart = mean - self.mean
        other_apart = other_mean - self.other_mean
        self._add_products(self.tokens * share, apart, other_apart)

        self.tokens += len(rest)
        self.mean += share * apart
        if other is not None:
            self.other_mean += share * other_apart

    def complete(self, add_up: Callable[[Tensor], object] | None = None) -> None:
        """Merges all processes, once each has added its tokens.

        An input that varies by no more than its rounding does not vary: its products become zero.

        add_up: as in `walk_layers`.
        """
        if add_up:
            self._merge(add_up)

        noise = self.tokens * (ROUNDING * self.mean).square()
        varies = self.gram.diagonal() > noise
        self.gram.mul_(varies).mul_(varies[:, None])
        if self.cross is not self.gram:
            self.cross.mul_(varies[:, None])

    def about_zero(self) -> "Inputs":
        """The same with X^T X and X^T Y themselves, as a layer without bias needs them."""
        zero = torch.zeros_like(self.mean)
        gram = self.gram.clone()
        cross = gram if self.cross is self.gram else self.cross.clone()
        found = Inputs(gram, zero, self.tokens, cross, zero)
        found._add_products(self.tokens, self.mean, self.other_mean)
        return found

    def _merge(self, add_up: Callable[[Tensor], object]) -> None:
        """Moves the products to the mean of all processes, where they add up."""
        tokens = self.tokens.clone()
        add_up(self.tokens)
        means = [self.mean] if self.other_mean is self.mean else [self.mean, self.other_mean]
        moves = []
        for mean in means:
            own = mean.clone()
            add_up(mean.mul_(tokens / self.tokens))
            moves.append(own - mean)

        self._add_products(tokens, moves[0], moves[-1])
        add_up(self.gram)
        if self.cross is not self.gram:
            add_up(self.cross)

    def _add_products(self, times: Tensor, x: Tensor, y: Tensor) -> None:
        """Adds a number of times x x^T to `gram` and x y^T to `cross`."""
        root = times.sqrt()
        x = (root * x).to(self.gram)
        self.gram.addr_(x, x)
        if self.cross is not self.gram:
            self.cross.addr_(x, (root * y).to(self.gram))


def walk_layers(
    model: nn.Module,
    batches: Iterable,
    *,
    other: nn.Module | None = None,
    add_up: Callable[[Tensor], object] | None = None,
    layers: Layers | None = None,
    forward: Forward | None = None,
) -> Generator[tuple[str, Inputs]]:
    """Yields each prunable weight's name and its layer's `Inputs`, in computing order.

        for name, inputs in walk_layers(model, batches):
            ...  # may change the layer: later layers see it in their inputs

    The model runs without gradients, in evaluation mode, under the autocast that is around the
    call. The body of the loop has its own autocast and gradients. The model has its modes again
    and all threads end when the loop ends, breaks or raises; close a generator that you keep.

    Args:
        model: a module that uses its layers in an order that the images do not change. A weight
            that is used more than once in a pass comes at its first use, with the inputs of that.
        batches: yields images, or tuples that begin with them. The walk holds all of them at once.
        other: another model of the same layers, such as a copy from before any change; it sees the
            same images.
        add_up: adds up a tensor of all processes, in place, if each has some of the batches, at
            least one.
        layers: which layers, as in `prunable_weights`.
        forward: called with the model and a batch on its device: for batches of another form, such
            as dictionaries.

    Raises:
        PruningError: no batches, an order that differs, and, naming the weight, one that no image
            reached.
    """
    device = next(model.parameters()).device
    autocast = partial(
        torch.autocast,
        device.type,
        torch.get_autocast_dtype(device.type),
        torch.is_autocast_enabled(device.type),
        cache_enabled=False,  # a cache would hold weights from before a change
    )
    models = [model] if other is None else [model, other]
    names = list(prunable_weights(model, layers))
    return _walk(models, names, batches, forward, autocast, add_up)


# ---- helpers, not exported ----


def _copied(value):
    """Tensors copied, also within tuples, lists and dictionaries; anything else as it is."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_copied(part) for part in value)
    return value


class _Lane(NamedTuple):
    """One model of the walk, with one pass per batch.

    weights, units: by name of the weight, itself and the module where passes stop for it.
    forwards: the original forward of each unit.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    units: dict[str, nn.Module]
    forwards: dict[nn.Module, Callable]
    passes: list["_Pass"]

    @property
    def unit(self) -> nn.Module | None:
        """Where the first pass stands."""
        return self.passes[0].unit

    def call(self, pass_: "_Pass") -> Callable[[], object]:
        """The call at which a pass stands."""
        return partial(self.forwards[pass_.unit], *pass_.args, **pass_.kwargs)

    def trial(self, pass_: "_Pass") -> Callable[[], object]:
        """The same call on copies of its tensors, as the unit may change them in place."""
        return partial(self.forwards[pass_.unit], *_copied(pass_.args), **_copied(pass_.kwargs))


@torch.no_grad()  # not in the body of the caller's loop
def _walk(
    models: list[nn.Module],
    names: list[str],
    batches: Iterable,
    forward: Forward | None,
    autocast: Callable,
    add_up: Callable | None,
) -> Generator[tuple[str, Inputs]]:
    device = next(models[0].parameters()).device
    batches = [inputs_of(batch, device, forward) for batch in batches]
    if not batches:
        raise PruningError("no calibration images: expected at least one batch")

    with ExitStack() as stack:
        stack.enter_context(without_fast_attention())
        lanes = [
            stack.enter_context(_lane(model, names, batches[0], forward, autocast))
            for model in models
        ]

        # A pass keeps only what it still needs of its images, so the list gives them up
        while batches:
            inputs = batches.pop()
            for lane in lanes:
                lane.passes.append(_Pass(lane.model, inputs, forward, autocast))
            del inputs

        pending = dict.fromkeys(lanes[0].weights)
        passes = [pass_ for lane in lanes for pass_ in lane.passes]
        while any(pass_.unit is not None for pass_ in passes):
            _check_order(lanes)
            yield from _layers_of_unit(lanes, pending, autocast, add_up)

            for lane in lanes:
                for pass_ in lane.passes:
                    with autocast():
                        result = lane.call(pass_)()
                    pass_.resume(result)
                    del result
        expect_used(list(pending))


@contextmanager
def _lane(
    model: nn.Module, names: list[str], inputs, forward: Forward | None, autocast: Callable
) -> Iterator[_Lane]:
    """A model in evaluation mode whose units stop; closes its passes at the end."""
    weights = {name: model.get_parameter(name) for name in names}
    passes = []
    with evaluation(model):
        with autocast():
            units = _units(model, weights, first_image(inputs), forward)
        del inputs  # the walk does not need their memory
        with _stops(set(units.values())) as forwards:
            try:
                yield _Lane(model, weights, units, forwards, passes)
            finally:
                for pass_ in passes:
                    pass_.close()


def _check_order(lanes: list[_Lane]) -> None:
    """Makes sure that all passes of a model stand at one unit."""
    for lane in lanes:
        if any(pass_.unit is not lane.unit for pass_ in lane.passes):
            raise PruningError("the model calls its layers in an order that depends on the images")


def _layers_of_unit(
    lanes: list[_Lane], pending: dict[str, None], autocast: Callable, add_up: Callable | None
) -> Iterator[tuple[str, Inputs]]:
    """Yields the pending weights that compute in the unit where all passes stand.

    Weights leave `pending` when the caller has seen them.
    """
    while any(lanes[0].units[name] is lanes[0].unit for name in pending):
        found = _inputs_of_next(lanes, pending, autocast)
        if found is None:
            return  # a later call of the unit uses them

        name, inputs = found
        inputs.complete(add_up)
        yield name, inputs
        del pending[name]


def _inputs_of_next(
    lanes: list[_Lane], pending: Iterable[str], autocast: Callable
) -> tuple[str, Inputs] | None:
    """The weight that computes next and the sums over its inputs; None if none is pending there."""
    name = None
    inputs = None
    for batch, passes in enumerate(zip(*(lane.passes for lane in lanes), strict=True)):
        values = []
        for lane, pass_ in zip(lanes, passes, strict=True):
            weights = {name: lane.weights[name] for name in pending}
            with autocast():
                found, value = _next_layer(lane.trial(pass_), weights)

            # The first pass says which weight it is, and the others have to agree
            if not batch and not values:
                name = found
                if found is not None:
                    inputs = Inputs.of(as_matrix(lane.weights[found]), len(lanes) > 1)
            if found != name:
                raise PruningError(f"the images decide whether {name} or {found} computes first")
            values.append(value)

        if inputs is not None:
            with torch.autocast(inputs.gram.device.type, enabled=False):
                inputs.add(*values)

    return None if name is None or inputs is None else (name, inputs)


_of_thread = threading.local()  # its pass, in the thread of a pass


class _Pass:
    """The forward pass of a batch, in a thread that stops wherever a unit is called.

    Attributes:
        unit, args, kwargs: the call at which it stands; the unit is None when the pass has ended.
    """

    def __init__(self, model: nn.Module, inputs, forward: Forward | None, autocast: Callable):
        self.unit: nn.Module | None
        self.args: tuple
        self.kwargs: dict
        self._calls: SimpleQueue = SimpleQueue()
        self._results: SimpleQueue = SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(model, inputs, forward, autocast), daemon=True
        )
        self._thread.start()
        self._wait()

    def resume(self, result) -> None:
        """Returns the result of the unit to the thread, and waits until it is at the next unit."""
        self.unit = None
        self.args = ()
        self.kwargs = {}
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

    def _run(self, model: nn.Module, inputs, forward: Forward | None, autocast: Callable) -> None:
        _of_thread.pass_ = self
        try:
            device = next(model.parameters()).device
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with torch.no_grad(), autocast():
                compute(model, inputs, forward)
            self._calls.put((None, None, (), {}))
        except _Closed:
            pass
        except BaseException as error:
            self._calls.put((error, None, (), {}))

    def stop(self, unit: nn.Module, args: tuple, kwargs: dict):
        """Called in place of the unit's forward; returns what `resume` was given."""
        self._calls.put((None, unit, args, kwargs))
        del args, kwargs
        result = self._results.get()
        if result is None:
            raise _Closed
        return result[0]


class _Closed(Exception):
    """The walk has ended before the pass."""


@contextmanager
def _stops(units: set[nn.Module]) -> Iterator[dict[nn.Module, Callable]]:
    """Makes units stop in the threads of passes; yields the forward of each."""
    forwards = {unit: unit.forward for unit in units}
    set_on_module = {unit for unit in units if "forward" in vars(unit)}

    def stop(unit, *args, **kwargs):
        # Outside of passes, as when another unit computes this one, it does not stop
        pass_ = getattr(_of_thread, "pass_", None)
        if pass_ is None:
            return forwards[unit](*args, **kwargs)
        return pass_.stop(unit, args, kwargs)

    try:
        for unit in units:
            unit.forward = partial(stop, unit)
        yield forwards
    finally:
        for unit in units:
            if unit in set_on_module:
                unit.forward = forwards[unit]
            else:
                del unit.forward


class _Found(Exception):
    """The inputs of a layer are known."""


class _Linears(LinearCalls):
    """Calls a function with the name and the inputs of every linear function of the weights."""

    def __init__(self, weights: dict[str, Tensor], look: Callable[[str, Tensor], None]):
        super().__init__(weights)
        self._look = look

    def see(self, name, inputs, compute):
        self._look(name, inputs)
        return compute()


def _next_layer(
    compute: Callable[[], object], pending: dict[str, Tensor]
) -> tuple[str | None, Tensor | None]:
    """Computes up to the first weight that is pending; returns its name and its inputs."""
    found = []

    def look(name, inputs):
        found.extend((name, inputs))
        raise _Found

    try:
        with _Linears(pending, look):
            compute()
    except _Found:
        return tuple(found)
    return None, None


def _units(
    model: nn.Module, weights: dict[str, Tensor], inputs, forward: Forward | None
) -> dict[str, nn.Module]:
    """The module to stop at for each weight, found by one pass.

    It is the outermost module within the model that has few enough layers, or the one that uses the
    weight.
    """
    calls = [model]  # that run now, the outermost first
    calls_of = {}  # the same by name of a weight, at its first use

    def look(name, inputs):
        calls_of.setdefault(name, tuple(calls))

    def begin(module, args):
        calls.append(module)

    def end(module, args, output):
        calls.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(begin),
        nn.modules.module.register_module_forward_hook(end, always_call=True),
    ]
    try:
        with _Linears(weights, look):
            compute(model, inputs, forward)
    finally:
        for hook in hooks:
            hook.remove()
    expect_used([name for name in weights if name not in calls_of])

    # A unit for each weight; then the outermost unit around each, as units lie in other units
    layers = Counter(module for modules in calls_of.values() for module in dict.fromkeys(modules))
    units = set()
    for modules in calls_of.values():
        small = (module for module in modules[1:] if layers[module] <= MOST_LAYERS)
        units.add(next(small, modules[-1]))
    return {
        name: next(module for module in modules if module in units)
        for name, modules in calls_of.items()
    }
