"""safetensors files: the library checks header and length, tensors are read one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reference_impl.stored import (
    CheckpointError,
    StoredCheckpoint,
    StoredTensor,
    UnchangedFile,
    read_bytes,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def open_safetensors(path: Path) -> StoredCheckpoint:
    """The index of a safetensors file.

    ``save_model`` of safetensors stores one of several names that share memory, and the others in
    the metadata as ``{dropped name: stored name}``; they are restored.
    """
    source, file = str(path), UnchangedFile.of(path)
    try:
        with safe_open(path, framework="pt") as opened:  # the library checks header and length
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(source, f"is truncated or damaged: {error}") from error
    with file.at(0, "header") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            problem = f"has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}"
            raise CheckpointError(source, problem, key=key)
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        read = SafeTensor(file, key, 8 + length + begin, end - begin, dtype, shape)
        tensors[key] = StoredTensor(shape, dtype, read)
    for dropped, stored in metadata.items():
        if stored in tensors and dropped not in tensors:
            tensors[dropped] = tensors[stored]
    if not tensors:
        raise CheckpointError(source, "holds no tensors")
    return StoredCheckpoint(source, tensors, metadata)


@dataclass(frozen=True)
class SafeTensor:
    """Reads one tensor of a safetensors file."""

    file: UnchangedFile
    key: str
    offset: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __call__(self) -> Tensor:
        """A new tensor."""
        with self.file.at(self.offset, self.key) as file:
            storage, _ = read_bytes(file, self.size, str(self.file.path), self.key)
        return storage.view(self.dtype).view(self.shape)

    def part(self, dim: int, ranges: Sequence[range]) -> Tensor:
        """The indices ``ranges`` along ``dim``, one range after the other; only they are read."""
        width = torch.empty((), dtype=self.dtype).element_size()
        inner = width * math.prod(self.shape[dim + 1 :])
        outer = math.prod(self.shape[:dim])
        pieces = []
        for wanted in ranges:
            size, rows = len(wanted) * inner, []
            for row in range(outer):
                offset = self.offset + row * self.shape[dim] * inner + wanted.start * inner
                rows.append((offset, size))
            shape = (*self.shape[:dim], len(wanted), *self.shape[dim + 1 :])
            pieces.append(self._read(rows).view(self.dtype).view(shape))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _read(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """The bytes at these places (offset, size) of the file, one after the other."""
        storage = torch.empty(sum(size for _, size in places), dtype=torch.uint8)
        view, done = memoryview(storage.numpy()), 0
        with self.file.at(places[0][0], self.key) as file:
            for offset, size in places:
                file.seek(offset)
                if file.readinto(view[done : done + size]) != size:
                    raise CheckpointError(str(self.file.path), "ends too early", key=self.key)
                done += size
        return storage
