"""What a checkpoint stores, and reading its bytes: a tensor at a time, and only from the file it was.

Nothing of a file stays mapped or open. The file may be replaced while a model lives; if it changes
between the reading of its index and of a tensor, that is an error.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Bytes that are read and checked at a time."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; names the file and, where there is one, the key."""

    def __init__(self, source: str, problem: str, *, key: str | None = None) -> None:
        super().__init__(f"{source}: {problem}" if key is None else f"{source}: {key}: {problem}")
        self.source = source
        self.key = key


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Gives a new tensor each time; raises :class:`CheckpointError` for damaged bytes."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """What a file holds."""

    source: str
    """The path, or what else to call it in an error."""
    tensors: Mapping[str, StoredTensor]
    """The model's state dictionary under the names of the file."""
    rest: Mapping[str, Any]
    """The other entries of a training dictionary, optimizer state left out."""


class LazyState(Mapping[str, Tensor]):
    """A state dictionary whose tensors are read from the file when they are looked up."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class UnchangedFile:
    """A file as it was when its index was read."""

    path: Path
    identity: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> UnchangedFile:
        """The file as it is now."""
        return cls(path, identity_of(os.stat(path)))

    @contextmanager
    def at(self, offset: int, key: str | None = None) -> Iterator[BinaryIO]:
        """The open file at a place; raises :class:`CheckpointError` if it is another by now."""
        try:
            with self.path.open("rb") as file:
                if identity_of(os.fstat(file.fileno())) != self.identity:
                    problem = "the file was changed after its index was read"
                    raise CheckpointError(str(self.path), problem, key=key)
                file.seek(offset)
                yield file
        except OSError as error:
            raise CheckpointError(str(self.path), f"cannot be read: {error}", key=key) from error


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; of any shape and any real dtype.

    The extremes tell it without a temporary; ``isfinite`` makes several of the tensor's size, and the
    holes that they leave between the weights are counted as the loader's memory.
    """
    if not tensor.numel():
        return True
    if tensor.is_floating_point() and tensor.element_size() == 1:  # torch compares no float8
        tensor = tensor.float()
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_bytes(file: BinaryIO, size: int, source: str, key: str) -> tuple[Tensor, int]:
    """The next ``size`` bytes of a file as a uint8 tensor, and their CRC-32."""
    storage = torch.empty(size, dtype=torch.uint8)
    view, checksum, done = memoryview(storage.numpy()), 0, 0
    while done < size:
        count = file.readinto(view[done : min(done + CHUNK, size)])
        if not count:
            raise CheckpointError(source, f"ends {size - done} bytes too early", key=key)
        checksum = zlib.crc32(view[done : done + count], checksum)
        done += count
    return storage, checksum
