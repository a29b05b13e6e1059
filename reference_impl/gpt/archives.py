"""Files of ``torch.save``: zip archives whose pickle is not executed, read record by record.

``torch.load`` maps the file and gives names, shapes, and places of storages (``weights_only=True``).
The bytes are then read from the records themselves and checked against their CRC-32, which
``torch.load`` does not look at. Optimizer state that rides along is never read.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_impl.gpt.dictionaries import find_state
from reference_impl.stored import (
    CheckpointError,
    StoredCheckpoint,
    StoredTensor,
    UnchangedFile,
    read_bytes,
)


def open_archive(path: Path) -> StoredCheckpoint:
    """The index of an archive that ``torch.save`` wrote."""
    source, file = str(path), UnchangedFile.of(path)
    records = checked_records(path)
    content, storages = load_mapped(path)
    state, rest = find_state(source, content)
    place_of = places_of_storages(source, storages, data_places(file, records))
    uses = Counter(storage_of(tensor) for tensor in state.values())
    shared = {storage: SharedStorage(count) for storage, count in uses.items() if count > 1}
    tensors = {}
    for key, tensor in state.items():
        place = place_of.get(storage_of(tensor), EMPTY)
        layout = Strided.of(tensor)
        read = ArchivedTensor(file, key, place, layout, shared.get(storage_of(tensor)))
        tensors[key] = StoredTensor(tuple(tensor.shape), tensor.dtype, read)
    return StoredCheckpoint(source, tensors, rest)


def checked_records(path: Path) -> list[zipfile.ZipInfo]:
    """The records of the archive; all but those of tensors are read and checked."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            for record in records:
                if record.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile("a record is compressed")
                content = b"" if "/data/" in record.filename else archive.read(record)
                if record.filename.endswith("/byteorder") and content.decode() != sys.byteorder:
                    raise zipfile.BadZipFile(f"its tensors are {content.decode()}-endian")
            return records
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        problem = f"the archive is truncated or damaged: {error}"
        raise CheckpointError(str(path), problem) from error


Storage = tuple[int, int]
"""Address and bytes of a storage in the mapped file."""


def load_mapped(path: Path) -> tuple[Any, set[Storage]]:
    """What the archive holds, as a map of the file, and every storage of it that is not empty."""
    storages: set[Storage] = set()

    def keep(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        if storage.nbytes():
            storages.add((storage.data_ptr(), storage.nbytes()))
        return storage

    try:
        content = torch.load(path, map_location=keep, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        problem = "holds more than tensors and plain values, and is not unpickled"
        raise CheckpointError(str(path), f"{problem}: {reason(error)}") from error
    except Exception as error:
        raise CheckpointError(str(path), f"torch.load refuses it: {reason(error)}") from error
    return content, storages


def reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (telling or lines or [type(error).__name__])[0]


def storage_of(tensor: Tensor) -> Storage:
    """The storage of a tensor in the mapped file."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


@dataclass(frozen=True)
class Place:
    """Where the data of a record lies in the file, and what its checksum is."""

    offset: int
    size: int
    checksum: int


EMPTY = Place(0, 0, 0)


def data_places(file: UnchangedFile, records: list[zipfile.ZipInfo]) -> list[Place]:
    """The places of the tensors' records that are not empty, from the first in the file on."""
    places = []
    with file.at(0) as opened:
        for record in records:
            if not record.file_size or "/data/" not in record.filename:
                continue
            opened.seek(record.header_offset + 26)
            name, extra = (int.from_bytes(opened.read(2), "little") for _ in range(2))
            offset = record.header_offset + 30 + name + extra
            places.append(Place(offset, record.file_size, record.CRC))
    return sorted(places, key=lambda place: place.offset)


def places_of_storages(
    source: str, storages: set[Storage], places: list[Place]
) -> dict[Storage, Place]:
    """The place in the file of each storage.

    In a map of the file storages lie as records do. All of both are known, so that they are put side
    by side in order; a guess from some of them could take a copy of the model for the model.
    """
    in_order = sorted(storages)
    same_sizes = [size for _, size in in_order] == [place.size for place in places]
    bases = {address - place.offset for (address, _), place in zip(in_order, places)}
    if not same_sizes or len(bases) > 1:
        raise CheckpointError(source, "its records are not those of the tensors in its index")
    return dict(zip(in_order, places))


@dataclass(frozen=True)
class Strided:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    negated: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Strided:
        """How ``tensor`` lies in its storage."""
        shape, negated = tuple(tensor.shape), tensor.is_neg()
        return cls(tensor.dtype, shape, tensor.stride(), tensor.storage_offset(), negated)

    def take(self, storage: Tensor) -> Tensor:
        """The contiguous tensor in a storage given as bytes; it keeps no more memory than it needs."""
        values = storage.view(self.dtype)
        tensor = values.as_strided(self.shape, self.stride, self.offset)
        if self.negated:
            return -tensor
        if tensor.is_contiguous() and tensor.numel() == values.numel():
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)


class SharedStorage:
    """A storage that several tensors share: read for the first, and forgotten after the last."""

    def __init__(self, uses: int) -> None:
        self.uses = self.left = uses
        self.bytes: Tensor | None = None

    def __call__(self, tensor: ArchivedTensor) -> Tensor:
        """The storage of ``tensor``, which nobody may change."""
        storage = tensor.read_storage() if self.bytes is None else self.bytes
        self.left -= 1
        self.bytes = storage if self.left else None
        self.left = self.left or self.uses
        return storage


@dataclass(frozen=True)
class ArchivedTensor:
    """Reads one tensor of an archive, and checks it against the record's CRC-32."""

    file: UnchangedFile
    key: str
    place: Place
    layout: Strided
    shared: SharedStorage | None

    def __call__(self) -> Tensor:
        """A new tensor."""
        if self.shared is None:
            return self.layout.take(self.read_storage())
        return self.layout.take(self.shared(self)).clone()

    def read_storage(self) -> Tensor:
        """The bytes of the record."""
        source, place = str(self.file.path), self.place
        with self.file.at(place.offset, self.key) as file:
            storage, checksum = read_bytes(file, place.size, source, self.key)
        if checksum != place.checksum:
            problem = (
                f"its bytes are damaged (CRC-32 {checksum:08x}, expected {place.checksum:08x})"
            )
            raise CheckpointError(source, problem, key=self.key)
        return storage
