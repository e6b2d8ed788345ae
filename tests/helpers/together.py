"""Threads in the place of processes that add up their tensors."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor


def together(count: int, work: Callable[[int, Callable], object]) -> list:
    """What `work` returns for each rank; it is given a rank and a function to add up a tensor."""
    tensors: list[Tensor | None] = [None] * count
    barrier = threading.Barrier(count, timeout=60)

    def call(rank: int):
        def add_up(tensor: Tensor) -> None:
            tensors[rank] = tensor.clone()
            barrier.wait()
            total = sum(tensors)
            barrier.wait()
            tensor.copy_(total)

        try:
            return work(rank, add_up)
        except BaseException:
            barrier.abort()  # the others wait for this one
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))
