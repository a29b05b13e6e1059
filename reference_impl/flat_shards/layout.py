"""Where each element of each parameter lies: the flat buffer, its shards, and what overlaps what.

Parameters lie one behind the other in the buffer, each flattened in C order, without gaps. The buffer
is padded at its end, to a multiple of ``SHARD_PAD_TO_MULTIPLE`` elements a rank, and cut into shards
of one size; rank r owns elements ``[r * shard_size, (r + 1) * shard_size)``. Padding may fill the
shards of several of the last ranks. No tensor is made here: all of this is arithmetic.

Source: ServiceNow/Fast-LLM, ``engine/multi_stage/fsdp.py``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

SHARD_PAD_TO_MULTIPLE = 32
"""Elements, in every dtype."""


@dataclass(frozen=True)
class ParameterMeta:
    """What is known of a parameter without its values."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter, before tensor parallelism."""
    tensor_parallel_dim: int | None = None
    """The axis that tensor-parallel ranks split evenly, or None where each of them holds all of it."""
    requires_grad: bool = True
    weight_decay: bool = True
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks hold the same values but see different tokens."""
    allow_no_grad: bool = False
    """Whether a gradient that never arrives is zero; otherwise it is an error."""

    def __post_init__(self) -> None:
        dim = self.tensor_parallel_dim
        if dim is not None and not 0 <= dim < len(self.shape):
            raise ValueError(f"{self.name} of shape {list(self.shape)} has no axis {dim} to split")

    def local_shape(self, tensor_ranks: int = 1) -> tuple[int, ...]:
        """The shape on one of ``tensor_ranks`` ranks; raises ValueError if they do not divide it."""
        dim = self.tensor_parallel_dim
        if dim is None:
            return self.shape
        if self.shape[dim] % tensor_ranks:
            raise ValueError(
                f"{self.name}: {tensor_ranks} tensor-parallel ranks do not divide axis {dim} of "
                f"shape {list(self.shape)}"
            )
        split = self.shape[dim] // tensor_ranks
        return (*self.shape[:dim], split, *self.shape[dim + 1 :])


def buffer_order(parameters: Iterable[ParameterMeta]) -> list[ParameterMeta]:
    """Parameters in the order of the buffer: without weight decay first, split ones last.

    Those that are alike stay in the order given.
    """
    return sorted(parameters, key=_place)


def _place(parameter: ParameterMeta) -> tuple[bool, bool, bool]:
    decay = parameter.weight_decay
    split = parameter.tensor_parallel_dim is not None
    sequence_parallel = parameter.sequence_parallel and not split
    return decay, decay == split, decay != sequence_parallel


def global_pad(count: int, ranks: int) -> int:
    """Elements of padding behind ``count`` elements; at most ``32 * ranks - 1``."""
    return -count % (ranks * SHARD_PAD_TO_MULTIPLE)


def shard_size(count: int, ranks: int) -> int:
    """Elements of every rank's shard, padding included."""
    return (count + global_pad(count, ranks)) // ranks


def shard_pad(count: int, ranks: int, rank: int) -> int:
    """Elements of padding at the end of the shard of ``rank``: those that later shards cannot hold."""
    size = shard_size(count, ranks)
    return clamp(global_pad(count, ranks) - size * (ranks - rank - 1), 0, size)


def clamp(value: int, low: int, high: int) -> int:
    """``value``, or the bound that it is beyond."""
    return min(max(value, low), high)


@dataclass(frozen=True)
class FlatLayout:
    """The layout of a list of parameters over ranks; positions are counted in elements.

    ``parameters`` are in buffer order, see :func:`buffer_order`. Raises ValueError for a name that is
    there twice, fewer than one rank, or an axis that tensor-parallel ranks do not divide.
    """

    parameters: tuple[ParameterMeta, ...]
    ranks: int = 1
    """Data-parallel ranks, which shard the buffer."""
    tensor_ranks: int = 1
    """Tensor-parallel ranks, of which each has a buffer of its own, laid out alike."""

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.tensor_ranks < 1:
            raise ValueError(f"{self.ranks} ranks, {self.tensor_ranks} tensor-parallel ranks")
        twice = len(self.parameters) - len(self._number)
        if twice:
            names = [parameter.name for parameter in self.parameters]
            name = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two parameters are called {name}")
        _ = self._bounds  # raises for axes that cannot be split

    @cached_property
    def _number(self) -> dict[str, int]:
        return {parameter.name: number for number, parameter in enumerate(self.parameters)}

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [parameter.local_shape(self.tensor_ranks) for parameter in self.parameters]

    @cached_property
    def _bounds(self) -> list[int]:
        return [0, *accumulate(math.prod(shape) for shape in self._shapes)]

    # The buffer

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters in buffer order."""
        return tuple(self._number)

    @property
    def parameter_count(self) -> int:
        """Elements of all parameters, without padding."""
        return self._bounds[-1]

    def meta(self, name: str) -> ParameterMeta:
        """What is known of a parameter; raises KeyError with the name for one that is not here."""
        return self.parameters[self._number[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter on one tensor-parallel rank."""
        return self._shapes[self._number[name]]

    def begin(self, name: str) -> int:
        """Where a parameter begins in the buffer."""
        return self._bounds[self._number[name]]

    def end(self, name: str) -> int:
        """Where a parameter ends in the buffer; it begins there too if it has no elements."""
        return self._bounds[self._number[name] + 1]

    def table(self) -> dict[str, tuple[int, int]]:
        """Begin and end of every parameter, in buffer order."""
        return dict(zip(self._number, pairwise(self._bounds)))

    # Shards

    @property
    def global_pad(self) -> int:
        """Elements of padding at the end of the buffer."""
        return global_pad(self.parameter_count, self.ranks)

    @property
    def shard_size(self) -> int:
        """Elements of every shard, padding included."""
        return shard_size(self.parameter_count, self.ranks)

    @property
    def buffer_size(self) -> int:
        """Elements of the buffer, padding included."""
        return self.ranks * self.shard_size

    def shard_pad(self, rank: int) -> int:
        """Elements of padding at the end of the shard of ``rank``."""
        self._check_rank(rank)
        return shard_pad(self.parameter_count, self.ranks, rank)

    def shard_begin(self, rank: int) -> int:
        """Where the shard of ``rank`` begins in the buffer."""
        self._check_rank(rank)
        return rank * self.shard_size

    def buffer_to_shard(self, index: int, rank: int) -> int:
        """The place of a buffer element in the shard of ``rank``, or the end that it lies beyond.

        Padding belongs to no place; it is that of ``rank``, whichever rank asks.
        """
        used = self.shard_size - self.shard_pad(rank)
        return clamp(index - self.shard_begin(rank), 0, used)

    def buffer_to_parameter(self, index: int, name: str) -> int:
        """The place of a buffer element in a parameter, or the end that it lies beyond."""
        return clamp(index - self.begin(name), 0, self.end(name) - self.begin(name))

    def range_in_shard(self, name: str, rank: int) -> tuple[int, int]:
        """Where a parameter begins and ends in the shard of ``rank``; alike if it is not there."""
        return (
            self.buffer_to_shard(self.begin(name), rank),
            self.buffer_to_shard(self.end(name), rank),
        )

    def range_of_parameter(self, name: str, rank: int) -> tuple[int, int]:
        """Which of a parameter's elements, counted in C order, the shard of ``rank`` holds."""
        begin = self.shard_begin(rank)
        return (
            self.buffer_to_parameter(begin, name),
            self.buffer_to_parameter(begin + self.shard_size, name),
        )

    def size_in_shard(self, name: str, rank: int) -> int:
        """How many of a parameter's elements the shard of ``rank`` holds."""
        begin, end = self.range_in_shard(name, rank)
        return end - begin

    def names_in_shard(self, rank: int) -> tuple[str, ...]:
        """Names of the parameters that the shard of ``rank`` holds elements of, in buffer order."""
        begin = self.shard_begin(rank)
        first = max(bisect_right(self._bounds, begin) - 1, 0)
        last = bisect_left(self._bounds, begin + self.shard_size)
        return tuple(
            parameter.name
            for number, parameter in enumerate(self.parameters[first:last], first)
            if self._bounds[number] < self._bounds[number + 1]
        )

    def over(self, ranks: int, tensor_ranks: int | None = None) -> FlatLayout:
        """The same parameters over other ranks."""
        return FlatLayout(self.parameters, ranks, tensor_ranks or self.tensor_ranks)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} is not one of {self.ranks} ranks")


# Overlaps of two layouts


@dataclass(frozen=True)
class Overlap:
    """Elements that two shards both hold, one behind the other in both."""

    name: str
    source: int
    """Where they begin in the shard that is read."""
    target: int
    """Where they begin in the shard that is written."""
    count: int


def overlaps(
    source: FlatLayout,
    source_rank: int,
    target: FlatLayout,
    target_rank: int,
    *,
    source_tensor_rank: int = 0,
    target_tensor_rank: int = 0,
) -> Iterator[Overlap]:
    """What a shard of one layout holds of a shard of another, for the parameters that both have.

    A parameter that tensor-parallel ranks of the source all hold is taken from the first of them
    alone, so that each element comes from one place. Raises ValueError where the shapes of a
    parameter of the target's shard differ.
    """
    for name in target.names_in_shard(target_rank):
        if name not in source._number:
            continue
        old, new = source.meta(name), target.meta(name)
        if old.shape != new.shape:
            raise ValueError(f"{name} has shape {list(old.shape)}, expected {list(new.shape)}")
        if old.tensor_parallel_dim is None and source_tensor_rank:
            continue
        mine = target.range_of_parameter(name, target_rank)
        theirs = source.range_of_parameter(name, source_rank)
        if mine[0] == mine[1] or theirs[0] == theirs[1]:
            continue
        from_shard = source.range_in_shard(name, source_rank)[0] - theirs[0]
        to_shard = target.range_in_shard(name, target_rank)[0] - mine[0]
        one = Slice.of(old, source.tensor_ranks, source_tensor_rank)
        other = Slice.of(new, target.tensor_ranks, target_tensor_rank)
        for run in one.common_runs(other):
            low = max(run.first, theirs[0], run.first + mine[0] - run.second)
            high = min(run.first + run.count, theirs[1], run.first + mine[1] - run.second)
            if low < high:
                place = run.second + low - run.first
                yield Overlap(name, from_shard + low, to_shard + place, high - low)


@dataclass(frozen=True)
class Run:
    """Elements that lie one behind the other in two slices of a parameter."""

    first: int
    second: int
    count: int


@dataclass(frozen=True)
class Slice:
    """What a tensor-parallel rank holds of a parameter: for each of ``outer``, a part of an axis."""

    outer: int
    """Product of the axes before the one that is split."""
    begin: int
    end: int
    inner: int
    """Product of the axes behind it."""

    @classmethod
    def of(cls, parameter: ParameterMeta, tensor_ranks: int, rank: int) -> Slice:
        """The slice of ``rank``; all of the parameter, as one axis, if it is not split."""
        dim = parameter.tensor_parallel_dim
        if dim is None or tensor_ranks == 1:
            return cls(1, 0, math.prod(parameter.shape), 1)
        size = parameter.local_shape(tensor_ranks)[dim]
        outer, inner = math.prod(parameter.shape[:dim]), math.prod(parameter.shape[dim + 1 :])
        return cls(outer, rank * size, (rank + 1) * size, inner)

    def common_runs(self, other: Slice) -> Iterator[Run]:
        """The runs of elements that both slices hold, in order."""
        one, two = self.seen_as(other), other.seen_as(self)
        low, high = max(one.begin, two.begin), min(one.end, two.end)
        if low >= high:
            return
        if one == two:
            yield Run(0, 0, one.count)
            return
        count = (high - low) * one.inner
        for row in range(one.outer):
            first = (row * (one.end - one.begin) + low - one.begin) * one.inner
            second = (row * (two.end - two.begin) + low - two.begin) * two.inner
            yield Run(first, second, count)

    @property
    def count(self) -> int:
        """Elements of the slice."""
        return self.outer * (self.end - self.begin) * self.inner

    def seen_as(self, other: Slice) -> Slice:
        """A whole parameter by the axes that ``other`` is split along; itself if it is split too."""
        if (self.outer, self.inner) == (other.outer, other.inner) or self.outer * self.inner > 1:
            return self
        length = other.outer * other.inner
        return Slice(other.outer, 0, self.count // length if length else 0, other.inner)


def check_same_parameters(found: Sequence[str], expected: Sequence[str]) -> None:
    """Raise ValueError that names what is missing or unknown."""
    there, wanted = set(found), set(expected)
    missing = [name for name in expected if name not in there]
    unknown = [name for name in found if name not in wanted]
    problems = []
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if unknown:
        problems.append(f"unknown: {', '.join(unknown)}")
    if problems:
        raise ValueError("; ".join(problems))
