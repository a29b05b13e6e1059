"""What flat shards hold, by brute force: every element is written down, padded and cut.

Nothing here knows a formula for a position or for the padding of a rank: positions are looked up in
the shards that :func:`shards_of` cuts from the numbers of all elements. :class:`Intervals`, for
layouts that are too large to write down, intersects intervals.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from conformance.harness.layout_cases import LayoutCase
from conformance.harness.memo import remembered

# Failures print the source of this function: it needs nothing but torch.


def shards_of(values: dict, dims: dict, ranks: int, tensor_ranks: int = 1) -> dict:
    """Shards by (rank, tensor rank) of whole values in the order of the buffer."""
    shards = {}
    for t in range(tensor_ranks):
        parts = [
            value.chunk(tensor_ranks, dims[name])[t] if name in dims else value
            for name, value in values.items()
        ]
        flat = torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0)
        buffer = torch.cat([flat, flat.new_zeros(-len(flat) % (32 * ranks))])
        size = len(buffer) // ranks
        for rank in range(ranks):
            shards[rank, t] = buffer[rank * size : (rank + 1) * size].clone()
    return shards


SHARDS_OF = tuple(inspect.getsource(shards_of).splitlines())
"""Lines that define it."""


# Order

ORDER = (
    (False, "split"),
    (False, "whole"),
    (False, "sequence parallel"),
    (True, "sequence parallel"),
    (True, "whole"),
    (True, "split"),
)
"""The groups of a sorted buffer: whether they decay, and how tensor-parallel ranks hold them."""


def buffer_order(case: LayoutCase) -> tuple[int, ...]:
    """Numbers of the parameters in the order of the buffer."""
    if case.decay is None:
        return tuple(range(len(case.shapes)))

    def group(number: int) -> tuple[bool, str]:
        if case.dims and case.dims[number] is not None:
            return case.decay[number], "split"
        sequence = bool(case.sequence) and case.sequence[number]
        return case.decay[number], "sequence parallel" if sequence else "whole"

    return tuple(
        number for wanted in ORDER for number in range(len(case.shapes)) if group(number) == wanted
    )


# The truth about a case


@dataclass(frozen=True)
class Truth:
    """The shards of the numbers of all elements; number 0 is padding."""

    names: tuple[str, ...]
    """In the order of the buffer."""
    numbers: dict[str, Tensor]
    """The number of each element of each whole parameter, from 1 on."""
    shards: dict[tuple[int, int], Tensor]

    @property
    def shard_size(self) -> int:
        """Elements of a shard."""
        return len(self.shards[0, 0])

    def shard_pad(self, rank: int) -> int:
        """Elements of a shard that are padding."""
        return int((self.shards[rank, 0] == 0).sum())

    def count(self) -> int:
        """Elements of a buffer that are not padding."""
        return sum(int((shard != 0).sum()) for (_, t), shard in self.shards.items() if t == 0)

    @cached_property
    def table(self) -> dict[str, tuple[int, int]]:
        """Begin and end of each parameter in the buffer; what has no element is where it would be."""
        ranks = 1 + max(rank for rank, _ in self.shards)
        buffer = torch.cat([self.shards[rank, 0] for rank in range(ranks)])
        found, behind = {}, 0
        for name in self.names:
            size = int(self._is_of(name, buffer).sum())
            found[name] = (behind, behind + size)
            behind += size
        return found

    def _is_of(self, name: str, shard: Tensor) -> Tensor:
        return torch.isin(shard, self.numbers[name])

    def range_in_shard(self, name: str, rank: int) -> tuple[int, int] | None:
        """Where a parameter is in a rank's shard; None where it is not."""
        places = self._is_of(name, self.shards[rank, 0]).nonzero().flatten().tolist()
        return (places[0], places[-1] + 1) if places else None

    def range_of_parameter(self, name: str, rank: int) -> tuple[int, int] | None:
        """Which elements of a parameter, in the order of the buffer, a rank has; None for none."""
        here = [int(self._is_of(name, self.shards[r, 0]).sum()) for r in range(rank + 1)]
        return (sum(here[:-1]), sum(here)) if here[-1] else None

    def of_values(self, values: dict[str, Tensor], rank: int, tensor_rank: int = 0) -> Tensor:
        """A rank's shard of whole values: what stands at the numbers of its elements."""
        flat = [values[name].reshape(-1) for name in self.numbers]
        padding = torch.zeros(1, dtype=flat[0].dtype if flat else torch.float32)
        return torch.cat([padding, *flat])[self.shards[rank, tensor_rank]]

    def name_of(self, number: int) -> str:
        """What the element of a number is called."""
        for name, numbers in self.numbers.items():
            at = (numbers == number).nonzero()
            if len(at):
                return f"{name}{at[0].tolist()}"
        return "padding" if number == 0 else "no element"


@remembered
def truth(case: LayoutCase, ranks: int | None = None, tensor_ranks: int | None = None) -> Truth:
    """The truth about a case, or about its parameters over other ranks."""
    ranks, tensor_ranks = ranks or case.world, tensor_ranks or case.tensor_world
    numbers, count = {}, 1
    for name, shape in case.parameters.items():
        size = torch.Size(shape).numel()
        numbers[name] = torch.arange(count, count + size).view(shape)
        count += size
    names = [list(numbers)[number] for number in buffer_order(case)]
    shards = shards_of({name: numbers[name] for name in names}, case.split, ranks, tensor_ranks)
    return Truth(tuple(names), numbers, {key: shard.long() for key, shard in shards.items()})


# Layouts that are too large to write down


@dataclass(frozen=True)
class Intervals:
    """Positions of parameters, given by their sizes, where shards have ``size`` elements."""

    sizes: tuple[tuple[str, int], ...]
    size: int

    def places(self) -> Iterator[tuple[str, int, int]]:
        """Name, begin and end of each parameter in the buffer."""
        behind = 0
        for name, size in self.sizes:
            yield name, behind, behind + size
            behind += size

    def in_shard(self, begin: int, end: int, rank: int) -> tuple[int, int] | None:
        """Where an interval of the buffer is in a rank's shard; None where it is not."""
        first, last = max(begin, rank * self.size), min(end, (rank + 1) * self.size)
        return (first - rank * self.size, last - rank * self.size) if first < last else None
