"""tests/helpers/pretend_cuda.py: devices and waits are those of a GPU, values those of the CPU."""

import copy
import inspect
import io
import threading

import pytest
import timm
import torch
from pretend_cuda import CUDA, pretend_cuda
from torch import nn


@pytest.fixture
def waits():
    with pretend_cuda() as waits:
        yield waits


def line_here() -> str:
    """The line of the caller, as waits name it."""
    return f"tests/test_pretend_cuda.py:{inspect.currentframe().f_back.f_lineno}"


# ---- devices ----


MIXED = {
    "two tensors": lambda there, here: there + here,
    "in place, on the CPU": lambda there, here: here.mul_(there),
    "a number on the CPU, in place": lambda there, here: here.sum().add_(there.sum()),
    "a layer": lambda there, here: nn.Linear(3, 3)(there),
    "a mask": lambda there, here: there.where(here > 0, 0),
    "a list": lambda there, here: torch.cat([there, here]),
    "a list of numbers": lambda there, here: torch.stack([there.sum(), here.sum()]),
    "an index on the GPU": lambda there, here: here[there > 0],
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_an_operation_that_mixes_devices_raises_an_error(waits, mix):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix(torch.ones(3, 3, device="cuda"), torch.ones(3, 3))


def test_a_number_on_the_cpu_may_meet_tensors_on_the_gpu(waits):
    there = torch.ones(3, device="cuda")
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]
    assert (there.where(there > 1, torch.tensor(5.0))).tolist() == [5, 5, 5]


def test_a_generator_of_the_other_device_raises_an_error(waits):
    there, here = torch.Generator("cuda"), torch.Generator()
    assert torch.rand(2, device="cuda", generator=there.manual_seed(0)).is_cuda
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=here)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, generator=there)
    with pytest.raises(RuntimeError, match="generator"):
        torch.ones(2, device="cuda").normal_(generator=here)


def test_numpy_wants_a_copy_on_the_cpu(waits):
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(2, device="cuda").numpy()


MADE = {
    "of a shape": lambda there: torch.zeros(2, device="cuda"),
    "of data": lambda there: torch.tensor([1, 2], device=there.device),
    "like another": torch.randn_like,
    "new, of a shape": lambda there: there.new_full((2,), 3),
    "new, of data": lambda there: there.new_tensor([1, 2]),
    "as another": lambda there: torch.ones(2).to(there),
    "from the CPU": lambda there: torch.ones(2).cuda(),
    "computed": lambda there: (there @ there.T).double().softmax(0)[0],
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_is_made_on_the_gpu_is_there(waits, make):
    made = make(torch.ones(2, 2, device="cuda"))
    assert made.device == CUDA and made.is_cuda and not made.is_cpu


def test_what_is_made_on_the_cpu_is_there(waits):
    there = torch.ones(2, device="cuda")
    assert torch.ones(2).is_cpu
    assert torch.zeros_like(there, device="cpu").is_cpu
    assert there.cpu().is_cpu and there.to("cpu").is_cpu


def test_threads_see_the_gpu_as_well(waits):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(2, device="cuda").is_cuda))
    thread.start()
    thread.join()
    assert found == [True]


def test_a_copy_of_another_stream_is_waited_for_and_recorded_before_it_is_used(waits):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        copied = torch.ones(2).to("cuda", non_blocking=True)
        assert (copied + 1).is_cuda  # on its own stream
    main = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="record_stream"):
        main.wait_stream(side)
        copied + 1
    copied.record_stream(main)
    assert (copied + 1).tolist() == [2, 2]

    with torch.cuda.stream(side):
        copied = torch.ones(2).to("cuda", non_blocking=True)
    copied.record_stream(main)
    with pytest.raises(RuntimeError, match="wait_stream"):
        copied + 1


def test_everything_is_as_it_was_afterwards():
    before = torch.cuda.is_available(), torch.Generator, torch.autocast.__init__
    with pytest.raises(KeyError), pretend_cuda():
        assert torch.cuda.is_available()
        raise KeyError
    assert (torch.cuda.is_available(), torch.Generator, torch.autocast.__init__) == before
    assert torch.ones(2).to("cpu").is_cpu


# ---- waits ----

WAITS = {
    "item": lambda there: there.sum().item(),
    "bool": lambda there: bool((there > 0).all()),
    "float": lambda there: float(there.sum()),
    "list": lambda there: there.tolist(),
    "cpu": lambda there: there.cpu(),
    "to": lambda there: there.to("cpu", torch.float64),
    "nonzero": lambda there: there.nonzero(),
    "where": lambda there: torch.where(there > 0),
    "bools": lambda there: there[there > 0],
    "bools, in place": lambda there: there.index_put_((there > 0,), there[0, 0]),
    "an index of the CPU": lambda there: there[torch.tensor([0, 1])],
    "a number as index": lambda there: there[torch.zeros((), dtype=torch.long, device="cuda")],
    "unique": lambda there: there.unique(),
    "equal": lambda there: there.equal(there),
    "decomposition": lambda there: torch.linalg.cholesky(there + torch.eye(3, device="cuda")),
    "into the CPU": lambda there: torch.zeros(3, 3).copy_(there),
    "from the CPU": lambda there: torch.ones(2).to("cuda"),
    "of data": lambda there: torch.tensor([1.0], device="cuda"),
    "pickle": lambda there: torch.save(there, io.BytesIO()),
    "synchronize": lambda there: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_wait_is_counted_once_with_its_line(waits, wait):
    there = torch.ones(3, 3, device="cuda")
    assert not waits
    wait(there)
    (place,) = waits
    assert waits[place] == 1
    assert place.endswith(f"at tests/test_pretend_cuda.py:{wait.__code__.co_firstlineno}")


def test_waits_of_a_library_are_those_of_the_line_that_called_it(waits):
    logits, targets = torch.ones(2, 6, device="cuda"), torch.zeros(2, dtype=torch.long).cuda()
    waits.clear()
    place, _ = line_here(), float(timm.utils.accuracy(logits, targets)[0])
    assert dict(waits) == {f"item at {place}": 1}


def test_what_does_not_wait_is_not_counted(waits):
    there = torch.randn(3, 3, device="cuda", requires_grad=True)
    images = torch.randn(2, 3).to("cuda", non_blocking=True)
    (images @ there).square().sum().backward()
    with torch.no_grad():
        there[there > 0] = 0.0
        there[0] = there[1] * torch.tensor(2.0)
        there.copy_(there.masked_fill(there > 1, 0).sort().values.topk(3).values)
    assert len(there) == 3 and there.shape == (3, 3) and not waits
    assert torch.ones(2).sum().item() == 2 and not waits  # of the CPU


# ---- values ----


def trained(device: str, dtype=torch.float32, fused=False, images_of_step=2) -> list[torch.Tensor]:
    """The weights and the last logits of three steps of a tiny transformer."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2)
    model = copy.deepcopy(model.to(device))
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    for _ in range(3):
        images = torch.randn(images_of_step, 3, 32, 32).to(device, non_blocking=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(images).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    written.seek(0)
    return list(torch.load(written, weights_only=True).values()) + [loss.detach().cpu()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_the_cpu(dtype):
    here = trained("cpu", dtype)
    with pretend_cuda():
        there = trained("cuda", dtype)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_fused_optimizer_steps_as_on_the_cpu():
    here = trained("cpu", fused=True, images_of_step=1)
    with pretend_cuda():
        there = trained("cuda", fused=True, images_of_step=1)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_parameter_that_moves_stays_the_same_object(waits):
    layer = nn.Linear(3, 3)
    weight = layer.weight
    layer.to("cuda")
    assert layer.weight is weight and weight.is_cuda and isinstance(weight, nn.Parameter)
    weight.data = torch.zeros(3, 3, device="cuda")
    assert weight.sum().item() == 0
    assert layer.cpu().weight.is_cpu


def test_gradients_pass_from_one_device_to_the_other(waits):
    there = torch.ones(2, device="cuda", requires_grad=True)
    here = torch.ones(2, requires_grad=True)
    (there.cpu() * here + (here.cuda() * there).cpu()).sum().backward()
    assert there.grad.is_cuda and there.grad.tolist() == [2, 2]
    assert here.grad.is_cpu and here.grad.tolist() == [2, 2]
