"""Running an implementation on several GPUs: a process each, which are one NCCL group.

A process that uses CUDA cannot be forked, so the processes are new ones, which make the implementation
by the lines that a reproduction begins with. What a case gives is moved to each rank's GPU, and what a
rank has computed must be there; it is compared on the CPU. A world of more ranks than there are GPUs is
not run; one rank is a group as well.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conformance.harness import gpu_lane
from conformance.harness.failures import DIED, HUNG, WAITING, ConformanceFailure, NotRun
from conformance.harness.rank_pool import Raised, RankFunction, RankPool, Worker
from conformance.harness.subject import Subject

FIRST_PATIENCE = 50.0
"""Seconds for the first call of a pool: its processes import torch, start CUDA and meet."""

BACKEND = ["nccl"]
IMPORTED_FIRST: list[str] = []
"""Modules that every process of a pool imports before the implementation."""

LOSSES = ("AcceleratorError", "OutOfMemoryError")
"""Exceptions after which a process is not used again."""

_pools: dict[int, GpuPool] = {}
_method: list[Any] = []


def on_gpus(
    subject: Subject, ranks: int, function: RankFunction, arguments: tuple[Any, ...]
) -> list[Any]:
    """What ``function(subject, *arguments)`` returns on each of ``ranks`` GPUs, moved to the CPU.

    Raises :class:`NotRun` where there are fewer GPUs.
    """
    have = torch.cuda.device_count()
    if ranks > have:
        raise NotRun(f"needs {ranks} GPUs, and there {'is' if have == 1 else 'are'} {have}")
    if not _method or _method[0] != subject.method:
        end_pools()
        _method[:] = [subject.method]
    if ranks not in _pools:
        _pools[ranks] = GpuPool(subject, ranks)
    return _pools[ranks].call(function, arguments)


def end_pools() -> None:
    """End every process of every pool."""
    for pool in _pools.values():
        pool.end()
    _pools.clear()


class GpuPool(RankPool):
    """``ranks`` processes with a GPU each that wait for calls."""

    def __init__(self, subject: Subject, ranks: int) -> None:
        super().__init__(subject, ranks)
        self.usual_patience = self.patience

    def _check_forkable(self) -> None:
        """Nothing is forked."""

    def start(self) -> None:
        """Start the processes; they meet at a file."""
        self.folder = tempfile.TemporaryDirectory(prefix="conformance-gpus-")
        place = Path(self.folder.name)
        self.workers = [
            spawned(self.subject, rank, self.ranks, place) for rank in range(self.ranks)
        ]
        self.patience = FIRST_PATIENCE

    def call(self, function: RankFunction, arguments: tuple[Any, ...]) -> list[Any]:
        """See :func:`on_gpus`."""
        try:
            return super().call(function, arguments)
        except ConformanceFailure as failure:
            if failure.kind in (DIED, HUNG, WAITING) or any(
                name in failure.kind for name in LOSSES
            ):
                self.end()
                gpu_lane.marked(failure, gpu_lane.BROKEN)
            raise
        finally:
            self.patience = min(self.patience, self.usual_patience)

    def _must_end(self, raised: list[Raised]) -> bool:
        # New processes take many seconds. Where all have answered, none waits for another.
        return any(answer.kind in (DIED, HUNG, WAITING) for answer in raised) or (
            0 < len(raised) < self.ranks
        )


def spawned(subject: Subject, rank: int, ranks: int, folder: Path) -> Worker:
    """A new process for a rank."""
    ours, theirs = connection.Pipe()
    stacks = folder / f"stack-{rank}.txt"
    os.set_inheritable(theirs.fileno(), True)
    job = {
        "rank": rank,
        "ranks": ranks,
        "pipe": theirs.fileno(),
        "folder": str(folder),
        "stacks": str(stacks),
        "contract": subject.contract.name,
        "lines": list(subject.import_lines),
        "backend": BACKEND[0],
        "first": IMPORTED_FIRST,
    }
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    command = [sys.executable, "-m", "conformance.harness.gpu_rank", json.dumps(job)]
    environment = {**os.environ, "PYTHONPATH": path}
    process = os.posix_spawn(sys.executable, command, environment)
    theirs.close()
    return Worker(rank, process, ours, stacks)


def moved(value: Any, device: str) -> Any:
    """The same arguments or results with every tensor on ``device``."""
    if isinstance(value, (Tensor, nn.Module)):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(each, device) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each, device) for each in value)
    if isinstance(value, dict):  # of any type: what else it knows stays
        there = copy.copy(value)
        for name, each in value.items():
            there[name] = moved(each, device)
        return there
    if is_dataclass(value) and not isinstance(value, type):
        changed = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
        return replace(value, **{name: moved(each, device) for name, each in changed.items()})
    return value


def reject_elsewhere(value: Any, name: str = "the result") -> None:
    """Fail if a rank gives a tensor that is not on its GPU."""
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            raise ConformanceFailure("wrong device", f"{name} is on the {value.device.type}")
        return
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        for key, each in value.items():
            reject_elsewhere(each, f"{name}, {key}" if name != "the result" else str(key))
    elif isinstance(value, (list, tuple)):
        for each in value:
            reject_elsewhere(each, name)
