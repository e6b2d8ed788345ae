"""A GPU for machines without one: tensors that say they are on cuda:0 and live in the CPU's memory.

    with pretend_cuda() as waits:
        model.to("cuda")    # torch.cuda.is_available() is true, and values are those of the CPU

Three kinds of mistakes show under it:

- An operation that mixes tensors of both devices raises an error as on CUDA. As there, a single
  number on the CPU may meet tensors on the GPU.
- `waits` counts what makes the host wait for a GPU, by kind and by the line of this project that
  asked: `item at engine.py:120`. On a GPU each of them empties its queue of work.
- What is copied on a stream of its own, and used on another that does not wait for it, or without
  `record_stream`, raises an error.

What it does not see: wrong kernels, memory and speed; several processes, data workers,
torch.compile, CUDA graphs; what autocast does on CUDA alone; the foreach and the fused paths of
optimizers, which torch takes only for its own class of tensor; copies that are wrongly
non-blocking; in-place operations that change a shape. A file that is loaded comes back on the CPU.

It works on Python's level. If C++ knew that a tensor is on CUDA, autograd would ask the driver for
a stream, and fail.
"""

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)

#: Operations whose result, or whose shape, the host needs to know. Python's `item`, `bool`, `float`,
#: `int` and `if` are all the first of them.
WAITS = {
    "aten::_local_scalar_dense": "item",
    "aten::_linalg_check_errors": "check of a decomposition",
    "aten::_unique": "unique",
    "aten::_unique2": "unique",
    "aten::allclose": "allclose",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "aten::histc": "histc",
    "aten::masked_select": "index by bools",
    "aten::nonzero": "nonzero",
    "aten::repeat_interleave": "repeat_interleave",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim": "unique",
}
COPIES = ("aten::copy_", "aten::_foreach_copy_")
INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")
#: Operations that want even single numbers on the same device.
STRICT = ("aten::cat", "aten::stack")


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Counter]:
    """Tensors can be on cuda:0 within. Yields the counter of waits, empty at first."""
    _waits.clear()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        # A parameter that moves stays the same object, though its class changes.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        for owner, stand_ins in _stand_ins():
            for name, stand_in in stand_ins.items():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, stand_in)
        stack.enter_context(_Functions())
        stack.enter_context(_Operations())
        yield _waits


class PretendTensor(Tensor):
    """Says that it is on cuda:0; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )
        tensor.inner = inner
        tensor.lacks = set()  # what a copy of another stream still needs before it is used
        return tensor

    def record_stream(self, stream: "_Stream") -> None:
        self.lacks.discard("record_stream")

    def __repr__(self, **_):
        return f"PretendTensor({self.inner})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Answers what C++ would answer as for a tensor of the CPU."""
        kwargs = kwargs or {}
        if function in _METHODS:
            return _METHODS[function](*args, **kwargs)
        device = kwargs.pop("device", None)
        if device is not None and not _is_cuda(device):
            return function(*args, **kwargs).inner  # as torch.zeros_like(..., device="cpu")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


# ---- waits ----

_waits: Counter = Counter()


def _wait(kind: str) -> None:
    """Counts a wait at the innermost line of the project outside of this file."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            break
        frame = frame.f_back
    place = f"{path.relative_to(ROOT)}:{frame.f_lineno}" if frame else "elsewhere"
    _waits[f"{kind} at {place}"] += 1


# ---- streams ----


class _Stream:
    """A stream. What is copied on it is ready for another one that waits, and is safe from being
    overwritten there after `record_stream`.
    """

    def __init__(self, device=None):
        self.copies: list[PretendTensor] = []

    def wait_stream(self, other: "_Stream") -> None:
        for tensor in other.copies:
            tensor.lacks.discard("wait_stream")
        other.copies.clear()

    def synchronize(self) -> None:
        _wait("synchronize")


_streams = [_Stream()]  # the innermost one last


@contextlib.contextmanager
def _on_stream(stream: _Stream) -> Iterator[None]:
    """`torch.cuda.stream`."""
    _streams.append(stream)
    try:
        yield
    finally:
        _streams.pop()


def _note_stream(tensor: Tensor) -> None:
    """Notes a copy that is made on a stream of its own."""
    if len(_streams) > 1:
        tensor.stream = _streams[-1]
        tensor.lacks = {"wait_stream", "record_stream"}
        tensor.stream.copies.append(tensor)


def _check_streams(name: str, leaves: list) -> None:
    for tensor in leaves:
        lacks = isinstance(tensor, PretendTensor) and tensor.lacks
        if lacks and tensor.stream is not _streams[-1]:
            raise RuntimeError(f"a copy of another stream without {', '.join(lacks)} ({name})")


# ---- from one memory to the other ----


class _Down(torch.autograd.Function):
    """To the CPU."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.inner.clone()

    @staticmethod
    def backward(ctx, gradient):
        return PretendTensor(gradient)


class _Up(torch.autograd.Function):
    """To the GPU."""

    @staticmethod
    def forward(ctx, tensor):
        return PretendTensor(tensor.clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.inner


def _to(tensor: Tensor, *args, copy=False, **kwargs) -> Tensor:
    """`Tensor.to`."""
    if args and isinstance(args[0], Tensor):  # tensor.to(other)
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[:3], **kwargs)
    moves = device is not None and device.type != tensor.device.type

    with torch._C.DisableTorchFunctionSubclass():
        options = {"memory_format": memory_format} if memory_format is not None else {}
        result = Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy and not moves, **options)
    if not moves:
        return result
    if not non_blocking:
        _wait(f"to {device.type}")
    if device.type == "cpu":
        return _Down.apply(result)
    copied = _Up.apply(result)
    _note_stream(copied)
    return copied


def _cpu(tensor: Tensor, *_) -> Tensor:
    return _to(tensor, CPU)


def _cuda(tensor: Tensor, device=None, non_blocking=False, **_) -> Tensor:
    return _to(tensor, CUDA, non_blocking=non_blocking)


def _tolist(tensor: Tensor) -> list:
    _wait("tolist")
    return tensor.inner.tolist()


def _numpy(tensor: Tensor, *_, **__):
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


def _one_hot(classes: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes == -1:
        _wait("one_hot")
    return PretendTensor(torch.nn.functional.one_hot(classes.inner, num_classes))


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """`tensor.data = data`."""
    if isinstance(tensor, PretendTensor) != isinstance(data, PretendTensor):
        raise NotImplementedError("pretend_cuda: .data of the other device")
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(tensor, data)
    tensor.inner = data.inner


def _reduce(tensor: Tensor, protocol: int):
    """For pickle and torch.save."""
    _wait("pickle")
    copy = tensor.inner.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        copy = torch.nn.Parameter(copy, tensor.requires_grad)
    return copy.__reduce_ex__(protocol)


def _tensor(data, *, device=None, make=torch.tensor, **kwargs) -> Tensor:
    """`torch.tensor`, or what else makes a tensor of plain data."""
    made = make(data, **kwargs)
    return made if device is None else _to(made, torch.device(device))


def _as_tensor(data, **kwargs) -> Tensor:
    return _tensor(data, make=torch.as_tensor, **kwargs)


def _new_tensor(tensor: Tensor, data, *, dtype=None, device=CUDA, **kwargs) -> Tensor:
    return _tensor(data, dtype=dtype or tensor.dtype, device=device, **kwargs)


#: What a PretendTensor answers itself.
_METHODS: dict[Callable, Callable] = {
    Tensor.__array__: _numpy,
    Tensor.__reduce_ex__: _reduce,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
    Tensor.data.__set__: _set_data,
    Tensor.device.__get__: lambda tensor: CUDA,
    Tensor.get_device: lambda tensor: 0,
    Tensor.is_cpu.__get__: lambda tensor: False,
    Tensor.is_cuda.__get__: lambda tensor: True,
    Tensor.new_tensor: _new_tensor,
    Tensor.numpy: _numpy,
    Tensor.to: _to,
    Tensor.tolist: _tolist,
    torch.nn.functional.one_hot: _one_hot,
}


# ---- operations ----


def _run(operation, args: tuple, kwargs: dict) -> Any:
    """An operation on the values, after a look at where its arguments say that they are."""
    name = operation._schema.name
    leaves = tree_leaves((args, kwargs))
    there = any(isinstance(x, PretendTensor) for x in leaves)
    # C++ takes the device of a new tensor from another one, and says that it is the CPU
    goes_there = there or _is_cuda(kwargs.get("device"))
    if there:
        _check_devices(name, operation._schema.is_mutable, args, leaves)
        _check_streams(name, leaves)
    _count_waits(name, args, kwargs, there, goes_there)

    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if "device" in kwargs:
        inner_kwargs["device"] = CPU
    if "pin_memory" in kwargs:
        inner_kwargs["pin_memory"] = False
    result = operation(*inner_args, **inner_kwargs)

    if name in COPIES:
        return args[0] if name == "aten::copy_" else result
    if goes_there:
        result = tree_map(_outer, result)
    return return_and_correct_aliasing(operation, args, kwargs, result) if there else result


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _inner(value):
    return value.inner if isinstance(value, PretendTensor) else value


def _outer(value):
    is_plain = isinstance(value, Tensor) and not isinstance(value, PretendTensor)
    return PretendTensor(value) if is_plain else value


def _on_cpu(value) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, PretendTensor)


def _check_devices(name: str, in_place: bool, args: tuple, leaves: list) -> None:
    """Raises a RuntimeError, as CUDA does, for a tensor on the CPU that may not be there."""
    if name in COPIES:
        return
    if name in INDEXES and not _on_cpu(args[0]):
        leaves = args[2:]  # the indices may be on the CPU
    strangers = [x for x in leaves if _on_cpu(x)]
    changes_cpu = in_place and _on_cpu(args[0])
    if changes_cpu or name in STRICT and strangers or any(x.dim() for x in strangers):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({name})"
        )


def _count_waits(name: str, args: tuple, kwargs: dict, there: bool, goes_there: bool) -> None:
    if name in COPIES and there:
        blocks = not (kwargs.get("non_blocking") or len(args) > 2 and args[2])
        sources = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        targets = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
        for target, source in zip(targets, sources, strict=True):
            if blocks and _on_cpu(target) != _on_cpu(source):
                _wait("copy_ to cpu" if _on_cpu(target) else "copy_ to cuda")
    elif name == "aten::_to_copy" and there != goes_there and not kwargs.get("non_blocking"):
        _wait("to cuda" if goes_there else "to cpu")  # as torch.tensor(..., device="cuda") does
    elif name in INDEXES and there:
        _count_waits_of_index(args)
    elif name in WAITS and there:
        _wait(WAITS[name])


def _count_waits_of_index(args: tuple) -> None:
    indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
    if any(_on_cpu(x) for x in indices):
        _wait("index of the cpu")
    # A number where bools are true is written without a look at them.
    fills = len(args) > 2 and len(indices) == 1 and _on_cpu(args[2]) and not args[2].dim()
    if any(x.dtype == torch.bool for x in indices) and not fills:
        _wait("index by bools")


class _Operations(TorchDispatchMode):
    """Finds operations without a PretendTensor that make one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Finds tensors of the CPU that move to the GPU, and generators of the wrong device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            _check_generator(args, **kwargs)
        if function in _FUNCTIONS:
            return _FUNCTIONS[function](*args, **kwargs)
        return function(*args, **kwargs)


#: What is answered for tensors of the CPU as well, and for plain data.
_FUNCTIONS: dict[Callable, Callable] = {
    Tensor.cuda: _cuda,
    Tensor.pin_memory: lambda tensor, device=None: tensor.clone(),
    Tensor.to: _to,
    torch.as_tensor: _as_tensor,
    torch.tensor: _tensor,
}


def _check_generator(args: tuple, generator, device=None, **_) -> None:
    """Raises a RuntimeError, as CUDA does, for a generator of the other device."""
    there = any(isinstance(x, PretendTensor) for x in tree_leaves(args))
    there = there if device is None else _is_cuda(device)
    expected = "cuda" if there else "cpu"
    found = generator.pretended.type
    if found != expected:
        raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{found}'")


# ---- what torch answers about the machine ----


class _Generator(torch.Generator):
    """Random numbers are those of the CPU."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.pretended = torch.device(device)
        return generator


def _in_groups(group: Callable) -> Callable:
    """A function that groups lists of tensors by their device and dtype."""

    def in_groups(lists, with_indices=False):
        groups = {}
        for (_, dtype), (members, indices) in group(lists, with_indices).items():
            first = next(x for x in members[0] if x is not None)
            groups[first.device, dtype] = (members, indices)
        return groups

    return in_groups


def _in_modes(run: Callable) -> Callable:
    """`Thread.run`; modes belong to a thread."""

    def run_in_modes(thread):
        with _Functions(), _Operations():
            run(thread)

    return run_in_modes


def _on_cpu_type(function: Callable) -> Callable:
    """A function of torch whose argument is the type of a device."""

    def asked_of_cpu(device_type=None, *args):
        if device_type is None:
            return function()
        return function("cpu" if device_type == "cuda" else device_type, *args)

    return asked_of_cpu


def _autocast_on_cpu(init: Callable) -> Callable:
    """`torch.autocast.__init__`."""

    def init_on_cpu(self, device_type, *args, **kwargs):
        init(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return init_on_cpu


def _stand_ins() -> list[tuple[Any, dict[str, Any]]]:
    """What to replace: modules and classes, and by name what to put into them."""
    cuda = {
        "Stream": _Stream,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: _streams[-1],
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "pretended GPU",
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_initialized": lambda: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (2**40, 2**40),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "set_device": lambda device: None,
        "stream": _on_stream,
        "synchronize": lambda device=None: _wait("synchronize"),
    }
    by_device = "_group_tensors_by_device_and_dtype"
    of_device_types = ("get_autocast_dtype", "is_autocast_enabled")
    return [
        (torch.cuda, cuda),
        (torch, {name: _on_cpu_type(getattr(torch, name)) for name in of_device_types}),
        (torch, {"Generator": _Generator}),
        (torch._C, {by_device: _in_groups(getattr(torch._C, by_device))}),
        (torch.autocast, {"__init__": _autocast_on_cpu(torch.autocast.__init__)}),
        (torch.optim.Optimizer, {"_accelerator_graph_capture_health_check": lambda self: None}),
        (threading.Thread, {"run": _in_modes(threading.Thread.run)}),
    ]
