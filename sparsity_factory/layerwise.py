"""Layers in the order in which they compute, each with the inputs that the model gives it by then.

The forward pass of each batch runs in a thread of its own, which stops wherever a module is called that holds layers to
visit. So all batches are at the same place, what lies before has its final weights, and only that module is computed
again for each of its layers, up to the layer. A whole walk takes about two evaluations of the images, and the memory of
the activations that the model passes from one such module to the next.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import PruningError
from .masks import prunable_weights
from .statistics import add_gram, at_least_float32, evaluation, images_of, linear_operands

MOST_LAYERS = 4  # that are computed again for each other: an attention has as many
ROUNDING = 100  # of sums, in the last places of a number


@dataclass
class Inputs:
    """Sums over the inputs x of a layer, of all tokens of all images.

    gram: X^T X, shape (inputs, inputs); total: the sum of x, shape (inputs,); both float64 (float32 on a GPU).
    tokens: how many there are.
    """

    gram: Tensor
    total: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Inputs":
        """Sums over nothing yet."""
        dtype = torch.float64 if weight.device.type == "cpu" else torch.float32
        options = {"dtype": dtype, "device": weight.device}
        inputs = weight.shape[1]
        return cls(torch.zeros(inputs, inputs, **options), torch.zeros(inputs, **options), torch.zeros((), **options))

    @property
    def mean(self) -> Tensor:
        """The mean of x, shape (inputs,)."""
        return self.total / self.tokens

    @property
    def centred_gram(self) -> Tensor:
        """(X - mean)^T (X - mean); zero for an input that varies by no more than the rounding of its sums."""
        centred = self.gram - torch.outer(self.total, self.mean)
        varies = centred.diagonal() > ROUNDING * torch.finfo(centred.dtype).eps * self.gram.diagonal()
        return centred.mul_(varies).mul_(varies[:, None])

    def add(self, inputs: Tensor) -> None:
        """Counts inputs in, shape (..., inputs)."""
        inputs = at_least_float32(inputs.reshape(-1, inputs.shape[-1]))
        shift = inputs.mean(0)  # products in float32 would lose what varies little about a large mean
        inputs = inputs - shift
        add_gram(self.gram, inputs)
        shift, rest, tokens = shift.to(self.gram), inputs.sum(0).to(self.gram), len(inputs)
        half = rest + tokens / 2 * shift
        self.gram.addr_(shift, half).addr_(half, shift)
        self.total += rest + tokens * shift
        self.tokens += tokens


@torch.no_grad()
def visit_layers(
    model: nn.Module,
    batches: Iterable,
    visit: Callable[[str, Inputs], None],
    *,
    add_up: Callable[[Tensor], None] | None = None,
) -> None:
    """Calls `visit(name, inputs)` for each prunable weight, in the order in which they compute.

    What a visit changes about the model, later layers see in their inputs. The model runs in evaluation mode, under the
    autocast around the call, and has its modes again afterwards.

    Args:
        model: a module that uses its layers in an order that the images do not change. A weight that is used more than
            once in a pass is visited at its first use, with the inputs of that.
        batches: yields images, or tuples that begin with them. All of them are in the walk at once.
        visit: called with the name of the weight and the sums over its inputs.
        add_up: adds up a tensor of all processes, in place, where each has some of the batches, at least one.

    Raises:
        PruningError: no batches, an order that differs, and, naming the weight, one that no image reached.
    """
    pending = prunable_weights(model)
    device = next(model.parameters()).device
    autocast = partial(torch.autocast, device.type, torch.get_autocast_dtype(device.type),
                       torch.is_autocast_enabled(device.type), cache_enabled=False)  # a cache would have old weights
    batches = [images_of(batch).to(device) for batch in batches]
    if not batches:
        raise PruningError("no calibration images: expected at least one batch")
    with evaluation(model), torch.autocast(device.type, enabled=False):
        with autocast():
            units = _units(model, pending, batches[0][:1])
        with _stops(set(units.values())) as computed:
            passes = []
            try:
                while batches:  # what is passed on needs no second place here
                    passes.append(_Pass(model, batches.pop(), autocast))
                _walk(passes, units, pending, computed, autocast, visit, add_up)
            finally:
                for pass_ in passes:
                    pass_.close()


# ---- helpers, not exported ----


def _walk(passes: list, units: dict, pending: dict, computed: dict, autocast, visit, add_up) -> None:
    while any(pass_.unit is not None for pass_ in passes):
        unit = passes[0].unit
        if any(pass_.unit is not unit for pass_ in passes):
            raise PruningError("the model calls its layers in an order that depends on the images")
        while any(units[name] is unit for name in pending):
            for pass_ in passes:
                with autocast():
                    found, values = _next_layer(partial(computed[unit], *pass_.args, **pass_.kwargs), pending)
                if pass_ is passes[0]:
                    name, inputs = found, Inputs.of(pending[found]) if found else None
                if found != name:
                    raise PruningError(f"the images decide whether {name} or {found} computes first")
                if found:
                    inputs.add(values)
            if not name:
                break  # a later call of the unit uses it
            if add_up:
                for total in (inputs.gram, inputs.total, inputs.tokens):
                    add_up(total)
            visit(name, inputs)
            del pending[name]
        for pass_ in passes:
            with autocast():
                result = computed[unit](*pass_.args, **pass_.kwargs)
            pass_.go_on(result)
            del result
    _expect_none(pending)


class _Pass:
    """The forward pass of a batch, in a thread that stands still wherever a unit is called.

    Attributes:
        unit, args, kwargs: the call where it stands; no unit when the pass has ended.
    """

    def __init__(self, model: nn.Module, images: Tensor, autocast):
        self._calls, self._results = SimpleQueue(), SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(model, images, autocast), daemon=True)
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
        pass_ = getattr(threading.current_thread(), "pass_", None)  # another unit may call this one
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
        raise PruningError(f"{name} was used on none of the calibration images: expected a layer that runs")


def _next_layer(compute: Callable[[], object], pending: dict[str, Tensor]) -> tuple[str | None, Tensor | None]:
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
    """The module to stop at for each weight: the one that calls its layer, unless other units lie within that, or it
    calls many layers; then the layer."""
    names, stack, stacks = {id(weight): name for name, weight in weights.items()}, [model], {}

    def look(weight, inputs):
        if name := names.get(id(weight)):
            stacks.setdefault(name, tuple(stack))

    hooks = [nn.modules.module.register_module_forward_pre_hook(lambda module, args: stack.append(module)),
             nn.modules.module.register_module_forward_hook(lambda module, args, output: stack.pop() and None,
                                                            always_call=True)]
    try:
        with _Linears(look):
            model.forward(images)
    finally:
        for hook in hooks:
            hook.remove()
    _expect_none(name for name in weights if name not in stacks)
    callers = {name: stack[:-1] if isinstance(stack[-1], nn.Linear) and len(stack) > 1 else stack
               for name, stack in stacks.items()}
    within = {model, *(module for stack in callers.values() for module in stack[:-1])}
    within |= {module for module, layers in Counter(stack[-1] for stack in callers.values()).items()
               if layers > MOST_LAYERS}
    last = {(stacks[name] if stack[-1] in within else stack)[-1] for name, stack in callers.items()}
    return {name: next(module for module in stack if module in last) for name, stack in stacks.items()}
