"""Temporary folders that all ranks see, and what is done to files once, under torchrun too."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from conformance.harness.rank_pool import PATIENCE, under_torchrun

MEMORY = Path("/dev/shm")
"""Where files are memory, as on Linux: to wait for a disk takes longer than all the rest."""


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder, the same for all ranks."""
    if not under_torchrun():
        where = MEMORY if os.access(MEMORY, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="conformance-checkpoints-", dir=where) as name:
            yield Path(name)
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    names = [tempfile.mkdtemp(prefix="conformance-checkpoints-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    try:
        yield Path(names[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(names[0], ignore_errors=True)


def done_once(function: Callable, *arguments: Any) -> Any:
    """What a function gives that changes files: under torchrun, where all ranks are here, on one."""
    if not under_torchrun():
        return function(*arguments)
    import torch.distributed as dist

    made = [function(*arguments) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


def files_of(directory: Path) -> list[Path]:
    """All files of a directory and what is in it."""
    return sorted(path for path in directory.rglob("*") if path.is_file())
