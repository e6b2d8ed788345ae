import pytest
import torch

import utils
from trainer.arguments import parse_args
from trainer.builders import choose_compute
from utils import Compute

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
