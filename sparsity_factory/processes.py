"""Processes that share work out, each with the same model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """Processes that each do a part of the work; by default this one does all of it.

    Whatever they join is the same on all of them, to the bit.

    rank: the number of this process, from 0.
    count: how many there are.
    add_up: called on all of them with tensors of one shape and dtype, in the same order; adds up
        these tensors in place, as `torch.distributed.all_reduce` does.
    """

    rank: int = 0
    count: int = 1
    add_up: Callable[[Tensor], object] | None = None

    @classmethod
    def meet(
        cls, rank: int | None, add_up: Callable[[Tensor], object] | None, device: torch.device
    ) -> "Processes":
        """Those that call this with a rank and `add_up`; the device is that of their tensors."""
        if rank is None or add_up is None:
            return cls()
        ones = torch.ones(1, device=device)
        add_up(ones)
        return cls(rank, int(ones), add_up)

    def least(self, value: float, device: torch.device) -> float:
        """The least value of all processes."""
        if self.add_up is None:
            return value
        values = torch.zeros(self.count, dtype=torch.float64, device=device)
        values[self.rank] = value
        self.add_up(values)
        return float(values.min())

    def rows(self, count: int) -> slice:
        """Of so many rows those of this process; all if there are too few for each to have one."""
        if count < self.count:
            return slice(0, count)
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def joined(self, own: Tensor, count: int) -> Tensor:
        """All `count` rows, of which each process calls this with its own."""
        if self.add_up is None:
            return own
        dtype = torch.uint8 if own.dtype == torch.bool else own.dtype
        whole = torch.zeros(count, *own.shape[1:], dtype=dtype, device=own.device)

        # Where each has all rows, those of the first process count
        if len(own) < count or self.rank == 0:
            whole[self.rows(count)] = own
        self.add_up(whole)
        return whole.to(own.dtype)

    def owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The process that handles each piece of work, the largest first."""
        loads = [0] * self.count
        found = {}
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            found[name] = loads.index(min(loads))
            loads[found[name]] += sizes[name]
        return found


ALONE = Processes()
