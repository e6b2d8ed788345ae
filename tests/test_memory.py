"""How much memory is free, as the system and the container say."""

import pytest
import torch
from pretend_cuda import pretend_cuda

from sparsity_factory import memory
from sparsity_factory.memory import UNKNOWN, free_memory

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)

    def write(**contents):
        for name, text in contents.items():
            (tmp_path / name.replace("_", ".")).write_text(text)

    return write


def test_it_is_what_the_system_has_or_what_the_container_is_left(files):
    assert free_memory(CPU) == UNKNOWN
    files(meminfo="MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    assert free_memory(CPU) == 5000 * 1024
    files(memory_max="max\n", memory_current="700\n", memory_stat="anon 500\ninactive_file 200\n")
    assert free_memory(CPU) == 5000 * 1024
    files(memory_max="1000\n")
    assert free_memory(CPU) == 500  # cached files make room
    files(memory_max="100\n")
    assert free_memory(CPU) == 0


def test_on_a_gpu_the_blocks_that_the_process_keeps_are_free(monkeypatch):
    with pretend_cuda():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
        assert free_memory(torch.device("cuda", 0)) == 1300
