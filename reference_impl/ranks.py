"""The ranks of a group: one alone, all in one process, or those of ``torch.distributed``.

A program is written once, for one rank, against :class:`Ranks`::

    def program(ranks: Ranks) -> Tensor:
        return ranks.all_reduce(torch.full((2,), float(ranks.rank)))

    in_process(4, program)          # four results; all ranks are threads of this process
    program(current_ranks())        # the default group of torch.distributed, or one rank alone

In one process every reduction adds in the order of the ranks, so that results are reproducible bit
for bit. The three functions at the end are the collectives of tensor parallelism with the gradients
that belong to them (Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

PATIENCE = 60.0
"""Seconds that a rank in one process waits for the others."""


class Ranks(ABC):
    """A group as one of its ranks sees it. Every rank makes the same calls in the same order."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @abstractmethod
    def exchange(self, thing: Any) -> list[Any]:
        """What every rank gave, in rank order: small objects of any type that can be pickled."""

    @abstractmethod
    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks in rank order; they have one shape and dtype. New tensors."""

    @abstractmethod
    def gather_into(self, whole: Tensor, part: Tensor) -> None:
        """Write the equal parts of all ranks to ``whole``, one behind the other; both are flat.

        ``part`` may be this rank's place in ``whole``.
        """

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, a new tensor in the dtype of ``x``."""

    @abstractmethod
    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """The tensor of rank ``source``, a new one; the others give one of its shape and dtype."""

    @abstractmethod
    def split(self, size: int) -> Ranks:
        """The group of ``size`` consecutive ranks that this rank is in.

        Every rank takes part in making every group, in the same order, as torch.distributed demands.
        Raises ValueError unless ``size`` divides the number of ranks.
        """

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The tensors of all ranks, concatenated along ``dim`` in rank order."""
        return torch.cat(self.gather(x), dim)

    def groups(self, size: int) -> list[range]:
        """The groups of ``size`` consecutive ranks."""
        if size < 1 or self.size % size:
            raise ValueError(f"{self.size} ranks cannot be split into groups of {size}")
        return [range(start, start + size) for start in range(0, self.size, size)]


def put(part: Tensor, place: Tensor) -> None:
    """Copy ``part`` to ``place``, unless it is there."""
    if place.data_ptr() != part.data_ptr():
        place.copy_(part)


class OneRank(Ranks):
    """A single rank: nothing is communicated."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def exchange(self, thing: Any) -> list[Any]:
        """See :meth:`Ranks.exchange`."""
        return [thing]

    def gather(self, x: Tensor) -> list[Tensor]:
        """See :meth:`Ranks.gather`."""
        return [x.clone()]

    def gather_into(self, whole: Tensor, part: Tensor) -> None:
        """See :meth:`Ranks.gather_into`."""
        put(part, whole)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :meth:`Ranks.all_reduce`."""
        return x.clone()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """See :meth:`Ranks.broadcast`."""
        return x.clone()

    def split(self, size: int) -> Ranks:
        """See :meth:`Ranks.split`."""
        self.groups(size)
        return self


class DistributedRanks(Ranks):
    """The ranks of a process group; default: all of ``torch.distributed``."""

    def __init__(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        import torch.distributed as dist

        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.group = group

    def exchange(self, thing: Any) -> list[Any]:
        """See :meth:`Ranks.exchange`."""
        things = [None] * self.size
        torch.distributed.all_gather_object(things, thing, group=self.group)
        return things

    def gather(self, x: Tensor) -> list[Tensor]:
        """See :meth:`Ranks.gather`."""
        x = x.detach().contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x, group=self.group)
        return parts

    def gather_into(self, whole: Tensor, part: Tensor) -> None:
        """See :meth:`Ranks.gather_into`."""
        dist = torch.distributed
        # torch 2.13 warns of the older name; 2.11 has no other
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        if whole.numel():
            gather(whole, part, group=self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :meth:`Ranks.all_reduce`."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """See :meth:`Ranks.broadcast`."""
        copy = x.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.broadcast(copy, group=self.group, group_src=source)
        return copy

    def split(self, size: int) -> Ranks:
        """See :meth:`Ranks.split`."""
        groups = self.groups(size)
        if size == self.size:
            return self
        if size == 1:
            return OneRank()
        members = range(self.size)
        if self.group is not None:
            members = torch.distributed.get_process_group_ranks(self.group)
        own = None
        for group in groups:
            made = torch.distributed.new_group([members[rank] for rank in group])
            own = made if self.rank in group else own
        return DistributedRanks(own)


class RankFailed(RuntimeError):
    """A rank in one process raised an exception, which is the cause of this one."""


class _Meeting:
    """Where the ranks of one group in one process lay down what they exchange."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.parts: dict[tuple[int, int], _Meeting] = {}
        self.lock = threading.Lock()

    def exchange(self, rank: int, thing: Any) -> list[Any]:
        """What every rank laid down."""
        self.slots[rank] = thing
        self.barrier.wait()
        things = list(self.slots)
        self.barrier.wait()  # nobody lays down anew before all have read
        return things

    def part(self, size: int, index: int) -> _Meeting:
        """The meeting of group ``index`` of the groups of ``size``; made once, for all its ranks."""
        with self.lock:
            return self.parts.setdefault((size, index), _Meeting(size))

    def abort(self) -> None:
        """Wake whoever waits: the program failed."""
        self.barrier.abort()
        for part in self.parts.values():
            part.abort()


class ThreadRanks(Ranks):
    """A rank that is a thread; made by :func:`in_process`."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        super().__init__(rank, size)
        self._meeting = meeting

    def exchange(self, thing: Any) -> list[Any]:
        """See :meth:`Ranks.exchange`."""
        return self._meeting.exchange(self.rank, thing)

    def gather(self, x: Tensor) -> list[Tensor]:
        """See :meth:`Ranks.gather`."""
        return [part.clone() for part in self.exchange(x.detach().clone())]

    def gather_into(self, whole: Tensor, part: Tensor) -> None:
        """See :meth:`Ranks.gather_into`."""
        for place, other in zip(whole.chunk(self.size), self.exchange(part)):
            put(other, place)
        self.exchange(None)  # nobody changes its part before all have read it

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :meth:`Ranks.all_reduce`."""
        total, *others = self.gather(x)
        for other in others:
            total += other
        return total

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """See :meth:`Ranks.broadcast`."""
        return self.gather(x)[source]

    def split(self, size: int) -> Ranks:
        """See :meth:`Ranks.split`."""
        self.groups(size)
        part = self._meeting.part(size, self.rank // size)
        return ThreadRanks(self.rank % size, size, part)


def in_process(size: int, program: Callable[[Ranks], Result]) -> list[Result]:
    """The results of ``program`` on each of ``size`` ranks, which are threads of this process.

    Raises :class:`RankFailed` for the first rank whose program raised an exception.
    """
    if size == 1:
        return [program(OneRank())]
    meeting = _Meeting(size)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []
    recording = torch.is_grad_enabled()

    def run(rank: int) -> None:
        try:
            with torch.set_grad_enabled(recording):  # grad mode belongs to a thread
                results[rank] = program(ThreadRanks(rank, size, meeting))
        except threading.BrokenBarrierError as error:
            errors.append((size + rank, error))  # only because another failed first
            meeting.abort()
        except BaseException as error:
            errors.append((rank, error))
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank, error = min(errors, key=lambda pair: pair[0])
        raise RankFailed(f"rank {rank % size} of {size}: {error or type(error)}") from error
    return results


def current_ranks(backend: str = "gloo") -> Ranks:
    """The ranks of this process: the default group, the one torchrun asks for, or one rank alone.

    A group that is initialised already is used as it is; under torchrun one is initialised with
    ``backend``.
    """
    import torch.distributed as dist

    if not dist.is_available():
        return OneRank()
    if not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return OneRank()
        dist.init_process_group(backend)
    return DistributedRanks()


def agree(ranks: Ranks, error: Exception | None) -> None:
    """Raise on every rank if any rank has an error, so that none waits for one that left.

    A rank with an error of its own raises that; the others raise RuntimeError that names the rank.
    """
    problems: Sequence[str | None] = ranks.exchange(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise RuntimeError(f"rank {rank} of {ranks.size}: {problem}")


# Collectives with gradients


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(context, x, ranks):
        context.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return context.ranks.all_reduce(gradient), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(context, x, ranks):
        return ranks.all_reduce(x)

    @staticmethod
    def backward(context, gradient):
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, x, ranks):
        context.ranks, context.width = ranks, x.shape[-1]
        return ranks.all_gather(x)

    @staticmethod
    def backward(context, gradient):
        start = context.ranks.rank * context.width
        return gradient[..., start : start + context.width].contiguous(), None


def copy_to_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """``x``, which is the same on every rank; its gradient is the sum of the ranks' gradients."""
    return x if ranks.size == 1 else _Copy.apply(x, ranks)


def reduce_from_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of the ranks' ``x``; the gradient of each is that of the sum."""
    return x if ranks.size == 1 else _Reduce.apply(x, ranks)


def gather_from_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The ranks' ``x``, concatenated along the last axis; each has its part of the gradient."""
    return x if ranks.size == 1 else _Gather.apply(x, ranks)
