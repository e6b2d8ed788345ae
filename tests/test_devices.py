import pytest
import torch
from pretend_cuda import CUDA, pretend_cuda

import utils
from trainer.arguments import parse_args
from trainer.builders import choose_compute
from utils import Compute, OnDevice

MATMUL = torch.backends.cuda.matmul
CUDNN = torch.backends.cudnn


@pytest.fixture(autouse=True)
def settings_of_torch():
    """Restores what the tests change."""
    before = MATMUL.allow_tf32, CUDNN.allow_tf32, CUDNN.benchmark
    yield
    MATMUL.allow_tf32, CUDNN.allow_tf32, CUDNN.benchmark = before


def settings_after(monkeypatch, device, *flags):
    MATMUL.allow_tf32, CUDNN.allow_tf32, CUDNN.benchmark = False, True, False
    monkeypatch.setattr("utils.devices.choose_device", lambda name: torch.device(device))
    choose_compute(parse_args([*flags, "--amp", "off"]))
    return MATMUL.allow_tf32, CUDNN.allow_tf32, CUDNN.benchmark


def test_a_gpu_computes_in_tf32_and_times_its_convolutions_unless_flags_say_no(monkeypatch):
    assert settings_after(monkeypatch, "cuda:0") == (True, True, True)
    assert settings_after(monkeypatch, "cuda:0", "--no-tf32") == (False, False, True)
    assert settings_after(monkeypatch, "cuda:0", "--no-cudnn-benchmark") == (True, True, False)


def test_flags_of_a_gpu_change_nothing_on_a_cpu(monkeypatch):
    assert settings_after(monkeypatch, "cpu") == (False, True, False)


def test_calibration_computes_in_full_precision(run_main, tiny, monkeypatch):
    """Statistics, and what a reconstruction computes between the layers of its walk."""
    seen = []

    def note(name):
        function = getattr(torch.linalg, name)

        def noting(*arguments, **options):
            seen.append(MATMUL.allow_tf32)
            return function(*arguments, **options)

        monkeypatch.setattr(torch.linalg, name, noting)

    note("cholesky_ex")
    Compute(torch.device("cuda", 0)).tune(tf32=True, cudnn_benchmark=False)
    recipe = ["--pruner", "unif", "--sparsity", "0.5", "--calibration-images", "32"]
    run_main(*tiny, *recipe, "--reconstruct", "obs", "--eval")
    assert seen and not any(seen)
    assert MATMUL.allow_tf32

    with pytest.raises(ValueError), utils.full_precision():
        assert not MATMUL.allow_tf32 and not CUDNN.allow_tf32
        raise ValueError
    assert MATMUL.allow_tf32 and CUDNN.allow_tf32


class Loader(list):
    """Batches, of which `read` says how many were taken."""

    read = 0

    def __iter__(self):
        self.read = 0
        for batch in super().__iter__():
            self.read += 1
            yield batch


@pytest.fixture
def loader():
    return Loader((torch.full((2, 3), number), torch.tensor([number] * 2)) for number in range(3))


def test_on_the_cpu_batches_are_those_of_the_loader_one_at_a_time(loader):
    batches = OnDevice(loader, torch.device("cpu"))
    assert len(batches) == 3
    for number, (images, targets) in enumerate(batches):
        assert loader.read == number + 1
        assert images is loader[number][0] and targets is loader[number][1]


def test_on_a_gpu_the_next_batch_is_copied_ahead_without_a_wait(loader):
    with pretend_cuda() as waits:
        for _ in range(2):  # two epochs
            seen = []
            for number, (images, targets) in enumerate(OnDevice(loader, CUDA)):
                assert loader.read == min(number + 2, 3)
                assert images.is_cuda and targets.is_cuda
                seen.append(images + targets[:, None])  # an operation on the model's stream
            assert not waits
            assert [values.cpu()[0, 0].item() for values in seen] == [0, 2, 4]
            waits.clear()


def test_a_loader_without_batches_has_none_on_a_gpu():
    with pretend_cuda():
        assert list(OnDevice([], CUDA)) == []


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_loader(loader):
    device = torch.device("cuda")
    for pinned in (False, True):
        batches = [[v.pin_memory() for v in batch] for batch in loader] if pinned else loader
        for expected, found in zip(loader, OnDevice(batches, device), strict=True):
            assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True))
